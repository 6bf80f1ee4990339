"""What a model predicts, where it begins, and how it is told the guidance scale: parity with diffusers' pipelines.

Models that predict v, begin at pure noise, or were distilled, each with lively random weights; the bench is that of
`test_denoising.py`.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_lab.config import ConfigError, GenerationConfig, ModelRef, RefinerConfig, RuntimeProfile
from sdxl_lab.diffusion import schedulers
from sdxl_lab.diffusion.denoising import Trajectory
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.diffusion.models import load
from sdxl_lab.job import ImageRequest
from sdxl_lab.schedules import DIVIDE_BY_SIGNAL, NO_ZERO_SNR
from sdxl_lab.source import SourceImage
from tests.lab.diffusion.conftest import trajectory_of
from tests.lab.diffusion.test_denoising import DIFFUSERS, NAMES, PROMPTS, TOLERANCE, Bench, Pipelines, difference
from tests.made import image_record

log = logging.getLogger(__name__)

V = {"prediction_type": "v_prediction"}
ZERO = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ABLE = [name for name in NAMES if name not in NO_ZERO_SNR]


def bench_of(folder: Path, *, says: dict[str, Any], **asked: Any) -> Iterator[Bench]:
    """A bench on a model's folder: the engine is told by the configuration what diffusers is told by the scheduler."""
    model = ModelRef(base=str(folder / "base"), refiner=str(folder / "refiner"), **asked)
    profile = RuntimeProfile(device="cpu", dtype="float32", rows=256)
    config = GenerationConfig(model=model, steps=4, width=64, height=64)
    with Engine(load(model, profile), profile, {}) as engine:
        yield Bench(engine, Pipelines.load(folder, **says), config)


@pytest.fixture(scope="module")
def v(lively_model: Path) -> Iterator[Bench]:
    yield from bench_of(lively_model, says=V, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def zero(lively_model: Path) -> Iterator[Bench]:
    yield from bench_of(lively_model, says=ZERO, prediction_type="v_prediction", zero_snr=True)


def mixed(config: GenerationConfig, names: list[str]) -> list[ImageRequest]:
    """An image for each scheduler, every second one handed over to the refiner, no two with the same settings."""
    requests = []
    for index, name in enumerate(names):
        settings = config.with_(
            scheduler=name,
            steps=4 + index % 4,
            guidance_scale=(5.0, 1.0, 7.5)[index % 3],
            guidance_rescale=(0.7, 0.0)[index % 2],
            negative_prompt=(None, "blurry")[index // 2 % 2],
            refiner=RefinerConfig(handover=0.5) if index % 2 else None,
        )
        requests.append(ImageRequest(settings, PROMPTS[index % 4], 400 + index))
    return requests


def differences(bench: Bench, requests: list[ImageRequest]) -> dict[str, float]:
    drawn = bench.together(requests)
    return {
        f"{request.config.scheduler} {request.config.guidance_scale}": difference(image, bench.pipelines.draw(request))
        for request, image in zip(requests, drawn, strict=True)
    }


# --- v, and a terminal signal of zero --------------------------------------------------------------------------------


def test_every_scheduler_draws_a_model_that_predicts_v_as_the_pipelines_do(v):
    found = differences(v, mixed(v.config, NAMES))
    log.info("difference %.1e", max(found.values()))
    assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


def test_every_scheduler_that_can_draws_a_model_of_zero_terminal_snr_as_the_pipelines_do(zero):
    requests = mixed(zero.config, ABLE)
    found = differences(zero, requests)
    log.info("difference %.1e", max(found.values()))
    assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("change", [{"prediction_type": None}, {"zero_snr": False}, {"zero_snr": None}])
def test_the_comparison_turns_red_when_the_model_is_told_otherwise(zero, lively_model, change):
    request = ImageRequest(zero.config, PROMPTS[0], 11)
    expected = zero.pipelines.draw(request)
    assert difference(zero.together([request])[0], expected) <= TOLERANCE
    model = zero.config.model.with_(**change)
    with Engine(load(model, zero.engine.profile), zero.engine.profile, {}) as engine:
        changed = replace(zero, engine=engine, config=zero.config.with_(model=model))
        found = difference(changed.together([replace(request, config=changed.config)])[0], expected)
    assert found > TOLERANCE


def test_the_table_of_who_cannot_is_diffusers_own():
    import inspect

    import diffusers

    takes = {
        name: "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, cls)).parameters
        for name, (cls, _) in DIFFUSERS.items()
    }
    assert {name for name, can in takes.items() if not can} == set(NO_ZERO_SNR)


@pytest.mark.parametrize("name", ABLE)
def test_who_divides_by_a_signal_of_zero_is_known(name):
    """With a model that predicts noise these give no finite latents."""
    pristine = json.loads((NANO / "base" / "scheduler" / "scheduler_config.json").read_text())
    told = pristine | ZERO | {"prediction_type": "epsilon"}
    config = GenerationConfig(scheduler=name, steps=4)
    if name in DIVIDE_BY_SIGNAL:
        with pytest.raises(ConfigError, match=r"divide by the signal, which begins at zero; received"):
            schedulers.build(config, told, seed=1)
    scheduler = schedulers.build(config, told | {"rescale_betas_zero_snr": False}, seed=1)
    scheduler = type(scheduler).from_config(scheduler.config, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(4)
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = noise * scheduler.init_noise_sigma
    scheduler.scale_model_input(latents, scheduler.timesteps[0])
    after = scheduler.step(noise, scheduler.timesteps[0], latents, return_dict=False)[0]
    assert bool(torch.isfinite(after).all()) == (name not in DIVIDE_BY_SIGNAL)


@pytest.mark.parametrize("name", NO_ZERO_SNR)
def test_the_others_are_refused_by_name_before_and_after_the_model_is_known(zero, name):
    rule = rf"scheduler must be one of euler, euler_a, .* with a model of zero terminal SNR.*received '{name}'"
    with pytest.raises(ConfigError, match=rule):
        zero.config.with_(scheduler=name)
    with pytest.raises(ConfigError, match=rule):
        schedulers.build(
            zero.config.with_(model=ModelRef(), scheduler=name), zero.engine.models.base.scheduler_config, seed=1
        )


# --- case 20 of the reports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLE)
def test_the_first_preview_of_a_model_of_zero_terminal_snr_shows_what_it_predicts(zero, name):
    """At pure noise v is the clean image, but for its sign."""
    models = zero.engine.models
    request = ImageRequest(zero.config.with_(scheduler=name, guidance_scale=1.0), PROMPTS[0], 3)
    trajectory = Trajectory(models, request, lambda _, prompt: models.base.embed(prompt))
    trajectory.inputs()
    prediction = torch.randn(trajectory.latents.shape, generator=torch.Generator().manual_seed(1))
    trajectory.take(prediction)
    seen = trajectory.denoised()
    assert seen is not None
    assert torch.allclose(seen, -prediction, atol=2e-3)


def test_an_interval_up_to_the_largest_noise_level_has_the_first_step(zero):
    base = zero.config.with_(steps=3, guidance_scale=6.0)
    asked = [
        ImageRequest(config, PROMPTS[0], 5)
        for config in (base, base.with_(guidance_interval=(0, 1000)), base.with_(guidance_interval=(0, 999)))
    ]
    whole, all_of_it, less = zero.together(asked)
    assert difference(whole, all_of_it) <= TOLERANCE < difference(whole, less)


# --- distilled UNets, which are told the guidance scale (case 4) -----------------------------------------------------


@pytest.fixture(scope="module")
def distilled(lively_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("distilled")
    shutil.copytree(lively_model, folder, dirs_exist_ok=True)
    draw = torch.Generator().manual_seed(2)
    for role, width in (("base", 16), ("refiner", 9)):
        place = folder / role / "unet"
        told = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(told | {"time_cond_proj_dim": width}))
        (path,) = place.glob("*.safetensors")
        projection = torch.randn(told["block_out_channels"][0], width, generator=draw).half()
        save_file(load_file(path) | {"time_embedding.cond_proj.weight": projection}, path, metadata={"format": "pt"})
    yield from bench_of(folder, says={})


def test_a_distilled_unet_is_told_the_guidance_scale_of_each_row_as_the_pipelines_tell_it(distilled):
    base = distilled.config
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    asked = [
        *(ImageRequest(base.with_(guidance_scale=scale), PROMPTS[0], 6) for scale in (0.0, 1.0, 2.0, 8.0)),
        ImageRequest(base.with_(guidance_scale=7.0, refiner=RefinerConfig(handover=0.5), steps=6), PROMPTS[1], 7),
        ImageRequest(
            base.with_(guidance_scale=3.0), PROMPTS[1], 8, SourceImage(picture, 0.6, image_record(), stage="refiner")
        ),
        ImageRequest(base.with_(scheduler="lcm", guidance_scale=8.0, negative_prompt="blurry"), PROMPTS[2], 9),
    ]
    drawn = distilled.together(asked)
    found = [difference(image, distilled.pipelines.draw(each)) for each, image in zip(asked, drawn, strict=True)]
    log.info("difference %.1e", max(found))
    assert max(found) <= TOLERANCE
    apart = [difference(first, second) for first, second in pairwise(drawn[:4])]
    assert min(apart) > TOLERANCE, "each guidance scale gives another image"


def test_a_distilled_unet_takes_one_row_a_step(distilled):
    job = distilled.engine.submit(ImageRequest(distilled.config.with_(guidance_scale=8.0), PROMPTS[0], 1))
    assert trajectory_of(job).outcome().unet_rows == {"base": 4}
