import asyncio
import json
import socket
import threading
import time
import urllib.request
import uuid

import numpy as np
import obstore
import pytest

from sdxl_lab.images import open_image, read_record
from sdxl_lab.job import ImageRequest
from service.deployment import Stopping
from tests.service.conftest import wait_for

PROMPT = {"prompt": "a red circle on a blue background"}


def test_a_prompt_is_enough(client, promoted):
    answer = client.post("/generate", json=PROMPT)
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["id", "url", "seed", "width", "height", "config", "overridden", "timings"]
    assert uuid.UUID(body["id"]).version == 4
    assert body["url"] == f"/download/{body['id']}"
    assert (body["width"], body["height"], body["config"], body["overridden"]) == (64, 64, promoted.digest, [])
    assert 0 <= body["seed"] < 2**63
    assert set(body["timings"]) == {"queued_ms", "denoise_ms", "total_ms"}
    assert body["timings"]["denoise_ms"] <= body["timings"]["total_ms"]


OVERRIDES = [
    ({}, []),
    ({"steps": 4, "width": 64}, []),
    ({"seed": None, "steps": None}, []),
    ({"steps": 3}, ["steps"]),
    ({"width": 128, "height": 72}, ["width", "height"]),
    ({"guidance_scale": 1, "scheduler": "dpmpp_2m_karras"}, ["scheduler", "guidance_scale"]),
    ({"negative_prompt": ""}, ["negative_prompt"]),
    ({"refiner": True}, ["refiner"]),
    ({"refiner": False}, []),
]


@pytest.mark.parametrize(("asked", "overridden"), OVERRIDES, ids=[json.dumps(asked) for asked, _ in OVERRIDES])
def test_the_pixels_are_those_of_the_engine(client, promoted, asked, overridden):
    body = client.post("/generate", json={**PROMPT, "seed": 7} | asked).json()
    assert body["overridden"] == overridden
    png = client.get(body["url"]).content
    record = read_record(png)
    assert (record.id, record.promoted, record.overridden) == (body["id"], promoted.digest, tuple(overridden))
    config = record.config
    assert record.digest == config.digest
    changes = {name: value for name, value in asked.items() if name not in ("refiner", "seed") and value is not None}
    if asked.get("refiner"):
        changes["refiner"] = config.refiner
        assert record.unet_calls == {"base": 3, "refiner": 1}
    assert config == promoted.with_(**changes)
    engine = client.app.state.jobs.deployment.engine
    drawn = engine.draw(ImageRequest(config, PROMPT["prompt"], body["seed"])).image
    assert np.array_equal(np.asarray(open_image(png)), np.asarray(drawn))


def test_without_a_seed_each_image_has_its_own_and_it_repeats_the_image(client):
    first, second = (client.post("/generate", json=PROMPT).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post("/generate", json={**PROMPT, "seed": first["seed"]}).json()
    assert again["id"] != first["id"]
    pixels = [np.asarray(open_image(client.get(body["url"]).content)) for body in (first, again, second)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_the_largest_seed_and_any_text_are_taken(client):
    prompt = "Katze 🐈 mit Hut\n\t\x7f‮ ' \" \\ </script> {}" + "é" * 200
    body = client.post("/generate", json={"prompt": prompt, "seed": 2**63 - 1}).json()
    assert body["seed"] == 2**63 - 1
    assert read_record(client.get(body["url"]).content).prompt == prompt


def test_a_prompt_beyond_75_tokens_is_drawn_with_a_warning(client):
    asked = {"prompt": "a red circle " * 25 + "in a hat", "negative_prompt": "blue " * 200}
    body = client.post("/generate", json=asked).json()
    assert [warning.split(":")[0] for warning in body["warnings"]] == ["prompt", "negative_prompt"]
    assert "read 75 of its 78 tokens and cut 'in a hat'" in body["warnings"][0]
    told = client.get(f"/images/{body['id']}").json()
    assert told["warnings"] == body["warnings"]
    assert told["record"]["tokens"]["prompt"] == {"tokens": 78, "limit": 75, "beyond": "in a hat"}


def test_a_second_prompt_is_drawn_and_told(client, promoted):
    asked = {"prompt": "a ring", "prompt_2": "a boat", "negative_prompt": "a", "negative_prompt_2": "b", "seed": 3}
    body = client.post("/generate", json=asked).json()
    told = client.get(f"/images/{body['id']}").json()
    assert (told["prompt"], told["prompt_2"]) == ("a ring", "a boat")
    request = ImageRequest(promoted.with_(negative_prompt="a", negative_prompt_2="b"), "a ring", 3, prompt_2="a boat")
    drawn = client.app.state.jobs.deployment.engine.draw(request).image
    assert np.array_equal(np.asarray(open_image(client.get(body["url"]).content)), np.asarray(drawn))


def test_many_images_at_once_with_long_prompts_all_come_out(client):
    answers = []

    def ask(number):
        answers.append(client.post("/generate", json={"prompt": "a ring " * (10 * number + 1), "seed": number}))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert len({answer.json()["id"] for answer in answers}) == 12


LONG = {**PROMPT, "steps": 100, "width": 512, "height": 512}


def post(port, body):
    connection = socket.create_connection(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = ["POST /generate HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + content)
    return connection


def test_a_client_that_goes_away_cancels_its_image(live):
    port, jobs, _ = live
    connection = post(port, LONG)
    wait_for(lambda: any(job.progress[0] for job in jobs.active.values()))
    (job,) = jobs.active.values()
    assert jobs.deployment.engine.stats().rows_in_flight == 2
    connection.close()
    wait_for(lambda: not jobs.active)
    calls, total = job.progress
    assert job.state == "cancelled"
    assert 0 < calls < total
    assert jobs.deployment.engine.stats().rows_in_flight == 0
    assert not list(jobs.store.folder.glob("*"))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
        assert answer.status == 200


def test_health_answers_while_a_image_is_drawn(live):
    port, jobs, _ = live
    with post(port, LONG):
        wait_for(lambda: any(job.state == "running" for job in jobs.active.values()))
        (job,) = jobs.active.values()
        began = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert answer.status == 200
        assert job.state == "running", f"the answer took {time.monotonic() - began:.2f} s"


def test_a_service_that_stops_answers_those_who_still_wait(live, caplog):
    port, jobs, server = live
    with post(port, LONG) as connection:
        wait_for(lambda: any(job.state == "running" for job in jobs.active.values()))
        server.should_exit = True
        connection.settimeout(60)
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 503 ")
    assert "retry-after: 5" in answer
    wait_for(lambda: not jobs.deployment.engine.healthy)
    assert not [entry for entry in caplog.records if entry.exc_info]


def test_a_cancelled_request_leaves_the_engine_whole(client):
    """A server that ends cancels its tasks: the engine's future must not be cancelled from outside."""
    jobs = client.app.state.jobs

    async def cancelled():
        job = await jobs.submit(ImageRequest(jobs.deployment.slot.config.with_(steps=100), "a ring", 1))
        waiting = asyncio.ensure_future(job)
        await asyncio.sleep(0.05)
        waiting.cancel()
        jobs.registry._entries[job.id].task.cancel()
        with pytest.raises(Stopping):
            await job

    client.portal.call(cancelled)
    assert not jobs.active
    assert client.post("/generate", json=PROMPT).status_code == 200
    assert jobs.deployment.engine.healthy


READ_NOTHING = {
    "JSON": ("/generate", PROMPT, {}),
    "PNG": ("/generate", PROMPT, {"Accept": "image/png"}),
    "WebP": ("/generate", PROMPT, {"Accept": "image/webp"}),
    "events": ("/generate", PROMPT, {"Accept": "text/event-stream"}),
    "OpenAI": ("/v1/images/generations", PROMPT | {"n": 2}, {}),
    "OpenAI, events": ("/v1/images/generations", PROMPT | {"stream": True}, {}),
}


@pytest.mark.parametrize(("path", "body", "headers"), READ_NOTHING.values(), ids=READ_NOTHING)
def test_an_image_that_was_just_drawn_is_not_read_back_from_the_store(client, monkeypatch, path, body, headers):
    get, read = obstore.get, []
    monkeypatch.setattr(obstore, "get", lambda objects, name: (read.append(name), get(objects, name))[1])
    assert client.post(path, json=body, headers=headers).status_code == 200
    assert read == []
