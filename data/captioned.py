"""Images with captions, and prompts. Knows nothing of the method.

A dataset is addressed by sample numbers: sample k of a run is the same on one process or eight,
before or after a resume, because everything random about it comes from a generator seeded with
(seed, k). Stored images are read one by one where they lie, in a folder, inside a tar or in a
table, so the order costs nothing and nothing is unpacked.
"""
import csv
import functools
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data import drawn, formats, imaging
from runtime import seeds, store
from runtime.cli import UserError

DECODING = 2            # part of a dataset's key: raise it when decode() gives other pixels for the same file


class Prompts:
    """A text file, one prompt per line, or the caption column of a .csv, .tsv or .jsonl;
    no images: pairs come from the teacher's own trajectories."""
    images, size, skipped = None, None, []

    def __init__(self, file, seed, caption_column="", option="--prompts"):
        self.seed, path, named = seed, Path(file), f"{option} {file}"
        try:
            if path.suffix.lower() in formats.RECORD_SUFFIXES:
                lines = self._column(named, formats.read_records(path), caption_column)
            elif caption_column:
                raise UserError(f"--caption-column {caption_column}: {named} has no columns; leave "
                                "it out")
            else:  # splitlines() would cut at U+2028, U+0085, form feeds, ...
                lines = path.read_text(encoding="utf-8-sig").split("\n")
                lines = [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{named}: cannot be read ({error}); give a text file, one prompt per "
                            "line, or a .csv") from error
        if not lines:
            raise UserError(f"{named}: no prompt in it; write one per line")
        self.captions = list(dict.fromkeys(["", *lines]))
        index = {caption: i for i, caption in enumerate(self.captions)}
        self.lines = [index[line] for line in lines]

    @staticmethod
    def _column(named, records, wanted):
        try:
            column = formats.choose_column(named, formats.columns_of(records),
                                           wanted) if records else ""
        except UserError as error:
            raise UserError(f"{error}, or rename the file to .txt if every line of it is a prompt") from error
        lines = [formats.clean(record.get(column)) for record in records]
        if not all(lines):
            number = lines.index("") + 1
            raise UserError(f"{named}: entry {number} has no {column}; write one or remove the "
                            "entry")
        return lines

    def caption_indices(self, numbers):
        return [self.lines[torch.randint(len(self.lines), (1,),
                                         generator=seeds.generator(self.seed, "prompt", k)).item()]
                                         for k in numbers]


class Images:
    """Stored images with captions, whatever stores them. Sample numbers go through them in a new
    random order each time round; one that is listed n times comes up n times in it.

    rows: list of Row; read(row.where) -> the bytes of an image file. Every image is decoded once,
    here, so that none can stop a run later.  Raises UserError naming the first bad row;
    with skip_bad, names go to self.skipped instead. min_size: pixels of the shorter side, below
    which an image is bad.
    checked: a JSON file that remembers the outcome, so that the same rows are not decoded again.
    It is written without a lock: of several processes, let one open the dataset before the
    others."""

    def __init__(self, data, rows, read, seed, skip_bad=False, checked=None, min_size=0):
        self.data, self.read, self.min_size = data, read, min_size
        listed, rows = rows, list(dict.fromkeys(rows))           # each is checked, encoded and stored once
        if not rows:
            raise UserError(f"--data {data}: no image in it ({', '.join(formats.IMAGE_SUFFIXES)}); give one "
                            "that holds some")
        bad = {i: row.problem for i, row in enumerate(rows) if row.problem}
        if skip_bad or not bad:
            bad |= self._undecodable(rows, skip_bad, checked)
        first = next((f"{rows[i].name} {bad[i]}" for i in sorted(bad)), "")
        if bad and not skip_bad:
            raise UserError(f"--data {data}: {first}, or leave it out with --skip-bad")
        if len(bad) == len(rows):
            raise UserError(f"--data {data}: nothing usable in it; --skip-bad left out all {len(rows)}, the "
                            f"first because {first}")
        self.skipped = [rows[i].name for i in sorted(bad)]
        self.kept = [row for i, row in enumerate(rows) if i not in bad]
        self.size = len(self.kept)
        place = {row: i for i, row in enumerate(self.kept)}
        self.round = [place[row] for row in listed if row in place]      # every draw of one time round
        # changes with any name, place, size, caption or repetition
        self.key = store.digest(DECODING, *self.kept, *[self.round] * (len(self.round) > self.size))
        self.captions = list(dict.fromkeys(["", *(row.caption for row in self.kept)]))
        index = {caption: i for i, caption in enumerate(self.captions)}
        self.row_captions = [index[row.caption] for row in self.kept]
        self._order = functools.lru_cache(2)(lambda epoch: torch.randperm(len(self.round),
                                                                          generator=seeds.generator(seed,
                                                                                                    "epoch",
                                                                                                    epoch)))

    def _undecodable(self, rows, skip_bad, checked):
        """Decode every row that has no problem yet.  Returns: {index: problem};
        without skip_bad, only up to the first ones."""
        # cheap, and changes with names, captions, places and sizes
        key = store.digest(self.data, PIL.__version__, *rows, *[self.min_size] * bool(self.min_size))
        remembered = store.parse_object(checked.read_text()) if checked and checked.exists() else {}
        if remembered.get("key") == key:
            return dict(remembered["bad"])

        def problem(row):
            try:
                width, height = self._picture(row).size
            except Exception as error:
                # truncated bytes: PIL raises OSError, SyntaxError, struct.error, EOFError, ...
                unknown = isinstance(error, UnidentifiedImageError)
                reason = f"not an image to Pillow {PIL.__version__}" if unknown else error
                return f"or its caption cannot be read ({reason}); replace or remove it"
            if min(width, height) < self.min_size:
                return f"is {width} x {height} pixels, below --min-size {self.min_size}; replace or remove it"

        todo, bad = [i for i, row in enumerate(rows) if not row.problem], {}
        with ThreadPoolExecutor() as pool, tqdm(total=len(todo), desc="checking images",
                                                disable=len(todo) <= 1000) as bar:
            # map() queues all it is given at once
            for part in (todo[start:start + 1024] for start in range(0, len(todo), 1024)):
                bad |= {i: found for i, found in zip(part, pool.map(problem, [rows[i] for i in part]))
                        if found}
                if bad and not skip_bad:
                    return bad
                bar.update(len(part))
        if checked:
            store.make_folder("--cache", checked.parent)
            store.write_atomically(checked,
                                   lambda part: part.write_text(
                                       json.dumps({"key": key, "bad": list(bad.items())})))
        return bad

    def _picture(self, row):
        """The image as PIL RGB, upright."""
        with Image.open(io.BytesIO(self.read(row.where))) as image:
            return imaging.as_rgb(image)

    def rows(self, numbers):
        """The stored image of each sample number: epoch by epoch, a new permutation each time.
        Returns: list of int."""
        draws = len(self.round)
        return [self.round[self._order(k // draws)[k % draws]] for k in numbers]

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
                return imaging.square(self._picture(self.kept[row]), size)
            except Exception as error:                           # it was sound when it was checked
                raise UserError(f"--data {self.data}: {self.kept[row].name} has changed since it was checked "
                                f"({error}); put it back, or run again") from error
        with ThreadPoolExecutor() as pool:  # PIL lets go of the GIL while it decodes and resizes
            return imaging.tensor(pool.map(read, rows))


def open_dataset(data, prompts, seed, skip_bad=False, image_column="", caption_column="", checked=None,
                 caption="", min_size=0):
    """--data / --prompts to a dataset: captions (captions[0] is ""), caption_indices(numbers),
    skipped, size (None if endless), and unless images is None: rows(numbers), images(numbers,
    size), decode(rows, size); row_captions if size is not None."""
    if bool(data) == bool(prompts):
        raise UserError(f"give either --data (images with captions, or {' or '.join(drawn.SOURCES)}) or "
                        "--prompts (a text file)")
    if (caption or min_size) and (prompts or data in drawn.SOURCES):
        source = f"--prompts {prompts}" if prompts else f"--data {data}"
        raise UserError(f"--caption / --min-size: {source} has no image files; leave them out")
    if prompts:
        return Prompts(prompts, seed, caption_column)
    if data in drawn.SOURCES:
        if image_column or caption_column:
            raise UserError(f"--image-column / --caption-column: --data {data} has no columns; leave them "
                            "out")
        return drawn.Drawn(data, seed)
    rows, read = formats.find_rows(data, image_column, caption_column)
    return Images(data, formats.fill(rows, caption.strip()), read, seed, skip_bad, checked, min_size)
