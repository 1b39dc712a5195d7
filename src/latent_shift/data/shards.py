"""Read WebDataset shards: `.tar` files, also compressed with gzip, on this machine or at an address.

Shards are read with `tarfile` and not with webdataset, because after a truncated shard
`webdataset.tariterators` returns the incomplete sample, completed with files of the next shard where the keys
are equal, and reports the error outside the stream.

A shard may announce terabytes in a few kilobytes. What is read is bounded in three ways: files up to
MAX_FILE_BYTES, headers up to MAX_HEADER_BYTES, and MAX_EXPANSION times the compressed bytes.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.request import urlopen

from latent_shift import video
from latent_shift.data.records import (
    Media,
    Record,
    clean_captions,
    decode_text,
    escape,
    unusable,
)
from latent_shift.files import check_regular, parse_json, split_lines
from latent_shift.folders import is_debris

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_FILE_BYTES = 512 * 2**20
"""Maximum size of a file in a shard."""
MAX_TEXT_BYTES = 16 * 2**20
"""Maximum size of the captions or the metadata of a clip in a shard."""
MAX_FILES = 1000
"""Number of files of a sample that are kept in mind beside its clip and captions."""
MAX_HEADER_BYTES = 2**20
"""Maximum size of the headers of a file in a shard."""
MAX_EXPANSION = 200
"""Maximum ratio of the content of a compressed shard to its own size."""
MAX_WAITING_BYTES = 256 * 2**20
"""Size of the incomplete samples that are in memory while their other files are searched."""
MAX_SHARDS = 1_000_000
"""Maximum number of shards that one pattern stands for."""
_TEXT_SUFFIXES = (".txt", ".json")
_FILE_BYTES = 1024  # approximate memory of a file's name and entry
_BLOCK = 10_240  # bytes that tarfile reads ahead

SHARD_ERRORS = (OSError, EOFError, HTTPException, tarfile.TarError, zlib.error, ValueError, ImportError)
"""What tarfile, gzip and the protocols raise for a shard that cannot be read."""


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{08..10}.tar` to a-08.tar, a-09.tar, a-10.tar; several braces give every combination.

    Raises:
        ValueError: a range that ends before it begins, or more than MAX_SHARDS names.
    """
    head, *rest = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    names = [head]
    for first, last, tail in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        num = int(last) - int(first) + 1
        if num < 1 or num * len(names) > MAX_SHARDS:
            raise ValueError(
                f"{without_secrets(pattern)}: {{{first}..{last}}} stands for {max(0, num)} shards; expected 1 to {MAX_SHARDS}"
            )
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        names = [name + number + tail for name in names for number in numbers]
    return names


def without_secrets(text: str) -> str:
    """Remove passwords, signatures and other parameters from the URLs in a text, which may be passed on."""
    return re.sub(r"(\w[\w+.-]*://)(?:[^/\s'\"@]*@)?([^\s'\"?#]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


def is_address(source: str | Path) -> bool:
    """Return whether a data set is at a URL. Only what a person typed is asked this."""
    return "://" in str(source)


def read_shards(urls: Iterable[str]) -> Iterator[tuple[Record, Media]]:
    """Yield the samples of shards; a broken shard ends with a problem that names it.

    Args:
        urls: files, https addresses, or addresses of a file system that fsspec supports.

    Raises:
        ValueError: an unknown protocol.
    """
    for url in urls:
        name, num_samples = without_secrets(url), 0
        try:
            with _open_shard(url) as file:
                for sample in _read_shard(name, file):
                    num_samples += 1
                    yield sample
        except SHARD_ERRORS as error:
            if isinstance(error, ValueError) and str(error).startswith("Protocol not known"):
                raise
            reason = str(error).replace(url, name)
            if query := url.partition("?")[2]:
                reason = reason.replace(f"?{query}", "")
            reason = without_secrets(reason) or type(error).__name__
            rest = f"; {num_samples} samples before were read" if num_samples else ""
            yield unusable(name, f"cannot read the shard: {reason}{rest}")


def _open_shard(url: str) -> IO[bytes]:
    if not is_address(url):
        check_regular(Path(url))
        return open(url, "rb")
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=60)
    import fsspec

    return fsspec.open(url, "rb").open()


class _Counted(io.RawIOBase):
    """Count the bytes that are read from a file."""

    def __init__(self, file: IO[bytes]):
        self.file, self.num_bytes = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.num_bytes += len(content)
        return len(content)


class _BoundedStream:
    """Give `tarfile` the content of a shard, decompressed, but no more than was allowed and than is plausible
    for its size."""

    def __init__(self, file: IO[bytes]):
        self._compressed = _Counted(file)
        buffered = io.BufferedReader(self._compressed)
        self.is_compressed = buffered.peek(2)[:2] == b"\x1f\x8b"
        self._content = gzip.GzipFile(fileobj=buffered) if self.is_compressed else buffered
        self._num_read = 0
        self._num_allowed = 0
        self._tail = b""  # what was read last
        self._at_end = False

    def allow(self, num_bytes: int) -> None:
        self._num_allowed = self._num_read + num_bytes + 2 * _BLOCK

    def read(self, size: int) -> bytes:
        content = self._content.read(size)
        if not content and self._at_end:  # else tarfile skips an announced petabyte block by block
            raise tarfile.ReadError("it is shorter than it announces")
        self._at_end = not content
        self._num_read += len(content)
        if self._num_read > self._num_allowed:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        if self.is_compressed and self._num_read > MAX_EXPANSION * self._compressed.num_bytes + 2**20:
            raise tarfile.ReadError(
                f"the content is more than {MAX_EXPANSION} times as large as the file, as in an archive bomb"
            )
        self._tail = (self._tail + content)[-4 * _BLOCK :]
        return content

    def check_end(self, offset: int) -> None:
        """Raise ReadError if the archive does not end properly at a position: `tarfile` does not tell the end
        from a header that is damaged or cut."""
        self.allow(_BLOCK)
        while not self._at_end and self._num_read < offset + 2 * _BLOCK:
            self.read(_BLOCK)
            self.allow(_BLOCK)
        end = self._tail[len(self._tail) - (self._num_read - offset) :] if self._num_read > offset else b""
        if len(end) < 512:
            raise tarfile.ReadError("it ends without the mark of an archive's end, so it may be cut short")
        if any(end[:512]):
            raise tarfile.ReadError("a damaged header; the files after it are not read")
        if any(end):
            raise tarfile.ReadError("more content after the end, as in joined archives, is not read")


def _read_members(stream: _BoundedStream) -> Iterator[tuple[str, bytes | str]]:
    """Yield the name of each file in a shard with its content, or with the reason why that is not read."""
    stream.allow(MAX_HEADER_BYTES)
    with tarfile.open(fileobj=stream, mode="r|") as shard:  # type: ignore[call-overload]
        while member := shard.next():
            shard.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps the headers of all members
            size = max(0, member.size)
            stream.allow(size + MAX_HEADER_BYTES)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                yield member.name, "is a link, a sparse or a special file; expected its content"
            elif size > (limit := _max_bytes(member.name)):
                yield member.name, f"has {size} bytes, expected at most {limit}"
            else:
                content = shard.extractfile(member)
                assert content is not None
                yield member.name, content.read()
        stream.check_end(shard.offset)  # type: ignore[attr-defined]


def _max_bytes(name: str) -> int:
    return MAX_TEXT_BYTES if name.lower().endswith(_TEXT_SUFFIXES) else MAX_FILE_BYTES


@dataclass
class _Sample:
    """The files of a sample as {lower-case suffix: content}; content that is not needed is empty."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, suffix: str, content: bytes) -> int:
        """Add a file, and return by how many bytes the sample grows; a file without content takes memory, too."""
        others = self.num_bytes
        is_media = suffix in video.SUFFIXES
        if not is_media and suffix not in _TEXT_SUFFIXES:
            if len(self.files) >= MAX_FILES:
                return 0
            content = b""
        previous = self.media_suffix if is_media else None
        self.files[suffix] = content
        self.num_bytes += _FILE_BYTES + len(self.key) + len(content)
        if previous is not None:  # the content of the other one is not needed
            unused = previous if self.media_suffix == suffix else suffix
            self.num_bytes -= len(self.files[unused])
            self.files[unused] = b""
        return self.num_bytes - others

    @property
    def is_complete(self) -> bool:
        return self.media_suffix is not None and (".txt" in self.files or ".json" in self.files)

    @property
    def media_suffix(self) -> str | None:
        """The suffix of the clip; a picture beside a video is its thumbnail."""
        suffixes = [suffix for suffix in self.files if suffix in video.SUFFIXES]
        return min(suffixes, key=lambda suffix: suffix not in video.VIDEO_SUFFIXES, default=None)


def _read_shard(url: str, file: IO[bytes]) -> Iterator[tuple[Record, Media]]:
    """Yield the samples of a shard. The files of a sample usually lie side by side; where they do not, the
    sample waits for the others."""
    waiting: dict[str, _Sample] = {}
    num_waiting_bytes = 0
    current = _Sample("")
    failure: Exception | None = None
    try:
        for name, content in _read_members(_BoundedStream(file)):
            path = PurePosixPath(name)
            if any(map(is_debris, path.parts)):
                continue
            if isinstance(content, str):
                yield unusable(f"{url}/{path}", content)
                continue
            # WebDataset's rule: the key ends at the first dot of the name.
            stem, _, suffix = path.name.partition(".")
            key, suffix = str(path.parent / stem), f".{suffix.lower()}"
            if key != current.key or suffix in current.files:
                complete = [current.key] if current.is_complete else []
                if key in waiting and suffix in waiting[key].files:  # twice: another sample of the same key
                    complete.append(key)
                for done in dict.fromkeys(complete):
                    sample = waiting.pop(done)
                    num_waiting_bytes -= sample.num_bytes
                    yield from _parse_sample(url, sample)
                current = waiting.setdefault(key, _Sample(key))
            num_waiting_bytes += current.add(suffix, content)
            while num_waiting_bytes > MAX_WAITING_BYTES and len(waiting) > 1:
                sample = waiting.pop(next(key for key in waiting if key != current.key))
                num_waiting_bytes -= sample.num_bytes
                yield from _give_up(url, sample)
    except SHARD_ERRORS as error:
        failure = error
        if not (current.is_complete and ".txt" in current.files):
            waiting.pop(current.key, None)  # its other files may be in the part that cannot be read
    for sample in waiting.values():
        yield from _parse_sample(url, sample)
    if failure is not None:
        raise failure


def _give_up(url: str, sample: _Sample) -> Iterator[tuple[Record, Media]]:
    (record, media), *others = _parse_sample(url, sample)
    if not isinstance(media, bytes) or not record.texts:
        reason = f"its other files do not follow within {MAX_WAITING_BYTES} bytes; sort the shard by name"
        record, media = unusable(record.file_name, reason)
    yield from [(record, media), *others]


def _parse_sample(url: str, sample: _Sample) -> Iterator[tuple[Record, Media]]:
    """Yield the clip of a sample, and then its other media, which are skipped; a picture beside a video is no
    clip."""
    suffix, files = sample.media_suffix, sample.files
    name = escape(f"{url}/{sample.key}")
    if suffix is None:
        yield unusable(name, f"no media among {', '.join(files)}")
        return
    try:
        texts = _captions(files)
        concept = texts[0] if texts else escape(sample.key)
        yield Record(name + suffix, texts, concept=concept), files[suffix]
    except ValueError as error:
        yield unusable(name + suffix, error)
    rivals = video.VIDEO_SUFFIXES if suffix in video.VIDEO_SUFFIXES else video.SUFFIXES
    for other in files:
        if other in rivals and other != suffix:
            yield unusable(name + other, f"a second clip of its sample; {sample.key}{suffix} is read")


def _captions(files: dict[str, bytes]) -> tuple[str, ...]:
    """Return the captions in the .txt of a sample, or else in its .json.

    Raises:
        ValueError: one of them is not text, or not JSON.
    """
    if ".txt" in files and (texts := clean_captions(split_lines(decode_text(files[".txt"])))):
        return texts
    if ".json" not in files:
        return ()
    try:
        metadata = parse_json(decode_text(files[".json"]))
    except ValueError as error:
        raise ValueError(f"its .json is not JSON: {error}") from error
    captions = metadata.get("caption") if isinstance(metadata, dict) else None
    captions = captions if isinstance(captions, list) else [captions]
    return clean_captions(caption for caption in captions if isinstance(caption, str))
