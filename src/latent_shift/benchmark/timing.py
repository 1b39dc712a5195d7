"""Comparable timings: alternating rounds in one process, medians and paired ratios; and processes of their
own."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from latent_shift.runtime import keep_freed_memory, quiet_libraries


def time_in_rounds(
    calls: dict[str, Callable[[], object]], *, rounds: int = 10, warm_up: int = 2
) -> dict[str, dict[str, float]]:
    """Time each call once a round, in turn, in alternating order.

    Other work on the machine falls on all calls alike, so ratios within a round are surer than times.

    Args:
        calls: name to a function without arguments.
        rounds: counted rounds.
        warm_up: rounds before them.

    Returns:
        For each name `seconds`, the median time, and `ratio`, `ratio_least` and `ratio_most`: median, least
        and greatest ratio to the first call's time of the same round.
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
    results = {}
    for name, seconds in times.items():
        ratios = np.array(seconds) / first
        results[name] = {
            "seconds": float(np.median(seconds)), "ratio": float(np.median(ratios)), "ratio_least": float(ratios.min()),
            "ratio_most": float(ratios.max()),
        }  # fmt: skip
    return results


def run_alone(call: Callable[..., Any], *args: Any) -> Any:
    """Return the result of `call` in a fresh process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_child) as pool:
        return pool.submit(call, *args).result()


def _prepare_child() -> None:
    """Set the allocator as in the process that started this one, and silence the libraries."""
    keep_freed_memory()
    quiet_libraries()


def command_seconds(model: str = "emoji", *, rounds: int = 3, device: str = "cpu") -> dict[str, float]:
    """Return the median seconds of whole commands, each in a process of its own: start-up, loading, sampling, encoding.

    A clip after one step and one after all steps show how much of the time is start-up.

    Args:
        model: `--model` of the commands that take one.
        rounds: runs of each command.
        device: `--device` of `generate`.
    """
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        generate = ["generate", "a red heart", "-m", model, "--device", device]
        commands = {
            "--help": ["--help"],
            "models": ["models"],
            f"models show {model}": ["models", "show", model],
            "generate --steps 1": [*generate, "--steps", "1", "-o", f"{folder}/one.mp4"],
            "generate": [*generate, "-o", f"{folder}/clip.mp4"],
        }
        for name, arguments in commands.items():
            times = []
            for _ in range(rounds):
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "latent_shift", *arguments], check=True, capture_output=True
                )
                times.append(time.perf_counter() - start)
            seconds[f"latent-shift {name}"] = float(np.median(times))
    return seconds
