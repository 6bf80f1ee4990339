"""What schedule a scheduler can have: combinations by name, refused where they are written, with what to write."""

import pytest

from sdxl_lab import schedules
from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.schedules import ABLE, FEWER_STEPS, SIGMA_SCHEDULES, SPACINGS

REFUSED = [
    (
        {"scheduler": "ddim", "sigma_schedule": "karras"},
        "sigma_schedule must be own with the scheduler ddim; received 'karras'. Example: scheduler = \"euler\"",
    ),
    (
        {"scheduler": "deis", "sigma_schedule": "align_your_steps"},
        "sigma_schedule must be one of own, karras, exponential, beta with the scheduler deis; received 'align_your_st",
    ),
    (
        {"scheduler": "dpmpp_2m_karras", "sigma_schedule": "exponential"},
        "sigma_schedule must be own with the scheduler dpmpp_2m_karras; received 'exponential'. Example: scheduler = "
        '"dpmpp_2m"',
    ),
    ({"scheduler": "lcm", "sigma_schedule": "sgm_uniform"}, "sigma_schedule must be own with the scheduler lcm"),
    (
        {"scheduler": "lcm", "timestep_spacing": "trailing", "steps": 4},
        "timestep_spacing must be own with the scheduler lcm, which does not read it; received 'trailing'",
    ),
    (
        {"scheduler": "dpmpp_2m_karras", "timestep_spacing": "leading"},
        "timestep_spacing must be own with the scheduler dpmpp_2m_karras, which does not read it",
    ),
    (
        {"scheduler": "unipc", "sigma_schedule": "beta", "timestep_spacing": "linspace"},
        "timestep_spacing must be own with the scheduler unipc and the sigma schedule beta, which spans all",
    ),
    (
        {"sigma_schedule": "sgm_uniform", "timestep_spacing": "trailing"},
        "timestep_spacing must be own with the sigma schedule sgm_uniform, which is a spacing itself",
    ),
    (
        {"sigmas": [9, 3], "steps": 2, "timestep_spacing": "trailing"},
        "timestep_spacing must be own where sigmas are given",
    ),
    (
        {"timesteps": [999, 9], "steps": 2, "timestep_spacing": "leading"},
        "timestep_spacing must be own where timesteps are given",
    ),
    (
        {"sigmas": [9.0, 3.0], "steps": 2, "sigma_schedule": "karras"},
        "sigma_schedule must be own where sigmas are given, which are a schedule themselves; received 'karras'",
    ),
    (
        {"sigmas": [9.0, 3.0], "timesteps": [999, 99], "steps": 2},
        "timesteps must be left out where sigmas are given; received [999, 99]",
    ),
    ({"sigmas": [9.0, 3.0, 1.0]}, "steps must be 3, one for each of the given sigmas; received 25. Example: steps = 3"),
    ({"timesteps": [999, 499], "steps": 3}, "steps must be 2, one for each of the given timesteps; received 3"),
    (
        {"scheduler": "tcd", "sigmas": [9.0, 3.0], "steps": 2},
        "sigmas must be left out with the scheduler tcd; those that take them are euler, euler_a, dpmpp_2m, dpmpp_2m_s",
    ),
    (
        {"scheduler": "unipc", "timesteps": [999, 499], "steps": 2},
        "timesteps must be left out with the scheduler unipc; those that take them are euler, euler_a, dpmpp_2m, ",
    ),
    (
        {"timestep_spacing": "trailing", "steps": 61},
        "steps must be another number with trailing spacing, which by a rounding of diffusers' falls off its end at "
        "this one; received 61. Example: steps = 60",
    ),
    ({"scheduler": "lcm", "steps": 51}, "steps must be at most 50 with the scheduler lcm; received 51"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[said[:60] for _, said in REFUSED])
def test_what_a_scheduler_cannot_have_is_refused_by_name(values, said):
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.from_dict(values)
    assert said in str(caught.value)


TAKEN = [
    {"scheduler": "euler_a", "sigma_schedule": "karras"},
    {"scheduler": "deis", "sigma_schedule": "beta"},
    {"scheduler": "heun", "sigma_schedule": "exponential", "timestep_spacing": "linspace"},
    {"scheduler": "lcm", "timesteps": [999, 749, 499, 249], "steps": 4},
    {"scheduler": "tcd", "timesteps": [800], "steps": 1},
    {"scheduler": "dpmpp_2m", "sigmas": [14.615, 3.771, 0.862, 0.0], "steps": 3},
    {"scheduler": "ddim", "timestep_spacing": "trailing", "steps": 4},
]


@pytest.mark.parametrize("values", TAKEN, ids=str)
def test_what_it_can_have_is_taken_and_survives_its_plain_form(values):
    config = GenerationConfig.from_dict(values)
    assert GenerationConfig.from_dict(config.to_dict()) == config
    assert config.digest != GenerationConfig(scheduler=config.scheduler, steps=config.steps).digest


def test_a_zero_at_the_end_says_nothing_more():
    with_end, without = (GenerationConfig(steps=2, sigmas=sigmas) for sigmas in ((9.0, 3.0, 0.0), (9.0, 3.0)))
    assert (with_end, with_end.digest) == (without, without.digest)


@pytest.mark.parametrize("scheduler", ABLE)
def test_every_combination_is_taken_or_refused_with_an_example_that_is_taken(scheduler):
    for schedule in SIGMA_SCHEDULES:
        for spacing in SPACINGS:
            values = {"scheduler": scheduler, "steps": 4, "sigma_schedule": schedule, "timestep_spacing": spacing}
            try:
                GenerationConfig.from_dict(values)
            except ConfigError as error:
                name, _, value = str(error).rpartition("Example: ")[2].partition(" = ")
                GenerationConfig.from_dict({**values, "timestep_spacing": "own", name: value.strip('"')})


def test_the_settings_without_a_choice_are_those_of_which_nothing_is_taken():
    assert set(schedules.settled_by("lcm")) == {"sigma_schedule", "timestep_spacing", "sigmas"}
    assert set(schedules.settled_by("ddim")) == {"sigma_schedule", "sigmas", "timesteps"}
    assert schedules.settled_by("euler") == schedules.settled_by("no scheduler") == {}
    said = schedules.settled_by("dpmpp_2m_karras")
    assert set(said.values()) == {"dpmpp_2m_karras has no choice here; dpmpp_2m has"}


def test_no_scheduler_makes_more_steps_than_there_are_noise_levels():
    assert set(FEWER_STEPS) <= set(ABLE)
    assert max(FEWER_STEPS.values()) < schedules.MAX_STEPS == schedules.TRAINED
