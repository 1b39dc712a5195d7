"""Captions to embeddings, exactly as the pipeline makes them: padded to the tokenizer's length, the encoder's last hidden state."""

from __future__ import annotations

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
