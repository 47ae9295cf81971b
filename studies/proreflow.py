"""The questions to ProReflow: what its direction term, its pairs and its peers give at equal cost."""
import math
from functools import partial

import matplotlib.pyplot as plt
import torch

import sampler
from evaluation import measuring
from models import saved
from studies import curriculum
from studies.plots import BLUE, GREEN, ORANGE, axes
from studies.runner import Comparison, counted, judge, mean_interval, shown

# ---- direction weight --------------------------------------------------------------------------------------


def direction_weight(lab):
    """How much weight should the direction have, and in which space is its cosine best taken?"""
    alphas, seeds = {"u": (0, 0.1, 0.3, 1, 3, 10), "eps": (0, 0.3, 3)}, range(min(3, lab.c.seeds))
    names = {(space, alpha, s): f"direction-weight/{space if alpha else 'u'}-{alpha:g}-s{s}"
             for space in alphas for alpha in alphas[space] for s in seeds}
    runs = {name: f"{curriculum.SQUARED} --windows 4 --updates {lab.updates(400)} "
                  f"--direction-weight {alpha:g} "
                  f"{'--direction-space eps ' if space == 'eps' and alpha else ''}{lab.cached(s)}"
            for (space, alpha, s), name in names.items()}
    folders = lab.train(runs)
    rows = dict(zip(runs, lab.measure([dict(folder=folders[name] / "student-4", steps=4) for name in runs])))
    columns = ("fd_corrected", "endpoint_error", "clip")
    values = {(space, alpha): {column: [rows[names[space, alpha, s]][column] for s in seeds]
                               for column in columns}
              for space in alphas for alpha in alphas[space]}
    lines = [[space, f"{alpha:g}", shown(v["fd_corrected"]), shown(v["endpoint_error"], 4),
              shown(v["clip"], 1)]
             for (space, alpha), v in values.items()]
    comparisons = [Comparison(f"Cosine on {space}, alpha {alpha:g} against 0", values[space, alpha][column],
                              values[space, 0][column], unit)
                   for space in alphas for alpha in alphas[space][1:]
                   for column, unit in (("fd_corrected", "FD"), ("endpoint_error", "endpoint error"))]
    tests = judge(comparisons)
    verdict = [f"Every weight against none: {counted(comparisons)}.", *map(str, comparisons), tests]
    figure, panels = axes(2)
    for axis, column, label in zip(panels, ("fd_corrected", "endpoint_error"),
                                   ("FD at 4 steps", "endpoint error at 4 steps")):
        for space, color, marker in (("u", BLUE, "o"), ("eps", ORANGE, "s")):
            summary = [mean_interval(values[space, alpha][column]) for alpha in alphas[space]]
            axis.errorbar([alphas["u"].index(alpha) for alpha in alphas[space]],
                          [mean for mean, _ in summary],
                          yerr=[half if math.isfinite(half) else 0 for _, half in summary],
                          color=color, marker=marker, capsize=3, label=f"cosine on {space}")
        axis.set(xticks=range(len(alphas["u"])), xticklabels=[f"{alpha:g}" for alpha in alphas["u"]],
                 xlabel="direction weight alpha", ylabel=label)
    panels[0].legend(frameon=False)
    return dict(verdict=verdict, figure=figure, tables=[
        (f"4 windows, 4 steps, {lab.updates(400)} updates, {len(seeds)} seeds (mean ± 95%); the squared "
         "error is on u throughout",
         ["cosine on", "alpha", "FD", "endpoint error", "CLIP score"], lines)])


# ---- discrepancy -------------------------------------------------------------------------------------------


def progressive_run(lab):
    """The curriculum's run whose students of 8, 4 and 2 windows two studies look at."""
    updates, trajectories = max(curriculum.BUDGETS.items())
    name, options = curriculum.arms(lab, updates, trajectories, 0)[curriculum.PROGRESSIVE, 1]
    return lab.train({name: options})[name]


@torch.no_grad()
def velocities(folder, device, prompts, steps=32):
    """The flow velocities u at `steps` equally spaced times of each model's own trajectory.
    Returns: (steps, N, D) float32."""
    pipeline, model, info = saved.open_model(str(folder), device)
    seen = []
    sampler.generate(pipeline, model, prompts, range(len(prompts)),
                     sampler.time_grid(steps, info.get("windows", 1)), batch=len(prompts),
                     callback=lambda state: seen.append((state["eps_hat"] - state["x_hat"]).flatten(1).cpu()))
    return torch.stack(seen)


def discrepancy(lab):
    """How far apart are the velocities of one trajectory at two times (ProReflow's Fig.
    1a), before and after reflow?"""
    run = progressive_run(lab)
    folders = {"teacher": lab.c.model} | {f"{k} windows": run / f"student-{k}" for k in (8, 4, 2)}
    prompts = measuring.real_plans(64, "discrepancy", "scenes")[1]
    figure, panels = plt.subplots(2, len(folders), figsize=(10, 5.2), layout="constrained", sharex=True,
                                  sharey=True)
    lines = []
    for column, (title, folder) in enumerate(folders.items()):
        u = velocities(folder, lab.device, prompts)
        unit = u / u.norm(dim=2, keepdim=True)
        cosine = torch.einsum("tnd,snd->tsn", unit, unit).mean(2)
        distance = torch.cdist(u.transpose(0, 1), u.transpose(0, 1)).mean(0)
        if title == "teacher":
            farthest = distance.max().item()                # one scale of colors for all folders
        maps = ((distance, "L2 distance", "viridis", 0, farthest), (cosine, "cosine", "cividis", 0.5, 1))
        for row, (values, label, colors, low, high) in enumerate(maps):
            image = panels[row, column].imshow(values.numpy(), cmap=colors, vmin=low, vmax=high,
                                               extent=(1, 0, 0, 1), interpolation="nearest")
            if column == len(folders) - 1:
                figure.colorbar(image, ax=list(panels[row]), label=label, shrink=0.9)
        panels[0, column].set_title(title)
        panels[1, column].set_xlabel("t")
        window = {k: torch.arange(32) * k // 32 for k in (8, 4, 2)}  # of k, that each of the 32 times is in
        same = [window[k][:, None] == window[k] for k in window]
        means = [distance[mask].mean().item() for mask in (*same, ~same[0])]
        lines.append([title, *(f"{mean:.2f}" for mean in means), f"{cosine[0, -1].item():.3f}",
                      f"{distance.max().item():.2f}"])
    for axis in panels[:, 0]:
        axis.set_ylabel("t")
    verdict = [
        f"Inside one of 2 windows the mean distance between two velocities falls from {lines[0][3]} "
        f"(teacher) to {lines[-1][3]} (2 windows); between the first and the last time the cosine is "
        f"{lines[0][5]} before and {lines[-1][5]} after."]
    return dict(verdict=verdict, figure=figure, tables=[
        ("Mean L2 distance between the velocities of one trajectory at two of 32 times; 64 trajectories",
         ["model", "inside 1 of 8 windows", "inside 1 of 4", "inside 1 of 2", "across 8 windows",
          "cosine, first to last", "largest"],
         lines)])


# ---- noise -------------------------------------------------------------------------------------------------


def perturb(z, t, x_hat, eps_hat, schedule, kind, size):
    """A velocity of the same distance from the true one, |u' - u| = size |u|, wrong in direction
    only or in magnitude only. x and eps both move, such that alpha x + sigma eps is still z.
    z, x_hat, eps_hat: (B, C, h, w); t: (B,); size: in [0, 2).  Returns: (x_hat, eps_hat)."""
    u = (eps_hat - x_hat).flatten(1)
    # of this image at this time, in any batch
    seeds = (z.flatten(1)[:, 0].double() * 1e6).long().abs().tolist()
    noise = torch.stack([torch.randn(u.shape[1] + 1, generator=torch.Generator().manual_seed(seed))
                         for seed in seeds]).to(u)
    norm = u.norm(dim=1, keepdim=True)
    if kind == "magnitude":
        moved = u * (1 + size * noise[:, :1].sign())
    else:
        across = noise[:, 1:] - (noise[:, 1:] * u).sum(1, keepdim=True) / norm.square() * u
        angle = 2 * math.asin(size / 2)                      # |u' - u| = 2 |u| sin(angle / 2)
        moved = math.cos(angle) * u + math.sin(angle) * norm * across / across.norm(dim=1, keepdim=True)
    change = (moved - u).view_as(x_hat)
    alpha, sigma = (v.to(z)[:, None, None, None] for v in schedule(t))
    # x' = x - sigma / (alpha + sigma) change, eps' = eps + alpha / (alpha + sigma) change: z stays, u moves
    # by change
    return x_hat - sigma / (alpha + sigma) * change, eps_hat + alpha / (alpha + sigma) * change


def noise(lab):
    """Does an error of direction cost more than an equal error of magnitude (ProReflow's Fig.
    1b)?"""
    sizes, kinds, steps = (0.1, 0.2, 0.4, 0.8), ("direction", "magnitude"), 8
    schedule = saved.open_model(lab.c.model)[1].schedule
    keys = [(kind, size) for kind in kinds for size in sizes]
    clean, *rows = lab.measure([dict(folder=lab.c.model, steps=steps)] + [
        dict(folder=lab.c.model, steps=steps,
             edit=(f"{kind} {size}", partial(perturb, schedule=schedule, kind=kind, size=size)))
        for kind, size in keys])
    rows = dict(zip(keys, rows))
    lines = [["none", "0", f"{clean['fd_corrected']:.2f}", f"{clean['clip']:.1f}"]]
    lines += [[kind, f"{size:g}", f"{row['fd_corrected']:.2f}", f"{row['clip']:.1f}"] for (kind, size),
              row in rows.items()]
    worse = {size: rows["direction", size]["fd_corrected"] - rows["magnitude", size]["fd_corrected"]
             for size in sizes}
    raised = {key: row["fd_corrected"] - clean["fd_corrected"] for key, row in rows.items()}
    verdict = [
        f"An error of {size:g} |u| at every step raises FD by {raised['direction', size]:.2f} if it turns "
        f"the velocity and by {raised['magnitude', size]:.2f} if it stretches it." for size in sizes]
    comparisons = [Comparison(f"An error of {size:g} |u| in direction against one in magnitude",
                              rows["direction", size]["fd_groups"],
                              rows["magnitude", size]["fd_groups"], pairs="groups of images")
                              for size in sizes]
    tests = judge(comparisons)
    costlier = sum(each.outcome == "worse" for each in comparisons)
    verdict.insert(0, f"Direction is shown to cost more at {costlier} of {len(sizes)} sizes, most at "
                      f"{max(worse, key=worse.get):g} |u|, by {max(worse.values()):.2f} FD.")
    verdict += [*map(str, comparisons), tests]
    figure, (axis,) = axes(width=6)
    for kind, color, marker in (("direction", BLUE, "o"), ("magnitude", ORANGE, "s")):
        fds = [clean["fd_corrected"], *(rows[kind, size]["fd_corrected"] for size in sizes)]
        axis.plot([0, *sizes], fds, color=color, marker=marker, label=f"{kind} only")
    axis.set(xlabel="size of the error, |u' - u| / |u|, at every step", ylabel=f"FD at {steps} steps")
    axis.legend(frameon=False)
    return dict(verdict=verdict, figure=figure, tables=[
        (f"The teacher by DDIM in {steps} steps, its velocity u = eps - x in error at every one",
         ["error in", "size", "FD", "CLIP score"], lines)])


# ---- guidance ----------------------------------------------------------------------------------------------

SCALES = (1, 2, 3, 4, 5, 6, 7)


def guidance(lab):
    """What does guidance do to a student that was trained at guidance 1, of a teacher that has learned a
    guidance of 2 (ProReflow's Fig. 3)?"""
    run, scales, counts = progressive_run(lab), SCALES, (4, 2)
    keys = [(steps, scale) for steps in counts for scale in scales]
    requests = [dict(folder=run / f"student-{steps}", steps=steps, guidance=float(scale))
                for steps, scale in keys]
    rows = dict(zip(keys, lab.measure(requests)))
    shapes = (("fd_corrected", 2), ("clip", 1))                       # column, digits
    lines = [[f"{scale:g}",
              *(f"{rows[steps, scale][column]:.{digits}f}" for steps in counts for column, digits in shapes)]
             for scale in scales]
    verdict, comparisons = [], []
    for steps in counts:
        best = {name: pick(scales, key=lambda scale: rows[steps, scale][column])
                for name, column, pick in (("fd", "fd_corrected", min), ("clip", "clip", max))}
        verdict.append(f"At {steps} steps FD is lowest at guidance {best['fd']:g} "
                       f"({rows[steps, best['fd']]['fd_corrected']:.2f}), CLIP score highest at "
                       f"{best['clip']:g} ({rows[steps, best['clip']]['clip']:.1f}).")
        comparisons += [Comparison(f"At {steps} steps, guidance {scale:g} against {scales[0]:g}",
                                   rows[steps, scale]["fd_groups"],
                                   rows[steps, scales[0]]["fd_groups"], pairs="groups of images")
                                   for scale in scales[1:]]
    tests = judge(comparisons)
    verdict += [*map(str, comparisons), tests]
    figure, panels = axes(2)
    for axis, column, label in zip(panels, ("fd_corrected", "clip"), ("FD", "CLIP score")):
        for steps, color, marker in ((4, BLUE, "o"), (2, ORANGE, "s")):
            axis.plot(scales, [rows[steps, scale][column] for scale in scales], color=color, marker=marker,
                      label=f"{steps} steps")
        axis.set(xlabel="guidance scale at sampling", ylabel=label)
    panels[0].legend(frameon=False)
    return dict(verdict=verdict, figure=figure, tables=[
        ("Students of 4 and 2 windows (8→4→2→1, trained at guidance 1, a tenth of the captions dropped)",
         ["guidance", "FD, 4 steps", "CLIP score, 4 steps", "FD, 2 steps", "CLIP score, 2 steps"], lines)])


# ---- pairs -------------------------------------------------------------------------------------------------


BUDGET = 40_000               # evaluations of every run


def pairs(lab):
    """Real images, the previous student, or the teacher's own cached trajectories: what is the best
    source at equal cost?"""
    sources, stages, seeds = ("trajectory", "data", "student"), (8, 4, 2), range(min(3, lab.c.seeds))
    runs = {(source, s): (f"pairs/{source}-s{s}", lab.within(
            BUDGET, f"{curriculum.SQUARED} --pairs {source} --windows 8 4 2 "
            + (lab.cached(s, 512) if source == "trajectory" else f"--seed {s}"))) for s in seeds
            for source in sources}
    folders = lab.train(dict(runs.values()))
    keys = [(source, k, s) for source in sources for k in stages for s in seeds]
    rows = dict(zip(keys,
                    lab.measure([dict(folder=folders[runs[source, s][0]] / f"student-{k}", steps=k)
                                 for source, k, s in keys])))
    values = {(source, k): {column: [rows[source, k, s][column] for s in seeds]
                            for column in ("fd_corrected", "endpoint_error")}
              for source in sources for k in stages}
    lines = [[source, lab.parse(runs[source, 0][1]).updates,
              f"{lab.evaluations(runs[source, 0][1]) / 1000:.0f}",
              *(f"{shown(values[source, k]['fd_corrected'])}; "
                f"{shown(values[source, k]['endpoint_error'], 4)}" for k in stages)]
             for source in sources]
    comparisons = {}
    for other, name in (("data", "images and the teacher"), ("student", "images and the previous student")):
        for k in stages[1:]:
            for column, unit in (("fd_corrected", "FD"), ("endpoint_error", "endpoint error")):
                comparisons.setdefault(name,
                                       []).append(Comparison(f"{k} windows, the teacher's trajectories "
                                                             f"against {name}",
                                                             *(values[source, k][column]
                                                               for source in ("trajectory", other)), unit))
    tests = judge([each for group in comparisons.values() for each in group])
    summary = [f"The teacher's own trajectories against {name}: {counted(group)}."
               for name, group in comparisons.items()]
    verdict = [*(str(each) for group in comparisons.values() for each in group), tests]
    figure, panels = axes(2)
    for axis, column, label in zip(panels, ("fd_corrected", "endpoint_error"), ("FD", "endpoint error")):
        for source, color, marker, shift in (("trajectory", BLUE, "o", -0.1), ("data", ORANGE, "s", 0),
                                             ("student", GREEN, "^", 0.1)):
            for s in seeds:
                axis.plot([i + shift for i in range(len(stages))],
                          [values[source, k][column][s] for k in stages], color=color,
                          marker=marker, label=source if s == 0 else None, linewidth=1)
        axis.set(xticks=range(len(stages)), xticklabels=[f"{k} windows,\n{k} steps" for k in stages],
                 ylabel=label)
    panels[0].legend(frameon=False)
    return dict(verdict=[*summary, *verdict], figure=figure, tables=[
        (f"FD; endpoint error after each stage of 8→4→2, one step per window, {len(seeds)} seeds (mean ± "
         "95%)",
         ["pairs from", "updates", "evaluations (1000)", *(f"{k} windows" for k in stages)], lines)])
