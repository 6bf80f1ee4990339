"""A simulated fleet of replicas behind round robin: when each image is started, done or refused.

The inputs are the cost of a UNet call and the rows of each image's calls. Round robin ignores the replicas' state, so
each replica is simulated alone, in leaps over equal calls. That is exact, and for 1,000 replicas faster than an event
queue shared by all.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


@dataclass(frozen=True)
class Policy:
    """How a replica batches. Images join while the sum of their widest calls is at most `rows`; one image always joins.
    `queue` images may wait, and further ones are refused. With `together` no image joins until all running ones are
    done (a static batch), and all are answered with the last."""

    rows: int
    queue: int = 100
    together: bool = False

    def at_once(self, work: Work) -> int:
        """The largest number of such images that run at once."""
        return max(1, self.rows // _width(work))


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
    """Images a second of one saturated replica."""
    calls, rows = sum(count for _, count in work), sum(count * many for many, count in work)
    return 1 / (calls * cost.call / policy.at_once(work) + rows * cost.row + cost.image)


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
        starts[mine], ends[mine] = replica.play(moments, [works[index] for index in mine.tolist()])
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
    """One replica with the engine's batching: each call makes one step of every running image."""

    def __init__(self, cost: Cost, policy: Policy, horizon: float) -> None:
        self.cost, self.policy, self.horizon = cost, policy, horizon
        self.busy, self.calls, self.rows = 0.0, 0, 0

    def play(self, arrivals: list[float], works: list[Work]) -> tuple[list[float], list[float]]:
        """Starts and ends of the images, NaN where refused."""
        cost, policy = self.cost, self.policy
        starts, ends = [math.nan] * len(arrivals), [math.nan] * len(arrivals)
        waiting: deque[int] = deque()
        running: list[list[int]] = []  # index of the image, of its stretch, the stretch's rows, calls left in it
        finished: list[int] = []
        upcoming, in_flight, now = 0, 0, 0.0
        while True:
            while upcoming < len(arrivals) and arrivals[upcoming] <= now:
                if len(waiting) < policy.queue:
                    waiting.append(upcoming)
                upcoming += 1
            open_ = not (policy.together and running)
            while open_ and waiting and (not running or in_flight + _width(works[waiting[0]]) <= policy.rows):
                index = waiting.popleft()
                rows, calls = works[index][0]
                running.append([index, 0, rows, calls])
                in_flight += _width(works[index])
                starts[index] = now
            if not running:
                if upcoming == len(arrivals):
                    return starts, ends
                now = arrivals[upcoming]
                continue
            rows = sum(each[2] for each in running)
            seconds = cost.call + cost.row * rows
            leap = min(each[3] for each in running)
            if not (waiting or policy.together) and upcoming < len(arrivals):
                leap = max(1, min(leap, math.ceil((arrivals[upcoming] - now) / seconds)))
            before, now = now, now + leap * seconds
            self.calls, self.rows = self.calls + leap, self.rows + leap * rows
            for each in running:
                each[3] -= leap
                if not each[3]:
                    each[1] += 1
                    stretches = works[each[0]]
                    if each[1] == len(stretches):
                        finished.append(each[0])
                    else:
                        each[2], each[3] = stretches[each[1]]
            if finished:
                running = [each for each in running if each[3]]
                if not (policy.together and running):
                    now += cost.image * len(finished)
                    for index in finished:
                        ends[index] = now + cost.beside
                        in_flight -= _width(works[index])
                    finished.clear()
            self.busy += max(0.0, min(now, self.horizon) - min(before, self.horizon))


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
