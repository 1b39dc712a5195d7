"""Pixels and captions to latents and embeddings, once: what the image and video stages read at every step.

    latents/
      store.json, index.jsonl, shards/KEY.npy   a store (store.py) whose frames are (2, C, h, w): posterior mean and std
      texts.json, texts.npy                     every caption once, row 0 the null prompt, as (L, D) float16
      autoencoder/, text_encoder/, tokenizer/   what made them, so that a trained U-Net can be exported whole

A shard of latents is made of one shard of pixels, and its KEY of the key of that, of the autoencoder's weights and of the settings.
So any number of processes on any number of machines can make the shards in any order, whatever stops them: a shard that is there is
whole and is not made again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from latent_shift import models, text
from latent_shift.autoencoder import to_pixels
from latent_shift.sources import Record
from latent_shift.store import BalancedSampler, Store, begin, end_with_parent, finish, pixels, save, write


class LatentStore(Store):
    """A store of latents, with the embeddings of its captions.

    Attributes:
        embeddings: `(captions, L, D) float16`; row 0 is the null prompt.
        row: caption -> row of `embeddings`.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        if "texts" not in self.info:
            raise ValueError(f"{folder}: holds pixels, not latents; `latent-shift encode` makes latents of them")
        captions = json.loads((self.folder / "texts.json").read_text())["captions"]
        self.row = {caption: index for index, caption in enumerate(captions)}
        self.embeddings = np.load(self.folder / "texts.npy", mmap_mode="r")

    def caption(self, rng: np.random.Generator, index: int, *, stride: int = 1) -> int:
        """Row of a caption of record `index`: its first wording half of the time, else one of the others; with the frame rate, where
        not every frame is taken."""
        texts = self.records[index].texts
        first = len(texts) == 1 or rng.random() < 0.5
        return self.row[at_rate(texts[0 if first else 1 + int(rng.integers(len(texts) - 1))], self.info["fps"], stride)]

    def likeness(self, *, splits: Iterable[str] = ("train",), num: int = 1000) -> dict[str, float]:
        """How alike the frames of a clip are: correlation of the latents 1, 2, 4 and 8 frames apart, and the noise that matches.

        Noise with the covariance of the clips hides what stays and what moves at the same timesteps. It is found from the differences
        2 and 4 frames apart: with a share s and a correlation r, frames k apart differ by (1 - s)(1 - r^k) of the variance.

        Args:
            splits: where the clips come from.
            num: clips of 9 frames to draw, every concept as likely as any other.

        Raises:
            ValueError: no clip of 9 frames.
        """
        long = self.select(splits=splits, num_frames=9)
        if not long:
            raise ValueError(f"{self.folder}: expected clips of 9 frames or more in {', '.join(splits)}")
        rng = np.random.default_rng(0)
        chosen = BalancedSampler(self, long).draw(rng, num)
        clips = np.stack([self.draw_window(rng, index, 9)[:, 0] for index in chosen]).astype(np.float32)
        variance = clips.var(axis=(0, 1, 3, 4)).mean()
        apart = {k: float(np.square(clips[:, k:] - clips[:, :-k]).mean() / (2 * variance)) for k in (1, 2, 4, 8)}
        drifts = min(max(apart[4] / max(apart[2], 1e-12) - 1, 0.0), 0.99)  # r^2
        return {
            **{f"correlation {k} apart": 1 - difference for k, difference in apart.items()},
            "diffusion.shared_noise": min(max(0.0, 1 - apart[2] / (1 - drifts)), 0.99),
            "diffusion.noise_correlation": drifts**0.5,
        }


def at_rate(caption: str, fps: float, stride: int) -> str:
    """A caption of every `stride`-th frame: the rate is told in words (as CogVideo does, Hong et al. 2022), which takes no parameter."""
    return caption if stride == 1 else f"{caption}, {fps / stride:g} fps"


@dataclass(frozen=True)
class Unit:
    """One shard of latents, and what it is made of: `pieces` are the (start, frames) of a shard of pixels; all of it, or mirrored those
    clips whose captions name no side."""

    shard: Path
    pieces: tuple[tuple[int, int], ...]
    mirror: bool
    out: Path


class Encoder:
    """An autoencoder that makes shards of latents. One process, one thread on a CPU: then it does not matter how many there are."""

    def __init__(self, autoencoder: str | Path, batch_size: int | None = None, device: str | torch.device = "cpu"):
        self.vae = models.load_autoencoder(autoencoder).to(device).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, unit: Unit) -> None:
        """Make `unit.out`, unless it is there."""
        if unit.out.exists():
            return
        frames = np.load(unit.shard, mmap_mode="r")
        rows = np.concatenate([np.arange(start, start + num) for start, num in unit.pieces])
        batch_size = self.batch_size or max(1, 32 * 128**2 // (frames.shape[1] * frames.shape[2]))  # as many pixels as 32 of 128x128
        batches = []
        for start in range(0, len(rows), batch_size):
            batch = frames[rows[start : start + batch_size]]
            batch = np.ascontiguousarray(batch[:, :, ::-1] if unit.mirror else batch)
            posterior = self.vae.encode(to_pixels(torch.from_numpy(batch)).to(self.vae.device)).latent_dist
            moments = torch.stack([posterior.mean, posterior.std], dim=1) * self.vae.config.scaling_factor
            batches.append(moments.half().cpu().numpy())
        save(unit.out, np.concatenate(batches))


def encode(
    packed: str | Path,
    out: str | Path,
    *,
    autoencoder: str | Path,
    texts: str | Path,
    mirror: bool = False,
    strides: Sequence[int] = (1,),
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    workers: int = 1,
    ray: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Encode a packed data set. What stops it costs the shards that were being made: the same call goes on.

    Args:
        packed: a store of pixels (`data.pack`).
        out: where the store of latents goes.
        autoencoder: a diffusers `AutoencoderKL` folder, or a pipeline's.
        texts: a folder with `tokenizer/` and `text_encoder/` (any Stable Diffusion folder has them).
        mirror: also encode the mirror image of every clip whose captions name no side.
        strides: captions are embedded for clips of every frame, every second, ... (`at_rate`), for training with `data.strides`.
        batch_size: frames, or captions, at once. None: as many pixels as 32 frames of 128x128.
        device: of the autoencoder and the text encoder.
        workers: processes. On a CPU each has one thread, so that any number of them makes the same latents.
        ray: address of a Ray cluster ("auto", "local") whose machines see `packed` and `out` under the same paths; `workers` of them
            at most are at work.
        progress: called with (shards done, shards in all).

    Returns:
        The new store. Latents are scaled by the autoencoder's `scaling_factor`, as the U-Net sees them.

    Raises:
        ValueError: not a store of pixels, or `out` is one of the folders read.
        RuntimeError: a worker died.
    """
    source, out, texts = pixels(packed), Path(out), Path(texts)
    if out.resolve() in {Path(folder).resolve() for folder in (packed, autoencoder, texts)}:
        raise ValueError(f"{out}: is read from; expected another folder for the latents")
    begin(out)
    encoder = Encoder(autoencoder, batch_size, device)
    factor = 2 ** (len(encoder.vae.config.block_out_channels) - 1)
    encoder.vae.save_pretrained(out / "autoencoder")
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(texts / name, out / name, dirs_exist_ok=True)
    shape = _encode_texts(source, out, strides, batch_size=batch_size or 32, device=device)

    units, records, shapes = _plan(source, out, encoder, mirror=mirror, factor=factor)
    missing = [unit for unit in units if not unit.out.exists()]
    for done, _ in enumerate(_run(missing, encoder, (str(out / "autoencoder"), batch_size, str(device)), workers, ray), 1):
        if progress:
            progress(len(units) - len(missing) + done, len(units))
    info = {"fps": source.info["fps"], "size": source.info["size"], "factor": factor, "channels": encoder.vae.config.latent_channels}
    finish(out, records, shapes, dtype="float16", texts=shape, strides=sorted(set(strides)), **info)
    return LatentStore(out)


def _encode_texts(source: Store, out: Path, strides: Sequence[int], *, batch_size: int, device: str | torch.device) -> list[int]:
    """Write every caption's embedding, unless they are there; returns the shape of one."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    text_encoder = AutoModel.from_pretrained(out / "text_encoder", dtype=torch.float32).to(device).eval()
    plain = {caption for record in source.records for caption in record.texts if caption}
    captions = ["", *sorted({at_rate(caption, source.info["fps"], stride) for caption in plain for stride in {1, *strides}})]
    told = {"of": _identity(text_encoder, tokenizer.get_vocab(), tokenizer.model_max_length), "captions": captions}
    path = out / "texts.npy"
    if not (out / "texts.json").exists() or json.loads((out / "texts.json").read_text()) != told:
        (out / "texts.json").unlink(missing_ok=True)
        shape = text.embed(tokenizer, text_encoder, [""]).shape[1:]
        file = np.lib.format.open_memmap(path, "w+", np.float16, (len(captions), *shape))
        for start in range(0, len(captions), batch_size):
            embeddings = text.embed(tokenizer, text_encoder, captions[start : start + batch_size])
            file[start : start + batch_size] = embeddings.half().cpu().numpy()
        file.flush()
        write(out / "texts.json", json.dumps(told, ensure_ascii=False))
    return list(np.load(path, mmap_mode="r").shape[1:])


def _identity(module: PreTrainedModel | ModelMixin, *settings: object) -> str:
    """Of what a network computes: its settings and every weight."""
    config = dict(module.config) if isinstance(module, ModelMixin) else module.config.to_dict()
    config = {key: value for key, value in config.items() if key[0] != "_" and not key.endswith("_version")}
    digest = hashlib.sha256(json.dumps([config, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


_SIDED = re.compile(r"\b((left|right|east|west)(wards?)?|(anti|counter)?clockwise)\b", re.IGNORECASE)


def _plan(
    source: Store, out: Path, encoder: Encoder, *, mirror: bool, factor: int
) -> tuple[list[Unit], list[Record], dict[str, tuple[int, ...]]]:
    """The shards to make, and what the index and store.json will say of them."""
    by_shard: dict[str, list[Record]] = {}
    for record in source.records:
        by_shard.setdefault(record.shard, []).append(record)
    identity, channels = _identity(encoder.vae), encoder.vae.config.latent_channels
    units, records, shapes = list[Unit](), list[Record](), dict[str, tuple[int, ...]]()
    for mirrored in (False, True) if mirror else (False,):
        for shard, clips in by_shard.items():
            taken = [clip for clip in clips if not (mirrored and any(map(_SIDED.search, clip.texts)))]
            if not taken:
                continue
            pieces = tuple((clip.start, clip.num_frames) for clip in taken)
            key = hashlib.sha256(repr((shard, pieces, mirrored, identity)).encode()).hexdigest()[:24]
            units.append(Unit(source.folder / "shards" / f"{shard}.npy", pieces, mirrored, out / "shards" / f"{key}.npy"))
            height, width = source.shapes[shard][1:3]
            starts = np.cumsum([0, *(num for _, num in pieces)])
            shapes[key] = (int(starts[-1]), 2, channels, height // factor, width // factor)
            records += [replace(clip, shard=key, start=int(start)) for clip, start in zip(taken, starts, strict=False)]
    return units, records, shapes


def _run(units: list[Unit], encoder: Encoder, made_of: tuple, workers: int, ray: str | None) -> Iterator[None]:
    """Make the shards in some order; yields when one is done."""
    if ray:
        yield from _on_ray(units, made_of, workers, ray)
    elif workers <= 1 or len(units) <= 1:
        with one_thread():
            for unit in units:
                encoder(unit)
                yield
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(units)), mp_context=spawn, initializer=_start, initargs=made_of) as pool:
            try:
                for task in as_completed([pool.submit(_encode_unit, unit) for unit in units]):
                    task.result()
                    yield
            finally:
                pool.shutdown(cancel_futures=True)


def _on_ray(units: list[Unit], made_of: tuple, workers: int, address: str) -> Iterator[None]:
    """Ray Data gives a shard to whoever is free, and to another one if that machine dies."""
    import ray

    ray.init(address=address, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        gpu = made_of[-1].startswith("cuda")
        numbers = ray.data.range(len(units), override_num_blocks=len(units))
        made = numbers.map(
            _RayEncoder,  # type: ignore[arg-type]
            fn_constructor_args=(units, made_of),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, workers)),
            num_cpus=None if gpu else 1,
            num_gpus=1 if gpu else None,
        )
        for _ in made.iter_rows():
            yield
    finally:
        ray.shutdown()


class _RayEncoder:
    def __init__(self, units: list[Unit], made_of: tuple):
        torch.set_num_threads(1)
        self.units, self.encoder = units, Encoder(*made_of)

    def __call__(self, row: dict) -> dict:
        self.encoder(self.units[row["id"]])
        return row


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_encoder: Encoder  # of a worker


def _start(*made_of) -> None:
    global _encoder
    end_with_parent()
    torch.set_num_threads(1)
    _encoder = Encoder(*made_of)


def _encode_unit(unit: Unit) -> None:
    _encoder(unit)
