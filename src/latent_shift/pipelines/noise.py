"""Initial noise of clips, and the generators that draw it.

Shapes: B clips, F frames, C channels, h w latent height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latent_shift.noise import correlated_noise
from latent_shift.shift_settings import is_whole

Generators = torch.Generator | list[torch.Generator] | None


def frame_noise(
    num_frames: int,
    shape_Chw: tuple[int, int, int],
    *,
    generator: torch.Generator | None = None,
    shared_noise: float = 0.0,
    noise_correlation: float = 0.0,
    loop: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the initial noise of one clip as images `(F, C, h, w)`: the argument `latents` of diffusers' own pipelines,
    inside `frames`. Flux takes them packed, as `pipe._pack_latents(noise, F, C, h, w)`.

    Args:
        num_frames: F.
        shape_Chw: shape of the latents of a frame, such as `(4, 128, 128)` for PixArt at 1024x1024.
        generator: draws the noise, such as `latent_shift.seed(0)`.
        shared_noise: fraction of the variance that all frames share, in [0, 1].
        noise_correlation: correlation of the rest between successive frames, in [0, 1).
        loop: the last frame leads into the first; for `frames(network, F, edge="wrap")`.
        dtype: of the result, that of the pipeline.

    Raises:
        ValueError: no frames, fractions outside their ranges, or anything but a generator.
    """
    shape = (num_frames, *shape_Chw) if isinstance(shape_Chw, (tuple, list)) else ()
    if len(shape) != 4 or not all(is_whole(side) and side >= 1 for side in shape):
        raise ValueError(
            f"expected num_frames and shape_Chw, three, as whole numbers of 1 or more, got {num_frames!r} and {shape_Chw!r}"
        )
    if not 0 <= shared_noise <= 1:
        raise ValueError(f"expected shared_noise between 0 and 1, got {shared_noise}")
    if not 0 <= noise_correlation < 1:
        raise ValueError(f"expected noise_correlation from 0 to below 1, got {noise_correlation}")
    check_generator(generator)
    channels, height, width = shape_Chw
    noise_BCFhw = draw_noise(
        (1, channels, num_frames, height, width), generator=generator, device=torch.device("cpu"), shared_noise=shared_noise,
        noise_correlation=noise_correlation, loop=loop,
    )  # fmt: skip
    return noise_BCFhw[0].transpose(0, 1).to(dtype)


def check_generator(generator: Any, num_clips: int | None = None) -> None:
    """Raise ValueError for anything but a generator, one for each of `num_clips` (None: a list is refused),
    or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if isinstance(generator, (list, tuple)) and num_clips is not None:
        if len(generator) != num_clips:
            raise ValueError(
                f"expected one generator or {num_clips}, one for each clip, got {len(generator)}"
            )
        if all(isinstance(each, torch.Generator) for each in generator):
            return
    kind = type(generator).__name__
    raise ValueError(f"expected generator as a torch.Generator, such as latent_shift.seed(0), got a {kind}")


def check_latents(latents: Any, shape: tuple[int, ...], factor: int) -> None:
    """Raise ValueError for latents that are not standard normal noise of a shape."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"expected latents as a tensor of floats, got {kind}")
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"expected latents of shape {shape} (clips, channels, frames, height/{factor}, width/{factor}), got {tuple(latents.shape)}"
        )
    if not latents.isfinite().all():
        raise ValueError("latents hold NaN or infinite numbers; expected standard normal noise")


def draw_noise(
    shape_BCFhw: tuple[int, int, int, int, int],
    *,
    generator: Generators,
    device: torch.device,
    shared_noise: float = 0.0,
    noise_correlation: float = 0.0,
    loop: bool = False,
) -> Tensor:
    """Draw standard normal noise `(B, C, F, h, w)` in float32.

    Shared noise is drawn first, then the noise of each frame. So one frame has the noise of diffusers' image
    pipeline, and a longer clip begins as a shorter one (except a loop with correlated noise, whose last frame
    leads into its first).
    """
    num_clips, channels, num_frames, height, width = shape_BCFhw
    num_shared = int(bool(shared_noise or noise_correlation) and num_frames > 1)
    num, frame_shape = num_shared + num_frames, (channels, height, width)
    by_clip = isinstance(generator, list)  # else frame by frame of all clips
    shape = (num_clips, num, *frame_shape) if by_clip else (num, num_clips, *frame_shape)
    noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    noise = noise if by_clip else noise.transpose(0, 1)
    if num_shared:
        noise = correlated_noise(noise[:, 1:], noise[:, :1], shared_noise, noise_correlation, loop=loop)
    return noise.transpose(1, 2)
