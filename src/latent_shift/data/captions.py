"""Embed the captions of a data set once (encode.py); latents.py reads the embeddings.

Shapes: L tokens, D width of the embeddings.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from diffusers import ModelMixin
from transformers import PreTrainedModel

from latent_shift.data.store import Store, caption_at_rate, text_digest
from latent_shift.files import array_header, read_json, write_array, write_text
from latent_shift.models import text
from latent_shift.models.loading import open_text_encoder, open_tokenizer
from latent_shift.models.parts import check_network, check_tokenizer

CAPTION_SAVE_INTERVAL = 100
"""Number of caption batches after which the progress is saved."""


class Captions:
    """The captions of a store, and the text encoder that embeds them.

    Args:
        source: the store.
        texts: folder with `tokenizer/` and `text_encoder/`.
        strides: see `encode`.
        device: device of the text encoder.

    Attributes:
        encoder_digest: digest of the tokenizer and the text encoder.
        shape: (L, D) of an embedding.
        task: digest of the captions and `encoder_digest`.

    Raises:
        ValueError: `texts` does not hold both in a format that is safe to open.
    """

    def __init__(self, source: Store, texts: Path, strides: Sequence[int], device: str | torch.device):
        self.folder = texts
        check_network(texts / "text_encoder", kind="text_encoder")
        check_tokenizer(texts / "tokenizer")
        self.text_encoder = open_text_encoder(texts / "text_encoder").to(device).eval()  # type: ignore[arg-type]
        self.tokenizer = open_tokenizer(texts / "tokenizer", self.text_encoder)
        self.encoder_digest = model_digest(
            self.text_encoder, self.tokenizer.get_vocab(), self.tokenizer.model_max_length
        )
        self.captions = _captions_at_rates(source, strides)
        self.metadata = {"of": self.encoder_digest, "captions": self.captions}
        self.task = hashlib.sha256(json.dumps(self.metadata).encode()).hexdigest()

    @functools.cached_property
    def shape(self) -> list[int]:
        return list(text.embed(self.tokenizer, self.text_encoder, [""]).shape[1:])

    @property
    def num_bytes(self) -> int:
        return 2 * len(self.captions) * int(np.prod(self.shape))

    def are_written(self, out: Path) -> bool:
        """Return whether a folder has the embeddings of these captions."""
        try:
            return read_json(out / "texts.json", max_bytes=None) == self.metadata
        except (OSError, ValueError):
            return False

    def write(self, out: Path, batch_size: int) -> None:
        """Copy the text encoder and write the embeddings of all captions, unless they are there already."""
        if self.are_written(out):
            return
        for name in ("store.json", "texts.json"):
            (out / name).unlink(missing_ok=True)
        for name in ("tokenizer", "text_encoder"):
            shutil.copytree(self.folder / name, out / name, dirs_exist_ok=True)
        self._embed(out / "texts.partial.npy", out / "texts.partial.json", batch_size)
        os.replace(out / "texts.partial.npy", out / "texts.npy")
        (out / "texts.partial.json").unlink(missing_ok=True)
        digests = np.array([text_digest(caption) for caption in self.captions], np.uint64)
        write_array(out / "captions.npy", digests)
        write_text(out / "texts.json", json.dumps(self.metadata, ensure_ascii=False))

    def _embed(self, embeddings: Path, progress: Path, batch_size: int) -> None:
        """Write the embeddings to a file in order, and the progress to another, from which an interrupted call
        with the same captions continues."""
        header = array_header("<f2", (len(self.captions), *self.shape))
        num_done = self._num_done(progress) if embeddings.exists() else 0
        text.warn_of_cut_words(self.tokenizer, self.captions, "caption")
        with embeddings.open("r+b" if num_done else "wb") as file:
            if not num_done:
                _allocate(file, len(header) + self.num_bytes)
                file.write(header)
            file.seek(len(header) + num_done * 2 * int(np.prod(self.shape)))
            for num_batches, start in enumerate(range(num_done, len(self.captions), batch_size), 1):
                batch = self.captions[start : start + batch_size]
                embedding = text.embed(self.tokenizer, self.text_encoder, batch).half().cpu().numpy()
                if not np.isfinite(embedding).all():
                    finite = np.isfinite(embedding).all(axis=(1, 2))
                    raise ValueError(
                        f"{self.folder}: the text encoder embeds the caption {batch[finite.argmin()]!r:.80} to numbers that "
                        "are not finite in float16; expected another text encoder"
                    )
                file.write(embedding.data)
                if num_batches % CAPTION_SAVE_INTERVAL == 0:
                    file.flush()
                    os.fsync(file.fileno())
                    write_text(progress, json.dumps({"task": self.task, "done": start + len(batch)}))
            file.flush()
            os.fsync(file.fileno())

    def _num_done(self, progress: Path) -> int:
        """Return how many captions an interrupted call has embedded, 0 if it was for others."""
        try:
            saved = read_json(progress)
            num_done = saved["done"] if saved["task"] == self.task else 0
            return num_done if isinstance(num_done, int) and 0 <= num_done <= len(self.captions) else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _allocate(file: BinaryIO, size: int) -> None:
    """Reserve the space of a file, so that a full disk is an error before the work and not after it.

    Raises:
        OSError: the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # this file system cannot
            return
        file.truncate(0)
        error.filename = file.name
        raise


def _captions_at_rates(source: Store, strides: Sequence[int]) -> list[str]:
    """Return the null prompt and every caption at every stride, sorted by digest for the lookup."""
    captions = {caption for record in source.records for caption in record.texts if caption}
    fps = source.info["fps"]
    at_rates = {caption_at_rate(caption, fps, stride) for caption in captions for stride in {1, *strides}}
    return sorted({"", *at_rates}, key=text_digest)


def model_digest(model: PreTrainedModel | ModelMixin, *settings: object) -> str:
    """Return a hash of what determines a network's output: its config, every weight, and `settings`."""
    config = dict(model.config) if isinstance(model, ModelMixin) else model.config.to_dict()
    config = {key: value for key, value in config.items() if key[0] != "_" and not key.endswith("_version")}
    digest = hashlib.sha256(json.dumps([config, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
