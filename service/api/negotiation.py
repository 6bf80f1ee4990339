"""Negotiation: how a client wants its answer, as the headers of `POST /generate` and `POST /refine` say it."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Header, Query, Request

from service.jobs.manager import Key

EVENTS = "text/event-stream"
JSON = "application/json"
FORMS = ("image/png", "image/webp", "image/jpeg")
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=128,
        pattern=r"^[ -~]*$",
        description="id and seed are derived from it: a repeat gives the stored image, joins the running one, or "
        "makes the very same image again",
        examples=["order-4711"],
    ),
]


@dataclass(frozen=True)
class Negotiated:
    """`form` is a media type; `later`: answer now, draw later; `key` is an idempotency key."""

    form: str
    later: bool
    key: Key | None
    previews: bool


def negotiate(
    request: Request,
    prefer: Annotated[
        str | None, Header(description="`respond-async`: 202 at once, and the image is drawn whoever waits")
    ] = None,
    idempotency_key: IdempotencyKey = None,
    previews: Annotated[bool, Query(description="events of steps show previews: small JPEGs as data URLs")] = False,
) -> Negotiated:
    """The headers, read. Whoever tells clients apart sets `request.state.client`."""
    accept = ",".join(request.headers.getlist("accept"))
    preferred = [part.partition(";")[0].strip().lower() for part in (prefer or "").split(",")]
    key = None if idempotency_key is None else Key(client_of(request), idempotency_key)
    return Negotiated(accepted(accept), "respond-async" in preferred, key, previews)


def client_of(request: Request) -> str:
    """Who asks: clients that are told apart have keys of their own."""
    return getattr(request.state, "client", "")


def accepted(header: str) -> str:
    """The form of ours that an `Accept` header likes best (RFC 9110, section 12.5.1); JSON where it likes none."""
    best, liked = JSON, 0.0
    for part in header.split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        form = {"*/*": JSON, "application/*": JSON, "image/*": FORMS[0], "text/*": EVENTS}.get(kind, kind)
        weight = _weight(parameters)
        if form in (JSON, EVENTS, *FORMS) and weight > liked:
            best, liked = form, weight
    return best


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
