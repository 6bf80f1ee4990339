"""Server-sent events: what an image tells on its way."""

import base64
import io
import json
import re
import socket
import urllib.request
import uuid

import pytest
from PIL import Image

from service.api import sse as events
from service.jobs.events import due as is_due
from tests.service.conftest import wait_for

PROMPT = {"prompt": "a red ring"}
EVENTS = {"Accept": "text/event-stream"}
LONG = {**PROMPT, "steps": 100, "width": 512, "height": 512}


def parsed(text):
    """(event, data) of each block; comments left out."""
    found = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_a_image_tells_its_way_from_the_queue_to_its_end(client):
    answer = client.post("/generate", json=PROMPT | {"seed": 3}, headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    told = parsed(answer.text)
    assert [name for name, _ in told] == ["queued", "step", "step", "step", "step", "done"]
    assert set(told[0][1]) == {"id", "position", "eta"}
    assert [data for name, data in told if name == "step"] == [{"step": n, "steps": 4} for n in (1, 2, 3, 4)]
    plain = client.post("/generate", json=PROMPT | {"seed": 3}).json()
    done = told[-1][1]
    assert set(done) == set(plain)
    assert (done["id"], done["seed"]) == (told[0][1]["id"], 3)
    assert client.get(done["url"]).status_code == 200


def test_previews_are_small_jpegs_where_they_are_asked_for(client):
    answer = client.post("/generate?previews=true", json=PROMPT | {"steps": 30}, headers=EVENTS)
    shown = [data["preview"] for name, data in parsed(answer.text) if "preview" in data]
    assert len(shown) == events.PREVIEWS
    head, _, content = shown[0].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (32, 32)


@pytest.mark.parametrize(("steps", "previews"), [(25, 3), (4, 3), (4, 8), (1, 8), (100, 1), (25, 0)])
def test_previews_are_evenly_spread_and_never_of_the_last_step(steps, previews):
    due = [step for step in range(1, steps + 1) if is_due(step, steps, previews)]
    assert len(due) == min(previews, steps - 1)
    assert steps not in due
    gaps = {b - a for a, b in zip([0, *due], [*due, steps], strict=True)}
    assert max(gaps) - min(gaps) <= 1


def test_a_refined_image_names_its_source(client):
    source = client.post("/generate", json=PROMPT).json()["id"]
    told = parsed(client.post("/refine", json={"id": source, "strength": 1}, headers=EVENTS).text)
    assert told[-1][0] == "done"
    assert told[-1][1]["source"] == source


def test_what_is_wrong_before_the_first_event_is_a_plain_problem(client):
    answer = client.post("/generate", json={"prompt": ""}, headers=EVENTS)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")


def test_a_failure_under_way_is_an_error_event(client, monkeypatch):
    def put(*_):
        raise ZeroDivisionError("the secret inside")

    monkeypatch.setattr(client.app.state.jobs.store, "put", put)
    answer = client.post("/generate", json=PROMPT, headers=EVENTS)
    name, problem = parsed(answer.text)[-1]
    assert (answer.status_code, name, problem["status"]) == (200, "error", 500)
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text


def stream(port, body, path="/generate"):
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Accept: text/event-stream", "Content-Type: application/json"]
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall("\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content)
    return connection


def read_until(connection, mark):
    text = b""
    while mark not in text:
        chunk = connection.recv(65536)
        assert chunk, text
        text += chunk
    return text


def test_a_listener_that_goes_away_frees_its_rows(live):
    port, jobs, _ = live
    with stream(port, LONG) as connection:
        read_until(connection, b"event: step")
        (job,) = jobs.active.values()
        assert jobs.deployment.engine.stats().rows_in_flight == 2
    wait_for(lambda: not jobs.active)
    assert job.state == "cancelled"
    assert job.progress[0] < job.progress[1]
    assert jobs.deployment.engine.stats().rows_in_flight == 0


def test_a_listener_that_only_waits_in_the_queue_can_go_away_too(live):
    port, jobs, _ = live
    jobs.deployment.engine.rows = 2
    with stream(port, LONG) as first:
        read_until(first, b"event: step")
        with stream(port, LONG) as second:
            text = read_until(second, b"event: queued")
            read_until(first, b"event: step")
        assert b'"position": 1' in text
        wait_for(lambda: len(jobs.active) == 1)
        assert jobs.deployment.engine.stats().queued == 0


def test_a_comment_keeps_the_connection_alive(live, monkeypatch):
    monkeypatch.setattr(events, "PING", 0.2)
    with stream(live.port, LONG) as connection:
        assert b"\n: ping" in read_until(connection, b": ping")


def test_cancelling_by_the_id_of_the_first_event_ends_the_stream(live):
    with stream(live.port, LONG) as connection:
        text = read_until(connection, b"event: step").decode()
        image = re.search(r'event: queued\s+data: {"id": "([^"]+)"', text)[1]
        request = urllib.request.Request(f"http://127.0.0.1:{live.port}/jobs/{uuid.UUID(image)}", method="DELETE")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 204
        rest = read_until(connection, b"event: error").decode()
    assert "cancelled-by-client" in rest
