"""What is wrong with captioned clips, told before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from latent_shift import video
from latent_shift.data.pack import decoded, sizes_of
from latent_shift.data.readers import Record, read

SIDE = 128
"""Clips are looked at in this many pixels a side."""


def check(
    source: str | Path, *, min_frames: int = 16, fps: float = 8, aspects: int | None = None, workers: int = 1
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read every clip as training would.

    Args:
        source: captioned clips in one of the layouts of sources.py.
        min_frames: frames that a clip must have at `fps`, unless it loops.
        fps: frames a second.
        aspects: clips keep their shapes, as they do in `data.pack` with it; None: their central squares are looked at.
        workers: processes that decode.

    Returns:
        Counts of clips, stills and concepts; and (file name, reason) of each that is no good clip: unreadable, without caption, too
        short, static, with a cut, seen before. What many clips show at the same place, a watermark, is told of the source as a whole.

    Raises:
        ValueError: no clips in any layout.
    """
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    sizes = sizes_of(SIDE if aspects is None else max(SIDE, 2 * aspects), aspects)
    counts: Counter[str] = Counter(clips=0, stills=0)
    problems: list[tuple[str, str]] = []
    concepts, seen, edges, rng = set(), _Seen(), list[np.ndarray](), np.random.default_rng(0)
    for record, frames in decoded(read(source), sizes, fps, workers):
        concepts.add(record.concept)
        if isinstance(frames, str):
            problems.append((record.file_name, frames))
            continue
        counts["clips" if len(frames) > 1 else "stills"] += 1
        grey = frames.mean(axis=-1, dtype=np.float32)
        problems += [(record.file_name, reason) for reason in _of_clip(record, frames, min_frames, fps)]
        if first := seen.before(thumbnail(frames), record.file_name):
            problems.append((record.file_name, f"shows what {first} shows"))
        num = counts["clips"] + counts["stills"]  # of all of them 500 are kept, any as likely as any other
        if (place := num - 1 if num <= 500 else int(rng.integers(num))) < 500:
            middle = np.asarray(Image.fromarray(grey[len(grey) // 2]).resize((SIDE, SIDE)))
            edges[place : place + 1] = [np.stack(np.gradient(middle)).clip(-127, 127).round().astype(np.int8)]
    if overlay := _overlay(edges):
        problems.append((str(source), overlay))
    return {**counts, "concepts": len(concepts)}, problems


def _of_clip(record: Record, frames: np.ndarray, min_frames: int, fps: float) -> list[str]:
    if len(frames) == 1:
        moving = Path(record.file_name).suffix.lower() in video.VIDEO_SUFFIXES
        return [f"1 frame at {fps:g} fps: counts as a still"] if moving else []
    reasons = []
    if len(frames) < min_frames and not record.loop:
        reasons.append(f"{len(frames)} frames at {fps:g} fps, {min_frames} wanted")
    if video.changes(frames).mean() < 0.05:
        reasons.append("static: no frame differs from the one before")
    if cuts := video.cuts(frames):
        reasons.append(f"a cut to another scene at {', '.join(f'{frame / fps:.1f} s' for frame in cuts)}")
    return reasons


def thumbnail(frames: np.ndarray) -> np.ndarray:
    """`(864,) uint8`: the colours of 8x9 tiles in four frames of a `(F, H, W, 3)` clip, which hardly differ between copies in other
    sizes and encodings."""
    picked = frames[np.linspace(0, len(frames) - 1, 4).round().astype(int)]
    rows, columns = (
        np.linspace(0, length, number + 1).round().astype(int) for length, number in zip(frames.shape[1:3], (8, 9), strict=True)
    )
    sums = np.add.reduceat(np.add.reduceat(picked.astype(np.float32), rows[:-1], axis=1), columns[:-1], axis=2)
    return (sums / (np.diff(rows)[:, None, None] * np.diff(columns)[:, None])).round().astype(np.uint8).ravel()


class _Seen:
    """The clips so far. A clip is a copy if no tile differs by more than 12 grey levels in any colour; 64 tiles of each are compared
    with those of all the others, and the rest with those that are left."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.thumbnails = np.empty((0, 864), np.uint8)
        self.few = np.random.default_rng(0).choice(864, 64, replace=False)
        self.heads = np.empty((0, 64), np.uint8)

    def before(self, thumbnail: np.ndarray, name: str) -> str | None:
        """Who was seen that looks the same; if nobody was, `name` is from now on."""
        num, head = len(self.names), thumbnail[self.few]
        near = np.flatnonzero(_near(self.heads[:num], head))
        same = near[_near(self.thumbnails[near], thumbnail)]
        if len(same):
            return self.names[same[0]]
        if num == len(self.heads):  # twice the room
            grow = max(1024, num)
            self.heads = np.concatenate([self.heads, np.empty((grow, 64), np.uint8)])
            self.thumbnails = np.concatenate([self.thumbnails, np.empty((grow, 864), np.uint8)])
        self.names.append(name)
        self.heads[num], self.thumbnails[num] = head, thumbnail
        return None


def _near(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Which rows of `(N, D) uint8` differ from `(D,)` by 12 at most, in every place."""
    return (np.maximum(many, one) - np.minimum(many, one) <= 12).all(axis=1)


def _overlay(edges: list[np.ndarray], *, least: int = 20, strength: float = 3.0) -> str | None:
    """Edges that most clips have at the same place (Dekel et al. 2017: the median over clips of the gradient there is not zero)."""
    if len(edges) < least:
        return None
    gradients = np.stack(edges).astype(np.float32)
    median = np.median(gradients, axis=0)
    error = 1.2533 * 1.4826 * np.median(np.abs(gradients - median), axis=0) / len(edges) ** 0.5  # of the median of normal numbers
    found = (np.abs(median) > strength + 5 * error).any(axis=0)
    if found.mean() < 1e-3:
        return None
    rows, columns = (np.flatnonzero(found.any(axis=axis)) * 100 // SIDE for axis in (1, 0))
    return f"a fixed overlay, such as a watermark, {rows[0]}-{rows[-1]} % from the top and {columns[0]}-{columns[-1]} % from the left"
