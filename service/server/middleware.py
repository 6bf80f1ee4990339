"""The outermost layer of every request: its id, its size, its log line, and the answer when something went wrong.

It is plain ASGI, so that streams pass unbuffered and a client that leaves is seen at once.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import openai_schemas as openai
from service.api.problems import BodyTooLarge, BodyTooSlow, ClientGone, known, problem_of
from service.deployment import Deployment, Stopping
from service.server import logging as logs
from service.server.telemetry import Telemetry
from service.settings import Settings

MAX_BODY = 64 * 1024
BODY_SECONDS = 30.0
log = logging.getLogger("service.access")


class Middleware:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings, deployment: Deployment, telemetry: Telemetry) -> None:
        self.app, self.settings, self.deployment, self.telemetry = app, settings, deployment, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _prefixed(scope, self.settings.root_path)
        request_id = _request_id(Headers(scope=scope))
        logs.begin(request=request_id, digest=self.deployment.slot.digest)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.monotonic()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Config-Digest"] = self.deployment.slot.digest
            await send(message)

        try:
            await self.app(scope, _limited(scope, receive), send_marked)
        except ClientGone:
            status = 499
        except asyncio.CancelledError:
            if not status:  # and raised no further: the server that cancelled us would log a traceback
                answer = problem_response(scope, Stopping())
                await answer(scope, receive, send_marked)
        except Exception as error:
            if known(error) is None:
                log.exception("request %s failed", request_id)
            if status:
                raise  # half an answer is out: the server has to break the connection
            answer = problem_response(scope, error, self.deployment.retry_after)
            await answer(scope, receive, send_marked)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.telemetry.answers.labels(route, status).inc()
            # The path alone: queries, headers and bodies hold what a log must not.
            path, method = quote(scope["path"]), scope["method"]
            fields = {"method": method, "path": path, "status": status}
            fields["ms"] = round(1000 * (time.monotonic() - began), 1)
            log.info("%s %s %d", method, path, status, extra={"fields": fields})


def problem_response(scope: Scope, error: Exception, measured: Callable[[], int | None] | None = None) -> Response:
    """The answer that tells an error, in the shape that the path's clients understand."""
    request_id = scope["state"]["request_id"]
    if openai.speaks(scope["path"].removeprefix(scope.get("root_path", ""))):
        return openai.error_response(problem_of(error, request_id, measured, openai.EXAMPLES))
    return problem_of(error, request_id, measured).response()


def _prefixed(scope: Scope, prefix: str) -> None:
    """The path as the client has it, whether the proxy before us took its prefix off or not; a probe comes without."""
    scope["root_path"], path = prefix, scope["path"]
    if path != prefix and not path.startswith(f"{prefix}/"):
        scope["path"] = prefix + path


def _request_id(headers: Headers) -> str:
    """The client's own, if it can stand in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex


def _limited(scope: Scope, receive: Receive) -> Receive:
    """`receive`, refusing bodies above the limit, whether they announce their length or come in chunks, and those that
    take too long."""
    announced = Headers(scope=scope).get("content-length", "0")
    announced_bytes = int(announced) if announced.isdigit() else 0
    received = 0
    ends: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

    async def limited() -> Message:
        nonlocal received, ends
        if announced_bytes > MAX_BODY:
            raise BodyTooLarge(MAX_BODY)
        try:
            async with asyncio.timeout_at(ends):
                message = await receive()
        except TimeoutError as error:
            raise BodyTooSlow(BODY_SECONDS) from error
        if not message.get("more_body"):
            ends = None  # what comes from here on is the client's leaving, and may take as long as it likes
        received += len(message.get("body", b""))
        if received > MAX_BODY:
            raise BodyTooLarge(MAX_BODY)
        return message

    return limited
