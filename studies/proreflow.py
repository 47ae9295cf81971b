"""The questions to ProReflow: what its curriculum, its direction term, its pairs and its peers give
at equal cost."""
import math
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import eval as evaluation
import models
import sampler
import train
from data import imaging
from evaluation import measuring
from models import saved
from studies.plots import BLACK, BLUE, DPI, GREEN, ORANGE, PINK, VERMILION, axes, plain_numbers
from studies.runner import Comparison, counted, judge, mean_interval, paired, shown

# ---- 1. ablation -------------------------------------------------------------------------------------------

ALPHA = 0.3                   # of the ablation: the best by FD of the direction-weight study, 0 aside


def ablation(lab):
    """Is progressive reflow better than straight to 4 windows at equal cost? Is the direction
    term?"""
    direct, merged, seeds = "--windows 4", "--windows 8 4", range(lab.c.seeds)
    updates = lab.updates(200, 2)
    source = {"ProReflow": "--recipe proreflow", "ours": ""}
    runs, cost = {}, {}
    for method, columns in source.items():
        base = f"{columns} {direct} --updates {updates}"
        equal = lab.within(lab.evaluations(base) / lab.c.scale, f"{columns} {merged}") if columns else None
        for s in seeds:
            pool = f"--seed {s}" if columns else lab.cached(s)
            for alpha in (0, ALPHA):
                arms = {"direct": base, "8→4, equal updates": f"{columns} {merged} --updates {updates}"}
                if equal:
                    arms["8→4, equal evaluations"] = equal
                for arm, options in arms.items():
                    words = arm.replace("→", "-").replace(", ", "-").replace(" ", "-")
                    name = f"ablation/{method}-{words}-{alpha:g}-s{s}"
                    runs[name] = f"{options} --direction-weight {alpha:g} {pool}"
                    cost.setdefault((method, arm, alpha), []).append(name)
    folders = lab.train(runs)
    rows = dict(zip(runs, lab.measure([dict(folder=folders[name] / "student-4", steps=4) for name in runs])))
    found = {key: {column: [rows[name][column] for name in names]
                   for column in ("fd_corrected", "endpoint_error", "clip")}
             for key, names in cost.items()}
    tables, comparisons = [], {}
    for method in source:
        lines = []
        for (_, arm, alpha), values in ((key, value) for key, value in found.items() if key[0] == method):
            name = cost[method, arm, alpha][0]
            c = lab.parse(runs[name])
            lines.append([arm, f"{alpha:g}", c.updates, f"{lab.evaluations(runs[name]) / 1000:.0f}",
                          shown(values["fd_corrected"]),
                          shown(values["endpoint_error"], 4), shown(values["clip"], 1)])
        tables.append((f"{method}: 4 windows, 4 steps, {lab.c.seeds} seeds of training (mean ± 95%)",
                       ["curriculum", "alpha", "updates", "evaluations (1000)", "FD", "endpoint error",
                        "CLIP score"], lines))
    for question in ("progressive against direct", "direction term against none"):
        for method in source:
            for arm in dict.fromkeys(arm for m, arm, _ in found if m == method):
                for unit, column in (("FD", "fd_corrected"), ("endpoint error", "endpoint_error")):
                    if question.startswith("progressive"):
                        compared = [((method, arm, alpha), (method, "direct", alpha),
                                     f"{arm}, alpha {alpha:g}")
                                    for alpha in (0, ALPHA) if arm != "direct"]
                    else:
                        compared = [((method, arm, ALPHA), (method, arm, 0), arm)]
                    for one, other, where in compared:
                        comparisons.setdefault(question, []).append(Comparison(
                            f"{method}: {question}, {where}", found[one][column], found[other][column], unit))
    tests = judge([each for group in comparisons.values() for each in group])
    summary = [f"{question.capitalize()}: " + "; ".join(
        f"by {unit} {counted([each for each in group if each.unit == unit])}"
        for unit in ("FD", "endpoint error")) + "."
        for question, group in comparisons.items()]
    figure, panels = axes(2, sharey=False)
    for axis, method in zip(panels, source):
        keys = [key for key in found if key[0] == method]
        for i, key in enumerate(keys):
            values = found[key]["fd_corrected"]
            mean, half = mean_interval(values)
            color = ORANGE if key[2] else BLUE
            axis.plot(values, [i] * len(values), "o", color=color, alpha=0.4, markersize=4)
            axis.errorbar(mean, i, xerr=half if math.isfinite(half) else None, fmt="D", color=color,
                          capsize=4)
        axis.set(yticks=range(len(keys)), yticklabels=[f"{arm}\nalpha {alpha:g}" for _, arm, alpha in keys],
                 xlabel="FD at 4 steps", title=method)
        axis.invert_yaxis()
    return dict(verdict=[*summary, *(str(each) for group in comparisons.values() for each in group), tests],
                tables=tables, figure=figure)


# ---- 1b. where the lines cross -----------------------------------------------------------------------------

LINES = {"direct-1": ("1", "straight to 1 window", BLUE, "o"),
         "direct-2": ("2", "straight to 2 windows", ORANGE, "s"),
         "progressive": ("8 4 2", "8→4→2", GREEN, "^")}


def crossing(lab):
    """From how many updates on does 8→4→2 beat straight to 2 windows, and straight to 1, at 2
    steps?"""
    plan = {"trajectory": (100, 300, 1000, 3000, 10000), "data": (100, 300, 1000),
            "student": (100, 300, 1000)}
    runs, points = {}, {}
    for source, budgets in plan.items():
        columns = "" if source == "trajectory" else f"--pairs {source}"
        for name, (windows, *_) in LINES.items():
            if (source, name) in (("student", "direct-1"), ("student", "direct-2"), ("data", "direct-1")):
                continue  # a single stage has no previous student; 32 steps a pair are too dear
            for budget in budgets:
                updates = lab.updates(budget, len(windows.split()))
                pool = lab.cached(0, 4096) if source == "trajectory" else "--seed 0"
                points[source, name, budget] = f"crossing/{source}-{name}-{budget}"
                runs[points[source, name,
                            budget]] = f"{columns} --windows {windows} --updates {updates} {pool}"
    folders = lab.train(runs)
    last = {"direct-1": 1, "direct-2": 2, "progressive": 2}
    rows = dict(zip(points, lab.measure([dict(folder=folders[run] / f"student-{last[name]}", steps=2)
                                         for (_, name, _), run in points.items()])))
    lines, verdict = [], []
    for (source, name, budget), row in rows.items():
        lines.append([source, LINES[name][1], budget,
                      f"{lab.evaluations(runs[points[source, name, budget]]) / 1000:.0f}",
                      f"{row['fd_corrected']:.2f}", f"{row['endpoint_error']:.4f}"])
    comparisons = {}
    for source, budgets in plan.items():
        for other in ("direct-2", "direct-1"):
            beaten_by = "data" if source == "student" else source
            for budget in budgets:
                if (beaten_by, other, budget) in rows:
                    comparisons.setdefault((source, other), []).append(Comparison(
                        str(budget),
                        *(rows[key]["fd_groups"]
                          for key in ((source, "progressive", budget), (beaten_by, other, budget))),
                        pairs="groups of images"))
    tests = judge([each for group in comparisons.values() for each in group])
    for (source, other), group in comparisons.items():
        said = {word: [f"{each.label} (by {abs(paired(each.a, each.b)[0]):.2f})"
                       for each in group if each.outcome == word]
                for word in ("better", "worse", "no difference is shown")}
        verdict.append(f"Pairs from {source}: 8→4→2 against {LINES[other][1]} by FD: " + "; ".join(
            f"{word} at {', '.join(labels)}" for word, labels in said.items() if labels) + " updates.")
    verdict.append(f"{tests} The pairs are groups of images: one seed of training, what another would change "
                   "is not in them.")
    figure, panels = axes(len(plan), width=10, sharey=True)
    for axis, source in zip(panels, plan):
        for name, (_, label, color, marker) in LINES.items():
            found = [(budget, row["fd_corrected"]) for (s, n, budget),
                     row in rows.items() if (s, n) == (source, name)]
            if found:
                axis.plot(*zip(*found), color=color, marker=marker, label=label)
        axis.set(xscale="log", yscale="log", xlabel="updates", title=f"pairs from {source}", xlim=(80, 13000))
    for axis in panels:
        plain_numbers(axis, plan["trajectory"])
    panels[0].set_ylabel("FD at 2 steps")
    panels[0].legend(frameon=False)
    return dict(verdict=verdict, figure=figure, tables=[
        ("FD and endpoint error at 2 steps, one seed",
         ["pairs", "curriculum", "updates", "evaluations (1000)", "FD", "endpoint error"], lines)])


# ---- 2. direction weight -----------------------------------------------------------------------------------


def direction_weight(lab):
    """How much weight should the direction have, and in which space is its cosine best taken?"""
    alphas, seeds = {"u": (0, 0.1, 0.3, 1, 3, 10), "eps": (0, 0.3, 3)}, range(min(3, lab.c.seeds))
    names = {(space, alpha, s): f"direction-weight/{space if alpha else 'u'}-{alpha:g}-s{s}"
             for space in alphas for alpha in alphas[space] for s in seeds}
    runs = {name: f"--windows 4 --updates {lab.updates(400)} --direction-weight {alpha:g} "
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


# ---- 3. baselines ------------------------------------------------------------------------------------------

BUDGET = 40_000               # evaluations of every method in baselines and pairs

METHODS = {  # name: (options, fewest steps the student was made for, solver)
    "2-ReFlow": ("--recipe 2-reflow", 1, "ddim"),
    "PeRFlow, ddim_eps": ("--recipe perflow", 4, "ddim"),
    "PeRFlow, velocity": ("--recipe perflow --space velocity", 4, "ddim"),
    "Rectified Diffusion, phased": ("--recipe rectified-diffusion", 4, "ddim"),
    "LCM": ("--recipe lcm", 1, "lcm"),
    "ProReflow-I (8→4)": ("--recipe proreflow --windows 8 4", 4, "ddim"),
    "ProReflow-II (8→4→2)": ("--recipe proreflow --windows 8 4 2", 2, "ddim"),
    "ours (8→4→2→1)": ("", 1, "ddim"),
}

SCHEDULERS = {"DDIM": "ddim", "DPM-Solver++": "dpmsolver++", "UniPC": "unipc"}


def baseline_runs(lab):
    """name -> (run, options), all of one budget; where trajectories are cached, they are part of
    it."""
    found = {}
    for name, (options, *_) in METHODS.items():
        recipe = train.resolve_recipe(lab.parse(options))
        pool = lab.cached(0, 512) if recipe.pairs == "trajectory" else "--seed 0"
        run = "baselines/" + name.split(" (")[0].lower().replace(",", "").replace(" ", "-")
        found[name] = run, lab.within(BUDGET, f"{options} {pool}")
    return found


def baselines(lab):
    """Which method makes the best few-step student at one budget of network evaluations?"""
    named, counts = baseline_runs(lab), (1, 2, 4, 8)
    folders = lab.train(dict(named.values()))
    requests, keys = [], []
    for label, solver in SCHEDULERS.items():
        for steps in counts:
            requests.append(dict(folder=lab.c.model, steps=steps, solver=solver))
            keys.append((f"teacher, {label}", steps))
    for name, (run, options) in named.items():
        last = train.resolve_recipe(lab.parse(options)).stages[-1]
        for steps in counts:
            if steps >= max(METHODS[name][1], last):
                requests.append(dict(folder=folders[run] / f"student-{last}", steps=steps,
                                     solver=METHODS[name][2]))
                keys.append((name, steps))
    requests.append(dict(folder=lab.c.model, steps=32))
    *rows, top = lab.measure(requests)
    rows = dict(zip(keys, rows))
    methods = list(dict.fromkeys(name for name, _ in keys))

    def cell(name, steps):
        row = rows.get((name, steps))
        low, high = row["fd_interval"] if row else (0, 0)
        return f"{row['fd_corrected']:.2f} ({low:.2f} to {high:.2f})" if row else "-"
    lines = [[name, lab.parse(named[name][1]).updates if name in named else "-",
              f"{lab.evaluations(named[name][1]) / 1000:.0f}" if name in named else "0",
              *(cell(name, steps) for steps in counts)]
             for name in methods]
    comparisons = []
    for steps in counts:
        first, second = sorted((name for name in methods if (name, steps) in rows),
                               key=lambda name: rows[name, steps]["fd_corrected"])[:2]
        label = ", then ".join(f"{name} ({rows[name, steps]['fd_corrected']:.2f})"
                               for name in (first, second))
        comparisons.append(Comparison(f"At {steps} step{'s' * (steps > 1)}, lowest {label}",
                                      *(rows[name, steps]["fd_groups"] for name in (first, second)),
                                      pairs="groups of images"))
    tests = judge(comparisons)
    verdict = [*map(str, comparisons),
               f"{tests} Which are the two is read off the same images, and each is one seed of training: a "
               "lead that is shown here may still be that seed's."]
    verdict.append(
        "The teacher at 32 steps of DDIM has {:.2f} ({:.2f} to {:.2f}).".format(top["fd_corrected"],
                                                                                *top["fd_interval"]))
    figure, (axis,) = axes(height=4.4)
    styles = [(color, marker) for marker in "os^" for color in (BLUE, VERMILION, GREEN, PINK)]
    for name, (color, marker) in zip(methods, styles):
        found = [(steps, row["fd_corrected"]) for (n, steps), row in rows.items() if n == name]
        axis.plot(*zip(*found), color=color, marker=marker, label=name,
                  linestyle=":" if name.startswith("teacher") else "-")
    axis.axhline(top["fd_corrected"], color=BLACK, linewidth=1, linestyle="--", label="teacher, 32 steps")
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="FD")
    plain_numbers(axis, counts)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return dict(verdict=verdict, figure=figure, tables=[
        (f"FD (95% over images), one seed of training, {BUDGET * lab.c.scale / 1000:g} thousand evaluations "
         "for each method",
         ["method", "updates", "evaluations (1000)",
          *(f"{steps} step{'s' * (steps > 1)}" for steps in counts)], lines)])


def samples(lab):
    """What do the same seeds look like?"""
    named = baseline_runs(lab)
    folders = lab.train(dict(named.values()))
    chosen = (("PeRFlow", "PeRFlow, ddim_eps", 4), ("ProReflow-I", "ProReflow-I (8→4)", 4),
              ("ProReflow-II", "ProReflow-II (8→4→2)", 2), ("ours", "ours (8→4→2→1)", 1))
    columns = [("teacher", lab.c.model, 32), ("plain DDIM", lab.c.model, 4)]
    columns += [(title, folders[named[name][0]] / f"student-{steps}", steps) for title, name, steps in chosen]
    prompts, pictures = list(evaluation.GRID_PROMPTS), []
    for _, folder, steps in columns:
        pipeline, model, info = saved.open_model(str(folder), lab.device)
        z = sampler.generate(pipeline, model, prompts, range(len(prompts)),
                             sampler.time_grid(steps, info.get("windows", 1)))
        pictures.append(imaging.to_pil(models.decode(pipeline, z), scale=3))
    titles = [f"{title}\n{steps} step{'s' * (steps > 1)}" for title, _, steps in columns]
    grid = imaging.contact_sheet(list(zip(*pictures)), titles, prompts)
    figure = plt.figure(figsize=(grid.width / DPI, grid.height / DPI), dpi=DPI)
    figure.figimage(np.asarray(grid))                       # pixel by pixel
    verdict = [f"Seeds 0 to {len(prompts) - 1}, guidance 1; the students are those of the study baselines."]
    return dict(verdict=verdict, figure=figure, tables=[])


# ---- 4. discrepancy ----------------------------------------------------------------------------------------


def progressive_run(lab):
    """The run whose students of 8, 4, 2 (and 1) windows several studies look at."""
    updates = lab.updates(3000, 4)
    name = "crossing/trajectory-progressive-1-3000"
    return lab.train({name: f"--windows 8 4 2 1 --updates {updates} {lab.cached(0, 4096)}"})[name]


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


# ---- 5. noise ----------------------------------------------------------------------------------------------


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
    sizes, kinds, steps = (0.05, 0.1, 0.2, 0.4), ("direction", "magnitude"), 8
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
    verdict.insert(0, f"Direction costs more at {sum(each.outcome == 'worse' for each in comparisons)} of "
                      f"{len(sizes)} sizes, most at {max(worse, key=worse.get):g} |u|, by "
                      f"{max(worse.values()):.2f} FD.")
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


# ---- 6. guidance -------------------------------------------------------------------------------------------

SCALES = (1, 2, 3, 4, 5, 6, 7)


def guidance(lab):
    """What does guidance do to a student that was trained without (ProReflow's Fig. 3)?"""
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


# ---- 7. pairs ----------------------------------------------------------------------------------------------


def pairs(lab):
    """Real images, the previous student, or the teacher's own cached trajectories: what is the best
    source at equal cost?"""
    sources, stages, seeds = ("trajectory", "data", "student"), (8, 4, 2), range(min(3, lab.c.seeds))
    runs = {(source, s): (f"pairs/{source}-s{s}", lab.within(BUDGET, f"--pairs {source} --windows 8 4 2 "
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


# ---- 8. one step -------------------------------------------------------------------------------------------

TARGETS = {1: 1.5, 2: 1.2, 4: 1.0}    # FD at these steps, as a multiple of the teacher's at 32


def one_step(lab):
    """What does it take to be good at 1, 2 and 4 steps? ProReflow stops at 2."""
    updates = lab.updates(3000, 4)
    pool = lab.cached(0, 4096)
    ideas = {
        "8→4→2→1": f"--windows 8 4 2 1 --updates {updates} {pool}",
        "straight to 1 window": f"--windows 1 --updates {updates} {pool}",
        "8→4→2, two windows kept": f"--windows 8 4 2 --updates {updates} {pool}",
    }
    names = dict(zip(ideas, ("crossing/trajectory-progressive-1-3000", "crossing/trajectory-direct-1-3000",
                             "crossing/trajectory-progressive-3000")))
    folders = lab.train({names[idea]: options for idea, options in ideas.items()})
    students = {idea: folders[name] / f"student-{2 if 'kept' in idea else 1}" for idea, name in names.items()}
    students |= {f"8→4→2→1, after {k} windows": folders[names["8→4→2→1"]] / f"student-{k}" for k in (4, 2)}
    keys = [(idea, steps) for idea, folder in students.items()
            for steps in TARGETS if steps >= int(folder.name.split("-")[1])]
    top, *rows = lab.measure([dict(folder=lab.c.model, steps=32)] +
                             [dict(folder=students[idea], steps=steps) for idea, steps in keys])
    rows = dict(zip(keys, rows))

    def cell(idea, steps):
        row = rows.get((idea, steps))
        if not row:
            return "-"
        times = row["fd_corrected"] / top["fd_corrected"]
        return f"{row['fd_corrected']:.2f} ({times:.2f} x); {row['clip']:.1f}"
    lines = [[idea, *(cell(idea, steps) for steps in TARGETS)] for idea in students]
    verdict = []
    for steps, most in TARGETS.items():
        ratio, idea = min((row["fd_corrected"] / top["fd_corrected"], idea) for (idea, s),
                          row in rows.items() if s == steps)
        reached = "met" if ratio <= most else f"missed by {ratio - most:.2f}"
        verdict.append(f"{steps} step{'s' * (steps > 1)}: {ratio:.2f} x the teacher's FD by {idea}; the "
                       f"target {most:g} x is {reached}.")
    figure, (axis,) = axes(width=7)
    for (idea, _), (color, marker) in zip(students.items(),
                                          ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PINK, "D"),
                                           (VERMILION, "v"))):
        found = [(steps, row["fd_corrected"] / top["fd_corrected"]) for (i, steps),
                 row in rows.items() if i == idea]
        axis.plot(*zip(*found), color=color, marker=marker, label=idea)
    axis.plot(*zip(*TARGETS.items()), color=BLACK, linestyle="--", marker="_", label="target")
    axis.set(xscale="log", xticks=list(TARGETS), xticklabels=list(TARGETS), xlabel="steps",
             ylabel="FD / teacher's FD at 32 steps")
    axis.minorticks_off()
    axis.legend(frameon=False)
    return dict(verdict=verdict, figure=figure, tables=[
        (f"FD (multiple of the teacher's {top['fd_corrected']:.2f} at 32 steps); CLIP score (the teacher's: "
         f"{top['clip']:.1f}); {updates} updates, one seed", ["student", "1 step", "2 steps", "4 steps"],
         lines)])
