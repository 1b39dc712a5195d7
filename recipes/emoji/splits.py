"""Which emoji, animations and combinations are held out of training. Everything that people would type first is trained on.

| split | held out |
|---|---|
| val_words | composed clips with 5 % of the pairs of a thing and its motion, colour or number, and of two things |
| val_animation | animations of 5 % of the animated emoji; their stills are trained on |
| val_concept | 8 % of the signs, symbols and flags whole |
| val_combo | 5 % of the skin-tone variants of the others |
"""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files

TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
PEOPLE, SIGNS = 1, (8, 9)  # emojibase's groups of people and their bodies, and of symbols and flags


def key(hexcode: str) -> str:
    """Return a code point in lower case, without fe0f."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def is_held_out(name: str, percent: int = 5) -> bool:
    """Return whether a name is among the held-out fraction, by its hash."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < percent


def is_unseen(concept: str) -> bool:
    """Return whether the model from before words.toml has never seen a concept: one in twenty was held out whole."""
    return int(hashlib.sha256(concept.encode()).hexdigest(), 16) % 20 == 0


@functools.cache
def measured_captions() -> frozenset[str]:
    """Return the captions of protocol emoji: their clips are trained on."""
    text = files("latent_shift").joinpath("assets/emoji_captions.txt").read_text(encoding="utf-8")
    return frozenset(text.splitlines())


def split_of_concept(concept: str, label: str, group: int | None) -> str:
    """Return the split of an emoji as a whole: val_concept or train.

    Args:
        concept: its code point, without a skin tone.
        label: Unicode's name of it.
        group: of emojibase.
    """
    if label not in measured_captions() and group in SIGNS and is_held_out(f"thing {concept}", 8):
        return "val_concept"
    return "train"


def is_animation_held_out(concept: str, label: str) -> bool:
    return label not in measured_captions() and is_held_out(f"animation {concept}")


def split_of_file(concept: str, label: str, group: int | None, code: str, *, is_clip: bool) -> str:
    """Return the split of a file.

    Args:
        concept, label, group: of the emoji, see `split_of_concept`.
        code: code point of the file, with its skin tone.
        is_clip: whether it is an animation.
    """
    if (split := split_of_concept(concept, label, group)) != "train":
        return split
    if is_clip and is_animation_held_out(concept, label):
        return "val_animation"
    is_variant = any(tone in code for tone in TONES)
    return (
        "val_combo"
        if is_variant and int(hashlib.sha256(code.encode()).hexdigest(), 16) % 20 == 0
        else "train"
    )
