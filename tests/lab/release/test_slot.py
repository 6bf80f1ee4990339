"""A slot is read whole: one configuration, its limits, its evidence, and goldens that are of them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig, ServingLimits
from sdxl_lab.release.slot import SlotError, load_slot
from tests.made import image, put

CONFIG, OTHER = GenerationConfig(), GenerationConfig(steps=7)


def test_a_slot_whose_evidence_speaks_of_another_digest_is_refused(slot):
    put(slot)
    (slot / "config.toml").write_text(OTHER.to_toml())
    with pytest.raises(SlotError) as caught:
        load_slot(slot)
    for said in (str(slot), OTHER.digest, CONFIG.digest, "Promote again, or restore the slot from git"):
        assert said in str(caught.value)


def test_promoting_again_mends_a_slot_that_does_not_match(slot):
    put(slot)
    (slot / "config.toml").write_text(OTHER.to_toml())
    mended = put(slot)
    assert mended.digest == CONFIG.digest
    assert mended.evidence.replaces == OTHER.digest


def test_a_slot_without_evidence_says_so(slot):
    put(slot)
    (slot / "evidence.json").unlink()
    assert load_slot(slot).evidence is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"a word"', "null"])
def test_evidence_that_names_no_digest_is_refused(slot, text):
    put(slot)
    (slot / "evidence.json").write_text(text)
    with pytest.raises(SlotError, match=r"evidence of .*evidence\.json"):
        load_slot(slot)


def test_a_folder_without_a_configuration_is_no_slot(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SlotError, match=r"must be a folder with a config\.toml; .* Example: service/promoted/nano"):
            load_slot(folder)


def test_a_configuration_edited_into_nonsense_is_refused(slot):
    put(slot)
    (slot / "config.toml").write_text("steps = 0")
    with pytest.raises(ConfigError, match="steps must be a whole number"):
        load_slot(slot)


def remove(path: Path) -> None:
    path.unlink()


def redraw(path: Path, **changes) -> None:
    image(**changes).save(path)


DAMAGE = [
    (remove, "01-a-cat-in-a-hat-7.png is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:50]), "must be an image as it was promoted"),
    (lambda path: Image.new("RGB", (8, 8)).save(path), "carries no"),
    (lambda path: redraw(path, config=OTHER), f"must have the digest '{CONFIG.digest}' of its slot; received"),
    (lambda path: redraw(path, prompt="A dog"), "must have the prompt 'A cat in a hat' of its slot; received 'A dog'"),
    (lambda path: redraw(path, seed=8), "must have the seed 7 of its slot; received 8"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[said for _, said in DAMAGE])
def test_a_golden_that_is_not_what_was_promoted_is_refused(slot, damage, said):
    damage(put(slot).goldens[0].path)
    with pytest.raises(SlotError) as caught:
        load_slot(slot).goldens  # noqa: B018
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png"])
def test_goldens_outside_of_the_slot_are_refused(slot, name):
    put(slot)
    evidence = json.loads((slot / "evidence.json").read_text())
    evidence["goldens"][0]["file"] = name
    (slot / "evidence.json").write_text(json.dumps(evidence))
    with pytest.raises(SlotError, match=r"a golden must be a file of .*golden; received"):
        load_slot(slot).goldens  # noqa: B018


@pytest.mark.parametrize("listed", [[{"file": "a.png", "seed": 7}], ["a.png"], 5], ids=str)
def test_goldens_that_are_not_listed_with_file_prompt_and_seed_are_refused(slot, listed):
    put(slot)
    evidence = json.loads((slot / "evidence.json").read_text()) | {"goldens": listed}
    (slot / "evidence.json").write_text(json.dumps(evidence))
    with pytest.raises(SlotError, match=r"evidence\.json is damaged: (goldens|it lacks goldens)"):
        load_slot(slot).goldens  # noqa: B018


def test_a_slot_without_evidence_has_no_goldens(slot):
    put(slot)
    (slot / "evidence.json").unlink()
    assert load_slot(slot).goldens == []


def test_the_evidence_is_readable_json(slot):
    put(slot)
    text = (slot / "evidence.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


LIMITS = ServingLimits(steps=(2, 20))


def test_what_clients_may_ask_for_lies_beside_the_configuration_and_changes_no_digest(slot):
    before = put(slot).digest
    (slot / "serving.toml").write_text(LIMITS.to_toml())
    assert (load_slot(slot).limits, load_slot(slot).digest) == (LIMITS, before)


def test_a_slot_without_limits_has_those_that_go_with_its_model(slot):
    put(slot)
    (slot / "serving.toml").unlink()
    assert load_slot(slot).limits == ServingLimits.for_model(CONFIG.model)


def test_limits_that_break_a_rule_are_refused(slot):
    put(slot)
    (slot / "serving.toml").write_text("steps = [20, 2]")
    with pytest.raises(ConfigError, match="steps must be"):
        load_slot(slot)
