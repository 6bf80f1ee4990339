"""Replicas that share nothing but the object store: who holds a job's lease draws it, and who is asked claims it."""

import time
import uuid
from contextlib import ExitStack

import obstore
import pytest
from starlette.testclient import TestClient

from sdxl_lab.images import max_difference, open_image
from sdxl_lab.job import ImageRequest
from service.app import create_app
from service.jobs import registry
from service.jobs import store as stores
from service.jobs.leases import Leases
from service.jobs.manager import Key, fingerprint
from service.jobs.records import StoredImage
from service.jobs.store import Store, StoreUnreachable, UnknownImage
from service.settings import Settings
from tests.made import image_record
from tests.service.conftest import left_behind, wait_for, wait_until_ready

PROMPT = {"prompt": "a red ring"}
LATER = {"Prefer": "respond-async"}
LONG = {**PROMPT, "steps": 100, "width": 256, "height": 256}
ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.fixture(scope="module")
def objects():
    """Every store opened as `memory://` is this one."""
    with pytest.MonkeyPatch.context() as patch:
        objects = obstore.store.MemoryStore()
        patch.setattr(stores, "from_url", lambda *_, **__: objects)
        yield objects


@pytest.fixture
def shared(objects):
    """The store, empty."""
    for chunk in obstore.list(objects):
        obstore.delete(objects, [meta["path"] for meta in chunk])
    return Store("memory://")


@pytest.fixture(scope="module")
def replicas(slot, objects):
    with ExitStack() as stack:
        start = lambda: stack.enter_context(TestClient(create_app(Settings(slot=slot, store="memory://"))))  # noqa: E731
        yield [wait_until_ready(start()) for _ in range(3)]


@pytest.fixture
def two(replicas, shared):
    yield replicas[:2]
    for client in replicas:
        for image in list(jobs_of(client).active):
            client.delete(f"/jobs/{image}")
        wait_for(lambda client=client: not jobs_of(client).active)


def jobs_of(client):
    return client.app.state.jobs


def state(client, image):
    return client.get(f"/images/{image}").json()["state"]


def leave_behind(shared, config, age=0.0, **more):
    """What a replica leaves that was killed so many seconds ago."""
    record = left_behind(config, age, **more)
    shared.put_job(record)
    return record.id


def running(client, **more):
    """A long image that is being drawn."""
    image = client.post("/generate", json=LONG, headers=LATER | more).json()["id"]
    wait_for(lambda: client.get(f"/images/{image}").json()["step"] > 0)
    return image


def test_generate_on_one_replica_refine_on_another_download_from_a_third(replicas, shared):
    first, second, third = replicas
    drawn = first.post("/generate", json=PROMPT).json()
    refined = second.post("/refine", json={"id": drawn["id"]}).json()
    assert refined["source"] == drawn["id"]
    assert third.get(refined["url"]).content == second.get(refined["url"]).content
    assert [image["id"] for image in third.get("/images").json()["images"]] == [refined["id"], drawn["id"]]
    assert third.delete(f"/images/{drawn['id']}").status_code == 204
    assert first.get(drawn["url"]).status_code == 404


def test_another_replica_tells_the_state_and_leaves_a_held_job_alone(two):
    first, second = two
    image = running(first)
    wait_for(lambda: state(second, image) == "running")  # told as soon as it changes, not when the lease is renewed
    missing = second.get(f"/download/{image}")
    assert (missing.status_code, missing.json()["type"]) == (404, "urn:sdxl-lab:still-drawing")
    assert second.delete(f"/images/{image}").json()["type"] == "urn:sdxl-lab:not-over"
    second.portal.call(jobs_of(second).recovery.claim_unheld)
    assert not jobs_of(second).active
    first.delete(f"/jobs/{image}")


def test_a_job_whose_lease_ran_out_is_drawn_by_the_replica_that_is_asked(two, shared, promoted):
    client = two[0]
    expected = jobs_of(client).deployment.engine.draw(ImageRequest(promoted, "a ring", 1)).image
    held = leave_behind(shared, promoted, age=31, lease=3600)
    assert (state(client, held), client.get(f"/download/{held}").status_code) == ("running", 404)
    assert not jobs_of(client).active
    for ask in ("images", "download"):
        image = leave_behind(shared, promoted, age=31)
        client.get(f"/{ask}/{image}")
        wait_for(lambda image=image: state(client, image) == "done")
        assert max_difference(open_image(client.get(f"/download/{image}").content), expected) <= 1 / 255
        with pytest.raises(UnknownImage):
            shared.job(image)


def test_a_job_that_nobody_asks_for_is_found(two, shared, promoted, monkeypatch):
    client = two[0]
    monkeypatch.setattr(jobs_of(client).leases, "seconds", 0)  # what was written just now is old enough to be read
    held, left = leave_behind(shared, promoted, age=31, lease=3600), leave_behind(shared, promoted, age=31)
    ahead, given = leave_behind(shared, promoted, age=-(10**6)), leave_behind(shared, promoted, lease=0)
    obstore.put(shared._objects, f"jobs/{uuid.uuid4()}.json", b'{"no": "record"}')
    client.portal.call(jobs_of(client).recovery.claim_unheld)
    wait_for(lambda: not jobs_of(client).active)
    stored = {image["id"] for image in client.get("/images").json()["images"]}
    assert stored == {str(left), str(ahead), str(given)}
    assert shared.job(held).holder == "another"


def test_a_look_takes_only_what_this_replica_can_begin(serve, shared, promoted, monkeypatch):
    client = serve(store="memory://", max_rows=2)
    monkeypatch.setattr(jobs_of(client).leases, "seconds", 0)
    slow = promoted.with_(steps=100, width=256, height=256)
    images = [leave_behind(shared, slow, age=31, created=float(number)) for number in range(4)]
    client.portal.call(jobs_of(client).recovery.claim_unheld)
    assert list(jobs_of(client).active) == images[: len(jobs_of(client).active)]
    assert len(jobs_of(client).active) == 1
    for image in images:
        client.delete(f"/jobs/{image}")


def test_a_lease_is_renewed_while_the_image_is_drawn(two, shared):
    first = two[0]
    image = uuid.UUID(running(first))
    leases = jobs_of(first).leases
    wait_for(lambda: shared.job(image).state == "running")
    before = shared.job(image)
    assert (before.holder, before.lease) == (leases.replica, 30)
    leases._written[image] = ("running", time.monotonic() - leases.seconds / 3)
    wait_for(lambda: shared.job(image).renewed > before.renewed)
    first.delete(f"/jobs/{image}")


def test_a_image_is_cancelled_through_any_replica(two):
    first, second = two
    image = running(first)
    assert second.delete(f"/jobs/{image}").status_code == 204
    assert state(second, image) == "cancelled"
    assert second.delete(f"/jobs/{image}").json()["type"] == "urn:sdxl-lab:already-over"
    jobs_of(first).leases._written[uuid.UUID(image)] = ("running", -1e9)  # it is time to renew
    wait_for(lambda: not jobs_of(first).active)
    assert state(first, image) == "cancelled"


def test_a_image_cancelled_elsewhere_is_not_stored_even_if_it_was_drawn_before_the_mark_was_seen(two, monkeypatch):
    first, second = two
    monkeypatch.setattr(jobs_of(first).leases, "due", lambda *_: False)
    image = first.post("/generate", json=PROMPT | {"steps": 40}, headers=LATER).json()["id"]
    assert second.delete(f"/jobs/{image}").status_code == 204
    wait_for(lambda: not jobs_of(first).active)
    assert [state(client, image) for client in two] == ["cancelled"] * 2
    assert first.get(f"/download/{image}").status_code == 404


def test_a_image_that_is_being_stored_is_not_cancelled_elsewhere(two, shared, promoted):
    storing = leave_behind(shared, promoted, state="storing")
    answer = two[0].delete(f"/jobs/{storing}")
    assert answer.json()["type"] == "urn:sdxl-lab:already-over"
    assert state(two[0], storing) == "running"


@pytest.mark.slow
def test_a_key_joins_the_image_that_another_replica_draws(two):
    first, second = two
    keyed = {"Idempotency-Key": "joined"}
    asked = PROMPT | {"steps": 100, "width": 128, "height": 128}
    later = first.post("/generate", json=asked, headers=keyed | LATER).json()
    before = jobs_of(second).deployment.engine.stats().ticks
    again = second.post("/generate", json=asked, headers=keyed | LATER)
    assert (again.status_code, again.json()["id"]) == (202, later["id"])
    assert second.post("/generate", json=PROMPT, headers=keyed).json()["type"] == "urn:sdxl-lab:key-reused"
    events = second.post("/generate", json=asked, headers=keyed | {"Accept": "text/event-stream"}).text
    assert events.index("event: queued") < events.index("event: done")
    answers = [client.post("/generate", json=asked, headers=keyed).json() for client in two]
    assert answers[0] == answers[1]
    assert answers[0]["id"] == later["id"]
    assert jobs_of(second).deployment.engine.stats().ticks == before


def test_whoever_waits_for_a_replica_that_dies_gets_the_image_all_the_same(two, shared, promoted, monkeypatch):
    """The lease runs out while a client waits elsewhere."""
    client = two[0]
    key = Key("anyone", "orphan")
    image, seed = key.id, key.seed
    client.post("/generate", json=PROMPT, headers={"Idempotency-Key": "orphan"})
    kept = shared.record(image)
    png = shared.get(image)
    shared.delete(image)
    left = left_behind(promoted, id=image, fingerprint=kept.fingerprint, prompt="a red ring", seed=seed, lease=2)
    shared.put_job(left)
    answer = client.post("/generate", json=PROMPT, headers={"Idempotency-Key": "orphan"}).json()
    assert time.time() - left.renewed >= 2
    assert (answer["id"], answer["seed"]) == (str(image), seed)
    assert max_difference(open_image(shared.get(image)), open_image(png)) <= 1 / 255


@pytest.mark.parametrize(("ended", "status"), [("failed", 500), ("cancelled", 409)])
def test_whoever_waits_is_told_how_it_ended_elsewhere(two, shared, promoted, ended, status, monkeypatch):
    client = two[0]
    key = {"Idempotency-Key": ended}
    mark = fingerprint({"request": "GenerateRequest", **PROMPT})
    held = left_behind(promoted, id=Key("anyone", ended).id, fingerprint=mark)
    shared.put_job(held)
    look = jobs_of(client).recovery._look

    async def ends(waiting):
        shared.put_job(held.with_(state=ended))
        return await look(waiting)

    monkeypatch.setattr(jobs_of(client).recovery, "_look", ends)
    if status == 500:
        client = type(client)(client.app, raise_server_exceptions=False)
    assert client.post("/generate", json=PROMPT, headers=key).status_code == status


def test_two_replicas_that_get_one_key_at_once_draw_one_image(two, shared, monkeypatch):
    """The second one looks before the first has written, and writes after it."""
    first, second = two
    key = {"Idempotency-Key": "at once", **LATER}
    read, blind = Store.read_job, [True]

    def late(self, image):
        if self is jobs_of(second).store and blind:
            blind.clear()
            first.post("/generate", json=LONG, headers=key)
            raise UnknownImage(str(image))
        return read(self, image)

    monkeypatch.setattr(Store, "read_job", late)
    image = second.post("/generate", json=LONG, headers=key).json()["id"]
    assert not jobs_of(second).active
    assert uuid.UUID(image) not in jobs_of(second).registry.ended
    assert shared.job(uuid.UUID(image)).holder == jobs_of(first).leases.replica
    assert second.delete(f"/jobs/{image}").status_code == 204


def test_what_another_replica_stored_first_stands(two, shared, monkeypatch):
    """A replica that was too slow to renew finds its image stored."""
    first = two[0]
    monkeypatch.setattr(jobs_of(first).leases, "due", lambda *_: False)
    image = uuid.UUID(first.post("/generate", json=PROMPT | {"steps": 40}, headers=LATER).json()["id"])
    kept = StoredImage(id=image, created=1.0, record=image_record(), fingerprint="")
    shared.put(kept, b"theirs")
    shared.drop_job(image)
    wait_for(lambda: not jobs_of(first).active)
    assert shared.get(image) == b"theirs"
    assert shared.record(image) == kept


def test_a_image_waits_for_a_store_that_does_not_answer(two, monkeypatch):
    first = two[0]
    monkeypatch.setattr(registry, "RETRY", 0.01)
    put, refused = Store.put, []

    def out(*arguments):
        if len(refused) < 3:
            refused.append(arguments)
            raise StoreUnreachable("the store does not answer")
        return put(*arguments)

    monkeypatch.setattr(Store, "put", out)
    assert first.post("/generate", json=PROMPT).status_code == 200
    refused.clear()
    later = first.post("/generate", json=PROMPT, headers=LATER).json()
    wait_for(lambda: state(first, later["id"]) == "done")
    assert len(refused) == 3


def test_a_store_that_stays_away_costs_an_attempt_and_no_image(two, shared, monkeypatch):
    first, second = two
    monkeypatch.setattr(registry, "OUTAGE", 0)
    put = Store.put

    def out(*_):
        raise StoreUnreachable("the store does not answer")

    monkeypatch.setattr(Store, "put", out)
    answer = first.post("/generate", json=PROMPT, headers={"Idempotency-Key": "away"})
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:sdxl-lab:store-unreachable")
    monkeypatch.setattr(Store, "put", put)
    image = Key("anyone", "away").id
    assert state(second, image) == "running"  # by the lease that the first one still has
    assert first.post("/generate", json=PROMPT, headers={"Idempotency-Key": "away"}).json()["id"] == str(image)
    assert state(second, image) == "done"


def test_what_a_stop_gives_back_is_free_at_once_and_no_attempt(serve, two, shared):
    first, second = serve(store="memory://"), two[0]
    image = running(first)
    first.portal.call(jobs_of(first).drain, 0)
    left = shared.job(uuid.UUID(image))
    assert (left.lease, left.attempts, left.state) == (0, 0, "queued")
    assert state(second, image) in ("queued", "running")
    assert uuid.UUID(image) in jobs_of(second).active
    second.delete(f"/jobs/{image}")


def test_a_job_for_other_models_is_left_to_their_replicas_for_a_while(two, shared, promoted):
    client = two[0]
    other = promoted.with_(model=promoted.model.with_(base="elsewhere"))
    young, old = leave_behind(shared, other, 31, created=time.time()), leave_behind(shared, other, 31)
    assert (state(client, young), state(client, old)) == ("running", "running")
    assert (shared.job(young).state, shared.job(old).state) == ("running", "failed")


def test_a_job_is_not_failed_because_the_store_does_not_answer(two, shared, promoted, monkeypatch):
    client = two[0]
    refined = leave_behind(shared, promoted, 31, source=ID, strength=0.3)
    get = Store.get

    def out(self, image):
        raise StoreUnreachable("the store does not answer")

    monkeypatch.setattr(Store, "get", out)
    assert client.get(f"/images/{refined}").status_code == 503
    monkeypatch.setattr(Store, "get", get)
    assert shared.job(refined).state == "running"
    client.get(f"/images/{refined}")
    assert shared.job(refined).state == "failed"  # its source is gone


# --- the lease itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(shared):
    return Leases(shared, 30), Leases(shared, 30)


@pytest.fixture
def asked(promoted):
    return left_behind(promoted, id=ID)


def expire(shared):
    shared.put_job(shared.job(ID).with_(renewed=time.time() - 31))


def test_a_lease_goes_from_hand_to_hand(pair, shared, asked):
    first, second = pair
    first.take(asked, None)
    job, version = shared.read_job(ID)
    assert (first.free(job), second.free(job)) == (True, False)
    assert first.renew(ID, "running") == "held"
    with pytest.raises(stores.RecordChanged):
        second.take(asked, version)  # it was renewed since
    expire(shared)
    job, version = shared.read_job(ID)
    assert second.free(job)
    second.take(job, version)
    assert first.renew(ID, "running") == "lost"
    first.fail(ID)  # no longer its business
    first.give_back(ID)
    assert shared.job(ID).state == "queued"
    assert shared.job(ID).lease == 30
    expire(shared)
    assert first.renew(ID, "running") == "held"  # the second one is gone, too
    assert second.cancel(ID) is None
    assert first.renew(ID, "storing") == "cancelled"
    assert second.cancel(ID) == "cancelled"
    first.drop(ID)
    assert second.renew(ID, "running") == "gone"


def test_a_renewal_and_a_cancel_at_once_keep_the_mark(pair, shared, monkeypatch, asked):
    first, second = pair
    first.take(asked, None)
    swap, meanwhile = Store.swap_job, [True]

    def cancelled_first(self, *arguments):
        if meanwhile:
            meanwhile.clear()
            second.cancel(ID)
        return swap(self, *arguments)

    monkeypatch.setattr(Store, "swap_job", cancelled_first)
    assert first.renew(ID, "running") == "cancelled"


def test_a_renewal_that_comes_late_does_not_hide_that_the_image_is_being_stored(pair, shared, asked):
    first, second = pair
    first.take(asked, None)
    assert first.renew(ID, "storing") == "held"
    assert first.renew(ID, "running") == "held"
    assert second.cancel(ID) == "storing"


def test_a_take_whose_answer_was_lost_is_ours(pair, shared, asked):
    first, second = pair
    first.take(asked, None)
    first.take(asked, None)
    with pytest.raises(stores.RecordChanged):
        second.take(asked, None)


@pytest.mark.parametrize("error", [NotImplementedError(), obstore.exceptions.GenericError("501 Not Implemented")])
def test_a_store_without_conditions_takes_what_comes_last(pair, shared, monkeypatch, error, asked):
    put = obstore.put

    def unconditional(objects, path, content, mode, **more):
        if mode != "overwrite":
            raise error
        return put(objects, path, content, mode=mode, **more)

    monkeypatch.setattr(obstore, "put", unconditional)
    first, second = pair
    first.take(asked, None)
    second.take(asked, None)
    assert (first.renew(ID, "running"), second.renew(ID, "running")) == ("lost", "held")


def test_looking_reads_each_ended_record_once_and_removes_it_after_a_day(shared, promoted, monkeypatch):
    leases = Leases(shared, 0)
    ended = [uuid.uuid4() for _ in range(3)]
    for each in ended:
        leave_behind(shared, promoted, id=each, state="failed")
    read, reads = Store.job, []
    monkeypatch.setattr(Store, "job", lambda self, job: reads.append(job) or read(self, job))
    for _ in range(3):
        assert leases.unheld() == []
    assert sorted(reads) == sorted(ended)
    monkeypatch.setattr("service.jobs.leases.REMEMBERED", 0)
    leases.unheld()
    assert list(shared.job_names()) == []


def test_what_was_renewed_within_a_lease_is_not_read(shared, monkeypatch, asked):
    Leases(shared, 30).take(asked, None)
    monkeypatch.setattr(Store, "job", lambda *_: pytest.fail("it was read"))
    assert Leases(shared, 30).unheld() == []


def test_a_look_reads_only_so_many(shared, promoted, monkeypatch):
    monkeypatch.setattr("service.jobs.leases.LOOKS", 2)
    for _ in range(5):
        leave_behind(shared, promoted, 31)
    assert len(Leases(shared, 0).unheld()) == 2


def test_a_key_waits_for_a_replica_that_has_the_models_of_its_job(two, shared, promoted):
    """While one configuration takes the place of another: the client must not be told of a model it never named."""
    first, _ = two
    keyed = {"Idempotency-Key": "rolled out"}
    image = Key("anyone", "rolled out").id
    other = promoted.with_(model=promoted.model.with_(base="elsewhere"))
    mark = fingerprint({"request": "GenerateRequest", **PROMPT})
    leave_behind(shared, other, 100, id=image, created=time.time(), fingerprint=mark)
    answer = first.post("/generate", json=PROMPT, headers=keyed | LATER)
    assert (answer.status_code, answer.json()["id"]) == (202, str(image))
    shared.drop_job(image)
