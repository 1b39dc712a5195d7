"""What generated clips are measured by, each number beside the same number of real clips.

Clips are `(F, H, W, 3) uint8`. Nothing here is FID or FVD: features are EfficientNet-lite0's (ImageNet), which a package
carries, and every result says so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from latent_shift import text
from latent_shift.autoencoder import FeatureDistance, to_frames, to_pixels
from latent_shift.diffusion import share_noise
from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.shift import frames, share_text
from latent_shift.store import BalancedSampler, Store
from latent_shift.zoo import seed, to_uint8


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 arrays in dB: 10 log10(255^2 / mean squared error)."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def motion_energy(clip: np.ndarray) -> float:
    """Mean absolute difference of successive frames in grey levels (0..255)."""
    return float(np.abs(np.diff(clip.astype(np.int16), axis=0)).mean())


def coherence(clip: np.ndarray) -> float:
    """Mean correlation of successive frames' pixels, in [-1, 1]; 1 where nothing changes."""
    flat = clip.reshape(len(clip), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1)
    products = (flat[1:] * flat[:-1]).sum(axis=1)
    return float(np.mean(products / np.maximum(norms[1:] * norms[:-1], 1e-9)))


def flicker(clip: np.ndarray) -> float:
    """Mean absolute second difference over time in grey levels: steady motion is small, jitter twice the motion energy."""
    x = clip.astype(np.int16)
    return float(np.abs(x[2:] - 2 * x[1:-1] + x[:-2]).mean())


def persistence(clip: np.ndarray, gap: int = 4) -> float:
    """The change over `gap` frames (of a shorter clip, from end to end) by the change over one: 1 where frames are drawn anew around one picture, more where motion
    leads somewhere."""
    x, gap = clip.astype(np.int16), min(gap, len(clip) - 1)
    return float((np.abs(x[gap:] - x[:-gap]).mean() + 1e-3) / (np.abs(np.diff(x, axis=0)).mean() + 1e-3))


class ClipFeatures:
    """A clip as one unit vector: the mean over its frames of EfficientNet-lite0's last pooled features."""

    name = "efficientnet-lite0"

    def __init__(self) -> None:
        self.network = FeatureDistance().network

    @torch.no_grad()
    def __call__(self, clip: np.ndarray) -> np.ndarray:
        pixels = to_pixels(torch.from_numpy(clip)).contiguous(memory_format=torch.channels_last)
        features = self.network.extract_features(pixels).mean(dim=(0, 2, 3))
        return torch.nn.functional.normalize(features, dim=0).numpy()


def retrieval_ranks(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """For each of N generated clips the rank (1 is best) of the real clip of its own caption among all N, by cosine similarity.

    Args:
        generated, real: `(N, D)` unit vectors, row by row of the same caption.
    """
    similarity = generated @ real.T
    return 1 + (similarity > np.diag(similarity)[:, None]).sum(axis=1)


@torch.no_grad()
def denoising(
    pipe: LatentShiftPipeline, clips: np.ndarray, prompts: list[str], *, noise: tuple[float, float], levels: int = 4
) -> tuple[np.ndarray, dict[int, float]]:
    """How well the model sees real clips through noise: what it is trained to make small, and how much of what moves it has found.

    Args:
        pipe: a model of epsilon or v.
        clips: `(B, F, H, W, 3) uint8`.
        prompts: their B captions.
        noise: share that frames have in common and correlation from frame to frame (`share_noise`), drawn from seed 0.
        levels: timesteps, evenly spaced.

    Returns:
        The mean squared error of its prediction `(F,)`, the mean over clips and levels; and by timestep the share of the variance
        explained (R^2) of the clips' motion, each latent's deviation from the mean of its clip.
    """
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    steps, generator, total = schedule.config.num_train_timesteps, seed(0), torch.zeros(clips.shape[1])
    missed, moving = np.zeros(levels), np.zeros(levels)
    share_text(pipe.unet)
    for clip, prompt in zip(clips, prompts, strict=True):
        vae, unet = pipe.vae, pipe.unet
        latents = vae.encode(to_pixels(torch.from_numpy(clip)).to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
        embedding = text.embed(pipe.tokenizer, pipe.text_encoder, [prompt])
        for level in range(levels):
            timestep = torch.tensor([steps * (2 * level + 1) // (2 * levels)], device=unet.device)
            own, common = (torch.randn(1, n, *latents.shape[1:], generator=generator) for n in (len(clip), 1))
            drawn = share_noise(own, common, *noise)[0].to(latents)
            noisy = schedule.add_noise(latents, drawn, timestep)
            with frames(unet, len(clip)):
                predicted = unet(noisy, timestep, embedding.to(latents)).sample
            epsilon = schedule.config.prediction_type == "epsilon"
            target = drawn if epsilon else schedule.get_velocity(latents, drawn, timestep)
            total += (predicted - target).float().square().mean(dim=(1, 2, 3)).cpu()
            signal = float(schedule.alphas_cumprod[timestep.cpu()])
            a, s = signal**0.5, (1 - signal) ** 0.5
            clean = (noisy - s * predicted) / a if epsilon else a * noisy - s * predicted
            motion, found = (each.float() - each.float().mean(dim=0) for each in (latents, clean))
            missed[level] += float((motion - found).square().sum())
            moving[level] += float(motion.square().sum())
    timesteps = [steps * (2 * level + 1) // (2 * levels) for level in range(levels)]
    explained = 1 - missed / np.maximum(moving, 1e-12)
    return (total / (len(clips) * levels)).numpy(), {t: float(r2) for t, r2 in zip(timesteps, explained, strict=True)}


@torch.no_grad()
def reconstruction(
    vae: AutoencoderKL, store: Store, *, splits: tuple[str, ...], num: int, progress: Callable = lambda done, total: None
) -> dict:
    """PSNR in dB of `num` single frames of `splits` through the autoencoder: mean over frames, and the 5 % worst frame's."""
    rng = np.random.default_rng(0)
    sampler = BalancedSampler(store, store.select(splits=splits))
    values = []
    for done, index in enumerate(sampler.draw(rng, num), 1):
        frame = store.draw_window(rng, index, 1)
        decoded = vae.decode(vae.encode(to_pixels(torch.from_numpy(frame)).to(vae.device, vae.dtype)).latent_dist.mean).sample
        values.append(psnr(frame, to_frames(decoded).cpu().numpy()))
        progress(done, num)
    return {"psnr_db": float(np.mean(values)), "psnr_db_5_percent": float(np.percentile(values, 5)), "frames": num, "splits": list(splits)}


def clips_to_match(pipe: LatentShiftPipeline, store: Store, *, num: int | None = None, splits: tuple[str, ...] = ("train",)) -> list[int]:
    """The records whose captions `evaluate` takes, one a concept; raises its errors, before any work is done."""
    num_frames = int(pipe.call_defaults["num_frames"])
    if num_frames < 3:
        raise ValueError(f"expected a video model of 3 frames or more, got one of {num_frames}: it has no motion to measure")
    made = (pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe.call_defaults["fps"])
    if made != (store.info["size"], store.info["fps"]):
        raise ValueError(
            f"the model makes {made[0]} pixels at {made[1]:g} fps, {store.folder} holds {store.info['size']} at {store.info['fps']:g}"
        )
    square = (made[0], made[0], 3)
    candidates = [index for index in store.select(splits=splits, num_frames=num_frames).tolist() if store.shape(index) == square]
    plainest: dict[str, int] = {}  # the record with the shortest caption of each concept: no skin tone, no variant
    for index in sorted(candidates, key=lambda index: len(store.records[index].texts[0])):
        plainest.setdefault(store.records[index].concept, index)
    if len(plainest) < (num or 1):
        raise ValueError(f"{len(plainest)} concepts of {', '.join(splits)} have clips of {num_frames} frames, {num or 1} asked for")
    return np.random.default_rng(0).permutation(sorted(plainest.values()))[: num or 100].tolist()


def evaluate(
    pipe: LatentShiftPipeline,
    store: Store,
    *,
    num: int | None = None,
    splits: tuple[str, ...] = ("train",),
    steps: int | None = None,
    guidance: float | None = None,
    noise: tuple[float, float] | None = None,
    batch_size: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict, np.ndarray]:
    """Generate a clip for each of `num` concepts and compare with the real clips.

    Args:
        pipe: the model.
        store: packed pixels at the model's size and frame rate.
        num: concepts; one clip each, of seed 0, 1, 2, ... None: 100, or as many as there are.
        splits: which records to take captions from.
        steps, guidance: sampling settings; None takes the model's.
        noise: see `denoising`; models are compared in the same. None: that with which the model draws.
        batch_size: clips at once.
        progress: called with (clips done, clips in all).

    Returns:
        The measures, and the generated clips `(num, F, H, W, 3) uint8`.

    Raises:
        ValueError: fewer than `num` concepts have clips, or the store's size or frame rate is not the model's.
    """
    num_frames, chosen = int(pipe.call_defaults["num_frames"]), clips_to_match(pipe, store, num=num, splits=splits)
    features = ClipFeatures()
    real = np.stack([store.window(index, 0, num_frames) for index in chosen])
    clips: list[np.ndarray] = []
    for start in range(0, len(chosen), batch_size):
        prompts = [store.records[index].texts[0] for index in chosen[start : start + batch_size]]
        generators = [seed(start + row) for row in range(len(prompts))]
        result = pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, return_dict=False)
        clips += [to_uint8(clip) for clip in result[0]]
        progress(len(clips), len(chosen))
    generated = np.stack(clips)
    ranks = retrieval_ranks(np.stack([features(clip) for clip in generated]), np.stack([features(clip) for clip in real]))
    noise = noise or (float(pipe.call_defaults["shared_noise"]), float(pipe.call_defaults["noise_correlation"]))
    errors, motion = denoising(pipe, real, [store.records[index].texts[0] for index in chosen], noise=noise)
    energies = np.array([[motion_energy(clip) for clip in part] for part in (generated, real)])
    return {
        "clips": len(chosen),
        "splits": list(splits),
        "num_frames": num_frames,
        "num_inference_steps": int(steps or pipe.call_defaults["num_inference_steps"]),
        "guidance_scale": float(pipe.call_defaults["guidance_scale"] if guidance is None else guidance),
        "retrieval_features": ClipFeatures.name,
        "retrieval_top1": float((ranks == 1).mean()),
        "retrieval_top5": float((ranks <= 5).mean()),
        "retrieval_median_rank": float(np.median(ranks)),
        "denoising_noise": list(noise),
        "denoising_error": float(errors.mean()),
        "denoising_error_by_frame": errors.round(4).tolist(),
        "motion_explained_by_timestep": {str(timestep): round(r2, 4) for timestep, r2 in motion.items()},
        "motion_energy": float(energies[0].mean()),
        "motion_energy_real": float(energies[1].mean()),
        # How far each clip's motion is from that of the real clip of its caption, as a factor: exp of the mean |log ratio|.
        "motion_error": float(np.exp(np.abs(np.log((energies[0] + 0.1) / (energies[1] + 0.1))).mean())),
        "coherence": float(np.mean([coherence(clip) for clip in generated])),
        "coherence_real": float(np.mean([coherence(clip) for clip in real])),
        "persistence": float(np.mean([persistence(clip) for clip in generated])),
        "persistence_real": float(np.mean([persistence(clip) for clip in real])),
        "flicker": float(np.mean([flicker(clip) for clip in generated])),
        "flicker_real": float(np.mean([flicker(clip) for clip in real])),
    }, generated


def table(results: list[dict]) -> str:
    """Markdown: a row for each measure of `evaluate`, a column for each model, and what real clips measure."""
    real, by_frame = results[0], [result[name] for result in results if (name := "denoising_error_by_frame") in result]
    rows = [
        ["measure", *(str(result["model"]) for result in results), "real clips"],
        ["---"] * (len(results) + 2),
        ["reconstruction PSNR, dB", *(f"{result['reconstruction']['psnr_db']:.1f}" for result in results), ""],
        [f"right caption first of {real['clips']}", *(f"{result['retrieval_top1']:.0%}" for result in results), "100%"],
        ["right caption in the first five", *(f"{result['retrieval_top5']:.0%}" for result in results), "100%"],
        ["median rank of the right caption", *(f"{result['retrieval_median_rank']:g}" for result in results), "1"],
        ["motion error, factor", *(f"{result['motion_error']:.2f}" for result in results), "1.00"],
    ]
    if len(by_frame) == len(results):  # a file of an older version has none
        rows.append(["denoising error of real clips", *(f"{np.mean(errors):.4f}" for errors in by_frame), ""])
        rows.append(["of their first and last frames", *(f"{(errors[0] + errors[-1]) / 2:.4f}" for errors in by_frame), ""])
    timesteps = [result.get("motion_explained_by_timestep", {}).keys() for result in results]
    if all(each == timesteps[0] for each in timesteps):
        for timestep in timesteps[0]:
            explained = [result["motion_explained_by_timestep"][timestep] for result in results]
            rows.append([f"their motion, seen through the noise of timestep {timestep}", *(f"{r2:.0%}" for r2 in explained), "100%"])
    for name, unit in (("motion_energy", ", grey levels"), ("flicker", ", grey levels"), ("persistence", ""), ("coherence", "")):
        if not all(name in result for result in results):
            continue
        label = name.replace("_", " ") + unit
        rows.append([label, *(f"{result[name]:.3g}" for result in results), f"{real[name + '_real']:.3g}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
