"""Pixels and captions to latents and embeddings (latents.py), once.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from latent_shift.data.latents import LatentStore
from latent_shift.data.readers import Record
from latent_shift.data.store import Store, at_rate, begin, digest, finish, pixels, whole
from latent_shift.files import write_array, write_text
from latent_shift.models import text
from latent_shift.models.autoencoder import downscale_factor, load_autoencoder, posterior, to_pixels
from latent_shift.runtime import exit_with_parent, start_worker

CAPTIONS_NOTED = 100
"""After so many batches of captions it is noted how far their embedding has come."""


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
        self.vae = load_autoencoder(autoencoder).to(device).eval()
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
            moments = torch.stack(posterior(self.vae, to_pixels(torch.from_numpy(batch)).to(self.vae.device)), dim=1)
            batches.append(moments.half().cpu().numpy())
        write_array(unit.out, np.concatenate(batches))


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
        packed: a store of pixels (`data.pack`), or a pattern of several.
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
        ValueError: not a store of pixels, sides that are not multiples of the autoencoder's factor, or `out` is one of the folders read.
        RuntimeError: a worker died.
    """
    source, out, texts = pixels(packed), Path(out).absolute(), Path(texts)  # machines of a cluster have other working folders
    if out.resolve() in {Path(folder).resolve() for folder in (*source.folders, autoencoder, texts)}:
        raise ValueError(f"{out}: is read from; expected another folder for the latents")
    if any(stride < 1 for stride in strides):
        raise ValueError(f"strides must be 1 or more, got {list(strides)}")
    encoder = Encoder(autoencoder, batch_size, device)
    factor = downscale_factor(encoder.vae.config)
    if odd := {side for shape in source.shapes.values() for side in shape[1:3] if side % factor}:
        raise ValueError(
            f"{packed} has frames of {', '.join(map(str, sorted(odd)))} pixels: the autoencoder needs multiples of {factor}, to be packed at"
        )
    begin(out)
    encoder.vae.save_pretrained(out / "autoencoder")
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(texts / name, out / name, dirs_exist_ok=True)
    shape, text_encoder = _encode_texts(source, out, strides, batch_size=batch_size or 32, device=device)

    identity = _identity(encoder.vae)
    units, records, shapes = _plan(source, out, identity, mirror=mirror, factor=factor, channels=encoder.vae.config.latent_channels)
    for unit in units:
        if unit.out.exists() and not whole(unit.out, shapes[unit.out.stem], "float16"):
            unit.out.unlink()
    missing = [unit for unit in units if not unit.out.exists()]
    for done, _ in enumerate(_run(missing, encoder, (str(out / "autoencoder"), batch_size, str(device)), workers, ray), 1):
        if progress:
            progress(len(units) - len(missing) + done, len(units))
    finish(
        out, records, shapes, dtype="float16", fps=source.info["fps"], size=source.info["size"], factor=factor,
        channels=encoder.vae.config.latent_channels, texts=shape, strides=sorted(set(strides)), autoencoder=identity,
        text_encoder=text_encoder,
    )  # fmt: skip
    return LatentStore(out)


def _encode_texts(
    source: Store, out: Path, strides: Sequence[int], *, batch_size: int, device: str | torch.device
) -> tuple[list[int], str]:
    """Write every caption's embedding, unless they are there; returns the shape of one and what the encoder is."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    text_encoder = AutoModel.from_pretrained(out / "text_encoder", dtype=torch.float32).to(device).eval()
    plain = {caption for record in source.records for caption in record.texts if caption}
    captions = sorted({"", *(at_rate(caption, source.info["fps"], stride) for caption in plain for stride in {1, *strides})}, key=digest)
    identity = _identity(text_encoder, tokenizer.get_vocab(), tokenizer.model_max_length)
    told = {"of": identity, "captions": captions}
    path = out / "texts.npy"
    if not (out / "texts.json").exists() or json.loads((out / "texts.json").read_text(encoding="utf-8")) != told:
        (out / "texts.json").unlink(missing_ok=True)
        shape, underway = text.embed(tokenizer, text_encoder, [""]).shape[1:], out / "texts.partial.json"
        task = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        before = json.loads(underway.read_text()) if underway.exists() else {}
        done = before["done"] if before.get("task") == task else 0  # captions of an earlier call that was stopped
        file = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float16, (len(captions), *shape))
        for number, start in enumerate(range(done, len(captions), batch_size), 1):
            embeddings = text.embed(tokenizer, text_encoder, captions[start : start + batch_size])
            file[start : start + batch_size] = embeddings.half().cpu().numpy()
            if number % CAPTIONS_NOTED == 0:
                file.flush()
                write_text(underway, json.dumps({"task": task, "done": start + batch_size}))
        file.flush()
        underway.unlink(missing_ok=True)
        np.save(out / "captions.npy", np.array([digest(caption) for caption in captions], np.uint64))
        write_text(out / "texts.json", json.dumps(told, ensure_ascii=False))
    return list(np.load(path, mmap_mode="r").shape[1:]), identity


def _identity(module: PreTrainedModel | ModelMixin, *settings: object) -> str:
    """Of what a network computes: its settings and every weight."""
    config = dict(module.config) if isinstance(module, ModelMixin) else module.config.to_dict()
    config = {key: value for key, value in config.items() if key[0] != "_" and not key.endswith("_version")}
    digest = hashlib.sha256(json.dumps([config, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


_SIDED = re.compile(
    r"\b((left|right)(s|most|hand\w*|wards?)?|(north|south)?(east|west)(ern|bound|wards?)?|(anti|counter)?-?clockwise)\b", re.IGNORECASE
)


def _plan(
    source: Store, out: Path, identity: str, *, mirror: bool, factor: int, channels: int
) -> tuple[list[Unit], list[Record], dict[str, tuple[int, ...]]]:
    """The shards to make, and what the index and store.json will say of them."""
    by_shard: dict[str, list[Record]] = {}
    for record in source.records:
        by_shard.setdefault(record.shard, []).append(record)
    units, records, shapes = list[Unit](), list[Record](), dict[str, tuple[int, ...]]()
    for mirrored in (False, True) if mirror else (False,):
        for shard, clips in by_shard.items():
            taken = [clip for clip in clips if not (mirrored and any(map(_SIDED.search, clip.texts)))]
            if not taken:
                continue
            pieces = tuple((clip.start, clip.num_frames) for clip in taken)
            key = hashlib.sha256(repr((shard, pieces, mirrored, identity)).encode()).hexdigest()[:24]
            units.append(Unit(source.paths[shard].absolute(), pieces, mirrored, out / "shards" / f"{key}.npy"))
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
        begun = spawn.Value("i", 0)
        with ProcessPoolExecutor(
            min(workers, len(units)), mp_context=spawn, initializer=start_worker, initargs=(__name__, "_start", begun, *made_of)
        ) as pool:
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
            compute=ray.data.ActorPoolStrategy(
                min_size=1, initial_size=max(1, workers), max_size=max(1, workers), max_tasks_in_flight_per_actor=2
            ),
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


def _start(begun, autoencoder: str, batch_size: int | None, device: str) -> None:
    global _encoder
    exit_with_parent()
    torch.set_num_threads(1)
    with begun.get_lock():
        number, begun.value = begun.value, begun.value + 1
    _encoder = Encoder(autoencoder, batch_size, device_of_worker(device, number, torch.cuda.device_count()))


def device_of_worker(device: str, number: int, num_gpus: int) -> str:
    """Workers on "cuda" take its devices in turn."""
    return f"cuda:{number % num_gpus}" if device == "cuda" and num_gpus else device


def _encode_unit(unit: Unit) -> None:
    _encoder(unit)
