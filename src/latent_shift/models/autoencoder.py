"""The first stage: an image autoencoder that encodes and decodes video frames independently.

N frames, C channels, H W. Pixels are in [-1, 1], latents are `(N, 4, H/8, W/8)`.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor


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
