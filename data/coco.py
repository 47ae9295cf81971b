"""COCO as it is distributed, FOLDER/annotations/captions_val2017.json beside FOLDER/val2017/*.jpg
(or val2014), one caption per image."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from data import formats
from data.imaging import square, tensor
from runtime import seeds, store
from runtime.cli import UserError

# which caption of an image is its prompt, and which images come first
RULES = {"first": "the first caption of each image, in the order of the annotations",
         "seeded": "one caption of each image drawn at random, images in random order (generator of our own, "
                   "seed 0)"}


class Coco:
    """The first `count` images of a split, each with one caption by a rule of RULES.
    split: "val2014" or "val2017".
    files, captions: lists of count strings; ids: of pairs (image, caption), COCO's own;
    key: changes with any of them.
    Raises UserError: a file is missing or is not COCO's, there are fewer images than count, or one
    of them is not there."""

    def __init__(self, folder, split, rule, count):
        self.folder, (names, found) = Path(folder) / split, formats.coco_captions(folder, split)
        if len(found) < count:
            raise UserError(f"--data {folder}: {len(found)} captioned images in {split}, and {count} are "
                            f"asked for; give the whole of COCO, or --n and --real of at most {len(found)}")
        images, generator = list(found), seeds.generator(0, "coco", split)
        if rule == "seeded":
            images = [images[i] for i in torch.randperm(len(images), generator=generator).tolist()]
            found = {image: [found[image][torch.randint(len(found[image]), (1,), generator=generator).item()]]
                     for image in images}
        self.files = [names[image] for image in images[:count]]
        self.ids = [(image, found[image][0][0]) for image in images[:count]]
        self.captions = [found[image][0][1] for image in images[:count]]
        there = {file.name: file.stat().st_size
                 for file in self.folder.iterdir()} if self.folder.is_dir() else {}
        missing = next((name for name in self.files if name not in there), None)
        if missing:
            raise UserError(f"--data {folder}: {split}/{missing} is named in captions_{split}.json but is "
                            "not there; fetch it again")
        self.key = store.digest(self.ids, self.captions, [(name, there[name]) for name in self.files])

    def images(self, numbers, size):
        """float (len(numbers), 3, size, size) in [-1, 1], as square says.  Raises UserError on a
        file that does not decode."""
        def read(i):
            try:
                with Image.open(self.folder / self.files[i]) as image:
                    return square(image.convert("RGB"), size)
            except Exception as error:
                # truncated bytes: PIL raises OSError, SyntaxError, struct.error, EOFError, ...
                raise UserError(f"--data {self.folder.parent}: {self.folder.name}/{self.files[i]} cannot be "
                                f"decoded ({error}); fetch it again") from error
        with ThreadPoolExecutor() as pool:  # PIL lets go of the GIL while it decodes and resizes
            return tensor(pool.map(read, numbers))
