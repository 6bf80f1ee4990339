"""Behind a proxy's prefix, and for pages of other origins."""

import pytest

PREFIX = "/proxy/services/main/sdxl"
RING = {"prompt": "a ring"}


@pytest.mark.parametrize("asked_below", [PREFIX, ""], ids=["a proxy that keeps the prefix", "a proxy that strips it"])
def test_everything_works_behind_a_prefix(serve, asked_below):
    client = serve(root_path=PREFIX)
    body = client.post(f"{asked_below}/generate", json=RING).json()
    assert body["url"] == f"{PREFIX}/download/{body['id']}", "as the client has to ask for it"
    assert client.get(f"{asked_below}/download/{body['id']}").headers["content-type"] == "image/png"
    assert f"{PREFIX}/openapi.json" in client.get(f"{asked_below}/docs").text
    document = client.get(f"{asked_below}/openapi.json").json()
    assert document["servers"] == [{"url": PREFIX}]
    assert "/generate" in document["paths"]
    assert client.get(f"{asked_below}/readyz").status_code == 200
    assert client.get("/readyz").status_code == 200, "a probe comes without the prefix"
    assert client.get(f"{PREFIX}x/readyz").status_code == 404
    moved = client.get(f"{asked_below}/healthz/", follow_redirects=False)
    assert moved.headers["location"].endswith(f"{PREFIX}/healthz"), "as the client has to ask for it"


SHOP = {"Origin": "https://shop.example"}


@pytest.fixture(scope="module")
def open_to_a_shop(slot, tmp_path_factory):
    from starlette.testclient import TestClient

    from service.app import create_app
    from service.settings import Settings

    settings = Settings(
        slot=slot,
        store=tmp_path_factory.mktemp("shop"),
        cors_origins=("https://shop.example",),
        api_keys=("a-key-that-is-long",),
    )
    return TestClient(create_app(settings))


def test_a_listed_origin_may_ask_and_read_every_answer(open_to_a_shop):
    key = {"X-API-Key": "a-key-that-is-long"}
    for headers, path, status in ((key, "/config", 200), ({}, "/config", 401), (key, "/nothing", 404)):
        answer = open_to_a_shop.get(path, headers=SHOP | headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        for name in ("X-Image-Id", "X-Seed", "X-Config-Digest", "Retry-After", "Location", "ETag", "X-Request-Id"):
            assert name in exposed
    answer = open_to_a_shop.post("/generate", json=RING, headers=SHOP | key)
    assert answer.status_code == 503, "nothing is loaded here"
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    assert "access-control-allow-credentials" not in answer.headers


def test_a_preflight_needs_no_key(open_to_a_shop):
    wanted = "x-api-key, content-type, idempotency-key, prefer, if-none-match"
    asked = SHOP | {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": wanted}
    assert open_to_a_shop.options("/generate", headers=asked).status_code == 200
    refused = open_to_a_shop.options("/generate", headers=asked | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_other_origins_and_services_without_any_give_no_leave(open_to_a_shop, client):
    for service in (open_to_a_shop, client):
        answer = service.get("/healthz", headers={"Origin": "https://other.example"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
