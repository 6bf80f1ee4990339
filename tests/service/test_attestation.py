"""A service is ready once it has drawn again what was promoted."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_lab.config import ModelRef
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.images import encode_png, open_image, read_record
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.promote import promote
from sdxl_lab.release.slot import load_slot
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import wait_for

ASKED = {"prompt": "a ring"}


@pytest.fixture
def copy(slot, tmp_path) -> Path:
    """A slot that a test may damage."""
    return Path(shutil.copytree(slot, tmp_path / "copy"))


def settled(client):
    """`/readyz` when the goldens have been judged."""
    wait_for(lambda: not client.app.state.jobs.deployment.attesting)
    return client.get("/readyz")


def first_golden(folder: Path) -> Path:
    return min((folder / "golden").iterdir())


def repaint(folder: Path) -> None:
    """Three of 255 in one sample of one pixel: nobody would see it."""
    path = first_golden(folder)
    record, pixels = read_record(path), np.array(open_image(path))
    pixels[5, 5, 1] = pixels[5, 5, 1] - 3 if pixels[5, 5, 1] > 100 else pixels[5, 5, 1] + 3
    path.write_bytes(encode_png(Image.fromarray(pixels), record))


def reseed(folder: Path) -> None:
    path = first_golden(folder)
    path.write_bytes(encode_png(open_image(path), read_record(path).with_(seed=99)))


def change_field(folder: Path) -> None:
    """In the configuration and, to get past the first check, in what the evidence speaks of."""
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("steps = 4", "steps = 5", 1))
    change_evidence(folder, digest=load_slot(without_evidence(folder)).digest)


def without_evidence(folder: Path) -> Path:
    bare = folder.with_name("bare")
    bare.mkdir()
    shutil.copy(folder / "config.toml", bare)
    return bare


def change_evidence(folder: Path, **changes) -> None:
    path = folder / "evidence.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def another_dtype(folder: Path) -> None:
    """Goldens of another runtime, where their structure is asked for; one of them is another image."""
    path = first_golden(folder)
    record, pixels = read_record(path), np.array(open_image(path), dtype=np.int16)
    pixels += np.random.default_rng(0).normal(0, 5, pixels.shape).round().astype(np.int16)
    elsewhere = record.with_(runtime=record.runtime | {"dtype": "bfloat16"})
    path.write_bytes(encode_png(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), elsewhere))


DAMAGE = [
    ("a golden of another structure, of another runtime", another_dtype, "01-a-ring-3.png: the SSIM is 0."),
    ("a missing golden", lambda folder: first_golden(folder).unlink(), "01-a-ring-3.png is missing"),
    ("a golden with another pixel", repaint, "01-a-ring-3.png: the image differs by 0.0118 (max-abs on [0, 1])"),
    ("a golden with another record", reseed, "must have the seed 3 of its slot; received 99"),
    ("half a golden", lambda folder: halve(first_golden(folder)), "01-a-ring-3.png"),
    ("a changed field", change_field, "must have the digest"),
    ("no goldens", lambda folder: change_evidence(folder, goldens=[]), "must have golden images to be held against"),
    ("no evidence", lambda folder: (folder / "evidence.json").unlink(), "must have golden images to be held against"),
]


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(("damage", "said"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_slot_keeps_the_service_red_with_the_reason(serve, copy, damage, said):
    damage(copy)
    client = serve(ready=False, slot=copy)
    for answer in (settled(client), client.post("/generate", json=ASKED)):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert said in answer.json()["detail"]
    told = client.get("/config").json()
    assert told["attested"] is False
    assert said in told["attested_reason"]
    assert client.get("/healthz").status_code == 200


def test_another_weight_file_keeps_the_service_red_although_no_pixel_may_show_it(serve, promoted, tiny_model, tmp_path):
    model, folder = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "slot"
    config = promoted.with_(model=ModelRef(base=str(model / "base"), refiner=str(model / "refiner")))
    with Engine.load(config) as engine:
        golden = engine.draw(ImageRequest(config, "a ring", 3))
    promote(config, folder, images=[golden], why="a test", who="the tests", allow_dirty=True)
    weights = next((model / "refiner" / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the last bit but seven of the refiner, which this configuration never asks
    weights.write_bytes(content)
    client = serve(ready=False, slot=folder)
    answer = settled(client)
    assert answer.status_code == 503
    assert "the weights are not those it was promoted with: refiner was sha256 " in answer.json()["detail"]
    assert client.get("/config").json()["comparisons"][0]["difference"] == 0


def test_a_field_changed_in_config_toml_alone_is_refused_before_anything_is_loaded(copy):
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("steps = 4", "steps = 5", 1))
    with pytest.raises(ValueError, match=r"evidence\.json speaks of"):
        create_app(Settings(slot=copy))


def test_evidence_that_cannot_be_read_is_refused_before_anything_is_loaded(copy):
    change_evidence(copy, goldens=[{"file": "a.png"}])
    with pytest.raises(ValueError, match=r"evidence\.json is damaged: it lacks goldens\.0\.prompt"):
        create_app(Settings(slot=copy))


def test_an_attested_slot_tells_its_comparisons(client):
    assert client.get("/readyz").json() == {"status": "ready", "attested": True}
    told = client.get("/config").json()
    assert (told["attested"], told["attested_reason"]) == (True, None)
    assert [each["golden"] for each in told["comparisons"]] == ["01-a-ring-3.png", "02-a-boat-4.png"]
    for each in told["comparisons"]:
        assert each["measure"] == "max-abs"
        assert each["difference"] <= each["tolerance"] < 0.004
        assert each["passed"]


def test_warn_serves_what_is_not_attested_and_says_so(serve, copy, caplog):
    repaint(copy)
    client = serve(slot=copy, attest="warn")
    for told in (client.get("/readyz").json(), client.get("/config").json()):
        assert told["attested"] is False
        assert "01-a-ring-3.png: the image differs" in told["attested_reason"]
    assert [each["passed"] for each in client.get("/config").json()["comparisons"]] == [False, True]
    assert client.post("/generate", json=ASKED).status_code == 200
    assert [r.levelname for r in caplog.records if "not attested" in r.message] == ["WARNING"]


def test_off_draws_no_golden_and_says_so(serve, slot):
    client = serve(attest="off")
    assert client.get("/readyz").json()["attested_reason"] == "switched off by SDXL_ATTEST=off"
    assert client.get("/config").json()["comparisons"] == []
    assert client.app.state.jobs.deployment.engine.stats().calls == 0


def test_a_service_that_stops_while_it_attests_does_not_wait_for_the_goldens(serve, monkeypatch):
    drawn = []
    predict = Engine._predict

    def slow(*arguments):
        time.sleep(0.2)
        drawn.append(arguments)
        return predict(*arguments)

    monkeypatch.setattr(Engine, "_predict", slow)
    client = serve(ready=False)
    jobs = client.app.state.jobs
    wait_for(lambda: drawn)
    assert "golden images are being drawn" in client.get("/readyz").json()["detail"]
    jobs.deployment.engine.close()
    wait_for(lambda: not jobs.deployment.attesting)
    assert len(drawn) < 8
    assert "cancelled" in jobs.deployment.attestation.reason
