"""Every format gives the same samples; what cannot be used is refused by name before training; the store survives anything."""
import csv
import fcntl
import io
import itertools
import json
import os
import tarfile

import PIL.features
import pyarrow.parquet
import pytest
import torch
from conftest import FORKS
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from data import captioned, formats, imaging
from runtime import seeds, store
from runtime.cli import UserError

CAPTIONS = ["a red fox", "two cats, one asleep", "a red fox", "ein Vogel über dem Meer"]      # one twice, a comma, not ASCII
NAMES = ["a", "b", "c", "d"]


def picture(i, mode="RGB", size=(24, 17)):
    """A noisy PIL image; another one for every i."""
    pixels = torch.randint(256, (size[1], size[0], 3), generator=seeds.generator(0, i), dtype=torch.uint8).numpy()
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="png", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GOOD = {f"{name}.png": encoded(picture(i)) for i, name in enumerate(NAMES)}
JPEG = encoded(picture(9, size=(90, 90)), "jpeg")


# ---- one writer per format: (folder, {file name: bytes}, captions) -> what to give to --data ----


def write_txt(folder, files, captions):
    for (name, content), caption in zip(files.items(), captions):
        (folder / name).write_bytes(content)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def write_jsonl(folder, files, captions):
    write_txt(folder, files, [None] * len(files))
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in zip(files, captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_csv(folder, files, captions):
    write_txt(folder, files, [None] * len(files))
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *zip(files, captions)])
    return folder


def write_tsv(folder, files, captions):
    write_txt(folder, files, [None] * len(files))
    with open(folder / "metadata.tsv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("file_name", "caption"), *zip(files, captions)])
    return folder


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def with_txt(files, captions):
    """The members of a shard, captions in .txt."""
    return [member for (name, content), caption in zip(files.items(), captions)
            for member in ((name, content), (f"{name.split('.')[0]}.txt", (caption or "").encode()))]


def write_tar_txt(folder, files, captions):
    return write_tar(folder / "shard.tar", with_txt(files, captions))


def write_tar_json(folder, files, captions):
    write_tar(folder / "shard.tar", [member for (name, content), caption in zip(files.items(), captions) for member in (
        (name, content), (f"{name.split('.')[0]}.json", json.dumps({"width": 1, "caption": caption}).encode()))])
    return folder                                          # a folder that holds shards


def write_tars(folder, files, captions):
    half = len(files) // 2
    members = with_txt(files, captions)
    write_tar(folder / "00.tar", members[:2 * half])
    write_tar(folder / "01.tar", members[2 * half:])
    return folder / "{00..01}.tar"


def write_glob(folder, files, captions):
    return write_tars(folder, files, captions).parent / "*.tar"


def table(files, captions):
    """A datasets.Dataset. files: {file name: bytes}, or a list of cells."""
    import datasets
    images = [{"bytes": content, "path": name} for name, content in files.items()] if isinstance(files, dict) else files
    features = datasets.Features({"number": datasets.Value("int64"), "picture": datasets.Image(), "prompt": datasets.Value("string")})
    return datasets.Dataset.from_dict({"number": list(range(len(files))), "picture": images, "prompt": list(captions)}, features)


def write_parquet(folder, files, captions):
    table(files, captions).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def write_parquet_folder(folder, files, captions):
    (folder / "data").mkdir()
    table(files, captions).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table({"z.png": GOOD["a.png"]}, ["a test picture"]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def write_disk(folder, files, captions):
    table(files, captions).save_to_disk(folder / "saved")
    return folder / "saved"


def write_links(folder, files, captions):
    """A folder of links to folders, one of which leads back up."""
    kept = folder.parent / "elsewhere"
    for name in ("one", "two"):
        (kept / name).mkdir(parents=True)
        (folder / name).symlink_to(kept / name)
    half = len(files) // 2
    for name, part in (("one", slice(half)), ("two", slice(half, None))):
        write_txt(kept / name, dict(list(files.items())[part]), captions[part])
    (kept / "two" / "up").symlink_to(folder)
    (folder / "two again").symlink_to(kept / "two")
    return folder


def write_img2dataset(folder, files, captions):
    """img2dataset's layout "files", with what it and others leave in such a folder: none of it is an image or a lost caption."""
    (folder / "00000").mkdir()
    write_txt(folder / "00000", files, [None] * len(files))
    for name, caption in zip(files, captions):
        record = {"url": f"https://x/{name}", "caption": caption, "key": name, "status": "success", "width": 24, "exif": "{}"}
        (folder / "00000" / name).with_suffix(".json").write_text(json.dumps(record))
    pyarrow.parquet.write_table(pyarrow.table({"url": list(files), "caption": captions}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text('{"count": 4, "caption": "not one"}')
    for name in ("README.md", "Thumbs.db", ".DS_Store", "a.npz", "00000/a.npz", "00000/README", "b.pdf"):
        (folder / name).write_bytes(b"\xff")
    return folder


def write_coco(folder, files, captions):
    """COCO as it is distributed: what is trained on is the training split, whatever lies beside it."""
    for split, names in (("train2017", files), ("val2017", ["a.png"])):
        (folder / split).mkdir()
        write_txt(folder / split, {name: files[name] for name in names}, [None] * len(names))
        annotations = [{"id": 10 * turn + i, "image_id": i, "caption": caption if turn == 0 else "another of its captions"}
                       for turn in range(3) for i, caption in enumerate(captions[:len(names)])]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(
            {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)], "annotations": annotations}))
    (folder / "annotations" / "instances_train2017.json").write_text("{}")
    return folder


def write_tar_apart(folder, files, captions):
    """All captions, then all images, as tar's --sort=none and many tools leave them; with what macOS and others add."""
    members = with_txt(files, captions)
    return write_tar(folder / "x.tar", [("./README.md", b"x"), ("./._a.png", b"x"), *members[1::2], *members[::2], ("stats.json", b"{}")])


def write_tar_dots(folder, files, captions):
    """Names with dots, a folder's among them."""
    dotted = {f"v1.5/photo.{i}.{name}": content for i, (name, content) in enumerate(files.items())}
    return write_tar(folder / "x.tar", [member for (name, content), caption in zip(dotted.items(), captions) for member in (
        (name, content), (name[:-4] + ".txt", caption.encode()))])


def write_parquet_bytes(folder, files, captions):
    """Plain bytes, as img2dataset writes them: no type says that they are images."""
    pyarrow.parquet.write_table(pyarrow.table({"url": list(files), "jpg": list(files.values()), "caption": captions}), folder / "x.parquet")
    return folder / "x.parquet"


def write_parquet_struct(folder, files, captions):
    cells = [{"bytes": content, "path": name} for name, content in files.items()]
    pyarrow.parquet.write_table(pyarrow.table({"key": list(files), "image": cells, "Caption": captions}), folder / "x.parquet")
    return folder                                          # a folder that holds tables


def write_caption(folder, files, captions):
    """Captions in .caption, kohya's name for them."""
    for file in list(write_txt(folder, files, captions).glob("*.txt")):
        file.rename(file.with_suffix(".caption"))
    return folder


def write_tar_caption(folder, files, captions):
    return write_tar(folder / "x.tar", [(name.replace(".txt", ".caption"), content) for name, content in with_txt(files, captions)])


FORMATS = [write_txt, write_caption, write_tar_caption, write_jsonl, write_csv, write_tsv, write_tar_txt, write_tar_json, write_tars, write_glob, write_parquet, write_parquet_folder,
           write_disk, write_links, write_img2dataset, write_coco, write_tar_apart, write_tar_dots, write_parquet_bytes,
           write_parquet_struct]
format_ids = [writer.__name__.removeprefix("write_") for writer in FORMATS]
any_format = pytest.mark.parametrize("write", FORMATS, ids=format_ids)


@pytest.fixture(autouse=True)
def quiet_hub(tmp_path_factory, monkeypatch):
    """datasets keeps its Arrow files in a folder of the test and never asks the network."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def open_(path, **options):
    return captioned.open_dataset(str(path), "", seed=0, **options)


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        open_(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- good data ----


@any_format
def test_every_format_gives_the_same_images_and_captions(tmp_path, write):
    (tmp_path / "other").mkdir()
    expected = open_(write_txt(tmp_path / "other", GOOD, CAPTIONS))
    (tmp_path / "test").mkdir()                            # not a split: a name
    dataset = open_(write(tmp_path / "test", GOOD, CAPTIONS))
    assert dataset.size == 4 and dataset.skipped == []
    assert dataset.captions == ["", "a red fox", "two cats, one asleep", "ein Vogel über dem Meer"]
    assert dataset.row_captions == [1, 2, 1, 3]
    assert torch.equal(dataset.decode(range(4), 16), expected.decode(range(4), 16))
    numbers = [7, 0, 3, 0, 4_000_000]
    assert dataset.rows(numbers) == expected.rows(numbers)
    assert torch.equal(dataset.images(numbers, 8), dataset.decode(dataset.rows(numbers), 8))
    assert dataset.caption_indices(numbers) == [dataset.row_captions[row] for row in dataset.rows(numbers)]


def test_a_sample_number_is_the_same_image_in_every_run_and_each_epoch_holds_all(tmp_path):
    one, other = (open_(path) for path in [write_txt(tmp_path, GOOD, CAPTIONS)] * 2)
    epochs = [one.rows(range(4 * e, 4 * e + 4)) for e in range(12)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and len(set(map(tuple, epochs))) > 4
    assert [other.rows([k])[0] for k in reversed(range(48))] == list(itertools.chain(*epochs))[::-1]
    assert captioned.open_dataset(str(tmp_path), "", seed=1).rows(range(48)) != one.rows(range(48))


def test_a_folder_of_kohya_s_says_how_often_its_images_come_and_what_they_are(tmp_path, decoded):
    """3_red fox comes three times a round, is checked and stored once, and names what has no caption."""
    for folder, names, captions in (("3_red fox", ("a.png", "b.png"), (None, "asleep")), ("1_cat", ("c.png",), (None,)),
                                    ("plain", ("d.png",), ("x",))):
        (tmp_path / folder).mkdir()
        write_txt(tmp_path / folder, {name: GOOD[name] for name in names}, captions)
    dataset = open_(tmp_path)
    assert [row.name for row in dataset.kept] == ["1_cat/c.png", "3_red fox/a.png", "3_red fox/b.png", "plain/d.png"] and len(decoded) == 4
    assert dataset.size == 4 and [dataset.captions[i] for i in dataset.row_captions] == ["cat", "red fox", "asleep", "x"]
    for epoch in range(3):
        numbers = range(8 * epoch, 8 * epoch + 8)
        assert sorted(dataset.rows(numbers)) == [0, 1, 1, 1, 2, 2, 2, 3]
        assert dataset.caption_indices(numbers) == [dataset.row_captions[row] for row in dataset.rows(numbers)]
    (tmp_path / "3_red fox").rename(tmp_path / "2_red fox")
    assert sorted(open_(tmp_path).rows(range(6))) == [0, 1, 1, 2, 2, 3]
    (tmp_path / "1_cat").rename(tmp_path / "0_cat")
    assert "0_cat/c.png is in a folder N_name to be repeated N = 0 times; rename it, or leave it out with --skip-bad" in refusal(tmp_path)
    assert sorted(open_(tmp_path, skip_bad=True).rows(range(5))) == [0, 0, 1, 1, 2]


def test_repeats_are_part_of_a_dataset_s_key_and_no_others_change_it(tmp_path):
    """What was cached before repeats were read stays good; what other repeats made is not taken for this."""
    rows = [formats.Row(name, (str(write_txt(tmp_path, GOOD, CAPTIONS) / name), 0, len(GOOD[name])), "x") for name in GOOD]
    def key(listed):
        return captioned.Images("x", listed, formats.read_span, 0).key
    assert key(rows) == store.digest(captioned.DECODING, *rows)
    assert len({key(rows), key([*rows, rows[0]]), key([rows[0], *rows, rows[0]])}) == 3


@pytest.mark.parametrize("write", [write_txt, write_csv, write_tar_txt, write_tar_json, write_parquet, write_coco, write_caption],
                         ids=["txt", "csv", "tar", "tar json", "parquet", "coco", "caption"])
def test_a_caption_for_all_goes_to_images_without_one_alone(tmp_path, write):
    path = write(tmp_path, GOOD, ["a red fox", "", "", "two cats"])
    assert "has no caption; write one into" in refusal(path) and "or give --caption TEXT" in refusal(path)
    dataset = open_(path, caption=" sks dog ")
    assert [dataset.captions[i] for i in dataset.row_captions] == ["a red fox", "sks dog", "sks dog", "two cats"]


def test_a_caption_for_all_hides_no_other_fault(tmp_path):
    write_txt(tmp_path, GOOD | {"e.png": b"torn"}, [*CAPTIONS, "x"])
    assert "e.png or its caption cannot be read" in refusal(tmp_path, caption="x")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "e.png").write_bytes(GOOD["a.png"])
    assert "e.png or its caption cannot be read ('utf-8'" in refusal(tmp_path, caption="x")
    for source in (("scenes", ""), ("", "prompts.txt")):
        for options in (dict(caption="x"), dict(min_size=8)):
            with pytest.raises(UserError, match="--caption / --min-size: --.* has no image files; leave them out"):
                captioned.open_dataset(*source, seed=0, **options)


def test_images_below_the_smallest_size_are_refused_or_left_out(tmp_path, tmp_path_factory, decoded):
    """The shorter side counts, as the image is seen; and a check for another size is not this one."""
    exif = Image.Exif()
    exif[0x0112] = 6                                       # turned by 90 degrees, which changes no side's length
    files = {"a.png": encoded(picture(0, size=(40, 16))), "b.png": encoded(picture(1, size=(15, 90))), "c.jpg": encoded(
        picture(2, size=(16, 16)), "jpeg", exif=exif), "d.jpg": encoded(picture(3, size=(30, 12)), "jpeg", exif=exif)}
    path, checked = write_txt(tmp_path, files, CAPTIONS), tmp_path_factory.mktemp("run") / "data.json"
    assert open_(path, checked=checked).size == 4
    assert "b.png is 15 x 90 pixels, below --min-size 16; replace or remove it, or leave it out with --skip-bad" in refusal(
        path, min_size=16, checked=checked)
    dataset = open_(path, min_size=16, skip_bad=True, checked=checked)
    assert dataset.skipped == ["b.png", "d.jpg"] and dataset.size == 2
    assert open_(path, min_size=15, skip_bad=True, checked=checked).skipped == ["d.jpg"] and open_(path, checked=checked).size == 4
    (path / "b.png").unlink(), (path / "b.txt").unlink()
    assert "d.jpg is 12 x 30 pixels" in refusal(path, min_size=16)


def test_images_of_any_shape_and_mode_become_squares_in_minus_one_to_one(tmp_path):
    images = {"wide.png": picture(0, size=(90, 20)), "tall.png": picture(1, size=(20, 91)), "small.png": picture(2, size=(3, 5)),
              "palette.png": picture(3, "P"), "alpha.png": picture(4, "RGBA"), "gray.png": picture(5, "L"), "bits.png": picture(6, "1")}
    dataset = open_(write_txt(tmp_path, {name: encoded(image) for name, image in images.items()}, ["x"] * 7))
    batch = dataset.decode(range(7), 16)
    assert batch.shape == (7, 3, 16, 16) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1 and batch.std() > 0.1
    gray = batch[sorted(images).index("gray.png")]
    assert torch.equal(gray[0], gray[1])


def test_the_crop_is_central_and_extremes_reach_one(tmp_path):
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 255), (10, 0, 20, 10))
    square = open_(write_txt(tmp_path, {"a.png": encoded(image)}, ["x"])).decode([0], 10)[0]
    assert square[0, :, 1:-1].eq(-1).all() and square[1:, :, 1:-1].eq(1).all()


def transparent(mode):
    """A picture whose left half is opaque black and whose right half is fully transparent over a hidden black."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    if mode == "P":                                        # a palette of two blacks, one of them transparent
        image = Image.new("P", (16, 16), 0)
        image.putpalette([0] * 6)
        image.paste(1, (8, 0, 16, 16))
        image.info["transparency"] = 1
    elif mode in ("L", "RGB"):                             # one color is transparent: black; what is not is nearly black
        image = Image.new(mode, (16, 16), 1 if mode == "L" else (1, 1, 1))
        image.paste(0, (8, 0, 16, 16))
        image.info["transparency"] = 0 if mode == "L" else (0, 0, 0)
    else:
        image = image.convert(mode)
    return image


@pytest.mark.parametrize("mode, kind", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("L", "png"), ("RGB", "png"),
                                        ("RGBA", "webp"), ("RGBA", "tiff")])
def test_what_is_transparent_is_white_whatever_its_hidden_color(tmp_path, mode, kind):
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    written = encoded(transparent(mode), kind, **options)
    (tmp_path / "images").mkdir()
    found = open_(write_txt(tmp_path / "images", {f"a.{kind}": written}, ["x"])).decode([0], 16)[0]
    assert found[:, :, 8:].eq(1).all() and found[:, :, :8].lt(-0.98).all()


@pytest.mark.parametrize("kind", ["avif", "bmp", "gif", "jpeg", "png", "tiff", "webp"])
def test_every_kind_of_file_that_pillow_reads_is_an_image_of_moving_ones_the_first_frame(tmp_path, kind):
    if kind == "avif" and not PIL.features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    content = encoded(red, kind, **({"save_all": True, "append_images": [blue]} if kind in ("gif", "tiff", "webp", "png") else {}))
    for suffix in {"tiff": ["tif", "tiff"], "jpeg": ["jpg", "JPEG"]}.get(kind, [kind]):
        folder = tmp_path / suffix
        folder.mkdir()
        found = open_(write_txt(folder, {f"a.{suffix}": content}, ["x"])).decode([0], 16)[0]
        assert found[0].gt(0.9).all() and found[1:].lt(-0.9).all()


@pytest.mark.parametrize("image", [Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 70000), Image.new("I", (4, 4), -1),
                                   Image.new("I", (4, 4), 255)], ids=["float", "32 bits", "negative", "32 bits for 8"])
def test_pixels_of_unknown_range_are_refused_not_black(tmp_path, image):
    assert "a.tif or its caption cannot be read (neither 8 nor 16 bits a pixel)" in refusal(
        write_txt(tmp_path, {"a.tif": encoded(image, "tiff")}, ["x"]))


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (3000, 3), (30, 10), (10, 30)])
def test_no_shape_takes_more_memory_than_a_few_squares(tmp_path, monkeypatch, size):
    """The shorter side is brought to 256 pixels: 4000 x 1 would be 1,024,000 x 256. What is cut away is cut first."""
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a, **k: sizes.append(size) or resize(self, size, *a, **k))
    found = open_(write_txt(tmp_path, {"a.png": encoded(Image.new("RGB", size, (255, 0, 0)))}, ["x"])).decode([0], 256)
    assert found.shape == (1, 3, 256, 256) and found[0, 0].eq(1).all()
    assert len(sizes) == 1 and sizes[0][0] * sizes[0][1] <= 17 * 256 ** 2


def test_the_middle_of_a_strip_is_what_resizing_all_of_it_gives():
    """A smooth picture of 20:1, odd and even: cut to its middle first or last, the same within a fraction of a level."""
    for width in (400, 401):
        ramp = Image.linear_gradient("L").rotate(90).resize((width, 20)).convert("RGB")
        whole = ramp.resize((int(64 * width / 20), 64), Image.Resampling.LANCZOS)
        left = round((whole.width - 64) / 2)
        whole = imaging.tensor([whole.crop((left, 0, left + 64, 64))])
        assert (imaging.tensor([imaging.square(ramp, 64)]) - whole).abs().max() * 127.5 <= 1 and whole.std() > 0


def test_a_camera_s_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                       # turn by 270 degrees to see it upright
    turned = picture(0).transpose(Image.Transpose.ROTATE_90)
    files = {"a.png": encoded(turned, exif=exif), "b.png": encoded(picture(0))}
    upright = open_(write_txt(tmp_path, files, ["x", "x"])).decode([0, 1], 17)
    assert torch.equal(upright[0], upright[1])


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = Image.fromarray((torch.arange(256, dtype=torch.int32).reshape(16, 16) * 257).numpy().astype("uint16"))
    square = open_(write_txt(tmp_path, {"a.png": encoded(deep)}, ["x"])).decode([0], 16)[0]
    assert torch.allclose(square[0].flatten(), torch.arange(256) / 127.5 - 1)


def test_columns_are_found_or_named_and_a_list_of_captions_gives_its_first(tmp_path):
    records = [{"img": name, "file_name": "a.png", "long": ["the first", "the second"], "text": "short"} for name in GOOD]
    write_txt(tmp_path, GOOD, [None] * 4)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert open_(tmp_path).captions == ["", "short"]
    dataset = open_(tmp_path, image_column="img", caption_column="long")
    assert dataset.captions == ["", "the first"] and not torch.equal(*dataset.decode([0, 1], 8))
    assert "column wide; name one of img, file_name, long, text with --caption-column" in refusal(tmp_path, caption_column="wide")
    parquet = tmp_path / "x.parquet"
    table(GOOD, CAPTIONS).rename_column("prompt", "words").to_parquet(parquet)
    assert "name one of number, picture, words with --caption-column" in refusal(parquet)
    assert "name one of number, picture, words with --image-column" in refusal(parquet, image_column="img", caption_column="words")
    assert "the column number holds no images" in refusal(parquet, image_column="number", caption_column="words")
    assert open_(parquet, image_column="picture", caption_column="words").row_captions == [1, 2, 1, 3]


def test_a_json_s_key_is_named_in_a_shard_and_a_mask_is_not_the_image(tmp_path):
    mask = encoded(Image.new("RGB", (8, 8)))
    shard = write_tar(tmp_path / "x.tar", [("a.mask.png", mask), ("a.jpg", JPEG), ("a.txt", b"txt"), ("a.json", b'{"long": "json"}')])
    dataset = open_(shard, caption_column="long")
    assert dataset.captions == ["", "json"] and dataset.decode([0], 8).max() > -1 and open_(shard).captions == ["", "txt"]
    assert open_(shard, image_column="mask.png").decode([0], 8).max() == -1


def test_a_rewritten_parquet_is_read_again(tmp_path):
    assert open_(write_parquet(tmp_path, GOOD, CAPTIONS)).size == 4
    assert open_(write_parquet(tmp_path, {"a.png": GOOD["a.png"]}, ["alone"])).captions == ["", "alone"]


def test_a_name_on_the_hub_is_loaded_by_datasets_alone(tmp_path, monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table(GOOD, CAPTIONS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert open_("user/some-name_1.0").size == 4 and asked == [(("user/some-name_1.0",), {"split": "train"})]
    for slip in ("nowhere", "photos/mine", "a/b/c", "x.parquet", "/no/where"):
        assert f"--data {slip}: no such folder or file; give " in refusal(slip)
    assert len(asked) == 1

    def unknown(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
    monkeypatch.setattr(datasets, "load_dataset", unknown)
    assert "--data no/one: cannot be opened (DatasetNotFoundError: Dataset 'no/one' doesn't exist" in refusal("no/one")


def test_pictures_that_are_given_and_not_used_are_printed(tmp_path, capsys, random_sd):
    """Pairs from the teacher's own trajectories use the captions alone: one line says so, and how to use the pictures."""
    write_txt(tmp_path, GOOD, CAPTIONS)
    text = (f"--data {tmp_path}: only its captions are used, pairs are the teacher's own trajectories; --pairs data or --forward-rate R "
            "uses its pictures\n")
    cases = [(str(tmp_path), {}, 1), (str(tmp_path), {"forward_rate": 0.5}, 0), (str(tmp_path), {"pairs": "data"}, 0),
             (str(tmp_path), {"projection": 0.1, "windows": [1]}, 0), ("scenes", {}, 0)]
    for i, (source, options, times) in enumerate(cases):
        train.main(train.Config(model=str(random_sd), data=source, trajectories=2, solver_steps=8, batch=2, cache_only=True,
                                cache=f"{tmp_path}/.cache{i}", **options))
        assert capsys.readouterr().out.count(text) == times, options


def test_a_run_says_what_it_repeats_and_encodes_each_image_once(tmp_path, capsys, random_sd, monkeypatch):
    """The options reach the data: captions for all, the smallest size, and repeats, of which the cache knows nothing."""
    (tmp_path / "3_fox").mkdir()
    write_txt(tmp_path / "3_fox", {"a.png": GOOD["a.png"], "small.png": encoded(picture(1, size=(7, 7)))}, (None, None))
    write_txt(tmp_path, {"b.png": GOOD["b.png"]}, (None,))
    encoded_, encode = [], train.models.encode
    monkeypatch.setattr(train.models, "encode", lambda pipeline, pictures: encoded_.append(len(pictures)) or encode(pipeline, pictures))
    train.main(train.Config(model=str(random_sd), data=str(tmp_path), pairs="data", cache_only=True, cache=f"{tmp_path}/.cache",
                            caption="a cat", min_size=8, skip_bad=True))
    out = capsys.readouterr().out
    assert f"--data {tmp_path}: each time round 4 samples of 2 images; those of a folder N_name come N times\n" in out
    assert "--skip-bad: 1 left out (3_fox/small.png)\n" in out and "2 images, 2 captions" in out and sum(encoded_) == 2
    with pytest.raises(UserError, match="--min-size -1"):
        train.main(train.Config(model=str(random_sd), data=str(tmp_path), min_size=-1))


def test_scenes_are_endless_and_prompts_have_no_images(tmp_path):
    endless = open_("scenes")
    assert endless.size is None and endless.rows([5, 3]) == [5, 3] and endless.skipped == []
    assert torch.equal(endless.images([5, 3], 32), endless.decode(endless.rows([5, 3]), 32))
    (tmp_path / "p.txt").write_text("fox\n\ncat \nfox\n")
    prompts = captioned.open_dataset("", str(tmp_path / "p.txt"), seed=0)
    drawn = [prompts.captions[i] for i in prompts.caption_indices(range(300))]
    assert prompts.images is None and prompts.captions == ["", "fox", "cat"] and 150 < drawn.count("fox") < 250 and "" not in drawn
    with pytest.raises(UserError, match="give either --data"):
        captioned.open_dataset("scenes", "p.txt", seed=0)


LINE_ENDS_OF_STR = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"     # where str.splitlines() cuts and no editor or format ends a line


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_csv, write_tar_json, write_img2dataset, "prompts.txt", "prompts.csv",
                                   "prompts.jsonl"])
def test_only_a_newline_ends_a_line(tmp_path, write):
    captions = [f"a fox{end}and a cat" for end in LINE_ENDS_OF_STR]
    if callable(write):
        for name, four in (("a", captions[:4]), ("b", captions[4:])):
            (tmp_path / name).mkdir()
            assert open_(write(tmp_path / name, GOOD, four)).captions == ["", *four]
    else:
        lines = {"txt": captions, "csv": ["prompt", *captions], "jsonl": [
            json.dumps({"prompt": caption}, ensure_ascii=False) for caption in captions]}[write.split(".")[1]]
        (tmp_path / write).write_bytes("\r\n".join(lines).encode())
        assert captioned.open_dataset("", str(tmp_path / write), seed=0).captions == ["", *captions]


def test_the_structure_of_a_prompts_file_is_no_prompt(tmp_path):
    def prompts(name, text, column=""):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        return captioned.open_dataset("", str(tmp_path / name), seed=0, caption_column=column).captions[1:]

    def refused(*args):
        with pytest.raises(UserError) as error:
            prompts(*args)
        return str(error.value)
    assert prompts("p.csv", 'id,prompt\n1,"a fox, asleep"\n\n2,"two\nlines"\n') == ["a fox, asleep", "two\nlines"]
    assert prompts("p.tsv", "Prompt\tCategory\na fox, red\tAnimals\n") == ["a fox, red"]           # as PartiPrompts has it
    assert prompts("p.jsonl", '{"text": "a fox"}\n{"text": "a cat"}\n') == ["a fox", "a cat"]
    assert prompts("p.csv", "Prompts,Category\na fox,x\n", "Prompts") == ["a fox"]
    assert prompts("p.txt", "prompt,of sorts\na fox, red\n") == ["prompt,of sorts", "a fox, red"]
    assert refused("p.csv", "a fox, red\na cat, blue\n") == (
        f"--prompts {tmp_path}/p.csv: no caption column known; name one of a fox,  red with --caption-column, or rename the file to .txt if "
        "every line of it is a prompt")
    assert "entry 2 has no prompt; write one or remove the entry" in refused("p.csv", "id,prompt\n1,a fox\n2,\n")
    assert "entry 1 has no text; write" in refused("p.jsonl", '{torn\n{"text": "a cat"}\n')
    assert "no prompt in it; write one per line" in refused("p.csv", "prompt\n")
    assert f"--caption-column text: --prompts {tmp_path}/p.txt has no columns; leave it out" in refused("p.txt", "a fox", "text")
    assert "--data scenes has no columns; leave them out" in refusal("scenes", caption_column="text")
    assert "cannot be read (unexpected end of data)" in refused("p.csv", 'prompt\na fox\n"a cat\na dog\n')
    for name, text in (("p.csv", "id,prompt\n1,a cat\n2,a fox, asleep\n"), ("p.tsv", "prompt\na cat\na fox\tasleep\n")):
        assert "cannot be read (entry 2 has more cells than the header; put a text that holds" in refused(name, text)      # not cut at it
    assert prompts("p.csv", "prompt,id\na cat,1,,\n") == ["a cat"]                             # as spreadsheets end their lines
    assert "no entry of it has columns; in a .jsonl each line is an object" in refused("p.jsonl", '["a fox"]\n')


def test_what_data_cannot_be_is_named_for_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos.zip").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(GOOD["a.png"])
    for address in ("https://x.org/{000..010}.tar", "https://huggingface.co/datasets/user/name", "s3://bucket/x.parquet",
                    "pipe:aws s3 cp s3://bucket/x.tar -", "hf://datasets/user/name"):
        assert f"--data {address}: an address, but data is read from the disk; download it, or give a folder" in refusal(address)
    for pattern in ("nowhere/*.tar", "{0..2}.tar", "photos/*.parquet"):
        assert f"--data {pattern}: matches no file; give a folder" in refusal(pattern)
    assert "--data photos/*.png: a pattern, which only .tar and .parquet files can have; give" in refusal("photos/*.png")
    assert "--data photos.zip: a file of no kind that is read here; give a folder" in refusal("photos.zip")


def test_every_file_of_a_folder_is_read_or_the_folder_is_refused(tmp_path):
    """Images beside shards, or beside tables with images: neither is left out in silence."""
    for other, there, write in (("x.tar", "1 tar files (sub/x.tar)", write_tar_txt), ("x.parquet", "1 tables with images (", write_parquet)):
        folder = tmp_path / other
        (folder / "sub").mkdir(parents=True)
        write(folder / "sub", GOOD, CAPTIONS)
        for shard in (folder / "sub").glob("shard.tar"):
            shard.rename(folder / "sub" / "x.tar")
        assert open_(folder).size == 4                     # alone, in a folder below
        write_txt(folder, {name: GOOD[name] for name in ("a.png", "b.png", "c.png")}, CAPTIONS)
        refused = refusal(folder)
        assert f"--data {folder}: holds 3 image files (a.png, ...) and {there}" in refused, refused
        assert "move away what is not meant, or give a pattern such as" in refused
        assert open_(folder / "sub" / "*.tar" if other == "x.tar" else folder / "sub" / "x.parquet").size == 4
    (folder / "torn.parquet").write_bytes(b"torn")
    (folder / "sub" / "x.parquet").unlink()
    assert "torn.parquet cannot be read (" in refusal(folder)


def test_what_a_link_or_a_folder_hides_is_named(tmp_path, monkeypatch):
    write_txt(tmp_path, GOOD, CAPTIONS)
    (tmp_path / "photos").symlink_to(tmp_path / "unplugged")
    assert "photos is a link to nothing; restore what it names or remove it" in refusal(tmp_path)
    assert open_(tmp_path, skip_bad=True).skipped == ["photos"]
    (tmp_path / "photos").unlink()
    (tmp_path / "tables" / "data").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    write_parquet(tmp_path / "kept", GOOD, CAPTIONS)
    write_parquet(tmp_path / "tables", GOOD, CAPTIONS)
    (tmp_path / "tables" / "data" / "more").symlink_to(tmp_path / "kept")
    pattern = f"{tmp_path}/tables/data/more/*.parquet"     # which datasets would leave out
    assert f"data/more/x.parquet is behind a link to a folder; give the folder it leads to, or a pattern such as '{pattern}'" in refusal(
        tmp_path / "tables")
    assert open_(pattern).size == 4
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def locked(path):                                      # permissions do not stop root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", locked)
    assert f"{tmp_path}/locked cannot be opened (Permission denied); allow it or move it away" in refusal(tmp_path)


def test_names_of_one_shard_make_its_samples(tmp_path):
    """Twice the same name, a link, a second archive behind the first, and of one stem the mask: each is named or has its rule."""
    pair = [("a.jpg", JPEG), ("a.txt", b"x")]
    assert "x.tar: a.jpg is there twice; keep one" in refusal(write_tar(tmp_path / "x.tar", [*pair, pair[0]]))
    one = write_tar(tmp_path / "x.tar", pair).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + write_tar(tmp_path / "y.tar", [("b.jpg", JPEG), ("b.txt", b"y")]).read_bytes())
    (tmp_path / "y.tar").unlink()
    assert "x.tar cannot be read to its end (a truncated header, or another archive behind the first)" in refusal(tmp_path)
    with tarfile.open(write_tar(tmp_path / "x.tar", pair), "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    assert "x.tar: b.jpg is a link; store the file itself" in refusal(tmp_path / "x.tar")
    black = encoded(Image.new("RGB", (8, 8)))
    dataset = open_(write_tar(tmp_path / "x.tar", [("a.mask.png", black), ("a.png", black), *pair, ("a.v2.png", black), ("a.v2.txt", b"y"),
                                                   ("a.notes.txt", b"z")]))
    assert [row.name for row in dataset.kept] == ["x.tar: a.jpg", "x.tar: a.v2.png"] and dataset.captions == ["", "x", "y"]


def test_a_column_of_images_is_chosen_only_where_there_is_one(tmp_path):
    path = tmp_path / "x.parquet"

    def write(**columns):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    assert refusal(write(url=["https://x"], caption=["x"])).endswith(
        f"--data {path}: no column of images; name one of url, caption with --image-column")
    two = write(jpg=[GOOD["a.png"]], small=[b"x"], caption=["x"])
    assert "several columns of bytes; name one of jpg, small with --image-column" in refusal(two)
    assert open_(two, image_column="jpg").size == 1
    assert "no column pixels; name one of jpg, small, caption with --image-column" in refusal(two, image_column="pixels")
    assert "row 1 or its caption cannot be read (an empty cell)" in refusal(write(jpg=[GOOD["a.png"], None], caption=["x", "y"]))


def test_coco_without_its_pictures_or_captions_is_named(tmp_path):
    write_coco(tmp_path, GOOD, CAPTIONS)
    assert "is COCO and has no columns; leave them out" in refusal(tmp_path, caption_column="caption")
    (tmp_path / "train2017" / "b.png").unlink()
    assert "train2017/b.png is named in its annotations but is not there; fetch it again" in refusal(tmp_path)
    assert open_(tmp_path, skip_bad=True).size == 3
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    assert open_(tmp_path).size == 1                       # the split that is there
    (tmp_path / "val2017").rename(tmp_path / "elsewhere too")
    assert "its annotations are COCO's, but train2017 or val2017 is not beside them; unpack the images there" in refusal(tmp_path)
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{torn")
    assert "annotations/captions_val2017.json is not a captions file of COCO (JSONDecodeError" in refusal(tmp_path)


# ---- bad data ----


# what is wrong with the second of three samples: (file name, content, caption, what the message says of it)
TROUBLES = {
    "truncated jpeg": ("b.jpg", JPEG[:len(JPEG) // 2], "x", "or its caption cannot be read (image file is truncated"),
    "truncated png": ("b.png", GOOD["b.png"][:300], "x", "or its caption cannot be read ("),
    "not an image": ("b.png", b"not an image", "x", "or its caption cannot be read (not an image to Pillow"),
    "nothing": ("b.png", b"", "x", "or its caption cannot be read ("),
    "empty caption": ("b.png", GOOD["b.png"], " ", "has no caption; "),
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("write", [write_txt, write_csv, write_tar_txt, write_parquet],
                         ids=["txt", "csv", "tar", "parquet"])
def test_a_bad_sample_is_named_at_opening_or_left_out(tmp_path, write, trouble):
    name, content, caption, message = TROUBLES[trouble]
    path = write(tmp_path, {"a.png": GOOD["a.png"], name: content, "c.png": GOOD["c.png"]}, ["one", caption, "three"])
    named = {write_tar_txt: f"shard.tar: {name}", write_parquet: "row 1"}.get(write, name)
    refused = refusal(path)
    assert f"--data {path}: {named} {message}" in refused and refused.endswith(", or leave it out with --skip-bad")
    dataset = open_(path, skip_bad=True)
    assert dataset.skipped == [named] and dataset.size == 2 and dataset.captions == ["", "one", "three"] and dataset.row_captions == [1, 2]
    (tmp_path / "good").mkdir()
    assert torch.equal(dataset.decode([0, 1], 8), open_(write_txt(tmp_path / "good", GOOD, CAPTIONS)).decode([0, 2], 8))


def test_folders_of_bad_things_are_refused_by_name(tmp_path):
    def make(name, files, captions=()):
        (tmp_path / name).mkdir()
        write_txt(tmp_path / name, files, [*captions, *[None] * len(files)])
        return tmp_path / name
    assert "no image in it (.avif, .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp); give" in refusal(make("empty", {}))
    assert "no image in it" in refusal(make("texts", {"a.txt": b"a"}))
    lonely = make("lonely", {"a.png": GOOD["a.png"]})
    assert "a.png has no caption; write one into a.txt or give --caption TEXT, or leave it out with --skip-bad" in refusal(lonely)
    assert f"--data {lonely}: nothing usable in it; --skip-bad left out all 1, the first because a.png has no caption" in refusal(
        lonely, skip_bad=True)
    stray = make("stray", {"a.png": GOOD["a.png"], "b.txt": b"y"}, ["x"])
    assert "b.txt is the caption of no image; add its image or move it away, or leave it out" in refusal(stray)
    assert open_(stray, skip_bad=True).skipped == ["b.txt"]
    (stray / "b.txt").rename(stray / ".hidden.txt")
    (stray / ".cache").mkdir()
    (stray / ".cache" / "c.png").write_bytes(b"")
    (stray / "a.txt").write_text("x", encoding="utf-8-sig")            # Windows' Notepad begins a file with a mark
    assert open_(stray).captions == ["", "x"]
    (stray / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert "a.png or its caption cannot be read ('utf-8'" in refusal(stray)
    assert "--image-column x: " in refusal(stray, image_column="x") and "has no columns; leave it out" in refusal(stray, image_column="x")
    assert "a.png has no caption; write one into a.json, long" in refusal(stray, caption_column="long")


def test_metadata_that_names_nothing_or_what_is_not_there_is_named(tmp_path):
    write_jsonl(tmp_path, {"a.png": GOOD["a.png"]}, ["x"])
    lines = (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").write_text(lines + '\n{"file_name": "gone.png", "text": "y"}\n{broken\n{"text": "z"}')
    assert "gone.png is named in metadata.jsonl but is not there; add it or remove its entry, or leave" in refusal(tmp_path)
    assert open_(tmp_path, skip_bad=True).skipped == ["gone.png", "metadata.jsonl entry 3", "metadata.jsonl entry 4"]
    (tmp_path / "metadata.jsonl").write_text(lines + '\n{"file_name": "' + 300 * "x" + '", "text": "y"}\n' + 10 ** 5 * "[")
    assert open_(tmp_path, skip_bad=True).skipped == [300 * "x", "metadata.jsonl entry 3"]
    (tmp_path / "metadata.CSV").write_text("file_name,text\na.png,one, two\n")
    assert "metadata.CSV cannot be read (entry 1 has more cells than the header" in refusal(tmp_path / "metadata.CSV")
    (tmp_path / "metadata.CSV").write_text("file_name,text\na.png,one\n")
    assert open_(tmp_path / "metadata.CSV").captions == ["", "one"]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff")
    assert "metadata.jsonl cannot be read" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    assert "no image in it" in refusal(tmp_path)


def test_a_torn_or_missing_shard_is_named_and_the_samples_before_the_tear_are_kept(tmp_path):
    path = write_tars(tmp_path, GOOD, CAPTIONS)
    whole = (tmp_path / "01.tar").read_bytes()
    second = whole.index(b"d.png")
    for cut in (second + 40, second + 700):                # in the header of d.png, in its pixels
        (tmp_path / "01.tar").write_bytes(whole[:cut])
        assert "01.tar cannot be read to its end (" in refusal(path), cut
        dataset = open_(path, skip_bad=True)
        assert dataset.row_captions[:2] == [1, 2] and dataset.skipped[0] == "01.tar", cut
    (tmp_path / "01.tar").write_bytes(b"")
    assert open_(path, skip_bad=True).size == 2
    (tmp_path / "01.tar").unlink()
    assert "01.tar cannot be read to its end ([Errno 2] No such file" in refusal(path)
    (tmp_path / "00.tar").write_bytes(b"garbage" * 1000)
    assert "nothing usable in it; --skip-bad left out all 2, the first because 00.tar cannot be read" in refusal(path, skip_bad=True)


def test_a_shard_s_sample_without_an_image_or_with_a_caption_that_is_not_text_is_named(tmp_path):
    odd = [("a.txt", b"no image"), ("b.jpg", JPEG), ("b.txt", b"\xff"), ("c.jpg", JPEG), ("c.json", b"{torn"), ("d.jpg", JPEG),
           ("d.txt", b"x")]
    shard = write_tar(tmp_path / "x.tar", odd)
    lost = "x.tar: a.txt has no image (.avif, .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp); add it or remove the caption, or leave it"
    assert "x.tar: b.jpg or its caption cannot be read ('utf-8'" in refusal(shard)
    assert lost in refusal(write_tar(tmp_path / "x.tar", [odd[0], *odd[-2:]]))
    assert "x.tar: b.jpg or its caption cannot be read ('utf-8'" in refusal(write_tar(tmp_path / "x.tar", odd[1:]))
    dataset = open_(write_tar(tmp_path / "x.tar", odd), skip_bad=True)
    assert dataset.skipped == ["x.tar: b.jpg", "x.tar: c.jpg", "x.tar: a.txt"] and dataset.captions == ["", "x"]


def test_a_table_s_cell_may_name_a_file_and_an_empty_one_is_named(tmp_path):
    write_txt(tmp_path, GOOD, [None] * 4)
    table([None, {"bytes": None, "path": str(tmp_path / "b.png")}, {"bytes": b"", "path": None}], "abc").to_parquet(tmp_path / "x.parquet")
    assert "row 0 or its caption cannot be read (an empty cell)" in refusal(tmp_path / "x.parquet")
    dataset = open_(tmp_path / "x.parquet", skip_bad=True)
    assert dataset.skipped == ["row 0", "row 2"] and dataset.captions == ["", "b"] and dataset.decode([0], 8).shape == (1, 3, 8, 8)


def test_a_torn_parquet_and_a_dataset_without_train_are_refused(tmp_path):
    import datasets
    path = write_parquet(tmp_path, GOOD, CAPTIONS)
    path.write_bytes(path.read_bytes()[:500])
    assert f"--data {path}: cannot be opened (" in refusal(path)
    datasets.DatasetDict(test=table(GOOD, CAPTIONS)).save_to_disk(tmp_path / "tests")
    assert "give a dataset with a train split" in refusal(tmp_path / "tests")
    datasets.DatasetDict(train=table(GOOD, CAPTIONS), test=table(GOOD, CAPTIONS)).save_to_disk(tmp_path / "both")
    assert open_(tmp_path / "both").size == 4


def test_shards_on_the_hub_are_asked_of_datasets_by_name_and_read_as_it_leaves_them(tmp_path, monkeypatch):
    """Up to the call that downloads; from there with what datasets' own reader makes of the same shards."""
    import datasets
    write_tars(tmp_path, GOOD, CAPTIONS)
    load, asked = datasets.load_dataset, []

    def downloaded(name, **options):
        asked.append((name, options))
        return load("webdataset", data_files=[str(tmp_path / "00.tar"), str(tmp_path / "01.tar")], **options)
    monkeypatch.setattr(datasets, "load_dataset", downloaded)
    dataset = open_("someone/photos.v2")
    assert asked == [("someone/photos.v2", {"split": "train"})]
    (tmp_path / "other").mkdir()
    expected = open_(write_txt(tmp_path / "other", GOOD, CAPTIONS))
    assert dataset.captions == expected.captions and torch.equal(dataset.decode(range(4), 16), expected.decode(range(4), 16))


def test_a_file_that_changes_after_the_check_is_named(tmp_path):
    dataset = open_(write_txt(tmp_path, GOOD, CAPTIONS))
    (tmp_path / "c.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="c.png has changed since it was checked"):
        dataset.decode([0, 1, 2], 8)


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by a name for every picture that is decoded."""
    seen, picture = [], captioned.Images._picture
    monkeypatch.setattr(captioned.Images, "_picture", lambda self, row: seen.append(row.name) or picture(self, row))
    return seen


@pytest.mark.parametrize("write", [write_txt, write_tar_txt, write_parquet], ids=["txt", "tar", "parquet"])
def test_a_checked_dataset_is_not_checked_again_until_it_changes(tmp_path, tmp_path_factory, decoded, write):
    files = {"a.png": GOOD["a.png"], "b.png": b"torn", "c.png": GOOD["c.png"]}
    checked, path = tmp_path_factory.mktemp("run") / "out" / "checked.json", write(tmp_path, files, CAPTIONS[:3])
    refusal(path, checked=checked)
    assert not checked.exists() and decoded                # only a check that came to its end is remembered
    first = open_(path, skip_bad=True, checked=checked)
    decoded.clear()
    again = open_(path, skip_bad=True, checked=checked)
    assert not decoded and again.skipped == first.skipped and len(first.skipped) == 1 and again.size == 2
    assert "or its caption cannot be read (not an image to Pillow" in refusal(path, checked=checked) and not decoded
    write(tmp_path, files | {"b.png": GOOD["b.png"]}, CAPTIONS[:3])
    assert open_(path, checked=checked).size == 3 and len(decoded) == 3
    decoded.clear()
    checked.write_text("torn")
    assert open_(path, checked=checked).size == 3 and len(decoded) == 3 and json.loads(checked.read_text())["bad"] == []


def test_what_is_remembered_of_a_dataset_changes_with_what_reads_it(tmp_path, decoded, monkeypatch):
    """Another Pillow may read more kinds of files: they are checked again. Other pixels of the same files: another key."""
    path, checked = write_txt(tmp_path, GOOD, CAPTIONS), tmp_path / ".checked.json"
    first = open_(path, checked=checked)
    assert len(decoded) == 4 and open_(path, checked=checked).key == first.key and len(decoded) == 4
    monkeypatch.setattr(PIL, "__version__", "99")
    assert open_(path, checked=checked).key == first.key and len(decoded) == 8
    monkeypatch.setattr(captioned, "DECODING", captioned.DECODING + 1)
    assert open_(path, checked=checked).key != first.key and len(decoded) == 8


def test_many_images_are_checked_to_the_last(tmp_path, monkeypatch, capsys):
    """More than one slice of the check: the bar shows, and a bad image in the second slice is found."""
    rows = [formats.Row(f"row {i}", (i,), "x") for i in range(1200)]
    good = encoded(Image.new("RGB", (1, 1)))
    read = {(i,): good for i in range(1200)} | {(1100,): b"torn"}
    dataset = captioned.Images("many", rows, read.get, 0, skip_bad=True)
    assert dataset.skipped == ["row 1100"] and dataset.size == 1199 and "checking images" in capsys.readouterr().err
    captioned.Images("few", rows[:3], read.get, 0)
    assert capsys.readouterr().err == ""


# ---- the store ----

SETTINGS = {"teacher": "x", "steps": (32, 16)}


@pytest.fixture
def solve():
    """Rows that say their number; solve.made lists the numbers of every call."""
    def solve(numbers):
        solve.made.append(list(numbers))
        number = torch.tensor(list(numbers))
        return {"z": number[:, None, None].expand(-1, 3, 2).float() + torch.arange(6).reshape(3, 2) / 10, "caption": number * 7}
    solve.made = []
    return solve


def check(rows, indices):
    found = rows[indices]
    numbers = torch.as_tensor(indices)
    assert torch.equal(found["caption"], numbers * 7)
    assert torch.equal(found["z"], numbers[:, None, None].float() + torch.arange(6).reshape(3, 2) / 10)


def test_rows_come_in_the_order_asked_from_files_left_on_disk(tmp_path, solve):
    rows = store.cached(tmp_path / "c", 10, SETTINGS, solve, shard=4)
    assert len(rows) == 10 and solve.made == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    check(rows, [9, 0, 4, 4, 3, 9])
    check(rows, torch.tensor([7, 1]))
    check(rows, list(range(10)))
    assert torch.equal(rows[range(10)]["caption"], torch.arange(10) * 7)
    for outside in (-1, 10):
        with pytest.raises(IndexError, match=f"row {outside} of 10"):
            rows[[0, outside]]
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "manifest.json"]
    assert json.loads((tmp_path / "c" / "manifest.json").read_text()) == {"teacher": "x", "steps": [32, 16]}


def test_the_bar_moves_with_every_batch_that_is_solved(tmp_path, solve, monkeypatch):
    moves, real = [], store.tqdm
    monkeypatch.setattr(store, "tqdm", type("Bar", (real,), {"update": lambda self, n=1: moves.append(n) or real.update(self, n)}))
    rows = store.cached(tmp_path, 21, SETTINGS, solve, shard=8, batch=3)
    assert [len(numbers) for numbers in solve.made] == moves == [3, 3, 2, 3, 3, 2, 3, 2]
    check(rows, list(range(21)))


def test_a_row_costs_its_own_bytes_not_the_shard_s(tmp_path, monkeypatch):
    """500 rows of 36 kB in shards of 128: 64 random ones allocate 2.4 MB, and no file is opened again."""
    rows = store.cached(tmp_path, 500, {}, lambda numbers: {"z": torch.zeros(len(numbers), 9, 8, 8, 16)}, shard=128)
    monkeypatch.setattr(store, "safe_open", None)
    wanted = torch.randint(500, (64,), generator=seeds.generator(0)).tolist()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert rows[wanted]["z"].shape == (64, 9, 8, 8, 16)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) <= 2 * 64 * 9 * 8 * 8 * 16 * 4


def test_a_larger_count_extends_and_a_smaller_one_makes_nothing(tmp_path, solve):
    store.cached(tmp_path, 10, SETTINGS, solve, shard=4)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    solve.made.clear()
    rows = store.cached(tmp_path, 17, SETTINGS, solve, shard=4)
    assert solve.made == [[8, 9, 10, 11], [12, 13, 14, 15], [16]]
    assert all((tmp_path / name).stat().st_mtime_ns == before[name] for name in ("00000.safetensors", "00001.safetensors"))
    check(rows, list(range(17))[::-1])
    solve.made.clear()
    rows = store.cached(tmp_path, 6, SETTINGS, solve, shard=4)
    assert not solve.made and len(rows) == 6 and torch.equal(rows[range(6)]["caption"], torch.arange(6) * 7)
    with pytest.raises(IndexError):
        rows[[6]]


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_a_damaged_shard_is_remade(tmp_path, solve, damage):
    store.cached(tmp_path, 10, SETTINGS, solve, shard=4)
    file = tmp_path / "00001.safetensors"
    content = {"truncated": file.read_bytes()[:-8], "empty": b"", "garbage": b"\xff" * 999, "missing": None}[damage]
    file.unlink()                                          # a new inode: the old one may be mapped
    if content is not None:
        file.write_bytes(content)
    solve.made.clear()
    check(store.cached(tmp_path, 10, SETTINGS, solve, shard=4), list(range(10)))
    assert solve.made == [[4, 5, 6, 7]]


def test_another_shard_size_does_not_mix_rows_up(tmp_path, solve):
    for shard in (4, 2, 4, 3):
        check(store.cached(tmp_path, 10, SETTINGS, solve, shard=shard), list(range(10)))


def test_a_kill_half_way_loses_one_shard_at_most(tmp_path, solve):
    def killed(numbers):
        if len(solve.made) == 2:
            raise KeyboardInterrupt
        return solve(numbers)
    with pytest.raises(KeyboardInterrupt):
        store.cached(tmp_path, 16, SETTINGS, killed, shard=4)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    stale = tmp_path / ".00002.safetensors.7-0123abcd.part"
    stale.write_bytes(b"half")                                          # as if it had been killed while writing,
    os.utime(stale, (0, 0))                                             # long ago
    assert sorted(before) == ["00000.safetensors", "00001.safetensors"]
    solve.made.clear()
    check(store.cached(tmp_path, 16, SETTINGS, solve, shard=4), list(range(16)))
    assert solve.made == [[8, 9, 10, 11], [12, 13, 14, 15]] and not list(tmp_path.glob("*.part"))
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())


def test_two_ranks_make_every_shard_once(tmp_path, solve):
    """Rank 1 runs inside rank 0's first barrier up to its own last one, as the second process would."""
    made = []

    def rank_1():
        class Reached(Exception):
            pass
        waits = iter([None, Reached])

        def barrier():
            if next(waits):
                raise Reached
        with pytest.raises(Reached):
            store.cached(tmp_path, 18, SETTINGS, solve, 4, 1, 2, barrier)
        made.append([numbers[0] for numbers in solve.made])
        solve.made.clear()
    steps = iter([rank_1, lambda: None])
    rows = store.cached(tmp_path, 18, SETTINGS, solve, 4, 0, 2, lambda: next(steps)())
    assert made == [[4, 12]] and [numbers[0] for numbers in solve.made] == [0, 8, 16]
    check(rows, list(range(18)))


def test_other_settings_are_refused_with_their_difference(tmp_path, solve):
    store.cached(tmp_path, 2, SETTINGS, solve)
    store.cached(tmp_path, 2, {"steps": [32, 16], "teacher": "x"}, solve)
    for settings, difference in (({**SETTINGS, "teacher": "y"}, "'teacher': ('x', 'y')"),
                                 ({"teacher": "x"}, "'steps': ([32, 16], 'absent')"),
                                 ({**SETTINGS, "new": None}, "'new': ('absent', None)")):
        with pytest.raises(UserError) as error:
            store.cached(tmp_path, 2, settings, solve)
        assert f"--cache {tmp_path}: made with other settings (there, here): {{{difference}}}; choose another" in str(error.value)
    assert len(solve.made) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        store.cached(tmp_path / "file" / "c", 2, SETTINGS, solve)


def test_what_is_written_is_the_users_to_share_and_replaces_no_folder(tmp_path, monkeypatch):
    store.write_atomically(tmp_path / "a.safetensors", lambda part: save_file({"z": torch.zeros(1)}, part))

    def folder(part):
        part.mkdir()
        save_file({"z": torch.zeros(1)}, part / "b.safetensors")
    store.write_atomically(tmp_path / "b", folder)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "a.safetensors", tmp_path / "b" / "b.safetensors")} == {0o666 & ~store.UMASK}
    with pytest.raises(UserError, match="b: is a folder; name a file"):
        store.write_atomically(tmp_path / "b", lambda part: part.write_text("x"))
    assert (tmp_path / "b" / "b.safetensors").is_file() and not list(tmp_path.glob(".*.part"))


def test_a_shard_that_may_not_be_read_is_not_made_again(tmp_path, solve, monkeypatch):
    store.cached(tmp_path, 3, SETTINGS, solve, shard=4)

    def refused(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(store, "safe_open", refused)
    with pytest.raises(UserError, match="00000.safetensors: cannot be read .Permission denied"):
        store.cached(tmp_path, 3, SETTINGS, solve, shard=4)
    assert len(solve.made) == 1


def test_on_windows_folders_are_not_synced_and_files_are_opened_for_writing(tmp_path, monkeypatch):
    real_open, real_sync = os.open, os.fsync

    def opened(path, flags):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags)

    def synced(descriptor):
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(9, "Bad file descriptor")
        real_sync(descriptor)
    for name, value in (("WINDOWS", True), ("os.open", opened), ("os.fsync", synced)):
        monkeypatch.setattr(f"runtime.store.{name}", value)
    store.write_atomically(tmp_path / "a.txt", lambda part: part.write_text("x"))
    assert (tmp_path / "a.txt").read_text() == "x"


def test_half_a_character_is_no_caption_and_no_prompt(tmp_path):
    write_jsonl(tmp_path, GOOD, ["a dog \ud83d", *CAPTIONS[1:]])
    assert NAMES[0] in refusal(tmp_path) and len(open_(tmp_path, skip_bad=True).skipped) == 1
    for name in (b"kohya/1_caf\xe9", b"coco/annotations", b"coco/val2017"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), name))
        if b"annotations" not in name:
            with open(os.path.join(os.fsencode(tmp_path), name, b"a.png"), "wb") as file:
                file.write(GOOD["a.png"])
    assert "a.png has no caption" in refusal(tmp_path / "kohya")
    coco = dict(images=[dict(id=1, file_name="a.png")], annotations=[dict(id=1, image_id=1, caption="a dog \ud83d")])
    annotations = tmp_path / "coco" / "annotations" / "captions_val2017.json"
    annotations.write_text(json.dumps(coco))
    assert "val2017/a.png has no caption" in refusal(tmp_path / "coco")
    annotations.write_text(json.dumps(coco | dict(images=[dict(id=1, file_name=5)])))
    assert "is not a captions file of COCO (TypeError" in refusal(tmp_path / "coco")
    (tmp_path / "p.jsonl").write_text('{"text": "a dog \\ud83d"}\n')
    with pytest.raises(UserError, match="entry 1 has no text"):
        captioned.Prompts(tmp_path / "p.jsonl", 0)


def test_a_cache_that_cannot_be_there_is_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    write_txt(tmp_path / "data", GOOD, CAPTIONS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache .*file: cannot be written"):
        open_(tmp_path / "data", checked=tmp_path / "file" / "data.json")


def test_a_full_disk_is_one_line_and_the_old_shard_stays(tmp_path, solve, monkeypatch):
    store.cached(tmp_path, 3, SETTINGS, solve, shard=4)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(store, "save_file", full)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="nothing may be written there; permit it, or choose another"):
        patch.setattr(store.os, "access", lambda folder, mode: False)
        store.cached(tmp_path, 8, SETTINGS, solve, shard=4)
    with pytest.raises(UserError, match="00000.safetensors: no space left on the device"):
        store.cached(tmp_path, 4, SETTINGS, solve, shard=4)
    assert len(load_file(tmp_path / "00000.safetensors")["z"]) == 3 and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(store, "save_file", save_file)
    check(store.cached(tmp_path, 4, SETTINGS, solve, shard=4), [3, 0])


# ---- several processes, and power cuts ----


def share_a_cache(folder, count, barrier):
    """One of two processes. Each shard is half written by both at once before either goes on."""
    save = store.save_file

    def save_slowly(tensors, part, metadata):
        save(tensors, part, metadata)
        content = part.read_bytes()
        part.write_bytes(content[:len(content) // 2])
        barrier.wait(300)
        part.write_bytes(content)
        barrier.wait(300)
    store.save_file = save_slowly
    rows = store.cached(folder, count, SETTINGS, lambda numbers: {"caption": torch.tensor(list(numbers)) * 7}, shard=4)
    assert torch.equal(rows[range(count)]["caption"], torch.arange(count) * 7)


def test_two_processes_that_share_a_cache_both_end_with_whole_parts(tmp_path):
    barrier = FORKS.Barrier(2)
    processes = [FORKS.Process(target=share_a_cache, args=(tmp_path, 10, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "manifest.json"]
    assert len(load_file(tmp_path / "00002.safetensors")["caption"]) == 2


def claim_a_cache(folder, settings, saw_nothing, others_turn, result):
    """One of two processes that both find no manifest: it writes its own only after others_turn."""
    write = store.write_atomically

    def write_late(target, *args, **options):
        if target.name == "manifest.json":
            saw_nothing.set()
            others_turn.wait(300)
        write(target, *args, **options)
    store.write_atomically = write_late
    try:
        store.cached(folder, 4, settings, lambda numbers: {"caption": torch.full((len(numbers),), settings["value"])})
        result.put(settings["value"])
    except UserError as error:
        result.put(str(error))


def test_of_two_processes_with_other_settings_only_the_first_gets_the_cache(tmp_path):
    first_saw, second_saw, first_done, result = FORKS.Event(), FORKS.Event(), FORKS.Event(), FORKS.Queue()
    second = FORKS.Process(target=claim_a_cache, args=(tmp_path, {"value": 2}, second_saw, first_done, result))
    second.start()
    assert second_saw.wait(300)
    first = FORKS.Process(target=claim_a_cache, args=(tmp_path, {"value": 1}, first_saw, second_saw, result))
    first.start()
    assert result.get(timeout=300) == 1
    first_done.set()
    assert "made with other settings (there, here): {'value': (1, 2)}; choose another folder" in str(result.get(timeout=300))
    for process in (first, second):
        process.join(300)
    assert load_file(tmp_path / "00000.safetensors")["caption"].tolist() == [1] * 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.safetensors", "manifest.json"]


def test_a_cache_on_a_disk_without_hard_links_and_a_truncated_manifest(tmp_path, solve, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    check(store.cached(tmp_path / "c", 3, SETTINGS, solve), [2, 0])
    (tmp_path / "c" / "manifest.json").write_text('{"teacher')
    with pytest.raises(UserError, match="manifest.json is truncated; delete the folder"):
        store.cached(tmp_path / "c", 3, SETTINGS, solve)


def test_a_longer_shard_that_another_process_made_meanwhile_stays(tmp_path, solve):
    def late(numbers):
        store.cached(tmp_path, 4, SETTINGS, solve, shard=4)
        return solve(numbers)
    rows = store.cached(tmp_path, 2, SETTINGS, late, shard=4)
    assert len(rows) == 2 and len(load_file(tmp_path / "00000.safetensors")["z"]) == 4


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_renamed_is_on_the_disk_first_and_the_name_after(tmp_path, monkeypatch, kind):
    """After a power cut a name never stands for content that was not written: everything is synchronized before the rename, the
    folder that holds the name after it. An old target is whole until then."""
    events, sync, replace, target = [], os.fsync, os.replace, tmp_path / "target"

    def write(part):
        if kind == "folder":
            (part / "sub").mkdir(parents=True)
            (part / "sub" / "a").write_text("new")
        else:
            part.write_text("new")
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    for _ in range(2):                                     # the second time over an old one
        events.clear()
        store.write_atomically(target, write)
        at = events.index("rename")
        before = [os.path.basename(event) for event in events[:at]]
        assert len(before) == (3 if kind == "folder" else 1) and before[-1].endswith(".part") and events[at + 1:] == [str(tmp_path)]
        assert kind == "file" or set(before[:2]) == {"sub", "a"}
        assert (target / "sub" / "a" if kind == "folder" else target).read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error"), RuntimeError("x")], ids=lambda error: type(error).__name__)
def test_an_error_while_writing_leaves_the_old_target_and_nothing_else(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error
    target = tmp_path / "target"
    store.write_atomically(target, lambda part: (part.mkdir(), (part / "a").write_text("old")))
    for where in ("fsync", "replace", None):
        with monkeypatch.context() as patched, pytest.raises(type(error)):
            if where:
                patched.setattr(os, where, fail)
            store.write_atomically(target, lambda part: (part.mkdir(), where or fail()))
        assert (target / "a").read_text() == "old" and list(tmp_path.iterdir()) == [target], where


def test_only_what_no_process_can_be_writing_any_more_is_cleaned_away(tmp_path):
    kept, gone = [".x.safetensors.1-00000000.part", "photo.jpg.part", ".x.part", ".y.1-0000000g.part"], [
        ".x.safetensors.99-89abcdef.part", ".folder.3-12345678.part"]
    for name in (*kept, *gone):
        (tmp_path / name).mkdir() if "folder" in name else (tmp_path / name).write_text("")
    (tmp_path / gone[1] / "a").write_text("")
    old = os.stat(tmp_path).st_mtime - 2 * store.STALE
    for path in (*map(tmp_path.joinpath, [*kept[1:], *gone]), tmp_path / gone[1] / "a"):
        os.utime(path, (old, old))
    os.utime(tmp_path / gone[1], (old, old))
    store.write_atomically(tmp_path / "x", lambda part: part.write_text(""))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "x"])
