"""Who draws a durable job: its record in the store carries a lease.

The lease is `holder` (a replica), `renewed` (seconds since 1970) and `lease` (seconds). The replica that draws an image
renews its lease until the image is stored, and then removes the record. A lease that has run out is anybody's to
claim. There is no coordinator: writes are conditional on the version that was read. Where a store knows no conditions,
or a replica was only slow, two of them draw one image, which is waste and no harm: id, seed and configuration make the
same pixels. Clocks have to agree within a lease; where they do not, that is waste, too.

A folder has one owner, which holds every lease in it: leases are for stores that are shared. Every method blocks;
several threads may call.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

from sdxl_lab.job import OVER, JobState
from sdxl_lab.record import RecordError
from service.jobs.records import JobRecord, Written
from service.jobs.store import JobName, RecordChanged, Store, UnknownImage, Version

REMEMBERED = 86_400  # seconds for which a job that failed or was cancelled can be asked after
LOOKS = 200  # records read in one look through the store, at most

Renewal = Literal["held", "cancelled", "lost", "gone"]

log = logging.getLogger(__name__)


class Leases:
    """The leases in a store, as one replica sees them. `seconds` is how long a lease lasts."""

    def __init__(self, store: Store, seconds: float) -> None:
        self.store, self.seconds = store, seconds
        self.replica = uuid.uuid4().hex
        self._written: dict[uuid.UUID, tuple[JobState, float]] = {}  # state, and when by the monotonic clock
        self._over: dict[uuid.UUID, str] = {}  # tags of those that were over when they were read

    @property
    def shared(self) -> bool:
        return self.store.folder is None

    def free(self, record: JobRecord) -> bool:
        """Whether nobody holds it; to be asked about what this process does not draw."""
        ours = not self.shared or record.holder == self.replica
        return ours or abs(time.time() - record.renewed) >= record.lease

    # --- by the one that draws it ----------------------------------------------------------------------------------

    def take(self, record: JobRecord, version: Version | None) -> None:
        """Write the job down as held by this replica, in place of the `version` that was read (None: there was none).
        Durable by the time this returns. Raises `RecordChanged` where another replica came first, and what the store
        raises."""
        try:
            self.store.swap_job(self._held(record, JobState.QUEUED), version)
        except RecordChanged:
            if not self._has(record.id):  # else it was written, and the answer was lost
                raise
        self._written[record.id] = (JobState.QUEUED, time.monotonic())

    def _has(self, job: uuid.UUID) -> bool:
        try:
            return self.store.job(job).holder == self.replica
        except UnknownImage:
            return False

    def due(self, job: uuid.UUID, state: JobState) -> bool:
        """Whether it is time to `renew`: a third of the lease is over, or another state is to be told."""
        told, when = self._written.get(job, (None, 0.0))
        return self.shared and (told != state or time.monotonic() - when >= self.seconds / 3)

    def renew(self, job: uuid.UUID, state: Written) -> Renewal:
        """Hold it for another lease, in this state; from `storing` on it is too late to cancel. Without effect where it
        is "cancelled", "gone" (stored, as a rule), or "lost" to a replica that claimed it while we could not renew."""
        renewal: Renewal | None = None
        while renewal is None:
            with contextlib.suppress(RecordChanged):
                renewal = self._renewed(job, state)
        if job in self._written:
            self._written[job] = (state, time.monotonic())
        return renewal

    def _renewed(self, job: uuid.UUID, state: Written) -> Renewal:
        try:
            record, version = self.store.read_job(job)
        except UnknownImage:
            return "gone"
        if record.state is JobState.CANCELLED:
            return "cancelled"
        if record.holder == self.replica:
            if record.state is JobState.STORING and state is not JobState.STORING:
                return "held"  # it was drawn while this renewal was on its way
        elif not self.free(record):
            return "lost"
        self.store.swap_job(self._held(record, state), version)
        return "held"

    def drop(self, job: uuid.UUID) -> None:
        """The image is stored: its job needs no record any more."""
        self.store.drop_job(job)

    def give_back(self, job: uuid.UUID) -> None:
        """Leave it to whoever comes first. It does not count as an attempt."""
        self._change(job, lambda record: {"state": JobState.QUEUED, "lease": 0, "attempts": record.attempts - 1})

    def fail(self, job: uuid.UUID) -> None:
        """It cannot be drawn. Another replica that has claimed it may have another answer."""
        self._change(job, lambda _: {"state": JobState.FAILED})

    def let_go(self, job: uuid.UUID) -> None:
        """This process draws it no more."""
        self._written.pop(job, None)

    def _change(self, job: uuid.UUID, change: Callable[[JobRecord], dict[str, Any]]) -> None:
        with contextlib.suppress(UnknownImage, RecordChanged):  # whoever came first has it now
            record, version = self.store.read_job(job)
            if self.free(record) and record.state not in OVER:
                self.store.swap_job(record.with_(**change(record)), version)

    def _held(self, record: JobRecord, state: Written) -> JobRecord:
        return record.with_(state=state, holder=self.replica, renewed=round(time.time(), 3), lease=self.seconds)

    # --- by any replica --------------------------------------------------------------------------------------------

    def cancel(self, job: uuid.UUID) -> JobState | None:
        """Mark it as cancelled, which its holder sees when it renews and before it stores. Returns None if that could
        be done, else the state which it is in. Raises `UnknownImage`."""
        while True:
            record, version = self.store.read_job(job)
            if record.state in OVER or (record.state is JobState.STORING and not self.free(record)):
                return record.state
            with contextlib.suppress(RecordChanged):
                self.store.swap_job(record.with_(state=JobState.CANCELLED), version)
                return None

    def unheld(self) -> list[uuid.UUID]:
        """Jobs that are not over and that nobody holds, the oldest first. The records of those that are over since a
        day are removed.

        One listing, and at most `LOOKS` reads: what was written within a lease is held, and what was over when it was
        read stays so.
        """
        names = list(self.store.job_names())
        seen = {name.id: name.tag for name in names}
        self._over = {job: tag for job, tag in self._over.items() if seen.get(job) == tag}
        for name in names:
            if name.id in self._over and time.time() - name.changed > REMEMBERED:
                self.store.drop_job(name.id)
        unread = [name for name in names if name.id not in self._over and not self._fresh(name)]
        found: list[tuple[float, uuid.UUID]] = []
        for name in unread[:LOOKS]:
            try:
                record = self.store.job(name.id)
                if record.state in OVER:
                    self._over[name.id] = name.tag
                elif self.free(record):
                    found.append((record.created, name.id))
            except UnknownImage:
                continue  # stored since
            except RecordError as error:
                log.error("%s", error)
                self._over[name.id] = name.tag
        return [job for _, job in sorted(found)]

    def _fresh(self, name: JobName) -> bool:
        return self.shared and abs(time.time() - name.changed) < self.seconds
