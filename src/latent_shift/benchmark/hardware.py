"""The machine that numbers are measured on: its description, and the rate of its matrix products."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch


def machine(device: str = "cpu") -> dict[str, object]:
    """Return what a result says of the machine, the versions and the date."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = f"{names[0]} ({processor})" if names else processor
    return {
        "processor": processor, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch": torch.__version__, "diffusers": diffusers.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def matrix_rate(device: str | torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of products of large matrices, the upper limit of a step; on a GPU in TF32 if
    convolutions use it.

    Args:
        device, dtype: of the matrices.
        seconds: length of the measurement; sizes and repetitions grow until it is reached.
    """
    gpu = torch.device(device).type == "cuda"
    tf32_before = torch.backends.cuda.matmul.allow_tf32
    side, max_side, num = (2048, 8192, 1) if gpu else (128, 2048, 1)
    try:
        if gpu:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        while True:
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            elapsed = _seconds(lambda: a @ b, num, gpu)  # noqa: B023
            if elapsed >= seconds:
                return num * 2 * side**3 / elapsed
            if side < max_side and elapsed < seconds / 16:  # the next size takes eight times as long
                side *= 2
            else:
                num = int(num * 1.2 * seconds / elapsed) + 1
    finally:
        if gpu:
            torch.backends.cuda.matmul.allow_tf32 = tf32_before


def _seconds(call: Callable[[], object], num: int, gpu: bool) -> float:
    """Return the time of `num` calls after a first one."""
    start = 0.0
    for turn in range(num + 1):
        call()
        if turn == 0:
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
