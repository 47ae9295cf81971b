"""The animation at the head of the README: the flow in the plane while windows merge and its paths
become straight.

    python -m tools.animation                   # a minute or two; writes results/reflow-2d.webp
"""
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import reflow
import sampler
import teacher
from runtime import cli
from tools import flow2d

SNAPSHOTS = (0.0, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.65, 1.0)     # of a stage's updates
LIMIT = 1_500_000               # bytes


@dataclass
class Config:
    updates: int = 800          # of each stage, batches of 512
    trajectories: int = 8192    # to train on
    paths: int = 70             # drawn
    out: str = "results/reflow-2d.webp"  # animated WebP


def frame(path, windows, steps, distance, untrained):
    """One picture. path: list of (t, z) as of flow2d.fine_path; windows: 0 for the teacher."""
    figure = plt.figure(figsize=(7.2, 3.7), dpi=100)
    plane, words = figure.add_axes((0.01, 0.01, 0.5, 0.98)), figure.add_axes((0.55, 0.05, 0.42, 0.9))
    seen = [z / sum(v.float() for v in flow2d.SCHEDULE(t))[:, None] for t, z in path]   # chords look straight
    line = torch.stack(seen).numpy()
    plane.plot(line[..., 0], line[..., 1], color="#0072B2", alpha=0.5, linewidth=1.2)
    plane.plot(*line[0].T, ".", color="#999999", markersize=4)
    plane.plot(*line[-1].T, ".", color="#D55E00", markersize=7)
    plane.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
    words.set(xlim=(0, 1), ylim=(0, 1))
    title = f"student, {windows} window{'s' * (windows > 1)}" if windows else "teacher"
    words.text(0, 0.86, title, fontsize=17, weight="bold")
    for k in range(windows or 1):
        wide = 1 / (windows or 1)
        words.add_patch(plt.Rectangle((k * wide + 0.006, 0.66), wide - 0.012, 0.08,
                                      color="#0072B2" if windows else "#bbbbbb"))
    words.text(0, 0.59, "noise", fontsize=10, color="#555555")
    words.text(1, 0.59, "data", fontsize=10, color="#555555", ha="right")
    if windows:
        words.text(0, 0.40, f"{steps} step{'s' * (steps > 1)}, from the teacher's 32:", fontsize=11)
        words.text(0, 0.26, f"{distance:.2f}", fontsize=22, weight="bold", color="#0072B2")
        words.text(0.30, 0.27, f"untrained {untrained:.2f}", fontsize=11, color="#555555")
    else:
        words.text(0, 0.40, "32 steps along curved paths", fontsize=11)
    for axis in (plane, words):
        axis.axis("off")
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    return picture


def main(c):
    cli.at_least(c, updates=1, trajectories=1, paths=1)
    out = Path(c.out)
    if out.suffix != ".webp" or not out.parent.is_dir():
        raise cli.UserError(f"--out {out}: must be a .webp in a folder that is there")
    torch.manual_seed(0)
    exact = teacher.Model(flow2d.exact, flow2d.SCHEDULE, "v_prediction")
    train, test = flow2d.solve(exact, c.trajectories), flow2d.solve(exact, 1024)
    frames, durations = [frame(flow2d.fine_path(exact, test[:c.paths, 0]), 0, 32, 0, 0)], [1500]
    network = flow2d.Student()

    def few_steps(model, windows):
        with torch.no_grad():
            end = sampler.ddim(model, test[:, 0], sampler.time_grid(windows), {})
        return end, (end - test[:, -1]).norm(dim=1).mean().item()

    for windows in (8, 4, 2, 1):
        wanted = {round(share * c.updates) for share in SNAPSHOTS}
        untrained = few_steps(exact, windows)[1]

        def look(done, model, windows=windows, wanted=wanted, untrained=untrained):
            if done in wanted:
                end, distance = few_steps(model, windows)
                path = flow2d.fine_path(model, test[:c.paths, 0], end[:c.paths])
                frames.append(frame(path, windows, windows, distance, untrained))
                durations.append(1500 if done == c.updates else 120)
        look(0, teacher.Model(network, flow2d.SCHEDULE, "v_prediction", windows=windows))
        flow2d.straighten(network, windows, train, reflow.Recipe(), c.updates, look)
    whole = io.BytesIO()                                        # an interrupted run leaves the old file
    frames[0].save(whole, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0,
                   quality=75)
    if whole.tell() > LIMIT:
        raise cli.UserError(f"{out}: {whole.tell():,} bytes, more than {LIMIT:,}; give fewer --paths")
    out.write_bytes(whole.getvalue())
    print(f"{out}: {len(frames)} frames, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
