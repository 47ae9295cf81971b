"""The pictures of docs/index.html: what a teacher and its students predict at each step of 32, 16, 8,
4, 2 and 1, as one sprite sheet.

    python -m tools.page                # the embedded model and its students in assets/
    make demo                           # trains students of 8, 4, 2 and 1 windows: eight minutes
    python -m tools.page --students runs/demo/student-4 runs/demo/student-2 runs/demo/student-1

Writes docs/page/sprites.webp (a row per prompt and model, a column per step) and docs/page/sprites.js
(what is where). The last step's prediction is the picture.
"""
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

import eval as evaluation
import models
import sampler
from models import load, saved
from runtime import cli
from runtime.cli import UserError

PROMPTS = (*evaluation.GRID_PROMPTS[:5], "heart")         # the last one is vague
STEPS = (32, 16, 8, 4, 2, 1)
LIMIT = 3_500_000               # bytes of the sheet: the whole page stays below 4 MB


@dataclass
class Config:
    model: str = "tiny"         # the teacher: preset or folder
    students: list[str] = field(default_factory=list)  # folders of its students; default: those in assets/
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))   # one row of the page each
    seed: int = 0               # of the first prompt's noise; prompt i has seed + i
    quality: int = 92           # of the WebP, 1 to 100
    out: str = "docs/page"      # folder


@torch.no_grad()
def predictions(pipeline, model, windows, prompts, seeds):
    """What a model predicts as the picture at each step. Steps that its windows do not divide have no
    pictures.  Returns: uint8 (prompts, sum(STEPS), 3, H, W)."""
    columns = []
    for steps in STEPS:
        if steps % windows:
            columns += [None] * steps
            continue
        seen = []
        sampler.generate(pipeline, model, prompts, seeds, sampler.time_grid(steps, windows),
                         callback=lambda state, seen=seen: seen.append(state["x_hat"].float().cpu()))
        columns += [models.decode(pipeline, x_hat) for x_hat in seen]
    shape = next(each for each in columns if each is not None)
    pictures = torch.stack([torch.full_like(shape, -1) if each is None else each for each in columns], 1)
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte()


def credit(model):
    """Whose pictures the model learned from, and the license: the paragraph under "## Data and license" of
    its card.  Raises UserError."""
    card = Path(load.PRESETS.get(model, (model, ""))[0]) / "README.md"
    text = card.read_text() if card.is_file() else ""
    found = re.search(r"^## Data and license\n+(.+?)\n(?:\n|\Z)", text, re.M | re.S)
    if not found:
        raise UserError(f"--model {model}: {card} says nothing under '## Data and license'; write there "
                        "whose pictures it learned from, which the page must say")
    return " ".join(found.group(1).split())


def read_students(model, folders):
    """Raises UserError on a folder without a student of this teacher, and on two that the page could not
    tell apart.  Returns: [(folder, windows, what the page calls it)], the most windows first."""
    found = []
    for folder in folders:
        saved.read_info("--students", folder)
        info = saved.read_about(folder, "teacher", "method", "windows")
        if info["teacher"] != model:
            raise UserError(f"--students {folder}: a student of {info['teacher']}, not of --model {model}; "
                            "name students of one teacher")
        if all(steps % info["windows"] for steps in STEPS):
            raise UserError(f"--students {folder}: {info['windows']} windows divide none of the page's steps "
                            f"({' '.join(map(str, STEPS))}); name another student")
        found.append((folder, info["windows"], info["method"]))
    found.sort(key=lambda each: -each[1])
    counts = [windows for _, windows, _ in found]
    named = [(folder, windows, f"{windows}-window {method if counts.count(windows) > 1 else 'student'}")
             for folder, windows, method in found]
    for i, (folder, _, name) in enumerate(named):
        for other, _, same in named[:i]:
            if name == same:
                raise UserError(f"--students {other} {folder}: the page would call both {name!r}; leave one "
                                "out, or train it with another --name")
    return named


def main(c):
    cli.at_least(c, quality=1)
    out, credits = Path(c.out), credit(c.model)
    if not out.is_dir():
        raise UserError(f"--out {c.out}: no such folder; make it first")
    own = [folder.parent for folder in load.ASSETS.glob("student-*/reflow.json")
           if saved.read_about(folder.parent, "teacher")["teacher"] == c.model]
    students = [Path(folder) for folder in c.students] or own
    if not students:
        raise UserError(f"--students: none given, and {c.model} has none in assets/; train one, or name its "
                        "folder")
    rows = [(c.model, 1, "teacher"), *read_students(c.model, map(str, students))]
    seeds = [c.seed + i for i in range(len(c.prompts))]
    sheets = []
    for folder, windows, _ in rows:
        pipeline, model, _ = saved.open_model(folder)
        sheets.append(predictions(pipeline, model, windows, c.prompts, seeds))
    pictures = torch.stack(sheets, 1)                                   # (prompts, models, columns, 3, H, W)
    height, width = pictures.shape[-2:]
    sheet = pictures.permute(0, 1, 4, 2, 5, 3).reshape(-1, pictures.shape[2] * width, 3)
    file, whole = out / "sprites.webp", io.BytesIO()
    Image.fromarray(sheet.numpy()).save(whole, "WEBP", quality=c.quality, method=6)
    if whole.tell() > LIMIT:                                            # the old sheet stays
        raise UserError(f"{file}: {whole.tell():,} bytes, more than {LIMIT:,}; give fewer --prompts or less "
                        "--quality")
    file.write_bytes(whole.getvalue())
    table = dict(model=Path(c.model).name, tile=width, columns=sum(STEPS), rows=len(sheet) // height,
                 steps=STEPS, credit=credits,
                 models=[dict(name=name, windows=windows) for _, windows, name in rows],
                 prompts=[dict(prompt=p, seed=s) for p, s in zip(c.prompts, seeds)])
    (out / "sprites.js").write_text("// Written by `python -m tools.page`: what is where in sprites.webp.\n"
                                    f"const SPRITES = {json.dumps(table, indent=1)};\n")
    print(f"{file}: {whole.tell():,} bytes, {len(sheet) // height} rows of {sum(STEPS)} pictures")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
