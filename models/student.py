"""The student: the teacher's own network made trainable, and the frozen network that solves windows
beside it. Plain, with LoRA adapters, or sharded over processes
(FSDP2): the loop does not know which.
"""
import copy
import warnings

import torch
import torch.distributed as dist
from diffusers.models.embeddings import LabelEmbedding
from torch.distributed.fsdp import fully_shard

import models
from runtime import checkpoints
from runtime.cli import UserError, extra
from teacher import PRECISIONS


def check_lora(c, network):
    """Raises UserError where adapters are asked for that could not be loaded back."""
    if c.lora and models.family_of(network).LORA_LAYERS is None:
        raise UserError(f"--lora {c.lora}: diffusers puts no adapters on a {type(network).__name__}; "
                        "leave it out, to train every weight")


def make_student(c, network, device, dropout=0.0):
    """Make the teacher's network the student: all of its weights in fp32, or LoRA adapters on it
    (fp32, the rest frozen as it is); both start as the teacher. dropout: rate of every dropout in
    it, whatever it was built with. The same module is returned, sharded with --shard."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        if isinstance(module, LabelEmbedding):  # DiT's drops one in ten classes, in each block another one;
            module.dropout_prob = 0.0           # --text-dropout has done that when the pairs were made
    if c.lora:
        torch.manual_seed(c.seed)  # adapters begin alike on every process and at every start
        network.add_adapter(lora_config(c, network), "student")
        for p in checkpoints.trained(network).values():
            p.data = p.data.float()
    else:
        network.requires_grad_(True)
    if c.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    lay_out(c, network, device)
    if c.compile:
        network.compile()
    return network.train()


def lora_config(c, network):
    peft = extra(f"--lora {c.lora}", "peft", "lora")
    return peft.LoraConfig(r=c.lora, lora_alpha=c.lora, target_modules=models.family_of(network).LORA_LAYERS)


def lay_out(c, network, device):
    """Spread a network's weights over the processes, or order them as CUDA's convolutions read them
    fastest. Not both: FSDP refuses weights that are not contiguous."""
    if c.shard:
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in (*models.family_of(network).blocks(network), network):
            # the outermost too, which FSDP would leave whole after a forward: between two forwards all
            # weights are shards
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    elif device.type == "cuda":
        network.to(memory_format=torch.channels_last)       # no gain on CPU


class FrozenNetwork:
    """The frozen network that solves windows online: the teacher, and after a stage with pairs from
    the student, that stage's student. With LoRA it is the student's own network with the adapters
    off or set to another; otherwise a copy."""

    def __init__(self, c, student, device):
        self.student, self.lora, self.adapter = student, c.lora, None
        self.config = student.config
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
        """Answer as the student whose trained weights these are: name -> tensor, whole or sharded
        as the student's are."""
        if self.lora and not self.adapter:
            self.adapter = "previous"
            with warnings.catch_warnings():                # peft warns of a second adapter: it is meant
                warnings.simplefilter("ignore")
                self.student.add_adapter(lora_config(c, self.student), self.adapter)
            self.student.set_adapter("student")
        own = dict((self.student if self.lora else self.copy).named_parameters())
        for name, value in weights.items():
            checkpoints.copy_full_(own[name.replace(".student.", f".{self.adapter}.") if self.lora else name],
                                   value)
