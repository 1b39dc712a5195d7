"""Evaluations as a page to look at: the same words in rows, systems and real clips in columns, clips that play together, numbers with
their intervals, and plots. A folder of files with no address outside of it: it opens from a disk.

    page/
      index.html        text, tables, plots (SVG) and what makes the clips play together
      clips/*.mp4, .png clips, and the frame that stands there before one plays
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_shift import video
from latent_shift.evaluation.evaluate import Drawn, compared
from latent_shift.evaluation.tables import lacking, table_of
from latent_shift.report.plots import plots

LABELS = {  # measure, or how its name begins -> what a reader is told, and where better is: up, down, or where real clips are
    "retrieval_top1": ("right caption first", "\u2191"), "retrieval_top5": ("right caption in the first five", "\u2191"),
    "retrieval_median_rank": ("median rank of the right caption", "\u2193"),
    "kd-efficientnet-lite0": ("kernel distance of frames, EfficientNet-lite0", "\u2193"),
    "kd-efficientnet-lite0-motion": ("kernel distance of how frames change, EfficientNet-lite0", "\u2193"),
    "motion_energy": ("motion energy, grey levels", "="), "flicker": ("flicker, grey levels", "="), "loop_gap": ("loop gap, steps", "="),
    "persistence": ("persistence of motion", "="), "coherence": ("coherence of frames", "="),
    "warping_error": ("warping error, grey levels", "="), "motion_error": ("motion error, factor", "\u2193"),
    "reconstruction_psnr_db": ("reconstruction PSNR, dB", "\u2191"), "denoising_error": (None, "\u2193"), "motion_seen": (None, "\u2191"),
    "clipsim": ("CLIPSIM", "\u2191"), "is": ("inception score", "\u2191"), "is-frames": ("inception score of frames", "\u2191"), "f": (None, "\u2193"), "k": (None, "\u2193"),
}  # fmt: skip


@dataclass
class Shown:
    """One system of an evaluation: its results and where its clips lie."""

    result: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return str(self.result["system"]["system"])


def evaluations(folder: Path) -> list[Shown]:
    """The systems of an evaluation's folder, in the order of their names; raises ValueError where there is none."""
    found = [Shown(json.loads(path.read_text()), path.parent) for path in sorted(folder.glob("*/results.json"))]
    if not found:
        raise ValueError(f"{folder}: no */results.json; expected the folder of `latent-shift eval --out`")
    return found


def report(
    out: Path, evaluated: Path, *, shown: Sequence[str] = (), ablations: Sequence[Path] = (), training: Path | None = None,
    classes: Path | None = None, sweeps: Sequence[Path] = (), rows: int = 8, title: str = "Latent-Shift beside others", note: str = "",
) -> Path:  # fmt: skip
    """Write the page.

    Args:
        out: its folder.
        evaluated: the folder of an evaluation, whose systems stand in columns.
        shown: names of those of its systems that are shown, from left to right; none: all.
        ablations: folders of evaluations, each a table of all its systems; the same folder may be among them.
        training: what `latent-shift bench runs -o` wrote: what the systems learnt, and what it took.
        classes: the folder of an evaluation with protocol classes, whose first system's clips stand in rows by their words.
        sweeps: what `latent-shift bench sweep -o` wrote, one a machine.
        rows: words shown.
        title: of the page.
        note: what a reader has to know of these systems, at its beginning.

    Returns:
        The page's file.

    Raises:
        ValueError: a folder without results or without a system to be shown, or an evaluation that has fewer clips than rows.
    """
    found = {each.name: each for each in evaluations(evaluated)}
    if unknown := [name for name in shown if name not in found]:
        raise ValueError(f"{evaluated}: has no {', '.join(unknown)}; expected {', '.join(found)}")
    systems = [found[name] for name in shown or found]
    protocol = systems[0].result["protocol"]
    prompts = _prompts(evaluated)
    if rows > len(prompts):
        raise ValueError(f"{evaluated} has {len(prompts)} clips a system, {rows} rows asked for")
    (out / "clips").mkdir(parents=True, exist_ok=True)
    columns = [{"name": each.name, "told": _told(each.result)} for each in systems]
    real = Shown({"system": {"system": "real clips", "fps": protocol["fps"]}}, evaluated / "real")
    kept = [(real.folder / "clips" / f"{k:06}.png").exists() for k in range(rows)]
    grid = [
        {
            "words": prompts[k],
            "cells": [
                _clip(each, k, protocol["num_frames"], out, "compared", f"{prompts[k]}, {each.name}")
                if each is not real or kept[k]
                else None
                for each in [*systems, *([real] if any(kept) else [])]
            ],
        }
        for k in range(rows)
    ]
    stills = [
        {"words": prompts[k], "cells": [_still(each, k, out, f"{prompts[k]}, one frame by {each.name}") for each in systems]}
        for k in range(rows)
    ]
    page = _template().render(
        title=title, note=note, protocol=protocol, rates=sorted({each.result["system"]["fps"] for each in systems}), columns=columns, real=any(kept), grid=grid, stills=stills if any(cell for row in stills for cell in row["cells"]) else [],
        results=_table(systems), skipped=lacking([each.result for each in systems]), ablations=[_ablation(folder, systems[0].name) for folder in ablations],
        training=json.loads(training.read_text()) if training else [],
        **_classes(classes, out),
        sweeps=[{"machine": found, "plots": plots(found, name=f"sweep{k}")} for k, found in enumerate(json.loads(path.read_text()) for path in sweeps)],
    )  # fmt: skip
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def _prompts(folder: Path) -> list[str]:
    return json.loads((folder / "prompts.json").read_text(encoding="utf-8"))


def _clip(system: Shown, k: int, num_frames: int, out: Path, section: str, label: str) -> dict[str, Any]:
    clip = Drawn(system.folder / "clips", num_frames)(k)
    name = f"clips/{section}-{system.folder.name}-{k:03}"
    video.write(_enlarged(clip), out / f"{name}.mp4", fps=system.result["system"]["fps"])
    Image.fromarray(_enlarged(clip[:1])[0]).save(out / f"{name}.png")
    return {"source": f"{name}.mp4", "poster": f"{name}.png", "label": label}


def _still(system: Shown, k: int, out: Path, label: str) -> dict[str, Any] | None:
    path = system.folder / "stills" / f"{k:06}.png"
    if not path.exists():
        return None
    name = f"clips/stills-{system.folder.name}-{k:03}.png"
    Image.fromarray(_enlarged(np.asarray(Image.open(path))[None])[0]).save(out / name)
    return {"source": name, "label": label}


def _enlarged(clip: np.ndarray, side: int = 128) -> np.ndarray:
    """Small clips as whole pixels, so that every system has the same place."""
    return clip.repeat(side // clip.shape[1], axis=1).repeat(side // clip.shape[1], axis=2) if clip.shape[1] < side else clip


def _classes(folder: Path | None, out: Path) -> dict[str, Any]:
    if folder is None:
        return {"classes": [], "classes_told": ""}
    system, prompts = evaluations(folder)[0], _prompts(folder)
    frames = system.result["protocol"]["num_frames"]
    places: dict[str, list[int]] = {}
    for k, words in enumerate(prompts):
        places.setdefault(words, []).append(k)
    rows = [
        {"words": words, "cells": [_clip(system, k, frames, out, "classes", f"{words}, {system.name}, seed {k}") for k in numbers]}
        for words, numbers in places.items()
    ]
    told = f"By {system.name} ({_told(system.result)}), {frames} frames each, every class with seeds of its own."
    return {"classes": rows, "classes_told": told}


def _told(result: dict[str, Any]) -> str:
    """What stands under a system's name."""
    system = result["system"]
    height, width = result["made_at"]
    parts = [system["title"], f"{system['parameters'] / 1e6:.1f} M parameters", f"{width}x{height}"]
    parts += [f"{system['num_inference_steps']} steps", f"guidance {system['guidance_scale']:g}"]
    return ", ".join(parts)


def _ablation(folder: Path, first: str) -> tuple[str, dict[str, Any]]:
    """All systems of a folder, compared with the one that the page begins with where it is among them."""
    return folder.name.replace("-", " ").capitalize(), _table(sorted(evaluations(folder), key=lambda each: each.name != first))


def _table(systems: list[Shown]) -> dict[str, Any]:
    results = compared([each.result for each in systems], systems[0].folder.parent)
    head, names, cells = table_of(results)
    titles = [f"{result['system']['title']}, {result['system']['parameters'] / 1e6:.1f} M" for result in results]
    return {
        "head": [*zip(head, titles, strict=False), (head[-1], "")],
        "told": _of(results),
        "rows": [(_label(name), row) for name, row in zip(names, cells, strict=True)],
    }


def _of(results: list[dict[str, Any]]) -> str:
    """What a table's numbers are of."""
    protocol = results[0]["protocol"]
    part = "" if protocol["complete"] else f", a part of protocol {protocol['protocol']}"
    told = f"{protocol['clips']} clips of {protocol['num_frames']} frames a system{part}."
    if noise := next((record["noise"] for record in results[0]["records"] if "noise" in record), None):
        alike = f"of which frames share {noise[0]:.0%}; the rest has correlation {noise[1]:g} from frame to frame"
        told += " For denoising errors and motion seen, models are shown real clips under noise "
        told += f"{alike if any(noise) else 'that is independent from frame to frame'}."
    return told


def _label(name: str) -> str:
    label, better = LABELS.get(name) or next((told for start, told in LABELS.items() if name.startswith(start)), (None, ""))
    better = better if not name.endswith("_frame_by_frame") else ""  # what is known without the others, no aim
    return f"{label or name.replace('_', ' ')} {better}".strip()


def _template():
    import jinja2

    source = resources.files("latent_shift").joinpath("report/report.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
