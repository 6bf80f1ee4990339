"""Which noise levels a scheduler can be told to visit, and in how many steps: facts about diffusers, without it.

A configuration is checked against `ABLE` when it is made, so that what a scheduler cannot have, or would not read, is
refused by name before anything is loaded. The tests hold the table against diffusers itself. Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sdxl_lab.declaration import ConfigError

OWN = "own"
# By a formula of the scheduler's, between its largest and its smallest noise level.
CURVES = ("karras", "exponential", "beta")
# By a list of noise levels that the scheduler is given.
LISTS = ("sgm_uniform", "align_your_steps")
SIGMA_SCHEDULES = (OWN, *CURVES, *LISTS)
SPACINGS = (OWN, "leading", "trailing", "linspace")
TRAINED = 1000  # noise levels that SDXL was trained on
MAX_STEPS = 1000

# What A1111 calls the schedulers, and the schedules, in its text as "Sampler" and "Schedule type".
SAMPLERS = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "heun": "Heun",
    "lms": "LMS",
    "kdpm2": "DPM2",
    "kdpm2_a": "DPM2 a",
    "pndm": "PLMS",
    "deis": "DEIS",
    "lcm": "LCM",
    "tcd": "TCD",
}
SCHEDULE_TYPES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
    "align_your_steps": "Align Your Steps",
}


@dataclass(frozen=True)
class Able:
    """What can be said to a scheduler, beside how many steps it makes.

    `curves`: it draws Karras's, exponential and beta curves. `sigmas`: it visits noise levels that it is given, one's
    own or a schedule's. `timesteps`: it visits timesteps that it is given. `spacing`: it reads the timestep spacing,
    and with `spaced_curves` a curve begins and ends where the spacing does. `twin` names the scheduler to take instead
    where this one's name has decided.
    """

    curves: bool = False
    sigmas: bool = False
    timesteps: bool = False
    spacing: bool = False
    spaced_curves: bool = False
    twin: str | None = None

    @property
    def schedules(self) -> tuple[str, ...]:
        """The sigma schedules that it can have."""
        return (OWN, *(CURVES if self.curves else ()), *(LISTS if self.sigmas else ()))


SOLVER = Able(curves=True, sigmas=True, spacing=True)
K_DIFFUSION = Able(curves=True, sigmas=True, spacing=True, spaced_curves=True)
EULER = Able(curves=True, sigmas=True, timesteps=True, spacing=True, spaced_curves=True)
DPMPP_2M = Able(curves=True, sigmas=True, timesteps=True, spacing=True)
SPACED = Able(spacing=True)
DISTILLED = Able(timesteps=True)  # LCM and TCD skip along the 50 timesteps of their distillation, whatever the spacing
ABLE: Mapping[str, Able] = {
    "euler": EULER,
    "euler_a": EULER,  # with Euler's schedules: diffusers' own ancestral Euler makes the plain one only
    "dpmpp_2m": DPMPP_2M,
    "dpmpp_2m_karras": Able(twin="dpmpp_2m"),
    "dpmpp_2m_sde": DPMPP_2M,
    "dpmpp_2m_sde_karras": Able(twin="dpmpp_2m_sde"),
    "dpmpp_sde": K_DIFFUSION,
    "unipc": SOLVER,
    "ddim": SPACED,
    "ddpm": Able(timesteps=True, spacing=True),
    "heun": EULER,
    "lms": K_DIFFUSION,
    "kdpm2": K_DIFFUSION,
    "kdpm2_a": K_DIFFUSION,
    "pndm": SPACED,
    "deis": Able(curves=True, spacing=True),  # it ends at its last noise level, not at 0: a list would leave noise
    "lcm": DISTILLED,
    "tcd": DISTILLED,
}
SCHEDULERS = tuple(ABLE)

# LCM and TCD are distilled to 50 steps. Of the others these would begin beyond the 1,000 noise levels that SDXL was
# trained on, or twice on the same one, and diffusers then fails or divides by zero.
FEWER_STEPS = {
    **dict.fromkeys(("lcm", "tcd"), 50),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis"), 998),
    **dict.fromkeys(("ddim", "ddpm", "pndm", "lms", "dpmpp_sde"), 999),
}


# Of these diffusers does not rescale the betas to a terminal signal of zero.
NO_ZERO_SNR = ("dpmpp_sde", "heun", "lms", "kdpm2", "kdpm2_a", "pndm", "deis")
# These divide by the signal of the first timestep, of which nothing is left then, where a model predicts noise.
DIVIDE_BY_SIGNAL = ("ddim", "ddpm", "lcm", "tcd")


def sampler(scheduler: str) -> str:
    """A1111's name of a scheduler, as it was until its version 1.9 and as records have it: with the schedule that the
    name of ours says."""
    twin = ABLE[scheduler].twin
    return SAMPLERS[scheduler] if twin is None else f"{SAMPLERS[twin]} {SCHEDULE_TYPES['karras']}"


class Scheduled(Protocol):
    """The settings that a schedule is made of, as a configuration has them."""

    @property
    def scheduler(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def sigma_schedule(self) -> str: ...
    @property
    def timestep_spacing(self) -> str: ...
    @property
    def sigmas(self) -> Sequence[float] | None: ...
    @property
    def timesteps(self) -> Sequence[int] | None: ...


def check_schedule(config: Scheduled) -> None:
    """`ConfigError` for a schedule that the scheduler cannot have, for settings that contradict one another, and for
    one that nothing would read."""
    _check_steps(config)
    _check_curve(config)
    for name in ("sigmas", "timesteps"):
        _check_list(config, name)
    _check_spacing(config)


def check_zero_snr(scheduler: str, prediction_type: str | None) -> None:
    """`ConfigError` for a scheduler that cannot begin at pure noise, or not with what the model predicts."""
    able = [name for name in SCHEDULERS if name not in NO_ZERO_SNR]
    if scheduler in NO_ZERO_SNR:
        rule = f"one of {', '.join(able)} with a model of zero terminal SNR, whose betas the others do not rescale"
        raise ConfigError("scheduler", scheduler, rule, "euler")
    if scheduler in DIVIDE_BY_SIGNAL and prediction_type == "epsilon":
        able = [name for name in able if name not in DIVIDE_BY_SIGNAL]
        rule = f"one of {', '.join(able)} with a model of zero terminal SNR that predicts noise, since the others "
        raise ConfigError("scheduler", scheduler, rule + "divide by the signal, which begins at zero", "euler")


def spaced_evenly(steps: int) -> bool:
    """Whether diffusers' trailing spacing has so many timesteps: for some counts rounding adds one more, below 0."""
    return math.ceil(TRAINED / (TRAINED / steps)) == steps


def _check_steps(config: Scheduled) -> None:
    most = FEWER_STEPS.get(config.scheduler, MAX_STEPS)
    if config.steps > most:
        raise ConfigError("steps", config.steps, f"at most {most} with the scheduler {config.scheduler}", most)
    if config.timestep_spacing == "trailing" and not spaced_evenly(config.steps):
        rule = "another number with trailing spacing, which by a rounding of diffusers' falls off its end at this one"
        fewer = next(count for count in range(config.steps, 0, -1) if spaced_evenly(count))
        raise ConfigError("steps", config.steps, rule, fewer)


def _check_curve(config: Scheduled) -> None:
    able, asked = ABLE[config.scheduler], config.sigma_schedule
    if asked not in able.schedules:
        rule = f"{_one_of(able.schedules)} with the scheduler {config.scheduler}"
        raise ConfigError("sigma_schedule", asked, rule, _example(able, "euler"))


def _check_list(config: Scheduled, name: str) -> None:
    able, asked = ABLE[config.scheduler], getattr(config, name)
    if asked is None:
        return
    if not getattr(able, name):
        takers = [other for other, what in ABLE.items() if getattr(what, name)]
        rule = f"left out with the scheduler {config.scheduler}; those that take them are {', '.join(takers)}"
        raise ConfigError(name, list(asked), rule, _example(able, takers[0]))
    if config.sigmas is not None and config.timesteps is not None:
        raise ConfigError(
            "timesteps", list(config.timesteps), "left out where sigmas are given", "sigmas = [14.6, 3.8, 0.9]"
        )
    if config.sigma_schedule != OWN:
        rule = f"{OWN} where {name} are given, which are a schedule themselves"
        raise ConfigError("sigma_schedule", config.sigma_schedule, rule, OWN)
    if config.steps != len(asked):
        raise ConfigError("steps", config.steps, f"{len(asked)}, one for each of the given {name}", len(asked))


def _check_spacing(config: Scheduled) -> None:
    able, asked = ABLE[config.scheduler], config.timestep_spacing
    if asked == OWN:
        return
    reason = None
    if not able.spacing:
        reason = f"with the scheduler {config.scheduler}, which does not read it"
    elif config.sigmas is not None or config.timesteps is not None:
        reason = f"where {'sigmas' if config.sigmas is not None else 'timesteps'} are given"
    elif config.sigma_schedule in LISTS:
        reason = f"with the sigma schedule {config.sigma_schedule}, which is a spacing itself"
    elif config.sigma_schedule in CURVES and not able.spaced_curves:
        reason = (
            f"with the scheduler {config.scheduler} and the sigma schedule {config.sigma_schedule}, which spans all"
        )
    if reason:
        raise ConfigError("timestep_spacing", asked, f"{OWN} {reason}", OWN)


def _one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _example(able: Able, other: str) -> str:
    """The scheduler to take instead, as it is written."""
    return f'scheduler = "{able.twin or other}"'


def settled_by(scheduler: str) -> dict[str, str]:
    """The settings of a schedule of which this scheduler leaves no choice, and why, for people."""
    able = ABLE.get(scheduler)
    if able is None:
        return {}
    has: dict[str, Any] = {
        "sigma_schedule": able.curves or able.sigmas,
        "timestep_spacing": able.spacing,
        "sigmas": able.sigmas,
        "timesteps": able.timesteps,
    }
    said = f"{scheduler} has no choice here" + (f"; {able.twin} has" if able.twin else "")
    return {name: said for name, can in has.items() if not can}
