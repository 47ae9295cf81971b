"""Measures students against their teacher: python eval.py runs/demo

Everything is generated from the same noise and captions: the teacher in 32 DDIM steps, the untrained student (plain DDIM
in 8, 4, 2, 1 steps), and every student found under the run. --protocol says with which captions and against which images:

    python eval.py runs/demo                                                   # tiny: the embedded pictures
    torchrun --nproc_per_node=8 eval.py runs/sd15 --protocol coco2017-5k --data coco --dtype fp16

    python eval.py --study ablation                                            # questions, answered by many runs: studies.py

Leaves results.json, results.md and grid.png in the run. Safe to interrupt: what has been generated is kept under --cache.

FID is the Frechet distance on features of Inception. The protocols tiny and pixel have the features of the repository's own small
CLIP, and real images nobody trained on: that is called FD here, and compares with no published number. Either is too high on average, by
c / N: the corrected one is not (metrics.frechet_groups), and has the interval. Published FIDs are plain.
"""
import dataclasses
import functools
import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import PIL
import torch
import transformers

import coco
import config
import data
import export
import metrics
import pairs
import sampler
import sprites
import teacher
import train
from config import UserError
from metrics import Clip, Inception, clip_score, cmmd, frechet_distance, frechet_groups, kernel_distance, mean_interval, moments

GRID_PROMPTS = ("red heart on blue", "strawberry on pink", "pizza on gray", "penguin on orange", "fox on green", "animal on yellow", "food",
                "on purple")
VIT_G = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"

# ---- protocols are data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """What is measured against what. Options of the same names override the fields from n on."""
    split: str                   # where captions and real images come from: a row of data.SPRITES, or a split of COCO
    rule: str                    # which caption of an image, a row of coco.RULES
    network: str                 # whose features FD (FID) and KD (KID) compare: clip or inception
    images_per_feature: int      # fewer images than this for each feature are refused; and in any case as many as features
    fid_size: int | None         # pixels at which the networks see both sets; None = as generated
    n: int                       # images generated per row
    real: int                    # images of the reference
    clip: str                    # CLIPModel of CLIP score and CMMD
    teacher: str                 # where no student names one
    guidance: float
    size: int | None             # pixels of a generated image; None = what the model was made for
    batch: int
    paths: int                   # trajectories that straightness, endpoint and chord error are measured on
    note: str                    # where this comes from, and what of the papers' protocols is unknown


COCO_2017 = Protocol(
    split="val2017", rule="first", network="inception", images_per_feature=1, fid_size=None, n=5000, real=5000, clip=VIT_G,
    teacher="sd15", guidance=1.5, size=512, batch=16, paths=64,
    note="split, caption, resize and crop as in Rectified Diffusion's scripts, which sample phased students at guidance 1.5 in fp16 and "
         "use pytorch_fid, while ProReflow's guidance is unknown but for its ablation (4), and so are its seeds and dtype")
PROTOCOLS = {
    "tiny": Protocol(split="sprites", rule="", network="clip", images_per_feature=10, fid_size=None, n=2048, real=16384,
                     clip=str(teacher.ASSETS / "tiny-clip"), teacher="tiny", guidance=1.0, size=None, batch=64, paths=128, note="ours"),
    "pixel": Protocol(split="sprites-by-group", rule="", network="clip", images_per_feature=10, fid_size=32, n=2048, real=16384,
                      clip=str(teacher.ASSETS / "tiny-clip"), teacher="pixel", guidance=1.0, size=16, batch=64, paths=128, note="ours"),
    "coco2017-5k": COCO_2017,
    "sdxl-coco2017-5k": dataclasses.replace(COCO_2017, teacher="sdxl", size=1024, batch=4, paths=16),
    "coco2014-30k": dataclasses.replace(
        COCO_2017, split="val2014", rule="seeded", fid_size=256, n=30000, real=30000, size=None,
        note="256 pixels as in DMD2's script, while the 30,000 images and captions, the real images being those of the captions, and the "
             "guidance are ours: which ones the papers used is unknown"),
}
SHARD = 64                       # images that are lost at most when a process is killed; also the largest --batch that counts
STRAIGHTNESS_STEPS = 8           # DDIM steps in each window


@dataclass
class Config:
    run: str = field(default="", metadata=dict(positional=True))  # folder with student-* folders, at any depth
    protocol: str = "tiny"      # tiny, pixel, coco2014-30k, coco2017-5k or sdxl-coco2017-5k; its row of PROTOCOLS fills in the rest
    data: str = ""              # folder of COCO as it is distributed: annotations/captions_val2017.json, val2017/*.jpg, or 2014
    n: int | None = None        # images per row; torchrun takes --n for its own, unless there is a -- before eval.py
    real: int | None = None     # real images of the reference
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])  # of the students; fewer than its windows are left out
    ddim_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # of the untrained student
    solver: str = "ddim"        # of the students: SOLVER[:r][/GRID[:kappa]] of sampler.py's, e.g. dpm2:0.4/sigmoid:20
    solvers: list[str] = field(default_factory=lambda: ["ddim"])  # of the untrained student, one or more of these
    teacher_steps: int = 32     # of the teacher
    teacher: str = ""           # folder, hub id or preset; default: what the students name
    guidance: float | None = None  # of teacher and students alike; 1 = none
    guide: str = ""             # a weaker model, e.g. an earlier student: --guidance leads away from it, not from no text (autoguidance)
    size: int | None = None     # pixels of a generated image, square
    dtype: str = "fp32"         # of the networks: fp32, bf16 or fp16
    seed: int = 1_000_000       # of the first image
    batch: int | None = None    # images generated at a time; at most 64
    paths: int | None = None    # trajectories to measure straightness, endpoint and chord error on
    clip: str = ""              # CLIPModel folder or hub id
    inception: str = ""         # TorchScript file of the Inception network; default: downloaded
    cache: str = "runs/eval"    # features of real and generated images, shared by all runs
    save_images: str = ""       # folder to keep the images in as PNGs, reference and generated, for another's FID tool
    device: str = ""            # cpu or cuda; default: cuda if there is one


def resolve(c):
    """A Config with everything filled in that its protocol decides.  Returns: (c, Protocol).  Raises UserError."""
    protocol = config.choose("--protocol", c.protocol, PROTOCOLS)
    options = ("n", "real", "clip", "teacher", "guidance", "size", "batch", "paths")
    c = dataclasses.replace(c, **{name: getattr(protocol, name) for name in options if getattr(c, name) in (None, "")})
    config.at_least(c, guidance=0, batch=1, paths=1, steps=1, ddim_steps=1, teacher_steps=1, size=1, n=1, real=1)
    sampler.check_guide(c.guide, c.guidance)
    config.choose("--dtype", c.dtype, teacher.DTYPES)
    for solver in (c.solver, *c.solvers):
        sampler.parse_solver(solver)
    if protocol.split in data.SPRITES and c.data:
        raise UserError(f"--data {c.data}: --protocol {c.protocol} has its own images; leave it out, or give another --protocol")
    if protocol.split not in data.SPRITES and not c.data:
        raise UserError(f"--protocol {c.protocol}: needs COCO; give --data FOLDER, with annotations/captions_{protocol.split}.json and "
                        f"{protocol.split} in it")
    return c, protocol


def real_images(n, stream, levels=sprites.LEVELS, size=sprites.SIZE):
    """n images and captions of the mix of caption levels, held-out pairs included.  Returns: (images, captions)."""
    plans = sprites.plan(n, data.generator(0, "evaluation", stream), levels=levels)
    return torch.cat([sprites.render(chunk, size) for chunk in plans.split(2048)]), sprites.describe(plans, levels)[0]


def file_age(folder):
    """When the model's weights were written."""
    weights = Path(teacher.PRESETS.get(folder, (folder, ""))[0]) / "unet" / "diffusion_pytorch_model.safetensors"
    return weights.stat().st_mtime_ns if weights.is_file() else 0


class Asked:
    """A model whose evaluations are counted, and whose answers a study may edit: (name, function(z, t, x_hat, eps_hat) -> the same two)."""

    def __init__(self, model, edit=None):
        self.model, self.edit, self.calls = model, edit, 0

    def __getattr__(self, name):                               # schedule, coefficients, windows
        return getattr(self.model, name)

    def __call__(self, z, t, cond, guidance=1.0, uncond=None):
        self.calls += 1
        answer = self.model(z, t, cond, guidance, uncond)
        return self.edit[1](z, t, *answer) if self.edit else answer


# ---- one protocol, any number of models ----------------------------------------------------------------------------


class Evaluator:
    """A protocol with its captions, networks, real images and teacher, ready to measure models: row(). What all rows share is made here.
    c: Config; rank, world, barrier: of the processes, which all generate; the first alone computes distances; student: reflow.json
    of one, whose teacher is opened as its run opened it.  Raises UserError."""

    def __init__(self, c, rank=0, world=1, barrier=lambda: None, student=None):
        self.c, self.protocol = c, protocol = resolve(c)
        self.student = student
        self.processes, self.device = (rank, world, barrier), teacher.pick_device(c.device)
        torch.backends.cudnn.allow_tf32 = False                # fp32 is fp32 in a measurement, whatever training has set
        torch.set_float32_matmul_precision("highest")
        if rank:                                               # the first process downloads, the others find the files
            barrier()
        self.clip = Clip(c.clip, self.device)
        self.network = Inception(c.inception, self.device) if protocol.network == "inception" else self.clip
        if rank == 0:
            barrier()
        least = max(protocol.images_per_feature * self.network.dim, metrics.least_images(self.network.dim))
        for option, value in (("--n", c.n), ("--real", c.real)):
            if value < least:
                raise UserError(f"{option} {value}: must be at least {least} for a Frechet distance on the {self.network.dim} features of "
                                f"{self.network.name}")

        if protocol.split in data.SPRITES:
            size = c.size if protocol.fid_size else sprites.SIZE                 # drawn as generated, then seen at fid_size
            drawn = dict(levels=data.SPRITES[protocol.split], size=size)
            self.prompts, self.ids = real_images(c.n, "prompts", **drawn)[1], []
            key = data.digest(sprites.SHEET.read_bytes(), *[size] * (size != sprites.SIZE))
            pictures = functools.cache(lambda: real_images(c.real, "reference", **drawn)[0])

            def reference(part):
                return pictures()[part.start:part.stop]
        else:
            images = coco.Coco(c.data, protocol.split, protocol.rule, max(c.n, c.real))
            self.prompts, self.ids, key = images.captions[:c.n], images.ids[:c.n], images.key

            def reference(part):
                return images.images(part, protocol.fid_size or c.size)
        weights = pairs.fingerprint(self.clip.model)
        self.networks = dict(clip=[self.clip.name, weights], network=self.network.name, fid_size=protocol.fid_size)
        settings = dict(split=protocol.split, images=key, real=c.real, size=protocol.fid_size or c.size, **self.networks)
        rows = self.store("reference", c.real, settings, lambda part, name: self.look(reference(part), part, name), SHARD)[range(c.real)]
        self.reference = {key: value.to(self.device) for key, value in rows.items()}
        self.read, self.opened = {}, (None, None)
        self.teacher_path = self.path()
        self.teacher_rows = self.features(c.teacher, c.teacher_steps)

    # ---- rows on disk, of which every process makes its share ----

    def store(self, label, count, settings, solve, batch):
        """`count` rows, made `batch` at a time by solve(range of row numbers, name of the set) -> dict of tensors, where they are missing.
        Other settings are another set.  Returns: data.Rows."""
        folder = Path(self.c.save_images, "rows") if self.c.save_images else Path(self.c.cache)
        name = f"{re.sub('[/:]', '-', label)}-{data.digest(settings)}"

        @torch.no_grad()
        def shard(numbers):
            parts = [solve(numbers[first:first + batch], name) for first in range(0, len(numbers), batch)]
            return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return data.cached(folder / name, count, settings, shard, SHARD, *self.processes, desc=label)

    def look(self, images, part, name):
        """Features of the images of these numbers, (N, 3, H, W) in [-1, 1].  Returns: dict of (N, dim)."""
        size = self.protocol.fid_size
        if size and images.shape[-2:] != (size, size):
            images = coco.tensor(coco.square(picture, size) for picture in sampler.to_pil(images))
        if self.c.save_images:
            folder = Path(self.c.save_images, name)
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in zip(part, sampler.to_pil(images)):
                picture.save(folder / f"{i:06d}.png")
        found = {"clip": self.clip.images(images)}
        return found if self.network is self.clip else found | {self.protocol.network: self.network.images(images)}

    def open(self, folder):
        """(pipeline, model, reflow.json) of a model folder. The last one stays in memory: there may be no room for two."""
        key = folder, file_age(folder)
        if self.opened[0] != key:
            self.opened = None, None
            c = self.c
            self.opened = key, sampler.open_model(folder, self.device, teacher.DTYPES[c.dtype], guide=c.guide, size=c.size,
                                                   student=self.student)
        return self.opened[1]

    def about(self, folder):
        """(reflow.json, what decides its answers) of a model folder; read once, and again if its weights are new."""
        key = folder, file_age(folder)
        if key not in self.read:
            pipeline, model, info = self.open(folder)
            shape = sampler.latent_shape(pipeline, self.c.size)
            self.read[key] = info, dict(
                weights=pairs.fingerprint(pipeline.unet, *pairs.encoders(pipeline)), path=info.get("path", "vp"),
                schedule=data.digest(model.schedule.key, model.prediction), windows=info.get("windows", 1),
                size=[side * pipeline.vae_scale_factor for side in shape[1:]],
                **({"null": "zeros"} if pipeline.config.get("force_zeros_for_empty_prompt") else {}))
        return self.read[key]

    def settings(self, folder, steps, solver, guidance, edit, count):
        """What decides the first `count` images, and how they came about."""
        c = self.c
        return dict(**self.about(folder)[1], dtype=c.dtype, steps=steps, solver=solver, guidance=guidance, edit=edit and edit[0],
                    seed=c.seed, prompts=data.digest(*self.prompts[:count]), **({"guide": self.about(c.guide)[1]} if c.guide else {}))

    def generate(self, folder, part, steps, solver, guidance, edit, callback=None):
        """Images by number.  Returns: (latents (N, C, h, w), the model as Asked)."""
        pipeline, model, info = self.open(folder)
        solve, spacing = sampler.parse_solver(solver)
        asked, times = Asked(model, edit), sampler.time_grid(steps, info.get("windows", 1), spacing, model.schedule)
        prompts, seeds = self.prompts[part.start:part.stop], range(self.c.seed + part.start, self.c.seed + part.stop)
        z = sampler.generate(pipeline, asked, prompts, seeds, times, guidance, len(part), callback, size=self.c.size, solver=solve)
        return z, asked

    def path(self):
        """The teacher's own trajectories: z, (teacher_steps + 1, C, h, w) each."""
        c, count = self.c, min(self.c.paths, self.c.n)

        def solve(part, name):
            visited = []
            end, _ = self.generate(c.teacher, part, c.teacher_steps, "ddim", c.guidance, None, visited.append)
            return {"z": torch.stack([*(state["z"].cpu() for state in visited), end], 1)}
        return self.store("path", count, self.settings(c.teacher, c.teacher_steps, "ddim", c.guidance, None, count), solve, c.batch)

    def features(self, folder, steps, solver="ddim", guidance=None, edit=None):
        """Features of a model's images, (dim,) each, and what an image cost: seconds, evaluations of the network.  Returns: data.Rows."""
        c, folder, guidance = self.c, str(folder), self.c.guidance if guidance is None else guidance

        def solve(part, name):
            pipeline, start = self.open(folder)[0], time.perf_counter()
            z, model = self.generate(folder, part, steps, solver, guidance, edit)
            images = teacher.decode(pipeline, z)
            cost = torch.tensor([(time.perf_counter() - start) / len(part), model.calls], dtype=torch.float64).expand(len(part), 2)
            return {**self.look(images, part, name), "seconds": cost[:, 0], "evaluations": cost[:, 1]}
        settings = self.settings(folder, steps, solver, guidance, edit, c.n) | self.networks
        return self.store(f"{Path(folder).name}-{steps}-{solver}", c.n, settings, solve, c.batch)

    def trajectories(self, folder, steps, solver="ddim", guidance=None, edit=None):
        """Squared endpoint error of a model's trajectories, () each; straightness and squared chord error in K windows, (K,) each, the
        mean of their batch. K is the student's; for a teacher, what its steps have in common with 8. There is no chord error where
        the teacher's steps do not stop at every boundary.  Returns: data.Rows."""
        c, folder, guidance = self.c, str(folder), self.c.guidance if guidance is None else guidance
        info, count = self.about(folder)[0], min(c.paths, c.n)
        windows = info.get("windows") or math.gcd(steps, 8)

        def solve(part, name):
            path = self.teacher_path[part]["z"]
            end, model = self.generate(folder, part, steps, solver, guidance, edit)
            size = self.about(folder)[1]["size"]
            cond = teacher.encode_text(self.open(folder)[0], self.prompts[part.start:part.stop], size=size, device=self.device)
            uncond = None                                      # some models have no null embedding
            if guidance != 1:
                uncond = teacher.encode_text(self.open(folder)[0], [None] * len(part), size=size, device=self.device)
            straight = metrics.straightness(model, path[:, 0].to(self.device), cond, windows, STRAIGHTNESS_STEPS, guidance, uncond)
            found = {"straightness": torch.tensor(straight, dtype=torch.float64)}
            if c.teacher_steps % windows == 0:
                chord = metrics.chord_error(model, path.to(self.device), cond, windows, guidance, uncond)
                found["chord"] = torch.tensor(chord, dtype=torch.float64).square()
            return {"endpoint": (end - path[:, -1]).double().square().flatten(1).mean(1),
                    **{name: value.expand(len(part), windows) for name, value in found.items()}}
        settings = self.settings(folder, steps, solver, guidance, edit, count) | dict(
            measured_windows=windows, straightness_steps=STRAIGHTNESS_STEPS,
            teacher=self.settings(c.teacher, c.teacher_steps, "ddim", c.guidance, None, count))
        return self.store(f"{Path(folder).name}-{steps}-{solver}-trajectories", count, settings, solve, c.batch)

    # ---- numbers ----

    @functools.cached_property
    def texts(self):
        """CLIP features of the captions, (n, dim)."""
        return self.clip.texts(self.prompts)

    @functools.cached_property
    def teacher_features(self):
        """Of its own samples, (n, dim)."""
        return self.teacher_rows[range(self.c.n)][self.protocol.network].to(self.device)

    def row(self, folder, steps, method="", solver="ddim", guidance=None, edit=None, kernels=True):
        """Every column of a row of results.json, made where missing. folder: a model; guidance: default --guidance; edit: as for Asked, its
        name stands for it in the cache; kernels: KID and CMMD too, which take longer than a small model's images.
        Returns: dict; {} on all processes but the first."""
        c, guidance, network = self.c, self.c.guidance if guidance is None else guidance, self.protocol.network
        rows = self.features(folder, steps, solver, guidance, edit)
        paths = self.trajectories(folder, steps, solver, guidance, edit)
        if self.processes[0] > 0:
            return {}
        info, rows, paths = self.about(str(folder))[0], rows[range(c.n)], paths[range(len(paths))]
        features, captioned = rows[network].to(self.device), torch.tensor([bool(prompt) for prompt in self.prompts])
        reference, kernel_columns = self.reference[network], {}
        groups = frechet_groups(features, reference)
        corrected, half = mean_interval(groups)
        if kernels:
            kid, kid_std = kernel_distance(rows[network], reference.cpu())
            kernel_columns = dict(kid=kid, kid_std=kid_std, cmmd=cmmd(rows["clip"].to(self.device), self.reference["clip"]))
        evaluations = rows["evaluations"].mean().item()
        return dict(
            method=method or info.get("method", "teacher"), windows=info.get("windows"), steps=steps, solver=solver, guidance=guidance,
            nfe=round(evaluations * (1 if guidance in (0, 1) else 2)), nfe_pairs_as_one=round(evaluations),
            fd_corrected=corrected, fd_interval=[corrected - half, corrected + half], fd_groups=groups,
            fd=frechet_distance(moments(features), moments(reference)),
            fd_teacher_corrected=mean_interval(frechet_groups(features, self.teacher_features))[0], **kernel_columns,
            clip=clip_score(rows["clip"][captioned], self.texts[captioned]),
            endpoint_error=paths["endpoint"].mean().sqrt().item(), straightness=paths["straightness"].mean(0).tolist(),
            chord_error=paths["chord"].mean(0).sqrt().tolist() if "chord" in paths else None,
            seconds_per_image=rows["seconds"].mean().item())

    def describe(self, students):
        """The protocol of a table, item by item. students: their reflow.json.  Returns: dict; `text` says all of it in one string."""
        c, protocol, code, name = self.c, self.protocol, export.versions(), self.network.name
        sprite, made = protocol.split in data.SPRITES, self.about(c.teacher)[1]["size"][0]
        seen = protocol.fid_size or made
        levels = "caption levels" if protocol.split == "sprites" else "classes"
        decays = sorted({str(info.get("config", {}).get("ema", "unknown")) for info in students})
        found = dict(
            name=c.protocol, split="fresh sprites" if sprite else f"COCO {protocol.split}", n=c.n, real=c.real,
            captions=f"mix of {levels}, held-out pairs included" if sprite else coco.RULES[protocol.rule],
            reference=f"fresh sprite images, all pairs, mix of {levels}" if sprite else f"images of the first {c.real} captions",
            size=f"{made} pixels as generated, {seen} as both networks see them",
            resize="none" if sprite and made == seen else
            f"shorter side to {seen}, Lanczos (Pillow), of real{' and generated' * (seen != made)} images",
            crop="none" if sprite else "centre", distance="FID" if self.network is not self.clip and self.network.published else "FD",
            features=f"{name}, projected image features" if self.network is self.clip else f"{name}, {self.network.dim} features",
            clip=self.clip.name, clip_score="100 x mean cosine, no prefix" + ", empty captions left out" * sprite,
            cmmd="on the same CLIP, sigma 10, x 1000",
            steps=f"teacher {c.teacher_steps}, plain {' '.join(map(str, c.ddim_steps))}, students {' '.join(map(str, c.steps))}",
            nfe="network evaluations per image, counted; a guided pair is 2, in the column beside it 1", guidance=c.guidance,
            **({"guide": f"{c.guide} instead of no text"} if c.guide else {}),
            scheduler="the model's own schedule; within each window the solver's grid, uniform in t (trailing) where it names none",
            solver="DDIM" if c.solver == "ddim" else f"{c.solver} for the students, DDIM for the teacher",
            solvers=f"{', '.join(c.solvers)} for the plain teacher", teacher=c.teacher, seeds=[c.seed, c.seed + c.n - 1], dtype=c.dtype,
            weights=", ".join({"0": "raw", "0.0": "raw", "unknown": "unknown"}.get(ema, f"running average (EMA {ema})") for ema in decays),
            trajectories=f"first {min(c.paths, c.n)} seeds", endpoint_error=f"root mean square distance to the teacher's {c.teacher_steps} "
            "DDIM steps", straightness=f"mean square of u minus the chord's, {STRAIGHTNESS_STEPS} steps a window",
            chord_error="root mean square of u minus that of the teacher's chord, at its start",
            corrected=f"grouped jackknife, {metrics.GROUPS} groups of generated and of real images",
            interval="95%, of the corrected distance, over the choice of generated and real images, not over training",
            batch=min(c.batch, SHARD),
            seconds_per_image="wall time of text, sampling and decoding at this batch size, on one process", note=protocol.note,
            commit=code["commit"], versions={**code["versions"], "transformers": transformers.__version__, "pillow": PIL.__version__})

        def said(value):
            if isinstance(value, list):
                return " to ".join(map(str, value))
            if isinstance(value, dict):
                return ", ".join(map(" ".join, value.items()))
            return f"{value:g}" if isinstance(value, float) else value
        text = "; ".join(f"{key.replace('_', ' ')}: {said(value)}" for key, value in found.items())
        commands = [f"{info.get('command', 'unknown')} (commit {info.get('commit', 'unknown')})" for info in students]
        return dict(**found, text=text, students=commands)


# ---- python eval.py RUN --------------------------------------------------------------------------------------------


def main(c):
    run = Path(c.run)
    if not c.run or not run.is_dir():
        raise UserError(f"{c.run or 'no run'}: give the folder that train.py wrote, e.g. python eval.py runs/demo")
    students = sorted(run.rglob("student-*/reflow.json"),
                      key=lambda file: (in_order(name_of_run(file, run)), -int(file.parent.name.split("-")[1])))
    if not students:
        raise UserError(f"{run}: no finished student in it (student-*/reflow.json); train first: python train.py --out {run}")
    infos = [sampler.read_about(file.parent, "teacher", "method", "windows") for file in students]
    names = {info["teacher"] for info in infos}
    if len(names) > 1:
        raise UserError(f"{run}: students of several teachers ({', '.join(sorted(names))}); evaluate their runs one by one")
    c, _ = resolve(dataclasses.replace(c, teacher=c.teacher or names.pop()))
    for key in {"model_config", "random_init", "null_text", *["size"] * (c.size is None)}:      # one teacher is measured for all
        values = {str(export.settings(info)[key]) for info in infos}
        if len(values) > 1:
            raise UserError(f"{run}: students of runs with several --{key.replace('_', '-')} ({', '.join(sorted(values))}); evaluate them "
                            "one by one")
    rank, world, _, barrier = train.start_processes(SimpleNamespace(device=c.device, shard=False))
    evaluator = Evaluator(c, rank, world, barrier, infos[0])

    # rows: (method, windows, steps, folder, solver, run)
    plan = [("teacher", None, c.teacher_steps, c.teacher, "ddim", "")]
    plan += [(solver, None, steps, c.teacher, solver, "") for solver in c.solvers for steps in c.ddim_steps]
    found = [(info["method"], info["windows"], steps, str(file.parent), c.solver, name_of_run(file, run))
             for file, info in zip(students, infos) for steps in c.steps if steps >= info["windows"]]
    plan += sorted(found, key=lambda row: row[1] not in (1, row[2]))        # one step per window first; stable otherwise
    for _, _, steps, folder, solver, _ in plan:
        evaluator.features(folder, steps, solver)
        evaluator.trajectories(folder, steps, solver)
    if rank > 0:
        return None
    evaluator.processes = 0, 1, lambda: None                   # the others are done; distances take longer than they would wait
    rows = [dict(run=name, **evaluator.row(folder, steps, method, solver)) for method, _, steps, folder, solver, name in plan]
    result = dict(protocol=evaluator.describe(infos), rows=rows)
    if evaluator.ids:                                          # one string: a line each would be 30,000 lines
        result["image_and_caption_ids"] = " ".join(f"{image}/{caption}" for image, caption in evaluator.ids)
    data.write_atomically(run / "results.json", lambda part: part.write_text(json.dumps(result, indent=1)))
    text = table(result)
    data.write_atomically(run / "results.md", lambda part: part.write_text(text))
    print(table(result, brief=True))
    picture(evaluator, plan, run / "grid.png")
    print(f"All columns and the protocol: {run}/results.json, results.md. Pictures: {run}/grid.png")
    return result


def name_of_run(file, run):
    """Where under the folder `run` the run lies that left RUN/student-K/reflow.json: "" for itself, else its path, "seed-1"."""
    return file.parent.parent.relative_to(run).as_posix().removeprefix(".")


def in_order(name):
    """A key by which seed-2 comes before seed-10, and "" before all."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def table(result, brief=False):
    """results as a Markdown table, with what they have of these columns. brief: six of them, for a terminal, and no protocol."""
    protocol, rows = result["protocol"], result["rows"]
    fd, kd = ("FID", "KID") if protocol.get("distance") == "FID" else ("FD", "KD")

    def number(digits, scale=1):
        return lambda value: "-" if value is None else f"{value * scale:.{digits}f}"

    def numbers(digits):
        return lambda values: "-" if values is None else " ".join(map(number(digits), values))
    # results of before the correction have the plain distance alone, with the interval beside it
    leading = "fd_corrected" if "fd_corrected" in rows[0] else "fd"
    columns = {
        "method": ("method", str), "windows": ("windows", number(0)), "steps": ("steps", number(0)), "nfe": ("NFE", number(0)),
        "nfe_pairs_as_one": ("NFE, pairs as 1", number(0)), "fd_corrected": (f"{fd} corrected", number(2)), "fd": (fd, number(2)),
        "fd_teacher": (f"{fd} to teacher", number(2)), "fd_teacher_corrected": (f"{fd} to teacher, corrected", number(2)),
        "kid": (f"{kd} x 1000", number(2, 1000)), "cmmd": ("CMMD", number(3)), "clip": ("CLIP score", number(1)),
        "endpoint_error": ("endpoint error", number(3)), "straightness": ("straightness", numbers(3)),
        "chord_error": ("chord error", numbers(3)), "seconds_per_image": ("s/image", number(4))}
    columns[leading] = f"{columns[leading][0]} (95%)", columns[leading][1]
    # a FID as published beside the corrected one; elsewhere nobody compares with the plain one, and time is of interest
    last = "fd" if fd == "FID" and leading != "fd" else "seconds_per_image"
    columns = {key: column for key, column in columns.items()
               if key in rows[0] and (not brief or key in ("method", "windows", "steps", leading, "clip", last))}
    lines = [f"| {' | '.join(title for title, _ in columns.values())} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = {key: said(row[key]) for key, (_, said) in columns.items()}
        cells[leading] += f" ({row['fd_interval'][0]:.2f} to {row['fd_interval'][1]:.2f})"
        if row.get("run", "") not in ("", row["method"]):
            cells["method"] += f" ({row['run']})"
        lines.append(f"| {' | '.join(cells.values())} |")
    bias = "corrected for the bias of so few images" if leading != "fd" else "not corrected for the bias of so few images"
    lines += ["", f"{fd}: Frechet distance on {protocol['features']}{' (not FID)' * (fd == 'FD')}, {bias}; N = {protocol['n']} against "
              f"{protocol['real']} real images; seeds {protocol['seeds'][0]} to {protocol['seeds'][1]}; guidance {protocol['guidance']:g}"
              + (f" by {protocol['guide']}" if "guide" in protocol else "") + f"; {protocol['solver']}. Commit {protocol['commit']}."]
    lines += ["", f"Protocol: {protocol['text']}."] if "text" in protocol and not brief else []
    return "\n".join(lines) + "\n"


def picture(evaluator, plan, file, least=96):
    """grid.png: the same seeds and prompts down the rows; teacher, plain solvers and students across, at least so many pixels each."""
    c = evaluator.c
    own = [prompt for prompt in dict.fromkeys(evaluator.prompts) if prompt][:len(GRID_PROMPTS)]
    prompts = list(GRID_PROMPTS) if evaluator.protocol.split == "sprites" else own
    trained = [row for row in plan if row[1]]
    shown = next((row for row in trained if row[1] > 1), trained[0])        # one run: the first that is progressive, or the first
    plain = [row for row in plan if row[0] in c.solvers]
    students = [row for row in trained if (row[0], row[5]) == (shown[0], shown[5]) and row[1] in (row[2], 1)]
    columns = [row for row in plan if row[0] == "teacher"]
    for rows in (plain, [row for row in students if row[1] == row[2]] or students):
        columns += sorted([row for row in rows if row[2] in (4, 2, 1)] or rows, key=lambda row: -row[2])
    pictures = []
    for _, _, steps, folder, solver, _ in columns:
        pipeline, model, info = evaluator.open(folder)
        solve, spacing = sampler.parse_solver(solver)
        times = sampler.time_grid(steps, info.get("windows", 1), spacing, model.schedule)
        z = sampler.generate(pipeline, model, prompts, range(len(prompts)), times, c.guidance, c.batch, size=c.size, solver=solve)
        drawn = sampler.to_pil(teacher.decode(pipeline, z), -(-least // (z.shape[-1] * pipeline.vae_scale_factor)))
        pictures.append([image if image.width <= 256 else coco.square(image, 256) for image in drawn])
    titles = [f"{method.split('/')[0]}\n{steps} step{'s' * (steps > 1)}" for method, _, steps, *_ in columns]
    labels = [prompt if len(prompt) <= 40 else prompt[:37] + "..." for prompt in prompts]
    sampler.grid(list(zip(*pictures)), titles, labels).save(file)


if __name__ == "__main__":
    if "--study" in sys.argv[1:]:
        import lab
        import studies
        config.run(studies.main, lab.Config, studies.__doc__)
    else:
        config.run(main, Config, __doc__)
