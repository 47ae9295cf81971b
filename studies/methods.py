"""Every method under one rule: a small sweep, then the same budgets of network evaluations, then fresh seeds
and noise."""
import math

import train
from runtime import cli
from studies.curriculum import SQUARED
from studies.plots import BLACK, BLUE, GREEN, ORANGE, PINK, VERMILION, axes, plain_numbers
from studies.runner import Comparison, judge, mean_interval, shown

METHODS = {                        # name: (options, solver)
    "PeRFlow": ("--recipe perflow", "ddim"),
    "PeRFlow uniform": ("--recipe perflow", "ddim"),
    "Rectified Diffusion": ("--recipe rectified-diffusion", "ddim"),
    "ProReflow-I (8→4)": ("--recipe proreflow --windows 8 4", "ddim"),
    "ProReflow-II (8→4→2)": ("--recipe proreflow --windows 8 4 2", "ddim"),
    "2-ReFlow": ("--recipe 2-reflow", "ddim"),
    "Simple ReFlow": ("--recipe simple-reflow", "ddim"),
    "LCM": ("--recipe lcm", "lcm"),
    "imitation": ("--recipe imitation", "ddim"),
    "flow map": ("--recipe flow-map", "ddim"),
    "curriculum": (SQUARED, "ddim"),
    "default": ("", "ddim"),
}

AS_PUBLISHED = ("PeRFlow uniform",)   # swept over rates alone, with the time law of its paper

OURS = "default"                   # compared with all others

PEERS, PEER_SEEDS = ("Rectified Diffusion", "2-ReFlow", "Simple ReFlow", "LCM", "imitation", "flow map"), 3
                                   # three seeds of training at most: no claim of ours is about these

BUDGETS = 10_000, 30_000, 100_000  # network evaluations of a run, its trajectories included; the sweep has
                                   # the first, a tenth of the last

IN_TRAJECTORIES = 0.25             # of the budget, where trajectories are cached: as of the default recipe

RATES = ("adamw", 2e-4), ("adamw", 6e-4), ("muon", 1e-3)   # of the sweep, each with the recipe's time law
                                   # and with another

SWEEP_SEED, SWEEP_NOISE = 100, 2_000_000   # that judge nothing else

STEPS = 1, 2, 4, 8


def options_of(lab, method, rate, starts, budget, seed):
    """The options of a run of this method within a budget of evaluations. rate: of RATES; starts: half of
    the times at window starts; else the law of the recipe's paper, uniform where it tells none."""
    (options, _), (optimizer, lr) = METHODS[method], rate
    recipe = train.resolve_recipe(lab.parse(options))
    law = "starts" if starts else "uniform" if recipe.time_law == "starts" else recipe.time_law
    options += f" --batch 32 --optimizer {optimizer} --lr {lr:g} --time-law {law}"
    if recipe.pairs == "trajectory":
        options += " " + lab.cached(seed, IN_TRAJECTORIES * budget / recipe.solver_steps)
    else:
        options += f" --seed {seed}"
    return lab.within(budget, options)


def stages(lab, method):
    return train.resolve_recipe(lab.parse(METHODS[method][0])).stages


def students(lab, method, folder):
    """{steps: what to measure}: a student at as many steps as it has windows, the last one at more than any
    has."""
    found = {}
    for steps in STEPS:
        fitting = [windows for windows in stages(lab, method) if windows <= steps]
        if fitting:
            found[steps] = dict(folder=folder / f"student-{max(fitting)}", steps=steps,
                                solver=METHODS[method][1])
    return found


def asked_for(lab):
    """The methods of this study, --methods as slug names them.  Raises UserError on one that it does not
    know."""
    known = {slug(method): method for method in METHODS}
    return [cli.choose("--methods", name, known) for name in lab.c.methods or known]


def sweep(lab):
    """Optimizer, learning rate and time law of each method, at the smallest budget, by FD in the fewest steps
    that its student is made for.  Returns: {method: (rate, starts)}, the lines of a table."""
    keys = [(method, rate, starts) for method in asked_for(lab) for rate in RATES
            for starts in (False, True) if not starts or method not in AS_PUBLISHED]
    names = {(method, (optimizer, lr), starts):
             f"methods/sweep/{slug(method)}-{optimizer}-{lr:g}-{'starts' if starts else 'own'}"
             for method, (optimizer, lr), starts in keys}
    folders = lab.train({names[key]: options_of(lab, *key, min(BUDGETS), SWEEP_SEED) for key in keys})
    asked = [dict(folder=folders[names[key]] / f"student-{stages(lab, key[0])[-1]}",
                  steps=stages(lab, key[0])[-1], solver=METHODS[key[0]][1], seed=SWEEP_NOISE) for key in keys]
    fd = {key: row["fd_corrected"] for key, row in zip(keys, lab.measure(asked))}
    chosen, lines = {}, []
    for method in asked_for(lab):
        best = min((key for key in keys if key[0] == method), key=fd.get)
        chosen[method] = best[1:]
        for starts in sorted({key[2] for key in keys if key[0] == method}):
            lines.append([method, stages(lab, method)[-1], "half at starts" if starts else "without",
                          *(f"**{fd[method, rate, starts]:.2f}**" if best == (method, rate, starts) else
                            f"{fd[method, rate, starts]:.2f}" for rate in RATES)])
    return chosen, lines


def slug(method):
    return method.split(" (")[0].lower().replace(" ", "-")


def methods(lab):
    """Which method makes the best few-step student at equal cost, each tuned by the same rule?"""
    names, (chosen, swept) = asked_for(lab), sweep(lab)
    seeds = {method: range(min(lab.c.seeds, PEER_SEEDS) if method in PEERS else lab.c.seeds)
             for method in names}
    runs = {(method, budget, s): (f"methods/{slug(method)}-{budget}-s{s}",
                                  options_of(lab, method, *chosen[method], budget, s))
            for budget in BUDGETS for s in range(lab.c.seeds) for method in names if s in seeds[method]}
    folders = lab.train(dict(runs.values()))
    asked = {(method, budget, s, steps): request for (method, budget, s), (name, _) in runs.items()
             for steps, request in students(lab, method, folders[name]).items()}
    *plain, top = lab.measure([dict(folder=lab.c.model, steps=steps) for steps in (*STEPS, 32)])
    plain, rows = dict(zip(STEPS, plain)), dict(zip(asked, lab.measure(list(asked.values()))))

    def column(method, steps, budget, name="fd_corrected"):
        return [rows[method, budget, s, steps][name] for s in seeds.get(method, ())
                if (method, budget, s, steps) in rows]

    def compare(method, other, steps):
        """Of the seeds that both have."""
        pairs = list(zip(column(method, steps, most), column(other, steps, most)))
        if pairs:
            comparisons.append(Comparison(
                f"{method} against {other} in {steps} step{'s' * (steps > 1)}", *map(list, zip(*pairs))))

    def cell(values, digits=2):
        return shown(values, digits) if values else "-"
    most = max(BUDGETS)
    tables = []
    for title, name, digits in (("FD", "fd_corrected", 2), ("Endpoint error", "endpoint_error", 3)):
        lines = [["teacher, plain DDIM", "-", "-", "-",
                  *(f"{plain[steps][name]:.{digits}f}" for steps in STEPS)]]
        for budget in reversed(BUDGETS):
            for method in names:
                lines.append([method, len(seeds[method]), f"{budget * lab.c.scale / 1000:g}",
                              lab.parse(runs[method, budget, 0][1]).updates,
                              *(cell(column(method, steps, budget, name), digits) for steps in STEPS)])
        tables.append((f"{title} over seeds of training (mean ± 95%); evaluations and updates are those of "
                       "the whole run, of which a student of more windows than the last has taken a part; "
                       f"the teacher in 32 steps: FD {top['fd_corrected']:.2f}",
                       ["method", "seeds", "evaluations (1000)", "updates of 32",
                        *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS)], lines))
    lines = []
    for method in names:
        values = [[100 * row["all"] for row in column(method, steps, most, "prompt_accuracy")]
                  for steps in STEPS]
        lines.append([method, *(cell(each, 1) for each in values)])
    lines.append(["teacher, plain DDIM", *(f"{100 * plain[steps]['prompt_accuracy']['all']:.1f}"
                                           for steps in STEPS)])
    tables.append((f"Prompts followed (%) after {most * lab.c.scale / 1000:g} thousand evaluations; the "
                   f"teacher in 32 steps: {100 * top['prompt_accuracy']['all']:.1f}",
                   ["method", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS)], lines))
    tables.append((f"The sweep: FD after {min(BUDGETS) * lab.c.scale / 1000:g} thousand evaluations, one "
                   "seed and noise of their own",
                   ["method", "steps", "times", *(f"{optimizer}, {lr:g}" for optimizer, lr in RATES)], swept))

    comparisons = []
    for method, steps in (("ProReflow-I (8→4)", 4), ("ProReflow-II (8→4→2)", 2), ("PeRFlow", 4),
                          ("PeRFlow uniform", 4)):
        values = column(method, steps, most)
        if values:
            comparisons.append(Comparison(f"{method} against plain DDIM in {steps} steps", values,
                                          [plain[steps]["fd_corrected"]] * len(values)))
    for other in ("PeRFlow", "PeRFlow uniform"):
        compare("ProReflow-I (8→4)", other, 4)
    for method in names:
        if method != OURS:
            compare(OURS, method, stages(lab, method)[-1])        # what the other's last student is made for
    tests = judge(comparisons)
    verdict = []
    for steps in (4, 2, 1):
        mean = {method: mean_interval(column(method, steps, most))[0] for method in names
                if column(method, steps, most)}
        order = ", then ".join(f"{method} ({mean[method]:.2f})" for method in sorted(mean, key=mean.get)[:2])
        if mean:
            verdict.append(f"In {steps} step{'s' * (steps > 1)} {'lowest ' * (len(mean) > 1)}{order}; plain "
                           f"DDIM {plain[steps]['fd_corrected']:.2f}.")
    if {OURS, "PeRFlow"} <= set(names):
        goal = mean_interval(column("PeRFlow", 4, most))[0]
        reached = [budget for budget in BUDGETS if mean_interval(column(OURS, 4, budget))[0] <= goal]
        verdict.append(f"PeRFlow's FD in 4 steps after {most * lab.c.scale / 1000:g} thousand evaluations, "
                       f"{goal:.2f}, {OURS} " +
                       (f"reaches after {reached[0] * lab.c.scale / 1000:g} thousand." if reached else
                        "does not reach."))
    verdict += [*map(str, comparisons), tests]

    figure, panels = axes(3, width=12, height=4.4)
    styles = [(color, *style) for style in (("o", "-"), ("s", "-."), ("^", ":"))
              for color in (BLUE, VERMILION, GREEN, PINK, ORANGE)]
    for axis, steps in zip(panels, (1, 2, 4)):
        for method, (color, marker, line) in zip(names, styles):
            found = [(budget, *mean_interval(column(method, steps, budget))) for budget in BUDGETS
                     if column(method, steps, budget)]
            if found:
                spent, means, halves = zip(*found)
                axis.errorbar(spent, means, color=color, marker=marker, linestyle=line, capsize=3,
                              label=method, yerr=[half if math.isfinite(half) else 0 for half in halves])
        axis.axhline(plain[steps]["fd_corrected"], color=BLACK, linestyle=":", linewidth=1,
                     label="plain DDIM")
        axis.axhline(top["fd_corrected"], color=BLACK, linestyle="--", linewidth=1,
                     label="teacher, 32 steps")
        axis.set(xscale="log", yscale="log", xlabel="network evaluations",
                 title=f"{steps} step{'s' * (steps > 1)}")
        plain_numbers(axis)
    panels[0].set_ylabel("FD")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return dict(verdict=verdict, figure=figure, tables=tables)
