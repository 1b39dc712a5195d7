"""`latent-shift show`: what a picture or film says of how it was made."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from latent_shift.cli import outputs


def show(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="a .mp4, .webm, .gif, .webp or .png of ours")
    ],
) -> None:
    """Print the settings of a generated clip or sheet, and the command that makes it again."""
    from latent_shift.data.records import escape
    from latent_shift.video import read_metadata

    metadata = dict(read_metadata(file))
    if "latent_shift" not in metadata:
        raise ValueError(
            f"{file}: says nothing of how it was made; expected a file that latent-shift wrote, unchanged"
        )
    command = metadata.pop("command", None)
    for name, value in metadata.items():
        print(f"{escape(name):24} {escape(value)}")
    if command and shlex.split(command)[:1] == ["latent-shift"]:
        again = Path(f"{file.stem}-again{file.suffix}")
        print(shlex.join(outputs.with_output(shlex.split(command), again)))
