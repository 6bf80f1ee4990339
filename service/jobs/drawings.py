"""The drawings under way: each is given to the engine, promised if it is to last, followed, and stored.

Knows the engine and the store, and neither HTTP nor where an order comes from. Lives on the event loop, and leaves it
for everything that takes long.
"""

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from typing import Any
from weakref import WeakValueDictionary

from sdxl_lab.images import GeneratedImage, encode_png
from sdxl_lab.job import ImageRequest, Job, SourceImage
from service.api.problems import Stopping, known
from service.deployment import Served, on_loop
from service.jobs.job import LOOK, CancelledByClient, Drawing, Order
from service.jobs.leases import STORING, Promises
from service.jobs.store import JobChanged, Store, StoreRefused, StoreUnreachable, UnknownImage, Version
from service.server.logging import note
from service.server.telemetry import Metrics

REMEMBERED = 600  # seconds, and at most
MOST_REMEMBERED = 1000  # images that failed or were cancelled; those that are done the store knows
OUTAGE = 60  # seconds for which an image that is drawn waits for a store that does not answer
ANSWER = 2  # seconds for a cancelled image to leave the engine, and for what becomes of it to be written down

log = logging.getLogger(__name__)


class Drawings:
    """`making`: what is drawn here; `ended`: what failed or was cancelled of late, the last at the end."""

    def __init__(self, served: Served, store: Store, promises: Promises, metrics: Metrics) -> None:
        self.served, self.store, self.promises, self.metrics = served, store, promises, metrics
        self.making: dict[uuid.UUID, Drawing] = {}
        self.ended: dict[uuid.UUID, Drawing] = {}
        self._locks: WeakValueDictionary[uuid.UUID, asyncio.Lock] = WeakValueDictionary()

    def lock(self, image: uuid.UUID) -> asyncio.Lock:
        """To be held by whoever looks whether an image is drawn here, and begins it if not."""
        return self._locks.setdefault(image, asyncio.Lock())

    def stored(self, image: uuid.UUID) -> Drawing | None:
        """The stored image. One without a request beside it was being written when the process was killed. Blocks."""
        try:
            record = self.store.record(image)
        except UnknownImage:
            return None
        return Drawing.stored(image, record) if "request" in record else None

    # --- from the order to the engine ------------------------------------------------------------------------------

    async def begin(
        self,
        image: uuid.UUID,
        order: Order,
        seed: int | None = None,
        before: Mapping[str, Any] | None = None,
        version: Version | None = None,
    ) -> Drawing:
        """Give the order to the engine, and promise it if it is to last. `seed` is for an order that has none; `before`
        is what was promised when it was begun the last time, `version` that of the promise that this one takes the
        place of. Raises `JobChanged` where another replica did so first."""
        engine = self.served.ready_engine()
        if order.seed is not None:
            seed = order.seed
        elif seed is None:
            seed = secrets.randbelow(2**32)  # JavaScript's numbers hold it
        origin = order.source
        source = None
        if origin is not None:  # a PNG that somebody put into the store does not know under which id
            source = SourceImage(origin.image, origin.strength, origin.record.with_(id=str(origin.id)))
        job = ImageRequest(order.config, order.prompt, seed, source)
        asked = {
            "created": before["created"] if before else round(time.time(), 3),
            "attempts": before["attempts"] + 1 if before else 1,
            "id": str(image),
            "request": order.fingerprint,
            "prompt": job.prompt,
            "seed": job.seed,
            "config": job.config.to_dict(),
            "promoted": self.served.slot.digest,
            "overridden": job.config.differs(self.served.slot.config),
            "source": None if origin is None else str(origin.id),
            "strength": None if origin is None else origin.strength,
        }
        drawing = Drawing(image, asked, order.lasting or order.key is not None)
        loop = asyncio.get_running_loop()

        def stepped(calls: int, total: int) -> None:
            on_loop(loop, lambda: drawing.stepped(calls, total))

        drawing.ticket = engine.submit(job, stepped)
        self._watch(image, drawing.ticket)
        self.making[image] = drawing
        self.ended.pop(image, None)
        accepted = asyncio.Event()
        drawing.task = asyncio.create_task(self._follow(drawing, drawing.ticket, accepted, version))
        await accepted.wait()
        if isinstance(drawing.error, StoreRefused | StoreUnreachable | JobChanged):
            raise drawing.error
        return drawing

    def _watch(self, image: uuid.UUID, ticket: Job[GeneratedImage]) -> None:
        """Have the image counted and logged when it is over, in a line that names the request it is for."""
        note(image=str(image))
        context = copy_context()
        ticket.add_done_callback(lambda job: context.run(self._over, image, job))

    def _over(self, image: uuid.UUID, ticket: Job[GeneratedImage]) -> None:
        self.metrics.count(ticket)
        calls, total = ticket.progress
        fields: dict[str, Any] = {"image": str(image), "state": ticket.state, "steps": calls, "of": total}
        if ticket.first_step_seconds is not None:
            fields["first_step_ms"] = round(1000 * ticket.first_step_seconds, 1)
        if ticket.state == "done":
            fields |= ticket.result().timings
        log.info("image %s", ticket.state, extra={"fields": fields})

    # --- from the engine to the store ------------------------------------------------------------------------------

    async def _follow(
        self, drawing: Drawing, ticket: Job[GeneratedImage], accepted: asyncio.Event, version: Version | None
    ) -> None:
        """From the acceptance to the end, whatever it is."""
        outcome: Mapping[str, Any] | Exception
        try:
            if drawing.lasting:
                await asyncio.to_thread(self.promises.take, drawing.id, drawing.asked, version)
            accepted.set()
            if drawing.why is not None:  # meanwhile
                raise drawing.why
            drawing.busy = False
            image = await ticket
            drawing.busy = True
            if isinstance(drawing.why, CancelledByClient):  # after its last step
                raise drawing.why
            outcome = await self._store(drawing, image)
        except asyncio.CancelledError:
            outcome = drawing.why or Stopping("the service stops before the image is done")
        except Exception as error:
            outcome = drawing.why or error
        drawing.busy = True
        ticket.cancel()
        if isinstance(outcome, StoreRefused):
            log.error("the store refuses the image %s: %s", drawing.id, outcome.__cause__ or outcome)
        elif isinstance(outcome, Exception) and known(outcome) is None and accepted.is_set():
            log.error("the image %s failed", drawing.id, exc_info=outcome)
        if drawing.lasting and accepted.is_set():
            await asyncio.to_thread(self._settle, drawing, outcome)
        drawing.end(outcome)
        accepted.set()
        del self.making[drawing.id]
        if isinstance(outcome, Exception) and not isinstance(outcome, JobChanged):
            self.ended[drawing.id] = drawing
            self._forget()

    async def _store(self, drawing: Drawing, image: GeneratedImage) -> Mapping[str, Any]:
        """Store it, and where the store does not answer, try again for a while: it took long to draw."""
        ends = time.monotonic() + OUTAGE
        while True:
            try:
                return await asyncio.to_thread(self._store_once, drawing, image)
            except StoreUnreachable:
                if self.served.closing or time.monotonic() > ends:
                    raise
            if drawing.why is not None:
                raise drawing.why
            await asyncio.sleep(LOOK)

    def _store_once(self, drawing: Drawing, image: GeneratedImage) -> Mapping[str, Any]:
        """Store it, unless it was cancelled from another replica, or another replica took it over and was faster."""
        if drawing.lasting and self.promises.shared:
            told = self.promises.renew(drawing.id, STORING)
            if told == "cancelled":
                drawing.cancel(CancelledByClient())
                assert drawing.why is not None
                raise drawing.why
            if told != "held":
                before = self.stored(drawing.id)
                if before is not None:
                    return before.asked
        return self._put(drawing, image)

    def _put(self, drawing: Drawing, image: GeneratedImage) -> dict[str, Any]:
        """Store the image. What differs between two drawings of the same one stands beside it, not in it."""
        assert self.served.counter is not None
        asked = drawing.asked
        record = image.record.with_(id=asked["id"], promoted=asked["promoted"], overridden=tuple(asked["overridden"]))
        texts = {"prompt": asked["prompt"], "negative_prompt": asked["config"].get("negative_prompt", "")}
        beside = {
            "timings": dict(image.timings),
            "warnings": self.served.counter.warnings(texts),
            "request": asked["request"],
        }
        return self.store.put(drawing.id, encode_png(image.image, record), record.to_dict() | beside)

    def _settle(self, drawing: Drawing, outcome: Mapping[str, Any] | Exception) -> None:
        """Write down how a lasting image ended; where the store refuses, it stays promised."""
        try:
            if not isinstance(outcome, Exception):
                self.promises.keep(drawing.id)
            elif isinstance(outcome, Stopping):
                self.promises.give_back(drawing.id)
            elif isinstance(outcome, CancelledByClient):
                with contextlib.suppress(UnknownImage):
                    self.promises.cancel(drawing.id)
            elif not isinstance(outcome, StoreRefused | StoreUnreachable):
                self.promises.fail(drawing.id)
        except (StoreRefused, StoreUnreachable) as error:
            log.error("the store refuses the end of the image %s: %s", drawing.id, error.__cause__ or error)
        finally:
            self.promises.let_go(drawing.id)

    def _forget(self) -> None:
        bound = time.monotonic() - REMEMBERED
        while self.ended:
            oldest = next(iter(self.ended.values()))
            if len(self.ended) <= MOST_REMEMBERED and (oldest.ended or 0) > bound:
                return
            del self.ended[oldest.id]

    # --- before their time -----------------------------------------------------------------------------------------

    async def cancel(self, drawing: Drawing) -> str:
        """Cancel it, and wait until it is. Returns the state that it has then."""
        drawing.cancel(CancelledByClient())
        await _wait_for([drawing], ANSWER)
        if drawing.busy and not drawing.over:  # being stored: only then it is known what came first
            await _wait_for([drawing], OUTAGE)
        return drawing.state

    async def drain(self, seconds: float, answer: float = ANSWER) -> None:
        """Tell those who have not begun, give the others so many seconds, then tell them too.

        Whoever is told gets `Stopping`; a lasting image stays recorded as queued, for the next start. Returns when
        everybody is told, at the latest `answer` seconds later, whether or not the engine and the store are done.
        """
        stopping = Stopping("the service stops before the image is done; ask again")
        for drawing in list(self.making.values()):
            if drawing.state == "queued":
                _abandon(drawing, stopping)
        await _wait_for(list(self.making.values()), seconds)
        left = [drawing for drawing in self.making.values() if not drawing.over]
        for drawing in left:
            _abandon(drawing, stopping)
        await _wait_for(left, answer)
        for drawing in left:
            if not drawing.over:  # its store does not answer; what is written in the end is found under its id
                drawing.end(stopping)


def _abandon(drawing: Drawing, why: Exception) -> None:
    drawing.cancel(why)
    if drawing.task is not None and not drawing.busy:
        drawing.task.cancel()  # the engine may be stuck: nobody waits for it


async def _wait_for(drawings: Sequence[Drawing], seconds: float) -> None:
    tasks = [drawing.task for drawing in drawings if drawing.task is not None]
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)
