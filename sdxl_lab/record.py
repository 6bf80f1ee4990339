"""Records: what is written as JSON and read back, each of one class with a schema number; first of all the image's.

Whatever is read is validated. A record without a schema number is one of 0.1.0: its class reads it in a form of its
own, or refuses it with the command that migrates it. Imports no torch.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sdxl_lab.config import MAX_PROMPT, MAX_SEED, ConfigError, GenerationConfig, migrated_config
from sdxl_lab.syntax import bare

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", examples=["0" * 64])]
# Of a configuration that is not at hand, 0.1.0's digest of 12 digits is all that is known.
AnyDigest = Annotated[str, Field(pattern="^([0-9a-f]{12}|[0-9a-f]{64})$", examples=["0" * 64])]


class RecordError(ValueError):
    """A record breaks a rule of its schema, or is of a schema that this version does not know."""


class Record(BaseModel):
    """Plain values under a schema number. Derive, and give `NOUN`, the words that errors use for it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", serialize_by_alias=True)
    NOUN: ClassVar[str]
    SCHEMA: ClassVar[int] = 1

    schema_number: Annotated[int, Field(alias="schema")] = 1

    @classmethod
    def read(cls, content: str | bytes | Mapping[str, Any], name: str) -> Self:
        """The record in a JSON text, or of its plain values. `name` says in errors where it stands. Raises
        `RecordError`."""
        try:
            plain = json.loads(content) if isinstance(content, str | bytes) else content
        except ValueError as error:  # JSON's own, and bytes that are no text
            raise RecordError(f"{cls.NOUN} of {name} must be JSON; {error}") from error
        if not isinstance(plain, Mapping):
            raise RecordError(f"{cls.NOUN} of {name} must be a JSON object; received {_shown(plain)}")
        if "schema" not in plain:
            plain = cls.of_first_version(plain, name)
        elif plain["schema"] != cls.SCHEMA:
            raise RecordError(
                f"{cls.NOUN} of {name} must have the schema {cls.SCHEMA}; received {_shown(plain['schema'])}. A newer "
                "version wrote it: update this one"
            )
        try:
            return cls.model_validate_json(json.dumps(plain))
        except ValidationError as error:
            raise RecordError(f"{cls.NOUN} of {name} is damaged: {cls._refusal(error)}") from error

    @classmethod
    def of_first_version(cls, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """What 0.1.0 wrote, as this schema has it. Raises `RecordError` where that cannot be known."""
        raise RecordError(
            f"{cls.NOUN} of {name} must have a schema number; received none. Example: schema = {cls.SCHEMA}"
        )

    @classmethod
    def _refusal(cls, error: ValidationError) -> str:
        """The first thing that pydantic refused: rule, value, example."""
        first = error.errors(include_url=False)[0]
        ours = first.get("ctx", {}).get("error")
        if isinstance(ours, ConfigError):
            return str(ours)
        name = ".".join(str(part) for part in first["loc"])
        field = cls.model_fields.get(str(first["loc"][0])) if first["loc"] else None
        examples = field.examples if field else None
        example = f". Example: {first['loc'][0]} = {json.dumps(examples[0])}" if examples else ""
        if first["type"] == "missing":
            return f"it lacks {name}{example}"
        if first["type"] == "extra_forbidden":
            return f"{name} is no field of it; those are {', '.join(cls.model_fields)}".replace(
                "schema_number", "schema"
            )
        rule = first["msg"].replace("Input should", "must").replace("String should", "must")
        return f"{name} {rule}; received {_shown(first['input'])}{example}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them; what is None is left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """`to_dict` as text for people to read."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        kept = {name: getattr(self, name) for name in type(self).model_fields if name != "schema_number"}
        return type(self).model_validate(kept | changes)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _finite(settings: dict[str, Any]) -> dict[str, Any]:
    """What JSON has no number for, as text: DPM-Solver's `lambda_min_clipped` is `-inf` unless someone sets it."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
    }


class TokenCount(BaseModel):
    """How long a text is for the text encoders: its `tokens` without marks, the `limit` beyond which they are cut, and
    the words that are cut. Without a limit nothing is."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    tokens: Annotated[int, Field(ge=0)]
    limit: int | None = None
    beyond: str | None = None

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.limit is None else f"{self.tokens} of {self.limit} tokens"

    def warning(self, name: str) -> str | None:
        """A sentence where words were cut off the text `name`."""
        if self.beyond is None:
            return None
        return (
            f"{name}: the text encoders read {self.limit} of its {self.tokens} tokens and cut {self.beyond!r}; "
            'prompt_syntax = "a1111" cuts nothing'
        )


class SourceRecord(BaseModel):
    """What an image started from: the checksum of the upright RGB pixels, their width and height, which `stage` went
    over them, how they were fitted, and the same of a mask."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    sha256: Digest
    size: tuple[int, int]
    stage: Literal["base", "refiner"]
    fit: str
    mask_sha256: Digest | None = None
    mask_blur: float | None = None


class ImageRecord(Record):
    """What an image was made of, and all that makes it again.

    `sampler` is A1111's name of the scheduler, `scheduler` its class and whole config as it was used. `unet_calls` and
    `unet_rows` are by stage, base and refiner. `weights` is the identity of the models by role. An image that started
    from another one has the `strength` and that one's `source_image`, and if it was drawn here its record as `source`;
    one of 0.1.0 has that alone. One that a service drew has its `id`, the digest of the configuration that was
    `promoted` there, and the names of the settings that the client has `overridden`. `tokens` says how much of each of
    its texts was read; an image of 0.1.0 has none.
    """

    NOUN: ClassVar[str] = "the record"

    version: Annotated[str, Field(examples=["0.2.0"])]
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, examples=["A cat in a hat"])]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, examples=[7])]
    config: GenerationConfig
    digest: Digest
    sampler: Annotated[str, Field(examples=["Euler"])]
    scheduler: Annotated[dict[str, Any], AfterValidator(_finite), Field(examples=[{"class": "EulerDiscreteScheduler"}])]
    unet_calls: Annotated[dict[str, int], Field(examples=[{"base": 25}])]
    unet_rows: Annotated[dict[str, int], Field(examples=[{"base": 50}])]
    weights: Annotated[dict[str, str], Field(examples=[{"base": "sha256 ..."}])]
    runtime: Annotated[dict[str, Any], Field(examples=[{"device": "cpu", "dtype": "float32"}])]
    libraries: Annotated[dict[str, str], Field(examples=[{"torch": "2.13.0"}])]
    source: "ImageRecord | None" = None
    strength: Annotated[float | None, Field(gt=0, le=1, examples=[0.3])] = None
    id: Annotated[str | None, Field(examples=["1b4e28ba-2fa1-11d2-883f-0016d3cca427"])] = None
    promoted: AnyDigest | None = None
    overridden: Annotated[tuple[str, ...] | None, Field(examples=[["steps"]])] = None
    prompt_2: Annotated[str | None, Field(min_length=1, max_length=MAX_PROMPT)] = None
    tokens: Annotated[dict[str, TokenCount] | None, Field(examples=[{"prompt": {"tokens": 5, "limit": 75}}])] = None
    source_image: SourceRecord | None = None

    @property
    def stage(self) -> Literal["base", "refiner"] | None:
        """Which stage went over the source; None for an image from noise."""
        if self.source_image is not None:
            return self.source_image.stage
        return None if self.source is None else "refiner"  # in 0.1.0 nothing else did

    @property
    def words(self) -> str:
        """The prompt's words without their notation."""
        return bare(self.prompt, self.config.steps) if self.config.prompt_syntax == "a1111" else self.prompt

    @property
    def warnings(self) -> list[str]:
        """A sentence for each text of which words were cut."""
        told = (count.warning(name) for name, count in (self.tokens or {}).items())
        return [each for each in told if each is not None]

    @classmethod
    def of_first_version(cls, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """The configuration without what clients may ask for, and its digest. The negative prompt stood there twice.

        A `promoted` digest that is another's stays as it was: the configuration that it named is not in the record.
        """
        found = {key: value for key, value in plain.items() if key != "negative_prompt"}
        try:
            config, _ = migrated_config(found["config"])
        except (ConfigError, KeyError, TypeError) as error:
            raise RecordError(f"{cls.NOUN} of {name} must hold a configuration: {error}") from error
        if found.get("promoted") == found.get("digest"):
            found = {key: config.digest if key == "promoted" else value for key, value in found.items()}
        if "source" in found:
            found["source"] = cls.read(found["source"], f"the source of {name}").to_dict()
        return found | {"schema": cls.SCHEMA, "config": config.to_dict(), "digest": config.digest}
