"""The three stages: what each draws, trains, shows and exports. The loop (train.py) knows steps, not data.

B clips, F frames, C channels, h w, L tokens, D text width.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from latent_shift import video
from latent_shift.config import Config
from latent_shift.data.latents import LatentStore
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store, caption_at_rate, open_pixel_store
from latent_shift.diffusion import correlated_noise, draw_timesteps, schedule_of
from latent_shift.models import autoencoder, sizes
from latent_shift.models.autoencoder import load_autoencoder
from latent_shift.models.baselines import saved_class
from latent_shift.pipelines import loading
from latent_shift.pipelines.lora import add_lora, save_lora
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.runtime import dtype_of, seed
from latent_shift.shift import share_text
from latent_shift.training.objectives import AutoencoderObjective, DenoisingObjective
from latent_shift.video import to_uint8

log = logging.getLogger("latent_shift")


class Stage(Protocol):
    @property
    def objective(self) -> nn.Module: ...  # forward(*batch) -> (loss, terms)
    @property
    def model(self) -> ModelMixin: ...  # what is trained, averaged and exported

    def draw(self, rng: np.random.Generator, *, held_out: bool = False) -> tuple[Tensor, ...]: ...  # what the objective takes
    def sample(self, rank: int, world: int) -> dict[int, np.ndarray]: ...  # a process's part of what `show` shows
    def show(self, samples: dict[int, np.ndarray], folder: Path, step: int) -> None: ...
    def export(self, folder: Path, weights: dict[str, Tensor]) -> None: ...


class AutoencoderStage:
    """Random crops of random frames, every concept as often as any other."""

    def __init__(self, config: Config):
        self.config = config
        self.store = open_pixel_store(config.data.path)
        _check_splits(config, self.store)
        self.sampler = BalancedSampler(self.store, self.store.select(splits=config.data.splits))
        self.held_out = _held_out(config, self.store)
        smallest = min(min(shape[1:3]) for shape in self.store.shapes.values())
        if config.data.crop > smallest:
            raise ValueError(f"data.crop={config.data.crop} is larger than the frames of {config.data.path}, {smallest} a side")
        init = config.model.init
        self.model = load_autoencoder(loading.folder(init)) if init else sizes.autoencoder(str(config.model.size))
        self.factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        if config.data.crop % self.factor:
            raise ValueError(f"data.crop must be a multiple of {self.factor}, the autoencoder's factor, got {config.data.crop}")
        self.objective = AutoencoderObjective(self.model, kl=config.loss.kl, perceptual=config.loss.perceptual)

    def draw(self, rng: np.random.Generator, *, held_out: bool = False) -> tuple[Tensor, ...]:
        """Pixels `(B, 3, H, W)`, noise of their latents `(B, C, h, w)`."""
        crop, sampler = self.config.data.crop, self.held_out[1] if held_out else self.sampler
        crops = np.empty((self.config.data.batch_size, crop, crop, 3), np.uint8)
        for row, index in enumerate(sampler.draw(rng, len(crops))):
            frame = self.store.draw_window(rng, index, 1)[0]
            top, left = rng.integers(frame.shape[0] - crop + 1), rng.integers(frame.shape[1] - crop + 1)
            crops[row] = frame[top : top + crop, left : left + crop]
        noise = rng.standard_normal((len(crops), self.model.config.latent_channels, crop // self.factor, crop // self.factor), np.float32)
        return autoencoder.to_pixels(torch.from_numpy(crops)), torch.from_numpy(noise)

    def _frames(self, num: int) -> Tensor:
        rng = np.random.default_rng(0)
        return torch.from_numpy(np.concatenate([self.store.draw_window(rng, i, 1) for i in self.sampler.draw(rng, num)]))

    @torch.no_grad()
    def sample(self, rank: int, world: int) -> dict[int, np.ndarray]:
        """Eight frames above their reconstructions."""
        frames = self._frames(8)
        shown = autoencoder.to_pixels(frames).to(self.model.device)
        decoded = autoencoder.to_frames(self.model.decode(self.model.encode(shown).latent_dist.mean).sample.cpu())
        return {0: video.montage(torch.cat([frames, decoded]).numpy(), columns=8)}

    def show(self, samples: dict[int, np.ndarray], folder: Path, step: int) -> None:
        video.write(samples[0][None], folder / f"{step:08d}.png")

    @torch.no_grad()
    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        plain = AutoencoderKL.from_config(self.model.config)
        plain.load_state_dict(weights)
        plain.to(self.model.device).eval()
        frames = autoencoder.to_pixels(self._frames(512)).to(self.model.device)
        latents = torch.cat([plain.encode(batch).latent_dist.mean.cpu() for batch in frames.split(16)])
        plain.cpu()
        autoencoder.whiten(plain, latents)
        plain.save_pretrained(folder)


class DenoiserStage:
    """Text to image (one frame a clip) and text to video: the same U-Net, the same objective, more frames.

    With `data.image_share` some steps of the video stage train on as many single frames instead: the network stays an image model.
    """

    def __init__(self, config: Config):
        self.config = config
        self.store = LatentStore(config.data.path)
        if missing := set(config.data.strides) - set(self.store.info["strides"]):
            raise ValueError(f"{config.data.path} has no captions for data.strides {sorted(missing)}: encode it with --stride")
        _check_splits(config, self.store)
        self.samplers = {
            (num_frames, stride): BalancedSampler(
                self.store, self.store.select(splits=config.data.splits, num_frames=num_frames, stride=stride)
            )
            for num_frames, stride in {(1, 1), *((config.data.num_frames, stride) for stride in config.data.strides)}
        }
        self.held_out = _held_out(config, self.store)
        self.stride = config.data.strides[0] if config.data.num_frames > 1 else 1  # of what is validated, sampled and exported
        moving = self.store.select(splits=config.data.splits, num_frames=2)
        for num_frames, stride in self.samplers:
            long = self.store.select(splits=config.data.splits, num_frames=num_frames, stride=stride)
            if num_frames > 1 and (short := len(np.setdiff1d(moving, long))):
                log.warning("%d of %d clips are too short for %d frames, every %d., and left out", short, len(moving), num_frames, stride)
        init = config.model.init
        sample_size = self.store.info["size"] // self.store.info["factor"]
        unet = (
            saved_class(loading.folder(init) / "unet", UNet2DConditionModel).from_pretrained(
                loading.folder(init), subfolder="unet", dtype=torch.float32
            )
            if init
            else sizes.unet(str(config.model.size), sample_size=sample_size)
        )
        self.model = sizes.inflate_unet(unet, config.model)
        self.model.register_to_config(sample_size=sample_size)  # what it is trained at it will draw
        if config.lora:
            add_lora(self.model, config.lora, dtype=dtype_of(config.train.precision))
        share_text(self.model)
        options = config.diffusion
        self.schedule = schedule_of(options)
        self._check_fit()
        self.objective = DenoisingObjective(self.model, self.schedule, min_snr=options.min_snr, motion_weight=options.motion_weight)

    def _check_fit(self) -> None:
        channels, width = self.store.info["channels"], self.store.info["texts"][1]
        expected = (self.model.config.in_channels, self.model.config.cross_attention_dim)
        if (channels, width) != expected:
            raise ValueError(
                f"{self.store.folder} has latents of {channels} channels and texts {width} wide, the U-Net takes {expected[0]} and {expected[1]}"
            )

    def draw(self, rng: np.random.Generator, *, held_out: bool = False) -> tuple[Tensor, ...]:
        """Latents, noise `(B, F, C, h, w)`, timesteps `(B,)`, text `(B, L, D)`."""
        num_clips, num_frames = self.config.data.batch_size, self.config.data.num_frames
        if num_frames > 1 and not held_out and rng.random() < self.config.data.image_share:
            num_clips, num_frames = num_clips * num_frames, 1
        strides = self.config.data.strides
        stride = 1 if num_frames == 1 else strides[0] if held_out else int(rng.choice(strides))
        sampler = self.held_out[num_frames] if held_out else self.samplers[num_frames, stride]
        indices = sampler.draw(rng, num_clips)
        if num_frames > 1 and self.config.data.window == "first":
            windows = [self.store.window(index, 0, num_frames, stride=stride) for index in indices]
        else:
            windows = [self.store.draw_window(rng, index, num_frames, stride=stride) for index in indices]
        moments = np.stack(windows).astype(np.float32)
        mean, std = moments[:, :, 0], moments[:, :, 1]
        latents = mean + std * rng.standard_normal(mean.shape, np.float32)
        noise = rng.standard_normal(mean.shape, np.float32)
        options = self.config.diffusion
        alike = num_frames > 1 and (options.shared_noise or options.noise_correlation)
        if alike and not (options.independent_share and rng.random() < options.independent_share):
            common = rng.standard_normal(mean[:, :1].shape, np.float32)
            noise = correlated_noise(noise, common, options.shared_noise, options.noise_correlation)
        timesteps = draw_timesteps(rng, num_clips, options.num_timesteps, shift=options.timestep_shift)
        captions = [self.store.caption(rng, index, stride=stride) for index in indices]
        emptied = rng.random(num_clips) < options.caption_dropout
        text = self.store.embed(["" if empty else caption for empty, caption in zip(emptied, captions, strict=True)])
        return tuple(torch.from_numpy(array) for array in (latents, noise, timesteps, text))

    def pipeline(self) -> LatentShiftPipeline:
        folder, options, sampling = self.store.folder, self.config.diffusion, self.config.train
        share, correlation = sampling.sample_shared_noise, sampling.sample_noise_correlation
        return LatentShiftPipeline(
            vae=load_autoencoder(folder / "autoencoder"),
            text_encoder=AutoModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            unet=self.model,
            scheduler=DPMSolverMultistepScheduler.from_config(self.schedule.config),
            latent_shift={
                "num_frames": self.config.data.num_frames,
                "fps": self.store.info["fps"] / self.stride,
                "shared_noise": options.shared_noise if share is None else share,
                "noise_correlation": options.noise_correlation if correlation is None else correlation,
                "num_inference_steps": sampling.sample_steps,
                "guidance_scale": sampling.sample_guidance,
            },
        )

    def sample(self, rank: int, world: int) -> dict[int, np.ndarray]:
        """Clips of the first captions of eight training records and of four that were held out. Every process draws as many."""
        records, rng = self.store.records, np.random.default_rng(0)
        seen = self.samplers[self.config.data.num_frames, self.config.data.strides[0]].draw(rng, 8)
        held = self.store.select(splits=self.store.splits - {"train"})
        held = rng.choice(held, size=min(4, len(held)), replace=False)
        prompts = [caption_at_rate(records[index].texts[0], self.store.info["fps"], self.stride) for index in (*seen, *held)]
        pipe = self.pipeline().to(self.model.device)
        pipe.set_progress_bar_config(disable=True)
        rows = [row % len(prompts) for row in range(rank, -(-len(prompts) // world) * world, world)]
        # One by one: a batch of clips with guidance would need more memory than the training.
        return {row: to_uint8(pipe(prompts[row], generator=seed(0), decode_batch_size=1).frames[0]) for row in rows}

    def show(self, samples: dict[int, np.ndarray], folder: Path, step: int) -> None:
        """A row of frames for each clip; clips of several frames also moving, side by side."""
        clips = np.stack([samples[row] for row in sorted(samples)])
        tiles = clips[:, :: max(1, clips.shape[1] // 8)]
        sheet = video.montage(tiles.reshape(-1, *tiles.shape[2:]), columns=tiles.shape[1] if tiles.shape[1] > 1 else 4)
        video.write(sheet[None], folder / f"{step:08d}.png")
        if clips.shape[1] > 1:
            video.write(video.side_by_side(clips, columns=4), folder / f"{step:08d}.webp", fps=self.store.info["fps"] / self.stride)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A half-precision pipeline folder; diffusers' StableDiffusionPipeline reads it too. No path of this machine is in it.
        Of a LoRA its file alone."""
        pipe = self.pipeline()
        if self.config.lora:
            save_lora(self.model, folder, call_defaults=pipe.call_defaults)
            return
        pipe.unet = sizes.inflate_unet(type(self.model).from_config(self.model.config), self.config.model)
        pipe.unet.load_state_dict(weights)
        pipe.vae.half(), pipe.text_encoder.half(), pipe.unet.half()
        for part in (pipe.vae, pipe.unet):
            part.register_to_config(_name_or_path="")
        pipe.save_pretrained(folder)


def _check_splits(config: Config, store: Store) -> None:
    if unknown := {*config.data.splits, *config.data.val_splits} - store.splits:
        raise ValueError(f"{store.folder}: has no split {', '.join(sorted(unknown))}; expected {', '.join(sorted(store.splits))}")


def _held_out(config: Config, store: Store) -> dict[int, BalancedSampler]:
    """What the loss is validated on, by the number of frames."""
    if not config.data.val_splits:
        return {}
    indices = store.select(splits=config.data.val_splits, num_frames=config.data.num_frames, stride=config.data.strides[0])
    if not len(indices):
        raise ValueError(f"{store.folder}: no clip of {config.data.num_frames} frames in data.val_splits {config.data.val_splits}")
    return {config.data.num_frames: BalancedSampler(store, indices)}


# What a scheduler's file tells of the training, and the setting that names it.
