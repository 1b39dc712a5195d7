"""LoRA files: load one into a pipeline, train one, save one with the shift it was trained with."""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
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
from latent_shift.files import parse_json, tensor_shapes
from latent_shift.models.loading import one_line_errors
from latent_shift.models.parts import PeftSettings, read_lora_settings, read_settings
from latent_shift.pipelines.schedulers import distilled_scheduler
from latent_shift.shift import Shift, ShiftConv2d, inflate, shift_of

if TYPE_CHECKING:
    from latent_shift.pipelines.clip_pipeline import ClipPipeline

log = logging.getLogger("latent_shift")


def load_lora(pipe: ClipPipeline, path: str | Path) -> None:
    """Load a LoRA file. A file saved by `save_lora` also sets its shift, its size and the defaults of a call; a distilled model keeps its
    sampling steps and has no guidance.

    It may name its tensors as diffusers does, as kohya's scripts, as peft, or by the layers of the U-Net alone. A
    warning counts the tensors that fit no layer of this model.

    Raises:
        ValueError: not a `.safetensors` file of a LoRA, or one of another model: no tensor fits; or one of a distillation for a model
            that is distilled already.
    """
    path = Path(path)
    names = tensor_shapes(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in names}
    settings = read_lora_settings(path)
    if pipe.call_defaults["distilled_steps"]:
        if settings.get("distilled_steps"):
            raise ValueError(
                f"{path}: a LoRA of a distillation, but this model is distilled already; load it into its teacher"
            )
        settings = {
            name: value
            for name, value in settings.items()
            if name not in ("num_inference_steps", "guidance_scale", "distilled_steps")
        }
    others = {name for name in names if any(part in name for part in ("hada_", "lokr_", "oft_", "boft_"))}
    if others:
        raise ValueError(f"{path}: holds {min(others)}: a LoHa, LoKr or OFT of LyCORIS; expected a LoRA")
    magnitudes = [name for name in names if "dora_scale" in name or "lora_magnitude_vector" in name]
    if magnitudes:
        raise ValueError(f"{path}: holds {min(magnitudes)}: a DoRA; expected a LoRA")
    _check_numbers(tensors, path)
    tensors, alphas = _diffusers_names(pipe, tensors, path)
    with one_line_errors(path, "a LoRA"):
        fitting_names = _fitting_names(pipe, tensors, path)
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
    before, brings_settings = Sampling.of(pipe), bool(settings)
    adapters = _adapters(pipe)
    try:
        if brings_settings:
            shift = {
                field.name: settings.pop(field.name) for field in fields(Shift) if field.name in settings
            }
            inflate(pipe.unet, Shift(**shift))
            pipe.unet.register_to_config(sample_size=settings.pop("sample_size"))
            if settings.get("distilled_steps"):
                pipe.scheduler = distilled_scheduler(pipe.scheduler)
            pipe.set_model_defaults(settings)
        _add_tensors(pipe, fitting, alphas, metadata, path)
    except Exception:
        if new := _adapters(pipe) - adapters:
            pipe.delete_adapters(sorted(new)) if adapters else pipe.unload_lora_weights()
        before.restore(pipe)
        raise
    if brings_settings:
        pipe.sampling_before = pipe.sampling_before or before


def _adapters(pipe: ClipPipeline) -> set[str]:
    """Return the names of the LoRAs in the networks of a pipeline."""
    networks = (getattr(pipe, part, None) for part in ("unet", "text_encoder", "text_encoder_2"))
    return {name for network in networks for name in getattr(network, "peft_config", ())}


@dataclass(frozen=True)
class Sampling:
    """What a LoRA changes in a pipeline beside the weights."""

    shift: Shift
    sample_size: int | list[int] | None
    model_defaults: dict[str, float]
    call_defaults: dict[str, float]
    scheduler: SchedulerMixin

    @classmethod
    def of(cls, pipe: ClipPipeline) -> Sampling:
        shift = shift_of(pipe.unet) or Shift()
        return cls(
            shift,
            pipe.unet.config.sample_size,
            dict(pipe.model_defaults),
            dict(pipe.call_defaults),
            pipe.scheduler,
        )

    def restore(self, pipe: ClipPipeline) -> None:
        if shift_of(pipe.unet) != self.shift:
            inflate(pipe.unet, self.shift)
        pipe.unet.register_to_config(sample_size=self.sample_size)
        if pipe.call_defaults["distilled_steps"] != self.call_defaults["distilled_steps"]:
            pipe.scheduler = self.scheduler
        pipe.model_defaults, pipe.call_defaults = dict(self.model_defaults), dict(self.call_defaults)
        pipe.set_model_defaults({})


def _check_numbers(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            if tensor.numel() != 1 or tensor.is_complex() or not tensor.isfinite().all():
                raise ValueError(f"{path}: {name}: expected one finite number, got {tensor.tolist()!r:.60}")
        elif not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} holds {tensor.dtype}; expected a LoRA of floats, not a quantized one"
            )
        elif not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers: the file is damaged")


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
    layer_alphas = {
        name.removesuffix(".alpha"): tensor.item()
        for name, tensor in tensors.items()
        if name.endswith(".alpha") and name not in kohya
    }
    unused = set(layer_alphas)
    for name, tensor in tensors.items():
        if name in kohya or name.endswith(".alpha"):
            continue
        short = _ADAPTER.sub(r"\1", name.removeprefix("base_model.model."))
        if short.split(".")[0] in layers:
            short = f"unet.{short}"
        elif short.startswith(("text_model.", "encoder.layers.")):
            short = f"text_encoder.{short}"
        if short in renamed:
            raise ValueError(f"{path}: holds {short} of several adapters; expected one LoRA")
        scale, up = 1.0, _UP.fullmatch(name)
        if up and not {up[1], up[2]}.isdisjoint(layer_alphas):
            alpha_name = up[1] if up[1] in layer_alphas else up[2]
            scale = layer_alphas[alpha_name] / tensor.shape[1]
            unused.discard(alpha_name)
        elif ".lora_B" in name and short != name:
            scale = _peft_scale(path)
        renamed[short] = tensor if scale == 1 else tensor.float() * scale
    if unused:
        raise ValueError(f"{path}: {min(unused)}.alpha belongs to none of its matrices; expected a LoRA")
    return renamed, alphas or {}


_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_ADAPTER = re.compile(r"(\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)")
"""Ends with the name of an adapter, which peft leaves in the names of its layers: `.lora_A.default.weight`."""
_UP = re.compile(r"((.+?)(?:[._]lora(?:_linear_layer)?)?)\.(?:lora_B(?:\.[^.]+)?|lora_up|up)\.weight")
"""The name of the second matrix of a layer. Its alpha has the stem of the first group or of the second."""


def _peft_scale(path: Path) -> float:
    """Return the scale of a LoRA saved by peft, which is in the file beside it; 1 if there is none."""
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        return 1.0
    settings = read_settings(config, PeftSettings)
    rank = settings["r"]
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)


def _fitting_names(pipe: ClipPipeline, tensors: dict[str, Tensor], path: Path) -> set[str]:
    """Return the names of the pairs of matrices that fit a layer of the pipeline's networks: rows and columns as
    wide as it. Raise ValueError for a matrix of such a layer whose other half is missing or has another rank."""
    fitting: set[str] = set()
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
        pairs: dict[str, dict[str, str]] = {}
        for name, key in zip(names, keys, strict=True):
            layer, _, rest = key.removeprefix("text_model.").partition(".lora_")
            if layer in layers and rest in ("A.weight", "B.weight"):
                pairs.setdefault(layer, {})[rest[0]] = name
        for layer, pair in pairs.items():
            if len(pair) < 2:
                (name,) = pair.values()
                raise ValueError(f"{path}: {name} has no second matrix; expected two for each layer")
            down, up = (tensors[pair[half]].shape for half in "AB")
            if min(len(down), len(up)) < 2 or down[1] != layers[layer][1] or up[0] != layers[layer][0]:
                continue
            if down[0] != up[1] or not down[0]:
                raise ValueError(
                    f"{path}: {pair['A']} is of rank {down[0]}, {pair['B']} of rank {up[1]}; expected the same, 1 or more"
                )
            fitting.update(pair.values())
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
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"lora needs a U-Net, got a {type(unet).__name__}")
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
        {**(shift_of(unet) or Shift(0, 0)).to_dict(), **call_defaults, "sample_size": unet.config.sample_size}
    )

    def write(tensors: dict[str, Tensor], path: str) -> None:
        half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        save_file(half, path, metadata={"format": "pt", "latent_shift": settings})

    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), save_function=write
    )
    return folder / "pytorch_lora_weights.safetensors"
