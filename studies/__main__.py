"""The evidence: questions about reflow, answered by runs that anybody can repeat.

    python -m studies curriculum           # one of STUDIES
    python -m studies all                  # all of them

A study trains what is missing, measures it, and writes its table and its figure.
A study names its runs in train.py's own options and its rows by what eval.py measures.
Both are kept under --out: a study that was stopped goes on, a second call costs nothing.
What it finds goes to --results as NAME.json, NAME.md and NAME.png; of another teacher (--model) than the
embedded UNet, as NAME-MODEL.
"""
import json
import re
import shlex
import time
from pathlib import Path

import matplotlib.pyplot as plt

import export
from runtime import cli, store
from runtime.cli import UserError
from studies import curriculum, matching, methods, proreflow, runner, simple_reflow, time_law
from studies.plots import DPI
from studies.results import markdown
from studies.runner import Lab, evaluator

STUDIES = {
    "time-law": time_law.time_law, "curriculum": curriculum.curriculum, "matching": matching.matching,
    "methods": methods.methods,
    "direction-weight": proreflow.direction_weight, "discrepancy": proreflow.discrepancy,
    "noise": proreflow.noise, "guidance": proreflow.guidance, "pairs": proreflow.pairs,
    "simple-reflow": simple_reflow.simple_reflow, "best-of-both": simple_reflow.best_of_both}


def main(c):
    if not c.study:
        raise UserError(f"no study named; give one or more of {', '.join(STUDIES)}, or all")
    names = list(STUDIES) if c.study == ["all"] else c.study
    for name in names:
        cli.choose("study", name, STUDIES)
    cli.at_least(c, seeds=1, n=1, real=1, paths=1, workers=1)
    if not 0 < c.scale:
        raise UserError(f"--scale {c.scale}: must be above 0")
    lab, results = Lab(c), Path(c.results)
    store.make_folder("--results", results)
    store.check_writable(results)
    for name in names:
        start, lab.commands, lab.records = time.time(), [], []
        file = "-".join(filter(None, (name, runner.label(c))))
        before, longest = results / f"{file}.json", 0
        if before.is_file():
            longest = json.loads(before.read_text(encoding="utf-8"))["seconds"]
            print(f"{name}: {longest / 60:.0f} minutes at the longest so far ({before}); what is ready is "
                  "not done again")
        found = STUDIES[name](lab)
        # plain DDIM beside every student
        lab.measure([dict(folder=c.model, steps=steps)
                     for steps in sorted({row["steps"] for row in lab.records})])
        figure = found.pop("figure")
        figure.savefig(results / f"{file}.png", dpi=DPI)
        plt.close(figure)
        shared = evaluator(c)
        decide = ("model", "data", "seeds", "scale", "methods", "n", "real", "paths", "clip", "judge")
        given = [word for option in decide
                 if getattr(c, option) != getattr(runner.Config, option)
                 for word in cli.arguments(option, getattr(c, option))]
        question = " ".join([*STUDIES[name].__doc__.split(), f"({c.model})" * bool(runner.label(c))]).strip()
        command = shlex.join(["python", "-m", "studies", name, *given])
        result = dict(name=file, question=question, command=command, **found,
                      protocol=f"N = {c.n} images against {c.real} real ones, FD on {shared.network.name} "
                               "features, corrected for the bias of so few images. Commit "
                               f"{export.versions()['commit']}.",
                      teacher=c.model, rows=lab.records, runs=lab.commands,
                      seconds=max(longest, time.time() - start), **export.versions())
        # runs are named as under the default --out, wherever they lie
        text = re.sub(rf"(?<![\w./-]){re.escape(c.out)}(?=/)", runner.Config.out,
                      json.dumps(result, indent=1, ensure_ascii=False))
        store.write_atomically(results / f"{file}.json",
                               lambda part: part.write_text(text, encoding="utf-8"))
        store.write_atomically(results / f"{file}.md",
                               lambda part: part.write_text(markdown(result), encoding="utf-8"))
        print(markdown(result))
    return results


if __name__ == "__main__":
    cli.run(main, runner.Config, __doc__)
