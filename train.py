"""The training loop of reflow: python train.py --model tiny, or torchrun --nproc_per_node=8 train.py --model sd15 --data photos/

Stage by stage (8 windows, 4, 2, 1), the student learns to answer with the chord of its window. Each finished stage leaves
a complete diffusers pipeline, OUT/student-K. Stopped at any moment, the same command goes on from the last checkpoint.
"""
import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import data
import losses
import reflow
import sampler
import teacher
from config import UserError


@dataclass
class Config:
    model: str = "tiny"              # teacher: a preset (tiny, sd15), a diffusers folder or a hub id
    recipe: str = "default"          # a row of reflow.RECIPES; the eight below override its columns
    windows: list[int] | None = None  # windows of each stage, e.g. 8 4 2 1
    pairs: str | None = None         # trajectory, data or student
    path: str | None = None          # vp or linear
    space: str | None = None         # eps, u, velocity or end
    loss: str | None = None          # mse or pseudo-huber
    time_law: str | None = None      # uniform or starts
    direction_weight: float | None = None  # alpha of alpha (1 - cos)
    solver_steps: int | None = None  # teacher's DDIM steps from noise to data
    name: str = ""                   # what tables call this method; default: the recipe's name
    data: str = ""                   # folder of images with .txt captions, or 'sprites' (default for tiny)
    prompts: str = ""                # text file, one prompt per line, instead of --data: no images needed
    out: str = "runs/train"          # students, checkpoint and log go here
    cache: str = ""                  # teacher trajectories, shared by runs; default OUT/cache
    trajectories: int = 6144         # how many to cache; each costs solver_steps evaluations
    steps: int = 3000                # updates over all stages
    batch: int = 64                  # samples per update over all processes
    lr: float = 2e-4                 # peak, per stage; warm-up and cosine decay to a tenth
    ema: float = 0.999               # decay of the running average, which is what is kept
    guidance_teacher: float = 1.0    # guidance the pairs are made with; 1 = none, as in ProReflow
    text_dropout: float = 0.1        # share of captions replaced by "", so that guidance works at sampling
    seed: int = 0                    # of data, noise and times
    checkpoint_steps: int = 200      # updates between checkpoints
    log_steps: int = 20              # updates between lines of OUT/log.jsonl
    device: str = "cpu"              # cpu or cuda


def resolve_recipe(c):
    """The recipe of a Config, overrides applied and checked.  Raises UserError."""
    recipe = config.choose("--recipe", c.recipe, reflow.RECIPES)
    if c.windows is not None:
        recipe = dataclasses.replace(recipe, stages=tuple(c.windows), shares=recipe.shares[-len(c.windows):] if
                                     len(c.windows) <= len(recipe.shares) else (1,) * len(c.windows))
    overrides = {name: getattr(c, name) for name in ("pairs", "path", "space", "loss", "time_law", "direction_weight", "solver_steps")}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in overrides.items() if value is not None})
    tables = {"pairs": PAIRS, "path": reflow.PATHS, "space": reflow.SPACES, "loss": losses.LOSSES, "time_law": reflow.TIME_LAWS}
    for name, table in tables.items():
        config.choose(f"--{name.replace('_', '-')}", getattr(recipe, name), table)
    try:
        reflow.check_curriculum(recipe.stages)
        reflow.stage_steps(recipe, c.steps)
    except ValueError as error:
        raise UserError(f"--windows / --steps: {error}") from error
    if recipe.solver_steps % cache_windows(recipe):
        raise UserError(f"--solver-steps {recipe.solver_steps}: must be a multiple of {cache_windows(recipe)}, the number of "
                        "windows, so that the teacher stops at every boundary")
    ranges = {"trajectories": 1, "batch": 1, "seed": 0, "checkpoint_steps": 1, "log_steps": 1, "guidance_teacher": 0, "text_dropout": 0}
    for name, least in ranges.items():
        if getattr(c, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least {least}")
    if c.lr <= 0 or not 0 <= c.ema < 1 or c.text_dropout > 1 or recipe.direction_weight < 0:
        raise UserError(f"out of range: lr {c.lr} (> 0), ema {c.ema} (in [0, 1)), text-dropout {c.text_dropout} (in [0, 1]), "
                        f"direction-weight {recipe.direction_weight} (>= 0)")
    return recipe


def cache_windows(recipe):
    """Boundaries are cached for 8 windows, or the first stage's if it has more: they serve every later stage."""
    return math.lcm(8, *recipe.stages) if recipe.pairs == "trajectory" else max(recipe.stages)


# ---- where pairs come from -----------------------------------------------------------------------------------------


class Pairs:
    """(z_start, z_end) of each sample's window, and which caption they belong to; one method per source."""

    def __init__(self, c, recipe, pipeline, dataset, table, world):
        self.c, self.recipe, self.pipeline, self.dataset, self.table = c, recipe, pipeline, dataset, table
        self.device, self.shape = torch.device(c.device), sampler.latent_shape(pipeline)
        self.teacher = teacher.as_model(pipeline)
        self.cache = None
        if recipe.pairs == "trajectory":
            self.cache = self.load_trajectories(*world)

    def load_trajectories(self, rank, world, barrier):
        """The cache: latents at every boundary of the teacher's own trajectories from noise, and their captions."""
        c, steps, windows = self.c, self.recipe.solver_steps, cache_windows(self.recipe)
        times, keep = sampler.time_grid(steps), steps // windows

        @torch.no_grad()
        def solve(numbers):
            captions = self.captions(numbers, "trajectory")
            visited = []
            z = torch.stack([torch.randn(self.shape, generator=data.generator(c.seed, "noise", k)) for k in numbers]).to(self.device)
            end = sampler.ddim(self.teacher, z, times, self.cond(captions), c.guidance_teacher, self.cond([0] * len(numbers)),
                               lambda state: visited.append(state["z"]) if state["i"] % keep == 0 else None)
            return {"z": torch.stack([*visited, end], 1).cpu(), "caption": torch.tensor(captions)}
        settings = dict(teacher=fingerprint(self.pipeline), solver_steps=steps, windows=windows, guidance=c.guidance_teacher,
                        text_dropout=c.text_dropout, seed=c.seed, captions=len(self.dataset.captions), data=c.data or c.prompts)
        return data.trajectories(c.cache or Path(c.out) / "cache", c.trajectories, settings, solve, 256, rank, world, barrier)

    def captions(self, numbers, purpose):
        """The caption of each sample as an index into the text table; dropped (index 0, "") at the rate text_dropout."""
        drop = [torch.rand(1, generator=data.generator(self.c.seed, purpose, "drop", k)).item() < self.c.text_dropout for k in numbers]
        return [0 if dropped else index for dropped, index in zip(drop, self.dataset.caption_indices(numbers))]

    def cond(self, captions):
        return {key: value[torch.as_tensor(captions)].to(self.device) for key, value in self.table.items()}

    def trajectory(self, numbers, t_start, t_end, windows, previous):
        """Two boundaries of a cached teacher trajectory, drawn at random for each sample."""
        rows = torch.tensor([torch.randint(len(self.cache["z"]), (1,), generator=data.generator(self.c.seed, "row", k)).item()
                             for k in numbers])
        segments = self.cache["z"].shape[1] - 1
        at = [((1 - t) * segments).round().long().cpu() for t in (t_start, t_end)]
        return *(self.cache["z"][rows, i].to(self.device) for i in at), self.cache["caption"][rows]

    def data(self, numbers, t_start, t_end, windows, previous):
        """A real latent noised to t_start, solved to t_end by the teacher with its share of solver_steps (PeRFlow)."""
        return self._from_images(numbers, t_start, t_end, self.teacher, self.recipe.solver_steps // windows)

    def student(self, numbers, t_start, t_end, windows, previous):
        """As data, but solved by the previous stage's student, one step per old window (ProReflow); by the teacher in the
        first stage."""
        model, steps = previous or (self.teacher, self.recipe.solver_steps)
        return self._from_images(numbers, t_start, t_end, model, steps // windows)

    @torch.no_grad()
    def _from_images(self, numbers, t_start, t_end, model, steps):
        captions = self.captions(numbers, "data")
        images = self.dataset.images(numbers, self.shape[-1] * self.pipeline.vae_scale_factor)
        eps = torch.stack([torch.randn(self.shape, generator=data.generator(self.c.seed, "eps", k)) for k in numbers])
        alpha, sigma = (v.float()[:, None, None, None] for v in self.teacher.schedule(t_start))
        z_start = alpha * teacher.encode(self.pipeline, images) + sigma * eps.to(self.device)
        times = torch.lerp(t_start, t_end, torch.linspace(0, 1, steps + 1, dtype=t_start.dtype, device=self.device)[:, None])
        z_end = sampler.ddim(model, z_start, times, self.cond(captions), self.c.guidance_teacher, self.cond([0] * len(numbers)))
        return z_start, z_end, torch.tensor(captions)


PAIRS = {"trajectory": Pairs.trajectory, "data": Pairs.data, "student": Pairs.student}


def fingerprint(pipeline):
    """A few digits that change with the teacher's weights: a cache made with another teacher is refused."""
    return format(sum(p.double().abs().sum().item() for p in pipeline.unet.parameters()), ".10g")


# ---- the loop ------------------------------------------------------------------------------------------------------


def main(c):
    """Train as the Config says.  Returns: the folder of the last student."""
    recipe = resolve_recipe(c)
    per_stage = reflow.stage_steps(recipe, c.steps)

    # processes and devices: torchrun sets RANK, plain python does not
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if c.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    if c.batch % world:
        raise UserError(f"--batch {c.batch}: not divisible by {world} processes")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if c.device == "cuda" else "gloo")
        if c.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    barrier = dist.barrier if world > 1 else lambda: None

    # what an earlier start of the same command left
    out = Path(c.out)
    checkpoint = out / "checkpoint.pt"
    settings = {key: value for key, value in dataclasses.asdict(c).items() if key not in ("checkpoint_steps", "log_steps", "device")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "config.json").exists():
            before = json.loads((out / "config.json").read_text())
            changed = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
            if changed:
                raise UserError(f"--out {out}: holds a run with other settings ({', '.join(changed)}); choose another --out or delete it")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    last = out / f"student-{recipe.stages[-1]}"
    if (last / "reflow.json").exists():
        print(f"{last}: this run is finished; choose another --out to train again") if rank == 0 else None
        return last

    # teacher, data, text; the text encoder's output is kept, so it runs once per caption
    pipeline = teacher.load_pipeline(c.model).to(c.device)
    default_data = "" if c.prompts else teacher.PRESETS.get(c.model, ("", ""))[1]
    c = dataclasses.replace(c, data=c.data or default_data)
    dataset = data.open_dataset(c.data, c.prompts, c.seed)
    if recipe.pairs != "trajectory" and dataset.images is None:
        raise UserError(f"--prompts {c.prompts}: holds no images, but pairs from {recipe.pairs} start from images; give --data FOLDER "
                        "instead, or --pairs trajectory")
    table = teacher.encode_text(pipeline, dataset.captions)
    barrier()
    if rank == 0:                                            # only now: a mistake above must not claim the folder
        data.write_atomically(out / "config.json", lambda part: part.write_text(json.dumps(settings, indent=1)))
    pairs = Pairs(c, recipe, pipeline, dataset, table, (rank, world, barrier))

    # resume: a finished stage has left its student, the stage in progress a checkpoint
    try:
        state = torch.load(checkpoint, weights_only=True, map_location=c.device) if checkpoint.exists() else {}
    except Exception as error:                               # a torn file fails in many ways, an IndexError among them
        raise UserError(f"{checkpoint}: cannot be read ({type(error).__name__}: {error}); delete it to start this stage again") from error
    stop = []
    handlers = {sig: signal.signal(sig, lambda number, frame: stop.append(number)) for sig in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=c.steps, desc="reflow", unit="update", disable=rank > 0, mininterval=1)
    start_from, previous, first = pipeline.unet, None, 0
    for stage, (windows, updates) in enumerate(zip(recipe.stages, per_stage)):
        folder = out / f"student-{windows}"
        if (folder / "reflow.json").exists():
            start_from = UNet2DConditionModel.from_pretrained(folder / "unet").to(c.device).requires_grad_(False).eval()
            previous = (teacher.as_model(pipeline, start_from, reflow.PATHS[recipe.path], windows), windows)
            first += updates
            bar.update(updates)
            continue

        # the stage's student starts from the previous stage's running average
        student = copy.deepcopy(start_from).requires_grad_(True).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=c.lr, weight_decay=0.0)
        ema = EMAModel(student.parameters(), decay=c.ema, foreach=True)
        done = 0
        if state.get("stage") == stage:
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
            done = state["done"]
            bar.update(done)
        network = DistributedDataParallel(student, device_ids=None) if world > 1 else student
        model = teacher.as_model(pipeline, network, reflow.PATHS[recipe.path], windows)
        seen, clock = [], time.time()

        for step in range(first + done, first + updates):
            # learning rate: warm-up, then cosine to a tenth, within the stage
            progress = (step - first) / updates
            warm_up = min(1.0, (step - first + 1) / max(1, min(50, updates // 10)))
            for group in optimizer.param_groups:
                group["lr"] = c.lr * warm_up * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

            # batch: sample numbers of the whole run; each sample's random choices come from its own generator
            numbers = range(step * c.batch + rank, (step + 1) * c.batch, world)
            u = torch.cat([torch.rand(1, generator=data.generator(c.seed, "time", k), dtype=torch.float64) for k in numbers])
            t = reflow.TIME_LAWS[recipe.time_law](u.to(c.device), windows)
            t_start, t_end = reflow.window_of(t, windows)
            z_start, z_end, captions = PAIRS[recipe.pairs](pairs, numbers, t_start, t_end, windows, previous)

            # the chord of the window, and the student's answer on it
            ends = [[v.float()[:, None, None, None] for v in model.schedule(time)] for time in (t_start, t_end)]
            x, eps = reflow.chord(z_start, z_end, *ends)                       # (B, C, h, w) each
            a, b = (v.float() for v in model.coefficients(t, 4))
            x_hat, eps_hat = model(a * x + b * eps, t, pairs.cond(captions))

            # loss, in the recipe's space
            p, q = (v.float()[:, None, None, None] if torch.is_tensor(v) else v
                    for v in reflow.SPACES[recipe.space](model.schedule, t_start, t_end))
            answer, target = p * x_hat + q * eps_hat, p * x + q * eps
            per_sample = losses.aligned(answer, target, losses.LOSSES[recipe.loss], recipe.direction_weight)
            if not torch.isfinite(per_sample).all():
                worst = (~torch.isfinite(per_sample)).nonzero()[0].item()
                raise UserError(f"loss {per_sample[worst].item()} at step {step}, stage {stage} ({windows} windows), window "
                                f"({t_end[worst]:.3f}, {t_start[worst]:.3f}], t = {t[worst]:.4f}; the last checkpoint is good: "
                                f"lower --lr {c.lr} and start again")

            # update
            optimizer.zero_grad(set_to_none=True)
            per_sample.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            ema.step(student.parameters())

            # log: one JSON line per log_steps
            magnitude, direction = losses.decompose(answer.detach(), target)
            seen.append(torch.stack([per_sample.detach().double(), magnitude.double(), direction.double(), t_start], 1))
            bar.update()
            if (step + 1) % c.log_steps == 0:
                rows = torch.cat(seen)
                if world > 1:
                    everyone = [torch.empty_like(rows) for _ in range(world)]
                    dist.all_gather(everyone, rows)
                    rows = torch.cat(everyone)
                window = (rows[:, 3] * windows).round().long()
                line = dict(step=step + 1, windows=windows, lr=optimizer.param_groups[0]["lr"], loss=rows[:, 0].mean().item(),
                            magnitude=rows[:, 1].mean().item(), direction=rows[:, 2].mean().item(), grad_norm=norm.item(),
                            loss_per_window={k: rows[window == k, 0].mean().item() for k in sorted(set(window.tolist()))},
                            samples_per_second=len(rows) / (time.time() - clock))
                if rank == 0:
                    with open(out / "log.jsonl", "a") as log:
                        log.write(json.dumps({key: _short(value) for key, value in line.items()}) + "\n")
                bar.set_postfix(windows=windows, loss=f"{line['loss']:.4f}")
                seen, clock = [], time.time()

            # checkpoint, regularly and when told to stop
            if world > 1:
                asked = torch.tensor(len(stop), device=c.device)
                dist.all_reduce(asked)
                stop += [signal.SIGTERM] * (asked.item() > 0 and not stop)
            if ((step + 1) % c.checkpoint_steps == 0 or stop) and rank == 0:
                contents = dict(stage=stage, done=step + 1 - first, student=student.state_dict(),
                                optimizer=optimizer.state_dict(), ema=ema.state_dict())
                data.write_atomically(checkpoint, lambda part: torch.save(contents, part))
            if stop:
                bar.close()
                print(f"\nstopped at step {step + 1}; the same command goes on from {checkpoint}", file=sys.stderr) if rank == 0 else None
                sys.exit(128 + stop[0])

        # the stage is done: its running average is the student
        ema.copy_to(student.parameters())
        student.requires_grad_(False).eval()
        if rank == 0:
            export(pipeline, student, folder, c, recipe, windows)
        barrier()
        start_from, first = student, first + updates
        previous = (teacher.as_model(pipeline, student, reflow.PATHS[recipe.path], windows), windows)
    bar.close()
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    return last


def _short(value):
    """Five significant digits are enough in a log."""
    return {k: _short(v) for k, v in value.items()} if isinstance(value, dict) else float(f"{value:.5g}") if isinstance(value, float) else value


CARD = """# A reflow student of {windows} window(s)

Distilled from `{teacher}` by `{command}`; the teacher's licence covers these weights. Sample it with
`DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps={windows})`, or a multiple of {windows}; reflow.json tells the rest.
"""


def export(pipeline, student, folder, c, recipe, windows):
    """Write a complete diffusers pipeline with a stock DDIM scheduler, and reflow.json beside it."""
    stock = dict(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, steps_offset=1)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **stock)
    parts = {**pipeline.components, "unet": student, "scheduler": scheduler}
    whole = type(pipeline)(**parts, requires_safety_checker=False) if "safety_checker" in parts else type(pipeline)(**parts)
    options = {key: value for key, value in dataclasses.asdict(c).items() if value != getattr(Config(), key)}
    command = "python train.py " + " ".join(f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                                            for key, value in options.items())
    info = dict(method=c.name or c.recipe, recipe=c.recipe, windows=windows, path=recipe.path, teacher=c.model,
                columns=dataclasses.asdict(recipe), config=dataclasses.asdict(c), command=command,
                versions=dict(torch=torch.__version__, diffusers=diffusers.__version__), commit=commit())

    def write(part):
        whole.save_pretrained(part, safe_serialization=True)
        source = Path(teacher.PRESETS.get(c.model, (c.model, ""))[0])
        if (source / "vocabulary.json").is_file():
            shutil.copy(source / "vocabulary.json", part)
        (part / "README.md").write_text(CARD.format(windows=windows, teacher=c.model, command=command))
        (part / "reflow.json").write_text(json.dumps(info, indent=1))
    data.write_atomically(folder, write)


def commit():
    """The commit of this code, '+' if it has been changed since; 'unknown' outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(dirty)


if __name__ == "__main__":
    config.run(main, Config, __doc__)
