"""The batcher as arithmetic: property tests over random workloads, and the order it promises."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_lab.diffusion.batching import STRETCH, THRIFT, Batcher, Part
from sdxl_lab.diffusion.latency import Group, LatencyModel

ROWS = (1, 2, 4, 8, 16, 32)
BASE, REFINER = Group("base", 32, 32), Group("refiner", 32, 32)


def model(call: float = 0.01, row: float = 0.01, decode: float = 0.0) -> LatencyModel:
    """Calls of a fixed cost and a cost a row."""
    latency = LatencyModel()
    for group in (BASE, REFINER):
        for rows in ROWS:
            latency.took(group, rows, call + row * rows)
    for images in range(1, 33):
        latency.took(BASE.decode, images, decode * images)
    return latency


@dataclass
class Played:
    """A batcher run to its end over arrivals (second, key, work, priority)."""

    batcher: Batcher
    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[tuple[str, ...], int]] = field(default_factory=list)

    def run(self, arrivals: Iterable[tuple[float, str, tuple[Part, ...], int]], now: float = 0.0) -> "Played":
        left = sorted(arrivals)
        while left or len(self.batcher):
            if not len(self.batcher):
                now = max(now, left[0][0])
            while left and left[0][0] <= now:
                moment, key, work, priority = left.pop(0)
                self.batcher.add(key, work, moment, priority)
            now = self.step(now)
        return self

    def step(self, now: float) -> float:
        plan = self.batcher.plan(now)
        for key in plan.start:
            self.batcher.started(key)
            self.starts[key] = now
        self.calls.append((plan.call, plan.rows))
        now += self.batcher.latency.seconds(plan.group, plan.rows)
        done = self.batcher.called(plan.call)
        now += self.batcher.latency.seconds(plan.group.decode, len(done)) if done else 0.0
        for key in done:
            self.batcher.remove(key)
            self.ends[key] = now
        return now


parts = st.builds(Part, st.sampled_from([BASE, REFINER]), st.integers(1, 2), st.integers(1, 30))
works = st.lists(parts, min_size=1, max_size=2).map(tuple)
arrivals = st.lists(st.tuples(st.floats(0, 5), works, st.integers(-1, 1)), min_size=1, max_size=25)


def named(drawn) -> list:
    return [(moment, f"image {index}", work, priority) for index, (moment, work, priority) in enumerate(drawn)]


@settings(deadline=None, max_examples=60)
@given(arrivals, st.integers(2, 16), st.integers(1, 8), st.sampled_from(["shortest", "fifo"]))
def test_every_image_has_all_of_its_calls_and_no_call_is_too_large(drawn, max_rows, max_active, order):
    batcher = Batcher(model(), max_rows=max_rows, max_active=max_active, order=order)
    played = Played(batcher).run(named(drawn))
    assert set(played.ends) == {key for _, key, *_ in named(drawn)}
    had = dict.fromkeys(played.ends, 0)
    for keys, rows in played.calls:
        assert keys, "work is conserved: while somebody waits there is a call"
        assert rows <= max_rows
        assert len(set(keys)) == len(keys)
        for key in keys:
            had[key] += 1
    assert had == {key: sum(part.calls for part in work) for _, key, work, _ in named(drawn)}


@settings(deadline=None, max_examples=40)
@given(arrivals, st.integers(1, 6))
def test_no_more_images_are_under_way_than_memory_has_room_for(drawn, max_active):
    batcher = Batcher(model(), max_rows=16, max_active=max_active)
    played = Played(batcher)
    for moment, key, work, priority in named(drawn):
        batcher.add(key, work, moment, priority)
    now = 5.0
    while len(batcher):
        now = played.step(now)
        assert len(batcher.active) <= max_active


@settings(deadline=None, max_examples=40)
@given(arrivals, st.sampled_from(["shortest", "fifo"]))
def test_the_forecast_of_a_fixed_workload_is_what_the_batcher_then_does(drawn, order):
    batcher = Batcher(model(decode=0.02), max_rows=8, max_active=6, order=order, exploring=False)
    for moment, key, work, priority in named(drawn):
        batcher.add(key, work, moment, priority)
    forecast = batcher.forecast(5.0)
    played = Played(batcher)
    now = 5.0
    while len(batcher):
        now = played.step(now)
    assert {key: each.end for key, each in forecast.items()} == pytest.approx(
        {key: end - 5 for key, end in played.ends.items()}
    )
    assert {key: each.start for key, each in forecast.items()} == pytest.approx(
        {key: start - 5 for key, start in played.starts.items()}
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 20), min_size=2, max_size=30), st.integers(1, 40))
def test_equal_images_are_started_and_done_in_the_order_in_which_they_arrived(moments, calls):
    ordered = [(moment, f"image {i:02}", (Part(BASE, 2, calls),), 0) for i, moment in enumerate(sorted(moments))]
    played = Played(Batcher(model(), max_rows=8, exploring=False)).run(ordered)
    ends = [played.ends[key] for _, key, *_ in ordered]
    assert ends == sorted(ends)


@pytest.mark.parametrize("load", [0.5, 0.9])
def test_nobody_waits_much_longer_than_the_stated_multiple_of_first_come_first_served(load):
    draw = random.Random(4)
    now, coming = 0.0, []
    for index in range(600):
        calls = draw.choice((5, 15, 60))
        now += draw.expovariate(load / 0.8)
        coming.append((now, f"{index}", (Part(BASE, 1, calls),), 0))
    price = model(call=0.0, row=0.03)
    fifo = Played(Batcher(price, max_rows=1, order="fifo")).run(coming)
    shortest = Played(Batcher(price, max_rows=1)).run(coming)
    for moment, key, work, _ in coming:
        own = sum(part.calls for part in work) * 0.03
        # who falls due finishes behind the others that are due: the bound has some slack of its own
        assert shortest.ends[key] - moment <= 1.5 * STRETCH * max(fifo.ends[key] - moment, own)


def test_a_crowd_of_higher_priority_does_not_starve_an_image():
    batcher = Batcher(model(), max_rows=2)
    batcher.add("patient", (Part(BASE, 2, 10),), 0.0)
    played, now = Played(batcher), 0.0
    for index in range(2000):
        batcher.add(index, (Part(BASE, 2, 2),), now, priority=1)
        now = played.step(now)
        if "patient" in played.ends:
            break
    assert "patient" in played.ends


def test_a_cancelled_image_frees_its_rows_at_the_next_call():
    batcher = Batcher(model(), max_rows=2)
    batcher.add("long", (Part(BASE, 2, 50),), 0.0)
    Played(batcher).step(0.0)
    batcher.add("next", (Part(BASE, 2, 60),), 0.1)
    assert batcher.plan(0.2).call == ("long",)
    batcher.remove("long")
    assert batcher.plan(0.2).call == ("next",)


def test_a_call_is_filled_by_images_of_one_size():
    batcher = Batcher(model(), max_rows=8, exploring=False)
    filled = []
    for index, group in enumerate([BASE, BASE, REFINER, REFINER, BASE, BASE]):
        batcher.add(index, (Part(group, 2, 5),), 0.0)
        filled.append(batcher.filled)
    assert filled == [False] * 5 + [True]
    batcher.remove(0)
    assert not batcher.filled


def test_an_image_alone_shares_no_call():
    batcher = Batcher(model(), max_rows=8, exploring=False)
    for index in range(6):
        batcher.add(index, (Part(BASE, 2, 3),), 0.0, alone=index in (0, 3))
    played = Played(batcher)
    now = 0.0
    while len(batcher):
        now = played.step(now)
    assert {keys for keys, _ in played.calls} == {(0,), (3,), (1, 2, 4, 5)}


def test_a_short_image_passes_the_long_ones():
    batcher = Batcher(model(), max_rows=8, exploring=False)
    played, now = Played(batcher), 0.0
    for index in range(8):
        batcher.add(f"long {index}", (Part(BASE, 2, 50),), 0.0)
    for _ in range(5):
        now = played.step(now)
    batcher.add("short", (Part(BASE, 2, 8),), now)
    arrived = now
    while "short" not in played.ends:
        now = played.step(now)
    assert played.ends["short"] - arrived <= 8 * batcher.latency.seconds(BASE, 8) + 1e-9


ROW_COSTS = [
    ("AVX-512: a call of 8 is best", {2: 0.030, 8: 0.0904, 16: 0.2, 32: 0.467}, 8),
    ("AVX2: a call of 16 is cheaper by enough", {2: 0.050, 8: 0.120, 16: 0.224, 32: 0.448}, 16),
    ("a GPU that one guided image fills", {2: 0.100, 4: 0.2, 8: 0.4}, 2),
    ("a fixed cost a call: the most", {2: 0.034, 8: 0.034, 16: 0.034, 32: 0.034}, 32),
]


@pytest.mark.parametrize(("name", "seconds", "expected"), ROW_COSTS, ids=[name for name, *_ in ROW_COSTS])
def test_the_rows_of_a_call_are_chosen_by_measurement(name, seconds, expected):
    latency = LatencyModel()
    for rows, each in seconds.items():
        latency.took(BASE, rows, each)
    batcher = Batcher(latency, max_rows=64)
    assert batcher.rows_of(BASE) == expected
    worth = {rows: THRIFT * each * 64 / rows + each for rows, each in seconds.items()}
    assert worth[expected] == min(worth.values())


def test_few_rows_share_a_small_call_and_many_a_cheap_one():
    latency = LatencyModel()
    for rows in (2, 4, 6, 8, 10, 16, 32):
        latency.took(BASE, rows, 0.034 + 0.0245 * rows)  # an eager UNet on a GPU
    batcher = Batcher(latency, max_rows=32)
    chosen = [batcher.rows_of(BASE, there) for there in (2, 4, 8, 16, 32, 64, 256)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (2, 32)
    for there in (16, 256):
        several = Batcher(latency, max_rows=32, exploring=False)
        for key in range(there // 2):
            several.add(key, [Part(BASE, 2, 10)], 0.0)
        assert several.plan(0.0).rows == several.rows_of(BASE, there) < there


def test_what_a_call_leaves_behind_is_counted():
    latency = LatencyModel()
    for rows, each in ((8, 0.026), (16, 0.021), (24, 0.0170), (32, 0.0172)):  # seconds a row
        latency.took(BASE, rows, rows * each)
    batcher = Batcher(latency, max_rows=32)
    assert batcher.rows_of(BASE, 32) == 32, "and not 24, after which 8 are left that cost half as much again"
    assert batcher.rows_of(BASE, 24) == 24


def test_the_forecast_of_a_long_queue_is_close_and_quick():
    batcher = Batcher(model(), max_rows=8, exploring=False)
    draw = random.Random(2)
    for index in range(300):
        batcher.add(index, (Part(BASE, 2, draw.choice((8, 25, 50))),), 0.0)
    forecast = batcher.forecast(0.0)
    played, now = Played(batcher), 0.0
    while len(batcher):
        now = played.step(now)
    for key, each in forecast.items():
        assert each.end == pytest.approx(played.ends[key], rel=0.05, abs=1.0)


def test_images_that_came_before_anything_was_measured_are_forecast_afterwards():
    batcher = Batcher(LatencyModel(), max_rows=2, exploring=False)
    for priority in (0, 1):
        batcher.add(priority, (Part(BASE, 2, 10),), 0.0, priority)
    batcher.latency = model()
    batcher.measured()
    forecast = batcher.forecast(1.0)
    seconds = batcher.latency.seconds(BASE, 2)
    assert [forecast[each].end for each in (1, 0)] == pytest.approx([10 * seconds, 20 * seconds])


@pytest.mark.parametrize("work", [(), (Part(BASE, 2, 0),), (Part(BASE, 0, 3),)])
def test_work_without_a_call_is_refused(work):
    with pytest.raises(ValueError, match="at least one call of at least one row"):
        Batcher(model()).add("a", work, 0.0)


def test_row_counts_of_which_nothing_is_known_are_tried_before_one_is_chosen():
    seconds = {2: 0.05, 4: 0.07, 8: 0.12, 16: 0.5}
    batcher = Batcher(LatencyModel(), max_rows=16)
    for index in range(16):
        batcher.add(index, (Part(BASE, 2, 100),), 0.0)
    sizes = []
    for _ in range(20):
        plan = batcher.plan(0.0)
        for key in plan.start:
            batcher.started(key)
        sizes.append(plan.rows)
        batcher.latency.took(BASE, plan.rows, seconds[plan.rows])
        batcher.measured()
        batcher.called(plan.call)
    assert sizes == [2] * 3 + [4] * 3 + [8] * 3 + [16] * 3 + [8] * 8
