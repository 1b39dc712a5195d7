"""The student of a packaged model: a LoRA that lets it sample in few steps, merged into its weights when it is loaded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from latent_shift.models.parts import read_lora_settings

if TYPE_CHECKING:
    from latent_shift.pipelines.clip_pipeline import ClipPipeline


def merge_student(pipe: ClipPipeline, path: Path) -> None:
    """Merge the LoRA of stage distill into the weights of the model that it was trained from, in place. Needs no peft.

    Args:
        pipe: the model.
        path: a file of `save_lora`.

    Raises:
        ValueError: a file that is not of a distillation of this model.
    """
    import torch
    from safetensors.torch import load_file

    from latent_shift.pipelines.schedulers import distilled_scheduler
    from latent_shift.shift import Shift, shift_of

    settings, tensors = read_lora_settings(path), load_file(path)
    shift = {field.name: settings[field.name] for field in fields(Shift) if field.name in settings}
    if not settings.get("distilled_steps") or Shift(**shift) != shift_of(pipe.unet):
        raise ValueError(f"{path}: expected a LoRA of stage distill, trained with the shift of this model")
    weights = {f"unet.{name}": weight for name, weight in pipe.unet.named_parameters()}
    pairs = []
    for name in [name for name in tensors if ".lora_A." in name]:
        down, up = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
        weight = weights.get(name.replace(".lora_A.", "."))
        if (
            up is None
            or weight is None
            or up.shape[1] != down.shape[0]
            or (up.shape[0], *down.shape[1:]) != weight.shape
        ):
            raise ValueError(f"{path}: {name} is not of a layer of this model")
        pairs.append((weight, down, up))
    if tensors:
        raise ValueError(f"{path}: {min(tensors)} is not of a layer of this model")
    with torch.no_grad():
        for weight, down, up in pairs:
            change = up.flatten(1).float() @ down.flatten(1).float()
            weight.add_(change.reshape(weight.shape).to(weight))
    pipe.set_model_defaults({name: settings[name] for name in pipe.call_defaults if name in settings})
    pipe.scheduler = distilled_scheduler(pipe.scheduler)
