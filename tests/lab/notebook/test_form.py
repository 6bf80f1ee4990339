"""The controls' values: to a request and back for every setting, all errors at once, seeds, differences."""

from typing import Any

import pytest

from sdxl_lab.config import (
    MAX_SEED,
    GenerationConfig,
    ModelRef,
    PerturbedAttention,
    ProjectedGuidance,
    RefinerConfig,
    ZeroStar,
)
from sdxl_lab.diffusion.lora_files import pinned
from sdxl_lab.job import ImageRequest
from sdxl_lab.notebook.form import (
    FormError,
    controls,
    differences,
    next_seed,
    request_of,
    settings,
    values_of,
    without_a_choice,
)

PLAIN = GenerationConfig()
RICH = GenerationConfig(
    scheduler="dpmpp_2m_karras",
    steps=31,
    guidance_scale=6.5,
    guidance_rescale=0.7,
    guidance_interval=(0.3, 4.25),
    width=320,
    height=264,
    negative_prompt="blurry",
    refiner=RefinerConfig(handover=0.7, aesthetic_score=6.5, negative_aesthetic_score=2.0),
)
ADAPTED = pinned(PLAIN.with_(loras=["nano/neon:0.5", "nano/neon:1:0"]))
SIZED = PLAIN.with_(original_size=(512, 512), crop=(8, 16), target_size=(264, 320), watermark=True)


GIVEN = PLAIN.with_(sigmas=(14.615, 2.5, 0.125), steps=3, apg=ProjectedGuidance(eta=0.5), pag=PerturbedAttention())
TIMED = PLAIN.with_(timesteps=(999, 749, 499, 249), steps=4, scheduler="lcm", cfg_zero=ZeroStar())


WORDY = PLAIN.with_(prompt_syntax="a1111", negative_prompt="a", negative_prompt_2="b")


def test_a_second_prompt_is_left_out_by_leaving_it_empty() -> None:
    request = ImageRequest(PLAIN, "A cat in a hat", 7, prompt_2="a boat")
    values = values_of(request)
    assert values["prompt_2"] == "a boat"
    assert request_of(values, PLAIN) == request
    assert request_of(values | {"prompt_2": ""}, PLAIN).prompt_2 is None
    assert differences(request, ImageRequest(PLAIN, "A cat in a hat", 7)) == {"prompt_2": ("a boat", None)}


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        GIVEN,
        TIMED,
        RICH,
        SIZED,
        ADAPTED,
        WORDY,
        PLAIN.with_(negative_prompt=""),
        PLAIN.with_(negative_prompt="none"),
    ],
)
def test_the_controls_give_back_the_job_they_were_filled_from(config: GenerationConfig) -> None:
    request = ImageRequest(config, "A cat in a hat", MAX_SEED)
    assert request_of(values_of(request), config) == request


def test_what_no_control_shows_comes_from_the_start() -> None:
    other = ModelRef(base="some/base", refiner="some/refiner")
    assert request_of(values_of(ImageRequest(RICH, "a boat", 1)), SIZED.with_(model=other)).config == RICH.with_(
        model=other
    )


OURS = {"prompt", "prompt_2", "seed"}


def test_every_setting_but_the_model_has_its_controls() -> None:
    shown = {control.setting.name for control in controls().values()}
    assert shown == {name for name in GenerationConfig.settings() if not name.startswith("model")} | OURS
    names = [name for name in controls() if name.startswith(("guidance_interval", "crop", "refiner"))]
    assert names == [
        "guidance_interval",
        "guidance_interval.low",
        "guidance_interval.high",
        "crop.top",
        "crop.left",
        "refiner",
        "refiner.handover",
        "refiner.aesthetic_score",
        "refiner.negative_aesthetic_score",
    ]
    assert {name: controls()[name].under for name in names} == {
        name: None if "." not in name or name.startswith("crop") else name.split(".")[0] for name in names
    }


def test_switched_off_controls_do_not_count() -> None:
    values = values_of(ImageRequest(RICH, "a boat", 1)) | {
        "guidance_interval": False,
        "guidance_interval.low": -1,
        "refiner": False,
        "refiner.handover": 9,
    }
    config = request_of(values, RICH).config
    assert (config.guidance_interval, config.refiner) == (None, None)


def test_loras_are_shown_and_read_as_a_command_line_has_them() -> None:
    values = values_of(ImageRequest(ADAPTED, "a boat", 1))
    assert values["loras"] == "nano/neon:0.5, nano/neon:1:0"
    config = request_of(values | {"loras": " nano/neon:0.7 ,"}, PLAIN).config
    assert config == pinned(PLAIN.with_(loras=["nano/neon:0.7"]))
    assert request_of(values | {"loras": ""}, ADAPTED).config == PLAIN


BAD = [
    ({"loras": "nano/neon:99"}, "loras", "loras.0.weight must be a number from -10 to 10; received 99.0"),
    ({"loras": "nowhere/gone.safetensors"}, "loras", "which is not there"),
    ({"prompt": ""}, "prompt", "prompt must be text of 1 to 2000 characters"),
    ({"steps": 0}, "steps", "steps must be a whole number from 1 to 1000; received 0. Example: steps = 25"),
    ({"scheduler": "lcm", "steps": 51}, "steps", "at most 50 with the scheduler lcm"),
    ({"guidance_scale": -1.0}, "guidance_scale", "a number from 0 to 100; received -1.0"),
    ({"width": 250}, "width", "a multiple of 8 from 64 to 4096 (pixels); received 250"),
    ({"seed": "seven"}, "seed", "seed must be a whole number from 0 to 9223372036854775807; received 'seven'"),
    ({"seed": "-1"}, "seed", "received -1"),
    (
        {"guidance_interval": True, "guidance_interval.low": 6.0},
        "guidance_interval",
        "or left out; received (6.0, 5.42)",
    ),
    ({"crop.left": -8}, "crop.top", "each a whole number from 0 to 8192 (pixels); received (0, -8)"),
    ({"refiner": True, "refiner.handover": 1.0}, "refiner.handover", "above 0 and below 1; received 1.0"),
    ({"sigmas": "14, 3, 1"}, "steps", "3, one for each of the given sigmas; received 25"),
    (
        {"sigmas": "14 much"},
        "sigmas",
        "the largest first; a 0 at the end is left off (sigma), or left out; received '14 m",
    ),
    ({"sigmas": "1, 14", "steps": 2}, "sigmas", "received (1.0, 14.0)"),
    ({"scheduler": "ddim", "sigma_schedule": "beta"}, "sigma_schedule", "must be own with the scheduler ddim"),
    ({"watermark": True, "width": 64}, "watermark", "false below 256x256 pixels"),
    ({"negative_prompt": "x" * 2001}, "negative_prompt", "text of 0 to 2000 characters"),
]


@pytest.mark.parametrize(("changes", "control", "text"), BAD)
def test_a_bad_value_is_told_at_its_control(changes: dict[str, Any], control: str, text: str) -> None:
    with pytest.raises(FormError) as caught:
        request_of(values_of(ImageRequest(PLAIN, "A cat in a hat", 7)) | changes, PLAIN)
    assert list(caught.value.errors) == [control]
    assert text in caught.value.errors[control]


def test_a_control_without_a_choice_is_still_unless_it_was_moved_before() -> None:
    values = values_of(ImageRequest(PLAIN, "a boat", 1))
    assert without_a_choice(values) == {}
    still = without_a_choice(values | {"scheduler": "lcm"})
    assert still == dict.fromkeys(("sigma_schedule", "timestep_spacing", "sigmas"), "lcm has no choice here")
    assert still.keys() <= controls().keys()
    moved = values | {"scheduler": "lcm", "sigma_schedule": "karras", "sigmas": "14, 3"}
    assert set(without_a_choice(moved)) == {"timestep_spacing"}


def test_all_errors_come_at_once() -> None:
    values = values_of(ImageRequest(PLAIN, "A cat in a hat", 7)) | {
        "prompt": "",
        "steps": 0,
        "refiner": True,
        "refiner.handover": 2,
    }
    with pytest.raises(FormError) as caught:
        request_of(values, PLAIN)
    assert set(caught.value.errors) == {"prompt", "steps", "refiner.handover"}


def test_a_refiner_that_the_model_lacks_is_refused() -> None:
    start = GenerationConfig(model=ModelRef(base="some/base"))
    with pytest.raises(FormError, match="has no refiner") as caught:
        request_of(values_of(ImageRequest(start, "a boat", 1)) | {"refiner": True}, start)
    assert list(caught.value.errors) == ["refiner"]


@pytest.mark.parametrize(
    ("policy", "seed", "last", "expected"),
    [
        ("fixed", 7, 7, 7),
        ("next", 7, None, 7),
        ("next", 7, 7, 8),
        ("next", 20, 7, 20),  # typed in since
        ("next", MAX_SEED, MAX_SEED, 0),
    ],
)
def test_the_next_seed(policy: str, seed: int, last: int | None, expected: int) -> None:
    assert next_seed(policy, seed, last) == expected


def test_random_seeds_differ_and_are_valid() -> None:
    drawn = {next_seed("random", 7, 7) for _ in range(20)}
    assert len(drawn) > 15
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_differences_name_only_what_differs() -> None:
    first, second = (
        ImageRequest(PLAIN, "a boat", 1),
        ImageRequest(PLAIN.with_(steps=9, refiner=RefinerConfig()), "a boat", 2),
    )
    assert differences(first, second) == {
        "seed": (1, 2),
        "steps": (25, 9),
        "refiner.handover": (None, 0.8),
        "refiner.aesthetic_score": (None, 6.0),
        "refiner.negative_aesthetic_score": (None, 2.5),
    }
    assert differences(first, first) == {}
    assert settings(first)["model.base"] == "nano"
