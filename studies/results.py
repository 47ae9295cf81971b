"""Everything that is written from the committed results: python -m studies.results, after a study
or an evaluation was run again

results/studies/NAME.md from NAME.json, results/README.md (each study's question, answer and
picture), and the tables of README.md and docs/*.md: what stands between the marks <!-- NAME --> and
<!-- /NAME -->, one of BLOCKS.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import eval as evaluation
from runtime import cli, store
from runtime.cli import UserError


@dataclass
class Config:
    root: str = "."             # folder of results/, README.md and docs/


# ---- a study as Markdown -----------------------------------------------------------------------------------


def table(columns, lines):
    """A Markdown table. columns: titles; lines: lists of cells, as long as columns."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def tables(result):
    """A study's tables, each under its caption."""
    return "\n\n".join(f"{caption}:\n\n{table(columns, lines)}"
                       for caption, columns, lines in result["tables"])


def markdown(result):
    """A study as a page: question, verdict, tables, protocol."""
    verdict = "\n".join(f"- {sentence}" for sentence in result["verdict"])
    parts = [f"**{result['question']}**", verdict, tables(result),
             f"`{result['command']}`, {result['protocol']}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def index(studies):
    """results/README.md: of each study the question, the first sentence of its verdict, command and
    picture."""
    parts = ["# Results",
             "One section for each study; its page has every comparison, table and command. FD is the "
             "Frechet distance on the features that the end of each page names, lower is better; it is not "
             "FID. What the studies say together: [docs/results.md](../docs/results.md). Written by "
             "`python -m studies.results`."]
    for name, study in studies.items():
        parts += [f"## [{name}](studies/{name}.md)",
                  f"**{study['question']}** {study['verdict'][0]}",
                  f"`{study['command']}`", f"![{study['question']}](studies/{name}.png)"]
    return "\n\n".join(parts) + "\n"


# ---- the tables of README.md and docs ----------------------------------------------------------------------


def short(result):
    """The five rows of an eval.py result that a reader wants first."""
    rows = {(row["method"], row["windows"], row["steps"]): row for row in result["rows"]}
    shown = {"teacher": ("teacher", None, 32), "plain DDIM, 4 steps": ("ddim", None, 4),
             "plain DDIM, 1 step": ("ddim", None, 1),
             "student, 4 steps": ("default", 4, 4), "student, 1 step": ("default", 1, 1)}
    lines = []
    for label, name in shown.items():
        row = rows[name]
        low, high = row["fd_interval"]
        lines.append([label, row["nfe"], f"{row['fd_corrected']:.2f} ({low:.2f} to {high:.2f})",
                      f"{row['prompt_accuracy']['all']:.1%}"])
    columns = ["", "network evaluations", "FD, corrected (95%)", "prompts followed"]
    protocol, followed = result["protocol"], result["floor"]["prompt_accuracy"]["all"]
    return (f"{table(columns, lines)}\n\nFD: Frechet distance (lower is better; not FID); prompts followed: "
            f"by {followed:.1%} of real pictures; both as `assets/judge` sees. {protocol['n']:,} images "
            f"against {protocol['real']:,} real ones. Commit {protocol['commit']}.")


def pixel(few, nine):
    """The pixel teacher and its student. few, nine: results of eval.py at 1, 2, 4 steps and at nine
    evaluations."""
    fd = {(row["method"], row["nfe"], row["solver"]): f"{row['fd_corrected']:.2f}"
          for row in few["rows"] + nine["rows"]}
    best = "dpm2:0.5/sigmoid:10"
    lines = [["teacher", *(fd["ddim", steps, "ddim"] for steps in (1, 2, 4)), fd[best, 9, best],
              fd["teacher", 32, "ddim"]],
             ["simple-reflow, 1,000 updates", *(fd["simple-reflow", steps, "ddim"] for steps in (1, 2, 4)),
              fd["simple-reflow", 9, best], "-"]]
    return table(["FD corrected, pixels", "1 step", "2 steps", "4 steps", f"9 evaluations, `{best}`",
                  "32 steps"], lines)


def measured(result):
    """What eval.py prints of a run."""
    return evaluation.table(result, brief=True).strip()


def together(first, *others):
    """What eval.py would print of several runs: the students of all under the first one's teacher."""
    students = [row for result in others for row in result["rows"] if row["windows"]]
    return measured(dict(first, rows=first["rows"] + students))


def chosen_tables(study, *numbers):
    return tables(dict(study, tables=[study["tables"][i] for i in numbers]))


# name of the block -> (function, the files it is made of, under results/)
BLOCKS = {
    "short": (short, ["demo.json"]),
    "demo": (measured, ["demo.json"]),
    "tiny": (measured, ["tiny.json"]),
    "pixel": (pixel, ["pixel.json", "pixel-9.json"]),
    "muon": (measured, ["muon.json"]),
    "sd3": (measured, ["tiny-sd3.json"]),
    "matched": (measured, ["matched.json"]),
    "matched_sd3": (measured, ["matched-sd3.json"]),
    "matching": (tables, ["studies/matching.json"]),
    "law": (tables, ["studies/time-law.json"]),
    "long": (together, ["proreflow.json", "perflow.json"]),
    "merging": (lambda study: chosen_tables(study, 0), ["studies/curriculum.json"]),
    "merging_sd3": (lambda study: chosen_tables(study, 0), ["studies/curriculum-tiny-sd3.json"]),
    "methods": (lambda study: chosen_tables(study, 0, 2), ["studies/methods.json"]),
    "simple": (lambda study: chosen_tables(study, 0), ["studies/simple-reflow.json"]),
    "both": (lambda study: chosen_tables(study, 0), ["studies/best-of-both.json"]),
}


def write_blocks(file, results):
    """Write each block that the file has marks for. results: the folder.  Raises UserError."""
    text = file.read_text(encoding="utf-8")
    for name in dict.fromkeys(re.findall(r"<!-- /?(\w+) -->", text)):
        make, sources = cli.choose(f"{file}: the mark", name, BLOCKS)
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
            raise UserError(f"{file}: needs the marks {start.strip()} and {end.strip()} once each, on lines "
                            "of their own")
        read = [read_study if source.startswith("studies/") else read_evaluation for source in sources]
        try:
            block = make(*(each(results / source) for each, source in zip(read, sources)))
        except KeyError as error:
            raise UserError(f"{file}: the mark {name} shows {error}, which {' or '.join(sources)} lacks; "
                            "measure it again as the page says") from error
        text = text[:text.index(start) + len(start)] + block + text[text.index(end):]
    write(file, text)


# ---- reading and writing -----------------------------------------------------------------------------------


def read_json(file, keys, remedy):
    """The object in a JSON file, which has these keys.  Raises UserError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; {remedy}") from error
    except ValueError as error:                             # no JSON, or no UTF-8
        raise UserError(f"{file}: not valid JSON ({error}); delete it, then {remedy}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{file}: has no {', '.join(missing)}; if it is not a file of results move it away, "
                        f"else {remedy}")
    return content


def read_evaluation(file):
    return read_json(file, ("protocol", "rows"), "copy it from the run that python eval.py measured")


def read_study(file):
    """A study from its NAME.json, with NAME.png beside it.  Raises UserError."""
    again = f"run python -m studies {file.stem}"
    study = read_json(file, ("question", "command", "verdict", "tables", "protocol"), again)
    for caption, columns, lines in study["tables"]:
        if any(len(line) != len(columns) for line in lines):
            raise UserError(f"{file}: the table {caption!r} has lines of other lengths than its "
                            f"{len(columns)} columns; {again}")
    picture = file.with_suffix(".png")
    content = picture.read_bytes() if picture.is_file() else b""
    # a PNG is written in place, so an interrupted one lacks its end
    if not (content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")):
        raise UserError(f"{picture}: {'not a whole PNG' if content else 'missing'}; {again}")
    return study


def write(file, text):
    store.write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def main(c):
    root, results = Path(c.root), Path(c.root, "results")
    studies = {file.stem: read_study(file) for file in sorted(results.glob("studies/*.json"))}
    if not studies:
        raise UserError(f"{results / 'studies'}: no study's results there; python -m studies all makes them")
    for name, study in studies.items():
        write(results / "studies" / f"{name}.md", markdown(study))
    write(results / "README.md", index(studies))
    pages = [file for file in (root / "README.md", *sorted(root.glob("docs/*.md"))) if file.is_file()]
    for file in pages:
        write_blocks(file, results)
    print(f"{results / 'README.md'}, {len(studies)} studies, tables of {len(pages)} pages")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
