"""Pictures of a call as the latents that sampling works on; and latents back as frames.

Shapes: B clips of F frames, N = B*F; C channels.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_shift.models.autoencoder import decode_latents, encode_frames, upcast
from latent_shift.pipelines.denoise import KnownFrames

Pictures = Any
"""Anything diffusers' image processors take: images, arrays `(F, H, W, 3)`, tensors `(F, 3, H, W)`; floats
in [0, 1]."""


def check_family_arguments(pipe, family: dict[str, Any]) -> None:
    """Raise TypeError for an argument that neither a call nor the model family takes; name the nearest
    one."""
    for name in set(family) - set(pipe.family_arguments):
        arguments = [*pipe.family_arguments, *inspect.signature(type(pipe).__call__).parameters]
        nearest = difflib.get_close_matches(name, arguments, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"{type(pipe).__name__} has no argument {name!r}{hint}")


def resolve_num_frames(
    pipe, num_frames: int | None, *, image, last_image, video, mask, strength, loop: bool
) -> int:
    """Return the number of frames of a clip; raise ValueError for pictures that contradict each other."""
    conflicts = (
        (
            video is not None and (image is not None or last_image is not None),
            "a video or an image to start from, not both",
        ),
        (last_image is not None and image is None, "an image before last_image"),
        (mask is not None and video is None, "a video for the mask to lie over"),
        (
            strength is not None and video is None and image is None,
            "a video or an image for strength to start from",
        ),
        (strength is not None and not 0 < strength <= 1, f"strength above 0 and up to 1, not {strength}"),
        (last_image is not None and loop, "a last_image or a loop, not both"),
        (
            pipe.free_init_enabled and (video is not None or image is not None),
            "no image or video with FreeInit, which starts from noise",
        ),
    )
    for conflict, message in conflicts:
        if conflict:
            raise ValueError(f"expected {message}")
    if video is not None:
        if num_frames not in (None, len(video)):
            raise ValueError(
                f"the video has {len(video)} frames, num_frames is {num_frames}: expected the same, or no num_frames"
            )
        return len(video)
    num_frames = pipe.call_defaults["num_frames"] if num_frames is None else num_frames
    least = 1 + (image is not None) + (last_image is not None)
    if least > max(num_frames, 1):
        raise ValueError(
            f"num_frames must be {least} or more with the pictures that are given, got {num_frames}"
        )
    return int(num_frames)


def known_frames(
    pipe, *, image: Pictures, last_image: Pictures, video: Pictures, mask: Pictures, noise: Tensor, height: int, width: int,
    batch_size: int,
) -> KnownFrames | None:  # fmt: skip
    """Return what the given pictures fix of a clip, or None without any."""
    if image is None and video is None:
        return None
    num_frames = noise.shape[2]
    if video is not None:
        clean = encode_pictures(pipe, video, height, width, batch_size).to(noise)
        mask = None if mask is None else latent_mask(mask, num_frames, noise.shape[-2:]).to(noise)
    else:
        ends = [
            encode_pictures(pipe, picture, height, width, 1).to(noise)
            for picture in (image, last_image)
            if picture is not None
        ]
        clean = ends[0].repeat(1, 1, num_frames, 1, 1)
        mask = torch.ones(1, 1, num_frames, 1, 1).to(noise)
        mask[:, :, 0] = 0
        if last_image is not None:
            clean[:, :, num_frames // 2 :], mask[:, :, -1] = ends[1], 0
    return KnownFrames(clean, noise / pipe.scheduler.init_noise_sigma, mask)


def encode_pictures(pipe, pictures: Pictures, height: int, width: int, batch_size: int) -> Tensor:
    """Encode pictures to the means of their latents `(1, C, F, h, w)`, each frame independently."""
    if isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8:
        pictures = pictures / np.float32(255)
    pixels_N3HW = pipe.image_processor.preprocess(pictures, height, width)
    with upcast(pipe.vae, when=needs_upcast(pipe)):
        latents_NChw = encode_frames(
            pipe.vae, pixels_N3HW, device=pipe._execution_device, batch_size=batch_size
        )
    return latents_NChw.transpose(0, 1)[None]


def decode_clips(pipe, latents: Tensor, batch_size: int, output_type: str) -> Tensor | np.ndarray | list:
    """Decode `(B, C, F, h, w)` latents to frames of an `output_type`, each frame independently, `batch_size`
    at a time."""
    with upcast(pipe.vae, when=needs_upcast(pipe)):
        pixels_N3HW = decode_latents(pipe.vae, latents.transpose(1, 2).flatten(0, 1), batch_size=batch_size)
    pixels_B3FHW = (
        pipe.postprocess_pixels(pixels_N3HW, latents.dtype).unflatten(0, (len(latents), -1)).transpose(1, 2)
    )
    return pipe.video_processor.postprocess_video(pixels_B3FHW, output_type=output_type)


def needs_upcast(pipe) -> bool:
    """Return whether the autoencoder overflows in half precision, as that of Stable Diffusion XL says of
    itself."""
    return hasattr(pipe, "upcast_vae") and bool(getattr(pipe.vae.config, "force_upcast", False))


def latent_mask(mask: Pictures, num_frames: int, size: tuple[int, ...]) -> Tensor:
    """Convert one picture or F, white where something new is generated, to `(1, 1, F, h, w)` of 0 and 1. A
    latent is new if half of its pixels are."""
    single = isinstance(mask, Image.Image) or (not isinstance(mask, (list, tuple)) and np.ndim(mask) != 3)
    pictures = [mask] if single else list(mask)
    masks = [
        np.asarray(picture.convert("L") if isinstance(picture, Image.Image) else picture)
        for picture in pictures
    ]
    if len(masks) not in (1, num_frames) or any(picture.ndim != 2 for picture in masks):
        raise ValueError(
            f"expected one mask (H, W) or {num_frames}, got {len(masks)} of shape {masks[0].shape}"
        )
    scaled = [
        torch.from_numpy(picture / np.float32(255 if picture.dtype == np.uint8 else 1)).float()
        for picture in masks
    ]
    resized = torch.nn.functional.interpolate(torch.stack(scaled)[:, None], size, mode="area") >= 0.5
    return resized.float().expand(num_frames, -1, -1, -1).transpose(0, 1)[None]
