"""Every scheduler makes as many steps as the configuration allows it, and where that is fewer than 1,000, no more."""

import inspect
import json
from contextlib import suppress

import pytest
import torch

from sdxl_lab.config import FEWER_STEPS, MAX_STEPS
from sdxl_lab.diffusion import schedulers
from sdxl_lab.diffusion.inventory import NANO

PRISTINE = json.loads((NANO / "base" / "scheduler" / "scheduler_config.json").read_text())  # SDXL's own


def stepped(name: str, steps: int) -> bool:
    """Whether the scheduler gets through the first three of so many steps with finite latents."""
    scheduler = schedulers.build(name, PRISTINE, seed=1)
    scheduler.set_timesteps(steps)
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


@pytest.mark.parametrize("name", schedulers.TABLE)
def test_the_most_steps_that_are_allowed_can_be_made(name):
    assert stepped(name, FEWER_STEPS.get(name, MAX_STEPS))


@pytest.mark.parametrize(("name", "most"), FEWER_STEPS.items(), ids=FEWER_STEPS)
def test_one_step_more_cannot(name, most):
    with suppress(IndexError, ValueError):  # diffusers' own
        assert not stepped(name, most + 1)
