"""Compose clips of emoji that move, change colour and keep company, with captions that are true by construction.

    python recipes/emoji/compose.py data/emoji data/emoji-composed --num 10000

A clip shows a thing, two or three of it, or two things, from stills and animations with transparency. What it shows is a `Scene`,
which follows from a seed and a number. The store has the clips to train on, and in split `val_words` 400 clips with combinations that
are held out of them (splits.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence
from rich.progress import track
from splits import PEOPLE, SIGNS, is_held_out, key, split_of_concept
from wordings import COLOUR_WORD, NUMBERS, VERBS, names, on_background, phrase, plural, relation

from latent_shift.data.records import Record
from latent_shift.data.store_writer import PIXELS, StoreWriter, store_folder
from latent_shift.evaluation.detection import BACKGROUNDS, CLASSES, HUES, colour_of, dominant_hue

SIDE, NUM_FRAMES, FPS = 128, 16, 8
SUPERSAMPLING = 2  # a frame is drawn at twice its side and averaged
TIME = np.arange(NUM_FRAMES) / (NUM_FRAMES - 1)  # from 0 to 1
VALIDATION = 2**32  # the seed of the clips with held-out combinations
BACKGROUND_WORDS = [word for word in BACKGROUNDS if word != "white"]
CYCLE = 2 * np.pi * np.arange(NUM_FRAMES) / NUM_FRAMES  # one round; the first frame follows the last


@dataclass(frozen=True)
class Thing:
    """An emoji: its code point, names, files below the folder of the data, and whether there can be two of it."""

    code: str
    names: tuple[str, ...]
    still: str
    animation: str = ""
    is_countable: bool = False


@dataclass(frozen=True)
class Scene:
    """What a clip shows.

    Attributes:
        things: code points of one thing or two.
        motion: one of `wordings.VERBS`; "" is none of them: an animation where it is.
        animated: whether the first thing moves as in its animation.
        colour: word for the colour that the first thing was turned to, or "".
        background: word for the colour of the background, or "": white.
        count: how many of the first thing.
        beside: whether two things are side by side, else one above the other.
    """

    things: tuple[str, ...]
    motion: str = ""
    animated: bool = False
    colour: str = ""
    background: str = ""
    count: int = 1
    beside: bool = True

    @property
    def layout(self) -> tuple[int, int]:
        """Number of things side by side, and one above the other."""
        num = max(self.count, len(self.things))
        return (num, 1) if self.count > 1 or self.beside else (1, num)

    @property
    def held_out(self) -> str:
        """The kinds of combination in it that are held out: "motion", "colour", "number", "company", joined by " and "; "" if none.

        Motions that look alike, such as falling and sliding down, are held out together, and with every thing that moves.
        """
        first, motion = self.things[0], CLASSES.get(self.motion, "")
        combinations = {
            "motion": [(thing, motion) for thing in self.things if motion],
            "colour": [(first, self.colour)] if self.colour else [],
            "number": [(first, NUMBERS[self.count])] if self.count > 1 else [],
            "company": [self.things] if len(self.things) > 1 else [],
        }
        return " and ".join(
            kind
            for kind, pairs in combinations.items()
            if any(is_held_out(" ".join(sorted(pair))) for pair in pairs)
        )


# Placements: the centre (x to the right, y down, from the centre of the frame), width, height, angle in degrees and opacity of a thing in
# each frame. Lengths are fractions of the frame's side; a thing of width 1 and height 1 fills the frame.


@dataclass
class Placement:
    x: np.ndarray | float = 0.0
    y: np.ndarray | float = 0.0
    width: np.ndarray | float = 1.0
    height: np.ndarray | float = 1.0
    angle: np.ndarray | float = 0.0
    opacity: np.ndarray | float = 1.0

    def frames(self) -> np.ndarray:
        """Return the numbers of each frame, `(F, 6)`."""
        values = (self.x, self.y, self.width, self.height, self.angle, self.opacity)
        return np.stack([np.broadcast_to(value, NUM_FRAMES) for value in values], axis=1)


def place(motion: str, rng: np.random.Generator, size: float) -> Placement:
    """Return where a thing of a size is in each frame of a motion."""
    turns = int(rng.integers(1, 3))
    direction = 1 if rng.random() < 0.5 else -1
    path = rng.uniform(0.18, 0.22)
    extent = rng.uniform(0.85, 1.0)
    table: dict[str, Callable[[], Placement]] = {
        "": lambda: Placement(width=size, height=size),
        "stay still": lambda: Placement(width=size, height=size),
        "spin": lambda: Placement(width=0.8 * size, height=0.8 * size, angle=direction * turns * np.degrees(CYCLE)),
        "flip": lambda: Placement(width=size * np.cos(turns * CYCLE), height=size),
        "bounce": lambda: Placement(
            y=0.16 - rng.uniform(0.25, 0.32) * np.abs(np.sin(turns * CYCLE / 2 + np.pi / 32)), width=0.65 * size, height=0.65 * size
        ),
        "slide left": lambda: Placement(x=path * (1 - 2 * TIME), width=0.6 * size, height=0.6 * size),
        "slide right": lambda: Placement(x=path * (2 * TIME - 1), width=0.6 * size, height=0.6 * size),
        "slide up": lambda: Placement(y=path * (1 - 2 * TIME), width=0.6 * size, height=0.6 * size),
        "slide down": lambda: Placement(y=path * (2 * TIME - 1), width=0.6 * size, height=0.6 * size),
        "fall": lambda: Placement(y=path * (2 * TIME**2 - 1), width=0.6 * size, height=0.6 * size),
        "rise": lambda: Placement(y=path * (1 - 2 * TIME**2), width=0.6 * size, height=0.6 * size),
        "grow": lambda: Placement(width=extent * (0.3 + 0.7 * TIME), height=extent * (0.3 + 0.7 * TIME)),
        "shrink": lambda: Placement(width=extent * (1 - 0.7 * TIME), height=extent * (1 - 0.7 * TIME)),
        "shake": lambda: Placement(x=rng.uniform(0.04, 0.06) * np.sin(4 * CYCLE), width=0.85 * size, height=0.85 * size),
        "swing": lambda: swing(rng.uniform(22, 35) * np.sin(turns * CYCLE), 0.8 * size),
        "fade in": lambda: Placement(width=size, height=size, opacity=TIME),
        "fade out": lambda: Placement(width=size, height=size, opacity=1 - TIME),
    }  # fmt: skip
    return table[motion]()


def swing(angle: np.ndarray, size: float) -> Placement:
    """Return a pendulum that hangs from the middle of its upper edge."""
    half = size / 2
    return Placement(
        half * np.sin(np.radians(angle)), half * (np.cos(np.radians(angle)) - 1), size, size, -angle
    )


class Cutouts:
    """Stills and animations with transparency, cropped to what is visible and made square.

    Args:
        folder: written by fetch.py.
        things: by code point.
    """

    def __init__(self, folder: Path, things: dict[str, Thing]):
        self.folder, self.things = folder, things
        self.frames = functools.lru_cache(64)(self._read)

    def _read(self, code: str, animated: bool) -> tuple[Image.Image, ...]:
        """Return the frame of a still, or `NUM_FRAMES` of an animation from its first."""
        thing = self.things[code]
        if animated:
            return _crop(read_animation(self.folder / thing.animation))
        with Image.open(self.folder / thing.still) as file:
            return _crop((file.convert("RGBA"),))


def read_animation(path: Path) -> tuple[Image.Image, ...]:
    """Return the first `NUM_FRAMES` at `FPS` with their transparency; a shorter one begins again."""
    frames, ends, clock = [], [], 0  # ms
    with Image.open(path) as file:
        for frame in ImageSequence.Iterator(file):
            frames.append(frame.convert("RGBA"))
            clock += round(file.info.get("duration", 42))
            ends.append(clock)
            if clock >= 1000 * NUM_FRAMES / FPS:
                break
    times = np.arange(NUM_FRAMES) * (1000 // FPS) % clock
    return tuple(frames[index] for index in np.searchsorted(ends, times, side="right"))


def _crop(frames: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
    """Return frames cropped to the square around what is visible in any of them."""
    boxes = [
        box
        for frame in frames
        if (box := frame.getchannel("A").point(lambda alpha: 255 * (alpha > 12)).getbbox())
    ]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    square = tuple(round(value) for value in (x - half, y - half, x + half, y + half))
    return tuple(frame.crop(square) for frame in frames)  # beyond the edge it is transparent


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return the opaque pixels of a cut-out, `(N, 3) uint8`."""
    rgba = np.asarray(image)
    return rgba[rgba[..., 3] > 200][:, :3]


def turn_hue(image: Image.Image, degrees: float) -> Image.Image:
    """Return an image with all hues turned."""
    alpha = image.getchannel("A")
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    turned = hue.point([round(level + degrees * 255 / 360) % 256 for level in range(256)])
    result = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    result.putalpha(alpha)
    return result


def render(scene: Scene, cutouts: Cutouts, rng: np.random.Generator) -> np.ndarray:
    """Return the frames of a scene, `(16, 128, 128, 3) uint8`."""
    placements = arrange(scene, rng)
    images = []
    for number, code in enumerate(scene.things):
        frames = cutouts.frames(code, scene.animated and number == 0)
        if scene.colour and number == 0:
            angle = HUES[scene.colour] - dominant_hue(pixels_of(cutouts.frames(code, False)[0]))[0]
            frames = tuple(turn_hue(frame, angle) for frame in frames)
        images.append(frames)
    colour = (255, 255, 255)
    if scene.background:
        colour = tuple(
            int(np.clip(value + rng.integers(-10, 11), 0, 255)) for value in BACKGROUNDS[scene.background]
        )  # type: ignore[assignment]
    numbers = [placement.frames() for _, placement in placements]
    clip = np.empty((NUM_FRAMES, SIDE, SIDE, 3), np.uint8)
    for k in range(NUM_FRAMES):
        canvas = Image.new("RGBA", (SIDE * SUPERSAMPLING,) * 2, (*colour, 255))
        for (thing, _), values in zip(placements, numbers, strict=True):
            frames = images[thing]
            paste(canvas, frames[k % len(frames)], *values[k])
        clip[k] = np.asarray(canvas.convert("RGB").reduce(SUPERSAMPLING))
    return clip


def paste(
    canvas: Image.Image,
    image: Image.Image,
    x: float,
    y: float,
    width: float,
    height: float,
    angle: float,
    opacity: float,
) -> None:
    """Draw a cut-out onto a canvas, as placed; a negative width mirrors it."""
    side = canvas.width
    if min(abs(width), height) * side < 2 or opacity <= 0:
        return
    # Downscaled first, because a transform has no antialiasing.
    factor = max(1, int(image.width / (max(abs(width), height) * side)))
    image = image.reduce(factor) if factor > 1 else image
    scale_x, scale_y = image.width / (width * side), image.height / (height * side)
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    centre_x, centre_y = side * (0.5 + x), side * (0.5 + y)
    a, b, d, e = scale_x * cos, scale_x * sin, -scale_y * sin, scale_y * cos
    offset_x = image.width / 2 - a * centre_x - b * centre_y
    offset_y = image.height / 2 - d * centre_x - e * centre_y
    layer = image.transform(
        canvas.size, Image.Transform.AFFINE, (a, b, offset_x, d, e, offset_y), Image.Resampling.BILINEAR
    )
    if opacity < 1:
        layer.putalpha(layer.getchannel("A").point([round(level * opacity) for level in range(256)]))
    canvas.alpha_composite(layer)


def arrange(scene: Scene, rng: np.random.Generator) -> list[tuple[int, Placement]]:
    """Return the number of a thing and its placement, for everything in a scene. Several move alike, each in a square of its own."""
    columns, rows = scene.layout
    num = columns * rows
    if num == 1:
        return [(0, place(scene.motion, rng, rng.uniform(0.85, 1.0)))]
    cell, size = 1 / num, rng.uniform(0.87, 0.96)
    seed = int(rng.integers(2**32))
    result = []
    for index in range(num):
        inner = place(scene.motion, np.random.default_rng(seed), size)
        offset = (index - (num - 1) / 2) * cell
        x, y = inner.x * cell + offset * (columns > 1), inner.y * cell + offset * (rows > 1)
        placement = Placement(x, y, inner.width * cell, inner.height * cell, inner.angle, inner.opacity)
        result.append((index if len(scene.things) > 1 else 0, placement))
    return result


KINDS = {"motion": 0.45, "animation": 0.1, "colour": 0.15, "number": 0.12, "company": 0.18}
"""What a scene is about -> fraction of the clips."""
STILL_SHARE = {"motion": 0, "animation": 0.5, "colour": 0.4, "number": 0.5, "company": 0.7}
"""Kind -> fraction of its scenes with no word for a motion: animations move as they do, other things stand still."""
SLIDES = ("slide left", "slide right", "slide up", "slide down")


HELD_OUT = ("motion",) * 6 + ("colour",) * 5 + ("number",) * 4 + ("company",) * 5
"""Kinds of held-out combination, in turns."""


MAX_TRIES = 100_000


def draw_scene(
    things: dict[str, Thing],
    cutouts: Cutouts,
    weights: np.ndarray,
    rng: np.random.Generator,
    held_out: str = "",
) -> Scene:
    """Draw what a clip shows.

    Args:
        things: to choose from, by code point.
        cutouts: of them.
        weights: `(N,)` probabilities of the things.
        rng: chooses.
        held_out: kind of the one combination in it that is held out; "": none is.
    """
    codes = list(things)
    animated = np.array([bool(things[code].animation) for code in codes])
    for _ in range(MAX_TRIES):
        kind = held_out or str(rng.choice(list(KINDS), p=list(KINDS.values())))
        among = weights * animated if kind == "animation" else weights
        pair = rng.choice(len(codes), 2, replace=False, p=among / among.sum())
        first, second = (codes[index] for index in pair)
        motion = str(rng.choice(SLIDES if kind == "animation" else list(VERBS)))
        motion = "" if rng.random() < STILL_SHARE[kind] else motion
        colour = str(rng.choice(list(HUES))) if kind == "colour" or rng.random() < 0.05 else ""
        share = 1 if kind == "animation" and not motion else 0.3
        background = str(rng.choice(BACKGROUND_WORDS)) if rng.random() < share else ""
        scene = Scene(
            things=(first, second) if kind == "company" else (first,),
            motion=motion,
            animated=bool(things[first].animation) and (kind == "animation" or not motion),
            colour=colour,
            background=background,
            count=int(rng.integers(2, 4)) if kind == "number" else 1,
            beside=bool(rng.random() < 0.6),
        )
        if scene.held_out == held_out and is_clear(scene, things, cutouts):
            return scene
    raise ValueError(f"of {len(codes)} things no scene can be drawn with {held_out or 'nothing'} held out")


def is_clear(scene: Scene, things: dict[str, Thing], cutouts: Cutouts) -> bool:
    """Return whether a clip of a scene can be distinguished from others, and described in words: colours that are new and can be
    seen, names with a plural, ways that do not meet."""
    first = things[scene.things[0]]
    if scene.count > 1 and not first.is_countable:
        return False
    if scene.motion in SLIDES and (len(scene.things) > 1 or (scene.count > 1 and scene.motion in SLIDES[:2])):
        return False
    stills = [cutouts.frames(code, False)[0] for code in scene.things]
    if scene.colour:
        hue, fraction = dominant_hue(pixels_of(stills[0]))
        is_new = colour_of(pixels_of(stills[0])) != scene.colour and not COLOUR_WORD.search(first.names[0])
        stills[0] = turn_hue(stills[0], HUES[scene.colour] - hue)
        if (
            not is_new
            or fraction < 0.6
            or "flag" in first.names[0]
            or colour_of(pixels_of(stills[0])) != scene.colour
        ):
            return False
    if not scene.background:
        return True
    pixels = [pixels_of(still) for still in stills]
    differences = [np.abs(each - np.array(BACKGROUNDS[scene.background])).max(axis=-1) for each in pixels]
    return all(
        colour_of(each) != scene.background and (difference < 60).mean() < 0.4
        for each, difference in zip(pixels, differences, strict=True)
    )


def captions(
    scene: Scene, things: dict[str, Thing], rng: np.random.Generator, num: int = 5
) -> tuple[str, ...]:
    """Return different wordings of a scene; Unicode's name and the other names take turns."""
    texts = []
    for turn in range(4 * num):
        chosen = []
        for place, code in enumerate(scene.things):
            known = things[code].names
            if scene.colour and place == 0:
                known = tuple(name for name in known if not COLOUR_WORD.search(name))
            if scene.count > 1:
                known = tuple(name for name in known if plural(name))
            chosen.append(known[0] if turn % 2 == 0 else str(rng.choice(known)))
        if len(chosen) == 1:
            text = phrase(chosen[0], rng, colour=scene.colour, count=scene.count, motion=scene.motion)
        else:
            colours = (scene.colour, "")
            both = [
                phrase(noun, rng, colour=colour, bare=False)
                for noun, colour in zip(chosen, colours, strict=True)
            ]
            text = relation(*both, scene.beside, rng)
            if scene.motion:
                text += (
                    f", {'both ' if rng.random() < 0.5 else ''}{rng.choice(VERBS[scene.motion].participles)}"
                )
        texts.append(on_background(text, scene.background, rng))
    return tuple(dict.fromkeys(texts))[:num]


def open_things(folder: Path) -> tuple[dict[str, Thing], np.ndarray]:
    """Return the emoji that are trained on by code point, and how often each is drawn: people, who are many and
    alike, less often than animals and objects, and flags and signs seldom.

    Args:
        folder: written by fetch.py.
    """
    with tarfile.open(next((folder / "packages").glob("emojibase-data-*.tgz"))) as tar:
        entries = json.load(tar.extractfile("package/en/data.json"))  # type: ignore[arg-type]
    stills = {key(path.stem): path for path in sorted((folder / "stills").glob("*.webp"))}
    animations = {
        key(Path(record["file_name"]).stem): record["file_name"]
        for record in map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        if record["file_name"].startswith("clips/") and record["split"] == "train"
    }
    labels = {entry["label"] for entry in entries}
    things, weights = {}, []
    for entry in entries:
        code, label, group = key(entry["hexcode"]), entry["label"].replace(": ", ", "), entry.get("group")
        if code in stills and split_of_concept(code, label, group) == "train":
            nouns = tuple(
                name for name in names(entry["label"]) if name == entry["label"] or name not in labels
            )
            # People are counted by what they do, which has no simple plural.
            is_countable = (
                plural(nouns[0]) is not None and group not in SIGNS and (group != PEOPLE or " " not in label)
            )
            still = f"stills/{stills[code].name}"
            things[code] = Thing(code, nouns, still, animations.get(code, ""), is_countable)
            weights.append(0.3 if group in SIGNS else 0.5 if group == PEOPLE else 1.0)
    return things, np.array(weights) / sum(weights)


@functools.lru_cache(1)
def _world(folder: Path) -> tuple[dict[str, Thing], np.ndarray, Cutouts]:
    things, weights = open_things(folder)
    return things, weights, Cutouts(folder, things)


def compose(folder: Path, seed: int, number: int) -> tuple[Record, np.ndarray]:
    """Compose a clip.

    Args:
        folder: written by fetch.py.
        seed: of the clips to train on; `VALIDATION` for those with held-out combinations.
        number: of the clip.

    Returns:
        Its record, and its frames, `(16, 128, 128, 3) uint8`.
    """
    things, weights, cutouts = _world(folder)
    rng = np.random.default_rng([seed, number])
    held_out = HELD_OUT[number % len(HELD_OUT)] if seed == VALIDATION else ""
    scene = draw_scene(things, cutouts, weights, rng, held_out)
    split = "val_words" if held_out else "train"
    texts = captions(scene, things, rng)
    record = Record(
        f"{split}/{seed}/{number}", texts, f"{scene.things[0]} composed", split, labels=labels(scene)
    )
    return record, render(scene, cutouts, rng)


def labels(scene: Scene) -> dict[str, str]:
    """Return what is known of a clip, for the measures of adherence."""
    columns, rows = scene.layout
    return {
        "thing": " ".join(scene.things),
        "motion": scene.motion,
        "colour": scene.colour,
        "background": scene.background or "white",
        "number": str(scene.count) if scene.count > 1 else "",
        "layout": f"{columns}x{rows}",
        "held_out": scene.held_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="written by fetch.py")
    parser.add_argument("out", type=Path, help="where the packed clips go")
    parser.add_argument(
        "--num", type=int, default=10000, help="clips to train on; 0: the held-out clips alone"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the clips to train on")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.num < 0 or args.workers < 1 or not (args.folder / "metadata.jsonl").is_file():
        parser.error(
            "expected a folder that fetch.py has written, --num of 0 or more and --workers of 1 or more"
        )
    clips = [(VALIDATION, number) for number in range(400)] + [
        (args.seed, number) for number in range(args.num)
    ]
    with (
        store_folder(args.out, PIXELS, source=str(args.folder)) as (out, stale),
        ProcessPoolExecutor(args.workers) as pool,
    ):
        writer = StoreWriter(out)
        for start in track(range(0, len(clips), 512), "composing"):  # no more than these wait to be written
            seeds, numbers = zip(*clips[start : start + 512], strict=True)
            for record, frames in pool.map(
                functools.partial(compose, args.folder), seeds, numbers, chunksize=16
            ):
                writer.add(record, frames)
        writer.close(stale=stale, dtype="uint8", fps=FPS, size=SIDE, source=str(args.folder))


if __name__ == "__main__":
    main()
