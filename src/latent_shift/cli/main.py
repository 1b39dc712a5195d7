"""The command `latent-shift`: each verb parses its arguments and calls one public function. Torch is imported after parsing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from latent_shift.cli import bench, data
from latent_shift.cli.terminal import Progress
from latent_shift.files import write_json
from latent_shift.runtime import quiet_libraries

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help="Text to video by Latent-Shift."
)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
models_app = typer.Typer(rich_markup_mode=None)
app.add_typer(models_app, name="models")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what to show; (words:1.4) weighs words")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="a name (see `latent-shift models`), a diffusers folder, a .safetensors file")
    ] = "emoji",
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help=".mp4 .webm .gif .webp .png; may be repeated; default: here, named by the words"),
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="frames; 1 makes an image")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="sampling steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1 is off")] = None,
    negative: Annotated[str | None, typer.Option(help="what to guide away from")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="side in pixels")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same clip")] = 0,
    shared_noise: Annotated[
        float | None, typer.Option(min=0, max=1, help="share of the noise that all frames have in common, 0 to 1; the more, the less moves")
    ] = None,
    noise_correlation: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="of the rest of the noise from frame to frame, 0 to below 1; the more, the slower"),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=0.001, help="frames a second of the file")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="the last frame runs on into the first")] = False,
    image: Annotated[Path | None, typer.Option(help="a picture: the first frame")] = None,
    last_image: Annotated[Path | None, typer.Option(help="a picture: the last frame")] = None,
    video: Annotated[Path | None, typer.Option(help="a video to make another of")] = None,
    mask: Annotated[Path | None, typer.Option(help="a picture or video: white is made anew, black stays")] = None,
    strength: Annotated[float | None, typer.Option(min=0, max=1, help="how far the video or picture is left behind, up to 1")] = None,
    then: Annotated[list[str] | None, typer.Option(help="FRAME:WORDS, what to show from there; may be repeated")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="frames at once: long clips at constant memory")] = None,
    halo: Annotated[
        int | None,
        typer.Option(
            min=0, help="neighbouring frames that a chunk sees on either side; default: all that matter, which is exact; fewer are faster"
        ),
    ] = None,
    free_init: Annotated[int | None, typer.Option(min=2, help="times to sample, each from what the one before made (FreeInit)")] = None,
    scheduler: Annotated[str | None, typer.Option(help="of diffusers: DDIM, EulerDiscrete, UniPCMultistep, LCM, ...")] = None,
    lora: Annotated[Path | None, typer.Option(help="a LoRA file")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Make a clip from words, pictures or another clip."""
    quiet_libraries()
    from latent_shift import runtime
    from latent_shift import video as video_files
    from latent_shift.pipelines import loading
    from latent_shift.pipelines.lora import load_lora

    for path in output or []:
        video_files.check_output(path, fps=8 if fps is None else fps)
    if fps is not None and output and all(path.suffix.lower() == ".png" for path in output):
        raise ValueError("--fps has no effect on a .png, which is a strip of frames; expected another output, or no --fps")
    for option, given in (
        ("--loop", loop), ("--shared-noise", shared_noise is not None), ("--noise-correlation", noise_correlation is not None),
        ("--chunk", chunk is not None),
    ):  # fmt: skip
        if given and num_frames == 1:
            raise ValueError(f"{option} has no effect on one frame; expected --num-frames 2 or more")
    if halo is not None and chunk is None:
        raise ValueError("--halo has no effect without --chunk")
    words: str | dict[int, str] = {0: prompt} if then else prompt
    for each in then or []:
        frame, separator, text = each.partition(":")
        if not separator or not frame.isdecimal():
            raise ValueError(f"--then: expected FRAME:WORDS, such as '8:a lion', got {each!r}")
        words[int(frame)] = text.strip()  # type: ignore[index]
    pipe = loading.load(model, device=device)
    if scheduler:
        pipe.scheduler = loading.scheduler(scheduler, pipe.scheduler)
    if lora:
        load_lora(pipe, lora)
    if negative and (pipe.call_defaults["guidance_scale"] if guidance is None else guidance) <= 1:
        raise ValueError("--negative has no effect without guidance; expected --guidance above 1")
    if free_init:
        pipe.enable_free_init(num_iters=free_init)
    side, rate = size or pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe.call_defaults["fps"]
    pictures = {
        name: video_files.read(path, size=side, num_frames=1)[0][0] for name, path in (("image", image), ("last_image", last_image)) if path
    }
    if video:
        pictures["video"] = video_files.read(video, fps=rate, size=side, num_frames=num_frames)[0]
    if mask:
        frames = video_files.read(mask, fps=rate, size=side)[0].mean(axis=-1) / 255
        pictures["mask"] = frames[0] if len(frames) == 1 else frames[: len(pictures.get("video", frames))]
    (clips,) = pipe(
        words, num_frames=None if video else num_frames, num_inference_steps=steps, guidance_scale=guidance, negative_prompt=negative,
        height=size, width=size, loop=loop, shared_noise=shared_noise, noise_correlation=noise_correlation, strength=strength,
        chunk=chunk, halo=halo, **pictures,
        generator=runtime.seed(seed), return_dict=False,
    )  # fmt: skip
    clip = clips[0]
    name = "".join(letter if letter.isalnum() else "-" for letter in prompt.lower())[:60].strip("-") or "clip"
    for path in output or [Path(f"{name}.png" if len(clip) == 1 else f"{name}.mp4")]:
        print(video_files.save_video(clip, path, fps=pipe.call_defaults["fps"] if fps is None else fps))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe (.toml), or a run folder to go on with")],
    run: Annotated[Path | None, typer.Option(help="run folder; default: runs/ and the recipe's name")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=1e-4; data= and model= stand for data.path and model.init"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved settings and stop")] = False,
) -> None:
    """Train an autoencoder, an image model or a video model."""
    from latent_shift import config

    settings = recipe / "config.toml" if recipe.is_dir() else recipe
    run = run or (recipe if recipe.is_dir() else Path("runs") / f"{recipe.resolve().parent.name}-{recipe.stem}")
    resolved = config.load(settings, overrides)
    if dry_run:
        print(config.dump(resolved), end="")
        return
    quiet_libraries()
    from rich import progress
    from rich.console import Console

    from latent_shift.benchmark.hardware import matrix_rate
    from latent_shift.runtime import device_of, dtype_of
    from latent_shift.training import memory
    from latent_shift.training.loop import train

    def estimate(ready: config.Config) -> None:
        if ready.stage == "autoencoder":
            return
        device, precision = device_of(), dtype_of(ready.train.precision)
        needs = memory.of_run(ready, device.type)
        seconds = needs.flops / matrix_rate(device, precision)
        hours = ready.optim.steps * seconds / 3600
        whole = f"{hours:.2g} h" if hours >= 1 else f"{60 * hours:.2g} min"
        print(f"{needs}\ntime: at least {seconds:.2g} s a step, {whole} in all ({needs.flops / 1e12:.2g} TFLOP)")

    bar = progress.Progress(
        progress.TextColumn(resolved.stage),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        disable=not sys.stderr.isatty(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(resolved.stage, total=resolved.optim.steps, status="")

        def report(row: dict) -> None:
            status = f"loss {row['loss']:.4f}  {row['clips_per_s']:.1f} clips/s  waited {row['data_wait_s']:.1f} s  {row['eta_s'] / 60:.0f} min left"
            bar.update(task, completed=row["step"], status=status)
            if bar.disable:
                print(f"step {row['step']}  {status}", flush=True)

        print(train(resolved, run, report=report, prepared=estimate, progress=Progress))


@app.command()
def encode(
    packed: Annotated[Path, typer.Argument(help="a packed data set")],
    out: Annotated[Path, typer.Argument(help="where the latents go")],
    autoencoder: Annotated[str, typer.Option(help="a model's name, or an AutoencoderKL or pipeline folder")],
    texts: Annotated[str, typer.Option(help="a model's name, or a folder with tokenizer/ and text_encoder/")],
    stride: Annotated[
        list[int] | None, typer.Option(min=1, help="also captions for clips of every second frame (2), ...; may be repeated")
    ] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="also the mirror image of clips whose captions name no side")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="frames at once; default: as their size allows")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="processes; on a CPU each with one thread")] = 1,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster that shares the work: auto, local, host:port")] = None,
) -> None:
    """Encode packed frames and captions once, for the image and video stages. What was stopped goes on."""
    quiet_libraries()
    from latent_shift.data.encode import encode
    from latent_shift.pipelines import loading
    from latent_shift.runtime import device_of

    with Progress("encoding") as progress:
        store = encode(
            packed, out, autoencoder=loading.folder(autoencoder), texts=loading.folder(texts), mirror=mirror, strides=[1, *(stride or [])], batch_size=batch_size,
            device=device_of(device), workers=workers, ray=ray, progress=progress,
        )  # fmt: skip
    print(f"{out}: {store.num_frames} frames, {store.num_captions} captions with the empty one")


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Argument(help="what the protocol compares with: a packed data set, a folder of UCF-101 or MSR-VTT")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="[NAME=]MODEL: a name, a folder or file of ours, of AnimateDiff, ModelScope, ...; may be repeated"
        ),
    ] = None,
    protocol: Annotated[str, typer.Option(help="own, emoji, classes, ucf101, msrvtt-mav or msrvtt-lavie")] = "own",
    num: Annotated[int | None, typer.Option(min=1, help="clips, the first of the protocol's; default: all (own: at most 100)")] = None,
    num_frames: Annotated[int | None, typer.Option(min=2, help="of own and classes: frames a clip; default: the first model's")] = None,
    split: Annotated[list[str] | None, typer.Option(help="of own: where captions come from; may be repeated; default train")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="side in pixels at which is drawn; default: each system's own")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="sampling steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: on a GPU what each was published in")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="KIND=PATH of a network to measure with: i3d, c3d, inception, videomae or clip; may be repeated"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="clips at once")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="the networks by torch.compile: minutes at first, every clip sooner")] = False,
    noise: Annotated[
        tuple[float, float] | None,
        typer.Option(help="shared noise and noise correlation to see real clips through; default: those of the first model of ours"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of clips and features, with which it goes on; default: evals/ and the protocol")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="also write the records to this .json")] = None,
) -> None:
    """Measure systems against real clips, side by side: each number with its protocol, its weights and its interval."""
    quiet_libraries()
    import gc

    import torch

    from latent_shift import runtime
    from latent_shift.evaluation import evaluate, features, measures, protocols, systems, tables
    from latent_shift.runtime import device_of

    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype: expected float32, float16 or bfloat16, got {dtype!r}")
    # NAME=MODEL; a path that is there may hold the sign itself.
    given = [("", "", each) if Path(each).exists() or "=" not in each else each.partition("=") for each in model or ["emoji"]]
    named = [(name or path, path) for name, _, path in given]
    if len({evaluate.folder_name(name) for name, _ in named}) < len(named):
        told = ", ".join(name for name, _ in named)
        raise ValueError(f"--model: two systems have one folder: expected NAME=MODEL with different names, got {told}")
    if protocol in ("own", "classes") and num_frames is None:
        num_frames = systems.default_num_frames(named[0][1])
    task = protocols.open_protocol(protocol, data, num=num, num_frames=num_frames, splits=tuple(split) if split else None)
    if noise is not None and "denoising" not in task.measures:
        raise ValueError(f"--noise: protocol {protocol} shows models no real clips through noise; expected own or emoji")
    networks, first = features.Weights.parse(weights or [], device=str(device_of(device))), runtime.rank() == 0
    if first:  # who measures
        measures.check_weights(networks, task.measures)
    results, where = [], out or Path("evals") / protocol
    for name, path in named:
        system = systems.open_system(
            path, name=name, num_frames=task.num_frames, fps=task.required_fps, height=size, width=size,
            num_inference_steps=steps, guidance_scale=guidance, device=device, dtype=getattr(torch, dtype) if dtype else None,
            compile=compile,
        )  # fmt: skip
        if noise is None and "shared_noise" in system.settings:
            noise = (system.settings["shared_noise"], system.settings["noise_correlation"])
        with Progress(f"{system.name}: clips") as progress:
            results.append(evaluate.evaluate(system, task, where, weights=networks, noise=noise, batch_size=batch_size, progress=progress))
        del system  # two of the large ones do not fit a GPU
        gc.collect()
        torch.cuda.empty_cache()
    if not first:
        return
    results = evaluate.add_paired_differences(results, where)
    print(tables.markdown(results))
    for measure, reason in tables.skipped_measures(results):
        print(f"no {measure}: {reason}")
    if output:
        write_json(results, output)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="the page's folder")],
    compared: Annotated[Path, typer.Argument(help="the folder of an evaluation (`eval --out`), its systems in columns")],
    show: Annotated[list[str] | None, typer.Option(help="its systems from left to right; may be repeated; default: all")] = None,
    ablation: Annotated[list[Path] | None, typer.Option(help="an evaluation, as a table of all its systems; may be repeated")] = None,
    training: Annotated[Path | None, typer.Option(help="what `bench runs -o` wrote, as a table")] = None,
    classes: Annotated[Path | None, typer.Option(help="an evaluation with protocol classes, as rows of clips")] = None,
    sweep: Annotated[list[Path] | None, typer.Option(help="what `bench sweep -o` wrote, as plots; may be repeated")] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(
            help="SYSTEM=OTHER,...: systems that differ from SYSTEM in the training seed alone share its column; may be repeated; "
            "default: by their names SYSTEM-seed-N"
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="words shown")] = 8,
    title: str = "Latent-Shift beside others",
    note: Annotated[str, typer.Option(help="what a reader has to know of these systems, at the page's beginning")] = "",
) -> None:
    """Write evaluations as a page to look at: clips that play side by side, numbers, plots. It opens from a disk."""
    quiet_libraries()
    from latent_shift.evaluation.tables import parse_seeds
    from latent_shift.report import page

    groups = parse_seeds(seeds) if seeds else None
    options = dict(training=training, classes=classes, sweeps=sweep or [], rows=rows, title=title, note=note)
    print(page.report(out, compared, shown=show or [], ablations=ablation or [], seeds=groups, **options))  # type: ignore[arg-type]


@app.command()
def sheet(
    prompts: Annotated[Path, typer.Argument(help="a text file, a prompt a line; # starts a comment")],
    outputs: Annotated[
        list[Path], typer.Argument(help=".png: a row of frames for each prompt; .gif .webp .mp4 .webm: all clips side by side, moving")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="a name or a diffusers folder")] = "emoji",
    seed: Annotated[int, typer.Option(help="the seed of every clip")] = 0,
    columns: Annotated[int, typer.Option(min=1, help="frames shown of each clip, or clips in a row")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="sampling steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Draw a contact sheet: what the model makes of a list of prompts, with one seed, nothing picked."""
    quiet_libraries()
    from latent_shift import runtime, video
    from latent_shift.pipelines import loading
    from latent_shift.video import to_uint8

    for path in outputs:
        video.check_output(path)
    lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip() and not line.startswith("#")]
    pipe = loading.load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    with Progress("clips") as progress:
        for done, line in enumerate(lines, 1):
            clip = pipe(line, generator=runtime.seed(seed), num_inference_steps=steps, guidance_scale=guidance).frames[0]  # type: ignore[union-attr]
            rows.append(to_uint8(clip))
            progress(done, len(lines))
    for path in outputs:
        still = path.suffix.lower() == ".png"
        picture = video.labelled_rows(rows, lines, columns=columns)[None] if still else video.side_by_side(rows, columns=columns)
        print(video.write(picture, path, fps=pipe.call_defaults["fps"]))


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List the models known by name, or look into one."""
    if context.invoked_subcommand is None:
        from latent_shift.pipelines import loading

        for name, line in loading.MODELS.items():
            print(f"{name}: {line}")


@models_app.command()
def show(model: Annotated[str, typer.Argument(help="a name, a diffusers folder or a .safetensors file")]) -> None:
    """Say what a model is without loading its weights: family, parts, parameters, sizes, shift."""
    quiet_libraries()
    from latent_shift.pipelines import loading

    for name, value in loading.describe(model).items():
        print(f"{name:24} {value}")


def main() -> None:
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"latent-shift: {error}", file=sys.stderr)
        sys.exit(1)
