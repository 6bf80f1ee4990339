"""What a model is: every file that decides its images, and no other."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_lab.config import GenerationConfig, ModelRef, RuntimeProfile
from sdxl_lab.diffusion.inventory import ModelError, identity, inventory


def ref(folder: Path, **more: str | None) -> ModelRef:
    return ModelRef(**({"base": str(folder / "base"), "refiner": str(folder / "refiner")} | more))


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edited(path: Path) -> None:
    """One bit of a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


BASE = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]
REFINER = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
]


def test_the_inventory_names_every_file_that_decides_an_image(tiny_model):
    assert list(inventory(tiny_model / "base", "base")) == BASE
    assert list(inventory(tiny_model / "refiner", "refiner")) == REFINER


@pytest.mark.parametrize(
    ("role", "path"), [*(("base", path) for path in BASE[1:]), *(("refiner", path) for path in REFINER[1:])]
)
def test_an_edit_of_any_such_file_makes_another_model(copied, role, path):
    before = identity(ref(copied))
    edited(copied / role / path)
    now = identity(ref(copied))
    assert {name for name in before if now[name] != before[name]} == {role}


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_an_edit_of_the_index_makes_another_model(copied, role):
    before, path = identity(ref(copied)), copied / role / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"force_zeros_for_empty_prompt": not index["force_zeros_for_empty_prompt"]}))
    assert identity(ref(copied))[role] != before[role]


ADDED = [
    "base/vae/latent_rgb.json",
    "base/tokenizer/added_tokens.json",
    "base/tokenizer/merges.txt",
    "base/unet/diffusion_pytorch_model.safetensors",
    "base/unet/diffusion_pytorch_model.safetensors.index.json",
]


@pytest.mark.parametrize("path", ADDED)
def test_a_new_file_that_decides_images_makes_another_model(copied, path):
    before = identity(ref(copied))
    (copied / path).write_text("[]")
    assert identity(ref(copied)) != before


NOTHING = [
    "base/README.md",
    "base/LICENSE.txt",
    "base/preview.png",
    "base/.DS_Store",
    "base/notes.json",
    "base/sd_xl_base_1.0.safetensors",  # the whole model in one file, as the hub has it beside the parts
    "base/unet/.DS_Store",
    "base/unet/._config.json",
    "base/unet/README.md",
    "base/unet/training.png",
    "base/unet/model.onnx",
    "base/vae_1_0/config.json",  # no part of the pipeline
    "base/.cache/huggingface/download.json",
    "refiner/vae/config.json",  # a refiner takes its base's
    "refiner/text_encoder_2/config.json",
]


@pytest.mark.parametrize("path", NOTHING)
def test_a_file_that_decides_nothing_does_not_count(copied, path):
    before, path = identity(ref(copied)), copied / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("anything")
    assert identity(ref(copied)) == before


def test_links_are_followed(copied, tmp_path):
    before = identity(ref(copied))
    elsewhere = tmp_path / "elsewhere"
    shutil.move(copied / "base/unet", elsewhere)
    (copied / "base/unet").symlink_to(elsewhere)
    shutil.move(copied / "base/vae/config.json", tmp_path / "blob")
    (copied / "base/vae/config.json").symlink_to(os.path.relpath(tmp_path / "blob", copied / "base/vae"))
    assert identity(ref(copied)) == before, "a link is what it points to"
    edited(elsewhere / "diffusion_pytorch_model.fp16.safetensors")
    changed = identity(ref(copied))
    assert changed["base"] != before["base"]
    edited(tmp_path / "blob")
    assert identity(ref(copied))["base"] != changed["base"]


def test_another_vae_takes_the_place_of_the_base_s_own(copied, tmp_path):
    shutil.copytree(copied / "base/vae", tmp_path / "vae")
    named = ref(copied, vae=str(tmp_path / "vae"))
    before = identity(named)
    assert set(before) == {"base", "refiner", "vae"}
    assert identity(ref(copied, vae=str(copied)))["vae"] == before["vae"], "a model's folder names its vae"
    edited(copied / "base/vae/config.json")
    assert identity(named) == before, "nobody reads it"
    (tmp_path / "vae/config.json").write_text("{}")
    assert {name for name, value in identity(named).items() if value != before[name]} == {"vae"}


def test_the_same_files_elsewhere_are_the_same_model(tiny_model, copied):
    assert identity(ref(copied)) == identity(ref(tiny_model)) == identity(ModelRef.named(str(tiny_model)))
    assert all(value.startswith("sha256 ") and len(value) == 71 for value in identity(ref(copied)).values())


def test_the_identity_of_a_hub_model_is_its_revision():
    found = identity(GenerationConfig.for_model("sdxl").model)
    assert found["base"] == "revision 462165984030d82259a11f4367a4eed129e94a7b"
    assert set(found) == {"base", "refiner", "vae"}


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: shutil.rmtree(folder / "base"), "the base model must be a folder with the model_index.json"),
    (lambda folder: (folder / "base/model_index.json").write_text("{"), "base model must be .*model_index.json"),
    (lambda folder: (folder / "refiner/model_index.json").write_bytes(b"\xff"), "the refiner model must be"),
    (lambda folder: (folder / "vae/config.json").unlink(), r"the vae must be .* Example: madebyollin"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[said for _, said in DAMAGE])
def test_a_folder_that_is_no_model_has_no_identity(copied, damage, said):
    shutil.copytree(copied / "base/vae", copied / "vae")
    damage(copied)
    with pytest.raises(ModelError, match=said):
        identity(ref(copied, vae=str(copied / "vae")))


# --- case 1 of the reports ------------------------------------------------------------------------------------------


def test_a_sweep_after_an_edit_of_the_scheduler_s_configuration_draws_anew(copied, tmp_path):
    """`epsilon` to `v_prediction`: other images, under the same name of the model."""
    from sdxl_lab.research.cache import Cell, ImageCache

    config = GenerationConfig(model=ref(copied), steps=2, width=64, height=64)
    cell, cpu = Cell(config, "a cat", 1), RuntimeProfile(device="cpu", dtype="float32")
    with ImageCache(tmp_path / "cache", cpu) as cache:
        assert cache.complete([cell]) == {}
        before = cache.image(cache.key(cell))
    path = copied / "base/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with ImageCache(tmp_path / "cache", cpu) as cache:
        assert cache.key(cell) not in cache
        assert cache.complete([cell]) == {}
        after = cache.image(cache.key(cell))
    assert before.image.tobytes() != after.image.tobytes()
