"""Where captioned clips come from, each in the layout in which people have it.

    folder/                 metadata.jsonl or metadata.csv: file_name, text (in JSON also a list of wordings), and whoever wants to,
                            concept, split, loop
    folder/                 media files, each beside a .txt caption (a line a wording)
    list.jsonl, list.csv    the same table anywhere; file names are relative to it
    shards/*.tar            WebDataset: KEY.mp4 beside KEY.txt, or KEY.json with a "caption"; also one .tar, or a URL: https, or of any
                            file system that fsspec knows, with {000..127} for a range
    UCF101/                 v_<Class>_g01_c01.avi anywhere below; with ucfTrainTestlist/ beside them the official splits
    MSRVTT/                 the annotation .json with "videos" and "sentences", and video0.mp4 ... anywhere below

`read` finds out which it is and yields a record and its media, one after the other: of the media nothing is held but the clip at hand.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.request import urlopen

from latent_shift import video

TARS = (".tar", ".tar.gz", ".tgz")
Media = Path | bytes | str
"""A file, the contents of one, or the reason why there is none."""


@dataclass(frozen=True)
class Record:
    """One clip or still. `texts[0]` is the caption, the others are wordings of it; `loop`: the last frame runs on into the first;
    `shard`, `start` and `num_frames` say where it lies in a store."""

    file_name: str
    texts: tuple[str, ...]
    concept: str
    split: str = "train"
    loop: bool = False
    shard: str = ""
    start: int = 0
    num_frames: int = 0


def read(source: str | Path) -> Iterator[tuple[Record, Media]]:
    """The clips of `source` in a fixed order, each record with its media.

    Raises:
        ValueError: nothing there in any of the layouts above, or a table with a line that is not a record; the message names it.
    """
    path = Path(source)
    if "://" in str(source) or path.name.endswith(TARS) or "{" in path.name:
        return _shards(expand(str(source)))
    if path.suffix in (".jsonl", ".csv"):
        return _table(path)
    if not path.is_dir():
        raise ValueError(
            f"{path}: expected a folder, a .jsonl or .csv table or .tar shards" if path.exists() else f"{path}: no such folder"
        )
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).exists():
            return _table(path / name)
    if tars := sorted(file for file in path.iterdir() if file.name.endswith(TARS)):
        return _shards(map(str, tars))
    if actions := sorted(file for file in path.rglob("v_*.avi") if _UCF.fullmatch(file.name)):
        return _ucf101(path, actions)
    if annotations := [rows for file in sorted(path.rglob("*.json")) if (rows := _annotations(file))]:
        return _msrvtt(path, annotations)
    return _captions(path)


def splits_of(source: str | Path) -> set[str] | None:
    """The splits that the clips of `source` have, where they can be told without reading all of them."""
    path = Path(source)
    if not (path.is_dir() or path.suffix in (".jsonl", ".csv")) or any(file.name.endswith(TARS) for file in path.glob("*")):
        return None
    return {record.split for record, _ in read(source)}


def expand(pattern: str) -> list[str]:
    """`a-{08..11}.tar` as a-08.tar, a-09.tar, a-10.tar, a-11.tar; several braces as every combination."""
    if not (found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [pattern]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [whole for number in numbers for whole in expand(pattern[: found.start()] + number + pattern[found.end() :])]


def _table(table: Path) -> Iterator[tuple[Record, Media]]:
    if not table.exists():
        raise ValueError(f"{table}: no such file")
    if table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text_of(table), newline=""), restkey="more columns", restval="")
        rows: Iterable[tuple[int, Any]] = ((reader.line_num, row) for row in reader)
    else:
        rows = enumerate(lines_of(table), 1)
    records = []
    for number, row in rows:
        try:
            row = json.loads(row) if isinstance(row, str) else {key: value for key, value in row.items() if value or key == "text"}
            row = {key: value for key, value in row.items() if value is not None}
            if more := row.get("more columns"):
                raise KeyError(f"{len(more)} more columns than the head; a comma in a caption needs quotes")
            texts = tuple(text for text in ([row["text"]] if isinstance(row["text"], str) else row["text"]) if str.strip(text))
            name = row["file_name"]
            optional = {key: row[key] for key in ("split", "loop") if key in row}
            if isinstance(optional.get("loop"), str):
                optional["loop"] = optional["loop"].lower() in ("1", "true", "yes")
            if (
                not isinstance(name, str)
                or not isinstance(optional.get("split", ""), str)
                or not isinstance(optional.get("loop", False), bool)
            ):
                raise TypeError("file_name and split are texts, loop is true or false")
            records.append(Record(name, texts, str(row.get("concept", texts[0] if texts else name)), **optional))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            shown = row if isinstance(row, str) else json.dumps(row)
            raise ValueError(f"{table}:{number}: expected file_name and text, got {shown[:80]!r} ({error})") from error
    return iter([(record, table.parent / record.file_name) for record in records])


def _captions(folder: Path) -> Iterator[tuple[Record, Media]]:
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in video.SUFFIXES):
        caption = path.with_suffix(".txt")
        texts = tuple(line.strip() for line in text_of(caption).splitlines() if line.strip()) if caption.exists() else ()
        found.append((Record(str(path.relative_to(folder)), texts, concept=texts[0] if texts else path.stem), path))
    if not any(record.texts for record, _ in found):
        raise ValueError(
            f"{folder}: expected metadata.jsonl or metadata.csv, .tar shards, UCF-101, MSR-VTT, or media files each with a caption in "
            "a .txt of the same name"
        )
    return iter(found)


def _shards(urls: Iterable[str]) -> Iterator[tuple[Record, Media]]:
    """A shard that cannot be read, or not to its end, is one record with the reason; what came before it counts."""
    for url in urls:
        try:
            with _open(url) as file, tarfile.open(fileobj=file, mode="r|*") as shard:
                yield from _samples(url, shard)
        except (OSError, EOFError, HTTPException, tarfile.TarError, ImportError) as error:
            yield Record(url, (url,), url), f"the shard cannot be read on: {error or type(error).__name__}"


def _open(url: str):
    if "://" not in url:
        return open(url, "rb")
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=60)
    import fsspec

    return fsspec.open(url, "rb").open()


def _samples(url: str, shard: tarfile.TarFile) -> Iterator[tuple[Record, Media]]:
    key, parts = "", dict[str, bytes]()
    for member in shard:
        if not member.isfile():
            continue
        path = PurePosixPath(member.name)
        suffix = "." + path.name.partition(".")[2].lower()  # WebDataset's rule: the key ends at the first dot of the name
        own = str(path.parent / path.name.partition(".")[0])
        if own != key:
            yield from _sample(url, key, parts)
            key, parts = own, {}
        file = shard.extractfile(member)
        assert file is not None
        parts[suffix] = file.read()
    yield from _sample(url, key, parts)


def _sample(url: str, key: str, parts: dict[str, bytes]) -> Iterator[tuple[Record, Media]]:
    suffix = next((suffix for suffix in parts if suffix in video.SUFFIXES), None)
    if suffix is None:
        if parts:
            yield Record(f"{url}/{key}", (key,), key), f"no media among {', '.join(parts)}"
        return
    texts: Any = parts[".txt"].decode(errors="replace").splitlines() if ".txt" in parts else []
    if not texts and ".json" in parts:
        try:
            texts = json.loads(parts[".json"])["caption"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            texts = []
        texts = texts if isinstance(texts, list) else [texts]
    texts = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    yield Record(f"{url}/{key}{suffix}", texts, concept=texts[0] if texts else key), parts[suffix]


_UCF = re.compile(r"v_([A-Za-z]+)_g\d\d_c\d\d\.avi")


def ucf101_sentences() -> dict[str, str]:
    """Class -> sentence, for the 101 classes of UCF-101 (Soomro et al. 2012), in their official order."""
    lines = resources.files("latent_shift").joinpath("assets/ucf101.txt").read_text().splitlines()
    return dict(line.split(": ") for line in lines)


def _ucf101(folder: Path, files: list[Path]) -> Iterator[tuple[Record, Media]]:
    """The splits are those of the first list; without lists all is train."""
    sentences, splits = ucf101_sentences(), dict[str, str]()
    for split in ("train", "test"):
        for table in sorted(folder.rglob(f"{split}list01.txt")):
            splits |= {PurePosixPath(line.split()[0]).name: split for line in lines_of(table) if line.strip()}
    classes = {action.lower(): action for action in sentences}  # a class's folder and its files differ in capitals
    for file in files:
        action = _UCF.fullmatch(file.name)[1]  # type: ignore[index]
        action, name = classes.get(action.lower(), action), str(file.relative_to(folder))
        if action in sentences:
            yield Record(name, (sentences[action],), action, splits.get(file.name, "train" if not splits else "unlisted")), file
        else:
            yield Record(name, (action,), action), f"{action} is none of the 101 classes"


def _annotations(file: Path) -> dict | None:
    head = file.open("rb").read(4096)
    if b'"info"' not in head and b'"videos"' not in head and b'"sentences"' not in head:
        return None
    try:
        rows = json.loads(text_of(file))
    except json.JSONDecodeError:
        return None  # somebody's log of lines
    return rows if isinstance(rows, dict) and {"videos", "sentences"} <= rows.keys() else None


def _msrvtt(folder: Path, annotations: list[dict]) -> Iterator[tuple[Record, Media]]:
    files = {path.stem: path for path in folder.rglob("video*") if path.suffix.lower() in video.VIDEO_SUFFIXES}
    texts = defaultdict(list)
    for sentence in (row for rows in annotations for row in rows["sentences"]):
        texts[sentence["video_id"]].append(sentence["caption"].strip())
    for row in sorted((row for rows in annotations for row in rows["videos"]), key=lambda row: int(row["video_id"].removeprefix("video"))):
        name = row["video_id"]
        path = files.get(name)
        split = {"validate": "val"}.get(row["split"], row["split"])
        record = Record(str(path.relative_to(folder)) if path else name, tuple(texts[name]), name, split)
        yield record, path or "no such video"


def lines_of(path: Path) -> list[str]:
    """The lines of a .jsonl file. (`str.splitlines` also splits where a caption has one of Unicode's other line separators.)"""
    return text_of(path).removesuffix("\n").split("\n")


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark some editors put in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from error
