"""Three replicas that are killed, and a store that goes away: is every image drawn, once, as if nothing had happened?

Half of the images are asked for and waited for, half are promised and asked after; every one has an idempotency
key, and a client that gets no answer, or a 5xx or 429, asks again with it. Meanwhile replicas are killed (SIGKILL, one
time in four SIGTERM) and started again, and twice the store cannot be reached for five seconds: once it stalls, once
the line is cut. All of that happens at shares of the images done, drawn from a seeded generator, so that it hits a
fast machine as it hits a slow one. In the end every image is compared with the one that an engine draws alone.
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
EQUAL = 1 / 255  # another batch rounds another pixel


@dataclass
class Course:
    """What happened when, in seconds since the start."""

    began: float = field(default_factory=time.monotonic)
    done: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    strikes: list[tuple[float, str]] = field(default_factory=list)
    torn: int = 0  # images being drawn on a replica as it was hit
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
        """Until so many are done."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.done) >= images)


class Clients:
    """Each image has a key, the body that belongs to it, and a client that does not give up."""

    def __init__(self, ports: list[int], size: Size, course: Course) -> None:
        self.course, self.ledger = course, Ledger()
        self._ports = itertools.cycle(ports)
        pick = random.Random(SEED)
        self.asked = {f"image-{n}": varied_body(pick, size, max(1, size.steps // 2)) for n in range(size.images)}

    def run(self) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(self._draw, self.asked))

    def _draw(self, key: str) -> None:
        began = time.monotonic()
        later = int(key.rpartition("-")[2]) % 2 == 1
        try:
            image = self._accepted(key, later, began + WAIT)
            if later:
                self._await(image, began + WAIT)
                again = self._accepted(key, later, began + WAIT)  # and once more, as clients do that have forgotten
                if again != image:
                    raise RuntimeError(f"the key {key} gave {image}, then {again}")
            self.ledger.drawn(image, "promised, then done" if later else "done", key)
        except RuntimeError as error:
            with self.ledger.lock:
                self.ledger.wrong.append(str(error))
        self.course.drawn(time.monotonic() - began)

    def _accepted(self, key: str, later: bool, until: float) -> str:
        headers = {"Idempotency-Key": key} | ({"Prefer": "respond-async"} if later else {})
        status, answer = self._ask("POST", "/generate", until, self.asked[key], headers)
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
        """Until there is an answer that stands."""
        while time.monotonic() < until:
            try:
                answer = request(next(self._ports), method, path, body, headers, timeout=60)
            except (OSError, http.client.HTTPException) as error:
                self.ledger.tell(f"asked again: {type(error).__name__}")
            else:
                if answer.status < 500 and answer.status != 429:
                    return answer.status, answer.json()
                self.ledger.tell(f"asked again: {answer.status}")
            time.sleep(0.5)
        raise RuntimeError(f"{method} {path}: no answer that stands in {WAIT:g} s")


def strikes(images: int) -> list[tuple[int, signal.Signals]]:
    """After how many images a replica is hit, and how."""
    pick = random.Random(SEED)
    count = max(1, images // STRIKES)
    after = [1, *sorted(pick.randint(2, int(0.9 * images)) for _ in range(count - 1))]
    return [(done, signal.SIGTERM if number % 4 == 3 else signal.SIGKILL) for number, done in enumerate(after)]


def strike(running: Cluster, size: Size, course: Course) -> None:
    """Every other time the replica that draws most at this moment, else any one at any moment."""
    pick = random.Random(SEED)
    for number, (images, kind) in enumerate(strikes(size.images)):
        course.wait_for(images)
        if number % 2:
            time.sleep(pick.uniform(0, 1))
            replica = pick.choice(running.replicas)
        else:
            while not drawing(replica := max(running.replicas, key=drawing)) and len(course.done) < size.images:
                time.sleep(0.05)
        course.torn += drawing(replica)
        course.strikes.append((course.now(), kind.name))
        replica.stop(kind)
        time.sleep(pick.uniform(0, 2))
        replica.start()


def drawing(replica: Replica) -> int:
    """How many images it draws; 0 where it does not answer."""
    try:
        return int(*metrics(replica.port, "sdxl_images_running"))
    except (OSError, http.client.HTTPException):
        return 0


def take_away(running: Cluster, size: Size, course: Course) -> None:
    """The store, twice."""
    for images, stalls in ((size.images // 3, True), (2 * size.images // 3, False)):
        course.wait_for(images)
        began = course.now()
        with running.outage(stalls):
            time.sleep(OUTAGE)
        course.outages.append((began, course.now()))


def replicas(size: Size) -> None:
    """`--images` on three replicas, a kill to every sixth of them, two store outages. Prints what became of
    every image; what went wrong, if anything, stands in the last lines."""
    config = config_of(size)
    with cluster(config) as running:
        course = Course()
        clients = Clients(running.ports, size, course)
        troubling = [
            threading.Thread(target=work, args=(running, size, course), daemon=True) for work in (strike, take_away)
        ]
        for thread in troubling:
            thread.start()
        clients.run()
        seconds = course.now()
        for thread in troubling:
            thread.join()
        port = running.ports[0]  # a replica that loads tells of images, too
        ledger = clients.ledger
        figures = reconcile(port, ledger) | _left(running, ledger)
        figures |= _held(port, clients, config)
        said = [line for replica in running.replicas for line in replica.said()]
        front = "nginx" if running.front is not None else "clients in turns, no nginx"
    kinds = Counter(kind for _, kind in course.strikes)
    lines: dict[str, float] = {
        **{f"calls, {outcome}": count for outcome, count in sorted(ledger.outcomes.items())},
        "replicas killed with SIGKILL": kinds["SIGKILL"],
        "replicas stopped with SIGTERM": kinds["SIGTERM"],
        f"store outages of {OUTAGE:g} s": len(course.outages),
        "being drawn on a replica as it was hit": course.torn,
        "taken up from another replica or life": sum("took up" in str(line.get("message")) for line in said),
        "drawn, by the logs": sum(line.get("message") == "image done" for line in said),
        **figures,
        "median wait of a client, s": round(sorted(course.waits)[len(course.waits) // 2], 2),
        "longest wait of a client, s": round(max(course.waits), 2),
        "seconds in all": round(seconds, 1),
        "things that went wrong": len(ledger.wrong),
    }
    title = f"{size.images} images, three replicas that are killed, a store that goes away"
    conditions = f"{front}, moto, {CLIENTS} clients, {Path(size.model).name}, {size.side} px, up to {size.steps} steps"
    values = {label: [value] for label, value in lines.items()}
    Report("replicas", title, values, conditions, wrong=ledger.wrong, more={"done": course.done}).tell(size.folder)
    _plot(size.folder / "replicas.png", f"{title}: {conditions}", course)


def _left(running: Cluster, ledger: Ledger) -> dict[str, float]:
    """Promises that nobody dropped: those of a replica that was killed between storing and dropping go within a lease
    and a look."""
    ends = time.monotonic() + 30
    while (left := running.promised()) and time.monotonic() < ends:
        time.sleep(0.5)
    ledger.wrong += [f"{name} is still promised" for name in left]
    return {"promises left": len(left)}


def _held(port: int, clients: Clients, config: GenerationConfig) -> dict[str, float]:
    """Every image against the one that an engine draws alone."""
    differences = []
    with Engine.load(config, FLOAT32) as engine:
        for key, image in clients.ledger.by_key.items():
            info = request(port, "GET", f"/images/{image}").json()
            served = open_image(request(port, "GET", f"/download/{image}").content)
            fields = {name: value for name, value in clients.asked[key].items() if name != "prompt"}
            alone = engine.draw(ImageRequest(config.with_(**fields), info["prompt"], info["seed"])).image
            differences.append(max_difference(served, alone))
            if differences[-1] > EQUAL:
                clients.ledger.wrong.append(f"{image} differs by {differences[-1]:.3f} from an undisturbed one")
    return {
        "equal to an undisturbed run": sum(each <= EQUAL for each in differences),
        "... of them in every sample": sum(each == 0 for each in differences),
        "largest difference of 255": round(255 * float(np.max(differences, initial=0)), 3),
    }


def _plot(path: Path, title: str, course: Course) -> None:
    blue, red, _, _, orange, *_ = COLOURS
    with plot(path, title, (9, 3.6)) as (axes,):
        for number, (began, ended) in enumerate(course.outages):
            axes.axvspan(began, ended, color="#dddddd", label=None if number else "store out of reach")
        axes.step([0, *course.done], range(len(course.done) + 1), where="post", color=blue, label="images done")
        for kind, colour, name in (("SIGKILL", red, "replica killed"), ("SIGTERM", orange, "replica stopped")):
            times = [when for when, what in course.strikes if what == kind]
            if times:
                axes.plot(times, [0] * len(times), "^", color=colour, clip_on=False, zorder=3, label=name)
        axes.set(xlabel="seconds", xlim=(0, None), ylim=(0, None))
        axes.legend(loc="upper left")
