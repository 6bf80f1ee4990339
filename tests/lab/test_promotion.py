"""A slot holds one configuration, what it was judged on, and its pictures: all of it, or what was there before."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from sdxl_lab import promotion
from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.images import Picture
from sdxl_lab.promotion import SlotError, compare_golden, load_slot, promote

CONFIG, OTHER = GenerationConfig(), GenerationConfig(steps=7)


def picture(
    config: GenerationConfig = CONFIG, prompt: str = "A cat in a hat", seed: int = 7, colour=(255, 0, 0), **more
) -> Picture:
    record = {
        "version": "0.1.0",
        "prompt": prompt,
        "seed": seed,
        "sampler": "Euler",
        "config": config.to_dict(),
        "digest": config.digest,
        "weights": {"base": "sha256 abc"},
        "runtime": {"device": "cpu"},
        "libraries": {"torch": "2.13.0"},
    }
    return Picture(Image.new("RGB", (8, 8), colour), record | more, {})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def clean_tree(monkeypatch):
    monkeypatch.setattr(promotion, "git_state", lambda: ("c0ffee", False))


@pytest.fixture
def slot(tmp_path):
    return tmp_path / "promoted" / "slot"


def put(slot: Path, config: GenerationConfig = CONFIG, **more):
    return promote(config, slot, **({"pictures": [picture(config)], "why": "sharper hats", "who": "Ada"} | more))


def test_a_promotion_writes_the_whole_slot(slot):
    pictures = [picture(), picture(prompt="red circle", seed=8)]
    written = put(slot, pictures=pictures, metrics={"clip": 0.31})
    assert written == load_slot(slot)
    assert written.config == CONFIG
    assert [golden.prompt for golden in written.goldens] == ["A cat in a hat", "red circle"]
    evidence = written.evidence
    when = evidence.pop("when")
    assert when.endswith("+00:00")
    assert evidence == {
        "digest": CONFIG.digest,
        "replaces": None,
        "who": "Ada",
        "why": "sharper hats",
        "commit": "c0ffee",
        "dirty": False,
        "version": "0.1.0",
        "weights": {"base": "sha256 abc"},
        "runtime": {"device": "cpu"},
        "libraries": {"torch": "2.13.0"},
        "metrics": {"clip": 0.31},
        "goldens": [
            {"file": written.goldens[0].path.name, "prompt": "A cat in a hat", "seed": 7},
            {"file": written.goldens[1].path.name, "prompt": "red circle", "seed": 8},
        ],
    }


def test_a_second_promotion_replaces_the_first_and_says_so(slot):
    put(slot, pictures=[picture(seed=seed) for seed in range(3)])
    second = put(slot, OTHER)
    assert second.evidence["replaces"] == CONFIG.digest
    assert second.config == OTHER
    assert len(second.goldens) == 1
    assert [path.name for path in slot.parent.iterdir()] == ["slot"], "no scratch is left"


@pytest.mark.parametrize(
    "prompts", [["a cat!", "a cat?"], ["x" * 70 + "a", "x" * 70 + "b"], ["/../a", "...a"], ["猫", "!"]]
)
def test_goldens_with_prompts_that_look_alike_are_all_kept(slot, prompts):
    written = put(slot, pictures=[picture(prompt=prompt) for prompt in prompts])
    assert [golden.prompt for golden in written.goldens] == prompts
    assert {golden.path.parent for golden in written.goldens} == {slot / "golden"}


REFUSED = [
    ({"pictures": [picture(OTHER)]}, f"every golden must be drawn with the configuration promoted, {CONFIG.digest}"),
    ({"pictures": [picture(), picture(OTHER)]}, OTHER.digest),
    ({"pictures": []}, "at least one picture and a reason"),
    ({"why": ""}, "at least one picture and a reason. Example: why='sharper hats'"),
    ({"why": " \n"}, "at least one picture and a reason"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_promotion_without_its_evidence_is_refused(slot, asked, said):
    with pytest.raises(SlotError) as caught:
        put(slot, **asked)
    assert said in str(caught.value)
    assert not slot.exists()


def test_a_dirty_tree_is_refused_unless_allowed(slot, monkeypatch):
    monkeypatch.setattr(promotion, "git_state", lambda: ("c0ffee", True))
    with pytest.raises(SlotError, match=r"clean work tree.*allow_dirty=True"):
        put(slot)
    assert not slot.exists()
    assert put(slot, allow_dirty=True).evidence["dirty"] is True


@pytest.mark.parametrize("failing", ["save", "first rename", "second rename"])
def test_a_promotion_that_fails_midway_leaves_the_old_slot_whole(slot, monkeypatch, failing):
    put(slot)
    before, renames, rename = contents(slot), [], Path.rename

    def full(*_):
        raise OSError(28, "No space left on device")

    def fails_once(self, target):
        renames.append(self)
        return full() if len(renames) == (1 if failing == "first rename" else 2) else rename(self, target)

    if failing == "save":
        monkeypatch.setattr(Picture, "save", full)
    else:
        monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="No space left"):
        put(slot, OTHER)
    assert contents(slot) == before
    assert load_slot(slot).config == CONFIG
    assert [path.name for path in slot.parent.iterdir()] == ["slot"]


# --- reading a slot --------------------------------------------------------------------------------------------------


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
    assert mended.evidence["replaces"] == OTHER.digest


def test_a_slot_without_evidence_says_so(slot):
    put(slot)
    (slot / "evidence.json").unlink()
    assert load_slot(slot).evidence is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"a word"', "null"])
def test_evidence_that_names_no_digest_is_refused(slot, text):
    put(slot)
    (slot / "evidence.json").write_text(text)
    with pytest.raises(SlotError, match=r"evidence\.json must be JSON with the digest it speaks of"):
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


# --- goldens ---------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def redraw(path: Path, **changes) -> None:
    picture(**changes).save(path)


DAMAGE = [
    (remove, "01-a-cat-in-a-hat-7.png is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:50]), "must be a picture as it was promoted"),
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


@pytest.mark.parametrize("listed", [[{"file": "a.png", "seed": 7}], ["a.png"], 5], ids=str)
def test_goldens_that_are_not_listed_with_file_prompt_and_seed_are_refused(slot, listed):
    put(slot)
    evidence = json.loads((slot / "evidence.json").read_text()) | {"goldens": listed}
    (slot / "evidence.json").write_text(json.dumps(evidence))
    with pytest.raises(SlotError, match="must list its goldens with file, prompt and seed"):
        load_slot(slot).goldens  # noqa: B018


def test_a_slot_without_evidence_has_no_goldens(slot):
    put(slot)
    (slot / "evidence.json").unlink()
    assert load_slot(slot).goldens == []


COMPARED = [
    ({}, "max-abs", 0.0, None),
    ({"colour": (254, 0, 0)}, "max-abs", 1 / 255, None),
    ({"colour": (253, 0, 0)}, "max-abs", 2 / 255, "the picture differs by 0.0078 (max-abs on [0, 1]); at most 0.0039"),
    ({"colour": (240, 0, 0), "runtime": {"device": "cuda"}}, "mean-abs", 5 / 255, None),
    ({"colour": (239, 0, 0), "runtime": {"device": "cuda"}}, "mean-abs", 16 / 3 / 255, "differs by 0.0209 (mean-abs"),
    (
        {"weights": {"base": "sha256 def"}},
        "max-abs",
        0.0,
        "the weights are not those it was promoted with: base was sha256 abc, is sha256 def",
    ),
]


@pytest.mark.parametrize(("changes", "measure", "difference", "said"), COMPARED)
def test_a_golden_is_compared_as_strictly_as_the_runtime_allows(slot, changes, measure, difference, said):
    found = compare_golden(put(slot).goldens[0], picture(**changes))
    assert (found.measure, found.difference) == (measure, pytest.approx(difference))
    assert found.passed == (said is None)
    if said:
        assert found.reason.startswith("golden 01-a-cat-in-a-hat-7.png: ")
        assert said in found.reason


def test_a_picture_of_another_size_is_another_picture(slot):
    bigger = picture()
    bigger = Picture(bigger.image.resize((16, 16)), bigger.record, {})
    assert not compare_golden(put(slot).goldens[0], bigger).passed


# --- git -------------------------------------------------------------------------------------------------------------


def test_the_state_of_the_tree_is_read_from_git(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(promotion, "__file__", str(tmp_path / "promotion.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert promotion.git_state() == (None, False)

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        command = ["git", *names, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    assert promotion.git_state() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("two")
    assert promotion.git_state() == (git("rev-parse", "HEAD"), True)


def test_the_evidence_is_readable_json(slot):
    put(slot)
    text = (slot / "evidence.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
