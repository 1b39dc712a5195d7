"""Prompts as embeddings, exactly as diffusers' pipelines make them; weights in prompts; interpolation
between prompts.

Shapes: L tokens, D width of the text embeddings.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, prompts: list[str]) -> Tensor:
    """Encode B prompts: padded to the tokenizer's length, the last hidden state of the encoder.

    Args:
        tokenizer, encoder: a pair as in a diffusers folder. Encoders whose config says `use_attention_mask`
            get the attention mask, as in diffusers.
        prompts: B texts; "" is the null prompt of classifier-free guidance. Longer ones are cut at the
            tokenizer's length.

    Returns:
        `(B, L, D)` in the encoder's dtype.
    """
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    mask = (
        tokens.attention_mask.to(encoder.device)
        if getattr(encoder.config, "use_attention_mask", False)
        else None
    )
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]


def num_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Return the number of tokens of a prompt that is not cut, with those of its start and end."""
    return len(tokenizer(prompt, verbose=False).input_ids)


_WEIGHTED = re.compile(r"\(([^()]+):\s*(\d+(?:\.\d+)?)\s*\)")


def without_weights(prompt: str) -> str:
    """Return the prompt to encode: "a (red:1.4) ball" without its weight, "a red ball"."""
    return _WEIGHTED.sub(r"\1", prompt)


def prompt_weights(pipe, prompts: list[str]) -> Tensor:
    """Return `(B, L)` weights of the tokens of `without_weights(prompt)`: 1.4 for the tokens of "(red:1.4)",
    1 elsewhere.

    A token of a textual inversion counts as the vectors that it stands for.

    Args:
        pipe: a pipeline with a tokenizer, or anything with the attribute `tokenizer`.
        prompts: B prompts.

    Raises:
        ValueError: a tokenizer without character offsets.
    """
    if not pipe.tokenizer.is_fast:
        raise ValueError(
            f"weights in a prompt need a tokenizer with offsets; {type(pipe.tokenizer).__name__} has none"
        )
    convert = getattr(pipe, "maybe_convert_prompt", lambda prompt, _: prompt)
    return torch.stack(
        [_token_weights(pipe.tokenizer, convert(prompt, pipe.tokenizer)) for prompt in prompts]
    )


def _token_weights(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    spans, num_removed = [], 0
    for match in _WEIGHTED.finditer(prompt):
        start = match.start() - num_removed
        spans.append((start, start + len(match[1]), float(match[2])))
        num_removed += len(match[0]) - len(match[1])
    length = tokenizer.model_max_length
    offsets = tokenizer(
        without_weights(prompt),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_offsets_mapping=True,
    ).offset_mapping
    weights = [
        next((weight for start, end, weight in spans if first < end and last > start), 1.0)
        for first, last in offsets
    ]
    return torch.tensor(weights)


def interpolate(values_K: Tensor, keys: list[int], num_frames: int) -> Tensor:
    """Interpolate values given at K key frames, `(K, ...)`, linearly to F frames; hold the ends constant."""
    position = torch.from_numpy(np.interp(np.arange(num_frames), keys, np.arange(len(keys))))
    left = position.long().clamp(max=len(keys) - 1)
    right = (left + 1).clamp(max=len(keys) - 1)
    fraction = (position - left).view(-1, *[1] * (values_K.ndim - 1))
    return torch.lerp(values_K[left], values_K[right], fraction.to(values_K))
