"""Slots: the folders from which a service takes what it serves.

A slot holds `config.toml`, `serving.toml` (what clients may ask for), `evidence.json` (why the configuration is there),
`golden/` (images that it must draw again), `loras/` (the files of its LoRAs, but for large ones) and `embeddings/`.
This module reads them; `promote.py` writes them. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sdxl_lab.config import ConfigError, EmbeddingRef, GenerationConfig, LoraRef, OfferedLora, ServingLimits
from sdxl_lab.images import ImageError, read_record
from sdxl_lab.record import ImageRecord, RecordError
from sdxl_lab.release.records import Evidence

LORAS, EMBEDDINGS = "loras", "embeddings"
SLOT_ENTRIES = ("config.toml", "serving.toml", "evidence.json", "golden", LORAS, EMBEDDINGS)


class SlotError(ValueError):
    """A slot is missing, incomplete, or not what it says it is; or a promotion was refused."""


@dataclass(frozen=True)
class Golden:
    """A promoted image: what the slot's configuration must draw again from `prompt` and `seed`."""

    path: Path
    prompt: str
    seed: int
    record: ImageRecord


@dataclass(frozen=True)
class Slot:
    """A slot as read. `evidence` is None where the configuration was put there without any."""

    folder: Path
    config: GenerationConfig
    evidence: Evidence | None
    limits: ServingLimits

    @property
    def digest(self) -> str:
        return self.config.digest

    @property
    def goldens(self) -> list[Golden]:
        """What `evidence.json` lists, each file checked against it; empty where it lists none, or is missing.

        Raises `SlotError` for a golden that is missing, is no image with our record, or is not of this configuration.
        """
        entries = self.evidence.goldens if self.evidence else ()
        return [self._golden(entry.file, entry.prompt, entry.seed) for entry in entries]

    def _golden(self, name: str, prompt: str, seed: int) -> Golden:
        if Path(name).name != name:
            raise SlotError(f"a golden must be a file of {self.folder / 'golden'}; received {name!r}")
        path = self.folder / "golden" / name
        if not path.is_file():
            raise SlotError(f"the slot {self.folder} must hold every golden of its evidence; {name} is missing")
        try:
            record = read_record(path)
        except ImageError as error:
            raise SlotError(f"the golden {path} must be an image as it was promoted: {error}") from error
        for field, value in {"digest": self.digest, "prompt": prompt, "seed": seed}.items():
            if getattr(record, field) != value:
                raise SlotError(
                    f"the golden {path} must have the {field} {value!r} of its slot; received "
                    f"{getattr(record, field)!r}"
                )
        return Golden(path, prompt, seed, record)


def load_slot(folder: Path | str) -> Slot:
    """Read a slot. Raises `SlotError` where `config.toml` is missing, or `evidence.json` is damaged or speaks of
    another digest; `ConfigError` where `config.toml` or `serving.toml` breaks a rule."""
    folder = Path(folder)
    config_file, evidence_file = folder / "config.toml", folder / "evidence.json"
    if not config_file.is_file():
        raise SlotError(
            f"a slot must be a folder with a config.toml; received {str(folder)!r}. Example: service/promoted/nano"
        )
    config = _with_own_files(folder, GenerationConfig.from_toml(config_file))
    evidence = None
    if evidence_file.is_file():
        evidence = _read_evidence(evidence_file)
        if evidence.digest != config.digest:
            raise SlotError(
                f"the slot {folder} must hold one configuration: config.toml has the digest {config.digest}, but "
                f"evidence.json speaks of {evidence.digest!r}. Promote again, or restore the slot from git"
            )
    return Slot(folder, config, evidence, slot_limits(folder, config))


def _read_evidence(path: Path) -> Evidence:
    try:
        return Evidence.read(path.read_bytes(), str(path))
    except (OSError, RecordError) as error:
        raise SlotError(str(error)) from error


def slot_limits(folder: Path, config: GenerationConfig) -> ServingLimits:
    """What a slot's `serving.toml` says; where there is none, the limits that go with the model. Raises
    `ConfigError`."""
    file = folder / "serving.toml"
    if not file.is_file():
        return ServingLimits.for_model(config.model)
    limits = ServingLimits.from_toml(file)
    return limits.with_(loras=tuple(_found(folder, each, LORAS) for each in limits.loras))


Lora = TypeVar("Lora", LoraRef, OfferedLora)
Ref = TypeVar("Ref", LoraRef, OfferedLora, EmbeddingRef)


def _with_own_files(folder: Path, config: GenerationConfig) -> GenerationConfig:
    if not (config.loras or config.embeddings):
        return config
    return config.with_(
        loras=tuple(_found(folder, ref, LORAS) for ref in config.loras),
        embeddings=tuple(_found(folder, ref, EMBEDDINGS) for ref in config.embeddings),
    )


def _found(folder: Path, ref: Ref, place: str) -> Ref:
    """What has its file in a folder of the slot, with its path from here."""
    inside = Path(ref.source)
    own = len(inside.parts) == 2 and inside.parts[0] == place
    return ref.with_(source=str(folder / inside)) if own else ref


def slot_config(folder: Path | str) -> GenerationConfig | None:
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
        return _with_own_files(folder, GenerationConfig.from_toml(folder / "config.toml"))
    except (ConfigError, OSError) as error:
        raise SlotError(f"{rule}, whose config.toml is not a configuration: {error}. {example}") from error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
