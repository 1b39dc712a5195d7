"""`latent-shift bench`: what the shift costs, against other systems' U-Nets, and what memory it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from latent_shift.terminal import markdown, quiet, save_json

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
    quiet()
    from latent_shift import benchmark, zoo

    own = {}
    if model:
        pipe = zoo.load(model, device=device)
        own = {"unet": pipe.unet, "text_length": pipe.tokenizer.model_max_length}
    device = str(zoo.device_of(device))
    result = benchmark.machine(device) | {"model": model}
    result |= benchmark.shift_overhead(num_frames=frames, size=size, rounds=rounds, device=device, **own)
    if commands:
        result["commands, seconds"] = benchmark.command_seconds(model or "emoji", rounds=min(rounds, 3), device=device)
    _show(result, output)


@app.command()
def peers(frames: Frames = 16, rounds: Rounds = 5, device: Device = "cpu", output: Output = None) -> None:
    """Time the step against AnimateDiff's and ModelScope's U-Nets of the same widths, in four ways of running them."""
    quiet()
    import torch

    from latent_shift import benchmark, zoo

    variants: dict[str, dict] = {
        "float32": {}, "float32, channels last": {"channels_last": True},
        "bfloat16": {"dtype": torch.bfloat16}, "float32, compiled": {"compiled": True},
    }  # fmt: skip
    device = str(zoo.device_of(device))
    result = benchmark.machine(device)
    for name, options in variants.items():
        result[name] = benchmark.against_peers(num_frames=frames, rounds=rounds, device=device, **options)
    result["guided step"] = benchmark.savings(num_frames=frames, rounds=rounds, device=device)
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
    quiet()
    import torch

    from latent_shift import benchmark, zoo
    from latent_shift import plots as plotting
    from latent_shift import sweep as sweeping

    device, numbers, dtype = str(zoo.device_of(device)), frames or list(sweeping.FRAMES), torch.bfloat16 if half else torch.float32
    found = sweeping.sweep(
        num_frames=numbers,
        sides=sides or (8, 16, 32, 64),
        clips=clips or (1, 2, 4),
        side=side,
        full=full,
        rounds=rounds,
        device=device,
        dtype=dtype,
    )
    result = benchmark.machine(device) | found
    if device == "cpu":
        result["memory"] = sweeping.memory_of_steps(numbers, side=side, full=full, dtype=dtype)
    result["whole clips"] = clips_of_model = sweeping.whole_clips(model, device=device, dtype=dtype, rounds=rounds)
    print(sweeping.table(found["points"]), sweeping.table_of_clips(clips_of_model), sep="\n\n")
    if output:
        save_json(result, output)
    if plots:
        plotting.save(result, plots)


@app.command()
def memory(
    model: Annotated[str, typer.Option("--model", "-m", help="of the long clips: a name, a folder or a .safetensors file")] = "emoji",
    output: Output = None,
) -> None:
    """Measure on the CPU what long clips, a step of SD 1.5's size and its training take."""
    quiet()
    from latent_shift import benchmark

    _show(
        benchmark.machine()
        | {
            "training SD 1.5, 16 frames of 512x512, GiB": benchmark.training_memory(),
            "one step of SD 1.5": benchmark.full_size(),
            "model of the long clips": model,
            "long clips": benchmark.long_clips(model),
        },
        output,
    )


def _show(result: dict, output: Path | None) -> None:
    if output:
        save_json(result, output)
    print(json.dumps(result, indent=1))


@app.command()
def training(
    model: Annotated[str, typer.Option("--model", "-m")] = "emoji", rounds: Rounds = 10, device: Device = "cpu", output: Output = None
) -> None:
    """Time a training step on clips against one on as many images, and going on with a run that was ended."""
    quiet()
    from latent_shift import benchmark
    from latent_shift import scale as scaling

    steps, resume = benchmark.training_step(model, rounds=rounds, device=device), scaling.resuming()
    _show(benchmark.machine(device) | {"model": model, "step": steps, "resume": resume}, output)


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
    quiet()
    from latent_shift import benchmark
    from latent_shift import scale as scaling

    rows = scaling.encoding(model, workers=tuple(workers or [1, 2]), shards=shards, size=size, ray=ray)
    _show(benchmark.machine() | {"model": model, "size": size, "encoding": rows}, output)


@app.command()
def index(clips: Annotated[int, typer.Option(min=1, help="records")] = 100_000, output: Output = None) -> None:
    """Time what an index of many clips costs, and drawing from it."""
    quiet()
    from latent_shift import benchmark
    from latent_shift import scale as scaling

    _show(benchmark.machine() | {"index": scaling.index(clips)}, output)


@app.command()
def runs(folders: Annotated[list[Path], typer.Argument(help="run folders")], output: Output = None) -> None:
    """What training runs learnt and took, side by side: losses, clips a second, memory, parameters."""
    quiet()
    from latent_shift import benchmark

    rows = benchmark.runs(folders)
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else "" if value is None else f"{value}"  # noqa: E731
    print(markdown(list(rows[0]), (map(shown, row.values()) for row in rows)))
    if output:
        save_json(rows, output)


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
    quiet()
    import numpy as np

    from latent_shift import benchmark, measuring, protocols, verification

    networks = measuring.Weights.told(weights or [])
    networks.check([name for name, (*_, estimate) in measuring.OF_FEATURES.items() if estimate is measuring.kernel_estimate])
    extractors = networks.of_distances()
    task = protocols.open_protocol("own", data, num=num, num_frames=num_frames)
    results = verification.verify(np.stack([task.real(k) for k in range(num)]), extractors)
    print(verification.table(results))
    if output:
        told = {"data": task.reference, "num_frames": num_frames, "extractors": [each.record() for each in extractors]}
        save_json(benchmark.machine() | told | {"measures": results}, output)
