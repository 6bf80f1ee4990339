"""SDXL itself, in size: its base UNet with random weights takes two of the engine's steps, and the whole model comes
from a single file, so that nothing here works for the miniature only."""

import gc
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from bench.random_sdxl import TRUE, UNET, VAE, Parts, filled, new_unet
from bench.truesize import TextlessDenoiser
from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import NANO, SDXL
from sdxl_lab.diffusion.processor import multiplies
from sdxl_lab.job import ImageRequest
from tests import original
from tests.lab.diffusion.conftest import trajectory_of
from tests.made import SettledLatency

# The smaller, unless the processor takes ten times as long with it.
DTYPE = torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32


def take(gib: int, what: str) -> None:
    """Skip where so much memory is not free."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(memory["MemAvailable"].split()[0]) * 1024
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free memory for {what}; this machine has {free >> 30}")


@pytest.fixture(scope="module")
def unet():
    take(3 * DTYPE.itemsize, "SDXL's UNet")
    built = filled(new_unet(), DTYPE, "cpu")
    yield built
    del built
    gc.collect()


@pytest.mark.slow
def test_the_true_model_comes_from_a_single_file(tmp_path):
    """It runs before the UNet of the other test takes its memory."""
    take(13 if DTYPE is torch.bfloat16 else 17, "SDXL")
    if shutil.disk_usage(tmp_path).free < 9 * 2**30:
        pytest.skip("needs 9 GiB of free disk for SDXL's file")
    path, configs = tmp_path / "sdxl.safetensors", Path(shutil.copytree(SDXL / "base", tmp_path / "configs"))
    for name in ("tokenizer", "tokenizer_2"):  # SDXL's own are on the hub
        shutil.copytree(NANO / "base" / name, configs / name)
    parts = Parts.random(TRUE, torch.device("cpu"), torch.float16)
    named = {"unet": parts.unet, "vae": parts.vae, "0": parts.text_encoder, "1": parts.text_encoder_2}
    few = {
        name: {key: weight.clone() for key, weight in islice(part.state_dict().items(), 0, None, 97)}
        for name, part in named.items()
    }
    weights = {
        **original.unet(parts.unet.state_dict(), UNET["layers_per_block"]),
        **original.vae(parts.vae.state_dict(), len(VAE["block_out_channels"])),
        **original.clip(parts.text_encoder.state_dict()),
        **original.open_clip(parts.text_encoder_2.state_dict(), 1),
    }
    original.written(weights, path)
    del parts, named, weights
    gc.collect()
    try:
        config = GenerationConfig.for_model(str(path), width=128, height=128, steps=2)
        config = config.with_(model=config.model.with_(config=str(configs)))
        assert len(config.model.sha256) == 64
        profile = RuntimeProfile(device="cpu", dtype=str(DTYPE).removeprefix("torch."))
        with Engine.load(config, profile) as engine:
            loaded = engine.models
            found = {
                "unet": loaded.base.unet,
                "vae": loaded.vae,
                **dict(zip("01", loaded.base.text_encoders, strict=True)),
            }
            for name, tensors in few.items():
                own = found[name].state_dict()
                for key, weight in tensors.items():
                    expected = weight.to(DTYPE) if name == "unet" else weight.float()
                    assert torch.equal(own[key], expected), (name, key)
            job = engine.submit(ImageRequest(config, "a cat in a hat", 1))
            assert job.result(280).image.size == (128, 128)
            assert torch.isfinite(trajectory_of(job).latents).all()
            assert job.result().record.weights["base"] == f"sha256 {config.model.sha256}"
    finally:
        path.unlink()


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
