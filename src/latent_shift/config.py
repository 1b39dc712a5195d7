"""The settings of a training run: typed, frozen, and checked before data is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latent_shift.shift_settings import Edge, Place

Prediction = Literal["epsilon", "v_prediction", "flow_prediction"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """The clips a run trains on, and how batches are drawn from them."""

    path: str = Field(
        description="A store, a glob pattern of stores, or captioned videos in any layout that `data pack` reads; "
        "autoencoders train on pixels, the other stages on latents."
    )
    size: int | None = Field(
        None,
        ge=8,
        description="Side in pixels to which videos are resized when they are packed; unset: the size of the model.",
    )
    fps: float = Field(8, gt=0, description="Frame rate at which videos are packed.")
    aspects: int | None = Field(
        None,
        ge=8,
        description="Pack each video in the nearest aspect ratio whose sides are multiples of this; unset: square frames.",
    )
    mirror: bool = Field(
        False,
        description="Also train on the mirror image of clips whose captions do not mention left or right.",
    )
    batch_size: int = Field(16, ge=1, description="Crops, images or clips in a batch, per process.")
    loaders: int = Field(
        1, ge=1, description="Threads that prepare batches in advance; the batches do not depend on it."
    )
    crop: int = Field(
        64, ge=8, description="Side in pixels of the random crops that the autoencoder trains on."
    )
    num_frames: int = Field(1, ge=1, description="Frames in a clip; 1 trains an image model.")
    strides: list[Annotated[int, Field(ge=1)]] = Field(
        [1],
        min_length=1,
        description="Frame strides of the clips, one chosen at random for each batch; the first is used for validation and samples.",
    )
    window: Literal["random", "first"] = Field(
        "random",
        description="Which frames of a longer clip are taken: a random window or the first one; single frames are always random.",
    )
    image_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability that a step of the video stage trains on single frames instead of clips.",
    )
    splits: list[str] = Field(["train"], min_length=1, description="Splits to train on.")
    concept_weights: str | None = Field(
        None,
        description="JSON file of sampling weights by concept; a concept of weight 8 is sampled 8 times as often as one that is left out.",
    )
    val_splits: list[str] = Field(
        [], description="Splits on which the validation loss is computed; empty: no validation."
    )


class Model(Section):
    """The network to train and its temporal layers."""

    size: str | None = Field(None, description="A named size to start from with random weights.")
    init: str | None = Field(
        None,
        description="A checkpoint to start from: a model's name, a diffusers folder, a single file or a Hub id.",
    )
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        None,
        description="What `init` predicts, where it does not say so correctly (single files cannot always); unset: as it says.",
    )
    variant: str | None = Field(
        None,
        description="Variant of the weights in the folder `init`, such as fp16; unset: plain weights, or the only variant.",
    )
    temporal: Literal["shift", "none", "attention", "vdm"] = Field(
        "shift",
        description="How frames exchange information: the paper's shift, not at all, or a baseline: Latent-VDM (convolution and "
        "attention over time; in a transformer attention alone) or VDM (attention over time).",
    )
    place: Place = Field(
        "conv1",
        description="Where a ResNet block shifts: before its first convolution, its second, or both, or at its end; where a transformer block "
        "does: in keys and values, in all of self-attention (`conv1` means that, too), in the feed-forward layer, or in both of these (`both`).",
    )
    forward: float = Field(
        1 / 3, ge=0, le=1, description="Fraction of channels taken from the previous frame."
    )
    backward: float = Field(1 / 3, ge=0, le=1, description="Fraction of channels taken from the next frame.")
    edge: Edge = Field(
        "zero",
        description="What fills the shifted channels at the ends of a clip: zeros, the other end, or the frame's own channels.",
    )
    channels: Literal["first", "cheapest"] = Field(
        "first", description="Which channels shift: the first and last, or as the rule says; or those that cost the image network least."
    )  # fmt: skip
    rule: str | None = Field(
        None,
        min_length=1,
        description="A custom shift instead of the fractions, as `module:function` (see docs/method.md).",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_start(self) -> Model:
        if (self.size is None) == (self.init is None):
            raise ValueError(
                "give either size (a named size, random weights) or init (a folder with weights)"
            )
        for name in ("prediction", "variant"):
            if self.init is None and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect without init: leave it out")
        for name in SHIFT:
            if self.temporal != "shift" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on temporal={self.temporal}: leave it out")
        if self.channels == "cheapest" and self.place == "end":
            raise ValueError(
                "channels=cheapest needs a place whose channels a layer of the block reads, not end"
            )
        if self.rule and (self.forward, self.backward) != (1 / 3, 1 / 3):
            raise ValueError("forward and backward have no effect beside rule: leave them out")
        if self.forward + self.backward > 1:
            raise ValueError(
                f"forward and backward are fractions of the same channels: expected at most 1 together, "
                f"got {self.forward} and {self.backward}"
            )
        return self


SHIFT = ("place", "forward", "backward", "edge", "channels", "rule")  # settings of `model` for the shift


class Lora(Section):
    """Train low-rank additions to the weights instead of the weights (Hu et al. 2021)."""

    rank: int = Field(
        ge=1, description="Rank of the added matrices; setting it trains a LoRA instead of the weights."
    )
    # The default covers attention, and the convolutions that mix a frame's own channels with the shifted
    # ones.
    modules: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"],
        min_length=1,
        description="Names of the layers that get a LoRA.",
    )


class Diffusion(Section):
    """Noise schedule, prediction target, and the noise of clips."""

    prediction: Prediction = Field(
        "epsilon",
        description="What the network predicts: the noise (as in the paper), v, or the flow from latents to noise.",
    )
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "scaled_linear", description="Beta schedule, by diffusers' name; scaled_linear is Stable Diffusion's."
    )
    num_timesteps: int = Field(1000, ge=2, description="Number of training timesteps.")
    zero_terminal_snr: bool = Field(
        False, description="Rescale the schedule to end in pure noise; needs v_prediction."
    )
    timestep_shift: float = Field(
        1.0,
        gt=0,
        description="1 samples timesteps uniformly (as in the paper); above 1 samples noisier timesteps more often.",
    )
    min_snr: float | None = Field(
        None, gt=0, description="Gamma of the min-SNR loss weights; unset: all timesteps weigh the same."
    )
    motion_weight: float = Field(
        1.0,
        gt=0,
        description="Weight of the error that changes from frame to frame, relative to the error of the clip's mean frame.",
    )
    shared_noise: float = Field(
        0.0, ge=0, lt=1, description="Fraction of the noise variance that all frames of a clip share."
    )
    noise_correlation: float = Field(
        0.0, ge=0, lt=1, description="Correlation of the remaining noise from one frame to the next."
    )
    independent_noise_prob: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability that a batch of clips has independent noise, despite the two settings above.",
    )
    caption_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Probability that a caption is replaced by the empty one, for classifier-free guidance.",
    )

    @model_validator(mode="after")
    def _pure_noise(self) -> Diffusion:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr needs prediction v_prediction: in pure noise, predicting the noise teaches nothing"
            )
        if self.prediction == "flow_prediction" and (
            self.zero_terminal_snr or self.schedule != "scaled_linear"
        ):
            raise ValueError("schedule and zero_terminal_snr have no effect on a flow: leave them out")
        if self.independent_noise_prob and not (self.shared_noise or self.noise_correlation):
            raise ValueError(
                "independent_noise_prob has no effect without shared_noise or noise_correlation: leave it out"
            )
        return self


class Loss(Section):
    """Weights of an autoencoder's loss terms. The error of frames weighs 1, as does that of a tiny autoencoder's latents."""

    kl: float = Field(
        5e-4, ge=0, description="Weight of the KL divergence of the latents from a standard normal."
    )
    perceptual: float = Field(
        0.0,
        ge=0,
        description="Weight of the distance of EfficientNet-lite0 features, from the extra `perceptual`.",
    )


class Distill(Section):
    """Distillation into a model of few steps, in stage distill."""

    phases: int = Field(
        4, ge=1, description="Phases of the teacher's trajectory: the sampling steps of the exported model."
    )
    target: Literal["consistency", "trajectory"] = Field(
        "consistency",
        description="What the student learns to predict: `trajectory`, from the start of a phase, where the teacher's steps lead in it; "
        "`consistency`, from anywhere in a phase, what it predicts itself after one step of the teacher (phased consistency, Wang et al. 2024).",
    )
    solver_steps: int = Field(
        40,
        ge=1,
        description="Steps of the teacher from noise to clip, a multiple of `phases` that divides diffusion.num_timesteps. A training step "
        "takes one of them, a step of DDIM (`consistency`), or `solver_steps / phases` midpoint steps with two predictions each "
        "(`trajectory`).",
    )
    guidance_scale: float = Field(
        2.0, ge=1, description="Guidance scale of the teacher, which becomes part of the student."
    )
    huber_c: float = Field(
        0.001, gt=0, description="Error below which the loss is quadratic; above it grows linearly."
    )

    @property
    def num_starts(self) -> int:
        """Number of timesteps from which the student learns to step, evenly spaced; it samples in as many steps, or a divisor of them."""
        return self.phases if self.target == "trajectory" else self.solver_steps


class Optim(Section):
    """Optimizer, learning rate schedule, and the average of the weights."""

    steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    lr: float = Field(gt=0, description="Learning rate after warm-up.")
    shift_lr_scale: float = Field(
        1.0, gt=0, description="Factor of the learning rate in the layers that read shifted channels."
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="AdamW; AdamW with 8-bit states, which take a quarter of the memory, from the extra `finetune`; or Muon (Jordan et al. "
        "2024) for weights with at least 32 input and output channels and AdamW for the rest, for small networks that start from nothing.",
    )
    warmup_steps: int = Field(
        200, ge=0, description="First steps, over which the learning rate rises linearly."
    )
    cooldown_steps: int = Field(0, ge=0, description="Last steps, over which the learning rate falls to 0.")
    cooldown: Literal["linear", "cosine"] = Field("linear", description="Shape of that fall.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    beta2: float = Field(
        0.99,
        gt=0,
        lt=1,
        description="Decay of AdamW's second moment; without effect on the weights that Muon moves.",
    )
    grad_clip: float = Field(
        1.0, gt=0, description="Largest norm of the gradient; larger gradients are scaled down to it."
    )
    ema: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="Decay per step of the averaged weights, which are sampled and exported: they average about the last "
        "1 / (1 - ema) steps; 0 takes the weights of the last step.",
    )
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are accumulated for each step.")


class Train(Section):
    """Seed, precision, logging, checkpoints, and memory."""

    seed: int = Field(0, ge=0, description="Seed of the new weights and of every batch.")
    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto",
        description="Mixed precision; `no` is float32, `auto` is bf16 where the device supports it, fp16 on older GPUs, else float32.",
    )
    log_every: int = Field(50, ge=1, description="Steps between two lines of stats.jsonl.")
    sample_every: int = Field(1000, ge=1, description="Steps between two sets of samples.")
    sample_steps: int = Field(
        20, ge=1, description="Sampling steps of the samples, and the default of the exported model."
    )
    sample_guidance: float = Field(
        4.0, ge=1, description="Guidance scale of the samples, and the default of the exported model."
    )
    sample_shared_noise: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Shared noise of the samples, and the default of the exported model; unset: diffusion.shared_noise.",
    )
    sample_noise_correlation: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Noise correlation of the samples, and the default of the exported model; unset: diffusion.noise_correlation.",
    )
    checkpoint_minutes: float = Field(5.0, gt=0, description="Minutes between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Number of checkpoints kept.")
    validate_every: int = Field(500, ge=1, description="Steps between two validations.")
    val_batches: int = Field(8, ge=1, description="Batches in a validation.")
    tracker: Literal["tensorboard", "wandb"] | None = Field(
        None,
        description="Also log to this tracker, from the extra of its name; stats.jsonl is always written.",
    )
    compile: bool = Field(
        False, description="Compile the network: minutes at the start, every later step faster."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower steps."
    )
    shard: bool = Field(
        False,
        description="Shard weights, gradients and optimizer states over the processes (FSDP2), for models too large for one device.",
    )


class Config(Section):
    """All settings of a run, as in `config.toml` of its folder."""

    stage: Literal["autoencoder", "tiny_autoencoder", "image", "video", "distill"] = Field(
        description="What is trained: an autoencoder, a tiny one for the same latents, a text-to-image model, a text-to-video model, or "
        "either of these again to sample in few steps."
    )
    data: Data
    model: Model
    optim: Optim
    lora: Lora | None = None
    loss: Loss = Loss()
    diffusion: Diffusion = Diffusion()
    distill: Distill = Distill()
    train: Train = Train()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.stage == "video" and self.data.num_frames < 2:
            raise ValueError("stage video needs data.num_frames of 2 or more")
        if (self.reads_pixels or self.stage == "image") and self.data.num_frames != 1:
            raise ValueError(f"stage {self.stage} trains on single frames: data.num_frames must be 1")
        ignored, where = _IGNORED[self.stage], f"stage {self.stage}"
        if self.stage == "distill" and self.data.num_frames == 1:
            ignored, where = (
                [*ignored, *set(_IGNORED["image"]).difference(_DISTILL)],
                f"{where} of single frames",
            )
        for name in ignored:
            section, key = name.split(".")
            default = type(getattr(self, section)).model_fields[key].default
            if getattr(getattr(self, section), key) != default:
                raise ValueError(f"{name} has no effect in {where}: leave it out")
        if self.stage == "distill":
            self._check_distill()
        if self.stage == "tiny_autoencoder" and self.model.init is None:
            raise ValueError("stage tiny_autoencoder needs model.init, the model whose latents it learns")
        if self.lora and self.train.shard:
            raise ValueError("train.shard has no effect on the frozen weights under a lora: leave it out")
        if self.train.shard and (self.reads_pixels or self.optim.optimizer != "adamw"):
            raise ValueError(
                "train.shard needs stage image or video and optim.optimizer=adamw, "
                f"got stage {self.stage} and optim.optimizer={self.optim.optimizer}"
            )
        if self.lora and self.optim.optimizer == "muon":
            raise ValueError(
                "optim.optimizer=muon moves whole weights, not a lora: expected adamw or adamw8bit"
            )
        if self.train.shard and self.train.precision == "fp16":
            raise ValueError("train.shard with train.precision=fp16: expected bf16 or no")
        if (
            self.lora
            and self.model.place == "end"
            and self.model.temporal == "shift"
            and "conv2" in self.lora.modules
        ):
            raise ValueError(
                "with model.place=end conv2 shifts and takes no LoRA: leave it out of lora.modules"
            )
        if self.lora and self.model.temporal in ("attention", "vdm"):
            raise ValueError(
                f"the layers of model.temporal={self.model.temporal} are new, and a lora only adds to trained weights: train without lora"
            )
        if self.optim.shift_lr_scale != 1 and (self.model.temporal != "shift" or self.model.place == "end"):
            raise ValueError("optim.shift_lr_scale needs a shift that a layer of its block reads")
        if self.optim.cooldown != "linear" and not self.optim.cooldown_steps:
            raise ValueError("optim.cooldown has no effect without optim.cooldown_steps")
        if not self.data.val_splits and (self.train.validate_every, self.train.val_batches) != (500, 8):
            raise ValueError(
                "train.validate_every and train.val_batches have no effect without data.val_splits"
            )
        if self.lora and (self.reads_pixels or self.model.init is None):
            raise ValueError(
                "a lora adds to the weights of a trained denoiser: expected stage image, video or distill, and model.init"
            )
        if self.optim.warmup_steps + self.optim.cooldown_steps > self.optim.steps:
            warmup, cooldown = self.optim.warmup_steps, self.optim.cooldown_steps
            raise ValueError(
                f"optim.warmup_steps={warmup} and optim.cooldown_steps={cooldown} together are more than optim.steps={self.optim.steps}"
            )
        return self

    @property
    def reads_pixels(self) -> bool:
        """Whether the stage trains on pixels, and not on latents and captions."""
        return self.stage in ("autoencoder", "tiny_autoencoder")

    def _check_distill(self) -> None:
        phases, steps, num_timesteps = (
            self.distill.phases,
            self.distill.solver_steps,
            self.diffusion.num_timesteps,
        )
        if self.model.init is None:
            raise ValueError("stage distill needs model.init, the model to distil")
        if self.diffusion.prediction == "flow_prediction":
            raise ValueError("stage distill takes models that predict epsilon or v_prediction, not a flow")
        if steps % phases or num_timesteps % steps:
            raise ValueError(
                f"distill.solver_steps={steps}: expected a multiple of distill.phases={phases} that divides "
                f"diffusion.num_timesteps={num_timesteps}"
            )
        if self.distill.target == "trajectory" and num_timesteps < 2 * steps:
            raise ValueError(
                f"distill.solver_steps={steps}: expected at most half of diffusion.num_timesteps={num_timesteps}: "
                "a midpoint step needs a timestep in its middle"
            )
        if self.distill.num_starts == 1 and self.diffusion.timestep_shift != 1:
            raise ValueError(
                "diffusion.timestep_shift has no effect where all steps start from pure noise: leave it out"
            )
        if self.train.shard:
            raise ValueError("train.shard is not possible in stage distill")

    def with_settings(self, settings: dict[str, object]) -> Config | None:
        """Return a Config with other values for some `table.key`, or None if they contradict the rest."""
        tables = self.model_dump(exclude_none=True)
        for name, value in settings.items():
            table, key = name.split(".")
            tables.setdefault(table, {})[key] = value
        try:
            return Config.model_validate(tables)
        except ValidationError:
            return None

    def identity(self) -> dict[str, object]:
        """Return the settings that must stay when a run is resumed: they decide what its weights and
        optimizer states mean."""
        diffusion = ("prediction", "schedule", "num_timesteps", "zero_terminal_snr")
        return {
            "stage": self.stage,
            **{f"data.{name}": getattr(self.data, name) for name in ("path", *PACKING)},
            "lora": self.lora,
            "distill": self.distill,
            "train.shard": self.train.shard,
            "optim.optimizer": self.optim.optimizer,
            "optim.shift_lr_scale": self.optim.shift_lr_scale,
            **{f"model.{name}": value for name, value in self.model.model_dump().items()},
            **{f"diffusion.{name}": getattr(self.diffusion, name) for name in diffusion},
        }


PACKING = ("size", "fps", "aspects", "mirror")
"""Settings of `data` for packing and encoding a folder of videos; without effect on a store."""
_DISTILL = [f"distill.{name}" for name in Distill.model_fields]
_PIXELS = [
    *[f"diffusion.{name}" for name in Diffusion.model_fields],
    *_DISTILL,
    "data.mirror",
    "data.image_share",
    "data.window",
    "data.strides",
    "optim.shift_lr_scale",
    "train.compile",
    "train.sample_steps",
    "train.sample_guidance",
    "train.sample_shared_noise",
    "train.sample_noise_correlation",
    "model.prediction",
    "model.variant",
    "model.temporal",
    *[f"model.{name}" for name in SHIFT],
]
_IGNORED = {  # settings that have no effect in a stage
    "autoencoder": _PIXELS,
    "tiny_autoencoder": [*_PIXELS, "loss.kl"],
    "image": [
        *_DISTILL,
        "model.channels",
        "optim.shift_lr_scale",
        "diffusion.motion_weight",
        "diffusion.shared_noise",
        "diffusion.noise_correlation",
        "diffusion.independent_noise_prob",
        "train.sample_shared_noise",
        "train.sample_noise_correlation",
        "data.crop",
        "data.image_share",
        "data.window",
        "data.strides",
        "loss.kl",
        "loss.perceptual",
    ],
    "video": [*_DISTILL, "data.crop", "loss.kl", "loss.perceptual"],
    "distill": [
        "diffusion.caption_dropout",
        "diffusion.min_snr",
        "diffusion.motion_weight",
        "data.crop",
        "loss.kl",
        "loss.perceptual",
        "train.sample_steps",
        "train.sample_guidance",
    ],
}
