"""What a run holds on its device at the highest, computed before it begins, without that device.

    python -m tools.memory --model sdxl --lora 16 --precision bf16 --micro-batch 1 --gradient-checkpointing
    python -m tools.memory --cards

takes the options of train.py; --cards computes the table of docs/costs.md (minutes). The networks are
run on tensors that have shapes and no memory (torch's FakeTensorMode), and every storage is counted from
the operation that makes it to the moment it is let go: gradients, what autograd keeps, casts to half
precision, and what backward needs meanwhile.

Not counted: what a device takes for itself (CUDA's context, work space of convolutions), and what its
allocator cannot use. Nor --compile and --shard, which change what is held.
"""
import contextlib
import dataclasses
import functools
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import train
from models import architectures, load
from models.student import check_lora, make_student
from runtime import checkpoints, cli, plan
from runtime.cli import UserError
from runtime.options import Config as Options
from runtime.options import resolve_recipe
from runtime.progress import Grid
from teacher import PRECISIONS

PHASES = ("captions", "trajectories", "updates", "pictures")
CAPTIONS = 64                    # encoded at once

LESS = "--precision bf16 --gradient-checkpointing --micro-batch"
# of a card's memory (GiB), the model, and the options that fit: the table of docs/costs.md
CARDS = (
    (8, "sd15", f"--lora 16 {LESS} 1"),
    (12, "sd15", f"{LESS} 1 --optimizer adamw8bit --ema-device cpu"),
    (12, "sdxl", f"--lora 16 {LESS} 1"),
    (16, "sd15", f"{LESS} 1 --optimizer adamw8bit"),
    (16, "sd3", f"--lora 16 {LESS} 1"),
    (24, "sd15", f"{LESS} 1"),
    (80, "sdxl", f"{LESS} 1"),
    (80, "sd3", f"{LESS} 1"),
)


@dataclass
class Config(Options):
    cards: bool = False          # compute the table of docs/costs.md instead


# ---- counting ----------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts bytes of the storages that operations make while it is on: .now, and .peak at the highest.
    held: tensors that are there already, and not counted."""

    def __init__(self, held):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(made) if torch.is_tensor(leaf)):
            if storage._cdata not in self.known:           # a view has the storage that it looks at
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return made

    def gone(self, storage, nbytes):
        self.known.remove(storage)
        self.now -= nbytes


def in_float32(norm):
    """What autocast does with a norm on CUDA and not on a CPU, whose autocast is what runs here: computed in
    fp32, which is kept for the backward as well."""
    def computed(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [each.float() if torch.is_tensor(each) else each for each in args]
        return norm(*args, **kwargs)
    return computed


def peak(function, *modules):
    """Bytes that function() takes at its highest, beyond the weights of these modules."""
    held = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]
    with Live(held) as live:
        function()
    return live.peak


# ---- the phases of a run -----------------------------------------------------------------------------------


@functools.cache
def counted(model, model_config, size, lora, precision, micro, before, checkpointing, device, guided):
    """Bytes of what does not depend on the optimizer, the average and the pictures. before: there are other
    micro-batches in an update; guided: trajectories take two evaluations.  Returns: dict."""
    c = Options(model, lora=lora, gradient_checkpointing=checkpointing)
    dtype, half = PRECISIONS[precision] if lora else torch.float32, precision != "fp32"
    pipeline = load.load_pipeline(model, dtype, model in architectures.ARCHITECTURES, empty=models.NETWORKS,
                                  model_config=model_config)
    network, vae = models.network(pipeline), models.autoencoder(pipeline)
    check_lora(c, network)
    module, shape = models.family_of(network), models.latent_shape(pipeline, size)
    models.embed_guidance(pipeline, 1.0)
    on_cuda = contextlib.nullcontext() if device == "cpu" else mock.patch.multiple(
        functional, **{name: in_float32(getattr(functional, name)) for name in ("group_norm", "layer_norm")})

    def evaluate(batch):
        z = torch.empty(batch, *shape)
        cond = {name: torch.empty(batch, *value.shape[1:], dtype=value.dtype)
                for name, value in module.meta_condition(network).items()}
        with torch.autocast("cpu", torch.bfloat16, half):
            return module.forward(network)(z, torch.empty(batch), **cond)

    def encode(encoder):
        length = getattr(encoder.config, "max_position_embeddings", tokens)
        return encoder(torch.zeros(CAPTIONS, min(length, tokens), dtype=torch.long))

    def update():
        for p in checkpoints.trained(network).values() if before else ():
            p.grad = torch.empty_like(p)                   # of the micro-batches before
        evaluate(micro).float().mean().backward()

    tokens = max((value.shape[1] for value in module.meta_condition(network).values() if value.ndim == 3),
                 default=0)
    found = dict(weights=plan.nbytes(network), autoencoder=plan.nbytes(*vae))
    with torch.random.fork_rng(()):
        make_student(c, network, torch.device("cpu"))
    trained = sum(p.nbytes for p in checkpoints.trained(network).values())
    with FakeTensorMode(allow_non_fake_inputs=True), on_cuda:
        for part in (*models.text_encoders(pipeline), *vae, network):
            part.to_empty(device="cpu")
        with torch.no_grad():
            encoded = [plan.nbytes(part) + peak(lambda: encode(part), part)
                       for part in models.text_encoders(pipeline)]
            solved = peak(lambda: evaluate(micro * (1 + guided)), network)
            drawn = [peak(lambda: evaluate(Grid.BATCH), network),
                     *[peak(lambda: part.decode(torch.empty(1, *shape, dtype=dtype)), part) for part in vae]]
        updated = peak(update, network)
    return dict(found, student=plan.nbytes(network), trained=trained, solved=solved, drawn=max(drawn),
                captions=max(encoded, default=0), updated=updated)


def phases(c):
    """c: train.Config.  Returns: {phase: bytes at its highest}, of PHASES.
    Raises UserError as train.py does, and for what is not counted."""
    cli.choose("--optimizer", c.optimizer, plan.OPTIMIZERS)
    recipe = resolve_recipe(dataclasses.replace(c, optimizer="adamw"))     # the other need not be installed
    share, micro = train.split_batch(c, recipe, 1)
    if plan.evaluates_frozen(recipe) or c.shard or c.compile:
        raise UserError("counted are runs with cached trajectories alone, on one process, without --compile; "
                        "leave out what asks for others")
    guided = c.guidance_range is not None or c.guidance_teacher not in (0, 1)
    found = counted(c.model, c.model_config, c.size, c.lora, c.precision, micro, micro < share,
                    c.gradient_checkpointing, c.device, guided)
    state = found["student"] + plan.added(c, found["trained"]) - found["trained"]   # gradients: in the peak
    beside, drawing = found["autoencoder"], bool(c.grid_steps)     # without pictures it has left
    return dict(zip(PHASES, (found["captions"], found["weights"] + beside + found["solved"],
                             state + beside * drawing + found["updated"],
                             (state + beside + found["drawn"]) * drawing)))


def options(model, flags):
    """train.Config of a row of CARDS."""
    return cli.parse(Options, "", ["--model", model, "--prompts", "prompts.txt", *flags.split()])


def row(card, model, flags):
    """A line of the table: what is computed, in GiB, in the order of PHASES."""
    found = phases(options(model, flags)).values()
    figures = " | ".join(f"{nbytes / 2 ** 30:.1f}" if nbytes else "-" for nbytes in found)
    return f"| {card} GB | `--model {model} {flags}` | {figures} |"


def main(c):
    if c.cards:
        print(f"| card | options | {' | '.join(PHASES)} |\n|---|---|" + "---|" * len(PHASES))
        for each in CARDS:
            print(row(*each), flush=True)
        return
    found = phases(c)
    for phase, nbytes in found.items():
        print(f"{phase}: {plan.size(nbytes)}")
    print(f"at the highest: {plan.size(max(found.values()))}; a GPU takes about 1 GiB more for itself")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
