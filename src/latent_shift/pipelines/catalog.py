"""Models by name, folder or file, without loading them: names, families of Stable Diffusion, checks and
descriptions.

Nothing here imports torch or diffusers, so the command lists, describes and refuses models in a fraction of
a second.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from latent_shift.config import Model
from latent_shift.files import tensor_shapes

WEIGHTS = Path(__file__).parents[1] / "weights"
MODELS = {
    "emoji": "128x128, 16 frames at 8 fps, in the style of 3-D emoji; trained by recipes/emoji, part of this package"
}


@dataclass(frozen=True)
class Family:
    """Settings of a family, named as in the diffusers classes; missing ones have the class's default.

    `pipeline` is the name of a class in `stable_diffusion.py`, so that this file imports neither torch nor
    diffusers.
    """

    title: str
    pipeline: str
    unet: dict
    vae: dict
    texts: tuple[dict, ...]
    scheduler: dict
    padding: tuple[str, ...] = ("<|endoftext|>",)


_CLIP_L = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu", projection_dim=768,
)  # fmt: skip
_OPEN_CLIP_H = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu", projection_dim=512,
)  # fmt: skip
_OPEN_CLIP_BIG_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280,
)  # fmt: skip
_VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2, latent_channels=4, sample_size=512, scaling_factor=0.18215,
)  # fmt: skip
_BETAS = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    timestep_spacing="leading",
)
_UNET_2 = dict(
    sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, layers_per_block=2,
    block_out_channels=(320, 640, 1280, 1280),
)  # fmt: skip

FAMILIES = {
    "sd1": Family(
        "Stable Diffusion 1.x", "LatentShiftPipeline",
        dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280)),
        _VAE, (_CLIP_L,), _BETAS,
    ),
    "sd2": Family(
        "Stable Diffusion 2.x", "LatentShiftPipeline", _UNET_2, {**_VAE, "sample_size": 768}, (_OPEN_CLIP_H,),
        {**_BETAS, "prediction_type": "v_prediction"}, ("!",),
    ),
    "sdxl": Family(
        "Stable Diffusion XL", "LatentShiftXLPipeline",
        dict(
            sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True, layers_per_block=2,
            block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ),
        {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, (_CLIP_L, _OPEN_CLIP_BIG_G), _BETAS,
        ("<|endoftext|>", "!"),
    ),
}  # fmt: skip


def identify(tensors: dict[str, tuple[int, ...]]) -> str:
    """Return the name in `FAMILIES` of a single file in the original layout.

    Args:
        tensors: names and shapes, as `tensor_shapes` reads them.

    Raises:
        ValueError: another kind of file; the message names the kind.
    """

    def some(*parts: str) -> bool:
        return any(part in name for name in tensors for part in parts)

    if some("lora_up", "lora_down", "lora_A", "lora_B", ".lora."):
        raise ValueError("this is a LoRA; load a model, then this file with pipe.load_lora_weights(path)")
    if some("control_model.", "controlnet_cond_embedding"):
        raise ValueError("this is a ControlNet, which is used beside a model: see docs/checkpoints.md")
    if some("motion_modules."):
        raise ValueError(
            "this is a motion module of AnimateDiff; Latent-Shift needs none: load the image model itself"
        )
    if some("joint_blocks", "double_blocks", "transformer_blocks.0.ff_context") and not some("input_blocks."):
        raise ValueError(
            "this is a transformer (SD 3, FLUX); the shift needs a U-Net with ResNet blocks: SD 1.x, 2.x or XL"
        )
    if not some("model.diffusion_model.input_blocks."):
        raise ValueError("there is no U-Net of Stable Diffusion's original layout in it (model.diffusion_model.*); diffusers' single "
                         "parts need their folder")  # fmt: skip
    if some("conditioner.embedders.1."):
        family = "sdxl"
    elif some("conditioner.embedders.0.model."):
        raise ValueError("this is the refiner of Stable Diffusion XL; expected the base model")
    elif some("cond_stage_model.model."):
        family = "sd2"
    elif some("cond_stage_model.transformer."):
        family = "sd1"
    else:
        raise ValueError("there is no text encoder in it (cond_stage_model.* or conditioner.*)")
    if not some("first_stage_model."):
        raise ValueError("there is no autoencoder in it (first_stage_model.*)")
    channels = tensors["model.diffusion_model.input_blocks.0.0.weight"][1]
    if channels != 4:
        raise ValueError(
            f"its U-Net takes {channels} channels (an inpainting or depth model), expected 4: any model inpaints here with mask="
        )
    return family


def folder(model: str | Path) -> Path:
    """Return the folder of a model.

    Args:
        model: a name in `MODELS`, "pixels" (the autoencoder that keeps pixels), or a folder.

    Raises:
        ValueError: neither a name nor a folder.
    """
    path = WEIGHTS / str(model) if str(model) in (*MODELS, "pixels") else Path(model)
    if not path.is_dir():
        nearest = difflib.get_close_matches(str(model), MODELS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{model}: expected one of {', '.join(MODELS)}, or an existing folder{hint}")
    return path


def on_hub(model: str | Path) -> bool:
    """Return whether a name can only be an id of the Hub ("owner/name"), and HF_HUB_OFFLINE does not forbid
    to ask it."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    is_local = str(model) in MODELS or Path(model).exists()
    return not is_local and not HF_HUB_OFFLINE and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is not None


def check_model(model: str | Path) -> None:
    """Raise ValueError for a model that cannot be loaded, as `load` does, before anything heavy is
    imported."""
    if Path(model).is_file():
        identify_file(model)
    elif not on_hub(model):
        read_index(folder(model))


def identify_file(path: str | Path) -> str:
    """Return the name in `FAMILIES` of a `.safetensors` file; raise ValueError that names the file and what
    it is instead."""
    tensors = tensor_shapes(path)
    try:
        return identify(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def unused_packages(model: str | Path, *, lora: bool = False, scheduler: str | None = None) -> set[str]:
    """Return the optional packages that sampling with a model does not use, though diffusers imports them
    where they are installed.

    Args:
        model: a name, folder, file or Hub id; of a Hub id nothing is known here, so every package may be
            used.
        lora: whether a LoRA will be loaded (peft).
        scheduler: the name of another scheduler than the model's (scipy: LMSDiscrete, and sigmas of a beta
            distribution).
    """
    if on_hub(model):
        return set()
    configs = [] if Path(model).is_file() else list(folder(model).glob("*/*config.json"))
    settings = [json.loads(path.read_text()) for path in configs]
    unused = set() if lora else {"peft"}
    if not any("quantization_config" in config for config in settings):
        unused |= {"bitsandbytes", "torchao"}
    if scheduler is None and not any(
        config.get("use_beta_sigmas") or "LMS" in config.get("_class_name", "") for config in settings
    ):
        unused.add("scipy")
    return unused


def read_index(path: Path) -> dict:
    """Return the model_index.json of a pipeline's folder; raise ValueError if a part is missing or has
    another class."""
    if not (path / "model_index.json").exists():
        part = path / "config.json"
        class_name = json.loads(part.read_text()).get("_class_name", "model") if part.exists() else None
        hint = f"; it holds a {class_name} alone" if class_name else _run_hint(path)
        raise ValueError(f"{path}: expected a diffusers folder with a model_index.json{hint}")
    index = json.loads((path / "model_index.json").read_text())
    for name in (
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        *(["text_encoder_2"] if "text_encoder_2" in index else []),
    ):
        if index.get(name, [None])[0] is None or not (path / name).is_dir():
            raise ValueError(
                f"{path}: has no {name}; expected a Stable Diffusion folder of unet, vae, text_encoder, tokenizer and scheduler"
            )
    if index["unet"][1] != "UNet2DConditionModel":
        raise ValueError(f"{path}: its unet is a {index['unet'][1]}, expected UNet2DConditionModel")
    if not list((path / "unet").glob("*.safetensors")):
        raise ValueError(
            f"{path}: unet has no .safetensors weights (pickle files can run any program when they are opened)"
        )
    return index


def _run_hint(path: Path) -> str:
    """Return where the model of a run folder is; "" for another folder."""
    if not (path / "checkpoints").is_dir() or not (path / "config.toml").exists():
        return ""
    if lora := sorted((path / "model").glob("*lora*.safetensors")):
        return f"; this is a run folder: load the model it started from with --lora {lora[0]}"
    if (path / "model").is_dir():
        return f"; this is a run folder: its model is {path / 'model'}"
    return f"; this is the folder of a run that is not finished: latent-shift train {path} continues it"


def only_variant(path: Path) -> str | None:
    """Return the variant ("fp16") of the weights in a folder that holds no other; None for plain weights or
    several variants."""
    names = {
        file.name.split(".")[1] if file.name.count(".") > 1 else None for file in path.glob("*.safetensors")
    }
    return names.pop() if len(names) == 1 else None


def describe(model: str | Path) -> dict[str, str]:
    """Return what a model is, line by line, without reading its weights; raise ValueError as `load` does."""
    lines, parts, unet, vae, scheduler, settings = (
        _file_parts(Path(model)) if Path(model).is_file() else _folder_parts(folder(model))
    )
    for part, shapes in parts.items():
        lines[part] = f"{sum(math.prod(shape) for shape in shapes) / 1e6:,.1f} M parameters"
    sides = (
        unet["sample_size"] if isinstance(unet["sample_size"], (list, tuple)) else [unet["sample_size"]] * 2
    )
    factor = 2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1)
    shift = {
        name: settings.get(name, Model.model_fields[name].default)
        for name in ("forward", "backward", "place", "edge")
    }
    lines["widths"] = ", ".join(map(str, unet["block_out_channels"]))
    lines["text width"] = str(unet["cross_attention_dim"])
    lines["picture"] = "x".join(str(factor * side) for side in sides) + " pixels"
    lines["predicts"] = scheduler.get("prediction_type", "epsilon")
    if scheduler.get("rescale_betas_zero_snr"):
        lines["predicts"] += ", zero terminal SNR"
    trained = "num_frames" in settings
    lines["frames"] = (
        f"{settings['num_frames']} at {settings.get('fps', 8):g} fps"
        if trained
        else "1: not trained on clips"
    )
    lines["shift"] = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shift.items()
    )
    return lines


def _file_parts(path: Path) -> tuple[dict[str, str], dict[str, list], dict, dict, dict, dict]:
    """Return, for a single file: the first lines of its description, the tensor shapes of each part, and the
    settings of U-Net, autoencoder, scheduler and pipeline."""
    family, tensors = FAMILIES[identify_file(path)], tensor_shapes(path)
    prefixes = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "cond"}
    parts = {
        part: [shape for key, shape in tensors.items() if key.startswith(prefix)]
        for part, prefix in prefixes.items()
    }
    scheduler = {**family.scheduler, **({"prediction_type": "v_prediction"} if "v_pred" in tensors else {})}
    lines = {"family": family.title, "format": "a single file in the original layout"}
    return lines, parts, family.unet, family.vae, scheduler, {}


def _folder_parts(path: Path) -> tuple[dict[str, str], dict[str, list], dict, dict, dict, dict]:
    """Return the same of a diffusers folder."""
    index = read_index(path)
    unet, vae, scheduler = (
        json.loads(next((path / part).glob("*config.json")).read_text())
        for part in ("unet", "vae", "scheduler")
    )
    family = _unet_family(unet)
    parts = {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (path / part).is_dir():
            variant = only_variant(path / part)
            files = [
                file for file in (path / part).glob("*.safetensors") if variant or file.name.count(".") == 1
            ]
            parts[part] = [shape for file in files for shape in tensor_shapes(file).values()]
    lines = {
        "family": family.title if family else "not one of Stable Diffusion",
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
        if same and tuple(unet["block_out_channels"]) == family.unet["block_out_channels"]:
            return family
    return None
