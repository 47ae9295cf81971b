"""Stable Diffusion's family: UNet2DConditionModel with text encoders and an autoencoder (SD 1.x,
2.x, XL and their kin)."""
import math
import warnings

import torch
from diffusers import UNet2DConditionModel

from models.configs import GIVE, check_fields
from models.original import as_single_file, unet_blocks, unet_name
from runtime.cli import UserError
from teacher import check_finite

NETWORK, CLASS = "unet", UNet2DConditionModel
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")        # the second is SDXL's alone
# every linear and convolution inside the UNet's blocks, by the names diffusers gives them
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
               "time_emb_proj", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
# Output pixels the autoencoder handles at once: 64 pictures of 64 x 64, one of 512 x 512 (some 2 GB in
# float32).
PIXELS = 2 ** 18


def check(pipeline):
    """Raises UserError unless the UNet is evaluated with (z, timestep, text) alone, as SD's and
    SDXL's are."""
    c = pipeline.unet.config
    if c.in_channels != c.out_channels:
        raise UserError(f"its UNet takes {c.in_channels} channels and gives {c.out_channels}: it needs a "
                        "picture besides the text, as models for inpainting, editing and upscaling do; give "
                        "a text-to-image model")
    check_fields("UNet2DConditionModel", c)
    if (c.addition_embed_type == "text_time") != hasattr(pipeline, "text_encoder_2"):
        raise UserError(f"addition_embed_type of its UNet is {c.addition_embed_type!r} in a "
                        f"{type(pipeline).__name__}: text_time goes with two text encoders, as in SDXL; "
                        f"{GIVE}")


def blocks(unet):
    """The parts that FSDP gathers one at a time."""
    return (*unet.down_blocks, unet.mid_block, *unet.up_blocks)


def forward(unet):
    """(z, timestep, **cond) -> output like z."""
    def predict(z, timestep, encoder_hidden_states, **added):
        dtype = next(unet.parameters()).dtype  # DDP has no .dtype; with LoRA the first is still the base's
        # The network's own dtype only here. SDXL's additions stay float32: it casts their embedding;
        # bf16 would round 1001 px.
        output = unet(z.to(dtype), timestep, encoder_hidden_states=encoder_hidden_states.to(dtype),
                      added_cond_kwargs=added or None, return_dict=False)[0]
        return output.to(z.dtype)
    return predict


def prompts(pipeline):
    return "text"


def has_null(pipeline):
    return True


@torch.no_grad()
def encode_text(pipeline, prompts, batch, null, size, device):
    """{"encoder_hidden_states": (N, L, D)}; SDXL also {"text_embeds": (N, P), "time_ids": (N, 6)},
    float32."""
    if null == "auto":
        null = "zeros" if pipeline.config.get("force_zeros_for_empty_prompt") else "empty"
    if null not in ("empty", "zeros"):
        raise ValueError(f"null {null!r}: not one of auto, empty, zeros")
    xl = hasattr(pipeline, "text_encoder_2")
    towers = [(pipeline.tokenizer,
               pipeline.text_encoder)] + ([(pipeline.tokenizer_2, pipeline.text_encoder_2)] if xl else [])
    texts, rows, cut = ["" if prompt is None else prompt for prompt in prompts], [], []
    for start in range(0, len(texts), batch):
        chunk, outputs = texts[start:start + batch], []
        for tokenizer, encoder in towers:
            # without model_max_length in its files, a tokenizer says 1e30
            positions = getattr(encoder.config, "max_position_embeddings", math.inf)
            length = min(tokenizer.model_max_length, positions)
            tokens = tokenizer(chunk, padding="max_length", max_length=length, truncation=True,
                               return_tensors="pt")
            # no padding: perhaps cut
            whole = [text for text, mask in zip(chunk, tokens.attention_mask) if mask.all()]
            cut += [(text, len(ids) - length)
                    for text, ids in zip(whole, tokenizer(whole).input_ids if whole else [])
                    if len(ids) > length]
            # as in diffusers' pipelines
            masked = not xl and getattr(encoder.config, "use_attention_mask", False)
            outputs.append(encoder(tokens.input_ids.to(encoder.device), output_hidden_states=xl,
                                   attention_mask=tokens.attention_mask.to(encoder.device) if masked
                                   else None))
        # SDXL: both encoders' last layer but one, side by side, and the second's pooled output
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1) if xl else outputs[0][0]
        rows.append([part.float().to(device) for part in ([states, outputs[-1][0]] if xl else [states])])
    if cut:
        (first, excess), others = cut[0], len({text for text, _ in cut}) - 1
        warnings.warn(f"{first[:60] + '...' * (len(first) > 60)!r} is {excess} tokens too long for the text "
                      "encoder, which does not see "
                      # 2 is no_grad, 3 models.encode_text
                      "its end" + f"; so are {others} more" * (others > 0), stacklevel=4)
    table = dict(zip(("encoder_hidden_states", "text_embeds"), map(torch.cat, zip(*rows))))
    for value in table.values():
        check_finite(value, [f"prompt {text!r}" for text in texts],
                     "its text embedding is not finite; use --dtype bf16 "
                     "or fp32, or another text encoder")
    if null == "zeros":
        dropped = torch.tensor([prompt is None for prompt in prompts]).to(device)
        for value in table.values():
            value.masked_fill_(dropped.view(-1, *[1] * (value.ndim - 1)), 0)
    if xl:
        height, width = native_size(pipeline) if size is None else size
        table["time_ids"] = torch.tensor([[height, width, 0, 0, height,
                                           width]]).float().repeat(len(texts), 1).to(device)
    return table


def native_size(pipeline):
    size = pipeline.unet.config.sample_size
    if size is None:
        raise UserError("its UNet's config.json has no sample_size: give --size, or write it there")
    return tuple(side * pipeline.vae_scale_factor
                 for side in ((size, size) if isinstance(size, int) else size))


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    c, factor = pipeline.unet.config, pipeline.vae_scale_factor
    return c.in_channels, factor, factor * 2 ** (len(c.block_out_channels) - 1)


def set_native_size(pipeline, size):
    pipeline.unet.register_to_config(sample_size=size // pipeline.vae_scale_factor)


def latent_statistics(vae):
    """(factor, shift, std) of an autoencoder, with z = (latent - shift) factor / std.
    shift and std: numbers, or (1, C, 1, 1) as in Playground 2.5, whose latents are normalized per
    channel."""
    c = vae.config
    mean, std = (torch.tensor(c[key]).view(1, -1, 1, 1) if c.get(key) else default
                 for key, default in (("latents_mean", 0), ("latents_std", 1)))
    return c.scaling_factor, mean + (c.get("shift_factor") or 0), std


@torch.no_grad()
def decode(pipeline, z, batch):
    vae, factor = pipeline.vae, pipeline.vae_scale_factor
    batch = max(1, min(batch, PIXELS // (factor * factor * z[0, 0].numel())))
    scaling, shift, std = (c.to(z) if torch.is_tensor(c) else c for c in latent_statistics(vae))
    rows = []
    for chunk in (z * std / scaling + shift).split(batch):
        chunk = chunk.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        rows.append(vae.decode(chunk, return_dict=False)[0].float().clamp(-1, 1).cpu())
    images = torch.cat(rows)
    if not images.isfinite().all():
        numbers = [f"picture {i + 1} of {len(z)}" for i in range(len(z))]
        check_finite(z.cpu(), numbers, "its latents are not finite: the network has diverged")
        check_finite(images, numbers, f"the autoencoder's output is not finite in {vae.dtype}; use bf16 or "
                                      "fp32")
    return images


@torch.no_grad()
def encode(pipeline, images, batch):
    vae, rows = pipeline.vae, []
    for chunk in images.split(max(1, min(batch, PIXELS // images[0, 0].numel()))):
        encoded = vae.encode(chunk.to(vae.device, vae.dtype))
        rows.append(encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents)
    latents = torch.cat(rows).float()
    scaling, shift, std = (c.to(latents) if torch.is_tensor(c) else c for c in latent_statistics(vae))
    check_finite(latents, [f"picture {i + 1} of {len(images)}" for i in range(len(images))],
                 f"its latents are not finite in {vae.dtype}; use bf16 or fp32")
    return (latents - shift) * scaling / std


# ---- a student's pipeline ----------------------------------------------------------------------------------


def with_scheduler(pipeline, scheduler):
    """The pipeline that samples with this scheduler."""
    pipeline.scheduler = scheduler
    return pipeline


def stock_call(pipeline, steps):
    """The arguments of a stock call that samples a student, or None where no stock pipeline
    does."""
    return f"prompt, num_inference_steps={steps}, guidance_scale=1"


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card. exact: numbers of steps at which stock agrees with sampler.py;
    guidance: that is in the student; null: its null embedding, as in encode_text."""
    if not exact:
        return []
    notes = ["Without guidance_scale=1 diffusers takes 7.5, which is far off" + (
        f"; guidance {guidance:g} is in the student already." if guidance != 1 else ".")]
    if null == "zeros" and "force_zeros_for_empty_prompt" not in pipeline.config:
        notes.append("With other guidance use sampler.py: the null embedding is zeros, and diffusers' "
                     "pipeline cannot know it.")
    n = next((n for n in exact if n > 1), 1)
    strengths = ", ".join(f"{k / n:g}" for k in range(1, n)) + " or " * (n > 1) + "1"
    notes.append("Image to image and inpainting: a strength that is a multiple of 1 / num_inference_steps "
                 f"(with {n} step{'s' * (n > 1)} {strengths}). Diffusers rounds steps x strength down, and "
                 "fails below 1.")
    return notes


def kohya_layers(unet):
    """layer -> its name in kohya's LoRA files: of 1.x and 2.x diffusers' name, of XL the original
    one, as kohya trains the former on diffusers' UNet and XL on the original."""
    if unet.config.addition_embed_type != "text_time":
        return lambda layer: layer
    blocks = unet_blocks(unet)
    return lambda layer: unet_name(blocks, layer)


def single_file(pipeline):
    return as_single_file(pipeline)


def meta_condition(unet):
    """What forward takes besides z and time, for one sample on the meta device: for counting
    operations."""
    cond = {"encoder_hidden_states": torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")}
    if unet.config.get("addition_embed_type") == "text_time":
        wide = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        cond |= dict(text_embeds=torch.empty(1, wide, device="meta"),
                     time_ids=torch.empty(1, 6, device="meta"))
    return cond
