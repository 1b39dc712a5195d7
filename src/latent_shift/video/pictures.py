"""Decode animations and stills with Pillow, as a browser shows them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError

from latent_shift.video.limits import LimitedFile, TimeLimit, check_size

FORMATS = ("PNG", "GIF", "JPEG", "MPO", "WEBP", "AVIF")
"""Formats of Pillow that may be opened, recognized by content. AVIF needs Pillow 11.3."""


def open_picture(file: LimitedFile) -> Image.Image | None:
    """Open a picture, or return None if the file is of another kind.

    Raises:
        ValueError: more pixels than `limits.MAX_PIXELS`.
    """
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels, for which we have a limit, and of damaged previews
        try:
            image = Image.open(cast(BinaryIO, file), formats=[name for name in FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            file.seek(0)
            return None
    check_size(*image.size)
    return image


def decode(
    image: Image.Image, limit: TimeLimit, *, background: tuple[int, int, int]
) -> Iterator[tuple[Callable[[], Image.Image], float]]:
    """Yield, for each frame, a function that returns it as an upright RGB image, and the seconds that it is
    on screen."""
    for index, frame in enumerate(ImageSequence.Iterator(image)):
        limit.check()
        # The first picture of an animated PNG may be one for programs that cannot show animations.
        if index == 0 and getattr(image, "default_image", False) and getattr(image, "n_frames", 1) > 1:
            continue
        frame.load()
        check_size(*frame.size)
        seconds = frame.info.get("duration", 100) / 1000
        if seconds == 0 or (seconds < 0.02 and image.format == "GIF"):
            seconds = 0.1  # browsers show such frames for a tenth of a second
        yield partial(to_rgb, frame, background), seconds
        if image.format in ("JPEG", "MPO"):
            return  # the other pictures of a phone's photo are previews, depths and gains


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB in sRGB, transparent pixels over a background."""
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = _from_16_bits(image)
    if image.mode == "La":
        image = image.convert("LA")  # from premultiplied alpha
    if image.mode in ("P", "PA", "1", "RGBa"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if profile:
        image = _to_srgb(image, profile)
    if image.has_transparency_data:
        backdrop = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(backdrop, image.convert("RGBA"))
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32).clip(0, 65535)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours from an ICC profile. A damaged profile, or one for another mode, has no effect, as in
    browsers."""
    try:
        transform = _srgb_transform(profile, image.mode)
        converted = image if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted or image


@lru_cache
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "sRGB" in ImageCms.getProfileDescription(source):
        return None
    target_mode = "RGBA" if mode in ("LA", "RGBA") else "RGB"
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target_mode)
