"""One protocol, any number of models: images and trajectories generated once, kept as rows, and the
numbers made of them."""
import dataclasses
import functools
import math
import re
import time
from pathlib import Path

import PIL
import torch
import transformers

import export
import models
import sampler
import teacher
from data import coco, drawn, imaging
from evaluation import judge, metrics, protocols
from models import load, saved
from runtime import processes, seeds, store
from runtime.cli import UserError

SHARD = 64  # images that are lost at most when a process is killed; also the largest --batch that counts

STRAIGHTNESS_STEPS = 8           # DDIM steps in each window


def real_plans(n, stream, name):
    """What n embedded pictures show, of the mix of caption levels, held-out pairs included.
    name: of drawn.SOURCES.  Returns: (plans, captions)."""
    source, levels = drawn.SOURCES[name]
    plans = source.plan(n, seeds.generator(0, "evaluation", stream), levels=levels)
    return plans, source.describe(plans, levels)[0]


def real_images(n, stream, name, size=None):
    """These pictures.  Returns: (images, captions)."""
    source, (plans, captions) = drawn.SOURCES[name][0], real_plans(n, stream, name)
    return torch.cat([source.render(chunk, size or source.SIZE) for chunk in plans.split(2048)]), captions


def file_age(folder):
    """When the model's weights were written."""
    files = Path(load.PRESETS.get(folder, (folder, ""))[0]).glob("*/diffusion_pytorch_model*.safetensors")
    return max((file.stat().st_mtime_ns for file in files), default=0)


class CountingModel:
    """A model whose evaluations are counted, and whose answers a study may edit: (name, function(z,
    t, x_hat, eps_hat) -> the same two)."""

    def __init__(self, model, edit=None):
        self.model, self.edit, self.calls = model, edit, 0

    def __getattr__(self, name):                               # schedule, coefficients, windows
        return getattr(self.model, name)

    def __call__(self, z, t, cond, guidance=1.0, uncond=None):
        self.calls += 1
        answer = self.model(z, t, cond, guidance, uncond)
        return self.edit[1](z, t, *answer) if self.edit else answer


# ---- one protocol, any number of models --------------------------------------------------------------------


class Evaluator:
    """A protocol with its captions, networks, real images and teacher, ready to measure models:
    row(). What all rows share is made here.
    c: Config; rank, world, barrier: of the processes, which all generate; the first alone computes
    distances; student: reflow.json of one, whose teacher is opened as its run opened it.
    Raises UserError."""

    def __init__(self, c, rank=0, world=1, barrier=lambda: None, student=None):
        learned = c.guidance is None and saved.learned_guidance(student or {})
        self.c, self.protocol = c, protocol = protocols.resolve(c)
        self.student = student
        self.processes, self.device = (rank, world, barrier), processes.pick_device(c.device)
        self.exact = teacher.clock_device(self.device)  # where features are compared, in float64
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 in a measurement, whatever training has set
        torch.set_float32_matmul_precision("highest")
        if rank:  # the first process downloads, the others find the files
            barrier()
        self.clip = metrics.Clip(c.clip, self.device)
        self.judge = judge.Features(c.judge, self.device) if c.judge else None
        self.network = {"clip": lambda: self.clip, "judge": lambda: self.judge,
                        "inception": lambda: metrics.Inception(c.inception, self.device)}[protocol.network]()
        if rank == 0:
            barrier()
        least = max(protocol.images_per_feature * self.network.dim, metrics.least_images(self.network.dim))
        for option, value in (("--n", c.n), ("--real", c.real)):
            if value < least:
                raise UserError(f"{option} {value}: must be at least {least} for a Frechet distance on the "
                                f"{self.network.dim} features of {self.network.name}")

        if protocol.split in drawn.SOURCES:
            source = drawn.SOURCES[protocol.split][0]
            size = c.size if protocol.fid_size else source.SIZE   # drawn as generated, then seen at fid_size
            (self.plans, self.prompts), self.ids = real_plans(c.n, "prompts", protocol.split), []
            key = store.digest(source.SHEET.read_bytes(), *[size] * (size != source.SIZE))
            pictures = functools.cache(lambda: real_images(c.real, "reference", protocol.split, size)[0])

            def reference(part):
                return pictures()[part.start:part.stop]
        else:
            images = coco.Coco(c.data, protocol.split, protocol.rule, max(c.n, c.real))
            self.prompts, self.ids, key = images.captions[:c.n], images.ids[:c.n], images.key

            def reference(part):
                return images.images(part, protocol.fid_size or c.size)
        self.networks = dict(clip=[self.clip.name, models.fingerprint(self.clip.model)],
                             network=self.network.name, fid_size=protocol.fid_size,
                             **({"judge": models.fingerprint(self.judge.model)} if self.judge else {}))
        settings = dict(split=protocol.split, images=key, real=c.real, size=protocol.fid_size or c.size,
                        **self.networks)
        rows = self.store("reference", c.real, settings,
                          lambda part, name: self.look(reference(part), part, name), SHARD)[range(c.real)]
        self.reference = {key: value.to(self.exact) for key, value in rows.items()}
        self.read, self.opened = {}, (None, None)
        if learned:
            guidance = saved.teacher_guidance(self.open(c.teacher)[0], student, 1.0)
            self.c = c = dataclasses.replace(c, guidance=guidance)
        self.teacher_path = self.path()
        self.teacher_rows = self.features(c.teacher, c.teacher_steps)

    # ---- rows on disk, of which every process makes its share ----

    def store(self, label, count, settings, solve, batch):
        """`count` rows, made `batch` at a time by solve(range of row numbers, name of the set) ->
        dict of tensors, where they are missing.
        Other settings are another set.  Returns: store.Rows."""
        folder = Path(self.c.save_images, "rows") if self.c.save_images else Path(self.c.cache)
        name = f"{re.sub('[/:]', '-', label)}-{store.digest(settings)}"

        @torch.no_grad()
        def shard(numbers):
            parts = [solve(numbers[first:first + batch], name) for first in range(0, len(numbers), batch)]
            return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return store.cached(folder / name, count, settings, shard, SHARD, *self.processes, desc=label)

    def seen(self, images):
        """Images (N, 3, H, W) in [-1, 1] at the size at which the networks see them."""
        size = self.protocol.fid_size
        if size and images.shape[-2:] != (size, size):
            images = coco.tensor(coco.square(picture, size) for picture in imaging.to_pil(images))
        return images

    def look(self, images, part, name):
        """Features of the images of these numbers, (N, 3, H, W) in [-1, 1].  Returns: dict of (N,
        dim)."""
        images = self.seen(images)
        if self.c.save_images:
            folder = Path(self.c.save_images, name)
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in zip(part, imaging.to_pil(images)):
                picture.save(folder / f"{i:06d}.png")
        found = {"clip": self.clip.images(images)}
        return found if self.network is self.clip else found | {
            self.protocol.network: self.network.images(images)}

    def open(self, folder):
        """(pipeline, model, reflow.json) of a model folder. The last one stays in memory: there may
        be no room for two."""
        key = folder, file_age(folder)
        if self.opened[0] != key:
            self.opened = None, None
            c = self.c
            self.opened = key, saved.open_model(folder, self.device, teacher.DTYPES[c.dtype], guide=c.guide,
                                                size=c.size, student=self.student)
        return self.opened[1]

    def about(self, folder):
        """(reflow.json, what decides its answers) of a model folder; read once, and again if its
        weights are new."""
        key = folder, file_age(folder)
        if key not in self.read:
            pipeline, model, info = self.open(folder)
            shape = models.latent_shape(pipeline, self.c.size)
            self.read[key] = info, dict(
                weights=models.fingerprint(models.network(pipeline), *models.autoencoder(pipeline),
                                           *models.text_encoders(pipeline)),
                path=info.get("path", "vp"),
                schedule=store.digest(model.schedule.key, model.prediction), windows=info.get("windows", 1),
                size=[side * pipeline.vae_scale_factor for side in shape[1:]],
                **({"embedded_guidance": pipeline.embedded_guidance} if hasattr(pipeline, "embedded_guidance")
                   else {}),
                **({"null": "zeros"} if pipeline.config.get("force_zeros_for_empty_prompt") else {}))
        return self.read[key]

    def settings(self, folder, steps, solver, guidance, edit, count):
        """What decides the first `count` images, and how they came about."""
        c = self.c
        return dict(**self.about(folder)[1], dtype=c.dtype, steps=steps, solver=solver, guidance=guidance,
                    edit=edit and edit[0],
                    seed=c.seed, prompts=store.digest(*self.prompts[:count]),
                    **({"guide": self.about(c.guide)[1]} if c.guide else {}))

    def guidance(self, folder):
        """What a model is called at: --guidance, or 1 where it has learned its own, on top of which
        another would come."""
        return 1.0 if saved.learned_guidance(self.about(str(folder))[0]) else self.c.guidance

    def generate(self, folder, part, steps, solver, guidance, edit, callback=None):
        """Images by number.  Returns: (latents (N, C, h, w), the model as CountingModel)."""
        pipeline, model, info = self.open(folder)
        solve, spacing = sampler.parse_solver(solver)
        counting = CountingModel(model, edit)
        times = sampler.time_grid(steps, info.get("windows", 1), spacing, model.schedule)
        prompts, seeds = self.prompts[part.start:part.stop], range(self.c.seed + part.start,
                                                                   self.c.seed + part.stop)
        z = sampler.generate(pipeline, counting, prompts, seeds, times, guidance, len(part), callback,
                             size=self.c.size, solver=solve)
        return z, counting

    def path(self):
        """The teacher's own trajectories: z, (teacher_steps + 1, C, h, w) each."""
        c, count = self.c, min(self.c.paths, self.c.n)

        def solve(part, name):
            visited = []
            end, _ = self.generate(c.teacher, part, c.teacher_steps, "ddim", c.guidance, None, visited.append)
            return {"z": torch.stack([*(state["z"].cpu() for state in visited), end], 1)}
        return self.store("path", count,
                          self.settings(c.teacher, c.teacher_steps, "ddim", c.guidance, None, count), solve,
                          c.batch)

    def features(self, folder, steps, solver="ddim", guidance=None, edit=None):
        """Features of a model's images, (dim,) each, and what an image cost: seconds, evaluations
        of the network.  Returns: store.Rows."""
        c, folder = self.c, str(folder)
        guidance = self.guidance(folder) if guidance is None else guidance

        def solve(part, name):
            pipeline, start = self.open(folder)[0], time.perf_counter()
            z, model = self.generate(folder, part, steps, solver, guidance, edit)
            images = models.decode(pipeline, z)
            cost = torch.tensor([(time.perf_counter() - start) / len(part), model.calls],
                                dtype=torch.float64).expand(len(part), 2)
            return {**self.look(images, part, name), "seconds": cost[:, 0], "evaluations": cost[:, 1]}
        settings = self.settings(folder, steps, solver, guidance, edit, c.n) | self.networks
        return self.store(f"{Path(folder).name}-{steps}-{solver}", c.n, settings, solve, c.batch)

    def trajectories(self, folder, steps, solver="ddim", guidance=None, edit=None, costly=True):
        """Squared endpoint error of a model's trajectories, () each; with `costly`, straightness and
        squared chord error in K windows, (K,) each, the mean of their batch. K is the student's;
        for a teacher, what its steps have in common with 8. There is no chord error where the
        teacher's steps do not stop at every boundary.  Returns: store.Rows."""
        c, folder = self.c, str(folder)
        guidance = self.guidance(folder) if guidance is None else guidance
        info, count = self.about(folder)[0], min(c.paths, c.n)
        windows = info.get("windows") or math.gcd(steps, 8)

        def solve(part, name):
            path = self.teacher_path[part]["z"]
            end, model = self.generate(folder, part, steps, solver, guidance, edit)
            pipeline = self.open(folder)[0]
            found = {"endpoint": (end - path[:, -1]).double().square().flatten(1).mean(1)}
            if self.judge:
                ours, theirs = (self.seen(models.decode(pipeline, z)) for z in (end, path[:, -1].to(end)))
                found["picture"] = self.judge.distance(ours, theirs).double()
            if not costly:
                return found
            prompts, size = self.prompts[part.start:part.stop], self.about(folder)[1]["size"]
            cond = models.encode_text(pipeline, prompts, size=size, device=self.device)
            uncond = None                                      # some models have no null embedding
            if model.needs_null(guidance):
                uncond = models.encode_text(pipeline, [None] * len(part), size=size, device=self.device)
            inside = {"straightness": metrics.straightness(model, path[:, 0].to(self.device), cond, windows,
                                                           STRAIGHTNESS_STEPS, guidance, uncond)}
            if c.teacher_steps % windows == 0:
                chord = metrics.chord_error(model, path.to(self.device), cond, windows, guidance, uncond)
                inside["chord"] = [error ** 2 for error in chord]
            return found | {name: torch.tensor(values, dtype=torch.float64).expand(len(part), windows)
                            for name, values in inside.items()}
        settings = self.settings(folder, steps, solver, guidance, edit, count) | dict(
            measured_windows=windows, straightness_steps=STRAIGHTNESS_STEPS if costly else 0,
            teacher=self.settings(c.teacher, c.teacher_steps, "ddim", c.guidance, None, count))
        return self.store(f"{Path(folder).name}-{steps}-{solver}-trajectories", count, settings, solve,
                          c.batch)

    # ---- numbers ----

    def followed(self, features, plans):
        """Share of pictures that show what their captions name, as the judge says; see its accuracy."""
        return self.judge.accuracy(features, plans, drawn.SOURCES[self.protocol.split][1])

    @functools.cached_property
    def texts(self):
        """CLIP features of the captions, (n, dim)."""
        return self.clip.texts(self.prompts)

    @functools.cached_property
    def teacher_features(self):
        """Of its own samples, (n, dim)."""
        return self.teacher_rows[range(self.c.n)][self.protocol.network].to(self.exact)

    def row(self, folder, steps, method="", solver="ddim", guidance=None, edit=None, costly=True):
        """Every column of a row of results.json, made where missing. folder: a model;
        guidance: default self.guidance; edit: as for CountingModel, its name stands for it in the
        cache; costly: KID, CMMD, straightness and chord error too, which may take longer than a small
        model's images.
        Returns: dict; {} on all processes but the first."""
        c, network = self.c, self.protocol.network
        guidance = self.guidance(folder) if guidance is None else guidance
        rows = self.features(folder, steps, solver, guidance, edit)
        paths = self.trajectories(folder, steps, solver, guidance, edit, costly)
        if self.processes[0] > 0:
            return {}
        info, rows, paths = self.about(str(folder))[0], rows[range(c.n)], paths[range(len(paths))]
        features, captioned = rows[network].to(self.exact), torch.tensor(list(map(bool, self.prompts)))
        reference, costly_columns = self.reference[network], {}
        groups = metrics.frechet_groups(features, reference)
        corrected, half = metrics.mean_interval(groups)
        if costly:
            kid, kid_std = metrics.kernel_distance(rows[network], reference.cpu())
            costly_columns = dict(
                kid=kid, kid_std=kid_std,
                cmmd=metrics.cmmd(rows["clip"].to(self.exact), self.reference["clip"]),
                straightness=paths["straightness"].mean(0).tolist(),
                chord_error=paths["chord"].mean(0).sqrt().tolist() if "chord" in paths else None)
        evaluations = rows["evaluations"].mean().item()
        return dict(
            method=method or info.get("method", "teacher"), windows=info.get("windows"), steps=steps,
            solver=solver, guidance=guidance,
            nfe=round(evaluations * (1 if guidance in (0, 1) else 2)), nfe_pairs_as_one=round(evaluations),
            fd_corrected=corrected, fd_interval=[corrected - half, corrected + half], fd_groups=groups,
            fd=metrics.frechet_distance(metrics.moments(features), metrics.moments(reference)),
            fd_teacher_corrected=metrics.mean_interval(
                metrics.frechet_groups(features, self.teacher_features))[0],
            **costly_columns, clip=metrics.clip_score(rows["clip"][captioned], self.texts[captioned]),
            endpoint_error=paths["endpoint"].mean().sqrt().item(),
            **({"prompt_accuracy": self.followed(rows["judge"], self.plans),
                "picture_distance": paths["picture"].mean().item()} if self.judge else {}),
            seconds_per_image=rows["seconds"].mean().item())

    def floor(self):
        """What as many real pictures as are generated come to, with their own captions, where real ones
        can be drawn.  Returns: {"floor": dict}, or {}."""
        c, protocol = self.c, self.protocol
        if protocol.split not in drawn.SOURCES:
            return {}
        plans, _ = real_plans(c.n, "floor", protocol.split)
        images, captions = real_images(c.n, "floor", protocol.split, c.size if protocol.fid_size else None)
        rows = self.look(images, range(c.n), "floor")
        named = torch.tensor([bool(caption) for caption in captions])
        groups = metrics.frechet_groups(rows[protocol.network].to(self.exact),
                                        self.reference[protocol.network])
        corrected, half = metrics.mean_interval(groups)
        return {"floor": dict(
            fd_corrected=corrected, fd_interval=[corrected - half, corrected + half],
            clip=metrics.clip_score(rows["clip"][named], self.clip.texts(captions)[named]),
            **({"prompt_accuracy": self.followed(rows["judge"], plans)} if self.judge else {}))}

    def describe(self, students):
        """The protocol of a table, item by item. students: their reflow.json.
        Returns: dict; `text` says all of it in one string."""
        c, protocol, code, name = self.c, self.protocol, export.versions(), self.network.name
        sprite, made = protocol.split in drawn.SOURCES, self.about(c.teacher)[1]["size"][0]
        seen = protocol.fid_size or made
        levels = "classes" if protocol.split.endswith("-by-group") else "caption levels"
        decays = sorted({str(info.get("config", {}).get("ema", "unknown")) for info in students})
        found = dict(
            name=c.protocol, split=f"fresh {protocol.split}" if sprite else f"COCO {protocol.split}", n=c.n,
            real=c.real,
            captions=f"mix of {levels}, held-out pairs included" if sprite else coco.RULES[protocol.rule],
            reference=f"fresh pictures, all pairs, mix of {levels}" if sprite else "images of the "
                                                                                        f"first {c.real} "
                                                                                        "captions",
            size=f"{made} pixels as generated, {seen} as both networks see them",
            resize="none" if sprite and made == seen else
            f"shorter side to {seen}, Lanczos (Pillow), of real{' and generated' * (seen != made)} images",
            crop="none" if sprite else "center",
            distance="FID" if self.network is not self.clip and self.network.published else "FD",
            features=f"{name}, projected image features" if self.network is self.clip
            else f"{name}, {self.network.dim} features",
            networks=store.digest(sorted(self.networks.items(), key=str)),
            clip=self.clip.name,
            clip_score="100 x mean cosine, no prefix" + ", empty captions left out" * sprite,
            cmmd="on the same CLIP, sigma 10, x 1000",
            **({"prompt_accuracy": "share of the prompts that name something whose picture shows all of it, "
                                   "objects, background and relation, as a network trained on real ones says",
                "picture_distance": f"to the teacher's own picture from the same noise, of that network's "
                                    f"features, first {min(c.paths, c.n)} seeds"} if self.judge else {}),
            steps=f"teacher {c.teacher_steps}, plain {' '.join(map(str, c.ddim_steps))}, students "
                  f"{' '.join(map(str, c.steps))}",
            nfe="network evaluations per image, counted; a guided pair is 2, in the column beside it 1",
            guidance=c.guidance, **({"guide": f"{c.guide} instead of no text"} if c.guide else {}),
            scheduler="the model's own schedule; within each window the solver's grid, uniform in t "
                      "(trailing) where it names none",
            solver="DDIM" if c.solver == "ddim" else f"{c.solver} for the students, DDIM for the teacher",
            solvers=f"{', '.join(c.solvers)} for the plain teacher", teacher=c.teacher, seeds=[
                c.seed, c.seed + c.n - 1], dtype=c.dtype,
            weights=", ".join({"0": "raw", "0.0": "raw", "unknown": "unknown"}.get(ema, "running average "
                                                                                        f"(EMA {ema})")
                                                                                        for ema in decays),
            trajectories=f"first {min(c.paths, c.n)} seeds",
            endpoint_error=f"root mean square distance to the teacher's {c.teacher_steps} "
            "DDIM steps", straightness=f"mean square of u minus the chord's, {STRAIGHTNESS_STEPS} steps a "
                                       "window",
            chord_error="root mean square of u minus that of the teacher's chord, at its start",
            corrected=f"grouped jackknife, {metrics.GROUPS} groups of generated and of real images",
            interval="95%, of the corrected distance, over the choice of generated and real images, not over "
                     "training",
            batch=min(c.batch, SHARD),
            seconds_per_image="wall time of text, sampling and decoding at this batch size, on one process",
            note=protocol.note,
            commit=code["commit"],
            versions={**code["versions"], "transformers": transformers.__version__,
                      "pillow": PIL.__version__})

        def said(value):
            if isinstance(value, list):
                return " to ".join(map(str, value))
            if isinstance(value, dict):
                return ", ".join(map(" ".join, value.items()))
            return f"{value:g}" if isinstance(value, float) else value
        text = "; ".join(f"{key.replace('_', ' ')}: {said(value)}" for key, value in found.items())
        commands = [f"{info.get('command', 'unknown')} (commit {info.get('commit', 'unknown')})"
                    for info in students]
        return dict(**found, text=text, students=commands)
