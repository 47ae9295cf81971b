"""What a run prints, logs and draws while it trains."""
import dataclasses
import json
import math
import shlex
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import models
import sampler
from data import captioned, imaging
from models.conditions import encode
from runtime import cli, plan, store
from runtime.checkpoints import swap_ema_

REMEDY = "the last checkpoint is good; to train again, give another --out and lower --lr"


def duration(seconds):
    """In words of two units at most."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class Bar(tqdm):
    """The bar of a run, in updates; it moves with every micro-batch. After ten updates it says what the
    others will take. c: train.Config; done: updates of earlier starts."""
    WARM_UP, MEASURED = 1, 10                              # the first of them compiles and allocates

    def __init__(self, c, done, device, rank):
        layout = ("{desc}: {percentage:3.0f}%|{bar}| {n:g}/{total:g} [{elapsed}<{remaining}, "
                  "{rate_fmt}{postfix}]")
        super().__init__(total=c.updates, initial=done, desc="reflow", unit="update", disable=rank > 0,
                         mininterval=1, bar_format=layout)
        self.device, self.first, self.start, self.done = device, done, None, rank > 0

    def go_on(self, done):
        """So many updates of this stage were made before."""
        super().update(done)
        self.first += done

    def update(self, n=1):
        super().update(n)
        made = round(self.n - self.first, 6)
        if not self.done and self.start is None and made >= self.WARM_UP:
            self.start = time.perf_counter()
        if not self.done and made >= self.MEASURED:
            self.done = True
            each = (time.perf_counter() - self.start) / (self.MEASURED - self.WARM_UP)
            memory, where = plan.measured_memory(self.device)
            left = round(self.total - self.n)
            self.write(f"after {self.MEASURED} updates: {each:.3g} s each, {duration(each * left)} for the "
                       f"other {left}; memory: {plan.size(memory)} {where}")


def print_finished(c, folder, rank):
    """Say so, and how to have what --export and --push-to-hub ask for, which a run leaves as it ends."""
    if rank == 0:
        print(f"{folder}: this run is finished; choose another --out to train again")
        later = {f"--export {kind}": f"{kind} {folder} {folder}-{kind}.safetensors"
                 for kind in c.export or () if kind != "diffusers"}
        later |= {f"--push-to-hub {c.push_to_hub}": f"push {folder} {c.push_to_hub}"} if c.push_to_hub else {}
        for asked, command in later.items():
            print(f"{asked}: done as a run ends; where it was not given then: python export.py {command}")


def print_stopped(step, rank):
    if rank == 0:
        print(f"\nstopped at step {step}; the same command goes on from there", file=sys.stderr)


def print_end(folder, windows, grid):
    """Where the last student and its pictures are, and how to sample it."""
    print(f"{folder}: the last student, a diffusers pipeline" + f"; pictures: {grid.last}" * bool(grid.last)
          + f"; sample it: python sampler.py --model {shlex.quote(str(folder))}{grid.option} --steps "
          f"{windows}")


MATCHING = "matching", "critic"                            # of distribution matching, where there is any


def row(parts, times):
    """What is kept of a micro-batch for the log: loss, magnitude, direction, t_start, t, and MATCHING
    where there is.
    parts: from reflow.student_loss; times: (t, t_start, t_end).  Returns: float64 (B, 5 or 7)."""
    t, t_start, _ = times
    loss, magnitude, direction, *more = (parts[name].detach().to(t.device).double() for name in
                                         ("loss", "magnitude", "direction", *MATCHING) if name in parts)
    return torch.stack([loss, magnitude, direction, t_start, t, *more], 1)


def summary(rows, norm, world, windows, step, optimizer, clock):
    """A line of the log: means over the samples of all processes since the last one, at time clock.
    rows: (N, 5 or 7), from `row`."""
    count = world * len(rows)
    if world > 1:
        everyone = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(everyone, rows)
        rows = torch.cat(everyone)
    window = (rows[:, 3] * windows - 1e-5).ceil().long()
    loss, magnitude, direction = rows[:, :3].mean(0).tolist()
    matching = dict(zip(MATCHING, rows[:, 5:].mean(0).tolist()))
    return dict(step=step, windows=windows, lr=optimizer.param_groups[0]["lr"], loss=loss,
                magnitude=magnitude, direction=direction, **matching, grad_norm=norm.item(),
                loss_per_window={k: rows[window == k, 0].mean().item() for k in sorted(set(window.tolist()))},
                samples_per_second=count / (time.time() - clock))


def trim_log(file, step):
    """Drop what was logged after this step, and what a power cut has left half written."""
    if file.exists():
        kept = [line for line, entry in store.read_log(file) if entry["step"] <= step]
        store.write_atomically(file, lambda part: part.write_text("".join(kept)))


# where else a run can be followed: package -> what its init() is told besides, given OUT
REPORTS = {"tensorboard": None,
           "wandb": lambda out: dict(dir=str(out), id=store.digest(str(out.absolute()))),
           "trackio": lambda out: {}}


def check_reports(c):
    """Raises UserError for a place that is not known or not installed."""
    for name in c.report_to or ():
        if cli.choose("--report-to", name, REPORTS):
            cli.extra(f"--report-to {name}", name, name)


class Board:
    """The curves and pictures of a run: OUT/tensorboard, and the places that --report-to names, in a
    project called reflow. A resumed run goes on in the same curves, after the step `logged`."""

    def __init__(self, c, out, logged):
        self.tensorboard, self.others = SummaryWriter(out / "tensorboard", purge_step=logged + 1), []
        title = "-".join(out.absolute().parts[1:])         # trackio makes a folder of it, for pictures
        for name in c.report_to or ():
            if REPORTS[name]:
                tool = cli.extra(f"--report-to {name}", name, name)
                tool.init(project="reflow", name=title, config=dataclasses.asdict(c), resume="allow",
                          **REPORTS[name](out))
                self.others.append(tool)

    def scalars(self, values, step):
        for key, value in values.items():
            self.tensorboard.add_scalar(key, value, step)
        for tool in self.others:
            tool.log(values, step=step)

    def picture(self, picture, step):
        """picture: PIL, RGB."""
        self.tensorboard.add_image("grid", np.asarray(picture), step, dataformats="HWC")
        for tool in self.others:
            tool.log({"grid": tool.Image(picture)}, step=step)

    def close(self):
        self.tensorboard.close()
        for tool in self.others:
            tool.finish()


def write_log(file, board, line):
    def short(value):
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return float(f"{value:.7g}") if isinstance(value, float) else value
    with open(file, "a") as log:
        log.write(json.dumps(short(line)) + "\n")
    per_window = {f"loss/window {k} of {line['windows']}": value
                  for k, value in line["loss_per_window"].items()}
    board.scalars({key: value for key, value in {**line, **per_window}.items()
                   if key not in ("step", "loss_per_window")}, line["step"])


def bad_sample(rows, norm, step, share, world, windows):
    """Where the first loss that is not finite was, on whichever process, in words; if all were
    finite, it was the gradient. rows: (updates * share, 5), from `row`, the last of them of update
    `step`."""
    bad, found = (~torch.isfinite(rows[:, 0])).nonzero(), (math.inf, "")
    if len(bad):
        loss, _, _, t_start, t = rows[bad[0, 0], :5].tolist()
        when = step + 1 - len(rows) // share + bad[0, 0].item() // share
        window = f"({t_start - 1 / windows:.3f}, {t_start:.3f}]"
        found = when, f"loss {loss} at step {when}, window {window}, t = {t:.4f}"
    everyone = [found]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, found)
    return min(everyone)[1] or f"gradient norm {norm.item()} at step {step}"


def validation_prompts(c):
    """Those of the file that --validation-prompts names, each once: list of str.  Raises UserError."""
    return captioned.Prompts(c.validation_prompts, c.seed, option="--validation-prompts").captions[1:]


class Shown:
    """The prompts of a run's pictures, those of --validation-prompts or up to four of the data's, and
    their conditions, encoded while the text encoders are there; none where --grid-steps 0 shows no
    picture."""

    def __init__(self, c, dataset):
        own, self.c, self.parts = dict.fromkeys(dataset.caption_indices(range(64))), c, {}
        self.prompts = (validation_prompts(c) if c.validation_prompts else
                        [dataset.captions[i] for i in own if i][:4] or [""])

    def encode(self, pipeline, part=None):
        """part: as for models.encode_text."""
        if self.c.grid_steps:
            self.parts[part] = encode(self.c, pipeline, self.prompts, part=part)

    def cond(self, pipeline):
        """Dict of tensors (N, ...), {} without pictures."""
        return models.join_text(pipeline, self.parts)


class Grid:
    """Pictures of the student while it trains, always of the same prompts and from the same
    noise, beside those of the teacher. shown: Shown, encoded."""
    BATCH = 4                                              # pictures at once
    PLAIN = 32, 4, 2, 1                                    # steps of the teacher's

    def __init__(self, pipeline, shape, shown, folder):
        self.pipeline, self.shape, self.folder, self.last = pipeline, shape, folder, None
        self.prompts, cond = shown.prompts, shown.cond(pipeline)
        self.cond = {key: value.to(models.network(pipeline).device) for key, value in cond.items()}
        self.option = f" {shlex.join(cli.arguments('prompt', self.prompts[0]))}" * bool(self.prompts[0])

    @torch.no_grad()
    def pictures(self, model, steps, ema=None, pairs=None):
        """One picture of every prompt, by the running average if it is given, guided as the teacher's
        trajectories are if pairs are given.  Returns: float32 (N, 3, H, W) in [-1, 1], CPU."""
        network = models.network(self.pipeline)
        swap_ema_(network, ema)
        z = sampler.noise(range(len(self.prompts)), self.shape).to(network.device)
        network.eval()                                     # no dropout
        images, size = [], self.BATCH // 2 if pairs else self.BATCH            # a guided picture is two
        for part in (range(len(z))[i:i + size] for i in range(0, len(z), size)):
            rows = slice(part.start, part.stop)
            cond, guidance, null = {key: value[rows] for key, value in self.cond.items()}, 1.0, None
            if pairs:
                cond, guidance = pairs.guide(cond, pairs.drawn_guidance(part))
                null = pairs.null_like(cond)
            images.append(models.decode(self.pipeline, sampler.ddim(model, z[rows], sampler.time_grid(steps),
                                                                    cond, guidance, null)))
        network.train()
        swap_ema_(network, ema)
        return torch.cat(images)

    def column(self, images):
        """Of a sheet: at least 128 pixels each."""
        return imaging.to_pil(images, max(1, 128 // images.shape[-1]))

    @property
    def labels(self):
        return [prompt if len(prompt) <= 40 else prompt[:37] + "..." for prompt in self.prompts]

    def begin(self, model, board, pairs):
        """What stands left of every later picture, while the student still is the teacher:
        OUT/teacher.png. All processes call; the first one writes."""
        columns = [self.pictures(model, steps, pairs=pairs) for steps in self.PLAIN]
        if board:
            titles = [f"teacher\n{steps} step{'s' * (steps > 1)}" for steps in self.PLAIN]
            sheet = imaging.contact_sheet(list(zip(*map(self.column, columns))), titles, self.labels)
            about = PngInfo()
            about.add_itxt("prompts", json.dumps(self.prompts))
            sheet.save(self.folder.with_name("teacher.png"), pnginfo=about)

    def teachers(self):
        """teacher.png, or None where there is none of these prompts: a resume may name others."""
        file = self.folder.with_name("teacher.png")
        if file.exists():
            with Image.open(file) as sheet:
                prompts = json.dumps(self.prompts)
                return sheet.convert("RGB") if sheet.text.get("prompts", prompts) == prompts else None

    def draw(self, model, windows, step, board, ema=None):
        """One step per window. All processes call; the first one, which has the board, writes
        FOLDER/STEP.png and shows it there."""
        images = self.pictures(model, windows, ema)
        if board:
            self.folder.mkdir(exist_ok=True)
            self.last, teachers = self.folder / f"{step:06d}.png", self.teachers()
            sheet = imaging.contact_sheet([[picture] for picture in self.column(images)],
                                          [f"student\n{windows} step{'s' * (windows > 1)}"],
                                          [] if teachers else self.labels)
            if teachers:
                sheet = imaging.beside(teachers, sheet)
            sheet.save(self.last)
            board.picture(sheet, step)
