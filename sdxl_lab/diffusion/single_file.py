"""A single `.safetensors` file in SDXL's original layout to diffusers' pipeline, by its own `from_single_file`.

Such a file holds weights alone. What else a pipeline takes comes from a folder of configurations and tokenizers. Where
none is named, the configurations are SDXL's own, which come with this package, and the tokenizers those of its pinned
revision on the hub.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_lab.config import MODELS
from sdxl_lab.diffusion import checkpoint, hub
from sdxl_lab.diffusion.inventory import SDXL, ModelError


def pipeline(cls: Any, path: Path, configs: Path, dtype: Mapping[str, torch.dtype], **given: Any) -> Any:
    """The pipeline `cls` of a file, its UNet in `dtype["unet"]`, all else in `dtype["default"]`.

    `configs` is a folder in diffusers' layout, with or without weights. Parts that are `given` are not taken from the
    file. Raises `ModelError` for weights that are not there, and whatever diffusers raises.
    """
    weights = load_file(path)  # mapped: read when a part takes them
    options = {"config": str(configs), "local_files_only": True}
    channels = weights[checkpoint.LATENTS].shape[1]  # 9 where the file inpaints, whatever the configurations say
    parts = {
        "unet": UNet2DConditionModel.from_single_file(
            weights, subfolder="unet", dtype=dtype["unet"], in_channels=channels, **options
        ),
        **_text_parts(weights, configs, dtype["default"], given),
    }
    loaded = cls.from_single_file(str(path), dtype=dtype["default"], add_watermarker=False, **options, **parts, **given)
    for name, part in loaded.components.items():
        if isinstance(part, torch.nn.Module) and name not in given:
            check_whole(part, name, path)
    return loaded


def vae(path: Path, configs: Path, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE in a file of its own, in the original layout or diffusers', or inside a whole model's."""
    options = {"config": str(configs), "subfolder": "vae", "local_files_only": True}
    loaded: AutoencoderKL = AutoencoderKL.from_single_file(str(path), dtype=dtype, **options)
    check_whole(loaded, "vae", path)
    return loaded


def check_whole(part: torch.nn.Module, name: str, path: Path) -> None:
    """`ModelError` for a part with weights that the file did not have: diffusers leaves them empty without a word."""
    lacking = [key for key, value in part.named_parameters() if value.is_meta]
    if lacking:
        raise ModelError(
            f"a single-file model must have all weights of its {name}; received {str(path)!r} without "
            f"{len(lacking)} of them, such as {lacking[0]}. Example: sd_xl_base_1.0.safetensors"
        )


def _text_parts(
    weights: Mapping[str, torch.Tensor], configs: Path, dtype: torch.dtype, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The text encoders but for those given, and SDXL's tokenizers where `configs` are its own.

    Each encoder sees its own weights only: diffusers tells a file's two apart by their width, which SDXL's have, and
    nano's, of one width, have not.
    """
    parts: dict[str, Any] = {}
    for name, encoder, prefix in (
        ("text_encoder", CLIPTextModel, checkpoint.TEXT_ENCODER),
        ("text_encoder_2", CLIPTextModelWithProjection, checkpoint.TEXT_ENCODER_2),
    ):
        if (configs / name).is_dir() and name not in given:
            own = {key: value for key, value in weights.items() if key.startswith(prefix)}
            parts[name] = create_diffusers_clip_model_from_ldm(
                encoder, own, subfolder=name, config=str(configs), torch_dtype=dtype, local_files_only=True
            )
    return parts | (tokenizers() if parts and SDXL in configs.parents else {})


def tokenizers() -> dict[str, CLIPTokenizer]:
    """SDXL's two, from its pinned revision on the hub: a few small files, fetched once. Raises `ModelError`."""
    sdxl = MODELS["sdxl"]
    try:
        folder = snapshot_download(sdxl.base, revision=sdxl.revision, allow_patterns=["tokenizer*/*"])
        names = ("tokenizer", "tokenizer_2")
        found = {name: CLIPTokenizer.from_pretrained(folder, subfolder=name) for name in names}
    except Exception as error:  # the hub client, its transport and transformers each raise kinds of their own
        raise ModelError(
            "a single-file model must have tokenizers beside it, which no such file holds; received none in "
            f"model.config, and of {sdxl.base}'s the hub says: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Example: model.config = stable-diffusion-xl, a folder in diffusers' layout"
        ) from error
    hub.check_downloaded("config", sdxl.base, str(sdxl.revision))
    return found
