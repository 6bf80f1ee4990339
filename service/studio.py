"""What stands behind the routes: the slot, the engine, the store, and the way of a picture from one to the other.

Knows no HTTP. It lives on the event loop and leaves it for everything that takes long; torch is imported by the thread
that loads the weights. `service/jobs.py` says how a picture is asked for and followed.
"""

import asyncio
import contextlib
import copy
import logging
import math
import secrets
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.images import Picture, PictureError, encode_png, open_picture, read_record
from sdxl_lab.promotion import load_slot
from sdxl_lab.store import (
    JobChanged,
    Page,
    Store,
    StoreRefused,
    StoreUnreachable,
    UnknownPicture,
    Version,
    picture_id,
)
from service.attestation import Attestation, attest
from service.jobs import (
    LOOK,
    AlreadyOver,
    CancelledByClient,
    Drawing,
    Elsewhere,
    KeyReused,
    NotOver,
    Order,
    SourcePicture,
    derived,
)
from service.logs import note
from service.metrics import Metrics
from service.problems import NotReady, StillDrawing, Stopping, known
from service.promises import OVER, STORING, Promises
from service.schemas import EXAMPLES, overridden
from service.settings import Settings

if TYPE_CHECKING:
    from sdxl_lab.engine import Engine, Ticket

REMEMBERED = 600  # seconds, and at most
MOST_REMEMBERED = 1000  # pictures that failed or were cancelled; those that are done the store knows
SWEEP = 60  # seconds between two looks at the store
ATTEMPTS = 5  # after so many starts a promise is believed to be what ends the process
OUTAGE = 60  # seconds for which a picture that is drawn waits for a store that does not answer
STRANGE = 900  # seconds for which a promise for other models is left to a replica that has them
RENEWALS = 4  # at a time
ANSWER = 2  # seconds for a cancelled picture to leave the engine

log = logging.getLogger(__name__)


class Studio:
    """One slot being served. Raises `SlotError` or `ConfigError` at once where the slot is not what it says it is, and
    `StoreRefused` where the store cannot be opened."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.slot = load_slot(settings.slot)
        self.store = Store(settings.store)
        self.promises = Promises(self.store, settings.lease)
        self.engine: Engine | None = None
        self.failure: str | None = None
        self.attestation = Attestation("the golden pictures have not been drawn again yet")
        self.attesting = True
        self.metrics = Metrics(self)
        self.making: dict[uuid.UUID, Drawing] = {}
        self._ended: dict[uuid.UUID, Drawing] = {}  # failed or cancelled, the last at the end
        self._locks: WeakValueDictionary[uuid.UUID, asyncio.Lock] = WeakValueDictionary()
        self._chores: list[asyncio.Task[None]] = []
        self._closing = False
        self._counter: TokenCounter | None = None

    # --- from start to stop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load, in a thread that does not keep the process alive: a stop need not wait for gigabytes."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._load, args=(loop,), name="load", daemon=True).start()

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            from sdxl_lab.engine import Engine

            engine = Engine.load(self.slot.config, self.settings.profile, self.settings.max_queue)
            counter = TokenCounter(engine.models.base.tokenizers)
        except Exception as error:
            log.error("cannot serve the slot %s: %s", self.slot.folder, error)
            log.debug("loading failed", exc_info=True)
            self.failure = f"the models could not be loaded: {error}"
            return
        if not _call(loop, lambda: self._open(engine, counter)):
            engine.close()
            return
        self._attest(engine)

    def _open(self, engine: "Engine", counter: "TokenCounter") -> None:
        if self._closing:
            threading.Thread(target=engine.close, name="close").start()
            return
        self.engine, self._counter = engine, counter
        sweep = self.settings.lease / 2 if self.promises.shared else SWEEP
        for seconds, chore in ((LOOK, self._renew), (sweep, self._take_up), (SWEEP, self._clean)):
            self._chores.append(asyncio.create_task(self._again(seconds, chore)))

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
                self.attestation = Attestation(f"drawing the golden pictures again broke off: {error}")
        self.attesting = False
        if self._closing:
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

    def close(self) -> None:
        """Take no new pictures. Any thread, and a signal's handler, may call it."""
        self._closing = True

    async def drain(self, seconds: float) -> None:
        """Take no new work, tell those who have not begun, give the others so many seconds, then tell them too.

        Whoever is told gets `Stopping`; a lasting picture stays recorded as queued, for the next start. Returns when
        everybody is answered, whether or not the engine is.
        """
        self.close()
        stopping = Stopping("the service stops before the picture is done; ask again")
        for drawing in list(self.making.values()):
            if drawing.state == "queued":
                self._abandon(drawing, stopping)
        await self._wait_for(list(self.making.values()), seconds)
        left = list(self.making.values())
        for drawing in left:
            self._abandon(drawing, stopping)
        await self._wait_for(left, ANSWER)

    def _abandon(self, drawing: Drawing, why: Exception) -> None:
        drawing.cancel(why)
        if drawing.task is not None and not drawing.busy:
            drawing.task.cancel()  # the engine may be stuck: nobody waits for it

    async def _wait_for(self, drawings: list[Drawing], seconds: float) -> None:
        tasks = [drawing.task for drawing in drawings if drawing.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def stop(self) -> None:
        """Tell those who still wait, and end the engine."""
        await self.drain(0)
        for chore in self._chores:
            chore.cancel()
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)

    @property
    def trouble(self) -> str | None:
        """Why no picture can be drawn now; None if one can."""
        if self._closing:
            return "the service is stopping"
        if self.failure is not None:
            return self.failure
        if self.engine is None:
            return "the models are being loaded"
        if not self.engine.healthy:
            return f"the engine has stopped: {self.engine.failure or 'it is closed'}"
        if self.attesting:
            return "the golden pictures are being drawn again"
        if self.settings.attest == "strict" and not self.attestation.passed:
            return f"the slot {self.slot.folder.name} is not attested: {self.attestation.reason}"
        return None

    def ready_engine(self) -> "Engine":
        """The engine; `NotReady` says why there is none."""
        if self.engine is None or self.trouble is not None:
            raise NotReady(self.trouble)
        return self.engine

    def retry_after(self) -> int | None:
        """Seconds until the queue has room for one more picture, by the speed measured; None while there is none."""
        seconds = self.engine.room_seconds() if self.engine else None
        return max(1, math.ceil(seconds)) if seconds is not None else None

    # --- pictures that are asked for -------------------------------------------------------------------------------

    async def submit(self, order: Order) -> Drawing:
        """Accept an order. Whoever submits calls `Drawing.leave` in the end.

        With a key that was seen before, this is the picture in the making, here or on another replica, the stored one,
        or a new attempt at the same one. Returns once the order would survive a restart, where it is to. Raises
        `NotReady`, `KeyReused`, `StoreRefused`, `StoreUnreachable`, and what `Job` and `Engine.submit` raise.
        """
        self.ready_engine()
        if order.key is None:
            return await self._begin(uuid.uuid4(), order)
        picture, seed = derived(order.scope, order.key)
        async with self._locks.setdefault(picture, asyncio.Lock()):
            while True:
                drawing = self.making.get(picture) or await asyncio.to_thread(self._drawn, picture)
                if drawing is not None:
                    _same_request(order.fingerprint, drawing.asked["request"])
                    return drawing
                with contextlib.suppress(JobChanged):  # another replica was asked at the same moment: look again
                    return await self._ordered_again(picture, order, seed)

    async def _ordered_again(self, picture: uuid.UUID, order: Order, seed: int) -> Drawing:
        try:
            promise, version = await asyncio.to_thread(self.store.read_job, picture)
        except UnknownPicture:
            return await self._begin(picture, order, seed)
        _same_request(order.fingerprint, promise["request"])
        if promise["state"] not in OVER:
            if not self.promises.free(promise):
                return Elsewhere(picture, promise, lambda: self._arrival(picture))
            # the very picture, even if another configuration was promoted since
            order = await asyncio.to_thread(self._promised, promise)
        return await self._begin(picture, order, seed, version=version)

    async def _arrival(self, picture: uuid.UUID) -> Drawing:
        """Wait for what another replica draws; draw it once that one does not renew its lease any more."""
        while not self._closing:
            with contextlib.suppress(StoreUnreachable):
                drawing = self.making.get(picture) or await self._arrived(picture)
                if drawing is not None:
                    return drawing
            await asyncio.sleep(LOOK)
        raise Stopping("the service stops before the picture is done; ask again")

    async def _arrived(self, picture: uuid.UUID) -> Drawing | None:
        try:
            promise = await asyncio.to_thread(self.store.job, picture)
        except UnknownPicture:
            drawing = await asyncio.to_thread(self._drawn, picture)
            if drawing is None:
                raise
            return drawing
        if promise["state"] in OVER:
            drawing = Drawing(picture, promise, lasting=True)
            if promise["state"] == "cancelled":
                drawing.cancel(CancelledByClient("the picture was cancelled by DELETE /jobs"))
            drawing.end(drawing.why or RuntimeError(f"another replica could not draw the picture {picture}"))
            return drawing
        return await self._take_now(picture, promise)

    def _drawn(self, picture: uuid.UUID) -> Drawing | None:
        """The stored picture. One without a request beside it was being written when the process was killed."""
        try:
            record = self.store.record(picture)
        except UnknownPicture:
            return None
        return Drawing.stored(picture, record) if "request" in record else None

    async def _begin(
        self,
        picture: uuid.UUID,
        order: Order,
        seed: int | None = None,
        before: Mapping[str, Any] | None = None,
        version: Version | None = None,
    ) -> Drawing:
        """Give the order to the engine, and promise it if it is to last. `before` is what was promised when it was
        begun the last time, `version` that of the promise that this one takes the place of. Raises `JobChanged` where
        another replica did so first."""
        engine = self.ready_engine()
        from sdxl_lab.trajectory import Job, Source

        if order.seed is not None:
            seed = order.seed
        elif seed is None:
            seed = secrets.randbelow(2**32)  # JavaScript's numbers hold it
        origin = order.source
        source = None if origin is None else Source(origin.image, origin.strength, dict(origin.record))
        job = Job(order.config, order.prompt, seed, source)
        asked = {
            "created": before["created"] if before else round(time.time(), 3),
            "attempts": before["attempts"] + 1 if before else 1,
            "id": str(picture),
            "request": order.fingerprint,
            "prompt": job.prompt,
            "seed": job.seed,
            "config": job.config.to_dict(),
            "promoted": self.slot.digest,
            "overridden": overridden(self.slot.config, job.config),
            "source": None if origin is None else str(origin.id),
            "strength": None if origin is None else origin.strength,
        }
        drawing = Drawing(picture, asked, order.lasting or order.key is not None)
        loop = asyncio.get_running_loop()

        def stepped(calls: int, total: int) -> None:
            _call(loop, lambda: drawing.stepped(calls, total))

        drawing.ticket = engine.submit(job, stepped)
        self._watch(picture, drawing.ticket)
        self.making[picture] = drawing
        self._ended.pop(picture, None)
        accepted = asyncio.Event()
        drawing.task = asyncio.create_task(self._follow(drawing, drawing.ticket, accepted, version))
        await accepted.wait()
        if isinstance(drawing.error, StoreRefused | StoreUnreachable | JobChanged):
            raise drawing.error
        return drawing

    def _watch(self, picture_id: uuid.UUID, ticket: "Ticket") -> None:
        """Have the picture counted and logged when it is over, in a line that names the request it is for."""
        note(picture=str(picture_id))
        context = copy_context()
        ticket.future.add_done_callback(lambda _: context.run(self._over, picture_id, ticket))

    def _over(self, picture_id: uuid.UUID, ticket: "Ticket") -> None:
        self.metrics.count(ticket)
        calls, total = ticket.progress
        fields: dict[str, Any] = {"picture": str(picture_id), "state": ticket.state, "steps": calls, "of": total}
        if ticket.first_step is not None:
            fields["first_step_ms"] = round(1000 * (ticket.first_step - ticket.submitted), 1)
        if ticket.state == "done":
            fields |= ticket.future.result().timings
        log.info("picture %s", ticket.state, extra={"fields": fields})

    async def _follow(
        self, drawing: Drawing, ticket: "Ticket", accepted: asyncio.Event, version: Version | None
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
            picture = await _outcome(ticket)
            drawing.busy = True
            outcome = await self._stored(drawing, picture)
        except asyncio.CancelledError:
            outcome = drawing.why or Stopping("the service stops before the picture is done")
        except Exception as error:
            outcome = drawing.why or error
        drawing.busy = True
        ticket.cancel()
        if isinstance(outcome, StoreRefused):
            log.error("the store refuses the picture %s: %s", drawing.id, outcome.__cause__ or outcome)
        elif isinstance(outcome, Exception) and drawing.lasting and known(outcome) is None and accepted.is_set():
            log.error("the picture %s failed", drawing.id, exc_info=outcome)
        if drawing.lasting and accepted.is_set():
            await asyncio.to_thread(self._settle, drawing, outcome)
        drawing.end(outcome)
        accepted.set()
        del self.making[drawing.id]
        if isinstance(outcome, Exception) and not isinstance(outcome, JobChanged):
            self._ended[drawing.id] = drawing
            self._forget()

    def _settle(self, drawing: Drawing, outcome: Mapping[str, Any] | Exception) -> None:
        """Write down how a lasting picture ended; where the store refuses, it stays promised."""
        try:
            if not isinstance(outcome, Exception):
                self.promises.keep(drawing.id)
            elif isinstance(outcome, Stopping):
                self.promises.give_back(drawing.id)
            elif isinstance(outcome, CancelledByClient):
                with contextlib.suppress(UnknownPicture):
                    self.promises.cancel(drawing.id)
            elif not isinstance(outcome, StoreRefused | StoreUnreachable):
                self.promises.fail(drawing.id)
        except (StoreRefused, StoreUnreachable) as error:
            log.error("the store refuses the end of the picture %s: %s", drawing.id, error.__cause__ or error)
        finally:
            self.promises.let_go(drawing.id)

    async def _stored(self, drawing: Drawing, picture: Picture) -> Mapping[str, Any]:
        """Store it, and where the store does not answer, try again for a while: it took long to draw."""
        ends = time.monotonic() + OUTAGE
        while True:
            try:
                return await asyncio.to_thread(self._keep_once, drawing, picture)
            except StoreUnreachable:
                if self._closing or time.monotonic() > ends:
                    raise
            if drawing.why is not None:
                raise drawing.why
            await asyncio.sleep(LOOK)

    def _keep_once(self, drawing: Drawing, picture: Picture) -> Mapping[str, Any]:
        """Store it, unless it was cancelled from another replica, or another replica took it over and was faster."""
        if drawing.lasting and self.promises.shared:
            told = self.promises.renew(drawing.id, STORING)
            if told == "cancelled":
                drawing.cancel(CancelledByClient("the picture was cancelled by DELETE /jobs"))
                assert drawing.why is not None
                raise drawing.why
            if told != "held":
                before = self._drawn(drawing.id)
                if before is not None:
                    return before.asked
        return self._keep(drawing, picture)

    def _keep(self, drawing: Drawing, picture: Picture) -> dict[str, Any]:
        """Store the picture. What differs between two drawings of the same one stands beside it, not in it."""
        assert self._counter is not None
        asked = drawing.asked
        record = {**picture.record, **{name: asked[name] for name in ("id", "promoted", "overridden")}}
        texts = {"prompt": asked["prompt"], "negative_prompt": asked["config"].get("negative_prompt", "")}
        beside = {
            "timings": dict(picture.timings),
            "warnings": self._counter.warnings(texts),
            "request": asked["request"],
        }
        return self.store.put(drawing.id, encode_png(picture.image, record), record | beside)

    def _forget(self) -> None:
        bound = time.monotonic() - REMEMBERED
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= MOST_REMEMBERED and (oldest.ended or 0) > bound:
                return
            del self._ended[oldest.id]

    async def cancel(self, text: str) -> None:
        """Cancel a picture that is queued or running, and wait until it is. Raises `UnknownPicture`, `AlreadyOver`."""
        wanted = picture_id(text)
        drawing = self.making.get(wanted)
        if drawing is not None:
            drawing.cancel(CancelledByClient("the picture was cancelled by DELETE /jobs"))
            await self._wait_for([drawing], ANSWER)
            state = drawing.state
            cancelled = state not in ("done", "failed")
        else:
            try:
                state = await asyncio.to_thread(self.promises.cancel, wanted)
                cancelled = state == "unfinished"
            except UnknownPicture:
                state, cancelled = (await self.find(text))[0], False
        if not cancelled:
            raise AlreadyOver(f"the picture {wanted} is {state} and cannot be cancelled any more")

    # --- pictures that there are -----------------------------------------------------------------------------------

    async def find(self, text: str) -> tuple[str, Drawing | Mapping[str, Any]]:
        """A picture's state, with the `Drawing` of one on its way or ended without a picture, the record of a stored
        one, or what was promised before a restart or by another replica. What nobody holds any more is begun. Raises
        `UnknownPicture`."""
        wanted = picture_id(text)
        drawing = self.making.get(wanted)
        if drawing is not None:
            return drawing.state, drawing
        with contextlib.suppress(UnknownPicture):
            return "done", await asyncio.to_thread(self.store.record, wanted)
        try:
            promise = await asyncio.to_thread(self.store.job, wanted)
        except UnknownPicture:
            if wanted in self._ended:
                return self._ended[wanted].state, self._ended[wanted]
            return "done", await asyncio.to_thread(self.store.record, wanted)  # stored meanwhile
        if promise["state"] in OVER:
            return promise["state"], self._ended.get(wanted, promise)
        drawing = await self._take_now(wanted, promise)
        if drawing is not None:
            return drawing.state, drawing.asked if drawing.state == "done" else drawing
        return "running" if promise["state"] == STORING else promise["state"], promise

    async def stored(self, text: str) -> bytes:
        """A picture's PNG. Raises `UnknownPicture`, or `StillDrawing` for one in the making."""
        wanted = picture_id(text)
        try:
            return await asyncio.to_thread(self.store.get, wanted)
        except UnknownPicture:
            state, found = await self.find(text)
            if state == "done":  # meanwhile
                return await asyncio.to_thread(self.store.get, wanted)
            if state not in ("queued", "running"):
                raise
            eta = found.eta if isinstance(found, Drawing) else None
            raise StillDrawing(f"the picture {wanted} is in the making: {state}", eta) from None

    async def page(self, limit: int, cursor: str | None) -> Page:
        """Stored pictures' records, the newest first. Raises `ConfigError` for a cursor that no page gave."""
        return await asyncio.to_thread(self.store.page, limit, cursor)

    async def delete(self, text: str) -> None:
        """Remove a stored picture. Raises `UnknownPicture`, or `NotOver` for one in the making."""
        wanted = picture_id(text)
        try:
            if wanted not in self.making:
                return await asyncio.to_thread(self.store.delete, wanted)
        except UnknownPicture:
            if (await self.find(text))[0] not in ("queued", "running"):
                raise
        raise NotOver(f"the picture {wanted} is in the making: DELETE /jobs/{wanted} cancels it")

    async def source(self, text: str, strength: float) -> SourcePicture:
        """A stored picture to refine. Raises as `stored` does, and `ConfigError` for one that is not ours."""
        png = await self.stored(text)
        return await asyncio.to_thread(_source, picture_id(text), png, strength)

    # --- what nobody waits for -------------------------------------------------------------------------------------

    async def _again(self, seconds: float, chore: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await chore()
            except (StoreRefused, StoreUnreachable) as error:
                log.warning("%s; the next try is in %g s", error, seconds)
            except Exception:
                log.exception("a chore failed; the next try is in %g s", seconds)
            await asyncio.sleep(seconds if self.trouble is None else LOOK)

    async def _clean(self) -> None:
        """Remove what is too old."""
        if self.trouble is None:
            retention = self.settings.retention
            if retention is not None:
                await asyncio.to_thread(self.store.remove_older, retention)
            else:
                await asyncio.to_thread(self.store.remove_leftovers)

    async def _renew(self) -> None:
        """Renew the leases of what is drawn here, and see what was cancelled elsewhere."""
        gate = asyncio.Semaphore(RENEWALS)

        async def renew(drawing: Drawing) -> None:
            async with gate:
                if drawing.busy or not self.promises.due(drawing.id, drawing.state):
                    return
                if await asyncio.to_thread(self.promises.renew, drawing.id, drawing.state) == "cancelled":
                    drawing.cancel(CancelledByClient("the picture was cancelled by DELETE /jobs"))

        lasting = [drawing for drawing in self.making.values() if drawing.lasting]
        results = await asyncio.gather(*map(renew, lasting), return_exceptions=True)
        for error in results:
            if error is not None:
                raise error

    async def _take_up(self) -> None:
        """Begin what was promised and nobody draws: all of a folder; of a shared store one, and more while all that is
        drawn here fits into one call, since other replicas look as well."""
        if self.trouble is not None:
            return
        from sdxl_lab.engine import EngineStopped, QueueFull

        for picture in await asyncio.to_thread(self.promises.untended):
            try:
                await self._take(picture)
            except (QueueFull, NotReady, EngineStopped):
                return
            if self.promises.shared and 2 * len(self.making) >= self.settings.max_rows:
                return

    async def _take_now(self, picture: uuid.UUID, promise: Mapping[str, Any]) -> Drawing | None:
        """Begin it, because it is asked for; None where it is another's, or cannot be begun now."""
        from sdxl_lab.engine import EngineStopped, QueueFull

        if self.trouble is None and self.promises.free(promise):
            with contextlib.suppress(QueueFull, NotReady, EngineStopped, StoreRefused):
                return await self._take(picture)
        return None

    async def _take(self, picture: uuid.UUID) -> Drawing | None:
        """Begin what was promised, unless somebody else does, or did."""
        from sdxl_lab.engine import EngineStopped, QueueFull

        async with self._locks.setdefault(picture, asyncio.Lock()):
            if picture in self.making:
                return self.making[picture]
            drawn = await asyncio.to_thread(self._drawn, picture)
            if drawn is not None:
                await asyncio.to_thread(self.promises.keep, picture)
                return drawn
            try:
                promise, version = await asyncio.to_thread(self.store.read_job, picture)
            except UnknownPicture:
                return None
            if promise["state"] in OVER or not self.promises.free(promise):
                return None
            try:
                if promise["attempts"] >= ATTEMPTS:
                    raise RuntimeError(f"it was begun {ATTEMPTS} times and never finished")
                order = await asyncio.to_thread(self._promised, promise)
                drawing = await self._begin(picture, order, before=promise, version=version)
            except JobChanged:
                return None
            except (QueueFull, NotReady, EngineStopped, StoreRefused, StoreUnreachable):
                raise
            except Exception as error:
                if self._leaves_to_others(promise, error):
                    return None
                log.error("cannot take up the picture %s: %s", picture, error)
                await asyncio.to_thread(self.promises.fail, picture)
                return None
            log.info("took up the picture %s, promised before", picture)
            return drawing

    def _leaves_to_others(self, promise: Mapping[str, Any], error: Exception) -> bool:
        """While one configuration takes the place of another, there are replicas with other models."""
        young = time.time() - promise["created"] < STRANGE
        return self.promises.shared and young and isinstance(error, ConfigError) and error.field == "model"

    def _promised(self, promise: Mapping[str, Any]) -> Order:
        """The order that a promise was made of. Raises `ConfigError` where other models are served by now."""
        config = GenerationConfig.from_dict(promise["config"])
        if config.model != self.slot.config.model:
            raise ConfigError("model", config.model.to_dict(), "the promoted one", self.slot.config.model.base)
        source = None
        if promise["source"] is not None:
            origin = uuid.UUID(promise["source"])
            source = _source(origin, self.store.get(origin), promise["strength"])
        return Order(config, promise["prompt"], promise["seed"], source, fingerprint=promise["request"], lasting=True)


class TokenCounter:
    """Says what the text encoders cut. It has tokenizers of its own, and one thread at a time: a tokenizer that two
    threads share fails with "Already borrowed", or encodes for the one with the other's truncation."""

    def __init__(self, tokenizers: tuple[Any, ...]) -> None:
        self._tokenizers = copy.deepcopy(tokenizers)
        self._lock = threading.Lock()

    def warnings(self, texts: dict[str, str]) -> list[str]:
        """A sentence for each named text that is longer than the encoders read."""
        with self._lock:
            return [warning for name, text in texts.items() if (warning := self._warning(name, text))]

    def _warning(self, name: str, text: str) -> str | None:
        for tokenizer in self._tokenizers:
            count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
            limit = tokenizer.model_max_length
            if count > limit:
                return f"{name}: the text encoders read {limit} tokens and cut the other {count - limit}"
        return None


def _source(origin: uuid.UUID, png: bytes, strength: float) -> SourcePicture:
    try:
        return SourcePicture(origin, open_picture(png), read_record(png), strength)
    except PictureError as error:
        raise ConfigError("id", str(origin), f"a picture that SDXL Lab drew ({error})", EXAMPLES["id"]) from error


def _same_request(now: str, before: str) -> None:
    if now != before:
        raise KeyReused("this Idempotency-Key came before with another request; each request takes a key of its own")


async def _outcome(ticket: "Ticket") -> Picture:
    """The ticket's picture, shielded: cancelling the future itself would pull it from under the engine."""
    future = asyncio.wrap_future(ticket.future)
    # Whoever is cancelled asks no more; asyncio would log the exception as one that nobody retrieved.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(future)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> bool:
    """Have the loop call it; False if the loop is closed already."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return False
    return True
