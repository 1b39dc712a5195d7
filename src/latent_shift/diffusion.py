"""Diffusion as pure functions: noise schedules, timesteps, and what a network predicts (noise, velocity, or flow).

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor
from torch.nn import functional

from latent_shift.config import Diffusion, Prediction


def noise_schedule(
    *,
    prediction: str = "epsilon",
    schedule: str = "scaled_linear",
    num_timesteps: int = 1000,
    zero_terminal_snr: bool = False,
) -> DDPMScheduler:
    """Return the training schedule: betas as in Stable Diffusion, or cosine, or rescaled to end in pure
    noise (Lin et al. 2024). For a flow its betas have no effect, see `noise_levels`."""
    betas = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}.get(schedule, (1e-4, 0.02))
    return DDPMScheduler(
        num_train_timesteps=num_timesteps,
        beta_schedule=schedule,
        beta_start=betas[0],
        beta_end=betas[1],
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_terminal_snr,
        clip_sample=False,
        # A schedule that ends in pure noise must be sampled from its last step (Lin et al., section 3.3).
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
        steps_offset=1,
    )


def schedule_of(options: Diffusion) -> DDPMScheduler:
    """Return the training schedule of a recipe's table `diffusion`."""
    return noise_schedule(
        prediction=options.prediction, schedule=options.schedule, num_timesteps=options.num_timesteps,
        zero_terminal_snr=options.zero_terminal_snr,
    )  # fmt: skip


def draw_timesteps(
    rng: np.random.Generator, num: int, num_timesteps: int, *, shift: float = 1.0
) -> np.ndarray:
    """Draw timesteps `(num,)` in [0, num_timesteps): uniform u, shifted to s u / (1 + (s - 1) u) (Esser et
    al. 2024, equation 23)."""
    u = rng.random(num)
    return (num_timesteps * shift * u / (1 + (shift - 1) * u)).astype(np.int64)


def noise_levels(schedule: SchedulerMixin, timesteps_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors `(N,)` of clean latents and of noise in what a network sees at its timesteps.

    Their squares add up to 1 in diffusion, and the factors themselves in a flow, which is a straight line from the latents
    to the noise (Liu et al. 2023, equation 1): the timestep over the number of timesteps is the factor of the noise.
    """
    if schedule.config.prediction_type == "flow_prediction":
        sigma = timesteps_N / schedule.config.num_train_timesteps
        return 1 - sigma, sigma
    signal = schedule.alphas_cumprod.to(timesteps_N.device)[timesteps_N]
    return signal.sqrt(), (1 - signal).sqrt()


def add_noise(schedule: DDPMScheduler, latents_N: Tensor, noise_N: Tensor, timesteps_N: Tensor) -> Tensor:
    """Return latents `(N, ...)` at the noise levels of timesteps `(N,)`, or all at that of `(1,)`."""
    if schedule.config.prediction_type != "flow_prediction":
        return schedule.add_noise(latents_N, noise_N, timesteps_N)
    sigma = noise_levels(schedule, timesteps_N)[1].to(latents_N).reshape(-1, *[1] * (latents_N.ndim - 1))
    return torch.lerp(latents_N, noise_N, sigma)


def training_target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what a network learns to predict from noised latents: the noise, the velocity of diffusion (Salimans and
    Ho 2022), or that of a flow (Liu et al. 2023).

    Raises:
        ValueError: a schedule with another prediction type.
    """
    prediction_type = schedule.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    if prediction_type == "flow_prediction":
        return noise - latents
    raise ValueError(
        f"expected a schedule that predicts {', '.join(get_args(Prediction))}, got {prediction_type!r}"
    )


def ddim_step(
    schedule: DDPMScheduler, noisy_N: Tensor, prediction_N: Tensor, timesteps_N: Tensor, next_timesteps_N: Tensor
) -> Tensor:  # fmt: skip
    """Return samples after a deterministic step of DDIM (Song et al. 2021, equation 12 with sigma 0).

    Args:
        schedule: noise schedule of a network that predicts epsilon or v.
        noisy_N: samples `(N, ...)` at `timesteps_N`.
        prediction_N: of the network for them, of the same shape.
        timesteps_N, next_timesteps_N: `(N,)`, of each sample; -1 is without noise.

    Raises:
        ValueError: a schedule with another prediction type.
    """
    angles = _angles(schedule, noisy_N.device)
    velocity = _velocity(schedule, noisy_N, prediction_N, _column(angles[timesteps_N], noisy_N))
    rotation = _column(angles[timesteps_N] - angles[next_timesteps_N], noisy_N)
    return rotation.cos() * noisy_N - rotation.sin() * velocity


def midpoint_step(
    schedule: DDPMScheduler,
    noisy_N: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    timesteps_N: Tensor,
    next_timesteps_N: Tensor,
) -> Tensor:
    """Return samples after a midpoint step: DDIM to the middle, then the whole step with the velocity predicted there.

    It is of second order, with two predictions, and like DDIM exact where the clean samples and the noise stay the same.

    Args:
        schedule, noisy_N: as in `ddim_step`.
        predict: the network, from samples `(N, ...)` and timesteps `(N,)`.
        timesteps_N, next_timesteps_N: `(N,)`, at least two apart; -1 is without noise.
    """
    angles = _angles(schedule, noisy_N.device)
    # The timestep at the mean of both angles, or the next one: the step is corrected for the difference below.
    means_N = (angles[timesteps_N] + angles[next_timesteps_N]) / 2
    middle_N = torch.minimum(torch.searchsorted(angles[:-1], means_N), timesteps_N - 1)
    start, middle, end = (_column(angles[t_N], noisy_N) for t_N in (timesteps_N, middle_N, next_timesteps_N))
    prediction = predict(noisy_N, timesteps_N)
    inner = ddim_step(schedule, noisy_N, prediction, timesteps_N, middle_N)
    velocity = _velocity(schedule, inner, predict(inner, middle_N), middle)
    first = ddim_step(schedule, noisy_N, prediction, timesteps_N, next_timesteps_N)
    second = ((middle - end).cos() * noisy_N - (start - end).sin() * velocity) / (start - middle).cos()
    return torch.lerp(first, second, (start - end) / (2 * (start - middle)))


def _angles(schedule: DDPMScheduler, device: torch.device) -> Tensor:
    """Return the angle of each timestep `(T + 1,)`: its cosine is the factor of the clean samples, its sine that of the noise (Salimans
    and Ho 2022, appendix D). The last is that of timestep -1, without noise."""
    return functional.pad(schedule.alphas_cumprod, (0, 1), value=1.0).to(device).sqrt().acos()


def _column(values_N: Tensor, like_N: Tensor) -> Tensor:
    """Return one number a sample as `(N, 1, ...)`, with as many dimensions as `like_N`."""
    return values_N.reshape(-1, *[1] * (like_N.ndim - 1))


def _velocity(schedule: DDPMScheduler, noisy_N: Tensor, prediction_N: Tensor, angle_N: Tensor) -> Tensor:
    """Return the derivative of samples with respect to their angle, v, that a prediction implies."""
    if schedule.config.prediction_type == "v_prediction":
        return prediction_N
    if schedule.config.prediction_type == "epsilon":
        return (prediction_N - angle_N.sin() * noisy_N) / angle_N.cos()
    raise ValueError(
        f"expected a schedule that predicts epsilon or v, got {schedule.config.prediction_type!r}"
    )
