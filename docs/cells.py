"""Results of docs/results, read and written as the cells of a table."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from latent_shift.evaluation.measures import label_of
from latent_shift.evaluation.records import Record
from latent_shift.evaluation.statistics import Estimate
from latent_shift.evaluation.tables import Cell, Spread, find_seeds, make_table
from latent_shift.files import read_json

ROOT = Path(__file__).parent.parent
Format = Callable[[float], str]


def read_result(name: str) -> Any:
    """Read a file of docs/results or its archive."""
    (path,) = (ROOT / "docs" / "results").rglob(f"{name}.json")
    return read_json(path)


class Results:
    """Results of several systems as `latent-shift eval` wrote them, by system and measure, and losses of their training.

    Args:
        name: of the file.
        merge_seeds: show SYSTEM-seed-N as further trainings of SYSTEM, not as systems of their own.
    """

    def __init__(self, name: str, *, merge_seeds: bool = True):
        results = read_result(name)
        names = [result["system"]["system"] for result in results]
        self.name = name
        self.groups = find_seeds(names) if merge_seeds else {}
        self.table = make_table(results, self.groups)
        columns = [*self.table.names, "real clips"]
        self.cells: dict[str, dict[str, Cell]] = {column: {} for column in columns}
        for measure, row in zip(self.table.measures, self.table.cells, strict=True):
            for column, cell in zip(columns, row, strict=True):
                if cell is not None:
                    self.cells[column][measure] = cell
        self.parameters = {result["system"]["system"]: result["system"]["parameters"] for result in results}

    def real(self, measure: str, form: Format, *, with_interval: bool = True) -> str:
        """Return the value of the real clips, or "" for a measure that they do not have."""
        cell = self.cells["real clips"].get(measure)
        return "" if cell is None else value(cell, form) if with_interval else form(cell.record.value)

    def losses(self, names: Iterable[str]) -> list[str]:
        """Return the validation loss of each system's training run, from the file of `latent-shift bench runs`."""
        runs = {Path(run["run"]).name: run["val_loss"] for run in read_result(f"{self.name}-training")}
        form, losses = decimals(4), []
        for name in names:
            seeds = [runs[system] for system in (name, *self.groups.get(name, ()))]
            losses.append(between(Spread.of(seeds), form) if len(seeds) > 1 else form(seeds[0]))
        return losses

    def caption(self, *, differences: bool = False) -> str:
        """Return the line above a table that says what brackets and signs mean."""
        text = "Brackets: 95% bootstrap intervals over clips"
        if seeds := sorted({number for number in self.table.num_seeds if number > 1}):
            text += f"; of systems trained with {' or '.join(map(str, seeds))} seeds the mean, and the least and greatest over the seeds"
        if differences:
            first = self.table.names[0] + (
                ", first seed, not from its mean," if self.table.num_seeds[0] > 1 else ""
            )
            text += f". Signed values: paired differences from {first} on the same clips"
        return f"*{text}.*\n\n"


def decimals(places: int, *, signed: bool = False) -> Format:
    return lambda number: f"{number:{'+' if signed else ''}.{places}f}"


def percent(number: float) -> str:
    return f"{number:.0%}"


def between(number: Estimate | Record | Spread, form: Format) -> str:
    """Return a number with its interval, or with its range over training seeds."""
    if isinstance(number, Spread):
        return f"{form(number.mean)} ({form(number.least)} to {form(number.greatest)})"
    return f"{form(number.value)} ({form(number.low)} to {form(number.high)})"


def value(cell: Cell, form: Format) -> str:
    """Return a cell's value with its interval, or its mean with the range over training seeds."""
    return between(cell.seeds or cell.record, form)


def point(cell: Cell, form: Format) -> str:
    """Return a cell's value alone."""
    return form(cell.seeds.mean if cell.seeds else cell.record.value)


def difference(cell: Cell, places: int) -> str:
    """Return a cell's difference from the first system, with its interval or range over training seeds."""
    number = cell.more or cell.record.difference
    assert number is not None
    return between(number, decimals(places, signed=True))


def label(measure: str) -> str:
    return label_of(measure).text
