from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from latent_shift.benchmark.timing import paired
from latent_shift.config import Config, Model
from latent_shift.data.encode import encode
from latent_shift.data.readers import Record
from latent_shift.data.store import StoreWriter
from latent_shift.diffusion import noise_schedule
from latent_shift.models import sizes
from latent_shift.pipelines import loading, single_file
from latent_shift.runtime import dtype_of, resolve_precision
from latent_shift.shift import deflate, share_text
from latent_shift.training import memory
from latent_shift.training.objectives import DenoisingObjective, attention_kernel


def training_memory() -> dict[str, dict[str, float]]:
    """GiB that a step of recipes/finetune-sd15.toml takes (memory.py), whole and as a LoRA, with and without checkpointing."""
    settings: dict[str, Any] = {
        "stage": "video", "data": {"path": "", "batch_size": 1, "num_frames": 16}, "model": {"init": "", "edge": "hold"},
        "optim": {"steps": 1000, "lr": 1e-5, "optimizer": "adamw8bit", "accumulate": 8},
    }  # fmt: skip
    results = {}
    for lora, checkpointing in itertools.product((None, {"rank": 32}), (True, False)):
        config = Config.model_validate({**settings, "lora": lora, "train": {"gradient_checkpointing": checkpointing}})
        with torch.device("meta"):
            unet = UNet2DConditionModel(**single_file.FAMILIES["sd1"].unet)
        need = memory.estimate(config, unet, latents=(4, 64, 64), text_length=77)
        name = ("LoRA of rank 32" if lora else "every weight") + (", checkpointing" if checkpointing else "")
        results[name] = {part: getattr(need, part) / 2**30 for part in ("weights", "optimizer", "averaged", "step", "total")}
    return results


def runs(folders: list[Path]) -> list[dict[str, Any]]:
    """What training runs learnt, and what they took: of each the mean loss of its second half, the last validation loss, the median
    rate, the peak of memory, the parameters. Raises ValueError for a folder without a model."""
    rows = []
    for folder in folders:
        if not (folder / "model").exists():
            raise ValueError(f"{folder}: not the folder of a run that is done")
        stats = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
        weights = sorted((folder / "model").rglob("unet/*.safetensors")) or sorted((folder / "model").glob("*.safetensors"))
        with safe_open(weights[0], "pt") as file:
            parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (it is no dict)
        late = stats[len(stats) // 2 :]
        rows.append(
            {
                "run": str(folder),
                "steps": stats[-1]["step"],
                "parameters": parameters,
                "loss": float(np.mean([row["loss"] for row in late if row["loss"] is not None])),
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
    """A step of the video stage, with the shift, with nothing, with Latent-VDM's attention along time, and with the shift compiled,
    against one of the image stage on as many single frames: forward, backward, in the precision that training takes here, in turn."""
    pipe = loading.load(model, device=device, dtype=torch.float32)
    side, width = pipe.unet.config.sample_size, pipe.unet.config.cross_attention_dim
    plain = deflate(copy.deepcopy(pipe.unet))
    settings = [Model.model_validate({"init": model, "temporal": name}) for name in ("shift", "none", "attention")]
    networks: dict[str, Any] = {each.temporal: sizes.inflate_unet(copy.deepcopy(plain), each).to(device) for each in settings}
    networks["shift, compiled"] = copy.deepcopy(networks["shift"])
    networks["shift, compiled"].compile(dynamic=False)
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    dtype = dtype_of(resolve_precision("auto", torch.device(device)))

    def step(unet: UNet2DConditionModel, num_clips: int, length: int) -> Callable[[], None]:
        latents, noise = (draw(num_clips, length, unet.config.in_channels, side, side) for _ in range(2))
        steps, texts = torch.full((num_clips,), 500, device=device), draw(num_clips, pipe.tokenizer.model_max_length, width)
        share_text(unet)
        objective = DenoisingObjective(unet, noise_schedule()).train()

        def run() -> None:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32), attention_kernel(device, noise=noise):
                objective(latents, noise, steps, texts)[0].backward()
            objective.zero_grad()

        return run

    calls: dict[str, Callable[[], object]] = {f"{clips * num_frames} images": step(networks["none"], clips * num_frames, 1)}
    calls |= {f"{clips} clips of {num_frames} frames, {name}": step(unet, clips, num_frames) for name, unet in networks.items()}
    return paired(calls, rounds=rounds)


def resuming(size: str = "emoji", *, model: str = "emoji", num_frames: int = 8, batch_size: int = 8) -> dict[str, float]:
    """What it costs that a run was ended and the command given again: seconds to the end of its next step, a step's own time aside.

    The U-Net has the named size and random weights, the autoencoder and the texts are those of `model`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, frames = Path(name), np.zeros((2 * num_frames, 128, 128, 3), np.uint8)
        writer = StoreWriter(folder / "pixels")
        writer.add(Record("a.mp4", ("nothing",), "nothing"), frames)
        writer.close(dtype="uint8", fps=8, size=128, source="nothing")
        encode(folder / "pixels", folder / "latents", autoencoder=loading.folder(model), texts=loading.folder(model))
        recipe = folder / "recipe.toml"
        recipe.write_text(f"""stage = "video"
            data = {{path = "{folder / "latents"}", num_frames = {num_frames}, batch_size = {batch_size}}}
            model = {{size = "{size}"}}
            optim = {{steps = 3, lr = 1e-4, warmup_steps = 0}}
            train = {{log_every = 1}}""")

        def steps(*overrides: str) -> list[float]:
            """Seconds from the start of the command to the end of each step."""
            command, start = ["train", str(recipe), "--run", str(folder / "run"), *overrides], time.perf_counter()
            with subprocess.Popen([sys.executable, "-m", "latent_shift", *command], stdout=subprocess.PIPE, text=True) as process:
                seconds = [time.perf_counter() - start for line in process.stdout or () if line.startswith("step")]
            if process.returncode:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            return seconds

        begun, resumed = steps(), steps("optim.steps=6")
        step = float(np.median(np.diff(resumed)))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import latent_shift.training.loop"], check=True)
        imports = time.perf_counter() - start
    return {"seconds": resumed[0] - step, "of_these_imports": imports, "seconds_a_step": step, "seconds_of_a_first_start": begun[0] - step}
