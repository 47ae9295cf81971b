"""PixArt-alpha and PixArt-Sigma: a transformer that gives eps and a learned variance, told the text
by T5 with a mask; alpha at 1024 pixels is told the size of the picture, too."""
import torch
from diffusers import PixArtTransformer2DModel

from models.configs import check_variance, trailing_ddim
from models.latents import complete, decode, encode  # noqa: F401  (three names of a family)
from models.text import check_width, has_null, prompts, warn_of_cut  # noqa: F401  (two names of a family)
from models.text import encode as encode_prompts
from runtime.cli import UserError

NETWORK, CLASS = "transformer", PixArtTransformer2DModel
TEXT_ENCODERS = ("text_encoder",)
LORA_LAYERS = None              # diffusers has no loader of adapters for these pipelines
FLOW = False


def required(pipeline):
    return ("vae", "text_encoder")


def check(pipeline):
    """Raises UserError unless the transformer gives eps, and perhaps a variance, and is told what the
    stock pipeline tells it."""
    network, c = pipeline.transformer, pipeline.transformer.config
    check_variance(c)
    told = "Alpha" in type(pipeline).__name__ and c.sample_size == 128
    if network.use_additional_conditions and not told:
        raise UserError("use_additional_conditions of its transformer is on, and its "
                        f"{type(pipeline).__name__} tells no resolution at sample_size {c.sample_size}; only "
                        "PixArtAlphaPipeline at 128 does")
    check_width(pipeline)


def blocks(transformer):
    return tuple(transformer.transformer_blocks)


def forward(transformer):
    """(z, timestep, **cond) -> output like z: of eps and its variance, eps."""
    def predict(z, timestep, encoder_hidden_states, encoder_attention_mask, resolution=None,
                aspect_ratio=None):
        dtype = next(transformer.parameters()).dtype
        output = transformer(z.to(dtype), encoder_hidden_states.to(dtype), timestep,
                             encoder_attention_mask=encoder_attention_mask,
                             added_cond_kwargs=dict(resolution=resolution, aspect_ratio=aspect_ratio),
                             return_dict=False)[0]
        return output[:, :z.shape[1]].to(z.dtype)
    return predict


def embed_guidance(pipeline, guidance):
    return guidance


def encode_text(pipeline, texts, batch, null, size, device):
    """{"encoder_hidden_states": (N, L, D), "encoder_attention_mask": (N, L)}; where the network is told
    the size also {"resolution": (N, 2), "aspect_ratio": (N, 1)}."""
    def chunk(texts):
        # cleaned, where bs4 and ftfy are installed, as the stock call does it
        states, mask, *_ = pipeline.encode_prompt(texts, False, device=pipeline.text_encoder.device,
                                                  clean_caption=True)
        warn_of_cut(pipeline.tokenizer, texts, mask.shape[1])
        return dict(encoder_hidden_states=states, encoder_attention_mask=mask)
    table = encode_prompts(chunk, texts, batch, null, device)
    if pipeline.transformer.use_additional_conditions:
        height, width = native_size(pipeline) if size is None else size
        for name, value in (("resolution", [height, width]), ("aspect_ratio", [height / width])):
            table[name] = torch.tensor([value]).float().repeat(len(texts), 1).to(device)
    return table


def native_size(pipeline):
    return (pipeline.transformer.config.sample_size * pipeline.vae_scale_factor,) * 2


def set_native_size(pipeline, size):
    """Positions are scaled from the sample_size that a network is built with: its config with another
    one also gets the scale that leaves them as they are."""
    network, c = pipeline.transformer, pipeline.transformer.config
    new, scale = size // pipeline.vae_scale_factor, c.interpolation_scale or max(c.sample_size // 64, 1)
    if new == c.sample_size:
        return
    if network.use_additional_conditions:
        raise UserError(f"--size {size}: stock pipelines tell this model the resolution at its own size "
                        f"alone; leave it out, or use --size {native_size(pipeline)[0]}")
    network.register_to_config(sample_size=new, interpolation_scale=scale * new / c.sample_size,
                               use_additional_conditions=False)


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    c, factor = pipeline.transformer.config, pipeline.vae_scale_factor
    return c.in_channels, factor, factor * c.patch_size


def as_student(pipeline, schedule):
    pipeline.scheduler = trailing_ddim(pipeline.scheduler)
    return pipeline


def stock_call(pipeline, steps):
    """The arguments of a stock call that samples a student. Its bins are of 256, 512 and 1024
    pixels."""
    binned = native_size(pipeline)[0] == 8 * pipeline.transformer.config.sample_size in (256, 512, 1024)
    return (f"prompt, num_inference_steps={steps}, guidance_scale=1"
            + ", use_resolution_binning=False" * (not binned))


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card."""
    inside = f"; guidance {guidance} is in the student already" if guidance else ""
    return [f"Without guidance_scale=1 diffusers takes 4.5, which is far off{inside}."] if exact else []


def meta_condition(transformer):
    """What forward takes besides z and time, for one sample on the meta device. 300 tokens: Sigma's."""
    cond = {"encoder_hidden_states": torch.empty(1, 300, transformer.config.caption_channels, device="meta"),
            "encoder_attention_mask": torch.ones(1, 300, dtype=torch.int64, device="meta")}
    if transformer.use_additional_conditions:
        cond |= dict(resolution=torch.ones(1, 2, device="meta"), aspect_ratio=torch.ones(1, 1, device="meta"))
    return cond
