"""Write docs/settings.md from the recipe's classes in config.py: `python docs/settings.py` (a test fails if it is stale)."""

import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latent_shift.config import Config
from latent_shift.files import markdown_table

ROOT = Path(__file__).parent.parent
SETTINGS_INTRO = """# Settings

A recipe is a TOML file with these tables. Any setting can also be given on the command line as `table.key=value`; `data=` and `model=` are
short for `data.path` and `model.init`. `latent-shift train RECIPE --dry-run` prints every value a run would use. An unknown key, a wrong type,
or settings that contradict each other or have no effect are errors before any data is read.

This page is written by `python docs/settings.py` from `latent_shift/config.py`.
"""


def values_of(annotation: Any) -> str:
    """Return the values that a type allows, as text: the choices of a Literal, else its name."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(values_of(argument) for argument in arguments if argument is not type(None))
    if origin is typing.Annotated:
        return values_of(arguments[0])
    if origin is list:
        return f"list of {values_of(arguments[0])}"
    return {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}[annotation]


def bounds_of(field: FieldInfo) -> str:
    """Return the numeric bounds of a field, as text."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        (signs[name], getattr(item, name)) for item in field.metadata for name in signs if hasattr(item, name)
    ]
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds)


def default_of(field: FieldInfo) -> str:
    value = field.default
    if value is None:
        return "unset"
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{json.dumps(value)}`"


def sections_of(config: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the tables of a recipe, by name."""
    sections = {}
    for name, field in config.model_fields.items():
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                sections[name] = kind
    return sections


def settings_page() -> str:
    sections = sections_of(Config)
    top = {name: field for name, field in Config.model_fields.items() if name not in sections}
    text = [SETTINGS_INTRO, _settings_table(top)]
    for name, section in sections.items():
        documented = section.__doc__ and not section.__doc__.startswith("!!!")
        text.append(f"## `[{name}]`\n" + (f"\n{section.__doc__}\n" if documented else ""))
        required = f"required in `[{name}]`" if Config.model_fields[name].default is None else "required"
        text.append(_settings_table(section.model_fields, required))
    return "\n".join(text)


def _settings_table(fields: dict[str, FieldInfo], required: str = "required") -> str:
    """Return the table of a section; `required` is the default of a field that has none."""
    rows = []
    for name, field in fields.items():
        values = "; ".join(filter(None, (values_of(field.annotation), bounds_of(field))))
        default = required if field.is_required() else default_of(field)
        rows.append([f"`{name}`", default, values, (field.description or "").replace("|", "\\|")])
    return markdown_table(["setting", "default", "values", "meaning"], rows) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(settings_page(), encoding="utf-8")
