"""The published architectures of Stable Diffusion 1.5, 2.1 (768-v), XL base, 3 and 3.5, FLUX.1,
Z-Image, DiT, PixArt and SANA, as data, with random weights: everything in this project runs on them
without a download. Values that are diffusers' or transformers' defaults are not repeated.

    python -m models.architectures        # prints the parts and their parameters; allocates nothing
"""
import copy
import inspect
import zlib
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Model,
    Qwen3Model,
    T5EncoderModel,
)

TOKENS = 77
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
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

T5_XXL = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")

QWEN3_4B = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
                rope_theta=1_000_000.0, tie_word_embeddings=True)

VAE_16 = dict(VAE, latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False,
              scaling_factor=1.5305, shift_factor=0.0609)

VAE_FLUX = dict(VAE_16, scaling_factor=0.3611, shift_factor=0.1159)           # Z-Image's too

SD3 = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)

UNET = dict(in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280))

# DiT's and PixArt's, of the first diffusion models
LINEAR_NOISE = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                    prediction_type="epsilon")

# 32 pixels to a side of a latent; its later half attends
DC_AE = dict({f"{side}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
              for side in ("encoder", "decoder")},
             downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407)

PIXART = dict(caption_channels=4096, interpolation_scale=2)

SD_PIPELINE = (StableDiffusionPipeline, dict(safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False))


def sd3(transformer):
    return dict(pipeline=(StableDiffusion3Pipeline, {}),
                scheduler=(FlowMatchEulerDiscreteScheduler, dict(shift=3.0)),
                text_encoder=(CLIPTextModelWithProjection, CLIP_L),
                text_encoder_2=(CLIPTextModelWithProjection, OPENCLIP_BIGG),
                text_encoder_3=(T5EncoderModel, T5_XXL), vae=(AutoencoderKL, VAE_16),
                transformer=(SD3Transformer2DModel, transformer))


def flux(scheduler, guidance_embeds):
    return dict(pipeline=(FluxPipeline, {}), scheduler=(FlowMatchEulerDiscreteScheduler, scheduler),
                text_encoder=(CLIPTextModel, CLIP_L), text_encoder_2=(T5EncoderModel, T5_XXL),
                vae=(AutoencoderKL, VAE_FLUX),
                transformer=(FluxTransformer2DModel, dict(guidance_embeds=guidance_embeds)))


def pixart(pipeline, scaling_factor, transformer):
    return dict(pipeline=(pipeline, {}), scheduler=(DPMSolverMultistepScheduler, LINEAR_NOISE),
                text_encoder=(T5EncoderModel, T5_XXL),
                vae=(AutoencoderKL, dict(VAE, sample_size=1024, scaling_factor=scaling_factor)),
                transformer=(PixArtTransformer2DModel, transformer))


# part -> (class, config); attention_head_dim is, in this class of diffusers, the NUMBER of heads
ARCHITECTURES = {
    "sd15": dict(
        pipeline=SD_PIPELINE,
        scheduler=(PNDMScheduler, NOISE),
        text_encoder=(CLIPTextModel, CLIP_L),
        vae=(AutoencoderKL, dict(VAE, sample_size=512)),
        unet=(UNet2DConditionModel,
              dict(UNET, sample_size=64, cross_attention_dim=768, attention_head_dim=8))),
    "sd21": dict(
        pipeline=SD_PIPELINE,
        scheduler=(DDIMScheduler, dict(NOISE, prediction_type="v_prediction")),
        text_encoder=(CLIPTextModel, OPENCLIP_H),
        vae=(AutoencoderKL, dict(VAE, sample_size=768)),
        unet=(UNet2DConditionModel,
              dict(UNET, sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                   use_linear_projection=True, upcast_attention=True))),
    "sdxl": dict(
        pipeline=(StableDiffusionXLPipeline, dict(force_zeros_for_empty_prompt=True, add_watermarker=False)),
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
    "sd3": sd3(SD3),
    "sd35": sd3(dict(SD3, num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                     qk_norm="rms_norm")),
    "sd35-medium": sd3(dict(SD3, pos_embed_max_size=384, qk_norm="rms_norm",
                            dual_attention_layers=tuple(range(13)))),
    "flux": flux(dict(shift=3.0, use_dynamic_shifting=True), guidance_embeds=True),
    "flux-schnell": flux(dict(shift=1.0), guidance_embeds=False),
    "zimage": dict(
        pipeline=(ZImagePipeline, {}),
        scheduler=(FlowMatchEulerDiscreteScheduler, dict(shift=6.0)),
        text_encoder=(Qwen3Model, QWEN3_4B),
        vae=(AutoencoderKL, VAE_FLUX),
        transformer=(ZImageTransformer2DModel, {})),
    "dit": dict(
        pipeline=(DiTPipeline, {}),
        scheduler=(DDIMScheduler, dict(LINEAR_NOISE, clip_sample=False)),
        vae=(AutoencoderKL, dict(VAE, sample_size=256)),
        transformer=(DiTTransformer2DModel, dict(out_channels=8))),
    "pixart": pixart(PixArtAlphaPipeline, 0.18215, PIXART),
    "pixart-sigma": pixart(PixArtSigmaPipeline, 0.13025, dict(PIXART, use_additional_conditions=False)),
    "sana": dict(
        pipeline=(SanaPipeline, {}),
        scheduler=(DPMSolverMultistepScheduler,
                   dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)),
        text_encoder=(Gemma2Model, {}),
        vae=(AutoencoderDC, DC_AE),
        transformer=(SanaTransformer2DModel, {})),
}


def build(name, dtype=torch.float32, seed=0, parts=("text", "vae", "network"), weights=True, empty=(),
          **overrides):
    """A diffusers pipeline of the architecture `name` with random weights, made on the CPU directly
    in dtype.
    parts: what to make, the rest is None. overrides: per component (unet, text_encoder_2,
    scheduler, ...) a dict of changed config values, or the ready component, or None to leave it
    out. weights: False leaves all on the meta device; empty: these components alone.
    Returns: a pipeline of the architecture's class, frozen, in eval mode.
    A part's weights depend on its own config and the seed alone, up to the rounding of dtype.
    Raises KeyError for another name, TypeError for a misspelt override."""
    # The published vocabularies cannot be had without a download: the embedded model's, whose ids all fit,
    # padded and cut as theirs.
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = CHAT                          # Z-Image's asks for one
    # Pooling takes the output at the first eos. The published configs say 2, which transformers reads as "at
    # the highest id":
    # right for their vocabulary, wrong for this one.
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                   pad_token_id=tokenizer.pad_token_id)
    pieces, (pipeline, options) = {}, ARCHITECTURES[name]["pipeline"]
    for part, (kind, config) in ARCHITECTURES[name].items():
        if part == "pipeline":
            continue
        override = overrides.pop(part, {})
        group = "text" if part.startswith("text") else "vae" if part == "vae" else "network"
        if group == "text":
            vocabulary = part.replace("text_encoder", "tokenizer")
            own = copy.copy(tokenizer)
            own.model_max_length = 512 if kind is T5EncoderModel else TOKENS
            pieces[vocabulary] = overrides.pop(vocabulary, own if "text" in parts else None)
        if not isinstance(override, dict):
            pieces[part] = override
        elif part == "scheduler":
            # keeps keys of other schedulers, as the files do
            pieces[part] = kind.from_config({**config, **override})
        elif group not in parts:
            pieces[part] = None
        elif group == "text":
            unknown = [key for key in override if not hasattr(kind.config_class(), key)]
            if unknown:
                raise TypeError(f"{part}: {', '.join(unknown)} is not in its config")
            pieces[part] = random_part(lambda: kind(kind.config_class(**{**special, **config, **override})),
                                       part, dtype, seed, weights and part not in empty)
        else:
            pieces[part] = random_part(lambda: kind(**{**config, **override}), part, dtype, seed,
                                       weights and part not in empty)
    # left out and not there anyway
    overrides = {part: value for part, value in overrides.items() if value is not None}
    if overrides:
        raise TypeError(f"{name} has no component {', '.join(overrides)}; it has {', '.join(pieces)}")
    return pipeline(**pieces, **options)


def random_part(make, part, dtype=torch.float32, seed=0, weights=True):
    """The module that make() returns, built without memory and then filled once, tensor by tensor:
    SDXL never exists in float32, and in half precision it is that network rounded.
    Matrices and kernels ~ N(0, 1/fan_in), which keeps activations of order one at any depth;
    biases ~ N(0, 0.02^2) and gains 1 + N(0, 0.02^2), so that no two tensors are equal and a mix-up
    shows.  Returns: the module, frozen, in eval mode."""
    with init_empty_weights():  # parameters only: CLIP's position_ids are a real buffer
        module = make()
    if not weights:
        module.to(dtype)                                    # whoever asks how large it will be
    if hasattr(module, "tie_weights"):
        module.tie_weights()                                # T5's two names of one embedding
    if weights:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {part}".encode()))
        filled = {}
        for name, parameter in module.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            filled[name] = torch.empty(parameter.shape).normal_(float(gain), std,
                                                                generator=generator).to(dtype)
        module.load_state_dict(filled, strict=False, assign=True)
        if hasattr(module, "tie_weights"):
            module.tie_weights()
    return module.requires_grad_(False).eval()


def shorten(name, layers):
    """Give the network of an architecture, and each of its text encoders, this many blocks of each kind, at
    its own width."""
    parts = ARCHITECTURES[name]
    for part, (kind, config) in parts.items():
        known = inspect.signature(kind.__init__).parameters if part in ("transformer", "unet") else {}
        counts = [key for key in ("num_layers", "num_single_layers", "n_layers") if key in known]
        if part.startswith("text_encoder"):
            counts = [key for key in ("num_layers", "num_hidden_layers") if key in config]
        parts = {**parts, part: (kind, {**config, **dict.fromkeys(counts, layers)})}
    ARCHITECTURES[name] = parts


if __name__ == "__main__":
    for name in ARCHITECTURES:
        pieces = build(name, weights=False).components.items()
        print(f"{name}: " + ", ".join(f"{part} {sum(p.numel() for p in piece.parameters()):,}"
                                      for part, piece in pieces
                                      if isinstance(piece, torch.nn.Module)))
