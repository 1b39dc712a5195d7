"""Read captioned clips from the layouts in which data sets are published.

    folder/                 metadata.jsonl or metadata.csv with the columns file_name and text, and optionally
                            concept, split and loop; in JSON, text may also be a list of captions
    folder/                 media files, each with its captions in a .txt file of the same name, one per line
    list.jsonl, list.csv    the same table anywhere; file names are relative to it
    shards/*.tar            WebDataset: KEY.mp4 with KEY.txt, or with KEY.json that has a "caption"; also a
                            single .tar, or a URL (https, or any file system that fsspec supports), where
                            {000..127} stands for a range of numbers
    UCF101/                 v_<Class>_g01_c01.avi in any subfolder; the official splits if ucfTrainTestlist/
                            is there
    MSRVTT/                 the annotation .json with "videos" and "sentences", and video0.mp4 ... in any
                            subfolder

`read` detects the layout and yields one record and its media at a time, so memory does not grow with the data
set.

Shards are read with `tarfile` and not with webdataset, because after a truncated shard
`webdataset.tariterators` returns the incomplete sample, completed with files of the next shard where the keys
are equal, and reports the error outside the stream.
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
from typing import IO, Any
from urllib.request import urlopen

from latent_shift import video

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
Media = Path | bytes | str
"""A file, the content of a file, or the reason why the media is unavailable."""


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
    """

    file_name: str
    texts: tuple[str, ...]
    concept: str
    split: str = "train"
    loop: bool = False
    shard: str = ""
    start: int = 0
    num_frames: int = 0


def read(source: str | Path) -> Iterator[tuple[Record, Media]]:
    """Yield the clips of a data set in a fixed order, each as a record with its media.

    Args:
        source: a folder, table, shard or URL in one of the layouts above.

    Raises:
        ValueError: no known layout, or a table with an invalid line; the message names it.
    """
    path = Path(source)
    if "://" in str(source) or path.name.endswith(TAR_SUFFIXES) or "{" in path.name:
        return _read_shards(expand_braces(str(source)))
    if path.suffix in (".jsonl", ".csv"):
        return _read_table(path)
    if not path.is_dir():
        expected = (
            "expected a folder, a .jsonl or .csv table or .tar shards" if path.exists() else "no such folder"
        )
        raise ValueError(f"{path}: {expected}")
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).exists():
            return _read_table(path / name)
    if shards := sorted(file for file in path.iterdir() if file.name.endswith(TAR_SUFFIXES)):
        return _read_shards(map(str, shards))
    if actions := sorted(file for file in path.rglob("v_*.avi") if _UCF101_FILE.fullmatch(file.name)):
        return _read_ucf101(path, actions)
    annotations = [_load_msrvtt_annotations(file) for file in sorted(path.rglob("*.json"))]
    if any(annotations):
        return _read_msrvtt(path, list(filter(None, annotations)))
    return _read_captioned_files(path)


def find_splits(source: str | Path) -> set[str] | None:
    """Return the names of the splits in a data set, or None where only reading all of it would tell."""
    path = Path(source)
    is_local = path.is_dir() or path.suffix in (".jsonl", ".csv")
    if not is_local or any(file.name.endswith(TAR_SUFFIXES) for file in path.glob("*")):
        return None
    return {record.split for record, _ in read(source)}


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{08..10}.tar` to a-08.tar, a-09.tar, a-10.tar; several braces give every combination."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces:
        return [pattern]
    first, last = braces.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [name for number in numbers for name in expand_braces(head + number + tail)]


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file."""
    # `str.splitlines` would also split at Unicode's line separators, which occur in captions.
    return read_text(path).removesuffix("\n").split("\n")


def _read_table(table: Path) -> Iterator[tuple[Record, Media]]:
    if not table.exists():
        raise ValueError(f"{table}: no such file")
    if table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(table), newline=""), restkey=_EXTRA_CELLS, restval="")
        rows: Iterable[tuple[int, Any]] = ((reader.line_num, row) for row in reader)
    else:
        rows = enumerate(read_lines(table), 1)
    records = []
    for line_number, row in rows:
        try:
            records.append(_parse_row(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            line = row if isinstance(row, str) else json.dumps(row)
            problem = f"expected file_name and text, got {line[:80]!r} ({error})"
            raise ValueError(f"{table}:{line_number}: {problem}") from error
    return iter([(record, table.parent / record.file_name) for record in records])


_EXTRA_CELLS = "more columns"


def _parse_row(row: str | dict[str, Any]) -> Record:
    """Return the record of a JSON line or of the cells of a CSV line; empty cells and null count as
    absent."""
    if isinstance(row, str):
        row = {key: value for key, value in json.loads(row).items() if value is not None}
    else:
        row = {key: value for key, value in row.items() if value or key == "text"}
    if extra := row.get(_EXTRA_CELLS):
        raise ValueError(f"{len(extra)} more columns than the header; a comma in a caption needs quotes")
    captions = [row["text"]] if isinstance(row["text"], str) else row["text"]
    texts = tuple(caption for caption in captions if str.strip(caption))
    name, split, loop = row["file_name"], row.get("split", "train"), row.get("loop", False)
    if isinstance(loop, str):
        loop = loop.lower() in ("1", "true", "yes")
    if not (isinstance(name, str) and isinstance(split, str) and isinstance(loop, bool)):
        raise TypeError("file_name and split must be text, loop must be true or false")
    return Record(name, texts, str(row.get("concept", texts[0] if texts else name)), split, loop)


def _read_captioned_files(folder: Path) -> Iterator[tuple[Record, Media]]:
    clips = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in video.SUFFIXES):
        caption_file = path.with_suffix(".txt")
        lines = read_text(caption_file).splitlines() if caption_file.exists() else []
        texts = tuple(line.strip() for line in lines if line.strip())
        clips.append(
            (Record(str(path.relative_to(folder)), texts, concept=texts[0] if texts else path.stem), path)
        )
    if not any(record.texts for record, _ in clips):
        raise ValueError(
            f"{folder}: expected metadata.jsonl or metadata.csv, .tar shards, UCF-101, MSR-VTT, or media files each "
            "with a caption in a .txt of the same name"
        )
    return iter(clips)


def _read_shards(urls: Iterable[str]) -> Iterator[tuple[Record, Media]]:
    """Yield the samples of WebDataset shards; a broken shard ends with a record whose media is the reason."""
    for url in urls:
        try:
            with _open_shard(url) as file, tarfile.open(fileobj=file, mode="r|*") as shard:
                for key, files in _group_by_key(shard):
                    yield _shard_sample(url, key, files)
        except (OSError, EOFError, HTTPException, tarfile.TarError, ImportError) as error:
            yield Record(url, (url,), url), f"cannot read the shard: {error or type(error).__name__}"


def _open_shard(url: str) -> IO[bytes]:
    if "://" not in url:
        return open(url, "rb")
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=60)
    import fsspec

    return fsspec.open(url, "rb").open()


def _group_by_key(shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key of each sample and its files as {lower-case suffix: content}."""
    sample_key, files = "", dict[str, bytes]()
    for member in shard:
        shard.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps the headers of all members
        if not member.isfile():
            continue
        path = PurePosixPath(member.name)
        # WebDataset's rule: the key ends at the first dot of the name.
        stem, _, suffix = path.name.partition(".")
        key = str(path.parent / stem)
        if key != sample_key and files:
            yield sample_key, files
            files = {}
        sample_key = key
        content = shard.extractfile(member)
        assert content is not None
        files[f".{suffix.lower()}"] = content.read()
    if files:
        yield sample_key, files


def _shard_sample(url: str, key: str, files: dict[str, bytes]) -> tuple[Record, Media]:
    suffix = next((suffix for suffix in files if suffix in video.SUFFIXES), None)
    if suffix is None:
        return Record(f"{url}/{key}", (key,), key), f"no media among {', '.join(files)}"
    captions: Any = files[".txt"].decode(errors="replace").splitlines() if ".txt" in files else []
    if not captions and ".json" in files:
        try:
            captions = json.loads(files[".json"])["caption"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            captions = []
        captions = captions if isinstance(captions, list) else [captions]
    texts = tuple(caption.strip() for caption in captions if isinstance(caption, str) and caption.strip())
    return Record(f"{url}/{key}{suffix}", texts, concept=texts[0] if texts else key), files[suffix]


_UCF101_FILE = re.compile(r"v_([A-Za-z]+)_g\d\d_c\d\d\.avi")


def ucf101_sentences() -> dict[str, str]:
    """Return {class: sentence} for the 101 classes of UCF-101 (Soomro et al. 2012) in their official
    order."""
    lines = resources.files("latent_shift").joinpath("assets/ucf101.txt").read_text().splitlines()
    return dict(line.split(": ") for line in lines)


def _read_ucf101(folder: Path, files: list[Path]) -> Iterator[tuple[Record, Media]]:
    """Yield the clips with the splits of the first official list, or all as "train" without the lists."""
    sentences, splits = ucf101_sentences(), dict[str, str]()
    for split in ("train", "test"):
        for table in sorted(folder.rglob(f"{split}list01.txt")):
            splits |= {
                PurePosixPath(line.split()[0]).name: split for line in read_lines(table) if line.strip()
            }
    classes = {action.lower(): action for action in sentences}  # one class has other capitals in file names
    for file in files:
        action = file.name.split("_")[1]
        action = classes.get(action.lower(), action)
        name = str(file.relative_to(folder))
        if action in sentences:
            split = splits.get(file.name, "unlisted") if splits else "train"
            yield Record(name, (sentences[action],), action, split), file
        else:
            yield Record(name, (action,), action), f"{action} is not one of the 101 classes"


def _load_msrvtt_annotations(file: Path) -> dict | None:
    """Return the annotations of MSR-VTT, or None for another JSON file."""
    with file.open("rb") as opened:
        head = opened.read(4096)
    if not any(key in head for key in (b'"info"', b'"videos"', b'"sentences"')):
        return None
    try:
        annotations = json.loads(read_text(file))
    except json.JSONDecodeError:
        return None
    return (
        annotations
        if isinstance(annotations, dict) and {"videos", "sentences"} <= annotations.keys()
        else None
    )


def _read_msrvtt(folder: Path, annotations: list[dict]) -> Iterator[tuple[Record, Media]]:
    files = {
        path.stem: path for path in folder.rglob("video*") if path.suffix.lower() in video.VIDEO_SUFFIXES
    }
    captions = defaultdict(list)
    for annotation in annotations:
        for sentence in annotation["sentences"]:
            captions[sentence["video_id"]].append(sentence["caption"].strip())
    videos = [row for annotation in annotations for row in annotation["videos"]]
    for row in sorted(videos, key=lambda row: int(row["video_id"].removeprefix("video"))):
        video_id = row["video_id"]
        path = files.get(video_id)
        name = str(path.relative_to(folder)) if path else video_id
        split = "val" if row["split"] == "validate" else row["split"]
        yield Record(name, tuple(captions[video_id]), video_id, split), path or "no such video"
