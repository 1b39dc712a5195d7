"""The optimizer of a run, its rate, and its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latent_shift.config import Config

PATIENCE = 50
"""Steps left out one after the other until a run is given up; a gradient scaler finds its scale in fewer."""
UNSTABLE = "try a smaller optim.lr, or train.precision=no: with these the run goes on from its checkpoints, which are whole"


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
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None and config.optim.optimizer == "adamw" and not config.train.shard:
        optimizer.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif scaler is not None or not skipped:  # a scaler leaves the step out itself, and lowers its scale
        optimizer.step()
    return skipped


def learning_rate(config: Config, done: int) -> float:
    """Linear warm-up to `optim.lr`, constant, and a fall to 0 over the last `cooldown_steps`, along a line or half a cosine."""
    optim = config.optim
    up = (done + 1) / max(1, optim.warmup_steps)
    down = min(1.0, (optim.steps - done) / max(1, optim.cooldown_steps))
    if optim.cooldown == "cosine":
        down = (1 - np.cos(np.pi * down)) / 2
    return float(optim.lr * min(1.0, up, down))
