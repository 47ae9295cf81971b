"""The student: the teacher's own UNet made trainable, the frozen network that solves windows beside it, and how its state
is kept on disk. Plain, with LoRA adapters, or sharded over processes (FSDP2): the loop does not know which.
"""
import collections
import copy
import json
import sys
import warnings

import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import data
from config import UserError
from pairs import PRECISIONS

# every linear and convolution inside the UNet's blocks, by the names diffusers gives them
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "conv1", "conv2",
               "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]


def make_student(c, unet, device, dropout=0.0):
    """Make the teacher's UNet the student: all of its weights in fp32, or LoRA adapters on it (fp32, the rest frozen as
    it is); both start as the teacher. dropout: rate of every dropout in it, whatever it was built with.
    The same module is returned, sharded if asked for."""
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    if c.lora:
        if not hasattr(unet, "add_adapter"):
            raise UserError(f"--lora {c.lora}: diffusers puts no adapters on a {type(unet).__name__}; leave it out, to train every weight")
        torch.manual_seed(c.seed)                        # adapters begin alike on every process and at every start
        unet.add_adapter(LoraConfig(r=c.lora, lora_alpha=c.lora, target_modules=LORA_LAYERS), "student")
        for p in trained(unet).values():
            p.data = p.data.float()
    else:
        unet.requires_grad_(True)
    if c.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)       # no gain on CPU
    if c.shard:
        shard(unet, device)
    if c.compile:
        unet.compile()
    return unet.train()


def shard(unet, device):
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        fully_shard(block, mesh=mesh)


def trained(unet):
    """What the optimiser updates: name -> parameter."""
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


class Solver:
    """The frozen network that solves windows online: the teacher, and after a stage with pairs from the student, that
    stage's student. With LoRA it is the student's own network with the adapters off or set to another; otherwise a copy."""

    def __init__(self, c, student, device):
        self.student, self.lora, self.adapter = student, c.lora, None
        if not c.lora:
            self.copy = copy.deepcopy(student).requires_grad_(False).eval().to(PRECISIONS[c.precision])
            if c.shard:
                shard(self.copy, device)

    def parameters(self):
        return (self.student if self.lora else self.copy).parameters()

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        if not self.lora:
            return self.copy(*args, **kwargs)
        self.student.eval()                                # no dropout
        if self.adapter:
            self.student.set_adapter(self.adapter)
        else:
            self.student.disable_adapters()
        try:
            return self.student(*args, **kwargs)
        finally:
            self.student.enable_adapters()
            self.student.set_adapter("student")
            self.student.train()

    @torch.no_grad()
    def become(self, weights, c):
        """Answer as the student whose trained weights these are (name -> tensor)."""
        if self.lora and not self.adapter:
            self.adapter = "previous"
            with warnings.catch_warnings():                # peft warns of a second adapter: it is meant
                warnings.simplefilter("ignore")
                self.student.add_adapter(LoraConfig(r=c.lora, lora_alpha=c.lora, target_modules=LORA_LAYERS), self.adapter)
            self.student.set_adapter("student")
        own = dict((self.student if self.lora else self.copy).named_parameters())
        for name, value in weights.items():
            assign(own[name.replace(".student.", f".{self.adapter}.") if self.lora else name], value)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoints(out):
    """OUT's checkpoints, newest first."""
    return sorted(out.glob("checkpoint-*.safetensors"), reverse=True)


def states(student, normaliser, optimizer, ema):
    """Everything that training changes: name -> {part: tensor}; of the normaliser there is no average."""
    found = {name: {"student": p, "ema": average} for (name, p), average in zip(trained(student).items(), ema.shadow_params)}
    found |= {f"normaliser.{name}": {"normaliser": p} for name, p in normaliser.named_parameters()}
    return {name: {**parts, **optimizer.state[next(iter(parts.values()))]} for name, parts in found.items()}


def save_checkpoint(out, rank, step, info, done, student, normaliser, optimizer, ema, keep):
    """checkpoint-STEP.safetensors: the trained weights, their running average, the optimiser's state. Everything random
    is a function of the step, so that nothing else is needed to go on. All processes call; the first one writes."""
    tensors = {}
    for name, parts in states(student, normaliser, optimizer, ema).items():
        tensors |= {f"{part}:{name}": full(value) for part, value in parts.items()}
    if rank == 0:
        metadata = {"info": json.dumps(info), "step": str(step), "done": str(done)}
        data.write_atomically(out / f"checkpoint-{step:06d}.safetensors", lambda part: save_file(tensors, part, metadata))
        for old in checkpoints(out)[keep:]:
            old.unlink()


def newest_checkpoint(out, rank):
    """(file, metadata) of the newest checkpoint that is whole, or (None, {}). A torn one is passed over, and said so."""
    for file in checkpoints(out):
        try:
            with safe_open(file, "pt") as opened:
                return file, opened.metadata()
        except (SafetensorError, OSError) as error:
            if rank == 0:
                print(f"{file}: torn ({error}); going back to the one before", file=sys.stderr)
    return None, {}


def restore(file, done, student, normaliser, optimizer, ema):
    """The inverse of save_checkpoint, `done` updates into its stage."""
    ema.optimization_step = done
    with safe_open(file, "pt") as saved:
        stored = collections.defaultdict(list)
        for key in saved.keys():
            part, name = key.split(":")
            stored[name].append(part)
        for name, parts in states(student, normaliser, optimizer, ema).items():
            p = next(iter(parts.values()))
            for part in stored[name]:
                value = saved.get_tensor(f"{part}:{name}")
                if part in parts:
                    assign(parts[part], value)
                else:                                      # the optimiser's, which has none before its first step
                    optimizer.state[p][part] = value if value.ndim == 0 else torch.zeros_like(p)
                    if value.ndim:
                        assign(optimizer.state[p][part], value)


@torch.no_grad()
def swap(student, ema):
    """Exchange the trained weights and their running average, tensor by tensor."""
    for p, average in zip(trained(student).values(), ema.shadow_params):
        before = p.detach().clone()
        p.copy_(average)
        average.copy_(before)


# ---- sharded tensors and whole ones ------------------------------------------------------------------------------------


def full(tensor):
    """The whole of a tensor that may be sharded, contiguous on the CPU. A collective call if it is."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def assign(tensor, value):
    """Write a whole tensor into one that may be sharded."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.detach().copy_(value)
