"""`latent-shift train` and `latent-shift encode`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latent_shift.cli import outputs
from latent_shift.cli.terminal import Progress, TrainingProgress, duration
from latent_shift.runtime import keep_freed_memory, quiet_libraries

if TYPE_CHECKING:
    from latent_shift.config import Config
    from latent_shift.training.prepare import Prepared


def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe (.toml), or the folder of a run to continue")],
    run: Annotated[Path | None, typer.Option(help="run folder; default: runs/ and the recipe's name")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="settings, e.g. optim.lr=1e-4; data= and model= are short for data.path and model.init",
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(help="epsilon or v_prediction: what model.init predicts, if it does not say so"),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="variant of the weights of model.init, such as fp16")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved settings and stop")] = False,
    force: outputs.Force = False,
) -> None:
    """Train an autoencoder, an image model or a video model."""
    from latent_shift.recipe import dump, load

    settings = recipe / "config.toml" if recipe.is_dir() else recipe
    if not settings.exists():
        raise ValueError(f"{settings}: no such file; expected a recipe (.toml) or the folder of a run")
    run = run or (
        recipe if recipe.is_dir() else Path("runs") / f"{recipe.resolve().parent.name}-{recipe.stem}"
    )
    options = {"model.prediction": prediction, "model.variant": variant}
    extra = [f"{key}={value}" for key, value in options.items() if value is not None]
    resolved = load(settings, [*(overrides or []), *extra])
    if dry_run:
        print(dump(resolved), end="")
        return
    keep_freed_memory()
    quiet_libraries()
    from latent_shift.training import loop

    with TrainingProgress(resolved.stage, resolved.optim.steps) as report:
        print(
            loop.train(
                resolved,
                run,
                report=report,
                on_prepared=partial(_print_estimate, resolved),
                progress=Progress,
                force=force,
            )
        )


def _print_estimate(config: Config, prepared: Prepared) -> None:
    """Print the memory and the least time that a run needs."""
    if config.reads_pixels:
        return
    from latent_shift.benchmark.hardware import matrix_rate
    from latent_shift.runtime import dtype_of, resolve_device
    from latent_shift.training import memory

    device = resolve_device()
    needs = memory.estimate_run(config, prepared, device.type)
    seconds = needs.flops / matrix_rate(device, dtype_of(prepared.precision))
    total = duration(config.optim.steps * seconds)
    print(
        f"{needs}\ntime on {outputs.device_name(device)}: at least {seconds:.2g} s a step, {total} in all "
        f"({needs.flops / 1e12:.2g} TFLOP)"
    )


def encode(
    packed: Annotated[Path, typer.Argument(help="a packed data set")],
    out: Annotated[Path, typer.Argument(help="folder of the latents")],
    autoencoder: Annotated[
        str, typer.Option(help="a model's name, or the folder of an AutoencoderKL or a pipeline")
    ],
    texts: Annotated[str, typer.Option(help="a model's name, or a folder with tokenizer/ and text_encoder/")],
    stride: Annotated[
        list[int] | None,
        typer.Option(min=1, help="also captions for clips of every second frame (2), ...; may be repeated"),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="also mirror clips whose captions name no side")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="frames in a batch; default: by their size")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="processes; on a CPU with one thread each")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="address of a Ray cluster that shares the work: auto, local, host:port")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="write into a folder that holds something else; its other files are kept"
        ),
    ] = False,
) -> None:
    """Encode packed frames and captions once, for the image and video stages. An interrupted run
    continues."""
    from latent_shift.pipelines import catalog

    folders = {"autoencoder": catalog.folder(autoencoder), "texts": catalog.folder(texts)}
    keep_freed_memory()
    quiet_libraries()
    from latent_shift.data.encode import encode
    from latent_shift.runtime import resolve_device

    options = dict(
        mirror=mirror,
        strides=[1, *(stride or [])],
        batch_size=batch_size,
        workers=workers,
        ray=ray,
        force=force,
    )
    with Progress("encoding") as progress:
        store = encode(packed, out, **folders, device=resolve_device(device), progress=progress, **options)  # type: ignore[arg-type]
    print(f"{out}: {store.num_frames} frames, {store.num_captions} captions with the empty one")
