"""One training loop for the three stages: autoencoder, text-to-image, text-to-video.

Every random number of step k comes from a generator seeded with (seed, k, process, batch), so a resumed run goes on exactly
where it was, and nothing random has to be saved.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_tensorboard_available
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_shift import checkpoint, finetune, models
from latent_shift.config import Config, dump, load
from latent_shift.diffusion import attention_kernel
from latent_shift.stages import AutoencoderStage, DenoiserStage, Stage
from latent_shift.store import write

log = logging.getLogger("latent_shift")


def train(config: Config, run: str | Path, *, report: Callable[[dict], None] | None = None) -> Path:
    """Train one stage in the folder `run`, going on from its newest checkpoint if it has one.

    Args:
        config: what to train. A run that goes on must keep what its weights mean (`Config.identity`); the rest may change.
        run: the run folder (see checkpoint.py). One that has all its steps is exported again.
        report: called with the statistics of every `log_every` steps.

    Returns:
        `run/model`, the exported diffusers folder, or that of a LoRA's file; the run folder if SIGTERM stopped it before its last step.

    Raises:
        ValueError: settings or data that do not fit together, or a run folder that holds another model's run.
        RuntimeError: `train.tensorboard` without TensorBoard.
    """
    run = Path(run)
    if config.train.tensorboard and not is_tensorboard_available():
        raise RuntimeError("train.tensorboard needs TensorBoard: pip install 'latent-shift-video[track]'")
    check_run(config, run)
    AcceleratorState._reset_state()  # another run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.train.precision,
        gradient_accumulation_steps=config.optim.accumulate,
        log_with="tensorboard" if config.train.tensorboard else None,
        project_dir=run,
    )
    torch.manual_seed(config.train.seed)
    ready = finetune.prepare(config, run, device=accelerator.device)
    stage: Stage = AutoencoderStage(ready) if config.stage == "autoencoder" else DenoiserStage(ready)
    if config.train.gradient_checkpointing:
        stage.model.enable_gradient_checkpointing()
    stage.objective.train()
    parameters = [parameter for parameter in stage.objective.parameters() if parameter.requires_grad]
    optimizer = _optimizer(config, parameters)
    ema = EMAModel(parameters, decay=config.optim.ema, use_ema_warmup=True, power=0.75, foreach=True)
    objective, optimizer = accelerator.prepare(stage.objective, optimizer)
    accelerator.register_for_checkpointing(ema)
    checkpoint.leave_out_frozen(accelerator, stage.objective)
    done = checkpoint.restore(accelerator, run)
    if done > config.optim.steps:
        raise ValueError(
            f"{run} has done {done} steps, optim.steps is {config.optim.steps}: expected {done} or more, or another run folder"
        )
    # A checkpoint brings the settings it was saved with; the config's are the ones that count.
    ema.to(accelerator.device)
    ema.decay, accelerator.step = config.optim.ema, 0
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"] = (0.9, config.optim.beta2), config.optim.weight_decay
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        write(run / "config.toml", dump(config))
        seconds = checkpoint.trim_stats(run, done)
        stats = (run / "stats.jsonl").open("a")
    if config.train.tensorboard:
        accelerator.init_trackers("tensorboard")
    size, trained = models.num_parameters(stage.model), sum(parameter.numel() for parameter in parameters)
    log.info("%s: %d of %d parameters, step %d of %d, on %s", config.stage, trained, size, done, config.optim.steps, accelerator.device)

    def draw(batch: int) -> tuple[Tensor, ...]:
        step, part = divmod(batch, config.optim.accumulate)
        return stage.draw(np.random.default_rng([config.train.seed, step, accelerator.process_index, part]))

    def averaged(action: Callable[[], None]) -> None:
        """Run `action` with the averaged weights in the model, on one process."""
        if accelerator.is_main_process:
            ema.store(parameters)
            ema.copy_to(parameters)
            stage.model.eval()
            with accelerator.autocast() if config.stage != "autoencoder" else nullcontext():
                action()
            stage.model.train()
            ema.restore(parameters)
        accelerator.wait_for_everyone()

    def agreed(*flags: bool) -> list[bool]:
        """What is so on one process is so on all: they save and stop together."""
        if accelerator.num_processes == 1:
            return list(flags)
        return accelerator.reduce(torch.tensor(flags, dtype=torch.int32, device=accelerator.device)).bool().tolist()

    stopping = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.set()) if threading.current_thread() is threading.main_thread() else None
    started = saved = began = time.monotonic()
    logged, waited, stop = done, 0.0, False
    seen: defaultdict[str, list[Tensor]] = defaultdict(list)  # stays on the device: reading a number would wait for it
    with ThreadPoolExecutor(1) as loader:
        ahead = loader.submit(draw, done * config.optim.accumulate)
        for step in range(done, config.optim.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            for part in range(config.optim.accumulate):
                start = time.monotonic()
                batch = ahead.result()
                waited += time.monotonic() - start
                ahead = loader.submit(draw, step * config.optim.accumulate + part + 1)
                with accelerator.accumulate(objective), attention_kernel(accelerator.device.type, noise=batch[1]):
                    loss, terms = objective(*(tensor.to(accelerator.device) for tensor in batch))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        terms["grad_norm"] = accelerator.clip_grad_norm_(parameters, config.optim.grad_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                for name, value in {"loss": loss.detach(), **terms}.items():
                    seen[name].append(value)
            ema.step(parameters)

            count = step + 1
            if count % config.train.log_every == 0 or count == config.optim.steps:
                elapsed, num = time.monotonic() - began, count - logged
                rate = num * config.optim.accumulate * config.data.batch_size * accelerator.num_processes / elapsed
                row = {"step": count, **{name: float(torch.stack(values).mean()) for name, values in seen.items()}}
                row |= {
                    "seconds": seconds + time.monotonic() - started,
                    "lr": group["lr"],
                    "clips_per_s": rate,
                    "data_wait_s": waited,
                    "eta_s": (config.optim.steps - count) * elapsed / num,
                }
                if accelerator.is_main_process:
                    stats.write(json.dumps(row) + "\n")
                    stats.flush()
                    accelerator.log(row, step=count)
                    if report:
                        report(row)
                began, logged, waited = time.monotonic(), count, 0.0
                seen.clear()
            if count % config.train.sample_every == 0:
                averaged(partial(stage.sample, run / "samples", count))
            due, stop = agreed(time.monotonic() - saved > 60 * config.train.checkpoint_minutes, stopping.is_set())
            if due or stop or count == config.optim.steps:
                checkpoint.save(accelerator, run, count, keep=config.train.keep_checkpoints)
                saved = time.monotonic()
            if stop:
                break
    if previous is not None:
        signal.signal(signal.SIGTERM, previous)
    if stop:
        log.warning("stopped by SIGTERM at step %d of %d; the same command goes on from there", count, config.optim.steps)
    else:
        averaged(partial(stage.export, run / "model"))
    accelerator.end_training()
    return run if stop else run / "model"


def check_run(config: Config, run: str | Path) -> None:
    """Raise ValueError if the folder `run` holds a run whose weights mean something else."""
    if (Path(run) / "config.toml").exists():
        before = load(Path(run) / "config.toml")
        changed = [name for name, value in before.identity().items() if config.identity()[name] != value]
        if changed:
            raise ValueError(f"{run} holds a run with another {', '.join(changed)}; choose another folder with --run")


def _optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options: dict[str, Any] = dict(lr=config.optim.lr, betas=(0.9, config.optim.beta2), weight_decay=config.optim.weight_decay)
    if config.optim.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optim.optimizer=adamw8bit needs the extra: pip install 'latent-shift-video[finetune]'") from error
    return AdamW8bit(parameters, **options)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to `optim.lr`, constant, and a linear fall to 0 over the last `cooldown_steps`."""
    optim = config.optim
    up = (step + 1) / max(1, optim.warmup_steps)
    down = (optim.steps - step) / max(1, optim.cooldown_steps)
    return optim.lr * min(1.0, up, down)
