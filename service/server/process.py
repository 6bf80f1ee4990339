"""The life of the serving process: it drains when it is told to stop, and ends when its engine is broken.

Only `python -m service` has it; another ASGI server has ways of its own.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn
from starlette.types import ASGIApp

from service.jobs.manager import JobManager
from service.server.connection import Connection

if TYPE_CHECKING:
    from sdxl_lab.diffusion.engine import Engine

# dstack kills a replica 10 s after it asked it to stop: 8 for images, the rest to answer and to end the engine.
DRAIN_SECONDS = 8.0
TOLD_SECONDS = 0.2
ANSWER_SECONDS = 0.5
SHUTDOWN_SECONDS = 0.75
END_SECONDS = 0.95
REARM_SECONDS = 10
log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn, but it listens on while it drains: a prober has to see that the replica is no longer ready.

    `failure` says why the process must end with an error; None for a stop that was asked for.
    """

    def __init__(self, app: ASGIApp, jobs: JobManager) -> None:
        options = uvicorn.Config(app, http=Connection, log_config=None, access_log=False)
        options.timeout_graceful_shutdown = ANSWER_SECONDS  # type: ignore[assignment]  # it takes fractions as well
        super().__init__(options)
        self.failure: str | None = None
        self._jobs = jobs
        self._watchdog = Watchdog()
        # It has to outlast the longest step, the first one of a compiled UNet with it.
        self._patience = jobs.settings.watchdog
        self._seconds: float | None = None
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT. It may interrupt anything, so that it takes no lock; a second one changes nothing."""
        self._stop(DRAIN_SECONDS)

    def _stop(self, seconds: float) -> None:
        if self._seconds is None:
            self._seconds = seconds
            self._jobs.close()
            # From C, whatever Python's threads are stuck in: prints where they are, exits with 1.
            faulthandler.dump_traceback_later(seconds + END_SECONDS, exit=True)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls it ten times a second."""
        engine = self._jobs.deployment.engine
        standing = 0.0 if engine is None else self._watchdog.standing(engine)
        if self._seconds is None:
            if counter % (10 * REARM_SECONDS) == 0:
                # For an engine that is stuck with Python's own lock, when not even this would be called.
                faulthandler.dump_traceback_later(self._patience + REARM_SECONDS + END_SECONDS, exit=True)
            self.failure = self._jobs.deployment.failure if engine is None else engine.failure
            if self.failure is None and standing >= self._patience:
                self.failure = f"the engine is stuck: it has images to draw, and made no step in {standing:.0f} s"
            if self.failure is not None:
                log.critical("the process ends: %s", self.failure)
                self._stop(0)
        if self._seconds is not None and self._draining is None:
            self._draining = asyncio.create_task(self._drain(self._seconds))
        return await super().on_tick(counter)

    async def _drain(self, seconds: float) -> None:
        engine = self._jobs.deployment.engine
        told = engine.stats() if engine is not None else None
        try:
            await self._jobs.drain(seconds, TOLD_SECONDS)
            if self.failure is None and engine and told and told.running and told.ticks == engine.stats().ticks:
                self.failure = "the engine is stuck: it made no step since it was told to stop"
                log.critical("the process ends with an error: %s", self.failure)
        finally:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Everybody is told by now. A step that takes its time, or a stuck one, is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await super().shutdown(sockets)
        self.leave()

    def leave(self) -> NoReturn:
        """End the process here and now: a thread that loads cannot be stopped, and torch takes seconds to end."""
        if self.failure is not None:
            faulthandler.dump_traceback()
        logging.shutdown()
        os._exit(1 if self.failure is not None else 0)


class Watchdog:
    """Sees how long an engine that has images to draw stands still. Ask it often."""

    def __init__(self) -> None:
        self._ticks, self._since = -1, time.monotonic()

    def standing(self, engine: "Engine") -> float:
        """Seconds since the engine went on, or had nothing to do."""
        stats, now = engine.stats(), time.monotonic()
        if stats.ticks != self._ticks or not (stats.queued or stats.running):
            self._ticks, self._since = stats.ticks, now
        return now - self._since
