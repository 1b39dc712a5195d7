"""Video Diffusion Models (Ho et al. 2022), the paper's baseline in pixel space, under the same contract as everything else: its "latents"
are the pixels themselves, and what sees time is attention alone, after each spatial attention, with relative positions.

The 3D U-Net of the paper is factorised, 1x3x3 convolutions and attention over space, then over time: an image U-Net with attention in
time. What differs from the paper: text comes in by cross-attention (they add a pooled embedding), and the U-Net is diffusers'.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from latent_shift.models.baselines import LatentVDMUNet


class VDMUNet(LatentVDMUNet):
    """A `UNet2DConditionModel` with attention in time and no convolution."""

    convolves = False


class PixelSpace(AutoencoderKL):
    """An "autoencoder" that keeps pixels as they are, `(N, 3, H, W)` in [-1, 1]: with it a latent model is a pixel model."""

    @register_to_config
    def __init__(self, latent_channels: int = 3, block_out_channels: tuple[int, ...] = (1,), scaling_factor: float = 1.0):
        ModelMixin.__init__(self)
        self.use_slicing = self.use_tiling = False
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)  # a module without parameters has no device and no dtype

    def encode(self, x: Tensor, return_dict: bool = True):
        distribution = DiagonalGaussianDistribution(torch.cat([x, torch.full_like(x, -30.0)], dim=1))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None):
        return DecoderOutput(sample=z) if return_dict else (z,)
