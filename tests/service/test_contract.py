"""The service does what its OpenAPI document says: held by schemathesis, and by a look at the document."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab.config import MAX_SEED, SCHEDULERS, GenerationConfig
from service.api.openai_schemas import ImagesRequest
from service.api.schemas import GenerateRequest, RefineRequest
from service.settings import Settings
from tests.service.conftest import LIMITS, serving

# Positive data are accepted only where fields agree with each other, which a schema of fields cannot say: `quality`
# goes with webp, `lcm` takes few steps; and 25.0 is an integer for JSON Schema, not for us.
RUN = (
    *("--exclude-checks", "positive_data_acceptance", "--generation-database", "none", "--continue-on-failure"),
    *("--request-timeout", "60"),  # seconds: a large image of many steps on a busy machine is no fault
)
# The document, and its streams: which form is answered is the Accept header's to say.
PARTS = {
    "all": (12, ()),
    "events": (6, ("-H", "Accept: text/event-stream", "--include-path", "/generate", "--include-path", "/refine")),
}


@pytest.fixture(scope="module")
def live(slot, tmp_path_factory):
    with serving(Settings(slot=slot, store=tmp_path_factory.mktemp("contract"))) as live:
        yield live


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_schemathesis_finds_nothing(live, tmp_path, part):
    seconds, options = PARTS[part]
    command = [Path(sys.executable).parent / "schemathesis", "run", f"http://127.0.0.1:{live.port}/openapi.json"]
    budget = ["--max-time", str(seconds), "--no-color"]
    done = subprocess.run(
        [*command, *RUN, *budget, *options], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-20_000:]
    generated, passed = re.search(r"(\d+) generated, (\d+) passed", report).groups()
    assert generated == passed
    assert int(generated) > 0  # how many is the machine's to say


def test_the_document_has_the_limits_of_the_slot(document):
    for name in ("GenerateRequest", "RefineRequest"):
        fields = document["components"]["schemas"][name]["properties"]
        assert fields["seed"]["anyOf"][0]["maximum"] == MAX_SEED
        assert (fields["steps"]["anyOf"][0]["minimum"], fields["steps"]["anyOf"][0]["maximum"]) == LIMITS.steps
    sides = {"type": "integer", "minimum": 64, "maximum": 512, "multipleOf": 8}
    assert fields_of(document, "GenerateRequest", "width") == fields_of(document, "GenerateRequest", "height") == sides
    assert fields_of(document, "GenerateRequest", "scheduler")["enum"] == list(SCHEDULERS)


def test_the_document_has_a_field_for_every_setting_that_a_client_may_change(document):
    fields = document["components"]["schemas"]["GenerateRequest"]["properties"]
    settings = {name: setting for name, setting in GenerationConfig.settings().items() if setting.client}
    assert list(fields) == ["prompt", "prompt_2", *settings, "seed"]
    for name, setting in settings.items():
        assert fields[name]["description"].startswith(setting.help)
        assert ("within the promoted limits" in fields[name]["description"]) == bool(setting.limited_by)
    assert fields["loras"]["anyOf"][0]["items"]["$ref"].endswith("/AskedLora")
    assert set(document["components"]["schemas"]["AskedLora"]["properties"]) == {"name", "weight"}
    assert fields["guidance_scale"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 30.0}


def fields_of(document, model, field):
    return document["components"]["schemas"][model]["properties"][field]["anyOf"][0]


def test_every_request_has_examples_that_are_valid(document):
    for model in (GenerateRequest, RefineRequest, ImagesRequest):
        for example in document["components"]["schemas"][model.__name__]["examples"]:
            assert model.model_validate(example)


def test_every_operation_documents_an_answer_and_its_errors(document):
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert any(status.startswith("2") for status in answers), (method, path)
            assert {"4XX", "5XX"} <= answers.keys()
            form = "application/json" if path.startswith("/v1/") else "application/problem+json"
            assert all(form in answer["content"] for status, answer in answers.items() if status >= "4")
            assert operation.get("description"), (method, path)


def test_links_name_operations_that_exist(document):
    operations = {each["operationId"]: each for methods in document["paths"].values() for each in methods.values()}
    links = [
        link
        for operation in operations.values()
        for answer in operation["responses"].values()
        for link in answer.get("links", {}).values()
    ]
    assert {link["operationId"] for link in links} == {"image", "download", "delete", "refine", "cancel"}
    assert all(link["operationId"] in operations for link in links)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/generate", "POST"), ("/images", "GET"), ("/images/x", "GET, DELETE"), ("/jobs/x", "DELETE")],
)
def test_a_method_that_is_not_allowed_is_told_all_that_are(client, path, allowed):
    answer = client.request("PATCH", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert allowed in answer.json()["detail"]
