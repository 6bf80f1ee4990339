"""Three replicas are killed and the store goes away: is every image drawn once, as if nothing had happened?

Half of the clients wait for their image, the other half request it asynchronously and poll. Every request has an
idempotency key; a client that gets no answer, a 5xx or a 429 repeats it. Meanwhile replicas are killed (SIGKILL, one
time in four SIGTERM) and started again, and the store is unreachable twice for five seconds: once it stalls, once the
link is cut. This happens at shares of the images done, from a seeded generator, so that fast and slow machines meet the
same trouble. At the end every image is compared with the one that an engine draws alone.
"""

import http.client
import itertools
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.clients import metrics, request
from bench.cluster import Cluster, Replica, cluster
from bench.measure import Report, plot
from bench.settings import FLOAT32, Size, config_of, varied_body
from bench.soak import OVER, Ledger, reconcile
from sdxl_lab.config import GenerationConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.images import max_difference, open_image
from sdxl_lab.job import ImageRequest
from sdxl_lab.research.plots import COLOURS

SEED = 6
CLIENTS = 8
STRIKES = 6  # images to a kill
OUTAGE = 5.0  # seconds
WAIT = 300.0  # seconds in which an image has to be done


@dataclass
class Timeline:
    """The events of a run, in seconds since its start."""

    began: float = field(default_factory=time.monotonic)
    done: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    strikes: list[tuple[float, str]] = field(default_factory=list)
    interrupted: int = 0  # images being drawn on a replica as it was hit
    outages: list[tuple[float, float]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def now(self) -> float:
        return time.monotonic() - self.began

    def drawn(self, wait: float) -> None:
        with self.changed:
            self.done.append(self.now())
            self.waits.append(wait)
            self.changed.notify_all()

    def wait_for(self, images: int) -> None:
        """Wait until so many are done."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.done) >= images)


class Clients:
    """One client for each image, with a key and a body of its own, that repeats until it has an answer."""

    def __init__(self, ports: list[int], size: Size, timeline: Timeline) -> None:
        self.timeline, self.ledger = timeline, Ledger()
        self._ports = itertools.cycle(ports)
        pick = random.Random(SEED)
        self.bodies = {f"image-{n}": varied_body(pick, size, max(1, size.steps // 2)) for n in range(size.images)}

    def run(self) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(self._draw, self.bodies))

    def _draw(self, key: str) -> None:
        began = time.monotonic()
        later = int(key.rpartition("-")[2]) % 2 == 1
        try:
            image = self._accepted(key, later, began + WAIT)
            if later:
                self._await(image, began + WAIT)
                again = self._accepted(key, later, began + WAIT)  # once more, as a client that has forgotten
                if again != image:
                    raise RuntimeError(f"the key {key} gave {image}, then {again}")
            self.ledger.acknowledge(image, "accepted, then done" if later else "done", key)
        except RuntimeError as error:
            with self.ledger.lock:
                self.ledger.wrong.append(str(error))
        self.timeline.drawn(time.monotonic() - began)

    def _accepted(self, key: str, later: bool, until: float) -> str:
        headers = {"Idempotency-Key": key} | ({"Prefer": "respond-async"} if later else {})
        status, answer = self._ask("POST", "/generate", until, self.bodies[key], headers)
        if status not in (200, 202):
            raise RuntimeError(f"{key}: {status} {answer}")
        return str(answer["id"])

    def _await(self, image: str, until: float) -> None:
        while True:
            status, answer = self._ask("GET", f"/images/{image}", until)
            state = answer.get("state", answer)
            if status != 200 or (state in OVER and state != "done"):
                raise RuntimeError(f"{image}, which was accepted, is {status} {state}")
            if state == "done":
                return
            time.sleep(0.3)

    def _ask(
        self, method: str, path: str, until: float, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Repeat until there is a final answer."""
        while time.monotonic() < until:
            try:
                answer = request(next(self._ports), method, path, body, headers, timeout=60)
            except (OSError, http.client.HTTPException) as error:
                self.ledger.count(f"repeated: {type(error).__name__}")
            else:
                if answer.status < 500 and answer.status != 429:
                    return answer.status, answer.json()
                self.ledger.count(f"repeated: {answer.status}")
            time.sleep(0.5)
        raise RuntimeError(f"{method} {path}: no final answer in {WAIT:g} s")


def strikes(images: int) -> list[tuple[int, signal.Signals]]:
    """After how many images a replica is stopped, and by which signal."""
    pick = random.Random(SEED)
    count = max(1, images // STRIKES)
    after = [1, *sorted(pick.randint(2, int(0.9 * images)) for _ in range(count - 1))]
    return [(done, signal.SIGTERM if number % 4 == 3 else signal.SIGKILL) for number, done in enumerate(after)]


def strike(running: Cluster, size: Size, timeline: Timeline) -> None:
    """Stop replicas: in turns the one that draws most at the moment, and any one at a random moment."""
    pick = random.Random(SEED)
    for number, (images, kind) in enumerate(strikes(size.images)):
        timeline.wait_for(images)
        if number % 2:
            time.sleep(pick.uniform(0, 1))
            replica = pick.choice(running.replicas)
        else:
            while not drawing(replica := max(running.replicas, key=drawing)) and len(timeline.done) < size.images:
                time.sleep(0.05)
        timeline.interrupted += drawing(replica)
        timeline.strikes.append((timeline.now(), kind.name))
        replica.stop(kind)
        time.sleep(pick.uniform(0, 2))
        replica.start()


def drawing(replica: Replica) -> int:
    """The number of images that it draws; 0 if it does not answer."""
    try:
        return int(*metrics(replica.port, "sdxl_images_running"))
    except (OSError, http.client.HTTPException):
        return 0


def break_store(running: Cluster, size: Size, timeline: Timeline) -> None:
    """Make the store unreachable, twice."""
    for images, stalls in ((size.images // 3, True), (2 * size.images // 3, False)):
        timeline.wait_for(images)
        began = timeline.now()
        with running.outage(stalls):
            time.sleep(OUTAGE)
        timeline.outages.append((began, timeline.now()))


def replicas(size: Size) -> None:
    """`--images` on three replicas, with a kill for every sixth image and two store outages. Prints the outcomes of all
    images, and last the violations, if any."""
    config = config_of(size)
    with cluster(config) as running:
        timeline = Timeline()
        clients = Clients(running.ports, size, timeline)
        troubling = [
            threading.Thread(target=work, args=(running, size, timeline), daemon=True) for work in (strike, break_store)
        ]
        for thread in troubling:
            thread.start()
        clients.run()
        seconds = timeline.now()
        for thread in troubling:
            thread.join()
        port = running.ports[0]  # a replica that is still loading answers this, too
        ledger = clients.ledger
        figures = reconcile(port, ledger) | _leftovers(running, ledger)
        figures |= _compare(port, clients, config)
        log = [line for replica in running.replicas for line in replica.log_lines()]
        front = "nginx" if running.front is not None else "clients in turns, no nginx"
    kinds = Counter(kind for _, kind in timeline.strikes)
    lines: dict[str, float] = {
        **{f"calls, {outcome}": count for outcome, count in sorted(ledger.outcomes.items())},
        "replicas killed with SIGKILL": kinds["SIGKILL"],
        "replicas stopped with SIGTERM": kinds["SIGTERM"],
        f"store outages of {OUTAGE:g} s": len(timeline.outages),
        "being drawn on a replica as it was stopped": timeline.interrupted,
        "claimed from another replica or an earlier run": sum("took up" in str(line.get("message")) for line in log),
        "drawn, by the logs": sum(line.get("message") == "image done" for line in log),
        **figures,
        "median wait of a client, s": round(sorted(timeline.waits)[len(timeline.waits) // 2], 2),
        "longest wait of a client, s": round(max(timeline.waits), 2),
        "seconds in all": round(seconds, 1),
        "things that went wrong": len(ledger.wrong),
    }
    title = f"{size.images} images, three replicas that are killed, a store that goes away"
    conditions = f"{front}, moto, {CLIENTS} clients, {Path(size.model).name}, {size.side} px, up to {size.steps} steps"
    values = {label: [value] for label, value in lines.items()}
    Report("replicas", title, values, conditions, wrong=ledger.wrong, more={"done": timeline.done}).write(size.folder)
    _plot(size.folder / "replicas.png", f"{title}: {conditions}", timeline)


def _leftovers(running: Cluster, ledger: Ledger) -> dict[str, float]:
    """Job records that nobody removed. Those of a replica that was killed between storing an image and removing its
    record go within a lease and a look."""
    ends = time.monotonic() + 30
    while (left := running.job_records()) and time.monotonic() < ends:
        time.sleep(0.5)
    ledger.wrong += [f"{name} still has a job record" for name in left]
    return {"job records left": len(left)}


def _compare(port: int, clients: Clients, config: GenerationConfig) -> dict[str, float]:
    """Compare every image, bit for bit, with the one that an engine draws alone."""
    differences = []
    with Engine.load(config, FLOAT32.with_(exact=True)) as engine:
        for key, image in clients.ledger.by_key.items():
            info = request(port, "GET", f"/images/{image}").json()
            served = open_image(request(port, "GET", f"/download/{image}").content)
            fields = {name: value for name, value in clients.bodies[key].items() if name != "prompt"}
            alone = engine.draw(ImageRequest(config.with_(**fields), info["prompt"], info["seed"])).image
            differences.append(max_difference(served, alone))
            if differences[-1]:
                clients.ledger.wrong.append(f"{image} differs by {differences[-1]:.3f} from an undisturbed one")
    return {
        "equal to an undisturbed run in every sample": sum(each == 0 for each in differences),
        "largest difference of 255": round(255 * float(np.max(differences, initial=0)), 3),
    }


def _plot(path: Path, title: str, timeline: Timeline) -> None:
    blue, red, _, _, orange, *_ = COLOURS
    with plot(path, title, (9, 3.6)) as (axes,):
        for number, (began, ended) in enumerate(timeline.outages):
            axes.axvspan(began, ended, color="#dddddd", label=None if number else "store out of reach")
        axes.step([0, *timeline.done], range(len(timeline.done) + 1), where="post", color=blue, label="images done")
        for kind, colour, name in (("SIGKILL", red, "replica killed"), ("SIGTERM", orange, "replica stopped")):
            times = [when for when, what in timeline.strikes if what == kind]
            if times:
                axes.plot(times, [0] * len(times), "^", color=colour, clip_on=False, zorder=3, label=name)
        axes.set(xlabel="seconds", xlim=(0, None), ylim=(0, None))
        axes.legend(loc="upper left")
