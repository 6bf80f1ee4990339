"""Writing trained parts to the folders that diffusers and transformers load, as the float16 variant `fp16`."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.nano import clip, unet


def text_tower(towers: clip.Towers) -> CLIPTextModelWithProjection:
    """A copy of the CLIP model's text tower, which is trained further as SDXL's second text encoder."""
    encoder = CLIPTextModelWithProjection(towers.clip.config.text_config)
    encoder.text_model.load_state_dict(towers.clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(towers.clip.text_projection.state_dict())
    return encoder


def without_projection(encoder: CLIPTextModelWithProjection) -> CLIPTextModel:
    """The encoder without its projection, which SDXL's first text encoder does not have."""
    plain = CLIPTextModel(encoder.config)
    own = {name.removeprefix("text_model."): weight for name, weight in encoder.state_dict().items()}
    prefix = "text_model." if any(name.startswith("text_model.") for name in plain.state_dict()) else ""
    plain.load_state_dict({prefix + name: weight for name, weight in own.items() if name != "text_projection.weight"})
    return plain


def with_projection(plain: CLIPTextModel) -> CLIPTextModelWithProjection:
    encoder = CLIPTextModelWithProjection(plain.config).float()  # the config may say float16, as published
    encoder.text_model.load_state_dict(getattr(plain, "text_model", plain).state_dict())
    return encoder


def save(folder: Path, model: Any) -> None:
    """float16 safetensors under the `fp16` variant's name, as SDXL is published."""
    for old in folder.glob("*.safetensors"):  # tokenizers and the like may share the folder
        old.unlink()
    model.to(torch.float16).save_pretrained(folder, variant="fp16")
    model.float()
    described = json.loads((folder / "config.json").read_text())
    described.pop("_name_or_path", None)  # where the weights came from on this machine
    write_json(folder / "config.json", described)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_pipeline_files(target: Path, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
    """Write everything but weights: tokenizers, scheduler, and the two indexes with each part's class."""
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        tokenizer.save_pretrained(target / "base" / name)
    CLIPImageProcessorPil(
        size={"shortest_edge": clip.SIDE}, crop_size={"height": clip.SIDE, "width": clip.SIDE}
    ).save_pretrained(target / "clip")
    tokenizers[1].save_pretrained(target / "clip")
    scheduler = {k: v for k, v in unet.new_scheduler().config.items() if not k.startswith("_")} | unet.FOREIGN_FIELDS
    shared = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    base = {
        **shared,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    refiner = {
        **shared,
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    for name, index in (("base", base), ("refiner", refiner)):
        write_json(target / name / "model_index.json", index)
        write_json(
            target / name / "scheduler" / "scheduler_config.json",
            {"_class_name": "EulerDiscreteScheduler", **scheduler},
        )
