"""The questions to Simple ReFlow's seven improvements, and which of them go with ProReflow's
curriculum. Solver and grid cost no training, so that all of them can be measured on one student."""
import itertools
import math
import re

import torch

import losses
import models
import reflow
import train
from evaluation import metrics
from models import load
from studies import curriculum
from studies.plots import BLACK, BLUE, GREEN, ORANGE, PINK, axes, plain_numbers
from studies.runner import Comparison, evaluator, judge, mean_interval, paired, shown

# in the paper's order: name -> (option without, option with). What the paper leaves unknown is ours: lambda,
# rho, epsilon, both rates of dropout (0.13 is EDM's for CIFAR-10, whose smaller value is unknown;
# the embedded teacher itself was trained without)
ITEMS = {
    "loss normalization": ("--normalization none", "--normalization learned"),
    "time law 10^t": ("--time-law uniform", "--time-law exponential"),
    "high-pass loss": ("--loss mse", "--loss high-pass"),
    "smaller dropout": ("--dropout 0.13", "--dropout 0"),
    "forward pairs": ("--forward-rate 0", "--forward-rate 0.5"),
    "projected pairs": ("--projection 0", "--projection 0.5"),
}

# the seventh item: how it is sampled, nine evaluations in five steps
PLAIN, BETTER = "heun", "dpm2:0.5/sigmoid:10"

NINE = 5

LAMBDAS = (0, 1, 3, 10)

RATIOS, GRIDS = (0.3, 0.4, 0.5, 0.7, 1), ("uniform", "edm", "sigmoid:5", "sigmoid:10", "sigmoid:20")


def options(used):
    """train.py's options for the items in `used`; all others without."""
    return "--recipe simple-reflow " + " ".join(item[name in used] for name, item in ITEMS.items())


def points(values):
    """(means, half widths) of several lists of values per seed, to draw; 0 where there is one
    seed."""
    summary = [mean_interval(list_) for list_ in values]
    return [mean for mean, _ in summary], [half if math.isfinite(half) else 0 for _, half in summary]


def change(values, before):
    """A paired difference as a table has it."""
    mean, half, _ = paired(values, before)
    return f"{mean:+.3f}" + f" ± {half:.3f}" * math.isfinite(half)


def simple_reflow(lab):
    """Which of Simple ReFlow's seven improvements help at nine evaluations?"""
    items, seeds, updates = tuple(ITEMS), range(min(3, lab.c.seeds)), lab.updates(300)
    added = [items[:i] for i in range(len(items) + 1)]
    removed = [tuple(name for name in items if name != left) for left in items]
    runs = {}

    def arm(used, extra=""):
        """Its runs, one per seed."""
        label = "-".join(str(i) for i, item in enumerate(items) if item in used) or "none"
        names = [f"simple-reflow/{label}{extra.replace(' ', '')}-s{s}" for s in seeds]
        runs.update({name: f"{options(used)} {extra} --updates {updates} {lab.cached(s)}"
                     for name, s in zip(names, seeds)})
        return names
    arms = {used: arm(used) for used in (*added, *removed)}
    heights = {weight: arms[items] if weight == 1 else arm(items, f"--high-pass-weight {weight}")
               for weight in LAMBDAS}
    folders = lab.train(runs)

    # what is measured: (label, runs, solver, steps) -> a row per seed
    wanted = {}

    def want(key, names, solver, steps=NINE, **more):
        wanted[key] = [dict(folder=folders[name] / "student-1" if name in folders else name, steps=steps,
                           solver=solver, **more)
                      for name in names]
    for used in arms:
        want((used, 1), arms[used], "ddim", 1)
    for used in added:
        want((used, PLAIN), arms[used], PLAIN)
    for used in (*removed, items):
        want((used, BETTER), arms[used], BETTER)
    solvers = list(dict.fromkeys([*(f"dpm2:{r:g}/sigmoid:10" for r in RATIOS),
                                  *(f"dpm2:0.5/{grid}" for grid in GRIDS)]))
    for solver in solvers:
        want((items, solver), arms[items], solver)
    for weight in LAMBDAS:
        want((weight, BETTER), heights[weight], BETTER)
    for solver in (PLAIN, BETTER):
        want(("teacher", solver), [lab.c.model], solver)
    want((items, "guided"), arms[items], BETTER, guidance=2.0)
    measured = iter(lab.measure([request for requests in wanted.values() for request in requests]))
    rows = {key: [next(measured) for _ in requests] for key, requests in wanted.items()}
    fd = {key: [row["fd_corrected"] for row in found] for key, found in rows.items()}

    # in the paper's order, the sampler last; then each left out of all seven
    everything, baseline = (items, BETTER), ((), PLAIN)
    chain = {"baseline": baseline, **{f"+ {used[-1]}": (used, PLAIN) for used in added[1:]},
             "+ sampling": everything}
    without = {"all seven": everything,
               **{f"all but {name}": (used, BETTER) for name, used in zip(items, removed)},
               "all but sampling": (items, PLAIN)}

    def line(label, key, against):
        error = [row["endpoint_error"] for row in rows[key]]
        return [label, shown(fd[key]), change(fd[key], fd[against]), shown(error, 4), shown(fd[key[0], 1])]
    keys = list(chain.values())
    lines = [line(label, key, before) for (label, key), before in zip(chain.items(), [baseline, *keys])]
    whole = Comparison("All seven against none", fd[everything], fd[baseline])
    turns = {label[2:]: Comparison(f"{label[2:].capitalize()}, added in turn", fd[key], fd[before])
             for (label, key), before in zip(list(chain.items())[1:], keys)}
    lost = {label.removeprefix("all but "): Comparison(f"All seven against {label}", fd[everything], fd[key])
            for label, key in list(without.items())[1:]}
    ends = end_distances(lab)
    moved = Comparison("Ends of projected pairs against the teacher's", ends[1], ends[0],
                       pairs="groups of images")
    tests = judge([whole, *turns.values(), *lost.values(), moved])
    spread = loss_spread(lab, folders[arms[()][0]] / "student-1")
    best = min(solvers, key=lambda solver: mean_interval(fd[items, solver])[0])
    verdict = [
        str(whole)[:-1]
        + "; shown to help: {} when added in turn, {} among all seven; to harm: {} and {}.".format(
            *(", ".join(name for name, each in group.items() if each.outcome == said) or "none"
              for said in ("better", "worse") for group in (turns, lost))),
        *map(str, (*turns.values(), *lost.values(), moved)), tests,
        f"Of the r and the grids {best} has the lowest mean, {shown(fd[items, best])}; {BETTER} has "
        f"{shown(fd[everything])}.",
        "The largest loss at one time is up to {:.0f} times the smallest there, normalized {:.0f} times; the "
        "means of different times differ by up to a factor of {:.1f}, normalized {:.1f}.".format(
            *(kind(bins) for kind in (within, between) for bins in spread.values())),
    ]
    heads = ["", "FD at 9 evaluations", "against the line before", "endpoint error", "FD at 1"]
    others = [[f"all seven, {solver}", shown(fd[items, solver])] for solver in solvers]
    others += [[f"all seven, lambda {weight:g}, {BETTER}", shown(fd[weight, BETTER])] for weight in LAMBDAS]
    others.append([f"all seven, {BETTER}, guidance 2 (18 evaluations)", shown(fd[items, "guided"])])
    others += [[f"the teacher, {solver}", f"{fd['teacher', solver][0]:.2f}"] for solver in (PLAIN, BETTER)]
    thousands = lab.evaluations(next(iter(runs.values()))) / 1000
    cost = f"{updates} updates and {thousands:.0f} thousand evaluations each"
    return dict(verdict=verdict, figure=draw_simple_reflow(fd, chain, without, spread), tables=[
        (f"Added in turn; {len(seeds)} seeds of training (mean ± 95%), {cost}; by {PLAIN} but for the last "
         "line", heads, lines),
        (f"Left out of all seven; by {BETTER} but for the last line", [*heads[:2], "against all seven",
                                                                       *heads[3:]],
         [line(label, key, everything) for label, key in without.items()]),
        ("Other samplers and other weights of the high-pass loss", ["", "FD at 9 evaluations"], others),
        ("The data ends of the teacher's trajectories, decoded, against real pictures", ["ends", "FD"],
         [[label, f"{mean_interval(groups)[0]:.2f}"]
          for label, groups in zip(("the teacher's", "projected"), ends)])])


def draw_simple_reflow(fd, chain, without, spread):
    figure, panels = axes(3, width=11, height=7.2, rows=2)
    for axis, title, arms in zip(panels, ("added in turn", "left out of all seven"), (chain, without)):
        means, halves = points(fd[key] for key in arms.values())
        axis.errorbar(means, range(len(arms)), xerr=halves, fmt="D", color=BLUE, capsize=4)
        for i, key in enumerate(arms.values()):
            axis.plot(fd[key], [i] * len(fd[key]), "o", color=BLUE, alpha=0.4, markersize=4)
        axis.set(yticks=range(len(arms)), yticklabels=arms, xlabel="FD at 9 evaluations", title=title)
        axis.invert_yaxis()
    items = tuple(ITEMS)
    panels[2].plot(RATIOS, points(fd[items, f"dpm2:{r:g}/sigmoid:10"] for r in RATIOS)[0], color=BLUE,
                   marker="o", label="sigmoid:10")
    for grid, marker, color in zip(GRIDS, "s^v.P", (ORANGE, GREEN, PINK, BLUE, BLACK)):
        if grid != "sigmoid:10":
            panels[2].plot(0.5, points([fd[items, f"dpm2:0.5/{grid}"]])[0], marker, color=color, label=grid)
    panels[2].set(xlabel="r of dpm2", ylabel="FD at 9 evaluations", title="sampling, all seven")
    panels[2].legend(frameon=False, fontsize=8)
    for (name, bins), color in zip(spread.items(), (ORANGE, BLUE)):
        t, low, mean, high = zip(*bins)
        panels[3].fill_between(t, low, high, color=color, alpha=0.25)
        panels[3].plot(t, mean, color=color, marker="o", markersize=3, label=f"{name}: least, mean, most")
    panels[3].set(yscale="log", xlabel="t (0 data, 1 noise)", ylabel="loss / its mean",
                  title="loss at each time")
    panels[3].legend(frameon=False, fontsize=8)
    u = torch.linspace(0, 1, 402, dtype=torch.float64)[:-1]
    for name, color in zip(("uniform", *reflow.CUMULATIVE), (BLACK, BLUE, GREEN, ORANGE)):
        t = reflow.TIME_LAWS[name](u, 1)                   # falls as u rises
        panels[4].plot((t[1:] + t[:-1]) / 2, u.diff() / -t.diff(), color=color, label=name)
    panels[4].set(xlabel="t, or sigma / (1 + sigma)", ylabel="density", title="time laws", ylim=(0, 4.5))
    panels[4].legend(frameon=False, fontsize=8)
    means, halves = points(fd[weight, BETTER] for weight in LAMBDAS)
    panels[5].errorbar(range(len(LAMBDAS)), means, yerr=halves, color=BLUE, marker="o", capsize=4)
    panels[5].set(xticks=range(len(LAMBDAS)), xticklabels=LAMBDAS,
                  xlabel="lambda", ylabel="FD at 9 evaluations", title="high-pass loss")
    return figure


def within(bins):
    """How many times the least loss the most is, at the time where this is worst."""
    return max(most / least for _, least, _, most in bins)


def between(bins):
    """How many times the least mean the largest is."""
    means = [mean for _, _, mean, _ in bins]
    return max(means) / min(means)


@torch.no_grad()
def loss_spread(lab, folder, count=2048, bins=10):
    """A student's losses at each time, raw and divided by what a normalizer, fitted to the other
    half of them, says is usual (Simple ReFlow's Fig. 1).  Returns: {"raw", "normalized"} -> list of
    (t, least, mean, most), in units of the overall mean."""
    c = lab.parse("--recipe simple-reflow --projection 0 --forward-rate 0 --time-law uniform --out "
                  f"{folder.parent} {lab.cached(0)}")
    recipe, device = train.resolve_recipe(c), torch.device(lab.device)
    c, _, pipeline, pairs = train.open_pairs(c, recipe, device, (0, 1, lambda: None))
    model = models.as_model(load.load_pipeline(str(folder), **dict.fromkeys(models.BESIDE)).to(device))
    z, t, value = [], [], []
    for first in range(0, count, 64):
        times, ends, cond = pairs.ends(pairs.fetch(range(first, first + 64), 1), None, 1)
        _, parts = reflow.student_loss(model, ends, times, cond, reflow.Recipe())
        z.append(parts["z"]), t.append(times[0]), value.append(parts["loss"])
    z, t, value = map(torch.cat, (z, t, value))
    torch.manual_seed(0)
    network = losses.LossNormalizer(z.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0)
    half = count // 2
    with torch.enable_grad():
        for _ in range(300):
            part = torch.randint(half, (64,)).to(device)
            loss = losses.normalized(value[part], network(z[part], t[part])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    usual, found = network(z[half:], t[half:]).exp(), {}
    for name, values in (("raw", value[half:]), ("normalized", value[half:] / usual)):
        values, edges = values / values.mean(), torch.linspace(0, 1, bins + 1, dtype=t.dtype)
        inside = [values[(t[half:] > low) & (t[half:] <= high)] for low, high in zip(edges, edges[1:])]
        found[name] = [((low + high).item() / 2, part.min().item(), part.mean().item(), part.max().item())
                       for low, high, part in zip(edges, edges[1:], inside) if len(part)]
    return found


@torch.no_grad()
def end_distances(lab, trajectories=2048):
    """FD of pairs' data ends to real pictures, before anything is trained on them, without and with the
    projection: the first trajectories of seed 0.  Returns: two lists, of metrics.frechet_groups"""
    measured, found = evaluator(lab.c), []
    for option in ITEMS["projected pairs"]:
        c = lab.parse(f"--recipe reflow {option} --out {lab.out}/simple-reflow/ends "
                      f"{lab.cached(0, trajectories)}")
        recipe, device = train.resolve_recipe(c), torch.device(lab.device)
        *_, pipeline, pairs = train.open_pairs(c, recipe, device, (0, 1, lambda: None))
        ends = pairs.rows[range(len(pairs.rows))]["z"][:, -1].to(device)
        features = torch.cat([measured.network.images(models.decode(pipeline, part))
                              for part in ends.split(64)])
        reference = measured.reference[measured.protocol.network]
        found.append(metrics.frechet_groups(features.to(reference.device), reference))
    return found


# ---- best of both ------------------------------------------------------------------------------------------

CANDIDATES = {
    "loss normalization": "--normalization learned",
    "time law 10^t in each window": "--time-law exponential --time-inside",
    "high-pass loss": "--loss high-pass",
    "forward pairs": "--forward-rate 0.5",
}

COUNTS = {1: (1, "ddim"), 2: (2, "ddim"), 4: (4, "ddim"), 9: (NINE, BETTER)}  # evaluations -> (steps, solver)

CURVED = {9: (NINE, PLAIN)}  # of a student that is not on the noise schedule between its boundaries

CURRICULUM = curriculum.SQUARED

FRESH_NOISE = 2_000_000  # seed of the first image, where what was chosen is judged


def best_of_both(lab):
    """ProReflow's curriculum with which of Simple ReFlow's improvements is best at 1, 2, 4 and 9
    evaluations?"""
    budget = lab.evaluations(f"{CURRICULUM} --updates {lab.updates(400, 4)} {lab.cached(0, 1024)}")
    # some seeds of training and some noise choose; others, which had no say, judge: the lowest of many is low
    # by luck too
    choice = range(min(3, lab.c.seeds))
    fresh = range(len(choice), len(choice) + lab.c.seeds)
    options, runs = {}, {}
    # [column][arm][evaluations] -> a value per seed
    chosen_by, judged_by = dict(fd={}, clip={}), dict(fd={}, clip={})

    def want(arms, seeds=choice, into=chosen_by, **noise):
        """Train and measure arms, name -> options."""
        options.update(arms)
        for (arm, chosen), s in itertools.product(arms.items(), seeds):
            pool = f"--seed {s}" if "proreflow" in chosen else lab.cached(s, 1024)
            name = re.sub(r"[^a-z0-9]+", "-", arm)
            runs[arm, s] = f"best-of-both/{name}-s{s}", lab.within(budget / lab.c.scale, f"{chosen} {pool}")
        folders = lab.train(dict(runs[arm, s] for arm in arms for s in seeds))
        keys = list(itertools.product(arms, COUNTS, seeds))
        chosen = [(COUNTS | CURVED if "proreflow" in arms[arm] else COUNTS)[count] for arm, count, _ in keys]
        rows = lab.measure([dict(folder=folders[runs[arm, s][0]] / "student-1", steps=steps, solver=solver,
                                 **noise)
                            for (arm, _, s), (steps, solver) in zip(keys, chosen)])
        for (arm, count, _), row in zip(keys, rows):
            for column, key in (("fd", "fd_corrected"), ("clip", "clip")):
                into[column].setdefault(arm, {}).setdefault(count, []).append(row[key])

    def score(arm, values=chosen_by["fd"]):
        """The mean over the evaluation counts, a value per seed."""
        return [sum(column) / len(COUNTS) for column in zip(*values[arm].values())]

    def line(arm, values):
        """Its columns of a table."""
        return [*map(shown, values["fd"][arm].values()), shown(score(arm, values["fd"])),
                shown(score(arm, values["clip"]), 1)]
    want({"curriculum": CURRICULUM, "proreflow": "--recipe proreflow",
         "simple-reflow": "--recipe simple-reflow"})
    best, chosen, left, rounds = "curriculum", CURRICULUM, dict(CANDIDATES), []
    while left:
        arms = {name: (f"{best}, {name}", f"{chosen} {extra}") for name, extra in left.items()}
        want(dict(arms.values()))
        order = sorted(arms, key=lambda name: mean_interval(score(arms[name][0]))[0])
        for name in order:
            arm = arms[name][0]
            rounds.append([len(CANDIDATES) - len(left) + 1, name, *line(arm, chosen_by),
                           change(score(arm), score(best))])
        if mean_interval(score(arms[order[0]][0]))[0] >= mean_interval(score(best))[0]:
            break
        best, chosen = arms[order[0]]
        left.pop(order[0])
    arms = list(dict.fromkeys(["proreflow", "simple-reflow", "curriculum", best]))
    want({arm: options[arm] for arm in arms}, fresh, judged_by, seed=FRESH_NOISE)
    found, others = judged_by["fd"], [arm for arm in arms if arm != best]
    comparisons = [each for other in others for each in (
        Comparison(f"{best} against {other}, mean over these counts", score(best, found),
                   score(other, found)),
        *(Comparison(f"{best} against {other} at {count}", found[best][count], found[other][count])
          for count in COUNTS))]
    tests = judge(comparisons)
    verdict = [
        f"The winner is {best}: mean FD over {', '.join(map(str, COUNTS))} evaluations "
        f"{shown(score(best, found))}; "
               + ", ".join(f"{other} {shown(score(other, found))}" for other in others) + ".",
               *map(str, comparisons),
               f"{tests} Chosen on seeds {choice[0]} to {choice[-1]} of training, judged on {fresh[0]} to "
               f"{fresh[-1]} and other noise."]
    costs = {arm: [lab.parse(runs[arm, 0][1]).updates, f"{lab.evaluations(runs[arm, 0][1]) / 1000:.0f}"]
             for arm in arms}
    lines = [[arm, *costs[arm], *line(arm, judged_by)] for arm in arms]
    heads = [*(f"FD at {count}" for count in COUNTS), "mean FD", "mean CLIP score"]
    figure, (axis,) = axes(width=7.5)
    for arm, color, marker in zip(arms, (ORANGE, PINK, GREEN, BLUE), "os^D"):
        means, halves = points(found[arm].values())
        axis.errorbar(list(COUNTS), means, yerr=halves, color=color, marker=marker, capsize=4, label=arm)
    axis.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="FD")
    plain_numbers(axis, list(COUNTS))
    axis.legend(frameon=False, fontsize=8)
    return dict(verdict=verdict, figure=figure, tables=[
        (f"FD at 1, 2, 4 and 9 evaluations of the student of one window; {len(fresh)} seeds of training that "
         "had no say in the choice (mean ± 95%)",
         ["method", "updates", "evaluations (1000)", *heads], lines),
        (f"Added greedily to the curriculum by the mean FD over the counts, {len(choice)} seeds; the first "
         "of a round is kept if it helps",
         ["round", "added", *heads, "mean FD against the round before"], rounds)])
