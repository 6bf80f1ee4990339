"""A job's events over HTTP: server-sent events, through sse-starlette. What happens, `service/jobs/events.py` says."""

import base64
import io
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from PIL import Image
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from sdxl_lab.job import Job
from service.api.problems import known, problem_of
from service.jobs.events import Done, Queued, Step, events
from service.jobs.records import StoredImage
from service.jobs.registry import Stored

PING = 15  # seconds between two comments, so that no proxy takes the connection for dead
PREVIEWS = 8  # of one image, at most
log = logging.getLogger(__name__)


class EventStream(EventSourceResponse):
    """Server-sent events, with `X-Accel-Buffering: no` and a comment every 15 s. However it ends, and even if it never
    begins, `finish` is called: the client is gone."""

    def __init__(
        self,
        content: AsyncIterator[ServerSentEvent],
        finish: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # The registry ends every stream when the service stops, with an event that says so; the library would cut it.
        AppStatus.disable_automatic_graceful_drain()
        super().__init__(content, headers=headers, ping=PING)
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finish()


async def stream(
    job: Job[Stored],
    answer: Callable[[StoredImage], Mapping[str, Any]],
    previews: bool,
    request_id: str,
    retry_after: Callable[[], int | None],
) -> AsyncIterator[ServerSentEvent]:
    """`queued`, `step`, then `done` with the `answer` for the stored image, or `error` with a problem, which has
    `retry_after` in seconds where a header would say so."""
    try:
        async for event in events(job, PREVIEWS if previews else 0):
            match event:
                case Queued():
                    eta = None if event.eta is None else round(event.eta, 2)
                    yield _event("queued", {"id": str(event.id), "position": event.position, "eta": eta})
                case Step():
                    seen = {} if event.preview is None else {"preview": data_url(event.preview)}
                    yield _event("step", {"step": event.step, "steps": event.steps} | seen)
                case Done():
                    yield _event("done", answer(event.stored.image))
    except Exception as error:
        if known(error) is None:
            log.error("request %s failed", request_id, exc_info=error)
        problem = problem_of(error, request_id, retry_after)
        wait = problem.headers.get("Retry-After")
        yield _event("error", problem.content() | ({} if wait is None else {"retry_after": int(wait)}))


def described(example: str, *names: str) -> dict[str, Any]:
    """A stream for OpenAPI: the schema is that of each event, whose data is a JSON object."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"type": "object"}}
    event = {"type": "object", "properties": {"event": {"enum": list(names)}, "data": data}}
    return {"schema": event | {"required": ["event", "data"]}, "example": example}


def _event(name: str, content: Mapping[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(content, ensure_ascii=False), event=name)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(image)).decode()}"
