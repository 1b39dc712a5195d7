"""Timings that can be compared: alternating rounds in one process after a warm-up, medians, and paired ratios."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from latent_shift.benchmark.networks import SMALL, contenders
from latent_shift.benchmark.timing import alone, paired
from latent_shift.models import sizes
from latent_shift.pipelines import loading, single_file
from latent_shift.runtime import peak_memory_gib, seed
from latent_shift.shift import Shift, deflate, frames, inflate, share_text, shift_of


def shift_overhead(
    *, num_frames: int = 16, size: int | None = None, text_length: int = 77, rounds: int = 10, device: str = "cpu",
    unet: UNet2DConditionModel | None = None,
) -> dict:  # fmt: skip
    """One denoising step of a U-Net on the same inputs: frame by frame, with the shift, and with the shift as the pipeline runs it.

    Args:
        num_frames: frames a clip.
        size: side of the latents; None: what the U-Net was trained at.
        text_length: tokens of the text.
        rounds: counted rounds.
        device: "cpu" or "cuda".
        unet: not changed. If it is inflated its own shift is timed. None takes one of widths 64/128/256/256, two layers a block (34 M
            parameters), at 32.
    """
    unet = unet or SMALL.image_unet()
    side = size or int(unet.config.sample_size)
    plain = deflate(copy.deepcopy(unet)).to(device).eval()
    shifted = inflate(copy.deepcopy(plain), shift_of(unet) or Shift())
    dtype = next(plain.parameters()).dtype
    x = torch.randn(num_frames, unet.config.in_channels, side, side, device=device, dtype=dtype)
    text = torch.randn(num_frames, text_length, unet.config.cross_attention_dim, device=device, dtype=dtype)

    sharing = copy.deepcopy(shifted)
    share_text(sharing)

    def as_clip(network: UNet2DConditionModel, text: torch.Tensor) -> None:
        with frames(network, num_frames):
            network(x, 500, text)

    calls = {
        "frame by frame": lambda: plain(x, 500, text),
        "with the shift": lambda: as_clip(shifted, text),
        "with the shift, one text a clip as the pipeline has it": lambda: as_clip(sharing, text[:1]),
    }
    with torch.no_grad():
        results = paired(calls, rounds=rounds)
    return {
        "parameters": sizes.num_parameters(plain), "num_frames": num_frames, "latents": side, "text_length": text_length,
        "rounds": rounds, **results,
    }  # fmt: skip


def against_peers(
    *, num_frames: int = 16, rounds: int = 5, device: str = "cpu", dtype: torch.dtype = torch.float32, channels_last: bool = False,
    compiled: bool = False, text_length: int = 77,
) -> dict:  # fmt: skip
    """One denoising step of all `contenders` on a clip of 32x32 latents, in turn: `parameters`, `seconds`, and `ratio`, the time relative
    to Latent-Shift's."""
    found = contenders(text_length=text_length, device=device, dtype=dtype, channels_last=channels_last, compiled=compiled)
    with torch.no_grad():
        results = paired({name: each.call(1, num_frames, 32) for name, each in found.items()}, rounds=rounds)
    return {name: {"parameters": sizes.num_parameters(found[name].network), **result} for name, result in results.items()}


def savings(*, num_frames: int = 16, text_length: int = 77, rounds: int = 10, device: str = "cpu") -> dict:
    """A guided step of the 34 M U-Net as the pipeline runs it, against one with the text for each frame, and one in two calls."""
    torch.manual_seed(0)
    each = inflate(SMALL.image_unet().to(device).eval())
    once = copy.deepcopy(each)
    share_text(once)
    x = torch.randn(num_frames, 4, 32, 32, device=device).repeat(2, 1, 1, 1)
    text = torch.randn(2, text_length, SMALL.widths["cross_attention_dim"], device=device)

    def call(network: UNet2DConditionModel, x: torch.Tensor, text: torch.Tensor) -> object:
        with frames(network, num_frames):
            return network(x, 500, text)

    with torch.no_grad():
        return paired(
            {
                "as the pipeline runs it": lambda: call(once, x, text),
                "keys and values for each frame": lambda: call(each, x, text.repeat_interleave(num_frames, dim=0)),
                "guidance in two calls": lambda: [call(once, x[:num_frames], text[row : row + 1]) for row in (0, 1)],
            },
            rounds=rounds,
        )


def full_size(*, num_frames: int = 16) -> dict[str, Any]:
    """One step at the size of Stable Diffusion 1.5 with random weights, 32x32 latents, on the CPU, in a process of its own."""
    return alone(_full_size, num_frames)


def long_clips(model: str = "emoji", *, num_frames: tuple[int, ...] = (16, 64, 256, 1024)) -> list[dict[str, Any]]:
    """Peak memory of two steps of clips of many lengths on the CPU: whole (up to 256 frames), in chunks of 16 with a halo of 4, and as
    a stream whose frames are decoded. Each in a process of its own."""
    runs = [(mode, number) for mode in ("whole", "chunks", "stream") for number in num_frames if mode != "whole" or number <= 256]
    return [alone(_long_clip, model, mode, number) for mode, number in runs]


def _full_size(num_frames: int) -> dict[str, Any]:
    unet = inflate(UNet2DConditionModel(**single_file.FAMILIES["sd1"].unet).eval())
    share_text(unet)
    x, text = torch.randn(num_frames, 4, 32, 32), torch.randn(1, 77, 768)
    before = peak_memory_gib()
    with torch.no_grad(), frames(unet, num_frames):
        start = time.perf_counter()
        unet(x, 500, text)
        seconds = time.perf_counter() - start
    return {"parameters": sizes.num_parameters(unet), "seconds": seconds, "gib_before": before, "gib_peak": peak_memory_gib()}


def _long_clip(model: str, mode: str, num_frames: int) -> dict[str, Any]:
    pipe = loading.load(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_frames": num_frames, "num_inference_steps": 2, "generator": seed(0)}
    if mode == "chunks":
        options |= {"chunk": 16, "halo": 4}
    start = time.perf_counter()
    if mode == "stream":
        inflate(pipe.unet, Shift(backward=0, edge="hold"))
        for _ in pipe.stream("fire", **options):
            pass
    else:
        pipe("fire", output_type="latent", **options)
    return {"mode": mode, "frames": num_frames, "seconds": time.perf_counter() - start, "gib_peak": peak_memory_gib()}
