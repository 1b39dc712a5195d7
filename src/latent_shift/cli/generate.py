"""`latent-shift generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_shift.runtime import quiet_libraries, skip_packages


def generate(
    prompt: Annotated[list[str], typer.Argument(help="what to show, in quotes; (words:1.4) weighs words")],
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
            help="a .mp4, .webm, .gif, .webp or .png; may be repeated; default: named by the prompt",
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
    prediction: Annotated[
        str | None,
        typer.Option(help="epsilon or v_prediction: what the model predicts, if it does not say so"),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="variant of the weights in a folder, such as fp16")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Generate a clip from a prompt, images or another clip."""
    from latent_shift.pipelines import catalog
    from latent_shift.pipelines.request import Request, generate_clip
    from latent_shift.video import check_output, write

    if len(prompt) > 1:
        raise ValueError(f'put the prompt in quotes: latent-shift generate "{" ".join(prompt)}"')
    for path in output or []:
        check_output(path, fps=8 if fps is None else fps)
    if fps is not None and output and all(path.suffix.lower() == ".png" for path in output):
        raise ValueError(
            "--fps has no effect on a .png, which is a strip of frames; expected another output, or no --fps"
        )
    if size is not None and (height is not None or width is not None):
        raise ValueError("expected --size, or --height and --width, not both")
    request = Request(
        prompt=prompt[0], then=_later_prompts(then or []), negative_prompt=negative, num_frames=num_frames, fps=fps,
        height=height or size, width=width or size, num_inference_steps=steps, guidance_scale=guidance, seed=seed,
        shared_noise=shared_noise, noise_correlation=noise_correlation, loop=loop, image=image, last_image=last_image, video=video,
        mask=mask, strength=strength, chunk=chunk, halo=halo, free_init=free_init, scheduler=scheduler,
    )  # fmt: skip
    catalog.check_model(model, variant=variant, prediction=prediction)

    skip_packages(catalog.unused_packages(model, lora=lora is not None, scheduler=scheduler))
    quiet_libraries()
    from latent_shift.pipelines.loading import load
    from latent_shift.pipelines.lora import load_lora

    pipe = load(model, device=device, variant=variant, prediction=prediction)
    if lora:
        load_lora(pipe, lora)
    clip = generate_clip(request, pipe)
    suffix = ".png" if len(clip.frames) == 1 else ".mp4"
    for path in output or [Path(request.name + suffix)]:
        print(write(clip.frames, path, fps=clip.fps))


def _later_prompts(items: list[str]) -> dict[int, str]:
    """Parse `--then FRAME:PROMPT` options."""
    prompts = {}
    for item in items:
        frame, separator, text = item.partition(":")
        if not separator or not frame.isdecimal():
            raise ValueError(f"--then: expected FRAME:PROMPT, such as '8:a lion', got {item!r}")
        prompts[int(frame)] = text.strip()
    return prompts
