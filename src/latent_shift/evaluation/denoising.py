"""Measures of a model of this package that need no sampling: its denoising error on real clips, the motion
that it predicts in them, and the PSNR of its autoencoder.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, SchedulerMixin

from latent_shift.clip_text import share_text
from latent_shift.data.latents import LatentStore
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store
from latent_shift.diffusion import add_noise, training_target
from latent_shift.evaluation.clip_metrics import psnr
from latent_shift.models import text
from latent_shift.models.autoencoder import decode_latents, encode_frames, to_frames, to_pixels
from latent_shift.noise import correlated_noise
from latent_shift.pipelines.schedulers import predicted_clean
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.runtime import seed
from latent_shift.shift import frames


class Motion(NamedTuple):
    """Sums of squares of a clip's motion, the deviation of its latents from their mean over time; R^2 = 1 -
    residual / total.

    Attributes:
        residual: of the model's prediction from all frames together.
        residual_per_frame: of its prediction from each frame alone.
        total: of the motion itself.
    """

    residual: float
    residual_per_frame: float
    total: float


def timesteps(scheduler: SchedulerMixin, levels: int = 4) -> list[int]:
    """Return `levels` evenly spaced training timesteps."""
    steps = scheduler.config.num_train_timesteps
    return [steps * (2 * level + 1) // (2 * levels) for level in range(levels)]


@torch.no_grad()
def denoising(
    pipe: LatentShiftPipeline,
    clip: np.ndarray,
    prompt: str,
    *,
    noise: tuple[float, float],
    number: int = 0,
    levels: int = 4,
) -> tuple[np.ndarray, dict[int, Motion]]:
    """Predict a real clip under noise, from its frames together and from each alone: the difference is due
    to temporal layers.

    Args:
        pipe: of a model.
        clip: `(F, H, W, 3) uint8`.
        prompt: its caption.
        noise: (shared noise, noise correlation), as in `correlated_noise`.
        number: seed of the noise.
        levels: number of `timesteps`.

    Returns:
        The training error of the prediction `(F,)`, averaged over the timesteps; and the `Motion` at each
        timestep.
    """
    schedule, vae, unet = DDPMScheduler.from_config(pipe.scheduler.config), pipe.vae, pipe.unet
    generator, errors = seed(number), torch.zeros(len(clip))
    share_text(unet)
    latents = encode_frames(vae, to_pixels(torch.from_numpy(clip)), batch_size=len(clip))
    embedding = text.embed(pipe.tokenizer, pipe.text_encoder, [prompt]).to(latents)
    motion = latents.float() - latents.float().mean(dim=0)
    motions = {}
    for step in timesteps(schedule, levels):
        timestep = torch.tensor([step], device=unet.device)
        frame_noise = torch.randn(1, len(clip), *latents.shape[1:], generator=generator)
        clip_noise = torch.randn(1, 1, *latents.shape[1:], generator=generator)
        epsilon = correlated_noise(frame_noise, clip_noise, *noise)[0].to(latents)
        noisy = add_noise(schedule, latents, epsilon, timestep)
        with frames(unet, len(clip)):
            together = unet(noisy, timestep, embedding).sample
        with frames(unet, 1):
            alone = unet(noisy, timestep, embedding.expand(len(clip), -1, -1)).sample
        target = training_target(schedule, latents, epsilon, timestep)
        errors += (together - target).float().square().mean(dim=(1, 2, 3)).cpu() / levels
        residuals = []
        for output in (together, alone):
            denoised = predicted_clean(schedule, noisy, output, timestep).float()
            residuals.append(float((motion - denoised + denoised.mean(dim=0)).square().sum()))
        motions[step] = Motion(residuals[0], residuals[1], float(motion.square().sum()))
    return errors.numpy(), motions


@torch.no_grad()
def held_out_losses(
    unet: ModelMixin,
    schedule: DDPMScheduler,
    store: LatentStore,
    *,
    splits: tuple[str, ...],
    num_clips: int,
    num_frames: int,
    levels: int = 4,
) -> dict[str, float]:
    """Return the training loss of a network on held-out clips, by timestep: the same clips, captions and independent noise
    for every network.

    Args:
        unet: inflated.
        schedule: noise schedule of the network.
        store: of latents.
        splits: of the clips.
        num_clips: how many, of different concepts as far as there are.
        num_frames: of each clip.
        levels: number of `timesteps`.
    """
    share_text(unet)
    rng = np.random.default_rng(0)
    indices = BalancedSampler(store, store.select(splits=splits, num_frames=num_frames)).draw(rng, num_clips)
    errors = dict.fromkeys(timesteps(schedule, levels), 0.0)
    for index in indices:
        latents = torch.from_numpy(store.draw_window(rng, index, num_frames)[:, 0].astype(np.float32))
        text_1LD = torch.from_numpy(store.embed([store.records[index].texts[0]]))
        for step in errors:
            timestep = torch.tensor([step])
            noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
            with frames(unet, num_frames):
                output = unet(add_noise(schedule, latents, noise, timestep), timestep, text_1LD).sample
            target = training_target(schedule, latents, noise, timestep)
            errors[step] += float((output - target).square().mean()) / num_clips
    return {str(step): error for step, error in errors.items()}


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, store: Store, *, splits: tuple[str, ...], num: int) -> np.ndarray:
    """Return the PSNR in dB `(num,)` through the autoencoder of a random frame of each of `num` random
    concepts."""
    rng = np.random.default_rng(0)
    indices = rng.permutation(store.select(splits=splits))
    one_a_concept = indices[np.unique(store.index[indices]["concept"], return_index=True)[1]]
    values = []
    for index in rng.permutation(one_a_concept)[:num]:
        frame = store.draw_window(rng, int(index), 1)
        decoded = decode_latents(vae, encode_frames(vae, to_pixels(torch.from_numpy(frame))))
        values.append(psnr(frame, to_frames(decoded).cpu().numpy()))
    return np.array(values)
