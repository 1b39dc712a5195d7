"""Sample records of a store with equal probability for every concept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from latent_shift.data.store import Store, text_digest


class BalancedSampler:
    """Sample records with equal probability for every concept, whatever its number of records.

    Args:
        store: the store of the records.
        indices: `(N,)` records to sample from.
        concept_weights: relative probability by concept; 1 for those that are left out.

    Raises:
        ValueError: no records.
    """

    def __init__(self, store: Store, indices: np.ndarray, concept_weights: Mapping[str, float] | None = None):
        if not len(indices):
            raise ValueError(
                "no record to train on: check the names of the splits and that clips have enough frames"
            )
        self._all = np.asarray(indices)
        rows = store.index[indices]
        concepts, concept_ids, counts = np.unique(rows["concept"], return_inverse=True, return_counts=True)
        self._concept_ids = concept_ids
        factors = {text_digest(concept): weight for concept, weight in (concept_weights or {}).items()}
        weights = (np.array([factors.get(int(concept), 1.0) for concept in concepts]) / counts)[concept_ids]
        shape_ids = store.shape_ids()[rows["shard"]]
        groups = [shape_ids == shape_id for shape_id in np.unique(shape_ids)]
        self._indices = [np.asarray(indices)[group] for group in groups]
        self._cumulative = [_cumulative_probabilities(weights[group]) for group in groups]
        self._group_cumulative = _cumulative_probabilities(
            np.array([weights[group].sum() for group in groups])
        )

    def draw(self, rng: np.random.Generator, num: int) -> list[int]:
        """Return `num` random indices of records with frames of equal shape, so that they form a batch."""
        group = int(np.searchsorted(self._group_cumulative, rng.random(), side="right"))
        positions = np.searchsorted(self._cumulative[group], rng.random(num), side="right")
        return self._indices[group][positions].tolist()

    def draw_distinct(self, rng: np.random.Generator, num: int) -> list[int]:
        """Return up to `num` different records, of frames of any shape, in random order: one of each concept,
        then a second of each, and so on."""
        order = rng.permutation(len(self._all))
        concept_ids = self._concept_ids[order]
        by_concept = np.argsort(concept_ids, kind="stable")
        firsts = np.searchsorted(concept_ids[by_concept], concept_ids[by_concept])
        turns = np.empty(len(order), int)
        turns[by_concept] = np.arange(len(order)) - firsts  # how many of the same concept come before
        return self._all[order[np.argsort(turns, kind="stable")[:num]]].tolist()


def _cumulative_probabilities(weights: np.ndarray) -> np.ndarray:
    total = np.cumsum(weights)
    return np.append(total[:-1] / total[-1], 1.0)  # exactly 1 at the end: rng.random() < 1 is always inside
