"""A data set as training reads it: the frames of clips in shards, and an index.

    store/
      shards/KEY.npy     the frames of successive clips of one size, `(frames, *shape)`; KEY tells of what is in it
      index.jsonl        a line a clip: the fields of Record
      index.npy          of each line the COLUMNS that drawing needs: 37 bytes a clip, so that ten million fit
      store.json         how it was made, and the shape of every shard; written last, so a store that was cut short is refused

Several stores that were made alike are read as one: `parts/*`. Everything random is drawn from a numpy Generator that the caller
seeds, so a training step can be repeated exactly.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
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

COLUMNS = np.dtype(
    [("line", "u8"), ("concept", "u8"), ("split", "u8"), ("shard", "u4"), ("start", "u4"), ("num_frames", "u4"), ("loop", "?")]
)
"""Where its line begins, digests of its concept and split, the number of its shard among those of store.json, where it lies in it."""
_PARTS = {  # what a folder of frames or latents may hold
    "store.json", "index.jsonl", "index.npy", "shards", "autoencoder", "text_encoder", "tokenizer", "texts.npy", "texts.json",
    "texts.partial.json", "captions.npy",
}  # fmt: skip
_SHARD = re.compile(r"[0-9a-f]{24}\.npy|\..*\.partial")
ITS_OWN = ("shards", "index_bytes", "source", "splits")  # what parts of one data set may differ in


class Store:
    """Shards of frames and their records.

    Args:
        folder: a store, or a pattern of several.

    Attributes:
        folders: the stores, one or several; `folder` is the first.
        index: COLUMNS of all clips.
        records: the clips, each read from its line when it is asked for.
        shapes, paths: shard -> `(frames, *shape of a frame)`, and its file.
        splits: that the records have.
        info: what store.json says of how it was made.

    Raises:
        ValueError: no store, one that is damaged, or several that were not made alike.
    """

    def __init__(self, folder: str | Path):
        self.folders = stores(folder) or [Path(folder)]
        self.folder, self.shapes, self.splits = self.folders[0], dict[str, tuple[int, ...]](), set[str]()
        self.paths: dict[str, Path] = {}
        self._keys: list[str] = []
        indices, self.info = list[np.ndarray](), dict[str, Any]()
        for part in self.folders:
            info = _info(part)
            alike = {name: value for name, value in info.items() if name not in ITS_OWN}
            self.info = self.info or alike
            for name in {*alike, *self.info}:
                if alike.get(name) != self.info.get(name):
                    values = f"{alike.get(name)}, but {self.info.get(name)} in {self.folder}"
                    raise ValueError(f"{part}: {name} is {values}: expected stores made alike")
            indices.append(np.load(part / "index.npy"))
            indices[-1]["shard"] += len(self._keys)
            self._keys += info["shards"]
            self.splits |= set(info["splits"])
            self.shapes |= {key: tuple(shape) for key, shape in info["shards"].items()}
            self.paths |= {key: part / "shards" / f"{key}.npy" for key in info["shards"]}
        self.index = np.concatenate(indices)
        self.records = _Records(self.folders, [len(index) for index in indices], self.index["line"])
        for key, shape in self.shapes.items():
            if not whole(self.paths[key], shape, self.info["dtype"]):
                size = self.paths[key].stat().st_size if self.paths[key].exists() else 0
                raise ValueError(f"{self.paths[key]}: expected {shape[0]} frames {shape[1:]}, got {size} bytes; make the data set again")
        self._open = lru_cache(256)(lambda key: np.load(self.paths[key], mmap_mode="r"))  # each holds a file open

    @property
    def num_frames(self) -> int:
        return sum(shape[0] for shape in self.shapes.values())

    def shape(self, index: int) -> tuple[int, ...]:
        """Of a frame of record `index`."""
        return self.shapes[self._keys[self.index["shard"][index]]][1:]

    def sizes(self) -> np.ndarray:
        """`(shards,)`: numbers that are the same where the shapes of the frames are."""
        shapes = [self.shapes[key][1:] for key in self._keys]
        numbers = {shape: number for number, shape in enumerate(sorted(set(shapes)))}
        return np.array([numbers[shape] for shape in shapes])

    def select(self, *, splits: Iterable[str] = ("train",), num_frames: int = 1, stride: int = 1) -> np.ndarray:
        """Indices of the records of `splits` that can give `num_frames` frames: long enough, or a loop that goes round."""
        index, span = self.index, (num_frames - 1) * stride + 1
        fits = (index["num_frames"] >= span) | (index["loop"] & (index["num_frames"] > 1))
        return np.flatnonzero(fits & np.isin(index["split"], np.array([digest(split) for split in splits], np.uint64)))

    def window(self, index: int, first: int, num_frames: int, *, stride: int = 1) -> np.ndarray:
        """`num_frames` frames of record `index`, every `stride`-th from frame `first` on, round the end where the clip loops."""
        row = self.index[index]
        positions = first + stride * np.arange(num_frames)
        if row["loop"]:
            positions = positions % row["num_frames"]
        return self._open(self._keys[row["shard"]])[row["start"] + positions]

    def draw_window(self, rng: np.random.Generator, index: int, num_frames: int, *, stride: int = 1) -> np.ndarray:
        """`window` from a random first frame."""
        row = self.index[index]
        choices = int(row["num_frames"]) - (0 if row["loop"] else (num_frames - 1) * stride)
        return self.window(index, int(rng.integers(choices)), num_frames, stride=stride)

    def draw_pixels(self, rng: np.random.Generator, index: int, num_frames: int, *, stride: int = 1) -> np.ndarray:
        """`draw_window` to look at: `(F, H, W, 3) uint8`."""
        return self.draw_window(rng, index, num_frames, stride=stride)

    def caption(self, rng: np.random.Generator, index: int, *, stride: int = 1) -> str:
        """A caption of record `index`: its first wording half of the time, else one of the others; with the frame rate, where not
        every frame is taken."""
        texts = self.records[index].texts
        first = len(texts) == 1 or rng.random() < 0.5
        return at_rate(texts[0 if first else 1 + int(rng.integers(len(texts) - 1))], self.info["fps"], stride)


class _Records(Sequence[Record]):
    """The lines of indices, one after the other."""

    def __init__(self, folders: list[Path], counts: list[int], lines: np.ndarray):
        self.ends, self.lines = np.cumsum(counts), lines
        self.files = []
        for folder in folders:
            with (folder / "index.jsonl").open("rb") as file:
                self.files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index):
        index = range(len(self))[index]  # negative ones, and an IndexError at the end
        if isinstance(index, range):
            return [self[each] for each in index]
        file = self.files[np.searchsorted(self.ends, index, side="right")]
        row = json.loads(file[(start := int(self.lines[index])) : file.find(b"\n", start)])
        return Record(**{**row, "texts": tuple(row["texts"])})


def stores(folder: str | Path) -> list[Path]:
    """The stores that a folder or a pattern names: all folders it fits, if one of them is a store."""
    if (Path(folder) / "store.json").exists():
        return [Path(folder)]
    found = [Path(each) for each in sorted(glob.glob(f"{folder}/"))]
    return found if any((each / "store.json").exists() for each in found) else []


def digest(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _info(folder: Path) -> dict:
    if not (folder / "store.json").exists():
        raise ValueError(f"{folder}: not a packed data set (no store.json); `latent-shift data pack FOLDER OUT` writes one")
    info = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    if "index_bytes" not in info:
        raise ValueError(f"{folder}: was packed by an older version; pack it again")
    if (size := (folder / "index.jsonl").stat().st_size) != info["index_bytes"]:
        raise ValueError(f"{folder / 'index.jsonl'}: expected {info['index_bytes']} bytes, got {size}; make the data set again")
    return info


def at_rate(caption: str, fps: float, stride: int) -> str:
    """A caption of every `stride`-th frame: the rate is told in words (as CogVideo does, Hong et al. 2022), which takes no parameter."""
    return caption if stride == 1 else f"{caption}, {fps / stride:g} fps"


def pixels(folder: str | Path) -> Store:
    """A store of pixels; raises ValueError for one of latents."""
    store = Store(folder)
    if store.info["dtype"] != "uint8":
        raise ValueError(f"{folder}: holds latents; expected the packed pixels that they were encoded from")
    return store


class StoreWriter:
    """Append records; clips of one size share shards of `shard_mb` megabytes. `close` makes the store readable. A store that is there
    already stays as it is until the first record."""

    def __init__(self, folder: str | Path, *, shard_mb: float = 64):
        self.folder, self.shard_bytes = Path(folder), shard_mb * 1e6
        check_folder(self.folder)
        self.open: defaultdict[tuple[int, ...], list[tuple[Record, np.ndarray]]] = defaultdict(list)
        self.bytes: defaultdict[tuple[int, ...], int] = defaultdict(int)
        self.records: list[Record] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, record: Record, frames: np.ndarray) -> None:
        shape = frames.shape[1:]
        if not self.records and not self.open:
            begin(self.folder)
        self.open[shape].append((record, frames))
        self.bytes[shape] += frames.nbytes
        if self.bytes[shape] >= self.shard_bytes:
            self._finish(shape)

    def _finish(self, shape: tuple[int, ...]) -> None:
        clips, _ = self.open.pop(shape), self.bytes.pop(shape)
        frames = np.concatenate([each for _, each in clips])
        key = hashlib.sha256(repr((frames.shape, str(frames.dtype))).encode() + frames.tobytes()).hexdigest()[:24]
        write_array(self.folder / "shards" / f"{key}.npy", frames)
        start = 0
        for record, each in clips:
            self.records.append(replace(record, shard=key, start=start, num_frames=len(each)))
            start += len(each)
        self.shapes[key] = frames.shape

    def close(self, **info: object) -> None:
        for shape in list(self.open):
            self._finish(shape)
        finish(self.folder, self.records, self.shapes, **info)


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder with files that are not a store's: writing there would mix them up."""
    shards = folder / "shards"
    others = [path for path in folder.glob("*") if path.name not in _PARTS and not path.name.startswith(".")]
    others += [path for path in shards.glob("*") if not _SHARD.fullmatch(path.name)]
    if others:
        raise ValueError(f"{folder}: holds {others[0].relative_to(folder)}, which is no part of a data set; expected a folder of its own")


def begin(folder: Path) -> None:
    """Make a folder that is no store until `finish`; shards that lie in it stay."""
    check_folder(folder)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "store.json").unlink(missing_ok=True)


def finish(folder: Path, records: Iterable[Record], shapes: dict[str, tuple[int, ...]], **info: object) -> None:
    """Write the index, remove shards that are not in it, and make the folder a store."""
    rows, splits, numbers = [], set(), {key: number for number, key in enumerate(shapes)}
    with (folder / "index.jsonl").open("wb") as file:
        for record in records:
            where = numbers[record.shard], record.start, record.num_frames, record.loop
            rows.append((file.tell(), digest(record.concept), digest(record.split), *where))
            splits.add(record.split)
            file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        index_bytes = file.tell()
    np.save(folder / "index.npy", np.array(rows, COLUMNS))
    for path in (folder / "shards").iterdir():
        if path.name.removesuffix(".npy") not in shapes:
            path.unlink()
    write_text(
        folder / "store.json", json.dumps({**info, "splits": sorted(splits), "index_bytes": index_bytes, "shards": shapes}, indent=1)
    )


def whole(path: Path, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a shard is there and as large as it must be."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return path.exists() and 0 < path.stat().st_size - expected <= 1024  # numpy's header comes before the frames
