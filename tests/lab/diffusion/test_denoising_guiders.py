"""Parity of guiders: images in a mixed batch against diffusers' guiders and PAG pipelines, and what they cost.

diffusers' SDXL pipelines know plain guidance alone, so APG and CFG-Zero* are drawn by a loop over the pipeline's parts
that asks diffusers' own guider; PAG by its own pipelines.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPAGImg2ImgPipeline, StableDiffusionXLPAGPipeline
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance, PerturbedAttentionGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from sdxl_lab.config import (
    ConfigError,
    FreeU,
    GenerationConfig,
    PerturbedAttention,
    ProjectedGuidance,
    RefinerConfig,
    ZeroStar,
)
from sdxl_lab.diffusion import guiders
from sdxl_lab.diffusion.attention import RowProcessor
from sdxl_lab.diffusion.denoising import parts_of, rows_of
from sdxl_lab.job import ImageRequest
from tests.lab.diffusion.conftest import trajectory_of
from tests.lab.diffusion.test_denoising import (
    PROMPTS,
    TOLERANCE,
    Bench,
    Pipelines,
    bench,
    difference,
    drawn_by_hand,
)

__all__ = ["bench"]  # the fixture

log = logging.getLogger(__name__)

# --- one function against diffusers' ---------------------------------------------------------------------------------


def predictions(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 1, 4, 8, 8, generator=draw)) for _ in range(count)]


def apg(config: GenerationConfig) -> Any:
    """diffusers' guider, in the paper's own form: from the guided prediction on, one scale less."""
    return AdaptiveProjectedGuidance(
        guidance_scale=config.guidance_scale - 1,
        adaptive_projected_guidance_momentum=config.apg.momentum,
        adaptive_projected_guidance_rescale=config.apg.threshold,
        eta=config.apg.eta,
        guidance_rescale=config.guidance_rescale,
        use_original_formulation=True,
    )


def cfg_zero(config: GenerationConfig) -> Any:
    return ClassifierFreeZeroStarGuidance(
        guidance_scale=config.guidance_scale,
        zero_init_steps=config.cfg_zero.zero_steps,
        guidance_rescale=config.guidance_rescale,
    )


THEIRS = {"apg": apg, "cfg_zero": cfg_zero}


def theirs(config: GenerationConfig) -> Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """diffusers' guider of a configuration, as a loop calls it: (index, steps, guided, unguided)."""
    (name,) = (name for name in THEIRS if getattr(config, name) is not None)
    guider = THEIRS[name](config)

    def guide(index: int, steps: int, guided: torch.Tensor, unguided: torch.Tensor) -> torch.Tensor:
        guider.set_state(index, steps, None)
        if name == "apg" and index == 0:  # as its `prepare_inputs` does
            guider.momentum_buffer = MomentumBuffer(config.apg.momentum)
        both = {"pred_cond": guided, "pred_uncond": unguided}
        return guider.forward(**dict(list(both.items())[: guider.num_conditions])).pred

    return guide


GUIDED: list[dict[str, Any]] = [
    {"apg": ProjectedGuidance()},
    {"apg": ProjectedGuidance(eta=1.0, threshold=0.0, momentum=0.0)},
    {"apg": ProjectedGuidance(eta=0.3, threshold=0.2, momentum=0.6), "guidance_rescale": 0.7},
    {"cfg_zero": ZeroStar()},
    {"cfg_zero": ZeroStar(), "guidance_rescale": 0.4},
    {"cfg_zero": ZeroStar(zero_steps=2)},
]


@pytest.mark.parametrize("settings", GUIDED[:5], ids=str)
@pytest.mark.parametrize("scale", [2.0, 9.0])
def test_a_guider_answers_as_diffusers_own(settings, scale):
    config = GenerationConfig(guidance_scale=scale, **settings)
    ours, reference = guiders.guider_of(config), theirs(config)
    for index, (unguided, guided) in enumerate(predictions()):
        found = ours(unguided, guided, scale)
        if config.guidance_rescale:
            found = guiders.rescaled(found, guided, config.guidance_rescale)
        torch.testing.assert_close(found, reference(index, 4, guided, unguided), rtol=1e-5, atol=1e-5)


def test_projected_guidance_that_keeps_all_is_plain_guidance():
    whole = guiders.Projected(eta=1, threshold=0, momentum=0)
    for unguided, guided in predictions():
        torch.testing.assert_close(whole(unguided, guided, 7.0), guiders.classifier_free(unguided, guided, 7.0))


def test_a_perturbed_row_is_added_as_diffusers_guider_adds_it():
    for unguided, guided in predictions():
        guider = PerturbedAttentionGuidance(5.0, 3.0, 0.0, 1.0, perturbed_guidance_layers=[0])
        guider.set_state(1, 4, None)
        perturbed = guided.flip(-1)
        expected = guider.forward(guided, unguided, perturbed).pred
        found = guiders.away_from(guiders.classifier_free(unguided, guided, 5.0), guided, perturbed, 3.0)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("adaptive", "timestep", "scale"), [(0.0, 1, 3.0), (0.003, 900, 2.7), (0.01, 500, 0.0)])
def test_the_perturbed_scale_declines_as_in_diffusers(bench, adaptive, timestep, scale):
    pipe = StableDiffusionXLPAGPipeline(**bench.pipelines.base.components, add_watermarker=False)
    pipe._pag_scale, pipe._pag_adaptive_scale = 3.0, adaptive
    assert pipe._get_pag_scale(timestep) == pytest.approx(scale)
    config = PerturbedAttention(scale=3.0, adaptive=adaptive)
    assert guiders.perturbed_scale(config, timestep) == pytest.approx(scale)
    assert guiders.perturbed_scale(None, timestep) == 0


# --- images ----------------------------------------------------------------------------------------------------------


def test_guided_images_in_a_mixed_batch_are_those_of_diffusers_guiders_alone(bench):
    """Between plain images, so that whoever guides another row than its own is seen."""
    requests = []
    for index, settings in enumerate(GUIDED):
        config = bench.config.with_(steps=4 + index % 3, guidance_scale=(5.0, 11.0)[index % 2], **settings)
        requests.append(ImageRequest(config, PROMPTS[index % 4], 600 + index))
        requests.append(ImageRequest(bench.config.with_(scheduler="dpmpp_2m"), PROMPTS[1], index))
    drawn = dict(zip(map(id, requests), bench.together(requests), strict=True))
    found = [
        difference(drawn[id(request)], drawn_by_hand(bench.pipelines, request, theirs(request.config)))
        for request in requests[::2]
    ]
    log.info("differences %s", " ".join(f"{each:.1e}" for each in found))
    assert max(found) <= TOLERANCE


def drawn_with_pag(pipelines: Pipelines, request: ImageRequest) -> np.ndarray:
    """The image of diffusers' PAG pipelines."""
    pag = request.config.pag
    layers = {"pag_applied_layers": pag.layers}
    base = StableDiffusionXLPAGPipeline(**pipelines.base.components, add_watermarker=False, **layers)
    refiner = StableDiffusionXLPAGImg2ImgPipeline(
        **pipelines.refiner.components,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
        **layers,
    )
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    more = {"pag_scale": pag.scale, "pag_adaptive_scale": pag.adaptive}
    return replace(pipelines, base=_with(base, more), refiner=_with(refiner, more)).draw(request)


def _with(pipe: Any, more: dict[str, Any]) -> Any:
    """A pipeline that is always called with these arguments, too."""

    class Called:
        def __setattr__(self, name: str, value: Any) -> None:
            setattr(pipe, name, value)

        def __call__(self, **given: Any) -> Any:
            return pipe(**given, **more)

    return Called()


PERTURBED: list[dict[str, Any]] = [
    {"pag": PerturbedAttention()},
    {"pag": PerturbedAttention(scale=1.5, layers="up"), "guidance_scale": 7.0, "guidance_rescale": 0.7},
    {"pag": PerturbedAttention(scale=2.0, layers="down"), "scheduler": "dpmpp_2m"},
    {"pag": PerturbedAttention(scale=4.0), "guidance_scale": 1.0},
    {"pag": PerturbedAttention(scale=3.0, adaptive=0.005), "scheduler": "heun", "negative_prompt": "blurry"},
    {"pag": PerturbedAttention(scale=2.5), "refiner": RefinerConfig(handover=0.5)},
]


@pytest.fixture(scope="module")
def perturbed(bench: Bench) -> list[tuple[ImageRequest, np.ndarray]]:
    """Images with a perturbed row, each between two without."""
    requests = []
    for index, settings in enumerate(PERTURBED):
        requests.append(ImageRequest(bench.config.with_(**settings), PROMPTS[index % 4], 700 + index))
        requests.append(ImageRequest(bench.config.with_(guidance_scale=(5.0, 1.0)[index % 2]), PROMPTS[2], index))
    return list(zip(requests, bench.together(requests), strict=True))


@pytest.mark.parametrize("index", range(len(PERTURBED)), ids=[str(settings) for settings in PERTURBED])
def test_a_perturbed_image_in_a_mixed_batch_is_that_of_the_pag_pipeline_alone(bench, perturbed, index):
    request, image = perturbed[2 * index]
    found = difference(image, drawn_with_pag(bench.pipelines, request))
    log.info("difference %.1e", found)
    assert found <= TOLERANCE


def test_and_its_neighbours_are_those_of_the_plain_pipeline(bench, perturbed):
    found = [difference(image, bench.pipelines.draw(request)) for request, image in perturbed[1::2]]
    log.info("difference %.1e", max(found))
    assert max(found) <= TOLERANCE


FREE: list[dict[str, Any]] = [
    {"freeu": FreeU()},
    {"freeu": FreeU(b1=1.3, b2=1.4, s1=0.9, s2=0.2), "guidance_scale": 1.0},
    {"freeu": FreeU(b1=1.5, b2=0.8, s1=1.5, s2=1.0), "refiner": RefinerConfig(handover=0.5), "scheduler": "dpmpp_2m"},
]


def test_free_images_in_a_mixed_batch_are_those_of_the_pipeline_with_freeu_alone(bench):
    requests = []
    for index, settings in enumerate(FREE):
        requests.append(ImageRequest(bench.config.with_(**settings), PROMPTS[index % 4], 800 + index))
        requests.append(ImageRequest(bench.config.with_(scheduler="unipc"), PROMPTS[3], index))
    found = []
    for request, image in zip(requests, bench.together(requests), strict=True):
        pipes, free = (bench.pipelines.base, bench.pipelines.refiner), request.config.freeu
        for pipe in pipes if free else ():
            pipe.enable_freeu(s1=free.s1, s2=free.s2, b1=free.b1, b2=free.b2)
        try:
            found.append(difference(image, bench.pipelines.draw(request)))
        finally:
            for pipe in pipes:
                pipe.disable_freeu()
    log.info("differences %s", " ".join(f"{each:.1e}" for each in found))
    assert max(found) <= TOLERANCE


MUTATIONS = [
    *(("freeu", {scale: 2.0}) for scale in ("b1", "b2", "s1", "s2")),
    ("apg", {"eta": 1.0}),
    ("apg", {"threshold": 0.0}),
    ("apg", {"momentum": 0.5}),
    ("cfg_zero", {"zero_steps": 1}),
    ("pag", {"scale": 4.0}),
    ("pag", {"adaptive": 0.002}),
    ("pag", {"layers": "up"}),
]
STARTS = {
    "apg": ProjectedGuidance(threshold=0.3),
    "cfg_zero": ZeroStar(),
    "pag": PerturbedAttention(),
    "freeu": FreeU(),
}


def test_the_mutations_reach_every_field_of_the_guiders():
    fields = {(name, field) for name, start in STARTS.items() for field in type(start).model_fields}
    assert {(name, field) for name, change in MUTATIONS for field in change} == fields


def test_the_comparison_turns_red_when_a_field_of_a_guider_changes(bench):
    starts = {name: bench.config.with_(**{name: start}, guidance_scale=9.0) for name, start in STARTS.items()}
    plain = dict(zip(starts, bench.together([ImageRequest(c, PROMPTS[0], 1) for c in starts.values()]), strict=True))
    changed = [starts[name].with_(**{name: STARTS[name].with_(**change)}) for name, change in MUTATIONS]
    drawn = bench.together([ImageRequest(config, PROMPTS[0], 1) for config in changed])
    for (name, change), image in zip(MUTATIONS, drawn, strict=True):
        found = difference(image, plain[name])
        log.info("%s %s: difference %.1e", name, change, found)
        assert found > TOLERANCE, (name, change)


# --- what it costs ---------------------------------------------------------------------------------------------------

ROWS = [
    ({}, 2, 8),
    ({"guidance_scale": 1.0}, 1, 4),
    ({"apg": ProjectedGuidance()}, 2, 8),
    ({"pag": PerturbedAttention()}, 3, 12),
    ({"pag": PerturbedAttention(), "guidance_scale": 1.0}, 2, 8),
    ({"pag": PerturbedAttention(scale=0.0)}, 2, 8),
    # At the timesteps 751, 501, 251, 1 the scale is 3 - 0.005 x (1000 - t): 1.75, 0.5, and then below 0.
    ({"pag": PerturbedAttention(adaptive=0.005)}, 3, 10),
    ({"cfg_zero": ZeroStar(zero_steps=1)}, 2, 7),
    ({"pag": PerturbedAttention(), "guidance_interval": (20.0, 30.0)}, 3, 4),
]


@pytest.mark.parametrize(("settings", "most", "rows"), ROWS, ids=[str(settings) for settings, _, _ in ROWS])
def test_rows_are_counted_as_they_are_drawn(bench, monkeypatch, settings, most, rows):
    request, counted = ImageRequest(bench.config.with_(**settings), PROMPTS[0], 11), []
    predict = bench.engine._predict

    def counting(name: str, inputs: list[Any], **more: Any) -> Any:
        counted.extend(len(each.timesteps) for each in inputs)
        return predict(name, inputs, **more)

    monkeypatch.setattr(bench.engine, "_predict", counting)
    assert rows_of(request) == most
    assert [part.rows for part in parts_of(request)] == [most]
    job = bench.engine.submit(request)
    assert job.result(60).record.unet_rows == {"base": rows}
    assert sum(counted) == rows
    assert max(counted) <= most


def test_a_call_without_a_perturbed_row_is_not_told_of_any(bench, monkeypatch):
    told = []
    alone = RowProcessor.alone
    monkeypatch.setattr(RowProcessor, "alone", lambda self, given: told.append(given) or alone(self, given))
    bench.engine.draw(ImageRequest(bench.config, PROMPTS[0], 1))
    assert not told
    bench.engine.draw(ImageRequest(bench.config.with_(pag=PerturbedAttention()), PROMPTS[0], 1))
    assert told


def test_either_of_two_guiders_is_refused_beside_the_other():
    with pytest.raises(ConfigError, match="cfg_zero must be left out where apg is not"):
        GenerationConfig(apg=ProjectedGuidance(), cfg_zero=ZeroStar())


def test_blocks_without_self_attention_cannot_be_perturbed(bench, monkeypatch):
    monkeypatch.setattr("sdxl_lab.diffusion.denoising.perturbs", lambda unet, layers: False)
    config = bench.config.with_(pag=PerturbedAttention(layers="up"))
    with pytest.raises(ConfigError, match=r"pag\.layers must be blocks in which the base's UNet has self-attention"):
        bench.engine.draw(ImageRequest(config, PROMPTS[0], 1))


def test_the_last_latents_are_finite_with_every_guider_together_with_pag(bench):
    job = bench.engine.submit(
        ImageRequest(bench.config.with_(apg=ProjectedGuidance(), pag=PerturbedAttention()), PROMPTS[0], 1)
    )
    assert torch.isfinite(trajectory_of(job).latents).all()
