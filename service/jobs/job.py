"""Images on their way: what is asked (`Order`), and one image from its acceptance until it is stored (`Drawing`).

Knows no HTTP and no store. A drawing lives on the event loop; the engine's thread reaches it through the loop only.

    drawing = await studio.submit(Order(config, "A cat in a hat"))  # QueueFull, NotReady, ConfigError, KeyReused, ...
    try:
        async for event in drawing.events(previews=3):  # Queued once or more, Step..., Done; or raises what went wrong
            ...
        record = await drawing.result()  # or without the events
    finally:
        drawing.leave()  # cancels the image, unless it is over, or is to be drawn whoever waits
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig, canonical
from sdxl_lab.images import GeneratedImage, ImageError, open_image, read_record
from sdxl_lab.job import Job
from sdxl_lab.record import ImageRecord
from service.api.schemas import EXAMPLES

LOOK = 1.0  # seconds between two looks at one's place in the queue


class KeyReused(ValueError):
    """An idempotency key comes again with another request."""


class AlreadyOver(RuntimeError):
    """An image is to be cancelled that is finished, failed or cancelled."""


class NotOver(RuntimeError):
    """An image is to be deleted that is in the making."""


class CancelledByClient(Exception):
    """Somebody cancelled the image through its id, unless the message says otherwise."""

    def __init__(self, message: str = "the image was cancelled by DELETE /jobs") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class StoredSource:
    """The image to refine, its record, and how much of the noise schedule is gone through again."""

    id: uuid.UUID
    image: Image.Image
    record: ImageRecord
    strength: float

    @classmethod
    def of(cls, origin: uuid.UUID, png: bytes, strength: float) -> Self:
        """An image as it is stored; `ConfigError` for one that is not ours."""
        try:
            return cls(origin, open_image(png), read_record(png), strength)
        except ImageError as error:
            rule = f"an image that SDXL Lab drew ({error})"
            raise ConfigError("id", str(origin), rule, EXAMPLES["id"]) from error


@dataclass(frozen=True)
class Order:
    """What is asked. Without a `seed` one is chosen.

    `key` is an idempotency key and `scope` whose it is (two clients' equal keys are different ones): id and seed are
    derived from both. The same key must come with the same `fingerprint`. A `lasting` order, and one with a key, is
    drawn whoever waits, and survives a restart.
    """

    config: GenerationConfig
    prompt: str
    seed: int | None = None
    source: StoredSource | None = None
    key: str | None = None
    scope: str = ""
    fingerprint: str = ""
    lasting: bool = False


def fingerprint(request: Mapping[str, Any]) -> str:
    """Tells one request, as JSON holds it, from another; the order of its fields does not count."""
    return hashlib.sha256(canonical(request).encode()).hexdigest()


def derived(scope: str, key: str) -> tuple[uuid.UUID, int]:
    """The id (a version-5 UUID by its form) and the seed (32 bits: JavaScript's numbers hold it) of a key."""
    digest = hashlib.sha256(canonical({"scope": scope, "key": key}).encode()).digest()
    return uuid.UUID(bytes=digest[:16], version=5), int.from_bytes(digest[16:20])


@dataclass(frozen=True)
class Queued:
    """Accepted: the place in the queue from 1, 0 once it is drawn; `eta` in seconds, None while not measured."""

    id: uuid.UUID
    position: int
    eta: float | None


@dataclass(frozen=True)
class Step:
    """`step` UNet calls of `steps` are made; `preview` is a small, rough image, where one is due."""

    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Done:
    """The image is stored, and this is its record."""

    record: Mapping[str, Any]


Event = Queued | Step | Done


class Drawing:
    """An image on its way. `state` is queued, running, done, failed or cancelled; `error` says why for the last two.
    `asked` is what makes the very same image again, as JSON holds it."""

    def __init__(self, image_id: uuid.UUID, asked: Mapping[str, Any], lasting: bool) -> None:
        self.id, self.asked, self.lasting = image_id, asked, lasting
        self.ticket: Job[GeneratedImage] | None = None
        self.task: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        self.busy = True  # being written down or stored, which is not to be interrupted
        self.why: Exception | None = None  # it was cancelled
        self.ended: float | None = None  # by the monotonic clock
        self._record: Mapping[str, Any] | None = None
        self._progress = (0, 0)
        self._over = asyncio.Event()
        self._watching: set[asyncio.Queue[tuple[int, int] | None]] = set()

    @classmethod
    def stored(cls, image_id: uuid.UUID, record: Mapping[str, Any]) -> "Drawing":
        """One that is over, as the store has it."""
        drawing = cls(image_id, record, lasting=True)
        drawing.end(record)
        return drawing

    @property
    def state(self) -> str:
        if self._record is not None:
            return "done"
        if self.error is not None:
            return "failed" if self.why is None else "cancelled"
        return "queued" if self.ticket is not None and self.ticket.state == "queued" else "running"

    @property
    def over(self) -> bool:
        return self._over.is_set()

    @property
    def position(self) -> int:
        return self.ticket.position if self.ticket else 0

    @property
    def eta(self) -> float | None:
        """Seconds until it is drawn."""
        return self.ticket.eta if self.ticket else 0.0

    @property
    def progress(self) -> tuple[int, int]:
        """UNet calls made, of how many; (0, 0) while queued."""
        return self.ticket.progress if self.ticket else self._progress

    async def result(self) -> Mapping[str, Any]:
        """The stored image's record. Raises what went wrong. Cancelling this leaves the image alone."""
        await self._over.wait()
        if self._record is None:
            assert self.error is not None
            raise self.error
        return self._record

    async def events(self, previews: int = 0) -> AsyncIterator[Event]:
        """What happens from now on: `Queued` now and whenever the place in the queue changes, a `Step` for each UNet
        call, then `Done`; or raises what went wrong. `previews` is how many of the steps show one, evenly spread."""
        queue: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        self._watching.add(queue)
        if self.over:
            queue.put_nowait(None)
        try:
            position = self.position
            yield Queued(self.id, position, self.eta)
            while True:
                try:
                    async with asyncio.timeout(LOOK if position else None):
                        made = await queue.get()
                except TimeoutError:
                    if position != self.position:
                        position = self.position
                        yield Queued(self.id, position, self.eta)
                    continue
                if made is None:
                    yield Done(await self.result())
                    return
                position = 0
                yield Step(*made, await self._preview() if _due(*made, previews) else None)
        finally:
            self._watching.discard(queue)

    async def _preview(self) -> Image.Image | None:
        ticket = self.ticket
        return await asyncio.to_thread(ticket.preview) if ticket else None

    def cancel(self, why: Exception) -> None:
        """Stop at the next step; whoever waits is told `why`. An image that is over stays as it is."""
        if not self.over:
            self.why = self.why or why
            if self.ticket:
                self.ticket.cancel()

    def leave(self) -> None:
        """The client that asked is gone."""
        if not self.lasting:
            self.cancel(CancelledByClient("the client left before the image was done"))

    # --- for whoever has it drawn ----------------------------------------------------------------------------------

    def stepped(self, calls: int, total: int) -> None:
        for queue in self._watching:
            queue.put_nowait((calls, total))

    def end(self, outcome: Mapping[str, Any] | Exception) -> None:
        """It is over. The ticket goes, and with it the latents and the pixels, also those in the frames that an
        exception came through."""
        if isinstance(outcome, Exception):
            self.error = _without_frames(outcome)
        else:
            self._record = outcome
        self._progress, self.ticket = self.progress, None
        self.ended = time.monotonic()
        self._over.set()
        for queue in self._watching:
            queue.put_nowait(None)


def _without_frames(error: Exception) -> Exception:
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error


class Elsewhere(Drawing):
    """An image that another replica draws, or drew. `arrive` waits until it is stored, failed or cancelled there, or
    is drawn here after all, and gives that drawing."""

    def __init__(self, image_id: uuid.UUID, asked: Mapping[str, Any], arrive: Callable[[], Awaitable[Drawing]]) -> None:
        super().__init__(image_id, asked, lasting=True)
        self._arrive = arrive

    async def result(self) -> Mapping[str, Any]:
        return await (await self._arrive()).result()

    async def events(self, previews: int = 0) -> AsyncIterator[Event]:
        yield Queued(self.id, 0, None)
        async for event in (await self._arrive()).events(previews):
            yield event

    def cancel(self, why: Exception) -> None:
        """Nothing: who draws it has its own reasons."""


def _due(step: int, steps: int, previews: int) -> bool:
    """Whether one of so many previews belongs to this step: evenly spread, none before the first or after the last."""
    return step < steps and (step * (previews + 1)) // steps > ((step - 1) * (previews + 1)) // steps
