"""What a training run will need of memory and of time, before any of it is taken.

A step is run on fake tensors, which have shapes and no storage, while every storage that comes to life is counted until it dies:
what autograd keeps, what checkpointing computes anew, casts of mixed precision, gradients. Its multiplications are counted, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from latent_shift.config import Config
from latent_shift.data.store import Store
from latent_shift.diffusion import noise_schedule
from latent_shift.models import sizes
from latent_shift.models.baselines import saved_class
from latent_shift.pipelines import loading
from latent_shift.pipelines.lora import add_lora
from latent_shift.runtime import dtype_of, resolve_precision, world_size
from latent_shift.shift import share_text
from latent_shift.training.objectives import DenoisingObjective, attention_kernel

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLOPS = {**flop_registry, _FUSED: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]}
"""What an operation multiplies and adds; PyTorch's own table leaves out the attention of CPUs."""


@dataclass
class Estimate:
    """Bytes, on one device, at the peak of a training step: `weights` of the U-Net, `optimizer` states, `averaged` weights, and the
    `step` itself, activations and gradients. Not counted: the context and workspaces of CUDA, and what sampling takes. `flops` of
    matrices, convolutions and attention in a step."""

    weights: int
    optimizer: int
    averaged: int
    step: int
    flops: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.averaged + self.step

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in ("weights", "optimizer", "averaged", "step"))
        return f"memory of a training step: {self.total / 2**30:.2f} GiB ({parts})"


def of_run(config: Config, device: str = "cuda") -> Estimate:
    """The memory that a run of `config`, as `finetune.prepare` gives it back, takes on `device`.

    Raises:
        ValueError: a run of the autoencoder, which is small.
    """
    if config.stage == "autoencoder":
        raise ValueError("expected a run of the stages image or video")
    store = Store(config.data.path)
    with torch.device("meta"):
        if config.model.init:
            start = saved_class(loading.folder(config.model.init) / "unet", UNet2DConditionModel)
            unet = start.from_config(start.load_config(loading.folder(config.model.init), subfolder="unet"))
        else:
            unet = sizes.unet(str(config.model.size))
    return estimate(
        config,
        unet,
        latents=max(store.shapes.values(), key=lambda shape: shape[-1] * shape[-2])[2:],
        text_length=store.info["texts"][0],
        device=device,
    )


def estimate(config: Config, unet: UNet2DConditionModel, *, latents: Sequence[int], text_length: int, device: str = "cuda") -> Estimate:
    """The memory that training takes.

    Args:
        config: batch size, frames, shift, LoRA, precision, accumulation, checkpointing and optimizer are read.
        unet: on the meta device.
        latents: `(C, h, w)` of a frame.
        text_length: tokens of a caption.
        device: "cpu" or "cuda": attention keeps more on a CPU, where train.py takes the kernel that is faster backwards.
    """
    precision = dtype_of(resolve_precision(config.train.precision, torch.device(device)))
    with torch.device("meta"):
        unet = sizes.inflate_unet(unet, config.model)
        if config.lora:
            add_lora(unet, config.lora, dtype=precision)
    share_text(unet)
    clips = config.data.batch_size
    live = _Live()
    with FakeTensorMode():
        _fake(unet)
        objective = DenoisingObjective(unet, noise_schedule(prediction=config.diffusion.prediction)).train()
        if config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        clean = torch.empty(clips, config.data.num_frames, *latents)
        text = torch.empty(clips, text_length, unet.config.cross_attention_dim)
        parts = min(config.optim.accumulate, 2)
        with live, attention_kernel(device, noise=clean):
            for _ in range(parts):  # of the later batches the earlier ones' gradients are there
                with torch.autocast("cpu", precision) if precision != torch.float32 else nullcontext():
                    loss, _ = objective(clean, clean, torch.zeros(clips, dtype=torch.long), text)
                loss.backward()
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    parts_of = world_size() if config.train.shard else 1
    return Estimate(
        weights=sum(parameter.nbytes for parameter in unet.parameters()) // parts_of,
        optimizer=trained * (2 if config.optim.optimizer == "adamw8bit" else 8) // parts_of,
        averaged=trained * 4 // parts_of,
        step=live.peak,
        flops=live.flops // parts * config.optim.accumulate,
    )


def _fake(module: nn.Module) -> None:
    """Give the parameters of a module on the meta device a device that mixed precision knows."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad))


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that live, remembers the most, and counts multiplications and additions."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        if (counted := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += counted(*args, **(kwargs or {}), out_val=made)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and id(storage := leaf.untyped_storage()) not in given and id(storage) not in self.seen:
                self.now += storage.nbytes()
                self.seen[id(storage)] = weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self.seen[key]
