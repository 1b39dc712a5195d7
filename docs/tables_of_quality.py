"""Tables of how good generated clips are, and of what decides it."""

from statistics import mean

from cells import Format, Results, between, decimals, difference, label, percent, point, read_result, value
from steps import NAMES, points

from latent_shift.evaluation.measures import HIGHER, LOWER, MEASURES, REAL
from latent_shift.evaluation.sensitivity import trend
from latent_shift.evaluation.tables import Spread
from latent_shift.files import markdown_table


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


EMOJI = {"emoji": "emoji", "emoji@20": "emoji@20", "former": "former weights"}
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
        [
            label(measure),
            *(value(results.cells[name][measure], form) if measure in results.cells[name] else "" for name in EMOJI),
            results.real(measure, form) or ideal,
        ]
        for measure, (form, ideal) in formats.items()
    ]  # fmt: skip
    return results.caption() + markdown_table(
        ["measure, 100 clips of 16 frames", *EMOJI.values(), "real clips"], rows
    )


def steps() -> str:
    """Tabulate `recipes/emoji/measure.py steps`: quality and time by the number of sampling steps."""
    formats: dict[str, Format] = {
        "retrieval_top1": percent, "motion_error": decimals(2), "warping_error": decimals(2), "persistence": decimals(2),
        "kd-efficientnet-lite0": decimals(3), "kd-efficientnet-lite0-motion": decimals(3),
    }  # fmt: skip
    rows = [
        [
            NAMES[measured.model], str(measured.num_steps),
            *(value(measured.cells[measure], form) for measure, form in formats.items()),
            *(f"{measured.seconds[engine]:.2g} s" for engine in ("torch", "openvino")),
        ]
        for measured in points()
    ]  # fmt: skip
    results = Results("emoji")
    rows.append(
        ["real clips", "", *(results.real(measure, form) for measure, form in formats.items()), "", ""]
    )
    head = ["100 clips of 16 frames", "steps", *map(label, formats), "a clip, PyTorch", "OpenVINO"]
    return results.caption() + markdown_table(head, rows)


def words() -> str:
    """Tabulate which words of held-out combinations are obeyed."""
    results = Results("emoji-words")
    cells = Results("emoji-words-teacher").cells | results.cells
    rows = []
    for kind in ("motion", "colour", "background", "number", "thing", "company"):
        measure = f"adherence_{kind}"
        chance = cells["emoji@20"].get(f"{measure}_chance")
        rows.append([
            label(measure),
            *(value(cells[name][measure], percent) for name in EMOJI),
            "" if chance is None else point(chance, percent),
            results.real(measure, percent, with_interval=False),
        ])  # fmt: skip
    head = ["measure, 400 clips of 16 frames", *EMOJI.values(), "by chance", "real clips"]
    return results.caption() + markdown_table(head, rows)


def motion_words() -> str:
    """Tabulate `recipes/emoji/motion.py`: by how much another caption raises the error of what changes, by timestep."""
    results = read_result("motion-words")
    timesteps = next(iter(results.values()))["timesteps"]
    rows = []
    for name, row in results.items():
        effects = [f"{at['other_caption_percent']:.1f}" for at in row["timesteps"].values()]
        rows.append(
            [name, f"`{row['settings']}`", *effects, percent(row["obeyed"]) if "obeyed" in row else ""]
        )
    head = [
        "variant",
        "settings",
        *(f"t = {timestep}" for timestep in timesteps),
        "clips that show the motion",
    ]
    return markdown_table(head, rows)


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


TABLES = (
    summary,
    emoji,
    steps,
    words,
    motion_words,
    shift_and_attention,
    parts,
    two_runs,
    systems,
    measures,
    sensitivity,
)
