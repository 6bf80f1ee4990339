"""The regression turns red for whatever changes a promoted image: each is shown once."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lab.config import GenerationConfig, ModelRef, RefinerConfig, RuntimeProfile
from sdxl_lab.diffusion import engine, schedulers
from sdxl_lab.diffusion.models import load
from sdxl_lab.evaluation import comparison, regression
from sdxl_lab.evaluation.comparison import ComparisonPlan
from sdxl_lab.evaluation.regression import RegressionError, regress
from sdxl_lab.images import GeneratedImage, open_image
from sdxl_lab.job import ImageRequest
from sdxl_lab.release import verify as verifying
from sdxl_lab.release.diff import changed_fields
from sdxl_lab.release.promote import promote
from sdxl_lab.release.slot import Slot, SlotError, load_slot
from sdxl_lab.release.verify import GoldenCheck, compare_golden

ROOT = Path(__file__).parents[3]
FLOAT32 = RuntimeProfile(device="cpu", dtype="float32")
PROMPTS = ("a cat", "a dog", "a red hat", "a blue boat", "a tree")
PLAN = ComparisonPlan(prompts=PROMPTS, seeds=(3,), gates=("unet_rows: at most 20 % worse",), metrics=(), goldens=2)


@pytest.fixture(scope="module")
def ref(lively_model: Path) -> ModelRef:
    return ModelRef(base=str(lively_model / "base"), refiner=str(lively_model / "refiner"))


@pytest.fixture(scope="module")
def models(ref: ModelRef) -> Any:
    return load(ref, FLOAT32)


@pytest.fixture(scope="module")
def config(ref: ModelRef) -> GenerationConfig:
    """Every field set to something that an image of the random model shows."""
    return GenerationConfig(
        model=ref,
        steps=4,
        width=64,
        height=64,
        guidance_rescale=0.3,
        guidance_interval=(0.0, 900.0),
        original_size=(64, 64),
        crop=(0, 0),
        target_size=(64, 64),
        negative_prompt="blurry",
        refiner=RefinerConfig(handover=0.5),
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, models: Any, ref: ModelRef) -> None:
    """The models are loaded already; those of another folder are loaded in earnest."""
    monkeypatch.setattr(engine, "load", lambda asked, profile: models if asked == ref else load(asked, profile))


def put(config: GenerationConfig, folder: Path, plan: ComparisonPlan = PLAN) -> Slot:
    found = comparison.compare(config, folder, plan, FLOAT32)
    promote(config, folder, images=found.goldens, why="w", who="Ada", findings=found.findings(), allow_dirty=True)
    return load_slot(folder)


@pytest.fixture(scope="module")
def promoted(config, models, tmp_path_factory) -> Path:
    """A slot with two goldens and a metric set of five prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load", lambda *_: models)
        return put(config, tmp_path_factory.mktemp("promoted") / "slot").folder


@pytest.fixture
def slot(promoted: Path, tmp_path: Path, quick: None) -> Slot:
    shutil.copytree(promoted, tmp_path / "slot")
    return load_slot(tmp_path / "slot")


def test_an_unchanged_slot_passes(slot, tmp_path):
    found = regress(slot, profile=FLOAT32)
    assert found.passed
    assert [golden.difference for golden in found.goldens] == [0.0, 0.0]
    assert [(verdict.gate, verdict.passed) for verdict in found.verdicts] == [(str(PLAN.gates[0]), True)]
    found.check()
    found.write(tmp_path / "new" / "result.json")
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert (result["passed"], result["reasons"], result["digest"]) == (True, [], slot.digest)
    assert result["promoted"] == result["redrawn"]


# --- each configuration field, changed once ------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "loras": ("nano/neon",),
    "scheduler": "heun",
    "steps": 5,
    "guidance_scale": 5.5,
    "guidance_rescale": 0.4,
    "guidance_interval": (0.0, 2.0),
    "sigma_schedule": "karras",
    "timestep_spacing": "trailing",
    "sigmas": (14.0, 6.0, 2.0, 0.5),
    "timesteps": (999, 700, 400, 100),
    "apg": {},
    "apg.eta": 0.5,
    "apg.threshold": 0.1,
    "apg.momentum": 0.5,
    "cfg_zero": {},
    "cfg_zero.zero_steps": 1,
    "pag": {},
    "pag.scale": 1.0,
    "pag.adaptive": 0.0005,
    "pag.layers": "up",
    "freeu": {},
    "freeu.b1": 1.5,
    "freeu.b2": 1.5,
    "freeu.s1": 0.5,
    "freeu.s2": 0.5,
    "hires": {"strength": 0.9},
    "hires.scale": 1.5,
    "hires.strength": 0.8,
    "hires.steps": 8,
    "hires.upscaler": "lanczos",
    "width": 72,
    "height": 72,
    "original_size": (72, 64),
    "crop": (8, 0),
    "target_size": (64, 72),
    "negative_prompt": "grey",
    "negative_prompt_2": "grey",
    "prompt_syntax": "a1111",
    "clip_skip": 1,
    "watermark": True,
    "refiner": None,
    "refiner.handover": 0.75,
    "refiner.aesthetic_score": 7.0,
    "refiner.negative_aesthetic_score": 3.5,
}


def changed(config: GenerationConfig, field: str) -> GenerationConfig:
    enough = {"hires.strength": 0.9} if field.startswith("hires.") else {}  # so that the base gets a step
    return config.changed(enough | {field: CHANGES[field]})


def test_every_field_of_the_configuration_is_changed_once():
    """But for the model: which weights are drawn with see the swapped file below. And but for embeddings, whose words
    stand in a prompt: tests/lab/diffusion/test_denoising_prompts.py."""
    own = {name for name in GenerationConfig.settings() if not name.startswith("model")}
    assert own - {"embeddings"} == set(CHANGES)


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_that_is_no_longer_drawn_as_promoted_is_red(slot, config, tmp_path, monkeypatch, field):
    """As when the code begins to read a setting otherwise: the slot says one thing, the image shows another."""
    prompt = "a cat"
    if field == "watermark":  # below 256x256 there is none
        config = config.with_(width=256, height=256)
    if field == "prompt_syntax":  # without a notation in it a text is the same in both
        prompt = "a (cat)"
    if field in ("watermark", "prompt_syntax"):
        slot = put(config, tmp_path / "own", dataclasses.replace(PLAN, goldens=1, prompts=(prompt,), gates=()))
    monkeypatch.setattr(
        verifying, "ImageRequest", lambda config, prompt, seed: ImageRequest(changed(config, field), prompt, seed)
    )
    found = regress(slot, metrics=False, profile=FLOAT32)
    assert all(golden.reason for golden in found.goldens)
    with pytest.raises(RegressionError, match="has regressed: golden 01-a-"):
        found.check()


@pytest.mark.parametrize("field", [*CHANGES, "model"])
def test_a_field_edited_in_the_slot_is_refused_by_its_digest(slot, config, field):
    if field == "watermark":
        edited = config.with_(width=256, height=256, watermark=True)
    elif field == "model":
        edited = config.with_(model=config.model.with_(vae="nano"))
    else:
        edited = changed(config, field)
    assert any(name.split(".")[0] == field.split(".")[0] for name in changed_fields(config, edited))
    (slot.folder / "config.toml").write_text(edited.to_toml())
    with pytest.raises(SlotError, match=f"has the digest {edited.digest}, but evidence.json speaks of '{slot.digest}'"):
        load_slot(slot.folder)


# --- libraries, schedulers, weights --------------------------------------------------------------------------------


def test_a_scheduler_that_leaks_into_the_next_image_is_red(slot, monkeypatch):
    """What `pipe.scheduler = X.from_config(pipe.scheduler.config)` does: an option set once stays."""
    build, last = schedulers.build, {}

    def leaky(config, pristine, *, seed):
        scheduler = build(config, pristine, seed=seed)
        last.update({"use_karras_sigmas": True} if scheduler.config.get("use_karras_sigmas") else {})
        return type(scheduler).from_config(scheduler.config, **last)

    monkeypatch.setattr(schedulers, "build", leaky)
    assert regress(slot, metrics=False, profile=FLOAT32).passed, "nothing has leaked yet"
    karras = slot.config.with_(scheduler="dpmpp_2m_karras")
    comparison.draw([ImageRequest(karras, "a cat", 1)], FLOAT32)
    found = regress(slot, metrics=False, profile=FLOAT32)
    assert all("the image differs by" in golden.reason for golden in found.goldens)


def stepping(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A release of diffusers whose Euler steps take the UNet's answer a little larger."""
    for scheduler in (diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler):

        def other(self, model_output, *rest, step=scheduler.step, **options):
            return step(self, model_output * factor, *rest, **options)

        monkeypatch.setattr(scheduler, "step", other)


def attending(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A release of torch whose attention is scaled otherwise."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def other(query, key, value, *rest, **options):
        return attend(query * factor, key, value, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other)


@pytest.mark.parametrize(("library", "factor"), [(stepping, 1.1), (attending, 2.0)])
def test_a_library_that_computes_otherwise_is_red(slot, monkeypatch, library, factor):
    """An untrained model's images are pale, so the change is a coarse one; nano's below show a fine one."""
    library(monkeypatch, factor)
    found = regress(slot, metrics=False, profile=FLOAT32)
    assert all("the image differs by" in golden.reason for golden in found.goldens)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "factor"), [(stepping, 1.002), (attending, 1.01)])
def test_nano_shows_a_library_that_computes_slightly_otherwise(monkeypatch, library, factor):
    library(monkeypatch, factor)
    found = regress(load_slot(ROOT / "service/promoted/nano"), metrics=False, profile=FLOAT32)
    assert all("the image differs by" in golden.reason for golden in found.goldens), found.reasons


@pytest.mark.parametrize("part", ["base/unet", "base/vae", "base/text_encoder", "base/text_encoder_2", "refiner/unet"])
def test_a_swapped_weight_file_is_red(lively_model, config, tmp_path, monkeypatch, part):
    """A file of the same shape with other numbers in it, under the old name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(lively_model, tmp_path / "model")
    ref = ModelRef(base=str(tmp_path / "model" / "base"), refiner=str(tmp_path / "model" / "refiner"))
    plan = dataclasses.replace(PLAN, prompts=("a cat",), goldens=1, gates=())
    slot = put(config.with_(model=ref), tmp_path / "slot", plan)
    (path,) = (tmp_path / "model" / part).glob("*.safetensors")
    weights = load_file(path)
    save_file({name: value * 0.97 for name, value in weights.items()}, path, metadata={"format": "pt"})

    (golden,) = regress(slot, metrics=False, profile=FLOAT32).goldens
    assert "the weights are not those it was promoted with" in golden.reason
    assert part.split("/")[0] in golden.reason
    assert golden.difference > golden.tolerance, "the image shows it too"


# --- the metric set ------------------------------------------------------------------------------------------------


def test_a_metric_that_got_worse_beyond_its_gate_is_red(slot, monkeypatch):
    for module in (regression, verifying):
        monkeypatch.setattr(module, "ImageRequest", lambda config, *pair: ImageRequest(config.with_(steps=5), *pair))
    found = regress(slot, profile=FLOAT32)
    assert [verdict.passed for verdict in found.verdicts] == [False]
    assert any("unet_rows: at most 20 % worse" in reason for reason in found.reasons)


def test_evidence_without_a_metric_set_is_held_against_its_goldens_alone(slot):
    evidence = json.loads((slot.folder / "evidence.json").read_text()) | {"metrics": {}}
    (slot.folder / "evidence.json").write_text(json.dumps(evidence))
    found = regress(load_slot(slot.folder), profile=FLOAT32)
    assert (found.passed, len(found.goldens), list(found.verdicts)) == (True, 2, [])


def test_a_gate_that_asked_for_better_or_for_speed_is_not_asked_of_a_slot_and_itself(slot):
    evidence = json.loads((slot.folder / "evidence.json").read_text())
    for line, metric in (("unet_rows: better", "unet_rows"), ("seconds: at most 1 % worse", "seconds")):
        evidence["gates"].append({"gate": line, "passed": True, "figures": ""})
        finding = {"source": "a test", "candidate": {"mean": 0.0, "count": 5}, "values": [0.0] * 5}
        evidence["metrics"].setdefault(metric, finding)
    (slot.folder / "evidence.json").write_text(json.dumps(evidence))
    found = regress(load_slot(slot.folder), profile=FLOAT32)
    assert found.passed, found.reasons
    assert [verdict.gate for verdict in found.verdicts] == [str(PLAN.gates[0])]


DAMAGE: list[dict[str, Any]] = [
    {"prompts": None},
    {"prompts": ["a cat"]},
    {"seeds": [1, 2]},
    {"clip": ...},
    {"gates": ["better"]},
    {"metrics": {"sharpness": {}}},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_metric_set_that_no_comparison_wrote_is_refused(slot, damage):
    evidence = json.loads((slot.folder / "evidence.json").read_text()) | damage
    kept = {name: value for name, value in evidence.items() if value is not ...}
    (slot.folder / "evidence.json").write_text(json.dumps(kept))
    with pytest.raises(SlotError, match=r"evidence of .* is damaged: "):
        load_slot(slot.folder)


# --- another machine -----------------------------------------------------------------------------------------------


def elsewhere(slot: Slot, change) -> GoldenCheck:
    """The first golden, as another kind of machine gives it back."""
    golden = slot.goldens[0]
    record = golden.record.with_(runtime=golden.record.runtime | {"device": "cuda", "dtype": "float16"})
    check = compare_golden(golden, GeneratedImage(change(open_image(golden.path)), record, {}))
    assert check.measure == "mean-abs"
    return check


def with_noise(image: Image.Image, size: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, size, (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).round().astype(np.uint8))


def test_elsewhere_a_image_may_differ_as_another_dtype_does(slot):
    assert elsewhere(slot, lambda image: with_noise(image, 0.5)).reason is None


def test_elsewhere_a_image_of_another_structure_is_red_though_its_mean_difference_is_small(slot):
    redrawn = elsewhere(slot, lambda image: with_noise(image, 5))
    assert redrawn.difference < redrawn.tolerance
    assert f"at least {verifying.LEAST_SSIM} is asked for on another machine" in redrawn.reason


# --- what is seen, what is refused ---------------------------------------------------------------------------------


def test_the_report_shows_expected_actual_and_the_difference_magnified(slot, monkeypatch):
    monkeypatch.setattr(
        verifying, "ImageRequest", lambda config, *pair: ImageRequest(config.with_(guidance_scale=5.5), *pair)
    )
    found = regress(slot, metrics=False, profile=FLOAT32)
    assert len(found.panels) == 3 * len(found.goldens)
    labels, images = zip(*found.panels[:3], strict=True)
    assert labels[:2] == ("expected: a cat, seed 3", "actual: regressed")
    assert labels[2].startswith("difference x")
    expected, actual, difference = map(np.asarray, images)
    apart = np.abs(expected.astype(int) - actual)
    np.testing.assert_array_equal(difference, (apart * (255 / apart.max())).round())


def test_a_image_of_another_size_is_shown_and_red(slot, monkeypatch):
    monkeypatch.setattr(verifying, "ImageRequest", lambda config, *pair: ImageRequest(config.with_(width=72), *pair))
    golden = regress(slot, metrics=False, profile=FLOAT32).goldens[0]
    assert {image.size for _, image in golden.panels} == {(64, 64)}
    assert golden.reason


def test_a_slot_without_goldens_promises_nothing(slot):
    (slot.folder / "evidence.json").unlink()
    with pytest.raises(SlotError, match=r"must have goldens to be held against.*has none\. Promote into it first"):
        regress(load_slot(slot.folder))
