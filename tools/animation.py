"""The animation at the head of the README: windows merge from 8 to 1. Above, the flow in the plane, whose
paths become straight; below, pictures of the embedded model in one step, which become sharp.

    python -m tools.animation                   # writes results/reflow-2d.webp; seven minutes

Both students go through the same stages, and every frame shows them equally far. The plane's is trained
here, the pictures' by train.py.
"""
import contextlib
import functools
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import reflow
import sampler
import teacher
import train
from data import imaging
from runtime import cli, options, progress
from tools import flow2d

SHARES = (0.0, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.65, 1.0)     # of a stage's updates, by frame
WIDTH, HEIGHT, SIDE = 720, 672, 138                     # pixels, of a frame and of a picture in it
BATCH = 32                                              # of the pictures' student
EFFORT = 6                                              # of the encoder, 0 to 6: smaller, but slow
LIMIT = 1_500_000                                       # bytes
BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#666666"


@dataclass
class Config:
    model: str = "tiny"         # whose pictures: what train.py takes, with the data it has by default
    updates: int = 800          # of each stage in the plane, batches of 512
    trajectories: int = 8192    # to train on in the plane
    paths: int = 70             # drawn
    picture_updates: int = 1200  # of the pictures' student, over all stages
    picture_trajectories: int = 1536  # of the pictures' teacher
    prompts: str = "assets/scenes/prompts.txt"  # text file, one prompt per line: what the pictures show, the
                                                # first four; "": the first of the model's data
    out: str = "results/reflow-2d.webp"  # animated WebP


# ---- training both -----------------------------------------------------------------------------------------


def train_plane(c, stages):
    """Returns: the teacher's path, and windows -> at each of SHARES (path, where one step per window lands
    and where it should, the mean distance, the same of the untrained); paths as of flow2d.fine_path."""
    torch.manual_seed(0)
    exact = teacher.Model(flow2d.exact, flow2d.SCHEDULE, "v_prediction")
    paths, test = flow2d.solve(exact, c.trajectories), flow2d.solve(exact, 1024)
    network, seen = flow2d.Student(), {}

    def few_steps(model, windows):
        with torch.no_grad():
            end = sampler.ddim(model, test[:, 0], sampler.time_grid(windows), {})
        return end, (end - test[:, -1]).norm(dim=1).mean().item()

    for windows in stages:
        untrained, states = few_steps(exact, windows)[1], {}

        def look(done, model, windows=windows, untrained=untrained, states=states):
            if done in moments(c.updates):
                end, distance = few_steps(model, windows)
                path = flow2d.fine_path(model, test[:c.paths, 0])
                states[done] = path, (end[:c.paths], test[:c.paths, -1]), distance, untrained
        look(0, teacher.Model(network, flow2d.SCHEDULE, "v_prediction", windows=windows))
        flow2d.straighten(network, windows, paths, reflow.Recipe(), c.updates, look)
        seen[windows] = [states[done] for done in moments(c.updates)]
    return flow2d.fine_path(exact, test[:c.paths, 0]), seen


def moments(updates):
    """After how many updates of a stage each frame is."""
    return [round(share * updates) for share in SHARES]


class OneStep(progress.Grid):
    """Instead of one step per window, written to files: one step in all, kept[windows, step], and before
    any training the teacher's 32 steps, kept["teacher"]. kept: a dict to fill; wanted: (windows, step)s."""

    def __init__(self, kept, wanted, *given):
        super().__init__(*given)
        self.kept, self.wanted = kept, wanted

    def begin(self, model, board, pairs):
        self.kept["teacher"] = self.pictures(model, 32, pairs=pairs)

    def draw(self, model, windows, step, board, ema=None):
        if (windows, step) in self.wanted:
            self.kept[windows, step] = self.pictures(model, 1, ema)


def train_pictures(c, recipe):
    """Returns: the teacher's pictures in 32 steps, and windows -> at each of SHARES the student's in one,
    each float (N, 3, H, W) in [-1, 1]."""
    counts, first, kept, at = reflow.stage_updates(recipe, c.picture_updates), 0, {}, {}
    for windows, count in zip(recipe.stages, counts):
        at[windows] = [(windows, first + done) for done in moments(count)]
        first += count
    wanted = {each for steps in at.values() for each in steps}
    # of what it prints, the bar is enough: the last line names a folder that is about to go
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        train.main(options.Config(model=c.model, updates=c.picture_updates, batch=BATCH, out=out,
                                  trajectories=c.picture_trajectories, validation_prompts=c.prompts,
                                  grid_steps=1, checkpoint_steps=c.picture_updates + 1),
                   functools.partial(OneStep, kept, wanted))
    return kept["teacher"], {windows: [kept[step] for step in steps] for windows, steps in at.items()}


# ---- one frame ---------------------------------------------------------------------------------------------


def place(figure, left, top, width, height):
    """Axes without axes, in pixels from the frame's upper left."""
    axis = figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))
    axis.axis("off")
    return axis


def words(figure, x, y, text, size=22, color="black", **style):
    """Text whose baseline is y pixels below the top; size in pixels."""
    figure.text(x / WIDTH, 1 - y / HEIGHT, text, fontsize=size * 0.72, color=color, **style)


def frame(path, ends, windows, distance, untrained, rows):
    """path: list of (t, z) as of flow2d.fine_path; ends: where one step per window lands, and
    where it should, (B, 2) each; windows: 0 for the teacher; rows: the pictures in 32 steps and in one, PIL.
    Returns: RGB, PIL."""
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    plane = place(figure, 4, 4, 364, 364)
    line = flow2d.seen(path)
    plane.plot(line[..., 0], line[..., 1], color=BLUE, alpha=0.5, linewidth=1.4)
    plane.plot(*line[0].T, ".", color="#999999", markersize=5)
    plane.plot(*torch.stack(ends).permute(2, 0, 1).numpy(), color=ORANGE, linewidth=0.8)    # how far off
    plane.plot(*ends[0].T, ".", color=ORANGE, markersize=8)
    plane.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")

    left, wide = 396, 308
    words(figure, left, 52, "student" if windows else "teacher", 38, weight="bold")
    count = windows or 1
    bars = place(figure, left, 76, wide, 26)
    bars.set(xlim=(0, wide), ylim=(0, 1))
    for k in range(count):
        bars.add_patch(plt.Rectangle((k * wide / count + 1.5, 0), wide / count - 3, 1,
                                     color=BLUE if windows else "#bbbbbb"))
    words(figure, left, 126, "noise", 20, GRAY)
    words(figure, left + wide, 126, "data", 20, GRAY, ha="right")
    if windows:
        ending = "s" * (windows > 1)
        words(figure, left, 188, f"{windows} window{ending}, {windows} step{ending}", 26, weight="bold")
        words(figure, left, 250, "land", 24)
        words(figure, left + 68, 250, f"{distance:.2f}", 44, BLUE, weight="bold")
        words(figure, left + 188, 250, "off", 24)
        words(figure, left, 296, f"untrained {untrained:.2f}", 24, GRAY)
    else:
        words(figure, left, 188, "32 steps", 26, weight="bold")
        words(figure, left, 240, "along curved paths", 24)

    labels = ("teacher", "32 steps"), ("student" if windows else "teacher", "1 step")
    for row, (pictures, (who, steps)) in enumerate(zip(rows, labels)):
        top = HEIGHT - (2 - row) * (SIDE + 8)
        words(figure, 12, top + SIDE / 2 - 6, who, 24, weight="bold")
        words(figure, 12, top + SIDE / 2 + 24, steps, 24)
        for i, picture in enumerate(pictures):
            place(figure, 130 + i * (SIDE + 8), top, SIDE, SIDE).imshow(picture, interpolation="nearest",
                                                                       aspect="auto")
    figure.canvas.draw()
    whole = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    return whole


def shown(pictures):
    """At most as many as a row holds, each SIDE pixels: whole pixels where they are small."""
    return [each.resize((SIDE, SIDE), Image.Resampling.BICUBIC if each.width < SIDE else
                        Image.Resampling.LANCZOS) for each in imaging.to_pil(pictures[:4])]


# ---- python -m tools.animation -----------------------------------------------------------------------------


def main(c):
    recipe = reflow.RECIPES["default"]
    cli.at_least(c, updates=1, trajectories=1, paths=1, picture_updates=len(recipe.stages),
                 picture_trajectories=1)
    out = Path(c.out)
    if out.suffix != ".webp" or not out.parent.is_dir():
        raise cli.UserError(f"--out {out}: must be a .webp in a folder that is there")
    first, plane = train_plane(c, recipe.stages)
    sharp, pictures = train_pictures(c, recipe)
    sharp = shown(sharp)
    frames = [frame(first, (first[-1][1],) * 2, 0, 0, 0, (sharp, shown(pictures[recipe.stages[0]][0])))]
    durations = [2000]
    for windows in recipe.stages:
        for (path, ends, *distances), drawn in zip(plane[windows], pictures[windows]):
            frames.append(frame(path, ends, windows, *distances, (sharp, shown(drawn))))
            durations.append(140)
        durations[-1] = 1500
    durations[-1] = 3000
    whole = io.BytesIO()                                        # an interrupted run leaves the old file
    frames[0].save(whole, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0,
                   quality=75, method=EFFORT)
    if whole.tell() > LIMIT:
        raise cli.UserError(f"{out}: {whole.tell():,} bytes, more than {LIMIT:,}; give fewer --paths")
    out.write_bytes(whole.getvalue())
    print(f"{out}: {len(frames)} frames, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
