"""Check what films announce before libav opens them: its index takes memory for each announced sample."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from latent_shift.video.limits import LimitedFile
from latent_shift.video.opening import DecodeError

_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
_FIRST = _PARENTS | {b"ftyp", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"uuid"}


def check_header(file: LimitedFile) -> None:
    """Compare what the header of a file announces with the bytes that it has. Files of other kinds pass.

    Raises:
        DecodeError: an MP4 or MOV that announces more samples than bytes, or an AVI that is cut short.
    """
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    head = file.read(12)
    if head[4:8] in _FIRST:
        num_samples = 0
        for name, count in _sample_counts(file, 0, size):
            num_samples += count
            if num_samples > size:
                raise DecodeError(f"announces {num_samples} samples in {name}, but has {size} bytes")
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        (announced,) = struct.unpack("<I", head[4:8])
        # Programs that could not seek back leave 0 or the largest number.
        if announced < 2**32 - 1 and size < 0.99 * announced:
            raise DecodeError(f"truncated: has {size} of {announced} bytes")
    file.seek(0)


def _sample_counts(file: LimitedFile, start: int, end: int) -> Iterator[tuple[str, int]]:
    """Yield the name of each box with samples, and how many it announces (ISO/IEC 14496-12, 8.7.3 and 8.8.8)."""
    while start + 8 <= end:
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            return
        length, kind = struct.unpack(">I4s", header[:8])
        head = 8
        if length == 1 and len(header) == 16:
            (length,), head = struct.unpack(">Q", header[8:]), 16
        stop = end if length == 0 else min(start + length, end)
        if length and length < head:
            return  # damaged: libav reports it
        if kind in _PARENTS:
            yield from _sample_counts(file, start + head, stop)
        elif kind in (b"trun", b"stsz"):
            file.seek(start + head + 4)  # after version and flags
            numbers = file.read(8)
            if len(numbers) == 8:
                first, second = struct.unpack(">II", numbers)
                yield kind.decode(), first if kind == b"trun" else second
        start = stop
