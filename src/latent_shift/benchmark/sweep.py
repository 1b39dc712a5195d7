"""One denoising step against frames, size and batch, of all that can be asked: time, multiplications, memory, and how near the machine's
own limits it comes. What benchmark.py times at one size, over many.

A roofline has two sides: what the machine multiplies, and what it moves (Williams et al. 2009). Here it is drawn operation by operation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_shift.benchmark.hardware import matrix_rate
from latent_shift.benchmark.networks import MAKERS, contenders
from latent_shift.benchmark.timing import alone, paired
from latent_shift.files import markdown_table
from latent_shift.models import sizes
from latent_shift.pipelines import loading
from latent_shift.runtime import peak_memory_gib, seed
from latent_shift.training import memory

FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_OVERWRITES = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_}  # what they write over they do not read


def sweep(
    *, num_frames: Sequence[int] = FRAMES, sides: Sequence[int] = (8, 16, 32, 64), clips: Sequence[int] = (1, 2, 4), side: int = 16,
    full: bool = False, rounds: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Every one of contenders.py along three lines: frames of one clip, the size of the latents, and clips at once.

    Args:
        num_frames: of one clip, at latents of `side`.
        sides: of the latents, of one clip of 16 frames.
        clips: at once, of 16 frames, at `side`.
        side: of the latents along the other lines.
        full: U-Nets of the widths of Stable Diffusion 1.5.
        rounds: counted rounds; in each every contender is timed once, in turn.
        device, dtype: where and in what.

    Returns:
        `limits`, of the machine, and `points`: of each contender at each place seconds, the ratio to Latent-Shift's, multiplications and
        additions, bytes, the share of the machine's rate and of its roofline reached, and on a GPU the peak of memory (on a CPU see
        `memory_of_steps`). Where a contender cannot go, the reason.
    """
    told, on_gpu = limits(device, dtype), device.startswith("cuda")
    lines: dict[tuple[int, int, int], list[str]] = {}  # a place that lies on several lines is timed once
    for line, places in {
        "frames": [(1, n, side) for n in num_frames], "side": [(1, 16, n) for n in sides], "clips": [(n, 16, side) for n in clips]
    }.items():  # fmt: skip
        for place in places:
            lines.setdefault(place, []).append(line)
    networks, points = contenders(full=full, device=device, dtype=dtype), list[dict[str, Any]]()
    for place, on in lines.items():
        wheres = [{"line": line, "clips": place[0], "frames": place[1], "side": place[2]} for line in on]
        able = {name: each for name, each in networks.items() if each.most_frames is None or place[1] <= each.most_frames}
        points += [
            {**where, "name": name, "cannot": f"at most {networks[name].most_frames} frames"}
            for where in wheres for name in networks if name not in able
        ]  # fmt: skip
        calls = {name: each.call(*place) for name, each in able.items()}
        with torch.no_grad():
            works, peaks = {}, {}
            for name, call in calls.items():
                before = torch.cuda.memory_allocated(device) if on_gpu else 0
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(device)
                with Work(told) as works[name]:
                    call()
                # Of this contender alone: its weights, and what the call took beside all that lay there.
                own = sum(tensor.nbytes for tensor in networks[name].network.parameters())
                peaks[name] = peak_memory_gib(device) + (own - before) / 2**30 if on_gpu else None
            timed = paired(calls, rounds=rounds, warm_up=1)
        for name, found in timed.items():
            work = works[name]
            one = {
                "name": name, "parameters": sizes.num_parameters(networks[name].network), **found, "flops": work.flops,
                "bytes": work.bytes, "share_of_the_matrix_rate": work.flops / found["seconds"] / told["flops_per_s"],
                "share_of_the_roofline": work.seconds / found["seconds"], "frames_per_s": place[0] * place[1] / found["seconds"],
                "gib_peak": peaks[name],
            }  # fmt: skip
            points += [{**where, **one} for where in wheres]
    return {"limits": told, "full": full, "rounds": rounds, "dtype": str(dtype).removeprefix("torch."), "points": points}


class Work(TorchDispatchMode):
    """What a call multiplies and adds, what its operations read and write, and the least seconds of that: each operation takes as long as
    its multiplications at the machine's rate or its bytes at the machine's bandwidth, whichever is longer. What caches keep, or a
    compiler fuses, may be faster than that."""

    def __init__(self, limits: dict[str, float]):
        super().__init__()
        self.limits, self.flops, self.bytes, self.seconds = limits, 0, 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.is_view or func.name().startswith(("aten::empty", "aten::_unsafe_view")):  # which touch nothing
            return made
        counted = memory.FLOPS.get(func._overloadpacket)
        flops = counted(*args, **(kwargs or {}), out_val=made) if counted else 0
        read = args[1:] if func._overloadpacket in _OVERWRITES else args
        moved = sum(leaf.nbytes for leaf in tree_leaves((read, kwargs, made)) if isinstance(leaf, torch.Tensor))
        self.flops += flops
        self.bytes += moved
        self.seconds += max(flops / self.limits["flops_per_s"], moved / self.limits["bytes_per_s"])
        return made


def table(points: Sequence[dict[str, Any]]) -> str:
    """Markdown: seconds a step of each contender at each place, in brackets what it takes of Latent-Shift's, nothing where it
    cannot go."""
    places: dict[str, dict[str, dict[str, Any]]] = {}
    for point in points:
        where = f"{point['clips']} x {point['frames']} frames, {point['side']}x{point['side']}"
        places.setdefault(where, {})[point["name"]] = point
    names = list(dict.fromkeys(point["name"] for point in points))
    rows = []
    for where, found in places.items():
        cells = (found[name] for name in names)
        rows.append([where, *("" if "cannot" in each else f"{each['seconds']:.3g} s ({each['ratio']:.2f})" for each in cells)])
    return markdown_table(["a step of", *names], rows)


def table_of_clips(rows: Sequence[dict[str, Any]]) -> str:
    """What `whole_clips` found, as Markdown."""
    head = ["words to a clip", "seconds a clip", "clips a second, four at once"]
    cells = [[f"{each['model']}, {each['frames']} frames", f"{each['seconds_a_clip']:.3g}", f"{each['clips_per_s']:.3g}"] for each in rows]
    return markdown_table(head, cells)


def limits(device: str = "cpu", dtype: torch.dtype = torch.float32, *, seconds: float = 0.3) -> dict[str, float]:
    """What the machine multiplies, and what it copies: bytes read and written a second, of a gibibyte."""
    source = torch.ones(2**30 // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    num, start = 0, 0.0
    while num == 0 or time.perf_counter() - start < seconds:
        target.copy_(source)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        num += 1
        if num == 1:  # the first one finds the pages
            start = time.perf_counter()
    rate = 2 * (num - 1) * source.nbytes / (time.perf_counter() - start) if num > 1 else 0.0
    return {"flops_per_s": matrix_rate(device, dtype), "bytes_per_s": rate}


def memory_of_steps(
    num_frames: Sequence[int] = FRAMES, *, side: int = 16, full: bool = False, dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """On a CPU: what a process takes before a step of a contender, its weights among it, and at the step's peak, GiB, each alone."""
    return [alone(_memory_of_step, name, number, side, full, dtype) for name in MAKERS for number in num_frames]


def _memory_of_step(name: str, num_frames: int, side: int, full: bool, dtype: torch.dtype) -> dict[str, Any]:
    one = contenders(full=full, only=name, dtype=dtype)[name]
    where = {"name": name, "frames": num_frames, "side": side}
    if one.most_frames is not None and num_frames > one.most_frames:
        return {**where, "cannot": f"at most {one.most_frames} frames"}
    call = one.call(1, num_frames, side)
    before = peak_memory_gib()
    with torch.no_grad():
        call()
    return {**where, "gib_before": before, "gib_peak": peak_memory_gib()}


def whole_clips(
    model: str = "emoji", *, num_frames: Sequence[int] = (8, 16, 32), device: str = "cpu", dtype: torch.dtype = torch.float32, rounds: int = 3,
) -> list[dict[str, Any]]:  # fmt: skip
    """Words to frames with the model's own steps and guidance, decoding included: seconds a clip, and clips a second of four at once."""
    pipe = loading.load(model, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for number in num_frames:
        one, four = (
            (lambda prompts=prompts: pipe(prompts, num_frames=number, generator=seed(0)))  # noqa: B023
            for prompts in ("fire", ["fire", "rocket", "red heart", "a dolphin"])
        )
        timed = paired({"one": one, "four": four}, rounds=rounds, warm_up=1)
        rows.append(
            {"model": model, "frames": number, "seconds_a_clip": timed["one"]["seconds"], "clips_per_s": 4 / timed["four"]["seconds"]}
        )
    return rows
