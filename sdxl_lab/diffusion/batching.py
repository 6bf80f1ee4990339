"""The batcher: which images are under way, which of them share the next UNet call, and when each will be done.

Arithmetic only: workloads and measured costs go in, a plan comes out. It has no thread and no clock; whoever asks says
what time it is, in seconds of any one clock. The engine carries out the plan; the forecast is the same plan, played
forward.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sdxl_lab.diffusion.latency import Forecast, Group, LatencyModel

# An image's remaining time counts for half once it has waited this many times its own: between the two classics,
# shortest remaining time first (no patience) and highest response ratio next (Hansen 1971).
PATIENCE = 10.0
# Who takes longer than this multiple of what first come, first served would have taken goes before everybody.
STRETCH = 3.0
# What a cheaper row is worth to each row that waits for it, against what a longer call costs the rows that are in it.
THRIFT = 4.0
# So many calls of a row count are made before it is judged: the first one may be slow.
TRIALS = 3
# Larger calls are tried while one more doubling takes at least this share off the price of a row, ...
GAIN = 0.05
# ... and this often in spite of one that did not: a measurement may be unlucky.
PATIENT = 1


class Part(NamedTuple):
    """A stretch of an image's denoising: `calls` UNet calls of `group`, with `rows` rows in each."""

    group: Group
    rows: int
    calls: int


Workload = tuple[Part, ...]  # an image's parts, one after the other


@dataclass(frozen=True)
class Plan:
    """What comes next. The images of `start` are put under way; those of `call`, `rows` rows of `group` in all, share
    one UNet call. Empty where there is nothing to do."""

    start: tuple[Hashable, ...] = ()
    call: tuple[Hashable, ...] = ()
    group: Group | None = None
    rows: int = 0


@dataclass
class _Image:
    """An image as the batcher sees it. Times are on the caller's clock."""

    key: Hashable
    whole: list[Part]
    parts: list[Part]  # those that are left
    priority: int
    arrived: float
    number: int
    cost: float  # seconds of its own calls, at the price of a row in a well filled call
    left: float  # the same for what remains
    due: float  # by when it goes before everybody; endless where nothing was measured as it arrived
    alone: bool  # it shares no call
    active: bool = False

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def group(self) -> Group:
        return self.parts[0].group

    def rank(self, now: float) -> float:
        """Its remaining time, which counts for less the longer it has waited."""
        return self.left / (1 + max(0.0, now - self.arrived) / (PATIENCE * self.cost))

    def reaches(self, rank: float, now: float) -> float:
        """Seconds until its age alone brings it down to this rank; 0 for a rank that no time leads to."""
        if rank <= 0:
            return 0.0
        return PATIENCE * self.cost * (self.left / rank - 1) - max(0.0, now - self.arrived)


@dataclass
class Batcher:
    """Who is under way and who is in the next call.

    `max_active` bounds the images under way: memory. `max_rows` bounds the rows of one call; how many it takes is what
    `latency` measured to be cheap, and the more so the more rows are there. While `exploring`, row counts of which too
    little is known are tried first, where there is enough to fill them. With `order` "shortest" the image with the
    least remaining time goes first, less so the longer it has waited; one that would take more than `STRETCH` times as
    long as first come, first served falls due, and goes before everybody (`bench.queueing.bound` says what that
    guarantees). "fifo" is first come, first served. A higher priority goes before, but not before what is due.
    """

    latency: LatencyModel
    max_rows: int = 32
    max_active: int = 256
    order: str = "shortest"
    exploring: bool = True
    _images: dict[Hashable, _Image] = field(default_factory=dict)
    _count: int = 0
    _busy_until: float = -math.inf  # when first come, first served would be done with all that has arrived
    _choices: dict[Group, tuple[int, float]] = field(default_factory=dict)
    _rows: dict[tuple[Group, int], int] = field(default_factory=dict)

    # --- who is there ------------------------------------------------------------------------------------------------

    def add(self, key: Hashable, work: Iterable[Part], now: float, priority: int = 0, *, alone: bool = False) -> None:
        """An image arrives; `alone`, it shares no call. Raises `ValueError` for a key that is there, or work without a
        call."""
        if key in self._images:
            raise ValueError(f"an image must be added once; received {key!r} again")
        parts = _checked(work)
        cost, due = self._cost(parts), math.inf
        if all(self.latency.measured(part.group) for part in parts):
            self._busy_until = max(self._busy_until, now) + cost
            due = now + STRETCH * (self._busy_until - now) - cost
        self._images[key] = _Image(key, parts, list(parts), priority, now, self._count, cost, cost, due, alone)
        self._count += 1

    def refine(self, key: Hashable, work: Iterable[Part]) -> None:
        """The image's remaining work, now that it is known exactly."""
        image = self._images[key]
        image.parts = _checked(work)
        image.whole = list(image.parts)
        image.cost = image.left = self._cost(image.parts)

    def remove(self, key: Hashable) -> None:
        """The image is gone: done, failed or cancelled. Nothing happens where it was gone already."""
        self._images.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._images

    def __len__(self) -> int:
        return len(self._images)

    @property
    def active(self) -> list[Hashable]:
        """The images under way: each has had a call, and may be between two of them."""
        return [image.key for image in self._images.values() if image.active]

    @property
    def waiting(self) -> list[Hashable]:
        """The images that wait, in the order in which they arrived."""
        return [image.key for image in self._images.values() if not image.active]

    @property
    def arrivals(self) -> int:
        """How many images have arrived in all."""
        return self._count

    @property
    def filled(self) -> bool:
        """Whether the images here fill a call: one more makes somebody wait."""
        rows: Counter[Group] = Counter()
        for image in self._images.values():
            rows[image.group] += image.rows
        return any(count >= (self._to_try(group) or self.rows_of(group)) for group, count in rows.items())

    def position(self, key: Hashable, now: float) -> int:
        """The place among those that wait, from 1; 0 for one that does not wait."""
        waiting = [image.key for image in self._ordered(now) if not image.active]
        return waiting.index(key) + 1 if key in waiting else 0

    # --- what comes next ---------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """The next call. The first of the order names the group; others of the group fill the rows."""
        room = self.max_active - len(self.active)
        chosen: list[_Image] = []
        rows, limit = 0, 0
        for image in self._ordered(now):
            if chosen and (image.alone or image.group != chosen[0].group or rows + image.rows > limit):
                continue
            if not image.active:
                if room <= 0:
                    continue
                room -= 1
            if not chosen:
                limit = image.rows if image.alone else max(image.rows, self._limit(image.group, room))
            chosen.append(image)
            rows += image.rows
            if rows >= limit:
                break
        if not chosen:
            return Plan()
        start = tuple(image.key for image in chosen if not image.active)
        return Plan(start, tuple(image.key for image in chosen), chosen[0].group, rows)

    def started(self, key: Hashable) -> None:
        """The image is under way: it holds memory until it is removed."""
        self._images[key].active = True

    def called(self, keys: Iterable[Hashable], calls: int = 1) -> list[Hashable]:
        """These images had their call, or `calls` of them that were `alike`. Returns those that have none left; they
        stay until they are removed."""
        done = []
        for key in keys:
            image = self._images[key]
            part = image.parts[0]
            if part.calls > calls:
                image.parts[0] = part._replace(calls=part.calls - calls)
            elif len(image.parts) > 1:
                image.parts.pop(0)
            else:
                done.append(key)
            image.left = self._cost(image.parts)
        return done

    def alike(self, plan: Plan, now: float, seconds: float) -> int:
        """How many calls of `seconds` each the plan made at `now` stands for, if nobody comes or goes: at least 1, and
        never too many. Its images have been `started`.

        A call moves its own images forward only. So the plan stands until one of them is done with a part, or one of
        the others falls due or passes one of them by its age. The rank of those in the call falls, too, so their
        present rank bounds it.
        """
        if self.exploring:
            return 1
        leap = min(self._images[key].parts[0].calls for key in plan.call)
        if self.order == "fifo" or seconds <= 0:
            return leap
        mine = set(plan.call)
        last: _Image | None = None
        for image in self._ordered(now):
            if image.key in mine:
                last = image
            elif now < image.due:
                until = image.due - now
                if last and now < last.due and last.priority == image.priority:
                    until = min(until, image.reaches(last.rank(now), now) + seconds)
                leap = min(leap, math.ceil(min(until / seconds, leap) - 1e-6))  # some are never due
        return max(1, leap)

    def _limit(self, group: Group, room: int) -> int:
        """The rows of the next call: a count to be tried, if there are images to fill it, else the best known."""
        sharing = [image for image in self._images.values() if image.group == group and not image.alone]
        untried = self._to_try(group)
        if untried is not None:
            waiting = sorted((image.rows for image in sharing if not image.active), reverse=True)[:room]
            if sum(waiting) + sum(image.rows for image in sharing if image.active) >= untried:
                return untried
        return self.rows_of(group, sum(image.rows for image in sharing))

    def _to_try(self, group: Group) -> int | None:
        return self.untried(group) if self.exploring else None

    def untried(self, group: Group) -> int | None:
        """The next row count to be measured: powers of two, and `max_rows`, while more rows make a row cheaper."""
        known, prices = self.latency.counts(group), self.latency.prices(group, self._candidates())
        least, vain = math.inf, 0
        for rows in self._candidates():
            if known.get(rows, 0) < TRIALS:
                return rows
            vain = 0 if prices[rows] < least * (1 - GAIN) else vain + 1
            if vain > PATIENT:
                return None
            least = min(least, prices[rows])
        return None

    def _candidates(self) -> list[int]:
        return sorted({*(1 << power for power in range(1, self.max_rows.bit_length())), self.max_rows})

    def rows_of(self, group: Group, there: int | None = None) -> int:
        """The rows of a call where so many rows of the group are there; left out, of a well filled call.

        The least of `THRIFT` times the seconds in which all of them have had a call of so many rows, the last one with
        what is left, and the seconds of the first call. With few rows there it is small and soon over, with many it
        costs the least time a row, and a larger call must be cheaper to be worth it.
        """
        if there is None:
            return self._choice(group)[0]
        if (group, there) not in self._rows:
            self._rows[group, there] = min(self._measured(group), key=lambda rows: self._worth(group, there, rows))
        return self._rows[group, there]

    def _worth(self, group: Group, there: int, rows: int) -> tuple[float, int]:
        calls, left = divmod(there, rows)
        seconds = calls * self.latency.seconds(group, rows) + (self.latency.seconds(group, left) if left else 0.0)
        return THRIFT * seconds + self.latency.seconds(group, min(rows, there)), rows

    def _measured(self, group: Group) -> list[int]:
        """The row counts to choose from; all that is allowed where nothing was measured."""
        return [rows for rows in self.latency.measured(group) if rows <= self.max_rows] or [self.max_rows]

    def _choice(self, group: Group) -> tuple[int, float]:
        """Rows of a well filled call, one with `max_rows` there, and seconds a row in it."""
        if group not in self._choices:
            rows = self.rows_of(group, self.max_rows)
            self._choices[group] = rows, self.latency.seconds(group, rows) / rows
        return self._choices[group]

    def measured(self) -> None:
        """The latency model has learnt: choose rows anew, and count everybody's time at the new price."""
        self._choices.clear()
        self._rows.clear()
        for image in self._images.values():
            image.cost, image.left = self._cost(image.whole), self._cost(image.parts)

    def _price(self, group: Group) -> float:
        return self._choice(group)[1] or 1.0  # nothing measured: calls count

    def _cost(self, parts: Iterable[Part]) -> float:
        return sum(part.calls * part.rows * self._price(part.group) for part in parts)

    def _ordered(self, now: float) -> list[_Image]:
        if self.order == "fifo":
            return sorted(self._images.values(), key=lambda image: (-image.priority, image.number))

        def rank(image: _Image) -> tuple[float, ...]:
            if now >= image.due:
                return (-math.inf, image.due, image.number)
            return (-image.priority, image.rank(now), image.number)

        return sorted(self._images.values(), key=rank)

    # --- when it will be done ----------------------------------------------------------------------------------------

    def forecast(self, now: float) -> dict[Hashable, Forecast]:
        """When each image has its first call and when it is decoded, in seconds from now, if nobody else arrives: this
        very plan, played forward at the measured costs. An image under way has begun, at 0."""
        twin = self.twin()
        starts = dict.fromkeys(self.active, 0.0)
        ends: dict[Hashable, float] = {}
        passed = 0.0
        while twin._images:
            plan = twin.plan(now + passed)
            assert plan.group is not None
            seconds = self.latency.seconds(plan.group, plan.rows)
            for key in plan.start:
                twin.started(key)
                starts[key] = passed
            calls = twin.alike(plan, now + passed, seconds)
            done = twin.called(plan.call, calls)
            passed += calls * seconds
            passed += self.latency.seconds(plan.group.decode, len(done)) if done else 0.0
            for key in done:
                ends[key] = passed
                twin.remove(key)
        return {key: Forecast(starts[key], ends[key]) for key in ends}

    def twin(self) -> "Batcher":
        """The same images, to be played forward: it shares only the measurements, and tries nothing out."""
        images = {key: replace(image, parts=list(image.parts)) for key, image in self._images.items()}
        return replace(self, exploring=False, _images=images, _choices=dict(self._choices), _rows=dict(self._rows))


def _checked(work: Iterable[Part]) -> list[Part]:
    parts = [part for part in work if part.calls]
    if not parts or any(part.rows < 1 or part.calls < 0 for part in parts):
        raise ValueError(f"an image must have at least one call of at least one row; received {parts}")
    return parts
