"""What a user types: good commands and bad input. Bad input is one line, exit status 2, and nothing lost."""
import json
import shutil
import sys

import pytest
import torch
from PIL import Image

import config
import eval as evaluation
import sampler
import train

MODULES = {"train.py": train, "sampler.py": sampler, "eval.py": evaluation}


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("train.py --steps 3") in this process.  Returns: (exit status, stdout, stderr)."""
    def run(line, *more):
        name, *arguments = [*line.split(), *map(str, more)]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        status = 0
        try:
            config.run(MODULES[name].main, MODULES[name].Config, "")
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err
    return run


@pytest.fixture(scope="module")
def student(random_sd, tmp_path_factory):
    """A 2-window student of the random teacher."""
    out = tmp_path_factory.mktemp("run")
    return train.main(train.Config(model=str(random_sd), data="sprites", out=str(out), windows=[2], steps=2, batch=2, trajectories=2,
                                   solver_steps=8))


@pytest.fixture
def here(tmp_path, monkeypatch, random_sd):
    """An empty working folder with a few bad things in it; MODEL stands for the random teacher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "file").write_text("")
    broken = shutil.copytree(random_sd, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    incomplete = shutil.copytree(random_sd, tmp_path / "incomplete")
    shutil.rmtree(incomplete / "vae")
    for name, content in (("fake", b"not an image"), ("lonely", None), ("stray", None)):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "a.png").write_bytes(content)
        else:
            Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
        if name != "lonely":
            (tmp_path / name / "a.txt").write_text("a caption")
    (tmp_path / "stray" / "b.pdf").write_text("")
    return tmp_path


BAD = [
    ("train.py --stesp 5", "did you mean --steps?"),
    ("train.py --steps five", "invalid int value: 'five'"),
    ("train.py --windows 8 3", "8 windows do not merge into 3"),
    ("train.py --windows 2 4", "2 windows do not merge into 4"),
    ("train.py --windows 0", "windows"),
    ("train.py --solver-steps 12", "multiple of 8"),
    ("train.py --steps 3", "need at least as many updates"),
    ("train.py --recipe proreflwo", "did you mean proreflow?"),
    ("train.py --pairs trajectories", "did you mean trajectory?"),
    ("train.py --space v", "not one of eps, u, velocity, end"),
    ("train.py --time-law start", "--time-law start: not one of uniform, starts; did you mean starts?"),
    ("train.py --seed -1", "--seed -1: must be at least 0"),
    ("train.py --batch 0", "--batch 0: must be at least 1"),
    ("train.py --lr 0", "lr 0.0 (> 0)"),
    ("train.py --text-dropout 2", "text-dropout 2.0 (in [0, 1])"),
    ("train.py --device cuda", "no CUDA device here; use --device cpu"),
    ("train.py --model nowhere", "--model nowhere: no diffusers pipeline there"),
    ("train.py --model broken --data sprites", "--model broken: cannot be loaded"),
    ("train.py --model incomplete --data sprites", "--model incomplete"),
    ("train.py --model MODEL", "give either --data"),
    ("train.py --model MODEL --data sprites --prompts empty.txt", "give either --data"),
    ("train.py --model MODEL --data nowhere", "--data nowhere: no such folder"),
    ("train.py --model MODEL --data empty", "--data empty: no image in it"),
    ("train.py --model MODEL --data fake", "a.png or its caption cannot be read"),
    ("train.py --model MODEL --data lonely", "a.png has no caption; write one into a.txt"),
    ("train.py --model MODEL --data stray", "b.pdf is neither an image nor the caption of one"),
    ("train.py --model MODEL --prompts empty.txt", "--prompts empty.txt: no prompt in it"),
    ("train.py --model MODEL --prompts file/x", "--prompts file/x: cannot be read"),
    ("train.py --model MODEL --data sprites --out file/out", "--out file/out: cannot be written"),
    ("sampler.py", "no prompt"),
    ("sampler.py --prompt", "--prompt"),
    ("sampler.py --model STUDENT --promt fox", "did you mean --prompt?"),
    ("sampler.py --model STUDENT --prompt fox --steps 0", "--steps 0: must be at least 1"),
    ("sampler.py --model STUDENT --prompt fox --steps 1", "use --steps 2 or more, or a student of 1 window"),
    ("sampler.py --model STUDENT --prompt fox --seed -3", "--seed -3: must be at least 0"),
    ("sampler.py --model STUDENT --prompt fox --n 0", "--n 0: must be at least 1"),
    ("sampler.py --model STUDENT --prompt fox --out file/a.png", "--out file/a.png: cannot be written"),
    ("sampler.py --model STUDENT --prompt fox --out a.gif", "--out a.gif: must end in .png"),
    ("sampler.py --model nowhere --prompt fox", "--model nowhere: no diffusers pipeline there"),
    ("sampler.py --model broken --prompt fox", "--model broken: cannot be loaded"),
    ("eval.py", "give the folder that train.py wrote"),
    ("eval.py nowhere", "nowhere: give the folder"),
    ("eval.py empty", "empty: no finished student in it"),
    ("eval.py RUN --n 100", "--n 100: must be at least 640"),
    ("eval.py RUN --steps 0", "--steps 0: must be at least 1"),
    ("eval.py RUN --clip empty", "--clip empty: no CLIPModel folder there"),
]


@pytest.mark.parametrize("line, message", BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_line_and_exit_status_2(cli, here, random_sd, student, line, message):
    before = sorted(here.iterdir())
    line = line.replace("MODEL", str(random_sd)).replace("STUDENT", str(student)).replace("RUN", str(student.parent))
    status, out, err = cli(line)
    assert status == 2 and message in err, (status, err)
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [path for path in sorted(here.iterdir()) if path.name != "runs"] == before
    assert not list(here.glob("runs/*/student-*"))


def test_a_recipe_that_starts_from_images_needs_images(cli, here, random_sd):
    (here / "prompts.txt").write_text("fox")
    status, _, err = cli("train.py --recipe perflow --prompts prompts.txt --model", random_sd)
    assert status == 2 and "prompts.txt: holds no images" in err and err.count("\n") == 1


def test_a_run_with_other_settings_is_not_overwritten(cli, here, random_sd):
    line = f"train.py --model {random_sd} --data sprites --steps 4 --batch 2 --trajectories 2 --solver-steps 8 --out o"
    assert cli(line)[0] == 0
    status, _, err = cli(line, "--lr", 0.01)
    assert status == 2 and "lr 0.0002 -> 0.01" in err
    assert cli(line)[:2] == (0, "o/student-1: this run is finished; choose another --out to train again\n")


def test_a_mistake_does_not_claim_the_folder_and_a_broken_checkpoint_is_named(cli, here, random_sd):
    line = "train.py --data sprites --steps 4 --batch 2 --trajectories 2 --solver-steps 8 --out o --model"
    assert cli(line, "nowhere")[0] == 2
    assert cli(line, random_sd)[0] == 0
    shutil.rmtree(here / "o" / "student-1")
    (here / "o" / "checkpoint.pt").write_bytes(b"torn")
    status, _, err = cli(line, random_sd)
    assert status == 2 and "o/checkpoint.pt: cannot be read" in err and "delete it" in err


def test_a_loss_that_is_not_finite_stops_with_where_and_keeps_the_checkpoint(cli, here, random_sd):
    status, _, err = cli(f"train.py --model {random_sd} --data sprites --batch 2 --trajectories 2 --steps 40 --solver-steps 8 --recipe "
                         "reflow --lr 1e30 --checkpoint-steps 1 --out o")
    assert status == 2 and "window (0.000, 1.000], t = " in err and "lower --lr" in err
    assert not (here / "o" / "student-1").exists()


def test_a_full_disk_keeps_the_last_checkpoint(cli, here, random_sd, monkeypatch):
    saved, real_save = [], torch.save

    def save(contents, file):
        if saved:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved.append(contents["done"])
        real_save(contents, file)
    monkeypatch.setattr(torch, "save", save)
    status, _, err = cli(f"train.py --model {random_sd} --data sprites --batch 2 --trajectories 2 --steps 8 --solver-steps 8 --recipe reflow "
                         "--checkpoint-steps 1 --out o")
    assert status == 2 and "no space left on the device" in err
    assert torch.load(here / "o" / "checkpoint.pt", weights_only=True)["done"] == 1 and not (here / "o" / "checkpoint.pt.part").exists()


def test_sampler_writes_what_was_asked_for(cli, here, student):
    status, out, err = cli(f"sampler.py --model {student} --prompt fox --out a.png")
    assert status == 0 and "2 steps = 2 network evaluations" in out
    assert Image.open("a.png").size == (256, 256)
    cli(f"sampler.py --model {student} --prompt fox cat --n 2 --steps 4 --scale 1 --out b.png")
    assert [Image.open(f"b-{i}.png").size for i in range(4)] == [(32, 32)] * 4
    cli(f"sampler.py --model {student} --prompt fox cat --n 3 --grid --guidance 2 --scale 2 --out c.png")
    assert Image.open("c.png").width > 3 * 64
    cli(f"sampler.py --model {student} --prompt fox --compare --save-steps --scale 2 --out d.png")
    assert Image.open("d.png").width > 2 * 64 and Image.open("d-steps.png").width > 2 * 64


def test_same_seed_same_picture_and_image_i_has_seed_plus_i(cli, here, student):
    cli(f"sampler.py --model {student} --prompt fox --seed 7 --scale 1 --out a.png")
    cli(f"sampler.py --model {student} --prompt fox --seed 6 --n 2 --scale 1 --out b.png")
    assert Image.open("a.png").tobytes() == Image.open("b-1.png").tobytes() != Image.open("b-0.png").tobytes()


def test_unknown_words_are_named(cli, here, student):
    shutil.copytree(student, here / "s")
    (here / "s" / "vocabulary.json").write_text(json.dumps(["fox", "on", "blue"]))
    _, out, _ = cli("sampler.py --model s --out a.png --prompt", "fox on mauve")
    assert "never seen: mauve" in out and "blue fox on" in out
    assert "never seen" not in cli("sampler.py --model s --out a.png --prompt", "Fox on blue")[1]


def test_the_newest_student_is_the_default(here, student):
    assert sampler.default_model().endswith("student-2") and "assets" in sampler.default_model()
    shutil.copytree(student, here / "runs" / "x" / "student-2")
    assert sampler.default_model() == "runs/x/student-2"


def test_help_lists_every_option_with_its_comment(cli):
    for name, module in MODULES.items():
        status, out, _ = cli(f"{name} --help")
        assert status == 0 and all(field.replace("_", "-") in out or field in out for field in module.Config.__dataclass_fields__)
        assert "peak, per stage" in out or name != "train.py"
