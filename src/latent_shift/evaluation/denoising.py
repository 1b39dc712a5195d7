"""What a Latent-Shift model knows, asked without sampling: how well it sees real clips through noise, and what its autoencoder keeps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from latent_shift.data.store import Store
from latent_shift.diffusion import correlated_noise, predicted_x0, training_target
from latent_shift.evaluation.clip_metrics import psnr
from latent_shift.models import text
from latent_shift.models.autoencoder import decode_latents, encode_frames, to_frames, to_pixels
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.runtime import seed
from latent_shift.shift import frames, share_text


class Motion(NamedTuple):
    """Of a clip each latent's deviation from the mean over its frames: what there is of it, and what a model misses of it through noise,
    seeing the frames together and each alone. Sums of squares: missed / there over many clips is 1 - R^2."""

    missed: float
    missed_alone: float
    there: float


def timesteps(pipe: LatentShiftPipeline, levels: int = 4) -> list[int]:
    """So many of those it is trained on, evenly spaced."""
    steps = pipe.scheduler.config.num_train_timesteps
    return [steps * (2 * level + 1) // (2 * levels) for level in range(levels)]


@torch.no_grad()
def denoising(
    pipe: LatentShiftPipeline, clip: np.ndarray, prompt: str, *, noise: tuple[float, float], number: int = 0, levels: int = 4
) -> tuple[np.ndarray, dict[int, Motion]]:
    """How well the model sees a real clip through noise: what it is trained to make small, and how much of what moves it has found, with
    the other frames before it and without: what its way of looking along time is worth.

    Args:
        pipe: a model of epsilon or v.
        clip: `(F, H, W, 3) uint8`.
        prompt: its caption.
        noise: share that frames have in common and correlation from frame to frame (`correlated_noise`).
        number: seed of the noise.
        levels: how many `timesteps`.

    Returns:
        The mean squared error of its prediction `(F,)`, the mean over levels; and by timestep the clip's motion.
    """
    schedule, vae, unet = DDPMScheduler.from_config(pipe.scheduler.config), pipe.vae, pipe.unet
    generator, errors = seed(number), torch.zeros(len(clip))
    share_text(unet)
    latents = encode_frames(vae, to_pixels(torch.from_numpy(clip)), batch_size=len(clip))
    embedding = text.embed(pipe.tokenizer, pipe.text_encoder, [prompt])
    motion = latents.float() - latents.float().mean(dim=0)
    seen = {}
    for step in timesteps(pipe, levels):
        timestep = torch.tensor([step], device=unet.device)
        own, common = (torch.randn(1, n, *latents.shape[1:], generator=generator) for n in (len(clip), 1))
        drawn = correlated_noise(own, common, *noise)[0].to(latents)
        noisy = schedule.add_noise(latents, drawn, timestep)
        with frames(unet, len(clip)):
            together = unet(noisy, timestep, embedding.to(latents)).sample
        with frames(unet, 1):
            alone = unet(noisy, timestep, embedding.to(latents).expand(len(clip), -1, -1)).sample
        target = training_target(schedule, latents, drawn, timestep)
        errors += (together - target).float().square().mean(dim=(1, 2, 3)).cpu() / levels
        cleaned = [predicted_x0(schedule, noisy, prediction, step).float() for prediction in (together, alone)]
        missed, missed_alone = (float((motion - each + each.mean(dim=0)).square().sum()) for each in cleaned)
        seen[step] = Motion(missed, missed_alone, float(motion.square().sum()))
    return errors.numpy(), seen


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, store: Store, *, splits: tuple[str, ...], num: int) -> np.ndarray:
    """PSNR in dB through the autoencoder of one frame of each of `num` concepts of `splits`, drawn at random: `(num,)`."""
    rng = np.random.default_rng(0)
    indices = rng.permutation(store.select(splits=splits))
    of_concepts = indices[np.unique(store.index[indices]["concept"], return_index=True)[1]]
    values = []
    for index in rng.permutation(of_concepts)[:num]:
        frame = store.draw_window(rng, int(index), 1)
        decoded = decode_latents(vae, encode_frames(vae, to_pixels(torch.from_numpy(frame))))
        values.append(psnr(frame, to_frames(decoded).cpu().numpy()))
    return np.array(values)
