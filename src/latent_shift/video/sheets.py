"""Contact sheets, and the changes between frames.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from latent_shift.video.frame_file import Frames


def frame_changes(frames: Frames) -> np.ndarray:
    """Return the mean absolute difference in grey levels between successive frames, as `(F - 1,)`."""
    blocks = [np.zeros(0, np.float32)]
    for start in range(0, len(frames) - 1, 64):  # in blocks: a long clip is a file
        grey = frames[start : start + 65].mean(axis=-1, dtype=np.float32)
        blocks.append(np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2)))
    return np.concatenate(blocks)


def find_cuts(frames: Frames) -> list[int]:
    """Return the indices of the frames that begin a new scene.

    At a cut the frames change by more than 27 grey levels (the threshold of PySceneDetect) and by more than
    four times the median of the clip, so that fast motion throughout is not a cut.
    """
    changes = frame_changes(frames)
    return (np.flatnonzero((changes > 27) & (changes > 4 * np.median(changes))) + 1).tolist()


def montage(tiles: np.ndarray, *, columns: int, gap: int = 2) -> np.ndarray:
    """Arrange `(N, H, W, 3) uint8` images in a grid, `gap` white pixels apart; returns
    `(H', W', 3) uint8`."""
    num, height, width, _ = tiles.shape
    rows = -(-num // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def side_by_side(clips: np.ndarray | list[np.ndarray], *, columns: int) -> np.ndarray:
    """Arrange `(F, H, W, 3) uint8` clips of equal shape in a grid; returns one `(F, H', W', 3) uint8`
    clip."""
    return np.stack(
        [montage(np.stack(tiles), columns=min(columns, len(clips))) for tiles in zip(*clips, strict=True)]
    )


def labelled_rows(
    clips: list[np.ndarray], labels: list[str], *, columns: int, label_height: int = 14
) -> np.ndarray:
    """Draw a contact sheet with one row per clip.

    Args:
        clips: `(F, H, W, 3) uint8` clips; F may differ.
        labels: text above each row.
        columns: maximum number of frames per row, evenly spaced over the clip.
        label_height: height of a label in pixels.

    Returns:
        `(H', W', 3) uint8`.
    """
    columns = min(columns, max(map(len, clips)))
    rows = []
    for clip, label in zip(clips, labels, strict=True):
        selected = clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)]
        row = montage(selected, columns=columns)
        header = Image.new("RGB", (row.shape[1], label_height), "white")
        ImageDraw.Draw(header).text((2, 1), label, fill="black")
        rows.append(np.concatenate([np.asarray(header), row]))
    return np.concatenate(rows)
