"""Stable Diffusion 3 and 3.5: flow matching, two CLIP text encoders, and T5 or zeros in its place."""
import torch
from diffusers import SD3Transformer2DModel
from torch.nn.functional import pad

from models.configs import flow_map_euler
from models.latents import complete, decode, encode  # noqa: F401  (three names of a family)
from models.original import SD3, transformer_file
from models.text import has_null, prompts, warn_of_cut  # noqa: F401  (two names of a family)
from runtime.cli import UserError

NETWORK, CLASS = "transformer", SD3Transformer2DModel
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# every linear inside the blocks: attention and feed-forward of pictures and of text, and modulation
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
               "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear",
               "norm1_context.linear"]
FLOW = True
single_file = transformer_file(SD3)
T5_TOKENS = 256                 # as the stock pipeline has it


def required(pipeline):
    return "vae", "text_encoder", "text_encoder_2"


def check(pipeline):
    """Raises UserError unless the transformer is evaluated with (z, timestep, text) alone."""
    c = pipeline.transformer.config
    if c.in_channels != c.out_channels:
        raise UserError(f"its transformer takes {c.in_channels} channels and gives {c.out_channels}: it "
                        "needs a picture besides the text; give a text-to-image model")


def blocks(transformer):
    """The parts that FSDP gathers one at a time."""
    return tuple(transformer.transformer_blocks)


def forward(transformer):
    """(z, timestep, **cond) -> output like z."""
    def predict(z, timestep, encoder_hidden_states, pooled_projections):
        dtype = next(transformer.parameters()).dtype
        return transformer(z.to(dtype), encoder_hidden_states.to(dtype), pooled_projections.to(dtype),
                           timestep, return_dict=False)[0].to(z.dtype)
    return predict


def embed_guidance(pipeline, guidance):
    """Nothing of it: what is not 1 is classifier-free guidance."""
    return guidance


def t5_tokens(pipeline):
    """How many T5 sees, and how many zeros stand for them where there is no T5: the stock pipeline's, or
    what its tokenizer takes, if that is less. The stock call is told so then."""
    return min(T5_TOKENS, getattr(pipeline.tokenizer_3, "model_max_length", T5_TOKENS))


def encode_part(pipeline, name, texts):
    """What one text encoder makes of the texts; join puts such parts together."""
    encoder = getattr(pipeline, name)
    if name == "text_encoder_3":
        warn_of_cut(pipeline.tokenizer_3, texts, t5_tokens(pipeline))
        return dict(states=pipeline._get_t5_prompt_embeds(texts, 1, t5_tokens(pipeline), encoder.device))
    if name == "text_encoder" and pipeline.text_encoder_3 is None:
        warn_of_cut(pipeline.tokenizer, texts, pipeline.tokenizer_max_length)
    states, pooled = pipeline._get_clip_prompt_embeds(texts, device=encoder.device,
                                                      clip_model_index=int(name == "text_encoder_2"))
    return dict(states=states, pooled=pooled)


def join(pipeline, parts):
    """parts: {text encoder: of encode_part}.
    Returns: {"encoder_hidden_states": (N, 77 + t5_tokens, D), "pooled_projections": (N, P)}."""
    first, second = parts["text_encoder"], parts["text_encoder_2"]
    clip = torch.cat([first["states"], second["states"]], -1)
    wide = pipeline.transformer.config.joint_attention_dim
    t5 = parts.get("text_encoder_3", {}).get("states", clip.new_zeros(len(clip), t5_tokens(pipeline), wide))
    return dict(encoder_hidden_states=torch.cat([pad(clip, (0, wide - clip.shape[-1])), t5], 1),
                pooled_projections=torch.cat([first["pooled"], second["pooled"]], -1))


def native_size(pipeline):
    return (pipeline.transformer.config.sample_size * pipeline.vae_scale_factor,) * 2


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    c, factor = pipeline.transformer.config, pipeline.vae_scale_factor
    return c.in_channels, factor, factor * c.patch_size


def set_native_size(pipeline, size):
    c, side = pipeline.transformer.config, size // pipeline.vae_scale_factor
    if side > c.patch_size * c.pos_embed_max_size:
        raise UserError(f"--size {size}: this model knows positions up to "
                        f"{c.patch_size * c.pos_embed_max_size * pipeline.vae_scale_factor} pixels")
    pipeline.transformer.register_to_config(sample_size=side)       # its positions are in its weights


# ---- a student's pipeline ----------------------------------------------------------------------------------


def as_student(pipeline, schedule):
    """The pipeline as a student is written, with the stock scheduler that samples it."""
    pipeline.scheduler = flow_map_euler(schedule.shift)
    return pipeline


def stock_call(pipeline, steps):
    tokens = t5_tokens(pipeline)
    return (f"prompt, num_inference_steps={steps}, guidance_scale=1"
            + f", max_sequence_length={tokens}" * (tokens != T5_TOKENS))


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card."""
    return ["Without guidance_scale=1 diffusers takes 7, which is far off"
            + (f"; guidance {guidance} is in the student already." if guidance else "."),
            "Its scheduler is FlowMapEulerDiscreteScheduler (diffusers 0.40 or newer), which evaluates the "
            "network at the starts of the windows; the teacher's FlowMatchEulerDiscreteScheduler would spend "
            "the last evaluation next to the data."]


def meta_condition(transformer):
    """What forward takes besides z and time, for one sample on the meta device."""
    c = transformer.config
    return dict(encoder_hidden_states=torch.empty(1, 77 + T5_TOKENS, c.joint_attention_dim, device="meta"),
                pooled_projections=torch.empty(1, c.pooled_projection_dim, device="meta"))
