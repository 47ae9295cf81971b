"""FLUX.1: FluxTransformer2DModel, flow matching over packed latents, T5 and a pooled CLIP embedding. Dev
takes its guidance as an input, schnell has it distilled in; neither has a null embedding."""
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from models.configs import flow_match_euler
from models.latents import complete as complete_autoencoder
from models.latents import decode, encode  # noqa: F401  (two names of a family)
from models.original import FLUX, transformer_file
from models.text import prompts, warn_of_cut  # noqa: F401  (a name of a family)
from runtime.cli import UserError

NETWORK, CLASS = "transformer", FluxTransformer2DModel
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# every linear inside the blocks of both kinds
LORA_LAYERS = (r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|"
               r"ff(_context)?\.net\.(0\.proj|2)|norm(1|1_context)?\.linear|proj_mlp|proj_out)")
FLOW, T5_TOKENS, GUIDANCE, SIDE = True, 512, 3.5, 128       # the stock pipeline's, with 128 x 128 latents
single_file = transformer_file(FLUX)


def required(pipeline):
    return "vae", "text_encoder", "text_encoder_2"


def complete(pipeline, folder, given):
    complete_autoencoder(pipeline, folder, given)
    embed_guidance(pipeline, 1.0)


def check(pipeline):
    """Raises UserError unless the transformer is evaluated with (z, timestep, text) alone."""
    c = pipeline.transformer.config
    if c.out_channels not in (None, c.in_channels) or c.patch_size != 1:
        raise UserError(f"its transformer takes {c.in_channels} channels and gives {c.out_channels}: it "
                        "needs a picture besides the text, as FLUX.1-Fill does; give a text-to-image model")


def blocks(transformer):
    """The parts that FSDP gathers one at a time."""
    return *transformer.transformer_blocks, *transformer.single_transformer_blocks


def forward(transformer):
    """(z, timestep, **cond) -> output like z."""
    def predict(z, timestep, encoder_hidden_states, pooled_projections, guidance=None):
        dtype, (height, width) = next(transformer.parameters()).dtype, (side // 2 for side in z.shape[-2:])
        packed = pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)           # (B, h/2 w/2, 4 C)
        axes = (torch.arange(side, device=z.device) for side in (1, height, width))
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2).to(z)  # (h/2 w/2, 3)
        output = transformer(packed.to(dtype), encoder_hidden_states.to(dtype), pooled_projections.to(dtype),
                             timestep / 1000, places, z.new_zeros(encoder_hidden_states.shape[1], 3),
                             guidance, return_dict=False)[0].to(z.dtype)
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, (height, width)), 2)
    return predict


def has_null(pipeline):
    return False


def embed_guidance(pipeline, guidance):
    """FLUX.1-dev is told all of it; 1 is its own 3.5."""
    if not pipeline.transformer.config.guidance_embeds:
        return guidance
    pipeline.embedded_guidance = GUIDANCE if guidance == 1 else guidance
    return 1.0


def encode_part(pipeline, name, texts):
    """What one text encoder makes of the texts; join puts such parts together."""
    device = getattr(pipeline, name).device
    if name == "text_encoder":
        return dict(pooled_projections=pipeline._get_clip_prompt_embeds(texts, device=device))
    warn_of_cut(pipeline.tokenizer_2, texts, T5_TOKENS)
    return dict(encoder_hidden_states=pipeline._get_t5_prompt_embeds(texts, 1, T5_TOKENS, device))


def join(pipeline, parts):
    """parts: {text encoder: of encode_part}.  Returns: {"encoder_hidden_states": (N, 512, D),
    "pooled_projections": (N, P)}, and with embedded guidance {"guidance": (N,)}."""
    whole = {**parts["text_encoder_2"], **parts["text_encoder"]}
    told = {} if not pipeline.transformer.config.guidance_embeds else dict(
        guidance=torch.full((len(whole["pooled_projections"]),), float(pipeline.embedded_guidance)))
    return {**whole, **told}


def native_size(pipeline):
    return (pipeline.default_sample_size * pipeline.vae_scale_factor,) * 2


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    factor = pipeline.vae_scale_factor
    return pipeline.transformer.config.in_channels // 4, factor, 2 * factor


def set_native_size(pipeline, size):
    pipeline.default_sample_size = size // pipeline.vae_scale_factor


# ---- a student's pipeline ----------------------------------------------------------------------------------


def as_student(pipeline, schedule):
    """The pipeline as a student is written; its shift stays that of its own size."""
    pipeline.scheduler = flow_match_euler(schedule.shift)
    return pipeline


def stock_call(pipeline, steps):
    told = getattr(pipeline, "embedded_guidance", None)
    height, width = native_size(pipeline)
    return (f"prompt, num_inference_steps={steps}" + (f", guidance_scale={told:g}" if told else "")
            + (f", height={height}, width={width}" if pipeline.default_sample_size != SIDE else ""))


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card."""
    told = getattr(pipeline, "embedded_guidance", None)
    return [f"It was trained at embedded guidance {guidance or f'{told:g}'} alone."] if told else []


def meta_condition(transformer):
    """What forward takes besides z and time, for one sample on the meta device."""
    c = transformer.config
    told = dict(guidance=torch.empty(1, device="meta")) if c.guidance_embeds else {}
    return dict(encoder_hidden_states=torch.empty(1, T5_TOKENS, c.joint_attention_dim, device="meta"),
                pooled_projections=torch.empty(1, c.pooled_projection_dim, device="meta"), **told)
