"""How long the engine's calls take, and from that when an image will start and be done.

Arithmetic only: measured costs and workloads go in, forecasts come out.
"""

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

REMEMBERED = 15  # the last calls of a kind; their median passes over a first, slow one


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

    def counts(self, group: Hashable) -> dict[int, int]:
        """How many calls were measured, by their rows."""
        return {rows: len(seconds) for rows, seconds in self._seconds.get(group, {}).items()}

    def measured(self, group: Hashable) -> list[int]:
        """The row counts of which something was measured, the fewest first."""
        return sorted(self._seconds.get(group, ()))

    def seconds(self, group: Hashable, rows: int) -> float:
        """Of a call with so many rows: as measured, on the line between the nearest measured counts, or beyond them in
        proportion to the last one; 0 for a group of which nothing is known. Never less than a smaller call takes."""
        known = self.measured(group)
        if not known:
            return 0.0
        if rows in known:
            return self._median(group, rows)
        below, above = [each for each in known if each < rows], [each for each in known if each > rows]
        if not below:
            return self._median(group, above[0])
        if not above:
            return self._median(group, below[-1]) * rows / below[-1]
        low, high = below[-1], above[0]
        first, last = self._median(group, low), self._median(group, high)
        return first + (last - first) * (rows - low) / (high - low)

    def _median(self, group: Hashable, rows: int) -> float:
        return statistics.median(tuple(self._seconds[group][rows]))

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return bool(self._seconds)
