"""A comparison: the same prompts and seeds for both, measured, findings, and written down as plain values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_lab.config import ConfigError, ModelRef, RefinerConfig, RuntimeProfile
from sdxl_lab.evaluation import comparison
from sdxl_lab.evaluation.comparison import DEFAULT_PROMPTS, ComparisonPlan, candidate_of, clip_of, compare
from sdxl_lab.evaluation.gates import DEFAULT_GATES, Gate, GateError
from sdxl_lab.evaluation.metrics import MetricError
from sdxl_lab.images import max_difference
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.promote import promote
from sdxl_lab.release.records import Findings
from sdxl_lab.release.slot import load_slot
from sdxl_lab.source import SourceImage

FIVE = ("a cat", "a dog", "a red hat", "a blue boat", "a tree")
PLAN = ComparisonPlan(
    prompts=FIVE, seeds=(3, 4), gates=("unet_rows: at most 20 % worse",), metrics=("sharpness",), goldens=2
)
FLOAT32 = RuntimeProfile(device="cpu", dtype="float32")

pytestmark = pytest.mark.usefixtures("at_hand", "clean_tree")


@pytest.fixture
def slot(tiny_config, tmp_path) -> Path:
    found = compare(tiny_config, tmp_path / "slot", PLAN, FLOAT32)
    promote(tiny_config, tmp_path / "slot", images=found.goldens, why="w", who="Ada", findings=found.findings())
    return tmp_path / "slot"


def test_both_draw_the_same_prompts_and_seeds_in_the_plans_order(tiny_config, slot):
    candidate = tiny_config.with_(steps=3)
    found = compare(candidate, slot, PLAN, FLOAT32)
    assert PLAN.pairs == [(prompt, seed) for prompt in FIVE for seed in (3, 4)]
    for images, config in ((found.images, candidate), (found.served_images, tiny_config)):
        assert [(p.record.prompt, p.record.seed) for p in images] == PLAN.pairs
        assert {p.record.digest for p in images} == {config.digest}
    np.testing.assert_array_equal(found.values["unet_rows"], np.full(10, 6.0))
    np.testing.assert_array_equal(found.served_values["unet_rows"], np.full(10, 8.0))
    assert found.passed
    assert [(golden.record.prompt, golden.record.seed) for golden in found.goldens] == [
        ("a cat", 3),
        ("a dog", 3),
    ]


def test_the_first_seed_of_each_prompt_is_shown_beside_what_is_served(tiny_config, slot, tmp_path):
    found = compare(tiny_config.with_(steps=3, width=72), slot, PLAN, FLOAT32)
    labels = [label for label, _ in found.panels]
    assert labels[:6] == [
        "served: a cat", "candidate", "no difference: the sizes differ",
        "served: a dog", "candidate", "no difference: the sizes differ",
    ]  # fmt: skip
    assert (len(labels), {image.size for _, image in found.panels}) == (15, {(64, 64)})
    new = compare(tiny_config, tmp_path / "new", PLAN, FLOAT32)
    assert [label for label, _ in new.panels] == list(FIVE)
    assert new.panels[1][1] == new.images[2].image


def test_what_was_found_is_plain_and_complete(tiny_config, slot):
    found = compare(tiny_config.with_(steps=5), slot, PLAN, FLOAT32).findings({"file": "04_promote.ipynb"})
    findings = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Findings.read(findings, "a test") == found
    assert findings["replaces"] == tiny_config.digest
    assert findings["notebook"] == {"file": "04_promote.ipynb"}
    assert (findings["commit"], findings["dirty"]) == ("c0ffee", False)
    assert findings["prompts"] == list(FIVE)
    rows = findings["metrics"]["unet_rows"]
    assert rows["candidate"] == {"mean": 10.0, "low": 10.0, "high": 10.0, "count": 5}
    assert rows["difference"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "count": 5}
    assert rows["values"] == [10.0] * 10
    sharpness = findings["metrics"]["sharpness"]
    assert sharpness["candidate"]["low"] < sharpness["candidate"]["mean"] < sharpness["candidate"]["high"]
    assert [gate["passed"] for gate in findings["gates"]] == [False]
    assert findings["libraries"].keys() == {"torch", "diffusers", "transformers"}


def test_a_promotion_keeps_what_was_found(tiny_config, slot):
    found = compare(tiny_config.with_(steps=3), slot, PLAN, FLOAT32)
    findings = found.findings()
    promote(found.candidate, slot, images=found.goldens, why="less work", who="Ada", findings=findings)
    evidence = load_slot(slot).evidence
    for name in type(findings).model_fields:
        if name != "goldens":
            assert getattr(evidence, name) == getattr(findings, name), name
    assert evidence.model == tiny_config.model


def test_a_new_slot_is_tried_against_nothing(tiny_config, tmp_path):
    plan = ComparisonPlan(prompts=("a cat",), seeds=(1,), metrics=("sharpness",))
    found = compare(tiny_config, tmp_path / "new", plan, FLOAT32)
    findings = found.findings()
    assert (found.served, found.served_images, findings.replaces) == (None, (), None)
    assert [(gate.gate, gate.passed, gate.figures) for gate in findings.gates] == [
        (str(gate), True, "nothing is served yet") for gate in DEFAULT_GATES
    ]
    assert findings.metrics["sharpness"].candidate.low is None, "one image has no interval"
    assert findings.metrics["sharpness"].difference is None


def test_models_that_differ_are_each_drawn_with_their_own(tiny_model, tiny_config, slot):
    alone = tiny_config.with_(model=ModelRef(base=str(tiny_model / "base")))
    found = compare(alone, slot, PLAN, FLOAT32)
    assert "refiner" not in found.images[0].record.weights
    assert "refiner" in found.served_images[0].record.weights
    assert max_difference(found.images[0].image, found.served_images[0].image) == 0


def test_a_gate_that_cannot_be_judged_is_refused_before_anything_is_drawn(tiny_config, slot, monkeypatch):
    monkeypatch.setattr(comparison, "draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(GateError, match=r"must be judged on at least 5 prompts.*received 2"):
        compare(tiny_config, slot, ComparisonPlan(prompts=FIVE[:2]))
    with pytest.raises(GateError, match="contrast is in none"):
        compare(tiny_config, slot, ComparisonPlan(prompts=FIVE, gates=("contrast: better",)))


def test_images_are_scored_by_the_clip_that_comes_with_their_model(tiny_model, tiny_config, tmp_path):
    assert clip_of(ModelRef.named("nano")) == "nano"
    assert clip_of(tiny_config.model) == clip_of(ModelRef.named(str(tiny_model))) == str(tiny_model / "clip")
    assert clip_of(ModelRef.named("sdxl")) == "openai/clip-vit-large-patch14"
    plan = ComparisonPlan(prompts=("a cat",), seeds=(1,), metrics=("sharpness",), gates=())
    assert compare(tiny_config, tmp_path / "new", plan, FLOAT32).findings().clip == str(tiny_model / "clip")


# --- the plan ------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_from_toml(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text('prompts = ["a cat", "a dog"]\nseeds = [1, 2]\ngates = ["seconds: at most 2"]\ngoldens = 1\n')
    plan = ComparisonPlan.from_toml(path)
    assert (plan.prompts, plan.seeds, plan.goldens) == (("a cat", "a dog"), (1, 2), 1)
    assert plan.gates == (Gate("seconds", "at most", 2.0),)
    assert plan.metrics == (*comparison.DEFAULT_METRICS, "seconds"), "what a gate judges is measured"
    path.write_text("")
    assert ComparisonPlan.from_toml(path) == ComparisonPlan()
    assert ComparisonPlan().prompts == DEFAULT_PROMPTS


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompts": []}, ConfigError, "prompts must be a list of at least one"),
    ({"prompts": "a cat"}, ConfigError, "prompts must be a list of at least one; received 'a cat'"),
    ({"prompts": ["a", "a"]}, ConfigError, "all different, since each pair counts once"),
    ({"prompts": [""]}, ConfigError, "prompt must be"),
    ({"seeds": [-1]}, ConfigError, "seed must be a whole number"),
    ({"seeds": 7}, ConfigError, "seeds must be a list of at least one; received 7. Example: seeds = [0, 1]"),
    ({"goldens": 0}, ConfigError, "goldens must be a whole number of at least 1"),
    ({"gates": ["clip_score"]}, GateError, "a gate must read METRIC"),
    ({"gates": ["beauty: better"]}, MetricError, "a metric must be one of"),
    ({"metrics": ["ssim"]}, MetricError, "a comparison measures images alone; ssim needs a reference"),
]


@pytest.mark.parametrize(("values", "kind", "said"), BAD, ids=[said for *_, said in BAD])
def test_a_plan_that_breaks_a_rule_is_refused(values, kind, said):
    with pytest.raises(kind) as caught:
        ComparisonPlan(**values)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", ["seeds = ", "seed = 7", "\x00"])
def test_a_plan_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "plan.toml").write_text(content)
    with pytest.raises(ConfigError, match="TOML with some of prompts, seeds, gates, metrics, goldens, clip"):
        ComparisonPlan.from_toml(tmp_path / "plan.toml")


# --- candidates -----------------------------------------------------------------------------------------


def test_a_candidate_is_a_file_of_settings_or_a_image(tiny_config, tmp_path):
    config = tiny_config.with_(steps=2, refiner=RefinerConfig(handover=0.5))
    (tmp_path / "config.toml").write_text(config.to_toml())
    (image,) = comparison.draw([ImageRequest(config, "a cat", 1)], FLOAT32)
    image.save(tmp_path / "image.png")
    assert candidate_of(tmp_path / "config.toml") == candidate_of(tmp_path / "image.png") == config


def test_an_image_refined_from_another_is_no_candidate(tiny_config, tmp_path):
    (image,) = comparison.draw([ImageRequest(tiny_config, "a cat", 1)], FLOAT32)
    source = SourceImage(image.image, 0.5, image.record, stage="refiner")
    (refined,) = comparison.draw([ImageRequest(tiny_config, "a cat", 1, source)], FLOAT32)
    refined.save(tmp_path / "refined.png")
    with pytest.raises(ConfigError, match="candidate must be an image drawn from a prompt alone"):
        candidate_of(tmp_path / "refined.png")
