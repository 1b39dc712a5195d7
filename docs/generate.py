"""Write the generated parts of the documentation: `python docs/generate.py` (a test fails if one is stale).

docs/settings.md comes from the recipe's classes in config.py, README's table of results from docs/results.
"""

import json
import re
import types
import typing
from pathlib import Path
from statistics import fmean
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

This page is written by `python docs/generate.py` from `latent_shift/config.py`.
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


def results_table() -> str:
    """Return README's table: the shift, attention and no shift, each number from a JSON in docs/results."""
    systems = {
        result["system"]["system"]: {record["measure"]: record["value"] for record in result["records"]}
        for result in _result("compare")
    }
    seeds = {"shift": ("shift", "seed-1"), "attention": ("attention",), "none": ("none",)}
    sizes = {result["system"]["system"]: result["system"]["parameters"] for result in _result("compare")}
    points = [
        point
        for point in _result("sweep-h200")["points"]
        if (point["frames"], point["side"], point["clips"]) == (16, 64, 1)
    ]
    times = {
        point["name"]: point["seconds"] * 1e3 for point in reversed(points)
    }  # of two measurements the first
    names = {"shift": "Latent-Shift", "attention": "Latent-VDM", "none": "frame by frame"}
    rows = [
        ["parameters added, 6 M network", *(f"{sizes[name] / sizes['none'] - 1:.0%}" for name in names), ""],
        [
            "sampling step of 16 frames at SD 1.5's size, ms",
            *(f"{times[title]:.0f}" for title in names.values()),
            "",
        ],
    ]
    for measure, label, places in (
        ("denoising_error", "denoising error", 3),
        ("motion_seen_at_375", "motion R² at t = 375", 2),
        ("flicker", "flicker, grey levels", 1),
    ):
        real = systems["shift"].get(f"{measure}_real")
        means = (fmean(systems[seed][measure] for seed in seeds[name]) for name in names)
        rows.append([label, *(f"{mean:.{places}f}" for mean in means), f"{real:.{places}f}" if real else ""])
    return markdown_table(["", "shift", "attention (Latent-VDM)", "no shift", "real clips"], rows)


def _result(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def with_results_table(readme: str) -> str:
    table = results_table()
    head = table.split("\n", 1)[0]
    text, count = re.subn(
        rf"^{re.escape(head)}\n(?:\|.*\|$\n?)+", lambda _: f"{table}\n", readme, flags=re.MULTILINE
    )
    if count != 1:
        raise ValueError(f"README.md has {count} tables that begin with {head}")
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(settings_page(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_results_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
