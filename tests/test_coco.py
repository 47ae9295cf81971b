"""COCO's layout: which images, which captions, at which size; and what is wrong with a folder, in one line."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data import coco, imaging
from runtime.cli import UserError

SPLITS = ("val2014", "val2017")


def make_coco(folder, count=20):
    """A folder laid out as COCO: count small JPEGs of several shapes, the last one gray, with two to four captions each, for both splits.
    Annotations go round the images, as COCO's do: an image's captions do not stand together."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in reversed(range(count)):
            name, generator = f"{100 + i:012d}.jpg", np.random.default_rng(i)
            coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize([(48, 36), (36, 60), (40, 40), (64, 33)][i % 4], Image.Resampling.BICUBIC)
            picture.convert("L" if i == count - 1 else "RGB").save(folder / split / name, quality=95)
            images.append(dict(id=100 + i, file_name=name, height=picture.height, width=picture.width))
        for turn in range(4):
            annotations += [dict(id=1000 * turn + i, image_id=100 + i, caption=f" picture {i}, told the {turn}. time.\n")
                            for i in range(count) if turn < 2 + i % 3]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(dict(images=images, annotations=annotations)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data") / "coco")


# ---- which images and captions -------------------------------------------------------------------------------------


def test_first_is_the_first_caption_of_each_image_in_the_order_of_the_annotations(folder):
    found = coco.Coco(folder, "val2017", "first", 20)
    assert found.captions == [f"picture {i}, told the 0. time." for i in range(20)]
    assert found.files == [f"{100 + i:012d}.jpg" for i in range(20)] and found.ids == [(100 + i, i) for i in range(20)]


def test_seeded_is_one_caption_of_each_of_other_images_and_always_the_same(folder):
    found, again = (coco.Coco(folder, "val2014", "seeded", 20) for _ in range(2))
    assert found.captions == again.captions and found.ids == again.ids and found.key == again.key
    assert sorted(found.files) == [f"{100 + i:012d}.jpg" for i in range(20)] != found.files
    for file, (image, annotation), caption in zip(found.files, found.ids, found.captions):
        turn, i = divmod(annotation, 1000)
        assert image == 100 + i and file == f"{image:012d}.jpg" and caption == f"picture {i}, told the {turn}. time."
    assert {annotation // 1000 for _, annotation in found.ids} >= {0, 1}           # not always the first


@pytest.mark.parametrize("rule", coco.RULES)
def test_fewer_images_are_the_first_of_more(folder, rule):
    few, all_ = coco.Coco(folder, "val2014", rule, 7), coco.Coco(folder, "val2014", rule, 20)
    assert few.captions == all_.captions[:7] and few.files == all_.files[:7] and few.ids == all_.ids[:7] and few.key != all_.key


def test_the_key_changes_with_a_caption_and_with_a_file(folder, tmp_path):
    key = coco.Coco(folder, "val2017", "first", 5).key
    other = shutil.copytree(folder, tmp_path / "coco")
    assert coco.Coco(other, "val2017", "first", 5).key == key
    annotations = other / "annotations" / "captions_val2017.json"
    annotations.write_text(annotations.read_text().replace("picture 3,", "photo 3,"))
    changed = coco.Coco(other, "val2017", "first", 5).key
    Image.new("RGB", (99, 88)).save(other / "val2017" / f"{103:012d}.jpg")
    assert len({key, changed, coco.Coco(other, "val2017", "first", 5).key}) == 3


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height, scaled, box", [
    (640, 480, (341, 256), (42, 0, 298, 256)),             # 341.33 is cut to 341; (341 - 256) / 2 = 42.5 goes to the even 42
    (480, 640, (256, 341), (0, 42, 256, 298)), (300, 300, (256, 256), (0, 0, 256, 256)), (120, 90, (341, 256), (42, 0, 298, 256)),
    (500, 333, (384, 256), (64, 0, 320, 256)), (257, 256, (257, 256), (0, 0, 256, 256))])
def test_square_is_lanczos_on_the_shorter_side_then_the_centre(width, height, scaled, box):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = image.resize(scaled, Image.Resampling.LANCZOS).crop(box)
    assert np.array_equal(np.array(coco.square(image, 256)), np.array(expected))


def test_square_leaves_a_square_of_that_size_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert np.array_equal(np.array(coco.square(image, 32)), np.array(image))


def test_pixels_to_tensor_and_back_is_the_identity():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    tensor = coco.tensor([levels, levels])
    assert tensor.shape == (2, 3, 16, 16) and tensor.dtype == torch.float32 and tensor.min() == -1 and tensor.max() == 1
    assert all(np.array_equal(np.array(picture), np.array(levels)) for picture in imaging.to_pil(tensor))


def test_images_are_those_of_the_numbers_in_their_order_and_gray_ones_have_three_channels(folder):
    found = coco.Coco(folder, "val2017", "first", 20)
    images = found.images(range(15, 20), 32)
    assert images.shape == (5, 3, 32, 32) and images.abs().max() <= 1
    for i, image in zip(range(15, 20), images):
        with Image.open(folder / "val2017" / f"{100 + i:012d}.jpg") as picture:
            assert torch.equal(image[None], coco.tensor([coco.square(picture.convert("RGB"), 32)]))
    assert torch.equal(images[-1, 0], images[-1, 1]) and not torch.equal(images[0, 0], images[0, 1])


# ---- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, message", [
    (None, "annotations/captions_val2017.json cannot be read (No such file or directory); give the folder that holds"),
    ("{", "annotations/captions_val2017.json is not a captions file of COCO (JSONDecodeError"),
    ('{"images": []}', "is not a captions file of COCO (KeyError: 'annotations')"),
    ('{"images": [{"id": 1}], "annotations": []}', "is not a captions file of COCO (KeyError: 'file_name')"),
    ('[1]', "is not a captions file of COCO (TypeError"),
    ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "caption": null}]}', "(AttributeError"),
    (b"\xff", "is not a captions file of COCO (UnicodeDecodeError")])
def test_annotations_that_are_not_cocos_are_named(tmp_path, content, message):
    (tmp_path / "annotations").mkdir()
    if content is not None:
        (tmp_path / "annotations" / "captions_val2017.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        coco.Coco(tmp_path, "val2017", "first", 1)
    assert str(error.value).startswith(f"--data {tmp_path}: ") and message in str(error.value)


def test_too_few_images_say_how_many_there_are(folder):
    with pytest.raises(UserError, match=r"20 captioned images in val2014, and 21 are asked for; .* --n and --real of at most 20"):
        coco.Coco(folder, "val2014", "seeded", 21)


def test_an_image_that_is_not_there_is_named_if_it_is_asked_for(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "coco")
    (other / "val2017" / f"{107:012d}.jpg").unlink()
    assert len(coco.Coco(other, "val2017", "first", 7).files) == 7
    with pytest.raises(UserError, match=r"val2017/000000000107.jpg is named in captions_val2017.json but is not there; fetch it again"):
        coco.Coco(other, "val2017", "first", 8)
    shutil.rmtree(other / "val2014")
    with pytest.raises(UserError, match=r"val2014/\d+.jpg is named in captions_val2014.json but is not there"):
        coco.Coco(other, "val2014", "first", 1)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_image_that_does_not_decode_is_named(folder, tmp_path, content):
    other = shutil.copytree(folder, tmp_path / "coco")
    file = other / "val2017" / f"{102:012d}.jpg"
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(UserError, match=r"val2017/000000000102.jpg cannot be decoded \(.*\); fetch it again"):
        coco.Coco(other, "val2017", "first", 5).images(range(5), 32)
