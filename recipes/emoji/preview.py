"""Write the matrix of previews of `emoji` into its folder: the colours of latents while a clip is sampled.

    python recipes/emoji/preview.py data/emoji-128

Fitted by least squares to frames of the training clips. Prints how much of the variance of other clips' colours it explains.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from latent_shift.data.store import open_pixel_store
from latent_shift.models.autoencoder import encode_frames, load_autoencoder
from latent_shift.pipelines import catalog
from latent_shift.pipelines.preview import draw_preview, fit_preview, write_preview


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="pixels, packed at the size of the model")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--num", type=int, default=1000, help="frames to fit, and as many to test")
    args = parser.parse_args()
    folder = catalog.folder(args.model)
    store = open_pixel_store(args.data)
    rng = np.random.default_rng(0)
    train = [index for index, record in enumerate(store.records) if record.split == "train"]
    chosen = rng.choice(train, size=2 * args.num, replace=False)
    frames = np.concatenate([store.window(index, 0, 1) for index in chosen])
    vae = load_autoencoder(folder)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = encode_frames(vae, pixels, device=torch.device("cpu"), batch_size=32).numpy()
    matrix = fit_preview(latents[: args.num], frames[: args.num])
    write_preview(folder, matrix)

    latents, frames = latents[args.num :], frames[args.num :]
    side = frames.shape[1] // latents.shape[2]
    colours = frames.reshape(len(frames), latents.shape[2], side, latents.shape[3], side, 3).mean(axis=(2, 4))
    errors = draw_preview(latents.swapaxes(0, 1), matrix) - colours
    explained = 1 - errors.var() / (colours - colours.mean(axis=(0, 1, 2))).var()
    print(f"{args.num} other frames: R2 {explained:.3f}, mean error {np.abs(errors).mean():.1f} of 255")


if __name__ == "__main__":
    main()
