"""Runs trained and rows measured, each once, several at a time; and what a few seeds allow to be
said about them."""
import json
import math
import multiprocessing
import os
import queue
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from scipy import stats
from tqdm import tqdm

import train
from evaluation import measuring, protocols
from evaluation.metrics import mean_interval
from models.conditions import trajectory_counts
from runtime import cli, plan, processes, store
from runtime.cli import UserError


@dataclass
class Config:
    study: list[str] = field(default_factory=list, metadata=dict(positional=True))  # which, or all
    seeds: int = 5              # of training; most studies use fewer, see each
    scale: float = 1.0          # share of every budget (updates, trajectories): 0.01 to see that it runs
    model: str = "tiny"         # the teacher
    data: str = ""              # images with captions; default: the model's own, scenes for tiny
    out: str = "runs/study"     # trained runs, caches and measured rows
    results: str = "results/studies"  # tables and figures
    n: int = 1024               # images per row
    real: int = 16384           # real images of the reference
    paths: int = 64             # trajectories per row, for the endpoint error
    clip: str = ""              # CLIPModel folder, of CLIP scores; default: the embedded one
    judge: str = ""             # folder of the judge: FD, prompts followed; default: the embedded one
    methods: list[str] | None = None   # of the study `methods`, these alone, e.g. perflow lcm; default: all
    workers: int | None = None  # runs trained, and rows measured, at a time; default: one per GPU, or one per
                                # core
    device: str = ""            # cpu, cuda, mps or xpu; default: cuda if there is one


# ---- training and measuring --------------------------------------------------------------------------------


def label(c):
    """What tells the runs and results of another teacher than the default from its; "" of the default."""
    return "" if c.model == Config.model else Path(c.model).name


class Lab:
    """Trains runs and measures rows, `workers` at a time on a thread each, and keeps both."""

    def __init__(self, c):
        self.c, self.out = c, Path(c.out, label(c))
        self.device = processes.pick_device(c.device)
        self.workers = c.workers or (torch.cuda.device_count() if self.device == "cuda" else os.cpu_count())
        self.free = queue.SimpleQueue()  # numbers of the workers (on CUDA: of the GPUs) without a job
        for i in range(self.workers):
            self.free.put(i)
        self.commands, self.records = [], []                # of the study at hand

    def updates(self, count, stages=1):
        """A budget of updates, scaled."""
        return max(stages, round(count * self.c.scale))

    def cached(self, seed=0, trajectories=2048):
        """Options that name the first so many of a cache of trajectories, one per seed."""
        count = max(16, round(trajectories * self.c.scale))
        return f"--seed {seed} --cache {self.out}/cache/{seed} --trajectories {count}"

    def parse(self, options):
        """train.Config of a run's options."""
        given = {f"--{name}": getattr(self.c, name) for name in ("model", "data", "device")
                 if getattr(self.c, name)}
        common = "--batch 16 --grid-steps 0 --log-steps 50 --checkpoint-steps 2000 --keep 1".split()
        return cli.parse(train.Config, "",
                         [*(word for pair in given.items() for word in pair), *common, *shlex.split(options)])

    def train(self, runs):
        """runs: name -> options of train.py. Those not finished are trained.
        Returns: name -> folder of the run."""
        folders, jobs, caches = {}, {}, {}
        for name, options in runs.items():
            folders[name] = folder = self.out / name
            c = self.parse(f"{options} --out {folder}")
            recipe = train.resolve_recipe(c)
            command = train.command(c)
            self.commands.append(command)
            if not (folder / f"student-{recipe.stages[-1]}" / "reflow.json").is_file():
                jobs[name] = command
                if recipe.pairs == "trajectory":  # made once, before several runs ask for it at the same time
                    needed = caches.setdefault(c.cache or str(folder), {})
                    key = trajectory_counts(c, recipe), recipe.forward_rate, recipe.projection
                    needed[key] = f"{command} --cache-only"

        def fill(cache):
            for command in caches[cache].values():          # they share its folder: one after the other
                self.run(command, cache)
        with ThreadPoolExecutor(self.workers) as pool:
            for desc, names, work in (("caches", caches, fill),
                                      ("runs", jobs, lambda name: self.run(jobs[name], name))):
                with tqdm(total=len(names), desc=desc, disable=not names) as bar:
                    for name, _ in zip(names, pool.map(work, names)):
                        bar.set_postfix_str(name)
                        bar.update()
        return folders

    def run(self, command, name):
        """Run a command of this project to its end, quietly, on one thread.  Raises UserError with
        its last line if it fails."""
        words = shlex.split(command)
        words[:2] = [sys.executable, str(Path(__file__).parent.parent / words[1])]
        worker = self.free.get()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = str(worker)
        try:
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
        finally:
            self.free.put(worker)
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"{name}: {command} ended with status {done.returncode}: {reason}")

    def measure(self, requests):
        """requests: dicts of Evaluator.row's arguments, `folder` and `steps` at least;
        `seed`, of the first image, where other noise than eval.py's is asked for.
        Returns: their rows, in order."""
        files = [self.row_file(request) for request in requests]
        missing = {file: request for file, request in zip(files, requests) if not file.is_file()}
        if missing:
            for seed in {request.get("seed", protocols.Config.seed) for request in missing.values()}:
                evaluator(self.c, seed)  # what all rows share is made before the workers ask for it
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(self.workers, context, start_worker, (self.c,))
            with pool, tqdm(total=len(missing), desc="rows") as bar:
                for file, row in zip(missing, pool.map(partial(measure_row, self.c), missing.values())):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    store.write_atomically(file, lambda part: part.write_text(json.dumps(row, indent=1)))
                    bar.update()
        rows = [json.loads(file.read_text()) for file in files]
        for request, row in zip(requests, rows):
            record = self.record(request, row)
            self.records += [record] * (record not in self.records)
        return rows

    def record(self, request, row):
        """A measured row as a program reads it. evaluations: forwards of a network over all samples until
        this student was there, a backward counted as two; samples, evaluations: 0 of the teacher.
        edit: what was done to its velocities, if anything."""
        file = Path(request["folder"]) / "reflow.json"
        info = json.loads(file.read_text()) if file.is_file() else {}
        settings, edit = info.get("config", {}), request.get("edit")
        samples = info.get("updates", 0) * settings.get("batch", 0)
        taken = {name: row.get(name) for name in ("windows", "steps", "solver", "guidance", "nfe", "fd",
                                                  "fd_corrected", "fd_interval", "endpoint_error",
                                                  "prompt_accuracy", "clip")}
        plain = not info and row["steps"] != protocols.Config.teacher_steps and row["solver"] == "ddim"
        seeds = dict(training=settings.get("seed"), evaluation=request.get("seed", protocols.Config.seed))
        method = "ddim" if plain else row["method"]
        return dict(method=method, recipe=info.get("recipe"), run=str(file.parent), **taken, seeds=seeds,
                    samples=samples, evaluations=info.get("cost", {}).get("evaluations", 0) + 3 * samples,
                    edit=edit and edit[0])

    def row_file(self, request):
        """Where a row is kept: named after everything it depends on."""
        edit = request.get("edit")
        key = {**request, "edit": edit and edit[0], "folder": str(request["folder"]),
               "age": measuring.file_age(str(request["folder"])),
               "protocol": [self.c.n, self.c.real, self.c.paths, self.c.clip, self.c.judge, self.c.model],
               "distance": "grouped jackknife"}
        return self.out / "rows" / f"{store.digest(json.dumps(key, sort_keys=True))}.json"

    def costs(self, options):
        """Forward passes of a network over all samples, a backward counted as two.
        Returns: (of a run's trajectories, of an update)."""
        c = self.parse(options)
        recipe = train.resolve_recipe(c)
        total, before = 0, 0
        for windows, share in zip(recipe.stages, recipe.shares):
            beside = plan.solved(recipe, windows, before) / recipe.reuse + plan.matched(recipe, windows)
            total, before = total + share * c.batch * (3 + beside), windows
        cached = sum(trajectory_counts(c, recipe)) * recipe.solver_steps * (recipe.pairs == "trajectory")
        return cached, total / sum(recipe.shares)

    def evaluations(self, options):
        """What a run costs, trajectories included."""
        trajectories, update = self.costs(options)
        return trajectories + self.parse(options).updates * update

    def within(self, budget, options):
        """The options with as many updates as the budget of evaluations allows."""
        trajectories, update = self.costs(options)
        return f"{options} --updates {max(8, round((budget * self.c.scale - trajectories) / update))}"


EVALUATORS = {}               # of this process: --seed of the first image -> Evaluator


def evaluator(c, seed=protocols.Config.seed):
    if seed not in EVALUATORS:
        EVALUATORS[seed] = measuring.Evaluator(protocols.Config(
            n=c.n, real=c.real, paths=c.paths, clip=c.clip, judge=c.judge, teacher=c.model, device=c.device,
            cache=f"{c.out}/eval", seed=seed))
    return EVALUATORS[seed]


def start_worker(c):
    if processes.pick_device(c.device) == "cpu":
        torch.set_num_threads(1)


def measure_row(c, request):
    request = dict(request)
    return evaluator(c, request.pop("seed", protocols.Config.seed)).row(**request, costly=False)


# ---- statistics and words ----------------------------------------------------------------------------------


def shown(values, digits=2):
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def paired(a, b):
    """a - b, pair by pair.  Returns: (mean, half width of the 95% interval, p of the paired
    t-test)."""
    difference = [x - y for x, y in zip(a, b)]
    return *mean_interval(difference), float(stats.ttest_rel(a, b).pvalue) if len(a) > 1 else math.nan


def holm(ps):
    """p-values adjusted for as many tests as there are (Holm 1979): below 0.05 in a study in which
    nothing is different, one or more comes out at most once in twenty studies.
    NaN where there was no test, which does not count as one.  Returns: list, in the same order."""
    order, adjusted, largest = sorted((p, i) for i, p in enumerate(ps)
                                      if not math.isnan(p)), [math.nan] * len(ps), 0.0
    for k, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - k) * p))
        adjusted[i] = largest
    return adjusted


@dataclass
class Comparison:
    """Of a, one value per seed (or group of images: what), with b, for something that should be
    low."""
    label: str
    a: list
    b: list
    unit: str = "FD"
    pairs: str = "seeds"        # of training; or groups of images, of one seed of training each
    p: float = math.nan         # adjusted for all comparisons of the study: judge()

    @property
    def outcome(self):
        """better, worse, or neither."""
        return "no difference is shown" if not self.p < 0.05 else "better" if paired(self.a, self.b)[
            0] < 0 else "worse"

    def __str__(self):
        mean, half, _ = paired(self.a, self.b)
        if not math.isfinite(half):
            return f"{self.label}: {mean:+.3f} {self.unit} (one seed)."
        return (f"{self.label}: {self.outcome} ({mean:+.3f} {self.unit}, 95% interval {mean - half:+.3f} to "
                f"{mean + half:+.3f}, p = {self.p:.2g}, {len(self.a)} {self.pairs}).")


def judge(comparisons):
    """Gives all Comparisons of a study their adjusted p.  Returns: the sentence that says so."""
    raw = [paired(each.a, each.b)[2] for each in comparisons]
    for each, p in zip(comparisons, holm(raw)):
        each.p = p
    return (f"Paired t-tests, p adjusted by Holm's method for the {sum(not math.isnan(p) for p in raw)} "
            "comparisons of this study; a difference is shown where it is below 0.05. Intervals are of one "
            "comparison alone.")


def counted(comparisons):
    """How often each outcome came out, in words."""
    outcomes = [each.outcome for each in comparisons]
    return ", ".join(f"{word} in {outcomes.count(word)}"
                     for word in ("better", "worse", "no difference is shown") if word in outcomes) \
        + f" of {len(outcomes)} comparisons"
