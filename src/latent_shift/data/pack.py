"""Decode captioned clips once into a store of pixels."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import length_hint
from pathlib import Path

from latent_shift import video
from latent_shift.data.decode import Decoder, aspect_sizes, decode_records
from latent_shift.data.readers import read
from latent_shift.data.records import Problem
from latent_shift.data.shards import without_secrets
from latent_shift.data.store_writer import PIXELS, StoreWriter, store_folder


def pack(
    source: str | Path,
    out: str | Path,
    *,
    size: int,
    fps: float,
    aspects: int | None = None,
    split_cuts: bool = False,
    shard_mb: float = 64,
    min_frames: int = 1,
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Problem]:
    """Decode every clip once into a store of `(F, H, W, 3) uint8` frames.

    A store that is in `out` already stays as it is until the new one is complete.

    Args:
        source: captioned clips in one of the layouts of readers.py.
        out: where the store goes.
        size: side of the frames in pixels; clips are cropped to squares.
        fps: frame rate of the store, in frames per second.
        aspects: crop to the nearest of `aspect_sizes(size, aspects)` instead of a square: sides are multiples
            of this factor (64 for Stable Diffusion's networks) and frames have at most `size * size` pixels.
        split_cuts: store each scene of a clip with cuts as a clip of its own, with the same captions.
        shard_mb: size of a shard in megabytes.
        min_frames: report clips with fewer frames, unless they loop.
        workers: number of processes that decode. A script that uses several does so below
            `if __name__ == "__main__":`.
        force: also write into a folder that holds something else; see `output_folder`.
        progress: called with (number of clips done, number of clips, or None if unknown).

    Returns:
        The clips that are skipped, never replaced, and those that are kept with a flaw. The store has the
        same list as problems.txt.

    Raises:
        ValueError: no clips in any layout, no usable clip, or `out` holds something else or is in use.
    """
    video.check_fps(fps)
    sizes = aspect_sizes(size, aspects)
    if Path(source).exists() and Path(source).resolve() == Path(out).resolve():
        raise ValueError(f"{out}: is also the input; choose another folder for the packed clips")
    name, source_id = Path(without_secrets(str(source))).name, _source_id(source)
    clips = read(source)
    num_clips = length_hint(clips) or None
    problems: list[Problem] = []
    num_done, num_packed, num_skipped = 0, 0, 0
    with (
        store_folder(out, PIXELS, source=name, source_id=source_id, force=force) as (folder, stale),
        _long_clips(folder) as long_clips,
    ):
        decode = Decoder(sizes, fps, min_frames, packed_sizes=sizes, long_clips=long_clips)
        writer = StoreWriter(folder, shard_mb=shard_mb)
        for record, clip in decode_records(clips, decode, workers):
            num_done += 1
            if isinstance(clip, Problem):
                problems.append(clip)
                num_skipped += clip.outcome == "skipped"
            else:
                num_packed += 1
                problems += [Problem(record.file_name, flaw, "kept") for flaw in clip.flaws]
                cuts = video.find_cuts(clip.frames) if split_cuts and len(clip.frames) > 1 else []
                scenes = [
                    replace(record, file_name=f"{record.file_name}#{number}", loop=False)
                    for number in range(len(cuts) + 1)
                ]
                writer.add_scenes(scenes if cuts else [record], clip.frames, cuts)
            if progress:
                progress(num_done, num_clips)
        if not num_packed:
            first = f"; the first: {problems[0].file_name}: {problems[0].reason}" if problems else ""
            raise ValueError(
                f"{without_secrets(str(source))}: none of {num_skipped} files can be used{first}"
            )
        writer.close(
            problems=problems,
            stale=stale,
            dtype="uint8",
            fps=fps,
            size=size,
            source=name,
            source_id=source_id,
        )
    return problems


def _source_id(source: str | Path) -> str:
    """Return a hash of where a source lies, which tells folders of the same name apart and names no path."""
    place = str(Path(source).resolve()) if Path(source).exists() else without_secrets(str(source))
    return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@contextmanager
def _long_clips(folder: Path) -> Iterator[Path]:
    """Yield a folder for the frames of long clips, which is removed when the block ends."""
    long_clips = folder / ".long-clips.partial"
    shutil.rmtree(long_clips, ignore_errors=True)  # of a process that was killed
    try:
        yield long_clips
    finally:
        shutil.rmtree(long_clips, ignore_errors=True)
