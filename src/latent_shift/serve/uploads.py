"""Pictures and videos that clients send: decoded once before they are accepted, in a process of its own that is killed if
it takes too long."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from latent_shift.serve.schema import ApiError

_DATA_URL = re.compile(r"data:(?:image|video)/[\w.+-]+;base64,", re.ASCII)


@dataclass(frozen=True)
class UploadLimits:
    """Greatest uploads. `num_frames` is counted at the frame rate of the model."""

    bytes: int = 32 * 2**20
    pixels: int = 4096 * 4096
    num_frames: int = 256
    seconds: float = 20.0


def decode_data_url(value: object, param: str, limits: UploadLimits) -> bytes:
    """Return the content of a data URL; raise ApiError for anything else. No address is ever fetched."""
    match = _DATA_URL.match(value) if isinstance(value, str) else None
    if match is None:
        raise ApiError(
            400,
            f"{param}: expected a multipart file, or a data URL such as data:image/png;base64,...; other addresses are not fetched",
            code="invalid_value",
            param=param,
        )
    assert isinstance(value, str)
    if len(value) * 3 // 4 > limits.bytes + 100:
        raise too_large(param, limits)
    try:
        return base64.b64decode(value[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: not base64", code="invalid_value", param=param) from None


def too_large(param: str | None, limits: UploadLimits) -> ApiError:
    message = (
        f"{param}: more than {limits.bytes / 2**20:g} MiB"
        if param
        else f"more than {limits.bytes / 2**20:g} MiB"
    )
    return ApiError(413, message, code="too_large", param=param)


@dataclass(frozen=True)
class MediaShape:
    """Pixels of a picture or video, and its frames at the rate of the model, 1 for a still."""

    width: int
    height: int
    num_frames: int


def inspect(content: bytes, fps: float, limits: UploadLimits) -> MediaShape:
    """Decode a picture or video, resampled to `fps`, and return its shape.

    Raises:
        ValueError: it cannot be decoded, or exceeds a limit.
    """
    from latent_shift.video import iterate, read

    first, rate = read("file", content=content, num_frames=1)
    height, width = first.shape[1:3]
    if height * width > limits.pixels:
        raise ValueError(f"has {width}x{height} pixels; expected at most {limits.pixels:,}")
    if not rate:
        return MediaShape(width, height, 1)
    num_frames = sum(
        1 for _ in iterate("file", content=content, fps=fps, size=16, num_frames=limits.num_frames + 1)
    )
    if num_frames > limits.num_frames:
        raise ValueError(
            f"is longer than {limits.num_frames / fps:g} s; expected at most {limits.num_frames} frames at {fps:g} fps"
        )
    return MediaShape(width, height, num_frames)


def name_reference(inputs: dict[str, bytes], shapes: dict[str, MediaShape]) -> None:
    """Rename `input_reference` to what it is, `image` or `video`; raise ApiError for a still where a video is expected, and
    the reverse."""
    if "input_reference" in inputs:  # OpenAI's name for either
        name = "image" if shapes["input_reference"].num_frames == 1 else "video"
        if name in inputs:
            message = f"input_reference and {name}: expected one of them"
            raise ApiError(400, message, code="invalid_value", param="input_reference")
        inputs[name], shapes[name] = inputs.pop("input_reference"), shapes.pop("input_reference")
    for name in ("image", "last_image"):
        if name in shapes and shapes[name].num_frames > 1:
            message = f"{name}: has several frames; expected a picture"
            raise ApiError(400, message, code="invalid_value", param=name)
    if "video" in shapes and shapes["video"].num_frames == 1:
        raise ApiError(
            400, "video: is a picture; expected several frames", code="invalid_value", param="video"
        )
