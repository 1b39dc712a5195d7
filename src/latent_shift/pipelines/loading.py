"""Models by name, folder, file or Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from latent_shift.models.loading import (
    one_line_errors,
    open_network,
    open_scheduler,
    open_text_encoder,
    open_tokenizer,
)
from latent_shift.pipelines import catalog, single_file
from latent_shift.pipelines.catalog import (
    MODELS,
    WEIGHTS,
    check_model,
    folder,
    on_hub,
    part_class,
    read_index,
)
from latent_shift.pipelines.schedulers import make_scheduler
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline
from latent_shift.pipelines.student import merge_student
from latent_shift.runtime import resolve_device

__all__ = ["MODELS", "WEIGHTS", "download", "folder", "load", "make_scheduler", "on_hub"]


def load(
    model: str | Path = "emoji", *, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    variant: str | None = None, prediction: str | None = None,
) -> LatentShiftPipeline | LatentShiftXLPipeline:  # fmt: skip
    """Load a pipeline: a `LatentShiftPipeline`, or a `LatentShiftXLPipeline` for the Stable Diffusion XL
    family.

    Weights are read from `.safetensors` files alone.

    Args:
        model: a name in `MODELS`, a diffusers folder, a `.safetensors` file in the original layout of SD
            1.x, 2.x or XL, or, online, a Hub id ("owner/name").
        device: None takes CUDA where there is one, else the CPU.
        dtype: dtype of weights and computation; None takes float16 on CUDA, float32 on the CPU.
        variant: variant of the weights in a folder, such as "fp16". Parts without it open their plain weights.
            None: the plain files, or the only variant there is.
        prediction: "epsilon" or "v_prediction", where the model does not say it correctly (single files
            cannot always).

    Raises:
        ValueError: nothing that can be loaded; the message says what it is and what was expected. Or CUDA
            that is not available.
    """
    check_model(model, variant=variant, prediction=prediction)
    device = resolve_device(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if catalog.is_file(model):
        return single_file.open_file(model, dtype=dtype, prediction=prediction).to(device)
    path = download(str(model), variant=variant) if on_hub(model) else folder(model)
    pipe = _open_folder(path, dtype=dtype, variant=variant)
    if prediction:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    if (student := catalog.student(model)) is not None:
        merge_student(pipe, student)
    return pipe.to(device)


def download(model: str, *, variant: str | None = None) -> Path:
    """Download a pipeline of the Hub, or find it in the cache, and return its folder. Pickles are left out.

    Raises:
        ValueError: there is no such pipeline, or neither network nor cache.
    """
    with one_line_errors(model, "a model of the Hub"):
        return Path(DiffusionPipeline.download(model, variant=variant, use_safetensors=True))


def _open_folder(
    path: Path, *, dtype: torch.dtype, variant: str | None
) -> LatentShiftPipeline | LatentShiftXLPipeline:
    """Open the parts of a diffusers folder one by one, so that each names itself where it is damaged."""
    index = read_index(path, variant=variant)
    parts: dict[str, Any] = {
        "unet": open_network(path / "unet", UNet2DConditionModel, dtype=dtype, variant=variant),
        "vae": open_network(path / "vae", AutoencoderKL, dtype=dtype, variant=variant),
        "scheduler": open_scheduler(path / "scheduler"),
    }
    for suffix in ("", "_2") if "text_encoder_2" in index else ("",):
        name = f"text_encoder{suffix}"
        encoder = open_text_encoder(path / name, index[name][1], dtype=dtype, variant=variant)
        parts |= {name: encoder, f"tokenizer{suffix}": open_tokenizer(path / f"tokenizer{suffix}", encoder)}
    if part_class(path, index, "feature_extractor") is not None:
        with one_line_errors(path / "feature_extractor", "the image processor of a safety checker"):
            # Files from before transformers 5 have the name CLIPFeatureExtractor for it.
            parts["feature_extractor"] = transformers.CLIPImageProcessor.from_pretrained(
                path / "feature_extractor", local_files_only=True
            )
    pipeline = LatentShiftXLPipeline if "text_encoder_2" in index else LatentShiftPipeline
    with one_line_errors(path, pipeline.__name__):
        return pipeline.from_pretrained(
            path, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True, **parts
        )  # fmt: skip
