"""What can be measured of a clip with no network: how much moves, how steadily, and whether it closes.

Clips are `(F, H, W, 3) uint8`. What needs features of others is in distances.py and extractors.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 arrays in dB: 10 log10(255^2 / mean squared error)."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def motion_energy(clip: np.ndarray) -> float:
    """Mean absolute difference of successive frames in grey levels (0..255)."""
    return float(np.abs(np.diff(clip.astype(np.int16), axis=0)).mean())


def coherence(clip: np.ndarray) -> float:
    """Mean correlation of successive frames' pixels, in [-1, 1]; 1 where nothing changes."""
    flat = clip.reshape(len(clip), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1)
    products, even = (flat[1:] * flat[:-1]).sum(axis=1), (norms[1:] < 1e-9) & (norms[:-1] < 1e-9)  # frames of one colour are alike
    return float(np.mean(np.where(even, 1.0, products / np.maximum(norms[1:] * norms[:-1], 1e-9))))


def flicker(clip: np.ndarray) -> float:
    """Mean absolute second difference over time in grey levels: steady motion is small, jitter twice the motion energy."""
    x = clip.astype(np.int16)
    return float(np.abs(x[2:] - 2 * x[1:-1] + x[:-2]).mean())


def persistence(clip: np.ndarray, gap: int = 4) -> float:
    """The change over `gap` frames (of a shorter clip, from end to end) by the change over one: 1 where frames are drawn anew around one picture, more where motion
    leads somewhere."""
    x, gap = clip.astype(np.int16), min(gap, len(clip) - 1)
    return float((np.abs(x[gap:] - x[:-gap]).mean() + 1e-3) / (np.abs(np.diff(x, axis=0)).mean() + 1e-3))


def loop_gap(clip: np.ndarray) -> float:
    """The step from the last frame to the first, by the usual step from frame to frame: 1 where a clip closes as it moves."""
    x = clip.astype(np.int16)
    return float((np.abs(x[0] - x[-1]).mean() + 1e-3) / (np.abs(np.diff(x, axis=0)).mean() + 1e-3))


def warping_error(clip: np.ndarray) -> float:
    """What of a frame is not what moved there: mean absolute difference, in grey levels, of each frame and the one before moved along the
    optical flow (Lai et al. 2018, equation 11, with an L1 norm), where flow forth and back agree (Ruder et al. 2016), or everywhere if
    they do nowhere.

    The flow is OpenCV's dense inverse search (Kroeger et al. 2016). Raises RuntimeError without OpenCV.
    """
    try:
        import cv2
    except ImportError as error:
        raise RuntimeError("warping_error needs optical flow: pip install 'latent-shift-video[eval]'") from error
    search: Any = cv2.DISOpticalFlow_create(  # type: ignore[attr-defined]
        cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
    )
    remap: Any = cv2.remap
    greys, (height, width) = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip], clip.shape[1:3]
    grid_HW2 = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    errors = []
    for k in range(1, len(clip)):
        back_HW2, forth_HW2 = search.calc(greys[k], greys[k - 1], None), search.calc(greys[k - 1], greys[k], None)
        at_HW2 = grid_HW2 + back_HW2
        moved, returned_HW2 = (remap(each, at_HW2, None, cv2.INTER_LINEAR) for each in (clip[k - 1].astype(np.float32), forth_HW2))
        gap, length = (
            np.square(each).sum(axis=-1) for each in (back_HW2 + returned_HW2, np.concatenate([back_HW2, returned_HW2], axis=-1))
        )
        inside = ((at_HW2 >= 0) & (at_HW2 <= (width - 1, height - 1))).all(axis=-1)
        seen = inside & (gap < 0.01 * length + 0.5)
        errors.append(np.abs(clip[k].astype(np.float32) - moved)[seen if seen.any() else ...].mean())
    return float(np.mean(errors))


CLIP_MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "motion_energy": motion_energy, "flicker": flicker, "persistence": persistence, "coherence": coherence,
    "warping_error": warping_error, "loop_gap": loop_gap,
}  # fmt: skip

LEAST_FRAMES = {"flicker": 3, "persistence": 3, "loop_gap": 3}
"""Of which these say something; the others of two."""


def retrieval_ranks(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """For each of N generated clips the rank (1 is best) of the real clip of its own caption among all N, by cosine similarity.

    Args:
        generated, real: `(N, D)` unit vectors, row by row of the same caption.
    """
    similarity = generated @ real.T
    return 1 + (similarity > np.diag(similarity)[:, None]).sum(axis=1)
