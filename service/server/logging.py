"""Logging: one JSON object a line, on stderr, with what is known of the request that the line belongs to.

Knows no route. Headers, queries and bodies never come here: they hold keys, an outer proxy's tokens, and prompts.
"""

import json
import logging
import time
from contextvars import ContextVar
from typing import Any

# Of the request being answered. Tasks and threads begun for it inherit the very object, so that what they note is in
# the request's own line too.
_request: ContextVar[dict[str, Any] | None] = ContextVar("request", default=None)


def begin(**fields: Any) -> None:
    """A request begins: from here on the lines of this task, and of those it begins, have these fields."""
    _request.set(fields)


def note(**fields: Any) -> None:
    """Add fields to every later line of the request; outside of one it does nothing."""
    noted = _request.get()
    if noted is not None:
        noted.update(fields)


class JsonLines(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`, the request's fields, and those of `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(_request.get() or {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Everything from `level` up, of every library, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
