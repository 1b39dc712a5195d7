"""Encode packed pixels and captions once to latents and text embeddings (latents.py).

Each shard of latents comes from one shard of pixels. Its name is a hash of that shard's name, the
autoencoder's weights and the settings, and it is renamed into place when it is complete. So any number of
processes on any number of machines can encode the shards in any order, and after an interruption only the
missing shards are encoded.

Shapes: N frames of H x W pixels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from collections import defaultdict
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
from latent_shift.data.store import (
    Store,
    caption_at_rate,
    finish_store,
    is_complete,
    open_pixel_store,
    start_store,
    text_digest,
)
from latent_shift.files import write_array, write_text
from latent_shift.models import text
from latent_shift.models.autoencoder import downscale_factor, load_autoencoder, posterior, to_pixels
from latent_shift.runtime import start_worker

CAPTION_SAVE_INTERVAL = 100
"""Number of caption batches after which the progress is saved."""
WORKER_START_SECONDS = 10
"""Approximate time that a worker process needs for its imports and for loading the autoencoder."""


@dataclass(frozen=True)
class ShardTask:
    """One shard of latents to encode.

    Attributes:
        shard: file with the pixels.
        pieces: (first frame, number of frames) of each clip to encode.
        mirror: whether to flip the frames horizontally.
        out: file for the latents.
    """

    shard: Path
    pieces: tuple[tuple[int, int], ...]
    mirror: bool
    out: Path


class Encoder:
    """Encode shards with an autoencoder.

    A process on a CPU must use one thread; then the result does not depend on the number of processes.

    Args:
        autoencoder: folder of an `AutoencoderKL`, or of a pipeline.
        batch_size: frames per batch; None: as many pixels as 32 frames of 128x128.
        device: device of the autoencoder.
    """

    def __init__(
        self, autoencoder: str | Path, batch_size: int | None = None, device: str | torch.device = "cpu"
    ):
        self.vae = load_autoencoder(autoencoder).to(device).eval()
        self.batch_size = batch_size
        self.factor = downscale_factor(self.vae.config)  # pixels per latent, along each side
        self.channels = self.vae.config.latent_channels

    @functools.cached_property
    def digest(self) -> str:
        return _model_digest(self.vae)

    @torch.no_grad()
    def moments(self, frames: np.ndarray) -> np.ndarray:
        """Return the scaled posterior mean and standard deviation of frames.

        Args:
            frames: `(N, H, W, 3) uint8`.

        Returns:
            `(N, 2, C, h, w) float16`.
        """
        pixels = to_pixels(torch.from_numpy(frames)).to(self.vae.device)
        return torch.stack(posterior(self.vae, pixels), dim=1).half().cpu().numpy()

    def __call__(self, task: ShardTask) -> None:
        """Write the moments of a shard to `task.out`, unless it exists."""
        if task.out.exists():
            return
        frames = np.load(task.shard, mmap_mode="r")
        rows = np.concatenate([np.arange(start, start + num) for start, num in task.pieces])
        batch_size = self.batch_size or max(1, 32 * 128**2 // (frames.shape[1] * frames.shape[2]))
        batches = []
        for start in range(0, len(rows), batch_size):
            batch = frames[rows[start : start + batch_size]]
            batches.append(self.moments(np.ascontiguousarray(batch[:, :, ::-1] if task.mirror else batch)))
        write_array(task.out, np.concatenate(batches))

    def seconds_per_frame(self, shard: Path) -> float:
        """Measure the time to encode one frame of a shard with one thread, after a warm-up."""
        frame = np.array(np.load(shard, mmap_mode="r")[:1])
        with single_thread():
            self.moments(frame)
            start = time.perf_counter()
            self.moments(frame)
            return time.perf_counter() - start


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
    workers: int | None = 1,
    ray: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Encode a packed data set. The same call after an interruption encodes the missing shards.

    Args:
        packed: a store of pixels from `pack`, or a pattern that matches several.
        out: where the store of latents goes.
        autoencoder: folder of an `AutoencoderKL`, or of a pipeline.
        texts: folder with `tokenizer/` and `text_encoder/`, such as a Stable Diffusion folder.
        mirror: also encode the mirror image of every clip whose captions name no direction.
        strides: frame strides for which captions are embedded (`caption_at_rate`), to train with
            `data.strides`.
        batch_size: frames, or captions, per batch; None: as many pixels as 32 frames of 128x128, or 32
            captions.
        device: device of the autoencoder and the text encoder.
        workers: number of processes, with one thread each on a CPU. None starts one per CPU or GPU, but none
            that would take longer to start than it saves.
        ray: address of a Ray cluster ("auto", "local") whose machines see `packed` and `out` under the same
            paths.
        progress: called with (number of shards done, number of shards).

    Returns:
        The new store. Its latents are scaled by `scaling_factor`, as the U-Net expects them.

    Raises:
        ValueError: not a store of pixels, `out` is an input, or `strides` or the frames' sides are invalid.
        RuntimeError: a worker process died.
    """
    source = open_pixel_store(packed)
    out = Path(out).absolute()  # the machines of a cluster have other working folders
    _check_arguments(out, [*source.folders, Path(autoencoder), Path(texts)], strides)
    encoder = Encoder(autoencoder, batch_size, device)
    _check_sides(source, encoder.factor)
    start_store(out)
    encoder.vae.save_pretrained(out / "autoencoder")
    embedding_shape, text_encoder = _encode_captions(
        source, Path(texts), out, strides, batch_size or 32, device
    )
    tasks, records, shapes = _plan_shards(source, out, encoder, mirror=mirror)
    encoder_args = (str(out / "autoencoder"), batch_size, str(device))
    for num_done in _encode_missing(tasks, shapes, encoder, encoder_args, workers, ray):
        if progress:
            progress(num_done, len(tasks))
    finish_store(
        out, records, shapes, dtype="float16", fps=source.info["fps"], size=source.info["size"],
        factor=encoder.factor, channels=encoder.channels, texts=embedding_shape, strides=sorted(set(strides)),
        autoencoder=encoder.digest, text_encoder=text_encoder,
    )  # fmt: skip
    return LatentStore(out)


def _check_arguments(out: Path, inputs: Sequence[Path], strides: Sequence[int]) -> None:
    if out.resolve() in {folder.resolve() for folder in inputs}:
        raise ValueError(f"{out}: is also an input; choose another folder for the latents")
    if any(stride < 1 for stride in strides):
        raise ValueError(f"strides must be 1 or more, got {list(strides)}")


def _check_sides(source: Store, factor: int) -> None:
    """Raise ValueError for frames that the autoencoder would crop."""
    invalid = sorted({side for shape in source.shapes.values() for side in shape[1:3] if side % factor})
    if invalid:
        raise ValueError(
            f"{source.folder} has frames with sides of {', '.join(map(str, invalid))} pixels, but the autoencoder "
            f"needs multiples of {factor}; pack the clips again at such a size"
        )


def _encode_captions(
    source: Store, texts: Path, out: Path, strides: Sequence[int], batch_size: int, device: str | torch.device
) -> tuple[list[int], str]:
    """Copy the text encoder and write the embeddings of all captions, unless they are there already.

    Returns:
        The shape (L, D) of an embedding, and the digest of the text encoder.
    """
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(texts / name, out / name, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    text_encoder = AutoModel.from_pretrained(out / "text_encoder", dtype=torch.float32).to(device).eval()
    digest = _model_digest(text_encoder, tokenizer.get_vocab(), tokenizer.model_max_length)
    captions = _captions_at_rates(source, strides)
    metadata = {"of": digest, "captions": captions}
    embeddings_path, metadata_path = out / "texts.npy", out / "texts.json"
    if metadata_path.exists() and json.loads(metadata_path.read_text(encoding="utf-8")) == metadata:
        return list(np.load(embeddings_path, mmap_mode="r").shape[1:]), digest
    metadata_path.unlink(missing_ok=True)
    text.warn_of_cut_words(tokenizer, captions, "caption")
    shape = text.embed(tokenizer, text_encoder, [""]).shape[1:]

    # An interrupted call has saved its progress; it counts if it was for the same captions and text encoder.
    progress_path = out / "texts.partial.json"
    task = hashlib.sha256(json.dumps(metadata).encode()).hexdigest()
    progress = json.loads(progress_path.read_text()) if progress_path.exists() else {}
    num_done = progress["done"] if progress.get("task") == task else 0
    file = np.lib.format.open_memmap(
        embeddings_path, "r+" if num_done else "w+", np.float16, (len(captions), *shape)
    )
    for num_batches, start in enumerate(range(num_done, len(captions), batch_size), 1):
        embeddings = text.embed(tokenizer, text_encoder, captions[start : start + batch_size])
        file[start : start + batch_size] = embeddings.half().cpu().numpy()
        if num_batches % CAPTION_SAVE_INTERVAL == 0:
            file.flush()
            write_text(progress_path, json.dumps({"task": task, "done": start + batch_size}))
    file.flush()
    progress_path.unlink(missing_ok=True)
    np.save(out / "captions.npy", np.array([text_digest(caption) for caption in captions], np.uint64))
    write_text(metadata_path, json.dumps(metadata, ensure_ascii=False))
    return list(shape), digest


def _captions_at_rates(source: Store, strides: Sequence[int]) -> list[str]:
    """Return the null prompt and every caption at every stride, sorted by digest for the lookup."""
    captions = {caption for record in source.records for caption in record.texts if caption}
    fps = source.info["fps"]
    at_rates = {caption_at_rate(caption, fps, stride) for caption in captions for stride in {1, *strides}}
    return sorted({"", *at_rates}, key=text_digest)


def _model_digest(model: PreTrainedModel | ModelMixin, *settings: object) -> str:
    """Return a hash of what determines a network's output: its config, every weight, and `settings`."""
    config = dict(model.config) if isinstance(model, ModelMixin) else model.config.to_dict()
    config = {key: value for key, value in config.items() if key[0] != "_" and not key.endswith("_version")}
    digest = hashlib.sha256(json.dumps([config, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


_DIRECTION = re.compile(
    r"\b("
    r"(left|right)(s|most|hand\w*|wards?)?"
    r"|(north|south)?(east|west)(ern|bound|wards?)?"
    r"|(anti|counter)?-?clockwise"
    r")\b",
    re.IGNORECASE,
)


def _plan_shards(
    source: Store, out: Path, encoder: Encoder, *, mirror: bool
) -> tuple[list[ShardTask], list[Record], dict[str, tuple[int, ...]]]:
    """Return the shards to encode, and the records and shapes for `finish_store`."""
    clips_of_shard: defaultdict[str, list[Record]] = defaultdict(list)
    for record in source.records:
        clips_of_shard[record.shard].append(record)
    tasks: list[ShardTask] = []
    records: list[Record] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for mirrored in (False, True) if mirror else (False,):
        for shard, clips in clips_of_shard.items():
            if mirrored:
                clips = [clip for clip in clips if not any(map(_DIRECTION.search, clip.texts))]
            if not clips:
                continue
            pieces = tuple((clip.start, clip.num_frames) for clip in clips)
            name = hashlib.sha256(repr((shard, pieces, mirrored, encoder.digest)).encode()).hexdigest()[:24]
            tasks.append(
                ShardTask(source.paths[shard].absolute(), pieces, mirrored, out / "shards" / f"{name}.npy")
            )
            height, width = source.shapes[shard][1:3]
            starts = [0, *np.cumsum([num for _, num in pieces]).tolist()]
            shapes[name] = (
                starts[-1],
                2,
                encoder.channels,
                height // encoder.factor,
                width // encoder.factor,
            )
            records += [
                replace(clip, shard=name, start=start) for clip, start in zip(clips, starts[:-1], strict=True)
            ]
    return tasks, records, shapes


def _encode_missing(
    tasks: list[ShardTask],
    shapes: dict[str, tuple[int, ...]],
    encoder: Encoder,
    encoder_args: tuple,
    workers: int | None,
    ray: str | None,
) -> Iterator[int]:
    """Encode the shards that are absent or incomplete, and yield the number of complete shards after each.

    Args:
        tasks: all shards.
        shapes: shard name -> shape.
        encoder: encodes in this process.
        encoder_args: arguments of `Encoder` in other processes.
        workers: number of processes; None: see `encode`.
        ray: address of a Ray cluster, or None.
    """
    missing = [task for task in tasks if not is_complete(task.out, shapes[task.out.stem], "float16")]
    for task in missing:
        task.out.unlink(missing_ok=True)
    num_present = len(tasks) - len(missing)
    if workers is None:
        workers = _num_worthwhile_workers(missing, shapes, encoder)
    if ray:
        results = _encode_on_ray(missing, encoder_args, workers, ray)
    elif workers > 1 and len(missing) > 1:
        results = _encode_in_pool(missing, encoder_args, workers)
    else:
        results = _encode_here(missing, encoder)
    for num_encoded, _ in enumerate(results, 1):
        yield num_present + num_encoded


def _num_worthwhile_workers(
    tasks: list[ShardTask], shapes: dict[str, tuple[int, ...]], encoder: Encoder
) -> int:
    """Return the number of processes so that each has more work than its start takes."""
    if len(tasks) <= 1:
        return 1
    on_gpu = encoder.vae.device.type == "cuda"
    available = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    num_frames = sum(shapes[task.out.stem][0] for task in tasks)
    seconds = num_frames * encoder.seconds_per_frame(tasks[0].shard)
    return max(1, min(available, len(tasks), int(seconds / WORKER_START_SECONDS)))


def _encode_here(tasks: list[ShardTask], encoder: Encoder) -> Iterator[None]:
    with single_thread():
        for task in tasks:
            encoder(task)
            yield


def _encode_in_pool(tasks: list[ShardTask], encoder_args: tuple, workers: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    num_started = context.Value("i", 0)
    initargs = (__name__, "_start_worker", num_started, *encoder_args)
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=initargs
    ) as pool:
        try:
            for future in as_completed([pool.submit(_encode_in_worker, task) for task in tasks]):
                future.result()
                yield
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_on_ray(tasks: list[ShardTask], encoder_args: tuple, workers: int, address: str) -> Iterator[None]:
    """Encode with Ray Data, which repeats a task elsewhere if its machine dies."""
    import ray

    ray.init(address=address, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        num_actors = max(1, workers)
        on_gpu = encoder_args[-1].startswith("cuda")
        indices = ray.data.range(len(tasks), override_num_blocks=len(tasks))
        actors = ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=num_actors,
            max_size=num_actors,
            max_tasks_in_flight_per_actor=2,
        )
        results = indices.map(
            _RayEncoder,  # type: ignore[arg-type]
            fn_constructor_args=(tasks, encoder_args),
            compute=actors,
            num_cpus=None if on_gpu else 1,
            num_gpus=1 if on_gpu else None,
        )
        for _ in results.iter_rows():
            yield
    finally:
        ray.shutdown()


class _RayEncoder:
    def __init__(self, tasks: list[ShardTask], encoder_args: tuple):
        torch.set_num_threads(1)
        self.tasks = tasks
        self.encoder = Encoder(*encoder_args)

    def __call__(self, row: dict) -> dict:
        self.encoder(self.tasks[row["id"]])
        return row


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch with one CPU thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


_worker_encoder: Encoder  # set by _start_worker in the processes of the pool


def _start_worker(num_started, autoencoder: str, batch_size: int | None, device: str) -> None:
    global _worker_encoder
    torch.set_num_threads(1)
    with num_started.get_lock():
        worker = num_started.value
        num_started.value += 1
    _worker_encoder = Encoder(
        autoencoder, batch_size, worker_device(device, worker, torch.cuda.device_count())
    )


def worker_device(device: str, worker: int, num_gpus: int) -> str:
    """Return the device of a worker: with "cuda" the workers take the GPUs in turn."""
    return f"cuda:{worker % num_gpus}" if device == "cuda" and num_gpus else device


def _encode_in_worker(task: ShardTask) -> None:
    _worker_encoder(task)
