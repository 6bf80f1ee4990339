"""What only a GPU can show. The same promises as on a CPU, there in float32, and in float16 to the eye."""

import pytest
import torch

from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.images import max_difference
from sdxl_lab.job import ImageRequest
from tests.lab.diffusion.conftest import trajectory_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]

CONFIG = GenerationConfig(steps=8, guidance_scale=3.0)


@pytest.mark.parametrize("scheduler", ["euler", "euler_a", "dpmpp_2m_karras", "ddim"])
def test_a_gpu_draws_in_float32_what_a_cpu_draws(nano, scheduler):
    request = ImageRequest(CONFIG.with_(scheduler=scheduler), "a cat", 1)
    with Engine.load(CONFIG, RuntimeProfile(device="cuda", dtype="float32")) as engine:
        assert max_difference(engine.draw(request).image, nano.draw(request).image) <= 2 / 255


@pytest.mark.parametrize(
    "options", [{}, {"channels_last": True}, {"fuse_qkv": True}, {"graphs": True}, {"compile": True}], ids=str
)
def test_float16_draws_the_same_scene(nano, options):
    request = ImageRequest(CONFIG, "a red circle on a white background", 1)
    with Engine.load(CONFIG, RuntimeProfile(device="cuda", dtype="float16", **options)) as engine:
        # One number of rows is enough of the compiler, which takes its time for each.
        jobs = [engine.submit(request) for _ in range(1 if "compile" in options else 3)]
        assert engine.models.vae.dtype == torch.float16
        for job in jobs:
            assert max_difference(job.result(300).image, nano.draw(request).image) <= 0.25
            assert trajectory_of(job).latents.dtype == torch.float32


def test_graphs_replay_the_very_kernels():
    """Images that join and leave make calls of several row counts, each recorded at its first."""
    request = ImageRequest(CONFIG, "a cat", 1)
    drawn = []
    for graphs in (False, True):
        with Engine.load(CONFIG, RuntimeProfile(device="cuda", graphs=graphs)) as engine:
            drawn.append([engine.draw(request).image for _ in range(2)])
            for job in [engine.submit(ImageRequest(CONFIG.with_(steps=8 + seed), "a dog", seed)) for seed in range(4)]:
                job.result(300)
            if graphs:
                assert {shape[0] for shape in engine.models.base.unet.shapes} >= {2, 4}
    assert all(max_difference(image, drawn[0][0]) <= 1 / 255 for images in drawn for image in images)


def test_out_of_memory_is_survived():
    with Engine.load(CONFIG, RuntimeProfile(device="cuda", rows=4096)) as engine:
        free = torch.cuda.mem_get_info()[0]
        hog = torch.empty(int(free * 0.9), dtype=torch.uint8, device="cuda")
        jobs = [engine.submit(ImageRequest(CONFIG, "a cat", seed)) for seed in range(64)]
        for job in jobs:
            job.result(300)
        del hog
        assert engine.healthy
