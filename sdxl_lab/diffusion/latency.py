"""How long the engine's calls take, as measured, and kept for the next start.

Numbers only: a call's group and rows go in with its seconds. What a call is, it is told. Imports no torch.
"""

import hashlib
import json
import logging
import statistics
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from sdxl_lab.declaration import canonical
from sdxl_lab.files import cache_folder, write_whole

log = logging.getLogger(__name__)

REMEMBERED = 15  # the last calls of a kind; their median passes over a first, slow one
# So many calls in a row, all slower or all faster than the median by this factor, are another machine: somebody took
# a core, or gave it back.
CHANGED, FACTOR = 5, 1.5


class Group(NamedTuple):
    """What must agree for two images to share a call: the UNet, and the latents' height and width."""

    name: str
    height: int
    width: int

    @property
    def decode(self) -> "Group":
        """The VAE's decode of such latents, whose rows are images."""
        return self._replace(name="decode")


@dataclass(frozen=True)
class Forecast:
    """Seconds from now until an image's first call and until it is decoded."""

    start: float
    end: float


class LatencyModel:
    """Seconds a call takes, by its group and how many rows (for a decode: images) it had.

    When the calls of one row count change by half or more for good, what is known of the group's other counts is
    forgotten: it was measured on what is by now another machine.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._seconds: dict[Group, dict[int, deque[float]]] = {}

    @classmethod
    def remembered(cls, **of: object) -> Self:
        """What was learnt before on the same machine `of` the same device, model, dtype: whatever decides a call's
        seconds. A file that cannot be read is an empty one."""
        path = cache_folder() / "latency" / f"{hashlib.sha256(canonical(of).encode()).hexdigest()[:32]}.json"
        model = cls(path)
        try:
            for name, height, width, rows, seconds in json.loads(path.read_text())["calls"]:
                for each in seconds:
                    model.took(Group(name, int(height), int(width)), int(rows), float(each))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s is damaged and left out: %s", path, error)
            model._seconds.clear()
        return model

    def to_dict(self) -> dict[str, Any]:
        """What is known, as plain values."""
        return {
            "calls": [
                [*group, rows, [round(each, 6) for each in seconds]]
                for group, by_rows in self._seconds.items()
                for rows, seconds in by_rows.items()
            ]
        }

    def keep(self, known: dict[str, Any]) -> None:
        """Write `to_dict()` down for the next start. A home that is read-only or full costs that start a calibration,
        nothing else."""
        if self.path is not None:
            with suppress(OSError):
                write_whole(self.path, json.dumps(known).encode())

    def took(self, group: Group, rows: int, seconds: float) -> None:
        by_rows = self._seconds.setdefault(group, {})
        known = by_rows.setdefault(rows, deque(maxlen=REMEMBERED))
        if len(known) == 1 and known[0] > FACTOR * seconds:
            known.clear()  # a first call prepares what the later ones find
        before = statistics.median(known) if len(known) > CHANGED else None
        known.append(seconds)
        if before is not None:
            last = list(known)[-CHANGED:]
            if min(last) > before * FACTOR or max(last) < before / FACTOR:
                self._seconds[group] = {rows: deque(last, maxlen=REMEMBERED)}

    def counts(self, group: Group) -> dict[int, int]:
        """How many calls were measured, by their rows."""
        return {rows: len(seconds) for rows, seconds in self._seconds.get(group, {}).items()}

    def measured(self, group: Group) -> list[int]:
        """The row counts of which something was measured, the fewest first."""
        return sorted(self._seconds.get(group, ()))

    def seconds(self, group: Group, rows: int) -> float:
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

    def prices(self, group: Group, counts: Iterable[int]) -> dict[int, float]:
        """Seconds a row, of those of `counts` that were measured."""
        known = self.measured(group)
        return {rows: self._median(group, rows) / rows for rows in counts if rows in known}

    def _median(self, group: Group, rows: int) -> float:
        return statistics.median(tuple(self._seconds[group][rows]))

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return bool(self._seconds)
