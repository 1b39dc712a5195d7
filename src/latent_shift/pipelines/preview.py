"""Previews of a clip while it is sampled: the colours of latents by one matrix, which costs nothing beside a decoder.

Shapes: F frames, C channels, h w latent height and width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latent_shift.files import atomic_write

FILE = "preview.safetensors"
"""In the folder of a model: the tensor `latents_to_rgb`."""


def fit_preview(latents_NChw: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Fit colours to latents by least squares.

    Args:
        latents_NChw: latents as the U-Net sees them.
        frames: `(N, H, W, 3) uint8` of these latents; H and W are multiples of h and w.

    Returns:
        `(C + 1, 3) float32`: a matrix and, in its last row, an offset, to colours in 0..255.
    """
    num, channels, height, width = latents_NChw.shape
    blocks = frames.reshape(num, height, frames.shape[1] // height, width, frames.shape[2] // width, 3)
    colours = blocks.mean(axis=(2, 4), dtype=np.float64).reshape(-1, 3)
    rows = latents_NChw.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    matrix, *_ = np.linalg.lstsq(np.hstack([rows, np.ones((len(rows), 1))]), colours, rcond=None)
    return matrix.astype(np.float32)


def draw_preview(latents_CFhw: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the colours of a clip's latents, `(F, h, w, 3) uint8`."""
    colours = np.einsum("cfhw,cr->fhwr", latents_CFhw, matrix[:-1]) + matrix[-1]
    return np.nan_to_num(colours).clip(0, 255).astype(np.uint8)


def write_preview(folder: str | Path, matrix: np.ndarray) -> None:
    """Write the matrix of `fit_preview` into a model's folder."""
    from safetensors.numpy import save

    with atomic_write(Path(folder) / FILE) as file:
        file.write(save({"latents_to_rgb": np.ascontiguousarray(matrix, np.float16)}))


def read_preview(folder: str | Path, channels: int) -> np.ndarray | None:
    """Read the matrix of a model; None for a model without.

    Raises:
        ValueError: a file that is not as `write_preview` writes it, or of another number of channels.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            matrix = file.get_tensor("latents_to_rgb").astype(np.float32)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a matrix from latents to colours: {error}") from None
    if matrix.shape != (channels + 1, 3):
        raise ValueError(f"{path}: has the shape {matrix.shape}, expected {(channels + 1, 3)}")
    return matrix
