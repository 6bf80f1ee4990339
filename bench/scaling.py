"""One to a thousand replicas, simulated: latency against load, the effect of batching and of the guidance interval, the
autoscaler's target, and the time until a new replica is ready.

Only the results of `fleet` are measured. An H100's costs are computed from `cost.BASE_ROW` and published times.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.cost import BASE_ROW, DECODE, PUBLISHED
from bench.fleet import INTERVAL, left_in, work_of
from bench.measure import RESULTS
from bench.scaling_plot import paint
from bench.servers import ROOT
from bench.settings import Size, config_of
from bench.simulate import SINGLE, STATIC, Cost, Policy, Scaling, Work, called_for, capacity, fleet, mixed, poisson

REPLICAS = (1, 2, 3, 10, 100, 1000)
LOADS = tuple(tenth / 10 for tenth in range(1, 13))
SLOW = 2.0  # times the time of an image alone: a p99 above it means too few replicas
EAGER, COMPILED = PUBLISHED.values()  # seconds of 30 steps
STEPS = 30
RATE = (2 * STEPS * BASE_ROW + DECODE) / COMPILED  # TFLOP/s that an H100 reached
EACH = 60  # images of a replica, at least
STARTUPS = (60, 180, 600)
RUNS = 5  # of the same load step, other moments
AT = 900.0  # when the load steps up

OURS = "shortest"  # the engine's default
# Eager, a call costs 34 ms besides its rows: the rest of the published time. Compiled, it costs almost nothing.
MACHINES = {
    "H100, eager": Cost((EAGER - DECODE / RATE) / STEPS - 2 * BASE_ROW / RATE, BASE_ROW / RATE, DECODE / RATE),
    "H100, compiled": Cost(0.0, BASE_ROW / RATE, DECODE / RATE),
}
POLICIES = {
    "one at a time": SINGLE,
    "static batches": STATIC,
    "first come": Policy("fifo"),
    OURS: Policy(),
}


def point(work: Work, cost: Cost, policy: Policy, rate: float, replicas: int, count: int) -> dict[str, float]:
    """One load: `rate` images a second and replica, at least `count` images in all. `rows` is the share of a full
    call's rows in use."""
    played = min(replicas, math.ceil(count / EACH))
    count = max(count, EACH * replicas)
    moments = poisson(rate * replicas, count, replicas)
    out = fleet(moments, [work] * count, cost, policy, [0.0] * replicas, played)
    settled, horizon = out.settled(), float(moments[-1])
    return {
        "rate": rate,
        "p50": float(np.median(settled)),
        "p99": float(np.quantile(settled, 0.99)),
        "busy": float(out.busy.mean() / horizon),
        "rows": out.rows / max(1, out.calls) / policy.call_rows(work, cost),
        "refused": float(out.refused.mean()),
    }


def target(points: list[dict[str, float]], alone: float) -> float:
    """Images a second and replica at which p99 reaches `SLOW` times the time of one alone, interpolated between loads;
    0 if it is above from the first load."""
    before: dict[str, float] = {"rate": 0.0, "p99": alone}
    for each in points:
        if each["p99"] > SLOW * alone:
            share = (SLOW * alone - before["p99"]) / (each["p99"] - before["p99"])
            return max(0.0, before["rate"] + share * (each["rate"] - before["rate"]))
        before = each
    return before["rate"]


def fleets(cost: Cost, work: Work, count: int) -> dict[str, Any]:
    """Latency against load for every number of replicas, and the resulting target."""
    ours = POLICIES[OURS]
    most, alone = capacity(work, cost, ours), cost.alone(work)
    points = {str(n): [point(work, cost, ours, load * most, n, count) for load in LOADS] for n in REPLICAS}
    return {
        "alone": alone,
        "capacity": most,
        "rows": ours.call_rows(work, cost),
        "points": points,
        "target": {n: target(each, alone) for n, each in points.items()},
    }


def ways(cost: Cost, works: dict[str, Work], count: int) -> dict[str, list[dict[str, float]]]:
    """One replica under each policy, at the same rates, up to 1.2 times the best capacity. Equal images make the orders
    "first come" and "shortest" the same."""
    most = max(capacity(work, cost, policy) for work in works.values() for policy in POLICIES.values())
    told_apart = {name: policy for name, policy in POLICIES.items() if name != "first come"}
    cases = {name: (works["guidance throughout"], policy) for name, policy in told_apart.items()}
    cases[f"{OURS}, interval"] = (works["interval"], POLICIES[OURS])
    return {
        name: [point(work, cost, policy, load * most, 1, count) for load in LOADS]
        for name, (work, policy) in cases.items()
    }


def steps_of_many(cost: Cost, count: int) -> dict[str, dict[str, float]]:
    """One replica at 70 % of its capacity, with images of 10, 30 and 50 steps: seconds by policy."""
    works = mixed((10, 30, 50), count, 1)
    rate = 0.7 * capacity(((2, STEPS),), cost, POLICIES[OURS])
    found = {}
    for name, policy in POLICIES.items():
        out = fleet(poisson(rate, count, 1), works, cost, policy)
        short = np.array([work == ((2, 10),) for work in works])
        short[: count // 10] = False
        settled = out.latencies[short & ~out.refused]
        found[name] = {
            "p50 of 10 steps": float(np.median(settled)),
            "p99 of 10 steps": float(np.quantile(settled, 0.99)),
        }
        found[name] |= {"p99 of all": float(np.quantile(out.settled(), 0.99)), "refused": float(out.refused.mean())}
    return found


def step_up(work: Work, cost: Cost, scaling: Scaling, seed: int) -> dict[str, Any]:
    """The load of one replica goes from 50 to 150 % of its capacity at `AT`; the autoscaler calls for more."""
    most = capacity(work, cost, POLICIES[OURS])
    calm, busy = (poisson(share * most, 20_000, seed + number) for number, share in enumerate((0.5, 1.5)))
    arrivals = np.concatenate([calm[calm < AT], AT + busy[busy < 3 * AT]])
    ready = called_for(arrivals, scaling, scaling.wanted(int(0.5 * most * scaling.window)))
    out = fleet(arrivals, [work] * len(arrivals), cost, POLICIES[OURS], ready)
    after = arrivals >= AT
    slow = ~(out.latencies <= SLOW * cost.alone(work))  # the refused, too
    share = np.convolve(slow, np.ones(50) / 50)[: len(slow)]  # of the last 50
    bad = arrivals[after & (share > 0.5)]
    return {
        "arrivals": arrivals,
        "latencies": out.latencies,
        "ready": [moment - AT for moment in ready],
        "worst": float(np.nanmax(out.latencies[after])),
        "refused": int(out.refused.sum()),
        "slow": int((slow & after).sum()),
        "recovered": float(bad.max() - AT) if len(bad) else 0.0,
    }


def main(size: Size) -> None:
    count = 1250 * size.images
    config = config_of(size, steps=STEPS)
    works: dict[str, Work] = {
        "guidance throughout": work_of(config),
        "interval": work_of(config.with_(guidance_interval=INTERVAL)),
    }
    found: dict[str, Any] = {"fleets": {}, "ways": {}, "mixed": {}, "steps": {}}
    machines = MACHINES | measured(size.folder)
    for name, cost in machines.items():
        for guidance, work in works.items():
            found["fleets"][f"{name}, {guidance}"] = fleets(cost, work, count)
        found["ways"][name] = ways(cost, works, count)
        found["mixed"][name] = steps_of_many(cost, count)
    cost, work = MACHINES["H100, eager"], works["interval"]
    capable, prompt = capacity(work, cost, POLICIES[OURS]), found["fleets"]["H100, eager, interval"]["target"]["3"]
    traces = {}
    cases = [
        (aim, window, 300, startup)
        for aim in (0.7 * capable, prompt)
        for window in (30, 60, 300)
        for startup in STARTUPS
    ]
    for aim, window, delay, startup in [*cases, *((0.7 * capable, 60, 60, startup) for startup in STARTUPS)]:
        scaling = Scaling(aim, window, delay, most=10, startup=startup)
        runs = [step_up(work, cost, scaling, 10 * seed) for seed in range(RUNS)]
        if (aim, window, delay) == (0.7 * capable, 60, 300):
            traces[startup] = runs[0]
        label = f"target {aim:.3f}, window {window} s, scale_up_delay {delay} s, start {startup} s"
        kept = ("worst", "refused", "slow", "recovered", "ready")
        found["steps"][label] = [{key: run[key] for key in kept} for run in runs]
    _show(found)
    size.folder.mkdir(parents=True, exist_ok=True)
    ours = POLICIES[OURS]
    content = {
        "title": "Replicas behind round robin, simulated",
        "conditions": f"{count} images a point, at most {ours.rows} rows a call, queue of {ours.queue}, {STEPS} steps",
        "costs": {name: vars(cost) for name, cost in machines.items()},
        "works": works,
        **found,
    }
    (size.folder / "scaling.json").write_text(json.dumps(_rounded(content)) + "\n")
    path = ROOT / "docs" / "fleet.png" if size.folder == RESULTS else size.folder / "scaling.png"
    paint(path, found, traces, left_in(size.folder))


def measured(folder: Path) -> dict[str, Cost]:
    values = left_in(folder)
    parts = [values[f"fitted: ms {name}"][0] / 1000 for name in ("call", "row", "image", "beside")] if values else []
    return {"nano, one core": Cost(*parts)} if values else {}


def _rounded(value: Any) -> Any:
    """Round to four digits, since more are noise."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def _show(found: dict[str, Any]) -> None:
    say: Callable[..., None] = print
    say("\nReplicas behind round robin, simulated: images a second and replica")
    heads = "".join(f"{f'N={n}':>9}" for n in REPLICAS)
    say(f"{'p99 passes twice the time alone at':44}{'alone, s':>9}{'capacity':>9}{heads}")
    for name, each in found["fleets"].items():
        targets = "".join(f"{value:9.3f}" for value in each["target"].values())
        say(f"{name:44}{each['alone']:9.3f}{each['capacity']:9.3f}{targets}")
    say(f"\n{'one replica, p50 / p99 s at images a second':44}")
    for machine, policies in found["ways"].items():
        for name, points in policies.items():
            cells = "  ".join(f"{p['rate']:.2f}: {p['p50']:.1f}/{p['p99']:.1f}" for p in points[1::2])
            say(f"{machine}, {name:20} {cells}")
    say("\nmixed steps (10, 30, 50) at 70 %")
    for machine, policies in found["mixed"].items():
        for name, each in policies.items():
            say(f"{machine}, {name:20} " + "  ".join(f"{key} {value:.3g}" for key, value in each.items()))
    say("\n50 to 150 % of one replica, medians of the runs")
    for name, runs in found["steps"].items():
        middles = {
            key: float(np.median([run[key] for run in runs])) for key in ("worst", "refused", "slow", "recovered")
        }
        say(f"{name:66} " + "  ".join(f"{key} {value:.4g}" for key, value in middles.items()), runs[0]["ready"])
