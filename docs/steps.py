"""Draw what fewer sampling steps cost: docs/steps.svg, from the results of `recipes/emoji/measure.py table` and `steps`, and of
`recipes/benchmark.py engines engines-teacher`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cells import Results, label, read_result

from latent_shift.evaluation.tables import Cell

STEPS = {"emoji": (1, 2, 4), "emoji@20": (1, 2, 4, 8, 20)}
"""Sampling steps measured of a student and of its teacher; the last are their defaults."""
NAMES = {"emoji": "`emoji`, distilled", "emoji@20": "`emoji@20`, with guidance"}
PLOTTED = ("retrieval_top1", "kd-efficientnet-lite0", "motion_error", "warping_error")


@dataclass(frozen=True)
class Point:
    """A model and its number of sampling steps: measures of 100 clips, and seconds of a clip in a warm process by engine."""

    model: str
    num_steps: int
    cells: dict[str, Cell]
    seconds: dict[str, float]


def points() -> list[Point]:
    """Read every measured model and number of steps."""
    times = {
        "emoji": read_result("engines")["engines"],
        "emoji@20": read_result("engines-teacher")["engines"],
    }
    return [
        Point(
            model, num, Results("emoji" if num == numbers[-1] else f"steps-{num}").cells[model],
            {engine: time["clips"][str(num)] for engine, time in times[model].items()},
        )
        for model, numbers in STEPS.items() for num in numbers
    ]  # fmt: skip


def draw(path: Path, engine: str = "torch") -> None:
    """Plot the measures against the seconds of a clip."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    measured, real = points(), Results("emoji").cells["real clips"]
    figure, all_axes = plt.subplots(1, len(PLOTTED), figsize=(13, 3.6), layout="constrained")
    for axes, measure in zip(all_axes, PLOTTED, strict=True):
        for model, marker in zip(STEPS, "os", strict=True):
            line = [point for point in measured if point.model == model]
            records = [point.cells[measure].record for point in line]
            seconds, values = [point.seconds[engine] for point in line], [record.value for record in records]
            spread = [
                [record.value - record.low for record in records],
                [record.high - record.value for record in records],
            ]
            axes.errorbar(
                seconds,
                values,
                spread,
                marker=marker,
                capsize=2,
                linewidth=1.2,
                label=NAMES[model].replace("`", ""),
            )
            for point, x, y in zip(line, seconds, values, strict=True):
                axes.annotate(str(point.num_steps), (x, y), xytext=(5, 5), textcoords="offset points")
        if measure in real:
            axes.axhline(
                real[measure].record.value, color="#777777", linestyle=":", linewidth=1, label="real clips"
            )
        axes.set(xscale="log", xlabel="seconds of a clip", title=label(measure))
        ticks = [1, 2, 5, 10, 20]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = all_axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "steps"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    import matplotlib as mpl

    mpl.use("Agg")
    draw(Path(__file__).parent / "steps.svg")
