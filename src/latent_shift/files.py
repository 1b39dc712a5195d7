"""Files: atomic writes, checksums, JSON, Markdown tables, and the header of a `.safetensors` file.

NumPy and safetensors are imported inside the functions: the command imports this file before it parses its
arguments.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
"""Suffixes of files of weights that can run any program when they are opened."""


@contextmanager
def atomic_path(path: str | Path, *, suffix: str = "") -> Iterator[Path]:
    """Yield a path beside `path` that is renamed to `path` when the block ends, so that no reader ever sees
    half a file.

    An error in the block removes the partial file and leaves `path` as it was. On a full disk, the error says
    so and names `path`.

    Args:
        path: the file to write; one that exists is replaced.
        suffix: of the partial file, for writers that choose a format by it. None by default, so that no
            search for `*.npy` finds it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{suffix}")
    try:
        with full_disk_named(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise an OSError that names `path` if the disk, or the quota, is full in the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = "the disk is full; free some space, or choose a folder on another disk"
        raise OSError(error.errno, message, str(path)) from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends; its content is on the disk before that.

    Raises:
        OSError: the disk is full, for example; the error has the name of the file.
    """
    try:
        with atomic_path(path) as partial, partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # errors of writing have no name
        raise


def move_files(source: Path, target: Path, *, last: str = "") -> None:
    """Move every file of a folder into another one, over files of the same names; others there stay.

    Args:
        source, target: the folders, on one disk.
        last: path in the folder of the file that marks a complete folder, which is moved after all others.
    """
    paths = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: (path == source / last, path)):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Write a `.npy` file atomically."""
    import numpy as np

    with atomic_write(path) as file:
        # `np.save` reports a full disk without saying so.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def read_array(path: str | Path, *, mmap: bool = False) -> np.ndarray:
    """Read a `.npy` file, or map it into memory; raise ValueError, with its name, for a damaged one."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r" if mmap else None)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: expected a .npy file; {error}: delete it to have it computed again"
        ) from error


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read a `.npz` file; raise ValueError, with its name, for a damaged one."""
    import zipfile
    import zlib

    import numpy as np

    try:
        with np.load(path) as file:
            return {name: file[name] for name in file}
    except (
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{path}: expected a .npz file; {error}: delete it to have it computed again"
        ) from error


def write_json(value: object, path: str | Path) -> None:
    """Write a JSON file atomically, and create its folder.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def read_json(path: str | Path) -> Any:
    """Read a UTF-8 JSON file, whatever the encoding of the locale.

    Raises:
        ValueError: it is not JSON; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file; {error}") from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise ValueError for any other, as `read_json` does."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {json.dumps(value)[:40]}")
    return value


def read_json_lines(path: str | Path) -> list[Any]:
    """Read a file with a JSON value in each line; raise ValueError, with the file and line, for any other."""
    values = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            values.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected JSON; {error}") from error
    return values


def check_schema(value: object, schema: Any, path: str | Path) -> None:
    """Raise ValueError of one line, with the file and the place in it, for a value that does not fit a schema of
    pydantic: a model, a dataclass or a type."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        # Alternatives of a union have names of their own in the place of an error.
        place = ".".join(str(part) for part in problem["loc"] if not re.search(r"[\[(]", str(part)))
        got = f", got {problem['input']!r:.60}" if problem["type"] != "missing" else ""
        raise ValueError(f"{path}: {place + ': ' if place else ''}{problem['msg']}{got}") from None


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table of text cells."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a `.safetensors` file, read from its header alone.

    Raises:
        ValueError: a pickle file, a file of another kind, one without tensors, or one that is cut short.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path}: a pickle file can run any program when it is opened; expected .safetensors"
        )
    path.stat()  # its error names the file, that of safetensors does not
    if not path.is_file():
        raise ValueError(f"{path}: expected a .safetensors file with weights, got a folder or a device")
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        message = f"{path}: expected a .safetensors file with weights; "
        if "incomplete metadata" in str(error):  # the header is whole and adds up to another size
            message += f"its header describes another size than its {path.stat().st_size} bytes: the file is cut short, download it again"
        else:
            message += str(error)
        raise ValueError(message) from error
    if not shapes:
        raise ValueError(f"{path}: expected a .safetensors file with weights")
    return shapes
