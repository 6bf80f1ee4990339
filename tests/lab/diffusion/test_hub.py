"""Models of the hub: offline once they are cached, pinned to a commit, and held to the hub's own checksums.

The cache is built from the random model in huggingface_hub's layout; each trial is a process of its own, since the hub
client reads its environment when it is imported.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab.checksums import SMALL, git_sha1_of, sha256_of
from sdxl_lab.config import ModelRef
from sdxl_lab.diffusion import hub, models
from sdxl_lab.diffusion.hub import difference
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.models import load

WEIGHTS = b"w" * SMALL
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


def cached(folder: Path, hub: Path, name: str, revision: str = REVISION) -> Path:
    """`folder` as the hub client keeps a download; gives the blob of the largest file."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
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
        link = place / "snapshots" / revision / path.relative_to(folder)
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


# --- what the hub sent -----------------------------------------------------------------------------------------------


def test_the_hub_s_checksums_tell_which_file_is_another(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    (snapshot / "unet").mkdir(parents=True)
    blobs.mkdir()
    contents = {"unet/config.json": b"{}", "unet/model.safetensors": WEIGHTS}
    for name, content in contents.items():
        small = name.endswith("json")
        blob = blobs / (hashlib.sha1(b"blob 2\0{}") if small else hashlib.sha256(content)).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    assert difference(snapshot) is None
    path = snapshot / "unet/model.safetensors"
    expected = path.resolve().name
    path.resolve().write_bytes(WEIGHTS[:-1] + b"v")
    differs = difference(snapshot)
    assert (differs.path, differs.expected) == (path, expected)
    config = snapshot / "unet/config.json"
    config.unlink()
    config.write_text("{ }")
    assert difference(snapshot)[::2] == (config, None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "unet").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "unet" / "b.safetensors").write_bytes(WEIGHTS)
    return folder


def without_links(place: Path) -> None:
    """As a file system without links, or whoever copies a cache and follows them, leaves it."""
    for path in (place / "snapshots" / REVISION).rglob("*"):
        if path.is_symlink():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)


def listed(place: Path, source: Path) -> None:
    """What the hub client notes of a commit."""
    files = {}
    for path in source.rglob("*"):
        if path.is_file():
            files[path.relative_to(source).as_posix()] = {"size": path.stat().st_size, "blob_id": git_sha1_of(path)} | (
                {"lfs_sha256": sha256_of(path)} if path.suffix == ".safetensors" else {}
            )
    (place / "trees").mkdir()
    (place / "trees" / f"{REVISION}.json").write_text(json.dumps({"format_version": 1, "files": files}))


@pytest.mark.parametrize("known_by", ["its blobs", "the listing of its commit"])
def test_a_cache_made_of_copies_is_checked_by_what_the_hub_said(source: Path, tmp_path: Path, known_by: str) -> None:
    """Case 8: NAS, Windows, a container's COPY."""
    cached(source, tmp_path / "hub", "org/tiny")
    place = tmp_path / "hub" / "models--org--tiny"
    without_links(place)
    if known_by == "the listing of its commit":
        shutil.rmtree(place / "blobs")
        assert difference(place / "snapshots" / REVISION) is not None, "nothing says what was sent"
        listed(place, source)
    assert difference(place / "snapshots" / REVISION) is None
    path = place / "snapshots" / REVISION / "unet" / "b.safetensors"
    path.write_bytes(WEIGHTS[:-1] + b"v")
    found = difference(place / "snapshots" / REVISION)
    assert found is not None
    assert found.path == path


def test_a_file_that_the_hub_did_not_send_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(source, tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.check_downloaded("base", "org/tiny", REVISION)
    path = tmp_path / "hub" / "models--org--tiny" / "snapshots" / REVISION / "a.json"
    path.unlink()
    path.write_text("{ }")
    with pytest.raises(ModelError, match=r"whose a\.json has the checksum \w{64} and should have one that the cache"):
        hub.check_downloaded("base", "org/tiny", REVISION)


# --- which commit ----------------------------------------------------------------------------------------------------


class Asked:
    """A hub that answers with one commit."""

    def __init__(self, sha: str | None) -> None:
        self.sha, self.calls = sha, []

    def __call__(self) -> "Asked":
        return self

    def model_info(self, name: str, revision: str) -> "Asked":
        self.calls.append((name, revision))
        if self.sha is None:
            raise OSError("no network")
        return self


def test_the_commit_that_the_hub_names_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 6."""
    asked = Asked(OTHER)
    monkeypatch.setattr(hub, "HfApi", asked)
    ref = ModelRef(
        base="org/tiny", refiner="org/tiny-refiner", refiner_revision="v1", vae="org/vae", vae_revision=REVISION
    )
    found = hub.pinned(ref)
    assert asked.calls == [("org/tiny", "main"), ("org/tiny-refiner", "v1")]
    assert (found.revision, found.refiner_revision, found.vae_revision) == (OTHER, OTHER, REVISION)
    assert hub.pinned(found) is found


@pytest.mark.parametrize("name", ["nano", "/a/folder", "model.safetensors"])
def test_what_is_no_hub_id_asks_nobody(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hub, "HfApi", asked := Asked(OTHER))
    assert hub.pinned(ModelRef(base=name)) == ModelRef(base=name)
    assert asked.calls == []


def test_without_the_hub_the_cache_s_own_commit_is_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", Asked(None))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(source, tmp_path / "hub", "org/tiny")
    assert hub.pinned(ModelRef(base="org/tiny")).revision == REVISION
    with pytest.raises(ModelError, match=r"received 'org/other' at revision 'main', of which the hub says: OSError"):
        hub.pinned(ModelRef(base="org/other"))


# --- which files -----------------------------------------------------------------------------------------------------


def test_a_repository_without_an_fp16_variant_is_fetched_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 5: most fine-tunes."""
    calls = []

    class Pipeline:
        @staticmethod
        def download(name: str, variant: str | None = None, **options: object) -> str:
            calls.append((name, variant, options["revision"]))
            if variant == "fp16":
                raise ValueError("no such modeling files are available")
            return "/cache/org/tiny"

    assert models._downloaded(Pipeline, "org/tiny", REVISION, {}) == Path("/cache/org/tiny")
    assert calls == [("org/tiny", "fp16", REVISION), ("org/tiny", None, REVISION)]
