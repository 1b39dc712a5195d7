"""Tables of time and memory."""

from typing import Any

from cells import decimals, read_result
from tables_of_quality import ATTENTION

from latent_shift.files import markdown_table

NETWORKS = {"frame by frame": "no shift", "Latent-VDM": ATTENTION}
"""Names on the pages of networks that `latent-shift bench` names otherwise."""


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


def engines() -> str:
    """Tabulate `latent-shift bench engines`."""
    names = {"torch": "PyTorch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
    engines = read_result("engines")["engines"]
    steps = next(iter(engines.values()))["clips"]
    rows = [
        [
            names[name], {"f32": "float32"}.get(time["precision"], time["precision"]),
            *(f"{seconds:.2g}" for seconds in (time["command"], *time["clips"].values(), time["unet"])), f"{time['peak_gib']:.1f}",
        ]
        for name, time in engines.items()
    ]  # fmt: skip
    clips = [f"clip in {num} step{'s' if num != '1' else ''}, s" for num in steps]
    head = [
        "engine",
        "precision",
        f"command, {next(iter(steps))} steps, s",
        *clips,
        "call of the U-Net, s",
        "peak memory, GiB",
    ]
    return markdown_table(head, rows)


def waiting() -> str:
    """Tabulate what a user waits for: `latent-shift bench engines` and `docs/browser.py`."""
    engines, browser = read_result("engines")["engines"], read_result("browser")
    ways = {"torch": "PyTorch", "openvino": "exported, with OpenVINO"}
    rows = [
        [
            name,
            *(f"{seconds:.2g} s" for seconds in (engines[engine]["command"], *(engines[engine]["clips"][num] for num in ("4", "1")))),
        ]
        for engine, name in ways.items()
    ]  # fmt: skip
    page = browser["all threads"]
    rows.append([
        f"in a browser page ({browser['download_mb']:.0f} MB)",
        f"{page['ready_seconds'] + page['first_clip_seconds']:.2g} s",
        f"{page['clip_seconds']:.2g} s",
        "",
    ])  # fmt: skip
    return markdown_table(["`emoji`", "from a cold start", "next clip, 4 steps", "next clip, 1 step"], rows)


def browser_page() -> str:
    """Tabulate `docs/browser.py`."""
    result = read_result("browser")
    rows = [
        [
            name if name == "one thread" else result[name]["engine"],
            *(f"{result[name][key]:.2g}" for key in ("ready_seconds", "first_clip_seconds", "clip_seconds", "peak_gib")),
        ]
        for name in ("one thread", "all threads")
    ]  # fmt: skip
    head = ["engine", "ready after, s", "first clip, s", "next clips, s", "peak memory, GiB"]
    return markdown_table(head, rows)


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


TABLES = (
    overhead,
    whole_commands,
    sweep_on_cpu,
    sweep_on_gpu,
    peers,
    training_speed,
    engines,
    waiting,
    browser_page,
    long_clips,
    training_memory,
)
