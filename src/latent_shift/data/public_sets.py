"""Read UCF-101 and MSR-VTT as they are published."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from latent_shift import video
from latent_shift.data.records import (
    Media,
    Problem,
    Record,
    check_text,
    escape,
    read_text,
    unusable,
)
from latent_shift.files import MAX_JSON_BYTES, parse_json, split_lines

UCF101_FILE = re.compile(r"v_([A-Za-z]+)_g\d\d_c\d\d\.avi")


def ucf101_sentences() -> dict[str, str]:
    """Return {class: sentence} for the 101 classes of UCF-101 (Soomro et al. 2012) in their official
    order."""
    lines = resources.files("latent_shift").joinpath("assets/ucf101.txt").read_text().splitlines()
    return dict(line.split(": ") for line in lines)


def read_ucf101(folder: Path, files: Sequence[Path]) -> tuple[list[tuple[Record, Media]], set[Path]]:
    """Return the clips, with the splits of the first official list or all as "train" without the lists, and
    the lists.

    Raises:
        ValueError: a list is not text.
    """
    sentences, splits = ucf101_sentences(), dict[str, str]()
    lists = {file for file in files if re.fullmatch(r"(train|test)list\d\d\.txt|classInd\.txt", file.name)}
    for split in ("train", "test"):
        for table in sorted(file for file in lists if file.name == f"{split}list01.txt"):
            lines = (line.split() for line in split_lines(read_text(table)))
            splits |= {PurePosixPath(words[0]).name: split for words in lines if words}
    classes = {action.lower(): action for action in sentences}  # one class has other capitals in file names
    clips: list[tuple[Record, Media]] = []
    for file in files:
        if not (match := UCF101_FILE.fullmatch(file.name)):
            continue
        action = classes.get(match[1].lower(), match[1])
        name = escape(str(file.relative_to(folder)))
        if action in sentences:
            split = splits.get(file.name, "unlisted") if splits else "train"
            clips.append((Record(name, (sentences[action],), action, split), file))
        else:
            problem = Problem(name, f"{action} is not one of the 101 classes")
            clips.append((Record(name, (action,), action), problem))
    return clips, lists


def load_msrvtt_annotations(file: Path) -> dict[str, list] | None:
    """Return the annotations of MSR-VTT, or None for another JSON file."""
    with file.open("rb") as opened:
        head = opened.read(4096)
    if not any(key in head for key in (b'"info"', b'"videos"', b'"sentences"')):
        return None
    try:
        annotations = parse_json(read_text(file, max_bytes=MAX_JSON_BYTES))
    except ValueError:
        return None
    is_msrvtt = isinstance(annotations, dict) and all(
        isinstance(annotations.get(key), list) for key in ("videos", "sentences")
    )
    return annotations if is_msrvtt else None


def read_msrvtt(
    folder: Path, files: Sequence[Path], annotations: dict[Path, dict[str, list]]
) -> list[tuple[Record, Media]]:
    """Return the clips in the order of their numbers; rows that cannot be read become problems at the end.

    Args:
        folder: the data set.
        files: the files in it.
        annotations: annotation file -> its content.
    """
    paths = {path.stem: path for path in files if path.suffix.lower() in video.VIDEO_SUFFIXES}
    captions: defaultdict[str, list[str]] = defaultdict(list)
    splits: dict[str, str] = {}
    problems: list[tuple[Record, Media]] = []
    for file, content in annotations.items():
        for key, fields in (("sentences", ("video_id", "caption")), ("videos", ("video_id", "split"))):
            for number, row in enumerate(content[key]):
                try:
                    video_id, value = _text_fields(row, fields)
                    if key == "sentences":
                        captions[video_id] += [value] if value else []
                    elif video_id in splits:
                        raise ValueError(f"{video_id} is listed twice; the first is used")
                    else:
                        splits[video_id] = "val" if value == "validate" else value
                except ValueError as error:
                    problems.append(unusable(f"{file.relative_to(folder)}: {key}[{number}]", error))
    clips: list[tuple[Record, Media]] = []
    for video_id in sorted(splits, key=_natural_order):
        path = paths.get(video_id)
        name = escape(str(path.relative_to(folder)) if path else video_id)
        record = Record(name, tuple(captions[video_id]), video_id, splits[video_id])
        clips.append((record, path or Problem(name, "no such video")))
    return clips + problems


def _text_fields(row: Any, names: Sequence[str]) -> list[str]:
    """Return the fields of an annotation without the spaces around them; a missing split is "train".

    Raises:
        ValueError: a field is missing, or is not text.
    """
    values = {"split": "train", **row} if isinstance(row, dict) else {}
    for name in names:
        if not isinstance(values.get(name), str):
            raise ValueError(f"expected {' and '.join(names)} as text, got {str(row)[:80]}")
    return [check_text(values[name], name).strip() for name in names]


def _natural_order(video_id: str) -> tuple[int, str]:
    digits = video_id.removeprefix("video")
    return (int(digits) if digits.isdecimal() and len(digits) < 20 else 10**20, video_id)
