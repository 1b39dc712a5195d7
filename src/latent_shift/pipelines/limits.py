"""Defaults and limits of the numbers of a call, for pipelines and requests. Nothing here imports torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

log = logging.getLogger("latent_shift")

CALL_DEFAULTS: dict[str, float] = {
    "num_frames": 16,
    "fps": 8,
    "shared_noise": 0.0,
    "noise_correlation": 0.0,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "distilled_steps": 0,
}
"""Defaults of a call for a model that brings none, and `distilled_steps`: the timesteps that a distilled model was trained
to step from, of which it samples in any divisor; 0 for other models."""
XL_GUIDANCE_SCALE = 5.0
"""The default of the Stable Diffusion XL family, as in diffusers."""

_LEAST = {
    "num_frames": 1, "height": 1, "width": 1, "num_inference_steps": 1, "num_videos_per_prompt": 1, "decode_batch_size": 1, "chunk": 1,
    "halo": 0,
}  # fmt: skip
"""Whole numbers, and their least values."""

_MOST = {"num_frames": 100_000, "height": 8192, "width": 8192}
"""The greatest values of some; a typing error would keep the machine busy without a sign."""

_RANGES = {"guidance_scale": (-100, 100), "guidance_rescale": (0, 1), "eta": (0, 1), "shared_noise": (0, 1)}
"""Real numbers, and their least and greatest values."""

_WITHOUT_DEFAULT = {"num_videos_per_prompt", "decode_batch_size", "eta", "guidance_rescale"}
"""Numbers that a model has no default of."""

_MOTION_OPTIONS = ("loop", "shared_noise", "noise_correlation", "chunk", "then")
"""Options that have no effect on one frame."""


def check_effects(
    *, num_frames: int | None = None, has_latents: bool = False, guided: bool = True, **options: Any
) -> None:
    """Raise ValueError for an option of a call, by name, that has no effect beside the others. A negative prompt without
    guidance gives a warning: diffusers ignores it, and scripts pass one always.

    Args:
        num_frames: frames of a clip; None: unknown, but several.
        has_latents: whether the call brings its own noise.
        guided: whether a negative prompt is used.
        options: as the caller passed them; None, False, 0 and nothing are as good as left out, except for
            `halo`.
    """
    for name in ("loop", "return_dict"):
        if not isinstance(options.get(name, False), bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r:.60}")
    passed = {name for name, value in options.items() if value is not None and _is_something(value)}
    for name in _MOTION_OPTIONS:
        if num_frames == 1 and name in passed:
            raise ValueError(f"{name} has no effect on one frame; expected num_frames of 2 or more")
    if options.get("halo") is not None and options.get("chunk") is None:
        raise ValueError("halo has no effect without chunk")
    for name in ("shared_noise", "noise_correlation"):
        if has_latents and name in passed:
            raise ValueError(f"{name} has no effect beside latents; expected one of them")
    for name in options:
        if name.startswith("negative_prompt") and name in passed and not guided:
            log.warning("%s %s", name, _UNUSED_NEGATIVE)


_UNUSED_NEGATIVE = (
    "has no effect without guidance; expected guidance_scale above 1, and a model that is not distilled"
)


def check_negative_prompt(negative_prompt: str | None, guidance_scale: float) -> None:
    """Raise ValueError for a negative prompt that no guidance would use."""
    if negative_prompt and guidance_scale <= 1:
        raise ValueError(f"negative_prompt {_UNUSED_NEGATIVE}")


def _is_something(value: Any) -> bool:
    """Return whether a value is more than nothing: not 0, and not only empty texts."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_something, value))
    return bool(value) if isinstance(value, (str, dict, Real)) else True


def possible_steps(distilled_steps: int) -> list[int]:
    """Return the numbers of sampling steps that a distilled model takes: they end at ends of its phases."""
    return [num for num in range(1, distilled_steps + 1) if distilled_steps % num == 0]


def check_distilled(
    num_inference_steps: int,
    distilled_steps: int,
    *,
    guided: bool,
    free_init: Any = None,
    scheduler: str | None = None,
) -> None:
    """Raise ValueError for a number of steps that a distilled model does not know, or for guidance.

    Args:
        num_inference_steps: of a call.
        distilled_steps: the default of the model, see `CALL_DEFAULTS`.
        guided: whether the call uses guidance.
        free_init: settings of FreeInit, if it is on.
        scheduler: name of another scheduler than the model's, if there is one.
    """
    if distilled_steps and scheduler not in (None, "DDIM", "DDIMScheduler"):
        raise ValueError(f"scheduler must be DDIM for this distilled model, got {scheduler}")
    if distilled_steps and free_init and free_init.use_fast_sampling:
        raise ValueError(
            "use_fast_sampling of FreeInit takes other steps than a distilled model knows; expected it off"
        )
    if distilled_steps and distilled_steps % num_inference_steps:
        raise ValueError(
            f"num_inference_steps of this distilled model must be one of {', '.join(map(str, possible_steps(distilled_steps)))}, got {num_inference_steps}; "
            "the model it was distilled from takes any number"
        )
    if distilled_steps and guided:
        raise ValueError(
            "guidance is part of this distilled model; expected guidance_scale 1, which is its default, or the model it was distilled from"
        )


def check_pictures(
    *, image: bool, last_image: bool, video: bool, mask: bool, strength: bool, loop: bool, free_init: bool
) -> None:
    """Raise ValueError for pictures and options of a call that contradict each other; each argument says whether it was
    passed."""
    conflicts = (
        (video and (image or last_image), "a video or an image to start from, not both"),
        (last_image and not image, "an image before last_image"),
        (mask and not video, "a video for the mask"),
        (strength and not video and not image, "a video or an image for strength to start from"),
        (last_image and loop, "a last_image or a loop, not both"),
        (free_init and (video or image), "no image or video with FreeInit, which starts from noise"),
    )
    for conflict, message in conflicts:
        if conflict:
            raise ValueError(f"expected {message}")


def check_least_frames(num_frames: int, *, image: bool, last_image: bool) -> None:
    """Raise ValueError for fewer frames than those that are given and one that is generated."""
    least = 1 + image + last_image
    if least > max(num_frames, 1):
        raise ValueError(
            f"num_frames must be {least} or more with the pictures that are given, got {num_frames}"
        )


def check_numbers(**numbers: float | None) -> None:
    """Raise ValueError for a number of a call, by name, that is out of its range; None is left to the
    model."""
    for name, number in numbers.items():
        if number is None:
            if name in _WITHOUT_DEFAULT:
                raise ValueError(f"{name} must be a number, got None")
            continue
        if name in _LEAST:
            whole = isinstance(number, Integral) and not isinstance(number, bool)
            if not whole or number < _LEAST[name]:
                kind = "" if whole else "a whole number, "
                raise ValueError(f"{name} must be {kind}{_LEAST[name]} or more, got {number!r}")
            if number > _MOST.get(name, math.inf):
                raise ValueError(f"{name} must be at most {_MOST[name]}, got {number}")
        elif not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number!r}")
        elif name == "noise_correlation" and not 0 <= number < 1:
            raise ValueError(f"noise_correlation must be from 0 to below 1, got {number}")
        elif name == "strength" and not 0 < number <= 1:
            raise ValueError(f"expected strength above 0 and up to 1, not {number}")
        elif name == "fps" and number <= 0:
            raise ValueError(f"fps must be above 0, got {number}")
        elif name in _RANGES and not _RANGES[name][0] <= number <= _RANGES[name][1]:
            raise ValueError(f"{name} must be from {_RANGES[name][0]} to {_RANGES[name][1]}, got {number:g}")


def size_multiple(factor: int, network: Mapping[str, Any]) -> int:
    """Return the pixels of which height and width have to be multiples: a latent's, or in a transformer a patch's.

    Args:
        factor: pixels to a side of a latent.
        network: configuration of the denoiser.
    """
    return factor * int(network.get("patch_size") or 1)


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise ValueError for a size in pixels that the network would cut."""
    if height % multiple or width % multiple:
        raise ValueError(f"expected height and width in multiples of {multiple}, got {height} and {width}")
