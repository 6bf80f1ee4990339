"""A1111's text: what it says is taken, what it cannot say here is told, and what would draw another image refused."""

import pytest

from sdxl_lab import a1111
from sdxl_lab.config import ConfigError, GenerationConfig, HiresConfig
from sdxl_lab.images import a1111_parameters
from sdxl_lab.schedules import ABLE, SAMPLERS, SCHEDULE_TYPES
from tests.made import image_record

TEXT = """a (red:1.2) cat, in a hat,
second line: with a colon
Negative prompt: blurry,
yellow
Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Exponential, CFG scale: 6.5, Seed: 123, Size: 832x1216, \
Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Clip skip: 2, Lora hashes: "hats: abc, cats: def", Version: v1.10.1"""


def test_everything_that_has_a_setting_is_taken_and_the_rest_is_told():
    told = a1111.read(TEXT)
    assert told.prompt == "a (red:1.2) cat, in a hat,\nsecond line: with a colon"
    assert told.seed == 123
    assert GenerationConfig().changed(told.settings) == GenerationConfig(
        scheduler="dpmpp_2m_sde",
        sigma_schedule="exponential",
        steps=20,
        guidance_scale=6.5,
        width=832,
        height=1216,
        clip_skip=0,
        negative_prompt="blurry,\nyellow",
        prompt_syntax="a1111",
    )
    assert told.unread == {
        "Model hash": "31e35c80fc",
        "Model": "sd_xl_base_1.0",
        "Lora hashes": "hats: abc, cats: def",
        "Version": "v1.10.1",
    }


TYPES = [
    ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
    ("DPM++ 2M, Schedule type: Karras", "dpmpp_2m", "karras"),
    ("Euler a, Schedule type: SGM Uniform", "euler_a", "sgm_uniform"),
    ("Euler, Schedule type: Align Your Steps", "euler", "align_your_steps"),
    ("UniPC, Schedule type: Automatic", "unipc", "own"),
    ("Euler", "euler", "own"),
]


@pytest.mark.parametrize(("said", "scheduler", "schedule"), TYPES, ids=[said for said, _, _ in TYPES])
def test_the_schedule_type_is_read_and_the_older_names_that_have_it_in_them(said, scheduler, schedule):
    told = a1111.read(f"a cat\nSteps: 4, Sampler: {said}")
    assert (told.settings["scheduler"], told.settings["sigma_schedule"]) == (scheduler, schedule)
    assert (told.prompt, told.seed, told.unread) == ("a cat", None, {})


@pytest.mark.parametrize("name", [name for name, able in ABLE.items() if not able.twin])
def test_what_is_written_is_read_again(name):
    for schedule in ABLE[name].schedules:
        config = GenerationConfig(scheduler=name, sigma_schedule=schedule, negative_prompt="grey", clip_skip=1, steps=9)
        record = image_record(config, prompt="a boat", seed=7, sampler=SAMPLERS[name])
        told = a1111.read(a1111_parameters(record))
        assert GenerationConfig().changed(told.settings) == config.with_(prompt_syntax="a1111")
        assert (told.prompt, told.seed) == ("a boat", 7)


def test_every_schedule_has_a_type():
    assert set(SCHEDULE_TYPES) == {schedule for able in ABLE.values() for schedule in able.schedules} - {"own"}


REFUSED = [
    ("a cat", "parameters must be A1111's text, which ends with steps and sampler; received 'a cat'"),
    ("a cat\nSteps: 4, Sampler: DPM++ 3M SDE", "Sampler must be a sampler that is here, too: Euler, Euler a, DPM++ 2M"),
    (
        "a cat\nSteps: 4, Sampler: Euler, Schedule type: KL Optimal",
        "Schedule type must be a schedule that is here, too: Karras, Exponential, Beta, SGM Uniform, Align Your Steps, "
        "Automatic, Uniform; received 'KL Optimal'",
    ),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_would_draw_another_image_is_refused(text, said):
    with pytest.raises(ConfigError) as caught:
        a1111.read(text)
    assert said in str(caught.value)


TWICE = "Denoising strength: 0.6, Hires upscale: 1.5, Hires steps: 7, Hires upscaler: Latent"


def test_a_second_pass_is_read_where_its_upscaler_is_here_too():
    told = a1111.read(f"a cat\nSteps: 20, Sampler: Euler, Size: 64x64, {TWICE}")
    config = GenerationConfig().changed(told.settings)
    assert config.hires == HiresConfig(scale=1.5, strength=0.6, steps=12, upscaler="latent")
    assert told.unread == {}
    theirs = a1111.read(f"a cat\nSteps: 20, Sampler: Euler, {TWICE.replace('Latent', 'R-ESRGAN 4x+')}")
    assert not any(name.startswith("hires") for name in theirs.settings)
    assert set(theirs.unread) == {"Denoising strength", "Hires upscale", "Hires steps", "Hires upscaler"}


@pytest.mark.parametrize("strength", [0.1, 0.35, 0.6, 0.7, 1.0])
@pytest.mark.parametrize("steps", [11, 20, 30])
def test_the_steps_of_a_second_pass_are_those_that_a1111_makes(steps, strength):
    config = GenerationConfig(hires=HiresConfig(strength=strength, steps=steps, upscaler="lanczos"))
    text = a1111_parameters(image_record(config))
    made = int(steps * strength)
    assert f"Denoising strength: {strength}, Hires upscale: 2.0, Hires steps: {made}, Hires upscaler: Lanczos" in text
    again = GenerationConfig().changed(a1111.read(text).settings).hires
    assert int(again.steps * again.strength) == made
