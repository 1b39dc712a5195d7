"""One denoising step of all `timed_networks` against frames, size of the latents and clips at once: time,
work, memory and how close it comes to the machine's limits. Also whole clips, from prompt to frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from latent_shift.benchmark.networks import NETWORKS, TimedNetwork, timed_networks
from latent_shift.benchmark.roofline import Work, limits
from latent_shift.benchmark.timing import run_alone, time_in_rounds
from latent_shift.files import markdown_table
from latent_shift.models import sizes
from latent_shift.pipelines import loading
from latent_shift.runtime import peak_memory_gib, seed

FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Load(NamedTuple):
    """The input of a step: clips at once, frames a clip, and side of the latents."""

    clips: int
    frames: int
    side: int


def sweep(
    *,
    num_frames: Sequence[int] = FRAMES,
    sides: Sequence[int] = (8, 16, 32, 64),
    clips: Sequence[int] = (1, 2, 4),
    side: int = 16,
    full: bool = False,
    rounds: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Time every network along three lines: frames of one clip, size of the latents, and clips at once.

    Args:
        num_frames: frames of one clip, with latents of `side`.
        sides: sides of the latents, of one clip of 16 frames.
        clips: clips of 16 frames at once, with latents of `side`.
        side: of the latents along the other two lines.
        full: widths of Stable Diffusion 1.5 instead of the small ones.
        rounds: counted rounds, in each of which every network is timed once.
        device, dtype: of the networks.

    Returns:
        `limits` of the machine, and `points`, one for each network and load of a line: seconds, ratio to
        Latent-Shift, multiplications and additions, bytes, fractions of the machine's rate and of its
        roofline, on a GPU peak memory (for a CPU see `memory_of_steps`); or `cannot`, why the network does
        not take the load.
    """
    machine = limits(device, dtype)
    lines: dict[Load, list[str]] = {}  # a load on several lines is timed once
    for number in num_frames:
        lines.setdefault(Load(1, number, side), []).append("frames")
    for number in sides:
        lines.setdefault(Load(1, 16, number), []).append("side")
    for number in clips:
        lines.setdefault(Load(number, 16, side), []).append("clips")
    networks, points = timed_networks(full=full, device=device, dtype=dtype), list[dict[str, Any]]()
    for load, names in lines.items():
        numbers = _time_load(load, networks, machine, rounds, device)
        for line in names:
            points += [
                {"line": line, **load._asdict(), "name": name, **values} for name, values in numbers.items()
            ]
    return {
        "limits": machine,
        "full": full,
        "rounds": rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "points": points,
    }


def _time_load(
    load: Load, networks: dict[str, TimedNetwork], machine: dict[str, float], rounds: int, device: str
) -> dict[str, dict[str, Any]]:
    """Return the numbers of every network for one load, those that do not take it first."""
    too_long = [
        name
        for name, network in networks.items()
        if network.max_frames is not None and load.frames > network.max_frames
    ]
    numbers: dict[str, dict[str, Any]] = {
        name: {"cannot": f"at most {networks[name].max_frames} frames"} for name in too_long
    }
    calls = {name: network.call(*load) for name, network in networks.items() if name not in too_long}
    works, peaks = {}, {}
    with torch.no_grad():
        for name, call in calls.items():
            works[name] = Work(machine)
            peaks[name] = _peak_gib(call, networks[name].network, works[name], device)
        times = time_in_rounds(calls, rounds=rounds, warm_up=1)
    for name, timing in times.items():
        work, seconds = works[name], timing["seconds"]
        numbers[name] = {
            "parameters": sizes.num_parameters(networks[name].network), **timing, "flops": work.flops, "bytes": work.bytes,
            "share_of_the_matrix_rate": work.flops / seconds / machine["flops_per_s"],
            "share_of_the_roofline": work.seconds / seconds, "frames_per_s": load.clips * load.frames / seconds,
            "gib_peak": peaks[name],
        }  # fmt: skip
    return numbers


def _peak_gib(call, network: torch.nn.Module, work: Work, device: str) -> float | None:
    """Run a call under `work`; return on a GPU the peak memory of its network alone, weights included."""
    on_gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with work:
        call()
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return peak_memory_gib(device) + (weights - before) / 2**30 if on_gpu else None


def memory_of_steps(
    num_frames: Sequence[int] = FRAMES,
    *,
    side: int = 16,
    full: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Measure the memory of a CPU step of every network in GiB, before it and at its peak, each in a process
    of its own."""
    return [
        run_alone(_memory_of_step, name, number, side, full, dtype)
        for name in NETWORKS
        for number in num_frames
    ]


def _memory_of_step(name: str, num_frames: int, side: int, full: bool, dtype: torch.dtype) -> dict[str, Any]:
    timed = timed_networks(full=full, only=name, dtype=dtype)[name]
    row = {"name": name, "frames": num_frames, "side": side}
    if timed.max_frames is not None and num_frames > timed.max_frames:
        return {**row, "cannot": f"at most {timed.max_frames} frames"}
    call = timed.call(1, num_frames, side)
    before = peak_memory_gib()
    with torch.no_grad():
        call()
    return {**row, "gib_before": before, "gib_peak": peak_memory_gib()}


def whole_clips(
    model: str = "emoji",
    *,
    num_frames: Sequence[int] = (8, 16, 32),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """Time whole clips with the model's own settings, decoding included, one at a time and four at once."""
    pipe = loading.load(model, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for number in num_frames:
        one, four = (
            (lambda prompts=prompts: pipe(prompts, num_frames=number, generator=seed(0)))  # noqa: B023
            for prompts in ("fire", ["fire", "rocket", "red heart", "a dolphin"])
        )
        times = time_in_rounds({"one": one, "four": four}, rounds=rounds, warm_up=1)
        seconds, rate = times["one"]["seconds"], 4 / times["four"]["seconds"]
        rows.append({"model": model, "frames": number, "seconds_a_clip": seconds, "clips_per_s": rate})
    return rows


def table(points: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of seconds per step for each network; the ratio to Latent-Shift is in
    brackets."""
    loads: dict[str, dict[str, dict[str, Any]]] = {}
    for point in points:
        load = f"{point['clips']} x {point['frames']} frames, {point['side']}x{point['side']}"
        loads.setdefault(load, {})[point["name"]] = point
    names = list(dict.fromkeys(point["name"] for point in points))
    rows = []
    for load, by_name in loads.items():
        cells = (by_name[name] for name in names)
        rows.append(
            [
                load,
                *(
                    "" if "cannot" in cell else f"{cell['seconds']:.3g} s ({cell['ratio']:.2f})"
                    for cell in cells
                ),
            ]
        )
    return markdown_table(["a step of", *names], rows)


def table_of_clips(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of `whole_clips`."""
    head = ["prompt to clip", "seconds a clip", "clips a second, four at once"]
    cells = [
        [
            f"{row['model']}, {row['frames']} frames",
            f"{row['seconds_a_clip']:.3g}",
            f"{row['clips_per_s']:.3g}",
        ]
        for row in rows
    ]
    return markdown_table(head, cells)
