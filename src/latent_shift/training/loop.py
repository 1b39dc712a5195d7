"""The training loop of all stages: autoencoder, text to image, text to video.

The random numbers of a batch come from a generator seeded with (seed, step, part), where part counts the
batches of a step over processes and accumulation. So a resumed run continues exactly without saving random
states, and two processes train as one process that accumulates twice as many batches.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import Tensor, nn

from latent_shift.config import Config
from latent_shift.files import move_files
from latent_shift.folders import check_own, output_folder
from latent_shift.models import sizes
from latent_shift.runtime import peak_memory_gib, rank, resolve_device, world_size
from latent_shift.training import checkpoint, checks, fsdp, prepare
from latent_shift.training import optimizer as optim
from latent_shift.training.distillation import DistillationStage
from latent_shift.training.ema import EMA
from latent_shift.training.memory import suggest_smaller_settings
from latent_shift.training.objectives import attention_kernel
from latent_shift.training.optimizer import set_learning_rate
from latent_shift.training.stages import AutoencoderStage, DenoiserStage, Stage
from latent_shift.training.tiny_autoencoder import TinyAutoencoderStage

log = logging.getLogger("latent_shift")

Report = Callable[[dict], None]
STAGES: dict[str, type[AutoencoderStage] | type[DenoiserStage]] = {
    "autoencoder": AutoencoderStage, "tiny_autoencoder": TinyAutoencoderStage, "image": DenoiserStage, "video": DenoiserStage, "distill": DistillationStage
}  # fmt: skip


def train(
    config: Config, run: str | Path, *, report: Report | None = None, on_prepared: Callable[[prepare.Prepared], None] | None = None,
    progress: prepare.Progress | None = None, force: bool = False,
) -> Path:  # fmt: skip
    """Train one stage in the folder `run`, or resume it from its newest checkpoint.

    Args:
        config: the settings. A resumed run must keep those of `Config.identity`; the others may change.
        run: the run folder (see checkpoint.py). A finished run is exported again.
        report: called with every line of stats.jsonl.
        on_prepared: called with the prepared sources before the first step.
        progress: opens a progress bar of a title, for packing and encoding.
        force: write into a folder that holds something else.

    Returns:
        `run/model`, the exported diffusers folder or the folder of a LoRA's file; `run` if SIGTERM or Ctrl-C
        stopped the run before its last step.

    Raises:
        ValueError: settings or data that do not fit together, or a run folder that holds another run or
            something else, or that another process uses.
        RuntimeError: the package of `train.tracker` is missing; out of memory, no finite gradient for many
            steps, or none in the whole run, with what to lower.
        OSError: a checkpoint could not be written; earlier ones are complete.
    """
    run = Path(run)
    ownership: dict[str, Any] = dict(kind=checkpoint.KIND, force=force, is_own=checkpoint.is_run)
    if rank() == 0:
        check_own(run, **ownership)
    if (
        not force
        and not checkpoint.steps(run)
        and (run / "model").is_dir()
        and any((run / "model").iterdir())
    ):
        raise ValueError(
            f"{run}: holds a model, but no checkpoint to go on from; choose another folder, or use --force to train from the start"
        )
    checks.check_settings(config, run)
    with output_folder(run, **ownership) if rank() == 0 else nullcontext():
        try:
            if rank() == 0:
                checkpoint.write_config(config, run)
            prepared = prepare.prepare(config, run, device=resolve_device(), progress=progress)
            if on_prepared and rank() == 0:
                on_prepared(prepared)
            return run_steps(create_state(config, prepared, run), report)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not should_reduce_batch_size(error):
                raise
            raise RuntimeError(f"out of memory: {suggest_smaller_settings(config)} ({error})") from error


@dataclass
class TrainState:
    """A run in progress. Losses stay on the device: reading a number would make the host wait for it."""

    config: Config
    run: Path
    accelerator: Accelerator
    stage: Stage
    objective: nn.Module  # the stage's, as accelerate wraps it
    parameters: list[nn.Parameter]  # those that are trained
    optimizer: torch.optim.Optimizer
    ema: EMA
    step: int = 0  # steps done
    # Since the last line of stats.jsonl.
    losses: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    skipped_in_a_row: Tensor | float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)  # set by SIGTERM or Ctrl-C

    # For statistics, and to know when a checkpoint is due.
    first_step: int = 0  # of this process
    previous_seconds: float = 0.0  # of the run in earlier processes
    data_wait_s: float = 0.0  # since the last line
    logged_step: int = 0
    started_at: float = field(default_factory=time.monotonic)
    logged_at: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    next_sync_step: int = 0

    @property
    def is_done(self) -> bool:
        return self.step == self.config.optim.steps


def run_steps(state: TrainState, report: Report | None = None) -> Path:
    """Train to the last step, or until SIGTERM or Ctrl-C; export the averaged weights at the end."""
    config, settings = state.config, state.config.train
    stopped = False
    with _set_on_signal(state.stop), ThreadPoolExecutor(config.data.loaders) as loader:
        batches = prefetch_batches(state, loader)
        while not state.is_done and not stopped:
            train_step(state, batches)
            validates = bool(config.data.val_splits) and (
                state.step % settings.validate_every == 0 or state.is_done
            )
            if validates:
                state.losses["val_loss"] = [validate(state)]
            if state.step % settings.log_every == 0 or validates or state.is_done:
                log_row(state, report)
            if state.step % settings.sample_every == 0:
                write_samples(state)
            stopped = maybe_checkpoint(state)
    if stopped:
        log.warning(
            "stopped by a signal at step %d of %d; the same command resumes from there",
            state.step,
            config.optim.steps,
        )
    else:
        export(state)
    state.accelerator.end_training()
    return state.run if stopped else state.run / "model"


def train_step(state: TrainState, batches: Iterator[tuple[Tensor, ...]]) -> None:
    """Take one optimizer step on the gradients of `optim.accumulate` batches, and update the averaged
    weights."""
    config, accelerator, optimizer = state.config, state.accelerator, state.optimizer
    set_learning_rate(optimizer, config, state.step)
    for _ in range(config.optim.accumulate):
        batch = next(batches)
        with (
            accelerator.accumulate(state.objective),
            attention_kernel(accelerator.device.type, noise=batch[1]),
        ):
            loss, terms = forward(state, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(state.parameters, config.optim.grad_clip)
                terms["grad_norm"] = fsdp.full_tensor(norm)
                terms["skipped"] = optim.step_if_finite(optimizer, terms["grad_norm"], config)
                state.skipped_in_a_row = (state.skipped_in_a_row + 1) * terms["skipped"]
                optimizer.zero_grad()
        for name, value in {"loss": loss.detach(), **terms}.items():
            state.losses[name].append(value)
    state.ema.update()
    state.step += 1


def forward(state: TrainState, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch and its terms, in the run's precision."""
    with state.accelerator.autocast():
        return state.objective(*(tensor.to(state.accelerator.device) for tensor in batch))


def draw_batch(state: TrainState, number: int) -> tuple[Tensor, ...]:
    """Return batch `number` of this process, counted from the start of the run."""
    accelerator = state.accelerator
    step, part = divmod(number, state.config.optim.accumulate)
    seed = [state.config.train.seed, step, part * accelerator.num_processes + accelerator.process_index]
    return state.stage.draw_batch(np.random.default_rng(seed))


def prefetch_batches(state: TrainState, loader: ThreadPoolExecutor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of the remaining steps, drawn `data.loaders` ahead in the threads of `loader`."""
    accumulate = state.config.optim.accumulate
    numbers = iter(range(state.step * accumulate, state.config.optim.steps * accumulate))
    prefetched = deque(
        loader.submit(draw_batch, state, number) for number in islice(numbers, state.config.data.loaders)
    )
    while prefetched:
        start = time.monotonic()
        batch = prefetched.popleft().result()
        state.data_wait_s += time.monotonic() - start
        if (number := next(numbers, None)) is not None:
            prefetched.append(loader.submit(draw_batch, state, number))
        yield batch


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[None]:
    """Use the averaged weights, for inference."""
    precision = nullcontext() if state.config.reads_pixels else state.accelerator.autocast()
    state.stage.model.eval()
    # Validation and sampling run eagerly: their shapes would need graphs of their own, for few calls.
    with state.ema.applied(), torch.no_grad(), precision, torch.compiler.set_stance("force_eager"):
        yield
    state.stage.model.train()


def validate(state: TrainState) -> Tensor:
    """Return the loss of the averaged weights on the held-out splits, on the same clips, noise and timesteps
    every time."""
    process, num_processes = state.accelerator.process_index, state.accelerator.num_processes
    losses = []
    with averaged_weights(state):
        for number in range(
            process, -(-state.config.train.val_batches // num_processes) * num_processes, num_processes
        ):
            # A seed of four numbers is never that of a training batch, which has three.
            batch = state.stage.draw_batch(np.random.default_rng([0, number, 0, 1]), held_out=True)
            loss, terms = forward(state, batch)
            losses.append(terms.get("mse", loss))
    return torch.stack(losses).mean()


def write_samples(state: TrainState) -> None:
    """Sample with the averaged weights, split over the processes, and write the samples to `run/samples`."""
    accelerator = state.accelerator
    with averaged_weights(state):
        parts = gather_object([state.stage.sample(accelerator.process_index, accelerator.num_processes)])
    if accelerator.is_main_process:
        samples = {position: sample for part in parts for position, sample in part.items()}
        state.stage.write_samples(samples, state.run / "samples", state.step)


def log_row(state: TrainState, report: Report | None = None) -> None:
    """Write a line of stats.jsonl: the mean losses since the last line, over all processes, and speed.

    Raises:
        RuntimeError: the last `optim.MAX_SKIPPED_STEPS` steps and more had no finite gradient, or none of a run
            that is done.
    """
    config, accelerator = state.config, state.accelerator
    elapsed, num_steps = time.monotonic() - state.logged_at, state.step - state.logged_step
    means = torch.stack([_finite_mean(values) for values in state.losses.values()])
    row = {
        "step": state.step,
        **dict(zip(state.losses, accelerator.reduce(means, "mean").tolist(), strict=True)),
    }
    if state.skipped_in_a_row >= optim.MAX_SKIPPED_STEPS:
        num_skipped = int(state.skipped_in_a_row)
        raise RuntimeError(
            f"{state.run}: no gradient was finite in the last {num_skipped} steps, to step {state.step}; {optim.DIVERGED}"
        )
    nothing_learned = state.is_done and row["skipped"] == 1
    if accelerator.is_main_process and nothing_learned and checkpoint.has_only_skipped_steps(state.run):
        raise RuntimeError(
            f"{state.run}: no gradient was finite in any of the {state.step} steps, so nothing was learned; {optim.DIVERGED}"
        )
    row |= {
        "lr": state.optimizer.param_groups[0]["lr"],
        "clips_per_s": num_steps
        * config.optim.accumulate
        * config.data.batch_size
        * accelerator.num_processes
        / elapsed,
        "data_wait_s": state.data_wait_s,
        "gib_peak": peak_memory_gib(accelerator.device),
        "eta_s": (config.optim.steps - state.step) * elapsed / num_steps,
    }
    if accelerator.is_main_process:
        row["seconds"] = state.previous_seconds + time.monotonic() - state.started_at
        with (state.run / "stats.jsonl").open("a") as stats:
            stats.write(
                json.dumps({name: value if np.isfinite(value) else None for name, value in row.items()})
                + "\n"
            )
        accelerator.log(row, step=state.step)
        if report:
            report(row)
    state.logged_at, state.logged_step, state.data_wait_s = time.monotonic(), state.step, 0.0
    state.losses.clear()


def _finite_mean(values: list[Tensor]) -> Tensor:
    """Return the mean of the finite values; a skipped step may have none."""
    stacked = torch.stack(values).float()
    return stacked.masked_fill(~stacked.isfinite(), torch.nan).nanmean()


def maybe_checkpoint(state: TrainState) -> bool:
    """Save a checkpoint when due, at the last step, or on a signal; return True if a signal stops the run.

    The processes save and stop together: they synchronize about every two seconds.
    """
    config, accelerator = state.config, state.accelerator
    checkpoint_due, stop = 0.0, 0.0
    if state.step >= state.next_sync_step or state.is_done:
        now = time.monotonic()
        is_due = now - state.saved_at > 60 * config.train.checkpoint_minutes
        seconds_per_step = (now - state.started_at) / (state.step - state.first_step)
        checkpoint_due, stop, seconds_per_step = all_reduce_sum(
            accelerator, is_due, state.stop.is_set(), seconds_per_step
        )
        world = accelerator.num_processes
        state.next_sync_step = state.step + (
            1 if world == 1 else max(1, min(50, int(2 * world / seconds_per_step)))
        )
    if checkpoint_due or stop or state.is_done:
        losses = {name: torch.stack(values).float() for name, values in state.losses.items()}
        pending = {name: accelerator.reduce(values, "mean").tolist() for name, values in losses.items()}
        checkpoint.save(
            accelerator, state.run, state.step, keep=config.train.keep_checkpoints, losses=pending
        )
        state.saved_at = time.monotonic()
    return bool(stop)


def all_reduce_sum(accelerator: Accelerator, *values: float) -> list[float]:
    """Return the sums of numbers over the processes."""
    if accelerator.num_processes == 1:
        return list(values)
    return accelerator.reduce(torch.tensor(values, device=accelerator.device)).tolist()


def export(state: TrainState) -> None:
    """Write the averaged weights as `run/model`: aside first, then file by file into place, so that a model is
    whole and other files in the folder stay.

    Raises:
        OSError: the model could not be written.
    """
    accelerator = state.accelerator
    with averaged_weights(state):
        weights = fsdp.gather_tensors(
            state.stage.model.state_dict().items(), keep=accelerator.is_main_process
        )
        if accelerator.is_main_process:
            partial = state.run / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                state.stage.export(partial, weights)
                move_files(partial, state.run / "model", last="model_index.json")
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"{state.run}: the model could not be written ({error}); the last checkpoint is complete, and the same command writes it"
                ) from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()


def create_state(config: Config, prepared: prepare.Prepared, run: Path) -> TrainState:
    """Build the network, its optimizer and its average, and load the newest checkpoint of the run folder."""
    accelerator = _create_accelerator(config, prepared, run)
    torch.manual_seed(config.train.seed)
    stage: Stage = STAGES[config.stage](config, prepared)
    if config.train.gradient_checkpointing:
        stage.model.enable_gradient_checkpointing()
    stage.objective.train()
    if config.train.compile:
        stage.model.compile(dynamic=False)  # one graph for clips, one for single frames
    objective = stage.objective
    after_shift = optim.names_after_shift(config, objective, stage.model)
    if config.train.shard:
        fsdp.shard(objective, stage.model, accelerator)
    trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    parameters = list(trained.values())
    optimizer = optim.create_optimizer(config, parameters, [trained[name] for name in after_shift])
    if config.train.shard:
        fsdp.register_sharded_state(accelerator, objective, optimizer)
    else:
        objective, optimizer = accelerator.prepare(objective, optimizer)
    ema = EMA(parameters, config.optim.ema)
    checkpoint.register_ema(accelerator, ema, list(trained))
    checkpoint.skip_frozen(accelerator, stage.objective)
    state = TrainState(config, run, accelerator, stage, objective, parameters, optimizer, ema)
    _restore_state(state)
    if config.train.tracker:
        # TensorBoard's project is a folder in the run folder, and it takes no nested settings.
        project, settings = (
            ("latent-shift", checkpoint.without_secrets(config).model_dump())
            if config.train.tracker == "wandb"
            else ("tensorboard", None)
        )
        accelerator.init_trackers(
            project, settings, init_kwargs={"wandb": {"name": run.name, "dir": str(run)}}
        )
    log.info(
        "%s: %d of %d parameters, step %d of %d, %d on %s", config.stage, sum(parameter.numel() for parameter in parameters),
        sizes.num_parameters(stage.model), state.step, config.optim.steps, accelerator.num_processes, accelerator.device,
    )  # fmt: skip
    return state


def _restore_state(state: TrainState) -> None:
    """Load the newest checkpoint of the run folder, if there is one, and start the clocks."""
    config, accelerator, run = state.config, state.accelerator, state.run
    step, pending = checkpoint.restore(accelerator, run)
    if step > config.optim.steps:
        raise ValueError(
            f"{run} has done {step} steps, optim.steps is {config.optim.steps}: expected {step} or more, or another run folder"
        )
    accelerator.step = 0
    # A checkpoint restores the optimizer's settings too, but those of the config count.
    for group in state.optimizer.param_groups:
        group["betas"], group["weight_decay"] = (0.9, config.optim.beta2), config.optim.weight_decay
    if accelerator.is_main_process:
        state.previous_seconds = checkpoint.trim_stats(run, step)
    state.step = state.first_step = state.logged_step = step
    state.next_sync_step = step + 1
    state.losses |= {
        name: [torch.tensor(value, device=accelerator.device) for value in values]
        for name, values in pending.items()
    }
    state.skipped_in_a_row = torch.zeros((), device=accelerator.device)
    state.started_at = state.logged_at = state.saved_at = time.monotonic()


def _create_accelerator(config: Config, prepared: prepare.Prepared, run: Path) -> Accelerator:
    AcceleratorState._reset_state(
        True
    )  # an earlier run of this process had its own precision and process group
    accelerator = Accelerator(
        mixed_precision=prepared.precision,
        gradient_accumulation_steps=config.optim.accumulate,
        log_with=config.train.tracker,
        project_dir=run,
        cpu=resolve_device().type
        == "cpu",  # one decision: accelerate alone would take Apple's GPU, and join no processes on CPUs
    )
    if accelerator.num_processes != world_size():
        raise RuntimeError(
            f"WORLD_SIZE is {world_size()}, but {accelerator.num_processes} processes found each other: start them with torchrun"
        )
    return accelerator


@contextmanager
def _set_on_signal(event: threading.Event) -> Iterator[None]:
    """Set an event on SIGTERM and on Ctrl-C inside the `with` block; a second Ctrl-C ends the process at once.

    Outside of the main thread signals keep their effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        event.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning("interrupted: the run is saved after this step; once more ends it at once")

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # as for a job in the background
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
