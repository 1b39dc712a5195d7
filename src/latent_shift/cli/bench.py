"""`latent-shift bench`: what the shift costs, against other systems' U-Nets, and what memory it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from latent_shift.files import markdown_table, write_json
from latent_shift.runtime import quiet_libraries

app = typer.Typer(
    rich_markup_mode=None, help="Time one denoising step with the shift against the same U-Net frame by frame, in turn; or compare more."
)

Frames = Annotated[int, typer.Option(min=1, help="frames a clip")]
Rounds = Annotated[int, typer.Option(min=1, help="counted rounds; of commands 3 at most")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="take this model's U-Net instead of the 34 M one")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="also write the numbers to this .json")]


@app.callback(invoke_without_command=True)
def shift(
    context: typer.Context,
    frames: Frames = 16,
    size: Annotated[int | None, typer.Option(min=1, help="side of the latents; default: the model's, else 32")] = None,
    rounds: Rounds = 10,
    model: Model = None,
    device: Device = "cpu",
    commands: Annotated[bool, typer.Option("--commands", help="also time whole commands, loading included")] = False,
    output: Output = None,
) -> None:
    if command := context.invoked_subcommand:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        if given:
            raise ValueError(f"bench {command}: its options come after it, not before it: --{', --'.join(given)}")
        return
    quiet_libraries()
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.step import shift_overhead
    from latent_shift.benchmark.timing import command_seconds
    from latent_shift.pipelines import loading
    from latent_shift.runtime import device_of

    own = {}
    if model:
        pipe = loading.load(model, device=device)
        own = {"unet": pipe.unet, "text_length": pipe.tokenizer.model_max_length}
    device = str(device_of(device))
    result = machine(device) | {"model": model}
    result |= shift_overhead(num_frames=frames, size=size, rounds=rounds, device=device, **own)
    if commands:
        result["commands, seconds"] = command_seconds(model or "emoji", rounds=min(rounds, 3), device=device)
    _show(result, output)


@app.command()
def peers(frames: Frames = 16, rounds: Rounds = 5, device: Device = "cpu", output: Output = None) -> None:
    """Time the step against AnimateDiff's and ModelScope's U-Nets of the same widths, in four ways of running them."""
    quiet_libraries()
    import torch

    from latent_shift.benchmark import step
    from latent_shift.benchmark.hardware import machine
    from latent_shift.runtime import device_of

    variants: dict[str, dict] = {
        "float32": {}, "float32, channels last": {"channels_last": True},
        "bfloat16": {"dtype": torch.bfloat16}, "float32, compiled": {"compiled": True},
    }  # fmt: skip
    device = str(device_of(device))
    result = machine(device)
    for name, options in variants.items():
        result[name] = step.against_peers(num_frames=frames, rounds=rounds, device=device, **options)
    result["guided step"] = step.savings(num_frames=frames, rounds=rounds, device=device)
    _show(result, output)


@app.command()
def sweep(
    frames: Annotated[list[int] | None, typer.Option(min=1, help="frames a clip; may be repeated; default 1, 2, 4, ... 256")] = None,
    sides: Annotated[list[int] | None, typer.Option(min=1, help="of the latents; may be repeated; default 8, 16, 32, 64")] = None,
    clips: Annotated[list[int] | None, typer.Option(min=1, help="at once; may be repeated; default 1, 2, 4")] = None,
    rounds: Rounds = 3,
    device: Device = "cpu",
    half: Annotated[bool, typer.Option("--half", help="bfloat16 instead of float32")] = False,
    full: Annotated[bool, typer.Option("--full", help="U-Nets as wide as Stable Diffusion 1.5's, for a GPU")] = False,
    side: Annotated[int, typer.Option(min=1, help="of the latents where frames and clips grow")] = 16,
    model: Annotated[str, typer.Option("--model", "-m", help="of the whole clips")] = "emoji",
    plots: Annotated[Path | None, typer.Option(help="also draw plots (.svg) in this folder")] = None,
    output: Output = None,
) -> None:
    """Time a step of ours and of the others against frames, size and batch, beside what the machine can do at most."""
    quiet_libraries()
    import torch

    from latent_shift.benchmark import sweep
    from latent_shift.benchmark.hardware import machine
    from latent_shift.report.plots import save as save_plots
    from latent_shift.runtime import device_of

    device, numbers, dtype = str(device_of(device)), frames or list(sweep.FRAMES), torch.bfloat16 if half else torch.float32
    found = sweep.sweep(
        num_frames=numbers,
        sides=sides or (8, 16, 32, 64),
        clips=clips or (1, 2, 4),
        side=side,
        full=full,
        rounds=rounds,
        device=device,
        dtype=dtype,
    )
    result = machine(device) | found
    if device == "cpu":
        result["memory"] = sweep.memory_of_steps(numbers, side=side, full=full, dtype=dtype)
    result["whole clips"] = clips_of_model = sweep.whole_clips(model, device=device, dtype=dtype, rounds=rounds)
    print(sweep.table(found["points"]), sweep.table_of_clips(clips_of_model), sep="\n\n")
    if output:
        write_json(result, output)
    if plots:
        save_plots(result, plots)


@app.command()
def memory(
    model: Annotated[str, typer.Option("--model", "-m", help="of the long clips: a name, a folder or a .safetensors file")] = "emoji",
    output: Output = None,
) -> None:
    """Measure on the CPU what long clips, a step of SD 1.5's size and its training take."""
    quiet_libraries()
    from latent_shift.benchmark import memory
    from latent_shift.benchmark.hardware import machine

    _show(
        machine()
        | {
            "training SD 1.5, 16 frames of 512x512, GiB": memory.training_memory(),
            "one step of SD 1.5": memory.full_size_step(),
            "model of the long clips": model,
            "long clips": memory.long_clips(model),
        },
        output,
    )


def _show(result: dict, output: Path | None) -> None:
    if output:
        write_json(result, output)
    print(json.dumps(result, indent=1))


@app.command()
def training(
    model: Annotated[str, typer.Option("--model", "-m")] = "emoji", rounds: Rounds = 10, device: Device = "cpu", output: Output = None
) -> None:
    """Time a training step on clips against one on as many images, and going on with a run that was ended."""
    quiet_libraries()
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.training import resuming, training_step

    steps, resume = training_step(model, rounds=rounds, device=device), resuming()
    _show(machine(device) | {"model": model, "step": steps, "resume": resume}, output)


@app.command("encode")
def encoding(
    workers: Annotated[list[int] | None, typer.Option(min=1, help="processes; may be repeated; default 1 and 2")] = None,
    shards: Annotated[int, typer.Option(min=1, help="of 128 frames")] = 40,
    size: Annotated[int, typer.Option(min=8, help="side of the frames in pixels")] = 128,
    model: Annotated[str, typer.Option("--model", "-m", help="whose autoencoder")] = "emoji",
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster whose workers are timed: local, auto, host:port")] = None,
    output: Output = None,
) -> None:
    """Time the encoding of frames by one process and by several."""
    quiet_libraries()
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.throughput import encoding

    rows = encoding(model, workers=tuple(workers or [1, 2]), shards=shards, size=size, ray=ray)
    _show(machine() | {"model": model, "size": size, "encoding": rows}, output)


@app.command()
def index(clips: Annotated[int, typer.Option(min=1, help="records")] = 100_000, output: Output = None) -> None:
    """Time what an index of many clips costs, and drawing from it."""
    quiet_libraries()
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.throughput import index

    _show(machine() | {"index": index(clips)}, output)


@app.command()
def runs(folders: Annotated[list[Path], typer.Argument(help="run folders")], output: Output = None) -> None:
    """What training runs learnt and took, side by side: losses, clips a second, memory, parameters."""
    quiet_libraries()
    from latent_shift.benchmark.training import runs

    rows = runs(folders)
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else "" if value is None else f"{value}"  # noqa: E731
    print(markdown_table(list(rows[0]), (map(shown, row.values()) for row in rows)))
    if output:
        write_json(rows, output)


@app.command()
def measures(
    data: Annotated[Path, typer.Argument(help="a packed data set")],
    num: Annotated[int, typer.Option(min=6, help="clips, one half compared with, one spoilt")] = 80,
    num_frames: Annotated[int, typer.Option(min=4)] = 16,
    weights: Annotated[
        list[str] | None, typer.Option(help="KIND=PATH of a network whose distances are asked, too: i3d, inception or videomae; repeated")
    ] = None,
    output: Output = None,
) -> None:
    """Spoil real clips more and more, and see which measures tell."""
    quiet_libraries()
    import numpy as np

    from latent_shift.benchmark.hardware import machine
    from latent_shift.evaluation import features, measures, protocols
    from latent_shift.evaluation.sensitivity import sensitivity, table

    networks = features.Weights.parse(weights or [])
    measures.check_weights(networks, measures.DISTANCES)
    distances = measures.open_distances(networks)
    task = protocols.open_protocol("own", data, num=num, num_frames=num_frames)
    results = sensitivity(np.stack([task.real(k) for k in range(num)]), distances)
    print(table(results))
    if output:
        extractors = {extractor.name: extractor.record() for _, extractor in distances}
        settings = {"data": task.reference, "num_frames": num_frames, "extractors": list(extractors.values())}
        write_json(machine() | settings | {"measures": results}, output)
