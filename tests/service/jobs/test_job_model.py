"""The jobs of a service driven at random, and what holds whatever happens.

The manager, the registry and the store in a folder are the real ones; the engine is a fake that does what it is told.
Where the service goes to a thread the test goes on in its own, so that a run is repeatable; the loop may be left, and
the process killed, between any two of those steps.
"""

import asyncio
import contextlib
import itertools
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sdxl_lab import job as library
from sdxl_lab.config import GenerationConfig
from sdxl_lab.errors import Cancelled, QueueFull
from sdxl_lab.images import open_image
from sdxl_lab.job import OVER, TRANSITIONS, ImageRequest, Job, JobState, Moved
from service.deployment import Stopping
from service.jobs import recovery
from service.jobs import store as stores
from service.jobs.errors import AlreadyOver, CancelledByClient, KeyReused, NotOver
from service.jobs.manager import JobManager, Key, Terms, fingerprint
from service.jobs.store import Store, StoreRefused, UnknownImage
from service.settings import Settings
from tests import made

CONFIG = GenerationConfig(steps=2)
PROMPTS = ("a ring", "a boat")
KEYS = ("one", "two", "three")


class FakeEngine:
    """Does nothing by itself."""

    healthy, failure, max_queue = True, None, 3

    def __init__(self):
        self.jobs: list[Job] = []
        self.lazy = False  # a cancel waits for the next tick

    def submit(self, job):
        if len(self.jobs) >= self.max_queue:
            raise QueueFull(f"{len(self.jobs)} images are waiting")
        job.queue(self)
        self.jobs.append(job)
        return job

    def position(self, job):
        return self.jobs.index(job) + 1 if job in self.jobs else 0

    def eta(self, job):
        return None

    def preview(self, job):
        return None

    def cancel(self, job):
        if not self.lazy:
            self.tick()

    def tick(self):
        """What the engine's thread does first: drop what is cancelled or was ended by others."""
        for job in [job for job in self.jobs if job.over or job.cancel_reason is not None]:
            self.jobs.remove(job)
            job.deliver(Cancelled("the image was cancelled"))

    def step(self, job):
        if job.state is JobState.QUEUED:
            job.run()
        job.step(1, 2)

    def end(self, job, drawn):
        self.step(job)
        self.jobs.remove(job)
        job.deliver(drawn)


def drawn(request):
    """The image of a request; its seed is its colour."""
    colour = (request.seed % 256, request.seed // 256 % 256, PROMPTS.index(request.prompt))
    return made.image(request.config, request.prompt, request.seed, colour)


def colour(request):
    return drawn(request).image.getpixel((0, 0))


class Loop(asyncio.SelectorEventLoop):
    """Where nothing is to be done until a timer, it is that time at once."""

    def __init__(self):
        super().__init__()
        self.now, self._select = 0.0, self._selector.select
        self._selector.select = self._jump

    def _jump(self, timeout):
        self.now += timeout or 0.0
        return self._select(0)

    def time(self):
        return self.now


class Client:
    """Somebody who waits for a job."""

    def __init__(self, job, durable):
        self.job, self.durable = job, durable
        self.task = asyncio.ensure_future(self._wait())

    async def _wait(self):
        try:
            return await self.job
        except Exception as error:
            return error


class Jobs(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.illegal: list[str] = []
        self.puts: Counter[uuid.UUID] = Counter()
        self.deleted: Counter[uuid.UUID] = Counter()
        self.full = False
        self.requests: dict[uuid.UUID, ImageRequest] = {}  # of every job that was ever accepted
        self.owed: set[uuid.UUID] = set()  # acknowledged, and neither cancelled, failed nor deleted since
        self.cancelled: set[uuid.UUID] = set()
        self.clients: list[Client] = []
        self.patch.setattr(asyncio, "to_thread", self._inline)
        numbers = itertools.count(1)
        self.patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=next(numbers)))
        self.patch.setattr(time, "time", lambda: float(next(numbers)))
        self.patch.setattr(recovery, "ATTEMPTS", 10**6)
        self.patch.setattr(stores, "_settle", lambda path: None)  # processes are killed here, and no disk loses power
        illegal, told = library.IllegalTransition.__init__, self.illegal
        self.patch.setattr(
            library.IllegalTransition,
            "__init__",
            lambda error, job, state: (told.append(f"{job} to {state}"), illegal(error, job, state))[1],
        )
        put, write = Store.put, Store._write
        self.patch.setattr(Store, "put", lambda store, image, png: (put(store, image, png), self._counted(image.id))[0])
        self.patch.setattr(Store, "_write", lambda store, *rest: self._room() or write(store, *rest))
        self.start()

    def _counted(self, image):
        self.puts[image] += 1

    def _room(self):
        if self.full:
            raise StoreRefused("the store refuses to take the image: No space left on device")

    @staticmethod
    async def _inline(function, *arguments):
        await asyncio.sleep(0)
        return function(*arguments)

    # --- the process -----------------------------------------------------------------------------------------------

    def start(self):
        self.loop = Loop()
        self.engine = FakeEngine()
        deployment = SimpleNamespace(
            slot=SimpleNamespace(config=CONFIG, digest=CONFIG.digest),
            closing=False,
            trouble=None,
            ready_engine=lambda: self.engine,
        )
        self.manager = JobManager(Settings(store=Path(self.folder.name)), deployment)
        self.manager.registry.observers.append(self.watch)
        self.claim()

    def watch(self, job):
        """Every transition is one of the table's."""
        states = [job.state]

        def told(change):
            if isinstance(change, Moved):
                if change.state not in TRANSITIONS[states[-1]]:
                    self.illegal.append(f"{job}: {states} to {change.state}")
                states.append(change.state)

        job.watch(told)

    def kill(self):
        """The process ends here and now: no task of it does anything any more."""
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False
            task.get_coro().close()
        self.loop.close()
        self.clients = []

    def run(self, awaitable, turns=30):
        """The outcome, once all that follows from it is done, or the loop has made so many turns."""
        self.settled = turns >= 30

        async def settled():
            try:
                return await awaitable
            finally:
                for _ in range(turns):
                    await asyncio.sleep(0)

        return self.loop.run_until_complete(settled())

    async def _pass(self):
        pass

    # --- what happens ----------------------------------------------------------------------------------------------

    async def ask(self, request, terms):
        job = await self.manager.submit(request, terms)
        return job, Client(job, job.durable)

    def submitted(self, request, terms):
        try:
            job, client = self.run(self.ask(request, terms))
        except QueueFull:
            return None
        except StoreRefused:
            if not self.full:
                raise
            return None
        self.clients.append(client)
        self.requests.setdefault(job.id, job.request)
        assert colour(self.requests[job.id]) == colour(job.request), "one id, two images"
        if job.durable and not (job.over and job.state is not JobState.DONE):
            self.owed.add(job.id)
            self.cancelled.discard(job.id)
        self.answered()
        return job

    @rule(prompt=st.sampled_from(PROMPTS), seed=st.integers(0, 999), durable=st.booleans())
    def submit(self, prompt, seed, durable):
        self.submitted(ImageRequest(CONFIG, prompt, seed), Terms(durable=durable))

    @rule(text=st.sampled_from(KEYS), prompt=st.sampled_from(PROMPTS))
    def submit_or_repeat_a_key(self, text, prompt):
        """The first time it is new; later it repeats, joins, is made again, or is refused with another request."""
        key = Key("client", text)
        request = ImageRequest(CONFIG, prompt, key.seed)
        before = self.manager.active.get(key.id)
        try:
            job = self.submitted(request, Terms(fingerprint({"prompt": prompt}), key))
        except KeyReused:
            assert self.requests[key.id].prompt != prompt, "the same request, and refused"
            return
        if job is not None:
            assert job.id == key.id
            if before is not None and not before.over:
                assert job is before, "whoever joins holds the same handle"

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        image = data.draw(st.sampled_from(list(self.requests)))
        try:
            self.run(self.manager.cancel(str(image)))
        except (UnknownImage, AlreadyOver, StoreRefused):
            return
        self.owed.discard(image)
        if not self.full:  # else the mark may not have been written, and the next start draws the image
            self.cancelled.add(image)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data):
        client = self.clients.pop(data.draw(st.integers(0, len(self.clients) - 1)))
        client.task.cancel()
        self.manager.leave(client.job)
        self.run(self._pass())

    @precondition(lambda self: self.engine.jobs)
    @rule(data=st.data())
    def step(self, data):
        job = data.draw(st.sampled_from(self.engine.jobs))
        self.engine.tick()
        if job in self.engine.jobs:
            self.engine.step(job)
        self.run(self._pass())

    @precondition(lambda self: self.engine.jobs)
    @rule(data=st.data(), turns=st.integers(0, 30))
    def finish(self, data, turns):
        """`turns` of the loop: it may be left in the middle of storing."""
        job = data.draw(st.sampled_from(self.engine.jobs))
        self.engine.tick()
        if job in self.engine.jobs:
            self.engine.end(job, drawn(job.request))
        self.run(self._pass(), turns)
        self.answered()

    @precondition(lambda self: self.engine.jobs)
    @rule(data=st.data())
    def fail(self, data):
        job = data.draw(st.sampled_from(self.engine.jobs))
        self.engine.tick()
        if job in self.engine.jobs:
            self.owed.discard(job.id)
            self.engine.end(job, ArithmeticError("the culprit's own"))
        self.run(self._pass())

    @rule(full=st.booleans())
    def fill_or_empty_the_disk(self, full):
        self.full = full

    @rule(lazy=st.booleans())
    def make_the_engine_slow_to_cancel(self, lazy):
        self.engine.lazy = lazy

    @rule()
    def claim(self):
        with contextlib.suppress(StoreRefused):  # the service tries again some time later
            self.run(self.manager.recovery.claim_unheld())

    @rule()
    def crash_and_restart(self):
        self.kill()
        self.start()

    @rule(prompt=st.sampled_from(PROMPTS), seed=st.integers(0, 999), turns=st.integers(0, 12))
    def crash_while_submitting(self, prompt, seed, turns):
        """Nothing was acknowledged: it may be drawn, and it may not."""

        async def begin():
            task = asyncio.ensure_future(self.manager.submit(ImageRequest(CONFIG, prompt, seed), Terms(durable=True)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(begin())
        self.kill()
        self.start()

    @precondition(lambda self: self.engine.jobs)
    @rule(data=st.data(), turns=st.integers(0, 8))
    def crash_while_storing(self, data, turns):
        self.finish(data, turns)
        self.kill()
        self.start()

    @rule(seconds=st.sampled_from([0, 1]))
    def stop_and_restart(self, seconds):
        """Everybody who waits is told, and the next start draws what is durable."""
        self.run(self.manager.drain(seconds, 1))
        self.engine.tick()
        self.run(self._pass())
        self.all_answered()
        self.kill()
        self.start()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def delete(self, data):
        image = data.draw(st.sampled_from(list(self.requests)))
        try:
            self.run(self.manager.delete(str(image)))
        except (UnknownImage, NotOver):
            return
        self.deleted[image] += 1
        self.owed.discard(image)
        del self.requests[image]  # its key, if it has one, is free for another request

    # --- what holds ------------------------------------------------------------------------------------------------

    def answered(self):
        """What clients were told so far is the image that they asked for."""
        for client in self.clients:
            if client.task.done() and not isinstance(told := client.task.result(), Exception):
                png = self.run(self.manager.png_of(told)) if told.png is None and self.kept(told) else told.png
                if png is not None:
                    expected = colour(client.job.request)
                    assert open_image(png).getpixel((0, 0)) == expected, "another image under this id"

    def kept(self, told):
        return (Path(self.folder.name) / f"{told.image.id}.png").exists()

    def all_answered(self):
        for client in self.clients:
            assert client.task.done(), f"{client.job} was never answered"
            told = client.task.result()
            assert not isinstance(told, Exception) or isinstance(
                told, Stopping | CancelledByClient | ArithmeticError | StoreRefused
            ), repr(told)

    @invariant()
    def no_transition_is_illegal(self):
        assert not self.illegal

    @invariant()
    def nothing_is_stored_twice(self):
        assert not {image: n for image, n in self.puts.items() if n > 1 + self.deleted[image]}

    @invariant()
    def nothing_acknowledged_is_lost(self):
        folder = Path(self.folder.name)
        for image in self.owed - set(self.manager.active):
            kept = (folder / f"{image}.json").exists() and (folder / f"{image}.png").exists()
            assert kept or self.manager.store.job(image).state not in OVER, f"{image} is lost"

    @invariant()
    def what_was_cancelled_is_not_stored(self):
        for image in self.cancelled:
            assert self.puts[image] <= self.deleted[image], f"{image} was stored after it was cancelled"

    @invariant()
    def whoever_waits_for_what_is_over_is_answered(self):
        for client in self.clients:
            answered = client.task.done() or not client.job.over or client.job.id in self.manager.active
            assert answered or not self.settled

    def teardown(self):
        """On a sound machine everything that is owed is drawn in the end."""
        if not hasattr(self, "folder"):
            return
        try:
            self.full = self.engine.lazy = False
            for _ in range(100):
                self.claim()
                self.engine.tick()
                for job in list(self.engine.jobs):
                    self.engine.end(job, drawn(job.request))
                self.run(self._pass())
                if not self.manager.active and not self.manager.leases.unheld():
                    break
            self.all_answered()
            self.answered()
            for image in self.owed:
                png = self.run(self.manager.png(str(image)))
                assert open_image(png).getpixel((0, 0)) == colour(self.requests[image])
            self.no_transition_is_illegal()
            self.nothing_is_stored_twice()
            self.what_was_cancelled_is_not_stored()
        finally:
            self.kill()
            self.patch.undo()
            self.folder.cleanup()


TestJobs = Jobs.TestCase
TestJobs.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking a failure takes minutes: add Phase.shrink for a shorter story
    suppress_health_check=list(HealthCheck),
)
