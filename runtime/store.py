"""A store of rows on disk: resumable, shared, whole after a kill or a power cut."""
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from runtime.cli import UserError

STALE = 3600            # seconds without a change after which a temporary file has no writer any more
WINDOWS = os.name == "nt"
UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(UMASK)


def digest(*values):
    """16 hexadecimal digits that change with any of the values."""
    state = hashlib.sha256()
    for value in values:
        state.update(repr(value).encode())
    return state.hexdigest()[:16]


def parse_object(text):
    """A JSON object as a dict; {} for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_folder(option, folder):
    """Make a folder that may be there already.  Raises UserError naming the option it is from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror}); choose another "
                        "folder") from error


def check_writable(folder):
    """Raises UserError unless files can be made in a folder: before the work whose result they are."""
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: nothing may be written there; permit it, or choose another folder")


def read_log(file):
    """(text, entry) of every whole line of a log: a power cut truncates the last one, or leaves
    zeros in its place."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append((line + "\n", json.loads(line)))
    return found


# ---- the store ---------------------------------------------------------------------------------------------


class Rows:
    """The first `count` rows of a cache, read from its memory-mapped shards as they are
    indexed."""

    def __init__(self, files, shard, count):
        self.shard, self.count = shard, count
        self.files = [safe_open(file, "pt") for file in files]
        self.slices = [{name: file.get_slice(name) for name in file.keys()} for file in self.files]

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        """indices: list or 1-D tensor of n ints, in any order.  Returns: dict of tensors (n, ...).
        Raises IndexError."""
        indices = [int(i) for i in indices]
        outside = [i for i in indices if not 0 <= i < self.count]
        if outside:
            raise IndexError(f"row {outside[0]} of {self.count}")
        return {name: torch.stack([self.slices[i // self.shard][name][i % self.shard] for i in indices])
                for name in self.slices[0]}


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


def cached(folder, count, settings, solve, shard=256, rank=0, world=1, barrier=lambda: None, desc="",
           batch=None):
    """The first `count` rows of a cache, made shard by shard where missing: resumable after a kill
    at any moment, and shared by every run with the same settings. settings: dict that
    says how rows are made; a folder made otherwise is refused. solve(numbers) -> dict of tensors
    (len(numbers), ...), the rows of these numbers, at most `batch` of them at once (default: a
    shard); the bar moves after each.  Returns: Rows.
    Raises UserError, also on rows that are not finite: they would stop the training, long after
    they were made."""
    folder = Path(folder)
    manifest = folder / "manifest.json"
    settings = json.loads(json.dumps(settings))  # as the file gives it back: tuples become lists
    if rank == 0:
        make_folder("--cache", folder)
        if not manifest.exists():  # another run may write its own now: the first one stays
            text = json.dumps(settings, indent=1)
            write_atomically(manifest, lambda part: part.write_text(text), replace=False)
    barrier()
    found = parse_object(manifest.read_text())
    if not found and settings:
        raise UserError(f"--cache {folder}: manifest.json is truncated; delete the folder")
    if found != settings:
        there, here = ({key: made.get(key, "absent") for key in (*found, *settings)}
                       for made in (found, settings))
        different = {key: (there[key], here[key]) for key in there if there[key] != here[key]}
        raise UserError(f"--cache {folder}: made with other settings (there, here): {different}; choose "
                        "another folder or delete it")
    parts = [(folder / f"{i:05d}.safetensors", range(start, min(start + shard, count)))
             for i, start in enumerate(range(0, count, shard))]
    missing = [part for part in parts[rank::world] if rows_in(part[0], part[1].start) < len(part[1])]
    with tqdm(total=sum(len(numbers) for _, numbers in missing), desc=desc,
              disable=rank > 0 or not missing) as bar:
        for file, numbers in missing:
            solved, size = [], batch or shard
            for some in (numbers[first:first + size] for first in range(0, len(numbers), size)):
                solved.append(solve(some))
                bar.update(len(some))
            made = {name: torch.cat([rows[name] for rows in solved]).contiguous() for name in solved[0]}
            for name, value in made.items():
                if not value.isfinite().all():
                    raise UserError(f"--cache {folder}: {name} of rows {numbers.start} to {numbers.stop - 1} "
                                    "is not finite: the model that makes them has diverged or overflows; "
                                    "they were not kept")
            # another run may have made it meanwhile, and longer
            if rows_in(file, numbers.start) < len(numbers):
                write_atomically(file, lambda part: save_file(made, part, {"first": str(numbers.start)}))
    barrier()
    return Rows([file for file, _ in parts], shard, count)


def rows_in(file, first):
    """How many rows a shard holds; 0 if it is not there, is truncated, or does not begin with row
    `first` (made with another shard size)."""
    try:
        with safe_open(file, "pt") as part:
            held = min(part.get_slice(name).get_shape()[0] for name in part.keys())
            return held if (part.metadata() or {}).get("first") == str(first) else 0
    except PermissionError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); let its owner permit it, or choose "
                        "another --cache") from error
    except (OSError, SafetensorError, ValueError):
        return 0


def write_atomically(target, write, replace=True):
    """write(part) into a file or folder beside target, bring it onto the disk, then rename: target
    is whole or absent, after a kill and after a power cut; of several processes that write it at
    once each has a part of its own. replace=False: a target (a file) that is there stays.
    Raises UserError on a full disk and where nothing may be written; the old target is still there then."""
    remove_stale(target.parent)
    name = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
    part, old = target.with_name(f"{name}.part"), target.with_name(f"{name}-old.part")
    try:
        write(part)
        if target.is_dir() and not part.is_dir():
            raise UserError(f"{target}: is a folder; name a file to write")
        share(part)
        sync(part)
        if not replace:
            link(part, target)
        else:
            if target.is_dir():  # rename() does not replace a folder that holds something
                os.rename(target, old)
            os.replace(part, target)
        sync(target.parent, below=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        check_writable(target.parent)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(target.parent).free < 2 ** 20:
            raise UserError(f"{target}: no space left on the device; free some and run the same command "
                            "again") from error
        raise
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        remove(part)
        remove(old)


def share(path):
    """Give what was written the permissions that the user gives to new files: safetensors makes its own
    readable for their owner alone."""
    for entry in [*(path.rglob("*") if path.is_dir() else ()), path]:
        if entry.is_file() and not entry.is_symlink():
            entry.chmod(0o666 & ~UMASK)


def link(part, target):
    """Give a finished file its name unless that exists: the one step that creates and never
    replaces."""
    try:
        os.link(part, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.replace(part, target)  # no hard links (exFAT, network drives): the last stays


def sync(path, below=True):
    """Return once a file, or a folder with everything below it, is on the disk itself."""
    for entry in [*(path.rglob("*") if below and path.is_dir() else ()), path]:
        if WINDOWS and entry.is_dir():   # which opens no folder, and syncs only what it may write
            continue
        descriptor = os.open(entry, os.O_RDWR if WINDOWS else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # there are network drives that cannot sync a folder
            if not (entry.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
                raise
        finally:
            os.close(descriptor)


def remove_stale(folder):
    """Delete what killed processes left of write_atomically in a folder. Whether a writer lives
    cannot be seen from another machine or container: one that has not written for STALE seconds
    does not."""
    for part in folder.glob(".*.part"):
        if re.search(r"\.\d+-[0-9a-f]{8}(-old)?\.part$", part.name):
            # its writer was faster, or another process that cleans
            with contextlib.suppress(FileNotFoundError):
                if time.time() - max(entry.stat().st_mtime for entry in [part, *part.rglob("*")]) > STALE:
                    remove(part)


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
