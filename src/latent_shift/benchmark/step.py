"""The time of one denoising step: what the shift adds, how other U-Nets compare, and what the pipeline
saves."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel

from latent_shift.benchmark.networks import SMALL, timed_networks
from latent_shift.benchmark.timing import time_in_rounds
from latent_shift.clip_text import share_text
from latent_shift.models import sizes
from latent_shift.shift import Shift, deflate, frames, inflate, shift_of


def shift_overhead(
    *,
    num_frames: int = 16,
    size: int | None = None,
    text_length: int = 77,
    rounds: int = 10,
    device: str = "cpu",
    unet: UNet2DConditionModel | None = None,
) -> dict:
    """Time one denoising step frame by frame, with the shift, and with the shift as the pipeline runs it.

    Args:
        num_frames: frames a clip.
        size: side of the latents. None: that of the U-Net's training.
        text_length: tokens of the prompt.
        rounds: counted rounds.
        device: "cpu" or "cuda".
        unet: U-Net to time with its own shift, if it has one; it is not changed. None: one of 34 M
            parameters with 32x32 latents.

    Returns:
        The sizes, and for each of the three ways what `time_in_rounds` returns.
    """
    unet = unet or SMALL.image_unet()
    side = size or unet.config.sample_size
    if not isinstance(side, int):
        raise ValueError(f"expected size (--size): the U-Net has a sample_size of {side}, not one number")
    plain = deflate(copy.deepcopy(unet)).to(device).eval()
    shifted = inflate(copy.deepcopy(plain), shift_of(unet) or Shift())
    sharing = copy.deepcopy(shifted)
    share_text(sharing)
    dtype = next(plain.parameters()).dtype
    x = torch.randn(num_frames, unet.config.in_channels, side, side, device=device, dtype=dtype)
    text = torch.randn(num_frames, text_length, unet.config.cross_attention_dim, device=device, dtype=dtype)
    calls = {
        "frame by frame": lambda: plain(x, 500, text),
        "with the shift": lambda: _predict(shifted, x, text, num_frames),
        "with the shift, one text a clip as the pipeline has it": lambda: _predict(
            sharing, x, text[:1], num_frames
        ),
    }
    with torch.no_grad():
        results = time_in_rounds(calls, rounds=rounds)
    return {
        "parameters": sizes.num_parameters(plain), "num_frames": num_frames, "latents": side, "text_length": text_length,
        "rounds": rounds, **results,
    }  # fmt: skip


def against_peers(
    *,
    num_frames: int = 16,
    rounds: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compiled: bool = False,
    text_length: int = 77,
) -> dict:
    """Time one denoising step of all `timed_networks` on a clip of 32x32 latents.

    Returns:
        For each network `parameters` and what `time_in_rounds` returns; ratios are to Latent-Shift.
    """
    networks = timed_networks(
        text_length=text_length, device=device, dtype=dtype, channels_last=channels_last, compiled=compiled
    )
    with torch.no_grad():
        results = time_in_rounds(
            {name: network.call(1, num_frames, 32) for name, network in networks.items()}, rounds=rounds
        )
    return {
        name: {"parameters": sizes.num_parameters(networks[name].network), **result}
        for name, result in results.items()
    }


def savings(*, num_frames: int = 16, text_length: int = 77, rounds: int = 10, device: str = "cpu") -> dict:
    """Time a guided step as the pipeline runs it, with keys and values for each frame, and in two calls."""
    torch.manual_seed(0)
    per_frame = inflate(SMALL.image_unet().to(device).eval())
    sharing = copy.deepcopy(per_frame)
    share_text(sharing)
    x = torch.randn(num_frames, 4, 32, 32, device=device).repeat(2, 1, 1, 1)
    text = torch.randn(2, text_length, SMALL.widths["cross_attention_dim"], device=device)
    calls = {
        "as the pipeline runs it": lambda: _predict(sharing, x, text, num_frames),
        "keys and values for each frame": lambda: _predict(
            per_frame, x, text.repeat_interleave(num_frames, dim=0), num_frames
        ),
        "guidance in two calls": lambda: [
            _predict(sharing, x[:num_frames], text[row : row + 1], num_frames) for row in (0, 1)
        ],
    }
    with torch.no_grad():
        return time_in_rounds(calls, rounds=rounds)


def _predict(unet: UNet2DConditionModel, x: torch.Tensor, text: torch.Tensor, num_frames: int):
    with frames(unet, num_frames):
        return unet(x, 500, text)
