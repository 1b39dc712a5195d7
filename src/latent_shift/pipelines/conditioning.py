"""Inputs of a call, prompts and pictures, as the tensors that sampling works on; and latents back as frames.

Shapes: B clips of F frames, N = B*F; C channels; L tokens, D width of the text embeddings.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_shift.models import text
from latent_shift.models.autoencoder import decode_latents, encode_frames, upcast
from latent_shift.pipelines.denoise import KnownFrames
from latent_shift.video import to_frames, to_mask

Pictures = Any
"""Frames or masks in any form that `video.to_frames` or `video.to_mask` takes: images, arrays, tensors or lists of
them; or latents `(F, C, h, w)`, scaled as the U-Net sees them."""


def check_family_arguments(pipe, family: dict[str, Any]) -> None:
    """Raise TypeError for an argument that neither a call nor the model family takes; name the nearest
    one."""
    for name in set(family) - set(pipe.family_arguments):
        arguments = [*pipe.family_arguments, *inspect.signature(type(pipe).__call__).parameters]
        nearest = difflib.get_close_matches(name, arguments, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"{type(pipe).__name__} has no argument {name!r}{hint}")


def convert_pictures(**pictures: Pictures) -> tuple[np.ndarray | None, ...]:
    """Convert pictures by name with `to_frames`; raise ValueError for several where one is expected."""
    frames = {name: None if value is None else to_frames(value) for name, value in pictures.items()}
    for name, value in frames.items():
        if value is not None and name != "video" and len(value) != 1:
            raise ValueError(f"{name}: expected one image, got {len(value)} frames")
    return tuple(frames.values())


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


def encode_prompts(
    pipe, prompt: str | list[str] | dict[int, str] | None, *, negative_prompt, prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None, num_frames: int, num_videos: int, guided: bool, height: int, width: int,
    tensor_inputs: list[str], clip_skip: int | None, cross_attention_kwargs: dict | None, family: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """Encode prompts to the text inputs of the U-Net, by name: `(B, ...)` a clip, or `(B, F, ...)` where
    frames differ. With guidance each name also has a `negative_` one."""
    schedule = sorted(prompt.items()) if isinstance(prompt, dict) else []
    if isinstance(prompt, dict) and (not schedule or not 0 <= schedule[0][0] <= schedule[-1][0] < num_frames):
        raise ValueError(
            f"expected prompts for frames from 0 to {num_frames - 1}, got {[frame for frame, _ in schedule]}"
        )
    texts: Any = [words for _, words in schedule] if schedule else prompt
    frame_embeds: dict[str, Tensor] = {}
    for name, value in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if value is not None and value.ndim == 4:
            if value.shape[1] != num_frames:
                raise ValueError(f"expected {name} of {num_frames} frames, got {value.shape[1]}")
            frame_embeds[name] = value
    if "prompt_embeds" in frame_embeds:
        prompt_embeds = frame_embeds["prompt_embeds"][:, 0]
    if "negative_prompt_embeds" in frame_embeds:
        negative_prompt_embeds = frame_embeds["negative_prompt_embeds"][:, 0]
    num_each = 1 if schedule else num_videos
    plain, plain_negative = _without_weights(texts), _without_weights(negative_prompt)
    if isinstance(plain, list) and isinstance(plain_negative, str):
        plain_negative, negative_prompt = [plain_negative] * len(plain), [negative_prompt] * len(plain)
    options = dict(
        guided=guided, height=height, width=width, tensor_inputs=tensor_inputs, clip_skip=clip_skip,
        cross_attention_kwargs=cross_attention_kwargs,
    )  # fmt: skip
    embeds = pipe.encode_family_prompts(
        plain,
        plain_negative,
        prompt_embeds,
        negative_prompt_embeds,
        num_each=num_each,
        family=family,
        **options,
    )
    if not guided:
        embeds = {name: value for name, value in embeds.items() if not name.startswith("negative_")}
    for name, weighted, unweighted in (
        ("prompt_embeds", texts, plain),
        ("negative_prompt_embeds", negative_prompt, plain_negative),
    ):
        if unweighted != weighted and name in embeds:
            null = pipe.encode_family_prompts([""], None, None, None, num_each=1, family={}, **options)[
                "prompt_embeds"
            ]
            weights = text.prompt_weights(pipe, [weighted] if isinstance(weighted, str) else list(weighted))
            weights = weights.repeat_interleave(len(embeds[name]) // len(weights), dim=0).to(null)
            embeds[name] = torch.lerp(null, embeds[name], weights[:, :, None])
    for name, value in frame_embeds.items():
        if name in embeds:
            embeds[name] = value.repeat_interleave(num_videos, dim=0).to(embeds[name])
    if schedule:
        keys = [frame for frame, _ in schedule]
        for name, value in embeds.items():
            value = (
                value[:1] if name.startswith("negative_") else text.interpolate(value, keys, num_frames)[None]
            )
            embeds[name] = value.repeat_interleave(num_videos, dim=0)
    return embeds


def _without_weights(prompt: Any) -> str | list[str] | None:
    if isinstance(prompt, str):
        return text.without_weights(prompt)
    return prompt and [text.without_weights(words) for words in prompt]


def known_frames(
    pipe, *, image: Pictures, last_image: Pictures, video: Pictures, mask: Pictures, noise: Tensor, height: int, width: int,
    num_videos: int, batch_size: int,
) -> KnownFrames | None:  # fmt: skip
    """Return what the given pictures fix of clips, `num_videos` for each prompt, or None without any."""
    if image is None and video is None:
        return None
    num_frames = noise.shape[2]
    if video is not None:
        clean = encode_pictures(pipe, video, height, width, batch_size).to(noise)
        mask = None if mask is None else latent_mask(mask, num_frames, noise.shape[-2:]).to(noise)
    else:
        ends = [
            _still_of_each_clip(
                encode_pictures(pipe, picture, height, width, batch_size).to(noise), len(noise), num_videos
            )
            for picture in (image, last_image)
            if picture is not None
        ]
        clean = ends[0].repeat(1, 1, num_frames, 1, 1)
        mask = torch.ones(1, 1, num_frames, 1, 1).to(noise)
        mask[:, :, 0] = 0
        if last_image is not None:
            clean[:, :, num_frames // 2 :], mask[:, :, -1] = ends[1], 0
    return KnownFrames(clean, noise / pipe.scheduler.init_noise_sigma, mask)


def _still_of_each_clip(pictures_1CNhw: Tensor, num_clips: int, num_videos: int) -> Tensor:
    """Return one picture as `(1, C, 1, h, w)`, or one for each prompt as `(B, C, 1, h, w)`."""
    stills_NC1hw = pictures_1CNhw[0].transpose(0, 1)[:, :, None]
    num_prompts = num_clips // num_videos
    if len(stills_NC1hw) not in (1, num_prompts):
        raise ValueError(
            f"expected one picture, or one for each of the {num_prompts} prompts, got {len(stills_NC1hw)}"
        )
    return stills_NC1hw if len(stills_NC1hw) == 1 else stills_NC1hw.repeat_interleave(num_videos, dim=0)


def encode_pictures(pipe, pictures: Pictures, height: int, width: int, batch_size: int) -> Tensor:
    """Encode pictures to the means of their latents `(1, C, F, h, w)`, each independently; latents stay as they are."""
    if isinstance(pictures, (list, tuple)) and all(isinstance(picture, Tensor) for picture in pictures):
        pictures = torch.cat([picture.reshape(-1, *picture.shape[-3:]) for picture in pictures])
    if isinstance(pictures, Tensor) and pictures.ndim == 4:
        if pictures.shape[1] == pipe.image_processor.config.vae_latent_channels:
            return pictures.to(pipe._execution_device).transpose(0, 1)[None]
    frames = to_frames(pictures)
    frames = frames / np.float32(255) if frames.dtype == np.uint8 else frames
    pixels_N3HW = pipe.image_processor.preprocess(frames, height, width)
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
    mask_FHW = torch.from_numpy(to_mask(mask))
    if len(mask_FHW) not in (1, num_frames):
        raise ValueError(f"expected one mask (H, W) or {num_frames}, got {len(mask_FHW)}")
    resized = torch.nn.functional.interpolate(mask_FHW[:, None], size, mode="area") >= 0.5
    return resized.float().expand(num_frames, -1, -1, -1).transpose(0, 1)[None]
