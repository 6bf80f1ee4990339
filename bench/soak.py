"""The service at saturation with badly behaved clients: does it lose, double, leak or forget anything?

Everything is observed over HTTP: memory from `/metrics`, images from the answers and from `/images`.
"""

import http.client
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.clients import metrics, request
from bench.measure import Report, plot
from bench.servers import server
from bench.settings import PROMPTS, Size, config_of, varied_body
from sdxl_lab.research.plots import COLOURS

MINUTES = 1.0
CLIENTS = 24
QUEUE = 12  # fewer than the clients, so that some requests are refused
WARM = 0.1  # of the time, after which memory must not grow
OVER = ("done", "failed", "cancelled")


class Violation(Exception):
    """The service did not do what it promises."""


@dataclass
class Ledger:
    """The answers to all clients. `outcomes` counts calls; the rest are image ids."""

    outcomes: Counter[str] = field(default_factory=Counter)
    done: set[str] = field(default_factory=set)
    unsettled: set[str] = field(default_factory=set)  # accepted, and the client left before its end
    by_key: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1

    def acknowledge(self, image: str, outcome: str, key: str | None = None) -> None:
        """Record an acknowledged image, under an id of its own or under that of its key."""
        with self.lock:
            self.outcomes[outcome] += 1
            if key is None:
                if image in self.done:
                    self.wrong.append(f"two answers have the id {image}")
            elif self.by_key.setdefault(key, image) != image:
                self.wrong.append(f"the key {key} stands for {image} and {self.by_key[key]}")
            self.done.add(image)


class Client:
    """A client that sends requests until the end, each in one of the `WAYS`."""

    def __init__(self, port: int, size: Size, ledger: Ledger, number: int) -> None:
        self.port, self.size, self.ledger = port, size, ledger
        self.random = random.Random(number)
        self.behave: list[Callable[[], None]] = [getattr(self, name) for name in WAYS]

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                self.random.choices(self.behave, list(WAYS.values()))[0]()
            except Violation as error:
                with self.ledger.lock:
                    self.ledger.wrong.append(str(error))
            except (OSError, http.client.HTTPException) as error:
                with self.ledger.lock:
                    self.ledger.wrong.append(f"no answer: {error!r}")

    def body(self) -> dict[str, Any]:
        return varied_body(self.random, self.size) | {"width": self.size.side * self.random.choice([1, 1, 2])}

    def ask(
        self, path: str, body: dict[str, Any] | None = None, method: str = "POST", **headers: str
    ) -> tuple[int, Any]:
        """Status and content. After a 429 it waits for a moment."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        status, content, answered = request(self.port, method, path, body, named)
        if status == 429:
            if int(answered["Retry-After"]) < 1:
                raise Violation("429 with a Retry-After below a second")
            self.ledger.count("refused: 429")
            time.sleep(self.random.uniform(0.05, 0.5))
        elif status >= 500:
            raise Violation(f"{method} {path}: {status} {content[:300]!r}")
        return status, json.loads(content) if content else None

    # --- the ways ----------------------------------------------------------------------------------------------------

    def plain(self) -> None:
        status, answer = self.ask("/generate", self.body())
        if status == 200:
            self.ledger.acknowledge(answer["id"], "done")

    def openai(self) -> None:
        content = {"prompt": self.random.choice(PROMPTS), "n": 2, "response_format": "url", "quality": "low"}
        status, answer = self.ask("/v1/images/generations", content)
        if status == 200:
            for image in answer["data"]:
                self.ledger.acknowledge(image["url"].rpartition("/")[2], "done: one of two")

    def repeat(self) -> None:
        """The same request under the same key, by several clients, at once or later."""
        key = f"key-{self.random.randrange(max(3, len(self.ledger.by_key) + 3))}"
        body = {"prompt": PROMPTS[0], "steps": 1 + len(key) % 4, "width": self.size.side, "height": self.size.side}
        status, answer = self.ask("/generate", body, Idempotency_Key=key)
        if status == 200:
            again = key in self.ledger.by_key
            self.ledger.acknowledge(answer["id"], "done: repeated" if again else "done: with a key", key)

    def later(self) -> None:
        status, answer = self.ask("/generate", self.body(), Prefer="respond-async")
        if status == 202:
            self._wait(answer["id"], "done: later")

    def cancel(self) -> None:
        status, answer = self.ask("/generate", self.body(), Prefer="respond-async")
        if status != 202:
            return
        image = answer["id"]
        time.sleep(self.random.expovariate(4))
        status, _ = self.ask(f"/jobs/{image}", method="DELETE")
        if status not in (204, 409):
            raise Violation(f"DELETE /jobs/{image}: {status}")
        state = self._wait(image, "done: too early to cancel")
        if (state == "done") != (status == 409):
            raise Violation(f"DELETE /jobs/{image} answered {status}, but the image is {state}")

    def _wait(self, image: str, outcome: str) -> str:
        while True:
            status, info = self.ask(f"/images/{image}", method="GET")
            if status != 200:
                raise Violation(f"GET /images/{image}, which was accepted: {status}")
            if info["state"] in OVER:
                if info["state"] == "done":
                    self.ledger.acknowledge(image, outcome)
                else:
                    self.ledger.count(info["state"])
                return str(info["state"])
            time.sleep(0.2)

    def listen(self) -> None:
        """Follow the events to the end."""
        with self._stream() as stream:
            events = list(_events(stream))
        if not events:
            return
        if events[-1][0] != "done":
            raise Violation(f"a stream ended with {events[-1]}")
        if events[0][1]["id"] != events[-1][1]["id"]:
            raise Violation("a stream began with one image and ended with another")
        self.ledger.acknowledge(events[-1][1]["id"], "done: listened to")

    def leave(self) -> None:
        """Leave after an event or two."""
        with self._stream() as stream:
            events = _events(stream)
            first = next(events, None)
            if first is None:
                return
            if self.random.random() < 0.5:
                next(events, None)
        self.ledger.count("left")
        with self.ledger.lock:
            self.ledger.unsettled.add(first[1]["id"])

    def _stream(self) -> socket.socket:
        content = json.dumps(self.body()).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=300)
        head = "POST /generate HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        sock.sendall(head.encode() + content)
        return sock


WAYS = {"plain": 8, "openai": 2, "repeat": 3, "later": 2, "cancel": 2, "listen": 2, "leave": 3}


def _events(sock: socket.socket) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each event; nothing if the service refused."""
    name = ""
    with sock.makefile("rb") as lines:
        if b" 200 " not in lines.readline():
            return
        for line in lines:
            kind, _, value = line.decode().strip().partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                yield name, json.loads(value)


@dataclass
class Monitor:
    """The service's memory in MiB and the milliseconds until `/healthz` answered, by minute."""

    port: int
    memory: list[tuple[float, float]] = field(default_factory=list)
    health: list[tuple[float, float]] = field(default_factory=list)

    def run(self, until: float, over: threading.Event) -> None:
        began, looks = time.monotonic(), 0
        while not over.is_set() and time.monotonic() < until:
            sent = time.monotonic()
            request(self.port, "GET", "/healthz", timeout=60)
            answered = time.monotonic()
            self.health.append(((sent - began) / 60, 1000 * (answered - sent)))
            if looks % 5 == 0:
                (used,) = metrics(self.port, "process_resident_memory_bytes")
                self.memory.append(((sent - began) / 60, used / 2**20))
            looks += 1
            time.sleep(0.2)

    def at(self, minute: float) -> float:
        """MiB at the look nearest to a minute."""
        return min(self.memory, key=lambda look: abs(look[0] - minute))[1]

    def growth(self) -> float:
        """The growth of the median memory from the first half after the warm-up to the second."""
        warm = [mib for minute, mib in self.memory if minute >= WARM * self.memory[-1][0]]
        half = len(warm) // 2
        return statistics.median(warm[half:]) / statistics.median(warm[:half] or warm) - 1


def soak(size: Size) -> None:
    """`--minutes` at saturation, with 24 clients that request, repeat, cancel, listen and leave at random. Prints the
    outcomes of all images, and last the violations, if any."""
    config = config_of(size)
    ledger = Ledger()
    over = threading.Event()
    with server("service", config, SDXL_MAX_QUEUE=str(QUEUE)) as port:
        before = set(listed(port))
        until = time.monotonic() + 60 * (size.minutes or MINUTES)
        monitor = Monitor(port)
        watching = threading.Thread(target=monitor.run, args=(until, over))
        clients = [Client(port, size, ledger, number) for number in range(CLIENTS)]
        asking = [threading.Thread(target=client.run, args=(until,)) for client in clients]
        for thread in (watching, *asking):
            thread.start()
        for thread in asking:
            thread.join()
        over.set()
        watching.join()
        _settle(port)
        figures = reconcile(port, ledger, before)
    _report(size, ledger, monitor, figures)


def _settle(port: int) -> None:
    """Wait until the queue is empty and nothing is drawn."""
    ends = time.monotonic() + 60
    while any(metrics(port, "sdxl_queue_depth", "sdxl_images_running")):
        if time.monotonic() > ends:
            raise RuntimeError("images are still drawn although no client is left")
        time.sleep(0.1)
    time.sleep(1)  # the last ones are being stored


def listed(port: int) -> Iterator[str]:
    """Every stored image, page by page."""
    cursor = ""
    while True:
        page = request(port, "GET", f"/images?limit=100{cursor}").json()
        yield from (image["id"] for image in page["images"])
        if "next" not in page:
            return
        cursor = f"&cursor={page['next']}"


def reconcile(port: int, ledger: Ledger, before: Set[str] = frozenset()) -> dict[str, float]:
    """Compare the ledger with the service's images, without those from `before`. Differences go to `ledger.wrong`."""
    stored = list(listed(port))
    images = set(stored) - before
    lost = ledger.done - images
    strangers = images - ledger.done - ledger.unsettled - set(ledger.by_key.values())
    ledger.wrong += [f"{image} was acknowledged and is not listed" for image in lost]
    ledger.wrong += [f"{image} is stored and was never requested" for image in strangers]
    ledger.wrong += [f"{image} is listed {times} times" for image, times in Counter(stored).items() if times > 1]
    for image in random.Random(0).sample(sorted(ledger.done - lost), min(50, len(ledger.done - lost))):
        if not request(port, "GET", f"/download/{image}").content.startswith(b"\x89PNG"):
            ledger.wrong.append(f"{image} cannot be downloaded")
    left = ledger.unsettled - images
    for image in left:
        info = request(port, "GET", f"/images/{image}").json()
        if info.get("state") != "cancelled" and info.get("status") != 404:  # the oldest are forgotten
            ledger.wrong.append(f"{image} was left, and is {info.get('state', info)}")
    return {
        "acknowledged images": len(ledger.done),
        "acknowledged and lost": len(lost),
        "stored and never requested": len(strangers),
        "left by their client and cancelled": len(left),
        "left by their client and stored": len(ledger.unsettled & images),
    }


def _report(size: Size, ledger: Ledger, monitor: Monitor, figures: dict[str, float]) -> None:
    waits = [wait for _, wait in monitor.health]
    minutes = size.minutes or MINUTES
    lines: dict[str, float] = {
        **{f"calls, {outcome}": count for outcome, count in sorted(ledger.outcomes.items())},
        **figures,
        **{f"MiB after {part * minutes:.3g} min": round(monitor.at(part * minutes)) for part in (0.1, 0.5, 1)},
        "growth of memory after the warm-up": round(monitor.growth(), 4),
        "/healthz, median ms": round(statistics.median(waits), 2),
        "/healthz, p99 ms": round(float(np.quantile(waits, 0.99, method="higher")), 2),
        "things that went wrong": len(ledger.wrong),
    }
    title = f"{minutes:g} minutes at saturation"
    conditions = f"{CLIENTS} clients, {Path(size.model).name}, {size.side} px, up to {size.steps} steps"
    memory = [[round(minute, 3), round(mib, 1)] for minute, mib in monitor.memory]
    values = {label: [value] for label, value in lines.items()}
    Report("soak", title, values, conditions, wrong=ledger.wrong, more={"memory": memory}).write(size.folder)
    with plot(size.folder / "soak.png", f"{title}: {conditions}", (9, 5), rows=2) as (above, below):
        above.plot(*zip(*monitor.memory, strict=True), color=COLOURS[0])
        above.set(ylabel="memory, MiB", ylim=(0, None))
        below.plot(*zip(*monitor.health, strict=True), ".", markersize=3, color=COLOURS[0])
        below.set(ylabel="/healthz, ms", xlabel="minutes", yscale="log")
