"""What clients send and get: fields of a request, the video object, errors.

The shape is that of OpenAI's video API, as vLLM-Omni, SGLang and FastVideo speak it, with the fields of this
package beside. Nothing here imports torch.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from latent_shift.pipelines.limits import (
    check_distilled,
    check_least_frames,
    check_negative_prompt,
    check_pictures,
)
from latent_shift.pipelines.request import Request

MAX_CHARACTERS = 2000
"""Characters of a prompt."""
FILE_FIELDS = ("input_reference", "image", "last_image", "video", "mask")
"""Fields that are pictures or videos: files of a form, or data URLs in JSON."""


class ApiError(Exception):
    """An error that is returned to the client.

    Args:
        status: HTTP status.
        message: what was expected and what came.
        code: a word for programs.
        param: the field that it is about.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


def _parse_prompts(value: Any) -> Any:
    """Accept {frame: text} as JSON text, too, as forms send it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError('expected {frame: prompt} as JSON, such as {"8": "a lion"}') from None


Then = Annotated[dict[int, str], BeforeValidator(_parse_prompts)]


class VideoRequest(BaseModel):
    """Fields of `POST /v1/videos`. Those that are left out are the model's. Text such as "true" and "7" is coerced, because
    forms send nothing else."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(
        min_length=1, max_length=MAX_CHARACTERS, description="what to show; (words:1.4) weighs words"
    )
    model: str | None = Field(None, max_length=1000, description="one of /v1/models; the first if left out")
    seconds: float | None = Field(None, gt=0, le=3600, description="length of the clip; `num_frames` wins")
    size: str | None = Field(None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", description="WIDTHxHEIGHT in pixels")
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    num_frames: int | None = Field(None, ge=1, description="frames; 1 is an image")
    fps: float | None = Field(None, ge=0.1, le=1000, description="frames per second of the file")
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**64,
        description="the same seed gives the same clip; chosen by the server if left out",
    )
    negative_prompt: str | None = Field(None, max_length=MAX_CHARACTERS)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    loop: bool = Field(False, description="the last frame leads into the first")
    then: Then | None = Field(None, description="frame -> prompt from that frame on")
    strength: float | None = Field(None, gt=0, le=1, description="how much of the video or image is replaced")
    shared_noise: float | None = Field(None, ge=0, le=1)
    noise_correlation: float | None = Field(None, ge=0, lt=1)
    free_init: int | None = Field(None, ge=2, description="sampling passes of FreeInit")
    chunk: int | None = Field(None, ge=1, description="frames in memory at once")
    halo: int | None = Field(None, ge=0)
    scheduler: str | None = Field(None, max_length=100, description="name of a diffusers scheduler")


class ImageRequest(BaseModel):
    """Fields of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(min_length=1, max_length=MAX_CHARACTERS)
    model: str | None = Field(None, max_length=1000)
    n: int = Field(1, ge=1, le=10)
    size: str | None = Field(None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$")
    response_format: Literal["b64_json"] = "b64_json"
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    negative_prompt: str | None = Field(None, max_length=MAX_CHARACTERS)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer from 400 on."""

    error: ErrorDetail


class JobError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A video and the job that makes it."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    seed: int
    num_frames: int
    fps: float
    attempts: int = Field(description="how often it was begun; more than once if a worker died")
    queue_position: int | None = Field(description="1 is next; null unless queued")
    remixed_from_video_id: str | None = None
    error: JobError | None
    settings: dict[str, Any] = Field(description="what the request set; it makes the clip again")
    inputs: list[str] = Field(description="the fields that were files")


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


@dataclass(frozen=True)
class ModelInfo:
    """What the server knows of a model before it is loaded: defaults of a request, and the unit of its sizes."""

    id: str
    num_frames: int
    fps: float
    width: int | None
    height: int | None
    multiple: int
    num_inference_steps: int
    guidance_scale: float
    shared_noise: float
    noise_correlation: float
    distilled_steps: int
    description: str = ""
    examples: tuple[str, ...] = ()


def parse_fields(schema: type[BaseModel], fields: Mapping[str, Any]) -> Any:
    """Return a request; raise ApiError that names the first field that is wrong.

    Args:
        schema: `VideoRequest` or `ImageRequest`.
        fields: of a form or a JSON body. Empty text of an option means that it is left out.
    """
    given = {
        name: value
        for name, value in fields.items()
        if value is not None and (value != "" or name == "prompt")
    }
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            files = FILE_FIELDS if schema is VideoRequest else ()
            message = f"unknown field; expected some of {', '.join([*schema.model_fields, *files])}"
        elif first["type"] == "string_pattern_mismatch":
            message = "expected WIDTHxHEIGHT in pixels, such as 128x128"
        elif first["type"] == "missing":
            message = "is required"
        raise ApiError(
            400, f"{param}: {message}" if param else message, code="invalid_value", param=param
        ) from None


def resolve(request: VideoRequest, model: ModelInfo, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Request` for the fields of a client, checked.

    Args:
        request: the fields.
        model: its model.
        inputs: the names of the files that came with it.

    Raises:
        ApiError: fields that contradict each other, have no effect or do not fit the model.
    """
    fields = request.model_dump(exclude_none=True, exclude={"model", "seconds", "size"})
    if request.size is not None:
        width, height = map(int, request.size.split("x"))
        for name, value in (("width", width), ("height", height)):
            if fields.setdefault(name, value) != value:
                message = f"size={request.size} and {name}={fields[name]} differ"
                raise ApiError(400, message, code="invalid_value", param="size")
    if request.num_frames is None and request.seconds is not None:
        fields["num_frames"] = max(1, round(request.seconds * (request.fps or model.fps)))
    for name in ("width", "height"):
        side = fields.get(name)
        if side is not None and side % model.multiple:
            low = max(1, side // model.multiple) * model.multiple
            param = blamed_field(request, name)
            given = f"size={request.size}" if param == "size" else f"{name}={side}"
            message = (
                f"{given}: expected multiples of {model.multiple}, such as {low} or {low + model.multiple}"
            )
            raise ApiError(400, message, code="invalid_value", param=param)
    if "num_frames" not in fields and "video" not in inputs:
        fields["num_frames"] = model.num_frames
    fields.setdefault("seed", secrets.randbelow(2**31))
    if not fields["loop"]:
        del fields["loop"]
    check_request(fields, model, inputs)
    return fields


def blamed_field(request: VideoRequest, name: str) -> str:
    """Return the field of a request that a number came from: size for width and height, seconds for num_frames."""
    if name in ("width", "height") and request.size is not None:
        return "size"
    if name == "num_frames" and request.num_frames is None and request.seconds is not None:
        return "seconds"
    return name


def check_request(fields: Mapping[str, Any], model: ModelInfo, inputs: Mapping[str, Any]) -> None:
    """Raise ApiError for arguments of `Request` that it refuses, or that files would not fit."""
    try:
        Request(**fields)
        guidance_scale = fields.get("guidance_scale", model.guidance_scale)
        check_negative_prompt(fields.get("negative_prompt"), guidance_scale)
        check_distilled(
            fields.get("num_inference_steps", model.num_inference_steps),
            model.distilled_steps,
            guided=guidance_scale > 1,
            scheduler=fields.get("scheduler"),
        )
        present = {name: name in inputs for name in ("image", "last_image", "video", "mask")}
        check_pictures(
            **present,
            strength="strength" in fields,
            loop=fields.get("loop", False),
            free_init="free_init" in fields,
        )
        if not present["video"]:
            check_least_frames(fields["num_frames"], image=present["image"], last_image=present["last_image"])
    except (ValueError, OverflowError) as error:
        words = str(error).replace("=", " ").replace(":", " ").split()
        named = [word for word in words if word in VideoRequest.model_fields or word in FILE_FIELDS]
        param = next(
            (word for word in named if word in fields or word in inputs), named[0] if named else None
        )
        raise ApiError(400, str(error), code="invalid_value", param=param) from None
