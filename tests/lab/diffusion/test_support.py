"""Families that the engine does not draw are refused by name when they are loaded, never drawn wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from sdxl_lab.config import ModelRef, RuntimeProfile
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.models import load
from sdxl_lab.diffusion.support import SCHEDULERS

CPU = RuntimeProfile(device="cpu", dtype="float32")


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("base/scheduler", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "an EDM model, as Playground 2.5 is one"),
    ("base/scheduler", {"_class_name": "EDMEulerScheduler"}, "an EDM model"),
    ("base/scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a flow-matching model"),
    ("base/scheduler", {"prediction_type": "flow_prediction"}, "a flow-matching model"),
    ("base/scheduler", {"prediction_type": "sample"}, "with sample"),
    ("base/scheduler", {"timestep_type": "continuous"}, "an EDM model, as CosXL is one"),
    ("base/scheduler", {"use_flow_sigmas": True}, "with True"),
    ("base/scheduler", {"beta_schedule": "sigmoid"}, "with sigmoid"),
    ("refiner/scheduler", {"_class_name": "EDMEulerScheduler"}, "an EDM model"),
    ("base/unet", {"in_channels": 8}, "a model that edits images by instruction"),
    ("base/unet", {"addition_embed_type": "text_image"}, "with text_image"),
    ("base/unet", {"addition_embed_type": None}, "with None"),
    ("base/unet", {"encoder_hid_dim_type": "ip_image_proj"}, "with ip_image_proj"),
    ("base/unet", {"_class_name": "UNetMotionModel"}, "with UNetMotionModel"),
    ("refiner/unet", {"in_channels": 9}, "an inpainting model"),
    ("base/vae", {"latent_channels": 16}, "with 16"),
    ("base/vae", {"_class_name": "AutoencoderTiny"}, "a decoder for previews"),
    ("base/text_encoder", {"architectures": ["ChatGLMModel"]}, "ChatGLMModel"),
]


@pytest.mark.parametrize(("part", "says", "said"), FOREIGN, ids=[f"{part} {says}" for part, says, _ in FOREIGN])
def test_another_family_is_refused_by_name(copied, part, says, said):
    """Case 3 and its kind."""
    (path,) = (each for each in (copied / part).glob("*config.json") if "tokenizer" not in each.name)
    path.write_text(json.dumps(json.loads(path.read_text()) | says))
    role, _, name = part.partition("/")
    key = next(iter(says))
    with pytest.raises(ModelError, match=rf"the {role} model must be one .* whose {name} has {key} .*{said}.* Example"):
        load(ModelRef.named(str(copied)), CPU)


@pytest.mark.parametrize(
    ("says", "said"), [({"latent_channels": 16}, "16"), ({"_class_name": "AutoencoderTiny"}, "pre")]
)
def test_a_vae_of_another_family_is_refused_by_name(copied, says, said):
    path = copied / "base" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | says))
    with pytest.raises(ModelError, match=rf"the vae model must be one .* whose vae has {next(iter(says))} .*{said}"):
        load(ModelRef(base="nano", vae=str(copied / "base" / "vae")), CPU)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_saved_with_any_of_these_schedulers_is_drawn(name):
    """They are diffusers' own, and made of betas and discrete timesteps."""
    scheduler = getattr(diffusers, name)()
    assert len(scheduler.alphas_cumprod) == scheduler.config.num_train_timesteps == 1000
