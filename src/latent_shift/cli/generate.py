"""`latent-shift generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_shift.runtime import quiet_libraries, skip_packages


def generate(
    prompt: Annotated[list[str], typer.Argument(help="what to show, in quotes; (words:1.4) weighs words")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="a name (see `latent-shift models`), a diffusers folder, a .safetensors file")
    ] = "emoji",
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="a .mp4, .webm, .gif, .webp or .png; may be repeated; default: named by the prompt"),
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="frames; 1 generates an image")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="sampling steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1 is off")] = None,
    negative: Annotated[str | None, typer.Option(help="negative prompt")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="height and width in pixels")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same clip")] = 0,
    shared_noise: Annotated[
        float | None, typer.Option(min=0, max=1, help="fraction of the noise shared by all frames, 0 to 1; more means less motion")
    ] = None,
    noise_correlation: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="correlation of the remaining noise between frames, 0 to below 1; more means slower motion"),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=0.001, help="frame rate of the file")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="make the last frame lead into the first")] = False,
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="an image: the first frame")] = None,
    last_image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="an image: the last frame")] = None,
    video: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="a video to start from")] = None,
    mask: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="an image or video: white is generated, black is kept")
    ] = None,
    strength: Annotated[float | None, typer.Option(min=0, max=1, help="how much of the video or image is replaced, up to 1")] = None,
    then: Annotated[list[str] | None, typer.Option(help="FRAME:PROMPT, a new prompt from that frame on; may be repeated")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="frames in memory at once, for long clips")] = None,
    halo: Annotated[
        int | None,
        typer.Option(
            min=0, help="frames of context on either side of a chunk; default: the receptive field, which is exact; fewer are faster"
        ),
    ] = None,
    free_init: Annotated[int | None, typer.Option(min=2, help="FreeInit: number of sampling passes, each starting from the last")] = None,
    scheduler: Annotated[str | None, typer.Option(help="a scheduler of diffusers: DDIM, EulerDiscrete, UniPCMultistep, LCM, ...")] = None,
    lora: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="a LoRA file (.safetensors)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Generate a clip from a prompt, images or another clip."""
    from latent_shift import video as video_files
    from latent_shift.pipelines import catalog

    if len(prompt) > 1:
        raise ValueError(f'put the prompt in quotes: latent-shift generate "{" ".join(prompt)}"')
    (text,) = prompt
    for path in output or []:
        video_files.check_output(path, fps=8 if fps is None else fps)
    if fps is not None and output and all(path.suffix.lower() == ".png" for path in output):
        raise ValueError("--fps has no effect on a .png, which is a strip of frames; expected another output, or no --fps")
    options_of_clips = {
        "--loop": loop, "--shared-noise": shared_noise is not None, "--noise-correlation": noise_correlation is not None,
        "--chunk": chunk is not None,
    }  # fmt: skip
    for option, is_used in options_of_clips.items():
        if is_used and num_frames == 1:
            raise ValueError(f"{option} has no effect on one frame; expected --num-frames 2 or more")
    if halo is not None and chunk is None:
        raise ValueError("--halo has no effect without --chunk")
    prompts = _prompts_by_frame(text, then or [])
    catalog.check_model(model)

    skip_packages(catalog.unused_packages(model, lora=lora is not None, scheduler=scheduler))
    quiet_libraries()
    from latent_shift import runtime
    from latent_shift.pipelines import loading
    from latent_shift.pipelines.lora import load_lora

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
        prompts, num_frames=None if video else num_frames, num_inference_steps=steps, guidance_scale=guidance, negative_prompt=negative,
        height=size, width=size, loop=loop, shared_noise=shared_noise, noise_correlation=noise_correlation, strength=strength,
        chunk=chunk, halo=halo, **pictures,
        generator=runtime.seed(seed), return_dict=False,
    )  # fmt: skip
    clip = clips[0]
    name = "".join(letter if letter.isalnum() else "-" for letter in text.lower())[:60].strip("-") or "clip"
    for path in output or [Path(f"{name}.png" if len(clip) == 1 else f"{name}.mp4")]:
        print(video_files.save_video(clip, path, fps=pipe.call_defaults["fps"] if fps is None else fps))


def _prompts_by_frame(prompt: str, later: list[str]) -> str | dict[int, str]:
    """Return the prompt, or with `--then FRAME:PROMPT` the prompts by the frame at which they start."""
    prompts = {0: prompt}
    for item in later:
        frame, separator, text = item.partition(":")
        if not separator or not frame.isdecimal():
            raise ValueError(f"--then: expected FRAME:PROMPT, such as '8:a lion', got {item!r}")
        prompts[int(frame)] = text.strip()
    return prompts if later else prompt
