"""What `latent-shift bench sweep` found as plots: time, memory and the share of the roofline against frames, time against size, rate
against clips at once, of ours and of others."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from typing import Any


def plots(sweep: dict[str, Any], *, name: str = "sweep") -> list[dict[str, str]]:
    """Time a step, memory and the share of the roofline against frames; time against size, and frames a second against clips at once.

    Args:
        sweep: what `sweep.sweep` found, on a machine.
        name: another for each sweep of one page, so that ids in it are apart.

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
    from matplotlib import ticker

    along = {line: [point for point in sweep["points"] if point["line"] == line] for line in ("frames", "side", "clips")}
    peaks = sweep.get("memory") or along["frames"]
    frames = f"frames of the clip, latents of {next(point['side'] for point in peaks)}" if peaks else "frames of the clip"
    wanted = [
        ("Time of one step", "seconds", along["frames"], "frames", frames, "seconds"),
        ("Relative to Latent-Shift", "ratio", along["frames"], "frames", frames, "ratio"),
        ("Share of the roofline", "share", along["frames"], "frames", frames, "share_of_the_roofline"),
        ("Memory at the peak of one step", "GiB", peaks, "frames", frames, "gib_peak"),
        ("Time of one step by size", "seconds", along["side"], "side", "side of the latents, 16 frames", "seconds"),
        ("Frames a second by clips", "frames a second", along["clips"], "clips", "clips of 16 frames at once", "frames_per_s"),
    ]
    found: list[dict[str, str]] = []
    for heading, unit, points, across, told_across, value in wanted:
        series: dict[str, list[dict[str, Any]]] = {}
        for point in sorted(points, key=lambda point: point[across]):
            if point.get(value) is not None:  # a contender cannot go everywhere, and not every machine tells memory here
                series.setdefault(point["name"], []).append(point)
        if not series:
            continue
        figure, axes = plt.subplots(figsize=(5.2, 4), layout="constrained")
        for (whose, row), marker in zip(series.items(), itertools.cycle("os^Dv"), strict=False):
            axes.plot([point[across] for point in row], [point[value] for point in row], marker=marker, label=whose)
        axes.set(xscale="log", xlabel=told_across, ylabel=unit, title=heading)
        if unit in ("seconds", "GiB"):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.set_xticks(ticks := sorted({point[across] for row in series.values() for point in row}), [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize="x-small", frameon=False)
        text = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # letters, not outlines; the same ids each time
            figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-{len(found)}-", text.getvalue())  # several stand in one page
        last = {whose: row[-1] for whose, row in series.items()}
        told = "; ".join(f"{whose} {point[value]:.3g} at {point[across]}" for whose, point in last.items())
        found.append({"heading": heading, "svg": svg[svg.index("<svg") :], "label": f"{heading}, {unit} against {told_across}: {told}"})
    return found


def save(sweep: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot in a file of its own, `sweep-` and its heading; raises RuntimeError as `plots`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in plots(sweep):
        paths.append(folder / f"sweep-{plot['heading'].lower().replace(' ', '-')}.svg")
        paths[-1].write_text(plot["svg"], encoding="utf-8")
    return paths
