"""Promotion: a configuration, what was found of it and its images become a slot.

A slot is written whole or not at all, by one promotion at a time, and only over what the candidate was compared with.
What it held is kept. Images and findings come from the caller. Imports no torch.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdxl_lab.checksums import sha256_of
from sdxl_lab.config import ConfigError, EmbeddingRef, GenerationConfig, LoraRef, OfferedLora, ServingLimits
from sdxl_lab.diffusion import inversions
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.lora_files import PEFT_CONFIG, local_file
from sdxl_lab.images import GeneratedImage
from sdxl_lab.record import RecordError
from sdxl_lab.release.records import Evidence, Findings, GoldenEntry
from sdxl_lab.release.slot import EMBEDDINGS, LORAS, Lora, Slot, SlotError, load_slot, slot_config, slot_limits

# Findings are of these weights, libraries and code; drawn with others, an image is not the one that was compared.
STALE_FIELDS = ("weights", "libraries", "version")
REPLACED = ".replaced"  # beside the slots: what promotions took the place of


def read_findings(path: Path | str) -> Findings:
    """What a comparison wrote, for `promote`. Raises `SlotError` where the file is something else."""
    try:
        return Findings.read(Path(path).read_bytes(), str(path))
    except (OSError, RecordError) as error:
        raise SlotError(str(error)) from error


def promote(
    config: GenerationConfig,
    folder: Path | str,
    *,
    images: Sequence[GeneratedImage],
    why: str,
    who: str,
    findings: Findings | None = None,
    allow_dirty: bool = False,
) -> Slot:
    """Write `config` into the slot `folder`, with `images` as its goldens, and what was found of it as its evidence.

    `findings` comes from a comparison of `config` with what the slot holds (`Comparison.findings`, `read_findings`);
    only a slot that holds nothing yet can do without. The slot's limits stay as they are; a new one gets those that go
    with the model. Raises `SlotError`, and leaves the slot as it is, where

    - there is no image or no reason, or an image is of another configuration or other weights than the first;
    - a gate failed, or `findings` is of another configuration, or of other weights, libraries or code than the images;
    - the work tree has uncommitted changes, now or when it was compared, without `allow_dirty`;
    - a LoRA or an embedding has no sha256, or its file is not there or another one;
    - `folder` is neither a slot, nor an empty folder, nor absent;
    - the slot does not hold what `findings` compared with, as when another promotion came first.

    What the slot held is kept in `.replaced/`, beside it.
    """
    folder = Path(folder).resolve()  # through a link: what it points to is replaced, not the link
    if not images or not why.strip():
        raise SlotError("a promotion must come with at least one image and a reason. Example: why='sharper hats'")
    _check_images(config, images)
    if findings is not None:
        _check_promotable(config, findings, images[0])
    commit, dirty = clean_state(allow_dirty, was_dirty=findings is not None and findings.dirty)
    goldens = {_golden_name(number, image): image for number, image in enumerate(images, 1)}
    record = images[0].record
    found = {} if findings is None else {name: getattr(findings, name) for name in FOUND}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.parent):
        _check_unchanged(folder, findings.replaces if findings else None)
        config, limits, files = _packed(config, _carried(folder, config))
        evidence = Evidence(
            digest=config.digest,
            replaces=findings.replaces if findings else None,
            model=config.model,
            limits=limits,
            who=who,
            why=why,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit,
            dirty=dirty,
            **{name: getattr(record, name) for name in ("version", "weights", "runtime", "libraries")},
            goldens=tuple(
                GoldenEntry(file=name, prompt=image.record.prompt, seed=image.record.seed)
                for name, image in goldens.items()
            ),
            **found,
        )
        pngs = {name: image.png() for name, image in goldens.items()}
        write_slot(folder, config, evidence.limits, evidence, pngs, files)
        return load_slot(folder)


# What the evidence takes of the findings.
FOUND = ("prompts", "seeds", "clip", "metrics", "gates", "machine", "notebook")


def _carried(folder: Path, config: GenerationConfig) -> ServingLimits:
    """The limits that a slot has, or gets; what is damaged is not carried on in silence."""
    try:
        return slot_limits(folder, config)
    except ConfigError as error:
        raise SlotError(f"the serving.toml of the slot {folder} must be sound, since it stays: {error}") from error


# Bytes. A larger LoRA stays where it is: the slot has its sha256, and another file there is refused.
CARRIED = 32 << 20


def _packed(config: GenerationConfig, limits: ServingLimits) -> tuple[GenerationConfig, ServingLimits, dict[str, Path]]:
    """Configuration and limits as a slot has them, whose small LoRAs and embeddings lie in folders of its own, and
    these files by their paths there. Raises `SlotError`."""
    files: dict[str, Path] = {}

    def placed(folder: str, path: Path, found: str) -> str:
        place = f"{folder}/{path.name}"
        if files.get(place, path) != path:
            place = f"{folder}/{path.stem}-{found[:8]}{path.suffix}"
        files[place] = path
        return place

    def packed(lora: Lora) -> Lora:
        try:
            path = local_file(_ref_of(lora))
            found = path and sha256_of(path)
        except ModelError as error:
            raise SlotError(f"a slot's LoRAs must be there: {error}") from error
        if path is None or lora.source == "nano":
            return lora
        if lora.sha256 not in (None, found) or (lora.sha256 is None and isinstance(lora, LoraRef)):
            raise SlotError(
                f"a LoRA that is promoted must have the sha256 of its file, so that it is the one that was tried; "
                f"received {lora.sha256} for {path}, which has {found}. Example: sha256 = {found!r}"
            )
        lora = lora.with_(sha256=found)
        if path.stat().st_size > CARRIED or path.with_name(PEFT_CONFIG).exists():
            return lora
        return lora.with_(source=placed(LORAS, path, str(found)), file=None, revision=None)

    def embedded(ref: EmbeddingRef) -> EmbeddingRef:
        try:
            path = inversions.file_of(ref)
        except ModelError as error:
            raise SlotError(f"a slot's embeddings must be there: {error}") from error
        if ref.sha256 is None:
            raise SlotError(
                f"an embedding that is promoted must have the sha256 of its file, so that it is the one that was "
                f"tried; received none for {path}. Example: sha256 = {sha256_of(path)!r}"
            )
        return ref.with_(source=placed(EMBEDDINGS, path, ref.sha256))

    return (
        config.with_(
            loras=tuple(packed(ref) for ref in config.loras),
            embeddings=tuple(embedded(ref) for ref in config.embeddings),
        ),
        limits.with_(loras=tuple(packed(each) for each in limits.loras)),
        files,
    )


def _ref_of(lora: LoraRef | OfferedLora) -> LoraRef:
    return lora.at(None) if isinstance(lora, OfferedLora) else lora


def _check_images(config: GenerationConfig, images: Sequence[GeneratedImage]) -> None:
    weights = images[0].record.weights
    for image in images:
        record = image.record
        name = f"({record.prompt!r}, seed {record.seed})"
        if record.digest != config.digest:
            raise SlotError(
                f"every golden must be drawn with the configuration promoted, {config.digest}; received one of "
                f"{record.digest} {name}"
            )
        if record.weights != weights:
            raise SlotError(
                f"every golden must be drawn with the same weights; {name} is of another model: "
                f"{changed_values(weights, record.weights)}"
            )


def _check_promotable(config: GenerationConfig, findings: Findings, image: GeneratedImage) -> None:
    if findings.digest != config.digest:
        raise SlotError(
            f"the evidence must speak of the configuration promoted, {config.digest}; received evidence of "
            f"{findings.digest!r}. Compare the candidate with the slot again"
        )
    for name in STALE_FIELDS:
        before, now = getattr(findings, name), getattr(image.record, name)
        if before != now:
            before, now = ({name: value} if isinstance(value, str) else value for value in (before, now))
            raise SlotError(
                f"the evidence is stale: its {name} are not those the goldens are drawn with: "
                f"{changed_values(before, now)}. Compare the candidate with the slot again"
            )
    if failed := [gate for gate in findings.gates if not gate.passed]:
        said = "; ".join(f"{gate.gate} ({gate.figures})" for gate in failed)
        raise SlotError(f"a promotion must pass all of its gates; failed: {said}")


@contextmanager
def alone(parent: Path) -> Iterator[None]:
    """One promotion at a time among the slots of a folder. The folder itself is locked: a lock file would make the work
    tree dirty. The system lets go of it when the process ends, however it ends."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_unchanged(folder: Path, compared: str | None) -> None:
    holds = slot_config(folder)
    found = holds.digest if holds else None
    if found != compared:
        raise SlotError(
            f"the slot {folder} must hold what the candidate was compared with, {compared or 'nothing'}; it holds "
            f"{found or 'nothing'}. Compare the candidate with the slot as it is now"
        )


def write_slot(
    folder: Path,
    config: GenerationConfig,
    limits: ServingLimits,
    evidence: Evidence | None,
    goldens: Mapping[str, bytes],
    files: Mapping[str, Path] = MappingProxyType({}),
) -> Path | None:
    """The whole slot, put in the place of the old one, which comes back where that fails, and is kept where it does
    not: at the path that this gives. For a moment between the two renames there is none: POSIX puts no folder in the
    place of one that is not empty."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "slot"
        fresh.mkdir()
        (fresh / "config.toml").write_text(config.to_toml())
        (fresh / "serving.toml").write_text(limits.to_toml())
        if evidence is not None:
            (fresh / "evidence.json").write_text(evidence.to_json())
        for name, png in goldens.items():
            (fresh / "golden").mkdir(exist_ok=True)
            (fresh / "golden" / name).write_bytes(png)
        for name, path in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, fresh / name)
        return replace_kept(folder, fresh)


def replace_kept(path: Path, fresh: Path) -> Path | None:
    """Put `fresh` in the place of `path`. Gives where the old one is kept: `.replaced/NAME-TIME`, beside it."""
    kept = None
    if path.exists():
        when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        kept = path.parent / REPLACED / f"{path.name}-{when}"
        kept.parent.mkdir(exist_ok=True)
        path.rename(kept)
    try:
        fresh.rename(path)
    except BaseException:
        if kept is not None:
            kept.rename(path)
        raise
    return kept


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name by name what differs, in words."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)


def _golden_name(number: int, image: GeneratedImage) -> str:
    """Numbered, since two prompts may have the same words or begin alike."""
    words = "".join(letter if letter.isalnum() else "-" for letter in image.record.prompt.lower())
    return f"{number:02}-{words[:60].strip('-')}-{image.record.seed}.png"


def clean_state(allow_dirty: bool, *, was_dirty: bool = False) -> tuple[str | None, bool]:
    """`git_state`; `SlotError` for a work tree with uncommitted changes, now or when the candidate was compared, unless
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
