"""Records: validated when they are read, of one schema, and equal to what was written."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from sdxl_lab.config import GenerationConfig
from sdxl_lab.record import ImageRecord, RecordError
from tests.made import image_record

WRITTEN = image_record().to_dict()
REFINED = image_record(source=image_record(id="a"), strength=0.5, promoted="0" * 64, overridden=("steps",))


def test_a_record_comes_back_as_it_was_written():
    for record in (image_record(), REFINED, image_record(GenerationConfig(guidance_interval=(0.5, 2)))):
        assert ImageRecord.read(record.to_dict(), "a test") == record
        assert ImageRecord.read(json.dumps(record.to_dict()), "a test") == record
        assert ImageRecord.read(record.to_json().encode(), "a test") == record


def test_a_record_says_its_schema_and_leaves_out_what_it_has_not():
    assert WRITTEN["schema"] == 1
    assert "source" not in WRITTEN
    assert REFINED.to_dict()["source"]["schema"] == 1
    assert image_record(overridden=()).to_dict()["overridden"] == []


def test_what_json_has_no_number_for_is_text():
    record = image_record(scheduler={"lambda_min_clipped": float("-inf"), "steps": 2})
    assert record.scheduler == {"lambda_min_clipped": "-inf", "steps": 2}
    json.dumps(record.to_dict(), allow_nan=False)


def test_a_copy_with_changes_is_checked():
    assert image_record().with_(id="a").id == "a"
    with pytest.raises(ValueError, match="seed"):
        image_record().with_(seed=-1)
    with pytest.raises(ValueError, match="Extra inputs"):
        image_record().with_(sed=1)


DAMAGE: list[tuple[Any, str]] = [
    ("{", "the record of a.png must be JSON"),
    (b"\xff", "the record of a.png must be JSON"),
    ([1], r"must be a JSON object; received \[1\]"),
    (WRITTEN | {"schema": 2}, "must have the schema 1; received 2. A newer version wrote it"),
    (WRITTEN | {"schema": "1"}, "must have the schema 1; received '1'"),
    (WRITTEN | {"sed": 1}, "sed is no field of it; those are schema, version, prompt, seed"),
    ({k: v for k, v in WRITTEN.items() if k != "seed"}, "it lacks seed. Example: seed = 7"),
    (WRITTEN | {"seed": "7"}, "seed must be a valid integer; received '7'. Example: seed = 7"),
    (WRITTEN | {"seed": 7.0}, r"seed must .*; received 7\.0"),
    (WRITTEN | {"prompt": ""}, "prompt must have at least 1 character; received ''. Example: prompt ="),
    (WRITTEN | {"digest": "e8fa0d6fc27d"}, "digest must match pattern"),
    (WRITTEN | {"strength": 2}, "strength must be less than or equal to 1; received 2"),
    (
        WRITTEN | {"config": {"steps": 0}},
        "steps must be a whole number from 1 to 1000; received 0. Example: steps",
    ),
    (WRITTEN | {"config": {"setps": 5}}, "Did you mean steps"),
    (WRITTEN | {"source": {"schema": 1}}, "it lacks source.version"),
    ({}, "must hold a configuration"),
    ({"config": {"steps": 0}}, "must hold a configuration: steps must be"),
]


@pytest.mark.parametrize(("content", "said"), DAMAGE, ids=[said for _, said in DAMAGE])
def test_a_damaged_record_is_refused_with_rule_value_and_example(content, said):
    with pytest.raises(RecordError, match=said):
        ImageRecord.read(content, "a.png")


def first_version(**more: Any) -> Mapping[str, Any]:
    """As 0.1.0 wrote it."""
    config = GenerationConfig(steps=3)
    record = image_record(config).to_dict() | {"digest": "e8fa0d6fc27d", "negative_prompt": None} | more
    del record["schema"]
    return record | {"config": config.to_dict() | {"limits": {"steps": [1, 20]}}}


def test_a_record_of_the_first_version_gets_the_digest_of_this_one():
    read = ImageRecord.read(first_version(), "a.png")
    assert (read.config, read.digest) == (GenerationConfig(steps=3), GenerationConfig(steps=3).digest)


def test_its_promoted_digest_is_this_version_s_where_the_configuration_is_known():
    same = ImageRecord.read(first_version(promoted="e8fa0d6fc27d", overridden=[]), "a.png")
    assert same.promoted == same.digest
    assert ImageRecord.read(first_version(promoted="0" * 12, overridden=["steps"]), "a.png").promoted == "0" * 12


def test_its_source_is_read_alike_and_refused_alike():
    read = ImageRecord.read(first_version(source=first_version(), strength=0.5), "a.png")
    assert read.source == ImageRecord.read(first_version(), "a.png")
    with pytest.raises(RecordError, match=r"the source of a\.png must be a JSON object; received 7"):
        ImageRecord.read(first_version(source=7, strength=0.5), "a.png")
