"""Schedulers by name, as diffusers builds them: a fresh one for each image.

Each is built from the model's pristine config, never from another scheduler's: options would leak (`use_karras_sigmas`
set for one image stays on for the next).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from sdxl_lab.config import check_zero_snr


@dataclass(frozen=True)
class Spec:
    """A diffusers class, its name in A1111, and the options that make it this scheduler."""

    cls: str
    a1111: str
    options: Mapping[str, Any] = field(default_factory=dict)


KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
TABLE: dict[str, Spec] = {
    "euler": Spec("EulerDiscreteScheduler", "Euler"),
    "euler_a": Spec("EulerAncestralDiscreteScheduler", "Euler a"),
    "dpmpp_2m": Spec("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpmpp_2m_karras": Spec("DPMSolverMultistepScheduler", "DPM++ 2M Karras", KARRAS),
    "dpmpp_2m_sde": Spec("DPMSolverMultistepScheduler", "DPM++ 2M SDE", SDE),
    "dpmpp_2m_sde_karras": Spec("DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", SDE | KARRAS),
    "dpmpp_sde": Spec("DPMSolverSDEScheduler", "DPM++ SDE"),
    "unipc": Spec("UniPCMultistepScheduler", "UniPC"),
    "ddim": Spec("DDIMScheduler", "DDIM"),
    "ddpm": Spec("DDPMScheduler", "DDPM"),
    "heun": Spec("HeunDiscreteScheduler", "Heun"),
    "lms": Spec("LMSDiscreteScheduler", "LMS"),
    "kdpm2": Spec("KDPM2DiscreteScheduler", "DPM2"),
    "kdpm2_a": Spec("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "pndm": Spec("PNDMScheduler", "PLMS"),
    "deis": Spec("DEISMultistepScheduler", "DEIS"),
    "lcm": Spec("LCMScheduler", "LCM"),
    "tcd": Spec("TCDScheduler", "TCD"),
}


def order(name: str) -> int:
    """UNet calls a step: 2 for Heun and the other second-order methods."""
    return int(getattr(diffusers, TABLE[name].cls).order)


def build(name: str, pristine: Mapping[str, Any], *, seed: int) -> SchedulerMixin:
    """A fresh scheduler for one image. `pristine` is the model's `scheduler_config.json`; `seed` seeds the one
    scheduler that draws from its own noise tree (DPM++ SDE) instead of the image's generator. Raises `ConfigError` for
    one that cannot begin where the model does."""
    found = TABLE[name]
    if pristine.get("rescale_betas_zero_snr"):
        check_zero_snr(name, pristine.get("prediction_type"))
    options = dict(found.options)
    if found.cls == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = seed
        # torchsde compares the ends of its Brownian interval after rounding, and would say so in every notebook.
        warnings.filterwarnings("ignore", "Should have t[ab][<>]=t[01] but got", UserWarning, "torchsde")
    return getattr(diffusers, found.cls).from_config(dict(pristine), **options)


def effective(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What the scheduler ended up with, for the record: its class and its whole config."""
    config = {key: value for key, value in dict(scheduler.config).items() if key != "_use_default_values"}
    return {"class": type(scheduler).__name__, **config}
