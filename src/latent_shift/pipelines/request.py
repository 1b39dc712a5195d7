"""A request for a clip, as a person makes it: words, files, numbers; and the one function that fulfils it.

The command, a server and the contact sheet use the same `Request`, so that checks, reading of pictures and
names are the same. Torch and diffusers are imported by `generate_clip`, so that a wrong request is refused
at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from latent_shift.models.prompt_syntax import parse_prompt
from latent_shift.pipelines.limits import check_numbers
from latent_shift.pipelines.schedulers import check_scheduler, make_scheduler
from latent_shift.runtime import seed
from latent_shift.video import read, to_uint8

if TYPE_CHECKING:
    from torch import Tensor

    from latent_shift.pipelines.clip_pipeline import ClipPipeline

_CALL_ARGUMENTS = (
    "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "shared_noise", "noise_correlation",
    "loop", "strength", "chunk", "halo",
)  # fmt: skip


class Clip(NamedTuple):
    """A generated clip: `(F, H, W, 3) uint8` frames, and frames per second."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate. None leaves a number to the model.

    Args:
        prompt: text; "(words:1.4)" weights words, see `models/prompt_syntax.py`.
        then: frame -> text that the prompt has become there.
        negative_prompt: text to guide away from.
        num_frames: frames; 1 is an image.
        fps: frames per second of the result.
        width, height: pixels.
        num_inference_steps, guidance_scale, shared_noise, noise_correlation, loop, strength, chunk, halo: as
            in a call of a pipeline.
        seed: the same seed gives the same clip.
        image, last_image: picture files: the first and the last frame.
        video: a video file to start from.
        mask: a picture or video file: white is generated anew, black stays.
        free_init: how often to sample (FreeInit), 2 or more.
        scheduler: name of a diffusers scheduler, such as "DDIM" or "EulerDiscrete".

    Raises:
        ValueError: options that contradict each other or have no effect. This is checked before a model is
            loaded; what depends on the model is checked by `generate_clip`.
    """

    prompt: str
    then: Mapping[int, str] = field(default_factory=dict)
    negative_prompt: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    shared_noise: float | None = None
    noise_correlation: float | None = None
    loop: bool = False
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    chunk: int | None = None
    halo: int | None = None
    free_init: int | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.num_frames == 1:
            for name in ("loop", "shared_noise", "noise_correlation", "chunk", "then"):
                if getattr(self, name) not in (None, False, {}):
                    raise ValueError(f"{name} has no effect on one frame; expected num_frames of 2 or more")
        check_numbers(
            **{name: getattr(self, name) for name in _CALL_ARGUMENTS if name not in ("negative_prompt", "loop")}, fps=self.fps
        )  # fmt: skip
        if isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number from -2^63 to 2^64 - 1, got {self.seed}")
        for prompt in (self.prompt, *self.then.values(), self.negative_prompt or ""):
            parse_prompt(prompt)
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.halo is not None and self.chunk is None:
            raise ValueError("halo has no effect without chunk")
        if self.free_init is not None and self.free_init < 2:
            raise ValueError(
                f"free_init must be 2 or more, got {self.free_init}; leave it out to sample once"
            )

    @property
    def name(self) -> str:
        """The prompt as a file name without suffix."""
        letters = "".join(letter if letter.isalnum() else "-" for letter in self.prompt.lower())
        return letters[:60].strip("-") or "clip"


def generate_clip(
    request: Request, pipe: ClipPipeline, *, on_step: Callable[[int, int], None] | None = None
) -> Clip:
    """Generate the clip of a request.

    Args:
        request: what to generate.
        pipe: a loaded pipeline. It is not changed: the request has a scheduler and settings of its own.
        on_step: called after every step with (steps done, steps in all) of the current pass (FreeInit makes
            several).

    Raises:
        ValueError: a file that cannot be read, or a request that does not fit the model.
    """
    pipe = copy.copy(pipe)
    pipe.scheduler = (
        make_scheduler(request.scheduler, pipe.scheduler)
        if request.scheduler
        else copy.deepcopy(pipe.scheduler)
    )
    if request.free_init is not None:
        pipe.enable_free_init(request.free_init)
    guidance_scale = request.guidance_scale
    if guidance_scale is None:
        guidance_scale = pipe.call_defaults["guidance_scale"]
    if request.negative_prompt and guidance_scale <= 1:
        raise ValueError("negative_prompt has no effect without guidance; expected guidance_scale above 1")

    def report(
        pipe: ClipPipeline, index: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if on_step is not None:
            on_step(index + 1, pipe.num_timesteps)
        return tensors

    arguments = {name: getattr(request, name) for name in _CALL_ARGUMENTS} | _read_pictures(pipe, request)
    prompt = {0: request.prompt, **request.then} if request.then else request.prompt
    (clips,) = pipe(
        prompt, generator=seed(request.seed), callback_on_step_end=report, return_dict=False, **arguments
    )
    return Clip(to_uint8(clips[0]), pipe.call_defaults["fps"] if request.fps is None else request.fps)


def _read_pictures(pipe: ClipPipeline, request: Request) -> dict[str, Any]:
    """Read the files of a request at the size of the clip."""
    size, fps = [pipe.resolve_size(request.height, request.width)], pipe.call_defaults["fps"]
    pictures: dict[str, Any] = {}
    for name, path in (("image", request.image), ("last_image", request.last_image)):
        if path is not None:
            pictures[name] = read(path, size=size, num_frames=1)[0][0]
    if request.video is not None:
        video, _ = read(request.video, fps=fps, size=size, num_frames=request.num_frames)
        pictures |= {"video": video, "num_frames": None}
    if request.mask is not None:
        mask = read(request.mask, fps=fps, size=size)[0].mean(axis=-1) / 255
        num_frames = len(video) if request.video is not None else len(mask)
        pictures["mask"] = mask[0] if len(mask) == 1 else mask[:num_frames]
    return pictures
