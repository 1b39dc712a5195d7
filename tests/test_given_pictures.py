"""Pictures, videos and masks that a call is given, in any usual type, range and mode; see also test_pixels.py."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_modes import sd

from latent_shift.pipelines.conditioning import encode_pictures
from latent_shift.runtime import seed
from latent_shift.video import to_frames, to_masks

VIDEO = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), np.uint8)
UNIT = VIDEO / np.float32(255)
TENSOR = torch.from_numpy(VIDEO).permute(0, 3, 1, 2)


@pytest.mark.parametrize("video", [np.moveaxis(VIDEO, -1, 0), TENSOR.transpose(0, 1)[None], VIDEO / 1.0])
def test_to_frames_reads_other_axes_and_whole_floats(video):
    frames = to_frames(video)
    frames = frames / 255 if frames.dtype == np.uint8 else frames
    np.testing.assert_allclose(frames, UNIT, atol=1e-6)


def test_to_frames_reads_grey_videos():
    for grey in (
        VIDEO[..., 0],
        VIDEO[..., :1],
        VIDEO[..., 0] > 127,
        torch.from_numpy(VIDEO[:, None, ..., 0]),
    ):
        frames = to_frames(grey)
        assert frames.shape == (5, 8, 12, 3) and (frames == frames[..., :1]).all()
    np.testing.assert_array_equal(to_frames(VIDEO[..., 0])[..., 1], VIDEO[..., 0])


def test_to_frames_refuses_dark_floats_of_an_unknown_range():
    with pytest.raises(ValueError, match=r"expected pixels in 0..1 or 0..255, got 0 to 7"):
        to_frames(UNIT * 7)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
)
def test_to_frames_reads_images_of_every_mode(mode):
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
    frames = to_frames(image)
    frames = frames if frames.dtype == np.uint8 else frames * 255
    for channel in (0, 2):
        np.testing.assert_allclose(frames[0, ..., channel].astype(float), half, atol=2)


def test_to_frames_turns_photos_upright():
    image = Image.fromarray(VIDEO[0])
    image.getexif()[274] = 6  # turned by 90 degrees
    assert to_frames(image).shape == (1, 12, 8, 3)


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
    ("mask", "message"),
    [
        (np.stack([MASK] * 2), r"expected one mask \(H, W\) or 5, got 2"),
        (np.zeros((8, 12, 4)), "got four channels"),
        (Image.new("RGBA", (12, 8)), "got transparency"),
        ([], "expected one frame or more, got an empty list"),
        (MASK / 100, "expected pixels in 0..1"),
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
    for arguments, error, message in (
        ({"image": video}, ValueError, "expected one picture, or one for each of the 1 prompts, got 4"),
        ({"image": "red.png"}, TypeError, "image: expected images, an array or a tensor, got str"),
        ({"image": video[0] / 127.5 - 1}, ValueError, r"image: expected pixels in 0..1 .* got -1 to 1"),
        ({"video": Image.fromarray(video[0])}, ValueError, "video: expected a video, got one picture"),
        ({"video": np.full(video.shape, np.nan)}, ValueError, "video: 100.0% of the pixels are NaN"),
        ({"video": video, "mask": mask[None, :8].repeat(3, 0)}, ValueError, "mask: expected"),
        ({"image": torch.full((1, 4, 4, 4), torch.nan)}, ValueError, "image: holds NaN or infinite numbers"),
        ({"mask": mask}, ValueError, "expected a video for the mask"),
    ):
        with pytest.raises(error, match=message):
            clip(**arguments)


def test_pictures_shrink_smoothly(texts, monkeypatch):
    """A fine checkerboard becomes grey, not stripes, in what the autoencoder sees."""
    pipe, seen = sd(texts), []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: seen.append(pixels) or encode(pixels))
    board = (np.indices((96, 96)).sum(axis=0) % 2)[None, ..., None].repeat(3, axis=-1)
    for frames in (board.astype(np.float32), board.astype(np.uint8) * 255):
        encode_pictures(pipe, to_frames(frames), 32, 32, 1)
        assert seen.pop().abs().max() < 0.02  # of pixels from -1 to 1
