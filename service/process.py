"""The life of the serving process: it drains when it is told to stop, and ends when its engine is broken.

Only `python -m service` has it; another ASGI server has ways of its own. Knows the studio, and no route.
"""

import asyncio
import faulthandler
import logging
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from service.studio import Studio

if TYPE_CHECKING:
    from sdxl_lab.engine import Engine

# dstack kills a replica 10 s after it asked it to stop: 8 for pictures, the rest to answer and to end the engine.
DRAIN_SECONDS = 8.0
ANSWER_SECONDS = 0.5
END_SECONDS = 0.9
REARM_SECONDS = 10
log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn, but it listens on while it drains: a prober has to see that the replica is no longer ready.

    `failure` says why the process must end with an error; None for a stop that was asked for.
    """

    def __init__(self, app: ASGIApp, studio: Studio) -> None:
        options = uvicorn.Config(app, log_config=None, access_log=False)
        options.timeout_graceful_shutdown = ANSWER_SECONDS  # type: ignore[assignment]  # it takes fractions as well
        super().__init__(options)
        self.failure: str | None = None
        self._studio = studio
        self._watchdog = Watchdog(studio.settings.watchdog)
        self._seconds: float | None = None
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT. It may interrupt anything, so that it takes no lock; a second one changes nothing."""
        self._stop(DRAIN_SECONDS)

    def _stop(self, seconds: float) -> None:
        if self._seconds is None:
            self._seconds = seconds
            self._studio.close()
            # From C, whatever Python's threads are stuck in: prints where they are, exits with 1.
            faulthandler.dump_traceback_later(seconds + END_SECONDS, exit=True)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls it ten times a second."""
        if self._seconds is None:
            if counter % (10 * REARM_SECONDS) == 0:
                # The same for a step that is stuck with Python's own lock, when not even this would be called.
                patience = self._watchdog.patience + REARM_SECONDS + END_SECONDS
                faulthandler.dump_traceback_later(patience, exit=True)
            self.failure = self._broken()
            if self.failure is not None:
                log.critical("the process ends: %s", self.failure)
                self._stop(0)
        if self._seconds is not None and self._draining is None:
            self._draining = asyncio.create_task(self._drain(self._seconds))
        return await super().on_tick(counter)

    async def _drain(self, seconds: float) -> None:
        try:
            await self._studio.drain(seconds)
        finally:
            self.should_exit = True

    def _broken(self) -> str | None:
        engine = self._studio.engine
        if engine is None:
            return self._studio.failure
        return engine.failure or self._watchdog.stuck(engine)


class Watchdog:
    """Sees whether an engine that has pictures to draw goes on. `patience` in seconds has to outlast the longest step,
    the first one of a compiled UNet with it."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._ticks, self._since = -1, time.monotonic()

    def stuck(self, engine: "Engine") -> str | None:
        """Why the engine counts as stuck; None if it goes on, or has nothing to do."""
        stats, now = engine.stats(), time.monotonic()
        if stats.ticks != self._ticks or not (stats.queued or stats.running):
            self._ticks, self._since = stats.ticks, now
        waited = now - self._since
        if waited < self.patience:
            return None
        return f"the engine is stuck: {stats.running} pictures are being drawn, and no step was made in {waited:.0f} s"
