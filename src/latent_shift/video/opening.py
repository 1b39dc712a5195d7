"""Open the file of a video or picture, and turn the errors of the libraries that decode it into one."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import av
from PIL import Image

Item = TypeVar("Item")

_LIBRARY_ERRORS = (
    OSError, av.FFmpegError, EOFError, SyntaxError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError,
    OverflowError, RuntimeError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""Errors that libav and Pillow raise for truncated or mislabelled files."""


class DecodeError(ValueError):
    """A file that cannot be decoded, or that cannot be shown right; the message is the reason."""


@contextmanager
def library_errors() -> Iterator[None]:
    """Raise DecodeError for what a library raises in the block. The block calls libraries alone, so that an error
    in our own code is not taken for a bad file."""
    try:
        yield
    except DecodeError:
        raise
    except _LIBRARY_ERRORS as error:
        raise DecodeError(str(error) or type(error).__name__) from error


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Do as `library_errors`, and ignore warnings: of many pixels, for which we have a limit, and of metadata that
    Pillow skips."""
    with library_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def items(iterable: Iterable[Item]) -> Iterator[Item]:
    """Yield the items of a library's iterable; its errors are raised as DecodeError."""
    iterator = iter(iterable)
    while True:
        with library_errors():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


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
