"""A slot holds one configuration, what it was judged on, and its images: all of it, or what was there before."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.images import GeneratedImage
from sdxl_lab.release import slot as promotion
from sdxl_lab.release.slot import EVIDENCE_FIELDS, SlotError, compare_golden, load_slot, promote, read_evidence, served

ROOT = Path(__file__).parents[3]
CONFIG, OTHER = GenerationConfig(), GenerationConfig(steps=7)


def image(
    config: GenerationConfig = CONFIG, prompt: str = "A cat in a hat", seed: int = 7, colour=(255, 0, 0), **more
) -> GeneratedImage:
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
    return GeneratedImage(Image.new("RGB", (8, 8), colour), record | more, {})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def clean_tree(monkeypatch):
    monkeypatch.setattr(promotion, "git_state", lambda: ("c0ffee", False))


@pytest.fixture
def slot(tmp_path):
    return tmp_path / "promoted" / "slot"


def evidence(config: GenerationConfig = CONFIG, replaces: GenerationConfig | None = None, **more) -> dict[str, Any]:
    """What a comparison says of a candidate that passed."""
    said = {
        "digest": config.digest,
        "replaces": replaces.digest if replaces else None,
        "prompts": ["A cat in a hat"],
        "seeds": [7],
        "clip": "nano",
        "metrics": {"clip_score": {"better": "higher", "candidate": {"mean": 70.0}, "served": None}},
        "gates": [{"gate": "clip_score: at least 60", "passed": True, "figures": "70 [68, 72], limit 60"}],
        "weights": {"base": "sha256 abc"},
        "runtime": {"device": "cpu"},
        "libraries": {"torch": "2.13.0"},
        "version": "0.1.0",
        "dirty": False,
        "goldens": [{"prompt": "A cat in a hat", "seed": 7}],
    }
    return said | more


def put(slot: Path, config: GenerationConfig = CONFIG, **more):
    """Promote, over whatever the slot holds."""
    asked = {"images": [image(config)], "why": "sharper hats", "who": "Ada", "evidence": evidence(config, served(slot))}
    return promote(config, slot, **(asked | more))


def test_a_promotion_writes_the_whole_slot(slot):
    images = [image(), image(prompt="red circle", seed=8)]
    written = put(slot, images=images)
    assert written == load_slot(slot)
    assert written.config == CONFIG
    assert [golden.prompt for golden in written.goldens] == ["A cat in a hat", "red circle"]
    kept = written.evidence
    when = kept.pop("when")
    assert when.endswith("+00:00")
    assert kept == {
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
        **{name: evidence()[name] for name in ("prompts", "seeds", "clip", "metrics", "gates")},
        "model": {"base": "nano", "refiner": "nano"},
        "goldens": [
            {"file": written.goldens[0].path.name, "prompt": "A cat in a hat", "seed": 7},
            {"file": written.goldens[1].path.name, "prompt": "red circle", "seed": 8},
        ],
    }


def test_a_second_promotion_replaces_the_first_and_says_so(slot):
    put(slot, images=[image(seed=seed) for seed in range(3)])
    second = put(slot, OTHER)
    assert second.evidence["replaces"] == CONFIG.digest
    assert second.config == OTHER
    assert len(second.goldens) == 1
    assert sorted(path.name for path in slot.parent.iterdir()) == [".replaced", "slot"], "no scratch is left"


@pytest.mark.parametrize(
    "prompts", [["a cat!", "a cat?"], ["x" * 70 + "a", "x" * 70 + "b"], ["/../a", "...a"], ["猫", "!"]]
)
def test_goldens_with_prompts_that_look_alike_are_all_kept(slot, prompts):
    written = put(slot, images=[image(prompt=prompt) for prompt in prompts])
    assert [golden.prompt for golden in written.goldens] == prompts
    assert {golden.path.parent for golden in written.goldens} == {slot / "golden"}


REFUSED = [
    ({"images": [image(OTHER)]}, f"every golden must be drawn with the configuration promoted, {CONFIG.digest}"),
    ({"images": [image(), image(OTHER)]}, OTHER.digest),
    ({"images": []}, "at least one image and a reason"),
    ({"why": ""}, "at least one image and a reason. Example: why='sharper hats'"),
    ({"why": " \n"}, "at least one image and a reason"),
    (
        {"images": [image(), image(seed=8, weights={"base": "sha256 def"})]},
        "('A cat in a hat', seed 8) is of another model: base was sha256 abc, is sha256 def",
    ),
    (
        {"evidence": evidence(OTHER)},
        f"evidence must speak of the configuration promoted, {CONFIG.digest}; received evidence of '{OTHER.digest}'",
    ),
    (
        {"evidence": evidence(weights={"base": "sha256 old"})},
        "stale: its weights are not those the goldens are drawn with",
    ),
    (
        {"evidence": evidence(libraries={"torch": "2.12.0"})},
        "its libraries are not those the goldens are drawn with: torch",
    ),
    ({"evidence": evidence(version="0.0.9")}, "version was 0.0.9, is 0.1.0. Try the candidate against the slot again"),
    (
        {"evidence": evidence(gates=[{"gate": "clip_score: better", "passed": False, "figures": "-2 [-3, -1]"}])},
        "must pass all of its gates; failed: clip_score: better (-2 [-3, -1])",
    ),
    ({"evidence": evidence(gates="passed")}, "must say of each gate whether it passed; received 'passed'"),
    ({"evidence": evidence(dirty=True)}, "clean work tree"),
    ({"evidence": evidence(replaces=OTHER)}, f"compared with, {OTHER.digest}; it holds nothing"),
    ({"evidence": {"digest": CONFIG.digest}}, "it lacks replaces, prompts, seeds"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED, ids=[said for _, said in REFUSED])
@pytest.mark.parametrize("before", [None, OTHER], ids=["a new slot", "a slot in use"])
def test_a_promotion_without_its_evidence_is_refused(slot, asked, said, before):
    if before:
        put(slot, before)
        if "replaces" in asked.get("evidence", {}):
            asked, said = (
                asked | {"evidence": asked["evidence"] | {"replaces": CONFIG.digest}},
                said.replace(f"{OTHER.digest}; it holds nothing", f"{CONFIG.digest}; it holds {OTHER.digest}"),
            )
    contents_before = contents(slot)
    with pytest.raises(SlotError) as caught:
        put(slot, **asked)
    assert said in str(caught.value)
    assert contents(slot) == contents_before


def test_what_is_served_is_replaced_only_on_evidence_against_it(slot):
    put(slot)
    with pytest.raises(SlotError, match=f"compared with, nothing; it holds {CONFIG.digest}"):
        put(slot, OTHER, evidence=None)
    assert load_slot(slot).config == CONFIG


def test_a_new_slot_can_do_without_a_trial(slot):
    assert put(slot, evidence=None).evidence["replaces"] is None


@pytest.mark.parametrize("field", EVIDENCE_FIELDS)
def test_a_file_that_says_less_than_a_comparison_is_no_evidence(tmp_path, field):
    path = tmp_path / "evidence.json"
    path.write_text(json.dumps(evidence()))
    assert read_evidence(path) == evidence()
    path.write_text(json.dumps({name: value for name, value in evidence().items() if name != field}))
    with pytest.raises(SlotError, match=field):
        read_evidence(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\x00", None], ids=repr)
def test_corrupt_evidence_is_refused(tmp_path, content):
    path = tmp_path / "evidence.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SlotError, match=r"evidence\.json must be JSON with the digest it speaks of"):
        read_evidence(path)


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
        monkeypatch.setattr(GeneratedImage, "save", full)
    else:
        monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="No space left"):
        put(slot, OTHER)
    assert contents(slot) == before
    assert load_slot(slot).config == CONFIG
    assert [path.name for path in slot.parent.iterdir() if path.name != ".replaced"] == ["slot"]
    assert not list(slot.parent.glob(".replaced/*"))


PROMOTING = """
import sys
from pathlib import Path
from PIL import Image
sys.path.insert(0, {tests!r})
import test_slot as tests
from sdxl_lab.release import slot as promotion
from sdxl_lab.release.slot import promote
promotion.git_state = lambda: ("c0ffee", False)
slot, steps = Path(sys.argv[1]), int(sys.argv[2])
config = tests.GenerationConfig(steps=steps)
compared = promotion.served(slot)
print("compared", flush=True)
sys.stdin.readline()
try:
    tests.promote(config, slot, images=[tests.image(config, seed=s) for s in range(20)], why="w", who=sys.argv[2],
                  evidence=tests.evidence(config, compared))
    print("promoted", flush=True)
except promotion.SlotError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("held", [None, CONFIG], ids=["a new slot", "a slot in use"])
def test_of_promotions_at_the_same_time_one_wins_and_the_others_are_told(slot, held):
    """Processes that compared with the same slot and then promote at once: none may be lost without a word."""
    slot.parent.mkdir(parents=True)
    if held:
        put(slot, held)
    command = [sys.executable, "-c", PROMOTING.format(tests=str(Path(__file__).parent)), str(slot)]
    processes = [
        subprocess.Popen([*command, str(steps)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for steps in (11, 12, 13)
    ]
    for process in processes:
        assert process.stdout.readline() == "compared\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said.count("promoted") == 1, said
    winner = load_slot(slot)
    assert winner.config.steps == 11 + said.index("promoted")
    assert winner.evidence["who"] == str(winner.config.steps)
    assert len(winner.goldens) == 20
    lost = [words for words in said if words != "promoted"]
    expected = f"compared with, {held.digest if held else 'nothing'}; it holds {winner.digest}"
    assert all(expected in words for words in lost), lost
    left = {path.name for path in slot.parent.iterdir()} - {".replaced"}
    assert left == {"slot"}, "neither scratch nor a lock is left"


def test_promotions_wait_for_one_another(slot, monkeypatch):
    """What a slot holds is looked at only when nobody else is writing."""
    import fcntl
    import os

    slot.parent.mkdir(parents=True)
    tried = []

    def looked(folder):
        handle = os.open(folder.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        tried.append(folder)

    monkeypatch.setattr(promotion, "served", looked)
    promote(CONFIG, slot, images=[image()], why="w", who="Ada")
    assert tried == [slot]


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


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", 7])
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
    with pytest.raises(SlotError, match="must list its goldens with file, prompt and seed"):
        load_slot(slot).goldens  # noqa: B018


def test_a_slot_without_evidence_has_no_goldens(slot):
    put(slot)
    (slot / "evidence.json").unlink()
    assert load_slot(slot).goldens == []


COMPARED = [
    ({}, "max-abs", 0.0, None),
    ({"colour": (254, 0, 0)}, "max-abs", 1 / 255, None),
    ({"colour": (253, 0, 0)}, "max-abs", 2 / 255, "the image differs by 0.0078 (max-abs on [0, 1]); at most 0.0039"),
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
    found = compare_golden(put(slot).goldens[0], image(**changes))
    assert (found.measure, found.difference) == (measure, pytest.approx(difference))
    assert found.passed == (said is None)
    if said:
        assert found.reason.startswith("golden 01-a-cat-in-a-hat-7.png: ")
        assert said in found.reason


def test_a_image_of_another_size_is_another_image(slot):
    bigger = image()
    bigger = GeneratedImage(bigger.image.resize((16, 16)), bigger.record, {})
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


def not_a_slot(tmp_path: Path, kind: str) -> Path:
    """What somebody may name as SLOT by mistake."""
    place = tmp_path / "place"
    if kind == "a file":
        place.write_text("# Read me")
        return place
    place.mkdir()
    if kind == "a folder with notes":
        (place / "notes.md").write_text("three weeks of work")
    elif kind == "a folder of slots":
        put(place / "nano")
    elif kind == "another program's config.toml":
        (place / "config.toml").write_text('baseURL = "https://example.org"')
    else:
        put(place)
        (place / "notes.md").write_text("why these hats")
    return place


@pytest.mark.parametrize(
    "kind",
    [
        "a file",
        "a folder with notes",
        "a folder of slots",
        "another program's config.toml",
        "a slot with a file of somebody's",
    ],
)
def test_a_promotion_touches_nothing_that_is_no_slot(kind, tmp_path):
    place = not_a_slot(tmp_path, kind)
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SlotError, match="may only write to a path where nothing is, an empty folder, or a slot"):
        served(place)
    with pytest.raises(SlotError, match="may only write to a path where nothing is, an empty folder, or a slot"):
        promote(CONFIG, place, images=[image()], why="x", who="x", allow_dirty=True)
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_becomes_a_slot(slot):
    slot.mkdir(parents=True)
    assert put(slot).digest == CONFIG.digest


def test_what_a_slot_held_can_be_brought_back(slot):
    put(slot)
    before = contents(slot)
    put(slot, OTHER, evidence=evidence(OTHER, CONFIG))
    put(slot, CONFIG, evidence=evidence(CONFIG, OTHER))
    first, second = sorted((slot.parent / ".replaced").iterdir())
    assert contents(first) == before
    assert load_slot(first).digest == CONFIG.digest
    assert load_slot(second).digest == OTHER.digest


def test_a_link_to_a_slot_stays_a_link(slot, tmp_path):
    put(slot)
    link = tmp_path / "current"
    link.symlink_to(slot)
    put(link, OTHER, evidence=evidence(OTHER, CONFIG))
    assert link.is_symlink()
    assert load_slot(slot).digest == OTHER.digest
