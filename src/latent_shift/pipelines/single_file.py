"""Single `.safetensors` files in the layout of the original Stable Diffusion repositories.

Such a file has weights and no configuration; diffusers converts it once it has one. The configurations of
the families (catalog.py) and CLIP's vocabulary are part of the package, so that no hub is needed.
(`clip_merges.txt.gz`: the merges of OpenAI's CLIP, MIT licence.)
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from latent_shift.files import tensor_shapes
from latent_shift.pipelines import stable_diffusion
from latent_shift.pipelines.catalog import FAMILIES, Family, identify, identify_file
from latent_shift.pipelines.clip_pipeline import ClipPipeline

__all__ = ["FAMILIES", "Family", "blank", "identify", "open_file", "save_configuration", "tokenizer"]


def tokenizer(padding: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return CLIP's tokenizer, 77 tokens long."""
    with tempfile.TemporaryDirectory() as folder:
        merges = (
            gzip.decompress((Path(__file__).parents[1] / "assets" / "clip_merges.txt.gz").read_bytes())
            .decode()
            .splitlines()
        )
        letters = _letters_of_bytes()
        vocab = [
            *letters,
            *(letter + "</w>" for letter in letters),
            *("".join(merge.split()) for merge in merges),
        ]
        vocab += ["<|startoftext|>", "<|endoftext|>"]
        (Path(folder) / "vocab.json").write_text(
            json.dumps({token: index for index, token in enumerate(vocab)})
        )
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer(
            f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77, pad_token=padding
        )


def _letters_of_bytes() -> list[str]:
    """Return the letter for each byte in the vocabulary of GPT-2 and CLIP: printable ones unchanged, the
    rest from 256 up."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]


def blank(name: str, *, config_only: bool = False, dtype: torch.dtype = torch.float32) -> ClipPipeline:
    """Return a pipeline of a family with random weights, for benchmarks and tests; `config_only`: without
    weights (on the meta device)."""
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
    pipe = getattr(stable_diffusion, family.pipeline)(**parts)
    return pipe if config_only or dtype == torch.float32 else pipe.to(dtype)


def _text_encoder(name: str, index: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    family = FAMILIES[name]
    config = CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        **family.texts[index],
    )
    return (CLIPTextModelWithProjection if index else CLIPTextModel)(config)


def open_file(path: str | Path, *, dtype: torch.dtype, prediction: str | None = None) -> ClipPipeline:
    """Load a pipeline from one `.safetensors` file in the original layout of SD 1.x, 2.x or XL.

    Args:
        path: the file.
        dtype: dtype of the weights.
        prediction: "epsilon" or "v_prediction", which the weights do not say. None: what the file's keys
            `v_pred` and `ztsnr` say, or else what most models of the family predict: epsilon, and v for SD
            2.x.

    Raises:
        ValueError: another kind of file; the message says which.
    """
    tensors, name = tensor_shapes(path), identify_file(path)
    # diffusers tells some sixty kinds of checkpoint apart; it calls what it does not know "v1".
    kind = infer_diffusers_model_type(
        {key: torch.empty(shape, device="meta") for key, shape in tensors.items()}
    )
    if kind not in ("v1", "v2", "xl_base"):
        raise ValueError(f"{path}: this is a checkpoint of type {kind}; expected SD 1.x, 2.x or XL")
    with tempfile.TemporaryDirectory() as folder:
        save_configuration(blank(name, config_only=True), Path(folder))
        pipeline = getattr(stable_diffusion, FAMILIES[name].pipeline)
        pipe = pipeline.from_single_file(str(path), config=folder, torch_dtype=dtype, local_files_only=True)
    changes = {
        "prediction_type": prediction
        or ("v_prediction" if "v_pred" in tensors else pipe.scheduler.config.prediction_type)
    }
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
