"""One process or many: start-up, flags that all of them see, data prepared one step ahead."""
import collections
import datetime
import functools
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from runtime import cli
from runtime.cli import UserError


def pick_device(name):
    """--device: cpu, cuda, mps, xpu, or "" for cuda if there is one.  Returns: a name for torch.device.
    Raises UserError."""
    there = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available,
             "xpu": torch.xpu.is_available}
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not cli.choose("--device", name, there)():
        kind = {"cuda": "CUDA", "mps": "Apple GPU (mps)", "xpu": "Intel GPU (xpu)"}[name]
        raise UserError(f"--device {name}: no {kind} device here; use --device cpu")
    return name


# ---- processes ---------------------------------------------------------------------------------------------


def start_processes(c):
    """torchrun sets RANK and WORLD_SIZE, plain python does not.  Returns: (rank, world size,
    device, barrier).  Raises UserError. barrier() returns once all processes have called it,
    however long one of them has worked alone (decoding images, a shard more of the cache, a
    download, a slow disk): it has a group and a timeout of its own. The collectives of an update
    keep the backend's timeout (10 minutes on NCCL), which finds a dead machine;
    each is entered right after a barrier or an update."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = pick_device(c.device)
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise UserError(f"--nproc_per_node: process {device.index} has no GPU of its own, as the machine "
                            f"has {torch.cuda.device_count()}; start so many") from error
        torch.set_float32_matmul_precision("high")
    if (world > 1 or c.shard) and not dist.is_initialized():
        try:
            alone = dict(store=dist.HashStore(), rank=0, world_size=1) if world == 1 else {}
            dist.init_process_group("nccl" if name == "cuda" else "gloo", **alone)
        except (dist.DistError, RuntimeError) as error:
            port = os.environ.get("MASTER_PORT", "?")
            raise UserError(f"the processes cannot meet at port {port} ({str(error).splitlines()[0][:120]}); "
                            f"if another run has it, give torchrun --master_port a free one") from error
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7)) if world > 1 else None
    barrier = functools.partial(dist.barrier, patient) if world > 1 else lambda: None
    return rank, world, device, barrier


def catch_signals():
    """Ctrl-C and SIGTERM no longer end the process: their numbers are appended to a list.
    Returns: (the list, function that restores what was there before)."""
    caught = []
    before = {number: signal.signal(number, lambda number, frame: caught.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}

    def release():
        for number, handler in before.items():
            signal.signal(number, handler)
    return caught, release


class StopFlags:
    """All-reduce two flags (stop requested, state not finite). On CUDA the result lags one update,
    so the host never blocks; where a checkpoint follows, requested by `wait` or because of a stop,
    this update's flags are read as well: a state is kept only if it is known to be finite."""

    def __init__(self, device, world):
        self.device, self.world, self.pending = device, world, collections.deque()

    def __call__(self, stop, not_finite, wait=False):
        """stop: bool; not_finite: bool tensor on the device.  Returns: (stop, not finite) of any
        process, bools."""
        flags = torch.stack([torch.full((), float(stop), device=not_finite.device), not_finite.float()])
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        host = torch.empty(2, pin_memory=event is not None).copy_(flags, non_blocking=True)
        if event:
            event.record()
        self.pending.append((host, event))
        raised = [False, False]
        while len(self.pending) > (event is not None and not wait and not raised[0]):
            host, event_before = self.pending.popleft()
            if event_before:
                event_before.synchronize()
            raised = [before or bool(now) for before, now in zip(raised, host)]
        return raised


def prefetch(fetch, jobs):
    """fetch(job) of every job in turn, the next one made by a thread while the caller works on this
    one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for job in jobs:
            following = pool.submit(fetch, job)
            if waiting:
                yield waiting.result()
            waiting = following
        yield waiting.result()
