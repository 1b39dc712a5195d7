"""Write the stores that store.py reads.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from latent_shift.data.records import Problem, Record
from latent_shift.data.store import INDEX_DTYPE, read_info, text_digest
from latent_shift.files import atomic_write, write_array, write_text
from latent_shift.folders import output_folder, read_kind
from latent_shift.video import Frames

PIXELS, LATENTS = "a data set of pixels", "a data set of latents"
"""What the folders of stores are marked to hold."""

_STORE_FILES = {  # of stores from before folders were marked
    "store.json", "index.jsonl", "index.npy", "shards", "autoencoder", "text_encoder", "tokenizer", "texts.npy",
    "texts.json", "texts.partial.json", "captions.npy",
}  # fmt: skip
_SHARD_FILE = re.compile(r"[0-9a-f]{24}\.npy|\.[0-9a-f]{24}\.npy\.\d+\.partial")
_INDEX_FILE = re.compile(r"index(-[0-9a-f]{24})?\.(jsonl|npy)|problems\.txt")


@contextmanager
def store_folder(
    folder: str | Path,
    kind: str,
    *,
    source: str | None,
    source_id: str | None = None,
    force: bool = False,
    wait: bool = False,
) -> Iterator[tuple[Path, list[Path]]]:
    """Create and lock a folder for a store; see `output_folder`.

    Args:
        folder: where the store goes.
        kind: PIXELS or LATENTS.
        source: name of what the store is made of. A store of another source is not replaced.
        source_id: tells sources of the same name apart.
        force: also replace a store of another source, and take a folder that holds something else; its files are kept.
        wait: wait for another process that writes there, instead of an error.

    Raises:
        ValueError: as `output_folder`, and for a store of another source, or a problems.txt of somebody else.

    Yields:
        The folder, and the files of the store that it held before. `finish_store` removes those that are not
        used again.
    """
    folder = Path(folder)

    def is_unmarked_store(folder: Path) -> bool:
        try:
            dtype = read_info(folder)["dtype"]
        except (ValueError, OSError):
            return False
        foreign = [path for path in folder.iterdir() if path.name not in _STORE_FILES and path.name[0] != "."]
        return not foreign and dtype == {PIXELS: "uint8", LATENTS: "float16"}[kind]

    try:
        held = read_info(folder)
    except (ValueError, OSError):
        held = {}
    if not force:
        _check_same_source(folder, kind, held, source, source_id)
    # A folder that was taken with --force may hold a list of problems of its owner's.
    has_own_problems = held.get("problems", True)
    if not force and held and not has_own_problems and (folder / "problems.txt").exists():
        raise ValueError(
            f"{folder}/problems.txt: latent-shift did not write it; choose another folder, or use --force to replace it"
        )
    was_own = folder.is_dir() and (read_kind(folder) == kind or is_unmarked_store(folder))
    with output_folder(folder, kind, force=force, is_own=is_unmarked_store, wait=wait):
        (folder / "shards").mkdir(exist_ok=True)
        candidates = {_SHARD_FILE: folder / "shards", _INDEX_FILE: folder} if was_own else {}
        yield (
            folder,
            [
                path
                for name, place in candidates.items()
                for path in place.iterdir()
                if name.fullmatch(path.name) and (has_own_problems or path.name != "problems.txt")
            ],
        )


def _check_same_source(
    folder: Path, kind: str, held: dict, source: str | None, source_id: str | None
) -> None:
    """Raise ValueError if a store is known to be made of another source."""
    advice = "choose another folder, or use --force to replace it"
    name, held_id = held.get("source"), held.get("source_id")
    if None not in (name, source) and name != source:
        raise ValueError(f"{folder}: holds {kind} made of {name}, not of {source}; {advice}")
    if None not in (held_id, source_id) and held_id != source_id:
        raise ValueError(f"{folder}: holds {kind} made of another source called {name}; {advice}")


class StoreWriter:
    """Write records to a store; clips of one size share shards. An existing store stays intact until `close`.

    Args:
        folder: where the store goes.
        shard_mb: size at which a shard is written, in megabytes.
    """

    def __init__(self, folder: str | Path, *, shard_mb: float = 64):
        self.folder = Path(folder)
        self.shard_bytes = shard_mb * 1e6
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        self._pending: defaultdict[tuple[int, ...], list[tuple[Record, np.ndarray]]] = defaultdict(list)
        self._pending_bytes: defaultdict[tuple[int, ...], int] = defaultdict(int)
        self._records: list[Record] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, record: Record, frames: np.ndarray) -> None:
        """Append a clip: its record and `(F, *shape of a frame)` frames."""
        shape = frames.shape[1:]
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
        name = _shard_name(frames.shape, (frames[k] for k in range(len(frames))))
        os.replace(frames.path, self.folder / "shards" / f"{name}.npy")
        for record, start, stop in zip(records, bounds, bounds[1:], strict=False):
            self._records.append(replace(record, shard=name, start=start, num_frames=stop - start))
        self._shapes[name] = frames.shape

    def close(self, *, problems: Iterable[Problem] = (), stale: Iterable[Path] = (), **info: object) -> None:
        """Write what is pending and make the store readable; see `finish_store`."""
        for shape in list(self._pending):
            self._write_shard(shape)
        finish_store(self.folder, self._records, self._shapes, problems=problems, stale=stale, **info)

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


def finish_store(
    folder: Path,
    records: Sequence[Record],
    shapes: dict[str, tuple[int, ...]],
    *,
    problems: Iterable[Problem] = (),
    stale: Iterable[Path] = (),
    **info: object,
) -> None:
    """Write the index and store.json, and remove the files of the store that was there before.

    Args:
        folder: the folder of the shards.
        records: the clips, with shard, start and num_frames.
        shapes: shard name -> `(frames, *shape of a frame)`.
        problems: the files that were skipped or have flaws.
        stale: files of an earlier store, from `store_folder`.
        info: settings for store.json.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(_index_line(record))
    name = f"index-{digest.hexdigest()[:24]}"
    positions = {shard: position for position, shard in enumerate(shapes)}
    rows, splits = [], set()
    with atomic_write(folder / f"{name}.jsonl") as file:
        for record in records:
            place = (positions[record.shard], record.start, record.num_frames, record.loop)
            rows.append((file.tell(), text_digest(record.concept), text_digest(record.split), *place))
            splits.add(record.split)
            file.write(_index_line(record))
        index_bytes = file.tell()
    write_array(folder / f"{name}.npy", np.array(rows, INDEX_DTYPE))
    lines = [f"{problem}\n" for problem in problems]
    info = {
        **info,
        "splits": sorted(splits),
        "problems": len(lines),
        "index": name,
        "index_bytes": index_bytes,
    }
    write_text(folder / "store.json", json.dumps({**info, "shards": shapes}, indent=1))
    if lines:  # after store.json, which says whose it is
        write_text(folder / "problems.txt", "".join(lines))
    current = {f"{name}.jsonl", f"{name}.npy", *(f"{shard}.npy" for shard in shapes)}
    current |= {"problems.txt"} if lines else set()
    for path in stale:
        if path.name not in current:
            path.unlink(missing_ok=True)


def _index_line(record: Record) -> bytes:
    values = {name: value for name, value in asdict(record).items() if name != "labels" or value}
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
