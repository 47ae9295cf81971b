"""The notebooks run, a hundredth of them, and what they keep is what they print: names, shapes, pictures."""
import base64
import io
import json
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from PIL import Image

from runtime.cli import UserError
from tools import notebooks

# notebook -> what makes it short
SHORT = {
    "one_training_step": {"range(100)": "range(40)", "96": "16", "80": "8", " * 12": " * 2"},
    "your_own_model": {"import subprocess": "from conftest import run_python",
                       "subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)":
                           "run_python([f'{os.getcwd()}/{command[0]}', *map(str, command[1:])], os.getcwd())",
                       '"--trajectories", 96, "--updates", 80': '"--trajectories", 8, "--updates", 2', 'f"runs/notebook-': 'f"{folder}/'}}
# and what takes another model through the lines that are for a GPU
LARGE = {'"--trajectories", 2048, "--updates", 1000, "--batch", 16': '"--trajectories", 4, "--updates", 2, "--batch", 4', '"cuda" if large': '"cpu" if large'}


def run(file, short, folder, monkeypatch):
    """A notebook, run in its folder with these changes.  Returns: (the notebook with what it printed, the names it left)."""
    notebook = json.loads(file.read_text())
    source = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert all(key in source for key in short)
    monkeypatch.chdir(file.parent)
    monkeypatch.syspath_prepend(str(ROOT))

    def change(source):
        for key, value in short.items():
            source = source.replace(key, value.replace("{folder}", str(folder)))
        return source
    return notebook, notebooks.run(notebook, change)


def texts(notebook):
    return ["".join(part for output in cell.get("outputs", []) for part in output.get("text", [])) for cell in notebook["cells"]]


@pytest.fixture(params=["one_training_step", pytest.param("your_own_model", marks=pytest.mark.slow)])
def executed(request, tmp_path, monkeypatch):
    """(name, the notebook as committed, the same run here, the names it left)."""
    file = ROOT / "notebooks" / f"{request.param}.ipynb"
    return request.param, json.loads(file.read_text()), *run(file, SHORT[request.param], tmp_path, monkeypatch)


def test_it_runs_and_prints_what_it_keeps(executed):
    name, committed, notebook, left = executed
    for ours, theirs in zip(texts(notebook), texts(committed)):
        tensors = [re.findall(r"^(\w+) +\(\d+,([\d, ]*)\) +(\w+)$", text, re.M) for text in (ours, theirs)]
        assert tensors[0] == tensors[1]
    kinds = [[[output["output_type"] for output in cell.get("outputs", [])] for cell in each["cells"]] for each in (notebook, committed)]
    assert kinds[0] == kinds[1]
    pictures = [output["data"]["image/png"] for cell in committed["cells"] for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2 and all(Image.open(io.BytesIO(base64.b64decode(each))).size[0] > 100 for each in pictures)
    if name == "one_training_step":
        shown = {each for text in texts(committed) for each in re.findall(r"^(\w+) +\(", text, re.M)}
        made = {name for name, value in left.items() if torch.is_tensor(value)} - {"first", "last", "tensor", "after", "before"}
        assert {"z", "x_hat", "eps_hat", "paths", "z_start", "z_end", "x", "eps", "z_t", "u", "u_hat", "loss", "alpha_s", "noise", "data"} <= shown
        assert made <= shown | {"values", "untrained", "trained", "i", "draw"}, made - shown
        one, many = (left["endpoint_error"](left[when]) for when in ("untrained", "trained"))
        assert many < one
    else:
        assert left["Path"](left["out"], "student-1", "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_your_own_model_runs_on_another_by_changing_one_line(family, random_sd, small_models, tmp_path, monkeypatch):
    model = dict(sd=random_sd, sdxl=small_models["sdxl"])[family]
    changes = SHORT["your_own_model"] | LARGE | {'MODEL = "tiny"': f'MODEL = "{model}"'}
    notebook, left = run(ROOT / "notebooks" / "your_own_model.ipynb", changes, tmp_path, monkeypatch)
    assert left["large"] and "lighthouse on a hill" in "".join(texts(notebook))
    assert "pytorch_lora_weights.safetensors" in "".join(texts(notebook))


@pytest.mark.parametrize("name", SHORT)
def test_on_colab_the_first_cell_finds_the_repository_and_installs_it(name, tmp_path, monkeypatch):
    """What Colab is not: it cannot be run here. Its folder is another one, its module a stand-in, and pip is only asked."""
    asked = []
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "reflow-main").symlink_to(ROOT)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = {}
    notebooks.run_cell(first.replace("/content", f"{tmp_path}/content"), names)
    assert names["os"].getcwd() == sys.path[0] == str(ROOT)
    assert asked == [[sys.executable, "-m", "pip", "install", "--quiet", str(ROOT)]]


def test_what_is_kept_is_whole_and_small():
    for name in SHORT:
        file = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = json.loads(file.read_text())
        counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert file.stat().st_size < 250_000 and counts == list(range(1, len(counts) + 1)), name
        assert str(ROOT) not in file.read_text() and "/root" not in file.read_text()
    said = "".join(texts(json.loads((ROOT / "notebooks" / "one_training_step.ipynb").read_text())))
    for pattern in (r"loss (\d\.\d+), after one update (\d\.\d+)", r"error of one step: (\d\.\d+) before, (\d\.\d+) after"):
        before, after = map(float, re.search(pattern, said).groups())
        assert after < before


def test_a_cell_shows_its_prints_and_its_last_line(tmp_path):
    names = {}
    assert notebooks.run_cell("print('a')\nx = 2", names) == [dict(output_type="stream", name="stdout", text=["a\n"])]
    shown, = notebooks.run_cell("x + 1", names)
    assert shown["data"] == {"text/plain": ["3"]} and notebooks.run_cell("None", names) == []
    with pytest.raises(UserError, match="--files .*none.ipynb"):
        notebooks.main(notebooks.Config([str(tmp_path / "none.ipynb")]))
