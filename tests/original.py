"""SDXL's parts in diffusers' layout, renamed to the original one and written as one file, as model sites have them.

The other way round than diffusers' `single_file_utils`, and written from the names that published files have.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

Weights = Mapping[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet(weights: Weights, layers: int) -> dict[str, torch.Tensor]:
    """`layers` is the UNet's `layers_per_block`."""
    attended = {int(found[1]) for name in weights if (found := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def renamed(name: str) -> str:
        for ours, theirs in UNET.items():
            if name.startswith(f"{ours}."):
                return name.replace(ours, theirs, 1)
        for ours, theirs in RESNET.items():
            if ".resnets." in name:
                name = name.replace(f".{ours}.", f".{theirs}.")
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", name):
            side, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
            index = block * (layers + 1) + layer + (side == "down")
            place = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{int(kind == 'attentions')}."
            return place + name[found.end() :]
        if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", name):
            return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op." + name[found.end() :]
        if found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.", name):
            block = int(found[1])
            return (
                f"output_blocks.{block * (layers + 1) + layers}.{1 + (block in attended)}.conv." + name[found.end() :]
            )
        middle = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
        found = re.match(r"mid_block\.((?:resnets|attentions)\.\d)\.", name)
        assert found, name
        return f"middle_block.{middle[found[1]]}." + name[found.end() :]

    return {f"model.diffusion_model.{renamed(name)}": weight for name, weight in weights.items()}


def vae(weights: Weights, blocks: int) -> dict[str, torch.Tensor]:
    """`blocks` is how many levels the VAE has."""

    def renamed(name: str) -> str:
        for ours, theirs in VAE.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        up = r"up_blocks\.(\d+)\."
        name = re.sub(rf"{up}resnets\.", lambda found: f"up.{blocks - 1 - int(found[1])}.block.", name)
        return re.sub(rf"{up}upsamplers\.0\.", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample.", name)

    found = {f"first_stage_model.{renamed(name)}": weight for name, weight in weights.items()}
    return {  # attention is by convolutions of one pixel
        name: weight[:, :, None, None] if ".attn_1." in name and weight.ndim == 2 else weight
        for name, weight in found.items()
    }


def clip(weights: Weights) -> dict[str, torch.Tensor]:
    """The first text encoder, in transformers' own names."""
    prefix = "conditioner.embedders.0.transformer.text_model."
    return {prefix + name.removeprefix("text_model."): weight for name, weight in weights.items()}


def open_clip(weights: Weights, place: int) -> dict[str, torch.Tensor]:
    """The second text encoder, in OpenCLIP's names; a base has it at `place` 1, a refiner at 0."""
    plain = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    found = {theirs: plain.pop(ours) for ours, theirs in OPEN_CLIP_ENDS.items()}
    found["text_projection"] = plain.pop("text_projection.weight").T.contiguous()
    found["logit_scale"] = torch.tensor(4.6)
    for kind in ("weight", "bias"):
        for name in [name for name in plain if name.endswith(f"self_attn.q_proj.{kind}")]:
            three = [plain.pop(name.replace("q_proj", f"{each}_proj")) for each in "qkv"]
            found[_block(name).replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}")] = torch.cat(three)
    for name, weight in plain.items():
        renamed = _block(name)
        for ours, theirs in OPEN_CLIP.items():
            renamed = renamed.replace(ours, theirs)
        found[renamed] = weight
    return {f"conditioner.embedders.{place}.model.{name}": weight for name, weight in found.items()}


def _block(name: str) -> str:
    return re.sub(r"^encoder\.layers\.", "transformer.resblocks.", name)


def part(folder: Path) -> dict[str, torch.Tensor]:
    """A part's weights, as its folder has them."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def described(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def base(model: Path) -> dict[str, torch.Tensor]:
    """All weights of `model/base` in the original layout."""
    folder = model / "base"
    return {
        **unet(part(folder / "unet"), described(folder / "unet")["layers_per_block"]),
        **vae(part(folder / "vae"), len(described(folder / "vae")["block_out_channels"])),
        **clip(part(folder / "text_encoder")),
        **open_clip(part(folder / "text_encoder_2"), 1),
    }


def refiner(model: Path) -> dict[str, torch.Tensor]:
    """The same of `model/refiner`, with what it shares with its base."""
    folder = model / "refiner"
    return {
        **unet(part(folder / "unet"), described(folder / "unet")["layers_per_block"]),
        **vae(part(model / "base" / "vae"), len(described(model / "base" / "vae")["block_out_channels"])),
        **open_clip(part(model / "base" / "text_encoder_2"), 0),
    }


def written(weights: Weights, path: Path, **words: str) -> Path:
    """The weights as one file, with `words` for its metadata. Tensor after tensor: the true model's fill the memory."""
    header: dict[str, object] = {"__metadata__": words} if words else {}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + weight.numel() * weight.element_size()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[weight.dtype]
        header[name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_name(f"{path.name}.part")  # what it replaces may be mapped into memory
    with beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return beside.replace(path)
