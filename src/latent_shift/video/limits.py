"""Limits of one file, so that neither a damaged nor a malicious one takes all memory or all time."""

from __future__ import annotations

import math
import time
from numbers import Real
from typing import BinaryIO

from latent_shift.video.opening import DecodeError

MAX_PIXELS = 2**27
"""Pixels of a frame, about 11585 x 11585."""
MAX_FRAME_SECONDS = 60.0
"""Seconds for which one frame may be repeated: a file of 100 bytes can announce years."""
MAX_PICTURE_BYTES = 2**30
"""Bytes of the file of a picture; Pillow reads some kinds as a whole. Videos have no such limit."""
MAX_BYTES = 2**34
"""Bytes of frames that `read` returns. `iterate` has no such limit."""
BASE_SECONDS = 20.0
SECONDS_PER_SECOND = 30.0
"""A file may take `BASE_SECONDS`, and this for each second of the clip that has been decoded."""


class TimeLimit:
    """The time that the decoding of one file may take. The clock stands still while the frames are used."""

    def __init__(self) -> None:
        self._end = time.monotonic() + BASE_SECONDS

    def check(self) -> None:
        """Raise DecodeError if the time is over."""
        if time.monotonic() > self._end:
            raise DecodeError(
                f"takes too long: more than {BASE_SECONDS:g} s, and {SECONDS_PER_SECOND:g} s for each second of the clip"
            )

    def extend(self, seconds: float) -> None:
        self._end += seconds


class LimitedFile:
    """A binary file that raises DecodeError on `read` when the time is over.

    Decoders search damaged files for a valid packet without ever returning to the caller, but they read.
    """

    def __init__(self, file: BinaryIO, limit: TimeLimit):
        self._file, self._limit = file, limit
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._limit.check()
        return self._file.read(size)


def check_fps(fps: float, hint: str = "") -> None:
    """Raise ValueError for a frame rate that is not a finite number above 0."""
    if not isinstance(fps, Real) or isinstance(fps, bool) or not 0 < fps < math.inf:
        raise ValueError(f"fps must be above 0 and finite, got {fps!r:.60}{hint}")


def check_size(width: int, height: int) -> None:
    """Raise DecodeError for a frame without pixels or with more than `MAX_PIXELS`."""
    if not 0 < width * height <= MAX_PIXELS:
        raise DecodeError(f"frames of {width}x{height} pixels; expected at most {MAX_PIXELS} pixels")
