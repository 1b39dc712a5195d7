"""Parts of a diffusers folder (unet, vae, text_encoder, tokenizer, ...): their settings and the files of their
weights, checked before anything is opened.

Nothing here imports torch, diffusers or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from latent_shift.files import (
    MAX_JSON_BYTES,
    PICKLES,
    check_regular,
    check_schema,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    split_lines,
    tensor_shapes,
)
from latent_shift.shift_settings import Edge, Place

Width = Annotated[int, Field(ge=1, le=65_536)]
Depth = Annotated[int, Field(ge=1, le=1_000)]
Side = Annotated[int, Field(ge=1, le=1024)]
Size = Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# The channels of each layer, in groups of a number and their offsets in frames, see `shift.Shift`.
_Offsets = Annotated[list[Annotated[int, Field(ge=-1000, le=1000)]], Field(min_length=1)]
_Run = Annotated[tuple[Width, _Offsets], Field(strict=False)]  # JSON has lists for tuples
Table = list[Annotated[tuple[str, list[_Run]], Field(strict=False)]]


class _Settings(BaseModel):
    """The settings of a part that this package reads itself; its class in diffusers or transformers checks the
    others. Bounds keep a damaged file from allocating terabytes."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class UNetSettings(_Settings):
    in_channels: Width = 4
    out_channels: Width = 4
    sample_size: Size | None = None
    block_out_channels: Annotated[list[Width], Field(min_length=1)]
    cross_attention_dim: Width = 1280
    layers_per_block: Depth | list[Depth] = 2
    transformer_layers_per_block: Depth | list[Depth | list[Depth]] = 1
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    encoder_hid_dim_type: str | None = None


class TransformerSettings(_Settings):
    """A transformer in the place of a U-Net, see dit.py."""

    in_channels: Width
    out_channels: Width
    num_layers: Depth
    num_attention_heads: Width
    attention_head_dim: Width
    cross_attention_dim: Width
    caption_channels: Width
    patch_size: Annotated[int, Field(ge=1, le=64)]
    sample_size: Side


class AutoencoderSettings(_Settings):
    latent_channels: Width = 4
    block_out_channels: Annotated[list[Width], Field(min_length=1)] | None = None
    encoder_block_out_channels: Annotated[list[Width], Field(min_length=1)] | None = None
    layers_per_block: Depth = 1
    scaling_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    latents_mean: list[float] | None = None
    latents_std: list[Annotated[float, Field(gt=0)]] | None = None

    @field_validator("latents_mean", "latents_std")
    @classmethod
    def _check_length(cls, numbers: list[float] | None, info: ValidationInfo) -> list[float] | None:
        num_channels = info.data.get("latent_channels")
        if numbers is not None and num_channels is not None and len(numbers) != num_channels:
            raise ValueError(f"expected {num_channels} numbers, one for each of latent_channels")
        return numbers


class TextEncoderSettings(_Settings):
    hidden_size: Width | None = None
    num_hidden_layers: Depth | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=10**6)] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=10**7)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=10**6)] | None = None
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class SchedulerSettings(_Settings):
    class_name: Annotated[str, Field(alias="_class_name")]
    prediction_type: Literal["epsilon", "v_prediction", "flow_prediction", "sample"] = "epsilon"
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    beta_start: Fraction = 0.0001
    beta_end: Fraction = 0.02
    rescale_betas_zero_snr: bool = False


class CallSettings(_Settings):
    """The entry "latent_shift" of model_index.json; the pipeline refuses unknown names itself."""

    forward: Fraction = 1 / 3
    backward: Fraction = 1 / 3
    place: Place = "conv1"
    edge: Edge = "zero"
    rule: Table | None = None
    num_frames: Annotated[int, Field(ge=1, le=10_000)] = 16
    fps: Annotated[float, Field(gt=0, le=1000)] = 8
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 7.5
    shared_noise: Fraction = 0.0
    noise_correlation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    distilled_steps: Annotated[int, Field(ge=0, le=10_000)] = 0


class LoraSettings(CallSettings):
    """The entry "latent_shift" in the header of a LoRA, which replaces the model's."""

    forward: Fraction
    backward: Fraction
    place: Place
    edge: Edge
    sample_size: Size


class PeftSettings(_Settings):
    """adapter_config.json, beside a LoRA of peft."""

    r: Width
    lora_alpha: Annotated[float, Field(gt=0)]
    use_rslora: bool = False


class IndexSettings(_Settings):
    class_name: Annotated[str, Field(alias="_class_name")]
    latent_shift: CallSettings = CallSettings()


SCHEMAS: dict[str, type[_Settings]] = {
    "unet": UNetSettings,
    "vae": AutoencoderSettings,
    "scheduler": SchedulerSettings,
    "text_encoder": TextEncoderSettings,
    "text_encoder_2": TextEncoderSettings,
}
TRANSFORMERS = ("PixArtDenoiser", "PixArtVDM", "SanaDenoiser", "SanaVDM")
"""Classes of dit.py, by their names in a config.json."""
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder", "safety_checker")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors"
)
_INDEX = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors\.index(?:\.(\w+))?\.json")
_VOCABULARIES = (
    {"tokenizer.json"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
    {"tokenizer.model"},
)


def read_settings(path: Path, schema: type[_Settings]) -> dict[str, Any]:
    """Read the settings of a part, a JSON object, and check those that `schema` names.

    Raises:
        ValueError: not an object, or a setting of another type or out of range; the message names it.
        OSError: it cannot be read.
    """
    settings = read_json_object(path)
    check_schema(settings, schema, path)
    return settings


def read_lora_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in the header of a LoRA of `save_lora`: those of the shift, of a call, and `sample_size`.

    Empty for a file of another program. Nothing heavy is imported.

    Raises:
        ValueError: no `.safetensors` file, or settings that are damaged.
    """
    from safetensors import safe_open

    tensor_shapes(path)  # its errors name the file
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    if "latent_shift" not in metadata:
        return {}
    try:
        settings = parse_json(metadata["latent_shift"])
    except ValueError as error:
        raise ValueError(f"{path}: its header has settings that are not JSON ({error})") from error
    check_schema(settings, LoraSettings, path)
    return settings


def read_part(part: Path, kind: str | None = None) -> dict[str, Any]:
    """Read the settings of a part.

    Args:
        part: its folder.
        kind: a key of `SCHEMAS`; None: the folder's name.

    Raises:
        ValueError: as in `read_settings`, or the part has no settings.
    """
    kind = kind or part.name
    path = part / ("scheduler_config.json" if kind == "scheduler" else "config.json")
    if not path.is_file():
        raise ValueError(f"{part.parent}: {part.name} has no {path.name}; copy or download the whole folder")
    is_transformer = kind == "unet" and str(read_json_object(path).get("_class_name")) in TRANSFORMERS
    return read_settings(path, TransformerSettings if is_transformer else SCHEMAS[kind])


def text_width(unet: Mapping[str, Any]) -> int:
    """Return the width of the text embeddings that a U-Net or transformer of these settings takes."""
    width = unet.get("caption_channels") or unet.get("cross_attention_dim", 1280)
    return width if isinstance(width, int) else width[0]


def variants(part: Path) -> set[str | None]:
    """Return the variants ("fp16") of the weights in the folder of a part; None stands for plain weights."""
    matches = map(_WEIGHTS.fullmatch, (file.name for file in part.glob("*.safetensors")))
    return {match[1] or match[2] for match in matches if match}


def resolve_variant(part: Path, variant: str | None) -> str | None:
    """Return the variant of a part to open: the one asked for if the part has it, else plain weights if there
    are any, else the only one.

    Raises:
        ValueError: weights in no other form than pickles, several variants to choose from, or none.
    """
    found = variants(part)
    if variant in found:
        return variant
    if None in found:
        return None
    if len(found) == 1:
        return found.pop()
    if found:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(f"{part}: expected variant (--variant) to be one of {names}, got {variant}")
    pickles = sorted(file.name for file in part.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{part.parent}: {part.name} has no .safetensors weights, only {pickles[0]} (pickle files can run any "
            "program when they are opened)"
        )
    raise ValueError(
        f"{part.parent}: {part.name} has no .safetensors weights; copy or download the whole folder"
    )


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """Return the files with the weights of a part: one, or the shards that an index lists.

    Args:
        part: the folder of a part.
        variant: a variant that the part has, from `resolve_variant`.

    Raises:
        ValueError: shards without an index, an index that is damaged, or a shard that is missing.
    """
    indices = {file: _INDEX.fullmatch(file.name) for file in part.glob("*.index*.json")}
    for index, match in indices.items():
        if match and (match[1] or match[2]) == variant:
            return _shards(index)
    files = [
        file
        for file in part.glob("*.safetensors")
        if (match := _WEIGHTS.fullmatch(file.name)) and (match[1] or match[2]) == variant
    ]
    if len(files) != 1 or "-of-" in files[0].name:
        raise ValueError(f"{part}: holds {len(files)} shards of weights without their .index.json")
    return files


def _shards(index: Path) -> list[Path]:
    """Return the shards that an index lists, after a check that each holds the tensors that it should."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an index of shards with a weight_map")
    tensors_of_shard: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
            raise ValueError(f"{index}: expected the name of a .safetensors file beside it, got {name!r:.60}")
        tensors_of_shard.setdefault(name, set()).add(tensor)
    for name, tensors in tensors_of_shard.items():
        shard = index.with_name(name)
        if not shard.is_file():
            raise ValueError(
                f"{index.parent}: the shard {name} is missing; copy or download the whole folder"
            )
        if missing := tensors - tensor_shapes(shard).keys():
            raise ValueError(f"{shard}: has no {min(missing)}, which {index.name} says it holds")
    return [index.with_name(name) for name in sorted(tensors_of_shard)]


def part_shapes(part: Path, variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a part, read from the headers of its files.

    Raises:
        ValueError: as in `resolve_variant`, `weight_files` and `tensor_shapes`.
    """
    files = weight_files(part, resolve_variant(part, variant))
    return {name: shape for file in files for name, shape in tensor_shapes(file).items()}


def check_not_quantized(path: Path) -> None:
    """Check, by the header of a `.safetensors` file, that its weights are floats that mean what they say.

    The libraries cast whole numbers to floats and leave out the scales of ComfyUI's "scaled fp8".

    Raises:
        ValueError: whole or complex numbers, bits, or scales; the message names the tensor.
    """
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
            dtype = file.get_slice(name).get_dtype()
            if _SCALES.search(name) or (name.endswith(("weight", "bias")) and dtype not in _FLOATS):
                raise ValueError(
                    f"{path}: has {name} of {dtype}: its weights are quantized; expected float16, bfloat16 or float32"
                )


_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SCALES = re.compile(
    r"(?:^|\.)(?:scaled_fp8|scale_weight|scale_input|weight_scale(?:_\d)?|input_scale|comfy_quant)$"
)


def check_network(part: Path, variant: str | None = None, *, kind: str | None = None) -> None:
    """Check the settings of one network and the headers of its weights.

    Args:
        part: its folder.
        variant: as in `resolve_variant`.
        kind: as in `read_part`.

    Raises:
        ValueError: settings that do not fit their schema, weights that are damaged or incomplete.
    """
    if not part.is_dir():
        raise ValueError(f"{part.parent}: has no {part.name}; copy or download the whole folder")
    num_tensors = len(part_shapes(part, variant))
    if (kind or part.name) not in SCHEMAS:
        return
    settings = read_part(part, kind)
    if settings.get("quantization_config") is None:
        for file in weight_files(part, resolve_variant(part, variant)):
            check_not_quantized(file)
    num_layers = (
        settings.get("num_hidden_layers")
        or settings.get("num_layers")
        or max(_depths(settings.get("layers_per_block", 1)))
    )
    if num_layers > num_tensors and settings.get("_class_name") != "PixelSpace":
        raise ValueError(
            f"{part.parent}: {part.name} has {num_layers} layers by its config.json, but weights of {num_tensors} tensors"
        )


def _depths(value: int | list) -> Iterable[int]:
    return [value] if isinstance(value, int) else [depth for item in value for depth in _depths(item)] or [1]


def check_tokenizer(part: Path) -> None:
    """Check that the folder of a tokenizer holds its whole vocabulary.

    transformers opens one without, and every prompt is then the same.

    Raises:
        ValueError: a file is missing or damaged.
    """
    if not part.is_dir():
        raise ValueError(f"{part.parent}: has no {part.name}; copy or download the whole folder")
    names = {file.name for file in part.iterdir()}
    if not any(vocabulary <= names for vocabulary in _VOCABULARIES):
        raise ValueError(
            f"{part}: has no vocabulary; expected tokenizer.json, vocab.json with merges.txt, or vocab.txt: "
            "copy or download the whole folder"
        )
    for file in sorted(path for path in part.iterdir() if path.exists() and not path.is_dir()):
        check_regular(file)  # transformers would wait for a pipe
        if file.suffix == ".json":
            read_json(file)
    if "tokenizer.json" in names or not {"vocab.json", "merges.txt"} <= names:
        return
    tokens = read_json_object(part / "vocab.json")
    num_joined = sum(len(token.removesuffix("</w>")) > 1 and not token.startswith("<|") for token in tokens)
    merges = read_bytes(part / "merges.txt", max_bytes=MAX_JSON_BYTES).decode(errors="replace")
    num_merges = sum(bool(line.strip()) and not line.startswith("#version") for line in split_lines(merges))
    if num_merges < num_joined // 2:
        raise ValueError(
            f"{part}: merges.txt has {num_merges} merges for {num_joined} tokens of vocab.json: it is cut short"
        )


def downscale_factor(vae_config) -> int:
    """Return the pixels to a side of a latent, from an autoencoder's configuration (a dict, or
    `vae.config`)."""
    widths = vae_config.get("block_out_channels") or vae_config.get("encoder_block_out_channels")
    return 2 ** (len(widths) - 1) if widths else 1  # one width is the default of AutoencoderKL
