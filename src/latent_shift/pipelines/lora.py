"""LoRA files: load one into a pipeline, train one, save one with the shift it was trained with."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latent_shift.config import Lora
from latent_shift.files import check_schema, parse_json, tensor_shapes
from latent_shift.models.loading import one_line_errors
from latent_shift.models.parts import LoraSettings, PeftSettings, read_settings
from latent_shift.shift import Shift, ShiftConv2d, inflate, shift_of

if TYPE_CHECKING:
    from latent_shift.pipelines.clip_pipeline import ClipPipeline

log = logging.getLogger("latent_shift")


def load_lora(pipe: ClipPipeline, path: str | Path) -> None:
    """Load a LoRA file. A file saved by `save_lora` also sets its shift, its size and the defaults of a call.

    It may name its tensors as diffusers does, as kohya's scripts, as peft, or by the layers of the U-Net alone. A
    warning counts the tensors that fit no layer of this model.

    Raises:
        ValueError: not a `.safetensors` file of a LoRA, or one of another model: no tensor fits.
    """
    path = Path(path)
    names = tensor_shapes(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in names}
    settings = _call_settings(metadata, path)
    others = {name for name in names if any(part in name for part in ("hada_", "lokr_", "oft_", "boft_"))}
    if others:
        raise ValueError(f"{path}: holds {min(others)}: a LoHa, LoKr or OFT of LyCORIS; expected a LoRA")
    tensors, alphas = _diffusers_names(pipe, tensors, path)
    with one_line_errors(path, "a LoRA"):
        fitting_names = _fitting_names(pipe, tensors)
    fitting = {name: tensors[name] for name in fitting_names}
    if not fitting:
        raise ValueError(
            f"{path}: none of its {len(names)} tensors, such as {min(names)}, fits a layer of this model; expected a LoRA "
            f"of {type(pipe).image_pipeline.__name__.removesuffix('Pipeline')} with the same widths"
        )
    if len(fitting) < len(tensors):
        log.warning(
            "%s: %d of its %d tensors fit no layer of this model and are left out, such as %s",
            path, len(tensors) - len(fitting), len(tensors), min(tensors.keys() - fitting.keys()),
        )  # fmt: skip
    if settings:
        inflate(pipe.unet, Shift(**{field.name: settings.pop(field.name) for field in fields(Shift)}))
        pipe.unet.register_to_config(sample_size=settings.pop("sample_size"))
        pipe.set_model_defaults(settings)
    _add_tensors(pipe, fitting, alphas, metadata, path)


def _call_settings(metadata: dict[str, str], path: Path) -> dict:
    """Return the settings that `save_lora` left in the header of a file; none in the file of another program."""
    if "latent_shift" not in metadata:
        return {}
    try:
        settings = parse_json(metadata["latent_shift"])
    except ValueError as error:
        raise ValueError(f"{path}: its header has settings that are not JSON ({error})") from error
    check_schema(settings, LoraSettings, path)
    return settings


def _diffusers_names(
    pipe: ClipPipeline, tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors of a LoRA under the names of diffusers ("unet.", "text_encoder."), and its alphas.

    Names that belong to no model that diffusers knows stay as they are.
    """
    kohya = {name: tensor for name, tensor in tensors.items() if name.startswith(_KOHYA)}
    renamed, alphas = {}, None
    if kohya:
        with one_line_errors(path, "a LoRA of kohya's scripts"):
            renamed, alphas = pipe.lora_state_dict(dict(kohya), unet_config=pipe.unet.config)
        # diffusers takes these names only where all layers of an attention have a LoRA.
        texts = {name: tensor for name, tensor in renamed.items() if not name.startswith("unet.")}
        renamed = {name: renamed[name] for name in renamed.keys() - texts.keys()} | _peft_names(texts)
    layers = {name for name, _ in pipe.unet.named_children()}
    for name, tensor in tensors.items():
        if name in kohya:
            continue
        short = name.removeprefix("base_model.model.")
        if short.split(".")[0] in layers:
            short = f"unet.{short}"
        elif short.startswith(("text_model.", "encoder.layers.")):
            short = f"text_encoder.{short}"
        renamed[short] = tensor * _peft_scale(path) if ".lora_B" in name and short != name else tensor
    return renamed, alphas or {}


_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


def _peft_scale(path: Path) -> float:
    """Return the scale of a LoRA saved by peft, which is in the file beside it; 1 if there is none."""
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        return 1.0
    settings = read_settings(config, PeftSettings)
    rank = settings["r"]
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)


def _fitting_names(pipe: ClipPipeline, tensors: dict[str, Tensor]) -> set[str]:
    """Return the names of tensors that fit a layer of the pipeline's networks: rows or columns as wide as it."""
    fitting = set()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        network = getattr(pipe, part, None)
        if network is None:
            continue
        layers = {  # transformers dropped "text_model." in 5.6; LoRAs have it
            name.replace(".base_layer", "").removeprefix("text_model."): module.weight.shape
            for name, module in network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
        }
        names = [name for name in tensors if name.startswith(f"{part}.")]
        inside = {name.removeprefix(f"{part}."): tensors[name] for name in names}
        keys = convert_unet_state_dict_to_peft(inside) if part == "unet" else _peft_names(inside)
        for name, key in zip(names, keys, strict=True):
            layer, _, rest = key.removeprefix("text_model.").partition(".lora_")
            shape, size = layers.get(layer), tensors[name].shape
            if (
                shape
                and len(size) > 1
                and (
                    (rest.startswith("A") and size[1] == shape[1])
                    or (rest.startswith("B") and size[0] == shape[0])
                )
            ):
                fitting.add(name)
    return fitting


def _peft_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a text encoder's LoRA, in order, by the names of peft."""
    return convert_state_dict_to_peft(tensors, original_type=StateDictType.DIFFUSERS_OLD)


def _add_tensors(
    pipe: ClipPipeline,
    tensors: dict[str, Tensor],
    alphas: dict[str, float],
    metadata: dict[str, str],
    path: Path,
) -> None:
    """Add adapters with these tensors to the networks of a pipeline."""
    config = metadata.get("lora_adapter_metadata")
    with one_line_errors(path, "a LoRA"):
        common: dict[str, Any] = dict(
            network_alphas=alphas or None, metadata=parse_json(config) if config and not alphas else None, _pipeline=pipe,
        )  # fmt: skip
        if any(name.startswith("unet.") for name in tensors):
            pipe.load_lora_into_unet(tensors, unet=pipe.unet, **common)
        for part in ("text_encoder", "text_encoder_2"):
            if any(name.startswith(f"{part}.") for name in tensors):
                pipe.load_lora_into_text_encoder(
                    tensors, text_encoder=getattr(pipe, part), prefix=part, lora_scale=pipe.lora_scale, **common
                )  # fmt: skip


def has_lora(part: object) -> bool:
    """Return whether a part of a pipeline is a network with a LoRA."""
    return isinstance(part, nn.Module) and any(hasattr(module, "get_base_layer") for module in part.modules())


def merged(network: nn.Module) -> nn.Module:
    """Return a copy of a network whose LoRA is part of its weights."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if hasattr(module, "get_base_layer"):
            if not module.disable_adapters:
                module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, module.get_base_layer())
    network.__dict__.pop("peft_config", None)
    network._hf_peft_config_loaded = False  # type: ignore[assignment]
    return network


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

    def write(tensors: dict[str, Tensor], path: str) -> None:
        half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        save_file(half, path, metadata={"format": "pt", "latent_shift": settings})

    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), save_function=write
    )
    return folder / "pytorch_lora_weights.safetensors"
