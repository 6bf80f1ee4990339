"""A simulated fleet of replicas behind round robin: when each image is started, done or refused.

The inputs are the cost of a UNet call and the rows of each image's calls. Who is in the next call is the engine's own
`Batcher`'s to say. Round robin ignores the replicas' state, so each replica is simulated alone, in leaps over equal
calls. That is exact, and for 1,000 replicas faster than an event queue shared by all.
"""

import math
import random
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_lab.config import RuntimeProfile
from sdxl_lab.diffusion.batching import Batcher, Part
from sdxl_lab.diffusion.latency import Group, LatencyModel

GROUP = Group("base", 128, 128)
SHIPPED = RuntimeProfile()  # its limits are those of an engine that was told nothing
Work = tuple[tuple[int, int], ...]  # (rows, calls) in order: ((2, 30),) is 30 guided steps


@dataclass(frozen=True)
class Cost:
    """Seconds of a UNet call without its rows, of each row, of an image's decode and other work in the engine, and of
    an image's work outside the engine."""

    call: float
    row: float
    image: float = 0.0
    beside: float = 0.0

    def alone(self, work: Work) -> float:
        """Seconds of an image alone on a replica."""
        return sum(calls * (self.call + self.row * rows) for rows, calls in work) + self.image + self.beside

    def latency(self, rows: int) -> LatencyModel:
        """What an engine has learnt that measured the calls of one row and of guided images, up to `rows` rows."""
        model = LatencyModel()
        for each in (1, *range(2, rows + 1, 2)):
            model.took(GROUP, each, self.call + self.row * each)
        return model


@dataclass(frozen=True)
class Policy:
    """How a replica batches: by the engine's `Batcher`, in calls of at most `rows` rows, with at most `active` images
    under way. `queue` images may wait, and further ones are refused. With `together` it is a static batch instead, as
    LitServe's: images whose widest calls fill `rows` start at once, no other joins until all are done, and all are
    answered with the last."""

    order: str = SHIPPED.order
    rows: int = SHIPPED.rows
    active: int = SHIPPED.active
    queue: int = 100
    together: bool = False

    def batcher(self, cost: Cost) -> Batcher:
        """One that has measured all and tries nothing out."""
        model = cost.latency(self.rows)
        return Batcher(model, max_rows=self.rows, max_active=self.active, order=self.order, exploring=False)

    def call_rows(self, work: Work, cost: Cost) -> int:
        """The rows of a saturated replica's calls of such images: all of them in a static batch, else what the batcher
        chooses with as many there as may be under way."""
        chosen = self.rows if self.together else self.batcher(cost).rows_of(GROUP, self.active * _width(work))
        return _width(work) if self.active == 1 else max(_width(work), chosen)


STATIC = Policy(together=True)
SINGLE = Policy("fifo", active=1)  # first come, first served, one at a time


@dataclass(frozen=True)
class Scaling:
    """dstack's autoscaler for `metric: rps` (its `RPSAutoscaler`), evaluated every `look` seconds. A new replica is
    ready after `startup` seconds. Times are in seconds, `target` in requests a second and replica."""

    target: float
    window: int = 60
    up_delay: float = 300.0
    most: int = 100
    startup: float = 180.0
    look: float = 15.0

    def wanted(self, requests: int) -> int:
        return min(max(math.ceil(requests / self.window / self.target), 1), self.most)


@dataclass(frozen=True)
class FleetOutcome:
    """The images in order of arrival, as arrays of one length, in seconds: `starts` is when the replica began an image
    and `ends` when it was done, both NaN for a refused one. `busy` is each replica's seconds of work until the last
    arrival."""

    arrivals: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    replicas: np.ndarray
    busy: np.ndarray
    calls: int
    rows: int

    @property
    def refused(self) -> np.ndarray:
        return np.isnan(self.ends)

    @property
    def waits(self) -> np.ndarray:
        """Seconds in the queue."""
        return self.starts - self.arrivals

    @property
    def latencies(self) -> np.ndarray:
        return self.ends - self.arrivals

    def in_system(self, moment: float) -> int:
        """Images that have arrived, were not refused, and are not done."""
        return int(((self.arrivals <= moment) & (self.ends > moment)).sum())

    def settled(self, warm: float = 0.1) -> np.ndarray:
        """Latencies of the images drawn, without the first share of arrivals, which meet an idle fleet."""
        taken = self.latencies[int(warm * len(self.latencies)) :]
        return taken[~np.isnan(taken)]


def _width(work: Work) -> int:
    return max(rows for rows, _ in work)


def capacity(work: Work, cost: Cost, policy: Policy) -> float:
    """Images a second of one saturated replica, whose calls are all as full as the policy lets them be."""
    limit = policy.call_rows(work, cost)

    def at_once(rows: int) -> int:
        return min(policy.active, limit // (_width(work) if policy.together else rows))

    calls = sum(count * (cost.call / at_once(rows) + cost.row * rows) for rows, count in work)
    return 1 / (calls + cost.image)


def poisson(rate: float, count: int, seed: int) -> np.ndarray:
    """Moments of `count` arrivals, `rate` a second on average."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def fleet(
    arrivals: np.ndarray,
    works: Sequence[Work],
    cost: Cost,
    policy: Policy,
    ready: Sequence[float] = (0.0,),
    played: int | None = None,
) -> FleetOutcome:
    """Send arrivals, in order, round robin to the ready replicas; `ready` gives each one's first second. The replicas
    are otherwise alike, so the first `played` of many may represent all: the outcome is then only theirs. Refused
    clients do not return."""
    to = routes(arrivals, ready)
    among = len(ready) if played is None else min(played, len(ready))
    starts, ends = (np.full(len(arrivals), np.nan) for _ in range(2))
    busy, calls, rows = np.zeros(among), 0, 0
    horizon = float(arrivals[-1])
    for number in range(among):
        mine = np.flatnonzero(to == number)
        moments = arrivals[mine].tolist()
        replica = _Replica(cost, policy, horizon)
        play = replica.play_together if policy.together else replica.play
        starts[mine], ends[mine] = play(moments, [works[index] for index in mine.tolist()])
        busy[number], calls, rows = replica.busy, calls + replica.calls, rows + replica.rows
    kept = to < among
    return FleetOutcome(arrivals[kept], starts[kept], ends[kept], to[kept], busy, calls, rows)


def routes(arrivals: np.ndarray, ready: Sequence[float]) -> np.ndarray:
    """The replica of each arrival. Raises ValueError if none is ready for the first."""
    if min(ready) > arrivals[0]:
        raise ValueError(f"a replica must be ready for the first arrival, at {arrivals[0]:.3g} s; received {ready}")
    order = np.argsort(ready, kind="stable")
    count = np.searchsorted(np.sort(ready), arrivals, side="right")
    return order[np.arange(len(arrivals)) % count]


class _Replica:
    """One replica. Images are known by their index among its arrivals."""

    def __init__(self, cost: Cost, policy: Policy, horizon: float) -> None:
        self.cost, self.policy, self.horizon = cost, policy, horizon
        self.busy, self.calls, self.rows = 0.0, 0, 0

    def play(self, arrivals: list[float], works: list[Work]) -> tuple[list[float], list[float]]:
        """Starts and ends of the images, NaN where refused, with the engine's batcher."""
        cost, queue = self.cost, self.policy.queue
        batcher = self.policy.batcher(cost)
        starts: dict[Hashable, float] = {}
        ends: dict[Hashable, float] = {}
        upcoming, waiting, now = 0, 0, 0.0
        while upcoming < len(arrivals) or len(batcher):
            if not len(batcher):
                now = max(now, arrivals[upcoming])
            while upcoming < len(arrivals) and arrivals[upcoming] <= now:
                if waiting < queue:
                    parts = [Part(GROUP, rows, calls) for rows, calls in works[upcoming]]
                    batcher.add(upcoming, parts, arrivals[upcoming])
                    waiting += 1
                upcoming += 1
            plan = batcher.plan(now)
            for index in plan.start:
                batcher.started(index)
                starts[index] = now
            waiting -= len(plan.start)
            seconds = cost.call + cost.row * plan.rows
            leap = batcher.alike(plan, now, seconds)
            if upcoming < len(arrivals) and waiting < queue:
                leap = max(1, min(leap, math.ceil((arrivals[upcoming] - now) / seconds)))
            done = batcher.called(plan.call, leap)
            now = self._pass(now, leap, plan.rows, len(done))
            for index in done:
                batcher.remove(index)
                ends[index] = now + cost.beside
        every = range(len(arrivals))
        return [starts.get(index, math.nan) for index in every], [ends.get(index, math.nan) for index in every]

    def play_together(self, arrivals: list[float], works: list[Work]) -> tuple[list[float], list[float]]:
        """The same in static batches."""
        starts, ends = [math.nan] * len(arrivals), [math.nan] * len(arrivals)
        waiting: deque[int] = deque()
        upcoming, now = 0, 0.0
        while upcoming < len(arrivals) or waiting:
            if not waiting:
                now = max(now, arrivals[upcoming])
            while upcoming < len(arrivals) and arrivals[upcoming] <= now:
                if len(waiting) < self.policy.queue:
                    waiting.append(upcoming)
                upcoming += 1
            batch: list[int] = []
            width = 0
            while waiting and (not batch or width + _width(works[waiting[0]]) <= self.policy.rows):
                width += _width(works[waiting[0]])
                batch.append(waiting.popleft())
            for index in batch:
                starts[index] = now
            running = [[list(stretch) for stretch in works[index]] for index in batch]
            while running:
                leap, rows = min(each[0][1] for each in running), sum(each[0][0] for each in running)
                for each in running:
                    each[0][1] -= leap
                    if not each[0][1]:
                        each.pop(0)
                running = [each for each in running if each]
                now = self._pass(now, leap, rows, 0 if running else len(batch))
            for index in batch:
                ends[index] = now + self.cost.beside
        return starts, ends

    def _pass(self, now: float, calls: int, rows: int, done: int) -> float:
        """The second after these calls of `rows` rows and the decode of `done` images."""
        after = now + calls * (self.cost.call + self.cost.row * rows) + self.cost.image * done
        self.calls, self.rows = self.calls + calls, self.rows + calls * rows
        self.busy += max(0.0, min(after, self.horizon) - min(now, self.horizon))
        return after


def called_for(arrivals: np.ndarray, scaling: Scaling, replicas: int = 1) -> list[float]:
    """The moment from which each replica is ready; the first `replicas` are ready from the beginning. Scaling down is
    not simulated."""
    ready, scaled = [0.0] * replicas, -math.inf
    for now in np.arange(scaling.look, arrivals[-1], scaling.look):
        seen = int(((arrivals > now - scaling.window) & (arrivals <= now)).sum())
        if scaling.wanted(seen) > len(ready) and now - scaled >= scaling.up_delay:
            ready += [float(now) + scaling.startup] * (scaling.wanted(seen) - len(ready))
            scaled = float(now)
    return ready


def mixed(steps: Sequence[int], count: int, seed: int) -> list[Work]:
    """Guided images with a number of steps drawn from `steps` each."""
    draw = random.Random(seed)
    return [((2, draw.choice(steps)),) for _ in range(count)]
