"""What stands behind the routes: images that are asked for, looked for, cancelled and deleted.

Knows no HTTP. What is served is `service/deployment.py`'s business, a drawing under way `drawings.py`'s, and what was
promised and left `keeper.py`'s; `jobs.py` says how an image is asked for and followed.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Mapping
from typing import Any

from sdxl_lab.config import ConfigError
from service.api.problems import StillDrawing
from service.deployment import Served
from service.jobs.drawings import ANSWER, Drawings
from service.jobs.job import AlreadyOver, Drawing, KeyReused, NotOver, Order, StoredSource, derived
from service.jobs.leases import OVER, STORING, Promises
from service.jobs.recovery import Keeper
from service.jobs.store import JobChanged, Page, Store, UnknownImage, image_id
from service.server.telemetry import Metrics
from service.settings import Settings


class Studio:
    """One slot being served. Raises `SlotError` or `ConfigError` at once where the slot is not what it says it is, and
    `StoreRefused` where the store cannot be opened."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.served = Served(settings)
        self.store = Store(settings.store)
        self.promises = Promises(self.store, settings.lease)
        self.metrics = Metrics(self.served)
        self.drawings = Drawings(self.served, self.store, self.promises, self.metrics)
        self.keeper = Keeper(settings, self.drawings)

    # --- from start to stop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load."""
        self.served.start(self.keeper.start)

    def close(self) -> None:
        """Take no new images. Any thread, and a signal's handler, may call it."""
        self.served.closing = True

    async def drain(self, seconds: float, answer: float = ANSWER) -> None:
        """Take no new images, and end those there are, within so many seconds and those to answer."""
        self.close()
        await self.drawings.drain(seconds, answer)

    async def stop(self) -> None:
        """Tell those who still wait, and end the engine."""
        await self.drain(0)
        self.keeper.stop()
        await self.served.stop()

    # --- images that are asked for -------------------------------------------------------------------------------

    async def submit(self, order: Order) -> Drawing:
        """Accept an order. Whoever submits calls `Drawing.leave` in the end.

        With a key that was seen before, this is the image in the making, here or on another replica, the stored one,
        or a new attempt at the same one. Returns once the order would survive a restart, where it is to. Raises
        `NotReady`, `KeyReused`, `StoreRefused`, `StoreUnreachable`, and what `ImageRequest` and `Engine.submit` raise.
        """
        self.served.ready_engine()
        if order.key is None:
            return await self.drawings.begin(uuid.uuid4(), order)
        image, seed = derived(order.scope, order.key)
        async with self.drawings.lock(image):
            while True:
                drawing = await self.repeated(order.scope, order.key, order.fingerprint)
                if drawing is not None:
                    return drawing
                with contextlib.suppress(JobChanged):  # another replica was asked at the same moment: look again
                    return await self._ordered_again(image, order, seed)

    async def repeated(self, scope: str, key: str, request: str) -> Drawing | None:
        """The image of a key that was seen before, in the making here or stored. Raises `KeyReused` where it came
        with another request."""
        image, _ = derived(scope, key)
        drawing = self.drawings.making.get(image) or await asyncio.to_thread(self.drawings.stored, image)
        if drawing is not None:
            _same_request(request, drawing.asked["request"])
        return drawing

    async def _ordered_again(self, image: uuid.UUID, order: Order, seed: int) -> Drawing:
        try:
            promise, version = await asyncio.to_thread(self.store.read_job, image)
        except UnknownImage:
            return await self.drawings.begin(image, order, seed)
        _same_request(order.fingerprint, promise["request"])
        if promise["state"] in OVER:
            return await self.drawings.begin(image, order, seed, version=version)
        if not self.promises.free(promise):
            return self.keeper.elsewhere(image, promise)
        try:
            # the very image, even if another configuration was promoted since
            return await self.keeper.begin_again(image, promise, version)
        except ConfigError as error:
            if self.keeper.leaves_to_others(promise, error):
                return self.keeper.elsewhere(image, promise)
            raise

    async def cancel(self, text: str) -> None:
        """Cancel an image that is queued or running, and wait until it is. Raises `UnknownImage`, `AlreadyOver`."""
        wanted = image_id(text)
        drawing = self.drawings.making.get(wanted)
        if drawing is not None:
            state = await self.drawings.cancel(drawing)
            cancelled = state not in ("done", "failed")
        else:
            try:
                state = await asyncio.to_thread(self.promises.cancel, wanted)
                cancelled = state == "unfinished"
            except UnknownImage:
                state, cancelled = (await self.find(text))[0], False
        if not cancelled:
            raise AlreadyOver(f"the image {wanted} is {state} and cannot be cancelled any more")

    # --- images that there are -----------------------------------------------------------------------------------

    async def find(self, text: str) -> tuple[str, Drawing | Mapping[str, Any]]:
        """An image's state, with the `Drawing` of one on its way or ended without an image, the record of a stored
        one, or what was promised before a restart or by another replica. What nobody holds any more is begun. Raises
        `UnknownImage`."""
        wanted, ended = image_id(text), self.drawings.ended
        drawing = self.drawings.making.get(wanted)
        if drawing is not None:
            return drawing.state, drawing
        with contextlib.suppress(UnknownImage):
            return "done", await asyncio.to_thread(self.store.record, wanted)
        try:
            promise = await asyncio.to_thread(self.store.job, wanted)
        except UnknownImage:
            if wanted in ended:
                return ended[wanted].state, ended[wanted]
            return "done", await asyncio.to_thread(self.store.record, wanted)  # stored meanwhile
        if promise["state"] in OVER:
            return promise["state"], ended.get(wanted, promise)
        drawing = await self.keeper.take_now(wanted, promise)
        if drawing is not None:
            return drawing.state, drawing.asked if drawing.state == "done" else drawing
        return "running" if promise["state"] == STORING else promise["state"], promise

    async def stored(self, text: str) -> bytes:
        """An image's PNG. Raises `UnknownImage`, or `StillDrawing` for one in the making."""
        wanted = image_id(text)
        try:
            return await asyncio.to_thread(self.store.get, wanted)
        except UnknownImage:
            state, found = await self.find(text)
            if state == "done":  # meanwhile
                return await asyncio.to_thread(self.store.get, wanted)
            if state not in ("queued", "running"):
                raise
            eta = found.eta if isinstance(found, Drawing) else None
            raise StillDrawing(f"the image {wanted} is in the making: {state}", eta) from None

    async def source(self, text: str, strength: float) -> StoredSource:
        """A stored image to refine. Raises as `stored` does, and `ConfigError` for one that is not ours."""
        png = await self.stored(text)
        return await asyncio.to_thread(StoredSource.of, image_id(text), png, strength)

    async def page(self, limit: int, cursor: str | None) -> Page:
        """Stored images' records, the newest first. Raises `ConfigError` for a cursor that no page gave."""
        return await asyncio.to_thread(self.store.page, limit, cursor)

    async def delete(self, text: str) -> None:
        """Remove a stored image. Raises `UnknownImage`, or `NotOver` for one in the making."""
        wanted = image_id(text)
        try:
            if wanted not in self.drawings.making:
                return await asyncio.to_thread(self.store.delete, wanted)
        except UnknownImage:
            if (await self.find(text))[0] not in ("queued", "running"):
                raise
        raise NotOver(f"the image {wanted} is in the making: DELETE /jobs/{wanted} cancels it")


def _same_request(now: str, before: str) -> None:
    if now != before:
        raise KeyReused("this Idempotency-Key came before with another request; each request takes a key of its own")
