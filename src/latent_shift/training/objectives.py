"""The training objectives of the stages, as modules that accelerate can wrap.

Shapes: B clips of F frames, N = B*F; C channels, H x W of a frame; L tokens, D width of the text embeddings.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from latent_shift.diffusion import add_noise, noise_levels, training_target
from latent_shift.models.perceptual import FeatureDistance
from latent_shift.shift import frames


class AutoencoderObjective(nn.Module):
    """Compute the reconstruction, KL and perceptual losses of an `AutoencoderKL`.

    Args:
        vae: the autoencoder.
        kl: weight of the KL divergence from a standard normal.
        perceptual: weight of the perceptual distance; 0 loads no network for it.

    Raises:
        ValueError: the autoencoder lacks the two 1x1 convolutions around the latents, into which `whiten`
            folds their scale.
    """

    def __init__(self, vae: AutoencoderKL, *, kl: float, perceptual: float):
        super().__init__()
        if vae.quant_conv is None or vae.post_quant_conv is None:
            raise ValueError(
                "expected an autoencoder with quant_conv and post_quant_conv: the scale of the latents is folded into them"
            )
        self.vae = vae
        self.kl = kl
        self.perceptual = perceptual
        # A tuple hides the frozen network from this module's parameters and checkpoints.
        self._features = (FeatureDistance(),) if perceptual else ()

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms.

        Args:
            pixels: `(N, 3, H, W)`, -1..1.
            noise: `(N, C, h, w)` standard normal, to sample the posterior with.
        """
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        terms = {"l1": F.l1_loss(decoded, pixels), "kl": posterior.kl().mean() / noise[0].numel()}
        loss = terms["l1"] + self.kl * terms["kl"]
        for features in self._features:
            terms["perceptual"] = features(decoded, pixels)
            loss = loss + self.perceptual * terms["perceptual"]
        return loss, {name: term.detach() for name, term in terms.items()}


def attention_kernel(device: str, *, noise: Tensor) -> AbstractContextManager:
    """Return a context with the fastest correct attention kernels for training.

    On a CPU, PyTorch's fused kernel is slow in the backward pass: a step of the emoji U-Net takes 0.51 s with
    it, 0.41 s without. Above 32x32 latents the attention matrices it avoids would take gigabytes. On a GPU,
    cuDNN's kernel is excluded: some of its gradients in half precision are NaN for finite inputs
    (github.com/NVIDIA/cudnn-frontend/issues/160; with masks, github.com/pytorch/pytorch/issues/196678).

    Args:
        device: "cpu" or "cuda".
        noise: any tensor with the height and width of the latents as its last dimensions.
    """
    if device == "cuda":
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    small = noise.shape[-2] * noise.shape[-1] <= 32 * 32
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" and small else nullcontext()


class DenoisingObjective(nn.Module):
    """Compute the mean squared error of a network that predicts the noise, v or a flow.

    Args:
        unet: inflated, with one text per clip (`share_text`).
        schedule: noise schedule.
        min_snr: gamma of the min-SNR weight of timesteps; None: all weigh the same.
        motion_weight: weight of the part of the error that differs from the clip's mean over frames. Still
            content is learned first; above 1 motion does not fall behind (the aim of MotionDirector's loss,
            Zhao et al. 2023, section 3.3).
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: DDPMScheduler,
        *,
        min_snr: float | None = None,
        motion_weight: float = 1.0,
    ):
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.min_snr = min_snr
        self.motion_weight = motion_weight

    def forward(
        self, latents_BFCHW: Tensor, noise_BFCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms. F = 1 trains the image network: the shift leaves single frames
        unchanged."""
        num_frames = latents_BFCHW.shape[1]
        timesteps_N = timesteps_B.repeat_interleave(num_frames)
        latents, noise = latents_BFCHW.flatten(0, 1), noise_BFCHW.flatten(0, 1)
        noisy = add_noise(self.schedule, latents, noise, timesteps_N)
        target = training_target(self.schedule, latents, noise, timesteps_N)
        with frames(self.unet, num_frames):
            predicted = self.unet(noisy, timesteps_N, text_BLD).sample.float()
        error_BFCHW = (predicted - target).unflatten(0, (-1, num_frames))
        mse_B = error_BFCHW.square().mean(dim=(1, 2, 3, 4))
        loss_B = mse_B
        if self.motion_weight != 1 and num_frames > 1:
            mean_error_B = error_BFCHW.mean(dim=1).square().mean(dim=(1, 2, 3))
            loss_B = mean_error_B + self.motion_weight * (mse_B - mean_error_B)
        return (loss_B * self._weight(timesteps_B)).mean(), {"mse": mse_B.mean().detach()}

    def _weight(self, timesteps_B: Tensor) -> Tensor | float:
        """Return the min-SNR weights (Hang et al. 2023, equation 11): in terms of x0, a timestep weighs
        min(SNR, gamma)."""
        if self.min_snr is None:
            return 1.0
        signal_B, noise_B = noise_levels(self.schedule, timesteps_B)
        snr_B = (signal_B / noise_B).square()
        predicts_noise = self.schedule.config.prediction_type == "epsilon"
        return snr_B.clamp(max=self.min_snr) / (snr_B if predicts_noise else noise_B**-2)
