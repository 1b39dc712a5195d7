from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from latent_shift.diffusion import training_target
from latent_shift.models.perceptual import FeatureDistance
from latent_shift.shift import frames


class AutoencoderObjective(nn.Module):
    """Reconstruction + KL + perceptual loss of an `AutoencoderKL`, as one module that accelerate can wrap.

    Raises:
        ValueError: an autoencoder without the two 1x1 convolutions around the latents, which `whiten` needs in the end.
    """

    def __init__(self, vae: AutoencoderKL, *, kl: float, perceptual: float):
        super().__init__()
        if vae.quant_conv is None or vae.post_quant_conv is None:
            raise ValueError("expected an autoencoder with quant_conv and post_quant_conv: the scale of the latents is folded into them")
        self.vae = vae
        self.kl = kl
        self.perceptual = perceptual
        # In a tuple: the frozen network is no part of this module's parameters or checkpoints.
        self._features = (FeatureDistance(),) if perceptual else ()

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its terms for `(N, 3, H, W)` pixels; `noise` `(N, 4, H/8, W/8)` samples the posterior."""
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        terms = {"l1": F.l1_loss(decoded, pixels), "kl": posterior.kl().mean() / noise[0].numel()}
        loss = terms["l1"] + self.kl * terms["kl"]
        for features in self._features:
            terms["perceptual"] = features(decoded, pixels)
            loss = loss + self.perceptual * terms["perceptual"]
        return loss, {name: term.detach() for name, term in terms.items()}


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
        target = training_target(self.schedule, latents, noise, timesteps_N)
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
