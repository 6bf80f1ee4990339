"""What a service does unasked: keeps what it promised, takes up what nobody else keeps, cleans the store.

Knows promises and how a drawing is begun; neither HTTP nor who asks.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.errors import EngineStopped, QueueFull
from service.api.problems import NotReady, Stopping
from service.jobs.drawings import Drawings
from service.jobs.job import LOOK, CancelledByClient, Drawing, Elsewhere, Order, StoredSource
from service.jobs.leases import OVER
from service.jobs.store import JobChanged, StoreRefused, StoreUnreachable, UnknownImage, Version
from service.settings import Settings

CLEAN = 60  # seconds between two looks at the store
ATTEMPTS = 5  # after so many starts a promise is believed to be what ends the process
STRANGE = 900  # seconds for which a promise for other models is left to a replica that has them
RENEWALS = 4  # at a time

# What says that the engine takes nothing at the moment. The promise stays as it is.
NOT_NOW = (EngineStopped, QueueFull, NotReady)

log = logging.getLogger(__name__)


class Keeper:
    """Looks after the promises in the store, those of this replica and those that no replica holds."""

    def __init__(self, settings: Settings, drawings: Drawings) -> None:
        self.settings, self.drawings = settings, drawings
        self.served, self.store, self.promises = drawings.served, drawings.store, drawings.promises
        self._chores: list[asyncio.Task[None]] = []

    # --- what nobody waits for -------------------------------------------------------------------------------------

    def start(self) -> None:
        look = self.settings.lease / 2 if self.promises.shared else CLEAN
        for seconds, chore in ((LOOK, self._renew), (look, self.take_up), (CLEAN, self._clean)):
            self._chores.append(asyncio.create_task(self._again(seconds, chore)))

    def stop(self) -> None:
        for chore in self._chores:
            chore.cancel()

    async def _again(self, seconds: float, chore: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await chore()
            except (StoreRefused, StoreUnreachable) as error:
                log.warning("%s; the next try is in %g s", error, seconds)
            except Exception:
                log.exception("a chore failed; the next try is in %g s", seconds)
            await asyncio.sleep(seconds if self.served.trouble is None else LOOK)

    async def _renew(self) -> None:
        """Renew the leases of what is drawn here, and see what was cancelled elsewhere."""
        gate = asyncio.Semaphore(RENEWALS)

        async def renew(drawing: Drawing) -> None:
            async with gate:
                if drawing.busy or not self.promises.due(drawing.id, drawing.state):
                    return
                if await asyncio.to_thread(self.promises.renew, drawing.id, drawing.state) == "cancelled":
                    drawing.cancel(CancelledByClient())

        lasting = [drawing for drawing in self.drawings.making.values() if drawing.lasting]
        results = await asyncio.gather(*map(renew, lasting), return_exceptions=True)
        for error in results:
            if error is not None:
                raise error

    async def take_up(self) -> None:
        """Begin what was promised and nobody draws: all of a folder; of a shared store one, and more while all that is
        drawn here fits into one call, since other replicas look as well."""
        if self.served.trouble is not None:
            return
        for image in await asyncio.to_thread(self.promises.untended):
            try:
                await self._take(image)
            except NOT_NOW:
                return
            if self.promises.shared and 2 * len(self.drawings.making) >= self.settings.max_rows:
                return

    async def _clean(self) -> None:
        """Remove what is too old."""
        if self.served.trouble is None:
            retention = self.settings.retention
            if retention is not None:
                await asyncio.to_thread(self.store.remove_older, retention)
            else:
                await asyncio.to_thread(self.store.remove_leftovers)

    # --- what somebody asks for ------------------------------------------------------------------------------------

    def elsewhere(self, image: uuid.UUID, promise: Mapping[str, Any]) -> Elsewhere:
        """What another replica draws, as a drawing to wait for; drawn here once that one renews its lease no more."""
        return Elsewhere(image, promise, lambda: self._arrival(image))

    async def _arrival(self, image: uuid.UUID) -> Drawing:
        while not self.served.closing:
            with contextlib.suppress(StoreUnreachable):
                drawing = self.drawings.making.get(image) or await self._arrived(image)
                if drawing is not None:
                    return drawing
            await asyncio.sleep(LOOK)
        raise Stopping("the service stops before the image is done; ask again")

    async def _arrived(self, image: uuid.UUID) -> Drawing | None:
        try:
            promise = await asyncio.to_thread(self.store.job, image)
        except UnknownImage:
            drawing = await asyncio.to_thread(self.drawings.stored, image)
            if drawing is None:
                raise
            return drawing
        if promise["state"] in OVER:
            drawing = Drawing(image, promise, lasting=True)
            if promise["state"] == "cancelled":
                drawing.cancel(CancelledByClient())
            drawing.end(drawing.why or RuntimeError(f"another replica could not draw the image {image}"))
            return drawing
        return await self.take_now(image, promise)

    async def take_now(self, image: uuid.UUID, promise: Mapping[str, Any]) -> Drawing | None:
        """Begin it, because it is asked for; None where it is another's, or cannot be begun now."""
        if self.served.trouble is None and self.promises.free(promise):
            with contextlib.suppress(*NOT_NOW, StoreRefused):
                return await self._take(image)
        return None

    async def _take(self, image: uuid.UUID) -> Drawing | None:
        """Begin what was promised, unless somebody else does, or did."""
        async with self.drawings.lock(image):
            if image in self.drawings.making:
                return self.drawings.making[image]
            drawn = await asyncio.to_thread(self.drawings.stored, image)
            if drawn is not None:
                await asyncio.to_thread(self.promises.keep, image)
                return drawn
            try:
                promise, version = await asyncio.to_thread(self.store.read_job, image)
            except UnknownImage:
                return None
            if promise["state"] in OVER or not self.promises.free(promise):
                return None
            try:
                drawing = await self.begin_again(image, promise, version)
            except JobChanged:
                return None
            except (StoreRefused, StoreUnreachable):
                raise
            except NOT_NOW:
                raise
            except Exception as error:
                if self.leaves_to_others(promise, error):
                    return None
                log.error("cannot take up the image %s: %s", image, error)
                await asyncio.to_thread(self.promises.fail, image)
                return None
            log.info("took up the image %s, promised before", image)
            return drawing

    async def begin_again(self, image: uuid.UUID, promise: Mapping[str, Any], version: Version) -> Drawing:
        """Begin what was promised, under the lock of the image. Raises as `order` and `Drawings.begin` do, and
        `RuntimeError` for a promise that was begun too often."""
        if promise["attempts"] >= ATTEMPTS:
            raise RuntimeError(f"it was begun {ATTEMPTS} times and never finished")
        order = await asyncio.to_thread(self.order, promise)
        return await self.drawings.begin(image, order, before=promise, version=version)

    def leaves_to_others(self, promise: Mapping[str, Any], error: Exception) -> bool:
        """While one configuration takes the place of another, there are replicas with other models."""
        young = time.time() - promise["created"] < STRANGE
        return self.promises.shared and young and isinstance(error, ConfigError) and error.field == "model"

    def order(self, promise: Mapping[str, Any]) -> Order:
        """The order that a promise was made of. Raises `ConfigError` where other models are served by now. Blocks."""
        config, promoted = GenerationConfig.from_dict(promise["config"]), self.served.slot.config
        if config.model != promoted.model:
            raise ConfigError("model", config.model.to_dict(), "the promoted one", promoted.model.base)
        source = None
        if promise["source"] is not None:
            origin = uuid.UUID(promise["source"])
            source = StoredSource.of(origin, self.store.get(origin), promise["strength"])
        return Order(config, promise["prompt"], promise["seed"], source, fingerprint=promise["request"], lasting=True)
