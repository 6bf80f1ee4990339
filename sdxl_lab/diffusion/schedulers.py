"""Schedulers by name, as diffusers builds them: a fresh one for each image, and the noise levels that it visits.

Each is built from the model's pristine config, never from another scheduler's: options would leak (`use_karras_sigmas`
set for one image stays on for the next). Of that config it takes what the model was trained with; all else the name
says, whatever scheduler the model was saved with. What a scheduler can be told is `schedules.py`'s.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, SchedulerMixin

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.schedules import OWN, check_zero_snr


@dataclass(frozen=True)
class Spec:
    """A diffusers class, and the options that make it this scheduler."""

    cls: str
    options: Mapping[str, Any] = field(default_factory=dict)


CURVES: Mapping[str, Mapping[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
KARRAS = CURVES["karras"]
SDE = {"algorithm_type": "sde-dpmsolver++"}
TABLE: dict[str, Spec] = {
    "euler": Spec("EulerDiscreteScheduler"),
    "euler_a": Spec("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Spec("DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": Spec("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": Spec("DPMSolverMultistepScheduler", SDE),
    "dpmpp_2m_sde_karras": Spec("DPMSolverMultistepScheduler", {**SDE, **KARRAS}),
    "dpmpp_sde": Spec("DPMSolverSDEScheduler"),
    "unipc": Spec("UniPCMultistepScheduler"),
    "ddim": Spec("DDIMScheduler"),
    "ddpm": Spec("DDPMScheduler"),
    "heun": Spec("HeunDiscreteScheduler"),
    "lms": Spec("LMSDiscreteScheduler"),
    "kdpm2": Spec("KDPM2DiscreteScheduler"),
    "kdpm2_a": Spec("KDPM2AncestralDiscreteScheduler"),
    "pndm": Spec("PNDMScheduler"),
    "deis": Spec("DEISMultistepScheduler"),
    "lcm": Spec("LCMScheduler"),
    "tcd": Spec("TCDScheduler"),
}

# What a model's scheduler config says of the model, and so to a scheduler of any name.
TRAINING = frozenset(
    (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
        *("prediction_type", "timestep_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps"),
        *("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
        *("original_inference_steps", "timestep_scaling"),  # of a model distilled for LCM or TCD
    )
)

# The noise levels for SDXL in ten steps that Sabour et al. 2024 (Align Your Steps, arXiv 2404.14507) publish at
# research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html.
ALIGNED = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def order(name: str) -> int:
    """UNet calls a step: 2 for Heun and the other second-order methods."""
    return int(getattr(diffusers, TABLE[name].cls).order)


def build(config: GenerationConfig, pristine: Mapping[str, Any], *, seed: int) -> SchedulerMixin:
    """A fresh scheduler for one image, without timesteps yet. `pristine` is the model's `scheduler_config.json`; `seed`
    seeds the one scheduler that draws from its own noise tree (DPM++ SDE) instead of the image's generator. Raises
    `ConfigError` for one that cannot begin where the model does."""
    found = TABLE[config.scheduler]
    if pristine.get("rescale_betas_zero_snr"):
        check_zero_snr(config.scheduler, pristine.get("prediction_type"))
    options = dict(found.options)
    if config.timestep_spacing != OWN:
        options["timestep_spacing"] = config.timestep_spacing
    if found.cls != "EulerAncestralDiscreteScheduler":
        options |= CURVES.get(config.sigma_schedule, {})
    if found.cls == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = seed
        # torchsde compares the ends of its Brownian interval after rounding, and would say so in every notebook.
        warnings.filterwarnings("ignore", "Should have t[ab][<>]=t[01] but got", UserWarning, "torchsde")
    return getattr(diffusers, found.cls).from_config(trained(pristine), **options)


def trained(pristine: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's scheduler config that holds for any scheduler, with diffusers' own notes."""
    return {name: value for name, value in pristine.items() if name in TRAINING or name.startswith("_")}


# --- noise levels ----------------------------------------------------------------------------------------------------


def set_timesteps(scheduler: SchedulerMixin, config: GenerationConfig, device: torch.device | str = "cpu") -> None:
    """Give a scheduler of `build`'s the steps that the configuration asks for. Raises `ConfigError` for a number of
    them that the model's own spacing cannot have."""
    source = scheduler
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        # diffusers' own makes the plain schedule only, but steps along any: it takes over Euler's.
        source = EulerDiscreteScheduler.from_config(scheduler.config, **CURVES.get(config.sigma_schedule, {}))
        scheduler.set_timesteps(config.steps, device=device)
    levels = _given(source, config)
    if levels is not None:
        _visit(source, levels, device)
    elif config.timesteps is not None:
        source.set_timesteps(timesteps=list(config.timesteps), device=device)
    else:
        source.set_timesteps(config.steps, device=device)
    if source is not scheduler:
        scheduler.sigmas, scheduler.timesteps = source.sigmas, source.timesteps
    if scheduler.timesteps.min() < 0:  # see `schedules.spaced_evenly`; the model's own spacing is known only here
        rule = "another number with the model's trailing spacing, which falls off its end at this one"
        raise ConfigError("steps", config.steps, rule, config.steps - 1)


def _given(scheduler: SchedulerMixin, config: GenerationConfig) -> np.ndarray | None:
    """The noise levels (steps,) that the scheduler is given, largest first; None where it makes its own."""
    if config.sigmas is not None:
        return np.array(config.sigmas)
    if config.sigma_schedule == "sgm_uniform":
        return sgm_uniform(trained_sigmas(scheduler), config.steps)
    if config.sigma_schedule == "align_your_steps":
        return align_your_steps(config.steps)
    return None


def _visit(scheduler: SchedulerMixin, levels: np.ndarray, device: torch.device | str) -> None:
    """Make a scheduler visit these noise levels. All that diffusers' derive from Karras's sigmas, timesteps, midpoints
    and the halves of second-order steps, they derive from what one method answers; here it answers with the levels."""
    scheduler._convert_to_karras = lambda *_, **__: levels
    scheduler.register_to_config(use_karras_sigmas=True)
    try:
        scheduler.set_timesteps(len(levels), device=device)
    finally:
        scheduler.register_to_config(use_karras_sigmas=False)
        del scheduler._convert_to_karras


def trained_sigmas(scheduler: SchedulerMixin) -> np.ndarray:
    """The noise level of every training timestep (trained,), sqrt((1 - alpha_bar) / alpha_bar), as the scheduler has
    it; infinite where nothing is left of the signal."""
    alphas = scheduler.alphas_cumprod.double()
    return np.asarray(((1 - alphas) / alphas).sqrt().cpu().numpy())


def sgm_uniform(trained: np.ndarray, steps: int) -> np.ndarray:
    """The noise levels at timesteps spaced evenly from the last one towards the first, which is left out; between two
    timesteps the logarithm is interpolated. A1111's "SGM Uniform" and ComfyUI's `sgm_uniform`, after Stability's
    generative-models."""
    timesteps = np.linspace(len(trained) - 1, 0, steps + 1)[:-1]
    return np.exp(np.interp(timesteps, np.arange(len(trained)), np.log(trained)))


def align_your_steps(steps: int) -> np.ndarray:
    """`ALIGNED` for any number of steps: its logarithm interpolated at `steps` + 1 places, as its authors do, without
    the last, in whose place is 0."""
    places = np.linspace(0, 1, steps + 1)
    return np.exp(np.interp(places, np.linspace(0, 1, len(ALIGNED)), np.log(ALIGNED)))[:-1]


def sigmas(scheduler: SchedulerMixin) -> np.ndarray:
    """The noise level (timesteps,) at which each of the scheduler's timesteps meets the UNet, as sigma of a variance
    that grows, whatever form the scheduler itself has it in."""
    if not hasattr(scheduler, "sigmas"):
        return trained_sigmas(scheduler)[scheduler.timesteps.cpu().numpy().astype(int)]
    found = scheduler.sigmas[: len(scheduler.timesteps)].double().cpu().numpy().copy()
    second = found[1::2]
    match type(scheduler).__name__:  # the second halves of these steps lie between two levels
        case "KDPM2DiscreteScheduler":
            second[:] = scheduler.sigmas_interpol[1::2][: len(second)].cpu().numpy()
        case "KDPM2AncestralDiscreteScheduler":
            second[:] = scheduler.sigmas_interpol[0::2][: len(second)].cpu().numpy()
        case "DPMSolverSDEScheduler":
            second[:] = np.sqrt(found[:-1:2] * second)
    return found


def effective(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What the scheduler ended up with, for the record: its class and its whole config."""
    config = {key: value for key, value in dict(scheduler.config).items() if key != "_use_default_values"}
    return {"class": type(scheduler).__name__, **config}
