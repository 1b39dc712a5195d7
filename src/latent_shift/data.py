"""Captioned clips on disk, packed once into one array of frames.

    store/                     what training reads: `pack` writes pixels, `encode` writes latents, in the same form
      array.bin                every frame of every record, one after the other
      index.jsonl              a line a record: texts, concept, split, loop, start, num_frames
      store.json               dtype, shape of a frame, and how it was made

Everything random is drawn from a numpy Generator that the caller seeds, so a training step can be repeated exactly.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from operator import length_hint
from pathlib import Path

import numpy as np

from latent_shift import video
from latent_shift.sources import Media, Record, lines_of, read


class Store:
    """A packed array of frames and its records.

    Attributes:
        array: `(total frames, *frame shape)`, read from disk as it is touched.
        records: the index, each record with its `start` and `num_frames` in `array`.
        info: the contents of store.json.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "store.json").exists():
            raise ValueError(f"{folder}: not a packed data set (no store.json); `latent-shift data pack FOLDER OUT` writes one")
        self.info = json.loads((self.folder / "store.json").read_text())
        rows = [json.loads(line) for line in lines_of(self.folder / "index.jsonl")]
        self.records = [Record(**{**row, "texts": tuple(row["texts"])}) for row in rows]
        total = sum(record.num_frames for record in self.records)
        shape = (total, *self.info["shape"])
        size = (self.folder / "array.bin").stat().st_size
        expected = int(np.prod(shape)) * np.dtype(self.info["dtype"]).itemsize
        if size != expected:
            raise ValueError(f"{self.folder / 'array.bin'}: expected {expected} bytes for {total} frames, got {size}; pack again")
        self.array = np.memmap(self.folder / "array.bin", self.info["dtype"], "r", shape=shape)

    def select(self, *, splits: Iterable[str] = ("train",), num_frames: int = 1) -> list[int]:
        """Indices of the records of `splits` that can give `num_frames` frames: long enough, or a loop that goes round."""
        splits = set(splits)
        return [
            index
            for index, record in enumerate(self.records)
            if record.split in splits and (record.num_frames >= num_frames or (record.loop and record.num_frames > 1))
        ]

    def window(self, index: int, first: int, num_frames: int) -> np.ndarray:
        """`num_frames` successive frames of record `index` from frame `first` on, round the end where the clip loops."""
        record = self.records[index]
        positions = first + np.arange(num_frames)
        if record.loop:
            positions = positions % record.num_frames
        return self.array[record.start + positions]

    def draw_window(self, rng: np.random.Generator, index: int, num_frames: int) -> np.ndarray:
        """`window` from a random first frame."""
        record = self.records[index]
        choices = record.num_frames if record.loop else record.num_frames - num_frames + 1
        return self.window(index, int(rng.integers(choices)), num_frames)


def pixels(folder: str | Path) -> Store:
    """A store of pixels; raises ValueError for one of latents."""
    store = Store(folder)
    if store.info["dtype"] != "uint8":
        raise ValueError(f"{folder}: holds latents; expected the packed pixels that they were encoded from")
    return store


class StoreWriter:
    """Append records to a store; `close` makes it readable. Until then there is no store.json, so a cut-short store is refused."""

    def __init__(self, folder: str | Path, dtype: str, shape: tuple[int, ...], **info: object):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "store.json").unlink(missing_ok=True)
        self.info = {"dtype": dtype, "shape": list(shape), **info}
        self.total = 0
        self.array = (self.folder / "array.bin").open("wb")
        self.index = (self.folder / "index.jsonl").open("w")

    def add(self, record: Record, frames: np.ndarray) -> None:
        assert list(frames.shape[1:]) == self.info["shape"] and frames.dtype == self.info["dtype"]
        self.array.write(np.ascontiguousarray(frames).tobytes())
        row = asdict(replace(record, start=self.total, num_frames=len(frames)))
        self.index.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.total += len(frames)

    def close(self) -> None:
        self.array.close()
        self.index.close()
        (self.folder / "store.json").write_text(json.dumps(self.info, indent=1))


class BalancedSampler:
    """Draw records so that every concept is equally likely, whatever number of files it has."""

    def __init__(self, records: list[Record], indices: list[int]):
        if not indices:
            raise ValueError("no record to train on: check the split names and that clips have the frames asked for")
        groups = defaultdict(list)
        for index in indices:
            groups[records[index].concept].append(index)
        self.groups = list(groups.values())

    def draw(self, rng: np.random.Generator, num: int) -> list[int]:
        groups = rng.integers(len(self.groups), size=num)
        return [self.groups[group][rng.integers(len(self.groups[group]))] for group in groups]


def pack(
    source: str | Path,
    out: str | Path,
    *,
    size: int,
    fps: float,
    workers: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[tuple[str, str]]:
    """Decode every record once into a store of `(F, size, size, 3) uint8` frames.

    Args:
        source: captioned clips in one of the layouts of sources.py.
        out: where the store goes.
        size: side of the frames in pixels.
        fps: frames a second kept of every clip.
        workers: processes that decode.
        progress: called with (records done, records in all, None where only the end will tell).

    Returns:
        The files that could not be used, as (file name, reason). They are left out, never replaced.

    Raises:
        ValueError: no clips in any layout, or none that can be used.
    """
    clips, done = read(source), 0
    total = length_hint(clips) or None
    writer = StoreWriter(out, "uint8", (size, size, 3), fps=fps, size=size, source=Path(source).name)
    problems = []
    for done, (record, frames) in enumerate(decoded(clips, size, fps, workers), 1):
        if isinstance(frames, str):
            problems.append((record.file_name, frames))
        else:
            writer.add(record, frames)
        if progress:
            progress(done, total)
    if not writer.total:
        first = f"; the first: {': '.join(problems[0])}" if problems else ""
        raise ValueError(f"{source}: none of {done} files can be used{first}")
    writer.close()
    return problems


def preview(store: Store, *, rows: int = 8, columns: int = 8, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """What training sees: `rows` random clips and stills, a row of up to `columns` successive frames each, under their captions;
    returns the `(H, W, 3) uint8` sheet and the captions."""
    rng = np.random.default_rng(seed)
    indices = BalancedSampler(store.records, store.select()).draw(rng, rows)
    strips = [store.draw_window(rng, index, min(columns, store.records[index].num_frames)) for index in indices]
    captions = [store.records[index].texts[0] for index in indices]
    return video.labelled_rows(strips, captions, columns=columns), captions


def _decode(media: Media, name: str, size: int, fps: float) -> np.ndarray | str:
    if isinstance(media, str):
        return media
    try:
        return video.read(
            name if isinstance(media, bytes) else media, content=media if isinstance(media, bytes) else None, fps=fps, size=size
        )[0]
    except ValueError as error:
        return str(error).removeprefix(f"{media if isinstance(media, Path) else name}: ")


def decoded(clips: Iterator[tuple[Record, Media]], size: int, fps: float, workers: int) -> Iterator[tuple[Record, np.ndarray | str]]:
    """Each record with its frames, or with the reason why there are none; two clips a worker are on their way at any time."""
    tasks = ((record, (media if record.texts else "no caption", record.file_name, size, fps)) for record, media in clips)
    if workers <= 1:
        yield from ((record, _decode(*task)) for record, task in tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        underway: deque[tuple[Record, Future]] = deque()
        for record, task in tasks:
            underway.append((record, pool.submit(_decode, *task)))
            if len(underway) >= 2 * workers:
                record, future = underway.popleft()
                yield record, future.result()
        yield from ((record, future.result()) for record, future in underway)
