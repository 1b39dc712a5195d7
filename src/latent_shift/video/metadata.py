"""Text that a file carries about itself: the settings of a generated clip.

It is a JSON object in ASCII in the comment of the file: the tag "comment" in .mp4 and .webm, the comment extension of
.gif, the text chunk "Comment" of .png, and the Exif tag ImageDescription of .webp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from latent_shift.files import parse_json
from latent_shift.video import films, pictures
from latent_shift.video.limits import LimitedFile, TimeLimit
from latent_shift.video.opening import DecodeError, open_file, pillow_errors

TAG = "comment"
_PNG_TAG = "Comment"


def dump(metadata: Mapping[str, str]) -> str:
    """Return the JSON text in ASCII, which every container stores alike."""
    return json.dumps(dict(metadata))


def picture_options(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the options of Pillow's `save` that store metadata in a .gif, .png or .webp; each format takes
    its own."""
    if not metadata:
        return {}
    text = dump(metadata)
    png, exif = PngInfo(), Image.Exif()
    png.add_text(_PNG_TAG, text)
    exif[ExifTags.Base.ImageDescription] = text
    return {"comment": text.encode(), "pnginfo": png, "exif": exif}


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return what `write(..., metadata=...)` stored in a file, or {} if there is nothing.

    Raises:
        ValueError: not a video or image; the message names the file.
    """
    path = Path(path)
    with open_file(path) as opened:
        try:
            return _parse(_read_comment(LimitedFile(opened, TimeLimit())))
        except DecodeError as error:
            raise ValueError(f"{path}: cannot be decoded: {error}") from error


def _read_comment(file: LimitedFile) -> str | bytes | None:
    image = pictures.open_picture(file)
    if image is None:
        container, _ = films.open_container(file)
        with container:
            return {name.lower(): text for name, text in container.metadata.items()}.get(TAG)
    if image.format == "WEBP":
        with pillow_errors():
            return image.getexif().get(ExifTags.Base.ImageDescription)
    return image.info.get(TAG) or image.info.get(_PNG_TAG)


def _parse(text: str | bytes | None) -> dict[str, str]:
    """Return the object in a comment; comments of other programs are no objects of texts."""
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    try:
        value = parse_json(text or "")
    except ValueError:
        return {}
    is_ours = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return value if is_ours else {}
