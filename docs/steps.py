"""Plot quality against seconds by the number of sampling steps: docs/steps.svg, from docs/results/steps."""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib import ticker

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cells import ROOT, Results, label, read_result
from tables_of_quality import STEPS
from tables_of_speed import ENGINES

MEASURES = ("retrieval_top1", "motion_error", "warping_error")


def main() -> None:
    mpl.use("Agg")
    records = {num: Results(f"emoji-{num}-steps").cells[f"emoji-{num}"] for num in STEPS}
    engines = {num: read_result(f"engines-{num}-steps")["engines"] for num in STEPS}
    figure, row = plt.subplots(1, len(MEASURES), figsize=(11, 3.6), layout="constrained")
    for axes, measure in zip(row, MEASURES, strict=True):
        found = [records[num][measure].record for num in STEPS]
        for engine, marker in zip(ENGINES, "os^", strict=True):
            seconds = [engines[num][engine]["clip"] for num in STEPS]
            bars = [
                [record.value - record.low for record in found],
                [record.high - record.value for record in found],
            ]
            axes.errorbar(
                seconds,
                [record.value for record in found],
                bars,
                marker=marker,
                capsize=2,
                label=ENGINES[engine],
            )
        axes.set(title=label(measure), xscale="log", xlabel="seconds a clip", ylim=(0, None))
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
    row[0].legend(frameon=False, fontsize="small")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "steps"}):
        figure.savefig(ROOT / "docs" / "steps.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
