"""The evidence on Simple ReFlow's seven improvements, and on what is best of both papers; run as the studies of studies.py are.

    python eval.py --study simple-reflow       # each improvement added in turn, then each left out of all
    python eval.py --study best-of-both        # a curriculum with them, added greedily by what they gain

Solver and grid cost no training, so that all of them can be asked of one student.
"""
import math

import torch

import losses
import reflow
import teacher
import train
from figures import BLACK, BLUE, GREEN, ORANGE, PINK, VERMILION, axes, plain_numbers
from lab import mean_interval, outcome, paired, shown, told
from normaliser import Normaliser

# in the paper's order: name -> (option without, option with). What the paper leaves unknown is ours: lambda, rho, epsilon, both
# rates of dropout (0.13 is EDM's for CIFAR-10, whose smaller value is unknown; the embedded teacher itself was trained without)
ITEMS = {
    "loss normalisation": ("--normalisation none", "--normalisation learnt"),
    "time law 10^t": ("--time-law uniform", "--time-law exponential"),
    "high-pass loss": ("--loss mse", "--loss high-pass"),
    "smaller dropout": ("--dropout 0.13", "--dropout 0"),
    "forward pairs": ("--forward-rate 0", "--forward-rate 0.5"),
    "projected pairs": ("--projection 0", "--projection 0.05"),
}
PLAIN, BETTER = "heun", "dpm2:0.5/sigmoid:10"       # the seventh item: how it is sampled, nine evaluations in five steps
NINE = 5
LAMBDAS = (0, 1, 3, 10)
RATIOS, GRIDS = (0.3, 0.4, 0.5, 0.7, 1), ("uniform", "edm", "sigmoid:5", "sigmoid:10", "sigmoid:20")


def options(used):
    """train.py's options for the items in `used`, in order; all others without."""
    return "--recipe simple-reflow " + " ".join(item[name in used] for name, item in ITEMS.items())


def simple_reflow(lab):
    """Which of Simple ReFlow's seven improvements help at nine evaluations?"""
    names, seeds, updates = list(ITEMS), range(min(3, lab.c.seeds)), lab.updates(300)
    added = [names[:i] for i in range(len(names) + 1)]
    removed = [[name for name in names if name != left] for left in names]
    runs = {}

    def run(used, s, extra=""):
        name = "simple-reflow/" + ("-".join(str(i) for i, item in enumerate(names) if item in used) or "none") + extra.replace(" ", "") + f"-s{s}"
        runs[name] = f"{options(used)} {extra} --steps {updates} {lab.cached(s)}"
        return name
    arms = {tuple(used): [run(used, s) for s in seeds] for used in (*added, *removed)}
    heights = {weight: [run(names, s, f"--high-pass-weight {weight}") if weight != 1 else arms[tuple(names)][s] for s in seeds] for weight in LAMBDAS}
    folders = lab.train(runs)

    def measured(runs, solver, steps=NINE):
        return [dict(folder=folders[name] / "student-1", steps=steps, solver=solver) for name in runs]
    full, solvers = arms[tuple(names)], [*(f"dpm2:{r:g}/sigmoid:10" for r in RATIOS), *(f"dpm2:0.5/{grid}" for grid in GRIDS)]
    asked = {("teacher", solver, None): [dict(folder=lab.c.model, steps=NINE, solver=solver)] for solver in (PLAIN, BETTER)}
    asked |= {(used, PLAIN, NINE): measured(arms[used], PLAIN) for used in map(tuple, added)}
    asked |= {(used, BETTER, NINE): measured(arms[used], BETTER) for used in map(tuple, [*removed, names])}
    asked |= {(used, "ddim", 1): measured(arms[used], "ddim", 1) for used in arms}
    asked |= {(f"lambda {weight}", BETTER, NINE): measured(heights[weight], BETTER) for weight in LAMBDAS}
    asked |= {("full", solver, NINE): measured(full, solver) for solver in solvers}
    flat = iter(lab.measure([request for requests in asked.values() for request in requests]))
    rows = {key: [next(flat) for _ in requests] for key, requests in asked.items()}
    fd = {key: [row["fd"] for row in found] for key, found in rows.items()}

    # the paper's order: added in turn, the sampler last; then each left out of all seven
    steps_added = [(f"+ {used[-1]}" if used else "baseline", (tuple(used), PLAIN, NINE)) for used in added] + [("+ sampling", (tuple(names), BETTER, NINE))]
    everything = fd[tuple(names), BETTER, NINE]
    left_out = [(f"all but {name}", (tuple(used), BETTER, NINE)) for name, used in zip(names, removed)] + [("all but sampling", (tuple(names), PLAIN, NINE))]

    def line(label, key, against):
        mean, half, _ = paired(fd[key], against)
        return [label, shown(fd[key]), f"{mean:+.3f}" + f" ± {half:.3f}" * math.isfinite(half), shown([row["endpoint_error"] for row in rows[key]], 4),
                shown(fd[key[0], "ddim", 1])]
    lines = [line(label, key, fd[steps_added[max(0, i - 1)][1]]) for i, (label, key) in enumerate(steps_added)]
    lines_out = [line(label, key, everything) for label, key in [("all seven", (tuple(names), BETTER, NINE)), *left_out]]
    baseline = fd[(), PLAIN, NINE]
    gains = {label[len("all but "):]: outcome(fd[key], everything) for label, key in left_out}
    helped = [name for name, said in gains.items() if said == "worse"]
    harmed = [name for name, said in gains.items() if said == "better"]
    verdict = [f"All seven against none: {told('', everything, baseline).removeprefix(': ')} Leaving one out makes it worse for "
               f"{', '.join(helped) or 'none'}, better for {', '.join(harmed) or 'none'}; for the others no difference is shown."]
    verdict += [told(f"{label[2:].capitalize()}, added in turn", fd[key], fd[before]) for (_, before), (label, key) in zip(steps_added, steps_added[1:])]
    verdict += [told(f"Everything against {label}", everything, fd[key]) for label, key in left_out]
    best = min(solvers, key=lambda solver: mean_interval(fd["full", solver, NINE])[0])
    verdict.append(f"Of r and the grids the best is {best} ({shown(fd['full', best, NINE])}); {BETTER} gives {shown(everything)}.")
    spread = loss_spread(lab, folders[arms[tuple(added[0])][0]] / "student-1")
    before, after = (max(math.log10(high / low) for _, low, _, high in bins) for bins in spread.values())
    verdict.append(f"Between its smallest and largest at one time the loss differs by up to {before:.1f} decades, normalised by {after:.1f}; the means at "
                   f"different times by {decades(spread['raw']):.2f} and {decades(spread['normalised']):.2f} decades.")

    figure, panels = axes(3, width=11, height=7.2, rows=2)
    for axis, title, chain in zip(panels, ("added in turn", "left out of all seven"), (steps_added, [("all seven", (tuple(names), BETTER, NINE)), *left_out])):
        for i, (_, key) in enumerate(chain):
            mean, half = mean_interval(fd[key])
            axis.plot(fd[key], [i] * len(fd[key]), "o", color=BLUE, alpha=0.4, markersize=4)
            axis.errorbar(mean, i, xerr=half if math.isfinite(half) else None, fmt="D", color=BLUE, capsize=4)
        axis.set(yticks=range(len(chain)), yticklabels=[label for label, _ in chain], xlabel="FD at 9 evaluations", title=title)
        axis.invert_yaxis()
    for solver_names, colour, marker, at, label in ((solvers[:len(RATIOS)], BLUE, "o", RATIOS, "r of dpm2, sigmoid grid"),):
        panels[2].errorbar(at, [mean_interval(fd["full", solver, NINE])[0] for solver in solver_names], color=colour, marker=marker, label=label)
    for grid, marker, colour in zip(GRIDS, "s^vDP", (ORANGE, GREEN, PINK, VERMILION, BLACK)):
        panels[2].plot(0.5, mean_interval(fd["full", f"dpm2:0.5/{grid}", NINE])[0], marker, color=colour, linestyle="", label=f"r 0.5, {grid}")
    panels[2].set(xlabel="r", ylabel="FD at 9 evaluations", title="sampling all seven")
    panels[2].legend(frameon=False, fontsize=8)
    for (name, bins), colour in zip(spread.items(), (ORANGE, BLUE)):
        t, low, mean, high = zip(*bins)
        panels[3].fill_between(t, low, high, color=colour, alpha=0.25)
        panels[3].plot(t, mean, color=colour, marker="o", markersize=3, label=f"{name}: least, mean, most")
    panels[3].set(yscale="log", xlabel="t", ylabel="loss / its mean", title="loss at each time")
    panels[3].legend(frameon=False, fontsize=8)
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    for (name, density), colour in zip(reflow.DENSITIES.items(), (BLACK, BLUE, GREEN, ORANGE)):
        panels[4].plot(t, density(t), color=colour, label=name)
    panels[4].set(xlabel="t (0 data, 1 noise)", ylabel="density", title="time laws", ylim=(0, 4.5))
    panels[4].legend(frameon=False, fontsize=8)
    means = [mean_interval(fd[f"lambda {weight}", BETTER, NINE]) for weight in LAMBDAS]
    panels[5].errorbar(range(len(LAMBDAS)), [mean for mean, _ in means], yerr=[half if math.isfinite(half) else 0 for _, half in means], color=BLUE,
                       marker="o", capsize=4)
    panels[5].set(xticks=range(len(LAMBDAS)), xticklabels=[f"{weight:g}" for weight in LAMBDAS], xlabel="lambda of the high-pass loss",
                  ylabel="FD at 9 evaluations", title="high-pass loss")
    columns = ["", "FD at 9 evaluations", "against the line before", "endpoint error", "FD at 1"]
    sweep = [[solver, shown(fd["full", solver, NINE])] for solver in dict.fromkeys(solvers)]
    sweep += [[f"high-pass lambda {weight:g}, {BETTER}", shown(fd[f"lambda {weight}", BETTER, NINE])] for weight in LAMBDAS]
    sweep += [[f"the teacher, {solver}", f"{fd['teacher', solver, None][0]:.2f}"] for solver in (PLAIN, BETTER)]
    return dict(verdict=verdict, figure=figure, tables=[
        (f"Added in turn; {len(seeds)} seeds of training (mean ± 95%), {updates} updates and {lab.evaluations(next(iter(runs.values()))) / 1000:.0f} thousand "
         f"evaluations each; sampled by {PLAIN}, the last line by {BETTER}", columns, lines),
        (f"Left out of all seven; sampled by {BETTER}, the last line by {PLAIN}", [*columns[:2], "against all seven", *columns[3:]], lines_out),
        ("All seven, other samplers and other weights of the high-pass loss; the teacher", ["sampled by", "FD at 9 evaluations"], sweep)])


def decades(bins):
    """How far apart the means of the times are."""
    means = [mean for _, _, mean, _ in bins]
    return math.log10(max(means) / min(means))


@torch.no_grad()
def loss_spread(lab, folder, count=2048, bins=10):
    """What a student's loss is at each time, raw and divided by what a normaliser, fitted to the other half of these losses, says is usual
    (Simple ReFlow's Fig. 1).  Returns: {"raw", "normalised"} -> list of (t, least, mean, most), in units of the overall mean."""
    c = lab.parse(f"--recipe simple-reflow --projection 0 --forward-rate 0 --time-law uniform --out {folder.parent} {lab.cached(0)}")
    recipe, device = train.resolve_recipe(c), torch.device(lab.device)
    c, _, pipeline, pairs = train.open_pairs(c, recipe, device, (0, 1, lambda: None))
    model = teacher.as_model(teacher.load_pipeline(str(folder), vae=None, text_encoder=None).to(device))
    z, t, value = [], [], []
    for first in range(0, count, 64):
        times, t_start, t_end, z_start, z_end, cond = pairs.ends(pairs.fetch(range(first, first + 64), 1), None, 1)
        x, eps = reflow.chord(z_start, z_end, *([v.float()[:, None, None, None] for v in model.schedule(edge)] for edge in (t_start, t_end)))
        a, b = (v.float() for v in model.coefficients(times, 4))
        x_hat, eps_hat = model(a * x + b * eps, times, cond)
        z.append(a * x + b * eps), t.append(times), value.append(losses.mse(eps_hat - x_hat, eps - x))
    z, t, value = map(torch.cat, (z, t, value))
    torch.manual_seed(0)
    network = Normaliser(z.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0)
    half = count // 2
    with torch.enable_grad():
        for _ in range(300):
            part = torch.randint(half, (64,)).to(device)
            loss = losses.normalised(value[part], network(z[part], t[part])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    usual, found = network(z[half:], t[half:]).exp(), {}
    for name, values in (("raw", value[half:]), ("normalised", value[half:] / usual)):
        values, edges = values / values.mean(), torch.linspace(0, 1, bins + 1, dtype=t.dtype)
        inside = [values[(t[half:] > low) & (t[half:] <= high)] for low, high in zip(edges, edges[1:])]
        found[name] = [((low + high).item() / 2, part.min().item(), part.mean().item(), part.max().item())
                       for low, high, part in zip(edges, edges[1:], inside) if len(part)]
    return found


# ---- best of both ----------------------------------------------------------------------------------------------------

CANDIDATES = {
    "loss normalisation": "--normalisation learnt",
    "time law 10^t in each window": "--time-law exponential --time-inside",
    "high-pass loss": "--loss high-pass",
    "forward pairs": "--forward-rate 0.5",
}
COUNTS = {1: (1, "ddim"), 2: (2, "ddim"), 4: (4, "ddim"), 9: (NINE, BETTER)}         # evaluations -> (steps, solver)
CURVED = {9: (NINE, PLAIN)}                          # of a student that is not on the noise schedule between its boundaries
CURRICULUM = "--recipe progressive --windows 8 4 2 1"


def best_of_both(lab):
    """ProReflow's curriculum with which of Simple ReFlow's improvements is best at 1, 2, 4 and 9 evaluations?"""
    seeds = range(min(3, lab.c.seeds))
    budget = lab.evaluations(f"{CURRICULUM} --steps {lab.updates(400, 4)} {lab.cached(0, 1024)}")
    runs, found = {}, {}

    def ask(arms):
        """Train and measure these arms (name -> options); fd[arm][evaluations] are their FDs, a value per seed."""
        for arm, chosen in arms.items():
            for s in seeds:
                pool = lab.cached(s, 1024) if "proreflow" not in chosen else f"--seed {s}"
                runs[arm, s] = "best-of-both/" + arm.replace(" ", "-").replace("^", "").replace(",", "") + f"-s{s}", lab.within(budget / lab.c.scale, f"{chosen} {pool}")
        folders = lab.train(dict(runs[arm, s] for arm in arms for s in seeds))
        keys = [(arm, count, s) for arm in arms for count in COUNTS for s in seeds]
        requests = []
        for arm, count, s in keys:
            steps, solver = ({**COUNTS, **CURVED} if "proreflow" in arms[arm] else COUNTS)[count]
            requests.append(dict(folder=folders[runs[arm, s][0]] / "student-1", steps=steps, solver=solver))
        for (arm, count, _), row in zip(keys, lab.measure(requests)):
            found.setdefault(arm, {}).setdefault(count, []).append(row["fd"])

    def score(arm):
        """The mean FD over all evaluation counts, a value per seed."""
        return [sum(values) / len(COUNTS) for values in zip(*found[arm].values())]

    def gain(arm, before):
        return mean_interval(score(before))[0] - mean_interval(score(arm))[0]
    ask({"curriculum": CURRICULUM, "proreflow": "--recipe proreflow", "simple-reflow": "--recipe simple-reflow"})
    best, chosen, left, verdict, rounds = "curriculum", CURRICULUM, dict(CANDIDATES), [], []
    while left:
        arms = {f"{best}, {name}": f"{chosen} {extra}" for name, extra in left.items()}
        ask(arms)
        order = sorted(arms, key=lambda arm: gain(arm, best), reverse=True)
        for arm in order:
            mean, half, p = paired(score(arm), score(best))
            rounds.append([len(CANDIDATES) - len(left) + 1, arm.split(", ")[-1], shown(score(arm)), f"{mean:+.3f}" + f" ± {half:.3f}" * math.isfinite(half)])
        if gain(order[0], best) <= 0:
            break
        best, chosen = order[0], arms[order[0]]
        left.pop(best.split(", ")[-1])
    verdict.append(f"The winner is {best}; mean FD over {', '.join(map(str, COUNTS))} evaluations {shown(score(best))}, proreflow {shown(score('proreflow'))}, "
                   f"simple-reflow {shown(score('simple-reflow'))}.")
    for other in ("proreflow", "simple-reflow", *(["curriculum"] if best != "curriculum" else [])):
        verdict += [told(f"{best} against {other} at {count} evaluation{'s' * (count > 1)}", found[best][count], found[other][count]) for count in COUNTS]
    final = dict.fromkeys(["proreflow", "simple-reflow", "curriculum", best])
    lines = [[arm, lab.parse(runs[arm, 0][1]).steps, f"{lab.evaluations(runs[arm, 0][1]) / 1000:.0f}", *(shown(found[arm][count]) for count in COUNTS), shown(score(arm))]
             for arm in final]
    figure, (axis,) = axes(width=7.5)
    for arm, colour, marker in zip(final, (ORANGE, PINK, GREEN, BLUE), "os^D"):
        summary = [mean_interval(found[arm][count]) for count in COUNTS]
        axis.errorbar(list(COUNTS), [mean for mean, _ in summary], yerr=[half if math.isfinite(half) else 0 for _, half in summary], color=colour, marker=marker,
                      capsize=4, label=arm)
    axis.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="FD")
    plain_numbers(axis, list(COUNTS))
    axis.legend(frameon=False, fontsize=8)
    return dict(verdict=verdict, figure=figure, tables=[
        (f"FD, {len(seeds)} seeds of training (mean ± 95%), the student of one window", ["method", "updates", "evaluations (1000)", *(f"{count} evaluation{'s' * (count > 1)}" for count in COUNTS), "mean"], lines),
        ("Added greedily to the curriculum by the mean FD over these counts; the first of each round is kept if it gains",
         ["round", "added", "mean FD", "against the round before"], rounds)])
