"""The HTML page of an evaluation: clips of all systems that play in step, tables and plots.

The page is a folder of files that refer to nothing outside of it, so it opens from a disk:

    page/
      index.html        text, tables, plots (SVG) and the script that plays the clips in step
      clips/*.mp4, .png clips, and the frame shown before each plays
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, model_validator

from latent_shift import video
from latent_shift.evaluation.evaluate import SavedClips, add_paired_differences
from latent_shift.evaluation.measures import HIGHER, LOWER, REAL, label_of
from latent_shift.evaluation.records import read_results
from latent_shift.evaluation.tables import Table, find_seeds, make_table, skipped_measures
from latent_shift.files import check_schema, read_json, write_text
from latent_shift.folders import output_folder
from latent_shift.report.plots import plots

KIND = "a report"
"""What the marker of a page's folder says."""
ARROWS = {HIGHER: "\u2191", LOWER: "\u2193", REAL: "=", "": ""}


@dataclass
class Column:
    """A system of an evaluation, or its real clips: its results file and the folder of its clips."""

    result: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return str(self.result["system"]["system"])


def read_evaluation(folder: Path) -> list[Column]:
    """Read the systems of an evaluation's folder, by name; raise ValueError where there is none."""
    columns = [Column(read_results(path), path.parent) for path in sorted(folder.glob("*/results.json"))]
    if not columns:
        raise ValueError(f"{folder}: no */results.json; expected the folder of `latent-shift eval --out`")
    return columns


def report(
    out: Path,
    evaluation: Path,
    *,
    show: Sequence[str] = (),
    ablations: Sequence[Path] = (),
    training: Path | None = None,
    classes: Path | None = None,
    sweeps: Sequence[Path] = (),
    seeds: Mapping[str, Sequence[str]] | None = None,
    rows: int = 8,
    title: str = "Latent-Shift beside others",
    note: str = "",
    force: bool = False,
) -> Path:
    """Write the page.

    Args:
        out: folder of the page.
        evaluation: folder of an evaluation, whose systems are the columns.
        show: names of the systems on the page, from left to right. (): all.
        ablations: folders of evaluations, each a table of all its systems; `evaluation` may be among them.
        training: file of `latent-shift bench runs -o`, a table of losses and costs.
        classes: folder of an evaluation with protocol classes; the clips of its first system are shown in
            rows of one prompt.
        sweeps: files that `latent-shift bench sweep -o` wrote, one a machine.
        seeds: system to others that differ from it in the training seed alone and share its column in
            tables. None: by `find_seeds`.
        rows: prompts shown.
        title, note: of the page, and a paragraph at its beginning.
        force: write into a folder that holds something else.

    Returns:
        The page's file.

    Raises:
        ValueError: a folder `out` that holds something else, an evaluation without results or with fewer clips
            than rows, an unknown system, or a clip of a system that is missing.
    """
    systems = _read_systems(evaluation, show)
    protocol, prompts = systems[0].result["protocol"], _read_prompts(evaluation, rows)
    template = _template()
    with output_folder(out, KIND, force=force, is_own=_is_page):
        (out / "clips").mkdir(parents=True, exist_ok=True)
        real = Column({"system": {"system": "real clips", "fps": protocol["fps"]}}, evaluation / "real")
        columns = [
            *systems,
            *([real] if any((real.folder / "clips" / f"{k:06}.png").exists() for k in range(rows)) else []),
        ]
        grid = _rows(
            prompts,
            columns,
            lambda column, k: _add_clip(column, k, protocol["num_frames"], out, "compared", prompts[k]),
        )
        stills = _rows(prompts, systems, lambda system, k: _add_still(system, k, out, prompts[k]))
        by_class = _class_rows(classes, out) if classes else None
        tables = _tables(systems, ablations, seeds)
        page = template.render(
            title=title,
            note=note,
            protocol=protocol,
            rates=sorted({system.result["system"]["fps"] for system in systems}),
            columns=[(system.name, _describe(system.result)) for system in systems],
            real=real in columns,
            grid=grid,
            stills=stills,
            results=tables[0],
            skipped=skipped_measures([system.result for system in systems]),
            ablations=list(
                zip(
                    (folder.name.replace("-", " ").capitalize() for folder in ablations),
                    tables[1:],
                    strict=True,
                )
            ),
            definitions=_definitions(tables),
            training=_read_training(training) if training else [],
            classes=by_class,
            sweeps=[_sweep(path, f"sweep{k}") for k, path in enumerate(sweeps)],
        )
        write_text(out / "index.html", page)
        _delete_others(out, [*grid, *stills, *(by_class["rows"] if by_class else [])])
    return out / "index.html"


def _is_page(folder: Path) -> bool:
    """Recognise a page from before folders were marked."""
    try:
        return '<button id="play">Play all clips</button>' in (folder / "index.html").read_text(
            encoding="utf-8"
        )
    except (OSError, UnicodeDecodeError):
        return False


def _read_systems(evaluation: Path, names: Sequence[str]) -> list[Column]:
    """Read the systems of an evaluation with these names, in this order; all of them for no names."""
    systems = {system.name: system for system in read_evaluation(evaluation)}
    if unknown := [name for name in names if name not in systems]:
        raise ValueError(f"{evaluation}: has no {', '.join(unknown)}; expected {', '.join(systems)}")
    return [systems[name] for name in names or systems]


def _read_prompts(folder: Path, num: int | None = None) -> list[str]:
    """Return the first `num` prompts of an evaluation; raise ValueError where it has fewer. None: all."""
    prompts = read_json(folder / "prompts.json")
    check_schema(prompts, list[str], folder / "prompts.json")
    if num is not None and num > len(prompts):
        raise ValueError(f"{folder} has {len(prompts)} clips a system, {num} rows asked for")
    return prompts[:num]


def _rows(
    prompts: Sequence[str], columns: Sequence[Column], add: Callable[[Column, int], Any]
) -> list[dict[str, Any]]:
    """Return a row for each prompt, with a cell for each column as `add` returns it; no rows where all cells
    are None."""
    rows = [
        {"prompt": prompt, "cells": [add(column, k) for column in columns]}
        for k, prompt in enumerate(prompts)
    ]
    return rows if any(cell for row in rows for cell in row["cells"]) else []


def _add_clip(
    column: Column, k: int, num_frames: int, out: Path, section: str, prompt: str
) -> dict[str, str] | None:
    """Write clip k of a column into the page's folder; None where there is no such real clip.

    Raises:
        ValueError: a system has no such clip.
    """
    path = column.folder / "clips" / f"{k:06}.png"
    if not path.exists():
        if column.folder.name == "real":
            return None
        raise ValueError(
            f"{path}: no such clip; expected all that {column.name} was measured on, evaluate it again"
        )
    clip = _enlarge(SavedClips(column.folder / "clips", num_frames)(k))
    name = f"clips/{section}-{column.folder.name}-{k:03}"
    video.write(clip, out / f"{name}.mp4", fps=column.result["system"]["fps"])
    video.write(clip[:1], out / f"{name}.png")
    return {"source": f"{name}.mp4", "poster": f"{name}.png", "label": f"{prompt}, {column.name}"}


def _add_still(system: Column, k: int, out: Path, prompt: str) -> dict[str, str] | None:
    """Write the still of prompt k into the page's folder, if the system has one."""
    path = system.folder / "stills" / f"{k:06}.png"
    if not path.exists():
        return None
    name = f"clips/stills-{system.folder.name}-{k:03}.png"
    video.write(_enlarge(video.load_video(path)), out / name)
    return {"source": name, "label": f"{prompt}, one frame by {system.name}"}


def _delete_others(out: Path, rows: list[dict[str, Any]]) -> None:
    """Delete the clips of an earlier page that this one does not show."""
    cells = [cell for row in rows for cell in row["cells"] if cell]
    shown = {Path(cell[key]).name for cell in cells for key in ("source", "poster") if key in cell}
    for path in (out / "clips").iterdir():
        if re.fullmatch(r"(compared|stills|classes)-.+-\d+\.(mp4|png)", path.name) and path.name not in shown:
            path.unlink()


def _enlarge(clip: np.ndarray, side: int = 128) -> np.ndarray:
    """Repeat the pixels of small clips, so that all systems have the same size on the page."""
    factor = max(1, side // clip.shape[1])
    return clip if factor == 1 else clip.repeat(factor, axis=1).repeat(factor, axis=2)


def _class_rows(folder: Path, out: Path) -> dict[str, Any]:
    """Return the clips of an evaluation's first system in rows of one prompt, and their description."""
    system, prompts = read_evaluation(folder)[0], _read_prompts(folder)
    num_frames = system.result["protocol"]["num_frames"]
    numbers: dict[str, list[int]] = {}
    for k, prompt in enumerate(prompts):
        numbers.setdefault(prompt, []).append(k)
    rows = []
    for prompt, seeds in numbers.items():
        cells = [_add_clip(system, k, num_frames, out, "classes", f"{prompt}, seed {k}") for k in seeds]
        rows.append({"prompt": prompt, "cells": cells})
    description = f"By {system.name} ({_describe(system.result)}), {num_frames} frames each, every clip with a seed of its own."
    return {"rows": rows, "description": description}


def _describe(result: dict[str, Any]) -> str:
    """Return the line below a system's name."""
    system = result["system"]
    height, width = result["made_at"]
    parts = [system["title"], f"{system['parameters'] / 1e6:.1f} M parameters", f"{width}x{height}"]
    parts += [f"{system['num_inference_steps']} steps", f"guidance {system['guidance_scale']:g}"]
    return ", ".join(parts)


def _tables(
    systems: list[Column], ablations: Sequence[Path], seeds: Mapping[str, Sequence[str]] | None
) -> list[dict[str, Any]]:
    """Return the table of the page's systems and those of the ablations, which begin with the same system
    where they have it.
    """
    first = systems[0].name
    sets = [
        systems,
        *(sorted(read_evaluation(folder), key=lambda system: system.name != first) for folder in ablations),
    ]
    names = {system.name for columns in sets for system in columns}
    members = {name for system, others in (seeds or {}).items() for name in (system, *others)}
    if unknown := sorted(members - names):
        raise ValueError(
            f"--seeds: no results of {', '.join(unknown)}; expected some of {', '.join(sorted(names))}"
        )
    return [_table(columns, seeds) for columns in sets]


def _table(systems: list[Column], seeds: Mapping[str, Sequence[str]] | None) -> dict[str, Any]:
    """Return what the template shows of a table: heads, rows of cells, and the sentence above it."""
    names = [system.name for system in systems]
    if seeds is None:
        groups = find_seeds(names)
    else:  # a table need not have all systems
        groups = {
            system: [name for name in others if name in names]
            for system, others in seeds.items()
            if system in names
        }
    results = add_paired_differences([system.result for system in systems], systems[0].folder.parent)
    table = make_table(results, groups)
    heads = []
    for result, num_seeds in zip(table.systems, table.num_seeds, strict=True):
        system = result["system"]
        parts = [
            system["title"],
            f"{system['parameters'] / 1e6:.1f} M",
            *([f"{num_seeds} training seeds"] if num_seeds > 1 else []),
        ]
        heads.append((system["system"], ", ".join(parts)))
    labels = [label_of(measure) for measure in table.measures]
    return {
        "head": [*heads, ("real clips", "")],
        "description": _describe_table(table),
        "rows": [
            (f"{label.text} {ARROWS[label.better]}".strip(), cells)
            for label, cells in zip(labels, table.cells, strict=True)
        ],
        "measures": table.measures,
    }


def _describe_table(table: Table) -> str:
    """Return the sentences above a table: its clips, the noise of denoising measures, and the training
    seeds."""
    protocol = table.systems[0]["protocol"]
    part = "" if protocol["complete"] else f", a part of protocol {protocol['protocol']}"
    text = f"{protocol['clips']} clips of {protocol['num_frames']} frames a system{part}."
    noise = next((record["noise"] for record in table.systems[0]["records"] if "noise" in record), None)
    if noise:
        shared, correlation = noise
        kind = "independent from frame to frame"
        if shared or correlation:
            kind = f"of which frames share {shared:.0%}, with a correlation of {correlation:g} from frame to frame in the rest"
        text += f" Denoising error and motion R² are measured on real clips under noise {kind}."
    if max(table.num_seeds) > 1:
        text += " Where a system was trained with several seeds, cells show the mean and, in brackets, the least and greatest over the seeds."
    if table.num_seeds[0] > 1:
        text += f" Differences are from the first seed of {table.names[0]}."
    return text


def _definitions(tables: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return names and definitions of all measures in the tables, without numbers of timesteps."""
    definitions: dict[str, str] = {}
    for table in tables:
        for measure in table["measures"]:
            label = label_of(measure)
            if label.definition:
                definitions.setdefault(label.definition, label.text.split(" at t = ")[0])
    return [(name, definition) for definition, name in definitions.items()]


class _Run(BaseModel):
    """A row of `latent-shift bench runs -o`."""

    run: str
    parameters: float
    steps: int
    loss: float
    val_loss: float | None
    gib_peak: float


class _Point(BaseModel):
    """A point of `latent-shift bench sweep -o`; every line has its own abscissa."""

    line: Literal["frames", "side", "clips"]
    name: str
    frames: int | None = None
    side: int | None = None
    clips: int | None = None

    @model_validator(mode="after")
    def _has_abscissa(self) -> _Point:
        if getattr(self, self.line) is None:
            raise ValueError(f"expected {self.line} in a point of the line {self.line}")
        return self


class _Sweep(BaseModel):
    """The file of `latent-shift bench sweep -o`."""

    points: list[_Point]
    device: str
    processor: str
    dtype: str
    torch: str
    date: str
    threads: int


def _read_training(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    check_schema(rows, list[_Run], path)
    return rows


def _sweep(path: Path, name: str) -> dict[str, Any]:
    sweep = read_json(path)
    check_schema(sweep, _Sweep, path)
    return {"machine": sweep, "plots": plots(sweep, name=name)}


def _template():
    try:
        import jinja2
    except ImportError as error:
        raise RuntimeError("the page needs jinja2: pip install 'latent-shift-video[report]'") from error

    source = resources.files("latent_shift").joinpath("report/report.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
