"""Draw records of a store so that every concept is equally likely."""

from __future__ import annotations

import numpy as np

from latent_shift.data.store import Store


class BalancedSampler:
    """Draw records so that every concept is equally likely, whatever number of files it has; those of one draw are of one size.

    Args:
        store: where the records are.
        indices: which of them.

    Raises:
        ValueError: no record.
    """

    def __init__(self, store: Store, indices: np.ndarray):
        if not len(indices):
            raise ValueError("no record to train on: check the split names and that clips have the frames asked for")
        self.num, rows = len(indices), store.index[indices]
        _, concepts, counts = np.unique(rows["concept"], return_inverse=True, return_counts=True)
        shares, sizes = 1 / counts[concepts], store.sizes()[rows["shard"]]
        groups = [sizes == size for size in np.unique(sizes)]
        self.indices = [np.asarray(indices)[group] for group in groups]
        self.shares = [_cumulative(shares[group]) for group in groups]
        self.sizes = _cumulative(np.array([shares[group].sum() for group in groups]))

    def draw(self, rng: np.random.Generator, num: int) -> list[int]:
        size = int(np.searchsorted(self.sizes, rng.random(), side="right"))
        return self.indices[size][np.searchsorted(self.shares[size], rng.random(num), side="right")].tolist()


def _cumulative(shares: np.ndarray) -> np.ndarray:
    total = np.cumsum(shares)
    return np.append(total[:-1] / total[-1], 1.0)  # the last is 1 to the last digit: no draw is beyond it
