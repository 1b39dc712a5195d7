"""The measures of protocol words: how many clips show what their prompts ask for (detection.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from latent_shift.evaluation import clip_metrics, detection, statistics
from latent_shift.evaluation.comparison import Comparison
from latent_shift.evaluation.features import Extractor
from latent_shift.evaluation.records import Record
from latent_shift.evaluation.statistics import MeasureUnavailable

if TYPE_CHECKING:
    from latent_shift.evaluation.measures import Measure


def prompt_adherence(comparison: Comparison, measure: Measure) -> list[Record]:
    """Compare what clips show with what their prompts ask for (detection.py), each kind of word on the clips whose prompts have one."""
    protocol = comparison.protocol
    requested = [detection.requested(labels) for labels in protocol.labels]
    layouts = [labels.get("layout", "1x1") for labels in protocol.labels]

    def detect(load: Callable[[int], np.ndarray]) -> Callable[[range], np.ndarray]:
        def words(numbers: range) -> np.ndarray:
            rows = [list(detection.detected(load(k), layouts[k]).values()) for k in numbers]
            return np.array(rows, "<U16")

        return words

    name = f"adherence-{detection.VERSION}"
    detected = comparison.cached_rows(name, detect(comparison.clip), len(requested))
    of_real = comparison.cached_rows(name, detect(comparison.real_clip), len(requested), real=True)
    records = []
    for column, kind in enumerate(detection.KINDS):
        asks = np.array([kind in words for words in requested])
        words = np.array([words.get(kind, "") for words in requested])
        # How often prompts ask for what a clip shows: the fraction that would be right for a prompt drawn at random.
        chance = [(words[asks] == word).mean() for word in detected[:, column]] if asks.any() else []
        for suffix, right in (
            ("", detected[:, column] == words), ("_chance", np.array(chance)), ("_real", of_real[:, column] == words),
        ):  # fmt: skip
            records += _fraction(comparison, f"adherence_{kind}{suffix}", right, asks)
    return records


NUM_CANDIDATES = 100
"""Things among which one is recognised."""


def recognition(comparison: Comparison, measure: Measure) -> list[Record]:
    """Rank the thing of each real clip by its similarity to the thing in the generated clip, both cut out (detection.cut_out). Of
    two things both must be recognised."""
    extractor = comparison.weights.open(measure.network, **measure.options)
    all_labels = comparison.protocol.labels
    things = [
        (k, cell)
        for k, labels in enumerate(all_labels)
        for cell in range(len(labels.get("thing", "").split()))
    ]
    names = np.array([all_labels[k]["thing"].split()[cell] for k, cell in things])
    if len(things) < NUM_CANDIDATES:
        raise MeasureUnavailable(f"recognises one of {NUM_CANDIDATES} things; these are {len(things)}")

    def extract(load: Callable[[int], np.ndarray]) -> Callable[[range], np.ndarray]:
        def rows(numbers: range) -> np.ndarray:
            cells = (
                detection.cells(load(k), all_labels[k].get("layout", "1x1"))[cell]
                for k, cell in (things[number] for number in numbers)
            )
            return np.concatenate(
                [extractor(detection.cut_out(frames)[None]).mean(axis=1) for frames in cells]
            )

        return rows

    name = f"cut-outs-{detection.VERSION}-{extractor.sha256[:12]}"
    generated = comparison.cached_rows(name, extract(comparison.clip), len(things))
    real = comparison.cached_rows(name, extract(comparison.real_clip), len(things), real=True)
    ranks = clip_metrics.retrieval_ranks(generated, real, names=names, num=NUM_CANDIDATES)
    num_things = np.bincount([k for k, _ in things], minlength=len(all_labels))
    right = np.ones(len(all_labels), bool)
    np.logical_and.at(right, [k for k, _ in things], ranks <= 5)
    return [
        *_fraction(comparison, "adherence_thing", right, num_things == 1, extractor),
        *_fraction(comparison, "adherence_company", right, num_things == 2, extractor),
    ]


def _fraction(
    comparison: Comparison, name: str, right: np.ndarray, asks: np.ndarray, extractor: Extractor | None = None
) -> list[Record]:
    """Return the record of a fraction of the clips whose prompts ask for something; none for fewer than two of them."""
    if asks.sum() < 2:
        return []
    values, num = np.where(asks, right, np.nan), int(asks.sum())
    if name.endswith("_real"):
        of_real = comparison.record(name, statistics.estimate(values, statistics.mean_of_known), real=True)
        return [
            replace(
                of_real, clips=num, samples=num, seeds=None, fps=comparison.protocol.fps, native_size=None
            )
        ]
    record = comparison.mean_record(name, values, statistics.mean_of_known, extractor=extractor)
    return [replace(record, clips=num, samples=num)]
