"""Text-to-video systems behind one interface: words and seeds in, clips out. Ours, the baselines of the paper, and what people would
otherwise take, each as the pipeline that diffusers has of it.

The paper's CogVideo (Hong et al. 2022) has no maintained implementation: CogVideoX is its successor by the same group, a stronger model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from latent_shift.evaluation.features import digest
from latent_shift.models import sizes
from latent_shift.models.baselines import LatentVDMUNet, PixelSpace, VDMUNet
from latent_shift.pipelines import loading
from latent_shift.pipelines.clip_pipeline import ClipPipeline
from latent_shift.runtime import resolve_device, seed
from latent_shift.shift import Shift, shift_of
from latent_shift.video import to_uint8

PEERS: dict[str, tuple[str, float, torch.dtype]] = {  # pipeline of diffusers -> what it is, frames a second (`_rate`), dtype on a GPU
    "AnimateDiffPipeline": ("AnimateDiff (Guo et al. 2024)", 8, torch.float16),
    "TextToVideoSDPipeline": ("ModelScope (Wang et al. 2023)", 8, torch.float16),
    "CogVideoXPipeline": ("CogVideoX (Yang et al. 2024), successor of CogVideo", 8, torch.bfloat16),
    "WanPipeline": ("Wan (Wan Team 2025)", 16, torch.bfloat16),
    "LTXPipeline": ("LTX-Video (HaCohen et al. 2024)", 24, torch.bfloat16),
}


@dataclass
class System:
    """One system with the settings it is run with.

    Attributes:
        name, title: short, and what it is.
        fps: of its clips.
        parameters: of the network that denoises, or of both.
        settings: what its clips depend on beside words and seed; an evaluation goes on with the same alone.
        generate: (B prompts, B seeds) to `(B, F, H, W, 3) uint8`.
        pipe: what is behind it.
    """

    name: str
    title: str
    fps: float
    parameters: int
    settings: dict[str, Any]
    generate: Callable[[list[str], list[int]], np.ndarray]
    pipe: Any


def open_system(
    model: str, *, name: str | None = None, num_frames: int | None = None, fps: float | None = None, height: int | None = None,
    width: int | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
    device: str | torch.device | None = None, dtype: torch.dtype | None = None, compile: bool = False,
) -> System:  # fmt: skip
    """A system by what its weights are.

    Args:
        model: what `zoo.load` takes; or a folder, or online a Hub id, of one of `PEERS`.
        name: what it is called in tables. None: the model.
        num_frames: of its clips. A peer that can only draw other numbers draws the next larger one, whose first frames count.
        fps: of its clips, for peers: of one that draws twice as many frames a second every second one counts. None: its own.
        height, width, num_inference_steps, guidance_scale: of a call of its pipeline; None: its own.
        device, dtype: as in `zoo.load`; dtype of peers on a GPU is what they were published in.
        compile: the network by `torch.compile`, a graph for each number of clips at once: worth its minutes where many are drawn.

    Raises:
        ValueError: no such model, a pipeline that is neither ours nor one of `PEERS`, or a rate that it cannot be thinned to.
    """
    kind, device = _pipeline(model), resolve_device(device)
    asked = dict(num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    options: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    every, settings = 1, dict[str, Any]()
    if kind in PEERS:
        title, _, published = PEERS[kind]
        dtype = dtype or (published if device.type == "cuda" else torch.float32)
        pipe = getattr(diffusers, kind).from_pretrained(model, dtype=dtype).to(device)
        every = _thinning(title, rate := _rate(pipe), fps)
        if num_frames is not None:
            options["num_frames"] = _drawable(pipe, (num_frames - 1) * every + 1)
        defaults = inspect.signature(type(pipe).__call__).parameters
        settings |= {key: defaults[key].default for key in ("num_frames", "num_inference_steps", "guidance_scale")}
        settings |= {"every": every}
        if "frame_rate" in defaults:  # LTX-Video is told the rate, of which its positions in time depend
            options["frame_rate"] = int(rate)
    else:
        pipe = loading.load(model, device=device, dtype=dtype)
        title, rate = _title(pipe), pipe.call_defaults["fps"]
        settings |= pipe.call_defaults
    pipe.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        made = pipe(prompt=prompts, generator=[seed(number) for number in seeds], output_type="np", **options).frames
        if not all(np.isfinite(clip).all() for clip in made):
            raise ValueError(f"{name or model}: draws what is no number in {networks[0].dtype}; expected another dtype")
        return np.stack([to_uint8(clip[::every][:num_frames]) for clip in made])

    names = ("unet", "transformer", "transformer_2")  # Wan 2.2 of 14 B has one for much noise and one for little
    networks = [getattr(pipe, each) for each in names if getattr(pipe, each, None) is not None]
    for network in networks if compile else []:
        network.compile(dynamic=False)
    settings |= {
        **options, "pipeline": type(pipe).__name__, "weights": _weights(model), "dtype": str(networks[0].dtype).removeprefix("torch."),
        "device": device.type, "torch": torch.__version__, "diffusers": diffusers.__version__,
    }  # fmt: skip
    return System(name or str(model), title, rate / every, sum(map(sizes.num_parameters, networks)), settings, generate, pipe)


def num_frames_of(model: str) -> int | None:
    """How many frames a model of ours draws unless told otherwise, if its folder says so: without opening it."""
    if Path(model).is_file() or loading.on_hub(model):
        return None
    index = loading.folder(model) / "model_index.json"
    return json.loads(index.read_text()).get("latent_shift", {}).get("num_frames") if index.exists() else None


def _rate(pipe: Any) -> float:
    """Frames a second of a peer's clips. CogVideoX 1.5 and Wan 2.2 of 5 B go by the name of their families' pipelines."""
    if getattr(pipe.config, "expand_timesteps", False):
        return 24
    if isinstance(pipe, diffusers.CogVideoXPipeline) and pipe.transformer.config.patch_size_t is not None:
        return 16
    return PEERS[type(pipe).__name__][1]


def _thinning(title: str, rate: float, fps: float | None) -> int:
    """Every how many frames of a system count, that its clips have the rate asked for."""
    every = 1 if fps is None else round(rate / fps)
    if fps is not None and (every < 1 or rate / every != fps):
        raise ValueError(f"{title} draws {rate:g} frames a second, of which no whole share is {fps:g}")
    return every


def _drawable(pipe: Any, num_frames: int) -> int:
    """The next number of frames that a pipeline draws: those that also compress time draw one and so many times their factor."""
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    factor = next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), 1)
    return 1 + -(-(num_frames - 1) // factor) * factor


def _title(pipe: ClipPipeline) -> str:
    if isinstance(pipe.unet, VDMUNet) and isinstance(pipe.vae, PixelSpace):
        return "Video Diffusion Models (Ho et al. 2022), in pixels"
    if isinstance(pipe.unet, LatentVDMUNet):
        return "Latent-VDM, the paper's baseline" + (" without convolution in time" if isinstance(pipe.unet, VDMUNet) else "")
    shift = shift_of(pipe.unet)
    if shift and not shift.forward and not shift.backward:
        return "the image model, frame by frame"
    others = {name: value for name, value in vars(shift or Shift()).items() if value != getattr(Shift(), name)}
    return ", ".join(
        [
            "Latent-Shift",
            *(f"{name} {value:.4g}" if name in ("forward", "backward") else f"{name} {value}" for name, value in others.items()),
        ]
    )


def _pipeline(model: str) -> str:
    """The name of a model's pipeline; "" for a single file."""
    if Path(model).is_file():
        return ""
    if loading.on_hub(model):
        kind = str(DiffusionPipeline.load_config(model)["_class_name"])
    else:
        index = loading.folder(model) / "model_index.json"
        kind = str(json.loads(index.read_text())["_class_name"]) if index.exists() else ""
    ours = ("LatentShift", "StableDiffusion")
    if kind and kind not in PEERS and not kind.startswith(ours):
        raise ValueError(f"{model}: is a {kind}; expected a Stable Diffusion folder or one of {', '.join(PEERS)}")
    return kind


def _weights(model: str) -> str:
    """One hash for all weights of a folder or file on this machine, or of those that a Hub id brought to it."""
    if Path(model).is_file():
        return digest(model)
    return digest(DiffusionPipeline.download(model) if loading.on_hub(model) else loading.folder(model))
