"""Decode animations and stills with Pillow, as a browser shows them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError

from latent_shift.video.limits import MAX_PICTURE_BYTES, LimitedFile, TimeLimit, check_size
from latent_shift.video.opening import DecodeError, items, library_errors

FORMATS = ("PNG", "GIF", "JPEG", "MPO", "WEBP", "AVIF")
"""Formats of Pillow that may be opened, recognized by content. AVIF needs Pillow 11.3."""


def open_picture(file: LimitedFile) -> Image.Image | None:
    """Open a picture, or return None if the file is of another kind.

    Raises:
        DecodeError: a damaged picture, or one above `limits.MAX_PIXELS` or `limits.MAX_PICTURE_BYTES`.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    head = file.read(16)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    accepts = [Image.OPEN[name][1] for name in formats]
    if size > MAX_PICTURE_BYTES and any(accept and accept(head) for accept in accepts):
        limit = MAX_PICTURE_BYTES / 2**30
        raise DecodeError(f"a picture of {size / 2**30:.1f} GiB; expected at most {limit:g} GiB")
    with warnings.catch_warnings(), library_errors():
        warnings.simplefilter("ignore")  # of many pixels, for which we have a limit, and of damaged previews
        try:
            image = Image.open(cast(BinaryIO, file), formats=formats)
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
    for index, frame in enumerate(items(ImageSequence.Iterator(image))):
        limit.check()
        with library_errors():
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
    with library_errors():
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
    """Return None if the profile changes no colour by more than a level: most are sRGB, and to convert a photo of
    12 megapixels takes 0.2 s."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target_mode = "RGBA" if mode in ("LA", "RGBA") else "RGB"
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target_mode)
    if mode not in ("RGB", "RGBA"):
        return transform
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 15, np.uint8)] * 3), axis=-1).reshape(18, -1, 3)
    colours = Image.fromarray(grid).convert(mode)
    converted = np.asarray(ImageCms.applyTransform(colours, transform)).astype(int)
    return transform if np.abs(converted - np.asarray(colours)).max() > 1 else None
