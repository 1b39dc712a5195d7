"""Progress of the command, on standard error: bars on a terminal, a line now and then elsewhere. Rich is
imported when a bar is made."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

LINE_SECONDS = 15.0
"""Least time between two lines of progress where standard error is not a terminal."""


def duration(seconds: float) -> str:
    """Return a time in the unit that people would use, such as "42 s" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.3g} min"
    hours = seconds / 3600
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.3g} days"


class Progress:
    """The progress of one piece of work: a bar on a terminal, elsewhere a line every `LINE_SECONDS` and one with the
    time at the end; calling it sets (done, total).

    Args:
        label: what is done.
        say_time: False leaves out the line at the end.
    """

    def __init__(self, label: str, *, say_time: bool = True):
        self.label, self.say_time, self.done = label, say_time, 0
        self.bar = _Bar(label)
        self.started_at = self.printed_at = time.monotonic()

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        if self.say_time and self.done and error is None and not self.bar.is_shown:
            seconds = duration(time.monotonic() - self.started_at)
            print(f"{self.label}: {self.done} in {seconds}", file=sys.stderr, flush=True)

    def __call__(self, done: int, total: int | None) -> None:
        self.done = done
        self.bar.update(done, total=total)
        now = time.monotonic()
        if self.bar.is_shown or now - self.printed_at < LINE_SECONDS:
            return
        self.printed_at = now
        line = f"{self.label}: {done}" + (f" of {total}" if total else "")
        if total and 0 < done < total:
            line += f", {duration((now - self.started_at) * (total - done) / done)} left"
        print(line, file=sys.stderr, flush=True)


class TrainingProgress:
    """The progress of a training: a bar on a terminal, elsewhere one line for each logged row.

    Call it with a row of `stats.jsonl`.
    """

    def __init__(self, stage: str, num_steps: int):
        from rich import progress

        self.bar = _Bar(
            stage,
            progress.TextColumn(stage),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            total=num_steps,
        )

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, row: dict) -> None:
        speed = f"{row['clips_per_s']:.1f} clips/s  waited {duration(row['data_wait_s'])}"
        status = f"loss {row['loss']:.4f}  {speed}  {duration(row['eta_s'])} left"
        self.bar.update(row["step"], status=status)
        if not self.bar.is_shown:
            print(f"step {row['step']}  {status}", flush=True)


class _Bar:
    """A bar of one task on standard error, if that is a terminal."""

    def __init__(self, label: str, *columns: ProgressColumn, total: int | None = None):
        from rich import progress
        from rich.console import Console

        self.is_shown = sys.stderr.isatty()
        self.progress = progress.Progress(*columns, disable=not self.is_shown, console=Console(stderr=True))
        self.task = self.progress.add_task(label, total=total, status="")

    def start(self) -> None:
        if self.is_shown:
            self.progress.start()

    def stop(self) -> None:
        if self.is_shown:
            self.progress.stop()

    def update(self, done: int, **fields: object) -> None:
        self.progress.update(self.task, completed=done, **fields)  # type: ignore[arg-type]
