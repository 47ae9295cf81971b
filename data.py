"""Images with captions, prompts, and the cache of teacher trajectories. Knows nothing of the method.

A dataset is addressed by sample numbers: sample k of a run is the same on one process or eight, before or after a
resume, because everything random about it comes from a generator seeded with (seed, k).
"""
import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import sprites
from config import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def generator(seed, *numbers):
    """A CPU generator for one purpose: every different (seed, numbers...) gives an unrelated stream."""
    digest = hashlib.sha256(repr((seed, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class Sprites:
    """The embedded pictures (sprites.py), endless. seed: which endless sequence; held-out pairs are never drawn."""

    def __init__(self, seed):
        self.seed = seed
        table = sprites.pairs(None)
        every = [sprites.describe(torch.cat([table, torch.full((len(table), 1), level)], 1))[0] for level in range(len(sprites.LEVELS))]
        self.captions = list(dict.fromkeys(["", *(caption for level in every for caption in level)]))
        self.index = {caption: i for i, caption in enumerate(self.captions)}

    def _plans(self, numbers):
        return torch.cat([sprites.plan(1, generator(self.seed, "sprite", k), held_out=False) for k in numbers])

    def caption_indices(self, numbers):
        """Which of self.captions describes each sample.  Returns: list of int."""
        return [self.index[caption] for caption in sprites.describe(self._plans(numbers))[0]]

    def images(self, numbers, size):
        """float (len(numbers), 3, size, size) in [-1, 1]."""
        images = sprites.render(self._plans(numbers))
        return images if size == sprites.SIZE else torch.nn.functional.interpolate(images, size=size, mode="bicubic").clamp(-1, 1)


class Folder:
    """A folder of images, each with its caption in a .txt of the same name. Sample numbers go through it in a new random
    order each time round. Raises UserError at once, naming the file, if anything in it cannot be used."""

    def __init__(self, folder, seed):
        self.seed, self.folder = seed, Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--data {folder}: no such folder; give a folder of images with same-name .txt captions, or 'sprites'")
        files = sorted(file for file in self.folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        self.files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise UserError(f"--data {folder}: no image in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
        stray = set(files) - set(self.files) - {file.with_suffix(".txt") for file in self.files}
        if stray:
            raise UserError(f"--data {folder}: {min(stray).name} is neither an image nor the caption of one; move it away")
        texts = []
        for file in self.files:
            try:
                with Image.open(file) as image:
                    image.verify()
                texts.append(file.with_suffix(".txt").read_text().strip())
            except FileNotFoundError as error:
                raise UserError(f"--data {folder}: {file.name} has no caption; write one into {file.stem}.txt") from error
            except (UnidentifiedImageError, OSError, SyntaxError, UnicodeDecodeError) as error:
                raise UserError(f"--data {folder}: {file.name} or its caption cannot be read ({error}); replace or remove it") from error
        self.captions = list(dict.fromkeys(["", *texts]))
        index = {caption: i for i, caption in enumerate(self.captions)}
        self.caption_of = [index[text] for text in texts]
        self.order = functools.lru_cache(2)(
            lambda epoch: torch.randperm(len(self.files), generator=generator(seed, "epoch", epoch)).tolist())

    def _row(self, number):
        epoch, position = divmod(number, len(self.files))
        return self.order(epoch)[position]

    def caption_indices(self, numbers):
        return [self.caption_of[self._row(k)] for k in numbers]

    def images(self, numbers, size):
        """float (len(numbers), 3, size, size) in [-1, 1]: shorter side resized to size (Lanczos), centre crop."""
        rows = []
        for k in numbers:
            with Image.open(self.files[self._row(k)]) as image:
                image = image.convert("RGB")
            scale = size / min(image.size)
            image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.LANCZOS)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            pixels = np.array(image.crop((left, top, left + size, top + size)))
            rows.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
        return torch.stack(rows)


class Prompts:
    """A text file, one prompt per line; no images: pairs come from the teacher's own trajectories."""
    images = None

    def __init__(self, file, seed):
        self.seed, path = seed, Path(file)
        try:
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {file}: cannot be read ({error}); give a text file, one prompt per line") from error
        if not lines:
            raise UserError(f"--prompts {file}: no prompt in it; write one per line")
        self.captions = list(dict.fromkeys(["", *lines]))
        self.rows = [self.captions.index(line) for line in lines]

    def caption_indices(self, numbers):
        return [self.rows[torch.randint(len(self.rows), (1,), generator=generator(self.seed, "prompt", k)).item()] for k in numbers]


def open_dataset(data, prompts, seed):
    """--data / --prompts to a dataset with captions, caption_indices(numbers), and images(numbers, size) if it has any."""
    if bool(data) == bool(prompts):
        raise UserError("give either --data (a folder of images with .txt captions, or 'sprites') or --prompts (a text file)")
    return Prompts(prompts, seed) if prompts else Sprites(seed) if data == "sprites" else Folder(data, seed)


# ---- cached trajectories -------------------------------------------------------------------------------------------


def trajectories(folder, count, settings, solve, shard=256, rank=0, world=1, barrier=lambda: None):
    """The first `count` trajectories of a cache, made shard by shard where missing: resumable, and shared by every run
    that asks with the same settings. settings: dict that says how they were made; a folder made otherwise is refused.
    solve(numbers) -> {"z": (len(numbers), ...), ...} for these trajectory numbers.  Returns: dict of tensors (count, ...)."""
    folder = Path(folder)
    manifest = folder / "manifest.json"
    settings = json.loads(json.dumps(settings))
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            write_atomically(manifest, lambda part: part.write_text(json.dumps(settings, indent=1)))
    barrier()
    found = json.loads(manifest.read_text())
    if found != settings:
        different = {key: (found.get(key), settings.get(key)) for key in {*found, *settings} if found.get(key) != settings.get(key)}
        raise UserError(f"--cache {folder}: made with other settings (there, here): {different}; choose another folder or delete it")
    numbers = [range(start, min(start + shard, count)) for start in range(0, count, shard)]
    files = [folder / f"{i:05d}.safetensors" for i in range(len(numbers))]
    mine = list(zip(files, numbers))[rank::world]
    missing = [(file, part) for file, part in mine if not file.exists() or len(load_file(file)["z"]) < len(part)]
    with tqdm(total=sum(len(part) for _, part in missing), desc="teacher trajectories", disable=rank > 0 or not missing) as bar:
        for file, part in missing:
            made = {key: value.contiguous() for key, value in solve(part).items()}
            write_atomically(file, lambda target: save_file(made, target))
            bar.update(len(part))
    barrier()
    parts = [load_file(file) for file in files]
    return {key: torch.cat([part[key] for part in parts])[:count] for key in parts[0]}


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
