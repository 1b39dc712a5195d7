"""What runs in a worker, a process or a Ray actor: models, and one job at a time.

Nothing here imports torch before a `Generator` is made.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from latent_shift.pipelines.request import Clip, Request

PREVIEW_SECONDS = 0.2
"""Least time between two previews of a job."""


@dataclass(frozen=True)
class Task:
    """A job as a worker gets it.

    Attributes:
        id: of the job.
        model: id of one of the worker's models.
        request: arguments of `Request`, without files.
        inputs: contents of the files, by the name of the argument.
    """

    id: str
    model: str
    request: Mapping[str, Any]
    inputs: Mapping[str, bytes]


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps; `preview` is a PNG of the frames side by side, or None."""

    done: int
    total: int
    preview: bytes | None


@dataclass(frozen=True)
class Decoding:
    """All steps are done."""


@dataclass(frozen=True)
class Finished:
    """The clip: `(F, H, W, 3) uint8` frames, their rate, the settings they were made with, metadata of files."""

    frames: np.ndarray
    fps: float
    settings: dict[str, Any]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Failed:
    """`code` is cancelled, invalid_value (the request's fault) or generation_failed."""

    code: str
    message: str


Message = Step | Decoding | Finished | Failed


class _Cancelled(Exception):
    pass


class _Pipeline(Protocol):
    """What a generator needs of a pipeline: an `ExportedPipeline`, or one of PyTorch."""

    def generate(self, request: Request, *, on_step: Callable | None, on_latents: Callable | None) -> Clip:
        """Return the clip of a request, see `generate_clip`."""

    def describe(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Return the metadata of a clip with these settings."""


class _TorchPipeline:
    def __init__(self, model: str, device: str | None):
        from latent_shift.pipelines.loading import load
        from latent_shift.pipelines.provenance import hash_inputs

        self.pipe, self._model, self._hashes = load(model, device=device), model, hash_inputs(model)
        self.pipe.set_progress_bar_config(disable=True)

    def generate(self, request: Request, *, on_step: Callable | None, on_latents: Callable | None) -> Clip:
        from latent_shift.pipelines.request import generate_clip

        return generate_clip(request, self.pipe, on_step=on_step, on_latents=on_latents)

    def describe(self, settings: Mapping[str, Any]) -> dict[str, str]:
        from latent_shift.pipelines.provenance import describe

        dtype = str(self.pipe.dtype).removeprefix("torch.")
        return describe({**settings, "dtype": dtype}, model=self._model, hashes=self._hashes)


class Generator:
    """Loads models and generates clips, one at a time. `cancel` may be called by another thread.

    Args:
        models: id -> name, folder or file; of another engine than torch, folders of exported models.
        device: as in `latent_shift.load`, for torch.
        threads: of the CPU; None leaves it to the engine.
        engine: "torch", "onnx" or "openvino".
    """

    def __init__(
        self,
        models: Mapping[str, str],
        device: str | None = None,
        threads: int | None = None,
        engine: str = "torch",
    ):
        # One thread loads and generates: a new one for each job would start OpenMP's threads and its heap anew.
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._load, models, device, threads, engine).result()
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._current: str | None = None

    def _load(self, models: Mapping[str, str], device: str | None, threads: int | None, engine: str) -> None:
        from latent_shift.runtime import keep_freed_memory, quiet_libraries

        keep_freed_memory()
        self._pipes: dict[str, _Pipeline] = {}
        self._matrices: dict[str, np.ndarray | None] = {}
        from latent_shift.pipelines.preview import read_preview

        if engine != "torch":
            from latent_shift.engines.exported import ExportedPipeline

            for name, model in models.items():
                exported = ExportedPipeline(model, engine, threads)
                self._pipes[name] = exported
                self._matrices[name] = read_preview(model, exported.settings.channels)
            return
        quiet_libraries()
        import torch

        from latent_shift.pipelines import catalog

        if threads is not None:
            torch.set_num_threads(threads)
        for name, model in models.items():
            pipeline = _TorchPipeline(model, device)
            self._pipes[name] = pipeline
            is_folder = not catalog.on_hub(model) and not catalog.is_file(model)
            self._matrices[name] = (
                read_preview(catalog.folder(model), pipeline.pipe.unet.config.in_channels)
                if is_folder
                else None
            )

    def ready(self) -> None:
        """Return: the models are loaded."""

    def cancel(self, job_id: str) -> None:
        """End a job before its next step, if it is the current one."""
        with self._lock:
            if job_id == self._current:
                self._cancelled.add(job_id)

    def run(self, task: Task) -> Iterator[Message]:
        """Yield what happens to a job; the last message is `Finished` or `Failed`."""
        messages: SimpleQueue[Message] = SimpleQueue()
        with self._lock:
            self._current = task.id
        generating = self._thread.submit(self._generate, task, messages.put)
        try:
            while True:
                message = messages.get()
                yield message
                if isinstance(message, (Finished, Failed)):
                    return
        finally:
            generating.result()
            with self._lock:
                self._current = None
                self._cancelled.discard(task.id)

    def _generate(self, task: Task, put: Callable[[Message], None]) -> None:
        try:
            put(self._finish(task, put))
        except _Cancelled:
            put(Failed("cancelled", "cancelled by a client"))
        except (ValueError, TypeError) as error:
            put(Failed("invalid_value", _one_line(error)))
        except MemoryError:
            put(Failed("generation_failed", "out of memory: try fewer frames or a smaller size"))
        except Exception as error:  # of the libraries: the worker lives on
            logging.getLogger("latent_shift").exception("job %s", task.id)
            put(Failed("generation_failed", _one_line(error)))

    def _finish(self, task: Task, put: Callable[[Message], None]) -> Finished:
        from latent_shift.pipelines.request import Request

        if task.model not in self._pipes:  # of a job from before a restart with other models
            raise ValueError(f"model {task.model!r} is not served any more")
        pipeline, matrix = self._pipes[task.model], self._matrices[task.model]
        num_passes, done_passes = task.request.get("free_init", 1), 0
        png: bytes | None = None
        last_preview = 0.0

        def check() -> None:
            if task.id in self._cancelled:
                raise _Cancelled

        def on_latents(latents_CFhw: np.ndarray) -> None:
            nonlocal png, last_preview
            assert matrix is not None
            png = None
            if time.monotonic() - last_preview >= PREVIEW_SECONDS:
                png, last_preview = _preview(latents_CFhw, matrix), time.monotonic()

        def on_step(done: int, total: int) -> None:
            nonlocal done_passes
            check()
            put(Step(done_passes * total + done, num_passes * total, png))
            if done == total:
                done_passes += 1
                if done_passes == num_passes:
                    put(Decoding())

        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for name, content in task.inputs.items():
                files[name] = Path(folder) / name
                files[name].write_bytes(content)
            check()
            arguments: dict[str, Any] = dict(task.request)
            if "then" in arguments:  # keys of JSON are text
                arguments["then"] = {int(frame): text for frame, text in arguments["then"].items()}
            request = Request(**arguments | files)
            observe = None if matrix is None else on_latents
            clip = pipeline.generate(request, on_step=on_step, on_latents=observe)
        check()
        settings = {name: value for name, value in clip.settings.items() if name not in task.inputs}
        own = {name: value for name, value in settings.items() if name != "scheduler" or name in task.request}
        return Finished(clip.frames, clip.fps, own, pipeline.describe(settings))


def _preview(latents_CFhw: np.ndarray, matrix: np.ndarray) -> bytes:
    from latent_shift.pipelines.preview import draw_preview

    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(draw_preview(latents_CFhw, matrix)), axis=1)).save(file, "PNG")
    return file.getvalue()


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _one_line(error: Exception) -> str:
    """Return the message of an error without paths of this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(tempfile.gettempdir() + os.sep, "")[:500]
