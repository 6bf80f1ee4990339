import io

import pytest
from PIL import Image

from sdxl_lab.images import read_record


@pytest.fixture(scope="module")
def image(client):
    return client.post("/generate", json={"prompt": "a red ring", "seed": 3}).json()


def test_the_png_is_served_to_be_kept(client, image):
    answer = client.get(image["url"])
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert read_record(answer.content).seed == 3
    assert "parameters" in Image.open(io.BytesIO(answer.content)).text


FORMS = [
    ("?format=png", "PNG"),
    ("?format=webp", "WEBP"),
    ("?format=webp&quality=1", "WEBP"),
    ("?format=jpeg&quality=100", "JPEG"),
]


@pytest.mark.parametrize(("query", "form"), FORMS)
def test_a_image_comes_in_the_form_asked_for(client, image, query, form):
    answer = client.get(image["url"] + query)
    assert answer.headers["content-type"] == f"image/{form.lower()}"
    opened = Image.open(io.BytesIO(answer.content))
    assert (opened.format, opened.size) == (form, (64, 64))


def test_quality_changes_the_size(client, image):
    small, large = (len(client.get(f"{image['url']}?format=jpeg&quality={q}").content) for q in (1, 100))
    assert small < large


def test_each_form_has_an_etag_of_its_own(client, image):
    queries = ["", "?format=webp", "?format=webp&quality=5", "?format=jpeg"]
    assert len({client.get(image["url"] + query).headers["etag"] for query in queries}) == len(queries)
    assert client.get(image["url"]).headers["etag"] == client.get(image["url"] + "?format=png").headers["etag"]


@pytest.mark.parametrize(
    ("header", "status"), [("{tag}", 304), ("W/{tag}", 304), ('"x", {tag}', 304), ("*", 304), ('"x"', 200)]
)
def test_a_image_one_has_is_not_sent_again(client, image, header, status):
    tag = client.get(image["url"]).headers["etag"]
    answer = client.get(image["url"], headers={"If-None-Match": header.format(tag=tag)})
    assert (answer.status_code, bool(answer.content)) == (status, status == 200)
    assert answer.headers["etag"] == tag


BAD = [
    ("?format=gif", "format"),
    ("?format=webp&quality=0", "quality"),
    ("?format=webp&quality=101", "quality"),
    ("?format=webp&quality=high", "quality"),
    ("?quality=80", "quality"),
    ("?size=2", "size"),
]


@pytest.mark.parametrize(("query", "field"), BAD)
def test_a_bad_query_is_refused_by_name(client, image, query, field):
    answer = client.get(image["url"] + query)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_a_image_in_the_making_is_404_with_retry_after(client):
    asked = {"prompt": "a ring", "steps": 100, "width": 256, "height": 256}
    accepted = client.post("/generate", json=asked, headers={"Prefer": "respond-async"}).json()
    answer = client.get(f"/download/{accepted['id']}")
    assert client.delete(f"/jobs/{accepted['id']}").status_code == 204
    assert answer.status_code == 404
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["type"].endswith("still-drawing")
    answer = client.get(f"/download/{accepted['id']}")
    assert (answer.status_code, "retry-after" in answer.headers) == (404, False)
