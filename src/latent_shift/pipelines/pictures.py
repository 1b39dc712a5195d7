"""Pictures, videos and masks as people hand them over in Python, as frames.

PIL images of any mode, arrays and tensors, alone or in lists; channels last or first; whole numbers or
floats. Where a range or shape could mean two things, they are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

Pictures = Any
"""PIL images, arrays or tensors: `(H, W)`, `(H, W, C)` or `(C, H, W)` a picture, `(F, H, W, C)` or
`(F, C, H, W)` a video, or lists of pictures; C is 1, 3, or 4 with transparency. Values are whole numbers, or
floats in [0, 1]."""

_CHANNELS = (1, 3, 4)


def to_frames(pictures: Pictures, name: str) -> list[Image.Image] | np.ndarray:
    """Convert a video to frames.

    Args:
        pictures: a video, see `Pictures`.
        name: name of the argument, for messages.

    Returns:
        F images of mode RGB where `pictures` are images, else `(F, H, W, 3) float32` in [0, 1]. Transparent
        pixels lie over white.

    Raises:
        ValueError: pictures of an unknown type, shape or range.
    """
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError(f"{name}: expected a video, got an empty list")
        frames = [to_picture(picture, name) for picture in pictures]
        if all(isinstance(frame, Image.Image) for frame in frames):
            return [frame for frame in frames if isinstance(frame, Image.Image)]
        arrays = [_to_array(frame) for frame in frames]
        shapes = {array.shape[:2] for array in arrays}
        if len(shapes) > 1:
            raise ValueError(f"{name}: expected frames of one size, got {sorted(shapes)} (height, width)")
        return np.stack(arrays)
    if isinstance(pictures, Image.Image):
        raise ValueError(f"{name}: expected a video, got one picture")
    values = _channels_last(_numbers(pictures, name), name, ndim=4, first=isinstance(pictures, Tensor))
    return _over_white(_to_unit_range(values, name))


def to_picture(picture: Pictures, name: str) -> Image.Image | np.ndarray:
    """Convert one picture to an image of mode RGB, or to `(H, W, 3) float32` in [0, 1]; as `to_frames`."""
    if isinstance(picture, (list, tuple)) and len(picture) == 1:
        picture = picture[0]
    if isinstance(picture, Image.Image):
        return _to_rgb(picture)
    values = _numbers(picture, name)
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    values = _channels_last(values, name, ndim=3, first=isinstance(picture, Tensor))
    return _over_white(_to_unit_range(values, name))


def to_masks(mask: Pictures, num_frames: int) -> np.ndarray:
    """Convert a mask to `(1 or F, H, W) float32` in [0, 1].

    Whole numbers from 0 to 1 (as of SAM and OpenCV) are fractions, others are up to 255.

    Args:
        mask: one picture or F, white where something new is generated; colours count by their lightness.
        num_frames: F.

    Raises:
        ValueError: a mask of an unknown type, shape or range, or another number of pictures.
    """
    if isinstance(mask, (list, tuple)):
        single = [to_masks(picture, 1) for picture in mask]
        if not single or len({picture.shape for picture in single}) > 1:
            raise ValueError(f"mask: expected masks of one size, got {[picture.shape for picture in single]}")
        masks = np.concatenate(single)
    elif isinstance(mask, Image.Image):
        if mask.has_transparency_data:
            raise ValueError(
                "mask: expected black and white, got transparency; pass its alpha channel, mask.getchannel('A')"
            )
        masks = _lightness(mask)[None]
    else:
        values = _numbers(mask, "mask")
        whole_fractions = values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 1
        values = values.astype(np.float32) if whole_fractions else _to_unit_range(values, "mask")
        channels = values.shape[0 if isinstance(mask, Tensor) else -1] in _CHANNELS
        has_channels = values.ndim == 4 or (
            values.ndim == 3 and len(values) not in (1, num_frames) and channels
        )
        if has_channels:
            values = _channels_last(values, "mask", ndim=values.ndim, first=isinstance(mask, Tensor))
            if values.shape[-1] == 4:
                raise ValueError("mask: expected black and white, got four channels; pass one of them")
            values = values.mean(axis=-1)
        masks = values[None] if values.ndim == 2 else values
    if masks.ndim != 3 or len(masks) not in (1, num_frames):
        raise ValueError(f"expected one mask (H, W) or {num_frames}, got shape {masks.shape}")
    return masks


def _numbers(pictures: Pictures, name: str) -> np.ndarray:
    """Return an array or a tensor as a finite array."""
    if isinstance(pictures, Tensor):
        pictures = pictures.detach().cpu()
        pictures = (pictures.float() if pictures.is_floating_point() else pictures).numpy()
    if not isinstance(pictures, np.ndarray) or pictures.dtype.kind not in "biuf":
        kind = (
            f"an array of {pictures.dtype}" if isinstance(pictures, np.ndarray) else type(pictures).__name__
        )
        raise ValueError(f"{name}: expected PIL images, arrays or tensors of numbers, got {kind}")
    if pictures.size == 0:
        raise ValueError(f"{name}: expected pixels, got shape {pictures.shape}")
    if pictures.dtype.kind == "f" and not np.isfinite(pictures).all():
        raise ValueError(f"{name}: holds NaN or infinite numbers")
    return pictures


def _channels_last(values: np.ndarray, name: str, *, ndim: int, first: bool) -> np.ndarray:
    """Return `(..., H, W, C)` of `ndim` dimensions; `first`: channels come first where both may be."""
    shape = values.shape
    if values.ndim == ndim + 1 and len(values) == 1:  # a batch of one
        return _channels_last(values[0], name, ndim=ndim, first=first)
    if values.ndim == ndim - 1 and (ndim == 3 or not {shape[0], shape[-1]} & set(_CHANNELS)):
        return values[..., None]
    if values.ndim == ndim:
        axes = [axis for axis in (-1, ndim - 3, 0) if shape[axis] in _CHANNELS]
        if first and -1 in axes and len(axes) > 1:
            axes.remove(-1)
        if axes:
            return np.moveaxis(values, axes[0], -1)
    what = "(H, W, 3) or (3, H, W)" if ndim == 3 else "(F, H, W, 3) or (F, 3, H, W)"
    raise ValueError(f"{name}: expected shape {what}, got {shape}")


def _to_unit_range(values: np.ndarray, name: str) -> np.ndarray:
    """Return float32 in [0, 1]: whole numbers are out of 255, or of 65535 where that is their type."""
    low, high = values.min(), values.max()
    if values.dtype == bool:
        return values.astype(np.float32)
    most = 65535 if values.dtype == np.uint16 else 255
    if values.dtype.kind == "f":
        if low >= -1e-3 and high <= 1 + 1e-3:
            return values.astype(np.float32).clip(0, 1)
        most = 255 if (values == np.round(values)).all() else 0
    if low < 0 or high > most:
        hint = "; (x + 1) / 2 brings -1..1 to 0..1" if -1 <= low < 0 and high <= 1 else ""
        raise ValueError(
            f"{name}: expected floats from 0 to 1 or whole numbers from 0 to {most or 255}, got {low:g} to {high:g}{hint}"
        )
    return (values / np.float32(most)).astype(np.float32)


def _over_white(values: np.ndarray) -> np.ndarray:
    """Return three channels of one, three, or four with opacity."""
    if values.shape[-1] == 4:
        opacity = values[..., 3:]
        return values[..., :3] * opacity + (1 - opacity)
    return values if values.shape[-1] == 3 else values.repeat(3, axis=-1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright image of mode RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(_lightness(image) * 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _lightness(image: Image.Image) -> np.ndarray:
    """Return `(H, W) float32` in [0, 1]."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode != "F":  # 16 bits, which Pillow also stores in 32
            values = values.astype(np.uint16) if values.min() >= 0 and values.max() <= 65535 else values
        return _to_unit_range(values, f"image of mode {image.mode}")
    return _to_array(image.convert("L"))


def _to_array(picture: Image.Image | np.ndarray) -> np.ndarray:
    return picture if isinstance(picture, np.ndarray) else np.asarray(picture, np.float32) / 255
