"""Images that were promised, and who keeps each promise: a record in the store with a lease.

A promise is `jobs/<id>.json`: what makes the image, its `state`, and the lease: `holder` (a replica), `renewed`
(seconds since 1970) and `lease` (seconds). The replica that draws an image renews its lease until the image is
stored, and the promise dropped. A lease that has run out is anybody's to take. Nobody coordinates: writes are
conditional on the version that was read, and where a store knows no conditions, or a replica was only slow, two of
them draw one image, which is waste and no harm: id, seed and configuration make the same pixels. Clocks have to agree
within a lease; where they do not, that is waste, too.

A folder has one owner, which holds every promise in it: leases are for stores that are shared.

Knows the store, and neither engines nor HTTP. Every method blocks; several threads may call.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

from service.jobs.store import JobChanged, JobName, Store, UnknownImage, Version

TOLD = 86_400  # seconds for which a promise that failed or was cancelled can be asked after
LOOKS = 200  # promises read in one look through the store, at most
OVER = ("failed", "cancelled")
STORING = "storing"  # too late to cancel

Told = Literal["held", "cancelled", "lost", "gone"]

log = logging.getLogger(__name__)


class Promises:
    """The promises in a store, as one replica sees them. `seconds` is how long a lease lasts."""

    def __init__(self, store: Store, seconds: float) -> None:
        self.store, self.seconds = store, seconds
        self.replica = uuid.uuid4().hex
        self._written: dict[uuid.UUID, tuple[str, float]] = {}  # state, and when by the monotonic clock
        self._over: dict[uuid.UUID, str] = {}  # tags of those that were over when they were read

    @property
    def shared(self) -> bool:
        return self.store.folder is None

    def free(self, promise: Mapping[str, Any]) -> bool:
        """Whether nobody holds it; to be asked about what this process does not draw."""
        ours = not self.shared or promise["holder"] == self.replica
        return ours or abs(time.time() - promise["renewed"]) >= promise["lease"]

    # --- by the one that draws it ----------------------------------------------------------------------------------

    def take(self, image: uuid.UUID, asked: Mapping[str, Any], version: Version | None) -> None:
        """Promise to draw what is `asked`, in place of the `version` that was read (None: there was none). Durable by
        the time this returns. Raises `JobChanged` where another replica came first, and what the store raises."""
        try:
            self.store.swap_job(image, {**asked, **self._leased("queued")}, version)
        except JobChanged:
            if not self._has(image):  # else it was written, and the answer was lost
                raise
        self._written[image] = ("queued", time.monotonic())

    def _has(self, image: uuid.UUID) -> bool:
        try:
            return bool(self.store.job(image)["holder"] == self.replica)
        except UnknownImage:
            return False

    def due(self, image: uuid.UUID, state: str) -> bool:
        """Whether it is time to `renew`: a third of the lease is over, or another state is to be told."""
        told, when = self._written.get(image, ("", 0.0))
        return self.shared and (told != state or time.monotonic() - when >= self.seconds / 3)

    def renew(self, image: uuid.UUID, state: str) -> Told:
        """Hold it for another lease, in this state. Without effect where it is "cancelled", "gone" (stored, as a rule),
        or "lost" to a replica that took it while we could not renew."""
        told: Told | None = None
        while told is None:
            with contextlib.suppress(JobChanged):
                told = self._renewed(image, state)
        if image in self._written:
            self._written[image] = (state, time.monotonic())
        return told

    def _renewed(self, image: uuid.UUID, state: str) -> Told:
        try:
            promise, version = self.store.read_job(image)
        except UnknownImage:
            return "gone"
        if promise["state"] == "cancelled":
            return "cancelled"
        if promise["holder"] == self.replica:
            if promise["state"] == STORING != state:  # it was drawn while this renewal was on its way
                return "held"
        elif not self.free(promise):
            return "lost"
        self.store.swap_job(image, {**promise, **self._leased(state)}, version)
        return "held"

    def keep(self, image: uuid.UUID) -> None:
        """The image is stored."""
        self.store.drop_job(image)

    def give_back(self, image: uuid.UUID) -> None:
        """Leave it to whoever comes first. It does not count as an attempt."""
        self._change(image, lambda promise: {"state": "queued", "lease": 0, "attempts": promise["attempts"] - 1})

    def fail(self, image: uuid.UUID) -> None:
        """It cannot be drawn. Another replica that has taken it may have another answer."""
        self._change(image, lambda _: {"state": "failed"})

    def let_go(self, image: uuid.UUID) -> None:
        """This process draws it no more."""
        self._written.pop(image, None)

    def _change(self, image: uuid.UUID, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        with contextlib.suppress(UnknownImage, JobChanged):  # whoever came first has it now
            promise, version = self.store.read_job(image)
            if self.free(promise) and promise["state"] not in OVER:
                self.store.swap_job(image, promise | change(promise), version)

    def _leased(self, state: str) -> dict[str, Any]:
        return {"state": state, "holder": self.replica, "renewed": round(time.time(), 3), "lease": self.seconds}

    # --- by any replica --------------------------------------------------------------------------------------------

    def cancel(self, image: uuid.UUID) -> str:
        """Mark it as cancelled, which its holder sees when it renews and before it stores. Returns "unfinished" if it
        was, else the state that it has. Raises `UnknownImage`."""
        while True:
            promise, version = self.store.read_job(image)
            if promise["state"] in OVER or (promise["state"] == STORING and not self.free(promise)):
                return str(promise["state"])
            try:
                self.store.swap_job(image, {**promise, "state": "cancelled"}, version)
            except JobChanged:
                continue
            return "unfinished"

    def untended(self) -> list[uuid.UUID]:
        """Promises that are not over and that nobody holds, the oldest first. Those that are over since a day are
        dropped.

        One listing, and at most `LOOKS` reads: what was written within a lease is held, and what was over when it was
        read stays so.
        """
        names = list(self.store.job_names())
        seen = {name.id: name.tag for name in names}
        self._over = {image: tag for image, tag in self._over.items() if seen.get(image) == tag}
        for name in names:
            if name.id in self._over and time.time() - name.changed > TOLD:
                self.store.drop_job(name.id)
        unread = [name for name in names if name.id not in self._over and not self._fresh(name)]
        found: list[tuple[float, uuid.UUID]] = []
        for name in unread[:LOOKS]:
            try:
                promise = self.store.job(name.id)
                if promise["state"] in OVER:
                    self._over[name.id] = name.tag
                elif self.free(promise):
                    found.append((promise["created"], name.id))
            except UnknownImage:
                continue  # stored since
            except (KeyError, ValueError) as error:
                log.error("the promise %s cannot be read: %r", name.id, error)
                self._over[name.id] = name.tag
        return [image for _, image in sorted(found)]

    def _fresh(self, name: JobName) -> bool:
        return self.shared and abs(time.time() - name.changed) < self.seconds
