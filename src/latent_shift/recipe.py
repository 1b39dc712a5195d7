"""Recipes: the settings of a run as a TOML file, with `key=value` overrides."""

from __future__ import annotations

import difflib
import logging
import typing
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError

from latent_shift.config import SHIFT, Config
from latent_shift.files import read_bytes

log = logging.getLogger("latent_shift")

RENAMED_KEYS = {"diffusion.independent_share": "diffusion.independent_noise_prob"}
"""Old keys that recipes, overrides and run folders may still use, and their present names."""


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe.

    Args:
        path: a TOML file.
        overrides: `table.key=value`, the value in TOML (a bare word is a string); `data=` and `model=` set
            `data.path` and `model.init`. A baseline in `model.temporal` also drops the recipe's settings of the
            shift.

    Raises:
        ValueError: the file cannot be read, a key is unknown (the message names the nearest one), a value has
            the wrong type, or settings contradict each other.
    """
    path = Path(path)
    try:
        settings = tomlkit.parse(read_bytes(path, max_bytes=2**24).decode()).unwrap()
    except (OSError, UnicodeDecodeError, RecursionError, tomlkit.exceptions.TOMLKitError) as error:
        raise ValueError(f"{path}: {error}") from error
    _rename_keys(settings, path)
    changed = {_apply_override(settings, override) for override in overrides or []}
    _drop_shift(settings, changed)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_explain(problem)}" for problem in error.errors())) from None


def _rename_keys(settings: dict[str, Any], path: Path) -> None:
    """Move the values of renamed keys to their present names, in place."""
    for old, new in RENAMED_KEYS.items():
        (old_table, old_key), (new_table, new_key) = old.split("."), new.split(".")
        if not isinstance(settings.get(old_table), dict) or old_key not in settings[old_table]:
            continue
        if new_key in settings.get(new_table, {}):
            raise ValueError(f"{path}: {old} is the old name of {new}: leave it out")
        log.warning(_RENAMED, f"{path}: {old}", new)
        settings.setdefault(new_table, {})[new_key] = settings[old_table].pop(old_key)


_RENAMED = "%s is now called %s; the old name works in this release only"


def _drop_shift(settings: dict[str, Any], changed: set[str]) -> None:
    """Drop a recipe's settings of the shift, in place, where an override chooses a baseline: it then needs no
    other override."""
    model = settings.get("model")
    if "model.temporal" not in changed or not isinstance(model, dict) or model["temporal"] == "shift":
        return
    for name in SHIFT:
        if f"model.{name}" not in changed:
            model.pop(name, None)


def _apply_override(settings: dict[str, Any], override: str) -> str:
    """Set the key of a `table.key=value`, in place; return the key."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"expected table.key=value, got {override!r}")
    try:
        value = tomlkit.value(text).unwrap()
    except tomlkit.exceptions.ParseError:
        value = text
    if key in RENAMED_KEYS:
        log.warning(_RENAMED, key, RENAMED_KEYS[key])
    key = {"data": "data.path", "model": "model.init", **RENAMED_KEYS}.get(key, key)
    *tables, name = key.split(".")
    target = settings
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise ValueError(f"{key}: {table} is a value, not a table")
    target[name] = value
    return key


def dump(config: Config) -> str:
    """Return the settings as TOML with all defaults; `load` reads it back to an equal Config."""
    return tomlkit.dumps(config.model_dump(exclude_none=True))


def _explain(problem) -> str:
    """Return a pydantic error as one line, with the nearest valid key for an unknown one."""
    *tables, name = [str(part) for part in problem["loc"]] or [""]
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for table in tables:
            kinds = typing.get_args(section.model_fields[table].annotation) or (
                section.model_fields[table].annotation,
            )
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
        nearest = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
        hint = (
            f"did you mean {'.'.join([*tables, *nearest])}?"
            if nearest
            else f"expected one of {', '.join(section.model_fields)}"
        )
        return f"unknown key {'.'.join([*tables, name])}; {hint}"
    where = ".".join([*tables, name])
    return (
        f"{where}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"
        if where
        else problem["msg"].removeprefix("Value error, ")
    )
