"""Images that are drawn whoever waits: asked for now, told later, through restarts."""

import asyncio
import gc
import logging
import threading
import time
import uuid
import weakref
from types import SimpleNamespace

import obstore
import pytest
import torch

from sdxl_lab.diffusion import engine as engines
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.images import max_difference, open_image
from sdxl_lab.job import ImageRequest
from service.deployment import Stopping
from service.jobs import recovery, registry
from service.jobs.manager import Terms
from service.jobs.store import UnknownImage
from tests.service.conftest import left_behind, wait_for

PROMPT = {"prompt": "a red ring"}
LATER = {"Prefer": "respond-async"}
LONG = {**PROMPT, "steps": 100, "width": 512, "height": 512}


def state(client, image):
    return client.get(f"/images/{image}").json()["state"]


def test_a_image_is_promised_at_once_and_drawn_later(client):
    answer = client.post("/generate", json=PROMPT, headers=LATER)
    body = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == body["url"] == f"/images/{body['id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    wait_for(lambda: state(client, body["id"]) == "done")
    assert client.get(client.get(body["url"]).json()["url"]).headers["content-type"] == "image/png"


@pytest.mark.parametrize("prefer", ["respond-async, wait=10", "wait=10, Respond-Async", "respond-async; foo"])
def test_the_preference_may_stand_among_others(client, prefer):
    assert client.post("/generate", json=PROMPT, headers={"Prefer": prefer}).status_code == 202


def test_another_preference_changes_nothing(client):
    assert client.post("/generate", json=PROMPT, headers={"Prefer": "return=minimal"}).status_code == 200


def test_a_refined_image_may_be_promised_too(client):
    source = client.post("/generate", json=PROMPT).json()["id"]
    body = client.post("/refine", json={"id": source}, headers=LATER).json()
    wait_for(lambda: state(client, body["id"]) == "done")
    assert client.get(body["url"]).json()["source"] == source


def test_the_states_of_two_images_from_the_queue_to_their_ends(serve):
    client = serve(max_rows=2)
    first, second = (client.post("/generate", json=LONG, headers=LATER).json()["id"] for _ in range(2))
    wait_for(lambda: client.get(f"/images/{first}").json().get("step", 0) > 0)
    running, queued = (client.get(f"/images/{each}").json() for each in (first, second))
    assert (running["state"], running["position"], running["steps"]) == ("running", 0, 100)
    assert (queued["state"], queued["position"], queued["step"]) == ("queued", 1, 0)
    assert 0 < running["eta"] < queued["eta"]
    assert (queued["prompt"], queued["settings"]["steps"]) == ("a red ring", 100)
    for each in (second, first):
        assert client.delete(f"/jobs/{each}").status_code == 204
        assert state(client, each) == "cancelled"
        again = client.delete(f"/jobs/{each}")
        assert (again.status_code, again.json()["type"]) == (409, "urn:sdxl-lab:already-over")
    assert not client.app.state.jobs.active
    assert client.get("/images").json()["images"] == []


def test_a_finished_image_is_not_cancelled(client):
    image = client.post("/generate", json=PROMPT).json()
    answer = client.delete(f"/jobs/{image['id']}")
    assert (answer.status_code, "retry-after" in answer.headers) == (409, False)
    assert client.get(image["url"]).status_code == 200


def test_a_image_in_the_making_is_not_deleted(client):
    image = client.post("/generate", json=LONG, headers=LATER).json()["id"]
    answer = client.delete(f"/images/{image}")
    assert client.delete(f"/jobs/{image}").status_code == 204
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:sdxl-lab:not-over")


def test_a_image_that_fails_says_so(client, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(client.app.state.jobs.registry, "_put", broken)
    image = client.post("/generate", json=PROMPT, headers=LATER).json()["id"]
    wait_for(lambda: state(client, image) == "failed")
    assert client.get(f"/download/{image}").status_code == 404


def test_an_engine_that_fails_ends_all_that_it_draws(serve, monkeypatch):
    client = serve()
    jobs = client.app.state.jobs
    kept = client.post("/generate", json=PROMPT).json()
    image = client.post("/generate", json=LONG, headers=LATER).json()["id"]

    def broken(*_):
        raise MemoryError("the engine's own bug")

    monkeypatch.setattr(jobs.deployment.engine, "_tick", broken)
    wait_for(lambda: not jobs.active)
    assert state(client, image) == "failed"
    assert client.post("/generate", json=PROMPT).status_code == 503
    assert client.get(kept["url"]).status_code == 200


def test_what_ended_without_a_image_is_forgotten_in_time(client, monkeypatch):
    jobs = client.app.state.jobs

    async def ended():
        job = await jobs.submit(ImageRequest(jobs.deployment.slot.config, "a ring", 1))
        jobs.leave(job)
        await asyncio.wait({jobs.registry._entries[job.id].task})
        return job

    first = client.portal.call(ended)
    assert jobs.registry.ended[first.id].state == first.state == "cancelled"
    monkeypatch.setattr(registry, "MOST_REMEMBERED", 1)
    second = client.portal.call(ended)
    assert list(jobs.registry.ended) == [second.id]
    monkeypatch.setattr(registry, "REMEMBERED", 0)
    client.portal.call(ended)
    assert not jobs.registry.ended


def drawn(client, promoted, asked, image):
    """Whether the stored image is what the engine draws of this request."""
    info = client.get(f"/images/{image}").json()
    config = promoted.with_(**{name: value for name, value in asked.items() if name != "prompt"})
    expected = client.app.state.jobs.deployment.engine.draw(ImageRequest(config, asked["prompt"], info["seed"])).image
    stored = open_image(client.get(info["url"]).content)
    return max_difference(stored, expected) <= 1 / 255  # another batch rounds another pixel


@pytest.mark.slow
def test_what_a_service_that_stops_has_promised_the_next_one_draws(serve, promoted, tmp_path):
    asked = {**PROMPT, "steps": 30, "width": 128, "height": 128}
    client = serve(max_rows=2)
    ids = [client.post("/generate", json=asked, headers=LATER).json()["id"] for _ in range(2)]
    seeds = [client.get(f"/images/{each}").json()["seed"] for each in ids]
    client.portal.call(client.app.state.jobs.drain, 0)
    for each in ids:
        assert state(client, each) == "queued"
        missing = client.get(f"/download/{each}")
        assert (missing.status_code, missing.headers["retry-after"]) == (404, "1")
    next_one = serve(max_rows=16)
    for each, seed in zip(ids, seeds, strict=True):
        wait_for(lambda each=each: state(next_one, each) == "done")
        assert next_one.get(f"/images/{each}").json()["seed"] == seed
        assert drawn(next_one, promoted, asked, each)
    assert list(next_one.app.state.jobs.store.job_names()) == []


def leave_behind(client, config, **more):
    """What a process that was killed leaves of a durable job."""
    record = left_behind(config, renewed=1.0, **more)
    client.app.state.jobs.store.put_job(record)
    return record.id


def claim_unheld(client):
    client.portal.call(client.app.state.jobs.recovery.claim_unheld)


def test_a_job_that_ends_the_process_each_time_is_given_up(client, promoted):
    image = leave_behind(client, promoted, attempts=recovery.ATTEMPTS)
    claim_unheld(client)
    assert state(client, image) == "failed"


def test_a_job_for_other_models_fails(client, promoted):
    image = leave_behind(client, promoted.with_(model=promoted.model.with_(base="elsewhere")))
    claim_unheld(client)
    assert state(client, image) == "failed"


def test_a_job_whose_image_is_stored_is_not_drawn_again(client, promoted):
    jobs = client.app.state.jobs
    body = client.post("/generate", json=PROMPT, headers={"Idempotency-Key": "kept"}).json()
    leave_behind(client, promoted, id=uuid.UUID(body["id"]))
    before = jobs.deployment.engine.stats().ticks
    claim_unheld(client)
    assert jobs.deployment.engine.stats().ticks == before
    with pytest.raises(UnknownImage):
        jobs.store.job(uuid.UUID(body["id"]))


def test_a_full_store_promises_nothing(client, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(obstore, "put", full)
    assert client.post("/generate", json=PROMPT, headers=LATER).status_code == 507
    wait_for(lambda: client.app.state.jobs.deployment.engine.stats().running == 0)
    assert not client.app.state.jobs.active


def test_a_service_that_drains_ends_what_runs_and_tells_the_rest(serve):
    client = serve(max_rows=2)
    jobs = client.app.state.jobs
    config = jobs.deployment.slot.config

    async def drained():
        running = await jobs.submit(ImageRequest(config.with_(steps=30, width=128, height=128), "a ring", 1))
        await asyncio.to_thread(wait_for, lambda: running.progress[0])
        waiting = await jobs.submit(ImageRequest(config, "a ring", 1))
        await jobs.drain(30)
        with pytest.raises(Stopping):
            await waiting
        return await running

    stored = client.portal.call(drained)
    assert client.get(f"/download/{stored.image.id}").status_code == 200
    answer = client.post("/generate", json=PROMPT)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_drain_does_not_wait_for_an_engine_that_is_stuck(serve, monkeypatch):
    client = serve()
    jobs = client.app.state.jobs
    gate, step = threading.Event(), Engine._step

    def stuck(*arguments):
        gate.wait(60)
        return step(*arguments)

    monkeypatch.setattr(Engine, "_step", stuck)

    async def drained():
        request = ImageRequest(jobs.deployment.slot.config, "a ring", 1)
        job, durable = await jobs.submit(request), await jobs.submit(request, Terms(durable=True))
        await asyncio.to_thread(wait_for, lambda: job.state == "running")
        await jobs.drain(0.1)
        with pytest.raises(Stopping):
            await job
        return durable.id

    try:
        durable = client.portal.call(drained)
    finally:
        gate.set()
    assert jobs.store.job(durable).lease == 0


def test_every_answer_of_ours_is_documented(client):
    """Statuses, headers, forms and examples in OpenAPI, of the table that makes the answers."""
    document = client.get("/openapi.json").json()
    for path in ("/generate", "/refine"):
        described = document["paths"][path]["post"]["responses"]
        assert {"200", "202", "409", "413", "422", "429", "503", "507"} <= set(described)
        assert set(described["200"]["content"]) == {
            "application/json", "text/event-stream", "image/png", "image/webp", "image/jpeg"
        }  # fmt: skip
        assert {"X-Image-Id", "X-Seed", "X-Config-Digest", "X-Accel-Buffering"} == set(described["200"]["headers"])
        assert {"Location", "Preference-Applied"} == set(described["202"]["headers"])
        for status in ("429", "503"):
            assert "Retry-After" in described[status]["headers"]
        for status in ("409", "413", "422", "429", "503", "507"):
            (form,) = described[status]["content"]
            assert form == "application/problem+json"
            assert described[status]["content"][form]["examples"]
    for path, method, statuses in (
        ("/images", "get", {"200", "422"}),
        ("/images/{id}", "get", {"200", "404"}),
        ("/images/{id}", "delete", {"204", "404", "409", "507"}),
        ("/jobs/{id}", "delete", {"204", "404", "409"}),
        ("/download/{id}", "get", {"200", "304", "404", "422"}),
    ):
        assert statuses <= set(document["paths"][path][method]["responses"])


@pytest.mark.slow
def test_retry_after_is_within_a_factor_of_two_of_the_wait(serve, monkeypatch):
    """Under load: the queue stays full, and each trial asks as soon as the one before was let in. A call takes as long
    as on a GPU, by a clock that only calls move: what else this machine does is not waited for."""
    predict, clock = Engine._predict, [0.0]

    def slow(*arguments):
        time.sleep(0.05)
        clock[0] += 0.05
        return predict(*arguments)

    monkeypatch.setattr(Engine, "_predict", slow)
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    client = serve(max_rows=2, max_queue=2)
    load = {**PROMPT, "steps": 40}
    ids = []
    while (answer := client.post("/generate", json=load, headers=LATER)).status_code == 202:
        ids.append(answer.json()["id"])
        wait_for(lambda: client.app.state.jobs.deployment.engine.stats().running == 1)
    wait_for(lambda: client.get(f"/images/{ids[0]}").json().get("step", 0) > 5)
    ratios = []
    for _ in range(3):
        asked = clock[0]
        refused = client.post("/generate", json=load, headers=LATER)
        assert refused.status_code == 429
        while (answer := client.post("/generate", json=load, headers=LATER)).status_code == 429:
            time.sleep(0.05)
        ratios.append(int(refused.headers["retry-after"]) / (clock[0] - asked))
        ids.append(answer.json()["id"])
    for each in ids:
        client.delete(f"/jobs/{each}")
    assert 0.5 <= sorted(ratios)[1] <= 2, ratios


def test_a_failed_image_keeps_nothing_of_what_it_was_drawn_with(serve, monkeypatch):
    client, held = serve(), []

    def failing(*_):
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise RuntimeError("the call failed") from ValueError("for a reason")

    monkeypatch.setattr(Engine, "_predict", failing)
    logging.disable(logging.CRITICAL)  # pytest keeps what is logged, with its frames
    try:
        assert client.post("/generate", json=PROMPT).status_code == 500
    finally:
        logging.disable(logging.NOTSET)
    jobs = client.app.state.jobs
    wait_for(lambda: len(jobs.registry.ended) == 1)
    assert held

    def let_go():
        gc.collect()
        return all(reference() is None for reference in held)

    wait_for(let_go, 20)  # the engine's thread may still be about to
    (ended,) = jobs.registry.ended.values()
    assert ended.state == "failed"


def held_back(monkeypatch, owner, name):
    """Calls of `owner.name` wait; (what says that one came, what lets them go)."""
    came, go = threading.Event(), threading.Event()
    honest = getattr(owner, name)

    def waiting(*arguments, **more):
        came.set()
        assert go.wait(60)
        return honest(*arguments, **more)

    monkeypatch.setattr(owner, name, waiting)
    return came, go


def test_a_image_cancelled_after_its_last_step_is_not_stored(client, monkeypatch):
    decoding, go = held_back(monkeypatch, Engine, "_decode")
    monkeypatch.setattr(registry, "ANSWER", 0.1)
    image = client.post("/generate", json=PROMPT, headers=LATER).json()["id"]
    assert decoding.wait(60)
    assert client.delete(f"/jobs/{image}").status_code == 204
    go.set()
    wait_for(lambda: state(client, image) == "cancelled")
    assert client.get(f"/download/{image}").status_code == 404


def test_whoever_cancels_a_image_that_is_being_stored_learns_what_came_first(client, monkeypatch):
    storing, go = held_back(monkeypatch, client.app.state.jobs.store, "put")
    monkeypatch.setattr(registry, "ANSWER", 0.1)
    image = client.post("/generate", json=PROMPT, headers=LATER).json()["id"]
    assert storing.wait(60)
    threading.Timer(0.5, go.set).start()
    assert client.delete(f"/jobs/{image}").json()["type"] == "urn:sdxl-lab:already-over"
    assert state(client, image) == "done"


def test_a_drain_does_not_wait_for_a_store_that_is_stuck(serve, monkeypatch):
    client = serve()
    jobs = client.app.state.jobs
    storing, go = held_back(monkeypatch, jobs.store, "put")

    async def drained():
        job = await jobs.submit(ImageRequest(jobs.deployment.slot.config, "a ring", 1))
        await asyncio.to_thread(storing.wait, 60)
        await jobs.drain(0.1, 0.1)
        with pytest.raises(Stopping):
            await asyncio.wait_for(job, 5)

    try:
        client.portal.call(drained)
    finally:
        go.set()
    wait_for(lambda: not jobs.active)


def test_a_key_counts_how_often_its_image_was_begun(client, promoted):
    """An image that ends the process must not do so for ever because its client comes back."""
    jobs, keyed = client.app.state.jobs, {"Idempotency-Key": "again and again"}
    image = uuid.UUID(client.post("/generate", json=PROMPT, headers=keyed).json()["id"])
    mark, begun = jobs.store.record(image).fingerprint, []
    jobs.registry.observers.append(lambda job: begun.append(jobs.registry.record(job.id).attempts))
    for attempts, status in ((2, 200), (recovery.ATTEMPTS, 500)):
        client.delete(f"/images/{image}")
        leave_behind(client, promoted, id=image, fingerprint=mark, attempts=attempts)
        assert client.post("/generate", json=PROMPT, headers=keyed).status_code == status
    assert begun == [3]
