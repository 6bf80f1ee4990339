"""The OpenAI images API on the wire: what its clients send, and what they understand, errors too.

The routes are in `service/api/openai.py`. `QUALITIES`, `REFUSED` and `CODES` are code and documentation.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from sdxl_lab.config import ConfigError, GenerationConfig, ServingLimits
from service.api.problems import ENTRIES, Problem
from service.api.schemas import Closed, GenerateRequest, Prompt, Writable
from service.deployment import UnknownModel

PREFIX = "/v1"
AUTO = "auto"  # the model that is served, whatever its name
QUALITIES: Mapping[str, float] = {  # the promoted number of steps, times this, within the promoted limits
    "low": 0.5,
    "medium": 1.0,
    "standard": 1.0,
    "auto": 1.0,
    "high": 1.5,
    "hd": 1.5,
    "xhigh": 2.0,
    "max": 3.0,
}
TOLD_AS = {"standard": "medium", "auto": "medium", "hd": "high"}  # answers have the newer words only
REFUSED: Mapping[str, str] = {
    "style": "a style is said in the prompt",
    "complexity": "nothing is planned before the image is drawn",
    "frame_count": "an image does not move",
    "frame_duration_ms": "an image does not move",
    "svg": "images are pixels",
}
CODES: Mapping[str, str] = {"unauthorized": "invalid_api_key", "queue-full": "rate_limit_exceeded"}
FINAL = (409, 507)  # the official client would try these again, in vain
EXAMPLES: Mapping[str, Any] = {
    "body": '{"prompt": "A cat in a hat"}',
    "prompt": "A cat in a hat",
    "model": AUTO,
    "n": 2,
    "size": "256x256",
    "quality": "high",
    "response_format": "b64_json",
    "output_format": "webp",
    "output_compression": 90,
    "stream": True,
    "partial_images": 2,
    "background": "opaque",
    "moderation": "auto",
    "user": "user-1234",
    "idempotency-key": "order-4711",
}

Form = Literal["png", "webp", "jpeg"]
Quality = Literal["low", "medium", "high", "xhigh", "max"]


class ImagesRequest(Closed):
    """Images to draw, as OpenAI's clients ask for them. What is left out or null is as promoted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "A cat in a hat"},
                {"model": AUTO, "prompt": "A cat in a hat", "n": 3, "size": "256x256", "response_format": "url"},
                {"prompt": "A cat in a hat", "stream": True, "partial_images": 2},
            ]
        }
    )

    prompt: Prompt
    model: Writable | None = Field(None, description=f"the slot's name, or `{AUTO}`: whatever is served")
    n: int | None = Field(None, ge=1, le=10, description="images: all of them, or an error")
    size: Writable | None = Field(
        None, description="`256x256`: width and height, multiples of 8 within the promoted limits; `auto`: as promoted"
    )
    quality: Literal["low", "medium", "standard", "auto", "high", "hd", "xhigh", "max"] | None = Field(
        None,
        description="the promoted number of steps, times: "
        + ", ".join(f"{name} {factor:g}" for name, factor in QUALITIES.items()),
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="left out: `b64_json`")
    output_format: Form | None = Field(None, description="left out: `png`, which carries the record")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="the quality of webp and jpeg; left out: 100"
    )
    stream: bool | None = Field(None, description="answer with events")
    partial_images: int | None = Field(None, ge=0, le=3, description="previews of each image; goes with `stream`")
    background: Literal["opaque", "auto"] | None = Field(None, description="images are opaque")
    moderation: Literal["low", "auto"] | None = Field(None, description="without effect: prompts are not judged here")
    user: Writable | None = Field(None, description="without effect, and not kept")
    safety_identifier: Writable | None = Field(None, description="without effect, and not kept")

    @model_validator(mode="before")
    @classmethod
    def _none_refused(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        for name, why in REFUSED.items():
            if content.get(name) is not None:
                raise PydanticCustomError("refused", "must be left out: {why}", {"field": name, "why": why})
        return {name: value for name, value in content.items() if name not in REFUSED}

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.stream and self.response_format == "url":
            raise _disagree(
                "response_format", "must be b64_json, or left out, where stream is true: events hold images"
            )
        if self.partial_images and not self.stream:
            raise _disagree("partial_images", "must be 0, or left out, where stream is not true")
        if self.output_compression not in (None, 100) and self.form == "png":
            raise _disagree("output_compression", "goes with output_format webp or jpeg; a PNG loses nothing")
        return self

    @property
    def count(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def form(self) -> Form:
        return self.output_format or "png"

    @property
    def compression(self) -> int | None:
        """The quality for a form that has one, 1 to 100."""
        return (
            None if self.form == "png" else max(1, 100 if self.output_compression is None else self.output_compression)
        )

    @property
    def told_quality(self) -> Quality:
        asked = self.quality or "auto"
        told: Quality = TOLD_AS.get(asked, asked)  # type: ignore[assignment]
        return told

    def over(self, promoted: GenerationConfig, limits: ServingLimits) -> GenerationConfig:
        """The promoted configuration with what was asked. Raises `ConfigError`."""
        changes: dict[str, Any] = {}
        if self.size not in (None, AUTO):
            changes |= _sides(self.size)
        factor = QUALITIES[self.quality or "auto"]
        if factor != 1:
            low, high = limits.steps
            changes["steps"] = min(high, max(low, round(promoted.steps * factor)))
        try:
            return GenerateRequest(prompt=self.prompt, **changes).over(promoted, limits)
        except ConfigError as error:
            if error.field in ("width", "height"):
                raise ConfigError("size", self.size, f"width x height, each {error.rule}", _size(promoted)) from error
            raise


def _sides(size: str) -> dict[str, int]:
    sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size, re.ASCII)
    if sides is None:
        raise ConfigError("size", size, f"width x height in pixels, or {AUTO}", EXAMPLES["size"])
    return {"width": int(sides[1]), "height": int(sides[2])}


def _size(config: GenerationConfig) -> str:
    return f"{config.width}x{config.height}"


def _disagree(field: str, rule: str) -> PydanticCustomError:
    return PydanticCustomError("disagree", rule, {"field": field})


def check_model(asked: str | None, served: str) -> None:
    """Whether a model's name means the slot that is served; `UnknownModel` if not."""
    if asked not in (None, AUTO, served):
        raise UnknownModel("model", asked, f"{served}, the one that is served, or {AUTO}", served)


# --- answers ---------------------------------------------------------------------------------------------------------


class Image(BaseModel):
    """An image: its bytes in base64, or where it can be fetched."""

    b64_json: str | None = None
    url: str | None = None


class ImagesAnswer(BaseModel):
    """The images. `created` in seconds since 1970; `size` is width x height. `warnings`, which are ours, tell which
    words of the prompt were cut."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "created": 1790000000,
                    "data": [{"b64_json": "iVBORw0KGgo..."}],
                    "output_format": "png",
                    "size": "256x256",
                    "quality": "medium",
                    "background": "opaque",
                }
            ]
        }
    )

    created: int
    data: list[Image]
    output_format: Form
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    warnings: list[str] | None = None


class Model(BaseModel):
    """The slot that is served. `created`: when it was promoted, in seconds since 1970."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": "nano", "object": "model", "created": 1790000000, "owned_by": "sdxl-lab"}]
        }
    )

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sdxl-lab"] = "sdxl-lab"


class ModelList(BaseModel):
    """All models there are: one."""

    object: Literal["list"] = "list"
    data: list[Model]


# --- errors ----------------------------------------------------------------------------------------------------------


class Error(BaseModel):
    """What went wrong. `param` is the field, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error's body."""

    error: Error


def error_of(problem: Problem) -> dict[str, Any]:
    """A problem as OpenAI's clients understand it."""
    status = problem.status
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    code = problem.kind and CODES.get(problem.kind, problem.kind.replace("-", "_"))
    request_id = problem.extra.get("request_id")
    message = problem.detail if request_id is None else f"{problem.detail}: {request_id}"
    return {"error": {"message": message, "type": kind, "param": problem.content().get("field"), "code": code}}


def speaks(path: str) -> bool:
    """Whether a path, without the prefix of a proxy, is one of this API's."""
    return path.startswith(f"{PREFIX}/")


def error_response(problem: Problem) -> Response:
    """The same as an answer. What their API refuses with 400 is 422 elsewhere here."""
    headers = dict(problem.headers)
    if problem.status in FINAL:
        headers["x-should-retry"] = "false"
    status = 400 if problem.status == 422 else problem.status
    return Response(json.dumps(error_of(problem)), status, headers, "application/json")


def answers(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses for some of the kinds of `problems.TABLE`, with an example of each, by status."""
    described: dict[int | str, dict[str, Any]] = {
        kind: {"model": ErrorBody, "description": "An error"} for kind in ("4XX", "5XX")
    }
    for entry in ENTRIES:
        if entry.kind in kinds:
            problem = Problem(entry.status, entry.title, entry.kind, entry.title)
            status = error_response(problem).status_code
            response = described.setdefault(
                status, {"model": ErrorBody, "description": "", "content": {"application/json": {"examples": {}}}}
            )
            response["description"] = "; ".join(filter(None, (response["description"], entry.title)))
            response["content"]["application/json"]["examples"][entry.kind] = {"value": error_of(problem)}
            if entry.retry_after is not None:
                response["headers"] = {
                    "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}
                }
    return described
