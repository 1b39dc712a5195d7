"""Pictures, videos and masks of the usual types, ranges and modes: converted to the same frames, or refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_modes import sd

from latent_shift.pipelines.pictures import to_frames, to_masks, to_picture
from latent_shift.runtime import seed

VIDEO = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), np.uint8)
UNIT = VIDEO / np.float32(255)
TENSOR = torch.from_numpy(VIDEO).permute(0, 3, 1, 2)


def as_array(frames) -> np.ndarray:
    return (
        frames
        if isinstance(frames, np.ndarray)
        else np.stack([np.asarray(frame) for frame in frames]) / np.float32(255)
    )


@pytest.mark.parametrize(
    "video",
    [
        VIDEO, UNIT, UNIT.astype(np.float64), VIDEO.astype(np.int64), VIDEO.astype(np.float32), VIDEO.astype(np.uint16) * 257,
        VIDEO[None], np.moveaxis(VIDEO, -1, 1), np.moveaxis(VIDEO, -1, 0), list(VIDEO), list(UNIT), tuple(VIDEO),
        [Image.fromarray(frame) for frame in VIDEO], [Image.fromarray(VIDEO[0]), *VIDEO[1:]], TENSOR, TENSOR / 255, TENSOR.float(),
        list(TENSOR), TENSOR[None], TENSOR.transpose(0, 1)[None], torch.from_numpy(VIDEO),
        np.concatenate([VIDEO, np.full((5, 8, 12, 1), 255, np.uint8)], axis=-1),
    ],
)  # fmt: skip
def test_to_frames_reads_the_usual_types_alike(video):
    frames = as_array(to_frames(video, "video"))
    assert frames.shape == UNIT.shape and frames.dtype == np.float32
    np.testing.assert_allclose(frames, UNIT, atol=2e-3 if isinstance(video, torch.Tensor) else 1e-6)


def test_to_frames_reads_grey_videos():
    for grey in (
        VIDEO[..., 0],
        VIDEO[..., :1],
        VIDEO[..., 0] > 127,
        torch.from_numpy(VIDEO[:, None, ..., 0]),
    ):
        frames = to_frames(grey, "video")
        assert frames.shape == (5, 8, 12, 3) and (frames == frames[..., :1]).all()
    np.testing.assert_allclose(to_frames(VIDEO[..., 0], "video")[..., 1], UNIT[..., 0])


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
)
def test_to_picture_reads_images_of_every_mode(mode):
    """A black image with a white half is that in every mode."""
    half = np.zeros((8, 12), np.uint8)
    half[:, :6] = 255
    image = Image.fromarray(half)
    if mode in ("I;16", "I"):
        image = Image.fromarray(half.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(half / np.float32(255))
    elif mode == "LAB":
        image = Image.merge("LAB", [image, *[Image.new("L", image.size, 128)] * 2])
    elif mode != "L":
        image = (
            image.convert("RGB").convert(mode)
            if mode not in ("LA", "PA")
            else image.convert("LA").convert(mode)
        )
    assert image.mode == mode
    picture = to_picture(image, "image")
    assert picture.mode == "RGB"
    np.testing.assert_allclose(np.asarray(picture)[..., 0], half, atol=2)
    np.testing.assert_allclose(np.asarray(picture)[..., 2], half, atol=2)


def test_to_picture_puts_transparent_pixels_over_white():
    rgba = np.full((8, 12, 4), 255, np.uint8)
    rgba[..., 1:3], rgba[:, 6:, 3] = 0, 0  # red, and nothing
    expected = np.full((8, 12, 3), 1.0)
    expected[:, :6, 1:] = 0
    palette = Image.fromarray(rgba).convert("RGBA").quantize(8)
    for picture in (rgba, torch.from_numpy(rgba).permute(2, 0, 1), Image.fromarray(rgba), palette):
        result = to_picture(picture, "image")
        result = result if isinstance(result, np.ndarray) else np.asarray(result) / 255
        np.testing.assert_allclose(result, expected, atol=1e-2)


def test_to_picture_turns_photos_upright():
    image = Image.fromarray(VIDEO[0])
    image.getexif()[274] = 6  # turned by 90 degrees
    assert to_picture(image, "image").size == (8, 12)


MASK = np.zeros((8, 12), np.uint8)
MASK[:, :6] = 255


@pytest.mark.parametrize(
    "mask",
    [
        MASK, MASK // 255, MASK > 0, MASK / 255, (MASK // 255).astype(np.int64), MASK.astype(np.float32), MASK[..., None], MASK[None],
        np.stack([MASK] * 3, axis=-1), torch.from_numpy(MASK), torch.from_numpy(MASK)[None].expand(3, -1, -1),
        torch.from_numpy(MASK > 0)[None], Image.fromarray(MASK), Image.fromarray(MASK).convert("1"), Image.fromarray(MASK).convert("RGB"),
        [MASK] * 5, [Image.fromarray(MASK)] * 5, np.stack([MASK] * 5), np.stack([MASK] * 5)[..., None], np.stack([MASK] * 5)[:, None],
    ],
)  # fmt: skip
def test_to_masks_reads_the_usual_types_alike(mask):
    masks = to_masks(mask, 5)
    assert masks.dtype == np.float32 and len(masks) in (1, 5)
    np.testing.assert_allclose(masks, np.broadcast_to(MASK / 255, masks.shape))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (
            UNIT * 2 - 1,
            r"video: expected floats from 0 to 1 or whole numbers .* \(x \+ 1\) / 2 brings -1..1 to 0..1",
        ),
        (UNIT * 7, "video: expected floats from 0 to 1 or whole numbers from 0 to 255, got 0 to 7"),
        (VIDEO.astype(int) - 128, "got -128 to 127"),
        (np.full_like(UNIT, np.nan), "video: holds NaN"),
        (VIDEO.astype(str), "video: expected PIL images, arrays or tensors of numbers, got an array of <U"),
        ("clip.mp4", "video: expected PIL images, arrays or tensors of numbers, got str"),
        ([], "video: expected a video, got an empty list"),
        (Image.fromarray(VIDEO[0]), "video: expected a video, got one picture"),
        (VIDEO[0], r"video: expected shape \(F, H, W, 3\) or \(F, 3, H, W\), got \(8, 12, 3\)"),
        (np.zeros((5, 8, 12, 2)), r"got \(5, 8, 12, 2\)"),
        (np.zeros((2, 5, 8, 12, 3)), r"got \(2, 5, 8, 12, 3\)"),
        (np.zeros((0, 8, 12, 3)), r"video: expected pixels, got shape \(0, 8, 12, 3\)"),
        ([VIDEO[0], VIDEO[0, :4]], "expected frames of one size"),
    ],
)
def test_to_frames_refuses_what_could_mean_two_things(video, message):
    with pytest.raises(ValueError, match=message):
        to_frames(video, "video")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (VIDEO[:3, ..., 0], r"expected one mask \(H, W\) or 5, got shape \(3, 8, 12\)"),
        (np.zeros((8, 12, 4)), "got four channels"),
        (Image.new("RGBA", (12, 8)), "got transparency"),
        ([], "expected masks of one size"),
        (MASK / 100, "mask: expected floats from 0 to 1"),
    ],
)
def test_to_masks_refuses_other_pictures(mask, message):
    with pytest.raises(ValueError, match=message):
        to_masks(mask, 5)


def test_call_takes_pictures_of_any_type(texts):
    pipe = sd(texts)

    def clip(**pictures):
        arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": seed(0)}
        return pipe("red", **arguments, **pictures).frames

    video = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    expected, masked, begun = clip(video=video), clip(video=video, mask=mask), clip(image=video[0])
    for given in (
        list(video),
        torch.from_numpy(video).permute(0, 3, 1, 2),
        [Image.fromarray(frame) for frame in video],
    ):
        torch.testing.assert_close(clip(video=given), expected, atol=1e-5, rtol=1e-5)
    for given in (mask // 255, mask > 0, torch.from_numpy(mask), Image.fromarray(mask)):
        torch.testing.assert_close(clip(video=video, mask=given), masked, atol=1e-5, rtol=1e-5)
    for given in (
        Image.fromarray(video[0]).convert("RGBA"),
        [video[0]],
        video[:1],
        torch.from_numpy(video[0]).permute(2, 0, 1),
    ):
        torch.testing.assert_close(clip(image=given), begun, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"image: expected shape \(H, W, 3\) or \(3, H, W\), got \(4, 32, 32, 3\)"
    ):
        clip(image=video)


def test_pictures_shrink_smoothly(texts):
    """A fine checkerboard becomes grey, not stripes."""
    from latent_shift.pipelines.conditioning import encode_pictures

    pipe = sd(texts)
    board = (np.indices((96, 96)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    array = encode_pictures(pipe, to_frames([board], "video"), 32, 32, 1)
    grey = encode_pictures(pipe, np.full((1, 32, 32, 3), 0.5, np.float32), 32, 32, 1)
    assert (array - grey).abs().max() < 0.15 * grey.abs().max()
