"""What many clips cost: encoding by several processes, and an index of many records. The numbers of docs/scale.md."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from latent_shift import memory, zoo
from latent_shift.benchmark import alone
from latent_shift.encode import encode
from latent_shift.sources import Record
from latent_shift.store import BalancedSampler, Store, StoreWriter


def encoding(
    model: str = "emoji", *, workers: tuple[int, ...] = (1, 2), shards: int = 40, frames_a_shard: int = 128, size: int = 128
) -> list[dict[str, Any]]:
    """How fast frames are encoded by some numbers of processes, while all are at work: from the first shard of each to the last."""
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
                Path(folder) / "pixels", Path(folder) / f"{num}", autoencoder=zoo.folder(model), texts=zoo.folder(model), workers=num,
                progress=lambda *_: done.append(time.perf_counter()),  # noqa: B023
            )  # fmt: skip
            rate = (shards - num) * frames_a_shard / (done[-1] - done[num - 1])
            rows.append({"workers": num, "frames_per_s": rate, "seconds_before_the_first": done[0] - start, "seconds": done[-1] - start})
    for row in rows:
        row["efficiency"] = row["frames_per_s"] / rows[0]["frames_per_s"] * rows[0]["workers"] / row["workers"]
    return rows


def index(num_clips: int = 100_000, *, num_frames: int = 16, clips_a_shard: int = 400) -> dict[str, float]:
    """What a store of many clips costs before a frame of it is read, and to draw from. Its frames are the smallest there are, so that
    the index is what is measured; in a process of its own."""
    return alone(_index, num_clips, num_frames, clips_a_shard)


def _index(num_clips: int, num_frames: int, clips_a_shard: int) -> dict[str, float]:
    clip = np.zeros((num_frames, 2, 4, 1, 1), np.float16)
    with tempfile.TemporaryDirectory() as folder:
        writer = StoreWriter(Path(folder), shard_mb=clips_a_shard * clip.nbytes / 1e6)
        for number in range(num_clips):
            clip[:2, 0, 0, 0, 0] = number % 2000, number // 2000  # what is the same would be kept once
            caption = f"a caption of the usual length of about sixty letters, {number}"
            writer.add(Record(f"{number // 1000:05}/{number:09}.mp4", (caption,), caption), clip.copy())
        start = time.perf_counter()
        writer.close(dtype="float16", fps=8, size=8)
        written, before = time.perf_counter() - start, memory.peak()
        start = time.perf_counter()
        store = Store(folder)
        opened, start = time.perf_counter() - start, time.perf_counter()
        sampler = BalancedSampler(store, store.select(num_frames=num_frames))
        prepared, start = time.perf_counter() - start, time.perf_counter()
        for step in range(100):
            rng = np.random.default_rng(step)
            np.stack([store.draw_window(rng, number, num_frames) for number in sampler.draw(rng, 64)])
        drawn = (time.perf_counter() - start) / 100
    return {
        "clips": num_clips, "shards": len(store.shapes), "seconds_to_write_the_index": written, "seconds_to_open": opened,
        "seconds_to_prepare_the_sampler": prepared, "gib": memory.peak() - before, "seconds_a_batch_of_64": drawn,
    }  # fmt: skip
