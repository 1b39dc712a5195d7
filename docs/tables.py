"""The tables of results in README and evaluation.md, written anew from the JSON of docs/results: `make tables` (a test compares them)."""

import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from latent_shift.files import markdown_table
from latent_shift.runtime import quiet_libraries

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]


def result(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def systems_of(name: str) -> dict[str, dict[str, Record]]:
    """System -> measure -> record, of what `eval` wrote."""
    return {found["system"]["system"]: {record["measure"]: record for record in found["records"]} for found in result(name)}


def decimals(places: int, *, signed: bool = False) -> Callable[[float], str]:
    return lambda value: f"{value:{'+' if signed else ''}.{places}f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


def interval(record: Record, shown: Callable[[float], str]) -> str:
    return f"{shown(record['value'])} ({shown(record['low'])} to {shown(record['high'])})"


def more(record: Record, places: int, *, of: bool) -> str:
    """What is more than the first system's, of its interval too if asked; bold where that holds no zero."""
    there, shown = record["more"], decimals(places, signed=True)
    text = interval(there, shown) if of else shown(there["value"])
    return f"**{text}**" if there["low"] > 0 or there["high"] < 0 else text


CLIP = {  # of the clips alone, so of real ones too
    "motion_energy": "motion energy, grey levels",
    "flicker": "flicker, grey levels",
    "persistence": "persistence",
    "coherence": "coherence",
    "warping_error": "warping error, grey levels",
    "loop_gap": "loop gap, steps",
}
LABELS = CLIP | {
    "kd-efficientnet-lite0": "kernel distance of frames, EfficientNet-lite0",
    "kd-efficientnet-lite0-motion": "kernel distance of how frames change",
    "motion_error": "motion error, factor",
    "denoising_error": "denoising error of real clips",
    "denoising_error_of_end_frames": "of their first and last frames",
    "motion_seen_at_375": "their motion, seen through the noise of timestep 375",
    "retrieval_top5": "right caption in the first five of 60",
}


def emoji() -> str:
    """`make table`."""
    (records,) = systems_of("emoji").values()
    one = lambda name, places: [LABELS[name], interval(records[name], decimals(places)), ""]  # noqa: E731
    rows = [one("kd-efficientnet-lite0", 3), one("kd-efficientnet-lite0-motion", 3)]
    rows += [
        ["right caption first of 100", interval(records["retrieval_top1"], percent), "100%"],
        ["right caption in the first five", interval(records["retrieval_top5"], percent), "100%"],
        [*one("motion_error", 2)[:2], "1"],
    ]
    for name, label in CLIP.items():
        shown = decimals(3 if name == "coherence" else 2)
        rows.append([label, *(interval(records[name + of], shown) for of in ("", "_real"))])
    rows += [one("denoising_error", 4), one("denoising_error_of_end_frames", 4)]
    for timestep in (125, 375, 625, 875):
        seen = [records[f"motion_seen_at_{timestep}{how}"] for how in ("", "_frame_by_frame")]
        label = f"their motion, seen through the noise of timestep {timestep}; of each frame alone"
        rows.append([label, "; ".join(interval(record, percent) for record in seen), "100%"])
    rows.append(["reconstruction PSNR, dB", interval(records["reconstruction_psnr_db"], decimals(1)), ""])
    return markdown_table(["measure", "emoji", "real clips"], rows)


def loss_of(names: Iterable[str], of: str = "compare") -> list[str]:
    """On held-out clips, of runs of `make compare`."""
    runs = {Path(run["run"]).name: run for run in result(f"{of}-training")}
    return [f"{runs[name]['val_loss']:.4f}" for name in names]


def compared() -> str:
    """`make compare`: the shift, attention and neither."""
    names, systems = ("shift", "hold", "attention", "none"), systems_of("compare")
    sizes = {found["system"]["system"]: found["system"]["parameters"] for found in result("compare")}
    rows = [
        ["loss on held-out clips", *loss_of(names), ""],
        ["parameters", *(f"{sizes[name] / 1e6:.2f} M" for name in names), ""],
    ]
    for measure, places in {
        "denoising_error": 3, "denoising_error_of_end_frames": 3, "motion_seen_at_375": 3, "motion_error": 3, "flicker": 2, "warping_error": 2,
        "persistence": 3, "coherence": 3, "loop_gap": 3, "retrieval_top5": 3,
    }.items():  # fmt: skip
        first, *others = (systems[name][measure] for name in names)
        real = systems["shift"].get(f"{measure}_real")
        beside = [f"{record['value']:.{places}f}; {more(record, places, of=True)}" for record in others]
        rows.append([LABELS[measure], interval(first, decimals(places)), *beside, f"{real['value']:.{places}f}" if real else ""])
    return markdown_table(["measure", "shift", "shift, ends held", "attention", "no shift", "real clips"], rows)


PARTS = {
    "shift": "the paper's shift: 1/3 + 1/3, conv1, zeros; one step in five on stills",
    "seed-1": "the same, other random numbers",
    "quarter": "1/4 + 1/4 of the channels",
    "eighth": "1/8 + 1/8 (TSM's)",
    "conv2": "before the second convolution",
    "end": "at the branch's end",
    "hold": "ends hold their own values",
    "wrap": "ends wrap round",
    "no-stills": "no stills",
    "half-stills": "half of the steps on stills",
    "none": "no shift",
    "attention": "Latent-VDM: attention and convolution in time, 6.8 M",
}


COLUMNS = {
    "denoising error": ("denoising_error", 3),
    "of end frames": ("denoising_error_of_end_frames", 3),
    "motion seen at 375": ("motion_seen_at_375", 3),
    "motion error": ("motion_error", 3),
    "flicker": ("flicker", 2),
    "warping error": ("warping_error", 2),
    "loop gap": ("loop_gap", 3),
    "right caption in five": ("retrieval_top5", 3),
}


def measured(name: str, models: Collection[str]) -> list[list[str]]:
    """Of each model the loss and the measures: of the first the values, of the others what is more than the first's."""
    systems, rows = systems_of(name), list[list[str]]()
    for loss, model in zip(loss_of(models, name), models, strict=True):
        found = [(systems[model][measure], places) for measure, places in COLUMNS.values()]
        rows.append([loss, *(more(record, places, of=False) if rows else f"{record['value']:.{places}f}" for record, places in found)])
    return rows


HEADS = ["loss on held-out clips", *COLUMNS]


def parts() -> str:
    """`make compare`: every part of the shift."""
    rows = [[label, *cells] for label, cells in zip(PARTS.values(), measured("compare", PARTS), strict=True)]
    real = [f"{systems_of('compare')['shift'][f'{name}_real']['value']:.2f}" for name in ("flicker", "warping_error", "loop_gap")]
    return markdown_table(["what is changed", *HEADS], [*rows, ["real clips", "", "", "", "", "1", *real, ""]])


def again() -> str:
    """`make compare`, and an earlier run of its trainings and evaluation on another machine."""
    both = zip(PARTS.values(), measured("compare", PARTS), measured("compare-earlier", PARTS), strict=True)
    rows = [[label, *map("; ".join, zip(*cells, strict=True))] for label, *cells in both]
    return markdown_table(["what is changed, this run; earlier run", *HEADS], rows)


def beside() -> str:
    """`make compare`: the systems."""
    names, systems = ("shift", "attention", "none", "vdm", "emoji"), systems_of("systems")
    sizes = {found["system"]["system"]: found["system"]["parameters"] for found in result("systems")}
    rows = [["parameters", *(f"{sizes[name] / 1e6:.1f} M" for name in names), ""]]
    for measure, places in {
        "kd-efficientnet-lite0": 2, "kd-efficientnet-lite0-motion": 2, "retrieval_top5": 2, "motion_error": 2, "flicker": 1, "warping_error": 1,
        "persistence": 2, "coherence": 3, "loop_gap": 2,
    }.items():  # fmt: skip
        shown = decimals(places)
        real = systems["shift"].get(f"{measure}_real")
        best = "1" if measure in ("retrieval_top5", "motion_error") else ""
        cells = [interval(systems[name][measure], shown) for name in names]
        rows.append([LABELS[measure], *cells, interval(real, shown) if real else best])
    return markdown_table(["measure", "shift", "Latent-VDM", "no shift", "VDM", "`emoji`", "real clips"], rows)


def spoilt() -> str:
    """`latent-shift bench measures`."""
    from latent_shift.evaluation.sensitivity import trend

    ways = result("measures")["measures"]
    measures = [name for name in ways["noise"] if not name.startswith("fd-")]

    def cell(values: list[float]) -> str:
        way = trend(values)
        return f"{way}: {values[0]:.3g}" if way == "stays" else f"{way or 'up and down'}: {values[0]:.3g} → {values[-1]:.3g}"

    return markdown_table(["measure", *ways], ([name, *(cell(ways[way][name]) for way in ways)] for name in measures))


def overhead() -> str:
    """`latent-shift bench`."""
    ways = ("frame by frame", "with the shift", "with the shift, one text a clip as the pipeline has it")
    rows = []
    for name, label in (("bench", "34 M U-Net, 32x32 latents"), ("bench-emoji", "emoji's U-Net, 23 M, 16x16 latents")):
        first, *others = (result(name)[way] for way in ways)
        rows.append([label, f"{first['seconds']:.3g} s", *(f"{found['seconds']:.3g} s ({found['ratio']:.3f})" for found in others)])
    return markdown_table(
        ["a denoising step of 16 frames", "frame by frame", "with the shift", "with the shift, as the pipeline runs it"], rows
    )


def timed(point: Record, unit: str = "s") -> str:
    if "cannot" in point:
        return f"({point['cannot'].removeprefix('at most ').removesuffix(' frames')} at most)"
    return f"{point['seconds']:.3g} s ({point['ratio']:.2f})" if unit == "s" else f"{point['seconds'] * 1000:.0f} ms ({point['ratio']:.2f})"


def swept() -> str:
    """`latent-shift bench sweep` on a CPU."""
    found = result("sweep")
    points = {(at["name"], at["line"], at["frames"], at["side"]): at for at in found["points"] if at["clips"] == 1}
    memory = {(at["name"], at["frames"]): at for at in found["memory"]}
    lines = [("frames", 1, 16), ("frames", 16, 16), ("frames", 64, 16), ("frames", 256, 16), ("side", 16, 32), ("side", 16, 64)]
    rows = []
    for name in dict.fromkeys(at["name"] for at in found["points"]):
        cells = [timed(points[(name, *line)]) for line in lines]
        cells.insert(4, f"{memory[name, 256]['gib_peak']:.2f}" if "gib_peak" in memory[name, 256] else "")
        rows.append([name, f"{points[(name, *lines[0])]['parameters'] / 1e6:.1f} M", *cells])
    heads = [f"{frames} frame{'s' if frames > 1 else ''}, {side}x{side}" for _, frames, side in lines]
    return markdown_table(["a denoising step", "parameters", *heads[:4], "its peak, GiB", *heads[4:]], rows)


def swept_at_full_size() -> str:
    """`latent-shift bench sweep --full` on a GPU."""
    found = result("sweep-h200")
    points = {(at["name"], at["frames"], at["side"], at["clips"]): at for at in reversed(found["points"])}  # of two the first
    shown = {
        "16 frames, 32x32": (16, 32, 1),
        "64 frames, 32x32": (64, 32, 1),
        "4 clips of 16, 32x32": (16, 32, 4),
        "16 frames, 64x64": (16, 64, 1),
    }
    rows = []
    for name in dict.fromkeys(at["name"] for at in found["points"]):
        large = points[name, 16, 64, 1]
        cells = [timed(points[(name, *at)], "ms") for at in shown.values()]
        share = f"{large['share_of_the_matrix_rate'] * 100:.0f} %"
        rows.append([name, f"{large['parameters'] / 1e6:.0f} M", *cells, f"{large['gib_peak']:.1f}", share])
    return markdown_table(["a denoising step", "parameters", *shown, "its peak, GiB", "of the matrix rate"], rows)


def peers() -> str:
    """`latent-shift bench peers`."""
    ways = {way: found for way, found in result("peers").items() if isinstance(found, dict) and "Latent-Shift" in found}
    rows = [
        [
            name,
            f"{first['parameters'] / 1e6:.1f} M",
            *(f"{found[name]['seconds']:.2f} s ({found[name]['ratio']:.2f})" for found in ways.values()),
        ]
        for name, first in next(iter(ways.values())).items()
    ]
    return markdown_table(["a denoising step, 16 frames", "parameters", *ways], rows)


def long_clips() -> str:
    """`latent-shift bench memory`: sampling."""
    found = {(at["mode"], at["frames"]): f"{at['gib_peak']:.2f}" for at in result("memory")["long clips"]}
    frames = sorted({at for _, at in found})
    modes = {"whole": "whole", "chunks": "`chunk=16, halo=4`", "stream": "`pipe.stream`, frames decoded"}
    rows = ([label, *(found.get((mode, at), "") for at in frames)] for mode, label in modes.items())
    return markdown_table(["peak memory, GiB", *(f"{at} frames" for at in frames)], rows)


def training_memory() -> str:
    """`latent-shift bench memory`: training SD 1.5."""
    found = result("memory")["training SD 1.5, 16 frames of 512x512, GiB"]
    rows = ([way, *(f"{value:.1f}" for value in counts.values())] for way, counts in found.items())
    return markdown_table(["memory of a training step, GiB", *next(iter(found.values()))], rows)


PAGES = {
    "README.md": (emoji, compared, overhead, swept, peers, swept_at_full_size, long_clips, training_memory),
    "docs/evaluation.md": (spoilt, parts, again, beside),
}


def with_tables(page: str) -> str:
    """The page, each table in it that has the head of one of ours replaced by ours."""
    text = (ROOT / page).read_text()
    for table in PAGES[page]:
        made = table()
        head = made.split("\n", 1)[0]
        text, found = re.subn(rf"^{re.escape(head)}\n(?:\|.*\|$\n?)+", lambda _, made=made: f"{made}\n", text, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"{page} has {found} tables that begin with {head}")
    return text


if __name__ == "__main__":
    quiet_libraries()
    for page in PAGES:
        (ROOT / page).write_text(with_tables(page))
