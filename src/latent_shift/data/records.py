"""Describe clips and the files that cannot be used, and check the texts that describe them."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from latent_shift.files import read_bytes

MAX_CAPTION_BYTES = 2**20
"""Maximum size of a caption file."""


@dataclass(frozen=True)
class Record:
    """Describe one clip or still.

    Attributes:
        file_name: path of the media, relative to the data set.
        texts: captions; the first is the main one, the others are paraphrases.
        concept: class by which sampling is balanced.
        split: name of the split.
        loop: whether the first frame follows the last one.
        shard: name of the shard in a store; "" before packing.
        start: index of the first frame in that shard.
        num_frames: number of frames in that shard.
        labels: what is known of the clip, by name, such as {"motion": "spin"}; for measures.
    """

    file_name: str
    texts: tuple[str, ...]
    concept: str
    split: str = "train"
    loop: bool = False
    shard: str = ""
    start: int = 0
    num_frames: int = 0
    labels: dict[str, str] = field(default_factory=dict, hash=False)


class Problem(NamedTuple):
    """Say what is wrong with a file or a row, and what happens to it.

    Attributes:
        file_name: the file, or the table and its line.
        reason: what is wrong.
        outcome: "skipped": not used; "kept": used as it is; "ignored": not used, and no media either.
    """

    file_name: str
    reason: str
    outcome: str = "skipped"

    def __str__(self) -> str:
        return escape(f"{self.file_name}: {self.reason} ({self.outcome})")


def summarize(problems: Sequence[Problem], list_file: Path, *, max_lines: int = 20) -> list[str]:
    """Return a line for every skipped file, for the first of the others, and for where all are listed."""
    skipped = [str(problem) for problem in problems if problem.outcome == "skipped"]
    others = [str(problem) for problem in problems if problem.outcome != "skipped"]
    rest = len(others) - max_lines
    return [*skipped, *others[:max_lines], *([f"and {rest} more: {list_file}"] if rest > 0 else [])]


Media = Path | bytes | Problem
"""A file, the content of a file, or the reason why the media is unavailable."""


def unusable(name: str | os.PathLike[str], reason: object) -> tuple[Record, Problem]:
    """Return the record and the media of a file that cannot be used."""
    name = escape(str(name))
    return Record(name, (), name), Problem(name, str(reason))


def escape(text: str) -> str:
    """Return a text that can be stored and printed: bytes that are not UTF-8 (`os.fsdecode`), surrogates and
    control characters are replaced by escapes such as \\xe9."""

    def escape_match(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(match[0])[1:-1]

    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escape_match, text)


def read_text(path: Path, *, max_bytes: int | None = None) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: another encoding, a larger file, or one that is not a regular file.
    """
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def decode_text(content: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark.

    Raises:
        ValueError: another encoding.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("expected UTF-8 text, got UTF-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise ValueError(f"expected UTF-8 text, got {place}") from error


def check_text(text: str, what: str) -> str:
    """Return a text if it can be stored and encoded.

    Raises:
        ValueError: NUL characters, as in UTF-16 without a byte order mark, or bytes and surrogates that are
            not characters.
    """
    if "\0" in text:
        raise ValueError(f"{what} holds a NUL character; expected UTF-8 text")
    if match := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{what} holds {match[0]!a}, which is not a character; expected UTF-8 text")
    return text


def clean_captions(lines: Iterable[str]) -> tuple[str, ...]:
    """Return the captions that are not empty, without the spaces around them.

    Raises:
        ValueError: a caption is not text (`check_text`).
    """
    return tuple(check_text(line, "the caption").strip() for line in lines if line.strip())
