"""SANA: a linear-attention transformer of flow matching, told the text by Gemma with a mask, on the
latents of a deep-compression autoencoder, 32 pixels to a side."""
import inspect

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel

from models.configs import check_variance, flow_map_euler
from models.latents import complete, decode, encode  # noqa: F401  (three names of a family)
from models.text import check_width, has_null, prompts, warn_of_cut  # noqa: F401  (two names of a family)
from models.text import encode as encode_prompts
from runtime.cli import UserError

NETWORK, CLASS = "transformer", SanaTransformer2DModel
TEXT_ENCODERS = ("text_encoder",)
# every linear of the two attentions, and the 1 x 1 convolutions beside the depthwise one
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
FLOW = True
# what the stock pipeline puts before a prompt, and how many tokens it keeps of the two
CALL = inspect.signature(SanaPipeline.__call__).parameters
INSTRUCTION, TOKENS = (CALL[name].default for name in ("complex_human_instruction", "max_sequence_length"))


def required(pipeline):
    return ("vae", "text_encoder")


def check(pipeline):
    """Raises UserError unless the transformer is evaluated with (z, timestep, text) alone."""
    c = pipeline.transformer.config
    check_variance(c)
    if c.guidance_embeds:
        raise UserError("it takes guidance as an input, as Sana-Sprint, which is already distilled, does; "
                        "give its teacher, a Sana without guidance_embeds")
    check_width(pipeline)


def blocks(transformer):
    """The parts that FSDP gathers one at a time."""
    return tuple(transformer.transformer_blocks)


def forward(transformer):
    """(z, timestep, **cond) -> output like z: of a velocity and its variance, the velocity."""
    def predict(z, timestep, encoder_hidden_states, encoder_attention_mask):
        dtype = next(transformer.parameters()).dtype
        output = transformer(z.to(dtype), encoder_hidden_states.to(dtype), timestep * scale,
                             encoder_attention_mask=encoder_attention_mask, return_dict=False)[0]
        return output[:, :z.shape[1]].to(z.dtype)
    scale = getattr(transformer, "module", transformer).config.timestep_scale         # DDP has no .config
    return predict


def embed_guidance(pipeline, guidance):
    """Nothing of it: what is not 1 is classifier-free guidance."""
    return guidance


def encode_text(pipeline, texts, batch, null, size, device):
    """{"encoder_hidden_states": (N, L, D), "encoder_attention_mask": (N, L)}. A prompt follows the stock
    pipeline's instruction, of which only the first token is kept; the null embedding, of "", does
    not."""
    def encoded(texts, instruction):
        return pipeline.encode_prompt(texts, False, device=pipeline.text_encoder.device,
                                      max_sequence_length=TOKENS, complex_human_instruction=instruction)[:2]

    def chunk(texts):
        warn_of_cut(pipeline.tokenizer, texts, TOKENS - 1)
        states, mask = encoded(texts, INSTRUCTION)
        empty = [i for i, each in enumerate(texts) if not each]
        if empty:
            states[empty], mask[empty] = encoded([""], None)
        return dict(encoder_hidden_states=states, encoder_attention_mask=mask)
    return encode_prompts(chunk, texts, batch, null, device)


def native_size(pipeline):
    return (pipeline.transformer.config.sample_size * pipeline.vae_scale_factor,) * 2


def set_native_size(pipeline, size):
    c, new = pipeline.transformer.config, size // pipeline.vae_scale_factor
    scale = c.interpolation_scale and c.interpolation_scale * new / c.sample_size       # None: no positions
    pipeline.transformer.register_to_config(sample_size=new, interpolation_scale=scale)


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    c, factor = pipeline.transformer.config, pipeline.vae_scale_factor
    return c.in_channels, factor, factor * c.patch_size


def as_student(pipeline, schedule):
    """The pipeline as a student is written, with the stock scheduler that samples it."""
    pipeline.scheduler = flow_map_euler(schedule.shift)
    return pipeline


def stock_call(pipeline, steps):
    """The arguments of a stock call that samples a student: it draws 1024 pixels if not told otherwise,
    and has bins for 512, 1024, 2048 and 4096."""
    side = native_size(pipeline)[0]
    binned = side == 32 * pipeline.transformer.config.sample_size in (512, 1024, 2048, 4096)
    return (f"prompt, num_inference_steps={steps}, guidance_scale=1"
            + f", height={side}, width={side}" * (side != 1024)
            + ", use_resolution_binning=False" * (not binned))


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card."""
    inside = f"; guidance {guidance} is in the student already" if guidance else ""
    return [f"Without guidance_scale=1 diffusers takes 4.5, which is far off{inside}.",
            "Its scheduler is FlowMapEulerDiscreteScheduler (diffusers 0.40 or newer), which evaluates the "
            "network at the starts of the windows; the teacher's would not."]


def meta_condition(transformer):
    """What forward takes besides z and time, for one sample on the meta device."""
    wide = transformer.config.caption_channels
    return {"encoder_hidden_states": torch.empty(1, TOKENS, wide, device="meta"),
            "encoder_attention_mask": torch.ones(1, TOKENS, dtype=torch.int64, device="meta")}
