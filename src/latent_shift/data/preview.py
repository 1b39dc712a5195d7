"""Draw a contact sheet of a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latent_shift import video
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store

_LINE_HEIGHT = 14  # pixels


def preview(
    store: Store,
    *,
    rows: int | None = 8,
    columns: int = 8,
    num_frames: int | None = None,
    stride: int = 1,
    splits: tuple[str, ...] = ("train",),
    seed: int = 0,
) -> tuple[np.ndarray, list[str]]:
    """Draw a contact sheet of different clips, in which every concept is equally likely.

    Args:
        store: a store of pixels, or of latents, which are decoded.
        rows: number of clips; None shows all.
        columns: number of frames shown per clip, evenly spaced.
        num_frames: `data.num_frames` of the training to imitate; None shows stills and clips of every length.
        stride: show every `stride`-th frame, as `data.strides` does.
        splits: splits to sample from.
        seed: seed of the sampling.

    Returns:
        The `(H, W, 3) uint8` sheet and the captions in it.

    Raises:
        ValueError: no suitable clip.
    """
    rng = np.random.default_rng(seed)
    indices = store.select(splits=splits, num_frames=num_frames or 1, stride=stride)
    clips, captions = [], []
    for index in BalancedSampler(store, indices).draw_distinct(rng, rows or len(indices)):
        length = num_frames or min(columns, (store.records[index].num_frames - 1) // stride + 1)
        clips.append(store.draw_pixels(rng, index, length, stride=stride))
        captions.append(store.caption(rng, index, stride=stride if length > 1 else 1))
    return _captioned_rows(clips, captions, columns=columns), captions


def _captioned_rows(clips: Sequence[np.ndarray], captions: Sequence[str], *, columns: int) -> np.ndarray:
    """Draw each `(F, H, W, 3) uint8` clip as a row below its whole caption; returns `(H', W', 3) uint8`."""
    rows = []
    for clip in clips:
        selected = clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)]
        rows.append(video.montage(selected, columns=len(selected)))
    width = max(row.shape[1] for row in rows)
    sheet = []
    for row, caption in zip(rows, captions, strict=True):
        padding = ((0, 0), (0, width - row.shape[1]), (0, 0))
        sheet += [draw_text(caption, width), np.pad(row, padding, constant_values=255)]
    return np.concatenate(sheet)


def draw_text(text: str, width: int) -> np.ndarray:
    """Draw a text in as many lines of `width` pixels as it needs; letters that the font lacks are written as
    escapes. Returns `(H, W, 3) uint8`."""
    font = _load_font()
    text = "".join(letter if _has_letter(font, letter) else ascii(letter)[1:-1] for letter in text)
    lines, line = [], ""
    for letter in text:
        if line and font.getlength(line + letter) > width - 4:
            head, space, tail = line.rpartition(" ")  # at a space, unless the word fills the line
            lines.append(head if space else line)
            line = tail if space else ""
        line += letter
    lines.append(line)
    image = Image.new("RGB", (width, _LINE_HEIGHT * len(lines)), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((2, 1 + _LINE_HEIGHT * number), line, fill="black", font=font)
    return np.asarray(image)


def _load_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font of this machine with the letters of many languages, or Pillow's own with those of Latin-1."""
    for name in ("DejaVuSans.ttf", "Arial Unicode.ttf", "NotoSans-Regular.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, 10)
        except OSError:
            continue
    return ImageFont.load_default_imagefont()


def _has_letter(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, letter: str) -> bool:
    """Return whether a font has a letter, and does not draw its sign for a missing one."""
    if letter.isspace():
        return letter == " "
    if isinstance(font, ImageFont.ImageFont):
        return 0x20 < ord(letter) < 0x100
    masks = [font.getmask(text) for text in (letter, "\uffff")]
    return len({(mask.size, bytes(mask)) for mask in masks}) == 2
