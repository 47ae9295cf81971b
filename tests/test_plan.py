"""What a run says and refuses before it starts, what it says while it runs, and the options that save memory."""
import dataclasses
import json
import sys
import types

import pytest
import torch
from conftest import slow
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from test_cuda import losses, model, options, stopped_after  # noqa: F401  model is a fixture

import export
import train
from runtime import checkpoints, cli, plan, progress, updates


def test_a_run_says_what_it_takes_and_after_ten_updates_how_long(model, tmp_path, capsys):  # noqa: F811
    (tmp_path / "p.txt").write_text("fox\nred heart on blue\ncat\ndog\nbird\n")
    train.main(options(model, tmp_path / "o", "cpu", windows=[1], updates=12, grid_steps=6, validation_prompts=str(tmp_path / "p.txt")))
    out = capsys.readouterr().out
    assert "network evaluations: 32 for the cache, then 24 forwards and backwards of the student" in out
    assert "after 10 updates: " in out and "for the other 2; memory: " in out
    assert f"pictures: {tmp_path / 'o' / 'grids' / '000012.png'}; sample it: python sampler.py --model" in out
    assert Image.open(tmp_path / "o" / "grids" / "000012.png").height > 5 * 100                 # a row for each of the five prompts
    events = b"".join(file.read_bytes() for file in (tmp_path / "o" / "tensorboard").glob("events*"))
    assert events.count(b"PNG") == 3


def test_the_curves_forget_what_a_resume_makes_again(model, tmp_path, monkeypatch):  # noqa: F811
    boards, real = [], progress.Board
    monkeypatch.setattr(progress, "Board", lambda *given: boards.append(real(*given)) or boards[-1])
    c = options(model, tmp_path, "cpu", windows=[1], updates=5, log_steps=1, checkpoint_steps=2)
    stopped_after(3, c)
    boards[0].close()                                      # what a kill does not lose is on the disk
    train.main(c)
    curves = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [point.step for point in curves.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_the_teachers_pictures_are_its_own_whatever_the_students_path_and_first_weights(model, tmp_path):  # noqa: F811
    def drawn(name, **changes):
        train.main(options(model, tmp_path / name, "cpu", updates=1, grid_steps=1, windows=[2], **changes))
        return (tmp_path / name / "teacher.png").read_bytes()
    first = drawn("vp", lr=0.1)
    assert drawn("linear", path="linear", space="velocity") == first
    assert drawn("later", init=str(tmp_path / "vp" / "student-2")) == first


def test_pictures_of_other_prompts_after_a_resume_do_not_stand_beside_those_of_the_first(model, tmp_path):  # noqa: F811
    def c(prompts):
        (tmp_path / "p.txt").write_text(prompts)
        return options(model, tmp_path / "o", "cpu", windows=[2], updates=4, grid_steps=4, validation_prompts=str(tmp_path / "p.txt"))
    stopped_after(3, c("fox\ncat\n"))
    train.main(c("red heart on blue\n"))
    beside, alone = (Image.open(tmp_path / "o" / "grids" / f"{step:06d}.png") for step in (0, 4))
    assert beside.width > Image.open(tmp_path / "o" / "teacher.png").width > alone.width and beside.height > alone.height


@pytest.mark.parametrize("changes", [slow(dict(pairs="data")), dict(pairs="student"), dict(pairs="consistency", windows=[1]),
                                     dict(pairs="data", guidance_teacher=2.0, reuse=2, micro_batch=2), dict(guidance_teacher=2.0),
                                     dict(pairs="imitation", windows=[4, 1]), dict(pairs="flow-map", guidance_teacher=2.0, windows=[2]),
                                     dict(matching=0.1, windows=[2, 1]), dict(matching=0.1, guidance_teacher=2.0, windows=[2])], ids=str)
def test_the_evaluations_said_are_those_made(model, tmp_path, monkeypatch, changes):  # noqa: F811
    c, real, made = options(model, tmp_path, "cpu", updates=2, **changes), train.models.as_model, [0]

    def as_model(*args):
        counted = real(*args)
        network = counted.network

        def forward(z, timestep, **cond):
            made[0] += len(z) * (3 if torch.is_grad_enabled() else 1)                # a backward is two
            return network(z, timestep, **cond)
        counted.network = forward
        return counted
    monkeypatch.setattr(train.models, "as_model", as_model)
    train.main(c)
    recipe = train.resolve_recipe(c)
    assert made[0] == sum(plan.evaluations(c, recipe, c.guidance_teacher)) + 3 * c.updates * c.batch


def test_what_cannot_fit_is_refused_before_any_cache(model, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch, pytest.raises(cli.UserError, match="memory: training every weight takes .* too little; use --lora"):
        patch.setattr(plan, "free_memory", lambda device, world: 1000)
        train.main(options(model, tmp_path / "a", "cpu"))
    usage = plan.shutil.disk_usage
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage(path)._replace(free=2 ** 20))
    with pytest.raises(cli.UserError, match=r"--out .*: will take .* MiB too little; .* or --keep 1"):
        train.main(options(model, tmp_path / "b", "cpu"))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("keep", [1, 2])
def test_the_disk_holds_a_new_checkpoint_before_an_old_one_goes(model, tmp_path, monkeypatch, keep):  # noqa: F811
    held, listed, planned, left = [], plan.store.write_atomically, [], plan.left

    def write(target, *given, **more):
        listed(target, *given, **more)
        held.append(sum(file.stat().st_size for file in target.parent.glob("checkpoint-*.safetensors")))
    monkeypatch.setattr(checkpoints.store, "write_atomically", write)
    monkeypatch.setattr(plan, "left", lambda *given: planned.append(left(*given)) or planned[-1])
    train.main(options(model, tmp_path, "cpu", checkpoint_steps=1, keep=keep))
    one, most, _ = planned[-1]
    assert keep * one < 0.9 * max(held) and max(held) < 1.1 * most


@pytest.mark.parametrize("name", ["wandb", slow("trackio")])
def test_a_run_is_reported_where_it_is_asked_for(model, tmp_path, monkeypatch, name):  # noqa: F811
    """The two packages have these names in common; a module that records calls stands in."""
    calls = []
    tool = types.SimpleNamespace(init=lambda **given: calls.append(("init", given)), finish=lambda: calls.append(("finish",)),
                                 log=lambda values, step: calls.append((step, sorted(values))), Image=lambda picture: picture)
    monkeypatch.setitem(sys.modules, name, tool)
    train.main(options(model, tmp_path, "cpu", windows=[1], updates=2, grid_steps=2, report_to=[name]))
    assert "/" not in calls[0][1]["name"] and calls[0][1]["name"].endswith(tmp_path.name)              # a folder of trackio's, with pictures
    assert calls[0][1]["project"] == "reflow" and calls[0][1]["config"]["updates"] == 2 and calls[-1] == ("finish",)
    assert [step for step, _ in calls[1:-1]] == [0, 1, 2, 2] and calls[1][1] == ["grid"] and "loss" in calls[2][1]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(cli.UserError, match=f"--report-to {name}: needs {name}"):
        train.resolve_recipe(train.Config(report_to=[name]))


def test_an_average_in_main_memory_is_the_average_and_without_one_the_weights_are_kept(model, tmp_path):  # noqa: F811
    changes = dict(windows=[1], ema=0.5)
    plain, other = (export.trained_weights(train.main(options(model, tmp_path / name, "cpu", **changes, **more)), 0)
                    for name, more in (("plain", {}), ("cpu", dict(ema_device="cpu"))))
    assert all(torch.allclose(plain[name], other[name], atol=1e-6) for name in plain)
    assert cli.parse(train.Config, "", ["--no-ema"]).ema == 0
    c = options(model, tmp_path / "none", "cpu", windows=[1], ema=0.0)
    stopped_after(3, c)
    kept = export.trained_weights(train.main(c), 0)
    file = tmp_path / "none" / "checkpoint-000004.safetensors"
    _, tensors = export.open_safetensors("", file)
    assert not [name for name in tensors if name.startswith("ema:")] and all(torch.equal(kept[name], tensors[f"student:{name}"]) for name in kept)
    export.export_checkpoint(export.ExportConfig(str(file), str(tmp_path / "from")))
    assert all(torch.equal(kept[name], value) for name, value in export.trained_weights(tmp_path / "from", 0).items())


def test_fp16_trains_near_fp32_and_a_resume_goes_on_with_its_scale(model, tmp_path, monkeypatch):  # noqa: F811
    """At a scale where nothing overflows, so that no update is left out."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, init_scale=64.0, enabled=enabled))
    train.main(options(model, tmp_path / "fp32", "cpu", windows=[1]))
    c = options(model, tmp_path / "fp16", "cpu", windows=[1], precision="fp16")
    stopped_after(3, c)
    metadata, _ = export.open_safetensors("", tmp_path / "fp16" / "checkpoint-000002.safetensors")
    assert json.loads(metadata["scaler"])["scale"] == 64
    train.main(c)
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.1)


def test_an_overflow_in_fp16_leaves_the_update_out_and_halves_the_scale():
    student = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    scaler, before = torch.amp.GradScaler("cpu"), student.weight.detach().clone()
    for factor, moved in ((float("inf"), False), (1.0, True)):
        scale = scaler.get_scale()
        scaler.scale(student(torch.ones(1, 2)).sum()).backward()
        student.weight.grad *= factor
        norm = updates.step(student, optimizer, None, scaler)
        assert (norm == 0) == (not moved) and scaler.get_scale() == scale / (1 if moved else 2)
        assert torch.equal(student.weight, before) != moved


class AdamW8bit(torch.optim.Optimizer):
    """What bitsandbytes' keeps of a parameter, under its names: the count in Python, and one table for all parameters, which on a CPU is
    one tensor. The arithmetic is not Adam's."""

    def __init__(self, parameters, lr, weight_decay, eps):
        super().__init__(parameters, dict(lr=lr))
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            kept = self.state[p]
            if not kept:
                kept |= dict(step=0, state1=torch.zeros_like(p), state2=torch.zeros(p.numel(), dtype=torch.uint8), qmap1=self.table)
            kept["step"] += 1
            kept["state1"].lerp_(p.grad, 0.1)
            p -= self.param_groups[0]["lr"] * kept["state1"] / kept["step"]


def test_a_run_with_8_bit_moments_is_checkpointed_and_goes_on_to_the_bits_of_one_that_was_not_stopped(model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit)))
    runs = [options(model, tmp_path / name, "cpu", windows=[1], optimizer="adamw8bit") for name in ("stopped", "straight")]
    stopped_after(3, runs[0])
    stopped, straight = (export.trained_weights(train.main(c), 0) for c in runs)
    assert all(torch.equal(stopped[name], straight[name]) for name in straight)


@pytest.mark.parametrize("extra", [{}, dict(normalization="learned"), dict(lora=2), dict(matching=0.1)])
def test_a_run_with_muon_goes_on_to_the_bits_of_one_that_was_not_stopped(model, tmp_path, extra):  # noqa: F811
    runs = [options(model, tmp_path / name, "cpu", windows=[1], optimizer="muon", lr=1e-3, **extra) for name in ("stopped", "straight", "other")]
    stopped_after(3, runs[0])
    runs[2] = dataclasses.replace(runs[2], optimizer="adamw")
    stopped, straight, other = (export.trained_weights(train.main(c), c.lora) for c in runs)
    assert all(torch.equal(stopped[name], straight[name]) for name in straight)
    assert not all(torch.equal(other[name], straight[name]) for name in straight)


def test_durations_are_words():
    assert [progress.duration(s) for s in (3, 89, 120, 3661, 90000)] == ["3 s", "89 s", "2 min", "1 h 1 min", "25 h 0 min"]
