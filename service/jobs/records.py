"""What the service writes into the store and reads back: the record of a durable job, and that of a stored image.

Each is a frozen model with a schema number. Files of 0.1.0 have none: they are read and brought to the schema of today.
A replica of 0.1.0 that shares the store during an update still reads a `JobRecord`, so it keeps the names of then.
"""

import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdxl_lab.config import GenerationConfig, canonical, migrated_config
from sdxl_lab.images import GeneratedImage
from sdxl_lab.job import ImageRequest, JobState

Written = Literal[JobState.QUEUED, JobState.RUNNING, JobState.STORING, JobState.FAILED, JobState.CANCELLED]


class RecordError(ValueError):
    """A file in the store is no record that this version can read."""


class Record(BaseModel):
    """Plain values under a schema number. `NOUN` is what errors call it."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True, validate_by_name=True)

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1

    @classmethod
    def read(cls, content: bytes, name: str) -> Self:
        """The record in a file. Raises `RecordError`."""
        try:
            plain = json.loads(content)
            if not isinstance(plain, dict):
                raise ValueError(f"it must be a JSON object; received {content[:40]!r}")
            return cls.model_validate(plain if "schema" in plain else cls.of_first_version(plain))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RecordError(f"{name} cannot be read: {where}: {first['msg']}; received {first['input']!r}") from error
        except (ValueError, KeyError) as error:
            raise RecordError(f"{name} cannot be read: {error!r}") from error

    @classmethod
    def of_first_version(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """What 0.1.0 wrote, as this schema has it."""
        raise NotImplementedError

    def to_json(self) -> bytes:
        return canonical(self.model_dump(mode="json")).encode()

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return type(self).model_validate(dict(self) | changes)


class JobRecord(Record):
    """A durable job, `jobs/<id>.json`: what makes the very same image again, how far it is, and who holds it.

    `fingerprint` tells the client's request from another under the same key. `promoted` is the digest of the
    configuration that was served, `overridden` the fields in which `config` differs from it. `source` is the stored
    image that is refined, with `strength`. The lease: `holder` is a replica, `renewed` seconds since 1970, `lease`
    seconds; `created` is when it was accepted, and `attempts` how often it was begun.
    """

    id: uuid.UUID
    created: float
    attempts: int
    fingerprint: Annotated[str, Field(alias="request")]
    prompt: str
    seed: int
    config: dict[str, Any]
    promoted: str
    overridden: tuple[str, ...]
    source: uuid.UUID | None = None
    strength: float | None = None
    state: Written = JobState.QUEUED
    holder: str = ""
    renewed: float = 0.0
    lease: float = 0.0

    @classmethod
    def of_first_version(cls, plain: dict[str, Any]) -> dict[str, Any]:
        return {**_migrated(plain), "schema": 1}

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
            source=None if source is None else uuid.UUID(source.record["id"]),
            strength=None if source is None else source.strength,
        )

    def request(self) -> ImageRequest:
        """What was asked, without the source's pixels. Raises `ConfigError`."""
        return ImageRequest(GenerationConfig.from_dict(self.config), self.prompt, self.seed)


class StoredImage(Record):
    """A stored image, `<id>.json`: the `record` that the PNG carries, and what the service adds.

    `created` is when it was stored, in seconds since 1970. `timings` (milliseconds) and `warnings` differ between two
    drawings of the same image, so they stand here and not in the PNG. An image that was put into the store by hand has
    neither `fingerprint` nor `timings`.
    """

    id: uuid.UUID
    created: float
    record: dict[str, Any]
    fingerprint: str | None = None
    timings: dict[str, float] | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_first_version(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Then all stood in one table; what the PNG carries is what is left."""
        record = _migrated(plain)
        return {
            "schema": 1,
            "id": record["id"],
            "created": record.pop("created"),
            "timings": record.pop("timings", None),
            "warnings": record.pop("warnings", ()),
            "fingerprint": record.pop("request", None),
            "record": record,
        }

    @classmethod
    def of(cls, job: JobRecord, image: GeneratedImage, warnings: list[str], created: float) -> Self:
        """The record of an image that was drawn for a job."""
        facts = {"id": str(job.id), "promoted": job.promoted, "overridden": list(job.overridden)}
        return cls(
            id=job.id,
            created=round(created, 3),
            record={**image.record, **facts},
            fingerprint=job.fingerprint,
            timings=dict(image.timings),
            warnings=tuple(warnings),
        )

    def request(self) -> ImageRequest:
        """What was asked, without the source's pixels. Raises `ConfigError`."""
        record = self.record
        return ImageRequest(GenerationConfig.from_dict(record["config"]), record["prompt"], record["seed"])

    def flat(self) -> Mapping[str, Any]:
        """All of it in one table, as clients are told."""
        facts = {"id": str(self.id), "created": self.created, "warnings": list(self.warnings)}
        more = {"timings": self.timings, "request": self.fingerprint}
        return {**self.record, **facts, **{name: value for name, value in more.items() if value is not None}}


def _migrated(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A record of 0.1.0 with its configuration as of today, and likewise that of the image that it refines."""
    config, _ = migrated_config(plain["config"])
    source = plain.get("source")
    more = {"source": _migrated(source)} if isinstance(source, Mapping) else {}
    return {**plain, "config": config.to_dict(), **more}
