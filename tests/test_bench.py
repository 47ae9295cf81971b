"""bench.py measures what it says; the targets for memory, evaluations and overhead hold. The full-size ones are slow."""
import json
import re

import diffusers
import pytest
import torch
from conftest import slow
from test_export import PROMPTS, SEEDS

import export
import models
import sampler
import train
from tools import bench

GIB = 2 ** 30


def run(**options):
    return bench.run_training(device="cpu", **options)


@pytest.mark.slow
def test_a_student_update_costs_at_most_five_evaluations_from_the_cache_and_eight_online(capsys):
    rows = bench.evaluations(bench.Config(), "cpu")
    assert set(rows) == set(bench.reflow.RECIPES)
    for name, row in rows.items():
        matched = bench.reflow.RECIPES[name].matching > 0                         # its own samples, its critic, and the teacher once more
        assert row["student"] == (9 if matched else 3) and (row["solver"] == matched) == (row["once"] > 0), name
    assert rows["default"]["solver"] == 0 and rows["default"]["once"] <= 1.03
    assert rows["proreflow"]["solver"] == pytest.approx(4 / 4 + 3 * 2 / 4)        # 4 steps in its first stage, 2 windows in the others
    assert rows["perflow"]["solver"] == 8
    table = capsys.readouterr().out
    assert re.search(r"\| default \| 8 4 2 1 \| 0.00 \| 3 \| 4.00 \|", table)


def test_pairs_asked_at_several_times_cost_a_fraction():
    found = run(model="tiny", data="scenes", recipe="perflow", batch=12, updates=1, reuse=3)
    assert found["evaluations"] == dict(student=12, solver=32)                    # 4 pairs, 8 steps each


@pytest.mark.parametrize("name, expected", [("sd15", 402), slow("sdxl", 3381)])
def test_the_flops_of_a_forward_are_those_of_the_published_architectures(name, expected):
    """In G multiply-adds: the analytic counts of others, to within the rounding of theirs."""
    assert bench.forward_flops(bench.Config(model=name)) / 2e9 == pytest.approx(expected, rel=0.01)


def test_every_part_prints_its_table_and_writes_its_figures(small_models, tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main(bench.Config(model=str(small_models["sd15"]), random_init=True, parts=["training", "sampling"], repeats=1, lora=2,
                            gradient_checkpointing=True, device="cpu", out=str(out)))
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    for row in ("student (before it is trained, the teacher)", "gradients", "text encoders", "VAE", "activations", "network, forward",
                "the loop: all the rest", "sampler.py, with text", "diffusers' pipeline, with text"):
        assert row in text, row
    assert found["training"]["updates"] == 4 and found["training"]["weights"]["trained"] < found["training"]["weights"]["network"]
    assert "Forward-equivalents per update: 4 counted (a backward is two, the recomputation one), " in text
    assert 1 < found["training"]["forward_equivalents"] < 60 and found["training"]["weights"]["text"] > 0
    parts = sum(found["training"][part] for part in ("forward", "backward", "optimizer"))
    assert 0 < parts < found["training"]["seconds"] and found["training"]["peak"] > found["training"]["weights"]["network"]
    assert len(found["sampling"]["ours"]) == len(found["sampling"]["theirs"]) == 1


def test_the_speed_of_a_stage_is_the_median_of_its_updates_after_the_first(monkeypatch, capsys):
    """Rates are those of this machine at this moment, so made up here: of each run update i has i + 1, of perflow a tenth."""
    runs = []

    def pretended(**options):
        runs.append((options["recipe"], options["windows"], options["batch"]))
        share = 0.1 if options["recipe"] == "perflow" else 1
        return dict(rates=[share * (i + 1) for i in range(options["updates"])])
    monkeypatch.setattr(bench, "run_training", pretended)
    rows = bench.speed(bench.Config(batch=8, updates=3), "cpu")
    stages = [[8], [8, 4], [4, 2], [2, 1]]
    assert runs == [(name, windows, 8) for name in ("default", "proreflow", "perflow") for windows in stages]
    assert rows["default"] == {8: 3, 4: 7, 2: 7, 1: 7}                            # of 2, 3, 4; after a stage of four of 6, 7, 8
    assert "| perflow | 0.3 | 0.7 | 0.7 | 0.7 |" in capsys.readouterr().out


def test_the_speed_is_measured_in_the_loop():
    found = run(model="tiny", data="scenes", recipe="proreflow", windows=[4, 2], batch=4, updates=4, trajectories=1)
    assert len(found["rates"]) == found["updates"] == 4 and found["seconds"] == pytest.approx(sum(4 / rate for rate in found["rates"]))


# ---- full size -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sd15_trains_every_weight_with_ema_in_20_gib_and_the_loop_is_cheap():
    found = run(model="sd15", random_init=True, batch=1, updates=4, windows=[8, 4, 2, 1], trajectories=1, solver_steps=8,
                gradient_checkpointing=True)
    assert found["weights"]["network"] == found["weights"]["trained"] == 4 * 859_520_964
    assert not found["weights"]["online"] and found["updates"] == 4
    assert found["peak"] <= 20 * GIB
    inside = found["forward"] + found["backward"] + found["optimizer"]
    assert found["seconds"] - inside <= 0.05 * (found["forward"] + found["backward"])


@pytest.mark.slow
def test_sdxl_trains_a_lora_in_22_gib():
    found = run(model="sdxl", random_init=True, batch=1, updates=1, windows=[1], trajectories=1, solver_steps=8, lora=16, precision="bf16",
                gradient_checkpointing=True, size=512)
    assert found["weights"]["network"] - found["weights"]["trained"] // 1 >= 2 * 2_567_463_684
    assert found["peak"] <= 22 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("sd15", {}), ("sdxl", dict(lora=16, precision="bf16"))], ids=["sd15", "sdxl"])
def test_a_full_size_student_is_a_pipeline_that_stock_diffusers_samples_alike(tmp_path, name, changes):
    (tmp_path / "prompts.txt").write_text("a lighthouse at dawn\n")
    folder = train.main(train.Config(model=name, random_init=True, prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "run"), size=64,
                                     windows=[2], updates=1, batch=1, trajectories=1, solver_steps=8, grid_steps=0, gradient_checkpointing=True,
                                     device="cpu", **changes))
    assert (folder / export.LORA_FILE).exists() == bool(changes)
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    shape = models.latent_shape(stock, 64)
    with torch.no_grad():
        ours = sampler.generate(stock, models.as_model(stock), PROMPTS, SEEDS, sampler.time_grid(2, 2), size=64)
        theirs = stock(PROMPTS, num_inference_steps=2, guidance_scale=1, output_type="latent", latents=sampler.noise(SEEDS, shape),
                       height=64, width=64).images
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max().item())
