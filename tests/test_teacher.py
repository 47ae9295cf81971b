"""Identities of teacher.py and the solver: schedule, conversions, guidance, the clock, closed-form flows, diffusers."""
import copy
import inspect
import json
import re
import shutil
import types
import warnings
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from conftest import slow
from PIL import Image
from safetensors.torch import load_file, save_file

import models
import reflow
import sampler
import solvers
import teacher
from models import configs, latents, load, saved
from runtime import store
from runtime.cli import UserError
from tools import build


def test_schedule_is_stable_diffusions_on_the_grid_and_clean_at_zero(schedule):
    alphas_cumprod = build.make_scheduler().alphas_cumprod.double()
    for timestep in (0, 1, 499, 999):
        alpha, sigma = schedule(torch.tensor((timestep + 1) / 1000, dtype=torch.float64))
        assert alpha.item() == pytest.approx(alphas_cumprod[timestep].sqrt().item(), abs=1e-12)
        assert (alpha ** 2 + sigma ** 2).item() == pytest.approx(1, abs=1e-12)
    alpha, sigma = schedule(torch.tensor([0.0, 1.0]))
    assert (alpha[0], sigma[0]) == (1, 0) and alpha[1] == pytest.approx(0.0683, abs=1e-4)
    between = schedule(torch.linspace(0, 1, 4001, dtype=torch.float64))[0]
    assert (between.diff() < 0).all()


@pytest.mark.parametrize("prediction", teacher.PREDICTIONS)
def test_prediction_to_pair_and_back_is_the_identity(schedule, prediction):
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.05, 1, 7, dtype=torch.float64)
    for path in reflow.PATHS.values():
        a, b = (v[:, None] for v in path(schedule, t, 4))
        p, q = teacher.PREDICTIONS[prediction](*(v[:, None] for v in schedule(t)))
        found = teacher.to_pair(p * x + q * eps, a * x + b * eps, (p, q), a, b)
        assert torch.allclose(found[0], x, atol=1e-10) and torch.allclose(found[1], eps, atol=1e-10)


def test_v_prediction_is_diffusers_get_velocity(schedule):
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, eps, timestep = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    alpha, sigma = (v.float()[:, None, None, None] for v in schedule((timestep + 1) / 1000))
    p, q = teacher.PREDICTIONS["v_prediction"](alpha, sigma)
    assert torch.allclose(p * x + q * eps, scheduler.get_velocity(x, eps, timestep), atol=1e-5)


def test_guidance_is_linear_and_0_and_1_ask_one_side_only(schedule):
    asked = []

    def network(z, timestep, text):
        asked.append(len(z))
        return text.expand_as(z)
    model = teacher.Model(network, schedule)
    z, t = torch.zeros(3, 4), torch.full((3,), 0.5, dtype=torch.float64)
    cond, uncond = {"text": torch.full((3, 1), 2.0)}, {"text": torch.full((3, 1), 1.0)}
    for w, expected in ((0, 1), (1, 2), (0.5, 1.5), (7, 8)):
        assert torch.allclose(model(z, t, cond, w, uncond)[1], torch.full((3, 4), float(expected)))
    assert asked == [3, 3, 6, 6]
    with pytest.raises(ValueError, match="guidance 3"):
        model(z, t, cond, 3)


def test_the_clock_shows_the_network_integers_at_boundaries(schedule):
    shown = []
    model = teacher.Model(lambda z, timestep: shown.append(timestep[0].item()) or z, schedule)
    for steps in (1, 2, 4, 8, 32):
        sampler.ddim(model, torch.ones(1, 2, dtype=torch.float64), sampler.time_grid(steps), {})
        assert shown == [1000 * (steps - i) / steps - 1 for i in range(steps)]
        shown.clear()


@pytest.mark.parametrize("steps", [1, 2, 5, 32])
def test_point_mass_data_is_hit_exactly_in_any_number_of_steps(gaussian, steps):
    network, model = gaussian
    network.mean, network.std = -1.3, 0.0
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sampler.ddim(model, z, sampler.time_grid(steps), {}), torch.full_like(z, -1.3), atol=1e-9)


def test_gaussian_data_ddim_reaches_the_exact_flow_at_first_order(gaussian):
    """Between t = 0.999 and 0.111 the grid stays on integers at 37, 111 and 333 steps: error / 3 when steps x 3."""
    network, model = gaussian
    z = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (37, 111, 333):
        times = torch.linspace(0.999, 0.111, steps + 1, dtype=torch.float64)
        errors.append((sampler.ddim(model, z, times, {}) - network.flow(z, 0.999, 0.111)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(3, rel=0.15) and errors[1] / errors[2] == pytest.approx(3, rel=0.1)
    assert errors[2] < 5e-3


def test_inversion_runs_the_same_solver_backwards(gaussian):
    network, model = gaussian
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(0.999, 0.1, 900, dtype=torch.float64)
    end = sampler.ddim(model, z, times, {})
    back = sampler.ddim(model, end, times.flip(0), {})
    assert (back - z).abs().max() < 0.02
    assert (network.flow(end, 0.1, 0.999) - z).abs().max() < 0.02


@pytest.mark.parametrize("windows", [8, 4, 2, 1])
def test_the_untrained_student_is_ddim_with_as_many_steps_as_windows(random_sd, windows):
    pipeline = load.load_pipeline(str(random_sd))
    cond = models.encode_text(pipeline, ["fox on blue", "heart"])
    z = sampler.noise([0, 1], models.latent_shape(pipeline))
    plain = models.as_model(pipeline)
    with torch.no_grad():
        expected = sampler.ddim(plain, z, sampler.time_grid(windows), cond)
        for path in reflow.PATHS.values():
            student = models.as_model(pipeline, path=path, windows=windows)
            assert torch.allclose(sampler.ddim(student, z, sampler.time_grid(windows, windows), cond), expected, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampler_equals_diffusers_own_pipeline_and_scheduler(random_sd, steps, guidance):
    pipeline = load.load_pipeline(str(random_sd))
    prompts, seeds = ["red heart on blue", "cat", ""], [5, 6, 7]
    ours = sampler.generate(pipeline, models.as_model(pipeline), prompts, seeds, sampler.time_grid(steps), guidance)
    stock = diffusers.DiffusionPipeline.from_pretrained(random_sd)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
                   latents=sampler.noise(seeds, models.latent_shape(pipeline))).images
    assert (ours - theirs).abs().max() <= 1e-4


def test_time_grid_is_trailing_and_respects_windows():
    for steps in (1, 2, 4, 5, 8, 10, 20, 25, 40):
        scheduler = build.make_scheduler()
        scheduler.set_timesteps(steps)
        assert (1000 * sampler.time_grid(steps)[:-1] - 1).round().long().tolist() == scheduler.timesteps.tolist()
    assert sampler.time_grid(3, 2).tolist() == [1, 0.75, 0.5, 0]
    assert sampler.time_grid(32)[16] == 0.5 and 1000 * sampler.time_grid(32)[1] - 1 == 967.75
    with pytest.raises(ValueError, match="1 steps cannot cross 2 windows"):
        sampler.time_grid(1, 2)


def test_image_i_is_the_same_in_any_batch(random_sd):
    pipeline = load.load_pipeline(str(random_sd))
    prompts, seeds, times = ["fox"] * 5, range(5), sampler.time_grid(2)
    model = models.as_model(pipeline)
    together = sampler.generate(pipeline, model, prompts, seeds, times, batch=5)
    apart = sampler.generate(pipeline, model, prompts, seeds, times, batch=2)
    assert (together - apart).abs().max() < 1e-4 * together.abs().max() and not torch.allclose(together[0], together[1], atol=0.1)
    assert torch.equal(together, sampler.generate(pipeline, model, prompts, seeds, times, batch=5))


# ---- the siblings of SD 1.5, 2.1 and XL ----------------------------------------------------------------------------


def stock(folder):
    """diffusers' own pipeline and solver for the folder: DDIM, trailing, down to clean data."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
LONG = " ".join(["red heart on blue and a fox"] * 20)


def test_text_is_what_the_stock_pipeline_encodes(small):
    ours, theirs = load.load_pipeline(str(small)), stock(small)
    prompts = ["red heart on blue", "", LONG]
    excess = len(ours.tokenizer(LONG).input_ids) - 77
    with pytest.warns(UserWarning, match=f"'red heart on blue and a fox .*' is {excess} tokens too long for the text encoder") as caught:
        found = models.encode_text(ours, [*prompts, None], batch=3)
    assert len(caught) == 1 and caught[0].filename == __file__ and len(str(caught[0].message)) < 200
    given, null, *pooled = theirs.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    assert torch.equal(found["encoder_hidden_states"], torch.cat([given, null[:1]]))
    assert all(value.dtype == torch.float32 and len(value) == 4 for value in found.values())
    if small.name != "sdxl":
        assert found.keys() == {"encoder_hidden_states"} and null.abs().max() > 0
        return
    assert torch.equal(found["text_embeds"], torch.cat([pooled[0], pooled[1][:1]])) and null.abs().max() == 0
    assert found["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 4
    assert models.encode_text(ours, ["fox"], size=(64, 48))["time_ids"].tolist() == [[64, 48, 0, 0, 64, 48]]


def test_the_null_embedding_can_be_chosen(small):
    pipeline = load.load_pipeline(str(small))
    for null, expected in (("empty", lambda value: value[1]), ("zeros", lambda value: torch.zeros_like(value[1]))):
        table = models.encode_text(pipeline, [None, "", "fox"], null=null)
        for key in table.keys() - {"time_ids"}:
            assert torch.equal(table[key][0], expected(table[key])) and table[key][1].abs().max() > 0
    with pytest.raises(ValueError, match="null 'zero'"):
        models.encode_text(pipeline, ["fox"], null="zero")


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_generate_equals_the_stock_pipeline(small, guidance):
    ours, theirs, prompts, seeds = load.load_pipeline(str(small)), stock(small), ["red heart on blue", "", "fox"], [5, 6, 7]
    model = models.as_model(ours)
    for steps, size in ((1, None), (2, None), (4, None), (2, (48, 64))):
        z = sampler.noise(seeds, models.latent_shape(ours, size))
        height, width = size or (32, 32)
        expected = theirs(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent", latents=z,
                          height=height, width=width).images
        found = sampler.generate(ours, model, prompts, seeds, sampler.time_grid(steps), guidance, size=size)
        assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("windows", [4, 1])
def test_the_untrained_sibling_is_ddim_with_as_many_steps_as_windows(small, windows):
    pipeline = load.load_pipeline(str(small))
    cond, uncond = (models.encode_text(pipeline, prompts) for prompts in (["fox on blue", "heart"], [None, None]))
    z = sampler.noise([0, 1], models.latent_shape(pipeline))
    with torch.no_grad():
        expected = sampler.ddim(models.as_model(pipeline), z, sampler.time_grid(windows), cond, 3.0, uncond)
        for path in reflow.PATHS.values():
            student = models.as_model(pipeline, copy.deepcopy(pipeline.unet), path, windows)
            found = sampler.ddim(student, z, sampler.time_grid(windows, windows), cond, 3.0, uncond)
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_network_of_low_precision_is_asked_in_its_own_dtype_and_answers_in_float32(small):
    pipeline = load.load_pipeline(str(small))
    cond, z, t = models.encode_text(pipeline, ["fox", None], size=(1001, 1001)), sampler.noise([0, 1], (4, 8, 8)), torch.tensor([1.0, 0.3])
    with torch.no_grad():
        exact = models.as_model(pipeline)(z, t, cond)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = models.as_model(pipeline)(z, t, cond)
        network, seen = pipeline.unet.to(torch.bfloat16), []
        network.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
        low = models.as_model(pipeline)(z, t, cond)
    (shown, kwargs), = seen
    assert shown.dtype == kwargs["encoder_hidden_states"].dtype == torch.bfloat16
    if small.name == "sdxl":
        assert kwargs["added_cond_kwargs"]["time_ids"][0, 0] == 1001            # bf16 would make it 1000
        assert kwargs["added_cond_kwargs"]["time_ids"].dtype == torch.float32
    for other in (low, autocast):
        assert all(value.dtype == torch.float32 for value in other)
        assert not torch.equal(other[1], exact[1]) and (other[1] - exact[1]).abs().max() < 0.05 * exact[1].abs().max()


def test_guidance_of_a_low_precision_network_is_computed_in_float32(random_sd):
    class Network(torch.nn.Linear):
        def forward(self, z, timestep, encoder_hidden_states, added_cond_kwargs, return_dict):
            return (encoder_hidden_states[:, :1, :1, None].expand_as(z),)
    model = models.as_model(load.load_pipeline(str(random_sd)), Network(1, 1).to(torch.bfloat16))
    cond, uncond = ({"encoder_hidden_states": torch.full((2, 1, 1), value)} for value in (1.0, 1.0078125))
    eps = model(torch.zeros(2, 16, 8, 8), torch.ones(2), cond, 5.3, uncond)[1]
    assert torch.allclose(eps, torch.full_like(eps, 1.0078125 - 5.3 * 0.0078125), atol=1e-6)            # bf16's step here is 0.004


def test_pictures_honour_the_autoencoders_scale_and_shift_in_chunks_of_bounded_size(small, monkeypatch):
    pipeline = load.load_pipeline(str(small))
    vae, z, images = pipeline.vae, sampler.noise(range(5), (4, 8, 8)), torch.rand(5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        decoded, encoded = vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1), vae.encode(images).latent_dist.mean
    assert torch.allclose(models.decode(pipeline, z), decoded, atol=1e-5)
    sizes, real, real_encode = [], vae.decode, vae.encode
    monkeypatch.setattr(vae, "decode", lambda z, **more: sizes.append(len(z)) or real(z, **more))
    monkeypatch.setattr(vae, "encode", lambda images: sizes.append(len(images)) or real_encode(images))
    assert len(models.decode(pipeline, z.repeat(14, 1, 1, 1))) == 70 and sizes == [64, 6]
    monkeypatch.setattr(latents, "PIXELS", 2 * 32 * 32 + 1)
    sizes.clear()
    assert torch.allclose(models.decode(pipeline, z), decoded, atol=1e-5) and sizes == [2, 2, 1]
    assert torch.allclose(models.encode(pipeline, images), encoded * vae.config.scaling_factor, atol=1e-5) and sizes == [2, 2, 1] * 2
    vae.register_to_config(shift_factor=0.3)
    assert torch.allclose(models.encode(pipeline, images), (encoded - 0.3) * vae.config.scaling_factor, atol=1e-5)
    assert torch.allclose(models.decode(pipeline, (z - 0.3) * vae.config.scaling_factor),
                          models.decode(pipeline, (z - 0.3) * vae.config.scaling_factor, batch=1), atol=1e-5)
    back = real(z, return_dict=False)[0].clamp(-1, 1)
    assert torch.allclose(models.decode(pipeline, (z - 0.3) * vae.config.scaling_factor), back, atol=1e-5)


def test_sizes_must_be_divisible_by_all_levels(small_models):
    pipeline = load.load_pipeline(str(small_models["sdxl"]))
    assert models.latent_shape(pipeline) == (4, 8, 8) and models.latent_shape(pipeline, 40) == (4, 10, 10)
    assert models.latent_shape(pipeline, (16, 24)) == (4, 4, 6)
    for size, message in ((33, "--size 33: must be a multiple of 8 for this model, for instance 32 or 40"), (3, "for instance 8"),
                          (0, "--size 0"), (-8, "--size -8"), ((32, 36), "--size 36")):
        with pytest.raises(UserError, match=message):
            models.latent_shape(pipeline, size)


# ---- loading -------------------------------------------------------------------------------------------------------


def edit(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def model(small_models, tmp_path):
    """A copy of the SD 1.5 sibling that a test may break."""
    return shutil.copytree(small_models["sd15"], tmp_path / "model")


def test_what_is_left_out_or_given_is_neither_read_nor_touched(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "model")
    for weights in [*folder.glob("vae/*.safetensors"), *folder.glob("text_encoder*/*.safetensors")]:
        weights.write_bytes(b"torn")
    pipeline = load.load_pipeline(str(folder), vae=None, text_encoder=None, text_encoder_2=None)
    assert pipeline.vae is pipeline.text_encoder is None and models.latent_shape(pipeline) == (4, 8, 8)
    assert pipeline.vae_scale_factor == 4 and models.latent_shape(pipeline, 40) == (4, 10, 10)       # diffusers would say 8
    student = pipeline.unet.requires_grad_(True).train()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    for random_init in (False, True):
        again = load.load_pipeline(str(folder), torch.bfloat16, random_init, unet=student, vae=None, text_encoder=None,
                                      text_encoder_2=None)
        assert again.unet is student and student.training and student.dtype == torch.float32 and student.conv_in.weight.requires_grad
        assert again.vae is again.text_encoder is None
    preset = load.load_pipeline(small.name, random_init=True, unet=student, vae=None, text_encoder=None, text_encoder_2=None)
    assert preset.unet is student and student.training and preset.text_encoder is None
    with pytest.raises(TypeError, match="vea"):
        load.load_pipeline(str(folder), vea=None)


@pytest.mark.parametrize("small", [slow("sd15"), slow("sd21"), "sdxl"], indirect=True)
def test_random_weights_for_a_folder_keep_its_architecture_and_depend_on_the_seed(small):
    trained, first, second, other = (load.load_pipeline(str(small), **options) for options in
                                     ({}, dict(random_init=True, seed=3), dict(random_init=True, seed=3), dict(random_init=True)))
    for part in PARTS[:3 + (small.name == "sdxl")]:
        states = [getattr(pipeline, part).state_dict() for pipeline in (trained, first, second, other)]
        assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}
        assert all(torch.equal(states[1][key], states[2][key]) for key in states[1])
        assert not any(torch.equal(states[1][key], states[0][key]) for key in states[1])
        assert all(torch.equal(states[3][key], states[0][key]) for key in states[1])           # made by build with seed 0
    tiny_sd = load.load_pipeline("tiny", torch.bfloat16, random_init=True)
    assert tiny_sd.unet.dtype == torch.bfloat16 and tiny_sd.vae.config.latent_channels == 16
    assert models.as_model(tiny_sd)(torch.zeros(1, 16, 8, 8), torch.ones(1), models.encode_text(tiny_sd, ["fox"]))[0].isfinite().all()


def test_a_loaded_model_is_frozen_and_sdxls_autoencoder_is_float32_beside_fp16(small_models):
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        pipeline = load.load_pipeline(str(small_models["sdxl"]), dtype)
        assert pipeline.vae.dtype == expected and pipeline.unet.dtype == pipeline.text_encoder_2.dtype == dtype
        for part in PARTS:
            assert not getattr(pipeline, part).training and not any(p.requires_grad for p in getattr(pipeline, part).parameters())


RENAMES = {
    "unet": [("resnets.", ".0."), ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
             ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")],
    "vae": [("mid_block.attentions.0", "mid.attn_1"), ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("down_blocks", "down"), ("up_blocks", "up"), ("resnets", "block"), ("downsamplers.0", "downsample"), ("group_norm", "norm"),
            ("upsamplers.0", "upsample"), ("conv_norm_out", "norm_out"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
            ("to_out.0", "proj_out"), ("conv_shortcut", "nin_shortcut")],
    "openclip": [("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                 ("self_attn", "attn"), ("final_ln_", "ln_final"), ("embeddings.token_embedding", "token_embedding"),
                 ("embeddings.position_embedding.weight", "positional_embedding"), ("text_projection.weight", "text_projection")],
}
TOP = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
       "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
       "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}


def rename(kind, name):
    for ours, theirs in RENAMES[kind]:
        name = name.replace(ours, theirs)
    return name


def ldm_unet(unet):
    """The UNet's weights under the names of the original code; one resnet per level down, two up."""
    out, levels = {}, len(unet.config.block_out_channels)
    for name, value in unet.state_dict().items():
        for ours, theirs in TOP.items():
            if name.startswith(ours + "."):
                name = theirs + name[len(ours):]
        for i in range(levels):
            attends = "CrossAttn" in unet.config.up_block_types[i]
            name = name.replace(f"down_blocks.{i}.resnets.0", f"input_blocks.{2 * i + 1}.0").replace(
                f"down_blocks.{i}.attentions.0", f"input_blocks.{2 * i + 1}.1").replace(
                f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{2 * i + 2}.0.op").replace(
                f"up_blocks.{i}.upsamplers.0", f"output_blocks.{2 * i + 1}.{1 + attends}")
            for j in range(2):
                name = name.replace(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{2 * i + j}.0").replace(
                    f"up_blocks.{i}.attentions.{j}", f"output_blocks.{2 * i + j}.1")
        inside_resnet = name.split(".")[0] in ("input_blocks", "middle_block", "output_blocks") and "transformer_blocks" not in name
        out["model.diffusion_model." + (rename("unet", name) if inside_resnet else name)] = value
    return out


def ldm_vae(vae):
    out, levels = {}, len(vae.config.block_out_channels)
    for name, value in vae.state_dict().items():
        name = rename("vae", name)
        if name.startswith("decoder.up."):
            level, rest = name.removeprefix("decoder.up.").split(".", 1)
            name = f"decoder.up.{levels - 1 - int(level)}.{rest}"
        is_attention = ".attn_1." in name and value.ndim == 2
        out["first_stage_model." + name] = value[:, :, None, None] if is_attention else value      # then they were 1 x 1 convolutions
    return out


def ldm_openclip(encoder, prefix):
    out, state = {}, {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    for name, value in state.items():
        if "q_proj" in name:
            merged = torch.cat([state[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")])
            out[prefix + rename("openclip", name).replace("q_proj.", "in_proj_")] = merged
        elif "k_proj" not in name and "v_proj" not in name:
            out[prefix + rename("openclip", name)] = value.T if "text_projection" in name else value
    return out


def ldm_clip(encoder, prefix):
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in encoder.state_dict().items()}


def original_layout(folder):
    """The weights of a sibling's folder in the original layout: name -> tensor."""
    p = load.load_pipeline(str(folder))
    text = {"sd15": lambda: ldm_clip(p.text_encoder, "cond_stage_model.transformer."),
            "sd21": lambda: ldm_openclip(p.text_encoder, "cond_stage_model.model."),
            "sdxl": lambda: {**ldm_clip(p.text_encoder, "conditioner.embedders.0.transformer."),
                             **ldm_openclip(p.text_encoder_2, "conditioner.embedders.1.model.")}}[folder.name]()
    weights = {**ldm_unet(p.unet), **ldm_vae(p.vae), **text}
    return {name: value.contiguous() for name, value in weights.items()}


@pytest.fixture
def single(small, tmp_path):
    """The sibling as one .safetensors in the original layout."""
    save_file(original_layout(small), tmp_path / f"{small.name}.safetensors")
    return tmp_path / f"{small.name}.safetensors"


def test_a_single_file_checkpoint_is_the_same_model(small, single):
    folder, file = load.load_pipeline(str(small)), load.load_pipeline(str(single), model_config=str(small))
    assert type(file) is type(folder)
    for part in PARTS[:3 + (small.name == "sdxl")]:
        ours, theirs = (dict(getattr(p, part).named_parameters()) for p in (file, folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), part
    z = [sampler.generate(p, models.as_model(p), ["fox", ""], [0, 1], sampler.time_grid(2), 3.0) for p in (folder, file)]
    assert torch.equal(*z)
    alone = load.load_pipeline(str(single), torch.bfloat16, model_config=str(small), unet=folder.unet, vae=None, text_encoder=None,
                                  text_encoder_2=None)
    assert alone.unet is folder.unet and alone.unet.dtype == torch.float32 and alone.vae is alone.text_encoder is None
    half = load.load_pipeline(str(single), torch.bfloat16, model_config=str(small))
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16 and not half.unet.conv_in.weight.requires_grad
    assert models.latent_shape(alone) == (4, 8, 8)


FLOW = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0)
UNSUITABLE = [      # (file of the folder, its changes, what is said); read with random weights, so that only the config speaks
    ("unet/config.json", dict(in_channels=9), "takes 9 channels and gives 4"),
    ("unet/config.json", dict(num_class_embeds=10), "conditioned on classes"),
    ("unet/config.json", dict(class_embed_type="timestep"), "conditioned on classes"),
    ("unet/config.json", dict(time_cond_proj_dim=8), "guidance scale as an input"),
    ("unet/config.json", dict(addition_embed_type="text", addition_embed_type_num_heads=2), "conditioned in a way we do not know"),
    ("unet/config.json", dict(encoder_hid_dim=32, encoder_hid_dim_type="text_proj"), "conditioned in a way we do not know"),
    ("scheduler/scheduler_config.json", dict(snr_shift_scale=3.0), "schedule is shifted"),
    ("scheduler/scheduler_config.json", dict(prediction_type="flow_prediction"), "prediction type 'flow_prediction' is not one of: epsilon, sample, v_prediction"),
    ("scheduler/scheduler_config.json", dict(rescale_betas_zero_snr=True), "zero terminal SNR .* says nothing about the picture"),
    ("scheduler/scheduler_config.json", dict(use_flow_sigmas=True, prediction_type="flow_prediction"),
     "is for flow matching, its UNet2DConditionModel for diffusion .* name the scheduler"),
    ("model_index.json", dict(text_encoder=[None, None]), "lacks its text_encoder; download it again"),
    ("model_index.json", dict(vae=[None, None]), "lacks its vae; download it again"),
    ("model_index.json", dict(unet=["diffusers", "ControlNetModel"]), "is of no family that we know .*unet of class UNet2DConditionModel.*it has .*unet ControlNetModel"),
    ("model_index.json", dict(unet=["mine", "Mine"]), "cannot be loaded"),
    ("model_index.json", dict(_class_name=["mine", "Mine"]), "cannot be loaded"),
    ("model_index.json", dict(_class_name="NoPipeline"), "cannot be loaded .* re-export or re-download the folder"),
]


@pytest.mark.parametrize("file, changes, message", UNSUITABLE, ids=[str(changes) for _, changes, _ in UNSUITABLE])
def test_an_unsuitable_model_is_refused_with_the_reason(model, file, changes, message):
    edit(model, file, **changes)
    with pytest.raises(UserError, match=f"--model {model}: .*{message}"):
        load.load_pipeline(str(model), random_init=True)


def test_a_pipeline_that_is_conditioned_on_more_is_refused(small_models, tmp_path):
    folder = shutil.copytree(small_models["sdxl"], tmp_path / "model")
    edit(folder, "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)
    with pytest.raises(UserError, match="requires_aesthetics_score of its pipeline is True: it takes an aesthetic score"):
        load.load_pipeline(str(folder))
    edit(folder, "model_index.json", requires_aesthetics_score=False)
    load.load_pipeline(str(folder))
    shutil.copytree(small_models["sd15"], folder, dirs_exist_ok=True)                      # SDXL's UNet without its text encoders
    edit(folder, "unet/config.json", **json.loads((small_models["sdxl"] / "unet" / "config.json").read_text()))
    with pytest.raises(UserError, match="addition_embed_type .* text_time goes with two text encoders"):
        load.load_pipeline(str(folder), random_init=True)


def test_flow_matching_of_a_unet_is_refused_and_v_prediction_at_zero_snr_is_not(model):
    edit(model, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    pipeline = load.load_pipeline(str(model))
    pair = models.as_model(pipeline)(torch.ones(1, 4, 8, 8), torch.ones(1), models.encode_text(pipeline, ["fox"]))
    assert all(value.isfinite().all() for value in pair) and torch.equal(pair[1], torch.ones(1, 4, 8, 8))
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(FLOW))
    edit(model, "model_index.json", scheduler=["diffusers", FLOW["_class_name"]])
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler is for flow matching, its UNet2DConditionModel for diffusion"):
        load.load_pipeline(str(model))


def test_what_cannot_be_loaded_is_one_line_with_a_remedy(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lora, torn, whole, unsafe = (tmp_path / name for name in ("lora.safetensors", "torn.safetensors", "whole.safetensors", "a.ckpt"))
    save_file({"lora_unet_down.weight": torch.zeros(1)}, lora)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, whole)
    torn.write_bytes(b"torn")
    unsafe.write_bytes(b"pickle")
    for name, options, message in [
            ("nobody/nothing", {}, "--model nobody/nothing: cannot be loaded .* check the spelling and the network"),
            ("nobody/nothing", dict(random_init=True), "--random-init needs to know the architecture"),
            ("sd15", {}, "--model sd15: cannot be loaded .* give the folder"),
            (str(unsafe), {}, "only safetensors are loaded, never pickles"), ("nowhere.bin", {}, "never pickles"),
            ("nowhere.safetensors", {}, "no such file"), (str(lora), {}, "not a whole checkpoint of Stable Diffusion"),
            (str(torn), {}, "cannot be loaded .* give --model-config FOLDER"), (str(whole), {}, "cannot be loaded .* give --model-config"),
            (str(whole), dict(model_config=str(model)), "cannot be loaded .* give another --model-config"),
            (str(whole), dict(model_config="nowhere"), "--model-config nowhere: no diffusers pipeline folder"),
            (str(whole), dict(random_init=True), "--random-init"), (str(model), dict(model_config="x"), "--model-config x: only goes")]:
        with pytest.raises(UserError, match=message) as caught:
            load.load_pipeline(name, **options)
        assert "\n" not in str(caught.value)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(load.load_pipeline(str(model), random_init=True).unet.state_dict(), model / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="its unet is missing: no .safetensors file"):                       # a pickle beside its config is not read either
        load.load_pipeline(str(model))
    assert capfd.readouterr().err == ""


# ---- everything that is loaded is whole --------------------------------------------------------------------------


def weights_file(folder, part):
    return next((folder / part).glob("*.safetensors"))


def without(file, name):
    """Rewrites a .safetensors file without one of its tensors."""
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("small", [slow("sd15"), slow("sd21"), "sdxl"], indirect=True)
def test_what_is_loaded_is_whole_or_refused_by_name(small, tmp_path):
    for part in PARTS[:3 + (small.name == "sdxl")]:
        folder = shutil.copytree(small, tmp_path / part)
        names = sorted(load_file(weights_file(folder, part)))
        for lost in (names[len(names) // 2], names[0]):
            without(weights_file(folder, part), lost)
            with pytest.raises(UserError, match=f"--model .*{part}: its {part} is not a whole .* lack {re.escape(lost)}"):
                load.load_pipeline(str(folder))
        load.load_pipeline(str(folder), random_init=True)


def test_text_encoders_are_whole_under_both_names_of_their_tensors(small, tmp_path):
    """transformers 5.6 and later write CLIPTextModel without the prefix text_model., all others with it."""
    expected, folder = models.encode_text(load.load_pipeline(str(small)), ["fox"]), shutil.copytree(small, tmp_path / "model")
    plain = {name.removeprefix("text_model."): value for name, value in load_file(weights_file(folder, "text_encoder")).items()}
    plain["embeddings.position_ids"] = torch.arange(77)[None]                # old versions wrote that too, and it is no weight
    for prefix in ("", "text_model."):
        save_file({prefix + name: value for name, value in plain.items()}, weights_file(folder, "text_encoder"), {"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = models.encode_text(load.load_pipeline(str(folder)), ["fox"])
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tensors_that_are_not_used_are_said(model):
    weights = load_file(weights_file(model, "unet"))
    save_file({**weights, "extra.weight": torch.zeros(1)}, weights_file(model, "unet"), {"format": "pt"})
    with pytest.warns(UserWarning, match="model/unet: extra.weight and 0 more tensors are not used"):
        load.load_pipeline(str(model))


def test_a_single_file_is_whole_or_refused(small, single):
    whole = load_file(single)
    text = sorted(name for name in whole if not name.startswith(("model.diffusion_model.", "first_stage_model.")))
    for lost, message in (("model.diffusion_model.out.2.weight", "lacks tensors of its UNet or autoencoder"),
                          ("first_stage_model.decoder.conv_out.bias", "lacks tensors of its UNet or autoencoder"),
                          ("first_stage_model.quant_conv.weight", "lacks tensors of its UNet or autoencoder"),
                          (next(name for name in text if "norm2.weight" in name or "ln_2.weight" in name), "lacks the text_encoder's .*norm2"),
                          (next(name for name in text if "final" in name), "lacks the text_encoder(_2)?'s .*final_layer_norm")):
        save_file({name: value for name, value in whole.items() if name != lost}, single)
        with pytest.raises(UserError, match=f"not a whole checkpoint: it {message}"):
            load.load_pipeline(str(single), model_config=str(small))


@pytest.mark.parametrize("shards", [dict(), dict(max_shard_size="40KB")], ids=["whole", "sharded"])
def test_weights_that_come_in_one_variant_only_are_loaded(small, tmp_path, monkeypatch, shards):
    expected = load.load_pipeline(str(small))
    stock(small).save_pretrained(tmp_path / "model", variant="fp16", **shards)
    assert list(tmp_path.glob("model/*/*.fp16*.safetensors")) and not list(tmp_path.glob("model/*/*model.safetensors"))
    asked = []

    def download(source, variant=None, **more):
        asked.append((source, variant))
        if variant is None:
            raise OSError("Could not find the necessary `safetensors` weights in {...} (variant=None)")
        return tmp_path / "model"
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    for name in (str(tmp_path / "model"), "somebody/model"):
        found = load.load_pipeline(name)
        for part in PARTS[:3 + (small.name == "sdxl")]:
            ours, theirs = getattr(found, part).state_dict(), getattr(expected, part).state_dict()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert asked == [("somebody/model", None), ("somebody/model", "fp16")]
    shutil.copy(weights_file(small, "unet"), tmp_path / "model" / "unet")               # with both there, the plain one is it
    assert load.variant_of(tmp_path / "model" / "unet") is None


def test_a_student_on_the_hub_brings_what_its_folder_says(small_models, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--somebody--student" / "snapshots" / ("0" * 40)
    shutil.copytree(small_models["sd15"], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    about = dict(teacher="sd15", windows=2, path="linear", config=dict(guidance_teacher=3.0))
    asked = []

    def fetch(source, name):
        asked.append((source, name))
        if name == "labels.json":
            raise huggingface_hub.utils.LocalEntryNotFoundError("none")
        (snapshot / name).write_text(json.dumps(about))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda source, **_: snapshot)
    monkeypatch.setattr(load, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    _, model, info = saved.open_model("somebody/student")
    assert asked == [("somebody/student", "reflow.json"), ("somebody/student", "labels.json")]
    assert info == about and model.windows == 2 and model.path is reflow.PATHS["linear"]
    assert load.folder_of("somebody/student") == snapshot and load.folder_of("nobody/model") == Path("nobody/model")


@pytest.mark.parametrize("error, names", [("EntryNotFoundError", ["reflow.json", "labels.json"]), ("LocalEntryNotFoundError", ["reflow.json"])],
                         ids=["not there", "out of reach"])
def test_a_hub_out_of_reach_is_asked_once_and_one_without_a_file_for_the_next(small_models, monkeypatch, error, names):
    asked = []

    def fetch(source, name):
        asked.append(name)
        raise getattr(huggingface_hub.errors, error)("none")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda source, **_: small_models["sd15"])
    monkeypatch.setattr(load, "hf_hub_download", fetch)
    load.load_pipeline("somebody/model")
    assert asked == names


# ---- every field of a config -------------------------------------------------------------------------------------
# Fields that teacher.py reads, and those that act inside the network or matter to a solver only. The others must be in
# teacher.SUPPORTED, which refuses what they could mean. A field that a new version brings fails here: sort it in.

READ = {
    "scheduler": "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr timestep_type "
                 "sigma_min sigma_max sigma_data use_flow_sigmas flow_shift time_shift_type use_dynamic_shifting",
    "flow scheduler": "shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type",
    "SD3Transformer2DModel": "sample_size patch_size in_channels out_channels pos_embed_max_size joint_attention_dim pooled_projection_dim",
    "FluxTransformer2DModel": "patch_size in_channels out_channels guidance_embeds joint_attention_dim pooled_projection_dim",
    "ZImageTransformer2DModel": "in_channels cap_feat_dim siglip_feat_dim",
    "vae": "scaling_factor shift_factor latents_mean latents_std force_upcast block_out_channels",
    "UNet2DConditionModel": "sample_size in_channels out_channels block_out_channels",
    "UNet2DModel": "sample_size in_channels out_channels block_out_channels num_class_embeds",
    "text_encoder": "max_position_embeddings use_attention_mask",
    "pipeline": "force_zeros_for_empty_prompt",
}
HARMLESS = {
    # of a scheduler: how it steps and spaces its steps, and what it clips
    "scheduler": "algorithm_type clip_sample clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio eta "
                 "euler_at_final final_sigmas_type interpolation_type lambda_min_clipped lower_order_final original_inference_steps "
                 "predict_x0 predictor_order rho sample_max_value set_alpha_to_one sigma_schedule skip_prk_steps solver_order solver_p "
                 "solver_type steps_offset tau_func thresholding timestep_scaling timestep_spacing use_beta_sigmas use_exponential_sigmas "
                 "use_karras_sigmas use_lu_lambdas variance_type kwargs shift_terminal",
    "flow scheduler": "shift_terminal use_karras_sigmas use_exponential_sigmas use_beta_sigmas stochastic_sampling",
    "SD3Transformer2DModel": "num_layers attention_head_dim num_attention_heads caption_projection_dim dual_attention_layers qk_norm",
    "FluxTransformer2DModel": "num_layers num_single_layers attention_head_dim num_attention_heads axes_dims_rope",
    "ZImageTransformer2DModel": "all_patch_size all_f_patch_size dim n_layers n_refiner_layers n_heads n_kv_heads norm_eps qk_norm "
                                "rope_theta t_scale axes_dims axes_lens",
    "vae": "in_channels out_channels down_block_types up_block_types layers_per_block act_fn latent_channels norm_num_groups sample_size "
           "use_quant_conv use_post_quant_conv mid_block_add_attention encoder_block_out_channels decoder_block_out_channels upsample_fn "
           "upsampling_scaling_factor num_encoder_blocks num_decoder_blocks latent_magnitude latent_shift down_block_out_channels "
           "layers_per_down_block up_block_out_channels layers_per_up_block",
    "UNet2DConditionModel": "center_input_sample flip_sin_to_cos freq_shift down_block_types mid_block_type up_block_types "
                            "only_cross_attention layers_per_block downsample_padding mid_block_scale_factor dropout act_fn norm_num_groups "
                            "norm_eps cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block "
                            "attention_head_dim num_attention_heads dual_cross_attention use_linear_projection addition_time_embed_dim "
                            "upcast_attention resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_type "
                            "time_embedding_dim time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel "
                            "projection_class_embeddings_input_dim attention_type class_embeddings_concat mid_block_only_cross_attention "
                            "cross_attention_norm addition_embed_type_num_heads "
                            "encoder_hid_dim",                                          # which sets encoder_hid_dim_type
    "UNet2DModel": "center_input_sample time_embedding_dim freq_shift flip_sin_to_cos down_block_types mid_block_type up_block_types "
                   "layers_per_block mid_block_scale_factor downsample_padding downsample_type upsample_type dropout act_fn "
                   "attention_head_dim norm_num_groups attn_norm_num_groups norm_eps resnet_time_scale_shift add_attention "
                   "num_train_timesteps",                                               # of time_embedding_type learned
    "text_encoder": "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads hidden_act "
                    "layer_norm_eps attention_dropout initializer_range initializer_factor pad_token_id bos_token_id eos_token_id",
    "pipeline": "vae text_encoder text_encoder_2 tokenizer tokenizer_2 unet scheduler safety_checker feature_extractor image_encoder "
                "requires_safety_checker add_watermarker",
}


def fields(kind):
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def test_every_config_field_is_read_refused_or_harmless():
    schedulers = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    schedulers = [kind for kind in schedulers if "beta_schedule" in fields(kind) or kind.__name__.startswith("EDM")]
    assert len(schedulers) >= 20 and diffusers.EulerDiscreteScheduler in schedulers
    from transformers import CLIPTextConfig, PretrainedConfig
    used = {
        "scheduler": set().union(*map(fields, schedulers)),
        "flow scheduler": set().union(*map(fields, (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler,
                                                    diffusers.FlowMapEulerDiscreteScheduler))),
        **{kind.__name__: fields(kind) for kind in (diffusers.SD3Transformer2DModel, diffusers.FluxTransformer2DModel,
                                                    diffusers.ZImageTransformer2DModel)},
        "vae": fields(diffusers.AutoencoderKL) | fields(diffusers.AutoencoderTiny) | fields(diffusers.AsymmetricAutoencoderKL),
        "UNet2DConditionModel": fields(diffusers.UNet2DConditionModel), "UNet2DModel": fields(diffusers.UNet2DModel),
        "text_encoder": set(CLIPTextConfig().to_dict()) - set(PretrainedConfig().to_dict()) - {"model_type"},
        "pipeline": fields(diffusers.StableDiffusionPipeline) | fields(diffusers.StableDiffusionXLPipeline)
        | fields(diffusers.DDPMPipeline) | fields(diffusers.DDIMPipeline),
    }
    for part, names in used.items():
        known = {**dict.fromkeys(READ[part].split()), **dict.fromkeys(HARMLESS[part].split()), **configs.SUPPORTED.get(part, {})}
        assert not names - set(known), f"{part}: new fields"
        assert not set(READ[part].split()) & set(HARMLESS[part].split())


@pytest.mark.parametrize("kind, changes", [
    (diffusers.DDPMScheduler, dict(beta_schedule="sigmoid")),
    (diffusers.HeunDiscreteScheduler, dict(beta_schedule="exp")), (diffusers.LCMScheduler, dict()), (diffusers.UnCLIPScheduler, dict()),
    (diffusers.EulerDiscreteScheduler, dict(beta_schedule="squaredcos_cap_v2")),
    (diffusers.PNDMScheduler, dict(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)),
    (diffusers.DDIMScheduler, dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")),
    (diffusers.DPMSolverMultistepScheduler, dict(beta_schedule="scaled_linear", use_karras_sigmas=True))],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value))
def test_every_curve_of_betas_is_read_as_its_own_scheduler_has_it(kind, changes):
    scheduler = kind(**changes)
    schedule, prediction = configs.read_schedule(scheduler)
    assert torch.equal(schedule.alpha[1:], scheduler.alphas_cumprod.double().sqrt()) and prediction == scheduler.config.prediction_type
    assert torch.equal(configs.as_ddim(scheduler).alphas_cumprod, scheduler.alphas_cumprod)         # what a student is written with


def test_a_clock_that_is_not_followed_is_refused_and_its_remedy_means_the_same():
    sigma, data = torch.tensor([0.5, 7.0]), dict(prediction_type="v_prediction")
    euler = diffusers.EulerDiscreteScheduler(timestep_type="continuous", **data)
    with pytest.raises(UserError, match="timestep_type .* name EDMEulerScheduler .* sigma_data 1"):
        configs.read_schedule(euler)
    euler.set_timesteps(5)
    edm = diffusers.EDMEulerScheduler(sigma_data=1.0, sigma_min=euler.sigmas[-2].item(), sigma_max=euler.sigmas[0].item(), **data)
    assert torch.allclose(edm.precondition_noise(euler.sigmas[:-1]), euler.timesteps, atol=1e-6)
    sample, output = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    theirs = output * (-sigma / (sigma ** 2 + 1) ** 0.5) + sample / (sigma ** 2 + 1)                 # EulerDiscreteScheduler.step
    ours = torch.stack([edm.precondition_outputs(sample[i], output[i], sigma[i]) for i in range(2)])
    assert torch.allclose(ours, theirs, atol=1e-6)
    configs.read_schedule(diffusers.EulerDiscreteScheduler(timestep_type="continuous"))             # means nothing with epsilon


PER_CHANNEL = dict(latents_mean=[-1.6, 2.3, 0.4, -0.1], latents_std=[8.4, 5.1, 4.0, 9.2])
EDM = dict(_class_name="EDMDPMSolverMultistepScheduler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)


@pytest.mark.parametrize("vae, noise", [
    (dict(), dict()), (PER_CHANNEL, dict()), (dict(PER_CHANNEL, scaling_factor=0.5), EDM),
    (dict(), dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    (dict(), dict(prediction_type="sample", beta_schedule="squaredcos_cap_v2"))],
    ids=["sdxl", "latents per channel", "playground 2.5", "v at zero SNR", "cosine"])
def test_pictures_equal_diffusers_own_for_every_family(small_models, tmp_path, vae, noise):
    folder = shutil.copytree(small_models["sdxl"], tmp_path / "model")
    edit(folder, "vae/config.json", **vae)
    edit(folder, "scheduler/scheduler_config.json", **noise)
    if noise is EDM:
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(EDM))
        edit(folder, "model_index.json", scheduler=["diffusers", EDM["_class_name"]])
    ours, theirs = load.load_pipeline(str(folder)), diffusers.DiffusionPipeline.from_pretrained(folder)
    if noise is EDM:
        theirs.scheduler = diffusers.EDMEulerScheduler.from_config(theirs.scheduler.config)
    else:
        theirs = stock(folder)
    theirs.set_progress_bar_config(disable=True)
    model, z = models.as_model(ours), sampler.noise([5, 6], (4, 8, 8))
    times = sampler.time_grid(4, spacing=solvers.edm_grid if noise is EDM else sampler.uniform_grid, schedule=model.schedule)
    found = models.decode(ours, sampler.generate(ours, model, ["fox", "heart"], [5, 6], times, 3.0))
    expected = theirs(["fox", "heart"], num_inference_steps=4, guidance_scale=3.0, latents=z, output_type="pt", height=32, width=32)
    assert ((found + 1) / 2 - expected.images).abs().max() <= 1e-4 and found.std() > 0.05


@pytest.mark.parametrize("statistics", [dict(), PER_CHANNEL], ids=["plain", "per channel"])
def test_latents_equal_diffusers_own_whatever_the_autoencoders_statistics(small_models, tmp_path, monkeypatch, statistics):
    folder = shutil.copytree(small_models["sdxl"], tmp_path / "model")
    edit(folder, "vae/config.json", **statistics)
    ours, theirs, images = load.load_pipeline(str(folder)), stock(folder), torch.rand(2, 3, 32, 32) * 2 - 1
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline(**theirs.components)
    mean = ours.vae.encode(images).latent_dist.mean                          # which is what we take; diffusers draws a sample
    monkeypatch.setattr(theirs.vae, "encode", lambda images: types.SimpleNamespace(latents=mean))
    expected = theirs.prepare_latents(images, None, 2, 1, torch.float32, "cpu", add_noise=False)
    assert torch.allclose(models.encode(ours, images), expected, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_text_is_masked_where_the_text_encoder_says_so(small_models, tmp_path, masked):
    folder = shutil.copytree(small_models["sd15"], tmp_path / "model")
    edit(folder, "text_encoder/config.json", use_attention_mask=masked)
    ours, theirs = load.load_pipeline(str(folder)), stock(folder)
    given, null = theirs.encode_prompt(["fox", LONG[:40]], "cpu", 1, True)
    found = models.encode_text(ours, ["fox", LONG[:40], None])["encoder_hidden_states"]
    assert torch.allclose(found, torch.cat([given, null[:1]]), atol=1e-5)


def test_what_a_config_leaves_out_is_known_otherwise_or_named(small_models, tmp_path):
    folder = shutil.copytree(small_models["sd15"], tmp_path / "model")
    expected = models.encode_text(load.load_pipeline(str(folder)), ["fox"])
    for absent in (None, 10 ** 30):
        edit(folder, "tokenizer/tokenizer_config.json", model_max_length=absent)
        found = models.encode_text(load.load_pipeline(str(folder)), ["fox"])
        assert torch.equal(found["encoder_hidden_states"], expected["encoder_hidden_states"])
    edit(folder, "unet/config.json", sample_size=None)
    pipeline = load.load_pipeline(str(folder))
    with pytest.raises(UserError, match="no sample_size: give --size"):
        models.latent_shape(pipeline)
    assert models.latent_shape(pipeline, 32) == (4, 8, 8)


@pytest.mark.parametrize("file, options", [("vocabulary.json", {}), ("labels.json", {}), ("vae/config.json", dict(vae=None)),
                                           ("vae/config.json", {}), ("model_index.json", {}), ("unet/config.json", {})])
def test_a_truncated_json_file_is_named(small_models, tmp_path, file, options):
    source = load.ASSETS / "tiny-pixel" if file == "labels.json" else small_models["sd15"]
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / file).write_text('["a", ')
    with pytest.raises(UserError, match=file.rsplit("/", 1)[-1]):
        load.load_pipeline(str(folder), **options)
        saved.doubts(str(folder), {}, ["fox"], 1, 1.0)


@pytest.mark.parametrize("name", [slow("sd15"), "sdxl"])
def test_a_single_file_says_what_it_predicts(small_models, tmp_path, name):
    """By the keys and metadata that ComfyUI and sd-scripts know it by; the configs beside it are those of an epsilon model."""
    edm = dict(edm_mean=torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1), edm_std=torch.full((1, 4, 1, 1), 5.0))
    empty = torch.zeros(0)
    single, folder = tmp_path / f"{name}.safetensors", small_models[name]

    def read(metadata=None, **keys):
        save_file({**weights, **keys}, single, metadata)
        pipeline = load.load_pipeline(str(single), model_config=str(folder))
        return pipeline, *configs.read_schedule(pipeline.scheduler)
    weights = original_layout(folder)
    _, plain, prediction = read()
    assert prediction == "epsilon"
    for said in (dict(v_pred=empty), dict(metadata={"modelspec.prediction_type": "v"})):
        _, schedule, prediction = read(**said)
        assert prediction == "v_prediction" and schedule.key == plain.key
    pipeline, schedule, prediction = read(v_pred=empty, ztsnr=empty)
    assert prediction == "v_prediction" and schedule.alpha[-1] == 0 and abs(schedule.alpha[1] - plain.alpha[1]) < 1e-6
    assert read(v_pred=empty, metadata={"modelspec.prediction_type": "epsilon"})[2] == "v_prediction"
    with pytest.raises(UserError, match="predicts epsilon at zero terminal SNR"):
        read(ztsnr=empty)
    _, schedule, prediction = read(**{"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.25)})
    assert (schedule.key, prediction) == (("edm", 0.25, 120, 1), "v_prediction")
    if name == "sd15":
        return
    pipeline, schedule, prediction = read(**edm)
    assert (schedule.key, prediction) == (("edm", 0.002, 80, 0.5), "epsilon")
    assert latents.latent_statistics(pipeline.vae)[0] == 0.5
    assert [value.flatten().tolist() for value in latents.latent_statistics(pipeline.vae)[1:]] == [[1, 2, 3, 4], [5] * 4]


def test_a_single_file_of_sd2_is_not_taken_for_one_of_two_models(small_models, tmp_path, monkeypatch):
    single, weights = tmp_path / "two.safetensors", original_layout(small_models["sd21"])
    monkeypatch.setitem(load.PRESETS, "sd21", (str(small_models["sd21"]), ""))            # stands for the hub
    for metadata in (None, {"modelspec.architecture": "stable-diffusion-v2-512"}):
        save_file(weights, single, metadata)
        with pytest.raises(UserError, match="does not say whether .* 768 px v_prediction .* 512 px epsilon .* give --model-config FOLDER"):
            load.load_pipeline(str(single))
    save_file(weights, single, {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    assert configs.read_schedule(load.load_pipeline(str(single)).scheduler)[1] == "v_prediction"


# ---- what is passed on is finite ---------------------------------------------------------------------------------


def spoil(folder, part, name, change):
    """Rewrites one tensor of a network's file."""
    weights = load_file(weights_file(folder, part))
    weights[name] = change(weights[name])
    save_file(weights, weights_file(folder, part), metadata={"format": "pt"})


@pytest.mark.parametrize("part, name, dtype, message", [
    ("unet", "conv_out.bias", "fp32", "seed 7, prompt 'fox': its latents are not finite: .*--dtype"),
    ("vae", "decoder.conv_out.bias", "fp32", "picture 1 of 2: .*autoencoder.* torch.float32"),
    ("text_encoder", "final_layer_norm.bias", "fp32", "prompt 'fox': its text embedding is not finite")])
def test_what_is_not_finite_is_refused_where_it_arose(model, tmp_path, part, name, dtype, message):
    spoil(model, part, name, lambda value: value * float("nan"))
    with pytest.raises(UserError, match=message):
        sampler.main(sampler.Config(prompt=["fox", "cat"], seed=7, steps=1, out=str(tmp_path / "a.png"), model=str(model), dtype=dtype))
    assert not (tmp_path / "a.png").exists()


def test_rows_that_are_not_finite_are_not_kept(tmp_path):
    def solve(numbers):
        return {"z": torch.ones(len(numbers), 2) / torch.tensor([[float(k != 5)] for k in numbers]), "label": torch.tensor([*numbers])}
    with pytest.raises(UserError, match="z of rows 4 to 7 is not finite"):
        store.cached(tmp_path / "cache", 8, {}, solve, shard=4)
    assert [file.name for file in tmp_path.glob("cache/*.safetensors")] == ["00000.safetensors"]


def test_an_autoencoder_that_overflows_in_half_precision_gives_no_black_picture(model):
    edit(model, "vae/config.json", force_upcast=False)
    spoil(model, "vae", "decoder.conv_in.weight", lambda value: value * 1e6)
    spoil(model, "vae", "encoder.conv_in.weight", lambda value: value * 1e6)
    z, images = sampler.noise([0, 1, 2], (4, 8, 8)), torch.rand(2, 3, 32, 32)
    half, whole = (load.load_pipeline(str(model), dtype) for dtype in (torch.float16, torch.float32))
    assert models.decode(whole, z).isfinite().all() and models.encode(whole, images).isfinite().all()
    with pytest.raises(UserError, match="picture 1 of 3: .* not finite in torch.float16; use bf16 or fp32"):
        models.decode(half, z)
    with pytest.raises(UserError, match="picture 1 of 2: .* not finite in torch.float16; use bf16 or fp32"):
        models.encode(half, images)
    z[1, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="picture 2 of 3: its latents are not finite"):
        models.decode(whole, z)


@pytest.mark.parametrize("small", [slow("sd15"), slow("sd21"), "sdxl"], indirect=True)
def test_sampler_options_for_large_models(small_models, single, small, tmp_path, capsys):
    def run(prompt="fox", **options):
        sampler.main(sampler.Config(prompt=[prompt], steps=2, out=str(tmp_path / "a.png"), scale=1, **options))
        return Image.open(tmp_path / "a.png")
    usual = run(model=str(small))
    assert usual.size == (32, 32) and run(model=str(small), size=48).size == (48, 48)
    assert run(model=str(single), model_config=str(small)).tobytes() == usual.tobytes()
    assert run(model=str(small), random_init=True).tobytes() == usual.tobytes()             # the sibling is seed 0 itself
    assert run(model=str(small), dtype="bf16").tobytes() != usual.tobytes()
    assert run(model=str(small), compare=True, size=40).width > 80
    capsys.readouterr()
    run(LONG, model=str(small))
    assert "warning: 'red heart" in capsys.readouterr().out
    with pytest.raises(UserError, match="--size 33"):
        run(model=str(small), size=33)
    with pytest.raises(UserError, match="--dtype fp8: not one of fp32, bf16, fp16"):
        run(model=str(small), dtype="fp8")


def test_times_outside_data_to_noise_are_refused(schedule):
    for t in (-0.01, 1.01):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            schedule(torch.tensor([0.5, t]))
    schedule(torch.tensor([0.0, 1.0], dtype=torch.float64) + 1e-12)           # rounding is not a mistake


def test_the_embedded_tokenizer_is_the_same_whoever_makes_it():
    """Two processes train one text tower with a tokenizer each: words must have the same numbers in both."""
    one, *others = (build.make_tokenizer() for _ in range(3))
    assert all(other.get_vocab() == one.get_vocab() for other in others)
