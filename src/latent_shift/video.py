"""Frames in and out of files: read any video or animation, write mp4, webm, gif, webp and png strips.

Frames are `(F, H, W, 3) uint8` RGB arrays everywhere in this file. PyAV reads and writes the video containers,
pillow the animations and stills; both ship their codecs, so nothing else has to be installed.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image, ImageDraw, ImageOps, ImageSequence

if TYPE_CHECKING:
    from torch import Tensor

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v"}
IMAGE_SUFFIXES = {".webp", ".gif", ".png", ".apng", ".jpg", ".jpeg"}
SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
WRITABLE = (".mp4", ".webm", ".gif", ".webp", ".png")
# What decoders have been seen to raise on files that are cut short or not what they say.
BROKEN = (
    OSError, av.FFmpegError, EOFError, SyntaxError, IndexError, KeyError, TypeError, ZeroDivisionError, OverflowError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip


def read(
    path: str | Path,
    *,
    content: bytes | None = None,
    fps: float | None = None,
    size: int | Sequence[tuple[int, int]] | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    num_frames: int | None = None,
) -> tuple[np.ndarray, float]:
    """Decode a video, animation or still, turned upright where the file says how it was held.

    Args:
        path: a file with one of `SUFFIXES`.
        content: what is in the file, if it lies elsewhere (in a shard, say); the path then only names it.
        fps: frames a second wanted. Output frame `k` is the one on screen at `k / fps` seconds; None keeps every frame.
        size: side of the square wanted, in pixels, or `(height, width)`s of which the one nearest in shape is taken: the largest
            centred piece of that shape is cut out and resized. None keeps the size.
        background: RGB laid behind transparent pixels.
        num_frames: the first so many wanted, what comes after them is not decoded; None: all.

    Returns:
        `(F, H, W, 3) uint8` frames and their frame rate (0.0 for a still).

    Raises:
        ValueError: not a video or image, cut short, or without a frame; the message names the file and the reason.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected one of {' '.join(sorted(SUFFIXES))}, got {path.suffix or 'no suffix'!r}")
    decode = _decode_video if path.suffix.lower() in VIDEO_SUFFIXES else partial(_decode_image, background=background)
    frames: list[np.ndarray] = []
    end = 0.0
    num_decoded = 0
    try:
        for image, seconds in decode(path if content is None else io.BytesIO(content)):
            # A frame is shown from `end` to `end + seconds`: it fills every output slot that falls inside.
            num_decoded += 1
            repeats = 1 if fps is None else sum(1 for _ in _slots(end, end + seconds, fps))
            end += seconds
            if repeats:
                frames += [_fit(image, size)] * repeats
            elif not frames:
                frames.append(_fit(image, size))
            if num_frames is not None and num_decoded > 1 and (num_decoded if fps is None else end * fps) >= num_frames:
                break
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except BROKEN as error:
        raise ValueError(f"{path}: cannot be decoded after {num_decoded} frames: {error}") from error
    if not frames:
        raise ValueError(f"{path}: holds no frame")
    if num_decoded == 1:
        return frames[0][None], 0.0
    # A last slot on screen for less than half its time would double the first frame of a loop: drop it.
    keep = len(frames) if fps is None else max(1, round(end * fps))
    return np.stack(frames[:keep][:num_frames]), fps or num_decoded / end


def write(frames: np.ndarray, path: str | Path, *, fps: float = 8) -> Path:
    """Write frames; the suffix chooses the format: .mp4 (H.264), .webm (VP9), .gif, .webp (lossless) or .png (a strip).

    Args:
        frames: `(F, H, W, 3) uint8`. For .mp4 and .webm an odd height or width repeats its last row or column.
        path: where to; missing folders are made.
        fps: frames a second, above 0; at most 50 in a .gif.

    Returns:
        The path written.

    Raises:
        ValueError: wrong shape or dtype, an unknown suffix, or an `fps` that the format cannot have.
    """
    path = check_output(path, fps=fps)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"expected (F, H, W, 3) uint8 frames with F > 0, got {frames.shape} {frames.dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix in (".mp4", ".webm"):
        _encode_video(frames, path, fps)
    elif suffix == ".png":
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(path)
    else:
        images = [Image.fromarray(frame) for frame in frames]
        # GIF counts in 10 ms, WebP in 1 ms: what is rounded off one frame goes to the next, so that the clip keeps its time.
        tick = 10 if suffix == ".gif" else 1
        durations = np.diff(np.round(np.arange(len(frames) + 1) * 1000 / fps / tick)).astype(int) * tick
        # Pillow merges equal frames into one that lasts longer. `lossless` is WebP's; GIF has no such option and ignores it.
        images[0].save(path, save_all=True, append_images=images[1:], duration=durations.tolist(), loop=0, lossless=True)
    return path


def check_output(path: str | Path, *, fps: float = 8) -> Path:
    """`path`, if `write` can write there at this rate: to know before the work and not after.

    Raises:
        ValueError: an unknown suffix, or an `fps` that the format cannot have.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise ValueError(f"{path}: expected one of {' '.join(WRITABLE)}, got {path.suffix or 'no suffix'!r}")
    if fps <= 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    if fps > 50 and path.suffix.lower() == ".gif":
        raise ValueError(f"{path}: a .gif shows at most 50 frames a second, got {fps}; expected another format or a lower fps")
    return path


def changes(frames: np.ndarray) -> np.ndarray:
    """`(F - 1,)` mean grey levels by which each frame differs from the one before."""
    grey = frames.mean(axis=-1, dtype=np.float32)
    return np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2))


def cuts(frames: np.ndarray) -> list[int]:
    """The frames that begin another scene: the change to them is above 27 grey levels a pixel (PySceneDetect's threshold) and four times
    what is usual in the clip, so that what moves fast all the time is no cut."""
    change = changes(frames)
    return [int(frame) + 1 for frame in np.flatnonzero((change > 27) & (change > 4 * np.median(change)))]


def montage(tiles: np.ndarray, *, columns: int, gap: int = 2) -> np.ndarray:
    """Lay `(N, H, W, 3) uint8` tiles out in rows of `columns` on white; returns one `(H', W', 3) uint8` picture."""
    num, height, width, _ = tiles.shape
    rows = -(-num // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def side_by_side(clips: np.ndarray | list[np.ndarray], *, columns: int) -> np.ndarray:
    """Lay `(F, H, W, 3) uint8` clips of equal length out as one clip in rows of `columns`."""
    return np.stack([montage(np.stack(tiles), columns=min(columns, len(clips))) for tiles in zip(*clips, strict=True)])


def labelled_rows(clips: list[np.ndarray], labels: list[str], *, columns: int, label_height: int = 14) -> np.ndarray:
    """A contact sheet: each clip as a row of `columns` frames evenly spread over it, its label above; `(H, W, 3) uint8`."""
    rows, columns = [], min(columns, max(map(len, clips)))
    for clip, label in zip(clips, labels, strict=True):
        picked = clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)]
        row = montage(picked, columns=columns)
        head = Image.new("RGB", (row.shape[1], label_height), "white")
        ImageDraw.Draw(head).text((2, 1), label, fill="black")
        rows.append(np.concatenate([np.asarray(head), row]))
    return np.concatenate(rows)


def _slots(start: float, end: float, fps: float) -> Iterator[int]:
    """The integers k with start <= k / fps < end; a millionth of a frame absorbs rounding."""
    first = int(np.ceil(start * fps - 1e-6))
    return iter(range(first, int(np.ceil(end * fps - 1e-6))))


def _fit(image: Image.Image, size: int | Sequence[tuple[int, int]] | None) -> np.ndarray:
    if size is None:
        return np.asarray(image)
    sizes, shape = [(size, size)] if isinstance(size, int) else size, np.log(image.height / image.width)
    height, width = min(sizes, key=lambda each: abs(np.log(each[0] / each[1]) - shape))
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = (left, top, image.width - left, image.height - top)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)


def _decode_video(file: Path | io.BytesIO) -> Iterator[tuple[Image.Image, float]]:
    with av.open(file if isinstance(file, io.BytesIO) else str(file), "r") as container:
        if not container.streams.video:
            raise EOFError("no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        default = 1 / float(stream.average_rate or 25)
        held, shown = None, 0.0
        for frame in container.decode(stream):
            if held is not None:
                seconds = max(frame.time - held.time, 0.0) if frame.time is not None and held.time is not None else default
                shown += seconds
                yield _upright(held), seconds
            held = frame
        if held is not None:
            seconds = float(held.duration * held.time_base) if held.duration and held.time_base else default
            shown += seconds
            yield _upright(held), seconds
        # A file cut short decodes without an error: only its header knows. (The container's duration may be the sound's.)
        promised = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        if not promised and container.duration and len(container.streams) == 1:
            promised = container.duration / av.time_base
        if shown < 0.9 * promised - 2 * default:
            raise EOFError(f"cut short: {shown:.1f} s of {promised:.1f} s can be decoded")


def _upright(frame: av.VideoFrame) -> Image.Image:
    return frame.to_image().rotate(frame.rotation, expand=True)  # both count degrees counterclockwise; telephones film sideways


def _decode_image(file: Path | io.BytesIO, background: tuple[int, int, int]) -> Iterator[tuple[Image.Image, float]]:
    with Image.open(file) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
            seconds = frame.info.get("duration", 100) / 1000
            if seconds == 0 or (seconds < 0.02 and image.format == "GIF"):
                seconds = 0.1  # "as fast as possible", which browsers show at 10 frames a second
            frame = ImageOps.exif_transpose(frame)
            if frame.has_transparency_data:
                backdrop = Image.new("RGBA", frame.size, (*background, 255))
                yield Image.alpha_composite(backdrop, frame.convert("RGBA")).convert("RGB"), seconds
            else:
                yield frame.convert("RGB"), seconds


def _encode_video(frames: np.ndarray, path: Path, fps: float) -> None:
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # yuv420p needs even sides
    mp4 = path.suffix.lower() == ".mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"} if mp4 else {}) as container:
        stream = container.add_stream("libx264" if mp4 else "libvpx-vp9", rate=_fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # crf 18 (x264) and 24 (VP9) are visually lossless for these sizes.
        stream.options = {"crf": "18", "preset": "medium"} if mp4 else {"crf": "24", "b": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def _fraction(fps: float):
    from fractions import Fraction

    return Fraction(fps).limit_denominator(1001)


def save_video(clip: np.ndarray | Tensor | list[Image.Image], path: str | Path, *, fps: float = 8) -> Path:
    """Write one clip to .mp4, .webm, .gif, .webp or .png (a strip of its frames); returns the path.

    Args:
        clip: `(F, H, W, 3)` in [0, 1] or uint8, `(F, 3, H, W)` tensor in [0, 1], or F images: what a pipeline returns for a clip.
        path: the suffix chooses the format.
        fps: frames a second.
    """
    return write(to_uint8(clip), path, fps=fps)


def load_video(path: str | Path, *, fps: float | None = None, size: int | None = None) -> np.ndarray:
    """Read a video, animation or still as `(F, H, W, 3) uint8`; see `read`."""
    return read(path, fps=fps, size=size)[0]


def to_uint8(clip: np.ndarray | Tensor | list[Image.Image]) -> np.ndarray:
    """Any form of a clip as `(F, H, W, 3) uint8`; floats are clipped to [0, 1] and rounded."""
    if isinstance(clip, list):
        return np.stack([np.asarray(image.convert("RGB")) for image in clip])
    frames = clip if isinstance(clip, np.ndarray) else clip.permute(0, 2, 3, 1).float().cpu().numpy()
    return frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)
