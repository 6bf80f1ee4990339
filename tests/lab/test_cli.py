"""The terminal's door: what it draws, repeats, shows, promotes, refuses, and how it stops."""

import _thread
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdxl_lab import cli
from sdxl_lab.cli import STOPPED, main
from sdxl_lab.config import (
    FreeU,
    GenerationConfig,
    HiresConfig,
    ModelRef,
    PerturbedAttention,
    ProjectedGuidance,
    RefinerConfig,
    RuntimeProfile,
    ZeroStar,
)
from sdxl_lab.diffusion import engine
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.lora_files import pinned
from sdxl_lab.evaluation import comparison
from sdxl_lab.images import max_difference, open_image, read_record
from sdxl_lab.job import ImageRequest
from sdxl_lab.release import promote as promotion
from sdxl_lab.release import verify as verifying
from sdxl_lab.release.slot import load_slot
from sdxl_lab.source import SourceImage

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("at_hand")


@pytest.fixture
def config_file(tiny_config, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(tiny_config.with_(steps=3).to_toml())
    return file


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "cat.png"


def test_generate_draws_the_image_that_its_options_say(tiny_model, out, capsys):
    options = {
        "--seed": "7",
        "--steps": "4",
        "--scheduler": "ddim",
        "--guidance-scale": "2.5",
        "--width": "72",
        "--height": "64",
        "--negative-prompt": "blurry",
    }
    command = ["generate", "A cat in a hat", "--out", str(out), "--model", str(tiny_model), "--refiner"]
    assert main([*command, *(word for pair in options.items() for word in pair)]) == 0
    record = read_record(out)
    config = record.config
    assert (record.prompt, record.seed) == ("A cat in a hat", 7)
    assert (config.steps, config.scheduler, config.guidance_scale) == (4, "ddim", 2.5)
    assert (config.negative_prompt, config.refiner) == ("blurry", RefinerConfig())
    assert open_image(out).size == (72, 64)
    assert capsys.readouterr().out.startswith(f"{out}  seed 7  config {record.config.short_digest}  ")


NEON = pinned(GenerationConfig(loras=["nano/neon:0.5", "nano/neon:1:0"])).loras
COMMIT, SHA256 = "c0ffee" * 6 + "abcd", "5" * 64
OPTIONS = [
    ("--scheduler heun", {"scheduler": "heun"}),
    ("--steps 4", {"steps": 4}),
    ("--guidance-scale 2.5", {"guidance_scale": 2.5}),
    ("--guidance-rescale 0.7", {"guidance_rescale": 0.7}),
    ("--guidance-interval 0.28 5.42", {"guidance_interval": (0.28, 5.42)}),
    ("--width 72 --height 64", {"width": 72, "height": 64}),
    ("--original-size 72 64 --target-size 64 72", {"original_size": (72, 64), "target_size": (64, 72)}),
    ("--crop 8 16", {"crop": (8, 16)}),
    ("--negative-prompt none", {"negative_prompt": "none"}),  # a word like others; --without leaves it out
    ("--without negative-prompt --without guidance-interval", {"negative_prompt": None, "guidance_interval": None}),
    ("--clip-skip 2", {"clip_skip": 2}),
    ("--lora nano/neon:0.5 --lora nano/neon:1:0", {"loras": NEON}),
    ("--without lora", {"loras": ()}),
    ("--without embedding", {"embeddings": ()}),
    ("--prompt-syntax a1111", {"prompt_syntax": "a1111"}),
    ("--negative-prompt a --negative-prompt-2 b", {"negative_prompt": "a", "negative_prompt_2": "b"}),
    ("--refiner", {"refiner": RefinerConfig()}),
    ("--refiner --handover 0.5", {"refiner": RefinerConfig(handover=0.5)}),
    ("--handover 0.5", {"refiner": RefinerConfig(handover=0.5)}),
    (
        "--aesthetic-score 7 --negative-aesthetic-score 2",
        {"refiner": RefinerConfig(aesthetic_score=7, negative_aesthetic_score=2)},
    ),
    ("--no-refiner", {}),
    ("--watermark --width 512 --height 512", {"watermark": True, "width": 512, "height": 512}),
    ("--no-watermark", {}),
    ("--sigma-schedule beta --timestep-spacing linspace", {"sigma_schedule": "beta", "timestep_spacing": "linspace"}),
    ("--sigmas 14.6 3 0.5 0 --steps 3", {"sigmas": (14.6, 3.0, 0.5), "steps": 3}),
    ("--timesteps 999 499 --steps 2", {"timesteps": (999, 499), "steps": 2}),
    ("--apg --without sigmas", {"apg": ProjectedGuidance()}),
    (
        "--apg-eta 0.5 --apg-threshold 9 --apg-momentum 0.1",
        {"apg": ProjectedGuidance(eta=0.5, threshold=9, momentum=0.1)},
    ),
    ("--cfg-zero --zero-steps 1", {"cfg_zero": ZeroStar(zero_steps=1)}),
    (
        "--pag --pag-scale 2 --pag-adaptive 0.001 --pag-layers up",
        {"pag": PerturbedAttention(scale=2, adaptive=0.001, layers="up")},
    ),
    (
        "--freeu --freeu-b1 1.3 --freeu-b2 1.4 --freeu-s1 0.9 --freeu-s2 0.2",
        {"freeu": FreeU(b1=1.3, b2=1.4, s1=0.9, s2=0.2)},
    ),
    (f"--vae a/vae --vae-revision {COMMIT}", {"model": ModelRef(refiner="nano", vae="a/vae", vae_revision=COMMIT)}),
    ("--revision abc", {"model": ModelRef(refiner="nano", revision="abc")}),
    (
        f"--refiner-model a/refiner --refiner-revision {COMMIT}",
        {"model": ModelRef(refiner="a/refiner", refiner_revision=COMMIT)},
    ),
    (
        f"--sha256 {SHA256} --refiner-sha256 {SHA256} --vae ./vae --vae-sha256 {SHA256}",
        {
            "model": ModelRef(
                refiner="nano", vae="./vae", **dict.fromkeys(("sha256", "refiner_sha256", "vae_sha256"), SHA256)
            )
        },
    ),
    (
        f"--model-config a/config --config-revision {COMMIT}",
        {"model": ModelRef(refiner="nano", config="a/config", config_revision=COMMIT)},
    ),
    (
        "--prediction-type v_prediction --zero-snr",
        {"model": ModelRef(refiner="nano", prediction_type="v_prediction", zero_snr=True)},
    ),
    ("--no-zero-snr", {"model": ModelRef(refiner="nano", zero_snr=False)}),
    ("--without refiner-model", {"model": ModelRef()}),
    ("--hires", {"hires": HiresConfig()}),
    ("--no-hires", {}),
    ("--hires-scale 1.5 --hires-strength 0.4", {"hires": HiresConfig(scale=1.5, strength=0.4)}),
    ("--hires-steps 9 --hires-upscaler lanczos", {"hires": HiresConfig(steps=9, upscaler="lanczos")}),
]


class Reached(Exception):
    """Drawing would begin, with this configuration."""


def asked_for(words, monkeypatch):
    """The configuration that `generate` would draw with."""

    def load(config, *_):
        raise Reached(config)

    monkeypatch.setattr(Engine, "load", load)
    with pytest.raises(Reached) as caught:
        main(["generate", "a cat", "--out", "x.png", *words])
    return caught.value.args[0]


@pytest.mark.parametrize(("words", "changes"), OPTIONS, ids=[words for words, _ in OPTIONS])
def test_an_option_changes_its_setting(words, changes, monkeypatch, tmp_path):
    start = GenerationConfig(negative_prompt="blurry", guidance_interval=(1, 2))
    (tmp_path / "config.toml").write_text(start.to_toml())
    found = asked_for(["--config", str(tmp_path / "config.toml"), *words.split()], monkeypatch)
    assert found == start.with_(**changes)


def test_the_commit_that_the_hub_names_is_shown_taken_and_recorded(monkeypatch, capsys):
    """Case 6: a hub id without a commit."""
    from sdxl_lab.diffusion import hub

    asked = []
    monkeypatch.setattr(hub, "commit_of", lambda *named: (asked.append(named), COMMIT)[1])
    found = asked_for(["--model", "org/model"], monkeypatch)
    assert (found.model.base, found.model.revision) == ("org/model", COMMIT)
    assert f"org/model: the commit is {COMMIT}" in capsys.readouterr().err
    asked_for(["--model", "org/model", "--revision", "v2"], monkeypatch)
    assert asked == [("org/model", "main"), ("org/model", "v2")]
    assert asked_for(["--model", "org/model", "--revision", COMMIT], monkeypatch) == found
    assert len(asked) == 2, "a commit is not asked for"


def test_the_a1111_text_of_another_program_goes_over_what_one_starts_from(monkeypatch, tmp_path, capsys):
    info = PngInfo()
    info.add_text("parameters", "a (red) cat\nSteps: 4, Sampler: Euler a, Schedule type: Karras, Seed: 3, Model: xl")
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=info)
    found = asked_for(["--parameters", str(tmp_path / "theirs.png"), "--steps", "6"], monkeypatch)
    taken = {"scheduler": "euler_a", "sigma_schedule": "karras", "prompt_syntax": "a1111"}
    assert found == GenerationConfig(steps=6, **taken)
    assert capsys.readouterr().err == "not taken: Model: xl\n"


def test_generate_has_an_option_for_every_setting_with_its_help(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for setting in GenerationConfig.settings().values():
        if setting.name not in ("model", "model.base"):  # --model
            assert f"--{setting.option}" in printed, setting.name
            assert setting.help in printed, setting.name
    assert "--guidance-interval LOW HIGH" in printed
    used = {word.removeprefix("--no-").removeprefix("--") for words, _ in OPTIONS for word in words.split()}
    assert {setting.option for setting in GenerationConfig.settings().values() if setting.option} <= used


def test_generate_repeats_its_own_seed_and_draws_a_new_one_where_none_is_given(config_file, tmp_path):
    seeds = []
    for name in ("one.png", "two.png"):
        assert main(["generate", "a cat", "--config", str(config_file), "--out", str(tmp_path / name)]) == 0
        seeds.append(read_record(tmp_path / name).seed)
    assert seeds[0] != seeds[1]


def test_like_draws_the_same_pixels(config_file, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    assert main(["generate", "a cat", "--config", str(config_file), "--refiner", "--out", str(first)]) == 0
    assert main(["generate", "--like", str(first), "--out", str(second)]) == 0
    assert max_difference(open_image(first), open_image(second)) == 0
    assert read_record(first) == read_record(second)


@pytest.fixture
def cat(tmp_path) -> Path:
    """A photograph, and beside it `mask.png`."""
    Image.linear_gradient("L").convert("RGB").resize((90, 70)).save(tmp_path / "cat.jpg")
    mask = Image.new("L", (90, 70))
    mask.paste(255, (30, 0, 90, 70))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "cat.jpg"


def test_a_source_in_a_file_is_gone_over_by_the_base_and_repeats_with_it(config_file, cat, tmp_path, capsys):
    first, second, third = (tmp_path / f"{name}.png" for name in ("first", "second", "third"))
    given = ["--source", str(cat), "--mask", str(tmp_path / "mask.png")]
    how = ["--strength", "0.7", "--mask-blur", "3", "--fit", "stretch"]
    assert main(["generate", "a dog", "--config", str(config_file), *given, *how, "--out", str(first)]) == 0
    record = read_record(first)
    assert (record.stage, record.strength, list(record.unet_calls)) == ("base", 0.7, ["base"])
    assert (record.source_image.fit, record.source_image.mask_blur, record.source_image.size) == (
        "stretch",
        3.0,
        (90, 70),
    )
    assert main(["generate", "--like", str(first), *given, "--out", str(second)]) == 0
    assert max_difference(open_image(first), open_image(second)) == 0
    assert read_record(second) == record
    assert "warning" not in capsys.readouterr().err
    assert main(["generate", "--like", str(first), "--source", str(first), *given[2:], "--out", str(third)]) == 0
    assert "warning: the source is another one than that of" in capsys.readouterr().err


def test_an_image_that_needs_its_source_says_which(config_file, cat, tmp_path, capsys):
    out = str(tmp_path / "first.png")
    assert main(["generate", "a dog", "--config", str(config_file), "--source", str(cat), "--out", out]) == 0
    assert main(["generate", "--like", out, "--out", str(tmp_path / "second.png")]) == 1
    sha256 = read_record(out).source_image.sha256
    assert f"whose pixels have the sha256 {sha256}; received None. Example: --source=cat.png" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--strength 0.4", "--mask mask.png", "--fit crop", "--mask-blur 2"])
def test_what_is_said_of_a_source_needs_one(words, tmp_path, capsys):
    assert main(["generate", "a cat", *words.split(), "--out", str(tmp_path / "x.png")]) == 1
    assert "must be left out without a source" in capsys.readouterr().err


def test_like_draws_the_source_again_where_it_was_drawn_here(tiny_config, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    with Engine.load(tiny_config, RuntimeProfile()) as drawing:
        image = drawing.draw(ImageRequest(tiny_config, "a cat", 3))
        source = SourceImage(image.image, 0.6, image.record)
        drawing.draw(ImageRequest(tiny_config, "a red cat", 4, source)).save(first)
    assert main(["generate", "--like", str(first), "--out", str(second)]) == 0
    assert max_difference(open_image(first), open_image(second)) == 0
    assert read_record(first) == read_record(second)
    masked = str(tmp_path / "masked.png")
    with Engine.load(tiny_config, RuntimeProfile()) as drawing:
        half = Image.new("L", (64, 64))
        half.paste(255, (0, 0, 32, 64))
        drawing.draw(ImageRequest(tiny_config, "a red cat", 4, dataclasses.replace(source, mask=half))).save(masked)
    half.save(tmp_path / "half.png")
    assert main(["generate", "--like", masked, "--out", str(second)]) == 1
    assert main(["generate", "--like", masked, "--mask", str(tmp_path / "half.png"), "--out", str(second)]) == 0
    assert max_difference(open_image(masked), open_image(second)) == 0


def test_like_draws_a_refined_image_of_a_refined_image_again(tiny_config, tiny_models, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    config = tiny_config.with_(steps=4, refiner=RefinerConfig(handover=0.5))
    with Engine.load(config, RuntimeProfile()) as drawing:
        image = drawing.draw(ImageRequest(config, "a cat", 3))
        for seed, strength in ((4, 0.5), (5, 0.75)):
            source = SourceImage(image.image, strength, image.record, stage="refiner")
            image = drawing.draw(ImageRequest(config, "a red cat", seed, source))
    image.save(first)
    assert main(["generate", "--like", str(first), "--out", str(second)]) == 0
    assert max_difference(open_image(first), open_image(second)) == 0
    assert read_record(first) == read_record(second)


def test_like_takes_changes_on_top(config_file, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    assert main(["generate", "a cat", "--config", str(config_file), "--seed", "1", "--out", str(first)]) == 0
    changes = ["a dog", "--seed", "2", "--scheduler", "ddim", "--no-refiner"]
    assert main(["generate", *changes, "--like", str(first), "--out", str(second)]) == 0
    record = read_record(second)
    assert (record.prompt, record.seed, record.config.scheduler) == ("a dog", 2, "ddim")
    assert record.config.steps == 3
    assert max_difference(open_image(first), open_image(second)) > 0.01


def test_show_prints_the_record_or_the_a1111_text(config_file, out, capsys):
    assert main(["generate", "a çat", "--config", str(config_file), "--seed", "9", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["show", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == read_record(out).to_dict()
    assert main(["show", str(out), "--parameters"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a çat\nSteps: 3, Sampler: Euler, CFG scale: 5.0, Seed: 9, Size: 64x64")


FIVE = ["a cat", "a dog", "a red hat", "a blue boat", "a tree"]
REASONS = ["--why", "sharper hats", "--who", "Ada"]


def promote_command(config, slot, prompts=FIVE, *more):
    return ["promote", str(config), str(slot), *(word for p in prompts for word in ("--prompt", p)), *REASONS, *more]


@pytest.fixture
def slot(config_file, tmp_path, clean_tree):
    folder = tmp_path / "promoted" / "tiny"
    assert main(promote_command(config_file, folder, FIVE, "--seed", "5")) == 0
    return folder


def candidate(config_file, tmp_path, **changes):
    file = tmp_path / "candidate.toml"
    file.write_text(GenerationConfig.from_toml(config_file).with_(**changes).to_toml())
    return file


def test_promote_draws_the_goldens_and_writes_a_new_slot(config_file, tmp_path, capsys, monkeypatch):
    slot = tmp_path / "promoted" / "tiny"
    command = promote_command(config_file, slot, ["a cat", "a dog"], "--seed", "5")
    monkeypatch.setattr(promotion, "git_state", lambda: ("c0ffee", True))
    monkeypatch.setattr(comparison, "draw", lambda *_: pytest.fail("drawn before the tree was looked at"))
    assert main(command) == 1
    assert "clean work tree" in capsys.readouterr().err
    assert not slot.exists()
    monkeypatch.undo()
    assert main([*command, "--allow-dirty"]) == 0
    written = load_slot(slot)
    assert [golden.prompt for golden in written.goldens] == ["a cat", "a dog"]
    assert (written.evidence.why, written.evidence.who, written.evidence.seeds) == ("sharper hats", "Ada", (5,))
    printed = capsys.readouterr().out
    assert printed.startswith(f"### a new slot → `{written.config.short_digest}`")
    assert printed.endswith(f"{slot} now holds {written.config.short_digest}, with 2 golden images\n")


def test_promote_holds_the_candidate_against_what_is_served(slot, config_file, tmp_path, capsys):
    before = load_slot(slot)
    costly = candidate(config_file, tmp_path, steps=6)
    assert main(promote_command(costly, slot)) == 1
    captured = capsys.readouterr()
    assert "must pass all of its gates; failed: " in captured.err
    assert "unet_rows: at most 20 % worse with 95 % confidence (improvement -6 [-6, -6]" in captured.err
    assert "| **fail** | unet_rows" in captured.out
    assert load_slot(slot) == before
    assert main(promote_command(costly, slot, FIVE, "--gate", "unet_rows: at most 12")) == 0
    after = load_slot(slot)
    assert (after.config.steps, after.evidence.replaces) == (6, before.digest)
    assert "| `steps` | 3 | 6 |" in capsys.readouterr().out


def test_promote_takes_a_plan_and_an_image(slot, config_file, tmp_path):
    image, plan = tmp_path / "cat.png", tmp_path / "plan.toml"
    assert main(["generate", "a cat", "--config", str(config_file), "--steps", "2", "--out", str(image)]) == 0
    plan.write_text(f'prompts = {FIVE}\nseeds = [8]\ngates = ["unet_rows: better"]\ngoldens = 1\n')
    assert main(["promote", str(image), str(slot), "--plan", str(plan), *REASONS]) == 0
    promoted = load_slot(slot)
    assert (promoted.config.steps, [golden.seed for golden in promoted.goldens]) == (2, [8])


def test_promote_takes_what_a_comparison_found_before_while_it_is_true(slot, config_file, tmp_path, capsys):
    file, evidence = candidate(config_file, tmp_path, steps=2), tmp_path / "evidence.json"
    plan = comparison.ComparisonPlan(prompts=FIVE, seeds=(5,), gates=("unet_rows: better",), metrics=(), goldens=1)
    found = comparison.compare(GenerationConfig.from_toml(file), slot, plan).findings()
    command = ["promote", str(file), str(slot), "--evidence", str(evidence), *REASONS]
    for field, value in (("libraries", {"torch": "1.0"}), ("weights", {"base": "other"}), ("version", "0.0.1")):
        evidence.write_text(found.with_(**{field: value}).to_json())
        assert main(command) == 1
        assert f"the evidence is stale: its {field} are not those" in capsys.readouterr().err
    evidence.write_text("{")
    assert main(command) == 1
    assert "evidence.json must be JSON" in capsys.readouterr().err
    evidence.write_text(found.to_json())
    assert main([*command, "--seed", "7"]) == 1
    assert "--evidence says what was tried, and must come without --seed" in capsys.readouterr().err
    assert main(command) == 0
    assert load_slot(slot).config.steps == 2
    assert main(command) == 1, "the slot no longer holds what was compared"
    assert "must hold what the candidate was compared with" in capsys.readouterr().err


def test_verify_ends_with_1_and_the_reason_where_a_golden_differs(slot, capsys, monkeypatch):
    capsys.readouterr()
    assert main(["verify", str(slot)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "01-a-cat-5.png  as promoted  max-abs 0.0000, allowed 0.0000"
    assert len(printed) == 3
    monkeypatch.setattr(verifying, "ImageRequest", lambda config, *pair: ImageRequest(config.with_(steps=4), *pair))
    assert main(["verify", str(slot)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {slot} has regressed: golden 01-a-cat-5.png: the image differs by")
    assert "01-a-cat-5.png  differs" in captured.out


def test_diff_prints_what_would_change(slot, config_file, tmp_path, capsys):
    capsys.readouterr()
    file = candidate(config_file, tmp_path, steps=2)
    assert main(["diff", str(slot), str(file)]) == 0
    assert "| `steps` | 3 | 2 |" in capsys.readouterr().out
    assert main(["diff", str(slot), str(slot)]) == 0
    assert "The settings are the same." in capsys.readouterr().out
    successor = tmp_path / "successor"
    shutil.copytree(slot, successor)
    assert main(promote_command(file, successor, FIVE, "--gate", "unet_rows: better")) == 0
    capsys.readouterr()
    assert main(["diff", str(slot), str(successor)]) == 0
    assert "| pass | unet_rows: better with 95 % confidence |" in capsys.readouterr().out


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    (["--scheduler", "eular"], "scheduler must be one of euler, euler_a"),
    (["--width", "100"], "width must be a multiple of 8 from 64 to 4096 (pixels); received 100. Example: width = 256"),
    (["--height", "-8"], "height must be a multiple of 8"),
    (["--steps", "0"], "steps must be a whole number from 1 to 1000; received 0. Example: steps = 25"),
    (["--scheduler", "lcm", "--steps", "60"], "steps must be at most 50 with the scheduler lcm; received 60"),
    (["--guidance-scale", "101"], "guidance_scale must be a number from 0 to 100; received 101.0"),
    (
        ["--guidance-interval", "5", "1"],
        "guidance_interval must be two values, each a number from 0 to 1000, the first",
    ),
    (
        ["--handover", "1"],
        "refiner.handover must be a number above 0 and below 1; received 1.0. Example: refiner.handov",
    ),
    (["--no-refiner", "--handover", "0.5"], "refiner.handover must be left out where refiner is; received 0.5"),
    (["--without", "vae", "--vae", "x"], "--without vae leaves out a setting; received it with --vae, too"),
    (["--seed", "-1"], "seed must be a whole number from 0"),
    (["--model", "/nowhere"], "the base model must be a folder with the model_index.json of an SDXL pipeline"),
    (["--model", "/nowhere", "--refiner"], "refiner must be left out, since the model '/nowhere' has no refiner"),
    (["--watermark", "--width", "64"], "watermark must be false below 256x256 pixels of area"),
    (["--like", "nowhere.png"], "cannot read nowhere.png as an image"),
    (["--out", "cat.jpg"], "--out must end in .png, since only PNG carries the record; received 'cat.jpg'"),
    (["--config", "nowhere.toml"], "nowhere.toml: No such file or directory"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_ends_with_one_line_that_says_why(options, said, out, capsys):
    assert main(["generate", "a cat", "--out", str(out), *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not out.exists()


def test_a_missing_prompt_is_asked_for(out, capsys):
    assert main(["generate", "--out", str(out)]) == 1
    assert "prompt must be given, or taken from an image with --like; received None" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "generate --out x.png --like"])
def test_a_image_without_a_record_is_refused(tmp_path, capsys, command):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png")
    assert main([*command.split(), str(tmp_path / "theirs.png")]) == 1
    assert "theirs.png carries no sdxl_lab record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["paint"],
        ["generate", "a cat"],
        ["generate", "--seed", "x", "--out", "y"],
        ["generate", "--steps", "many", "--out", "y"],
        ["generate", "--crop", "8", "--out", "y"],
        ["generate", "--without", "steps", "--out", "y"],
    ],
    ids=" ".join,
)
def test_a_command_that_does_not_parse_exits_with_the_usage(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "usage: python -m sdxl_lab" in capsys.readouterr().err


def test_like_config_and_model_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a", "--out", "x.png", "--like", "y.png", "--model", "nano"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_with_the_reason(out, capsys, monkeypatch):
    def broken(*_):
        raise ModelError("the base model is broken")

    monkeypatch.setattr(engine, "load", broken)
    assert main(["generate", "a cat", "--out", str(out)]) == 1
    assert capsys.readouterr().err == "error: the base model is broken\n"


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_within_a_step_and_writes_nothing(config_file, out, capsys, monkeypatch):
    calls, predict = [], Engine._predict

    def interrupting(self, name, inputs):
        calls.append(name)
        if len(calls) == 2:
            _thread.interrupt_main()
            time.sleep(0.5)  # the main thread looks every 0.05 s
        return predict(self, name, inputs)

    monkeypatch.setattr(Engine, "_predict", interrupting)
    command = ["generate", "a cat", "--config", str(config_file), "--steps", "500", "--out", str(out)]
    assert main(command) == STOPPED == 130
    assert capsys.readouterr().err == "stopped\n"
    assert len(calls) <= 3
    assert not out.exists()


NOISY = """
import sys
from sdxl_lab import cli
from sdxl_lab.diffusion.engine import Engine
predict = Engine._predict
def told(self, name, inputs):
    print("step", flush=True)
    return predict(self, name, inputs)
Engine._predict = told
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_a_sigint_from_the_shell_ends_the_program_with_130(config_file, out):
    command = [sys.executable, "-c", NOISY, "generate", "a cat", "--config", str(config_file), "--steps", "1000"]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        for _ in range(3):
            assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == STOPPED, errors
    assert errors.endswith("stopped\n")
    assert output.count("step") < 100
    assert not out.exists()


@pytest.mark.slow
def test_the_module_runs_as_a_program():
    answer = subprocess.run([sys.executable, "-m", "sdxl_lab", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0
    assert answer.stdout.strip() == cli.__version__


def test_both_prompts_come_from_an_image_unless_one_is_new(config_file, tmp_path, capsys):
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    assert main(["generate", "a cat", "--prompt-2", "a dog", "--config", str(config_file), "--out", str(first)]) == 0
    assert main(["generate", "--like", str(first), "--out", str(again)]) == 0
    assert main(["generate", "a boat", "--like", str(first), "--out", str(other)]) == 0
    said = [(record.prompt, record.prompt_2) for record in map(read_record, (first, again, other))]
    assert said == [("a cat", "a dog"), ("a cat", "a dog"), ("a boat", None)]
    assert read_record(first) == read_record(again)
    assert capsys.readouterr().out.splitlines()[-1].endswith("2 of 75 tokens")


def test_what_is_cut_is_told(config_file, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert main(["generate", "cat " * 75 + "red hat", "--config", str(config_file), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("warning: prompt: the text encoders read 75 of its 77 tokens and cut 'red hat'")
    assert told.out.strip().endswith("77 of 75 tokens")
    options = ["--prompt-syntax", "a1111", "--config", str(config_file), "--out", str(out)]
    assert main(["generate", "cat " * 80, *options]) == 0
    told = capsys.readouterr()
    assert not told.err
    assert told.out.strip().endswith("80 tokens")
