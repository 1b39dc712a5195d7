"""`latent-shift bench`: time and memory of the shift, of other systems' U-Nets, of training and of
encoding."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from latent_shift.cli import outputs
from latent_shift.files import markdown_table, write_json
from latent_shift.runtime import keep_freed_memory, quiet_libraries

app = typer.Typer(
    rich_markup_mode=None,
    help="Time one denoising step with the shift against the same U-Net without it, in turn; or measure more.",
)

Frames = Annotated[int, typer.Option(min=1, help="frames of a clip")]
Rounds = Annotated[int, typer.Option(min=1, help="rounds after the warm-up")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="take this model's U-Net instead of the 34 M one")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="also write the numbers to this .json")]


@app.callback(invoke_without_command=True)
def shift(
    context: typer.Context,
    frames: Frames = 16,
    size: Annotated[
        int | None, typer.Option(min=1, help="side of the latents; default: the model's, else 32")
    ] = None,
    rounds: Rounds = 10,
    model: Model = None,
    device: Device = "cpu",
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    if command := context.invoked_subcommand:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        options = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        if options:
            raise ValueError(
                f"bench {command}: its options come after it, not before it: --{', --'.join(options)}"
            )
        return
    _prepare_process(output, force=force)
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.step import shift_overhead
    from latent_shift.pipelines import loading
    from latent_shift.runtime import resolve_device

    network = {}
    if model:
        pipe = loading.load(model, device=device)
        network = {"unet": pipe.unet, "text_length": pipe.tokenizer.model_max_length}
    device = str(resolve_device(device))
    result = machine(device) | {"model": model}
    result |= shift_overhead(num_frames=frames, size=size, rounds=rounds, device=device, **network)
    _show(result, output)


@app.command()
def commands(
    model: Annotated[
        str, typer.Option("--model", "-m", help="model of the commands that take one")
    ] = "emoji",
    rounds: Annotated[int, typer.Option(min=1, help="runs of each command")] = 3,
    device: Device = "cpu",
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time whole commands from start to exit: the help page, the list of models, a prompt to an mp4."""
    outputs.check_json(output, force=force)
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.timing import command_seconds

    _show(machine(device) | {"seconds": command_seconds(model, rounds=rounds, device=device)}, output)


@app.command()
def engines(
    model: Annotated[str, typer.Option("--model", "-m", help="a name, folder or file")] = "emoji",
    rounds: Rounds = 5,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="sampling steps; may be repeated, the command takes the first; default: the model's"
        ),
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; default: the model's")] = None,
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time a clip with every engine: a whole command, a clip in a warm process, one call of the U-Net."""
    _prepare_process(output, force=force)
    from latent_shift.benchmark import engines as measured
    from latent_shift.benchmark.hardware import machine

    result = machine() | {
        "instruction_sets": measured.instruction_sets(),
        "model": model,
        "guidance": guidance,
    }
    _show(result | measured.compare(model, rounds=rounds, steps=steps or (), guidance=guidance), output)


@app.command()
def decoders(
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="a store of pixels")],
    model: Annotated[str, typer.Option("--model", "-m", help="a name or folder")] = "emoji",
    tiny: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="an AutoencoderTiny, instead of that in the model's folder"
        ),
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="splits; default: val_animation")] = None,
    num: Annotated[int, typer.Option(min=2, help="frames, each of another record")] = 200,
    rounds: Rounds = 5,
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Compare a model's decoder with a tiny one: PSNR on held-out frames, and the time of a clip."""
    _prepare_process(output, force=force)
    from latent_shift.benchmark.hardware import machine
    from latent_shift.evaluation.decoders import compare_decoders
    from latent_shift.pipelines import catalog

    folder, splits = catalog.folder(model), split or ["val_animation"]
    result = compare_decoders(folder, data, splits=splits, tiny=tiny, num=num, rounds=rounds)
    _show(machine("cpu") | {"model": model, "splits": splits} | result, output)


@app.command()
def gpu(
    small: Annotated[
        bool,
        typer.Option("--small", help="narrow U-Nets instead of Stable Diffusion 1.5's widths, to rehearse"),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="also torch.compile, which takes minutes")
    ] = True,
    rounds: Rounds = 10,
    device: Device = "cuda",
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time a sampling step with CUDA graphs and fused norms beside other systems, and a clip of four steps."""
    _prepare_process(output, force=force)
    import torch

    from latent_shift.benchmark.gpu import LOADS, clip_of_four_steps, compare_steps
    from latent_shift.benchmark.hardware import machine
    from latent_shift.runtime import resolve_device

    where = str(resolve_device(device))
    result = machine(where) | {"full": not small}
    options = {
        "full": not small,
        "rounds": rounds,
        "device": where,
        "dtype": torch.float32 if where == "cpu" else torch.bfloat16,
    }
    loads = [(1, 8)] if small else LOADS
    result["steps"] = compare_steps(loads=loads, compiled=compiled, **options)  # type: ignore[arg-type]
    result["clip of four steps"] = clip_of_four_steps(side=8 if small else 64, **options)  # type: ignore[arg-type]
    _show(result, output)


@app.command()
def serve(
    model: Annotated[str, typer.Option("--model", "-m", help="a name or folder")] = "emoji",
    num: Annotated[int, typer.Option(min=10, help="requests to a server that is killed meanwhile")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="clients that send them at once")] = 50,
    kills: Annotated[int, typer.Option(min=0, help="how often it is killed")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="clips whose time is compared with the pipeline's")] = 20,
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Measure `latent-shift serve`: what a user waits for, what is lost when it is killed, and what more workers give."""
    _prepare_process(output, force=force)
    from latent_shift.benchmark import server
    from latent_shift.benchmark.hardware import machine

    result = machine("cpu") | {"model": model}
    result["seconds"] = server.waiting(model, rounds=rounds)
    result["durability"] = server.durability(model, num=num, clients=clients, kills=kills)
    if find_spec("ray") is not None:
        result["clips a second, Ray workers of one thread"] = server.throughput(model, (1, 2))
    _show(result, output)


@app.command()
def peers(
    frames: Frames = 16,
    rounds: Rounds = 5,
    device: Device = "cpu",
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time the step against U-Nets of AnimateDiff and ModelScope with the same widths, in float32, bfloat16,
    channels last and compiled."""
    _prepare_process(output, force=force)
    import torch

    from latent_shift.benchmark import step
    from latent_shift.benchmark.hardware import machine
    from latent_shift.runtime import resolve_device

    variants: dict[str, dict] = {
        "float32": {}, "float32, channels last": {"channels_last": True},
        "bfloat16": {"dtype": torch.bfloat16}, "float32, compiled": {"compiled": True},
    }  # fmt: skip
    device = str(resolve_device(device))
    result = machine(device)
    for name, options in variants.items():
        result[name] = step.against_peers(num_frames=frames, rounds=rounds, device=device, **options)
    result["guided step"] = step.savings(num_frames=frames, rounds=rounds, device=device)
    _show(result, output)


@app.command()
def sweep(
    frames: Annotated[
        list[int] | None,
        typer.Option(min=1, help="frames of a clip; may be repeated; default: 1, 2, 4, ... 256"),
    ] = None,
    sides: Annotated[
        list[int] | None,
        typer.Option(min=1, help="side of the latents; may be repeated; default: 8, 16, 32, 64"),
    ] = None,
    clips: Annotated[
        list[int] | None, typer.Option(min=1, help="clips in a batch; may be repeated; default: 1, 2, 4")
    ] = None,
    rounds: Rounds = 3,
    device: Device = "cpu",
    half: Annotated[bool, typer.Option("--half", help="bfloat16 instead of float32")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="U-Nets of the widths of Stable Diffusion 1.5, for a GPU")
    ] = False,
    side: Annotated[int, typer.Option(min=1, help="side of the latents where frames and clips vary")] = 16,
    model: Annotated[str, typer.Option("--model", "-m", help="model of the whole clips")] = "emoji",
    plots: Annotated[Path | None, typer.Option(help="also write plots (.svg) to this folder")] = None,
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time a step of each system for several numbers of frames, sizes and batches; also measure the rate of
    the machine at matrix products."""
    _prepare_process(output, force=force)
    if plots:
        _check_plots(plots, force=force)
    import torch

    from latent_shift.benchmark import sweep
    from latent_shift.benchmark.hardware import machine
    from latent_shift.report.plots import save as save_plots
    from latent_shift.runtime import resolve_device, warn_of_slow_bf16

    where = resolve_device(device)
    if half:
        warn_of_slow_bf16(where, "leave out --half")
    device = str(where)
    num_frames = frames or list(sweep.FRAMES)
    dtype = torch.bfloat16 if half else torch.float32
    steps = sweep.sweep(
        num_frames=num_frames,
        sides=sides or (8, 16, 32, 64),
        clips=clips or (1, 2, 4),
        side=side,
        full=full,
        rounds=rounds,
        device=device,
        dtype=dtype,
    )
    result = machine(device) | steps
    if device == "cpu":
        result["memory"] = sweep.memory_of_steps(num_frames, side=side, full=full, dtype=dtype)
    clip_times = sweep.whole_clips(model, device=device, dtype=dtype, rounds=rounds)
    result["whole clips"] = clip_times
    print(sweep.table(steps["points"]), sweep.table_of_clips(clip_times), sep="\n\n")
    if output:
        write_json(result, output)
    if plots:
        save_plots(result, plots)


@app.command()
def memory(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="model of the long clips: a name, a folder or a .safetensors file"
        ),
    ] = "emoji",
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Measure the CPU memory of long clips, and of one sampling and one training step at SD 1.5's size."""
    _prepare_process(output, force=force)
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


def _prepare_process(output: Path | None, *, force: bool) -> None:
    """Check the output, set the allocator as in training and silence the libraries."""
    outputs.check_json(output, force=force)
    keep_freed_memory()
    quiet_libraries()


def _check_plots(folder: Path, *, force: bool) -> None:
    """Check before the measurements that plots can be made and written."""
    if not find_spec("matplotlib"):
        raise ValueError("--plots needs the extra: pip install 'latent-shift-video[report]'")
    outputs.check_writable([folder / "sweep-plot.svg"])
    if (existing := sorted(folder.glob("sweep-*.svg"))) and not force:
        raise ValueError(f"{existing[0]}: exists; choose another folder for --plots, or use --force")


def _show(result: dict, output: Path | None) -> None:
    """Print a result and write it to a file."""
    if output:
        write_json(result, output)
    print(json.dumps(result, indent=1))


@app.command()
def training(
    model: Annotated[str, typer.Option("--model", "-m", help="model that is trained")] = "emoji",
    rounds: Rounds = 10,
    device: Device = "cpu",
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time a training step on clips against one on as many images, and resuming a run."""
    _prepare_process(output, force=force)
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.training import resuming, training_step

    steps, resume = training_step(model, rounds=rounds, device=device), resuming()
    _show(machine(device) | {"model": model, "step": steps, "resume": resume}, output)


@app.command("encode")
def encoding(
    workers: Annotated[
        list[int] | None, typer.Option(min=1, help="processes; may be repeated; default 1 and 2")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="shards of 128 frames")] = 40,
    size: Annotated[int, typer.Option(min=8, help="height and width of the frames in pixels")] = 128,
    model: Annotated[str, typer.Option("--model", "-m", help="model of the autoencoder")] = "emoji",
    ray: Annotated[
        str | None,
        typer.Option(help="address of a Ray cluster whose workers are timed: local, auto, host:port"),
    ] = None,
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time encoding frames with one process and with several."""
    _prepare_process(output, force=force)
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.throughput import encoding

    rows = encoding(model, workers=tuple(workers or [1, 2]), shards=shards, size=size, ray=ray)
    _show(machine() | {"model": model, "size": size, "encoding": rows}, output)


@app.command()
def index(
    clips: Annotated[int, typer.Option(min=1, help="records")] = 100_000,
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Time opening an index of many clips and sampling from it."""
    _prepare_process(output, force=force)
    from latent_shift.benchmark.hardware import machine
    from latent_shift.benchmark.throughput import index

    _show(machine() | {"index": index(clips)}, output)


@app.command()
def runs(
    folders: Annotated[list[Path], typer.Argument(help="run folders")],
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Print losses, clips per second, memory and parameters of training runs, side by side."""
    _prepare_process(output, force=force)
    from latent_shift.benchmark.training import runs

    rows = runs(folders)
    print(markdown_table(list(rows[0]), (map(_cell, row.values()) for row in rows)))
    if output:
        write_json(rows, output)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command()
def measures(
    data: Annotated[Path, typer.Argument(help="a packed data set")],
    num: Annotated[
        int, typer.Option(min=6, help="clips: one half is the reference, the other is degraded")
    ] = 80,
    num_frames: Annotated[int, typer.Option(min=4, help="frames of a clip")] = 16,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND=PATH of a network to measure distances with: i3d, inception or videomae; may be repeated"
        ),
    ] = None,
    trust_weights: Annotated[
        bool,
        typer.Option(
            "--trust-weights",
            help="open TorchScript files and pickles of --weights, which can run programs and write files",
        ),
    ] = False,
    output: Output = None,
    force: outputs.Force = False,
) -> None:
    """Degrade real clips step by step and show which measures respond."""
    _prepare_process(output, force=force)
    import numpy as np

    from latent_shift.benchmark.hardware import machine
    from latent_shift.evaluation import features, measures, protocols
    from latent_shift.evaluation.sensitivity import sensitivity, table

    networks = features.Weights.parse(weights or [], trust=trust_weights)
    measures.check_weights(networks, measures.DISTANCES)
    distances = measures.open_distances(networks)
    task = protocols.open_protocol("own", data, num=num, num_frames=num_frames)
    results = sensitivity(np.stack([task.real(k) for k in range(num)]), distances)
    print(table(results))
    if output:
        extractors = {extractor.name: extractor.record() for _, extractor in distances}
        settings = {"data": task.reference, "num_frames": num_frames, "extractors": list(extractors.values())}
        write_json(machine() | settings | {"measures": results}, output)
