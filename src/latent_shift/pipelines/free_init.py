"""FreeInit (Wu et al. 2024): sample again from the low frequencies of the last result and the high
frequencies of fresh noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from latent_shift.pipelines.schedulers import last_alpha

Filter = Literal["butterworth", "gaussian", "ideal"]


@dataclass(frozen=True)
class FreeInit:
    """Settings of FreeInit, named as in diffusers.

    Args:
        num_iters: how often a clip is sampled, 1 or more.
        use_fast_sampling: take fewer steps in the first iterations.
        method: shape of the low-pass filter.
        order: order of the Butterworth filter.
        spatial_stop_frequency, temporal_stop_frequency: cut-off, in [0, 1].

    Raises:
        ValueError: a number of iterations, a method or a frequency out of range.
    """

    num_iters: int = 3
    use_fast_sampling: bool = False
    method: Filter = "butterworth"
    order: int = 4
    spatial_stop_frequency: float = 0.25
    temporal_stop_frequency: float = 0.25

    def __post_init__(self) -> None:
        if self.num_iters < 1:
            raise ValueError(f"num_iters must be 1 or more, got {self.num_iters}")
        if self.method not in get_args(Filter):
            raise ValueError(f"unknown method {self.method!r}; expected one of {', '.join(get_args(Filter))}")
        for name in ("spatial_stop_frequency", "temporal_stop_frequency"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    def num_steps(self, iteration: int, num_inference_steps: int) -> int:
        """Return the sampling steps of an iteration, counted from 0."""
        if not self.use_fast_sampling:
            return num_inference_steps
        return max(1, num_inference_steps * (iteration + 1) // self.num_iters)

    def renoise(
        self, latents: Tensor, initial_noise: Tensor, fresh_noise: Tensor, scheduler: SchedulerMixin
    ) -> Tensor:
        """Return initial latents for the next iteration: the last result, noised to the last training
        timestep with the initial noise, below the stop frequency, and fresh noise above it.

        Args:
            latents: `(B, C, F, h, w)` result of the last iteration.
            initial_noise, fresh_noise: standard normal, of the same shape.
            scheduler: whose noise levels and `init_noise_sigma` scale the result.
        """
        alpha = last_alpha(scheduler)
        noisy = alpha**0.5 * latents.float() + (1 - alpha) ** 0.5 * initial_noise.float()
        dims = (-3, -2, -1)
        low_pass = self._low_pass(latents.shape[-3:]).to(latents.device)
        spectrum, noise_spectrum = (
            torch.fft.fftshift(torch.fft.fftn(x, dim=dims), dim=dims) for x in (noisy, fresh_noise.float())
        )
        mixed = torch.fft.ifftshift(spectrum * low_pass + noise_spectrum * (1 - low_pass), dim=dims)
        return (torch.fft.ifftn(mixed, dim=dims).real * scheduler.init_noise_sigma).to(latents.dtype)

    def _low_pass(self, shape: torch.Size) -> Tensor:
        """Gain of each frequency, `(F, h, w)`."""
        space, time = self.spatial_stop_frequency, self.temporal_stop_frequency
        if space == 0 or time == 0:
            return torch.zeros(shape)
        axes = [2 * torch.arange(length) / length - 1 for length in shape]
        frame, row, column = torch.meshgrid(*axes, indexing="ij")
        distance = (space / time * frame) ** 2 + row**2 + column**2
        if self.method == "butterworth":
            return 1 / (1 + (distance / space**2) ** self.order)
        if self.method == "gaussian":
            return torch.exp(-distance / (2 * space**2))
        return (distance <= 2 * space).float()
