"""One training loop for the three stages: autoencoder, text-to-image, text-to-video.

A stage brings an objective (a module whose forward is the loss), draws its batches, and knows how to show and export what
it has learned. The loop knows steps, not data. Every random number of step k comes from a generator seeded with
(seed, k, process, batch), so a resumed run goes on exactly where it was, and nothing random has to be saved.
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, ModelMixin, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from latent_shift import autoencoder, checkpoint, data, models, video
from latent_shift.config import Config, dump, load
from latent_shift.diffusion import DenoisingObjective, noise_schedule
from latent_shift.encode import LatentStore
from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.shift import Shift, inflate, share_text

log = logging.getLogger("latent_shift")


class Stage(Protocol):
    @property
    def objective(self) -> nn.Module: ...  # forward(*batch) -> (loss, terms)
    @property
    def model(self) -> ModelMixin: ...  # what is trained, averaged and exported

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, ...]: ...
    def sample(self, folder: Path, step: int) -> None: ...
    def export(self, folder: Path) -> None: ...


class AutoencoderStage:
    """Random crops of random frames, every concept as often as any other."""

    def __init__(self, config: Config):
        self.config = config
        self.store = data.Store(config.data.path)
        self.sampler = data.BalancedSampler(self.store.records, self.store.select(splits=config.data.splits))
        init = config.model.init
        self.model = AutoencoderKL.from_pretrained(init) if init else models.autoencoder(str(config.model.size))
        self.objective = autoencoder.AutoencoderObjective(self.model, kl=config.loss.kl, perceptual=config.loss.perceptual)

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        crop = min(self.config.data.crop, *self.store.array.shape[1:3])
        crops = np.empty((self.config.data.batch_size, crop, crop, 3), np.uint8)
        for row, index in enumerate(self.sampler.draw(rng, len(crops))):
            frame = self.store.draw_window(rng, index, 1)[0]
            top, left = rng.integers(frame.shape[0] - crop + 1), rng.integers(frame.shape[1] - crop + 1)
            crops[row] = frame[top : top + crop, left : left + crop]
        noise = rng.standard_normal((len(crops), self.model.config.latent_channels, crop // 8, crop // 8), np.float32)
        return autoencoder.to_pixels(torch.from_numpy(crops)), torch.from_numpy(noise)

    def _frames(self, num: int) -> Tensor:
        rng = np.random.default_rng(0)
        return torch.from_numpy(np.concatenate([self.store.draw_window(rng, i, 1) for i in self.sampler.draw(rng, num)]))

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> None:
        """Eight frames above their reconstructions."""
        frames = self._frames(8)
        pixels = autoencoder.to_pixels(frames).to(self.model.device)
        decoded = autoencoder.to_frames(self.model.decode(self.model.encode(pixels).latent_dist.mean).sample.cpu())
        sheet = video.montage(torch.cat([frames, decoded]).numpy(), columns=8)
        video.write(sheet[None], folder / f"{step:08d}.png")

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        frames = autoencoder.to_pixels(self._frames(512)).to(self.model.device)
        latents = torch.cat([self.model.encode(batch).latent_dist.mean.cpu() for batch in frames.split(16)])
        plain = AutoencoderKL.from_config(self.model.config)
        plain.load_state_dict(self.model.state_dict())
        autoencoder.whiten(plain, latents)
        plain.save_pretrained(folder)


class DenoiserStage:
    """Text to image (one frame a clip) and text to video: the same U-Net, the same objective, more frames.

    With `data.image_share` some steps of the video stage train on as many single frames instead: the network stays an image model.
    """

    def __init__(self, config: Config):
        self.config = config
        self.store = LatentStore(config.data.path)
        self.samplers = {
            num_frames: data.BalancedSampler(self.store.records, self.store.select(splits=config.data.splits, num_frames=num_frames))
            for num_frames in {1, config.data.num_frames}
        }
        init = config.model.init
        sample_size = self.store.info["shape"][-1]
        self.model = (
            UNet2DConditionModel.from_pretrained(init, subfolder="unet", dtype=torch.float32)
            if init
            else models.unet(str(config.model.size), sample_size=sample_size)
        )
        self.shift = Shift(config.model.forward, config.model.backward, config.model.place, config.model.edge)
        inflate(self.model, self.shift)
        share_text(self.model)
        options = config.diffusion
        self.schedule = noise_schedule(
            prediction=options.prediction,
            schedule=options.schedule,
            num_timesteps=options.num_timesteps,
            zero_terminal_snr=options.zero_terminal_snr,
        )
        self.objective = DenoisingObjective(self.model, self.schedule, min_snr=options.min_snr)

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Latents, noise `(B, F, C, h, w)`, timesteps `(B,)`, text `(B, L, D)`."""
        num_clips, num_frames = self.config.data.batch_size, self.config.data.num_frames
        if num_frames > 1 and rng.random() < self.config.data.image_share:
            num_clips, num_frames = num_clips * num_frames, 1
        indices = self.samplers[num_frames].draw(rng, num_clips)
        moments = np.stack([self.store.draw_window(rng, index, num_frames) for index in indices]).astype(np.float32)
        mean, std = moments[:, :, 0], moments[:, :, 1]
        latents = mean + std * rng.standard_normal(mean.shape, np.float32)
        noise = rng.standard_normal(mean.shape, np.float32)
        timesteps = rng.integers(self.config.diffusion.num_timesteps, size=num_clips)
        captions = [self.store.caption(rng, index) for index in indices]
        emptied = rng.random(num_clips) < self.config.diffusion.caption_dropout
        text = self.store.embeddings[np.where(emptied, 0, captions)].astype(np.float32)
        return tuple(torch.from_numpy(array) for array in (latents, noise, timesteps, text))

    def pipeline(self) -> LatentShiftPipeline:
        folder = self.store.folder
        solver = {"algorithm_type": "sde-dpmsolver++"} if self.config.diffusion.zero_terminal_snr else {}
        return LatentShiftPipeline(
            vae=AutoencoderKL.from_pretrained(folder / "autoencoder", dtype=torch.float32),
            text_encoder=AutoModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            unet=self.model,
            scheduler=DPMSolverMultistepScheduler.from_config(self.schedule.config, **solver),
            latent_shift={
                "num_frames": self.config.data.num_frames,
                "fps": self.store.info["fps"],
                "num_inference_steps": 20,
                "guidance_scale": 4.0,
            },
        )

    def sample(self, folder: Path, step: int) -> None:
        """The first captions of eight training records and of four that were held out, a row of frames each."""
        records = self.store.records
        rng = np.random.default_rng(0)
        seen = self.samplers[self.config.data.num_frames].draw(rng, 8)
        held = [index for index, record in enumerate(records) if record.split != "train"]
        held = [held[index] for index in rng.choice(len(held), size=min(4, len(held)), replace=False)]
        prompts = [records[index].texts[0] for index in seen + held]
        pipe = self.pipeline().to(self.model.device)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        clips = pipe(prompts, generator=generators).frames
        tiles = (clips[:, :: max(1, clips.shape[1] // 8)] * 255).round().astype(np.uint8)
        sheet = video.montage(tiles.reshape(-1, *tiles.shape[2:]), columns=tiles.shape[1] if tiles.shape[1] > 1 else 4)
        video.write(sheet[None], folder / f"{step:08d}.png")

    def export(self, folder: Path) -> None:
        """A half-precision pipeline folder; diffusers' StableDiffusionPipeline reads it too."""
        pipe = self.pipeline()
        pipe.unet = copy.deepcopy(self.model)  # the averaged weights; the ones in training stay float32
        pipe.vae.half(), pipe.text_encoder.half(), pipe.unet.half()
        pipe.save_pretrained(folder)


def train(config: Config, run: str | Path, *, report: Callable[[dict], None] | None = None) -> Path:
    """Train one stage in the folder `run`, going on from its newest checkpoint if it has one.

    Args:
        config: what to train. A run that goes on must keep its stage and model; the rest may change.
        run: the run folder (see checkpoint.py).
        report: called with the statistics of every `log_every` steps.

    Returns:
        The exported diffusers folder, `run/model`.

    Raises:
        ValueError: settings or data that do not fit together, or a run folder that holds another model's run.
    """
    run = Path(run)
    if (run / "config.toml").exists():
        before = load(run / "config.toml")
        if (before.stage, before.model) != (config.stage, config.model):
            raise ValueError(f"{run} holds a run of stage {before.stage} with other [model] settings; choose another run folder")
    accelerator = Accelerator(
        mixed_precision=config.train.precision,
        gradient_accumulation_steps=config.optim.accumulate,
        log_with="tensorboard" if config.train.tensorboard else None,
        project_dir=run,
    )
    torch.manual_seed(config.train.seed)
    stage: Stage = AutoencoderStage(config) if config.stage == "autoencoder" else DenoiserStage(config)
    if config.train.gradient_checkpointing:
        stage.model.enable_gradient_checkpointing()
    stage.objective.train()
    parameters = list(stage.objective.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.optim.lr, betas=(0.9, config.optim.beta2), weight_decay=config.optim.weight_decay, fused=True
    )
    ema = EMAModel(parameters, decay=config.optim.ema, use_ema_warmup=True, power=0.75, foreach=True)
    ema.to(accelerator.device)
    objective, optimizer = accelerator.prepare(stage.objective, optimizer)
    accelerator.register_for_checkpointing(ema)
    done = checkpoint.restore(accelerator, run)
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.toml").write_text(dump(config))
        stats = (run / "stats.jsonl").open("a")
    if config.train.tensorboard:
        accelerator.init_trackers("tensorboard")
    log.info(
        "%s: %d parameters, step %d of %d, on %s",
        config.stage,
        models.num_parameters(stage.model),
        done,
        config.optim.steps,
        accelerator.device,
    )

    def draw(batch: int) -> tuple[Tensor, ...]:
        step, part = divmod(batch, config.optim.accumulate)
        return stage.draw(np.random.default_rng([config.train.seed, step, accelerator.process_index, part]))

    def averaged(action: Callable[[], None]) -> None:
        """Run `action` with the averaged weights in the model, on one process."""
        if accelerator.is_main_process:
            ema.store(parameters)
            ema.copy_to(parameters)
            stage.model.eval()
            action()
            stage.model.train()
            ema.restore(parameters)
        accelerator.wait_for_everyone()

    stopping = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.set()) if threading.current_thread() is threading.main_thread() else None
    saved, began, logged, waited = time.monotonic(), time.monotonic(), done, 0.0
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
                with accelerator.accumulate(objective):
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
            due = time.monotonic() - saved > 60 * config.train.checkpoint_minutes
            if due or stopping.is_set() or count == config.optim.steps:
                checkpoint.save(accelerator, run, count, keep=config.train.keep_checkpoints)
                saved = time.monotonic()
            if stopping.is_set():
                break
    if previous is not None:
        signal.signal(signal.SIGTERM, previous)
    if stopping.is_set():
        log.warning("stopped by SIGTERM at step %d of %d; the same command goes on from there", count, config.optim.steps)
    else:
        averaged(partial(stage.export, run / "model"))
    accelerator.end_training()
    return run / "model"


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to `optim.lr`, constant, and a linear fall to 0 over the last `cooldown_steps`."""
    optim = config.optim
    up = (step + 1) / max(1, optim.warmup_steps)
    down = (optim.steps - step) / max(1, optim.cooldown_steps)
    return optim.lr * min(1.0, up, down)
