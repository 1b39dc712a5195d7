"""Distillation: its steps are those of diffusers' DDIM, a model at rest has no loss, and the student is a plain folder of few steps."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import alike, stage_of, tiny_config

from latent_shift.diffusion import ddim_step, noise_schedule
from latent_shift.pipelines.loading import load
from latent_shift.pipelines.lora import load_lora
from latent_shift.pipelines.schedulers import distilled_scheduler, make_scheduler
from latent_shift.runtime import seed
from latent_shift.shift import frames, shift_of
from latent_shift.training.loop import train

DISTILL = {"phases": 2, "solver_steps": 8, "guidance_scale": 2.0}


def distill_config(latents, video_model, **sections):
    return tiny_config(
        "distill", latents, **{"model": {"init": str(video_model)}, "distill": DISTILL, **sections}
    )


@pytest.fixture(scope="module")
def student(latents, video_model, tmp_path_factory):
    config = distill_config(latents, video_model, train={"sample_every": 2})
    return train(config, tmp_path_factory.mktemp("distill"))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_step_is_that_of_diffusers(prediction, zero_snr):
    if zero_snr and prediction == "epsilon":
        pytest.skip("pure noise says nothing about the clip")
    schedule = noise_schedule(prediction=prediction, zero_terminal_snr=zero_snr)
    scheduler = distilled_scheduler(schedule)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    sample, output = torch.randn(2, 3, 4, 5, 6, generator=seed(0)).unbind(0)
    for timestep in scheduler.timesteps:
        timesteps = timestep.repeat(3)
        expected = scheduler.step(output, timestep, sample, return_dict=False)[0]
        got = ddim_step(schedule, sample, output, timesteps, timesteps - 250)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match="expected a schedule that predicts epsilon or v, got 'flow_prediction'"
    ):
        ddim_step(noise_schedule(prediction="flow_prediction"), sample, output, timesteps, timesteps - 250)


def test_a_teacher_shifts_the_channels_of_its_student(latents, image_model):
    settings = {"init": str(image_model), "channels": "cheapest"}
    stage = stage_of(distill_config(latents, image_model, model=settings, data={"num_frames": 4}))
    assert shift_of(stage.objective.teacher) == shift_of(stage.model)
    assert shift_of(stage.model).rule is not None


def test_batches_are_on_the_grid_of_the_teacher(latents, video_model):
    stage = stage_of(distill_config(latents, video_model, data={"batch_size": 64}))
    *_, timesteps, text = stage.draw_batch(np.random.default_rng(0))
    assert set(timesteps.tolist()) == {124, 249, 374, 499, 624, 749, 874, 999}
    assert text.abs().amax(dim=(1, 2)).min() > 0


@pytest.fixture
def batch(latents, video_model):
    stage = stage_of(
        distill_config(latents, video_model, diffusion={"prediction": "epsilon"}, data={"batch_size": 16})
    )
    return stage, stage.draw_batch(np.random.default_rng(0))


def test_target_is_one_step_of_the_teacher(batch):
    """At the first timestep above the end of a phase, the target is the teacher's guided DDIM step itself."""
    stage, (latents, noise, _, text) = batch
    timesteps = torch.full((len(latents),), 124)
    _, terms = stage.objective.eval()(latents, noise, timesteps, text)
    guided = DDIMScheduler.from_config(distilled_scheduler(stage.schedule).config)
    guided.set_timesteps(8)
    num_frames = latents.shape[1]
    noisy = stage.schedule.add_noise(latents, noise, timesteps).flatten(0, 1)
    with torch.no_grad(), frames(stage.model, num_frames):
        conditional = stage.model(noisy, 124, text).sample
        unconditional = stage.model(noisy, 124, stage.objective.empty_text.expand_as(text)).sample
    step = [
        guided.step(prediction, 124, noisy, return_dict=False)[0]
        for prediction in (conditional, 2 * conditional - unconditional)
    ]
    assert float(terms["mse"]) == pytest.approx(float((step[0] - step[1]).square().mean()), rel=1e-4)


def test_a_consistent_model_has_no_loss(batch):
    """Where predictions lead from everywhere to the same clip, nothing is left to learn."""
    stage, (latents, noise, timesteps, text) = batch
    objective = stage.objective
    objective.schedule = noise_schedule(prediction="v_prediction")
    clean = latents.flatten(0, 1)

    def predict_exactly(network, arguments, output):
        noisy, timesteps, _ = arguments
        signal = objective.schedule.alphas_cumprod[timesteps][:, None, None, None]
        known = clean.repeat(len(noisy) // len(clean), 1, 1, 1)
        output.sample = (signal.sqrt() * noisy - known) / (1 - signal).sqrt()
        return output

    for network in (objective.unet, objective.teacher):
        network.register_forward_hook(predict_exactly)
    loss, terms = objective(latents, noise, timesteps, text)
    assert float(terms["mse"]) < 1e-9
    assert float(loss) < 1e-6


def test_student_learns(latents, video_model, tmp_path):
    """On one batch, again and again, the loss falls well below that of the teacher's weights."""
    stage = stage_of(distill_config(latents, video_model, data={"batch_size": 4}))
    batch = stage.draw_batch(np.random.default_rng(0))
    optimizer = torch.optim.Adam(stage.model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss, _ = stage.objective(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert min(losses[-5:]) < 0.7 * losses[0]


def test_student_is_a_plain_folder(student, video_model):
    """diffusers' own pipeline samples it with the settings in the folder, bit for bit as ours does one frame."""
    pipe = load(student, device="cpu", dtype=torch.float32)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert {name: tuple(value.shape) for name, value in pipe.unet.state_dict().items()} == {
        name: tuple(value.shape) for name, value in load(video_model, device="cpu").unet.state_dict().items()
    }
    defaults = pipe.call_defaults
    assert (defaults["num_inference_steps"], defaults["guidance_scale"], defaults["distilled_steps"]) == (
        2,
        1,
        8,
    )
    ours = pipe("a red square", num_frames=1, generator=seed(0), output_type="np").frames[0, 0]
    plain = StableDiffusionPipeline.from_pretrained(student, torch_dtype=torch.float32)
    image = plain(
        "a red square", num_inference_steps=2, guidance_scale=1.0, generator=seed(0), output_type="np"
    ).images[0]
    np.testing.assert_array_equal(ours, image)


def test_loops_and_chunks_of_a_student(student):
    pipe = load(student, device="cpu", dtype=torch.float32)
    noise = torch.randn(1, 4, 6, 4, 4, generator=seed(0))
    call = dict(prompt="a red square", num_frames=6, output_type="latent")
    loop = pipe(**call, loop=True, latents=noise).frames
    torch.testing.assert_close(
        pipe(**call, loop=True, latents=noise.roll(2, dims=2)).frames, loop.roll(2, dims=2)
    )
    whole = pipe(**call, latents=noise).frames
    torch.testing.assert_close(pipe(**call, latents=noise, chunk=2).frames, whole)


def test_other_settings_are_refused(student):
    pipe = load(student, device="cpu")
    with pytest.raises(ValueError, match="one of 1, 2, 4, 8, got 3"):
        pipe("a", num_inference_steps=3)
    with pytest.raises(ValueError, match="guidance is part of this distilled model"):
        pipe("a", guidance_scale=2.0)
    pipe.enable_free_init(use_fast_sampling=True)
    with pytest.raises(ValueError, match="FreeInit"):
        pipe("a")
    pipe.disable_free_init()
    pipe.scheduler = make_scheduler("DPMSolverMultistep", pipe.scheduler)
    with pytest.raises(ValueError, match="distilled for DDIM with trailing timesteps"):
        pipe("a")


def test_resumed_run_is_the_same(latents, video_model, tmp_path):
    whole = train(distill_config(latents, video_model), tmp_path / "whole")
    train(distill_config(latents, video_model, steps=2), tmp_path / "parts")
    again = train(distill_config(latents, video_model), tmp_path / "parts")
    assert alike(load(whole, device="cpu").unet.state_dict(), load(again, device="cpu").unet.state_dict())


def test_lora_makes_a_model_fast(latents, video_model, tmp_path):
    pytest.importorskip("peft")
    folder = train(distill_config(latents, video_model, lora={"rank": 2}), tmp_path / "run")
    pipe = load(video_model, device="cpu", dtype=torch.float32)
    load_lora(pipe, folder / "pytorch_lora_weights.safetensors")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.call_defaults["num_inference_steps"] == 2
    assert pipe("a red square", generator=seed(0)).frames.shape == (1, 4, 32, 32, 3)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"size": "tiny"}}, "needs model.init"),
        ({"diffusion": {"prediction": "flow_prediction"}}, "not a flow"),
        ({"distill": {"phases": 3, "solver_steps": 8}}, "expected a multiple of distill.phases=3"),
        ({"distill": {"phases": 2, "solver_steps": 12}}, "divides diffusion.num_timesteps=1000"),
        ({"train": {"sample_guidance": 3.0}}, "train.sample_guidance has no effect in stage distill"),
    ],
)
def test_settings_that_contradict_each_other(latents, video_model, sections, words):
    with pytest.raises(ValueError, match=words):
        distill_config(latents, video_model, **sections)
