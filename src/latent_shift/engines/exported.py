"""A model exported to ONNX, and a pipeline that samples it with numpy around an engine: no torch, no diffusers.

The folder of an exported model holds

    exported.json         what a call takes for numbers that are left out, the sampler, the noise schedule
    unet.onnx             (sample, timestep, text, previous, next) -> output, see `shift.neighbors`
    decoder.onnx          latents (F, C, h, w) -> frames (F, H, W, 3) uint8
    text_encoder.onnx     (input_ids, attention_mask) (T, L) -> (T, L, D), of any number of texts
    tokenizer.json        of the library `tokenizers`
    names.safetensors, preview.safetensors   as in the model's folder

Shapes: F frames, C channels, h w latent height and width, L tokens, D width of the text embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from latent_shift.engines.runtimes import ENGINES, Engine
from latent_shift.engines.steps import Step, sampler_steps, timesteps_of
from latent_shift.files import check_schema, read_json_object, write_json
from latent_shift.models.prompt_syntax import parse_prompt
from latent_shift.noise import clip_noise
from latent_shift.pipelines.catalog import MODELS
from latent_shift.pipelines.limits import check_distilled, check_negative_prompt
from latent_shift.pipelines.provenance import describe
from latent_shift.pipelines.request import Clip, Request
from latent_shift.shift_settings import Edge

log = logging.getLogger("latent_shift")
SETTINGS = "exported.json"
PARTS = ("text_encoder", "unet", "decoder")
_UNSUPPORTED = (
    "then",
    "strength",
    "chunk",
    "halo",
    "free_init",
    "scheduler",
    "image",
    "last_image",
    "video",
    "mask",
)
"""Fields of a request that need the pipeline of PyTorch."""


class Settings(BaseModel):
    """exported.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1] = 1
    model: str
    num_frames: int = Field(ge=1)
    fps: float = Field(gt=0)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float
    shared_noise: float = Field(ge=0, le=1)
    noise_correlation: float = Field(ge=0, lt=1)
    distilled_steps: int = Field(ge=0)
    height: int = Field(ge=1, description="of the latents")
    width: int = Field(ge=1, description="of the latents")
    channels: int = Field(ge=1)
    factor: int = Field(ge=1, description="pixels per latent pixel of the decoder")
    multiple: int = Field(ge=1, description="of which height and width of the latents are multiples")
    edge: Edge
    sampler: Literal["ddim", "dpm-solver++"]
    spacing: Literal["trailing", "leading", "linspace"]
    offset: int = 0
    prediction: Literal["epsilon", "v_prediction"]
    alphas_cumprod: list[float] = Field(min_length=1)
    last_alpha: float = 1.0
    max_tokens: int = Field(ge=2)
    pad_token_id: int = Field(ge=0)
    sha256: dict[str, str] = {}


def is_exported(model: str | Path) -> bool:
    """Return whether a model is the folder of an exported one. A name of `MODELS` is not, whatever folder is called like it."""
    return str(model) not in MODELS and (Path(model) / SETTINGS).is_file()


def read_settings(folder: str | Path) -> Settings:
    """Read the settings of an exported model; raise ValueError for what is none."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise ValueError(
            f"{folder}: has no {SETTINGS}; expected a folder of `latent-shift export FOLDER --model MODEL`"
        )
    settings = read_json_object(path)
    check_schema(settings, Settings, path)
    return Settings(**settings)


@dataclass(frozen=True)
class _Call:
    """Numbers of a call, resolved."""

    num_frames: int
    height: int  # of the latents
    width: int
    guidance_scale: float
    steps: list[Step]


class ExportedPipeline:
    """Samples an exported model.

    Args:
        folder: written by `latent-shift export`.
        engine: a key of `ENGINES`.
        threads: of the CPU; None leaves it to the engine.

    Raises:
        ValueError: no exported model, or an unknown engine.
        RuntimeError: the engine's package is not installed.
    """

    def __init__(self, folder: str | Path, engine: str = "onnx", threads: int | None = None):
        from tokenizers import Tokenizer

        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}")
        self.folder, self.settings = Path(folder), read_settings(folder)
        self.engine: Engine = ENGINES[engine](self.folder, PARTS, threads)
        self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.settings.max_tokens)
        self._tokenizer.enable_padding(
            length=self.settings.max_tokens, pad_id=self.settings.pad_token_id, pad_token=self._tokenizer.id_to_token(self.settings.pad_token_id)
        )  # fmt: skip

    def generate(
        self,
        request: Request,
        *,
        on_step: Callable[[int, int], None] | None = None,
        on_latents: Callable[[np.ndarray], None] | None = None,
    ) -> Clip:
        """Generate the clip of a request.

        Args:
            request: prompt, negative prompt, numbers and loop. Files and the other options need PyTorch.
            on_step: called after every step with (steps done, steps in all).
            on_latents: called before that, with the clean latents `(C, F, h, w)` that the step predicts.

        Raises:
            ValueError: an option that the engine does not know, or numbers that do not fit the model.
        """
        call, settings = self._resolve(request), self.settings
        texts = [self.embed(request.prompt)]
        if call.guidance_scale > 1:
            texts.insert(0, self.embed(request.negative_prompt or ""))
        shared_noise = settings.shared_noise if request.shared_noise is None else request.shared_noise
        correlation = (
            settings.noise_correlation if request.noise_correlation is None else request.noise_correlation
        )
        noise = clip_noise(
            request.seed, (settings.channels, call.num_frames, call.height, call.width), shared_noise=shared_noise,
            noise_correlation=correlation, loop=request.loop,
        )  # fmt: skip
        neighbors = neighbor_indices(call.num_frames, "wrap" if request.loop else settings.edge)
        sample = np.ascontiguousarray(noise.swapaxes(0, 1))  # (F, C, h, w)
        clean_before = np.zeros_like(sample)
        for index, step in enumerate(call.steps):
            output = self._predict(sample, step.timestep, texts, neighbors, call.guidance_scale)
            clean = step.clean_sample * sample + step.clean_output * output
            sample = step.sample * sample + step.clean * clean + step.clean_before * clean_before
            sample, clean_before = sample.astype(np.float32), clean.astype(np.float32)
            if on_latents is not None:
                on_latents(np.ascontiguousarray(clean_before.swapaxes(0, 1)))
            if on_step is not None:
                on_step(index + 1, len(call.steps))
        frames = self.engine.run("decoder", {"latents": sample})
        fields = {
            name: value
            for name, value in vars(request).items()
            if value is not None and value is not False and value != {}
        }
        resolved: dict[str, Any] = {
            "num_inference_steps": len(call.steps), "guidance_scale": call.guidance_scale, "fps": settings.fps, **fields,
            "num_frames": call.num_frames, "height": call.height * settings.factor, "width": call.width * settings.factor,
            "engine": self.engine.name,
        }  # fmt: skip
        if call.num_frames > 1:
            resolved |= {"shared_noise": shared_noise, "noise_correlation": correlation}
        return Clip(frames, resolved["fps"], resolved)

    def describe(self, settings: Mapping[str, Any], command: Sequence[str] | None = None) -> dict[str, str]:
        """Return the metadata of a clip with these settings, see `provenance.describe`."""
        about = self.engine.describe()
        return describe(
            {**settings, "dtype": about["precision"]}, model=self.settings.model, hashes=self.settings.sha256, command=command,
            versions={self.engine.package: about["version"]},
        )  # fmt: skip

    def embed(self, prompt: str) -> np.ndarray:
        """Return the embedding `(1, L, D)` of a prompt; raise ValueError for one with weights. Warn of words that do not fit."""
        segments = parse_prompt(prompt)
        if any(weight != 1 for _, weight in segments):
            raise ValueError("prompt: weights such as (words:1.4) need --engine torch")
        text = "".join(words for words, _ in segments)
        if (tokens := self._tokenizer.encode(text)).overflowing:
            log.warning(
                "prompt is truncated to the %d tokens that the text encoder reads; not read of %.200r: %.200r",
                self.settings.max_tokens, text, text[max(end for _, end in tokens.offsets) :].strip(),
            )  # fmt: skip
        return self._encode([text])[0]

    def sentence_embeddings(self, texts: list[str]) -> np.ndarray:
        """Return unit vectors `(texts, D)`: the mean of the last hidden states of their tokens, as `names.embedder` does."""
        states, mask = self._encode(texts)
        weights = mask[..., None].astype(np.float32)
        mean = (states * weights).sum(axis=1) / weights.sum(axis=1)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the last hidden states `(T, L, D)` of texts and the mask `(T, L)` of their tokens."""
        tokens = self._tokenizer.encode_batch(texts)
        ids, mask = (
            np.array([getattr(each, name) for each in tokens], np.int64) for name in ("ids", "attention_mask")
        )
        return self.engine.run("text_encoder", {"input_ids": ids, "attention_mask": mask}), mask

    def _predict(
        self, sample: np.ndarray, timestep: int, texts: list[np.ndarray], neighbors: Mapping[str, np.ndarray], scale: float
    ) -> np.ndarray:  # fmt: skip
        inputs = {"sample": sample, "timestep": np.array([timestep], np.int64), **neighbors}
        outputs = [self.engine.run("unet", {**inputs, "text": text}) for text in texts]
        return outputs[0] if len(outputs) == 1 else outputs[0] + scale * (outputs[1] - outputs[0])

    def _resolve(self, request: Request) -> _Call:
        settings = self.settings
        for name in _UNSUPPORTED:
            if getattr(request, name):
                raise ValueError(f"{name} needs --engine torch: an exported model generates from a prompt")
        num_steps = request.num_inference_steps or settings.num_inference_steps
        scale = settings.guidance_scale if request.guidance_scale is None else request.guidance_scale
        num_timesteps = len(settings.alphas_cumprod)
        if num_steps > num_timesteps:
            raise ValueError(f"num_inference_steps must be at most {num_timesteps}, got {num_steps}")
        check_distilled(num_steps, settings.distilled_steps, guided=scale > 1)
        check_negative_prompt(request.negative_prompt, scale)
        sides = {}
        for name in ("height", "width"):
            pixels = getattr(request, name)
            unit = settings.factor * settings.multiple
            if pixels is not None and pixels % unit:
                raise ValueError(f"{name}={pixels}: an exported model takes multiples of {unit}")
            sides[name] = getattr(settings, name) if pixels is None else pixels // settings.factor
        steps = steps_of(settings, num_steps)
        return _Call(request.num_frames or settings.num_frames, **sides, guidance_scale=scale, steps=steps)


def steps_of(settings: Settings, num: int) -> list[Step]:
    """Return the steps of the model's sampler."""
    timesteps = timesteps_of(
        settings.sampler, num, num_timesteps=len(settings.alphas_cumprod), spacing=settings.spacing, offset=settings.offset
    )  # fmt: skip
    return sampler_steps(
        settings.sampler, timesteps, settings.alphas_cumprod, prediction=settings.prediction, last_alpha=settings.last_alpha
    )  # fmt: skip


def neighbor_indices(num_frames: int, edge: str) -> dict[str, np.ndarray]:
    """Return the inputs `previous` and `next` of the exported U-Net for one clip, see `shift.neighbors`."""
    frames = np.arange(num_frames)
    previous, following = frames - 1, frames + 1
    if edge == "wrap":
        previous, following = previous % num_frames, following % num_frames
    elif edge == "hold" or num_frames == 1:
        previous, following = previous.clip(0), following.clip(max=num_frames - 1)
    else:
        previous[0] = following[-1] = num_frames
    return {"previous": previous, "next": following}


def write_settings(settings: Settings, folder: Path) -> None:
    """Write exported.json."""
    write_json(settings.model_dump(), folder / SETTINGS)
