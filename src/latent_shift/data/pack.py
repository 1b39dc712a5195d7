"""Decode captioned clips once into a store of pixels.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
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
    """Decode every clip once into a store of `(F, H, W, 3) uint8` frames.

    Args:
        source: captioned clips in one of the layouts of readers.py.
        out: where the store goes.
        size: side of the frames in pixels; clips are cropped to squares.
        fps: frame rate of the store, in frames per second.
        aspects: crop to the nearest of `aspect_sizes(size, aspects)` instead of a square: sides are multiples
            of this factor (64 for Stable Diffusion's networks) and frames have at most `size * size` pixels.
        split_cuts: store each scene of a clip with cuts as a clip of its own, with the same captions.
        shard_mb: size of a shard in megabytes.
        workers: number of processes that decode.
        progress: called with (number of clips done, number of clips, or None if unknown).

    Returns:
        (file name, reason) of the clips that are unusable. They are skipped, never replaced.

    Raises:
        ValueError: no clips in any layout, no usable clip, or files in `out` that do not belong to a store.
    """
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    writer = StoreWriter(out, shard_mb=shard_mb)
    clips = read(source)
    num_clips = length_hint(clips) or None
    num_done = 0
    problems = []
    long_clips = Path(out) / ".frames"
    for record, frames in decode_records(clips, aspect_sizes(size, aspects), fps, workers, long_clips):
        num_done += 1
        if isinstance(frames, str):
            problems.append((record.file_name, frames))
        else:
            cuts = video.find_cuts(frames) if split_cuts and len(frames) > 1 else []
            parts = [
                replace(record, file_name=f"{record.file_name}#{number}", loop=False)
                for number in range(len(cuts) + 1)
            ]
            writer.add_scenes(parts if cuts else [record], frames, cuts)
        if progress:
            progress(num_done, num_clips)
    if num_done == len(problems):
        first = f"; the first: {': '.join(problems[0])}" if problems else ""
        raise ValueError(f"{source}: none of {num_done} files can be used{first}")
    shutil.rmtree(long_clips, ignore_errors=True)
    writer.close(dtype="uint8", fps=fps, size=size, source=Path(source).name)
    return problems


def aspect_sizes(size: int, factor: int | None) -> list[tuple[int, int]]:
    """Return the `(height, width)` to which clips are cropped.

    Args:
        size: frames have at most `size * size` pixels.
        factor: sides are multiples of it, with aspect ratios from 2:1 to 1:2. None returns the square alone.

    Raises:
        ValueError: `factor` is larger than `size`.
    """
    if factor is None:
        return [(size, size)]
    heights = range(factor, 2 * size + 1, factor)
    widths = [size**2 // height // factor * factor for height in heights]
    pairs = zip(heights, widths, strict=True)
    sizes = [(height, width) for height, width in pairs if width and 0.5 <= height / width <= 2]
    if not sizes:
        raise ValueError(f"no size of at most {size}x{size} pixels has sides that are multiples of {factor}")
    return sizes


def decode_records(
    clips: Iterable[tuple[Record, Media]],
    sizes: list[tuple[int, int]],
    fps: float,
    workers: int,
    long_clips: Path,
) -> Iterator[tuple[Record, video.Frames | str]]:
    """Yield each record with its `(F, H, W, 3) uint8` frames, or with the reason why it has none.

    Args:
        clips: records and media, as from `readers.read`.
        sizes: `(height, width)`s to crop to; see `video.read`.
        fps: frames per second.
        workers: number of processes; two clips per process are in memory at a time.
        long_clips: folder for the frames of clips that are too long for memory. Each is there until the next
            record.
    """
    clips = ((record, media if record.texts else "no caption") for record, media in clips)
    decode = partial(_decode, sizes=sizes, fps=fps, long_clips=long_clips)
    decoded: Iterable[tuple[Record, video.Frames | str]]
    if workers <= 1:
        decoded = ((record, decode(media, record.file_name)) for record, media in clips)
    else:
        decoded = _decode_parallel(clips, decode, workers)
    for record, frames in decoded:
        yield record, frames
        if isinstance(frames, video.FrameFile):
            frames.path.unlink(missing_ok=True)


def _decode_parallel(
    clips: Iterable[tuple[Record, Media]], decode: Callable[[Media, str], video.Frames | str], workers: int
) -> Iterator[tuple[Record, video.Frames | str]]:
    with ProcessPoolExecutor(workers, initializer=exit_with_parent) as pool:
        pending: deque[tuple[Record, Future]] = deque()
        for record, media in clips:
            pending.append((record, pool.submit(decode, media, record.file_name)))
            if len(pending) >= 2 * workers:
                record, future = pending.popleft()
                yield record, future.result()
        yield from ((record, future.result()) for record, future in pending)


def _decode(
    media: Media, name: str, *, sizes: list[tuple[int, int]], fps: float, long_clips: Path
) -> video.Frames | str:
    """Return the frames, or the reason why there are none."""
    if isinstance(media, str):
        return media
    path, content = (name, media) if isinstance(media, bytes) else (media, None)
    try:
        return video.collect(video.iterate(path, content=content, fps=fps, size=sizes), long_clips)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")


def preview(
    store: Store,
    *,
    rows: int = 8,
    columns: int = 8,
    num_frames: int | None = None,
    stride: int = 1,
    splits: tuple[str, ...] = ("train",),
    seed: int = 0,
) -> tuple[np.ndarray, list[str]]:
    """Draw a contact sheet of random clips, sampled as in training.

    Args:
        store: a store of pixels, or of latents, which are decoded.
        rows: number of clips.
        columns: number of frames shown per clip, evenly spaced.
        num_frames: `data.num_frames` of the training to imitate; None shows stills and clips of every length.
        stride: show every `stride`-th frame, as `data.strides` does.
        splits: splits to sample from.
        seed: seed of the sampling.

    Returns:
        The `(H, W, 3) uint8` sheet and the captions in it.

    Raises:
        ValueError: no suitable clip.
    """
    rng = np.random.default_rng(seed)
    sampler = BalancedSampler(store, store.select(splits=splits, num_frames=num_frames or 1, stride=stride))
    clips, captions = [], []
    for index in sampler.draw(rng, rows):
        length = num_frames or min(columns, (store.records[index].num_frames - 1) // stride + 1)
        clips.append(store.draw_pixels(rng, index, length, stride=stride))
        captions.append(store.caption(rng, index, stride=stride if length > 1 else 1))
    return video.labelled_rows(clips, captions, columns=columns), captions
