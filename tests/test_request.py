"""A request, from words and files to a clip: what the command and a server share."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from diffusers import DDIMScheduler
from test_modes import sd

from latent_shift import video
from latent_shift.pipelines.request import Request, generate_clip


def test_generate_clip_gives_the_clip_of_a_call(texts):
    pipe = sd(texts)
    steps = []
    clip = generate_clip(
        Request(prompt="red", seed=3), pipe, on_step=lambda *progress: steps.append(progress)
    )
    again = generate_clip(Request(prompt="red", seed=3, fps=4), pipe)
    assert (clip.frames.shape, clip.frames.dtype, clip.fps, again.fps) == ((6, 32, 32, 3), np.uint8, 8, 4)
    assert np.array_equal(clip.frames, again.frames)
    assert not np.array_equal(clip.frames, generate_clip(Request(prompt="red", seed=4), pipe).frames)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_generate_clip_leaves_the_pipeline_as_it_was(texts, tmp_path):
    pipe, still = sd(texts), tmp_path / "still.png"
    video.write(np.zeros((1, 32, 32, 3), np.uint8), still)
    plain = generate_clip(Request(prompt="red"), pipe).frames
    other = generate_clip(Request(prompt="red", scheduler="EulerAncestralDiscrete", free_init=2), pipe).frames
    assert not np.array_equal(plain, other)
    assert type(pipe.scheduler) is DDIMScheduler and not pipe.free_init_enabled
    with pytest.raises(ValueError, match="num_frames must be 3"):
        generate_clip(
            Request(prompt="red", scheduler="LCM", image=still, last_image=still, num_frames=2), pipe
        )
    assert type(pipe.scheduler) is DDIMScheduler


def test_generate_clip_reads_pictures_at_the_size_of_the_clip(texts, tmp_path):
    """A model that is wider than high, and a request for another shape."""
    pipe = sd(texts)
    pipe.unet.register_to_config(sample_size=(4, 6))
    video.write(np.zeros((1, 100, 80, 3), np.uint8), tmp_path / "still.png")
    video.write(np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8), tmp_path / "clip.webp")
    video.write(np.full((1, 64, 64, 3), 255, np.uint8), tmp_path / "mask.png")
    assert generate_clip(Request(prompt="red", image=tmp_path / "still.png"), pipe).frames.shape == (
        6,
        32,
        48,
        3,
    )
    request = Request(
        prompt="red",
        video=tmp_path / "clip.webp",
        mask=tmp_path / "mask.png",
        num_frames=4,
        width=64,
        height=40,
    )
    assert generate_clip(request, pipe).frames.shape == (4, 40, 64, 3)
    for num_frames in (3, 7):
        masks = np.eye(num_frames, dtype=np.uint8)[:, None, :, None] * 255
        video.write(masks.repeat(64, 1).repeat(3, 3), tmp_path / "masks.webp")
        wrong = Request(prompt="red", video=tmp_path / "clip.webp", mask=tmp_path / "masks.webp")
        with pytest.raises(
            ValueError, match=rf"mask: expected one mask \(H, W\) or 5, got {min(num_frames, 6)}"
        ):
            generate_clip(wrong, pipe)


def test_generate_clip_refuses_a_video_of_too_few_frames(texts, tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    video.write(clip, tmp_path / "clip.webp")
    with pytest.raises(ValueError, match=r"clip.webp: has 5 frames at 8 fps, fewer than num_frames=7"):
        generate_clip(Request(prompt="red", video=tmp_path / "clip.webp", num_frames=7), sd(texts))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("name", ["image", "last_image"])
def test_generate_clip_refuses_several_frames_for_one(texts, tmp_path, name, suffix):
    video.write(np.zeros((1, 32, 32, 3), np.uint8), tmp_path / "image.png")
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    path = video.write(clip, tmp_path / f"clip{suffix}")
    request = Request(prompt="red", **{"image": tmp_path / "image.png", name: path})
    with pytest.raises(ValueError, match=f"clip{suffix}: has several frames; expected a picture for {name};"):
        generate_clip(request, sd(texts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 1, "loop": True}, "loop has no effect on one frame"),
        ({"num_frames": 1, "shared_noise": 0.5}, "shared_noise has no effect on one frame"),
        ({"num_frames": 1, "then": {1: "blue"}}, "then has no effect on one frame"),
        ({"halo": 2}, "halo has no effect without chunk"),
        ({"free_init": 1}, "free_init must be 2 or more, got 1"),
        ({"guidance_scale": 1e30}, r"guidance_scale must be from -100 to 100, got 1e\+30"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"strength": 0.0}, "expected strength above 0 and up to 1, not 0.0"),
        ({"fps": float("inf")}, "fps must be a finite number, got inf"),
        ({"fps": 0.0}, "fps must be above 0, got 0.0"),
        ({"seed": 2**64}, "seed must be a whole number from"),
    ],
)
def test_request_refuses_options_without_effect(options, message):
    with pytest.raises(ValueError, match=message):
        Request(prompt="red", **options)


def test_request_name_is_a_file_name():
    assert Request(prompt="A red/blue: heart?").name == "a-red-blue--heart"
    assert Request(prompt="../..").name == "clip"
    assert len(Request(prompt="word " * 50).name) <= 60


def test_generate_clip_in_two_threads_gives_each_its_clip(texts):
    pipe = sd(texts)
    requests = [
        Request(prompt="red", scheduler="UniPCMultistep", guidance_scale=7.0, num_inference_steps=6),
        Request(prompt="red", scheduler="EulerDiscrete", guidance_scale=1.0, num_inference_steps=6),
    ]
    expected = [generate_clip(request, pipe).frames for request in requests]
    with ThreadPoolExecutor(2) as pool:
        clips = list(pool.map(lambda request: generate_clip(request, pipe).frames, requests * 3))
    for clip, value in zip(clips, expected * 3, strict=True):
        assert np.array_equal(clip, value)
    assert type(pipe.scheduler) is DDIMScheduler


def test_threads_do_not_pad_each_others_texts(texts, monkeypatch):
    # A tokenizer is set to the padding of a call and encodes then; the pause lets other threads come between.
    pipe, request = sd(texts), Request(prompt="red", num_inference_steps=1)
    expected = generate_clip(request, pipe).frames
    tokenizer = type(pipe.tokenizer)
    set_padding = tokenizer.set_truncation_and_padding

    def set_and_pause(self, *args, **kwargs):
        set_padding(self, *args, **kwargs)
        time.sleep(0.005)

    monkeypatch.setattr(tokenizer, "set_truncation_and_padding", set_and_pause)
    with ThreadPoolExecutor(3) as pool:
        clips = list(pool.map(lambda request: generate_clip(request, pipe), [request] * 6))
    assert all(np.array_equal(clip.frames, expected) for clip in clips)


@pytest.mark.parametrize("scale", [-7.0, 0.5])
def test_request_refuses_guidance_without_effect(scale):
    with pytest.raises(ValueError, match=f"guidance_scale={scale:g} has no effect; expected above 1"):
        Request(prompt="fire", guidance_scale=scale)
