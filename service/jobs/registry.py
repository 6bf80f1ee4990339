"""The registry: every job under way in this process, from acceptance until its image is stored.

A job is given to the engine, written down where it is durable, followed, and stored. One that another replica draws and
somebody here waits for stands beside them under the same kind of handle. The registry lives on the event loop, and
leaves it for everything that takes long; the engine's thread reaches it through the loop.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from PIL import Image

from sdxl_lab.config import ConfigError
from sdxl_lab.errors import Cancelled, EngineStopped, ModelMismatch
from sdxl_lab.images import GeneratedImage, encode_png
from sdxl_lab.job import ImageRequest, Job, JobState
from service.deployment import Deployment, Stopping, on_loop
from service.jobs.errors import CancelledByClient
from service.jobs.leases import Leases
from service.jobs.records import JobRecord, StoredImage
from service.jobs.store import RecordChanged, Store, StoreRefused, StoreUnreachable, UnknownImage, Version

REMEMBERED = 600  # seconds, and at most
MOST_REMEMBERED = 1000  # jobs that failed or were cancelled; those that are done the store knows
OUTAGE = 60  # seconds for which an image that is drawn waits for a store that does not answer
RETRY = 1.0  # seconds between two tries
ANSWER = 2  # seconds for a cancelled job to leave the engine, and for what becomes of it to be written down

# What is no bug of ours, and needs no traceback in the log.
EXPECTED = (
    *(ConfigError, ModelMismatch, Cancelled, EngineStopped, Stopping),
    *(StoreRefused, StoreUnreachable, RecordChanged, UnknownImage),
)

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """The outcome of a job: the stored image's record, and its PNG if it was drawn here just now."""

    image: StoredImage
    png: bytes | None = None


@dataclass(eq=False)
class RegisteredJob:
    """A job that is drawn here. `leased`: its record is written, and held by this replica."""

    job: Job[Stored]
    record: JobRecord
    drawn: asyncio.Event
    leased: bool
    task: "asyncio.Task[None] | None" = None


class Elsewhere:
    """A job that another replica draws, as the driver of the handle that waits for it here. `task` looks how far it is;
    `waiters` is how many wait."""

    def __init__(self, job: Job[Stored], drawn: asyncio.Event, mark: Callable[[uuid.UUID], object]) -> None:
        self.job, self.drawn, self.waiters = job, drawn, 0
        self._mark = mark
        self.task: asyncio.Task[None]

    def position(self, job: Job[Any]) -> int:
        return 0

    def eta(self, job: Job[Any]) -> float | None:
        return None

    def preview(self, job: Job[Any]) -> Image.Image | None:
        return None

    def cancel(self, job: Job[Any]) -> None:
        """Mark the job's record for its holder to see; where this service stops, only the waiting ends."""
        if isinstance(job.cancel_reason, Stopping):
            job.fail(job.cancel_reason)
        else:
            self._mark(job.id)


@dataclass(frozen=True)
class Ended:
    """A job that failed or was cancelled of late; `when` by the monotonic clock."""

    record: JobRecord
    state: JobState
    when: float


class Registry:
    """`active`: the jobs that are drawn here; `elsewhere`: those of other replicas that somebody here waits for;
    `ended`: what failed or was cancelled of late, the last at the end. Each of the `observers` is told of every job
    that the engine is given."""

    def __init__(self, deployment: Deployment, store: Store, leases: Leases) -> None:
        self.deployment, self.store, self.leases = deployment, store, leases
        self.observers: list[Callable[[Job[Stored]], object]] = []
        self.elsewhere: dict[uuid.UUID, Elsewhere] = {}
        self.ended: dict[uuid.UUID, Ended] = {}
        self._entries: dict[uuid.UUID, RegisteredJob] = {}
        self._locks: WeakValueDictionary[uuid.UUID, asyncio.Lock] = WeakValueDictionary()

    @property
    def active(self) -> dict[uuid.UUID, Job[Stored]]:
        return {id: entry.job for id, entry in self._entries.items()}

    def new(self, request: ImageRequest, id: uuid.UUID, durable: bool) -> tuple[Job[Stored], asyncio.Event]:
        """A job, and the event that says that the image is drawn, or could not be."""
        loop, drawn = asyncio.get_running_loop(), asyncio.Event()

        def on_drawn(_: Job[Stored]) -> None:
            if not on_loop(loop, drawn.set):
                raise Stopping

        return Job(request, id, durable=durable, on_drawn=on_drawn), drawn

    def record(self, job: uuid.UUID) -> JobRecord:
        """What was asked of an active job."""
        return self._entries[job].record

    def lock(self, job: uuid.UUID) -> asyncio.Lock:
        """To be held by whoever looks whether a job is drawn here, and begins it if not."""
        return self._locks.setdefault(job, asyncio.Lock())

    def stored(self, image: uuid.UUID) -> StoredImage | None:
        """The image stored under an id that was derived from a key. One without a fingerprint was being written when
        the process was killed. Blocks."""
        try:
            found = self.store.record(image)
        except UnknownImage:
            return None
        return None if found.fingerprint is None else found

    # --- from the request to the engine ----------------------------------------------------------------------------

    async def begin(self, request: ImageRequest, record: JobRecord, durable: bool, version: Version | None) -> Job[Any]:
        """Give a new job to the engine and, if it is durable, write it down in place of the `version` of its record
        that was read. Returns once it would survive a restart. Raises `RecordChanged` where another replica came first,
        and what the engine and the store raise."""
        engine = self.deployment.ready_engine()
        job, drawn = self.new(request, record.id, durable)
        engine.submit(job)
        entry = self._enter(RegisteredJob(job, record, drawn, leased=False))
        accepted = asyncio.get_running_loop().create_future()
        entry.task = asyncio.create_task(self._follow(entry, version, accepted))
        refused = await asyncio.shield(accepted)
        if refused is not None:
            raise refused
        return job

    async def claim(self, request: ImageRequest, record: JobRecord, version: Version) -> Job[Any]:
        """Give a job to the engine whose record is there, and that nobody holds. Whoever waits for it here keeps the
        handle. The lease is taken first, since the job stays elsewhere where another replica is faster. Raises as
        `begin` does; if the engine refuses it, nobody holds it again."""
        engine = self.deployment.ready_engine()
        await asyncio.to_thread(self.leases.take, record, version)
        waiting = self.elsewhere.get(record.id)
        if waiting is not None and not waiting.job.over:
            job, drawn = waiting.job, waiting.drawn
            job.request = request
        else:
            job, drawn = self.new(request, record.id, durable=True)
        try:
            engine.submit(job)
        except Exception:
            await asyncio.to_thread(self._settle, record.id, Stopping())
            raise
        self.elsewhere.pop(record.id, None)
        entry = self._enter(RegisteredJob(job, record, drawn, leased=True))
        entry.task = asyncio.create_task(self._follow(entry, version))
        return job

    def _enter(self, entry: RegisteredJob) -> RegisteredJob:
        entry.job.committing = True  # until its task has begun
        self._entries[entry.job.id] = entry
        self.ended.pop(entry.job.id, None)
        for observer in self.observers:
            observer(entry.job)
        return entry

    # --- from the engine to the store ------------------------------------------------------------------------------

    async def _follow(
        self, entry: RegisteredJob, version: Version | None, accepted: "asyncio.Future[Exception | None] | None" = None
    ) -> None:
        """From the acceptance to the end, whatever it is."""
        job = entry.job
        outcome: Stored | Exception
        try:
            outcome = await self._outcome(entry, version, accepted)
        except asyncio.CancelledError:
            outcome = job.cancel_reason or Stopping()
        except Exception as error:
            outcome = job.cancel_reason or error
        job.committing = True
        refused = accepted is not None and not accepted.done()
        if isinstance(outcome, StoreRefused):
            log.error("the store refuses the image %s: %s", job.id, outcome.__cause__ or outcome)
        elif isinstance(outcome, Exception) and not isinstance(outcome, EXPECTED):
            log.error("the image %s failed", job.id, exc_info=outcome)
        if job.durable and entry.leased:
            await asyncio.to_thread(self._settle, job.id, outcome)
        if isinstance(outcome, RecordChanged):  # another replica has the job: this one is withdrawn
            job.cancel(outcome)
        if isinstance(outcome, Exception):
            job.fail(outcome)
        else:
            job.finish(outcome)
        if accepted is not None and refused:
            accepted.set_result(job.exception())
        del self._entries[job.id]
        if isinstance(outcome, Exception) and not isinstance(outcome, RecordChanged):
            self.ended[job.id] = Ended(entry.record, job.state, time.monotonic())
            self._forget()

    async def _outcome(
        self, entry: RegisteredJob, version: Version | None, accepted: "asyncio.Future[Exception | None] | None"
    ) -> Stored | Exception:
        job = entry.job
        if job.durable and not entry.leased:
            await asyncio.to_thread(self.leases.take, entry.record, version)
            entry.leased = True
        if accepted is not None:
            accepted.set_result(None)
        if (reason := job.cancel_reason) is not None:  # meanwhile
            return reason
        job.committing = False
        await entry.drawn.wait()
        job.committing = True
        if job.failure is not None:
            return job.cancel_reason or job.failure
        if isinstance(reason := job.cancel_reason, CancelledByClient):  # after its last step
            return reason
        if job.image is None:  # the service stopped waiting for it
            return Stopping()
        return await self._store(entry, job.image)

    async def _store(self, entry: RegisteredJob, image: GeneratedImage) -> Stored:
        """Store it, and where the store does not answer, try again for a while: it took long to draw."""
        ends = time.monotonic() + OUTAGE
        while True:
            try:
                return await asyncio.to_thread(self._store_once, entry, image)
            except StoreUnreachable:
                if self.deployment.closing or time.monotonic() > ends:
                    raise
            if entry.job.cancel_reason is not None:
                raise entry.job.cancel_reason
            await asyncio.sleep(RETRY)

    def _store_once(self, entry: RegisteredJob, image: GeneratedImage) -> Stored:
        """Store it, unless it was cancelled from another replica, or another replica claimed it and was faster."""
        if entry.job.durable and self.leases.shared:
            renewal = self.leases.renew(entry.job.id, JobState.STORING)
            if renewal == "cancelled":
                raise CancelledByClient
            if renewal != "held":
                found = self.stored(entry.job.id)
                if found is not None:
                    return Stored(found)
        return self._put(entry.record, image)

    def _put(self, record: JobRecord, image: GeneratedImage) -> Stored:
        stored = StoredImage.of(record, image, image.record.warnings, time.time())
        png = encode_png(image.image, stored.record)
        self.store.put(stored, png)
        return Stored(stored, png)

    def _settle(self, job: uuid.UUID, outcome: Stored | Exception) -> None:
        """Write down how a durable job ended; where the store refuses, its record stays as it is."""
        try:
            if not isinstance(outcome, Exception):
                self.leases.drop(job)
            elif isinstance(outcome, Stopping):
                self.leases.give_back(job)
            elif isinstance(outcome, CancelledByClient):
                with contextlib.suppress(UnknownImage):
                    self.leases.cancel(job)
            elif not isinstance(outcome, StoreRefused | StoreUnreachable):
                self.leases.fail(job)
        except (StoreRefused, StoreUnreachable) as error:
            log.error("the store refuses the end of the image %s: %s", job, error.__cause__ or error)
        finally:
            self.leases.let_go(job)

    def _forget(self) -> None:
        bound = time.monotonic() - REMEMBERED
        while self.ended:
            oldest = next(iter(self.ended))
            if len(self.ended) <= MOST_REMEMBERED and self.ended[oldest].when > bound:
                return
            del self.ended[oldest]

    # --- before their time -----------------------------------------------------------------------------------------

    def leave(self, job: Job[Stored]) -> None:
        """Somebody who asked for the job does not wait for it any more."""
        if not job.durable:
            job.cancel(CancelledByClient("the client left before the image was done"))
        waiting = self.elsewhere.get(job.id)
        if waiting is not None and waiting.job is job:
            waiting.waiters -= 1
            if waiting.waiters <= 0:
                waiting.task.cancel()
                del self.elsewhere[job.id]

    async def cancel(self, job: uuid.UUID) -> JobState:
        """Cancel an active job, and wait until it is. Returns the state that it has then."""
        entry = self._entries[job]
        entry.job.cancel(CancelledByClient())
        await _wait_for([entry], ANSWER)
        if not entry.job.over and entry.job.committing:  # being stored: only then it is known what came first
            await _wait_for([entry], OUTAGE)
        elif not entry.job.over and entry.job.durable:  # also if it crashes before its slow step ends
            with contextlib.suppress(UnknownImage, StoreRefused, StoreUnreachable):
                await asyncio.to_thread(self.leases.cancel, job)
        return entry.job.state

    async def drain(self, seconds: float, answer: float = ANSWER) -> None:
        """Tell those who have not begun, give the others so many seconds, then tell them too.

        Whoever is told gets `Stopping`; a durable job stays recorded as queued, for the next start. Returns when
        everybody is told, at the latest `answer` seconds later, whether or not the engine and the store are done.
        """
        for each in list(self.elsewhere.values()):
            each.job.cancel(Stopping())
        for entry in list(self._entries.values()):
            if entry.job.state is JobState.QUEUED:
                _abandon(entry)
        await _wait_for(self._entries.values(), seconds)
        left = [entry for entry in self._entries.values() if not entry.job.over]
        for entry in left:
            _abandon(entry)
        await _wait_for(left, answer)
        for entry in left:
            entry.job.fail(Stopping())  # its store does not answer; what is written in the end is found under its id


def _abandon(entry: RegisteredJob) -> None:
    entry.job.cancel(Stopping())
    if entry.task is not None and not entry.job.committing:
        entry.task.cancel()  # the engine may be stuck: nobody waits for it


async def _wait_for(entries: Iterable[RegisteredJob], seconds: float) -> None:
    tasks = [entry.task for entry in entries if entry.task is not None]
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)
