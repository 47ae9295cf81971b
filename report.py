"""The results of the studies as one page: python report.py

    python report.py --readme README.md    # and the tables of the README and results/studies/*.md, from the same files

Collects what `python eval.py --study ...` left (NAME.json and NAME.png, see studies.py) into one HTML file that needs no
network, no server and no script: pictures are inlined. What has not been run yet is named at the end of the page.
"""
import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

import config
import data
import eval as evaluation
from config import UserError
from studies import STUDIES, markdown, overview, tables


@dataclass
class Config:
    results: str = "results/studies"  # folder of the studies' tables and figures
    embedded: str = "results/tiny.json"  # results.json of eval.py for the embedded default; the page says so if it is not there
    out: str = "results/report.html"  # the page
    readme: str = ""            # a README whose tables (<!-- NAME --> to <!-- /NAME -->) are written anew, as is NAME.md of each study


# ---- what the papers report -----------------------------------------------------------------------------------------

# Ke et al., "ProReflow: Progressive Reflow with Decomposed Velocity", CVPR 2025, arXiv 2503.04824 (the numbered
# tables), and Kim et al., "Simple ReFlow", ICLR 2025, arXiv 2410.07815: their digits, not ours.
PAPER = [
    ("Table 1. COCO 2017, validation images", ["method", "steps", "FID", "CLIP score"], [
        ["2-ReFlow", 2, "49.32", "27.36"], ["2-ReFlow", 4, "32.97", "28.93"],
        ["InstaFlow-0.9B", 2, "71.54", "26.07"], ["InstaFlow-0.9B", 4, "102.41", "24.39"],
        ["PeRFlow", 4, "23.81", "30.24"], ["ProReflow-I (8→4)", 4, "22.97", "30.29"],
        ["ProReflow-II (8→4→2)", 2, "27.59", "27.79"], ["ProReflow-II (8→4→2)", 4, "22.03", "29.95"]]),
    ("Table 2. COCO 2014, validation images", ["method", "steps", "FID"], [
        ["teacher, DDIM", 32, "10.05"], ["DPM-Solver", 25, "9.78"], ["DPM-Solver", 8, "22.44"], ["DPM-Solver++", 4, "22.36"],
        ["UniPC", 4, "23.30"], ["LCM-LoRA", 2, "24.28"], ["LCM-LoRA", 4, "23.62"], ["InstaFlow-0.9B", 2, "24.61"],
        ["InstaFlow-0.9B", 4, "44.01"], ["2-ReFlow", 2, "20.17"], ["2-ReFlow", 4, "15.32"], ["Flash Diffusion", 4, "12.41"],
        ["PCM", 4, "11.70"], ["PeRFlow", 4, "12.01"], ["ProReflow-I (8→4)", 4, "11.16"], ["ProReflow-II (8→4→2)", 2, "15.44"],
        ["ProReflow-II (8→4→2)", 4, "10.70"]]),
    ("Table 4. Ablation: COCO 2017, 4 steps, guidance 4", ["configuration", "FID", "CLIP score"], [
        ["neither (= PeRFlow of Table 1)", "23.81", "30.24"], ["direction term only", "23.46", "30.21"],
        ["progressive reflow only", "23.09", "30.25"], ["both: ProReflow-I", "22.97", "30.29"]]),
    ("Simple ReFlow: FID at 9 evaluations, all seven improvements", ["images", "no guidance", "with guidance"], [
        ["CIFAR-10", "2.23", "1.98"], ["AFHQv2, 64 pixels", "2.30", "1.91"], ["FFHQ, 64 pixels", "2.84", "2.67"],
        ["ImageNet, 64 pixels", "3.49", "1.74"]]),
]


# ---- the results, read and checked -----------------------------------------------------------------------------------


def read_json(file, keys):
    """The object in a JSON file, which has these keys.  Raises UserError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:                             # no JSON, or no UTF-8
        raise UserError(f"{file}: not valid JSON ({error}); delete it and make it again") from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise UserError(f"{file}: has no {', '.join(missing)}; if it is not a file of results move it away, else make it again")
    return found


def read_study(file):
    """A study from its NAME.json, with `name` and `picture`, the bytes of its NAME.png.  Raises UserError."""
    study = read_json(file, ("question", "command", "verdict", "tables", "protocol", "runs", "seconds", "versions"))
    picture, again = file.with_suffix(".png"), f"run {study['command']} again"
    for caption, columns, lines in study["tables"]:
        if any(len(line) != len(columns) for line in lines):
            raise UserError(f"{file}: the table {caption!r} has lines of other lengths than its {len(columns)} columns; {again}")
    study.update(name=file.stem, picture=picture.read_bytes() if picture.is_file() else b"")
    # a PNG is written in place, so an interrupted one lacks its end
    if not (study["picture"].startswith(b"\x89PNG\r\n\x1a\n") and study["picture"].endswith(b"IEND\xaeB`\x82")):
        raise UserError(f"{picture}: {'not a whole PNG' if study['picture'] else 'missing'}; {again}")
    return study


def read_embedded(file):
    """eval.py's table of a results.json.  Returns: ((caption, columns, lines), paragraphs below it).  Raises UserError."""
    text = evaluation.table(read_json(file, ("protocol", "rows")))
    columns, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    notes = [line for line in text.splitlines() if line and not line.startswith("|")]
    return ("The teacher, plain DDIM, and the students in 4, 2 and 1 steps", columns, lines), notes


# ---- the page --------------------------------------------------------------------------------------------------------

# a number, alone or with its interval, its multiple or another beside it: "1.50 (1.2 to 1.9)", "2.1 ± 0.3; 0.01", "-", ""
NUMBER = re.compile(r"(?:[-+±.\d][-+±.\d,;()%×xeto ]*)?")


def sides(columns, lines):
    """Which way each column is set: "number" (to the right) if all its cells are numbers, else "text"."""
    return ["number" if all(NUMBER.fullmatch(str(line[i])) for line in lines) else "text" for i in range(len(columns))]


def inline(png):
    """The bytes of a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def duration(seconds):
    """1 s, 2 min, 3.4 h: whichever reads best."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #595959; --page: #fff; --line: #dcdcdc; --tint: #f5f6f8; --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --soft: #a6a6a6; --page: #17191c; --line: #3b3e43; --tint: #212428; --link: #8ab8f0 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem; color: var(--text); background: var(--page);
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif }
h1, h2, h3 { line-height: 1.2; margin: 0; text-wrap: balance }
h1 { font-size: 2rem; letter-spacing: -0.01em }
h2 { font-size: 1.4rem }
h3 { font-size: 1rem }
p, ul, dl { margin: 0.75rem 0 }
p, li, dd, h2, aside h3 { max-width: 68ch; overflow-wrap: break-word }
a { color: var(--link); text-underline-offset: 0.15em }
code { font: 0.85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace }
pre { margin: 0.75rem 0; padding: 0.6rem 0.8rem; background: var(--tint); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere }
section, aside { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line) }
figure { margin: 1rem 0 }
figcaption, .soft, .name { color: var(--soft); font-size: 0.875rem }
.name { margin: 0 0 0.2rem; letter-spacing: 0.04em; text-transform: uppercase }
img { display: block; max-width: 100%; height: auto; background: #fff }
ul { padding-left: 1.2rem }
li { margin: 0.25rem 0 }
ul.verdict > li:first-child { font-weight: 600 }

/* the first screen: words and contents beside the pictures */
header { display: grid; gap: 0.5rem 2.5rem; align-items: start }
header img { max-height: 85vh }
.lead { font-size: 1.1rem }
nav { font-size: 0.875rem; line-height: 1.35; color: var(--soft) }
nav p { margin: 0.6rem 0; max-width: 84ch }
nav a { font-weight: 600; text-decoration: none }
nav a:hover { text-decoration: underline }
@media (min-width: 62rem) {
  header { grid-template: auto 1fr / minmax(0, 1.25fr) minmax(0, 1fr) }
  header > :nth-child(2) { grid-area: 1 / 2 / 3 / 3 }
}

/* what is too wide for a narrow screen scrolls in a box of its own */
.scroll { overflow-x: auto }
figcaption.title { color: var(--text); font-weight: 600; margin-bottom: 0.4rem }
.scroll:focus-visible { outline: 2px solid var(--link) }
section figure img { max-width: min(100%, 56rem); min-width: min(34rem, 160vw) }
@media (prefers-color-scheme: dark) { img { border-radius: 6px; border: 8px solid #fff } }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.35; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; font-weight: 600 }
tbody tr:hover { background: var(--tint) }
th:first-child, td:first-child { padding-left: 0 }
.number { text-align: right }
td.number { white-space: nowrap }

dt { font-weight: 600 }
dd { margin: 0 0 0.5rem }
@media (min-width: 48rem) { dl { display: grid; grid-template-columns: 11rem 1fr; column-gap: 1rem } }
summary { cursor: pointer; color: var(--soft); font-size: 0.875rem }
aside { padding: 1.25rem; border: 2px dashed var(--soft); border-radius: 8px; background: var(--tint) }
aside .tables { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start }
aside figure { max-width: 100% }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line) }
"""

PAGE = """
{%- macro show(caption, columns, lines) %}
{% set side = sides(columns, lines) %}
<figure>
<figcaption class="title">{{ caption }}</figcaption>
<div class="scroll" tabindex="0" role="region" aria-label="{{ caption }}">
<table>
<thead><tr>{% for title in columns %}<th scope="col" class="{{ side[loop.index0] }}">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in lines %}
<tr>{% for cell in line %}<td class="{{ side[loop.index0] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</figure>
{% endmacro %}

{%- macro made(study) %}
{% for caption, columns, lines in study.tables %}{{ show(caption, columns, lines) }}{% endfor %}
<p class="soft">{{ study.protocol }}
{% for library, version in study.versions.items() %}{{ library }} {{ version }}{{ ", " if not loop.last else "." }}{% endfor %}

The last call took {{ duration(study.seconds) }}; what earlier calls had left was not made again.</p>
<pre><code>{{ study.command }}</code></pre>
{% if study.runs %}
<details><summary>The {{ study.runs|length }} training run{{ "s" if study.runs|length > 1 }} behind it</summary>
<pre><code>{{ study.runs|join("\n") }}</code></pre></details>
{% endif %}
{% endmacro -%}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reflow: a diffusion model in 1, 2 or 4 steps</title>
<link rel="icon" href="data:,">
<style>{{ style|safe }}</style>
</head>
<body>
<header>
<div>
<h1>A diffusion model in 1, 2 or 4 steps instead of 32</h1>
<p class="lead">A diffusion model draws a picture by asking its network some 32 times, because the path from noise to picture is curved.
Reflow trains the same network until that path is straight, window of time by window, so that four, two, or even one question is enough.</p>
</div>
{% if samples %}
<div id="{{ samples.name }}">
<figure>
<img src="{{ inline(samples.picture) }}" alt="{{ samples.question }}">
<figcaption>The same noise and caption along each row; who drew it, and in how many steps, above each column.
{{ samples.verdict|join(" ") }}</figcaption>
</figure>
<details><summary>How these pictures were made</summary>{{ made(samples) }}</details>
</div>
{% endif %}
<nav aria-label="Contents">
{% for study in studies %}
<p><a href="#{{ study.name }}">{{ study.question }}</a> {{ study.verdict[:1]|join }}</p>
{% endfor %}
{% if embedded %}
<p><a href="#embedded">The embedded default.</a> What comes with the repository, measured.</p>
{% endif %}
<p><a href="#paper">What the papers report.</a> Stable Diffusion 1.5 on COCO, and small images: theirs, not ours.</p>
{% if missing %}
<p><a href="#missing">Not in this report.</a> {{ missing|length }} without results.</p>
{% endif %}
</nav>
</header>

<section>
<h2>How to read the numbers</h2>
<p>All of ours are measured on one Stable Diffusion small enough to train on two CPU cores, which draws emoji of 32 pixels. They rank
methods on this model, and say nothing certain of large ones.</p>
<dl>
<dt>teacher, student</dt><dd>The diffusion model as it was, and the copy that reflow trains.</dd>
<dt>steps</dt><dd>How often the network is asked for a picture. The teacher's own paths are solved in 32.</dd>
<dt>windows, 8→4→2</dt><dd>The stretches of time in which a student's path is straight, one step each; 8→4→2 is trained for 8, then 4, then
2. That is progressive reflow; direct, or straight to 4, has a single stage.</dd>
<dt>FD</dt><dd>Frechet distance between features of generated and real pictures. Lower is better. The features are those of the repository's
own small CLIP, so it is not FID and compares with no paper.</dd>
<dt>CLIP score</dt><dd>How well picture and caption agree: 100 times the mean cosine. Higher is better.</dd>
<dt>endpoint error</dt><dd>How far a picture's latent ends from the teacher's of the same noise, root mean square. Lower is better.</dd>
<dt>alpha</dt><dd>Weight of the direction term, 1 - cos between the student's velocity and its target.</dd>
<dt>evaluations</dt><dd>What training cost: forward passes of the network, a backward pass counted as two.</dd>
<dt>± and (a to b)</dt><dd>95% intervals: ± over seeds of training, (a to b) over the choice of images.</dd>
</dl>
</section>

{% for study in studies %}
<section id="{{ study.name }}">
<p class="name">{{ study.name|replace("-", " ") }}</p>
<h2>{{ study.question }}</h2>
<ul class="verdict">
{% for sentence in study.verdict[:6] %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
{% if study.verdict[6:] %}
<details><summary>{{ study.verdict[6:]|length }} more comparisons</summary><ul>
{% for sentence in study.verdict[6:] %}
<li>{{ sentence }}</li>
{% endfor %}
</ul></details>
{% endif %}
<figure class="scroll"><img src="{{ inline(study.picture) }}" alt="{{ study.question }}"></figure>
{{ made(study) }}
</section>
{% endfor %}

{% if embedded %}
<section id="embedded">
<h2>The embedded default</h2>
{% set table, notes = embedded %}
{{ show(*table) }}
{% for note in notes %}<p class="soft">{{ note }}</p>{% endfor %}
</section>
{% endif %}

<aside id="paper">
<h2>What the papers report (theirs, not ours)</h2>
<p>Ke et al., <cite>ProReflow: Progressive Reflow with Decomposed Velocity</cite>, CVPR 2025, <a
href="https://arxiv.org/abs/2503.04824">arXiv 2503.04824</a>, on Stable Diffusion 1.5 and COCO; Kim et al., <cite>Simple ReFlow: Improved
Techniques for Fast Flow Models</cite>, ICLR 2025, <a href="https://arxiv.org/abs/2410.07815">arXiv 2410.07815</a>. FID is on Inception's
features; nothing on this page compares with it. These tables have no intervals. Rectified Diffusion's authors measured the public PeRFlow
at 22.97 on COCO 2017, where Table 1 has 23.81: two setups differ by as much as ProReflow-I gains.</p>
<div class="tables">
{% for caption, columns, lines in paper %}{{ show(caption, columns, lines) }}{% endfor %}
</div>
</aside>

{% if missing %}
<section id="missing">
<h2>Not in this report</h2>
<p>No results were found of these. Each command makes them; then run report.py again.</p>
<ul>
{% for question, command in missing %}
<li>{{ question }} <code>{{ command }}</code></li>
{% endfor %}
</ul>
</section>
{% endif %}

<footer class="soft">Pictures are made by a model trained on emojis designed by OpenMoji, the open-source emoji and icon project, licence
CC BY-SA 4.0; share them alike.</footer>
</body>
</html>
"""


def page(studies, embedded, missing):
    """The HTML page. studies: as read_study gives them, in order; embedded: as read_embedded gives it, or None; missing:
    (question, command) of what is not there. Everything from the results is escaped.  Returns: str."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(sides=sides, inline=inline, duration=duration)
    samples = next((study for study in studies if study["name"] == "samples"), None)
    return environment.from_string(PAGE).render(
        style=STYLE, samples=samples, studies=[study for study in studies if study is not samples],
        embedded=embedded, paper=PAPER, missing=missing)


# ---- the README --------------------------------------------------------------------------------------------------------

# the studies whose tables the README shows: name of the block -> (study, how many of its tables)
SHOWN = {"ablation": ("ablation", 2), "baselines": ("baselines", 1), "onestep": ("one-step", 1), "simple": ("simple-reflow", 1),
         "both": ("best-of-both", 1)}


def blocks(studies, folder):
    """What stands between the marks of the README. studies: name -> read_study; folder: of tiny.json and demo.json.
    Returns: name of the block -> Markdown; without those whose files are not there."""
    found = {"overview": overview([studies[name] for name in STUDIES if name in studies])}
    found |= {name: tables(dict(tables=studies[study]["tables"][:count])) for name, (study, count) in SHOWN.items() if study in studies}
    files = {name: folder / f"{name}.json" for name in ("tiny", "demo")}
    return found | {name: evaluation.table(read_json(file, ("protocol", "rows")), brief=True).strip()
                    for name, file in files.items() if file.is_file()}


def write_readme(file, found):
    """Writes each block into its marks in the file.  Raises UserError where the file or marks are missing."""
    if not file.is_file():
        raise UserError(f"--readme {file}: no such file; give one with the marks <!-- NAME --> and <!-- /NAME -->")
    text = file.read_text(encoding="utf-8")
    for name, block in found.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise UserError(f"--readme {file}: has no marks {start.strip()} and {end.strip()}; put each on a line of its own, once")
        text = text[:text.index(start) + len(start)] + block + text[text.index(end):]
    data.write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def main(c):
    results, embedded, out = Path(c.results), Path(c.embedded), Path(c.out)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder does not exist'}; give a file such as report.html")
    found = {file.stem: read_study(file) for file in sorted(results.glob("*.json"))}
    if not found:
        raise UserError(f"--results {results}: no study's results there; python eval.py --study all makes them")
    order = sorted(found, key=[*dict.fromkeys([*STUDIES, *found])].index)
    missing = [(study.__doc__.strip(), f"python eval.py --study {name}") for name, study in STUDIES.items() if name not in found]
    if not embedded.is_file():
        missing.append((f"The embedded default, as {embedded}", "python eval.py runs/train"))
    text = page([found[name] for name in order], read_embedded(embedded) if embedded.is_file() else None, missing)
    data.write_atomically(out, lambda part: part.write_text(text, encoding="utf-8"))
    if c.readme:
        write_readme(Path(c.readme), blocks(found, embedded.parent))
        for name, study in found.items():
            data.write_atomically(results / f"{name}.md", lambda part, study=study: part.write_text(markdown(study), encoding="utf-8"))
    print(f"{out}: {len(found)} studies, {out.stat().st_size / 1e6:.1f} MB"
          + (f"; missing: {'; '.join(dict(missing).values())}" if missing else ""))


if __name__ == "__main__":
    config.run(main, Config, __doc__)
