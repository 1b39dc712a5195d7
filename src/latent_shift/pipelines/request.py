"""A request for a clip, as a person makes it: words, files, numbers; and the one function that fulfils it.

The command, a server and the contact sheet use the same `Request`, so that checks, reading of pictures and
names are the same. Torch and diffusers are imported by `generate_clip`, so that a wrong request is refused
at once.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from latent_shift.models.prompt_syntax import parse_prompt
from latent_shift.pipelines.limits import check_effects, check_negative_prompt, check_numbers, size_multiple
from latent_shift.pipelines.schedulers import check_scheduler, make_scheduler
from latent_shift.runtime import check_seed, seed
from latent_shift.video import read, to_uint8

if TYPE_CHECKING:
    from torch import Tensor

    from latent_shift.pipelines.clip_pipeline import ClipPipeline

log = logging.getLogger("latent_shift")

_CALL_ARGUMENTS = (
    "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "shared_noise", "noise_correlation",
    "loop", "strength", "chunk", "halo",
)  # fmt: skip


class Clip(NamedTuple):
    """A generated clip: `(F, H, W, 3) uint8` frames, frames per second, and the settings it was generated
    with: those of the request, with the numbers that were left to the model."""

    frames: np.ndarray
    fps: float
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate. None leaves a number to the model.

    Args:
        prompt: text; "(words:1.4)" weights words, see `models/prompt_syntax.py`.
        then: frame -> text that the prompt has become there.
        negative_prompt: text to guide away from.
        num_frames: frames; 1 is an image.
        fps: frames per second of the result.
        width, height: pixels. None: in the shape of the video, else the model's.
        num_inference_steps, guidance_scale, shared_noise, noise_correlation, loop, strength, chunk, halo: as
            in a call of a pipeline.
        seed: the same seed gives the same clip.
        image, last_image: picture files: the first and the last frame.
        video: a video file to start from.
        mask: a picture or video file: white is generated anew, black stays.
        free_init: how often to sample (FreeInit), 2 or more.
        scheduler: name of a diffusers scheduler, such as "DDIM" or "EulerDiscrete".

    Raises:
        ValueError: numbers that are not finite, options that contradict each other or have no effect. This is
            checked before a model is loaded; what depends on the model is checked by `generate_clip`.
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
        check_effects(
            num_frames=self.num_frames, loop=self.loop, shared_noise=self.shared_noise, noise_correlation=self.noise_correlation,
            chunk=self.chunk, halo=self.halo, then=self.then,
        )  # fmt: skip
        check_numbers(
            **{name: getattr(self, name) for name in _CALL_ARGUMENTS if name not in ("negative_prompt", "loop")}, fps=self.fps
        )  # fmt: skip
        check_seed(self.seed)
        if self.guidance_scale is not None and self.guidance_scale not in (0, 1) and self.guidance_scale < 1:
            raise ValueError(
                f"guidance_scale={self.guidance_scale:g} has no effect; expected above 1, or 1 for no guidance"
            )
        for prompt in (self.prompt, *self.then.values(), self.negative_prompt or ""):
            parse_prompt(prompt)
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.free_init is not None and self.free_init < 2:
            raise ValueError(
                f"free_init must be 2 or more, got {self.free_init}; leave it out to sample once"
            )

    @property
    def name(self) -> str:
        """The prompt as a file name without suffix."""
        letters = "".join(letter if letter.isalnum() else "-" for letter in self.prompt.lower())
        # Names may have 255 bytes, and a letter may have 4.
        return letters[:60].encode()[:150].decode(errors="ignore").strip("-") or "clip"

    @property
    def files(self) -> dict[str, Path]:
        """The files that the request reads, by the names of their fields."""
        names = ("video", "image", "last_image", "mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def generate_clip(
    request: Request,
    pipe: ClipPipeline,
    *,
    on_step: Callable[[int, int], None] | None = None,
    on_latents: Callable[[np.ndarray], None] | None = None,
) -> Clip:
    """Generate the clip of a request. An error that `on_step` or `on_latents` raises ends it.

    Args:
        request: what to generate.
        pipe: a loaded pipeline. It is not changed: the request has a scheduler and settings of its own.
        on_step: called after every step with (steps done, steps in all) of the current pass (FreeInit makes
            several).
        on_latents: called before that, with the clean latents `(C, F, h, w) float32` that the step predicts.

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
    check_negative_prompt(request.negative_prompt, guidance_scale)
    height, width = _resolve_size(pipe, request)
    request = replace(request, height=height, width=width)

    def report(
        pipe: ClipPipeline, index: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if on_latents is not None:
            on_latents(tensors.pop("pred_original_sample")[0].float().cpu().numpy())
        if on_step is not None:
            on_step(index + 1, pipe.num_timesteps)
        return tensors

    arguments = {name: getattr(request, name) for name in _CALL_ARGUMENTS} | _read_pictures(pipe, request)
    prompt = {0: request.prompt, **request.then} if request.then else request.prompt
    observed = ("pred_original_sample",) if on_latents is not None else ()
    (clips,) = pipe(
        prompt, generator=seed(request.seed), callback_on_step_end=report, return_dict=False,
        callback_on_step_end_tensor_inputs=("latents", *observed), **arguments
    )  # fmt: skip
    settings = _settings(request, pipe, num_frames=len(clips[0]))
    return Clip(to_uint8(clips[0]), settings["fps"], settings)


def _settings(request: Request, pipe: ClipPipeline, *, num_frames: int) -> dict[str, Any]:
    """Return what a request sets, with the model's numbers where it leaves them out."""
    fields = {
        name: value
        for name, value in vars(request).items()
        if value is not None and value is not False and value != {}
    }
    unused = {"distilled_steps"}  # says what the model is, not how it is called
    if num_frames == 1:
        unused |= {"shared_noise", "noise_correlation"}
    defaults = {name: value for name, value in pipe.call_defaults.items() if name not in unused}
    paths = {name: str(path) for name, path in request.files.items()}
    scheduler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
    return {
        **defaults,
        **fields,
        **paths,
        "num_frames": num_frames,
        "seed": request.seed,
        "scheduler": scheduler,
    }


def _resolve_size(pipe: ClipPipeline, request: Request) -> tuple[int, int]:
    """Return height and width of the clip: a request's own; else the shape of its video, with as many pixels
    as the model was trained on; else the model's. Log which files are cut to that shape.

    Raises:
        ValueError: a film or animation for one frame.
    """
    shapes = {}
    for name, path in request.files.items():
        frames, fps = read(path, num_frames=1)
        shapes[path] = frames.shape[1:3]
        if name in ("image", "last_image") and fps:
            raise ValueError(
                f"{path}: has several frames; expected a picture for {name}; pass a film as video"
            )
    height, width = request.height, request.width
    if request.video is not None and None in (height, width):
        height, width = size_like(
            shapes[request.video], height, width, model_size=pipe.resolve_size(None, None), 
            multiple=size_multiple(pipe.vae_scale_factor, pipe.unet.config),
        )  # fmt: skip
    height, width = pipe.resolve_size(height, width)
    for path, (rows, columns) in shapes.items():
        ratio = rows * width / (columns * height)
        if (cut := 1 - min(ratio, 1 / ratio)) > 0.1:
            log.warning(
                "%s: %.0f%% of its %dx%d pixels are cut away, because the clip has %dx%d", path, 100 * cut, columns, rows, width, height
            )  # fmt: skip
    return height, width


def size_like(
    shape: tuple[int, int],
    height: int | None,
    width: int | None,
    *,
    model_size: tuple[int, int],
    multiple: int,
) -> tuple[int, int]:
    """Return height and width of a clip in the shape of a video.

    Args:
        shape: height and width of the video.
        height, width: one that is given, or none: then with as many pixels as the model was trained on.
        model_size: height and width that the model was trained on.
        multiple: of which height and width have to be multiples.
    """
    aspect = shape[0] / shape[1]

    def nearest(number: float) -> int:
        return max(1, round(number / multiple)) * multiple

    if height is None and width is None:
        height = nearest(math.sqrt(math.prod(model_size) * aspect))
    if width is None:
        assert height is not None
        width = nearest(height / aspect)
    return (nearest(width * aspect) if height is None else height), width


def _read_pictures(pipe: ClipPipeline, request: Request) -> dict[str, Any]:
    """Read the files of a request at the size of the clip."""
    size, fps = [pipe.resolve_size(request.height, request.width)], pipe.call_defaults["fps"]
    pictures: dict[str, Any] = {}
    for name, path in (("image", request.image), ("last_image", request.last_image)):
        if path is not None:
            pictures[name] = read(path, size=size, num_frames=1)[0][0]
    if request.video is not None:
        video, _ = read(request.video, fps=fps, size=size, num_frames=request.num_frames)
        if request.num_frames is not None and len(video) < request.num_frames:
            raise ValueError(
                f"{request.video}: has {len(video)} frames at {fps:g} fps, fewer than num_frames={request.num_frames}"
            )
        pictures |= {"video": video, "num_frames": None}
    if request.mask is not None:
        most = request.num_frames or (1 if request.video is None else len(video) + 1)
        pictures["mask"], _ = read(request.mask, fps=fps, size=size, num_frames=most)
    return pictures
