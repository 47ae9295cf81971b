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


def encode(c, pipeline, captions, device="cpu", part=None):
    """captions: list of N strings, "" being the null embedding; part: as for models.encode_text.
    Returns: dict of tensors (N, ...) on device."""
    return models.encode_text(pipeline, [caption or None for caption in captions], null=c.null_text,
                              size=pixels(c, pipeline), device=device, part=part)


class Conditions:
    """The conditions of all samples that a run caches; on disk from cache() on.
    c: train.Config; recipe: reflow.Recipe; pipeline: nothing is read but the configs, or, where
    encoded_apart gives none, the text encoders as well; dataset: from captioned.open_dataset.
    Sequences of tokens are stored in bf16 where the run computes in bf16, which rounds them anyway;
    the rest, and all of an fp32 run, as it is encoded. Encoders that are run apart have a folder each."""

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
        self.apart = models.encoded_apart(pipeline)
        self.rows, self.keys = {}, []
        self.text_encoders = sum(p.numel() for part in models.text_encoders(pipeline)       # how large
                                 for p in part.parameters())

    def in_half(self, name, value):
        return value.ndim == 3 and self.c.precision == "bf16"

    def encode(self, pipeline, part, rows):
        texts = [self.dataset.captions[self.captions[row]] for row in rows]
        made = encode(self.c, pipeline, texts, part=part)
        return {name: value.to(torch.bfloat16) if self.in_half(name, value) else value
                for name, value in made.items()}

    @functools.cached_property
    def nbytes(self):
        """What all of them take on disk; at most so much, where encoders are run apart."""
        if not self.apart:
            return len(self.captions) * sum(value.nbytes
                                            for value in self.encode(self.pipeline, None, [0]).values())
        network = models.network(self.pipeline)
        whole = models.family_of(network).meta_condition(network)
        return len(self.captions) * sum(value.numel() * (2 if self.in_half(name, value) else 4)
                                        for name, value in whole.items())

    def cache(self, folder, processes, pipeline, part=None):
        """Encode and store what the folder lacks. processes: (rank, world size, barrier); pipeline: with
        its text encoders, or the one that part names.  Raises UserError as store.cached does."""
        encoders = models.text_encoders(pipeline) if part is None else [getattr(pipeline, part)]
        self.keys.append(models.fingerprint(*encoders))
        if models.prompts(pipeline):
            settings = dict(text=self.keys[-1], **sample_settings(self.c, pipeline, self.dataset))
            self.rows[part] = store.cached(folder / (part or ""), len(self.captions), settings,
                                           functools.partial(self.encode, pipeline, part), SHARD, *processes,
                                           desc=" of ".join(["captions", *[part] * bool(part)]))
        if part is None:
            self.pipeline = None                           # the text encoders may go

    @property
    def key(self):
        """What a cache knows the text encoders by."""
        return " ".join(self.keys)

    def __getitem__(self, captions):
        """captions: list of N indices into dataset.captions.  Returns: dict of tensors (N, ...), float32
        or int64, CPU; {} of an unconditional model."""
        return models.join_text(self.pipeline, {
            part: {name: value.float() if value.is_floating_point() else value
                   for name, value in stored[[self.row[caption] for caption in captions]].items()}
            for part, stored in self.rows.items()})
