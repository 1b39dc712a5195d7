"""Frames of long clips in a file, so that memory does not grow with a film's length.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from uuid import uuid4

import numpy as np

from latent_shift.files import array_header, full_disk_named

MAX_MEMORY_BYTES = 2**26
"""Bytes of frames of one clip that `collect` keeps in memory."""


@dataclass(frozen=True)
class FrameFile:
    """`(F, H, W, 3) uint8` frames in a `.npy` file, which are read when they are indexed.

    Attributes:
        path: the file.
        shape: `(F, H, W, 3)`.
        offset: bytes of the file's header.
    """

    path: Path
    shape: tuple[int, ...]
    offset: int

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """Read one frame, a range of frames, or the frames with the given indices."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._read(start, max(stop - start, 0))[::step]
        if isinstance(index, np.ndarray):
            return np.stack([self[int(number)] for number in index])
        return self._read(range(len(self))[index], 1)[0]

    def _read(self, start: int, count: int) -> np.ndarray:
        size = int(np.prod(self.shape[1:]))
        values = np.fromfile(self.path, np.uint8, count * size, offset=self.offset + start * size)
        return values.reshape(count, *self.shape[1:])


Frames = np.ndarray | FrameFile


def collect(frames: Iterator[np.ndarray], folder: Path) -> Frames:
    """Collect the `(H, W, 3) uint8` frames of a clip: an array, or a new file in `folder` if they take more than
    `MAX_MEMORY_BYTES`.

    Raises:
        OSError: a full disk.
    """
    collected: list[np.ndarray] = []
    for frame in frames:
        collected.append(frame)
        if len(collected) * frame.nbytes > MAX_MEMORY_BYTES:
            return _write(chain(collected, frames), folder)
    return np.stack(collected)


def _write(frames: Iterator[np.ndarray], folder: Path) -> FrameFile:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid4().hex}.npy"
    count, shape = 0, (0,)
    try:
        with full_disk_named(path), path.open("wb") as file:
            for frame in frames:
                if not count:
                    offset = file.write(array_header("uint8", (0, *frame.shape)))
                file.write(np.ascontiguousarray(frame).data)
                count += 1
                shape = (count, *frame.shape)
            file.seek(0)
            file.write(array_header("uint8", shape))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return FrameFile(path, shape, offset)
