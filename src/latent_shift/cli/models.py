"""`latent-shift models`: models known by name, and what a model is. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List the models known by name, or describe one."""
    if context.invoked_subcommand is None:
        from latent_shift.pipelines import catalog

        for name, description in catalog.MODELS.items():
            print(f"{name}: {description}")


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="a name, a diffusers folder or a .safetensors file")],
) -> None:
    """Describe a model without loading its weights: family, parts, parameters, sizes, shift."""
    from latent_shift.pipelines import catalog

    for name, value in catalog.describe(model).items():
        print(f"{name:24} {value}")
