"""The time law: at which times must a student of several windows be trained?

What it must predict jumps at each window's start, from one chord to the next, and a sampler of one step
per window evaluates it exactly there. ProReflow's paper does not tell its time law.
"""
import json
import math

import torch

import models
import reflow
import sampler
import teacher
from models import saved
from runtime import store
from studies.plots import BLACK, BLUE, GREEN, ORANGE, PINK, axes, plain_numbers
from studies.runner import Comparison, evaluator, judge, mean_interval, shown
from tools import flow2d

SHARES = (0, 0.25, 0.5, 0.75, 1)   # of the times, drawn at the window starts themselves; the rest uniform

UPDATES = 600                      # of batch 32, in all of 8 -> 4

LONG = 2400                        # of uniform times and of the half share, with one seed

PLACES = (0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)   # in a window

WIDTHS, PLANE_UPDATES = (32, 128, 512), (250, 1000, 4000, 16000)   # in the plane; updates of batch 512


def law(share):
    return "--time-law uniform" if share == 0 else f"--starts-share {share:g}"


@torch.no_grad()
def errors(lab, folder, windows=4):
    """How far a model is from the teacher's chord across each window, on its own path: root mean square
    of u_hat - u*.  Returns: [(t, error)], in sampling order."""
    shared = evaluator(lab.c)
    path = shared.teacher_path[range(len(shared.teacher_path))]["z"].to(lab.device)
    path = path[:, ::(path.shape[1] - 1) // windows]
    pipeline, model, _ = saved.open_model(str(folder), lab.device)
    cond = models.encode_text(pipeline, shared.prompts[:len(path)], device=lab.device)
    edges, found = reflow.boundaries(windows), []

    def full(t):
        return torch.full((len(path),), t, dtype=torch.float64, device=path.device)
    for k, (start, end) in enumerate(zip(edges, edges[1:])):
        ends = (model.schedule(full(t)[:1]) for t in (start, end))
        x, eps = reflow.chord(path[:, k], path[:, k + 1], *(tuple(v.float() for v in pair) for pair in ends))
        for place in PLACES:
            t = start - place * (start - end)
            a, b = model.coefficients(full(t), path.ndim - 1)
            x_hat, eps_hat = model((a * x + b * eps).to(path), full(t), cond)
            found.append((t, (eps_hat - x_hat - eps + x).square().mean().sqrt().item()))
    return found


def plane(lab, share, width, updates):
    """A student of 4 windows of the exact flow in the plane (tools/flow2d.py), trained once.
    Returns: mean distance to the teacher's 32 steps at 4 steps; width 0: of plain DDIM."""
    file = lab.out / "time-law" / f"plane-{share:g}-{width}-{updates}.json"
    if not file.is_file():
        torch.manual_seed(0)
        exact = teacher.Model(flow2d.exact, flow2d.SCHEDULE, "v_prediction")
        paths, test = flow2d.solve(exact, 8192), flow2d.solve(exact, 1024)
        recipe = reflow.Recipe(time_law="starts" if share else "uniform", starts_share=share or 0.5)
        model = flow2d.straighten(flow2d.Student(width), 4, paths, recipe, updates) if width else exact
        with torch.no_grad():
            end = sampler.ddim(model, test[:, 0], sampler.time_grid(4), {})
        distance = (end - test[:, -1]).norm(dim=1).mean().item()
        file.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomically(file, lambda part: part.write_text(json.dumps(distance)))
    return json.loads(file.read_text())


def time_law(lab):
    """Where in time must a student of several windows be trained, for ProReflow's 8→4 to work?"""
    seeds, base = range(min(3, lab.c.seeds)), "--recipe proreflow --windows 8 4 --batch 32"
    updates, longer = lab.updates(UPDATES, 2), lab.updates(LONG, 2)
    names = {(share, s, updates): f"time-law/{share:g}-s{s}" for s in seeds for share in SHARES}
    names |= {(share, 0, longer): f"time-law/{share:g}-long" for share in (0, 0.5)}
    folders = lab.train({name: f"{base} {law(share)} --updates {count} --seed {s}"
                         for (share, s, count), name in names.items()})
    asked = {(*key, k): dict(folder=folders[name] / f"student-{k}", steps=k)
             for key, name in names.items() for k in (8, 4)}
    *plain, top = lab.measure([dict(folder=lab.c.model, steps=steps) for steps in (8, 4, 32)])
    rows, plain = dict(zip(asked, lab.measure(list(asked.values())))), dict(zip((8, 4), plain))

    def column(share, k, name="fd_corrected"):
        return [rows[share, s, updates, k][name] for s in seeds]
    lines = [["plain DDIM", "-", *(f"{plain[k][name]:.{digits}f}" for k, (name, digits) in
                                   ((8, ("fd_corrected", 2)), (4, ("fd_corrected", 2)),
                                    (4, ("endpoint_error", 3))))]]
    for share in SHARES:
        lines.append([f"{share:g}", updates, shown(column(share, 8)), shown(column(share, 4)),
                      shown(column(share, 4, "endpoint_error"), 3)])
    for share in (0, 0.5):
        row8, row4 = (rows[share, 0, longer, k] for k in (8, 4))
        lines.append([f"{share:g}", longer, f"{row8['fd_corrected']:.2f}", f"{row4['fd_corrected']:.2f}",
                      f"{row4['endpoint_error']:.3f}"])
    comparisons = []
    for k in (8, 4):
        for unit, name in (("FD", "fd_corrected"), ("endpoint error", "endpoint_error")):
            comparisons += [
                Comparison(f"{k} windows, half of the times at their starts against uniform",
                           column(0.5, k, name), column(0, k, name), unit),
                *(Comparison(f"{k} windows, {words} against plain DDIM in {k} steps", column(share, k, name),
                             [plain[k][name]] * len(seeds), unit)
                  for share, words in ((0, "uniform times"), (0.5, "half of the times at their starts")))]
    tests = judge(comparisons)

    # where the error lies, and the same in the plane
    profiles = {"untrained": lab.c.model, "uniform": folders[names[0, 0, updates]],
                f"uniform, {longer} updates": folders[names[0, 0, longer]],
                "half at the starts": folders[names[0.5, 0, updates]]}
    profiles = {label: errors(lab, folder if label == "untrained" else folder / "student-4")
                for label, folder in profiles.items()}
    at_start = {label: math.sqrt(sum(value ** 2 for value in starts) / len(starts))
                for label, profile in profiles.items() for starts in [[v for _, v in profile[::len(PLACES)]]]}
    counts = [lab.updates(count) for count in PLANE_UPDATES]
    distances = {(share, width): [plane(lab, share, width, count) for count in counts]
                 for width in WIDTHS for share in (0, 0.5)}
    untrained = plane(lab, 0, 0, 0)

    figure, panels = axes(2, width=10, height=7.4, rows=2)
    for k, color, marker in ((8, BLUE, "o"), (4, ORANGE, "s")):
        found = [mean_interval(column(share, k)) for share in SHARES]
        panels[0].errorbar(SHARES, [mean for mean, _ in found], color=color, marker=marker, capsize=3,
                           yerr=[half if math.isfinite(half) else 0 for _, half in found],
                           label=f"{k} windows, {k} steps")
        panels[0].axhline(plain[k]["fd_corrected"], color=color, linestyle=":", linewidth=1)
    panels[0].axhline(top["fd_corrected"], color=BLACK, linestyle="--", linewidth=1)
    panels[0].set(xlabel="share of the times at window starts", ylabel="FD", yscale="log",
                  title="ProReflow 8→4 (dotted: plain DDIM, dashed: teacher)")
    panels[0].legend(frameon=False)
    for (label, profile), color in zip(profiles.items(), (BLACK, BLUE, PINK, ORANGE)):
        panels[1].plot(*zip(*profile), color=color, marker=".", linewidth=1, label=label)
    panels[1].set(xlabel="t (noise is 1)", ylabel="error of u, root mean square", xlim=(1, 0), yscale="log",
                  title="4 windows: distance to the teacher's chord")
    panels[1].legend(frameon=False, fontsize=8)
    for k, style in ((8, "--"), (4, "-")):
        for share, color, marker in ((0, BLUE, "o"), (0.5, ORANGE, "s")):
            panels[2].plot([updates, longer], [rows[share, 0, count, k]["fd_corrected"]
                                               for count in (updates, longer)], color=color, marker=marker,
                           linestyle=style, label=f"{k} windows, share {share:g}")
        panels[2].axhline(plain[k]["fd_corrected"], color=BLACK, linestyle=style, linewidth=0.8)
    panels[2].set(xlabel="updates of 32 (black: plain DDIM)", ylabel="FD", xscale="log", yscale="log",
                  xlim=(updates / 1.3, longer * 4), title="Does the uniform law catch up? Pictures")
    panels[2].legend(frameon=False, fontsize=8, loc="upper right")      # beside the lines
    plain_numbers(panels[0])
    plain_numbers(panels[2], (updates, longer))
    for (share, width), values in distances.items():
        panels[3].plot(counts, values, color=ORANGE if share else BLUE, marker="s" if share else "o",
                       linestyle=dict(zip(WIDTHS, (":", "--", "-")))[width],
                       label=f"share {share:g}, width {width}")
    panels[3].axhline(untrained, color=GREEN, linewidth=1, label="plain DDIM")
    panels[3].set(xlabel="updates of 512", ylabel="distance to the teacher's end", xscale="log",
                  title="Does it catch up? In the plane, 4 windows")
    panels[3].legend(frameon=False, fontsize=7)
    verdict = [
        f"ProReflow 8→4 in 4 steps, {updates} updates of 32: FD {shown(column(0.5, 4))} with half of the "
        f"times at the window starts, {shown(column(0, 4))} with uniform times, plain DDIM "
        f"{plain[4]['fd_corrected']:.2f}, the teacher in 32 steps {top['fd_corrected']:.2f}.",
        f"With {longer / updates:.3g} times the updates (one seed) uniform times have "
        f"{rows[0, 0, longer, 4]['fd_corrected']:.2f}, half at the starts "
        f"{rows[0.5, 0, longer, 4]['fd_corrected']:.2f}.",
        "Error of u at the starts of 4 windows, root mean square: "
        + ", ".join(f"{label} {value:.3f}" for label, value in at_start.items()) + ".",
        *map(str, comparisons),
        f"In the plane at 4 steps plain DDIM is {untrained:.3f} from the teacher's end; after {counts[-1]} "
        "updates " + ", ".join(f"{distances[0, width][-1]:.3f} (uniform) and {distances[0.5, width][-1]:.3f} "
                               f"(half) at width {width}" for width in WIDTHS) + ".", tests]
    return dict(verdict=verdict, figure=figure, tables=[
        (f"Recipe proreflow, 8→4, batch 32, seeds of training: {len(seeds)} (mean ± 95%), of the longer 1",
         ["share at the starts", "updates", "FD, 8 windows, 8 steps", "FD, 4 windows, 4 steps",
          "endpoint error, 4"], lines),
        ("In the plane: mean distance to the teacher's end in 4 steps, 4 windows, one seed",
         ["share at the starts", "width of the network", *(f"{count} updates" for count in counts)],
         [[f"{share:g}", width, *(f"{value:.3f}" for value in values)]
          for (share, width), values in distances.items()])])
