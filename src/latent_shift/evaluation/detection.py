"""Prompt adherence from pixels alone: whether a clip shows what its prompt asks for, which is how a thing moves, its colour, that of the
background, and how many there are. No network is needed. The clips show one thing or few on a plain background, as
those of recipes/emoji.

Shapes: F frames of H x W pixels.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

BACKGROUNDS = {
    "white": (255, 255, 255), "red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (250, 215, 70), "green": (60, 160, 80),
    "blue": (50, 100, 220), "purple": (125, 70, 185), "pink": (250, 150, 190), "black": (15, 15, 15), "grey": (130, 130, 130),
    "brown": (120, 75, 45),
}  # fmt: skip
"""Colours of backgrounds, RGB."""
HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 125, "blue": 220, "purple": 275, "pink": 325}
"""Colours of things: hues in degrees."""
CLASSES = {
    "spin": "spin", "flip": "flip", "bounce": "bounce", "slide left": "left", "slide right": "right", "slide up": "up",
    "slide down": "down", "fall": "down", "rise": "up", "grow": "grow", "shrink": "shrink", "shake": "shake", "swing": "swing",
    "fade in": "fade in", "fade out": "fade out", "stay still": "still",
}  # fmt: skip
"""Motion -> what can be seen of it: a thing that falls, and one that slides down, both move down."""


VERSION = 1
"""Of what is detected, in the names of files that keep it; to be raised where a change here detects something else."""
KINDS = ("motion", "colour", "background", "number")
"""What can be asked for and seen: labels of a clip with these names have their words as values; "" asks for nothing."""
MIN_DIFFERENCE = 30
"""Grey levels, of 255, by which a pixel of a thing differs from the background in one channel at least."""


def check_labels(labels: dict[str, str], where: str) -> None:
    """Raise ValueError for labels that `requested` and `cells` do not know; `where` begins the message."""
    known = {
        "motion": tuple(CLASSES),
        "colour": tuple(HUES),
        "background": tuple(BACKGROUNDS),
        "number": tuple("123456"),
    }
    for kind, words in known.items():
        if labels.get(kind, "") not in ("", *words):
            raise ValueError(f"{where}: {kind} {labels[kind]!r}: expected one of {', '.join(words)}")
    if labels.get("held_out", "") not in ("", "company", *known):
        raise ValueError(f"{where}: held_out {labels['held_out']!r}: expected one kind of word, or company")
    if (kind := labels.get("held_out", "")) in known and not labels.get(kind):
        raise ValueError(f"{where}: held_out is {kind}, but there is no {kind}")
    layout = labels.get("layout", "1x1")
    if not re.fullmatch(r"1x[1-6]|[2-6]x1", layout):
        raise ValueError(
            f"{where}: layout {layout!r}: expected 1x1, a row such as 2x1, or a column such as 1x2"
        )
    if (num := len(labels.get("thing", "").split())) > math.prod(map(int, layout.split("x"))):
        raise ValueError(
            f"{where}: {num} things in a layout of {layout}: expected at most one for each place"
        )


def requested(labels: dict[str, str]) -> dict[str, str]:
    """Return what a prompt asks for, in the words of `detected`.

    Args:
        labels: of the clip. Where "held_out" names the kind of a combination that no model was trained on, motion,
            colour and number count in that kind alone. White backgrounds are what is shown unasked: they do not count.
    """
    held_out = labels.get("held_out", "")
    words = {
        kind: word
        for kind in KINDS
        if (word := labels.get(kind, "")) and (kind == "background" or held_out in ("", kind))
    }
    if words.get("background") == "white":
        del words["background"]
    if "motion" in words:
        words["motion"] = CLASSES[words["motion"]]
    return words


def detected(frames: np.ndarray, layout: str = "1x1") -> dict[str, str]:
    """Return what a clip shows of each of `KINDS`, as one word each.

    Args:
        frames: `(F, H, W, 3) uint8`.
        layout: how many things the prompt asks for, side by side and one above the other, such as "2x1". Motion
            and colour are those of the first.
    """
    first = cells(frames, layout)[0]
    return {
        "motion": motion_of(trace(first)),
        "colour": colour_word(first),
        "background": background_word(frames),
        "number": str(number_of(frames)),
    }


def cells(frames: np.ndarray, layout: str) -> list[np.ndarray]:
    """Return the square of each thing of a layout, from the left or from above; those of several in a row fill its middle."""
    columns, rows = map(int, layout.split("x"))
    num, side = columns * rows, frames.shape[1] // (columns * rows)
    middle = (frames.shape[1] - side) // 2
    corners = [(side * k if rows > 1 else middle, side * k if columns > 1 else middle) for k in range(num)]
    return [
        frames[:, top : top + side, left : left + side] for top, left in (corners if num > 1 else [(0, 0)])
    ]


def cut_out(frames: np.ndarray, num: int = 4, side: int = 128) -> np.ndarray:
    """Return what differs from the background, in grey on white and as large as the frame, so that a thing looks alike
    wherever it is, in any colour and on any background.

    Args:
        frames: `(F, H, W, 3) uint8`.
        num: how many frames, spread over those in which the thing is largest.
        side: of the result.

    Returns:
        `(num, side, side, 3) uint8`; white where nothing differs.
    """
    difference = np.abs(frames.astype(np.float32) - background_of(frames)).max(axis=-1)
    weight = difference.mean(axis=(1, 2))
    largest = np.flatnonzero(weight >= 0.5 * weight.max())
    result = np.full((num, side, side, 3), 255, np.uint8)
    for k, index in enumerate(largest[np.linspace(0, len(largest) - 1, num).round().astype(int)]):
        mask = difference[index] > MIN_DIFFERENCE
        if not mask.any():
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        grey = np.where(mask, frames[index].mean(axis=-1), 255).astype(np.uint8)
        part = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        square = np.full((max(part.shape),) * 2, 255, np.uint8)
        top, left = (len(square) - part.shape[0]) // 2, (len(square) - part.shape[1]) // 2
        square[top : top + part.shape[0], left : left + part.shape[1]] = part
        image = Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC)
        result[k] = np.asarray(image)[..., None]
    return result


@dataclass(frozen=True)
class Traces:
    """What is measured of a clip.

    Attributes:
        background: median colour of the border, RGB.
        area: fraction of the frame that differs from the background, `(F,)`.
        contrast: mean difference from the background where any frame differs from it, `(F,)`.
        x, y: centre of the area, from the centre of the frame, as fractions of its side, `(F,)`.
        width, height: standard deviations of the area along both axes, as fractions of the side, `(F,)`.
        angle: by how many degrees each frame is turned from the one before, clockwise, `(F-1,)`.
        correlation: of each frame with the one before after turning it back, `(F-1,)`.
        change: mean difference of each frame from the one before where anything is, in grey levels, `(F-1,)`.
    """

    background: np.ndarray
    area: np.ndarray
    contrast: np.ndarray
    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    height: np.ndarray
    angle: np.ndarray
    correlation: np.ndarray
    change: np.ndarray


def trace(frames: np.ndarray) -> Traces:
    """Measure a clip of `(F, H, W, 3) uint8`."""
    side = frames.shape[1]
    background = background_of(frames)
    difference = np.abs(frames.astype(np.float32) - background).max(axis=-1)
    mask = difference > MIN_DIFFERENCE
    weight = mask.astype(np.float32)
    area = weight.mean(axis=(1, 2))
    anywhere = mask.any(axis=0)
    contrast = difference[:, anywhere].mean(axis=1) if anywhere.any() else np.zeros(len(frames))
    grid = (np.arange(side) + 0.5) / side - 0.5
    total = weight.sum(axis=(1, 2)).clip(1e-6)
    x = (weight.sum(axis=1) @ grid) / total
    y = (weight.sum(axis=2) @ grid) / total
    width = np.sqrt(np.maximum((weight.sum(axis=1) @ grid**2) / total - x**2, 0))
    height = np.sqrt(np.maximum((weight.sum(axis=2) @ grid**2) / total - y**2, 0))
    polar = [_polar(frame, background, x0, y0) for frame, x0, y0 in zip(frames, x, y, strict=True)]
    turns = [_turn(first, second) for first, second in itertools.pairwise(polar)]
    steps = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=-1)
    change = steps[:, anywhere].mean(axis=1) if anywhere.any() else np.zeros(len(frames) - 1)
    angle, correlation = np.array(turns).reshape(-1, 2).T
    return Traces(background, area, contrast, x, y, width, height, angle, correlation, change)


def background_of(frames: np.ndarray) -> np.ndarray:
    """Return the median colour of the two outermost pixels of all frames, RGB."""
    border = [frames[:, :2], frames[:, -2:], frames[:, :, :2], frames[:, :, -2:]]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in border]), axis=0)


def background_word(frames: np.ndarray) -> str:
    """Return the nearest of `BACKGROUNDS`."""
    colour = background_of(frames)
    return min(
        BACKGROUNDS, key=lambda word: np.abs(_opponent(colour) - _opponent(np.array(BACKGROUNDS[word]))).sum()
    )


def _opponent(rgb: np.ndarray) -> np.ndarray:
    """Return lightness and two opponent colours, which weigh more."""
    red, green, blue = rgb.astype(np.float64)
    return np.array([(red + green + blue) / 3, 1.5 * (red - green), (red + green) / 2 - blue])


NUM_ANGLES = 180


def _polar(frame: np.ndarray, background: np.ndarray, x: float, y: float) -> np.ndarray:
    """Return differences from the background on circles around a centre, `(angles, radii, 3)`."""
    side = frame.shape[0]
    angle = 2 * np.pi * np.arange(NUM_ANGLES)[:, None] / NUM_ANGLES
    radius = np.linspace(0.04, 0.45, 24)[None]
    columns = np.round((0.5 + x + radius * np.cos(angle)) * side - 0.5).astype(int)
    rows = np.round((0.5 + y + radius * np.sin(angle)) * side - 0.5).astype(int)
    inside = (columns >= 0) & (columns < side) & (rows >= 0) & (rows < side)
    values = frame[rows.clip(0, side - 1), columns.clip(0, side - 1)].astype(np.float32) - background
    return values * inside[..., None] * np.sqrt(radius)[..., None]


def _turn(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return by how many degrees the second is turned from the first, and how alike they are then."""
    spectrum = np.fft.rfft(second, axis=0) * np.conj(np.fft.rfft(first, axis=0))
    correlation = np.fft.irfft(spectrum.sum(axis=(1, 2)), NUM_ANGLES)
    norm = np.sqrt((first**2).sum() * (second**2).sum())
    best = int(np.argmax(correlation))
    if correlation[0] > correlation[best] - 0.01 * norm:  # as alike unturned: round, or still
        best = 0
    before, at, after = (correlation[(best + step) % NUM_ANGLES] for step in (-1, 0, 1))
    curvature = before - 2 * at + after
    offset = 0.5 * (before - after) / curvature if curvature and best else 0.0
    degrees = (best + offset) * 360 / NUM_ANGLES
    return (degrees + 180) % 360 - 180, float(at / norm) if norm else 0.0


def motion_of(traces: Traces) -> str:
    """Return which motion a clip shows, one of the values of `CLASSES`; "other" if it is none of them."""
    t = traces
    if not t.area.any():
        return "other"
    first, last = slice(0, 3), slice(-3, None)
    contrast = t.contrast[last].mean() / max(t.contrast[first].mean(), 1e-6)
    density = t.contrast / t.area.clip(1e-3)  # of a thing that grows contrast follows the area
    density_ratio = density[last].mean() / max(density[first].mean(), 1e-6)
    area = t.area[last].mean() / max(t.area[first].mean(), 1e-3)
    scale = _ratio(t.width * t.height)
    if contrast > 2.5 or contrast < 0.4:
        if 0.55 < scale < 1.8 or density_ratio > 2.5 or density_ratio < 0.4:
            return "fade in" if contrast > 1 else "fade out"
        return "grow" if contrast > 1 else "shrink"
    if scale > 2 or scale < 0.5:
        return "grow" if area > 1 else "shrink"
    if _flips(t):
        return "flip"
    if t.change.mean() < 1:  # also of what turns and looks the same
        return "still"
    turned = np.cumsum(t.angle)
    is_turned = np.median(t.correlation) > 0.5  # frames of noise are not like each other at any angle
    if is_turned and abs(turned[-1]) > 200:
        return "spin"
    if is_turned and np.ptp(turned) > 14 and abs(turned[-1]) < 60:
        return "swing"
    dx, dy = t.x[last].mean() - t.x[first].mean(), t.y[last].mean() - t.y[first].mean()
    if max(abs(dx), abs(dy)) > 0.12:
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "up" if dy < 0 else "down"
    if np.ptp(t.y) > 0.08 and np.ptp(t.y) > np.ptp(t.x):
        return "bounce"
    if np.ptp(t.x) > 0.03 and np.ptp(t.x) > np.ptp(t.y):
        return "shake"
    return "still" if t.change.mean() < 2.0 else "other"


def _flips(t: Traces) -> bool:
    """Return whether a thing becomes narrow, or too thin to be seen, and is narrower than it was in the frames before and after."""
    width, visible = t.width / t.width.max(), t.area > 0.1 * t.area.max()
    narrow = (width[1:-1] < 0.5) & (width[:-2] < 0.85) & (width[2:] < 0.85)
    return bool(narrow.any() and t.height[visible].min() > 0.7 * t.height.max())


def _ratio(values: np.ndarray) -> float:
    return float(values[-3:].mean() / max(values[:3].mean(), 1e-6))


def colour_word(frames: np.ndarray) -> str:
    """Return the word for the colour of most of what differs from the background, one of `HUES`; "" if there is none."""
    difference = np.abs(frames.astype(np.float32) - background_of(frames)).max(axis=-1)
    return colour_of(frames[difference > 60])


def dominant_hue(pixels: np.ndarray) -> tuple[float, float]:
    """Return the most frequent hue of `(N, 3) uint8` pixels in degrees, and the fraction of them within 25 degrees of it."""
    if not len(pixels):
        return 0.0, 0.0
    hue, saturation, value = _hsv(pixels)
    coloured = (saturation > 0.27) & (value > 0.24)
    histogram = np.histogram(hue[coloured], 36, (0, 360))[0]
    near = (np.argmax(histogram + np.roll(histogram, 1) + np.roll(histogram, -1)) + 0.5) * 10
    distance = (hue[coloured] - near + 180) % 360 - 180
    distance = distance[np.abs(distance) < 25]
    return float((near + distance.mean()) % 360) if len(distance) else 0.0, len(distance) / len(pixels)


def colour_of(pixels: np.ndarray) -> str:
    """Return the word for the colour of most of `(N, 3) uint8` pixels, one of `HUES`, or ""."""
    hue, fraction = dominant_hue(pixels)
    if fraction < 0.5:
        return ""
    _, saturation, value = _hsv(pixels)
    coloured = saturation > 0.27
    word = min(HUES, key=lambda word: abs((hue - HUES[word] + 180) % 360 - 180))
    is_light = word in ("yellow", "orange", "pink")  # dark yellow is olive, and dark orange is brown
    is_near = abs((hue - HUES[word] + 180) % 360 - 180) < 22
    return (
        word
        if is_near
        and value[coloured].mean() > (0.68 if is_light else 0.35)
        and saturation[coloured].mean() > 0.35
        else ""
    )


def _hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hue in degrees, and saturation and value from 0 to 1."""
    rgb = pixels.astype(np.float32) / 255
    value, low = rgb.max(axis=-1), rgb.min(axis=-1)
    chroma = (value - low).clip(1e-6)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    sector = np.where(
        value == red,
        (green - blue) / chroma % 6,
        np.where(value == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    return 60 * sector, (value - low) / value.clip(1e-6), value


def number_of(frames: np.ndarray) -> int:
    """Return how many equal things stand in a row, or in rows, in most of the frames: gaps divide what differs from the background into
    parts that correlate."""
    difference = np.abs(frames.astype(np.float32) - background_of(frames)).max(axis=-1)
    images = np.where(difference > MIN_DIFFERENCE, difference, 0)
    weight = images.mean(axis=(1, 2))
    visible = images[weight >= 0.5 * weight.max()]
    return int(np.bincount([_number_along(image, 1) * _number_along(image, 0) for image in visible]).argmax())


def _number_along(image_HW: np.ndarray, axis: int) -> int:
    """Return into how many parts of equal width and content an image divides along an axis."""
    image = image_HW if axis == 1 else image_HW.T
    profile, side = image.mean(axis=0), image.shape[1]
    for num in range(6, 1, -1):
        bounds = [round(side * k / num) for k in range(num + 1)]
        gaps = [profile[bound - 2 : bound + 2].min() for bound in bounds[1:-1]]
        parts = [image[:, start : start + side // num].ravel() for start in bounds[:-1]]
        sums = [part.sum() for part in parts]
        if max(gaps) < 0.25 * profile.max() and min(sums) > 0.5 * max(sums):
            with np.errstate(invalid="ignore"):  # parts of one grey
                if np.nanmin(np.corrcoef(np.stack(parts))) > 0.5:
                    return num
    return 1
