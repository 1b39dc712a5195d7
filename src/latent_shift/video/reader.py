"""Read the frames of videos, animations and stills.

The kind of a file is decided by its content; its name has no meaning.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from time import monotonic

import numpy as np
from PIL import Image

from latent_shift.video import films, pictures
from latent_shift.video.limits import (
    MAX_BYTES,
    MAX_FRAME_SECONDS,
    SECONDS_PER_SECOND,
    LimitedFile,
    TimeLimit,
    check_fps,
    check_size,
)
from latent_shift.video.opening import DecodeError, open_file

VIDEO_SUFFIXES = {
    ".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".3gp", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv", ".ogv",
    ".mxf",
}  # fmt: skip
IMAGE_SUFFIXES = {".webp", ".gif", ".png", ".apng", ".jpg", ".jpeg", ".avif"}
SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
"""Suffixes that files of these kinds usually have, for those who search folders."""
TimedFrame = tuple[Callable[[], Image.Image], float]
"""A function that returns a frame, to be called before the next frame is decoded, and its seconds."""
Size = int | Sequence[tuple[int, int]] | None


def read(
    path: str | Path,
    *,
    content: bytes | None = None,
    fps: float | None = None,
    size: Size = None,
    background: tuple[int, int, int] = (255, 255, 255),
    num_frames: int | None = None,
) -> tuple[np.ndarray, float]:
    """Decode a video, animation or still, as a good player shows it.

    Frames are upright and not mirrored, with square pixels, deinterlaced, and in SDR with the colours of
    BT.709 or sRGB. A file that cannot be shown right is an error and never a wrong picture.

    Args:
        path: a video in a usual container (MP4, MOV, Matroska, WebM, AVI, MPEG, FLV, WMV, Ogg, MXF) or a PNG,
            GIF, JPEG, WebP or AVIF.
        content: content of the file, if it comes from elsewhere, such as a shard; `path` then only names it.
        fps: resample to this frame rate: output frame k is the one on screen at `k / fps` seconds. None keeps
            every frame.
        size: side of a square in pixels, or `(height, width)`s of which the one with the nearest aspect ratio
            is used. The largest central region of that aspect ratio is cropped and resized. None keeps the
            size.
        background: RGB colour behind transparent pixels.
        num_frames: maximum number of frames; later ones are not decoded.

    Returns:
        `(F, H, W, 3) uint8` frames and the frame rate, 0.0 for a still.

    Raises:
        ValueError: not a video or image, truncated, without a frame, or more than a limit in limits.py; the
            message names the file and the reason. Or an `fps`, `size` or `num_frames` out of range.
    """
    _check_arguments(fps, size, num_frames)
    rate = 0.0

    def frames() -> Iterator[np.ndarray]:
        nonlocal rate
        rate = yield from _read(
            path, content=content, fps=fps, size=size, background=background, num_frames=num_frames
        )

    iterator = frames()
    first = next(iterator)

    def within_limit() -> Iterator[np.ndarray]:
        for count, frame in enumerate(chain([first], iterator), 1):
            if count * frame.nbytes > MAX_BYTES:
                raise ValueError(
                    f"{path}: its frames take more than {MAX_BYTES / 2**30:g} GiB; pass a smaller size, fps or "
                    "num_frames, or use `iterate`"
                )
            yield frame

    return np.fromiter(within_limit(), np.dtype((np.uint8, first.shape))), rate


def iterate(
    path: str | Path,
    *,
    content: bytes | None = None,
    fps: float | None = None,
    size: Size = None,
    background: tuple[int, int, int] = (255, 255, 255),
    num_frames: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield the `(H, W, 3) uint8` frames of `read` one by one, in memory that does not depend on their
    number."""
    _check_arguments(fps, size, num_frames)
    return _read(path, content=content, fps=fps, size=size, background=background, num_frames=num_frames)


def load_video(path: str | Path, *, fps: float | None = None, size: int | None = None) -> np.ndarray:
    """Read a video, animation or still as `(F, H, W, 3) uint8`; see `read`."""
    return read(path, fps=fps, size=size)[0]


def _check_arguments(fps: float | None, size: Size, num_frames: int | None) -> None:
    if fps is not None:
        check_fps(fps, "; None keeps every frame")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}; None reads to the end")
    if size is None:
        return
    sizes = [(size, size)] if isinstance(size, int) else size
    if not sizes or not all(len(pair) == 2 and min(pair) > 0 for pair in sizes):
        raise ValueError(
            f"size must be a number of pixels above 0 or a list of (height, width), got {size}; None keeps the size"
        )
    for height, width in sizes:
        check_size(width, height)


def _read(
    path: str | Path,
    *,
    content: bytes | None,
    fps: float | None,
    size: Size,
    background: tuple[int, int, int],
    num_frames: int | None,
) -> Generator[np.ndarray, None, float]:
    """Yield the frames and return the frame rate."""
    path = Path(path)
    limit = TimeLimit()
    num_decoded = 0

    def count(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
        nonlocal num_decoded
        for frame in frames:
            num_decoded += 1
            yield frame

    with open_file(path, content) as opened:
        try:
            file = LimitedFile(opened, limit)
            image = pictures.open_picture(file)
            if image is None:
                frames = films.decode(file, limit, background=background)
            else:
                frames = pictures.decode(file, image, limit, background=background)
            return (yield from _resample(count(frames), limit, fps=fps, size=size, num_frames=num_frames))
        except DecodeError as error:
            after = f" after {num_decoded} frames" if num_decoded else ""
            raise ValueError(f"{path}: cannot be decoded{after}: {error}") from error
        except MemoryError as error:
            raise ValueError(f"{path}: does not fit into memory") from error


def _resample(
    frames: Iterator[TimedFrame], limit: TimeLimit, *, fps: float | None, size: Size, num_frames: int | None
) -> Generator[np.ndarray, None, float]:
    """Yield the frames that are on screen at `k / fps` seconds, and return the frame rate."""
    seconds, num_decoded, num_output = 0.0, 0, 0
    image, repeats = np.empty(0, np.uint8), 0  # repeats that have not been yielded yet
    stopped = False

    def output(count: int) -> Iterator[np.ndarray]:
        nonlocal num_output
        if num_frames is not None:
            count = min(count, num_frames - num_output)
        for frame in repeat(image, count):
            num_output += 1
            start = monotonic()
            yield frame
            limit.extend(monotonic() - start)

    for show, duration in frames:
        num_decoded += 1
        if fps is not None and duration > MAX_FRAME_SECONDS:
            raise DecodeError(
                f"frame {num_decoded} is on screen for {duration:.0f} s; expected at most {MAX_FRAME_SECONDS:.0f} s"
            )
        count = 1 if fps is None else _num_output_frames(seconds, seconds + duration, fps)
        seconds += duration
        limit.extend(SECONDS_PER_SECOND * min(duration, 1))
        if count or num_decoded == 1:
            # Only now: the first image may be a still, and the last may be on screen for too short a time.
            yield from output(repeats)
            previous = image
            image, repeats = _crop_and_resize(show(), size), count
            if num_decoded > 1 and image.shape != previous.shape:
                raise DecodeError(
                    f"frame {num_decoded} has the shape {image.shape}, the one before {previous.shape}"
                )
        total = num_decoded if fps is None else seconds * fps
        # Two images have to be decoded to tell a video from a still.
        if num_frames is not None and num_decoded > 1 and total >= num_frames:
            stopped = True
            break
    if num_decoded == 0:
        raise DecodeError("has no frames")
    if num_decoded == 1:
        yield image
        return 0.0
    # A last frame on screen for less than half its time would repeat the first frame of a loop, so it is
    # dropped.
    length = num_output + repeats if fps is None or stopped else max(1, round(seconds * fps))
    yield from output(length - num_output)
    return fps or num_decoded / seconds


def _num_output_frames(start: float, end: float, fps: float) -> int:
    """Return how many integers k satisfy start <= k / fps < end; a millionth of a frame absorbs rounding."""
    return int(np.ceil(end * fps - 1e-6)) - int(np.ceil(start * fps - 1e-6))


def _crop_and_resize(image: Image.Image, size: Size) -> np.ndarray:
    if size is None:
        return np.asarray(image)
    sizes = [(size, size)] if isinstance(size, int) else size
    log_aspect = np.log(image.height / image.width)
    height, width = min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - log_aspect))
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = (left, top, image.width - left, image.height - top)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)
