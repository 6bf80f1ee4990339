import errno
import importlib
import json
import logging
import os
import socket
import threading

import obstore
import pytest

from service.api.problems import known
from tests.service.conftest import NOBODYS, wait_for

PROMPT = {"prompt": "a red ring"}
JSON = {"Content-Type": "application/json"}


def check(answer, status):
    problem = answer.json()
    assert answer.status_code == problem["status"] == status, problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "detail"} <= set(problem)
    assert answer.headers["x-request-id"]
    assert answer.headers["x-config-digest"]
    assert "Traceback" not in answer.text
    return problem


INSIDE = {"RecordChanged", "_Unconditional"}  # they are answered where they are raised


@pytest.mark.parametrize("room", ["sdxl_lab.errors", "service.jobs.errors", "service.jobs.store", "service.deployment"])
def test_every_error_of_the_domain_has_a_status(room):
    module = importlib.import_module(room)
    ours = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Exception)]
    ours = [each for each in ours if each.__module__ == room and each.__name__ not in INSIDE]
    assert ours
    assert [each for each in ours if known(each.__new__(each)) is None] == []


BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "x" * 2001}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": ["a cat"]}, "prompt"),
    ({"prompt": "a\0b"}, "prompt"),
    ({"prompt": "a\ud800b"}, "prompt"),
    ({"negative_prompt": "\udfff"}, "negative_prompt"),
    ({"negative_prompt": "x" * 2001}, "negative_prompt"),
    ({"steps": 0}, "steps"),
    ({"steps": 101}, "steps"),
    ({"steps": 10**400}, "steps"),
    ({"steps": "25"}, "steps"),
    ({"steps": True}, "steps"),
    ({"steps": 25.0}, "steps"),
    ({"guidance_scale": 30.1}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"guidance_scale": 10**400}, "guidance_scale"),
    ({"guidance_scale": False}, "guidance_scale"),
    ({"width": 56}, "width"),
    ({"width": 520}, "width"),
    ({"width": 65}, "width"),
    ({"height": "64"}, "height"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"scheduler": "warp"}, "scheduler"),
    ({"scheduler": "EULER"}, "scheduler"),
    ({"scheduler": "lcm", "steps": 60}, "steps"),
    ({"refiner": "yes"}, "refiner"),
    ({"refiner": {}}, "refiner"),
    ({"refiner": True, "steps": 1}, "steps"),
    ({"model": "sdxl"}, "model"),
    ({"watermark": False}, "watermark"),
    ({"st\ud800eps": 1}, "st\\ud800eps"),
]


PLAIN = [
    ({"prompt": ""}, "prompt: String should have at least 1 character; received ''."),
    ({"promt": "a cat"}, "promt: no such field; there are prompt, prompt_2, loras, scheduler, steps,"),
]


@pytest.mark.parametrize(("body", "detail"), PLAIN)
def test_what_is_wrong_is_said_in_plain_words(client, body, detail):
    problem = client.post("/generate", json=body).json()
    assert problem["title"] == "A value is not valid"
    assert problem["detail"].startswith(detail)


@pytest.mark.parametrize(("asked", "field"), BAD, ids=[json.dumps(asked)[:60] for asked, _ in BAD])
def test_a_bad_field_is_refused_by_name_and_rule(client, asked, field):
    answer = client.post("/generate", content=json.dumps(PROMPT | asked), headers=JSON)
    problem = check(answer, 422)
    assert problem["field"] == field
    assert problem["limit"]
    assert len(answer.content) < 2500


BODIES = [
    (b"", JSON),
    (b"{", JSON),
    (b"[1]", JSON),
    (b'"a cat"', JSON),
    (b"null", JSON),
    (b"\xff\xfe", JSON),
    (b'{"seed": ' + b"9" * 5000 + b"}", JSON),
    (b"[" * 60_000, JSON),
    (b'{"prompt": "a cat"}', {"Content-Type": "application/x-www-form-urlencoded"}),
    (b'{"prompt": "a cat"}', {"Content-Type": "text/plain"}),
    (b"\x89PNG\r\n", {"Content-Type": "image/png"}),
]


@pytest.mark.parametrize(("content", "headers"), BODIES, ids=[repr(content[:20]) for content, _ in BODIES])
def test_a_body_that_is_no_json_object_is_refused_with_an_example(client, content, headers):
    problem = check(client.post("/generate", content=content, headers=headers), 422)
    assert "A cat in a hat" in problem["detail"]


def test_a_body_may_have_64_kib_and_not_a_byte_more(client):
    body = json.dumps(PROMPT).encode()
    assert client.post("/generate", content=body.ljust(65536), headers=JSON).status_code == 200
    assert check(client.post("/generate", content=body.ljust(65537), headers=JSON), 413)["limit"] == 65536


def test_a_body_in_chunks_is_measured_too(client):
    chunks = (b" " * 10_000 for _ in range(10))
    check(client.post("/generate", content=chunks, headers=JSON), 413)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_on_a_real_socket_is_refused_and_read_no_further(live, chunked):
    port, _, _ = live
    how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100000"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + how + b"\r\n\r\n"
        )
        connection.sendall(b"11170\r\n" + b" " * 70_000 + b"\r\n" if chunked else b" " * 1000)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


ELSEWHERE = [
    ("GET", "/nothing", 404),
    ("GET", "/download/", 404),
    ("GET", "/download/a/b", 404),
    ("POST", "/nothing", 404),
    ("GET", "/generate", 405),
    ("DELETE", "/config", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), ELSEWHERE)
def test_unknown_paths_and_methods_are_problems(client, method, path, status):
    answer = client.request(method, path)
    check(answer, status)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_full_queue_is_429_with_retry_after(serve):
    client = serve(max_queue=1, max_rows=2)
    jobs = client.app.state.jobs
    slow = PROMPT | {"steps": 100, "width": 512, "height": 512}

    def ask():
        client.post("/generate", json=slow)

    threads = []
    for waiting in (0, 1):
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        wait_for(lambda n=waiting: len(jobs.active) == n + 1 and jobs.deployment.engine.queued == n)
    answer = client.post("/generate", json=PROMPT)
    check(answer, 429)
    assert int(answer.headers["retry-after"]) >= 1
    for job in list(jobs.active.values()):
        assert client.delete(f"/jobs/{job.id}").status_code == 204
    for thread in threads:
        thread.join()
    assert client.post("/generate", json=PROMPT).status_code == 200


STORE_ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT]


@pytest.mark.parametrize("code", STORE_ERRORS, ids=errno.errorcode.get)
def test_a_store_that_refuses_is_507(client, monkeypatch, code):
    def put(*_, **__):
        raise OSError(code, "a reason", "/secret/path")

    monkeypatch.setattr(obstore, "put", put)
    assert os.strerror(code) in check(client.post("/generate", json=PROMPT), 507)["detail"]
    assert not client.app.state.jobs.active


def test_a_bug_is_500_with_a_request_id_that_the_log_has(client, monkeypatch, caplog):
    def put(*_):
        raise ZeroDivisionError("the secret inside")

    monkeypatch.setattr(client.app.state.jobs.store, "put", put)
    answer = client.post("/generate", json=PROMPT)
    problem = check(answer, 500)
    assert "secret" not in answer.text
    assert problem["request_id"] == answer.headers["x-request-id"]
    found = [entry for entry in caplog.records if problem["request_id"] in entry.getMessage() and entry.exc_info]
    assert len(found) == 1


def test_a_stopped_engine_is_503_and_not_ready(serve):
    client = serve()
    client.app.state.jobs.deployment.engine.close()
    assert "stopped" in check(client.get("/readyz"), 503)["detail"]
    answer = client.post("/generate", json=PROMPT)
    check(answer, 503)
    assert answer.headers["retry-after"]
    assert client.get("/healthz").status_code == 200


def test_a_client_may_name_its_request_but_not_write_into_the_log(client):
    assert client.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 129, "", "é".encode()):
        assert client.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad


def test_the_log_has_a_line_a_request_without_secrets(client, caplog):
    caplog.set_level(logging.INFO)
    secrets = {"Authorization": "Bearer hunter2", "X-API-Key": "hunter2"}
    client.post("/generate?key=hunter2", json={"prompt": "hunter2 in a hat"}, headers=secrets)
    client.get("/download/a%0Ab")
    ours = [entry for entry in caplog.records if entry.name.partition(".")[0] in ("service", "sdxl_lab", "uvicorn")]
    lines = [entry.getMessage() for entry in ours if entry.name == "service.access"]
    assert lines == ["POST /generate 200", "GET /download/a%0Ab 404"]
    assert not [entry for entry in ours if "hunter2" in entry.getMessage()]


def test_only_a_full_queue_is_measured(client, monkeypatch):
    """It takes the forecast of a whole queue: not for everybody who has no key or asks for nothing."""
    monkeypatch.setattr(client.app.state.jobs.deployment, "retry_after", lambda: 1 / 0)
    assert client.post("/generate", json={"prompt": ""}).status_code == 422
    assert client.get(f"/images/{NOBODYS}").status_code == 404


@pytest.mark.parametrize(("method", "query"), [("GET", "/images?cursor=x"), ("POST", "/generate?previews=x")])
def test_a_query_is_told_with_an_example(client, method, query):
    detail = client.request(method, query, json={"prompt": "a ring"}).json()["detail"]
    assert "received 'x'. Example: " in detail
