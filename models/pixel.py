"""Pixel models: UNet2DModel without autoencoder or text, unconditional or with classes, also in
EDM's form. Their latents are the pixels, and the name of a class takes the place of a prompt."""
import difflib

import torch
from diffusers import DDIMPipeline, UNet2DModel

from models.configs import check_fields, is_edm, read_json, trailing_ddim
from runtime.cli import UserError
from teacher import check_finite

NETWORK, CLASS = "unet", UNet2DModel
TEXT_ENCODERS = ()
LORA_LAYERS = None              # diffusers puts no adapters on this class
FLOW = False


def required(pipeline):
    return ()


def complete(pipeline, folder, given):
    """A pixel is its own latent; labels.json beside the model names its classes."""
    pipeline.vae_scale_factor, pipeline.labels = 1, read_labels(folder / "labels.json")


def check(pipeline):
    """Raises UserError unless the UNet is evaluated with (pixels, timestep) and perhaps a class."""
    c, labels = pipeline.unet.config, pipeline.labels
    others = sorted(set(pipeline.components) - {"unet", "scheduler"})
    if others:
        raise UserError(f"{type(pipeline).__name__} has {', '.join(others)} beside its UNet2DModel; give a "
                        "model of pixels alone, or a latent text-to-image model")
    if c.in_channels != c.out_channels or c.in_channels not in (1, 3):
        raise UserError(f"its UNet takes {c.in_channels} channels and gives {c.out_channels}; give a model "
                        "of gray or RGB pixels (1 or 3 of both), that does not predict its variance")
    check_fields("UNet2DModel", c)
    if labels is not None and c.num_class_embeds not in (len(labels), len(labels) + 1):
        raise UserError(f"labels.json names {len(labels)} classes, and its UNet has {c.num_class_embeds}; "
                        "name all, or all but the last as the null class")


def blocks(unet):
    """The parts that FSDP gathers one at a time."""
    return (*unet.down_blocks, unet.mid_block, *unet.up_blocks)


def forward(unet):
    """(z, timestep, **cond) -> output like z."""
    def predict(z, timestep, class_labels=None):
        dtype = next(unet.parameters()).dtype
        return unet(z.to(dtype), timestep, class_labels=class_labels, return_dict=False)[0].to(z.dtype)
    return predict


# ---- classes -----------------------------------------------------------------------------------------------


def read_labels(file):
    """The names of classes in a labels.json, or None if there is no such file.
    Raises UserError."""
    if not file.is_file():
        return None
    labels = read_json(file, object)
    if not isinstance(labels, list) or not all(isinstance(label, str) and label
                                               for label in labels) or len(set(labels)) < len(labels):
        raise UserError("labels.json is not a list of different names, one per class; fix it or remove it")
    return labels


def class_names(pipeline):
    """The classes by number: the names of labels.json, else the numbers as text;
    [] if the model is unconditional. The null class has no name; has_null says whether there is
    one.  Returns: list of str."""
    labels, count = getattr(pipeline, "labels", None), pipeline.unet.config.num_class_embeds or 0
    return list(map(str, range(count))) if labels is None else labels


def class_number(pipeline, prompt):
    """The class of a prompt; None and "" are the null class.  Raises UserError."""
    names = class_names(pipeline)
    if prompt in names:
        return names.index(prompt)
    if prompt:
        known = difflib.get_close_matches(prompt, names, 12, 0) if len(names) > 12 else names
        raise UserError(f"prompt {prompt!r}: not one of this model's {len(names)} classes: {', '.join(known)}"
                        + ", ..." * (len(names) > len(known)))
    if not has_null(pipeline):
        raise UserError("prompt '': this model has no null class; name one of its classes")
    return len(names)


def prompts(pipeline):
    return "class" if class_names(pipeline) else ""


def has_null(pipeline):
    """True if there is a class more than there are names."""
    return len(class_names(pipeline)) < (pipeline.unet.config.num_class_embeds or 0)


def embed_guidance(pipeline, guidance):
    return guidance


def encode_text(pipeline, prompts, batch, null, size, device):
    """{"class_labels": (N,) int64}; {} for an unconditional model."""
    if null == "zeros":
        raise UserError("--null-text zeros: this model is conditioned on no text; leave it out")
    if pipeline.unet.config.num_class_embeds is None:
        return {}
    return {"class_labels": torch.tensor([class_number(pipeline, prompt) for prompt in prompts]).to(device)}


# ---- pictures ----------------------------------------------------------------------------------------------


def native_size(pipeline):
    size = pipeline.unet.config.sample_size
    if size is None:
        raise UserError("its UNet's config.json has no sample_size: give --size, or write it there")
    return (size, size) if isinstance(size, int) else tuple(size)


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    c = pipeline.unet.config
    return c.in_channels, 1, 2 ** (len(c.block_out_channels) - 1)


def set_native_size(pipeline, size):
    pipeline.unet.register_to_config(sample_size=size)


def decode(pipeline, z, batch):
    """Gray pixels are shown as RGB."""
    images = z.float().clamp(-1, 1).cpu().expand(-1, 3, -1, -1)
    check_finite(images, [f"picture {i + 1} of {len(z)}" for i in range(len(z))],
                 "its pixels are not finite: the network has diverged")
    return images


def encode(pipeline, images, batch):
    """The pixels, or their luma (ITU-R BT.601, as PIL's gray) if the model is gray."""
    pixels = images.to(pipeline.unet.device, torch.float32)
    if pipeline.unet.config.in_channels == 3:
        return pixels
    return torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor([0.299, 0.587, 0.114]))[:, None]


# ---- a student's pipeline ----------------------------------------------------------------------------------


def as_student(pipeline, schedule):
    """The pipeline as a student is written: a DDPMPipeline, or another, would not take a DDIM
    scheduler's steps. A network in EDM's form stays as it is."""
    if is_edm(pipeline.scheduler):
        return pipeline
    labels, pipeline = pipeline.labels, DDIMPipeline(pipeline.unet, trailing_ddim(pipeline.scheduler))
    pipeline.labels = labels
    return pipeline


def stock_call(pipeline, steps):
    """The arguments of a stock call that samples a student, or None where no stock pipeline does:
    none hands on a class."""
    return None if class_names(pipeline) else f"num_inference_steps={steps}"


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card."""
    if not class_names(pipeline):
        return []
    return ["No pipeline of diffusers hands on a class: it means the DDIM scheduler around the UNet with "
            "class_labels."]


def meta_condition(unet):
    """What forward takes besides z and time, for one sample on the meta device: for counting
    operations."""
    return {"class_labels": torch.zeros(1, dtype=torch.int64,
                                        device="meta")} if unet.config.num_class_embeds else {}
