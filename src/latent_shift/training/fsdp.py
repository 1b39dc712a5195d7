"""Shard weights, gradients and optimizer states over the processes by PyTorch's fully_shard (FSDP2).

The weights of a block are gathered when the block runs and freed after it: a process holds about 1/N of
everything and one full block. Losses are those of unsharded training.
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
    """Shard an objective and its network in place and move each shard to its device; parameters become
    DTensors."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in network.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)  # on its own, because samples run the network without the objective
    fully_shard(objective, mesh=mesh)


def register_sharded_state(accelerator: Accelerator, objective: nn.Module, optimizer: Optimizer) -> None:
    """Save and load sharded weights and optimizer states with the accelerator's checkpoints, one file a
    process."""

    def save(modules: list[nn.Module], weights: list[dict], folder: str) -> None:
        model, states = get_state_dict(objective, optimizer)
        dcp.save({"model": model, "optimizer": states}, checkpoint_id=Path(folder) / "sharded")

    def load(modules: list[nn.Module], folder: str) -> None:
        model, states = get_state_dict(objective, optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": states}
        dcp.load(state, checkpoint_id=Path(folder) / "sharded")
        set_state_dict(
            objective, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_tensors(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Gather tensors one after the other and return them on the CPU where `keep` is set; every process must
    call this."""
    gathered = {}
    for name, tensor in tensors:
        tensor = full_tensor(tensor.detach())
        if keep:
            gathered[name] = tensor.cpu().contiguous()
    return gathered


def copy_into_shard(source: Tensor, target: Tensor) -> None:
    """Copy a full tensor into one that may be sharded; every process must call this."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
