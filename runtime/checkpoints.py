"""The state of training on disk, and tensors that may be sharded."""
import json
import re
import sys

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime import store
from runtime.cli import UserError


def trained(unet):
    """What the optimizer updates: name -> parameter."""
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


# ---- checkpoints -------------------------------------------------------------------------------------------


def checkpoints(out):
    """OUT's checkpoints, newest first; a copy under another name is its owner's."""
    found = {file: re.fullmatch(r"checkpoint-(\d+)\.safetensors", file.name) for file in out.iterdir()} \
        if out.is_dir() else {}
    return sorted(filter(found.get, found), key=lambda file: int(found[file][1]), reverse=True)


def states(student, beside, optimizer, ema):
    """All trainable state by name, in the optimizer's order: name -> (parameter, {"student" or
    "beside": the parameter, "ema": its running average, and what the optimizer keeps of it,
    once it has made a step}); what is trained beside the student has no average."""
    found = {name: (p, {"student": p}) for name, p in trained(student).items()}
    for (_, parts), average in zip(found.values(), ema.shadow_params if ema else ()):
        parts["ema"] = average
    found |= {name: (p, {"beside": p}) for name, p in trained(beside).items()}
    return {name: (p, {**parts, **optimizer.state[p]}) for name, (p, parts) in found.items()}


def save_checkpoint(out, rank, step, info, done, student, beside, optimizer, ema, keep, scaler=None):
    """checkpoint-STEP.safetensors: the trained weights, their running average, the optimizer's
    state. Everything random is a function of the step, so that nothing else is needed to go on.
    All processes call; the first one writes.
    Raises UserError on a state that is not finite: it never becomes a checkpoint."""
    tensors = gather_full({f"{part}:{name}": torch.as_tensor(value)
                           for name, (_, parts) in states(student, beside, optimizer, ema).items()
                           for part, value in parts.items()}, rank)
    if rank == 0:
        metadata = {"info": json.dumps(info), "step": str(step), "done": str(done),
                    "scaler": json.dumps(scaler.state_dict() if scaler else {})}
        store.write_atomically(out / f"checkpoint-{step:06d}.safetensors",
                               lambda part: save_file(tensors, part, metadata))
        for old in checkpoints(out)[keep:]:
            old.unlink()


def newest_checkpoint(out, rank):
    """(file, metadata) of the newest checkpoint that is whole, or (None, {}).
    A truncated one is passed over, and said so."""
    for file in checkpoints(out):
        try:
            with safe_open(file, "pt") as opened:
                return file, opened.metadata()
        except (SafetensorError, OSError) as error:
            if rank == 0:
                print(f"{file}: truncated ({error}); going back to the one before", file=sys.stderr)
    return None, {}


def restore(file, done, student, beside, optimizer, ema, scaler=None):
    """The inverse of save_checkpoint, `done` updates into its stage. What the optimizer keeps is
    handed to its own load_state_dict, which knows where each part of it lives: a fused one wants
    `step` beside the parameter."""
    if ema:
        ema.optimization_step = done
    kept = {}
    with safe_open(file, "pt") as saved:
        stored = {}                                        # name -> the parts of its state
        for key in saved.keys():
            part, _, name = key.partition(":")
            stored.setdefault(name, set()).add(part)
        for i, (name, (p, parts)) in enumerate(states(student, beside, optimizer, ema).items()):
            for part, tensor in parts.items():
                copy_full_(tensor, saved.get_tensor(f"{part}:{name}"))
            own = {part: saved.get_tensor(f"{part}:{name}")
                   for part in sorted(stored[name] - {"student", "ema", "beside"})}
            # in the parameter's own layout and shards
            for part in own.keys() & {"exp_avg", "exp_avg_sq", "momentum"}:
                moment = torch.zeros_like(p)
                copy_full_(moment, own[part])
                own[part] = moment
            if "state1" in own:                            # of bitsandbytes, which counts in Python
                own["step"] = int(own["step"])
            if own:
                kept[i] = own
        if scaler:
            scaler.load_state_dict(json.loads(saved.metadata().get("scaler", "{}")))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})


@torch.no_grad()
def swap_ema_(student, ema):
    """Exchange the trained weights and their running average, tensor by tensor; nothing where there
    is no average (None)."""
    for p, average in zip(trained(student).values(), ema.shadow_params if ema else ()):
        before = p.detach().clone()
        p.copy_(average)
        average.copy_(before)


# ---- sharded tensors and whole ones ------------------------------------------------------------------------


def gather_full(tensors, rank):
    """The whole of tensors that may be sharded, one at a time: name -> contiguous CPU tensor on the
    first process, which alone keeps them; {} on the others. No two share memory, which safetensors
    refuses: bitsandbytes keeps one table for all parameters. A collective call.
    Raises UserError if one is not finite."""
    found, places = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            found[name] = whole.cpu().contiguous()
            if found[name].data_ptr() in places:
                found[name] = found[name].clone()
            places.add(found[name].data_ptr())
            if not found[name].isfinite().all():
                raise UserError(f"{name} is not finite: it is not kept, the last checkpoint is good; to "
                                "train again, lower --lr and give another --out")
    return found


def copy_full_(tensor, value):
    """Write a value, whole or sharded, into a tensor that may be sharded (alike, if both are).
    A collective call then."""
    if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    elif isinstance(value, DTensor) and not isinstance(tensor, DTensor):
        value = value.full_tensor()
    tensor.detach().copy_(value)
