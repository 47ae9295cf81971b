"""architectures.py: the published counts and configs, and weights that depend on the part, the seed and the dtype alone."""
import math
import resource
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from diffusers import DDIMScheduler

import models
import sampler
from models import architectures, load, stable_diffusion

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CLIP_L, OPENCLIP_H, OPENCLIP_BIGG, VAE = 123_060_480, 340_387_840, 694_659_840, 83_653_863
COUNTS = {
    "sd15": dict(text_encoder=CLIP_L, vae=VAE, unet=859_520_964),
    "sd21": dict(text_encoder=OPENCLIP_H, vae=VAE, unet=865_910_724),
    "sdxl": dict(text_encoder=CLIP_L, text_encoder_2=OPENCLIP_BIGG, vae=VAE, unet=2_567_463_684),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_and_configs_are_the_published_ones(name):
    pipeline = architectures.build(name, weights=False)
    assert {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in COUNTS[name]} == COUNTS[name]
    assert all(p.is_meta for part in COUNTS[name] for p in getattr(pipeline, part).parameters())
    c = pipeline.scheduler.config
    assert (c.beta_start, c.beta_end, c.beta_schedule, c.num_train_timesteps, c.steps_offset) == (0.00085, 0.012, "scaled_linear", 1000, 1)
    assert c.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    assert not DDIMScheduler.from_config(c).config.clip_sample
    assert pipeline.unet.config.upcast_attention == (name == "sd21")
    assert pipeline.vae.config.scaling_factor == (0.13025 if name == "sdxl" else 0.18215) and pipeline.vae_scale_factor == 8
    assert models.native_size(pipeline) == {"sd15": (512, 512), "sd21": (768, 768), "sdxl": (1024, 1024)}[name]
    assert pipeline.config.get("force_zeros_for_empty_prompt", False) == (name == "sdxl") and pipeline.vae.config.force_upcast
    assert pipeline.tokenizer("fox", padding="max_length").input_ids[2:4] == [pipeline.tokenizer.eos_token_id] * 2
    assert len(pipeline.tokenizer("fox", padding="max_length").input_ids) == 77


@pytest.mark.parametrize("name", COUNTS)
def test_full_size_networks_run_under_the_contract_and_never_wait_for_the_device(name):
    """On the meta device there are shapes but no values: reading one, an .item() or an if on a tensor, raises."""
    pipeline = architectures.build(name, weights=False)
    model, (channels, height, width) = models.as_model(pipeline), models.latent_shape(pipeline)
    wide = pipeline.unet.config.cross_attention_dim
    cond = {"encoder_hidden_states": torch.empty(2, 77, wide, device="meta")}
    if name == "sdxl":
        cond |= {"text_embeds": torch.empty(2, 1280, device="meta"), "time_ids": torch.empty(2, 6, device="meta")}
    z = torch.empty(2, channels, height, width, device="meta")
    end = sampler.ddim(model, z, sampler.time_grid(2), cond, guidance=5.0, uncond=cond)
    assert end.is_meta and end.shape == z.shape and end.dtype == torch.float32
    assert list(model.schedule.tables) == [torch.device("meta")]


T5_XXL, VAE_16, CLIP_L_PROJECTED = 4_762_310_656, 83_819_683, 123_650_304
SD3_TEXT = dict(text_encoder=CLIP_L_PROJECTED, text_encoder_2=OPENCLIP_BIGG, text_encoder_3=T5_XXL)
TRANSFORMERS = {
    "sd3": dict(SD3_TEXT, vae=VAE_16, transformer=2_028_328_000),
    "sd35-medium": dict(SD3_TEXT, vae=VAE_16, transformer=2_243_171_520),
    "sd35": dict(SD3_TEXT, vae=VAE_16, transformer=8_056_627_520),
    "flux": dict(text_encoder=CLIP_L, text_encoder_2=T5_XXL, vae=VAE_16, transformer=11_901_408_320),
    "flux-schnell": dict(text_encoder=CLIP_L, text_encoder_2=T5_XXL, vae=VAE_16, transformer=11_891_178_560),
    "zimage": dict(text_encoder=4_022_468_096, vae=VAE_16, transformer=6_154_908_736),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_full_size_transformers_have_the_published_counts_and_run_under_the_contract(name):
    """On the meta device: nothing is allocated, and an .item() would raise."""
    pipeline = architectures.build(name, weights=False)
    assert {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in TRANSFORMERS[name]} == TRANSFORMERS[name]
    models.family(pipeline).complete(pipeline, Path("nowhere"), ())
    assert models.native_size(pipeline) == (1024, 1024) and models.latent_shape(pipeline) == (16, 128, 128)
    shift = {"zimage": 6, "flux": math.exp(1.15), "flux-schnell": 1}.get(name, 3)            # FLUX.1-dev: 4096 patches
    model, network = models.as_model(pipeline), models.network(pipeline).to("meta")
    assert model.schedule.shift == pytest.approx(shift) and name in load.PRESETS
    cond = models.family(pipeline).meta_condition(network)
    end = sampler.ddim(model, torch.empty(1, 16, 32, 32, device="meta"), sampler.time_grid(2), cond)
    assert end.is_meta and end.shape == (1, 16, 32, 32) and end.dtype == torch.float32


def test_a_shortened_transformer_keeps_its_width(monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))
    whole = architectures.ARCHITECTURES["flux"]
    architectures.shorten("flux", 2)
    c = architectures.build("flux", weights=False).transformer.config
    assert (c.num_layers, c.num_single_layers, c.num_attention_heads * c.attention_head_dim) == (2, 2, 3072)
    assert "num_layers" not in whole["transformer"][1]


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_part_has_the_same_weights_whatever_is_built_with_it():
    whole = architectures.build("sdxl", **SMALL["sdxl"])
    for part, group in (("unet", "network"), ("vae", "vae"), ("text_encoder", "text"), ("text_encoder_2", "text")):
        alone = architectures.build("sdxl", parts=(group,), **SMALL["sdxl"])
        assert same(weights(getattr(alone, part)), weights(getattr(whole, part)))
        assert all((getattr(alone, other) is None) == (not other.startswith(group.replace("network", "unet"))) for other in PARTS)
    assert architectures.build("sdxl", parts=(), **SMALL["sdxl"]).tokenizer is None
    again, other = (architectures.build("sdxl", seed=seed, parts=("network",), **SMALL["sdxl"]).unet for seed in (0, 1))
    assert same(weights(again), weights(whole.unet)) and not same(weights(other), weights(whole.unet))
    starts = [next(getattr(whole, part).parameters()).flatten()[:8] for part in PARTS]
    assert len({tuple((start / start[0]).round(decimals=2).tolist()) for start in starts}) == 4           # each part has a stream of its own
    vectors = [value.flatten()[:8] for value in weights(whole.unet).values() if value.numel() >= 8]
    assert len({tuple(vector.tolist()) for vector in vectors}) == len(vectors)            # a mix-up of two tensors would show


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_made_in_the_dtype_and_are_the_same_each_time(dtype):
    first, second = (architectures.build("sd15", dtype, **SMALL["sd15"]) for _ in range(2))
    for part in ("unet", "vae", "text_encoder"):
        module = getattr(first, part)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert same(weights(module), weights(getattr(second, part)))


def test_a_ready_component_goes_in_as_it_is_and_a_misspelt_override_is_refused():
    student = architectures.build("sd15", parts=("network",), **SMALL["sd15"]).unet.requires_grad_(True).train()
    pipeline = architectures.build("sd15", unet=student, vae=None, text_encoder=None, text_encoder_2=None)
    assert pipeline.unet is student and student.training and student.conv_in.weight.requires_grad
    assert pipeline.vae is pipeline.text_encoder is None and pipeline.tokenizer is not None
    for wrong in (dict(unett={}), dict(unet=dict(sample_sice=8)), dict(text_encoder=dict(hidden_sise=8)), dict(vae=dict(scale=1))):
        with pytest.raises(TypeError):
            architectures.build("sd15", weights=False, **wrong)


def test_pooling_is_at_the_first_eos():
    """Two prompts that differ in the last word alone must differ in the pooled output: the highest id is not the end here."""
    pipeline = architectures.build("sdxl", parts=("text",), **SMALL["sdxl"])
    pooled = stable_diffusion.encode_text(pipeline, ["fox on blue", "fox on red", "fox"], 64, "auto", (32, 32), "cpu")["text_embeds"]
    assert min((pooled[i] - pooled[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_of_order_one(small, dtype):
    pipeline = load.load_pipeline(str(small), dtype)
    cond = models.encode_text(pipeline, ["fox", None])
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.5])
    images = models.decode(pipeline, z)
    for x in (*cond.values(), *models.as_model(pipeline)(z, t, cond), images, models.encode(pipeline, images)):
        assert x.isfinite().all() and x.dtype == torch.float32
    output = pipeline.unet(z.to(dtype), torch.tensor([999., 499.]), cond["encoder_hidden_states"].to(dtype), added_cond_kwargs=cond).sample
    assert 0.1 < output.float().std() < 3


# ---- the real sizes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, side", [("sd15", 64), ("sd21", 32), ("sdxl", 32)])
def test_full_depth_is_finite_in_fp32_and_bf16(name, side):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16) if name != "sdxl" else (torch.bfloat16,):
        start = time.time()
        pipeline = architectures.build(name, dtype)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        print(f"\n{name} {dtype}: built in {time.time() - start:.1f} s, peak {peak:.2f} GiB")
        start, cond = time.time(), models.encode_text(pipeline, ["fox on blue"])
        print(f"{name} {dtype}: text in {time.time() - start:.1f} s; " + ", ".join(f"{k} std {v.std():.2f}" for k, v in cond.items()))
        z, shown = torch.randn(1, 4, side, side, generator=generator), []
        pipeline.unet.register_forward_hook(lambda module, args, output: shown.append(output[0].float()))
        start = time.time()
        with torch.no_grad():
            pair = models.as_model(pipeline)(z, torch.ones(1), cond)
        print(f"{name} {dtype}: UNet at {side} x {side} in {time.time() - start:.1f} s, output std {shown[0].std():.2f}")
        assert all(x.isfinite().all() for x in (*pair, *cond.values())) and 0.1 < shown[0].std() < 3
        del pipeline
