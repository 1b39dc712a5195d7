"""Decode captioned clips, in this process or in several, and say what is wrong with each.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_shift import video
from latent_shift.data.records import Media, Problem, Record
from latent_shift.data.workers import WorkerDied, Workers
from latent_shift.files import check_regular

MAX_DECODE_SECONDS = 3600
"""Time after which a worker process is killed that decodes one file."""


@dataclass(frozen=True)
class Clip:
    """A decoded clip.

    Attributes:
        frames: `(F, H, W, 3) uint8`.
        flaws: what is wrong with it, although it can be used.
    """

    frames: video.Frames
    flaws: tuple[str, ...]


@dataclass(frozen=True)
class Decoder:
    """Decode files as they are packed.

    Attributes:
        sizes: `(height, width)`s to crop to; see `video.read`.
        fps: frames per second.
        min_frames: number of frames that a clip needs, unless it loops.
        packed_sizes: the `(height, width)`s that clips are compared with to say which are enlarged or lose a
            large part to the crop; None says neither.
        long_clips: folder for the frames of clips that are too long for memory; `decode_records` removes each
            before it decodes the next record.
    """

    sizes: list[tuple[int, int]]
    fps: float
    min_frames: int = 1
    packed_sizes: list[tuple[int, int]] | None = None
    long_clips: Path = Path(".")

    def __call__(self, record: Record, media: Media) -> Clip | Problem:
        """Return a clip, or the reason why there is none."""
        if isinstance(media, Problem):
            return media
        if not record.texts:
            return Problem(record.file_name, "no caption")
        path, content = (Path(record.file_name), media) if isinstance(media, bytes) else (media, None)
        try:
            if content is None:
                check_regular(path)
        except (OSError, ValueError) as error:
            return Problem(record.file_name, _describe_error(error, path))
        # An error of the disk on which a long clip is collected is not one of the file, and ends the work.
        try:
            frames = video.collect(
                video.iterate(path, content=content, fps=self.fps, size=self.sizes), self.long_clips
            )
            flaws = clip_flaws(record, frames, self.min_frames, self.fps)
            if self.packed_sizes:
                first, _ = video.read(path, content=content, num_frames=1)
                flaws += size_flaws(first.shape[1], first.shape[2], self.packed_sizes)
        except ValueError as error:
            return Problem(record.file_name, _describe_error(error, path))
        return Clip(frames, tuple(flaws))


def _describe_error(error: OSError | ValueError, path: Path) -> str:
    """Return why a file cannot be used, without its name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError):
        return f"cannot be opened: {error.strerror}"
    return str(error).removeprefix(f"{path}: ")


def decode_records(
    clips: Iterable[tuple[Record, Media]], decode: Decoder, workers: int
) -> Iterator[tuple[Record, Clip | Problem]]:
    """Yield each record with its clip, or with the reason why it has none.

    Args:
        clips: records and media, as from `readers.read`.
        decode: how to decode them.
        workers: number of processes; two clips per process are in memory at a time.
    """
    for record, clip in _decode_all(clips, decode, workers):
        yield record, clip
        if isinstance(clip, Clip) and isinstance(clip.frames, video.FrameFile):
            clip.frames.path.unlink(missing_ok=True)


def _decode_all(
    clips: Iterable[tuple[Record, Media]], decode: Decoder, workers: int
) -> Iterator[tuple[Record, Clip | Problem]]:
    if workers <= 1:
        yield from ((record, decode(record, media)) for record, media in clips)
        return
    with Workers(decode, workers, seconds=MAX_DECODE_SECONDS) as pool:
        pending: deque[tuple[Record, Future]] = deque()
        for record, media in clips:
            pending.append((record, pool.submit(record, media)))
            if len(pending) >= 2 * workers:
                yield _finish(*pending.popleft())
        while pending:
            yield _finish(*pending.popleft())


def _finish(record: Record, future: Future) -> tuple[Record, Clip | Problem]:
    try:
        return record, future.result()
    except WorkerDied as error:
        return record, Problem(record.file_name, f"cannot be decoded: {error}")


def clip_flaws(record: Record, frames: video.Frames, min_frames: int, fps: float) -> list[str]:
    """Return why a clip is less suitable for training: too short, static, or with cuts."""
    if len(frames) == 1:
        is_video = Path(record.file_name).suffix.lower() in video.VIDEO_SUFFIXES
        return [f"1 frame at {fps:g} fps: counts as a still"] if is_video else []
    flaws = []
    if len(frames) < min_frames and not record.loop:
        flaws.append(f"{len(frames)} frames at {fps:g} fps, expected at least {min_frames}")
    if video.frame_changes(frames).mean() < 0.05:
        flaws.append("static: the frames do not change")
    if cuts := video.find_cuts(frames):
        flaws.append(f"scene cut at {', '.join(f'{frame / fps:.1f} s' for frame in cuts)}")
    return flaws


def size_flaws(height: int, width: int, sizes: list[tuple[int, int]]) -> list[str]:
    """Return whether frames are enlarged, or lose more than half of their area, at the nearest of some
    `(height, width)`s."""
    to_height, to_width = min(sizes, key=lambda size: abs(np.log(size[0] / size[1] * width / height)))
    scale = max(to_height / height, to_width / width)
    flaws = []
    if scale > 1.01:
        flaws.append(f"{width}x{height} pixels are enlarged {scale:.1f} times")
    lost = 1 - to_height * to_width / (scale**2 * height * width)
    if lost > 0.5:
        flaws.append(f"{lost:.0%} of the picture is cropped away")
    return flaws


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
