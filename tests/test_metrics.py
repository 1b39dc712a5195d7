"""Measures on clips whose answer is known."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from latent_shift import metrics
from latent_shift.autoencoder import to_pixels
from latent_shift.diffusion import DenoisingObjective, share_noise
from latent_shift.store import Store
from latent_shift.text import embed
from latent_shift.zoo import load, seed


def moving_square(step: int) -> np.ndarray:
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    for k in range(6):
        frames[k, 8:16, k * step : k * step + 8] = 240
    return frames


def test_psnr():
    a = np.full((4, 4, 3), 100, np.uint8)
    assert metrics.psnr(a, a) == float("inf")
    assert metrics.psnr(a, a + 5) == pytest.approx(20 * np.log10(255 / 5))


def test_motion_coherence_and_flicker():
    still, slow, fast = (moving_square(step) for step in (0, 1, 3))
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    assert metrics.motion_energy(still) == 0
    # A step of one pixel changes two columns of eight pixels out of 32x32 by 240.
    assert metrics.motion_energy(slow) == pytest.approx(240 * 16 / 1024)
    assert metrics.motion_energy(fast) == pytest.approx(3 * metrics.motion_energy(slow))
    assert metrics.coherence(still) == pytest.approx(1)
    assert 1 > metrics.coherence(slow) > metrics.coherence(fast) > metrics.coherence(noise)
    ramp = np.repeat(np.arange(6, dtype=np.uint8) * 20, 12).reshape(6, 2, 2, 3)
    assert metrics.flicker(ramp) == 0
    blink = np.array([0, 100] * 3, np.uint8).repeat(12).reshape(6, 2, 2, 3)
    assert metrics.flicker(blink) == 2 * metrics.motion_energy(blink)


def test_motion_that_leads_somewhere_persists():
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    assert metrics.persistence(noise) == pytest.approx(1, abs=0.05)
    ramp = np.repeat(np.arange(12, dtype=np.uint8) * 20, 12).reshape(12, 2, 2, 3)
    assert metrics.persistence(ramp) == pytest.approx(4, rel=1e-3)
    assert metrics.persistence(np.zeros((6, 2, 2, 3), np.uint8)) == 1


def test_ranks_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    generated, real = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 20, 8)))
    expected = [1 + list(np.argsort(-(real @ row))).index(k) for k, row in enumerate(generated)]
    assert list(metrics.retrieval_ranks(generated, real)) == expected
    assert (metrics.retrieval_ranks(real, real) == 1).all()


def test_features_know_the_same_thing_again():
    features = metrics.ClipFeatures()
    slow, shifted, noise = (
        moving_square(1),
        moving_square(1)[::-1].copy(),
        np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8),
    )
    assert np.linalg.norm(features(slow)) == pytest.approx(1, abs=1e-5)
    assert features(slow) @ features(shifted) > features(slow) @ features(noise)


def test_evaluation_compares_with_the_clips_of_the_captions(packed, video_model):
    pipe = load(video_model)
    pipe.set_progress_bar_config(disable=True)
    result, clips = metrics.evaluate(pipe, Store(packed), num=3, steps=1, guidance=1.0, batch_size=2)
    assert clips.shape == (3, 4, 32, 32, 3)
    assert result["motion_energy"] == pytest.approx(np.mean([metrics.motion_energy(clip) for clip in clips]))
    assert result["motion_energy_real"] > 0
    assert 0 <= result["retrieval_top1"] <= result["retrieval_top5"] <= 1
    assert result["guidance_scale"] == 1.0
    assert np.mean(result["denoising_error_by_frame"]) == pytest.approx(result["denoising_error"], abs=1e-4)
    assert result["denoising_noise"] == [0.0, 0.0]
    other, guided = metrics.evaluate(pipe, Store(packed), steps=1, guidance=9.0, noise=(0.3, 0.6), batch_size=2)  # all there are: 3
    assert other["denoising_noise"] == [0.3, 0.6]
    assert other["denoising_error"] != result["denoising_error"]
    result |= {"model": "tiny", "reconstruction": {"psnr_db": 1.0}}
    less = {**result, "motion_explained_by_timestep": {"9": 0.5}}
    assert "seen through" in metrics.table([result]) and "seen through" not in metrics.table([result, less])
    assert not np.array_equal(clips, guided)
    with pytest.raises(ValueError, match="3 concepts of train have clips of 4 frames, 4 asked for"):
        metrics.evaluate(pipe, Store(packed), num=4)
    for key, value, message in (("num_frames", 1, "expected a video model of 3 frames or more"), ("fps", 4, "makes 32 pixels at 4 fps")):
        pipe.call_defaults[key], kept = value, pipe.call_defaults[key]
        with pytest.raises(ValueError, match=message):
            metrics.evaluate(pipe, Store(packed), num=3)
        pipe.call_defaults[key] = kept


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_denoising_error_is_the_objectives_and_motion_is_found(packed, video_model, prediction):
    pipe = load(video_model)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    clip = Store(packed).window(0, 0, 4)
    errors, motion = metrics.denoising(pipe, clip[None], ["red"], noise=(0.3, 0.6), levels=1)
    objective = DenoisingObjective(pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config))
    latents = pipe.vae.encode(to_pixels(torch.from_numpy(clip))).latent_dist.mean * pipe.vae.config.scaling_factor
    own, common = (torch.randn(1, n, *latents.shape[1:], generator=generator) for generator in [seed(0)] for n in (4, 1))
    loss, _ = objective(
        latents[None], share_noise(own, common, 0.3, 0.6), torch.tensor([500]), embed(pipe.tokenizer, pipe.text_encoder, ["red"])
    )
    assert errors.shape == (4,)
    assert errors.mean() == pytest.approx(float(loss), rel=1e-4)
    assert motion.keys() == {500}
    assert motion[500] < 1
    real_call = pipe.unet.forward

    def knowing(noisy, timestep, *args, **kwargs):  # one that knows the clip finds all of its motion
        made = real_call(noisy, timestep, *args, **kwargs)
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        a, s = schedule.alphas_cumprod[500] ** 0.5, (1 - schedule.alphas_cumprod[500]) ** 0.5
        noise = (noisy - a * latents) / s
        made.sample = noise if prediction == "epsilon" else a * noise - s * latents
        return made

    pipe.unet.forward = knowing
    errors, motion = metrics.denoising(pipe, clip[None], ["red"], noise=(0.3, 0.6), levels=1)
    assert errors.mean() == pytest.approx(0, abs=1e-6)
    assert motion[500] == pytest.approx(1, abs=1e-4)


def test_reconstruction_is_the_psnr_of_held_out_frames(packed, video_model):
    result = metrics.reconstruction(load(video_model).vae, Store(packed), splits=("val_concept",), num=3)
    assert result["frames"] == 3
    assert 0 < result["psnr_db_5_percent"] <= result["psnr_db"] < 60
