"""Run the server: its models, its data folder, its workers, its port and its end."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote, urlsplit

import uvicorn
from filelock import FileLock, Timeout

from latent_shift.engines.exported import is_exported, read_settings
from latent_shift.engines.runtimes import ENGINES, PACKAGES
from latent_shift.models.names import Names, read_names
from latent_shift.pipelines import catalog, descriptions
from latent_shift.serve import security
from latent_shift.serve.app import create_app
from latent_shift.serve.jobs import JobStore
from latent_shift.serve.schema import ModelInfo
from latent_shift.serve.service import Service, Settings
from latent_shift.serve.workers import ProcessWorker, Worker

log = logging.getLogger("latent_shift")

LOCK = "lock"
MAX_CONNECTIONS = 1000


def serve(
    models: Mapping[str, str],
    *,
    folder: Path,
    host: str,
    port: int,
    settings: Settings,
    make_workers: Callable[[], Sequence[Worker]],
    announce: Callable[[str], None],
    open_browser: bool,
    store_options: dict[str, float | None] | None = None,
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve until a signal ends it.

    Args:
        models: id -> name, folder or file; the first is the default.
        folder: data folder of jobs and results, made if missing. One server may use it at a time.
        host, port: to listen at; port 0 takes a free one.
        settings: of the application.
        make_workers: called once the port is open.
        announce: called with the address of the page once the server answers.
        open_browser: whether to open the page.
        store_options: arguments of `JobStore`.
        trusted_proxies: addresses whose X-Forwarded-For and X-Forwarded-Proto are believed.

    Raises:
        ValueError: a model that cannot be loaded, a folder in use, a port in use.
        RuntimeError: no worker could load its models.
    """
    infos = {name: replace(model_info(model), id=name) for name, model in models.items()}
    names = {name: model_names(model) for name, model in models.items()}
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another server uses it; expected another --data folder") from None
    with lock:
        listener = _listen(host, port)
        store = JobStore(folder, **(store_options or {}))  # type: ignore[arg-type]
        app = create_app(store, make_workers(), infos, names=names, settings=settings)
        is_debug = log.isEnabledFor(logging.DEBUG)
        config = uvicorn.Config(
            app, log_config=None, log_level="info" if is_debug else "warning", access_log=is_debug, timeout_graceful_shutdown=2, timeout_keep_alive=30, server_header=False,
            lifespan="on", loop="asyncio", http="h11", ws="none", proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=list(trusted_proxies), limit_concurrency=MAX_CONNECTIONS,
        )  # fmt: skip
        address = _address(host, listener.getsockname()[1])
        page = address if settings.token is None else f"{address}?token={quote(settings.token, safe='')}"

        def on_start() -> None:
            announce(address)
            if open_browser and _has_browser():
                threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()

        service: Service = app.state.service
        try:
            _Server(config, service, on_start).run(sockets=[listener])
        finally:  # a second Ctrl-C skips the end of the application
            service.stop()
    if service.queue.failure is not None:
        raise RuntimeError(f"no worker could load its models: {service.queue.failure}")


class _Server(uvicorn.Server):
    """uvicorn's server, which ends event streams at a signal: it would wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[], None]):
        super().__init__(config)
        self._service, self._on_start = service, on_start
        service.on_failure = self._end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_start()

    def _end(self) -> None:
        self._service.begin_stop()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.begin_stop()
        super().handle_exit(sig, frame)


def model_info(model: str) -> ModelInfo:
    """Return what the server knows of a model; raise ValueError for one that cannot be loaded."""
    if is_exported(model):
        return _exported_info(model)
    catalog.check_model(model)
    defaults = descriptions.sampling_defaults(model)
    about = {"description": catalog.MODELS.get(model, ""), "examples": catalog.examples(model)}
    return ModelInfo(id=model, **about, **defaults)  # type: ignore[arg-type]


def _exported_info(folder: str) -> ModelInfo:
    settings = read_settings(folder)
    known: dict[str, Any] = {
        "id": folder, "multiple": settings.factor * settings.multiple, "description": catalog.MODELS.get(settings.model, ""),
        "examples": catalog.examples(settings.model),
        **{name: getattr(settings, name) * settings.factor for name in ("width", "height")},
    }  # fmt: skip
    others = {
        field.name: getattr(settings, field.name) for field in fields(ModelInfo) if field.name not in known
    }
    return ModelInfo(**known, **others)


def check_engine(engine: str, models: Mapping[str, str], device: str | None) -> None:
    """Raise ValueError for an engine that does not fit the models or the device, RuntimeError if it is not installed."""
    names = ("torch", *ENGINES)
    if engine not in names:
        raise ValueError(f"--engine {engine}: expected one of {', '.join(names)}")
    for model in models.values():
        if engine == "torch" and is_exported(model):
            raise ValueError(f"--model {model}: is exported; expected --engine onnx or --engine openvino")
        if engine != "torch":
            read_settings(model)
    if engine != "torch" and device is not None:
        raise ValueError("--device needs --engine torch")
    if engine != "torch" and find_spec(PACKAGES[engine]) is None:
        raise RuntimeError(f"engine {engine} needs the extra: pip install 'latent-shift-video[{engine}]'")


def model_names(model: str) -> Names | None:
    """Return the names of what a model was trained on; None for a model without."""
    is_folder = not catalog.is_file(model) and not catalog.on_hub(model)
    return read_names(catalog.folder(model)) if is_folder else None


def local_workers(
    num: int, models: Mapping[str, str], device: str | None = None, threads: int | None = None, engine: str = "torch"
) -> list[Worker]:  # fmt: skip
    """Return workers of this machine: on GPUs in turn where there are any.

    Args:
        num: workers.
        models, device, engine: see `Generator`.
        threads: of each worker on the CPU; None is an equal share of the cores.
    """
    num_gpus = 0
    if device in (None, "cuda") and engine == "torch":
        num_gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if num_gpus and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        num_gpus = len([name for name in visible.split(",") if name.strip()])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or max(1, cores // num)
    return [
        ProcessWorker(
            index + 1,
            models,
            device=f"cuda:{index % num_gpus}" if num_gpus > 1 else device,
            threads=threads,
            engine=engine,
        )
        for index in range(num)
    ]


def name_models(models: Sequence[str]) -> dict[str, str]:
    """Return id -> name, folder or file of models that are given as such or as ID=MODEL; raise ValueError for an id given twice.

    The id of a folder or file is its name, or its parent's where that is "model", as in a run folder.
    """
    named: dict[str, str] = {}
    for text in dict.fromkeys(models):
        name, separator, model = text.partition("=")
        path = Path(text)
        if path.exists() and text not in catalog.MODELS:
            path, model = path.resolve(), text
            name = path.parent.name if path.name == "model" else path.stem if path.is_file() else path.name
        elif not separator:
            name, model = text, text
        if not name or not model:
            raise ValueError(f"--model {text}: expected a model, or NAME=MODEL")
        if name in named:
            raise ValueError(
                f"--model {text}: {name!r} is {named[name]} already; name it: --model NAME={model}"
            )
        named[name] = model
    return named


def check_access(host: str, token: str | None, names: Sequence[str]) -> frozenset[str] | None:
    """Return the names in the Host header that are answered, None for all; raise ValueError for an open server without a token.

    Args:
        host: to listen at.
        token: of the server.
        names: further names, such as that of a proxy in front.
    """
    if token is not None and not (
        len(token) >= 8 and token.isascii() and token.isprintable() and " " not in token
    ):
        raise ValueError("--token: expected 8 ASCII characters or more, without spaces")
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", name):
            raise ValueError(
                f"--allow-host {name}: expected a name without scheme and port, such as clips.example.com"
            )
    if host in security.LOOPBACK:
        return frozenset((*security.LOOPBACK, *(name.lower() for name in names)))
    if token is None:
        raise ValueError(
            f"--host {host}: others could use this machine; expected a --token, too, or --host 127.0.0.1"
        )
    return frozenset(name.lower() for name in names) or None


def check_device(device: str | None) -> None:
    """Raise ValueError for a device that is none, or a GPU of NVIDIA's on a machine without its driver."""
    if device is not None and not re.fullmatch(r"cpu|mps|(cuda|xpu)(:[0-9]+)?", device):
        raise ValueError(f"--device {device}: expected cpu, cuda, cuda:1 or mps")
    if device is not None and device.startswith("cuda") and sys.platform == "linux" and not _has_driver():
        raise ValueError(f"--device {device}: this machine has no driver for NVIDIA GPUs; expected cpu")


def _has_driver() -> bool:
    return any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"))


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Return origins of other sites; raise ValueError for what is none."""
    for origin in origins:
        parts = urlsplit(origin)
        if (
            parts.scheme not in ("http", "https")
            or not parts.netloc
            or origin != f"{parts.scheme}://{parts.netloc}".lower()
        ):
            raise ValueError(
                f"--origin {origin}: expected a scheme and a name in lower case, such as https://example.com"
            )
    return tuple(origins)


def check_web(folder: Path | None) -> Path | None:
    """Return the folder of a page for browsers; raise ValueError for another folder."""
    if folder is not None and not (folder / "web.json").is_file():
        raise ValueError(f"--web {folder}: has no web.json; expected a folder of `latent-shift export --web`")
    return folder


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    return listener


def _address(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return f"http://{shown}:{port}/"


def _has_browser() -> bool:
    """Return whether there is a browser on a display; a text browser would take the terminal."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return False
    with suppress(webbrowser.Error):
        return webbrowser.get() is not None
    return False
