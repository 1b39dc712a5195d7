"""What `latent-shift bench sweep` found as plots: time, memory and the share of the roofline against frames, of ours and of others."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any


def plots(sweep: dict[str, Any]) -> list[dict[str, str]]:
    """Time a step and memory against frames, and the share of the roofline.

    Returns:
        Of each plot `heading`, `svg`, whose ids are its own among the others', and `label`, which says what is to be seen.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'latent-shift-video[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[dict[str, Any]]] = {}
    for point in sweep["points"]:
        if point["line"] == "frames" and "cannot" not in point:
            lines.setdefault(point["name"], []).append(point)
    memories: dict[str, list[dict[str, Any]]] = {}
    for point in sweep.get("memory") or [each for name in lines for each in lines[name]]:
        if "cannot" not in point and point.get("gib_peak") is not None:
            memories.setdefault(point["name"], []).append(point)
    wanted: list[tuple[str, str, dict[str, list[dict[str, Any]]], Any]] = [
        ("Time of one step", "seconds", lines, lambda point: point["seconds"]),
        ("Relative to Latent-Shift", "ratio", lines, lambda point: point["ratio"]),
        ("Share of the roofline", "share", lines, lambda point: point["share_of_the_roofline"]),
        ("Memory at the peak of one step", "GiB", memories, lambda point: point["gib_peak"]),
    ]
    found: list[dict[str, str]] = []
    for heading, unit, series, value in wanted:
        if not series:
            continue
        figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
        for (name, points), marker in zip(series.items(), "os^Dv", strict=False):
            axes.plot([point["frames"] for point in points], [value(point) for point in points], marker=marker, label=name)
        axes.set(xscale="log", xlabel="frames of the clip", ylabel=unit, title=heading)
        if unit in ("seconds", "GiB"):
            axes.set_yscale("log")
        axes.set_xticks(ticks := sorted({point["frames"] for points in series.values() for point in points}), [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", frameon=False)
        text = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
            figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>plot{len(found)}-", text.getvalue())  # several stand in one page
        last = {name: points[-1] for name, points in series.items()}
        told = "; ".join(f"{name} {value(point):.3g} at {point['frames']} frames" for name, point in last.items())
        found.append({"heading": heading, "svg": svg[svg.index("<svg") :], "label": f"{heading}, {unit}: {told}"})
    return found


def save(sweep: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot in a file of its own, `sweep-` and its heading; raises RuntimeError as `plots`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in plots(sweep):
        paths.append(folder / f"sweep-{plot['heading'].lower().replace(' ', '-')}.svg")
        paths[-1].write_text(plot["svg"], encoding="utf-8")
    return paths
