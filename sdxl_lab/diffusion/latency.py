"""How long the engine's calls take, and from that when an image will start and be done.

Arithmetic only: measured costs and workloads go in, forecasts come out.
"""

import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

REMEMBERED = 15  # the last calls of a kind; their median passes over a first, slow one


@dataclass(frozen=True)
class Workload:
    """An image's remaining work: `calls` of `group`'s UNet, `rows` in each, then a decode."""

    group: Hashable
    rows: int
    calls: int


@dataclass(frozen=True)
class Forecast:
    """Seconds from now until an image's first call and until it is decoded."""

    start: float
    end: float


class LatencyModel:
    """Seconds a call takes, by its group and how many rows (for a decode: images) it had."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, dict[int, deque[float]]] = {}

    def took(self, group: Hashable, rows: int, seconds: float) -> None:
        by_rows = self._seconds.setdefault(group, {})
        by_rows.setdefault(rows, deque(maxlen=REMEMBERED)).append(seconds)

    def seconds(self, group: Hashable, rows: int) -> float:
        """Of a call with so many rows: as measured, else in proportion to the nearest number that was; 0 for a group
        of which nothing is known."""
        by_rows = dict(self._seconds.get(group, {}))
        if not by_rows:
            return 0.0
        nearest = min(by_rows, key=lambda known: abs(known - rows))
        median = statistics.median(tuple(by_rows[nearest]))
        return median if nearest == rows else median * max(rows / nearest, 0.5)

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return bool(self._seconds)


def forecast(
    running: Sequence[Workload], waiting: Sequence[Workload], budget: int, pace: LatencyModel
) -> list[Forecast]:
    """When each will start and end, the running first: the engine's own rule, played forward in leaps from one
    image's end to the next. In a round every group has one call and every image in flight one step."""
    left = {index: load.calls for index, load in enumerate(running)}
    loads = [*running, *waiting]
    starts, ends = dict.fromkeys(left, 0.0), dict.fromkeys(left, 0.0)
    now, upcoming = 0.0, len(running)
    while left or upcoming < len(loads):
        while upcoming < len(loads):
            in_flight = sum(loads[index].rows for index in left)
            if left and in_flight + loads[upcoming].rows > budget:
                break
            left[upcoming], starts[upcoming] = loads[upcoming].calls, now
            upcoming += 1
        rows: dict[Hashable, int] = {}
        for index in left:
            rows[loads[index].group] = rows.get(loads[index].group, 0) + loads[index].rows
        leap = max(1, min(left.values()))
        now += leap * sum(pace.seconds(group, count) for group, count in rows.items())
        done = [index for index in left if left[index] <= leap]
        left = {index: calls - leap for index, calls in left.items() if calls > leap}
        now += pace.seconds("decode", len(done))
        ends |= dict.fromkeys(done, now)
    return [Forecast(starts[index], ends[index]) for index in range(len(loads))]
