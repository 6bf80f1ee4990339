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
from collections.abc import Callable, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.images import Picture, PictureError, encode_png, open_picture, read_record
from sdxl_lab.promotion import load_slot
from sdxl_lab.store import Page, Store, StoreRefused, UnknownPicture, picture_id
from service.attestation import Attestation, attest
from service.jobs import AlreadyOver, CancelledByClient, Drawing, KeyReused, NotOver, Order, SourcePicture, derived
from service.logs import note
from service.metrics import Metrics
from service.problems import NotReady, StillDrawing, Stopping, known
from service.schemas import EXAMPLES, overridden
from service.settings import Settings

if TYPE_CHECKING:
    from sdxl_lab.engine import Engine, Ticket

REMEMBERED = 600  # seconds, and at most
MOST_REMEMBERED = 1000  # pictures that failed or were cancelled; those that are done the store knows
SWEEP = 60  # seconds between two looks at the store
CLAIM = 900  # seconds after which an unfinished job of a shared store has lost its replica
TOLD = 86_400  # seconds for which a lasting picture that failed or was cancelled can be asked after
ATTEMPTS = 3  # after so many starts a job is believed to be what ends the process
ANSWER = 2  # seconds for a cancelled picture to leave the engine

log = logging.getLogger(__name__)


class Studio:
    """One slot being served. Raises `SlotError` or `ConfigError` at once where the slot is not what it says it is, and
    `StoreRefused` where the store cannot be opened."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.slot = load_slot(settings.slot)
        self.store = Store(settings.store)
        self.engine: Engine | None = None
        self.failure: str | None = None
        self.attestation = Attestation("the golden pictures have not been drawn again yet")
        self.attesting = True
        self.metrics = Metrics(self)
        self.making: dict[uuid.UUID, Drawing] = {}
        self._ended: dict[uuid.UUID, Drawing] = {}  # failed or cancelled, the last at the end
        self._locks: WeakValueDictionary[uuid.UUID, asyncio.Lock] = WeakValueDictionary()
        self._housekeeper: asyncio.Task[None] | None = None
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
        self._housekeeper = asyncio.create_task(self._keep_house())

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
        if self._housekeeper is not None:
            self._housekeeper.cancel()
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

        With a key that was seen before, this is the picture in the making, the stored one, or a new attempt at the same
        one. Returns once the order would survive a restart, where it is to. Raises `NotReady`, `KeyReused`,
        `StoreRefused`, and what `Job` and `Engine.submit` raise.
        """
        self.ready_engine()
        if order.key is None:
            return await self._begin(uuid.uuid4(), order)
        picture, seed = derived(order.scope, order.key)
        async with self._locks.setdefault(picture, asyncio.Lock()):
            drawing = self.making.get(picture) or await asyncio.to_thread(self._drawn, picture)
            if drawing is not None:
                _same_request(order.fingerprint, drawing.asked["request"])
                return drawing
            with contextlib.suppress(UnknownPicture):
                promised = await asyncio.to_thread(self.store.job, picture)
                _same_request(order.fingerprint, promised["request"])
                if promised["state"] == "queued":  # the very picture, even if another configuration was promoted since
                    order = await asyncio.to_thread(self._promised, promised)
            return await self._begin(picture, order, seed)

    def _drawn(self, picture: uuid.UUID) -> Drawing | None:
        """The stored picture. One without a request beside it was being written when the process was killed."""
        try:
            record = self.store.record(picture)
        except UnknownPicture:
            return None
        return Drawing.stored(picture, record) if "request" in record else None

    async def _begin(
        self, picture: uuid.UUID, order: Order, seed: int | None = None, before: Mapping[str, Any] | None = None
    ) -> Drawing:
        """Give the order to the engine, and write it down if it is to last. `before` is what was written down of it
        when it was begun the last time."""
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
            **_as_begun(before),
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
        drawing.task = asyncio.create_task(self._follow(drawing, drawing.ticket, accepted))
        await accepted.wait()
        if isinstance(drawing.error, StoreRefused):
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

    async def _follow(self, drawing: Drawing, ticket: "Ticket", accepted: asyncio.Event) -> None:
        """From the acceptance to the end, whatever it is."""
        outcome: Mapping[str, Any] | Exception
        try:
            if drawing.lasting:
                await asyncio.to_thread(self.store.put_job, drawing.id, drawing.asked)
            accepted.set()
            if drawing.why is not None:  # meanwhile
                raise drawing.why
            drawing.busy = False
            picture = await _outcome(ticket)
            drawing.busy = True
            outcome = await asyncio.to_thread(self._keep, drawing, picture)
        except asyncio.CancelledError:
            outcome = drawing.why or Stopping("the service stops before the picture is done")
        except Exception as error:
            outcome = drawing.why or error
        drawing.busy = True
        ticket.cancel()
        if isinstance(outcome, StoreRefused):
            log.error("the store refuses the picture %s: %s", drawing.id, outcome.__cause__ or outcome)
        elif isinstance(outcome, Exception) and drawing.lasting and known(outcome) is None:
            log.error("the picture %s failed", drawing.id, exc_info=outcome)
        if drawing.lasting and accepted.is_set():
            await asyncio.to_thread(self._settle, drawing, outcome)
        drawing.end(outcome)
        accepted.set()
        del self.making[drawing.id]
        if isinstance(outcome, Exception):
            self._ended[drawing.id] = drawing
            self._forget()

    def _settle(self, drawing: Drawing, outcome: Mapping[str, Any] | Exception) -> None:
        """Write down how a lasting picture ended; where the store refuses, it stays promised."""
        try:
            if not isinstance(outcome, Exception):
                self.store.drop_job(drawing.id)
            elif isinstance(outcome, Stopping):
                self.store.put_job(drawing.id, {**drawing.asked, "released": True})
            elif not isinstance(outcome, StoreRefused):
                state = "cancelled" if isinstance(outcome, CancelledByClient) else "failed"
                self.store.put_job(drawing.id, {**drawing.asked, "state": state})
        except StoreRefused as error:
            log.error("the store refuses the end of the picture %s: %s", drawing.id, error.__cause__ or error)

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
        state = drawing.state if drawing is not None else (await self.find(text))[0]
        if drawing is None and state == "queued":  # promised by a replica that is gone
            promise = await asyncio.to_thread(self.store.job, wanted)
            await asyncio.to_thread(self.store.put_job, wanted, {**promise, "state": "cancelled"})
        elif drawing is None or state in ("done", "failed"):
            raise AlreadyOver(f"the picture {wanted} is {state} and cannot be cancelled any more")

    # --- pictures that there are -----------------------------------------------------------------------------------

    async def find(self, text: str) -> tuple[str, Drawing | Mapping[str, Any]]:
        """A picture's state, with the `Drawing` of one on its way or ended without a picture, the record of a stored
        one, or what was promised before a restart. Raises `UnknownPicture`."""
        wanted = picture_id(text)
        drawing = self.making.get(wanted)
        if drawing is not None:
            return drawing.state, drawing
        with contextlib.suppress(UnknownPicture):
            return "done", await asyncio.to_thread(self.store.record, wanted)
        with contextlib.suppress(UnknownPicture):
            promise = await asyncio.to_thread(self.store.job, wanted)
            if wanted not in self._ended or promise["state"] == "queued":
                return promise["state"], promise
        if wanted in self._ended:
            return self._ended[wanted].state, self._ended[wanted]
        raise UnknownPicture(text)

    async def stored(self, text: str) -> bytes:
        """A picture's PNG. Raises `UnknownPicture`, or `StillDrawing` for one in the making."""
        wanted = picture_id(text)
        try:
            return await asyncio.to_thread(self.store.get, wanted)
        except UnknownPicture:
            state, found = await self.find(text)
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
        if wanted in self.making:
            raise NotOver(f"the picture {wanted} is in the making: DELETE /jobs/{wanted} cancels it")
        await asyncio.to_thread(self.store.delete, wanted)

    async def source(self, text: str, strength: float) -> SourcePicture:
        """A stored picture to refine. Raises as `stored` does, and `ConfigError` for one that is not ours."""
        png = await self.stored(text)
        return await asyncio.to_thread(_source, picture_id(text), png, strength)

    # --- what nobody waits for -------------------------------------------------------------------------------------

    async def _keep_house(self) -> None:
        """Take up what was promised and not drawn; remove what is too old."""
        while True:
            if self.trouble is None:
                try:
                    await self._take_up()
                    retention = self.settings.retention
                    if retention is not None:
                        await asyncio.to_thread(self.store.remove_older, retention)
                    else:
                        await asyncio.to_thread(self.store.remove_leftovers)
                except Exception:
                    log.exception("the store could not be looked through; the next try is in %d s", SWEEP)
            await asyncio.sleep(SWEEP if self.trouble is None else 0.5)

    async def _take_up(self) -> None:
        """Begin the jobs that nobody draws: of a folder, which one replica owns, all that are not ours; of a shared
        store those that a replica gave back as it stopped, and those that are too old to be anybody's."""
        from sdxl_lab.engine import QueueFull

        for promise in await asyncio.to_thread(self.store.jobs):
            picture = uuid.UUID(promise["id"])
            age = time.time() - promise["claimed"]
            if promise["state"] != "queued":
                if age > TOLD:
                    await asyncio.to_thread(self.store.drop_job, picture)
                continue
            if self.store.folder is None and not promise["released"] and age < CLAIM:
                continue
            async with self._locks.setdefault(picture, asyncio.Lock()):
                if picture in self.making:
                    continue
                if await asyncio.to_thread(self._drawn, picture):
                    await asyncio.to_thread(self.store.drop_job, picture)
                    continue
                try:
                    if promise["attempts"] >= ATTEMPTS:
                        raise RuntimeError(f"it was begun {ATTEMPTS} times and never finished")
                    order = await asyncio.to_thread(self._promised, promise)
                    await self._begin(picture, order, before=promise)
                    log.info("took up the picture %s, promised before", picture)
                except (QueueFull, NotReady, StoreRefused):
                    return
                except Exception as error:
                    log.error("cannot take up the picture %s: %s", picture, error)
                    await asyncio.to_thread(self.store.put_job, picture, {**promise, "state": "failed"})

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


def _as_begun(before: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is written down of a beginning, the first or another; times in seconds since 1970."""
    now = round(time.time(), 3)
    return {
        "state": "queued",
        "created": before["created"] if before else now,
        "claimed": now,
        "released": False,
        "attempts": before["attempts"] + 1 if before else 1,
    }


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
