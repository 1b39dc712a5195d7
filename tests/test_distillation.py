"""Distillation: its steps are those of diffusers' DDIM, a model at rest has no loss, and the student is a plain folder of few steps."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import alike, stage_of, tiny_config

from latent_shift.diffusion import ddim_step, midpoint_step, noise_schedule, training_target
from latent_shift.evaluation import systems
from latent_shift.files import sha256
from latent_shift.pipelines import catalog, descriptions, lora
from latent_shift.pipelines.loading import load
from latent_shift.pipelines.lora import load_lora, merged
from latent_shift.pipelines.provenance import hash_inputs
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


def test_student_of_whole_phases_samples_in_their_divisors(latents, video_model, tmp_path):
    config = distill_config(latents, video_model, distill={**DISTILL, "target": "trajectory"})
    pipe = load(train(config, tmp_path), device="cpu", dtype=torch.float32)
    defaults = pipe.call_defaults
    assert (defaults["num_inference_steps"], defaults["guidance_scale"], defaults["distilled_steps"]) == (
        2,
        1,
        2,
    )
    for number in (1, 2):
        assert np.isfinite(pipe("a red square", num_inference_steps=number, generator=seed(0)).frames).all()
    with pytest.raises(ValueError, match="one of 1, 2, got 4"):
        pipe("a red square", num_inference_steps=4)


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


@pytest.mark.parametrize("next_timestep", [749, 499, -1])
@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_steps_are_exact_where_clean_samples_stay_the_same(prediction, zero_snr, next_timestep):
    schedule = noise_schedule(prediction=prediction, zero_terminal_snr=zero_snr)
    clean, noise = torch.randn(2, 2, 4, 5, 6, generator=seed(0)).unbind(0)
    timesteps, following = torch.tensor([999, 998]), torch.full((2,), next_timestep)

    def at(timesteps):
        return clean if (timesteps < 0).all() else schedule.add_noise(clean, noise, timesteps)

    def predict(noisy, timesteps):
        torch.testing.assert_close(noisy, at(timesteps), rtol=1e-4, atol=1e-4)
        return training_target(schedule, clean, noise, timesteps)

    two = midpoint_step(schedule, at(timesteps), predict, timesteps, following)
    one = ddim_step(schedule, at(timesteps), predict(at(timesteps), timesteps), timesteps, following)
    for result in (one, two):
        torch.testing.assert_close(result, at(following), rtol=1e-4, atol=2e-4)


def test_midpoint_steps_are_of_second_order():
    """For Gaussian samples, whose exact trajectory is known: they stay in proportion to the standard deviation at their noise level."""
    schedule = noise_schedule(prediction="v_prediction", zero_terminal_snr=True)
    angles = torch.cat([schedule.alphas_cumprod, torch.ones(1)]).double().sqrt().acos()
    std = 0.5
    deviations = ((angles.cos() * std) ** 2 + angles.sin() ** 2).sqrt()

    def predict(noisy, timesteps):  # the mean of v, given the noisy sample
        angle = angles[timesteps]
        return (angle.cos() * angle.sin() * (1 - std**2) / deviations[timesteps] ** 2 * noisy).float()

    def error(num_steps, step):
        noisy, now, length = torch.ones(1), torch.tensor([499]), 500 // num_steps
        for _ in range(num_steps):
            noisy, now = step(noisy, now, now - length), now - length
        return abs(float(noisy - deviations[-1] / deviations[499]))

    def midpoint(noisy, now, following):
        return midpoint_step(schedule, noisy, predict, now, following)

    def ddim(noisy, now, following):
        return ddim_step(schedule, noisy, predict(noisy, now), now, following)

    for number in (1, 2, 5):
        assert error(2 * number, midpoint) < 0.3 * error(number, midpoint)
        assert error(number, midpoint) < 0.3 * error(2 * number, ddim)  # with as many predictions


def test_steps_follow_the_device_of_the_schedule():
    schedule = noise_schedule(prediction="v_prediction")
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(
        "meta"
    )  # add_noise moves it to the device of the latents
    sample, timesteps = torch.empty(2, 4, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    assert ddim_step(schedule, sample, sample, timesteps, timesteps).device.type == "meta"


def test_a_teacher_shifts_the_channels_of_its_student(latents, image_model):
    settings = {"init": str(image_model), "channels": "cheapest"}
    stage = stage_of(distill_config(latents, image_model, model=settings, data={"num_frames": 4}))
    assert shift_of(stage.objective.teacher) == shift_of(stage.model)
    assert shift_of(stage.model).rule is not None


@pytest.mark.parametrize(
    ("target", "expected"),
    [("consistency", {124, 249, 374, 499, 624, 749, 874, 999}), ("trajectory", {499, 999})],
)
def test_batches_are_on_the_grid_of_the_teacher(latents, video_model, target, expected):
    settings = {"data": {"batch_size": 64}, "distill": {**DISTILL, "target": target}}
    stage = stage_of(distill_config(latents, video_model, **settings))
    *_, timesteps, text = stage.draw_batch(np.random.default_rng(0))
    assert set(timesteps.tolist()) == expected
    null = torch.from_numpy(stage.store.embed([""]))
    assert not (text == null).all(dim=(1, 2)).any()


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


def test_target_is_where_the_teacher_goes_in_a_phase(batch):
    """With target "trajectory", the student's step from the start of a phase is compared with the teacher's guided midpoint steps."""
    stage, (latents, noise, _, text) = batch
    changes = {"target": "trajectory", "solver_steps": 4}
    stage.objective.options = stage.objective.options.model_copy(update=changes)
    timesteps = torch.full((len(latents),), 999)
    _, terms = stage.objective.eval()(latents, noise, timesteps, text)
    num_frames = latents.shape[1]
    noisy = stage.schedule.add_noise(latents, noise, timesteps).flatten(0, 1)
    now = timesteps.repeat_interleave(num_frames)

    @torch.no_grad()
    def teach(x, timesteps, scale=2):
        with frames(stage.model, num_frames):
            conditional = stage.model(x, timesteps, text).sample
            unconditional = stage.model(x, timesteps, stage.objective.empty_text.expand_as(text)).sample
        return unconditional + scale * (conditional - unconditional)

    expected = midpoint_step(stage.schedule, noisy, teach, now, now - 250)
    expected = midpoint_step(stage.schedule, expected, teach, now - 250, now - 500)
    student = ddim_step(stage.schedule, noisy, teach(noisy, now, scale=1), now, now - 500)
    assert float(terms["mse"]) == pytest.approx(float((student - expected).square().mean()), rel=1e-3)


@pytest.mark.parametrize("target", ["consistency", "trajectory"])
def test_a_consistent_model_has_no_loss(batch, target):
    """Where predictions lead from everywhere to the same clip, nothing is left to learn."""
    stage, (latents, noise, timesteps, text) = batch
    objective = stage.objective
    objective.options = objective.options.model_copy(update={"target": target})
    if target == "trajectory":  # from the start of each phase
        timesteps = timesteps // 500 * 500 + 499
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


@pytest.mark.parametrize(("target", "solver_steps"), [("consistency", 8), ("trajectory", 2)])
def test_student_learns(latents, video_model, target, solver_steps):
    """On one batch, again and again, the loss falls well below that of the teacher's weights."""
    options = {**DISTILL, "target": target, "solver_steps": solver_steps}
    stage = stage_of(distill_config(latents, video_model, data={"batch_size": 2}, distill=options))
    batch = stage.draw_batch(np.random.default_rng(0))
    optimizer = torch.optim.Adam(stage.model.parameters(), 1e-3)
    losses = []
    for _ in range(16):
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


@pytest.fixture(scope="module")
def fast_lora(latents, video_model, tmp_path_factory):
    pytest.importorskip("peft")
    run = tmp_path_factory.mktemp("lora")
    return (
        train(distill_config(latents, video_model, lora={"rank": 2}), run)
        / "pytorch_lora_weights.safetensors"
    )


def test_lora_makes_a_model_fast(fast_lora, video_model):
    pipe = load(video_model, device="cpu", dtype=torch.float32)
    load_lora(pipe, fast_lora)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.call_defaults["num_inference_steps"] == 2
    assert pipe("a red square", generator=seed(0)).frames.shape == (1, 4, 32, 32, 3)
    with pytest.raises(ValueError, match="is distilled already; load it into its teacher"):
        load_lora(pipe, fast_lora)
    before = load(video_model, device="cpu")
    pipe.unload_lora_weights()
    assert pipe.call_defaults == before.call_defaults
    assert pipe.scheduler.config == before.scheduler.config
    load_lora(pipe, fast_lora)
    assert pipe.call_defaults["num_inference_steps"] == 2


def test_a_fused_lora_keeps_its_sampling(fast_lora, video_model):
    pipe = load(video_model, device="cpu", dtype=torch.float32)
    load_lora(pipe, fast_lora)
    expected = pipe("a red square", generator=seed(0)).frames
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.call_defaults["distilled_steps"] and isinstance(pipe.scheduler, DDIMScheduler)
    np.testing.assert_allclose(pipe("a red square", generator=seed(0)).frames, expected, atol=1e-4)


def test_nothing_of_a_lora_stays_after_it_is_unloaded_or_cannot_be_loaded(
    fast_lora, image_model, monkeypatch
):
    pipe = load(image_model, device="cpu", dtype=torch.float32)

    def state():
        return (
            pipe.scheduler,
            dict(pipe.call_defaults),
            dict(pipe.config.latent_shift),
            shift_of(pipe.unet),
            pipe.unet.config.sample_size,
        )

    before = state()
    load_lora(pipe, fast_lora)
    assert state() != before
    pipe.unload_lora_weights()
    assert state() == before

    add = lora._add_tensors

    def fail(*arguments):
        add(*arguments)
        raise ValueError("the text encoder's part is broken")

    monkeypatch.setattr(lora, "_add_tensors", fail)
    with pytest.raises(ValueError, match="part is broken"):
        load_lora(pipe, fast_lora)
    assert state() == before and not lora.has_lora(pipe.unet)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "window", "first"),
        ("data", "image_share", 0.5),
        ("model", "channels", "cheapest"),
        ("diffusion", "shared_noise", 0.5),
    ],
)
def test_settings_of_clips_have_no_effect_on_a_distilled_image_model(
    latents, image_model, section, name, value
):
    sections = {"model": {"init": str(image_model)}, "data": {"num_frames": 1}}
    sections[section] = {**sections.get(section, {}), name: value}
    with pytest.raises(ValueError, match=f"{section}.{name} has no effect in stage distill of single frames"):
        distill_config(latents, image_model, **sections)


def test_distilled_model_keeps_its_steps_with_another_lora(student, latents, video_model, tmp_path):
    pytest.importorskip("peft")
    folder = train(
        tiny_config("video", latents, model={"init": str(video_model)}, lora={"rank": 2}), tmp_path
    )
    pipe = load(student, device="cpu", dtype=torch.float32)
    before = dict(pipe.call_defaults)
    load_lora(pipe, folder / "pytorch_lora_weights.safetensors")
    assert pipe.call_defaults == before
    assert pipe("a red square", generator=seed(0)).frames.shape == (1, 4, 32, 32, 3)


@pytest.fixture
def packaged(fast_lora, video_model, tmp_path, monkeypatch):
    """The folder of `emoji` as if the tiny model and its student were part of the package."""
    monkeypatch.setattr(catalog, "WEIGHTS", tmp_path)
    shutil.copytree(video_model, tmp_path / "emoji")
    shutil.copy(fast_lora, tmp_path / "emoji" / catalog.STUDENT)
    return tmp_path / "emoji"


def test_packaged_student_and_its_teacher(packaged, fast_lora, video_model):
    student, teacher = load("emoji", device="cpu"), load("emoji@20", device="cpu")
    with_lora = load(video_model, device="cpu", dtype=torch.float32)
    load_lora(with_lora, fast_lora)
    assert student.call_defaults == with_lora.call_defaults
    clips = [pipe("a red square", generator=seed(0)).frames for pipe in (student, with_lora)]
    np.testing.assert_allclose(*clips, atol=1e-4)
    merged_weights = merged(with_lora.unet).state_dict()
    for name, weight in student.unet.state_dict().items():
        torch.testing.assert_close(weight, merged_weights[name], rtol=1e-5, atol=1e-6)
    assert not alike(student.unet.state_dict(), teacher.unet.state_dict())
    assert alike(teacher.unet.state_dict(), load(video_model, device="cpu").unet.state_dict())
    assert descriptions.sampling_defaults("emoji")["num_inference_steps"] == 2
    assert descriptions.sampling_defaults("emoji@20") == descriptions.sampling_defaults(video_model)
    assert catalog.examples("emoji@20") == catalog.examples("emoji") != ()
    hashes = hash_inputs("emoji@20")
    assert hash_inputs("emoji") == hashes | {catalog.STUDENT: sha256(packaged / catalog.STUDENT)}
    assert descriptions.describe("emoji")["distilled"].endswith("steps, guidance built in; from emoji@20")
    assert "distilled" not in descriptions.describe("emoji@20")
    weights = [
        systems.open_system(name, device="cpu").settings["weights"]
        for name in ("emoji", "emoji@20", str(video_model))
    ]
    assert weights[1] == weights[2] != weights[0]
    half = load("emoji", device="cpu", dtype=torch.float16)
    assert half.unet.dtype == torch.float16


def test_training_starts_from_the_teacher(packaged, latents, tmp_path):
    config = tiny_config("video", latents, model={"init": "emoji"})
    with pytest.raises(ValueError, match="emoji is distilled: expected emoji@20"):
        train(config, tmp_path / "run")
    train(tiny_config("video", latents, model={"init": "emoji@20"}), tmp_path / "run")


@pytest.mark.parametrize("change", ["shift", "missing", "settings", "other", "wide", "rank"])
def test_student_of_another_model_is_refused(packaged, change):
    path = packaged / catalog.STUDENT
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    settings = json.loads(header["latent_shift"])
    if change == "shift":
        settings["edge"] = "wrap"
    elif change == "settings":
        settings["distilled_steps"] = 0
    elif change == "missing":
        tensors.popitem()
    elif change in ("wide", "rank"):
        name = next(name for name in tensors if ".lora_A." in name)
        tensors[name] = torch.cat([tensors[name]] * 2, dim=1 if change == "wide" else 0)
    else:
        tensors = {name.replace("unet.", "unet.gone."): tensor for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={**header, "latent_shift": json.dumps(settings)})
    with pytest.raises(ValueError, match=r"expected a LoRA of stage distill|is not of a layer of this model"):
        load("emoji", device="cpu")


@pytest.mark.parametrize("stage", ["video", "distill"])
def test_a_distilled_model_is_not_trained_further(latents, student, tmp_path, stage):
    """It would forget its few steps, or be a teacher without guidance."""
    with pytest.raises(ValueError, match="is distilled: expected the model that it was distilled from"):
        train(tiny_config(stage, latents, model={"init": str(student)}), tmp_path)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"size": "tiny"}}, "needs model.init"),
        ({"diffusion": {"prediction": "flow_prediction"}}, "not a flow"),
        ({"distill": {"phases": 3, "solver_steps": 8}}, "expected a multiple of distill.phases=3"),
        ({"distill": {"phases": 2, "solver_steps": 12}}, "divides diffusion.num_timesteps=1000"),
        ({"train": {"sample_guidance": 3.0}}, "train.sample_guidance has no effect in stage distill"),
        (
            {"distill": {"target": "trajectory", "solver_steps": 1000}},
            "at most half of diffusion.num_timesteps=1000",
        ),
        (
            {"distill": {"target": "trajectory", "phases": 1}, "diffusion": {"timestep_shift": 3.0}},
            "diffusion.timestep_shift has no effect where all steps start from pure noise",
        ),
    ],
)
def test_settings_that_contradict_each_other(latents, video_model, sections, words):
    with pytest.raises(ValueError, match=words):
        distill_config(latents, video_model, **sections)
