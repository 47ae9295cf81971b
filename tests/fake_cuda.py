"""A CUDA device for machines without one: tensors that say they are on cuda:0 and compute on the CPU. What CUDA refuses is refused:
tensors of two devices in one call, a fused optimizer's step on the host, parts of a parameter in another memory layout.

torch's own FakeTensorMode knows shapes only, and no autograd without a CUDA build; these have values, so that a whole run can be
compared with the CPU's.
"""
import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode

from runtime import processes

KIND = {0: "cuda"}               # what is pretended: cuda, or mps, which has no float64
# an index may be on the host, and these are what moves a tensor
BOTH = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.data.__set__,
        torch.Tensor.grad.__set__}


class CudaTensor(torch.Tensor):
    device, is_cuda = property(lambda self: torch.device(KIND[0], 0)), property(lambda self: KIND[0] == "cuda")

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = isinstance(self, torch.nn.Parameter)
        return copied


def is_cuda(value):
    return isinstance(value, (str, torch.device)) and str(value).startswith(KIND[0])


def flatten(value):
    """Every leaf of nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple, dict)):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in flatten(part)]
    return [value]


def change(value, convert):
    """Nested lists, tuples and dicts with convert(leaf) in the place of each leaf; other containers are left alone."""
    if type(value) in (list, tuple):
        return type(value)([change(part, convert) for part in value])
    if type(value) is dict:
        return {key: change(part, convert) for key, part in value.items()}
    return convert(value)


def to_cuda(out):
    if KIND[0] == "mps" and isinstance(out, torch.Tensor) and out.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return out.as_subclass(CudaTensor) if isinstance(out, torch.Tensor) and not isinstance(out, CudaTensor) else out


def to_host(out):
    return out.as_subclass(torch.Tensor) if isinstance(out, CudaTensor) else out


class CudaMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):             # what only names a device
            return func(*args, **kwargs)
        if func is torch._has_compatible_shallow_copy_type:            # Module.to: if not, it makes new parameters
            return isinstance(args[0], CudaTensor) == isinstance(args[1], CudaTensor)
        leaves = flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = any(isinstance(tensor, CudaTensor) for tensor in tensors)
        if here and func not in BOTH and any(tensor.ndim and not isinstance(tensor, CudaTensor) for tensor in tensors):
            raise RuntimeError(f"{func.__name__}: Expected all tensors to be on the same device, but found at least two devices")
        if here and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch._fused_adamw_:
            check_fused(*args[:4], args[5])
        there = [leaf for leaf in leaves if isinstance(leaf, torch.device) or is_cuda(leaf)]
        if any(map(is_cuda, there)) or "pin_memory" in kwargs:
            args, kwargs = change((args, kwargs), lambda leaf: "cpu" if is_cuda(leaf) else leaf)
            kwargs.pop("pin_memory", None)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if func is torch.Tensor.cpu or there and not is_cuda(there[-1]):
            return change(found, to_host)
        in_place = func is torch.Tensor.copy_                          # of both, the first says where the result is
        return change(found, to_cuda) if there or here and not in_place else found


def check_fused(params, grads, averages, squares, steps):
    for p, *parts, step in zip(params, grads, averages, squares, steps, strict=True):
        assert all(isinstance(part, CudaTensor) for part in (p, *parts, step)), "fused AdamW: found at least two devices"
        assert all(part.stride() == p.stride() and part.dtype == p.dtype for part in parts), "fused AdamW: layouts differ"


class Event:
    def record(self):
        pass

    synchronize = record


@contextlib.contextmanager
def fake_cuda(kind="cuda"):
    """Everything in this block that asks for CUDA (or another kind) gets it."""
    autocast = torch.autocast
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KIND, 0, kind)
        patch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 ** 20)
        patch.setattr(processes, "pick_device", lambda name: name or kind)
        patch.setattr(torch, "autocast", lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 30, 2 ** 30))
        with CudaMode():
            yield
