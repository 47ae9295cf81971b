"""ProReflow's two ideas, each against doing without it at equal cost: windows that merge, and a loss that
weighs direction."""
import math

import reflow
import train
from studies.plots import BLACK, BLUE, GREEN, ORANGE, axes, plain_numbers
from studies.runner import Comparison, counted, judge, mean_interval, shown

BUDGETS = {400: 1536}              # updates of 64 of the whole curriculum -> trajectories

PROGRESSIVE, WITHOUT, STRAIGHT = "8→4→2→1", "8→4→2→1, no direction term", "straight"

STYLES = {PROGRESSIVE: (BLUE, "o"), WITHOUT: (GREEN, "^"), STRAIGHT: (ORANGE, "s")}

SQUARED = "--loss mse"             # the papers' curriculum is judged by plain squared error; the default
                                   # recipe has the high-pass loss

KEPT = 4, 2, 1                     # the windows whose students are compared, one step per window


def arms(lab, updates, trajectories, seed):
    """{(arm, windows): (name of the run, its options)}: the students of these windows. Straight to K windows
    has as many updates as the curriculum had when its student of K windows was done."""
    shared = f"{SQUARED} --batch 64 {lab.cached(seed, trajectories)}"
    whole = lab.updates(updates, 4)
    recipe, done, found = train.resolve_recipe(lab.parse("")), 0, {}
    for windows, count in zip(recipe.stages, reflow.stage_updates(recipe, whole)):
        done += count
        if windows not in KEPT:
            continue
        for arm, name, options in (
                (PROGRESSIVE, "progressive", f"--updates {whole}"),
                (WITHOUT, "no-direction", f"--updates {whole} --direction-weight 0"),
                (STRAIGHT, f"straight-{windows}", f"--windows {windows} --updates {done}")):
            found[arm, windows] = f"curriculum/{name}-{updates}-s{seed}", f"{options} {shared}"
    return found


def curriculum(lab):
    """Do merging windows beat straight training to as many windows at equal cost, and does the direction
    term help?"""
    seeds = range(min(3, lab.c.seeds))
    runs = {(*key, updates, s): run for updates, trajectories in BUDGETS.items() for s in seeds
            for key, run in arms(lab, updates, trajectories, s).items()}
    folders = lab.train(dict(runs.values()))
    *plain, top = lab.measure([*(dict(folder=lab.c.model, steps=k) for k in (8, *KEPT)),
                               dict(folder=lab.c.model, steps=32)])
    plain = dict(zip((8, *KEPT), plain))
    rows = dict(zip(runs, lab.measure([dict(folder=folders[name] / f"student-{k}", steps=k)
                                       for (_, k, _, _), (name, _) in runs.items()])))

    def column(arm, k, updates, name="fd_corrected"):
        return [rows[arm, k, updates, s][name] for s in seeds]

    def followed(arm, k, updates):
        return [100 * row["all"] for row in column(arm, k, updates, "prompt_accuracy")]
    lines = [[label, k, "-", f"{row['fd_corrected']:.2f}", f"{row['fd_corrected'] / top['fd_corrected']:.2f}",
              f"{row['endpoint_error']:.3f}", f"{100 * row['prompt_accuracy']['all']:.1f}"]
             for label, k, row in [("teacher", 32, top), *(("plain DDIM", k, plain[k]) for k in plain)]]
    for updates in BUDGETS:
        for k in KEPT:
            for arm in STYLES:
                samples = 64 * lab.parse(runs[arm, k, updates, 0][1]).updates
                if arm != STRAIGHT:                        # until the student of k windows was done
                    samples = 64 * lab.parse(runs[STRAIGHT, k, updates, 0][1]).updates
                lines.append([arm + (f" to {k}" if arm == STRAIGHT else ""), k, f"{samples:,}",
                              shown(column(arm, k, updates)),
                              shown([fd / top["fd_corrected"] for fd in column(arm, k, updates)]),
                              shown(column(arm, k, updates, "endpoint_error"), 3),
                              shown(followed(arm, k, updates), 1)])
    questions = {f"{PROGRESSIVE} against straight training": (PROGRESSIVE, STRAIGHT),
                 "The direction term against none": (PROGRESSIVE, WITHOUT)}
    groups = {question: [Comparison(f"{question}, {64 * lab.updates(updates, 4):,} samples, {k} "
                                    f"step{'s' * (k > 1)}", column(one, k, updates, name),
                                    column(other, k, updates, name), unit)
                         for updates in BUDGETS for k in KEPT
                         for unit, name in (("FD", "fd_corrected"), ("endpoint error", "endpoint_error"))]
              for question, (one, other) in questions.items()}
    tests = judge([each for group in groups.values() for each in group])
    last = max(BUDGETS)
    verdict = [*(f"{question}: " + "; ".join(f"by {unit} " + counted([each for each in group
                                                                     if each.unit == unit])
                                             for unit in ("FD", "endpoint error"))
                 + (", of one seed of training, which can show none." if len(seeds) == 1 else ".")
                 for question, group in groups.items()),
               f"{PROGRESSIVE} after {64 * lab.updates(last, 4):,} samples stands at "
               + ", ".join(shown([fd / top["fd_corrected"] for fd in column(PROGRESSIVE, k, last)])
                           for k in KEPT)
               + f" times the teacher's FD in {', '.join(map(str, KEPT))} steps, plain DDIM at "
               + ", ".join(f"{plain[k]['fd_corrected'] / top['fd_corrected']:.2f}" for k in KEPT) + ".",
               *(str(each) for group in groups.values() for each in group), tests]
    figure, panels = axes(len(KEPT), width=11)
    for axis, k in zip(panels, KEPT):
        for i, (arm, (color, marker)) in enumerate(STYLES.items()):
            found = [mean_interval(column(arm, k, updates)) for updates in BUDGETS]
            spent = [64 * lab.parse(runs[STRAIGHT, k, updates, 0][1]).updates * 1.06 ** (i - 1)
                     for updates in BUDGETS]               # side by side, not on top of each other
            axis.errorbar(spent, [mean for mean, _ in found], color=color, marker=marker, capsize=3,
                          yerr=[half if math.isfinite(half) else 0 for _, half in found], label=arm)
        axis.axhline(plain[k]["fd_corrected"], color=BLACK, linestyle=":", linewidth=1, label="plain DDIM")
        axis.axhline(top["fd_corrected"], color=BLACK, linestyle="--", linewidth=1,
                     label="teacher, 32 steps")
        axis.set(title=f"{k} window{'s' * (k > 1)}, {k} step{'s' * (k > 1)}", xlabel="samples", xscale="log",
                 yscale="log")
        spent = [64 * lab.parse(runs[STRAIGHT, k, updates, 0][1]).updates for updates in BUDGETS]
        axis.set_xlim(spent[0] / 1.5, spent[-1] * 1.5)
        plain_numbers(axis, spent)
    panels[0].set_ylabel("FD")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return dict(verdict=verdict, figure=figure, tables=[
        (f"One step per window, {len(seeds)} seed{'s' * (len(seeds) > 1)} of training (mean ± 95%)",
         ["training", "steps", "samples", "FD", "times the teacher's", "endpoint error",
          "prompts followed (%)"], lines)])
