"""A model's own decoder beside a tiny one: how near each comes to the frames, and what it costs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny

from latent_shift.data.store import open_pixel_store
from latent_shift.evaluation.clip_metrics import psnr
from latent_shift.evaluation.statistics import estimate
from latent_shift.models.autoencoder import (
    decode_latents,
    encode_frames,
    load_autoencoder,
    load_tiny_autoencoder,
    to_frames,
    to_pixels,
)
from latent_shift.models.loading import open_network


def compare_decoders(
    model: str | Path, store: str | Path, *, splits: list[str], tiny: str | Path | None = None, num: int = 200, rounds: int = 5
) -> dict[str, Any]:  # fmt: skip
    """Compare the decoders of a model on the latents of frames.

    Args:
        model: folder of a pipeline.
        store: of pixels.
        splits: of the store.
        tiny: folder of an `AutoencoderTiny`; None: the one in the model's folder.
        num: records, one frame of each.
        rounds: of timing.

    Returns:
        `frames`, how many there were; for `large` and `tiny`: `psnr_db` with an interval, `parameters` of the decoder, `seconds` a clip of 16 frames (the
        smallest of `rounds`, float32 on the CPU); for `tiny` also `difference_db`, of frame by frame.

    Raises:
        ValueError: no tiny autoencoder, a split without records, or frames of several sizes.
    """
    frames_of = open_pixel_store(store)
    records = frames_of.select(splits=splits)
    if not len(records):
        raise ValueError(f"{store}: has no records in {', '.join(splits)}")
    rng = np.random.default_rng(0)
    chosen = rng.permutation(records)[:num]
    drawn = [frames_of.draw_window(rng, int(index), 1) for index in chosen]
    if len({frame.shape for frame in drawn}) > 1:
        raise ValueError(f"{store}: its frames differ in size; expected a store packed without data.aspects")
    frames = np.concatenate(drawn)
    large = load_autoencoder(model)
    small = (
        load_tiny_autoencoder(model)
        if tiny is None
        else open_network(Path(tiny), AutoencoderTiny, kind="vae", dtype=torch.float32)
    )
    if small is None:
        raise ValueError(f"{model}: has no tiny autoencoder; train one with stage tiny_autoencoder")
    result: dict[str, Any] = {"frames": len(frames)}
    values = {}
    with torch.no_grad():
        latents = encode_frames(large, to_pixels(torch.from_numpy(frames)))
        for name, vae in (("large", large), ("tiny", small)):
            decoded = to_frames(decode_latents(vae, latents)).numpy()
            values[name] = np.array([psnr(*pair) for pair in zip(frames, decoded, strict=True)])
            clip = latents[torch.arange(16) % len(latents)]
            seconds = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                decode_latents(vae, clip)
                seconds.append(time.perf_counter() - start)
            result[name] = {
                "psnr_db": asdict(estimate(values[name])),
                "parameters": sum(parameter.numel() for parameter in vae.decoder.parameters()),
                "seconds": min(seconds[1:]),
            }
    result["tiny"]["difference_db"] = asdict(estimate(values["tiny"] - values["large"]))
    return result
