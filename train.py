"""The training loop of reflow: python train.py --model tiny, or torchrun --nproc_per_node=8 train.py --model sd15 --data photos/

Stage by stage (8 windows, 4, 2, 1), the student learns to answer with the chord of its window. Each finished stage leaves
a complete diffusers pipeline, OUT/student-K. Stopped or killed at any moment, the same command goes on from the last
checkpoint, on the same number of processes or another.
"""
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import config
import data
import export
import losses
import reflow
import sampler
import teacher
from config import UserError
from pairs import (
    PRECISIONS,
    SOURCES,
    Pairs,
    cache_bytes,
    cache_folder,
    cache_windows,
    drop_text_encoders,
    encoders,
    trajectory_count,
)
from student import FrozenNetwork, copy_full_, gather_full, make_student, newest_checkpoint, restore, save_checkpoint, swap_ema_, trained


@dataclass
class Config:
    model: str = "tiny"              # teacher: a preset (tiny, pixel, sd15, sd21, sdxl), a diffusers folder, a hub id or .safetensors
    model_config: str = ""           # for a .safetensors file: a diffusers folder with its configuration; default: from the hub
    random_init: bool = False        # random weights in the teacher's architecture: measures everything but quality, downloads nothing
    recipe: str = "default"          # a row of reflow.RECIPES; the options down to --dropout override its columns
    windows: list[int] | None = None  # windows of each stage, e.g. 8 4 2 1
    pairs: str | None = None         # trajectory, data, student or consistency
    path: str | None = None          # vp or linear
    space: str | None = None         # eps, u, x, velocity or end; of a teacher that predicts x: x or end
    loss: str | None = None          # mse, pseudo-huber or high-pass
    high_pass_weight: float | None = None  # lambda of the high-pass loss, above -1; 0 is mse
    high_pass_radius: float | None = None  # where its high frequencies begin, as a share of the highest
    normalisation: str | None = None  # of each sample's loss: none, learnt or per-sample
    time_law: str | None = None      # uniform, starts, exponential, cosh or log-normal
    time_base: float | None = None   # of the exponential law; above 0 and not 1
    time_inside: bool | None = None  # the law inside each window, all windows equally often, instead of on the whole axis
    direction_weight: float | None = None  # alpha of alpha (1 - cos)
    direction_space: str | None = None  # of that cosine: eps, u, x, velocity or end
    solver_steps: int | None = None  # teacher's DDIM steps from noise to data
    reuse: int | None = None         # times t that each pair is asked at, in the same update
    forward_rate: float | None = None  # rho: share of trajectories that run from real images to noise
    projection: float | None = None  # entropy of the optimal transport that brings pairs back on their marginals; 0 = none
    dropout: float | None = None     # of the student while it trains
    name: str = ""                   # what tables call this method; default: the recipe's name
    data: str = ""                   # images with captions: folder, shards, datasets name, sprites (tiny's) or sprites-by-group (pixel's)
    image_column: str = ""           # of a datasets source; default: its first column of images
    caption_column: str = ""         # of a datasets source or metadata file; default: text, caption, captions, prompt or txt
    skip_bad: bool = False           # leave out images that cannot be used, and say how many, instead of refusing the data
    prompts: str = ""                # text file, one prompt per line, instead of --data: no images needed
    size: int | None = None          # pixels, square; default: what the model was made for
    out: str = "runs/train"          # students, checkpoints and log go here
    cache: str = ""                  # teacher trajectories and latents, shared by runs; default OUT/cache
    trajectories: int = 6144         # how many to cache, at most one per pair; each costs solver_steps evaluations
    cache_latents: bool = False      # for pairs from images: encode every image and caption once, before training
    steps: int = 3000                # updates over all stages
    batch: int = 64                  # samples per update, over all processes and micro-batches
    micro_batch: int | None = None   # samples per forward on one process; gradients accumulate; default: all of its share
    lr: float = 2e-4                 # peak, per stage; warm-up and cosine decay to a tenth
    ema: float = 0.999               # decay of the running average, which is what is kept
    lora: int = 0                    # rank of LoRA adapters on one shared network; 0 = train every weight
    precision: str = "fp32"          # bf16: autocast; what is trained stays fp32, what LoRA leaves frozen is kept in bf16
    gradient_checkpointing: bool = False  # a forward more per update, for much less memory
    shard: bool = False              # FSDP2: weights, gradients and optimiser state spread over the processes
    compile: bool = False            # torch.compile the network: minutes at first, then faster on GPUs
    guidance_teacher: float = 1.0    # guidance the pairs are made with; 1 = none, as in ProReflow; w puts w into the student
    text_dropout: float = 0.1        # share of captions replaced by the null embedding, so that guidance works at sampling
    null_text: str = "auto"          # null embedding: empty (the encoded ""), zeros, or auto (what the model's own pipeline does)
    seed: int = 0                    # of data, noise, times and random weights
    resume: bool = True              # go on from what OUT holds; --no-resume refuses an OUT that holds a run
    keep: int = 2                    # checkpoints kept
    checkpoint_steps: int = 200      # updates between checkpoints
    log_steps: int = 20              # updates between lines of OUT/log.jsonl and points of OUT/tensorboard
    grid_steps: int = 500            # updates between pictures in OUT/grids, the first of them before any update; 0 = none
    device: str = ""                 # cpu or cuda; default: cuda if there is one


RECIPE_COLUMNS = tuple(field.name for field in dataclasses.fields(reflow.Recipe) if field.name not in ("stages", "shares"))
# what may differ between two starts of one run
MAY_CHANGE_ON_RESUME = ("resume", "keep", "checkpoint_steps", "log_steps", "grid_steps", "device", "micro_batch", "gradient_checkpointing",
                        "shard", "compile")
NULL_TEXTS = ("auto", "empty", "zeros")


def resolve_recipe(c):
    """The recipe of a Config, overrides applied and checked.  Raises UserError."""
    recipe = config.choose("--recipe", c.recipe, reflow.RECIPES)
    if c.windows is not None:
        recipe = dataclasses.replace(recipe, stages=tuple(c.windows), shares=recipe.shares[-len(c.windows):] if
                                     len(c.windows) <= len(recipe.shares) else (1,) * len(c.windows))
    overrides = {name: getattr(c, name) for name in RECIPE_COLUMNS}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in overrides.items() if value is not None})
    tables = {"pairs": SOURCES, "path": reflow.PATHS, "space": reflow.SPACES, "direction_space": reflow.SPACES, "loss": losses.LOSSES,
              "time_law": reflow.TIME_LAWS, "normalisation": losses.NORMALISATIONS}
    for name, table in tables.items():
        config.choose(f"--{name.replace('_', '-')}", getattr(recipe, name), table)
    config.choose("--precision", c.precision, PRECISIONS)
    config.choose("--null-text", c.null_text, NULL_TEXTS)
    try:
        reflow.check_curriculum(recipe.stages)
        reflow.stage_steps(recipe, c.steps)
    except ValueError as error:
        raise UserError(f"--windows / --steps: {error}") from error
    if recipe.solver_steps < 1 or recipe.solver_steps % cache_windows(recipe):
        raise UserError(f"--solver-steps {recipe.solver_steps}: must be a multiple of {cache_windows(recipe)}, the number of "
                        "windows, so that the teacher stops at every boundary")
    config.at_least(c, trajectories=1, batch=1, micro_batch=1, checkpoint_steps=1, log_steps=1, grid_steps=0, keep=1, lora=0,
                    size=1, guidance_teacher=0, text_dropout=0)
    config.at_least(recipe, direction_weight=0, reuse=1, projection=0)
    for name, value, good, range_ in (
            ("lr", c.lr, c.lr > 0, "above 0"), ("ema", c.ema, 0 <= c.ema < 1, "in [0, 1)"),
            ("text_dropout", c.text_dropout, c.text_dropout <= 1, "in [0, 1]"),
            ("high_pass_weight", recipe.high_pass_weight, recipe.high_pass_weight > -1,
             "above -1, or the loss is blind to some frequencies"),
            ("high_pass_radius", recipe.high_pass_radius, 0 <= recipe.high_pass_radius <= 1, "in [0, 1]"),
            ("time_base", recipe.time_base, 0 < recipe.time_base != 1, "above 0 and not 1; --time-law uniform is what it tends to at 1"),
            ("forward_rate", recipe.forward_rate, 0 <= recipe.forward_rate <= 1, "in [0, 1]"),
            ("dropout", recipe.dropout, 0 <= recipe.dropout < 1, "in [0, 1)")):
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {range_}")
    check_pieces(c, recipe)
    return recipe


def check_pieces(c, recipe):
    """Raises UserError where two pieces of a recipe do not go together, or one is given that the others never read."""
    for name, value in (("forward_rate", recipe.forward_rate), ("projection", recipe.projection)):
        option = f"--{name.replace('_', '-')} {value}"
        if value and recipe.pairs != "trajectory":
            raise UserError(f"{option}: changes whole trajectories; use --pairs trajectory, or set it to 0 with --pairs {recipe.pairs}")
        if value and c.prompts:
            raise UserError(f"{option}: needs images, and --prompts {c.prompts} holds none; give --data, or set it to 0")
    if recipe.projection and recipe.stages != (1,):
        raise UserError(f"--projection {recipe.projection}: moves the two ends of whole trajectories; use --windows 1, or set it to 0")
    if recipe.pairs == "consistency":                      # every sample is a window of its own, from its t down to the data
        for option, value, right in (("windows", recipe.stages, (1,)), ("path", recipe.path, "vp"),
                                     ("reuse", recipe.reuse, 1)):
            if value != right:
                shown, remedy = (str(each).strip("(,)").replace(",", "") for each in (value, right))
                raise UserError(f"--{option} {shown}: does not go with pairs from consistency, each of which runs from its "
                                f"own t straight to the data; use --{option} {remedy}, or other --pairs")
    for option, read, owner in (("time_base", recipe.time_law == "exponential", "--time-law exponential"),
                                ("high_pass_weight", recipe.loss == "high-pass", "--loss high-pass"),
                                ("high_pass_radius", recipe.loss == "high-pass", "--loss high-pass"),
                                ("direction_space", recipe.direction_weight > 0, "--direction-weight above 0"),
                                ("cache_latents", recipe.pairs != "trajectory", "pairs from images")):
        if getattr(c, option) != getattr(Config, option) and not read:
            raise UserError(f"--{option.replace('_', '-')}: only goes with {owner}; leave it out")


def fit_prediction(c, recipe, prediction):
    """The recipe for a teacher of this prediction type: one that predicts x is compared in x, where the recipe
    compares what contains eps. In u, one sample of 64 held 22% of the gradient (median; up to 89%), with times kept
    above the schedule's floor 20% (66%), in x 3%.  Raises UserError where another space was given on the command line."""
    if prediction != "sample":
        return recipe
    for option in ("space", "direction_space"):
        given = getattr(c, option)
        if given not in (None, "x", "end"):
            raise UserError(f"--{option.replace('_', '-')} {given}: this teacher predicts x, whose errors have no bound there as "
                            "t goes to 0; leave it out (x), or give end")
    return dataclasses.replace(recipe, **{option: "x" for option in ("space", "direction_space")
                                          if getattr(recipe, option) != "end"})


# ---- processes -----------------------------------------------------------------------------------------------------


def start_processes(c):
    """torchrun sets RANK and WORLD_SIZE, plain python does not.  Returns: (rank, world size, device, barrier).  Raises UserError.
    barrier() returns once all processes have called it, however long one of them has worked alone (decoding images, a shard
    more of the cache, a download, a slow disk): it has a group and a timeout of its own. The collectives of an update keep
    the backend's timeout (10 minutes on NCCL), which finds a dead machine; each is entered right after a barrier or an update."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = teacher.pick_device(c.device)
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if (world > 1 or c.shard) and not dist.is_initialized():
        try:
            alone = dict(store=dist.HashStore(), rank=0, world_size=1) if world == 1 else {}
            dist.init_process_group("nccl" if name == "cuda" else "gloo", **alone)
        except (dist.DistError, RuntimeError) as error:
            port = os.environ.get("MASTER_PORT", "?")
            raise UserError(f"the processes cannot meet at port {port} ({str(error).splitlines()[0][:120]}); if another run has it, "
                            f"give torchrun --master_port a free one") from error
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7)) if world > 1 else None
    barrier = functools.partial(dist.barrier, patient) if world > 1 else lambda: None
    return rank, world, device, barrier


class StopFlags:
    """All-reduce two flags (stop requested, state not finite). On CUDA the result lags one update, so the host never blocks;
    where a checkpoint follows, asked for by `wait` or because of a stop, this update's flags are read as well: a state is
    kept only if it is known to be finite."""

    def __init__(self, device, world):
        self.device, self.world, self.pending = device, world, collections.deque()

    def __call__(self, stop, not_finite, wait=False):
        """stop: bool; not_finite: bool tensor on the device.  Returns: (stop, not finite) of any process, bools."""
        flags = torch.stack([torch.full((), float(stop), device=self.device), not_finite.float()])
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        host = torch.empty(2, pin_memory=event is not None).copy_(flags, non_blocking=True)
        if event:
            event.record()
        self.pending.append((host, event))
        raised = [False, False]
        while len(self.pending) > (event is not None and not wait and not raised[0]):
            host, event_before = self.pending.popleft()
            if event_before:
                event_before.synchronize()
            raised = [before or bool(now) for before, now in zip(raised, host)]
        return raised


def prefetch(fetch, jobs):
    """fetch(job) of every job in turn, the next one made by a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for job in jobs:
            following = pool.submit(fetch, job)
            if waiting:
                yield waiting.result()
            waiting = following
        yield waiting.result()


# ---- the loop ------------------------------------------------------------------------------------------------------


def open_pairs(c, recipe, device, processes):
    """The data, the teacher on its device, and their pairs, cached as the Config asks.  Returns: (c with the model's default
    data filled in, dataset, pipeline, pairs).  Raises UserError."""
    default_data = "" if c.prompts else teacher.PRESETS.get(c.model, ("", ""))[1]
    c = dataclasses.replace(c, data=c.data or default_data)
    rank, _, barrier = processes
    dtype = PRECISIONS[c.precision] if c.lora else torch.float32        # LoRA never changes the network it sits on
    pipeline = teacher.load_pipeline(c.model, dtype, c.random_init, c.seed, c.model_config).to(device)
    if rank:                                               # the first process checks every image, the others read what it found
        barrier()
    dataset = data.open_dataset(c.data, c.prompts, c.seed, c.skip_bad, c.image_column, c.caption_column,
                                checked=cache_folder(c) / "data.json")
    if rank == 0:
        barrier()
    if dataset.skipped and rank == 0:
        print(f"--skip-bad: {len(dataset.skipped)} left out ({', '.join(dataset.skipped[:3])}{', ...' * (len(dataset.skipped) > 3)})")
    captions_only = recipe.pairs == "trajectory" and not recipe.forward_rate and not recipe.projection
    if rank == 0 and c.data and dataset.size and captions_only:
        print(f"--data {c.data}: only its captions are used, pairs are the teacher's own trajectories; --pairs data or "
              "--forward-rate R uses its pictures")
    if rank == 0:
        print_inputs(c, recipe, device, processes[1], pipeline, dataset)
    pairs = Pairs(c, recipe, pipeline, dataset, processes)
    if c.shard:                  # FSDP wants one dtype for all it shards together; only now: what is cached must not
        pipeline.unet.float()    # depend on --shard, which may differ between two starts
    return c, dataset, pipeline, pairs


def make_cache(c):
    """What main(c) would cache, without training: python data.py cache."""
    recipe = resolve_recipe(c)
    rank, world, device, barrier = start_processes(c)
    c = dataclasses.replace(c, cache_latents=recipe.pairs != "trajectory")
    *_, pairs = open_pairs(c, recipe, device, (rank, world, barrier))
    if rank == 0:
        print(f"{cache_folder(c)}: {len(pairs.rows)} {'latents' if c.cache_latents else 'trajectories'}")


def main(c):
    """Train as the Config says.  Returns: the folder of the last student."""
    recipe = resolve_recipe(c)
    per_stage = reflow.stage_steps(recipe, c.steps)
    rank, world, device, barrier = start_processes(c)
    share = c.batch // world                               # samples of this process in every update
    micro = min(c.micro_batch or share, share)
    for option, value, divisor, what in (("--batch", c.batch, world, "processes"),
                                         ("--batch / processes", share, max(micro, 1), "--micro-batch"),
                                         ("samples per forward", micro, recipe.reuse, "--reuse")):
        if value == 0 or value % divisor:
            raise UserError(f"{option} {value}: not divisible by {divisor} ({what})")

    # what an earlier start of the same command left
    out = Path(c.out)
    settings = {key: value for key, value in dataclasses.asdict(c).items() if key not in MAY_CHANGE_ON_RESUME}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "config.json").exists():
            before = json.loads((out / "config.json").read_text())
            changed = ", ".join(f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value)
            if changed or not c.resume:
                raise UserError(f"--out {out}: holds a run{f' with other settings ({changed})' * bool(changed)}; choose another --out or "
                                "delete it")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    last = out / f"student-{recipe.stages[-1]}"
    if (last / "reflow.json").exists():
        print(f"{last}: this run is finished; choose another --out to train again") if rank == 0 else None
        return last

    # teacher and pairs; what has been cached need not stay in memory
    c, dataset, pipeline, pairs = open_pairs(c, recipe, device, (rank, world, barrier))
    recipe = fit_prediction(c, recipe, pairs.prediction)
    shown = [dataset.captions[i] for i in dict.fromkeys(dataset.caption_indices(range(64))) if i][:4] or [""]
    shown_cond = {key: value.to(device) for key, value in pairs.text(shown).items()}
    whole = sum(p.numel() for network in (pipeline.unet, *encoders(pipeline)) for p in network.parameters())
    if not pairs.online:
        drop_text_encoders(pipeline)
        if not c.grid_steps and not teacher.in_pixels(pipeline):
            pipeline.vae = None
    barrier()
    if rank == 0:                                          # only now: a mistake above must not claim the folder
        data.write_atomically(out / "config.json", lambda part: part.write_text(json.dumps(settings, indent=1)))
        board = SummaryWriter(out / "tensorboard")

    # networks: the student is the teacher's own module; a second one only if pairs are solved while it trains
    unet = pipeline.unet
    solver = FrozenNetwork(c, unet, device) if recipe.pairs != "trajectory" else None
    student = make_student(c, unet, device, recipe.dropout)
    network = DistributedDataParallel(student, gradient_as_bucket_view=True) if world > 1 and not c.shard else student
    solving = teacher.as_model(pipeline, solver)
    solver_windows, path = recipe.solver_steps, reflow.PATHS[recipe.path]

    # the newest checkpoint says where to go on; the log forgets what came after it
    checkpoint, saved = newest_checkpoint(out, rank)
    resumed = int(saved.get("step", 0))
    if rank == 0 and (out / "log.jsonl").exists():
        finished = sum(updates for updates, windows in zip(per_stage, recipe.stages) if (out / f"student-{windows}/reflow.json").exists())
        kept = [line for line, entry in read_log(out / "log.jsonl") if entry["step"] <= max(resumed, finished)]
        data.write_atomically(out / "log.jsonl", lambda part: part.write_text("".join(kept)))
    if rank == 0:
        print_plan(c, recipe, per_stage, world, micro, resumed, pipeline, solver, whole)
    stop = []
    handlers = {sig: signal.signal(sig, lambda number, frame: stop.append(number)) for sig in (signal.SIGINT, signal.SIGTERM)}
    flags = StopFlags(device, world)
    bar = tqdm(total=c.steps, desc="reflow", unit="update", disable=rank > 0, mininterval=1)
    first = 0
    for stage, (windows, updates) in enumerate(zip(recipe.stages, per_stage)):
        folder, info = out / f"student-{windows}", describe(c, recipe, windows)
        if (folder / "reflow.json").exists():
            if stage + 1 == len(recipe.stages) or not (out / f"student-{recipe.stages[stage + 1]}/reflow.json").exists():
                weights = export.trained_weights(folder, c.lora)
                for name, p in trained(student).items():
                    copy_full_(p, weights[name])
                if recipe.pairs == "student":
                    solver.become(weights, c)
                    solving, solver_windows = teacher.as_model(pipeline, solver, path, windows), windows
            first += updates
            bar.update(updates)
            continue

        # a stage starts from the student as it is, with a new optimiser and a new average
        # eps 1e-7 keeps Adam from making steps of rounding errors where a weight has no gradient (biases before a group norm):
        # with 1e-8 one process and two drift apart six times as fast
        optimizer = torch.optim.AdamW(trained(student).values(), lr=c.lr, weight_decay=0.0, eps=1e-7, fused=True)
        normaliser = usual = torch.nn.Identity()
        if recipe.normalisation == "learnt":               # begins anew, as the losses do; at a rate of its own, which stays
            torch.manual_seed(c.seed)
            normaliser = usual = losses.LossNormalizer(pairs.shape[0]).to(device)
            optimizer.add_param_group(dict(params=list(normaliser.parameters()), lr=1e-3))
            usual = DistributedDataParallel(normaliser) if world > 1 else normaliser
        ema = EMAModel(trained(student).values(), decay=c.ema, foreach=True)
        done = 0
        if first < resumed <= first + updates:
            done = int(saved["done"])
            restore(checkpoint, done, student, normaliser, optimizer, ema)
            bar.update(done)
        model = teacher.as_model(pipeline, network, path, windows)
        plain = teacher.as_model(pipeline, student, path, windows)
        jobs = (range(step * c.batch + rank * share + i, step * c.batch + rank * share + i + micro)
                for step in range(first + done, first + updates) for i in range(0, share, micro))
        batches = prefetch(lambda numbers: pairs.fetch(numbers, windows), jobs)
        seen, clock = [], time.time()

        for step in range(first + done, first + updates):
            # pictures of the running average; before any update, these are plain DDIM by the teacher
            if c.grid_steps and (step % c.grid_steps == 0 or step == first):
                swap_ema_(student, ema)
                file = out / "grids" / f"{step:06d}.png" if rank == 0 else None
                draw_grid(pipeline, plain, shown, shown_cond, pairs.shape, windows, file)
                swap_ema_(student, ema)

            # learning rate: warm-up, then cosine to a tenth, within the stage
            progress = (step - first) / updates
            warm_up = min(1.0, (step - first + 1) / max(1, min(50, updates // 10)))
            optimizer.param_groups[0]["lr"] = c.lr * warm_up * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
            torch.manual_seed((c.seed * 1_000_003 + step) * world + rank)      # dropout: also a function of the step

            for i in range(0, share, micro):
                # micro-batch: the two ends of each sample's window
                t, t_start, t_end, z_start, z_end, cond = pairs.ends(next(batches), solving, solver_windows // windows, model)

                values, parts = reflow.student_loss(model, (z_start, z_end), (t, t_start, t_end), cond, recipe, usual, pairs.autocast())

                # gradients: processes share theirs once, at the last micro-batch
                final = i + micro == share
                if c.shard:
                    student.set_requires_gradient_sync(final)
                with network.no_sync() if network is not student and not final else contextlib.nullcontext():
                    (values.sum() / share).backward()
                seen.append(torch.stack([*(parts[name].double() for name in ("loss", "magnitude", "direction")), t_start, t], 1))

            # update
            norm = torch.nn.utils.clip_grad_norm_(trained(student).values(), 1.0)
            norm = norm.full_tensor() if c.shard else norm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(trained(student).values())
            bar.update()

            # a loss that is not finite, or a signal to stop, on any process
            logs, saves = (step + 1) % c.log_steps == 0, (step + 1) % c.checkpoint_steps == 0
            latest = torch.stack([norm, *(rows[:, 0].sum() for rows in seen[-(share // micro):])])
            stopped, not_finite = flags(bool(stop), ~torch.isfinite(latest).all(), wait=logs or saves or step + 1 == first + updates)
            if not_finite:
                bar.close()
                where = bad_sample(torch.cat(seen), step, share, world, windows) or f"gradient norm {norm.item()} at step {step}"
                raise UserError(f"{where}, stage {stage} ({windows} windows); the last checkpoint is good; to train again, lower "
                                f"--lr {c.lr} and give another --out")

            # log: one JSON line and one point of every curve per log_steps
            if logs:
                line = summary(torch.cat(seen), norm, world, windows)
                line = dict(step=step + 1, windows=windows, lr=optimizer.param_groups[0]["lr"], **line,
                            samples_per_second=world * sum(map(len, seen)) / (time.time() - clock))
                if rank == 0:
                    write_log(out / "log.jsonl", board, line)
                bar.set_postfix(windows=windows, loss=f"{line['loss']:.4f}")
                seen, clock = [], time.time()

            # checkpoint, regularly and when stopped by a signal
            if saves or stopped:
                save_checkpoint(out, rank, step + 1, info, step + 1 - first, student, normaliser, optimizer, ema, c.keep)
                barrier()                                  # a slow disk is no dead process
            if stopped:
                bar.close()
                print(f"\nstopped at step {step + 1}; the same command goes on from there", file=sys.stderr) if rank == 0 else None
                sys.exit(128 + (stop or [signal.SIGTERM])[0])

        # the stage is done: its running average is the student
        swap_ema_(student, ema)
        del optimizer, ema
        weights = gather_full(trained(student), rank)
        if rank == 0:
            export.export(folder, weights, info)
        del weights
        barrier()
        if recipe.pairs == "student" and folder != last:
            solver.become(trained(student), c)
            solving, solver_windows = teacher.as_model(pipeline, solver, path, windows), windows
        first += updates
    bar.close()
    board.close() if rank == 0 else None
    if c.grid_steps:
        draw_grid(pipeline, plain, shown, shown_cond, pairs.shape, windows, out / "grids" / f"{c.steps:06d}.png" if rank == 0 else None)
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    if rank == 0:
        prompt = f" --prompt {shlex.quote(shown[0])}" * bool(shown[0])
        print(f"{last}: the last student, a diffusers pipeline; sample it: python sampler.py --model {shlex.quote(str(last))}{prompt} "
              f"--steps {recipe.stages[-1]}")
    return last


# ---- logging -------------------------------------------------------------------------------------------------------


def size(nbytes):
    unit = next(unit for unit in (3, 2, 1) if nbytes >= 1024 ** unit or unit == 1)
    return f"{nbytes / 1024 ** unit:.3g} {' KMG'[unit]}iB"


def print_inputs(c, recipe, device, world, pipeline, dataset):
    """What a run starts from, before anything takes time."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    weights = sum(p.numel() for p in pipeline.unet.parameters())
    images = "no images" if dataset.images is None else f"{dataset.size or 'endless'} images"
    count = f"{trajectory_count(c, recipe)} trajectories of {recipe.solver_steps} steps" if recipe.pairs == "trajectory" else recipe.pairs
    print(f"teacher: {c.model}, {weights / 1e6:.1f} million weights; {world} process{'es' * (world > 1)} on {name}, {c.precision}\n"
          f"data: {c.data or c.prompts}, {images}, {len(dataset.captions) - 1} captions; pairs from {count}; "
          f"cache: {size(cache_bytes(c, recipe, pipeline, dataset))} in {cache_folder(c)}")


def print_plan(c, recipe, per_stage, world, micro, resumed, pipeline, solver, whole):
    """What a run will do and need. pipeline: with the student in it and what else stays in memory; solver: the frozen network
    beside it, or None; whole: parameters of a whole pipeline, as it is exported."""
    def nbytes(parameters):
        return sum(p.nbytes for p in parameters)
    student, trainable = pipeline.unet, nbytes(trained(pipeline.unet).values())
    frozen = nbytes(solver.parameters()) if solver and not c.lora else 0
    # gradients, two moments and the running average are as large as what is trained
    memory = (nbytes(student.parameters()) + 4 * trainable + frozen) / (world if c.shard else 1)
    memory += sum(nbytes(network.parameters()) for network in encoders(pipeline))
    exported = len(recipe.stages) * whole * next(student.parameters()).element_size()
    stages = ", ".join(f"{updates} with {windows} window{'s' * (windows > 1)}" for updates, windows in zip(per_stage, recipe.stages))
    print(f"updates: {c.steps} of {c.batch} samples, {micro} at once on each process: {stages}"
          + f"; going on from {resumed}" * bool(resumed))
    print(f"memory: {size(memory)} on each process for weights, gradients, optimizer and average; activations come on top")
    print(f"disk: {size(4 * trainable)} for each of {c.keep} checkpoints, {size(exported)} for {len(recipe.stages)} students; "
          f"{size(shutil.disk_usage(c.out).free)} are free in {c.out}")


def summary(rows, norm, world, windows):
    """Means over the samples of all processes since the last line. rows: (N, 5) of loss, magnitude, direction, t_start, t."""
    if world > 1:
        everyone = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(everyone, rows)
        rows = torch.cat(everyone)
    window = (rows[:, 3] * windows - 1e-5).ceil().long()
    loss, magnitude, direction = rows[:, :3].mean(0).tolist()
    return dict(loss=loss, magnitude=magnitude, direction=direction, grad_norm=norm.item(),
                loss_per_window={k: rows[window == k, 0].mean().item() for k in sorted(set(window.tolist()))})


def read_log(file):
    """(text, entry) of every whole line of a log: a power cut truncates the last one, or leaves zeros in its place."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append((line + "\n", json.loads(line)))
    return found


def write_log(file, board, line):
    def short(value):
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return float(f"{value:.7g}") if isinstance(value, float) else value
    with open(file, "a") as log:
        log.write(json.dumps(short(line)) + "\n")
    flat = {**line, **{f"loss/window {k} of {line['windows']}": value for k, value in line["loss_per_window"].items()}}
    for key, value in flat.items():
        if key not in ("step", "loss_per_window"):
            board.add_scalar(key, value, line["step"])


def bad_sample(rows, step, share, world, windows):
    """Where the first loss that is not finite was, on whichever process, in words; "" if all were. rows: (updates * share, 5)
    of loss, magnitude, direction, t_start, t, the last of them of update `step`."""
    bad, found = (~torch.isfinite(rows[:, 0])).nonzero(), (math.inf, "")
    if len(bad):
        loss, _, _, t_start, t = rows[bad[0, 0]].tolist()
        when = step + 1 - len(rows) // share + bad[0, 0].item() // share
        found = when, f"loss {loss} at step {when}, window ({t_start - 1 / windows:.3f}, {t_start:.3f}], t = {t:.4f}"
    everyone = [found]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, found)
    return min(everyone)[1]


@torch.no_grad()
def draw_grid(pipeline, model, prompts, cond, shape, windows, file):
    """A picture per prompt, one step per window, always from the same noise. file: None on all processes but the first."""
    z = sampler.noise(range(len(prompts)), shape).to(pipeline.unet.device)
    pipeline.unet.eval()                                   # the student: no dropout
    images = teacher.decode(pipeline, sampler.ddim(model, z, sampler.time_grid(windows), cond))
    pipeline.unet.train()
    if file:
        file.parent.mkdir(exist_ok=True)
        pictures = sampler.to_pil(images, max(1, 128 // images.shape[-1]))
        labels = [prompt if len(prompt) <= 40 else prompt[:37] + "..." for prompt in prompts]
        sampler.grid([[picture] for picture in pictures], [f"{windows} step{'s' * (windows > 1)}"], labels).save(file)


def command(c):
    """The command line that gives this Config: every option that is not its default."""
    options = {key: value for key, value in dataclasses.asdict(c).items() if value != getattr(Config(), key)}

    def option(key, value):
        name = key.replace("_", "-")
        if isinstance(value, bool):
            return f"--{'no-' * (not value)}{name}"
        return f"--{name} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
    return " ".join(["python train.py", *(option(*item) for item in options.items())])


def describe(c, recipe, windows):
    """reflow.json of a student: what it is and how it was made."""
    return dict(method=c.name or c.recipe, recipe=c.recipe, stage=recipe.stages.index(windows), windows=windows, path=recipe.path,
                teacher=c.model, command=command(c), columns=dataclasses.asdict(recipe),
                config=dataclasses.asdict(c), **export.versions())


if __name__ == "__main__":
    config.run(main, Config, __doc__)
