"""The embedded pictures as data: endless, drawn when they are asked for."""
import torch

from data import scenes
from runtime import seeds

# --data NAME -> the module that draws, and the levels of its captions
SOURCES = {"scenes": (scenes, scenes.LEVELS), "scenes-by-group": (scenes, scenes.GROUP_LEVELS)}


class Drawn:
    """A dataset as captioned.open_dataset says.  name: of SOURCES; seed: which endless sequence. Held-out
    pairs are never drawn."""
    size, skipped = None, []

    def __init__(self, name, seed):
        self.seed, (self.source, self.levels) = seed, SOURCES[name]
        self.captions = self.source.Captions(self.levels)

    def plans(self, numbers):
        return torch.cat([self.source.plan(1, seeds.generator(self.seed, "sprite", k), held_out=False,
                                           levels=self.levels) for k in numbers])

    def rows(self, numbers):
        """Every sample number is a picture of its own.  Returns: list of int."""
        return list(numbers)

    def caption_indices(self, numbers):
        """Which of self.captions describes each sample.  Returns: list of int."""
        return self.captions.numbers(self.plans(numbers))

    def images(self, numbers, size):
        """float (len(numbers), 3, size, size) in [-1, 1]."""
        return self.source.render(self.plans(numbers), size)

    decode = images
