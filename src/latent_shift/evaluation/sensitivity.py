"""Do the measures measure? Real clips are spoilt more and more, in four ways, and every measure is taken of them against other real
clips: one that is to be believed gets worse as they do.

Noise and blur spoil frames; shuffling and freezing spoil motion and leave every frame as it was, which a measure of single frames cannot
see: the table says which can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from latent_shift.evaluation import clip_metrics, statistics
from latent_shift.evaluation.features import Extractor
from latent_shift.evaluation.statistics import Unmeasurable
from latent_shift.files import markdown_table


def noisy(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Independent noise of `strength` x 64 grey levels."""
    return (clip + 64 * strength * rng.standard_normal(clip.shape)).round().clip(0, 255).astype(np.uint8)


def blurred(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian blur with a radius of `strength` / 16 of the side."""
    blur = ImageFilter.GaussianBlur(strength * clip.shape[1] / 16)
    return np.stack([np.asarray(Image.fromarray(frame).filter(blur)) for frame in clip])


def shuffled(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the frames change places."""
    order, chosen = np.arange(len(clip)), rng.permutation(len(clip))[: round(strength * len(clip))]
    order[np.sort(chosen)] = chosen
    return clip[order]


def frozen(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """From some frame on a share of the clip stands still."""
    order = np.minimum(np.arange(len(clip)), round((1 - strength) * (len(clip) - 1)))
    return clip[order]


WAYS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "noise": noisy, "blur": blurred, "shuffle": shuffled, "freeze": frozen,
}  # fmt: skip
STRENGTHS = (0.125, 0.25, 0.5, 1.0)


def verify(
    clips: np.ndarray, extractors: Sequence[Extractor], *, strengths: Sequence[float] = STRENGTHS
) -> dict[str, dict[str, list[float]]]:
    """Every measure of clips that are spoilt more and more, the first value of those that are not.

    Args:
        clips: `(N, F, H, W, 3) uint8` real ones; the first half is compared with, the second is spoilt.
        extractors: for distances. Frechet distances are left out where there are too few samples.
        strengths: from 0 to 1.

    Returns:
        Way -> measure -> values.
    """
    kept, spoilt = np.array_split(clips, 2)
    real = [extractor(kept) for extractor in extractors]

    def measured(clips: np.ndarray) -> dict[str, float]:
        found = {name: float(np.mean([clip_metrics.CLIP_MEASURES[name](clip) for clip in clips])) for name in clip_metrics.CLIP_MEASURES}
        for extractor, theirs in zip(extractors, real, strict=True):
            ours = extractor(clips)
            found[extractor.kernel] = statistics.kernel_estimate(ours, theirs, resamples=2).value
            with contextlib.suppress(Unmeasurable):
                found[extractor.frechet] = statistics.frechet(ours, theirs)
        return found

    whole, results = measured(spoilt), dict[str, dict[str, list[float]]]()
    for way, spoil in WAYS.items():
        rng = np.random.default_rng(0)
        steps = [whole] + [measured(np.stack([spoil(clip, strength, rng) for clip in spoilt])) for strength in strengths]
        results[way] = {name: [step[name] for step in steps] for name in whole}
    return results


def table(results: dict[str, dict[str, list[float]]], strengths: Sequence[float] = STRENGTHS) -> str:
    """Markdown: a row for each measure and way, with an arrow where it only rises or only falls, or stays."""
    rows = []
    for name in next(iter(results.values())):
        for way, measures in results.items():
            values = measures[name]
            rows.append([name, way, *(f"{value:.4g}" for value in values), trend(values)])
    return markdown_table(["measure", "spoilt by", "whole", *(f"{strength:g}" for strength in strengths), ""], rows)


def trend(values: Sequence[float], *, tolerance: float = 0.01) -> str:
    """ "rises", "falls", "stays" within a share of the first value, or "" for what goes up and down."""
    steps, slack = np.diff(values), tolerance * abs(values[0]) + 1e-9
    if (np.abs(np.asarray(values) - values[0]) <= slack).all():
        return "stays"
    return "rises" if (steps >= -slack).all() else "falls" if (steps <= slack).all() else ""
