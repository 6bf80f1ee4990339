"""What the service wrote and reads back, be it 0.1.0 that wrote it.

`store_of_0_1_0` is a store as 0.1.0 left it: an image, another one refined from it, and a job that was given back by a
service that stopped.
"""

import json
import shutil
import uuid
from pathlib import Path

import pytest

from sdxl_lab.record import RecordError
from service.jobs.manager import Key, fingerprint
from service.jobs.records import JobRecord, StoredImage
from service.jobs.store import Store
from tests.service.conftest import left_behind

OLD = Path(__file__).parent / "store_of_0_1_0"
DRAWN, REFINED = uuid.UUID("7ef4edb0-13ee-5dee-a7ea-e82da3b16f91"), uuid.UUID("b3b7e688-01a8-414b-a379-ebedfd31923c")
LEFT = uuid.UUID("ccf88ce7-fbed-4bbf-9e2f-a486006a7292")
BODY = {"prompt": "A cat in a hat", "negative_prompt": "blurry", "steps": 2, "width": 128, "height": 128, "seed": 7}


@pytest.fixture
def old(tmp_path):
    """A copy of the old store."""
    return Path(shutil.copytree(OLD, tmp_path / "images"))


def test_images_of_0_1_0_are_read_and_listed(old):
    store = Store(old)
    assert [image.id for image in store.page(10).records] == [REFINED, DRAWN]
    drawn, refined = store.record(DRAWN), store.record(REFINED)
    assert (drawn.record.prompt, drawn.record.seed) == ("A cat in a hat", 7)
    assert drawn.fingerprint == fingerprint({"request": "GenerateRequest", **BODY})
    assert drawn.id == Key("anyone", "of 0.1.0").id
    assert set(drawn.timings) == {"queued_ms", "denoise_ms", "total_ms"}
    assert refined.record.source.id == str(DRAWN)
    for each in (drawn, refined):
        assert each.request().config.width == 128
        plain = json.loads((OLD / f"{each.id}.json").read_text())
        assert {name: each.flat()[name] for name in ("prompt", "seed", "timings", "created", "id")} == {
            name: plain[name] for name in ("prompt", "seed", "timings", "created", "id")
        }


def test_a_job_of_0_1_0_is_read_and_can_be_made_again(old):
    record = Store(old).job(LEFT)
    assert (record.state, record.attempts, record.lease, record.source) == ("queued", 0, 0, None)
    assert (record.request().prompt, record.request().config.steps) == ("a red ring", 3)


def test_clients_find_the_images_of_0_1_0(serve, old):
    client = serve(store=old)
    assert [image["id"] for image in client.get("/images").json()["images"]] == [str(REFINED), str(DRAWN)]
    for image in (DRAWN, REFINED):
        assert client.get(f"/images/{image}").json()["record"]["id"] == str(image)
        assert client.get(f"/download/{image}").content == (OLD / f"{image}.png").read_bytes()
    again = client.post("/generate", json=BODY, headers={"Idempotency-Key": "of 0.1.0"})
    assert (again.status_code, again.json()["id"]) == (200, str(DRAWN))


@pytest.mark.parametrize("kind", [JobRecord, StoredImage])
def test_what_is_written_carries_a_schema_number_and_comes_back(kind, promoted, old):
    record = left_behind(promoted) if kind is JobRecord else Store(old).record(DRAWN)
    assert json.loads(record.to_json())["schema"] == 1
    assert kind.read(record.to_json(), "x.json") == record


def test_a_replica_of_0_1_0_reads_what_is_written_of_a_job(promoted):
    """During an update both share a store, and a record that the old one cannot read would be failed by it."""
    plain = json.loads((OLD / "jobs" / f"{LEFT}.json").read_text())
    assert set(plain) == set(json.loads(left_behind(promoted).to_json())) - {"schema"}


DAMAGED = {
    "no JSON": b"{",
    "no object": b"[]",
    "of a newer version": json.dumps({"schema": 2}).encode(),
    "without a field": json.dumps({"schema": 1, "id": str(DRAWN)}).encode(),
    "old, and without a field": b"{}",
}


@pytest.mark.parametrize("kind", [JobRecord, StoredImage])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_cannot_be_read_is_named_and_hides_nothing_else(kind, content, old):
    with pytest.raises(RecordError, match=r" of x\.json "):
        kind.read(content, "x.json")
    (old / f"{DRAWN}.json").write_bytes(content)
    assert [image.id for image in Store(old).page(10).records] == [REFINED]
