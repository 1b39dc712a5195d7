"""The command `latent-shift`: each verb parses its arguments and calls one public function.

Wrong input is refused before torch is imported, wherever that is possible: importing torch, diffusers and
transformers takes seconds.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import latent_shift
from latent_shift.cli import bench, data, evaluate, export, generate, models, serve, show, train
from latent_shift.runtime import set_passive_waiting

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 and the number of SIGINT, as shells have it."""


class Command(TyperGroup):
    """The group of all verbs: numbers are finite, Ctrl-C ends with one line, a prompt is no verb."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        _require_finite_numbers(self)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if " " in args[0]:
            ctx.fail(f'expected a command, got a sentence: latent-shift generate "{args[0]}"')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            # A module in C that is being imported turns an interrupt into an error of its own.
            if isinstance(error, KeyboardInterrupt) or signal.getsignal(signal.SIGINT) is _end_at_once:
                _exit("interrupted", INTERRUPTED)
            raise


def _require_finite_numbers(command: Any) -> None:
    """Make the options of a command and of those below it refuse nan and inf, which pass every range."""
    for parameter in command.params:
        parameter.process_value = partial(_process_finite, parameter, parameter.process_value)
    for below in getattr(command, "commands", {}).values():
        _require_finite_numbers(below)


def _process_finite(parameter: Any, process: Callable[..., Any], context: Any, value: Any) -> Any:
    result = process(context, value)
    for number in result if isinstance(result, (list, tuple)) else [result]:
        if isinstance(number, float) and not math.isfinite(number):
            raise typer.BadParameter(f"expected a finite number, got {number}", ctx=context, param=parameter)
    return result


app = typer.Typer(
    cls=Command,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Text to video by Latent-Shift.",
)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(show.show)
app.command()(train.train)
app.command()(train.encode)
app.command()(export.export)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.report)
app.command()(evaluate.sheet)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"latent-shift {latent_shift.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and stop"),
    ] = False,
) -> None:
    """Text to video by Latent-Shift."""


def main() -> None:
    """Run the command; an expected error is printed as one line."""
    set_passive_waiting()
    for stream in (sys.stdout, sys.stderr):  # names of files need not be Unicode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # After an interrupt in code that a C module ran, Python would end with another status.
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        raise
    except OSError as error:
        _exit(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (ValueError, RuntimeError, MemoryError) as error:
        _exit(str(error) or "out of memory")


def _interrupt(*_: object) -> NoReturn:
    """End the command on a first Ctrl-C; on a second one at once, without waiting for workers."""
    signal.signal(signal.SIGINT, _end_at_once)
    raise KeyboardInterrupt


def _end_at_once(*_: object) -> NoReturn:
    os._exit(INTERRUPTED)


def _exit(message: str, status: int = 1) -> NoReturn:
    print(f"latent-shift: {message}", file=sys.stderr)
    sys.exit(status)
