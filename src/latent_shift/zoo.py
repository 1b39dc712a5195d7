"""Models by name or path, and clips to and from files: what a notebook needs beside the pipeline."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_shift import video
from latent_shift.pipeline import LatentShiftPipeline

WEIGHTS = Path(__file__).parent / "weights"
MODELS = {"emoji": "128x128, 16 frames at 8 fps, drawn as 3-D emoji; trained by recipes/emoji, embedded in this package"}


def folder(model: str | Path) -> Path:
    """The folder of a model in `MODELS`; any other name is a folder already. Raises ValueError for what is neither."""
    path = WEIGHTS / str(model) if str(model) in MODELS else Path(model)
    if not path.is_dir():
        nearest = difflib.get_close_matches(str(model), MODELS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{model}: expected one of {', '.join(MODELS)}, or a folder{hint}")
    return path


def device_of(name: str | torch.device | None = None) -> torch.device:
    """A device that is there: None takes CUDA where there is one, else the CPU. Raises ValueError for CUDA that is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine, or this build of PyTorch, has no CUDA; expected cpu")
    return device


def load(model: str | Path = "emoji", *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LatentShiftPipeline:
    """Load a pipeline.

    Args:
        model: a name in `MODELS`, or a diffusers folder.
        device: None takes CUDA where there is one, else the CPU.
        dtype: of weights and computation; None takes float16 on CUDA, float32 on the CPU.

    Raises:
        ValueError: neither a known name nor a folder of a pipeline, or CUDA that is not there.
    """
    path = folder(model)
    if not (path / "model_index.json").exists():
        raise ValueError(f"{model}: expected a diffusers folder with a model_index.json")
    device = device_of(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    return LatentShiftPipeline.from_pretrained(path, dtype=dtype).to(device)


def seed(number: int) -> torch.Generator:
    """A CPU generator: the same number gives the same noise on every device."""
    return torch.Generator().manual_seed(number)


def save_video(clip: np.ndarray | Tensor | list[Image.Image], path: str | Path, *, fps: float = 8) -> Path:
    """Write one clip to .mp4, .webm, .gif, .webp or .png (a strip of its frames); returns the path.

    Args:
        clip: `(F, H, W, 3)` in [0, 1] or uint8, `(F, 3, H, W)` tensor in [0, 1], or F images: what a pipeline returns for a clip.
        path: the suffix chooses the format.
        fps: frames a second.
    """
    return video.write(to_uint8(clip), path, fps=fps)


def load_video(path: str | Path, *, fps: float | None = None, size: int | None = None) -> np.ndarray:
    """Read a video, animation or still as `(F, H, W, 3) uint8`; see `latent_shift.video.read`."""
    return video.read(path, fps=fps, size=size)[0]


def to_uint8(clip: np.ndarray | Tensor | list[Image.Image]) -> np.ndarray:
    """Any form of a clip as `(F, H, W, 3) uint8`; floats are clipped to [0, 1] and rounded."""
    if isinstance(clip, list):
        return np.stack([np.asarray(image.convert("RGB")) for image in clip])
    frames = clip.permute(0, 2, 3, 1).float().cpu().numpy() if isinstance(clip, Tensor) else clip
    return frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)
