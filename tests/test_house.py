"""The house: what may import what, measured from the code (imports inside functions included), and how large things are."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
         for folder in (".", "*") for file in ROOT.glob(f"{folder}/*.py") if file.parent.name not in ("tests", ".venv", "runs")}
CORE = ("reflow", "losses", "teacher", "pairs", "sampler", "train", "eval")


def imports(module):
    """The project's modules that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            while name and name not in FILES:
                name = name.rpartition(".")[0]
            found |= {name} - {"", module}
    return found


ARROWS = {module: imports(module) for module in FILES}


def reach(module, seen=()):
    """Everything that importing a module brings."""
    for target in ARROWS[module] - set(seen):
        seen = reach(target, (*seen, target))
    return seen


def test_the_linter_finds_nothing():
    pytest.importorskip("ruff", reason="pip install ruff")
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_circle_of_imports():
    assert not [module for module in FILES if module in reach(module)]


@pytest.mark.parametrize("module, allowed", [
    ("losses", set()), ("reflow", {"losses"}), ("runtime.cli", set()), ("teacher", {"runtime.cli"}),
    ("solvers", {"reflow", "teacher", "runtime.cli", "losses"}),
    ("runtime.store", {"runtime.cli"}), ("runtime.processes", {"runtime.cli"}), ("runtime.seeds", set()),
    ("models.stable_diffusion", {"models.original", "models.latents", "models.configs", "teacher", "runtime.cli"}),
    ("models.pixel", {"models.configs", "teacher", "runtime.cli"}),
    ("models.sd3", {"models.original", "models.latents", "models.text", "models.configs", "teacher", "runtime.cli"}),
    ("models.flux", {"models.original", "models.latents", "models.text", "models.configs", "teacher", "runtime.cli"}),
    ("models.zimage", {"models.original", "models.latents", "models.text", "models.configs", "teacher", "runtime.cli"}),
    ("models.dit", {"models.latents", "models.configs", "teacher", "runtime.cli"}),
    ("models.pixart", {"models.latents", "models.text", "models.configs", "teacher", "runtime.cli"}),
    ("models.sana", {"models.latents", "models.text", "models.configs", "teacher", "runtime.cli"})])
def test_the_lower_floors_import_nothing_above_them(module, allowed):
    assert set(reach(module)) <= allowed


def test_nothing_below_imports_the_commands_the_studies_or_the_tools():
    for module in FILES:
        folder = module.split(".")[0]
        above = {"studies", "tools"} if folder == "eval" else {"eval", "studies", "tools"} if folder in ("train", "export", "sampler", "app") else {
            "train", "eval", "export", "studies", "tools"} if folder in (*CORE, "models", "data", "runtime", "evaluation") else set()
        if module in ("evaluation.measuring", "models.student", "runtime.options"):
            above -= {"export"}
        assert not {target for target in ARROWS[module] if target.split(".")[0] in above}, module


def test_the_root_shows_the_method_and_no_file_is_a_drawer():
    assert len([module for module, file in FILES.items() if file.parent == ROOT]) <= 10
    assert not [module for module in FILES if set(module.split(".")) & {"utils", "common", "helpers", "misc"}]


def test_a_docstring_begins_each_command_on_its_own_line():
    """--help shows them as they stand."""
    for module, file in FILES.items():
        for line in (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines():
            command = re.search(r"^    .*?((OMP_NUM_THREADS=1 )?(python|torchrun) (-|\w+\.py))", line)
            assert not command or command.start(1) == 4, (module, line)


def test_what_a_reader_reads_is_short():
    for module in CORE:
        assert len(FILES[module].read_text().splitlines()) <= 360, module
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 150, (module, node.name)


def test_network_families_are_told_apart_in_models_alone():
    for module, file in FILES.items():
        if not module.startswith("models") and module not in ("tools.build", "tools.sd3"):
            names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
            assert not names & {"unet", "transformer", "in_pixels"}, module
