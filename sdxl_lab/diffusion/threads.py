"""How many threads the next call has.

Arithmetic only: what calls took goes in, a count comes out. It has no thread, no clock and no torch.

OpenMP's threads wait for one another some hundred times in a UNet call. Where all of them have a core, more of them
are faster. Beside a busy process they are not: each wait lasts until the scheduler runs the thread that is waited for.
On two cores and beside one such process a call of two rows takes 0.4 s with two threads and 0.07 s with one; on a quiet
machine it is 0.05 s and 0.07 s. No fixed count is right, so the count is measured, again and again.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

# A call that got less of its threads' time than this shared its cores with others, or its threads slept.
ENOUGH = 0.8
# A count is kept if its call took less time than the one before by this share of it: single calls vary.
FASTER = 0.1
# A try that cost c seconds is followed by a pause of PATIENCE * c, which doubles with each failure up to the last one.
# So tries cost a tenth of the time at first and a fortieth in the long run.
PATIENCE, MOST_PATIENCE = 10.0, 40.0
PAUSE = 1.0  # seconds between two tries that cost nothing
RECENT = 1.0  # seconds after which a call says nothing about the next one: the machine may have changed
# A lower count than this share of the one that a try in vain had is reason to try again at once.
WORSE = 0.8


class _Call(NamedTuple):
    wall: float
    share: float
    ended: float


@dataclass
class _Direction:
    """When a next higher or lower count may be tried."""

    due: float = 0.0
    patience: float = PATIENCE
    failures: int = 0

    def wait(self, now: float, cost: float) -> None:
        self.due = now + max(PAUSE, self.patience * cost)

    def failed(self, now: float, cost: float) -> None:
        self.wait(now, cost)
        self.patience = min(MOST_PATIENCE, 2 * self.patience)
        self.failures += 1


@dataclass
class ThreadChoice:
    """Chooses among `most`, half of it, and so on down to one.

    Ask `choose` before each call and tell `took` after it. `kind` is whatever decides a call's cost: only calls of one
    kind are compared, and only if one was made shortly after the other. A lower count is tried for one call after one
    that got too little of its threads' time, a higher one whenever its pause is over. `count` is what has proved best;
    use it for all other work.
    """

    most: int
    count: int = 0
    _calls: dict[Hashable, _Call] = field(default_factory=dict)  # the last one of each kind with `count` threads
    _warm: set[tuple[Hashable, int]] = field(default_factory=set)
    _up: _Direction = field(default_factory=_Direction)
    _down: _Direction = field(default_factory=_Direction)
    _borne: float = 1.0  # the share at which a lower count was tried in vain
    _again: tuple[Hashable, int] | None = None
    _rose: float = float("-inf")

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"there must be at least one thread; received {self.most}")
        self.count = self.most

    def counts(self) -> list[int]:
        """What is chosen among, the most first."""
        counts = [self.most]
        while counts[-1] > 1:
            counts.append(counts[-1] // 2)
        return counts

    def choose(self, kind: Hashable, now: float) -> int:
        """The threads of the next call."""
        before = self._calls.get(kind)
        if before is None or now - before.ended > RECENT:
            return self.count
        if self._again is not None and self._again[0] == kind:
            return self._again[1]
        counts = self.counts()
        place = counts.index(self.count)
        lower = counts[place + 1 :]
        if lower and before.share < ENOUGH and (now >= self._down.due or before.share < WORSE * self._borne):
            # The next lower one may have too few cores, too, so the tries go on to lower ones.
            return lower[self._down.failures % len(lower)]
        if place and now >= self._up.due:
            return counts[place - 1]
        return self.count

    def took(self, kind: Hashable, threads: int, wall: float, cpu: float, now: float) -> None:
        """A call of `kind` with so many threads took `wall` seconds and ended `now`; the process had `cpu` seconds of
        its cores meanwhile, of which other threads than the call's may have used some."""
        cold = (kind, threads) not in self._warm
        self._warm.add((kind, threads))
        share = min(1.0, cpu / (wall * threads)) if wall > 0 else 1.0
        again, self._again = self._again, None
        if threads == self.count:
            self._calls.pop(kind, None)
            if not cold:  # a first call prepares what the later ones find
                self._calls[kind] = _Call(wall, share, now)
            return
        before = self._calls.pop(kind, None)
        if before is None:
            return
        if wall < before.wall * (1 - FASTER):
            self._adopt(threads, before.wall - wall, now)
        elif cold and again is None:
            self._again = kind, threads
            self._calls[kind] = before._replace(ended=now)
        else:
            tried = self._up if threads > self.count else self._down
            tried.failed(now, max(0.0, wall - before.wall))
            if threads < self.count:
                self._borne = before.share

    def _adopt(self, threads: int, gain: float, now: float) -> None:
        if threads > self.count:
            self._rose = now
        else:
            lasted = now - self._rose > MOST_PATIENCE * PAUSE
            self._up.patience = PATIENCE if lasted else min(MOST_PATIENCE, 2 * self._up.patience)
            self._up.wait(now, gain)  # a try upwards would cost now what has just been gained
        self._down = _Direction()
        self._borne = 1.0
        self.count = threads
        self._calls.clear()
