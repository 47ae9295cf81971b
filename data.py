"""Images with captions, prompts, and a store of rows on disk. Knows nothing of the method.

A dataset is addressed by sample numbers: sample k of a run is the same on one process or eight, before or after a
resume, because everything random about it comes from a generator seeded with (seed, k). Stored images are read one by
one where they lie, in a folder, inside a tar or in a table, so the order costs nothing and nothing is unpacked.

    python data.py cache --model sd15 --prompts prompts.txt --cache pairs   # what train.py with these options would cache

stores teacher trajectories with their text, or for pairs from images their latents with their text; torchrun spreads it.
"""
import csv
import errno
import functools
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import sprites
from config import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# datasets and webdataset are imported where they are used: each costs a second or two
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")      # the first of these that is there


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
    """A text file, one prompt per line; no images: pairs come from the teacher's own trajectories."""
    images, size, skipped = None, None, []

    def __init__(self, file, seed):
        self.seed, path = seed, Path(file)
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {file}: cannot be read ({error}); give a text file, one prompt per line") from error
        if not lines:
            raise UserError(f"--prompts {file}: no prompt in it; write one per line")
        self.captions = list(dict.fromkeys(["", *lines]))
        index = {caption: i for i, caption in enumerate(self.captions)}
        self.lines = [index[line] for line in lines]

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
            raise UserError(f"--data {data}: no image in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
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
        self.key = digest(*self.kept)                            # changes with any name, place, size or caption
        self.captions = list(dict.fromkeys(["", *(row.caption for row in self.kept)]))
        index = {caption: i for i, caption in enumerate(self.captions)}
        self.row_captions = [index[row.caption] for row in self.kept]
        self._order = functools.lru_cache(2)(lambda epoch: torch.randperm(self.size, generator=generator(seed, "epoch", epoch)))

    def _undecodable(self, rows, skip_bad, checked):
        """Decode every row that has no problem yet.  Returns: {index: problem}; without skip_bad, only up to the first ones."""
        key = digest(self.data, *rows)                           # names, captions, places and sizes: cheap, and it changes with them
        remembered = parse_object(checked.read_text()) if checked and checked.exists() else {}
        if remembered.get("key") == key:
            return dict(remembered["bad"])

        def problem(row):
            try:
                self._picture(row)
            except Exception as error:                           # torn bytes: PIL raises OSError, SyntaxError, struct.error, EOFError, ...
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
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
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                       # 16-bit grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return image.convert("RGB")

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
        """float (len(rows), 3, size, size) in [-1, 1]: shorter side resized to size (Lanczos), centre crop."""
        def square(row):
            try:
                image = self._picture(self.kept[row])
            except Exception as error:                           # it was sound when it was checked
                raise UserError(f"--data {self.data}: {self.kept[row].name} has changed since it was checked ({error})") from error
            scale = size / min(image.size)
            image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.LANCZOS)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            pixels = np.array(image.crop((left, top, left + size, top + size)))
            return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        with ThreadPoolExecutor() as pool:                       # PIL lets go of the GIL while it decodes and resizes
            return torch.stack(list(pool.map(square, rows)))


def open_dataset(data, prompts, seed, skip_bad=False, image_column="", caption_column="", checked=None):
    """--data / --prompts to a dataset: captions (captions[0] is ""), caption_indices(numbers), skipped, size (None if endless),
    and unless images is None: rows(numbers), images(numbers, size), decode(rows, size); row_captions if size is not None."""
    if bool(data) == bool(prompts):
        raise UserError(f"give either --data (images with captions, or {' or '.join(SPRITES)}) or --prompts (a text file)")
    if prompts:
        return Prompts(prompts, seed)
    if data in SPRITES:
        return Sprites(seed, SPRITES[data])
    return Images(data, *find_rows(data, image_column, caption_column), seed, skip_bad, checked)


# ---- formats: each function returns (list of Row, read) ------------------------------------------------------------


def find_rows(data, image_column="", caption_column=""):
    """The rows of whatever --data names: a folder, a file, a brace or glob pattern of files, or a dataset on the hub."""
    columns, path = (image_column, caption_column), Path(data)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return table_rows(data, lambda datasets: datasets.load_from_disk(data), *columns)
        if any(path.glob("*.tar")):
            return tar_rows(sorted(path.glob("*.tar")), *columns)
        for metadata in (path / "metadata.jsonl", path / "metadata.csv"):
            if metadata.exists():
                return metadata_rows(metadata, *columns)
        if any(path.rglob("*.parquet")):                         # load_dataset knows which of them are train and which test
            return table_rows(data, lambda datasets: datasets.load_dataset(data, split="train"), *columns)
        if any(columns):
            raise UserError(f"--image-column / --caption-column: {data} has .txt captions and no columns; leave them out")
        return folder_rows(path)
    if path.suffix in (".tar", ".parquet"):
        files = [path] if path.exists() else expand(data)
        if any(file.exists() for file in files):
            if path.suffix == ".tar":
                return tar_rows(files, *columns)
            return table_rows(data, lambda datasets: datasets.Dataset.from_parquet([str(file) for file in files]), *columns)
    # user/name; but a/b where there is a folder a is a slip of the fingers, not a reason to ask the network
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data) and not path.exists() and not path.parent.exists():
        return table_rows(data, lambda datasets: datasets.load_dataset(data, split="train"), *columns)
    raise UserError(f"--data {data}: no such folder; give a folder of images with same-name .txt captions or a metadata.jsonl, "
                    f"tar shards, parquet files, user/name on the Hugging Face hub, or {' or '.join(SPRITES)}")


def expand(pattern):
    """The files of a pattern such as shards/{0000..0010}.tar or shards/*.tar. One that is not there stays in the list."""
    from webdataset.shardlists import expand_urls
    return [Path(file) for piece in expand_urls(pattern) for file in sorted(glob.glob(piece)) or [piece]]


def read_span(where):
    """The bytes of where = (path, offset, size). The file is opened each time: it works in any thread and after a fork."""
    path, offset, size = where
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def clean(caption):
    """A caption as a table or JSON holds it, as text: of several the first, "" for what is not text."""
    caption = next(iter(caption), "") if isinstance(caption, (list, tuple)) else caption
    return caption.strip() if isinstance(caption, str) else ""


def choose_column(data, columns, wanted):
    """The caption column: the wanted one, or the first of CAPTION_COLUMNS that is there.  Raises UserError."""
    for column in [wanted] if wanted else CAPTION_COLUMNS:
        if column in columns:
            return column
    raise UserError(f"--data {data}: no caption column {wanted or 'known'}; name one of {', '.join(columns)} with --caption-column")


def folder_rows(folder):
    """Images anywhere below a folder, each with its caption in a .txt of the same name. Hidden files do not count."""
    files = sorted(file for file in folder.rglob("*")
                   if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts))
    images = {file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
    texts, rows = {file.with_suffix(".txt") for file in images}, []
    for file in files:
        name = str(file.relative_to(folder))
        missing = f"has no caption; write one into {Path(name).with_suffix('.txt')}"
        if file in images:
            where = (str(file), 0, file.stat().st_size)
            try:
                caption = file.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
                rows.append(Row(name, where, caption, "" if caption else missing))
            except FileNotFoundError:
                rows.append(Row(name, where, problem=missing))
            except (OSError, UnicodeDecodeError) as error:
                rows.append(Row(name, where, problem=f"or its caption cannot be read ({error}); replace or remove it"))
        elif file not in texts and images:
            rows.append(Row(name, None, problem="is neither an image nor the caption of one; move it away"))
    return rows, read_span


def metadata_rows(metadata, image_column, caption_column):
    """Images that a metadata.jsonl or metadata.csv names, in its order: the imagefolder layout of Hugging Face. Read here, not by
    datasets, which takes folders named test for a split and stops at the first file that is missing."""
    folder, image_column = metadata.parent, image_column or "file_name"
    try:
        with open(metadata, encoding="utf-8-sig", newline="") as file:
            records = list(csv.DictReader(file)) if metadata.suffix == ".csv" else [parse_object(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data {folder}: {metadata.name} cannot be read ({error}); replace it") from error
    columns = list(dict.fromkeys(key for record in records for key in record if key))
    column = choose_column(folder, columns, caption_column) if records else ""
    rows = []
    for i, record in enumerate(records, 1):
        name = record.get(image_column)
        if not name or not isinstance(name, str):
            rows.append(Row(f"{metadata.name} entry {i}", None, problem=f"names no image in {image_column}; mend or remove it"))
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
    CAPTION_COLUMNS (or caption_column). Headers and captions are read once; an image is later read from its offset."""
    from webdataset.tariterators import group_by_keys
    suffixes = [image_column] if image_column else [suffix[1:] for suffix in sorted(IMAGE_SUFFIXES)]

    def row(tar, shard, sample):
        image = next((sample[suffix] for suffix in suffixes if suffix in sample), None)
        if image is None:
            return Row(f"{shard.name}: {sample['__key__']}", None, problem=f"has no image ({', '.join(suffixes)}); add one")
        name, where = f"{shard.name}: {image.name}", (str(shard), image.offset_data, image.size)
        try:
            text, record = (tar.extractfile(sample[suffix]).read().decode("utf-8-sig") if suffix in sample else ""
                            for suffix in ("txt", "json"))
        except UnicodeDecodeError as error:
            return Row(name, where, problem=f"or its caption cannot be read ({error}); replace or remove it")
        record = parse_object(record)
        candidates = [record.get(caption_column)] if caption_column else [text, *map(record.get, CAPTION_COLUMNS)]
        caption = next(filter(None, map(clean, candidates)), "")
        return Row(name, where, caption,
                   "" if caption else f"has no caption; add a .txt or a .json with {caption_column or 'caption'} beside it")
    rows = []
    for shard in tqdm(shards, desc="indexing shards", disable=len(shards) < 10):
        try:
            with tarfile.open(shard, "r:") as tar:
                members = ({"fname": member.name, "data": member, "__url__": str(shard)} for member in tar if member.isreg())
                for sample in group_by_keys(members):             # headers stand for the contents: no image is read
                    rows.append(row(tar, shard, sample))
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(512).strip(b"\0"):           # tarfile takes a torn header for the end
                    raise tarfile.ReadError("a torn header")
        except (OSError, ValueError, tarfile.TarError) as error:
            rows.append(Row(shard.name, None, problem=f"cannot be read to its end ({error}); fetch it again"))
    return rows, read_span


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
    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    image_column = image_column or next(iter(found), "")
    if image_column not in table.column_names:
        raise UserError(f"--data {data}: no image column {image_column}; name one of {', '.join(table.column_names)} with --image-column")
    caption_column = choose_column(data, table.column_names, caption_column)
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
    shard); the bar moves after each.  Returns: Rows.  Raises UserError."""
    folder = Path(folder)
    manifest = folder / "manifest.json"
    settings = json.loads(json.dumps(settings))                  # as the file gives it back: tuples become lists
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {folder}: cannot be written ({error.strerror}); choose another folder") from error
        if not manifest.exists():
            write_atomically(manifest, lambda part: part.write_text(json.dumps(settings, indent=1)))
    barrier()
    found = json.loads(manifest.read_text())
    if found != settings:
        there, here = ({key: made.get(key, "absent") for key in (*found, *settings)} for made in (found, settings))
        different = {key: (there[key], here[key]) for key in there if there[key] != here[key]}
        raise UserError(f"--cache {folder}: made with other settings (there, here): {different}; choose another folder or delete it")
    parts = [(folder / f"{i:05d}.safetensors", range(start, min(start + shard, count))) for i, start in enumerate(range(0, count, shard))]
    missing = [(file, numbers) for file, numbers in parts[rank::world] if rows_in(file, numbers.start) < len(numbers)]
    with tqdm(total=sum(len(numbers) for _, numbers in missing), desc=desc, disable=rank > 0 or not missing) as bar:
        for file, numbers in missing:
            solved, size = [], batch or shard
            for some in (numbers[first:first + size] for first in range(0, len(numbers), size)):
                solved.append(solve(some))
                bar.update(len(some))
            made = {name: torch.cat([rows[name] for rows in solved]).contiguous() for name in solved[0]}
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


def write_atomically(target, write):
    """write(part) into a file or folder beside target, then rename: target is whole or absent, never torn.
    Raises UserError on a full disk; the old target is still there then."""
    part = target.with_name(target.name + ".part")
    remove(part)
    try:
        write(part)
    except (OSError, RuntimeError, SafetensorError) as error:
        remove(part)
        if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(target.parent).free < 2 ** 20:
            raise UserError(f"{target}: no space left on the device; free some and run the same command again") from error
        raise
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(part, target)


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
