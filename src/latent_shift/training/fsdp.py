"""Weights, gradients and optimizer states in parts over the processes: PyTorch's fully_shard (FSDP2).

Each block of a network is gathered when it is needed and let go of after, so that a process holds about 1/N of everything and one
block whole. What is learnt is what unsharded processes learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def shard(objective: nn.Module, network: nn.Module, accelerator: Accelerator) -> None:
    """Shard an objective and the network in it, in place; parameters become DTensors.

    Raises:
        ValueError: one process, or mixed precision that scales gradients.
    """
    if accelerator.num_processes == 1:
        raise ValueError("train.shard needs several processes: start the run with torchrun")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("train.shard with train.precision=fp16: expected bf16 or no")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))  # to whose devices each part goes by itself
    for module in network.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)  # samples are drawn with the network alone
    fully_shard(objective, mesh=mesh)


def register(accelerator: Accelerator, objective: nn.Module, optimizer: Optimizer) -> None:
    """Have the accelerator save and load what is sharded: PyTorch's distributed checkpoint, a file a process."""

    def save(modules: list[nn.Module], weights: list[dict], folder: str) -> None:
        model, states = get_state_dict(objective, optimizer)
        dcp.save({"model": model, "optimizer": states}, checkpoint_id=Path(folder) / "sharded")

    def load(modules: list[nn.Module], folder: str) -> None:
        model, states = get_state_dict(objective, optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": states}
        dcp.load(state, checkpoint_id=Path(folder) / "sharded")
        set_state_dict(objective, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one gathered after the other, of those processes that keep them; all of them must ask."""
    found = {}
    for name, tensor in tensors:
        tensor = whole(tensor.detach())
        if keep:
            found[name] = tensor.cpu().contiguous()
    return found


def copy(source: Tensor, target: Tensor) -> None:
    """Copy a whole tensor into one of which each process may hold a part."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
