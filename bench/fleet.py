"""One, two and three replicas of the service behind round robin on two cores, measured and simulated.

Every replica is a process with its own core as far as there are cores. The costs for `simulate.py` are fitted from the
UNet calls that a replica counts (`/metrics`). Then images are requested at random moments, and their times are compared
with a simulation of the same moments.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from bench.clients import metrics, post, rate
from bench.measure import Report, alternate, ratios
from bench.servers import server
from bench.settings import Size, body, config_of
from bench.simulate import SINGLE, Cost, Policy, Work, capacity, fleet, poisson
from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.denoising import DenoiserName, Trajectory
from sdxl_lab.diffusion.models import Denoiser, load
from sdxl_lab.diffusion.prompts import Embedding, Prompt
from sdxl_lab.job import ImageRequest

OURS = Policy()  # as the service comes
INTERVAL = (0.28, 5.42)
LOADS = (0.3, 0.6, 0.85)
AT_ONCE = (1, 2, 4, 8)


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Processes started by this thread stay on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def replica(config: GenerationConfig, cores: Sequence[int], threads: int, rows: int = OURS.rows) -> Iterator[int]:
    """The service on these cores, with calls of at most `rows` rows; yields its port."""
    with ExitStack() as stack:
        with pinned(cores):
            environment = {"SDXL_MAX_ROWS": str(rows), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            port = stack.enter_context(server("service", config, **environment))
        yield port


def work_of(config: GenerationConfig) -> Work:
    """The rows of each of an image's UNet calls, from the engine's own trajectory."""
    models = load(config.model, RuntimeProfile(device="cpu"))

    def embed(name: DenoiserName, prompt: Prompt) -> Embedding:
        denoiser: Denoiser = getattr(models, name)
        return denoiser.embed(prompt)

    trajectory = Trajectory(models, ImageRequest(config, "a red circle", 0), embed)
    rows = [guidance.rows for stage in trajectory.stages for guidance in stage.guidance]
    return tuple((count, len(list(run))) for count, run in itertools.groupby(rows))


def ticks(port: int) -> np.ndarray:
    """UNet calls, their rows and their seconds, as the service counts them."""
    return np.array(metrics(port, "sdxl_tick_seconds_count", "sdxl_tick_rows_sum", "sdxl_tick_seconds_sum"))


def calibrate(port: int, size: Size, costs: dict[int, list[tuple[float, ...]]]) -> float:
    """Draw a few images at once, for each of `AT_ONCE`, and add the costs to `costs`."""
    for count in AT_ONCE:
        before, began = ticks(port), time.monotonic()
        rate([port], [body(size, size.steps, seed) for seed in range(count)])
        took = time.monotonic() - began
        calls, rows, seconds = ticks(port) - before
        costs.setdefault(count, []).append((rows / calls, seconds / calls, took - seconds))
    return sum(len(each) for each in costs.values())


def fit_costs(costs: dict[int, list[tuple[float, ...]]]) -> Cost:
    """Lines through the medians: seconds of a call by rows, and seconds of a batch outside its calls by images. Slopes
    and intercepts are at least zero."""
    middles = {count: np.median(np.array(seen), axis=0) for count, seen in costs.items()}
    row, call = np.polyfit([m[0] for m in middles.values()], [m[1] for m in middles.values()], 1)
    image, beside = np.polyfit(list(middles), [m[2] for m in middles.values()], 1)
    return Cost(*(max(0.0, float(value)) for value in (call, row, image, beside)))


def ask_at(ports: Sequence[int], moments: np.ndarray, size: Size) -> np.ndarray:
    """Seconds of each image, from the moment at which it was due, round robin."""
    began = time.monotonic() + 0.1

    def ask(index: int) -> float:
        post(ports[index % len(ports)], body(size, size.steps, index))
        return time.monotonic() - began - float(moments[index])

    with ThreadPoolExecutor(100) as pool:
        answers = []
        for index, moment in enumerate(moments):
            time.sleep(max(0.0, began + float(moment) - time.monotonic()))
            answers.append(pool.submit(ask, index))
        return np.array([each.result() for each in answers])


def main(size: Size) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("\nfleet: not measured, since replicas need separate cores and this process may use only one")
        return
    config = config_of(size)
    guided, sparing = work_of(config), work_of(config.with_(guidance_interval=INTERVAL))
    loads_before = os.getloadavg()
    with ExitStack() as stack:
        start = lambda *given, **more: stack.enter_context(replica(*given, **more))  # noqa: E731
        first, second = (start(config, [core], 1) for core in cores)
        third, threaded = start(config, cores, 1), start(config, cores, 2)
        interval = start(config.with_(guidance_interval=INTERVAL), cores[:1], 1)
        single = start(config, cores[:1], 1, rows=2)
        bodies = [body(size, size.steps, seed) for seed in range(2 * size.images)]
        measurements = {
            "1 replica, 1 thread on 1 core": [first],
            "1 replica, 2 threads on 2 cores": [threaded],
            "2 replicas, a thread and a core each": [first, second],
            "3 replicas, a thread each, on 2 cores": [first, second, third],
            "1 replica, 1 core, guidance for sigma 0.28 to 5.42": [interval],
            "1 replica, 1 core, one image at a time": [single],
        }
        costs: dict[int, list[tuple[float, ...]]] = {}
        rates = alternate(
            {"": lambda: calibrate(first, size, costs)}
            | {name: (lambda ports=ports: rate(ports, bodies)) for name, ports in measurements.items()},
            size.rounds,
        )
        del rates[""]
        costs = {count: seen[1:] for count, seen in costs.items()}
        cost = fit_costs(costs)
        ended = against(rates, cost, guided, sparing, len(bodies))
        felt: dict[str, list[float]] = {}
        for replicas in (1, 2):
            felt |= predicted_latencies([first, second][:replicas], size, cost, guided)
    loads = "; ".join(", ".join(f"{each:.1f}" for each in load) for load in (loads_before, os.getloadavg()))
    show(size, {"fleet": ended, "fleet-costs": calibration(costs, cost), "fleet-latency": felt}, loads)


TITLES = {
    "fleet": "Replicas of the service at saturation, measured and simulated",
    "fleet-costs": "Costs of a replica on one core",
    "fleet-latency": "Images requested at random moments, and a simulation of the same moments",
}


def show(size: Size, parts: dict[str, dict[str, list[float]]], loads: str) -> None:
    """A report for each of `TITLES`."""
    conditions = (
        f"{2 * size.images} images at once or {3 * size.images} at random moments, {size.steps} steps, "
        f"{size.side} px; load of the machine before and after (1, 5, 15 min): {loads}"
    )
    for name, lines in parts.items():
        Report(name, TITLES[name], lines, conditions, {"2 replicas / 1": "2"}).show(size.folder)


def left_in(folder: Path) -> dict[str, list[float]]:
    """The results of this benchmark, if there are any."""
    values: dict[str, list[float]] = {}
    for name in TITLES:
        path = folder / f"{name}.json"
        values |= json.loads(path.read_text())["values"] if path.exists() else {}
    return values


def calibration(costs: dict[int, list[tuple[float, ...]]], cost: Cost) -> dict[str, list[float]]:
    lines = {f"{count} at once: ms a call": [1000 * seconds for _, seconds, _ in seen] for count, seen in costs.items()}
    lines |= {f"{count} at once: rows a call": [rows for rows, _, _ in seen] for count, seen in costs.items()}
    named = {"call": cost.call, "row": cost.row, "image": cost.image, "beside": cost.beside}
    return lines | {f"fitted: ms {name}": [1000 * value] for name, value in named.items()}


def against(
    rates: dict[str, list[float]], cost: Cost, guided: Work, sparing: Work, count: int
) -> dict[str, list[float]]:
    """Images a second at saturation, the gain from more replicas, and a simulation of the same images at once."""
    one, threads, two, three, interval, single = rates.values()
    lines = {f"{name}: images a second": values for name, values in rates.items()}
    lines |= {
        "2 replicas / 1": ratios(two, one),
        "3 replicas / 1": ratios(three, one),
        "2 replicas / 1 with 2 threads": ratios(two, threads),
        "batching: shared calls / one image at a time": ratios(one, single),
        "interval / guidance throughout": ratios(interval, one),
    }
    for name, measured, work, policy in (
        ("shared calls", one, guided, OURS),
        ("interval", interval, sparing, OURS),
        ("one image at a time", single, guided, SINGLE),
    ):
        ends = fleet(np.zeros(count), [work] * count, cost, policy).ends
        lines[f"saturation, {name}: predicted / measured"] = [count / float(ends.max()) / each for each in measured]
    return lines


def predicted_latencies(ports: Sequence[int], size: Size, cost: Cost, work: Work) -> dict[str, list[float]]:
    """Seconds until the image for arrivals at random moments, measured and simulated."""
    most = len(ports) * capacity(work, cost, OURS)
    lines: dict[str, list[float]] = {}
    seen: dict[str, list[np.ndarray]] = {"measured": [], "predicted": []}
    for number in range(size.rounds):
        for share in LOADS:
            moments = poisson(share * most, 3 * size.images, 100 * number + int(100 * share))
            both = {
                "measured": ask_at(ports, moments, size),
                "predicted": fleet(moments, [work] * len(moments), cost, OURS, [0.0] * len(ports)).latencies,
            }
            name = f"{len(ports)} replica{'s' * (len(ports) > 1)}, {100 * share:.0f} %"
            for kind, found in both.items():
                seen[kind].append(found)
                lines.setdefault(f"{name}: p50 s {kind}", []).append(float(np.median(found)))
                lines.setdefault(f"{name}: p95 s {kind}", []).append(float(np.quantile(found, 0.95)))
            ratio = float(np.mean(both["predicted"]) / np.mean(both["measured"]))
            lines.setdefault(f"{name}: mean predicted / measured", []).append(ratio)
    measured, predicted = (np.concatenate(each) for each in seen.values())
    whole = f"random moments, {len(ports)} replica{'s' * (len(ports) > 1)}: predicted / measured, all loads"
    return lines | {whole: [statistics.median(predicted) / statistics.median(measured)]}
