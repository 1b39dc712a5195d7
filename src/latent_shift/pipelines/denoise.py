"""Sampling in time: what is done to the noise a network predicts, and to latents between the steps, in any mode.

A `Predict` takes noisy latents `(B, C, F, h, w)`, the timestep and the numbers of their frames in the clip, `(F,)`, and
returns what the network predicts for them, of the same shape. Wrappers take one and return one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor

Pictures = Any  # what diffusers' image processors take: images, arrays `(F, H, W, 3)`, tensors `(F, 3, H, W)`, floats in [0, 1]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def in_chunks(predict: Predict, chunk: int, halo: int, *, loop: bool = False) -> Predict:
    """Predict `chunk` frames at a time, in the company of `halo` frames on either side: memory does not grow with the clip.

    With a halo of `reach(network)` frames this is what the network predicts for the whole clip; a shorter one is faster and lets
    a chunk know less of what comes before and after.

    Args:
        predict: for clips of up to `chunk + 2 * halo` frames that do not loop.
        chunk, halo: frames.
        loop: the frames before the first are the last.
    """

    def chunked(latents_BCFhw: Tensor, timestep: Tensor, numbers_F: Tensor) -> Tensor:
        num_frames, parts = latents_BCFhw.shape[2], []
        for start in range(0, num_frames, chunk):
            stop = min(start + chunk, num_frames)
            first, last = (start - halo, stop + halo) if loop else (max(0, start - halo), min(num_frames, stop + halo))
            seen = torch.arange(first, last, device=numbers_F.device) % num_frames
            predicted = predict(latents_BCFhw[:, :, seen], timestep, numbers_F[seen])
            parts.append(predicted[:, :, start - first : stop - first])
        return torch.cat(parts, dim=2)

    return chunked


def last_steps(scheduler: SchedulerMixin, timesteps: Tensor, strength: float) -> Tensor:
    """The part of the timesteps that is left when sampling starts from a video: `strength` 1 takes all, 0 none (SDEdit, Meng et al.
    2022; the rounding is diffusers')."""
    order = getattr(scheduler, "order", 1)
    num_steps = len(timesteps) // order
    start = max(num_steps - int(num_steps * strength), 0) * order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return timesteps[start:]


@dataclass
class Known:
    """What is given of a clip (blended latent diffusion, Avrahami et al. 2023).

    Args:
        latents: `(1, C, F, h, w)`, clean.
        noise: `(B, C, F, h, w)`, standard normal.
        mask: `(1, 1, F, h or 1, w or 1)`, 1 where something new is made and 0 where `latents` stay; None: all is new, they
            only were the start.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor | None

    def put_back(self, latents: Tensor, scheduler: SchedulerMixin, timestep: Tensor | None) -> Tensor:
        """`latents` after a step, with what is known as noisy as they are at `timestep`; None: not at all."""
        if self.mask is None:
            return latents
        known = self.latents.expand_as(latents)
        if timestep is not None:
            known = scheduler.add_noise(known, self.noise, timestep.reshape(1))
        return torch.lerp(known, latents, self.mask)


def as_mask(mask: Pictures, num_frames: int, size: tuple[int, ...]) -> Tensor:
    """One picture or F, white where something new is made, to `(1, 1, F, h, w)` of 0 and 1; a latent is new if half of it is."""
    pictures = list(mask) if isinstance(mask, (list, tuple)) or (not isinstance(mask, Image.Image) and np.ndim(mask) == 3) else [mask]
    rows = [np.asarray(each.convert("L") if isinstance(each, Image.Image) else each) for each in pictures]
    if len(rows) not in (1, num_frames) or any(row.ndim != 2 for row in rows):
        raise ValueError(f"expected one mask (H, W) or {num_frames}, got {len(rows)} of shape {rows[0].shape}")
    stack = torch.stack([torch.from_numpy(row / np.float32(255 if row.dtype == np.uint8 else 1)).float() for row in rows])
    shrunk = torch.nn.functional.interpolate(stack[:, None], size, mode="area") >= 0.5
    return shrunk.float().expand(num_frames, -1, -1, -1).transpose(0, 1)[None]
