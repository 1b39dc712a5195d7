"""The stages: the batches, network, samples and export of each. The loop knows steps, not data.

Shapes: B clips of F frames; C channels and h x w of the latents; L tokens, D width of the text embeddings.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from latent_shift import video
from latent_shift.clip_text import share_text
from latent_shift.config import Config
from latent_shift.data.latents import LatentStore
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.shards import without_secrets
from latent_shift.data.store import Store, caption_at_rate, open_pixel_store, text_digest
from latent_shift.diffusion import add_noise, draw_timesteps, schedule_of
from latent_shift.files import check_schema, read_json_object, write_json
from latent_shift.models import autoencoder, sizes
from latent_shift.models.autoencoder import load_autoencoder
from latent_shift.models.channel_cost import cheapest_channels
from latent_shift.models.loading import open_network, open_text_encoder, open_tokenizer
from latent_shift.models.parts import Table, downscale_factor
from latent_shift.models.prompt_syntax import escape_prompt
from latent_shift.noise import correlated_noise
from latent_shift.pipelines.diagnosis import NotFiniteError
from latent_shift.pipelines.lora import add_lora, save_lora
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.runtime import dtype_of, rank, resolve_device, seed
from latent_shift.shift import Shift, inflate, shift_of
from latent_shift.training import checkpoint, checks
from latent_shift.training.objectives import AutoencoderObjective, DenoisingObjective
from latent_shift.training.prepare import Prepared
from latent_shift.video import to_uint8

log = logging.getLogger("latent_shift")

COST_BATCHES = 12
"""Batches of clips on which the cost of shifting each channel is measured."""


class Stage(Protocol):
    """What the loop needs of a stage."""

    @property
    def objective(self) -> nn.Module:
        """Return a module whose `forward(*batch)` gives the loss and its terms."""

    @property
    def model(self) -> ModelMixin:
        """Return the network that is trained, averaged and exported."""

    def draw_batch(self, rng: np.random.Generator, *, held_out: bool = False) -> tuple[Tensor, ...]:
        """Return the objective's arguments for a random batch of the training or the held-out splits."""

    def sample(self, rank: int, world_size: int) -> dict[int, np.ndarray]:
        """Return this process's part of the samples, by their position."""

    def write_samples(self, samples: dict[int, np.ndarray], folder: Path, step: int) -> None:
        """Write the samples of all processes."""

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the model with the given weights."""


class AutoencoderStage:
    """Train an autoencoder on random crops of random frames, with every concept equally likely."""

    def __init__(self, config: Config, prepared: Prepared):
        self.config = config
        self.store = open_pixel_store(prepared.store)
        checks.check_store(config, self.store)
        self.sampler = BalancedSampler(
            self.store, self.store.select(splits=config.data.splits), _concept_weights(config, self.store)
        )
        self.held_out = _held_out_sampler(config, self.store)
        self.objective = self.make_objective(config, prepared)
        self.model = self.objective.vae
        self.factor = downscale_factor(self.model.config)
        checks.check_crop(config, self.store, self.factor)

    def make_objective(self, config: Config, prepared: Prepared) -> Any:
        vae = load_autoencoder(prepared.init) if prepared.init else sizes.autoencoder(str(config.model.size))
        return AutoencoderObjective(vae, kl=config.loss.kl, perceptual=config.loss.perceptual)

    def draw_batch(self, rng: np.random.Generator, *, held_out: bool = False) -> tuple[Tensor, ...]:
        """Return pixels `(B, 3, H, W)` and the noise of their latents `(B, C, h, w)`."""
        crop, sampler = self.config.data.crop, self.held_out if held_out else self.sampler
        assert sampler is not None, "data.val_splits is empty"
        crops = np.empty((self.config.data.batch_size, crop, crop, 3), np.uint8)
        for row, index in enumerate(sampler.draw(rng, len(crops))):
            frame = self.store.draw_window(rng, index, 1)[0]
            top, left = rng.integers(frame.shape[0] - crop + 1), rng.integers(frame.shape[1] - crop + 1)
            crops[row] = frame[top : top + crop, left : left + crop]
        noise = rng.standard_normal(
            (len(crops), self.model.config.latent_channels, crop // self.factor, crop // self.factor),
            np.float32,
        )
        return autoencoder.to_pixels(torch.from_numpy(crops)), torch.from_numpy(noise)

    def _fixed_frames(self, num: int) -> Tensor:
        """Return the same `num` frames every time, `(num, H, W, 3)` uint8."""
        rng = np.random.default_rng(0)
        return torch.from_numpy(
            np.concatenate([self.store.draw_window(rng, i, 1) for i in self.sampler.draw(rng, num)])
        )

    @torch.no_grad()
    def sample(self, rank: int, world_size: int) -> dict[int, np.ndarray]:
        """Return a picture of eight frames above their reconstructions."""
        frames = self._fixed_frames(8)
        reconstructions = self.reconstruct(autoencoder.to_pixels(frames).to(self.model.device))
        rows = [frames, *(autoencoder.to_frames(pixels.cpu()) for pixels in reconstructions)]
        return {0: video.montage(torch.cat(rows).numpy(), columns=8)}

    def reconstruct(self, pixels: Tensor) -> list[Tensor]:
        """Return reconstructions of frames, one row of the samples each."""
        return [self.model.decode(self.model.encode(pixels).latent_dist.mean).sample]

    def write_samples(self, samples: dict[int, np.ndarray], folder: Path, step: int) -> None:
        """Write the picture as a PNG."""
        video.write(samples[0][None], folder / f"{step:08d}.png")

    @torch.no_grad()
    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write an AutoencoderKL whose latents have mean 0 and variance 1 a channel, over 512 frames."""
        plain = AutoencoderKL.from_config(self.model.config)
        plain.load_state_dict(weights)
        plain.to(self.model.device).eval()
        frames = autoencoder.to_pixels(self._fixed_frames(512)).to(self.model.device)
        latents = torch.cat([plain.encode(batch).latent_dist.mean.cpu() for batch in frames.split(16)])
        plain.cpu()
        autoencoder.whiten(plain, latents)
        plain.save_pretrained(folder)


class DenoiserStage:
    """Train a text-to-image or text-to-video U-Net: the same objective on one or on more frames a clip.

    With `data.image_share` some steps of the video stage train on as many single frames instead: the network
    stays an image model.
    """

    def __init__(self, config: Config, prepared: Prepared):
        self.config = config
        self.store = LatentStore(prepared.store)
        checks.check_store(config, self.store)
        num_frames, strides = config.data.num_frames, config.data.strides
        concept_weights = _concept_weights(config, self.store)
        self.samplers = {
            (length, stride): BalancedSampler(
                self.store,
                self.store.select(splits=config.data.splits, num_frames=length, stride=stride),
                concept_weights,
            )
            for length, stride in {(1, 1), *((num_frames, stride) for stride in strides)}
        }
        self.held_out = _held_out_sampler(config, self.store)
        self.stride = strides[0] if num_frames > 1 else 1  # for validation, samples and the exported model
        sample_size = self.store.info["size"] // self.store.info["factor"]
        self.model = open_unet(config, prepared, sample_size=sample_size)
        # The exported model generates at the size of its training.
        self.model.register_to_config(sample_size=sample_size)
        cheapest = config.model.channels == "cheapest" and checks.trained_rule(prepared.init) is None
        if num_frames > 1 and (cheapest or config.model.rule):
            inflate(self.model, self._channels(prepared.run, cheapest=cheapest))
        if config.lora:
            add_lora(self.model, config.lora, dtype=dtype_of(prepared.precision))
        share_text(self.model)
        checks.check_denoiser(self.model, self.store)
        self.schedule = schedule_of(config.diffusion)
        self.objective = self.make_objective(config, prepared)

    def _channels(self, run: Path | None, *, cheapest: bool) -> Shift:
        """Return the shift with the offsets of every channel: of the rule, or by what the channels cost the starting model
        on training clips. A run keeps them in channels.json, because its checkpoints are of these channels.

        Raises:
            ValueError: a run with checkpoints whose channels are others, or unknown.
        """
        shift, file = shift_of(self.model), run / "channels.json" if run else None
        assert shift is not None
        data = without_secrets(self.config.data.path)  # as in prepare.py
        source = {"model": self.config.model.init, "data": data, **shift.to_dict()}
        source = json.loads(json.dumps(source))  # a rule's tuples are lists in the file
        if file is None:
            return self._cheapest_channels(shift) if cheapest else shift
        deadline = time.monotonic() + 3600
        while rank() > 0 and _read_channels(file, source) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{file}: the first process has not written it; do the processes share a disk?"
                )
            time.sleep(0.2)  # until the first process has measured them
        if (rule := _read_channels(file, source)) is not None:
            return shift.with_rule(rule)
        if checkpoint.steps(file.parent):
            raise ValueError(
                f"{file.parent} has checkpoints of other channels than model.rule and {file.name} give now; choose another folder with --run"
            )
        shift = self._cheapest_channels(shift) if cheapest else shift
        write_json({"source": source, "rule": shift.rule}, file)
        return shift

    def _cheapest_channels(self, shift: Shift) -> Shift:
        """Return the shift with the channels that cost the starting model least on training clips."""
        num_frames, device = self.config.data.num_frames, resolve_device()
        log.info("measures what shifting each channel costs, on %d batches", COST_BATCHES)

        def denoise_clips() -> None:
            schedule = schedule_of(self.config.diffusion)
            for number in range(COST_BATCHES):
                # A seed of five numbers is that of no batch of training or validation.
                rng = np.random.default_rng([self.config.train.seed, number, 0, 0, 2])
                latents, noise, timesteps, text = self.draw_batch(rng, clips_only=True)
                timesteps_N = timesteps.repeat_interleave(num_frames)
                noisy = add_noise(schedule, latents.flatten(0, 1), noise.flatten(0, 1), timesteps_N)
                texts = text.repeat_interleave(num_frames, dim=0)
                self.model(noisy.to(device), timesteps_N.to(device), texts.to(device))

        self.model.to(device)
        try:
            return cheapest_channels(self.model, shift, denoise_clips, num_frames)
        finally:
            self.model.cpu()

    def make_objective(self, config: Config, prepared: Prepared) -> nn.Module:
        options = config.diffusion
        return DenoisingObjective(
            self.model, self.schedule, min_snr=options.min_snr, motion_weight=options.motion_weight
        )

    @property
    def caption_dropout(self) -> float:
        """Probability that a clip is trained on without its caption."""
        return self.config.diffusion.caption_dropout

    def draw_timesteps(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Return timesteps of `num` clips."""
        options = self.config.diffusion
        return draw_timesteps(rng, num, options.num_timesteps, shift=options.timestep_shift)

    def draw_batch(
        self, rng: np.random.Generator, *, held_out: bool = False, clips_only: bool = False
    ) -> tuple[Tensor, ...]:
        """Return latents and noise `(B, F, C, h, w)`, timesteps `(B,)`, and text `(B, L, D)`."""
        data = self.config.data
        num_clips, num_frames = data.batch_size, data.num_frames
        only_clips = held_out or clips_only
        if num_frames > 1 and not only_clips and rng.random() < data.image_share:
            num_clips, num_frames = num_clips * num_frames, 1
        stride = 1 if num_frames == 1 else data.strides[0] if held_out else int(rng.choice(data.strides))
        sampler = self.held_out if held_out else self.samplers[num_frames, stride]
        assert sampler is not None, "data.val_splits is empty"
        indices = sampler.draw(rng, num_clips)
        if num_frames > 1 and data.window == "first":
            windows = [self.store.window(index, 0, num_frames, stride=stride) for index in indices]
        else:
            windows = [self.store.draw_window(rng, index, num_frames, stride=stride) for index in indices]
        moments = np.stack(windows).astype(np.float32)
        mean, std = moments[:, :, 0], moments[:, :, 1]
        latents = mean + std * rng.standard_normal(mean.shape, np.float32)
        noise = self._draw_noise(rng, mean.shape)
        timesteps = self.draw_timesteps(rng, num_clips)
        captions = [self.store.caption(rng, index, stride=stride) for index in indices]
        dropped = rng.random(num_clips) < self.caption_dropout
        text = self.store.embed(
            ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
        )
        return tuple(torch.from_numpy(array) for array in (latents, noise, timesteps, text))

    def _draw_noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Return noise `(B, F, C, h, w)`, correlated from frame to frame as `diffusion` says."""
        options = self.config.diffusion
        noise = rng.standard_normal(shape, np.float32)
        correlated = shape[1] > 1 and (options.shared_noise or options.noise_correlation)
        if not correlated or (
            options.independent_noise_prob and rng.random() < options.independent_noise_prob
        ):
            return noise
        clip_noise = rng.standard_normal((shape[0], 1, *shape[2:]), np.float32)
        return correlated_noise(noise, clip_noise, options.shared_noise, options.noise_correlation)

    def build_pipeline(self) -> LatentShiftPipeline:
        """Return the pipeline of the network as it is now, with the defaults of a call that the settings
        give."""
        folder = self.store.folder
        text_encoder = open_text_encoder(folder / "text_encoder")
        return LatentShiftPipeline(
            vae=load_autoencoder(folder / "autoencoder"),
            text_encoder=text_encoder,
            tokenizer=open_tokenizer(folder / "tokenizer", text_encoder),
            unet=self.model,
            scheduler=self.make_scheduler(),
            latent_shift=self.call_defaults(),
        )

    def make_scheduler(self) -> SchedulerMixin:
        """Return the scheduler of the exported model."""
        is_flow = self.schedule.config.prediction_type == "flow_prediction"
        return DPMSolverMultistepScheduler.from_config(self.schedule.config, use_flow_sigmas=is_flow)

    def call_defaults(self) -> dict[str, Any]:
        """Return the defaults of a call of the exported model."""
        options, sampling = self.config.diffusion, self.config.train
        shared_noise, correlation = sampling.sample_shared_noise, sampling.sample_noise_correlation
        return {
            "num_frames": self.config.data.num_frames,
            "fps": self.store.info["fps"] / self.stride,
            "shared_noise": options.shared_noise if shared_noise is None else shared_noise,
            "noise_correlation": options.noise_correlation if correlation is None else correlation,
            "num_inference_steps": sampling.sample_steps,
            "guidance_scale": sampling.sample_guidance,
        }

    def sample(self, rank: int, world_size: int) -> dict[int, np.ndarray]:
        """Return clips of the first captions of eight training records and of up to four held-out ones.

        Every process generates as many, because sharded weights are gathered for each.
        """
        records, rng = self.store.records, np.random.default_rng(0)
        training = self.samplers[self.config.data.num_frames, self.config.data.strides[0]].draw(rng, 8)
        held_out = self.store.select(splits=self.store.splits - {"train"})
        held_out = rng.choice(held_out, size=min(4, len(held_out)), replace=False)
        prompts = [
            escape_prompt(caption_at_rate(records[index].texts[0], self.store.info["fps"], self.stride))
            for index in (*training, *held_out)
        ]
        pipe = self.build_pipeline().to(self.model.device)
        pipe.set_progress_bar_config(disable=True)
        rows = [
            row % len(prompts) for row in range(rank, -(-len(prompts) // world_size) * world_size, world_size)
        ]
        # One by one: a batch of clips with guidance would need more memory than the training.
        samples = {}
        for row in rows:
            try:
                samples[row] = to_uint8(pipe(prompts[row], generator=seed(0), decode_batch_size=1).frames[0])
            except NotFiniteError as error:  # is no reason to end the training
                log.warning("no sample of %r: %s", prompts[row], error)
        return samples

    def write_samples(self, samples: dict[int, np.ndarray], folder: Path, step: int) -> None:
        """Write a PNG with a row of frames for each clip, and a WebP with the clips side by side."""
        if not samples:
            return
        clips = np.stack([samples[row] for row in sorted(samples)])
        tiles = clips[:, :: max(1, clips.shape[1] // 8)]
        sheet = video.montage(
            tiles.reshape(-1, *tiles.shape[2:]), columns=tiles.shape[1] if tiles.shape[1] > 1 else 4
        )
        video.write(sheet[None], folder / f"{step:08d}.png")
        if clips.shape[1] > 1:
            video.write(
                video.side_by_side(clips, columns=4),
                folder / f"{step:08d}.webp",
                fps=self.store.info["fps"] / self.stride,
            )

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a pipeline folder in half precision, or for a LoRA only its file.

        diffusers' StableDiffusionPipeline reads the folder too. It contains no path of this machine.
        """
        pipe = self.build_pipeline()
        if self.config.lora:
            save_lora(self.model, folder, call_defaults=pipe.call_defaults)
            return
        plain = type(self.model).from_config(self.model.config)
        pipe.unet = sizes.inflate_unet(plain, self.config.model, shift=shift_of(self.model))
        pipe.unet.load_state_dict(weights)
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.half()
        for part in (pipe.vae, pipe.unet):
            part.register_to_config(_name_or_path="")
        pipe.save_pretrained(folder)


def open_unet(
    config: Config,
    prepared: Prepared,
    *,
    sample_size: int = 0,
    dtype: torch.dtype = torch.float32,
    shift: Shift | None = None,
) -> UNet2DConditionModel:
    """Return the inflated U-Net that a run starts from: that of `model.init`, or one with random weights.

    Args:
        config, prepared: of the run.
        sample_size: side of the latents of a U-Net with random weights.
        dtype: of the weights.
        shift: replaces the settings of the shift.
    """
    if prepared.init is None:
        unet = sizes.unet(str(config.model.size), sample_size=sample_size)
    else:
        unet = open_network(prepared.init / "unet", UNet2DConditionModel, dtype=dtype)  # type: ignore[assignment]
    shift = shift or sizes.shift_settings(config.model)
    if config.model.channels == "cheapest" and (rule := checks.trained_rule(prepared.init)):
        shift = shift.with_rule(rule)
    return sizes.inflate_unet(unet, config.model, shift=shift)


def _read_channels(file: Path, source: dict[str, Any]) -> Any:
    """Return the rule in a run's channels.json; None if there is none, or it is for other settings."""
    saved = read_json_object(file) if file.exists() else {}
    if saved.get("source") != source:
        return None
    return check_schema(saved.get("rule"), Table, file)


def _concept_weights(config: Config, store: Store) -> dict[str, float]:
    """Return the weights of `data.concept_weights`; raise ValueError for a concept of which nothing is trained on."""
    if config.data.concept_weights is None:
        return {}
    weights = checks.read_concept_weights(config.data.concept_weights)
    known = set(store.index[store.select(splits=config.data.splits)]["concept"].tolist())
    if absent := [concept for concept in weights if text_digest(concept) not in known]:
        raise ValueError(
            f"{config.data.concept_weights}: {config.data.path} has no concept {absent[0]!r} in data.splits"
        )
    return weights


def _held_out_sampler(config: Config, store: Store) -> BalancedSampler | None:
    """Return the sampler of validation clips, or None without `data.val_splits`."""
    if not config.data.val_splits:
        return None
    return BalancedSampler(
        store,
        store.select(
            splits=config.data.val_splits, num_frames=config.data.num_frames, stride=config.data.strides[0]
        ),
    )
