"""A process of its own that can be ended: like `isolated`, but no call outlasts its time."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 5.0  # seconds for a process to end by itself


class WorkerError(RuntimeError):
    """A worker's call failed, did not end in time, or the worker is no more."""


class Worker:
    """Builds `make(*arguments)` in a new process, and runs there what it is told to, one call after the other.

    `send` starts a call and `result` waits for the oldest one that is under way. After an error of the construction, or
    a call that took too long, the process is ended and every further call fails with the same reason. A call that
    merely failed leaves the worker as it is. Times are on `time.monotonic`'s clock.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        self._built = False
        self._lost: str | None = None

    def send(self, work: Callable[..., Any], *more: Any) -> None:
        """Have `work(subject, *more)` run, once what was sent before is done. Raises `WorkerError`."""
        if self._lost:
            raise WorkerError(self._lost)
        try:
            self._connection.send((work, more))
        except OSError as error:
            raise self._end(f"its process ended: {error}") from error

    def result(self, until: float) -> Any:
        """What the oldest call returned. Raises `WorkerError`."""
        if not self._built:
            self._received(until)
            self._built = True
        return self._received(until)

    def call(self, until: float, work: Callable[..., Any], *more: Any) -> Any:
        self.send(work, *more)
        return self.result(until)

    def close(self) -> None:
        """Let the process end, or end it where it is still busy."""
        if not self._lost:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(PATIENCE)
        self._end("it was closed")
        self._process.join()

    def _received(self, until: float) -> Any:
        if self._lost:
            raise WorkerError(self._lost)
        try:
            if not self._connection.poll(max(0.0, until - time.monotonic())):
                raise self._end("its time ran out")
            failed, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise self._end(f"its process ended with the status {self._process.exitcode}") from error
        if not failed:
            return value
        raise WorkerError(value) if self._built else self._end(value)

    def _end(self, reason: str) -> WorkerError:
        self._lost = self._lost or reason
        self._process.kill()
        self._connection.close()
        return WorkerError(self._lost)


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answers are pairs: whether it failed, and the value or the error in one line."""
    try:
        subject = make(*arguments)
    except Exception as error:  # the parent is told of whatever it is, and raises it
        connection.send((True, one_line(error)))
        return
    connection.send((False, None))
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            told = connection.recv()
            if told is None:
                return
            work, more = told
            try:
                answer = False, work(subject, *more)
            except Exception as error:  # likewise
                answer = True, one_line(error)
            connection.send(answer)


def one_line(error: BaseException) -> str:
    """An error's kind and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
