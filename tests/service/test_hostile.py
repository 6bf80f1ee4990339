"""What nobody sends who means well: each is refused by a clear answer, and afterwards the service still draws."""

import contextlib
import json
import socket
import time
import uuid

import pytest

from service.server import connection
from service.server import middleware as edge
from service.settings import Settings
from tests.service.conftest import serving, wait_for

PROMPT = {"prompt": "a red ring"}
JSON = b"Content-Type: application/json\r\n"
PATHS = {"/generate": 422, "/v1/images/generations": 400}


@pytest.fixture(scope="module")
def live(slot, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret.png").write_bytes(b"not yours")
    with serving(Settings(slot=slot, store=folder / "images")) as live:
        yield live
        assert sorted(path.name for path in folder.iterdir()) == ["images", "secret.png"]


@pytest.fixture(autouse=True)
def still_draws(live):
    """After every test: nothing is in the making, an image is drawn, and no request failed by a bug."""
    yield
    wait_for(lambda: not live.jobs.active)
    status, _, body = exchange(live, post("/generate", json.dumps(PROMPT | {"steps": 1})))
    assert status == 200, body
    assert live.jobs.deployment.engine.stats().rows_in_flight == 0


def exchange(live, request):
    """The answer to raw bytes: status, head, body; (0, b"", b"") where the connection is closed without one."""
    with connect(live) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(request)
        return answer_of(sock)


def connect(live):
    return socket.create_connection(("127.0.0.1", live.port), timeout=60)


def answer_of(sock):
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in received:
            received += (chunk := sock.recv(65536))
            if not chunk:
                return 0, b"", b""
        head, _, body = received.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        while len(body) < length and (chunk := sock.recv(65536)):
            body += chunk
        return int(head.split()[1]), head, body
    return 0, b"", b""


def request(method, path, head=b"", body=b""):
    return b"%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n%s" % (method.encode(), path.encode(), head, body)


def post(path, body):
    content = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    return request("POST", path, JSON + b"Content-Length: %d\r\n" % len(content), content)


def message_of(body):
    content = json.loads(body)
    return content["error"]["message"] if "error" in content else content["detail"]


# --- ids -------------------------------------------------------------------------------------------------------------

IDS = [
    "../secret",
    "..%2Fsecret",
    "%2e%2e%2fsecret",
    "%2E%2E/secret.png",
    "..%5Csecret",
    "....//secret",
    "..%c0%afsecret",
    "%252e%252e%252fsecret",
    "/etc/passwd",
    "%2Fetc%2Fpasswd",
    "secret.png",
    "%00",
    "%ff%fe",
    "newest",
    "jobs%2F" + str(uuid.UUID(int=0)),
    str(uuid.UUID(int=0)) + "%00.png",
    str(uuid.UUID(int=0)) + ".json",
    "{" + str(uuid.UUID(int=0)) + "}",
    "urn:uuid:" + str(uuid.UUID(int=0)),
    "*",
    "-1",
    "x" * 5000,
]


@pytest.mark.parametrize("bad", IDS, ids=[bad[:40] for bad in IDS])
def test_an_id_is_never_a_path(live, bad):
    calls = [("GET", "/download/{}"), ("GET", "/images/{}"), ("DELETE", "/images/{}"), ("DELETE", "/jobs/{}")]
    for method, path in calls:
        status, _, body = exchange(live, request(method, path.format(bad)))
        assert status in (404, 405), (method, bad, body)
        assert b"not yours" not in body
        assert b"root:" not in body
    status, _, body = exchange(live, post("/refine", json.dumps({"id": bad})))
    assert status == 404, body


# --- bodies ----------------------------------------------------------------------------------------------------------

MEGABYTES = b" " * 10_000_000
DEEP = {
    "lists": b"[" * 30_000,
    "lists that close": b"[" * 30_000 + b"]" * 30_000,
    "objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "a deep prompt": b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
}
TEXTS = {
    "NUL": r'{"prompt": "a\u0000b"}',
    "raw NUL": '{"prompt": "a\0b"}',
    "lone surrogate": r'{"prompt": "\ud800"}',
    "surrogates in the wrong order": r'{"prompt": "\udc00\ud800"}',
    "raw surrogate": '{"prompt": "\ud800"}',
    "name with a surrogate": r'{"prompt": "a", "\udfff": 1}',
    "UTF-16": b'\xff\xfe{\0"\0',
    "UTF-7": b'{"prompt": "+ADw-\xff"}',
    "nothing": "",
    "two documents": '{"prompt": "a"}{"prompt": "b"}',
    "no quotes": "{prompt: a}",
    "a comment": '{"prompt": "a" /* cat */}',
}
VALUES = [
    *(("width", side) for side in (0, -8, 7, 10**9, 2**64, 10**400, 1.5, "64", None, [])),
    *(("height", side) for side in (0, -8, 7, 10**9)),
    *(("seed", seed) for seed in (-1, 2**63, 2**64, 10**400, -(10**400), 0.5, "7", True)),
    *(("guidance_scale", scale) for scale in (float("nan"), float("inf"), float("-inf"), 1e308, -0.1, "5")),
    *(("steps", steps) for steps in (0, -1, 101, 10**9, float("nan"), float("inf"))),
    ("prompt", "x" * 5000),
    ("negative_prompt", "x" * 5000),
    ("scheduler", "x" * 5000),
    ("refiner", 1),
    ("x" * 5000, 1),
    ("__class__", {}),
    ("", 1),
]
SIZES = ["0x0", "-8x64", "7x64", "1000000000x8", "64x", "x64", "64X64", "64x64x64", " 64x64", "64x64\n", "9" * 5000, 64]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", ["announced", "chunked", "announced too short", "announced and left"])
def test_ten_megabytes_are_not_read(live, path, how):
    if how == "chunked":
        chunks = b"".join(b"%x\r\n%s\r\n" % (65_000, b" " * 65_000) for _ in range(160))
        sent = request("POST", path, JSON + b"Transfer-Encoding: chunked\r\n", chunks + b"0\r\n\r\n")
    else:
        announced = {"announced": len(MEGABYTES), "announced too short": 10, "announced and left": 10**15}[how]
        body = b" " * 100 if how == "announced and left" else MEGABYTES
        sent = request("POST", path, JSON + b"Content-Length: %d\r\n" % announced, body)
    status, _, body = exchange(live, sent)
    if how == "announced too short":  # ten blanks, and then what is no request
        assert status in (400, PATHS[path])
    else:
        assert status == 413
        assert "65536" in message_of(body)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DEEP)
def test_deep_json_is_refused(live, path, name):
    status, _, body = exchange(live, post(path, DEEP[name]))
    assert status == PATHS[path], body
    assert len(body) < 2500


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_none_is_refused(live, path, name):
    status, _, body = exchange(live, post(path, TEXTS[name]))
    assert status == PATHS[path], body
    assert message_of(body)


@pytest.mark.parametrize(("name", "value"), VALUES, ids=[f"{name[:20]}={str(value)[:20]}" for name, value in VALUES])
def test_a_value_out_of_range_is_refused(live, name, value):
    status, _, body = exchange(live, post("/generate", json.dumps(PROMPT | {name: value})))
    if value is None:  # as if it were left out
        assert status == 200
        return
    assert status == 422, body
    assert len(body) < 2500
    assert json.loads(body)["detail"]


@pytest.mark.parametrize("size", SIZES, ids=[str(size)[:20] for size in SIZES])
def test_a_size_that_is_none_is_refused(live, size):
    status, _, body = exchange(live, post("/v1/images/generations", json.dumps(PROMPT | {"size": size})))
    assert status == 400, body
    assert json.loads(body)["error"]["param"] == "size"
    assert len(body) < 2500


def test_of_a_name_that_comes_twice_the_last_counts(live):
    twice = '{"prompt": "a", "steps": 1000, "steps": 1, "prompt": "b", "seed": 3}'
    status, _, body = exchange(live, post("/generate", twice))
    assert status == 200, body
    record = live.jobs.store.record(uuid.UUID(json.loads(body)["id"]))
    assert (record.record.prompt, record.record.config.steps) == ("b", 1)


@pytest.mark.parametrize("body", [b'{"prompt": "a", "prompt": 7}', b'{"steps": 1, "steps": 1000, "prompt": "a"}'])
def test_a_bad_value_that_comes_last_is_refused(live, body):
    assert exchange(live, post("/generate", body))[0] == 422


# --- heads -----------------------------------------------------------------------------------------------------------

HEADS = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\n\r\n", 400),
    "a method of its own": (b"BREW /generate HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "another method": (b"PATCH /generate HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "two lengths": (b"POST /generate HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    "length and chunks": (
        b"POST /generate HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "a negative length": (b"POST /generate HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    "a length of many digits": (b"POST /generate HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    "a path that is no ASCII": ("GET /download/\u00e9 HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 400),
    "a websocket": (
        b"GET /generate HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        403,
    ),
    "a long header": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 1_000_000 + b"\r\n\r\n", 431),
    "many headers": (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 200_000 + b"\r\n", 431),
    "a long path": (b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    "a request id for the log": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: a b\x0b\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_none_is_refused(live, name):
    sent, expected = HEADS[name]
    status, head, body = exchange(live, sent)
    # A client that still writes when it is refused may find the connection closed instead of the answer.
    assert status in (0, 431) if expected == 431 else status == expected, (head, body)


def test_answers_are_not_mixed_up_when_requests_come_at_once(live):
    """Ten requests in one packet: answered in their order."""
    paths = [f"/images/{uuid.UUID(int=number)}" for number in range(10)]
    with connect(live) as sock:
        sock.sendall(b"".join(request("GET", path) for path in paths))
        received = b""
        while received.count(b"no image has the id") < 10:
            chunk = sock.recv(65536)
            assert chunk
            received += chunk
    places = [received.index(path.removeprefix("/images/").encode()) for path in paths]
    assert places == sorted(places)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.6)
    monkeypatch.setattr(connection, "READ_SECONDS", 0.6)
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.6)


def drip(sock, content, seconds=0.1):
    """Send a byte now and then, until the other side has enough; the seconds that it took."""
    began = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in content:
            sock.sendall(bytes([byte]))
            sock.settimeout(seconds)
            with contextlib.suppress(TimeoutError):
                if not sock.recv(1, socket.MSG_PEEK):
                    break
                return None
    return time.monotonic() - began


SLOW_HEADS = {
    "nothing": b"",
    "a byte now and then": b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 100,
    "line ends": b"\r\n" * 300,
}


@pytest.mark.parametrize("before", [b"", request("GET", "/healthz")], ids=["new", "kept alive"])
@pytest.mark.parametrize("name", SLOW_HEADS)
def test_a_head_that_does_not_come_is_not_waited_for(live, impatient, name, before):
    with connect(live) as sock:
        if before:
            sock.sendall(before)
            assert answer_of(sock)[0] == 200
        if SLOW_HEADS[name]:
            assert drip(sock, SLOW_HEADS[name]) < 10
        sock.settimeout(60)  # uvicorn's own patience with a silent connection that was used before is 5 s
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(live, impatient, path, chunked):
    how = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 1000\r\n"
    with connect(live) as sock:
        sock.sendall(request("POST", path, JSON + how))
        assert drip(sock, b"1\r\n \r\n" * 300 if chunked else b" " * 999) is None
        status, _, body = answer_of(sock)
    assert status == 408
    assert "within 0.6 seconds" in message_of(body)


def test_a_body_that_is_in_time_may_be_drawn_for_longer(live, monkeypatch):
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.1)
    long = PROMPT | {"steps": 100}
    status, _, body = exchange(live, post("/generate", json.dumps(long)))
    assert status == 200
    assert json.loads(body)["timings"]["total_ms"] > 100


def test_an_answer_that_is_not_read_is_not_kept(live, impatient):
    big = PROMPT | {"steps": 1, "width": 512, "height": 512}
    image = json.loads(exchange(live, post("/generate", json.dumps(big)))[2])["id"]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", live.port))
        sock.sendall(request("GET", f"/download/{image}") * 20)
        wait_for(lambda: live.server.server_state.connections)
        wait_for(lambda: not live.server.server_state.connections)


def test_two_hundred_connections_opened_and_dropped(live):
    """In every stage of a request; half of them wait for an image."""
    content = json.dumps(PROMPT | {"steps": 50}).encode()
    full = post("/generate", content)
    stages = [b"", full[:10], full[:-5], full]
    sockets = [connect(live) for _ in range(200)]
    for number, sock in enumerate(sockets):
        sock.sendall(stages[number % 4] if number % 2 else full)
    wait_for(lambda: live.jobs.active)
    for number, sock in enumerate(sockets):
        if number % 3 == 0:  # with a reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    wait_for(lambda: not live.jobs.active)
    wait_for(lambda: not live.server.server_state.connections)
    assert live.jobs.deployment.engine.stats().queued == 0


def test_slow_clients_do_not_hold_up_the_others(live):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connect(live)).sendall(b"POST /generate HTTP/1.1\r\nContent-Le")
        for _ in range(100):
            stack.enter_context(connect(live)).sendall(request("POST", "/generate", JSON + b"Content-Length: 99\r\n"))
        status, _, body = exchange(live, post("/generate", json.dumps(PROMPT)))
        assert status == 200, body
