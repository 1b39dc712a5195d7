"""Frames and masks in any usual form, converted to one.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from latent_shift.video.pictures import to_rgb

Clip = Any
"""A clip: an image, a list of images, or an array or tensor as in `to_frames`."""
OVERSHOOT = 0.01
"""Floats may exceed [0, 1] by this much through rounding; they are clipped."""


def to_uint8(clip: Clip) -> np.ndarray:
    """Convert a clip in any usual form to `(F, H, W, 3) uint8`; see `to_frames`."""
    frames = to_frames(clip)
    return frames if frames.dtype == np.uint8 else (frames * 255).round().astype(np.uint8)


def to_frames(clip: Clip) -> np.ndarray:
    """Convert a clip in any usual form to `(F, H, W, 3)`, uint8 or float32 in [0, 1].

    Args:
        clip: F images of any mode, or one. Or an array or tensor, or a list of F of them, with the channels
            last or first: `(F, H, W, C)`, `(F, C, H, W)`, `(C, F, H, W)`, `(H, W, C)`, `(C, H, W)`, `(F, H, W)`
            or `(H, W)`, also as a batch of one clip, where C is 1 (grey), 3 (RGB) or 4 (RGBA, shown on white).
            Integers are in 0..255, uint16 in 0..65535, floats in [0, 1] or 0..255.

    Raises:
        ValueError: another shape or range, NaN, or infinity; the message says what to do.
        TypeError: something else.
    """
    values = _to_array(clip)
    frames = _to_unit_range(_channels_last(values, prefer_first=_is_tensor(clip)))
    if frames.shape[-1] == 1:
        return np.repeat(frames, 3, axis=-1)
    if frames.shape[-1] == 4:
        white = 255 if frames.dtype == np.uint8 else 1
        alpha = frames[..., 3:].astype(np.float32) / white
        blended = frames[..., :3] * alpha + white * (1 - alpha)
        return blended.round().astype(np.uint8) if frames.dtype == np.uint8 else blended
    return frames


def to_masks(mask: Clip, num_frames: int) -> np.ndarray:
    """Convert a mask in any usual form to `(1 or F, H, W) float32` in [0, 1].

    Args:
        mask: one or F images of any mode, or arrays or tensors `(H, W)`, `(F, H, W)`, or with channels as in
            `to_frames`; colours count by their mean. Booleans, integers that are all 0 or 1, and what
            `to_frames` takes.
        num_frames: F, which tells `(F, H, W)` from `(C, H, W)`.

    Raises:
        ValueError, TypeError: as `to_frames`, and for transparency, which may mean either.
    """
    if _has_transparency(mask):
        raise ValueError("expected black and white, got transparency; pass its alpha channel alone")
    values = _to_array(mask)
    if values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= 1:
        values = values.astype(bool)
    if values.ndim == 3:
        first, last = len(values) in (3, 4), values.shape[-1] in (1, 3, 4)
        has_channels = first and len(values) != num_frames if _is_tensor(mask) else last
        values = values if has_channels else values[..., None]
    frames = _to_unit_range(_channels_last(values, prefer_first=_is_tensor(mask)))
    if frames.shape[-1] == 4:
        raise ValueError("expected black and white, got four channels; pass one of them")
    if len(frames) not in (1, num_frames):
        raise ValueError(f"expected one mask (H, W) or {num_frames}, got {len(frames)}")
    return frames.mean(axis=-1, dtype=np.float32) / (255 if frames.dtype == np.uint8 else 1)


def _has_transparency(clip: Clip) -> bool:
    if isinstance(clip, (list, tuple)):
        return any(_has_transparency(item) for item in clip)
    return isinstance(clip, Image.Image) and clip.has_transparency_data


def _is_tensor(clip: Clip) -> bool:
    item = clip[0] if isinstance(clip, (list, tuple)) and clip else clip
    return hasattr(item, "detach")


def _to_array(clip: Clip) -> np.ndarray:
    if isinstance(clip, (list, tuple)):
        if not clip:
            raise ValueError("expected one frame or more, got an empty list")
        arrays = [_to_array(item) for item in clip]
        if len({array.shape for array in arrays}) > 1:
            shapes = ", ".join(sorted({str(array.shape) for array in arrays}))
            raise ValueError(f"expected frames of one size, got {shapes}; resize them first")
        if len({_number_kind(array) for array in arrays}) > 1:
            dtypes = ", ".join(sorted({str(array.dtype) for array in arrays}))
            raise ValueError(f"expected frames of one dtype, got {dtypes}; convert them first")
        ranges = {_float_range(array) for array in arrays}
        if {1, 255} <= ranges:
            raise ValueError(
                "expected frames of one range, got some in 0..1 and some above; convert them first"
            )
        return np.stack(arrays)
    if isinstance(clip, Image.Image):
        return np.asarray(clip)[..., None] if clip.mode == "F" else np.asarray(to_rgb(clip))
    if hasattr(clip, "detach"):
        clip = clip.detach().cpu()
        # NumPy has no bfloat16
        return (clip.float() if clip.is_floating_point() else clip).numpy()
    if isinstance(clip, np.ndarray) and clip.dtype != object:
        return clip
    raise TypeError(f"expected images, an array or a tensor, got {type(clip).__name__}")


def _float_range(array: np.ndarray) -> int | None:
    """Return the white level that floats can only have, 1 or 255; zeros and ones alone can have either."""
    if array.dtype.kind != "f" or array.size == 0:
        return None
    if array.max() > 1 + OVERSHOOT:
        return 255
    return 1 if (array != array.round()).any() else None


def _number_kind(array: np.ndarray) -> str:
    """Return what decides on the range of the pixels: `np.stack` would mix them."""
    return "int" if array.dtype.kind in "iu" and array.dtype != np.uint16 else array.dtype.kind


def _channels_last(values: np.ndarray, *, prefer_first: bool) -> np.ndarray:
    """Return `(F, H, W, C)` from an array with the channels last or first, or without."""
    shape = values.shape
    if values.ndim == 5 and len(values) == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[None, ..., None]
    order = (-3, -1, 0) if prefer_first else (-1, -3, 0)
    axes = [axis for axis in order if values.ndim in (3, 4) and values.shape[axis] in (1, 3, 4)]
    if values.ndim == 3 and not axes:  # grey frames without channels
        values, axes = values[..., None], [-1]
    if not axes or values.size == 0:
        batch = "; pass one clip of the batch" if values.ndim == 5 else ""
        raise ValueError(
            f"expected frames (F, H, W, C) or (F, C, H, W) with C of 1, 3 or 4, got the shape {shape}{batch}"
        )
    values = np.moveaxis(values, axes[0], -1)
    return values[None] if values.ndim == 3 else values


def _to_unit_range(values: np.ndarray) -> np.ndarray:
    """Return uint8, or float32 in [0, 1]."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        if 0 < values.max() < 256:
            raise ValueError(f"expected uint16 in 0..65535, got at most {values.max()}; use uint8 for 0..255")
        return values.astype(np.float32) / 65535
    if values.dtype.kind not in "iuf":
        raise TypeError(f"expected numbers, got an array of {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        bad = 1 - np.isfinite(values).mean()
        raise ValueError(
            f"{bad:.1%} of the pixels are NaN or infinite; if a model computed them, it overflowed: try bfloat16 or float32 "
            "instead of float16, or a smaller guidance scale"
        )
    if values.dtype.kind == "f" and low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return values.clip(0, 1).astype(np.float32)
    # Dark floats that are no whole numbers may have any range.
    if (
        low >= 0
        and high <= 255
        and (values.dtype.kind != "f" or high >= 128 or (values == values.round()).all())
    ):
        return values.astype(np.float32) / 255 if values.dtype.kind == "f" else values.astype(np.uint8)
    hint = "; (clip + 1) / 2 converts from -1..1" if -1.1 <= low < 0 and high <= 1.1 else ""
    raise ValueError(f"expected pixels in 0..1 or 0..255, got {low:g} to {high:g}{hint}")
