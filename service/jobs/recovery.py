"""Recovery: renews the leases of what is drawn here, claims what nobody holds any more, follows what other replicas
draw, and cleans the store."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sdxl_lab.errors import EngineStopped, ModelMismatch, QueueFull
from sdxl_lab.images import open_image, read_record
from sdxl_lab.job import OVER, ImageRequest, Job, JobState
from sdxl_lab.source import SourceImage
from service.deployment import NotReady, Stopping
from service.jobs.errors import CancelledByClient
from service.jobs.records import JobRecord, Written
from service.jobs.registry import Elsewhere, Registry, Stored
from service.jobs.store import RecordChanged, StoreRefused, StoreUnreachable, UnknownImage, Version
from service.settings import Settings

LOOK = 1.0  # seconds between two looks at what is drawn here, and at one job elsewhere
CLEAN = 60  # seconds between two looks at the store
ATTEMPTS = 5  # after so many starts a job is believed to be what ends the process
STRANGE = 900  # seconds for which a job for other models is left to a replica that has them
RENEWALS = 4  # at a time
# What says that the engine takes nothing at the moment. The record stays as it is.
NOT_NOW = (EngineStopped, QueueFull, NotReady)

log = logging.getLogger(__name__)


class Recovery:
    """Looks after the durable jobs in the store, those of this replica and those that no replica holds."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings, self.registry = settings, registry
        self.deployment, self.store, self.leases = registry.deployment, registry.store, registry.leases
        self._chores: list[asyncio.Task[None]] = []
        self._marking: set[asyncio.Future[None]] = set()

    # --- what nobody waits for -------------------------------------------------------------------------------------

    def start(self) -> None:
        look = self.settings.lease / 2 if self.leases.shared else CLEAN
        for seconds, chore in ((LOOK, self._renew), (look, self.claim_unheld), (CLEAN, self._clean)):
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
            await asyncio.sleep(seconds if self.deployment.trouble is None else LOOK)

    async def _renew(self) -> None:
        """Renew the leases of what is drawn here, and see what was cancelled elsewhere."""
        gate = asyncio.Semaphore(RENEWALS)

        async def renew(job: Job[Stored]) -> None:
            async with gate:
                state: Written = JobState.QUEUED if job.state is JobState.QUEUED else JobState.RUNNING
                if job.committing or job.over or not self.leases.due(job.id, state):
                    return
                if await asyncio.to_thread(self.leases.renew, job.id, state) == "cancelled":
                    job.cancel(CancelledByClient())

        durable = [job for job in self.registry.active.values() if job.durable]
        results = await asyncio.gather(*map(renew, durable), return_exceptions=True)
        for error in results:
            if error is not None:
                raise error

    async def claim_unheld(self) -> None:
        """Begin what nobody draws: all of a folder; of a shared store one, and more until those here fill a call,
        since other replicas look as well."""
        if self.deployment.trouble is not None:
            return
        for job in await asyncio.to_thread(self.leases.unheld):
            try:
                await self.claim(job)
            except NOT_NOW:
                return
            if self.leases.shared and self.deployment.ready_engine().filled:
                return

    async def _clean(self) -> None:
        """Remove what is too old."""
        if self.deployment.trouble is None:
            retention = self.settings.retention
            if retention is not None:
                await asyncio.to_thread(self.store.remove_older, retention)
            else:
                await asyncio.to_thread(self.store.remove_leftovers)

    # --- what nobody holds -----------------------------------------------------------------------------------------

    async def claim_now(self, record: JobRecord) -> Job[Stored] | Stored | None:
        """Claim it because it is asked for; None where it is another's, or cannot be begun now."""
        if self.deployment.trouble is None and self.leases.free(record):
            with contextlib.suppress(*NOT_NOW, StoreRefused):
                return await self.claim(record.id)
        return None

    async def claim(self, id: uuid.UUID) -> Job[Stored] | Stored | None:
        """The job, begun here unless it was; its image where that is stored; None where another replica has it, or it
        cannot be drawn."""
        async with self.registry.lock(id):
            if id in self.registry.active:
                return self.registry.active[id]
            stored = await asyncio.to_thread(self.registry.stored, id)
            if stored is not None:
                await asyncio.to_thread(self.leases.drop, id)
                return Stored(stored)
            try:
                record, version = await asyncio.to_thread(self.store.read_job, id)
            except UnknownImage:
                return None
            if record.state in OVER or not self.leases.free(record):
                return None
            try:
                job = await self.begin_again(record, version)
            except RecordChanged:
                return None
            except (StoreRefused, StoreUnreachable, *NOT_NOW):
                raise
            except Exception as error:
                if not self.leaves_to_others(record, error):
                    log.error("cannot draw the image %s, accepted before: %s", id, error)
                    await asyncio.to_thread(self.leases.fail, id)
                return None
            log.info("claimed the image %s, accepted before", id)
            return job

    async def begin_again(self, record: JobRecord, version: Version) -> Job[Stored]:
        """Begin what nobody holds, under the lock of the job. Raises as `request` and `Registry.claim` do, and
        `RuntimeError` for a job that was begun too often."""
        if record.attempts >= ATTEMPTS:
            raise RuntimeError(f"it was begun {ATTEMPTS} times and never finished")
        request = await asyncio.to_thread(self.request, record)
        return await self.registry.claim(request, record.with_(attempts=record.attempts + 1), version)

    def leaves_to_others(self, record: JobRecord, error: Exception) -> bool:
        """While one configuration takes the place of another, there are replicas with other models."""
        return self.leases.shared and time.time() - record.created < STRANGE and isinstance(error, ModelMismatch)

    def request(self, record: JobRecord) -> ImageRequest:
        """What a record asks for. Raises `ModelMismatch` where other models are served by now, and `UnknownImage` or
        `ImageError` where the source is gone. Blocks."""
        asked, promoted = record.request(), self.deployment.slot.config
        if asked.config.model != promoted.model:
            raise ModelMismatch(asked.config.model.to_dict(), "the promoted one", promoted.model.base)
        if record.source is None or record.strength is None:
            return asked
        source = source_image(record.source, self.store.get(record.source), record.strength)
        return replace(asked, source=source)

    # --- what other replicas draw ----------------------------------------------------------------------------------

    def elsewhere(self, record: JobRecord) -> Job[Stored]:
        """The handle of a job that another replica draws, for one more who waits; it is drawn here once that one renews
        its lease no more."""
        waiting = self.registry.elsewhere.get(record.id)
        if waiting is None or waiting.job.over:
            job, drawn = self.registry.new(record.request(), record.id, durable=True)
            waiting = Elsewhere(job, drawn, self._mark)
            job.follow(JobState.QUEUED, waiting)
            self.registry.elsewhere[record.id] = waiting
            waiting.task = asyncio.create_task(self._watch(waiting))
        waiting.waiters += 1
        return waiting.job

    def _mark(self, id: uuid.UUID) -> None:
        """Somebody here cancelled a job of another replica."""

        async def mark() -> None:
            with contextlib.suppress(UnknownImage, StoreRefused, StoreUnreachable):
                await asyncio.to_thread(self.leases.cancel, id)

        marking = asyncio.ensure_future(mark())
        self._marking.add(marking)
        marking.add_done_callback(self._marking.discard)

    async def _watch(self, waiting: Elsewhere) -> None:
        job = waiting.job
        while not job.over and job.id not in self.registry.active:
            if self.deployment.closing:
                job.cancel(Stopping())
                break
            try:
                await self._look(waiting)
            except StoreUnreachable:
                pass
            except Exception as error:
                job.fail(error)
            if not job.over:
                await asyncio.sleep(LOOK)
        if self.registry.elsewhere.get(job.id) is waiting:
            del self.registry.elsewhere[job.id]

    async def _look(self, waiting: Elsewhere) -> None:
        job = waiting.job
        try:
            record = await asyncio.to_thread(self.store.job, job.id)
        except UnknownImage:
            stored = await asyncio.to_thread(self.registry.stored, job.id)
            if stored is None:
                raise
            self._arrived(waiting, Stored(stored))
            return
        if record.state is JobState.CANCELLED:
            raise CancelledByClient
        if record.state is JobState.FAILED:
            raise RuntimeError(f"another replica could not draw the image {job.id}")
        if job.id not in self.registry.active:  # nor claimed here meanwhile
            job.follow(record.state, waiting)
        found = await self.claim_now(record)
        if isinstance(found, Stored):
            self._arrived(waiting, found)

    def _arrived(self, waiting: Elsewhere, stored: Stored) -> None:
        if waiting.job.id not in self.registry.active:
            waiting.job.follow(JobState.STORING, waiting)
            waiting.job.finish(stored)


def source_image(id: uuid.UUID, png: bytes, strength: float) -> SourceImage:
    """A stored image to refine. Raises `ImageError` for one that is not ours."""
    # A PNG that somebody put into the store does not know under which id.
    return SourceImage(open_image(png), strength, read_record(png).with_(id=str(id)), stage="refiner")
