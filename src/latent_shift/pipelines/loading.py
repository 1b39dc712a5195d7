"""Models by name or path, and clips to and from files: what a notebook needs beside the pipeline."""

from __future__ import annotations

import difflib
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from latent_shift.models import sizes
from latent_shift.models.pixels import PixelSpace
from latent_shift.pipelines import single_file
from latent_shift.pipelines.catalog import MODELS, WEIGHTS, describe, folder, on_hub, only_variant, read_index
from latent_shift.pipelines.clip_pipeline import ClipGeneration
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline
from latent_shift.runtime import resolve_device

__all__ = ["MODELS", "WEIGHTS", "describe", "folder", "load", "on_hub", "only_variant", "scheduler"]


def load(
    model: str | Path = "emoji", *, device: str | torch.device | None = None, dtype: torch.dtype | None = None, variant: str | None = None,
    prediction: str | None = None,
) -> ClipGeneration:  # fmt: skip
    """Load a pipeline: a `LatentShiftPipeline`, or a `LatentShiftXLPipeline` for the family of Stable Diffusion XL.

    Args:
        model: a name in `MODELS`, a diffusers folder, a `.safetensors` file in the original layout of SD 1.x, 2.x or XL, or, online, a
            Hub id ("owner/name").
        device: None takes CUDA where there is one, else the CPU.
        dtype: of weights and computation; None takes float16 on CUDA, float32 on the CPU.
        variant: of the weights' files in a folder, such as "fp16". None: the plain ones, or the only variant there is.
        prediction: "epsilon" or "v_prediction" where the model does not say it right (single files cannot always).

    Raises:
        ValueError: nothing that can be loaded; the message says what it is and what was expected. Or CUDA that is not there.
    """
    device = resolve_device(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if Path(model).is_file():
        return single_file.open_file(model, dtype=dtype, prediction=prediction).to(device)
    if on_hub(model):
        index = LatentShiftPipeline.load_config(str(model))
        path: Path | str = str(model)
    else:
        path = folder(model)
        index = read_index(path)
        variant = variant or only_variant(path / "unet")
    pipeline = LatentShiftXLPipeline if "text_encoder_2" in index else LatentShiftPipeline
    given = {}
    if Path(path).is_dir() and (network := sizes.unet_of(path)) is not UNet2DConditionModel:  # diffusers knows what it is made of
        given["unet"] = network.from_pretrained(Path(path) / "unet", dtype=dtype, variant=variant)
    if Path(path).is_dir() and sizes.autoencoder_of(Path(path) / "vae") is PixelSpace:
        given["vae"] = PixelSpace.from_pretrained(Path(path) / "vae", dtype=dtype)
    pipe = pipeline.from_pretrained(path, dtype=dtype, variant=variant, **given)
    if prediction:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    return pipe.to(device)


def scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """diffusers' scheduler of a name ("DDIM", "EulerDiscrete", ...) with the settings of `like`; raises ValueError for another name."""
    known = {each.removesuffix("Scheduler"): each for each in dir(diffusers) if each.endswith("Scheduler") and not each.startswith("Flax")}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ValueError(f"unknown scheduler {name!r}; did you mean {' or '.join(nearest) or 'DDIM'}?")
    return getattr(diffusers, known[name]).from_config(like.config)
