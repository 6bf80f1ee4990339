"""The simulation against queueing theory, a slower one without leaps, the engine's forecast and dstack's autoscaler."""

import datetime
import importlib.util
import math
import random
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from dstack._internal.proxy.gateway.schemas.stats import Stat

from bench.simulate import Cost, Policy, Scaling, called_for, capacity, fleet, mixed, poisson, routes
from sdxl_lab.diffusion.latency import LatencyModel, Workload, forecast

ALONE = Policy(rows=2, queue=10**9)
COST = Cost(call=0.03, row=0.02, image=0.04, beside=0.01)
GUIDED, INTERVAL = ((2, 30),), ((1, 5), (2, 22), (1, 3))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("steps", [(10,), (5, 10, 40)], ids=["M/D/1", "M/G/1"])
def test_one_image_at_a_time_waits_as_pollaczek_and_khinchine_say(load, steps):
    cost = Cost(call=0.1, row=0.0)
    times = np.array(steps) * 0.1
    rate, count = load / times.mean(), 40_000
    expected = rate * (times**2).mean() / (2 * (1 - load))
    out = fleet(poisson(rate, count, 1), mixed(steps, count, 2), cost, ALONE)
    assert out.waits[1000:].mean() == pytest.approx(expected, rel=0.05)
    assert out.busy[0] / out.arrivals[-1] == pytest.approx(load, rel=0.02)


def test_exponential_times_wait_as_m_m_1():
    draw = np.random.default_rng(3)
    works = [((1, 1 + int(calls)),) for calls in draw.exponential(1000, 40_000)]
    out = fleet(poisson(0.5, len(works), 4), works, Cost(call=0.001, row=0.0), Policy(rows=1, queue=10**9))
    assert out.waits[1000:].mean() == pytest.approx(0.5 / 0.5, rel=0.05)


def test_behind_round_robin_arrivals_become_even_and_nobody_waits():
    """Every thousandth arrival of a Poisson stream is nearly a clock's tick: a thousand D/D/1 queues."""
    waits = []
    for replicas in (1, 10, 1000):
        count = 10_000 if replicas < 1000 else 40_000
        out = fleet(poisson(0.8 * replicas, count, 5), [((1, 10),)] * count, Cost(0.1, 0.0), ALONE, [0.0] * replicas)
        waits.append(float(out.waits.mean()))
    assert waits[0] > 5 * waits[1] > 25 * waits[2]
    assert waits[2] < 0.01


def naive(arrivals, works, cost, policy):
    """Every call by itself, with the rows of every call in a list. Ends, NaN where refused."""
    ends, waiting, running, now, upcoming = [math.nan] * len(works), deque(), {}, 0.0, 0
    plans = [[rows for rows, calls in work for _ in range(calls)] for work in works]
    answered = []
    while upcoming < len(works) or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[upcoming])
        while upcoming < len(works) and arrivals[upcoming] <= now:
            if len(waiting) < policy.queue:
                waiting.append(upcoming)
            upcoming += 1
        joined = not (policy.together and running)
        while waiting and joined:
            width = sum(max(plans[index]) for index in [*running, waiting[0]])
            if running and width > policy.rows:
                break
            running[waiting.popleft()] = 0
        live = [index for index in running if running[index] < len(plans[index])]
        now += cost.call + cost.row * sum(plans[index][running[index]] for index in live)
        for index in live:
            running[index] += 1
        answered = [index for index in running if running[index] == len(plans[index])]
        if answered and not (policy.together and len(answered) < len(running)):
            now += cost.image * len(answered)
            for index in answered:
                ends[index] = now + cost.beside
                del running[index]
    return ends


@pytest.mark.parametrize("together", [False, True], ids=["steps", "static batches"])
@pytest.mark.parametrize("load", [0.2, 0.7, 1.3])
def test_leaps_change_nothing(load, together):
    draw = random.Random(6)
    works = [draw.choice([GUIDED, INTERVAL, ((1, 7),), ((2, 12),)]) for _ in range(300)]
    policy = Policy(rows=9, queue=4, together=together)
    arrivals = poisson(load * capacity(GUIDED, COST, policy), len(works), 7)
    out = fleet(arrivals, works, COST, policy)
    np.testing.assert_allclose(out.ends, naive(arrivals.tolist(), works, COST, policy), rtol=1e-9)
    assert out.refused.any() or load < 1


def test_images_that_arrive_at_once_end_when_the_engine_forecasts():
    pace = LatencyModel()
    for rows in range(1, 17):
        pace.took("base", rows, COST.call + COST.row * rows)
        pace.took("decode", rows, COST.image * rows)
    steps = [10, 30, 20, 25, 5, 15, 40, 35, 12, 9, 28, 31]
    loads = [Workload("base", 2, each) for each in steps]
    spans = forecast([], loads, 16, pace)
    out = fleet(np.zeros(len(steps)), [((2, each),) for each in steps], COST, Policy(rows=16))
    np.testing.assert_allclose(out.starts, [span.start for span in spans])
    np.testing.assert_allclose(out.ends, [span.end + COST.beside for span in spans])


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("together", [False, True], ids=["steps", "static batches"])
def test_what_arrived_is_done_refused_or_still_there(replicas, together):
    policy = Policy(rows=8, queue=5, together=together)
    rate = 1.2 * replicas * capacity(INTERVAL, COST, policy)
    out = fleet(poisson(rate, 4000, 8), [INTERVAL] * 4000, COST, policy, [0.0] * replicas)
    assert 0.1 < out.refused.mean() < 0.25
    for moment in np.linspace(0, out.arrivals[-1] + 1, 50):
        arrived = int((out.arrivals <= moment).sum())
        refused = int((out.refused & (out.arrivals <= moment)).sum())
        assert arrived == int((out.ends <= moment).sum()) + refused + out.in_system(moment)
        assert out.in_system(moment) <= replicas * (policy.at_once(INTERVAL) + policy.queue + 1)
    assert out.rows == (~out.refused).sum() * 52
    assert np.ptp(np.bincount(out.replicas)) <= 1


@pytest.mark.parametrize("work", [GUIDED, INTERVAL], ids=["guided", "interval"])
@pytest.mark.parametrize("policy", [Policy(2), Policy(16), Policy(16, together=True)], ids=["one", "steps", "static"])
def test_an_overloaded_replica_draws_as_much_as_its_capacity(policy, work):
    expected = capacity(work, COST, policy)
    out = fleet(poisson(2 * expected, 3000, 9), [work] * 3000, COST, policy)
    done = out.ends[~out.refused]
    assert len(done) / done.max() == pytest.approx(expected, rel=0.02)
    assert out.busy[0] / out.arrivals[-1] > 0.98


def test_a_image_alone_takes_its_own_time():
    out = fleet(np.array([5.0]), [INTERVAL], COST, Policy(16))
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
    given = poisson(9.0, 500, 11), [GUIDED] * 500, COST, Policy(16), [0.0] * 20
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
