"""Every rule of the records, the digest, and the way through TOML and back."""

import dataclasses
import json
import math

import pytest

from sdxl_lab.config import (
    FEWER_STEPS,
    MODELS,
    SCHEDULERS,
    ConfigError,
    GenerationConfig,
    Limits,
    ModelRef,
    RefinerConfig,
    RuntimeProfile,
    checked_prompt,
    checked_seed,
)
from sdxl_lab.diffusion import schedulers

RECORDS = (ModelRef, RefinerConfig, Limits, GenerationConfig, RuntimeProfile)
RULES = [(kind, name) for kind in RECORDS for name in kind.RULES]
RULE_IDS = [f"{kind.__name__}.{name}" for kind, name in RULES]
EVERYTHING = GenerationConfig(
    model=ModelRef("some/base", "0123abc", "some/refiner", "main", "some/vae", "v1"),
    scheduler="dpmpp_2m_sde_karras",
    steps=31,
    guidance_scale=6.5,
    guidance_rescale=0.7,
    guidance_interval=(0.28, 5.42),
    width=320,
    height=264,
    original_size=(1024, 512),
    crop=(8, 16),
    target_size=(264, 320),
    negative_prompt='blurry "é" \n日本',
    refiner=RefinerConfig(0.7, 6.5, 2.0),
    watermark=True,
    limits=Limits((2, 60), (1.0, 12.0), (128, 768)),
)

BAD = [
    (ModelRef, {"base": ""}, "base must be text of 1 to 500 characters, without NUL or lone surrogates; received ''"),
    (ModelRef, {"base": 5}, "received 5"),
    (ModelRef, {"revision": ""}, ", or left out; received ''. Example: revision = \"main\""),
    (ModelRef, {"refiner": ["nano"]}, ", or left out; received ['nano']. Example: refiner = \"nano\""),
    (ModelRef, {"refiner_revision": 1}, "refiner_revision must be"),
    (ModelRef, {"vae": "x" * 501}, "vae must be"),
    (ModelRef, {"vae_revision": 1.5}, "vae_revision must be"),
    (
        RefinerConfig,
        {"handover": 0},
        "handover must be a number above 0 and below 1; received 0. Example: handover = 0.8",
    ),
    (RefinerConfig, {"handover": 1}, "received 1"),
    (RefinerConfig, {"handover": math.nan}, "received nan"),
    (RefinerConfig, {"aesthetic_score": 10.5}, "aesthetic_score must be a number from 0 to 10"),
    (RefinerConfig, {"negative_aesthetic_score": -1}, "negative_aesthetic_score must be a number from 0 to 10"),
    (Limits, {"steps": (20, 10)}, "the first not above the second; received (20, 10)"),
    (Limits, {"steps": (0, 10)}, "each a whole number from 1 to 1000"),
    (Limits, {"guidance_scale": (1,)}, "guidance_scale must be two values"),
    (Limits, {"side": (100, 512)}, "a multiple of 8"),
    (GenerationConfig, {"scheduler": "eular"}, "scheduler must be one of euler, euler_a, dpmpp_2m"),
    (GenerationConfig, {"scheduler": None}, "received None"),
    (GenerationConfig, {"steps": 0}, "steps must be a whole number from 1 to 1000; received 0. Example: steps = 25"),
    (GenerationConfig, {"steps": 25.0}, "received 25.0"),
    (GenerationConfig, {"steps": True}, "received True"),
    (GenerationConfig, {"steps": "25"}, "received '25'"),
    (GenerationConfig, {"guidance_scale": -1}, "guidance_scale must be a number from 0 to 100; received -1"),
    (GenerationConfig, {"guidance_scale": math.inf}, "received inf"),
    (GenerationConfig, {"guidance_rescale": 1.1}, "guidance_rescale must be a number from 0 to 1"),
    (GenerationConfig, {"guidance_interval": (5.0, 1.0)}, "guidance_interval must be two values"),
    (GenerationConfig, {"guidance_interval": 5.0}, "received 5.0"),
    (GenerationConfig, {"width": 257}, "width must be a multiple of 8 from 64 to 4096 (pixels); received 257"),
    (GenerationConfig, {"height": 56}, "height must be a multiple of 8 from 64 to 4096 (pixels); received 56"),
    (GenerationConfig, {"width": "256"}, "received '256'"),
    (GenerationConfig, {"original_size": (0, 5)}, "original_size must be two values"),
    (GenerationConfig, {"crop": (-8, 0)}, "crop must be two values"),
    (GenerationConfig, {"crop": None}, "received None"),
    (GenerationConfig, {"target_size": (1, 2, 3)}, "target_size must be two values"),
    (GenerationConfig, {"negative_prompt": "x" * 2001}, "negative_prompt must be text of 0 to 2000 characters"),
    (GenerationConfig, {"negative_prompt": "a\0b"}, "without NUL or lone surrogates"),
    (GenerationConfig, {"negative_prompt": "\ud83d"}, "without NUL or lone surrogates"),
    (GenerationConfig, {"watermark": 1}, "watermark must be true or false; received 1"),
    (RuntimeProfile, {"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N; received 'gpu'"),
    (RuntimeProfile, {"device": "cuda:"}, "received 'cuda:'"),
    (RuntimeProfile, {"dtype": "fp16"}, "dtype must be one of auto, float32, float16, bfloat16; received 'fp16'"),
    (RuntimeProfile, {"rows": 0}, "rows must be a whole number from 1 to 4096"),
    (RuntimeProfile, {"threads": 0}, "threads must be a whole number from 1 to 1024, or left out; received 0"),
    (RuntimeProfile, {"channels_last": 1}, "channels_last must be true or false; received 1"),
    (RuntimeProfile, {"fuse_qkv": "yes"}, "fuse_qkv must be true or false; received 'yes'"),
    (RuntimeProfile, {"compile": "max-autotune"}, "compile must be true or false; received 'max-autotune'"),
]


@pytest.mark.parametrize(("kind", "values", "said"), BAD, ids=[f"{k.__name__} {v!r:.40}" for k, v, _ in BAD])
def test_a_bad_value_is_refused_with_rule_value_and_example(kind, values, said):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    ((name, value),) = values.items()
    text = str(caught.value)
    assert said in text
    assert text.startswith(f"{name} must be {kind.RULES[name].words}; received {value!r}. Example: {name} = ")
    assert (caught.value.field, caught.value.rule) == (name, kind.RULES[name].words)


def test_every_rule_has_a_bad_example():
    assert {(kind, *values) for kind, values, _ in BAD} == set(RULES)


@pytest.mark.parametrize(("kind", "name"), RULES, ids=RULE_IDS)
def test_the_example_that_a_rule_gives_is_valid(kind, name):
    rule = kind.RULES[name]
    assert rule.holds(rule.example)
    kind(**{name: rule.example})


@pytest.mark.parametrize("kind", RECORDS)
def test_every_field_has_a_rule_or_is_a_record(kind):
    assert {field.name for field in dataclasses.fields(kind)} == set(kind.RULES) | set(kind.NESTED)


@pytest.mark.parametrize("kind", RECORDS)
def test_an_unknown_field_is_refused_by_naming_the_known(kind):
    for make in (lambda: kind.from_dict({"stepz": 25}), lambda: kind().with_(stepz=25)):
        with pytest.raises(ConfigError, match=f"stepz must be a field of {kind.__name__}.*received 25") as caught:
            make()
        assert all(field.name in str(caught.value) for field in dataclasses.fields(kind))


@pytest.mark.parametrize("name", ["digest", "to_dict", "RULES"])
def test_what_is_no_field_cannot_be_changed(name):
    with pytest.raises(ConfigError, match=f"{name} must be a field of GenerationConfig"):
        GenerationConfig().with_(**{name: 1})


NESTED_BAD = [
    ({"refiner": {"handover": 2}}, r"handover must be a number above 0 and below 1; received 2"),
    ({"refiner": {"hand": 0.5}}, r"hand must be a field of RefinerConfig"),
    ({"model": {"revision": 3}}, r"revision must be"),
    ({"model": "nano"}, r"model must be a ModelRef; received 'nano'. Example: model\.base = \"nano\""),
    ({"limits": [1, 2]}, r"limits must be a Limits; received \[1, 2\]. Example: limits\.steps = \[1, 100\]"),
    ({"refiner": 0.8}, r"refiner must be a RefinerConfig; received 0\.8. Example: refiner\.handover = 0\.8"),
    ({"model": None}, r"model must be a ModelRef; received None"),
]


@pytest.mark.parametrize(("content", "said"), NESTED_BAD, ids=[str(content) for content, _ in NESTED_BAD])
def test_a_bad_nested_record_is_refused(content, said):
    with pytest.raises(ConfigError, match=said):
        GenerationConfig.from_dict(content)


def test_a_refiner_needs_a_model_that_has_one():
    with pytest.raises(
        ConfigError, match=r"refiner must be left out, since the model 'some/base' has no refiner.*model = nano"
    ):
        GenerationConfig(model=ModelRef(base="some/base"), refiner=RefinerConfig())


@pytest.mark.parametrize(("name", "most"), FEWER_STEPS.items(), ids=FEWER_STEPS)
def test_more_steps_than_a_scheduler_can_make_are_refused(name, most):
    config = GenerationConfig(scheduler=name, steps=most)
    with pytest.raises(
        ConfigError, match=f"steps must be at most {most} with the scheduler {name}; received {most + 1}"
    ):
        config.with_(steps=most + 1)


@pytest.mark.parametrize(("width", "height"), [(256, 248), (128, 256), (64, 64)])
def test_a_watermark_below_its_smallest_size_is_refused(width, height):
    with pytest.raises(ConfigError, match=f"received 'true at {width}x{height}'.*Example: width = 256, height = 256"):
        GenerationConfig(watermark=True, width=width, height=height)


# --- round trips and the digest --------------------------------------------------------------------------------------

ROUND = {
    "default": GenerationConfig(),
    "everything": EVERYTHING,
    "sdxl": GenerationConfig.for_model("sdxl"),
    "no refiner": GenerationConfig(model=ModelRef(base="a/folder/somewhere")),
    "nano without refiner": GenerationConfig(model=ModelRef(base="nano", refiner=None)),
    "empty negative prompt": GenerationConfig(negative_prompt=""),
}


@pytest.mark.parametrize("config", ROUND.values(), ids=ROUND)
def test_a_configuration_survives_toml_and_json(config, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert GenerationConfig.from_toml(file) == config
    assert GenerationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert GenerationConfig.from_toml(file).digest == config.digest


@pytest.mark.parametrize("profile", [RuntimeProfile(), RuntimeProfile("cuda:3", "bfloat16", 40)])
def test_a_runtime_profile_survives_its_plain_form(profile):
    assert RuntimeProfile.from_dict(profile.to_dict()) == profile


def test_equal_settings_have_equal_digests_however_they_are_written():
    plain = GenerationConfig(guidance_scale=5, crop=[0, 0], guidance_interval=[1, 5], refiner=RefinerConfig())
    assert plain == GenerationConfig(guidance_scale=5.0, guidance_interval=(1.0, 5.0), refiner=RefinerConfig(0.8))
    assert plain.digest == GenerationConfig.from_dict(dict(reversed(plain.to_dict().items()))).digest


def test_every_field_moves_the_digest():
    plain = GenerationConfig()
    for field in dataclasses.fields(GenerationConfig):
        assert plain.with_(**{field.name: getattr(EVERYTHING, field.name)}).digest != plain.digest, field.name


def test_the_digest_of_the_default_configuration_is_the_known_one():
    """It names promoted configurations and images: whoever changes it on purpose promotes again."""
    assert GenerationConfig().digest == "fd2ed977e398"
    assert EVERYTHING.digest == "b43819ec542a"


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().steps = 3  # type: ignore[misc]


NO_TOML = {"no TOML": b"steps: 25", "no text": b"\xff\xfe\x00", "an image": b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("content", NO_TOML.values(), ids=NO_TOML)
def test_a_file_that_is_no_toml_is_refused_by_name(content, tmp_path):
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml must be valid TOML; received .* Example: steps = 25"):
        GenerationConfig.from_toml(file)


def test_the_schedulers_named_here_are_those_that_are_built():
    assert tuple(schedulers.TABLE) == SCHEDULERS


# --- models by name, prompts, seeds ----------------------------------------------------------------------------------


def test_sdxl_is_pinned_to_its_revisions():
    ref = ModelRef.named("sdxl")
    assert ref == MODELS["sdxl"]
    assert ref.revision == "462165984030d82259a11f4367a4eed129e94a7b"
    assert ref.refiner_revision == "5d4cfe854c9a9a87939ff3653551c2b3c99a4356"
    assert GenerationConfig.for_model("sdxl").width == 1024


def test_nano_has_a_refiner_and_a_folder_only_where_one_lies_beside(tmp_path):
    assert GenerationConfig.for_model("nano") == GenerationConfig()
    assert GenerationConfig().model.refiner == "nano"
    assert ModelRef.named(str(tmp_path)).refiner is None
    (tmp_path / "refiner").mkdir()
    assert ModelRef.named(str(tmp_path)).refiner == str(tmp_path)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_a_seed_in_range_is_taken(seed):
    assert checked_seed(seed) == seed


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "7", None, True])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ConfigError, match=r"seed must be a whole number from 0 to 9223372036854775807.*seed = 7"):
        checked_seed(seed)


@pytest.mark.parametrize("prompt", ["", "x" * 2001, None, 5, ["a cat"], "a\0cat", "\udc00"])
def test_a_prompt_out_of_range_is_refused(prompt):
    with pytest.raises(
        ConfigError, match=r'prompt must be text of 1 to 2000 characters(?s:.*)prompt = "A cat in a hat"'
    ):
        checked_prompt(prompt)
