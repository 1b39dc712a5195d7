"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for convolutions too."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

MIN_CHANNELS = 32
"""Weights with fewer input or output channels take AdamW: the first and last layers of a network, position biases, depthwise convolutions."""
_MOMENTUM = 0.95
_LARGEST_STACK = 2**24
"""Numbers in the weights that are orthogonalized at the same time."""


class Muon(torch.optim.AdamW):
    """Muon for the weights of inner layers, AdamW for the other parameters.

    The momentum of a weight, with rows of output channels and columns of everything else, is replaced by a matrix that is nearly orthogonal.
    It is scaled as in Liu et al. 2025 ("Muon is Scalable for LLM Training", equation 4), so that a number moves by 0.2 lr in root mean square.
    PyTorch's own Muon (2.9) takes two-dimensional weights alone. Not fused: a gradient scaler then skips whole steps by itself.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step, and clear the gradients of the weights that Muon has moved."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients before the step")
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None and is_orthogonalized(weight):
                    same_shape[weight.shape].append(weight)
            for shape, weights in same_shape.items():
                num = max(1, _LARGEST_STACK // shape.numel())
                for start in range(0, len(weights), num):
                    self._move(weights[start : start + num], group["lr"], group["weight_decay"])
        super().step()

    def _move(self, weights: list[Tensor], lr: float, weight_decay: float) -> None:
        """Move weights of one shape."""
        directions = []
        for weight in weights:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            state = self.state[weight]
            if not state:  # AdamW expects `step` in the states it loads
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
            state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
            directions.append(torch.lerp(gradient, state["momentum"], _MOMENTUM).flatten(1))  # Nesterov's
        steps = orthogonalize(torch.stack(directions))
        scale = 0.2 * max(steps.shape[1:]) ** 0.5
        for weight, step in zip(weights, steps, strict=True):
            weight.mul_(1 - lr * weight_decay).add_(step.view_as(weight), alpha=-lr * scale)


def is_orthogonalized(parameter: Tensor) -> bool:
    """Return whether Muon moves a parameter: a weight with at least `MIN_CHANNELS` input and output channels."""
    return parameter.ndim >= 2 and min(parameter.shape[:2]) >= MIN_CHANNELS


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices `(N, rows, columns)` with singular values near 1.

    Five Newton-Schulz iterations of the fifth order, with Jordan's coefficients: values above about 0.002 of a matrix's norm end between
    0.68 and 1.2, smaller ones grow up to 485 times.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float()
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x
