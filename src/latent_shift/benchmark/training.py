"""Training: the time of a step, the time to resume a run, and what completed runs reached and cost."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from pydantic import BaseModel, Field

from latent_shift.benchmark.timing import time_in_rounds
from latent_shift.clip_text import share_text
from latent_shift.config import Model
from latent_shift.data.encode import encode
from latent_shift.data.readers import Record
from latent_shift.data.store_writer import StoreWriter
from latent_shift.diffusion import noise_schedule
from latent_shift.files import check_schema, read_json_lines, tensor_shapes
from latent_shift.models import sizes
from latent_shift.pipelines import loading
from latent_shift.rules import neighbors_and_mean
from latent_shift.runtime import dtype_of, resolve_precision
from latent_shift.shift import Shift, deflate, inflate
from latent_shift.training.objectives import DenoisingObjective, attention_kernel


class _StatsRow(BaseModel):
    """A line of stats.jsonl."""

    step: int
    loss: float | None
    clips_per_s: float
    data_wait_s: float
    seconds: float
    gib_peak: float


def runs(folders: list[Path]) -> list[dict[str, Any]]:
    """Return what training runs reached and cost, a row each.

    Args:
        folders: of completed runs.

    Returns:
        For each run the steps, the parameters, the mean loss of its second half, the last validation loss,
        the median clips a second, the fraction of time spent waiting for data, and the peak memory in GiB.

    Raises:
        ValueError: a folder without a model.
    """
    rows = []
    for folder in folders:
        if not (folder / "model").exists():
            raise ValueError(f"{folder}: holds no model; expected the folder of a completed run")
        stats = read_json_lines(folder / "stats.jsonl")
        check_schema(stats, Annotated[list[_StatsRow], Field(min_length=1)], folder / "stats.jsonl")
        weights = sorted((folder / "model").rglob("unet/*.safetensors")) or sorted(
            (folder / "model").glob("*.safetensors")
        )
        if not weights:
            raise ValueError(f"{folder / 'model'}: holds no .safetensors weights; expected a completed run")
        parameters = sum(map(math.prod, tensor_shapes(weights[0]).values()))
        second_half = stats[len(stats) // 2 :]
        rows.append(
            {
                "run": str(folder),
                "steps": stats[-1]["step"],
                "parameters": parameters,
                "loss": float(np.mean([row["loss"] for row in second_half if row["loss"] is not None])),
                "val_loss": next((row["val_loss"] for row in reversed(stats) if "val_loss" in row), None),
                "clips_per_s": float(np.median([row["clips_per_s"] for row in stats])),
                "data_wait_share": sum(row["data_wait_s"] for row in stats) / stats[-1]["seconds"],
                "gib_peak": max(row["gib_peak"] for row in stats),
            }
        )
    return rows


def training_step(
    model: str = "emoji", *, clips: int = 4, num_frames: int = 16, rounds: int = 10, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time a step of the video stage against one of the image stage on as many single frames, forward and
    backward.

    The video stage runs with the shift, with the rule `neighbors_and_mean` before both convolutions on channels in no order,
    with no temporal layers, with Latent-VDM's, and with the shift compiled; the precision is the default of training on the
    device.

    Args:
        model: as in `loading.load`.
        clips, num_frames: of the batch.
        rounds: counted rounds.
        device: "cpu" or "cuda".

    Returns:
        For each step what `time_in_rounds` returns; ratios are to the image stage.
    """
    pipe = loading.load(model, device=device, dtype=torch.float32)
    side = pipe.resolve_size(None, None)[0] // pipe.vae_scale_factor
    width = pipe.unet.config.cross_attention_dim
    plain = deflate(copy.deepcopy(pipe.unet))
    settings = [
        Model.model_validate({"init": model, "temporal": name}) for name in ("shift", "none", "attention")
    ]
    networks: dict[str, Any] = {
        setting.temporal: sizes.inflate_unet(copy.deepcopy(plain), setting).to(device) for setting in settings
    }
    networks["mixed"] = inflate(copy.deepcopy(plain), Shift(place="both", edge="hold", rule=_mixed)).to(
        device
    )
    networks["shift, compiled"] = copy.deepcopy(networks["shift"])
    networks["shift, compiled"].compile(dynamic=False)
    dtype = dtype_of(resolve_precision("auto", torch.device(device)))

    def step(unet: UNet2DConditionModel, num_clips: int, length: int) -> Callable[[], None]:
        shape = (num_clips, length, unet.config.in_channels, side, side)
        latents, noise = (torch.randn(shape, device=device) for _ in range(2))
        timesteps = torch.full((num_clips,), 500, device=device)
        texts = torch.randn(num_clips, pipe.tokenizer.model_max_length, width, device=device)
        share_text(unet)
        objective = DenoisingObjective(unet, noise_schedule()).train()

        def run() -> None:
            with (
                torch.autocast(device, dtype, enabled=dtype != torch.float32),
                attention_kernel(device, noise=noise),
            ):
                objective(latents, noise, timesteps, texts)[0].backward()
            objective.zero_grad()

        return run

    calls: dict[str, Callable[[], object]] = {
        f"{clips * num_frames} images": step(networks["none"], clips * num_frames, 1)
    }
    calls |= {
        f"{clips} clips of {num_frames} frames, {name}": step(unet, clips, num_frames)
        for name, unet in networks.items()
    }
    return time_in_rounds(calls, rounds=rounds)


def _mixed(num_channels: int) -> list[int | tuple[int, ...]]:
    """Return the offsets of `neighbors_and_mean` in no order, as the cheapest channels have them."""
    offsets = neighbors_and_mean(num_channels)
    return [offsets[channel] for channel in np.random.default_rng(0).permutation(num_channels)]


def resuming(
    size: str = "emoji", *, model: str = "emoji", num_frames: int = 8, batch_size: int = 8
) -> dict[str, float]:
    """Time how long a run that was interrupted takes to resume: seconds to the end of its next step, less
    the step itself.

    Args:
        size: named size of the U-Net, which has random weights.
        model: whose autoencoder and text encoder are used.
        num_frames, batch_size: of the run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = _write_still_recipe(folder, size, model, num_frames, batch_size)
        first = _step_times(recipe, folder / "run")
        resumed = _step_times(recipe, folder / "run", "optim.steps=6")
        step = float(np.median(np.diff(resumed)))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import latent_shift.training.loop"], check=True)
        imports = time.perf_counter() - start
    return {
        "seconds": resumed[0] - step,
        "of_these_imports": imports,
        "seconds_a_step": step,
        "seconds_of_a_first_start": first[0] - step,
    }


def _write_still_recipe(folder: Path, size: str, model: str, num_frames: int, batch_size: int) -> Path:
    """Write a recipe of three steps on one clip of black frames."""
    writer = StoreWriter(folder / "pixels")
    writer.add(Record("a.mp4", ("nothing",), "nothing"), np.zeros((2 * num_frames, 128, 128, 3), np.uint8))
    writer.close(dtype="uint8", fps=8, size=128, source="nothing")
    encode(
        folder / "pixels", folder / "latents", autoencoder=loading.folder(model), texts=loading.folder(model)
    )
    recipe = folder / "recipe.toml"
    text = f"""stage = "video"
        data = {{path = "{folder / "latents"}", num_frames = {num_frames}, batch_size = {batch_size}}}
        model = {{size = "{size}"}}
        optim = {{steps = 3, lr = 1e-4, warmup_steps = 0}}
        train = {{log_every = 1}}"""
    recipe.write_text(text, encoding="utf-8")
    return recipe


def _step_times(recipe: Path, run: Path, *overrides: str) -> list[float]:
    """Return the seconds from the start of the train command to the end of each step."""
    command, start = ["train", str(recipe), "--run", str(run), *overrides], time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "latent_shift", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        seconds = [time.perf_counter() - start for line in process.stdout or () if line.startswith("step")]
    if process.returncode:
        raise RuntimeError(f"latent-shift {' '.join(command)} ended with status {process.returncode}")
    return seconds
