"""Find clips that are unsuitable for training.

They are unreadable, without caption, too short, static, with scene cuts, duplicated, or with a watermark.

Shapes: N clips of F frames, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from latent_shift import video
from latent_shift.data.decode import Decoder, aspect_sizes, decode_records
from latent_shift.data.readers import read
from latent_shift.data.records import Problem, Record
from latent_shift.data.shards import without_secrets

ANALYSIS_SIZE = 128
"""Side in pixels at which clips are decoded and watermarks are searched."""
MAX_OVERLAY_SAMPLES = 500
"""Number of clips in which watermarks are searched."""


def check(
    source: str | Path,
    *,
    min_frames: int = 16,
    fps: float = 8,
    size: int | None = None,
    aspects: int | None = None,
    workers: int = 1,
) -> tuple[dict[str, int], list[Problem]]:
    """Decode every clip as training would and report problems.

    Args:
        source: captioned clips in one of the layouts of readers.py.
        min_frames: number of frames that a clip needs at `fps`, unless it loops.
        fps: frames per second.
        size: also report clips that `pack` with this size enlarges or crops to less than half.
        aspects: inspect whole frames, as `pack` with this factor keeps them; None inspects the central
            squares.
        workers: number of processes that decode. A script that uses several does so below
            `if __name__ == "__main__":`.

    Returns:
        The numbers of clips, stills, skipped files and concepts, and the problems. A watermark is reported
        once, for `source`.

    Raises:
        ValueError: no clips in any layout.
    """
    video.check_fps(fps)
    sizes = aspect_sizes(ANALYSIS_SIZE if aspects is None else max(ANALYSIS_SIZE, 2 * aspects), aspects)
    decode = Decoder(sizes, fps, min_frames, aspect_sizes(size, aspects) if size is not None else None)
    counts: Counter[str] = Counter(clips=0, stills=0, skipped=0)
    problems: list[Problem] = []
    concepts = set()
    duplicates = _DuplicateFinder()
    gradients: list[np.ndarray] = []
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as long_clips:
        decode = replace(decode, long_clips=Path(long_clips))
        for record, clip in decode_records(read(source), decode, workers):
            if isinstance(clip, Problem):
                problems.append(clip)
                counts["skipped"] += clip.outcome == "skipped"
                continue
            concepts.add(record.concept)
            counts["clips" if len(clip.frames) > 1 else "stills"] += 1
            problems += [Problem(record.file_name, flaw, "kept") for flaw in clip.flaws]
            if original := duplicates.find_or_add(thumbnail(clip.frames), record):
                place = f" in split {original.split}" if original.split != record.split else ""
                problems.append(
                    Problem(record.file_name, f"duplicate of {original.file_name}{place}", "kept")
                )
            # Reservoir sampling: every clip is equally likely to be among those in which a watermark is searched.
            num_seen = counts["clips"] + counts["stills"]
            slot = num_seen - 1 if num_seen <= MAX_OVERLAY_SAMPLES else int(rng.integers(num_seen))
            if slot < MAX_OVERLAY_SAMPLES:
                gradients[slot : slot + 1] = [_middle_gradient(clip.frames)]
    if overlay := _find_overlay(gradients):
        problems.append(Problem(without_secrets(str(source)), overlay, "kept"))
    return {**counts, "concepts": len(concepts)}, problems


def thumbnail(frames: video.Frames) -> np.ndarray:
    """Return the mean colours of 8x9 tiles in four frames.

    They hardly differ between copies of a clip in other sizes and encodings.

    Args:
        frames: `(F, H, W, 3)`.

    Returns:
        `(864,) uint8`.
    """
    selected = frames[np.linspace(0, len(frames) - 1, 4).round().astype(int)]
    rows = np.linspace(0, frames.shape[1], 8 + 1).round().astype(int)
    columns = np.linspace(0, frames.shape[2], 9 + 1).round().astype(int)
    sums = np.add.reduceat(
        np.add.reduceat(selected.astype(np.float32), rows[:-1], axis=1), columns[:-1], axis=2
    )
    return (
        (sums / (np.diff(rows)[:, None, None] * np.diff(columns)[:, None])).round().astype(np.uint8).ravel()
    )


class _DuplicateFinder:
    """Find clips whose thumbnails differ by at most 12 grey levels in every value.

    A random 64 of the 864 values are compared with all earlier clips first, and the rest only with the
    candidates that remain.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.subset = np.random.default_rng(0).choice(864, 64, replace=False)
        self.subsets_ND = np.empty((0, 64), np.uint8)
        self.thumbnails_ND = np.empty((0, 864), np.uint8)

    def find_or_add(self, thumbnail: np.ndarray, record: Record) -> Record | None:
        """Return the record of an earlier clip that looks the same, or add this one and return None."""
        num = len(self.records)
        subset = thumbnail[self.subset]
        candidates = np.flatnonzero(_is_near(self.subsets_ND[:num], subset))
        matches = candidates[_is_near(self.thumbnails_ND[candidates], thumbnail)]
        if len(matches):
            return self.records[matches[0]]
        if num == len(self.subsets_ND):  # double the capacity
            added = max(1024, num)
            self.subsets_ND = np.concatenate([self.subsets_ND, np.empty((added, 64), np.uint8)])
            self.thumbnails_ND = np.concatenate([self.thumbnails_ND, np.empty((added, 864), np.uint8)])
        self.records.append(record)
        self.subsets_ND[num] = subset
        self.thumbnails_ND[num] = thumbnail
        return None


def _is_near(rows_ND: np.ndarray, row_D: np.ndarray) -> np.ndarray:
    """Return which rows differ by at most 12 in every value, as `(N,) bool`; both are uint8."""
    return (np.maximum(rows_ND, row_D) - np.minimum(rows_ND, row_D) <= 12).all(axis=1)


def _middle_gradient(frames: video.Frames) -> np.ndarray:
    """Return the vertical and horizontal gradient of the middle frame in grey levels,
    `(2, 128, 128) int8`."""
    grey = frames[len(frames) // 2].mean(axis=-1, dtype=np.float32)
    image = np.asarray(Image.fromarray(grey).resize((ANALYSIS_SIZE, ANALYSIS_SIZE)))
    return np.stack(np.gradient(image)).clip(-127, 127).round().astype(np.int8)


def _find_overlay(gradients: list[np.ndarray], *, min_clips: int = 20, strength: float = 3.0) -> str | None:
    """Describe where the median gradient over clips differs from zero, as it does on a fixed overlay.

    Source: Dekel et al. 2017, On the effectiveness of visible watermarks.
    """
    if len(gradients) < min_clips:
        return None
    gradients_NDHW = np.stack(gradients).astype(np.float32)
    median = np.median(gradients_NDHW, axis=0)
    # Standard error of the median of normal variables, with their deviation from the median absolute
    # deviation.
    error = 1.2533 * 1.4826 * np.median(np.abs(gradients_NDHW - median), axis=0) / len(gradients) ** 0.5
    overlay = (np.abs(median) > strength + 5 * error).any(axis=0)
    if overlay.mean() < 1e-3:
        return None
    rows, columns = (np.flatnonzero(overlay.any(axis=axis)) * 100 // ANALYSIS_SIZE for axis in (1, 0))
    place = f"{rows[0]}-{rows[-1]} % from the top and {columns[0]}-{columns[-1]} % from the left"
    return f"a fixed overlay, such as a watermark, {place}"
