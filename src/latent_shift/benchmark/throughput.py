"""Throughput of large data sets: encoding frames by several processes, and the cost of an index of many
clips."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from latent_shift.benchmark.timing import run_alone
from latent_shift.data.encode import encode
from latent_shift.data.readers import Record
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store
from latent_shift.data.store_writer import StoreWriter
from latent_shift.pipelines import loading
from latent_shift.runtime import peak_memory_gib


def encoding(
    model: str = "emoji",
    *,
    workers: tuple[int, ...] = (1, 2),
    shards: int = 40,
    frames_a_shard: int = 128,
    size: int = 128,
    ray: str | None = None,
) -> list[dict[str, Any]]:
    """Time the encoding of random frames by different numbers of workers.

    The rate is that of the second half of the shards, when all workers are busy.

    Args:
        model: whose autoencoder and text encoder are used.
        workers: numbers of processes, or of Ray workers.
        shards, frames_a_shard, size: of the data set; size is the side of its frames in pixels.
        ray: address of a Ray cluster. None: processes of this machine.

    Returns:
        For each number of workers frames a second, seconds, seconds before the first shard, and efficiency
        relative to the first.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        writer = StoreWriter(folder / "pixels", shard_mb=frames_a_shard * size * size * 3 / 1e6)
        for number in range(shards):
            frames = rng.integers(0, 256, (frames_a_shard, size, size, 3), np.uint8)
            writer.add(Record(f"{number}.mp4", ("noise",), "noise"), frames)
        writer.close(dtype="uint8", fps=8, size=size, source="noise")
        for num in workers:
            shard_times: list[float] = []
            start = time.perf_counter()
            encode(
                folder / "pixels",
                folder / f"{num}",
                autoencoder=loading.folder(model),
                texts=loading.folder(model),
                workers=num,
                ray=ray,
                progress=lambda *_: shard_times.append(time.perf_counter()),  # noqa: B023
            )
            half = shards // 2
            rate = (shards - half) * frames_a_shard / (shard_times[-1] - shard_times[half - 1])
            rows.append(
                {
                    "workers": num,
                    "frames_per_s": rate,
                    "seconds_before_the_first": shard_times[0] - start,
                    "seconds": shard_times[-1] - start,
                }
            )
    for row in rows:
        row["efficiency"] = (
            row["frames_per_s"] / rows[0]["frames_per_s"] * rows[0]["workers"] / row["workers"]
        )
    return rows


def index(
    num_clips: int = 100_000, *, num_frames: int = 16, clips_a_shard: int = 400, clips_a_part: int = 100_000
) -> dict[str, float]:
    """Time writing and opening the index of many clips, and drawing batches from it, in a process of its own.

    Frames have the smallest size there is, so that the index dominates.

    Args:
        num_clips: clips in all.
        num_frames: frames a clip.
        clips_a_shard, clips_a_part: clips in each shard, and in each of the stores that are opened together.
    """
    clip = np.zeros((num_frames, 2, 4, 1, 1), np.float16)
    with tempfile.TemporaryDirectory() as folder:
        write_seconds = 0.0
        for part in range(-(-num_clips // clips_a_part)):
            writer = StoreWriter(Path(folder) / f"{part:03}", shard_mb=clips_a_shard * clip.nbytes / 1e6)
            for number in range(part * clips_a_part, min(num_clips, (part + 1) * clips_a_part)):
                # Every clip differs, because equal shards are stored once; float16 counts to 2048.
                clip[0, 0, :3, 0, 0] = number % 2000, number // 2000 % 2000, number // 2000**2
                caption = f"a caption of the usual length of about sixty letters, {number}"
                writer.add(Record(f"{number // 1000:05}/{number:09}.mp4", (caption,), caption), clip.copy())
            start = time.perf_counter()
            writer.close(dtype="float16", fps=8, size=8, texts=[1, 1], strides=[1], factor=8, channels=4)
            write_seconds += time.perf_counter() - start
        return {
            "clips": num_clips,
            "seconds_to_write_the_index": write_seconds,
            **run_alone(_draw, f"{folder}/*", num_frames),
        }


def _draw(folder: str, num_frames: int) -> dict[str, float]:
    memory_before, start = peak_memory_gib(), time.perf_counter()
    store = Store(folder)
    opened = time.perf_counter()
    sampler = BalancedSampler(store, store.select(num_frames=num_frames))
    prepared = time.perf_counter()
    for step in range(100):
        rng = np.random.default_rng(step)
        for number in sampler.draw(rng, 64):
            store.draw_window(rng, number, num_frames), store.records[number].texts
    return {
        "parts": len(store.folders), "shards": len(store.shapes), "seconds_to_open": opened - start,
        "seconds_to_prepare_the_sampler": prepared - opened, "gib": peak_memory_gib() - memory_before,
        "seconds_a_batch_of_64": (time.perf_counter() - prepared) / 100,
    }  # fmt: skip
