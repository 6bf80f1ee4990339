"""How the process ends: real processes, real signals."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.server.process import Watchdog
from tests.service.conftest import wait_for

ROOT = Path(__file__).parents[2]
KEY = "a-key-that-nobody-may-read"
TOKEN = "Bearer a-token-of-the-proxy"

# `python -m service`, whose engine is slow, or is stuck once it has begun an image; so it calibrates nothing before.
PROGRAM = """
import sys, time
from sdxl_lab.diffusion.engine import Engine
from service.__main__ import main
predict, pause = Engine._predict, float(sys.argv.pop())
Engine._predict = lambda *given: time.sleep(pause) or predict(*given)
Engine.calibrate = lambda *given: None
sys.exit(main())
"""


@contextmanager
def process(slot, folder, pause, **environment):
    """A service that is ready; `ask` gives (status, headers, body), `log` what it wrote when it has ended."""
    settings = {"SDXL_CONFIG": str(slot), "SDXL_STORE": str(folder / "images"), "SDXL_ATTEST": "off"}
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "--port", "0", str(pause)],
            cwd=ROOT,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"} | settings | environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert child.stdout is not None
            port = int(re.search(r":(\d+) ", child.stdout.readline())[1])

            def ask(method, path, body=None, **headers):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                sent = {"Content-Type": "application/json", "X-API-Key": KEY} | headers
                try:
                    connection.request(method, path, body and json.dumps(body), sent)
                    answer = connection.getresponse()
                    return answer.status, dict(answer.getheaders()), answer.read().decode()
                finally:
                    connection.close()

            wait_for(lambda: ask("GET", "/readyz")[0] == 200, 120)
            yield SimpleNamespace(child=child, ask=ask, log=lambda: (folder / "log").read_text())
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def running(served):
    return gauge(served, "sdxl_images_running")


def queued(served):
    return gauge(served, "sdxl_queue_depth")


def gauge(served, name):
    return int(re.search(rf"^{name} (\d+)", served.ask("GET", "/metrics")[2], re.M)[1])


@pytest.mark.slow
def test_a_service_that_is_stopped_finishes_what_it_can_and_tells_the_others(slot, tmp_path):
    environment = {"SDXL_API_KEYS": KEY, "SDXL_LOG_LEVEL": "debug", "SDXL_MAX_ROWS": "4"}
    with process(slot, tmp_path, 0.25, **environment) as served, ThreadPoolExecutor(3) as pool:
        # Two are drawn, for 3 s and for 25; the third waits.
        asked = []
        for steps in (12, 100, 100):
            body = {"prompt": "a ring", "steps": steps}
            asked.append(pool.submit(served.ask, "POST", "/generate", body, Authorization=TOKEN))
            wait_for(lambda: running(served) + queued(served) == len(asked))
        short, long, waiting = asked
        wait_for(lambda: (running(served), queued(served)) == (2, 1))
        told = time.monotonic()
        served.child.send_signal(signal.SIGTERM)
        wait_for(lambda: served.ask("GET", "/readyz")[0] == 503)
        status, headers, content = served.ask("POST", "/generate", {"prompt": "a boat"})
        assert status == 503
        assert int(headers["retry-after"]) > 0
        assert "stopping" in content
        assert served.ask("GET", "/healthz")[0] == 200
        assert waiting.result()[0] == 503
        assert not short.done(), "what cannot be done in time is told at once"
        assert short.result()[0] == 200
        status, headers, content = long.result()
        assert (status, int(headers["retry-after"]) > 0) == (503, True)
        assert "stop" in content
        assert served.child.wait(60) == 0
        assert 7 < time.monotonic() - told < 10, "dstack kills after 10 s"
    log = served.log()
    lines = [json.loads(line) for line in log.splitlines()]
    assert len({line["request"] for line in lines if line["logger"] == "service.access"}) > 6
    states = sorted(line["state"] for line in lines if line["logger"] == "service.images" and "state" in line)
    assert states == ["cancelled", "cancelled", "done"]
    assert KEY not in log
    assert "token-of-the-proxy" not in log


@pytest.mark.slow
def test_an_engine_that_is_stuck_ends_the_process_with_an_error(slot, tmp_path):
    with process(slot, tmp_path, 1000, SDXL_WATCHDOG="5") as served:
        status, headers, content = served.ask("POST", "/generate", {"prompt": "a ring"})
        assert (status, "retry-after" in headers) == (503, True), content
        assert served.child.wait(60) == 1
    assert "the engine is stuck: it has images to draw, and made no step in 5 s" in served.log()
    assert "in _step" in served.log(), "it says where"


@pytest.mark.slow
def test_a_service_whose_engine_is_stuck_is_stopped_in_time_and_with_an_error(slot, tmp_path):
    with process(slot, tmp_path, 1000) as served:
        asking = threading.Thread(target=served.ask, args=("POST", "/generate", {"prompt": "a ring"}))
        asking.start()
        wait_for(lambda: running(served) == 1)
        told = time.monotonic()
        served.child.send_signal(signal.SIGINT)
        assert served.child.wait(60) == 1
        assert time.monotonic() - told < 10, "dstack kills after 10 s"
        asking.join()
    assert "made no step since it was told to stop" in served.log()


class Engine:
    """Numbers of an engine."""

    def __init__(self):
        self.ticks, self.queued, self.running = 0, 0, 0

    def stats(self):
        return self


def test_the_watchdog_barks_at_an_engine_with_work_that_stands_still(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    engine, watchdog = Engine(), Watchdog()
    steps = [
        ("idle for long", 1000, {}, False),
        ("an image comes", 0, {"queued": 1}, False),
        ("it is begun", 9, {"queued": 0, "running": 1, "ticks": 1}, False),
        ("a slow step", 9, {}, False),
        ("it goes on", 0.5, {"ticks": 2}, False),
        ("another slow step", 9.5, {}, False),
        ("too slow", 1, {}, True),
        ("it went on after all", 0, {"ticks": 3}, False),
        ("done", 9, {"running": 0}, False),
        ("idle again", 1000, {}, False),
    ]
    for name, seconds, changes, stuck in steps:
        now[0] += seconds
        for field, value in changes.items():
            setattr(engine, field, value)
        assert (watchdog.standing(engine) >= 10) == stuck, name
