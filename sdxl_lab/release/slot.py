"""From a tuned configuration to a slot that a service loads.

A slot is a folder: `config.toml`, `serving.toml` (what clients may ask for), `evidence.json` (what the configuration
was judged on) and `golden/` (the images themselves). It is written whole or not at all, by one promotion at a time, and
only over what the candidate was compared with. Knows no models: images and judgements come from the caller.
"""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdxl_lab.config import ConfigError, GenerationConfig, ServingLimits
from sdxl_lab.images import GeneratedImage, ImageError, max_difference, mean_difference, open_image, read_record


class SlotError(ValueError):
    """A slot is missing, incomplete, or not what it says it is; or a promotion was refused."""


@dataclass(frozen=True)
class Golden:
    """A promoted image: what the slot's configuration must draw again from `prompt` and `seed`."""

    path: Path
    prompt: str
    seed: int
    record: dict[str, Any]


@dataclass(frozen=True)
class GoldenCheck:
    """A golden beside the image drawn again.

    `difference` and `tolerance` are on [0, 1] and of the same `measure`: `max-abs`, the largest over all samples,
    where both were drawn on the same kind of device in the same dtype; `mean-abs` otherwise.
    """

    golden: Golden
    measure: str
    difference: float
    tolerance: float
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Slot:
    """A slot as read. `evidence` is None where the configuration was put there without any."""

    folder: Path
    config: GenerationConfig
    evidence: dict[str, Any] | None
    limits: ServingLimits

    @property
    def digest(self) -> str:
        return self.config.digest

    @property
    def goldens(self) -> list[Golden]:
        """What `evidence.json` lists, each file checked against it; empty where it lists none, or is missing.

        Raises `SlotError` for a golden that is missing, is no image with our record, or is not of this configuration.
        """
        listed = (self.evidence or {}).get("goldens", [])
        try:
            entries = [(entry["file"], entry["prompt"], entry["seed"]) for entry in listed]
        except (KeyError, TypeError) as error:
            raise SlotError(
                f"evidence.json of the slot {self.folder} must list its goldens with file, prompt and seed: {error!r}"
            ) from error
        return [self._golden(*entry) for entry in entries]

    def _golden(self, name: str, prompt: str, seed: int) -> Golden:
        if Path(str(name)).name != name:
            raise SlotError(f"a golden must be a file of {self.folder / 'golden'}; received {name!r}")
        path = self.folder / "golden" / name
        if not path.is_file():
            raise SlotError(f"the slot {self.folder} must hold every golden of its evidence; {name} is missing")
        try:
            record = read_record(path)
        except ImageError as error:
            raise SlotError(f"the golden {path} must be an image as it was promoted: {error}") from error
        expected = {"digest": self.digest, "prompt": prompt, "seed": seed}
        for field, value in expected.items():
            if record.get(field) != value:
                raise SlotError(
                    f"the golden {path} must have the {field} {value!r} of its slot; received {record.get(field)!r}"
                )
        return Golden(path, prompt, seed, record)


def load_slot(folder: Path | str) -> Slot:
    """Read a slot. Raises `SlotError` where `config.toml` is missing or `evidence.json` speaks of another digest."""
    folder = Path(folder)
    config_file, evidence_file = folder / "config.toml", folder / "evidence.json"
    if not config_file.is_file():
        raise SlotError(
            f"a slot must be a folder with a config.toml; received {str(folder)!r}. Example: service/promoted/nano"
        )
    config = GenerationConfig.from_toml(config_file)
    evidence = None
    if evidence_file.is_file():
        evidence = _load_evidence(evidence_file)
        if evidence["digest"] != config.digest:
            raise SlotError(
                f"the slot {folder} must hold one configuration: config.toml has the digest {config.digest}, but "
                f"evidence.json speaks of {evidence['digest']!r}. Promote again, or restore the slot from git"
            )
    return Slot(folder, config, evidence, _limits(folder, config))


def _limits(folder: Path, config: GenerationConfig) -> ServingLimits:
    """What a slot's `serving.toml` says; where there is none, the limits that go with the model."""
    file = folder / "serving.toml"
    return ServingLimits.from_toml(file) if file.is_file() else ServingLimits.for_model(config.model)


# What `Comparison.evidence` gives; a file that lacks one of these is refused.
EVIDENCE_FIELDS = (
    "digest",
    "replaces",
    "prompts",
    "seeds",
    "clip",
    "metrics",
    "gates",
    "weights",
    "runtime",
    "libraries",
    "version",
    "goldens",
)
# Evidence is of these weights, libraries and code; drawn with others, an image is not the one that was judged.
STALE_FIELDS = ("weights", "libraries", "version")


def read_evidence(path: Path | str) -> dict[str, Any]:
    """The evidence that a comparison wrote, for `promote`. Raises `SlotError` where the file is none."""
    evidence = _load_evidence(Path(path))
    _check_evidence(evidence, str(path))
    return evidence


def _load_evidence(path: Path) -> dict[str, Any]:
    try:
        evidence = json.loads(path.read_text())
        evidence["digest"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise SlotError(f"{path} must be JSON with the digest it speaks of: {error!r}") from error
    return dict(evidence)


def _check_evidence(evidence: Mapping[str, Any], name: str) -> None:
    if missing := [field for field in EVIDENCE_FIELDS if field not in evidence]:
        raise SlotError(f"{name} must say what a comparison found about its candidate; it lacks {', '.join(missing)}")
    gates = evidence["gates"]
    if not isinstance(gates, list) or not all(isinstance(gate, dict) and "passed" in gate for gate in gates):
        raise SlotError(f"{name} must say of each gate whether it passed; received {gates!r}")


SLOT_ENTRIES = ("config.toml", "serving.toml", "evidence.json", "golden")
REPLACED = ".replaced"  # beside the slots: what promotions took the place of


def served(folder: Path | str) -> GenerationConfig | None:
    """The configuration that a slot holds, be its evidence sound or not; None where nothing, or an empty folder, is.

    Raises `SlotError` for anything else, which a promotion must not touch: a file, a folder that is no slot, or a slot
    with files that no promotion wrote.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    rule = (
        f"a promotion may only write to a path where nothing is, an empty folder, or a slot; received {str(folder)!r}"
    )
    example = "Example: runs/first"
    if not folder.is_dir():
        raise SlotError(f"{rule}, which is a file. {example}")
    entries = sorted(path.name for path in folder.iterdir())
    if not entries:
        return None
    if "config.toml" not in entries:
        raise SlotError(f"{rule}, a folder without config.toml that holds {_listed(entries)}. {example}")
    if foreign := [name for name in entries if name not in SLOT_ENTRIES]:
        raise SlotError(f"{rule}, which also holds what no promotion wrote: {_listed(foreign)}. {example}")
    try:
        return GenerationConfig.from_toml(folder / "config.toml")
    except (ConfigError, OSError) as error:
        raise SlotError(f"{rule}, whose config.toml is not a configuration: {error}. {example}") from error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def promote(
    config: GenerationConfig,
    folder: Path | str,
    *,
    images: Sequence[GeneratedImage],
    why: str,
    who: str,
    evidence: Mapping[str, Any] | None = None,
    allow_dirty: bool = False,
) -> Slot:
    """Write `config` into the slot `folder`, with `images` as its goldens, and what it was judged on as its evidence.

    `evidence` comes from a comparison of `config` with what the slot holds (`Comparison.evidence`, `read_evidence`);
    only a slot that holds nothing yet can do without. Raises `SlotError`, and leaves the slot as it is, where

    - there is no image or no reason, or an image is of another configuration or other weights than the first;
    - a gate failed, or `evidence` is of another configuration, or of other weights, libraries or code than the images;
    - the work tree has uncommitted changes, now or when it was compared, without `allow_dirty`;
    - `folder` is neither a slot, nor an empty folder, nor absent;
    - the slot does not hold what `evidence` compared with, as when another promotion came first.

    What the slot held is kept in `.replaced/`, beside it.
    """
    folder = Path(folder).resolve()  # through a link: what it points to is replaced, not the link
    if not images or not why.strip():
        raise SlotError("a promotion must come with at least one image and a reason. Example: why='sharper hats'")
    _check_images(config, images)
    drawn = {name: images[0].record[name] for name in ("weights", "runtime", "libraries", "version")}
    if evidence is not None:
        _check_evidence(evidence, "the evidence")
        _check_promotable(config, evidence, drawn)
    commit, dirty = clean_state(allow_dirty, was_dirty=bool(evidence and evidence.get("dirty")))
    goldens = {_golden_name(number, image): image for number, image in enumerate(images, 1)}
    written = {
        "replaces": None,
        **(evidence or {}),
        **drawn,
        "digest": config.digest,
        "model": config.model.to_dict(),
        "who": who,
        "why": why,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "goldens": [
            {"file": name, "prompt": image.record["prompt"], "seed": image.record["seed"]}
            for name, image in goldens.items()
        ],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        _check_unchanged(folder, written["replaces"])
        _write(folder, config, written, goldens)
        return load_slot(folder)


def _check_images(config: GenerationConfig, images: Sequence[GeneratedImage]) -> None:
    weights = images[0].record["weights"]
    for image in images:
        name = f"({image.record['prompt']!r}, seed {image.record['seed']})"
        if image.record["digest"] != config.digest:
            raise SlotError(
                f"every golden must be drawn with the configuration promoted, {config.digest}; received one of "
                f"{image.record['digest']} {name}"
            )
        if image.record["weights"] != weights:
            raise SlotError(
                f"every golden must be drawn with the same weights; {name} is of another model: "
                f"{_changed(weights, image.record['weights'])}"
            )


def _check_promotable(config: GenerationConfig, evidence: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    if evidence["digest"] != config.digest:
        raise SlotError(
            f"the evidence must speak of the configuration promoted, {config.digest}; received evidence of "
            f"{evidence['digest']!r}. Try the candidate against the slot again"
        )
    for name in STALE_FIELDS:
        if evidence[name] != drawn[name]:
            before, now = (
                {name: value} if isinstance(value, str) else value for value in (evidence[name], drawn[name])
            )
            raise SlotError(
                f"the evidence is stale: its {name} are not those the goldens are drawn with: {_changed(before, now)}. "
                "Try the candidate against the slot again"
            )
    if failed := [gate for gate in evidence["gates"] if not gate["passed"]]:
        said = "; ".join(f"{gate.get('gate')} ({gate.get('figures')})" for gate in failed)
        raise SlotError(f"a promotion must pass all of its gates; failed: {said}")


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """One promotion at a time among the slots of a folder. The folder itself is locked: a lock file would make the work
    tree dirty. The system lets go of it when the process ends, however it ends."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_unchanged(folder: Path, compared: str | None) -> None:
    holds = served(folder)
    found = holds.digest if holds else None
    if found != compared:
        raise SlotError(
            f"the slot {folder} must hold what the candidate was compared with, {compared or 'nothing'}; it holds "
            f"{found or 'nothing'}. Try the candidate against the slot as it is now"
        )


def _write(
    folder: Path, config: GenerationConfig, evidence: Mapping[str, Any], goldens: Mapping[str, GeneratedImage]
) -> None:
    """The whole slot, put in the place of the old one, which comes back where that fails, and is kept where it does
    not. For a moment between the two renames there is none: POSIX puts no folder in the place of one that is not
    empty."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "slot"
        (fresh / "golden").mkdir(parents=True)
        (fresh / "config.toml").write_text(config.to_toml())
        (fresh / "serving.toml").write_text(_limits(folder, config).to_toml())
        (fresh / "evidence.json").write_text(json.dumps(evidence, indent=2, sort_keys=True) + "\n")
        for name, image in goldens.items():
            image.save(fresh / "golden" / name)
        replaced = _replaced_place(folder)
        if folder.exists():
            replaced.parent.mkdir(exist_ok=True)
            folder.rename(replaced)
        try:
            fresh.rename(folder)
        except BaseException:
            if replaced.exists():
                replaced.rename(folder)
            raise


def _replaced_place(folder: Path) -> Path:
    """Where the slot goes that a promotion replaces: `.replaced/NAME-TIME`, which does not exist yet."""
    when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    return folder.parent / REPLACED / f"{folder.name}-{when}"


# An image of 8 bits cannot show float32's 1e-3 better than by one step of a sample, where a value is rounded the
# other way. Another device or dtype moves whole images slightly: bfloat16 by 13/255 at most, far less on average.
SAME_RUNTIME = 1 / 255
OTHER_RUNTIME = 5 / 255


def compare_golden(golden: Golden, image: GeneratedImage) -> GoldenCheck:
    """Whether `image`, drawn from the golden's configuration, prompt and seed, is the image promoted.

    Weights of another checksum fail whatever the pixels say.
    """
    before, now = golden.record, image.record
    same = all(before["runtime"].get(name) == now["runtime"].get(name) for name in ("device", "dtype"))
    measure, tolerance = ("max-abs", SAME_RUNTIME) if same else ("mean-abs", OTHER_RUNTIME)
    with open_image(golden.path) as promoted:
        if promoted.size != image.image.size:
            difference = 1.0
        else:
            difference = (max_difference if same else mean_difference)(promoted, image.image)
    reason = None
    if before["weights"] != now["weights"]:
        reason = f"the weights are not those it was promoted with: {_changed(before['weights'], now['weights'])}"
    elif difference > tolerance + 1e-9:
        reason = f"the image differs by {difference:.4f} ({measure} on [0, 1]); at most {tolerance:.4f} is allowed"
    if reason is not None:
        reason = f"golden {golden.path.name}: {reason}"
    return GoldenCheck(golden, measure, difference, tolerance, reason)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)


def _golden_name(number: int, image: GeneratedImage) -> str:
    """Numbered, since two prompts may have the same words or begin alike."""
    words = "".join(letter if letter.isalnum() else "-" for letter in image.record["prompt"].lower())
    return f"{number:02}-{words[:60].strip('-')}-{image.record['seed']}.png"


def clean_state(allow_dirty: bool, *, was_dirty: bool = False) -> tuple[str | None, bool]:
    """`git_state`; `SlotError` for a work tree with uncommitted changes, now or when something was compared, unless
    they are allowed. Whoever draws for long before promoting asks first."""
    commit, dirty = git_state()
    dirty = dirty or was_dirty
    if dirty and not allow_dirty:
        raise SlotError(
            "a promotion must come from a clean work tree, so that the commit it names is the code that drew; commit "
            "first, or try without: --allow-dirty on the command line, allow_dirty=True in Python"
        )
    return commit, dirty


def git_state() -> tuple[str | None, bool]:
    """The commit of the work tree, and whether it has uncommitted changes; (None, False) outside of git."""
    if shutil.which("git") is None:
        return None, False

    def git(*arguments: str) -> str | None:
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return found.stdout.strip() if found.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit, bool(commit and git("status", "--porcelain"))
