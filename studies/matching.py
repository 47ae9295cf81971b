"""Distribution matching beside reflow, in one step, at equal cost."""
import math

from studies.plots import BLACK, BLUE, ORANGE, axes
from studies.runner import Comparison, judge, mean_interval, shown

WEIGHTS = 0, 0.1, 0.3, 1

BUDGET, TRAJECTORIES = 250_000, 1536   # network evaluations of a run, its trajectories included

TRAINING = "--recipe reflow --optimizer muon --lr 1e-3 --batch 64"

MEASURES = {                           # what is compared: (name in a row, unit, title, digits)
    "fd": (lambda row: row["fd_corrected"], "FD", "FD", 2),
    "prompts": (lambda row: 100 - 100 * row["prompt_accuracy"]["all"], "% of prompts not followed",
                "prompts not followed (%)", 1),
    "endpoint": (lambda row: row["endpoint_error"], "endpoint error", "endpoint error", 3)}


def runs(lab, seed):
    """{weight: (name of the run, its options)}, all of the same cost and from the same trajectories."""
    shared = f"{TRAINING} {lab.cached(seed, TRAJECTORIES)}"
    return {weight: (f"matching/{weight}-s{seed}", lab.within(BUDGET, f"{shared} --matching {weight}"))
            for weight in WEIGHTS}


def matching(lab):
    """Does distribution matching beside reflow make a better student of one step, at equal cost?"""
    seeds = range(min(3, lab.c.seeds))
    trained = {(weight, s): run for s in seeds for weight, run in runs(lab, s).items()}
    folders = lab.train(dict(trained.values()))
    plain, top = lab.measure([dict(folder=lab.c.model, steps=steps) for steps in (1, 32)])
    rows = dict(zip(trained, lab.measure([dict(folder=folders[name] / "student-1", steps=1)
                                          for name, _ in trained.values()])))
    columns = {name: {weight: [read(rows[weight, s]) for s in seeds] for weight in WEIGHTS}
               for name, (read, *_) in MEASURES.items()}
    lines = [[label, "-", *(f"{read(row):.{digits}f}" for read, _, _, digits in MEASURES.values())]
             for label, row in (("teacher, 32 steps", top), ("plain DDIM, 1 step", plain))]
    for weight in WEIGHTS:
        lines.append([f"weight {weight:g}" if weight else "reflow alone",
                      lab.parse(trained[weight, 0][1]).updates, *(
                          shown(columns[name][weight], digits)
                          for name, (_, _, _, digits) in MEASURES.items())])
    comparisons = {name: [Comparison(f"Weight {weight:g} against reflow alone", columns[name][weight],
                                     columns[name][0], unit) for weight in WEIGHTS[1:]]
                   for name, (_, unit, _, _) in MEASURES.items()}
    tests = judge([each for group in comparisons.values() for each in group])
    mean = {weight: sum(values) / len(seeds) for weight, values in columns["fd"].items()}
    best = min(WEIGHTS, key=mean.get)
    against = next((str(each) for weight, each in zip(WEIGHTS[1:], comparisons["fd"]) if weight == best), "")
    verdict = [f"Lowest FD in one step: {f'weight {best:g}' if best else 'reflow alone'}, {mean[best]:.2f}, "
               f"for {mean[0]:.2f} of reflow alone, {plain['fd_corrected']:.2f} of plain DDIM and "
               f"{top['fd_corrected']:.2f} of the teacher in 32 steps. {against}".strip(),
               *(str(each) for group in comparisons.values() for each in group), tests]

    figure, panels = axes(len(MEASURES), width=11)
    for axis, (name, (read, _, title, _)) in zip(panels, MEASURES.items()):
        means, halves = zip(*(mean_interval(columns[name][weight]) for weight in WEIGHTS))
        axis.errorbar(range(len(WEIGHTS)), means, [half if math.isfinite(half) else 0 for half in halves],
                      color=BLUE, marker="o", capsize=3, label="student, 1 step")
        axis.axhline(read(top), color=BLACK, linestyle="--", linewidth=1, label="teacher, 32 steps")
        axis.axhline(means[0], color=ORANGE, linestyle=":", linewidth=1, label="reflow alone")
        axis.set(title=title, xlabel="weight of distribution matching",
                 xticks=range(len(WEIGHTS)), xticklabels=[f"{weight:g}" for weight in WEIGHTS])
        axis.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    return dict(verdict=verdict, figure=figure, tables=[
        (f"One window, one step; {BUDGET * lab.c.scale / 1000:g} thousand network evaluations each, "
         f"{len(seeds)} seed{'s' * (len(seeds) > 1)} of training (mean ± 95%)",
         ["training", "updates of 64", *(title for _, _, title, _ in MEASURES.values())], lines)])
