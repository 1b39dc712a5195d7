"""The optimizer of a run, its rate, and its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latent_shift.config import Config

UNSTABLE = "try a smaller optim.lr, or train.precision=no; the checkpoints before are whole, and the same command goes on from them"


def make(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options: dict[str, Any] = dict(lr=config.optim.lr, betas=(0.9, config.optim.beta2), weight_decay=config.optim.weight_decay)
    if config.optim.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def step(optimizer: torch.optim.Optimizer, norm: Tensor, config: Config) -> Tensor:
    """A step, unless its gradients are not finite: they would stay in the weights and their averages for ever.

    Args:
        optimizer: of `make`, as accelerate wraps it or not.
        norm: of all gradients, a scalar on their device.

    Returns:
        1 if the step was left out, else 0. Where the optimizer can it leaves it out on the device, as for a gradient scaler, so that the
        host need not wait to be told.
    """
    skipped = (~norm.isfinite()).float()
    if config.optim.optimizer == "adamw" and not config.train.shard and optimizer.scaler is None:  # type: ignore[attr-defined]
        optimizer.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped:
        optimizer.step()
    return skipped


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to `optim.lr`, constant, and a fall to 0 over the last `cooldown_steps`, along a line or half a cosine."""
    optim = config.optim
    up = (step + 1) / max(1, optim.warmup_steps)
    down = min(1.0, (optim.steps - step) / max(1, optim.cooldown_steps))
    if optim.cooldown == "cosine":
        down = (1 - np.cos(np.pi * down)) / 2
    return float(optim.lr * min(1.0, up, down))
