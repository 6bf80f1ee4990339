"""What stands behind the routes: the slot, the engine, the store, and the way of a picture from one to the other.

Knows no HTTP. It lives on the event loop and leaves it for everything that takes long; torch is imported by the thread
that loads the weights.
"""

import asyncio
import concurrent.futures
import copy
import logging
import math
import secrets
import threading
import uuid
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdxl_lab.config import GenerationConfig
from sdxl_lab.images import Picture, encode_png
from sdxl_lab.promotion import load_slot
from sdxl_lab.store import FolderStore, UnknownPicture
from service.attestation import Attestation, attest
from service.logs import note
from service.metrics import Metrics
from service.problems import NotReady, StillDrawing, StoreRefused
from service.schemas import overridden
from service.settings import Settings

if TYPE_CHECKING:
    from sdxl_lab.engine import Engine, Ticket

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A picture that is drawn and stored."""

    id: uuid.UUID
    seed: int
    picture: Picture
    overridden: list[str]
    warnings: list[str]


class Studio:
    """One slot being served. Raises `SlotError` or `ConfigError` at once where the slot is not what it says it is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.slot = load_slot(settings.slot)
        self.store = FolderStore(settings.store)
        self.engine: Engine | None = None
        self.failure: str | None = None
        self.attestation = Attestation("the golden pictures have not been drawn again yet")
        self.metrics = Metrics(self)
        self.making: dict[uuid.UUID, Ticket] = {}
        self._closing, self.attesting = False, True
        self._counter: TokenCounter | None = None
        self._seconds: deque[float] = deque(maxlen=16)  # of the last pictures, from the first step to the last

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
        """Take no new pictures and finish at most so long those that are being drawn, and those that wait if the
        forecast says that they will be done by then; cancel the rest."""
        self.close()
        tickets = list(self.making.values())
        for ticket in tickets:
            if ticket.position and (ticket.eta or 0.0) > seconds:
                ticket.cancel()
        await asyncio.to_thread(concurrent.futures.wait, [ticket.future for ticket in tickets], seconds)
        for ticket in tickets:
            ticket.cancel()

    async def stop(self) -> None:
        """Cancel what is left and end the engine."""
        self.close()
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
        """Seconds until a running picture makes room for a waiting one, by the last pictures; None before the first."""
        return math.ceil(sum(self._seconds) / len(self._seconds)) if self._seconds else None

    # --- pictures --------------------------------------------------------------------------------------------------

    async def draw(
        self,
        config: GenerationConfig,
        prompt: str,
        seed: int | None,
        source: tuple[Image.Image, float, dict[str, Any]] | None = None,
    ) -> Kept:
        """Draw and store a picture; `source` is the picture to refine, the strength, and its record.

        Cancelling this cancels the picture. Raises `NotReady`, `StoreRefused`, and what `Job` and `Engine` raise.
        """
        engine = self.ready_engine()
        from sdxl_lab.trajectory import Job, Source

        if seed is None:
            seed = secrets.randbelow(2**32)  # JavaScript's numbers hold it
        job = Job(config, prompt, seed, Source(*source) if source else None)
        picture_id = uuid.uuid4()
        ticket = engine.submit(job)
        self.making[picture_id] = ticket
        self._watch(picture_id, ticket)
        try:
            picture = await _outcome(ticket)
            self._seconds.append(picture.timings["denoise_ms"] / 1000)
            return await asyncio.to_thread(self._keep, picture_id, picture, job)
        finally:
            ticket.cancel()
            del self.making[picture_id]

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

    def _keep(self, picture_id: uuid.UUID, picture: Picture, job: Any) -> Kept:
        assert self._counter is not None
        differs = overridden(self.slot.config, job.config)
        record = {
            **picture.record,
            "id": str(picture_id),
            "promoted": self.slot.digest,
            "overridden": differs,
        }
        png = encode_png(picture.image, record)
        try:
            self.store.put(picture_id, png)
        except OSError as error:
            log.error("the store refuses a picture: %s", error)
            raise StoreRefused(
                f"the store refuses to take the picture: {error.strerror or type(error).__name__}"
            ) from error
        texts = {"prompt": job.prompt, "negative_prompt": job.config.negative_prompt or ""}
        return Kept(picture_id, job.seed, picture, differs, self._counter.warnings(texts))

    async def stored(self, picture_id: str) -> bytes:
        """A picture's PNG. Raises `UnknownPicture`, or `StillDrawing` for one in the making."""
        try:
            return await asyncio.to_thread(self.store.get, picture_id)
        except UnknownPicture:
            if any(str(making) == picture_id.lower() for making in self.making):
                raise StillDrawing(f"the picture {picture_id} is in the making") from None
            raise


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
