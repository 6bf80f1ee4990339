"""The service under load, as a client sees it: a short image among long ones, and `/healthz`."""

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench.clients import post, request
from bench.measure import Report, ratios
from bench.servers import server
from bench.settings import FLOAT32, PROMPTS, Size, body, config_of
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.job import ImageRequest


def latency(size: Size) -> None:
    """An image of 8 steps requested while eight of 50 steps run: seconds until it is done; for the engine also until
    its first step."""
    long, short = size.steps * 5 // 2, max(1, size.steps * 2 // 5)
    config = config_of(size)
    waits: dict[str, list[float]] = {}
    for kind, name in (
        ("locked", "(b) FastAPI, pipeline behind a lock"),
        ("litserve", "(d) LitServe, dynamic batching"),
        ("service", "service"),
    ):
        with server(kind, config) as port:
            waits[name] = [_short_among_long(port, size, long, short) for _ in range(size.rounds)]
    first, ticks = [], []
    with Engine.load(config, FLOAT32) as engine:
        for _ in range(size.rounds):
            running = [engine.submit(ImageRequest(config.with_(steps=long), PROMPTS[0], seed)) for seed in range(8)]
            while running[-1].progress[0] < 3:
                time.sleep(0.01)
            before, began = engine.stats().ticks, time.monotonic()
            steps: list[tuple[float, int]] = []
            stepped = lambda *_, steps=steps: steps.append((time.monotonic(), engine.stats().ticks))  # noqa: E731
            engine.submit(ImageRequest(config.with_(steps=short), PROMPTS[1], 9), on_step=stepped).result()
            first.append(steps[0][0] - began)
            ticks.append(float(steps[0][1] - before))
            for job in running:
                job.cancel()
    b, d = waits["(b) FastAPI, pipeline behind a lock"], waits["(d) LitServe, dynamic batching"]
    lines = {f"{name}: s until done": values for name, values in waits.items()} | {
        "(b) / service": ratios(b, waits["service"]),
        "(d) / service": ratios(d, waits["service"]),
        "engine: s until the first step": first,
        "engine: calls until the first step": ticks,
    }
    Report(
        "latency",
        f"An image of {short} steps among eight of {long}",
        lines,
        f"{size.side} px, float32",
        {"(b) / service": "12", "(d) / service": "5", "engine: calls until the first step": "2"},
    ).show(size.folder)


def _short_among_long(port: int, size: Size, long: int, short: int) -> float:
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(post, port, body(size, long, seed)) for seed in range(8)]
        time.sleep(1.0)
        waited = post(port, body(size, short, 9))
        for each in running:
            each.result()
    return waited


def health(size: Size) -> None:
    """Milliseconds until `/healthz` answers while 16 images are drawn: the service against (c), the pipeline inside
    `async def`. At most a hundred requests a round; a server that blocks gets fewer."""
    config = config_of(size)
    found = {}
    for kind, name in (("inline", "(c) pipeline inside async def"), ("service", "service")):
        with server(kind, config) as port:
            waits = _health_waits(port, size)
            found[f"{name}: median ms"] = [statistics.median(waits)]
            found[f"{name}: p99 ms"] = [float(np.quantile(waits, 0.99, method="higher"))]
    Report(
        "health",
        "/healthz while the server is saturated",
        found,
        f"{size.images} clients, {size.side} px",
        {"service: p99 ms": "50"},
    ).show(size.folder)


def _health_waits(port: int, size: Size) -> list[float]:
    over = threading.Event()

    def ask(seed: int) -> None:
        while not over.is_set():
            post(port, body(size, size.steps, seed))

    with ThreadPoolExecutor(size.images) as pool:
        for seed in range(size.images):
            pool.submit(ask, seed)
        time.sleep(0.5)
        waits: list[float] = []
        ends = time.monotonic() + 5 * size.rounds
        while time.monotonic() < ends and len(waits) < 100 * size.rounds:
            began = time.monotonic()
            request(port, "GET", "/healthz")
            waits.append(1000 * (time.monotonic() - began))
            time.sleep(0.03)
        over.set()
    return waits
