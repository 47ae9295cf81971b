"""The training loop of reflow.

    python train.py --model tiny
    torchrun --nproc_per_node=8 train.py --model sd15 --prompts prompts.txt

Stage by stage (8 windows, 4, 2, 1), the student learns to predict the chord of its window.
Each finished stage leaves a complete diffusers pipeline, OUT/student-K. Stopped or killed at any
moment, the same command goes on from the last checkpoint, on the same number of processes or
another.
"""
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel as DDP

import export
import models
import reflow
from data import captioned
from models import configs, load, saved
from models.conditions import Conditions
from models.student import FrozenNetwork, check_lora, make_student
from pairs import FRESH, Pairs, cache_folder
from runtime import checkpoints, cli, plan, processes, progress, store, updates
from runtime.cli import UserError
from runtime.options import Config, command, fit_prediction, resolve_recipe
from teacher import PRECISIONS

# what may differ between two starts of one run
MAY_CHANGE_ON_RESUME = ("resume", "cache_only", "config", "keep", "checkpoint_steps", "log_steps",
                        "grid_steps", "validation_prompts", "report_to", "device", "micro_batch", "shard",
                        "gradient_checkpointing", "compile", "ema_device", "export", "export_dtype",
                        "push_to_hub")

# ---- before the loop ---------------------------------------------------------------------------------------


def split_batch(c, recipe, world):
    """(samples of a process in every update, samples of one forward).  Raises UserError where they
    do not divide."""
    share = c.batch // world
    micro = min(c.micro_batch or share, share)
    for option, value, divisor, what in (("--batch", c.batch, world, "processes"),
                                         ("--batch / processes", share, max(micro, 1), "--micro-batch"),
                                         ("samples per forward", micro, recipe.reuse, "--reuse")):
        if value == 0 or value % divisor:
            raise UserError(f"{option} {value}: not divisible by {divisor} ({what})")
    return share, micro


def with_data(c):
    """The Config with its model's own data, where it names neither data nor prompts."""
    default = "" if c.prompts else load.PRESETS.get(c.model, ("", ""))[1]
    return dataclasses.replace(c, data=c.data or default)


def check_out(c, out):
    """The settings that OUT/config.json is to hold.  Raises UserError if OUT holds another run, or
    cannot be written."""
    settings = {key: value for key, value in dataclasses.asdict(c).items() if key not in MAY_CHANGE_ON_RESUME}
    if c.validation_prompts:                               # now, not after the caches are made
        progress.validation_prompts(c)
    if c.push_to_hub:
        export.check_repo("--push-to-hub", c.push_to_hub)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "config.json").exists():
            # what an older run does not name was as it is by default; a/b/ is a/b
            before = configs.read_json(out / "config.json")
            before = Config(**{key: value for key, value in before.items() if key in settings})
            now, before = ({key: os.path.normpath(value) if value and isinstance(value, str) else value
                            for key, value in dataclasses.asdict(with_data(each)).items()}
                           for each in (c, before))
            changed = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in settings
                                if before[key] != now[key] and key != "out")   # a folder may be moved
            if changed or not c.resume:
                other = f" with other settings ({changed})" * bool(changed)
                raise UserError(f"--out {out}: holds a run{other}; choose another --out or delete it")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another "
                        "folder") from error
    return settings


def claim_out(c, out, settings, start, logged):
    """OUT is this run's from here on: config.json and start.json are what a resume compares, config.yaml
    what --config takes; log.jsonl and the curves forget what came after the step `logged`.
    Returns: progress.Board, of the curves."""
    every = {**dataclasses.asdict(c), **settings, "config": ""}
    every = yaml.safe_dump(every, sort_keys=False, allow_unicode=True)
    for name, text in (("config.json", json.dumps(settings, indent=1)), ("config.yaml", every),
                       ("start.json", json.dumps(start, indent=1))):
        store.write_atomically(out / name, lambda part: part.write_text(text, encoding="utf-8"))
    progress.trim_log(out / "log.jsonl", logged)
    return progress.Board(c, out, logged)


def open_pairs(c, recipe, device, processes):
    """The data, the teacher on its device, and their pairs, cached as the Config says.
    Returns: (c with the model's default data filled in, what progress.Grid shows, pipeline, pairs).
    Raises UserError."""
    c = with_data(c)
    rank, _, barrier = processes
    dtype = PRECISIONS[c.precision] if c.lora else torch.float32  # LoRA never changes the network it sits on

    def opened(**parts):
        pipeline = load.load_pipeline(c.model, dtype, c.random_init, c.seed, c.model_config, **parts)
        if c.size:
            models.set_native_size(pipeline, c.size)
        return pipeline

    # what is cached is encoded first, by one encoder after the other: T5 never shares memory with another
    cached = recipe.pairs == "trajectory" or c.cache_latents
    pipeline = opened(empty=models.NETWORKS) if cached else opened().to(device)
    apart = models.encoded_apart(pipeline) if cached else []
    if cached and not apart:
        pipeline = opened(empty=models.NOT_TEXT)
    check_lora(c, models.network(pipeline))
    if c.init:
        saved.check_start(c, recipe)
    export.check_files(c, pipeline)
    guidance = models.embed_guidance(pipeline, c.guidance_teacher, c.guidance_range)
    models.check_null(pipeline, guidance, c.text_dropout)               # before anything encodes a caption
    plan.check_windows(recipe.stages, models.schedule(pipeline)[0])
    if rank:  # the first process checks every image, the others read what it found
        barrier()
    dataset = captioned.open_dataset(c.data, c.prompts, c.seed, c.skip_bad, c.image_column, c.caption_column,
                                     checked=cache_folder(c) / "data.json", caption=c.caption,
                                     min_size=c.min_size)
    if rank == 0:
        barrier()
        plan.print_data(c, recipe, dataset)
    plan.check_images(c, recipe, pipeline, dataset)
    for encoder in models.text_encoders(pipeline) if not apart else ():
        encoder.to(device)
    conditions = Conditions(c, recipe, pipeline, dataset) if cached else None
    shown = progress.Shown(c, dataset)
    if rank == 0:
        plan.check(c, recipe, device, processes[1], pipeline, dataset, conditions)
    for part in apart or [None]:
        one = opened(empty=[name for name in models.NETWORKS if name != part]) if part else pipeline
        if part:
            getattr(one, part).to(device)
        shown.encode(one, part)
        if cached:
            folder = cache_folder(c) / ("captions" if c.cache_latents else "prompts")
            conditions.cache(folder, processes, one, part)
        del one
    if cached:
        del pipeline
        pipeline = opened(**dict.fromkeys(models.TEXT_ENCODERS)).to(device)
    pairs = Pairs(c, recipe, pipeline, dataset, conditions, processes)
    if c.shard:  # FSDP wants one dtype for all it shards together; only now: what is cached must not
        models.network(pipeline).float()    # depend on --shard, which may differ between two starts
    return c, shown, pipeline, pairs


def make_cache(c, recipe, device, processes):
    """What training with the same options would cache.  Returns: its folder."""
    c = dataclasses.replace(c, cache_latents=recipe.pairs != "trajectory")
    pairs = open_pairs(c, recipe, device, processes)[-1]
    if processes[0] == 0:
        what = "latents; train with --cache-latents" if c.cache_latents else "trajectories"
        print(f"{cache_folder(c)}: {len(pairs.rows)} {what}")
    return cache_folder(c)


def sample_numbers(steps, batch, rank, share, micro):
    """The sample numbers of each micro-batch of this process. Update k holds the samples from
    k * batch to (k + 1) * batch - 1."""
    return (range(step * batch + rank * share + i, step * batch + rank * share + i + micro)
            for step in steps for i in range(0, share, micro))


def learning_rate(c, done, updates):
    """Warm-up, then cosine to a tenth, within the stage. done: updates of the stage so far."""
    warm_up = min(1.0, (done + 1) / max(1, min(50, updates // 10)))
    return c.lr * warm_up * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / updates)))


def export_stage(folder, student, info, rank, barrier):
    """The student as it is becomes a pipeline in `folder`. All processes call;
    the first one writes."""
    weights = checkpoints.gather_full(checkpoints.trained(student), rank)
    if rank == 0:
        export.export(folder, weights, info, folder.parent)
    barrier()


# ---- the loop ----------------------------------------------------------------------------------------------


def main(c, draws=progress.Grid):
    """Train as the Config says. draws: a class like progress.Grid, for every --grid-steps.
    Returns: the folder of the last student; with --cache-only, of the cache."""
    recipe = resolve_recipe(c)
    per_stage = reflow.stage_updates(recipe, c.updates)
    rank, world, device, barrier = processes.start_processes(c)
    if recipe.pairs == "flow-map":                          # no TF32: its targets are small differences
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    if c.cache_only:
        return make_cache(c, recipe, device, (rank, world, barrier))
    share, micro = split_batch(c, recipe, world)
    out = Path(c.out)
    settings, folders = check_out(c, out), [out / f"student-{windows}" for windows in recipe.stages]
    # by the last one that is there: those before it may have been deleted
    finished = max((i for i, folder in enumerate(folders, 1) if (folder / "reflow.json").exists()), default=0)
    if finished == len(folders):
        progress.print_finished(c, folders[-1], rank)
        return folders[-1]

    # teacher, pairs, and where to go on; what has been cached need not stay in memory
    c, shown, pipeline, pairs = open_pairs(c, recipe, device, (rank, world, barrier))
    recipe = pairs.recipe = fit_prediction(c, recipe, pairs.prediction)
    whole, start = models.parameters(pipeline), plan.check_start(out, pairs.dataset, recipe)
    whole += pairs.conditions.text_encoders if pairs.conditions else 0                  # gone already
    grid = draws(pipeline, pairs.shape, shown, out / "grids")
    if not pairs.online:
        models.drop_encoders(pipeline, decoding=bool(c.grid_steps))
    begin = folders[finished - 1] if finished else c.init and Path(c.init)
    begin = export.trained_weights(begin, c.lora) if begin else {}
    checkpoint, kept = checkpoints.newest_checkpoint(out, rank)
    resumed = int(kept.get("step", 0))
    logged = max(resumed, sum(per_stage[:finished]))
    barrier()
    board = claim_out(c, out, settings, start, logged) if rank == 0 else None  # no mistake above may claim it

    # networks: the student is the teacher's own module; a second one only if pairs are solved while it trains
    student, path = models.network(pipeline), reflow.PATHS[recipe.path]
    solver = FrozenNetwork(c, student, device) if plan.evaluates_frozen(recipe) else None
    critic = make_student(c, copy.deepcopy(student), device, 0.0) if recipe.matching else None
    make_student(c, student, device, recipe.dropout)
    network = DDP(student, gradient_as_bucket_view=True) if world > 1 and not c.shard else student
    solving, solver_steps = models.as_model(pipeline, solver), recipe.solver_steps  # steps from t = 1 to 0

    if rank == 0:
        plan.print_plan(c, recipe, per_stage, world, micro, resumed, pipeline, solver, whole)
    flags, (stop, release) = processes.StopFlags(device, world), processes.catch_signals()
    bar = progress.Bar(c, sum(per_stage[:finished]), device, rank)
    if c.grid_steps and not finished and not resumed:       # on its own path, before --init
        grid.begin(models.as_model(pipeline, student), board, pairs)
    if begin:
        for name, p in checkpoints.trained(student).items():
            checkpoints.copy_full_(p, begin[name])
        begin.clear()
    for stage in range(finished, len(folders)):
        windows, count, first = recipe.stages[stage], per_stage[stage], sum(per_stage[:stage])
        info, done = describe(c, recipe, windows, world, device, pairs.guidance), 0
        if stage and recipe.pairs == "student":  # the previous stage's student solves the windows of this one
            solver.become(checkpoints.trained(student), c)
            solver_steps = recipe.stages[stage - 1]
            solving = models.as_model(pipeline, solver, path, solver_steps)
        optimizer, ema, scaler, beside, called = updates.make_optimizer(
            c, recipe, student, pairs, world, critic if windows == recipe.stages[-1] else None)
        if first < resumed <= first + count:
            done = int(kept["done"])
            checkpoints.restore(checkpoint, done, student, beside, optimizer, ema, scaler)
            bar.go_on(done)
        model, plain = (models.as_model(pipeline, each, path, windows) for each in (network, student))
        numbers = sample_numbers(range(first + done, first + count), c.batch, rank, share, micro)
        batches = processes.prefetch(lambda some: pairs.fetch(some, windows), numbers)
        seen, clock = [], time.time()

        for step in range(first + done, first + count):
            # pictures of the running average; before any update, of the teacher or --init, by plain DDIM
            if c.grid_steps and (step % c.grid_steps == 0 or step == first):
                grid.draw(plain, windows, step, board, ema)

            optimizer.param_groups[0]["lr"] = learning_rate(c, step - first, count)
            torch.manual_seed((c.seed * 1_000_003 + step) * world + rank)      # dropout, by the step as well
            for i in range(0, share, micro):
                # micro-batch: the two ends of each sample's window, and the loss of the student between them
                updates.share_gradients(i + micro == share, network, *called.values())
                batch = next(batches)
                fresh = [batch.pop(name) for name in FRESH if name in batch]
                times, ends, cond = pairs.ends(batch, solving, solver_steps // windows, model)
                values, parts = reflow.student_loss(model, ends, times, cond, recipe,
                                                    called.get("normalizer"), pairs.autocast())
                if fresh:
                    parts["matching"], parts["critic"] = pairs.matching(
                        *fresh, cond, model, solving, models.as_model(pipeline, called["critic"]))
                    values = values + recipe.matching * parts["matching"] + parts["critic"]
                scaler.scale(values.sum() / share).backward()
                seen.append(progress.row(parts, times))
                bar.update(micro / share)
            norm = updates.step(student, optimizer, ema, scaler)

            # a loss that is not finite, or a signal to stop, on any process
            logs, saves = (step + 1) % c.log_steps == 0, (step + 1) % c.checkpoint_steps == 0
            latest = torch.stack([norm.to(seen[-1].device),
                                  *(rows[:, 0].sum() for rows in seen[-(share // micro):])])
            stopped, not_finite = flags(bool(stop), ~torch.isfinite(latest).all(),
                                        wait=logs or saves or step + 1 == first + count)
            if not_finite:
                bar.close()
                where = progress.bad_sample(torch.cat(seen), norm, step, share, world, windows)
                raise UserError(f"{where}, stage {stage} ({windows} windows); {progress.REMEDY} {c.lr}")

            # log: one JSON line and one point of every curve per log_steps
            if logs:
                line = progress.summary(torch.cat(seen), norm, world, windows, step + 1, optimizer, clock)
                if rank == 0:
                    progress.write_log(out / "log.jsonl", board, line)
                bar.set_postfix(windows=windows, loss=f"{line['loss']:.4f}")
                seen, clock = [], time.time()

            # checkpoint, regularly and when stopped by a signal
            if saves or stopped:
                checkpoints.save_checkpoint(out, rank, step + 1, info, step + 1 - first, student, beside,
                                            optimizer, ema, c.keep, scaler)
                barrier()                                  # a slow disk is no dead process
            if stopped:
                bar.close()
                progress.print_stopped(step + 1, rank)
                sys.exit(128 + (stop or [signal.SIGTERM])[0])

        # the stage is done: its running average is the student
        checkpoints.swap_ema_(student, ema)
        del optimizer, ema                                 # room for the export
        if c.grid_steps:                                   # the picture of its card
            grid.draw(plain, windows, first + count, board)
        export_stage(folders[stage], student, info, rank, barrier)
    bar.close()
    release()
    if rank == 0:
        board.close()
        progress.print_end(folders[-1], recipe.stages[-1], grid)
        if c.push_to_hub:
            export.push(export.PushConfig(str(folders[-1]), c.push_to_hub))
    return folders[-1]


def describe(c, recipe, windows, world, device, guidance):
    """reflow.json of a student: what it is, how it was made, what that took. guidance: classifier-free,
    of the pairs."""
    stage = recipe.stages.index(windows)
    updates = sum(reflow.stage_updates(recipe, c.updates)[:stage + 1])
    cached, solved = plan.evaluations(c, recipe, guidance, stage + 1)
    cost = dict(evaluations=cached + solved, processes=world, device=plan.device_name(device))
    return dict(method=c.name or c.recipe, recipe=c.recipe, stage=stage, windows=windows, path=recipe.path,
                teacher=c.model, command=command(c, world), updates=updates, cost=cost,
                columns=dataclasses.asdict(recipe), config=dataclasses.asdict(c), **export.versions())


def run():
    cli.run(main, Config, __doc__)


if __name__ == "__main__":
    run()
