"""Every format gives the same samples; what cannot be used is refused by name before training; the store survives anything."""
import csv
import io
import itertools
import json
import tarfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
from config import UserError

CAPTIONS = ["a red fox", "two cats, one asleep", "a red fox", "ein Vogel über dem Meer"]      # one twice, a comma, not ASCII
NAMES = ["a", "b", "c", "d"]


def picture(i, mode="RGB", size=(24, 17)):
    """A noisy PIL image; another one for every i."""
    pixels = torch.randint(256, (size[1], size[0], 3), generator=data.generator(0, i), dtype=torch.uint8).numpy()
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


FORMATS = [write_txt, write_jsonl, write_csv, write_tar_txt, write_tar_json, write_tars, write_glob, write_parquet, write_parquet_folder,
           write_disk]
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
    return data.open_dataset(str(path), "", seed=0, **options)


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
    assert data.open_dataset(str(tmp_path), "", seed=1).rows(range(48)) != one.rows(range(48))


def test_images_of_any_shape_and_mode_become_squares_in_minus_one_to_one(tmp_path):
    images = {"wide.png": picture(0, size=(90, 20)), "tall.png": picture(1, size=(20, 91)), "small.png": picture(2, size=(3, 5)),
              "palette.png": picture(3, "P"), "alpha.png": picture(4, "RGBA"), "grey.png": picture(5, "L"), "bits.png": picture(6, "1")}
    dataset = open_(write_txt(tmp_path, {name: encoded(image) for name, image in images.items()}, ["x"] * 7))
    batch = dataset.decode(range(7), 16)
    assert batch.shape == (7, 3, 16, 16) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1 and batch.std() > 0.1
    grey = batch[sorted(images).index("grey.png")]
    assert torch.equal(grey[0], grey[1])


def test_the_crop_is_central_and_extremes_reach_one(tmp_path):
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 255), (10, 0, 20, 10))
    square = open_(write_txt(tmp_path, {"a.png": encoded(image)}, ["x"])).decode([0], 10)[0]
    assert square[0, :, 1:-1].eq(-1).all() and square[1:, :, 1:-1].eq(1).all()


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
    for slip in ("nowhere", "photos/mine", "a/b/c", "nowhere/*.tar", "{0..2}.tar", "x.parquet", "/no/where"):
        assert f"--data {slip}: no such folder" in refusal(slip)
    assert len(asked) == 1

    def unknown(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
    monkeypatch.setattr(datasets, "load_dataset", unknown)
    assert "--data no/one: cannot be opened (DatasetNotFoundError: Dataset 'no/one' doesn't exist" in refusal("no/one")


def test_sprites_are_endless_and_prompts_have_no_images(tmp_path):
    endless = open_("sprites")
    assert endless.size is None and endless.rows([5, 3]) == [5, 3] and endless.skipped == []
    assert torch.equal(endless.images([5, 3], 32), endless.decode(endless.rows([5, 3]), 32))
    (tmp_path / "p.txt").write_text("fox\n\ncat \nfox\n")
    prompts = data.open_dataset("", str(tmp_path / "p.txt"), seed=0)
    drawn = [prompts.captions[i] for i in prompts.caption_indices(range(300))]
    assert prompts.images is None and prompts.captions == ["", "fox", "cat"] and 150 < drawn.count("fox") < 250 and "" not in drawn
    with pytest.raises(UserError, match="give either --data"):
        data.open_dataset("sprites", "p.txt", seed=0)


# ---- bad data ----


# what is wrong with the second of three samples: (file name, content, caption, what the message says of it)
TROUBLES = {
    "truncated jpeg": ("b.jpg", JPEG[:len(JPEG) // 2], "x", "or its caption cannot be read (image file is truncated"),
    "truncated png": ("b.png", GOOD["b.png"][:300], "x", "or its caption cannot be read ("),
    "not an image": ("b.png", b"not an image", "x", "or its caption cannot be read (not an image); replace or remove it"),
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
    assert "no image in it (.bmp, .jpeg, .jpg, .png, .webp)" in refusal(make("empty", {}))
    assert "no image in it" in refusal(make("texts", {"a.txt": b"a"}))
    lonely = make("lonely", {"a.png": GOOD["a.png"]})
    assert "a.png has no caption; write one into a.txt, or leave it out with --skip-bad" in refusal(lonely)
    assert f"--data {lonely}: nothing usable in it; --skip-bad left out all 1, the first because a.png has no caption" in refusal(
        lonely, skip_bad=True)
    stray = make("stray", {"a.png": GOOD["a.png"], "b.pdf": b""}, ["x"])
    assert "b.pdf is neither an image nor the caption of one; move it away, or leave it out" in refusal(stray)
    assert open_(stray, skip_bad=True).skipped == ["b.pdf"]
    (stray / "b.pdf").rename(stray / ".hidden")
    (stray / ".cache").mkdir()
    (stray / ".cache" / "c.png").write_bytes(b"")
    (stray / "a.txt").write_text("x", encoding="utf-8-sig")            # Windows' Notepad begins a file with a mark
    assert open_(stray).captions == ["", "x"]
    (stray / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert "a.png or its caption cannot be read ('utf-8'" in refusal(stray)
    assert "has .txt captions and no columns" in refusal(stray, caption_column="text")


def test_metadata_that_names_nothing_or_what_is_not_there_is_named(tmp_path):
    write_jsonl(tmp_path, {"a.png": GOOD["a.png"]}, ["x"])
    lines = (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").write_text(lines + '\n{"file_name": "gone.png", "text": "y"}\n{broken\n{"text": "z"}')
    assert "gone.png is named in metadata.jsonl but is not there; add it or remove its entry, or leave" in refusal(tmp_path)
    assert open_(tmp_path, skip_bad=True).skipped == ["gone.png", "metadata.jsonl entry 3", "metadata.jsonl entry 4"]
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
        assert dataset.row_captions[:2] == [1, 2] and dataset.skipped[-1] == "01.tar", cut
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
    assert "x.tar: a has no image (bmp, jpeg, jpg, png, webp); add one, or leave it out with --skip-bad" in refusal(shard)
    assert "x.tar: b.jpg or its caption cannot be read ('utf-8'" in refusal(write_tar(tmp_path / "x.tar", odd[1:]))
    dataset = open_(write_tar(tmp_path / "x.tar", odd), skip_bad=True)
    assert dataset.skipped == ["x.tar: a", "x.tar: b.jpg", "x.tar: c.jpg"] and dataset.captions == ["", "x"]


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


def test_a_file_that_changes_after_the_check_is_named(tmp_path):
    dataset = open_(write_txt(tmp_path, GOOD, CAPTIONS))
    (tmp_path / "c.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="c.png has changed since it was checked"):
        dataset.decode([0, 1, 2], 8)


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by a name for every picture that is decoded."""
    seen, picture = [], data.Images._picture
    monkeypatch.setattr(data.Images, "_picture", lambda self, row: seen.append(row.name) or picture(self, row))
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
    assert "or its caption cannot be read (not an image)" in refusal(path, checked=checked) and not decoded
    write(tmp_path, files | {"b.png": GOOD["b.png"]}, CAPTIONS[:3])
    assert open_(path, checked=checked).size == 3 and len(decoded) == 3
    decoded.clear()
    checked.write_text("torn")
    assert open_(path, checked=checked).size == 3 and len(decoded) == 3 and json.loads(checked.read_text())["bad"] == []


def test_many_images_are_checked_to_the_last(tmp_path, monkeypatch, capsys):
    """More than one slice of the check: the bar shows, and a bad image in the second slice is found."""
    rows = [data.Row(f"row {i}", (i,), "x") for i in range(1200)]
    good = encoded(Image.new("RGB", (1, 1)))
    read = {(i,): good for i in range(1200)} | {(1100,): b"torn"}
    dataset = data.Images("many", rows, read.get, 0, skip_bad=True)
    assert dataset.skipped == ["row 1100"] and dataset.size == 1199 and "checking images" in capsys.readouterr().err
    data.Images("few", rows[:3], read.get, 0)
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
    rows = data.cached(tmp_path / "c", 10, SETTINGS, solve, shard=4)
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
    moves, real = [], data.tqdm
    monkeypatch.setattr(data, "tqdm", type("Bar", (real,), {"update": lambda self, n=1: moves.append(n) or real.update(self, n)}))
    rows = data.cached(tmp_path, 21, SETTINGS, solve, shard=8, batch=3)
    assert [len(numbers) for numbers in solve.made] == moves == [3, 3, 2, 3, 3, 2, 3, 2]
    check(rows, list(range(21)))


def test_a_row_costs_its_own_bytes_not_the_shard_s(tmp_path, monkeypatch):
    """500 rows of 36 kB in shards of 128: 64 random ones allocate 2.4 MB, and no file is opened again."""
    rows = data.cached(tmp_path, 500, {}, lambda numbers: {"z": torch.zeros(len(numbers), 9, 8, 8, 16)}, shard=128)
    monkeypatch.setattr(data, "safe_open", None)
    wanted = torch.randint(500, (64,), generator=data.generator(0)).tolist()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert rows[wanted]["z"].shape == (64, 9, 8, 8, 16)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) <= 2 * 64 * 9 * 8 * 8 * 16 * 4


def test_a_larger_count_extends_and_a_smaller_one_makes_nothing(tmp_path, solve):
    data.cached(tmp_path, 10, SETTINGS, solve, shard=4)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    solve.made.clear()
    rows = data.cached(tmp_path, 17, SETTINGS, solve, shard=4)
    assert solve.made == [[8, 9, 10, 11], [12, 13, 14, 15], [16]]
    assert all((tmp_path / name).stat().st_mtime_ns == before[name] for name in ("00000.safetensors", "00001.safetensors"))
    check(rows, list(range(17))[::-1])
    solve.made.clear()
    rows = data.cached(tmp_path, 6, SETTINGS, solve, shard=4)
    assert not solve.made and len(rows) == 6 and torch.equal(rows[range(6)]["caption"], torch.arange(6) * 7)
    with pytest.raises(IndexError):
        rows[[6]]


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_a_damaged_shard_is_remade(tmp_path, solve, damage):
    data.cached(tmp_path, 10, SETTINGS, solve, shard=4)
    file = tmp_path / "00001.safetensors"
    content = {"truncated": file.read_bytes()[:-8], "empty": b"", "garbage": b"\xff" * 999, "missing": None}[damage]
    file.unlink()                                          # a new inode: the old one may be mapped
    if content is not None:
        file.write_bytes(content)
    solve.made.clear()
    check(data.cached(tmp_path, 10, SETTINGS, solve, shard=4), list(range(10)))
    assert solve.made == [[4, 5, 6, 7]]


def test_another_shard_size_does_not_mix_rows_up(tmp_path, solve):
    for shard in (4, 2, 4, 3):
        check(data.cached(tmp_path, 10, SETTINGS, solve, shard=shard), list(range(10)))


def test_a_kill_half_way_loses_one_shard_at_most(tmp_path, solve):
    def killed(numbers):
        if len(solve.made) == 2:
            raise KeyboardInterrupt
        return solve(numbers)
    with pytest.raises(KeyboardInterrupt):
        data.cached(tmp_path, 16, SETTINGS, killed, shard=4)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    (tmp_path / "00002.safetensors.part").write_bytes(b"half")          # as if it had been killed while writing
    assert sorted(before) == ["00000.safetensors", "00001.safetensors"]
    solve.made.clear()
    check(data.cached(tmp_path, 16, SETTINGS, solve, shard=4), list(range(16)))
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
            data.cached(tmp_path, 18, SETTINGS, solve, 4, 1, 2, barrier)
        made.append([numbers[0] for numbers in solve.made])
        solve.made.clear()
    steps = iter([rank_1, lambda: None])
    rows = data.cached(tmp_path, 18, SETTINGS, solve, 4, 0, 2, lambda: next(steps)())
    assert made == [[4, 12]] and [numbers[0] for numbers in solve.made] == [0, 8, 16]
    check(rows, list(range(18)))


def test_other_settings_are_refused_with_their_difference(tmp_path, solve):
    data.cached(tmp_path, 2, SETTINGS, solve)
    data.cached(tmp_path, 2, {"steps": [32, 16], "teacher": "x"}, solve)
    for settings, difference in (({**SETTINGS, "teacher": "y"}, "'teacher': ('x', 'y')"),
                                 ({"teacher": "x"}, "'steps': ([32, 16], 'absent')"),
                                 ({**SETTINGS, "new": None}, "'new': ('absent', None)")):
        with pytest.raises(UserError) as error:
            data.cached(tmp_path, 2, settings, solve)
        assert f"--cache {tmp_path}: made with other settings (there, here): {{{difference}}}; choose another" in str(error.value)
    assert len(solve.made) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        data.cached(tmp_path / "file" / "c", 2, SETTINGS, solve)


def test_a_full_disk_is_one_line_and_the_old_shard_stays(tmp_path, solve, monkeypatch):
    data.cached(tmp_path, 3, SETTINGS, solve, shard=4)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "save_file", full)
    with pytest.raises(UserError, match="00000.safetensors: no space left on the device"):
        data.cached(tmp_path, 4, SETTINGS, solve, shard=4)
    assert len(load_file(tmp_path / "00000.safetensors")["z"]) == 3 and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(data, "save_file", save_file)
    check(data.cached(tmp_path, 4, SETTINGS, solve, shard=4), [3, 0])
