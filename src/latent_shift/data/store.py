"""Store and read the frames of clips: shards and an index.

    store/
      shards/KEY.npy     frames of successive clips of one size, `(frames, *shape of a frame)`; KEY is a hash
                         of the content
      index-KEY.jsonl    one line per clip: the fields of `Record`
      index-KEY.npy      INDEX_DTYPE per clip: what sampling needs, 37 bytes a clip, so that ten million fit
                         in memory
      problems.txt       the files that were skipped, or kept with a flaw
      store.json         settings, the shape of every shard, and the KEY of the index; written last, so an
                         interrupted store is refused, and one that is packed anew can be read until then

A pattern such as `parts/*` opens several stores with equal settings as one. All randomness comes from a numpy
Generator that the caller seeds, so that a training step can be repeated exactly.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import glob
import hashlib
import math
import mmap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from latent_shift.data.records import Record
from latent_shift.files import (
    check_schema,
    open_array,
    parse_json,
    read_json,
)

ADVICE = "create the data set again"
"""What to do about a damaged store."""

INDEX_DTYPE = np.dtype(
    [
        ("line", "u8"),  # byte offset of the clip's line in index.jsonl
        ("concept", "u8"),  # text_digest of the concept
        ("split", "u8"),  # text_digest of the split
        ("shard", "u4"),  # position of the shard in store.json
        ("start", "u4"),  # first frame in the shard
        ("num_frames", "u4"),
        ("loop", "?"),
    ]
)
_PER_STORE_KEYS = (
    "shards",
    "index",
    "index_bytes",
    "source",
    "source_id",
    "problems",
    "splits",
)  # the other keys are equal in all parts


_Count = Annotated[int, Field(gt=0)]


class _Info(BaseModel):
    """The content of store.json."""

    model_config = ConfigDict(strict=True, extra="allow")

    dtype: Literal["uint8", "float16"]
    shards: Annotated[
        dict[Annotated[str, Field(pattern="^[0-9a-f]{24}$")], Annotated[list[_Count], Field(min_length=4)]],
        Field(min_length=1),
    ]
    splits: list[str]
    index_bytes: _Count
    index: Annotated[str, Field(pattern=r"^index(-[0-9a-f]{24})?$")] = "index"
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    size: _Count = 0  # of stores that do not say it: the side of a square as large as the largest frames


class _LatentInfo(_Info):
    """The content of store.json of latents."""

    texts: Annotated[list[_Count], Field(min_length=2, max_length=2)]
    strides: list[_Count]
    factor: _Count
    channels: _Count


class Store:
    """Read the frames and records of one or several stores.

    Args:
        folder: a store, or a pattern that matches several.

    Attributes:
        folders: the stores; `folder` is the first.
        index: INDEX_DTYPE of all clips.
        records: the `Record` of every clip, parsed on access.
        shapes: shard name -> `(frames, *shape of a frame)`.
        paths: shard name -> file.
        splits: names of the splits.
        info: the settings in store.json.

    Raises:
        ValueError: no store, a damaged one, or several with different settings.
    """

    def __init__(self, folder: str | Path):
        self.folders = find_stores(folder) or [Path(folder)]
        self.folder = self.folders[0]
        self.info: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.paths: dict[str, Path] = {}
        self.splits: set[str] = set()
        self._shard_names: list[str] = []
        indices, index_files = [], []
        for part in self.folders:
            info = read_info(part)
            index_files.append(part / f"{info['index']}.jsonl")
            settings = {name: value for name, value in info.items() if name not in _PER_STORE_KEYS}
            self.info = self.info or settings
            for name in sorted({*settings, *self.info}):
                if settings.get(name) != self.info.get(name):
                    values = f"{settings.get(name)} here and {self.info.get(name)} in {self.folder}"
                    raise ValueError(f"{part}: {name} is {values}; expected stores with equal settings")
            index = _read_index(part, info)
            index["shard"] += len(self._shard_names)
            indices.append(index)
            self._shard_names += info["shards"]
            self.splits |= set(info["splits"])
            self.shapes |= {name: tuple(shape) for name, shape in info["shards"].items()}
            self.paths |= {name: part / "shards" / f"{name}.npy" for name in info["shards"]}
        self.index = np.concatenate(indices)
        self.records = _IndexLines(
            index_files, [len(index) for index in indices], self.index, self._shard_names
        )
        for name, shape in self.shapes.items():
            path = self.paths[name]
            if not is_complete(path, shape, self.info["dtype"]):
                size = path.stat().st_size if path.exists() else 0
                expected = f"expected {shape[0]} frames {shape[1:]}, got {size} bytes"
                raise ValueError(f"{path}: {expected}; {ADVICE}")
        # One open file each.
        self._open_shard = lru_cache(256)(
            lambda name: open_array(self.paths[name], self.info["dtype"], self.shapes[name], advice=ADVICE)
        )

    @property
    def num_frames(self) -> int:
        return sum(shape[0] for shape in self.shapes.values())

    def frame_shape(self, index: int) -> tuple[int, ...]:
        """Return the shape of the frames of record `index`."""
        return self.shapes[self._shard_names[self.index["shard"][index]]][1:]

    def shape_ids(self) -> np.ndarray:
        """Return `(shards,)` integers that are equal for shards with frames of equal shape."""
        shapes = [self.shapes[name][1:] for name in self._shard_names]
        ids = {shape: number for number, shape in enumerate(sorted(set(shapes)))}
        return np.array([ids[shape] for shape in shapes])

    def select(
        self, *, splits: Iterable[str] = ("train",), num_frames: int = 1, stride: int = 1
    ) -> np.ndarray:
        """Return the records from which clips can be drawn.

        Args:
            splits: names of splits.
            num_frames: number of frames of a clip; shorter records are included if they loop.
            stride: distance between the frames of a clip.

        Returns:
            `(N,)` indices.
        """
        index = self.index
        span = (num_frames - 1) * stride + 1
        long_enough = (index["num_frames"] >= span) | (index["loop"] & (index["num_frames"] > 1))
        in_splits = np.isin(index["split"], np.array([text_digest(split) for split in splits], np.uint64))
        return np.flatnonzero(long_enough & in_splits)

    def window(self, index: int, first: int, num_frames: int, *, stride: int = 1) -> np.ndarray:
        """Return `num_frames` frames of record `index`, every `stride`-th from `first` on; loops wrap
        around."""
        row = self.index[index]
        positions = first + stride * np.arange(num_frames)
        if row["loop"]:
            positions = positions % row["num_frames"]
        return self._open_shard(self._shard_names[row["shard"]])[row["start"] + positions]

    def draw_window(
        self, rng: np.random.Generator, index: int, num_frames: int, *, stride: int = 1
    ) -> np.ndarray:
        """Return `window` from a random first frame."""
        row = self.index[index]
        choices = int(row["num_frames"]) - (0 if row["loop"] else (num_frames - 1) * stride)
        return self.window(index, int(rng.integers(choices)), num_frames, stride=stride)

    def draw_pixels(
        self, rng: np.random.Generator, index: int, num_frames: int, *, stride: int = 1
    ) -> np.ndarray:
        """Return `draw_window` as `(F, H, W, 3) uint8` frames."""
        return self.draw_window(rng, index, num_frames, stride=stride)

    def caption(self, rng: np.random.Generator, index: int, *, stride: int = 1) -> str:
        """Return a random caption of record `index`, worded for frames taken every `stride`-th
        (`caption_at_rate`).

        The first caption has probability 1/2; the others share the rest.
        """
        texts = self.records[index].texts
        use_first = len(texts) == 1 or rng.random() < 0.5
        text = texts[0] if use_first else texts[1 + int(rng.integers(len(texts) - 1))]
        return caption_at_rate(text, self.info["fps"], stride)


class _IndexLines(Sequence[Record]):
    """Parse the records of index files, concatenated, when they are accessed."""

    def __init__(self, paths: list[Path], counts: list[int], rows: np.ndarray, shard_names: list[str]):
        self.ends = np.cumsum(counts)
        self.paths = paths
        self.rows = rows
        self.shard_names = shard_names
        self.files = []
        for path in paths:
            with path.open("rb") as file:
                self.files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        index = range(len(self))[index]  # resolves negative indices and raises IndexError past the end
        if isinstance(index, range):
            return [self[position] for position in index]
        part = int(np.searchsorted(self.ends, index, side="right"))
        row, file = self.rows[index], self.files[part]
        start = int(row["line"])
        line = file[start : file.find(b"\n", start)]
        try:
            values = parse_json(line.decode())
            name, texts, concept, split = (values[key] for key in ("file_name", "texts", "concept", "split"))
            labels = values.get("labels", {})
            if not texts or not all(
                isinstance(text, str) for text in (name, concept, split, *texts, *labels.values())
            ):
                raise ValueError("expected texts")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.paths[part]}: line {line[:60]!r} is damaged; {ADVICE}") from error
        return Record(
            name, tuple(texts), concept, split, bool(row["loop"]), self.shard_names[row["shard"]], int(row["start"]),
            int(row["num_frames"]), labels,
        )  # fmt: skip


def find_stores(folder: str | Path) -> list[Path]:
    """Return the store in a folder, or all folders that match a pattern if at least one of them is a
    store."""
    if (Path(folder) / "store.json").exists():
        return [Path(folder)]
    matches = [Path(match) for match in sorted(glob.glob(f"{folder}/"))]
    return matches if any((match / "store.json").exists() for match in matches) else []


def open_pixel_store(folder: str | Path) -> Store:
    """Open a store of pixels.

    Raises:
        ValueError: a store of latents.
    """
    store = Store(folder)
    if store.info["dtype"] != "uint8":
        raise ValueError(f"{folder}: holds latents; expected the packed pixels that they were encoded from")
    return store


def text_digest(text: str) -> int:
    """Return a 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def caption_at_rate(caption: str, fps: float, stride: int) -> str:
    """Return a caption for every `stride`-th frame: the frame rate is appended (CogVideo, Hong et al.
    2022)."""
    return caption if stride == 1 else f"{caption}, {fps / stride:g} fps"


def read_info(folder: Path) -> dict:
    """Return the content of store.json; raise ValueError for a damaged one, or none."""
    path = folder / "store.json"
    if not path.exists():
        hint = "`latent-shift data pack FOLDER OUT` writes one"
        raise ValueError(f"{folder}: not a packed data set (no store.json); {hint}")
    info = read_json(path)
    if isinstance(info, dict) and "index_bytes" not in info:
        raise ValueError(f"{path}: was packed by an older version; pack it again")
    is_latents = isinstance(info, dict) and info.get("dtype") == "float16"
    try:
        defaults = check_schema(info, _LatentInfo if is_latents else _Info, path).model_dump()
    except ValueError as error:
        raise ValueError(f"{error}; {ADVICE}") from error
    info = {**defaults, **info}  # an fps of 8 stays an integer
    sides = slice(3, 5) if is_latents else slice(1, 3)
    largest = max(math.prod(shape[sides]) for shape in info["shards"].values())
    info["size"] = info["size"] or info.get("factor", 1) * math.isqrt(largest)
    index = folder / f"{info['index']}.jsonl"
    size = index.stat().st_size if index.exists() else 0
    if size != info["index_bytes"]:
        raise ValueError(f"{index}: expected {info['index_bytes']} bytes, got {size}; {ADVICE}")
    return info


def _read_index(folder: Path, info: dict) -> np.ndarray:
    """Return the index of a store, whose clips lie inside their shards."""
    path = folder / f"{info['index']}.npy"
    index = np.array(open_array(path, INDEX_DTYPE, (None,), advice=ADVICE))
    num_frames = np.array([shape[0] for shape in info["shards"].values()])
    ends = index["start"].astype(np.int64) + index["num_frames"]
    if (
        not len(index)
        or index["shard"].max() >= len(num_frames)
        or (ends > num_frames[index["shard"]]).any()
        or not index["num_frames"].all()
        or index["line"].max() >= info["index_bytes"]
    ):
        raise ValueError(f"{path}: does not fit store.json; {ADVICE}")
    return index


def is_complete(path: Path, shape: tuple[int, ...], dtype: str) -> bool:
    """Return whether a shard exists with the size of an array of this shape and dtype."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # Numpy's header, at least 128 bytes.
    return path.exists() and 128 <= path.stat().st_size - expected <= 1024
