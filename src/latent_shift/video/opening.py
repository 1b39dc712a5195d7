"""Open the file of a video or picture, and the errors that decoders raise for what is not one."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
from PIL import Image

DECODE_ERRORS = (
    OSError, av.FFmpegError, EOFError, SyntaxError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError,
    OverflowError, RuntimeError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""Errors that the decoders raise for truncated or mislabelled files."""


@contextmanager
def open_file(path: Path, content: bytes | None = None) -> Iterator[BinaryIO]:
    """Open a regular file, or the content of one.

    Raises:
        ValueError: no such file, one that may not be read, or a folder, pipe or device.
    """
    if content is not None:
        yield io.BytesIO(content)
        return
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
    with file:
        yield file
