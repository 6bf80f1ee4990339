"""What goes over the wire: requests with strict types, and answers.

What may be asked of an image, its types, bounds, words and examples come from the declaration of `GenerationConfig`;
here stand what else a request has, and how it goes over a promoted configuration.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from sdxl_lab.config import MAX_PROMPT, MAX_SEED, PROMPT, PROMPT_2, SEED, GenerationConfig, ServingLimits
from sdxl_lab.declaration import Pair, Setting, Table, Tables, Text
from sdxl_lab.job import JobState
from sdxl_lab.record import ImageRecord
from sdxl_lab.syntax import networks
from service.jobs.records import JobRecord, StoredImage


def _example(setting: Setting) -> Any:
    match setting.kind:
        case Table():
            return True
        case Tables():
            return [{"name": "outlines", "weight": 0.6}]
    return setting.example


EXAMPLES: Mapping[str, Any] = {
    **{
        setting.name: _example(setting)
        for setting in (PROMPT, PROMPT_2, SEED, *GenerationConfig.settings().values())
        if setting.client
    },
    "body": '{"prompt": "A cat in a hat"}',
    "id": "0b8ff2ee-3c51-4c1c-a9c5-7c8b3b1f5a10",
    "strength": 0.3,
    "format": "webp",
    "quality": 90,
    "limit": 24,
    "cursor": "000001764072000-0b8ff2ee-3c51-4c1c-a9c5-7c8b3b1f5a10",
    "previews": True,
    "idempotency-key": "order-4711",
}


def _writable(text: str) -> str:
    """JSON's escapes can write what no file and no tokenizer takes."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("text", "must be Unicode text without NUL and without lone surrogates")
    return text


Writable = Annotated[str, AfterValidator(_writable)]
# The length is judged first: Pydantic then speaks of characters, not of items.
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT), AfterValidator(_writable)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Closed(BaseModel):
    """A request: unknown fields are refused, and no text passes for a number."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _names_known(cls, content: Any) -> Any:
        for name in content if isinstance(content, Mapping) else ():
            if name not in cls.model_fields:
                fields = ", ".join(cls.model_fields)
                shown = str(name).encode("utf-8", "backslashreplace").decode()
                raise PydanticCustomError(
                    "unknown", "no such field; there are {fields}", {"field": shown, "fields": fields}
                )
        return content


class AskedLora(Closed):
    """A LoRA that the slot offers, by its name, and how much of it."""

    name: str = Field(min_length=1, max_length=64, description="one of `limits.loras` in `/config`")
    weight: float | None = Field(None, description="within the promoted limits; left out: the highest there")


def _type(setting: Setting) -> Any:
    """A setting's type on the wire. What a number may be is said by its rule and the slot's limits, in one sentence."""
    match setting.kind:
        case Table():
            return bool
        case Tables(most=most):
            return Annotated[list[AskedLora], Field(max_length=most)]
        case Text(low=low, high=high):
            return Annotated[str, Field(min_length=low or None, max_length=high), AfterValidator(_writable)]
        case Pair(checked=checked):
            return checked
    return setting.kind.type


def _field(setting: Setting, default: str) -> Any:
    unit = f" ({setting.unit})" if setting.unit else ""
    limits = "; within the promoted limits" if setting.limited_by else ""
    return _type(setting) | None, Field(None, description=f"{setting.help}{unit}{limits}; left out: {default}")


# What a client may ask for, as the declaration of the settings says it.
CLIENTS = {name: setting for name, setting in GenerationConfig.settings().items() if setting.client}
_Generate: Any = create_model(
    "_Generate",
    __base__=Closed,
    prompt=(Prompt, Field(description=PROMPT.help)),
    prompt_2=(Prompt | None, Field(None, description=PROMPT_2.help)),
    **{name: _field(setting, "as promoted") for name, setting in CLIENTS.items()},
    seed=(Seed | None, Field(None, description=f"{SEED.help}; left out: chosen at random")),
)
_Refine: Any = create_model(
    "_Refine",
    __base__=Closed,
    id=(str, Field(description="the stored image's id")),
    prompt=(Prompt | None, Field(None, description=f"{PROMPT.help}; left out: that of the stored image")),
    prompt_2=(Prompt | None, Field(None, description=f"{PROMPT_2.help}; with no prompt either: the stored image's")),
    negative_prompt=_field(CLIENTS["negative_prompt"], "that of the stored image"),
    negative_prompt_2=_field(CLIENTS["negative_prompt_2"], "with no negative prompt either that of the stored image"),
    strength=(float, Field(0.3, gt=0, le=1, description="how much of the noise schedule is gone through again")),
    steps=_field(CLIENTS["steps"], "as promoted"),
    seed=(Seed | None, Field(None, description=f"{SEED.help}; left out: chosen at random")),
)


class GenerateRequest(_Generate):
    """An image to draw. What is left out is as promoted; the seed is then chosen at random."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "A cat in a hat"}]})

    def over(self, promoted: GenerationConfig, limits: ServingLimits) -> GenerationConfig:
        """The promoted configuration with what was asked. Raises `ConfigError`."""
        asked = {name: value for name in CLIENTS if (value := getattr(self, name)) is not None}
        limits.check(asked, promoted)
        loras = [lora.model_dump() for lora in asked.pop("loras", ())]
        if promoted.prompt_syntax == "a1111":
            loras += _named([self.prompt, self.prompt_2], loras, limits)
        if loras:
            asked["loras"] = limits.with_asked(loras, promoted)
        return promoted.changed(asked, none=None)


def _named(prompts: Sequence[str | None], asked: Sequence[Mapping[str, Any]], limits: ServingLimits) -> list[Any]:
    """The LoRAs that prompts name, as a client asks for them. Their weights are within the limits like any others."""
    found = {}
    for network in (each for prompt in prompts if prompt for each in networks(prompt)[1]):
        try:
            text, unet = network.weights
        except ValueError:  # refused when the request is made
            continue
        found[network.name] = {"name": network.name, "weight": unet}
        limits.with_asked([{"name": network.name, "weight": text}], GenerationConfig())
    return [one for name, one in found.items() if name not in {each["name"] for each in asked}]


class RefineRequest(_Refine):
    """A stored image that the refiner goes over again."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": EXAMPLES["id"], "strength": 0.3}]})

    def over(
        self, promoted: GenerationConfig, limits: ServingLimits, source: ImageRecord, size: tuple[int, int]
    ) -> GenerationConfig:
        """The promoted configuration for an image of this (width, height) with this record. Raises `ConfigError`."""
        asked: dict[str, Any] = {"width": size[0], "height": size[1]}
        if self.steps is not None:
            asked["steps"] = self.steps
        limits.check(asked, promoted)
        negative, second = self.negative_prompt, self.negative_prompt_2
        if negative is None:
            negative = source.config.negative_prompt
            second = second or source.config.negative_prompt_2
        if self.prompt is None:  # the stored image's is written as its configuration has it
            asked["prompt_syntax"] = source.config.prompt_syntax
            if source.config.prompt_syntax == "a1111":  # it may name them
                asked["loras"] = source.config.loras
        elif promoted.prompt_syntax == "a1111" and (loras := _named([self.prompt, self.prompt_2], (), limits)):
            asked["loras"] = limits.with_asked(loras, promoted)
        return promoted.changed(asked | {"negative_prompt": negative, "negative_prompt_2": second}, none=None)

    def prompts(self, source: ImageRecord) -> dict[str, Any]:
        """The prompts for an image with this record. A new prompt does away with both of the stored ones."""
        if self.prompt is not None:
            return {"prompt": self.prompt, "prompt_2": self.prompt_2}
        return {"prompt": source.prompt, "prompt_2": self.prompt_2 or source.prompt_2}


def bounded(document: dict[str, Any], limits: ServingLimits) -> dict[str, Any]:
    """An OpenAPI document with what the requests may hold. FastAPI writes bounds as floats: no seed is exact there."""
    kinds = {name: limits.narrowed(setting).kind for name, setting in CLIENTS.items()} | {"seed": SEED.kind}
    for model in (GenerateRequest, RefineRequest):
        fields = document["components"]["schemas"][model.__name__]["properties"]
        for name in kinds.keys() & fields.keys():
            fields[name]["anyOf"][0] |= kinds[name].json_schema  # the other is null
    if offered := [each.name for each in limits.loras]:
        document["components"]["schemas"][AskedLora.__name__]["properties"]["name"]["enum"] = offered
    return document


class Timings(BaseModel):
    """Milliseconds: in the queue, from there to the decoded image, all together."""

    queued_ms: float
    denoise_ms: float
    total_ms: float


DRAWN = {
    "id": EXAMPLES["id"],
    "url": f"/download/{EXAMPLES['id']}",
    "seed": 7,
    "width": 256,
    "height": 256,
    "config": "9f2c51c0a7de",
    "overridden": ["steps"],
    "timings": {"queued_ms": 12.1, "denoise_ms": 840.5, "total_ms": 871.0},
}


class DrawnImage(BaseModel):
    """An image that is drawn and stored. `config` is the promoted digest; `overridden` names what differs from it."""

    model_config = ConfigDict(json_schema_extra={"examples": [DRAWN]})

    id: str
    url: str
    seed: int
    width: int
    height: int
    config: str
    overridden: list[str]
    timings: Timings | None = Field(None, description="left out for an image that was put into the store by hand")
    warnings: list[str] = []

    @classmethod
    def of(cls, image: StoredImage, prefix: str = "") -> Self:
        """The answer for a stored image. `prefix` is the path that the service is mounted at."""
        return cls(**_answer(image, prefix))


class RefinedImage(DrawnImage):
    """A refined image, and the id of the one it comes from."""

    model_config = ConfigDict(json_schema_extra={"examples": [DRAWN | {"source": EXAMPLES["id"]}]})

    source: str | None

    @classmethod
    def of(cls, image: StoredImage, prefix: str = "") -> Self:
        return cls(**_answer(image, prefix), source=source_id(image))


def source_id(image: StoredImage) -> str | None:
    """The id of the image that this one refines."""
    return image.record.source.id if image.record.source else None


def _answer(image: StoredImage, prefix: str) -> dict[str, Any]:
    record = image.record
    width, height = record.config.drawn_size
    return {
        "id": str(image.id),
        "url": f"{prefix}/download/{image.id}",
        "seed": record.seed,
        "width": width,
        "height": height,
        "config": record.promoted or record.digest,
        "overridden": list(record.overridden or ()),
        "timings": image.timings,
        "warnings": list(image.warnings),
    }


class Accepted(BaseModel):
    """An image that will be drawn: its id, and where its state is told."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": EXAMPLES["id"], "url": f"/images/{EXAMPLES['id']}"}]}
    )

    id: str
    url: str


class Chosen(BaseModel):
    """The settings that people compare images by."""

    scheduler: str
    steps: int
    guidance_scale: float
    refiner: bool


State = Literal["queued", "running", "done", "failed", "cancelled"]
# The states of a job in the words of the contract.
TOLD: Mapping[JobState, State] = {
    JobState.ACCEPTED: "queued",
    JobState.QUEUED: "queued",
    JobState.RUNNING: "running",
    JobState.STORING: "running",
    JobState.DONE: "done",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
INFO = {
    **{name: DRAWN[name] for name in ("id", "url", "seed", "width", "height", "config", "overridden", "timings")},
    "state": "done",
    "prompt": EXAMPLES["prompt"],
    "negative_prompt": EXAMPLES["negative_prompt"],
    "settings": {"scheduler": "euler", "steps": 20, "guidance_scale": 5.0, "refiner": False},
    "created": 1790000000.25,
}


class ImageInfo(BaseModel):
    """An image, stored or on its way. What is not known, or not yet, is left out."""

    model_config = ConfigDict(json_schema_extra={"examples": [INFO]})

    id: str
    state: State
    url: str
    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    seed: int
    width: int
    height: int
    settings: Chosen
    config: str | None = Field(None, description="the digest of the configuration that was promoted then")
    overridden: list[str] | None = Field(None, description="the fields that differ from it")
    created: float | None = Field(None, description="seconds since 1970")
    timings: Timings | None = None
    warnings: list[str] | None = None
    source: str | None = Field(None, description="the id of the image that this one refines")
    position: int | None = Field(None, description="the place in the queue, from 1")
    eta: float | None = Field(None, description="seconds until it is drawn")
    step: int | None = Field(None, description="UNet calls made")
    steps: int | None = Field(None, description="UNet calls in all")
    record: dict[str, Any] | None = Field(None, description="all that repeats the image; of a single one only")

    @classmethod
    def of(cls, image: StoredImage, prefix: str = "", **more: Any) -> Self:
        """What is known of a stored image."""
        record = image.record
        return cls(
            **_asked(str(image.id), record.config.to_dict(), prefix),
            state="done",
            prompt=record.prompt,
            prompt_2=record.prompt_2,
            seed=record.seed,
            config=record.promoted or record.digest,
            overridden=None if record.overridden is None else list(record.overridden),
            created=image.created,
            timings=None if image.timings is None else Timings(**image.timings),
            warnings=list(image.warnings) or None,
            source=source_id(image),
            **more,
        )

    @classmethod
    def of_job(cls, job: JobRecord, state: State, prefix: str = "", **more: Any) -> Self:
        """What was written down of an image that is to be drawn."""
        return cls(
            **_asked(str(job.id), job.config, prefix),
            state=state,
            prompt=job.prompt,
            prompt_2=job.prompt_2,
            seed=job.seed,
            config=job.promoted,
            overridden=list(job.overridden),
            created=job.created,
            source=None if job.source is None else str(job.source),
            **more,
        )


def _asked(id: str, config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        "id": id,
        "url": f"{prefix}/download/{id}",
        "negative_prompt": config.get("negative_prompt"),
        "width": config["width"],
        "height": config["height"],
        "settings": Chosen(
            scheduler=config["scheduler"],
            steps=config["steps"],
            guidance_scale=config["guidance_scale"],
            refiner=config.get("refiner") is not None,
        ),
    }


class ImagePage(BaseModel):
    """Stored images, the newest first; `next` is the cursor of the page after this one."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": [INFO]}]})

    images: list[ImageInfo]
    next: str | None = None


class Wanted(BaseModel):
    """The form in which an image is wanted. `quality` goes with webp and jpeg only."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["png", "webp", "jpeg"] = "png"
    quality: int | None = Field(None, ge=1, le=100)

    @model_validator(mode="after")
    def _quality_has_a_use(self) -> Self:
        if self.quality is not None and self.format == "png":
            raise PydanticCustomError(
                "quality", "goes with format=webp or format=jpeg; a PNG has none", {"field": "quality"}
            )
        return self
