"""Parity of schedules: every scheduler with every sigma schedule and spacing that it can have, in one mixed batch.

The fast part has each of them with each scheduler or another of its kind; the slow part has all, with the refiner, too.
"""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lab.config import GenerationConfig, RefinerConfig
from sdxl_lab.diffusion.denoising import Trajectory
from sdxl_lab.job import ImageRequest
from sdxl_lab.schedules import ABLE, SPACINGS
from sdxl_lab.source import SourceImage
from tests.lab.diffusion.conftest import trajectory_of
from tests.lab.diffusion.test_denoising import PROMPTS, TOLERANCE, bench, difference, drawn_with_interval
from tests.made import image_record

__all__ = ["bench"]  # the fixture

log = logging.getLogger(__name__)

SIGMAS = (14.2, 8.0, 3.3, 1.1, 0.3)
TIMESTEPS = (999, 799, 519, 259, 99)

Case = tuple[str, dict[str, Any]]
CURVED = [(name, {"sigma_schedule": each}) for name, able in ABLE.items() for each in able.schedules[1:]]
SPACED = [(name, {"timestep_spacing": each}) for name, able in ABLE.items() if able.spacing for each in SPACINGS[1:]]
SPACED_CURVES = [
    (name, {"sigma_schedule": "karras", "timestep_spacing": each})
    for name, able in ABLE.items()
    if able.spaced_curves
    for each in SPACINGS[2:]
]
GIVEN = [(name, {"sigmas": SIGMAS}) for name, able in ABLE.items() if able.sigmas]
TIMED = [(name, {"timesteps": TIMESTEPS}) for name, able in ABLE.items() if able.timesteps]
ALL: list[Case] = [*CURVED, *SPACED, *SPACED_CURVES, *GIVEN, *TIMED]


def covering(cases: list[Case]) -> list[Case]:
    """One of every three cases: the first, the second, the third, and again."""
    return [case for index, case in enumerate(cases) if index % 3 == index // 3 % 3]


SOME: list[Case] = [*covering(CURVED), *covering(SPACED), *covering(SPACED_CURVES), *covering(GIVEN), *TIMED]


def named(case: Case) -> str:
    return " ".join([case[0], *(f"{key} {value}" for key, value in case[1].items())])


def requested(config: GenerationConfig, cases: list[Case], **more: Any) -> list[ImageRequest]:
    """An image for every case; neighbours differ in all that may differ."""
    found = []
    for index, (name, schedule) in enumerate(cases):
        steps = 5 if "sigmas" in schedule or "timesteps" in schedule else 3 + index % 4
        if schedule.get("sigma_schedule") == "sgm_uniform":
            steps = (3, 5, 7)[index % 3]  # with 4 or 6 a timestep lies between two, and a rounding decides
        settings = {
            "scheduler": name,
            "steps": steps,
            "guidance_scale": (5.0, 1.0, 7.5)[index % 3],
            "guidance_rescale": (0.0, 0.7)[index % 2],
            "negative_prompt": (None, "blurry, yellow")[index // 2 % 2],
        }
        found.append(ImageRequest(config.with_(**settings, **schedule, **more), PROMPTS[index % 4], 600 + index))
    return found


def compared(bench: Any, requests: list[ImageRequest], cases: list[Case]) -> None:
    drawn = bench.together(requests)
    found = {
        named(case): difference(image, bench.pipelines.draw(request))
        for case, request, image in zip(cases, requests, drawn, strict=True)
    }
    worst = max(found, key=lambda name: found[name])
    log.info("largest difference of %d: %.1e, %s", len(found), found[worst], worst)
    assert {name: value for name, value in found.items() if not value <= TOLERANCE} == {}


def test_the_covering_part_has_every_scheduler_and_every_schedule():
    assert {name for name, _ in ALL} == set(ABLE) - {name for name, able in ABLE.items() if able.twin}
    assert {name for name, _ in SOME} == {name for name, _ in ALL}
    assert {str(schedule) for _, schedule in SOME} == {str(schedule) for _, schedule in ALL}


def test_a_schedule_in_a_mixed_batch_is_that_of_the_pipeline_alone(bench):
    compared(bench, requested(bench.config, SOME), SOME)


@pytest.mark.slow
@pytest.mark.parametrize("bench", ["lively"], indirect=True)
@pytest.mark.parametrize("handover", [None, 0.5])
def test_so_is_every_schedule_of_every_scheduler(bench, handover):
    refiner = None if handover is None else RefinerConfig(handover=handover)
    compared(bench, requested(bench.config, ALL, refiner=refiner), ALL)


HANDED_OVER: list[Case] = [
    ("euler", {"sigmas": SIGMAS}),
    ("heun", {"sigma_schedule": "align_your_steps"}),
    ("dpmpp_sde", {"sigma_schedule": "sgm_uniform"}),
    ("kdpm2_a", {"sigmas": SIGMAS}),
    ("unipc", {"sigmas": SIGMAS}),
    ("lcm", {"timesteps": TIMESTEPS}),
]


def test_the_refiner_goes_on_with_the_same_schedule(bench):
    compared(bench, requested(bench.config, HANDED_OVER, refiner=RefinerConfig(handover=0.5)), HANDED_OVER)


# diffusers counts the timesteps of Heun's given ones, two a step, as steps, and so begins elsewhere.
GONE_OVER = [case for case in [*HANDED_OVER, *covering(SPACED)] if case[0] != "heun" or "timesteps" not in case[1]]


def test_an_image_is_gone_over_with_the_same_schedule(bench):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    source = SourceImage(image, 0.6, image_record(), stage="refiner")
    requests = [
        ImageRequest(request.config, request.prompt, request.seed, source)
        for request in requested(bench.config, GONE_OVER)
    ]
    compared(bench, requests, GONE_OVER)


@pytest.mark.parametrize("sigmas", [SIGMAS, (14.2, 5.0, 4.9, 0.5, 0.1)])
def test_the_guidance_interval_is_of_the_sigmas_that_are_visited(bench, sigmas):
    config = bench.config.with_(steps=5, sigmas=sigmas, guidance_interval=(0.5, 4.95))
    request = ImageRequest(config, PROMPTS[0], 11)
    job = bench.engine.submit(request)
    job.result(60)
    inside = sum(0.5 <= sigma <= 4.95 for sigma in sigmas)
    assert job.result().record.unet_rows == {"base": 5 + inside}
    image = bench.engine.models.decode(trajectory_of(job).latents)[0]
    assert difference(image, drawn_with_interval(bench.pipelines, request)) <= TOLERANCE


# Their step tells the image that it points to beside the next latents.
POINTING = ["euler", "euler_a", "heun", "kdpm2", "kdpm2_a", "lms", "dpmpp_sde"]


@pytest.mark.parametrize(
    "schedule", [{}, {"sigma_schedule": "karras"}, {"sigma_schedule": "align_your_steps"}], ids=str
)
@pytest.mark.parametrize("name", POINTING)
def test_a_preview_points_where_the_scheduler_s_own_step_does(bench, name, schedule):
    trajectory = Trajectory(
        bench.engine.models,
        ImageRequest(bench.config.with_(scheduler=name, **schedule), PROMPTS[1], 3),
        lambda role, prompt: getattr(bench.engine.models, role).embed(prompt),
    )
    stage, noise = trajectory.stages[0], torch.Generator().manual_seed(5)
    step, told = stage.scheduler.step, []
    stage.scheduler.step = lambda *given, **more: told.append(step(*given, **more)) or told[-1]
    while not trajectory.done:
        rows = trajectory.inputs()
        trajectory.take(torch.randn(rows.latents.shape, generator=noise))
        torch.testing.assert_close(trajectory.denoised(), told[-1][1], rtol=1e-3, atol=1e-3)
