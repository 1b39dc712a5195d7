"""Files: atomic writes, checksums, JSON, Markdown tables, and the header of a `.safetensors` file.

NumPy and safetensors are imported inside the functions: the command imports this file before it parses its
arguments.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
"""Suffixes of files of weights that can run any program when they are opened."""
MAX_JSON_BYTES = 64 * 2**20
"""Maximum size of a JSON file."""


@contextmanager
def atomic_path(path: str | Path, *, suffix: str = "") -> Iterator[Path]:
    """Yield a path beside `path` that is renamed to `path` when the block ends, so that no reader ever sees
    half a file.

    An error in the block removes the partial file and leaves `path` as it was. On a full disk, the error says
    so and names `path`.

    Args:
        path: the file to write; one that exists is replaced. A link stays one, and its target is written.
        suffix: of the partial file, for writers that choose a format by it. None by default, so that no
            search for `*.npy` finds it.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{suffix}")
    try:
        with full_disk_named(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path, *, keep_name: bool = False) -> Iterator[None]:
    """Raise an OSError that names `path` if the disk, or the quota, is full in the block; with `keep_name`, the file
    that the error itself names, if it does."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) and error.errno else _os_error(error)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = "the disk is full; free some space, or choose a folder on another disk"
        raise OSError(
            number, message, (getattr(error, "filename", None) if keep_name else None) or str(path)
        ) from error


def _os_error(error: Exception) -> int | None:
    """Return the number of the operating system's error in the text of another one: those of safetensors and of
    `shutil.copytree` are no plain OSErrors."""
    match = re.search(r"(?:os error |Errno )(\d+)", str(error))
    return int(match[1]) if match else None


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
    write_array_blocks(path, [array], array.dtype, array.shape)


def write_array_blocks(
    path: str | Path, blocks: Iterable[np.ndarray], dtype: np.dtype, shape: Sequence[int]
) -> None:
    """Write a `.npy` file atomically from blocks of rows, of which one at a time is in memory.

    Args:
        path: the file.
        blocks: arrays of this dtype; their rows, one after the other, have the shape.
        dtype, shape: of the whole array.
    """
    import numpy as np

    with atomic_write(path) as file:
        file.write(array_header(dtype, shape))
        for block in blocks:
            # `np.save` reports a full disk without saying so, and a growing memory map ends the process.
            file.write(np.ascontiguousarray(block).data)


def array_header(dtype: np.dtype | str, shape: Sequence[int]) -> bytes:
    """Return the header of a `.npy` file whose rows follow it in C order.

    Its length does not depend on the number of rows, so that they can be counted while they are written.
    """
    import numpy as np

    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
    )
    return header.getvalue()


def open_array(
    path: str | Path,
    dtype: np.dtype | str | None = None,
    shape: Sequence[int | None] | None = None,
    *,
    advice: str = "delete it to have it computed again",
) -> np.ndarray:
    """Map a `.npy` file into memory.

    Args:
        path: the file.
        dtype: its dtype; None allows any.
        shape: its shape, where None stands for any number; None allows any shape.
        advice: what to do about a damaged file, for the message.

    Raises:
        ValueError: a damaged file, or one of another dtype or shape.
    """
    import numpy as np

    with _damage_named(path, advice):
        array = np.lib.format.open_memmap(path, mode="r")
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    shape = array.shape if shape is None else shape
    matches = all(expected in (None, got) for expected, got in zip(shape, array.shape, strict=False))
    if array.dtype != dtype or array.ndim != len(shape) or not matches:
        expected = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"{path}: expected ({expected}) {dtype}, got {array.shape} {array.dtype}; {advice}")
    return array


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read a `.npz` file of `np.savez`; raise ValueError, with its name, for a damaged one."""
    import zipfile

    import numpy as np

    with _damage_named(path, "delete it to have it computed again"):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its arrays are compressed")
        with np.load(path) as file:
            arrays = {name: file[name] for name in file}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # numpy returns the content of a file that is no array
                raise ValueError(f"{name} is not an array")
        return arrays


@contextmanager
def _damage_named(path: str | Path, advice: str) -> Iterator[None]:
    """Raise ValueError, with the name of a `.npy` or `.npz` file, for what numpy raises in the block. Its headers
    may be no Python literal, or describe more than the file holds."""
    from tokenize import TokenError
    from zipfile import BadZipFile

    try:
        check_regular(path)
        yield
    except (
        ValueError, TypeError, KeyError, EOFError, OSError, SyntaxError, OverflowError, MemoryError, RuntimeError, TokenError,
        BadZipFile,
    ) as error:  # fmt: skip
        expected = f"expected a {Path(path).suffix} file"
        raise ValueError(f"{path}: {expected}; {str(error).removeprefix(f'{path}: ')}; {advice}") from error


def write_json(value: object, path: str | Path) -> None:
    """Write a JSON file atomically, and create its folder.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def check_regular(path: str | Path) -> None:
    """Raise ValueError for a file that must not be opened: a pipe, a socket, a device or a folder."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is {describe_mode(mode)}, expected a file")


def describe_mode(mode: int) -> str:
    """Return what kind of file a `st_mode` stands for, such as "a pipe"."""
    names = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return names.get(stat.S_IFMT(mode), "a special file")


def read_bytes(path: str | Path, *, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: a larger file, or one that is not a regular file.
        OSError: it cannot be read.
    """
    path = Path(path)
    check_regular(path)
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes} bytes of text, got {size}")
    return path.read_bytes()


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text, which end with \n, \r\n or \r.

    `str.splitlines` would also split at form feeds and Unicode's line separators, which occur in captions.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Parse JSON, in UTF-8 if bytes are passed.

    Raises:
        ValueError: another encoding, not JSON, nested too deeply, or with `unique_keys` an object that has a
            key twice, of which Python takes the last.
    """
    try:
        return json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_object_of if unique_keys else None,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise ValueError for a key that comes twice."""
    counts = Counter(key for key, _ in pairs)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"{repeated[0]!r} comes {counts[repeated[0]]} times; expected it once")
    return dict(pairs)


def read_json(path: str | Path, *, max_bytes: int | None = MAX_JSON_BYTES) -> Any:
    """Read a UTF-8 JSON file, whatever the encoding of the locale.

    Raises:
        ValueError: it is not JSON, too large or not a regular file; the message names the file.
        OSError: it cannot be read.
    """
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        return parse_json(content)
    except ValueError as error:
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
    for number, line in enumerate(split_lines(read_bytes(path).decode(errors="replace")), 1):
        try:
            values.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected JSON; {error}") from error
    return values


def check_schema(value: object, schema: Any, path: str | Path) -> Any:
    """Return a value as a schema of pydantic describes it: a model, a dataclass or a type.

    Raises:
        ValueError: it does not fit; the message, of one line, names the file and the place in it.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        # Alternatives of a union have names of their own in the place of an error.
        place = ".".join(
            str(part) for part in problem["loc"] if not re.search(r"[\[(]|^constrained-", str(part))
        )
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
