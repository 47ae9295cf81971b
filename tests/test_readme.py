"""Every command of the README runs, in order, in one empty folder, with budgets shrunk; every number in it is the file's."""
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, torchrun

import eval as evaluation

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
SMALL = {"train.py": "--steps 8 --batch 8 --trajectories 8 --solver-steps 8 --log-steps 1 --checkpoint-steps 4",
         "data.py": "--trajectories 2 --solver-steps 8", "bench.py": "--parts training",
         "eval.py": "--n 640 --real 640 --steps 1 --ddim-steps 1 --teacher-steps 2", "tiny.py": "--help"}
# what this machine does not have, and the number that a short run ends with
STAND_IN = {"--model sd15": "--model {sd15}", "--model sdxl": "--model {sdxl}", "checkpoint-003000": "checkpoint-000008"}


def test_every_command_runs(tmp_path, small_models):
    (tmp_path / "prompts.txt").write_text("fox\nred heart on blue\n")
    (tmp_path / "photos").mkdir()
    evaluation.sampler.to_pil(evaluation.real_images(1, "readme")[0])[0].save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a photo")
    assert len(COMMANDS) >= 25
    for line in COMMANDS:
        if line == ". .venv/bin/activate":
            continue
        for word, other in STAND_IN.items():
            line = line.replace(word, other.format(**small_models))
        words = shlex.split(line)
        if words[0] == "make":
            command, where = [*words, "-n"], ROOT
        else:
            script = next(word for word in words if word.endswith(".py"))
            words[words.index(script)] = str(ROOT / script)
            launcher, rest = ([sys.executable], words[1:]) if words[0] == "python" else (torchrun(2), words[2:])
            command, where = [*launcher, *rest, *SMALL.get(script, "").split()], tmp_path
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    for file in ("heart.png", "zoo.png", "compare.png", "compare-steps.png", "reflow-2d.png", "lighthouse.png", "runs/train/grid.png", "runs/merged/model_index.json",
                 "runs/sdxl/student-1/pytorch_lora_weights.safetensors", "runs/photos-now/reflow.json"):
        assert (tmp_path / file).stat().st_size > 500, file


def test_tables_are_the_files(tmp_path):
    """The README's tables are what eval.py prints for the committed results."""
    for name in ("tiny", "demo"):
        assert evaluation.table(json.loads((ROOT / "results" / f"{name}.json").read_text())).strip() in README, name


def test_links_and_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    files = set(re.findall(r"`(\w+\.py)`", README))
    assert files == {file.name for file in ROOT.glob("*.py")}


@pytest.mark.parametrize("folder, limit", [("tiny-sd", 14), ("tiny-clip", 3), ("student-2", 13)])
def test_assets_are_small_fp16_and_attributed(folder, limit):
    files = [file for file in (ROOT / "assets" / folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < limit * 2 ** 20
    card = (ROOT / "assets" / folder / "README.md").read_text()
    assert "OpenMoji" in card and "CC BY-SA 4.0" in card
