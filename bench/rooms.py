"""A process of its own for everything that is compared.

torch gives every thread an OpenMP pool, and while a process has more such threads than cores none of them waits
actively: two things in one process halve each other's speed even when they take turns.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

_tenant: Any = None

Room = Callable[..., Any]


@contextmanager
def room(make: Callable[..., Any], *arguments: Any) -> Iterator[Room]:
    """Builds `make(*arguments)` in a new process and yields a function that runs `work(tenant, *more)` there."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_move_in, initargs=(make, arguments)) as pool:
        yield lambda work, *more: pool.submit(_visit, work, more).result()


def _move_in(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _tenant
    _tenant = make(*arguments)


def _visit(work: Callable[..., Any], more: tuple[Any, ...]) -> Any:
    return work(_tenant, *more)
