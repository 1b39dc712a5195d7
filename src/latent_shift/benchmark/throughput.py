"""What many clips cost, encoding them by several processes and their index, and what it costs to go on with a run. The numbers of
docs/scale.md and docs/training.md."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from latent_shift.benchmark.timing import alone
from latent_shift.data.encode import encode
from latent_shift.data.readers import Record
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store, StoreWriter
from latent_shift.pipelines import loading
from latent_shift.runtime import peak_memory_gib


def encoding(
    model: str = "emoji", *, workers: tuple[int, ...] = (1, 2), shards: int = 40, frames_a_shard: int = 128, size: int = 128,
    ray: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """How fast frames are encoded by some numbers of processes, or of workers of the Ray cluster at the address `ray`, while all are
    at work: over the second half of the shards."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        writer, rng = StoreWriter(Path(folder) / "pixels", shard_mb=frames_a_shard * size * size * 3 / 1e6), np.random.default_rng(0)
        for number in range(shards):
            writer.add(Record(f"{number}.mp4", ("noise",), "noise"), rng.integers(0, 256, (frames_a_shard, size, size, 3), np.uint8))
        writer.close(dtype="uint8", fps=8, size=size, source="noise")
        for num in workers:
            done: list[float] = []
            start = time.perf_counter()
            encode(
                Path(folder) / "pixels", Path(folder) / f"{num}", autoencoder=loading.folder(model), texts=loading.folder(model), workers=num, ray=ray,
                progress=lambda *_: done.append(time.perf_counter()),  # noqa: B023
            )  # fmt: skip
            half = shards // 2
            rate = (shards - half) * frames_a_shard / (done[-1] - done[half - 1])
            rows.append({"workers": num, "frames_per_s": rate, "seconds_before_the_first": done[0] - start, "seconds": done[-1] - start})
    for row in rows:
        row["efficiency"] = row["frames_per_s"] / rows[0]["frames_per_s"] * rows[0]["workers"] / row["workers"]
    return rows


def index(num_clips: int = 100_000, *, num_frames: int = 16, clips_a_shard: int = 400, clips_a_part: int = 100_000) -> dict[str, float]:
    """What stores of many clips cost before a frame of them is read, and to draw from. Their frames are the smallest there are, so
    that the index is what is measured; in a process of its own."""
    clip = np.zeros((num_frames, 2, 4, 1, 1), np.float16)
    with tempfile.TemporaryDirectory() as folder:
        written = 0.0
        for part in range(-(-num_clips // clips_a_part)):
            writer = StoreWriter(Path(folder) / f"{part:03}", shard_mb=clips_a_shard * clip.nbytes / 1e6)
            for number in range(part * clips_a_part, min(num_clips, (part + 1) * clips_a_part)):
                # What is the same would be kept once; float16 counts to 2048.
                clip[0, 0, :3, 0, 0] = number % 2000, number // 2000 % 2000, number // 2000**2
                caption = f"a caption of the usual length of about sixty letters, {number}"
                writer.add(Record(f"{number // 1000:05}/{number:09}.mp4", (caption,), caption), clip.copy())
            start = time.perf_counter()
            writer.close(dtype="float16", fps=8, size=8)
            written += time.perf_counter() - start
        return {"clips": num_clips, "seconds_to_write_the_index": written, **alone(_draw, f"{folder}/*", num_frames)}


def _draw(folder: str, num_frames: int) -> dict[str, float]:
    before, start = peak_memory_gib(), time.perf_counter()
    store = Store(folder)
    opened, start = time.perf_counter() - start, time.perf_counter()
    sampler = BalancedSampler(store, store.select(num_frames=num_frames))
    prepared, start = time.perf_counter() - start, time.perf_counter()
    for step in range(100):
        rng = np.random.default_rng(step)
        for number in sampler.draw(rng, 64):
            store.draw_window(rng, number, num_frames), store.records[number].texts
    drawn = (time.perf_counter() - start) / 100
    return {
        "parts": len(store.folders), "shards": len(store.shapes), "seconds_to_open": opened, "seconds_to_prepare_the_sampler": prepared,
        "gib": peak_memory_gib() - before, "seconds_a_batch_of_64": drawn,
    }  # fmt: skip
