"""The command `latent-shift`: each verb parses its arguments and calls one public function.

Wrong input is refused before torch is imported, wherever that is possible: importing torch, diffusers and
transformers takes seconds.
"""

from __future__ import annotations

import sys

import typer

from latent_shift.cli import bench, data, evaluate, generate, models, train
from latent_shift.runtime import set_passive_waiting

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Text to video by Latent-Shift.",
)
app.command()(generate.generate)
app.command()(train.train)
app.command()(train.encode)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.report)
app.command()(evaluate.sheet)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")


def main() -> None:
    """Run the command; an expected error is printed as one line."""
    set_passive_waiting()
    try:
        app()
    except OSError as error:
        _exit(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (ValueError, RuntimeError) as error:
        _exit(str(error))


def _exit(message: str) -> None:
    print(f"latent-shift: {message}", file=sys.stderr)
    sys.exit(1)
