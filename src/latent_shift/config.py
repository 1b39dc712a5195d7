"""Recipes: typed, frozen settings read from TOML, with `key=value` overrides; a mistake is an error before any data is read."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    path: str  # a store (pixels for the autoencoder, latents for the other stages), a pattern of several, or what finetune.py makes one of
    size: int | None = Field(None, ge=8)  # side in pixels at which a folder of videos is packed; unset: the model's
    fps: float = Field(8, gt=0)  # frames a second at which it is packed
    aspects: int | None = Field(None, ge=8)  # it is packed in the nearest of the sizes with this factor; unset: in squares
    mirror: bool = False  # clips whose captions name no side also count mirrored
    batch_size: int = Field(16, ge=1)  # crops, images or clips a step and process
    loaders: int = Field(1, ge=1)  # threads that draw batches ahead; what is drawn does not depend on them
    crop: int = Field(64, ge=8)  # autoencoder: side of the random crops in pixels
    num_frames: int = Field(1, ge=1)  # frames a clip; 1 trains the image model
    strides: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [
        1
    ]  # clips of every frame, every second, ...: one of these, drawn for each batch; the first for samples
    window: Literal["random", "first"] = "random"  # where in a longer clip its frames are taken; stills from anywhere
    image_share: float = Field(0.0, ge=0, le=1)  # share of the video steps that train on single frames instead
    splits: Annotated[list[str], Field(min_length=1)] = ["train"]
    val_splits: list[str] = []  # where the clips come from on which the loss is validated; none: it is not


class Model(Section):
    size: str | None = None  # a name of models.py: start from random weights
    init: str | None = None  # a folder with weights: start from those
    # What sees time: the paper's shift, nothing, or its baselines: Latent-VDM (convolution and attention), VDM (attention alone).
    temporal: Literal["shift", "none", "attention", "vdm"] = "shift"
    place: Literal["conv1", "conv2", "end"] = "conv1"  # where in the residual branch the channels shift
    forward: float = Field(1 / 3, ge=0, le=1)  # share of the channels that come from the frame before
    backward: float = Field(1 / 3, ge=0, le=1)  # share that comes from the frame after
    edge: Literal["zero", "wrap", "hold"] = "zero"  # what fills the vacated slots at the ends of a clip

    @model_validator(mode="after")
    def _one_start(self) -> Model:
        if (self.size is None) == (self.init is None):
            raise ValueError("give either size (a named size, random weights) or init (a folder with weights)")
        for name in ("place", "forward", "backward", "edge"):
            if self.temporal != "shift" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on temporal={self.temporal}: leave it out")
        if self.forward + self.backward > 1:
            raise ValueError(
                f"forward and backward are shares of the same channels, got {self.forward} and {self.backward}: 1 at most together"
            )
        return self


class Lora(Section):
    """Train low-rank additions to the weights instead of the weights (Hu et al. 2021)."""

    rank: int = Field(ge=1)
    # Attention, and the convolutions that mix each frame's channels with those its neighbours lent it.
    modules: Annotated[list[str], Field(min_length=1)] = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


class Diffusion(Section):
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"  # the paper predicts the noise
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    num_timesteps: int = Field(1000, ge=1)
    zero_terminal_snr: bool = False
    timestep_shift: float = Field(1.0, gt=0)  # 1 draws t uniformly (the paper); above 1 draws more of the noisy end
    min_snr: float | None = Field(None, gt=0)  # gamma of the min-SNR loss weight; unset: every timestep weighs the same
    motion_weight: float = Field(1.0, gt=0)  # of the part of the error that changes within a clip, beside the part that stays
    shared_noise: float = Field(0.0, ge=0, lt=1)  # share of the noise's variance that all frames of a clip have in common
    noise_correlation: float = Field(0.0, ge=0, lt=1)  # of the rest, from one frame to the next
    independent_share: float = Field(0.0, ge=0, le=1)  # of the batches of clips, whose frames' noise is independent all the same
    caption_dropout: float = Field(0.1, ge=0, le=1)  # share of captions emptied, for classifier-free guidance

    @model_validator(mode="after")
    def _pure_noise(self) -> Diffusion:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction v_prediction: from pure noise the noise says nothing")
        if self.independent_share and not (self.shared_noise or self.noise_correlation):
            raise ValueError("independent_share has no effect without shared_noise or noise_correlation: leave it out")
        return self


class Loss(Section):
    """Weights of the autoencoder's terms beside the mean absolute error."""

    kl: float = Field(5e-4, ge=0)
    perceptual: float = Field(0.0, ge=0)  # EfficientNet-lite0 features, from the extra "perceptual"


class Optim(Section):
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8 bits: a quarter of its memory, from the extra "finetune"
    warmup_steps: int = Field(200, ge=0)
    cooldown_steps: int = Field(0, ge=0)  # the last steps, over which the rate falls to 0
    cooldown: Literal["linear", "cosine"] = "linear"  # how
    weight_decay: float = Field(0.01, ge=0)
    beta2: float = Field(0.99, gt=0, lt=1)
    grad_clip: float = Field(1.0, gt=0)
    ema: float = Field(0.999, ge=0, lt=1)  # decay a step of the averaged weights that are sampled and exported
    accumulate: int = Field(1, ge=1)  # batches a step


class Train(Section):
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # bf16 where the device has units for it, else float32 ("no")
    log_every: int = Field(50, ge=1)  # steps
    sample_every: int = Field(1000, ge=1)  # steps
    sample_steps: int = Field(20, ge=1)  # of sampling; with the guidance what the trained model does when nothing is asked for
    sample_guidance: float = Field(4.0, ge=1)
    sample_shared_noise: float | None = Field(None, ge=0, le=1)  # likewise; unset: as in training
    sample_noise_correlation: float | None = Field(None, ge=0, lt=1)
    checkpoint_minutes: float = Field(5.0, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    validate_every: int = Field(500, ge=1)  # steps
    val_batches: int = Field(8, ge=1)
    tracker: Literal["tensorboard", "wandb"] | None = None  # from the extra "track"; stats.jsonl is always written
    compile: bool = False  # the network by torch.compile: minutes at the start, every later step shorter
    gradient_checkpointing: bool = False
    shard: bool = False  # weights, gradients and optimizer in parts over the processes (FSDP2), for models too large for one


class Config(Section):
    stage: Literal["autoencoder", "image", "video"]
    data: Data
    model: Model
    optim: Optim
    lora: Lora | None = None
    loss: Loss = Loss()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.stage == "video" and self.data.num_frames < 2:
            raise ValueError("stage video needs data.num_frames of 2 or more")
        if self.stage != "video" and self.data.num_frames != 1:
            raise ValueError(f"stage {self.stage} trains on single frames: data.num_frames must be 1")
        for name in _IGNORED[self.stage]:
            section, key = name.split(".")
            default = type(getattr(self, section)).model_fields[key].default
            if getattr(getattr(self, section), key) != default:
                raise ValueError(f"{name} has no effect in stage {self.stage}: leave it out")
        if self.lora and self.train.shard:
            raise ValueError("train.shard is for models too large for one device; a lora's frozen weights are not sharded: leave it out")
        if self.train.shard and (self.stage == "autoencoder" or self.optim.optimizer != "adamw"):
            raise ValueError("train.shard is for denoisers with optim.optimizer=adamw: neither autoencoders nor adamw8bit can be sharded")
        if self.train.shard and self.train.precision == "fp16":
            raise ValueError("train.shard with train.precision=fp16: expected bf16 or no")
        if self.lora and self.model.place == "end" and self.model.temporal == "shift" and "conv2" in self.lora.modules:
            raise ValueError("with model.place=end conv2 shifts and takes no LoRA: leave it out of lora.modules")
        if self.lora and self.model.temporal in ("attention", "vdm"):
            raise ValueError(
                f"a lora adds to weights that are there; those of model.temporal={self.model.temporal} are new: train all, without lora"
            )
        if self.optim.cooldown != "linear" and not self.optim.cooldown_steps:
            raise ValueError("optim.cooldown has no effect without optim.cooldown_steps")
        if not self.data.val_splits and (self.train.validate_every, self.train.val_batches) != (500, 8):
            raise ValueError("train.validate_every and train.val_batches have no effect without data.val_splits")
        if self.lora and (self.stage == "autoencoder" or self.model.init is None):
            raise ValueError("lora trains additions to a denoiser's weights: expected stage image or video, and model.init")
        if self.optim.warmup_steps + self.optim.cooldown_steps > self.optim.steps:
            warmup, cooldown = self.optim.warmup_steps, self.optim.cooldown_steps
            raise ValueError(
                f"optim.warmup_steps={warmup} and optim.cooldown_steps={cooldown} together are more than optim.steps={self.optim.steps}"
            )
        return self

    def with_settings(self, settings: dict[str, object]) -> Config | None:
        """With other values of some `table.key`, unless they contradict the others."""
        tables = self.model_dump(exclude_none=True)
        for name, value in settings.items():
            table, key = name.split(".")
            tables.setdefault(table, {})[key] = value
        try:
            return Config.model_validate(tables)
        except ValidationError:
            return None

    def identity(self) -> dict[str, object]:
        """What the weights and the optimizer's state of a run mean; a run that goes on keeps it, everything else may change."""
        diffusion = ("prediction", "schedule", "num_timesteps", "zero_terminal_snr")
        return {
            "stage": self.stage,
            **{f"data.{name}": getattr(self.data, name) for name in ("path", *PACKING)},
            "lora": self.lora,
            "train.shard": self.train.shard,
            "optim.optimizer": self.optim.optimizer,
            **{f"model.{name}": value for name, value in self.model.model_dump().items()},
            **{f"diffusion.{name}": getattr(self.diffusion, name) for name in diffusion},
        }


PACKING = ("size", "fps", "aspects", "mirror")
"""Settings of `data` that say how a folder of videos is packed and encoded: of no effect on what is."""
_DIFFUSION = [f"diffusion.{name}" for name in Diffusion.model_fields]
_IGNORED = {  # settings that a stage does not read
    "autoencoder": [
        *_DIFFUSION,
        "data.mirror",
        "data.image_share",
        "data.window",
        "data.strides",
        "train.compile",
        "train.sample_steps",
        "train.sample_guidance",
        "train.sample_shared_noise",
        "train.sample_noise_correlation",
        "model.temporal",
        "model.place",
        "model.forward",
        "model.backward",
        "model.edge",
    ],
    "image": [
        "diffusion.motion_weight",
        "diffusion.shared_noise",
        "diffusion.noise_correlation",
        "diffusion.independent_share",
        "train.sample_shared_noise",
        "train.sample_noise_correlation",
        "data.crop",
        "data.image_share",
        "data.window",
        "data.strides",
        "loss.kl",
        "loss.perceptual",
    ],
    "video": ["data.crop", "loss.kl", "loss.perceptual"],
}


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe.

    Args:
        path: a TOML file.
        overrides: `table.key=value`, the value in TOML (a bare word is a string); `data=` and `model=` are `data.path` and `model.init`.

    Raises:
        ValueError: unreadable, an unknown key (the nearest valid one is named), a wrong type, or settings that contradict.
    """
    path = Path(path)
    try:
        settings = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
    except (OSError, tomlkit.exceptions.ParseError) as error:
        raise ValueError(f"{path}: {error}") from error
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"expected table.key=value, got {override!r}")
        try:
            value = tomlkit.value(text).unwrap()
        except tomlkit.exceptions.ParseError:
            value = text
        *tables, name = {"data": "data.path", "model": "model.init"}.get(key, key).split(".")
        target = settings
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {table} is a value, not a table")
        target[name] = value
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_explain(problem)}" for problem in error.errors())) from None


def dump(config: Config) -> str:
    """The settings as TOML, every default written out; `load` reads it back to an equal Config."""
    return tomlkit.dumps(config.model_dump(exclude_none=True))


def _explain(problem) -> str:
    *tables, name = [str(part) for part in problem["loc"]] or [""]
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for table in tables:
            kinds = typing.get_args(section.model_fields[table].annotation) or (section.model_fields[table].annotation,)
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
        nearest = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
        hint = f"did you mean {'.'.join([*tables, *nearest])}?" if nearest else f"expected one of {', '.join(section.model_fields)}"
        return f"unknown key {'.'.join([*tables, name])}; {hint}"
    where = ".".join([*tables, name])
    return (
        f"{where}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"
        if where
        else problem["msg"].removeprefix("Value error, ")
    )
