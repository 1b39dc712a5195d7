"""LoRA files: load one into a pipeline, train one, save one with the shift it was trained with."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from latent_shift.config import Lora
from latent_shift.files import tensor_shapes
from latent_shift.pipelines.clip_pipeline import ClipPipeline
from latent_shift.shift import Shift, ShiftConv2d, inflate, shift_of


def load_lora(pipe: ClipPipeline, path: str | Path) -> None:
    """Load a LoRA file. A file saved by `save_lora` also sets its shift, its size and the defaults of a call.

    Raises:
        ValueError: not a `.safetensors` file.
    """
    path = Path(path)
    tensor_shapes(path)
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get("latent_shift", "{}"))
    if settings:
        inflate(pipe.unet, Shift(**{field.name: settings.pop(field.name) for field in fields(Shift)}))
        pipe.unet.register_to_config(sample_size=settings.pop("sample_size"))
        pipe.set_model_defaults(settings)
    pipe.load_lora_weights(path.parent, weight_name=path.name)


def add_lora(unet: UNet2DConditionModel, lora: Lora, *, dtype: torch.dtype) -> None:
    """Freeze a U-Net in `dtype` and add trainable float32 matrices of rank `lora.rank` to the layers of
    `lora.modules`.

    Raises:
        ValueError: peft is not installed, no layer has such a name, or one is a shifted convolution (place
            "end").
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora needs the extra: pip install 'latent-shift-video[lora]'") from error
    shifting = [
        name
        for name, part in unet.named_modules()
        if isinstance(part, ShiftConv2d) and name.split(".")[-1] in lora.modules
    ]
    if shifting:
        raise ValueError(
            f"with model.place=end {shifting[0]} shifts and takes no LoRA: leave it out of lora.modules"
        )
    # ModelMixin.to warns of parts to keep in float32: there are none.
    nn.Module.to(unet.requires_grad_(False), dtype)
    unet.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=list(lora.modules)))
    cast_training_params(unet, dtype=torch.float32)


def save_lora(unet: UNet2DConditionModel, folder: Path, *, call_defaults: dict) -> Path:
    """Save a LoRA in diffusers' format and return its path, `folder/pytorch_lora_weights.safetensors`.

    The shift and the defaults of a call are in its header under "latent_shift", for `load_lora`.
    """
    from peft import get_peft_model_state_dict

    settings = json.dumps(
        {**asdict(shift_of(unet) or Shift(0, 0)), **call_defaults, "sample_size": unet.config.sample_size}
    )

    def write(tensors: dict[str, torch.Tensor], path: str) -> None:
        half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        save_file(half, path, metadata={"format": "pt", "latent_shift": settings})

    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), save_function=write
    )
    return folder / "pytorch_lora_weights.safetensors"
