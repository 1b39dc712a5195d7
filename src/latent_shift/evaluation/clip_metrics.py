"""Measures of a clip that need no network: amount and steadiness of motion, coherence, warping error and
loop closure.

Clips are `(F, H, W, 3) uint8`. Grey levels are 0..255.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 arrays in dB, 10 log10(255^2 / mean squared
    error)."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def motion_energy(clip: np.ndarray) -> float:
    """Return the mean absolute difference of successive frames in grey levels."""
    return float(np.abs(np.diff(clip.astype(np.int16), axis=0)).mean())


def coherence(clip: np.ndarray) -> float:
    """Return the mean correlation of the pixels of successive frames, in [-1, 1]; 1 where nothing changes."""
    flat = clip.reshape(len(clip), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1)
    products = (flat[1:] * flat[:-1]).sum(axis=1)
    # Two frames of one colour each have no correlation and count as equal.
    both_constant = (norms[1:] < 1e-9) & (norms[:-1] < 1e-9)
    return float(np.mean(np.where(both_constant, 1.0, products / np.maximum(norms[1:] * norms[:-1], 1e-9))))


def flicker(clip: np.ndarray) -> float:
    """Return the mean absolute second difference over time in grey levels; jitter gives twice the motion
    energy."""
    x = clip.astype(np.int16)
    return float(np.abs(x[2:] - 2 * x[1:-1] + x[:-2]).mean())


def persistence(clip: np.ndarray, gap: int = 4) -> float:
    """Return the change over `gap` frames divided by the change over one frame: 1 where frames vary around
    one image, more where motion continues. In clips of at most `gap` frames the gap is that between the
    first and the last.
    """
    x, gap = clip.astype(np.int16), min(gap, len(clip) - 1)
    return float((np.abs(x[gap:] - x[:-gap]).mean() + 1e-3) / (np.abs(np.diff(x, axis=0)).mean() + 1e-3))


def loop_gap(clip: np.ndarray) -> float:
    """Return the change from the last frame to the first in mean changes between frames: 1 where a loop
    closes."""
    x = clip.astype(np.int16)
    return float((np.abs(x[0] - x[-1]).mean() + 1e-3) / (np.abs(np.diff(x, axis=0)).mean() + 1e-3))


def warping_error(clip: np.ndarray) -> float:
    """Return the mean absolute difference, in grey levels, between each frame and the previous one warped
    along the optical flow (Lai et al. 2018, equation 11, with an L1 norm).

    Pixels count where forward and backward flow agree (Ruder et al. 2016), or all of them if they agree
    nowhere. The flow is OpenCV's dense inverse search (Kroeger et al. 2016).

    Raises:
        RuntimeError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise RuntimeError(
            "warping_error needs OpenCV (optical flow): pip install 'latent-shift-video[eval]'"
        ) from error
    search: Any = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    height, width = clip.shape[1:3]
    grid_HW2 = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)

    def sample(image: np.ndarray, at_HW2: np.ndarray) -> Any:
        return cv2.remap(image, at_HW2, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]

    errors = []
    for k in range(1, len(clip)):
        backward_HW2 = search.calc(greys[k], greys[k - 1], None)
        forward_HW2 = search.calc(greys[k - 1], greys[k], None)
        source_HW2 = grid_HW2 + backward_HW2
        warped = sample(clip[k - 1].astype(np.float32), source_HW2)
        returned_HW2 = sample(forward_HW2, source_HW2)
        mismatch = np.square(backward_HW2 + returned_HW2).sum(axis=-1)
        length = np.square(np.concatenate([backward_HW2, returned_HW2], axis=-1)).sum(axis=-1)
        inside = ((source_HW2 >= 0) & (source_HW2 <= (width - 1, height - 1))).all(axis=-1)
        consistent = inside & (mismatch < 0.01 * length + 0.5)
        errors.append(
            np.abs(clip[k].astype(np.float32) - warped)[consistent if consistent.any() else ...].mean()
        )
    return float(np.mean(errors))


def retrieval_ranks(
    generated: np.ndarray, real: np.ndarray, *, names: np.ndarray | None = None, num: int | None = None
) -> np.ndarray:
    """Rank the real row of each generated one among real rows, by cosine similarity; 1 is best. Of equal similarities the own is the last.

    Args:
        generated, real: `(N, D)` features; row n of both belongs to the same caption or thing.
        names: `(N,)`; rows of the same name do not compete. None: each has its own.
        num: rows to rank among, the own and the next ones, the first after the last. None: all.

    Returns:
        `(N,)` ranks from 1.
    """
    first, second = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (generated, real)
    )
    names = np.arange(len(real)) if names is None else names
    among = (np.arange(len(real))[:, None] + np.arange(num or len(real))) % len(real)
    similarity = np.take_along_axis(first @ second.T, among, axis=1)
    competes = names[among] != names[:, None]
    return 1 + (competes & (similarity >= similarity[:, :1])).sum(axis=1)
