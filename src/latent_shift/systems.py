"""Text-to-video systems behind one interface: words and seeds in, clips out. Ours, the baselines of the paper, and what people would
otherwise take, each as the pipeline that diffusers has of it.

The paper's CogVideo (Hong et al. 2022) has no maintained implementation: CogVideoX is its successor by the same group, a stronger model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from latent_shift import models, zoo
from latent_shift.extractors import digest
from latent_shift.generation import ClipGeneration
from latent_shift.latent_vdm import LatentVDMUNet
from latent_shift.shift import shift_of
from latent_shift.vdm import PixelSpace, VDMUNet

PEERS: dict[str, tuple[str, float]] = {  # pipeline of diffusers -> what it is, and the frames a second it was trained at
    "AnimateDiffPipeline": ("AnimateDiff (Guo et al. 2024)", 8),
    "TextToVideoSDPipeline": ("ModelScope (Wang et al. 2023)", 8),
    "CogVideoXPipeline": ("CogVideoX (Yang et al. 2024), successor of CogVideo", 8),
    "WanPipeline": ("Wan (Wan Team 2025)", 16),
    "LTXPipeline": ("LTX-Video (HaCohen et al. 2024)", 24),
}


@dataclass
class System:
    """One system with the settings it is run with.

    Attributes:
        name, title: short, and what it is.
        fps: of its clips.
        parameters: of the network that denoises.
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
    model: str, *, name: str | None = None, num_frames: int | None = None, height: int | None = None, width: int | None = None,
    num_inference_steps: int | None = None, guidance_scale: float | None = None, device: str | torch.device | None = None,
    dtype: torch.dtype | None = None, compile: bool = False,
) -> System:  # fmt: skip
    """A system by what its weights are.

    Args:
        model: what `zoo.load` takes; or a folder, or online a Hub id, of one of `PEERS`.
        name: what it is called in tables. None: the model.
        num_frames, height, width, num_inference_steps, guidance_scale: of a call of its pipeline; None: its own.
        device, dtype: as in `zoo.load`.
        compile: the network by `torch.compile`, a graph for each number of clips at once: worth its minutes where many are drawn.

    Raises:
        ValueError: no such model, or a pipeline that is neither ours nor one of `PEERS`.
    """
    kind, device = _pipeline(model), zoo.device_of(device)
    own: dict[str, Any] = {}
    if kind in PEERS:
        title, fps = PEERS[kind]
        pipe = getattr(diffusers, kind).from_pretrained(model, dtype=dtype or (torch.float16 if device.type == "cuda" else torch.float32))
        pipe = pipe.to(device)
    else:
        pipe = zoo.load(model, device=device, dtype=dtype)
        title, fps, own = _title(pipe), pipe.call_defaults["fps"], pipe.call_defaults
    pipe.set_progress_bar_config(disable=True)
    asked = dict(num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    options = {key: value for key, value in asked.items() if value is not None}

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        made = pipe(prompt=prompts, generator=[zoo.seed(number) for number in seeds], output_type="np", **options).frames
        return np.stack([zoo.to_uint8(clip) for clip in made])

    network = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    if compile:
        network.compile(dynamic=False)
    settings = {"pipeline": type(pipe).__name__, "weights": _weights(model), **own, **options}
    return System(name or str(model), title, fps, models.num_parameters(network), settings, generate, pipe)


def _title(pipe: ClipGeneration) -> str:
    if isinstance(pipe.unet, VDMUNet) and isinstance(pipe.vae, PixelSpace):
        return "Video Diffusion Models (Ho et al. 2022), in pixels"
    if isinstance(pipe.unet, LatentVDMUNet):
        return "Latent-VDM, the paper's baseline" + (" without convolution in time" if isinstance(pipe.unet, VDMUNet) else "")
    shift = shift_of(pipe.unet)
    return "the image model, frame by frame" if shift and not shift.forward and not shift.backward else "Latent-Shift"


def _pipeline(model: str) -> str:
    """The name of a model's pipeline; "" for a single file."""
    if Path(model).is_file():
        return ""
    if zoo.on_hub(model):
        return str(DiffusionPipeline.load_config(model)["_class_name"])
    index = zoo.folder(model) / "model_index.json"
    kind = str(json.loads(index.read_text())["_class_name"]) if index.exists() else ""
    ours = ("LatentShift", "StableDiffusion")
    if kind and kind not in PEERS and not kind.startswith(ours):
        raise ValueError(f"{model}: is a {kind}; expected a Stable Diffusion folder or one of {', '.join(PEERS)}")
    return kind


def _weights(model: str) -> str:
    """One hash for all weights of a folder or file on this machine; a Hub id stands for itself."""
    if Path(model).is_file():
        return digest(model)
    return str(model) if zoo.on_hub(model) else digest(zoo.folder(model))
