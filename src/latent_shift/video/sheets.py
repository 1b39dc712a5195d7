"""Contact sheets, and the changes between frames.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latent_shift.video.frame_file import Frames

MAX_LETTERS = 10_000
"""Maximum number of letters of a text in a sheet."""
_LINE_HEIGHT = 14  # pixels
_MIN_TEXT_WIDTH = 128


def frame_changes(frames: Frames) -> np.ndarray:
    """Return the mean absolute difference in grey levels between successive frames, as `(F - 1,)`."""
    blocks = [np.zeros(0, np.float32)]
    for start in range(0, len(frames) - 1, 64):  # in blocks: a long clip is a file
        grey = frames[start : start + 65].mean(axis=-1, dtype=np.float32)
        blocks.append(np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2)))
    return np.concatenate(blocks)


def find_cuts(frames: Frames) -> list[int]:
    """Return the indices of the frames that begin a new scene.

    At a cut the frames change by more than 27 grey levels (the threshold of PySceneDetect) and by more than
    four times the median of the clip, so that fast motion throughout is not a cut.
    """
    changes = frame_changes(frames)
    return (np.flatnonzero((changes > 27) & (changes > 4 * np.median(changes))) + 1).tolist()


def montage(tiles: np.ndarray, *, columns: int, gap: int = 2) -> np.ndarray:
    """Arrange `(N, H, W, 3) uint8` images in a grid, `gap` white pixels apart; returns
    `(H', W', 3) uint8`."""
    num, height, width, _ = tiles.shape
    rows = -(-num // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def side_by_side(clips: np.ndarray | list[np.ndarray], *, columns: int) -> np.ndarray:
    """Arrange `(F, H, W, 3) uint8` clips of equal shape in a grid; returns one `(F, H', W', 3) uint8`
    clip."""
    return np.stack(
        [montage(np.stack(tiles), columns=min(columns, len(clips))) for tiles in zip(*clips, strict=True)]
    )


def captioned_rows(clips: Sequence[np.ndarray], captions: Sequence[str], *, columns: int) -> np.ndarray:
    """Draw each `(F, H, W, 3) uint8` clip as a row below its whole caption; returns `(H', W', 3) uint8`."""
    rows = []
    for clip in clips:
        selected = clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)]
        rows.append(montage(selected, columns=len(selected)))
    width = max(_MIN_TEXT_WIDTH, *(row.shape[1] for row in rows))
    sheet = []
    for row, caption in zip(rows, captions, strict=True):
        padding = ((0, 0), (0, width - row.shape[1]), (0, 0))
        sheet += [draw_text(caption, width), np.pad(row, padding, constant_values=255)]
    return np.concatenate(sheet)


def draw_text(text: str, width: int) -> np.ndarray:
    """Draw a text in as many lines of `width` pixels as it needs; letters that the font lacks are written as
    escapes, and of those after `MAX_LETTERS` the number. Returns `(H, W, 3) uint8`."""
    font = _load_font()
    if len(text) > MAX_LETTERS:
        text = f"{text[:MAX_LETTERS]}... and {len(text) - MAX_LETTERS} letters"
    written = {letter: letter if _has_letter(font, letter) else ascii(letter)[1:-1] for letter in set(text)}
    text = "".join(written[letter] for letter in text)
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
