"""Schedulers: which of diffusers' sample a Stable Diffusion model correctly, in every mode of a call; and the
noise levels that a scheduler gives the network.

Importing this file imports neither torch nor diffusers, so a wrong name is refused at once.
"""

from __future__ import annotations

import difflib
import inspect
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin
    from torch import Tensor

SCHEDULERS = (
    "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM",
    "SASolver", "TCD", "UniPCMultistep",
)  # fmt: skip
"""Names of the schedulers for noise schedules of discrete timesteps, which Stable Diffusion has."""

FLOW_SCHEDULERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")
"""Names of those that also sample models that predict a flow. (DEISMultistep leaves noise.)"""
_OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

EDM_SCHEDULERS = ("EDMDPMSolverMultistep", "EDMEuler")
"""Names of the schedulers of models with EDM's preconditioning (Karras et al. 2022)."""

_UNSUITABLE = {
    "samples flow-matching models by noise levels of its own (a flow trained here takes DPMSolverMultistep, DPMSolverSinglestep or UniPCMultistep)": (
        "FlowMapEulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "Helios", "HeliosDMD",
        "LTXEulerAncestralRF", "MiniMaxH3", "Piflow", "RFD4Proteina", "SCM",
    ),
    "samples discrete tokens": ("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"),
    "has noise levels of its own instead of the model's": (
        "CMStochasticIterative", "CogVideoXDDIM", "CogVideoXDPM", "CosineDPMSolverMultistep", "DDPMWuerstchen", "IPNDM", "KarrasVe",
        "ScoreSdeVe", "UnCLIP",
    ),
    "runs from clips to noise": ("DDIMInverse", "DPMSolverMultistepInverse"),
    "draws noise that does not follow the seed": ("DPMSolverSDE",),
    "inpaints by a method of its own (with a mask, any other scheduler inpaints)": ("RePaint",),
}  # fmt: skip


def check_scheduler(name: str) -> None:
    """Raise ValueError for a name that is not in `SCHEDULERS` or `EDM_SCHEDULERS`; the message gives the
    reason, or the nearest names."""
    if name in SCHEDULERS or name in EDM_SCHEDULERS:
        if name == "LMSDiscrete" and find_spec("scipy") is None:
            raise ValueError(f"scheduler {name!r} needs SciPy: pip install scipy")
        return
    for reason, names in _UNSUITABLE.items():
        if name in names:
            raise ValueError(f"scheduler {name!r} {reason}; expected one of {', '.join(SCHEDULERS)}")
    nearest = difflib.get_close_matches(name.removesuffix("Scheduler"), SCHEDULERS, n=3, cutoff=0.3)
    if not nearest:
        raise ValueError(f"unknown scheduler {name!r}; expected one of {', '.join(SCHEDULERS)}")
    raise ValueError(f"unknown scheduler {name!r}; did you mean {' or '.join(nearest)}?")


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """Return diffusers' scheduler of a name with the noise schedule and the settings of `like`.

    Args:
        name: one of `SCHEDULERS`, such as "DDIM" or "EulerDiscrete".
        like: the scheduler of a model.

    Raises:
        ValueError: a name of no scheduler, or one that does not suit the model.
    """
    import diffusers

    check_scheduler(name)
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    if (name in EDM_SCHEDULERS) != (_family_name(like) in EDM_SCHEDULERS):
        suitable = EDM_SCHEDULERS if name in SCHEDULERS else SCHEDULERS
        raise ValueError(
            f"scheduler {name!r} has other noise levels than this model; expected one of {', '.join(suitable)}"
        )
    parameters = inspect.signature(scheduler_class.__init__).parameters
    config: dict[str, Any] = dict(like.config)
    config.pop("_use_default_values", None)  # the model's schedule, not the default one of another class
    # Without a setting of the model, some classes clip latents as if they were pixels, and PNDM starts with
    # Runge-Kutta steps, which Stable Diffusion leaves out.
    neutral = {"clip_sample": False, "skip_prk_steps": True}
    config = {**{name: value for name, value in neutral.items() if name in parameters}, **config}
    if type(like) is not scheduler_class:
        config.pop("algorithm_type", None)
    if name in FLOW_SCHEDULERS:
        config["use_flow_sigmas"] = config.get("prediction_type") == "flow_prediction"
    if name == "PNDM" and config.get("timestep_spacing") == "linspace":
        config["timestep_spacing"] = "leading"
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in parameters:
        config["trained_betas"] = _betas(like)
    scheduler = scheduler_class.from_config(config)
    check_own_scheduler(scheduler)
    return scheduler


def _betas(like: SchedulerMixin) -> list[float]:
    """Return betas for classes that cannot rescale them to zero terminal SNR; as in EulerDiscrete, a little
    signal is left, since those classes divide by it."""
    import torch

    alphas_cumprod = like.alphas_cumprod.double().clamp(min=2**-24)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / previous).tolist()


def check_own_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise ValueError for a scheduler, or settings of one, that do not sample latents correctly."""
    name, config = _family_name(scheduler), scheduler.config
    check_scheduler(name)
    limited = ("EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "PNDM", *EDM_SCHEDULERS)
    predictions = ["epsilon", "v_prediction"] if name in limited else ["epsilon", "v_prediction", "sample"]
    is_flow = config.prediction_type == "flow_prediction"
    if is_flow and name not in FLOW_SCHEDULERS:
        raise ValueError(
            f"scheduler {name!r} cannot sample a model that predicts a flow; expected {' or '.join(FLOW_SCHEDULERS)}"
        )
    predictions += ["flow_prediction"] if name in FLOW_SCHEDULERS else []
    if config.prediction_type not in predictions:
        raise ValueError(
            f"scheduler {name!r} cannot sample a model that predicts {config.prediction_type!r}; expected "
            f"{' or '.join(predictions)}"
        )
    betas, num_timesteps = config.get("trained_betas"), config.num_train_timesteps
    if betas is not None and not (hasattr(betas, "__len__") and len(betas) == num_timesteps):
        raise ValueError(
            f"scheduler {name!r} needs trained_betas for each of its {num_timesteps} timesteps, got {betas!r:.60}"
        )
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise ValueError(
                f"scheduler {name!r} clips latents as if they were pixels; expected {option}=False in its configuration"
            )
    unsuitable = {
        "use_flow_sigmas": bool(config.get("use_flow_sigmas")) != is_flow,
        **{
            option: is_flow and bool(config.get(option))
            for option in (*_OTHER_SIGMAS, "use_dynamic_shifting", "shift_terminal")
        },
        "variance_type": config.get("variance_type") in ("learned", "learned_range"),
        "algorithm_type": name == "SASolver" and config.algorithm_type != "data_prediction",
        "predict_x0": not config.get("predict_x0", True),
        "solver_type": config.get("solver_type") == "bh1",
        "timestep_scaling": config.get("timestep_scaling", 10.0) <= 0,
        "steps_offset": not 0 <= config.get("steps_offset", 0) <= 10,
        # The first input is pure noise, from which a prediction of the noise says nothing about the clip.
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr"))
        and config.prediction_type == "epsilon",
    }
    for option, is_unsuitable in unsuitable.items():
        if is_unsuitable:
            raise ValueError(
                f"scheduler {name!r} with {option}={config[option]!r} does not sample a model that predicts "
                f"{config.prediction_type!r} correctly; "
                f"{'set it' if option == 'use_flow_sigmas' and is_flow else f'leave {option} at its default'}"
            )
    if name == "PNDM" and config.timestep_spacing == "linspace":
        raise ValueError(
            "scheduler 'PNDM' makes steps of equal length; expected timestep_spacing 'leading' or 'trailing', got 'linspace'"
        )
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"scheduler {name!r} with continuous timesteps suits no Stable Diffusion model; expected timestep_type 'discrete'"
        )


def _family_name(scheduler: SchedulerMixin) -> str:
    """Return the name of the class in diffusers that a scheduler has or extends."""
    for cls in type(scheduler).__mro__:
        if cls.__name__.removesuffix("Scheduler") in (*SCHEDULERS, *EDM_SCHEDULERS):
            return cls.__name__.removesuffix("Scheduler")
    return type(scheduler).__name__.removesuffix("Scheduler")


def check_num_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raise ValueError for a number of sampling steps that the scheduler cannot make."""
    num_timesteps = scheduler.config.num_train_timesteps
    if num_inference_steps > num_timesteps:
        raise ValueError(
            f"num_inference_steps must be at most {num_timesteps}, the timesteps of the model, got {num_inference_steps}"
        )
    if _family_name(scheduler) == "PNDM" and num_inference_steps < 4:
        raise ValueError(f"PNDM needs num_inference_steps of 4 or more, got {num_inference_steps}")


def distilled_scheduler(like: SchedulerMixin) -> SchedulerMixin:
    """Return DDIM that steps from one end of a distilled model's phases to the next, with the noise schedule of `like`."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        like.config, timestep_spacing="trailing", clip_sample=False, thresholding=False, set_alpha_to_one=True, steps_offset=1
    )  # fmt: skip


def check_distilled_scheduler(scheduler: SchedulerMixin, *, custom: bool = False) -> None:
    """Raise ValueError for a scheduler that does not sample a distilled model correctly, or for `custom` timesteps or sigmas."""
    name, config = _family_name(scheduler), scheduler.config
    if name != "DDIM" or config.timestep_spacing != "trailing" or not config.set_alpha_to_one:
        spacing = config.get("timestep_spacing", "other")
        raise ValueError(
            f"this model is distilled for DDIM with trailing timesteps and set_alpha_to_one, got {name} with {spacing} ones; "
            "leave the scheduler as it is, or take the model it was distilled from"
        )
    if custom:
        raise ValueError("a distilled model has its own timesteps; expected no timesteps and no sigmas")


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    *,
    device: torch.device,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> Tensor:
    """Set the timesteps of a scheduler and let it begin at the first; return them, `(T,)`.

    Raises:
        ValueError: a number of steps, or a kind of schedule, that the scheduler cannot make.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

    check_num_steps(scheduler, num_inference_steps)
    num_timesteps = scheduler.config.num_train_timesteps
    _check_custom_steps("timesteps", timesteps, num_timesteps - 1)
    if sigmas is not None:
        fresh = type(scheduler).from_config(scheduler.config)  # before a call has set other sigmas
        _check_custom_steps(
            "sigmas", sigmas, float(fresh.sigmas.max()) if hasattr(fresh, "sigmas") else math.inf
        )
    if scheduler.config.get("use_flow_sigmas") and (timesteps is not None or sigmas is not None):
        raise ValueError(
            "a model that predicts a flow takes no timesteps and no sigmas; expected num_inference_steps"
        )
    steps_T, _ = retrieve_timesteps(scheduler, num_inference_steps, device, timesteps, sigmas)
    is_flow = scheduler.config.prediction_type == "flow_prediction"
    if timesteps is None and sigmas is None and not is_flow and _family_name(scheduler) not in EDM_SCHEDULERS:
        _check_spacing(scheduler, steps_T, num_inference_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return steps_T


def _check_spacing(scheduler: SchedulerMixin, steps_T: Tensor, num_inference_steps: int) -> None:
    """Raise ValueError for timesteps that diffusers does not space as asked: trailing ones of some numbers of steps, such as 61 of 1,000,
    go on to -1 by rounding, and others of nearly as many steps as timesteps repeat or begin above the last timestep."""
    repeats = (
        scheduler.order == 1
        and _family_name(scheduler) != "PNDM"  # which makes its first step twice
        and bool((steps_T.diff() == 0).any())
    )
    if steps_T[-1] < 0 or steps_T[0] > scheduler.config.num_train_timesteps - 1 or repeats:
        raise ValueError(
            f"num_inference_steps={num_inference_steps}: {scheduler.config.timestep_spacing} timesteps of {type(scheduler).__name__} "
            f"{'repeat' if repeats else f'go from {float(steps_T[0]):g} to {float(steps_T[-1]):g}'} by rounding; expected another number"
        )


def _check_custom_steps(name: str, steps: Any, most: float) -> None:
    """Raise ValueError for steps that are not numbers from `most` to 0, each smaller than the one before."""
    import torch

    if steps is None:
        return
    try:
        values = torch.as_tensor(steps, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected {name} as a list of numbers, got {steps!r:.80}") from error
    is_falling = values.ndim == 1 and len(values) > 0 and bool((values.diff() < 0).all())
    # The greatest noise level of the model may be rounded.
    if not is_falling or not bool(values.isfinite().all()) or values[0] > most * 1.001 or values[-1] < 0:
        raise ValueError(f"expected falling {name} from at most {most:g} to at least 0, got {steps!r:.80}")


def for_strength(scheduler: SchedulerMixin, strength: float) -> SchedulerMixin:
    """Return a scheduler that can start at a strength below 1: PNDM without Runge-Kutta steps, which are made
    at the first timesteps alone, and any other as it is."""
    if strength == 1 or _family_name(scheduler) != "PNDM" or scheduler.config.skip_prk_steps:
        return scheduler
    return type(scheduler).from_config(scheduler.config, skip_prk_steps=True)


def timesteps_for_strength(scheduler: SchedulerMixin, timesteps: Tensor, strength: float) -> Tensor:
    """Return the last `strength` of the timesteps, for sampling that starts from a video: 1 is all
    (SDEdit, Meng et al. 2022; rounded as in diffusers). Tell the scheduler where they begin.

    Raises:
        ValueError: no timestep is left.
    """
    import torch

    is_pndm = _family_name(scheduler) == "PNDM"
    # PNDM makes its first step twice, and so its second timestep comes twice, wherever it starts.
    distinct = torch.cat([timesteps[:1], timesteps[2:]]) if is_pndm and len(timesteps) > 1 else timesteps
    num_steps = -(
        -len(distinct) // scheduler.order
    )  # the last step of a second-order method has one timestep
    start = max(num_steps - int(num_steps * strength), 0) * scheduler.order
    if start >= len(distinct):
        raise ValueError(
            f"strength {strength} of {num_steps} steps leaves none; expected at least {1 / num_steps:.2g}, or more steps"
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if is_pndm and start:
        return torch.cat([distinct[start : start + 2], distinct[start + 1 :]])
    return timesteps[start:]


def input_scales(scheduler: SchedulerMixin, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of clean latents and of standard normal noise in the network's input at a timestep:
    the noise level that the network was trained to see there.

    Timesteps between those of training are interpolated in the logarithm of sigma, as in diffusers.
    """
    import torch

    if _family_name(scheduler) in EDM_SCHEDULERS:
        sigma = (4 * timestep.float()).exp()
        signal = (sigma**2 + scheduler.config.sigma_data**2) ** -0.5
        return signal, sigma * signal
    if scheduler.config.prediction_type == "flow_prediction":
        from latent_shift.diffusion import noise_levels

        return noise_levels(scheduler, timestep.float())
    alphas_cumprod = scheduler.alphas_cumprod.to(timestep.device, torch.float32).clamp(min=2**-24)
    log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
    low = timestep.long().clamp(max=len(log_snr) - 1)
    high = (low + 1).clamp(max=len(log_snr) - 1)
    alpha = torch.lerp(log_snr[low], log_snr[high], (timestep - low).float()).sigmoid()
    return alpha.sqrt(), (1 - alpha).sqrt()


def predicted_clean(
    scheduler: SchedulerMixin, inputs: Tensor, prediction: Tensor, timestep: Tensor
) -> Tensor:
    """Return the clean latents that a prediction implies.

    Args:
        scheduler: of a model that predicts noise, v, a flow or clean latents.
        inputs: the network's input, with the factors of `input_scales`; any shape.
        prediction: its output for them, of the same shape.
        timestep: `(1,)` or a scalar.
    """
    signal, noise = input_scales(scheduler, timestep)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return signal * inputs - noise * prediction
    if kind == "flow_prediction":
        return inputs - noise * prediction
    return prediction if kind == "sample" else (inputs - noise * prediction) / signal


def last_alpha(scheduler: SchedulerMixin) -> float:
    """Return the fraction of the variance that is signal at the last training timestep, the noisiest."""
    if _family_name(scheduler) in EDM_SCHEDULERS:
        return 1 / (1 + scheduler.config.sigma_max**2)
    if scheduler.config.prediction_type == "flow_prediction":
        return 0.0
    return float(scheduler.alphas_cumprod[-1])


def step_order(scheduler: SchedulerMixin, index: int) -> dict[str, int]:
    """Return the order of a multistep method at a step, by name, where `step` takes it: LMSDiscrete counts
    the steps before a late start, of which it has no history, too."""
    return {"order": min(index + 1, 4)} if _family_name(scheduler) == "LMSDiscrete" else {}
