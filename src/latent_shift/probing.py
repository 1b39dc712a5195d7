"""What a Latent-Shift model knows, asked without sampling: how well it sees real clips through noise, and what its autoencoder keeps."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from latent_shift import text
from latent_shift.autoencoder import to_frames, to_pixels
from latent_shift.diffusion import share_noise
from latent_shift.metrics import psnr
from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.shift import frames, share_text
from latent_shift.store import BalancedSampler, Store
from latent_shift.zoo import seed


@torch.no_grad()
def denoising(
    pipe: LatentShiftPipeline, clip: np.ndarray, prompt: str, *, noise: tuple[float, float], number: int = 0, levels: int = 4
) -> tuple[np.ndarray, dict[int, tuple[float, float]]]:
    """How well the model sees a real clip through noise: what it is trained to make small, and how much of what moves it has found.

    Args:
        pipe: a model of epsilon or v.
        clip: `(F, H, W, 3) uint8`.
        prompt: its caption.
        noise: share that frames have in common and correlation from frame to frame (`share_noise`).
        number: seed of the noise.
        levels: timesteps, evenly spaced.

    Returns:
        The mean squared error of its prediction `(F,)`, the mean over levels; and by timestep what is missed of the clip's motion, each
        latent's deviation from the mean of its clip, and what there is of it: sums of squares, whose ratio over many clips is 1 - R^2.
    """
    schedule, vae, unet = DDPMScheduler.from_config(pipe.scheduler.config), pipe.vae, pipe.unet
    steps, generator, errors = schedule.config.num_train_timesteps, seed(number), torch.zeros(len(clip))
    share_text(unet)
    latents = vae.encode(to_pixels(torch.from_numpy(clip)).to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
    embedding = text.embed(pipe.tokenizer, pipe.text_encoder, [prompt])
    motion = latents.float() - latents.float().mean(dim=0)
    seen = {}
    for level in range(levels):
        timestep = torch.tensor([steps * (2 * level + 1) // (2 * levels)], device=unet.device)
        own, common = (torch.randn(1, n, *latents.shape[1:], generator=generator) for n in (len(clip), 1))
        drawn = share_noise(own, common, *noise)[0].to(latents)
        noisy = schedule.add_noise(latents, drawn, timestep)
        with frames(unet, len(clip)):
            predicted = unet(noisy, timestep, embedding.to(latents)).sample
        epsilon = schedule.config.prediction_type == "epsilon"
        target = drawn if epsilon else schedule.get_velocity(latents, drawn, timestep)
        errors += (predicted - target).float().square().mean(dim=(1, 2, 3)).cpu() / levels
        signal = float(schedule.alphas_cumprod[timestep.cpu()])
        a, s = signal**0.5, (1 - signal) ** 0.5
        clean = (noisy - s * predicted) / a if epsilon else a * noisy - s * predicted
        found = clean.float() - clean.float().mean(dim=0)
        seen[int(timestep)] = (float((motion - found).square().sum()), float(motion.square().sum()))
    return errors.numpy(), seen


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, store: Store, *, splits: tuple[str, ...], num: int) -> np.ndarray:
    """PSNR in dB of `num` single frames of `splits` through the autoencoder: `(num,)`."""
    rng = np.random.default_rng(0)
    sampler = BalancedSampler(store, store.select(splits=splits))
    values = []
    for index in sampler.draw(rng, num):
        frame = store.draw_window(rng, index, 1)
        decoded = vae.decode(vae.encode(to_pixels(torch.from_numpy(frame)).to(vae.device, vae.dtype)).latent_dist.mean).sample
        values.append(psnr(frame, to_frames(decoded).cpu().numpy()))
    return np.array(values)
