"""The pictures of docs/index.html: what a teacher and its students believe at each step of 32, 16, 8,
4, 2 and 1, as one sprite sheet.

    python -m tools.page                                     # the embedded model and the student in assets/
    python -m tools.page --model tiny --students runs/demo/student-4 runs/demo/student-1

Writes docs/page/sprites.webp (a row per prompt and model, a column per step) and docs/page/sprites.js
(what is where). The last step's belief is the picture.
"""
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

import models
import sampler
from models import load, saved
from runtime import cli
from runtime.cli import UserError

PROMPTS = ("red heart on blue", "strawberry on pink", "pizza on gray", "penguin on orange", "fox on green",
           "on purple")
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
def beliefs(pipeline, model, windows, prompts, seeds):
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
    infos = [saved.read_info("--students", folder) for folder in students]
    seeds = [c.seed + i for i in range(len(c.prompts))]
    sheets, described = [], [dict(name="teacher", windows=1)]
    ordered = sorted(zip(map(str, students), infos), key=lambda each: -each[1]["windows"])
    for name, info in [(c.model, {}), *ordered]:
        pipeline, model, _ = saved.open_model(name)
        sheets.append(beliefs(pipeline, model, info.get("windows", 1), c.prompts, seeds))
        described += [dict(name="student", windows=info["windows"])] if info else []
    pictures = torch.stack(sheets, 1)                                   # (prompts, models, columns, 3, H, W)
    height, width = pictures.shape[-2:]
    sheet = pictures.permute(0, 1, 4, 2, 5, 3).reshape(-1, pictures.shape[2] * width, 3)
    file = out / "sprites.webp"
    Image.fromarray(sheet.numpy()).save(file, quality=c.quality, method=6)
    if file.stat().st_size > LIMIT:
        raise UserError(f"{file}: {file.stat().st_size:,} bytes, more than {LIMIT:,}; give fewer --prompts "
                        "or less --quality")
    table = dict(model=Path(c.model).name, tile=width, columns=sum(STEPS), rows=len(sheet) // height,
                 steps=STEPS, credit=credits, models=described,
                 prompts=[dict(prompt=p, seed=s) for p, s in zip(c.prompts, seeds)])
    (out / "sprites.js").write_text("// Written by `python -m tools.page`: what is where in sprites.webp.\n"
                                    f"const SPRITES = {json.dumps(table, indent=1)};\n")
    print(f"{file}: {file.stat().st_size:,} bytes, {len(sheet) // height} rows of {sum(STEPS)} pictures")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
