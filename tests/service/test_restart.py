"""A process that is killed: what was acknowledged is there afterwards, what was promised is drawn."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdxl_lab.images import max_difference, open_image
from tests.service.conftest import wait_for

ROOT = Path(__file__).parents[2]


class Service:
    def __init__(self, slot, store, log):
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "SDXL_CONFIG": str(slot)}
        environment |= {"SDXL_STORE": str(store), "SDXL_ATTEST": "off"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", self.process.stdout.readline())
        assert found is not None
        self.address = found[0]
        wait_for(lambda: self.status("/readyz") == 200, 200)

    def call(self, path, body=None, **headers):
        content = None if body is None else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()} | {
            "Content-Type": "application/json"
        }
        with urllib.request.urlopen(urllib.request.Request(self.address + path, content, names)) as answer:
            return answer.read()

    def status(self, path):
        try:
            with urllib.request.urlopen(self.address + path) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0


@contextmanager
def service(slot, store, log):
    running = Service(slot, store, log)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


@pytest.mark.slow
def test_after_a_kill_the_acknowledged_is_there_and_the_promised_is_drawn(slot, tmp_path):
    store = tmp_path / "images"
    long = {"prompt": "a red ring", "steps": 60, "width": 128, "height": 128}
    with (tmp_path / "log").open("w") as log:
        with service(slot, store, log) as first:
            stored = [json.loads(first.call("/generate", {"prompt": "a ring", "steps": 1})) for _ in range(5)]
            keyed = {"Prefer": "respond-async", "Idempotency_Key": "killed"}
            promised = json.loads(first.call("/generate", long, **keyed))
            wait_for(lambda: json.loads(first.call(promised["url"])).get("step", 0) > 0)
            first.process.kill()
            first.process.wait()
        with service(slot, store, log) as second:
            for each in stored:
                assert open_image(second.call(each["url"])).size == (64, 64)
            listed = json.loads(second.call("/images"))["images"]
            assert {each["id"] for each in stored} <= {image["id"] for image in listed}
            assert json.loads(second.call(promised["url"]))["state"] in ("queued", "running", "done")
            again = json.loads(second.call("/generate", long, Idempotency_Key="killed"))  # joins, or repeats
            assert again["id"] == promised["id"]
            seeded = json.loads(second.call("/generate", long | {"seed": again["seed"]}))
            images = [open_image(second.call(each["url"])) for each in (again, seeded)]
            assert max_difference(*images) <= 1 / 255
    assert "Traceback" not in (tmp_path / "log").read_text()
