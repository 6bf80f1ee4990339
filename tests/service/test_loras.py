"""LoRAs over HTTP: the slot's own are applied, those that it offers by name, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from sdxl_lab.config import GenerationConfig
from sdxl_lab.diffusion.models import load
from sdxl_lab.images import open_image, read_record
from sdxl_lab.job import ImageRequest
from service.app import create_app
from service.settings import Settings
from tests.loras import pairs, write
from tests.service.conftest import LIMITS, wait_for, wait_until_ready, write_slot

ASKED = {"prompt": "a red circle", "seed": 7}


@pytest.fixture(scope="module")
def files(promoted: GenerationConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    models, folder = load(promoted.model), tmp_path_factory.mktemp("loras")
    return (
        write(folder / "own.safetensors", pairs(models)),
        write(folder / "offered.safetensors", pairs(models, seed=1)),
    )


@pytest.fixture(scope="module")
def adapted(promoted: GenerationConfig, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slot that has one LoRA, and offers another, which it carries."""
    folder = write_slot(tmp_path_factory.mktemp("slots") / "adapted", promoted.with_(loras=[f"{files[0]}:0.5"]))
    (folder / "loras").mkdir()
    shutil.copy(files[1], folder / "loras" / "offered.safetensors")
    offer = {"name": "neon", "source": "loras/offered.safetensors", "weight": (0.0, 0.8)}
    (folder / "serving.toml").write_text(LIMITS.with_(loras=[offer]).to_toml())
    return folder


@pytest.fixture(scope="module")
def adapted_client(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    app = create_app(Settings(slot=adapted, store=tmp_path_factory.mktemp("store"), attest="off"))
    with TestClient(app) as client:
        yield wait_until_ready(client)


def pixels(client: TestClient, asked: dict[str, Any]) -> tuple[np.ndarray, Any]:
    answer = client.post("/generate", json=ASKED | asked)
    assert answer.status_code == 200, answer.text
    png = client.get(answer.json()["url"]).content
    return np.asarray(open_image(png)), read_record(png)


def test_the_slots_own_are_applied_and_those_asked_for_come_after_them(adapted_client, files, promoted):
    engine = adapted_client.app.state.jobs.deployment.engine
    for asked, words in (
        ({}, []),
        ({"loras": []}, []),
        ({"loras": [{"name": "neon", "weight": 0.25}]}, [f"{files[1]}:0.25"]),
        ({"loras": [{"name": "neon"}]}, [f"{files[1]}:0.8"]),
    ):
        image, record = pixels(adapted_client, asked)
        config = promoted.with_(loras=[f"{files[0]}:0.5", *words])
        drawn = engine.draw(ImageRequest(config, ASKED["prompt"], 7))
        assert np.array_equal(image, np.asarray(drawn.image)), asked
        assert record.overridden == (("loras",) if words else ())
        assert sorted(record.weights.values()) == sorted(drawn.record.weights.values())


REFUSED = [
    ([{"name": "offered"}], "loras.0.name must be one that is offered here: neon; received 'offered'"),
    ([{"name": "loras/offered.safetensors"}], "must be one that is offered here"),
    ([{"name": "https://example.com/x.safetensors"}], "must be one that is offered here"),
    ([{"name": "neon", "weight": 0.9}], "loras.0.weight must be a number from 0 to 0.8; received 0.9"),
    ([{"name": "neon"}, {"name": "neon"}], "named once"),
    ([{"name": "neon", "source": "/etc/passwd"}], "no such field"),
    ([{"weight": 0.5}], "name"),
    ("neon", "list"),
    (["neon"], "loras"),
    ([{"name": "neon", "weight": "0.5"}], "number"),
]


@pytest.mark.parametrize(("loras", "said"), REFUSED, ids=[str(loras) for loras, _ in REFUSED])
def test_nothing_else_is_taken_from_a_client(adapted_client, loras, said):
    answer = adapted_client.post("/generate", json=ASKED | {"loras": loras})
    assert answer.status_code == 422
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert said in answer.json()["detail"]


def test_clients_are_told_what_is_offered_but_not_where_it_lies(adapted_client, adapted):
    told = adapted_client.get("/config").json()
    assert told["limits"]["loras"] == [{"name": "neon", "weight": [0.0, 0.8]}]
    assert str(adapted) not in str(told["limits"])
    document = adapted_client.get("/openapi.json").json()
    assert document["components"]["schemas"]["AskedLora"]["properties"]["name"]["enum"] == ["neon"]


def test_a_slot_that_offers_none_says_so(client):
    answer = client.post("/generate", json=ASKED | {"loras": [{"name": "neon"}]})
    assert answer.status_code == 422
    assert "one that is offered here: there is none" in answer.json()["detail"]


def test_a_slot_whose_lora_does_not_load_is_not_ready(adapted, serve, tmp_path):
    broken = shutil.copytree(adapted, tmp_path / "broken")
    (broken / "loras" / "offered.safetensors").write_bytes(b"nothing")
    client = serve(ready=False, slot=broken, attest="off")
    deployment = client.app.state.jobs.deployment
    wait_for(lambda: deployment.failure is not None)
    assert "must be a whole .safetensors file" in client.get("/readyz").json()["detail"]
