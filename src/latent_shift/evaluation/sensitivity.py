"""Sensitivity of the measures: they are computed of real clips that are degraded in four ways.

Noise and blur degrade frames. Shuffling and freezing degrade motion and leave each frame as it was, so a
measure of single frames cannot respond to them. A measure that can be trusted gets worse as the strength
grows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from latent_shift.evaluation.features import Extractor
from latent_shift.evaluation.measures import MEASURES, Measure
from latent_shift.evaluation.statistics import MeasureUnavailable, frechet, frechet_estimate
from latent_shift.files import markdown_table


def add_noise(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Add independent Gaussian noise with a standard deviation of 64 `strength` grey levels."""
    return (clip + 64 * strength * rng.standard_normal(clip.shape)).round().clip(0, 255).astype(np.uint8)


def blur(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Blur frames with a Gaussian whose radius is `strength` / 16 of their side."""
    gaussian = ImageFilter.GaussianBlur(strength * clip.shape[1] / 16)
    return np.stack([np.asarray(Image.fromarray(frame).filter(gaussian)) for frame in clip])


def shuffle(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Permute a fraction `strength` of the frames."""
    order = np.arange(len(clip))
    positions = rng.permutation(len(clip))[: round(strength * len(clip))]
    order[np.sort(positions)] = positions
    return clip[order]


def freeze(clip: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Replace the last fraction `strength` of the frames by the frame before them."""
    order = np.minimum(np.arange(len(clip)), round((1 - strength) * (len(clip) - 1)))
    return clip[order]


DEGRADATIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "noise": add_noise, "blur": blur, "shuffle": shuffle, "freeze": freeze,
}  # fmt: skip
STRENGTHS = (0.125, 0.25, 0.5, 1.0)


def sensitivity(
    clips: np.ndarray,
    distances: Sequence[tuple[Measure, Extractor]],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, dict[str, list[float]]]:
    """Measure real clips that are degraded more and more.

    Args:
        clips: `(N, F, H, W, 3) uint8` real clips; the second half is degraded and compared with the first.
        distances: each with its network, as `open_distances` returns them; those that need more clips are
            left out.
        strengths: of the degradations, 0 to 1.

    Returns:
        `{degradation: {measure: values}}`; the first value is that of the original clips.
    """
    reference, originals = np.array_split(clips, 2)
    scores = {measure.name: measure.score for measure in MEASURES.values() if measure.score}
    extractors = {extractor.name: extractor for _, extractor in distances}
    real = {name: extractor(reference) for name, extractor in extractors.items()}

    def measure_all(clips: np.ndarray) -> dict[str, float]:
        values = {name: float(np.mean([score(clip) for clip in clips])) for name, score in scores.items()}
        features = {name: extractor(clips) for name, extractor in extractors.items()}
        for measure, extractor in distances:
            with contextlib.suppress(MeasureUnavailable):
                values[measure.name] = _distance(measure, features[extractor.name], real[extractor.name])
        return values

    values_of_originals = measure_all(originals)
    results: dict[str, dict[str, list[float]]] = {}
    for degradation, degrade in DEGRADATIONS.items():
        rng = np.random.default_rng(0)
        steps = [values_of_originals]
        for strength in strengths:
            steps.append(measure_all(np.stack([degrade(clip, strength, rng) for clip in originals])))
        results[degradation] = {name: [step[name] for step in steps] for name in values_of_originals}
    return results


def _distance(measure: Measure, features: np.ndarray, real: np.ndarray) -> float:
    """Return the value of a distance, at the least cost of an interval, which is not used."""
    if measure.statistic is frechet_estimate:
        return frechet(features, real)
    assert measure.statistic is not None
    return measure.statistic(features, real, resamples=2).value


def table(results: dict[str, dict[str, list[float]]], strengths: Sequence[float] = STRENGTHS) -> str:
    """Return a Markdown table with a row for each measure and degradation, and the trend of its values."""
    rows = []
    for name in next(iter(results.values())):
        for degradation, measures in results.items():
            values = measures[name]
            rows.append([name, degradation, *(f"{value:.4g}" for value in values), trend(values)])
    return markdown_table(
        ["measure", "degraded by", "original", *(f"{strength:g}" for strength in strengths), "trend"], rows
    )


def trend(values: Sequence[float], *, tolerance: float = 0.01) -> str:
    """Return "rises", "falls", "stays" (within a fraction of the first value), or "" for values that go up
    and down."""
    steps, slack = np.diff(values), tolerance * abs(values[0]) + 1e-9
    if (np.abs(np.asarray(values) - values[0]) <= slack).all():
        return "stays"
    return "rises" if (steps >= -slack).all() else "falls" if (steps <= slack).all() else ""
