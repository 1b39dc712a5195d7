"""The optimizer of a run, its learning rate, and its steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latent_shift.config import Config
from latent_shift.models.channel_cost import shifted_readers
from latent_shift.shift import shift_of
from latent_shift.training.muon import MIN_CHANNELS, Muon, is_orthogonalized

MAX_SKIPPED_STEPS = 50
"""Skipped steps in a row after which a run ends with an error; a gradient scaler finds its scale in fewer."""
DIVERGED = "try a smaller optim.lr, or train.precision=no: the run then resumes from its last checkpoint, which is complete"


def create_optimizer(
    config: Config, parameters: list[nn.Parameter], after_shift: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer of `optim.optimizer`.

    Args:
        config: of the run.
        parameters: that are trained.
        after_shift: those of them that take `optim.shift_lr_scale` times the learning rate.
    """
    groups: Any = parameters
    if chosen := set(map(id, after_shift)):
        groups = [
            {
                "params": [each for each in parameters if (id(each) in chosen) == is_chosen],
                "after_shift": is_chosen,
            }
            for is_chosen in (False, True)
        ]
    options: dict[str, Any] = dict(
        lr=config.optim.lr, betas=(0.9, config.optim.beta2), weight_decay=config.optim.weight_decay
    )
    if config.optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if config.optim.optimizer == "muon":
        if not any(map(is_orthogonalized, parameters)):
            raise ValueError(
                f"optim.optimizer=muon has no effect: no weight has {MIN_CHANNELS} or more input and output channels; take adamw"
            )
        return Muon(groups, **options)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **options)


def names_after_shift(config: Config, objective: nn.Module, network: nn.Module) -> set[str]:
    """Return the names of the trained parameters of `objective` in the layers that read shifted channels, for
    `optim.shift_lr_scale`; none where it is 1. To be called before the network is sharded, which renames its classes.

    Raises:
        ValueError: none of these is trained.
    """
    if config.optim.shift_lr_scale == 1:
        return set()
    shift = shift_of(network)
    assert shift is not None, "the settings ask for a shift"
    layers = [layer for _, readers, _ in shifted_readers(network, shift.place) for layer in readers]
    readers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    names = {
        name
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad and id(parameter) in readers
    }
    if not names:
        raise ValueError(
            "optim.shift_lr_scale has no effect: no layer that reads shifted channels is trained"
        )
    return names


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Set the rate of the step after `step` steps."""
    for group in optimizer.param_groups:
        scale = config.optim.shift_lr_scale if group.get("after_shift") else 1.0
        group["lr"] = learning_rate(config, step) * scale


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor, config: Config) -> Tensor:
    """Take a step unless a gradient is not finite: a NaN would stay in the weights and their averages for good.

    Args:
        optimizer: from `create_optimizer`, wrapped by accelerate or not.
        grad_norm: norm of all gradients, a scalar on their device.

    Returns:
        1 if the step was skipped, else 0. Fused AdamW skips on the device, as for a gradient scaler, so the
        host does not wait.
    """
    skipped = (~grad_norm.isfinite()).float()
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None and config.optim.optimizer == "adamw" and not config.train.shard:
        optimizer.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif scaler is not None or not skipped:  # a scaler skips the step by itself and lowers its scale
        optimizer.step()
    return skipped


def learning_rate(config: Config, step: int) -> float:
    """Return the rate of the step after `step` steps.

    It rises linearly over `optim.warmup_steps` to `optim.lr`, stays, and falls to 0 over the last
    `optim.cooldown_steps`, along a line or half a cosine.
    """
    optim = config.optim
    up = (step + 1) / max(1, optim.warmup_steps)
    down = min(1.0, (optim.steps - step) / max(1, optim.cooldown_steps))
    if optim.cooldown == "cosine":
        down = (1 - np.cos(np.pi * down)) / 2
    return float(optim.lr * min(1.0, up, down))
