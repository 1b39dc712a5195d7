"""Store and read the frames of clips: shards and an index.

    store/
      shards/KEY.npy     frames of successive clips of one size, `(frames, *shape of a frame)`; KEY is a hash
                         of the content
      index.jsonl        one line per clip: the fields of `Record`
      index.npy          INDEX_DTYPE per clip: what sampling needs, 37 bytes a clip, so that ten million fit
                         in memory
      store.json         settings and the shape of every shard; written last, so an interrupted store is
                         refused

A pattern such as `parts/*` opens several stores with equal settings as one. All randomness comes from a numpy
Generator that the caller seeds, so that a training step can be repeated exactly.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from latent_shift.data.readers import Record
from latent_shift.files import write_array, write_text
from latent_shift.video import Frames

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
_STORE_FILES = {  # of pixels or latents
    "store.json", "index.jsonl", "index.npy", "shards", "autoencoder", "text_encoder", "tokenizer", "texts.npy",
    "texts.json", "texts.partial.json", "captions.npy",
}  # fmt: skip
_SHARD_FILE = re.compile(r"[0-9a-f]{24}\.npy|\..*\.partial")
_PER_STORE_KEYS = ("shards", "index_bytes", "source", "splits")  # the other keys are equal in all parts


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
        indices = []
        for part in self.folders:
            info = _read_info(part)
            settings = {name: value for name, value in info.items() if name not in _PER_STORE_KEYS}
            self.info = self.info or settings
            for name in sorted({*settings, *self.info}):
                if settings.get(name) != self.info.get(name):
                    values = f"{settings.get(name)} here and {self.info.get(name)} in {self.folder}"
                    raise ValueError(f"{part}: {name} is {values}; expected stores with equal settings")
            index = np.load(part / "index.npy")
            index["shard"] += len(self._shard_names)
            indices.append(index)
            self._shard_names += info["shards"]
            self.splits |= set(info["splits"])
            self.shapes |= {name: tuple(shape) for name, shape in info["shards"].items()}
            self.paths |= {name: part / "shards" / f"{name}.npy" for name in info["shards"]}
        self.index = np.concatenate(indices)
        self.records = _IndexLines(self.folders, [len(index) for index in indices], self.index["line"])
        for name, shape in self.shapes.items():
            path = self.paths[name]
            if not is_complete(path, shape, self.info["dtype"]):
                size = path.stat().st_size if path.exists() else 0
                expected = f"expected {shape[0]} frames {shape[1:]}, got {size} bytes"
                raise ValueError(f"{path}: {expected}; create the data set again")
        # One open file each.
        self._open_shard = lru_cache(256)(lambda name: np.load(self.paths[name], mmap_mode="r"))

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
    """Parse the records of index.jsonl files, concatenated, when they are accessed."""

    def __init__(self, folders: list[Path], counts: list[int], offsets: np.ndarray):
        self.ends = np.cumsum(counts)
        self.offsets = offsets
        self.files = []
        for folder in folders:
            with (folder / "index.jsonl").open("rb") as file:
                self.files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index):
        index = range(len(self))[index]  # resolves negative indices and raises IndexError past the end
        if isinstance(index, range):
            return [self[position] for position in index]
        file = self.files[np.searchsorted(self.ends, index, side="right")]
        start = int(self.offsets[index])
        row = json.loads(file[start : file.find(b"\n", start)])
        return Record(**{**row, "texts": tuple(row["texts"])})


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


def _read_info(folder: Path) -> dict:
    if not (folder / "store.json").exists():
        hint = "`latent-shift data pack FOLDER OUT` writes one"
        raise ValueError(f"{folder}: not a packed data set (no store.json); {hint}")
    info = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    if "index_bytes" not in info:
        raise ValueError(f"{folder}: was packed by an older version; pack it again")
    index = folder / "index.jsonl"
    size = index.stat().st_size
    if size != info["index_bytes"]:
        raise ValueError(
            f"{index}: expected {info['index_bytes']} bytes, got {size}; create the data set again"
        )
    return info


class StoreWriter:
    """Write records to a store; clips of one size share shards. An existing store stays intact until the
    first record.

    Args:
        folder: where the store goes.
        shard_mb: size at which a shard is written, in megabytes.

    Raises:
        ValueError: `folder` holds files that do not belong to a store.
    """

    def __init__(self, folder: str | Path, *, shard_mb: float = 64):
        self.folder = Path(folder)
        self.shard_bytes = shard_mb * 1e6
        check_store_folder(self.folder)
        self._pending: defaultdict[tuple[int, ...], list[tuple[Record, np.ndarray]]] = defaultdict(list)
        self._pending_bytes: defaultdict[tuple[int, ...], int] = defaultdict(int)
        self._records: list[Record] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, record: Record, frames: np.ndarray) -> None:
        """Append a clip: its record and `(F, *shape of a frame)` frames."""
        shape = frames.shape[1:]
        if not self._records and not self._pending:
            start_store(self.folder)
        self._pending[shape].append((record, frames))
        self._pending_bytes[shape] += frames.nbytes
        if self._pending_bytes[shape] >= self.shard_bytes:
            self._write_shard(shape)

    def add_scenes(self, records: list[Record], frames: Frames, cuts: list[int]) -> None:
        """Append the scenes of a clip, one record each, which begin at frame 0 and at the cuts."""
        bounds = [0, *cuts, len(frames)]
        if isinstance(frames, np.ndarray):
            for record, start, stop in zip(records, bounds, bounds[1:], strict=False):
                self.add(record, frames[start:stop])
            return
        # A long clip becomes a shard of its own.
        if not self._records and not self._pending:
            start_store(self.folder)
        name = _shard_name(frames.shape, (frames[k] for k in range(len(frames))))
        os.replace(frames.path, self.folder / "shards" / f"{name}.npy")
        for record, start, stop in zip(records, bounds, bounds[1:], strict=False):
            self._records.append(replace(record, shard=name, start=start, num_frames=stop - start))
        self._shapes[name] = frames.shape

    def close(self, **info: object) -> None:
        """Write what is pending and make the store readable; `info` goes to store.json."""
        for shape in list(self._pending):
            self._write_shard(shape)
        finish_store(self.folder, self._records, self._shapes, **info)

    def _write_shard(self, shape: tuple[int, ...]) -> None:
        clips = self._pending.pop(shape)
        del self._pending_bytes[shape]
        shard = np.concatenate([frames for _, frames in clips])
        name = _shard_name(shard.shape, shard, str(shard.dtype))
        write_array(self.folder / "shards" / f"{name}.npy", shard)
        start = 0
        for record, frames in clips:
            self._records.append(replace(record, shard=name, start=start, num_frames=len(frames)))
            start += len(frames)
        self._shapes[name] = shard.shape


def _shard_name(shape: tuple[int, ...], frames: Iterable[np.ndarray], dtype: str = "uint8") -> str:
    """Return a hash of the content of a shard."""
    digest = hashlib.sha256(repr((shape, dtype)).encode())
    for frame in frames:
        digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()[:24]


def check_store_folder(folder: Path) -> None:
    """Check that a folder holds nothing but the files of a store, which may be replaced.

    Raises:
        ValueError: another file; the message names it.
    """
    shards = folder / "shards"
    foreign = [
        path for path in folder.glob("*") if path.name not in _STORE_FILES and not path.name.startswith(".")
    ]
    foreign += [path for path in shards.glob("*") if not _SHARD_FILE.fullmatch(path.name)]
    if foreign:
        name = foreign[0].relative_to(folder)
        raise ValueError(
            f"{folder}: holds {name}, which does not belong to a data set; choose an empty folder"
        )


def start_store(folder: Path) -> None:
    """Create a folder that cannot be opened as a store before `finish_store`; existing shards stay."""
    check_store_folder(folder)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "store.json").unlink(missing_ok=True)


def finish_store(
    folder: Path, records: Iterable[Record], shapes: dict[str, tuple[int, ...]], **info: object
) -> None:
    """Write the index and store.json, and remove shards that are not in the index.

    Args:
        folder: a folder from `start_store`.
        records: the clips, with shard, start and num_frames.
        shapes: shard name -> `(frames, *shape of a frame)`.
        info: settings for store.json.
    """
    positions = {name: position for position, name in enumerate(shapes)}
    rows, splits = [], set()
    with (folder / "index.jsonl").open("wb") as file:
        for record in records:
            place = (positions[record.shard], record.start, record.num_frames, record.loop)
            rows.append((file.tell(), text_digest(record.concept), text_digest(record.split), *place))
            splits.add(record.split)
            file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        index_bytes = file.tell()
    np.save(folder / "index.npy", np.array(rows, INDEX_DTYPE))
    for path in (folder / "shards").iterdir():
        if path.name.removesuffix(".npy") not in shapes:
            path.unlink()
    info = {**info, "splits": sorted(splits), "index_bytes": index_bytes, "shards": shapes}
    write_text(folder / "store.json", json.dumps(info, indent=1))


def is_complete(path: Path, shape: tuple[int, ...], dtype: str) -> bool:
    """Return whether a shard exists with the size of an array of this shape and dtype."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # Numpy's header, at least 128 bytes.
    return path.exists() and 128 <= path.stat().st_size - expected <= 1024
