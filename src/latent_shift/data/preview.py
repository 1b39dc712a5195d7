"""Draw a contact sheet of a store."""

from __future__ import annotations

import numpy as np

from latent_shift import video
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store


def preview(
    store: Store,
    *,
    rows: int | None = 8,
    columns: int = 8,
    num_frames: int | None = None,
    stride: int = 1,
    splits: tuple[str, ...] = ("train",),
    seed: int = 0,
) -> tuple[np.ndarray, list[str]]:
    """Draw a contact sheet of different clips, in which every concept is equally likely.

    Args:
        store: a store of pixels, or of latents, which are decoded.
        rows: number of clips; None shows all.
        columns: number of frames shown per clip, evenly spaced.
        num_frames: `data.num_frames` of the training to imitate; None shows stills and clips of every length.
        stride: show every `stride`-th frame, as `data.strides` does.
        splits: splits to sample from.
        seed: seed of the sampling.

    Returns:
        The `(H, W, 3) uint8` sheet and the captions in it.

    Raises:
        ValueError: no suitable clip.
    """
    rng = np.random.default_rng(seed)
    indices = store.select(splits=splits, num_frames=num_frames or 1, stride=stride)
    clips, captions = [], []
    for index in BalancedSampler(store, indices).draw_distinct(rng, rows or len(indices)):
        length = num_frames or min(columns, (store.records[index].num_frames - 1) // stride + 1)
        clips.append(store.draw_pixels(rng, index, length, stride=stride))
        captions.append(store.caption(rng, index, stride=stride if length > 1 else 1))
    return video.captioned_rows(clips, captions, columns=columns), captions
