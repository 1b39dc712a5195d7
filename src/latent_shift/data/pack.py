"""Captioned clips, wherever they come from, decoded once into a store of pixels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from operator import length_hint
from pathlib import Path

import numpy as np

from latent_shift import video
from latent_shift.data.readers import Media, Record, read
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store, StoreWriter
from latent_shift.runtime import exit_with_parent


def pack(
    source: str | Path,
    out: str | Path,
    *,
    size: int,
    fps: float,
    aspects: int | None = None,
    split_cuts: bool = False,
    shard_mb: float = 64,
    workers: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[tuple[str, str]]:
    """Decode every record once into a store of `(F, H, W, 3) uint8` frames.

    Args:
        source: captioned clips in one of the layouts of sources.py.
        out: where the store goes.
        size: side of the frames in pixels; clips are cut to squares.
        fps: frames a second kept of every clip.
        aspects: instead of squares the nearest of the sizes that have this factor and no more than `size * size` pixels (64 for
            Stable Diffusion's networks; the sizes of `sizes_of`).
        split_cuts: a clip with cuts becomes one of each scene, under the same caption.
        shard_mb: megabytes of a shard.
        workers: processes that decode.
        progress: called with (records done, records in all, None where only the end will tell).

    Returns:
        The files that could not be used, as (file name, reason). They are left out, never replaced.

    Raises:
        ValueError: no clips in any layout, or none that can be used; or `out` holds files that are not a store's.
    """
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    writer = StoreWriter(out, shard_mb=shard_mb)
    clips, done = read(source), 0
    total = length_hint(clips) or None
    problems = []
    for done, (record, frames) in enumerate(decoded(clips, sizes_of(size, aspects), fps, workers), 1):
        if isinstance(frames, str):
            problems.append((record.file_name, frames))
        else:
            scenes = np.split(frames, video.cuts(frames)) if split_cuts and len(frames) > 1 else [frames]
            for number, scene in enumerate(scenes):
                part = replace(record, file_name=f"{record.file_name}#{number}", loop=False) if len(scenes) > 1 else record
                writer.add(part, scene)
        if progress:
            progress(done, total)
    if done == len(problems):
        first = f"; the first: {': '.join(problems[0])}" if problems else ""
        raise ValueError(f"{source}: none of {done} files can be used{first}")
    writer.close(dtype="uint8", fps=fps, size=size, source=Path(source).name)
    return problems


def sizes_of(size: int, factor: int | None) -> list[tuple[int, int]]:
    """`(height, width)` from 2:1 to 1:2, multiples of `factor` with at most `size * size` pixels; without a factor the square alone.

    Raises:
        ValueError: a factor that is larger than the square.
    """
    if factor is None:
        return [(size, size)]
    heights = range(factor, 2 * size + 1, factor)
    pairs = [(height, size**2 // height // factor * factor) for height in heights]
    found = [(height, width) for height, width in pairs if width and 0.5 <= height / width <= 2]
    if not found:
        raise ValueError(f"no size of at most {size}x{size} pixels has the factor {factor}")
    return found


def preview(
    store: Store, *, rows: int = 8, columns: int = 8, num_frames: int | None = None, stride: int = 1, splits: tuple[str, ...] = ("train",),
    seed: int = 0,
) -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """What training sees: random records of a store of pixels, or of latents as they decode.

    Args:
        store: the records.
        rows: of the sheet, a record each.
        columns: frames shown of each, evenly spread.
        num_frames, stride, splits: settings of `data` whose draws are shown; without num_frames stills and clips of all lengths.
        seed: of the draws.

    Returns:
        The `(H, W, 3) uint8` sheet, and the captions that stand in it.

    Raises:
        ValueError: no record can be drawn.
    """
    rng = np.random.default_rng(seed)
    indices = BalancedSampler(store, store.select(splits=splits, num_frames=num_frames or 1, stride=stride)).draw(rng, rows)
    strips, captions = [], []
    for index in indices:
        length = num_frames or min(columns, (store.records[index].num_frames - 1) // stride + 1)
        strips.append(store.draw_pixels(rng, index, length, stride=stride))
        captions.append(store.caption(rng, index, stride=stride if length > 1 else 1))
    return video.labelled_rows(strips, captions, columns=columns), captions


def _decode(media: Media, name: str, sizes: list[tuple[int, int]], fps: float) -> np.ndarray | str:
    if isinstance(media, str):
        return media
    try:
        return video.read(
            name if isinstance(media, bytes) else media, content=media if isinstance(media, bytes) else None, fps=fps, size=sizes
        )[0]
    except ValueError as error:
        return str(error).removeprefix(f"{media if isinstance(media, Path) else name}: ")


def decoded(
    clips: Iterator[tuple[Record, Media]], sizes: list[tuple[int, int]], fps: float, workers: int
) -> Iterator[tuple[Record, np.ndarray | str]]:
    """Each record with its frames, or with the reason why there are none; two clips a worker are on their way at any time."""
    tasks = ((record, (media if record.texts else "no caption", record.file_name, sizes, fps)) for record, media in clips)
    if workers <= 1:
        yield from ((record, _decode(*task)) for record, task in tasks)
        return
    with ProcessPoolExecutor(workers, initializer=exit_with_parent) as pool:
        underway: deque[tuple[Record, Future]] = deque()
        for record, task in tasks:
            underway.append((record, pool.submit(_decode, *task)))
            if len(underway) >= 2 * workers:
                record, future = underway.popleft()
                yield record, future.result()
        yield from ((record, future.result()) for record, future in underway)
