"""The run folder: what a training run leaves on disk, written so that a crash at any moment loses minutes, never the run.

run/
  config.toml            every setting, defaults written out; `latent-shift train run` resumes from it
  stats.jsonl            a line every `log_every` steps; `seconds` is the run's time so far, sampling and saving included
  samples/               pictures and clips drawn while it trains
  checkpoints/step-*/    weights and averaged weights (safetensors), optimizer state (PyTorch's own format); of a sharded run both in
                         `sharded/`, a file a process; state.json names every file and its size, and is written last
  model/                 the averaged weights as a diffusers folder, when the run is done; of a LoRA its file
  .lock                  held by the process that trains here; the system lets go of it whatever ends the process
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from latent_shift.files import write_text
from latent_shift.training import fsdp

log = logging.getLogger("latent_shift")


def save(accelerator: Accelerator, run: Path, step: int, *, keep: int, seen: dict[str, list[float]]) -> Path:
    """Write checkpoint `step` aside, rename it into place, and delete all but the newest `keep`; later ones, which were not whole when
    the run went on from an earlier one, too. `seen` are the losses that have no line in stats.jsonl yet.

    Raises:
        OSError: it could not be written: the disk is full, say. The checkpoints before it are as they were.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    if accelerator.is_main_process:
        for left in target.parent.glob(".step-*.partial"):  # of a run that was killed while it saved
            shutil.rmtree(left)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(partial, step, seen)
    except Exception as error:  # each of the libraries has its own for a file that cannot be written
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
            raise  # out of memory
        whole = [folder.name for folder in steps(run) if _flaw(folder) is None]
        raise OSError(
            f"{run}: step {step} could not be saved ({error}); "
            f"{f'{whole[-1]} is whole, and the same command goes on from there' if whole else 'nothing was saved before it'}"
        ) from error
    if accelerator.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        kept = [folder for folder in steps(run) if folder <= target and _flaw(folder) is None][-keep:]
        for folder in steps(run):
            if folder not in kept:
                shutil.rmtree(folder)
    return target


def _seal(folder: Path, step: int, seen: dict[str, list[float]]) -> None:
    """Have every file on the disk, and then the one that says so."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("r+b") as file:  # Windows wants to write to what it flushes
            os.fsync(file.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_text(folder / "state.json", json.dumps({"step": step, "sizes": sizes, "seen": seen}))


def _flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    try:
        sizes = json.loads((folder / "state.json").read_text(encoding="utf-8"))["sizes"]
    except (OSError, ValueError, KeyError) as error:
        return f"state.json cannot be read ({error})"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            return f"{name} has {found} bytes of {size}"
    return None


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold the run folder. Raises ValueError if another process does."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(run / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{run}: another process trains there; choose another folder with --run") from None
    with held:
        yield


def average_too(accelerator: Accelerator, ema: EMAModel, names: list[str]) -> None:
    """Save and load the averaged weights, by the names of the parameters, with the others."""

    def save_average(modules: list[nn.Module], weights: list[dict], folder: str) -> None:
        tensors = fsdp.gathered(zip(names, ema.shadow_params, strict=True), accelerator.is_main_process)
        if accelerator.is_main_process:
            save_file(tensors, Path(folder) / "average.safetensors", metadata={"steps": str(ema.optimization_step)})

    def load_average(modules: list[nn.Module], folder: str) -> None:
        with safe_open(Path(folder) / "average.safetensors", framework="pt") as file:
            for name, tensor in zip(names, ema.shadow_params, strict=True):
                fsdp.copy(file.get_tensor(name), tensor)
            ema.optimization_step = int(file.metadata()["steps"])

    accelerator.register_save_state_pre_hook(save_average)
    accelerator.register_load_state_pre_hook(load_average)


def leave_out_frozen(accelerator: Accelerator, module: nn.Module) -> None:
    """Save only what is trained: of a LoRA megabytes, not the gigabytes of the model it adds to."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if len(trained) == len(list(module.parameters())):
        return

    def save_trained(modules: list[nn.Module], weights: list[dict], folder: str) -> None:
        bare = [{name.removeprefix("module."): tensor for name, tensor in state.items()} for state in weights]  # what DDP puts before
        weights[:] = [{name: state[name] for name in trained} for state in bare]

    def load_trained(modules: list[nn.Module], folder: str) -> None:
        saved = load_file(Path(folder) / "model.safetensors")
        if saved.keys() != trained:
            raise ValueError(f"{folder}: expected the {len(trained)} trained tensors of this run, got {len(saved)} others")
        for wrapped in modules:
            accelerator.unwrap_model(wrapped).load_state_dict(saved, strict=False)
        modules.clear()

    accelerator.register_save_state_pre_hook(save_trained)
    accelerator.register_load_state_pre_hook(load_trained)


def steps(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def restore(accelerator: Accelerator, run: Path) -> tuple[int, dict[str, list[float]]]:
    """Load the newest checkpoint that is whole, if there is one; returns the number of steps done and the losses seen since the last
    line of stats.jsonl.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    flaws = []
    for folder in reversed(steps(run)):
        if (flaw := _flaw(folder)) is None:
            if accelerator.scaler is not None and not (folder / "scaler.pt").exists():  # of a run that went on in fp16
                torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
            accelerator.load_state(str(folder))
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return int(state["step"]), state["seen"]
        log.warning("%s is left out: %s", folder, flaw)
        flaws.append(f"{folder.name}: {flaw}")
    if flaws:
        raise ValueError(f"{run}: no checkpoint is whole ({'; '.join(flaws)}); delete the folder to begin again")
    return 0, {}


def trim_stats(run: Path, step: int) -> float:
    """Drop the lines of stats.jsonl after `step`, which are about to be written again, and one that a crash cut short; returns the
    seconds up to there."""
    path = run / "stats.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [row for row in (json.loads(line) for line in lines if line.endswith("}\n")) if row["step"] <= step]
    if lines:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1].get("seconds", 0.0) if rows else 0.0
