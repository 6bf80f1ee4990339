"""The official client against a service on a real socket."""

import base64
import io
import json
import threading
import time
import urllib.request
import uuid

import numpy as np
import openai
import pytest
from PIL import Image

from sdxl_lab.config import GenerationConfig, ServingLimits
from sdxl_lab.images import open_image, read_record
from service.api.openai_schemas import QUALITIES, ImagesRequest, answers
from service.settings import Settings
from tests.service.conftest import serving, wait_for

PROMPT = "a red ring"


@pytest.fixture(scope="module")
def live(slot, tmp_path_factory):
    with serving(Settings(slot=slot, store=tmp_path_factory.mktemp("openai"))) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    with connect(live) as client:
        yield client


def connect(live, **options):
    url = f"http://127.0.0.1:{live.port}/v1"
    return openai.OpenAI(**{"api_key": "none", "base_url": url, "max_retries": 0, "timeout": 60} | options)


def decoded(text):
    return base64.b64decode(text, validate=True)


@pytest.fixture
def long(monkeypatch):
    """What to ask for to have time to leave: a hundred steps."""
    monkeypatch.setitem(QUALITIES, "max", 25)
    return {"prompt": PROMPT, "size": "256x256", "quality": "max"}


@pytest.fixture
def busy(live, monkeypatch):
    """One image is being drawn for some seconds, one waits, and the queue takes no more."""
    engine = live.jobs.deployment.engine
    monkeypatch.setattr(engine, "rows", 2)
    jobs = [later(live, {"prompt": PROMPT, "steps": 100, "width": 128, "height": 128}) for _ in range(2)]
    wait_for(lambda: engine.queued == 1)
    monkeypatch.setattr(engine, "max_queue", 1)
    yield
    for job in jobs:
        delete(live, job)
    wait_for(lambda: not live.jobs.active)


def later(live, body):
    headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
    url = f"http://127.0.0.1:{live.port}/generate"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)["id"]


def delete(live, job):
    request = urllib.request.Request(f"http://127.0.0.1:{live.port}/jobs/{job}", method="DELETE")
    try:
        urllib.request.urlopen(request).close()
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 409:  # 409: it is drawn by now
                raise


# --- images --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_enough(client, promoted):
    answer = client.images.generate(prompt=PROMPT)
    (image,) = answer.data
    record = read_record(decoded(image.b64_json))
    assert (record.prompt, record.digest) == (PROMPT, promoted.digest)
    assert image.url is None
    assert (answer.output_format, answer.size, answer.quality, answer.background) == (
        "png",
        "64x64",
        "medium",
        "opaque",
    )
    assert abs(answer.created - time.time()) < 60


def test_the_image_is_the_one_that_generate_draws(live, client):
    png = decoded(client.images.generate(prompt=PROMPT, size="64x128").data[0].b64_json)
    body = {"prompt": PROMPT, "width": 64, "height": 128, "seed": read_record(png).seed}
    job = later(live, body)
    wait_for(lambda: uuid.UUID(job) not in live.jobs.active)
    again = live.jobs.store.get(uuid.UUID(job))
    assert np.array_equal(np.asarray(open_image(png)), np.asarray(open_image(again)))


@pytest.mark.parametrize(
    ("asked", "kind", "size"),
    [
        ({}, "png", (64, 64)),
        ({"size": "128x64", "output_format": "webp"}, "webp", (128, 64)),
        ({"size": "auto", "output_format": "jpeg", "output_compression": 0}, "jpeg", (64, 64)),
    ],
)
@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_images_come_in_the_form_and_size_asked_for(live, client, asked, kind, size, response_format):
    answer = client.images.with_raw_response.generate(prompt=PROMPT, response_format=response_format, **asked)
    (image,) = answer.parse().data
    image_id = answer.headers["x-image-id"]
    if response_format == "url":
        assert image.url.startswith(f"http://127.0.0.1:{live.port}/download/{image_id}")
        with urllib.request.urlopen(image.url) as download:
            assert download.headers["content-type"] == f"image/{kind}"
            content = download.read()
    else:
        content = decoded(image.b64_json)
    with Image.open(io.BytesIO(content)) as opened:
        assert (opened.format, opened.size) == (kind.upper(), size)
    if kind == "png":
        assert content == live.jobs.store.get(uuid.UUID(image_id))


def test_a_url_has_the_prefix_of_the_proxy(serve):
    answer = serve(root_path="/images").post(
        "/images/v1/images/generations", json={"prompt": PROMPT, "response_format": "url"}
    )
    assert answer.json()["data"][0]["url"].startswith("http://testserver/images/download/")


def test_compression_is_the_quality_of_the_form(client):
    sizes = [
        len(client.images.generate(prompt=PROMPT, output_format="jpeg", output_compression=value).data[0].b64_json)
        for value in (5, 50, 100)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_three_images_share_calls_and_have_seeds_of_their_own(live, client):
    before = live.jobs.deployment.engine.stats()
    answer = client.images.with_raw_response.generate(prompt=PROMPT, n=3, quality="max", size="128x128")
    after = live.jobs.deployment.engine.stats()
    records = [read_record(decoded(image.b64_json)) for image in answer.parse().data]
    seeds = [record.seed for record in records]
    assert len(set(seeds)) == 3
    assert [record.id for record in records] == answer.headers["x-image-id"].split(", ")
    calls, rows = after.calls - before.calls, after.rows_in_calls - before.rows_in_calls
    assert rows == 3 * 2 * 12
    assert calls < 2 * 12  # each alone would take 36


@pytest.mark.parametrize(("quality", "steps"), [(None, 4), *((name, round(4 * f)) for name, f in QUALITIES.items())])
def test_quality_is_a_number_of_steps(quality, steps, promoted):
    asked = ImagesRequest.model_validate({"prompt": PROMPT, "quality": quality})
    assert asked.over(promoted, ServingLimits()).steps == steps
    assert asked.told_quality in ("low", "medium", "high", "xhigh", "max")


@pytest.mark.parametrize(("steps", "quality", "taken"), [(1, "low", 1), (60, "max", 100)])
def test_quality_stays_within_the_limits(steps, quality, taken):
    config = GenerationConfig(steps=steps)
    assert ImagesRequest(prompt=PROMPT, quality=quality).over(config, ServingLimits()).steps == taken


HARMLESS = {
    "model": "tiny",
    "n": 1,
    "size": "auto",
    "quality": "auto",
    "background": "auto",
    "moderation": "low",
    "user": "user-1",
    "output_compression": 100,
    "partial_images": 0,
    "stream": False,
    "style": None,
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("null", [False, True])
def test_what_is_harmless_is_accepted(client, name, null):
    assert client.images.generate(prompt=PROMPT, **{name: None if null else HARMLESS[name]}).data


def test_an_idempotency_key_gives_the_same_images(live, client):
    asked = {"prompt": PROMPT, "n": 2, "extra_headers": {"Idempotency-Key": "openai"}}
    first, again = (client.images.generate(**asked) for _ in range(2))
    assert first.data == again.data
    assert first.data[0] != first.data[1]
    with Watched(live) as watched, connect(live, http_client=watched.http, max_retries=2) as retrying:
        with pytest.raises(openai.ConflictError) as caught:
            retrying.images.generate(**asked | {"n": 3})
        assert caught.value.code == "key_reused"
        assert watched.statuses == [409]  # the client would try twice more if it were not told


# --- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_partial_images_come_before_the_image(live, client, partial_images):
    asked = {"output_format": "webp", "size": "128x64", "quality": "hd"}
    with client.images.generate(prompt=PROMPT, stream=True, partial_images=partial_images, **asked) as stream:
        events = list(stream)
        image = stream.response.headers["x-image-id"]
    *partial, completed = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * partial_images
    assert [event.partial_image_index for event in partial] == list(range(partial_images))
    assert completed.type == "image_generation.completed"
    assert completed.usage.total_tokens == 0
    for event in events:
        with Image.open(io.BytesIO(decoded(event.b64_json))) as opened:
            assert (opened.format, opened.size) == ("WEBP", (128, 64))
        told = (event.size, event.quality, event.output_format, event.background)
        assert told == ("128x64", "high", "webp", "opaque")
    assert len({event.b64_json for event in events}) == len(events)
    assert live.jobs.store.record(uuid.UUID(image)).record.prompt == PROMPT


def test_several_images_are_streamed_with_their_index(client):
    events = list(client.images.generate(prompt=PROMPT, stream=True, n=2, partial_images=1))
    assert sorted((event.type.rpartition(".")[2], event.image_index) for event in events) == [
        ("completed", 0),
        ("completed", 1),
        ("partial_image", 0),
        ("partial_image", 1),
    ]


def test_a_listener_that_leaves_frees_its_rows(live, client, long):
    stream = client.images.generate(**long, stream=True, n=2, partial_images=3)
    next(iter(stream))
    here = list(live.jobs.active.values())
    assert len(here) == 2
    stream.close()
    wait_for(lambda: not live.jobs.active)
    assert [job.state for job in here] == ["cancelled"] * 2
    assert live.jobs.deployment.engine.stats().rows_in_flight == 0


@pytest.mark.slow
def test_an_error_in_the_middle_is_the_last_event(live, client, long):
    stream = iter(client.images.generate(**long, stream=True, n=3, partial_images=3))
    assert next(stream).type == "image_generation.partial_image"
    here = list(live.jobs.active.values())
    delete(live, here[0].id)
    with pytest.raises(openai.APIError, match="cancelled") as caught:
        list(stream)
    assert (caught.value.code, caught.value.type) == ("cancelled_by_client", "invalid_request_error")
    wait_for(lambda: not live.jobs.active)
    assert [job.state for job in here] == ["cancelled"] * 3


# --- errors ----------------------------------------------------------------------------------------------------------

BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "x" * 5000}, "prompt"),
    ({"prompt": "nul \0"}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"n": "3"}, "n"),
    ({"size": "7x7"}, "size"),
    ({"size": "64"}, "size"),
    ({"size": "6\u0664x64"}, "size"),
    ({"size": "1024x1024"}, "size"),
    ({"quality": "best"}, "quality"),
    ({"response_format": "bytes"}, "response_format"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_compression": 101}, "output_compression"),
    ({"output_compression": 50}, "output_compression"),
    ({"background": "transparent"}, "background"),
    ({"partial_images": 4, "stream": True}, "partial_images"),
    ({"partial_images": 1}, "partial_images"),
    ({"response_format": "url", "stream": True}, "response_format"),
    ({"style": "vivid"}, "style"),
    ({"extra_body": {"steps": 3}}, "steps"),
]


@pytest.mark.parametrize(("asked", "param"), BAD, ids=[f"{name}-{index}" for index, (_, name) in enumerate(BAD)])
def test_what_cannot_be_honoured_is_a_bad_request_that_names_the_parameter(client, asked, param):
    with pytest.raises(openai.BadRequestError, match=param) as caught:
        client.images.generate(**{"prompt": PROMPT} | asked)
    error = caught.value
    assert (error.param, error.type, error.code) == (param, "invalid_request_error", "invalid_value")
    assert len(error.message) < 1000


def test_another_model_is_not_found(client):
    for ask in (
        lambda: client.images.generate(prompt=PROMPT, model="gpt-image-2"),
        lambda: client.models.retrieve("x"),
    ):
        with pytest.raises(openai.NotFoundError, match="tiny") as caught:
            ask()
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_the_slot_is_the_only_model(live, client):
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "sdxl-lab")
    assert abs(model.created - time.time()) < 3600  # promoted by the fixture
    assert client.models.retrieve("auto") == client.models.retrieve("tiny") == model


def test_an_unknown_path_answers_in_their_shape_and_others_in_ours(live, client):
    with pytest.raises(openai.NotFoundError, match="nothing is served"):
        client.images.edit(image=b"x", prompt=PROMPT)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{live.port}/v2/models")
    with caught.value as error:
        assert error.headers["content-type"] == "application/problem+json"


def test_a_body_that_is_too_long_is_refused(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(prompt=PROMPT, user="x" * 70_000)
    assert caught.value.status_code == 413
    assert caught.value.type == "invalid_request_error"


def test_keys_are_those_of_the_service(slot, tmp_path):
    with serving(Settings(slot=slot, store=tmp_path, api_keys=("a" * 20, "b" * 20))) as live:
        with connect(live, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError) as caught:
            stranger.images.generate(prompt=PROMPT)
        assert caught.value.code == "invalid_api_key"
        with connect(live, api_key="b" * 20) as friend:
            assert friend.images.generate(prompt=PROMPT).data
            assert friend.models.list().data


def test_a_full_queue_says_when_to_come_back(busy, client):
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt=PROMPT)
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.slow
def test_the_client_comes_back_by_itself_when_it_is_told(live, busy, monkeypatch):
    monkeypatch.setattr(live.jobs.deployment, "retry_after", lambda: 2)
    with Watched(live) as watched, connect(live, http_client=watched.http, max_retries=20) as retrying:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(retrying.images.generate(prompt=PROMPT)))
        asking.start()
        wait_for(lambda: watched.statuses)
        live.jobs.deployment.engine.max_queue = 100
        asking.join()
        assert watched.statuses == [429, 200]
        assert watched.retry_after[0] == "2"
        assert watched.times[1] - watched.times[0] >= 2
        assert answers[0].data


def test_all_images_are_taken_or_none(live, client, long, monkeypatch):
    engine = live.jobs.deployment.engine
    monkeypatch.setattr(engine, "rows", 2)
    monkeypatch.setattr(engine, "max_queue", 2)
    before = len(live.jobs.store.page(100).records)
    with pytest.raises(openai.RateLimitError):
        client.images.generate(**long, n=10)
    wait_for(lambda: not live.jobs.active)
    assert len(live.jobs.store.page(100).records) == before


def test_if_one_image_fails_the_others_are_cancelled(live, client, long):
    caught = []

    def ask():
        with pytest.raises(openai.ConflictError, match="DELETE") as error:
            client.images.generate(**long, n=3)
        caught.append(error.value)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: len(live.jobs.active) == 3)
    here = list(live.jobs.active.values())
    delete(live, here[1].id)
    asking.join()
    assert caught[0].code == "cancelled_by_client"
    wait_for(lambda: not live.jobs.active)
    assert [job.state for job in here] == ["cancelled"] * 3


def test_a_service_that_cannot_draw_says_so(live, client, monkeypatch):
    monkeypatch.setattr(live.jobs.deployment, "failure", "no weights")
    with pytest.raises(openai.InternalServerError, match="no weights") as caught:
        client.images.generate(prompt=PROMPT)
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    assert caught.value.response.headers["retry-after"] == "5"


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_told_by_its_request_id(live, client, monkeypatch, stream):
    def broken(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(live.jobs.registry, "_put", broken)
    with pytest.raises(openai.APIError, match=r"request id: [0-9a-f]{32}") as caught:
        list(client.images.generate(prompt=PROMPT, stream=stream))
    assert (caught.value.code, caught.value.type) == ("bug", "server_error")
    assert isinstance(caught.value, openai.InternalServerError) != stream
    assert "secret" not in caught.value.message


def test_the_examples_of_the_document_are_valid():
    for example in ImagesRequest.model_config["json_schema_extra"]["examples"]:
        assert ImagesRequest.model_validate(example)
    described = answers("invalid-value", "queue-full", "unauthorized")
    assert {400, 401, 429, "4XX", "5XX"} == set(described)
    assert "Retry-After" in described[429]["headers"]


class Watched:
    """The client's own transport, with what it was answered and when."""

    def __init__(self, live):
        self.statuses, self.times, self.retry_after = [], [], []
        self.http = openai.DefaultHttpxClient(event_hooks={"response": [self._seen]})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.close()

    def _seen(self, response):
        self.statuses.append(response.status_code)
        self.times.append(time.monotonic())
        self.retry_after.append(response.headers.get("retry-after"))


def test_words_that_are_cut_are_told(client):
    answer = client.images.generate(prompt="ring " * 75 + "boat", n=2)
    assert len(answer.data) == 2
    assert len(answer.warnings) == 1
    assert "cut 'boat'" in answer.warnings[0]
    *_, completed = client.images.generate(prompt="ring " * 75 + "boat", stream=True)
    assert completed.warnings == answer.warnings
    assert not hasattr(client.images.generate(prompt=PROMPT), "warnings")
