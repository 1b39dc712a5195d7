"""Clips and masks as other libraries give them, and what a written file carries."""

import os
import resource
import signal

import av
import numpy as np
import pytest
import torch
from PIL import Image

import latent_shift as ls
from latent_shift import video
from latent_shift.video import pixels

CLIP = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
FIRST = torch.from_numpy(CLIP).permute(0, 3, 1, 2)
IMAGES = [Image.fromarray(frame) for frame in CLIP]
OPAQUE = np.concatenate([CLIP, np.full((5, 16, 24, 1), 255, np.uint8)], axis=-1)


@pytest.mark.parametrize(
    "clip",
    [
        CLIP,
        FIRST,
        FIRST.numpy(),
        CLIP / 255,
        CLIP.astype(np.float32),
        CLIP.astype(np.int64),
        CLIP.astype(np.uint16) * 257,
        FIRST / 255,
        FIRST.float(),
        (FIRST / 255).half(),
        (FIRST / 255).requires_grad_(),
        list(CLIP),
        list(FIRST),
        [frame / 255 for frame in CLIP],
        tuple(IMAGES),
        [image.convert("RGBA") for image in IMAGES],
        CLIP[None],
        FIRST[None] / 255,
        [FIRST[0], *FIRST[1:]],
        [IMAGES[0], *CLIP[1:4].astype(np.int64), FIRST[4].permute(1, 2, 0)],
        [CLIP[0] / 255, *(CLIP[1:] / np.float32(255))],
        [*(CLIP / 1.0)],
        OPAQUE,
        torch.from_numpy(OPAQUE).permute(0, 3, 1, 2),
        CLIP[:, ::-1][:, ::-1],
        (CLIP / 255 * 1.005).astype(np.float32) / np.float32(1.005),
    ],
    ids=lambda clip: f"{type(clip).__name__}-{getattr(clip, 'dtype', '')}",
)
def test_to_uint8_takes_usual_types_layouts_and_ranges(clip):
    result = video.to_uint8(clip)
    assert result.dtype == np.uint8
    assert np.abs(result.astype(int) - CLIP).max() <= (
        1 if "float16" in str(getattr(clip, "dtype", "")) else 0
    )


def test_to_uint8_takes_black_and_white_frames_beside_others():
    for white in (1.0, 255.0):
        frames = [np.zeros((16, 24, 3)), np.full((16, 24, 3), white), CLIP[0] / 255 * white]
        assert np.array_equal(video.to_uint8(frames), [CLIP[0] * 0, CLIP[0] * 0 + 255, CLIP[0]])


def test_to_uint8_takes_single_grey_and_transparent_images():
    grey = CLIP[0, ..., 0]
    expected = grey[None, ..., None].repeat(3, -1)
    for image in (
        grey,
        grey / 255,
        torch.from_numpy(grey),
        grey[..., None],
        grey[None, ..., None],
        Image.fromarray(grey),
    ):
        assert np.array_equal(video.to_uint8(image), expected)
    assert np.array_equal(video.to_uint8(CLIP[0]), CLIP[:1])
    assert np.array_equal(video.to_uint8(FIRST[0]), CLIP[:1])
    rgba = np.zeros((1, 2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    expected = np.array([[[200, 0, 0]] * 2, [[255] * 3] * 2], np.uint8)[None]
    for clip in (rgba, rgba / 255, Image.fromarray(rgba[0])):
        assert np.array_equal(video.to_uint8(clip), expected)


def with_value(value: float) -> np.ndarray:
    clip = (CLIP / 255).astype(np.float32)
    clip[0, 0, 0, 0] = value
    return clip


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        (
            with_value(np.nan),
            ValueError,
            r"0.0% of the pixels are NaN or infinite; .* try bfloat16 or float32",
        ),
        (np.full_like(CLIP, np.inf, np.float32), ValueError, r"100.0% of the pixels are NaN or infinite"),
        (torch.full((2, 3, 8, 8), torch.nan), ValueError, "NaN or infinite"),
        (
            CLIP / 127.5 - 1,
            ValueError,
            r"expected pixels in 0..1 or 0..255, got -1 to 1; \(clip \+ 1\) / 2 converts",
        ),
        (with_value(1.5), ValueError, r"expected pixels in 0..1 or 0..255, got 0 to 1.5"),
        (with_value(300), ValueError, "got 0 to 300"),
        (CLIP.astype(np.int16) - 1, ValueError, "got -1 to 254"),
        (CLIP.astype(complex), TypeError, "expected numbers, got an array of complex128"),
        ([], ValueError, "expected one frame or more, got an empty list"),
        ([CLIP[0], CLIP[1, :8]], ValueError, r"expected frames of one size, got \(16, 24, 3\), \(8, 24, 3\)"),
        (
            [CLIP[0], CLIP[1] / 255],
            ValueError,
            "expected frames of one dtype, got float64, uint8; convert them first",
        ),
        ([CLIP[0], CLIP[1].astype(np.uint16)], ValueError, "got uint16, uint8"),
        (
            [CLIP[0] / 255, CLIP[1] / 1.0],
            ValueError,
            "expected frames of one range, got some in 0..1 and some above",
        ),
        (CLIP.astype(np.uint16), ValueError, "expected uint16 in 0..65535, got at most 255; use uint8"),
        ([FIRST[0], FIRST[1].bool()], ValueError, "got bool, uint8"),
        (
            CLIP[None].repeat(2, 0),
            ValueError,
            r"got the shape \(2, 5, 16, 24, 3\); pass one clip of the batch",
        ),
        (
            np.zeros((2, 8, 8, 7)),
            ValueError,
            r"expected frames \(F, H, W, C\) .* got the shape \(2, 8, 8, 7\)",
        ),
        (np.zeros((0, 8, 8, 3)), ValueError, r"got the shape \(0, 8, 8, 3\)"),
        ("clip.mp4", TypeError, "expected images, an array or a tensor, got str"),
        ([["a"]], TypeError, "got str"),
    ],
)
def test_to_uint8_refuses_other_ranges_and_shapes(clip, error, message):
    with pytest.raises(error, match=message):
        video.to_uint8(clip)


def test_to_frames_keeps_the_precision_of_floats():
    clip = torch.rand(3, 3, 8, 8, generator=ls.seed(0))
    assert np.array_equal(video.to_frames(clip), clip.permute(0, 2, 3, 1).numpy())


MASK = np.zeros((16, 24), bool)
MASK[:, :12] = True


@pytest.mark.parametrize("num_frames", [2, 3, 4, 5])
def test_to_masks_takes_one_for_each_frame(num_frames):
    masks = np.stack([np.roll(MASK, 3 * k, axis=1) for k in range(num_frames)])
    for value in (
        masks,
        masks.astype(np.uint8),
        list(masks),
        torch.from_numpy(masks).float(),
        masks[..., None],
    ):
        assert np.array_equal(video.to_masks(value, num_frames), masks)


METADATA = {"prompt": 'a "café"\n日本 🎬 \ud800 </tag>', "seed": "7", "long": "x" * 5000}


@pytest.mark.parametrize("suffix", video.OUTPUT_SUFFIXES)
def test_metadata_come_back(tmp_path, suffix):
    path = ls.save_video(CLIP, tmp_path / f"a{suffix}", metadata=METADATA)
    assert video.read_metadata(path) == METADATA
    assert len(video.read(path)[0]) == (1 if suffix == ".png" else 5)
    assert video.read_metadata(ls.save_video(CLIP, tmp_path / f"b{suffix}")) == {}


def test_read_metadata_ignores_comments_of_other_programs(tmp_path):
    for comment in ("made with GIMP", "[1, 2]", '{"a": 1}', "null"):
        IMAGES[0].save(tmp_path / "a.gif", comment=comment.encode())
        assert video.read_metadata(tmp_path / "a.gif") == {}
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(
        ValueError, match=r"a.txt: cannot be decoded: not a video or picture of a known format"
    ):
        video.read_metadata(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("size", [64, 800])
def test_write_marks_the_colours(tmp_path, suffix, size):
    """Players guess those of unmarked files by the size."""
    colours = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)], np.uint8)
    frames = np.repeat(colours, size // 4, axis=0)[None, None].repeat(size, 1).repeat(2, 0)
    path = video.write(frames, tmp_path / f"a{suffix}")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range) == (1, 1, 1, 1)
    read = video.read(path)[0][0, size // 2, size // 8 :: size // 4]
    assert np.abs(read.astype(int) - colours).max() <= 6


@pytest.mark.parametrize("suffix", video.OUTPUT_SUFFIXES)
def test_write_on_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, suffix):
    """A limit on the size of files has the same effect as a full disk."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 128, 128, 3), np.uint8)
    path = video.write(CLIP, tmp_path / f"a{suffix}")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="the disk is full; free some space") as error:
            video.write(frames, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_write_takes_names_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in video.OUTPUT_SUFFIXES:
        path = video.write(CLIP, f"take:1{suffix}")
        assert str(path) == f"take:1{suffix}"
        assert len(video.read(path)[0]) == (1 if suffix == ".png" else 5)


@pytest.mark.parametrize(
    ("suffix", "fps", "message"),
    [
        (".mp4", float("nan"), "fps must be above 0 and finite, got nan"),
        (".mp4", float("inf"), "fps must be above 0 and finite, got inf"),
        (".png", float("inf"), "fps must be above 0 and finite, got inf"),
        (".gif", 0, "fps must be above 0 and finite, got 0"),
        (".mp4", -8, "fps must be above 0 and finite, got -8"),
        (".mp4", "8", "fps must be above 0 and finite, got '8'"),
        (".mp4", None, "fps must be above 0 and finite, got None"),
        (".mp4", True, "fps must be above 0 and finite, got True"),
        (".webp", 2000, r"a \.webp shows at most 1000 frames a second, got 2000"),
        (".webm", 1e-6, r"a \.webm shows at least 0.001 frames a second, got 1e-06"),
    ],
)
def test_check_output_refuses_rates_before_the_work(suffix, fps, message):
    with pytest.raises(ValueError, match=message):
        video.check_output(f"a{suffix}", fps=fps)


@pytest.mark.parametrize(("suffix", "width"), [(".webp", 17000), (".gif", 70000), (".mp4", 70000)])
def test_write_refuses_sizes_of_the_format(tmp_path, suffix, width):
    with pytest.raises(ValueError, match=rf"a{suffix}: frames of {width}x8 pixels cannot be encoded: "):
        video.write(np.zeros((2, 8, width, 3), np.uint8), tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_overshoot_is_that_of_the_documentation():
    assert pixels.OVERSHOOT == 0.01
