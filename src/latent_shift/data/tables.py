"""Read the tables that list captioned media: `.jsonl` and `.csv` with the columns file_name and text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_shift.data.records import (
    Media,
    Problem,
    Record,
    check_text,
    decode_text,
    escape,
    unusable,
)
from latent_shift.files import check_regular, parse_json, split_lines

_EXTRA_CELLS = "more columns"
_COLUMNS = {"file_name", "text"}
_TRUE = {"1", "1.0", "true", "t", "yes", "y", "on"}
_FALSE = {"0", "0.0", "false", "f", "no", "n", "off"}


def read_table(table: Path) -> list[tuple[Record, Media]]:
    """Return the clips of a table in its order, and then what is wrong with its splits; a line that cannot be
    read becomes a problem.

    Args:
        table: a `.jsonl` or `.csv` file; its file names are relative to it.

    Raises:
        ValueError: no such file, or none with the columns once each.
    """
    if not table.exists():
        raise ValueError(f"{table}: no such file")
    check_regular(table)
    parse = _csv_rows if table.suffix.lower() == ".csv" else _json_rows
    clips: list[tuple[Record, Media]] = []
    for line_number, row in parse(table):
        try:
            if isinstance(row, Exception):
                raise row
            record = _parse_row(row)
            clips.append((record, _locate(table.absolute().parent, row["file_name"].strip())))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            got = "" if isinstance(row, Exception) else f", got {str(row)[:80]}"
            problem = f"expected file_name and text{got} ({reason})"
            clips.append(unusable(f"{table.name}:{line_number}", problem))
    return clips + [
        (Record(problem.file_name, (), ""), problem) for problem in _find_split_problems(table, clips)
    ]


def _find_split_problems(table: Path, clips: list[tuple[Record, Media]]) -> Iterator[Problem]:
    """Yield the files that are in two splits, and the splits whose names differ in capitals alone."""
    first_splits: dict[Path, str] = {}
    for record, media in clips:
        if (
            isinstance(media, Path)
            and (first := first_splits.setdefault(media, record.split)) != record.split
        ):
            reason = (
                f"in split {record.split}, also in split {first}; a held-out clip must be in one split alone"
            )
            yield Problem(record.file_name, reason, "kept")
    first_names: dict[str, str] = {}
    for split in dict.fromkeys(record.split for record, media in clips if isinstance(media, Path)):
        if (name := first_names.setdefault(split.casefold(), split)) != split:
            reason = f"split {split} differs from split {name} in capitals alone, and is another split"
            yield Problem(table.name, reason, "kept")


def _json_rows(table: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line that is not blank, and its value or the error in it."""
    for number, line in enumerate(split_lines(_read_table_text(table)), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(check_text(line, "the line"), unique_keys=True)
        except ValueError as error:
            yield number, ValueError(f"not JSON: {error}")


def _csv_rows(table: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line, and its cells or the error in it.

    Raises:
        ValueError: a header without the columns, or with one twice.
    """
    text = _read_table_text(table).removesuffix("\n")
    # Strict: a quote that is never closed would take all the lines after it into one caption.
    reader = csv.DictReader(
        io.StringIO(text, newline=""), restkey=_EXTRA_CELLS, restval=None, strict=True, skipinitialspace=True
    )
    try:
        reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
    except csv.Error as error:
        raise ValueError(f"{table}:1: {error}") from error
    if not set(header) >= _COLUMNS:
        raise ValueError(f"{table}: expected the columns file_name and text, got {', '.join(header)[:80]!r}")
    if repeated := [name for name in header if name and header.count(name) > 1]:
        count = header.count(repeated[0])
        raise ValueError(f"{table}: has {count} columns {repeated[0]}; expected one, rename the others")
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f"{first} to the end" if "unexpected end" in str(error) else str(first)
            yield first, ValueError(f"lines {lines}: {error}; a quote in a caption is written twice")
        else:
            yield reader.line_num, row


def _read_table_text(table: Path) -> str:
    """Return the text of a table; bytes that are not UTF-8 are left to the check of their own line."""
    content = table.read_bytes()
    try:
        return decode_text(content)
    except ValueError as error:
        if "UTF-16" in str(error):
            raise ValueError(f"{table}: {error}") from error
        return content.decode("utf-8-sig", "surrogateescape")


def _parse_row(row: Any) -> Record:
    """Return the record of a JSON object or of the cells of a CSV line; null and empty cells count as absent.

    Raises:
        ValueError, KeyError, TypeError: a value is missing, or of another type.
    """
    if not isinstance(row, dict):
        raise TypeError(f"expected an object, got {type(row).__name__}")
    if extra := row.get(_EXTRA_CELLS):
        raise ValueError(f"{len(extra)} more columns than the header; a comma in a caption needs quotes")
    row = {
        key: value.strip() if isinstance(value, str) and key != "text" else value
        for key, value in row.items()
    }
    row = {key: value for key, value in row.items() if value is not None and (value != "" or key == "text")}
    captions = [row["text"]] if isinstance(row["text"], str) else row["text"]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("text must be a text or a list of texts")
    texts = tuple(check_text(caption, "the caption") for caption in captions if caption.strip())
    name, split, loop = row["file_name"], row.get("split", "train"), row.get("loop", False)
    if isinstance(loop, str) and loop.lower() in _TRUE | _FALSE:
        loop = loop.lower() in _TRUE
    if not (isinstance(name, str) and isinstance(split, str) and isinstance(loop, bool)):
        raise TypeError("file_name and split must be text, loop must be true or false")
    concept = row.get("concept", texts[0] if texts else name)
    if not isinstance(concept, (str, int, float)):
        raise TypeError("concept must be text")
    return Record(escape(name), texts, check_text(str(concept), "concept"), check_text(split, "split"), loop)


def _locate(folder: Path, name: str) -> Path:
    """Return the path of a file that a table names.

    Raises:
        ValueError: an address, or a path that leaves the folder.
    """
    path = Path(name)
    if "://" in name:
        raise ValueError("file_name is an address; only files beside the table are read")
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise ValueError("file_name leaves the folder of the table; expected a path below it")
    if "\0" in name or not name.strip():
        raise ValueError("file_name is empty or holds a NUL character")
    return folder / path
