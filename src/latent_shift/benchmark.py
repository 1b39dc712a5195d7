"""Timings that can be compared: alternating rounds in one process after a warm-up, medians, and paired ratios."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from latent_shift import models
from latent_shift.shift import Shift, deflate, frames, inflate, share_text, shift_of


def paired(calls: dict[str, Callable[[], object]], *, rounds: int = 10, warm_up: int = 2) -> dict[str, dict[str, float]]:
    """Time each call once a round, in turn, forwards and backwards.

    Returns:
        For each name the median seconds, and the median over rounds of its time relative to the first name's in that round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            start = time.perf_counter()
            calls[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    first = np.array(times[next(iter(calls))])
    return {name: {"seconds": float(np.median(t)), "ratio": float(np.median(np.array(t) / first))} for name, t in times.items()}


def machine(device: str = "cpu") -> dict[str, object]:
    """What the numbers on `device` were taken on."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = f"{names[0]} ({processor})" if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def command_seconds(*, rounds: int = 3, device: str = "cpu") -> dict[str, float]:
    """Median seconds of whole commands, each in a process of its own: the help page, and words to an mp4 with the embedded model."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for words in (["--help"], ["generate", "a red heart", "--device", device, "-o", f"{folder}/clip.mp4"]):
            times = []
            for _ in range(rounds):
                start = time.perf_counter()
                subprocess.run([sys.executable, "-m", "latent_shift", *words], check=True, capture_output=True)
                times.append(time.perf_counter() - start)
            seconds[f"latent-shift {words[0]}"] = float(np.median(times))
    return seconds


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
    unet = unet or UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=128, attention_head_dim=(2, 4, 8, 8)
    )
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
        "parameters": models.num_parameters(plain),
        "num_frames": num_frames,
        "latents": side,
        "text_length": text_length,
        "rounds": rounds,
        **results,
    }
