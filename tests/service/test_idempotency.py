"""One key, one image: by construction of its id and seed, not by luck."""

import json
import socket
import threading
import uuid

import numpy as np
import pytest

from sdxl_lab.images import open_image, read_record
from service.jobs.manager import Key
from tests.service.conftest import left_behind, wait_for

PROMPT = {"prompt": "a red ring"}
LONG = {**PROMPT, "steps": 40, "width": 128, "height": 128}


def keyed(key, **more):
    return {"Idempotency-Key": key, **more}


def test_a_repeat_gives_the_stored_image(client):
    ticks = client.app.state.jobs.deployment.engine.stats
    first = client.post("/generate", json=PROMPT, headers=keyed("repeat"))
    before = ticks().ticks
    again = client.post("/generate", json=PROMPT, headers=keyed("repeat"))
    assert first.json() == again.json()
    assert ticks().ticks == before
    key = Key("anyone", "repeat")
    assert (first.json()["id"], first.json()["seed"]) == (str(key.id), key.seed)
    assert uuid.UUID(first.json()["id"]).version == 5


def test_a_repeat_answers_in_any_form(client):
    body = client.post("/generate", json=PROMPT, headers=keyed("forms")).json()
    image = client.post("/generate", json=PROMPT, headers=keyed("forms", Accept="image/png"))
    assert image.content == client.get(body["url"]).content
    assert (image.headers["x-image-id"], image.headers["x-seed"]) == (body["id"], str(body["seed"]))
    events = client.post("/generate", json=PROMPT, headers=keyed("forms", Accept="text/event-stream")).text
    assert events.index("event: queued") < events.index("event: done")
    later = client.post("/generate", json=PROMPT, headers=keyed("forms", Prefer="respond-async"))
    assert (later.status_code, later.json()["id"]) == (202, body["id"])
    assert client.get(later.headers["location"]).json()["state"] == "done"


@pytest.mark.parametrize("other", [{"prompt": "a blue ring"}, {**PROMPT, "seed": 1}, {**PROMPT, "steps": 4}])
def test_another_body_under_the_same_key_is_409_also_once_it_is_stored(client, other):
    client.post("/generate", json=PROMPT, headers=keyed("reused"))
    answer = client.post("/generate", json=other, headers=keyed("reused"))
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:sdxl-lab:key-reused")


def test_the_same_body_otherwise_written_is_the_same_request(client):
    first = client.post("/generate", content=b'{"prompt": "a ring", "steps": 3}', headers=keyed("order"))
    again = client.post("/generate", content=b'{ "steps":3,"seed":null,"prompt":"a ring"}', headers=keyed("order"))
    assert first.json() == again.json()


def test_a_key_of_generate_is_not_one_of_refine(client):
    body = client.post("/generate", json=PROMPT, headers=keyed("path")).json()
    assert client.post("/refine", json={"id": body["id"]}, headers=keyed("path")).status_code == 409
    first, again = (client.post("/refine", json={"id": body["id"]}, headers=keyed("refined")) for _ in range(2))
    assert first.json() == again.json()
    assert first.json()["source"] == body["id"]


def test_a_seed_that_is_given_stands(client):
    assert client.post("/generate", json={**PROMPT, "seed": 5}, headers=keyed("seeded")).json()["seed"] == 5


def test_whoever_asks_has_keys_of_their_own():
    assert Key("alice", "key").id != Key("bob", "key").id
    assert Key("a", "bkey").id != Key("ab", "key").id


@pytest.mark.parametrize("key", ["", "x" * 129, "tab\there", "é".encode("latin-1")])
def test_a_bad_key_is_refused(client, key):
    answer = client.post("/generate", json=PROMPT, headers=keyed(key))
    assert answer.status_code == 422
    assert answer.json()["field"].lower() == "idempotency-key"


def test_a_key_has_up_to_128_printable_characters(client):
    assert client.post("/generate", json=PROMPT, headers=keyed("~ " + "x" * 125 + "!")).status_code == 200


def test_a_concurrent_repeat_joins_the_running_one(client):
    jobs = client.app.state.jobs
    answers = []

    def ask():
        answers.append(client.post("/generate", json=LONG, headers=keyed("joined")))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(jobs.active) == 1)
    conflict = client.post("/generate", json=PROMPT, headers=keyed("joined"))
    for thread in threads:
        thread.join()
    assert conflict.status_code == 409
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.text for answer in answers}) == 1


def test_a_image_with_a_key_is_drawn_although_its_client_leaves(live):
    port, jobs, _ = live
    content = json.dumps(LONG).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nIdempotency-Key: left\r\nContent-Length: {len(content)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        wait_for(lambda: any(job.progress[0] for job in jobs.active.values()))
    wait_for(lambda: not jobs.active)
    assert jobs.store.record(Key("anyone", "left").id).record.prompt == "a red ring"


def test_after_a_crash_the_very_same_image_is_made_under_the_very_same_id(serve, tmp_path):
    """The process was killed as it drew: what was promised is there, the image is not."""
    first = serve(store=tmp_path / "first")
    body = first.post("/generate", json=PROMPT, headers=keyed("crash")).json()
    png = first.get(body["url"]).content
    elsewhere = serve(store=tmp_path / "second")  # another replica, or the same without its disk
    again = elsewhere.post("/generate", json=PROMPT, headers=keyed("crash")).json()
    assert {**again, "timings": None} == {**body, "timings": None}
    assert elsewhere.get(body["url"]).content == png


def test_a_repeat_of_a_job_keeps_the_configuration_of_then(serve, promoted, tmp_path):
    """Another configuration was promoted since: the image is still the one that was promised."""
    client = serve()
    jobs = client.app.state.jobs
    drawn = client.post("/generate", json=PROMPT, headers=keyed("then")).json()
    png = client.get(drawn["url"]).content
    mark = jobs.store.record(uuid.UUID(drawn["id"])).fingerprint
    client.delete(f"/images/{drawn['id']}")
    seed, image = drawn["seed"], uuid.UUID(drawn["id"])
    jobs.store.put_job(left_behind(promoted, 31, id=image, fingerprint=mark, prompt="a red ring", seed=seed))
    object.__setattr__(jobs.deployment.slot, "config", promoted.with_(steps=7))
    again = client.post("/generate", json=PROMPT, headers=keyed("then")).json()
    now = client.get(again["url"]).content
    assert read_record(now).config.steps == 4
    assert np.array_equal(np.asarray(open_image(now)), np.asarray(open_image(png)))


def test_a_failed_image_is_tried_again(client, monkeypatch):
    jobs = client.app.state.jobs
    keep = jobs.registry._put

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(jobs.registry, "_put", broken)
    assert client.post("/generate", json=PROMPT, headers=keyed("again")).status_code == 500
    image = Key("anyone", "again").id
    assert client.get(f"/images/{image}").json()["state"] == "failed"
    monkeypatch.setattr(jobs.registry, "_put", keep)
    assert client.post("/generate", json=PROMPT, headers=keyed("again")).status_code == 200
    assert client.get(f"/images/{image}").json()["state"] == "done"
    assert image not in [name.id for name in jobs.store.job_names()]
