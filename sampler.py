"""Few-step sampling: time grids, solvers, and `python sampler.py --prompt "red heart on blue"`.

python sampler.py export, export-delta and merge write models instead of pictures (export.py).

Without --model it takes the newest student under runs/, else the one in assets/. A student needs no special solver:
inside a straight window one DDIM step is exact, so stock diffusers schedulers sample it as well as this file does, at the
numbers of steps that its card names (export.exact_steps; on path linear one per window and no other). The solvers beyond
DDIM are for curved trajectories, a teacher's or a student's of more steps than windows:

| solver | order | evaluations | |
|---|---|---|---|
| ddim | 1 | S | the Euler step of every straightening of the path, so there is no other "euler" here |
| heun | 2 | 2S - K | trapezoid in sigma_karras = sigma/alpha: dpm2 with r = 1 |
| dpm2 | 2 | 2S - K | DPM-Solver-2: middle point at the share r of the step in log sigma_karras |
| dpmsolver++, unipc | 2 | S | diffusers' own multistep schedulers |
| lcm | - | S | diffusers' own: jump to the clean latent, add fresh noise; for models of one window |

for S steps through K windows (of the model; a plain model has one). Any grid of GRIDS goes with the first three. The last
step, to t = 0, is DDIM in all of them, and on the uniform grid most of the error: second order pays on the edm grid.
"""
import functools
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import config
import export
import reflow
import teacher
from config import UserError

# ---- noise, time grids ---------------------------------------------------------------------------------------------


def generators(seeds):
    """One CPU generator per image, so that image i is the same in any batch and on any number of processes. seeds: ints."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def noise(seeds, shape):
    """Standard normal noise, the first that each image's generator draws. seeds: ints; shape: of one image.
    Returns: float32 (len(seeds), *shape), CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators(seeds)])


# A grid says where the N steps through one window lie. Each row: (u, start, end, schedule) -> times, with u = 0, 1/N, ..., 1,
# falling from start at u = 0 to end at u = 1, float64 (N + 1,).


def uniform_grid(u, start, end, schedule):
    """Evenly in t: in one window k/N, diffusers' "trailing" spacing."""
    return start + (end - start) * u


def sigmoid_grid(u, start, end, schedule, kappa=10.0):
    """Denser towards both ends, the more so the larger kappa > 0: sigmoid(kappa (u - 1/2)) brought to [0, 1]. As kappa goes
    to 0 it becomes uniform.  Source: Simple ReFlow has a sigmoid grid; its kappa is unknown, 10 is our default."""
    if not kappa > 0:
        raise ValueError(f"kappa = {kappa:g}: must be above 0")
    curve = torch.sigmoid(kappa * (u - 0.5))
    return start + (end - start) * (curve - curve[0]) / (curve[-1] - curve[0])


def edm_grid(u, start, end, schedule, rho=7.0):
    """Evenly in sigma_karras^(1/rho), EDM (Karras et al. 2022) eq. 5: towards t = 0 the last but one time is the lowest noise
    that the network knows (the schedule's floor, timestep 0), then 0; a window that lies on one side of the floor is even.
    Raises ValueError if sigma_karras is infinite at the start (zero terminal SNR)."""
    steps, floor = len(u) - 1, schedule.floor
    if schedule(torch.tensor(start))[0] == 0:
        raise ValueError("sigma/alpha is infinite at t = 1 (zero terminal SNR): use another grid")
    if steps > 1 and end < floor < start:                   # i / (N - 1), and the appended 0
        return torch.cat([edm_grid(torch.linspace(0, 1, steps, dtype=torch.float64), start, floor, schedule, rho), torch.zeros(1).double()])
    high, low = (sigma_karras(schedule, torch.tensor(t, dtype=torch.float64)) ** (1 / rho) for t in (start, end))
    return schedule.time_of((high + (low - high) * u) ** rho)


GRIDS = {"uniform": uniform_grid, "sigmoid": sigmoid_grid, "edm": edm_grid}


def sigma_karras(schedule, t):
    """sigma_t / alpha_t, float64, like t."""
    alpha, sigma = schedule(t)
    return sigma / alpha


def time_grid(steps, windows=1, spacing=uniform_grid, schedule=None):
    """steps + 1 times from 1 to 0, steps shared evenly by the windows (any remainder goes to the noisiest ones), so that no
    step crosses a boundary; inside each window as spacing says, a row of GRIDS. schedule: what edm_grid needs.
    Returns: float64 (steps + 1,), falling.  Raises ValueError if there are fewer steps than windows, or if times coincide."""
    if steps < windows:
        raise ValueError(f"{steps} steps cannot cross {windows} windows: one step per window at least")
    edges, times = reflow.boundaries(windows), [1.0]
    for i, (start, end) in enumerate(zip(edges, edges[1:])):
        inside = steps // windows + (i < steps % windows)
        u = torch.arange(inside + 1, dtype=torch.float64) / inside
        times += [*spacing(u, start, end, schedule)[1:-1].tolist(), end]
    times = torch.tensor(times, dtype=torch.float64)
    if not (times.diff() < 0).all():
        raise ValueError(f"{steps} steps: some lie closer together than numbers can tell; use fewer, or the uniform grid")
    return times


# ---- solvers -------------------------------------------------------------------------------------------------------
# All of one signature (ddim says what it means), so that two can be laid side by side, and swapped.


def ddim(model, z, times, cond, guidance=1.0, uncond=None, callback=None, generators=None):
    """DDIM: keep (x_hat, eps_hat), change t. First order; exact in one step where the trajectory is straight.
    model: the contract of teacher.py; z: (B, ...) at times[0]; times: (S+1,) or one column per sample, (S+1, B), in
    sampling order, none but the last 0; callback: called with a dict(i, t, t_next, z, x_hat, eps_hat) before each move;
    generators: one per image, read only by solvers that draw noise (lcm).
    Returns: z at times[-1]. One network evaluation per step, and nothing else that waits for the device."""
    times = times.to(z.device).reshape(len(times), -1).expand(-1, len(z))          # (S+1, B)
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x_hat, eps_hat = model(z, t, cond, guidance, uncond)
        if callback:
            callback(dict(i=i, t=t, t_next=t_next, z=z, x_hat=x_hat, eps_hat=eps_hat))
        a, b = (c.to(z.dtype) for c in model.coefficients(t_next, z.ndim))
        z = a * x_hat + b * eps_hat
    return z


def invert(model, z_0, times, cond, guidance=1.0, uncond=None, callback=None):
    """DDIM from data to noise: the z at times[0] whose trajectory ends at z_0. First order, so the way back misses z_0 by an
    error that falls with the steps. times: as for ddim, falling from noise to data (they are walked backwards). No network is
    asked about t = 0: z_0 is taken for the latent at timestep 0, the lowest noise it knows, and so is any earlier time.
    model: of one window. The rest: as for ddim.  Raises ValueError unless the times fall."""
    if not (times.diff(dim=0) < 0).all():
        raise ValueError(f"times from {times[0].max():g} to {times[-1].min():g}: must fall, as in time_grid; inversion turns them round")
    return ddim(model, z_0, times.flip(0).clamp_min(model.schedule.floor), cond, guidance, uncond, callback)


def dpm2(model, z, times, cond, guidance=1.0, uncond=None, callback=None, generators=None, r=0.5):
    """DPM-Solver-2 with free r (Lu et al. 2022; Simple ReFlow samples so too, its r is unknown): second order in
    sigma_karras = sigma/alpha. A DDIM step to the middle point sigma_m = sigma^(1-r) sigma_next^r, then the whole step with
    eps = (1 - 1/(2r)) eps_hat + 1/(2r) eps_m. r in (0, 1]: 1/2 is halfway in log sigma_karras, 1 is Heun's method.
    A step that ends a window of the model is DDIM: at its end the network speaks for the next window, and at t = 0 not at
    all. So S steps through K windows cost 2S - K evaluations, and one step per window is exact where ddim is.
    Arguments, Returns: as for ddim.  Raises ValueError unless 0 < r <= 1, UserError where sigma_karras is infinite or, for
    r < 1, where z is off the schedule's curve. Waits for the device once, if times are there."""
    if not 0 < r <= 1:
        raise ValueError(f"r = {r:g}: must be above 0 and at most 1")
    times = times.cpu().double().reshape(len(times), -1).expand(-1, len(z))         # (S+1, B)
    if (model.schedule(times[0])[0] == 0).any():
        raise UserError("solver heun, dpm2: sigma/alpha is infinite at t = 1 (zero terminal SNR); use ddim")
    if r < 1:
        check_on_schedule("dpm2", model, times[:-1])
    last = times[1:] <= reflow.window_of(times[:-1], model.windows)[1] + 1e-9       # (S, B): ends a window
    sigma = sigma_karras(model.schedule, times)
    middle = times[1:] if r == 1 else model.schedule.time_of(sigma[:-1] ** (1 - r) * sigma[1:] ** r)
    middle = torch.where(last, times[:-1], middle)          # there eps_m is eps_hat, and the step is DDIM
    single = last.all(1).tolist()
    times, middle = times.to(z.device), middle.to(z.device)
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x_hat, eps_hat = model(z, t, cond, guidance, uncond)
        if callback:
            callback(dict(i=i, t=t, t_next=t_next, z=z, x_hat=x_hat, eps_hat=eps_hat))
        if not single[i]:
            a, b = (c.to(z.dtype) for c in model.coefficients(middle[i], z.ndim))
            _, eps_m = model(a * x_hat + b * eps_hat, middle[i], cond, guidance, uncond)
            change = (eps_m - eps_hat) / (2 * r)
            a, b = model.coefficients(t, z.ndim)            # the same z is a (x_hat - b/a change) + b (eps_hat + change)
            x_hat, eps_hat = x_hat - (b / a).to(z.dtype) * change, eps_hat + change
        a, b = (c.to(z.dtype) for c in model.coefficients(t_next, z.ndim))
        z = a * x_hat + b * eps_hat
    return z


def check_on_schedule(name, model, t):
    """Raises UserError unless the model's z lies on the noise schedule's own curve at every t, as PeRFlow's linear path does
    only at boundaries. t: CPU tensor."""
    for found, expected in zip(model.coefficients(t.reshape(-1)), model.schedule(t.reshape(-1))):
        if not torch.allclose(found, expected, atol=1e-6):
            raise UserError(f"solver {name}: between its boundaries this student leaves the noise schedule (path linear, "
                            f"{model.windows} window{'s' * (model.windows > 1)}); use ddim or heun, or one step per window")


def stock(name, scheduler_class, draws=False, **options):
    """A solver out of a diffusers scheduler, which gets the model's betas and its x_hat, whatever the network predicts. It
    asks at its own integer timesteps, so times must be the uniform grid from 1 to 0, one for all samples; z must lie on the
    noise schedule. draws: it adds noise, from one generator per image.  Returns: a function like ddim.  Its errors are
    UserError: another grid, more steps than it can make, a student off the schedule."""
    def solve(model, z, times, cond, guidance=1.0, uncond=None, callback=None, generators=None):
        if isinstance(model.schedule, teacher.EDMSchedule):
            raise UserError(f"solver {name}: needs a table of betas, and this model's noise is EDM's; use ddim, heun or dpm2")
        steps, alpha = len(times) - 1, model.schedule.alpha
        if times.ndim > 1 or not torch.allclose(times.cpu().double(), time_grid(steps), atol=1e-6):
            raise UserError(f"solver {name}: has its own times, {steps} uniform steps from 1 to 0; use ddim, heun or dpm2 with other "
                            "grids, and a multiple of its windows as --steps for a student of several")
        if draws and (generators is None or len(generators) != len(z)):
            raise ValueError(f"solver {name} draws noise: give {len(z)} generators, one per image")
        betas = 1 - (alpha[1:] / alpha[:-1]).square()
        scheduler = scheduler_class(trained_betas=betas.tolist(), num_train_timesteps=len(betas), prediction_type="sample",
                                    rescale_betas_zero_snr=alpha[-1].item() == 0, **options)    # where it is, it stays as it is
        try:
            scheduler.set_timesteps(steps)
        except ValueError as error:
            raise UserError(f"solver {name}: cannot make {steps} steps ({error}); use fewer") from error
        asked = torch.cat([(scheduler.timesteps.double() + 1) / len(betas), torch.zeros(1, dtype=torch.float64)])
        check_on_schedule(name, model, asked[:-1])
        asked = asked.to(z.device).reshape(-1, 1).expand(-1, len(z))
        for i, timestep in enumerate(scheduler.timesteps):
            x_hat, eps_hat = model(z, asked[i], cond, guidance, uncond)
            if callback:
                callback(dict(i=i, t=asked[i], t_next=asked[i + 1], z=z, x_hat=x_hat, eps_hat=eps_hat))
            z = scheduler.step(x_hat, timestep, z, **({"generator": generators} if draws else {})).prev_sample
        return z
    return solve


SOLVERS = {
    "ddim": ddim,
    "heun": functools.partial(dpm2, r=1.0),
    "dpm2": dpm2,
    "dpmsolver++": stock("dpmsolver++", DPMSolverMultistepScheduler, timestep_spacing="trailing"),
    "unipc": stock("unipc", UniPCMultistepScheduler, timestep_spacing="trailing"),
    "lcm": stock("lcm", LCMScheduler, draws=True),          # its own spacing: S of the 50 timesteps 19, 39, ..., 999
}


def parse_solver(spec):
    """SOLVER[:r][/GRID[:kappa]], e.g. ddim, or dpm2:0.4/sigmoid:20.  Returns: (a row of SOLVERS, a row of GRIDS), with these numbers.
    Raises UserError."""
    named, _, grid = spec.partition("/")
    (name, _, r), (grid, _, kappa) = named.partition(":"), (grid or "uniform").partition(":")
    try:
        r, kappa = (float(value) if value else None for value in (r, kappa))
    except ValueError as error:
        raise UserError(f"solver {spec}: {error}; write it as dpm2:0.4/sigmoid:20") from error
    return configure(name, r, grid, kappa)


def configure(solver, r, grid, kappa):
    """A row of SOLVERS with its r and a row of GRIDS with its kappa; None leaves the default.  Returns: both functions.
    Raises UserError on a number out of range, or that goes with another row."""
    solve, spacing = config.choose("--solver", solver, SOLVERS), config.choose("--time-grid", grid, GRIDS)
    for option, value, owner, chosen in (("--r", r, "--solver dpm2", solver == "dpm2"),
                                         ("--kappa", kappa, "--time-grid sigmoid", grid == "sigmoid")):
        if value is not None and not chosen:
            raise UserError(f"{option} {value:g}: only goes with {owner}")
    if r is not None:
        if not 0 < r <= 1:
            raise UserError(f"--r {r:g}: must be above 0 and at most 1")
        solve = functools.partial(dpm2, r=r)
    if kappa is not None:
        if not kappa > 0:
            raise UserError(f"--kappa {kappa:g}: must be above 0")
        spacing = functools.partial(sigmoid_grid, kappa=kappa)
    return solve, spacing


TWO_EVALUATIONS = ("heun", "dpm2")


def evaluations(solver, steps, windows=1):
    """Network evaluations per image without guidance. solver: a key of SOLVERS; windows: the model's."""
    return 2 * steps - windows if solver in TWO_EVALUATIONS else steps


def steps_for(solver, nfe, windows=1):
    """The steps that cost nfe evaluations.  Raises ValueError if no number of steps does."""
    steps = (nfe + windows) // 2 if solver in TWO_EVALUATIONS else nfe
    if steps < windows or evaluations(solver, steps, windows) != nfe:
        possible = [str(evaluations(solver, windows + i, windows)) for i in range(3)]
        raise ValueError(f"{nfe} network evaluations: {solver} takes {', '.join(possible)}, ... through {windows} "
                         f"window{'s' * (windows > 1)}; ask for one of these, or use another solver")
    return steps


# ---- guidance by a weaker model ------------------------------------------------------------------------------------


@dataclass
class Guided(teacher.Model):
    """A model that --guidance leads away from a weaker one instead of from its own answer without text: autoguidance, Karras et al.
    2024, "Guiding a Diffusion Model with a Bad Version of Itself". Made by guided(), which checks that the two go together."""
    guide: teacher.Model = None

    def __call__(self, z, t, cond, guidance=1.0, uncond=None):
        """guidance: w in guide + w (model - guide), of the pair (x_hat, eps_hat), so that z stays a x_hat + b eps_hat; 1 asks only the
        model, 0 only the guide. Both are asked with cond, nobody with uncond. The rest: as for teacher.Model."""
        if guidance == 1:
            return super().__call__(z, t, cond)
        weak = self.guide(z, t, cond)
        if guidance == 0:
            return weak
        return tuple(w + guidance * (s - w) for w, s in zip(weak, super().__call__(z, t, cond)))


def guided(model, guide):
    """The model with its guide: its schedule, path and windows are the model's. Both: teacher.Model.  Returns: Guided.  Raises UserError
    unless z is the same mixture of x and eps to both at every time; windows alone may differ, on the schedule's own curve."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    if not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.coefficients(t), guide.coefficients(t))):
        raise UserError("its noise schedule or path is not the model's, and both are asked about the same z; give an earlier student of "
                        "the same path and windows, or on path vp the teacher or any of its students")
    return Guided(**vars(model), guide=guide)


def check_guide(guide, guidance):
    """Raises UserError if a guide is named, but never asked at this guidance."""
    if guide and guidance == 1:
        raise UserError(f"--guide {guide}: never asked at --guidance 1; give another --guidance, for instance 2")


def check_inputs(pipeline, other, size):
    """Raises UserError unless both UNets can be asked about the same latents with the same text. size: as for latent_shape."""
    shape, expected = latent_shape(other, size), latent_shape(pipeline, size)
    if shape != expected:
        raise UserError(f"its latents are {shape}, the model's {expected}; give a model of the same family")
    for part in ("text_encoder", "text_encoder_2"):
        a, b = (getattr(each, part, None) for each in (pipeline, other))
        a, b = (dict(each.named_parameters()) if each is not None else {} for each in (a, b))
        # up to the rounding of a folder stored in half precision
        if a.keys() != b.keys() or not all(a[key].shape == b[key].shape and torch.allclose(a[key].float(), b[key].float(), 1e-2, 1e-6)
                                           for key in a):
            raise UserError(f"its {part} is not the model's, and both are asked with the same encoding of the prompts; give a model of "
                            "the same family")


# ---- a model folder and its pictures -------------------------------------------------------------------------------


def read_about(folder, *needed):
    """The reflow.json of a student's folder, {} where there is none: a teacher's.  Raises UserError if it is broken or lacks one of the
    needed keys."""
    file = Path(folder) / "reflow.json"
    if not file.is_file():
        return {}
    try:
        info = json.loads(file.read_text())
        _ = reflow.PATHS[info.get("path", "vp")], int(info.get("windows", 1)), [info[key] for key in needed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:      # AttributeError: a list, not an object
        raise UserError(f"{file}: broken ({type(error).__name__}: {error}); train the student again or restore the file") from error
    return info


def open_model(name, device="cpu", dtype=torch.float32, random_init=False, model_config="", guide="", size=None, student=None):
    """A teacher or a student, with the size and null embedding it was trained with. name and the rest: as for teacher.load_pipeline;
    guide: name of a weaker model, which makes the model one of Guided; size: as for latent_shape, for the guide's sake; student:
    reflow.json of a student, whose teacher is opened as its run opened it, if that is its name.
    Returns: (pipeline, model, info); info is the folder's reflow.json, {} for a teacher: windows and path say how to sample it."""
    info = read_about(teacher.PRESETS.get(name, (name, ""))[0])
    if student and student.get("teacher") == name:
        pipeline = export.load_teacher(student, dtype=dtype).to(device)
    else:
        pipeline = teacher.load_pipeline(name, dtype, random_init, model_config=model_config).to(device)
        student = info
    export.apply_settings(pipeline, student)
    model = teacher.as_model(pipeline, path=reflow.PATHS[info.get("path", "vp")], windows=int(info.get("windows", 1)))
    if guide:
        try:
            other, weaker, _ = open_model(guide, device, dtype, random_init, student=student)
            check_inputs(pipeline, other, size)
            model = guided(model, weaker)
        except UserError as error:
            raise UserError(f"--guide {guide}: {str(error).removeprefix(f'--model {guide}: ')}") from error
    return pipeline, model, info


def default_model(runs=Path("runs")):
    """The newest student under runs/, else the one that comes with the repository.  Returns: folder name."""
    students = sorted(runs.glob("**/student-*/reflow.json"), key=lambda file: file.stat().st_mtime)
    return str(students[-1].parent if students else teacher.ASSETS / "student-2")


@torch.no_grad()
def generate(pipeline, model, prompts, seeds, times, guidance=1.0, batch=64, callback=None, progress=None, size=None, solver="ddim"):
    """Latents for prompts[i] from noise seeds[i]. times: from time_grid; size: as for latent_shape; solver: a row of SOLVERS,
    or a function like them.  Returns: float32 (N, C, h, w), CPU. progress: a tqdm to advance by images.
    Raises UserError on a latent that is not finite, after the batch that it is in."""
    solve = config.choose("--solver", solver, SOLVERS) if isinstance(solver, str) else solver
    shape = latent_shape(pipeline, size)
    pixels = [side * pipeline.vae_scale_factor for side in shape[1:]]
    teacher.check_null(pipeline, guidance)
    device, results = pipeline.unet.device, []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        null = [None] * (guidance != 1)                    # the null embedding, where it is asked, is row 0
        unique = [*null, *dict.fromkeys(prompts[part])]    # a prompt "" is text
        table = teacher.encode_text(pipeline, unique, size=pixels, device=device)
        rows = torch.tensor([unique.index(prompt) for prompt in prompts[part]]).to(device)
        cond = {key: value[rows] for key, value in table.items()}
        uncond = {key: value[:1].expand(len(rows), *[-1] * (value.ndim - 1)) for key, value in table.items()}
        own = generators(seeds[part])                      # further noise comes from the same stream, as in diffusers' pipelines
        z = torch.stack([torch.randn(shape, generator=generator) for generator in own]).to(device)
        z = solve(model, z, times, cond, guidance, uncond, callback, own)
        results.append(z.cpu())
        names = [f"seed {seed}, prompt {prompt!r}" for seed, prompt in zip(seeds[part], prompts[part])]
        teacher.check_finite(results[-1], names, "its latents are not finite: the network has diverged, or "
                             "overflows in its dtype; use an earlier checkpoint, --dtype bf16 or fp32, or less guidance")
        if progress is not None:
            progress.update(len(z))
    return torch.cat(results)


def latent_shape(pipeline, size=None):
    """(C, h, w) of the latents. size: of the picture in pixels, (H, W) or one int for both; default: what the UNet was made for.
    Raises UserError unless the UNet's levels divide it."""
    factor = pipeline.vae_scale_factor
    multiple = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    height, width = teacher.native_size(pipeline) if size is None else (size, size) if isinstance(size, int) else size
    for side in (height, width) if size is not None else ():
        if side < 1 or side % multiple:
            low = side // multiple * multiple
            near = f"{low} or {low + multiple}" if low > 0 else f"{multiple}"
            raise UserError(f"--size {side}: must be a multiple of {multiple} for this model, for instance {near}")
    return pipeline.unet.config.in_channels, height // factor, width // factor


def to_pil(images, scale=1):
    """float (N, 3, H, W) in [-1, 1] to a list of PIL images, each pixel drawn scale x scale."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(p)).resize((p.shape[1] * scale, p.shape[0] * scale), Image.Resampling.NEAREST)
            for p in pixels]


def grid(rows, columns=(), labels=(), gap=4):
    """One picture out of rows of PIL images of one size; columns: a title per column; labels: a title per row."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(11, height // 7))
    left = 10 + max((math.ceil(font.getlength(label)) for label in labels), default=-10)
    top = 3 * font.size if columns else 0
    count = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + count * (width + gap), top + len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(columns):
        pen.text((left + j * (width + gap) + width / 2, top / 2), title, "black", font, anchor="mm")
    for i, row in enumerate(rows):
        if labels:
            pen.text((left - 6, top + i * (height + gap) + height / 2), labels[i], "black", font, anchor="rm")
        for j, image in enumerate(row):
            canvas.paste(image, (left + j * (width + gap), top + i * (height + gap)))
    return canvas


def warn_unknown_words(name, pipeline, prompts):
    """If the model's folder lists its vocabulary, say which words of the prompts it has never seen."""
    file = Path(teacher.PRESETS.get(name, (name, ""))[0]) / "vocabulary.json"
    if not file.is_file():
        return
    known = set(teacher.read_json(file))
    unknown = sorted({word for prompt in prompts for word in prompt.lower().split()} - known)
    if unknown:
        warnings.warn(f"this model has never seen: {', '.join(unknown)}. It knows: {' '.join(sorted(known))}", stacklevel=2)


# ---- python sampler.py ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    prompt: list[str] = field(default_factory=list)  # one or more, each in quotes
    model: str = ""             # folder, hub id, preset or .safetensors; default: the newest student under runs/, else assets/student-2
    model_config: str = ""      # diffusers folder with the configs and tokenizer of a single-file .safetensors; default: from the hub
    random_init: bool = False   # random weights instead of trained ones: any preset without a download
    dtype: str = "fp32"         # of the networks: fp32, bf16 or fp16
    size: int | None = None     # pixels, square; default: what the model was made for
    steps: int | None = None    # of the solver; default: what the model was made for
    nfe: int | None = None      # instead of --steps: network evaluations per image without guidance
    solver: str = "ddim"        # ddim, heun, dpm2, dpmsolver++, unipc or lcm; heun and dpm2 ask the network twice in most steps
    r: float | None = None      # dpm2's middle point, in (0, 1]; default: 0.5
    time_grid: str = "uniform"  # where the steps lie inside each window: uniform, sigmoid or edm
    kappa: float | None = None  # the sigmoid grid's steepness, above 0; default: 10
    guidance: float = 1.0       # 1 = none; otherwise each evaluation costs two
    guide: str = ""             # a weaker model, e.g. an earlier student: --guidance leads away from it, not from no text (autoguidance)
    seed: int = 0               # of the first image; image i has seed + i
    n: int = 1                  # images per prompt
    out: str = "sample.png"     # PNG; several images are numbered unless --grid
    grid: bool = False          # all images in one picture, a row per prompt
    compare: bool = False       # the teacher beside the student, from the same noise
    save_steps: bool = False    # also OUT-steps.png: what the model believes the picture is, step by step
    scale: int | None = None    # draw each pixel scale x scale; default: enough for 256 pixels
    device: str = ""            # cpu or cuda; default: cuda if there is one


def main(c):
    no_prompt = UserError('no prompt: give at least one, e.g. --prompt "red heart on blue"')
    if not all(prompt.strip() for prompt in c.prompt):
        raise no_prompt
    config.at_least(c, steps=1, nfe=1, n=1, scale=1, guidance=0)
    solver, spacing = configure(c.solver, c.r, c.time_grid, c.kappa)
    check_guide(c.guide, c.guidance)
    if c.steps is not None and c.nfe is not None:
        raise UserError(f"--steps {c.steps} and --nfe {c.nfe}: give one of them")
    out = Path(c.out)
    check_writable(out)
    dtype = config.choose("--dtype", c.dtype, teacher.DTYPES)
    device = teacher.pick_device(c.device)
    name = c.model or default_model()
    pipeline, model, info = open_model(name, device, dtype, c.random_init, c.model_config, c.guide, c.size)
    latent_shape(pipeline, c.size)                         # refused here, before the bar
    if not c.prompt:
        if not teacher.in_pixels(pipeline) or teacher.class_names(pipeline):
            raise no_prompt
        c.prompt = [""]                                    # an unconditional model reads none
    windows = info.get("windows", 1)
    try:
        steps = c.steps if c.steps is not None else info.get("windows", 32) if c.nfe is None else steps_for(c.solver, c.nfe, windows)
    except ValueError as error:
        raise UserError(f"--nfe {error}") from error
    if steps < windows:
        raise UserError(f"--steps {steps}: {name} is straight over {windows} windows and needs a step for each; "
                        f"use --steps {windows} or more, or a student of {steps} window{'s' * (steps > 1)}")
    try:
        times = time_grid(steps, windows, spacing, model.schedule)
    except ValueError as error:
        raise UserError(f"--time-grid {c.time_grid}: {error}") from error
    prompts = [prompt for prompt in c.prompt for _ in range(c.n)]
    seeds = [c.seed + i for i in range(len(prompts))]
    beliefs = []                                           # per batch and step, x_hat
    start = time.perf_counter()
    with warnings.catch_warnings(), tqdm(total=len(prompts), desc=f"{steps} steps", unit="image", leave=False) as bar:
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}")
        warn_unknown_words(name, pipeline, c.prompt)
        z = generate(pipeline, model, prompts, seeds, times, c.guidance, progress=bar, size=c.size, solver=solver,
                     callback=(lambda state: beliefs.append((state["i"], state["x_hat"].float().cpu()))) if c.save_steps else None)
        images = teacher.decode(pipeline, z)
    seconds = time.perf_counter() - start
    scale = c.scale if c.scale is not None else max(1, 256 // images.shape[-1])
    pictures = to_pil(images, scale)

    sets, columns = [pictures], [f"{steps} steps"]
    if c.compare:
        teacher_name = info.get("teacher") or name
        other, other_model, _ = open_model(teacher_name, device, dtype, c.random_init, c.model_config, c.guide, c.size, info)
        z = generate(other, other_model, prompts, seeds, time_grid(32), c.guidance, size=c.size)
        sets, columns = [to_pil(teacher.decode(other, z), scale), pictures], ["teacher, 32 steps", f"{steps} steps"]
    if c.compare:
        rows = [[images[i] for images in sets] for i in range(len(prompts))]
        files = {out: grid(rows, columns, prompts)}
    elif c.grid:
        rows = [pictures[i * c.n:(i + 1) * c.n] for i in range(len(c.prompt))]
        files = {out: grid(rows, labels=c.prompt)}
    elif len(pictures) == 1:
        files = {out: pictures[0]}
    else:
        files = {out.with_stem(f"{out.stem}-{i}"): picture for i, picture in enumerate(pictures)}
    if c.save_steps:
        strips = [teacher.decode(pipeline, torch.cat([x for i, x in beliefs if i == step])) for step in range(steps)]
        rows = [[to_pil(strip[i:i + 1], scale)[0] for strip in strips] for i in range(len(prompts))]
        files[out.with_stem(out.stem + "-steps")] = grid(rows, [f"step {i + 1}" for i in range(steps)], prompts)
    for file, picture in files.items():
        picture.save(file)
    shown = ", ".join(str(file) for file in list(files)[:4]) + (", ..." if len(files) > 4 else "")
    count = evaluations(c.solver, steps, windows) * (1 if c.guidance in (0, 1) else 2)
    print(f"{shown}: {len(prompts)} image{'s' * (len(prompts) > 1)} by {name}{f' guided by {c.guide}' * bool(c.guide)}, {steps} steps = "
          f"{count} network evaluations each, {seconds / len(prompts):.3f} s per image")


def check_writable(file):
    """Raises UserError unless `file` (a PNG) can be written; makes its folder."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--out {file}: must end in .png")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        file.open("ab").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written ({error.strerror}); choose another file") from error


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in export.COMMANDS:
        command, options = export.COMMANDS[sys.argv[1]]
        config.run(command, options, command.__doc__, sys.argv[2:])
    else:
        config.run(main, Config, __doc__)
