"""One training loop for the three stages: autoencoder, text-to-image, text-to-video.

Every random number of step k comes from a generator seeded with (seed, k, batch), the batches of a step being counted over processes
and accumulation. So a resumed run goes on exactly where it was, nothing random has to be saved, and two processes train as one does
that accumulates twice as much.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import EMAModel
from torch import Tensor

from latent_shift.config import Config, dump, load
from latent_shift.files import write_text
from latent_shift.models import sizes
from latent_shift.runtime import has_bf16_units, peak_memory_gib, rank, resolve_device, world_size
from latent_shift.training import checkpoint, fsdp, prepare
from latent_shift.training import optimizer as optim
from latent_shift.training.objectives import attention_kernel
from latent_shift.training.optimizer import learning_rate
from latent_shift.training.stages import AutoencoderStage, DenoiserStage, Stage

log = logging.getLogger("latent_shift")


def train(
    config: Config, run: str | Path, *, report: Callable[[dict], None] | None = None,
    prepared: Callable[[Config], None] | None = None, progress: prepare.Progress | None = None,
) -> Path:  # fmt: skip
    """Train one stage in the folder `run`, going on from its newest checkpoint if it has one.

    Args:
        config: what to train. A run that goes on must keep what its weights mean (`Config.identity`); the rest may change.
        run: the run folder (see checkpoint.py). One that has all its steps is exported again.
        report: called with the statistics of every `log_every` steps.
        prepared: called before the first step with the settings as `finetune.prepare` gives them back.
        progress: opens a progress bar of a name, for packing and encoding.

    Returns:
        `run/model`, the exported diffusers folder, or that of a LoRA's file; the run folder if SIGTERM stopped it before its last step.

    Raises:
        ValueError: settings or data that do not fit together, or a run folder that holds another model's run or another process.
        RuntimeError: `train.tracker` without its package; out of memory, or no finite gradient for many steps, with what to lower.
        OSError: a checkpoint could not be written; those before it are whole.
    """
    run = Path(run)
    check(config)
    check_run(config, run)
    with checkpoint.lock(run) if rank() == 0 else nullcontext():
        try:
            if rank() == 0:
                run.mkdir(parents=True, exist_ok=True)
                write_text(run / "config.toml", dump(config))  # from here on the folder alone says what to go on with
            ready = prepare.prepare(config, run, device=resolve_device(), progress=progress)
            if prepared and rank() == 0:
                prepared(ready)
            return _train(config, ready, run, report)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not should_reduce_batch_size(error):
                raise
            raise RuntimeError(f"out of memory: {advice(config)} ({error})") from error


def check(config: Config) -> None:
    """Raise for what can be told to be wrong before data is read.

    Raises:
        ValueError: a named size that is none, packages that are missing, or settings that this machine cannot do.
        RuntimeError: `train.tracker` without its package.
    """
    tracker, world = config.train.tracker, world_size()
    if tracker and not find_spec(tracker):
        raise RuntimeError(f"train.tracker={tracker} needs its package: pip install 'latent-shift-video[{tracker}]'")
    if config.optim.optimizer == "adamw8bit" and not find_spec("bitsandbytes"):
        raise ValueError("optim.optimizer=adamw8bit needs the extra: pip install 'latent-shift-video[finetune]'")
    if config.lora and not find_spec("peft"):
        raise ValueError("lora needs the extra: pip install 'latent-shift-video[finetune]'")
    if config.train.shard and world == 1:
        raise ValueError("train.shard needs several processes: start the run with torchrun")
    if config.train.precision == "fp16" and resolve_device().type == "cpu":  # which has no gradient scaler
        raise ValueError("train.precision=fp16 needs a GPU; on a CPU take bf16")
    if config.train.precision == "bf16" and resolve_device().type == "cpu" and not has_bf16_units():
        log.warning("this CPU has no units for bf16, in which it is many times slower than in float32: train.precision=auto or no")
    if config.model.size:
        sizes.check_size(config.model.size, autoencoder=config.stage == "autoencoder")


def _train(config: Config, ready: Config, run: Path, report: Callable[[dict], None] | None) -> Path:
    accelerator = _accelerator(ready, run)
    torch.manual_seed(config.train.seed)
    stage: Stage = AutoencoderStage(ready) if config.stage == "autoencoder" else DenoiserStage(ready)
    if config.train.gradient_checkpointing:
        stage.model.enable_gradient_checkpointing()
    stage.objective.train()
    if config.train.compile:
        stage.model.compile(dynamic=False)  # a graph for clips, one for stills
    objective = stage.objective
    if config.train.shard:
        fsdp.shard(objective, stage.model, accelerator)
    trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    parameters = list(trained.values())
    optimizer = optim.make(config, parameters)
    if config.train.shard:
        fsdp.register(accelerator, objective, optimizer)
    else:
        objective, optimizer = accelerator.prepare(objective, optimizer)
    ema = EMAModel(parameters, decay=config.optim.ema, use_ema_warmup=True, power=0.75, foreach=not config.train.shard)
    ema.to(accelerator.device)
    checkpoint.average_too(accelerator, ema, list(trained))
    checkpoint.leave_out_frozen(accelerator, stage.objective)
    done, pending = checkpoint.restore(accelerator, run)
    if done > config.optim.steps:
        raise ValueError(
            f"{run} has done {done} steps, optim.steps is {config.optim.steps}: expected {done} or more, or another run folder"
        )
    # A checkpoint brings the optimizer's settings it was saved with; the config's are the ones that count.
    accelerator.step = 0
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"] = (0.9, config.optim.beta2), config.optim.weight_decay
    if accelerator.is_main_process:
        seconds = checkpoint.trim_stats(run, done)
        stats = (run / "stats.jsonl").open("a")
    if config.train.tracker:
        # TensorBoard's is a folder in the run's and takes no tables of settings.
        told = ("latent-shift", config.model_dump()) if config.train.tracker == "wandb" else ("tensorboard", None)
        accelerator.init_trackers(*told, init_kwargs={"wandb": {"name": run.name, "dir": str(run)}})
    log.info(
        "%s: %d of %d parameters, step %d of %d, %d on %s", config.stage, sum(parameter.numel() for parameter in parameters),
        sizes.num_parameters(stage.model), done, config.optim.steps, accelerator.num_processes, accelerator.device,
    )  # fmt: skip
    world, rank, accumulate = accelerator.num_processes, accelerator.process_index, config.optim.accumulate

    def draw(batch: int) -> tuple[Tensor, ...]:
        step, part = divmod(batch, accumulate)
        return stage.draw(np.random.default_rng([config.train.seed, step, part * world + rank]))

    def forward(tensors: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        with accelerator.autocast():
            return objective(*(tensor.to(accelerator.device) for tensor in tensors))

    @contextmanager
    def averaged() -> Iterator[None]:
        """The averaged weights are the model's."""
        ema.store(parameters)
        ema.copy_to(parameters)
        stage.model.eval()
        precision = accelerator.autocast() if config.stage != "autoencoder" else nullcontext()
        with torch.no_grad(), precision, torch.compiler.set_stance("force_eager"):  # other graphs, each asked for a few times
            yield
        stage.model.train()
        ema.restore(parameters)

    def validate() -> Tensor:
        """The error of the averaged weights on the held-out splits: the same clips, noise and timesteps every time."""
        with averaged():
            losses = []
            for batch in range(rank, -(-config.train.val_batches // world) * world, world):
                tensors = stage.draw(np.random.default_rng([0, batch, 0, 1]), held_out=True)  # of no step: those have three words
                loss, terms = forward(tensors)
                losses.append(terms.get("mse", loss))
        return torch.stack(losses).mean()

    def sample(count: int) -> None:
        """Each process draws its part of the samples."""
        with averaged():
            drawn = gather_object([stage.sample(rank, world)])
        if accelerator.is_main_process:
            stage.show({row: picture for part in drawn for row, picture in part.items()}, run / "samples", count)

    def agreed(*values: float) -> list[float]:
        """Sums over the processes: they save and stop together. To know them the host waits for the device."""
        return list(values) if world == 1 else accelerator.reduce(torch.tensor(values, device=device)).tolist()

    stopping, device, ask = threading.Event(), accelerator.device, done + 1
    started = saved = began = time.monotonic()
    logged, waited, stop, bad = done, 0.0, 0.0, torch.zeros((), device=device)
    seen: defaultdict[str, list[Tensor]] = defaultdict(list)  # stays on the device: reading a number would wait for it
    seen |= {name: [torch.tensor(value, device=device) for value in values] for name, values in pending.items()}
    batches = iter(range(done * accumulate, config.optim.steps * accumulate))
    with handler(stopping), ThreadPoolExecutor(config.data.loaders) as loader:
        ahead = deque(loader.submit(draw, batch) for batch in islice(batches, config.data.loaders))
        for step in range(done, config.optim.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            for _ in range(accumulate):
                start = time.monotonic()
                batch = ahead.popleft().result()
                waited += time.monotonic() - start
                if (number := next(batches, None)) is not None:
                    ahead.append(loader.submit(draw, number))
                with accelerator.accumulate(objective), attention_kernel(accelerator.device.type, noise=batch[1]):
                    loss, terms = forward(batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        terms["grad_norm"] = fsdp.whole(accelerator.clip_grad_norm_(parameters, config.optim.grad_clip))
                        terms["skipped"] = optim.step(optimizer, terms["grad_norm"], config)
                        bad = (bad + 1) * terms["skipped"]
                        optimizer.zero_grad()
                for name, value in {"loss": loss.detach(), **terms}.items():
                    seen[name].append(value)
            ema.step(parameters)

            count = step + 1
            last = count == config.optim.steps
            validated = bool(config.data.val_splits) and (count % config.train.validate_every == 0 or last)
            if validated:
                seen["val_loss"] = [validate()]
            if count % config.train.log_every == 0 or validated or last:
                elapsed, num = time.monotonic() - began, count - logged
                means = torch.stack([_mean(values) for values in seen.values()])
                row = {"step": count, **dict(zip(seen, accelerator.reduce(means, "mean").tolist(), strict=True))}
                if bad >= optim.PATIENCE:
                    raise RuntimeError(f"{run}: of the last {int(bad)} steps, to step {count}, no gradient was finite; {optim.UNSTABLE}")
                row |= {
                    "lr": group["lr"],
                    "clips_per_s": num * accumulate * config.data.batch_size * world / elapsed,
                    "data_wait_s": waited,
                    "gib_peak": peak_memory_gib(accelerator.device),
                    "eta_s": (config.optim.steps - count) * elapsed / num,
                }
                if accelerator.is_main_process:
                    row["seconds"] = seconds + time.monotonic() - started
                    stats.write(json.dumps({name: value if np.isfinite(value) else None for name, value in row.items()}) + "\n")
                    stats.flush()
                    accelerator.log(row, step=count)
                    if report:
                        report(row)
                began, logged, waited = time.monotonic(), count, 0.0
                seen.clear()
            if count % config.train.sample_every == 0:
                sample(count)
            due = 0.0
            if count >= ask or last:
                since = time.monotonic() - saved
                due, stop, pace = agreed(
                    since > 60 * config.train.checkpoint_minutes, stopping.is_set(), (time.monotonic() - started) / (count - done)
                )
                ask = count + (1 if world == 1 else max(1, min(50, int(2 * world / pace))))  # every two seconds
            if due or stop or last:
                values = {name: torch.stack(each).float() for name, each in seen.items()}
                pending = {name: accelerator.reduce(each, "mean").tolist() for name, each in values.items()}
                checkpoint.save(accelerator, run, count, keep=config.train.keep_checkpoints, seen=pending)
                saved = time.monotonic()
            if stop:
                break
    if stop:
        log.warning("stopped by SIGTERM at step %d of %d; the same command goes on from there", count, config.optim.steps)
    else:
        with averaged():
            weights = fsdp.gathered(stage.model.state_dict().items(), accelerator.is_main_process)
            if accelerator.is_main_process:
                stage.export(run / "model", weights)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return run if stop else run / "model"


def _mean(values: list[Tensor]) -> Tensor:
    """Of those that are finite; a step that was left out may have none."""
    stacked = torch.stack(values).float()
    return stacked.masked_fill(~stacked.isfinite(), torch.nan).nanmean()


@contextmanager
def handler(stopping: threading.Event) -> Iterator[None]:
    """SIGTERM sets the event; outside of the main thread it does what it did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _accelerator(config: Config, run: Path) -> Accelerator:
    AcceleratorState._reset_state()  # another run of this process may have had another precision
    world = world_size()
    accelerator = Accelerator(
        mixed_precision=config.train.precision,
        gradient_accumulation_steps=config.optim.accumulate,
        log_with=config.train.tracker,
        project_dir=run,
        cpu=resolve_device().type == "cpu",  # one decision: accelerate alone would take Apple's GPU, and would not join processes on a CPU
    )
    if accelerator.num_processes != world:
        raise RuntimeError(f"WORLD_SIZE is {world}, but {accelerator.num_processes} processes found each other: start them with torchrun")
    return accelerator


def check_run(config: Config, run: str | Path) -> None:
    """Raise ValueError if the folder `run` holds a run whose weights mean something else."""
    if checkpoint.steps(Path(run)):
        before = load(Path(run) / "config.toml")
        changed = [name for name, value in before.identity().items() if config.identity()[name] != value]
        if changed:
            raise ValueError(f"{run} holds a run with another {', '.join(changed)}; choose another folder with --run")


def advice(config: Config) -> str:
    """The settings that would take less memory and fit the others, first those that change nothing in what is learnt."""
    size, frames = config.data.batch_size, config.data.num_frames
    options: list[dict[str, object]] = [
        {"train.gradient_checkpointing": True},
        {"data.batch_size": size // 2, "optim.accumulate": config.optim.accumulate * 2},
        {"train.precision": "bf16"},
        {"optim.optimizer": "adamw8bit"},
        {"lora.rank": 32},
        {"data.num_frames": frames // 2},
    ]
    wanted = [
        not config.train.gradient_checkpointing, size > 1, config.train.precision == "no", config.optim.optimizer == "adamw",
        not config.lora, frames > 1,
    ]  # fmt: skip
    told = []
    for option, useful in zip(options, wanted, strict=True):
        changed = config.with_settings(option) if useful else None
        if changed:
            shown = " ".join(f"{key}={'true' if value is True else value}" for key, value in option.items())
            told.append(shown + (" in another run folder" if changed.identity() != config.identity() else ""))
    return "try, in this order, " + ", ".join(told or ["a smaller model"])
