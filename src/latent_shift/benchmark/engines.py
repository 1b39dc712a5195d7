"""The engines side by side: whole commands, clips in a warm process, one call of the U-Net."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from latent_shift.benchmark.timing import run_alone
from latent_shift.engines.runtimes import PACKAGES
from latent_shift.pipelines.descriptions import sampling_defaults
from latent_shift.runtime import peak_memory_gib

PROMPT = "a red heart"
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def instruction_sets() -> list[str]:
    """Return which of the instruction sets that matter here the CPU has; none where Linux does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set() if line is None else set(line[1].split())
    return [name for name in _INSTRUCTION_SETS if name in flags]


def compare(
    model: str, *, rounds: int = 5, steps: Sequence[int] = (), guidance: float | None = None
) -> dict[str, Any]:
    """Time a clip of a model with every engine that is installed.

    Args:
        model: a name, folder or file; it is exported first.
        rounds: commands of each engine, in turn, and clips in a warm process.
        steps: sampling steps of the clips, those of the command first; (): the model's.
        guidance: of the clips; None: the model's.

    Returns:
        `export_seconds`, and for each engine (the exported ones decode with the model's tiny decoder, if it has one) in seconds, medians:
        `command` (a fresh process, words to mp4), `clips` (in a warm process, decoded, by the number of steps) and `unet` (one call); then
        `peak_gib` of the warm process, `precision` and `version`.
    """
    steps = tuple(steps) or (int(sampling_defaults(model)["num_inference_steps"] or 0),)
    from latent_shift.engines.export import export

    engines = ["torch", *(name for name, package in PACKAGES.items() if find_spec(package))]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        export(model, Path(folder) / "exported")
        result: dict[str, Any] = {"export_seconds": time.perf_counter() - start, "engines": {}}
        sources = {name: model if name == "torch" else str(Path(folder) / "exported") for name in engines}
        commands: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds + 1):  # the first fills the caches of files and of OpenVINO
            for name in engines:
                options = ["--steps", str(steps[0])]
                options += [] if guidance is None else ["--guidance", str(guidance)]
                words = [
                    "generate",
                    PROMPT,
                    "-m",
                    sources[name],
                    "--engine",
                    name,
                    "-o",
                    f"{folder}/clip.mp4",
                    "--force",
                ]
                device = ["--device", "cpu"] if name == "torch" else []
                start = time.perf_counter()
                command = [sys.executable, "-m", "latent_shift", *words, *options, *device]
                done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
                if done.returncode:
                    raise RuntimeError(f"generate --engine {name}: {done.stderr.strip()[-1000:]}")
                if turn:
                    commands[name].append(time.perf_counter() - start)
        for name in engines:
            warm = run_alone(_warm, name, sources[name], rounds, steps, guidance)
            result["engines"][name] = {"command": float(np.median(commands[name])), **warm}
    return result


def _warm(
    engine: str, model: str, rounds: int, steps: Sequence[int], guidance: float | None
) -> dict[str, Any]:
    """Time clips and calls of the U-Net in this process."""
    from latent_shift.pipelines.request import Request

    if engine == "torch":
        import torch

        from latent_shift.clip_text import share_text
        from latent_shift.pipelines.loading import load
        from latent_shift.pipelines.request import generate_clip
        from latent_shift.shift import frames

        pipe = load(model, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        share_text(pipe.unet)
        num_frames, (height, width) = int(pipe.call_defaults["num_frames"]), pipe.resolve_size(None, None)
        factor = pipe.vae_scale_factor
        sample = torch.zeros(
            num_frames, pipe.unet.config.in_channels, height // factor, width // factor, dtype=pipe.dtype
        )
        text = torch.zeros(
            1, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim, dtype=pipe.dtype
        )

        @torch.no_grad()
        def call() -> None:
            with frames(pipe.unet, num_frames):
                pipe.unet(sample, 500, text)

        def clip(request: Request) -> None:
            generate_clip(request, pipe)

        about = {"precision": str(pipe.dtype).removeprefix("torch."), "version": torch.__version__}
    else:
        from latent_shift.engines.exported import ExportedPipeline, neighbor_indices

        pipeline = ExportedPipeline(model, engine)
        settings = pipeline.settings
        inputs = {
            "sample": np.zeros((settings.num_frames, settings.channels, settings.height, settings.width), np.float32),
            "timestep": np.array([500]), "text": pipeline.embed(PROMPT), **neighbor_indices(settings.num_frames, settings.edge),
        }  # fmt: skip

        def call() -> None:
            pipeline.engine.run("unet", inputs)

        def clip(request: Request) -> None:
            pipeline.generate(request)

        about = pipeline.engine.describe()
    clips: dict[int, list[float]] = {num_steps: [] for num_steps in steps}
    calls = []
    for turn in range(rounds + 1):
        for num_steps in steps:
            request = Request(
                prompt=PROMPT, seed=turn, num_inference_steps=num_steps, guidance_scale=guidance
            )
            start = time.perf_counter()
            clip(request)
            middle = time.perf_counter()
            call()
            if turn:
                clips[num_steps].append(middle - start)
                calls.append(time.perf_counter() - middle)
    return {
        "clips": {str(num_steps): float(np.median(seconds)) for num_steps, seconds in clips.items()},
        "unet": float(np.median(calls)),
        "peak_gib": peak_memory_gib(),
        **about,
    }
