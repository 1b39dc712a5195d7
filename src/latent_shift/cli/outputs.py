"""Output files of the command: what may be written where, and under which names.

A command replaces only files that it knows to be latent-shift's own: pictures and films whose metadata say so.
Every other file is somebody's, and is replaced with --force alone. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latent_shift.files import read_bytes, split_lines

if TYPE_CHECKING:
    import numpy as np
    import torch

FileState = tuple[int, int, int]
"""What changes when a file is written: its number on the disk, time and size."""
Force = Annotated[
    bool, typer.Option("--force", help="also replace files that latent-shift does not know as its own")
]


def check_outputs(
    paths: Sequence[Path], *, suffixes: Sequence[str], inputs: Iterable[Path | None] = (), force: bool = False
) -> dict[Path, FileState]:
    """Check that files can be written without a loss, so that errors come before the work.

    Args:
        paths: the files.
        suffixes: those that can be written.
        inputs: files that the command reads.
        force: replace files that latent-shift did not write; inputs are never replaced.

    Returns:
        Those that exist and will be replaced, as they are now.

    Raises:
        ValueError: another suffix, a name given twice, a folder of that name, a file where a folder must be,
            no permission, an input, or somebody's file.
    """
    sources = [path for path in inputs if path is not None and path.exists()]
    resolved: set[Path] = set()
    for path in paths:
        if path.suffix.lower() not in suffixes:
            raise ValueError(
                f"{path}: expected one of {' '.join(suffixes)}, got {path.suffix or 'no suffix'!r}"
            )
        if (target := path.resolve()) in resolved:
            raise ValueError(f"{path}: given twice; expected different outputs")
        resolved.add(target)
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; expected the name of a file")
        if path.exists() and any(path.samefile(source) for source in sources):
            raise ValueError(f"{path}: is an input of the command; choose another name for the output")
        if os.path.lexists(path) and not force and not _is_own(path):
            raise ValueError(
                f"{path}: exists, and is not known as latent-shift's; choose another name, or use --force"
            )
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"{path}: is write-protected; choose another name")
    check_writable(paths)
    return {path: file_state(path) for path in paths if path.exists()}


def file_state(path: Path) -> FileState:
    """Return the state of a file, to know later whether another program wrote it."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _is_own(path: Path) -> bool:
    """Return whether a file's metadata say that latent-shift wrote it."""
    from latent_shift.video import read_metadata

    try:
        return "latent_shift" in read_metadata(path)
    except (OSError, ValueError):  # neither a picture nor a film
        return False


def check_json(path: Path | None, *, force: bool = False) -> None:
    """Check a .json output, as `check_outputs` does; it says nothing of its origin, so `force` alone replaces
    it."""
    if path is not None:
        check_outputs([path], suffixes=(".json",), force=force)


def check_writable(paths: Iterable[Path]) -> None:
    """Raise ValueError where files of these names cannot be made: of each folder, the longest name."""
    longest: dict[Path, Path] = {}
    for path in paths:
        if len(os.fsencode(path.name)) >= len(os.fsencode(longest.get(path.parent, path).name)):
            longest[path.parent] = path
    for path in longest.values():
        _check_writable(path)


def _check_writable(path: Path) -> None:
    folder = path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{path}: {folder} is a file; expected a folder")
    # Permissions, read-only disks and too long names show when a file is made.
    probe = folder / f".{path.name}.{os.getpid()}.partial{path.suffix}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a text file, one a line; # starts a comment.

    Raises:
        ValueError: no prompt, or text that is not UTF-8.
    """
    try:
        text = read_bytes(file, max_bytes=2**24).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, got other bytes at {error.start}") from error
    lines = [line.strip() for line in split_lines(text)]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{file}: holds no prompt; expected one a line")
    return prompts


def reserve(path: Path) -> Path:
    """Create an empty file of this name, or with a number after it where the name is taken, and return its
    path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            candidate.touch(exist_ok=False)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError


def write_all(
    frames: np.ndarray,
    paths: Sequence[Path],
    *,
    fps: float,
    metadata: dict[str, str],
    replaced: Mapping[Path, FileState],
) -> None:
    """Write frames to several files and print their names. One that fails does not keep the others from being
    written; the error comes after them.

    Args:
        frames: `(F, H, W, 3) uint8`.
        paths: the files. Where another program wrote one during the work, the name gets a number.
        fps, metadata: see `video.write`.
        replaced: files that may be replaced, as they were before the work.
    """
    from latent_shift.video import write

    errors = []
    for path in paths:
        target = path
        try:
            is_unchanged = path in replaced and path.exists() and file_state(path) == replaced[path]
            target = path if is_unchanged else reserve(path)
            if target != path:
                print(f"latent-shift: {path}: was written by another program meanwhile", file=sys.stderr)
            print(write(frames, target, fps=fps, metadata=metadata), flush=True)
        except (OSError, ValueError) as error:
            errors.append(error)
        finally:
            if target.exists() and target.stat().st_size == 0:  # reserved
                target.unlink()
    if errors:
        raise errors[0]


def repeat_command(context: typer.Context, **changes: Any) -> list[str]:
    """Return the words of the command that repeats this one.

    Args:
        context: of the command; options that were left out stay out, unless they have a default.
        changes: parameter to another value; None leaves it out.
    """
    options: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        value = {**context.params, **changes}.get(str(parameter.name))
        if value is None or value is False:
            continue
        values = [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        if parameter.param_type_name == "argument":
            arguments += values
        elif value is True:
            options.append(max(parameter.opts, key=len))
        else:
            options += itertools.chain(*([max(parameter.opts, key=len), item] for item in values))
    is_safe = not any(word.startswith("-") for word in arguments)
    words = [*arguments, *options] if is_safe else [*options, "--", *arguments]
    return ["latent-shift", str(context.info_name), *words]


def with_output(command: Sequence[str], path: Path) -> list[str]:
    """Return a command of `repeat_command` that writes to a file."""
    name = f"./{path}" if str(path).startswith("-") else str(path)
    if command[1:2] == ["sheet"]:  # takes its outputs as arguments
        return [*command, name]
    return [*command[:2], "-o", name, *command[2:]]


def device_name(device: torch.device) -> str:
    """Return a device as people name it."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
