"""What a run will take: network evaluations, memory, disk. Said before anything takes time, and
refused, with the shortfall, where it cannot fit."""
import dataclasses
import json
import shutil
from pathlib import Path

import psutil
import torch

import losses
import models
import reflow
from models import configs
from models.conditions import trajectory_counts
from pairs import FROM_IMAGES, cache_bytes, cache_folder
from runtime import store
from runtime.checkpoints import trained
from runtime.cli import UserError
from teacher import PRECISIONS

# optimizer -> bytes that it keeps for each byte of what is trained, in fp32: two moments; muon's one
OPTIMIZERS = {"adamw": 2, "adamw8bit": 0.5, "muon": 1}


def size(nbytes):
    unit = next(unit for unit in (3, 2, 1) if nbytes >= 1024 ** unit or unit == 1)
    return f"{nbytes / 1024 ** unit:.3g} {' KMG'[unit]}iB"


def nbytes(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def check(c, recipe, device, world, pipeline, dataset, conditions):
    """What a run starts from and what it will take, printed. conditions: of what it caches, or None.
    Raises UserError where it cannot fit."""
    network, count = models.network(pipeline), sum(trajectory_counts(c, recipe))
    weights = sum(p.numel() for p in network.parameters())
    captions = f"{len(dataset.captions) - 1} captions"
    images = (f"no images, {captions}" if dataset.images is None else
              f"{dataset.size} images, {captions}" if dataset.size else "endless images with captions")
    pairs = (f"{count} trajectories of {recipe.solver_steps} steps" if recipe.pairs == "trajectory" else
             recipe.pairs)
    cache = cache_bytes(c, recipe, pipeline, dataset, conditions)
    text = f" ({size(conditions.nbytes)} for {len(conditions.captions)} captions)" if conditions else ""
    print(f"teacher: {c.model}, {weights / 1e6:.1f} million weights; {world} process{'es' * (world > 1)} on "
          f"{device_name(device)}, {c.precision}\ndata: {c.data or c.prompts}, {images}; "
          f"pairs from {pairs}; cache: {size(cache)}{text} in "
          f"{cache_folder(c)}")
    guidance = models.embed_guidance(pipeline, c.guidance_teacher, c.guidance_range)
    once, frozen = evaluations(c, recipe, guidance)
    made = f"{once:,} for the cache, then " * bool(once)
    what = "for distribution matching (a backward as two)" if recipe.matching else "of the frozen network"
    print(f"network evaluations: {made}{c.updates * c.batch:,} forwards and backwards of the student" +
          f" and {frozen:,} forwards {what}" * bool(frozen))
    check_disk(cache_folder(c), cache)
    if not c.cache_only:                                   # adapters are small beside what is there already
        trained = 0 if c.lora else 4 * weights             # fp32
        check_disk(Path(c.out), sum(left(c, recipe, trained, models.parameters(pipeline))[1:]), "--out",
                   "--keep 1", ("checkpoint-*.safetensors", "student-*/**/*.safetensors"))
        check_memory(c, recipe, device, world, pipeline, trained)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def evaluations(c, recipe, guidance, stages=None):
    """Forwards of one sample: (of the frozen network, all at once for the cache; while training, beside the
    student's own on its pairs).
    guidance: classifier-free, which evaluates twice unless it is 0 or 1; stages: how many of the first,
    default all."""
    each = 1 if guidance in (0, 1) else 2
    cached = sum(trajectory_counts(c, recipe)) * recipe.solver_steps * each
    total, before = 0, 0
    for windows, updates in list(zip(recipe.stages, reflow.stage_updates(recipe, c.updates)))[:stages]:
        pairs = c.batch // recipe.reuse * solved(recipe, windows, before, each)
        total, before = total + updates * (pairs + c.batch * matched(recipe, windows, each)), windows
    return cached if recipe.pairs == "trajectory" else 0, total


def evaluates_frozen(recipe):
    """Whether the frozen network is evaluated while the student trains."""
    return recipe.pairs != "trajectory" or recipe.matching > 0


def matched(recipe, windows, each=1):
    """Forwards of distribution matching for one sample, a backward counted as two: the student's steps,
    the critic and the teacher. windows, each: as for solved."""
    return 3 * windows + 3 + each if recipe.matching and windows == recipe.stages[-1] else 0


def solved(recipe, windows, before, each=1):
    """Forwards for one pair that no cache holds. windows: of this stage; before: of the one before, 0 in
    the first; each: of the teacher in one step."""
    if recipe.pairs == "trajectory":
        return 0
    if recipe.pairs in losses.TARGETS:                     # one of the teacher, others of the student
        return each + {"consistency": 1, "imitation": windows, "flow-map": 2}[recipe.pairs]
    if recipe.pairs == "student" and before:               # a step for each window of the stage before
        return before // windows
    return recipe.solver_steps // windows * each           # the teacher's steps through a window


# ---- windows and images ------------------------------------------------------------------------------------


def check_start(out, dataset, recipe):
    """What the options alone do not tell of a run: a key of its data (captions, images and their order) and
    the columns of its recipe, which may be others in another version.  Returns: dict, for OUT/start.json.
    Raises UserError if OUT's run began with others."""
    data = store.digest(dataset.captions, dataset.caption_indices(range(256)), getattr(dataset, "key", ""))
    start = json.loads(json.dumps(dict(data=data, recipe=dataclasses.asdict(recipe))))   # as it is read again
    before = configs.read_json(out / "start.json") if (out / "start.json").exists() else start
    if before.get("data") != data:
        raise UserError(f"--out {out}: its run began with other images or captions; restore them, or choose "
                        "another --out")
    then = before.get("recipe", {})
    changed = ", ".join(f"{name} {then[name]} -> {value}" for name, value in start["recipe"].items()
                        if then.get(name, value) != value)
    if changed:
        raise UserError(f"--out {out}: its run began when its recipe was another ({changed}); choose another "
                        "--out, or go on with the version that began it")
    return start


def print_data(c, recipe, dataset):
    """What of the data is left out, repeated or not used."""
    if dataset.skipped:
        print(f"--skip-bad: {len(dataset.skipped)} left out "
              f"({', '.join(dataset.skipped[:3])}{', ...' * (len(dataset.skipped) > 3)})")
    if dataset.size and len(dataset.round) > dataset.size:
        print(f"--data {c.data}: each time round {len(dataset.round)} samples of {dataset.size} images; "
              "those of a folder N_name come N times")
    captions_only = recipe.pairs == "trajectory" and not recipe.forward_rate and not recipe.projection
    if c.data and dataset.size and captions_only:
        print(f"--data {c.data}: only its captions are used, pairs are the teacher's own trajectories; "
              "--pairs data or --forward-rate R uses its pictures")


def check_windows(stages, schedule):
    """Raises UserError unless every boundary of every stage is a timestep of the model, where it
    has timesteps: stock schedulers step between whole ones, and would miss the boundaries of 6, 7
    or 16 windows of 1000 timesteps."""
    total = schedule.timesteps
    for windows in stages:
        if total and total % windows:
            possible = [k for k in range(1, total + 1) if total % k == 0]
            below, above = (pick((k for k in possible if (k - windows) * sign > 0), default=total)
                            for pick, sign in ((max, -1), (min, 1)))
            raise UserError(f"--windows {windows}: does not divide the model's {total} timesteps, so that "
                            f"stock schedulers cannot stop at its boundaries; use for instance {below} or "
                            f"{above}")


def check_images(c, recipe, pipeline, dataset):
    """Raises UserError where pairs start from images that are not there, not square, or not to be
    cached."""
    height, width = models.native_size(pipeline) if c.size is None else (c.size, c.size)
    if recipe.pairs in FROM_IMAGES and dataset.images is None:
        raise UserError(f"--prompts {c.prompts}: holds no images, but pairs from {recipe.pairs} start "
                        "from images; give --data FOLDER instead, or --pairs trajectory")
    from_images = recipe.pairs in FROM_IMAGES or recipe.forward_rate or recipe.projection
    if from_images and height != width:
        raise UserError(f"--model {c.model}: made for {height} x {width} pixels, and pictures are cropped to "
                        f"squares; give --size {min(height, width)}, or --pairs trajectory without "
                        "--forward-rate")
    if c.cache_latents and recipe.pairs in FROM_IMAGES and dataset.size is None:
        option = "--cache-only" if c.cache_only else "--cache-latents"
        raise UserError(f"{option}: --data {c.data} is endless; leave the option out")


# ---- memory ------------------------------------------------------------------------------------------------


def added(c, weights):
    """Bytes that training adds on the device to weights (bytes) that it trains: gradients, the
    optimizer's moments, the running average."""
    return weights * (1 + OPTIMIZERS[c.optimizer] + (c.ema > 0 and c.ema_device != "cpu"))


def critic_bytes(c, recipe, network, weights):
    """Bytes of the critic of distribution matching, with its gradients and moments. network, weights: bytes
    of the student's network, and of what is trained in it."""
    return network + weights * (1 + OPTIMIZERS[c.optimizer]) if recipe.matching else 0


def free_memory(device, world):
    """Bytes that this process can still have on its device."""
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // world      # of mps as well, which shares it


def check_memory(c, recipe, device, world, pipeline, trained):
    """Raises UserError where training cannot fit, whatever the activations take. pipeline: on its device
    or, what is not opened yet, on meta; trained: bytes that will be, 0 for adapters."""
    online, free = recipe.pairs != "trajectory", free_memory(device, world)
    frozen = trained * PRECISIONS[c.precision].itemsize / 4 if evaluates_frozen(recipe) else 0
    frozen += critic_bytes(c, recipe, trained or nbytes(models.network(pipeline)), trained)
    dropped = 0 if online and not c.cache_latents else sum(
        p.nbytes for part in models.text_encoders(pipeline) for p in part.parameters() if not p.is_meta)
    unopened = sum(p.nbytes for part in (models.network(pipeline), *models.autoencoder(pipeline))
                   for p in part.parameters() if p.is_meta)
    more = (added(c, trained) + frozen) / (world if c.shard else 1) + unopened - dropped
    if more > free:
        what = "LoRA on it" if c.lora else "training every weight"
        raise UserError(f"memory: {what} takes {size(more)} more on each process, before any activation, and "
                        f"there are {size(free)}: {size(more - free)} too little; use --lora 16, --precision "
                        "bf16, --ema-device cpu, --optimizer adamw8bit, or --shard on several GPUs")


def measured_memory(device):
    """(bytes held at the peak, where): of the device, or of this process."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated(device), f"on {device}, at its peak"
    if device.type == "mps":
        return torch.mps.driver_allocated_memory(), "on mps"
    return psutil.Process().memory_info().rss, "by this process"


# ---- disk --------------------------------------------------------------------------------------------------


def left(c, recipe, trained, whole):
    """Bytes that a run needs at most: (one of its checkpoints, all of them, a new one written before an old
    one goes, and its students). trained: bytes; whole: parameters of a whole pipeline, which is exported
    in fp32."""
    state = trained * ((1 + OPTIMIZERS[c.optimizer]) * (1 + (recipe.matching > 0)) + (c.ema > 0))
    return state, (c.keep + 1) * state, len(recipe.stages) * whole * 4


def check_disk(folder, nbytes, option="--cache", less="fewer --trajectories", files=("**/*.safetensors",)):
    """Raises UserError unless there is room for nbytes in the folder, less what these files of it
    hold."""
    held = sum(file.stat().st_size for pattern in files for file in folder.glob(pattern))
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    more, free = nbytes - held, shutil.disk_usage(there).free
    if more > free:
        raise UserError(f"{option} {folder}: will take {size(more)} more, and its disk has {size(free)}: "
                        f"{size(more - free)} too little; free some, give {option} on another disk, or "
                        f"{less}")


def print_plan(c, recipe, per_stage, world, micro, resumed, pipeline, solver, whole):
    """What a run will do and need, now that its student is there. pipeline: with the student in it and
    what else stays in memory; solver: the frozen network beside it, or None; whole: parameters of a whole
    pipeline, as it is exported."""
    student = models.network(pipeline)
    trainable = sum(p.nbytes for p in trained(student).values())
    frozen = sum(p.nbytes for p in solver.parameters()) if solver and not c.lora else 0
    frozen += critic_bytes(c, recipe, nbytes(student), trainable)
    memory = (nbytes(student) + added(c, trainable) + frozen) / (world if c.shard else 1)
    memory += nbytes(*models.autoencoder(pipeline), *models.text_encoders(pipeline))
    checkpoint, _, exported = left(c, recipe, trainable, whole)
    stages = ", ".join(f"{updates} with {windows} window{'s' * (windows > 1)}"
                       for updates, windows in zip(per_stage, recipe.stages))
    print(f"updates: {c.updates} of {c.batch} samples, {micro} at once on each process: {stages}"
          + f"; going on from {resumed}" * bool(resumed))
    print(f"memory: {size(memory)} on each process for weights, gradients, optimizer and average; "
          "activations come on top, measured after ten updates")
    print(f"disk: {size(checkpoint)} for each of {c.keep} checkpoints, {size(exported)} for "
          f"{len(recipe.stages)} students; {size(shutil.disk_usage(c.out).free)} are free in {c.out}")
