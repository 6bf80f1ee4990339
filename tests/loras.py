"""LoRAs with random numbers for the model at hand, in each layout that people's files have."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

UNET = r".*(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.[02](\.proj)?|proj_in|conv1)"
TEXT = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
Pairs = dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]


def parts_of(models: Any) -> dict[str, nn.Module]:
    """The parts of an engine's models, or of a pipeline, that a LoRA may change."""
    base = getattr(models, "base", None)
    if base is None:
        return {name: getattr(models, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    return {"unet": base.unet, "text_encoder": base.text_encoders[0], "text_encoder_2": base.text_encoders[1]}


def pairs(
    models: Any, *, rank: int = 4, seed: int = 0, text: bool = True, size: float = 0.12, unet: str = UNET
) -> Pairs:
    """A and B of every layer that the pattern matches, by part and layer."""
    draw = torch.Generator().manual_seed(seed)
    found: Pairs = {}
    for part, module in parts_of(models).items():
        if part != "unet" and not text:
            continue
        found[part] = {}
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and re.fullmatch(unet if part == "unet" else TEXT, name):
                out, *inner = layer.weight.shape
                down = torch.randn((rank, *inner), generator=draw) / torch.tensor(inner).prod().sqrt()
                up = torch.randn((out, rank, *[1] * (layer.weight.ndim - 2)), generator=draw) * size
                found[part][name.removeprefix("text_model.")] = down, up
    return found


def write(path: Path, found: Pairs, layout: str = "kohya", alpha: float | None = None) -> Path:
    """A file in the layout "kohya", "sgm" (kohya's on the original UNet's names), "diffusers", "old diffusers" or
    "peft", whose alpha is the rank where none is given."""
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt"}
    rank = next(iter(next(iter(found.values())).values()))[0].shape[0]
    for part, layers in found.items():
        for name, (down, up) in layers.items():
            for side, tensor in (("down", down), ("up", up)):
                tensors[KEYS[layout](part, name, side)] = tensor.clone()
            if alpha is not None and layout in ("kohya", "sgm"):
                tensors[KEYS[layout](part, name, "down").replace("lora_down.weight", "alpha")] = torch.tensor(alpha)
    if alpha is not None and layout == "peft":
        options = {"r": rank, "lora_alpha": alpha, "target_modules": ["to_q"]}
        said = {f"{part}.{key}": value for part in found for key, value in options.items()}
        metadata["lora_adapter_metadata"] = json.dumps(said)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def _kohya(part: str, name: str, side: str) -> str:
    names = {"unet": "lora_unet", "text_encoder": "lora_te1_text_model", "text_encoder_2": "lora_te2_text_model"}
    return f"{names[part]}_{name.replace('.', '_')}.lora_{side}.weight"


def _sgm(part: str, name: str, side: str) -> str:
    """The UNet's attentions by the original numbers of its blocks, of which each level has two in nano."""
    if part == "unet" and (place := re.match(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.(.*)", name)):
        way, block, layer, rest = place.groups()
        number = int(block) * 2 + int(layer) + (way == "down")
        level = f"{'input' if way == 'down' else 'output'}_blocks_{number}_1"
        return f"lora_unet_{level}_{rest.replace('.', '_')}.lora_{side}.weight"
    if part == "unet" and (place := re.match(r"mid_block\.attentions\.0\.(.*)", name)):
        return f"lora_unet_middle_block_1_{place[1].replace('.', '_')}.lora_{side}.weight"
    return _kohya(part, name, side)


def _diffusers(part: str, name: str, side: str) -> str:
    if part == "unet":
        return f"unet.{name}.lora.{side}.weight"
    return f"{part}.text_model.{name}.lora_linear_layer.{side}.weight"


def _old(part: str, name: str, side: str) -> str:
    """Processors had the attentions' layers once."""
    if part == "unet" and (place := re.fullmatch(r"(.*attn[12])\.(to_q|to_k|to_v|to_out)(\.0)?", name)):
        return f"unet.{place[1]}.processor.{place[2]}_lora.{side}.weight"
    return _diffusers(part, name, side)


def _peft(part: str, name: str, side: str) -> str:
    inner = name if part == "unet" else f"text_model.{name}"
    return f"{part}.{inner}.lora_{'A' if side == 'down' else 'B'}.weight"


KEYS: Mapping[str, Any] = {
    "kohya": _kohya,
    "sgm": _sgm,
    "diffusers": _diffusers,
    "old diffusers": _old,
    "peft": _peft,
}
