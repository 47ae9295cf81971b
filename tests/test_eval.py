"""Protocols end to end on small random models, COCO's of a few images and a feature network of six features; each column against a
direct computation; the same rows however they come about; what is refused."""
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run_two, slow
from diffusers import UNet2DConditionModel
from fake_cuda import fake_cuda
from PIL import Image
from safetensors.torch import save_file
from test_coco import make_coco

import eval as evaluation
import models
import sampler
import teacher
import train
from data import coco, scenes
from evaluation import judge as judging
from evaluation import measuring, metrics, protocols
from models import architectures, saved
from runtime import store
from runtime.cli import UserError
from tools import build

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
COUNT = 20                       # images of the fake COCO


class Colors(torch.nn.Module):
    """Stands in for Inception, asked as it is: 6 features, the mean colors of an image's upper and lower half."""

    def forward(self, images, return_features: bool = False):
        assert images.dtype == torch.uint8 and return_features
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), (2, 1)).flatten(1) / 255


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Straightness costs more than all the rest here."""
    monkeypatch.setattr(measuring, "STRAIGHTNESS_STEPS", 2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with COCO, an Inception, CLIPModels for any image and for 64 pixels, and a judge of eight features."""
    folder = tmp_path_factory.mktemp("parts")
    make_coco(folder / "coco", COUNT)
    torch.jit.script(Colors()).save(folder / "inception.pt")
    torch.manual_seed(0)
    tokenizer = build.make_tokenizer()
    clip = build.make_clip(tokenizer)
    for name in ("clip", "tiny-clip"):
        clip.save_pretrained(folder / name), tokenizer.save_pretrained(folder / name)
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="CLIPImageProcessor", do_resize=True, size=dict(shortest_edge=64), resample=3, do_center_crop=True,
        crop_size=dict(height=64, width=64), do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    (folder / "judge").mkdir()
    save_file(judging.Judge((8, 8, 8)).state_dict(), folder / "judge" / "judge.safetensors")
    return folder


def make_student(folder, kind, teacher_folder, seed=1):
    """A student as train.py leaves it, in another network than its teacher's."""
    architectures.build(kind, seed=seed, **SMALL[kind]).save_pretrained(folder)
    about = dict(method="reflow", windows=2, path="vp", teacher=str(teacher_folder), command="python train.py", config=dict(ema=0.999))
    (folder / "reflow.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def students(small_models, tmp_path_factory):
    """{"sd15", "sdxl": folder of a run with one student of two windows}."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: make_student(folder / kind / "student-2", kind, small_models[kind]).parent for kind in ("sd15", "sdxl")}


def options(parts, cache, protocol="coco2017-5k", **more):
    """A Config of few, small images."""
    coco_parts = dict(data=str(parts / "coco"), clip=str(parts / "clip"), inception=str(parts / "inception.pt"))
    own = dict(clip=str(parts / "tiny-clip"), judge=str(parts / "judge")) if protocol == "tiny" else coco_parts
    small = dict(size=32, n=16, real=18, steps=[2], ddim_steps=[1], teacher_steps=4, batch=8, paths=5)
    return protocols.Config(protocol=protocol, cache=str(cache), **(own | small | more))


@pytest.fixture(scope="module")
def judge(parts, small_models, tmp_path_factory):
    """An Evaluator of coco2017-5k, its teacher the small SD 1.5."""
    return measuring.Evaluator(options(parts, tmp_path_factory.mktemp("judge"), teacher=str(small_models["sd15"])))


def without_time(row):
    return {key: value for key, value in row.items() if key != "seconds_per_image"}


# ---- protocols -----------------------------------------------------------------------------------------------------


def test_protocols_are_what_their_names_say():
    found = protocols.PROTOCOLS
    assert list(found) == ["tiny", "pixel", "coco2017-5k", "sdxl-coco2017-5k", "coco2014-30k"]
    assert [(p.split, p.n, p.size, p.fid_size, p.rule) for p in found.values()] == [
        ("scenes", 2048, None, None, ""), ("scenes-by-group", 2048, 16, 64, ""), ("val2017", 5000, 512, None, "first"),
        ("val2017", 5000, 1024, None, "first"),
        ("val2014", 30000, None, 256, "seeded")]
    assert [p.network for p in found.values()] == ["judge", "judge", *["inception"] * 3]
    assert all(p.clip == "laion/CLIP-ViT-g-14-laion2B-s12B-b42K" for p in found.values() if p.network == "inception")
    assert found["tiny"].guidance == found["pixel"].guidance == 1 and found["sdxl-coco2017-5k"].teacher == "sdxl"


@pytest.mark.parametrize("protocol, kind, size, items", [
    ("coco2017-5k", "sd15", 32, ["split: COCO val2017", "captions: the first caption of each image",
                                 "resize: shorter side to 32, Lanczos (Pillow), of real images;"]),
    slow("coco2014-30k", "sd15", None, ["split: COCO val2014", "captions: one caption of each image drawn at random",
                                    "size: 32 pixels as generated, 256 as both networks see them",
                                    "resize: shorter side to 256, Lanczos (Pillow), of real and generated images"]),
    slow("sdxl-coco2017-5k", "sdxl", 32, ["split: COCO val2017", "captions: the first caption of each image"])])
def test_a_coco_protocol_runs_to_its_end_and_its_string_says_all(
        parts, students, small_models, tmp_path, capsys, protocol, kind, size, items):
    run = shutil.copytree(students[kind], tmp_path / "run")
    c = options(parts, tmp_path / "cache", protocol, run=str(run), size=size, n=14, real=16, solvers=["ddim", "heun"], ddim_steps=[2],
                save_images=str(tmp_path / "images"))
    result = evaluation.main(c)
    assert result == json.loads((run / "results.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    columns = ("method", "windows", "steps", "solver", "nfe", "nfe_pairs_as_one")
    assert [tuple(row[column] for column in columns) for row in result["rows"]] == [
        ("teacher", None, 4, "ddim", 8, 4), ("ddim", None, 2, "ddim", 4, 2), ("heun", None, 2, "heun", 6, 3),
        ("reflow", 2, 2, "ddim", 4, 2)]
    assert rows["teacher"]["fd_teacher_corrected"] < 1e-6 and rows["teacher"]["endpoint_error"] < 1e-6 < rows["reflow"]["endpoint_error"]
    assert [len(row["straightness"]) for row in rows.values()] == [len(row["chord_error"]) for row in rows.values()] == [4, 2, 2, 2]
    for row in rows.values():
        assert row["fd_interval"][0] < row["fd_corrected"] < row["fd_interval"][1] and row["seconds_per_image"] > 0 and row["guidance"] == 1.5
        assert row["fd"] > 0 and row["cmmd"] > 0 and row["kid_std"] >= 0 and abs(row["clip"]) <= 100
    text = result["protocol"]["text"]
    for item in [*items, f"name: {protocol}", "n: 14", "real: 16", "crop: center", "6 features", "clip: clip;",
                 "features: inception, not the published Inception (SHA-256", "clip score: 100 x mean cosine",
                 "steps: teacher 4, plain 2, students 2",
                 "a guided pair is 2, in the column beside it 1", "guidance: 1.5", "scheduler: the model's own schedule", "solver: DDIM",
                 "solvers: ddim, heun", "seeds: 1000000 to 1000013", "dtype: fp32", "weights: running average (EMA 0.999)",
                 f"teacher: {small_models[kind]}", "commit: ", f"versions: torch {torch.__version__}, diffusers ", ", transformers ",
                 "unknown", "corrected: grouped jackknife", "trajectories: first 5 seeds", "endpoint error: root mean square"]:
        assert item in text, item
    sizes = [Image.open(file).size for file in (tmp_path / "images").rglob("*.png")]
    assert len(sizes) == 16 + 4 * 14 and set(sizes) == {(256, 256) if protocol == "coco2014-30k" else (32, 32)}
    assert len(result["image_and_caption_ids"].split()) == 14 and result["image_and_caption_ids"].split()[0].count("/") == 1
    printed = capsys.readouterr().out
    whole = (run / "results.md").read_text()
    assert evaluation.table(result, brief=True) in printed and whole == evaluation.table(result) and text in whole
    assert (run / "grid.png").stat().st_size > 1000 and "| teacher | - | 4 | 8 | 4 | " in whole
    assert "FD corrected (95%)" in printed and "(not FID)" in printed                       # stand-in, not Inception


def test_tiny_runs_end_to_end_on_a_trained_run_and_a_second_call_makes_nothing_anew(random_sd, parts, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train.main(train.Config(model=str(random_sd), data="scenes", batch=2, trajectories=2, solver_steps=8, out=str(run), name="proreflow",
                            windows=[2, 1], updates=2, grid_steps=0))
    c = options(parts, tmp_path / "cache", "tiny", run=str(run), n=80, real=80, steps=[1, 2], teacher_steps=2, size=None, paths=4, batch=64)
    result = evaluation.main(c)
    assert [(row["method"], row["windows"], row["steps"]) for row in result["rows"]] == [
        ("teacher", None, 2), ("ddim", None, 1), ("proreflow", 2, 2), ("proreflow", 1, 1), ("proreflow", 1, 2)]
    for row in result["rows"]:
        assert row["fd_interval"][0] <= row["fd_corrected"] <= row["fd_interval"][1] and row["nfe"] == row["nfe_pairs_as_one"] == row["steps"]
    assert abs(result["rows"][0]["fd_teacher_corrected"]) < 1e-6
    assert "| teacher | - | 2 |" in (run / "results.md").read_text() and "image_and_caption_ids" not in result
    for item in ("held-out pairs included", "features: judge, 8 features", "clip: tiny-clip", "resize: none", "prompt accuracy: share of the prompts"):
        assert item in result["protocol"]["text"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.sampler, "generate", None)         # only the picture is drawn again
        patch.setattr(evaluation, "picture", lambda *_: None)
        assert evaluation.main(c)["rows"] == result["rows"]


def test_what_the_judge_says_of_a_student_is_the_direct_computation(random_sd, parts, tmp_path):
    folder = shutil.copytree(random_sd, tmp_path / "student-2")
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    unet.save_pretrained(folder / "unet")
    (folder / "reflow.json").write_text(json.dumps(dict(method="reflow", windows=2, path="vp", teacher=str(random_sd))))
    c = options(parts, tmp_path / "cache", "tiny", teacher=str(random_sd), size=None, n=40, real=48, teacher_steps=2, paths=12, batch=8)
    evaluator = measuring.Evaluator(c)
    row, judged = evaluator.row(folder, 2), judging.Features(parts / "judge")
    plans, captions = measuring.real_plans(40, "prompts", "scenes")
    pictures = []
    for name, windows in ((folder, 2), (random_sd, 1)):
        pipeline, model, _ = saved.open_model(str(name))
        pictures.append(models.decode(pipeline, sampler.generate(pipeline, model, captions, range(1_000_000, 1_000_040),
                                                                 sampler.time_grid(2, windows), batch=8)))
    ours, theirs = pictures
    assert row["prompt_accuracy"] == pytest.approx(judged.accuracy(judged.images(ours), plans))
    assert row["picture_distance"] == pytest.approx(judged.distance(ours[:12], theirs[:12]).mean().item(), rel=1e-4)
    assert evaluator.row(random_sd, 2)["picture_distance"] == 0
    fresh, plans = measuring.real_images(40, "floor", "scenes")[0], measuring.real_plans(40, "floor", "scenes")[0]
    floor, real = evaluator.floor()["floor"], judged.images(measuring.real_images(48, "reference", "scenes")[0])
    assert floor["prompt_accuracy"] == pytest.approx(judged.accuracy(judged.images(fresh), plans))
    assert floor["fd_corrected"] == pytest.approx(metrics.mean_interval(metrics.frechet_groups(judged.images(fresh), real))[0], rel=1e-4)


def test_evaluation_pictures_are_fresh_and_hold_the_held_out_pairs():
    images, captions = measuring.real_images(200, "reference", "scenes")
    again, other = measuring.real_images(200, "reference", "scenes"), measuring.real_images(200, "prompts", "scenes")
    assert torch.equal(images, again[0]) and captions == again[1] != other[1]
    assert scenes.is_held_out(measuring.real_plans(200, "reference", "scenes")[0]).any()


# ---- columns, each against a direct computation --------------------------------------------------------------------


def test_every_column_is_the_direct_computation(judge, parts, students):
    folder, seeds, prompts = students["sd15"] / "student-2", range(1_000_000, 1_000_016), judge.prompts
    row = judge.row(folder, 4)
    pipeline, model, _ = saved.open_model(str(folder))
    z = sampler.generate(pipeline, model, prompts, seeds, sampler.time_grid(4, 2), 1.5, batch=8)
    images, network, clip = models.decode(pipeline, z), metrics.Inception(parts / "inception.pt"), metrics.Clip(parts / "clip")
    real = coco.Coco(parts / "coco", "val2017", "first", 18)
    reference = real.images(range(18), 32)
    assert prompts == real.captions[:16]
    ours, theirs, mine = metrics.moments(network.images(images)), metrics.moments(network.images(reference)), clip.images(images)
    assert row["fd"] == pytest.approx(metrics.frechet_distance(ours, theirs), rel=1e-5)
    groups = metrics.frechet_groups(network.images(images), network.images(reference))
    (mean, half), scale = metrics.mean_interval(groups), abs(row["fd"])
    assert row["fd_groups"] == pytest.approx(groups, rel=1e-4, abs=1e-4 * scale) and row["fd_corrected"] == pytest.approx(mean, abs=1e-4 * scale)
    assert row["fd_interval"] == pytest.approx([mean - half, mean + half], rel=1e-4, abs=1e-4 * scale)
    kid = metrics.kernel_distance(network.images(images), network.images(reference))
    assert (row["kid"], row["kid_std"]) == pytest.approx(kid, rel=1e-4, abs=1e-9)
    assert row["cmmd"] == pytest.approx(metrics.cmmd(mine, clip.images(reference)), rel=1e-4)
    assert row["clip"] == pytest.approx(metrics.clip_score(mine, clip.texts(prompts)), rel=1e-4)

    other, top, _ = saved.open_model(judge.c.teacher)
    times = sampler.time_grid(4)
    samples = sampler.generate(other, top, prompts, seeds, times, 1.5, batch=8)
    own = metrics.mean_interval(metrics.frechet_groups(network.images(images), network.images(models.decode(other, samples))))[0]
    assert row["fd_teacher_corrected"] == pytest.approx(own, rel=1e-4, abs=1e-4 * scale)
    assert row["endpoint_error"] == pytest.approx((z[:5] - samples[:5]).square().mean().sqrt().item(), rel=1e-4)
    texts = prompts[:5], [None] * 5
    (cond, uncond), (top_cond, top_uncond) = ([models.encode_text(one, text) for text in texts] for one in (pipeline, other))
    noise, visited = sampler.noise(seeds[:5], (4, 8, 8)), []
    assert row["straightness"] == pytest.approx(metrics.straightness(model, noise, cond, 2, 2, 1.5, uncond), rel=1e-4)
    end = sampler.ddim(top, noise, times, top_cond, 1.5, top_uncond, lambda state: visited.append(state["z"]))
    path = torch.stack([*visited, end], 1)
    assert row["chord_error"] == pytest.approx(metrics.chord_error(model, path, cond, 2, 1.5, uncond), rel=1e-4)
    assert (row["method"], row["windows"], row["nfe"], row["nfe_pairs_as_one"], row["solver"]) == ("reflow", 2, 8, 4, "ddim")


def test_measures_of_batches_are_those_of_all_trajectories(judge, parts, students, tmp_path):
    """Straightness and chord error are kept as means of batches of unequal size: 3 and 2 of 5."""
    other = measuring.Evaluator(dataclasses.replace(judge.c, batch=3, cache=str(tmp_path)))
    one, two = (each.row(students["sd15"] / "student-2", 2) for each in (judge, other))
    for column in ("straightness", "chord_error", "endpoint_error", "fd", "kid", "cmmd", "clip", "nfe"):
        assert two[column] == pytest.approx(one[column], rel=1e-3, abs=1e-6), column


def test_without_the_costly_columns_the_others_are_the_same_and_no_line_is_followed(judge, students, monkeypatch):
    whole = judge.row(students["sd15"] / "student-2", 2)
    for name in ("straightness", "chord_error", "kernel_distance", "cmmd"):
        monkeypatch.setattr(metrics, name, None)
    less = judge.row(students["sd15"] / "student-2", 2, costly=False)
    assert whole.keys() - less.keys() == {"kid", "kid_std", "cmmd", "straightness", "chord_error"}
    assert without_time(less) == {name: value for name, value in without_time(whole).items() if name in less}


@pytest.mark.parametrize("solver, steps, guidance", [("heun", 3, 1.5), slow("unipc", 3, 1.0), slow("dpmsolver++", 2, 0.0), ("lcm", 2, 2.0)])
def test_evaluations_are_counted_for_every_solver_and_a_pair_is_two(judge, solver, steps, guidance):
    row, once = judge.row(judge.c.teacher, steps, solver=solver, guidance=guidance), sampler.evaluations(solver, steps)
    assert (row["nfe_pairs_as_one"], row["nfe"]) == (once, once * (2 if guidance > 1 else 1))
    assert (row["method"], row["windows"], row["solver"], row["guidance"]) == ("teacher", None, solver, guidance)


@pytest.mark.parametrize("steps, windows", [slow(1, 1), (3, 1), (8, 8), slow(12, 4)])
def test_windows_of_a_teacher_are_what_its_steps_have_in_common_with_8(judge, steps, windows):
    row = judge.row(judge.c.teacher, steps)
    assert len(row["straightness"]) == windows
    assert row["chord_error"] is None if windows == 8 else len(row["chord_error"]) == windows          # the cached path has 4 steps


def test_what_is_not_installed_is_missed_before_any_image_is_made(students, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    monkeypatch.setattr(measuring, "Evaluator", None)
    with pytest.raises(UserError, match="KID: needs torchmetrics.*pip install"):
        evaluation.main(protocols.Config(run=str(students["sd15"])))


def test_a_device_without_float64_measures_what_the_cpu_does(judge, students, tmp_path):
    folder = str(students["sd15"] / "student-2")
    expected = judge.row(folder, 2)
    with fake_cuda("mps"):
        found = measuring.Evaluator(dataclasses.replace(judge.c, device="mps", cache=str(tmp_path))).row(folder, 2)
    for name in ("fd", "fd_corrected", "kid", "cmmd", "clip", "endpoint_error", "straightness"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_an_edit_changes_every_answer_and_its_name_the_row(judge, students):
    folder = students["sd15"] / "student-2"
    plain = judge.row(folder, 2)
    same = judge.row(folder, 2, edit=("nothing", lambda z, t, x_hat, eps_hat: (x_hat, eps_hat)))
    fog = judge.row(folder, 2, "fog", edit=("fog", lambda z, t, x_hat, eps_hat: (0 * x_hat, 0 * eps_hat)))
    assert without_time(same) == without_time(plain)
    assert fog["method"] == "fog" and fog["straightness"][1] == 0 < fog["straightness"][0] and fog["fd"] != plain["fd"]
    path = judge.path()[range(5)]["z"]
    assert fog["endpoint_error"] == pytest.approx(path[:, -1].square().mean().sqrt().item(), rel=1e-5)         # its end is 0
    seen = []

    def watch(z, t, x_hat, eps_hat):
        seen.append((z.shape[1:], t.shape))
        return x_hat, eps_hat
    judge.row(folder, 4, edit=("watch", watch))
    assert set(seen) == {((4, 8, 8), (8,)), ((4, 8, 8), (5,))}


def test_images_without_a_caption_do_not_enter_the_clip_score(random_sd, parts, tmp_path):
    c = options(parts, tmp_path, "tiny", teacher=str(random_sd), size=None, n=80, real=80, teacher_steps=1, paths=1, batch=64)
    judge = measuring.Evaluator(c)
    rows, given = judge.teacher_rows[range(80)]["clip"], [i for i, prompt in enumerate(judge.prompts) if prompt]
    expected = metrics.clip_score(rows[given], judge.clip.texts([judge.prompts[i] for i in given]))
    assert judge.row(random_sd, 1)["clip"] == pytest.approx(expected, rel=1e-6) and 0.8 < len(given) / 80 < 1
    assert judge.prompts == measuring.real_plans(80, "prompts", "scenes")[1]
    assert torch.allclose(judge.reference["clip"], judge.clip.images(measuring.real_images(80, "reference", "scenes")[0]), atol=1e-5)


# ---- the same rows however they come about -------------------------------------------------------------------------


def test_rows_are_the_same_on_one_process_and_two(parts, students, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "SHARD", 8)                     # 3 shards, so that two processes share them
    script = tmp_path / "shards.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport eval\nfrom evaluation import measuring\n"
                      "measuring.SHARD, measuring.STRAIGHTNESS_STEPS = 8, 2\n"
                      "eval.cli.run(eval.main, eval.Config, '')\n")
    for run in ("one", "two"):
        shutil.copytree(students["sd15"], run)
    c = options(parts, "cache-one", run="one", n=COUNT, real=COUNT, teacher_steps=2, batch=4, paths=6)
    one = evaluation.main(c)
    names = ("protocol", "data", "clip", "inception", "size", "n", "real", "batch", "paths")
    arguments = [f"--{name}={getattr(c, name)}" for name in names]
    arguments += ["--steps=2", "--ddim-steps=1", "--teacher-steps=2", "--cache=cache-two"]
    done = run_two([str(script), "two", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| teacher |") == 1                    # the first process alone prints
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [without_time(row) for row in one["rows"]] == [without_time(row) for row in two["rows"]]
    assert one["image_and_caption_ids"] == two["image_and_caption_ids"]
    assert one["protocol"]["text"].split("; commit: ")[0] == two["protocol"]["text"].split("; commit: ")[0]
    left, right = (sorted(str(file.relative_to(cache)) for file in cache.rglob("*.*")) for cache in map(Path, ("cache-one", "cache-two")))
    assert left == right and any(name.startswith("student-2-2-ddim-") and name.endswith("00002.safetensors") for name in left)


def test_each_process_makes_every_other_shard(judge, students, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SHARD", 4)
    folder, each = students["sd15"] / "student-2", copy.copy(judge)
    each.c, each.processes = dataclasses.replace(judge.c, cache=str(tmp_path)), (0, 2, lambda: None)
    with pytest.raises(FileNotFoundError):                          # the other's are not there yet
        each.features(folder, 2)
    assert sorted(file.name for file in tmp_path.rglob("*.safetensors")) == ["00000.safetensors", "00002.safetensors"]
    each.processes = 1, 2, lambda: None
    rows = each.features(folder, 2)[range(16)]
    assert torch.allclose(rows["clip"], judge.features(folder, 2)[range(16)]["clip"], atol=1e-4)


def test_image_i_has_its_own_seed_whatever_the_batch_and_the_number_of_images(judge, students, tmp_path):
    folder = students["sd15"] / "student-2"
    rows = judge.features(folder, 2)[range(16)]
    other = measuring.Evaluator(dataclasses.replace(judge.c, batch=5, n=18, cache=str(tmp_path)))
    more = other.features(folder, 2)[range(18)]
    for key in ("inception", "clip"):
        assert torch.allclose(rows[key], more[key][:16], atol=1e-4)
    shifted = measuring.Evaluator(dataclasses.replace(judge.c, seed=1_000_001, cache=str(tmp_path)))
    assert not torch.allclose(rows["inception"], shifted.features(folder, 2)[range(16)]["inception"], atol=1e-4)


def test_an_interrupted_row_goes_on_where_it_was_and_comes_out_the_same(judge, students, tmp_path, monkeypatch):
    folder, decode, calls = students["sd15"] / "student-2", models.decode, []
    monkeypatch.setattr(measuring, "SHARD", 4)
    other = measuring.Evaluator(dataclasses.replace(judge.c, batch=4, cache=str(tmp_path)))
    whole = other.features(folder, 3)[range(16)]
    shutil.rmtree(next(tmp_path.glob("student-2-3-*")))

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*arguments)
    monkeypatch.setattr(models, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        other.features(folder, 3)
    shards = {file: file.stat().st_mtime_ns for file in next(tmp_path.glob("student-2-3-*")).glob("*.safetensors")}
    assert len(shards) == 2
    rows = other.features(folder, 3)[range(16)]
    assert len(calls) == 5 and all(file.stat().st_mtime_ns == age for file, age in shards.items())
    assert all(torch.equal(rows[key], whole[key]) for key in ("inception", "clip", "evaluations"))


def test_a_retrained_student_has_rows_of_its_own(judge, small_models, tmp_path):
    folder = make_student(tmp_path / "student-2", "sd15", small_models["sd15"], seed=2)
    before = judge.row(folder, 2)
    make_student(folder, "sd15", small_models["sd15"], seed=3)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    after = judge.row(folder, 2)
    assert before["fd"] != after["fd"] and before["straightness"] != after["straightness"]
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "student-2")
    assert judge.row(moved, 2) == after                             # weights decide, not where they lie; even the seconds are the same


@pytest.mark.parametrize("change", [slow(dict(seed=7)), slow(dict(guidance=2.0)), slow(dict(dtype="bf16")), dict(size=24)], ids=str)
def test_other_settings_are_other_rows(judge, tmp_path, change):
    other = measuring.Evaluator(dataclasses.replace(judge.c, **change))
    for find in (lambda e: e.teacher_rows[range(16)]["inception"], lambda e: e.trajectories(e.c.teacher, 2)[range(5)]["straightness"]):
        assert not torch.allclose(find(other), find(judge), atol=1e-6)
    assert torch.equal(other.reference["clip"], judge.reference["clip"]) == ("size" not in change)


def test_rows_are_named_after_all_that_decides_them(judge, students):
    """dtype too: weights that are stored in half precision are the same in both."""
    folder, given = str(students["sd15"] / "student-2"), dict(steps=2, solver="ddim", guidance=1.5, edit=None, count=16)
    other = copy.copy(judge)
    other.c = dataclasses.replace(judge.c, dtype="fp16")
    changes = [{}, dict(steps=3), dict(solver="heun"), dict(guidance=1.0), dict(edit=("a", None)), dict(edit=("b", None)), dict(count=15)]
    found = [judge.settings(folder, **given | change) for change in changes] + [other.settings(folder, **given)]
    assert len({json.dumps(settings) for settings in found}) == len(changes) + 1
    assert json.dumps(found[4]["edit"]) == '"a"'


def test_other_real_images_are_another_reference(judge, parts, tmp_path):
    folder = shutil.copytree(parts / "coco", tmp_path / "coco")
    Image.new("RGB", (50, 40), "red").save(folder / "val2017" / f"{103:012d}.jpg")
    other = measuring.Evaluator(dataclasses.replace(judge.c, data=str(folder)))
    same = (other.reference["inception"] == judge.reference["inception"]).all(1).tolist()
    assert same == [i != 3 for i in range(18)]


def test_saved_images_are_those_that_were_measured(judge, parts, students, tmp_path):
    kept = measuring.Evaluator(dataclasses.replace(judge.c, save_images=str(tmp_path / "images")))
    rows = kept.features(students["sd15"] / "student-2", 2)[range(16)]
    network = metrics.Inception(parts / "inception.pt")
    for name, count, features in (("reference", 18, kept.reference["inception"]), ("student-2-2-ddim", 16, rows["inception"])):
        files = sorted(next((tmp_path / "images").glob(f"{name}-*")).iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(count)]
        assert torch.equal(network.images(coco.tensor(Image.open(file) for file in files)), features)
    assert torch.equal(rows["inception"], judge.features(students["sd15"] / "student-2", 2)[range(16)]["inception"])


def test_a_guide_stands_in_for_no_text_in_every_row_and_is_part_of_its_name(judge, small_models, tmp_path):
    def like_the_teacher(name, seed):
        folder = shutil.copytree(small_models["sd15"], tmp_path / name)
        architectures.build("sd15", seed=seed, **SMALL["sd15"]).unet.save_pretrained(folder / "unet")
        return folder
    weak, weaker, folder = like_the_teacher("weak", 3), like_the_teacher("weaker", 4), like_the_teacher("student-2", 5)
    (folder / "reflow.json").write_text(json.dumps(dict(method="reflow", windows=2, teacher=judge.c.teacher)))
    led = measuring.Evaluator(dataclasses.replace(judge.c, guide=str(weak), guidance=2.0))
    row = led.row(folder, 4)
    assert (row["nfe"], row["nfe_pairs_as_one"], row["guidance"]) == (8, 4, 2.0)

    def sample(name, times):
        (pipeline, model, _), (_, guide, _) = map(saved.open_model, map(str, (name, weak)))
        both, seeds = teacher.guided(model, guide), range(1_000_000, 1_000_016)
        return pipeline, sampler.generate(pipeline, both, led.prompts, seeds, times, 2.0, batch=8)
    (pipeline, z), (_, ends) = sample(folder, sampler.time_grid(4, 2)), sample(judge.c.teacher, sampler.time_grid(4))
    features = led.features(folder, 4)[range(16)]["inception"]
    assert torch.allclose(features, led.network.images(models.decode(pipeline, z)), atol=2e-3)
    assert row["endpoint_error"] == pytest.approx((z[:5] - ends[:5]).square().mean().sqrt().item(), rel=1e-4)

    given = dict(steps=2, solver="ddim", guidance=2.0, edit=None, count=16)
    other = copy.copy(led)
    other.c = dataclasses.replace(led.c, guide=str(weaker))
    names = [json.dumps(each.settings(str(folder), **given)) for each in (judge, led, other)]
    assert len(set(names)) == 3 and "guide\":" not in names[0] and str(weak) not in names[1]      # weights decide, not where they lie
    text = evaluation.table(dict(protocol=led.describe([]), rows=[row]))
    assert f"guidance 2 by {weak} instead of no text; DDIM" in text and f"guidance: 2; guide: {weak} instead of no text; scheduler" in text
    assert "guide:" not in evaluation.table(dict(protocol=judge.describe([]), rows=[row]))


# ---- tables --------------------------------------------------------------------------------------------------------


def test_only_the_published_inception_makes_a_fid(judge, parts, students, monkeypatch):
    row = judge.row(students["sd15"] / "student-2", 2)
    text = evaluation.table(dict(protocol=judge.describe([]), rows=[row]))
    assert "| FD corrected (95%) | FD | FD to teacher, corrected | KD x 1000 |" in text
    assert "\nFD: Frechet distance on inception, not the published" in text
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256((parts / "inception.pt").read_bytes()).hexdigest())
    published = measuring.Evaluator(judge.c)
    text = evaluation.table(dict(protocol=published.describe([]), rows=[row]))
    assert "| FID corrected (95%) | FID | FID to teacher, corrected | KID x 1000 |" in text
    assert "\nFID: Frechet distance on Inception 2015-12-05, 6 features, corrected" in text
    assert evaluation.table(dict(protocol=published.describe([]), rows=[row]), brief=True).startswith(
        "| method | windows | steps | FID corrected (95%) | FID | CLIP score |\n")


def test_a_table_leaves_open_what_is_not_known(judge, students):
    few = measuring.Evaluator(dataclasses.replace(judge.c, n=13, teacher_steps=3))
    row = few.row(students["sd15"] / "student-2", 2)
    text = evaluation.table(dict(protocol=few.describe([dict(config=dict(ema=0.0)), {}]), rows=[row]))
    assert row["chord_error"] is None and f"| {row['straightness'][0]:.3f} {row['straightness'][1]:.3f} | - | " in text
    assert "weights: raw, unknown;" in text and "corrected: grouped jackknife, 20 groups" in text and "halves" not in text


def test_a_printed_table_fits_a_terminal(judge, students):
    row = dict(judge.row(students["sd15"] / "student-2", 2), run="proreflow-seed-3")
    lines = evaluation.table(dict(protocol=judge.describe([]), rows=[row]), brief=True).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert lines[0] == "| method | windows | steps | FD corrected (95%) | CLIP score | s/image |"
    assert max(map(len, table)) <= 100 and len(table) == 3 and "Protocol" not in "".join(lines)


def test_several_runs_of_one_recipe_are_named_and_in_order(judge, parts, students, tmp_path, capsys):
    """Whatever the order of the folders on the disk: by the run's name, the run itself first."""
    for name in ("seed-2", "seed-10", ".", "seed-1"):
        shutil.copytree(students["sd15"] / "student-2", tmp_path / "runs" / name / "student-2")
    evaluation.main(dataclasses.replace(judge.c, run=str(tmp_path / "runs"), steps=[2], ddim_steps=[1]))
    result = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [row["run"] for row in result["rows"]] == ["", "", "", "seed-1", "seed-2", "seed-10"]
    methods = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert methods == ["method", "teacher", "ddim", "reflow", "reflow (seed-1)", "reflow (seed-2)", "reflow (seed-10)"]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (dict(n=6), r"--n 6: must be at least 8 for a Frechet distance on the 6 features of inception, not the published"),
    (dict(real=6), r"--real 6: must be at least 8 for a Frechet distance"),
    (dict(n=COUNT + 1), rf"--data .*: {COUNT} captioned images in val2017, and {COUNT + 1} are asked for"),
    (dict(protocol="coco2017"), r"--protocol coco2017: not one of tiny, .*; did you mean coco2017-5k\?"),
    (dict(data=""), r"--protocol coco2017-5k: needs COCO; give --data FOLDER, with annotations/captions_val2017.json and val2017 in it"),
    (dict(protocol="tiny"), r"--data .*: --protocol tiny has its own images; leave it out"),
    (dict(judge="assets/judge"), "--judge assets/judge: it knows the embedded scenes alone, --protocol coco2017-5k has other pictures"),
    (dict(data="nowhere"), r"--data nowhere: annotations/captions_val2017.json cannot be read"),
    (dict(solvers=["ddmi"]), r"--solver ddmi: not one of ddim, .*; did you mean ddim\?"),
    (dict(dtype="fp8"), r"--dtype fp8: not one of fp32, bf16, fp16"),
    (dict(seed=-1), r"--seed -1: must be at least 0"), (dict(guidance=-1.0), r"--guidance -1.0: must be at least 0"),
    (dict(batch=0), r"--batch 0: must be at least 1"), (dict(paths=0), r"--paths 0: must be at least 1"),
    (dict(steps=[0]), r"--steps 0: must be at least 1"),
    (dict(ddim_steps=[1, 0]), r"--ddim-steps 0: must be at least 1"), (dict(teacher_steps=0), r"--teacher-steps 0: must be at least 1"),
    (dict(size=30), r"--size 30: must be a multiple of 8"), (dict(teacher="nowhere"), r"--model nowhere: no diffusers pipeline there"),
    (dict(guide="nowhere"), r"--guide nowhere: no diffusers pipeline there"),
    (dict(guide="nowhere", guidance=1.0), r"--guide nowhere: not used at --guidance 1; give another --guidance"),
    (dict(clip="nowhere"), r"--clip nowhere: no CLIPModel folder there"),
    (dict(inception="nowhere"), r"--inception nowhere: cannot be read"),
    (dict(device="tpu"), r"--device tpu: not one of cpu, cuda")], ids=str)
def test_what_cannot_be_measured_is_refused_in_one_line(judge, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        measuring.Evaluator(dataclasses.replace(judge.c, cache=str(tmp_path), **change))


def test_tiny_wants_ten_images_a_feature(parts, tmp_path):
    with pytest.raises(UserError, match="--n 39: must be at least 40 for a Frechet distance on the 8 features of judge"):
        measuring.Evaluator(options(parts, tmp_path, "tiny", n=39, real=80))


def test_a_run_without_students_or_of_two_teachers_is_refused(parts, students, tmp_path, monkeypatch):
    c = options(parts, tmp_path / "cache")
    for run, message in (("", "no run: give the folder"), ("nowhere", "nowhere: give the folder"), (str(tmp_path), "no finished student")):
        with pytest.raises(UserError, match=message):
            evaluation.main(dataclasses.replace(c, run=run))
    for name in ("a", "b"):
        (tmp_path / name / "student-2").mkdir(parents=True)
        (tmp_path / name / "student-2" / "reflow.json").write_text(json.dumps(dict(teacher=name, windows=2, method="reflow")))
    with pytest.raises(UserError, match=r"students of several teachers \(a, b\); evaluate their runs one by one"):
        evaluation.main(dataclasses.replace(c, run=str(tmp_path)))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="nothing may be written there; permit it"):      # before all images
        patch.setattr(os, "access", lambda folder, mode: Path(folder) != tmp_path)
        evaluation.main(dataclasses.replace(c, run=str(tmp_path)))
    for broken, reason in (("{", "JSONDecodeError"), ("[]", "AttributeError"), ("{}", "KeyError: 'teacher'")):
        (tmp_path / "a" / "student-2" / "reflow.json").write_text(broken)
        with pytest.raises(UserError, match=rf"student-2/reflow.json: broken \({reason}.*\); train the student again or restore the file"):
            evaluation.main(dataclasses.replace(c, run=str(tmp_path / "a")))


def test_a_student_exported_early_is_measured_like_the_others(judge, students, tmp_path):
    """Its folder's name tells no number of windows, its reflow.json does."""
    for name in ("student-early", "student-2"):
        shutil.copytree(students["sd15"] / "student-2", tmp_path / name)
    evaluation.main(dataclasses.replace(judge.c, run=str(tmp_path), steps=[2, 2], ddim_steps=[1, 1]))        # none twice
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["windows"] for row in rows] == [None, None, 2, 2]
    assert sorted(row["student"] for row in rows) == ["", "", "student-2", "student-early"]


def test_rows_at_steps_or_a_guidance_that_students_were_not_made_for_are_doubted(tmp_path, monkeypatch, capsys):
    for windows, learned in ((3, 3.0), (2, 1.0)):
        folder = tmp_path / f"student-{windows}"
        folder.mkdir()
        info = dict(teacher="tiny", windows=windows, method="reflow", config=dict(guidance_teacher=learned))
        (folder / "reflow.json").write_text(json.dumps(info))

    class Begun(Exception):
        pass

    def begin(*_):
        raise Begun
    monkeypatch.setattr(measuring, "Evaluator", lambda c, *_: SimpleNamespace(
        c=c, features=begin, guidance=lambda folder: 1.0 if "student-3" in folder else c.guidance))
    for guidance, doubts in ((1.0, 1), (1.5, 1), (3.0, 3)):
        with pytest.raises(Begun):
            evaluation.main(protocols.Config(run=str(tmp_path), steps=[2, 4], guidance=guidance, device="cpu"))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(said) == doubts and f"warning: 4 steps: {tmp_path}/student-3 has 3 windows" in "".join(said)
        assert sum(f"warning: guidance 3: {tmp_path}/student-2 has learned none" in line for line in said) == doubts - 1
    with pytest.raises(UserError, match=r"several --guidance-teacher \(1.0, 3.0\)"):
        evaluation.main(protocols.Config(run=str(tmp_path), steps=[2, 4], device="cpu"))


def test_students_of_several_sizes_need_a_protocol_that_says_one(tmp_path, monkeypatch):
    for windows in (4, 2):
        (tmp_path / f"student-{windows}").mkdir()
        info = dict(teacher="sd15", windows=windows, method="reflow", config=dict(size=64 * windows))
        (tmp_path / f"student-{windows}" / "reflow.json").write_text(json.dumps(info))

    class Begun(Exception):
        pass

    def begin(*_):
        raise Begun
    monkeypatch.setattr(measuring, "Evaluator", begin)
    with pytest.raises(Begun):
        evaluation.main(protocols.Config(run=str(tmp_path), protocol="coco2017-5k", data="x", device="cpu"))
    with pytest.raises(UserError, match=r"several --size \(128, 256\)"):
        evaluation.main(protocols.Config(run=str(tmp_path), protocol="coco2014-30k", data="x", device="cpu"))


def test_a_teacher_is_called_at_the_guidance_that_its_students_have_learned_and_they_at_none(parts, small_models, tmp_path):
    """Guidance 3 of the teacher beside a student that has 3 in it: on top of it another would come."""
    folder = tmp_path / "run" / "student-2"
    make_student(folder, "sd15", small_models["sd15"])
    info = json.loads((folder / "reflow.json").read_text()) | dict(config=dict(ema=0.999, guidance_teacher=3.0))
    (folder / "reflow.json").write_text(json.dumps(info))
    c = options(parts, tmp_path / "cache", run=str(tmp_path / "run"), teacher=str(small_models["sd15"]), ddim_steps=[2])
    result = evaluation.main(c)
    assert [(row["method"], row["guidance"], row["nfe"]) for row in result["rows"]] == [
        ("teacher", 3.0, 8), ("ddim", 3.0, 4), ("reflow", 1.0, 2)]
    judge = measuring.Evaluator(dataclasses.replace(c, guidance=3.0))
    assert judge.guidance(folder) == 1 and judge.guidance(c.teacher) == 3
    assert judge.row(folder, 2)["fd"] == result["rows"][-1]["fd"] != judge.row(folder, 2, guidance=3.0)["fd"]
    assert (tmp_path / "run" / "grid.png").exists() and "guidance 3, 1 for students that have learned theirs" in evaluation.table(result)
    drawn = measuring.Evaluator(c, student=dict(config=dict(guidance_range=[2.0, 4.0])))
    assert drawn.c.guidance == 3 and drawn.teacher_path[range(5)]["z"].equal(judge.teacher_path[range(5)]["z"])


def test_nothing_is_generated_before_a_mistake_is_found(judge, tmp_path):
    with pytest.raises(UserError):
        measuring.Evaluator(dataclasses.replace(judge.c, cache=str(tmp_path), n=6))
    assert not list(tmp_path.iterdir())


def test_what_a_user_gives_overrides_the_protocol():
    c, protocol = protocols.resolve(protocols.Config(protocol="coco2014-30k", data="x"))
    assert (c.n, c.real, c.guidance, c.size, c.teacher, c.batch, c.clip) == (30000, 30000, 1.5, None, "sd15", 16, protocols.VIT_G)
    given = dict(n=3, guidance=0.0, size=64, teacher="y", clip="z", paths=1, batch=2)
    c, _ = protocols.resolve(protocols.Config(protocol="sdxl-coco2017-5k", data="x", **given))
    assert (c.n, c.real, c.guidance, c.size, c.teacher, c.batch, c.clip, c.paths) == (3, 5000, 0.0, 64, "y", 2, "z", 1)
    assert protocol.note and np.isfinite(protocol.guidance) and store.digest(protocol)


def test_the_picture_is_of_one_run_and_of_others_what_it_has_no_student_for(monkeypatch, tmp_path):
    def columns(*students):
        """The titles of the picture of a folder with these students: (method, windows, steps, run)."""
        plan = [("teacher", None, 32, "t", "ddim", ""), ("ddim", None, 1, "t", "ddim", ""),
                *((method, windows, steps, f"{run}/{windows}", "ddim", run) for method, windows, steps, run in students)]
        titles = []
        monkeypatch.setattr(evaluation.imaging, "contact_sheet", lambda rows, found, labels: titles.extend(found) or Image.new("RGB", (8, 8)))
        evaluation.picture(evaluator, plan, tmp_path / "grid.png")
        return [title.replace("\n", " ") for title in titles[2:]]
    evaluator = SimpleNamespace(
        c=SimpleNamespace(solvers=["ddim"], batch=8, size=None), prompts=["fox"], protocol=SimpleNamespace(split="own"),
        guidance=lambda folder: 1.0, open=lambda folder: (SimpleNamespace(vae_scale_factor=8), SimpleNamespace(schedule=None), {"windows": 1}))
    monkeypatch.setattr(evaluation.sampler, "generate", lambda *args, **kwargs: torch.zeros(1, 4, 2, 2))
    monkeypatch.setattr(evaluation.models, "decode", lambda pipeline, z: torch.zeros(1, 3, 16, 16))
    both = [("default", 4, 4, ""), ("default", 2, 2, ""), ("matched", 1, 1, "matched"), ("matched", 1, 4, "matched")]
    assert columns(*both) == ["default 4 steps", "default 2 steps", "matched 1 step"]
    assert columns(*both, ("default", 1, 1, ""), ("default", 1, 4, "")) == ["default 4 steps", "default 2 steps", "default 1 step"]
    assert columns(("reflow", 1, 1, "seed-0"), ("reflow", 1, 4, "seed-0"), ("reflow", 1, 1, "seed-1")) == ["reflow 1 step"]


def test_a_protocol_tells_which_networks_have_looked(judge, monkeypatch):
    """By their weights: two judges of one name and width are two."""
    before = judge.describe([])["networks"]
    assert judge.describe([])["networks"] == before
    monkeypatch.setitem(judge.networks, "judge", "other weights")
    assert judge.describe([])["networks"] != before
