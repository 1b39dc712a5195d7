"""Group norm, SiLU and the shift as one operation on a GPU, in Triton: the shift then costs no pass over memory and no launch of its own.

For sampling; training and CPUs keep the form of shift.py, which is the reference.

Shapes: N images, the F frames of each clip adjacent; C channels in G groups; H x W.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from latent_shift.shift import ShiftGroupNorm
from latent_shift.shift_kernels import channel_offsets
from latent_shift.shift_settings import Edge, Groups, intern_groups

try:
    import triton
    import triton.language as tl
except ImportError:  # there are no wheels for macOS, and CPUs need none
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, with numpy on CPU tensors; read when this file is imported, as Triton does."""
_EDGES = {"zero": 0, "wrap": 1, "hold": 2}

if triton is not None:

    @triton.jit
    def _statistics_kernel(x, mean, rstd, size, eps, BLOCK: tl.constexpr):
        """Mean and inverse deviation of a group, whose `size` numbers are adjacent."""
        group = tl.program_id(0).to(tl.int64)
        offsets = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            inside = start + offsets < size
            total += tl.load(x + group * size + start + offsets, inside, other=0.0).to(tl.float32)
        average = tl.sum(total) / size
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            inside = start + offsets < size
            value = tl.load(x + group * size + start + offsets, inside, other=0.0).to(tl.float32)
            deviation = tl.where(inside, value - average, 0.0)
            total += deviation * deviation
        tl.store(mean + group, average)
        tl.store(rstd + group, 1 / tl.sqrt(tl.sum(total) / size + eps))

    @triton.jit
    def _apply_kernel(
        x, y, mean, rstd, weight, bias, sources, counts, channels, pixels, channels_per_group, frames, most, EDGE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One channel of one image: the mean of its norm at `counts` sources, which are offsets in frames; then SiLU."""
        image = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1)
        frame = image % frames
        count = tl.load(counts + channel)
        scale_of_channel = tl.load(weight + channel).to(tl.float32)
        bias_of_channel = tl.load(bias + channel).to(tl.float32)
        offsets = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < pixels
        total = tl.zeros([BLOCK], tl.float32)
        for number in range(count):
            source = frame + tl.load(sources + channel * most + number)
            exists = (source >= 0) & (source < frames)
            if EDGE == 1:
                source = (source % frames + frames) % frames
            else:
                source = tl.minimum(tl.maximum(source, 0), frames - 1)
            image_from = image - frame + source
            group = image_from * (channels // channels_per_group) + channel // channels_per_group
            scale = tl.load(rstd + group) * scale_of_channel
            offset = bias_of_channel - tl.load(mean + group) * scale
            value = tl.load(x + (image_from * channels + channel) * pixels + offsets, inside, other=0.0).to(
                tl.float32
            )
            value = value * scale + offset
            if EDGE == 0:
                value = tl.where(exists, value, 0.0)
            total += value
        total /= count
        tl.store(
            y + (image * channels + channel) * pixels + offsets,
            (total / (1 + tl.exp(-total))).to(y.dtype.element_ty),
            inside,
        )


def norm_silu_shift(
    x_NCHW: Tensor, norm: nn.GroupNorm, num_frames: int, groups: Groups, edge: Edge = "zero"
) -> Tensor:
    """Return `silu` of the shift of `norm(x)`.

    Args:
        x_NCHW: contiguous.
        norm: group norm with weight and bias.
        num_frames: F, a divisor of N.
        groups: of the channels, with their offsets (`Shift.groups`).
        edge: as in `Shift`.

    Raises:
        ValueError: `num_frames` does not divide the batch, or the tensor is not contiguous.
    """
    num, channels, height, width = x_NCHW.shape
    if num % num_frames:
        raise ValueError(f"num_frames={num_frames} does not divide the batch of {num} frames")
    if not x_NCHW.is_contiguous():
        raise ValueError("expected a contiguous tensor, not one with channels last")
    pixels, num_groups = height * width, norm.num_groups
    sources_CK, counts_C = channel_offsets(groups, x_NCHW.device)
    y_NCHW = torch.empty_like(x_NCHW)
    mean, rstd = torch.empty(2, num * num_groups, dtype=torch.float32, device=x_NCHW.device)
    size = channels // num_groups * pixels
    with torch.cuda.device_of(x_NCHW):  # no effect on a CPU
        _statistics_kernel[(num * num_groups,)](
            x_NCHW, mean, rstd, size, norm.eps, BLOCK=min(4096, triton.next_power_of_2(size))
        )
        block = min(1024, triton.next_power_of_2(pixels))
        _apply_kernel[(num, channels, triton.cdiv(pixels, block))](
            x_NCHW, y_NCHW, mean, rstd, norm.weight, norm.bias, sources_CK, counts_C, channels, pixels, channels // num_groups,
            num_frames, sources_CK.shape[1], EDGE=_EDGES[edge], BLOCK=block,
        )  # fmt: skip
    return y_NCHW


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block whose norms run by `norm_silu_shift` where they can; parameter names do not change."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._applies(input_tensor):
            output: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return output
        hidden = self.conv1(_run(self.norm1, input_tensor))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(
            _run(self.norm2, hidden.contiguous())
        )  # weights with channels last give such outputs
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + hidden) / self.output_scale_factor

    def _applies(self, x_NCHW: Tensor) -> bool:
        states = [norm.shift_state for norm in (self.norm1, self.norm2) if isinstance(norm, ShiftGroupNorm)]
        return (
            (x_NCHW.is_cuda or INTERPRETED)
            and x_NCHW.is_contiguous()
            and not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling())
            and not torch.is_autocast_enabled(x_NCHW.device.type)
            and all(state.memory is None and state.neighbors is None for state in states)
        )


def _run(norm: nn.GroupNorm, x_NCHW: Tensor) -> Tensor:
    if isinstance(norm, ShiftGroupNorm) and norm.shift_state.num_frames > 1:
        state = norm.shift_state
        return norm_silu_shift(x_NCHW, norm, state.num_frames, norm.shift_groups, state.edge)
    return norm_silu_shift(x_NCHW, norm, 1, intern_groups(((0, norm.num_channels, (0,)),)))


def fuse_norms(network: nn.Module) -> nn.Module:
    """Let the residual blocks of a network run group norm, SiLU and shift as one operation on a GPU, in place. Its parameters,
    and what it computes elsewhere, stay the same; results differ by rounding.

    Args:
        network: an inflated U-Net.

    Returns:
        `network`.

    Raises:
        RuntimeError: Triton is not installed.
        ValueError: no block of the network can be fused: they change the resolution, scale by the timestep or have no SiLU.
    """
    if triton is None:
        raise RuntimeError("fuse_norms needs Triton, which comes with PyTorch for CUDA on Linux")
    num = 0
    for block in network.modules():
        if type(block) is ResnetBlock2D and _can_fuse(block):
            block.__class__ = FusedResnetBlock2D
        num += isinstance(block, FusedResnetBlock2D)
    if not num:
        raise ValueError(f"{type(network).__name__}: no residual block can be fused")
    return network


def _can_fuse(block: ResnetBlock2D) -> bool:
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
        and all(isinstance(norm, nn.GroupNorm) and norm.affine for norm in (block.norm1, block.norm2))
    )
