"""Plots of a sweep (`latent-shift bench sweep`): step time, memory and fraction of the roofline against
frames, size and clips.
"""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_shift.files import write_text


@dataclass(frozen=True)
class Plot:
    """One plot: its heading and unit, the points to show, the keys of x and y in a point, and the label of
    x."""

    heading: str
    unit: str
    points: list[dict[str, Any]]
    x: str
    x_label: str
    y: str

    @property
    def series(self) -> dict[str, list[tuple[float, float]]]:
        """Network to its (x, y), in the order of x; without networks that cannot take the size and machines
        without the number.
        """
        series: dict[str, list[tuple[float, float]]] = {}
        for point in sorted(self.points, key=lambda point: point[self.x]):
            if point.get(self.y) is not None:
                series.setdefault(point["name"], []).append((point[self.x], point[self.y]))
        return series


def plots(sweep: dict[str, Any], *, name: str = "sweep") -> list[dict[str, str]]:
    """Plot a sweep.

    Args:
        sweep: the result of `benchmark.sweep.sweep` on one machine.
        name: prefix of the ids in the SVGs, different for each sweep of a page.

    Returns:
        For each plot `heading`, `svg`, and `label`, a description for those who cannot see it.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'latent-shift-video[report]'") from error
    matplotlib.use("Agg")
    results: list[dict[str, str]] = []
    for plot in _plots_of(sweep):
        if series := plot.series:
            # Ids get a prefix, because several plots share one page.
            svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-{len(results)}-", _draw(plot, salt=name))
            last = "; ".join(
                f"{network} {points[-1][1]:.3g} at {points[-1][0]}" for network, points in series.items()
            )
            label = f"{plot.heading}, {plot.unit} against {plot.x_label}: {last}"
            results.append({"heading": plot.heading, "svg": svg[svg.index("<svg") :], "label": label})
    return results


def _plots_of(sweep: dict[str, Any]) -> list[Plot]:
    lines = {
        line: [point for point in sweep["points"] if point["line"] == line]
        for line in ("frames", "side", "clips")
    }
    memory = sweep.get("memory") or lines["frames"]
    frames = f"frames of the clip, latents of {memory[0]['side']}" if memory else "frames of the clip"
    return [
        Plot("Time of one step", "seconds", lines["frames"], "frames", frames, "seconds"),
        Plot("Relative to Latent-Shift", "ratio", lines["frames"], "frames", frames, "ratio"),
        Plot("Share of the roofline", "share", lines["frames"], "frames", frames, "share_of_the_roofline"),
        Plot("Memory at the peak of one step", "GiB", memory, "frames", frames, "gib_peak"),
        Plot(
            "Time of one step by size",
            "seconds",
            lines["side"],
            "side",
            "side of the latents, 16 frames",
            "seconds",
        ),
        Plot(
            "Frames a second by clips",
            "frames a second",
            lines["clips"],
            "clips",
            "clips of 16 frames at once",
            "frames_per_s",
        ),
    ]


def _draw(plot: Plot, *, salt: str) -> str:
    """Return a plot as SVG; its ids depend on the salt and are the same each time."""
    import matplotlib
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=(5.2, 4), layout="constrained")
    for (network, points), marker in zip(plot.series.items(), itertools.cycle("os^Dv"), strict=False):
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=network)
    axes.set(xscale="log", xlabel=plot.x_label, ylabel=plot.unit, title=plot.heading)
    if plot.unit in ("seconds", "GiB"):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ticks = sorted({x for points in plot.series.values() for x, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="x-small", frameon=False)
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):  # letters instead of outlines
        figure.savefig(svg, format="svg", metadata={"Date": None})
    plt.close(figure)
    return svg.getvalue()


def save(sweep: dict[str, Any], folder: Path) -> list[Path]:
    """Write each plot to a file named `sweep-` and its heading; raise RuntimeError as `plots`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in plots(sweep):
        paths.append(folder / f"sweep-{plot['heading'].lower().replace(' ', '-')}.svg")
        write_text(paths[-1], plot["svg"])
    return paths
