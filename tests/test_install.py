"""Installed by pip: what comes along, what it may import, and that it samples outside the repository."""
import ast
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from test_house import ARROWS, FILES

from runtime import options
from runtime.cli import UserError, extra

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
INSTALLED = [module for module in FILES if module.split(".")[0] in (*SETUP["py-modules"], *SETUP["packages"])]
REBUILD = {"emoji"}                                          # by which the sheet of sprites is drawn, from the repository
CORE = REBUILD | {line.split(">=")[0] for line in PROJECT["project"]["dependencies"]} | {"PIL", "huggingface_hub", "yaml"}


def test_everything_but_the_studies_the_tools_and_the_tests_is_installed():
    left_out = {module.split(".")[0] for module in FILES} - {module.split(".")[0] for module in INSTALLED}
    assert left_out <= {"studies", "tools", "tests"}
    assert not {(module, target) for module in INSTALLED for target in ARROWS[module] if target not in INSTALLED}
    assert {entry.split(":")[1] for entry in PROJECT["project"]["scripts"].values()} == {"run"}


def test_what_is_installed_imports_the_core_alone():
    """Extras are reached by cli.extra, which says what is missing."""
    for module in INSTALLED:
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (name.split(".")[0] for name in names):
                own = {each.split(".")[0] for each in FILES}
                assert name in sys.stdlib_module_names or name in own or name in CORE, (module, name)


def test_an_absent_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora 4: needs peft, which is not installed; in the folder of this project: pip install '.\[lora\]'"):
        extra("--lora 4", "peft", "lora")
    with pytest.raises(UserError, match="--lora 4: needs peft"):          # before a run begins
        options.resolve_recipe(options.Config(lora=4))


@pytest.mark.slow
def test_installed_outside_the_repository_it_samples(tmp_path):
    """In a virtual environment of its own, into which this one's libraries are linked."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True).stdout.strip()
    libraries = subprocess.run([sys.executable, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True).stdout
    (tmp_path / site / "libraries.pth").write_text(libraries)
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "source"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", tmp_path / "source"], check=True)
    done = subprocess.run([tmp_path / "venv" / "bin" / "reflow-sample", "--prompt", "red heart on blue", "--out", "heart.png"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "heart.png").stat().st_size > 500, done.stderr
