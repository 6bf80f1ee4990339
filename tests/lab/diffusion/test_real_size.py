"""SDXL itself, in size: the true base UNet with random weights takes two of the engine's steps, so that nothing here
works for the miniature only."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.random_sdxl import filled, new_unet
from bench.truesize import TextlessDenoiser
from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.processor import multiplies
from sdxl_lab.job import ImageRequest
from tests.lab.diffusion.conftest import trajectory_of
from tests.made import SettledLatency

# The smaller, unless the processor takes ten times as long with it.
DTYPE = torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32


@pytest.fixture(scope="module")
def unet():
    needed = 4 * DTYPE.itemsize * 2**30
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(memory["MemAvailable"].split()[0]) * 1024
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory for SDXL's UNet; this machine has {free >> 30}")
    built = filled(new_unet(), DTYPE, "cpu")
    yield built
    del built
    gc.collect()


@pytest.mark.slow
def test_the_true_unet_takes_two_steps_in_the_engine(unet, tiny_models):
    assert sum(weight.numel() for weight in unet.parameters()) == 2_567_463_684
    base = TextlessDenoiser(unet, (), (), tiny_models.base.scheduler_config, zero_negative=True, aesthetic=False)
    models = replace(tiny_models, base=base, refiner=None, dtype=DTYPE, ref=GenerationConfig().model)
    config = GenerationConfig(width=128, height=128, steps=2)
    profile = RuntimeProfile(device="cpu", dtype=str(DTYPE).removeprefix("torch."))
    with Engine(models, profile, {"base": "random"}, latency=SettledLatency()) as engine:
        asked = [
            ImageRequest(config, "a cat", 1),
            ImageRequest(config.with_(scheduler="dpmpp_2m", guidance_scale=1.0), "a dog", 2),
        ]
        jobs = [engine.submit(request) for request in asked]
        for job in jobs:
            image = job.result(280)
            assert image.image.size == (128, 128)
            assert torch.isfinite(trajectory_of(job).latents).all()
        assert engine.stats().rows == 3, "a guided and an unguided image shared the call"
