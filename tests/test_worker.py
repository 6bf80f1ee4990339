"""Workers of the benchmarks: what they are told, what they fail with, and when they are ended."""

import json
import operator
import os
import time

import pytest

from bench.worker import Worker, WorkerError

SOON = 60.0  # a new process, on a machine that does other things too


def until(seconds=SOON):
    return time.monotonic() + seconds


@pytest.fixture
def start():
    workers = []

    def start(make, *arguments):
        workers.append(Worker(make, *arguments))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()
        assert not worker._process.is_alive()


# What workers are told here is of the standard library, which a new process finds whatever this file is called there.


def test_a_worker_keeps_its_subject_and_answers_in_order(start):
    worker = start(list, (1,))
    worker.send(tuple)
    worker.send(list.append, 2)
    worker.send(tuple)
    assert [worker.result(until()) for _ in range(3)] == [(1,), None, (1, 2)]


def test_a_call_that_fails_leaves_the_worker_at_work(start):
    worker = start(list, (1,))
    with pytest.raises(WorkerError, match=r"^IndexError: list index out of range$"):
        worker.call(until(), operator.getitem, 5)
    assert worker.call(until(), tuple) == (1,)


@pytest.mark.parametrize(
    ("make", "argument", "work", "seconds", "reason"),
    [
        (json.loads, "{", bool, SOON, "JSONDecodeError: Expecting property name enclosed in double quotes"),
        (int, 3, os._exit, SOON, "its process ended with the status 3"),
        (int, 600, time.sleep, 0.5, "its time ran out"),
    ],
    ids=["cannot be built", "dies", "takes too long"],
)
def test_a_worker_that_is_lost_says_why_each_time(start, make, argument, work, seconds, reason):
    worker = start(make, argument)
    worker.send(work)
    with pytest.raises(WorkerError, match=f"^{reason}"):
        worker.result(until(seconds))
    with pytest.raises(WorkerError, match=f"^{reason}"):
        worker.call(until(), bool)
    worker._process.join(SOON)
    assert not worker._process.is_alive()


def test_a_worker_that_is_not_busy_ends_by_itself(start):
    worker = start(int, 1)
    assert worker.call(until(), operator.add, 1) == 2
    worker.close()
    assert worker._process.exitcode == 0
