"""A promotion writes a whole slot, or leaves what was there; and touches nothing that is no slot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab.config import GenerationConfig, ModelRef, ServingLimits
from sdxl_lab.diffusion.lora_files import pinned
from sdxl_lab.images import GeneratedImage
from sdxl_lab.release import promote as promotion
from sdxl_lab.release.promote import promote, read_findings
from sdxl_lab.release.records import Findings
from sdxl_lab.release.slot import SlotError, load_slot, slot_config
from tests.made import findings, image, put

ROOT = Path(__file__).parents[3]
CONFIG, OTHER = GenerationConfig(), GenerationConfig(steps=7)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_promotion_writes_the_whole_slot(slot):
    images = [image(), image(prompt="red circle", seed=8)]
    written = put(slot, images=images)
    assert written == load_slot(slot)
    assert written.config == CONFIG
    assert [golden.prompt for golden in written.goldens] == ["A cat in a hat", "red circle"]
    evidence = written.evidence
    assert evidence.when.endswith("+00:00")
    assert evidence.to_dict() == {
        "schema": 1,
        "digest": CONFIG.digest,
        "who": "Ada",
        "why": "sharper hats",
        "when": evidence.when,
        "commit": "c0ffee",
        "dirty": False,
        "version": "0.1.0",
        "weights": {"base": "sha256 abc"},
        "runtime": {"device": "cpu", "dtype": "float32"},
        "libraries": {"torch": "2.13.0"},
        **{name: findings().to_dict()[name] for name in ("prompts", "seeds", "clip", "metrics", "gates", "machine")},
        "model": {"base": "nano", "refiner": "nano"},
        "limits": ServingLimits().to_dict(),
        "goldens": [
            {"file": written.goldens[0].path.name, "prompt": "A cat in a hat", "seed": 7},
            {"file": written.goldens[1].path.name, "prompt": "red circle", "seed": 8},
        ],
    }


def test_a_second_promotion_replaces_the_first_and_says_so(slot):
    put(slot, images=[image(seed=seed) for seed in range(3)])
    second = put(slot, OTHER)
    assert second.evidence.replaces == CONFIG.digest
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
        {"findings": findings(OTHER)},
        f"evidence must speak of the configuration promoted, {CONFIG.digest}; received evidence of '{OTHER.digest}'",
    ),
    (
        {"findings": findings(weights={"base": "sha256 old"})},
        "stale: its weights are not those the goldens are drawn with",
    ),
    (
        {"findings": findings(libraries={"torch": "2.12.0"})},
        "its libraries are not those the goldens are drawn with: torch",
    ),
    ({"findings": findings(version="0.0.9")}, "version was 0.0.9, is 0.1.0. Compare the candidate with the slot again"),
    (
        {"findings": findings(gates=[{"gate": "clip_score: better", "passed": False, "figures": "-2 [-3, -1]"}])},
        "must pass all of its gates; failed: clip_score: better (-2 [-3, -1])",
    ),
    ({"findings": findings(dirty=True)}, "clean work tree"),
    ({"findings": findings(replaces=OTHER)}, f"compared with, {OTHER.digest}; it holds nothing"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED, ids=[said for _, said in REFUSED])
@pytest.mark.parametrize("before", [None, OTHER], ids=["a new slot", "a slot in use"])
def test_a_promotion_without_its_evidence_is_refused(slot, asked, said, before):
    if before:
        put(slot, before)
        if "findings" in asked and asked["findings"].replaces:
            asked = {"findings": asked["findings"].with_(replaces=CONFIG.digest)}
            said = said.replace(f"{OTHER.digest}; it holds nothing", f"{CONFIG.digest}; it holds {OTHER.digest}")
    contents_before = contents(slot)
    with pytest.raises(SlotError) as caught:
        put(slot, **asked)
    assert said in str(caught.value)
    assert contents(slot) == contents_before


def test_what_is_served_is_replaced_only_on_evidence_against_it(slot):
    put(slot)
    with pytest.raises(SlotError, match=f"compared with, nothing; it holds {CONFIG.digest}"):
        put(slot, OTHER, findings=None)
    assert load_slot(slot).config == CONFIG


def test_a_new_slot_can_do_without_a_trial(slot):
    assert put(slot, findings=None).evidence.replaces is None


REQUIRED = [name for name, field in Findings.model_fields.items() if field.is_required()]


@pytest.mark.parametrize("field", REQUIRED)
def test_a_file_that_says_less_than_a_comparison_is_no_evidence(tmp_path, field):
    path = tmp_path / "evidence.json"
    path.write_text(findings().to_json())
    assert read_findings(path) == findings()
    path.write_text(json.dumps({name: value for name, value in findings().to_dict().items() if name != field}))
    with pytest.raises(SlotError, match=f"it lacks {field}"):
        read_findings(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\x00", None], ids=repr)
def test_corrupt_evidence_is_refused(tmp_path, content):
    path = tmp_path / "evidence.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SlotError, match=r"evidence\.json"):
        read_findings(path)


def test_a_promotion_carries_the_limits_on(slot):
    limits = ServingLimits(steps=(2, 20), side=(128, 256))
    put(slot)
    (slot / "serving.toml").write_text(limits.to_toml())
    written = put(slot, OTHER)
    assert written.limits == written.evidence.limits == limits


def test_a_new_slot_gets_the_limits_that_go_with_its_model(slot):
    other = GenerationConfig(model=ModelRef(base="some/model"))
    assert put(slot).limits == ServingLimits()
    assert put(slot.with_name("other"), other).limits == ServingLimits(side=(512, 1536))


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "mine" / "outlines.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"the promoted one")
    return path


def test_a_slot_carries_its_loras_and_those_that_it_offers(slot, lora):
    other = lora.with_name("other") / lora.name  # of the same name
    other.parent.mkdir()
    other.write_bytes(b"an offered one")
    config = pinned(CONFIG.with_(loras=[f"{lora}:0.6", "nano/neon:0.1"]))
    put(slot)
    (slot / "serving.toml").write_text(ServingLimits(loras=[{"name": "other", "source": str(other)}]).to_toml())
    written = put(slot, config)
    lora.unlink()
    other.unlink()
    assert written == load_slot(slot)
    assert written.digest == config.digest
    first, second = written.config.loras
    assert (Path(first.source).parent, Path(first.source).read_bytes()) == (slot / "loras", b"the promoted one")
    assert second == config.loras[1], "nano's own comes with nano"
    (offered,) = written.limits.loras
    assert (Path(offered.source).read_bytes(), offered.name) == (b"an offered one", "other")
    assert str(lora.parent) not in "".join(path.read_text() for path in slot.glob("*.*"))
    again = put(slot, written.config.with_(steps=7))
    assert Path(again.config.loras[0].source).read_bytes() == b"the promoted one"
    assert Path(again.limits.loras[0].source).read_bytes() == b"an offered one"


def test_a_large_lora_stays_where_it_is(slot, lora, monkeypatch):
    monkeypatch.setattr(promotion, "CARRIED", 4)
    config = pinned(CONFIG.with_(loras=[str(lora)]))
    assert put(slot, config).config == config
    assert not (slot / "loras").exists()


def test_a_lora_of_the_hub_stays_pinned(slot):
    config = CONFIG.with_(loras=[f"an/id@{'0a' * 20}/a.safetensors"])
    assert put(slot, config).config == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config, lora: config.with_(loras=[str(lora)]), "must have the sha256 of its file"),
        (lambda config, lora: lora.write_bytes(b"another") and config, "must have the sha256 of its file"),
        (lambda config, lora: lora.unlink() or config, "LoRAs must be there: .*which is not there"),
    ],
    ids=["without its sha256", "another file", "gone"],
)
def test_a_lora_that_is_not_the_one_that_was_tried_is_not_promoted(slot, lora, change, said):
    config = change(pinned(CONFIG.with_(loras=[str(lora)])), lora)
    with pytest.raises(SlotError, match=said):
        put(slot, config)
    assert not slot.exists()


def test_damaged_limits_are_not_carried_on(slot):
    put(slot)
    (slot / "serving.toml").write_text("steps = [0, 1]")
    before = contents(slot)
    with pytest.raises(SlotError, match=r"serving\.toml of the slot .* must be sound, since it stays: steps must be"):
        put(slot, OTHER)
    assert contents(slot) == before


def test_a_dirty_tree_is_refused_unless_allowed(slot, monkeypatch):
    monkeypatch.setattr(promotion, "git_state", lambda: ("c0ffee", True))
    with pytest.raises(SlotError, match=r"clean work tree.*allow_dirty=True"):
        put(slot)
    assert not slot.exists()
    assert put(slot, allow_dirty=True).evidence.dirty is True


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
        monkeypatch.setattr(GeneratedImage, "png", full)
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
from sdxl_lab.config import GenerationConfig
from sdxl_lab.release import promote as promotion
from sdxl_lab.release.slot import SlotError, slot_config
sys.path.insert(0, {tests!r})
from made import findings, image
promotion.git_state = lambda: ("c0ffee", False)
slot, steps = Path(sys.argv[1]), int(sys.argv[2])
config = GenerationConfig(steps=steps)
compared = slot_config(slot)
print("compared", flush=True)
sys.stdin.readline()
try:
    promotion.promote(config, slot, images=[image(config, seed=s) for s in range(20)], why="w", who=sys.argv[2],
                      findings=findings(config, compared))
    print("promoted", flush=True)
except SlotError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("held", [None, CONFIG], ids=["a new slot", "a slot in use"])
def test_of_promotions_at_the_same_time_one_wins_and_the_others_are_told(slot, held):
    """Processes that compared with the same slot and then promote at once: none may be lost without a word."""
    slot.parent.mkdir(parents=True)
    if held:
        put(slot, held)
    command = [sys.executable, "-c", PROMOTING.format(tests=str(ROOT / "tests")), str(slot)]
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
    assert winner.evidence.who == str(winner.config.steps)
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

    monkeypatch.setattr(promotion, "slot_config", looked)
    promote(CONFIG, slot, images=[image()], why="w", who="Ada")
    assert tried == [slot]


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
        slot_config(place)
    with pytest.raises(SlotError, match="may only write to a path where nothing is, an empty folder, or a slot"):
        promote(CONFIG, place, images=[image()], why="x", who="x", allow_dirty=True)
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_becomes_a_slot(slot):
    slot.mkdir(parents=True)
    assert put(slot).digest == CONFIG.digest


def test_what_a_slot_held_can_be_brought_back(slot):
    put(slot)
    before = contents(slot)
    put(slot, OTHER, findings=findings(OTHER, CONFIG))
    put(slot, CONFIG, findings=findings(CONFIG, OTHER))
    first, second = sorted((slot.parent / ".replaced").iterdir())
    assert contents(first) == before
    assert load_slot(first).digest == CONFIG.digest
    assert load_slot(second).digest == OTHER.digest


def test_a_link_to_a_slot_stays_a_link(slot, tmp_path):
    put(slot)
    link = tmp_path / "current"
    link.symlink_to(slot)
    put(link, OTHER, findings=findings(OTHER, CONFIG))
    assert link.is_symlink()
    assert load_slot(slot).digest == OTHER.digest


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


def test_a_slot_carries_its_embeddings(slot, tmp_path):
    import torch
    from safetensors.torch import save_file

    from sdxl_lab.config import EmbeddingRef
    from sdxl_lab.diffusion.lora_files import pinned

    path = tmp_path / "style.safetensors"
    save_file({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 64)}, path)
    config = pinned(GenerationConfig(embeddings=(EmbeddingRef(token="qzstyle", source=str(path)),)))
    promoted = put(slot, config)
    (ref,) = promoted.config.embeddings
    assert (ref.source, promoted.digest) == (str(slot / "embeddings" / "style.safetensors"), config.digest)
    assert (slot / "embeddings" / "style.safetensors").read_bytes() == path.read_bytes()
    path.unlink()
    assert put(slot, promoted.config).config == promoted.config
    loose = config.with_(embeddings=(ref.with_(sha256=None),))
    with pytest.raises(SlotError, match="an embedding that is promoted must have the sha256 of its file"):
        put(slot, loose)
