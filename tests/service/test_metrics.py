"""What Prometheus reads, read with Prometheus' own parser."""

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings

RING = {"prompt": "a ring"}


def read(client, **headers):
    """{(name, label values ...): value}"""
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    parse = openmetrics if "openmetrics" in answer.headers["content-type"] else plain
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(answer.text)
        for sample in family.samples
    }


def test_a_service_tells_what_it_did(serve, slot, promoted):
    client = serve(max_rows=8)
    at_start = read(client)
    assert at_start["sdxl_images_total", "done"] == 0, "goldens are nobody's images"
    for _ in range(2):
        client.post("/generate", json=RING)
    client.post("/generate", json={"steps": 0})
    after = read(client)
    assert after["sdxl_images_total", "done"] == 2
    assert after["sdxl_images_total", "cancelled"] == 0
    assert after["sdxl_first_step_seconds_count",] == after["sdxl_image_seconds_count",] == 2
    assert 0 < after["sdxl_first_step_seconds_sum",] < after["sdxl_image_seconds_sum",]
    assert after["sdxl_tick_seconds_count",] - at_start["sdxl_tick_seconds_count",] == 2 * promoted.steps
    assert after["sdxl_tick_rows_sum",] - at_start["sdxl_tick_rows_sum",] == 4 * promoted.steps
    assert after["sdxl_tick_seconds_sum",] > at_start["sdxl_tick_seconds_sum",] > 0
    assert after["sdxl_batch_occupancy",] == 2 / 8
    assert after["sdxl_row_budget",] == 8
    assert after["sdxl_http_answers_total", "/generate", "200"] == 2
    assert after["sdxl_http_answers_total", "/generate", "422"] == 1
    assert after["sdxl_attested",] == after["sdxl_ready",] == 1
    assert after["sdxl_queue_depth",] == after["sdxl_images_running",] == after["sdxl_rows_in_flight",] == 0
    assert after["process_resident_memory_bytes",] > 1e6


def test_the_digest_the_slot_and_the_weights_are_labels(client, promoted, slot):
    (family,) = [family for family in plain(client.get("/metrics").text) if family.name == "sdxl_config_info"]
    (sample,) = family.samples
    assert sample.labels["digest"] == promoted.digest
    assert sample.labels["slot"] == slot.name
    assert sample.labels["weights"].startswith("base=sha256 ")


def test_both_formats_of_prometheus_are_answered(client):
    openmetrics_type = "application/openmetrics-text; version=1.0.0"
    assert set(read(client, Accept=openmetrics_type)) >= {("sdxl_ready",), ("sdxl_queue_depth",)}
    assert set(read(client)) >= {("sdxl_ready",), ("sdxl_queue_depth",)}


@pytest.mark.parametrize("path", ["/nothing", "/download/1", "/download/2"])
def test_what_clients_invent_makes_no_new_series(client, path):
    client.get(path)
    routes = {labels[0] for name, *labels in read(client) if name == "sdxl_http_answers_total"}
    assert path not in routes
    assert routes & {"none", "/download/{id}"}


def test_services_share_no_numbers_and_leave_the_global_registry_alone(client, slot, tmp_path):
    before = {family.name for family in REGISTRY.collect()}
    other = TestClient(create_app(Settings(slot=slot, store=tmp_path)))
    client.get("/healthz")
    found = read(other)
    assert ("sdxl_http_answers_total", "/healthz", "200") not in found
    assert found["sdxl_ready",] == found["sdxl_attested",] == 0, "nothing is loaded"
    assert ("sdxl_queue_depth",) not in found
    assert {family.name for family in REGISTRY.collect()} == before
    assert not [name for name in before if name.startswith("sdxl")]
