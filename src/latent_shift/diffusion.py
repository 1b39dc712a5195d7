"""Noising, targets and weights of the denoising objective (Ho et al. 2020; the paper's: epsilon, t uniform in [1, T], mean squared error).

B clips, F frames, C channels, H W, L tokens, D text width, N = B*F. A clip has one timestep and one text.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler

from latent_shift.config import Diffusion


def noise_schedule(
    *, prediction: str = "epsilon", schedule: str = "scaled_linear", num_timesteps: int = 1000, zero_terminal_snr: bool = False
) -> DDPMScheduler:
    """The training schedule: betas as Stable Diffusion's, or cosine, or rescaled to end in pure noise (Lin et al. 2024)."""
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
    """That of a recipe's table `diffusion`."""
    return noise_schedule(
        prediction=options.prediction, schedule=options.schedule, num_timesteps=options.num_timesteps,
        zero_terminal_snr=options.zero_terminal_snr,
    )  # fmt: skip


def draw_timesteps(rng: np.random.Generator, num: int, num_timesteps: int, *, shift: float = 1.0) -> np.ndarray:
    """Timesteps `(num,)` in [0, num_timesteps): uniform u, moved by s u / (1 + (s - 1) u) (Esser et al. 2024, equation 23)."""
    u = rng.random(num)
    return (num_timesteps * shift * u / (1 + (shift - 1) * u)).astype(np.int64)


def share_noise(own, common, share: float, correlation: float = 0.0, *, loop: bool = False):
    """Noise of unit variance, alike from frame to frame: frames k apart correlate by share + (1 - share) correlation^k.

    The mixed and the progressive noise of PYoCo (Ge et al. 2023, section 4.1) in one: what stays, and what drifts.

    Args:
        own: each frame's own standard normal noise, an array or tensor `(B, F, ...)`.
        common: that of the clip, `(B, 1, ...)`.
        share: share of the variance that all frames have in common; 0 without correlation leaves `own`.
        correlation: from 0 to below 1, of the rest in one frame with the rest in the next.
        loop: the last frame drifts on into the first.
    """
    drifting = [drift(own[:, :1], None, correlation)]
    if loop:
        num, gain = own.shape[1], (1 - correlation**2) ** 0.5
        last = sum(own[:, num - 1 - k : num - k] * correlation**k for k in range(num)) * (gain / (1 - correlation**num))
        drifting = [drift(own[:, :1], last, correlation)]
    for frame in range(1, own.shape[1]):
        drifting.append(drift(own[:, frame : frame + 1], drifting[-1], correlation))
    rest = np.concatenate(drifting, axis=1) if isinstance(own, np.ndarray) else torch.cat(drifting, dim=1)
    if loop:  # what has come round once more adds to the variance
        rest = rest * ((1 - correlation**num) / (1 + correlation**num)) ** 0.5
    return rest * (1 - share) ** 0.5 + common * share**0.5


def drift(own, previous, correlation: float):
    """A frame's noise after the `previous` frame's (None: it is the first), of which it keeps `correlation`."""
    return own if previous is None else previous * correlation + own * (1 - correlation**2) ** 0.5
