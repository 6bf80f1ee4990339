"""Keys: what is closed without one, and that none ever shows."""

import asyncio
import hmac
import io
import logging

import pytest

from service.app import create_app
from service.server.auth import OPEN, Auth
from service.server.logging import json_lines
from service.settings import Settings, SettingsError

KEYS = ("first-key-0123456789", "second-key-0123456789")
FOREIGN = "Bearer dstack-token-of-somebody-else"


@pytest.fixture(scope="module")
def closed(slot, tmp_path_factory):
    """Not started: what is tested here comes before the models."""
    from starlette.testclient import TestClient

    return TestClient(create_app(Settings(slot=slot, store=tmp_path_factory.mktemp("closed"), api_keys=KEYS)))


CALLS = [
    ("nothing", {}, 401),
    ("the first key", {"X-API-Key": KEYS[0]}, 200),
    ("the second key", {"X-API-Key": KEYS[1]}, 200),
    ("a bearer token", {"Authorization": f"Bearer {KEYS[1]}"}, 200),
    ("a bearer token, in other letters", {"Authorization": f"bearer  {KEYS[0]}"}, 200),
    ("a key beside a proxy's token", {"X-API-Key": KEYS[0], "Authorization": FOREIGN}, 200),
    ("a token beside a wrong key", {"X-API-Key": "x", "Authorization": f"Bearer {KEYS[0]}"}, 200),
    ("a proxy's token alone", {"Authorization": FOREIGN}, 401),
    ("a key as a password", {"Authorization": f"Basic {KEYS[0]}"}, 401),
    ("a key without its scheme", {"Authorization": KEYS[0]}, 401),
    ("an empty key", {"X-API-Key": ""}, 401),
    ("the beginning of a key", {"X-API-Key": KEYS[0][:-1]}, 401),
    ("both keys in one", {"X-API-Key": ",".join(KEYS)}, 401),
    ("letters that are no ASCII", {"X-API-Key": "schlüssel".encode("latin-1")}, 401),
]


@pytest.mark.parametrize(("headers", "status"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS])
def test_a_key_is_asked_for(closed, headers, status):
    answer = closed.get("/config", headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["type"] == "urn:sdxl-lab:unauthorized"
        assert "X-API-Key" in answer.json()["detail"]


def test_every_path_but_the_open_ones_is_closed(closed):
    document = closed.get("/openapi.json").json()
    assert len(document["paths"]) > 5
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answer = closed.request(method, path.replace("{id}", "0b8ff2ee-3c51-4c1c-a9c5-7c8b3b1f5a10"))
            assert (answer.status_code == 401) == (path not in OPEN), path
            assert operation["security"] == ([] if path in OPEN else [{"key": []}, {"bearer": []}])
            assert ("401" in operation["responses"]) == (path not in OPEN)
    assert set(document["components"]["securitySchemes"]) == {"key", "bearer"}
    assert closed.get("/docs").status_code == 200
    for path in ("/nothing", "/x//config", "/page", "/healthz/../config", "/config/"):
        assert closed.get(path).status_code == 401, path


def test_a_service_without_keys_is_open_and_says_so(client):
    assert client.get("/config").status_code == 200
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_what_a_stranger_sends_is_not_read(closed):
    for content in (b"{", b"x" * 100_000):
        assert closed.post("/generate", content=content).status_code == 401


def test_the_prefix_of_a_proxy_opens_nothing(slot, tmp_path):
    from starlette.testclient import TestClient

    prefixed = TestClient(create_app(Settings(slot=slot, store=tmp_path, api_keys=KEYS, root_path="/a/sdxl")))
    for prefix in ("", "/a/sdxl"):
        assert prefixed.get(f"{prefix}/config").status_code == 401
        assert prefixed.get(f"{prefix}/healthz").status_code == 200
        assert prefixed.get(f"{prefix}/config", headers={"X-API-Key": KEYS[0]}).status_code == 200


@pytest.mark.parametrize("given", ["", "x", KEYS[0], KEYS[1]], ids=["none", "wrong", "first", "last"])
def test_as_much_is_compared_whatever_is_given(closed, monkeypatch, given):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a) == len(b)) or compare(a, b))
    closed.get("/config", headers={"X-API-Key": given})
    assert compared == [True] * 4


def test_each_key_has_a_client_of_its_own_that_does_not_give_it_away():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["state"]["client"])

    async def ask(keys, key):
        headers = [(b"x-api-key", key.encode())]
        await Auth(app, keys)({"type": "http", "path": "/config", "headers": headers}, None, None)

    for keys, key in ((KEYS, KEYS[0]), (KEYS, KEYS[1]), (KEYS[::-1], KEYS[0]), ((), KEYS[0])):
        asyncio.run(ask(keys, key))
    first, second, again, anyone = seen
    assert first == again
    assert len({first, second, anyone}) == 3
    assert not [client for client in seen for key in KEYS if client in key or key in client]


def test_neither_keys_nor_foreign_tokens_are_logged_or_answered(closed):
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(json_lines())
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        for headers in ({"X-API-Key": KEYS[0], "Authorization": FOREIGN}, {"Authorization": FOREIGN}):
            for path in ("/config", "/nothing", "/readyz", "/metrics"):
                answer = closed.get(path, headers=headers)
                assert not any(secret in answer.text for secret in (*KEYS, FOREIGN))
            closed.post("/generate", content=b"{", headers=headers)
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    assert written.getvalue().count("service.access") == 10
    assert not [secret for secret in ("first-key", "second-key", "dstack-token") if secret in written.getvalue()]


REFUSED = [
    "",
    " ",
    "short",
    ",".join(KEYS) + ",",
    f"{KEYS[0]}, {KEYS[1]}",
    f" {KEYS[0]}",
    "a key with 16 letters",
    "é" * 20,
]


@pytest.mark.parametrize("text", REFUSED)
def test_keys_that_are_none_stop_the_start_and_are_not_shown(text):
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping({"SDXL_API_KEYS": text})
    assert "keys of at least 16 letters" in str(caught.value)
    assert not [key for key in (*KEYS, "a key with") if key in str(caught.value)]


def test_settings_do_not_show_their_keys():
    settings = Settings.from_mapping({"SDXL_API_KEYS": ",".join(KEYS)})
    assert settings.api_keys == KEYS
    assert "key-0123" not in repr(settings)
    assert "key-0123" not in str(settings)
