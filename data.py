"""Images with captions, prompts, and a store of rows on disk. Knows nothing of the method.

A dataset is addressed by sample numbers: sample k of a run is the same on one process or eight, before or after a
resume, because everything random about it comes from a generator seeded with (seed, k). Stored images are read one by
one where they lie, in a folder, inside a tar or in a table, so the order costs nothing and nothing is unpacked.

    python data.py cache --model sd15 --prompts prompts.txt --cache pairs   # what train.py with these options would cache

stores teacher trajectories with their text, or for pairs from images their latents with their text; torchrun spreads it.
"""
import contextlib
import csv
import errno
import functools
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import sprites
from config import UserError

# which of these can be read depends on how Pillow was built; of a moving picture, it is the first frame
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# datasets and webdataset are imported where they are used: each costs a second or two
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")      # the first of these that is there
DECODING = 2            # part of a dataset's key: raise it when decode() gives other pixels for the same file
STALE = 3600            # seconds without a change after which a temporary file has no writer any more


def generator(seed, *numbers):
    """A CPU generator for one purpose: every different (seed, numbers...) gives an unrelated stream."""
    digest = hashlib.sha256(repr((seed, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def digest(*values):
    """16 hexadecimal digits that change with any of the values."""
    state = hashlib.sha256()
    for value in values:
        state.update(repr(value).encode())
    return state.hexdigest()[:16]


SPRITES = {"sprites": sprites.LEVELS, "sprites-by-group": sprites.GROUP_LEVELS}      # --data NAME -> its caption levels


class Sprites:
    """The embedded pictures (sprites.py), endless. seed: which endless sequence; held-out pairs are never drawn. levels: of captions."""
    size, skipped = None, []

    def __init__(self, seed, levels=sprites.LEVELS):
        self.seed, self.levels = seed, levels
        table = sprites.pairs(None)
        every = [sprites.describe(torch.cat([table, torch.full((len(table), 1), level)], 1), levels)[0] for level in range(len(levels))]
        self.captions = list(dict.fromkeys(["", *(caption for level in every for caption in level)]))
        self.index = {caption: i for i, caption in enumerate(self.captions)}

    def _plans(self, numbers):
        return torch.cat([sprites.plan(1, generator(self.seed, "sprite", k), held_out=False, levels=self.levels) for k in numbers])

    def rows(self, numbers):
        """Every sample number is a picture of its own.  Returns: list of int."""
        return list(numbers)

    def caption_indices(self, numbers):
        """Which of self.captions describes each sample.  Returns: list of int."""
        return [self.index[caption] for caption in sprites.describe(self._plans(numbers), self.levels)[0]]

    def images(self, numbers, size):
        """float (len(numbers), 3, size, size) in [-1, 1]."""
        return sprites.render(self._plans(numbers), size)

    decode = images


class Prompts:
    """A text file, one prompt per line, or the caption column of a .csv, .tsv or .jsonl; no images: pairs come
    from the teacher's own trajectories."""
    images, size, skipped = None, None, []

    def __init__(self, file, seed, caption_column=""):
        self.seed, path = seed, Path(file)
        try:
            if path.suffix.lower() in RECORD_SUFFIXES:
                lines = self._column(file, read_records(path), caption_column)
            elif caption_column:
                raise UserError(f"--caption-column {caption_column}: --prompts {file} has no columns; leave it out")
            else:                                            # splitlines() would cut at U+2028, U+0085, form feeds, ...
                lines = path.read_text(encoding="utf-8-sig").split("\n")
                lines = [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"--prompts {file}: cannot be read ({error}); give a text file, one prompt per line, or a "
                            ".csv") from error
        if not lines:
            raise UserError(f"--prompts {file}: no prompt in it; write one per line")
        self.captions = list(dict.fromkeys(["", *lines]))
        index = {caption: i for i, caption in enumerate(self.captions)}
        self.lines = [index[line] for line in lines]

    @staticmethod
    def _column(file, records, wanted):
        try:
            column = choose_column(f"--prompts {file}", columns_of(records), wanted) if records else ""
        except UserError as error:
            raise UserError(f"{error}, or rename the file to .txt if every line of it is a prompt") from error
        lines = [clean(record.get(column)) for record in records]
        if not all(lines):
            number = lines.index("") + 1
            raise UserError(f"--prompts {file}: entry {number} has no {column}; write one or remove the entry")
        return lines

    def caption_indices(self, numbers):
        return [self.lines[torch.randint(len(self.lines), (1,), generator=generator(self.seed, "prompt", k)).item()] for k in numbers]


class Row(NamedTuple):
    """A stored image: its name in a message, where read() finds it, its caption, and why it cannot be used ("": it can)."""
    name: str
    where: tuple | None
    caption: str = ""
    problem: str = ""


class Images:
    """Stored images with captions, whatever stores them. Sample numbers go through them in a new random order each time round.

    rows: list of Row; read(row.where) -> the bytes of an image file. Every image is decoded once, here, so that none can
    stop a run later.  Raises UserError naming the first bad row; with skip_bad, names go to self.skipped instead.
    checked: a JSON file that remembers the outcome, so that the same rows are not decoded again. It is written without a
    lock: of several processes, let one open the dataset before the others."""

    def __init__(self, data, rows, read, seed, skip_bad=False, checked=None):
        self.data, self.read = data, read
        if not rows:
            raise UserError(f"--data {data}: no image in it ({', '.join(IMAGE_SUFFIXES)}); give one that holds some")
        bad = {i: row.problem for i, row in enumerate(rows) if row.problem}
        if skip_bad or not bad:
            bad |= self._undecodable(rows, skip_bad, checked)
        first = next((f"{rows[i].name} {bad[i]}" for i in sorted(bad)), "")
        if bad and not skip_bad:
            raise UserError(f"--data {data}: {first}, or leave it out with --skip-bad")
        if len(bad) == len(rows):
            raise UserError(f"--data {data}: nothing usable in it; --skip-bad left out all {len(rows)}, the first because {first}")
        self.skipped = [rows[i].name for i in sorted(bad)]
        self.kept = [row for i, row in enumerate(rows) if i not in bad]
        self.size = len(self.kept)
        self.key = digest(DECODING, *self.kept)              # changes with any name, place, size or caption
        self.captions = list(dict.fromkeys(["", *(row.caption for row in self.kept)]))
        index = {caption: i for i, caption in enumerate(self.captions)}
        self.row_captions = [index[row.caption] for row in self.kept]
        self._order = functools.lru_cache(2)(lambda epoch: torch.randperm(self.size, generator=generator(seed, "epoch", epoch)))

    def _undecodable(self, rows, skip_bad, checked):
        """Decode every row that has no problem yet.  Returns: {index: problem}; without skip_bad, only up to the first ones."""
        key = digest(self.data, PIL.__version__, *rows)      # cheap, and changes with names, captions, places and sizes
        remembered = parse_object(checked.read_text()) if checked and checked.exists() else {}
        if remembered.get("key") == key:
            return dict(remembered["bad"])

        def problem(row):
            try:
                self._picture(row)
            except Exception as error:                           # torn bytes: PIL raises OSError, SyntaxError, struct.error, EOFError, ...
                unknown = isinstance(error, UnidentifiedImageError)
                reason = f"not an image to Pillow {PIL.__version__}" if unknown else error
                return f"or its caption cannot be read ({reason}); replace or remove it"

        todo, bad = [i for i, row in enumerate(rows) if not row.problem], {}
        with ThreadPoolExecutor() as pool, tqdm(total=len(todo), desc="checking images", disable=len(todo) <= 1000) as bar:
            for part in (todo[start:start + 1024] for start in range(0, len(todo), 1024)):      # map() queues all it is given at once
                bad |= {i: found for i, found in zip(part, pool.map(problem, [rows[i] for i in part])) if found}
                if bad and not skip_bad:
                    return bad
                bar.update(len(part))
        if checked:
            checked.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(checked, lambda part: part.write_text(json.dumps({"key": key, "bad": list(bad.items())})))
        return bad

    def _picture(self, row):
        """The image as PIL RGB, upright."""
        with Image.open(io.BytesIO(self.read(row.where))) as image:
            return as_rgb(image)

    def rows(self, numbers):
        """The stored image of each sample number: epoch by epoch, a new permutation each time.  Returns: list of int."""
        return [self._order(k // self.size)[k % self.size].item() for k in numbers]

    def caption_indices(self, numbers):
        """Which of self.captions describes each sample.  Returns: list of int."""
        return [self.row_captions[row] for row in self.rows(numbers)]

    def images(self, numbers, size):
        """decode() for sample numbers."""
        return self.decode(self.rows(numbers), size)

    def decode(self, rows, size):
        """float (len(rows), 3, size, size) in [-1, 1], as square() says."""
        def read(row):
            try:
                return square(self._picture(self.kept[row]), size)
            except Exception as error:                           # it was sound when it was checked
                raise UserError(f"--data {self.data}: {self.kept[row].name} has changed since it was checked "
                                f"({error}); put it back, or run again") from error
        with ThreadPoolExecutor() as pool:                       # PIL lets go of the GIL while it decodes and resizes
            return tensor(pool.map(read, rows))


def as_rgb(image):
    """A PIL image of any mode as upright RGB, 8 bits; what is transparent is composited on white.
    Raises ValueError on pixels whose range the file does not tell."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):                    # convert() would clip 16-bit gray to white, floats to 0
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError("neither 8 nor 16 bits a pixel")
        image = Image.fromarray((levels // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, size):
    """A PIL image brought to size x size: the shorter side resized to it (Lanczos), then the center cropped, rounded
    as torchvision's Resize and CenterCrop do. Of a strip beyond 16:1 only the middle is resized: all of 4000 x 1 would
    take 1 GB at size 256."""
    short = min(image.size)
    outside = [max(0, (side - 16 * short) // 2) for side in image.size]      # on either side: the center stays in place
    if any(outside):
        image = image.crop((*outside, image.width - outside[0], image.height - outside[1]))
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))


def tensor(pictures):
    """RGB PIL images of one size to float (N, 3, H, W) in [-1, 1]."""
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures)
    return torch.stack([levels.float() / 127.5 - 1 for levels in pixels])


def open_dataset(data, prompts, seed, skip_bad=False, image_column="", caption_column="", checked=None):
    """--data / --prompts to a dataset: captions (captions[0] is ""), caption_indices(numbers), skipped, size (None if endless),
    and unless images is None: rows(numbers), images(numbers, size), decode(rows, size); row_captions if size is not None."""
    if bool(data) == bool(prompts):
        raise UserError(f"give either --data (images with captions, or {' or '.join(SPRITES)}) or --prompts (a text file)")
    if prompts:
        return Prompts(prompts, seed, caption_column)
    if data in SPRITES:
        if image_column or caption_column:
            raise UserError(f"--image-column / --caption-column: --data {data} has no columns; leave them out")
        return Sprites(seed, SPRITES[data])
    return Images(data, *find_rows(data, image_column, caption_column), seed, skip_bad, checked)


# ---- formats: each function returns (list of Row, read) ------------------------------------------------------------


def find_rows(data, image_column="", caption_column=""):
    """The rows of whatever --data names: a folder, a file, a brace or glob pattern of files, or a dataset on the hub."""
    columns, path = (image_column, caption_column), Path(data)
    remedy = ("give a folder of images with same-name .txt or .json captions or a metadata.jsonl, tar shards, parquet "
              f"files, user/name on the Hugging Face hub, or {' or '.join(SPRITES)}")
    if path.is_dir():
        return rows_below(data, *columns)
    if re.match(r"pipe:|[a-z][a-z0-9+.-]*://", data, re.I):
        raise UserError(f"--data {data}: an address, but data is read from the disk; download it, or {remedy}")
    if path.suffix in (".tar", ".parquet"):
        files = [path] if path.exists() else expand(data)
        if any(file.exists() for file in files):
            if path.suffix == ".tar":
                return tar_rows(files, *columns)
            return table_rows(data, lambda datasets: datasets.Dataset.from_parquet([str(file) for file in files]), *columns)
    elif path.suffix in RECORD_SUFFIXES and path.is_file():
        return metadata_rows(path, *columns)
    # user/name; but a/b where there is a folder a is a typing error, not a reason to query the network
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data) and not path.exists() and not path.parent.exists():
        return table_rows(data, lambda datasets: datasets.load_dataset(data, split="train"), *columns)
    if path.exists():
        raise UserError(f"--data {data}: a file of no kind that is read here; {remedy}")
    if re.search(r"[*?[{]", data):
        known = path.suffix in (".tar", ".parquet")
        what = "matches no file" if known else "a pattern, which only .tar and .parquet files can have"
        raise UserError(f"--data {data}: {what}; {remedy}")
    raise UserError(f"--data {data}: no such folder or file; {remedy}")


def rows_below(data, image_column, caption_column):
    """The rows of a folder, which holds images of one kind: COCO's, loose files, tar shards or tables."""
    columns, path = (image_column, caption_column), Path(data)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return table_rows(data, lambda datasets: datasets.load_from_disk(data), *columns)
    if any(path.glob("annotations/captions_*.json")):
        return coco_rows(path, *columns)
    files = files_below(path)
    images, tars, tables = ([file for file in files if file.suffix.lower() in suffixes]
                            for suffixes in (IMAGE_SUFFIXES, (".tar",), (".parquet",)))
    if (images or tars) and tables and not holds_images(tables[0]):
        tables = []                                          # img2dataset leaves a table of addresses beside a shard
    there = [f"{len(found)} {what} ({found[0].relative_to(path)}{', ...' * (len(found) > 1)})" for found, what in (
        (images, "image files"), (tars, "tar files"), (tables, "tables with images")) if found]
    if len(there) > 1:
        raise UserError(f"--data {data}: holds {' and '.join(there)}; move away what is not meant, or give a pattern "
                        f"such as '{data}/*.tar'")
    if tars:
        return tar_rows(tars, *columns)
    for metadata in (path / "metadata.jsonl", path / "metadata.csv"):
        if metadata.exists():
            return metadata_rows(metadata, *columns)
    linked = [file for file in tables if any(here.is_symlink() for here in file.parents if path in here.parents)]
    if linked:                                               # load_dataset would leave them out in silence
        raise UserError(f"--data {data}: {linked[0].relative_to(path)} is behind a link to a folder; give the folder it "
                        f"leads to, or a pattern such as '{linked[0].parent}/*.parquet'")
    if tables:                                               # load_dataset knows which of them are train, which test
        return table_rows(data, lambda datasets: datasets.load_dataset(data, split="train"), *columns)
    return folder_rows(path, files, *columns)


def files_below(folder):
    """Every file anywhere below a folder, sorted. Links to folders are entered, but no folder twice; hidden names do
    not count.  Raises UserError on a folder that cannot be opened."""
    def refuse(error):
        raise UserError(f"--data {folder}: {error.filename} cannot be opened ({error.strerror}); allow it or move it "
                        "away") from error
    entered, files = set(), []
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(here) in entered:                # a second link to it, or one that leads back up
            folders.clear()
            continue
        entered.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


def expand(pattern):
    """The files of a pattern such as shards/{0000..0010}.tar or shards/*.tar. One that is not there stays in the list."""
    from webdataset.shardlists import expand_urls
    return [Path(file) for piece in expand_urls(pattern) for file in sorted(glob.glob(piece)) or [piece]]


def read_span(where):
    """The bytes of where = (path, offset, size). The file is opened each time: it works in any thread and after a fork."""
    path, offset, size = where
    with open(path, "rb") as file:
        file.seek(offset)
        return whole(file.read(size), size)


def whole(content, size):
    if len(content) < size:
        raise OSError(f"{len(content)} bytes of {size}")
    return content


def clean(caption):
    """A caption as a table or JSON holds it, as text: of several the first, "" for what is not text."""
    caption = next(iter(caption), "") if isinstance(caption, (list, tuple)) else caption
    return caption.strip() if isinstance(caption, str) else ""


def choose_column(source, columns, wanted):
    """The caption column: the wanted one, or the first of CAPTION_COLUMNS that is there, in upper or lower case.
    source: the option and its value, for the message. columns: names.  Raises UserError."""
    for column in [wanted] if wanted else CAPTION_COLUMNS:
        for found in columns:
            if found == column or not wanted and found.lower() == column:
                return found
    raise UserError(f"{source}: no caption column {wanted or 'known'}; name one of {', '.join(columns)} with "
                    "--caption-column")


def captioned(name, where, stem, there, read, wanted):
    """The Row of an image whose caption is STEM.txt or, under one of CAPTION_COLUMNS, in STEM.json; under `wanted` if
    that is given. there: names that exist, suffix in lower case -> what read() turns into bytes."""
    text, record = "", {}
    try:
        if not wanted and stem + ".txt" in there:
            text = read(there[stem + ".txt"]).decode("utf-8-sig").strip()
        if not text and stem + ".json" in there:
            record = parse_object(read(there[stem + ".json"]).decode("utf-8-sig"))
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        return Row(name, where, problem=f"or its caption cannot be read ({error}); replace or remove it")
    candidates = map(clean, map(record.get, [wanted] if wanted else CAPTION_COLUMNS))
    caption = next(filter(None, [text, *candidates]), "")
    place = f"{stem}.json, {wanted}" if wanted else f"{stem}.txt"
    return Row(name, where, caption, "" if caption else f"has no caption; write one into {place}")


def lower_suffix(name):
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def folder_rows(folder, files, image_column, caption_column):
    """Images anywhere below a folder, each with its caption in a .txt or .json of the same name. A .txt alone has lost
    its image, and is a problem; any other file is ignored."""
    if image_column:
        raise UserError(f"--image-column {image_column}: {folder} holds files and has no columns; leave it out")
    there = {lower_suffix(str(file.relative_to(folder))): file for file in files}
    stems, rows = {os.path.splitext(name)[0] for name in there if name.endswith(IMAGE_SUFFIXES)}, []
    for file in files if stems else ():
        name = str(file.relative_to(folder))
        stem, suffix = os.path.splitext(lower_suffix(name))
        if not file.exists():
            rows.append(Row(name, None, problem="is a link to nothing; restore what it names or remove it"))
        elif suffix in IMAGE_SUFFIXES:
            where = (str(file), 0, file.stat().st_size)
            rows.append(captioned(name, where, stem, there, Path.read_bytes, caption_column))
        elif suffix == ".txt" and stem not in stems:
            rows.append(Row(name, None, problem="is the caption of no image; add its image or move it away"))
    return rows, read_span


RECORD_SUFFIXES = (".csv", ".tsv", ".jsonl")


def read_records(path):
    """The entries of a .csv, .tsv or .jsonl as dicts; {} for a line that is no JSON object.
    Raises OSError, UnicodeDecodeError, csv.Error."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            return [parse_object(line) for line in file if line.strip()]
        # strict: a quote that is never closed is an error, not one long entry
        return list(csv.DictReader(file, delimiter=delimiter, strict=True))


def columns_of(records):
    return list(dict.fromkeys(key for record in records for key in record if key))


def coco_captions(folder, split):
    """FOLDER/annotations/captions_SPLIT.json as COCO is distributed.  Returns: {image id: file name} and {image id:
    [(annotation id, caption), ...]}, both in the file's order; an image without captions is in the first alone.
    Raises UserError."""
    annotations = Path(folder) / "annotations" / f"captions_{split}.json"
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names, found = {image["id"]: image["file_name"] for image in content["images"]}, {}
        for annotation in content["annotations"]:
            if annotation["image_id"] in names:
                caption = (annotation["id"], annotation["caption"].strip())
                found.setdefault(annotation["image_id"], []).append(caption)
    except OSError as error:
        raise UserError(f"--data {folder}: annotations/{annotations.name} cannot be read ({error.strerror}); give the "
                        f"folder that holds COCO's annotations and {split}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--data {folder}: annotations/{annotations.name} is not a captions file of COCO "
                        f"({type(error).__name__}: {error}); fetch it again") from error
    return names, found


def coco_rows(folder, image_column, caption_column):
    """COCO as it is distributed: every image of the newest training split that is there, or else of the newest other
    one, with its first caption."""
    if image_column or caption_column:
        raise UserError(f"--image-column / --caption-column: {folder} is COCO and has no columns; leave them out")
    splits = [file.stem.removeprefix("captions_") for file in folder.glob("annotations/captions_*.json")]
    there = [split for split in splits if (folder / split).is_dir()]
    if not there:
        raise UserError(f"--data {folder}: its annotations are COCO's, but {' or '.join(sorted(splits))} is not beside "
                        "them; unpack the images there")
    split, rows = max(there, key=lambda split: (split.startswith("train"), split)), []
    names, captions = coco_captions(folder, split)
    for image, name in names.items():
        file, caption = folder / split / name, captions.get(image, [(0, "")])[0][1]
        if not file.is_file():
            missing = "is named in its annotations but is not there; fetch it again"
            rows.append(Row(f"{split}/{name}", None, problem=missing))
        else:
            rows.append(Row(f"{split}/{name}", (str(file), 0, file.stat().st_size), caption,
                            "" if caption else f"has no caption; write one into captions_{split}.json"))
    return rows, read_span


def metadata_rows(metadata, image_column, caption_column):
    """Images that a metadata.jsonl, .csv or .tsv names, in its order: the imagefolder layout of Hugging Face. Read here, not by
    datasets, which takes folders named test for a split and stops at the first file that is missing."""
    folder, image_column = metadata.parent, image_column or "file_name"
    try:
        records = read_records(metadata)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data {folder}: {metadata.name} cannot be read ({error}); replace it") from error
    column = choose_column(f"--data {folder}", columns_of(records), caption_column) if records else ""
    rows = []
    for i, record in enumerate(records, 1):
        name = record.get(image_column)
        if not name or not isinstance(name, str):
            rows.append(Row(f"{metadata.name} entry {i}", None, problem=f"names no image in {image_column}; fix or remove it"))
        elif not (folder / name).is_file():
            rows.append(Row(name, None, problem=f"is named in {metadata.name} but is not there; add it or remove its entry"))
        else:
            caption = clean(record.get(column))
            rows.append(Row(name, (str(folder / name), 0, (folder / name).stat().st_size), caption,
                            "" if caption else f"has no caption; write one into {metadata.name}, {column}"))
    return rows, read_span


def parse_object(text):
    """A JSON object as a dict; {} for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def tar_rows(shards, image_column, caption_column):
    """WebDataset shards: an image member and, of the same stem, a .txt with the caption or a .json with it under one of
    CAPTION_COLUMNS (or caption_column), in any order. Headers and captions are read once; an image is later read from
    its offset."""
    suffixes, rows = (f".{image_column.lower()}",) if image_column else IMAGE_SUFFIXES, []
    for shard in tqdm(shards, desc="indexing shards", disable=len(shards) < 10):
        there = {}                                               # name, its suffix in lower case -> header
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    name = lower_suffix(str(PurePosixPath(member.name)))
                    if member.isdir() or any(part.startswith(".") for part in PurePosixPath(name).parts):
                        continue
                    if name in there:
                        rows.append(Row(f"{shard.name}: {member.name}", None, problem="is there twice; keep one"))
                    elif not member.isreg():
                        rows.append(Row(f"{shard.name}: {member.name}", None, problem="is a link; store the file itself"))
                    else:
                        there[name] = member
                tar.fileobj.seek(tar.offset)
                if any(block.strip(b"\0") for block in iter(lambda: tar.fileobj.read(2 ** 20), b"")):
                    # tarfile takes a truncated header for the end
                    raise tarfile.ReadError("a truncated header, or another archive behind the first")
        except (OSError, ValueError, tarfile.TarError) as error:
            rows.append(Row(shard.name, None, problem=f"cannot be read to its end ({error}); fetch it again"))
        if there:
            with open(shard, "rb") as file:
                def read(member):
                    file.seek(member.offset_data)
                    return whole(file.read(member.size), member.size)
                rows += shard_rows(shard, there, read, suffixes, caption_column)
    return rows, read_span


def shard_rows(shard, there, read, suffixes, caption_column):
    """The rows of one shard. An image is one by its last suffix; of one stem, the first of suffixes. But NAME.mask.png
    beside NAME.jpg is a part of that sample, as in webdataset, unless it has a caption of its own."""
    def key(stem):
        folder, _, base = stem.rpartition("/")
        return f"{folder}/{base.split('.')[0]}".lstrip("/")
    stems, rows = {}, []
    for name in there:
        suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)
        if suffix:
            stems.setdefault(name[:-len(suffix)], {})[suffix] = there[name]
    for stem, found in stems.items():
        own_caption = stem + ".txt" in there or stem + ".json" in there
        if key(stem) == stem or key(stem) not in stems or own_caption:
            image = found[min(found, key=suffixes.index)]
            where = (str(shard), image.offset_data, image.size)
            rows.append(captioned(f"{shard.name}: {image.name}", where, stem, there, read, caption_column))
    for name in there:
        stem, suffix = os.path.splitext(name)
        if suffix == ".txt" and stem not in stems and key(stem) not in stems:
            lost = f"has no image ({', '.join(suffixes)}); add it or remove the caption"
            rows.append(Row(f"{shard.name}: {name}", None, problem=lost))
    return rows


def holds_images(parquet):
    """Whether a parquet file has a column of bytes, plain or in a struct {bytes, ...}, as images are stored."""
    import pyarrow
    import pyarrow.parquet
    try:
        types = pyarrow.parquet.read_schema(parquet).types
    except (OSError, ValueError) as error:
        raise UserError(f"--data {parquet.parent}: {parquet.name} cannot be read ({error}); fetch it again or move it "
                        "away") from error
    return any(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
               or pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 for kind in types)


def table_rows(data, load, image_column, caption_column):
    """A Hugging Face dataset; load(datasets) returns it. Rows are read through memory-mapped Arrow files, which datasets makes of
    parquet in its own cache ($HF_DATASETS_CACHE). No code from the hub is run: from version 4 on, datasets cannot."""
    import datasets
    try:
        table = load(datasets)
        if isinstance(table, datasets.DatasetDict):
            table = table["train"]
    except Exception as error:                                   # offline, unknown, private, no such split, torn: each has its own class
        raise UserError(f"--data {data}: cannot be opened ({type(error).__name__}: {error}); give a dataset with a train split") from error
    # images by their type, or else plain bytes if there is one column of them
    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    plain = [name for name, feature in table.features.items() if isinstance(feature, dict) and "bytes" in feature
             or getattr(feature, "dtype", "") in ("binary", "large_binary")]
    found = [image_column] if image_column else typed[:1] or plain
    if len(found) != 1 or found[0] not in table.column_names:
        what = "several columns of bytes" if len(found) > 1 else f"no column {image_column or 'of images'}"
        names = plain if len(found) > 1 else table.column_names
        raise UserError(f"--data {data}: {what}; name one of {', '.join(names)} with --image-column")
    image_column = found[0]
    caption_column = choose_column(f"--data {data}", table.column_names, caption_column)
    try:
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--data {data}: the column {image_column} holds no images; name another with --image-column") from error

    def read(where):
        cell = images[where[0]][image_column] or {"bytes": None, "path": None}
        if not cell["bytes"] and not cell["path"]:
            raise ValueError("an empty cell")
        return cell["bytes"] or Path(cell["path"]).read_bytes()
    missing = f"has no caption; fill in its column {caption_column}"
    captions, nbytes = [clean(caption) for caption in table[caption_column][:]], table.data.nbytes
    return [Row(f"row {i}", (i, nbytes), caption, "" if caption else missing) for i, caption in enumerate(captions)], read


# ---- the store -----------------------------------------------------------------------------------------------------


class Rows:
    """The first `count` rows of a cache, read from its memory-mapped shards as they are asked for."""

    def __init__(self, files, shard, count):
        self.shard, self.count = shard, count
        self.files = [safe_open(file, "pt") for file in files]
        self.slices = [{name: file.get_slice(name) for name in file.keys()} for file in self.files]

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        """indices: list or 1-D tensor of n ints, in any order.  Returns: dict of tensors (n, ...).  Raises IndexError."""
        indices = [int(i) for i in indices]
        outside = [i for i in indices if not 0 <= i < self.count]
        if outside:
            raise IndexError(f"row {outside[0]} of {self.count}")
        return {name: torch.stack([self.slices[i // self.shard][name][i % self.shard] for i in indices]) for name in self.slices[0]}


class Joined:
    """Several Rows as one, end to end."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, indices):
        """As Rows."""
        found = []
        for index in map(int, indices):
            for part in self.parts:
                if index < len(part):
                    found.append(part[[index]])
                    break
                index -= len(part)
            else:
                raise IndexError(f"row {index} beyond the last of {len(self)}")
        return {name: torch.cat([row[name] for row in found]) for name in found[0]}


def cached(folder, count, settings, solve, shard=256, rank=0, world=1, barrier=lambda: None, desc="", batch=None):
    """The first `count` rows of a cache, made shard by shard where missing: resumable after a kill at any moment, and shared by every
    run that asks with the same settings. settings: dict that says how rows are made; a folder made otherwise is refused.
    solve(numbers) -> dict of tensors (len(numbers), ...), the rows of these numbers, at most `batch` of them at once (default: a
    shard); the bar moves after each.  Returns: Rows.
    Raises UserError, also on rows that are not finite: they would stop the training, long after they were made."""
    folder = Path(folder)
    manifest = folder / "manifest.json"
    settings = json.loads(json.dumps(settings))                  # as the file gives it back: tuples become lists
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {folder}: cannot be written ({error.strerror}); choose another folder") from error
        if not manifest.exists():                            # another run may write its own now: the first one stays
            text = json.dumps(settings, indent=1)
            write_atomically(manifest, lambda part: part.write_text(text), replace=False)
    barrier()
    found = parse_object(manifest.read_text())
    if not found and settings:
        raise UserError(f"--cache {folder}: manifest.json is truncated; delete the folder")
    if found != settings:
        there, here = ({key: made.get(key, "absent") for key in (*found, *settings)} for made in (found, settings))
        different = {key: (there[key], here[key]) for key in there if there[key] != here[key]}
        raise UserError(f"--cache {folder}: made with other settings (there, here): {different}; choose another folder or delete it")
    parts = [(folder / f"{i:05d}.safetensors", range(start, min(start + shard, count))) for i, start in enumerate(range(0, count, shard))]
    missing = [part for part in parts[rank::world] if rows_in(part[0], part[1].start) < len(part[1])]
    with tqdm(total=sum(len(numbers) for _, numbers in missing), desc=desc, disable=rank > 0 or not missing) as bar:
        for file, numbers in missing:
            solved, size = [], batch or shard
            for some in (numbers[first:first + size] for first in range(0, len(numbers), size)):
                solved.append(solve(some))
                bar.update(len(some))
            made = {name: torch.cat([rows[name] for rows in solved]).contiguous() for name in solved[0]}
            for name, value in made.items():
                if not value.isfinite().all():
                    raise UserError(f"--cache {folder}: {name} of rows {numbers.start} to {numbers.stop - 1} is not finite: "
                                    "the model that makes them has diverged or overflows; they were not kept")
            if rows_in(file, numbers.start) < len(numbers):  # another run may have made it meanwhile, and longer
                write_atomically(file, lambda part: save_file(made, part, {"first": str(numbers.start)}))
    barrier()
    return Rows([file for file, _ in parts], shard, count)


def rows_in(file, first):
    """How many rows a shard holds; 0 if it is not there, is torn, or does not begin with row `first` (made with another shard size)."""
    try:
        with safe_open(file, "pt") as part:
            held = min(part.get_slice(name).get_shape()[0] for name in part.keys())
            return held if (part.metadata() or {}).get("first") == str(first) else 0
    except (OSError, SafetensorError, ValueError):
        return 0


def write_atomically(target, write, replace=True):
    """write(part) into a file or folder beside target, bring it onto the disk, then rename: target is whole or absent,
    after a kill and after a power cut; of several processes that write it at once each has a part of its own.
    replace=False: a target (a file) that is there stays.  Raises UserError on a full disk; the old target is still
    there then."""
    remove_stale(target.parent)
    name = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
    part, old = target.with_name(f"{name}.part"), target.with_name(f"{name}-old.part")
    try:
        write(part)
        sync(part)
        if not replace:
            link(part, target)
        else:
            if target.is_dir():                              # rename() does not replace a folder that holds something
                os.rename(target, old)
            os.replace(part, target)
        sync(target.parent, below=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(target.parent).free < 2 ** 20:
            raise UserError(f"{target}: no space left on the device; free some and run the same command again") from error
        raise
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        remove(part)
        remove(old)


def link(part, target):
    """Give a finished file its name unless that exists: the one step that creates and never replaces."""
    try:
        os.link(part, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.replace(part, target)                             # no hard links (exFAT, network drives): the last stays


def sync(path, below=True):
    """Return once a file, or a folder with everything below it, is on the disk itself."""
    for entry in [*(path.rglob("*") if below and path.is_dir() else ()), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:                             # there are network drives that cannot sync a folder
            if not (entry.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
                raise
        finally:
            os.close(descriptor)


def remove_stale(folder):
    """Delete what killed processes left of write_atomically in a folder. Whether a writer lives cannot be seen from
    another machine or container: one that has not written for STALE seconds does not."""
    for part in folder.glob(".*.part"):
        if re.search(r"\.\d+-[0-9a-f]{8}(-old)?\.part$", part.name):
            with contextlib.suppress(FileNotFoundError):     # its writer was faster, or another process that cleans
                if time.time() - max(entry.stat().st_mtime for entry in [part, *part.rglob("*")]) > STALE:
                    remove(part)


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    import config
    import train
    if sys.argv[1:2] != ["cache"]:
        sys.exit(config.fail("say what to do: python data.py cache --model ... --data ... or --prompts ..., with train.py's options"))
    config.run(train.make_cache, train.Config, __doc__, sys.argv[2:])
