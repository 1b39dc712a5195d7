"""The names of what a model was trained on, and how near a prompt is to them.

They are in `names.safetensors` in the model's folder: the names in its metadata, and the embedding of each by the model's own text
encoder. Nothing here imports torch unless something is embedded.

Shapes: N names, D width of the text embeddings.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latent_shift.files import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "names.safetensors"
LONGEST = 4
"""Words of the longest part of a prompt that is compared with names."""
_FUNCTION_WORDS = {
    "a", "an", "the", "this", "that", "these", "those", "is", "are", "was", "be", "of", "on", "in", "at", "to", "from", "by", "with", "and",
    "or", "for", "as", "it", "its", "his", "her", "their", "no", "not",
}  # fmt: skip
_MODIFIERS = {
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray", "gold", "golden", "silver",
    "background", "two", "three", "four", "five", "six",
}  # fmt: skip
"""Words that name no thing: "a green X" is near to "green apple", whatever X is."""


@dataclass(frozen=True)
class Names:
    """Names of a model.

    Attributes:
        names: N names.
        embeddings: `(N, D)` unit vectors.
        threshold: the cosine similarity to a name below which a prompt is far from all of them.
    """

    names: tuple[str, ...]
    embeddings: np.ndarray
    threshold: float

    def search(self, word: str) -> list[str]:
        """Return the names that contain a word or part of one, whatever its case, in alphabetical order."""
        return sorted(name for name in self.names if word.lower() in name.lower())

    def complete(self, text: str, num: int = 10) -> list[str]:
        """Return names that a text may be the beginning of, the likeliest first: names that begin with it, then names with a
        word that does; short ones first."""
        text = text.lower()
        ranked = [
            (not name.lower().startswith(text), len(name), name)
            for name in self.names
            if f" {text}" in f" {name.lower()}"
        ]
        return [name for *_, name in sorted(ranked)[:num]]

    def nearest(
        self, prompt: str, embed: Callable[[list[str]], np.ndarray], num: int = 3
    ) -> list[tuple[str, float]]:
        """Return the names nearest to any part of a prompt of up to `LONGEST` words, and their cosine similarities.

        Args:
            prompt: any text.
            embed: returns unit vectors `(texts, D)`.
            num: how many.

        Raises:
            ValueError: names of another text encoder.
        """
        rows = embed(parts(prompt))
        if rows.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"{FILE}: its embeddings have {self.embeddings.shape[1]} numbers, those of the text encoder {rows.shape[1]}"
            )
        similarity = (rows @ self.embeddings.astype(np.float32).T).max(axis=0)
        order = np.argsort(-similarity, kind="stable")[:num]
        return [(self.names[index], float(similarity[index])) for index in order]


def parts(prompt: str) -> list[str]:
    """Return the prompt and every run of up to `LONGEST` of its words with one that is not a mere function word, also in
    the singular; without colours and numbers, unless there is nothing else."""
    words = re.findall(r"[\w’'-]+", prompt)
    things = [word for word in words if word.lower() not in _MODIFIERS]
    if len(things) < len(words) and not _FUNCTION_WORDS.issuperset(map(str.lower, things)):
        words, prompt = things, " ".join(things)
    runs = (
        words[start : start + length]
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )
    texts = [" ".join(run) for run in runs if not _FUNCTION_WORDS.issuperset(map(str.lower, run))]
    singular = [re.sub(r"(?<=[^su])s$", "", re.sub(r"ies$", "y", text)) for text in texts]
    return list(dict.fromkeys(itertools.chain([prompt], texts, singular)))


def embedder(
    tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, batch_size: int = 64
) -> Callable[[list[str]], np.ndarray]:
    """Return a function from texts to unit vectors `(texts, D) float32`: the mean of the last hidden states of their tokens."""
    import torch

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(
                texts[start : start + batch_size],
                padding=True,
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).to(encoder.device)
            states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0].float()
            weights = tokens.attention_mask[..., None]
            mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
            rows.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
        return np.concatenate(rows)

    return embed


def write_names(folder: str | Path, names: Sequence[str], embeddings: np.ndarray, threshold: float) -> None:
    """Write the names of a model into its folder.

    Args:
        folder: of the model.
        names, embeddings, threshold: see `Names`.
    """
    from safetensors.numpy import save

    metadata = {"names": json.dumps(list(names), ensure_ascii=False), "threshold": repr(float(threshold))}
    with atomic_write(Path(folder) / FILE) as file:
        file.write(save({"embeddings": embeddings.astype(np.float16)}, metadata))


def read_names(folder: str | Path) -> Names | None:
    """Read the names of a model; None for a model without.

    Raises:
        ValueError: a file that is not as `write_names` writes it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            names = tuple(json.loads(metadata["names"]))
            result = Names(names, file.get_tensor("embeddings"), float(metadata["threshold"]))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected the names of a model: {error}") from None
    if not names or result.embeddings.ndim != 2 or len(result.embeddings) != len(names):
        raise ValueError(f"{path}: has {len(names)} names and embeddings {result.embeddings.shape}")
    return result
