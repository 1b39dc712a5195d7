"""Tables of results: systems in columns, measures in rows, and systems that were trained with several seeds
merged into one column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_shift.evaluation.records import Record, read_records
from latent_shift.files import markdown_table


@dataclass(frozen=True)
class Spread:
    """A value over training seeds: mean, least and greatest."""

    mean: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(float(np.mean(values)), min(values), max(values))


@dataclass(frozen=True)
class Cell:
    """A number of a system, or of a system that was trained with several seeds.

    Attributes:
        record: of the system; of several seeds, of the first one.
        seeds: the value over the seeds; None: one seed.
        more: the difference from the first system over the seeds; None: one seed, or no difference
            (`record.difference` has it).
    """

    record: Record
    seeds: Spread | None = None
    more: Spread | None = None


@dataclass(frozen=True)
class Table:
    """Numbers of several systems.

    Attributes:
        systems: the results file of each column; of several training seeds, of the first one.
        num_seeds: training seeds of each column.
        measures: record names, one a row.
        cells: for each measure the cell of each system, then that of the real clips; None: not measured.
    """

    systems: list[dict[str, Any]]
    num_seeds: list[int]
    measures: list[str]
    cells: list[list[Cell | None]]

    @property
    def names(self) -> list[str]:
        return [result["system"]["system"] for result in self.systems]


def parse_seeds(options: Sequence[str]) -> dict[str, list[str]]:
    """Read `SYSTEM=OTHER,...` options: systems that differ from SYSTEM in the training seed alone.

    Raises:
        ValueError: an option of another form.
    """
    groups = {}
    for option in options:
        system, _, others = option.partition("=")
        if not system or not others:
            raise ValueError(f"--seeds {option}: expected SYSTEM=OTHER,..., for example shift=seed-1,seed-2")
        groups[system] = others.split(",")
    return groups


def find_seeds(names: Sequence[str]) -> dict[str, list[str]]:
    """Group systems by name: `SYSTEM-seed-N` belongs to SYSTEM, where that is among the names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)-seed-\d+", name)
        if match and match[1] in names:
            groups.setdefault(match[1], []).append(name)
    return groups


def make_table(results: Sequence[dict[str, Any]], seeds: Mapping[str, Sequence[str]] | None = None) -> Table:
    """Arrange results of several systems in a table.

    Args:
        results: of results files, one a system.
        seeds: system to the other systems of its group, which differ from it in the training seed alone;
            they share its column.

    Raises:
        ValueError: results that cannot be compared, because their protocols, clips, sizes, extractors or
            noise differ; or a group with an unknown system.
    """
    _check_comparable(results)
    seeds = seeds or {}
    by_name = {result["system"]["system"]: result for result in results}
    if unknown := sorted(
        {name for system, others in seeds.items() for name in (system, *others)} - by_name.keys()
    ):
        raise ValueError(
            f"--seeds: no results of {', '.join(unknown)}; expected some of {', '.join(by_name)}"
        )
    records = {name: read_records(result) for name, result in by_name.items()}
    further_seeds = {name for others in seeds.values() for name in others}
    columns = [[name, *seeds.get(name, ())] for name in by_name if name not in further_seeds]
    names_of_records = dict.fromkeys(measure for system in records.values() for measure in system)
    measures = [measure for measure in names_of_records if not measure.endswith("_real")]
    cells = []
    for measure in measures:
        row = [
            _cell([records[name][measure] for name in names if measure in records[name]]) for names in columns
        ]
        of_real = next(
            (system[f"{measure}_real"] for system in records.values() if f"{measure}_real" in system), None
        )
        cells.append([*row, _cell([of_real] if of_real else [])])
    return Table([by_name[names[0]] for names in columns], [len(names) for names in columns], measures, cells)


def _check_comparable(results: Sequence[dict[str, Any]]) -> None:
    for result in results[1:]:
        for key in ("protocol", "clips", "num_frames", "prompts_sha256", "reference", "size"):
            if result["protocol"][key] != results[0]["protocol"][key]:
                raise ValueError(
                    f"results of different {key} cannot be compared: {result['system']['system']}"
                )
    settings: dict[tuple[str, str], set[str]] = {}
    for result in results:
        for record in result["records"]:
            for key in ("extractor", "noise"):
                settings.setdefault((record["measure"], key), set()).add(json.dumps(record.get(key)))
    for (measure, key), values in settings.items():
        if len(values) > 1:
            raise ValueError(
                f"results of {measure} with different {key} cannot be compared: {', '.join(sorted(values))}"
            )


def _cell(records: list[Record]) -> Cell | None:
    """Return the cell of one system, whose records are those of its training seeds."""
    if not records:
        return None
    if len(records) == 1:
        return Cell(records[0])
    differences = [record.difference for record in records]
    more = (
        Spread.of([difference.value for difference in differences if difference])
        if all(differences)
        else None
    )
    return Cell(records[0], Spread.of([record.value for record in records]), more)


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of results as Markdown, below a line that describes its numbers."""
    table, protocol = make_table(results), results[0]["protocol"]
    rows = ([measure, *map(_text, row)] for measure, row in zip(table.measures, table.cells, strict=True))
    part = "" if protocol["complete"] else ", a part of the protocol"
    line = f"protocol {protocol['protocol']}: {protocol['clips']} clips of {protocol['num_frames']} frames{part}; 95 % intervals in brackets"
    if any(cell and cell.record.more for row in table.cells for cell in row):
        line += f"; signed values are paired differences from {table.names[0]} on the same clips"
    return line + "\n\n" + markdown_table(["measure", *table.names, "real clips"], rows)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    record = cell.record
    text = f"{record.value:.4g} ({'biased; ' if record.biased else ''}{record.low:.4g} to {record.high:.4g})"
    if difference := record.difference:
        text += f"; {difference.value:+.3g} ({difference.low:+.3g} to {difference.high:+.3g})"
    return text


def skipped_measures(results: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the measures that were skipped, each with the reason, and with names of systems where others
    have the measure.
    """
    systems: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for measure, reason in result["skipped"].items():
            systems.setdefault((measure, reason), []).append(result["system"]["system"])
    return [
        (measure if len(names) == len(results) else f"{measure} of {', '.join(names)}", reason)
        for (measure, reason), names in systems.items()
    ]
