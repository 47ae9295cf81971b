"""What the samples of a run are conditioned on: each of their captions is encoded once, and stored
once, apart from the latents that share it. SD3's take 2.7 MB each in half precision."""
import functools
import math

import torch

import models
from runtime import seeds, store

LAYOUT = "captions apart"       # of a cache: one of another layout is refused
SHARD = 64                      # captions a file


def trajectory_counts(c, recipe):
    """(backward, forward): trajectories to cache, of which each pair draws one at random:
    --trajectories of them, yet no more than there are pairs."""
    total = min(c.trajectories, math.ceil(c.updates * c.batch / recipe.reuse))
    forward = round(recipe.forward_rate * total)
    return total - forward, forward


def drawn_captions(c, dataset, numbers, purpose):
    """The caption of each sample as an index into dataset.captions; dropped (index 0, "") at the
    rate text_dropout.  c: train.Config."""
    draws = [torch.rand(1, generator=seeds.generator(c.seed, purpose, "drop", k)).item() for k in numbers]
    return [0 if draw < c.text_dropout else index
            for draw, index in zip(draws, dataset.caption_indices(numbers))]


def pixels(c, pipeline):
    """[H, W] of the pictures."""
    return [side * pipeline.vae_scale_factor for side in models.latent_shape(pipeline, c.size)[1:]]


def sample_settings(c, pipeline, dataset):
    """What decides, besides the networks, which captions the samples have and how they are told."""
    order = dataset.caption_indices(range(256)), dataset.row_captions if c.cache_latents else None
    return dict(layout=LAYOUT, data=c.data or c.prompts, captions=store.digest(dataset.captions, order),
                size=pixels(c, pipeline), seed=c.seed, text_dropout=c.text_dropout, null_text=c.null_text,
                guidance=c.guidance_range or c.guidance_teacher, precision=c.precision)


def encode(c, pipeline, captions, device="cpu"):
    """captions: list of N strings, "" being the null embedding.  Returns: dict of tensors (N, ...) on
    device."""
    return models.encode_text(pipeline, [caption or None for caption in captions], null=c.null_text,
                              size=pixels(c, pipeline), device=device)


class Conditions:
    """The conditions of all samples that a run caches; on disk from cache() on.
    c: train.Config; recipe: reflow.Recipe; pipeline: with its text encoders, of the other networks
    nothing is read but the configs; dataset: from data.open_dataset.
    Sequences of tokens are stored in bf16 where the run computes in bf16, which rounds them anyway;
    the rest, and all of an fp32 run, as it is encoded."""

    def __init__(self, c, recipe, pipeline, dataset):
        self.c, self.pipeline, self.dataset = c, pipeline, dataset
        if recipe.pairs == "trajectory":
            captions = drawn_captions(c, dataset, range(max(trajectory_counts(c, recipe))), "trajectory")
        else:
            captions = dataset.row_captions
        null = [0] * models.has_null(pipeline)
        # in the order in which samples need them: a run of more trajectories adds to the end
        self.captions = list(dict.fromkeys([*null, *captions]))
        self.row = {caption: i for i, caption in enumerate(self.captions)}
        encoders = models.text_encoders(pipeline)
        self.key, self.rows = models.fingerprint(*encoders), None
        self.text_encoders = sum(p.numel() for part in encoders for p in part.parameters())     # how large

    def encode(self, rows):
        made = encode(self.c, self.pipeline, [self.dataset.captions[self.captions[row]] for row in rows])
        half = [name for name, value in made.items() if value.ndim == 3 and self.c.precision == "bf16"]
        return {**made, **{name: made[name].to(torch.bfloat16) for name in half}}

    @functools.cached_property
    def nbytes(self):
        """What all of them take on disk."""
        return len(self.captions) * sum(value.nbytes for value in self.encode([0]).values())

    def cache(self, folder, processes):
        """Encode and store what the folder lacks, and let the text encoders go. processes: (rank, world
        size, barrier).  Raises UserError as store.cached does."""
        if models.prompts(self.pipeline):
            settings = dict(text=self.key, **sample_settings(self.c, self.pipeline, self.dataset))
            self.rows = store.cached(folder, len(self.captions), settings, self.encode, SHARD, *processes,
                                     desc="captions")
        self.pipeline = None

    def __getitem__(self, captions):
        """captions: list of N indices into dataset.captions.  Returns: dict of tensors (N, ...), float32
        or int64, CPU; {} of an unconditional model."""
        found = self.rows[[self.row[caption] for caption in captions]] if self.rows else {}
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
