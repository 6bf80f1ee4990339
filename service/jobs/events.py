"""A job's events for whoever follows it from asyncio: made of what the job tells its watchers."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from PIL import Image

from sdxl_lab.job import Change, Job, JobState, Moved, Stepped
from service.deployment import on_loop
from service.jobs.registry import Stored

LOOK = 1.0  # seconds between two looks at one's place in the queue


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
    """The image is stored."""

    stored: Stored


Event = Queued | Step | Done


async def events(job: Job[Stored], previews: int = 0) -> AsyncIterator[Event]:
    """What happens from now on: `Queued` now and whenever the place in the queue changes, a `Step` for each UNet call,
    then `Done`; or raises what went wrong. `previews` is how many of the steps show one, evenly spread."""
    loop, changes = asyncio.get_running_loop(), asyncio.Queue[Change | None]()
    unwatch = job.watch(lambda change: on_loop(loop, lambda: changes.put_nowait(change)))
    job.add_done_callback(lambda _: on_loop(loop, lambda: changes.put_nowait(None)))
    try:
        position = job.position
        yield Queued(job.id, position, job.eta)
        while True:
            try:
                async with asyncio.timeout(LOOK if position else None):
                    change = await changes.get()
            except TimeoutError:
                if position != job.position:
                    position = job.position
                    yield Queued(job.id, position, job.eta)
                continue
            if change is None:
                yield Done(await job)
                return
            if change == Moved(JobState.QUEUED):  # claimed, since the replica that had it is gone
                position = job.position
                yield Queued(job.id, position, job.eta)
            elif isinstance(change, Stepped):
                position = 0
                yield Step(*change, await asyncio.to_thread(job.preview) if due(*change, previews) else None)
    finally:
        unwatch()


def due(step: int, steps: int, previews: int) -> bool:
    """Whether one of so many previews belongs to this step: evenly spread, none before the first or after the last."""
    return step < steps and (step * (previews + 1)) // steps > ((step - 1) * (previews + 1)) // steps
