"""Read the headers of films before libav opens them: its index takes memory for each announced sample, and it skips
some of what the header says about how a track is shown."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from latent_shift.video.limits import LimitedFile
from latent_shift.video.opening import DecodeError

_CONTENT_OFFSETS = dict.fromkeys(
    (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"moof", b"traf"), 0
) | {b"stsd": 8}
"""Kind of a box with boxes inside -> bytes before the first."""
_SAMPLE_ENTRY_BYTES = 78
"""Bytes before the boxes in a sample entry of a video track."""
_FIRST = {b"moov", b"moof", b"ftyp", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"uuid"}
_MAX_HEAD_BYTES = 2**16
"""Bytes of a box, or of the head of a Matroska, that are read."""
_DOLBY_VISION = (b"dvcC", b"dvvC", b"dvwC")
_NEEDS_DOLBY_VISION = (5, 10, 20)
"""Profiles whose pictures have no usual colours if their compatibility is 0; in others, 0 is that of old files."""


@dataclass
class Track:
    """What the header of an MP4 or MOV says about one track.

    Attributes:
        size: width and height in the header of the track.
        edits: (time in the media, -1 for an empty edit; rate) of each entry of its edit list.
        aperture: width, height, and the offset of its centre to the right and down, in pixels, of the part of the
            frames that is shown. None: all.
        has_pixel_aspect: whether the shape of the pixels is stated.
        dolby_vision: profile that cannot be shown without Dolby Vision, or None.
    """

    size: tuple[float, float] = (0, 0)
    edits: list[tuple[int, float]] = field(default_factory=list)
    aperture: tuple[Fraction, Fraction, Fraction, Fraction] | None = None
    has_pixel_aspect: bool = False
    dolby_vision: int | None = None


def read_header(file: LimitedFile) -> dict[int, Track]:
    """Return the tracks of an MP4 or MOV by their number, and {} for files of other kinds. Compare what the header
    of a file announces with the bytes that it has.

    Raises:
        DecodeError: an MP4 or MOV that announces more samples than bytes, an AVI that is cut short, or a Matroska
            that cannot be shown without Dolby Vision.
    """
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    head = file.read(12)
    tracks: dict[int, Track] = {}
    if head[4:8] in _FIRST:
        tracks = _read_tracks(file, size)
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        (announced,) = struct.unpack("<I", head[4:8])
        # Programs that could not seek back leave 0 or the largest number.
        if announced < 2**32 - 1 and size < 0.99 * announced:
            raise DecodeError(f"truncated: has {size} of {announced} bytes")
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        _check_matroska(head + file.read(_MAX_HEAD_BYTES))
    file.seek(0)
    return tracks


def _read_tracks(file: LimitedFile, size: int) -> dict[int, Track]:
    tracks: dict[int, Track] = {}
    track = Track()
    num_samples = 0
    for kind, length in _boxes(file, size):
        if kind == b"trak":
            track = Track()
        if kind not in (b"tkhd", b"trun", b"stsz", b"elst", b"clap", b"pasp", *_DOLBY_VISION):
            continue
        body = file.read(min(length, _MAX_HEAD_BYTES))
        try:
            if kind == b"tkhd":
                number, *dimensions = struct.unpack_from(">20xI64x2I" if body[0] else ">12xI60x2I", body)
                track.size = (dimensions[0] / 65536, dimensions[1] / 65536)
                tracks[number] = track
            elif kind in (b"trun", b"stsz"):
                numbers = struct.unpack_from(">4x2I", body)  # after version and flags
                num_samples += numbers[0] if kind == b"trun" else numbers[1]
            else:
                _read_display(track, kind, body)
        except (struct.error, ZeroDivisionError, IndexError) as error:
            raise DecodeError(f"the box {kind.decode()} in its header is damaged") from error
        if num_samples > size:
            raise DecodeError(f"announces {num_samples} samples in {kind.decode()}, but has {size} bytes")
    return tracks


def _read_display(track: Track, kind: bytes, body: bytes) -> None:
    """Read a box of ISO/IEC 14496-12 that says how a track is shown: 8.6.6 and 12.1.4."""
    if kind == b"elst":
        start, stride, entry = (16, 20, ">qi") if body[0] else (12, 12, ">ii")
        (count,) = struct.unpack_from(">4xI", body)
        for index in range(min(count, (len(body) - 8) // stride)):
            time, rate = struct.unpack_from(entry, body, start + index * stride)
            track.edits.append((time, rate / 65536))
    elif kind == b"clap":
        numbers = struct.unpack_from(">4IiIiI", body)
        width, height, right, down = map(Fraction, numbers[::2], numbers[1::2])
        track.aperture = (width, height, right, down)
    elif kind == b"pasp":
        track.has_pixel_aspect = True
    else:
        track.dolby_vision = _dolby_profile(body)


def _boxes(file: LimitedFile, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield the kind of each box and the bytes of its content, where the file then stands; boxes before those in
    them."""
    position, parents = 0, [(b"", size)]
    while parents:
        parent, end = parents[-1]
        file.seek(position)
        header = file.read(16) if position + 8 <= end else b""
        if len(header) < 8:
            _, position = parents.pop()
            continue
        length, kind = struct.unpack(">I4s", header[:8])
        head = 8
        if length == 1 and len(header) == 16:
            (length,), head = struct.unpack(">Q", header[8:]), 16
        stop = end if length == 0 else min(position + length, end)
        if length and length < head:  # damaged: libav reports it
            _, position = parents.pop()
            continue
        file.seek(position + head)
        yield kind, stop - position - head
        offset = _SAMPLE_ENTRY_BYTES if parent == b"stsd" else _CONTENT_OFFSETS.get(kind)
        if offset is None:
            position = stop
        else:
            position += head + offset
            parents.append((kind, stop))


def _dolby_profile(configuration: bytes) -> int | None:
    """Return the profile in a Dolby Vision configuration record if its pictures need Dolby Vision."""
    (numbers,) = struct.unpack_from(">H", configuration, 2)
    profile, compatibility = numbers >> 9, configuration[4] >> 4
    return profile if profile in _NEEDS_DOLBY_VISION and not compatibility else None


def _check_matroska(head: bytes) -> None:
    """Look for a Dolby Vision configuration in the mappings of block additions (BlockAddIDType, then ExtraData)."""
    for kind in _DOLBY_VISION:
        mapping = head.partition(b"\x41\xe7\x84" + kind)[2][:64].partition(b"\x41\xed")[2]
        if len(mapping) >= 6:
            check_dolby_vision(_dolby_profile(mapping[1:]))


def check_dolby_vision(profile: int | None) -> None:
    """Raise DecodeError for pictures whose colours only Dolby Vision restores."""
    if profile is not None:
        raise DecodeError(
            f"its colours are in Dolby Vision profile {profile}, without a picture for other players; "
            "convert it to HDR10 or SDR"
        )
