"""train.py as a user runs it, on a random tiny pipeline: what it learns, resume, processes, exports, determinism."""
import json
import re
import signal
import subprocess
import sys
import time

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

import config
import reflow
import sampler
import teacher
import train

SMALL = dict(data="sprites", steps=12, batch=4, trajectories=8, log_steps=1, solver_steps=8)


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def small(random_sd, out, **changes):
    return train.Config(model=str(random_sd), out=str(out), **{**SMALL, **changes})


def command(random_sd, out, **changes):
    options = {**SMALL, "model": random_sd, "out": out, **changes}
    return [str(part) for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]


def test_every_stage_leaves_a_complete_pipeline_and_the_same_seed_gives_the_same_bits(random_sd, tmp_path):
    last = train.main(small(random_sd, tmp_path / "a"))
    assert last == tmp_path / "a" / "student-1"
    train.main(small(random_sd, tmp_path / "b"))
    train.main(small(random_sd, tmp_path / "c", seed=1))
    for windows in (8, 4, 2, 1):
        info = json.loads((tmp_path / "a" / f"student-{windows}" / "reflow.json").read_text())
        assert (info["windows"], info["recipe"], info["path"]) == (windows, "default", "vp")
    assert same_bits(weights(last), weights(tmp_path / "b" / "student-1"))
    assert not same_bits(weights(last), weights(tmp_path / "c" / "student-1"))
    assert not same_bits(weights(last), weights(tmp_path / "a" / "student-8"))
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert line["magnitude"] >= -1e-6 and line["direction"] >= -1e-6
        weight = reflow.RECIPES["default"].direction_weight
        assert line["loss"] - line["magnitude"] - line["direction"] <= 2 * weight + 1e-4


@pytest.mark.parametrize("windows, steps", [(4, 4), (4, 8), (2, 2), (1, 1), (1, 4)])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_exported_student_is_sampled_alike_by_stock_diffusers(trained, windows, steps, guidance):
    folder = trained / f"student-{windows}"
    pipeline, model, info = sampler.open_model(str(folder))
    prompts, seeds = ["red heart on blue", "animal"], [3, 4]
    ours = sampler.generate(pipeline, model, prompts, seeds, sampler.time_grid(steps, info["windows"]), guidance)
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
                   latents=sampler.noise(seeds, sampler.latent_shape(pipeline))).images
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def trained(random_sd, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.main(small(random_sd, out))
    return out


@pytest.mark.parametrize("changes", [dict(pairs="data"), dict(pairs="student"), dict(path="linear", space="velocity"),
                                     dict(space="eps", direction_weight=0.5), dict(loss="pseudo-huber", space="end"),
                                     dict(guidance_teacher=3.0), dict(windows=[4, 1]), dict(time_law='uniform'),  dict(solver_steps=16)],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_every_column_of_a_recipe_changes_the_student(random_sd, trained, tmp_path, changes):
    last = train.main(small(random_sd, tmp_path, **changes))
    assert not same_bits(weights(last), weights(trained / "student-1"))


def test_the_loss_falls(random_sd, tmp_path):
    train.main(small(random_sd, tmp_path, recipe="reflow", steps=60, batch=16, lr=1e-3, trajectories=16))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize("pairs", ["trajectory", "student"])
def test_killed_and_resumed_equals_uninterrupted(random_sd, tmp_path, pairs):
    """SIGKILL at an arbitrary moment, then the same command again until it finishes."""
    changes = dict(pairs=pairs, checkpoint_steps=2, steps=16)
    arguments = [sys.executable, str(ROOT / "train.py"), *command(random_sd, tmp_path / "killed", **changes)]
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        log = tmp_path / "killed" / "log.jsonl"
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        while process.poll() is None and kills < 2:
            if log.exists() and len(log.read_text().splitlines()) >= lines + 5 + kills:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills == 2 and process.returncode == 0
    straight = train.main(small(random_sd, tmp_path / "straight", **changes))
    assert same_bits(weights(tmp_path / "killed" / "student-1"), weights(straight))


def test_interrupt_keeps_a_checkpoint_and_the_command_goes_on(random_sd, tmp_path):
    arguments = [sys.executable, str(ROOT / "train.py"), *command(random_sd, tmp_path / "out", steps=40)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "log.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and "the same command goes on" in process.stderr.read()
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["done"] >= 1
    assert subprocess.run(arguments, stderr=subprocess.DEVNULL).returncode == 0
    straight = train.main(small(random_sd, tmp_path / "straight", steps=40))
    assert same_bits(weights(tmp_path / "out" / "student-1"), weights(straight))


def test_two_processes_give_the_result_of_one_at_the_same_global_batch(random_sd, tmp_path, run_file):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611")
    done = run_file("train.py", *command(random_sd, tmp_path / "two"), launcher=torchrun)
    assert done.returncode == 0, done.stderr[-2000:]
    train.main(small(random_sd, tmp_path / "one"))
    one, two = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two"))
    assert len(one) == len(two) == SMALL["steps"]
    for alone, together in zip(one, two):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3, abs=1e-6)
        assert together["loss_per_window"] == pytest.approx(alone["loss_per_window"], rel=1e-3, abs=1e-6)
    # weights that the output does not depend on (biases before a group norm) drift with rounding; the pictures do not
    latents = []
    for folder in (tmp_path / "one" / "student-1", tmp_path / "two" / "student-1", random_sd):
        pipeline, model, _ = sampler.open_model(str(folder))
        latents.append(sampler.generate(pipeline, model, ["fox"] * 4, range(4), sampler.time_grid(1)))
    assert (latents[0] - latents[1]).abs().max() < 0.02 * (latents[0] - latents[2]).abs().max()


def test_a_folder_of_images_and_a_file_of_prompts(random_sd, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise {i}")
    train.main(small(random_sd, tmp_path / "images", data=str(folder), pairs="student"))
    (tmp_path / "prompts.txt").write_text("fox\n\nred heart on blue\n")
    train.main(small(random_sd, tmp_path / "prompts", data="", prompts=str(tmp_path / "prompts.txt")))
    assert (tmp_path / "images" / "student-1" / "model_index.json").exists()
    assert (tmp_path / "prompts" / "student-1" / "model_index.json").exists()


def test_one_cache_serves_every_window_count_and_refuses_other_settings(random_sd, tmp_path):
    cache = str(tmp_path / "cache")
    train.main(small(random_sd, tmp_path / "a", cache=cache))
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    train.main(small(random_sd, tmp_path / "b", cache=cache, recipe="reflow"))
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    with pytest.raises(config.UserError, match="guidance"):
        train.main(small(random_sd, tmp_path / "c", cache=cache, guidance_teacher=2.0))


def test_cached_boundaries_lie_on_the_teachers_trajectory(random_sd, tmp_path):
    """Re-solving one window from its cached start ends at its cached end."""
    c = small(random_sd, tmp_path)
    train.main(c)
    cached = load_file(tmp_path / "cache" / "00000.safetensors")
    pipeline = teacher.load_pipeline(str(random_sd))
    dataset = __import__("data").open_dataset("sprites", "", 0)
    cond = teacher.encode_text(pipeline, [dataset.captions[i] for i in cached["caption"][:4]])
    times = torch.linspace(0.75, 0.5, 3, dtype=torch.float64)                       # its share of 8 solver steps
    with torch.no_grad():
        end = sampler.ddim(teacher.as_model(pipeline), cached["z"][:4, 2], times, cond)
    assert cached["z"].shape[1] == 9 and torch.allclose(end, cached["z"][:4, 4], atol=1e-4)


def test_every_option_is_read_somewhere():
    source = "".join((ROOT / name).read_text() for name in ("train.py", "sampler.py", "eval.py"))
    for module in ("train", "sampler", "eval"):
        for name in __import__(module).Config.__dataclass_fields__:
            override = module == "train" and name in ("pairs", "path", "space", "loss", "time_law", "direction_weight", "solver_steps")
            assert override or re.search(rf"\bc\.{name}\b|\"{name}\"", source), (module, name)
