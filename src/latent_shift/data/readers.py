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
set. It yields every file of a folder, those that are not used with the reason.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import length_hint
from pathlib import Path

from latent_shift import video
from latent_shift.data.listing import list_files
from latent_shift.data.public_sets import (
    UCF101_FILE,
    load_msrvtt_annotations,
    read_msrvtt,
    read_ucf101,
    ucf101_sentences,
)
from latent_shift.data.records import (
    MAX_CAPTION_BYTES,
    Media,
    Problem,
    Record,
    clean_captions,
    escape,
    read_text,
    unusable,
)
from latent_shift.data.shards import TAR_SUFFIXES, expand_braces, is_address, read_shards
from latent_shift.data.tables import read_table
from latent_shift.files import split_lines

__all__ = ["Media", "Problem", "Record", "expand_braces", "find_splits", "read", "ucf101_sentences"]

_ARCHIVE_SUFFIXES = (".zip", ".rar", ".7z", ".bz2", ".xz", ".zst", ".gz", *TAR_SUFFIXES)
_MEDIA_SUFFIXES = {
    ".ts",
    ".mts",
    ".m2ts",
    ".vob",
    ".wmv",
    ".flv",
    ".3gp",
    ".mxf",
    ".rm",
    ".ogv",
    ".heic",
    ".dng",
}
_NO_CAPTIONS = (
    "expected metadata.jsonl or metadata.csv, .tar shards, UCF-101, MSR-VTT, or media files each with a caption in a "
    ".txt of the same name"
)


def read(source: str | Path) -> Iterator[tuple[Record, Media]]:
    """Yield the clips of a data set in a fixed order, each as a record with its media.

    Args:
        source: a folder, table, shard or URL in one of the layouts above.

    Raises:
        ValueError: no known layout, or a table without the columns; the message names it.
    """
    path = Path(source)
    if is_address(source):
        return read_shards(expand_braces(str(source)))
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in (".jsonl", ".csv"):
        return iter(read_table(path))
    if path.name.lower().endswith(TAR_SUFFIXES) or "{" in path.name:
        return read_shards(expand_braces(str(source)))
    expected = (
        "expected a folder, a .jsonl or .csv table or .tar shards" if path.exists() else "no such folder"
    )
    raise ValueError(f"{path}: {expected}")


def find_splits(source: str | Path) -> set[str] | None:
    """Return the names of the splits in a data set, or None where only reading all of it would tell."""
    clips = read(source)
    if not length_hint(clips):
        return None
    return {record.split for record, media in clips if not isinstance(media, Problem)}


def _read_folder(folder: Path) -> Iterator[tuple[Record, Media]]:
    """Yield the clips in a folder, and then the files that are not used."""
    folder = folder.absolute()  # FFmpeg takes "12:30.mp4" for an address
    if (folder / "store.json").exists():
        raise ValueError(f"{folder}: is a packed data set already; expected captioned videos")
    files, problems = list_files(folder)
    clips: Iterable[tuple[Record, Media]]
    top_level = {file.name: file for file in files if file.parent == folder}
    table = next((top_level[name] for name in ("metadata.jsonl", "metadata.csv") if name in top_level), None)
    shards = [file for file in files if file.name.lower().endswith(TAR_SUFFIXES)]
    captions = {file.with_suffix("") for file in files if file.suffix.lower() == ".txt"}
    has_clips = any(
        file.suffix.lower() in video.SUFFIXES and file.with_suffix("") in captions for file in files
    )
    used: set[Path]
    if table:
        clips = read_table(table)
        used = {table}
        reason = f"is not listed in {table.name}"
    elif shards and not has_clips:
        clips = read_shards(map(str, shards))
        used = set(shards)
        reason = "lies beside shards, which are read instead"
    elif any(UCF101_FILE.fullmatch(file.name) for file in files):
        clips, used = read_ucf101(folder, files)
        reason = "is not named as the videos of UCF-101, which are read instead"
    elif annotations := _find_msrvtt_annotations(files):
        clips, used = read_msrvtt(folder, files, annotations), set(annotations)
        reason = "is not listed in the annotations of MSR-VTT, which are read instead"
    else:
        clips, used = _read_captioned_files(folder, files)
        reason = "is not read"
    if isinstance(clips, list):
        used |= {media for _, media in clips if isinstance(media, Path)}
    stems = {file.with_suffix("") for file in files if file.suffix.lower() != ".txt"}
    unused = [_explain_unused(file, folder, stems, reason) for file in files if file not in used]
    rest = [(Record(problem.file_name, (), ""), problem) for problem in (*problems, *unused)]
    return iter([*clips, *rest]) if isinstance(clips, list) else chain(clips, rest)


def _find_msrvtt_annotations(files: list[Path]) -> dict[Path, dict[str, list]]:
    candidates = ((file, load_msrvtt_annotations(file)) for file in files if file.suffix == ".json")
    return {file: annotations for file, annotations in candidates if annotations}


def _read_captioned_files(folder: Path, files: list[Path]) -> tuple[list[tuple[Record, Media]], set[Path]]:
    """Return the media files with their captions, and the files that were used."""
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    if not captions:
        raise ValueError(f"{folder}: {_NO_CAPTIONS}")
    clips: list[tuple[Record, Media]] = []
    used: set[Path] = set()
    for path in files:
        if path.suffix.lower() not in video.SUFFIXES:
            continue
        name, texts = escape(str(path.relative_to(folder))), tuple[str, ...]()
        used.add(path)
        if caption_file := captions.get(path.with_suffix("")):
            used.add(caption_file)
            try:
                texts = clean_captions(split_lines(read_text(caption_file, max_bytes=MAX_CAPTION_BYTES)))
            except (ValueError, OSError) as error:
                clips.append(unusable(name, _without_folder(error, folder)))
                continue
        clips.append((Record(name, texts, concept=texts[0] if texts else escape(path.stem)), path))
    return clips, used


def _without_folder(error: Exception, folder: Path) -> str:
    return str(error).replace(f"{folder}/", "")


def _explain_unused(file: Path, folder: Path, stems: set[Path], reason: str) -> Problem:
    """Return why a file is not used. Files that are no media, archive or caption are ignored.

    Args:
        file: the file.
        folder: the data set.
        stems: paths of all its files except captions, without their suffixes.
        reason: why media files are not used.
    """
    name, suffix = escape(str(file.relative_to(folder))), file.suffix.lower()
    if suffix in video.SUFFIXES:
        return Problem(name, reason)
    if suffix in _ARCHIVE_SUFFIXES:
        return Problem(name, "an archive beside loose files; unpack it, or read shards on their own")
    if suffix == ".txt":
        if file.with_suffix("") in stems:
            return Problem(name, "a text that is not read", "ignored")
        return Problem(name, "a text without a video or picture of its name")
    kind = (mimetypes.guess_type(f"x{suffix}")[0] or "").partition("/")[0]
    has_caption = any(file.with_suffix(text).exists() for text in (".txt", ".TXT"))
    if kind in ("video", "image") or suffix in _MEDIA_SUFFIXES or has_caption:
        expected = " ".join(sorted(video.SUFFIXES))
        return Problem(name, f"{suffix or 'a file without suffix'} is not read; expected {expected}")
    return Problem(name, "neither a video, a picture nor a caption", "ignored")
