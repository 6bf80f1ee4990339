"""What 0.1.0 wrote, made into what this version reads: slots and configurations.

0.1.0 kept what clients may ask for inside the configuration and its digest, cut digests to 12 digits, and knew a model
by its weight files alone. A migration changes no pixel, checks first that a slot's model has the weights that its
evidence names, and keeps the original in `.replaced/`, beside it. Imports no torch.
"""

import hashlib
import json
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_lab.config import ConfigError, GenerationConfig, ModelRef, ServingLimits, canonical, migrated_config
from sdxl_lab.diffusion.inventory import folder_of, identity
from sdxl_lab.images import ImageError, encode_png, open_image, read_record
from sdxl_lab.record import RecordError
from sdxl_lab.release.promote import REPLACED, alone, changed_values, replace_kept, write_slot
from sdxl_lab.release.records import Evidence
from sdxl_lab.release.slot import SLOT_ENTRIES, SlotError, load_slot, slot_limits


def migrate(path: Path | str) -> list[str]:
    """Migrate a slot, a configuration's TOML, or all of them in a folder; what was done, a line each.

    What is as this version has it stays untouched. Raises `SlotError`, and leaves the slot or file as it is, where it
    cannot be migrated; those before it in a folder are migrated then.
    """
    path = Path(path)
    if path.name == "config.toml" and _is_slot(path.parent):
        path = path.parent
    if _is_slot(path):
        return [_migrate_slot(path.resolve())]
    if path.is_file() and path.suffix == ".toml":
        return [_migrate_file(path)]
    slots = [folder for folder in _children(path) if _is_slot(folder)]
    files = [file for file in _children(path) if file.suffix == ".toml" and file.is_file()]
    if not slots and not files:
        raise SlotError(
            "what is migrated must be a slot, a configuration's TOML, or a folder of such; received "
            f"{str(path)!r}. Example: python -m sdxl_lab migrate service/promoted/nano"
        )
    return [_migrate_slot(slot.resolve()) for slot in slots] + [_migrate_file(file) for file in files]


def _is_slot(path: Path) -> bool:
    """A folder with a config.toml, and nothing that no promotion wrote."""
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    return "config.toml" in entries and entries <= set(SLOT_ENTRIES)


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != REPLACED) if folder.is_dir() else []


# --- a configuration -------------------------------------------------------------------------------------------------


def _migrate_file(path: Path) -> str:
    """A TOML that is a configuration of 0.1.0. Where `config.toml` may be served, `serving.toml` gets its limits."""
    content = _toml(path)
    if "limits" not in content:
        return f"{path} is as this version has it"
    config, limits = _parted(content, path)
    text = path.read_text()
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    serving = path.with_name("serving.toml")
    with alone(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        fresh = Path(scratch) / path.name
        fresh.write_text(comment + config.to_toml())
        if path.name == "config.toml":
            serving.write_text(limits.to_toml())
        kept = replace_kept(path, fresh)
    where = f"are in {serving.name} now" if path.name == "config.toml" else "are left out: they decide no image"
    return f"{path} is migrated, {_digests(content, config)}; its limits {where}. The original is {kept}"


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SlotError(f"{path} must be TOML to be migrated: {error}") from error


def _parted(content: Mapping[str, Any], path: Path) -> tuple[GenerationConfig, ServingLimits]:
    try:
        return migrated_config(content)
    except ConfigError as error:
        raise SlotError(f"{path} must be a configuration of 0.1.0 to be migrated: {error}") from error


def _digests(content: Mapping[str, Any], config: GenerationConfig) -> str:
    return f"{_first_digest(config, ServingLimits.from_dict(content.get('limits', {})))} -> {config.short_digest}"


# --- a slot ----------------------------------------------------------------------------------------------------------


def _migrate_slot(folder: Path) -> str:
    config_file, serving_file, evidence_file = (
        folder / name for name in ("config.toml", "serving.toml", "evidence.json")
    )
    content = _toml(config_file)
    evidence = _json(evidence_file) if evidence_file.exists() else None
    if "limits" not in content and serving_file.is_file() and (evidence is None or "schema" in evidence):
        return f"{folder} is as this version has it"
    config, limits = _parted(content, config_file)
    if "limits" not in content:
        limits = slot_limits(folder, config)
    if evidence is None:
        with alone(folder.parent):
            kept = write_slot(folder, config, limits, None, {})
        return f"{folder} is migrated, to {config.short_digest}; it has no evidence. The original is {kept}"
    _check_digest(folder, config, limits, evidence)
    weights = _checked_weights(folder, config.model, evidence)
    goldens = _goldens(folder, config, evidence, weights)
    found = {name: value for name, value in evidence.items() if value is not None}
    found |= {
        "schema": Evidence.SCHEMA,
        "digest": config.digest,
        "limits": limits.to_dict(),
        "weights": weights,
    }
    try:
        written = Evidence.read(found, str(evidence_file))
    except RecordError as error:
        raise SlotError(f"the slot {folder} must hold what 0.1.0 wrote to be migrated: {error}") from error
    with alone(folder.parent):
        kept = write_slot(folder, config, limits, written, goldens)
    count = len(load_slot(folder).goldens)
    return (
        f"{folder} is migrated, {evidence['digest']} -> {config.short_digest}, with {count} golden images, whose "
        f"pixels are the same. The original is {kept}"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SlotError(f"{path} must be JSON to be migrated: {error}") from error
    if not isinstance(content, dict):
        raise SlotError(f"{path} must be a JSON object to be migrated; received {content!r}")
    return content


def _check_digest(folder: Path, config: GenerationConfig, limits: ServingLimits, evidence: Mapping[str, Any]) -> None:
    expected = _first_digest(config, limits)
    if evidence.get("digest") != expected:
        raise SlotError(
            f"the slot {folder} must hold one configuration: 0.1.0's digest of its config.toml and limits is "
            f"{expected}, but evidence.json speaks of {evidence.get('digest')!r}. Restore the slot from git, and "
            "migrate it then"
        )


def _checked_weights(folder: Path, model: ModelRef, evidence: Mapping[str, Any]) -> dict[str, str]:
    """The identity of the slot's model, if its weights are those that the evidence names by 0.1.0's hash."""
    said = evidence.get("weights") or {}
    now = _first_identity(model)
    if said != now:
        raise SlotError(
            f"the slot {folder} can only be migrated beside the model that it was promoted with: "
            f"{changed_values(said, now)}. Put that model in its place, or promote the configuration again"
        )
    return identity(model)


def _goldens(
    folder: Path, config: GenerationConfig, evidence: Mapping[str, Any], weights: Mapping[str, str]
) -> dict[str, bytes]:
    """The goldens with records of this version, and the same pixels."""
    found = {}
    for entry in evidence.get("goldens", []):
        path = folder / "golden" / str(entry.get("file") if isinstance(entry, Mapping) else entry)
        try:
            image, record = open_image(path), read_record(path)
        except ImageError as error:
            raise SlotError(f"the golden {path} must be an image as it was promoted: {error}") from error
        if record.weights != evidence["weights"]:
            raise SlotError(
                f"the golden {path} must be drawn with the weights of its slot's evidence; "
                f"{changed_values(evidence['weights'], record.weights)}"
            )
        if record.config != config:
            raise SlotError(f"the golden {path} must be drawn with the configuration of its slot; it has another one")
        png = encode_png(image, record.with_(weights=dict(weights)))
        again = open_image(png)
        assert (again.mode, again.size, again.tobytes()) == (image.mode, image.size, image.tobytes()), path
        found[path.name] = png
    return found


# --- what 0.1.0 computed ---------------------------------------------------------------------------------------------


# The settings that 0.1.0 wrote whatever they were, beside those that could be left out.
FIRST_FIELDS = (
    "model",
    "scheduler",
    "steps",
    "guidance_scale",
    "guidance_rescale",
    "guidance_interval",
    "width",
    "height",
    "original_size",
    "crop",
    "target_size",
    "negative_prompt",
    "refiner",
    "watermark",
)
FIRST_LIMITS = ("steps", "guidance_scale", "side")


def _first_digest(config: GenerationConfig, limits: ServingLimits) -> str:
    """0.1.0's digest: over all fields that there were, with the limits among them."""
    content = {name: value for name, value in config.to_dict().items() if name in FIRST_FIELDS}
    content["limits"] = {name: value for name, value in limits.to_dict().items() if name in FIRST_LIMITS}
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:12]


def _first_identity(ref: ModelRef) -> dict[str, str]:
    """0.1.0's identity of a model: over a local folder's weight files alone."""
    named = {
        "base": (ref.base, ref.revision, "base"),
        "refiner": (ref.refiner, ref.refiner_revision, "refiner"),
        "vae": (ref.vae, ref.vae_revision, "base/vae"),
    }
    found = {}
    for role, (name, revision, place) in named.items():
        if name is not None:
            folder = folder_of(name, place)
            found[role] = f"revision {revision}" if folder is None else _first_folder_hash(folder)
    return found


def _first_folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256 {digest.hexdigest()}"
