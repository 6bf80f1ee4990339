"""Every scheduler as its name says it, whatever the model; what `schedules.py` says of it, as diffusers has it."""

import inspect
import json
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_utils import AysSchedules

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.diffusion import schedulers
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.schedules import ABLE, CURVES, FEWER_STEPS, LISTS, MAX_STEPS, OWN, SPACINGS, spaced_evenly

PRISTINE = json.loads((NANO / "base" / "scheduler" / "scheduler_config.json").read_text())  # SDXL's own
# KDPM2's constructor makes a schedule of 1,000 steps, one by one, which takes a second.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name.startswith("kdpm2") else name for name in ABLE]
TWINS = {name: able.twin for name, able in ABLE.items() if able.twin}


def asked(scheduler: str, steps: int = 7, **more: Any) -> Any:
    """A schedule as a configuration has it, though one might refuse it."""
    plain = {"sigma_schedule": OWN, "timestep_spacing": OWN, "sigmas": None, "timesteps": None}
    return SimpleNamespace(scheduler=scheduler, steps=steps, **(plain | more))


def made(config: Any, pristine: dict[str, Any] = PRISTINE) -> SchedulerMixin:
    scheduler = schedulers.build(config, pristine, seed=1)
    schedulers.set_timesteps(scheduler, config)
    return scheduler


@cache
def schedule(name: str, **more: Any) -> list[float]:
    """All that a scheduler's steps depend on, in one list of numbers. Some take long to be made."""
    scheduler = made(asked(name, **more))
    found = [float(scheduler.init_noise_sigma), *scheduler.timesteps.tolist()]
    return found + (scheduler.sigmas.tolist() if hasattr(scheduler, "sigmas") else [])


def stepped(config: Any) -> bool:
    """Whether the scheduler gets through the first three of its steps and the last with finite latents."""
    scheduler = made(config)
    scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(scheduler.step).parameters.keys()
    options = {name: value for name, value in (("eta", 0.0), ("generator", generator)) if name in accepted}

    def noise() -> torch.Tensor:
        return torch.randn(1, 4, 2, 2, generator=generator)

    latents = noise() * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps[:3]:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(noise(), timestep, latents, **options, return_dict=False)[0]
    return bool(torch.isfinite(latents).all())


# --- how many steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedulers.TABLE)
def test_the_most_steps_that_are_allowed_can_be_made(name):
    assert stepped(GenerationConfig(scheduler=name, steps=FEWER_STEPS.get(name, MAX_STEPS)))


@pytest.mark.parametrize(("name", "most"), FEWER_STEPS.items(), ids=FEWER_STEPS)
def test_one_step_more_cannot(name, most):
    with suppress(IndexError, ValueError):  # diffusers' own
        assert not stepped(asked(name, most + 1))


SCHEDULES = [
    *((name, {"sigma_schedule": each}) for name, able in ABLE.items() for each in able.schedules[1:]),
    *((name, {"timestep_spacing": each}) for name, able in ABLE.items() if able.spacing for each in SPACINGS[1:]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), SCHEDULES, ids=[f"{name} {more}" for name, more in SCHEDULES])
@pytest.mark.parametrize("steps", [1, 2, MAX_STEPS])
def test_nor_is_a_schedule_an_obstacle_to_so_many(name, more, steps):
    steps = min(steps, FEWER_STEPS.get(name, MAX_STEPS))
    if more.get("timestep_spacing") == "trailing":
        steps = next(count for count in range(steps, 0, -1) if spaced_evenly(count))
    assert stepped(GenerationConfig(scheduler=name, steps=steps, **more))


def test_trailing_spacing_falls_off_its_end_where_it_is_said_to():
    scheduler = EulerDiscreteScheduler.from_config(PRISTINE, timestep_spacing="trailing")
    for steps in range(1, MAX_STEPS + 1):
        scheduler.set_timesteps(steps)
        assert (len(scheduler.timesteps) == steps) is spaced_evenly(steps), steps


@pytest.mark.parametrize("name", ["euler", "ddim", "unipc"])
def test_where_the_model_itself_is_so_spaced_it_is_refused_before_a_step_is_drawn(name):
    config = GenerationConfig(scheduler=name, steps=61)
    with pytest.raises(ConfigError, match=r"steps must be another number with the model's trailing spacing.* = 60"):
        made(config, PRISTINE | {"timestep_spacing": "trailing"})
    assert len(made(config.with_(steps=60), PRISTINE | {"timestep_spacing": "trailing"}).timesteps) == 60


# --- the table of what they can be told ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ABLE if name not in TWINS])
def test_the_table_says_what_diffusers_signatures_say(name):
    # Euler's schedules are the ancestral one's, too; its own signature has none.
    cls = getattr(diffusers, schedulers.TABLE["euler" if name == "euler_a" else name].cls)
    options, told = (inspect.signature(method).parameters for method in (cls.__init__, cls.set_timesteps))
    able = ABLE[name]
    assert able.timesteps is ("timesteps" in told)
    assert able.curves is {f"use_{curve}_sigmas" for curve in CURVES}.issubset(options)
    ends = able.curves and made(asked(name, sigma_schedule="karras")).sigmas[-1] == 0
    assert able.sigmas is bool(ends)


@pytest.mark.parametrize("name", NAMES)
def test_a_spacing_is_read_where_the_table_says_so_and_nowhere_else(name):
    def moved(**more: Any) -> bool:
        plain, *others = (schedule(name, timestep_spacing=spacing, **more) for spacing in SPACINGS[1:])
        return all(other != plain for other in others)

    able = ABLE[name]
    assert moved() is able.spacing
    if able.curves:
        assert {moved(sigma_schedule=curve) for curve in CURVES} == {able.spaced_curves}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param(name, more, id=f"{name} {more}", marks=pytest.mark.slow if name.startswith("kdpm2") else ())
        for name, more in SCHEDULES
    ],
)
def test_no_setting_of_a_schedule_is_without_effect(name, more):
    own = schedule(name)
    if more != {"timestep_spacing": PRISTINE["timestep_spacing"]}:
        assert schedule(name, **more) != own
    else:
        assert schedule(name, **more) == own


def test_the_names_with_a_schedule_in_them_are_that_schedule():
    for name, twin in TWINS.items():
        assert schedule(name) == schedule(twin, sigma_schedule="karras")
        assert schedulers.effective(made(asked(name))) == schedulers.effective(
            made(asked(twin, sigma_schedule="karras"))
        )


# --- a name says what is off as well ---------------------------------------------------------------------------------

# As fine-tunes are saved, each with what a user had set.
SAVED = [
    {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_karras_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "euler_at_final": True,
        "lower_order_final": False,
        "final_sigmas_type": "sigma_min",
        "lambda_min_clipped": -5.1,
    },
    {"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True},
    {"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True, "sigma_min": 0.5, "sigma_max": 9.0},
    {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True, "interpolation_type": "log_linear"},
    {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", "predict_x0": False, "disable_corrector": [0, 1]},
    {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"},
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_is_off_whatever_the_model_was_saved_with(name):
    plain = made(asked(name))
    for saved in SAVED:
        found = made(asked(name), PRISTINE | saved)
        assert found.timesteps.tolist() == plain.timesteps.tolist()
        assert schedulers.effective(found) == schedulers.effective(plain)


TRAINED = {
    "beta_schedule": "linear",
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}


@pytest.mark.parametrize("name", schedulers.TABLE)
def test_the_model_keeps_what_it_was_trained_with(name):
    config = dict(schedulers.build(asked(name), PRISTINE | TRAINED, seed=1).config)
    assert {key: config[key] for key in TRAINED} == TRAINED


# --- noise levels ----------------------------------------------------------------------------------------------------


def test_noise_levels_are_those_of_sdxl():
    levels = schedulers.trained_sigmas(made(asked("euler")))
    assert len(levels) == 1000
    assert (levels[0], levels[-1]) == pytest.approx((0.0292, 14.6146), abs=1e-4)
    assert (np.diff(levels) > 0).all()


def test_where_nothing_is_left_of_the_signal_the_noise_level_is_infinite():
    says = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    zero = made(asked("ddim", timestep_spacing="trailing"), PRISTINE | says)
    assert schedulers.sigmas(zero)[0] == np.inf
    assert np.isfinite(schedulers.sigmas(zero)[1:]).all()


def test_aligned_steps_are_the_published_ones():
    ten, published = schedulers.align_your_steps(10), AysSchedules["StableDiffusionXLSigmas"]
    assert ten == pytest.approx(published[:-1], abs=1e-9)
    assert published[-1] == 0
    # Twice as many: every second is one of the ten, and between two lies their geometric mean.
    twenty = schedulers.align_your_steps(20)
    assert twenty[::2] == pytest.approx(ten)
    assert twenty[1:-1:2] == pytest.approx(np.sqrt(ten[:-1] * ten[1:]))
    assert twenty[-1] == pytest.approx((0.113 * 0.029) ** 0.5)
    assert schedulers.align_your_steps(1) == pytest.approx([14.615])


def test_sgm_uniform_is_the_noise_of_timesteps_from_the_last_on_without_the_first():
    levels = schedulers.trained_sigmas(made(asked("euler")))
    found = schedulers.sgm_uniform(levels, 4)
    between = [levels[749] ** 0.75 * levels[750] ** 0.25, (levels[499] * levels[500]) ** 0.5]
    assert found[:3] == pytest.approx([levels[999], *between])
    trailing = made(asked("euler", 4, timestep_spacing="trailing")).sigmas[:-1]
    assert found == pytest.approx(trailing.tolist(), rel=0.01), "as diffusers' trailing, but for its rounding"


TAKE_SIGMAS = [name for name, able in ABLE.items() if able.sigmas]
DERIVED = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down")


@pytest.mark.parametrize("name", TAKE_SIGMAS)
def test_the_scheduler_s_own_noise_levels_given_to_it_are_its_own_schedule(name):
    """So what a scheduler derives from them is diffusers' own: timesteps, midpoints, the halves of a step."""
    own = made(asked(name))
    levels = list(dict.fromkeys(own.sigmas.tolist()))[:7]
    given = made(GenerationConfig(scheduler=name, steps=7, sigmas=levels))
    for derived in (each for each in DERIVED if hasattr(own, each)):
        first, second = getattr(own, derived).float(), getattr(given, derived).float()
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert float(given.init_noise_sigma) == pytest.approx(float(own.init_noise_sigma))
    assert not given.config.get("use_karras_sigmas"), "it says so of no image that has other noise levels"


def test_euler_takes_sigmas_as_diffusers_own_argument_does():
    theirs, ours = EulerDiscreteScheduler.from_config(PRISTINE), [14.0, 5.5, 1.25, 0.3]
    theirs.set_timesteps(sigmas=[*ours, 0.0])
    given = made(GenerationConfig(scheduler="euler", steps=4, sigmas=ours))
    torch.testing.assert_close(given.sigmas, theirs.sigmas)
    torch.testing.assert_close(given.timesteps, theirs.timesteps)


@pytest.mark.parametrize("schedule", [OWN, *CURVES, *LISTS])
@pytest.mark.parametrize("name", NAMES)
def test_the_noise_level_of_a_timestep_is_the_one_at_which_the_unet_meets_it(name, schedule):
    if schedule not in ABLE[name].schedules:
        return
    scheduler = made(asked(name, sigma_schedule=schedule))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    found, ones = schedulers.sigmas(scheduler), torch.ones(1, 4, 2, 2)
    assert len(found) == len(scheduler.timesteps)
    scales = "sigma" in inspect.getsource(type(scheduler).scale_model_input)
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(ones, timestep)
        if scales:  # sqrt(sigma^2 + 1) is what they divide by
            assert float(scaled.mean()) ** -2 - 1 == pytest.approx(found[index] ** 2, rel=1e-3, abs=1e-5)
        else:
            level = np.interp(float(timestep), np.arange(1000), schedulers.trained_sigmas(scheduler))
            assert found[index] == pytest.approx(level, rel=0.1), "these round their timesteps, or cut them"
        scheduler.step(ones, timestep, ones, return_dict=False)
