"""How many threads the next call has.

Arithmetic only: what calls took goes in, a count comes out. It has no thread, no clock and no torch.

OpenMP's threads wait for one another some hundred times in a UNet call. Where all of them have a core, more of them
are faster. Beside a busy process they are not: each wait lasts until the scheduler runs the thread that is waited for.
On two cores and beside one such process a call of two rows takes 0.4 s with two threads and 0.07 s with one; on a quiet
machine it is 0.05 s and 0.07 s. No fixed count is right, so the count is measured, again and again.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import mean

# A call that got less of its threads' time than this shared its cores with others, or its threads slept.
ENOUGH = 0.8
# Single calls vary by a third and more beside busy processes. So up to CALLS calls of either count are compared, and
# the other count is kept if it takes less time by the share FASTER. A try is over at once where its first calls are
# CLEAR times as fast or as slow.
CALLS, FASTER, CLEAR = 3, 0.1, 1.5
# A try that cost c seconds is followed by a pause of PATIENCE * c, which doubles with each failure up to the last one.
# So tries cost a tenth of the time at first and a fortieth in the long run.
PATIENCE, MOST_PATIENCE = 10.0, 40.0
PAUSE = 1.0  # seconds between two tries that cost nothing
RECENT = 1.0  # seconds after which a call says nothing about the next one: the machine may have changed
# A call that gets so much less of its threads' time than it got when a try was in vain is reason to try again at once.
WORSE = 0.8


@dataclass
class _Calls:
    """The last calls of one kind with one count of threads."""

    walls: deque[float] = field(default_factory=lambda: deque(maxlen=CALLS))
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=CALLS))  # of their threads' time that they got
    ended: float = 0.0

    def took(self, wall: float, share: float, ended: float) -> None:
        self.walls.append(wall)
        self.shares.append(share)
        self.ended = ended

    def recent(self, now: float) -> bool:
        return bool(self.walls) and now - self.ended <= RECENT


@dataclass
class _Try:
    """Calls of a kind with another count, against those before them."""

    kind: Hashable
    threads: int
    before: _Calls
    calls: _Calls = field(default_factory=_Calls)
    cost: float = 0.0  # seconds by which its calls were slower


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
    kind are compared, and only if they were made shortly after one another. A lower count is tried after a call that
    got too little of its threads' time, a higher one whenever its pause is over. `count` is what has proved best; use
    it for all other work.
    """

    most: int
    count: int = 0
    _calls: dict[Hashable, _Calls] = field(default_factory=dict)  # with `count` threads
    _warm: set[tuple[Hashable, int]] = field(default_factory=set)
    _try: _Try | None = None
    _up: _Direction = field(default_factory=_Direction)
    _down: _Direction = field(default_factory=_Direction)
    _borne: float = 1.0  # the share at which a lower count was tried in vain
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
        if self._try is not None:
            if now - max(self._try.before.ended, self._try.calls.ended) > RECENT:
                self._try = None
            else:
                return self._try.threads if kind == self._try.kind else self.count
        before = self._calls.get(kind)
        if before is not None and before.recent(now):
            threads = self._candidate(before, now)
            if threads != self.count:
                self._try = _Try(kind, threads, before)
                return threads
        return self.count

    def _candidate(self, before: _Calls, now: float) -> int:
        """The count that is worth a try after such calls, or the present one."""
        counts = self.counts()
        place = counts.index(self.count)
        lower, share = counts[place + 1 :], before.shares[-1]
        if lower and share < ENOUGH and (now >= self._down.due or share < WORSE * self._borne):
            # The next lower one may have too few cores, too, so the tries go on to lower ones.
            return lower[self._down.failures % len(lower)]
        return counts[place - 1] if place and now >= self._up.due else self.count

    def took(self, kind: Hashable, threads: int, wall: float, cpu: float, now: float) -> None:
        """A call of `kind` with so many threads took `wall` seconds and ended `now`; the process had `cpu` seconds of
        its cores meanwhile, of which other threads than the call's may have used some."""
        cold = (kind, threads) not in self._warm
        self._warm.add((kind, threads))
        share = min(1.0, cpu / (wall * threads)) if wall > 0 else 1.0
        if self._try is not None and (kind, threads) == (self._try.kind, self._try.threads):
            self._tried(self._try, wall, share, now, cold)
        elif threads == self.count and not cold:  # a first call prepares what the later ones find
            calls = self._calls.get(kind)
            if calls is None or not calls.recent(now - wall):
                calls = self._calls[kind] = _Calls()
            calls.took(wall, share, now)

    def _tried(self, tried: _Try, wall: float, share: float, now: float, cold: bool) -> None:
        """A call of a try is over, and perhaps the try."""
        usual = mean(tried.before.walls)
        tried.cost += max(0.0, wall - usual)
        tried.calls.took(wall, share, now)
        ratio = mean(tried.calls.walls) / usual
        if ratio < 1 / CLEAR:
            self._adopt(tried, now)
        elif cold:
            tried.calls = _Calls(ended=now)
        elif ratio > CLEAR or len(tried.calls.walls) == CALLS:
            rises = tried.threads > self.count
            # More threads that all had their time are worth any gain. Were it a mistake, their share would show it.
            if ratio < (1.0 if rises and mean(tried.calls.shares) >= ENOUGH else 1 - FASTER):
                self._adopt(tried, now)
            else:
                self._try = None
                self._calls.pop(tried.kind)
                (self._up if rises else self._down).failed(now, tried.cost)
                if not rises:
                    self._borne = tried.before.shares[-1]

    def _adopt(self, tried: _Try, now: float) -> None:
        if tried.threads > self.count:
            self._rose = now
        else:
            lasted = now - self._rose > MOST_PATIENCE * PAUSE
            self._up.patience = PATIENCE if lasted else min(MOST_PATIENCE, 2 * self._up.patience)
            # A try upwards would cost now what has just been gained.
            self._up.wait(now, tried.before.walls[-1] - mean(tried.calls.walls))
        self._down = _Direction()
        self._borne = 1.0
        self.count = tried.threads
        self._calls.clear()
        self._try = None
