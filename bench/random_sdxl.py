"""SDXL without its weights: its own configurations, filled with random numbers, which take as long as the real ones.

Everything is made on the device, so nothing is read or downloaded but nano's tokenizers: random text encoders do not
mind whose words the numbers stand for. `TINY` has the same classes in miniature, to try a benchmark out.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_lab.config import ModelRef, RuntimeProfile
from sdxl_lab.diffusion.inventory import NANO, SDXL
from sdxl_lab.diffusion.models import SDXL_LATENT_RGB, Denoiser, Models, laid_out

# Words of a config.json that say whose it is, and tokens that nano's tokenizers have other numbers for.
OTHER = {"_class_name", "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id"}


def _published(part: str) -> dict[str, Any]:
    """A part's configuration as SDXL's base has it."""
    told = json.loads((SDXL / "base" / part / "config.json").read_text())
    return {name: value for name, value in told.items() if name not in OTHER}


UNET, TEXT_ENCODER, TEXT_ENCODER_2 = (_published(part) for part in ("unet", "text_encoder", "text_encoder_2"))
VAE = _published("vae") | {"force_upcast": False}  # as in the VAE that the configuration "sdxl" names, made for float16
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Scale:
    """The configurations of one size of model, the side in pixels of the images that time it, and their steps."""

    name: str
    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any]
    vae: Mapping[str, Any]
    side: int
    steps: int


TRUE = Scale("true", UNET, TEXT_ENCODER, TEXT_ENCODER_2, VAE, side=1024, steps=30)
_NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = Scale(
    "tiny",
    UNET
    | {
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
    TEXT_ENCODER | _NARROW | {"projection_dim": 16, "vocab_size": 1000},
    TEXT_ENCODER_2 | _NARROW | {"projection_dim": 16, "vocab_size": 1000},
    VAE | {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    side=64,
    steps=3,
)
SCALES = {scale.name: scale for scale in (TRUE, TINY)}
REF = ModelRef(base="random/sdxl", revision="0" * 40)  # a name for the records; nothing is loaded by it


def filled(module: Any, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Any:
    """A module that was built on the meta device, with the same random weights for the same seed on the same device.
    Weights are as large as keeps activations near one, so that half precision holds them."""
    module = torch.nn.Module.to(module, dtype).to_empty(device=device).eval().requires_grad_(False)
    draw = torch.Generator(device).manual_seed(seed)
    for name, weight in module.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            weight.uniform_(-1, 1, generator=draw).mul_((3 / weight[0].numel()) ** 0.5)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"a buffer must be one whose content is known here, such as position_ids; received {name}")
        buffer.copy_(torch.arange(buffer.shape[-1], device=device))
    return module


def new_unet(scale: Scale = TRUE) -> UNet2DConditionModel:
    """On the meta device, without weights. At true size it has 2.567 B parameters: 5.1 GB in half precision."""
    with torch.device("meta"):
        return UNet2DConditionModel(**scale.unet)


@dataclass(frozen=True)
class Parts:
    """The modules of an SDXL base on one device, and its tokenizers."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]

    @classmethod
    def random(cls, scale: Scale, device: torch.device, dtype: torch.dtype) -> "Parts":
        first, second = (
            CLIPTokenizer.from_pretrained(NANO / "base" / name, local_files_only=True)
            for name in ("tokenizer", "tokenizer_2")
        )
        with torch.device("meta"):
            text_encoder = CLIPTextModel(CLIPTextConfig(**scale.text_encoder, **_marks(first)))
            text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**scale.text_encoder_2, **_marks(second)))
            vae = AutoencoderKL(**scale.vae)
        return cls(
            unet=filled(new_unet(scale), dtype, device),
            text_encoder=filled(text_encoder, dtype, device),
            text_encoder_2=filled(text_encoder_2, dtype, device),
            vae=filled(vae, dtype, device),
            tokenizers=(first, second),
        )

    def models(self, profile: RuntimeProfile) -> Models:
        """As the engine takes them. The profile's device and dtype must be those of the parts."""
        base = Denoiser(
            unet=laid_out(self.unet, profile),
            tokenizers=self.tokenizers,
            text_encoders=(self.text_encoder, self.text_encoder_2),
            scheduler_config=dict(EulerDiscreteScheduler(**SCHEDULER).config),
            zero_negative=True,
            aesthetic=False,
        )
        rgb = np.array(SDXL_LATENT_RGB, dtype=np.float32)
        return Models(base, None, self.vae, self.unet.device, self.unet.dtype, rgb, REF)

    def pipeline(self) -> StableDiffusionXLPipeline:
        """As diffusers takes them, without watermark and progress bar."""
        diffusers.utils.logging.disable_progress_bar()
        logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)  # fields that Euler ignores
        pipe = StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            unet=self.unet,
            scheduler=EulerDiscreteScheduler(**SCHEDULER),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _marks(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """The tokens by which a text encoder finds the text's beginning and end."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
