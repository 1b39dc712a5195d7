"""The pipeline: diffusers' own numbers for one frame, and clips that are what was asked for."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from latent_shift.models import sizes
from latent_shift.pipelines.loading import load
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.runtime import seed
from latent_shift.shift import Shift, inflate, shift_of
from latent_shift.video import to_uint8

SCHEDULERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
]


def components(texts) -> dict:
    torch.manual_seed(0)
    return dict(
        vae=sizes.autoencoder("tiny").eval(),
        text_encoder=CLIPTextModel.from_pretrained(texts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(texts / "tokenizer"),
        unet=sizes.unet("tiny", sample_size=4).eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
    )


@pytest.fixture
def pipe(texts):
    pipe = LatentShiftPipeline(
        **components(texts), latent_shift={"num_frames": 4, "num_inference_steps": 3, "guidance_scale": 3.0}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pipeline_equals_diffusers_for_one_frame(pipe, texts, scheduler, guidance):
    theirs = StableDiffusionPipeline(**components(texts), requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    for each in (pipe, theirs):
        each.scheduler = scheduler.from_config(each.scheduler.config)
    call = dict(num_inference_steps=4, guidance_scale=guidance, negative_prompt="blue")
    for output_type in ("latent", "np"):
        image = theirs("red", generator=seed(1), output_type=output_type, **call).images
        frame = pipe("red", num_frames=1, generator=seed(1), output_type=output_type, **call).frames
        assert np.array_equal(np.asarray(frame).squeeze(), np.asarray(image).squeeze())


def test_call_returns_the_requested_shape_and_type(pipe):
    arrays = pipe("red").frames
    assert arrays.shape == (1, 4, 32, 32, 3)
    assert 0 <= arrays.min() <= arrays.max() <= 1
    assert pipe(["red", "blue"], num_frames=3, output_type="pt").frames.shape == (2, 3, 3, 32, 32)
    assert pipe("red", height=64, width=48, output_type="latent").frames.shape == (1, 4, 4, 8, 6)
    images = pipe("red", output_type="pil", num_videos_per_prompt=2).frames
    assert len(images) == 2
    assert len(images[1]) == 4
    assert isinstance(images[1][3], Image.Image)
    assert len(pipe("red", return_dict=False)) == 1


def test_call_is_deterministic_for_a_seed(pipe):
    a, b, c = (to_uint8(pipe("red", generator=seed(number)).frames[0]).tobytes() for number in (5, 5, 6))
    assert a == b != c


def test_call_generates_frames_together(pipe):
    """The same noise in every frame of a batch of images gives equal images; a clip's frames know their place."""
    noise = torch.randn(1, 4, 1, 4, 4).expand(-1, -1, 4, -1, -1)
    clip = pipe("red", latents=noise, output_type="latent").frames
    images = pipe(["red"] * 4, num_frames=1, latents=noise.transpose(0, 2), output_type="latent").frames
    torch.testing.assert_close(images[0], images[3])
    assert not torch.allclose(clip[:, :, 0], clip[:, :, 2])


def test_call_with_a_batch_equals_each_prompt_alone(pipe):
    both = pipe(["red", "blue"], generator=[seed(1), seed(2)], output_type="latent").frames
    alone = torch.cat(
        [pipe(p, generator=seed(n), output_type="latent").frames for p, n in (("red", 1), ("blue", 2))]
    )
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_shared_noise_without_shift_gives_equal_frames(texts):
    """With the frames at the ends held, a clip that does not move is the image, frame for frame."""
    pipe = LatentShiftPipeline(
        **components(texts), latent_shift={"num_frames": 4, "edge": "hold", "shared_noise": 1.0}
    )
    noise = pipe.prepare_video_latents(2, 4, 32, 32, torch.float32, torch.device("cpu"), seed(0), None, 1.0)
    still = pipe(
        ["red", "blue"], num_frames=1, num_inference_steps=3, latents=noise[:, :, :1], output_type="pt"
    ).frames
    clip = pipe(["red", "blue"], num_inference_steps=3, generator=seed(0), output_type="pt").frames
    torch.testing.assert_close(clip, still.expand_as(clip), atol=1e-5, rtol=1e-5)
    assert not torch.equal(
        clip,
        pipe(
            ["red", "blue"], num_inference_steps=3, shared_noise=0.5, generator=seed(0), output_type="pt"
        ).frames,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_prepare_video_latents_draws_the_same_noise_in_any_dtype(pipe, dtype):
    drawn = [
        pipe.prepare_video_latents(1, 3, 32, 32, each, torch.device("cpu"), seed(0), None, 0.5, 0.5)
        for each in (torch.float32, dtype)
    ]
    assert drawn[1].dtype == dtype and torch.equal(drawn[0].to(dtype), drawn[1])


def test_loop_has_no_seam(pipe):
    """Rolling the noise of a loop rolls the clip; of a clip with ends it does not."""
    noise = torch.randn(1, 4, 4, 4, 4, generator=seed(0))
    for loop in (True, False):
        clip = pipe("red", latents=noise, loop=loop, output_type="latent").frames
        rolled = pipe("red", latents=noise.roll(1, dims=2), loop=loop, output_type="latent").frames
        assert torch.allclose(rolled, clip.roll(1, dims=2), atol=1e-4) == loop
    assert shift_of(pipe.unet) == Shift()


def test_callback_sees_and_changes_every_step(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape, tensors["prompt_embeds"].shape))
        if step == 1:
            pipeline._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    frames = pipe(
        "red",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        output_type="latent",
    ).frames
    assert [entry[0] for entry in seen] == [0, 1]
    assert seen[0][2:] == ((1, 4, 4, 4, 4), (1, 20, 32))
    assert (frames == 0).all()
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        pipe("red", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])


def test_callback_may_be_one_of_diffusers(pipe):
    """Guidance that ends half-way: from there on the prediction is the conditional one alone."""
    cut = pipe("red", generator=seed(0), num_inference_steps=4, output_type="latent").frames
    ended = pipe(
        "red",
        generator=seed(0),
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5),
    ).frames
    assert pipe.guidance_scale == 0
    with pytest.raises(
        ValueError, match="left 1 prompt_embeds, expected 2: one a clip"
    ):  # diffusers cuts them for one prompt only
        pipe(
            ["red", "blue"],
            num_inference_steps=4,
            output_type="latent",
            callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5),
        )
    assert not torch.equal(cut, ended)


def test_call_takes_prompt_embeds(pipe):
    prompt, negative = pipe.encode_prompt(["red"], "cpu", 1, True)
    words = pipe("red", generator=seed(0), output_type="latent").frames
    embeddings = pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, generator=seed(0), output_type="latent"
    ).frames
    assert torch.equal(words, embeddings)


def test_guidance_scale_is_the_formula(pipe):
    """One Euler step by hand at guidance 3, from separate conditional and unconditional passes."""
    noise = torch.randn(1, 4, 4, 4, 4, generator=seed(0))
    got = pipe("red", latents=noise, num_inference_steps=1, guidance_scale=3.0, output_type="latent").frames
    predictions = []
    grab = pipe.unet.register_forward_hook(lambda module, args, output: predictions.append(output[0]))
    conditional = pipe(
        "red", latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    ).frames
    unconditional = pipe(
        "", latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    ).frames
    grab.remove()
    assert all(len(prediction) == 4 for prediction in predictions)  # no second half without guidance
    torch.testing.assert_close(got, unconditional + 3 * (conditional - unconditional), rtol=1e-3, atol=1e-4)
    rescaled = pipe(
        "red",
        latents=noise,
        num_inference_steps=1,
        guidance_scale=3.0,
        guidance_rescale=0.7,
        output_type="latent",
    ).frames
    assert not torch.allclose(rescaled, got)


def test_call_uses_timesteps_and_eta(pipe):
    plain = pipe("red", generator=seed(0), output_type="latent").frames
    assert not torch.equal(pipe("red", generator=seed(0), eta=1.0, output_type="latent").frames, plain)
    with pytest.raises(ValueError, match="does not support custom"):
        pipe("red", timesteps=[900, 500, 100])
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    steps = []
    pipe(
        "red",
        timesteps=[900, 500],
        callback_on_step_end=lambda p, i, t, k: steps.append(int(t)),
        generator=seed(0),
    )
    assert steps == [900, 500]


def test_save_pretrained_round_trip(pipe, tmp_path):
    inflate(pipe.unet, Shift(1 / 4, 1 / 8, "conv2", "hold"))
    pipe = LatentShiftPipeline(**pipe.components, latent_shift=dict(pipe.config.latent_shift))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("red", generator=seed(0)).frames
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    assert shift_of(loaded.unet) == Shift(1 / 4, 1 / 8, "conv2", "hold")
    assert np.array_equal(loaded("red", generator=seed(0)).frames, expected)
    # The parts are plain diffusers classes with nothing of ours in their files.
    assert type(UNet2DConditionModel.from_pretrained(tmp_path / "unet")) is UNet2DConditionModel
    assert type(AutoencoderKL.from_pretrained(tmp_path / "vae")) is AutoencoderKL
    image = StableDiffusionPipeline.from_pretrained(tmp_path)(
        "red", num_inference_steps=2, output_type="np"
    ).images
    assert image.shape == (1, 32, 32, 3)


def test_custom_attention_processors_get_text_for_every_frame(pipe):
    from diffusers.models.attention_processor import AttnProcessor

    expected = pipe("red", generator=seed(0), output_type="latent").frames
    pipe.unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(
        pipe("red", generator=seed(0), output_type="latent").frames, expected, rtol=1e-3, atol=1e-4
    )


def test_wrong_calls_are_rejected(pipe, texts, tmp_path):
    with pytest.raises(ValueError, match="num_frames must be 1 or more"):
        pipe("red", num_frames=0)
    with pytest.raises(ValueError, match="unknown output_type 'mp4'; expected np, pil, pt or latent"):
        pipe("red", output_type="mp4")
    with pytest.raises(ValueError, match=r"expected latents of shape \(1, 4, 4, 4, 4\)"):
        pipe("red", latents=torch.zeros(1, 4, 3, 4, 4))
    with pytest.raises(ValueError, match="expected one generator or 1"):
        pipe("red", generator=[seed(0), seed(1)])
    with pytest.raises(ValueError, match="shared_noise must be from 0 to 1, got 2"):
        pipe("red", shared_noise=2)
    with pytest.raises(ValueError, match="noise_correlation must be from 0 to below 1, got 1"):
        pipe("red", noise_correlation=1)
    with pytest.raises(ValueError, match="divisible by 8"):
        pipe("red", height=33)
    with pytest.raises(ValueError, match=r"unknown latent_shift settings \['nmu_frames'\]"):
        LatentShiftPipeline(**components(texts), latent_shift={"nmu_frames": 4})
    with pytest.raises(ValueError, match="did you mean 'emoji'"):
        load("emojis")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"halo": 1}, "halo has no effect without chunk"),
        ({"num_frames": 1, "loop": True}, "loop has no effect on one frame"),
        ({"num_frames": 1, "chunk": 1}, "chunk has no effect on one frame"),
        ({"num_frames": 1, "shared_noise": 0.9}, "shared_noise has no effect on one frame"),
        (
            {"latents": torch.zeros(1, 4, 4, 4, 4), "shared_noise": 0.9},
            "shared_noise has no effect beside latents",
        ),
        ({"loop": "no"}, "loop must be True or False, got 'no'"),
        ({"return_dict": "no"}, "return_dict must be True or False, got 'no'"),
    ],
)
def test_calls_refuse_options_without_effect(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("red", **arguments)


def test_options_at_their_defaults_and_those_of_the_model_are_no_mistake(pipe):
    pipe.call_defaults |= {"shared_noise": 0.5, "noise_correlation": 0.5, "guidance_scale": 1.0}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
        if parameter.default is not parameter.empty and name != "prompt"
    }
    zeros = {"loop": False, "chunk": None, "shared_noise": 0, "noise_correlation": 0.0, "negative_prompt": ""}
    for options in ({}, zeros):
        for others in ({"num_frames": 1}, {"latents": torch.zeros(1, 4, 4, 4, 4)}):
            assert (
                pipe("red", **{**defaults, **options, **others, "num_inference_steps": 1}).frames is not None
            )


def test_safety_checker_blackens_refused_frames(texts, caplog):
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = {**components(texts), "safety_checker": checker, "feature_extractor": processor}
    pipe = LatentShiftPipeline(**parts, latent_shift={"num_frames": 4, "num_inference_steps": 2})
    pipe.set_progress_bar_config(disable=True)
    for threshold, refused in ((2.0, False), (-2.0, True)):  # a cosine is above every threshold below -1
        checker.concept_embeds_weights.fill_(threshold)
        checker.special_care_embeds_weights.fill_(threshold)
        caplog.clear()
        output = pipe("a", num_videos_per_prompt=2, generator=seed(0))
        assert (output.frames == 0).all() == refused
        assert output.nsfw_content_detected == [[refused] * 4] * 2
        messages = [record.getMessage() for record in caplog.records if record.name == "latent_shift"]
        expected = "the safety checker blackened 8 of 8 frames, in which it detected NSFW content; try another prompt or seed"
        assert messages == [expected] * refused


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_an_error_that_names_them(pipe, part):
    """And not a black clip."""
    name, weight = list(getattr(pipe, part).named_parameters())[-1]
    weight.data.view(-1)[0] = torch.nan
    for output_type in ("latent", "np") if part != "vae" else ("np",):
        with pytest.raises(
            RuntimeError, match=f"are NaN or infinite: the weights of {part} are damaged, {name} is"
        ):
            pipe("red", output_type=output_type)


def test_overflow_is_an_error_that_names_the_dtype(pipe):
    pipe.to(torch.float16)
    pipe.unet.conv_out.weight.data.fill_(6e4)
    with pytest.raises(RuntimeError, match=r"overflows in float16 on cpu; load it with dtype=torch\.float32"):
        pipe("red")
    pipe.to(torch.float32)
    pipe.unet.conv_out.weight.data.fill_(3e38)
    with pytest.raises(RuntimeError, match="first sampling step are NaN or infinite: the guidance scale"):
        pipe("red")


def test_pipeline_without_a_safety_checker_detects_nothing(pipe):
    assert pipe("red").nsfw_content_detected is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
        ({"guidance_scale": 1e30}, r"guidance_scale must be from -100 to 100, got 1e\+30"),
        ({"num_videos_per_prompt": None}, "num_videos_per_prompt must be a number, got None"),
        ({"eta": None}, "eta must be a number, got None"),
        ({"width": 10**7}, "width must be at most 8192, got 10000000"),
        ({"guider": 3}, r"expected a guider of diffusers, such as ClassifierFreeGuidance\(7.5\), got 3"),
        ({"callback_on_step_end": 3}, "expected callback_on_step_end as a function, got 3"),
        ({"callback_on_step_end": lambda *_: {"latents": None}}, "expected callback_on_step_end to return a dict of tensors"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, r"the callback left latents of shape \(1,\)"),
        ({"cross_attention_kwargs": "x"}, "expected cross_attention_kwargs as a dict, got 'x'"),
        ({"timesteps": []}, r"expected falling timesteps from at most 999 to at least 0, got \[\]"),
        ({"timesteps": [999, 500, 500, 1]}, "expected falling timesteps"),
        ({"timesteps": [999, -5]}, "expected falling timesteps"),
        ({"timesteps": ["a"]}, "expected timesteps as a list of numbers"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number, got '7'"),
        ({"guidance_rescale": 2}, "guidance_rescale must be from 0 to 1, got 2"),
        ({"eta": -1}, "eta must be from 0 to 1, got -1"),
        ({"num_frames": 2.5}, "num_frames must be a whole number, 1 or more, got 2.5"),
        ({"num_frames": True}, "num_frames must be a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more, got 0"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be 1 or more, got 0"),
        ({"decode_batch_size": 0}, "decode_batch_size must be 1 or more, got 0"),
        ({"noise_correlation": float("nan")}, "noise_correlation must be a finite number, got nan"),
        ({"generator": 3}, r"expected generator as a torch.Generator, such as latent_shift.seed\(0\), got a int"),
        ({"generator": [3]}, "expected generator as a torch.Generator"),
        ({"generator": []}, "expected one generator or 1, one for each clip, got 0"),
        ({"latents": torch.full((1, 4, 4, 4, 4), torch.nan)}, "latents hold NaN or infinite numbers"),
        ({"latents": torch.zeros(1, 4, 4, 4, 4, dtype=torch.int64)}, "expected latents as a tensor of floats, got torch.int64"),
        ({"latents": np.zeros((1, 4, 4, 4, 4))}, "expected latents as a tensor of floats, got ndarray"),
    ],
)  # fmt: skip
def test_call_refuses_numbers_generators_and_latents(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("red", **arguments)


def test_call_takes_a_tuple_of_generators(pipe):
    clips = pipe(["red", "red"], generator=(seed(0), seed(1)), output_type="latent").frames
    listed = pipe(["red", "red"], generator=[seed(0), seed(1)], output_type="latent").frames
    assert torch.equal(clips, listed)


def test_stream_refuses_several_generators(pipe):
    inflate(pipe.unet, Shift(backward=0))
    with pytest.raises(ValueError, match=r"expected generator as a torch\.Generator"):
        next(pipe.stream("red", generator=[seed(0)]))


def test_save_pretrained_writes_the_current_settings(pipe, tmp_path):
    inflate(pipe.unet, Shift(1 / 4, 0, edge="hold"))
    pipe.save_pretrained(tmp_path)
    assert shift_of(LatentShiftPipeline.from_pretrained(tmp_path).unet) == Shift(1 / 4, 0, edge="hold")
