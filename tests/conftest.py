"""Fixtures that more than one room of the suite needs."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_lab.config import GenerationConfig, ModelRef

# Workers side by side, and the processes they start, share the cores: torch would take all of them for each.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is cached in the home, by the tests and by the processes that they start, goes to a folder of their own; all
    but this project's part of it stays in reach."""
    real = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = tmp_path_factory.mktemp("cache")
    for entry in real.iterdir() if real.is_dir() else ():
        if entry.name != "sdxl_lab":
            (own / entry.name).symlink_to(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base/` and `refiner/`: the shape of nano with random weights."""
    import torch

    from recipes.nano import clip, publish, unet, vae, words

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizers = words.train_tokenizers()
    publish.save_pipeline_files(folder, tokenizers)
    towers = clip.Towers(*tokenizers)
    base = unet.new_unet(2 * clip.WIDTH, time_ids=6)
    parts = {
        "base/vae": vae.new_vae(),
        "base/unet": base,
        "base/text_encoder": publish.without_projection(towers.text_encoder),
        "base/text_encoder_2": publish.text_tower(towers),
        "refiner/unet": unet.refiner_from(base),
        "clip": towers.clip,
    }
    for name, part in parts.items():
        publish.save(folder / name, part)
    return folder


@pytest.fixture
def tiny_config(tiny_model: Path) -> GenerationConfig:
    """Four steps at 64x64 with the random model."""
    model = ModelRef(base=str(tiny_model / "base"), refiner=str(tiny_model / "refiner"))
    return GenerationConfig(model=model, steps=4, width=64, height=64)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
