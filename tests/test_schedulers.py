"""Schedulers against denoisers that know the answer, in every mode of a call.

The U-Net is replaced by the exact prediction for a known clip, or for normally distributed clips; then the result must be that clip,
or have that distribution.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from test_modes import sd

from latent_shift.pipelines import clip_pipeline, conditioning, schedulers
from latent_shift.pipelines.request import Request
from latent_shift.pipelines.schedulers import (
    EDM_SCHEDULERS,
    FLOW_SCHEDULERS,
    SCHEDULERS,
    check_scheduler,
    make_scheduler,
)
from latent_shift.runtime import seed
from latent_shift.shift import Shift, inflate

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
EPSILON = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading")
ZERO_SNR = DPMSolverMultistepScheduler(
    **STABLE_DIFFUSION, timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
)  # fmt: skip
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)

CLIP = np.zeros((6, 32, 32, 3), np.float32)
CLIP[5] = 1
LEFT = np.zeros((32, 32), np.float32)
LEFT[:, :16] = 1
MODES = {
    "text": {},
    "guided": {"guidance_scale": 3.0},
    "image": {"image": CLIP[0]},
    "both images": {"image": CLIP[0], "last_image": CLIP[5]},
    "image, strength": {"image": CLIP[0], "strength": 0.6},
    "video": {"video": CLIP, "strength": 0.3},
    "mask": {"video": CLIP, "mask": LEFT},
    "mask, strength": {"video": CLIP, "mask": LEFT, "strength": 0.6},
    "chunk": {"chunk": 2, "halo": 1},
    "free init": {},
}


@pytest.fixture(scope="module")
def pipe(texts):
    return sd(texts)


@pytest.fixture
def answer(pipe, monkeypatch):
    """Latents `(1, 4, 6, 4, 4)` of a clip, wider than a scheduler that clips would leave them; the encoder returns them."""
    latents = 2 * torch.randn(1, 4, 1, 4, 4, generator=seed(5)) + torch.randn(
        1, 4, 6, 4, 4, generator=seed(6)
    )

    def encode(pipe, pictures, height, width, batch_size):
        if len(pictures) == 6:
            return latents
        frame = 5 if pictures.max() == 1 else 0
        return latents[:, :, frame : frame + 1]

    monkeypatch.setattr(conditioning, "encode_pictures", encode)
    return latents


def noise_level(model, timestep) -> torch.Tensor:
    """The model's fraction of signal variance at a timestep; sigma is interpolated in its logarithm, on its own."""
    alphas = model.alphas_cumprod.double().clamp(min=2**-24).numpy()
    log_sigmas = 0.5 * np.log((1 - alphas) / alphas)
    return torch.tensor(1 / (1 + np.exp(2 * np.interp(float(timestep), np.arange(len(alphas)), log_sigmas))))


def know_the_answer(monkeypatch, pipe, model, answer, *, std=0.0, inputs=None):
    """Replace the U-Net by the best prediction for clips that are normal around `answer`, with a standard deviation."""

    def unet_predictor(unet, conditions, **options):
        def predict(noisy, timestep, frame_indices):
            alpha = noise_level(model, timestep)
            mean = answer[:, :, frame_indices] if answer.shape[2] > 1 else answer
            error = noisy.double() - alpha.sqrt() * mean
            gain = std**2 * alpha.sqrt() / (alpha * std**2 + 1 - alpha)
            clean = mean + gain * error
            noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            if inputs is not None:
                inputs.append(error / (1 - alpha).sqrt())
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            prediction = {"epsilon": noise, "v_prediction": velocity}[model.config.prediction_type]
            return torch.cat([prediction.to(noisy)] * len(conditions))

        return predict

    monkeypatch.setattr(clip_pipeline, "unet_predictor", unet_predictor)


def generate(pipe, mode, *, steps):
    pipe.disable_free_init()
    if mode == "free init":
        pipe.enable_free_init(num_iters=2)
    arguments = {"guidance_scale": 1.0, **MODES[mode]}
    return pipe("red", num_inference_steps=steps, generator=seed(0), output_type="latent", **arguments).frames


def stream(pipe, monkeypatch, *, steps):
    monkeypatch.setattr(clip_pipeline, "decode_clips", lambda pipe, latents, size, kind: ([[latents]], None))
    inflate(pipe.unet, Shift(backward=0))
    frames = list(
        pipe.stream("red", num_frames=3, num_inference_steps=steps, guidance_scale=1.0, generator=seed(0))
    )
    inflate(pipe.unet, Shift())
    return torch.cat(frames, dim=2)


@pytest.mark.parametrize("model", [EPSILON, ZERO_SNR], ids=["epsilon", "zero terminal SNR"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_make_scheduler_samples_a_known_clip_in_every_mode(pipe, answer, monkeypatch, name, model):
    pipe.scheduler = make_scheduler(name, model)
    know_the_answer(monkeypatch, pipe, model, answer)
    errors = {mode: generate(pipe, mode, steps=10) - answer for mode in MODES}
    know_the_answer(monkeypatch, pipe, model, answer[:, :, :1])
    errors["stream"] = stream(pipe, monkeypatch, steps=10) - answer[:, :, :1]
    # Schedulers that end at the first training timestep instead of at 0 leave its noise, a hundredth of this clip.
    wrong = {
        mode: float(error.std() / answer.std())
        for mode, error in errors.items()
        if error.std() > 0.05 * answer.std()
    }
    assert wrong == {}


@pytest.mark.parametrize("model", [EPSILON, ZERO_SNR], ids=["epsilon", "zero terminal SNR"])
@pytest.mark.parametrize(
    "name", [name for name in SCHEDULERS if name != "LCM"]
)  # LCM samples consistency models
def test_make_scheduler_samples_a_known_distribution_with_free_init(pipe, monkeypatch, name, model):
    """A start with too much or too little noise would give clips that differ too much or too little."""
    pipe.scheduler = make_scheduler(name, model)
    know_the_answer(monkeypatch, pipe, model, torch.zeros(1, 4, 1, 4, 4), std=0.5)
    for mode in ("text", "free init"):
        assert 0.4 < generate(pipe, mode, steps=40).std() < 0.6


@pytest.mark.parametrize("name", SCHEDULERS)
def test_known_frames_have_the_noise_level_of_the_timestep(pipe, answer, monkeypatch, name):
    """At every call of the network, between the stages of a second-order step, too."""
    inputs: list[torch.Tensor] = []
    pipe.scheduler = make_scheduler(name, EPSILON)
    know_the_answer(monkeypatch, pipe, EPSILON, answer, inputs=inputs)
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(1))
    pipe.disable_free_init()
    pipe("red", video=CLIP, mask=LEFT, latents=latents, num_inference_steps=5, guidance_scale=1.0)
    assert len(inputs) >= 5
    for noise in inputs:
        torch.testing.assert_close(noise[..., 2:].float(), latents[..., 2:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", EDM_SCHEDULERS)
def test_edm_schedulers_sample_a_known_clip_in_every_mode(pipe, answer, monkeypatch, name, prediction_type):
    model = EDMEulerScheduler(prediction_type=prediction_type)
    pipe.scheduler = make_scheduler(name, model)
    sign, data = {"epsilon": 1, "v_prediction": -1}[prediction_type], model.config.sigma_data

    def unet_predictor(unet, conditions, **options):
        def predict(scaled, timestep, frame_indices):
            sigma = (4 * timestep.double()).exp()
            norm = (sigma**2 + data**2).sqrt()  # Karras et al. 2022, table 1
            prediction = (
                (answer[:, :, frame_indices] - data**2 / norm * scaled) * norm / (sign * sigma * data)
            )
            return torch.cat([prediction.to(scaled)] * len(conditions))

        return predict

    monkeypatch.setattr(clip_pipeline, "unet_predictor", unet_predictor)
    for mode in MODES:
        torch.testing.assert_close(generate(pipe, mode, steps=10), answer, atol=1e-2, rtol=0)


def know_the_flow(monkeypatch, answer, *, std=0.0, inputs=None):
    """As `know_the_answer`, for a model that predicts a flow."""

    def unet_predictor(unet, conditions, **options):
        def predict(noisy, timestep, frame_indices):
            sigma = timestep.double() / 1000
            mean = answer[:, :, frame_indices] if answer.shape[2] > 1 else answer
            error = noisy.double() - (1 - sigma) * mean
            gain = std**2 * (1 - sigma) / ((1 - sigma) ** 2 * std**2 + sigma**2)
            if inputs is not None:
                inputs.append(error / sigma)
            flow = (noisy - mean - gain * error) / sigma
            return torch.cat([flow.to(noisy)] * len(conditions))

        return predict

    monkeypatch.setattr(clip_pipeline, "unet_predictor", unet_predictor)


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_flows_are_sampled_in_every_mode(pipe, answer, monkeypatch, name):
    pipe.scheduler = make_scheduler(name, FLOW)
    know_the_flow(monkeypatch, answer)
    errors = {mode: generate(pipe, mode, steps=10) - answer for mode in MODES}
    know_the_flow(monkeypatch, answer[:, :, :1])
    errors["stream"] = stream(pipe, monkeypatch, steps=10) - answer[:, :, :1]
    for mode, error in errors.items():
        assert error.std() < 0.02 * answer.std(), mode
    pipe.disable_free_init()
    inputs: list[torch.Tensor] = []
    know_the_flow(monkeypatch, answer, inputs=inputs)
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(1))
    pipe("red", video=CLIP, mask=LEFT, latents=latents, num_inference_steps=5, guidance_scale=1.0)
    for noise in inputs:  # of the known part, at the level of the timestep
        torch.testing.assert_close(noise[..., 2:].float(), latents[..., 2:], atol=1e-3, rtol=1e-3)
    know_the_flow(monkeypatch, torch.zeros(1, 4, 1, 4, 4), std=0.5)
    for mode in ("text", "free init"):
        assert 0.4 < generate(pipe, mode, steps=40).std() < 0.6
    pipe.disable_free_init()
    with pytest.raises(ValueError, match="takes no timesteps and no sigmas"):
        pipe("red", timesteps=[900, 500, 100])


@pytest.mark.parametrize("steps", [10, 20])
def test_pndm_with_runge_kutta_steps_samples_a_known_clip_in_every_mode(pipe, answer, monkeypatch, steps):
    pipe.scheduler = PNDMScheduler(**STABLE_DIFFUSION)
    know_the_answer(monkeypatch, pipe, EPSILON, answer)
    for mode in MODES:
        assert (generate(pipe, mode, steps=steps) - answer).std() < 0.05 * answer.std()
    assert not pipe.scheduler.config.skip_prk_steps


def test_check_scheduler_knows_every_scheduler_of_diffusers():
    names = [name.removesuffix("Scheduler") for name in dir(diffusers) if name.endswith("Scheduler")]
    for name in names:
        if name not in (*SCHEDULERS, *EDM_SCHEDULERS) and not name.startswith("Flax"):
            with pytest.raises(ValueError, match=rf"^scheduler '{name}' .*; expected one of DDIM, "):
                check_scheduler(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FlowMatchEulerDiscrete", "samples flow-matching models"),
        ("CogVideoXDDIM", "has noise levels of its own instead of the model's"),
        ("IPNDM", "has noise levels of its own"),
        ("DDIMInverse", "runs from clips to noise"),
        ("RePaint", "with a mask, any other scheduler inpaints"),
        ("Eular", "unknown scheduler 'Eular'; did you mean Euler"),
        ("DDIMScheduler", "did you mean DDIM"),
    ],
)
def test_request_refuses_a_scheduler_before_a_model_is_loaded(name, message):
    with pytest.raises(ValueError, match=message):
        Request(prompt="red", scheduler=name)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("EDMEuler", EPSILON, "'EDMEuler' has other noise levels than this model; expected one of DDIM"),
        ("DDIM", EDMEulerScheduler(), "'DDIM' has other noise levels than this model; expected one of EDMDPM"),
        ("PNDM", DDIMScheduler(clip_sample=False, prediction_type="sample"), "cannot sample a model that predicts 'sample'"),
        ("DDIM", FLOW, "'DDIM' cannot sample a model that predicts a flow; expected DPMSolverMultistep or"),
        ("DDIM", DDIMScheduler(clip_sample=True), "clips latents as if they were pixels; expected clip_sample=False"),
    ],
)  # fmt: skip
def test_make_scheduler_refuses_what_does_not_suit_the_model(name, model, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, model)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (DDIMScheduler(), {}, "expected clip_sample=False"),
        (UniPCMultistepScheduler(thresholding=True), {}, "expected thresholding=False"),
        (PNDMScheduler(skip_prk_steps=True, timestep_spacing="linspace"), {}, "equal length"),
        (EulerDiscreteScheduler(timestep_type="continuous"), {}, "expected timestep_type 'discrete'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), {}, "samples flow-matching models"),
        (PNDMScheduler(skip_prk_steps=True), {"num_inference_steps": 3}, "PNDM needs num_inference_steps of 4"),
        (EPSILON, {"num_inference_steps": 1001}, "num_inference_steps must be at most 1000"),
    ],
)  # fmt: skip
def test_call_refuses_schedulers_and_steps_that_do_not_work(pipe, answer, scheduler, arguments, message):
    pipe.disable_free_init()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe("red", **arguments)


@pytest.mark.parametrize("model", [EPSILON, ZERO_SNR, DDIMScheduler(clip_sample=False, beta_end=0.01)])
def test_make_scheduler_keeps_the_noise_schedule(model):
    for name in SCHEDULERS:
        scheduler = make_scheduler(name, model)
        torch.testing.assert_close(scheduler.alphas_cumprod, model.alphas_cumprod, atol=1e-6, rtol=1e-4)
        assert scheduler.config.prediction_type == model.config.prediction_type


def test_check_scheduler_names_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(schedulers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scheduler 'LMSDiscrete' needs SciPy: pip install scipy"):
        Request(prompt="red", scheduler="LMSDiscrete")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPMSolverMultistep", {"use_flow_sigmas": True}), ("SASolver", {"algorithm_type": "noise_prediction"}),
        ("DDPM", {"variance_type": "learned_range", "clip_sample": False}), ("UniPCMultistep", {"predict_x0": False}),
        ("UniPCMultistep", {"solver_type": "bh1"}), ("LCM", {"timestep_scaling": 0.0, "clip_sample": False}),
        ("DDIM", {"steps_offset": 500, "clip_sample": False}), ("DDIM", {"steps_offset": -1, "clip_sample": False}),
        ("DDIM", {"rescale_betas_zero_snr": True, "clip_sample": False}),
    ],
)  # fmt: skip
def test_check_own_scheduler_refuses_settings_that_sample_wrongly(name, settings):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    option = next(iter(settings))
    with pytest.raises(
        ValueError, match=rf"scheduler '{name}' with {option}=.* leave {option} at its default"
    ):
        schedulers.check_own_scheduler(scheduler)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_dynamic_shifting"])
def test_a_flow_has_the_noise_levels_of_a_flow(option):
    plain = DPMSolverMultistepScheduler(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"with use_flow_sigmas=False .* correctly; set it"):
        schedulers.check_own_scheduler(plain)
    other = DPMSolverMultistepScheduler.from_config(
        FLOW.config, **{option: True}, time_shift_type="exponential"
    )
    with pytest.raises(ValueError, match=rf"with {option}=True .* leave {option} at its default"):
        schedulers.check_own_scheduler(other)
    assert not make_scheduler("UniPCMultistep", EPSILON).config.use_flow_sigmas


@pytest.mark.parametrize("sigmas", [[0.1, 1, 14], [14, -1], [1000, 10, 1], [float("nan")], []])
def test_custom_sigmas_fall_within_those_of_the_model(sigmas):
    with pytest.raises(ValueError, match=r"expected falling sigmas from at most 14\.6"):
        schedulers.set_timesteps(EPSILON, 10, device=torch.device("cpu"), sigmas=sigmas)


@pytest.mark.parametrize("num", [61, 103, 206])
def test_trailing_timesteps_that_go_on_to_minus_one_are_refused(num):
    for name in ("DDIM", "DPMSolverMultistep"):
        with pytest.raises(
            ValueError,
            match=f"num_inference_steps={num}: trailing timesteps of {name}Scheduler go from 999 to -1",
        ):
            schedulers.set_timesteps(make_scheduler(name, ZERO_SNR), num, device=torch.device("cpu"))


def test_as_many_steps_as_timesteps_are_not_all_the_same():
    scheduler = make_scheduler("DPMSolverMultistep", EPSILON)
    with pytest.raises(
        ValueError, match="leading timesteps of DPMSolverMultistepScheduler repeat by rounding"
    ):
        schedulers.set_timesteps(scheduler, 1000, device=torch.device("cpu"))


def test_sigmas_of_a_call_are_no_limit_of_the_next():
    scheduler = make_scheduler("EulerDiscrete", EPSILON)
    for sigmas in ([5.0, 1.0], [14.0, 5.0, 1.0]):  # the last one is where the last step leads
        timesteps = schedulers.set_timesteps(scheduler, 2, device=torch.device("cpu"), sigmas=sigmas)
        assert len(timesteps) == len(sigmas) - 1
