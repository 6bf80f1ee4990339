"""The recipe of nano from end to end, with two steps a stage: does it run, resume, and write what diffusers loads?"""

import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from recipes.nano.__main__ import TINY, main, train
from recipes.nano.evaluate import sides_in_noise
from sdxl_lab.config import GenerationConfig, ModelRef, RefinerConfig, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.job import ImageRequest

ROOT = Path(__file__).parents[2]
STAGES = ("vae", "clip", "base-small", "base-large", "refiner")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(work: Path, target: Path) -> str:
    with redirect_stdout(io.StringIO()) as said:
        main(["--tiny", "--work", str(work), "--target", str(target)])
    return said.getvalue()


def weights(target: Path) -> dict[str, bytes]:
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders `work` and `target` of a run, a process, that was stopped after its second stage and is taken up
    again."""
    work, target = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "recipes.nano", "--tiny", "--work", work, "--target", target]
    first = subprocess.run([*command, "--until", "clip"], cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "vae: step 2/2" in first.stdout
    assert "base-small" not in first.stdout
    assert not (target / "base" / "unet").exists()
    second = run(work, target)
    assert "vae: resumed at step 2 of 2" in second
    assert "vae: step" not in second
    assert "refiner: step 2/2" in second
    return work, target


def test_every_part_is_written_as_its_fp16_variant(trained):
    parts = ("base/unet", "base/vae", "base/text_encoder", "base/text_encoder_2", "refiner/unet", "clip")
    found = weights(trained[1])
    assert {str(Path(name).parent) for name in found} == set(parts)
    assert all(name.endswith(".fp16.safetensors") for name in found)
    assert sum(len(content) for content in found.values()) < 40e6


def test_every_stage_leaves_its_curve(trained):
    for stage in STAGES:
        rows = (trained[0] / stage / "curve.csv").read_text().splitlines()
        assert rows[0] == "step,loss,learning_rate,seconds_a_step"
        assert np.isfinite(float(rows[-1].split(",")[1])), stage


def test_a_finished_run_changes_nothing_when_it_is_started_again(trained):
    work, target = trained
    before = weights(target)
    said = run(work, target)
    for stage in STAGES:
        assert f"{stage}: resumed at step 2 of 2" in said
        assert f"{stage}: step" not in said
    assert weights(target) == before


def test_diffusers_loads_the_base_like_any_other_checkpoint_and_draws(trained):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(trained[1] / "base", variant="fp16", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe("A cat in a hat", num_inference_steps=2, width=64, height=64, output_type="np").images[0]
    assert pixels.shape == (64, 64, 3)
    assert np.isfinite(pixels).all()


def test_the_engine_draws_with_base_and_refiner(trained):
    model = ModelRef.named(str(trained[1]))
    config = GenerationConfig(model=model, steps=5, width=64, height=64, refiner=RefinerConfig())
    with Engine.load(config, RuntimeProfile(device="cpu")) as engine:
        image = engine.draw(ImageRequest(config, "A cat in a hat", 1))
    assert image.record.unet_calls == {"base": 4, "refiner": 1}


def test_training_goes_on_from_shipped_weights_without_anyones_checkpoints(tiny_model, tmp_path):
    train(tmp_path / "work", tmp_path / "target", TINY, shipped=tiny_model)
    before, after = weights(tiny_model), weights(tmp_path / "target")
    assert {"base/unet", "refiner/unet", "base/text_encoder"} <= {str(Path(name).parent) for name in after}
    unet = "base/unet/diffusion_pytorch_model.fp16.safetensors"
    assert after[unet] != before[unet]

    from safetensors.torch import load

    old, new = load(before[unet]), load(after[unet])
    moved = max(float((old[name].float() - new[name].float()).abs().max()) for name in old)
    assert moved < 0.01, "it starts from the shipped weights, not from new ones"
    for config in (tmp_path / "target").rglob("config.json"):
        assert str(tiny_model) not in config.read_text(), "a published model names no folder of the machine"


def test_the_larger_the_image_the_better_noise_tells_which_side_things_are_on():
    autoencoder = AutoencoderKL.from_pretrained(NANO / "base" / "vae", variant="fp16", torch_dtype=torch.float32)
    small, large = (sides_in_noise(autoencoder, side, count=8) for side in (64, 256))
    assert 0.5 < small < 0.75 < large < 1
