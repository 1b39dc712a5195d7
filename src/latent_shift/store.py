"""A data set as training reads it: the frames of clips in shards, and an index.

    store/
      shards/KEY.npy     the frames of successive clips of one size, `(frames, *shape)`; KEY tells of what is in it
      index.jsonl        a line a clip: the fields of Record
      store.json         how it was made, and the shape of every shard; written last, so a store that was cut short is refused

Everything random is drawn from a numpy Generator that the caller seeds, so a training step can be repeated exactly.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from latent_shift.sources import Record, lines_of


class Store:
    """Shards of frames and their records.

    Attributes:
        records: the index.
        shapes: shard -> `(frames, *shape of a frame)`.
        info: what store.json says of how it was made.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "store.json").exists():
            raise ValueError(f"{folder}: not a packed data set (no store.json); `latent-shift data pack FOLDER OUT` writes one")
        self.info = json.loads((self.folder / "store.json").read_text())
        if "shards" not in self.info:
            raise ValueError(f"{folder}: was packed by an older version; pack it again")
        self.shapes = {key: tuple(shape) for key, shape in self.info["shards"].items()}
        rows = [json.loads(line) for line in lines_of(self.folder / "index.jsonl")]
        self.records = [Record(**{**row, "texts": tuple(row["texts"])}) for row in rows]
        for key, shape in self.shapes.items():
            expected = int(np.prod(shape)) * np.dtype(self.info["dtype"]).itemsize
            path = self.folder / "shards" / f"{key}.npy"
            size = path.stat().st_size if path.exists() else 0
            if not 0 < size - expected <= 1024:  # numpy's header comes before the frames
                raise ValueError(f"{path}: expected {expected} bytes for {shape[0]} frames, got {size}; make the data set again")
        self._open = lru_cache(1024)(lambda key: np.load(self.folder / "shards" / f"{key}.npy", mmap_mode="r"))

    @property
    def num_frames(self) -> int:
        return sum(shape[0] for shape in self.shapes.values())

    def shape(self, index: int) -> tuple[int, ...]:
        """Of a frame of record `index`."""
        return self.shapes[self.records[index].shard][1:]

    def select(self, *, splits: Iterable[str] = ("train",), num_frames: int = 1, stride: int = 1) -> list[int]:
        """Indices of the records of `splits` that can give `num_frames` frames: long enough, or a loop that goes round."""
        splits, span = set(splits), (num_frames - 1) * stride + 1
        return [
            index
            for index, record in enumerate(self.records)
            if record.split in splits and (record.num_frames >= span or (record.loop and record.num_frames > 1))
        ]

    def window(self, index: int, first: int, num_frames: int, *, stride: int = 1) -> np.ndarray:
        """`num_frames` frames of record `index`, every `stride`-th from frame `first` on, round the end where the clip loops."""
        record = self.records[index]
        positions = first + stride * np.arange(num_frames)
        if record.loop:
            positions = positions % record.num_frames
        return self._open(record.shard)[record.start + positions]

    def draw_window(self, rng: np.random.Generator, index: int, num_frames: int, *, stride: int = 1) -> np.ndarray:
        """`window` from a random first frame."""
        record = self.records[index]
        choices = record.num_frames if record.loop else record.num_frames - (num_frames - 1) * stride
        return self.window(index, int(rng.integers(choices)), num_frames, stride=stride)


def pixels(folder: str | Path) -> Store:
    """A store of pixels; raises ValueError for one of latents."""
    store = Store(folder)
    if store.info["dtype"] != "uint8":
        raise ValueError(f"{folder}: holds latents; expected the packed pixels that they were encoded from")
    return store


class StoreWriter:
    """Append records; clips of one size share shards of `shard_mb` megabytes. `close` makes the store readable."""

    def __init__(self, folder: str | Path, *, shard_mb: float = 64):
        self.folder, self.shard_bytes = Path(folder), shard_mb * 1e6
        begin(self.folder)
        self.open: defaultdict[tuple[int, ...], list[tuple[Record, np.ndarray]]] = defaultdict(list)
        self.records: list[Record] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, record: Record, frames: np.ndarray) -> None:
        clips = self.open[frames.shape[1:]]
        clips.append((record, frames))
        if sum(each.nbytes for _, each in clips) >= self.shard_bytes:
            self._finish(frames.shape[1:])

    def _finish(self, shape: tuple[int, ...]) -> None:
        clips = self.open.pop(shape)
        frames = np.concatenate([each for _, each in clips])
        key = hashlib.sha256(repr((frames.shape, str(frames.dtype))).encode() + frames.tobytes()).hexdigest()[:24]
        save(self.folder / "shards" / f"{key}.npy", frames)
        start = 0
        for record, each in clips:
            self.records.append(replace(record, shard=key, start=start, num_frames=len(each)))
            start += len(each)
        self.shapes[key] = frames.shape

    def close(self, **info: object) -> None:
        for shape in list(self.open):
            self._finish(shape)
        finish(self.folder, self.records, self.shapes, **info)


def begin(folder: Path) -> None:
    """Make a folder that is no store until `finish`; shards that lie in it stay."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "store.json").unlink(missing_ok=True)


def finish(folder: Path, records: Iterable[Record], shapes: dict[str, tuple[int, ...]], **info: object) -> None:
    """Write the index, remove shards that are not in it, and make the folder a store."""
    (folder / "index.jsonl").write_text("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
    for path in (folder / "shards").iterdir():
        if path.name.removesuffix(".npy") not in shapes:
            path.unlink()
    write(folder / "store.json", json.dumps({**info, "shards": shapes}, indent=1))


def save(path: Path, frames: np.ndarray) -> None:
    """Write a shard aside and rename it into place: one that is there is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, frames)
    os.replace(partial, path)


def write(path: Path, text: str) -> None:
    """Write a file aside and rename it into place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def end_with_parent() -> None:
    """What a process of a pool does first: see to it that it ends when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class BalancedSampler:
    """Draw records so that every concept is equally likely, whatever number of files it has; those of one draw are of one size.

    Args:
        store: where the records are.
        indices: which of them.

    Raises:
        ValueError: no record.
    """

    def __init__(self, store: Store, indices: list[int]):
        if not indices:
            raise ValueError("no record to train on: check the split names and that clips have the frames asked for")
        totals = Counter(store.records[index].concept for index in indices)
        sizes: dict[tuple[int, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index in indices:
            sizes[store.shape(index)][store.records[index].concept].append(index)
        self.groups = [list(concepts.values()) for concepts in sizes.values()]
        shares = [np.array([len(group) / totals[name] for name, group in concepts.items()]) for concepts in sizes.values()]
        self.sizes = _cumulative(np.array([share.sum() for share in shares]))
        self.concepts = [_cumulative(share) for share in shares]

    def draw(self, rng: np.random.Generator, num: int) -> list[int]:
        size = int(np.searchsorted(self.sizes, rng.random(), side="right"))
        chosen = np.searchsorted(self.concepts[size], rng.random(num), side="right")
        groups = [self.groups[size][concept] for concept in chosen]
        return [group[rng.integers(len(group))] for group in groups]


def _cumulative(shares: np.ndarray) -> np.ndarray:
    return np.cumsum(shares) / shares.sum() if len(shares) > 1 else np.ones(1)
