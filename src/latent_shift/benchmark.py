"""Timings that can be compared: alternating rounds in one process after a warm-up, medians, and paired ratios."""

from __future__ import annotations

import copy
import itertools
import json
import math
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from latent_shift import families, finetune, memory, models, zoo
from latent_shift.config import Config, Model
from latent_shift.contenders import SMALL, contenders
from latent_shift.diffusion import DenoisingObjective, attention_kernel, noise_schedule
from latent_shift.shift import Shift, deflate, frames, inflate, share_text, shift_of
from latent_shift.terminal import quiet


def paired(calls: dict[str, Callable[[], object]], *, rounds: int = 10, warm_up: int = 2) -> dict[str, dict[str, float]]:
    """Time each call once a round, in turn, forwards and backwards.

    Returns:
        For each name the median seconds, and of its time relative to the first name's in the same round the median, the least and the
        most.
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
    found = {}
    for name, seconds in times.items():
        ratios = np.array(seconds) / first
        found[name] = {
            "seconds": float(np.median(seconds)), "ratio": float(np.median(ratios)), "ratio_least": float(ratios.min()),
            "ratio_most": float(ratios.max()),
        }  # fmt: skip
    return found


def machine(device: str = "cpu") -> dict[str, object]:
    """What the numbers on `device` were taken on."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = f"{names[0]} ({processor})" if names else processor
    return {
        "processor": processor, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch": torch.__version__, "diffusers": diffusers.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def command_seconds(model: str = "emoji", *, rounds: int = 3, device: str = "cpu") -> dict[str, float]:
    """Median seconds of whole commands, each in a process of its own: the help page, and words to an mp4."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for words in (["--help"], ["generate", "a red heart", "-m", model, "--device", device, "-o", f"{folder}/clip.mp4"]):
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
        "parameters": models.num_parameters(plain), "num_frames": num_frames, "latents": side, "text_length": text_length,
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
    return {name: {"parameters": models.num_parameters(found[name].network), **result} for name, result in results.items()}


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


def training_memory() -> dict[str, dict[str, float]]:
    """GiB that a step of recipes/finetune-sd15.toml takes (memory.py), whole and as a LoRA, with and without checkpointing."""
    settings: dict[str, Any] = {
        "stage": "video", "data": {"path": "", "batch_size": 1, "num_frames": 16}, "model": {"init": "", "edge": "hold"},
        "optim": {"steps": 1000, "lr": 1e-5, "optimizer": "adamw8bit", "accumulate": 8},
    }  # fmt: skip
    results = {}
    for lora, checkpointing in itertools.product((None, {"rank": 32}), (True, False)):
        config = Config.model_validate({**settings, "lora": lora, "train": {"gradient_checkpointing": checkpointing}})
        with torch.device("meta"):
            unet = UNet2DConditionModel(**families.FAMILIES["sd1"].unet)
        need = memory.estimate(config, unet, latents=(4, 64, 64), text_length=77)
        name = ("LoRA of rank 32" if lora else "every weight") + (", checkpointing" if checkpointing else "")
        results[name] = {part: getattr(need, part) / 2**30 for part in ("weights", "optimizer", "averaged", "step", "total")}
    return results


def full_size(*, num_frames: int = 16) -> dict[str, Any]:
    """One step at the size of Stable Diffusion 1.5 with random weights, 32x32 latents, on the CPU, in a process of its own."""
    return alone(_full_size, num_frames)


def long_clips(model: str = "emoji", *, num_frames: tuple[int, ...] = (16, 64, 256, 1024)) -> list[dict[str, Any]]:
    """Peak memory of two steps of clips of many lengths on the CPU: whole (up to 256 frames), in chunks of 16 with a halo of 4, and as
    a stream whose frames are decoded. Each in a process of its own."""
    runs = [(mode, number) for mode in ("whole", "chunks", "stream") for number in num_frames if mode != "whole" or number <= 256]
    return [alone(_long_clip, model, mode, number) for mode, number in runs]


def _full_size(num_frames: int) -> dict[str, Any]:
    unet = inflate(UNet2DConditionModel(**families.FAMILIES["sd1"].unet).eval())
    share_text(unet)
    x, text = torch.randn(num_frames, 4, 32, 32), torch.randn(1, 77, 768)
    before = memory.peak()
    with torch.no_grad(), frames(unet, num_frames):
        start = time.perf_counter()
        unet(x, 500, text)
        seconds = time.perf_counter() - start
    return {"parameters": models.num_parameters(unet), "seconds": seconds, "gib_before": before, "gib_peak": memory.peak()}


def _long_clip(model: str, mode: str, num_frames: int) -> dict[str, Any]:
    pipe = zoo.load(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_frames": num_frames, "num_inference_steps": 2, "generator": zoo.seed(0)}
    if mode == "chunks":
        options |= {"chunk": 16, "halo": 4}
    start = time.perf_counter()
    if mode == "stream":
        inflate(pipe.unet, Shift(backward=0, edge="hold"))
        for _ in pipe.stream("fire", **options):
            pass
    else:
        pipe("fire", output_type="latent", **options)
    return {"mode": mode, "frames": num_frames, "seconds": time.perf_counter() - start, "gib_peak": memory.peak()}


def runs(folders: list[Path]) -> list[dict[str, Any]]:
    """What training runs learnt, and what they took: of each the mean loss of its second half, the last validation loss, the median
    rate, the peak of memory, the parameters. Raises ValueError for a folder without a model."""
    rows = []
    for folder in folders:
        if not (folder / "model").exists():
            raise ValueError(f"{folder}: not the folder of a run that is done")
        stats = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
        weights = sorted((folder / "model").rglob("unet/*.safetensors")) or sorted((folder / "model").glob("*.safetensors"))
        with safe_open(weights[0], "pt") as file:
            parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (it is no dict)
        late = stats[len(stats) // 2 :]
        rows.append(
            {
                "run": str(folder),
                "steps": stats[-1]["step"],
                "parameters": parameters,
                "loss": float(np.mean([row["loss"] for row in late if row["loss"] is not None])),
                "val_loss": next((row["val_loss"] for row in reversed(stats) if "val_loss" in row), None),
                "clips_per_s": float(np.median([row["clips_per_s"] for row in stats])),
                "data_wait_share": sum(row["data_wait_s"] for row in stats) / stats[-1]["seconds"],
                "gib_peak": max(row["gib_peak"] for row in stats),
            }
        )
    return rows


def training_step(
    model: str = "emoji", *, clips: int = 4, num_frames: int = 16, rounds: int = 10, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """A step of the video stage, with the shift, with nothing, with Latent-VDM's attention along time, and with the shift compiled,
    against one of the image stage on as many single frames: forward, backward, in the precision that training takes here, in turn."""
    pipe = zoo.load(model, device=device, dtype=torch.float32)
    side, width = pipe.unet.config.sample_size, pipe.unet.config.cross_attention_dim
    plain = deflate(copy.deepcopy(pipe.unet))
    settings = [Model.model_validate({"init": model, "temporal": name}) for name in ("shift", "none", "attention")]
    networks: dict[str, Any] = {each.temporal: models.in_time(copy.deepcopy(plain), each).to(device) for each in settings}
    networks["shift, compiled"] = copy.deepcopy(networks["shift"])
    networks["shift, compiled"].compile(dynamic=False)
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    dtype = finetune.DTYPES[zoo.precision_of("auto", torch.device(device))]

    def step(unet: UNet2DConditionModel, num_clips: int, length: int) -> Callable[[], None]:
        latents, noise = (draw(num_clips, length, unet.config.in_channels, side, side) for _ in range(2))
        steps, texts = torch.full((num_clips,), 500, device=device), draw(num_clips, pipe.tokenizer.model_max_length, width)
        share_text(unet)
        objective = DenoisingObjective(unet, noise_schedule()).train()

        def run() -> None:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32), attention_kernel(device, noise=noise):
                objective(latents, noise, steps, texts)[0].backward()
            objective.zero_grad()

        return run

    calls: dict[str, Callable[[], object]] = {f"{clips * num_frames} images": step(networks["none"], clips * num_frames, 1)}
    calls |= {f"{clips} clips of {num_frames} frames, {name}": step(unet, clips, num_frames) for name, unet in networks.items()}
    return paired(calls, rounds=rounds)


def alone(call: Callable[..., Any], *args: Any) -> Any:
    """What `call` returns in a fresh process, whose peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        return pool.submit(call, *args).result()
