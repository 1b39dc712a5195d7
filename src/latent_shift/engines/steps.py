"""Samplers as tables of numbers: DDIM and DPM-Solver++ (2M), whose steps are linear in the sample and the clean latents that the
network predicts. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """One step of a sampler: `x0 = clean_sample x + clean_output output`, then `x = sample x + clean x0 + clean_before x0_before`.

    Attributes:
        timestep: input of the network.
        clean_sample, clean_output: factors of the sample and of the network's output in the clean latents.
        sample, clean, clean_before: factors of the sample, of the clean latents and of those of the step before.
    """

    timestep: int
    clean_sample: float
    clean_output: float
    sample: float
    clean: float
    clean_before: float


def timesteps_of(sampler: str, num: int, *, num_timesteps: int, spacing: str, offset: int) -> list[int]:
    """Return the timesteps of a sampler of `num` steps, the noisiest first, as diffusers spaces them.

    Args:
        sampler: "ddim" or "dpm-solver++".
        num: sampling steps.
        num_timesteps: of training.
        spacing: "trailing", "leading" or "linspace".
        offset: added to leading timesteps.

    Raises:
        ValueError: a number of steps that diffusers does not space as asked.
    """
    first = 0 if sampler == "ddim" else 1  # DPM-Solver leaves out the last timestep of one step more
    if spacing == "trailing":
        timesteps = np.arange(num_timesteps, 0, -num_timesteps / num).round() - 1
    elif spacing == "leading":
        timesteps = np.arange(num + first)[::-1][:num] * (num_timesteps // (num + first)) + offset
    else:
        timesteps = np.linspace(0, num_timesteps - 1, num + first).round()[::-1][:num]
    if len(timesteps) != num or timesteps[0] >= num_timesteps or (np.diff(timesteps) == 0).any():
        raise ValueError(
            f"num_inference_steps={num}: {spacing} timesteps come out wrong by rounding; expected another number"
        )
    return [int(timestep) for timestep in timesteps]


def sampler_steps(
    sampler: str, timesteps: Sequence[int], alphas_cumprod: Sequence[float], *, prediction: str, last_alpha: float = 1.0
) -> list[Step]:  # fmt: skip
    """Return the steps of a sampler.

    Args:
        sampler: "ddim" (Song et al. 2021), or "dpm-solver++" (Lu et al. 2022, algorithm 2; the first and the last step are of
            order 1, as in diffusers).
        timesteps: the noisiest first.
        alphas_cumprod: of every training timestep: the fraction of the variance that is signal.
        prediction: of the network: "epsilon" or "v_prediction".
        last_alpha: of what the last step leads to; 1 is without noise.
    """
    levels = [_scales(alphas_cumprod[timestep]) for timestep in timesteps] + [_scales(last_alpha)]
    length_of_step = len(alphas_cumprod) // len(timesteps)
    steps = []
    for index, timestep in enumerate(timesteps):
        (alpha, sigma), (next_alpha, next_sigma) = levels[index], levels[index + 1]
        if sampler == "ddim":  # which does not look where the next step begins
            end = timestep - length_of_step
            next_alpha, next_sigma = _scales(alphas_cumprod[end] if end >= 0 else last_alpha)
        if prediction == "epsilon":
            clean_sample, clean_output = 1 / alpha, -sigma / alpha
        else:
            clean_sample, clean_output = alpha, -sigma
        ratio = next_sigma / sigma
        sample, clean, before = ratio, next_alpha - ratio * alpha, 0.0
        is_first_order = index in (0, len(timesteps) - 1) or sampler == "ddim"
        if not is_first_order:
            length, length_before = (
                _log_snr(levels[k + 1]) - _log_snr(levels[k]) for k in (index, index - 1)
            )
            weight = clean * length / (2 * length_before)
            clean, before = clean + weight, -weight
        steps.append(Step(int(timestep), clean_sample, clean_output, sample, clean, before))
    return steps


def _scales(alpha_cumprod: float) -> tuple[float, float]:
    """Return the factors of signal and noise."""
    return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


def _log_snr(level: tuple[float, float]) -> float:
    """Return half the logarithm of the signal-to-noise ratio."""
    alpha, sigma = level
    return math.log(alpha / sigma)
