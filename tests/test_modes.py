"""Every way of generating: laws that hold for any weights, on real classes at tiny size."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latent_shift.models import sizes, text
from latent_shift.models.prompt_syntax import parse_prompt
from latent_shift.pipelines.conditioning import decode_clips, encode_pictures
from latent_shift.pipelines.prompts import encode_prompts
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline
from latent_shift.runtime import seed
from latent_shift.shift import Shift, inflate, reach
from latent_shift.video import to_frames


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(texts, **latent_shift):
    torch.manual_seed(0)
    unet = sizes.unet("tiny", sample_size=4).eval()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    tokenizer, encoder = (
        CLIPTokenizer.from_pretrained(texts / "tokenizer"),
        CLIPTextModel.from_pretrained(texts / "text_encoder"),
    )
    settings = {"num_frames": 6, "num_inference_steps": 3, "guidance_scale": 3.0, **latent_shift}
    return quiet(
        LatentShiftPipeline(
            sizes.autoencoder("tiny").eval(), encoder, tokenizer, unet, scheduler, latent_shift=settings
        )
    )


def xl_components(texts) -> dict:
    """The layout of Stable Diffusion XL: two text encoders, one with a projection, sizes as micro-conditions."""
    torch.manual_seed(0)
    config = CLIPTextConfig.from_pretrained(texts / "text_encoder")
    config.projection_dim = 16
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    return dict(
        vae=sizes.autoencoder("tiny").eval(),
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(texts / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(texts / "tokenizer"),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )


@pytest.fixture
def xl(texts):
    return quiet(
        LatentShiftXLPipeline(
            **xl_components(texts), latent_shift={"num_frames": 4, "num_inference_steps": 2}
        )
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_xl_pipeline_equals_diffusers_for_one_frame(xl, texts, scheduler, guidance):
    theirs = quiet(StableDiffusionXLPipeline(**xl_components(texts), add_watermarker=False))
    for pipe in (xl, theirs):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, clip_sample=False)
    arguments = dict(
        negative_prompt="blue" if guidance > 1 else None, prompt_2="square", num_inference_steps=3, guidance_scale=guidance, guidance_rescale=0.5,
        original_size=(64, 48), crops_coords_top_left=(4, 8), output_type="pt",
    )  # fmt: skip
    expected = theirs("red", generator=seed(1), **arguments).images
    assert torch.equal(xl("red", num_frames=1, generator=seed(1), **arguments).frames[:, 0], expected)


def test_xl_pipeline_generates_saves_and_loads_clips(xl, tmp_path):
    both = xl(["red", "blue"], generator=[seed(0), seed(1)], negative_prompt="green", output_type="pt").frames
    assert both.shape == (2, 4, 3, 32, 32)
    alone = xl("blue", generator=seed(1), negative_prompt="green", output_type="pt").frames
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    assert not torch.equal(
        alone,
        xl(
            "blue", generator=seed(1), negative_prompt="green", original_size=(999, 9), output_type="pt"
        ).frames,
    )
    xl.save_pretrained(tmp_path)
    again = quiet(LatentShiftXLPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(
        again("blue", generator=seed(1), negative_prompt="green", output_type="pt").frames, alone
    )
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)(
        "red", num_inference_steps=1
    ).images
    with pytest.raises(TypeError, match="no argument 'orignal_size'; did you mean 'original_size'"):
        xl("red", orignal_size=(3, 4))


def test_call_rejects_arguments_of_another_family(texts):
    with pytest.raises(TypeError, match="LatentShiftPipeline has no argument 'prompt_2'"):
        sd(texts)("red", prompt_2="blue")
    with pytest.raises(TypeError, match="did you mean 'num_frames'"):
        sd(texts)("red", nmu_frames=3)


PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
CLIP = np.random.default_rng(1).random((6, 32, 32, 3), np.float32)


def test_image_and_last_image_fix_the_end_frames(texts):
    pipe = sd(texts)
    first, last = Image.fromarray(PICTURE), CLIP[3]
    known = [encode_pictures(pipe, to_frames(frame), 32, 32, 1)[0, :, 0] for frame in (first, last)]
    free = pipe("red", generator=seed(0), output_type="latent").frames
    begun = pipe("red", image=first, generator=seed(0), output_type="latent").frames
    between = pipe("red", image=first, last_image=last, generator=seed(0), output_type="latent").frames
    torch.testing.assert_close(begun[0, :, 0], known[0])
    torch.testing.assert_close(between[0, :, 0], known[0])
    torch.testing.assert_close(between[0, :, -1], known[1])
    assert not torch.allclose(begun[0, :, 1:], free[0, :, 1:])  # the others go on from it
    assert not torch.allclose(between[0, :, 1:-1], begun[0, :, 1:-1])


def test_each_prompt_can_have_its_own_end_frames(texts):
    """Also where as many pictures as half of the frames are given, which once filled the clips with one after another."""
    pipe, pictures = sd(texts), [CLIP[k] for k in range(4)]
    known = encode_pictures(pipe, np.stack(pictures), 32, 32, 4)[0].transpose(0, 1)
    ends = {"image": pictures[:2], "last_image": pictures[2:], "num_frames": 4}
    clips = pipe(
        ["red", "blue"], num_videos_per_prompt=2, generator=seed(0), output_type="latent", **ends
    ).frames
    torch.testing.assert_close(clips[:, :, 0], known[[0, 0, 1, 1]])
    torch.testing.assert_close(clips[:, :, -1], known[[2, 2, 3, 3]])
    for words, num in (("red", 1), (["red", "blue", "red", "blue"], 4)):
        message = f"expected one picture, or one for each of the {num} prompts, got 2"
        with pytest.raises(ValueError, match=message):
            pipe(words, generator=seed(0), **ends)


def test_latents_stand_for_pictures_and_videos(texts):
    pipe = sd(texts)
    latents = encode_pictures(pipe, CLIP, 32, 32, 4)[0].transpose(0, 1)
    for name, pixels, encoded in (("image", CLIP[0], latents[:1]), ("video", CLIP, latents)):
        clips = [
            pipe("red", strength=0.6, generator=seed(0), output_type="latent", **{name: given}).frames
            for given in (pixels, encoded)
        ]
        torch.testing.assert_close(clips[0], clips[1])


def test_strength_sets_the_distance_from_the_video(texts):
    pipe = sd(texts, num_inference_steps=10)
    clean = encode_pictures(pipe, CLIP, 32, 32, 4)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        made = pipe("red", video=CLIP, strength=strength, generator=seed(0), output_type="latent").frames
        distances.append(float((made - clean).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] < distances[2] / 4
    standing = pipe("red", image=CLIP[0], strength=0.1, generator=seed(0), output_type="latent").frames
    assert (standing - clean[:, :, :1]).square().mean() < distances[2] / 4
    assert torch.equal(
        pipe("red", video=CLIP, strength=1.0, generator=seed(0), output_type="latent").frames,
        pipe("red", generator=seed(0), output_type="latent").frames,
    )


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_mask_keeps_the_black_region(texts, scheduler):
    pipe = sd(texts)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    clean = encode_pictures(pipe, CLIP, 32, 32, 4)
    left = np.zeros((32, 32), np.uint8)
    left[:, :16] = 255
    made = pipe(
        "red", video=list(CLIP), mask=Image.fromarray(left), generator=seed(0), output_type="latent"
    ).frames
    torch.testing.assert_close(made[..., 2:], clean[..., 2:])
    assert ((made - clean)[..., :2].abs() > 1e-3).float().mean() > 0.9
    over_time = np.stack([np.full((32, 32), 255 * (k > 2), np.uint8) for k in range(6)])
    made = pipe("red", video=CLIP, mask=over_time, generator=seed(0), output_type="latent").frames
    torch.testing.assert_close(made[:, :, :3], clean[:, :, :3])
    assert ((made - clean)[:, :, 3:].abs() > 1e-3).float().mean() > 0.9


def test_loop_rolls_with_its_noise(texts):
    """The shift wraps round: no frame is the first."""
    pipe = sd(texts)
    noise = torch.randn(1, 4, 6, 4, 4, generator=seed(0))
    clip = pipe("red", latents=noise, loop=True, output_type="latent").frames
    rolled = pipe("red", latents=noise.roll(2, dims=2), loop=True, output_type="latent").frames
    torch.testing.assert_close(rolled, clip.roll(2, dims=2), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(
        pipe("red", latents=noise.roll(2, dims=2), output_type="latent").frames,
        clip.roll(2, dims=2),
        atol=1e-2,
    )


@pytest.mark.parametrize("loop", [False, True])
def test_chunk_with_full_halo_equals_the_whole_clip(texts, loop):
    pipe = sd(texts)
    num_frames = sum(reach(pipe.unet)) + 12
    arguments = dict(num_frames=num_frames, loop=loop, output_type="latent", num_inference_steps=2)
    widest = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: widest.append(len(inputs[0]) // 2))
    whole = pipe("red", generator=seed(0), **arguments).frames
    assert widest[0] == num_frames
    widest.clear()
    chunked = pipe("red", generator=seed(0), chunk=4, **arguments).frames
    assert max(widest) <= 4 + sum(reach(pipe.unet)) < num_frames
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)
    widest.clear()
    quick = pipe("red", generator=seed(0), chunk=4, halo=1, **arguments).frames
    assert max(widest) == 6
    assert not torch.allclose(quick, whole, atol=1e-3)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize(
    ("shared_noise", "noise_correlation"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.8), (0.5, 0.8)]
)
def test_stream_equals_the_whole_clip(texts, scheduler, shared_noise, noise_correlation):
    pipe = sd(texts, backward=0.0, shared_noise=shared_noise, noise_correlation=noise_correlation)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    whole = pipe("red", generator=seed(0), negative_prompt="blue", output_type="np").frames[0]
    stream = pipe.stream("red", generator=seed(0), negative_prompt="blue")  # it has no end
    for frame in whole:
        np.testing.assert_allclose(next(stream), frame, atol=1e-5)
    assert len(list(pipe.stream("red", num_frames=2, output_type="pil"))) == 2
    inflate(pipe.unet, Shift())
    with pytest.raises(ValueError, match="expected Shift\\(backward=0"):
        next(pipe.stream("red"))


def test_stream_uses_the_noise_of_the_clip_in_half_precision(texts):
    pipe = sd(texts, backward=0.0, shared_noise=0.5, noise_correlation=0.8).to(torch.bfloat16)
    shown: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "num_frames": 4}
    pipe("red", generator=seed(0), **options)
    list(pipe.stream("red", generator=seed(0), **options))
    clip, *frames = shown
    assert clip.dtype == torch.bfloat16 and torch.equal(clip, torch.cat(frames))


def test_prompt_schedule_interpolates_between_prompts(texts):
    pipe = sd(texts)
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(0))
    red, blue = (pipe(words, latents=latents, output_type="latent").frames for words in ("red", "blue"))
    travelled = pipe(
        {0: "red", 5: "blue"}, latents=latents, num_inference_steps=1, output_type="latent"
    ).frames
    one = [
        pipe(words, latents=latents, num_inference_steps=1, output_type="latent").frames
        for words in ("red", "blue")
    ]
    inflate(pipe.unet, Shift(0, 0))  # frame by frame the ends are the two prompts' own
    ends = pipe({0: "red", 5: "blue"}, latents=latents, output_type="latent").frames
    alone = [pipe(words, latents=latents, output_type="latent").frames for words in ("red", "blue")]
    torch.testing.assert_close(ends[:, :, 0], alone[0][:, :, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ends[:, :, -1], alone[1][:, :, -1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ends[:, :, 2], alone[0][:, :, 2])
    assert not torch.allclose(red, blue)
    assert not torch.allclose(travelled, one[0])
    same = pipe({1: "red"}, latents=latents, output_type="latent", num_videos_per_prompt=1).frames
    torch.testing.assert_close(same, alone[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected prompts for frames from 0 to 5, got \[0, 6\]"):
        pipe({0: "red", 6: "blue"})


def test_prompt_schedule_works_with_xl(xl):
    assert xl(
        {0: "red", 3: "blue"}, num_videos_per_prompt=2, negative_prompt="green", output_type="latent"
    ).frames.shape == (2, 4, 4, 4, 4)
    latents = torch.randn(1, 4, 4, 4, 4, generator=seed(0))
    same = xl({0: "red", 3: "red"}, latents=latents, output_type="latent").frames
    torch.testing.assert_close(
        same, xl("red", latents=latents, output_type="latent").frames, atol=1e-3, rtol=1e-3
    )


def test_prompt_weights_change_the_clip(texts):
    pipe = sd(texts)
    weights = text.token_weights(pipe.tokenizer, parse_prompt("ab (cd:1.5) ef"))
    letters = pipe.tokenizer.tokenize("ab cd ef")  # the tiny tokenizer has no merges: a token a letter
    assert weights[1 : 1 + len(letters)].tolist() == [1, 1, 1.5, 1.5, 1, 1]
    assert (weights[1 + len(letters) :] == 1).all()
    latents = torch.randn(1, 4, 6, 4, 4, generator=seed(0))
    clip = lambda prompt: pipe(prompt, latents=latents, output_type="latent").frames  # noqa: E731
    torch.testing.assert_close(clip("a (red:1.0) square"), clip("a red square"))
    assert not torch.allclose(clip("a (red:1.5) square"), clip("a red square"))

    def negative(prompt):
        return pipe("red", negative_prompt=prompt, latents=latents, output_type="latent").frames

    torch.testing.assert_close(negative("a (blue:1.0) square"), negative("a blue square"))
    assert not torch.allclose(negative("a (blue:1.5) square"), negative("a blue square"))


def prompt_embeds(pipe, prompt: str) -> torch.Tensor:
    return encode_prompts(
        pipe, prompt, negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None, num_frames=6, num_videos=1, guided=False,
        height=32, width=32, tensor_inputs=[], clip_skip=None, cross_attention_kwargs=None, family={},
    )["prompt_embeds"]  # fmt: skip


def test_prompt_weights_scale_from_the_null_prompt(texts):
    pipe = sd(texts)
    zero, plain, null = (prompt_embeds(pipe, words) for words in ("(red:0)", "red", ""))
    torch.testing.assert_close(zero[:, 1:4], null[:, 1:4])
    torch.testing.assert_close(zero[:, 4:], plain[:, 4:])


def test_prompt_weights_count_the_vectors_of_a_textual_inversion(texts):
    pipe = sd(texts)
    pipe.load_textual_inversion({"<toy>": torch.randn(3, 32)}, token="<toy>")
    tokens = pipe.tokenizer.convert_ids_to_tokens(
        pipe.tokenizer(pipe.maybe_convert_prompt("<toy> ab cd", pipe.tokenizer)).input_ids
    )
    for prompt, weighted in (
        ("<toy> (ab:1.5) cd", ["a", "b</w>"]),
        ("(<toy>:1.5) ab cd", ["<toy>", "<toy>_1", "<toy>_2"]),
    ):
        changed = (prompt_embeds(pipe, prompt) != prompt_embeds(pipe, "<toy> ab cd")).any(dim=-1)[0]
        assert [token for token, weigh in zip(tokens, changed.tolist(), strict=False) if weigh] == weighted


def test_free_init_samples_again_from_its_result(texts):
    pipe = sd(texts)
    once = pipe("red", generator=seed(0), output_type="latent").frames
    pipe.enable_free_init(num_iters=2)
    steps = []
    twice = pipe(
        "red",
        generator=seed(0),
        output_type="latent",
        callback_on_step_end=lambda p, i, t, k: steps.append(i) or {},
    ).frames
    assert steps == [0, 1, 2] * 2
    assert not torch.allclose(once, twice)
    with pytest.raises(ValueError, match="FreeInit"):
        pipe("red", video=CLIP)
    pipe.disable_free_init()
    assert torch.equal(pipe("red", generator=seed(0), output_type="latent").frames, once)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"video": CLIP, "image": PICTURE}, "a video or an image to start from"),
        ({"last_image": PICTURE}, "an image before last_image"),
        ({"mask": PICTURE[..., 0]}, "a video for the mask"),
        ({"strength": 0.5}, "a video or an image for strength"),
        ({"video": CLIP, "strength": 1.5}, "strength above 0 and up to 1, not 1.5"),
        ({"image": PICTURE, "last_image": PICTURE, "loop": True}, "a last_image or a loop"),
        ({"video": CLIP, "num_frames": 5}, "the video has 6 frames, num_frames is 5"),
        ({"image": PICTURE, "last_image": PICTURE, "num_frames": 1}, "num_frames must be 3 or more"),
        ({"video": CLIP, "strength": 0.1}, "strength 0.1 of 3 steps leaves none"),
        ({"video": CLIP, "mask": CLIP[:4, ..., 0]}, "expected one mask"),
        ({"chunk": 0}, "chunk must be 1 or more"),
    ],
)
def test_call_rejects_contradicting_arguments(texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd(texts)("red", **arguments)


def test_scale_latents_uses_mean_and_deviation(texts):
    """Autoencoders of XL's kind say the mean and spread of their latents."""
    pipe = sd(texts)
    plain = encode_pictures(pipe, CLIP, 32, 32, 4)
    pipe.vae = AutoencoderKL.from_config(
        pipe.vae.config, latents_mean=[1.0, 2, 3, 4], latents_std=[2.0, 2, 2, 2]
    )
    pipe.vae.load_state_dict(sd(texts).vae.state_dict())
    moved = encode_pictures(pipe, CLIP, 32, 32, 4)
    torch.testing.assert_close(moved * 2 + torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1, 1), plain)
    torch.testing.assert_close(
        decode_clips(pipe, moved, 2, "pt")[0],
        decode_clips(sd(texts), plain, 6, "pt")[0],
        atol=1e-5,
        rtol=1e-5,
    )
