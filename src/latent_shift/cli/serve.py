"""`latent-shift serve`."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

LogLevel = Literal["warning", "info", "debug"]


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="a name, folder or file, or ID=MODEL; may be repeated, the first is the default; default: emoji",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; any but this machine's own needs --token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LATENT_SHIFT_TOKEN",
            help="clients must send it as Authorization: Bearer TOKEN; at least 8 characters",
        ),
    ] = None,
    data: Annotated[Path, typer.Option(file_okay=False, help="folder of jobs and results")] = Path(
        "latent-shift-data"
    ),
    workers: Annotated[int, typer.Option(min=1, max=256, help="processes, each with its own models")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="address of a Ray cluster whose machines run the workers, or `local`")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each worker; default: all cores, shared equally")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    engine: Annotated[
        str,
        typer.Option(help="what computes: torch, or with folders of `latent-shift export` onnx or openvino"),
    ] = "torch",
    open: Annotated[bool, typer.Option("--open/--no-open", help="open the page in the browser")] = True,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="a further name of this server in the Host header, such as that of a proxy; may be repeated"
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            help="a site whose pages may use the server, such as https://example.com; may be repeated"
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="address of a proxy whose X-Forwarded-For names the client; may be repeated"),
    ] = None,
    web: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="folder of `latent-shift export --web`: a page that runs the model in the browser, linked from the page",
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="queued jobs at most")] = 1000,
    max_rate: Annotated[
        float, typer.Option(min=1, help="new videos and images a minute of one client")
    ] = 240,
    max_gib: Annotated[
        float, typer.Option(min=0.01, help="disk space of results; beyond it the oldest are deleted")
    ] = 10,
    keep_days: Annotated[
        float | None, typer.Option(min=0.001, help="days that results are kept; default: no limit")
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(help="what is written to standard error: also each job, also each request")
    ] = "info",
) -> None:
    """Serve a web page and an HTTP API for generating clips."""
    try:
        from latent_shift.serve import server
        from latent_shift.serve.service import Limits, Settings
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in (
            "fastapi",
            "starlette",
            "uvicorn",
            "prometheus_client",
        ):
            raise
        raise RuntimeError("serve needs the extra: pip install 'latent-shift-video[serve]'") from error

    models = server.name_models(model or ["emoji"])
    server.check_engine(engine, models, device)
    if ray is None:
        server.check_device(device)
    settings = Settings(
        Limits(requests_per_minute=max_rate),
        token=token,
        hosts=server.check_access(host, token, allow_host or []),
        origins=server.check_origins(origin or []),
        web=server.check_web(web),
    )

    _start_log(log_level)

    def make_workers() -> list[server.Worker]:
        if ray is None:
            return server.local_workers(workers, models, device, threads, engine)
        from latent_shift.serve.ray_workers import connect

        return connect(ray, workers, models, device, threads, engine)

    server.serve(
        models, folder=data, host=host, port=port, settings=settings, make_workers=make_workers, announce=partial(print, flush=True), open_browser=open,
        store_options={
            "max_queued": max_queue, "max_bytes": int(max_gib * 2**30), "keep_seconds": None if keep_days is None else keep_days * 86400,
        },
        trusted_proxies=trusted_proxy or (),
    )  # fmt: skip


def _start_log(level: str) -> None:
    """Write the server's log to standard error."""
    logging.raiseExceptions = False  # a full disk under the log ends no request
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("latent_shift").setLevel(level.upper())
