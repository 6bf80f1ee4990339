"""Stored images: listed, told, deleted."""

import pytest

from sdxl_lab.images import read_record
from service.api.negotiation import accepted
from tests.service.conftest import NOBODYS

PROMPT = {"prompt": "a red ring", "negative_prompt": "blue", "seed": 3}


@pytest.fixture(scope="module")
def image(client):
    return client.post("/generate", json=PROMPT | {"steps": 3}).json()


def test_a_image_is_told_with_all_that_repeats_it(client, image, promoted):
    info = client.get(f"/images/{image['id']}").json()
    record = info.pop("record")
    assert info.pop("created") > 1.7e9
    assert info == {
        **{name: image[name] for name in ("id", "url", "seed", "width", "height", "config", "timings")},
        "overridden": ["steps", "negative_prompt"],
        "state": "done",
        "prompt": "a red ring",
        "negative_prompt": "blue",
        "settings": {"scheduler": "euler", "steps": 3, "guidance_scale": 5.0, "refiner": False},
    }
    assert info["config"] == promoted.digest
    assert read_record(client.get(image["url"]).content).to_dict().items() <= record.items()


def test_a_refined_image_names_its_source(client, image):
    refined = client.post("/refine", json={"id": image["id"], "strength": 0.5}).json()
    assert client.get(f"/images/{refined['id']}").json()["source"] == image["id"]


def test_the_newest_images_come_first_page_by_page(serve):
    client = serve()
    assert client.get("/images").json() == {"images": []}
    ids = [client.post("/generate", json=PROMPT | {"steps": 1}).json()["id"] for _ in range(5)]
    first = client.get("/images?limit=2").json()
    second = client.get("/images", params={"limit": 2, "cursor": first["next"]}).json()
    third = client.get("/images", params={"limit": 2, "cursor": second["next"]}).json()
    assert [image["id"] for page in (first, second, third) for image in page["images"]] == ids[::-1]
    assert "next" not in third
    assert "record" not in first["images"][0]
    assert client.delete(f"/images/{ids[4]}").status_code == 204
    assert [image["id"] for image in client.get("/images").json()["images"]] == ids[3::-1]


BAD_PAGES = [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("cursor=x", "cursor")]


@pytest.mark.parametrize(("query", "field"), BAD_PAGES)
def test_a_bad_page_is_refused_by_name(client, query, field):
    answer = client.get(f"/images?{query}")
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_a_deleted_image_is_gone(client):
    image = client.post("/generate", json=PROMPT).json()
    answer = client.delete(f"/images/{image['id']}")
    assert (answer.status_code, answer.content) == (204, b"")
    for path in (image["url"], f"/images/{image['id']}"):
        assert client.get(path).status_code == 404
    assert client.delete(f"/images/{image['id']}").status_code == 404
    assert client.post("/refine", json={"id": image["id"]}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/images/{}"), ("DELETE", "/images/{}"), ("DELETE", "/jobs/{}"), ("GET", "/download/{}")],
)
@pytest.mark.parametrize("unknown", [NOBODYS, "x", "..%2F..%2Fetc%2Fpasswd", "%00", "%ff", "a" * 5000])
def test_an_unknown_id_is_404(client, method, path, unknown):
    answer = client.request(method, path.format(unknown))
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("form", "head"), [("png", b"\x89PNG"), ("webp", b"RIFF"), ("jpeg", b"\xff\xd8\xff"), ("*", b"\x89PNG")]
)
def test_the_answer_may_be_the_image_itself(client, promoted, form, head):
    answer = client.post("/generate", json=PROMPT, headers={"Accept": f"image/{form}"})
    assert answer.status_code == 200
    assert answer.content.startswith(head)
    assert answer.headers["content-type"] == f"image/{form.replace('*', 'png')}"
    assert (answer.headers["x-seed"], answer.headers["x-config-digest"]) == ("3", promoted.digest)
    stored = client.get(f"/download/{answer.headers['x-image-id']}").content
    assert (answer.content == stored) == (form in ("png", "*"))


ACCEPTS = [
    ("", "application/json"),
    ("*/*", "application/json"),
    ("application/json", "application/json"),
    ("text/html, application/xhtml+xml", "application/json"),
    ("image/png", "image/png"),
    ("IMAGE/PNG", "image/png"),
    ("image/*", "image/png"),
    ("image/webp, image/png", "image/webp"),
    ("image/webp;q=0.5, image/png;q=0.9, */*;q=0.1", "image/png"),
    ("image/webp;q=nonsense, image/png;q=0.1", "image/png"),
    ("text/event-stream", "text/event-stream"),
    ("text/event-stream;q=0", "application/json"),
    (",;,", "application/json"),
]


@pytest.mark.parametrize(("header", "form"), ACCEPTS)
def test_the_form_liked_best_is_sent(header, form):
    assert accepted(header) == form
