"""Every command of the README runs, in order, each half in an empty folder, with budgets shrunk; every number in it is the file's."""
import json
import re
import shlex
import shutil
import subprocess
import tomllib

import numpy as np
import pytest
from conftest import ROOT, run_python, torchrun
from diffusers import DiffusionPipeline
from test_eval import parts  # noqa: F401  a fixture

import eval as evaluation
import reflow
import report
from config import UserError

README = (ROOT / "README.md").read_text()
EMBEDDED, OWN = ([line for block in re.findall(r"```bash\n(.*?)```", part, re.S) for line in block.splitlines()]
                 for part in README.split("## Your own Stable Diffusion"))
SMALL = {"train.py": "--steps 8 --batch 8 --trajectories 8 --solver-steps 8 --log-steps 1 --checkpoint-steps 4",
         "data.py": "--trajectories 2 --solver-steps 8", "bench.py": "--parts training",
         "eval.py": "--n 640 --real 640 --steps 1 --ddim-steps 1 --teacher-steps 2", "tiny.py": "--help",
         "eval.py --study": "--n 80 --real 80 --paths 2 --clip {parts}/tiny-clip",
         "eval.py --protocol": "--n 12 --real 14 --size 32 --steps 4 --ddim-steps 1 --teacher-steps 4 --paths 2 --batch 4 --clip {parts}/clip "
                               "--inception {parts}/inception.pt",
         "eval.py --protocol pixel": "--n 640 --real 640 --teacher-steps 2 --ddim-steps 1"}
# what this machine does not have, and the number that a short run ends with
STAND_IN = {"--model sd15": "--model {sd15}", "--model sdxl": "--model {sdxl}", "checkpoint-003000": "checkpoint-000008"}


# what the commands of either half leave
EMBEDDED_FILES = ("heart.png", "zoo.png", "compare.png", "compare-steps.png", "pixel.png", "reflow-2d.png", "runs/train/grid.png",
                  "runs/pixel/grid.png", "runs/coco/results.json", "results/report.html")
OWN_FILES = ("lighthouse.png", "runs/merged/model_index.json", "runs/sdxl/student-1/pytorch_lora_weights.safetensors",
             "runs/photos-now/reflow.json")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("commands, files", [(EMBEDDED, EMBEDDED_FILES), (OWN, OWN_FILES)], ids=["embedded", "own"])
def test_every_command_runs(tmp_path, small_models, parts, commands, files):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("fox\nred heart on blue\n")
    (tmp_path / "photos").mkdir()
    evaluation.sampler.to_pil(evaluation.real_images(1, "readme")[0])[0].save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a photo")
    shutil.copytree(tmp_path / "photos", tmp_path / "shards")
    shutil.copytree(parts / "coco", tmp_path / "coco")
    assert len(commands) >= 12
    for line in commands:
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
            launcher, rest = ((), words[1:]) if words[0] == "python" else ((*torchrun(2), "--"), words[2:])         # else --n is torchrun's
            less = next((value for key, value in reversed(SMALL.items()) if key.split()[0] == script and set(key.split()[1:]) <= set(words)), "")
            command, where = [*launcher, *rest, *less.format(parts=parts).split()], tmp_path
        outside = command[0] == "make" or launcher
        done = subprocess.run(command, cwd=where, capture_output=True, text=True) if outside else run_python(command, where)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    for file in files:
        assert (tmp_path / file).stat().st_size > 500, file


CARDS = {"README.md": README, **{f"assets/{file.parent.name}": file.read_text() for file in (ROOT / "assets").glob("*/README.md")}}


@pytest.mark.parametrize("name", CARDS)
def test_every_line_of_a_card_that_samples_runs_in_the_default_dtype(tmp_path, name):
    """What stands in backticks, as it stands there: DiffusionPipeline on what ships, python sampler.py."""
    lines = [" ".join(line.split()) for line in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", CARDS[name], flags=re.S))]
    for line in lines:
        if line.startswith("python sampler.py --"):
            done = run_python([str(ROOT / "sampler.py"), *shlex.split(line)[2:]], tmp_path)
            assert done.returncode == 0 and (tmp_path / "sample.png").stat().st_size > 500, (line, done.stderr)
        if line.startswith("DiffusionPipeline"):
            line = re.sub(r'"runs/.*?"', "folder", line)
            assert "guidance_scale=1)" in line             # stock 7.5 is far off
            made = eval(line, dict(DiffusionPipeline=DiffusionPipeline, prompt="red heart on blue",
                                   folder=ROOT / (name if name.startswith("assets") else "assets/student-2")))
            assert made.images[0].size == (32, 32) and np.asarray(made.images[0]).std() > 20
    assert any(line.startswith(("DiffusionPipeline", "python sampler.py --")) for line in lines) or name == "assets/tiny-clip"


def test_the_lower_bounds_are_the_versions_that_make_test_lowest_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(line.split(">=") for line in project["dependencies"] + project["optional-dependencies"]["test"])
    pins = dict(line.split("==") for line in (ROOT / "requirements-lowest.txt").read_text().splitlines() if not line.startswith("#"))
    assert pins == bounds


def test_tables_are_the_files(tmp_path):
    """The README's tables and the studies' pages are what `python report.py --readme README.md` writes from the committed results."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    emptied = re.sub(r"(<!-- (\w+) -->\n).*?(\n<!-- /\2 -->)", r"\1\3", README, flags=re.S)
    assert len(emptied) < 0.8 * len(README)
    (tmp_path / "README.md").write_text(emptied)
    for file in (tmp_path / "results" / "studies").glob("*.md"):
        file.write_text("old")
    report.main(report.Config(str(tmp_path / "results" / "studies"), str(tmp_path / "results" / "tiny.json"), str(tmp_path / "report.html"),
                              str(tmp_path / "README.md")))
    assert (tmp_path / "README.md").read_text() == README
    for file in (tmp_path / "results" / "studies").glob("*.md"):
        assert file.read_text() == (ROOT / "results" / "studies" / file.name).read_text(), file.name
    (tmp_path / "README.md").write_text(emptied.replace("<!-- /tiny -->", ""))
    with pytest.raises(UserError, match="has no marks <!-- tiny --> and <!-- /tiny -->"):
        report.write_readme(tmp_path / "README.md", dict(tiny="x"))


def test_one_name_one_meaning():
    """What a table, a picture or a command calls proreflow is the recipe of that name; our default is called default."""
    for name in ("tiny", "demo"):
        result = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert {row["method"] for row in result["rows"] if row["windows"]} <= set(reflow.RECIPES), name
        for row, command in ((row, command) for row in result["rows"] for command in result["protocol"]["students"]):
            assert ("--recipe proreflow" in command) or row["method"] != "proreflow"
    assert "--name" not in (ROOT / "Makefile").read_text()


def test_the_pixel_models_table_is_the_files():
    few, nine = (json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"] for name in ("pixel", "pixel-9"))
    fd = {(row["method"], row["nfe"], row["solver"]): f"{row['fd']:.2f}" for row in few + nine}
    for label, method in (("teacher", "ddim"), ("simple-reflow, 1,000 updates", "simple-reflow")):
        by = {steps: fd[method, steps, "ddim"] for steps in (1, 2, 4)}
        best = fd["dpm2:0.5/sigmoid:10" if label == "teacher" else method, 9, "dpm2:0.5/sigmoid:10"]
        last = fd["teacher", 32, "ddim"] if label == "teacher" else "-"
        assert f"| {label} | {by[1]} | {by[2]} | {by[4]} | {best} | {last} |" in README, label


def test_links_and_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    files = set(re.findall(r"`(\w+\.py)`", README))
    assert files == {file.name for file in ROOT.glob("*.py")}


@pytest.mark.parametrize("folder, limit", [("tiny-sd", 14), ("tiny-clip", 3), ("student-2", 13), ("tiny-pixel", 5)])
def test_assets_are_small_fp16_and_attributed(folder, limit):
    files = [file for file in (ROOT / "assets" / folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < limit * 2 ** 20
    card = (ROOT / "assets" / folder / "README.md").read_text()
    assert "OpenMoji" in card and "CC BY-SA 4.0" in card
