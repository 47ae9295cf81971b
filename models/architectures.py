"""The published architectures of Stable Diffusion 1.5, 2.1 (768-v) and XL base, as data, with
random weights: everything in this project runs on them without a download. Values that are
diffusers' or transformers' defaults are not repeated.

    python architectures.py                         # prints the parts and their parameters;
    allocates nothing
"""
import zlib
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 77
TOKENIZER = Path(__file__).parent.parent / "assets" / "tiny-sd" / "tokenizer"

NOISE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
             steps_offset=1,
             prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True)

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
              projection_dim=768)

OPENCLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                  projection_dim=512,
                  hidden_act="gelu")  # 23 of its 24 layers: SD 2 was trained on the penultimate one

OPENCLIP_BIGG = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                     projection_dim=1280, hidden_act="gelu")

VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4,
           layers_per_block=2, latent_channels=4, scaling_factor=0.18215)

UNET = dict(in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280))

# part -> (class, config); attention_head_dim is, in this class of diffusers, the NUMBER of heads
ARCHITECTURES = {
    "sd15": dict(
        scheduler=(PNDMScheduler, NOISE),
        text_encoder=(CLIPTextModel, CLIP_L),
        vae=(AutoencoderKL, dict(VAE, sample_size=512)),
        unet=(UNet2DConditionModel,
              dict(UNET, sample_size=64, cross_attention_dim=768, attention_head_dim=8))),
    "sd21": dict(
        scheduler=(DDIMScheduler, dict(NOISE, prediction_type="v_prediction")),
        text_encoder=(CLIPTextModel, OPENCLIP_H),
        vae=(AutoencoderKL, dict(VAE, sample_size=768)),
        unet=(UNet2DConditionModel,
              dict(UNET, sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                   use_linear_projection=True, upcast_attention=True))),
    "sdxl": dict(
        scheduler=(EulerDiscreteScheduler, dict(NOISE, timestep_spacing="leading")),
        text_encoder=(CLIPTextModel, CLIP_L),
        text_encoder_2=(CLIPTextModelWithProjection, OPENCLIP_BIGG),
        vae=(AutoencoderKL, dict(VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True)),
        unet=(UNet2DConditionModel, dict(
            UNET, sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            # 2048 = 768 + 1280
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            # 2816 = 6 x 256 + 1280
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816))),
}


def build(name, dtype=torch.float32, seed=0, parts=("text", "vae", "unet"), weights=True, **overrides):
    """A diffusers pipeline of the architecture `name` with random weights, made on the CPU directly
    in dtype.
    parts: what to make, the rest is None. overrides: per component (unet, text_encoder_2,
    scheduler, ...) a dict of changed config values, or the ready component, or None to leave it
    out. weights: False leaves all on the meta device.
    Returns: StableDiffusionPipeline or StableDiffusionXLPipeline, frozen, in eval mode.
    A part's weights depend on its own config and the seed alone, up to the rounding of dtype.
    Raises KeyError for another name, TypeError for a misspelt override."""
    # The published vocabularies cannot be had without a download: the embedded model's, whose ids all fit,
    # padded and cut as theirs.
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.model_max_length = TOKENS
    # Pooling takes the output at the first eos. The published configs say 2, which transformers reads as "at
    # the highest id":
    # right for their vocabulary, wrong for this one.
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                   pad_token_id=tokenizer.pad_token_id)
    pieces = {}
    for part, (kind, config) in ARCHITECTURES[name].items():
        override, group = overrides.pop(part, {}), "text" if part.startswith("text") else part
        if group == "text":
            vocabulary = part.replace("text_encoder", "tokenizer")
            pieces[vocabulary] = overrides.pop(vocabulary, tokenizer if "text" in parts else None)
        if not isinstance(override, dict):
            pieces[part] = override
        elif part == "scheduler":
            # keeps keys of other schedulers, as the files do
            pieces[part] = kind.from_config({**config, **override})
        elif group not in parts:
            pieces[part] = None
        elif group == "text":
            unknown = [key for key in override if not hasattr(CLIPTextConfig(), key)]
            if unknown:
                raise TypeError(f"{part}: {', '.join(unknown)} is not in its config")
            pieces[part] = random_part(lambda: kind(CLIPTextConfig(**{**special, **config, **override})),
                                       part, dtype, seed, weights)
        else:
            pieces[part] = random_part(lambda: kind(**{**config, **override}), part, dtype, seed, weights)
    # left out and not there anyway
    overrides = {part: value for part, value in overrides.items() if value is not None}
    if overrides:
        raise TypeError(f"{name} has no component {', '.join(overrides)}; it has {', '.join(pieces)}")
    if "text_encoder_2" in pieces:
        return StableDiffusionXLPipeline(**pieces, force_zeros_for_empty_prompt=True, add_watermarker=False)
    return StableDiffusionPipeline(**pieces, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


def random_part(make, part, dtype=torch.float32, seed=0, weights=True):
    """The module that make() returns, built without memory and then filled once, tensor by tensor:
    SDXL never exists in float32, and in half precision it is that network rounded.
    Matrices and kernels ~ N(0, 1/fan_in), which keeps activations of order one at any depth;
    biases ~ N(0, 0.02^2) and gains 1 + N(0, 0.02^2), so that no two tensors are equal and a mix-up
    shows.  Returns: the module, frozen, in eval mode."""
    with init_empty_weights():  # parameters only: CLIP's position_ids are a real buffer
        module = make()
    if weights:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {part}".encode()))
        filled = {}
        for name, parameter in module.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            filled[name] = torch.empty(parameter.shape).normal_(float(gain), std,
                                                                generator=generator).to(dtype)
        module.load_state_dict(filled, strict=False, assign=True)
    return module.requires_grad_(False).eval()


if __name__ == "__main__":
    for name in ARCHITECTURES:
        pieces = build(name, weights=False).components.items()
        print(f"{name}: " + ", ".join(f"{part} {sum(p.numel() for p in piece.parameters()):,}"
                                      for part, piece in pieces
                                      if isinstance(piece, torch.nn.Module)))
