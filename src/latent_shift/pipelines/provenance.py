"""Where a file comes from: the metadata of results."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import latent_shift
from latent_shift.files import sha256
from latent_shift.pipelines import catalog


def hash_inputs(model: str, files: Iterable[Path | None] = ()) -> dict[str, str]:
    """Return the SHA-256 of the weights of a model's U-Net and of other inputs, by their names. Of a Hub id nothing is
    known here."""
    weights = [Path(model)] if catalog.is_file(model) else []
    if not weights and not catalog.on_hub(model):
        weights = sorted((catalog.folder(model) / "unet").glob("*.safetensors"))
        weights += [student] if (student := catalog.student(model)) else []
    hashes = {path.name: sha256(path) for path in weights}
    return hashes | {str(path): sha256(path) for path in files if path is not None}


def describe(
    settings: Mapping[str, Any],
    *,
    model: str,
    hashes: Mapping[str, str],
    command: Sequence[str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the metadata of a result: the version, the command that makes it again, and its settings.

    They name no date and no machine, so the same command gives the same bytes.

    Args:
        settings: name to value.
        model: a name, folder, file or Hub id.
        hashes: of the inputs, as `hash_inputs` returns them.
        command: words of a command line, if there was one.
        versions: of the packages that generated it; None: PyTorch, diffusers and transformers.
    """
    if versions is None:
        import diffusers
        import torch

        versions = {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": version("transformers"),
        }
    values = {
        "latent_shift": latent_shift.__version__,
        **({} if command is None else {"command": shlex.join(command)}),
        "model": model,
        **settings,
        "sha256": dict(hashes),
        "versions": {"python": platform.python_version(), **versions},
    }
    return {name: _to_text(value) for name, value in values.items()}


def _to_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {entry}" for name, entry in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
