"""Captions to embeddings, exactly as the pipeline makes them: padded to the tokenizer's length, the encoder's last hidden state."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, prompts: list[str]) -> Tensor:
    """Embeddings of B prompts.

    Args:
        tokenizer, encoder: a pair as diffusers folders hold them. The attention mask is given to encoders whose config says
            `use_attention_mask`, as diffusers does.
        prompts: B texts; "" is the null prompt of classifier-free guidance. Longer ones are cut at the tokenizer's length.

    Returns:
        `(B, L, D)` in the encoder's dtype.
    """
    tokens = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]


_WEIGHTED = re.compile(r"\(([^()]+):\s*(\d+(?:\.\d+)?)\s*\)")


def without_weights(prompt: str) -> str:
    """The prompt that is encoded: "a (red:1.4) ball" without its weight, "a red ball"."""
    return _WEIGHTED.sub(r"\1", prompt)


def weights(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """For each of the tokenizer's L tokens of `without_weights(prompt)` what "(words:weight)" says, 1 where nothing is said.

    Raises:
        ValueError: a tokenizer that does not tell which letters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"weights in a prompt need a tokenizer with offsets; {type(tokenizer).__name__} has none")
    spans, removed = [], 0
    for match in _WEIGHTED.finditer(prompt):
        start = match.start() - removed
        spans.append((start, start + len(match[1]), float(match[2])))
        removed += len(match[0]) - len(match[1])
    length = tokenizer.model_max_length
    offsets = tokenizer(
        without_weights(prompt), padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True
    ).offset_mapping
    of_token = [next((weight for start, end, weight in spans if first < end and last > start), 1.0) for first, last in offsets]
    return torch.tensor(of_token)


def between(keyed: Tensor, keys: list[int], num_frames: int) -> Tensor:
    """`(K, ...)` values at K frames to `(F, ...)`, on straight lines from one to the next, the ends held."""
    position = torch.from_numpy(np.interp(np.arange(num_frames), keys, np.arange(len(keys))))
    before = position.long().clamp(max=len(keys) - 1)
    after, share = (before + 1).clamp(max=len(keys) - 1), (position - before).view(-1, *[1] * (keyed.ndim - 1))
    return torch.lerp(keyed[before], keyed[after], share.to(keyed))
