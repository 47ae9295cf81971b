"""Where pairs come from: against the teacher run by hand, whatever the batching, the cache or the reuse."""
import gc
import json
import shutil
import weakref

import numpy as np
import ot
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from test_life import FLUX, SD3

import losses
import models
import reflow
import sampler
import teacher
import train
from models import architectures, conditions, load
from models.conditions import drawn_captions
from pairs import cache_bytes, cache_folder, drift
from runtime import cli, plan, seeds, store


def draw(file, seed):
    """Noise of a fixed size; as BMP, also in bytes."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(file)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        draw(folder / f"{i}.bmp", i)
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture
def make(small_models, photos, tmp_path):
    """make(**changes) -> (Pairs, recipe, pipeline) of a small SD 1.5, images from `photos`."""
    def build(**changes):
        options = dict(model=str(small_models["sd15"]), data=str(photos), out=str(tmp_path), trajectories=6, solver_steps=8, device="cpu")
        c = train.Config(**{**options, **changes})
        recipe = train.resolve_recipe(c)
        c, _, pipeline, pairs = train.open_pairs(c, recipe, torch.device("cpu"), (0, 1, lambda: None))
        return pairs, recipe, pipeline
    return build


def encoded(folder, pairs, captions):
    """Conditions of captions, indices into a dataset's, by the model in a folder."""
    return models.encode_text(load.load_pipeline(str(folder)), [pairs.dataset.captions[i] or None for i in captions])


def ends(pairs, numbers, windows=4, solver=None, steps=2):
    times, both, cond = pairs.ends(pairs.fetch(range(*numbers), windows), solver, steps)
    return *times, *both, cond


@pytest.mark.parametrize("changes", [dict(), dict(pairs="data"), dict(pairs="data", cache_latents=True), dict(pairs="data", reuse=2)],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_a_sample_is_the_same_in_any_batch(make, changes):
    pairs, _, pipeline = make(**changes)
    solver = models.as_model(pipeline)
    whole, parts = ends(pairs, (4, 12), solver=solver), [ends(pairs, (k, k + 2), solver=solver) for k in range(4, 12, 2)]
    for i in range(5):
        assert torch.allclose(whole[i], torch.cat([part[i] for part in parts]), atol=1e-5)
    for key, value in whole[5].items():
        assert torch.allclose(value, torch.cat([part[5][key] for part in parts]), atol=1e-5)
    assert not torch.allclose(whole[3][0], whole[3][2], atol=0.1)


def test_reused_pairs_share_their_window_and_differ_in_time(make):
    pairs, recipe, pipeline = make(pairs="data", reuse=3)
    asked = []
    solver = models.as_model(pipeline, lambda z, *_: None)
    solver.network = lambda z, timestep, **cond: asked.append(len(z)) or torch.zeros_like(z)
    t, t_start, t_end, z_start, z_end, cond = ends(pairs, (0, 12), solver=solver)
    assert asked == [4, 4]                                    # four pairs, two steps: not twelve
    assert torch.equal(z_start[0::3], z_start[1::3]) and torch.equal(z_end[0::3], z_end[2::3]) and torch.equal(t_start[0::3], t_start[1::3])
    assert all(len(value) == 12 for value in cond.values())
    assert ((t_end < t) & (t <= t_start)).all() and len(t.unique()) > 6
    # the places within the window follow the law: with `starts`, half are exactly at the start
    t, t_start, *_ = ends(pairs, (0, 600), solver=solver)
    assert 0.4 < (t == t_start).double().mean() < 0.6


def test_trajectories_are_solved_a_micro_batch_at_a_time_and_the_bar_moves_with_each(make, monkeypatch):
    moves, real = [], store.tqdm
    monkeypatch.setattr(store, "tqdm", type("Bar", (real,), {"update": lambda self, n=1: moves.append(n) or real.update(self, n)}))
    make(micro_batch=4)
    assert moves == [6, 4, 2]                                 # first the captions of all


def test_trajectories_are_the_teachers_own_and_carry_their_text(make, small_models):
    pairs, _, pipeline = make(text_dropout=0.5)
    captions = drawn_captions(pairs.c, pairs.dataset, range(6), "trajectory")
    text = encoded(small_models["sd15"], pairs, captions)
    assert 0 in captions and any(captions)
    rows = pairs.rows[range(6)]
    assert rows["caption"].tolist() == captions and rows.keys() == {"z", "caption"}
    for key, value in text.items():
        assert torch.allclose(pairs.text(captions)[key], value, atol=1e-6)
    z = torch.stack([torch.randn(pairs.shape, generator=seeds.generator(0, "noise", k)) for k in range(6)])
    with torch.no_grad():
        end = sampler.ddim(models.as_model(pipeline), z, sampler.time_grid(8), text)
    assert torch.equal(rows["z"][:, 0], z) and torch.allclose(rows["z"][:, -1], end, atol=1e-4)
    # re-solving one window from its cached start ends at its cached end
    times = torch.linspace(0.75, 0.5, 3, dtype=torch.float64)
    with torch.no_grad():
        middle = sampler.ddim(models.as_model(pipeline), rows["z"][:, 2], times, text)
    assert torch.allclose(middle, rows["z"][:, 4], atol=1e-4)
    # what a window is given are its two boundaries
    t, t_start, t_end, z_start, z_end, _ = ends(pairs, (0, 16), windows=2)
    every = rows["z"].flatten(0, 1)
    for i in range(16):
        first, second = ((every - z[i]).flatten(1).norm(dim=1).argmin().item() for z in (z_start, z_end))
        assert second - first == 4 and first % 9 == round((1 - t_start[i].item()) * 8)


def test_pairs_from_images_start_at_noised_latents_and_end_where_the_solver_says(make):
    pairs, _, pipeline = make(pairs="data", text_dropout=0.0)
    solver = models.as_model(pipeline)
    t, t_start, t_end, z_start, z_end, cond = ends(pairs, (0, 6), windows=4, solver=solver, steps=2)
    latents = models.encode(pipeline, pairs.dataset.images(range(6), 32))
    eps = torch.stack([torch.randn(pairs.shape, generator=seeds.generator(0, "eps", k)) for k in range(6)])
    alpha, sigma = (v.float()[:, None, None, None] for v in solver.schedule(t_start))
    assert torch.allclose(z_start, alpha * latents + sigma * eps, atol=1e-5)
    for i in range(6):
        times = torch.linspace(t_start[i], t_end[i], 3, dtype=torch.float64)
        with torch.no_grad():
            end = sampler.ddim(solver, z_start[i:i + 1], times, {key: value[i:i + 1] for key, value in cond.items()})
        assert torch.allclose(z_end[i:i + 1], end, atol=1e-4)


def test_cached_latents_are_the_same_pairs_and_a_dropped_caption_is_the_null_embedding(make, tmp_path):
    online, _, pipeline = make(pairs="data", text_dropout=0.5)
    stored, _, _ = make(pairs="data", text_dropout=0.5, cache_latents=True, cache=str(tmp_path / "latents"))
    solver = models.as_model(pipeline)
    a, b = (ends(pairs, (0, 12), solver=solver) for pairs in (online, stored))
    assert online.online and not stored.online
    for i in range(5):
        assert torch.allclose(a[i], b[i], atol=1e-4)
    dropped = [caption == 0 for caption in drawn_captions(stored.c, stored.dataset, range(12), "data")]
    null = stored.null["encoder_hidden_states"]
    assert any(dropped) and not all(dropped)
    for pairs in (a, b):
        assert [torch.allclose(row, null[0], atol=1e-5) for row in pairs[5]["encoder_hidden_states"]] == dropped


def test_guidance_moves_the_teachers_pairs(make):
    pairs, _, pipeline = make(pairs="data", guidance_teacher=4.0)
    plain, _, _ = make(pairs="data")
    solver = models.as_model(pipeline)
    assert not torch.allclose(ends(pairs, (0, 4), solver=solver)[4], ends(plain, (0, 4), solver=solver)[4], atol=1e-3)


@pytest.mark.parametrize("changes", [dict(pairs="student", windows=[8, 4]), dict(recipe="lcm"), dict(recipe="imitation", windows=[4]),
                                     dict(recipe="flow-map", windows=[4])], ids=["student", "consistency", "imitation", "flow-map"])
def test_guidance_enters_a_chain_of_students_once(make, changes):
    """Teacher: eps 1 with text, 0 without, so 4 at guidance 4. Its ideal student says 4 by itself, and pairs from it have 4, not 16."""
    pairs, recipe, pipeline = make(guidance_teacher=4.0, text_dropout=0.0, **changes)
    null = pairs.null["encoder_hidden_states"]

    def network(eps):
        def answer(z, timestep, encoder_hidden_states, **_):
            with_text = (encoder_hidden_states - null).flatten(1).abs().amax(1) > 1e-4
            return (eps * with_text.float())[:, None, None, None].expand_as(z)
        return answer
    solver = models.as_model(pipeline)
    student = models.as_model(pipeline, path=reflow.PATHS[recipe.path], windows=8)
    solver.network, student.network = network(1.0), network(4.0)
    for solving in (solver, student)[:1 if recipe.pairs in losses.TARGETS else 2]:
        (t, t_start, t_end), (z_start, z_end), _ = pairs.ends(pairs.fetch(range(6), 4), solving, 2, student)
        _, eps = reflow.chord(z_start, z_end, *([v.float()[:, None, None, None] for v in pairs.schedule(edge)] for edge in (t_start, t_end)))
        assert torch.allclose(eps, torch.full_like(eps, 4.0), atol=0.02)


def test_the_students_own_jump_stays_at_noise_that_the_network_knows(make):
    pairs, *_ , pipeline = make(recipe="lcm", solver_steps=4)
    asked, solver, student = [], models.as_model(pipeline), models.as_model(pipeline)
    solver.schedule = student.schedule = pairs.schedule = teacher.EDMSchedule(0.002, 80.0, 0.5)
    student.network = lambda z, timestep, **cond: asked.append(timestep) or z
    pairs.ends(pairs.fetch(range(64), 1), solver, 1, student)
    assert torch.cat(asked).min() == torch.tensor(0.002).log() / 4


# ---- captions, and guidance, of each sample ----------------------------------------------------------------------------


def test_distinct_captions_are_encoded_once_and_stored_once_whatever_draws_them(make, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("fox\nheart\n" + "\n".join(f"never drawn {i}" for i in range(300)))
    (tmp_path / "b.txt").write_text("fox\nheart\n")
    told, real = [], conditions.encode
    monkeypatch.setattr(conditions, "encode", lambda c, pipeline, texts, **part: told.extend(texts) or real(c, pipeline, texts, **part))
    pairs, *_ = make(data="", prompts=str(tmp_path / "b.txt"), trajectories=40, batch=40)
    asked = [text for text in told if text]
    assert sorted(set(told)) == ["", "fox", "heart"] and len(asked) == 2
    stored = [load_file(file) for file in (tmp_path / "cache" / "prompts").glob("*.safetensors")]
    assert [len(part["encoder_hidden_states"]) for part in stored] == [3]
    drawn = pairs.rows[range(40)]["caption"].tolist()
    assert {0, 1, 2} == set(drawn) and pairs.pipeline.text_encoder is None
    batch, rows = pairs.fetch(range(8), 1), pairs.rows[range(40)]
    for i in range(8):                                                                    # a sample has the text its trajectory was made with
        row = next(k for k in range(40) if torch.equal(rows["z"][k, 0], batch["z_start"][i]))
        assert torch.equal(batch["encoder_hidden_states"][i], pairs.text([drawn[row]])["encoder_hidden_states"][0])
    # more trajectories add captions to the end, and what was made stays
    few, *_ = make(data="", prompts=str(tmp_path / "a.txt"), cache=str(tmp_path / "more"), trajectories=2)
    many, *_ = make(data="", prompts=str(tmp_path / "a.txt"), cache=str(tmp_path / "more"), trajectories=8)
    assert len(many.conditions.captions) > len(few.conditions.captions) == len(set(few.conditions.captions))
    assert many.conditions.captions[:len(few.conditions.captions)] == few.conditions.captions


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_text_is_stored_in_the_precision_of_the_run_and_is_what_its_encoders_give(make, small_models, tmp_path, precision, dtype):
    """With LoRA and bf16 the encoders give bf16: nothing is lost. SDXL's sizes would be: they stay as they are."""
    pairs, *_ = make(model=str(small_models["sdxl"]), precision=precision, lora=2)
    file, = (tmp_path / "cache" / "prompts").glob("*.safetensors")
    assert {name: value.dtype for name, value in load_file(file).items()} == dict(encoder_hidden_states=dtype, text_embeds=torch.float32,
                                                                                 time_ids=torch.float32)
    captions = pairs.conditions.captions
    told = models.encode_text(load.load_pipeline(str(small_models["sdxl"]), dtype), [pairs.dataset.captions[i] or None for i in captions])
    for name, value in pairs.text(captions).items():
        assert value.dtype == torch.float32 and torch.equal(value, told[name])


def test_a_cache_of_the_layout_before_is_refused(make, tmp_path):
    make()
    manifest = tmp_path / "cache" / "trajectories" / "manifest.json"
    settings = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in settings.items() if key not in ("layout", "text")}))
    with pytest.raises(cli.UserError, match="made with other settings .*'layout': .'absent', 'captions apart'.*choose another folder or delete"):
        make()


def alive(pipeline):
    """Which of a pipeline's networks are in memory."""
    return [name for name in models.NETWORKS if getattr(pipeline, name, None) is not None
            and not next(getattr(pipeline, name).parameters()).is_meta]


def test_text_encoders_and_the_network_never_share_memory(small_models, photos, tmp_path, monkeypatch):
    opened, real = [], load.load_pipeline

    def watched(*args, **parts):
        assert not [ref for ref, _ in opened if ref() is not None and alive(ref())]         # the one before has gone
        opened.append((weakref.ref(pipeline := real(*args, **parts)), alive(pipeline)))
        return pipeline
    monkeypatch.setattr(load, "load_pipeline", watched)
    architectures.build("sd3", **SD3).save_pretrained(tmp_path / "sd3-model")
    for name, folder, options in (("sdxl", small_models["sdxl"], {}), ("sd15", small_models["sd15"], dict(pairs="data", cache_latents=True)),
                                  ("sd3", tmp_path / "sd3-model", dict(size=32))):
        c = train.Config(model=str(folder), data=str(photos), out=str(tmp_path / name), trajectories=2, solver_steps=8, device="cpu", **options)
        train.open_pairs(c, train.resolve_recipe(c), torch.device("cpu"), (0, 1, lambda: None))
        gc.collect()
        assert [names for _, names in opened] == {
            "sdxl": [[], ["text_encoder", "text_encoder_2"], ["unet", "vae"]], "sd15": [[], ["text_encoder"], ["unet", "vae"]],
            "sd3": [[], ["text_encoder"], ["text_encoder_2"], ["text_encoder_3"], ["vae", "transformer"]]}[name]
        opened.clear()


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encoders_run_one_after_the_other_give_the_bits_of_all_at_once(name, precision, tmp_path):
    """As models.encode_text, whose bits are those of the stock pipeline; what is read back is rounded to bf16 where it is stored so."""
    architectures.build(name, **dict(sd3=SD3, flux=FLUX)[name]).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("red heart on blue\na fox\n")
    c = train.Config(model=str(tmp_path / "model"), prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "out"), trajectories=8, size=32,
                     solver_steps=8, text_dropout=0.0 if name == "flux" else 0.1, precision=precision, device="cpu")
    *_, shown, pipeline, pairs = train.open_pairs(c, train.resolve_recipe(c), torch.device("cpu"), (0, 1, lambda: None))
    whole = load.load_pipeline(c.model)
    found = pairs.text([1, 2])
    expected = models.encode_text(whole, pairs.dataset.captions[1:3])
    stock = whole.encode_prompt(pairs.dataset.captions[1:3], *([None] * (2 if name == "sd3" else 1)), device="cpu",
                                **dict(sd3=dict(do_classifier_free_guidance=False), flux={})[name])
    assert torch.equal(expected["encoder_hidden_states"], stock[0])
    assert torch.equal(expected["pooled_projections"], stock[2 if name == "sd3" else 1])
    for key, value in expected.items():
        half = value.ndim == 3 and precision == "bf16"
        assert torch.equal(found[key], value.bfloat16().float() if half else value), key
    expected = models.encode_text(whole, shown.prompts)
    assert all(torch.equal(value, shown.cond(pipeline)[key]) for key, value in expected.items())


def test_a_guidance_of_each_trajectory_is_drawn_from_a_stream_of_its_own(make, small_models):
    pairs, _, pipeline = make(guidance_range=[4.0, 9.0])
    plain, *_ = make(cache=str(pairs.c.out) + "/plain")
    drawn, rows = pairs.drawn_guidance(range(600)), pairs.rows[range(6)]
    assert 4 <= drawn.min() < 4.1 and 8.9 < drawn.max() <= 9 and drawn.mean().item() == pytest.approx(6.5, abs=0.2)
    assert torch.equal(rows["z"][:, 0], plain.rows[range(6)]["z"][:, 0]) and torch.equal(rows["caption"], plain.rows[range(6)]["caption"])
    model, null = models.as_model(pipeline), encoded(small_models["sd15"], pairs, [0])
    for k in range(6):                                                                    # each by itself, at its own number
        cond = encoded(small_models["sd15"], pairs, [rows["caption"][k].item()])
        with torch.no_grad():
            end = sampler.ddim(model, rows["z"][k:k + 1, 0], sampler.time_grid(8), cond, drawn[k].item(), null)
        assert torch.allclose(rows["z"][k:k + 1, -1], end, atol=1e-3)
    assert pairs.fetch(range(4), 1).keys() == plain.fetch(range(4), 1).keys()             # the student is not told
    with pytest.raises(cli.UserError, match="made with other settings .*'guidance': ..4.0, 9.0., .4.0, 8.0.."):
        make(guidance_range=[4.0, 8.0])


def test_pairs_from_images_are_solved_at_a_guidance_of_their_own(make, small_models):
    pairs, _, pipeline = make(pairs="data", guidance_range=[2.0, 5.0], text_dropout=0.0)
    plain, *_ = make(pairs="data", text_dropout=0.0)
    solver, drawn = models.as_model(pipeline), pairs.drawn_guidance(range(4))
    t, t_start, t_end, z_start, z_end, cond = ends(pairs, (0, 4), solver=solver)
    same = ends(plain, (0, 4), solver=solver)
    assert torch.equal(z_start, same[3]) and not torch.allclose(z_end, same[4], atol=1e-3) and cond.keys() == same[5].keys()
    null = encoded(small_models["sd15"], pairs, [0])
    for k in range(4):
        with torch.no_grad():
            times = torch.linspace(t_start[k], t_end[k], 3, dtype=torch.float64)
            end = sampler.ddim(solver, z_start[k:k + 1], times, {name: value[k:k + 1] for name, value in cond.items()}, drawn[k].item(), null)
        assert torch.allclose(z_end[k:k + 1], end, atol=1e-3)


@pytest.mark.parametrize("changes, message", [
    (dict(guidance_range=[4.0]), "--guidance-range 4: must be two numbers, LOW below HIGH and neither below 1"),
    (dict(guidance_range=[9.0, 4.0]), "--guidance-range 9 4: must be two numbers"),
    (dict(guidance_range=[0.5, 4.0]), "--guidance-range 0.5 4: must be two numbers"),
    (dict(guidance_range=[4.0, float("inf")]), "--guidance-range 4 inf: must be two numbers"),
    (dict(guidance_range=[4.0, 9.0], guidance_teacher=2.0), "--guidance-range 4 9: does not go with --guidance-teacher 2; leave one")])
def test_a_range_of_guidance_that_is_none_is_refused(make, changes, message):
    with pytest.raises(cli.UserError, match=message):
        make(**changes)


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def double(file):
    save_file({name: value * 2 for name, value in load_file(file).items()}, file, {"format": "pt"})


FORWARD = dict(forward_rate=0.5)
PROJECTED = dict(forward_rate=0.5, projection=0.5, windows=[1])
LATENTS = dict(pairs="data", cache_latents=True)


@pytest.mark.parametrize("options, change, named", [
    ({}, lambda model, photos: edit_json(model / "scheduler/scheduler_config.json", prediction_type="v_prediction"), "prediction"),
    ({}, lambda model, photos: edit_json(model / "scheduler/scheduler_config.json", beta_end=0.02), "schedule"),
    (FORWARD, lambda model, photos: draw(photos / "4.bmp", 99), "images"),
    (FORWARD, lambda model, photos: double(model / "vae/diffusion_pytorch_model.safetensors"), "autoencoder"),
    (FORWARD, lambda model, photos: edit_json(model / "vae/config.json", scaling_factor=0.5), "scaling_factor"),
    (PROJECTED, lambda model, photos: edit_json(model / "vae/config.json", shift_factor=0.1), "shift_factor"),
    (LATENTS, lambda model, photos: double(model / "vae/diffusion_pytorch_model.safetensors"), "autoencoder"),
    (LATENTS, lambda model, photos: edit_json(model / "vae/config.json", scaling_factor=0.5), "scaling_factor"),
    (LATENTS, lambda model, photos: double(model / "text_encoder/model.safetensors"), "text")],
    ids=["prediction", "schedule", "images", "vae", "scale", "shift of projected pairs", "latents: vae", "latents: scale", "latents: text"])
def test_whatever_decides_a_caches_content_is_in_its_key(make, small_models, photos, tmp_path, options, change, named):
    model, pictures = shutil.copytree(small_models["sd15"], tmp_path / "model"), shutil.copytree(photos, tmp_path / "photos")
    options = dict(model=str(model), data=str(pictures), **options)
    make(**options)
    make(**options)                                                                      # the same again is the same cache
    change(model, pictures)
    with pytest.raises(cli.UserError, match=f"made with other settings .*'{named}'"):
        make(**options)


def test_backward_trajectories_do_not_depend_on_pictures(make, small_models, photos, tmp_path):
    model = shutil.copytree(small_models["sd15"], tmp_path / "model")
    make(model=str(model))
    double(model / "vae/diffusion_pytorch_model.safetensors")
    make(model=str(model))


def test_the_same_prompts_drawn_at_other_rates_are_another_cache(make, tmp_path):
    common = dict(data="", prompts=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("fox\nheart\n")
    make(**common)
    (tmp_path / "a.txt").write_text("fox\nheart\nheart\n")
    with pytest.raises(cli.UserError, match="captions"):
        make(**common)


def test_what_may_change_between_starts_is_not_in_a_caches_key(make, tmp_path):
    """--shard: also with LoRA and bf16, where FSDP wants the frozen weights in the dtype of the adapters."""
    common = dict(lora=2, precision="bf16", cache=str(tmp_path / "cache"))
    plain, _, one = make(**common)
    for free in (dict(shard=True), dict(micro_batch=2), dict(gradient_checkpointing=True), dict(compile=True)):
        other, _, two = make(**common, **free)
        assert all(torch.equal(plain.rows[range(6)][key], value) for key, value in other.rows[range(6)].items())
        assert (one.unet.dtype, two.unet.dtype) == (torch.bfloat16, torch.float32 if "shard" in free else torch.bfloat16)


def test_models_that_are_not_square_train_on_their_own_shape_and_refuse_square_pictures(make, small_models, tmp_path):
    (tmp_path / "a.txt").write_text("fox\nheart\n")
    for name in ("sd15", "sdxl"):
        model = shutil.copytree(small_models[name], tmp_path / name)
        edit_json(model / "unet/config.json", sample_size=[8, 16])
        pairs, *_ = make(model=str(model), data="", prompts=str(tmp_path / "a.txt"), out=str(tmp_path / f"{name}-out"))
        rows = pairs.rows[range(2)]
        assert rows["z"].shape[2:] == (4, 8, 16)
        assert name == "sd15" or pairs.text(rows["caption"].tolist())["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
        for changes in (dict(pairs="data"), dict(forward_rate=0.5), dict(recipe="lcm")):
            with pytest.raises(cli.UserError, match="made for 32 x 64 pixels, and pictures are cropped to squares; give --size 32"):
                make(model=str(model), out=str(tmp_path / f"{name}-{len(changes)}"), **changes)


def test_stock_schedulers_stop_at_every_boundary_of_the_windows_that_are_accepted(schedule):
    """And miss some of those that are refused: DDIM's trailing timesteps, and the one it steps to, 1000 // K lower."""
    for windows in range(1, 41):
        stock = DDIMScheduler(timestep_spacing="trailing")
        stock.set_timesteps(windows)
        steps = stock.timesteps.tolist()
        exact = all([start == 1000 * t - 1 and start - 1000 // windows == 1000 * t_next - 1
                     for start, t, t_next in zip(steps, reflow.boundaries(windows), reflow.boundaries(windows)[1:])])
        if exact:
            plan.check_windows((windows,), schedule)
        else:
            with pytest.raises(cli.UserError, match=f"--windows {windows}: does not divide the model's 1000 timesteps"):
                plan.check_windows((windows,), schedule)
        plan.check_windows((windows,), teacher.EDMSchedule(0.002, 80.0, 0.5))                 # has no timesteps
    with pytest.raises(cli.UserError, match="--windows 16: .*; use for instance 10 or 20"):
        plan.check_windows((16, 8), schedule)


def test_a_cache_of_other_prompts_text_or_size_is_refused(make, tmp_path):
    (tmp_path / "a.txt").write_text("fox\nheart\n")
    (tmp_path / "b").mkdir()
    common = dict(data="", prompts=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache"))
    make(**common)
    with pytest.raises(cli.UserError, match="size"):
        make(**common, size=16)
    (tmp_path / "a.txt").write_text("fox\ncat\n")
    with pytest.raises(cli.UserError, match="captions"):
        make(**common)


def test_windows_of_the_cache_serve_every_stage():
    recipe = reflow.Recipe(stages=(16, 4), shares=(1, 1))
    from pairs import cache_windows
    assert cache_windows(recipe) == 16 and cache_windows(reflow.Recipe(stages=(3, 1))) == 24
    assert cache_windows(reflow.Recipe(stages=(4,), pairs="data")) == 4


def test_endless_pictures_cannot_be_cached(make):
    with pytest.raises(cli.UserError, match="endless"):
        make(data="scenes", pairs="data", cache_latents=True)


def test_consistency_pairs_are_one_teacher_step_and_the_students_own_jump(make):
    pairs, recipe, pipeline = make(recipe="lcm", windows=[1], solver_steps=4)
    solver, student = models.as_model(pipeline), models.as_model(pipeline)
    student.network = lambda z, timestep, **cond: 0.3 * z                   # known at once: x_hat = (1 - 0.3 sigma) z / alpha
    (t, t_start, t_end), (z_start, z_end), cond = pairs.ends(pairs.fetch(range(8), 1), solver, 4, student)
    assert torch.equal(t, t_start) and not t_end.any() and (t < 0.25).any() and (t > 0.25).any()
    nearer = (t - 0.25).clamp_min(0)
    with torch.no_grad():
        z = sampler.ddim(solver, z_start, torch.stack([t, nearer]), cond)
    alpha, sigma = (v.float()[:, None, None, None] for v in pairs.schedule(nearer.clamp_min(1e-3)))
    expected = torch.where((nearer > 0)[:, None, None, None], (1 - 0.3 * sigma) * z / alpha, z)
    assert torch.allclose(z_end, expected, atol=1e-5)
    # the chord of these two ends is the student's belief itself
    x, _ = reflow.chord(z_start, z_end, *([v.float()[:, None, None, None] for v in pairs.schedule(edge)] for edge in (t_start, t_end)))
    assert torch.allclose(x, z_end, atol=1e-5)


@pytest.mark.parametrize("windows", [1, 4])
def test_imitation_starts_from_the_students_own_steps_and_needs_no_image(make, tmp_path, windows):
    (tmp_path / "prompts.txt").write_text("fox\ncat\n")
    pairs, recipe, pipeline = make(recipe="imitation", windows=[windows], data="", prompts=str(tmp_path / "prompts.txt"), solver_steps=8)
    student = models.as_model(pipeline, path=reflow.vp_path, windows=windows)
    asked, real = [], student.network
    student.network = lambda z, timestep, **cond: asked.append(timestep) or real(z, timestep, **cond)
    batch = pairs.fetch(range(8), windows)
    drawn, noise = batch["t"], batch["eps"]
    assert batch.keys() == {"t", "t_start", "t_end", "eps", "captions"}
    (t, t_start, t_end), (z_start, z_end), cond = pairs.ends(dict(batch), models.as_model(pipeline), 8, student)
    assert torch.equal(t, t_start) and torch.equal(t, reflow.window_of(drawn, windows)[0]) and len(asked) == windows
    for k in range(8):
        one = {key: value[k:k + 1] for key, value in cond.items()}
        steps = round((1 - t_start[k].item()) * windows)
        with torch.no_grad():
            z = sampler.ddim(student, noise[k:k + 1], sampler.time_grid(windows)[:steps + 1], one) if steps else noise[k:k + 1]
            expected = losses.imitation(*[lambda z, t: student(z, t, one)] * 2, pairs.schedule, z, drawn[k:k + 1], t_start[k:k + 1],
                                        t_end[k:k + 1], 8)
        assert torch.allclose(z_start[k], z[0], atol=1e-4) and torch.allclose(z_end[k], expected[0], atol=1e-4)


def test_flow_map_starts_from_a_noised_latent_where_the_student_is_asked(make):
    pairs, recipe, pipeline = make(recipe="flow-map", windows=[2], solver_steps=8)
    batch = pairs.fetch(range(6), 2)
    drawn, latents = batch["t"], models.encode(pipeline, batch["images"])
    student = models.as_model(pipeline, path=reflow.vp_path, windows=2)
    (t, t_start, t_end), (z_start, z_end), cond = pairs.ends(dict(batch), models.as_model(pipeline), 8, student)
    assert torch.equal(t, drawn) and torch.equal(t_start, drawn) and torch.equal(t_end, reflow.window_of(drawn, 2)[1])
    assert torch.equal(z_start, losses.noised(pairs.schedule, t, latents, batch["eps"])) and z_end.isfinite().all()


# ---- forward and projected pairs -----------------------------------------------------------------------------------


def test_forward_trajectories_end_at_real_latents_and_are_inverted_by_the_teacher(make, small_models):
    pairs, _, pipeline = make(forward_rate=0.5, text_dropout=0.5)
    assert [len(rows) for rows in pairs.rows.parts] == [3, 3] and len(pairs.rows) == 6
    rows, backward = pairs.rows[range(3, 6)], pairs.rows[range(3)]
    latents = models.encode(pipeline, pairs.dataset.images(range(3), 32))
    assert torch.allclose(rows["z"][:, -1], latents, atol=1e-5)
    text = encoded(small_models["sd15"], pairs, drawn_captions(pairs.c, pairs.dataset, range(3), "trajectory"))
    assert torch.allclose(pairs.text(rows["caption"].tolist())["encoder_hidden_states"], text["encoder_hidden_states"], atol=1e-5)
    with torch.no_grad():
        noise = sampler.invert(models.as_model(pipeline), latents, sampler.time_grid(8), text)
    assert torch.allclose(rows["z"][:, 0], noise, atol=1e-4)
    assert torch.equal(backward["z"][:, 0], pairs.noises(range(3)))                       # and the others are still the teacher's own
    # all nine boundaries lie in order: the way from one to the next is a step of the inversion
    times = torch.tensor([0.5, 0.375], dtype=torch.float64)
    with torch.no_grad():
        back = sampler.invert(models.as_model(pipeline), rows["z"][:, 5], times, text)
    assert torch.allclose(rows["z"][:, 4], back, atol=1e-4)


def test_forward_pairs_are_drawn_at_the_rate_rho(make):
    pairs, *_ = make(forward_rate=1 / 3, trajectories=6)
    assert [len(rows) for rows in pairs.rows.parts] == [4, 2]
    ends = pairs.rows[range(4, 6)]["z"][:, -1]
    drawn = pairs.fetch(range(600), 1)["z_end"]
    forward = torch.tensor([any(torch.equal(z, end) for end in ends) for z in drawn])
    assert 0.27 < forward.double().mean() < 0.4
    assert [len(rows) for rows in make(forward_rate=1.0)[0].rows.parts] == [6]


def test_joined_rows_are_read_across_their_parts(make):
    rows = make(forward_rate=0.5)[0].rows
    for i, (part, index) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        assert torch.equal(rows[[i]]["z"], rows.parts[part][[index]]["z"])
    with pytest.raises(IndexError):
        rows[[6]]


def test_the_drift_is_the_gradient_of_a_sinkhorn_divergence():
    """0 between equal sets, the shift between shifted ones at any entropy, and minus half the gradient of POT's own divergence."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(24, 3, generator=generator).double(), 0.7 * torch.randn(24, 3, generator=generator).double() + 1
    shift = torch.tensor([0.5, -1.0, 2.0]).double()
    for entropy, close in ((0.05, 2e-3), (0.5, 1e-5)):      # what the iterations leave
        assert drift(a, a.clone(), entropy=entropy).abs().max() < 1e-7
        assert torch.allclose(drift(a, a + shift, entropy=entropy), shift.expand(24, 3), atol=close)
    scale, told = torch.cdist(a, b).square().mean(), torch.rand(24, 24, generator=generator).double()
    told = told + told.T

    def divergence(points):
        def cost(x, y):
            return ((x[:, None] - y) ** 2).sum(-1) / scale + told

        # of entropic transport, the cost plus the entropy of its plan: its gradient is the plan's barycenter
        def whole(x, y):
            weights = torch.full((24,), 1 / 24, dtype=torch.float64)
            plan = ot.sinkhorn(weights, weights, cost(x, y).detach(), 0.2, method="sinkhorn_log", stopThr=1e-13, numItermax=20000)
            return (plan * cost(x, y)).sum()
        return whole(points, b) - whole(points, points.detach())
    points = a.clone().requires_grad_()
    gradient, = torch.autograd.grad(divergence(points), points)
    assert torch.allclose(drift(a, b, told, 0.2), -gradient * 24 * scale / 2, atol=1e-4)


def test_two_samples_of_one_distribution_hardly_move_each_other():
    """Of as many numbers as a latent has; with little entropy each point would make for its nearest neighbor."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 256, 512, generator=generator)
    expected = (2 / 256) ** 0.5                             # how far their means are apart in each number
    assert drift(a, b).square().mean().sqrt() < 1.2 * expected < 0.3 * drift(a, b, entropy=0.05).square().mean().sqrt()
    assert drift(a, c + 0.5).mean() == pytest.approx(0.5, abs=0.02)


def test_projected_pairs_move_their_generated_end_and_keep_the_other(make):
    plain, *_ = make(forward_rate=0.5, windows=[1], text_dropout=0.0)
    pairs, _, pipeline = make(forward_rate=0.5, windows=[1], projection=0.5, text_dropout=0.0)
    before, after = plain.rows[range(6)], pairs.rows[range(6)]
    assert after["z"].shape[1] == 2 and torch.equal(after["caption"], before["caption"])
    latents, noises = models.encode(pipeline, pairs.dataset.images(range(3), 32)), pairs.noises(range(3))
    for kept, moved, rows, true in ((0, 1, slice(0, 3), latents), (1, 0, slice(3, 6), noises)):
        ends = before["z"][rows][:, [0, -1]]
        assert torch.equal(after["z"][rows, kept], ends[:, kept])                         # backward: the noise; forward: the data
        told = pairs.text(before["caption"][rows].tolist())["encoder_hidden_states"].flatten(1).double()
        told = torch.cdist(told, told).square()
        expected = ends[:, moved] + 0.5 * drift(ends[:, moved], true, told / told.mean())
        assert torch.allclose(after["z"][rows, moved], expected, atol=1e-5) and not torch.allclose(expected, ends[:, moved], atol=1e-3)
    with pytest.raises(cli.UserError, match="made with other settings .*'drift'"):         # their minibatch is part of what they are
        make(forward_rate=0.5, windows=[1], projection=0.5, text_dropout=0.0, trajectories=8)
    # one window's ends are the two of them
    batch = pairs.fetch(range(20), 1)
    assert all(any(torch.equal(z, end) for end in after["z"][:, 1]) for z in batch["z_end"])
    assert all(any(torch.equal(z, end) for end in after["z"][:, 0]) for z in batch["z_start"])


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_it_is_begun(random_sd, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("fox\n")
    c = train.Config(model=str(random_sd), prompts=str(tmp_path / "p.txt"), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"),
                     trajectories=4, updates=2, batch=2, windows=[1], solver_steps=8, grid_steps=0, cache_only=True, device="cpu")
    usage, free = shutil.disk_usage, []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free[0]))
    free.append(1000)
    with pytest.raises(cli.UserError, match="--cache .*: will take .* KiB more, and its disk has 0.977 KiB: .* KiB too little; free some, give"):
        train.main(c)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))
    free[0] = 2 ** 30
    train.main(c)
    free[0] = 2 ** 20 + 1000                               # what is there need not be made again
    held = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors"))
    plan.check_disk(tmp_path / "cache", held + free[0])
    with pytest.raises(cli.UserError, match="will take 1 MiB more"):
        plan.check_disk(tmp_path / "cache", held + free[0] + 1)
    train.main(c)


def test_the_options_that_decide_a_cache_are_in_its_key(make):
    make()
    for changes, named in ((dict(seed=1), "seed"), (dict(text_dropout=0.5), "text_dropout"), (dict(null_text="zeros"), "null_text"),
                           (dict(precision="bf16"), "precision"), (dict(solver_steps=16), "solver_steps")):
        with pytest.raises(cli.UserError, match=f"made with other settings .*'{named}'"):
            make(**changes)


def test_matching_is_asked_at_its_times(make, monkeypatch):
    made, _, pipeline = make(recipe="matched")
    batch, asked = made.fetch(range(2), 1), []
    monkeypatch.setattr(losses, "matching", lambda teacher, critic, schedule, x, t, *_: asked.append(t))
    model = models.as_model(pipeline)
    with torch.no_grad():
        made.matching(batch["fresh_z"], batch["fresh_eps"], torch.tensor([0.0, 1.0]).double(), made.text([1, 2]), model, model, model)
    assert asked[0].tolist() == [0.02, 0.98]


def test_the_bytes_of_cached_latents_are_those_said(make):
    made, recipe, pipeline = make(pairs="data", cache_latents=True)
    held = sum(value.nbytes for file in cache_folder(made.c).rglob("*.safetensors") for value in load_file(file).values())
    assert cache_bytes(made.c, recipe, pipeline, made.dataset, made.conditions) == held
