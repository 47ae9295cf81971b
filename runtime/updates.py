"""From a loss to new weights: the optimizer, the scale of the loss in fp16, the running average."""
import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import losses
from runtime import checkpoints, cli, muon


def make_optimizer(c, recipe, student, pairs, world, critic=None):
    """A stage begins with a new optimizer, a new average, and, for learned normalization, a new
    network that predicts the loss. critic: of distribution matching, in the stage that has it.
    Returns: (optimizer, EMAModel or None, the scaler of the loss, which does nothing but in fp16, what is
    trained beside the student: a ModuleDict of `normalizer` and `critic`, where there are; the same as the
    loss calls them, a dict)."""
    # eps 1e-7 keeps Adam from making steps of rounding errors where a weight has no gradient (biases before
    # a group norm): with 1e-8 one process and two drift apart six times as fast
    parameters, settings = checkpoints.trained(student).values(), dict(lr=c.lr, weight_decay=0.0, eps=1e-7)
    beside = torch.nn.ModuleDict({"critic": critic} if critic else {})
    if c.optimizer == "adamw8bit":
        library = cli.extra("--optimizer adamw8bit", "bitsandbytes", "memory")
        optimizer = library.optim.AdamW8bit(parameters, **settings)
    elif c.optimizer == "muon":
        tables = [m.weight for each in (student, beside) for m in each.modules()
                  if isinstance(m, torch.nn.Embedding)]
        optimizer = muon.Muon(parameters, tables=tables, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, fused=True)
    ema = EMAModel(parameters, decay=c.ema, foreach=not c.ema_device) if c.ema else None
    if ema:
        ema.to(c.ema_device or pairs.device)
    scaler = torch.amp.GradScaler(pairs.device.type, enabled=c.precision == "fp16")
    if recipe.normalization == "learned":
        torch.manual_seed(c.seed)
        beside["normalizer"] = losses.LossNormalizer(pairs.shape[0]).to(pairs.device)
    rates = dict(critic=dict(lr=c.lr), normalizer=dict(lr=1e-3, orthogonal=False))          # which stay
    for name, module in beside.items():
        optimizer.add_param_group(dict(params=list(checkpoints.trained(module).values()), **rates[name]))
    # the critic is sharded where the student is, the normalizer never
    called = {name: module if world == 1 or c.shard and name == "critic" else DDP(module)
              for name, module in beside.items()}
    return optimizer, ema, scaler, beside, called


def share_gradients(last, *networks):
    """Before the forward of a micro-batch: DDP and FSDP, where they are around these networks, share the
    gradients that have gathered once, at the last one."""
    for network in networks:
        if isinstance(network, DDP):
            network.require_backward_grad_sync = last       # which its forward reads as well
        elif hasattr(network, "set_requires_gradient_sync"):
            network.set_requires_gradient_sync(last)


def step(student, optimizer, ema, scaler):
    """One step of the optimizer and the average, and no gradients left.
    Returns: the norm of the gradient before it was clipped, a tensor on the device; 0 where fp16 overflowed:
    that step is left out and the next loss scaled by half, down to 1, below which it is no overflow."""
    parameters = checkpoints.trained(student).values()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if ema:
        here = ema.shadow_params[0].device
        ema.step([p if p.device == here else p.detach().to(here).requires_grad_() for p in parameters])
    if scaler.is_enabled() and scaler.get_scale() >= 1 and not norm.isfinite():
        return torch.zeros_like(norm)
    return norm
