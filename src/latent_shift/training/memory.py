"""Estimate the memory and the time of a training step before it runs.

A step runs on fake tensors, which have shapes but no storage. Every storage is counted from its first use to
its last: what autograd keeps, what checkpointing recomputes, casts of mixed precision, gradients.
Multiplications are counted too.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from latent_shift.clip_text import share_text
from latent_shift.config import Config
from latent_shift.data.store import Store
from latent_shift.diffusion import noise_schedule
from latent_shift.models import sizes
from latent_shift.models.network_classes import saved_class
from latent_shift.models.parts import read_part, text_width
from latent_shift.pipelines.lora import add_lora
from latent_shift.runtime import dtype_of, resolve_precision, world_size
from latent_shift.training.distillation import DistillationObjective
from latent_shift.training.muon import is_orthogonalized
from latent_shift.training.objectives import DenoisingObjective, attention_kernel
from latent_shift.training.prepare import Prepared

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward


def _convolution_backward_flops(
    gradient: Tensor, x: Tensor, weight: Tensor, *options: Any, out_val: tuple
) -> int:
    """Return the operations of the gradients of input and weights: as many each as forward.

    PyTorch's own formula forgets the groups of the second and counts a depthwise convolution C-fold.
    """
    transposed: bool = options[4]
    x_shape, weight_shape, output_shape = (list(each.shape) for each in (x, weight, gradient))
    forward: int = conv_flop_count(x_shape, weight_shape, output_shape, transposed=transposed)
    return forward * sum(result is not None for result in out_val[:2])


FLOPS = {
    **flop_registry,
    _FUSED: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention],
    _CONVOLUTION_BACKWARD: _convolution_backward_flops,
}
"""Multiplications and additions of an operation; PyTorch's table lacks the attention of CPUs."""


@dataclass
class Estimate:
    """Bytes on one device at the peak of a training step, and the operations of the step.

    The context and workspaces of CUDA and the memory of sampling are not counted.

    Attributes:
        weights: of the U-Net, and of its teacher in stage distill.
        optimizer: states of the optimizer.
        averaged: averaged weights.
        step: activations and gradients.
        flops: of matrix products, convolutions and attention.
    """

    weights: int
    optimizer: int
    averaged: int
    step: int
    flops: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.averaged + self.step

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name) / 2**30:.2f}"
            for name in ("weights", "optimizer", "averaged", "step")
        )
        return f"memory of a training step: {self.total / 2**30:.2f} GiB ({parts})"


def estimate_run(config: Config, prepared: Prepared, device: str = "cuda") -> Estimate:
    """Estimate the memory of a run on `device`.

    Raises:
        ValueError: a run of an autoencoder, which is small.
    """
    if config.reads_pixels:
        raise ValueError("expected a run of stage image, video or distill")
    store = Store(prepared.store)
    with torch.device("meta"):
        if prepared.init:
            network = saved_class(Path(prepared.init) / "unet", UNet2DConditionModel)
            unet = network.from_config(read_part(Path(prepared.init) / "unet"))
        else:
            unet = sizes.unet(str(config.model.size))
    return estimate(
        config,
        unet,
        latents=max(store.shapes.values(), key=lambda shape: shape[-1] * shape[-2])[2:],
        text_length=store.info["texts"][0],
        device=device,
    )


def estimate(
    config: Config,
    unet: UNet2DConditionModel,
    *,
    latents: Sequence[int],
    text_length: int,
    device: str = "cuda",
) -> Estimate:
    """Estimate the memory of training a U-Net.

    Args:
        config: batch size, frames, shift, LoRA, precision, accumulation, checkpointing and optimizer are
            read.
        unet: on the meta device.
        latents: `(C, h, w)` of a frame.
        text_length: tokens of a caption.
        device: "cpu" or "cuda": the attention kernel that is fastest in the backward pass on a CPU keeps
            more.
    """
    precision = dtype_of(resolve_precision(config.train.precision, torch.device(device)))
    teacher = None
    with torch.device("meta"):
        unet = sizes.inflate_unet(unet, config.model)
        if config.lora:
            add_lora(unet, config.lora, dtype=precision)
        elif config.stage == "distill":
            teacher = sizes.inflate_unet(type(unet).from_config(unet.config), config.model).to(precision)
            share_text(teacher)
    share_text(unet)
    clips = config.data.batch_size
    live = _Live()
    with FakeTensorMode():
        _fake(unet)
        schedule = noise_schedule(prediction=config.diffusion.prediction)
        objective: nn.Module = DenoisingObjective(unet, schedule)
        if config.stage == "distill":
            if teacher is not None:
                _fake(teacher)
            empty_text = torch.empty(1, text_length, text_width(unet.config))
            objective = DistillationObjective(unet, teacher, schedule, empty_text, config.distill)
        objective.train()
        if config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        clean = torch.empty(clips, config.data.num_frames, *latents)
        text = torch.empty(clips, text_length, text_width(unet.config))
        with live, attention_kernel(device, noise=clean):
            if config.optim.accumulate > 1:  # the gradients of earlier batches take memory too
                for parameter in unet.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with torch.autocast("cpu", precision) if precision != torch.float32 else nullcontext():
                loss, _ = objective(clean, clean, torch.zeros(clips, dtype=torch.long), text)
            loss.backward()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    trained = sum(parameter.numel() for parameter in parameters)
    states = trained * (2 if config.optim.optimizer == "adamw8bit" else 8)
    if config.optim.optimizer == "muon":  # one state for each of its weights, not two
        states -= sum(4 * parameter.numel() for parameter in parameters if is_orthogonalized(parameter))
    num_shards = world_size() if config.train.shard else 1
    return Estimate(
        weights=sum(parameter.nbytes for parameter in objective.parameters()) // num_shards,
        optimizer=states // num_shards,
        averaged=trained * 4 // num_shards,
        step=live.peak,
        flops=live.flops * config.optim.accumulate,
    )


def _fake(module: nn.Module) -> None:
    """Move a module from the meta device to a fake device that autocast supports."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(
                name,
                nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad),
            )
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _Live(TorchDispatchMode):
    """Count the bytes of live storages, their peak, and the multiplications and additions."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.tracked: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        output = func(*args, **(kwargs or {}))
        if (count_flops := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count_flops(*args, **(kwargs or {}), out_val=output)
        for leaf in tree_leaves(output):
            if (
                isinstance(leaf, Tensor)
                and id(storage := leaf.untyped_storage()) not in inputs
                and id(storage) not in self.tracked
            ):
                self.now += storage.nbytes()
                self.tracked[id(storage)] = weakref.finalize(
                    storage, self._free, id(storage), storage.nbytes()
                )
        self.peak = max(self.peak, self.now)
        return output

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        del self.tracked[key]


def suggest_smaller_settings(config: Config) -> str:
    """Name settings that take less memory and fit the rest, those that do not change the training first."""
    size, frames = config.data.batch_size, config.data.num_frames
    options: list[tuple[bool, dict[str, object]]] = [  # whether it can help, and what to set
        (not config.train.gradient_checkpointing, {"train.gradient_checkpointing": True}),
        (size > 1, {"data.batch_size": size // 2, "optim.accumulate": config.optim.accumulate * 2}),
        (config.train.precision == "no", {"train.precision": "bf16"}),
        (config.optim.optimizer != "adamw8bit", {"optim.optimizer": "adamw8bit"}),
        (not config.lora, {"lora.rank": 32}),
        (frames > 1, {"data.num_frames": frames // 2}),
    ]
    suggestions = []
    for can_help, settings in options:
        changed = config.with_settings(settings) if can_help else None
        if changed:
            words = " ".join(f"{key}={'true' if value is True else value}" for key, value in settings.items())
            suggestions.append(
                words + (" in another run folder" if changed.identity() != config.identity() else "")
            )
    return "try, in this order, " + ", ".join(suggestions or ["a smaller model"])
