"""What a model is and what it samples with, read from its settings without loading it.

As in `catalog`, nothing here imports torch or diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_shift.config import Model
from latent_shift.files import tensor_shapes
from latent_shift.models.parts import downscale_factor, part_shapes, read_lora_settings, read_part, text_width
from latent_shift.pipelines.catalog import (
    FAMILIES,
    TEACHERS,
    Family,
    file_prediction,
    folder,
    identify_file,
    is_file,
    on_hub,
    read_index,
    student,
)
from latent_shift.pipelines.limits import CALL_DEFAULTS, XL_GUIDANCE_SCALE, possible_steps, size_multiple


def sampling_defaults(model: str | Path) -> dict[str, float | None]:
    """Return what a call takes for numbers that are left out, without loading the model.

    Returns:
        `CALL_DEFAULTS` with the model's own, `width` and `height` in pixels (None for a model of any size), and `multiple`: of
        which these have to be multiples.

    Raises:
        ValueError: as `load` does.
    """
    _, parts, unet, vae, _, settings = _read_parts(model)
    two_encoders = "text_encoder_2" in parts or unet.get("addition_embed_type") == "text_time"
    family = {**CALL_DEFAULTS, "guidance_scale": XL_GUIDANCE_SCALE} if two_encoders else CALL_DEFAULTS
    own = {name: value for name, value in settings.items() if name in CALL_DEFAULTS}
    if (lora := student(model)) is not None:
        own |= {name: value for name, value in read_lora_settings(lora).items() if name in CALL_DEFAULTS}
    factor, size = downscale_factor(vae), unet.get("sample_size")
    sides: Sequence[int | None] = size if isinstance(size, (list, tuple)) else (size, size)
    height, width = (None if side is None else side * factor for side in sides)
    return {**family, **own, "height": height, "width": width, "multiple": size_multiple(factor, unet)}


def describe(model: str | Path) -> dict[str, str]:
    """Return what a model is, line by line, without reading its weights; raise ValueError as `load` does."""
    if on_hub(model):
        raise ValueError(f"{model}: no such folder; a model of the Hub is described once it is downloaded")
    lines, parts, unet, vae, scheduler, settings = _read_parts(model)
    for part, shapes in parts.items():
        lines[part] = f"{sum(math.prod(shape) for shape in shapes) / 1e6:,.1f} M parameters"
    size = unet.get("sample_size")
    sides: list[Any] = list(size) if isinstance(size, (list, tuple)) else [size] * 2
    factor = downscale_factor(vae)
    shift = {
        name: settings.get(name, Model.model_fields[name].default)
        for name in ("forward", "backward", "place", "edge")
    }
    if settings.get("rule"):
        shift = {"place": shift["place"], "edge": shift["edge"], "rule": "custom"}
    widths = unet.get("block_out_channels") or [unet["num_attention_heads"] * unet["attention_head_dim"]]
    lines["widths"] = ", ".join(map(str, widths))
    lines["text width"] = str(text_width(unet))
    lines["picture"] = "x".join(str(factor * side) for side in sides) + " pixels" if size else "of any size"
    lines["predicts"] = scheduler.get("prediction_type", "epsilon")
    if scheduler.get("rescale_betas_zero_snr"):
        lines["predicts"] += ", zero terminal SNR"
    trained = "num_frames" in settings
    lines["frames"] = (
        f"{settings['num_frames']} at {settings.get('fps', 8):g} fps"
        if trained
        else "1: not trained on clips"
    )
    sampling = settings | ({} if (lora := student(model)) is None else read_lora_settings(lora))
    if steps := sampling.get("distilled_steps"):
        lines["distilled"] = (
            f"samples in {', '.join(map(str, possible_steps(steps)))} steps, guidance built in"
        )
        if lora is not None:
            lines["distilled"] += f"; from {TEACHERS[str(model)]}"
    lines["shift"] = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shift.items()
    )
    return lines


Parts = tuple[dict[str, str], dict[str, list], dict, dict, dict, dict]


def _read_parts(model: str | Path) -> Parts:
    """Return the first lines of a model's description, the tensor shapes of each part, and the settings of U-Net, autoencoder,
    scheduler and pipeline."""
    return _file_parts(Path(model)) if is_file(model) else _folder_parts(folder(model))


def _file_parts(path: Path) -> Parts:
    family, tensors = FAMILIES[identify_file(path)], tensor_shapes(path)
    prefixes = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "cond"}
    parts = {
        part: [shape for key, shape in tensors.items() if key.startswith(prefix)]
        for part, prefix in prefixes.items()
    }
    prediction, scheduler = file_prediction(path), dict(family.scheduler)
    if prediction:
        scheduler["prediction_type"] = prediction
    elif family is FAMILIES["sd2"]:
        scheduler["prediction_type"] = "epsilon or v_prediction: loading finds out"
    unet = (
        {**family.unet, "sample_size": 64}
        if prediction == "epsilon" and family is FAMILIES["sd2"]
        else family.unet
    )
    lines = {"family": family.title, "format": "a single file in the original layout"}
    return lines, parts, unet, family.vae, scheduler, {}


def _folder_parts(path: Path) -> Parts:
    index = read_index(path)
    unet, vae, scheduler = (read_part(path / part) for part in ("unet", "vae", "scheduler"))
    family = _unet_family(unet)
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    parts = {name: list(part_shapes(path / name).values()) for name in names if (path / name).is_dir()}
    lines = {
        "family": family.title if family else "other sizes of the classes of Stable Diffusion",
        "format": f"a diffusers folder, {index['_class_name']}",
    }
    return lines, parts, unet, vae, scheduler, index.get("latent_shift", {})


def _unet_family(unet: dict) -> Family | None:
    """Return the family with a U-Net of this configuration; None if there is none."""
    for family in FAMILIES.values():
        same = all(
            unet.get(key, False) == family.unet.get(key, False)
            for key in ("cross_attention_dim", "use_linear_projection")
        )
        if same and tuple(unet.get("block_out_channels", ())) == family.unet["block_out_channels"]:
            return family
    return None
