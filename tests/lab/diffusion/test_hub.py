"""Models of the hub: offline once they are cached, pinned to a commit, and held to the hub's own checksums.

The cache is built from the random model in huggingface_hub's layout; each trial is a process of its own, since the hub
client reads its environment when it is imported.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab.config import ModelRef
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.models import load

ROOT = Path(__file__).parents[3]
REVISION = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40

# Draws three times, with what happens between them; every way out of the process is shut.
TRIAL = """
import json, socket, sys

dialled = []
def refuse(self, address):
    dialled.append(str(address))
    raise OSError("this process may not leave the machine")
socket.socket.connect = socket.socket.connect_ex = refuse
def unresolved(*asked, **more):
    dialled.append(str(asked[0]))
    raise socket.gaierror("no names here")
socket.getaddrinfo = unresolved

from pathlib import Path
from sdxl_lab.config import GenerationConfig, ModelRef, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.job import ImageRequest

blob, revision, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def draw(**change):
    named = {"base": "org/tiny", "revision": revision, "refiner": "org/tiny-refiner", "refiner_revision": revision}
    sizes = {"width": 64, "height": 64}
    config = GenerationConfig(model=ModelRef(**named | change), steps=2, **sizes)
    try:
        with Engine.load(config, RuntimeProfile(device="cpu", dtype="float32")) as engine:
            image = engine.submit(ImageRequest(config, "a cat", seed=1)).result()
            return {"size": image.image.size, "weights": image.record.weights}
    except ModelError as error:
        return str(error)

said = {"drawn": draw(), "another revision": draw(revision=other)}
content = bytearray(blob.read_bytes())
content[-1] ^= 1
blob.write_bytes(content)
said["a changed file"] = draw()
print(json.dumps(said | {"dialled": dialled}))
"""


def cached(folder: Path, hub: Path, name: str) -> Path:
    """`folder` as the hub client keeps a download; gives the blob of the largest file."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(REVISION)
    largest = Path()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            checksum = hashlib.sha256(content).hexdigest()
        else:
            checksum = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = place / "blobs" / checksum
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        link = place / "snapshots" / REVISION / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if not largest.name or blob.stat().st_size > largest.stat().st_size:
            largest = blob
    return largest


@pytest.mark.slow
def test_a_cached_model_draws_offline_and_another_revision_or_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    blob = cached(tiny_model / "base", tmp_path / "hub", "org/tiny")
    cached(tiny_model / "refiner", tmp_path / "hub", "org/tiny-refiner")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", TRIAL, str(blob), REVISION, OTHER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["dialled"] == []
    revision = f"revision {REVISION}"
    assert said["drawn"] == {"size": [64, 64], "weights": {"base": revision, "refiner": revision}}
    assert f"received 'org/tiny' at revision {OTHER}" in said["another revision"]
    assert "files must be those of its revision, as the hub named them" in said["a changed file"]
    assert blob.name in said["a changed file"]


@pytest.mark.parametrize("revision", [None, "main", "4621659", "A" * 40])
@pytest.mark.parametrize("role", ["base", "vae"])
def test_a_model_of_the_hub_is_pinned_to_a_commit(tiny_model: Path, role: str, revision: str | None) -> None:
    named = (
        {"base": "org/tiny", "revision": revision} if role == "base" else {"vae": "org/vae", "vae_revision": revision}
    )
    with pytest.raises(ModelError, match=rf"the {role} model of the hub must name the commit .*{revision!r}.* Example"):
        load(ModelRef(**({"base": str(tiny_model / "base")} | named)))


def test_a_file_that_is_no_link_to_a_blob_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_lab.diffusion.models import _check_downloaded

    source = tmp_path / "source"
    source.mkdir()
    (source / "a.json").write_text("{}")
    (source / "b.safetensors").write_bytes(b"weights")
    cached(source, tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    _check_downloaded("base", "org/tiny", REVISION)
    path = tmp_path / "hub" / "models--org--tiny" / "snapshots" / REVISION / "a.json"
    path.unlink()
    path.write_text("{ }")
    with pytest.raises(ModelError, match=r"whose a\.json has the checksum \w{40} and should have a blob"):
        _check_downloaded("base", "org/tiny", REVISION)
