"""`python -m recipes.nano.lora`: a LoRA that teaches nano a style, things as neon tubes on a dark ground.

The same scenes and captions as nano's own, drawn in the style; the UNet is frozen but for PEFT's low-rank changes of
its attentions, feed-forwards and convolutions (Hu et al. 2021, arXiv 2106.09685). What is learnt is written in kohya's
layout, as model sites hand LoRAs out. Checkpoints are kept under `--work`; a run that was stopped goes on from them.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from recipes.nano import unet
from recipes.nano.__main__ import NANO, start_base
from recipes.nano.clip import Towers
from recipes.nano.fit import autocast, fit, generator
from recipes.nano.scenes import COLOURS, NOUN_SHAPES, SUPERSAMPLE, Scene, Thing, caption, hat_parts
from recipes.nano.words import train_tokenizers

RANK = 4
# The layers that learn: the attentions with their projections, the feed-forwards, the residual blocks' convolutions.
LEARNT = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2)"
DROPPED = 0.1
GROUND = 0.17  # what is left of the background's brightness
TUBE = 0.075  # a line's width, in a thing's radius
GLOW = (0.06, 0.2)  # the deviations of the light around it, likewise


# --- the style -------------------------------------------------------------------------------------------------------


def neon(scene: Scene, side: int, rng: random.Random) -> tuple[Image.Image, list[float]]:
    """A scene in the style, `side` by `side` pixels, and its micro-conditioning."""
    canvas = np.ones((side, side, 3), np.float32) * np.array(COLOURS[scene.background], np.float32) * GROUND
    for thing in scene.things:
        canvas = _lit(canvas, thing, side)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8)), [side, side, 0, 0, side, side]


def _lit(canvas: np.ndarray, thing: Thing, side: int) -> np.ndarray:
    """With a thing in front: its tubes, which hide what is behind them inside its outline, and their light."""
    size = (side * SUPERSAMPLE, side * SUPERSAMPLE)
    scale = thing.radius * side * SUPERSAMPLE
    x, y = thing.x * size[0], thing.y * size[1]
    tubes, cover = Image.new("RGB", size), Image.new("L", size)
    pen, mask = ImageDraw.Draw(tubes), ImageDraw.Draw(cover)
    layers = [(thing.colour, NOUN_SHAPES[thing.noun].parts())]
    if thing.hat:
        layers.append((thing.hat, hat_parts(*NOUN_SHAPES[thing.noun].hat)))
    for colour, parts in layers:
        for _, outline in parts:
            points = [(x + px * scale, y + py * scale) for px, py in outline]
            pen.polygon(points, fill=(0, 0, 0))
            mask.polygon(points, fill=255)
            pen.line([*points, *points[:2]], fill=_shining(colour), width=max(2, round(TUBE * scale)), joint="curve")
    small = tubes.reduce(SUPERSAMPLE)
    light = sum(
        np.asarray(small.filter(ImageFilter.GaussianBlur(glow * thing.radius * side)), np.float32) for glow in GLOW
    )
    inside = np.asarray(cover.reduce(SUPERSAMPLE), np.float32)[:, :, None] / 255
    lit: np.ndarray = canvas * (1 - 0.6 * inside) + np.asarray(small, np.float32) + 0.8 * light
    return lit


def _shining(colour: str) -> tuple[int, int, int]:
    """A colour as a tube shines in it: bright, and black as a dim grey."""
    if colour == "black":
        return (95, 95, 110)
    rgb = np.array(COLOURS[colour], float)
    bright = rgb * 250 / rgb.max()
    red, green, blue = (int(value) for value in bright)
    return red, green, blue


# --- training --------------------------------------------------------------------------------------------------------


def train(
    work: Path, out: Path, *, steps: int, peak_lr: float, scenes: tuple[int, int], batches: tuple[int, int]
) -> Path:
    """Train on pools of so many scenes at 128 and 256 px, taken in turn with so many images a step, and write the LoRA
    to `out`."""
    tokenizers = train_tokenizers()
    base = start_base(Towers(*tokenizers), NANO, tokenizers)
    vae = AutoencoderKL.from_pretrained(NANO / "base" / "vae", variant="fp16", torch_dtype=torch.float32)
    pools = [
        unet.make_pool(vae, work / f"neon-{side}.pt", count=count, side=side, seed=seed, draw=neon)
        for side, count, seed in ((128, scenes[0], 31), (256, scenes[1], 32))
    ]
    base.requires_grad_(False)
    base.unet.set_attn_processor(AttnProcessor())  # on a CPU, plain attention trains faster than the fused kind
    torch.manual_seed(5)
    base.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LEARNT))
    learnt = nn.ParameterList(each for each in base.unet.parameters() if each.requires_grad)
    print(f"neon: {sum(each.numel() for each in learnt):,} parameters", flush=True)
    turns = list(zip(pools, batches, strict=True))
    fit(
        learnt,
        lambda step: _loss(step, base, tokenizers, *turns[step % len(turns)]),
        steps=steps,
        peak_lr=peak_lr,
        folder=work / "neon",
        ema=0.98,
        weight_decay=0.0,
    )
    save(out, base.unet)
    return out


def _loss(
    step: int, base: unet.Base, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], pool: unet.Pool, size: int
) -> torch.Tensor:
    """As nano's base learns: epsilon, with the high noise levels raised; a tenth of the captions is dropped."""
    draw, rng = generator(step, seed=6), random.Random(step)
    chosen = torch.randint(len(pool.scenes), (size,), generator=draw)
    t = (1000 * torch.rand(size, generator=draw) ** 0.65).long().clamp(max=999)
    noisy, noise = unet.noised(pool.latents[chosen], t, draw)
    texts = [caption(pool.scenes[i], rng if rng.random() < 0.4 else None) for i in chosen.tolist()]
    kept = (torch.rand(size, generator=draw) > DROPPED).float()
    with autocast():
        with torch.no_grad():
            hidden, pooled = unet.embed(base, tokenizers, texts)
        added = {"text_embeds": pooled * kept[:, None], "time_ids": pool.time_ids[chosen]}
        out = base.unet(noisy, t, encoder_hidden_states=hidden * kept[:, None, None], added_cond_kwargs=added).sample
    return ((out.float() - noise).square().mean((1, 2, 3)) * unet.min_snr(t) * unet.evened(t)).mean()


def save(path: Path, model: nn.Module) -> None:
    """The UNet's LoRA in kohya's layout, float16: `lora_unet_LAYER.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    tensors = {}
    for key, weight in get_peft_model_state_dict(model, adapter_name="default").items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[side] }.weight"] = weight.half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"ss_network_dim": str(RANK), "ss_network_alpha": str(RANK), "ss_base_model_version": "sdxl_base_v1-0"}
    save_file(tensors, path, metadata={"format": "pt", **said})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.lora", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/nano-lora"), help="checkpoints and caches")
    parser.add_argument("--out", type=Path, default=NANO / "loras" / "neon.safetensors", help="the LoRA to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--scenes", type=int, nargs=2, default=(3000, 1200), metavar=("SMALL", "LARGE"))
    parser.add_argument("--batches", type=int, nargs=2, default=(24, 8), metavar=("SMALL", "LARGE"))
    asked = parser.parse_args(arguments)
    scenes, batches = tuple(asked.scenes), tuple(asked.batches)
    path = train(asked.work, asked.out, steps=asked.steps, peak_lr=asked.peak_lr, scenes=scenes, batches=batches)
    print(f"{path}  {math.ceil(path.stat().st_size / 1024)} KiB")


if __name__ == "__main__":
    main()
