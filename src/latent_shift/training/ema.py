"""An exponential moving average of weights over training steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Average the weights of the steps 1 ... n: step i weighs (1 - decay) decay^(n - i) / (1 - decay^n).

    This is Adam's bias correction (Kingma and Ba 2015, section 3) applied to weights. The weights from before
    the first step get no share, so the decay needs no warm-up: it is `decay` at every step, and a short run
    averages over the steps it has.

    Args:
        parameters: the trained parameters, possibly sharded; the averages lie on the same devices.
        decay: 0 takes the weights of the last step; 0.999 averages about the last 1,000 steps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters: list[torch.Tensor] = list(parameters)
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.num_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the averages."""
        self.num_steps += 1
        # The accumulator a_n = decay a_(n-1) + (1 - decay) w_n, divided by 1 - decay^n, is this
        # interpolation.
        torch._foreach_lerp_(
            self.averages, self.parameters, (1 - self.decay) / (1 - self.decay**self.num_steps)
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters their averages inside the `with` block; their own values wait in main
        memory."""
        values = [parameter.detach().clone().cpu() for parameter in self.parameters]
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(values)

    @torch.no_grad()
    def _set(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
