"""Write frames to videos, animations and stills.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from latent_shift.files import atomic_path
from latent_shift.video import metadata as file_metadata
from latent_shift.video.films import build_graph
from latent_shift.video.limits import check_fps
from latent_shift.video.pixels import Clip, to_uint8

OUTPUT_SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")
MIN_FPS = 0.001
_MAX_FPS = {".gif": 50, ".webp": 1000, ".mp4": 1000, ".webm": 1000}
_MAX_SIDE = {".gif": 65535, ".webp": 16383, ".mp4": 16384, ".webm": 65536}
_BT709 = 1
_LIMITED_RANGE = 1


def write(
    frames: np.ndarray, path: str | Path, *, fps: float = 8, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write frames to .mp4 (H.264), .webm (VP9), .gif, .webp (lossless) or .png (a strip), by the suffix.

    The file is complete or absent: a file of that name is replaced when the new one is complete.

    Args:
        frames: `(F, H, W, 3) uint8`. In .mp4 and .webm, an odd height or width is padded by repeating the
            last row or column.
        path: output file; missing folders are created.
        fps: frames per second, at most 50 in a .gif and 1000 elsewhere.
        metadata: texts by name, which `read_metadata` returns.

    Returns:
        `path`.

    Raises:
        ValueError: wrong shape or dtype, an unknown suffix, an `fps` that the format does not support, or a
            size that it does not.
        OSError: the file cannot be written, such as on a full disk.
    """
    path = check_output(path, fps=fps)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ValueError(
            f"expected (F, H, W, 3) uint8 frames with F > 0, got {frames.shape} {frames.dtype}; "
            "`save_video` converts other forms"
        )
    suffix = path.suffix.lower()
    problem = f"{path}: frames of {frames.shape[2]}x{frames.shape[1]} pixels cannot be encoded"
    if suffix in _MAX_SIDE and max(frames.shape[1:3]) > _MAX_SIDE[suffix]:
        raise ValueError(f"{problem}: a side of a {suffix} has at most {_MAX_SIDE[suffix]} pixels")
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = _write_video if suffix in (".mp4", ".webm") else _write_picture
    try:
        # libav takes what stands before a colon for a protocol, but not in a path from the root
        with atomic_path(path.absolute(), suffix=suffix) as partial:
            encode(frames, partial, fps, metadata)
    except av.FFmpegError as error:
        raise ValueError(f"{problem}: {error}") from error
    return path


def check_output(path: str | Path, *, fps: float = 8) -> Path:
    """Return `path` if `write` supports its format at this frame rate, so that errors come before the work.

    Raises:
        ValueError: an unknown suffix, or an `fps` that the format does not support.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"{path}: expected one of {' '.join(OUTPUT_SUFFIXES)}, got {path.suffix or 'no suffix'!r}"
        )
    check_fps(fps)
    if suffix in _MAX_FPS and not MIN_FPS <= fps <= _MAX_FPS[suffix]:
        bound = f"least {MIN_FPS}" if fps < MIN_FPS else f"most {_MAX_FPS[suffix]}"
        raise ValueError(
            f"{path}: a {suffix} shows at {bound} frames a second, got {fps}; choose another rate or format"
        )
    return path


def save_video(
    clip: Clip, path: str | Path, *, fps: float = 8, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write one clip to .mp4, .webm, .gif, .webp or .png (a strip of its frames), by the suffix.

    Args:
        clip: a clip as pipelines return it, or in another usual form; see `video.to_frames`.
        path: output file; missing folders are created.
        fps: frames per second.
        metadata: texts by name, stored in the file.

    Returns:
        `path`.

    Raises:
        ValueError: pixels in an unknown range, NaN, or what `video.write` refuses.
    """
    path = check_output(path, fps=fps)
    return write(to_uint8(clip), path, fps=fps, metadata=metadata)


def _write_picture(frames: np.ndarray, path: Path, fps: float, metadata: Mapping[str, str] | None) -> None:
    options = file_metadata.picture_options(metadata)
    if path.suffix == ".png":
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(path, **options)
        return
    images = [Image.fromarray(frame) for frame in frames]
    # GIF counts in 10 ms, WebP in 1 ms. Rounding the times and not the durations keeps the length of the
    # clip.
    tick = 10 if path.suffix == ".gif" else 1
    durations = np.diff(np.round(np.arange(len(frames) + 1) * 1000 / fps / tick)).astype(int) * tick
    # Pillow merges equal frames into one with a longer duration. GIF ignores WebP's `lossless`.
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=durations.tolist(),
        loop=0,
        lossless=True,
        **options,
    )


def _write_video(frames: np.ndarray, path: Path, fps: float, metadata: Mapping[str, str] | None) -> None:
    # yuv420p needs even sides
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    mp4 = path.suffix == ".mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"} if mp4 else {}) as container:
        if metadata:
            container.metadata[file_metadata.TAG] = file_metadata.dump(metadata)
        rate = Fraction(float(fps)).limit_denominator(1001)
        stream = container.add_stream("libx264" if mp4 else "libvpx-vp9", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Visually lossless at these sizes. x264's preset veryfast at crf 16 has the quality of medium at 18 in less time, and
        # somewhat larger files.
        stream.options = {"crf": "16", "preset": "veryfast"} if mp4 else {"crf": "24", "b": "0"}
        # Without these marks players choose the matrix by the size.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        graph = None
        for index, frame in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if graph is None:
                scale = "out_color_matrix=bt709:out_range=tv:flags=bicubic"
                graph = build_graph(rgb, ("scale", scale), ("format", "yuv420p"))
            graph.push(rgb)
            converted = graph.vpull()
            converted.pts, converted.time_base = index, 1 / rate
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
