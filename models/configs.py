"""What the configs of diffusers say about a model: fields that change its meaning are read here, or
refused."""
import json
import math

from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import teacher
from runtime.cli import UserError

# Config fields that would change what a model means and are not followed: the values that are taken (the
# first where a config lacks the field), and what others mean. All other fields are read in this file, act
# inside the network or matter to a solver alone; a test lists them, so that a field of a new diffusers is
# noticed.
GIVE = "give a Stable Diffusion 1.x, 2.x or XL model"

SUPPORTED = {
    "scheduler": {
        "snr_shift_scale": ((None, 1), f"its schedule is shifted, as video models' is; {GIVE}"),
    },
    "flow scheduler": {
        "num_train_timesteps": ((1000,), "networks of flow matching that we know are told 1000 sigma"),
        "invert_sigmas": ((False, None), "its network counts time backwards, as video models' do"),
    },
    "pipeline": {
        "requires_aesthetics_score": ((False, None), "it takes an aesthetic score, as SDXL's refiner does; "
                                                     f"{GIVE}"),
    },
    "UNet2DConditionModel": {
        "class_embed_type": ((None,), f"it is conditioned on classes besides the text; {GIVE}"),
        "num_class_embeds": ((None,), f"it is conditioned on classes besides the text; {GIVE}"),
        "time_cond_proj_dim": ((None,), "it takes the guidance scale as an input, as already distilled "
                                        "models do; give their teacher"),
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


def read_json(file, kind=dict):
    """What a JSON file holds, an object or, of kind list, an array.  Raises UserError if it is broken or
    holds another."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"a {type(found).__name__} where a {kind.__name__} belongs")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it or remove it") from error
    return found


def check_fields(part, settings):
    """Raises UserError on a field of a config that SUPPORTED refuses. part: a key of it;
    settings: the config."""
    for field, (known, meaning) in SUPPORTED[part].items():
        if settings.get(field, known[0]) not in known:
            raise UserError(f"{field} of its {part} is {settings[field]!r}: {meaning}")


def check_variance(c):
    """Raises UserError unless a transformer of this config gives as many channels as it takes, or twice as
    many: the latter half is then a learned variance, which nothing here reads."""
    if c.out_channels not in (None, c.in_channels, 2 * c.in_channels):
        raise UserError(f"its transformer takes {c.in_channels} channels and gives {c.out_channels}; give "
                        f"one with {c.in_channels}, or {2 * c.in_channels} where it learned its variance")


def read_schedule(scheduler, tokens=lambda: 0):
    """What a diffusers scheduler says about the model, whatever its own solver.
    tokens: called where the schedule depends on them, gives how many patches a picture has.
    Returns: (Schedule, EDMSchedule or FlowSchedule, a key of PREDICTIONS). Raises UserError if z_t =
    alpha_t x + sigma_t eps does not hold for it, or an output can leave (x, eps) undetermined."""
    if is_edm(scheduler):
        c = scheduler.config
        if c.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {c.prediction_type!r} of {type(scheduler).__name__} is not one "
                            "of: epsilon, v_prediction")
        return teacher.EDMSchedule(c.sigma_min, c.sigma_max, c.sigma_data), c.prediction_type
    if is_flow(scheduler):
        return teacher.FlowSchedule(flow_shift(scheduler, tokens)), "flow_prediction"
    if "beta_schedule" in scheduler.config and "sigma_data" in scheduler.config:
        raise UserError("DDIMPipeline has put a DDIM scheduler in the place of its EDM scheduler; name "
                        "DDPMPipeline in model_index.json, which keeps it")
    if "beta_schedule" not in scheduler.config:
        raise UserError(f"{type(scheduler).__name__} has neither a schedule of betas nor a flow's shift; "
                        "name another scheduler in model_index.json")
    check_fields("scheduler", scheduler.config)
    discrete = as_ddim(scheduler)
    prediction = discrete.config.prediction_type
    if scheduler.config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        raise UserError(f"timestep_type of its {type(scheduler).__name__} is 'continuous': its network reads "
                        "ln(sigma) / 4 as the time; name EDMEulerScheduler in model_index.json instead, with "
                        "sigma_data 1 and its sigma_min and sigma_max, which says the same")
    known = [name for name in teacher.PREDICTIONS if name != "flow_prediction"]
    if prediction not in known:
        raise UserError(f"prediction type {prediction!r} is not one of: {', '.join(known)}")
    if prediction == "epsilon" and discrete.alphas_cumprod[-1] == 0:
        raise UserError("predicts epsilon at zero terminal SNR (alpha = 0 at t = 1): z is the noise there, "
                        "so the prediction says nothing about the picture and no pair (x, eps) exists; give "
                        "a v_prediction model, or set rescale_betas_zero_snr to false")
    return teacher.Schedule(discrete.alphas_cumprod), prediction


def as_ddim(scheduler, **options):
    """The DDIM scheduler of the same noise schedule and prediction type as another scheduler with
    betas."""
    c = scheduler.config
    # by name: from_config takes DDIM's own defaults for what the other left to its defaults (LCM's betas are
    # not DDIM's)
    own = {key: c[key] for key in SCHEDULE_FIELDS if key in c}
    if c.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        own["trained_betas"] = scheduler.betas.tolist()      # sigmoid, laplace, exp: DDIM knows no formula
    return DDIMScheduler.from_config(c, **{**own, **options})


def is_edm(scheduler):
    return isinstance(scheduler, (EDMEulerScheduler, EDMDPMSolverMultistepScheduler))


# ---- flow matching -----------------------------------------------------------------------------------------


def is_flow(scheduler):
    """True for the schedulers of flow matching, and for those with betas that have been turned into
    one."""
    return type(scheduler).__name__.startswith("Flow") or bool(scheduler.config.get("use_flow_sigmas"))


def flow_shift(scheduler, tokens):
    """The shift s of FlowSchedule: a number, or dynamic, from the number of patches of a picture, as
    FLUX.1's is.  Raises UserError."""
    c = scheduler.config
    check_fields("flow scheduler", c)
    if c.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise UserError(f"prediction type {c.prediction_type!r} of its {type(scheduler).__name__} with flow "
                        "sigmas is not flow_prediction; correct its scheduler_config.json")
    if not c.get("use_dynamic_shifting"):
        return c["shift"] if "shift" in c else c["flow_shift"]
    low, high = c.get("base_shift", 0.5), c.get("max_shift", 1.15)          # defaults: the pipelines'
    few, many = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    mu = low + (high - low) * (tokens() - few) / (many - few)
    return math.exp(mu) if c.get("time_shift_type", "exponential") == "exponential" else mu


# ---- what a student is written with ------------------------------------------------------------------------
# Each asks the network exactly at the starts of the windows when it is called with one step per window.


def trailing_ddim(scheduler):
    """DDIM with "trailing" timesteps, of a scheduler with betas; a network in EDM's form keeps its
    own."""
    if is_edm(scheduler):
        return scheduler
    return as_ddim(scheduler, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
                   thresholding=False, steps_offset=1)


def flow_map_euler(shift):
    """For pipelines that give the number of steps alone (SD3, SANA): there FlowMatchEuler would shift
    twice, and end at sigma = 0.009 instead of the last window's start."""
    return FlowMapEulerDiscreteScheduler(shift=shift)


def flow_match_euler(shift):
    """For pipelines that give sigmas = 1, ..., 1/K themselves (FLUX, Z-Image)."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
