"""The deployment: a slot and the engine that draws it, from the loading of the weights to the last image.

It says why no image can be drawn now. Torch is imported by the thread that loads the weights.
"""

import asyncio
import logging
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from sdxl_lab.config import ConfigError
from sdxl_lab.errors import EngineStopped
from sdxl_lab.release.slot import load_slot
from service.attestation import Attestation, attest
from service.settings import Settings

if TYPE_CHECKING:
    from sdxl_lab.diffusion.engine import Engine

log = logging.getLogger(__name__)


class NotReady(RuntimeError):
    """No image can be drawn now: the message says why."""


class Stopping(RuntimeError):
    """The service stops before the image is done."""

    def __init__(self, message: str = "the service stops before the image is done; ask again") -> None:
        super().__init__(message)


class UnknownModel(ConfigError):
    """A client names another model than the one that is served."""


class Deployment:
    """One slot. Raises `SlotError` or `ConfigError` at once where the slot is not what it says it is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.slot = load_slot(settings.slot)
        self.engine: Engine | None = None
        self.failure: str | None = None
        self.attestation = Attestation("the golden images have not been drawn again yet")
        self.attesting = True
        self.closing = False

    def start(self, opened: Callable[[], None]) -> None:
        """Begin to load, in a thread that does not keep the process alive: a stop need not wait for gigabytes. `opened`
        is called on the event loop once there is an engine."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._load, args=(loop, opened), name="load", daemon=True).start()

    def _load(self, loop: asyncio.AbstractEventLoop, opened: Callable[[], None]) -> None:
        try:
            from sdxl_lab.diffusion.engine import Engine

            engine = Engine.load(self.slot.config, self.settings.profile, self.settings.max_queue)
            try:
                engine.prepare([*self.slot.config.loras, *(each.at(None) for each in self.slot.limits.loras)])
            except BaseException:
                engine.close()
                raise
        except Exception as error:
            log.error("cannot serve the slot %s: %s", self.slot.folder, error)
            log.debug("loading failed", exc_info=True)
            self.failure = f"the models could not be loaded: {error}"
            return

        def here() -> None:
            if self.closing:
                threading.Thread(target=engine.close, name="close").start()
                return
            self.engine = engine
            opened()

        if not on_loop(loop, here):
            engine.close()
            return
        try:
            engine.calibrate(self.slot.config)
        except EngineStopped:
            log.debug("closed while it was calibrated")
        self._attest(engine)

    def _attest(self, engine: "Engine") -> None:
        """In the thread that loads: a service that stops closes the engine, and that ends this too."""
        name, mode = self.slot.folder.name, self.settings.attest
        if mode == "off":
            self.attestation = Attestation("switched off by SDXL_ATTEST=off")
        else:
            try:
                self.attestation = attest(self.slot, engine)
            except Exception as error:
                log.debug("attestation ended", exc_info=True)
                self.attestation = Attestation(f"drawing the golden images again broke off: {error}")
        self.attesting = False
        if self.closing:
            return
        reason = self.attestation.reason
        told = {"slot": name, "digest": self.slot.digest, "seconds": round(self.attestation.seconds, 2)}
        fields = {"fields": told | self.attestation.to_dict()}
        if reason is None:
            log.info("ready: the slot %s draws what was promoted", name, extra=fields)
        elif mode == "strict":
            log.error("not ready: the slot %s is not attested: %s", name, reason, extra=fields)
        else:
            log.warning("ready, but the slot %s is not attested: %s", name, reason, extra=fields)

    async def stop(self) -> None:
        """End the engine, and with it what it still draws."""
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)

    @property
    def trouble(self) -> str | None:
        """Why no image can be drawn now; None if one can."""
        if self.closing:
            return "the service is stopping"
        if self.failure is not None:
            return self.failure
        if self.engine is None:
            return "the models are being loaded"
        if not self.engine.healthy:
            return f"the engine has stopped: {self.engine.failure or 'it is closed'}"
        if self.attesting:
            return "the golden images are being drawn again"
        if self.settings.attest == "strict" and not self.attestation.passed:
            return f"the slot {self.slot.folder.name} is not attested: {self.attestation.reason}"
        return None

    def ready_engine(self) -> "Engine":
        """The engine; `NotReady` says why there is none."""
        if self.engine is None or self.trouble is not None:
            raise NotReady(self.trouble)
        return self.engine

    def retry_after(self) -> int | None:
        """Seconds until the queue has room for one more image, by the speed measured; None while there is none."""
        seconds = self.engine.room_seconds() if self.engine else None
        return max(1, math.ceil(seconds)) if seconds is not None else None


def on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> bool:
    """Have the loop call it; False if the loop is closed already. Any thread may call this."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return False
    return True
