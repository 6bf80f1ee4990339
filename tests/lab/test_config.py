"""Every rule of the settings, the digests, and the way through TOML and back."""

import json
import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from sdxl_lab.config import (
    FEWER_STEPS,
    MODELS,
    SCHEDULERS,
    ConfigError,
    EmbeddingRef,
    FreeU,
    GenerationConfig,
    HiresConfig,
    LoraRef,
    ModelRef,
    OfferedLora,
    PerturbedAttention,
    ProjectedGuidance,
    RefinerConfig,
    RuntimeProfile,
    ServingLimits,
    ZeroStar,
    checked_prompt,
    checked_seed,
    migrated_config,
)
from sdxl_lab.diffusion import schedulers

KINDS = (
    ModelRef,
    RefinerConfig,
    ProjectedGuidance,
    ZeroStar,
    PerturbedAttention,
    FreeU,
    HiresConfig,
    ServingLimits,
    GenerationConfig,
    RuntimeProfile,
)
SETTINGS = [(kind, name) for kind in KINDS for name in kind.model_fields]
SETTING_IDS = [f"{kind.__name__}.{name}" for kind, name in SETTINGS]
EVERYTHING = GenerationConfig(
    model=ModelRef(
        base="some/base.safetensors",
        revision="0123abc",
        sha256="0" * 64,
        config="some/base",
        config_revision="v2",
        prediction_type="v_prediction",
        zero_snr=True,
        refiner="some/refiner",
        refiner_revision="main",
        refiner_sha256="1" * 64,
        vae="some/vae",
        vae_revision="v1",
        vae_sha256="2" * 64,
    ),
    loras=(
        LoraRef(source="a/folder", file="outlines.safetensors", weight=0.6, text_encoder_weight=0.0),
        LoraRef(source="some/lora", revision="0123abc", file="x.safetensors", sha256="0a" * 32),
    ),
    scheduler="dpmpp_2m_sde",
    steps=2,
    timesteps=(999, 499),
    apg=ProjectedGuidance(eta=0.5, threshold=7.5, momentum=-0.25),
    pag=PerturbedAttention(scale=2.0, adaptive=0.001, layers="up"),
    freeu=FreeU(b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    guidance_scale=6.5,
    guidance_rescale=0.7,
    guidance_interval=(0.28, 5.42),
    width=320,
    height=264,
    original_size=(1024, 512),
    crop=(8, 16),
    target_size=(264, 320),
    negative_prompt='blurry "é" \n日本',
    negative_prompt_2="a dog",
    prompt_syntax="a1111",
    embeddings=(EmbeddingRef(token="my style", source="a/style.safetensors", sha256="0a" * 32),),
    clip_skip=2,
    refiner=RefinerConfig(handover=0.7, aesthetic_score=6.5, negative_aesthetic_score=2.0),
    hires=HiresConfig(scale=1.5, strength=0.8, upscaler="lanczos"),
    watermark=True,
)

# What cannot stand beside that.
APART = [
    GenerationConfig(
        scheduler="heun", sigma_schedule="beta", timestep_spacing="trailing", cfg_zero=ZeroStar(zero_steps=1)
    ),
    GenerationConfig(sigmas=(14.615, 2.5, 0.125), steps=3),
    GenerationConfig(hires=HiresConfig(steps=30)),
]

BAD = [
    (ModelRef, {"base": ""}, "base must be text of 1 to 500 characters, without NUL or lone surrogates; received ''"),
    (ModelRef, {"base": 5}, "received 5"),
    (ModelRef, {"revision": ""}, ", or left out; received ''. Example: revision = \"main\""),
    (ModelRef, {"refiner": ["nano"]}, ", or left out; received ['nano']. Example: refiner = \"nano\""),
    (ModelRef, {"refiner_revision": 1}, "refiner_revision must be"),
    (ModelRef, {"vae": "x" * 501}, "vae must be"),
    (ModelRef, {"vae_revision": 1.5}, "vae_revision must be"),
    (ModelRef, {"sha256": "A" * 64}, "sha256 must be 64 hexadecimal digits, or left out; received 'AAAA"),
    (ModelRef, {"refiner_sha256": "1" * 63}, "refiner_sha256 must be 64 hexadecimal digits"),
    (ModelRef, {"vae_sha256": 2}, "vae_sha256 must be 64 hexadecimal digits"),
    (ModelRef, {"config": ""}, "config must be text of 1 to 500 characters"),
    (ModelRef, {"config_revision": ""}, "config_revision must be text of 1 to 100 characters"),
    (ModelRef, {"prediction_type": "v"}, "prediction_type must be one of epsilon, v_prediction, or left out; received"),
    (ModelRef, {"zero_snr": 1}, "zero_snr must be true or false, or left out; received 1. Example: zero_snr = true"),
    (
        RefinerConfig,
        {"handover": 0},
        "handover must be a number above 0 and below 1; received 0. Example: handover = 0.8",
    ),
    (RefinerConfig, {"handover": 1}, "received 1"),
    (RefinerConfig, {"handover": math.nan}, "received nan"),
    (RefinerConfig, {"aesthetic_score": 10.5}, "aesthetic_score must be a number from 0 to 10"),
    (RefinerConfig, {"negative_aesthetic_score": -1}, "negative_aesthetic_score must be a number from 0 to 10"),
    (ServingLimits, {"steps": (20, 10)}, "the first not above the second; received (20, 10)"),
    (ServingLimits, {"steps": (0, 10)}, "each a whole number from 1 to 1000"),
    (ServingLimits, {"guidance_scale": (1,)}, "guidance_scale must be two values"),
    (ServingLimits, {"side": (100, 512)}, "a multiple of 8"),
    (GenerationConfig, {"scheduler": "eular"}, "scheduler must be one of euler, euler_a, dpmpp_2m"),
    (GenerationConfig, {"scheduler": None}, "received None"),
    (GenerationConfig, {"steps": 0}, "steps must be a whole number from 1 to 1000; received 0. Example: steps = 25"),
    (GenerationConfig, {"steps": 25.0}, "received 25.0"),
    (GenerationConfig, {"steps": True}, "received True"),
    (GenerationConfig, {"steps": "25"}, "received '25'"),
    (
        GenerationConfig,
        {"sigma_schedule": "kerras"},
        "sigma_schedule must be one of own, karras, exponential, beta, sgm",
    ),
    (GenerationConfig, {"timestep_spacing": None}, "must be one of own, leading, trailing, linspace; received None"),
    (
        GenerationConfig,
        {"sigmas": (1.0, 2.0)},
        "sigmas must be up to 1000 values, each a number above 0 and below 10000",
    ),
    (
        GenerationConfig,
        {"sigmas": 5.0},
        "the largest first; a 0 at the end is left off (sigma), or left out; received 5",
    ),
    (
        GenerationConfig,
        {"timesteps": (999, 1000)},
        "timesteps must be up to 1000 values, each a whole number from 0 to 9",
    ),
    (GenerationConfig, {"apg": 5}, "apg must be a ProjectedGuidance; received 5. Example: apg.momentum = -0.5"),
    (
        GenerationConfig,
        {"cfg_zero": "on"},
        "cfg_zero must be a ZeroStar; received 'on'. Example: cfg_zero.zero_steps = 0",
    ),
    (GenerationConfig, {"pag": 3.0}, "pag must be a PerturbedAttention; received 3.0. Example: pag.scale = 3.0"),
    (ProjectedGuidance, {"eta": 1.5}, "eta must be a number from 0 to 1; received 1.5. Example: eta = 0.0"),
    (ProjectedGuidance, {"threshold": -1}, "threshold must be a number from 0 to 10000"),
    (ProjectedGuidance, {"momentum": 1}, "momentum must be a number above -1 and below 1"),
    (ZeroStar, {"zero_steps": -1}, "zero_steps must be a whole number from 0 to 1000"),
    (PerturbedAttention, {"scale": -1}, "scale must be a number from 0 to 100"),
    (PerturbedAttention, {"adaptive": 2}, "adaptive must be a number from 0 to 1"),
    (FreeU, {"b1": 0}, "b1 must be a number above 0 and below 10; received 0. Example: b1 = 1.1"),
    (FreeU, {"b2": 10}, "b2 must be a number above 0 and below 10"),
    (FreeU, {"s1": "0.6"}, "s1 must be a number above 0 and below 10"),
    (FreeU, {"s2": None}, "s2 must be a number above 0 and below 10"),
    (GenerationConfig, {"freeu": 1}, "freeu must be a FreeU; received 1. Example: freeu.b1 = 1.1, freeu.b2 = 1.2, fr"),
    (HiresConfig, {"scale": 0.5}, "scale must be a number from 1 to 8; received 0.5. Example: scale = 2.0"),
    (HiresConfig, {"strength": 0}, "strength must be a number from 0.01 to 1"),
    (HiresConfig, {"steps": 0}, "steps must be a whole number from 1 to 1000, or left out"),
    (HiresConfig, {"upscaler": "Latent"}, "upscaler must be one of latent, lanczos"),
    (GenerationConfig, {"hires": 2.0}, "hires must be a HiresConfig; received 2.0. Example: hires.scale = 2.0"),
    (PerturbedAttention, {"layers": "all"}, "layers must be one of mid, down, up"),
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
    (GenerationConfig, {"negative_prompt_2": ""}, "negative_prompt_2 must be text of 1 to 2000 characters"),
    (GenerationConfig, {"prompt_syntax": "compel"}, "prompt_syntax must be one of plain, a1111; received 'compel'"),
    (GenerationConfig, {"embeddings": 5}, "embeddings must be a list of at most 64 EmbeddingRef tables; received 5"),
    (GenerationConfig, {"model": "nano"}, "model must be a ModelRef; received 'nano'. Example: model.base = \"nano\""),
    (
        GenerationConfig,
        {"refiner": 0.8},
        "refiner must be a RefinerConfig; received 0.8. Example: refiner.handover = 0.8",
    ),
    (
        GenerationConfig,
        {"clip_skip": 12},
        "clip_skip must be a whole number from 0 to 11 (layers), or left out; received",
    ),
    (
        GenerationConfig,
        {"loras": 5},
        "loras must be a list of at most 16 LoraRef tables; received 5. Example: loras = [{ s",
    ),
    (GenerationConfig, {"loras": ["x"] * 17}, "at most 16 LoraRef tables; received ['x', 'x'"),
    (
        ServingLimits,
        {"loras": "outlines"},
        "loras must be a list of at most 1000 OfferedLora tables; received 'outlines'",
    ),
    (RuntimeProfile, {"lora_mib": 0}, "lora_mib must be a whole number from 1 to 1000000 (MiB); received 0"),
    (GenerationConfig, {"clip_skip": -1}, "received -1. Example: clip_skip = 1"),
    (GenerationConfig, {"watermark": 1}, "watermark must be true or false; received 1"),
    (RuntimeProfile, {"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N; received 'gpu'"),
    (RuntimeProfile, {"device": "cuda:"}, "received 'cuda:'"),
    (RuntimeProfile, {"dtype": "fp16"}, "dtype must be one of auto, float32, float16, bfloat16; received 'fp16'"),
    (RuntimeProfile, {"rows": 0}, "rows must be a whole number from 1 to 4096"),
    (RuntimeProfile, {"active": 0}, "active must be a whole number from 1 to 100000; received 0"),
    (RuntimeProfile, {"order": "lifo"}, "order must be one of shortest, fifo; received 'lifo'"),
    (RuntimeProfile, {"exact": 1}, "exact must be true or false; received 1"),
    (RuntimeProfile, {"threads": 0}, "threads must be a whole number from 1 to 1024, or left out; received 0"),
    (RuntimeProfile, {"channels_last": 1}, "channels_last must be true or false; received 1"),
    (RuntimeProfile, {"fuse_qkv": "yes"}, "fuse_qkv must be true or false; received 'yes'"),
    (RuntimeProfile, {"compile": "max-autotune"}, "compile must be true or false; received 'max-autotune'"),
    (RuntimeProfile, {"graphs": 2}, "graphs must be true or false; received 2"),
    (RuntimeProfile, {"storage": "int8"}, "storage must be one of own, float8; received 'int8'"),
    (RuntimeProfile, {"tile_above": 8}, "tile_above must be a whole number from 64 to 65536 (pixels); received 8"),
    (RuntimeProfile, {"preview_decoder": ""}, "preview_decoder must be text of 1 to 500 characters"),
]


@pytest.mark.parametrize(("kind", "values", "said"), BAD, ids=[f"{k.__name__} {v!r:.40}" for k, v, _ in BAD])
def test_a_bad_value_is_refused_with_rule_value_and_example(kind, values, said):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    ((name, value),) = values.items()
    text, rule = str(caught.value), kind.settings()[name].rule
    assert said in text
    assert text.startswith(f"{name} must be {rule}; received {value!r}. Example: {name}")
    assert (caught.value.field, caught.value.rule) == (name, rule)


def test_every_setting_has_a_bad_example():
    assert {(kind, *values) for kind, values, _ in BAD} == set(SETTINGS)


@pytest.mark.parametrize(("kind", "name"), SETTINGS, ids=SETTING_IDS)
def test_the_example_of_a_setting_is_valid(kind, name):
    example = kind.settings()[name].example
    beside = {"steps": len(example)} if name in ("sigmas", "timesteps") else {}  # one for each step
    kind.from_dict({name: example} | beside)


@pytest.mark.parametrize(("kind", "name"), SETTINGS, ids=SETTING_IDS)
def test_the_default_of_a_setting_is_valid(kind, name):
    setting = kind.settings()[name]
    assert setting.check(setting.default) == setting.default


@pytest.mark.parametrize(("kind", "name"), SETTINGS, ids=SETTING_IDS)
def test_a_setting_is_declared_with_what_every_door_needs(kind, name):
    setting = kind.settings()[name]
    assert setting.label[0].isupper()
    assert setting.help
    assert not setting.help.endswith(".")
    assert setting.source or kind in (ServingLimits, RuntimeProfile)


def test_a_name_of_the_command_line_is_one_settings_own():
    options = [setting.option for setting in GenerationConfig.settings().values() if setting.option]
    assert len(options) == len(set(options))


def test_what_a_client_may_ask_for_has_its_limits():
    settings = GenerationConfig.settings()
    assert [name for name, setting in settings.items() if setting.client] == [
        "loras",
        "scheduler",
        "steps",
        "guidance_scale",
        "width",
        "height",
        "negative_prompt",
        "negative_prompt_2",
        "refiner",
    ]
    limited = {name: setting.limited_by for name, setting in settings.items() if setting.limited_by}
    assert limited == {"steps": "steps", "guidance_scale": "guidance_scale", "width": "side", "height": "side"}
    for name, limit in limited.items():
        assert ServingLimits.settings()[limit].kind.each == settings[name].kind


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_refused_by_naming_the_known(kind):
    for make in (lambda: kind.from_dict({"stepz": 25}), lambda: kind().with_(stepz=25)):
        with pytest.raises(ConfigError, match=f"stepz must be a field of {kind.__name__}.*received 25") as caught:
            make()
        assert all(name in str(caught.value) for name in kind.model_fields)


@pytest.mark.parametrize("name", ["digest", "to_dict", "settings"])
def test_what_is_no_field_cannot_be_changed(name):
    with pytest.raises(ConfigError, match=f"{name} must be a field of GenerationConfig"):
        GenerationConfig().with_(**{name: 1})


NESTED_BAD = [
    ({"refiner": {"handover": 2}}, r"refiner\.handover must be a number above 0 and below 1; received 2"),
    ({"refiner": {"hand": 0.5}}, r"refiner\.hand must be a field of RefinerConfig"),
    ({"model": {"revision": 3}}, r"model\.revision must be"),
    ({"model": "nano"}, r"model must be a ModelRef; received 'nano'. Example: model\.base = \"nano\""),
    ({"refiner": 0.8}, r"refiner must be a RefinerConfig; received 0\.8. Example: refiner\.handover = 0\.8"),
    ({"model": None}, r"model must be a ModelRef; received None"),
]


@pytest.mark.parametrize(("content", "said"), NESTED_BAD, ids=[str(content) for content, _ in NESTED_BAD])
def test_a_bad_nested_record_is_refused(content, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
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


CHANGES = [
    ({"steps": 7}, {"steps": 7}),
    ({"guidance_interval": [0.3, 5.0]}, {"guidance_interval": (0.3, 5.0)}),
    ({"guidance_interval": "none"}, {"guidance_interval": None}),
    ({"refiner": "none"}, {"refiner": None}),
    ({"refiner": {"handover": 0.7}}, {"refiner": RefinerConfig(handover=0.7)}),
    ({"refiner.handover": 0.7}, {"refiner": RefinerConfig(handover=0.7)}),
    ({"refiner": True}, {"refiner": RefinerConfig()}),
    ({"model": "some/hub-id"}, {"model": ModelRef(base="some/hub-id")}),
    ({"model": "nano"}, {}),
    ({"model.revision": "main"}, {"model": ModelRef(refiner="nano", revision="main")}),
    ({"negative_prompt": "blurry"}, {"negative_prompt": "blurry"}),
]


@pytest.mark.parametrize(("values", "changes"), CHANGES, ids=[str(values) for values, _ in CHANGES])
def test_any_setting_can_be_changed_by_a_plain_value(values, changes):
    start = GenerationConfig(guidance_interval=(1, 2))
    assert start.changed(values) == start.with_(**changes)


def test_settings_change_together_so_that_rules_over_two_of_them_see_the_outcome_alone():
    small = GenerationConfig(width=64, height=64)
    assert small.changed({"watermark": True, "width": 256, "height": 256}).watermark
    few = {"scheduler": "lcm", "steps": 4}
    assert GenerationConfig(steps=100).changed(few) == GenerationConfig(**few)
    with pytest.raises(ConfigError, match="watermark must be false below"):
        small.changed({"watermark": True, "width": 256})


# --- round trips and the digest --------------------------------------------------------------------------------------

ROUND = {
    "default": GenerationConfig(),
    "everything": EVERYTHING,
    **{f"apart {index}": config for index, config in enumerate(APART)},
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


@pytest.mark.parametrize(
    "profile", [RuntimeProfile(), RuntimeProfile(device="cuda:3", dtype="bfloat16", rows=40, threads=3)]
)
def test_a_runtime_profile_survives_its_plain_form(profile):
    assert RuntimeProfile.from_dict(profile.to_dict()) == profile


def test_equal_settings_have_equal_digests_however_they_are_written():
    plain = GenerationConfig(guidance_scale=5, crop=[0, 0], guidance_interval=[1, 5], refiner=RefinerConfig())
    assert plain == GenerationConfig(
        guidance_scale=5.0, guidance_interval=(1.0, 5.0), refiner=RefinerConfig(handover=0.8)
    )
    assert plain.digest == GenerationConfig.from_dict(dict(reversed(plain.to_dict().items()))).digest


def test_every_field_moves_the_digest():
    plain, needed = GenerationConfig(), {"sigmas": {"steps": 3}, "timesteps": {"steps": 2}}

    def moved(name: str) -> object:
        """A value of the setting that is not the plain one's."""
        values = (config.value(name) for config in (EVERYTHING, *APART))
        return next(value for value in values if value not in (None, plain.value(name)))

    for name in GenerationConfig.model_fields:
        before = plain.with_(**needed.get(name, {}))
        assert plain.with_(**needed.get(name, {}), **{name: moved(name)}).digest != before.digest, name
    for name, setting in GenerationConfig.settings().items():
        if "." in name and setting.default != moved(name):
            changed = plain.changed({name: moved(name)})
            without = plain.changed({name.split(".")[0]: {}})
            assert changed.digest not in (plain.digest, without.digest), name


# The defaults that each schema's digests count from. A table may only grow, by the settings added while its schema
# holds. Whoever changes a default gives GenerationConfig.SCHEMA the next number, and that number a table: the digest
# leaves out what is as the schema has it, so under the old number it would name other images than before.
DEFAULTS = {
    1: {
        "model": {"base": "nano", "refiner": "nano"},
        "model.base": "nano",
        "model.revision": None,
        "model.sha256": None,
        "model.config": None,
        "model.config_revision": None,
        "model.prediction_type": None,
        "model.zero_snr": None,
        "model.refiner": "nano",
        "model.refiner_revision": None,
        "model.refiner_sha256": None,
        "model.vae": None,
        "model.vae_revision": None,
        "model.vae_sha256": None,
        "loras": (),
        "scheduler": "euler",
        "steps": 25,
        "guidance_scale": 5.0,
        "guidance_rescale": 0.0,
        "guidance_interval": None,
        "width": 256,
        "height": 256,
        "original_size": None,
        "crop": (0, 0),
        "target_size": None,
        "negative_prompt": None,
        "negative_prompt_2": None,
        "prompt_syntax": "plain",
        "embeddings": (),
        "clip_skip": None,
        "refiner": None,
        "refiner.handover": 0.8,
        "refiner.aesthetic_score": 6.0,
        "refiner.negative_aesthetic_score": 2.5,
        "watermark": False,
        "sigma_schedule": "own",
        "timestep_spacing": "own",
        "sigmas": None,
        "timesteps": None,
        "apg": None,
        "apg.eta": 0.0,
        "apg.threshold": 15.0,
        "apg.momentum": -0.5,
        "cfg_zero": None,
        "cfg_zero.zero_steps": 0,
        "pag": None,
        "pag.scale": 3.0,
        "pag.adaptive": 0.0,
        "pag.layers": "mid",
        "freeu": None,
        "freeu.b1": 1.1,
        "freeu.b2": 1.2,
        "freeu.s1": 0.6,
        "freeu.s2": 0.4,
        "hires": None,
        "hires.scale": 2.0,
        "hires.strength": 0.6,
        "hires.steps": None,
        "hires.upscaler": "latent",
    }
}


def test_the_defaults_are_those_of_the_schema():
    found = {name: setting.default for name, setting in GenerationConfig.settings().items()}
    assert found | {"model": found["model"].to_dict()} == DEFAULTS[GenerationConfig.SCHEMA]
    assert ModelRef().to_dict() == {"base": "nano"}  # what a table of the model counts from


# Digests name promoted configurations, images and studies for good. This table may only grow: a row that does
# not hold any more means that everything named so far has lost its name.
DIGESTS = [
    ({}, "67d6291b301412df4a6ca7808aeafac9d0587b06ece3c68e72bab0157cd9d52c"),
    ({"steps": 20}, "c52ae7e82d5aadb340f2c7ed28ced05f4bd5c0ef7f621e259a48a8da3b316154"),
    ({"scheduler": "dpmpp_2m_karras", "steps": 12}, "e8aa4b5972678021f8c32bc7f8822b1064c392fe10e00fc1e947293fcdaaaa84"),
    ({"guidance_scale": 7.5}, "644a069e2ee3d4e35d9e3bd1f1b94ed42156321dffb47647b82c4cd4e2dcadcc"),
    ({"guidance_rescale": 0.7}, "ae59854e76d1b999363a5831ce4827006c14df58c8a48ed462e1e212f7859694"),
    ({"guidance_interval": [0.28, 5.42]}, "7ec6c1d3d8ed0d412daa4aff0c3829358f708d5c7a65b36357b7f2b0a7d9e2a6"),
    ({"width": 320, "height": 264}, "58fed1f68370332a0401c8138e9779ea6415d541a84edfa372f313eac18f36b6"),
    ({"original_size": [1024, 512]}, "1550b44c23f946a94b2954ff6d24102b05fa956a2dceceb94223377bcd8c1df0"),
    ({"crop": [8, 16]}, "5a44036722f8d061f0a84f7e203f83ab979c314cfb0c0c826d37906bf0faf403"),
    ({"target_size": [264, 320]}, "a695275cdd169472e915bbed36ab28c0c3a845bf262f8284d3873bd0571eed83"),
    ({"negative_prompt_2": "a dog"}, "709e45b195e317fd8ec67ac9b27a30c0e9b0d350f28d2e25ac88d697f987d5a1"),
    ({"prompt_syntax": "a1111"}, "b32dfa1ccafde05314752b25e51ca802b49b7a6d322e86bae2850efabefd903a"),
    (
        {"embeddings": [{"token": "style", "source": "style.safetensors"}]},
        "32f689b58583d6904f26d46c8b860ad6dc12a2b53b7cbfdb29710d1a4d1f37bb",
    ),
    (
        {"embeddings": [{"token": "style", "source": "style.safetensors", "sha256": "0" * 64}]},
        "82084902606af95a08096c65e7f999c53e5124f9ffaa819a7814b78678d3bfb5",
    ),
    ({"negative_prompt": ""}, "37c80b60941f51eccc220de785e71bb1f856691d82222ae71d5981c337afa57f"),
    ({"negative_prompt": 'blurry "é" \n日本'}, "db38c9413fa3383d84e06fa8d18dbc51ca6dfc08ccfe4c74dffdfb7a2b5b305a"),
    ({"refiner": {}}, "ecb659cfb313a5290cfbf25ab48522f2417fb2150e0e63df1be3b60af5471c87"),
    (
        {"refiner": {"handover": 0.7, "aesthetic_score": 6.5, "negative_aesthetic_score": 2.0}},
        "f4ba6dbc3decc42caee20c027035df94d64e74002fd8f8771c3790c1f30d09d6",
    ),
    ({"watermark": True}, "7bf0d8a8c2269bb0e32c82d5ea29a1a85ea509630169de35e7867b9a026d3386"),
    ({"model": {}}, "41d3b0afefa92302e102b66e64064fdad092677b611793edf0f079ee10427c97"),
    (
        {
            "model": {
                "base": "some/base",
                "revision": "0123abc",
                "refiner": "some/refiner",
                "refiner_revision": "main",
                "vae": "some/vae",
                "vae_revision": "v1",
            }
        },
        "ff643f5f30f31b10904270cde409b8bb51fa99d7173e2e1bfd053f685a5677f5",
    ),
    (
        {"loras": [{"source": "outlines.safetensors"}]},
        "64a1471d61b41ca0b9db5d8acf098d2e01ff692143168cdd9d70221965bcb9b6",
    ),
    (
        {
            "loras": [
                {
                    "source": "a/b",
                    "revision": "0" * 40,
                    "file": "c.safetensors",
                    "weight": 0.5,
                    "text_encoder_weight": 0.0,
                }
            ]
        },
        "074a69790b3b496802bb5a5ddb9930e37cb75912a5677fcf254885a30278a38f",
    ),
    (
        {"loras": [{"source": "x.safetensors", "sha256": "0" * 64, "weight": 0.5}]},
        "74bc16effb121581d1429f9d4e4f04232457c2daca97e631663557704554108d",
    ),
    (
        {"model": {"base": "a.safetensors", "sha256": "0" * 64, "config": "nano"}},
        "34567c8e05e96238895e24f1159eeab6e1e663962fb4ce804b65b0768089bbd1",
    ),
    (
        {
            "model": {
                "base": "some/base",
                "prediction_type": "v_prediction",
                "zero_snr": True,
                "refiner_sha256": "1" * 64,
                "vae_sha256": "2" * 64,
                "config_revision": "v2",
            }
        },
        "39acf2dba4e69b566feee7a1a4b0631945bdd9ac41ee0f0ab38f7c825f1bd86a",
    ),
    ({"clip_skip": 1}, "ecf37139e081c80c5da7a5ed8b818fc191c11eff0729a4e792243b99cbe580c1"),
    ({"sigma_schedule": "karras"}, "6d820c8a6cbcd5b31011910c9ab1f926700f2e6a43372af0f3e7bbd4f9383174"),
    ({"timestep_spacing": "trailing"}, "f6e8c48c6d1979b82cde57a82bc4178ee5bfb8c8908b9da65a8cac24e7ce616e"),
    ({"sigmas": [14.615, 2.5, 0.125], "steps": 3}, "78285699e931a6dc16242fca105502f1b143c2137d803add92364067f54da9b4"),
    ({"timesteps": [999, 499], "steps": 2}, "fd96222f766dd2029f775d6f5c6026877e33e3b54c0de5bff366bed947261ab0"),
    (
        {"apg": {"eta": 0.5, "threshold": 7.5, "momentum": -0.25}},
        "33c5c6c44a6f0a3893c1e547fbd05c2f439a6f08d2b03e7e85254217e52799e2",
    ),
    ({"cfg_zero": {"zero_steps": 1}}, "aa8eecf876c0de5212b5c6e93b55b1ddd582d68bf6550c906f7f96de151f1ef5"),
    (
        {"pag": {"scale": 2.0, "adaptive": 0.001, "layers": "up"}},
        "9f41537babb3f728d2b27703c85292d304c64297912887761238548b19390d54",
    ),
    (
        {"freeu": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}},
        "e67b05508ff049e6f95a99fc94ab83b6f6b6f05a8ded43cf692351ee3003da66",
    ),
    ({"hires": {}}, "562b41968e7f541e3aff51631c5a8d90f031b99372f2caaee4ebba001108a00c"),
    (
        {"hires": {"scale": 1.5, "strength": 0.8, "steps": 30, "upscaler": "lanczos"}},
        "8df07febb90caf61e9a56a09a35e12fb18d0e751644768565e598fafa52b5aea",
    ),
    ({"clip_skip": 2, "steps": 12}, "788e82b165205c32cfcde171d40625f621ad8a78ec8a67a53fb37fa7eecdd3ea"),
]


@pytest.mark.parametrize(("values", "digest"), DIGESTS, ids=[str(values) for values, _ in DIGESTS])
def test_a_digest_stays_what_it_was(values, digest):
    assert GenerationConfig.from_dict(values).digest == digest


def test_the_table_of_digests_has_every_setting():
    named = set()
    for values, _ in DIGESTS:
        for name, value in values.items():
            named |= {name, *(f"{name}.{inner}" for inner in value)} if isinstance(value, dict) else {name}
    assert named == set(GenerationConfig.settings())
    assert len({digest for _, digest in DIGESTS}) == len(DIGESTS)


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        GenerationConfig().steps = 3  # type: ignore[misc]


NO_TOML = {"no TOML": b"steps: 25", "no text": b"\xff\xfe\x00", "an image": b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("content", NO_TOML.values(), ids=NO_TOML)
def test_a_file_that_is_no_toml_is_refused_by_name(content, tmp_path):
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml must be valid TOML; received .* Example: steps = 25"):
        GenerationConfig.from_toml(file)


# --- configurations of 0.1.0 -----------------------------------------------------------------------------------------

OLD = {"steps": 20, "limits": {"steps": [1, 60], "guidance_scale": [0.0, 12.0], "side": [128, 768]}}


def test_a_configuration_of_0_1_0_is_refused_with_the_command_that_migrates_it(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("steps = 20\n[limits]\nsteps = [1, 60]\n")
    refused = r"limits must be left out.*0\.1\.0; migrate it with `python -m sdxl_lab migrate {}`; received"
    with pytest.raises(ConfigError, match=refused.format(file)):
        GenerationConfig.from_toml(file)
    with pytest.raises(ConfigError, match=refused.format("PATH")):
        GenerationConfig.from_dict(OLD)


MIGRATED = {
    "all limits": (
        OLD,
        GenerationConfig(steps=20),
        ServingLimits(steps=(1, 60), guidance_scale=(0, 12), side=(128, 768)),
    ),
    "some limits": ({"limits": {"side": [64, 512]}}, GenerationConfig(), ServingLimits(side=(64, 512))),
    "no limits": ({"steps": 20}, GenerationConfig(steps=20), ServingLimits()),
}


@pytest.mark.parametrize(("content", "config", "limits"), MIGRATED.values(), ids=MIGRATED)
def test_a_configuration_of_0_1_0_is_parted_in_two(content, config, limits):
    before = json.dumps(content)
    assert migrated_config(content) == (config, limits)
    assert json.dumps(content) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"limits": [1, 2]}, r"limits must be a table of ranges; received \[1, 2\]"),
        ({"limits": {"steps": [9, 1]}}, "steps must be two values"),
        ({"limits": {}, "steps": 0}, "steps must be a whole number"),
        ({"limits": {}, "stepz": 1}, "stepz must be a field of GenerationConfig"),
    ],
)
def test_a_configuration_of_0_1_0_that_breaks_a_rule_is_refused(content, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        migrated_config(content)


# --- LoRAs -----------------------------------------------------------------------------------------------------------

WORDS = [
    # what a command line says, what it means, and its word again
    ("a.safetensors", {"source": "a.safetensors"}, "a.safetensors:1"),
    ("../b/a.safetensors:0.5", {"source": "../b/a.safetensors", "weight": 0.5}, "../b/a.safetensors:0.5"),
    ("a:0.5:-1", {"source": "a", "weight": 0.5, "text_encoder_weight": -1.0}, "a:0.5:-1"),
    ("nano/neon:2", {"source": "nano", "file": "neon.safetensors", "weight": 2.0}, "nano/neon:2"),
    (
        f"an/id@{'0a' * 20}/sub/a.safetensors:0",
        {"source": "an/id", "revision": "0a" * 20, "file": "sub/a.safetensors", "weight": 0.0},
        f"an/id@{'0a' * 20}/sub/a.safetensors:0",
    ),
]


@pytest.mark.parametrize(("words", "fields", "again"), WORDS, ids=[words for words, _, _ in WORDS])
def test_a_lora_is_read_from_the_word_of_a_command_line(words, fields, again):
    found = LoraRef.named(words)
    assert found == LoraRef(**fields)
    assert found.word == again
    assert LoraRef.named(again) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a:much", "weight must be a number from -10 to 10; received 'much'"),
        ("a:11", "weight must be"),
        ("", "FILE:WEI"),
    ],
)
def test_a_word_that_is_no_lora_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        LoraRef.named(words)


def test_the_name_of_a_lora_is_its_files():
    names = [
        LoraRef.named(words).name
        for words in ("x/a.b.safetensors", "nano/neon:2", f"an/id@{'0a' * 20}/s/a.safetensors")
    ]
    assert names == ["a.b", "neon", "a"]
    assert LoraRef(source="x").text_weight == 1.0
    assert LoraRef(source="x", weight=0.5, text_encoder_weight=0.0).text_weight == 0.0


def test_where_a_file_of_known_content_lies_does_not_move_the_digest():
    one, other = (GenerationConfig(loras=[{"source": name, "sha256": "0" * 64}]) for name in ("a", "b"))
    assert one.digest == other.digest
    assert one.with_(loras=[{"source": "a", "sha256": "1" * 64}]).digest != one.digest
    assert one.changed({"loras.0.weight": 0.5}).digest != one.digest


OFFER = ServingLimits(
    loras=[
        {"name": "neon", "source": "nano", "file": "neon.safetensors", "weight": [0, 1.5]},
        {"name": "other", "source": "loras/other.safetensors", "sha256": "0" * 64},
    ]
)


def test_what_a_client_asks_for_comes_after_what_is_promoted():
    promoted = GenerationConfig(loras=["mine:0.3"])
    found = OFFER.with_asked([{"name": "other", "weight": 0.5}, {"name": "neon", "weight": None}], promoted)
    assert [(ref.source, ref.weight) for ref in found] == [
        ("mine", 0.3),
        ("loras/other.safetensors", 0.5),
        ("nano", 1.5),
    ]
    served = GenerationConfig(loras=["mine:0.3", {"source": "elsewhere", "sha256": "0" * 64, "weight": 0.2}])
    found = OFFER.with_asked([{"name": "other", "weight": 0.5}], served)
    assert [(ref.source, ref.weight) for ref in found] == [("mine", 0.3), ("loras/other.safetensors", 0.5)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            [{"name": "nean"}],
            "loras.0.name must be one that is offered here: neon, other; received 'nean'. Did you mean",
        ),
        ([{"name": "../etc/passwd"}], "one that is offered here"),
        ([{"name": "neon"}, {"name": "neon"}], "loras.1.name must be named once"),
        (
            [{"name": "neon", "weight": 1.6}],
            "loras.0.weight must be a number from 0 to 1.5; received 1.6. Example: lor",
        ),
        ([{"name": "neon", "weight": -0.1}], "received -0.1"),
    ],
)
def test_what_is_not_offered_is_refused(asked, said):
    with pytest.raises(ConfigError, match=said):
        OFFER.with_asked(asked, GenerationConfig())


def test_offers_have_names_of_their_own():
    with pytest.raises(ConfigError, match=r"loras\.1\.name must be a name of its own; received 'neon'"):
        ServingLimits(loras=[OFFER.loras[0], OFFER.loras[0]])
    with pytest.raises(ConfigError, match=r"loras\.0\.name must be 1 to 64 letters"):
        ServingLimits(loras=[{"name": "a/b", "source": "x"}])
    assert OfferedLora(name="a", source="b").at(None).weight == 1.0


def test_the_limits_of_a_model_are_those_of_its_size(tmp_path):
    assert ServingLimits.for_model(MODELS["nano"]) == ServingLimits(side=(128, 512))
    assert ServingLimits.for_model(MODELS["sdxl"]) == ServingLimits(side=(512, 1536))
    assert ServingLimits.for_model(ModelRef(base=str(tmp_path))).side == (512, 1536)


@pytest.mark.parametrize(
    "limits", [ServingLimits(), OFFER, ServingLimits(steps=(2, 9), guidance_scale=(1, 2), side=(64, 128))]
)
def test_limits_survive_toml(limits, tmp_path):
    file = tmp_path / "serving.toml"
    file.write_text(limits.to_toml())
    assert ServingLimits.from_toml(file) == limits


def test_the_configuration_is_imported_without_torch_and_diffusers():
    code = "import sys, sdxl_lab.config; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "pydantic" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "fastapi"}


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


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_an_embedding_is_read_from_the_word_of_a_command_line():
    for words in ("ink=a/b.safetensors", "my ink=b.safetensors"):
        assert EmbeddingRef.named(words).word == words
    assert EmbeddingRef.named("a/b.safetensors") == EmbeddingRef(token="b", source="a/b.safetensors")


@pytest.mark.parametrize("token", ["", " ink", "ink ", "a=b", "a,b", "x" * 101])
def test_a_word_that_a_door_could_not_write_is_refused(token):
    with pytest.raises(ConfigError, match="token must be 1 to 100 characters without = or comma"):
        EmbeddingRef(token=token, source="x.safetensors")


def test_embeddings_have_words_of_their_own():
    with pytest.raises(ConfigError, match=r"embeddings\.1\.token must be a word of its own; received 'INK'"):
        GenerationConfig(embeddings=["ink=a.safetensors", "INK=b.safetensors"])
    one, other = (GenerationConfig(embeddings=[{"token": "ink", "source": s, "sha256": "0" * 64}]) for s in "ab")
    assert one.digest == other.digest
    assert one.changed({"embeddings.0.token": "oil"}).digest != one.digest


# --- two passes ------------------------------------------------------------------------------------------------------


def test_a_second_pass_changes_no_digest_where_there_is_none():
    assert "hires" not in GenerationConfig().distinct()
    assert GenerationConfig(hires=HiresConfig()).digest != GenerationConfig().digest
    scaled = GenerationConfig(hires=HiresConfig(scale=1.5))
    assert scaled.distinct() == {"hires": {"scale": 1.5}}
    assert GenerationConfig.from_dict(scaled.to_dict()) == scaled


@pytest.mark.parametrize(("scale", "size"), [(1.0, (136, 64)), (1.5, (200, 96)), (1.99, (264, 120)), (2.0, (272, 128))])
def test_the_drawn_size_is_a1111s_whole_number_of_latents(scale, size):
    assert GenerationConfig(width=136, height=64, hires=HiresConfig(scale=scale)).drawn_size == size
    assert GenerationConfig(width=136, height=64).drawn_size == (136, 64)


BAD_PASSES = [
    ({"width": 2048, "hires": HiresConfig(scale=4)}, "hires.scale must be one that makes no side longer than 4096"),
    ({"hires": HiresConfig(strength=0.02)}, "hires.strength must be at least 1/steps, here 0.04"),
    ({"steps": 4, "hires": HiresConfig(strength=0.24)}, "or no step is left; received 0.24"),
    (
        {"steps": 2, "sigmas": (5.0, 1.0), "hires": HiresConfig(steps=4)},
        "hires.steps must be left out, or 2, where sigmas are given for 2 steps; received 4",
    ),
    ({"scheduler": "lcm", "hires": HiresConfig(steps=51)}, "hires.steps must be at most 50 with the scheduler lcm"),
]


@pytest.mark.parametrize(("settings", "said"), BAD_PASSES, ids=[said[:30] for _, said in BAD_PASSES])
def test_a_second_pass_that_cannot_be_made_is_refused(settings, said):
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(**settings)
    assert said in str(caught.value)


def test_a_watermark_needs_room_in_the_image_that_is_drawn():
    GenerationConfig(width=128, height=128, watermark=True, hires=HiresConfig())
    with pytest.raises(ConfigError, match="true at 192x192"):
        GenerationConfig(width=128, height=128, watermark=True, hires=HiresConfig(scale=1.5))


@pytest.mark.parametrize("name", ["compile", "graphs"])
def test_weights_in_eight_bits_are_not_compiled_or_recorded(name):
    with pytest.raises(ConfigError, match=f"storage must be own with {name}"):
        RuntimeProfile(storage="float8", **{name: True})
