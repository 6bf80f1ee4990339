import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdxl_lab.config import ConfigError, ModelRef
from sdxl_lab.images import open_image
from sdxl_lab.release.slot import SlotError
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import LIMITS, wait_for, write_slot

ROOT = Path(__file__).parents[2]


def test_config_says_what_is_served_and_on_what_ground(client, promoted):
    body = client.get("/config").json()
    assert body["config"] == promoted.to_dict()
    assert body["limits"] == LIMITS.to_dict() | {"loras": []}
    assert promoted.scheduler in body["schedulers"]
    assert body["digest"] == promoted.digest == client.get("/healthz").headers["x-config-digest"]
    assert (body["evidence"]["digest"], body["evidence"]["why"]) == (promoted.digest, "a test")
    assert body["runtime"]["rows"] == 32
    assert body["runtime"]["dtype"] != "auto"
    assert body["runtime"]["cpu_capability"] == client.app.state.jobs.deployment.engine.runtime["cpu_capability"]
    assert set(body["weights"]) == {"base", "refiner"}
    assert body["attested"] is True
    assert "evidence_note" not in body


def test_a_slot_without_evidence_says_so(serve, promoted, tmp_path):
    folder = write_slot(tmp_path / "bare", promoted)
    (folder / "evidence.json").unlink()
    body = serve(ready=False, slot=folder).get("/config").json()
    assert body["evidence"] is None
    assert "without evidence" in body["evidence_note"]


def test_while_the_models_load_the_service_is_alive_and_not_ready(serve, monkeypatch):
    import threading

    from sdxl_lab.diffusion.engine import Engine

    gate, load = threading.Event(), Engine.load

    def slow(*arguments):
        gate.wait(60)
        return load(*arguments)

    monkeypatch.setattr(Engine, "load", slow)
    client = serve(ready=False)
    assert client.get("/healthz").status_code == 200
    assert client.get("/config").json()["weights"] is None
    for answer in (client.get("/readyz"), client.post("/generate", json={"prompt": "a ring"})):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "being loaded" in answer.json()["detail"]
    gate.set()
    wait_for(lambda: client.get("/readyz").status_code == 200)


def test_models_that_cannot_be_loaded_are_told_by_readyz(serve, promoted, tmp_path):
    broken = promoted.with_(model=ModelRef(base=str(tmp_path / "nothing")))
    client = serve(ready=False, slot=write_slot(tmp_path / "broken", broken))
    wait_for(lambda: client.app.state.jobs.deployment.failure is not None)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "could not be loaded" in answer.json()["detail"]
    assert client.get("/healthz").status_code == 200


def test_a_slot_that_is_not_what_it_says_is_refused(promoted, tmp_path):
    folder = write_slot(tmp_path / "forged", promoted, digest="0" * 64)
    with pytest.raises(SlotError, match=promoted.digest):
        create_app(Settings(slot=folder))
    with pytest.raises(SlotError, match=r"config\.toml"):
        create_app(Settings(slot=tmp_path / "missing"))
    (folder / "config.toml").write_text("steps = 0")
    with pytest.raises(ConfigError):
        create_app(Settings(slot=folder))


def test_refiner_true_needs_a_model_that_has_one(serve, promoted, tmp_path):
    alone = promoted.with_(model=promoted.model.with_(refiner=None))
    client = serve(slot=write_slot(tmp_path / "alone", alone), attest="off")
    answer = client.post("/generate", json={"prompt": "a ring", "refiner": True})
    assert (answer.status_code, answer.json()["field"]) == (422, "refiner")
    drawn = client.post("/generate", json={"prompt": "a ring", "refiner": False})
    assert drawn.status_code == 200
    answer = client.post("/refine", json={"id": drawn.json()["id"]})
    assert (answer.status_code, answer.json()["field"]) == (422, "model")


def test_the_openapi_document_is_whole(client):
    document = client.get("/openapi.json").json()
    ours = {"/generate", "/refine", "/download/{id}", "/images", "/images/{id}", "/jobs/{id}"}
    assert ours | {"/config", "/healthz", "/readyz", "/metrics"} <= set(document["paths"])
    generate = document["components"]["schemas"]["GenerateRequest"]
    assert generate["additionalProperties"] is False
    assert generate["examples"] == [{"prompt": "A cat in a hat"}]


START_ERRORS = [
    ({"SDXL_API_KEY": "k" * 16}, (), "SDXL_API_KEY is no setting; did you mean SDXL_API_KEYS?"),
    ({"SDXL_CONFIG": "nowhere"}, (), "config.toml"),
    ({"SDXL_DTYPE": "int4"}, (), "float16"),
    ({}, ("--port", "99999"), "port must be 0-65535"),
]


@pytest.mark.parametrize(("environment", "arguments", "message"), START_ERRORS)
def test_a_service_that_cannot_start_says_why_in_a_line(environment, arguments, message):
    process = run(environment, *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in errors
    assert "Traceback" not in errors


def run(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_models_that_cannot_be_loaded_end_the_process(promoted, tmp_path):
    broken = promoted.with_(model=ModelRef(base=str(tmp_path / "nothing")))
    slot = write_slot(tmp_path / "broken", broken)
    process = run({"SDXL_CONFIG": str(slot)}, "--port", "0")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "cannot serve the slot" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_the_example_works_as_typed_and_the_service_stops_when_told(slot, tmp_path):
    process = run({"SDXL_CONFIG": str(slot), "SDXL_STORE": str(tmp_path / "images")}, "--port", "0")
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert address is not None
        end = time.monotonic() + 200
        while curl(f"{address[0]}/readyz", "-o", "/dev/null", "-w", "%{http_code}") != b"200":
            assert time.monotonic() < end
            time.sleep(0.2)
        example = ["-X", "POST", "-H", "Content-Type: application/json", "-d", '{ "prompt": "A cat in a hat" }']
        body = json.loads(curl(f"{address[0]}/generate", *example))
        assert open_image(curl(address[0] + body["url"])).size == (64, 64)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def curl(url, *arguments):
    return subprocess.run(["curl", "-s", url, *arguments], capture_output=True, check=False).stdout
