"""Where the pairs come from: the two ends (z_start, z_end) of each sample's window, and the text
they belong to.

| source      | z_start                             | z_end                                               |
|-------------|-------------------------------------|-----------------------------------------------------|
| trajectory  | a boundary of the teacher's path    | its next one; solved once, cached, for every stage  |
| data        | a real latent noised to t_start     | teacher's DDIM inside the window (PeRFlow)          |
| student     | the same                            | previous student, a step per old window (ProReflow) |
| consistency | a real latent noised to t           | one teacher step, then the student's own x_hat there|
| flow-map    | the same                            | teacher's velocity, less the student's own change   |
| imitation   | the student's own steps from noise  | teacher's velocity on the student's own line        |

The last three are peers, and chords as well, that begin where the student is evaluated: losses.py has them.

A trajectory runs from noise to what the teacher makes of it (backward), or from a real latent to
the noise that the teacher makes it from (forward, Simple ReFlow). A backward one has the true noise
at its start, a forward one true data at its end; the other end is only as good as the teacher.
--projection moves that other end towards true samples.

Everything random about sample k comes from generators seeded with (seed, k), so that a sample is
the same on one process or eight, at any micro-batch, before or after a resume.
"""
import functools
import math
import zlib
from pathlib import Path

import torch

import losses
import models
import reflow
import sampler
from models.conditions import LAYOUT, drawn_captions, encode, sample_settings, trajectory_counts
from runtime import seeds, store
from runtime.cli import extra
from teacher import clock_device

SOURCES = ("trajectory", "data", "student", *losses.TARGETS)
FROM_IMAGES = tuple(name for name in SOURCES if name not in ("trajectory", "imitation"))

LARGE_BATCH, HALF = 1024, dict(bf16=torch.bfloat16, fp16=torch.float16)   # projected at once; of autocast
ENTROPY = 1.0             # of the projection; with much less each point makes for its nearest (docs/log.md)

# of distribution matching: what each of its samples draws, from which stream; its times, as in DMD
FRESH = {"fresh_z": torch.randn, "fresh_eps": torch.randn, "fresh_t": torch.rand}
MATCHED = torch.tensor([0.02, 0.98], dtype=torch.float64)

LATENT_SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # in an autoencoder's config


class Pairs:
    """The pairs of one run, and its caches.  c: train.Config; recipe: reflow.Recipe; pipeline: the
    teacher's, frozen, on its device; dataset: from captioned.open_dataset; conditions:
    Conditions of all samples that are cached, or None where none are, and text is encoded while it
    trains; processes: (rank, world size, barrier)."""

    def __init__(self, c, recipe, pipeline, dataset, conditions, processes=(0, 1, lambda: None)):
        self.c, self.recipe, self.pipeline, self.dataset = c, recipe, pipeline, dataset
        self.conditions, self.processes = conditions, processes
        self.device = models.network(pipeline).device
        self.shape = models.latent_shape(pipeline, c.size)
        self.size = [side * pipeline.vae_scale_factor for side in self.shape[1:]]         # (H, W) in pixels
        self.schedule, self.prediction = models.schedule(pipeline)
        self.guidance = models.embed_guidance(pipeline, c.guidance_teacher, c.guidance_range)
        self.online = conditions is None                  # text encoders and VAE run at every step
        self.null = self.text([0], self.device) if models.has_null(pipeline) else {}
        self.rows = None
        if recipe.pairs == "trajectory":
            self.rows = self.cache_trajectories()
        elif not self.online:
            self.rows = self.cache_latents()

    # ---- caches ----

    def text(self, captions, device="cpu"):
        """Conditions of captions, indices into dataset.captions, of which 0 is the null embedding (what
        guidance and dropped captions use)."""
        if self.online:
            return encode(self.c, self.pipeline, [self.dataset.captions[i] for i in captions], device)
        return {key: value.to(device) for key, value in self.conditions[captions].items()}

    def autocast(self):
        """bf16 or fp16 around fp32 weights. Casts of sharded weights, gathered anew, are not kept."""
        half, cached = HALF.get(self.c.precision), not self.c.shard
        return torch.autocast(self.device.type, half or torch.bfloat16, bool(half), cached)

    def drawn(self, draw, stream, numbers):
        """What torch.randn (N, C, h, w) or torch.rand, float64 (N,), draws for these samples, on the CPU."""
        shape, dtype = (self.shape, torch.float32) if draw is torch.randn else ((), torch.float64)
        return torch.stack([draw(shape, generator=seeds.generator(self.c.seed, stream, k), dtype=dtype)
                            for k in numbers])

    def noises(self, numbers):
        """Noise of these samples, (N, C, h, w)."""
        return self.drawn(torch.randn, "noise", numbers).to(self.device)

    def latents(self, numbers):
        """Latents of the images of these samples, (N, C, h, w)."""
        return models.encode(self.pipeline, self.dataset.images(numbers, self.size[0]).to(self.device))

    @torch.no_grad()
    def cache_trajectories(self):
        """Latents at every boundary of the teacher's trajectories, noise first, (9, C, h, w) each
        for 8 windows, and which caption they were made with: the backward ones, then the forward
        ones.  Returns: store.Joined."""
        c, recipe, model = self.c, self.recipe, models.as_model(self.pipeline)
        windows = cache_windows(recipe)
        times, keep = sampler.time_grid(recipe.solver_steps), recipe.solver_steps // windows

        def solve_rows(solve, initial, numbers):
            visited, captions = [], drawn_captions(c, self.dataset, numbers, "trajectory")
            drawn, cond = self.drawn_guidance(numbers), self.text(captions, self.device)
            cond, guidance = self.guide(cond, drawn)
            z = initial(numbers)
            with self.autocast():
                end = solve(model, z, times, cond, guidance, self.null_like(cond),
                            lambda state: visited.append(state["z"]) if state["i"] % keep == 0 else None)
            path = torch.stack([*visited, end], 1)
            path = path if solve is sampler.ddim else path.flip(1)         # noise first, both ways
            told = {"guidance": drawn} if drawn is not None and "guidance" in cond else {}
            return {"z": path.cpu(), "caption": torch.tensor(captions), **told}

        settings = dict(**sample_settings(c, self.pipeline, self.dataset), text=self.conditions.key,
                        teacher=models.fingerprint(models.network(self.pipeline)),
                        prediction=self.prediction, schedule=store.digest(self.schedule.key),
                        solver_steps=recipe.solver_steps, windows=windows)
        stores, (backward, forward) = [], trajectory_counts(c, recipe)
        for name, count, solve, initial, true_samples, generated_end in (
                ("trajectories", backward, sampler.ddim, self.noises, self.latents, -1),
                ("inversions", forward, sampler.invert, self.latents, self.noises, 0)):
            if not count:
                continue
            made = {**settings, **(self.pictures() if solve is sampler.invert else {})}
            rows = store.cached(cache_folder(c) / name, count, made,
                                functools.partial(solve_rows, solve, initial), 256, *self.processes,
                                desc=f"teacher {name}", batch=c.micro_batch or c.batch)
            if recipe.projection:
                made = {**settings, **self.pictures(), "drift": [recipe.projection, ENTROPY, count]}
                rows = store.cached(cache_folder(c) / f"projected-{name}", count, made,
                                    functools.partial(self.project, rows, generated_end, true_samples),
                                    LARGE_BATCH, *self.processes, desc="projection")
            stores.append(rows)
        return store.Joined(stores)

    def project(self, rows, generated_end, true_samples, numbers):
        """Move the generated end (0 or -1) of each cached trajectory, by the share --projection, down the
        gradient of the Sinkhorn divergence between the generated ends of a large minibatch and
        true_samples(numbers). Two samples are as far apart as their latents and their conditions are
        (classes: equal or not). Only the two ends are kept. The count decides what shares a minibatch.
        Source: Simple ReFlow projects its coupling with GANs and Sinkhorn, by an algorithm that is
        not public; this one is ours."""
        row = rows[numbers]
        path = row.pop("z")
        true = torch.cat([true_samples(numbers[i:i + 64]) for i in range(0, len(numbers), 64)]).cpu()
        told = 0
        for value in self.text(row["caption"].tolist()).values():
            value = value if value.is_floating_point() else torch.nn.functional.one_hot(value)
            distance = torch.cdist(*[value.flatten(1).double()] * 2).square()
            told = told + distance / distance.mean().clamp_min(1e-12)
        ends = [path[:, 0], path[:, -1]]
        generated = ends[generated_end]
        ends[generated_end] = generated + self.recipe.projection * drift(generated, true, told)
        return {"z": torch.stack(ends, 1), **row}

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
        """The latent of every image of a finite dataset."""
        def solve(rows):
            pictures = self.dataset.decode(rows, self.size[0]).to(self.device)
            return {"z_0": models.encode(self.pipeline, pictures).cpu()}
        settings = dict(layout=LAYOUT, size=self.size, data=self.c.data, **self.pictures())
        return store.cached(cache_folder(self.c) / "latents", self.dataset.size, settings, solve, 64,
                            *self.processes, desc="latents")

    # ---- guidance ----

    def null_like(self, cond):
        """The null embedding, as often as cond has rows; {} where the model has none, or takes no
        condition."""
        return {key: value.expand(len(cond[key]), *[-1] * (value.ndim - 1))
                for key, value in self.null.items()}

    def drawn_guidance(self, numbers):
        """The teacher's guidance of each sample, (N,), uniform in --guidance-range from a stream of its
        own; None without it."""
        if self.c.guidance_range is None:
            return None
        low, high = self.c.guidance_range
        u = torch.cat([torch.rand(1, generator=seeds.generator(self.c.seed, "guidance", k)) for k in numbers])
        return low + (high - low) * u

    def guide(self, cond, drawn):
        """(conditions, classifier-free guidance) of the teacher. drawn: from drawn_guidance; a network
        that takes guidance as an input is told it, and so is its student."""
        if drawn is None:
            return cond, self.guidance
        told = drawn.to(self.device)
        return ({**cond, "guidance": told}, 1.0) if "guidance" in cond else (cond, told)

    # ---- one micro-batch: first on the host, then on the device ----

    def times(self, numbers, windows):
        return reflow.draw_times(self.recipe, self.drawn(torch.rand, "time", numbers), windows, self.schedule)

    def fetch(self, numbers, windows):
        """The CPU half of a micro-batch: times, and the cached rows or images that its pairs start
        from. Runs in a thread, a micro-batch ahead.  Returns: dict of CPU tensors
        (len(numbers), ...), captions as a list."""
        # a copy to the device waits for it unless it comes from pinned memory
        pin = self.device.type == "cuda"
        batch = self._fetch(numbers, windows)
        if self.recipe.matching and windows == self.recipe.stages[-1]:
            batch |= {name: self.drawn(draw, name, numbers) for name, draw in FRESH.items()}
        return {key: value.pin_memory() if pin and torch.is_tensor(value) else value
                for key, value in batch.items()}

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
            return batch | self.text(rows.pop("caption").tolist()) | rows
        captions, drawn = drawn_captions(self.c, self.dataset, pair, "data"), self.drawn_guidance(pair)
        batch |= {} if drawn is None else {"drawn": drawn}
        batch["eps"] = self.drawn(torch.randn, "eps", pair)
        if self.online:
            images = ({"images": self.dataset.images(pair, self.size[0])} if self.recipe.pairs in FROM_IMAGES
                      else {})
            return batch | images | {"captions": captions}
        return batch | self.rows[self.dataset.rows(pair)] | self.text(captions)

    @torch.no_grad()
    def ends(self, batch, solver, steps, student=None):
        """The device's half of a micro-batch. solver: Model that crosses a window in `steps` DDIM
        steps, if z_end is not cached: the teacher (its path is None), or the previous stage's
        student, which has learned the teacher's guidance and gets none; student: the Model that is
        trained, which the targets of losses.py evaluate themselves.
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
            if "captions" in batch:
                batch |= self.text(batch.pop("captions"), self.device)
            z_0, drawn = batch.pop("z_0", None), batch.pop("drawn", None)
            cond, guidance = self.guide(batch, drawn)
            guidance = guidance if solver.path is None else 1.0
            own = losses.TARGETS.get(self.recipe.pairs)
            # these begin where the student is evaluated: at t, or at the start of the window
            starts, stops = t if own and z_0 is not None else t_start[::reuse], t_end[::reuse]
            with self.autocast():
                if z_0 is None:
                    steps_so_far = torch.stack([(1 - i / student.windows) * torch.ones_like(starts)
                                                for i in range(student.windows)]).clamp_min(starts)
                    z_start = sampler.ddim(student, eps, steps_so_far, cond)
                else:
                    z_start = losses.noised(self.schedule, starts, z_0, eps)
                if own:
                    null = self.null_like(cond)
                    z_end = own(lambda z, t: solver(z, t, cond, guidance, null),
                                lambda z, t: student(z, t, cond), self.schedule, z_start,
                                t, t_start, t_end, steps)
                    t = t_start = starts
                else:
                    share = torch.linspace(0, 1, steps + 1, dtype=starts.dtype, device=starts.device)
                    times = torch.lerp(starts, stops, share[:, None])
                    z_end = sampler.ddim(solver, z_start, times, cond, guidance, self.null_like(cond))
        if reuse > 1:
            z_start, z_end, *values = (v.repeat_interleave(reuse, 0)
                                       for v in (z_start, z_end, *cond.values()))
            cond = dict(zip(cond, values))
        return (t, t_start, t_end), (z_start, z_end), cond

    def matching(self, z, eps, t, cond, model, teacher, critic):
        """losses.matching of what the student, model, makes of noise z, a step for each window. z, eps
        (B, C, h, w), t (B,): drawn by fetch, as FRESH names them; cond: of B; teacher, critic: Models."""
        z, eps = (noise.to(self.device, non_blocking=True) for noise in (z, eps))
        t, null = torch.lerp(*MATCHED, t).to(clock_device(self.device)), self.null_like(cond)
        space = reflow.SPACES[self.recipe.space](self.schedule, t, torch.zeros_like(t))
        with self.autocast():
            x = sampler.ddim(model, z, sampler.time_grid(model.windows), cond)
            return losses.matching(lambda z, t: teacher(z, t, cond, self.guidance, null),
                                   lambda z, t: critic(z, t, cond), self.schedule, x, t, eps, space)


def drift(z, true, told=0, entropy=ENTROPY):
    """Minus half the gradient of the debiased Sinkhorn divergence between two sets of N equally likely
    points, in those of the first: to where the entropic optimal transport takes each, less to where it
    takes it within its own set. 0 between equal sets, the shift between a set and the same set shifted.
    z, true: (N, ...); told: (N, N), added to their squared distance, which has mean 1; entropy > 0: its
    weight, in the same units.  Returns: like z.  Source: Genevay et al. 2018; Feydy et al. 2019."""
    ot = extra("--projection", "ot", "studies")
    a, b = (points.flatten(1).double() for points in (z, true))
    scale = torch.cdist(a, b).square().mean().clamp_min(1e-12)

    def transported(other):
        cost = torch.cdist(a, other).square() / scale + told
        plan = torch.from_numpy(ot.sinkhorn([], [], cost.numpy(), entropy, method="sinkhorn_log", warn=False))
        return plan @ other / plan.sum(1, keepdim=True)
    return (transported(b) - transported(a)).view_as(z).to(z)


def cache_folder(c):
    return Path(c.cache or Path(c.out) / "cache")


def cache_bytes(c, recipe, pipeline, dataset, conditions):
    """What a run caches will take on disk: latents in float32, and each distinct caption's
    conditions."""
    if conditions is None:
        return 0
    latent = 4 * math.prod(models.latent_shape(pipeline, c.size))
    if recipe.pairs == "trajectory":
        ends = (2 * latent + 8) * (recipe.projection > 0)   # kept beside those they were made of
        row = (cache_windows(recipe) + 1) * latent + 8 + ends           # 8: the number of a caption
        return sum(trajectory_counts(c, recipe)) * row + conditions.nbytes
    return dataset.size * latent + conditions.nbytes


def cache_windows(recipe):
    """The least number of windows whose boundaries hold those of 8 and of every stage, where trajectories
    are cached; else of the first stage, the most."""
    return math.lcm(8, *recipe.stages) if recipe.pairs == "trajectory" else max(recipe.stages)
