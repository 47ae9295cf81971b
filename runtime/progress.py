"""What a run prints, logs and draws while it trains."""
import contextlib
import json
import math
import shlex
import shutil
import sys
import time

import torch
import torch.distributed as dist

import models
import sampler
from data import imaging
from models.conditions import shown_captions, trajectory_counts
from pairs import cache_bytes, cache_folder
from runtime import store
from runtime.checkpoints import swap_ema_, trained
from runtime.cli import UserError

REMEDY = "the last checkpoint is good; to train again, give another --out and lower --lr"


def size(nbytes):
    unit = next(unit for unit in (3, 2, 1) if nbytes >= 1024 ** unit or unit == 1)
    return f"{nbytes / 1024 ** unit:.3g} {' KMG'[unit]}iB"


def print_inputs(c, recipe, device, world, pipeline, dataset, conditions):
    """What a run starts from, before anything takes time. conditions: of what it caches, or None."""
    name = torch.cuda.get_device_name(
        device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    weights = sum(p.numel() for p in models.network(pipeline).parameters())
    images = "no images" if dataset.images is None else f"{dataset.size or 'endless'} images"
    count = (f"{sum(trajectory_counts(c, recipe))} trajectories of {recipe.solver_steps} steps"
             if recipe.pairs == "trajectory" else recipe.pairs)
    cache = cache_bytes(c, recipe, pipeline, dataset, conditions)
    text = f" ({size(conditions.nbytes)} for {len(conditions.captions)} captions)" if conditions else ""
    print(f"teacher: {c.model}, {weights / 1e6:.1f} million weights; {world} process{'es' * (world > 1)} on "
          f"{name}, {c.precision}\ndata: {c.data or c.prompts}, {images}, {len(dataset.captions) - 1} "
          f"captions; pairs from {count}; cache: {size(cache)}{text} in "
          f"{cache_folder(c)}")
    check_disk(cache_folder(c), cache)


def check_disk(folder, nbytes):
    """Raises UserError unless there is room for a cache of nbytes in the folder, less what it holds."""
    held = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    more, free = nbytes - held, shutil.disk_usage(there).free
    if more > free:
        raise UserError(f"--cache {folder}: will take {size(more)} more, and its disk has {size(free)}: "
                        f"{size(more - free)} too little; free some, give a --cache on another disk, or "
                        "fewer --trajectories")


def print_plan(c, recipe, per_stage, world, micro, resumed, pipeline, solver, whole):
    """What a run will do and need. pipeline: with the student in it and what else stays in memory;
    solver: the frozen network beside it, or None; whole: parameters of a whole pipeline, as it is
    exported."""
    def nbytes(parameters):
        return sum(p.nbytes for p in parameters)
    student = models.network(pipeline)
    trainable = nbytes(trained(student).values())
    frozen = nbytes(solver.parameters()) if solver and not c.lora else 0
    # gradients, two moments and the running average are as large as what is trained
    memory = (nbytes(student.parameters()) + 4 * trainable + frozen) / (world if c.shard else 1)
    memory += sum(nbytes(network.parameters())
                  for network in (*models.autoencoder(pipeline), *models.text_encoders(pipeline)))
    exported = len(recipe.stages) * whole * next(student.parameters()).element_size()
    stages = ", ".join(f"{updates} with {windows} window{'s' * (windows > 1)}"
                       for updates, windows in zip(per_stage, recipe.stages))
    print(f"updates: {c.updates} of {c.batch} samples, {micro} at once on each process: {stages}"
          + f"; going on from {resumed}" * bool(resumed))
    print(f"memory: {size(memory)} on each process for weights, gradients, optimizer and average; "
          "activations come on top")
    print(f"disk: {size(4 * trainable)} for each of {c.keep} checkpoints, {size(exported)} for "
          f"{len(recipe.stages)} students; {size(shutil.disk_usage(c.out).free)} are free in {c.out}")


def print_finished(folder, rank):
    if rank == 0:
        print(f"{folder}: this run is finished; choose another --out to train again")


def print_stopped(step, rank):
    if rank == 0:
        print(f"\nstopped at step {step}; the same command goes on from there", file=sys.stderr)


def print_end(folder, windows, grid):
    """Where the last student is and how to sample it."""
    print(f"{folder}: the last student, a diffusers pipeline; sample it: python sampler.py --model "
          f"{shlex.quote(str(folder))}{grid.option} --steps {windows}")


def row(parts, times):
    """What is kept of a micro-batch for the log: loss, magnitude, direction, t_start, t.
    parts: from reflow.student_loss; times: (t, t_start, t_end).  Returns: float64 (B, 5)."""
    t, t_start, _ = times
    return torch.stack([parts["loss"].double(), parts["magnitude"].double(), parts["direction"].double(),
                        t_start, t], 1)


def summary(rows, norm, world, windows, step, optimizer, clock):
    """A line of the log: means over the samples of all processes since the last one, at time clock.
    rows: (N, 5), from `row`."""
    count = world * len(rows)
    if world > 1:
        everyone = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(everyone, rows)
        rows = torch.cat(everyone)
    window = (rows[:, 3] * windows - 1e-5).ceil().long()
    loss, magnitude, direction = rows[:, :3].mean(0).tolist()
    return dict(step=step, windows=windows, lr=optimizer.param_groups[0]["lr"], loss=loss,
                magnitude=magnitude, direction=direction, grad_norm=norm.item(),
                loss_per_window={k: rows[window == k, 0].mean().item() for k in sorted(set(window.tolist()))},
                samples_per_second=count / (time.time() - clock))


def read_log(file):
    """(text, entry) of every whole line of a log: a power cut truncates the last one, or leaves
    zeros in its place."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append((line + "\n", json.loads(line)))
    return found


def trim_log(file, step):
    """Drop what was logged after this step, and what a power cut has left half written."""
    if file.exists():
        kept = [line for line, entry in read_log(file) if entry["step"] <= step]
        store.write_atomically(file, lambda part: part.write_text("".join(kept)))


def write_log(file, board, line):
    def short(value):
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return float(f"{value:.7g}") if isinstance(value, float) else value
    with open(file, "a") as log:
        log.write(json.dumps(short(line)) + "\n")
    flat = {**line,
            **{f"loss/window {k} of {line['windows']}": value
               for k, value in line["loss_per_window"].items()}}
    for key, value in flat.items():
        if key not in ("step", "loss_per_window"):
            board.add_scalar(key, value, line["step"])


def bad_sample(rows, norm, step, share, world, windows):
    """Where the first loss that is not finite was, on whichever process, in words; if all were
    finite, it was the gradient. rows: (updates * share, 5), from `row`, the last of them of update
    `step`."""
    bad, found = (~torch.isfinite(rows[:, 0])).nonzero(), (math.inf, "")
    if len(bad):
        loss, _, _, t_start, t = rows[bad[0, 0]].tolist()
        when = step + 1 - len(rows) // share + bad[0, 0].item() // share
        window = f"({t_start - 1 / windows:.3f}, {t_start:.3f}]"
        found = when, f"loss {loss} at step {when}, window {window}, t = {t:.4f}"
    everyone = [found]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, found)
    return min(everyone)[1] or f"gradient norm {norm.item()} at step {step}"


class Grid:
    """Pictures of the student while it trains, always of the same prompts and from the same
    noise."""

    def __init__(self, pipeline, pairs, dataset, folder):
        self.pipeline, self.shape, self.folder = pipeline, pairs.shape, folder
        self.prompts = [dataset.captions[i] for i in shown_captions(dataset)]
        self.cond = pairs.text(shown_captions(dataset), pairs.device)
        self.option = f" --prompt {shlex.quote(self.prompts[0])}" * bool(self.prompts[0])  # of sampler.py

    @torch.no_grad()
    def draw(self, model, windows, step, rank, ema=None):
        """One step per window, by the running average if it is given. All processes call; the first
        one writes FOLDER/STEP.png."""
        network = models.network(self.pipeline)
        if ema:
            swap_ema_(network, ema)
        z = sampler.noise(range(len(self.prompts)), self.shape).to(network.device)
        network.eval()                                     # no dropout
        images = models.decode(self.pipeline, sampler.ddim(model, z, sampler.time_grid(windows), self.cond))
        network.train()
        if ema:
            swap_ema_(network, ema)
        if rank == 0:
            self.folder.mkdir(exist_ok=True)
            pictures = imaging.to_pil(images, max(1, 128 // images.shape[-1]))
            labels = [prompt if len(prompt) <= 40 else prompt[:37] + "..." for prompt in self.prompts]
            sheet = imaging.contact_sheet([[picture] for picture in pictures],
                                          [f"{windows} step{'s' * (windows > 1)}"], labels)
            sheet.save(self.folder / f"{step:06d}.png")
