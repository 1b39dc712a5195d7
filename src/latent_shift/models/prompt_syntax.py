r"""The syntax of weights in prompts, as people write them for Stable Diffusion.

`(words)` weights words by 1.1, `[words]` by 1/1.1, `(words:1.3)` by 1.3; groups may be nested, and weights
multiply. `\(`, `\)`, `\[`, `\]` and `\\` are the characters themselves. Brackets without a partner, and
groups that are a time, a ratio or a verse ("(12:30)", "(16:9)", "(John 3:16)"), are words as they stand.

Nothing here imports torch, so a wrong prompt is refused at once.
"""

from __future__ import annotations

import re

MAX_WEIGHT = 10.0
"""Weights are from -10 to 10; useful ones are from 0 to 2."""

Segment = tuple[str, float]
"""Words and their weight."""

_MAX_DEPTH = 100

_PIECE = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^()\[\]\\]+|\\")
_LAST_NUMBER = re.compile(r"(.*):\s*([^:\s]+)\s*", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)")
_LIKE_A_NUMBER = re.compile(r"[+-]?([\d.,]+(e[+-]?\d*)?|nan|inf|infinity)", re.IGNORECASE)
_TAG = re.compile(r"<(lora|lyco|hypernet|embedding):[^<>]*>", re.IGNORECASE)
_PARTNER = {")": "(", "]": "["}


def parse_prompt(prompt: str) -> list[Segment]:
    """Return the words of a prompt and their weights, in order.

    Raises:
        ValueError: a weight that is no number or out of range, syntax of other programs that would be read as
            words (`<lora:name:0.8>`, `[from:to:0.5]`), or half of a surrogate pair, which is no letter.
    """
    broken = re.search(r"[\ud800-\udfff]", prompt)
    if broken:
        raise ValueError(f"prompt: expected text in Unicode, got {broken[0]!r} at position {broken.start()}")
    tag = _TAG.search(prompt)
    if tag:
        raise ValueError(
            f"prompt: {tag[0]!r} would be read as words; load such a file with --lora or pipe.load_lora_weights, or, an "
            "embedding, with pipe.load_textual_inversion"
        )
    outer: list[tuple[str, list[Segment]]] = []
    segments: list[Segment] = []
    for match in _PIECE.finditer(prompt):
        piece = match[0]
        if piece in ("(", "["):
            outer.append((piece, segments))
            segments = []
            if len(outer) > _MAX_DEPTH:
                raise ValueError(f"prompt: brackets are nested more than {_MAX_DEPTH} deep")
        elif piece in _PARTNER and outer and outer[-1][0] == _PARTNER[piece]:
            _, before = outer.pop()
            before += _weigh_group(_merge(segments), piece)
            segments = before
        else:
            segments.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    while outer:
        bracket, before = outer.pop()
        segments = [*before, (bracket, 1.0), *segments]
    segments = _merge(segments)
    for words, weight in segments:
        if abs(weight) > MAX_WEIGHT:
            raise ValueError(
                f"prompt: the weight of {words[:40]!r} is {weight:.4g}, expected {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            )
    return segments


def plain_prompt(prompt: str) -> str:
    """Return the words of a prompt alone: "a (red:1.4) ball" as "a red ball"."""
    return "".join(words for words, _ in parse_prompt(prompt))


def escape_prompt(text: str) -> str:
    """Return a prompt that means a text as it stands, such as a caption with brackets."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def _weigh_group(segments: list[Segment], closing: str) -> list[Segment]:
    """Return the segments of a group with its weight."""
    brackets = (_PARTNER[closing], closing)
    words = "".join(text for text, _ in segments)
    as_words = [(brackets[0], 1.0), *segments, (brackets[1], 1.0)]
    if not words.strip():
        return as_words
    match = _LAST_NUMBER.fullmatch(segments[-1][0]) if segments[-1][1] == 1.0 else None
    if match is None or not _LIKE_A_NUMBER.fullmatch(match[2]):
        factor = 1.1 if closing == ")" else 1 / 1.1
        return [(text, weight * factor) for text, weight in segments]
    before = words[: len(words) - len(segments[-1][0])] + match[1]
    if _is_time_or_ratio(before, match[2]):
        return as_words
    group = f"{brackets[0]}{words}{brackets[1]}"
    if closing == "]":
        raise ValueError(
            f"prompt: {group!r} would be read as words; a prompt that changes over time is given as `then`, frame by frame: "
            "--then FRAME:PROMPT, or {frame: prompt}"
        )
    if not _NUMBER.fullmatch(match[2]) or not before.strip():
        raise ValueError(f"prompt: expected words and a number, such as (red:1.3), got {group!r}")
    factor = float(match[2].replace(",", "."))
    return [(text, weight * factor) for text, weight in [*segments[:-1], (match[1], 1.0)] if text]


def _is_time_or_ratio(before: str, number: str) -> bool:
    """Whether "before:number" is a time, ratio or verse: only numbers, or whole numbers around the colon."""
    only_numbers = re.fullmatch(r"[\d.,:\s]*\d[\d.,:\s]*", before) is not None
    return only_numbers or (before[-1:].isdigit() and number.isdigit())


def _merge(segments: list[Segment]) -> list[Segment]:
    """Join neighbours of equal weight."""
    merged: list[Segment] = []
    for words, weight in segments:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + words, weight)
        else:
            merged.append((words, weight))
    return merged
