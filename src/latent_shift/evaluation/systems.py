"""Text-to-video systems behind one interface, from prompts and seeds to clips: models of this package and
pipelines of diffusers.

The paper's CogVideo (Hong et al. 2022) has no maintained implementation; CogVideoX is its stronger successor
by the same group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch

from latent_shift.evaluation.features import digest
from latent_shift.models import sizes
from latent_shift.models.autoencoder import TINY
from latent_shift.models.baselines import LatentVDMUNet, PixelSpace, VDMUNet
from latent_shift.models.loading import one_line_errors
from latent_shift.models.parts import IndexSettings, read_settings
from latent_shift.models.prompt_syntax import escape_prompt
from latent_shift.pipelines import catalog, loading
from latent_shift.pipelines.clip_pipeline import ClipPipeline
from latent_shift.runtime import resolve_device, seed
from latent_shift.shift import Shift, has_temporal_layers, shift_of
from latent_shift.video import to_uint8


class Peer(NamedTuple):
    """A pipeline of diffusers: its title, frames a second (but see `_peer_fps`) and the dtype that it was
    published in."""

    title: str
    fps: float
    dtype: torch.dtype


PEERS = {
    "AnimateDiffPipeline": Peer("AnimateDiff (Guo et al. 2024)", 8, torch.float16),
    "TextToVideoSDPipeline": Peer("ModelScope (Wang et al. 2023)", 8, torch.float16),
    "CogVideoXPipeline": Peer("CogVideoX (Yang et al. 2024), successor of CogVideo", 8, torch.bfloat16),
    "WanPipeline": Peer("Wan (Wan Team 2025)", 16, torch.bfloat16),
    "LTXPipeline": Peer("LTX-Video (HaCohen et al. 2024)", 24, torch.bfloat16),
}


@dataclass
class System:
    """A text-to-video system with the settings that it runs with.

    Attributes:
        name, title: short name, and title in tables.
        fps: of its clips.
        parameters: of its denoising network or networks.
        settings: everything that its clips depend on beside prompt and seed; an evaluation resumes with the
            same settings only.
        generate: (B prompts, B seeds) to `(B, F, H, W, 3) uint8`.
        pipe: the pipeline behind it.
    """

    name: str
    title: str
    fps: float
    parameters: int
    settings: dict[str, Any]
    generate: Callable[[list[str], list[int]], np.ndarray]
    pipe: Any


def open_system(
    model: str,
    *,
    name: str | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> System:
    """Open a system by the kind of its weights.

    Args:
        model: whatever `loading.load` takes; or a folder, or online a Hub id, of one of `PEERS`.
        name: in tables. None: `model`.
        num_frames: frames a clip. A peer that cannot generate this number generates the next larger one, and
            the first frames are used.
        fps: frames a second of a peer's clips; of a peer with twice the rate every second frame is used.
            None: its own.
        height, width, num_inference_steps, guidance_scale: of each call of the pipeline. None: its own
            defaults.
        device, dtype: as in `loading.load`; peers on a GPU default to the dtype that they were published in.
        compile: whether to compile the networks; each batch size has a graph of its own.

    Raises:
        ValueError: no such model, a pipeline that is neither ours nor one of `PEERS`, or a rate that is no
            whole fraction of its own.
    """
    device = resolve_device(device)
    options = {
        "num_frames": num_frames, "height": height, "width": width, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }  # fmt: skip
    options = {key: value for key, value in options.items() if value is not None}
    source = str(loading.download(model)) if loading.on_hub(model) else model
    kind = _pipeline_class(source)
    if kind in PEERS:
        pipe, title, own_fps, frame_step, defaults = _open_peer(source, kind, options, fps, device, dtype)
    else:
        pipe, frame_step = loading.load(source, device=device, dtype=dtype), 1
        title, own_fps, defaults = _title(pipe), pipe.call_defaults["fps"], pipe.call_defaults
    pipe.set_progress_bar_config(disable=True)
    names = ("unet", "transformer", "transformer_2")  # Wan 2.2 of 14 B has a second one for low noise levels
    networks = [network for name in names if (network := getattr(pipe, name, None)) is not None]
    for network in networks if compile else []:
        network.compile(dynamic=False)

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        # Brackets in captions are words; only the pipelines here read weights.
        prompts = prompts if kind in PEERS else [escape_prompt(prompt) for prompt in prompts]
        clips = pipe(
            prompt=prompts, generator=[seed(number) for number in seeds], output_type="np", **options
        ).frames
        if not all(np.isfinite(clip).all() for clip in clips):
            raise ValueError(
                f"{name or model}: generates NaN or infinity in {networks[0].dtype}; use another dtype"
            )
        return np.stack([to_uint8(clip[::frame_step][:num_frames]) for clip in clips])

    settings = {
        **defaults, **options, "pipeline": type(pipe).__name__, "weights": _digest_of(source),
        "dtype": str(networks[0].dtype).removeprefix("torch."), "device": device.type, "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }  # fmt: skip
    parameters = sum(map(sizes.num_parameters, networks))
    return System(name or str(model), title, own_fps / frame_step, parameters, settings, generate, pipe)


def _digest_of(model: str) -> str:
    """Return the sha256 of the weights and settings that make a model's clips: without its tiny autoencoder, and a teacher's without the
    LoRA of its student."""
    if catalog.is_file(model):
        return digest(model)
    return digest(
        loading.folder(model), without=(TINY,) if catalog.student(model) else (TINY, catalog.STUDENT)
    )


def _open_peer(
    folder: str,
    kind: str,
    options: dict[str, Any],
    fps: float | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[Any, str, float, int, dict[str, Any]]:
    """Open a pipeline of diffusers and adapt the `options` of its calls, in place.

    Returns:
        The pipeline, its title, its frame rate, the step between the frames that are used, and its default
        settings.
    """
    peer = PEERS[kind]
    dtype = dtype or (peer.dtype if device.type == "cuda" else torch.float32)
    with one_line_errors(folder, peer.title):
        pipe = getattr(diffusers, kind).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    pipe = pipe.to(device)
    own_fps = _peer_fps(pipe)
    frame_step = _frame_step(peer.title, own_fps, fps)
    if "num_frames" in options:
        options["num_frames"] = _next_num_frames(pipe, (options["num_frames"] - 1) * frame_step + 1)
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "frame_rate" in parameters:  # LTX-Video's positions in time depend on the rate
        options["frame_rate"] = int(own_fps)
    defaults = {
        key: parameters[key].default for key in ("num_frames", "num_inference_steps", "guidance_scale")
    }
    return pipe, peer.title, own_fps, frame_step, {**defaults, "every": frame_step}


def default_num_frames(model: str) -> int | None:
    """Return the default number of frames of a model of this package, None where its folder does not say
    it."""
    if catalog.is_file(model) or loading.on_hub(model):
        return None
    index = loading.folder(model) / "model_index.json"
    return (
        read_settings(index, IndexSettings).get("latent_shift", {}).get("num_frames")
        if index.exists()
        else None
    )


def _peer_fps(pipe: Any) -> float:
    """Return the frame rate of a peer. CogVideoX 1.5 and Wan 2.2 of 5 B share the pipeline class of their
    families but not the rate.
    """
    if getattr(pipe.config, "expand_timesteps", False):
        return 24
    if isinstance(pipe, diffusers.CogVideoXPipeline) and pipe.transformer.config.patch_size_t is not None:
        return 16
    return PEERS[type(pipe).__name__].fps


def _frame_step(title: str, own_fps: float, fps: float | None) -> int:
    """Return the step between the frames that are used, so that clips have the rate `fps`."""
    step = 1 if fps is None else round(own_fps / fps)
    if fps is not None and (step < 1 or own_fps / step != fps):
        raise ValueError(
            f"{title} generates {own_fps:g} frames a second, {fps:g} is no whole fraction of that"
        )
    return step


def _next_num_frames(pipe: Any, num_frames: int) -> int:
    """Return the next number of frames that a pipeline can generate: autoencoders that compress time take
    one frame plus a multiple.
    """
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    compression = next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), 1)
    return 1 + -(-(num_frames - 1) // compression) * compression


def _title(pipe: ClipPipeline) -> str:
    """Return the title of a baseline, or that of the shift with every setting that is not the paper's."""
    if isinstance(pipe.unet, VDMUNet) and isinstance(pipe.vae, PixelSpace):
        return "Video Diffusion Models (Ho et al. 2022), in pixels"
    if isinstance(pipe.unet, VDMUNet):
        return "Latent-VDM, the paper's baseline without convolution in time"
    if isinstance(pipe.unet, LatentVDMUNet):
        return "Latent-VDM, the paper's baseline"
    if has_temporal_layers(pipe.unet):
        return "attention over time"
    shift = shift_of(pipe.unet) or Shift()
    if not shift.forward and not shift.backward:
        return "the image model, frame by frame"
    settings = ["Latent-Shift"]
    for name, value in vars(shift).items():
        if name == "rule" and value is not None:
            settings.append("a custom rule")
        elif value != getattr(Shift(), name):
            settings.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(settings)


def _pipeline_class(model: str) -> str:
    """Return the name of a model's pipeline class; "" for a single file."""
    if catalog.is_file(model):
        return ""
    index = loading.folder(model) / "model_index.json"
    kind = read_settings(index, IndexSettings)["_class_name"] if index.exists() else ""
    ours = ("LatentShift", "StableDiffusion")
    if kind and kind not in PEERS and not kind.startswith(ours):
        raise ValueError(
            f"{model}: holds a {kind}; expected a Stable Diffusion folder or one of {', '.join(PEERS)}"
        )
    return kind
