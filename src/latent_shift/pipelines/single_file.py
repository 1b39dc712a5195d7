"""Single `.safetensors` files in the layout of the original Stable Diffusion repositories.

Such a file has weights and no configuration; diffusers converts it once it has one. The configurations of
the families (catalog.py) and CLIP's vocabulary are part of the package, so that no hub is needed.
(`clip_merges.txt.gz`: the merges of OpenAI's CLIP, MIT licence.)
"""

from __future__ import annotations

import gzip
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latent_shift.files import tensor_shapes
from latent_shift.models.loading import one_line_errors
from latent_shift.models.text import embed
from latent_shift.pipelines import stable_diffusion
from latent_shift.pipelines.catalog import FAMILIES, Family, file_prediction, identify, identify_file
from latent_shift.pipelines.clip_pipeline import ClipPipeline

__all__ = ["FAMILIES", "Family", "blank", "identify", "measure_prediction", "open_file", "tokenizer"]


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
    with init_empty_weights(include_buffers=False) if config_only else nullcontext():
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
        prediction: "epsilon" or "v_prediction". None: what the file's keys say (`file_prediction`), or else what
            its network does for SD 2.x, which exists in both kinds (`measure_prediction`), and epsilon for the
            other families.

    Raises:
        ValueError: another kind of file, or one that lacks tensors of its family; the message says which.
    """
    name = identify_file(path)
    # diffusers tells some sixty kinds of checkpoint apart; it calls what it does not know "v1".
    kind = infer_diffusers_model_type(
        {key: torch.empty(shape, device="meta") for key, shape in tensor_shapes(path).items()}
    )
    if kind not in ("v1", "v2", "xl_base"):
        raise ValueError(f"{path}: this is a checkpoint of type {kind}; expected SD 1.x, 2.x or XL")
    tensors = {_present_name(key): value for key, value in load_file(path).items()}
    pipe = blank(name, config_only=True)
    for part, network in pipe.components.items():
        if isinstance(network, nn.Module):
            with one_line_errors(path, f"{part} of {FAMILIES[name].title}"):
                converted = _convert(part, network, tensors)
            _assign(network, converted, dtype, f"{path}: its {part}", FAMILIES[name].title)
    prediction = prediction or file_prediction(path)
    if name == "sd2":
        prediction = prediction or measure_prediction(pipe)
        if prediction == "epsilon":  # Stability's models of 512 pixels predict the noise, those of 768 v
            pipe.unet.register_to_config(sample_size=64)
    changes: dict[str, object] = {"prediction_type": prediction} if prediction else {}
    if "ztsnr" in tensors:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def _present_name(name: str) -> str:
    """Return the name of a tensor in today's files for one in old or converted ones.

    CLIP's text model was once saved without its prefix, and some tools write the attention of the autoencoder
    with the names of diffusers, old or new.
    """
    for stem in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."):
        if name.startswith(stem) and not name.startswith(f"{stem}text_model."):
            return f"{stem}text_model.{name.removeprefix(stem)}"
    if name.startswith("first_stage_model."):
        for names, present in _ATTENTION.items():
            for old in names:
                name = name.replace(f".mid.attn_1.{old}.", f".mid.attn_1.{present}.")
    return name


_ATTENTION = {
    ("to_q", "query"): "q",
    ("to_k", "key"): "k",
    ("to_v", "value"): "v",
    ("to_out.0", "proj_attn"): "proj_out",
    ("group_norm",): "norm",
}


def _convert(part: str, network: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one part under diffusers' names."""
    if part == "unet":
        return convert_ldm_unet_checkpoint(tensors, dict(network.config))
    if part == "vae":
        return convert_ldm_vae_checkpoint(tensors, dict(network.config))
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model."):
        if (part == "text_encoder_2") == ("conditioner" in prefix) and any(
            key.startswith(prefix) for key in tensors
        ):
            converted = convert_open_clip_checkpoint(network, tensors, prefix=prefix)
            break
    else:
        converted = convert_ldm_clip_checkpoint(tensors)
    if not hasattr(network, "text_model"):  # transformers dropped the wrapper in 5.6
        converted = {key.removeprefix("text_model."): value for key, value in converted.items()}
    return converted


def _assign(
    network: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, part: str, title: str
) -> None:
    """Set the weights of a network on the meta device; raise ValueError for any that lacks or has another shape."""
    expected = network.state_dict()
    missing = expected.keys() - tensors.keys()
    if missing:
        raise ValueError(
            f"{part} lacks {len(missing)} of {len(expected)} tensors of {title}, such as {min(missing)}: the file is "
            "incomplete, or another model"
        )
    for name, value in expected.items():
        if tensors[name].shape != value.shape or not tensors[name].is_floating_point():
            got = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
            raise ValueError(
                f"{part} has {name} of {got}, expected {tuple(value.shape)} of {title}: another model, or quantized"
            )
    network.load_state_dict({name: tensors[name].to(dtype) for name in expected}, assign=True)
    network.eval()


@torch.no_grad()
def measure_prediction(pipe: ClipPipeline) -> str:
    """Return what the network of a pipeline predicts, "epsilon" or "v_prediction", by what it does.

    At the last timestep a latent is nearly its noise, x = sqrt(a) x0 + sqrt(1 - a) e with a = 0.005 for Stable
    Diffusion. A network that predicts the noise returns its input; one that predicts v = sqrt(a) e - sqrt(1 - a)
    x0 returns something else. Their correlation tells them apart: 1 or nearly 0.
    """
    unet, (length, width) = pipe.unet, (77, pipe.unet.config.cross_attention_dim)
    noise = torch.randn(1, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, length, width, dtype=unet.dtype)
    if pipe.text_encoder is not None:
        text = embed(pipe.tokenizer, pipe.text_encoder, [""])
    last = pipe.scheduler.config.num_train_timesteps - 1
    output = unet(noise.to(unet.dtype), last, text.to(unet.dtype), return_dict=False)[0].float()
    correlation = torch.corrcoef(torch.stack([noise.flatten(), output.flatten()]))[0, 1]
    return "epsilon" if correlation > 0.5 else "v_prediction"
