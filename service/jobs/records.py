"""What the service writes into the store and reads back: the record of a durable job, and that of a stored image.

Each is a frozen model with a schema number. Files of 0.1.0 have none: they are read and brought to the schema of today.
A replica of 0.1.0 that shares the store during an update still reads a `JobRecord`, so it keeps the names of then.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field

from sdxl_lab.config import ConfigError, GenerationConfig, migrated_config
from sdxl_lab.images import GeneratedImage
from sdxl_lab.job import ImageRequest, JobState
from sdxl_lab.record import AnyDigest, ImageRecord, Record, RecordError

Written = Literal[JobState.QUEUED, JobState.RUNNING, JobState.STORING, JobState.FAILED, JobState.CANCELLED]


class JobRecord(Record):
    """A durable job, `jobs/<id>.json`: what makes the very same image again, how far it is, and who holds it.

    `fingerprint` tells the client's request from another under the same key. `promoted` is the digest of the
    configuration that was served, `overridden` the fields in which `config` differs from it. `source` is the stored
    image that is refined, with `strength`. The lease: `holder` is a replica, `renewed` seconds since 1970, `lease`
    seconds; `created` is when it was accepted, and `attempts` how often it was begun.
    """

    model_config = ConfigDict(validate_by_name=True)
    NOUN: ClassVar[str] = "the job"

    id: uuid.UUID
    created: float
    attempts: int
    fingerprint: Annotated[str, Field(alias="request")]
    prompt: str
    seed: int
    config: dict[str, Any]
    promoted: AnyDigest
    overridden: tuple[str, ...]
    source: uuid.UUID | None = None
    strength: float | None = None
    prompt_2: str | None = None
    state: Written = JobState.QUEUED
    holder: str = ""
    renewed: float = 0.0
    lease: float = 0.0

    @classmethod
    def of_first_version(cls, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        try:
            config, _ = migrated_config(plain["config"])
        except (ConfigError, KeyError, TypeError) as error:
            raise RecordError(f"{cls.NOUN} of {name} must hold a configuration: {error}") from error
        return {**plain, "schema": cls.SCHEMA, "config": config.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those that are None among them: 0.1.0 asks for each, and knows no second prompt."""
        return self.model_dump(mode="json", exclude={"prompt_2"} if self.prompt_2 is None else None)

    @classmethod
    def of(
        cls, id: uuid.UUID, request: ImageRequest, promoted: GenerationConfig, fingerprint: str, created: float
    ) -> Self:
        """The record of a job that is begun for the first time."""
        source = request.source
        return cls(
            id=id,
            created=round(created, 3),
            attempts=1,
            fingerprint=fingerprint,
            prompt=request.prompt,
            seed=request.seed,
            config=request.config.to_dict(),
            promoted=promoted.digest,
            overridden=tuple(request.config.differs(promoted)),
            source=None if source is None or source.record is None else uuid.UUID(source.record.id),
            strength=None if source is None else source.strength,
            prompt_2=request.prompt_2,
        )

    def request(self) -> ImageRequest:
        """What was asked, without the source's pixels. Raises `ConfigError`."""
        return ImageRequest(GenerationConfig.from_dict(self.config), self.prompt, self.seed, prompt_2=self.prompt_2)


def _without_places(config: GenerationConfig) -> GenerationConfig:
    """The configuration as clients see it: a LoRA whose checksum is known by its file's name, without its folder. The
    digest is the same."""
    named = [
        ref.with_(source=Path(ref.source).name) if ref.sha256 and ref.file is None else ref for ref in config.loras
    ]
    return config.with_(loras=named) if named else config


class StoredImage(Record):
    """A stored image, `<id>.json`: the `record` that the PNG carries, and what the service adds.

    `created` is when it was stored, in seconds since 1970. `timings` (milliseconds) and `warnings` differ between two
    drawings of the same image, so they stand here and not in the PNG. An image that was put into the store by hand has
    neither `fingerprint` nor `timings`.
    """

    NOUN: ClassVar[str] = "the record"

    id: uuid.UUID
    created: float
    record: ImageRecord
    fingerprint: str | None = None
    timings: dict[str, float] | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_first_version(cls, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """Then all stood in one table; what the PNG carries is what is left."""
        rest = dict(plain)
        found = {
            "schema": cls.SCHEMA,
            "id": rest.get("id"),
            "created": rest.pop("created", None),
            "timings": rest.pop("timings", None),
            "warnings": rest.pop("warnings", ()),
            "fingerprint": rest.pop("request", None),
        }
        return found | {"record": ImageRecord.read(rest, name).to_dict()}

    @classmethod
    def of(cls, job: JobRecord, image: GeneratedImage, warnings: list[str], created: float) -> Self:
        """The record of an image that was drawn for a job."""
        return cls(
            id=job.id,
            created=round(created, 3),
            record=image.record.with_(
                id=str(job.id),
                promoted=job.promoted,
                overridden=job.overridden,
                config=_without_places(image.record.config),
            ),
            fingerprint=job.fingerprint,
            timings=dict(image.timings),
            warnings=tuple(warnings),
        )

    def request(self) -> ImageRequest:
        """What was asked, without the source's pixels. Raises `ConfigError`."""
        return ImageRequest(self.record.config, self.record.prompt, self.record.seed, prompt_2=self.record.prompt_2)

    def flat(self) -> Mapping[str, Any]:
        """All of it in one table, as clients are told."""
        facts = {"id": str(self.id), "created": self.created, "warnings": list(self.warnings)}
        more = {"timings": self.timings, "request": self.fingerprint}
        return {**self.record.to_dict(), **facts, **{name: value for name, value in more.items() if value is not None}}
