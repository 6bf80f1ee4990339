"""One image, from what is asked to its end: `ImageRequest` and `Job`.

    job = engine.submit(ImageRequest(config, "A cat in a hat", seed=7))
    job.watch(print)  # Moved and Stepped, as they happen
    image = job.result()  # or `await job`; raises what went wrong, or Cancelled

A `Job` is the one handle of its image. The engine that draws it, a service that stores it and everybody who waits,
watches or cancels hold the same object. It needs neither torch nor the models' libraries.
"""

import asyncio
import contextlib
import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

from PIL import Image

from sdxl_lab.config import PROMPT_2, ConfigError, GenerationConfig, LoraRef, checked_prompt, checked_seed
from sdxl_lab.errors import Cancelled
from sdxl_lab.images import GeneratedImage
from sdxl_lab.source import SourceImage
from sdxl_lab.syntax import Network, networks

log = logging.getLogger(__name__)
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class ImageRequest:
    """What is asked: a configuration, a prompt, a seed. With `source`, the image starts from that one. With `prompt_2`,
    the second text encoder reads that.

    Raises `ConfigError` when something is out of its range, before any work.
    """

    config: GenerationConfig
    prompt: str
    seed: int
    source: SourceImage | None = None
    prompt_2: str | None = None

    def __post_init__(self) -> None:
        checked_prompt(self.prompt)
        checked_prompt(self.prompt_2, PROMPT_2)
        checked_seed(self.seed)
        _ = self.loras
        if self.source is None:
            return
        strength = self.source.strength
        if int(self.config.steps * strength) < 1:
            raise ConfigError(
                "strength", strength, f"at least 1/steps, here {1 / self.config.steps:.3g}, or no step is left", 0.3
            )
        if self.source.stage == "base" and self.config.hires is not None:
            rule = "left out where there is a source image, which a second pass is already"
            raise ConfigError("hires", self.config.hires.to_dict(), rule, "hires = none")
        if self.source.stage == "refiner" and self.config.model.refiner is None:
            raise ConfigError("model", self.config.model.base, "one with a refiner, since refining was asked", "nano")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        drawn = self.config.drawn_size
        return drawn if self.source is None else self.source.size(drawn)

    @property
    def loras(self) -> tuple[LoraRef, ...]:
        """The configuration's LoRAs, each with the weights that the prompt gives it. Raises `ConfigError` for one that
        the configuration does not have."""
        if self.config.prompt_syntax != "a1111":
            return self.config.loras
        known = {ref.name for ref in self.config.loras}
        named = {}
        for network in (each for text in (self.prompt, self.prompt_2 or "") for each in networks(text)[1]):
            if network.kind == "hypernet" or network.name not in known:
                names = ", ".join(sorted(known)) or "it has none"
                rule = f"without adapters that are no LoRA of the configuration, by the name of its file ({names})"
                raise ConfigError("prompt", network.word, rule, f"<lora:{min(known, default='outlines')}:0.6>")
            named[network.name] = network
        return tuple(_weighed(ref, named[ref.name]) if ref.name in named else ref for ref in self.config.loras)

    @property
    def words(self) -> str:
        """The prompt without the adapters that it names."""
        return self._words(self.prompt)

    @property
    def words_2(self) -> str | None:
        """The same of `prompt_2`."""
        return None if self.prompt_2 is None else self._words(self.prompt_2)

    def _words(self, prompt: str) -> str:
        return networks(prompt)[0] if self.config.prompt_syntax == "a1111" else prompt


def _weighed(ref: LoraRef, network: Network) -> LoraRef:
    try:
        text, unet = network.weights
    except ValueError:
        rule = "with numbers for the weights of its LoRAs"
        raise ConfigError("prompt", network.word, rule, f"<lora:{ref.name}:0.6>") from None
    return ref.with_(weight=unet, text_encoder_weight=text)


class JobState(StrEnum):
    """Where a job is. `storing`: it is drawn, and somebody stores the image."""

    ACCEPTED = "accepted"
    QUEUED = "queued"
    RUNNING = "running"
    STORING = "storing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


WAYS = (JobState.ACCEPTED, JobState.QUEUED, JobState.RUNNING, JobState.STORING)
OVER = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})
# The legal transitions: from a state to those that may follow. A job goes back to `queued` when the replica that had
# it is gone and another one claims it.
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.ACCEPTED: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.QUEUED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.STORING, JobState.QUEUED, *OVER}),
    JobState.STORING: frozenset({JobState.QUEUED, *OVER}),
    **dict.fromkeys(OVER, frozenset()),
}


class IllegalTransition(RuntimeError):
    """A job was to go from one state to another that `TRANSITIONS` does not allow."""

    def __init__(self, job: "Job[Any]", state: JobState) -> None:
        allowed = ", ".join(sorted(TRANSITIONS[job.state])) or "nothing: it is over"
        super().__init__(f"the job {job.id} cannot go from {job.state} to {state}; allowed: {allowed}")


class Moved(NamedTuple):
    """The job is in another state now."""

    state: JobState


class Stepped(NamedTuple):
    """`calls` UNet calls of `total` are made."""

    calls: int
    total: int


Change = Moved | Stepped


class Driver(Protocol):
    """Who draws jobs, as a job asks for it. Every method may be called from any thread."""

    def position(self, job: "Job[Any]") -> int: ...

    def eta(self, job: "Job[Any]") -> float | None: ...

    def preview(self, job: "Job[Any]") -> Image.Image | None: ...

    def cancel(self, job: "Job[Any]") -> None:
        """The job's `cancel_reason` is set: end it as soon as it can be ended."""


class Job(Generic[Outcome]):
    """An image from acceptance to its end. Any thread may call every method.

    `durable`: it is drawn whoever waits, and survives a restart. `on_drawn` is for whoever stores the image: it is
    called, in the thread of the one that draws, when the image is drawn or could not be, and sees to the end, whose
    outcome it chooses. Without it the outcome is the `GeneratedImage`. `committing` says that the job is being written
    down or stored, which must not be interrupted.
    """

    def __init__(
        self,
        request: ImageRequest,
        id: uuid.UUID | None = None,
        *,
        durable: bool = False,
        on_drawn: "Callable[[Job[Outcome]], object] | None" = None,
    ) -> None:
        self.request, self.id, self.durable = request, id or uuid.uuid4(), durable
        self.committing = False
        self.image: GeneratedImage | None = None  # while it is stored
        self.failure: Exception | None = None  # why it could not be drawn, until the job is ended for it
        self.first_step_seconds: float | None = None  # from the queue to the end of the first UNet call
        self._state = JobState.ACCEPTED
        self._progress = Stepped(0, 0)
        self._cancel_reason: Exception | None = None
        self._outcome: Outcome | None = None
        self._error: Exception | None = None
        self._on_drawn = on_drawn
        self._driver: Driver | None = None
        self._queued_at = time.monotonic()
        self._changed = threading.Condition()
        self._watchers: list[Callable[[Change], object]] = []

    @classmethod
    def done(cls, request: ImageRequest, id: uuid.UUID, outcome: Outcome) -> "Job[Outcome]":
        """The handle of an image that is there already."""
        job = cls(request, id, durable=True)
        job._state, job._outcome = JobState.DONE, outcome
        return job

    def __repr__(self) -> str:
        return f"<Job {self.id} {self._state}>"

    # --- where it is -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> JobState:
        return self._state

    @property
    def over(self) -> bool:
        return self._state in OVER

    @property
    def progress(self) -> tuple[int, int]:
        """UNet calls made, of how many; (0, 0) before the first."""
        return self._progress

    @property
    def position(self) -> int:
        """The place in the queue, from 1; 0 where it is not in one."""
        driver = self._driver
        return driver.position(self) if driver else 0

    @property
    def eta(self) -> float | None:
        """Seconds until the image is drawn, from the measured speed and all that shares the engine; 0.0 when it is
        over, None while it is not known."""
        driver = self._driver
        return 0.0 if self.over else driver.eta(self) if driver else None

    def preview(self) -> Image.Image | None:
        """The image as the last step sees it, small and rough, by a linear map of the latents; None where no step is
        at hand. Takes under a millisecond on a CPU and none of it in the engine's thread: call it from your own."""
        driver = self._driver
        return driver.preview(self) if driver else None

    # --- waiting and watching --------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> Outcome:
        """Wait for the outcome. Raises what went wrong, `Cancelled` or the reason given for it, or `TimeoutError`."""
        error = self.exception(timeout)
        if error is not None:
            raise error
        return cast(Outcome, self._outcome)

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait for the end, and say what went wrong; None for a job that is done. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.over, timeout):
                raise TimeoutError(f"the image is {self._state} after {timeout:g} s")
        return self._error

    def __await__(self) -> Generator[Any, None, Outcome]:
        """`result`, in asyncio. Cancelling whoever awaits leaves the job alone."""
        return self._awaited().__await__()

    async def _awaited(self) -> Outcome:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def told(_: Job[Outcome]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(over.set)

        self.add_done_callback(told)
        await over.wait()
        return self.result()

    def watch(self, callback: Callable[[Change], object]) -> Callable[[], None]:
        """Have `callback` called at every change from now on, in the thread that makes it: it must return at once.
        One that raises is logged and called no more. Returns what ends the watching."""
        with self._changed:
            self._watchers.append(callback)

        def unwatch() -> None:
            with self._changed:
                if callback in self._watchers:
                    self._watchers.remove(callback)

        return unwatch

    def add_done_callback(self, callback: "Callable[[Job[Outcome]], object]") -> None:
        """Have `callback` called with the job once it is over; at once if it is."""

        def moved(_: Change) -> None:
            if self.over:
                callback(self)

        with self._changed:
            if not self.over:
                self._watchers.append(moved)
                return
        callback(self)

    # --- ending it before its time ---------------------------------------------------------------------------------

    def cancel(self, reason: Exception | None = None) -> None:
        """Stop at the next step; whoever waits is told the `reason`, the first one given. What is over stays so."""
        with self._changed:
            if self.over:
                return
            if self._cancel_reason is None:
                self._cancel_reason = reason or Cancelled("the image was cancelled")
            driver = self._driver
        if driver is not None:
            driver.cancel(self)
        elif self._state is JobState.ACCEPTED:
            self.fail(self._cancel_reason)

    @property
    def cancel_reason(self) -> Exception | None:
        """Why it is, or is to be, cancelled."""
        return self._cancel_reason

    # --- for whoever draws or stores it ----------------------------------------------------------------------------

    def queue(self, driver: Driver) -> None:
        """`driver` takes the job in hand, maybe from another one. Raises `IllegalTransition`, also where it has the job
        already."""
        with self._changed:
            if driver is self._driver:
                raise IllegalTransition(self, JobState.QUEUED)
            self._move(JobState.QUEUED)
            self._driver = driver
            self._progress, self.first_step_seconds = Stepped(0, 0), None
            self._queued_at = time.monotonic()
        self._tell(Moved(JobState.QUEUED))

    def run(self) -> None:
        """Its first step is next. Raises `IllegalTransition`."""
        with self._changed:
            self._move(JobState.RUNNING)
        self._tell(Moved(JobState.RUNNING))

    def step(self, calls: int, total: int) -> None:
        """`calls` UNet calls of `total` are made."""
        with self._changed:
            self._progress = made = Stepped(calls, total)
            if self.first_step_seconds is None:
                self.first_step_seconds = time.monotonic() - self._queued_at
        self._tell(made)

    def deliver(self, drawn: GeneratedImage | Exception) -> None:
        """The image, or why there is none: the job is over, or `on_drawn` ends it. Without effect on a job that is
        over."""
        if self._on_drawn is None:
            if isinstance(drawn, Exception):
                self.fail(drawn)
            else:
                self.finish(cast(Outcome, drawn))
            return
        with self._changed:
            if self.over:
                return
            self._driver = None
            if isinstance(drawn, Exception):
                self.failure = drawn
                without_frames(drawn, noted=self._cancel_reason is None)
            else:
                self._move(JobState.STORING)
                self.image = drawn
        if self.image is not None:
            self._tell(Moved(JobState.STORING))
        try:
            self._on_drawn(self)
        except Exception as error:  # nobody is there to end it
            self.fail(self.failure or error)

    def follow(self, state: JobState, driver: Driver) -> None:
        """The state of a job that runs on another replica, as the store's record has it: through all states on the
        way there, and back to the queue where another replica has claimed it."""
        with self._changed:
            if self.over:
                return
            self._driver = driver
            back = WAYS.index(state) < WAYS.index(self._state)
            begin = JobState.ACCEPTED if back else self._state
            passed = WAYS[WAYS.index(begin) + 1 : WAYS.index(state) + 1]
            for each in passed:
                self._move(each)
        for each in passed:
            self._tell(Moved(each))

    def finish(self, outcome: Outcome) -> bool:
        """The job is done. Of several ends the first one stands: False for a later one."""
        return self._end(JobState.DONE, outcome, None)

    def fail(self, error: Exception) -> bool:
        """The job has failed, or is cancelled where that was asked for. Of several ends the first one stands: False
        for a later one."""
        reason = self._cancel_reason
        if reason is None and isinstance(error, Cancelled):
            self._cancel_reason = reason = error
        return self._end(JobState.FAILED if reason is None else JobState.CANCELLED, None, reason or error)

    def _end(self, state: JobState, outcome: Outcome | None, error: Exception | None) -> bool:
        with self._changed:
            if self.over:
                return False
            self._move(state)
            self._outcome, self._error = outcome, error
            if error is not None:
                without_frames(error, noted=state is JobState.FAILED)
            self._driver = self.image = self.failure = None  # and with them the latents and the pixels
            self.committing = False
            self._changed.notify_all()
        self._tell(Moved(state))
        with self._changed:
            self._watchers.clear()
        return True

    def _move(self, state: JobState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise IllegalTransition(self, state)
        self._state = state

    def _tell(self, change: Change) -> None:
        """Outside the lock, so that a watcher may ask the job."""
        with self._changed:
            watchers = list(self._watchers)
        for watcher in watchers:
            try:
                watcher(change)
            except Exception:
                log.exception("a watcher failed; the image goes on without it")
                with self._changed:
                    if watcher in self._watchers:
                        self._watchers.remove(watcher)


def without_frames(error: Exception, *, noted: bool = True) -> None:
    """Take the frames off that an error came through, which hold latents and pixels. `noted`: they stay as text."""
    one: BaseException | None = error
    while one is not None:
        if noted and one.__traceback__ is not None:
            one.add_note(f"It came through:\n{''.join(traceback.format_tb(one.__traceback__))}".rstrip())
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
