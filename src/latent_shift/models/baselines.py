"""The paper's baselines: networks that relate frames by layers with parameters instead of by a shift.

`LatentVDMUNet` (Latent-VDM): a pseudo-3D convolution over time after each ResNet block (Singer et al. 2022)
and an attention over time with relative positions after each spatial transformer (Ho et al. 2022). Both end
in zeros, so the network starts as the image network. An image is a clip of one frame: attention then sees
only that frame, and so does the convolution.

`VDMUNet` with `PixelSpace`: Video Diffusion Models (Ho et al. 2022) in pixels. The paper's 3D U-Net is
factorised into convolutions and attention over space, then attention over time: an image U-Net with
attention over time. Two things differ from the paper: text enters by cross-attention (they add a pooled
embedding), and the U-Net is diffusers'.

Shapes: B clips of F frames, N = B*F; C channels, H x W of a frame, P = B*H*W; h heads of d channels.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from torch import Tensor, nn

from latent_shift.shift import Shift, inflate


class TemporalConv(nn.Conv1d):
    """Convolve three successive frames at each pixel, and add the result; it is zero at initialization."""

    def __init__(self, num_channels: int):
        super().__init__(num_channels, num_channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x_NCHW: Tensor, num_frames: int = 1) -> Tensor:  # type: ignore[override]
        x_BFCHW = x_NCHW.unflatten(0, (-1, num_frames))
        x_PCF = x_BFCHW.permute(0, 3, 4, 2, 1).flatten(0, 2)
        y_BHWCF = super().forward(x_PCF).unflatten(0, (x_BFCHW.shape[0], *x_BFCHW.shape[-2:]))
        return x_NCHW + y_BHWCF.permute(0, 4, 3, 1, 2).flatten(0, 1)


class TemporalAttention(nn.Module):
    """Attend over the frames of the clip at each pixel, and add the result; it is zero at initialization.

    Positions are relative: each head learns a bias for each distance up to `max_distance`, and one for all
    larger distances, so any number of frames fits.
    """

    def __init__(self, num_channels: int, num_heads: int, max_distance: int = 32):
        super().__init__()
        self.num_heads = num_heads
        self.max_distance = max_distance
        self.norm = nn.LayerNorm(num_channels)
        self.to_qkv = nn.Linear(num_channels, 3 * num_channels, bias=False)
        self.to_out = nn.Linear(num_channels, num_channels)
        self.bias = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x_NCHW: Tensor, num_frames: int = 1) -> Tensor:
        x_BFCHW = x_NCHW.unflatten(0, (-1, num_frames))
        x_PFC = x_BFCHW.permute(0, 3, 4, 1, 2).flatten(0, 2)
        q_PhFd, k_PhFd, v_PhFd = (
            self.to_qkv(self.norm(x_PFC)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        frame = torch.arange(num_frames, device=x_NCHW.device)
        distance_FF = (frame[:, None] - frame).clamp(
            -self.max_distance, self.max_distance
        ) + self.max_distance
        y_PhFd = F.scaled_dot_product_attention(
            q_PhFd, k_PhFd, v_PhFd, attn_mask=self.bias[:, distance_FF].to(q_PhFd.dtype)
        )
        y_PFC = self.to_out(y_PhFd.transpose(1, 2).flatten(2))
        y_BHWFC = y_PFC.unflatten(0, (x_BFCHW.shape[0], *x_BFCHW.shape[-2:]))
        return x_NCHW + y_BHWFC.permute(0, 3, 4, 1, 2).flatten(0, 1)


class _ResnetBlockWithTime(ResnetBlock2D):
    def forward(self, *args, **options) -> Tensor:
        return self.over_time(super().forward(*args, **options), self.shift_state.num_frames)


class _TransformerWithTime(Transformer2DModel):
    def forward(self, *args, return_dict: bool = True, **options):
        (y_NCHW,) = super().forward(*args, return_dict=False, **options)
        y_NCHW = self.over_time(y_NCHW, self.shift_state.num_frames)
        return Transformer2DModelOutput(sample=y_NCHW) if return_dict else (y_NCHW,)


class LatentVDMUNet(UNet2DConditionModel):
    """A `UNet2DConditionModel` with convolution and attention over time. `frames(network, F)` sets how many
    frames make a clip, as for a shifted network; loops, exact chunks and streams, which only a shift can do,
    are refused."""

    temporal_convolution: ClassVar[bool] = True

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        inflate(self, Shift(0, 0))  # moves no channel; its state holds the number of frames
        state = self.__dict__["_shift_state"]
        for module in list(self.modules()):
            if isinstance(module, ResnetBlock2D) and self.temporal_convolution:
                module.over_time = TemporalConv(module.out_channels)
                module.__class__ = _ResnetBlockWithTime
            elif isinstance(module, Transformer2DModel):
                module.over_time = TemporalAttention(module.inner_dim, module.config.num_attention_heads)
                module.__class__ = _TransformerWithTime
            else:
                continue
            module.__dict__["shift_state"] = state
        self.temporal_layers = True


class VDMUNet(LatentVDMUNet):
    """A `UNet2DConditionModel` with attention over time and no temporal convolution."""

    temporal_convolution: ClassVar[bool] = False


class PixelSpace(AutoencoderKL):
    """An autoencoder that keeps pixels as they are, `(N, 3, H, W)` in [-1, 1]: it makes a latent model a
    pixel model."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (1,),
        scaling_factor: float = 1.0,
    ):
        ModelMixin.__init__(self)
        self.use_slicing = self.use_tiling = False
        # A module without parameters has no device and no dtype.
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode(self, x: Tensor, return_dict: bool = True):
        distribution = DiagonalGaussianDistribution(torch.cat([x, torch.full_like(x, -30.0)], dim=1))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None):
        return DecoderOutput(sample=z) if return_dict else (z,)
