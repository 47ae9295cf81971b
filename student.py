"""The student: the teacher's own UNet made trainable, the frozen network that solves windows beside it, and how its state
is kept on disk. Plain, with LoRA adapters, or sharded over processes (FSDP2): the loop does not know which.
"""
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
    lay_out(c, unet, device)
    if c.compile:
        unet.compile()
    return unet.train()


def lay_out(c, unet, device):
    """Spread a network's weights over the processes, or order them as CUDA's convolutions read them fastest. Not both:
    FSDP refuses weights that are not contiguous."""
    if c.shard:
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
            # the outermost too, which FSDP would leave whole after a forward: between two forwards all weights are shards
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    elif device.type == "cuda":
        unet.to(memory_format=torch.channels_last)       # no gain on CPU


def trained(unet):
    """What the optimizer updates: name -> parameter."""
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


class FrozenNetwork:
    """The frozen network that solves windows online: the teacher, and after a stage with pairs from the student, that
    stage's student. With LoRA it is the student's own network with the adapters off or set to another; otherwise a copy."""

    def __init__(self, c, student, device):
        self.student, self.lora, self.adapter = student, c.lora, None
        if not c.lora:
            self.copy = copy.deepcopy(student).requires_grad_(False).eval().to(PRECISIONS[c.precision])
            lay_out(c, self.copy, device)

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
        """Answer as the student whose trained weights these are: name -> tensor, whole or sharded as the student's are."""
        if self.lora and not self.adapter:
            self.adapter = "previous"
            with warnings.catch_warnings():                # peft warns of a second adapter: it is meant
                warnings.simplefilter("ignore")
                self.student.add_adapter(LoraConfig(r=c.lora, lora_alpha=c.lora, target_modules=LORA_LAYERS), self.adapter)
            self.student.set_adapter("student")
        own = dict((self.student if self.lora else self.copy).named_parameters())
        for name, value in weights.items():
            copy_full_(own[name.replace(".student.", f".{self.adapter}.") if self.lora else name], value)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoints(out):
    """OUT's checkpoints, newest first."""
    return sorted(out.glob("checkpoint-*.safetensors"), key=lambda file: int(file.stem.split("-")[1]), reverse=True)


def states(student, normaliser, optimizer, ema):
    """All trainable state by name, in the optimizer's order: name -> (parameter, {"student" or "normaliser": the parameter,
    "ema": its running average, and what the optimizer keeps of it, once it has made a step}); the normaliser has no average."""
    found = {name: (p, {"student": p, "ema": average}) for (name, p), average in zip(trained(student).items(), ema.shadow_params)}
    found |= {f"normaliser.{name}": (p, {"normaliser": p}) for name, p in normaliser.named_parameters()}
    return {name: (p, {**parts, **optimizer.state[p]}) for name, (p, parts) in found.items()}


def save_checkpoint(out, rank, step, info, done, student, normaliser, optimizer, ema, keep):
    """checkpoint-STEP.safetensors: the trained weights, their running average, the optimizer's state. Everything random
    is a function of the step, so that nothing else is needed to go on. All processes call; the first one writes.
    Raises UserError on a state that is not finite: it never becomes a checkpoint."""
    tensors = gather_full({f"{part}:{name}": value for name, (_, parts) in states(student, normaliser, optimizer, ema).items()
                           for part, value in parts.items()}, rank)
    if rank == 0:
        metadata = {"info": json.dumps(info), "step": str(step), "done": str(done)}
        data.write_atomically(out / f"checkpoint-{step:06d}.safetensors", lambda part: save_file(tensors, part, metadata))
        for old in checkpoints(out)[keep:]:
            old.unlink()


def newest_checkpoint(out, rank):
    """(file, metadata) of the newest checkpoint that is whole, or (None, {}). A truncated one is passed over, and said so."""
    for file in checkpoints(out):
        try:
            with safe_open(file, "pt") as opened:
                return file, opened.metadata()
        except (SafetensorError, OSError) as error:
            if rank == 0:
                print(f"{file}: truncated ({error}); going back to the one before", file=sys.stderr)
    return None, {}


def restore(file, done, student, normaliser, optimizer, ema):
    """The inverse of save_checkpoint, `done` updates into its stage. What the optimizer keeps is handed to its own
    load_state_dict, which knows where each part of it lives: a fused one wants `step` beside the parameter."""
    ema.optimization_step = done
    kept = {}
    with safe_open(file, "pt") as saved:
        stored = set(saved.keys())
        for i, (name, (p, parts)) in enumerate(states(student, normaliser, optimizer, ema).items()):
            for part, tensor in parts.items():
                copy_full_(tensor, saved.get_tensor(f"{part}:{name}"))
            moments = {part: torch.zeros_like(p) for part in ("exp_avg", "exp_avg_sq") if f"{part}:{name}" in stored}
            for part, tensor in moments.items():           # in the parameter's own layout and shards
                copy_full_(tensor, saved.get_tensor(f"{part}:{name}"))
            if moments:
                kept[i] = {**moments, "step": saved.get_tensor(f"step:{name}")}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})


@torch.no_grad()
def swap_ema_(student, ema):
    """Exchange the trained weights and their running average, tensor by tensor."""
    for p, average in zip(trained(student).values(), ema.shadow_params):
        before = p.detach().clone()
        p.copy_(average)
        average.copy_(before)


# ---- sharded tensors and whole ones ------------------------------------------------------------------------------------


def gather_full(tensors, rank):
    """The whole of tensors that may be sharded, one at a time: name -> contiguous CPU tensor on the first process, which alone
    keeps them; {} on the others. A collective call.  Raises UserError if one is not finite."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            found[name] = whole.cpu().contiguous()
            if not found[name].isfinite().all():
                raise UserError(f"{name} is not finite: it is not kept, the last checkpoint is good; to train again, lower --lr and "
                                "give another --out")
    return found


def copy_full_(tensor, value):
    """Write a value, whole or sharded, into a tensor that may be sharded (alike, if both are). A collective call then."""
    if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    elif isinstance(value, DTensor) and not isinstance(tensor, DTensor):
        value = value.full_tensor()
    tensor.detach().copy_(value)
