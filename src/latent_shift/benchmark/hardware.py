from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch


def matrix_rate(device: str | torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP/s that products of large matrices reach here, the most that a step can: on a GPU in TF32 where convolutions are."""
    gpu = torch.device(device).type == "cuda"
    side, largest, num, before = (2048, 8192, 1, torch.backends.cuda.matmul.allow_tf32) if gpu else (128, 2048, 1, False)
    try:
        if gpu:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        while True:
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            took = _seconds(lambda: a @ b, num, gpu)  # noqa: B023
            if took >= seconds:
                return num * 2 * side**3 / took
            if side < largest and took < seconds / 16:  # the next size takes eight times as long
                side *= 2
            else:
                num = int(num * 1.2 * seconds / took) + 1
    finally:
        if gpu:
            torch.backends.cuda.matmul.allow_tf32 = before


def _seconds(call: Callable[[], object], num: int, gpu: bool) -> float:
    """What so many calls take after a first one."""
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
