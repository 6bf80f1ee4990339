"""From a tuned configuration to a slot that a service loads.

A slot is a folder: `config.toml`, `evidence.json` (what the configuration was judged on) and `golden/` (the pictures
themselves). It is written whole or not at all. Knows no models: pictures and judgements come from the caller.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__
from .config import GenerationConfig
from .images import Picture, PictureError, max_difference, mean_difference, open_picture, read_record


class SlotError(ValueError):
    """A slot is missing, incomplete, or not what it says it is; or a promotion was refused."""


@dataclass(frozen=True)
class Golden:
    """A promoted picture: what the slot's configuration must draw again from `prompt` and `seed`."""

    path: Path
    prompt: str
    seed: int
    record: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A golden beside the picture drawn again.

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

    @property
    def digest(self) -> str:
        return self.config.digest

    @property
    def goldens(self) -> list["Golden"]:
        """What `evidence.json` lists, each file checked against it; empty where it lists none, or is missing.

        Raises `SlotError` for a golden that is missing, is no picture with our record, or is not of this configuration.
        """
        listed = (self.evidence or {}).get("goldens", [])
        try:
            entries = [(entry["file"], entry["prompt"], entry["seed"]) for entry in listed]
        except (KeyError, TypeError) as error:
            raise SlotError(
                f"evidence.json of the slot {self.folder} must list its goldens with file, prompt and seed: {error!r}"
            ) from error
        return [self._golden(*entry) for entry in entries]

    def _golden(self, name: str, prompt: str, seed: int) -> "Golden":
        path = self.folder / "golden" / name
        if not path.is_file():
            raise SlotError(f"the slot {self.folder} must hold every golden of its evidence; {name} is missing")
        try:
            record = read_record(path)
        except PictureError as error:
            raise SlotError(f"the golden {path} must be a picture as it was promoted: {error}") from error
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
        try:
            evidence = json.loads(evidence_file.read_text())
            judged = evidence["digest"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SlotError(f"{evidence_file} must be JSON with the digest it speaks of: {error!r}") from error
        if judged != config.digest:
            raise SlotError(
                f"the slot {folder} must hold one configuration: config.toml has the digest {config.digest}, but "
                f"evidence.json speaks of {judged!r}. Promote again, or restore the slot from git"
            )
    return Slot(folder, config, evidence)


def promote(
    config: GenerationConfig,
    folder: Path | str,
    *,
    pictures: Sequence[Picture],
    why: str,
    who: str,
    metrics: Mapping[str, Any] | None = None,
    allow_dirty: bool = False,
) -> Slot:
    """Write `config` into the slot `folder`, with `pictures` as its goldens and as part of its evidence.

    Raises `SlotError` where a picture was made with another configuration, where there is none, where no reason is
    given, and, without `allow_dirty`, where the work tree has uncommitted changes.
    """
    folder = Path(folder)
    if not pictures or not why.strip():
        raise SlotError("a promotion must come with at least one picture and a reason. Example: why='sharper hats'")
    for picture in pictures:
        if picture.record["digest"] != config.digest:
            raise SlotError(
                f"every golden must be drawn with the configuration promoted, {config.digest}; received one of "
                f"{picture.record['digest']} ({picture.record['prompt']!r}, seed {picture.record['seed']})"
            )
    commit, dirty = git_state()
    if dirty and not allow_dirty:
        raise SlotError(
            "a promotion must come from a clean work tree, so that its commit says all; commit first, or "
            "pass allow_dirty=True"
        )
    first = pictures[0].record
    goldens = {_golden_name(number, picture): picture for number, picture in enumerate(pictures, 1)}
    evidence = {
        "digest": config.digest,
        "replaces": _served(folder),
        "who": who,
        "why": why,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "version": __version__,
        **{name: first[name] for name in ("weights", "runtime", "libraries")},
        "metrics": dict(metrics or {}),
        "goldens": [
            {"file": name, "prompt": picture.record["prompt"], "seed": picture.record["seed"]}
            for name, picture in goldens.items()
        ],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "slot"
        (fresh / "golden").mkdir(parents=True)
        (fresh / "config.toml").write_text(config.to_toml())
        (fresh / "evidence.json").write_text(json.dumps(evidence, indent=2, sort_keys=True) + "\n")
        for name, picture in goldens.items():
            picture.save(fresh / "golden" / name)
        replaced = Path(scratch) / "replaced"
        if folder.exists():
            folder.rename(replaced)
        try:
            fresh.rename(folder)
        except BaseException:
            if replaced.exists():
                replaced.rename(folder)
            raise
    return load_slot(folder)


# A picture of 8 bits cannot show float32's 1e-3 better than by one step of a sample, where a value is rounded the
# other way. Another device or dtype moves whole pictures slightly: bfloat16 by 13/255 at most, far less on average.
SAME_RUNTIME = 1 / 255
OTHER_RUNTIME = 5 / 255


def compare_golden(golden: Golden, picture: Picture) -> Comparison:
    """Whether `picture`, drawn from the golden's configuration, prompt and seed, is the picture promoted.

    Weights of another checksum fail whatever the pixels say.
    """
    before, now = golden.record, picture.record
    same = all(before["runtime"].get(name) == now["runtime"].get(name) for name in ("device", "dtype"))
    measure, tolerance = ("max-abs", SAME_RUNTIME) if same else ("mean-abs", OTHER_RUNTIME)
    with open_picture(golden.path) as promoted:
        if promoted.size != picture.image.size:
            difference = 1.0
        else:
            difference = (max_difference if same else mean_difference)(promoted, picture.image)
    reason = None
    if before["weights"] != now["weights"]:
        reason = f"the weights are not those it was promoted with: {_changed(before['weights'], now['weights'])}"
    elif difference > tolerance + 1e-9:
        reason = f"the picture differs by {difference:.4f} ({measure} on [0, 1]); at most {tolerance:.4f} is allowed"
    if reason is not None:
        reason = f"golden {golden.path.name}: {reason}"
    return Comparison(golden, measure, difference, tolerance, reason)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)


def _served(folder: Path) -> str | None:
    """The digest of the configuration that a slot holds, be its evidence sound or not; None for a new slot."""
    file = folder / "config.toml"
    return GenerationConfig.from_toml(file).digest if file.is_file() else None


def _golden_name(number: int, picture: Picture) -> str:
    """Numbered, since two prompts may have the same words or begin alike."""
    words = "".join(letter if letter.isalnum() else "-" for letter in picture.record["prompt"].lower())
    return f"{number:02}-{words[:60].strip('-')}-{picture.record['seed']}.png"


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
