"""Measures students against their teacher: python eval.py runs/demo

Everything is generated from the same noise and captions: the teacher in 32 DDIM steps, the
untrained student (plain DDIM in 8, 4, 2, 1 steps), and every student found under the run.
--protocol says with which captions and against which images:

    python eval.py runs/demo
    torchrun --nproc_per_node=8 eval.py runs/sd15 --protocol coco2017-5k --data coco --dtype fp16

The first is protocol tiny: the embedded pictures.

Leaves results.json, results.md and grid.png in the run. Safe to interrupt: what has been generated
is kept under --cache.

FID is the Frechet distance on features of Inception. The protocols tiny and pixel have the features
of the repository's own judge of scenes, and real images nobody trained on: that is called FD here,
and compares with no published number. Either is too high on average, by c / N: the corrected one is not
(metrics.frechet_groups), and has the interval. Published FIDs are plain.
"""
import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import sampler
from data import coco, imaging
from evaluation import measuring, protocols
from evaluation.protocols import Config
from models import load, saved
from runtime import cli, processes, store
from runtime.cli import UserError

GRID_PROMPTS = (load.ASSETS / "scenes" / "prompts.txt").read_text().splitlines()


# ---- python eval.py RUN ------------------------------------------------------------------------------------


def main(c):
    run = Path(c.run)
    if not c.run or not run.is_dir():
        raise UserError(f"{c.run or 'no run'}: give the folder that train.py wrote, e.g. python eval.py "
                        "runs/demo")
    store.check_writable(run)
    students = list(run.rglob("student-*/reflow.json"))
    if not students:
        raise UserError(f"{run}: no finished student in it (student-*/reflow.json); train first: python "
                        f"train.py --out {run}")
    infos = {file: saved.read_about(file.parent, "teacher", "method", "windows") for file in students}
    students.sort(key=lambda file: (in_order(name_of_run(file, run)), -infos[file]["windows"], file))
    infos = [infos[file] for file in students]
    names = {info["teacher"] for info in infos}
    if len(names) > 1:
        raise UserError(f"{run}: students of several teachers ({', '.join(sorted(names))}); evaluate their "
                        "runs one by one")
    c = dataclasses.replace(c, teacher=c.teacher or names.pop())
    size, fewest = protocols.resolve(c)[0].size, min(info["windows"] for info in infos)
    if max(c.steps) < fewest:
        raise UserError(f"--steps {' '.join(map(str, c.steps))}: fewer than the windows of every student in "
                        f"{run}; name {fewest} or more")
    # one teacher is measured for all
    for key in {"model_config", "random_init", "null_text", *["size"] * (size is None),
                *["guidance_teacher", "guidance_range"] * (c.guidance is None)}:
        values = {str(saved.settings(info)[key]) for info in infos}
        if len(values) > 1:
            raise UserError(f"{run}: students of runs with several --{key.replace('_', '-')} "
                            f"({', '.join(sorted(values))}); evaluate them one by one")
    cli.extra("KID", "torchmetrics.image.kid", "studies")  # now, not when all images are made
    rank, world, _, barrier = processes.start_processes(SimpleNamespace(device=c.device, shard=False))
    evaluator = measuring.Evaluator(c, rank, world, barrier, infos[0])
    c = evaluator.c

    # rows: (method, windows, steps, folder, solver, run)
    plan = [("teacher", None, c.teacher_steps, c.teacher, "ddim", "")]
    plan += [(solver, None, steps, c.teacher, solver, "") for solver in c.solvers for steps in c.ddim_steps]
    found = [(info["method"], info["windows"], steps, str(file.parent), c.solver, name_of_run(file, run))
             for file, info in zip(students, infos) for steps in c.steps if steps >= info["windows"]]
    # one step per window first; stable otherwise
    plan += sorted(found, key=lambda row: row[1] not in (1, row[2]))
    if rank == 0:
        about = {str(file.parent): info for file, info in zip(students, infos)}
        for _, _, steps, folder, _, _ in found:
            guidance = 1 if c.guide else evaluator.guidance(folder)
            for doubt in saved.doubts(folder, about[folder], (), steps, guidance):
                print(f"warning: {doubt}", file=sys.stderr)
    for _, _, steps, folder, solver, _ in plan:
        evaluator.features(folder, steps, solver)
        evaluator.trajectories(folder, steps, solver)
    if rank > 0:
        return None
    # the others are done; distances take longer than they would wait
    evaluator.processes = 0, 1, lambda: None
    rows = [dict(run=name, student=Path(folder).name if windows else "",
                 **evaluator.row(folder, steps, method, solver))
            for method, windows, steps, folder, solver, name in plan]
    result = dict(protocol=evaluator.describe(infos), rows=rows, **evaluator.floor())
    if evaluator.ids:                                          # one string: a line each would be 30,000 lines
        result["image_and_caption_ids"] = " ".join(f"{image}/{caption}" for image, caption in evaluator.ids)
    store.write_atomically(run / "results.json", lambda part: part.write_text(json.dumps(result, indent=1)))
    text = table(result)
    store.write_atomically(run / "results.md", lambda part: part.write_text(text, encoding="utf-8"))
    print(table(result, brief=True))
    picture(evaluator, plan, run / "grid.png")
    print(f"All columns and the protocol: {run}/results.json, results.md. Pictures: {run}/grid.png")
    return result


def name_of_run(file, run):
    """Where under the folder `run` the run lies that left RUN/student-K/reflow.json: "" for itself,
    else its path, "seed-1"."""
    return file.parent.parent.relative_to(run).as_posix().removeprefix(".")


def in_order(name):
    """A key by which seed-2 comes before seed-10, and "" before all."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def table(result, brief=False):
    """results as a Markdown table, with what they have of these columns. brief: six of them, for a
    terminal, and no protocol."""
    protocol, rows = result["protocol"], result["rows"]
    fd, kd = ("FID", "KID") if protocol.get("distance") == "FID" else ("FD", "KD")

    def number(digits, scale=1):
        return lambda value: "-" if value is None else f"{value * scale:.{digits}f}"

    def numbers(digits):
        return lambda values: "-" if values is None else " ".join(map(number(digits), values))
    # results of before the correction have the plain distance alone, with the interval beside it
    leading = "fd_corrected" if "fd_corrected" in rows[0] else "fd"
    columns = {
        "method": ("method", str), "windows": ("windows", number(0)), "steps": ("steps", number(0)),
        "nfe": ("NFE", number(0)),
        "nfe_pairs_as_one": ("NFE, pairs as 1", number(0)), "fd_corrected": (f"{fd} corrected", number(2)),
        "fd": (fd, number(2)),
        "fd_teacher": (f"{fd} to teacher", number(2)),
        "fd_teacher_corrected": (f"{fd} to teacher, corrected", number(2)),
        "kid": (f"{kd} x 1000", number(2, 1000)), "cmmd": ("CMMD", number(3)),
        "clip": ("CLIP score", number(1)),
        "prompt_accuracy": ("prompts followed", lambda shares: f"{shares['all']:.1%}"),
        "picture_distance": ("distance of pictures", number(3)),
        "endpoint_error": ("endpoint error", number(3)), "straightness": ("straightness", numbers(3)),
        "chord_error": ("chord error", numbers(3)), "seconds_per_image": ("s/image", number(4))}
    columns[leading] = f"{columns[leading][0]} (95%)", columns[leading][1]
    # a FID as published beside the corrected one; elsewhere nobody compares with the plain one, and time is
    # of interest
    last = "fd" if fd == "FID" and leading != "fd" else "seconds_per_image"
    agreement = "prompt_accuracy" if "prompt_accuracy" in rows[0] else "clip"
    columns = {key: column for key, column in columns.items()
               if key in rows[0] and
               (not brief or key in ("method", "windows", "steps", leading, agreement, last))}
    lines = [f"| {' | '.join(title for title, _ in columns.values())} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = {key: said(row[key]) for key, (_, said) in columns.items()}
        cells[leading] += f" ({row['fd_interval'][0]:.2f} to {row['fd_interval'][1]:.2f})"
        if row.get("run", "") not in ("", row["method"]):
            cells["method"] += f" ({row['run']})"
        lines.append(f"| {' | '.join(cells.values())} |")
    bias = "not " * (leading == "fd") + "corrected for the bias of so few images"
    lines += ["",
              f"{fd}: Frechet distance on {protocol['features']}{' (not FID)' * (fd == 'FD')}, {bias}; "
              f"N = {protocol['n']} against {protocol['real']} real images; seeds {protocol['seeds'][0]} to "
              f"{protocol['seeds'][1]}; guidance {protocol['guidance']:g}"
              + (f" by {protocol['guide']}" if "guide" in protocol else "")
              + ", 1 for students that have learned theirs" * any(
                  row.get("guidance") == 1 != protocol["guidance"] for row in rows if row["windows"]) +
              f"; {protocol['solver']}. Commit {protocol['commit']}."]
    if "floor" in result:
        floor = result["floor"]
        followed = ", ".join(f"prompts followed {share['all']:.1%}" for key, share in floor.items()
                             if key == "prompt_accuracy")
        lines += ["", f"As many other real pictures: {fd} {floor['fd_corrected']:.2f} "
                      f"({floor['fd_interval'][0]:.2f} to {floor['fd_interval'][1]:.2f}), "
                      f"CLIP score {floor['clip']:.1f}{', ' * bool(followed)}{followed}."]
    lines += ["", f"Protocol: {protocol['text']}."] if "text" in protocol and not brief else []
    return "\n".join(lines) + "\n"


def picture(evaluator, plan, file, least=96):
    """grid.png: the same seeds and prompts down the rows; teacher, plain solvers and students
    across, at least so many pixels each."""
    c = evaluator.c
    own = [prompt for prompt in dict.fromkeys(evaluator.prompts) if prompt][:len(GRID_PROMPTS)]
    prompts = list(GRID_PROMPTS) if evaluator.protocol.split == "scenes" else own
    trained = [row for row in plan if row[1]]
    # of one run, the first that is progressive, or the first; of others what it has no student for
    shown = next((row for row in trained if row[1] > 1), trained[0])
    plain = [row for row in plan if row[0] in c.solvers]
    trained.sort(key=lambda row: (row[0], row[5]) == (shown[0], shown[5]))
    students = list({row[1:3]: row for row in trained if row[1] in (row[2], 1)}.values())
    columns = [row for row in plan if row[0] == "teacher"]
    for rows in (plain, [row for row in students if row[1] == row[2]] or students):
        columns += sorted([row for row in rows if row[2] in (4, 2, 1)] or rows, key=lambda row: -row[2])
    pictures = []
    for _, _, steps, folder, solver, _ in columns:
        pipeline, model, info = evaluator.open(folder)
        solve, spacing = sampler.parse_solver(solver)
        times = sampler.time_grid(steps, info.get("windows", 1), spacing, model.schedule)
        guidance = evaluator.guidance(folder)
        z = sampler.generate(pipeline, model, prompts, range(len(prompts)), times, guidance, c.batch,
                             size=c.size, solver=solve)
        drawn = imaging.to_pil(models.decode(pipeline, z),
                               -(-least // (z.shape[-1] * pipeline.vae_scale_factor)))
        pictures.append([image if image.width <= 256 else coco.square(image, 256) for image in drawn])
    titles = [f"{method.split('/')[0]}\n{steps} step{'s' * (steps > 1)}" for method, _, steps, *_ in columns]
    imaging.contact_sheet(list(zip(*pictures)), titles, prompts).save(file)


def run():
    cli.run(main, Config, __doc__)


if __name__ == "__main__":
    run()
