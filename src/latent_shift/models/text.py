"""Prompts as embeddings, exactly as diffusers' pipelines make them; weights in prompts; interpolation
between prompts.

Shapes: L tokens, D width of the text embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latent_shift.models.prompt_syntax import Segment
from latent_shift.runtime import silenced

log = logging.getLogger("latent_shift")


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, prompts: list[str]) -> Tensor:
    """Encode B prompts: padded to the tokenizer's length, the last hidden state of the encoder.

    Args:
        tokenizer, encoder: a pair as in a diffusers folder. Encoders whose config says `use_attention_mask`
            get the attention mask, as in diffusers.
        prompts: B texts; "" is the null prompt of classifier-free guidance. Longer ones are cut at the
            tokenizer's length; `warn_of_cut_words` says of which.

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


def token_weights(
    tokenizer: PreTrainedTokenizerBase, segments: list[Segment], spell_out: Callable[[str], str] = str
) -> Tensor:
    """Return the weights `(L,)` of the tokens of a prompt, from those of its words; 1 for padding.

    Args:
        tokenizer: a tokenizer with character offsets.
        segments: words and weights, see `parse_prompt`.
        spell_out: replaces the tokens of textual inversions by those of all their vectors.

    Raises:
        ValueError: a tokenizer without character offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"weights in a prompt need a tokenizer with offsets; {type(tokenizer).__name__} has none"
        )
    spans, prompt = [], ""
    for words, weight in segments:
        words = spell_out(words)
        spans.append((len(prompt), len(prompt) + len(words), weight))
        prompt += words
    offsets = tokenizer(
        prompt,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
    ).offset_mapping
    weights = [
        next((weight for start, end, weight in spans if first < end and last > start), 1.0)
        for first, last in offsets
    ]
    return torch.tensor(weights)


def cut_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the end of a prompt that a tokenizer cuts, because it is longer than the text encoder reads; ""
    if nothing is cut."""
    with silenced("transformers.tokenization_utils_base"):  # it warns of an indexing error
        tokens = tokenizer(prompt, truncation=False).input_ids
    num_kept = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    words = [token for token in tokens if token not in tokenizer.all_special_ids]
    return tokenizer.decode(words[num_kept:]).strip()


def warn_of_cut_words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], name: str) -> None:
    """Log one warning that names the words that are cut of texts, if there are any."""
    cut = [(text, words) for text in texts if (words := cut_words(tokenizer, text))]
    if cut:
        text, words = cut[0]
        many = f"{len(cut)} {name}s are" if len(cut) > 1 else f"{name} is"
        log.warning(
            "%s truncated to the %d tokens that the text encoder reads; not read of %r: %r",
            many, tokenizer.model_max_length, _shorten(text), _shorten(words),
        )  # fmt: skip


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def interpolate(values_K: Tensor, keys: list[int], num_frames: int) -> Tensor:
    """Interpolate values given at K key frames, `(K, ...)`, linearly to F frames; hold the ends constant."""
    position = torch.from_numpy(np.interp(np.arange(num_frames), keys, np.arange(len(keys))))
    left = position.long().clamp(max=len(keys) - 1)
    right = (left + 1).clamp(max=len(keys) - 1)
    fraction = (position - left).view(-1, *[1] * (values_K.ndim - 1))
    return torch.lerp(values_K[left], values_K[right], fraction.to(values_K))
