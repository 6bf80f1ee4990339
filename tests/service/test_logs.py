"""A line of the log is one JSON object, and says whose request and which image it is about."""

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.server import logging as logs


@pytest.fixture
def lines():
    """What was logged since the last call, read back."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.json_lines())
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)

    def read():
        content = written.getvalue()
        written.seek(0)
        written.truncate()
        return [json.loads(line) for line in content.splitlines()]

    yield read
    root.removeHandler(handler)
    root.setLevel(before)


def test_nothing_that_is_logged_can_forge_a_line():
    message = 'two\nlines, "quotes", \ud800 and \x00'  # not through pytest's own capture, whose reports must be UTF-8
    written = logs.json_lines().format(logging.LogRecord("x", logging.WARNING, "", 0, message, (), None))
    (line,) = map(json.loads, written.splitlines())
    assert line["message"] == 'two\nlines, "quotes", \ud800 and \x00'
    assert (line["level"], line["logger"]) == ("warning", "x")
    assert line["time"].endswith("Z")


def test_a_line_has_its_fields_in_order_and_those_of_the_call_win(lines):
    async def request():
        logs.begin(request="r-1", image="of the request")
        logging.getLogger("x").warning("%d of %d", 1, 2, extra={"fields": {"image": "of the call", "path": Path("a")}})

    asyncio.run(request())
    (line,) = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("time"))
    assert list(line.items()) == [
        ("level", "warning"),
        ("logger", "x"),
        ("message", "1 of 2"),
        ("request", "r-1"),
        ("image", "of the call"),
        ("path", "a"),
    ]


def test_other_libraries_write_the_same_lines(capfd):
    """In a process of its own: `configure` sets up the root logger for good."""
    program = """
import asyncio, logging, uvicorn
from service.server import logging as logs
logs.configure("info")
async def app(scope, receive, send): ...
config = uvicorn.Config(app, port=0, lifespan="off", log_config=None)
config.load()
logging.getLogger("uvicorn.error").info("started on %s", "port 1")
logging.getLogger("any.library").debug("below the level")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    (line,) = map(json.loads, capfd.readouterr().err.splitlines())
    assert line.keys() == {"time", "level", "logger", "message"}
    assert (line["level"], line["logger"], line["message"]) == ("info", "uvicorn.error", "started on port 1")


def test_a_traceback_stays_in_its_line(lines):
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = lines()
    assert line["traceback"].endswith("ValueError: no")


def test_requests_that_run_at_once_do_not_share_their_fields(lines):
    log = logging.getLogger("x")

    async def request(name):
        logs.begin(request=name)
        await asyncio.sleep(0)
        await asyncio.create_task(work(name))
        log.warning("answered")

    async def work(name):
        logs.note(image=f"{name}1")
        await asyncio.to_thread(log.warning, "in a thread")

    async def both():
        await asyncio.gather(request("a"), request("b"))

    logs.note(image="nobody's")
    asyncio.run(both())
    assert sorted((line["request"], line["message"], line["image"]) for line in lines()) == [
        ("a", "answered", "a1"),
        ("a", "in a thread", "a1"),
        ("b", "answered", "b1"),
        ("b", "in a thread", "b1"),
    ]


def test_a_image_has_a_line_and_its_request_another(client, promoted, lines):
    body = client.post("/generate", json={"prompt": "a secret ring"}, headers={"X-Request-Id": "r-1"}).json()
    found = lines()
    assert "secret" not in json.dumps(found)
    image, request = (
        next(line for line in found if line["logger"] == name) for name in ("service.images", "service.access")
    )
    for line in (image, request):
        assert line["request"] == "r-1"
        assert line["digest"] == promoted.digest
        assert line["image"] == body["id"]
    assert (image["state"], image["steps"], image["of"]) == ("done", 4, 4)
    assert {name: image[name] for name in body["timings"]} == body["timings"]
    assert 0 < image["first_step_ms"] <= image["total_ms"]
    assert (request["method"], request["path"], request["status"]) == ("POST", "/generate", 200)
    assert request["ms"] >= image["total_ms"]
