"""Every command of README.md and docs runs, in order, with budgets shrunk; every table is what the files say; every name and link is there."""
import json
import re
import shlex
import shutil
import subprocess
import tomllib

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python, run_two, slow
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from test_eval import parts  # noqa: F401  a fixture

import export
import models
import reflow
from data import imaging, scenes
from runtime.cli import UserError
from studies import results

README = (ROOT / "README.md").read_text()
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

# script or module, with the words that must be there as well -> what makes it short; the last that fits
# (bf16 takes a CPU ten times as long)
STUDY = "--model {random} --n 80 --real 80 --paths 2 --workers 1 --clip {parts}/tiny-clip --judge {parts}/judge"
SMALL = {"train.py": "--updates 8 --batch 8 --trajectories 8 --solver-steps 8 --log-steps 1 --checkpoint-steps 4 --precision fp32",
         "train.py --lora": "--updates 4 --batch 2 --trajectories 2 --solver-steps 8 --checkpoint-steps 2 --precision fp32 --grid-steps 0",
         "export.py push": "--dry-run",
         "train.py --cache-only": "--trajectories 2 --solver-steps 8", "tools.bench": "--parts training", "tools.cards": "--help",
         "studies": STUDY, "studies methods": f"{STUDY} --data scenes --scale 0.002 --seeds 1 --methods perflow-uniform",
         "eval.py": "--n 960 --real 960 --steps 1 --ddim-steps 1 --teacher-steps 2",
         "eval.py --protocol": "--n 12 --real 14 --size 32 --steps 4 --ddim-steps 1 --teacher-steps 4 --paths 2 --batch 4 --clip {parts}/clip "
                               "--inception {parts}/inception.pt",
         "eval.py --protocol pixel": "--n 960 --real 960 --teacher-steps 2 --ddim-steps 1"}
# what this machine does not have, and the number that a short run ends with
STAND_IN = {"--model sd15": "--model {sd15}", "--model sdxl": "--model {sdxl}", "checkpoint-003000": "checkpoint-000008"}

# pages whose commands run one after the other in one empty folder, and what they leave there
GROUPS = {
    ("README.md", "docs/use.md"): ("student-4.safetensors", "student-4-lora.safetensors", "student-4-bf16.safetensors", "heart.png", "zoo.png",
                                   "lighthouse.png", "runs/sdxl/student-1/pytorch_lora_weights.safetensors"),
    ("README.md", "docs/training.md"): ("compare.png", "compare-steps.png", "dpm2.png", "results/README.md", "runs/photos-now/reflow.json",
                                        "runs/merged/model_index.json"),
    ("docs/results.md", "docs/costs.md"): ("pixel.png", "reflow-2d.png", "runs/train/grid.png", "runs/pixel/grid.png",
                                           "runs/coco/results.json")}


def commands(text):
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


def shrunk(line, models, fakes):
    """A line of a page as (program, arguments) that run here in seconds. program: make, python or torchrun; the first arguments are the
    file, or -m and a module. models: small ones by name; fakes: folder of small CLIP, Inception, COCO."""
    for word, other in STAND_IN.items():
        line = line.replace(word, other.format(**models))
    program, *words = shlex.split(line)
    if program == "make":
        return program, [*words, "-n"]
    if program == "torchrun":
        words = words[1:]
    name = words[1] if words[0] == "-m" else words[0]
    options = [value for key, value in SMALL.items() if key.split()[0] == name and set(key.split()[1:]) <= set(words)]
    words += [word for word in options[-1].format(parts=fakes, **models).split() if word != "--dry-run" or word not in words] if options else []
    return program, words if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("pages", [pages if "docs/use.md" in pages else slow(pages) for pages in GROUPS],
                         ids=lambda pages: "-".join(re.findall(r"\w+(?=\.md)", " ".join(pages))))
def test_every_command_runs(tmp_path, small_models, random_sd, parts, pages):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("fox\nred heart on blue\n")
    (tmp_path / "photos").mkdir()
    imaging.to_pil(scenes.render(scenes.plan(1, torch.Generator().manual_seed(0))))[0].save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a photo")
    shutil.copytree(tmp_path / "photos", tmp_path / "shards")
    shutil.copytree(parts / "coco", tmp_path / "coco")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for line in (line for page in pages for line in commands(PAGES[page]) if line != ". .venv/bin/activate"):
        program, words = shrunk(line, {**small_models, "random": random_sd}, parts)
        if program == "make":
            done = subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True)
        else:
            done = (run_python if program == "python" else run_two)(words, tmp_path)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    for file in GROUPS[pages]:
        assert (tmp_path / file).stat().st_size > 500, file


def test_the_demo_shows_pictures_first_then_trains_and_measures(tmp_path):
    """The lines of `make demo`, a hundredth of them."""
    small = {"sampler.py": "", "train.py": "--updates 8 --batch 8 --trajectories 8 --solver-steps 8 --grid-steps 2",
             "eval.py": "--n 960 --real 960 --steps 1 --ddim-steps 1 --teacher-steps 1 --paths 2"}
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    said = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout.replace("\\\n", " ")
    lines = [shlex.split(line) for line in said.splitlines() if re.search(r"\b(sampler|train|eval)\.py", line)]
    names = [next(word for word in words if word.endswith(".py")) for words in lines]
    assert names == list(small)
    for name, words in zip(names, lines):
        run = run_two if any(word.endswith("torchrun") for word in words) else run_python
        done = run([str(ROOT / name), *words[words.index(name) + 1:], *small[name].split()], tmp_path)
        assert done.returncode == 0, (name, done.stderr[-2000:])
        assert (tmp_path / "runs" / "demo" / "first.png").stat().st_size > 5000
    folder = tmp_path / "runs" / "demo"
    whole, left = Image.open(folder / "grids" / "000008.png"), Image.open(folder / "teacher.png")
    assert whole.height == left.height and whole.width > left.width + 100
    assert np.array_equal(np.asarray(whole.crop((0, 0, *left.size))), np.asarray(left))
    assert all((folder / name).exists() for name in ("results.md", "grid.png", *(f"student-{k}/{export.PICTURE}" for k in (8, 4, 2, 1))))


def test_every_page_with_commands_is_run():
    assert {page for page, text in PAGES.items() if commands(text)} == {page for pages in GROUPS for page in pages}


def test_the_python_of_the_readme_runs_and_does_what_it_says(tmp_path):
    """The minimal reflow, a tenth of it: one step comes nearer to the teacher's end."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 1 and {page for page, text in PAGES.items() if "```python" in text} == {"README.md", "docs/extending.md"}
    code = blocks[0]
    for full, less in (("* 80", "* 10"), ("320", "40"), ("256", "32"), ("range(100)", "range(12)")):
        assert full in code
        code = code.replace(full, less)
    (tmp_path / "minimal.py").write_text(code)
    done = run_python([str(tmp_path / "minimal.py")], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.findall(r"\d\.\d+", done.stdout))
    assert 0.6 < before < 1.2 and after < 0.95 * before


def test_the_examples_of_extending_run(tmp_path):
    """Each is a row added and what it must do, with asserts of its own."""
    text = PAGES["docs/extending.md"]
    sections = {part.split("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.S) for part in text.split("\n## ")}
    assert [name for name, blocks in sections.items() if not blocks] == ["Another embedded model"]
    assert all("assert" in "".join(blocks) for name, blocks in sections.items() if blocks and name != "# Extending")
    (tmp_path / "examples.py").write_text("\n".join("".join(blocks) for blocks in sections.values()))
    done = run_python([str(tmp_path / "examples.py")], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


SEEN_ONLY = ("assets/tiny-clip", "assets/judge", "assets/scenes")          # which draw nothing
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
            assert re.search(r"guidance_scale=1[,)]", line)      # stock 7.5 is far off
            made = eval(line, dict(DiffusionPipeline=DiffusionPipeline, prompt="red heart on blue",
                                   folder=ROOT / (name if name.startswith("assets") else "assets/student-2")))
            assert made.images[0].size == (64, 64) and np.asarray(made.images[0]).std() > 20
    assert any(line.startswith(("DiffusionPipeline", "python sampler.py --")) for line in lines) or name in SEEN_ONLY


def test_the_lower_bounds_are_the_versions_that_make_test_lowest_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = dict(line.split(">=") for line in sum((extras[name] for name in ("lora", "data", "studies", "onnx", "test")), project["dependencies"]))
    pins = dict(line.split("==") for line in (ROOT / "requirements-lowest.txt").read_text().splitlines() if not line.startswith("#"))
    assert {name: pins[name] for name in bounds} == bounds and set(pins) - set(bounds) == {"pyarrow"}


# ---- tables and pages are what python -m studies.results writes ------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A folder with results, README.md and docs as committed."""
    for folder in ("results", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("live"))       # which another test may be filling
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_every_page_and_table_is_what_the_results_say(copy):
    emptied = {page: re.sub(r"(<!-- (\w+) -->\n).*?(\n<!-- /\2 -->)", r"\1\3", text, flags=re.S) for page, text in PAGES.items()}
    assert sum(map(len, emptied.values())) < sum(map(len, PAGES.values())) - 5000
    for page, text in emptied.items():
        (copy / page).write_text(text)
    written = ["results/README.md", *(f"results/studies/{file.name}" for file in (ROOT / "results" / "studies").glob("*.md"))]
    for page in written:
        (copy / page).unlink()
    results.main(results.Config(str(copy)))
    for page in (*PAGES, *written):
        assert (copy / page).read_text() == (ROOT / page).read_text(), page
    assert sorted(re.findall(r"<!-- (\w+) -->", "".join(PAGES.values()))) == sorted(results.BLOCKS)        # each is shown once


def test_every_study_has_its_question_answer_picture_and_page_on_one_page():
    page = (ROOT / "results" / "README.md").read_text()
    for file in (ROOT / "results" / "studies").glob("*.json"):
        study = json.loads(file.read_text())
        assert f"**{study['question']}** {study['verdict'][0]}" in page and f"(studies/{file.stem}.png)" in page
        assert f"## [{file.stem}](studies/{file.stem}.md)" in page


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace("<!-- /short -->", ""), "needs the marks <!-- short --> and <!-- /short -->"),
    (lambda text: text + "<!-- short -->\n<!-- /short -->\n", "once each"),
    (lambda text: text.replace("short -->", "shorts -->"), "did you mean short")])
def test_marks_that_are_wrong_are_one_line_and_leave_the_page(copy, change, message):
    (copy / "README.md").write_text(changed := change(README))
    with pytest.raises(UserError, match=f"README.md.*{message}"):
        results.main(results.Config(str(copy)))
    assert (copy / "README.md").read_text() == changed


def spoil(folder, what):
    """Leave one thing wrong in a folder of results."""
    file, picture = folder / "studies" / "pairs.json", folder / "studies" / "pairs.png"
    content = json.loads(file.read_text())
    {"truncated": lambda: file.write_text('{"name": "pa'),
     "not text": lambda: file.write_bytes(b"\xff\xfe{}"),
     "list": lambda: file.write_text("[]"),
     "key": lambda: file.write_text(json.dumps({key: value for key, value in content.items() if key != "verdict"})),
     "ragged": lambda: file.write_text(json.dumps(content | dict(tables=[["a", ["x", "y"], [[1, 2], [3]]]]))),
     "no picture": picture.unlink,
     "truncated picture": lambda: picture.write_bytes(picture.read_bytes()[:-5]),
     "no study": lambda: shutil.rmtree(folder / "studies"),
     "no demo": (folder / "demo.json").unlink,
     "row": lambda: (folder / "demo.json").write_text(json.dumps(dict(json.loads((folder / "demo.json").read_text()), rows=[]))),
     "demo": lambda: (folder / "demo.json").write_text('{"rows": []}')}[what]()


@pytest.mark.parametrize("what, message", [
    ("truncated", "pairs.json: not valid JSON"), ("not text", "pairs.json: not valid JSON"), ("list", "pairs.json: has no question"),
    ("key", "pairs.json: has no verdict.*python -m studies pairs"), ("ragged", "pairs.json: the table 'a'.*python -m studies pairs"),
    ("no picture", "pairs.png: missing.*python -m studies pairs"), ("truncated picture", "pairs.png: not a whole PNG"),
    ("no study", "no study's results.*python -m studies all"), ("no demo", "demo.json: missing"), ("demo", "demo.json: has no protocol"),
    ("row", r"README.md: the mark short shows \('teacher', None, 32\), which demo.json lacks")])
def test_results_that_are_not_whole_are_named_and_no_page_is_changed(copy, what, message):
    spoil(copy / "results", what)
    with pytest.raises(UserError, match=message):
        results.main(results.Config(str(copy)))
    assert all((copy / page).read_text() == text for page, text in PAGES.items())


def test_one_name_one_meaning():
    """What a table, a picture or a command calls proreflow is the recipe of that name; our default is called default."""
    for name in ("tiny", "demo"):
        result = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert {row["method"] for row in result["rows"] if row["windows"]} <= set(reflow.RECIPES), name
        for row, command in ((row, command) for row in result["rows"] for command in result["protocol"]["students"]):
            assert ("--recipe proreflow" in command) or row["method"] != "proreflow"
    assert "--name" not in (ROOT / "Makefile").read_text()


# ---- the pages as text -----------------------------------------------------------------------------------------------


def test_the_glossary_has_the_words_of_the_method():
    explained = " ".join(re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "glossary.md").read_text(), re.M))
    for word in ("window", "stage", "chord", "pair", "path", "space", "trajectory", "FD", "endpoint error", "time law", "direction term", "recipe",
                 "coupling", "guidance", "straightness", "judge", "evaluations (NFE)"):
        assert re.search(rf"\b{re.escape(word)}(?!\w)", explained), word


def test_the_readme_is_short():
    assert len(README.encode()) <= 14 * 1024 and len(README.split()) < 2600


def test_links_and_their_headings_exist():
    def headings(file):                                     # as GitHub makes anchors of them
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for page, text in (*PAGES.items(), ("results/README.md", (ROOT / "results" / "README.md").read_text())):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            name, _, anchor = target.partition("#")
            file = (ROOT / page).parent / name
            assert file.exists(), (page, target)
            assert not anchor or anchor in headings(file), (page, target)


def test_the_readme_names_every_file_of_the_root():
    files = set(re.findall(r"`(\w+\.py)`", README))
    assert files == {file.name for file in ROOT.glob("*.py")}


def test_every_name_in_the_equations_is_one_of_that_file():
    rows = re.findall(r"`([\w/]+\.py)`: (`\w+`(?:, `\w+`)*)", PAGES["docs/equations.md"])
    assert len(rows) >= 18
    for file, names in rows:
        text = (ROOT / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?:def|class) {name}\b|^{name} =", text, re.M), (file, name)


def test_what_a_network_family_has_is_what_extending_says():
    section = PAGES["docs/extending.md"].split("## A network family")[1]
    rows = [(set(re.findall(r"`(\w+)", names)), what) for names, what in re.findall(r"^\| (`.*?) \| (.*?) \|$", section, re.M)]
    named = set.union(*(names for names, _ in rows))
    optional = set.union(*(names for names, what in rows if what.startswith("optional: ")))
    assert {function for _, function, _ in export.FILES.values()} < optional
    assert all(any(hasattr(module, name) for module in models.FAMILIES) for name in optional)
    assert all(hasattr(module, "encode_text") != (hasattr(module, "encode_part") and hasattr(module, "join")) for module in models.FAMILIES)
    missing = [(module.__name__, name) for module in models.FAMILIES for name in named - optional if not hasattr(module, name)]
    shared = set.intersection(*({name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
                                for module in models.FAMILIES))
    assert not missing and shared and shared <= named


@pytest.mark.parametrize("folder", ["tiny-sd", "tiny-sd3", "tiny-clip", "judge", "student-2", "scenes", "tiny-pixel"])
def test_every_folder_of_assets_says_whose_pictures_it_comes_from(folder):
    card = (ROOT / "assets" / folder / "README.md").read_text()
    assert "Microsoft" in card and f"license: {'mit' if folder == 'scenes' else 'apache-2.0'}" in card
    for file in (ROOT / "assets" / folder).rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} <= {torch.float16, torch.int64}, file


def test_what_a_clone_downloads_of_the_assets():
    """A link costs nothing: the student's text encoder and autoencoder are the teacher's."""
    files = [file for file in (ROOT / "assets").rglob("*") if file.is_file() and not file.is_symlink()]
    sizes = {file: file.stat().st_size for file in files if not any(part.is_symlink() for part in file.parents)}
    twin = sum(size for file, size in sizes.items() if "tiny-sd3" in file.parts)
    assert sum(sizes.values()) - twin < 40e6 and twin < 24e6
    for part in ("text_encoder", "vae"):
        ours, theirs = (load_file(next((ROOT / "assets" / name / part).glob("*.safetensors"))) for name in ("student-2", "tiny-sd"))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), part
