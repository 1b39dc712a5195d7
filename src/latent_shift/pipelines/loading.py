"""Models by name, folder, file or Hub id."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from latent_shift.models.baselines import saved_class
from latent_shift.pipelines import single_file
from latent_shift.pipelines.catalog import MODELS, WEIGHTS, describe, folder, on_hub, only_variant, read_index
from latent_shift.pipelines.schedulers import make_scheduler
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline
from latent_shift.runtime import resolve_device

__all__ = ["MODELS", "WEIGHTS", "describe", "folder", "load", "make_scheduler", "on_hub", "only_variant"]


def load(
    model: str | Path = "emoji", *, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    variant: str | None = None, prediction: str | None = None,
) -> LatentShiftPipeline | LatentShiftXLPipeline:  # fmt: skip
    """Load a pipeline: a `LatentShiftPipeline`, or a `LatentShiftXLPipeline` for the Stable Diffusion XL
    family.

    Args:
        model: a name in `MODELS`, a diffusers folder, a `.safetensors` file in the original layout of SD
            1.x, 2.x or XL, or, online, a Hub id ("owner/name").
        device: None takes CUDA where there is one, else the CPU.
        dtype: dtype of weights and computation; None takes float16 on CUDA, float32 on the CPU.
        variant: variant of the weights in a folder, such as "fp16". None: the plain files, or the only
            variant there is.
        prediction: "epsilon" or "v_prediction", where the model does not say it correctly (single files
            cannot always).

    Raises:
        ValueError: nothing that can be loaded; the message says what it is and what was expected. Or CUDA
            that is not available.
    """
    device = resolve_device(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if Path(model).is_file():
        return single_file.open_file(model, dtype=dtype, prediction=prediction).to(device)
    parts = {}
    if on_hub(model):
        index = LatentShiftPipeline.load_config(str(model))
        path: Path | str = str(model)
    else:
        path = folder(model)
        index = read_index(path)
        variant = variant or only_variant(path / "unet")
        for name, default in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            network = saved_class(path / name, default)
            if network is not default:  # a baseline's: diffusers knows the class it extends
                own_variant = variant if any((path / name).glob(f"*.{variant}.safetensors")) else None
                parts[name] = network.from_pretrained(path / name, dtype=dtype, variant=own_variant)
    pipeline = LatentShiftXLPipeline if "text_encoder_2" in index else LatentShiftPipeline
    pipe = pipeline.from_pretrained(path, dtype=dtype, variant=variant, **parts)
    if prediction:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    return pipe.to(device)
