"""`latent-shift generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latent_shift.cli import outputs
from latent_shift.cli.terminal import Progress, duration
from latent_shift.runtime import keep_freed_memory, quiet_libraries, skip_packages

if TYPE_CHECKING:
    import numpy as np

    from latent_shift.engines.exported import ExportedPipeline
    from latent_shift.pipelines.clip_pipeline import ClipPipeline
    from latent_shift.pipelines.request import Clip, Request


Prediction = Annotated[
    str | None, typer.Option(help="epsilon or v_prediction: what the model predicts, if it does not say so")
]
Variant = Annotated[str | None, typer.Option(help="variant of the weights in a folder, such as fp16")]
EngineName = Literal["torch", "onnx", "openvino"]
MAX_CLIPS = 100_000
"""Most clips of one command."""


def generate(
    context: typer.Context,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="what to show, in quotes; (words:1.4) weighs words")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="a text file with a prompt per line; # starts a comment"
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="a name (see `latent-shift models`), a diffusers folder, a .safetensors file",
        ),
    ] = "emoji",
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="a .mp4, .webm, .gif, .webp or .png; may be repeated; default: named by prompt and seed",
        ),
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="frames; 1 generates an image")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="sampling steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1 is off")] = None,
    negative: Annotated[str | None, typer.Option(help="negative prompt")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="height and width in pixels")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="height in pixels")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="width in pixels")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same clip")] = 0,
    num: Annotated[
        int,
        typer.Option(
            "--num", "-n", min=1, max=MAX_CLIPS, help="clips of each prompt, with this seed and the next ones"
        ),
    ] = 1,
    shared_noise: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="fraction of the noise shared by all frames, 0 to 1; more means less motion"
        ),
    ] = None,
    noise_correlation: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="correlation of the remaining noise between frames, 0 to below 1; more means slower motion",
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=0.001, help="frame rate of the file")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="make the last frame lead into the first")] = False,
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="an image: the first frame")
    ] = None,
    last_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="an image: the last frame")
    ] = None,
    video: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="a video to start from")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="an image or video: white is generated, black is kept"
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="how much of the video or image is replaced, up to 1")
    ] = None,
    then: Annotated[
        list[str] | None, typer.Option(help="FRAME:PROMPT, a new prompt from that frame on; may be repeated")
    ] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="frames in memory at once, for long clips")] = None,
    halo: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="frames of context on either side of a chunk; default: the receptive field, which is exact; fewer are faster",
        ),
    ] = None,
    free_init: Annotated[
        int | None,
        typer.Option(min=2, help="FreeInit: number of sampling passes, each starting from the last"),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="a scheduler of diffusers: DDIM, EulerDiscrete, UniPCMultistep, LCM, ..."),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="a LoRA file (.safetensors)")
    ] = None,
    prediction: Prediction = None,
    variant: Variant = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="what computes: torch, or with a folder of `latent-shift export` onnx or openvino"),
    ] = "torch",
    force: outputs.Force = False,
) -> None:
    """Generate clips from prompts, images or another clip."""
    from latent_shift.engines.exported import ExportedPipeline, is_exported
    from latent_shift.pipelines import catalog
    from latent_shift.pipelines.request import Request

    if size is not None and (height is not None or width is not None):
        raise ValueError("expected --size, or --height and --width, not both")
    lines = _read_prompts(prompt or [], prompts)
    request = Request(
        prompt=lines[0], then=_later_prompts(then or []), negative_prompt=negative, num_frames=num_frames, fps=fps,
        height=height or size, width=width or size, num_inference_steps=steps, guidance_scale=guidance, seed=seed,
        shared_noise=shared_noise, noise_correlation=noise_correlation, loop=loop, image=image, last_image=last_image, video=video,
        mask=mask, strength=strength, chunk=chunk, halo=halo, free_init=free_init, scheduler=scheduler,
    )  # fmt: skip
    jobs = _plan(request, lines, num, output or [], numbered=prompts is not None)
    inputs = [*request.files.values(), prompts, lora, Path(model)]
    replaced = _check_outputs(jobs, fps, inputs=inputs, force=force)
    if engine != "torch":
        for name, value in {
            "device": device,
            "lora": lora,
            "variant": variant,
            "prediction": prediction,
        }.items():
            if value is not None:
                raise ValueError(f"--{name} needs --engine torch")
        pipeline = ExportedPipeline(model, engine)
        _warn_of_far_words(lines, model, Path(model), pipeline.sentence_embeddings)
        _generate_all(jobs, _Exported(pipeline), context, replaced)
        return
    if is_exported(model):
        raise ValueError(f"{model}: is exported; expected --engine onnx or --engine openvino")
    catalog.check_model(model, variant=variant, prediction=prediction)

    skip_packages(catalog.unused_packages(model, lora=lora is not None, scheduler=scheduler))
    keep_freed_memory()
    quiet_libraries()
    from latent_shift.models.names import embedder
    from latent_shift.pipelines import provenance
    from latent_shift.pipelines.loading import load
    from latent_shift.pipelines.lora import load_lora

    pipe = load(model, device=device, variant=variant, prediction=prediction)
    if lora:
        load_lora(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    hashes = provenance.hash_inputs(model, [*request.files.values(), lora])
    if not catalog.on_hub(model) and not catalog.is_file(model):
        embed = embedder(pipe.tokenizer, pipe.text_encoder)
        _warn_of_far_words([*lines, *request.then.values()], model, catalog.folder(model), embed)
    _generate_all(jobs, _Torch(pipe, model, hashes), context, replaced)


class _Torch:
    """Generates with a pipeline of PyTorch."""

    def __init__(self, pipe: ClipPipeline, model: str, hashes: dict[str, str]):
        self._pipe, self._model, self._hashes = pipe, model, hashes
        self.where = outputs.device_name(pipe.device)

    def generate(self, request: Request, on_step: Callable[[int, int], None]) -> Clip:
        from latent_shift.pipelines.request import generate_clip

        return generate_clip(request, self._pipe, on_step=on_step)

    def describe(self, settings: Mapping[str, Any], command: list[str]) -> dict[str, str]:
        from latent_shift.pipelines import provenance

        settings = {**settings, "dtype": str(self._pipe.dtype).removeprefix("torch.")}
        return provenance.describe(settings, model=self._model, hashes=self._hashes, command=command)


class _Exported:
    """Generates with an exported model."""

    def __init__(self, pipeline: ExportedPipeline):
        self._pipeline = pipeline
        self.where = f"the CPU by {pipeline.engine.name} in {pipeline.engine.describe()['precision']}"
        self.describe = pipeline.describe

    def generate(self, request: Request, on_step: Callable[[int, int], None]) -> Clip:
        return self._pipeline.generate(request, on_step=on_step)


def _generate_all(
    jobs: list[_Job], generator: _Torch | _Exported, context: typer.Context, replaced: Mapping[Path, outputs.FileState]
) -> None:  # fmt: skip
    """Generate all clips; print what failed of several."""
    failed = 0
    for job in jobs:
        try:
            _generate_one(job, generator, context, replaced)
        except (ValueError, RuntimeError, OSError) as error:  # of this prompt, perhaps
            if len(jobs) == 1:
                raise
            failed += 1
            print(f"latent-shift: {job.request.prompt!r}, seed {job.request.seed}: {error}", file=sys.stderr)
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} clips were not generated")


@dataclass
class _Job:
    """A clip to generate, and the files that were asked for."""

    request: Request
    files: list[Path]

    def default_file(self, suffix: str) -> Path:
        """Return the file for a clip that none was asked for, named by prompt and seed."""
        return Path(f"{self.request.name}-seed{self.request.seed}{suffix}")


def _read_prompts(words: list[str], file: Path | None) -> list[str]:
    """Return the prompts of the arguments or of the file of `--prompts`."""
    if file is not None and words:
        raise ValueError("expected a prompt or --prompts, not both")
    if file is not None:
        return outputs.read_prompts(file)
    if not words:
        raise ValueError('expected a prompt, such as latent-shift generate "a red heart", or --prompts')
    if len(words) > 1:
        raise ValueError(f'put the prompt in quotes: latent-shift generate "{" ".join(words)}"')
    return words


def _plan(request: Request, prompts: list[str], num: int, files: list[Path], *, numbered: bool) -> list[_Job]:
    """Return the clips of a command. Where there are several, the names of files that were given get the
    number of the prompt and the seed."""
    if len(prompts) * num > MAX_CLIPS:
        raise ValueError(
            f"{len(prompts)} prompts with {num} seeds are {len(prompts) * num} clips; expected at most {MAX_CLIPS}"
        )
    jobs = []
    for number, prompt in enumerate(prompts, start=1):
        for seed in range(request.seed, request.seed + num):
            tags = [f"{number:03}"] * numbered + [f"seed{seed}"] * (num > 1)
            named = [path.with_stem("-".join([path.stem, *tags])) for path in files]
            jobs.append(_Job(replace(request, prompt=prompt, seed=seed), named))
    return jobs


def _check_outputs(
    jobs: list[_Job], fps: float | None, *, inputs: Iterable[Path | None], force: bool
) -> dict[Path, outputs.FileState]:
    """Check all files before the first clip is generated; return those that will be replaced."""
    from latent_shift.video import OUTPUT_SUFFIXES, check_output

    files = [path for job in jobs for path in job.files]
    if fps is not None and files and all(path.suffix.lower() == ".png" for path in files):
        raise ValueError(
            "--fps has no effect on a .png, which is a strip of frames; expected another output, or no --fps"
        )
    replaced = outputs.check_outputs(files, suffixes=OUTPUT_SUFFIXES, inputs=inputs, force=force)
    for path in files:
        check_output(path, fps=8 if fps is None else fps)
    outputs.check_writable(job.default_file(".mp4") for job in jobs if not job.files)
    return replaced


def _generate_one(
    job: _Job,
    generator: _Torch | _Exported,
    context: typer.Context,
    replaced: Mapping[Path, outputs.FileState],
) -> None:
    """Generate a clip and write its files, all that can be written."""
    request, start = job.request, time.monotonic()
    with Progress(request.prompt[:40], say_time=False) as progress:
        clip = generator.generate(request, progress)
    seconds = duration(time.monotonic() - start)
    print(f"{len(clip.frames)} frames in {seconds} on {generator.where}", file=sys.stderr)
    dropped = dict.fromkeys(("prompts", "num", "output", "force"))
    command = outputs.repeat_command(context, **dropped, prompt=request.prompt, seed=request.seed)
    metadata = generator.describe(clip.settings, command)
    suffix = ".png" if len(clip.frames) == 1 else ".mp4"
    files = job.files
    if not files:
        files = [outputs.reserve(job.default_file(suffix))]
        replaced = {files[0]: outputs.file_state(files[0])}
    outputs.write_all(clip.frames, files, fps=clip.fps, metadata=metadata, replaced=replaced)


def _warn_of_far_words(
    prompts: list[str], model: str, folder: Path, embed: Callable[[list[str]], np.ndarray]
) -> None:
    """Print, for each prompt that is far from all names of a model, the nearest of them."""
    from latent_shift.models.names import read_names

    try:
        names = read_names(folder)
        if names is None:
            return
        for prompt in filter(str.strip, prompts):
            nearest = names.nearest(prompt, embed)
            if nearest[0][1] < names.threshold:
                known = ", ".join(name for name, _ in nearest)
                print(
                    f"{prompt!r} is far from all that {model} was trained on; nearest: {known}",
                    file=sys.stderr,
                )
    except ValueError as error:  # a clip needs no names
        print(f"latent-shift: {error}", file=sys.stderr)


def _later_prompts(items: list[str]) -> dict[int, str]:
    """Parse `--then FRAME:PROMPT` options."""
    prompts = {}
    for item in items:
        frame, separator, text = item.partition(":")
        if not separator or not frame.isdecimal():
            raise ValueError(f"--then: expected FRAME:PROMPT, such as '8:a lion', got {item!r}")
        if int(frame) == 0:
            raise ValueError(f"--then {item}: frame 0 has the prompt itself; expected 1 or more")
        if int(frame) in prompts:
            raise ValueError(
                f"--then: frame {int(frame)} given twice; expected one prompt from each frame on"
            )
        prompts[int(frame)] = text.strip()
    return prompts
