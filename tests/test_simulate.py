"""The simulation against queueing theory, a slower one without leaps, the batcher's forecast, its own bound, and
dstack's autoscaler."""

import datetime
import importlib.util
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dstack._internal.proxy.gateway.schemas.stats import Stat
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.queueing import bound
from bench.simulate import (
    GROUP,
    SINGLE,
    STATIC,
    Cost,
    Policy,
    Scaling,
    called_for,
    capacity,
    fleet,
    mixed,
    poisson,
    routes,
)
from sdxl_lab.diffusion import batching
from sdxl_lab.diffusion.batching import STRETCH, Part

ALONE = replace(SINGLE, queue=10**9)
SHORTEST = Policy(queue=10**9)
COST = Cost(call=0.03, row=0.02, image=0.04, beside=0.01)
COMPILED = Cost(call=0.0, row=0.02)  # any call costs the same a row: the batcher takes one image a call
GUIDED, INTERVAL = ((2, 30),), ((1, 5), (2, 22), (1, 3))
POLICIES = {"shortest": Policy(queue=4), "fifo": Policy("fifo", queue=4), "static": replace(STATIC, queue=4)}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("steps", [(10,), (5, 10, 40)], ids=["M/D/1", "M/G/1"])
def test_one_image_at_a_time_waits_as_pollaczek_and_khinchine_say(load, steps):
    cost = Cost(call=0.1, row=0.0)
    times = np.array(steps) * 0.1
    rate, count = load / times.mean(), 30_000
    expected = rate * (times**2).mean() / (2 * (1 - load))
    out = fleet(poisson(rate, count, 1), mixed(steps, count, 2), cost, ALONE)
    assert out.waits[1000:].mean() == pytest.approx(expected, rel=0.05)
    assert out.busy[0] / out.arrivals[-1] == pytest.approx(load, rel=0.02)


def test_exponential_times_wait_as_m_m_1():
    draw = np.random.default_rng(3)
    works = [((1, 1 + int(calls)),) for calls in draw.exponential(1000, 40_000)]
    out = fleet(poisson(0.5, len(works), 4), works, Cost(call=0.001, row=0.0), ALONE)
    assert out.waits[1000:].mean() == pytest.approx(0.5 / 0.5, rel=0.05)


def test_behind_round_robin_arrivals_become_even_and_nobody_waits():
    """Every thousandth arrival of a Poisson stream is nearly a clock's tick: a thousand D/D/1 queues."""
    waits = []
    for replicas in (1, 10, 1000):
        count = 5_000 if replicas < 1000 else 20_000
        out = fleet(poisson(0.8 * replicas, count, 5), [((1, 10),)] * count, Cost(0.1, 0.0), ALONE, [0.0] * replicas)
        waits.append(float(out.waits.mean()))
    assert waits[0] > 5 * waits[1] > 25 * waits[2]
    assert waits[2] < 0.01


def naive(arrivals, works, cost, policy):
    """Every call by itself: the batcher, or a static batch, is asked before each. Ends, NaN where refused."""
    ends, now, upcoming, waiting, batch = [math.nan] * len(works), 0.0, 0, [], {}
    calls = [[rows for rows, count in work for _ in range(count)] for work in works]
    batcher = policy.batcher(cost)
    while upcoming < len(works) or waiting or batch or len(batcher):
        if not (waiting or batch or len(batcher)):
            now = max(now, arrivals[upcoming])
        while upcoming < len(works) and arrivals[upcoming] <= now:
            if len(waiting if policy.together else batcher.waiting) < policy.queue:
                waiting.append(upcoming)
                if not policy.together:
                    batcher.add(upcoming, [Part(GROUP, *part) for part in works[waiting.pop()]], arrivals[upcoming])
            upcoming += 1
        if policy.together:
            while not batch and waiting:
                taken = waiting[: max(1, sum(np.cumsum([max(calls[index]) for index in waiting]) <= policy.rows))]
                batch, waiting = dict.fromkeys(taken, 0), waiting[len(taken) :]
            live = [index for index in batch if batch[index] < len(calls[index])]
            now += cost.call + cost.row * sum(calls[index][batch[index]] for index in live)
            batch.update({index: batch[index] + 1 for index in live})
            done = list(batch) if all(batch[index] == len(calls[index]) for index in batch) else []
        else:
            plan = batcher.plan(now)
            for index in plan.start:
                batcher.started(index)
            now += cost.call + cost.row * plan.rows
            done = batcher.called(plan.call)
        now += cost.image * len(done)
        for index in done:
            ends[index] = now + cost.beside
            batch.pop(index, None)
            batcher.remove(index)
    return ends


@each_policy
@pytest.mark.parametrize("cost", [COST, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("load", [0.2, 0.7, 1.3])
def test_leaps_change_nothing(load, cost, policy, monkeypatch):
    monkeypatch.setattr(batching, "STRETCH", math.pi)  # with a whole one, images fall due exactly when a call ends
    draw = random.Random(6)
    works = [draw.choice([GUIDED, INTERVAL, ((1, 7),), ((2, 12),), ((2, 80),)]) for _ in range(300)]
    arrivals = poisson(load * capacity(GUIDED, cost, policy), len(works), 7)
    out = fleet(arrivals, works, cost, policy)
    np.testing.assert_allclose(out.ends, naive(arrivals.tolist(), works, cost, policy), rtol=1e-9)
    assert out.refused.any() or load < 1


@pytest.mark.parametrize("policy", [Policy(), Policy("fifo"), SINGLE], ids=["shortest", "fifo", "one at a time"])
@pytest.mark.parametrize("call", [COST, COMPILED], ids=["eager", "compiled"])
def test_images_that_arrive_at_once_start_and_end_when_the_batcher_forecasts(call, policy):
    steps = [10, 30, 20, 25, 5, 15, 40, 35, 12, 9, 28, 31]
    batcher = policy.batcher(call)
    for images in range(1, 17):
        batcher.latency.took(GROUP.decode, images, call.image * images)
    for index, each in enumerate(steps):
        batcher.add(index, [Part(GROUP, 2, each)], 0.0)
    spans = batcher.forecast(0.0)
    out = fleet(np.zeros(len(steps)), [((2, each),) for each in steps], call, policy)
    np.testing.assert_allclose(out.starts, [spans[index].start for index in range(len(steps))])
    np.testing.assert_allclose(out.ends, [spans[index].end + call.beside for index in range(len(steps))])


@pytest.mark.parametrize("replicas", [1, 3])
@each_policy
def test_what_arrived_is_done_refused_or_still_there(replicas, policy):
    rate = 1.2 * replicas * capacity(INTERVAL, COST, policy)
    out = fleet(poisson(rate, 4000, 8), [INTERVAL] * 4000, COST, policy, [0.0] * replicas)
    assert 0.1 < out.refused.mean() < 0.3
    for moment in np.linspace(0, out.arrivals[-1] + 1, 50):
        arrived = int((out.arrivals <= moment).sum())
        refused = int((out.refused & (out.arrivals <= moment)).sum())
        assert arrived == int((out.ends <= moment).sum()) + refused + out.in_system(moment)
    assert out.rows == (~out.refused).sum() * 52
    assert np.ptp(np.bincount(out.replicas)) <= 1


@each_policy
def test_an_image_is_refused_only_while_the_queue_is_full(policy):
    out = fleet(poisson(3 * capacity(GUIDED, COST, policy), 500, 10), [GUIDED] * 500, COST, policy)
    assert 0.5 < out.refused.mean() < 0.8
    for index, moment in enumerate(out.arrivals):
        before = out.arrivals < moment
        assert ((before & (out.starts >= moment)).sum() >= policy.queue) == out.refused[index]


@pytest.mark.parametrize("work", [GUIDED, INTERVAL], ids=["guided", "interval"])
@pytest.mark.parametrize("cost", [COST, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "policy", [SINGLE, Policy(), Policy("fifo"), STATIC], ids=["one", "shortest", "fifo", "static"]
)
def test_an_overloaded_replica_draws_as_much_as_its_capacity(policy, cost, work):
    expected = capacity(work, cost, policy)
    out = fleet(poisson(2 * expected, 2000, 9), [work] * 2000, cost, policy)
    done = out.ends[~out.refused]
    assert len(done) / done.max() == pytest.approx(expected, rel=0.02)
    assert out.busy[0] / out.arrivals[-1] > 0.98


def test_rows_are_chosen_by_their_cost():
    assert Policy().call_rows(GUIDED, COMPILED) == SINGLE.call_rows(GUIDED, COST) == 2
    assert Policy().call_rows(GUIDED, COST) == 32
    assert Policy(rows=16).call_rows(GUIDED, COST) == 16
    out = fleet(np.zeros(40), [GUIDED] * 40, COMPILED, Policy())
    assert out.rows / out.calls == 2


def test_where_a_call_holds_one_image_equal_ones_are_drawn_one_after_the_other():
    moments = poisson(0.85 * capacity(GUIDED, COMPILED, ALONE), 2000, 12)
    shortest, alone = (fleet(moments, [GUIDED] * 2000, COMPILED, policy) for policy in (SHORTEST, ALONE))
    np.testing.assert_allclose(shortest.ends, alone.ends)


arrival = st.tuples(st.floats(0, 3), st.integers(1, 60))


@settings(deadline=None, max_examples=150)
@given(st.lists(arrival, min_size=1, max_size=60))
def test_no_image_takes_longer_than_its_bound(drawn):
    gaps, calls = zip(*drawn, strict=True)
    check_bound(np.cumsum(gaps), [((2, each),) for each in calls])


def check_bound(moments, works):
    """No image takes longer. Returns the most that one took, as a multiple of first come, first served."""
    first = fleet(moments, works, COMPILED, ALONE).latencies
    ours = fleet(moments, works, COMPILED, SHORTEST).latencies
    assert (ours <= bound(first, works, COMPILED) + 1e-6).all()
    return float((ours / first).max())


def test_the_bound_is_nearly_reached_by_images_that_fall_due_together():
    """A crowd, then arrivals at a rate that lets them all fall due at one moment, then a crowd of short ones that keeps
    the replica from them until then."""
    long, short = ((2, 25),), ((2, 1),)
    crowd, own = 30, COMPILED.alone(long)
    due = STRETCH * crowd * own
    until = 0.7 * due
    later = np.arange(0, until, own / (1 - 1 / STRETCH))
    burst = np.full(int((due - until) / COMPILED.alone(short)), until)
    moments = np.concatenate([np.zeros(crowd), later, burst])
    works = [long] * (crowd + len(later)) + [short] * len(burst)
    assert STRETCH + 0.5 < check_bound(moments, works) < STRETCH + 1


def test_many_images_are_simulated_in_moments():
    """10,000 of 30 steps, half of them with a full queue: call by call that takes several times as long."""
    began = time.process_time()
    for load in (0.7, 2.0):
        fleet(poisson(load * capacity(GUIDED, COST, Policy()), 5_000, 13), [GUIDED] * 5_000, COST, Policy())
    assert time.process_time() - began < 10


def test_an_image_alone_takes_its_own_time():
    out = fleet(np.array([5.0]), [INTERVAL], COST, Policy())
    assert out.latencies[0] == pytest.approx(COST.alone(INTERVAL)) == pytest.approx(30 * 0.03 + 52 * 0.02 + 0.05)


def test_a_replica_gets_its_share_once_it_is_ready():
    assert routes(np.arange(8.0), [0.0, 4.0]).tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="ready for the first arrival"):
        routes(np.arange(3.0), [1.0])


def dstacks_own():
    """The module alone: the package around it wants a database."""
    folder = importlib.util.find_spec("dstack").submodule_search_locations[0]
    path = Path(folder, "_internal", "server", "services", "services", "autoscalers.py")
    spec = importlib.util.spec_from_file_location("autoscalers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_some_of_many_replicas_fare_as_they_do_among_all():
    given = poisson(9.0, 500, 11), [GUIDED] * 500, COST, Policy(), [0.0] * 20
    every, some = fleet(*given), fleet(*given, played=3)
    np.testing.assert_array_equal(some.ends, every.ends[every.replicas < 3])
    assert len(some.ends) == 75
    assert some.busy.tolist() == every.busy[:3].tolist()


def test_the_wanted_replicas_are_those_of_dstack():
    scalers = dstacks_own()
    for target in (0.1, 0.37, 2.0):
        scaling = Scaling(target, window=60, most=20)
        theirs = scalers.RPSAutoscaler(1, 20, target, 60, 300, 600)
        for requests in range(0, 500, 7):
            stats = {60: Stat(requests=requests, request_time=1.0)}
            assert scaling.wanted(requests) == theirs.get_desired_count(1, stats, None)
    moment = datetime.datetime.now(datetime.UTC)
    assert theirs.get_desired_count(1, {60: Stat(requests=999, request_time=1.0)}, moment) == 1  # within the delay


def test_replicas_are_called_for_by_a_window_that_is_not_yet_full_and_then_not_within_the_delay():
    arrivals = np.concatenate([np.arange(0, 100, 1.0), np.arange(100, 1000, 0.25)])  # 1 a second, then 4
    scaling = Scaling(target=1.5, window=60, up_delay=300, startup=100, look=15)
    # At 120 s the window holds 2 a second: one more, not the two that 4 a second need.
    assert called_for(arrivals, scaling) == [0.0, 220.0, 520.0]
