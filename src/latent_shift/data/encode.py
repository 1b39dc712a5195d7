"""Encode packed pixels and captions once to latents and text embeddings (latents.py).

Each shard of latents comes from one shard of pixels. Its name is a hash of that shard's name, the
autoencoder's weights and the settings, and it is renamed into place when it is complete. So any number of
processes on any number of machines can encode the shards in any order, and after an interruption only the
missing shards are encoded. One process leads: it alone writes the captions and the index. Others with the
same task help with the shards; one with another task is refused.

Shapes: N frames of H x W pixels.
"""

from __future__ import annotations

import functools
import hashlib
import math
import multiprocessing
import os
import random
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from latent_shift.data.captions import Captions, model_digest
from latent_shift.data.latents import LatentStore
from latent_shift.data.records import Record
from latent_shift.data.store import ADVICE, Store, is_complete, open_pixel_store, read_info
from latent_shift.data.store_writer import LATENTS, finish_store, store_folder
from latent_shift.data.workers import WorkerDied, Workers
from latent_shift.files import full_disk_named, open_array, read_json, write_array, write_text
from latent_shift.folders import FolderInUse
from latent_shift.models.autoencoder import load_autoencoder, posterior, to_pixels
from latent_shift.models.parts import downscale_factor
from latent_shift.runtime import start_worker

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
        shape: of the latents.
    """

    shard: Path
    pieces: tuple[tuple[int, int], ...]
    mirror: bool
    out: Path
    shape: tuple[int, ...]

    @property
    def is_done(self) -> bool:
        return is_complete(self.out, self.shape, "float16")


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
        return model_digest(self.vae)

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
        """Write the moments of a shard to `task.out`, unless they are there. An incomplete file is replaced in one
        step, so that no process deletes what another has completed."""
        if task.is_done:
            return
        frames = open_array(task.shard, "uint8", (None, None, None, 3), advice=ADVICE)
        rows = np.concatenate([np.arange(start, start + num) for start, num in task.pieces])
        batch_size = self.batch_size or max(1, 32 * 128**2 // (frames.shape[1] * frames.shape[2]))
        batches = []
        for start in range(0, len(rows), batch_size):
            batch = frames[rows[start : start + batch_size]]
            batches.append(self.moments(np.ascontiguousarray(batch[:, :, ::-1] if task.mirror else batch)))
        moments = np.concatenate(batches)
        if not np.isfinite(moments).all():
            raise ValueError(
                f"{task.shard}: the autoencoder encodes it to numbers that are not finite; expected another autoencoder"
            )
        write_array(task.out, moments)

    def seconds_per_frame(self, shard: Path) -> float:
        """Measure the time to encode one frame of a shard with one thread, after a warm-up."""
        frame = np.array(open_array(shard, advice=ADVICE)[:1])
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
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Encode a packed data set. The same call after an interruption encodes the missing shards.

    The same call in several processes shares the shards among them.

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
        force: also write into a folder that holds something else; see `output_folder`.
        progress: called with (number of shards done, number of shards).

    Returns:
        The new store. Its latents are scaled by `scaling_factor`, as the U-Net expects them.

    Raises:
        ValueError: not a store of pixels, `out` is an input, holds something else or is in use, or `strides` or
            the frames' sides are invalid.
        RuntimeError: a worker process died twice on one shard.
    """
    source = open_pixel_store(packed)
    out = Path(out).absolute()  # the machines of a cluster have other working folders
    _check_arguments(out, [*source.folders, Path(autoencoder), Path(texts)], strides)
    encoder = Encoder(autoencoder, batch_size, device)
    _check_sides(source, encoder.factor)
    captions = Captions(source, Path(texts), strides, device)
    tasks, records, shapes = _plan_shards(source, out, encoder, mirror=mirror)
    job = hashlib.sha256(repr((captions.task, sorted(shapes))).encode()).hexdigest()

    def encode_shards(tasks: list[ShardTask], encoder_args: tuple) -> None:
        for num_done in _encode_missing(tasks, encoder, encoder_args, workers, ray):
            if progress:
                progress(num_done, len(tasks))

    def lead(*, wait: bool = False) -> None:
        name, source_id = _source_of(source)
        with store_folder(out, LATENTS, source=name, source_id=source_id, force=force, wait=wait) as (
            _,
            stale,
        ):
            if wait and _is_finished(out, shapes):
                return
            _check_free_space(out, tasks, captions)
            write_text(out / "job.txt", job)
            with full_disk_named(out, keep_name=True):
                _write_autoencoder(out, encoder)
                captions.write(out, batch_size or 32)
            encode_shards(tasks, (str(out / "autoencoder"), batch_size, str(device)))
            finish_store(
                out, records, shapes, stale=stale, dtype="float16", source=name, source_id=source_id, fps=source.info["fps"], size=source.info["size"],
                factor=encoder.factor, channels=encoder.channels, texts=captions.shape, strides=sorted(set(strides)),
                autoencoder=encoder.digest, text_encoder=captions.encoder_digest,
            )  # fmt: skip

    try:
        lead()
    except FolderInUse:
        if not _is_same_job(out, job):
            raise
        # Another process leads the same task. In another order, two seldom encode the same shard.
        encode_shards(random.sample(tasks, len(tasks)), (str(autoencoder), batch_size, str(device)))
        lead(wait=True)
    return LatentStore(out)


def _source_of(source: Store) -> tuple[str | None, str | None]:
    """Return what the stores of pixels were made of, as `store_folder` takes it."""
    infos = [read_info(folder) for folder in source.folders]
    names, ids = ([info[key] for info in infos if info.get(key)] for key in ("source", "source_id"))
    if len(ids) < len(infos):  # some are of an earlier version
        return None, None
    if len(infos) == 1:
        return names[0], ids[0]
    return ", ".join(names), hashlib.sha256("".join(ids).encode()).hexdigest()[:16]


def _is_same_job(out: Path, job: str) -> bool:
    """Return whether the process that writes into a folder has this task. It says so soon after it began."""
    for _ in range(50):
        if (out / "job.txt").exists() and (out / "job.txt").read_text(encoding="utf-8") == job:
            return True
        time.sleep(0.1)
    return False


def _is_finished(out: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    return (out / "store.json").exists() and Store(out).shapes == shapes


def _check_free_space(out: Path, tasks: list[ShardTask], captions: Captions) -> None:
    """Raise ValueError if the disk cannot hold what is missing."""
    needed = sum(2 * math.prod(task.shape) for task in tasks if not task.is_done)
    needed += 0 if captions.are_written(out) else captions.num_bytes
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"{out}: needs {needed / 2**20:.0f} MiB, but the disk has {free / 2**20:.0f} MiB left"
        )


def _write_autoencoder(out: Path, encoder: Encoder) -> None:
    """Copy the autoencoder, unless the store in `out` has it already."""
    store = out / "store.json"
    try:
        is_there = read_json(store)["autoencoder"] == encoder.digest
    except (OSError, ValueError, KeyError, TypeError):
        is_there = False
    if not is_there:
        store.unlink(missing_ok=True)  # the latents in it are of another autoencoder
        encoder.vae.save_pretrained(out / "autoencoder")


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
            height, width = (side // encoder.factor for side in source.shapes[shard][1:3])
            starts = [0, *np.cumsum([num for _, num in pieces]).tolist()]
            shapes[name] = (starts[-1], 2, encoder.channels, height, width)
            path = out / "shards" / f"{name}.npy"
            tasks.append(ShardTask(source.paths[shard].absolute(), pieces, mirrored, path, shapes[name]))
            records += [
                replace(clip, shard=name, start=start) for clip, start in zip(clips, starts[:-1], strict=True)
            ]
    return tasks, records, shapes


def _encode_missing(
    tasks: list[ShardTask],
    encoder: Encoder,
    encoder_args: tuple,
    workers: int | None,
    ray: str | None,
) -> Iterator[int]:
    """Encode the shards that are absent or incomplete, and yield the number of complete shards after each.

    Args:
        tasks: all shards.
        encoder: encodes in this process.
        encoder_args: arguments of `Encoder` in other processes.
        workers: number of processes; None: see `encode`.
        ray: address of a Ray cluster, or None.
    """
    missing = [task for task in tasks if not task.is_done]
    num_done = len(tasks) - len(missing)
    if workers is None:
        workers = _num_worthwhile_workers(missing, encoder)
    results: Iterator[Exception | None]
    if ray:
        results = _encode_on_ray(missing, encoder_args, workers, ray)
    elif workers > 1 and len(missing) > 1:
        results = _encode_in_pool(missing, encoder_args, workers)
    else:
        results = _encode_here(missing, encoder)
    errors: list[Exception] = []
    for error in results:
        if error is None:
            num_done += 1
            yield num_done
        else:
            errors.append(error)
    if errors:
        raise RuntimeError(
            f"{len(errors)} of {len(tasks)} shards could not be encoded; the others are done, and the same command encodes "
            f"the rest. The first error: {errors[0]}"
        )


def _num_worthwhile_workers(tasks: list[ShardTask], encoder: Encoder) -> int:
    """Return the number of processes so that each has more work than its start takes."""
    if len(tasks) <= 1:
        return 1
    on_gpu = encoder.vae.device.type == "cuda"
    available = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    num_frames = sum(task.shape[0] for task in tasks)
    seconds = num_frames * encoder.seconds_per_frame(tasks[0].shard)
    return max(1, min(available, len(tasks), int(seconds / WORKER_START_SECONDS)))


def _encode_here(tasks: list[ShardTask], encoder: Encoder) -> Iterator[Exception | None]:
    """Encode shards; yield None for each, or the reason why that is impossible."""
    with single_thread():
        for task in tasks:
            try:
                encoder(task)
            except ValueError as error:
                yield error
            else:
                yield None


def _encode_in_pool(tasks: list[ShardTask], encoder_args: tuple, workers: int) -> Iterator[Exception | None]:
    """As `_encode_here`, in several processes. A shard at which a process died is tried once more."""
    num_started = multiprocessing.get_context("spawn").Value("i", 0)
    with Workers(
        _encode_in_worker,
        min(workers, len(tasks)),
        initializer=start_worker,
        initargs=(__name__, "_start_worker", num_started, *encoder_args),
    ) as pool:
        for is_last in (False, True):
            shards = {pool.submit(task): task for task in tasks}
            tasks = []
            for future in as_completed(shards):
                try:
                    future.result()
                except WorkerDied as error:
                    if is_last:
                        yield RuntimeError(f"{shards[future].shard}: {error}")
                    else:
                        tasks.append(shards[future])
                except ValueError as error:
                    yield error
                else:
                    yield None


def _encode_on_ray(
    tasks: list[ShardTask], encoder_args: tuple, workers: int, address: str
) -> Iterator[Exception | None]:
    """As `_encode_here`, with Ray Data, which repeats a task elsewhere if its machine dies."""
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
        for row in results.iter_rows():
            yield ValueError(row["error"]) if row["error"] else None
    finally:
        ray.shutdown()


class _RayEncoder:
    def __init__(self, tasks: list[ShardTask], encoder_args: tuple):
        torch.set_num_threads(1)
        self.tasks = tasks
        self.encoder = Encoder(*encoder_args)

    def __call__(self, row: dict) -> dict:
        """Encode the shard of a row, and add the reason why that is impossible, or ""."""
        try:
            self.encoder(self.tasks[row["id"]])
        except ValueError as error:
            return {**row, "error": str(error)}
        return {**row, "error": ""}


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
