"""Few-step sampling: time grids, solvers, and `python sampler.py --prompt "red heart on blue"`.

Without --model it takes the newest student under runs/, else the one in assets/.
A student needs no special solver: inside a straight window one DDIM step is exact, so stock
diffusers schedulers sample it as well as this file does, at the numbers of steps that its card
names (export.exact_steps; on path linear one per window and no other). The solvers beyond DDIM are
for curved trajectories, a teacher's or a student's of more steps than windows:

| solver | order | evaluations | |
|---|---|---|---|
| ddim | 1 | S | the Euler step of every straightening of the path, so there is no other "euler" here |
| heun | 2 | 2S - K | trapezoid in sigma_karras = sigma/alpha: dpm2 with r = 1 |
| dpm2 | 2 | 2S - K | DPM-Solver-2: middle point at the share r of the step in log sigma_karras |
| dpmsolver++, unipc | 2 | S | diffusers' own multistep schedulers |
| lcm | - | S | diffusers' own: jump to the clean latent, add fresh noise; for models of one window |

for S steps through K windows (of the model; a plain model has one). Any grid of GRIDS goes with the
first three. The last step, to t = 0, is DDIM in all of them, and on the uniform grid most of the
error: second order pays on the edm grid.
"""
import functools
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler
from tqdm import tqdm

import models
import reflow
import solvers
import teacher
from data import imaging
from models import saved
from runtime import cli, processes
from runtime.cli import UserError

# ---- noise, time grids -------------------------------------------------------------------------------------


def generators(seeds):
    """One CPU generator per image, so that image i begins with the same noise in any batch and on any
    number of processes; what a network makes of it is the same up to rounding. seeds: ints."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def noise(seeds, shape):
    """Standard normal noise, the first that each image's generator draws. seeds: ints;
    shape: of one image.
    Returns: float32 (len(seeds), *shape), CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators(seeds)])


# A grid says where the N steps through one window lie. Each row: (u, start, end, schedule) -> times, with u =
# 0, 1/N, ..., 1, falling from start at u = 0 to end at u = 1, float64 (N + 1,).


def uniform_grid(u, start, end, schedule):
    """Evenly in t: in one window k/N, diffusers' "trailing" spacing."""
    return start + (end - start) * u


GRIDS = {"uniform": uniform_grid, "sigmoid": solvers.sigmoid_grid, "edm": solvers.edm_grid}


def time_grid(steps, windows=1, spacing=uniform_grid, schedule=None):
    """steps + 1 times from 1 to 0, steps shared evenly by the windows (any remainder goes to the
    noisiest ones), so that no step crosses a boundary; inside each window as spacing says, a row of
    GRIDS. schedule: what edm_grid needs.
    Returns: float64 (steps + 1,), falling.  Raises ValueError if there are fewer steps than
    windows, or if times coincide."""
    if steps < windows:
        raise ValueError(f"{steps} steps cannot cross {windows} windows: one step per window at least")
    edges, times = reflow.boundaries(windows), [1.0]
    for i, (start, end) in enumerate(zip(edges, edges[1:])):
        inside = steps // windows + (i < steps % windows)
        u = torch.arange(inside + 1, dtype=torch.float64) / inside
        times += [*spacing(u, start, end, schedule)[1:-1].tolist(), end]
    times = torch.tensor(times, dtype=torch.float64)
    if not (times.diff() < 0).all():
        raise ValueError(f"{steps} steps: some lie closer together than numbers can tell; use fewer, or the "
                         "uniform grid")
    return times


# ---- solvers -----------------------------------------------------------------------------------------------
# All of one signature (ddim says what it means), so that two can be laid side by side, and swapped.


def ddim(model, z, times, cond, guidance=1.0, uncond=None, callback=None, generators=None):
    """DDIM: keep (x_hat, eps_hat), change t. First order; exact in one step where the trajectory is
    straight.
    model: the contract of teacher.py; z: (B, ...) at times[0]; times: (S+1,) or one column per
    sample, (S+1, B), in sampling order, none but the last 0; callback: called with a dict(i, t,
    t_next, z, x_hat, eps_hat) before each move;
    generators: one per image, read only by solvers that draw noise (lcm).
    Returns: z at times[-1]. One network evaluation per step, and nothing else that waits for the
    device."""
    times = times.to(teacher.clock_device(z.device)).reshape(len(times), -1).expand(-1, len(z))  # (S+1, B)
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x_hat, eps_hat = model(z, t, cond, guidance, uncond)
        if callback:
            callback(dict(i=i, t=t, t_next=t_next, z=z, x_hat=x_hat, eps_hat=eps_hat))
        a, b = (c.to(z.dtype).to(z.device) for c in model.coefficients(t_next, z.ndim))
        z = a * x_hat + b * eps_hat
    return z


def invert(model, z_0, times, cond, guidance=1.0, uncond=None, callback=None):
    """DDIM from data to noise: the z at times[0] whose trajectory ends at z_0.
    First order, so the way back misses z_0 by an error that falls with the steps.
    times: as for ddim, falling from noise to data (they are walked backwards).
    No network is evaluated at t = 0: z_0 is taken for the latent at timestep 0, the lowest noise it
    knows, and so is any earlier time.
    model: of one window. The rest: as for ddim.  Raises ValueError unless the times fall."""
    if not (times.diff(dim=0) < 0).all():
        raise ValueError(f"times from {times[0].max():g} to {times[-1].min():g}: must fall, as in time_grid; "
                         "inversion turns them round")
    return ddim(model, z_0, times.flip(0).clamp_min(model.schedule.floor), cond, guidance, uncond, callback)


SOLVERS = {
    "ddim": ddim,
    "heun": functools.partial(solvers.dpm2, r=1.0),
    "dpm2": solvers.dpm2,
    "dpmsolver++": solvers.from_diffusers("dpmsolver++", DPMSolverMultistepScheduler,
                                          timestep_spacing="trailing"),
    "unipc": solvers.from_diffusers("unipc", UniPCMultistepScheduler, timestep_spacing="trailing"),
    # its own spacing: S of the 50 timesteps 19, 39, ..., 999
    "lcm": solvers.from_diffusers("lcm", LCMScheduler, draws=True),
}


def parse_solver(spec):
    """SOLVER[:r][/GRID[:kappa]], e.g. ddim, or dpm2:0.4/sigmoid:20.  Returns: (a row of SOLVERS, a
    row of GRIDS), with these numbers.
    Raises UserError."""
    named, _, grid = spec.partition("/")
    (name, _, r), (grid, _, kappa) = named.partition(":"), (grid or "uniform").partition(":")
    try:
        r, kappa = (float(value) if value else None for value in (r, kappa))
    except ValueError as error:
        raise UserError(f"solver {spec}: {error}; write it as dpm2:0.4/sigmoid:20") from error
    return configure(name, r, grid, kappa)


def configure(solver, r, grid, kappa):
    """A row of SOLVERS with its r and a row of GRIDS with its kappa; None leaves the default.
    Returns: both functions.
    Raises UserError on a number out of range, or that goes with another row."""
    solve, spacing = cli.choose("--solver", solver, SOLVERS), cli.choose("--time-grid", grid, GRIDS)
    for option, value, owner, chosen in (("--r", r, "--solver dpm2", solver == "dpm2"),
                                         ("--kappa", kappa, "--time-grid sigmoid", grid == "sigmoid")):
        if value is not None and not chosen:
            raise UserError(f"{option} {value:g}: only goes with {owner}")
    if r is not None:
        if not 0 < r <= 1:
            raise UserError(f"--r {r:g}: must be above 0 and at most 1")
        solve = functools.partial(solvers.dpm2, r=r)
    if kappa is not None:
        if not kappa > 0:
            raise UserError(f"--kappa {kappa:g}: must be above 0")
        spacing = functools.partial(solvers.sigmoid_grid, kappa=kappa)
    return solve, spacing


TWO_EVALUATIONS = ("heun", "dpm2")


def evaluations(solver, steps, windows=1):
    """Network evaluations per image without guidance. solver: a key of SOLVERS;
    windows: the model's."""
    return 2 * steps - windows if solver in TWO_EVALUATIONS else steps


def steps_for(solver, nfe, windows=1):
    """The steps that cost nfe evaluations.  Raises ValueError if no number of steps does."""
    steps = (nfe + windows) // 2 if solver in TWO_EVALUATIONS else nfe
    if steps < windows or evaluations(solver, steps, windows) != nfe:
        possible = [str(evaluations(solver, windows + i, windows)) for i in range(3)]
        raise ValueError(f"{nfe} network evaluations: {solver} takes {', '.join(possible)}, ... through "
                         f"{windows} window{'s' * (windows > 1)}; give one of these, or use another "
                         "solver")
    return steps


@torch.no_grad()
def generate(pipeline, model, prompts, seeds, times, guidance=1.0, batch=64, callback=None, progress=None,
             size=None, solver="ddim"):
    """Latents for prompts[i] from noise seeds[i]. times: from time_grid; size: as for latent_shape;
    solver: a row of SOLVERS, or a function like them.  Returns: float32 (N, C, h, w), CPU.
    progress: a tqdm to advance by images.
    Raises UserError on a latent that is not finite, after the batch that it is in."""
    solve = cli.choose("--solver", solver, SOLVERS) if isinstance(solver, str) else solver
    shape = models.latent_shape(pipeline, size)
    pixels = [side * pipeline.vae_scale_factor for side in shape[1:]]
    needs_null = model.needs_null(guidance)
    if needs_null:
        models.check_null(pipeline, guidance)
    device, results = models.network(pipeline).device, []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        null = [None] * needs_null                         # the null embedding, where it is needed, is row 0
        unique = [*null, *dict.fromkeys(prompts[part])]    # a prompt "" is text
        table = models.encode_text(pipeline, unique, size=pixels, device=device)
        rows = torch.tensor([unique.index(prompt) for prompt in prompts[part]]).to(device)
        cond = {key: value[rows] for key, value in table.items()}
        uncond = {key: value[:1].expand(len(rows), *[-1] * (value.ndim - 1)) for key, value in table.items()}
        own = generators(seeds[part])  # further noise comes from the same stream, as in diffusers' pipelines
        z = torch.stack([torch.randn(shape, generator=generator) for generator in own]).to(device)
        z = solve(model, z, times, cond, guidance, uncond, callback, own)
        results.append(z.cpu())
        names = [f"seed {seed}, prompt {prompt!r}" for seed, prompt in zip(seeds[part], prompts[part])]
        teacher.check_finite(results[-1], names, "its latents are not finite: the network has diverged, or "
                             "overflows in its dtype; use an earlier checkpoint, --dtype bf16 or fp32, or "
                             "less guidance")
        if progress is not None:
            progress.update(len(z))
    return torch.cat(results)


# ---- python sampler.py -------------------------------------------------------------------------------------


@dataclass
class Config:
    prompt: list[str] = field(default_factory=list,  # one or more, each in quotes
                              metadata=dict(action="extend"))
    model: str = ""             # folder, hub id, preset or .safetensors; default: the newest student under
                                # runs/, else assets/student-2
    model_config: str = ""      # diffusers folder with the configs and tokenizer of a single-file
                                # .safetensors; default, of SD and SDXL alone: from the hub
    random_init: bool = False   # random weights instead of trained ones: any preset without a download
    dtype: str = "fp32"         # of the networks: fp32, bf16 or fp16
    size: int | None = None     # pixels, square; default: what the model was made for
    steps: int | None = None    # of the solver; default: what the model was made for
    nfe: int | None = None      # instead of --steps: network evaluations per image without guidance
    solver: str = "ddim"        # ddim, heun, dpm2, dpmsolver++, unipc or lcm; heun and dpm2 evaluate the
                                # network twice in most steps
    r: float | None = None      # dpm2's middle point, in (0, 1]; default: 0.5
    time_grid: str = "uniform"  # where the steps lie inside each window: uniform, sigmoid or edm
    kappa: float | None = None  # the sigmoid grid's steepness, above 0; default: 10
    guidance: float = 1.0       # 1 = none; otherwise each evaluation costs two
    guide: str = ""             # a weaker model, e.g. an earlier student: --guidance leads away from it, not
                                # from no text (autoguidance)
    seed: int = 0               # of the first image; image i has seed + i
    n: int = 1                  # images per prompt
    out: str = "sample.png"     # PNG; several images are numbered unless --grid
    grid: bool = False          # all images in one picture, a row per prompt
    compare: bool = False       # the teacher beside it, from the same noise: at 32 steps and at as few
    save_steps: bool = False    # also OUT-steps.png: the picture that the model predicts, step by step
    scale: int | None = None    # draw each pixel scale x scale, at most 64; default: enough for 256 pixels
    device: str = ""            # cpu, cuda, mps or xpu; default: cuda if there is one


def main(c):
    no_prompt = UserError('no prompt: give at least one, e.g. --prompt "red heart on blue"')
    if not all(prompt.strip() for prompt in c.prompt):
        raise no_prompt
    cli.at_least(c, steps=1, nfe=1, n=1, scale=1, guidance=0)
    solver, spacing = configure(c.solver, c.r, c.time_grid, c.kappa)
    teacher.check_guide(c.guide, c.guidance)
    if c.steps is not None and c.nfe is not None:
        raise UserError(f"--steps {c.steps} and --nfe {c.nfe}: give one of them")
    if c.scale is not None and c.scale > 64:
        raise UserError(f"--scale {c.scale}: must be at most 64")
    out, count = Path(c.out), c.n * max(1, len(c.prompt))
    alone = c.compare or c.grid or count == 1
    files = [out] if alone else [out.with_stem(f"{out.stem}-{i}") for i in range(count)]
    strips_file = out.with_stem(out.stem + "-steps")
    for file in (*files, *[strips_file] * c.save_steps):
        cli.check_png(file)
    dtype = cli.choose("--dtype", c.dtype, teacher.DTYPES)
    device = processes.pick_device(c.device)
    name = c.model or saved.students()[0]
    pipeline, model, info = saved.open_model(name, device, dtype, c.random_init, c.model_config, c.guide,
                                             c.size)
    models.latent_shape(pipeline, c.size)                         # refused here, before the bar
    if not c.prompt:
        if models.prompts(pipeline):
            raise no_prompt
        c.prompt = [""]                                    # an unconditional model reads none
    windows = info.get("windows", 1)
    try:
        if c.nfe is not None:
            steps = steps_for(c.solver, c.nfe, windows)
        else:
            steps = c.steps if c.steps is not None else info.get("windows", 32)
    except ValueError as error:
        raise UserError(f"--nfe {error}") from error
    if steps < windows:
        raise UserError(f"--steps {steps}: {name} is straight over {windows} windows and needs a step for "
                        f"each; use --steps {windows} or more, or a student of {steps} "
                        f"window{'s' * (steps > 1)}")
    try:
        times = time_grid(steps, windows, spacing, model.schedule)
    except ValueError as error:
        raise UserError(f"--time-grid {c.time_grid}: {error}") from error
    if c.compare:                                          # not when the other pictures are made
        try:
            other, other_model, _ = saved.open_model(info.get("teacher") or name, device, dtype,
                                                     c.random_init, c.model_config, c.guide, c.size, info)
        except UserError as error:
            raise UserError(f"--compare: {error}") from error
    prompts = [prompt for prompt in c.prompt for _ in range(c.n)]
    seeds = [c.seed + i for i in range(len(prompts))]
    predicted = []                                         # per batch and step: (step, x_hat)
    start = time.perf_counter()
    with warnings.catch_warnings(), tqdm(total=len(prompts), desc=f"{steps} steps", unit="image",
                                         leave=False) as bar:
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}")
        for doubt in saved.doubts(name, info, c.prompt, steps, 1 if c.guide else c.guidance):
            warnings.warn(doubt, stacklevel=1)
        z = generate(pipeline, model, prompts, seeds, times, c.guidance, progress=bar, size=c.size,
                     solver=solver, callback=(lambda state: predicted.append(
                         (state["i"], state["x_hat"].float().cpu()))) if c.save_steps else None)
        images = models.decode(pipeline, z)
    seconds = time.perf_counter() - start
    scale = c.scale if c.scale is not None else max(1, 256 // images.shape[-1])
    pictures = imaging.to_pil(images, scale)

    if c.compare:
        counts = [32, steps] if "teacher" in info or steps != 32 else [32, 4, 2, 1]
        guidance, columns, sets = saved.teacher_guidance(other, info, c.guidance), [], []
        for count in counts:
            z = generate(other, other_model, prompts, seeds, time_grid(count), guidance, size=c.size)
            columns.append(f"teacher\n{count} step{'s' * (count > 1)}")
            sets.append(imaging.to_pil(models.decode(other, z), scale))
        if "teacher" in info or (c.solver, c.time_grid) != ("ddim", "uniform"):
            who = "student" if "teacher" in info else c.solver
            columns.append(f"{who}\n{steps} step{'s' * (steps > 1)}")
            sets.append(pictures)
        rows = [[images[i] for images in sets] for i in range(len(prompts))]
        pictures = [imaging.contact_sheet(rows, columns, prompts)]
    elif c.grid:
        rows = [pictures[i * c.n:(i + 1) * c.n] for i in range(len(c.prompt))]
        pictures = [imaging.contact_sheet(rows, labels=c.prompt)]
    if c.save_steps:
        strips = [models.decode(pipeline, torch.cat([x for i, x in predicted if i == step]))
                  for step in range(steps)]
        rows = [[imaging.to_pil(strip[i:i + 1], scale)[0] for strip in strips] for i in range(len(prompts))]
        names = [f"step {i + 1}" for i in range(steps)]
        files, pictures = [*files, strips_file], [*pictures, imaging.contact_sheet(rows, names, prompts)]
    for file, picture in zip(files, pictures):
        picture.save(file)
    shown = ", ".join(map(str, files[:4])) + ", ..." * (len(files) > 4)
    count = evaluations(c.solver, steps, windows) * (1 if c.guidance in (0, 1) else 2)
    guide = f" guided by {c.guide}" * bool(c.guide)
    print(f"{shown}: {len(prompts)} image{'s' * (len(prompts) > 1)} by {name}{guide}, {steps} steps = "
          f"{count} network evaluations each, {seconds / len(prompts):.3f} s per image")


def run():
    cli.run(main, Config, __doc__)


if __name__ == "__main__":
    run()
