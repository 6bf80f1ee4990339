"""Findings and evidence: validated when they are read, and refused with what to do where 0.1.0 wrote them."""

from typing import Any

import pytest

from sdxl_lab.config import GenerationConfig
from sdxl_lab.record import Record, RecordError
from sdxl_lab.release.records import Evidence, Findings
from tests.made import evidence, findings

CONFIG = GenerationConfig()
METRIC = findings().to_dict()["metrics"]["clip_score"]


@pytest.mark.parametrize("record", [findings(), evidence(CONFIG)], ids=["findings", "evidence"])
def test_what_was_written_comes_back(record: Record) -> None:
    assert type(record).read(record.to_json(), "a test") == record
    assert record.to_dict()["schema"] == 1


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"gates": "passed"}, "gates must be a valid array; received 'passed'"),
    ({"gates": [{"gate": "clip_score: better"}]}, "it lacks gates.0.passed"),
    ({"prompts": ["a cat", "a dog"]}, "the metric clip_score must have a value for each prompt and seed, 2; it has 1"),
    ({"metrics": {"clip_score": METRIC | {"values": [1.0, 2.0]}}}, "a value for each prompt and seed, 1; it has 2"),
    ({"metrics": {"sharpness": {}}}, "it lacks metrics.sharpness.source"),
    ({"replaces": "7edaa995340"}, "replaces must match pattern"),
    ({"schema": 2}, "must have the schema 1; received 2"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGE, ids=[said for _, said in DAMAGE])
@pytest.mark.parametrize("kind", [Findings, Evidence])
def test_damage_is_refused(kind: type[Record], change: dict[str, Any], said: str) -> None:
    whole = findings().to_dict()
    if kind is Evidence:
        shared = {name: value for name, value in whole.items() if name in Evidence.model_fields and name != "goldens"}
        whole = evidence(CONFIG).to_dict() | shared
    assert kind.read(whole, "a test")
    with pytest.raises(RecordError, match=said):
        kind.read(whole | change, "a test")


def test_numbers_without_their_clip_model_are_no_evidence() -> None:
    with pytest.raises(RecordError, match="must say with which CLIP model it was measured"):
        Evidence.read(
            evidence(CONFIG).to_dict() | {"prompts": ["a"], "seeds": [7], "metrics": {"clip_score": METRIC}}, "a test"
        )


def test_the_digest_that_evidence_replaces_may_be_one_of_the_first_version() -> None:
    assert evidence(CONFIG, replaces="7edaa9953400").replaces == "7edaa9953400"


@pytest.mark.parametrize(
    ("kind", "said"), [(Evidence, "python -m sdxl_lab migrate SLOT"), (Findings, "compare the candidate again")]
)
def test_what_the_first_version_wrote_is_refused_with_what_to_do(kind: type[Record], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        kind.read({"digest": "e8fa0d6fc27d"}, "evidence.json")
