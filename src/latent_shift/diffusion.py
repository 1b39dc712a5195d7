"""Noising, targets and weights of the denoising objective (Ho et al. 2020; the paper's: epsilon, t uniform in [1, T], mean squared error).

B clips, F frames, C channels, H W, L tokens, D text width, N = B*F. A clip has one timestep and one text.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latent_shift.config import Diffusion
from latent_shift.shift import frames


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


def attention_kernel(device: str, *, noise: Tensor) -> AbstractContextManager:
    """The attention to train with on noise of the shape of latents.

    PyTorch's fused one on a CPU is slow backwards: a step of the emoji U-Net takes 0.51 s with it, 0.41 s without. Above 32x32 latents
    the matrices it does without would take gigabytes. On a GPU not cuDNN's, of whose gradients in half precision some were seen to
    be NaN where the inputs are finite (github.com/NVIDIA/cudnn-frontend/issues/160; masked, github.com/pytorch/pytorch/issues/196678).
    """
    if device == "cuda":
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    small = noise.shape[-2] * noise.shape[-1] <= 32 * 32
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" and small else nullcontext()


class DenoisingObjective(nn.Module):
    """The mean squared error of a U-Net that predicts the noise (or v) in latents, as one module that accelerate can wrap.

    Args:
        unet: inflated, with one text a clip (`share_text`).
        schedule: of the noise.
        min_snr: gamma of the min-SNR weight of timesteps; None: all weigh the same.
        motion_weight: how much the part of the error weighs that differs from the clip's mean over frames. What stays still is learnt
            first; above 1 what moves is not left behind (the concern of the loss of MotionDirector, Zhao et al. 2023, section 3.3).

    Raises:
        ValueError: a schedule that predicts something else.
    """

    def __init__(self, unet: UNet2DConditionModel, schedule: DDPMScheduler, *, min_snr: float | None = None, motion_weight: float = 1.0):
        super().__init__()
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"expected a schedule that predicts epsilon or v_prediction, got {schedule.config.prediction_type!r}")
        self.unet = unet
        self.schedule = schedule
        self.min_snr = min_snr
        self.motion_weight = motion_weight

    def forward(
        self, latents_BFCHW: Tensor, noise_BFCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its terms. F = 1 trains the image network: the shift passes single frames by."""
        num_frames = latents_BFCHW.shape[1]
        timesteps_N = timesteps_B.repeat_interleave(num_frames)
        latents, noise = latents_BFCHW.flatten(0, 1), noise_BFCHW.flatten(0, 1)
        noisy = self.schedule.add_noise(latents, noise, timesteps_N)
        epsilon = self.schedule.config.prediction_type == "epsilon"
        target = noise if epsilon else self.schedule.get_velocity(latents, noise, timesteps_N)
        with frames(self.unet, num_frames):
            predicted = self.unet(noisy, timesteps_N, text_BLD).sample.float()
        error_BFCHW = (predicted - target).unflatten(0, (-1, num_frames))
        mse_B = error_BFCHW.square().mean(dim=(1, 2, 3, 4))
        loss_B = mse_B
        if self.motion_weight != 1 and num_frames > 1:
            steady_B = error_BFCHW.mean(dim=1).square().mean(dim=(1, 2, 3))
            loss_B = steady_B + self.motion_weight * (mse_B - steady_B)
        return (loss_B * self._weight(timesteps_B)).mean(), {"mse": mse_B.mean().detach()}

    def _weight(self, timesteps_B: Tensor) -> Tensor | float:
        """Min-SNR (Hang et al. 2023, equation 11): the loss on x0 weighs min(SNR, gamma), whatever is predicted."""
        if self.min_snr is None:
            return 1.0
        signal = self.schedule.alphas_cumprod.to(timesteps_B.device)[timesteps_B]
        snr = signal / (1 - signal)
        of_x0 = snr if self.schedule.config.prediction_type == "epsilon" else snr + 1
        return snr.clamp(max=self.min_snr) / of_x0
