"""Read and write frames: videos, animations and stills.

Frames are `(F, H, W, 3) uint8` RGB arrays throughout this file. PyAV reads and writes the video containers,
Pillow the animations and stills; both packages include their codecs.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageOps, ImageSequence

if TYPE_CHECKING:
    from torch import Tensor

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v"}
IMAGE_SUFFIXES = {".webp", ".gif", ".png", ".apng", ".jpg", ".jpeg"}
SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
OUTPUT_SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")
DECODE_ERRORS = (
    OSError, av.FFmpegError, EOFError, SyntaxError, IndexError, KeyError, TypeError, ZeroDivisionError, OverflowError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""Errors that the decoders raise for truncated or mislabelled files."""


def read(
    path: str | Path,
    *,
    content: bytes | None = None,
    fps: float | None = None,
    size: int | Sequence[tuple[int, int]] | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    num_frames: int | None = None,
) -> tuple[np.ndarray, float]:
    """Decode a video, animation or still. Rotation and orientation tags are applied.

    Args:
        path: a file with one of `SUFFIXES`.
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
        ValueError: not a video or image, truncated, or without a frame; the message names the file and the
            reason.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: expected one of {' '.join(sorted(SUFFIXES))}, got {path.suffix or 'no suffix'!r}"
        )
    decode = (
        _decode_video
        if path.suffix.lower() in VIDEO_SUFFIXES
        else partial(_decode_image, background=background)
    )
    frames: list[np.ndarray] = []
    seconds = 0.0
    num_decoded = 0
    try:
        for image, duration in decode(path if content is None else io.BytesIO(content)):
            num_decoded += 1
            repeats = 1 if fps is None else _num_output_frames(seconds, seconds + duration, fps)
            seconds += duration
            if repeats or not frames:
                frames += [_crop_and_resize(image, size)] * max(1, repeats)
            # Two images have to be decoded to tell a video from a still.
            num_output = num_decoded if fps is None else seconds * fps
            if num_frames is not None and num_decoded > 1 and num_output >= num_frames:
                break
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: cannot be decoded after {num_decoded} frames: {error}") from error
    if not frames:
        raise ValueError(f"{path}: has no frames")
    if num_decoded == 1:
        return frames[0][None], 0.0
    # A last frame on screen for less than half its time would repeat the first frame of a loop, so it is
    # dropped.
    length = len(frames) if fps is None else max(1, round(seconds * fps))
    return np.stack(frames[:length][:num_frames]), fps or num_decoded / seconds


def write(frames: np.ndarray, path: str | Path, *, fps: float = 8) -> Path:
    """Write frames to .mp4 (H.264), .webm (VP9), .gif, .webp (lossless) or .png (a strip), by the suffix.

    Args:
        frames: `(F, H, W, 3) uint8`. In .mp4 and .webm, an odd height or width is padded by repeating the
            last row or column.
        path: output file; missing folders are created.
        fps: frames per second, above 0, and at most 50 in a .gif.

    Returns:
        `path`.

    Raises:
        ValueError: wrong shape or dtype, an unknown suffix, or an `fps` that the format does not support.
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
        # GIF counts in 10 ms, WebP in 1 ms. Rounding the times and not the durations keeps the length of the
        # clip.
        tick = 10 if suffix == ".gif" else 1
        durations = np.diff(np.round(np.arange(len(frames) + 1) * 1000 / fps / tick)).astype(int) * tick
        # Pillow merges equal frames into one with a longer duration. GIF ignores WebP's `lossless`.
        images[0].save(
            path, save_all=True, append_images=images[1:], duration=durations.tolist(), loop=0, lossless=True
        )
    return path


def check_output(path: str | Path, *, fps: float = 8) -> Path:
    """Return `path` if `write` supports its format at this frame rate, so that errors come before the work.

    Raises:
        ValueError: an unknown suffix, or an `fps` that the format does not support.
    """
    path = Path(path)
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"{path}: expected one of {' '.join(OUTPUT_SUFFIXES)}, got {path.suffix or 'no suffix'!r}"
        )
    if fps <= 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    if fps > 50 and path.suffix.lower() == ".gif":
        raise ValueError(f"{path}: a .gif shows at most 50 frames a second, got {fps}; choose another format")
    return path


def frame_changes(frames: np.ndarray) -> np.ndarray:
    """Return the mean absolute difference in grey levels between successive frames, as `(F - 1,)`."""
    grey = frames.mean(axis=-1, dtype=np.float32)
    return np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2))


def find_cuts(frames: np.ndarray) -> list[int]:
    """Return the indices of the frames that begin a new scene.

    At a cut the frames change by more than 27 grey levels (the threshold of PySceneDetect) and by more than
    four times the median of the clip, so that fast motion throughout is not a cut.
    """
    changes = frame_changes(frames)
    return (np.flatnonzero((changes > 27) & (changes > 4 * np.median(changes))) + 1).tolist()


def montage(tiles: np.ndarray, *, columns: int, gap: int = 2) -> np.ndarray:
    """Arrange `(N, H, W, 3) uint8` images in a grid, `gap` white pixels apart; returns
    `(H', W', 3) uint8`."""
    num, height, width, _ = tiles.shape
    rows = -(-num // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def side_by_side(clips: np.ndarray | list[np.ndarray], *, columns: int) -> np.ndarray:
    """Arrange `(F, H, W, 3) uint8` clips of equal shape in a grid; returns one `(F, H', W', 3) uint8`
    clip."""
    return np.stack(
        [montage(np.stack(tiles), columns=min(columns, len(clips))) for tiles in zip(*clips, strict=True)]
    )


def labelled_rows(
    clips: list[np.ndarray], labels: list[str], *, columns: int, label_height: int = 14
) -> np.ndarray:
    """Draw a contact sheet with one row per clip.

    Args:
        clips: `(F, H, W, 3) uint8` clips; F may differ.
        labels: text above each row.
        columns: maximum number of frames per row, evenly spaced over the clip.
        label_height: height of a label in pixels.

    Returns:
        `(H', W', 3) uint8`.
    """
    columns = min(columns, max(map(len, clips)))
    rows = []
    for clip, label in zip(clips, labels, strict=True):
        selected = clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)]
        row = montage(selected, columns=columns)
        header = Image.new("RGB", (row.shape[1], label_height), "white")
        ImageDraw.Draw(header).text((2, 1), label, fill="black")
        rows.append(np.concatenate([np.asarray(header), row]))
    return np.concatenate(rows)


def _num_output_frames(start: float, end: float, fps: float) -> int:
    """Return how many integers k satisfy start <= k / fps < end; a millionth of a frame absorbs rounding."""
    return int(np.ceil(end * fps - 1e-6)) - int(np.ceil(start * fps - 1e-6))


def _crop_and_resize(image: Image.Image, size: int | Sequence[tuple[int, int]] | None) -> np.ndarray:
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


def _decode_video(file: Path | io.BytesIO) -> Iterator[tuple[Image.Image, float]]:
    """Yield each frame and the seconds that it is on screen.

    Raises:
        EOFError: no video stream, or a truncated file. Truncated files may decode without an error of the
            decoder, so the decoded time is compared with the header.
    """
    with av.open(file if isinstance(file, io.BytesIO) else str(file), "r") as container:
        if not container.streams.video:
            raise EOFError("no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        default_duration = 1 / float(stream.average_rate or 25)
        # Shared: `frame.to_image()` starts threads for each frame, 1 to 5 ms.
        reformatter = VideoReformatter()
        decoded_seconds = 0.0
        previous = None
        for frame in container.decode(stream):
            if previous is not None:
                has_times = frame.time is not None and previous.time is not None
                duration = max(frame.time - previous.time, 0.0) if has_times else default_duration
                decoded_seconds += duration
                yield _to_upright_image(previous, reformatter), duration
            previous = frame
        if previous is not None:
            duration = default_duration
            if previous.duration and previous.time_base:
                duration = float(previous.duration * previous.time_base)
            decoded_seconds += duration
            yield _to_upright_image(previous, reformatter), duration
        header_seconds = (
            float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        )
        # of a container with sound this is the longer of both
        if not header_seconds and container.duration and len(container.streams) == 1:
            header_seconds = container.duration / av.time_base
        if decoded_seconds < 0.9 * header_seconds - 2 * default_duration:
            raise EOFError(f"truncated: {decoded_seconds:.1f} s of {header_seconds:.1f} s can be decoded")


def _to_upright_image(frame: av.VideoFrame, reformatter: VideoReformatter) -> Image.Image:
    image = reformatter.reformat(frame, format="rgb24").to_image()
    return image.rotate(frame.rotation, expand=True)  # both count degrees counterclockwise


def _decode_image(
    file: Path | io.BytesIO, background: tuple[int, int, int]
) -> Iterator[tuple[Image.Image, float]]:
    """Yield each frame and the seconds that it is on screen."""
    with Image.open(file) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
            seconds = frame.info.get("duration", 100) / 1000
            if seconds == 0 or (seconds < 0.02 and image.format == "GIF"):
                seconds = 0.1  # browsers show such frames for a tenth of a second
            frame = ImageOps.exif_transpose(frame)
            if frame.has_transparency_data:
                backdrop = Image.new("RGBA", frame.size, (*background, 255))
                frame = Image.alpha_composite(backdrop, frame.convert("RGBA"))
            yield frame.convert("RGB"), seconds


def _encode_video(frames: np.ndarray, path: Path, fps: float) -> None:
    _, height, width, _ = frames.shape
    # yuv420p needs even sides
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    mp4 = path.suffix.lower() == ".mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"} if mp4 else {}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264" if mp4 else "libvpx-vp9", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # A constant rate factor of 18 (x264) or 24 (VP9) is visually lossless at these sizes.
        stream.options = {"crf": "18", "preset": "medium"} if mp4 else {"crf": "24", "b": "0"}
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode(None))


def save_video(clip: np.ndarray | Tensor | list[Image.Image], path: str | Path, *, fps: float = 8) -> Path:
    """Write one clip to .mp4, .webm, .gif, .webp or .png (a strip of its frames), by the suffix.

    Args:
        clip: a clip as pipelines return it: an `(F, H, W, 3)` array in [0, 1] or uint8, an `(F, 3, H, W)`
            tensor in [0, 1], or F images.
        path: output file; missing folders are created.
        fps: frames per second.

    Returns:
        `path`.
    """
    return write(to_uint8(clip), path, fps=fps)


def load_video(path: str | Path, *, fps: float | None = None, size: int | None = None) -> np.ndarray:
    """Read a video, animation or still as `(F, H, W, 3) uint8`; see `read`."""
    return read(path, fps=fps, size=size)[0]


def to_uint8(clip: np.ndarray | Tensor | list[Image.Image]) -> np.ndarray:
    """Convert a clip as pipelines return it to `(F, H, W, 3) uint8`; floats are clipped to [0, 1] and
    rounded.

    Args:
        clip: as in `save_video`.
    """
    if isinstance(clip, list):
        return np.stack([np.asarray(image.convert("RGB")) for image in clip])
    frames = clip if isinstance(clip, np.ndarray) else clip.permute(0, 2, 3, 1).float().cpu().numpy()
    return frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)
