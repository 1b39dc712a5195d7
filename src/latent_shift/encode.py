"""Pixels and captions to latents and embeddings, once: what the image and video stages read at every step.

latents/
  store.json, index.jsonl, array.bin    a store (data.py) whose frames are (2, C, h, w): posterior mean and std
  texts.json, texts.bin                 every caption once, row 0 the null prompt, as (L, D) float16
  autoencoder/, text_encoder/, tokenizer/   what made them, so that a trained U-Net can be exported whole
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from latent_shift import data, models, text
from latent_shift.autoencoder import to_pixels
from latent_shift.data import Store, StoreWriter


class LatentStore(Store):
    """A store of latents, with the embeddings of its captions.

    Attributes:
        embeddings: `(captions, L, D) float16`; row 0 is the null prompt.
        row: caption -> row of `embeddings`.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        if "texts" not in self.info:
            raise ValueError(f"{folder}: holds pixels, not latents; `latent-shift encode` makes latents of them")
        captions = json.loads((self.folder / "texts.json").read_text())
        self.row = {caption: index for index, caption in enumerate(captions)}
        self.embeddings = np.memmap(self.folder / "texts.bin", np.float16, "r", shape=(len(captions), *self.info["texts"]))

    def caption(self, rng: np.random.Generator, index: int) -> int:
        """Row of a caption of record `index`: its first wording half of the time, else one of the others."""
        texts = self.records[index].texts
        first = len(texts) == 1 or rng.random() < 0.5
        return self.row[texts[0 if first else 1 + int(rng.integers(len(texts) - 1))]]

    def likeness(self, *, splits: Iterable[str] = ("train",), num: int = 1000) -> dict[str, float]:
        """How alike the frames of a clip are: correlation of the latents 1, 2, 4 and 8 frames apart, and the noise that matches.

        Noise with the covariance of the clips hides what stays and what moves at the same timesteps. It is found from the differences
        2 and 4 frames apart: with a share s and a correlation r, frames k apart differ by (1 - s)(1 - r^k) of the variance.

        Args:
            splits: where the clips come from.
            num: clips of 9 frames to draw, every concept as likely as any other.

        Raises:
            ValueError: no clip of 9 frames.
        """
        long = self.select(splits=splits, num_frames=9)
        if not long:
            raise ValueError(f"{self.folder}: expected clips of 9 frames or more in {', '.join(splits)}")
        rng = np.random.default_rng(0)
        chosen = data.BalancedSampler(self.records, long).draw(rng, num)
        clips = np.stack([self.draw_window(rng, index, 9)[:, 0] for index in chosen]).astype(np.float32)
        variance = clips.var(axis=(0, 1, 3, 4)).mean()
        apart = {k: float(np.square(clips[:, k:] - clips[:, :-k]).mean() / (2 * variance)) for k in (1, 2, 4, 8)}
        drifts = min(max(apart[4] / max(apart[2], 1e-12) - 1, 0.0), 0.99)  # r^2
        return {
            **{f"correlation {k} apart": 1 - difference for k, difference in apart.items()},
            "diffusion.shared_noise": min(max(0.0, 1 - apart[2] / (1 - drifts)), 0.99),
            "diffusion.noise_correlation": drifts**0.5,
        }


@torch.no_grad()
def encode(
    pixels: str | Path,
    out: str | Path,
    *,
    autoencoder: str | Path,
    texts: str | Path,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Encode a packed data set.

    Args:
        pixels: a store of pixels (`data.pack`).
        out: where the store of latents goes.
        autoencoder: a diffusers `AutoencoderKL` folder, or a pipeline's.
        texts: a folder with `tokenizer/` and `text_encoder/` (any Stable Diffusion folder has them).
        batch_size: frames, or captions, at once. None: as many pixels as 32 frames of 128x128.
        progress: called with (records done, records in all).

    Returns:
        The new store. Latents are scaled by the autoencoder's `scaling_factor`, as the U-Net sees them.

    Raises:
        ValueError: not a store of pixels, or `out` is one of the folders read.
    """
    source, out, texts = data.pixels(pixels), Path(out), Path(texts)
    if out.resolve() in {Path(folder).resolve() for folder in (pixels, autoencoder, texts)}:
        raise ValueError(f"{out}: is read from; expected another folder for the latents")
    height, width = source.info["shape"][:2]
    batch_size = batch_size or max(1, 32 * 128**2 // (height * width))
    vae = models.load_autoencoder(autoencoder).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
    text_encoder = AutoModel.from_pretrained(texts / "text_encoder", dtype=torch.float32).to(device).eval()
    out.mkdir(parents=True, exist_ok=True)
    (out / "store.json").unlink(missing_ok=True)  # whatever stops this, no new autoencoder lies beside old latents
    vae.save_pretrained(out / "autoencoder")
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(texts / name, out / name, dirs_exist_ok=True)

    captions = ["", *sorted({caption for record in source.records for caption in record.texts if caption})]
    (out / "texts.json").write_text(json.dumps(captions, ensure_ascii=False))
    with (out / "texts.bin").open("wb") as file:
        for start in range(0, len(captions), batch_size):
            rows = text.embed(tokenizer, text_encoder, captions[start : start + batch_size])
            file.write(rows.half().cpu().numpy().tobytes())
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    writer = StoreWriter(
        out, "float16", (2, vae.config.latent_channels, height // factor, width // factor),
        fps=source.info["fps"], size=source.info["size"], texts=list(rows.shape[1:]),
    )  # fmt: skip

    def moments(frames: np.ndarray) -> Tensor:
        posterior = vae.encode(to_pixels(torch.from_numpy(frames)).to(device)).latent_dist
        return (torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor).half().cpu()

    # Stills come one frame a record: records are gathered until a batch is full.
    pending: list[int] = []
    for done in range(1, len(source.records) + 1):
        pending.append(done - 1)
        num_frames = sum(source.records[index].num_frames for index in pending)
        if num_frames < batch_size and done < len(source.records):
            continue
        pieces = np.concatenate([source.window(index, 0, source.records[index].num_frames) for index in pending])
        latents = torch.cat([moments(piece) for piece in np.split(pieces, range(batch_size, len(pieces), batch_size))])
        for index, rows in zip(pending, latents.split([source.records[i].num_frames for i in pending]), strict=True):
            writer.add(source.records[index], rows.numpy())
        pending = []
        if progress:
            progress(done, len(source.records))
    writer.close()
    return LatentStore(out)
