"""train.py as a user runs it, on random models: what it learns, resume, processes, LoRA, precision, determinism."""
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python, run_two, slow, start_python
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import export
import losses
import models
import reflow
import sampler
import teacher
import train
from data import captioned, imaging
from models import load, saved, student
from models.conditions import Conditions
from pairs import cache_bytes
from runtime import checkpoints, cli, options, progress, updates
from runtime.cli import UserError
from tools import build

SMALL = dict(data="scenes", windows=[2, 1], updates=6, batch=4, trajectories=4, log_steps=1, grid_steps=0, solver_steps=8, device="cpu")
SHORT = dict(windows=[2], updates=2, batch=2, trajectories=2)
CURVE = dict(updates=6, lr=1e-4)


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def loss_curve(run):
    return [line["loss"] for line in log(run)]


def small(random_sd, out, **changes):
    return train.Config(model=str(random_sd), out=str(out), **{**SMALL, **changes})


def command(random_sd, out, **changes):
    options = {**SMALL, "model": random_sd, "out": out, **changes}
    return [str(part) for key, value in options.items() for part in
            (f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [value] * (value is not True)))]


@pytest.fixture(scope="module")
def trained(random_sd, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.main(small(random_sd, out))
    return out


@pytest.fixture(scope="module")
def short(random_sd, tmp_path_factory):
    """short(**changes): the student of a short run, trained once."""
    made = {}

    def run(**changes):
        key = str(sorted(changes.items()))
        if key not in made:
            made[key] = train.main(small(random_sd, tmp_path_factory.mktemp("short"), **{**SHORT, **changes}))
        return made[key]
    return run


@pytest.fixture(scope="module")
def trained_tiny(tmp_path_factory):
    """6 updates of the embedded model: unlike a random one it does not blow rounding up."""
    out = tmp_path_factory.mktemp("trained-tiny")
    train.main(small("tiny", out, **CURVE))
    return out


def test_every_stage_leaves_a_complete_pipeline_and_the_same_seed_gives_the_same_bits(random_sd, trained, tmp_path):
    last = trained / "student-1"
    train.main(small(random_sd, tmp_path / "b"))
    train.main(small(random_sd, tmp_path / "c", seed=1))
    for windows in (2, 1):
        info = json.loads((trained / f"student-{windows}" / "reflow.json").read_text())
        assert (info["windows"], info["recipe"], info["path"]) == (windows, "default", "vp")
    assert same_bits(weights(last), weights(tmp_path / "b" / "student-1"))
    assert not same_bits(weights(last), weights(tmp_path / "c" / "student-1"))
    assert not same_bits(weights(last), weights(trained / "student-2"))
    assert [line["step"] for line in log(trained)] == list(range(1, 7))
    for line in log(trained):
        assert line["magnitude"] >= -1e-6 and line["direction"] >= -1e-6
        weight = reflow.RECIPES["default"].direction_weight
        assert line["loss"] - line["magnitude"] - line["direction"] <= 2 * weight + 1e-4
        assert set(line["loss_per_window"]) <= {str(k) for k in range(1, line["windows"] + 1)} and line["samples_per_second"] > 0


@pytest.mark.parametrize("changes", [
    dict(pairs="data"), dict(path="linear", space="velocity"), dict(space="eps", direction_weight=0.5), dict(loss="pseudo-huber", space="end"),
    dict(time_law="uniform"), dict(time_law="exponential"), dict(time_inside=True), dict(solver_steps=16), dict(loss="mse"),
    dict(normalization="per-sample"), dict(text_dropout=1.0), dict(lr=1e-4), dict(matching=0.1),
    # without these, other tests fail as well
    *map(slow, [dict(pairs="student"), dict(guidance_teacher=3.0), dict(windows=[1]), dict(normalization="learned"), dict(forward_rate=0.5),
                dict(dropout=0.2), dict(reuse=2), dict(lora=2), dict(precision="bf16"), dict(ema=0.0)])],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_every_column_of_a_recipe_changes_the_student(short, changes):
    assert not same_bits(weights(short(**changes)), weights(short()))


def test_the_log_tells_both_losses_of_distribution_matching_where_it_is(short):
    lines = log(short(matching=0.1, windows=[2, 1], updates=4).parent)
    told = {line["windows"]: {name: line[name] for name in ("matching", "critic") if name in line} for line in lines}
    assert told[2] == {} and told[1].keys() == {"matching", "critic"} and min(told[1].values()) > 0


@pytest.mark.parametrize("base, changes", [(dict(loss="high-pass"), dict(high_pass_weight=5.0)), (dict(loss="high-pass"), dict(high_pass_radius=0.6)),
                                           (dict(time_law="exponential"), dict(time_base=2.0)), (dict(windows=[1]), dict(projection=0.05)),
                                           (dict(windows=[1], projection=0.05), dict(projection=0.9))],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_every_number_of_a_column_changes_the_student(short, base, changes):
    assert not same_bits(weights(short(**base)), weights(short(**{**base, **changes})))


def test_dropout_reaches_every_dropout_of_the_student_and_no_picture(random_sd, tmp_path, monkeypatch):
    real, seen, drawn = train.make_student, [], []
    monkeypatch.setattr(train, "make_student", lambda *args: seen.append(real(*args)) or seen[-1])
    draw = progress.Grid.draw

    def watched(grid, model, *rest):
        plain = model.network
        model.network = lambda *args, **kwargs: drawn.append(seen[0].training) or plain(*args, **kwargs)
        draw(grid, model, *rest)
        model.network = plain
    monkeypatch.setattr(progress.Grid, "draw", watched)
    last = train.main(small(random_sd, tmp_path, dropout=0.3, grid_steps=1, **SHORT))
    rates = [module.p for module in seen[0].modules() if isinstance(module, torch.nn.Dropout)]
    assert len(rates) > 10 and set(rates) == {0.3} and seen[0].training and drawn and not any(drawn)
    kept = load.load_pipeline(str(last)).unet                                  # the student itself has none
    assert {module.p for module in kept.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_with_lora_the_teacher_answers_without_the_students_dropout(random_sd):
    unet = load.load_pipeline(str(random_sd)).unet
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([500.0, 20.0]), torch.randn(2, 5, unet.config.cross_attention_dim)
    plain = unet(*inputs).sample.detach()
    c = train.Config(lora=2)
    solver = student.FrozenNetwork(c, unet, torch.device("cpu"))
    network = student.make_student(c, unet, torch.device("cpu"), 0.5)
    assert torch.equal(solver(*inputs).sample, plain) and network.training
    assert not torch.equal(network(*inputs).sample, plain)


def test_the_learnt_normalizer_learns_and_levels_the_loss(random_sd, tmp_path):
    """Its own loss falls: it comes to predict what is usual, and every window then weighs about 1."""
    from losses import LossNormalizer
    made = []
    real = LossNormalizer.__init__

    def init(self, *args):
        real(self, *args)
        made.append(self)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossNormalizer, "__init__", init)
        train.main(small(random_sd, tmp_path, windows=[1], updates=40, trajectories=8, normalization="learned"))
    z, t = torch.randn(16, 16, 8, 8), torch.full((16,), 1.0)
    predicted = made[0](z, t).mean().item()
    assert len(made) == 1 and predicted == pytest.approx(np.log(np.mean(loss_curve(tmp_path)[-10:])), abs=0.7) and abs(predicted) > 0.3


@pytest.mark.parametrize("changes", [dict(micro_batch=2), slow(dict(micro_batch=4)), dict(gradient_checkpointing=True), slow(dict(shard=True)),
                                     slow(dict(compile=True))],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_what_saves_memory_changes_nothing_but_rounding(trained_tiny, tmp_path, changes):
    train.main(small("tiny", tmp_path, **{**CURVE, **changes}))
    assert loss_curve(tmp_path) == pytest.approx(loss_curve(trained_tiny), abs=1e-4)


def test_turning_pictures_on_does_not_change_training_and_the_first_is_plain_ddim(random_sd, trained, tmp_path):
    last = train.main(small(random_sd, tmp_path, grid_steps=2))
    assert same_bits(weights(last), weights(trained / "student-1"))
    grids = sorted(file.name for file in (tmp_path / "grids").iterdir())
    assert grids[0] == "000000.png" and grids[-1] == "000006.png" and "000002.png" in grids
    assert any((tmp_path / "tensorboard").iterdir())
    pipeline, model, _ = saved.open_model(str(random_sd))
    dataset = captioned.open_dataset("scenes", "", 0)
    prompts = [dataset.captions[i] for i in dict.fromkeys(dataset.caption_indices(range(64))) if i][:4]

    def column(steps):
        return imaging.to_pil(models.decode(pipeline, sampler.generate(pipeline, model, prompts, range(4), sampler.time_grid(steps))), 2)
    teachers = imaging.contact_sheet(list(zip(*map(column, (32, 4, 2, 1)))),
                                     ["teacher\n32 steps", "teacher\n4 steps", "teacher\n2 steps", "teacher\n1 step"], prompts)
    expected = imaging.beside(teachers, imaging.contact_sheet(list(zip(column(2))), ["student\n2 steps"]))
    found = Image.open(tmp_path / "grids" / "000000.png")
    assert found.size == expected.size
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_the_loss_falls(random_sd, tmp_path):
    train.main(small(random_sd, tmp_path, recipe="reflow", windows=None, updates=40, batch=8, lr=1e-3, trajectories=8))
    assert np.mean(loss_curve(tmp_path)[-10:]) < 0.8 * np.mean(loss_curve(tmp_path)[:10])


@pytest.mark.parametrize("lora", [0, slow(2)])
def test_training_goes_on_from_a_student_and_its_pairs_are_still_the_teachers(short, random_sd, tmp_path, lora):
    """With a rate of nothing the student that it begins with comes out again; with one, another."""
    first = short(lora=lora, lr=1e-2) if lora else short()
    kept = dict(lora=lora, ema=0.0, init=str(first), cache=str(first.parent / "cache"))
    still = train.main(small(random_sd, tmp_path / "still", **{**SHORT, **kept, "lr": 1e-30}))
    moved = train.main(small(random_sd, tmp_path / "moved", **{**SHORT, **kept, "windows": [1]}))
    parts = [export.trained_weights(folder, lora) for folder in (first, still, moved)]
    assert same_bits(*parts[:2]) and not same_bits(*parts[1:])
    assert not (tmp_path / "still" / "cache").exists()              # it has read, and not refused, that of the teacher


def test_a_student_of_something_else_is_no_beginning(short, random_sd, tmp_path):
    for init, changes, told in ((tmp_path, {}, "no student there"), (short(), dict(path="linear"), "its --path is vp, not linear"),
                                (short(), dict(lora=2), "its --lora is 0, not 2"),
                                (short(), dict(random_init=True), "its teacher was opened with --random-init not given; do the same")):
        with pytest.raises(cli.UserError, match=f"--init .*: {told}"):
            train.main(small(random_sd, tmp_path / "out", init=str(init), **changes))
    with pytest.raises(cli.UserError, match="its --model is .*, not tiny"):
        train.main(small("tiny", tmp_path / "out", init=str(short())))
    info = json.loads((short() / "reflow.json").read_text())
    for config, lora, told in ((dict(lora=2), 2, "the student's .*pytorch_lora_weights.safetensors: no such file"),
                               ({}, 0, "no diffusers pipeline there"), (None, 0, "reflow.json")):
        (tmp_path / "torn").mkdir(exist_ok=True)
        (tmp_path / "torn" / "reflow.json").write_text(json.dumps(info | dict(config=config)))
        with pytest.raises(cli.UserError, match=told):
            train.main(small(random_sd, tmp_path / "out", init=str(tmp_path / "torn"), lora=lora))
    assert not (tmp_path / "out" / "config.json").exists()


# ---- stopped, killed, resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [slow(dict()), slow(dict(pairs="student")), dict(lora=2, pairs="student"), slow(dict(normalization="learned", dropout=0.1)),
                                     dict(matching=0.1, normalization="learned"), slow(dict(matching=0.1, lora=2))],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_killed_and_resumed_equals_uninterrupted(random_sd, tmp_path, changes):
    """SIGKILL at an arbitrary moment, then the same command again until it finishes."""
    changes = dict(checkpoint_steps=2, updates=12, **changes)
    arguments = [str(ROOT / "train.py"), *command(random_sd, tmp_path / "killed", **changes)]
    kills, moments = 0, np.random.default_rng(len(changes))
    for _ in range(20):
        process = start_python(arguments, tmp_path)
        file = tmp_path / "killed" / "log.jsonl"
        lines = len(log(tmp_path / "killed")) if file.exists() else 0
        wait = moments.integers(2, 5)
        while process.is_alive() and kills < 2:
            if file.exists() and len(file.read_text().splitlines()) >= lines + wait:
                time.sleep(moments.uniform(0, 0.1))
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        process.join()
        if process.exitcode == 0:
            break
    assert kills == 2 and process.exitcode == 0
    straight = train.main(small(random_sd, tmp_path / "straight", **changes))
    assert same_bits(weights(tmp_path / "killed" / "student-1"), weights(straight))
    assert loss_curve(tmp_path / "killed") == loss_curve(tmp_path / "straight")          # the log forgets what was not kept


@pytest.mark.parametrize("stop", [slow(signal.SIGINT), signal.SIGTERM])
def test_told_to_stop_it_keeps_a_checkpoint_and_the_command_goes_on(random_sd, tmp_path, stop):
    arguments = [str(ROOT / "train.py"), *command(random_sd, tmp_path / "out", updates=24)]
    process = start_python(arguments, tmp_path, err=tmp_path / "err")
    while not (tmp_path / "out" / "log.jsonl").exists():
        time.sleep(0.05)
    os.kill(process.pid, stop)
    process.join()
    assert process.exitcode == 128 + stop and "the same command goes on" in (tmp_path / "err").read_text()
    assert len(list((tmp_path / "out").glob("checkpoint-*.safetensors"))) == 1
    assert run_python([*arguments, "--resume"], tmp_path).returncode == 0
    straight = train.main(small(random_sd, tmp_path / "straight", updates=24))
    assert same_bits(weights(tmp_path / "out" / "student-1"), weights(straight))


def interrupted(random_sd, out, monkeypatch, after, **changes):
    """A run of this process that dies in the middle: after the update `after`."""
    real = progress.write_log

    def write_log(file, board, line):
        real(file, board, line)
        if line["step"] == after:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(progress, "write_log", write_log)
        with pytest.raises(KeyboardInterrupt):
            train.main(small(random_sd, out, **changes))


def test_the_last_checkpoints_are_kept_and_a_truncated_one_is_passed_over(random_sd, trained, tmp_path, monkeypatch, capsys):
    interrupted(random_sd, tmp_path, monkeypatch, 6, checkpoint_steps=1, keep=3)
    files = sorted(tmp_path.glob("checkpoint-*"))
    assert [file.name for file in files] == [f"checkpoint-00000{k}.safetensors" for k in (3, 4, 5)]
    files[-1].write_bytes(files[-1].read_bytes()[:-1000])
    last = train.main(small(random_sd, tmp_path, checkpoint_steps=1, keep=3))
    assert "checkpoint-000005.safetensors: truncated" in capsys.readouterr().err
    assert same_bits(weights(last), weights(trained / "student-1"))


def test_checkpoints_are_ordered_by_number_and_copies_are_their_owners(tmp_path):
    steps = [999800, 1000000, 40, 1000200]
    for name in (*(f"{step:06d}" for step in steps), "000040-good", "best"):
        (tmp_path / f"checkpoint-{name}.safetensors").touch()
    assert checkpoints.checkpoints(tmp_path / "none") == []
    assert [int(file.stem.split("-")[1]) for file in checkpoints.checkpoints(tmp_path)] == sorted(steps, reverse=True)


@pytest.mark.parametrize("damage, kept", [(lambda text: text[:-20], 3), (lambda text: text[:-1], 4), (lambda text: text[:-20] + "\0" * 20, 3),
                                          (lambda text: text + '{"step": 1', 4)], ids=["truncated", "no newline", "zeros", "begun"])
def test_the_log_keeps_its_whole_lines_up_to_a_step(tmp_path, damage, kept):
    lines = [json.dumps(dict(step=step, loss=1 / step, samples_per_second=1e3 / 7)) + "\n" for step in range(1, 5)]
    file = tmp_path / "log.jsonl"
    file.write_text(damage("".join(lines)))
    progress.trim_log(file, 9)
    assert file.read_text() == "".join(lines[:kept])
    progress.trim_log(file, 2)
    assert file.read_text() == "".join(lines[:2])


def test_the_critic_of_a_teacher_of_x_compares_what_its_student_does(random_sd, tmp_path, monkeypatch):
    teaches = shutil.copytree(random_sd, tmp_path / "x")
    settings = json.loads((teaches / "scheduler" / "scheduler_config.json").read_text())
    (teaches / "scheduler" / "scheduler_config.json").write_text(json.dumps({**settings, "prediction_type": "sample"}))
    spaces, matching = [], losses.matching
    monkeypatch.setattr(losses, "matching", lambda *given: spaces.append(given[-1]) or matching(*given))
    train.main(small(teaches, tmp_path / "out", windows=[1], matching=0.1, updates=1))
    (p, q), = spaces
    assert (p, q) == (1, 0)                                # x itself


def test_an_early_student_may_be_deleted_and_the_run_goes_on_where_it_was(random_sd, tmp_path, monkeypatch, capsys):
    changes = dict(windows=[4, 2, 1], updates=9, checkpoint_steps=1)
    interrupted(random_sd, tmp_path / "a", monkeypatch, 8, **changes)
    shutil.rmtree(tmp_path / "a" / "student-4")
    before = weights(tmp_path / "a" / "student-2")
    last = train.main(small(random_sd, tmp_path / "a", **changes))
    assert [line["step"] for line in log(tmp_path / "a")] == list(range(1, 10)) and not (tmp_path / "a" / "student-4").exists()
    assert same_bits(weights(last), weights(train.main(small(random_sd, tmp_path / "b", **changes)))) and same_bits(before, weights(tmp_path / "a" / "student-2"))
    shutil.rmtree(tmp_path / "a" / "student-2")
    capsys.readouterr()
    assert train.main(small(random_sd, tmp_path / "a", **changes)) == last and "finished" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_what_its_recipe_has_become(random_sd, tmp_path, monkeypatch):
    interrupted(random_sd, tmp_path / "a", monkeypatch, 3, checkpoint_steps=1)
    now = reflow.RECIPES["default"]
    with monkeypatch.context() as another:
        another.setitem(reflow.RECIPES, "default", dataclasses.replace(now, loss="mse", shares=(1, 1)))
        with pytest.raises(UserError, match=r"when its recipe was another \(.*loss high-pass -> mse.*the version that began it"):
            train.main(small(random_sd, tmp_path / "a", checkpoint_steps=1))
    train.main(small(random_sd, tmp_path / "a", checkpoint_steps=1))


def test_a_run_may_be_moved_and_named_otherwise_but_not_go_on_with_other_data(random_sd, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("fox\nred heart\n")
    changes = dict(data="", prompts=str(tmp_path / "p.txt"), recipe="imitation", windows=[1], checkpoint_steps=1)
    interrupted(random_sd, tmp_path / "a", monkeypatch, 3, **changes)
    os.rename(tmp_path / "a", tmp_path / "b")
    (tmp_path / "p.txt").write_text("red heart\nfox\n")
    with pytest.raises(UserError, match="its run began with other images or captions; restore them"):
        train.main(small(random_sd, tmp_path / "b", **changes))
    (tmp_path / "p.txt").write_text("fox\nred heart\n")
    moved = small(random_sd, tmp_path / "b", **changes)
    last = train.main(dataclasses.replace(moved, out=f"{tmp_path}/./b/", prompts=f"{tmp_path}//p.txt"))
    assert (last / "reflow.json").is_file() and [line["step"] for line in log(tmp_path / "b")] == list(range(1, 7))
    (tmp_path / "b" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        train.main(moved)


def test_a_log_that_ends_in_the_middle_of_a_line_does_not_stop_a_resume(random_sd, trained, tmp_path, monkeypatch):
    interrupted(random_sd, tmp_path, monkeypatch, 5, checkpoint_steps=4)
    file = tmp_path / "log.jsonl"
    file.write_text(file.read_text()[:-20] + "\0" * 20)
    train.main(small(random_sd, tmp_path, checkpoint_steps=4))
    assert log(tmp_path)[-1]["step"] == 6 and loss_curve(tmp_path) == loss_curve(trained)


def test_a_run_says_what_it_will_take_and_how_its_student_is_sampled(random_sd, tmp_path, capsys):
    last = train.main(small(random_sd, tmp_path / "a run", updates=12, checkpoint_steps=6, keep=1, pairs="student", micro_batch=2))
    text = capsys.readouterr().out
    units = {"KiB": 2 ** 10, "MiB": 2 ** 20, "GiB": 2 ** 30}

    def said(before):
        number, unit = re.search(rf"{before}([\d.]+) (.iB)", text).groups()
        return float(number) * units[unit]
    unet = sum(value.nbytes for value in weights(last).values())
    whole = [sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in tmp_path.glob("*/student-*")]
    checkpoint, = (tmp_path / "a run").glob("checkpoint-*")
    assert said("disk: ") == pytest.approx(checkpoint.stat().st_size, rel=0.05) == pytest.approx(4 * unet, rel=0.05)
    assert said("checkpoints, ") == pytest.approx(sum(whole), rel=0.02)
    encoders = whole[0] - unet
    # student, gradients, two moments, average; the frozen network; pairs from images encode while they train
    assert said("memory: ") == pytest.approx(6 * unet + encoders, rel=0.02)
    assert "12 of 4 samples, 2 at once" in text and "1 process on CPU" in text and len(text.splitlines()) == 8
    done = run_python([str(ROOT / "sampler.py"), *shlex.split(text.split("python sampler.py ")[1]), "--out", "a.png"], tmp_path)
    assert done.returncode == 0 and (tmp_path / "a.png").exists(), done.stderr


def test_a_run_caches_no_more_trajectories_than_it_draws_pairs(random_sd, tmp_path, capsys):
    for name, changes, count in (("few", dict(trajectories=3), 3), ("many", dict(trajectories=5000), 8),
                                 ("reused", dict(trajectories=5000, reuse=2), 4)):
        c = small(random_sd, tmp_path / name, windows=[1], updates=2, cache=str(tmp_path / "cache" / name), **changes)
        train.main(c)
        assert f"{count} trajectories of 8 steps" in capsys.readouterr().out
        shards = [load_file(file) for file in (tmp_path / "cache" / name).rglob("*.safetensors")]
        size, recipe = sum(value.nbytes for shard in shards for value in shard.values()), train.resolve_recipe(c)
        pipeline, dataset = load.load_pipeline(str(random_sd)), captioned.open_dataset("scenes", "", 0)
        assert sum(len(shard.get("z", ())) for shard in shards) == count
        assert size == cache_bytes(c, recipe, pipeline, dataset, Conditions(c, recipe, pipeline, dataset))


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    changes = dict(checkpoint_steps=3, micro_batch=2, normalization="learned", **CURVE)
    interrupted("tiny", tmp_path / "out", monkeypatch, 4, **changes)
    done = run_two([str(ROOT / "train.py"), *command("tiny", tmp_path / "out", **changes)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    train.main(small("tiny", tmp_path / "straight", **changes))
    assert loss_curve(tmp_path / "out") == pytest.approx(loss_curve(tmp_path / "straight"), abs=1e-5)
    assert_alike(tmp_path / "straight", tmp_path / "out")


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [slow(dict()), slow(dict(shard=True, normalization="learned", grid_steps=4)), slow(dict(micro_batch=2, pairs="student", normalization="learned")),
                                     dict(micro_batch=2, matching=0.1), slow(dict(shard=True, matching=0.1)), slow(dict(lora=2, matching=0.1))],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_two_processes_give_the_loss_curve_of_one_at_the_same_global_batch(tmp_path, changes):
    done = run_two([str(ROOT / "train.py"), *command("tiny", tmp_path / "two", **CURVE, **changes)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    train.main(small("tiny", tmp_path / "one", **{**CURVE, **changes, "shard": False}))
    assert loss_curve(tmp_path / "two") == pytest.approx(loss_curve(tmp_path / "one"), abs=1e-5)
    assert_alike(tmp_path / "one", tmp_path / "two")


def assert_alike(one, two):
    """Of two runs, one and two processes: losses of each window, gradients, pictures."""
    for a, b in zip(log(one), log(two), strict=True):
        assert b["loss_per_window"] == pytest.approx(a["loss_per_window"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    # weights that the output does not depend on (biases before a group norm) drift with rounding; the pictures do not
    latents = []
    for folder in (one / "student-1", two / "student-1", load.ASSETS / "tiny-sd"):
        pipeline, model, _ = saved.open_model(str(folder))
        latents.append(sampler.generate(pipeline, model, ["fox"] * 4, range(4), sampler.time_grid(1)))
    assert (latents[0] - latents[1]).abs().max() < 0.01 * (latents[0] - latents[2]).abs().max()


@pytest.mark.slow                                          # test_cuda.py has it on a smaller model
def test_a_sharded_run_stopped_and_resumed_equals_a_plain_one(trained_tiny, tmp_path, monkeypatch):
    interrupted("tiny", tmp_path, monkeypatch, 4, checkpoint_steps=2, shard=True, **CURVE)
    train.main(small("tiny", tmp_path, checkpoint_steps=2, shard=True, **CURVE))
    assert loss_curve(tmp_path) == pytest.approx(loss_curve(trained_tiny), abs=1e-5)


def test_trouble_on_one_process_is_told_by_the_first(random_sd, tmp_path):
    done = run_two([str(ROOT / "train.py"), *command(random_sd, tmp_path / "out", lr=1e30, checkpoint_steps=1)], tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(errors) == 1 and "the last checkpoint is good" in errors[0], done.stderr[-2000:]


def test_an_occupied_port_is_named(random_sd, tmp_path, run_file, monkeypatch):
    import socket
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        for key, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(key, str(value))
        done = run_file("train.py", *command(random_sd, tmp_path / "out"))
    assert done.returncode == 2 and f"port {port}" in done.stderr.splitlines()[-1], done.stderr[-2000:]


# ---- LoRA and precision --------------------------------------------------------------------------------------------


def test_lora_keeps_one_copy_of_the_network_and_leaves_the_teacher_as_it_was(random_sd, tmp_path, monkeypatch):
    found = {}
    real = student.FrozenNetwork.become

    def become(self, weights, c):
        real(self, weights, c)
        found["networks"], found["solver"] = {id(self.student)}, self
        found["adapters"] = sorted(self.student.peft_config)
    monkeypatch.setattr(student.FrozenNetwork, "become", become)
    train.main(small(random_sd, tmp_path, lora=2, pairs="student", lr=1e-2))
    solver = found["solver"]
    assert found["adapters"] == ["previous", "student"] and not hasattr(solver, "copy")
    before = weights(random_sd)
    for name, value in solver.student.named_parameters():
        if ".lora_" not in name:
            assert not value.requires_grad and torch.equal(value, before[name.replace(".base_layer", "")])
    # its previous adapter is the student of the stage before, and with the adapters off it is the teacher
    plain, stage_before = (load.load_pipeline(str(folder)).unet for folder in (random_sd, tmp_path / "student-2"))
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([500.0, 20.0]), torch.randn(2, 16, plain.config.cross_attention_dim)
    with torch.no_grad():
        outputs = [network(*inputs, return_dict=False)[0] for network in (solver, stage_before, plain, solver.student)]
        assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
        assert not torch.allclose(outputs[0], outputs[2], atol=1e-3) and not torch.allclose(outputs[0], outputs[3], atol=1e-3)
        solver.adapter = None
        assert torch.equal(solver(*inputs, return_dict=False)[0], plain(*inputs, return_dict=False)[0])
        assert not torch.allclose(solver.student(*inputs, return_dict=False)[0], plain(*inputs, return_dict=False)[0], atol=1e-4)


def test_bf16_trains_fp32_weights_and_keeps_what_lora_freezes_in_bf16(random_sd, tmp_path, monkeypatch):
    real, seen = train.make_student, []
    monkeypatch.setattr(train, "make_student", lambda *args: seen.append(real(*args)) or seen[-1])
    train.main(small(random_sd, tmp_path / "full", precision="bf16", **SHORT))
    train.main(small(random_sd, tmp_path / "lora", precision="bf16", lora=2, **SHORT))
    full, lora = seen
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert weights(tmp_path / "lora" / "student-2")["conv_in.weight"].dtype == torch.float32       # merged into the teacher as it is stored
    train.main(small(random_sd, tmp_path / "fp32", **SHORT))
    assert loss_curve(tmp_path / "full") == pytest.approx(loss_curve(tmp_path / "fp32"), rel=0.1) and loss_curve(tmp_path / "full") != loss_curve(tmp_path / "fp32")


@pytest.mark.parametrize("name", [slow("sd15"), "sd21", "sdxl"])
def test_the_same_loop_trains_every_family(small_models, tmp_path, name):
    last = train.main(small(small_models[name], tmp_path, precision="bf16", updates=2, batch=2, lora=2 * (name == "sdxl"), pairs="student" if name == "sd21" else "trajectory",
                            cache_latents=False))
    assert (last / "model_index.json").exists() and np.isfinite(loss_curve(tmp_path)).all()


@pytest.mark.parametrize("changes", [dict(), dict(lora=2)], ids=["full", "lora"])
def test_guidance_is_put_in_by_the_teacher_alone(random_sd, tmp_path, monkeypatch, changes):
    """Where the previous student solves, it has learned the guidance: also in a run that goes on from a finished stage."""
    real, solved = sampler.ddim, []

    def ddim(model, z, times, cond, guidance=1.0, *rest, **more):
        solved.append((model.path is None, guidance))
        return real(model, z, times, cond, guidance, *rest, **more)
    monkeypatch.setattr(sampler, "ddim", ddim)
    options = dict(pairs="student", windows=[2, 1], guidance_teacher=4.0, updates=2, checkpoint_steps=100, **changes)
    train.main(small(random_sd, tmp_path, **options))
    assert solved == [(True, 4.0)] + [(False, 1.0)]
    shutil.rmtree(tmp_path / "student-1")
    train.main(small(random_sd, tmp_path, **options))
    assert solved[2:] == [(False, 1.0)]


def share_of_the_largest(recipe, samples=64, draws=40):
    """Of the gradient with respect to an x-predicting network's output, the largest sample's share: (median, maximum) over draws of
    `samples` samples at uniform times, the network's errors alike at all of them."""
    schedule, shares = teacher.Schedule(build.make_scheduler().alphas_cumprod), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        x, eps, error = torch.randn(3, samples, 64, generator=generator)
        t = reflow.uniform(torch.rand(samples, generator=generator, dtype=torch.float64), 1)
        output = (x + 0.3 * error).requires_grad_(True)
        model = teacher.Model(lambda z, timestep: output, schedule, "sample")        # noqa: B023
        a, b = (v.float() for v in model.coefficients(t, 2))
        x_hat, eps_hat = model(a * x + b * eps, t, {})
        start, end = reflow.window_of(t, 1)

        def compared(space):
            p, q = (v.float()[:, None] if torch.is_tensor(v) else v for v in reflow.SPACES[space](schedule, start, end))    # noqa: B023
            return p * x_hat + q * eps_hat, p * x + q * eps                          # noqa: B023
        pair = compared(recipe.space)
        loss = losses.aligned(losses.mse(*pair), *compared(recipe.direction_space), recipe.direction_weight)
        norms = torch.autograd.grad(loss.sum(), output)[0].norm(dim=1)
        shares.append((norms.max() / norms.sum()).item())
    return np.median(shares), max(shares)


@pytest.mark.parametrize("name", reflow.RECIPES)
def test_no_sample_of_an_x_predicting_teacher_holds_most_of_the_gradient(name):
    recipe = reflow.RECIPES[name]
    assert train.fit_prediction(train.Config(), recipe, "v_prediction") is train.fit_prediction(train.Config(), recipe, "epsilon") is recipe
    fitted = train.fit_prediction(train.Config(), recipe, "sample")
    median, most = share_of_the_largest(fitted)
    assert median < 0.04 and most < 0.08, (median, most)
    if recipe.space != "end":
        assert fitted.space == "x" and share_of_the_largest(recipe)[1] > 0.3


def test_a_teacher_that_predicts_x_is_compared_in_x_and_its_students_say_so(random_sd, tmp_path):
    model = shutil.copytree(random_sd, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "sample"}))
    last = train.main(small(model, tmp_path / "out", **SHORT))
    columns = json.loads((last / "reflow.json").read_text())["columns"]
    assert columns["space"] == columns["direction_space"] == "x"
    for changes in (dict(space="u"), dict(space="eps"), dict(direction_space="velocity")):
        with pytest.raises(cli.UserError, match="this teacher predicts x, whose errors have no bound there"):
            train.main(small(model, tmp_path / "refused", **SHORT, **changes))
    assert not (tmp_path / "refused" / "config.json").exists()


def test_random_init_needs_no_weights_and_is_remembered(small_models, tmp_path):
    last = train.main(small(small_models["sd15"], tmp_path, random_init=True, **SHORT))
    info = json.loads((last / "reflow.json").read_text())
    assert info["config"]["random_init"] and "--random-init" in info["command"]


# ---- data ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_and_a_file_of_prompts(random_sd, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise {i}")
    train.main(small(random_sd, tmp_path / "images", data=str(folder), pairs="student", updates=2))
    train.main(small(random_sd, tmp_path / "latents", data=str(folder), pairs="student", updates=2, cache_latents=True))
    assert loss_curve(tmp_path / "latents") == pytest.approx(loss_curve(tmp_path / "images"), rel=1e-3)
    (tmp_path / "prompts.txt").write_text("fox\n\nred heart on blue\n")
    train.main(small(random_sd, tmp_path / "prompts", data="", updates=2, prompts=str(tmp_path / "prompts.txt")))
    for run in ("images", "latents", "prompts"):
        assert (tmp_path / run / "student-1" / "model_index.json").exists()


def test_one_cache_serves_every_window_count_and_refuses_other_settings(random_sd, tmp_path):
    cache = str(tmp_path / "cache")
    train.main(small(random_sd, tmp_path / "a", cache=cache, updates=2))
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.*")}
    train.main(small(random_sd, tmp_path / "b", cache=cache, recipe="reflow", windows=None, updates=1))
    assert made and made == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.*")}
    with pytest.raises(cli.UserError, match="guidance"):
        train.main(small(random_sd, tmp_path / "c", cache=cache, guidance_teacher=2.0, updates=2))


def test_every_option_is_read_somewhere():
    source = "".join(file.read_text() for folder in (".", "models", "runtime", "evaluation", "tools") for file in (ROOT / folder).glob("*.py"))
    for module in ("train", "sampler", "eval", "tools.bench"):
        for name in importlib.import_module(module).Config.__dataclass_fields__:
            override = module == "train" and name in options.RECIPE_COLUMNS
            assert override or re.search(rf"\bc\.{name}\b|\"{name}\"", source), (module, name)


# ---- what an update is ----


def test_the_students_forward_is_in_bf16(random_sd, tmp_path, monkeypatch):
    seen, real = set(), UNet2DConditionModel.forward

    def forward(self, *args, **more):
        if torch.is_grad_enabled():
            seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return real(self, *args, **more)
    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    train.main(small(random_sd, tmp_path, precision="bf16", **SHORT))
    assert seen == {(True, torch.bfloat16)}


def test_distribution_matching_counts_by_its_weight(short):
    little, plain, more = (weights(short(windows=[1], matching=weight)) for weight in (1e-9, 0.0, 0.1))
    assert all(torch.allclose(little[key], plain[key], atol=1e-6) for key in plain)
    assert not all(torch.allclose(more[key], plain[key], atol=1e-6) for key in plain)


def test_what_is_exported_is_the_running_average(random_sd, tmp_path):
    last = train.main(small(random_sd, tmp_path, windows=[1], updates=4, ema=0.5, checkpoint_steps=4, lr=1e-3))
    _, tensors = export.open_safetensors("", tmp_path / "checkpoint-000004.safetensors")
    kept = weights(last)
    assert all(torch.equal(kept[name], tensors[f"ema:{name}"]) for name in kept)
    assert not all(torch.equal(kept[name], tensors[f"student:{name}"]) for name in kept)


def test_the_rate_warms_up_and_falls_to_a_tenth():
    rates = [train.learning_rate(train.Config(lr=2.0), done, 1000) for done in range(1000)]
    assert rates[0] == pytest.approx(2 / 50, rel=1e-3) and max(rates) == pytest.approx(2, rel=1e-2)
    assert rates.index(max(rates)) == 49 and rates[-1] == pytest.approx(0.2, rel=1e-3) and rates[500] == pytest.approx(1.1, rel=1e-3)
    assert train.learning_rate(train.Config(lr=2.0), 0, 1) == 2


def test_a_gradient_is_clipped_to_norm_one_and_told_as_it_was():
    student = torch.nn.Linear(3, 1, bias=False)
    before, optimizer = student.weight.detach().clone(), torch.optim.SGD(student.parameters(), 1.0)
    student.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
    norm = updates.step(student, optimizer, None, torch.amp.GradScaler("cpu", enabled=False))
    assert norm == 5 and torch.allclose(before - student.weight, torch.tensor([[0.6, 0.8, 0.0]]), atol=1e-5)


def test_the_average_decays_as_asked():
    where = SimpleNamespace(device=torch.device("cpu"), shape=(4, 8, 8))
    _, ema, *_ = updates.make_optimizer(train.Config(ema=0.9), reflow.Recipe(), torch.nn.Linear(2, 2), where, 1)
    assert ema.decay == 0.9


def test_a_row_of_the_log_has_its_columns_in_order():
    names = ("loss", "magnitude", "direction", "matching", "critic")
    parts = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    found = progress.row(parts, tuple(torch.full((2,), value).double() for value in (0.3, 0.5, 0.0)))
    assert torch.allclose(found, torch.tensor([0, 1, 2, 0.5, 0.3, 3, 4]).double().expand(2, -1))
