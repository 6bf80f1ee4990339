"""A job from acceptance to its end, without an engine: its states, its waiters, its watchers."""

import asyncio
import gc
import threading
import weakref

import pytest
from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.errors import Cancelled
from sdxl_lab.job import (
    OVER,
    TRANSITIONS,
    IllegalTransition,
    ImageRequest,
    Job,
    JobState,
    Moved,
    Stepped,
)
from sdxl_lab.source import SourceImage
from tests.made import image, image_record

REQUEST = ImageRequest(GenerationConfig(), "a cat", 1)
DRAWN = image()
SECONDS = 60


class Engine:
    """A driver that remembers what it was told."""

    def __init__(self):
        self.cancelled = []

    def position(self, job):
        return 3

    def eta(self, job):
        return 1.5

    def preview(self, job):
        return DRAWN.image

    def cancel(self, job):
        self.cancelled.append(job)


def moves(job):
    """Every way to move a job, by the state that it leads to."""
    return {
        JobState.QUEUED: lambda: job.queue(Engine()),
        JobState.RUNNING: job.run,
        JobState.STORING: lambda: job.deliver(DRAWN),
    }


def job_in(state, **more):
    job = Job(REQUEST, **more)
    for each in (JobState.QUEUED, JobState.RUNNING, JobState.STORING):
        if job.state is not state and state not in (JobState.FAILED, JobState.CANCELLED, JobState.ACCEPTED):
            moves(job)[each]()
    if state is JobState.DONE and not job.over:
        job.finish("stored")
    elif state is JobState.FAILED:
        job.fail(ArithmeticError("the culprit's own"))
    elif state is JobState.CANCELLED:
        job.cancel()
    assert job.state is state
    return job


def test_the_table_has_a_row_for_every_state_and_nothing_follows_an_end():
    assert set(TRANSITIONS) == set(JobState)
    assert all(not TRANSITIONS[state] for state in OVER)
    reached, grown = {JobState.ACCEPTED}, True
    while grown:
        more = reached.union(*(TRANSITIONS[state] for state in reached))
        grown, reached = more != reached, more
    assert reached == set(JobState)
    assert all(state in OVER or OVER & TRANSITIONS[state] for state in JobState), "every state has a way out"


@pytest.mark.parametrize("to", [JobState.QUEUED, JobState.RUNNING])
@pytest.mark.parametrize("state", JobState)
def test_what_the_table_does_not_allow_is_refused_and_changes_nothing(state, to):
    job = job_in(state, on_drawn=print)
    if to in TRANSITIONS[state]:
        moves(job)[to]()
        assert job.state is to
        return
    with pytest.raises(IllegalTransition, match=f"from {state} to {to}; allowed: "):
        moves(job)[to]()
    assert job.state is state


@pytest.mark.parametrize("to_store", [True, False])
def test_a_job_goes_its_way_and_everybody_who_watches_sees_it(to_store):
    drawn, seen = [], []
    job = Job(REQUEST, on_drawn=drawn.append if to_store else None)
    job.watch(seen.append)
    job.queue(Engine())
    assert (job.position, job.eta, job.preview()) == (3, 1.5, DRAWN.image)
    job.run()
    job.step(1, 2)
    job.step(2, 2)
    assert job.progress == (2, 2)
    job.deliver(DRAWN)
    if to_store:
        assert (job.state, job.image, drawn) == (JobState.STORING, DRAWN, [job])
        job.finish("stored")
    way = ["queued", "running", Stepped(1, 2), Stepped(2, 2), *(["storing"] if to_store else []), "done"]
    assert seen == [Moved(JobState(each)) if isinstance(each, str) else each for each in way]
    assert job.result() == ("stored" if to_store else DRAWN)
    assert (job.position, job.eta, job.preview(), job.image) == (0, 0.0, None, None)


ENDS = {
    "finish": (lambda job: job.finish("stored"), type(None)),
    "fail": (lambda job: job.fail(ValueError()), ValueError),
    "cancel": (lambda job: (job.cancel(), job.fail(RuntimeError("dropped by the engine"))), Cancelled),
}


@pytest.mark.parametrize(("end", "expected"), ENDS.values(), ids=ENDS)
def test_every_waiter_is_answered(end, expected):
    job, answers = job_in(JobState.RUNNING), []

    async def main():
        awaiting = [asyncio.create_task(_awaited(job)) for _ in range(3)]
        await asyncio.sleep(0)
        threads = [threading.Thread(target=lambda: answers.append(job.exception(SECONDS))) for _ in range(3)]
        job.add_done_callback(lambda done: answers.append(done.exception()))
        for thread in (*threads, ending := threading.Thread(target=end, args=[job])):
            thread.start()
        answers.extend(await asyncio.gather(*awaiting))
        for thread in (*threads, ending):
            thread.join()
        answers.append(await _awaited(job))  # also whoever comes late

    asyncio.run(main())
    assert [type(answer) for answer in answers] == [expected] * 8


async def _awaited(job):
    try:
        await job
    except Exception as error:
        return error


def test_an_asyncio_waiter_that_is_cancelled_leaves_the_job_alone():
    job = Job(REQUEST)

    async def main():
        waiting = asyncio.create_task(_awaited(job))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(main())
    assert job.state is JobState.ACCEPTED
    job.queue(Engine())
    job.run()
    job.finish(DRAWN)  # the loop of that waiter is closed
    assert job.result() is DRAWN


def test_a_job_that_somebody_stores_is_failed_by_that_one():
    told = []
    job = Job(REQUEST, on_drawn=told.append)
    job.queue(Engine())
    job.run()
    job.deliver(ArithmeticError("the culprit's own"))
    assert (job.state, str(job.failure), told) == (JobState.RUNNING, "the culprit's own", [job])
    job.fail(job.failure)
    assert (job.state, job.failure) == (JobState.FAILED, None)


@pytest.mark.parametrize("drawn", [DRAWN, ArithmeticError("the culprit's own")], ids=["image", "failure"])
def test_where_nobody_is_left_to_store_the_waiters_are_answered_all_the_same(drawn):
    def gone(_):
        raise RuntimeError("the loop is closed")

    job = Job(REQUEST, on_drawn=gone)
    job.queue(Engine())
    job.run()
    job.deliver(drawn)
    assert job.state is JobState.FAILED


def test_waiting_has_an_end():
    with pytest.raises(TimeoutError, match=r"accepted after 0\.01 s"):
        Job(REQUEST).result(0.01)


def test_of_several_ends_the_first_stands():
    job = job_in(JobState.RUNNING)
    assert job.finish(DRAWN)
    assert not job.fail(ValueError())
    assert not job.finish("another")
    job.cancel()
    job.deliver(DRAWN)
    assert (job.state, job.result(), job.cancel_reason) == (JobState.DONE, DRAWN, None)


def test_a_cancel_is_told_to_the_driver_and_its_first_reason_to_whoever_waits():
    job, engine = Job(REQUEST), Engine()
    job.queue(engine)
    job.cancel(KeyError("the first"))
    job.cancel(KeyError("the second"))
    assert (engine.cancelled, job.state) == ([job, job], JobState.QUEUED)
    job.fail(RuntimeError("the engine dropped it"))
    assert job.state is JobState.CANCELLED
    with pytest.raises(KeyError, match="the first"):
        job.result()


def test_a_job_that_nobody_has_in_hand_is_cancelled_at_once():
    job = Job(REQUEST)
    job.cancel()
    with pytest.raises(IllegalTransition):
        job.queue(Engine())
    assert job.state is JobState.CANCELLED


def test_a_job_of_another_replica_follows_the_record_and_comes_here_when_that_one_is_gone():
    job, seen, there = Job(REQUEST, on_drawn=print), [], Engine()
    job.watch(lambda change: seen.append(change.state))
    for state in (JobState.QUEUED, JobState.STORING, JobState.STORING, JobState.RUNNING):
        job.follow(state, there)
    assert seen == ["queued", "running", "storing", "queued", "running"]
    here = Engine()
    job.queue(here)
    with pytest.raises(IllegalTransition):
        job.queue(here)  # the very same has it already
    job.run()
    job.deliver(DRAWN)
    assert job.finish("stored")


def test_a_watcher_that_fails_harms_nobody_and_is_called_no_more(caplog):
    job, seen = Job(REQUEST), []

    def bad(change):
        seen.append(change)
        raise RuntimeError("the watcher's own")

    unwatch = job.watch(seen.append)
    job.watch(bad)
    job.queue(Engine())
    unwatch()
    job.run()
    assert seen == [Moved(JobState.QUEUED)] * 2
    assert "the image goes on without it" in caplog.text


def test_a_job_that_is_over_lets_go_of_what_it_was_drawn_with():
    class Pixels(list):
        pass

    def failing():
        pixels = Pixels()
        held.append(weakref.ref(pixels))
        raise RuntimeError("the call failed") from ValueError("for a reason")

    job, held = job_in(JobState.RUNNING), []
    driver = weakref.ref(job._driver)
    try:
        failing()
    except RuntimeError as error:
        job.fail(error)
    gc.collect()
    assert [reference() for reference in (*held, driver)] == [None, None]
    error = job.exception()
    assert (error.__traceback__, str(error.__cause__)) == (None, "for a reason")
    assert "in failing" in error.__notes__[0], "where it failed can still be read"


def test_a_request_out_of_range_is_refused_before_any_work():
    config, source = GenerationConfig(), Image.new("RGB", (64, 64))
    for strength in (0, 1.5, "much", 0.001):
        with pytest.raises(ConfigError, match="strength must be"):
            ImageRequest(
                config.with_(steps=20), "a cat", 1, SourceImage(source, strength, image_record(), stage="refiner")
            )
    with pytest.raises(ConfigError, match="seed"):
        ImageRequest(config, "a cat", -1)
