"""A process of its own for each thing that is compared.

torch gives every thread an OpenMP pool. While a process has more pool threads than cores, the pools slow one another,
so two things in one process halve each other's speed even when they take turns.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

_subject: Any = None

Call = Callable[..., Any]


@contextmanager
def isolated(make: Callable[..., Any], *arguments: Any) -> Iterator[Call]:
    """Build `make(*arguments)` in a new process. Yields a function that runs `work(subject, *more)` there."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_build, initargs=(make, arguments)) as pool:
        yield lambda work, *more: pool.submit(_run, work, more).result()


def _build(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _subject
    _subject = make(*arguments)


def _run(work: Callable[..., Any], more: tuple[Any, ...]) -> Any:
    return work(_subject, *more)
