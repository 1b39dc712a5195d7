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
    word: Annotated[str | None, typer.Argument(help="with --names: only names that contain it")] = None,
    names: Annotated[bool, typer.Option("--names", help="list the names of what it was trained on")] = False,
) -> None:
    """Describe a model without loading its weights: family, parts, parameters, sizes, shift. Or list what it knows."""
    from latent_shift.pipelines import catalog, descriptions

    if not names:
        if word is not None:
            raise ValueError(f"{word}: one model at a time; a word is searched for with --names")
        for name, value in descriptions.describe(model).items():
            print(f"{name:24} {value}")
        return
    from latent_shift.models.names import FILE, read_names

    known = read_names(catalog.folder(model))
    if known is None:
        raise ValueError(f"{model}: has no list of names ({FILE})")
    found = known.search(word or "")
    if not found:
        raise ValueError(f"{word}: in none of the {len(known.names)} names of {model}")
    print("\n".join(found))
