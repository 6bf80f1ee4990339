"""What a single `.safetensors` file holds, told from its header: an SDXL in the original layout, or what else.

The header names every tensor with its shape, and is read without the gigabytes behind it. Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_lab.diffusion.inventory import ModelError

LONGEST = 100_000_000  # bytes: what safetensors allows a header

# Where the original layout keeps the parts of an SDXL.
UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_ENCODER = "conditioner.embedders.0.transformer."
TEXT_ENCODER_2 = "conditioner.embedders.1.model."
REFINERS_TEXT_ENCODER = "conditioner.embedders.0.model."
PARTS = {"unet": UNET, "text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER_2, "vae": VAE}
LATENTS = f"{UNET}input_blocks.0.0.weight"  # the first convolution, (out, in, 3, 3)

# Other models' tensors, by what their names contain.
FOREIGN = {
    "edm_mean": "an EDM model, as Playground 2.5 is one",
    "edm_vpred.": "an EDM model that predicts v, as CosXL is one",
    "double_blocks.": "a Flux",
    "joint_blocks.": "a Stable Diffusion 3",
    "cond_stage_model.transformer.": "a Stable Diffusion 1",
    "cond_stage_model.model.": "a Stable Diffusion 2",
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "quant_state.": "a quantized model",
    "scaled_fp8": "a quantized model",
    "clip_l": "an embedding",
    "emb_params": "an embedding",
}
INPAINTING = 9  # channels of a UNet that sees a mask and the masked image's latents beside its own
CHANNELS = {8: "a model that edits images by instruction", INPAINTING: "an inpainting model"}


class Header(NamedTuple):
    """Every tensor's shape by its name, and the file's own words about itself."""

    shapes: Mapping[str, tuple[int, ...]]
    words: Mapping[str, str]

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)


class Told(NamedTuple):
    """What a file tells of itself; None where it tells nothing."""

    prediction_type: str | None = None
    zero_snr: bool | None = None


def header(path: Path) -> Header:
    """A file's header. Raises `ModelError` for what is no safetensors, or not whole."""
    rule = "a single-file model must be whole, in the safetensors format"
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content: dict[str, Any] = json.loads(file.read(min(length, LONGEST)))
        words = content.pop("__metadata__", {})
        shapes = {name: tuple(tensor["shape"]) for name, tensor in content.items()}
        end = max((tensor["data_offsets"][1] for tensor in content.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{rule}; received {str(path)!r}, which is none ({type(error).__name__}). Example: nano"
        ) from error
    if size < 8 + length + end:
        raise ModelError(
            f"{rule}; received {str(path)!r} with {size} of {8 + length + end} bytes: the download broke off. "
            "Example: nano"
        )
    return Header(shapes, words)


def told(found: Header) -> Told:
    """Whether the model predicts v, and whether its betas are rescaled to a terminal signal of zero.

    Fine-tunes carry empty tensors named `v_pred` and `ztsnr`, and some the metadata of Stability's ModelSpec.
    """
    spec = {"v": "v_prediction", "epsilon": "epsilon"}.get(found.words.get("modelspec.prediction_type", ""))
    return Told("v_prediction" if "v_pred" in found.shapes else spec, True if "ztsnr" in found.shapes else None)


def check(path: Path, role: str, found: Header, elsewhere: frozenset[str] = frozenset()) -> None:
    """`ModelError` for a file that is no SDXL of its `role`, base or refiner, or lacks a part. Parts named `elsewhere`
    come from other places."""
    rule = f"the {role} model must be an SDXL{' refiner' if role == 'refiner' else ''} in the original layout"
    received = f"received {str(path)!r}"
    for mark, family in FOREIGN.items():
        if any(name.startswith(mark) or f".{mark}" in name for name in found.shapes):
            raise ModelError(f"{rule}; {received}, which holds {family}. Example: sd_xl_base_1.0.safetensors")
    if "encoder.conv_in.weight" in found.shapes and not found.has(UNET):
        raise ModelError(f"{rule}; {received}, which holds a VAE alone. Example: --vae {path}")
    if "conv_in.weight" in found.shapes:
        raise ModelError(
            f"{rule}; {received}, which holds one part in diffusers' layout. Example: the folder with its "
            "model_index.json"
        )
    refiners = found.has(REFINERS_TEXT_ENCODER)
    if refiners != (role == "refiner") and (refiners or found.has(TEXT_ENCODER)):
        other = "a refiner: name it with --refiner-model" if refiners else "a base: name it with --model"
        raise ModelError(f"{rule}; {received}, which holds {other}. Example: nano")
    needed = [part for part in (PARTS if role == "base" else ("unet",)) if part not in elsewhere]
    lacking = [part for part in needed if not found.has(PARTS[part])]
    if lacking:
        hint = " A VAE can be named with --vae." if lacking == ["vae"] else ""
        raise ModelError(
            f"{rule}, with {', '.join(needed)}; {received} without {', '.join(lacking)}.{hint} "
            "Example: sd_xl_base_1.0.safetensors"
        )
    channels = found.shapes[LATENTS][1] if LATENTS in found.shapes else None
    drawn = (4,) if role == "refiner" else (4, INPAINTING)
    if channels not in drawn:
        meaning = CHANNELS.get(channels or 0, "another family")
        raise ModelError(
            f"{rule}, whose unet takes {' or '.join(map(str, drawn))} channels, which the engine draws; {received} "
            f"with {channels}: {meaning}. "
            "Example: sd_xl_base_1.0.safetensors"
        )
