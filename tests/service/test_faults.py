"""What the machine does to a service: its disk is full, read-only or gone, its clock jumps. HTTP's side of it;
`tests/service/jobs/test_store.py` has the store's own, `test_restart.py` and `test_process.py` the process's."""

import subprocess
import time

import pytest

from sdxl_lab.images import open_image

PROMPT = {"prompt": "a red ring", "steps": 1}
OPENAI = {"prompt": "a red ring"}


def until_refused(client):
    """Images that were acknowledged before the disk was full, and the refusal."""
    kept = []
    for _ in range(100):
        answer = client.post("/generate", json=PROMPT)
        if answer.status_code != 200:
            return kept, answer
        kept.append(answer.json())
    raise AssertionError("the disk never got full")


def test_a_full_disk_is_507_and_what_was_acknowledged_stays(serve, small_disk):
    client = serve(store=small_disk / "images")
    kept, refused = until_refused(client)
    assert kept
    assert (refused.status_code, refused.json()["type"]) == (507, "urn:sdxl-lab:store-refused")
    assert "/" not in refused.json()["detail"]
    openai = client.post("/v1/images/generations", json=OPENAI | {"n": 4})
    assert (openai.status_code, openai.json()["error"]["code"]) == (507, "store_refused")
    assert openai.headers["x-should-retry"] == "false"
    events = client.post("/generate", json=PROMPT, headers={"Accept": "text/event-stream"}).text
    assert "store-refused" in events
    for each in kept:
        assert open_image(client.get(each["url"]).content).size == (64, 64)
    assert {image["id"] for image in client.get("/images").json()["images"]} == {each["id"] for each in kept}
    assert client.get("/readyz").status_code == 200
    for each in kept:
        assert client.delete(f"/images/{each['id']}").status_code == 204
    again = client.post("/generate", json=PROMPT)
    assert again.status_code == 200
    assert [image["id"] for image in client.get("/images").json()["images"]] == [again.json()["id"]]


def test_a_read_only_disk_is_507_and_what_was_acknowledged_stays(serve, small_disk):
    client = serve(store=small_disk / "images")
    kept = client.post("/generate", json=PROMPT).json()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for path, body, headers in (
        ("/generate", PROMPT, {}),
        ("/generate", PROMPT, {"Prefer": "respond-async"}),
        ("/generate", PROMPT, {"Idempotency-Key": "read-only"}),
        ("/v1/images/generations", OPENAI, {}),
    ):
        assert client.post(path, json=body, headers=headers).status_code == 507
    assert client.delete(f"/images/{kept['id']}").status_code == 507
    assert open_image(client.get(kept["url"]).content).size == (64, 64)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert client.post("/generate", json=PROMPT, headers={"Idempotency-Key": "read-only"}).status_code == 200


def test_a_store_that_is_gone_is_told_and_comes_back(serve, tmp_path):
    client = serve(store=tmp_path / "images")
    kept = client.post("/generate", json=PROMPT).json()
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert client.get(kept["url"]).status_code == 404
    assert client.get("/images").json() == {"images": []}
    assert client.get("/healthz").status_code == 200
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert client.get(kept["url"]).status_code == 200


@pytest.mark.parametrize("jump", [-(10**8), 10**8], ids=["back three years", "ahead three years"])
def test_a_clock_that_jumps_changes_no_wait_and_loses_nothing(serve, monkeypatch, jump):
    client = serve()
    jobs = client.app.state.jobs
    before = client.post("/generate", json=PROMPT).json()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    keyed = {"Idempotency-Key": "jump", "Prefer": "respond-async"}
    promised = client.post("/generate", json=PROMPT, headers=keyed).json()
    during = client.post("/generate", json=PROMPT).json()
    assert 0 < during["timings"]["total_ms"] < 60_000
    assert (jobs.deployment.retry_after() or 0) < 60
    events = client.post("/generate", json=PROMPT | {"steps": 3}, headers={"Accept": "text/event-stream"}).text
    assert events.count("event: step") == 3
    monkeypatch.setattr(time, "time", now)
    again = client.post("/generate", json=PROMPT, headers={"Idempotency-Key": "jump"}).json()
    assert again["id"] == promised["id"]
    listed = [image["id"] for image in client.get("/images").json()["images"]]
    assert {before["id"], during["id"], promised["id"]} <= set(listed)
    assert len(listed) == len(set(listed)) == 4
    for each in (before, during, again):
        assert open_image(client.get(each["url"]).content).size == (64, 64)
