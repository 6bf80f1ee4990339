"""Exact images: their bits do not depend on company, order, engine or restart."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sdxl_lab.config import RefinerConfig
from sdxl_lab.errors import Cancelled
from sdxl_lab.job import ImageRequest
from tests.lab.diffusion.conftest import trajectory_of

SECONDS = 300


def bits(job) -> tuple[str, str]:
    """sha256 of the pixels, and of the latents, which show what 8 bits round away."""
    image, latents = job.result(SECONDS).image, trajectory_of(job).latents
    return tuple(hashlib.sha256(content).hexdigest() for content in (image.tobytes(), latents.numpy().tobytes()))


@pytest.fixture
def asked(tiny_config) -> list[ImageRequest]:
    """Of every kind: schedulers, step counts, guidance throughout, within an interval, none, sizes, a refiner."""
    config = tiny_config.with_(guidance_scale=3.0)
    variants = [
        {"scheduler": "euler", "steps": 2},
        {"scheduler": "euler_a", "steps": 2},
        {"scheduler": "dpmpp_2m_karras", "steps": 3},
        {"scheduler": "heun", "steps": 2},
        {"guidance_scale": 1.0, "steps": 2},
        {"guidance_interval": (0.3, 5.0), "steps": 3},
        {"width": 72, "steps": 2},
        {"steps": 3, "refiner": RefinerConfig(handover=0.5)},
        {"scheduler": "ddim", "clip_skip": 1, "steps": 2},
        {"scheduler": "tcd", "steps": 2},
    ]
    return [ImageRequest(config.with_(**each), f"image {i % 4}", i) for i, each in enumerate(variants)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_hundred_images_in_random_company_are_bit_for_bit_those_drawn_alone(start, asked):
    """On two engines, one of which is closed half way and started anew; a third of the images is cancelled once, and
    asked for again."""
    with ThreadPoolExecutor(1) as another_thread:
        alone = another_thread.submit(lambda: [bits(start(exact=True).submit(request)) for request in asked]).result()
    draw = random.Random(7)
    engines = [start(exact=True, rows=8), start(exact=True, active=5)]
    for half in range(2):
        jobs = []
        for _ in range(150):
            which = draw.randrange(len(asked))
            jobs.append((which, draw.choice(engines).submit(asked[which], priority=draw.choice((-1, 0, 1)))))
            if draw.random() < 0.33:
                draw.choice(jobs)[1].cancel()
        if half == 0:
            engines[0].close()
            engines[0] = start(exact=True)
        for which, job in jobs:
            if isinstance(job.exception(SECONDS), Cancelled):
                job = draw.choice(engines).submit(asked[which])
            assert bits(job) == alone[which], asked[which].config
            assert job.result().record.runtime["exact"] is True
            assert job.result().record.runtime["threads"] == 1


def test_an_exact_image_is_so_on_an_engine_that_draws_the_others_together(start, asked):
    alone = [bits(start(exact=True).submit(request)) for request in asked]
    engine = start()
    jobs = [[engine.submit(request, exact=exact) for request in asked] for exact in (None, True, False, True)]
    assert [bits(job) for job in jobs[1]] == alone
    assert [bits(job) for job in jobs[3]] == alone
    assert {job.result().record.runtime["exact"] for job in jobs[0]} == {False}
    together = [bits(job)[1] for job in jobs[0]]
    assert together != [latents for _, latents in alone], "company moves the last bits: exact is needed"


def test_the_number_of_threads_is_the_engines_own_business(start, asked):
    """Whatever torch was told before: an exact image has one thread, or those of the profile."""
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bits(start(exact=True).submit(asked[0])))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
