"""What the commands show beside their results: bars, and not the libraries' notices. Rich and torch are imported when needed."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


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


def quiet() -> None:
    """Keep the libraries' notices (bars for loading files, types they did not expect) out of the terminal."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they say when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    # But not what it says when a prompt is longer than the text encoder reads.
    diffusers.utils.logging.get_logger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion").setLevel(logging.WARNING)


def markdown(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def save_json(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def start_quietly(module: str, function: str, *args: object) -> None:
    """Begin a process of a pool with a call of a function given by name, so that what it imports is quiet there, too."""
    quiet()
    getattr(importlib.import_module(module), function)(*args)
