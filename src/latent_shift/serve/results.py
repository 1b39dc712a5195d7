"""Files of a finished job: the frames without loss, and other formats made from them when they are asked for."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from latent_shift import video
from latent_shift.files import atomic_write, read_json_object, write_json

FORMATS = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "gif": "image/gif",
    "webp": "image/webp",
    "png": "image/png",
}
FRAMES = "frames.png"
METADATA = "metadata.json"
THUMBNAIL = "thumbnail.webp"
_THUMBNAIL_SIDE = 256
_LOCKS = [threading.Lock() for _ in range(64)]


def write_results(folder: Path, frames: np.ndarray, *, fps: float, metadata: Mapping[str, str]) -> None:
    """Write the frames of a clip, and its video, which most clients want.

    Args:
        folder: of the job.
        frames: `(F, H, W, 3) uint8`.
        fps: frames per second.
        metadata: texts for the files.

    Raises:
        OSError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"fps": fps, "num_frames": len(frames), "metadata": dict(metadata)}, folder / METADATA)
    with ThreadPoolExecutor(1) as pool:  # both encoders let other threads run
        film = None
        if len(frames) > 1:
            film = pool.submit(video.write, frames, folder / "video.mp4", fps=fps, metadata=metadata)
        strip = io.BytesIO()
        # The default level takes 15 ms more for a clip of 16 frames of 128x128, and saves an eighth.
        options = video.picture_options(metadata)
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(strip, "PNG", compress_level=1, **options)
        with atomic_write(folder / FRAMES) as file:
            file.write(strip.getvalue())
        if film is not None:
            film.result()


def content(folder: Path, kind: str) -> Path:
    """Return the file of a finished job in one of `FORMATS`, written now if it is not there yet."""
    path = folder / (FRAMES if kind == "png" else f"video.{kind}")
    with _lock(path):
        if not path.exists():
            info = read_json_object(folder / METADATA)
            video.write(read_frames(folder), path, fps=info["fps"], metadata=info["metadata"])
    return path


def thumbnail(folder: Path) -> Path:
    """Return a small picture of the middle frame."""
    path = folder / THUMBNAIL
    with _lock(path):
        if not path.exists():
            frames = read_frames(folder)
            picture = Image.fromarray(frames[len(frames) // 2])
            picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
            file = io.BytesIO()
            picture.save(file, "WEBP", quality=80)
            with atomic_write(path) as target:
                target.write(file.getvalue())
    return path


def _lock(path: Path) -> threading.Lock:
    """Return the lock of a file that two threads may not write at once."""
    return _LOCKS[hash(path) % len(_LOCKS)]


def sniff(path: Path) -> str:
    """Return the media type of a picture or video by its first bytes."""
    with path.open("rb") as file:
        head = file.read(16)
    for start, kind in (
        (b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"),
        (b"\x1aE\xdf\xa3", "video/webm"),
    ):  # fmt: skip
        if head.startswith(start):
            return kind
    return "image/avif" if head[4:12] in (b"ftypavif", b"ftypavis") else "video/mp4"


def read_frames(folder: Path) -> np.ndarray:
    """Read the `(F, H, W, 3) uint8` frames of a finished job."""
    num_frames = read_json_object(folder / METADATA)["num_frames"]
    with Image.open(folder / FRAMES) as picture:
        strip = np.asarray(picture.convert("RGB"))
    return np.stack(np.split(strip, num_frames, axis=1))
