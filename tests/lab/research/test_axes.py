"""Ranges with both ends, and names that are settings."""

import pytest

from sdxl_lab.config import GenerationConfig
from sdxl_lab.research.axes import SweepError, check_axis, spread

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


@pytest.mark.parametrize("name", GenerationConfig.settings())
def test_every_setting_can_be_an_axis(name: str) -> None:
    check_axis(name)


@pytest.mark.parametrize("name", ["loras.0.weight", "loras.11.text_encoder_weight"])
def test_a_setting_of_a_table_in_a_list_can_be_an_axis(name: str) -> None:
    check_axis(name)


UNKNOWN = [
    ("loras.0.wieght", (), "received 'loras.0.wieght'"),
    ("loras.x.weight", (), "received 'loras.x.weight'"),
    ("stepz", (), "Did you mean steps?"),
    ("refiner.handovr", (), "Did you mean refiner.handover?"),
    ("promt", ("prompt",), "must be prompt or a field of the configuration (model, "),
    ("promt", ("prompt",), "Did you mean prompt?"),
    ("zzz", (), 'Example: scheduler = ["euler", "dpmpp_2m"]'),
]


@pytest.mark.parametrize(("name", "more", "said"), UNKNOWN)
def test_another_name_is_refused_with_the_one_that_was_probably_meant(name: str, more: tuple, said: str) -> None:
    with pytest.raises(SweepError) as caught:
        check_axis(name, more)
    assert said in str(caught.value)
