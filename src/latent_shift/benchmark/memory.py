"""Peak memory: sampling long clips, one step at the size of Stable Diffusion 1.5, and its training."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from latent_shift.benchmark.timing import run_alone
from latent_shift.clip_text import share_text
from latent_shift.config import Config
from latent_shift.models import sizes
from latent_shift.pipelines import loading, single_file
from latent_shift.runtime import peak_memory_gib, seed
from latent_shift.shift import Shift, frames, inflate
from latent_shift.training import memory


def long_clips(
    model: str = "emoji", *, num_frames: tuple[int, ...] = (16, 64, 256, 1024)
) -> list[dict[str, Any]]:
    """Measure two sampling steps of clips of several lengths on the CPU, each in a process of its own.

    Args:
        model: as in `loading.load`.
        num_frames: lengths of the clips.

    Returns:
        For each length and mode ("whole", at most 256 frames; "chunks" of 16 frames with a halo of 4;
        "stream" with decoded frames) the seconds and the peak memory in GiB.
    """
    runs = [
        (mode, number)
        for mode in ("whole", "chunks", "stream")
        for number in num_frames
        if mode != "whole" or number <= 256
    ]
    return [run_alone(_long_clip, model, mode, number) for mode, number in runs]


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
    return {
        "mode": mode,
        "frames": num_frames,
        "seconds": time.perf_counter() - start,
        "gib_peak": peak_memory_gib(),
    }


def full_size_step(*, num_frames: int = 16) -> dict[str, Any]:
    """Measure one CPU step of Stable Diffusion 1.5's size, random weights and 32x32 latents, in a process of
    its own."""
    return run_alone(_full_size_step, num_frames)


def _full_size_step(num_frames: int) -> dict[str, Any]:
    unet = inflate(UNet2DConditionModel(**single_file.FAMILIES["sd1"].unet).eval())
    share_text(unet)
    x, text = torch.randn(num_frames, 4, 32, 32), torch.randn(1, 77, 768)
    before = peak_memory_gib()
    with torch.no_grad(), frames(unet, num_frames):
        start = time.perf_counter()
        unet(x, 500, text)
        seconds = time.perf_counter() - start
    return {
        "parameters": sizes.num_parameters(unet),
        "seconds": seconds,
        "gib_before": before,
        "gib_peak": peak_memory_gib(),
    }


def training_memory() -> dict[str, dict[str, float]]:
    """Estimate the memory of a step of recipes/finetune-sd15.toml in GiB, by part.

    It covers training of every weight and of a LoRA, each with and without checkpointing. Nothing is
    allocated.
    """
    settings: dict[str, Any] = {
        "stage": "video", "data": {"path": "", "batch_size": 1, "num_frames": 16}, "model": {"init": "", "edge": "hold"},
        "optim": {"steps": 1000, "lr": 1e-5, "optimizer": "adamw8bit", "accumulate": 8},
    }  # fmt: skip
    results = {}
    for lora, checkpointing in itertools.product((None, {"rank": 32}), (True, False)):
        config = Config.model_validate(
            {**settings, "lora": lora, "train": {"gradient_checkpointing": checkpointing}}
        )
        with torch.device("meta"):
            unet = UNet2DConditionModel(**single_file.FAMILIES["sd1"].unet)
        estimate = memory.estimate(config, unet, latents=(4, 64, 64), text_length=77)
        name = ("LoRA of rank 32" if lora else "every weight") + (", checkpointing" if checkpointing else "")
        results[name] = {
            part: getattr(estimate, part) / 2**30
            for part in ("weights", "optimizer", "averaged", "step", "total")
        }
    return results
