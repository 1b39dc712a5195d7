"""Write the tables of results into the documentation from the JSON files of docs/results.

    python docs/tables.py   # a test compares the pages with the files

A page holds each table between two markers, `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is one
of TABLES. Labels come from the table of measures (latent_shift/evaluation/measures.py).
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from latent_shift.evaluation.measures import HIGHER, LOWER, MEASURES, REAL
from latent_shift.evaluation.sensitivity import trend
from latent_shift.evaluation.tables import Spread
from latent_shift.files import markdown_table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cells import Format, Results, between, decimals, difference, label, percent, point, read_result, value

ROOT = Path(__file__).parent.parent


def summary() -> str:
    """Tabulate what README shows: the cost and the gain of the shift and of attention."""
    results = Results("seeds")
    sizes = results.parameters
    names = {name: COMPARED[name] for name in ("shift", "mixed", "attention", "none")}
    times: dict[str, float] = {}
    for timing in read_result("sweep-h200")["points"]:  # of two measurements the first
        if (timing["frames"], timing["side"], timing["clips"]) == (16, 64, 1):
            times.setdefault(timing["name"], timing["seconds"] * 1e3)
    timed = {"shift": "Latent-Shift", "attention": "Latent-VDM", "none": "frame by frame"}
    rows = [
        ["parameters added, 6 M network", *(f"{sizes[name] / sizes['none'] - 1:.0%}" for name in names), ""],
        ["sampling step of 16 frames at SD 1.5's size, ms", *(f"{times[timed[name]]:.0f}" if name in timed else "not measured" for name in names), ""],
    ]  # fmt: skip
    for measure, places in {"denoising_error": 3, "motion_seen_at_375": 2, "flicker": 1}.items():
        form = decimals(places)
        means = [point(results.cells[name][measure], form) for name in names]
        rows.append([label(measure), *means, results.real(measure, form, with_interval=False)])
    return markdown_table(["", *names.values(), "real clips"], rows)


EMOJI = {"emoji": "emoji", "former": "former weights"}
"""Systems of `recipes/emoji/measure.py`."""


def emoji() -> str:
    """Tabulate `recipes/emoji`, evaluated with protocol emoji, beside the weights of before."""
    results = Results("emoji")
    formats: dict[str, tuple[Format, str]] = {
        "kd-efficientnet-lite0": (decimals(3), ""), "kd-efficientnet-lite0-motion": (decimals(3), ""),
        "retrieval_top1": (percent, "100%"), "retrieval_top5": (percent, "100%"), "motion_error": (decimals(2), "1"),
        "motion_energy": (decimals(2), ""), "flicker": (decimals(2), ""), "persistence": (decimals(2), ""),
        "coherence": (decimals(3), ""), "warping_error": (decimals(2), ""), "loop_gap": (decimals(2), ""),
        "denoising_error": (decimals(4), ""), "denoising_error_of_end_frames": (decimals(4), ""),
    }  # fmt: skip
    for timestep in (125, 375, 625, 875):
        formats |= {
            f"motion_seen_at_{timestep}{suffix}": (decimals(2), "1") for suffix in ("", "_frame_by_frame")
        }
    formats["reconstruction_psnr_db"] = (decimals(1), "")
    rows = [
        [label(measure), *(value(results.cells[name][measure], form) for name in EMOJI), results.real(measure, form) or ideal]
        for measure, (form, ideal) in formats.items()
    ]  # fmt: skip
    return results.caption() + markdown_table(
        ["measure, 100 clips of 16 frames", *EMOJI.values(), "real clips"], rows
    )


def shift_and_attention() -> str:
    """Tabulate `recipes/compare`: the shift, attention and neither."""
    results = Results("seeds")
    names = COMPARED
    rows = [
        ["loss on held-out clips", *results.losses(names), ""],
        ["parameters", *(f"{results.parameters[name] / 1e6:.2f} M" for name in names), ""],
    ]
    places = {
        "denoising_error": 3, "denoising_error_of_end_frames": 3, "motion_seen_at_125": 3, "motion_seen_at_375": 3, "motion_error": 3,
        "flicker": 2, "warping_error": 2, "persistence": 3, "coherence": 3, "loop_gap": 3, "retrieval_top5": 3,
    }  # fmt: skip
    for measure, digits in places.items():
        form = decimals(digits)
        first, *others = (results.cells[name][measure] for name in names)
        differences = [f"{point(cell, form)}; {difference(cell, digits)}" for cell in others]
        rows.append(
            [
                label(measure),
                value(first, form),
                *differences,
                results.real(measure, form, with_interval=False),
            ]
        )
    head = ["measure, 60 clips of 8 frames", *names.values(), "real clips"]
    return results.caption(differences=True) + markdown_table(head, rows)


ATTENTION = "attention (Latent-VDM)"
COMPARED = {
    "shift": "shift",
    "hold": "shift, edges held",
    "mixed": "better shift",
    "attention": ATTENTION,
    "attention-equal-time": "attention, as long as the better shift",
    "none": "no shift",
}
"""Systems of `compare.py seeds`."""
NETWORKS = {"frame by frame": "no shift", "Latent-VDM": ATTENTION}
"""Names on the pages of networks that `latent-shift bench` names otherwise."""
PARTS = {
    "shift": "the paper's shift: 1/3 + 1/3, conv1, zeros; one step in five on single frames",
    "quarter": "1/4 + 1/4 of the channels",
    "eighth": "1/8 + 1/8 (TSM's)",
    "conv2": "before the second convolution",
    "end": "at the end of the branch",
    "hold": "edges held",
    "wrap": "edges wrap around",
    "no-stills": "no single frames",
    "half-stills": "half of the steps on single frames",
    "none": "no shift",
    "attention": "attention (Latent-VDM), 6.8 M",
}
PLACES = {
    "denoising_error": 3, "denoising_error_of_end_frames": 3, "motion_seen_at_375": 3, "motion_error": 3, "flicker": 2,
    "warping_error": 2, "loop_gap": 3, "retrieval_top5": 3,
}  # fmt: skip
"""Measures of the two tables of the shift's parts, and their decimals."""


def parts() -> str:
    """Tabulate `recipes/compare`: every part of the shift, as differences from the paper's shift."""
    results = Results("compare")
    names = [name for name in PARTS if name in results.table.names]
    rows = []
    for name, loss in zip(names, results.losses(names), strict=True):
        cells = results.cells[name]
        if name == names[0]:
            numbers = [value(cells[measure], decimals(places)) for measure, places in PLACES.items()]
        else:
            numbers = [difference(cells[measure], places) for measure, places in PLACES.items()]
        rows.append([PARTS[name], loss, *numbers])
    real = [results.real(measure, decimals(2), with_interval=False) for measure in PLACES]
    rows.append(
        [
            "real clips",
            "",
            *("1" if measure == "motion_error" else cell for measure, cell in zip(PLACES, real, strict=True)),
        ]
    )
    return results.caption(differences=True) + markdown_table(
        ["variant", "loss on held-out clips", *map(label, PLACES)], rows
    )


def ranked(name: str) -> str:
    """Tabulate `recipes/compare/run.py`: the loss on held-out clips by timestep, of the first seed and of all, the best first.

    Where no layers over time and attention are among the ideas, with the fraction of attention's gain that an idea reaches, also at
    those timesteps where it gains 5% or more.

    Args:
        name: of the file of results.
    """
    rows, results = [], read_result(name)
    form = decimals(4)
    means = {
        idea: {number: mean(seed["loss"].values()) for number, seed in seeds.items()}
        for idea, seeds in results.items()
    }
    both_ends = {"none", "attention"} <= means.keys()

    def gain(loss: float, none: float, attention: float) -> str:
        return percent((none - loss) / (none - attention))

    def at_timestep(timestep: str, loss: float) -> str:
        ends = (
            [results[idea]["0"]["loss"][timestep] for idea in ("none", "attention")] if both_ends else [1, 1]
        )
        return f"{form(loss)}; {gain(loss, *ends)}" if ends[1] <= 0.95 * ends[0] else form(loss)

    for idea, seeds in results.items():
        first = seeds["0"]
        before = first.get("loss_before_training", {})
        cells = [
            form(means[idea]["0"]),
            *(at_timestep(*pair) for pair in first["loss"].items()),
            f"{between(Spread.of(list(means[idea].values())), form)}; {len(seeds)} seeds"
            if len(seeds) > 1
            else "",
            form(mean(before.values())) if before else "",
        ]
        if both_ends:
            cells.insert(1, gain(means[idea]["0"], means["none"]["0"], means["attention"]["0"]))
        settings = first["settings"] or "the paper's shift"
        rows.append((means[idea]["0"], [idea, f"`{settings}`", *cells]))
    timesteps = next(iter(results.values()))["0"]["loss"]
    head = ["idea", "settings", "loss, first seed", *(f"t = {timestep}" for timestep in timesteps)]
    if both_ends:
        head.insert(3, "of attention's gain")
    head += ["loss, mean over seeds", "loss before training"]
    return markdown_table(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])])


def two_runs() -> str:
    """Tabulate the variants of `parts` in two runs on different machines, each training seed by itself."""
    variants = {"shift": PARTS["shift"], "shift-seed-1": "the same with another training seed"} | PARTS
    runs = []
    for file in ("compare", "compare-earlier"):
        results, columns = Results(file, merge_seeds=False), []
        for name, loss in zip(variants, results.losses(variants), strict=True):
            cells = [results.cells[name][measure] for measure in PLACES]
            numbers = [
                decimals(places)(cell.record.value)
                if cell.record.difference is None
                else decimals(places, signed=True)(cell.record.difference.value)
                for cell, places in zip(cells, PLACES.values(), strict=True)
            ]
            columns.append([loss, *numbers])
        runs.append(columns)
    rows = [
        [text, *map("; ".join, zip(this, earlier, strict=True))]
        for text, this, earlier in zip(variants.values(), *runs, strict=True)
    ]
    caption = "*Signed values: paired differences from shift on the same clips.*\n\n"
    return caption + markdown_table(
        ["variant, this run; earlier run", "loss on held-out clips", *map(label, PLACES)], rows
    )


def systems() -> str:
    """Tabulate `recipes/compare`: the shift beside the paper's baselines and the embedded model."""
    results = Results("systems")
    names = ("shift", "attention", "none", "vdm", "emoji")
    rows = [["parameters", *(f"{results.parameters[name] / 1e6:.1f} M" for name in names), ""]]
    places = {
        "kd-efficientnet-lite0": 2, "kd-efficientnet-lite0-motion": 2, "retrieval_top5": 2, "motion_error": 2, "flicker": 1,
        "warping_error": 1, "persistence": 2, "coherence": 3, "loop_gap": 2,
    }  # fmt: skip
    for measure, digits in places.items():
        form = decimals(digits)
        ideal = "1" if measure in ("retrieval_top5", "motion_error") else ""
        numbers = [value(results.cells[name][measure], form) for name in names]
        rows.append([label(measure), *numbers, results.real(measure, form) or ideal])
    head = ["measure, 60 clips of 8 frames", "shift", ATTENTION, "no shift", "VDM", "`emoji`", "real clips"]
    return results.caption() + markdown_table(head, rows)


def measures() -> str:
    """Tabulate the measures: their names in results, which values are better, what they need, and their definitions."""
    better = {HIGHER: "higher", LOWER: "lower", REAL: "close to real clips", "": ""}
    rows = []
    for measure in (measure for measure in MEASURES.values() if measure.protocols):
        network = "" if measure.network in ("", "efficientnet") else f"`--weights {measure.network}=PATH`"
        needs = "extra `eval`" if measure.package or measure.network == "efficientnet" else network
        for name, (text, direction, definition) in measure.labels.items():
            rows.append(
                [
                    text.replace("= {timestep}", "= T"),
                    f"`{name.replace('{timestep}', 'T')}`",
                    better[direction],
                    needs,
                    definition,
                ]
            )
    return markdown_table(["measure", "name in results", "better", "needs", "definition"], rows)


def sensitivity() -> str:
    """Tabulate `latent-shift bench measures`: each measure of original and of most degraded clips."""
    degradations = read_result("measures")["measures"]
    measures = [name for name in degradations["noise"] if not name.startswith("fd-")]

    def cell(values: list[float]) -> str:
        direction = trend(values)
        if direction == "stays":
            return f"stays: {values[0]:.3g}"
        return f"{direction or 'up and down'}: {values[0]:.3g} → {values[-1]:.3g}"

    rows = ([label(name), *(cell(values[name]) for values in degradations.values())] for name in measures)
    return markdown_table(["measure", *degradations], rows)


def overhead() -> str:
    """Tabulate `latent-shift bench`: a step with the shift and without."""
    ways = ("frame by frame", "with the shift", "with the shift, one text a clip as the pipeline has it")
    rows = []
    for name, network in (
        ("bench", "34 M U-Net, 32x32 latents"),
        ("bench-emoji", "emoji's U-Net, 23 M, 16x16 latents"),
    ):
        first, *others = (read_result(name)[way] for way in ways)
        rows.append(
            [
                network,
                f"{first['seconds']:.3g} s",
                *(f"{other['seconds']:.3g} s ({other['ratio']:.3f})" for other in others),
            ]
        )
    head = ["sampling step, 16 frames", "no shift", "shift", "shift, as the pipeline runs it"]
    return markdown_table(head, rows)


def whole_commands() -> str:
    """Tabulate `latent-shift bench commands`."""
    seconds = read_result("commands")["seconds"]
    rows = (
        [f"`{command}`", f"{number:.2g}" if number < 10 else f"{number:.3g}"]
        for command, number in seconds.items()
    )
    return markdown_table(["whole command", "seconds"], rows)


def bad_inputs() -> str:
    """Tabulate `make fuzz`."""
    outcomes = read_result("fuzz")["outcomes"]
    names = list(next(iter(outcomes.values())))
    total = {name: sum(count[name] for count in outcomes.values()) for name in names}
    rows = [
        [kind.replace("_", " "), *(f"{number:,}" for number in (sum(count.values()), *count.values()))]
        for kind, count in {**outcomes, "all": total}.items()
    ]
    return markdown_table(["input", "tried", *names], rows)


def faults_of_training() -> str:
    """Tabulate `tests/faults.py 50`."""
    return markdown_table(["fault", "lost"], read_result("faults")["rows"])


def faults_of_commands() -> str:
    """Tabulate `tests/command_faults.py`."""
    return markdown_table(["command", "fault", "lost"], read_result("command-faults")["rows"])


def faults_of_server() -> str:
    """Tabulate `tests/server_faults.py`."""
    return markdown_table(["fault", "lost"], read_result("server-faults")["rows"])


def serving() -> str:
    """Tabulate `latent-shift bench serve`."""
    result = read_result("serve")
    seconds, counts = result["seconds"], result["durability"]
    rates = result["clips a second, Ray workers of one thread"]
    rows = [
        [f"jobs lost, made twice, of {counts['requests']:,} from {counts['clients']} clients through {counts['kills']} kills",
         f"{counts['lost']}, {counts['made twice']}"],
        ["jobs that completed, that failed with a reason", f"{counts['completed']:,}, {counts['failed with a reason']:,}"],
        ["until the server answers, until the model is loaded, s", f"{seconds['start']:.2f}, {seconds['ready']:.1f}"],
        ["a clip of one step, an mp4 included, beside the same call of a pipeline, ms more", f"{1000 * seconds['overhead']:.0f}"],
        ["from a request to the first preview, s", f"{seconds['first_preview']:.2f}"],
        ["first paint of the page in a new browser, ms", f"{1000 * seconds['first_paint']:.0f}"],
        ["from SIGTERM to the end, s", f"{seconds['stop']:.1f}"],
        ["clips of two Ray workers with a thread each, times those of one", f"{rates['2'] / rates['1']:.2f}"],
    ]  # fmt: skip
    return markdown_table(["measured", "figure"], rows)


def fuzz_of_server() -> str:
    """Tabulate `tests/fuzz_server.py`."""
    result = read_result("fuzz-server")
    statuses = result["statuses"]
    kinds = {"2": "served", "3": "served", "4": "refused", "5": "refused"}
    counts = dict.fromkeys(("served", "refused", "closed"), 0)
    for status, count in statuses.items():
        counts[kinds.get(status[0], "closed")] += count
    memory = result["MiB of the server after each tenth"]
    rows = [[f"{result['requests']:,}", f"{counts['served']:,}", f"{counts['refused']:,}", f"{statuses.get('500', 0)}", f"{result['faults']}",
             f"{memory[1]} to {memory[-1]}"]]  # fmt: skip
    return markdown_table(
        [
            "requests",
            "served",
            "refused",
            "status 500",
            "faults of any kind",
            "memory after two tenths and at the end, MiB",
        ],
        rows,
    )


def time_and_ratio(timing: dict[str, Any], unit: str = "s") -> str:
    """Return a time, and its ratio to Latent-Shift's in brackets."""
    if "cannot" in timing:
        return f"({timing['cannot'].removeprefix('at most ').removesuffix(' frames')} at most)"
    seconds, ratio = timing["seconds"], timing["ratio"]
    return f"{seconds:.3g} s ({ratio:.2f})" if unit == "s" else f"{seconds * 1000:.0f} ms ({ratio:.2f})"


def sweep_on_cpu() -> str:
    """Tabulate `latent-shift bench sweep` on a CPU."""
    sweep = read_result("sweep")
    points = {
        (timing["name"], timing["line"], timing["frames"], timing["side"]): timing
        for timing in sweep["points"]
        if timing["clips"] == 1
    }
    memory = {(run["name"], run["frames"]): run for run in sweep["memory"]}
    lines = [
        ("frames", 1, 16),
        ("frames", 16, 16),
        ("frames", 64, 16),
        ("frames", 256, 16),
        ("side", 16, 32),
        ("side", 16, 64),
    ]
    rows = []
    for name in dict.fromkeys(timing["name"] for timing in sweep["points"]):
        cells = [time_and_ratio(points[(name, *line)]) for line in lines]
        peak = memory[name, 256].get("gib_peak")
        cells.insert(4, "" if peak is None else f"{peak:.2f}")
        rows.append(
            [NETWORKS.get(name, name), f"{points[(name, *lines[0])]['parameters'] / 1e6:.1f} M", *cells]
        )
    heads = [f"{frames} frame{'s' if frames > 1 else ''}, {side}x{side}" for _, frames, side in lines]
    return markdown_table(
        ["sampling step", "parameters", *heads[:4], "its peak memory, GiB", *heads[4:]], rows
    )


def sweep_on_gpu() -> str:
    """Tabulate `latent-shift bench sweep --full` on a GPU."""
    sweep = read_result("sweep-h200")
    points: dict[tuple, dict[str, Any]] = {}
    for timing in sweep["points"]:  # a size that lies on two lines has two equal points
        points.setdefault((timing["name"], timing["frames"], timing["side"], timing["clips"]), timing)
    sizes = {
        "16 frames, 32x32": (16, 32, 1),
        "64 frames, 32x32": (64, 32, 1),
        "4 clips of 16, 32x32": (16, 32, 4),
        "16 frames, 64x64": (16, 64, 1),
    }
    rows = []
    for name in dict.fromkeys(timing["name"] for timing in sweep["points"]):
        large = points[name, 16, 64, 1]
        cells = [time_and_ratio(points[(name, *size)], "ms") for size in sizes.values()]
        fraction = f"{large['share_of_the_matrix_rate'] * 100:.0f}%"
        rows.append(
            [
                NETWORKS.get(name, name),
                f"{large['parameters'] / 1e6:.0f} M",
                *cells,
                f"{large['gib_peak']:.1f}",
                fraction,
            ]
        )
    return markdown_table(
        ["sampling step", "parameters", *sizes, "its peak memory, GiB", "of the matrix rate"], rows
    )


def peers() -> str:
    """Tabulate `latent-shift bench peers`."""
    variants = {
        name: networks
        for name, networks in read_result("peers").items()
        if isinstance(networks, dict) and "Latent-Shift" in networks
    }
    rows = []
    for network, first in next(iter(variants.values())).items():
        times = [
            f"{networks[network]['seconds']:.2f} s ({networks[network]['ratio']:.2f})"
            for networks in variants.values()
        ]
        rows.append([NETWORKS.get(network, network), f"{first['parameters'] / 1e6:.1f} M", *times])
    return markdown_table(["sampling step, 16 frames", "parameters", *variants], rows)


def training_speed() -> str:
    """Tabulate `latent-shift bench training`, of `emoji` and of the networks of the comparison."""
    steps = [read_result(name)["step"] for name in ("training", "training-comparison")]
    names = {
        "64 images": "64 images",
        "4 clips of 16 frames, none": "4 clips of 16 frames, no shift",
        "4 clips of 16 frames, shift": "the paper's shift",
        "4 clips of 16 frames, mixed": "the better shift",
        "4 clips of 16 frames, attention": ATTENTION,
        "4 clips of 16 frames, shift, compiled": "the paper's shift, compiled",
    }
    rows = []
    for name, title in names.items():
        row = [title]
        for step in steps:
            time, form = step[name], decimals(2)
            ratios = f"{form(time['ratio'])} ({form(time['ratio_least'])} to {form(time['ratio_most'])})"
            row += [f"{time['seconds']:.2f} s", ratios]
        rows.append(row)
    ratio = "ratio to 64 images, median and range"
    return markdown_table(["training step", "emoji, 23 M", ratio, "comparison, 6 M", ratio], rows)


def long_clips() -> str:
    """Tabulate `latent-shift bench memory`: sampling long clips."""
    peaks = {
        (run["mode"], run["frames"]): f"{run['gib_peak']:.2f}" for run in read_result("memory")["long clips"]
    }
    lengths = sorted({frames for _, frames in peaks})
    modes = {"whole": "whole", "chunks": "`chunk=16, halo=4`", "stream": "`pipe.stream`, frames decoded"}
    rows = ([text, *(peaks.get((mode, frames), "") for frames in lengths)] for mode, text in modes.items())
    return markdown_table(["peak memory, GiB", *(f"{frames} frames" for frames in lengths)], rows)


def training_memory() -> str:
    """Tabulate `latent-shift bench memory`: training SD 1.5."""
    configurations = read_result("memory")["training SD 1.5, 16 frames of 512x512, GiB"]
    rows = ([name, *(f"{gib:.1f}" for gib in counts.values())] for name, counts in configurations.items())
    return markdown_table(["memory of a training step, GiB", *next(iter(configurations.values()))], rows)


IDEAS = ("ideas", "ideas-pixart", "ideas-sana", "ideas-full-sana", "ideas-full-pixart")
TABLES: dict[str, Callable[[], str]] = {name.replace("-", "_"): partial(ranked, name) for name in IDEAS} | {
    function.__name__: function
    for function in (
        summary,
        emoji,
        shift_and_attention,
        parts,
        systems,
        measures,
        two_runs,
        sensitivity,
        overhead,
        whole_commands,
        sweep_on_cpu,
        sweep_on_gpu,
        peers,
        long_clips,
        training_speed,
        training_memory,
        bad_inputs,
        faults_of_training,
        faults_of_commands,
        faults_of_server,
        serving,
        fuzz_of_server,
    )
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if MARKED.search(path.read_text(encoding="utf-8"))
]


def with_tables(page: str) -> str:
    """Return the text of a page with its marked tables replaced; raise ValueError for a marker without a function."""

    def replacement(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"{page}: no table {name}; expected one of {', '.join(TABLES)}")
        return f"{start}\n{TABLES[name]()}\n\n{end}"

    return MARKED.sub(replacement, (ROOT / page).read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(with_tables(page), encoding="utf-8")
