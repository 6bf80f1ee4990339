"""Any field by a plain value, several at once, and ranges with both ends."""

from collections.abc import Callable
from typing import Any

import pytest

from sdxl_lab.config import ConfigError, GenerationConfig, RefinerConfig
from sdxl_lab.research.axes import changed, spread

CHANGES = [
    ("steps", 7, lambda c: c.steps == 7),
    ("guidance_interval", [0.3, 5.0], lambda c: c.guidance_interval == (0.3, 5.0)),
    ("guidance_interval", "none", lambda c: c.guidance_interval is None),
    ("refiner", "none", lambda c: c.refiner is None),
    ("refiner", {"handover": 0.7}, lambda c: c.refiner == RefinerConfig(0.7)),
    ("refiner.handover", 0.7, lambda c: c.refiner == RefinerConfig(0.7)),
    ("model", "some/hub-id", lambda c: c.model.base == "some/hub-id"),
    ("model.revision", "main", lambda c: c.model.revision == "main"),
    ("negative_prompt", "blurry", lambda c: c.negative_prompt == "blurry"),
]


@pytest.mark.parametrize(("name", "value", "holds"), CHANGES, ids=[f"{name}={value}" for name, value, _ in CHANGES])
def test_any_field_can_be_changed_by_a_plain_value(name: str, value: Any, holds: Callable) -> None:
    assert holds(changed(GenerationConfig(guidance_interval=(1, 2)), {name: value}))


def test_fields_change_together_so_that_rules_over_two_of_them_see_the_outcome_alone() -> None:
    small = GenerationConfig(width=64, height=64)
    assert changed(small, {"watermark": True, "width": 256, "height": 256}).watermark
    few = {"scheduler": "lcm", "steps": 4}
    assert changed(GenerationConfig(steps=100), few) == GenerationConfig(**few)
    with pytest.raises(ConfigError, match="watermark must be false below"):
        changed(small, {"watermark": True, "width": 256})


RANGES = [
    ({"from": 10, "to": 30, "step": 10}, [10, 20, 30]),
    ({"from": 10, "to": 25, "step": 10}, [10, 20]),
    ({"from": 0.5, "to": 0.8, "step": 0.1}, [0.5, 0.6, 0.7, 0.8]),
    ({"from": 1.0, "to": 2.0, "count": 3}, [1.0, 1.5, 2.0]),
    ({"from": 2, "to": 6, "count": 3}, [2, 4, 6]),
]


@pytest.mark.parametrize(("table", "values"), RANGES)
def test_a_range_has_both_ends(table: dict, values: list) -> None:
    assert spread("axis", table) == values
