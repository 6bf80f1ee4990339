"""Errors to HTTP: one table from the classes of what went wrong inside to what the client is told (RFC 9457)."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sdxl_lab.config import ConfigError
from sdxl_lab.errors import Cancelled, EngineStopped, ModelMismatch, QueueFull
from service.api.schemas import EXAMPLES
from service.deployment import NotReady, Stopping, UnknownModel
from service.jobs.errors import AlreadyOver, CancelledByClient, KeyReused, NotOver, StillRunning
from service.jobs.store import StoreRefused, StoreUnreachable, UnknownImage

MEDIA_TYPE = "application/problem+json"


class Unauthorized(PermissionError):
    """The request brings none of the keys."""

    def __init__(self) -> None:
        super().__init__("this service asks for a key: send it as X-API-Key, or as Authorization: Bearer")


RETRY_AFTER = {"description": "seconds after which a new try may succeed", "schema": {"type": "integer", "minimum": 1}}


class BodyTooLarge(HTTPException):
    """The request's body is longer than the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body must be at most {limit} bytes")
        self.limit = limit


class BodyTooSlow(HTTPException):
    """The request's body takes longer to come in than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(408, f"the body must come in within {seconds:g} seconds")


class ClientGone(Exception):
    """The client left before its answer: none is sent."""


class ProblemBody(BaseModel):
    """What an error's body holds (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None
    received: Any = None
    limit: Any = None


@dataclass(frozen=True)
class Problem:
    """An answer that is an error. `extra` is what helps: field, received, limit, request_id."""

    status: int
    detail: str
    kind: str | None = None
    title: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The body, as JSON holds it."""
        return {
            "type": f"urn:sdxl-lab:{self.kind}" if self.kind else "about:blank",
            "title": self.title or HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            **{name: _plain(value) for name, value in self.extra.items() if value is not None},
        }

    def response(self) -> Response:
        return Response(json.dumps(self.content()), self.status, self.headers, MEDIA_TYPE)


@dataclass(frozen=True, eq=False)
class Entry:
    """How an error is told. `retry_after` in seconds, where a later try may succeed; `measured`: the speed of the last
    images says better."""

    status: int
    kind: str
    title: str
    retry_after: int | None = None
    measured: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


INVALID = Entry(422, "invalid-value", "A value is not valid")
TABLE: dict[type[Exception], Entry] = {
    UnknownModel: Entry(404, "model-not-found", "There is no such model"),
    BodyTooSlow: Entry(408, "body-too-slow", "The body takes too long"),
    BodyTooLarge: Entry(413, "body-too-large", "The body is too large"),
    ConfigError: INVALID,
    ModelMismatch: INVALID,
    UnknownImage: Entry(404, "unknown-image", "There is no such image"),
    Unauthorized: Entry(
        401, "unauthorized", "A key is needed", headers={"WWW-Authenticate": 'Bearer realm="sdxl-lab"'}
    ),
    StillRunning: Entry(404, "still-drawing", "The image is in the making", 1, measured=True),
    NotReady: Entry(503, "not-ready", "The service is not ready", 5),
    Stopping: Entry(503, "stopping", "The service stops", 5),
    KeyReused: Entry(409, "key-reused", "The idempotency key belongs to another request"),
    AlreadyOver: Entry(409, "already-over", "The image cannot be cancelled any more"),
    NotOver: Entry(409, "not-over", "The image is in the making"),
    CancelledByClient: Entry(409, "cancelled-by-client", "The image was cancelled by its id"),
    StoreUnreachable: Entry(503, "store-unreachable", "The store does not answer", 5),
    StoreRefused: Entry(507, "store-refused", "The store refuses to take the image"),
    QueueFull: Entry(429, "queue-full", "The queue is full", 1, measured=True),
    EngineStopped: Entry(503, "engine-stopped", "The engine has stopped", 5),
    Cancelled: Entry(503, "cancelled", "The image was cancelled, since the service stops", 5),
}
ENTRIES = tuple(dict.fromkeys(TABLE.values()))


def answers(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses for some of the table's kinds, with an example of each, by status."""
    responses: dict[int | str, dict[str, Any]] = {}
    for entry in ENTRIES:
        if entry.kind not in kinds:
            continue
        content = {MEDIA_TYPE: {"schema": ProblemBody.model_json_schema(), "examples": {}}}
        response = responses.setdefault(entry.status, {"description": "", "content": content})
        response["description"] = "; ".join(filter(None, (response["description"], entry.title)))
        example = Problem(entry.status, "what exactly, and an example of how it is right", entry.kind, entry.title)
        response["content"][MEDIA_TYPE]["examples"][entry.kind] = {"value": example.content()}
        if entry.retry_after is not None:
            response["headers"] = {"Retry-After": RETRY_AFTER}
    return responses


def known(error: BaseException) -> Entry | None:
    """The table's entry for an error's class, or the nearest of its bases'."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)


def problem_of(
    error: Exception,
    request_id: str,
    measured: Callable[[], int | None] | None = None,
    examples: Mapping[str, Any] = EXAMPLES,
) -> Problem:
    """What a client is told of `error`. `measured` gives seconds by the speed of the last images, and is asked only
    where they are told; `examples` are good values by the name of their field."""
    if isinstance(error, RequestValidationError):
        return _of_validation(error, examples)
    if isinstance(error, HTTPException):
        return _of_http(error)
    entry = known(error)
    if entry is None:
        detail = "an error inside the service; its log has it under this request id"
        return Problem(500, detail, "bug", "A bug", extra={"request_id": request_id})
    seconds = (measured() if entry.measured and measured else None) or entry.retry_after
    if isinstance(error, StillRunning) and error.seconds is not None:
        seconds = max(1, math.ceil(error.seconds))
    headers = {**entry.headers, **({} if seconds is None else {"Retry-After": str(seconds)})}
    extra = {}
    if isinstance(error, ConfigError | ModelMismatch):
        extra = {"field": error.field, "received": error.received, "limit": error.rule}
    return Problem(entry.status, _clean(str(error)), entry.kind, entry.title, headers, extra)


def _of_http(error: HTTPException) -> Problem:
    """Unknown routes and methods, bodies too large; FastAPI's only 400 is a body that is no JSON at all."""
    headers = dict(error.headers or {})
    if error.status_code == 400:
        return Problem(
            422, f"the body must be JSON in UTF-8. Example: {EXAMPLES['body']}", "invalid-body", headers=headers
        )
    detail = {
        404: "nothing is served at this path",
        405: f"this path answers to {headers.get('allow', headers.get('Allow', 'another method'))}",
    }.get(error.status_code, str(error.detail))
    entry = known(error)
    kind, title = (None, None) if entry is None else (entry.kind, entry.title)
    return Problem(error.status_code, detail, kind, title, headers, {"limit": getattr(error, "limit", None)})


def _of_validation(error: RequestValidationError, examples: Mapping[str, Any]) -> Problem:
    """The first thing that is wrong with a body or a query, and how many more there are."""
    errors = error.errors()
    first = errors[0]
    context = first.get("ctx", {})
    kind, title = "invalid-value", "A value is not valid"
    if first["type"] == "json_invalid":
        detail = f"the body must be JSON: {context['error']}. Example: {EXAMPLES['body']}"
        return Problem(422, _clean(detail), "invalid-body", "The body is not JSON")
    where = [str(part) for part in first["loc"][1:]]
    name = context.get("field") or ".".join(where)
    if not name:
        detail = (
            f"the body must be a JSON object, sent with Content-Type: application/json. Example: {EXAMPLES['body']}"
        )
        return Problem(422, detail, "invalid-body", "The body is not a JSON object")
    received = first.get("input") if first["type"] != "missing" else None
    if isinstance(received, Mapping) and name in received:  # a rule about the whole body names the field that broke it
        received = received[name]
    alone = name in examples and first["type"] != "disagree"  # no value is an example where fields have to agree
    example = f" Example: {json.dumps({name: examples[name]})}" if alone else ""
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    shown = "" if first["type"] == "missing" else f"; received {_plain(received)!r}"
    detail = f"{name}: {first['msg']}{shown}.{example}{more}"
    extra = {"field": name, "received": received, "limit": first["msg"]}
    return Problem(422, _clean(detail), kind, title, extra=extra)


def _clean(text: str) -> str:
    """Text that is UTF-8, of a length that one may read."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 600 else text[:600] + "…"


def _plain(value: Any) -> Any:
    """What JSON can say of a value received, and no longer than helps."""
    if isinstance(value, str):
        text = _clean(value)
        return text if len(text) <= 200 else f"{text[:200]}… ({len(value)} characters)"
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else _plain(str(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return _plain(repr(value)) if not isinstance(value, list | tuple) or len(value) > 16 else [_plain(v) for v in value]
