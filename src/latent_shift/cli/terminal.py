"""What the commands show beside their results: bars, and not the libraries' notices. Rich and torch are imported when needed."""

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
