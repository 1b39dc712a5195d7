"""Modules under the names that they had before the packages `data`, `models`, `pipelines`, ...: imports of them still
work, with a warning, until the next release."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PLACES = {
    "pipeline": ("pipelines.stable_diffusion",),
    "zoo": (
        "pipelines.loading",
        "pipelines.catalog",
        "pipelines.lora",
        "pipelines.schedulers",
        "runtime",
        "video",
    ),
    "sampling": ("pipelines.denoise",),
    "families": ("pipelines.single_file", "pipelines.catalog"),
    "store": ("data.store",),
    "text": ("models.text", "models.prompt_syntax"),
    "vdm": ("models.baselines",),
    "extractors": ("evaluation.features",),
}
"""Former module to the modules that hold its names now."""
_NAMES = {"add_lora": "load_lora", "scheduler": "make_scheduler", "without_weights": "plain_prompt"}
"""Former name of a function to its name."""


class FormerNames(MetaPathFinder, Loader):
    """Find a former module: one that looks its names up in the modules of today."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "latent_shift" and name in _PLACES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = partial(_find, module.__name__.rpartition(".")[2])


def _find(module: str, name: str) -> Any:
    new = _NAMES.get(name, name)
    for place in _PLACES[module] if not name.startswith("__") else ():
        found = getattr(import_module(f"latent_shift.{place}"), new, None)
        if found is not None:
            message = f"latent_shift.{module}.{name} is now latent_shift.{place}.{new}; the old name will go in the next release"
            warnings.warn(message, FutureWarning, stacklevel=2)
            return found
    raise AttributeError(f"module 'latent_shift.{module}' has no attribute {name!r}")
