"""Checkpoints in the run folder. A crash at any moment loses minutes of a run, never the run.

run/
  config.toml            every setting with its default; `latent-shift train run` resumes from it
  stats.jsonl            a line every `train.log_every` steps; `seconds` is the time of the run so far, with
                         sampling and saving
  samples/               pictures and clips sampled during training
  checkpoints/step-*/    weights and averaged weights (safetensors), optimizer states (PyTorch's format); a
                         sharded run has weights and optimizer in `sharded/`, one file a process; state.json
                         lists every file with its size and is written last
  model/                 the averaged weights as a diffusers folder when the run is finished; a LoRA's file
  .latent-shift.json, .lock  the folder is a run's, and which process trains in it (see folders.py)
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from latent_shift.config import Config
from latent_shift.data import shards
from latent_shift.files import check_schema, parse_json, read_bytes, read_json_object, write_text
from latent_shift.models.loading import one_line_errors
from latent_shift.recipe import dump, load
from latent_shift.training import fsdp
from latent_shift.training.ema import EMA

log = logging.getLogger("latent_shift")

KIND = "a training run"
"""What the marker of a run folder says."""


def write_config(config: Config, run: Path) -> None:
    """Write the settings, so that from here on the folder alone is enough to resume. A file that has them already stays,
    with its comments."""
    path, config = run / "config.toml", without_secrets(config)
    try:
        if load(path) == config:
            return
    except (OSError, ValueError):
        pass
    write_text(path, dump(config))


def without_secrets(config: Config) -> Config:
    """Return the settings without passwords and signatures in the address of the data, as they may be passed on."""
    data = config.data.model_copy(update={"path": shards.without_secrets(config.data.path)})
    return config.model_copy(update={"data": data})


def save(
    accelerator: Accelerator, run: Path, step: int, *, keep: int, losses: dict[str, list[float]]
) -> Path:
    """Write the checkpoint of `step` aside, rename it into place, and delete all but the newest `keep`.

    Checkpoints after `step` are deleted too: they are corrupt, and the run skipped them when it resumed.

    Args:
        losses: the losses that have no line in stats.jsonl yet, by name.

    Raises:
        OSError: the checkpoint could not be written, for example because the disk is full; earlier
            checkpoints are unchanged.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    if accelerator.is_main_process:
        # A run that was killed while saving leaves one.
        for leftover in _own_folders(run, r"\.step-(\d{8,})\.partial"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_manifest(partial, step, losses)
    except Exception as error:  # every library raises its own class for a file that cannot be written
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
            raise  # out of memory
        complete = [folder.name for folder in steps(run) if find_corruption(folder) is None]
        remaining = (
            f"{complete[-1]} is complete, and the same command resumes from it"
            if complete
            else "there is no earlier checkpoint"
        )
        raise OSError(f"{run}: step {step} could not be saved ({error}); {remaining}") from error
    if accelerator.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        newest = [folder for folder in steps(run) if folder <= target and find_corruption(folder) is None][
            -keep:
        ]
        for folder in steps(run):
            if folder not in newest:
                shutil.rmtree(folder)
    return target


def _write_manifest(folder: Path, step: int, losses: dict[str, list[float]]) -> None:
    """Flush every file to the disk, then write state.json, whose presence marks a complete checkpoint."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("r+b") as file:  # Windows flushes only files opened for writing
            os.fsync(file.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_text(folder / "state.json", json.dumps({"step": step, "sizes": sizes, "seen": losses}))


class State(BaseModel):
    """state.json of a checkpoint: its step, the sizes of its files, and the losses that have no line in stats.jsonl
    yet."""

    model_config = ConfigDict(strict=True)
    step: int = Field(ge=0)
    sizes: dict[str, int]
    seen: dict[str, list[float]]


def _read_state(folder: Path) -> State:
    """Read the state.json of a checkpoint; raise ValueError of one line if it is not one."""
    state = read_json_object(folder / "state.json")
    check_schema(state, State, folder / "state.json")
    return State(**state)


def find_corruption(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        state = _read_state(folder)
    except (OSError, ValueError) as error:
        return f"state.json cannot be read ({error})"
    for name, expected in state.sizes.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size != expected:
            return f"{name} has {size} bytes of {expected}"
    return None


def register_ema(accelerator: Accelerator, ema: EMA, names: list[str]) -> None:
    """Save and load the averaged weights, by the names of their parameters, with the accelerator's
    checkpoints.

    Checkpoints with another kind of average load too: it then counts as the average of the steps so far.
    """

    def save_averages(modules: list[nn.Module], weights: list[dict], folder: str) -> None:
        tensors = fsdp.gather_tensors(zip(names, ema.averages, strict=True), keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            save_file(tensors, Path(folder) / "average.safetensors", metadata={"steps": str(ema.num_steps)})

    def load_averages(modules: list[nn.Module], folder: str) -> None:
        with safe_open(Path(folder) / "average.safetensors", framework="pt") as file:
            for name, tensor in zip(names, ema.averages, strict=True):
                fsdp.copy_into_shard(file.get_tensor(name), tensor)
            ema.num_steps = int(file.metadata()["steps"])

    accelerator.register_save_state_pre_hook(save_averages)
    accelerator.register_load_state_pre_hook(load_averages)


def skip_frozen(accelerator: Accelerator, module: nn.Module) -> None:
    """Save and load trained parameters alone: megabytes of a LoRA instead of the gigabytes of the model
    under it."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if len(trained) == len(list(module.parameters())):
        return

    def save_trained(modules: list[nn.Module], weights: list[dict], folder: str) -> None:
        # DDP's prefix.
        states = [
            {name.removeprefix("module."): tensor for name, tensor in state.items()} for state in weights
        ]
        weights[:] = [{name: state[name] for name in trained} for state in states]

    def load_trained(modules: list[nn.Module], folder: str) -> None:
        tensors = load_file(Path(folder) / "model.safetensors")
        if tensors.keys() != trained:
            raise ValueError(
                f"{folder}: expected the {len(trained)} trained tensors of this run, got {len(tensors)} others"
            )
        for wrapped in modules:
            accelerator.unwrap_model(wrapped).load_state_dict(tensors, strict=False)
        modules.clear()

    accelerator.register_save_state_pre_hook(save_trained)
    accelerator.register_load_state_pre_hook(load_trained)


def steps(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    return _own_folders(run, r"step-(\d{8,})")


def _own_folders(run: Path, pattern: str) -> list[Path]:
    """Return the folders among the checkpoints with names that a run gives, by step; no other is ever
    deleted."""
    matches = [(re.fullmatch(pattern, path.name), path) for path in (run / "checkpoints").glob("*")]
    return [
        path
        for _, path in sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())
    ]


def is_run(folder: Path) -> bool:
    """Recognise a run folder from before folders were marked: a valid config.toml beside checkpoints."""
    if not steps(folder):
        return False
    try:
        load(folder / "config.toml")
    except ValueError:
        return False
    return True


def restore(accelerator: Accelerator, run: Path) -> tuple[int, dict[str, list[float]]]:
    """Load the newest complete checkpoint, if there is one.

    Returns:
        The number of steps done, and the losses that have no line in stats.jsonl yet.

    Raises:
        ValueError: there are checkpoints, but none is complete, or the newest has the sizes that it should and is
            damaged inside.
    """
    problems = []
    for folder in reversed(steps(run)):
        if (problem := find_corruption(folder)) is None:
            # The run had another precision before.
            if accelerator.scaler is not None and not (folder / "scaler.pt").exists():
                torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
            with one_line_errors(
                folder,
                "a checkpoint with these settings; if it is damaged, move it away to resume from the one before",
            ):
                accelerator.load_state(str(folder))
            state = _read_state(folder)
            return state.step, state.seen
        log.warning("%s is skipped: %s", folder, problem)
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise ValueError(
            f"{run}: no checkpoint is complete ({'; '.join(problems)}); delete the folder to start again"
        )
    return 0, {}


def has_only_skipped_steps(run: Path) -> bool:
    """Return whether every step in stats.jsonl had no finite gradient; True of an empty one."""
    return all(row.get("skipped") == 1 for row in _read_stats(run))


def _read_stats(run: Path) -> list[dict]:
    """Return the complete lines of stats.jsonl."""
    path = run / "stats.jsonl"
    text = read_bytes(path).decode(errors="replace") if path.exists() else ""
    return [row for line in text.splitlines(keepends=True) if (row := _parse_row(line)) is not None]


def trim_stats(run: Path, step: int) -> float:
    """Delete the lines of stats.jsonl after `step`, which will be written again, and a truncated last line.

    Returns:
        The run's time in seconds up to `step`.
    """
    path = run / "stats.jsonl"
    rows = [row for row in _read_stats(run) if row["step"] <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1].get("seconds", 0.0) if rows else 0.0


def _parse_row(line: str) -> dict | None:
    """Return a row of stats.jsonl, or None for a line that a crash or another program damaged."""
    try:
        row = parse_json(line) if line.endswith("\n") else None
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if isinstance(row.get("seconds", 0.0), (int, float)) else None
