"""Single `.safetensors` files, and the families of Stable Diffusion that they belong to.

A file in the layout of the original repositories has weights and no configuration; diffusers converts it once it has one. The
configurations are here, with CLIP's vocabulary, so that no hub is needed. (`clip_merges.txt.gz`: the merges of OpenAI's CLIP, MIT
licence.)
"""

from __future__ import annotations

import gzip
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from latent_shift.files import tensor_shapes
from latent_shift.pipelines.clip_pipeline import ClipPipeline
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline


@dataclass(frozen=True)
class Family:
    """Configurations of one family, named as in the diffusers classes; keys that are left out have the default of the class."""

    title: str
    pipeline: type[ClipPipeline]
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
_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
_UNET_2 = dict(
    sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, layers_per_block=2,
    block_out_channels=(320, 640, 1280, 1280),
)  # fmt: skip

FAMILIES = {
    "sd1": Family(
        "Stable Diffusion 1.x", LatentShiftPipeline,
        dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280)),
        _VAE, (_CLIP_L,), _BETAS,
    ),
    "sd2": Family(
        "Stable Diffusion 2.x", LatentShiftPipeline, _UNET_2, {**_VAE, "sample_size": 768}, (_OPEN_CLIP_H,),
        {**_BETAS, "prediction_type": "v_prediction"}, ("!",),
    ),
    "sdxl": Family(
        "Stable Diffusion XL", LatentShiftXLPipeline,
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
    """Return the name in `FAMILIES` of a file with these tensors in the original layout.

    Args:
        tensors: names and shapes.

    Raises:
        ValueError: another kind of file; the message says which.
    """

    def has(*parts: str) -> bool:
        return any(part in name for name in tensors for part in parts)

    if has("lora_up", "lora_down", "lora_A", "lora_B", ".lora."):
        raise ValueError("this is a LoRA; load a model, then this file with pipe.load_lora_weights(path)")
    if has("control_model.", "controlnet_cond_embedding"):
        raise ValueError("this is a ControlNet, which is used beside a model: see docs/checkpoints.md")
    if has("motion_modules."):
        raise ValueError("this is a motion module of AnimateDiff; Latent-Shift needs none: load the image model itself")
    # diffusers tells some sixty kinds of checkpoint apart, but calls everything else "v1".
    kind = infer_diffusers_model_type({name: torch.empty(shape, device="meta") for name, shape in tensors.items()})
    if kind in ("xl_refiner", "xl_inpaint", "inpainting", "inpainting_v2"):
        hint = "expected the base model" if kind == "xl_refiner" else "expected 4 input channels: any model inpaints here with mask="
        raise ValueError(f"this is a checkpoint of type {kind}; {hint}")
    if kind not in ("v1", "v2", "xl_base"):
        raise ValueError(f"this is a checkpoint of type {kind}; the shift needs a U-Net of SD 1.x, 2.x or XL")
    if not has("model.diffusion_model."):
        raise ValueError(
            "there is no U-Net of Stable Diffusion's original layout in it (model.diffusion_model.*); single parts of diffusers need "
            "their folder"
        )
    if not has("model.diffusion_model.input_blocks."):
        raise ValueError("this is a transformer; the shift needs a U-Net with ResNet blocks: SD 1.x, 2.x or XL")
    if has("conditioner.embedders.1."):
        family = "sdxl"
    elif has("conditioner.embedders.0.model."):
        raise ValueError("this is the refiner of Stable Diffusion XL; expected the base model")
    elif has("cond_stage_model.model."):
        family = "sd2"
    elif has("cond_stage_model.transformer."):
        family = "sd1"
    else:
        raise ValueError("there is no text encoder in it (cond_stage_model.* or conditioner.*)")
    if not has("first_stage_model."):
        raise ValueError("there is no autoencoder in it (first_stage_model.*)")
    channels = tensors["model.diffusion_model.input_blocks.0.0.weight"][1]
    if channels != 4:
        raise ValueError(
            f"its U-Net takes {channels} channels (an inpainting or depth model), expected 4: any model inpaints here with mask="
        )
    return family


def family_of(unet: dict) -> Family | None:
    """Return the family of a diffusers folder by the configuration of its U-Net, or None."""
    for family in FAMILIES.values():
        keys = ("cross_attention_dim", "use_linear_projection")
        same_widths = tuple(unet["block_out_channels"]) == family.unet["block_out_channels"]
        if same_widths and all(unet.get(key, False) == family.unet.get(key, False) for key in keys):
            return family
    return None


def tokenizer(padding: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return CLIP's tokenizer, 77 tokens long."""
    with tempfile.TemporaryDirectory() as folder:
        merges = gzip.decompress((Path(__file__).parents[1] / "assets" / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
        letters = _letters_of_bytes()
        vocab = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
        vocab += ["<|startoftext|>", "<|endoftext|>"]
        (Path(folder) / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77, pad_token=padding)


def _letters_of_bytes() -> list[str]:
    """Return the letter for each byte in the vocabulary of GPT-2 and CLIP: printable ones unchanged, the rest from 256 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]


def blank(name: str, *, config_only: bool = False, dtype: torch.dtype = torch.float32) -> ClipPipeline:
    """Return a pipeline of a family with random weights, for benchmarks and tests; `config_only`: without weights (on the meta device)."""
    family = FAMILIES[name]
    with torch.device("meta" if config_only else "cpu"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **family.unet)
        vae = AutoencoderKL(**family.vae)
        encoders = [_text_encoder(name, index) for index in range(len(family.texts))]
    tokenizers = [tokenizer(padding) for padding in family.padding]
    scheduler = EulerDiscreteScheduler(**family.scheduler)
    parts = {"vae": vae.eval(), "unet": unet.eval(), "scheduler": scheduler}
    for index, (encoder, words) in enumerate(zip(encoders, tokenizers, strict=True)):
        suffix = f"_{index + 1}" if index else ""
        parts |= {f"text_encoder{suffix}": encoder.eval(), f"tokenizer{suffix}": words}
    return family.pipeline(**parts) if config_only or dtype == torch.float32 else family.pipeline(**parts).to(dtype)


def _text_encoder(name: str, index: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    family = FAMILIES[name]
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, **family.texts[index])
    return (CLIPTextModelWithProjection if index else CLIPTextModel)(config)


def open_file(path: str | Path, *, dtype: torch.dtype, prediction: str | None = None) -> ClipPipeline:
    """Load a pipeline from one `.safetensors` file in the original layout of SD 1.x, 2.x or XL.

    Args:
        path: the file.
        dtype: dtype of the weights.
        prediction: "epsilon" or "v_prediction", which the weights do not say. None: what the file's keys `v_pred` and `ztsnr` say,
            or else what most models of the family predict: epsilon, and v for SD 2.x.

    Raises:
        ValueError: another kind of file; the message says which.
    """
    tensors = tensor_shapes(path)
    try:
        name = identify(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        save_configuration(blank(name, config_only=True), Path(folder))
        pipe = FAMILIES[name].pipeline.from_single_file(str(path), config=folder, torch_dtype=dtype, local_files_only=True)
    changes = {"prediction_type": prediction or ("v_prediction" if "v_pred" in tensors else pipe.scheduler.config.prediction_type)}
    if "ztsnr" in tensors:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def save_configuration(pipe: ClipPipeline, folder: Path) -> None:
    """Save a diffusers folder without its weights."""
    for name, part in pipe.components.items():
        if part is None:
            continue
        if isinstance(part, (UNet2DConditionModel, AutoencoderKL)):
            part.save_config(folder / name)
        elif isinstance(part, PreTrainedModel):
            part.config.save_pretrained(folder / name)
        else:
            part.save_pretrained(folder / name)
    pipe.save_config(folder)
