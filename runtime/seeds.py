"""Streams of random numbers: one generator per seed and purpose."""
import hashlib

import torch


def generator(seed, *numbers):
    """A CPU generator for one purpose: every different (seed, numbers...) gives an unrelated
    stream."""
    digest = hashlib.sha256(repr((seed, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
