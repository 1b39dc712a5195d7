"""Latent-VDM, the baseline of the paper: the same image U-Net, made to see time by layers with parameters instead of by a shift.

After the convolutions of each ResNet block a convolution along time (Singer et al. 2022, pseudo-3D), after each spatial transformer an
attention along time with relative positions (Ho et al. 2022, Video Diffusion Models). Both end in zeros: to begin with the network is
the image network. Images are clips of one frame: attention is masked to the frame itself, convolution sees the frame alone.

B clips, F frames, C channels, H W, N = B*F, P = B*H*W, heads h of d channels.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from torch import Tensor, nn

from latent_shift.shift import Shift, inflate


class TemporalConv(nn.Conv1d):
    """A convolution over three successive frames of each pixel, added to what it is given; zero to begin with."""

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
    """Attention of each pixel over its clip's frames, added to what it is given; zero to begin with.

    Positions are relative: a learned bias for each head and distance, that of `furthest` for all beyond, so any number of frames fits.
    """

    def __init__(self, num_channels: int, num_heads: int, furthest: int = 32):
        super().__init__()
        self.num_heads, self.furthest = num_heads, furthest
        self.norm = nn.LayerNorm(num_channels)
        self.to_qkv = nn.Linear(num_channels, 3 * num_channels, bias=False)
        self.to_out = nn.Linear(num_channels, num_channels)
        self.bias = nn.Parameter(torch.zeros(num_heads, 2 * furthest + 1))
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x_NCHW: Tensor, num_frames: int = 1) -> Tensor:
        x_BFCHW = x_NCHW.unflatten(0, (-1, num_frames))
        x_PFC = x_BFCHW.permute(0, 3, 4, 1, 2).flatten(0, 2)
        q_PhFd, k_PhFd, v_PhFd = self.to_qkv(self.norm(x_PFC)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        frame = torch.arange(num_frames, device=x_NCHW.device)
        apart_FF = (frame[:, None] - frame).clamp(-self.furthest, self.furthest) + self.furthest
        y_PhFd = F.scaled_dot_product_attention(q_PhFd, k_PhFd, v_PhFd, attn_mask=self.bias[:, apart_FF].to(q_PhFd.dtype))
        y_PFC = self.to_out(y_PhFd.transpose(1, 2).flatten(2))
        y_BHWFC = y_PFC.unflatten(0, (x_BFCHW.shape[0], *x_BFCHW.shape[-2:]))
        return x_NCHW + y_BHWFC.permute(0, 3, 4, 1, 2).flatten(0, 1)


class _ThenConv(ResnetBlock2D):
    def forward(self, *args, **options) -> Tensor:
        return self.over_time(super().forward(*args, **options), self.clip.num_frames)


class _ThenAttention(Transformer2DModel):
    def forward(self, *args, return_dict: bool = True, **options):
        (y_NCHW,) = super().forward(*args, return_dict=False, **options)
        y_NCHW = self.over_time(y_NCHW, self.clip.num_frames)
        return Transformer2DModelOutput(sample=y_NCHW) if return_dict else (y_NCHW,)


class LatentVDMUNet(UNet2DConditionModel):
    """A `UNet2DConditionModel` with layers in time. `frames(network, F)` says how many frames make a clip, as for a shifted one;
    what a shift alone can do (loops, exact chunks, streams) is refused."""

    convolves = True  # in time, after each ResNet block

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        inflate(self, Shift(0, 0))  # nothing moves: it only tells how many frames there are
        clip = self.__dict__["_latent_shift_clip"]
        for module in list(self.modules()):
            if isinstance(module, ResnetBlock2D) and self.convolves:
                module.over_time = TemporalConv(module.out_channels)
                module.__class__ = _ThenConv
            elif isinstance(module, Transformer2DModel):
                module.over_time = TemporalAttention(module.inner_dim, module.config.num_attention_heads)
                module.__class__ = _ThenAttention
            else:
                continue
            module.__dict__["clip"] = clip
        self.unbounded_in_time = True

    @classmethod
    def of(cls, image: UNet2DConditionModel) -> LatentVDMUNet:
        """With the weights of an image U-Net, whose images it makes to begin with."""
        network = cls.from_config(image.config)
        network.load_state_dict(image.state_dict(), strict=False)
        return network
