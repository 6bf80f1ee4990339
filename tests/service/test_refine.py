import uuid

import numpy as np
import pytest

from sdxl_lab.images import open_image, read_record
from sdxl_lab.job import ImageRequest
from sdxl_lab.source import SourceImage
from service.jobs.records import StoredImage
from tests.made import image_record
from tests.service.conftest import NOBODYS


@pytest.fixture(scope="module")
def source(client):
    asked = {"prompt": "a red ring", "negative_prompt": "blue", "width": 128, "height": 64, "seed": 3}
    return client.post("/generate", json=asked).json()


def test_a_stored_image_is_refined_as_the_engine_does_it(client, promoted, source):
    body = client.post("/refine", json={"id": source["id"], "seed": 5}).json()
    assert body["source"] == source["id"]
    assert body["id"] != source["id"]
    assert (body["width"], body["height"], body["seed"], body["config"]) == (128, 64, 5, promoted.digest)
    png, before = (client.get(url).content for url in (body["url"], source["url"]))
    record = read_record(png)
    assert (record.prompt, record.config.negative_prompt, record.strength) == ("a red ring", "blue", 0.3)
    assert record.source == read_record(before)
    assert record.id == body["id"]
    config = promoted.with_(width=128, height=64, negative_prompt="blue")
    job = ImageRequest(
        config, "a red ring", 5, SourceImage(open_image(before), 0.3, read_record(before), stage="refiner")
    )
    drawn = client.app.state.jobs.deployment.engine.draw(job).image
    assert np.array_equal(np.asarray(open_image(png)), np.asarray(drawn))


def test_what_is_asked_goes_before_what_the_image_had(client, source):
    asked = {"id": source["id"].upper(), "prompt": "a blue ring", "negative_prompt": "", "strength": 1, "steps": 2}
    body = client.post("/refine", json=asked).json()
    assert body["source"] == source["id"]
    record = read_record(client.get(body["url"]).content)
    assert (record.prompt, record.config.negative_prompt, record.strength) == ("a blue ring", "", 1)
    assert record.unet_calls == {"refiner": 2}


def test_a_refined_image_can_be_refined(client, source):
    once = client.post("/refine", json={"id": source["id"]}).json()
    twice = client.post("/refine", json={"id": once["id"]}).json()
    assert read_record(client.get(twice["url"]).content).source.source.id == source["id"]


@pytest.mark.parametrize("unknown", [NOBODYS, "../../etc/passwd", "", "\0", "é", "nil"])
def test_an_unknown_id_is_404(client, unknown):
    assert client.post("/refine", json={"id": unknown}).status_code == 404


BAD = [
    ({"strength": 0}, "strength"),
    ({"strength": 1.1}, "strength"),
    ({"strength": True}, "strength"),
    ({"strength": 0.1}, "strength"),  # of 4 steps none is left
    ({"steps": 101}, "steps"),
    ({"prompt": ""}, "prompt"),
    ({"width": 64}, "width"),
]


@pytest.mark.parametrize(("asked", "field"), BAD)
def test_a_bad_value_is_refused_by_name(client, source, asked, field):
    answer = client.post("/refine", json={"id": source["id"]} | asked)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_a_image_that_is_not_ours_is_refused(client, source):
    foreign = uuid.uuid4()
    client.app.state.jobs.store.put(StoredImage(id=foreign, created=1.0, record=image_record()), b"no image")
    answer = client.post("/refine", json={"id": str(foreign)})
    assert (answer.status_code, answer.json()["field"]) == (422, "id")


def test_a_image_that_somebody_put_into_the_store_is_refined_and_listed(slot, serve, tmp_path):
    """Its own record does not know under which id it was put there."""
    origin, golden = uuid.uuid4(), next((slot / "golden").iterdir())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{origin}.png").write_bytes(golden.read_bytes())
    client = serve()
    refined = client.post("/refine", json={"id": str(origin)})
    assert (refined.status_code, refined.json()["source"]) == (200, str(origin))
    assert client.get(f"/images/{refined.json()['id']}").json()["source"] == str(origin)
    assert {image["id"] for image in client.get("/images").json()["images"]} == {str(origin), refined.json()["id"]}


def test_a_key_stands_for_its_image_even_when_the_source_is_gone(client):
    keyed = {"Idempotency-Key": "of a source that goes"}
    origin = client.post("/generate", json={"prompt": "a red ring"}).json()["id"]
    asked = {"id": origin, "seed": 5}
    made = client.post("/refine", json=asked, headers=keyed).json()
    assert client.delete(f"/images/{origin}").status_code == 204
    assert client.post("/refine", json=asked, headers=keyed).json() == made
    assert client.post("/refine", json=asked | {"seed": 6}, headers=keyed).json()["type"] == "urn:sdxl-lab:key-reused"
    assert client.post("/refine", json=asked).json()["type"] == "urn:sdxl-lab:unknown-image"


def test_second_prompts_go_with_the_first_ones(client):
    both = {"prompt": "a ring", "prompt_2": "a boat", "negative_prompt": "a", "negative_prompt_2": "b"}
    source = client.post("/generate", json=both | {"seed": 3}).json()["id"]

    def said(**asked):
        body = client.post("/refine", json={"id": source, **asked}).json()
        record = read_record(client.get(body["url"]).content)
        return (record.prompt, record.prompt_2, record.config.negative_prompt, record.config.negative_prompt_2)

    assert said() == ("a ring", "a boat", "a", "b")
    assert said(prompt="a cat", negative_prompt="c") == ("a cat", None, "c", None)
    assert said(prompt_2="a cat", negative_prompt_2="c") == ("a ring", "a cat", "a", "c")
