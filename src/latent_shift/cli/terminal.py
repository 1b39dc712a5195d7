"""Progress bars of the command, on standard error. Rich is imported when a bar is made."""

from __future__ import annotations

import sys


class Progress:
    """A bar on a terminal, nothing elsewhere; calling it sets (done, total)."""

    def __init__(self, label: str):
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(disable=not sys.stderr.isatty(), console=Console(stderr=True))
        self.task = self.bar.add_task(label, total=None)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        self.bar.update(self.task, completed=done, total=total)


class TrainingProgress:
    """Show training progress: a bar on a terminal, else one line for each logged row.

    Call it with a row of `stats.jsonl`.
    """

    def __init__(self, stage: str, num_steps: int):
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn(stage),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
        )
        self.bar = progress.Progress(*columns, disable=not sys.stderr.isatty(), console=Console(stderr=True))
        self.task = self.bar.add_task(stage, total=num_steps, status="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, row: dict) -> None:
        speed = f"{row['clips_per_s']:.1f} clips/s  waited {row['data_wait_s']:.1f} s"
        status = f"loss {row['loss']:.4f}  {speed}  {row['eta_s'] / 60:.0f} min left"
        self.bar.update(self.task, completed=row["step"], status=status)
        if self.bar.disable:
            print(f"step {row['step']}  {status}", flush=True)
