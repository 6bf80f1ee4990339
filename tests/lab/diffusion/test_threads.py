"""The choice of threads, played on simulated machines."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_lab.diffusion.threads import MOST_PATIENCE, PATIENCE, PAUSE, ThreadChoice

GUIDED = ("base", 32, 32), 2


@dataclass
class Machine:
    """Cores, busy neighbours by the time, and calls of `work` seconds on one core of which `serial` cannot be shared.

    Threads without a core of their own make every wait long, as was measured: a call with two threads beside one
    neighbour takes `stall` times as long as with one. `noise` is the largest deviation of a call's time.
    """

    cores: int = 2
    work: float = 0.07
    serial: float = 0.35
    stall: float = 5.0
    noise: float = 0.0
    busy: Callable[[float], int] = lambda now: 0
    seed: int = 0
    now: float = 0.0
    calls: list[tuple[float, int, float]] = field(default_factory=list)  # when, threads, seconds

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def seconds(self, threads: int, neighbours: int) -> tuple[float, float]:
        """Wall and CPU seconds of a call, without noise."""
        if threads + neighbours <= self.cores:
            return (wall := self.work * (self.serial + (1 - self.serial) / threads)), wall * threads
        share = self.cores / (threads + neighbours)
        wall = self.work * (self.serial + (1 - self.serial) / threads) / share
        if threads > 1 and wall < self.work * self.stall:
            wall, share = self.work * self.stall, min(share, 0.6)  # who waits for long sleeps
        return wall, wall * threads * share

    def best(self, neighbours: int) -> int:
        return min(range(1, self.cores + 1), key=lambda threads: self.seconds(threads, neighbours)[0])

    def play(self, choice: ThreadChoice, until: float, pause: float = 0.001) -> None:
        """Calls one after the other."""
        while self.now < until:
            threads = choice.choose(GUIDED, self.now)
            wall, cpu = self.seconds(threads, self.busy(self.now))
            factor = 1 + self.random.uniform(-self.noise, self.noise)
            self.now += wall * factor
            choice.took(GUIDED, threads, wall * factor, cpu * factor, self.now)
            self.calls.append((self.now, threads, wall * factor))
            self.now += pause

    def between(self, start: float, end: float) -> list[int]:
        return [threads for when, threads, _ in self.calls if start <= when < end]


def test_a_quiet_machine_has_all_threads_in_every_call():
    machine = Machine()
    machine.play(ThreadChoice(2), 60)
    assert set(machine.between(0, 60)) == {2}


def test_one_neighbour_is_seen_after_one_warm_call_and_one_thread_taken():
    machine = Machine(busy=lambda now: 1 if now > 10 else 0)
    choice = ThreadChoice(2)
    machine.play(choice, 13)
    slow = [threads for when, threads, _ in machine.calls if when > 10.05]
    assert slow[:2] == [2, 1]
    assert set(slow[1:]) == {1}
    assert choice.count == 1


def test_beside_a_neighbour_from_the_start_two_calls_are_slow():
    machine = Machine(busy=lambda now: 1)
    machine.play(ThreadChoice(2), 3)
    assert machine.between(0, 3)[:3] == [2, 2, 1]  # the first one is cold and says nothing
    assert set(machine.between(0, 3)[2:]) == {1}


@pytest.mark.parametrize("stayed", [1, 5, 30, 300])
def test_when_the_neighbour_goes_all_threads_are_back_within_the_longest_pause(stayed):
    machine = Machine(busy=lambda now: 1 if 10 < now < 10 + stayed else 0)
    cost = machine.seconds(2, 1)[0] - machine.seconds(1, 1)[0]
    machine.play(ThreadChoice(2), 400)
    back = 10 + stayed + MOST_PATIENCE * cost + 1
    assert set(machine.between(back, 400)) == {2}
    if stayed == 1:
        assert set(machine.between(11 + PATIENCE * cost + 1, 400)) == {2}


@pytest.mark.parametrize("neighbours", [1, 2])
def test_tries_beside_a_neighbour_cost_a_fortieth_of_the_time_in_the_long_run(neighbours):
    machine = Machine(busy=lambda now: neighbours)
    machine.play(ThreadChoice(2), 600)
    best = machine.seconds(1, neighbours)[0]
    lost = [(when, took - best) for when, _, took in machine.calls if took > best]
    assert sum(cost for when, cost in lost if when > 100) <= 500 / MOST_PATIENCE
    assert sum(cost for when, cost in lost if 1 < when < 60) <= 59 / PATIENCE
    assert len(lost) > 10  # tries do go on


def test_a_call_whose_threads_mostly_sleep_keeps_them_if_fewer_are_no_faster():
    """64 threads on a quiet machine and a model that cannot fill them: the share says nothing then."""
    choice, now, tried = ThreadChoice(64), 0.0, []
    for _ in range(2000):
        threads = choice.choose(GUIDED, now)
        tried.append(threads)
        wall = 0.05 if threads == 64 else 0.06
        now += wall
        choice.took(GUIDED, threads, wall, 0.4 * wall * threads, now)
    assert choice.count == 64
    assert 0 < (len(tried) - tried.count(64)) * 0.01 <= now / PATIENCE


def test_a_neighbour_is_noticed_at_once_where_a_lower_share_was_borne():
    choice, now = ThreadChoice(4), 0.0
    for _ in range(50):
        threads = choice.choose(GUIDED, now)
        now += 0.05 if threads == 4 else 5.0  # the try fails, and its pause is long
        choice.took(GUIDED, threads, 0.05 if threads == 4 else 5.0, 0.7 * 0.05 * 4, now)
    assert choice.choose(GUIDED, now) == 4
    choice.took(GUIDED, 4, 0.4, 0.25 * 0.4 * 4, now + 0.4)
    assert choice.choose(GUIDED, now + 0.4) < 4


def test_the_tries_go_on_below_a_count_that_has_too_few_cores_as_well():
    """Beside six neighbours on eight cores a call is as slow with four threads as with eight; two have their cores."""
    machine = Machine(cores=8, busy=lambda now: 6, stall=4)
    choice = ThreadChoice(8)
    assert choice.counts() == [8, 4, 2, 1]
    assert machine.seconds(4, 6)[0] == machine.seconds(8, 6)[0]
    machine.play(choice, 20)
    assert choice.count == 2


def test_calls_of_other_kinds_are_not_compared():
    choice = ThreadChoice(2)
    for kind in ("cold", "cold", "one", "two", "three"):
        threads = choice.choose(kind, 0)
        choice.took(kind, threads, 0.4, 0.4, 0)
    assert choice.choose("four", 0) == 2
    assert choice.choose("cold", 0) == 1


def test_a_call_long_ago_is_no_measure():
    choice = ThreadChoice(2)
    for _ in range(2):
        choice.took("kind", 2, 0.4, 0.4, 0)
    assert choice.choose("kind", 0.5) == 1
    assert choice.choose("kind", 5) == 2


def test_a_cold_try_is_made_again_before_it_is_judged():
    choice = ThreadChoice(2)
    for _ in range(2):
        choice.took("kind", 2, 0.4, 0.4, 0)
    choice.took("kind", choice.choose("kind", 0), 0.5, 0.5, 0)  # slow because it is the first with one thread
    assert choice.choose("kind", 0) == 1
    choice.took("kind", 1, 0.1, 0.1, 0)
    assert choice.count == 1


def test_where_single_calls_vary_by_more_than_the_counts_differ_the_better_count_is_mostly_taken():
    """As beside two neighbours, where a call with one thread took 0.07 to 0.19 s, with two 0.08 to 0.26 s."""
    shares = []
    for seed in range(200):
        pick, choice, now, alone = random.Random(seed), ThreadChoice(2), 0.0, 0
        for _ in range(300):
            threads = choice.choose(GUIDED, now)
            wall = (0.1 if threads == 1 else 0.135) * pick.uniform(0.4, 1.6)
            now += wall
            choice.took(GUIDED, threads, wall, wall * (0.65 if threads == 1 else 1.1), now)
            alone += threads == 1
        shares.append(alone / 300)
    assert sorted(shares)[20] > 0.85  # with one call of either count it would be 0.83, and the least 0.72
    assert min(shares) > 0.75


def test_on_a_quiet_machine_a_small_gain_is_reason_enough_for_more_threads():
    """As for two rows, where a second thread takes a tenth of the time away; a moment's neighbour had taken it."""
    choice, now = ThreadChoice(2), 0.0
    for number in range(400):
        threads = choice.choose(GUIDED, now)
        wall = 0.4 if number == 20 else 0.062 if threads == 2 else 0.067
        now += wall
        choice.took(GUIDED, threads, wall, wall if number == 20 else 0.93 * wall * threads, now)
        if number == 22:
            assert threads == 1
    assert choice.count == 2


def test_cpu_time_of_others_in_the_process_counts_as_the_calls_own():
    choice = ThreadChoice(2)
    for _ in range(3):
        assert choice.choose("kind", 0) == 2
        choice.took("kind", 2, 0.1, 0.9, 0)


def test_one_core_has_nothing_to_choose():
    machine = Machine(cores=1, busy=lambda now: 3)
    machine.play(ThreadChoice(1), 10)
    assert set(machine.between(0, 10)) == {1}


def test_no_thread_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one thread; received 0"):
        ThreadChoice(0)


MACHINES = st.builds(
    Machine,
    cores=st.sampled_from([1, 2, 4, 6, 16]),
    work=st.floats(0.02, 2),
    serial=st.floats(0, 0.5),
    stall=st.floats(1.5, 8),
    noise=st.floats(0, 0.3),
    seed=st.integers(0, 1000),
)


@settings(deadline=None, max_examples=60)
@given(MACHINES, st.integers(0, 4))
def test_no_machine_is_left_with_a_much_slower_count_than_it_could_have(machine, neighbours):
    """The mean of many calls against the best fixed count, whatever the noise."""
    machine.busy = lambda now: min(neighbours, machine.cores)
    choice = ThreadChoice(machine.cores)
    machine.play(choice, 400 * machine.work)
    walls = {threads: machine.seconds(threads, machine.busy(0))[0] for threads in choice.counts()}
    settled = [took for when, _, took in machine.calls if when > 200 * machine.work]
    mean = sum(settled) / len(settled)
    assert mean <= 1.3 * min(walls.values())


@settings(deadline=None, max_examples=40)
@given(MACHINES, st.lists(st.tuples(st.integers(0, 3), st.floats(1, 40)), max_size=8))
def test_whatever_comes_and_goes_the_count_rises_at_most_once_a_second(machine, days):
    ends = list(itertools.accumulate(seconds for _, seconds in days))
    machine.busy = lambda now: next((days[i][0] for i, end in enumerate(ends) if now < end), 0)
    choice = ThreadChoice(machine.cores)
    machine.play(choice, 120)
    tries = [
        when
        for (when, threads, _), (_, before, _) in zip(machine.calls[1:], machine.calls, strict=False)
        if threads > before
    ]
    ups = [b - a for a, b in itertools.pairwise(tries)]
    assert len(ups) <= 2 * 120 / PAUSE
    assert all(threads in choice.counts() for _, threads, _ in machine.calls)
