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

from latent_shift import video as media
from latent_shift.models.autoencoder import decode_latents, encode_frames, upcast
from latent_shift.pipelines.denoise import KnownFrames
from latent_shift.pipelines.diagnosis import check_finite
from latent_shift.pipelines.limits import check_least_frames, check_pictures

Frames = np.ndarray | Tensor
"""`(F, H, W, 3)`, uint8 or float32 in [0, 1]; or latents `(F, C, h, w)`."""
Pictures = Any
"""Images, arrays, tensors or lists of them, in any form that `latent_shift.video.to_frames` takes, or `to_masks` for
masks; or latents `(F, C, h, w)`, scaled as the U-Net sees them."""


def to_pictures(
    pipe, *, image: Pictures, last_image: Pictures, video: Pictures, mask: Pictures, height: int, width: int
) -> dict[str, Any]:
    """Convert the pictures of a call to `Frames`, and the mask to `(1 or F, H, W) float32`.

    Raises:
        ValueError, TypeError: an unknown type, shape or range; the message names the argument.
    """
    pictures: dict[str, Any] = {"image": image, "last_image": last_image, "video": video, "mask": mask}
    for name, value in pictures.items():
        if value is None or (name == "mask" and video is None):
            continue
        try:
            if name == "mask":
                pictures[name] = media.to_masks(value, len(pictures["video"]))
            elif (latents := _given_latents(pipe, value, height, width)) is not None:
                if not bool(latents.isfinite().all()):
                    raise ValueError("holds NaN or infinite numbers")
                pictures[name] = latents
            elif name == "video" and not isinstance(value, (list, tuple)) and getattr(value, "ndim", 2) == 2:
                raise ValueError("expected a video, got one picture")
            else:
                pictures[name] = media.to_frames(value)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    return pictures


def _given_latents(pipe, pictures: Pictures, height: int, width: int) -> Tensor | None:
    """Return pictures that are latents `(F, C, h, w)`, as diffusers tells them, by their channels and size."""
    if isinstance(pictures, (list, tuple)) and {type(picture) for picture in pictures} == {Tensor}:
        stills = [picture if picture.ndim == 4 else picture[None] for picture in pictures]
        pictures = torch.cat(stills) if len({still.shape[1:] for still in stills}) == 1 else None
    channels = pipe.image_processor.config.vae_latent_channels
    shape = (channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    return pictures if isinstance(pictures, Tensor) and pictures.shape[1:] == shape else None


def check_family_arguments(pipe, family: dict[str, Any]) -> None:
    """Raise TypeError for an argument that neither a call nor the model family takes; name the nearest
    one."""
    for name in set(family) - set(pipe.family_arguments):
        arguments = [*pipe.family_arguments, *inspect.signature(type(pipe).__call__).parameters]
        nearest = difflib.get_close_matches(name, arguments, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"{type(pipe).__name__} has no argument {name!r}{hint}")


def check_image_prompts(pipe, images: Pictures, image_embeds: Any) -> None:
    """Raise ValueError for the arguments of an IP-Adapter that the model does not have, or that contradict
    each other, and for an adapter without its picture."""
    adapters = getattr(getattr(pipe.unet, "encoder_hid_proj", None), "image_projection_layers", None)
    if images is None and image_embeds is None:
        if adapters is not None:
            raise ValueError(
                "expected ip_adapter_image for the IP-Adapter of the model, or pipe.unload_ip_adapter() before"
            )
        return
    name = "ip_adapter_image" if images is not None else "ip_adapter_image_embeds"
    if adapters is None:
        raise ValueError(f"{name} has no effect without an IP-Adapter; call pipe.load_ip_adapter(...) first")
    if images is not None and image_embeds is not None:
        raise ValueError("expected ip_adapter_image or ip_adapter_image_embeds, not both")
    if images is not None and pipe.image_encoder is None:
        raise ValueError(
            "ip_adapter_image needs an image_encoder, which the model lacks; pass ip_adapter_image_embeds"
        )
    if image_embeds is None:
        return
    is_list = isinstance(image_embeds, (list, tuple)) and all(
        isinstance(embeds, Tensor) for embeds in image_embeds
    )
    if not is_list or len(image_embeds) != len(adapters):
        got = f"{len(image_embeds)} tensors" if is_list else type(image_embeds).__name__
        raise ValueError(
            f"expected ip_adapter_image_embeds as a list of {len(adapters)} tensors, one an adapter, got {got}"
        )


def resolve_num_frames(
    pipe, num_frames: int | None, *, image, last_image, video, mask, strength, loop: bool
) -> int:
    """Return the number of frames of a clip; raise ValueError for pictures that contradict each other."""
    check_pictures(
        image=image is not None, last_image=last_image is not None, video=video is not None, mask=mask is not None,
        strength=strength is not None, loop=loop, free_init=pipe.free_init_enabled,
    )  # fmt: skip
    if video is not None:
        if num_frames not in (None, len(video)):
            raise ValueError(
                f"the video has {len(video)} frames, num_frames is {num_frames}: expected the same, or no num_frames"
            )
        return len(video)
    num_frames = pipe.call_defaults["num_frames"] if num_frames is None else num_frames
    check_least_frames(num_frames, image=image is not None, last_image=last_image is not None)
    return int(num_frames)


def known_frames(
    pipe, *, image: Frames | None, last_image: Frames | None, video: Frames | None, mask: np.ndarray | None, noise: Tensor,
    height: int, width: int, num_videos: int, batch_size: int,
) -> KnownFrames | None:  # fmt: skip
    """Return what the given pictures fix of clips, `num_videos` for each prompt, or None without any."""
    if image is None and video is None:
        return None
    num_frames = noise.shape[2]
    if video is not None:
        clean = encode_pictures(pipe, video, height, width, batch_size).to(noise)
        new = None if mask is None else latent_mask(mask, num_frames, noise.shape[-2:]).to(noise)
    else:
        ends = [
            _still_of_each_clip(
                encode_pictures(pipe, picture, height, width, batch_size).to(noise), len(noise), num_videos
            )
            for picture in (image, last_image)
            if picture is not None
        ]
        clean = ends[0].repeat(1, 1, num_frames, 1, 1)
        new = torch.ones(1, 1, num_frames, 1, 1).to(noise)
        new[:, :, 0] = 0
        if last_image is not None:
            clean[:, :, num_frames // 2 :], new[:, :, -1] = ends[1], 0
    return KnownFrames(clean, noise / pipe.scheduler.init_noise_sigma, new)


def _still_of_each_clip(pictures_1CNhw: Tensor, num_clips: int, num_videos: int) -> Tensor:
    """Return one picture as `(1, C, 1, h, w)`, or one for each prompt as `(B, C, 1, h, w)`."""
    stills_NC1hw = pictures_1CNhw[0].transpose(0, 1)[:, :, None]
    num_prompts = num_clips // num_videos
    if len(stills_NC1hw) not in (1, num_prompts):
        raise ValueError(
            f"expected one picture, or one for each of the {num_prompts} prompts, got {len(stills_NC1hw)}"
        )
    return stills_NC1hw if len(stills_NC1hw) == 1 else stills_NC1hw.repeat_interleave(num_videos, dim=0)


def _resize(frames: np.ndarray, height: int, width: int) -> Any:
    """Resize frames smoothly where they shrink, which diffusers does for images alone."""
    if frames.shape[1:3] == (height, width):
        return frames / np.float32(255) if frames.dtype == np.uint8 else frames
    if frames.dtype == np.uint8:
        return [Image.fromarray(frame) for frame in frames]
    pixels_N3HW = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels_N3HW, (height, width), mode="bicubic", antialias=True)
    return resized.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def encode_pictures(pipe, pictures: Frames, height: int, width: int, batch_size: int) -> Tensor:
    """Encode pictures, as `to_pictures` returns them, to the means of their latents `(1, C, F, h, w)`, each
    independently; latents stay as they are."""
    if isinstance(pictures, Tensor):
        return pictures.to(pipe._execution_device).transpose(0, 1)[None]
    pixels_N3HW = pipe.image_processor.preprocess(_resize(pictures, height, width), height, width)
    with upcast(pipe.vae, when=needs_upcast(pipe)):
        latents_NChw = encode_frames(
            pipe.vae, pixels_N3HW, device=pipe._execution_device, batch_size=batch_size
        )
    return latents_NChw.transpose(0, 1)[None]


def decode_clips(
    pipe, latents: Tensor, batch_size: int, output_type: str
) -> tuple[Tensor | np.ndarray | list, list[list[bool]] | None]:
    """Decode `(B, C, F, h, w)` latents to frames of an `output_type`, each frame independently, `batch_size`
    at a time.

    Returns:
        The frames, and for each clip and frame whether the safety checker blackened it; None without one.
    """
    with upcast(pipe.vae, when=needs_upcast(pipe)):
        pixels_N3HW = decode_latents(pipe.vae, latents.transpose(1, 2).flatten(0, 1), batch_size=batch_size)
    check_finite(pipe, pixels_N3HW, "the decoded pixels")
    pixels_N3HW, flagged_N = pipe.postprocess_pixels(pixels_N3HW, latents.dtype)
    pixels_B3FHW = pixels_N3HW.unflatten(0, (len(latents), -1)).transpose(1, 2)
    frames = pipe.video_processor.postprocess_video(pixels_B3FHW, output_type=output_type)
    if flagged_N is None:
        return frames, None
    num_frames = latents.shape[2]
    return frames, [flagged_N[start : start + num_frames] for start in range(0, len(flagged_N), num_frames)]


def needs_upcast(pipe) -> bool:
    """Return whether the autoencoder overflows in half precision, as that of Stable Diffusion XL says of
    itself."""
    return hasattr(pipe, "upcast_vae") and bool(getattr(pipe.vae.config, "force_upcast", False))


def latent_mask(mask: np.ndarray, num_frames: int, size: tuple[int, ...]) -> Tensor:
    """Convert masks `(1 or F, H, W)`, 1 where something new is generated, to `(1, 1, F, h, w)` of 0 and 1. A
    latent is new if half of its pixels are."""
    resized = torch.nn.functional.interpolate(torch.from_numpy(mask)[:, None], size, mode="area") >= 0.5
    return resized.float().expand(num_frames, -1, -1, -1).transpose(0, 1)[None]
