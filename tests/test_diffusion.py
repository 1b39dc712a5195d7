"""The objective against its formulas."""

from typing import get_args

import numpy as np
import pytest
import torch

from latent_shift.clip_text import share_text
from latent_shift.config import Prediction
from latent_shift.diffusion import draw_timesteps, noise_schedule, training_target
from latent_shift.models import sizes
from latent_shift.noise import correlated_noise
from latent_shift.shift import frames, inflate
from latent_shift.training.objectives import DenoisingObjective, attention_kernel


def batch(num_frames: int = 3):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, num_frames, 4, 4, 4, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([100, 900]), torch.randn(2, 5, 32, generator=generator)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    unet = inflate(sizes.unet("tiny", sample_size=4).eval())
    share_text(unet)
    return unet


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("min_snr", [None, 5.0])
@pytest.mark.parametrize("motion_weight", [1.0, 3.0])
@torch.no_grad()
def test_denoising_objective_is_the_formula(unet, prediction, min_snr, motion_weight):
    latents, noise, timesteps, text = batch()
    schedule = noise_schedule(prediction=prediction)
    objective = DenoisingObjective(unet, schedule, min_snr=min_snr, motion_weight=motion_weight)
    loss, _ = objective(latents, noise, timesteps, text)
    expected = []
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for clip in range(2):
        alpha_bar = torch.prod(1 - betas[: timesteps[clip] + 1])
        a, s = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        if prediction == "flow_prediction":
            a, s = 1 - timesteps[clip] / 1000, timesteps[clip] / 1000
        with frames(unet, 3):
            predicted = unet(
                a * latents[clip] + s * noise[clip], timesteps[clip], text[clip : clip + 1]
            ).sample
        target = {
            "epsilon": noise[clip], "v_prediction": a * noise[clip] - s * latents[clip], "flow_prediction": noise[clip] - latents[clip]
        }[prediction]  # fmt: skip
        snr = float(a / s) ** 2
        # What an error of the prediction weighs as an error of the clean latents: (sigma / alpha)^2 of the noise, sigma^2 of a velocity.
        x0_weight = snr if prediction == "epsilon" else float(s) ** -2
        weight = 1.0 if min_snr is None else min(snr, min_snr) / x0_weight
        error = predicted - target
        steady = error.mean(dim=0, keepdim=True)
        expected.append(weight * (steady.square().mean() + motion_weight * (error - steady).square().mean()))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_denoising_objective_trains_the_image_network_on_single_frames(unet):
    latents, noise, timesteps, text = batch(num_frames=1)
    loss, _ = DenoisingObjective(unet, noise_schedule())(latents, noise, timesteps, text)
    noisy = noise_schedule().add_noise(latents[:, 0], noise[:, 0], timesteps)
    predicted = sizes.unet("tiny", sample_size=4)
    predicted.load_state_dict(unet.state_dict())
    torch.testing.assert_close(loss, (predicted(noisy, timesteps, text).sample - noise[:, 0]).square().mean())


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("correlation", [0.0, 0.7])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_correlated_noise_has_the_requested_correlation(share, correlation, loop):
    rng = np.random.default_rng(0)
    own, common = rng.standard_normal((4, 5, 10_000)), rng.standard_normal((4, 1, 10_000))
    noise = correlated_noise(own, common, share, correlation, loop=loop)
    covariance = np.einsum("bfn,bgn->fg", noise, noise) / 40_000
    apart = np.abs(np.arange(5)[:, None] - np.arange(5))
    rest = (
        (correlation**apart + correlation ** (5 - apart)) / (1 + correlation**5)
        if loop
        else correlation**apart
    )
    np.testing.assert_allclose(covariance, share + (1 - share) * rest, atol=0.03)
    tensors = correlated_noise(torch.from_numpy(own), torch.from_numpy(common), share, correlation, loop=loop)
    np.testing.assert_allclose(tensors.numpy(), noise)
    if loop:  # it has no first frame
        np.testing.assert_allclose(
            correlated_noise(np.roll(own, 1, axis=1), common, share, correlation, loop=True),
            np.roll(noise, 1, axis=1),
        )


@pytest.mark.parametrize(
    ("device", "cudnn", "fused"), [("cuda", False, True), ("cpu", False, False), ("mps", True, True)]
)
def test_attention_kernel_depends_on_device_and_size(device, cudnn, fused):
    """On a GPU all but cuDNN's, on a CPU the plain one where it fits."""
    with attention_kernel(device, noise=torch.empty(1, 1, 4, 8, 8)):
        assert (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == (
            cudnn,
            fused,
        )
    with attention_kernel(device, noise=torch.empty(1, 1, 4, 64, 64)):
        assert torch.backends.cuda.flash_sdp_enabled()


def test_noise_schedule_matches_its_definition():
    assert noise_schedule().alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-4)  # Stable Diffusion's
    assert noise_schedule(schedule="linear").betas[-1] == pytest.approx(0.02)
    ending = noise_schedule(zero_terminal_snr=True)
    assert ending.alphas_cumprod[-1] == pytest.approx(0, abs=1e-7)
    assert ending.config.timestep_spacing == "trailing"
    assert len(noise_schedule(num_timesteps=10).betas) == 10
    with pytest.raises(
        ValueError, match="expected a schedule that predicts epsilon, v_prediction, flow_prediction"
    ):
        training_target(noise_schedule(prediction="sample"), *torch.zeros(3, 1))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_draw_timesteps_follows_its_distribution(shift):
    timesteps = draw_timesteps(np.random.default_rng(0), 100_000, 1000, shift=shift)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    for t in (100, 500, 900):
        # P(t' < t) is the u that is moved to t.
        u = (t / 1000) / (shift - (shift - 1) * t / 1000)
        assert (timesteps < t).mean() == pytest.approx(u, abs=0.005)
