"""Latents and pictures, for every family whose autoencoder is an AutoencoderKL of diffusers or kin,
AutoencoderDC among them."""
import torch

from models.configs import read_json
from teacher import check_finite

# Output pixels the autoencoder handles at once: 64 pictures of 64 x 64, one of 512 x 512 (some 2 GB in
# float32).
PIXELS = 2 ** 18


def latent_statistics(vae):
    """(factor, shift, std) of an autoencoder, with z = (latent - shift) factor / std.
    shift and std: numbers, or (1, C, 1, 1) as in Playground 2.5, whose latents are normalized per
    channel."""
    c = vae.config
    mean, std = (torch.tensor(c[key]).view(1, -1, 1, 1) if c.get(key) else default
                 for key, default in (("latents_mean", 0), ("latents_std", 1)))
    return c.scaling_factor, mean + (c.get("shift_factor") or 0), std


def complete(pipeline, folder, given):
    """What diffusers leaves open: the pixels per latent where the autoencoder is left out, its dtype
    and layout. folder: of its configs; given: names of the parts that were not loaded from there."""
    if "vae" not in given:
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
            pipeline.vae.to(torch.float32)  # SDXL's overflows in fp16; bf16 has float32's range
        pipeline.vae.to(memory_format=torch.channels_last)          # with decode's, a quarter faster on CPU
    elif pipeline.vae is None and (folder / "vae" / "config.json").is_file():
        # diffusers would say 8 for any; the latents' size hangs on it
        settings = read_json(folder / "vae" / "config.json")
        levels = settings.get("block_out_channels") or settings["encoder_block_out_channels"]
        pipeline.vae_scale_factor = 2 ** (len(levels) - 1)


def unscaled(vae, z):
    """Latents as the network sees them, (B, C, h, w), to those that the autoencoder decodes."""
    scaling, shift, std = (c.to(z) if torch.is_tensor(c) else c for c in latent_statistics(vae))
    return z * std / scaling + shift


@torch.no_grad()
def decode(pipeline, z, batch):
    vae, factor = pipeline.vae, pipeline.vae_scale_factor
    batch = max(1, min(batch, PIXELS // (factor * factor * z[0, 0].numel())))
    rows = []
    for chunk in unscaled(vae, z).split(batch):
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
        rows.append(encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0])
    latents = torch.cat(rows).float()
    scaling, shift, std = (c.to(latents) if torch.is_tensor(c) else c for c in latent_statistics(vae))
    check_finite(latents, [f"picture {i + 1} of {len(images)}" for i in range(len(images))],
                 f"its latents are not finite in {vae.dtype}; use bf16 or fp32")
    return (latents - shift) * scaling / std
