"""The jobs as a client's doors ask for them: submitted, repeated, looked for, cancelled; and the images they left.

What is under way is the registry's, what was left behind recovery's.
"""

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_lab.config import ConfigError, canonical
from sdxl_lab.errors import ModelMismatch
from sdxl_lab.images import ImageError
from sdxl_lab.job import OVER, ImageRequest, Job, JobState
from sdxl_lab.source import SourceImage
from service.deployment import Deployment
from service.jobs.errors import AlreadyOver, KeyReused, NotOver, StillRunning
from service.jobs.leases import Leases
from service.jobs.records import JobRecord, StoredImage
from service.jobs.recovery import Recovery, source_image
from service.jobs.registry import ANSWER, Registry, Stored
from service.jobs.store import Page, RecordChanged, Store, UnknownImage, image_id
from service.settings import Settings


@dataclass(frozen=True)
class Key:
    """An idempotency key; `scope` is whose it is: two clients' equal keys are different ones."""

    scope: str
    text: str

    @property
    def _digest(self) -> bytes:
        return hashlib.sha256(canonical({"scope": self.scope, "key": self.text}).encode()).digest()

    @property
    def id(self) -> uuid.UUID:
        """The id of its job: a version-5 UUID by its form."""
        return uuid.UUID(bytes=self._digest[:16], version=5)

    @property
    def seed(self) -> int:
        """The seed where the request has none; of 32 bits, which JavaScript's numbers hold."""
        return int.from_bytes(self._digest[16:20])


@dataclass(frozen=True)
class Terms:
    """On what terms a job is submitted. With a `key`, its id is derived from it, and the same key must come with the
    same `fingerprint`. A `durable` job, and one with a key, is drawn whoever waits, and survives a restart."""

    fingerprint: str = ""
    key: Key | None = None
    durable: bool = False


def fingerprint(request: Mapping[str, Any]) -> str:
    """Tells one request, as JSON holds it, from another; the order of its fields does not count."""
    return hashlib.sha256(canonical(request).encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """What there is under an id: a record, and the job while it is under way here."""

    state: JobState
    record: JobRecord | StoredImage
    job: Job[Stored] | None = None


class JobManager:
    """The jobs of one deployment. Raises `StoreRefused` where the store cannot be opened."""

    def __init__(self, settings: Settings, deployment: Deployment) -> None:
        self.settings, self.deployment = settings, deployment
        self.store = Store(settings.store)
        self.leases = Leases(self.store, settings.lease)
        self.registry = Registry(deployment, self.store, self.leases)
        self.recovery = Recovery(settings, self.registry)

    @property
    def active(self) -> dict[uuid.UUID, Job[Stored]]:
        """The jobs that are drawn here."""
        return self.registry.active

    # --- from start to stop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load."""
        self.deployment.start(self.recovery.start)

    def close(self) -> None:
        """Take no new jobs. Any thread, and a signal's handler, may call it."""
        self.deployment.closing = True

    async def drain(self, seconds: float, answer: float = ANSWER) -> None:
        """Take no new jobs, and end those there are, within so many seconds and those to answer."""
        self.close()
        await self.registry.drain(seconds, answer)

    async def stop(self) -> None:
        """Tell those who still wait, and end the engine."""
        await self.drain(0)
        self.recovery.stop()
        await self.deployment.stop()

    # --- jobs that are asked for -----------------------------------------------------------------------------------

    async def submit(self, request: ImageRequest, terms: Terms = Terms()) -> Job[Stored]:
        """Accept a request. Whoever submits calls `leave` in the end.

        With a key that was seen before, this is the job under way, here or on another replica, that of the stored
        image, or a new attempt at the same one. Returns once a durable job would survive a restart. Raises `NotReady`,
        `KeyReused`, `StoreRefused`, `StoreUnreachable`, and what `Engine.submit` raises.
        """
        self.deployment.ready_engine()
        if terms.key is None:
            return await self._begin(uuid.uuid4(), request, terms)
        async with self.registry.lock(terms.key.id):
            while True:
                job = await self.repeated(terms)
                if job is not None:
                    return job
                with contextlib.suppress(RecordChanged):  # another replica was asked at the same moment: look again
                    return await self._again(request, terms)

    async def _begin(
        self, id: uuid.UUID, request: ImageRequest, terms: Terms, version: Mapping[str, str] | None = None
    ) -> Job[Stored]:
        record = JobRecord.of(id, request, self.deployment.slot.config, terms.fingerprint, time.time())
        return await self.registry.begin(request, record, terms.durable or terms.key is not None, version)

    async def repeated(self, terms: Terms) -> Job[Stored] | None:
        """The job of a key that was seen before, under way here or with its image stored. Raises `KeyReused` where it
        came with another request."""
        assert terms.key is not None
        id = terms.key.id
        job = self.active.get(id)
        if job is not None:
            _check_same(terms, self.registry.record(id).fingerprint)
            return job
        stored = await asyncio.to_thread(self.registry.stored, id)
        if stored is None:
            return None
        _check_same(terms, stored.fingerprint)
        return Job.done(stored.request(), id, Stored(stored))

    async def _again(self, request: ImageRequest, terms: Terms) -> Job[Stored]:
        """A key whose image is not there, and is not drawn here."""
        assert terms.key is not None
        id = terms.key.id
        try:
            record, version = await asyncio.to_thread(self.store.read_job, id)
        except UnknownImage:
            return await self._begin(id, request, terms)
        _check_same(terms, record.fingerprint)
        if record.state in OVER:
            return await self._begin(id, request, terms, version)
        if not self.leases.free(record):
            return self.recovery.elsewhere(record)
        try:
            # the very image, even if another configuration was promoted since
            return await self.recovery.begin_again(record, version)
        except ModelMismatch as error:
            if self.recovery.leaves_to_others(record, error):
                return self.recovery.elsewhere(record)
            raise

    def leave(self, job: Job[Stored]) -> None:
        """Whoever asked does not wait any more: a job that is not durable is cancelled."""
        self.registry.leave(job)

    async def cancel(self, text: str) -> None:
        """Cancel a job, and wait until it is. Raises `UnknownImage`, or `AlreadyOver` where it is too late."""
        wanted = image_id(text)
        state: JobState | None
        if wanted in self.active:
            state = await self.registry.cancel(wanted)
            cancelled = state not in (JobState.DONE, JobState.FAILED)
        else:
            try:
                state = await asyncio.to_thread(self.leases.cancel, wanted)
                cancelled = state is None
            except UnknownImage:
                state, cancelled = (await self.find(text)).state, False
        if not cancelled:
            raise AlreadyOver(f"the image {wanted} is {state} and cannot be cancelled any more")

    # --- images that there are -------------------------------------------------------------------------------------

    async def find(self, text: str) -> Found:
        """What there is under an id: a job under way, a stored image, or a job that ended without one, waits for
        another replica or was left behind. What nobody holds any more is begun. Raises `UnknownImage`."""
        wanted = image_id(text)
        if wanted in self.active:
            job = self.active[wanted]
            return Found(job.state, self.registry.record(wanted), job)
        with contextlib.suppress(UnknownImage):
            return await self._found_stored(wanted)
        try:
            record = await asyncio.to_thread(self.store.job, wanted)
        except UnknownImage:
            if wanted in self.registry.ended:
                ended = self.registry.ended[wanted]
                return Found(ended.state, ended.record)
            return await self._found_stored(wanted)  # stored meanwhile
        if record.state in OVER:
            return Found(record.state, record)
        claimed = await self.recovery.claim_now(record)
        if isinstance(claimed, Stored):
            return Found(JobState.DONE, claimed.image)
        return Found(claimed.state if claimed else record.state, record, claimed)

    async def _found_stored(self, wanted: uuid.UUID) -> Found:
        return Found(JobState.DONE, await asyncio.to_thread(self.store.record, wanted))

    async def png(self, text: str) -> bytes:
        """A stored image's PNG. Raises `UnknownImage`, or `StillRunning` for one in the making."""
        wanted = image_id(text)
        try:
            return await asyncio.to_thread(self.store.get, wanted)
        except UnknownImage:
            found = await self.find(text)
            if found.state is JobState.DONE:  # meanwhile
                return await asyncio.to_thread(self.store.get, wanted)
            if found.state in OVER:
                raise
            eta = found.job.eta if found.job else None
            raise StillRunning(f"the image {wanted} is in the making", eta) from None

    async def png_of(self, stored: Stored) -> bytes:
        """The PNG of a job's outcome, which is at hand where it was drawn here just now."""
        return stored.png or await self.png(str(stored.image.id))

    async def source(self, text: str, strength: float) -> SourceImage:
        """A stored image to refine. Raises as `png` does, and `ConfigError` for one that is not ours."""
        png = await self.png(text)
        try:
            return await asyncio.to_thread(source_image, image_id(text), png, strength)
        except ImageError as error:
            rule = f"an image that SDXL Lab drew ({error})"
            raise ConfigError("id", text, rule, "0b8ff2ee-3c51-4c1c-a9c5-7c8b3b1f5a10") from error

    async def page(self, limit: int, cursor: str | None) -> Page:
        """Stored images' records, the newest first. Raises `ConfigError` for a cursor that no page gave."""
        return await asyncio.to_thread(self.store.page, limit, cursor)

    async def delete(self, text: str) -> None:
        """Remove a stored image. Raises `UnknownImage`, or `NotOver` for one in the making."""
        wanted = image_id(text)
        try:
            if wanted not in self.active:
                return await asyncio.to_thread(self.store.delete, wanted)
        except UnknownImage:
            if (await self.find(text)).state in OVER:
                raise
        raise NotOver(f"the image {wanted} is in the making: DELETE /jobs/{wanted} cancels it")


def _check_same(terms: Terms, before: str | None) -> None:
    if terms.fingerprint != before:
        raise KeyReused
