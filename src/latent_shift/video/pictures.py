"""Decode animations and stills with Pillow, as a browser shows them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from latent_shift.video import animations
from latent_shift.video.color import source_primaries, to_sdr
from latent_shift.video.limits import MAX_PICTURE_BYTES, LimitedFile, TimeLimit, check_size
from latent_shift.video.opening import DecodeError, items, pillow_errors

FORMATS = ("PNG", "GIF", "JPEG", "MPO", "WEBP", "AVIF")
"""Formats of Pillow that may be opened, recognized by content. AVIF needs Pillow 11.3."""
_GREY_LEVELS = {"L;2": 3, "L;4": 15}
"""Mode of the pixels in the file -> the level of white."""
_COLOUR_INFO = ("cicp", "icc_profile", "gamma")
"""Keys of `Image.info`; the first that is there decides."""


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
    with pillow_errors():
        try:
            image = Image.open(cast(BinaryIO, file), formats=formats)
        except OSError as error:
            file.seek(0)
            # ISO/IEC 23008-12: files of these two general brands may hold other pictures than AVIF
            kinds = [
                name for name, accept in zip(formats, accepts, strict=True) if accept and accept(head) is True
            ]
            if kinds and head[4:12] not in (b"ftypmif1", b"ftypmsf1"):
                raise DecodeError(f"a damaged or truncated {kinds[0]}") from error
            if not isinstance(error, UnidentifiedImageError):
                raise
            return None
    check_size(*image.size)
    codes = _read_colour_codes(file, image.format)
    if codes and not (image.format == "AVIF" and "icc_profile" in image.info):
        image.info["cicp"] = codes
    return image


def _read_colour_codes(file: LimitedFile, kind: str | None) -> tuple[int, int] | None:
    """Return the primaries and transfer characteristic, codes of H.273, that a PNG or AVIF states. Pillow ignores
    them."""
    place = file.tell()
    file.seek(0)
    head = file.read(2**16)  # they are before the pixels
    file.seek(place)
    if kind == "PNG":
        codes = head.partition(b"IDAT")[0].partition(b"\0\0\0\4cICP")[2]
        return (codes[0], codes[1]) if len(codes) >= 4 else None
    codes = head.partition(b"colrnclx")[2] if kind == "AVIF" else b""
    return struct.unpack(">2H", codes[:4]) if len(codes) >= 4 else None


def decode(
    file: LimitedFile, image: Image.Image, limit: TimeLimit, *, background: tuple[int, int, int]
) -> Iterator[tuple[Callable[[], Image.Image], float]]:
    """Yield, for each frame, a function that returns it as an upright RGB image, and the seconds that it is
    on screen.

    Args:
        file, image: the file, and the picture in it from `open_picture`.
        background: RGB colour behind transparent pixels.
    """
    if image.format == "GIF" or (image.format == "PNG" and getattr(image, "is_animated", False)):
        frames = _compose(file, image)
    else:
        frames = _load_each(image)
    for frame, seconds in frames:
        limit.check()
        if seconds == 0 or (seconds < 0.02 and image.format == "GIF"):
            seconds = 0.1  # browsers show such frames for a tenth of a second
        yield partial(to_rgb, frame, background), seconds
        if image.format in ("JPEG", "MPO"):
            return  # the other pictures of a phone's photo are previews, depths and gains


def _load_each(image: Image.Image) -> Iterator[tuple[Image.Image, float]]:
    for frame in items(ImageSequence.Iterator(image)):
        _load(frame)
        yield frame, frame.info.get("duration", 100) / 1000


def _load(image: Image.Image) -> None:
    check_size(*image.size)
    with pillow_errors():
        _scale_transparent_colour(image)
        image.load()


def _scale_transparent_colour(image: Image.Image) -> None:
    """Pillow leaves the transparent colour of a PNG at the bit depth of the file, unlike the pixels."""
    colour = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or colour is None or not image.tile:
        return
    mode = image.tile[0][3]
    if mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif mode in _GREY_LEVELS:
        image.info["transparency"] = colour * 255 // _GREY_LEVELS[mode]


def _compose(file: LimitedFile, image: Image.Image) -> Iterator[tuple[Image.Image, float]]:
    """Yield the frames of a PNG or GIF and their seconds; see `animations`."""
    info: dict[Any, Any] = {key: image.info[key] for key in ("srgb", *_COLOUR_INFO) if key in image.info}
    if image.format == "GIF":
        parts = animations.split_gif(file)
    else:
        info |= _read_orientation(file)
        parts = animations.split_png(file)
    for frame, seconds in animations.compose(parts, image.size, _open_rgba):
        frame.info = dict(info)
        yield frame, seconds


def _read_orientation(file: LimitedFile) -> dict[str, Any]:
    """Return the items of `Image.info` that hold the orientation of an animated PNG. They may follow the frames."""
    with pillow_errors():
        image = Image.open(io.BytesIO(animations.without_pixels(file)), formats=["PNG"])
        image.load()
    names = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
    return {name: image.info[name] for name in names if name in image.info}


def _open_rgba(content: bytes) -> Image.Image:
    with pillow_errors():
        image = Image.open(io.BytesIO(content), formats=["PNG", "GIF"])
        _load(image)
        return (_from_16_bits(image) if image.mode.startswith("I") else image).convert("RGBA")


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB in sRGB, transparent pixels over a background."""
    with pillow_errors():
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = _from_16_bits(image)
    if image.mode == "La":
        image = image.convert("LA")  # from premultiplied alpha
    if image.mode in ("P", "PA", "1", "RGBa", "RGB"):  # a transparent colour is that before the conversion
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "L" and image.has_transparency_data:
        image = image.convert("LA")
    if image.mode not in ("LA", "RGBA"):
        return _to_srgb(image).convert("RGB")
    colours = _to_srgb(image.convert(image.mode.removesuffix("A"))).convert("RGB")
    return Image.composite(colours, Image.new("RGB", image.size, background), image.getchannel("A"))


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32).clip(0, 65535)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of an opaque image from what its file says of them: codes of H.273, or else an ICC
    profile, or else a gamma. A damaged profile, or one for another mode, has no effect, as in browsers."""
    codes, profile, gamma = (image.info.get(name) for name in _COLOUR_INFO)
    if codes:
        primaries = source_primaries(*codes)
        if primaries is None:
            return image
        pixels = np.asarray(image.convert("RGB")).astype(np.uint16) << 8
        return Image.fromarray(to_sdr(pixels, primaries, codes[1]))
    if not profile:
        if not gamma or "srgb" in image.info or abs(2.2 * gamma - 1) < 0.05:
            return image
        return _from_gamma(image, gamma)
    try:
        transform = _srgb_transform(profile, image.mode)
        converted = image if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted or image


def _from_gamma(image: Image.Image, gamma: float) -> Image.Image:
    light = (np.arange(256) / 255) ** (1 / gamma)
    signal = np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.convert("RGB").point((255 * signal).round().astype(int).tolist() * 3)


@lru_cache
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return None if the profile changes no colour by more than a level: most are sRGB, and to convert a photo of
    12 megapixels takes 0.2 s."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return transform
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(18, -1, 3)
    colours = Image.fromarray(grid)
    converted = np.asarray(ImageCms.applyTransform(colours, transform)).astype(int)
    return transform if np.abs(converted - np.asarray(colours)).max() > 1 else None
