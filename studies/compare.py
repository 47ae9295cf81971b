"""Are two rows of eval.py different, or did they draw other images?

    python -m studies.compare runs/train                 # every row against the teacher's, 32 steps
    python -m studies.compare runs/train runs/other      # the second's students against the first's

Both files have the same captions and noise, so that differences of their rows, taken group of images by
group, have less spread than either. Students are compared at the same number of windows and steps. The
intervals are over the choice of images: a run trained with another seed differs by more.
"""
from dataclasses import dataclass, field
from pathlib import Path

from runtime import cli
from runtime.cli import UserError
from studies.results import read_evaluation
from studies.runner import Comparison, judge

SAME = ("name", "split", "n", "real", "captions", "reference", "size", "resize", "crop", "distance",
        "features", "seeds", "corrected")   # of two protocols, or their difference means nothing


@dataclass
class Config:
    files: list[str] = field(default_factory=list, metadata=dict(positional=True))  # one or two: results.json
                                                                                    # or a folder with one


def read(file):
    """(protocol, rows) of a results.json or of a run's folder.  Raises UserError."""
    file = Path(file)
    if file.is_dir():
        file /= "results.json"
    result = read_evaluation(file)
    for row in result["rows"]:
        if "fd_groups" not in row:
            raise UserError(f"{file}: the row {row.get('method')} has no fd_groups; measure it again with "
                            "python eval.py")
    return result["protocol"], result["rows"]


def how(row):
    """A row's windows, steps and solver in words."""
    windows = f"{row['windows']} window{'s' * (row['windows'] > 1)}, " if row["windows"] else ""
    solver = f" of {row['solver']}" if row["solver"] not in ("ddim", row["method"]) else ""
    return f"{windows}{row['steps']} step{'s' * (row['steps'] > 1)}{solver}"


def against_the_teacher(file):
    """Comparisons of every other row of a file with its teacher's."""
    _, rows = read(file)
    teachers = [row for row in rows if row["method"] == "teacher"]
    if len(teachers) != 1:
        raise UserError(f"{file}: {len(teachers)} rows of a teacher; one is needed to compare others with")
    return [Comparison(f"{row['method']}, {how(row)}, against the teacher in {teachers[0]['steps']}",
                       row["fd_groups"], teachers[0]["fd_groups"], pairs="groups of images")
            for row in rows if row["method"] != "teacher"]


def against_each_other(first, second):
    """Comparisons of each student of the second file with those of the first that have as many windows,
    steps and the same solver and guidance."""
    (before, old), (now, new) = read(first), read(second)
    # a file from before a field was written says nothing of it
    for name in (*SAME, *["networks"] * ("networks" in before and "networks" in now)):
        if before.get(name) != now.get(name):
            raise UserError(f"{first}, {second}: measured with different {name}, {before.get(name)} and "
                            f"{now.get(name)}; give eval.py the same options for both")

    def key(row):
        return row["windows"], row["steps"], row["solver"], row["guidance"]
    found = [Comparison(f"{how(b)}: {b['method']} ({second}) against {a['method']} ({first})",
                        b["fd_groups"], a["fd_groups"], pairs="groups of images")
             for b in new for a in old if b["windows"] and a["windows"] and key(a) == key(b)]
    if not found:
        raise UserError(f"{first}, {second}: no student of as many windows, steps and the same solver in "
                        "both; measure both with the same --steps")
    return found


def main(c):
    if len(c.files) not in (1, 2):
        raise UserError(f"{len(c.files)} files; give one, whose rows are compared with its teacher's, or two")
    comparisons = (against_the_teacher if len(c.files) == 1 else against_each_other)(*c.files)
    judge(comparisons)
    print(*(f"- {comparison}" for comparison in comparisons), sep="\n")
    print(f"\nPaired t-tests, p adjusted by Holm's method for these {len(comparisons)} comparisons; a "
          "difference is shown where it is below 0.05. Intervals are of one comparison alone.")
    return comparisons


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
