"""Parity is the law: the engine's images against those that diffusers' own pipelines draw, each alone.

The engine draws all images together, with different schedulers, prompts, seeds, step counts and guidance; they are
compared as floats, before they are rounded to 8 bits. What the reference does is written here from diffusers'
documentation, never taken from the code under test.
"""

import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_utils import AysSchedules
from PIL import Image

from sdxl_lab.config import (
    ConfigError,
    FreeU,
    GenerationConfig,
    HiresConfig,
    ModelRef,
    PerturbedAttention,
    ProjectedGuidance,
    RefinerConfig,
    RuntimeProfile,
    ZeroStar,
)
from sdxl_lab.diffusion import schedulers
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.diffusion.models import load
from sdxl_lab.job import ImageRequest
from sdxl_lab.source import SourceImage
from tests import loras
from tests.lab.diffusion.conftest import trajectory_of
from tests.made import image_record

log = logging.getLogger(__name__)  # shown by --log-cli-level=INFO

TOLERANCE = 1e-3
SCHEDULER = Path("base", "scheduler", "scheduler_config.json")

SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", SDE | KARRAS),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
NAMES = list(DIFFUSERS)
CURVES: dict[str, dict[str, Any]] = {
    "karras": KARRAS,
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
PROMPTS = ["a red cat on a blue background", "a small green house", "An unheard-of zeppelin, 日本", "black star"]
# Lively ones make differences seen; trained ones are what is served.
WEIGHTS = ["lively", pytest.param("nano", marks=pytest.mark.slow)]


TRAINED = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # SDXL's betas, scaled linear, as exact as diffusers'
ALPHAS = torch.cumprod(1 - TRAINED, 0).double()
LEVELS = np.asarray(((1 - ALPHAS) / ALPHAS).sqrt())


def noise_levels(config: GenerationConfig) -> list[float] | None:
    """The noise levels that a scheduler is given, without the 0 at the end; None where diffusers' own scheduler makes
    them by itself."""
    parts = [index / config.steps for index in range(config.steps)]
    if config.sigmas is not None:
        return list(config.sigmas)
    if config.sigma_schedule == "align_your_steps":  # the paper's page ends with 0.029, where diffusers has 0 at once
        knots = np.log([*AysSchedules["StableDiffusionXLSigmas"][:-1], 0.029])
        return [float(np.exp(np.interp(10 * part, range(11), knots))) for part in parts]
    if config.sigma_schedule == "sgm_uniform":
        return [float(np.exp(np.interp(999 - 999 * part, range(1000), np.log(LEVELS)))) for part in parts]
    if config.scheduler == "euler_a" and config.timesteps is not None:
        return [float(LEVELS[timestep]) for timestep in config.timesteps]
    if config.scheduler != "euler_a" or config.sigma_schedule == "own":
        return None
    # diffusers' ancestral Euler has neither lists nor curves: those of Euler, between its first and its last level.
    twin = diffusers.EulerDiscreteScheduler.from_config(json.loads((NANO / SCHEDULER).read_text()))
    twin.register_to_config(**CURVES[config.sigma_schedule])
    if config.timestep_spacing != "own":
        twin.register_to_config(timestep_spacing=config.timestep_spacing)
    twin.set_timesteps(config.steps)
    return twin.sigmas[:-1].tolist()


def visiting(scheduler: diffusers.SchedulerMixin, levels: list[float]) -> diffusers.SchedulerMixin:
    """A scheduler that visits these noise levels when a pipeline sets its timesteps."""
    own, count = scheduler.set_timesteps, len(levels)

    def one_a_step(steps: int, device: Any = None) -> None:
        assert steps == count
        own(steps, device=device)
        timesteps = np.interp(np.log(levels), np.log(LEVELS), np.arange(1000))
        whole = not scheduler.timesteps.is_floating_point()
        scheduler.timesteps = torch.tensor(timesteps.round() if whole else timesteps).to(scheduler.timesteps.dtype)
        scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)

    def two_a_step(steps: int, device: Any = None) -> None:
        assert steps == count
        scheduler.register_to_config(use_karras_sigmas=True)
        own(steps, device=device)

    scheduler._convert_to_karras = lambda *_, **__: np.array(levels)
    scheduler.set_timesteps = one_a_step if scheduler.order == 1 else two_a_step
    return scheduler


@dataclass(frozen=True)
class Pipelines:
    """diffusers' two pipelines, as anybody would load and call them."""

    base: StableDiffusionXLPipeline
    refiner: StableDiffusionXLImg2ImgPipeline
    scheduler_config: dict[str, Any]
    predicts: dict[str, Any] = field(default_factory=dict)  # what a base of another kind says beyond that

    @classmethod
    def load(cls, folder: Path, role: str = "base", **predicts: Any) -> "Pipelines":
        options = {"variant": "fp16", "dtype": torch.float32, "add_watermarker": False}
        base = StableDiffusionXLPipeline.from_pretrained(folder / role, **options)
        shared = {"text_encoder_2": base.text_encoder_2, "tokenizer_2": base.tokenizer_2, "vae": base.vae}
        refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder / "refiner", **shared, **options)
        for pipe in (base, refiner):
            pipe.set_progress_bar_config(disable=True)
        config = json.loads((folder / role / SCHEDULER.relative_to("base")).read_text())
        return cls(base, refiner, config, predicts)

    def scheduler(self, request: ImageRequest, **more: Any) -> diffusers.SchedulerMixin:
        config = request.config
        name, options = DIFFUSERS[config.scheduler]
        if name == "DPMSolverSDEScheduler":
            options = {"noise_sampler_seed": request.seed}
        if config.timestep_spacing != "own":
            options = options | {"timestep_spacing": config.timestep_spacing}
        levels = noise_levels(config)
        if levels is None:
            options = options | CURVES.get(config.sigma_schedule, {})
        scheduler = getattr(diffusers, name).from_config({**self.scheduler_config, **more}, **options)
        return scheduler if levels is None or name == "EulerDiscreteScheduler" else visiting(scheduler, levels)

    def settings(self, request: ImageRequest) -> dict[str, Any]:
        """What every pipeline is told of a request."""
        config = request.config
        # The pipelines pass over the second one where there is no first one.
        negative = config.negative_prompt if config.negative_prompt_2 is None else config.negative_prompt or ""
        settings = {
            "prompt": request.prompt,
            "prompt_2": request.prompt_2,
            "negative_prompt_2": config.negative_prompt_2,
            "negative_prompt": negative,
            "num_inference_steps": config.steps,
            "guidance_scale": config.guidance_scale,
            "guidance_rescale": config.guidance_rescale,
            "original_size": config.original_size,
            "crops_coords_top_left": config.crop,
            "target_size": config.target_size,
            "clip_skip": config.clip_skip,
            "generator": torch.Generator("cpu").manual_seed(request.seed),
        }
        if config.timesteps is not None and config.scheduler != "euler_a":
            settings["timesteps"] = list(config.timesteps)
        elif config.scheduler == "euler" and (levels := noise_levels(config)) is not None:
            settings["sigmas"] = [*levels, 0.0]
        return settings

    def draw(self, request: ImageRequest) -> np.ndarray:
        """The image, float32 (height, width, 3) in [0, 1]."""
        config, scores = request.config, request.config.refiner or RefinerConfig()
        settings = self.settings(request)
        refining = settings | {
            "aesthetic_score": scores.aesthetic_score,
            "negative_aesthetic_score": scores.negative_aesthetic_score,
            "output_type": "np",
        }
        self.base.scheduler = self.scheduler(request, **self.predicts)
        self.refiner.scheduler = self.scheduler(request)
        if request.source is not None:
            return self.refiner(image=request.source.image, strength=request.source.strength, **refining).images[0]
        settings |= {"width": config.width, "height": config.height}
        if config.refiner is None:
            return self.base(**settings, output_type="np").images[0]
        handover = config.refiner.handover
        latents = self.base(**settings, denoising_end=handover, output_type="latent").images
        if config.loras:
            self.base.unload_lora_weights()  # the refiner shares a text encoder
        return self.refiner(image=latents, denoising_start=handover, **refining).images[0]


@dataclass(frozen=True)
class Bench:
    """One set of weights, in the engine and in the pipelines, and the configuration its requests start from."""

    engine: Engine
    pipelines: Pipelines
    config: GenerationConfig

    def together(self, requests: list[ImageRequest]) -> list[np.ndarray]:
        """The engine's images before rounding. They all start in the same tick."""
        gate = threading.Event()
        blocker = self.engine.submit(
            ImageRequest(self.config.with_(steps=2), "gate", 0), on_step=lambda *_: gate.wait(60)
        )
        jobs = [self.engine.submit(request) for request in requests]
        gate.set()
        blocker.result(60)
        for job in jobs:
            job.result(240)
        return [self.engine.models.decode(trajectory_of(job).latents)[0] for job in jobs]


def difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first - second).max())


@pytest.fixture(scope="module", params=WEIGHTS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    folder = NANO if request.param == "nano" else request.getfixturevalue("lively_model")
    ref = ModelRef(base=str(folder / "base"), refiner=str(folder / "refiner"))
    profile = RuntimeProfile(device="cpu", dtype="float32", rows=256)
    config = GenerationConfig(model=ref, steps=4, width=64, height=64)
    with Engine(load(ref, profile), profile, {}) as engine:
        yield Bench(engine, Pipelines.load(folder), config)


# --- every scheduler, in one batch -----------------------------------------------------------------------------------


def mixed_jobs(config: GenerationConfig) -> dict[tuple[str, bool], ImageRequest]:
    """For every scheduler a request without and one with hand-over; no two have the same settings."""
    requests = {}
    for index, name in enumerate(NAMES):
        settings = config.with_(
            scheduler=name,
            steps=3 + index % 6,
            guidance_scale=(5.0, 1.0, 7.5, 2.0, 11.0)[index % 5],
            guidance_rescale=(0.0, 0.0, 0.7)[index % 3],
            negative_prompt=(None, "blurry, yellow", "")[index // 3 % 3],
        )
        requests[name, False] = ImageRequest(settings, PROMPTS[index % 4], 100 + index)
        refiner = RefinerConfig(handover=(0.5, 0.4, 0.55)[index % 3], aesthetic_score=5 + index % 3)
        settings = settings.with_(refiner=refiner, steps=4 + index % 4, guidance_scale=(3.0, 8.0, 1.0)[index % 3])
        requests[name, True] = ImageRequest(settings, PROMPTS[(index + 1) % 4], 200 + index)
    return requests


@pytest.fixture(scope="module")
def mixed(bench: Bench) -> dict[tuple[str, bool], tuple[ImageRequest, np.ndarray]]:
    requests = mixed_jobs(bench.config)
    return dict(
        zip(requests, zip(requests.values(), bench.together(list(requests.values())), strict=True), strict=True)
    )


def test_the_reference_knows_every_scheduler_on_offer():
    assert list(schedulers.TABLE) == NAMES


@pytest.mark.parametrize("refined", [False, True], ids=["base", "refiner"])
@pytest.mark.parametrize("name", NAMES)
def test_a_image_in_a_mixed_batch_is_that_of_the_pipeline_alone(bench, mixed, name, refined):
    request, image = mixed[name, refined]
    found = difference(image, bench.pipelines.draw(request))
    log.info("difference %.1e", found)
    assert found <= TOLERANCE


@pytest.fixture(scope="module")
def refined(bench: Bench) -> dict[str, tuple[ImageRequest, np.ndarray]]:
    """For every scheduler an image gone over by the refiner; every third has nearly all of the schedule again."""
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((96, 64))
    requests = []
    for index, name in enumerate(NAMES):
        settings = bench.config.with_(scheduler=name, negative_prompt=(None, "blurry")[index % 2])
        if index % 3 == 0:
            settings = settings.with_(guidance_rescale=0.7, guidance_scale=(1.0, 7.0)[index % 2])
        source = SourceImage(image, 0.99 if index % 3 == 0 else 0.5, image_record(), stage="refiner")
        requests.append(ImageRequest(settings, PROMPTS[index % 4], 300 + index, source))
    return dict(zip(NAMES, zip(requests, bench.together(requests), strict=True), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_refined_image_in_a_mixed_batch_is_that_of_the_img2img_pipeline(bench, refined, name):
    request, image = refined[name]
    found = difference(image, bench.pipelines.draw(request))
    log.info("difference %.1e", found)
    assert found <= TOLERANCE


SHAPES = [
    {"width": 128, "height": 64},
    {"width": 72, "height": 136},
    {"original_size": (37, 500)},
    {"crop": (16, 40)},
    {"target_size": (512, 96)},
    {"width": 96, "height": 64, "original_size": (900, 700), "crop": (300, 8), "target_size": (64, 96)},
]


@pytest.mark.parametrize("handover", [None, 0.5])
def test_sizes_and_micro_conditioning_are_those_of_the_pipeline(bench, handover):
    refiner = None if handover is None else RefinerConfig(handover=handover)
    requests = [ImageRequest(bench.config.with_(refiner=refiner, **shape), PROMPTS[0], 9) for shape in SHAPES]
    found = [
        difference(image, bench.pipelines.draw(request))
        for request, image in zip(requests, bench.together(requests), strict=True)
    ]
    log.info("difference %.1e", max(found))
    assert max(found) <= TOLERANCE


SKIPS = [
    {"clip_skip": 0},
    {"clip_skip": 1, "negative_prompt": "blurry, yellow"},
    {"clip_skip": 1, "refiner": RefinerConfig(handover=0.5)},
    {"clip_skip": 2, "negative_prompt": "", "refiner": RefinerConfig(handover=0.4)},
    {"clip_skip": 2, "guidance_scale": 1.0},
]


@pytest.mark.parametrize("source", [False, True], ids=["from noise", "from an image"])
def test_layers_of_the_text_encoders_are_skipped_as_the_pipelines_skip_them(bench, source):
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    given = SourceImage(image, 0.6, image_record(), stage="refiner") if source else None
    requests = [ImageRequest(bench.config.with_(**skip), PROMPTS[0], 21, given) for skip in SKIPS]
    drawn = bench.together(requests)
    found = [difference(mine, bench.pipelines.draw(request)) for request, mine in zip(requests, drawn, strict=True)]
    log.info("difference %.1e", max(found))
    assert max(found) <= TOLERANCE
    plain = bench.together([replace(r, config=r.config.with_(clip_skip=None)) for r in requests])
    none, *moved = (difference(*pair) for pair in zip(plain, drawn, strict=True))
    assert none <= TOLERANCE < min(moved), "0 skips nothing, and all others do"


def test_more_layers_than_a_text_encoder_has_are_refused(bench):
    rule = "clip_skip must be at most 2, since a text encoder of the model has 3 layers; received 3. Example: clip_skip"
    with pytest.raises(ConfigError, match=rule):
        bench.engine.draw(ImageRequest(bench.config.with_(clip_skip=3), "a cat", 1))


# --- LoRAs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two LoRAs for UNet and text encoders: kohya's layout with an alpha, and PEFT's for the UNet alone."""
    folder, models = tmp_path_factory.mktemp("loras"), bench.engine.models
    first = loras.write(folder / "first.safetensors", loras.pairs(models), "kohya", alpha=3.0)
    second = loras.write(folder / "second.safetensors", loras.pairs(models, rank=2, seed=1, text=False), "peft")
    return str(first), str(second)


def drawn_with_loras(pipelines: Pipelines, request: ImageRequest) -> np.ndarray:
    """As diffusers does it: each loaded under a name of its own, then all set at once."""
    pipe = pipelines.base
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of a second one
        for place, ref in enumerate(request.config.loras):
            pipe.load_lora_weights(ref.source, adapter_name=f"number_{place}")
    weights = [
        {"unet": ref.weight, "text_encoder": ref.text_weight, "text_encoder_2": ref.text_weight}
        for ref in request.config.loras
    ]
    try:
        if weights:
            pipe.set_adapters([f"number_{place}" for place in range(len(weights))], adapter_weights=weights)
        return pipelines.draw(request)
    finally:
        pipe.unload_lora_weights()


MIXES: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("first:0.5",), {}),
    (("first:1",), {"guidance_scale": 1.0}),
    (("first:0.8", "second:-0.6"), {"scheduler": "dpmpp_2m_karras", "negative_prompt": "blurry"}),
    (("second:1",), {"clip_skip": 1}),
    (("first:1:0",), {"scheduler": "euler_a"}),
    (("first:0.3:1.2", "first:0.4"), {"guidance_interval": (0.0, 1000.0), "steps": 6}),
]


@pytest.fixture(scope="module")
def with_loras(bench: Bench, two: tuple[str, str]) -> list[tuple[ImageRequest, np.ndarray]]:
    """All of them in one batch, at first in one call."""
    files = {"first": two[0], "second": two[1]}
    requests = []
    for index, (words, settings) in enumerate(MIXES):
        named = [f"{files[word.partition(':')[0]]}:{word.partition(':')[2]}" for word in words]
        config = bench.config.changed(settings | {"loras": named})
        requests.append(ImageRequest(config, PROMPTS[index % 4], 400 + index))
    return list(zip(requests, bench.together(requests), strict=True))


@pytest.mark.parametrize("index", range(len(MIXES)), ids=[" + ".join(words) or "none" for words, _ in MIXES])
def test_an_image_with_loras_in_a_mixed_batch_is_that_of_the_pipeline_alone(bench, with_loras, index):
    request, image = with_loras[index]
    found = difference(image, drawn_with_loras(bench.pipelines, request))
    log.info("difference %.1e", found)
    assert found <= TOLERANCE


LORA_MUTATIONS = {
    "weight": {"loras.0.weight": 0.55},
    "text_encoder_weight": {"loras.0.text_encoder_weight": 0.8},
    "another file": {"loras.0.source": "second"},
    "none": {"loras": ()},
    "one more": {"loras": ["first:0.5", "second:0.1"]},
}


@pytest.mark.parametrize("change", LORA_MUTATIONS.values(), ids=LORA_MUTATIONS)
def test_the_comparison_turns_red_when_a_lora_changes(bench, two, with_loras, change):
    files = {"first": two[0], "second": two[1]}
    request, image = with_loras[1]
    if "loras.0.source" in change:
        change = {"loras.0.source": files["second"]}
    elif change.get("loras"):
        change = {"loras": [f"{files['first']}:0.5", f"{files['second']}:0.1"]}
    changed = replace(request, config=request.config.changed(change))
    found = difference(bench.together([changed])[0], image)
    log.info("difference %.1e", found)
    assert found > TOLERANCE


def test_the_refiner_has_no_loras(bench, two):
    """They are made for the base, and a refiner has another UNet."""
    refined = bench.config.with_(refiner=RefinerConfig(handover=0.5), steps=6)
    request = ImageRequest(refined.with_(loras=[f"{two[0]}:0.7"]), PROMPTS[0], 31)
    image = bench.together([request])[0]
    assert difference(image, drawn_with_loras(bench.pipelines, request)) <= TOLERANCE


# --- what the pipelines do not have ----------------------------------------------------------------------------------


# (index, steps, guided prediction, unguided prediction) to the one that is stepped with.
Guide = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def drawn_by_hand(pipelines: Pipelines, request: ImageRequest, guide: Guide) -> np.ndarray:
    """A plain Euler loop over the base, with guidance of one's own."""
    pipe, config = pipelines.base, request.config
    scheduler = pipelines.scheduler(request)
    if config.sigmas is None:
        scheduler.set_timesteps(config.steps)
    else:
        scheduler.set_timesteps(sigmas=[*config.sigmas, 0.0])
    hidden, negative, pooled, negative_pooled = pipe.encode_prompt(
        request.prompt, negative_prompt=config.negative_prompt
    )
    size = (config.height, config.width)
    ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
    noise = torch.randn(
        1, 4, config.height // 8, config.width // 8, generator=torch.Generator().manual_seed(request.seed)
    )
    latents = noise * scheduler.init_noise_sigma

    def predict(scaled: torch.Tensor, t: torch.Tensor, text: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        return pipe.unet(scaled, t, text, added_cond_kwargs={"text_embeds": pool, "time_ids": ids}).sample

    for index, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, t)
        guided, unguided = predict(scaled, t, hidden, pooled), predict(scaled, t, negative, negative_pooled)
        answer = guide(index, len(scheduler.timesteps), guided, unguided)
        latents = scheduler.step(answer, t, latents).prev_sample
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(decoded, output_type="np")[0]


def drawn_with_interval(pipelines: Pipelines, request: ImageRequest) -> np.ndarray:
    """Guided inside the interval of noise levels only."""
    config, scheduler = request.config, pipelines.scheduler(request)
    scheduler.set_timesteps(config.steps)
    levels = config.sigmas or [LEVELS[int(t)] for t in scheduler.timesteps]
    low, high = config.guidance_interval

    def guide(index: int, _: int, guided: torch.Tensor, unguided: torch.Tensor) -> torch.Tensor:
        if not low <= levels[index] <= high:
            return guided
        return unguided + config.guidance_scale * (guided - unguided)

    return drawn_by_hand(pipelines, request, guide)


@pytest.mark.parametrize(("interval", "rows"), [((0.5, 5.0), 13), ((0.0, 1000.0), 16), ((20.0, 30.0), 8)])
def test_guidance_applies_inside_its_interval_only_and_costs_a_row_there_only(bench, monkeypatch, interval, rows):
    request = ImageRequest(bench.config.with_(steps=8, guidance_interval=interval), PROMPTS[0], 11)
    counted = []
    predict = bench.engine._predict
    monkeypatch.setattr(bench.engine, "_predict", lambda name, inputs: counted.append(inputs) or predict(name, inputs))
    job = bench.engine.submit(request)
    job.result(60)
    image = bench.engine.models.decode(trajectory_of(job).latents)[0]
    assert sum(len(each.timesteps) for inputs in counted for each in inputs) == rows
    assert difference(image, drawn_with_interval(bench.pipelines, request)) <= TOLERANCE


def test_an_interval_of_all_noise_levels_is_plain_guidance(bench):
    request = ImageRequest(bench.config, PROMPTS[0], 12)
    everywhere = replace(request, config=request.config.with_(guidance_interval=(0, 1000)))
    one, other = bench.together([request, everywhere])
    # The same rows at other places in the batch: only their rounding differs, by 1.7e-5 at most where it was measured.
    assert difference(one, other) <= TOLERANCE / 10


# --- would the comparison notice? ------------------------------------------------------------------------------------

MUTATIONS: dict[str, dict[str, Any]] = {
    "scheduler": {"scheduler": "dpmpp_2m"},
    "steps": {"steps": 7},
    "guidance_scale": {"guidance_scale": 5.5},
    "guidance_rescale": {"guidance_rescale": 0.3},
    "guidance_interval": {"guidance_interval": (0.0, 5.0)},
    "original_size": {"original_size": (64, 128)},
    "crop": {"crop": (0, 16)},
    "target_size": {"target_size": (64, 128)},
    "negative_prompt": {"negative_prompt": "blue"},
    "clip_skip": {"clip_skip": 1},
    "loras": {"loras": ("nano/neon",)},
    "sigma_schedule": {"sigma_schedule": "align_your_steps"},
    "timestep_spacing": {"timestep_spacing": "trailing"},
    "sigmas": {"sigmas": (14.0, 7.0, 4.0, 2.0, 1.0, 0.5)},
    "timesteps": {"timesteps": (980, 800, 600, 450, 300, 150)},
    "apg": {"apg": ProjectedGuidance(threshold=1.0)},
    "cfg_zero": {"cfg_zero": ZeroStar()},
    "pag": {"pag": PerturbedAttention()},
    "freeu": {"freeu": FreeU()},
    "width": {"width": 72},
    "height": {"height": 72},
    "refiner": {"refiner": None},
    "hires": {"hires": HiresConfig(scale=1.0, strength=1.0)},
}
REFINER_MUTATIONS = {"handover": 0.7, "aesthetic_score": 4.0, "negative_aesthetic_score": 6.0}
MOVES_NO_LATENTS = {"model", "watermark"}  # what they do is tested in test_models.py and test_engine.py
IN_PROMPTS = {"prompt_syntax", "negative_prompt_2", "embeddings"}  # these are changed in test_denoising_prompts.py


def test_the_mutations_reach_every_field():
    assert set(GenerationConfig.model_fields) == set(MUTATIONS) | MOVES_NO_LATENTS | IN_PROMPTS
    assert set(RefinerConfig.model_fields) == set(REFINER_MUTATIONS)


@pytest.fixture(scope="module")
def original(bench: Bench) -> ImageRequest:
    return ImageRequest(bench.config.with_(steps=6, refiner=RefinerConfig(handover=0.5)), PROMPTS[0], 42)


@pytest.fixture(scope="module")
def expected(bench: Bench, original: ImageRequest) -> np.ndarray:
    return bench.pipelines.draw(original)


def cut(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The part that two images of different size share."""
    return image[: like.shape[0], : like.shape[1]]


def test_the_unchanged_job_is_green(bench, original, expected):
    assert difference(bench.together([original])[0], expected) <= TOLERANCE


@pytest.mark.parametrize("field", MUTATIONS)
def test_the_comparison_turns_red_when_a_field_changes(bench, original, expected, field):
    request = replace(original, config=original.config.with_(**MUTATIONS[field]))
    found = difference(cut(bench.together([request])[0], expected), expected)
    log.info("difference %.1e", found)
    assert found > TOLERANCE


@pytest.mark.parametrize("field", REFINER_MUTATIONS)
def test_the_comparison_turns_red_when_a_field_of_the_refiner_changes(bench, original, expected, field):
    refiner = original.config.refiner.with_(**{field: REFINER_MUTATIONS[field]})
    request = replace(original, config=original.config.with_(refiner=refiner))
    found = difference(bench.together([request])[0], expected)
    log.info("difference %.1e", found)
    assert found > TOLERANCE


@pytest.mark.parametrize("change", [{"seed": 43}, {"prompt": "a red dog on a blue background"}], ids=["seed", "prompt"])
def test_the_comparison_turns_red_when_seed_or_prompt_change(bench, original, expected, change):
    found = difference(bench.together([replace(original, **change)])[0], expected)
    log.info("difference %.1e", found)
    assert found > TOLERANCE


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_the_comparison_turns_red_when_the_strength_changes(bench, strength):
    image = Image.new("RGB", (64, 64), "orange")
    request = ImageRequest(
        bench.config.with_(steps=10), PROMPTS[0], 1, SourceImage(image, 0.7, image_record(), stage="refiner")
    )
    changed = replace(request, source=replace(request.source, strength=strength))
    assert difference(bench.together([changed])[0], bench.pipelines.draw(request)) > TOLERANCE


# --- requests that are refused ------------------------------------------------------------------------------------

BAD_JOBS = [
    ({"prompt": ""}, "; received '0 characters'. Example: prompt = \"A cat in a hat\""),
    ({"prompt": "x" * 2001}, "received '2001 characters'"),
    ({"seed": -1}, "seed must be a whole number from 0 to 9223372036854775807; received -1. Example: seed = 7"),
]


@pytest.mark.parametrize(("change", "said"), BAD_JOBS, ids=[said[:30] for _, said in BAD_JOBS])
def test_a_job_out_of_range_is_refused_before_any_work(change, said):
    with pytest.raises(ConfigError) as caught:
        ImageRequest(**({"config": GenerationConfig(), "prompt": "A cat in a hat", "seed": 1} | change))
    assert said in str(caught.value)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, "much", float("nan"), None])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ConfigError, match=r"strength must be a number above 0, at most 1; .* Example: strength = 0\.3"):
        ImageRequest(GenerationConfig(), "a cat", 1, SourceImage(Image.new("RGB", (64, 64)), strength, image_record()))


def test_a_strength_that_leaves_no_step_is_refused():
    with pytest.raises(ConfigError, match=r"strength must be at least 1/steps, here 0\.04.*received 0\.03"):
        ImageRequest(
            GenerationConfig(steps=25), "a cat", 1, SourceImage(Image.new("RGB", (64, 64)), 0.03, image_record())
        )


def test_refining_with_a_model_without_refiner_is_refused():
    config = GenerationConfig(model=ModelRef(refiner=None))
    with pytest.raises(
        ConfigError,
        match=r"model must be one with a refiner, since refining was asked; received 'nano'. Example: model = \"nano\"",
    ):
        ImageRequest(config, "a cat", 1, SourceImage(Image.new("RGB", (64, 64)), 0.5, image_record(), stage="refiner"))


@pytest.mark.parametrize(("handover", "lacking"), [(0.01, "base"), (0.999, "refiner")])
def test_a_hand_over_that_leaves_a_stage_without_a_step_is_refused(bench, handover, lacking):
    request = ImageRequest(
        bench.config.with_(scheduler="dpmpp_2m", refiner=RefinerConfig(handover=handover)), "a cat", 1
    )
    if lacking == "base":
        request = replace(request, config=request.config.with_(scheduler="lcm", refiner=RefinerConfig(handover=0.0001)))
    with pytest.raises(ConfigError, match=rf"enough that both base and refiner get one \({lacking} has none\)"):
        bench.engine.submit(request).result(60)
