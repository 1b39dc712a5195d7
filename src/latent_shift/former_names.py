"""Modules under the names that they had before the packages `data`, `models`, `pipelines`, ...: imports of them still
work, with a warning, until the next release.

`import latent_shift` imports this file, so it imports nothing itself before a former name is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_PLACES = {
    "pipeline": ("pipelines.stable_diffusion",),
    "zoo": (
        "pipelines.loading", "pipelines.catalog", "pipelines.lora", "pipelines.schedulers", "runtime", "video",
    ),
    "sampling": ("pipelines.denoise",),
    "families": ("pipelines.single_file", "pipelines.catalog"),
    "store": ("data.store",),
    "text": ("models.text", "models.prompt_syntax"),
    "vdm": ("models.baselines",),
    "extractors": ("evaluation.features",),
}  # fmt: skip
"""Former module to the modules that hold its names now."""
_NAMES = {"add_lora": "load_lora", "scheduler": "make_scheduler", "without_weights": "plain_prompt"}
"""Former name of a function to its name."""


class FormerNames:
    """Find a former module: one that looks its names up in the modules of today (an entry of `sys.meta_path`)."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != "latent_shift" or name not in _PLACES:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.rpartition(".")[2]
        module.__dict__["__getattr__"] = lambda attribute: _find(name, attribute)


def _find(module: str, name: str) -> Any:
    import warnings
    from importlib import import_module

    new = _NAMES.get(name, name)
    for place in _PLACES[module] if not name.startswith("__") else ():
        result = getattr(import_module(f"latent_shift.{place}"), new, None)
        if result is not None:
            message = f"latent_shift.{module}.{name} is now latent_shift.{place}.{new}; the old name will go in the next release"
            warnings.warn(message, FutureWarning, stacklevel=3)
            return result
    raise AttributeError(f"module 'latent_shift.{module}' has no attribute {name!r}")
