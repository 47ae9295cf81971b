"""Where the pairs come from: the two ends (z_start, z_end) of each sample's window, and the text
they belong to.

| source      | z_start                             | z_end                                               |
|-------------|-------------------------------------|-----------------------------------------------------|
| trajectory  | a boundary of the teacher's path    | its next one; solved once, cached, for every stage  |
| data        | a real latent noised to t_start     | teacher's DDIM inside the window (PeRFlow)          |
| student     | the same                            | previous student, a step per old window (ProReflow) |
| consistency | a real latent noised to t           | one teacher step, then the student's own x_hat there|

Consistency distillation (LCM) is the peer that users know. It is a chord as well: from z_t to the
data at t = 0, where the student's own prediction one teacher step nearer stands for the data.

A trajectory runs from noise to what the teacher makes of it (backward), or from a real latent to
the noise that the teacher makes it from (forward, Simple ReFlow). A backward one has the true noise
at its start, a forward one true data at its end; the other end is only as good as the teacher.
Projected pairs replace that other end.

Everything random about sample k comes from generators seeded with (seed, k), so that a sample is
the same on one process or eight, at any micro-batch, before or after a resume.
"""
import functools
import math
import zlib
from pathlib import Path

import torch

import models
import reflow
import sampler
from runtime import seeds, store
from runtime.cli import UserError, extra
from teacher import clock_device

SOURCES = ("trajectory", "data", "student", "consistency")

LARGE_BATCH, HALF = 1024, dict(bf16=torch.bfloat16, fp16=torch.float16)   # projected at once; of autocast

LATENT_SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # in an autoencoder's config


class Pairs:
    """The pairs of one run, and its caches.  c: train.Config; recipe: reflow.Recipe; pipeline: the
    teacher's, frozen, on its device; dataset: from data.open_dataset; processes: (rank, world size,
    barrier)."""

    def __init__(self, c, recipe, pipeline, dataset, processes=(0, 1, lambda: None)):
        self.c, self.recipe, self.pipeline, self.dataset = c, recipe, pipeline, dataset
        self.processes, self.device = processes, models.network(pipeline).device
        self.shape = models.latent_shape(pipeline, c.size)
        self.size = [side * pipeline.vae_scale_factor for side in self.shape[1:]]         # (H, W) in pixels
        self.schedule, self.prediction = models.schedule(pipeline)
        check_windows(recipe.stages, self.schedule)
        self.guidance = models.embed_guidance(pipeline, c.guidance_teacher)         # classifier-free
        models.check_null(pipeline, self.guidance, c.text_dropout)
        self.null, self.null_there = ((self.text([""]), self.text([""], self.device))
                                      if models.has_null(pipeline) else ({}, {}))
        if recipe.pairs != "trajectory" and dataset.images is None:
            raise UserError(f"--prompts {c.prompts}: holds no images, but pairs from {recipe.pairs} start "
                            "from images; give --data FOLDER instead, or --pairs trajectory")
        from_images = recipe.pairs != "trajectory" or recipe.forward_rate or recipe.projection
        if from_images and self.size[0] != self.size[1]:
            raise UserError(f"--model {c.model}: made for {self.size[0]} x {self.size[1]} pixels, and "
                            f"pictures are cropped to squares; give --size {min(self.size)}, or --pairs "
                            "trajectory without --forward-rate")
        self.rows = None
        if recipe.pairs == "trajectory":
            self.rows = self.cache_trajectories()
        elif c.cache_latents:
            self.rows = self.cache_latents()
        self.online = self.rows is None                   # text encoders and VAE run at every step

    # ---- caches ----

    def text(self, captions, device="cpu"):
        """Text conditions of captions, "" being the null embedding (what guidance and dropped
        captions use)."""
        return models.encode_text(self.pipeline, [caption or None for caption in captions],
                                  null=self.c.null_text, size=self.size, device=device)

    def autocast(self):
        """bf16 or fp16 around fp32 weights. Casts of sharded weights, gathered anew, are not kept."""
        half, cached = HALF.get(self.c.precision), not self.c.shard
        return torch.autocast(self.device.type, half or torch.bfloat16, bool(half), cached)

    def noises(self, numbers):
        """Noise of these samples, (N, C, h, w)."""
        return torch.stack([torch.randn(self.shape, generator=seeds.generator(self.c.seed, "noise", k))
                            for k in numbers]).to(self.device)

    def latents(self, numbers):
        """Latents of the images of these samples, (N, C, h, w)."""
        return models.encode(self.pipeline, self.dataset.images(numbers, self.size[0]).to(self.device))

    @torch.no_grad()
    def cache_trajectories(self):
        """Latents at every boundary of the teacher's trajectories, noise first, (9, C, h, w) each
        for 8 windows, and the text they were made with: the backward ones, then the forward ones.
        Returns: data.Joined."""
        c, recipe, model = self.c, self.recipe, models.as_model(self.pipeline)
        windows = cache_windows(recipe)
        times, keep = sampler.time_grid(recipe.solver_steps), recipe.solver_steps // windows

        def solve_rows(solve, initial, numbers):
            visited = []
            cond = self.text([self.dataset.captions[i] for i in self.captions(numbers, "trajectory")],
                             self.device)
            z = initial(numbers)
            with self.autocast():
                end = solve(model, z, times, cond, self.guidance, self.null_like(cond),
                            lambda state: visited.append(state["z"]) if state["i"] % keep == 0 else None)
            path = torch.stack([*visited, end], 1)
            path = path if solve is sampler.ddim else path.flip(1)         # noise first, both ways
            return {key: value.cpu() for key, value in {"z": path, **cond}.items()}

        settings = dict(teacher=models.fingerprint(models.network(self.pipeline),
                                                   *models.text_encoders(self.pipeline)),
                        prediction=self.prediction, schedule=store.digest(self.schedule.key),
                        solver_steps=recipe.solver_steps, windows=windows, guidance=c.guidance_teacher,
                        text_dropout=c.text_dropout, null_text=c.null_text, size=self.size, seed=c.seed,
                        precision=c.precision, data=c.data or c.prompts,
                        # and which captions the first samples draw
                        captions=store.digest(self.dataset.captions,
                                              self.dataset.caption_indices(range(256))))
        total = trajectory_count(c, recipe)
        stores, forward = [], round(recipe.forward_rate * total)
        for name, count, solve, initial, true_samples, generated_end in (
                ("trajectories", total - forward, sampler.ddim, self.noises, self.latents, -1),
                ("inversions", forward, sampler.invert, self.latents, self.noises, 0)):
            if not count:
                continue
            made = {**settings, **(self.pictures() if solve is sampler.invert else {})}
            rows = store.cached(cache_folder(c) / name, count, made,
                                functools.partial(solve_rows, solve, initial), 256, *self.processes,
                                desc=f"teacher {name}", batch=c.micro_batch or c.batch)
            if recipe.projection:
                made = {**settings, **self.pictures(), "projection": recipe.projection}
                rows = store.cached(cache_folder(c) / f"projected-{name}", count, made,
                                    functools.partial(self.project, rows, generated_end, true_samples),
                                    LARGE_BATCH, *self.processes, desc="projection")
            stores.append(rows)
        return store.Joined(stores)

    def project(self, rows, generated_end, true_samples, numbers):
        """Replace the generated end (0 or -1) of each cached trajectory by a true sample, drawn
        from the entropic optimal transport between the generated ends of a large minibatch and
        true_samples(numbers). The cost is the distance of the latents plus that of the conditions
        (classes: equal or not). Only the two ends are kept.
        Source: Simple ReFlow projects its coupling with GANs and Sinkhorn, by an algorithm that is
        not public; this one is ours."""
        cond, cost = rows[numbers], 0
        path = cond.pop("z")
        true = torch.cat([true_samples(numbers[i:i + 64]) for i in range(0, len(numbers), 64)]).cpu()
        comparable = (value if value.is_floating_point() else torch.nn.functional.one_hot(value)
                      for value in cond.values())
        for a, b in ((path[:, generated_end], true), *((value, value) for value in comparable)):
            distance = torch.cdist(a.flatten(1).double(), b.flatten(1).double()).square()
            cost = cost + distance / distance.mean().clamp_min(1e-12)
        partner = couple(cost, self.recipe.projection,
                         seeds.generator(self.c.seed, "projection", generated_end, numbers[0]))
        ends = [path[:, 0], path[:, -1]]
        ends[generated_end] = true[partner]
        if generated_end == -1:                            # a picture brings its own caption
            cond = {key: value[partner] for key, value in cond.items()}
        return {"z": torch.stack(ends, 1), **cond}

    def pictures(self):
        """What the latents of the dataset's images depend on, for the settings of a cache: the
        images (names, captions, and the bytes of up to 64), the autoencoder and its scale."""
        dataset, vae = self.dataset, next(iter(models.autoencoder(self.pipeline)), None)
        images = None                                      # the embedded pictures are a function of the seed
        if dataset.size is not None:
            some = (dataset.kept[row].where
                    for row in sorted(set(dataset.rows(range(min(64, dataset.size))))))
            images = store.digest(dataset.key, *(zlib.crc32(dataset.read(where)) for where in some))
        scale = {} if vae is None else {name: vae.config.get(name) for name in LATENT_SCALE}
        return dict(images=images, autoencoder=models.fingerprint(*models.autoencoder(self.pipeline)),
                    **scale)

    @torch.no_grad()
    def cache_latents(self):
        """The latent of every image of a finite dataset, and its caption's text."""
        c, dataset = self.c, self.dataset
        if dataset.size is None:
            raise UserError(f"--cache-latents: --data {c.data} is endless; leave the option out")

        def solve(rows):
            latents = models.encode(self.pipeline, dataset.decode(rows, self.size[0]).to(self.device))
            return {"z_0": latents.cpu(),
                    **self.text([dataset.captions[dataset.row_captions[row]] for row in rows])}
        settings = dict(text=models.fingerprint(*models.text_encoders(self.pipeline)), size=self.size,
                        null_text=c.null_text, data=c.data, **self.pictures())
        return store.cached(cache_folder(c) / "latents", dataset.size, settings, solve, 64, *self.processes,
                            desc="latents")

    def null_like(self, cond):
        """The null embedding, as often as cond has rows; {} where the model has none, or takes no
        condition."""
        return {key: value.expand(len(cond[key]), *[-1] * (value.ndim - 1))
                for key, value in self.null_there.items()}

    # ---- one micro-batch: first on the host, then on the device ----

    def captions(self, numbers, purpose):
        """The caption of each sample as an index into dataset.captions; dropped (index 0, "") at
        the rate text_dropout."""
        draws = [torch.rand(1, generator=seeds.generator(self.c.seed, purpose, "drop", k)).item()
                 for k in numbers]
        return [0 if draw < self.c.text_dropout else index
                for draw, index in zip(draws, self.dataset.caption_indices(numbers))]

    def times(self, numbers, windows):
        u = torch.cat([torch.rand(1, generator=seeds.generator(self.c.seed, "time", k), dtype=torch.float64)
                       for k in numbers])
        return reflow.draw_times(self.recipe, u, windows, self.schedule)

    def fetch(self, numbers, windows):
        """The CPU half of a micro-batch: times, and the cached rows or images that its pairs start
        from. Runs in a thread, a micro-batch ahead.  Returns: dict of CPU tensors
        (len(numbers), ...), captions as a list."""
        # a copy to the device waits for it unless it comes from pinned memory
        pin = self.device.type == "cuda"
        return {key: value.pin_memory() if pin and torch.is_tensor(value) else value
                for key, value in self._fetch(numbers, windows).items()}

    def _fetch(self, numbers, windows):
        reuse = self.recipe.reuse  # samples 0..m-1 share pair 0, the next m pair 1, and so on
        pair = list(dict.fromkeys(k // reuse for k in numbers))
        t = self.times(numbers, windows)
        t_start, t_end = reflow.window_of(t, windows)
        if reuse > 1:  # each sample keeps its place in the window, the pair says which window
            place = (t - t_end) / (t_start - t_end)
            own = reflow.window_of(self.times([p * reuse for p in pair], windows), windows)
            t_start, t_end = (edge.repeat_interleave(reuse) for edge in own)
            t = torch.lerp(t_end, t_start, place)
        if self.recipe.pairs == "consistency":           # each t starts its own window, down to the data
            t_start, t_end = t, torch.zeros_like(t)
        batch = dict(t=t, t_start=t_start, t_end=t_end)
        if self.recipe.pairs == "trajectory":
            draws = [torch.randint(len(self.rows), (1,), generator=seeds.generator(self.c.seed, "row", p))
                     for p in pair]
            rows = self.rows[torch.cat(draws).tolist()]
            path, every = rows.pop("z"), torch.arange(len(pair))           # (B, M+1, C, h, w), noise first
            for name, edge in (("z_start", t_start), ("z_end", t_end)):
                place = ((1 - edge[::reuse]) * (path.shape[1] - 1)).round().long()    # time -> index
                batch[name] = path[every, place]
            return batch | rows
        captions = self.captions(pair, "data")
        batch["eps"] = torch.stack([torch.randn(self.shape, generator=seeds.generator(self.c.seed, "eps", p))
                                    for p in pair])
        if self.rows is None:
            return batch | {"images": self.dataset.images(pair, self.size[0]),
                            "captions": [self.dataset.captions[i] for i in captions]}
        rows = self.rows[self.dataset.rows(pair)]
        for key, null in self.null.items():
            rows[key][[caption == 0 for caption in captions]] = null
        return batch | rows

    @torch.no_grad()
    def ends(self, batch, solver, steps, student=None):
        """The device's half of a micro-batch. solver: Model that crosses a window in `steps` DDIM
        steps, if z_end is not cached: the teacher (its path is None), or the previous stage's
        student, which has learned the teacher's guidance and gets none; student: the Model that is
        trained, which consistency evaluates itself.
        Returns: ((t, t_start, t_end), (z_start, z_end), cond) on the device, float64 times (B,),
        float32 latents (B, C, h, w)."""
        reuse, clock, names = self.recipe.reuse, clock_device(self.device), ("t", "t_start", "t_end")
        t, t_start, t_end = (batch.pop(name).to(clock) for name in names)
        batch = {key: value.to(self.device, non_blocking=True) if torch.is_tensor(value) else value
                 for key, value in batch.items()}
        if self.recipe.pairs == "trajectory":
            z_start, z_end, cond = batch.pop("z_start"), batch.pop("z_end"), batch
        else:
            eps = batch.pop("eps")
            if "images" in batch:
                batch["z_0"] = models.encode(self.pipeline, batch.pop("images"))
                batch |= self.text(batch.pop("captions"), self.device)
            z_0, cond = batch.pop("z_0"), batch
            starts, stops = t_start[::reuse], t_end[::reuse]
            guidance = self.guidance if solver.path is None else 1.0
            alpha, sigma = (v.float().to(self.device)[:, None, None, None] for v in self.schedule(starts))
            z_start = alpha * z_0 + sigma * eps
            with self.autocast():
                # a window as long as one teacher step, then the student's jump to t = 0
                if self.recipe.pairs == "consistency":
                    nearer = (starts - 1 / steps).clamp_min(0)
                    step = torch.stack([starts, nearer])
                    z_near = sampler.ddim(solver, z_start, step, cond, guidance, self.null_like(cond))
                    jump = torch.stack([nearer.clamp_min(self.schedule.floor), stops])
                    jump = sampler.ddim(student, z_near, jump, cond)
                    z_end = torch.where((nearer > 0).to(self.device)[:, None, None, None], jump, z_near)
                else:
                    share = torch.linspace(0, 1, steps + 1, dtype=starts.dtype, device=starts.device)
                    times = torch.lerp(starts, stops, share[:, None])
                    z_end = sampler.ddim(solver, z_start, times, cond, guidance, self.null_like(cond))
        if reuse > 1:
            z_start, z_end, *values = (v.repeat_interleave(reuse, 0)
                                       for v in (z_start, z_end, *cond.values()))
            cond = dict(zip(cond, values))
        return (t, t_start, t_end), (z_start, z_end), cond


def couple(cost, entropy, generator):
    """Entropic optimal transport between two sets of N equally likely points, by Sinkhorn's
    iterations on logarithms, and of its plan one partner drawn for each point of the first set: on
    average, each of the second is drawn once.
    cost: (N, N); entropy > 0: its weight, in units of the mean cost; towards 0 the plan is a
    permutation, for large values all partners are equally likely.  Returns: (N,), indices of the
    second set."""
    ot = extra(f"--projection {entropy}", "ot", "studies")
    plan = torch.from_numpy(ot.sinkhorn([], [], (cost / cost.mean()).numpy(), entropy, method="sinkhorn_log",
                                        warn=False))
    return torch.multinomial(plan, 1, generator=generator)[:, 0]


def check_windows(stages, schedule):
    """Raises UserError unless every boundary of every stage is a timestep of the model, where it
    has timesteps: stock schedulers step between whole ones, and would miss the boundaries of 6, 7
    or 16 windows of 1000 timesteps."""
    total = schedule.timesteps
    for windows in stages:
        if total and total % windows:
            possible = [k for k in range(1, total + 1) if total % k == 0]
            below, above = (pick((k for k in possible if (k - windows) * sign > 0), default=total)
                            for pick, sign in ((max, -1), (min, 1)))
            raise UserError(f"--windows {windows}: does not divide the model's {total} timesteps, so that "
                            f"stock schedulers cannot stop at its boundaries; use for instance {below} or "
                            f"{above}")


def cache_folder(c):
    return Path(c.cache or Path(c.out) / "cache")


def trajectory_count(c, recipe):
    """Trajectories to cache, of which each pair draws one at random: --trajectories, yet no more
    than there are pairs."""
    return min(c.trajectories, math.ceil(c.updates * c.batch / recipe.reuse))


def cache_bytes(c, recipe, pipeline, dataset):
    """What the rows that a run caches will take on disk: latents and one text each, all in
    float32."""
    shape = models.latent_shape(pipeline, c.size)
    pixels = shape[-1] * pipeline.vae_scale_factor
    text = models.encode_text(pipeline, [dataset.captions[-1] or None], null=c.null_text,
                              size=(pixels, pixels))
    text = sum(value.nbytes for value in text.values())
    if recipe.pairs == "trajectory":
        ends = 2 * math.prod(shape) * 4 + text  # projected ones are kept beside those they were made of
        row = (cache_windows(recipe) + 1) * math.prod(shape) * 4 + text + ends * (recipe.projection > 0)
        return trajectory_count(c, recipe) * row
    return (dataset.size or 0) * (math.prod(shape) * 4 + text) * c.cache_latents


def cache_windows(recipe):
    """Boundaries are cached for 8 windows, or the first stage's if it has more: they serve every
    later stage."""
    return math.lcm(8, *recipe.stages) if recipe.pairs == "trajectory" else max(recipe.stages)
