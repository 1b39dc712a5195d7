"""The run folder: what a training run leaves on disk, written so that a crash at any moment loses minutes, never the run.

run/
  config.toml            every setting, defaults written out; `latent-shift train run` resumes from it
  stats.jsonl            a line every `log_every` steps; `seconds` is the run's time so far, sampling and saving included
  samples/               pictures and clips drawn while it trains
  checkpoints/step-*/    weights (safetensors); averaged weights and optimizer state (PyTorch's own format)
  model/                 the averaged weights as a diffusers folder, when the run is done; of a LoRA its file
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from latent_shift.store import write


def save(accelerator: Accelerator, run: Path, step: int, *, keep: int) -> Path:
    """Write checkpoint `step` aside, rename it into place, and delete all but the newest `keep`."""
    target = run / "checkpoints" / f"step-{step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "state.json").write_text(json.dumps({"step": step}))
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        for old in steps(run)[:-keep]:
            shutil.rmtree(old)
    return target


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


def restore(accelerator: Accelerator, run: Path) -> int:
    """Load the newest checkpoint, if there is one; returns the number of steps done."""
    found = steps(run)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(json.loads((found[-1] / "state.json").read_text())["step"])


def trim_stats(run: Path, step: int) -> float:
    """Drop the lines of stats.jsonl after `step`, which are about to be written again, and one that a crash cut short; returns the
    seconds up to there."""
    path = run / "stats.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [row for row in (json.loads(line) for line in lines if line.endswith("}\n")) if row["step"] <= step]
    if lines:
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1].get("seconds", 0.0) if rows else 0.0
