"""`latent-shift eval`, `report` and `sheet`: systems measured, shown on a page, and sampled on a contact
sheet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latent_shift.cli import outputs
from latent_shift.cli.generate import Prediction, Variant
from latent_shift.cli.terminal import Progress
from latent_shift.files import write_json
from latent_shift.runtime import keep_freed_memory, quiet_libraries, skip_packages

if TYPE_CHECKING:
    import torch

    from latent_shift.evaluation.features import Weights
    from latent_shift.evaluation.protocols import Protocol
    from latent_shift.evaluation.systems import System
    from latent_shift.pipelines.request import Clip


Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]

_DATA = "the real clips of the protocol: a packed data set, a folder of UCF-101 or MSR-VTT"
_MODEL = "[NAME=]MODEL: a name, a folder or file of ours, of AnimateDiff, ModelScope, ...; may be repeated"
_NUM = "number of clips, the protocol's first; default: all (own: at most 100)"
_NUM_FRAMES = "own, classes: frames of a clip; default: the first model's"
_SPLIT = "own: split of the captions; may be repeated; default: train"
_SIZE = "height and width in pixels of generated clips; default: each system's"
_DTYPE = "float32, float16, bfloat16, or auto: bfloat16 where the device computes in it; default: on a GPU what each was published in"
_WEIGHTS = (
    "KIND=PATH of a network to measure with: i3d, c3d, inception (TorchScript files, which need --trust-weights), "
    "videomae or clip (folders); may be repeated"
)
_TRUST = (
    "open TorchScript files and pickles of --weights: they can run programs and write files, so only those whose maker "
    "you trust"
)
_COMPILE = "compile the networks: minutes at first, then faster clips"
_NOISE = (
    "shared noise and noise correlation of the denoising measures; default: those of the first model of ours"
)
_OUT = "folder of clips and features; an interrupted evaluation continues; default: evals/ and the protocol"
_OUTPUT = "also write the records to this .json"
_SEEDS = (
    "SYSTEM=OTHER,...: systems that differ from SYSTEM in the training seed alone share its column; may be repeated; "
    "default: by their names SYSTEM-seed-N"
)


def evaluate(
    data: Annotated[Path, typer.Argument(help=_DATA)],
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help=_MODEL)] = None,
    protocol: Annotated[
        str, typer.Option(help="own, emoji, words, classes, ucf101, msrvtt-mav or msrvtt-lavie")
    ] = "own",
    num: Annotated[int | None, typer.Option(min=1, help=_NUM)] = None,
    num_frames: Annotated[int | None, typer.Option(min=2, help=_NUM_FRAMES)] = None,
    split: Annotated[list[str] | None, typer.Option(help=_SPLIT)] = None,
    size: Annotated[int | None, typer.Option(min=8, help=_SIZE)] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    dtype: Annotated[str | None, typer.Option(help=_DTYPE)] = None,
    weights: Annotated[list[str] | None, typer.Option(help=_WEIGHTS)] = None,
    trust_weights: Annotated[bool, typer.Option("--trust-weights", help=_TRUST)] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="clips in a batch")] = 5,
    device: Device = None,
    compile: Annotated[bool, typer.Option("--compile", help=_COMPILE)] = False,
    noise: Annotated[tuple[float, float] | None, typer.Option(help=_NOISE)] = None,
    out: Annotated[Path | None, typer.Option(help=_OUT)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=_OUTPUT)] = None,
    force: outputs.Force = False,
) -> None:
    """Measure systems against real clips, each number with its protocol, its weights and its interval."""
    outputs.check_json(output, force=force)
    torch_dtype = _parse_dtype(dtype, device)
    keep_freed_memory()
    quiet_libraries()
    from latent_shift import runtime
    from latent_shift.evaluation import protocols, systems, tables
    from latent_shift.evaluation.features import Weights

    models = _parse_models(model or ["emoji"])
    if protocol in ("own", "classes") and num_frames is None:
        num_frames = systems.default_num_frames(models[0][1])
    splits = tuple(split) if split else None
    task = protocols.open_protocol(protocol, data, num=num, num_frames=num_frames, splits=splits)
    networks = Weights.parse(weights or [], device=str(runtime.resolve_device(device)), trust=trust_weights)
    open_system = functools.partial(
        systems.open_system,
        num_frames=task.num_frames,
        fps=task.required_fps,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        device=device,
        dtype=torch_dtype,
        compile=compile,
    )
    folder = out or Path("evals") / protocol
    results = _evaluate_systems(
        models, open_system, task, folder, networks=networks, noise=noise, batch_size=batch_size, force=force
    )
    if runtime.rank() > 0:
        return
    print(tables.markdown(results))
    for measure, reason in tables.skipped_measures(results):
        print(f"no {measure}: {reason}")
    if output:
        write_json(results, output)


def _parse_dtype(name: str | None, device: str | None) -> torch.dtype | None:
    """Return the dtype of `--dtype` on a device."""
    if name not in (None, "auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype: expected float32, float16, bfloat16 or auto, got {name!r}")
    if name is None:
        return None
    import torch

    from latent_shift import runtime

    resolved = runtime.resolve_device(device)
    if name == "auto":
        return runtime.dtype_of(runtime.resolve_precision("auto", resolved))
    if name == "bfloat16":
        runtime.warn_of_slow_bf16(resolved, "--dtype auto or float32")
    return getattr(torch, name)


def _parse_models(values: list[str]) -> list[tuple[str, str]]:
    """Return names and models of `--model [NAME=]MODEL`; an existing path may contain the sign itself.

    Raises:
        ValueError: two systems whose names give one folder.
    """
    from latent_shift.evaluation.evaluate import folder_name

    models = []
    for value in values:
        name, separator, path = value.partition("=")
        models.append((value, value) if Path(value).exists() or not separator else (name or path, path))
    if len({folder_name(name) for name, _ in models}) < len(models):
        names = ", ".join(name for name, _ in models)
        raise ValueError(
            f"--model: two systems have one folder: expected NAME=MODEL with different names, got {names}"
        )
    return models


def _evaluate_systems(
    models: list[tuple[str, str]],
    open_system: Callable[..., System],
    task: Protocol,
    folder: Path,
    *,
    networks: Weights,
    noise: tuple[float, float] | None,
    batch_size: int,
    force: bool,
) -> list[dict]:
    """Measure one system after the other and compare them; all processes generate, the first one measures."""
    import gc

    import torch

    from latent_shift import runtime
    from latent_shift.evaluation import evaluate, measures

    if noise is not None and "denoising" not in task.measures:
        raise ValueError(f"--noise: protocol {task.name} has no denoising measures; expected own or emoji")
    is_main = runtime.rank() == 0
    if is_main:
        measures.check_weights(networks, task.measures)
        evaluate.check_folder(folder, force=force)
    results = []
    for name, path in models:
        system = open_system(path, name=name)
        if noise is None and "shared_noise" in system.settings:
            noise = (system.settings["shared_noise"], system.settings["noise_correlation"])
        with Progress(f"{system.name}: clips") as progress:
            result = evaluate.evaluate(
                system, task, folder, weights=networks, noise=noise, batch_size=batch_size, progress=progress, force=force
            )  # fmt: skip
        results.append(result)
        del system  # a GPU may not hold two of them
        gc.collect()
        torch.cuda.empty_cache()
    return evaluate.add_paired_differences(results, folder) if is_main else results


def report(
    out: Annotated[Path, typer.Argument(help="folder of the page")],
    evaluation: Annotated[
        Path, typer.Argument(help="folder of an evaluation (`eval --out`), its systems in columns")
    ],
    show: Annotated[
        list[str] | None, typer.Option(help="its systems from left to right; may be repeated; default: all")
    ] = None,
    ablation: Annotated[
        list[Path] | None, typer.Option(help="an evaluation, as a table of all its systems; may be repeated")
    ] = None,
    training: Annotated[Path | None, typer.Option(help="a .json of `bench runs -o`, as a table")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="an evaluation with protocol classes, as rows of clips")
    ] = None,
    sweep: Annotated[
        list[Path] | None, typer.Option(help="a .json of `bench sweep -o`, as plots; may be repeated")
    ] = None,
    seeds: Annotated[list[str] | None, typer.Option(help=_SEEDS)] = None,
    rows: Annotated[int, typer.Option(min=1, help="prompts shown")] = 8,
    title: Annotated[str, typer.Option(help="title of the page")] = "Latent-Shift beside others",
    note: Annotated[
        str, typer.Option(help="introduction of the page: what readers must know about these systems")
    ] = "",
    force: outputs.Force = False,
) -> None:
    """Write evaluations as a web page: clips side by side, numbers, plots. It opens from disk."""
    quiet_libraries()
    from latent_shift.evaluation.tables import parse_seeds
    from latent_shift.report import page

    path = page.report(
        out,
        evaluation,
        show=show or [],
        ablations=ablation or [],
        training=training,
        classes=classes,
        sweeps=sweep or [],
        seeds=parse_seeds(seeds) if seeds else None,
        rows=rows,
        title=title,
        note=note,
        force=force,
    )
    print(path)


def sheet(
    context: typer.Context,
    prompts: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="a text file with a prompt per line; # starts a comment"
        ),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUTPUTS...",
            help="a .png: a row of frames per prompt; a .gif, .webp, .mp4 or .webm: all clips side by side",
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="a name or a diffusers folder")] = "emoji",
    seed: Annotated[int, typer.Option(help="seed of every clip")] = 0,
    columns: Annotated[
        int, typer.Option(min=1, help="frames of each clip in a .png, clips per row otherwise")
    ] = 8,
    steps: Steps = None,
    guidance: Guidance = None,
    prediction: Prediction = None,
    variant: Variant = None,
    device: Device = None,
    force: outputs.Force = False,
) -> None:
    """Generate a contact sheet: a clip for each prompt of a list, with one seed, without selection."""
    from latent_shift import video
    from latent_shift.pipelines import catalog

    replaced = outputs.check_outputs(
        files, suffixes=video.OUTPUT_SUFFIXES, inputs=[prompts, Path(model)], force=force
    )
    lines = outputs.read_prompts(prompts)
    catalog.check_model(model, variant=variant, prediction=prediction)
    skip_packages(catalog.unused_packages(model))
    keep_freed_memory()
    quiet_libraries()
    from latent_shift.pipelines import provenance
    from latent_shift.pipelines.loading import load
    from latent_shift.pipelines.request import Request, generate_clip

    pipe = load(model, device=device, variant=variant, prediction=prediction)
    hashes = provenance.hash_inputs(model, [prompts])
    pipe.set_progress_bar_config(disable=True)
    clips: list[Clip] = []
    with Progress("clips") as progress:
        for line in lines:
            request = Request(prompt=line, seed=seed, num_inference_steps=steps, guidance_scale=guidance)
            clips.append(generate_clip(request, pipe))
            progress(len(clips), len(lines))
    command = outputs.repeat_command(context, files=None, force=None)
    settings = {**clips[0].settings, "prompt": lines}
    metadata = provenance.describe(settings, model=model, hashes=hashes, command=command)
    frames = [clip.frames for clip in clips]
    for path in files:
        if path.suffix.lower() == ".png":
            picture = video.captioned_rows(frames, lines, columns=columns)[None]
        else:
            picture = video.side_by_side(frames, columns=columns)
        outputs.write_all(picture, [path], fps=clips[0].fps, metadata=metadata, replaced=replaced)
