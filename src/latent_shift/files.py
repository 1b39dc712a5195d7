from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a `.safetensors` file, without reading them.

    Raises:
        ValueError: not such a file, or one that ends too soon.
    """
    path = Path(path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path}: a pickle file can run any program when it is opened; expected .safetensors")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length)) if length < size else {}
        except (struct.error, ValueError):
            entries = {}
    tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    if not tensors:
        raise ValueError(f"{path}: expected a .safetensors file with weights")
    expected = 8 + length + max(entry["data_offsets"][1] for entry in tensors.values())
    if size < expected:
        raise ValueError(f"{path}: ends after {size} of {expected} bytes; download it again")
    return {name: tuple(entry["shape"]) for name, entry in tensors.items()}


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it into place."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_array(path: Path, frames: np.ndarray) -> None:
    """Write a shard aside and rename it into place: one that is there is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, frames)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def write_json(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
