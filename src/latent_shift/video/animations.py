"""Split an animated PNG or GIF into pictures of its frames, and compose them as browsers do.

Pillow decodes the pictures, but composes half-transparent PNGs and the disposal of GIFs differently from browsers.

Sources: PNG (third edition), section 11.3.6; GIF89a, sections 18 to 27.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from latent_shift.video.limits import LimitedFile, check_size
from latent_shift.video.opening import DecodeError

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_CLEAR, _RESTORE = 1, 2


@dataclass(frozen=True)
class Part:
    """The part of an animation that a frame changes.

    Attributes:
        content: a file of a still picture.
        left, top: where it is on the canvas, in pixels.
        seconds: how long the frame is on screen.
        disposal: `_CLEAR` or `_RESTORE` what was there before the next frame; otherwise nothing.
        blends: whether it is blended with the canvas, and does not replace it.
    """

    content: bytes
    left: int
    top: int
    seconds: float
    disposal: int
    blends: bool


def compose(
    parts: Iterable[Part], size: tuple[int, int], open_rgba: Callable[[bytes], Image.Image]
) -> Iterator[tuple[Image.Image, float]]:
    """Yield each frame, an RGBA image that the next one changes, and the seconds that it is on screen.

    Args:
        parts: from `split_png` or `split_gif`.
        size: width and height of the canvas in pixels.
        open_rgba: function that decodes the content of a part.
    """
    canvas = Image.new("RGBA", size)
    for part in parts:
        image = open_rgba(part.content)
        before = canvas.copy() if part.disposal == _RESTORE else None
        if part.blends:
            canvas.alpha_composite(image, (part.left, part.top))
        else:
            canvas.paste(image, (part.left, part.top))
        yield canvas, part.seconds
        if before is not None:
            canvas = before
        elif part.disposal == _CLEAR:
            canvas.paste(
                (0, 0, 0, 0), (part.left, part.top, part.left + image.width, part.top + image.height)
            )


def split_png(file: LimitedFile) -> Iterator[Part]:
    """Yield the parts of an animated PNG. A picture for programs that cannot show animations is left out.

    Raises:
        DecodeError: a truncated or damaged file.
    """
    file.seek(len(_PNG_HEAD))
    header, shared, control, data = b"", b"", b"", bytearray()
    num_frames = num_parts = 0
    while True:
        kind, content = _read_chunk(file)
        if kind in (b"fcTL", b"IEND") and control:
            width, height, left, top, over, under, disposal, blend = struct.unpack(">4x4I2H2B", control)
            canvas = struct.unpack(">2I", header[:8])
            if left + width > canvas[0] or top + height > canvas[1]:
                raise DecodeError(f"frame {num_parts + 1} does not lie in its {canvas[0]}x{canvas[1]} pixels")
            chunks = _chunk(b"IHDR", struct.pack(">2I", width, height) + header[8:]) + shared
            picture = _PNG_HEAD + chunks + _chunk(b"IDAT", bytes(data)) + _chunk(b"IEND", b"")
            yield Part(picture, left, top, over / (under or 100), disposal, blend == 1)
            num_parts, control, data = num_parts + 1, b"", bytearray()
        if kind == b"IEND":
            break
        if kind == b"IHDR":
            header = content
        elif kind == b"acTL":
            num_frames = struct.unpack(">I4x", content)[0]
        elif kind in (b"PLTE", b"tRNS"):
            shared += _chunk(kind, content)
        elif kind == b"fcTL":
            control = content
        elif kind in (b"IDAT", b"fdAT") and control:
            data += content if kind == b"IDAT" else content[4:]
    if num_parts < num_frames:
        raise DecodeError(f"truncated: {num_parts} of {num_frames} frames")


def without_pixels(file: LimitedFile) -> bytes:
    """Return a PNG of one grey pixel with the texts and the Exif of a PNG."""
    file.seek(len(_PNG_HEAD))
    chunks = b""
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            break
        if kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            file.seek(file.tell() - 8)
            chunks += _chunk(*_read_chunk(file))
        else:
            file.seek(file.tell() + size + 4)
    header = _chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0))
    return _PNG_HEAD + header + chunks + _chunk(b"IDAT", zlib.compress(bytes(2))) + _chunk(b"IEND", b"")


_CHUNK_SIZES = {b"IHDR": 13, b"acTL": 8, b"fcTL": 26}


def _read_chunk(file: LimitedFile) -> tuple[bytes, bytes]:
    size, kind = struct.unpack(">I4s", _read(file, 8))
    content = _read(file, size)
    if zlib.crc32(kind + content) != int.from_bytes(_read(file, 4), "big"):
        raise DecodeError(f"the chunk {kind!r} is damaged")
    if len(content) != _CHUNK_SIZES.get(kind, len(content)):
        raise DecodeError(f"the chunk {kind!r} has {len(content)} bytes")
    return kind, content


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def split_gif(file: LimitedFile) -> Iterator[Part]:
    """Yield the parts of a GIF.

    Raises:
        DecodeError: a truncated or damaged file.
    """
    file.seek(0)
    flags = _read(file, 13)[10]
    colours = _read_colours(file, flags)
    control = bytes(4)
    while kind := file.read(1):  # some programs leave out the trailer
        if kind == b";":
            return
        if kind == b"!":
            label, content = _read(file, 1), _read_blocks(file)
            if label == b"\xf9" and content[:1] == b"\4" and len(content) == 6:
                control = content[1:5]
        elif kind == b",":
            left, top, width, height, flags = struct.unpack("<4HB", _read(file, 9))
            check_size(width, height)
            local = _read_colours(file, flags) or colours
            data = _read(file, 1) + _read_blocks(file)
            depth = 0x80 | (len(local) // 3).bit_length() - 2 if local else 0
            picture = (
                b"GIF89a" + struct.pack("<2H3B", width, height, depth, 0, 0) + local
                + b"!\xf9\4" + bytes([control[0] & 1]) + control[1:] + b"\0"
                + b"," + struct.pack("<4HB", 0, 0, width, height, flags & 0x40) + data + b";"
            )  # fmt: skip
            disposal = {2: _CLEAR, 3: _RESTORE, 4: _RESTORE}.get(control[0] >> 2 & 7, 0)
            yield Part(picture, left, top, int.from_bytes(control[1:3], "little") / 100, disposal, True)
            control = bytes(4)
        elif kind != b"\0":
            raise DecodeError(f"expected a block of a GIF, got the byte {kind!r}")


def _read_colours(file: LimitedFile, flags: int) -> bytes:
    return _read(file, 6 << (flags & 7)) if flags & 0x80 else b""


def _read_blocks(file: LimitedFile) -> bytes:
    """Read blocks of data up to an empty one, with the byte of length before each."""
    blocks = bytearray()
    while size := _read(file, 1)[0]:
        blocks.append(size)
        blocks += _read(file, size)
    return bytes(blocks) + b"\0"


def _read(file: LimitedFile, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise DecodeError("truncated")
    return content
