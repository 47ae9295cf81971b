"""The notebooks run, a hundredth of them, and what they keep is what they print: names, shapes, pictures."""
import base64
import io
import json
import re

import pytest
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


def texts(notebook):
    return ["".join(part for output in cell.get("outputs", []) for part in output.get("text", [])) for cell in notebook["cells"]]


@pytest.fixture(params=["one_training_step", pytest.param("your_own_model", marks=pytest.mark.slow)])
def executed(request, tmp_path, monkeypatch):
    """(name, the notebook as committed, the same run here, the names it left)."""
    file = ROOT / "notebooks" / f"{request.param}.ipynb"
    committed, notebook = json.loads(file.read_text()), json.loads(file.read_text())
    short = {key: value.replace("{folder}", str(tmp_path)) for key, value in SHORT[request.param].items()}
    source = "".join("".join(cell["source"]) for cell in committed["cells"])
    assert all(key in source for key in short)
    monkeypatch.chdir(file.parent)
    monkeypatch.syspath_prepend(str(ROOT))

    def change(source):
        for key, value in short.items():
            source = source.replace(key, value)
        return source
    return request.param, committed, notebook, notebooks.run(notebook, change)


def test_it_runs_and_prints_what_it_keeps(executed):
    name, committed, notebook, left = executed
    for ours, theirs in zip(texts(notebook), texts(committed)):
        tensors = [re.findall(r"^(\w+) +(\([\d, ]*\)) +(\w+)$", text, re.M) for text in (ours, theirs)]
        assert tensors[0] == tensors[1]
    kinds = [[[output["output_type"] for output in cell.get("outputs", [])] for cell in each["cells"]] for each in (notebook, committed)]
    assert kinds[0] == kinds[1]
    pictures = [output["data"]["image/png"] for cell in committed["cells"] for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2 and all(Image.open(io.BytesIO(base64.b64decode(each))).size[0] > 100 for each in pictures)
    if name == "one_training_step":
        shown = {each for text in texts(committed) for each in re.findall(r"^(\w+) +\(", text, re.M)}
        assert {"z", "t", "x_hat", "eps_hat", "paths", "z_start", "z_end", "x", "eps", "z_t", "u", "u_hat", "loss"} <= shown
        one, many = (left["endpoint_error"](left[when]) for when in ("untrained", "trained"))
        assert many < one
    else:
        assert left["Path"](left["out"], "student-1", "pytorch_lora_weights.safetensors").is_file()


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
