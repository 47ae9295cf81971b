"""The frozen diffusion model behind one contract: model(z, t, cond) -> (x_hat, eps_hat). The only file that knows the
network's side of diffusers: its noise schedule, its clock, its prediction type, its text encoder, how it is loaded.

Clock: t is continuous, 0 = data, 1 = noise. The network sees the timestep 1000 t - 1 (a float; SD's own integers at
t = k/1000): t = 1 is timestep 999, and t = 0 is "timestep -1", clean data, which no network is ever asked about.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from config import UserError

# Their bars per file and notes on absent optional parts would bury ours; errors still come through.
for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()

ASSETS = Path(__file__).parent / "assets"
# --model NAME -> (folder or hub id, its default data)
PRESETS = {"tiny": (str(ASSETS / "tiny-sd"), "sprites"),
           "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "")}
# what a network predicts -> (p, q) with output = p x + q eps, given (alpha_t, sigma_t)
PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
}


class Schedule:
    """alpha_t and sigma_t of z_t = alpha_t x + sigma_t eps, for any t in [0, 1]: exact at t = k/1000, alpha linear between.
    alphas_cumprod: (T,), as diffusers' schedulers carry it; T timesteps."""

    def __init__(self, alphas_cumprod):
        self.alpha = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().sqrt()])
        self.timesteps = len(alphas_cumprod)

    def __call__(self, t):
        """t: tensor of any shape, in [0, 1].  Returns: (alpha_t, sigma_t), float64, the same shape."""
        position = t.double() * self.timesteps
        low = position.floor().clamp(0, self.timesteps - 1).long()
        table = self.alpha.to(t.device)
        alpha = torch.lerp(table[low], table[low + 1], position - low)
        return alpha, (1 - alpha.square()).clamp_min(0).sqrt()


def to_chord(output, z, prediction, a, b):
    """Solve {z = a x + b eps, output = p x + q eps} for the pair. prediction: (p, q). All broadcast with z.
    Returns: (x_hat, eps_hat). Singular only where the network says nothing about the pair (epsilon at alpha = 0)."""
    p, q = prediction
    determinant = a * q - b * p
    return (q * z - b * output) / determinant, (a * output - p * z) / determinant


@dataclass
class Model:
    """A network under the contract. path and windows say on which curve z lies (reflow.PATHS); the schedule's own by default.

    network: callable (z, timestep (B,), **cond) -> output; schedule: Schedule; prediction: a key of PREDICTIONS."""
    network: object
    schedule: Schedule
    prediction: str = "epsilon"
    path: object = None
    windows: int = 1

    def coefficients(self, t, ndim=1):
        """(a_t, b_t) with z_t = a_t x + b_t eps, float64. t: (B,).  Returns: two tensors (B, 1, ...) with ndim axes."""
        a, b = self.path(self.schedule, t, self.windows) if self.path else self.schedule(t)
        return a.view(-1, *[1] * (ndim - 1)), b.view(-1, *[1] * (ndim - 1))

    def __call__(self, z, t, cond, guidance=1.0, uncond=None):
        """z: (B, ...) float32; t: (B,) in (0, 1]; cond: dict of tensors (B, ...) that the network takes by name.
        guidance: w in out_uncond + w (out_cond - out_uncond); 1 asks only cond, 0 only uncond, anything else both in one
        batch. uncond: dict like cond.  Returns: (x_hat, eps_hat), like z."""
        alpha, sigma = (c.view(-1, *[1] * (z.ndim - 1)) for c in self.schedule(t))
        timestep = (t.double() * self.schedule.timesteps - 1).float()
        if guidance == 1:
            output = self.network(z, timestep, **cond)
        elif uncond is None:
            raise ValueError(f"guidance {guidance} needs uncond")
        elif guidance == 0:
            output = self.network(z, timestep, **uncond)
        else:
            both = {key: torch.cat([uncond[key], cond[key]]) for key in cond}
            without, given = self.network(torch.cat([z, z]), torch.cat([timestep, timestep]), **both).chunk(2)
            output = without + guidance * (given - without)
        prediction = [c.to(z.dtype) for c in PREDICTIONS[self.prediction](alpha, sigma)]
        a, b = (c.to(z.dtype) for c in self.coefficients(t, z.ndim))
        return to_chord(output.to(z.dtype), z, prediction, a, b)


# ---- diffusers: loading, text, pictures ----------------------------------------------------------------------------


def load_pipeline(name, dtype=torch.float32):
    """A frozen diffusers pipeline. name: a key of PRESETS, a local folder, or a hub id. Only safetensors are read.
    Raises UserError if it is missing, broken, or not a latent text-to-image model with a UNet."""
    source = PRESETS.get(name, (name, ""))[0]
    looks_local = Path(source).exists() or source.startswith((".", "/")) or source.count("/") != 1
    if looks_local and not (Path(source) / "model_index.json").is_file():
        raise UserError(f"--model {name}: no diffusers pipeline there (model_index.json is missing); "
                        f"give a pipeline folder, a hub id, or one of: {', '.join(PRESETS)}")
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, local_files_only=looks_local)
    except (OSError, ValueError, KeyError, json.JSONDecodeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model {name}: cannot be loaded ({type(error).__name__}: {reason}); re-export or re-download the folder") from error
    parts = getattr(pipeline, "unet", None), getattr(pipeline, "vae", None), getattr(pipeline, "text_encoder", None)
    if None in parts:
        raise UserError(f"--model {name}: {type(pipeline).__name__} is not a text-to-image pipeline with unet, vae and text_encoder")
    for part in parts:
        part.requires_grad_(False).eval()
    pipeline.vae.to(memory_format=torch.channels_last)      # with decode's, a quarter faster on CPU
    return pipeline


def as_model(pipeline, network=None, path=None, windows=1):
    """The pipeline's schedule and prediction type around `network` (default: its own UNet), under the contract."""
    network = pipeline.unet if network is None else network
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise UserError(f"prediction type {scheduler.config.prediction_type!r} is not one of: {', '.join(PREDICTIONS)}")
    return Model(lambda z, timestep, **cond: network(z, timestep, return_dict=False, **cond)[0],
                 Schedule(scheduler.alphas_cumprod), scheduler.config.prediction_type, path, windows)


@torch.no_grad()
def encode_text(pipeline, prompts, batch=256):
    """What the UNet is conditioned on. prompts: list of N strings; tokens beyond the text encoder's length are cut.
    Returns: dict of float32 CPU tensors {"encoder_hidden_states": (N, L, D)}."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    rows = []
    for start in range(0, len(prompts), batch):
        tokens = tokenizer(prompts[start:start + batch], padding="max_length", max_length=tokenizer.model_max_length,
                           truncation=True, return_tensors="pt").input_ids
        rows.append(encoder(tokens.to(encoder.device))[0].float().cpu())
    return {"encoder_hidden_states": torch.cat(rows)}


@torch.no_grad()
def decode(pipeline, z, batch=64):
    """Latents to pictures. z: (B, C, h, w), scaled as the UNet sees it.  Returns: float32 (B, 3, H, W) in [-1, 1], CPU."""
    vae = pipeline.vae
    chunks = (z / vae.config.scaling_factor).to(vae.dtype, memory_format=torch.channels_last).split(batch)
    return torch.cat([vae.decode(chunk, return_dict=False)[0].float().clamp(-1, 1).cpu() for chunk in chunks])


@torch.no_grad()
def encode(pipeline, images, batch=64):
    """Pictures to latents, the autoencoder's mean. images: (B, 3, H, W) in [-1, 1].  Returns: float32 (B, C, h, w)."""
    vae, rows = pipeline.vae, []
    for chunk in images.to(vae.device, vae.dtype).split(batch):
        encoded = vae.encode(chunk)
        rows.append(encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents)
    return torch.cat(rows).float() * vae.config.scaling_factor
