"""A network that names what an embedded scene shows: which objects, where they stand, which colors
lie behind them. It measures what the model's own CLIP cannot: whether a picture follows its prompt
(prompt accuracy), and distances by features that no network of the pipeline was trained on.

    judge = Features("assets/judge")
    judge.accuracy(judge.images(images), plans)     # {"object": share, "color": ..., "relation": ...}

A scene of two objects is told in one way: "first" is the left or the upper one, whatever the
caption begins with; an object alone is "only". Trained by tools/build.py, with noise, blur and
changed colors.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from data import scenes
from runtime.cli import UserError

# what is judged -> how many answers there are
QUESTIONS = {"count": 2, "axis": 2, "only": len(scenes.NAMES), "first": len(scenes.NAMES),
             "second": len(scenes.NAMES), "top": len(scenes.COLORS), "bottom": len(scenes.COLORS)}

WIDTHS = 48, 96, 192       # channels at 16 x 16, 8 x 8, 4 x 4 of a 64 x 64 picture


class Block(nn.Module):
    """Two 3 x 3 convolutions with group norm, added to their input."""

    def __init__(self, width):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))

    def forward(self, x):
        h = x
        for conv, norm in zip(self.convs, self.norms):
            h = conv(F.silu(norm(h)))
        return x + h


class Judge(nn.Module):
    """Scenes (n, 3, 64, 64) in [-1, 1] -> {question: logits (n, answers)}.
    widths: channels at 16 x 16, 8 x 8 and 4 x 4."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=4)
        self.stages = nn.ModuleList(nn.Sequential(Block(width), Block(width)) for width in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:]))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], sum(QUESTIONS.values()))

    def maps(self, images):
        """The features after each stage: a list of (n, width, side, side), 16, 8 and 4 wide."""
        x, maps = self.stem(images), []
        for i, stage in enumerate(self.stages):
            x = stage(self.downs[i - 1](x) if i else x)
            maps.append(x)
        return maps

    def features(self, images):
        """(n, widths[-1]): the mean over places of the last stage, what the answers are read from."""
        return F.silu(self.norm(self.maps(images)[-1])).mean((2, 3))

    def forward(self, images):
        return split(self.head(self.features(images)))


def split(answers):
    """What Judge.head gives, (n, answers), by question."""
    return dict(zip(QUESTIONS, answers.split(list(QUESTIONS.values()), 1)))


class Features:
    """The judge of a folder as a network of features, like metrics.Clip: what FD compares, and the
    answers and distances read from them.  Raises UserError if no judge is there or it cannot be read."""
    name, published = "judge", False

    def __init__(self, folder, device="cpu"):
        file, self.device = Path(folder) / "judge.safetensors", device
        try:
            weights = load_file(file)
            widths = [len(weights[f"stages.{i}.0.convs.0.weight"]) for i in range(3)]
            self.model = Judge(widths)
            self.model.load_state_dict({name: value.float() for name, value in weights.items()})
        except Exception as error:                         # truncated, of another network, of other scenes
            raise UserError(f"--judge {folder}: {file.name} cannot be loaded ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:200]}); restore the folder") from error
        self.model.to(device).eval().requires_grad_(False)
        self.dim = widths[-1]

    @torch.no_grad()
    def images(self, images, batch=64):
        """images: float (N, 3, H, W) in [-1, 1].  Returns: float32 (N, dim), CPU."""
        return torch.cat([self.model.features(part.to(self.device, torch.float32)).cpu()
                          for part in images.split(batch)])

    @torch.no_grad()
    def accuracy(self, features, plans, levels=scenes.LEVELS):
        """Share of pictures that show what their captions name, of those whose captions name it, by
        their features (N, dim).  plans: (N, ...), of the scenes that the captions of these levels
        describe.  Returns: {"object", "color", "relation", "all": share}, less what no caption names."""
        answered = split(self.model.head(features.to(self.device, torch.float32)).cpu())
        return {name: right[named].double().mean().item()
                for name, (named, right) in follows(answered, plans, levels).items() if named.any()}

    @torch.no_grad()
    def distance(self, a, b):
        """How differently pictures look, (N,), CPU; see distance."""
        return distance(self.model, a.to(self.device, torch.float32), b.to(self.device, torch.float32)).cpu()


def answers(plans):
    """The right answers for planned scenes.
    Returns: {question: int64 (n,)}, -1 where the scene has none."""
    count, a, b, relation, top, bottom, _ = plans[:, :scenes.FACTS].long().unbind(1)
    two = count == 2
    place = torch.tensor(list(scenes.RELATIONS.values()))[relation]         # of the first object: (x, y)
    before = place.sum(1) < 0                                               # a is the left or the upper one

    def of_two(values):
        return torch.where(two, values, -1)
    return dict(count=count - 1, axis=of_two(place[:, 1].abs()), only=torch.where(two, -1, a),
                first=of_two(torch.where(before, a, b)), second=of_two(torch.where(before, b, a)),
                top=top, bottom=bottom)


def loss(judge, images, plans):
    """Cross entropy of every question that the scenes have an answer to, summed."""
    right = answers(plans)
    return sum(F.cross_entropy(logits, right[name], ignore_index=-1)
               for name, logits in judge(images).items())


def augment(images, generator):
    """Scenes as a judge must bear them: gain and offset per channel, noise, and half of them
    blurred. images: (n, 3, H, W) in [-1, 1].  Returns: the same."""
    n = len(images)
    u = torch.rand(n, 8, 1, 1, generator=generator)
    images = images * (0.85 + 0.3 * u[:, :3]) + 0.2 * (u[:, 3:6] - 0.5)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.where(u[:, 6:7] < 0.5, blurred, images)
    return images + 0.15 * u[:, 7:] * torch.randn(images.shape, generator=generator)


def follows(logits, plans, levels=scenes.LEVELS):
    """Which pictures show what their captions name.
    logits: of a Judge; plans: of the scenes that the prompts describe, with their caption levels.
    Returns: {"object", "color", "relation", "all": (named, right)}, bool (n,) each: whether the
    caption names it, and whether the picture has it. A caption that names a group is right with
    any object of that group, "a and b" in any places."""
    guess, right = {name: values.argmax(1) for name, values in logits.items()}, answers(plans)
    groups = sorted(set(scenes.GROUPS))
    group = torch.tensor([groups.index(name) for name in scenes.GROUPS])
    texts = [list(levels[count - 1])[level]
             for count, level in plans[:, [0, scenes.FACTS - 1]].long().tolist()]

    def says(word):
        return torch.tensor([word in text for text in texts])
    exact, vague = says("{a}"), says("{group_a}")
    placed, two = says("{relation}"), says("{b}") | says("{group_b}")

    def same(a, b):
        return torch.where(vague, group[a] == group[b.clamp(min=0)], a == b)
    first, second = guess["first"], guess["second"]
    straight = torch.where(two, same(first, right["first"]) & same(second, right["second"]),
                           same(guess["only"], right["only"]))
    crossed = two & same(first, right["second"]) & same(second, right["first"])
    counted = guess["count"] == right["count"]
    found = {"object": (exact | vague, counted & (straight | crossed)),
             "color": (says("{background}"),
                       (guess["top"] == right["top"]) & (guess["bottom"] == right["bottom"])),
             "relation": (placed, counted & straight & (guess["axis"] == right["axis"]))}
    named = torch.stack([named for named, _ in found.values()])
    correct = torch.stack([right for _, right in found.values()])
    return found | {"all": (named.any(0), (correct | ~named).all(0))}


def distance(judge, a, b):
    """How differently two pictures look to the judge (LPIPS's form, Zhang et al. 2018, without its
    learned weights): features of unit length at every place, mean squared difference, summed over
    stages.
    Returns: (n,)."""
    return sum((F.normalize(x) - F.normalize(y)).square().sum(1).mean((1, 2))
               for x, y in zip(judge.maps(a), judge.maps(b)))
