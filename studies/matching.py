"""Distribution matching beside reflow, in one step, at equal cost."""
import math

from studies import curriculum
from studies.plots import BLACK, BLUE, ORANGE, axes
from studies.runner import Comparison, judge, mean_interval, shown

WEIGHTS = 0, 0.3

UPDATES, TRAJECTORIES = 400, 1536      # of the student of one window that all begin with, by reflow alone

BUDGET = 150_000                       # network evaluations after it

TRAINING = "--recipe reflow --optimizer muon --lr 3e-4 --batch 64"

MEASURES = {                           # what is compared: (name in a row, unit, title, digits)
    "fd": (lambda row: row["fd_corrected"], "FD", "FD", 2),
    "prompts": (lambda row: 100 - 100 * row["prompt_accuracy"]["all"], "% of prompts not followed",
                "prompts not followed (%)", 1),
    "endpoint": (lambda row: row["endpoint_error"], "endpoint error", "endpoint error", 3)}


def beginning(lab, seed):
    """(name of a run, its options): reflow alone, straight to one window, as in the study of the
    curriculum."""
    return curriculum.arms(lab, UPDATES, TRAJECTORIES, seed)[curriculum.STRAIGHT, 1]


def runs(lab, seed, begin):
    """{weight: (name of the run, its options)}, all of the same cost, with the same trajectories, from the
    student in the folder begin."""
    shared = f"{TRAINING} {lab.cached(seed, TRAJECTORIES)} --init {begin}"
    there = lab.costs(shared)[0] / lab.c.scale              # the trajectories, which it has begun with
    return {weight: (f"matching/{weight}-s{seed}",
                     lab.within(BUDGET + there, f"{shared} --matching {weight}")) for weight in WEIGHTS}


def matching(lab):
    """Is it better to go on with a student of one step by reflow alone, or with distribution matching beside
    it, at equal cost?"""
    seeds = range(min(3, lab.c.seeds))
    begun = lab.train(dict(beginning(lab, s) for s in seeds))
    trained = {(weight, s): run for s in seeds
               for weight, run in runs(lab, s, begun[beginning(lab, s)[0]] / "student-1").items()}
    folders = lab.train(dict(trained.values()))
    plain, top = lab.measure([dict(folder=lab.c.model, steps=steps) for steps in (1, 32)])
    first = lab.measure([dict(folder=folder / "student-1", steps=1) for folder in begun.values()])
    rows = dict(zip(trained, lab.measure([dict(folder=folders[name] / "student-1", steps=1)
                                          for name, _ in trained.values()])))
    columns = {name: {weight: [read(rows[weight, s]) for s in seeds] for weight in WEIGHTS}
               for name, (read, *_) in MEASURES.items()}
    lines = [[label, "-", *(f"{read(row):.{digits}f}" for read, _, _, digits in MEASURES.values())]
             for label, row in (("teacher, 32 steps", top), ("plain DDIM, 1 step", plain))]
    lines.append(["the student they begin with", lab.parse(beginning(lab, 0)[1]).updates,
                  *(shown([read(row) for row in first], digits) for read, _, _, digits in MEASURES.values())])
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
    verdict = [f"Lowest FD in one step: {f'weight {best:g}' if best else 'reflow alone'}, {mean[best]:.2f}, "
               f"for {mean[0]:.2f} of reflow alone, {plain['fd_corrected']:.2f} of plain DDIM and "
               f"{top['fd_corrected']:.2f} of the teacher in 32 steps.",
               *(str(each) for group in comparisons.values() for each in group), tests]

    figure, panels = axes(len(MEASURES), width=11)
    for axis, (name, (read, _, title, _)) in zip(panels, MEASURES.items()):
        means, halves = zip(*(mean_interval(columns[name][weight]) for weight in WEIGHTS))
        axis.errorbar(range(len(WEIGHTS)), means, [half if math.isfinite(half) else 0 for half in halves],
                      color=BLUE, fmt="o", capsize=3, label="after it, 1 step")
        axis.axhline(read(top), color=BLACK, linestyle="--", linewidth=1, label="teacher, 32 steps")
        axis.axhline(sum(map(read, first)) / len(seeds), color=ORANGE, linestyle=":", linewidth=1,
                     label="what they begin with")
        axis.set(title=title, xlabel="weight of distribution matching", xlim=(-0.5, len(WEIGHTS) - 0.5),
                 xticks=range(len(WEIGHTS)),
                 xticklabels=[f"{weight:g}" if weight else "reflow alone" for weight in WEIGHTS])
        axis.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    return dict(verdict=verdict, figure=figure, tables=[
        (f"One window, one step; {BUDGET * lab.c.scale / 1000:g} thousand network evaluations each after the "
         f"student that they begin with, {len(seeds)} seed{'s' * (len(seeds) > 1)} of training (mean ± 95%)",
         ["training", "updates of 64", *(title for _, _, title, _ in MEASURES.values())], lines)])
