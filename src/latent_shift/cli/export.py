"""`latent-shift export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_shift.cli import outputs
from latent_shift.runtime import quiet_libraries


def export(
    model: Annotated[str, typer.Argument(help="a name, a diffusers folder or a .safetensors file")],
    folder: Annotated[Path, typer.Argument(file_okay=False, help="folder of the exported model")],
    force: outputs.Force = False,
) -> None:
    """Export a model to ONNX, for `generate --engine onnx` or `openvino`: no torch at sampling."""
    from latent_shift.folders import output_folder
    from latent_shift.pipelines import catalog

    catalog.check_model(model)
    with output_folder(folder, kind="an exported model", force=force):
        quiet_libraries()
        from latent_shift.engines.export import export as export_model

        export_model(model, folder)
    print(
        f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.0f} MB"
    )
