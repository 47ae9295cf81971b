"""DiT: a transformer conditioned on a class, with an autoencoder and no text. The name of a class,
or its number, takes the place of a prompt."""
import difflib

import torch
from diffusers import DiTTransformer2DModel

from models.configs import check_variance, trailing_ddim
from models.latents import complete as complete_autoencoder
from models.latents import decode, encode  # noqa: F401  (two names of a family)
from runtime.cli import UserError

NETWORK, CLASS = "transformer", DiTTransformer2DModel
TEXT_ENCODERS = ()
LORA_LAYERS = None              # diffusers puts no adapters on this class
FLOW = False


def required(pipeline):
    return ("vae",)


def complete(pipeline, folder, given):
    """What DiTPipeline leaves open: the pixels per latent, and the names of its classes in what it
    writes."""
    vae = pipeline.vae
    pipeline.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    complete_autoencoder(pipeline, folder, given)
    names = {}
    for name, number in pipeline.labels.items():
        names.setdefault(number, []).append(name)
    pipeline.register_to_config(id2label={n: ", ".join(names[n]) for n in sorted(names)} or None)


def check(pipeline):
    """Raises UserError unless the transformer gives eps, and perhaps a variance."""
    c = pipeline.transformer.config
    check_variance(c)
    beyond = [name for name, number in pipeline.labels.items() if number >= c.num_embeds_ada_norm]
    if beyond:
        raise UserError(f"id2label in its model_index.json names {beyond[0]!r} as class "
                        f"{pipeline.labels[beyond[0]]}, and its transformer has {c.num_embeds_ada_norm}; "
                        "correct it")


def blocks(transformer):
    return tuple(transformer.transformer_blocks)


def forward(transformer):
    """(z, timestep, **cond) -> output like z: of eps and its variance, eps."""
    def predict(z, timestep, class_labels):
        dtype = next(transformer.parameters()).dtype
        output = transformer(z.to(dtype), timestep, class_labels, return_dict=False)[0]
        return output[:, :z.shape[1]].to(z.dtype)
    return predict


def class_number(pipeline, prompt):
    """The class of a prompt; None and "" are the null class, which comes after the last.
    Raises UserError."""
    labels, count = pipeline.labels, pipeline.transformer.config.num_embeds_ada_norm
    if not prompt:
        return count
    if prompt in labels:
        return labels[prompt]
    if prompt.isdecimal() and int(prompt) < count:
        return int(prompt)
    near = ", ".join(difflib.get_close_matches(prompt, labels, 12, 0))
    raise UserError(f"prompt {prompt!r}: none of this model's classes; give a number from 0 to {count - 1}"
                    + f", or a name, such as {near}" * bool(near))


def prompts(pipeline):
    return "class"


def has_null(pipeline):
    return True


def embed_guidance(pipeline, guidance):
    return guidance


def encode_text(pipeline, prompts, batch, null, size, device):
    """{"class_labels": (N,) int64}."""
    if null == "zeros":
        raise UserError("--null-text zeros: this model is conditioned on no text; leave it out")
    return {"class_labels": torch.tensor([class_number(pipeline, prompt) for prompt in prompts]).to(device)}


def native_size(pipeline):
    factor = getattr(pipeline, "vae_scale_factor", 8)       # as published, before complete() has read it
    return (pipeline.transformer.config.sample_size * factor,) * 2


def set_native_size(pipeline, size):
    own = native_size(pipeline)[0]
    if size != own:
        raise UserError(f"--size {size}: the positions of a DiT are those of its own size, and its pipeline "
                        f"draws no other; leave it out, or use --size {own}")


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    c, factor = pipeline.transformer.config, getattr(pipeline, "vae_scale_factor", 8)
    return c.in_channels, factor, factor * c.patch_size


def as_student(pipeline, schedule):
    pipeline.scheduler = trailing_ddim(pipeline.scheduler)
    return pipeline


def stock_call(pipeline, steps):
    """The arguments of a stock call that samples a student: of class 0."""
    return f"class_labels=[0], num_inference_steps={steps}, guidance_scale=1"


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card."""
    inside = f"; guidance {guidance} is in the student already" if guidance else ""
    return [f"Without guidance_scale=1 diffusers takes 4, which is far off{inside}."] if exact else []


def meta_condition(transformer):
    """What forward takes besides z and time, for one sample on the meta device: for counting
    operations."""
    return {"class_labels": torch.zeros(1, dtype=torch.int64, device="meta")}
