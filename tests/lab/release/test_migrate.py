"""What 0.1.0 wrote is read, migrated, or refused with the command that migrates it. The files were made by 0.1.0."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_lab.cli import main
from sdxl_lab.config import ConfigError, GenerationConfig, RefinerConfig, RuntimeProfile, ServingLimits
from sdxl_lab.diffusion.inventory import identity
from sdxl_lab.images import max_difference, open_image, read_record
from sdxl_lab.release import migrate as migration
from sdxl_lab.release.migrate import migrate
from sdxl_lab.release.promote import promote, read_findings
from sdxl_lab.release.slot import SlotError, load_slot
from tests.made import image

FILES = Path(__file__).parents[2] / "data" / "0.1.0"
LIMITS = ServingLimits(steps=(1, 20), side=(64, 256))
SLOT = GenerationConfig(steps=3, width=64, height=64)
CONFIG = GenerationConfig(
    steps=4,
    width=64,
    height=64,
    scheduler="dpmpp_2m_karras",
    negative_prompt="blurry",
    refiner=RefinerConfig(handover=0.5),
)


@pytest.fixture
def slot(tmp_path) -> Path:
    """A copy of a slot as 0.1.0 left it."""
    return Path(shutil.copytree(FILES / "slot", tmp_path / "promoted" / "slot"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- images ----------------------------------------------------------------------------------------------------------


def test_the_record_of_an_image_is_read_in_the_form_of_this_version():
    record = read_record(FILES / "image.png")
    assert (record.schema_number, record.version) == (1, "0.1.0")
    assert (record.config, record.digest) == (CONFIG, CONFIG.digest)
    assert (record.prompt, record.seed) == ("a red cat on a white background", 7)
    assert record.scheduler["lambda_min_clipped"] == "-inf"
    refined = read_record(FILES / "refined.png")
    assert (refined.source, refined.strength) == (record, 0.75)


@pytest.mark.parametrize("name", ["image.png", "refined.png"])
def test_an_image_is_drawn_again_from_its_record(name, tmp_path):
    assert main(["generate", "--like", str(FILES / name), "--out", str(tmp_path / "again.png")]) == 0
    assert max_difference(open_image(FILES / name), open_image(tmp_path / "again.png")) <= 1 / 255


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_configuration_a_slot_and_evidence_are_refused_with_what_to_do(slot):
    with pytest.raises(ConfigError, match=r"python -m sdxl_lab migrate .*config\.toml"):
        GenerationConfig.from_toml(FILES / "config.toml")
    with pytest.raises(ConfigError, match="python -m sdxl_lab migrate"):
        load_slot(slot)
    (slot / "config.toml").write_text(SLOT.to_toml())
    with pytest.raises(SlotError, match="python -m sdxl_lab migrate SLOT"):
        load_slot(slot)
    with pytest.raises(SlotError, match="compare the candidate again"):
        read_findings(FILES / "evidence.json")


# --- a slot ----------------------------------------------------------------------------------------------------------


def test_a_slot_is_migrated_whole_and_its_goldens_keep_their_pixels(slot):
    before = contents(slot)
    (said,) = migrate(slot)
    migrated = load_slot(slot)
    assert (migrated.config, migrated.limits) == (SLOT, LIMITS)
    evidence, old = migrated.evidence, json.loads(before["evidence.json"])
    assert (evidence.schema_number, evidence.digest, evidence.limits) == (1, SLOT.digest, LIMITS)
    assert evidence.weights == identity(SLOT.model)
    for name in ("who", "why", "when", "version", "runtime", "libraries", "commit", "dirty", "clip"):
        assert getattr(evidence, name) == old[name], name
    assert list(evidence.prompts) == old["prompts"]
    assert list(evidence.metrics["sharpness"].values) == old["metrics"]["sharpness"]["values"]
    assert len(migrated.goldens) == 2
    for golden in migrated.goldens:
        assert open_image(golden.path).tobytes() == open_image(FILES / "slot/golden" / golden.path.name).tobytes()
        assert golden.record.weights == identity(SLOT.model)
        assert "schema" in open_image(golden.path).text["sdxl_lab"]
    (kept,) = (slot.parent / ".replaced").iterdir()
    assert contents(kept) == before
    assert str(kept) in said
    assert f"{old['digest']} -> {SLOT.short_digest}" in said


def test_a_migrated_slot_verifies(slot, capsys):
    assert main(["migrate", str(slot)]) == 0
    assert main(["verify", str(slot)]) == 0
    assert capsys.readouterr().out.count("as promoted") == 2


@pytest.mark.parametrize("name", ["", "config.toml"])
def test_a_migration_done_twice_changes_nothing(slot, name):
    migrate(slot / name)
    once = contents(slot)
    (said,) = migrate(slot / name)
    assert said.endswith("is as this version has it")
    assert contents(slot) == once
    assert len(list((slot.parent / ".replaced").iterdir())) == 1


def test_a_slot_whose_limits_were_moved_by_hand_is_migrated(slot):
    (slot / "config.toml").write_text(SLOT.to_toml())
    (slot / "serving.toml").write_text(LIMITS.to_toml())
    migrate(slot)
    assert load_slot(slot).limits == LIMITS


def test_a_slot_without_evidence_is_migrated(slot):
    shutil.rmtree(slot / "golden")
    (slot / "evidence.json").unlink()
    migrate(slot)
    assert (load_slot(slot).config, load_slot(slot).limits, load_slot(slot).evidence) == (SLOT, LIMITS, None)
    assert sorted(path.name for path in slot.iterdir()) == ["config.toml", "serving.toml"]


def test_a_folder_of_slots_is_migrated(slot):
    shutil.copytree(slot, slot.parent / "other")
    assert len(migrate(slot.parent)) == 2
    assert load_slot(slot).digest == load_slot(slot.parent / "other").digest
    assert all(said.endswith("is as this version has it") for said in migrate(slot.parent))


def test_a_slot_that_was_migrated_can_be_promoted_into(slot, monkeypatch):
    from sdxl_lab.release import promote as promotion
    from tests.made import findings

    migrate(slot)
    other = GenerationConfig(steps=5)
    monkeypatch.setattr(promotion, "git_state", lambda: ("c0ffee", False))
    promote(other, slot, images=[image(other)], why="w", who="Ada", findings=findings(other, SLOT))
    assert (load_slot(slot).config, load_slot(slot).limits) == (other, LIMITS)


def other_record(path: Path, **changes: object) -> None:
    """A golden whose record 0.1.0 would not have written."""
    from PIL.PngImagePlugin import PngInfo

    picture = open_image(path)
    info = PngInfo()
    info.add_itxt("sdxl_lab", json.dumps(json.loads(picture.text["sdxl_lab"]) | changes))
    picture.save(path, pnginfo=info)


def edit_evidence(slot: Path, **changes: object) -> None:
    path = slot / "evidence.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first(slot: Path) -> Path:
    return min((slot / "golden").iterdir())


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "other weights": (
        lambda slot: edit_evidence(slot, weights={"base": "sha256 0"}),
        "beside the model that it was promoted with: base was sha256 0, is sha256 ",
    ),
    "another digest": (lambda slot: edit_evidence(slot, digest="0" * 12), "must hold one configuration"),
    "a field edited by hand": (
        lambda slot: (slot / "config.toml").write_text((slot / "config.toml").read_text().replace("= 3", "= 5", 1)),
        "must hold one configuration",
    ),
    "a damaged configuration": (lambda slot: (slot / "config.toml").write_text("steps ="), "must be TOML"),
    "a configuration with a bad value": (
        lambda slot: (slot / "config.toml").write_text("steps = 0\n[limits]\n"),
        "must be a configuration of 0.1.0 to be migrated: steps must be",
    ),
    "damaged evidence": (lambda slot: (slot / "evidence.json").write_text("{"), "must be JSON"),
    "evidence that is a list": (lambda slot: (slot / "evidence.json").write_text("[]"), "must be a JSON object"),
    "evidence without a reason": (lambda slot: edit_evidence(slot, why=None), "it lacks why"),
    "a missing golden": (lambda slot: first(slot).unlink(), "must be an image as it was promoted"),
    "a golden of other weights": (
        lambda slot: other_record(first(slot), weights={"base": "sha256 0"}),
        "must be drawn with the weights of its slot's evidence",
    ),
    "a golden of another configuration": (
        lambda slot: other_record(first(slot), config=CONFIG.to_dict()),
        "must be drawn with the configuration of its slot",
    ),
}


@pytest.mark.parametrize(("damage", "said"), REFUSED.values(), ids=REFUSED)
def test_a_slot_that_cannot_be_migrated_stays_as_it_is(slot, damage, said, capsys):
    damage(slot)
    before = contents(slot.parent)
    assert main(["migrate", str(slot)]) == 1
    assert said in capsys.readouterr().err
    assert contents(slot.parent) == before


def test_a_migration_that_fails_midway_leaves_the_old_slot(slot, monkeypatch):
    before = contents(slot)
    rename = Path.rename
    renames = []

    def fails_once(self, target):
        renames.append(self)
        if len(renames) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="No space left"):
        migrate(slot)
    assert contents(slot) == before


# --- a configuration -------------------------------------------------------------------------------------------------


def test_a_configuration_keeps_its_comment_and_loses_its_limits(tmp_path):
    path = tmp_path / "candidate.toml"
    path.write_text("# the cheapest of the front\n" + (FILES / "config.toml").read_text())
    before = path.read_bytes()
    (said,) = migrate(path)
    assert GenerationConfig.from_toml(path) == CONFIG
    assert path.read_text().startswith("# the cheapest of the front\n")
    assert "its limits are left out: they decide no image" in said
    (kept,) = (tmp_path / ".replaced").iterdir()
    assert kept.read_bytes() == before
    assert migrate(path) == [f"{path} is as this version has it"]


def test_a_config_toml_beside_other_files_gets_its_limits_beside_it(tmp_path):
    shutil.copy(FILES / "config.toml", tmp_path)
    (tmp_path / "notes.md").write_text("why these hats")
    migrate(tmp_path / "config.toml")
    assert GenerationConfig.from_toml(tmp_path / "config.toml") == CONFIG
    assert ServingLimits.from_toml(tmp_path / "serving.toml") == LIMITS


@pytest.mark.parametrize("name", ["nothing", "notes.md", "empty"])
def test_what_is_no_slot_and_no_configuration_is_refused(tmp_path, name):
    (tmp_path / "notes.md").write_text("why these hats")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlotError, match=r"must be a slot, a configuration's TOML, or a folder of such; received"):
        migrate(tmp_path / name)


def test_the_digest_of_the_first_version_is_computed_as_it_was():
    said = json.loads((FILES / "slot/evidence.json").read_text())
    assert migration._first_digest(SLOT, LIMITS) == said["digest"]
    assert migration._first_identity(SLOT.model) == said["weights"]


# --- a cell ----------------------------------------------------------------------------------------------------------


def test_a_cell_is_read(tmp_path):
    from sdxl_lab.evaluation.metrics import METRICS
    from sdxl_lab.research.cache import ImageCache

    (key,) = {path.stem for path in (FILES / "cache").iterdir()}
    cache = ImageCache(shutil.copytree(FILES / "cache", tmp_path / "cache"), RuntimeProfile(device="cpu"))
    assert key in cache
    assert cache.image(key).record.config == SLOT
    assert cache.costs(key)["unet_rows"] == 6
    assert cache.values(key, [METRICS["sharpness"]]).keys() == {"sharpness"}
