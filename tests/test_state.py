"""State: what calls, streams and threads that share a network or a pipeline must not see of each other."""

import copy
import threading
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
)
from test_modes import CLIP, sd, xl_components
from transformers import BertConfig, BertModel

from latent_shift.models import sizes
from latent_shift.pipelines.denoise import guided
from latent_shift.pipelines.diagnosis import NotFiniteError, check_finite
from latent_shift.pipelines.stable_diffusion import LatentShiftXLPipeline
from latent_shift.runtime import seed
from latent_shift.shift import Shift, deflate, frames, inflate, reach, shift_of, streaming, temporal_shift

TEXT = torch.randn(8, 5, 32, generator=seed(2))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return inflate(sizes.unet("tiny", sample_size=4).eval())


def call(unet, num_frames: int | None) -> torch.Tensor:
    x = torch.randn(8, 4, 4, 4, generator=seed(1))
    with torch.no_grad():
        if num_frames is None:
            return unet(x, 500, TEXT).sample
        with frames(unet, num_frames):
            return unet(x, 500, TEXT).sample


def test_frames_is_local_to_a_thread(unet):
    """Clips of 4 and of 8 frames and images, in three threads on one network at once."""
    settings = (4, 8, None)
    expected, results, start = [call(unet, num) for num in settings], [[], [], []], threading.Barrier(3)

    def work(position: int) -> None:
        start.wait()
        results[position] = [call(unet, settings[position]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(position,)) for position in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, value in zip(results, expected, strict=True):
        assert len(result) == 10
        for output in result:
            torch.testing.assert_close(output, value)
    torch.testing.assert_close(call(unet, None), expected[2])  # and the network is the image network again


def test_frames_in_one_thread_does_not_change_another(unet):
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with frames(unet, 4):
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    expected = call(unet, None)
    thread.start()
    try:
        assert inside.wait(30)
        torch.testing.assert_close(call(unet, None), expected)
    finally:
        done.set()
        thread.join()


def test_deepcopy_inside_frames_is_the_image_network(unet):
    with frames(unet, 4):
        twin = copy.deepcopy(unet)
    assert shift_of(twin) == shift_of(unet)
    torch.testing.assert_close(call(twin, None), call(unet, None))
    torch.testing.assert_close(call(twin, 4), call(unet, 4))


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(Shift(0, 0), (0, 0)), (Shift(1 / 3, 0), (8, 0)), (Shift(0, 1 / 3), (0, 8)), (Shift(), (8, 8))],
)
def test_reach_counts_layers_that_move_channels(shift, expected):
    unet = inflate(sizes.unet("tiny", sample_size=4), shift)
    assert reach(unet) == expected
    assert reach(deflate(unet)) == (0, 0)


@pytest.mark.parametrize("edge", ["zero", "hold", "wrap"])
def test_temporal_shift_is_differentiable_in_every_mode(edge):
    """Forward mode, functorch, and both through a network in training, against finite differences and the shift itself."""
    x, tangent = torch.randn(8, 6, 2, 2, dtype=torch.float64), torch.randn(8, 6, 2, 2, dtype=torch.float64)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return temporal_shift(x, 4, Shift(edge=edge))

    for point in (x, x.clone().requires_grad_()):
        value, derivative = torch.func.jvp(shifted, (point,), (tangent,))
        assert torch.equal(value, shifted(x)) and torch.equal(derivative, shifted(tangent))
    stack = torch.randn(3, 8, 6, 2, 2, dtype=torch.float64)
    expected = torch.stack([shifted(clip) for clip in stack])
    assert torch.equal(torch.func.vmap(shifted)(stack), expected)
    assert torch.equal(torch.func.vmap(shifted, in_dims=1)(stack.transpose(0, 1).contiguous()), expected)
    assert torch.equal(torch.func.vmap(shifted)(stack.clone().requires_grad_()), expected)
    gradient = torch.func.grad(lambda x: shifted(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    shifted(leaf).square().sum().backward()
    assert torch.equal(gradient, leaf.grad)
    per_clip = torch.func.vmap(torch.func.grad(lambda x: shifted(x).square().sum()))(stack)
    torch.testing.assert_close(per_clip[0], torch.func.grad(lambda x: shifted(x).square().sum())(stack[0]))
    assert torch.autograd.gradcheck(shifted, leaf, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(shifted, leaf)


def test_jvp_works_through_a_network_in_training():
    torch.manual_seed(0)
    unet = inflate(sizes.unet("tiny", sample_size=4)).double().train()
    latents, tangent = (torch.randn(4, 4, 4, 4, dtype=torch.float64) for _ in range(2))

    def predict(latents: torch.Tensor) -> torch.Tensor:
        with frames(unet, 4):
            return unet(latents, torch.tensor(5), TEXT[:4].double(), return_dict=False)[0]

    with torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    ):  # PyTorch's fused attention has no forward mode
        _, derivative = torch.func.jvp(predict, (latents,), (tangent,))
        step = 1e-6
        difference = (predict(latents + step * tangent) - predict(latents - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("edge", ["zero", "hold", "wrap"])
def test_chunk_equals_the_whole_clip_for_every_edge(texts, edge):
    pipe = sd(texts, edge=edge)
    arguments = dict(num_frames=sum(reach(pipe.unet)) + 12, num_inference_steps=2, output_type="latent")
    whole = pipe("red", generator=seed(0), **arguments).frames
    chunked = pipe("red", generator=seed(0), chunk=4, **arguments).frames
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)


def stream(pipe, prompt="red", number=0, **arguments):
    return pipe.stream(prompt, num_frames=3, generator=seed(number), **arguments)


def test_stream_keeps_its_settings_beside_other_calls(texts):
    pipe = sd(texts, backward=0.0)
    expected = list(stream(pipe, guidance_scale=7.5))
    others = list(stream(pipe, "blue", 1, guidance_scale=2.0))
    both = list(
        zip(stream(pipe, guidance_scale=7.5), stream(pipe, "blue", 1, guidance_scale=2.0), strict=True)
    )
    for (first, second), one, two in zip(both, expected, others, strict=True):
        assert np.array_equal(first, one) and np.array_equal(second, two)
    for scale, other in ((7.5, 1.0), (1.0, 7.5)):
        expected = list(stream(pipe, guidance_scale=scale))
        running = stream(pipe, guidance_scale=scale)
        results = [next(running)]
        pipe("blue", guidance_scale=other, num_frames=2)
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        results += running
        assert all(map(np.array_equal, results, expected))
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (PNDMScheduler, {"skip_prk_steps": True}), (PNDMScheduler, {"skip_prk_steps": False}), (HeunDiscreteScheduler, {}),
        (UniPCMultistepScheduler, {}),
    ],
)  # fmt: skip
def test_stream_with_a_multistep_scheduler_equals_the_whole_clip(texts, scheduler, options):
    pipe = sd(texts, backward=0.0)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    whole = pipe("red", num_frames=3, num_inference_steps=5, generator=seed(0)).frames[0]
    torch.testing.assert_close(
        np.stack(list(stream(pipe, num_inference_steps=5))), whole, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, LCMScheduler])
def test_stream_draws_all_noise_from_its_generator(texts, scheduler):
    pipe = sd(texts, backward=0.0)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    first, second, other = list(stream(pipe)), list(stream(pipe)), list(stream(pipe, number=1))
    assert all(map(np.array_equal, first, second))
    assert not np.array_equal(first[0], other[0])


def test_callback_gets_none_for_absent_tensors(texts):
    values = []

    def watch(pipe, index, timestep, tensors):
        values.append(tensors)
        return tensors

    names = ["latents", "negative_prompt_embeds"]
    sd(texts)("red", guidance_scale=1.0, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert [set(value) for value in values] == [set(names)] * 3
    assert all(value["negative_prompt_embeds"] is None for value in values)


def test_guided_rescales_over_whole_clips(texts):
    """Frames of one clip keep their ratios (Lin et al. 2024, equations 15 and 16, with the deviation of a clip)."""
    conditional = torch.randn(2, 4, 3, 4, 4) * torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1, 1)
    unconditional = torch.randn(2, 4, 3, 4, 4)
    predict = guided(
        lambda *_: conditional,
        lambda *_: torch.cat([unconditional, conditional]),
        ClassifierFreeGuidance(3.0, guidance_rescale=0.7),
        5,
    )
    plain = unconditional + 3.0 * (conditional - unconditional)
    ratio = conditional.flatten(1).std(dim=1) / plain.flatten(1).std(dim=1)
    expected = 0.7 * plain * ratio.view(2, 1, 1, 1, 1) + 0.3 * plain
    torch.testing.assert_close(predict(conditional, torch.tensor(1), torch.arange(3)), expected)


def test_guider_replaces_classifier_free_guidance(texts):
    pipe = sd(texts, num_inference_steps=6)
    arguments = dict(generator=seed(0), output_type="latent")
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(3))
    clip = lambda **options: pipe("red", latents=latents, output_type="latent", **options).frames  # noqa: E731
    assert torch.equal(clip(guidance_scale=4.0), clip(guider=ClassifierFreeGuidance(4.0)))
    assert torch.equal(
        clip(guidance_scale=1.0), clip(guider=ClassifierFreeGuidance(4.0, start=0.5, stop=0.5))
    )
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]) // 6))
    interval = clip(guider=ClassifierFreeGuidance(4.0, start=0.34, stop=0.67))
    hook.remove()
    assert batches == [1, 1, 2, 2, 1, 1]  # outside the interval the unconditional half is not computed
    assert not torch.allclose(interval, clip(guidance_scale=4.0)) and not torch.allclose(
        interval, clip(guidance_scale=1.0)
    )
    assert not torch.allclose(clip(guider=AdaptiveProjectedGuidance(4.0, eta=0.0)), clip(guidance_scale=4.0))
    with pytest.raises(ValueError, match="a guider, or guidance_scale"):
        pipe("red", guider=ClassifierFreeGuidance(4.0), guidance_scale=3.0, **arguments)
    with pytest.raises(ValueError, match="PerturbedAttentionGuidance needs other predictions"):
        pipe("red", guider=PerturbedAttentionGuidance(4.0, perturbed_guidance_layers=[0]), **arguments)


def test_free_init_uses_the_timesteps_that_are_given(texts):
    pipe = sd(texts)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.enable_free_init(num_iters=2)
    steps = []
    pipe(
        "red",
        timesteps=[900, 500],
        callback_on_step_end=lambda p, i, timestep, k: steps.append(int(timestep)) or {},
    )
    assert steps == [900, 500] * 2


@pytest.mark.parametrize("method", ["butterworth", "gaussian", "ideal"])
def test_free_init_works_with_sigma_schedulers(texts, method):
    pipe = sd(texts)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", steps_offset=1
    )
    once = pipe("red", generator=seed(0), output_type="latent").frames
    pipe.enable_free_init(num_iters=2, method=method)
    twice = pipe("red", generator=seed(0), output_type="latent").frames
    assert twice.isfinite().all() and not torch.allclose(once, twice)
    assert 0.3 < float(twice.std() / once.std()) < 3


def test_image_and_video_work_with_a_tiny_autoencoder(texts):
    pipe = sd(texts)
    torch.manual_seed(0)
    widths, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    ).eval()
    for pictures in ({"image": CLIP[0]}, {"video": CLIP}):
        assert pipe("red", **pictures).frames.shape == (1, 6, 32, 32, 3)


def test_clip_skip_takes_an_earlier_layer(texts):
    """Against the hidden states of the encoder itself."""
    pipe = sd(texts)
    tokens = pipe.tokenizer("red", padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states
    expected = pipe.text_encoder.final_layer_norm(states[-2])
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(0))
    skipped = pipe("red", guidance_scale=1.0, clip_skip=1, latents=latents, output_type="latent").frames
    torch.testing.assert_close(
        skipped,
        pipe(prompt_embeds=expected, guidance_scale=1.0, latents=latents, output_type="latent").frames,
    )


def test_clip_skip_is_refused_by_a_text_encoder_of_another_kind(texts):
    """The emoji model has a BERT, whose layers have no common norm."""
    pipe = sd(texts)
    pipe.text_encoder = BertModel(
        BertConfig(
            vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
    )
    with pytest.raises(
        ValueError, match="clip_skip needs a text encoder of CLIP, got BertModel; leave it out"
    ):
        pipe("red", clip_skip=1)


def test_not_finite_clips_are_blamed_on_noise_levels_without_signal(texts):
    pipe = sd(texts)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, trained_betas=[0.1] * 1000)
    values = torch.tensor([float("nan")])
    with pytest.raises(NotFiniteError, match=r"noise levels \(trained_betas, beta_end\) leave no signal"):
        check_finite(pipe, values, "the latents")
    for betas in (0.1, [0.1]):
        pipe.scheduler = DDIMScheduler(trained_betas=betas, clip_sample=False)
        with pytest.raises(ValueError, match="needs trained_betas for each of its 1000 timesteps, got"):
            pipe("red")
    zero_snr = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    for options in ({}, zero_snr):
        pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", **options)
        with pytest.raises(
            NotFiniteError, match="guidance scale or the weight of words is probably too large"
        ):
            check_finite(pipe, values, "the latents")


def test_save_pretrained_writes_a_folder_for_generic_loaders(texts, tmp_path):
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    from latent_shift.pipelines.loading import load

    pipe = sd(texts, edge="hold")
    pipe.save_pretrained(tmp_path)
    for loader in (StableDiffusionPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        assert type(loader.from_pretrained(tmp_path)) is StableDiffusionPipeline
    again = load(tmp_path, device="cpu")
    assert shift_of(again.unet).edge == "hold" and again.call_defaults == pipe.call_defaults


def test_xl_pipeline_has_its_own_defaults(texts):
    pipe = LatentShiftXLPipeline(**xl_components(texts))
    assert pipe.call_defaults["guidance_scale"] == 5.0
    pipe = LatentShiftXLPipeline(**xl_components(texts), latent_shift={"guidance_scale": 7.0})
    assert pipe.call_defaults["guidance_scale"] == 7.0
    assert pipe.config.latent_shift["guidance_scale"] == 7.0


def test_set_model_defaults_is_saved_even_for_usual_values(texts, tmp_path):
    pipe = sd(texts)
    image = type(pipe)(**pipe.components)
    image.save_pretrained(tmp_path / "image")
    assert "num_frames" not in type(pipe).load_config(tmp_path / "image")["latent_shift"]
    image.set_model_defaults({"num_frames": 16, "fps": 8.0})  # what a LoRA that was trained on clips does
    image.save_pretrained(tmp_path / "video")
    assert type(pipe).load_config(tmp_path / "video")["latent_shift"]["num_frames"] == 16


def test_streaming_restores_the_image_network(unet):
    causal = inflate(copy.deepcopy(unet), Shift(backward=0))
    expected = call(causal, None)
    with torch.no_grad(), streaming(causal, {}):
        causal(torch.randn(1, 4, 4, 4), 500, TEXT[:1])
    torch.testing.assert_close(call(causal, None), expected)


@pytest.mark.parametrize("noise", [(0.0, 0.0), (0.5, 0.7)])
@pytest.mark.parametrize("separate", [False, True])
def test_prepare_video_latents_begins_a_longer_clip_as_a_shorter_one(texts, separate, noise):
    pipe = sd(texts)

    def latents(num_frames: int) -> torch.Tensor:
        generator = [seed(0), seed(1)] if separate else seed(0)
        device = torch.device("cpu")
        return pipe.prepare_video_latents(
            2, num_frames, 32, 32, torch.float32, device, generator, None, *noise
        )

    assert torch.equal(latents(3), latents(6)[:, :, :3])


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_stream_scales_its_noise_by_its_own_scheduler(texts, spacing):
    """On a fresh pipeline, after a call with other steps, and with the pipeline's scheduler swapped."""
    pipe = sd(texts, backward=0.0)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    fresh = list(stream(pipe, num_inference_steps=4))
    whole = pipe("red", num_frames=3, num_inference_steps=4, generator=seed(0)).frames[0]
    torch.testing.assert_close(np.stack(fresh), whole, atol=1e-4, rtol=1e-3)
    pipe("blue", num_inference_steps=20, num_frames=2)
    running = stream(pipe, num_inference_steps=4)
    results = [next(running)]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    results += running
    torch.testing.assert_close(np.stack(results), whole, atol=1e-4, rtol=1e-3)


def test_stream_rejects_wrong_arguments(texts):
    pipe = sd(texts, backward=0.0)
    for arguments, message in (
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more"),
        ({"num_frames": 0}, "num_frames must be 1 or more"),
        ({"output_type": "latent"}, "unknown output_type 'latent' of a stream"),
        ({"prompt": ["red", "blue"]}, "a stream takes one prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            next(pipe.stream(**{"prompt": "red", **arguments}))


def test_call_with_a_callback_keeps_its_guidance_beside_a_stream(texts):
    pipe = sd(texts, backward=0.0)
    expected = pipe("red", generator=seed(0), output_type="latent").frames

    original = pipe.scheduler.step

    def step(*args, **kwargs):
        result = original(*args, **kwargs)
        pipe._guidance_scale = 1.0  # what a stream without guidance writes when it starts
        return result

    pipe.scheduler.step = step
    changed = pipe(
        "red", generator=seed(0), output_type="latent", callback_on_step_end=lambda p, i, t, tensors: tensors
    ).frames
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("backend", ["eager"])
def test_temporal_shift_has_forward_derivatives_when_compiled(backend):
    x, tangent = torch.randn(8, 6, 2, 2), torch.randn(8, 6, 2, 2)

    @torch.compile(backend=backend)
    def derivative(x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: temporal_shift(x, 4), (x,), (tangent,))[1]

    assert torch.equal(derivative(x, tangent), temporal_shift(tangent, 4))


def test_guider_may_have_any_scale(texts):
    pipe = sd(texts)
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(3))
    plain = pipe("red", latents=latents, guidance_scale=1.0, output_type="latent").frames
    original = ClassifierFreeGuidance(0.9, use_original_formulation=True)
    guided_clip = pipe("red", latents=latents, guider=original, output_type="latent").frames
    expected = pipe("red", latents=latents, guidance_scale=1.9, output_type="latent").frames
    assert not torch.allclose(guided_clip, plain)
    torch.testing.assert_close(guided_clip, expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="AutoGuidance needs other predictions or changes the network"):
        pipe("red", guider=AutoGuidance(auto_guidance_layers=[0], dropout=0.1))


def test_negative_prompt_embeds_may_differ_from_frame_to_frame(texts):
    pipe = sd(texts)
    positive, negative = pipe.encode_prompt("red", "cpu", 1, True, "blue")
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(3))
    clip = partial(pipe, latents=latents, output_type="latent", prompt_embeds=positive)
    expected = clip(negative_prompt_embeds=negative).frames
    repeated = clip(negative_prompt_embeds=negative[:, None].repeat(1, 6, 1, 1)).frames
    torch.testing.assert_close(repeated, expected, atol=1e-4, rtol=1e-3)


def test_interrupt_also_ends_free_init(texts):
    pipe = sd(texts)
    pipe.enable_free_init(3)
    steps = []

    def stop(pipe, index, timestep, tensors):
        steps.append(index)
        pipe._interrupt = True
        return tensors

    pipe("red", callback_on_step_end=stop)
    assert steps == [0]
