"""One loop trains every network of the embedded models: Muon for matrices, AdamW for the rest, an
average of the weights, checkpoints, and the same on one process as on several.
"""
import os
import time

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from runtime.muon import Muon


def make_optimizer(model, lr):
    """Muon; what is no matrix gets AdamW's update without decay."""
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and p not in tables]
    others = [p for p in trained if p.ndim < 2 or p in tables]
    return Muon([dict(params=matrices, weight_decay=0.01),
                 dict(params=others, weight_decay=0.0, orthogonal=False)], lr, betas=(0.9, 0.99))


def trapezoid(step, steps, warmup=100, decay=0.4):
    """Share of the learning rate at an update: up within `warmup` updates, then level, and down to
    zero over the last 40% of them."""
    return min(1, (step + 1) / warmup, (steps - step) / (decay * steps))


def fit(name, model, loss_fn, batches, steps, lr, runs, ema_decay=0.0, snapshots=0):
    """Train model in place; a finished or begun training of this name in `runs` is taken up.
    loss_fn(model, batch, step) -> scalar; batches(generator) -> one rank's batch. Update i draws from
    its own generator, so that a resumed run sees the same data as an uninterrupted one.
    snapshots: updates between copies of the average, kept for a curve over training; 0 = none."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    finished, checkpoint = runs / f"{name}.safetensors", runs / f"{name}-checkpoint.pt"
    if finished.exists():
        return model.load_state_dict(load_file(finished))
    optimizer = make_optimizer(model, lr)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start = state["step"]
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    model.train()
    average, saved = None, time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=rank > 0, mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(1_000_003 * step + rank)
        loss = loss_fn(wrapped, batches(generator), step)
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: loss {loss.item()} at update {step}; delete {checkpoint} and lower lr "
                             f"{lr}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * trapezoid(step, steps)
        optimizer.step()
        ema.step(model.parameters())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if rank == 0 and (time.time() - saved > 60 or step == steps - 1):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "ema": ema.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            saved = time.time()
        if rank == 0 and snapshots and (step + 1) % snapshots == 0 and step + 1 < steps:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            save_file({key: value.half().contiguous() for key, value in model.state_dict().items()},
                      runs / f"{name}-{step + 1:06d}.safetensors", {"updates": str(step + 1)})
            ema.restore(model.parameters())
    ema.copy_to(model.parameters())
    if rank == 0:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, finished)
        checkpoint.unlink(missing_ok=True)
    if world > 1:
        dist.barrier()
