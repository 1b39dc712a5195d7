"""A data set as the image and video stages read it: latents and the embeddings of the captions.

    latents/
      store.json, index.jsonl, shards/KEY.npy   a store (store.py) whose frames are (2, C, h, w): posterior mean and std
      texts.npy, texts.json, captions.npy       every caption once, and the null prompt, as (L, D) float16; what they say, and
                                                digests of that in ascending order, by which they are found
      autoencoder/, text_encoder/, tokenizer/   what made them, so that a trained U-Net can be exported whole

encode.py makes it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store, digest
from latent_shift.models.autoencoder import decode_latents, load_autoencoder, to_frames


class LatentStore(Store):
    """A store of latents, with the embeddings of its captions.

    Attributes:
        num_captions: different ones.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        if "texts" not in self.info:
            raise ValueError(f"{folder}: holds pixels, not latents; `latent-shift encode` makes latents of them")
        digests = [np.load(part / "captions.npy") for part in self.folders]
        self._ends = np.cumsum([len(part) for part in digests])
        self._digests, self._rows = np.unique(np.concatenate(digests), return_index=True)
        self._embeddings = [np.load(part / "texts.npy", mmap_mode="r") for part in self.folders]

    @property
    def num_captions(self) -> int:
        return len(self._digests)

    def embed(self, captions: Sequence[str]) -> np.ndarray:
        """`(captions, L, D) float32`; "" is the null prompt. Raises KeyError for a caption that was not encoded."""
        digests = np.array([digest(caption) for caption in captions], np.uint64)
        places = np.searchsorted(self._digests, digests).clip(max=self.num_captions - 1)
        if (unknown := np.flatnonzero(self._digests[places] != digests)).size:
            raise KeyError(captions[unknown[0]])
        rows = self._rows[places]
        parts = np.searchsorted(self._ends, rows, side="right")
        starts = np.append(0, self._ends)
        return np.stack([self._embeddings[part][row - starts[part]] for part, row in zip(parts, rows, strict=True)]).astype(np.float32)

    @functools.cached_property
    def _autoencoder(self) -> AutoencoderKL:
        return load_autoencoder(self.folder / "autoencoder")

    @torch.no_grad()
    def draw_pixels(self, rng: np.random.Generator, index: int, num_frames: int, *, stride: int = 1) -> np.ndarray:
        """`draw_window`, sampled and decoded: `(F, H, W, 3) uint8`."""
        vae = self._autoencoder
        mean, std = self.draw_window(rng, index, num_frames, stride=stride).astype(np.float32).transpose(1, 0, 2, 3, 4)
        latents = torch.from_numpy(mean + std * rng.standard_normal(mean.shape, np.float32))
        return to_frames(decode_latents(vae, latents, batch_size=1)).numpy()

    def likeness(self, *, splits: Iterable[str] = ("train",), num: int = 1000) -> dict[str, float]:
        """How alike the frames of a clip are: correlation of the latents 1, 2, 4 and 8 frames apart, and the noise that matches.

        Noise with the covariance of the clips hides what stays and what moves at the same timesteps. With a share s and a correlation r its
        frames k apart differ by (1 - s)(1 - r^k) of the variance; s and r are those that come nearest to the clips' differences 2 and 4
        frames apart (least squares). What moves evenly differs by more than any such noise.

        Args:
            splits: where the clips come from.
            num: clips of 9 frames to draw, every concept as likely as any other.

        Raises:
            ValueError: no clip of 9 frames.
        """
        long = self.select(splits=splits, num_frames=9)
        if not len(long):
            raise ValueError(f"{self.folder}: expected clips of 9 frames or more in {', '.join(splits)}")
        rng = np.random.default_rng(0)
        chosen = BalancedSampler(self, long).draw(rng, num)
        clips = np.stack([self.draw_window(rng, index, 9)[:, 0] for index in chosen]).astype(np.float32)
        variance = clips.var(axis=(0, 1, 3, 4)).mean()
        apart = {k: float(np.square(clips[:, k:] - clips[:, :-k]).mean() / (2 * variance)) for k in (1, 2, 4, 8)}
        correlations = np.linspace(0, 0.995, 9_951)
        of_noise, of_clips = 1 - np.stack([correlations**2, correlations**4]), np.array([[apart[2]], [apart[4]]])
        own = np.clip((of_noise * of_clips).sum(axis=0) / np.square(of_noise).sum(axis=0), 0.01, 1)  # 1 - s, for each r
        best = np.square(own * of_noise - of_clips).sum(axis=0).argmin()
        return {
            **{f"correlation {k} apart": 1 - difference for k, difference in apart.items()},
            "diffusion.shared_noise": float(1 - own[best]),
            "diffusion.noise_correlation": float(correlations[best]),
        }


def open_store(folder: str | Path) -> Store:
    """A store of whatever it holds."""
    store = Store(folder)
    return LatentStore(folder) if "texts" in store.info else store
