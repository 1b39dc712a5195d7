"""Open the parts of a diffusers folder: networks, text encoders, tokenizers and schedulers. A part that is
damaged, incomplete or of another kind is a ValueError of one line.

diffusers and transformers fill in what a file lacks: weights that are missing are random, a tokenizer without
its vocabulary is empty. Nothing is filled in here.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from latent_shift.models.network_classes import saved_class
from latent_shift.models.parts import check_network, check_tokenizer, read_part, resolve_variant


@contextmanager
def one_line_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever a library raises while it opens a file into a ValueError of one line.

    The block must hold the library's call alone. There is no narrower class to catch: a setting of a wrong type
    fails wherever its network first uses it, and tokenizers raises `Exception` itself.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        if str(path) in str(error) and "\n" not in str(error).strip():
            raise
        raise ValueError(f"{path}: cannot be opened as {kind} ({_first_line(error)})") from error
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be opened as {kind} ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else "no reason given"


def open_network(
    path: Path, default: type[ModelMixin], *, kind: str | None = None, dtype: torch.dtype, variant: str | None = None
) -> ModelMixin:  # fmt: skip
    """Open a network of diffusers, or one of the baselines.

    Args:
        path: its folder.
        default: its class, if its config.json names no other that this package knows.
        kind: "unet" or "vae"; None: the folder's name.
        dtype: dtype of the weights.
        variant: as in `resolve_variant`.

    Raises:
        ValueError: settings that its class cannot be built from, or weights that do not fit it.
    """
    check_network(path, variant, kind=kind)
    network_class = saved_class(path, default)
    check_types(network_class, read_part(path, kind), path / "config.json")
    variant = resolve_variant(path, variant)
    with one_line_errors(path, network_class.__name__):
        network, info = network_class.from_pretrained(
            path, dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True, local_files_only=True
        )  # fmt: skip
    _check_complete(network, info, path)
    return network


def open_text_encoder(
    path: Path, class_name: str = "AutoModel", *, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> PreTrainedModel:  # fmt: skip
    """Open a text encoder.

    Args:
        path: its folder.
        class_name: its class in transformers, as model_index.json names it.
        dtype, variant: as in `open_network`.

    Raises:
        ValueError: as in `open_network`.
    """
    check_network(path, variant, kind="text_encoder")
    encoder_class = getattr(transformers, class_name, None)
    if encoder_class is None:
        raise ValueError(
            f"{path}: transformers has no {class_name}; expected a text encoder such as CLIPTextModel"
        )
    variant = resolve_variant(path, variant)
    with one_line_errors(path, class_name):
        encoder, info = encoder_class.from_pretrained(
            path, dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    _check_complete(encoder, info, path)
    return encoder


def _check_complete(network: torch.nn.Module, info: dict[str, typing.Collection[str]], path: Path) -> None:
    missing = info["missing_keys"]
    if missing:
        raise ValueError(
            f"{path}: its weights lack {len(missing)} of {len(network.state_dict())} tensors of a "
            f"{type(network).__name__}, such as {min(missing)}"
        )
    quantized = getattr(network.config, "quantization_config", None) is not None
    other = next((name for name, value in network.named_parameters() if not value.is_floating_point()), None)
    if other and not quantized:
        raise ValueError(f"{path}: {other} holds whole numbers, expected weights that are not quantized")
    unexpected = [name for name in info["unexpected_keys"] if not _HARMLESS.search(name)]
    if unexpected and not quantized:
        raise ValueError(
            f"{path}: its weights have {len(unexpected)} tensors that a {type(network).__name__} of its config.json "
            f"lacks, such as {min(unexpected)}: one of the two files is of another model"
        )


_HARMLESS = re.compile(
    r"(^|\.)position_ids$|^(vision_model|visual_projection|text_projection|logit_scale)(\.|$)"
)
"""Tensors that old files and whole CLIP models have beside those of a text encoder."""


def open_tokenizer(path: Path, encoder: PreTrainedModel | None = None) -> PreTrainedTokenizerBase:
    """Open a tokenizer and check that it belongs to a text encoder.

    Args:
        path: its folder.
        encoder: the encoder that will read its tokens.

    Raises:
        ValueError: no vocabulary, one that is larger than the encoder's, or no length of a prompt.
    """
    check_tokenizer(path)
    with one_line_errors(path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        num_tokens, last_id = len(tokenizer), max(tokenizer.get_vocab().values(), default=0)
        num_special = len(tokenizer.all_special_ids)
    config = getattr(encoder, "config", None)
    vocab_size, length = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    if num_tokens <= num_special:
        raise ValueError(f"{path}: its vocabulary is empty, so that every prompt is the same")
    if vocab_size is not None and last_id >= vocab_size:
        raise ValueError(
            f"{path}: has {num_tokens} tokens, its text encoder {vocab_size}: they belong to different models"
        )
    most = length or 100_000
    if not isinstance(tokenizer.model_max_length, int) or not 2 < tokenizer.model_max_length <= most:
        raise ValueError(
            f"{path}: expected model_max_length in tokenizer_config.json to be from 3 to {most}, the tokens that its "
            f"text encoder reads, got {tokenizer.model_max_length!r}"
        )
    with one_line_errors(path, "a tokenizer"):
        one, other = tokenizer(["red", "a blue bird"], padding="max_length", truncation=True).input_ids
    if one == other:
        raise ValueError(f"{path}: every prompt is the same to it")
    return tokenizer


def open_scheduler(path: Path) -> SchedulerMixin:
    """Open a scheduler from its folder, and try it for two steps.

    Raises:
        ValueError: a class that diffusers does not have, or settings that it cannot sample with.
    """
    settings, file = read_part(path, "scheduler"), path / "scheduler_config.json"
    scheduler_class: Any = getattr(diffusers, settings["_class_name"], None)
    is_scheduler = isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
    if not is_scheduler:
        raise ValueError(f"{file}: diffusers has no scheduler {settings['_class_name']}")
    check_types(scheduler_class, settings, file)
    with one_line_errors(file, settings["_class_name"]):
        scheduler = scheduler_class.from_pretrained(path, local_files_only=True)
        trial = copy.deepcopy(scheduler)
        trial.set_timesteps(2)
        latents = torch.zeros(1, 4, 2, 2)
        for timestep in trial.timesteps:
            latents = trial.step(latents, timestep, trial.scale_model_input(latents, timestep)).prev_sample
    return scheduler


def check_types(cls: type, settings: dict, path: Path) -> None:
    """Check the settings of a class of diffusers against the types of its arguments.

    Its constructor takes anything: "false" is then true, and a text instead of a number fails after the first
    clip is sampled.

    Raises:
        ValueError: a setting of another type; the message names it.
    """
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    hints = typing.get_type_hints(inspect.unwrap(cls.__init__))  # type: ignore[misc]
    for name, value in settings.items():
        hint = hints.get(name)
        if name not in parameters or hint is None:
            continue
        kinds = _json_kinds(hint) | _json_kinds(type(parameters[name].default))
        # SDXL's own U-Net has null for a flag that is off.
        allowed = kinds | ({int} if float in kinds else set()) | ({type(None)} if bool in kinds else set())
        if type(value) not in allowed and object not in _json_kinds(hint):
            expected = " or ".join(sorted(_JSON_NAMES[kind] for kind in kinds - {object}))
            raise ValueError(f"{path}: {name}: expected {expected}, got {value!r:.60}")


_JSON_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip


def _json_kinds(hint: object) -> set[type]:
    """Return the types that JSON has for a type hint; `object` stands for any."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_json_kinds, typing.get_args(hint)))
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    kind = origin or hint
    if kind in (tuple, list):
        return {list}
    return (
        {kind} if kind in _JSON_NAMES else {list} if getattr(kind, "__name__", "") == "ndarray" else {object}
    )
