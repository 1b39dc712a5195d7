"""Models by name, folder or file, without loading them: names, families of Stable Diffusion, and checks.

Nothing here imports torch or diffusers, so the command lists and refuses models in a fraction of
a second.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_shift.files import read_json_object, tensor_shapes
from latent_shift.models.parts import (
    NETWORKS,
    IndexSettings,
    check_network,
    check_not_quantized,
    check_tokenizer,
    read_part,
    read_settings,
    text_width,
    variants,
)

WEIGHTS = Path(__file__).parents[1] / "weights"
MODELS = {
    "emoji": "128x128, 16 frames at 8 fps, in the style of 3-D emoji, in 4 steps; trained by recipes/emoji, part of this package",
    "emoji@20": "the same in 20 steps with guidance: emoji is distilled from it, and training starts from it",
}
TEACHERS = {"emoji": "emoji@20"}
"""Distilled models, and the models they were distilled from. Both have the folder of the former, with the weights of the latter and
the LoRA of the distillation, `STUDENT`."""
STUDENT = "student.safetensors"

EXAMPLES = {
    "emoji": (
        "red heart",
        "rocket",
        "waving hand",
        "spider",
        "face with tears of joy",
        "unicorn",
    ),
}
"""Prompts that a model draws well."""
PREDICTIONS = ("epsilon", "v_prediction")


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


def identify(tensors: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name in `FAMILIES` of a single file in the original layout.

    Args:
        tensors: names and shapes, as `tensor_shapes` reads them.

    Raises:
        ValueError: another kind of file; the message names the kind.
    """

    def some(*parts: str) -> bool:
        return any(part in name for name in tensors for part in parts)

    for parts, kind in _OTHER_FILES.items():
        if some(*parts) and not (some("input_blocks.") and "joint_blocks" in parts):
            raise ValueError(kind)
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
    if family != "sdxl" and some("model.diffusion_model.label_emb.", "noise_augmentor."):
        raise ValueError(_UNCLIP)
    _check_channels(tensors.get("model.diffusion_model.input_blocks.0.0.weight", (0, 0))[1:2])
    for part, name in _LAST_TENSORS.items():
        if name not in tensors:
            raise ValueError(f"its {part} lacks {name}: the file is incomplete")
    return family


_LAST_TENSORS = {
    "U-Net": "model.diffusion_model.out.2.weight",
    "autoencoder": "first_stage_model.decoder.conv_out.weight",
}


_UNCLIP = "this is an unCLIP model, whose U-Net also takes the embedding of an image; expected one that takes text alone"
_EDM = "is trained in the formulation of EDM, which the schedulers here do not sample; expected a model that predicts epsilon or v"
_OTHER_FILES = {
    ("lora_up", "lora_down", "lora_A", "lora_B", ".lora."): (
        "this is a LoRA; load a model, then this file with pipe.load_lora_weights(path)"
    ),
    ("control_model.", "controlnet_cond_embedding"): (
        "this is a ControlNet, which is used beside a model: see docs/checkpoints.md"
    ),
    ("motion_modules.",): (
        "this is a motion module of AnimateDiff; Latent-Shift needs none: load the image model itself"
    ),
    ("joint_blocks", "double_blocks", "transformer_blocks.0.ff_context"): (
        "this is a transformer (SD 3, FLUX), which is shifted inside diffusers' own pipeline (ls.inflate, docs/method.md); expected a U-Net: SD 1.x, 2.x or XL"
    ),
    ("edm_mean", "edm_std"): f"this is Playground 2.5 (edm_mean), which {_EDM}",
    ("edm_vpred.",): f"this is CosXL (edm_vpred), which {_EDM}",
}
"""Parts of tensor names that tell files of other kinds, and what these are."""


def _check_channels(channels: Sequence[int], expected: int = 4) -> None:
    """Raise ValueError for a U-Net that takes more than latents."""
    if tuple(channels) != (expected,):
        got = channels[0] if channels else "no"
        raise ValueError(
            f"its U-Net takes {got} channels (an inpainting, depth or edit model, or an upscaler), expected {expected}: any "
            "model inpaints here with mask="
        )


def folder(model: str | Path) -> Path:
    """Return the folder of a model.

    Args:
        model: a name in `MODELS`, "pixels" (the autoencoder that keeps pixels), or a folder.

    Raises:
        ValueError: neither a name nor a folder.
    """
    name = str(model)
    path = WEIGHTS / _folder_name(name) if name in (*MODELS, "pixels") else Path(model)
    if not path.is_dir():
        nearest = difflib.get_close_matches(str(model), MODELS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{model}: expected one of {', '.join(MODELS)}, or an existing folder{hint}")
    return path


def student(model: str | Path) -> Path | None:
    """Return the LoRA that a name adds to the weights in its folder; None for any other model."""
    return folder(model) / STUDENT if str(model) in TEACHERS else None


def examples(model: str | Path) -> tuple[str, ...]:
    """Return prompts that a model of this package draws well; none for any other."""
    return EXAMPLES.get(_folder_name(str(model)), ())


def _folder_name(model: str) -> str:
    """Return the distilled model of a teacher, whose folder it shares; any other name as it is."""
    return next((student for student, teacher in TEACHERS.items() if teacher == model), model)


def is_file(model: str | Path) -> bool:
    """Return whether a model is a file; a name of `MODELS` is not, whatever file is called like it."""
    return str(model) not in MODELS and Path(model).is_file()


def on_hub(model: str | Path) -> bool:
    """Return whether a name can only be an id of the Hub ("owner/name"): it is neither a model's name nor a
    file or folder."""
    is_local = str(model) in MODELS or Path(model).exists()
    return not is_local and re.fullmatch(r"(?!\.{1,2}/)[\w.-]+/[\w.-]+", str(model)) is not None


def check_model(model: str | Path, *, variant: str | None = None, prediction: str | None = None) -> None:
    """Raise ValueError for a model that cannot be loaded with these arguments, as `load` does, before anything
    heavy is imported."""
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"prediction: expected {' or '.join(PREDICTIONS)}, got {prediction!r}")
    if is_file(model):
        if variant is not None:
            raise ValueError(f"{model}: variant {variant!r} has no effect on a single file: leave it out")
        identify_file(model)
    elif not on_hub(model):
        read_index(folder(model), variant=variant)
    else:
        from huggingface_hub import constants, try_to_load_from_cache

        cached = isinstance(try_to_load_from_cache(str(model), "model_index.json"), str)
        if constants.HF_HUB_OFFLINE and not cached:
            raise ValueError(
                f"{model}: no such folder, and HF_HUB_OFFLINE forbids to ask the Hub; expected one of "
                f"{', '.join(MODELS)}, or an existing folder"
            )


def identify_file(path: str | Path) -> str:
    """Return the name in `FAMILIES` of a `.safetensors` file; raise ValueError that names the file and what
    it is instead."""
    tensors = tensor_shapes(path)
    try:
        family = identify(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_not_quantized(Path(path))
    return family


def file_prediction(path: str | Path) -> str | None:
    """Return what the network of a single file predicts by the keys in it: "v_prediction" where it has the key
    `v_pred`, and "epsilon" where its `global_step` is that of SD 2 base. None: they do not say.

    SD 2.x exists in both kinds with the same tensors. Stability's own files hold the steps of their training:
    875,000 and 220,000 are those of 2.0 base and 2.1 base.
    """
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        names = set(file.keys())
        if "v_pred" in names:
            return "v_prediction"
        step = file.get_tensor("global_step") if "global_step" in names else None
    return (
        "epsilon" if step is not None and step.size == 1 and int(step.item()) in (875_000, 220_000) else None
    )


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
    configs = [] if is_file(model) else list(folder(model).glob("*/*config.json"))
    settings = [read_json_object(path) for path in configs]
    unused = set() if lora else {"peft"}
    if not any("quantization_config" in config for config in settings):
        unused |= {"bitsandbytes", "torchao"}
    if scheduler is None and not any(
        config.get("use_beta_sigmas") or "LMS" in str(config.get("_class_name", "")) for config in settings
    ):
        unused.add("scipy")
    return unused


def read_index(path: Path, *, variant: str | None = None) -> dict:
    """Return the model_index.json of a pipeline's folder, after a check of every part in it.

    Raises:
        ValueError: a part is missing, damaged, held in pickles only, or of another kind of model.
    """
    if not (path / "model_index.json").exists():
        part = path / "config.json"
        class_name = read_json_object(part).get("_class_name", "model") if part.exists() else None
        hint = f"; it holds a {class_name} alone" if class_name else _run_hint(path)
        raise ValueError(f"{path}: expected a diffusers folder with a model_index.json{hint}")
    index = read_settings(path / "model_index.json", IndexSettings)
    second = ("text_encoder_2", "tokenizer_2") if "text_encoder_2" in index else ()
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", *second):
        if name == "unet" and name not in index and "transformer" in index:
            raise ValueError(
                f"{path}: holds a {index['_class_name']}, whose transformer is shifted inside that pipeline of diffusers: "
                "latent_shift.inflate(pipe.transformer)"
            )
        if part_class(path, index, name) is None or not (path / name).is_dir():
            raise ValueError(
                f"{path}: has no {name}; expected a Stable Diffusion folder of unet, vae, text_encoder, tokenizer and scheduler"
            )
    if part_class(path, index, "unet") not in _DENOISERS:
        raise ValueError(f"{path}: its unet is a {index['unet'][1]}, expected UNet2DConditionModel")
    for name in index:
        is_present = isinstance(index[name], list) and part_class(path, index, name) is not None
        if is_present and name in NETWORKS:
            check_network(path / name, variant)
        elif is_present and name.startswith("tokenizer"):
            check_tokenizer(path / name)
    if variant and variant not in variants(path / "unet"):
        have = ", ".join(sorted(name or "plain" for name in variants(path / "unet")))
        raise ValueError(f"{path}: unet has no weights of variant {variant!r}; it has {have}")
    _check_kind(path, index)
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


def part_class(path: Path, index: dict, name: str) -> str | None:
    """Return the class of a part as model_index.json names it, None for a part that is left out.

    Raises:
        ValueError: an entry that is no pair of a library and a class.
    """
    entry = index.get(name, [None, None])
    pair = isinstance(entry, list) and len(entry) == 2
    if not pair or not (entry == [None, None] or all(isinstance(value, str) for value in entry)):
        raise ValueError(
            f"{path / 'model_index.json'}: {name}: expected a library and a class, got {json.dumps(entry):.60}"
        )
    return entry[1]


_DENOISERS = ("UNet2DConditionModel", "PixArtTransformer2DModel", "SanaTransformer2DModel")


def _check_kind(path: Path, index: dict) -> None:
    """Raise ValueError for a pipeline whose U-Net takes more than latents and text, or predicts what the
    schedulers here do not sample."""
    unet, vae, scheduler = (read_part(path / part) for part in ("unet", "vae", "scheduler"))
    texts = [read_part(path / name) for name in ("text_encoder", "text_encoder_2") if name in index]
    try:
        if scheduler["_class_name"].startswith(("EDM", "FlowMatch")):
            raise ValueError(f"its scheduler is {scheduler['_class_name']}: the model {_EDM}")
        _check_channels([unet.get("in_channels", 4)], vae.get("latent_channels", 4))
        if unet.get("out_channels", 4) != unet.get("in_channels", 4):
            raise ValueError(
                f"its U-Net returns {unet.get('out_channels', 4)} channels, expected those of its latents"
            )
        for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if unet.get(key) is not None:
                raise ValueError(
                    f"its U-Net has {key} {unet[key]!r}, expected null: it takes more than text, as unCLIP models do"
                )
        expected = "text_time" if len(texts) == 2 else None
        if unet.get("addition_embed_type") != expected:
            raise ValueError(
                f"its U-Net has addition_embed_type {unet.get('addition_embed_type')!r}, expected {expected!r} with "
                f"{len(texts)} text encoders"
            )
        if index.get("requires_aesthetics_score"):
            raise ValueError("this is the refiner of Stable Diffusion XL; expected the base model")
        widths = [text["hidden_size"] for text in texts if text.get("hidden_size")]
        width = text_width(unet)
        if len(widths) == len(texts) and sum(widths) != width:
            raise ValueError(f"its U-Net takes texts {width} wide, its text encoders return {sum(widths)}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
