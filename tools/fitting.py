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


def orthogonal(matrices):
    """The orthogonal matrices nearest to some of one shape, roughly: five Newton-Schulz steps bring
    singular values to 0.7 to 1.2 (Jordan et al. 2024, Muon).
    matrices: (n, rows, columns).  Returns: the same shape."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), for weights of two or more axes: a convolution
    is the matrix of its output channels. Updates have AdamW's size (rms 0.2 lr; Liu et al. 2025).
    torch's own takes no convolutions, and works in bf16. Of several processes, which hold the same
    gradients, each does its share of the matrices."""

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, columns), members in shapes.items():
                ahead = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"])
                                     .reshape(rows, -1) for p in members])              # Nesterov's
                share = -(-len(members) // world)
                mine = ahead[rank * share:(rank + 1) * share]
                mine = torch.cat([orthogonal(mine), torch.zeros(share - len(mine), rows, columns)])
                every = [torch.empty_like(mine) for _ in range(world)]
                if world > 1:
                    dist.all_gather(every, mine.contiguous())
                else:
                    every = [mine]
                size = 0.2 * max(rows, columns) ** 0.5
                for p, update in zip(members, torch.cat(every)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view(p.shape), alpha=-group["lr"] * size)


class Both:
    """Muon for what is a matrix, AdamW for what is not, under one optimizer's three calls."""

    def __init__(self, model, lr):
        tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1 and p not in tables]
        others = [p for p in trained if p.ndim < 2 or p in tables]
        self.lr = lr
        self.parts = [Muon(matrices, lr), torch.optim.AdamW(others, lr, weight_decay=0.0, betas=(0.9, 0.99))]

    def step(self, share):
        """One update at this share of the learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = share * self.lr
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


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
    optimizer = Both(model, lr)
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
        optimizer.step(trapezoid(step, steps))
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
