"""Logging: one JSON object a line, on stderr, with what is known of the request that the line belongs to.

structlog renders what the standard library's loggers are given, so that uvicorn's lines and the library's look like
ours. Headers, queries and bodies never come here: they hold keys, an outer proxy's tokens, and prompts.
"""

import logging
from typing import Any

from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars, merge_contextvars
from structlog.processors import EventRenamer, JSONRenderer, TimeStamper, format_exc_info
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, WrappedLogger

# Variables of a context are copied into the tasks and threads begun in it. This one holds a dictionary, so that all of
# a request's tasks share it, and what one of them notes is in the request's own line too.
NOTED = "noted"


def begin(**fields: Any) -> None:
    """A request begins: from here on the lines of this task, and of those it begins, have these fields."""
    clear_contextvars()
    bind_contextvars(**{NOTED: fields})


def note(**fields: Any) -> None:
    """Add fields to every later line of the request; outside of one it does nothing."""
    get_contextvars().get(NOTED, {}).update(fields)


def _in_order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """What every line has comes first, then the request's fields, then those of `extra={"fields": {...}}`."""
    noted, fields = event.pop(NOTED, {}), event.pop("fields", {})
    ours = {name: event.pop(name) for name in ("time", "level", "logger", "message")}
    line = ours | noted | fields
    if "exception" in event:
        line["traceback"] = event.pop("exception")
    return line | event


def json_lines() -> ProcessorFormatter:
    """`time` (UTC), `level`, `logger`, `message`, the request's fields, those of `extra={"fields": {...}}`, and with an
    exception its `traceback`."""
    return ProcessorFormatter(
        foreign_pre_chain=[
            merge_contextvars,
            add_log_level,
            add_logger_name,
            ExtraAdder(allow=("fields",)),
            TimeStamper(fmt="iso", utc=True, key="time"),
            format_exc_info,
        ],
        processors=[
            ProcessorFormatter.remove_processors_meta,
            EventRenamer("message"),
            _in_order,
            JSONRenderer(default=str),
        ],
    )


def configure(level: str) -> None:
    """Everything from `level` up, of every library, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(json_lines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
