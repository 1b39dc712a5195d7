"""What every pipeline of diffusers does, of both of ours: the conventions of its common pipeline tests, in our own words."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from test_modes import quiet, sd, xl_components

from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline
from latent_shift.runtime import seed
from latent_shift.shift import shift_of

SETTINGS = {"num_frames": 3, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(params=["sd", "xl"])
def pipe(request, texts):
    if request.param == "sd":
        return sd(texts, **SETTINGS)
    return quiet(LatentShiftXLPipeline(**xl_components(texts), latent_shift=SETTINGS))


def clip(pipe, prompt="red", **arguments):
    arguments = {"generator": seed(0), "output_type": "pt", **arguments}
    return pipe(prompt, **arguments).frames


def test_call_takes_the_arguments_of_diffusers(pipe):
    taken = set(inspect.signature(type(pipe).__call__).parameters)
    assert taken >= {
        "prompt", "negative_prompt", "height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "eta", "generator",
        "latents", "prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict", "cross_attention_kwargs", "clip_skip",
        "callback_on_step_end", "callback_on_step_end_tensor_inputs", "num_videos_per_prompt", "guidance_rescale", "ip_adapter_image",
    }  # fmt: skip
    assert callable(pipe.set_progress_bar_config)
    assert callable(pipe.enable_model_cpu_offload)


def test_save_pretrained_round_trip(pipe, tmp_path):
    before = clip(pipe)
    pipe.save_pretrained(tmp_path)
    again = quiet(type(pipe).from_pretrained(tmp_path))
    torch.testing.assert_close(clip(again), before, atol=1e-4, rtol=0)
    for name, component in again.components.items():
        assert (component is None) == (pipe.components[name] is None), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_saves(pipe, dtype, tmp_path):
    full = clip(pipe)
    pipe.to(dtype)
    assert {part.dtype for part in pipe.components.values() if hasattr(part, "dtype")} == {dtype}
    half = clip(pipe)
    assert half.isfinite().all()
    assert (half.float() - full).abs().mean() < 0.05
    pipe.save_pretrained(tmp_path)
    again = quiet(type(pipe).from_pretrained(tmp_path, dtype=dtype))
    assert {part.dtype for part in again.components.values() if hasattr(part, "dtype")} == {dtype}
    torch.testing.assert_close(clip(again), half, atol=1e-2, rtol=0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_call_with_a_list_returns_a_clip_for_each_prompt(pipe, number):
    made = clip(pipe, ["red", "blue", "a green square"][:number], negative_prompt=["grey"] * number)
    assert made.shape == (number, 3, 3, 32, 32)


def test_call_with_one_of_a_batch_equals_it_alone(pipe):
    batch = clip(pipe, ["red", "a long blue line", "green"], generator=[seed(number) for number in range(3)])
    alone = clip(pipe, "a long blue line", generator=seed(1))
    torch.testing.assert_close(batch[1:2], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("prompts", "each"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_num_videos_per_prompt_multiplies_clips(pipe, prompts, each):
    made = clip(pipe, ["red", "blue"][:prompts], num_videos_per_prompt=each)
    assert len(made) == prompts * each
    if each == 2:
        assert not torch.equal(made[0], made[1])


def test_return_dict_false_returns_a_tuple(pipe):
    torch.testing.assert_close(
        clip(pipe), pipe("red", generator=seed(0), output_type="pt", return_dict=False)[0]
    )


def test_output_types_hold_the_same_clip(pipe):
    floats = clip(pipe).permute(0, 1, 3, 4, 2).numpy()
    np.testing.assert_allclose(clip(pipe, output_type="np"), floats, atol=1e-6)
    images = np.stack([np.asarray(image) for image in clip(pipe, output_type="pil")[0]]) / 255
    np.testing.assert_allclose(images, floats[0], atol=0.51 / 255)
    latents = clip(pipe, output_type="latent")
    assert latents.shape == (1, 4, 3, 32 // pipe.vae_scale_factor, 32 // pipe.vae_scale_factor)


def test_callback_gets_the_tensors_it_asks_for(pipe):
    seen = []

    def watch(pipe, index, timestep, tensors):
        seen.append((index, int(timestep), set(tensors)))
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        return tensors

    wanted = pipe._callback_tensor_inputs
    expected = clip(pipe)
    torch.testing.assert_close(
        clip(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=wanted), expected
    )
    assert [(index, names) for index, _, names in seen] == [(0, set(wanted)), (1, set(wanted))]
    assert [timestep for _, timestep, _ in seen] == [int(timestep) for timestep in pipe.scheduler.timesteps]
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        clip(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["vae"])


def test_callback_can_change_latents(pipe):
    def blank(pipe, index, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 1 else tensors

    made = clip(
        pipe, output_type="latent", callback_on_step_end=blank, callback_on_step_end_tensor_inputs=["latents"]
    )
    assert not made.any()


def test_callback_can_interrupt(pipe):
    steps = []

    def stop(pipe, index, timestep, tensors):
        steps.append(index)
        pipe._interrupt = True
        return tensors

    assert clip(pipe, num_inference_steps=4, callback_on_step_end=stop).shape == (1, 3, 3, 32, 32)
    assert steps == [0]


def test_negative_prompt_is_ignored_with_a_warning_without_guidance(pipe, caplog):
    plain = clip(pipe, guidance_scale=1.0)
    for empty in (None, "", [""]):
        assert torch.equal(plain, clip(pipe, guidance_scale=1.0, negative_prompt=empty))
    assert "no effect" not in caplog.text
    assert torch.equal(plain, clip(pipe, guidance_scale=1.0, negative_prompt="blue"))
    assert "negative_prompt has no effect without guidance" in caplog.text
    assert not torch.equal(clip(pipe), clip(pipe, negative_prompt="blue"))
    assert not torch.equal(clip(pipe), clip(pipe, guidance_scale=1.0))


def test_encode_prompt_works_alone(pipe):
    """What `encode_prompt` returns is what a pipeline without its text encoders needs."""
    expected = clip(pipe)
    xl = isinstance(pipe, LatentShiftXLPipeline)
    names = [
        "prompt_embeds",
        "negative_prompt_embeds",
        *(["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if xl else []),
    ]
    encoded = pipe.encode_prompt(
        "red", device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    given = dict(zip(names, encoded, strict=True))
    bare = {
        name: part
        for name, part in pipe.components.items()
        if "text_encoder" not in name and "tokenizer" not in name
    }
    missing = {name: None for name in pipe.components if name not in bare}
    without = quiet(type(pipe)(**bare, **missing, latent_shift=SETTINGS))
    torch.testing.assert_close(clip(without, None, **given), expected)


def test_components_build_another_pipeline(pipe):
    expected = clip(pipe)
    again = quiet(type(pipe)(**pipe.components, latent_shift=SETTINGS))
    torch.testing.assert_close(clip(again), expected)


def test_from_pipe_converts_both_ways(pipe):
    """`from_pipe` shares every component: a plain pipeline becomes ours, and ours lends its weights to any other."""
    xl = isinstance(pipe, LatentShiftXLPipeline)
    theirs = quiet((StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pipe(pipe))
    assert theirs.unet is pipe.unet
    ours = quiet(type(pipe).from_pipe(theirs))
    assert shift_of(ours.unet) == shift_of(pipe.unet)
    still = theirs(
        "red",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=seed(0),
        output_type="pt",
        height=32,
        width=32,
    ).images
    same = ours(
        "red", num_inference_steps=2, guidance_scale=3.0, generator=seed(0), output_type="pt", num_frames=1
    ).frames[:, 0]
    torch.testing.assert_close(same, still, atol=1e-6, rtol=0)
    if not xl:
        redrawn = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
        assert redrawn(
            "red", image=still, num_inference_steps=4, generator=seed(0), output_type="np"
        ).images.shape == (1, 32, 32, 3)


def test_generators_and_latents_are_used(pipe):
    assert torch.equal(clip(pipe), clip(pipe))
    assert not torch.equal(clip(pipe), clip(pipe, generator=seed(1)))
    latents = torch.randn(
        1, 4, 3, 32 // pipe.vae_scale_factor, 32 // pipe.vae_scale_factor, generator=seed(0)
    )
    assert torch.equal(clip(pipe, latents=latents), clip(pipe, latents=latents.clone(), generator=seed(5)))


def test_pipeline_is_a_diffusion_pipeline():
    assert issubclass(LatentShiftPipeline, StableDiffusionPipeline)
    assert issubclass(LatentShiftXLPipeline, StableDiffusionXLPipeline)


@pytest.mark.parametrize("missing", [["unet", "vae"], ["text_encoder", "tokenizer"], ["vae"]])
def test_pipeline_works_without_parts_that_a_call_does_not_need(pipe, missing, tmp_path):
    """Prompts encoded by one half of a pipeline, clips generated from them by the other."""
    absent = {
        f"{name}{suffix}": None
        for name in missing
        for suffix in ("", "_2")
        if f"{name}{suffix}" in pipe.components
    }
    half = quiet(type(pipe)(**{**pipe.components, **absent}, latent_shift=SETTINGS))
    if "unet" in missing:
        expected = pipe.encode_prompt(
            "red", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        encoded = half.encode_prompt(
            "red", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        assert all(map(torch.equal, encoded, expected))
        return
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    encoded = pipe.encode_prompt(
        "red", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    arguments = {**dict(zip(names, encoded, strict=False)), "output_type": "latent"}
    expected = clip(pipe, None, **arguments)
    assert torch.equal(clip(half, None, **arguments), expected)
    half.save_pretrained(tmp_path)
    loaded = quiet(type(pipe).from_pretrained(tmp_path, **absent))
    assert all(getattr(loaded, name) is None for name in absent)
    torch.testing.assert_close(clip(loaded, None, **arguments), expected, atol=1e-4, rtol=1e-4)


def test_callback_can_change_the_guidance_scale(pipe):
    """What diffusers' own tests ask of callbacks, and that the new scale counts."""
    scales = []

    def raise_scale(pipe, index, timestep, tensors):
        pipe._guidance_scale += 1.0
        scales.append(pipe.guidance_scale)
        return tensors

    changed = clip(pipe, guidance_scale=3.0, callback_on_step_end=raise_scale)
    assert scales == [4.0, 5.0]
    assert not torch.equal(changed, clip(pipe, guidance_scale=3.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload moves parts to an accelerator")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_gives_the_same_clip(pipe, offload):
    arguments = [{}, {"image": np.zeros((32, 32, 3), np.float32)}]
    expected = [clip(pipe.to("cuda"), **options).cpu() for options in arguments]
    pipe.to("cpu")
    getattr(pipe, offload)()
    for options, value in zip(arguments, expected, strict=True):
        torch.testing.assert_close(clip(pipe, **options).cpu(), value, atol=1e-4, rtol=0)
    assert pipe.unet.device.type != "cuda"
