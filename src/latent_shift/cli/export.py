"""`latent-shift export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_shift.cli import outputs
from latent_shift.runtime import quiet_libraries


def export(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="folder of the exported model")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="a name, a diffusers folder or a .safetensors file; with --web also an exported model",
        ),
    ] = "emoji",
    web: Annotated[
        bool,
        typer.Option("--web", help="a page that runs the model in the browser; needs npm, or --packages"),
    ] = False,
    packages: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="folder with the archives of the npm packages of --web, where there is no npm",
        ),
    ] = None,
    large_decoder: Annotated[
        bool, typer.Option("--large-decoder", help="the model's own decoder, not its tiny one")
    ] = False,
    force: outputs.Force = False,
) -> None:
    """Export a model to ONNX: for `generate --engine onnx` or `openvino`, or as a page for browsers."""
    from latent_shift.engines.exported import is_exported
    from latent_shift.folders import output_folder
    from latent_shift.pipelines import catalog

    if is_exported(model):
        if not web:
            raise ValueError(f"{model} is exported already; expected the model that it was exported from")
    else:
        catalog.check_model(model)
    if packages is not None and not web:
        raise ValueError("--packages has no effect without --web")
    kind = "a page with a model" if web else "an exported model"
    with output_folder(folder, kind=kind, force=force):
        quiet_libraries()
        if web:
            from latent_shift.engines.web import export_web

            export_web(model, folder, packages, large_decoder=large_decoder)
        else:
            from latent_shift.engines.export import export as export_model

            export_model(model, folder, large_decoder=large_decoder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.0f} MB")
