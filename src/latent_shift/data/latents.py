"""Read latents and caption embeddings, the data set of the image and video stages. encode.py writes it.

    latents/
      store.json, index.jsonl, shards/KEY.npy   a store (store.py) with frames of shape (2, C, h, w): posterior
                                                mean and std
      texts.npy                                 (captions, L, D) float16 embeddings of every caption and of
                                                the null prompt
      texts.json                                the captions
      captions.npy                              64-bit digests of the captions in ascending order, for lookup
      autoencoder/, text_encoder/, tokenizer/   the models that encoded the data, with which a trained U-Net
                                                is exported

Shapes: F frames of H x W pixels; C channels and h x w of the latents; L tokens, D width of the embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import ADVICE, Store, text_digest
from latent_shift.files import open_array
from latent_shift.models.autoencoder import decode_latents, load_autoencoder, to_frames


class LatentStore(Store):
    """A store of latents with the embeddings of its captions.

    Raises:
        ValueError: as `Store`, or a store of pixels.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        if self.info["dtype"] != "float16":
            raise ValueError(
                f"{folder}: holds pixels, not latents; `latent-shift encode` makes latents of them"
            )
        digests = [
            np.array(open_array(part / "captions.npy", "uint64", (None,), advice=ADVICE))
            for part in self.folders
        ]
        self._ends = np.cumsum([len(part) for part in digests])
        self._digests, self._rows = np.unique(np.concatenate(digests), return_index=True)
        self._embeddings = [
            open_array(part / "texts.npy", "float16", (len(rows), *self.info["texts"]), advice=ADVICE)
            for part, rows in zip(self.folders, digests, strict=True)
        ]

    @property
    def num_captions(self) -> int:
        """Number of distinct captions."""
        return len(self._digests)

    def embed(self, captions: Sequence[str]) -> np.ndarray:
        """Look up the embeddings of captions.

        Args:
            captions: captions of the store; "" is the null prompt.

        Returns:
            `(captions, L, D) float32`.

        Raises:
            KeyError: a caption that was not encoded.
        """
        digests = np.array([text_digest(caption) for caption in captions], np.uint64)
        positions = np.searchsorted(self._digests, digests).clip(max=self.num_captions - 1)
        unknown = np.flatnonzero(self._digests[positions] != digests)
        if unknown.size:
            raise KeyError(captions[unknown[0]])
        rows = self._rows[positions]
        parts = np.searchsorted(self._ends, rows, side="right")
        starts = np.append(0, self._ends)
        embeddings = [
            self._embeddings[part][row - starts[part]] for part, row in zip(parts, rows, strict=True)
        ]
        return np.stack(embeddings).astype(np.float32)

    @functools.cached_property
    def _autoencoder(self) -> AutoencoderKL:
        return load_autoencoder(self.folder / "autoencoder")

    @torch.no_grad()
    def draw_pixels(
        self, rng: np.random.Generator, index: int, num_frames: int, *, stride: int = 1
    ) -> np.ndarray:
        """Return `draw_window`, sampled from the posterior and decoded, as `(F, H, W, 3) uint8` frames."""
        vae = self._autoencoder
        mean, std = (
            self.draw_window(rng, index, num_frames, stride=stride)
            .astype(np.float32)
            .transpose(1, 0, 2, 3, 4)
        )
        latents = torch.from_numpy(mean + std * rng.standard_normal(mean.shape, np.float32))
        return to_frames(decode_latents(vae, latents, batch_size=1)).numpy()

    def frame_correlation(
        self, *, splits: Iterable[str] = ("train",), num_clips: int = 1000
    ) -> dict[str, float]:
        """Measure the correlation between frames of a clip, and fit the noise with the same covariance.

        Noise that resembles the clips hides their static and their moving parts at the same timesteps. Frames
        of `correlated_noise` at distance k differ by (1 - s)(1 - r^k) of the variance, where s is the shared
        fraction and r the correlation of successive frames. The fit minimizes the squared error of that
        difference at the distances 2 and 4. It cannot reproduce uniform motion, whose difference grows faster
        than that of any such noise.

        Args:
            splits: splits to sample from.
            num_clips: number of clips of 9 frames to sample, with equal probability for every concept.

        Returns:
            "correlation k apart" of the latents for the distances 1, 2, 4 and 8, and the settings
            `diffusion.shared_noise` (s) and `diffusion.noise_correlation` (r).

        Raises:
            ValueError: no clip of 9 frames.
        """
        indices = self.select(splits=splits, num_frames=9)
        if not len(indices):
            raise ValueError(f"{self.folder}: expected clips of 9 frames or more in {', '.join(splits)}")
        rng = np.random.default_rng(0)
        sample = BalancedSampler(self, indices).draw(rng, num_clips)
        clips_BFCHW = np.stack([self.draw_window(rng, index, 9)[:, 0] for index in sample]).astype(np.float32)
        variance = clips_BFCHW.var(axis=(0, 1, 3, 4)).mean()
        differences = {}
        for k in (1, 2, 4, 8):
            squares = np.square(clips_BFCHW[:, k:] - clips_BFCHW[:, :-k])
            differences[k] = float(squares.mean() / (2 * variance))
        # Least squares on a grid of r: for each r, the best 1 - s is a linear fit of the clips to the noise.
        r = np.linspace(0, 0.995, 9_951)
        noise = 1 - np.stack([r**2, r**4])
        target = np.array([[differences[2]], [differences[4]]])
        independent = np.clip((noise * target).sum(axis=0) / np.square(noise).sum(axis=0), 0.01, 1)  # 1 - s
        best = np.square(independent * noise - target).sum(axis=0).argmin()
        return {
            **{f"correlation {k} apart": 1 - difference for k, difference in differences.items()},
            "diffusion.shared_noise": float(1 - independent[best]),
            "diffusion.noise_correlation": float(r[best]),
        }


def open_store(folder: str | Path) -> Store:
    """Open a store of pixels or of latents."""
    store = Store(folder)
    return LatentStore(folder) if store.info["dtype"] == "float16" else store
