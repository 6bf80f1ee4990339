"""`python -m recipes.nano`: train the whole miniature, stage by stage, and write its folders.

Every stage keeps its checkpoints under `--work` and resumes from them; a finished stage is not repeated.
`--continue-from-shipped` trains on from the shipped weights, without checkpoints.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.nano import clip, unet, vae, words
from recipes.nano.publish import save, save_pipeline_files, text_tower, with_projection, without_projection, write_json

NANO = Path(__file__).parents[2] / "sdxl_lab" / "nano"


@dataclass(frozen=True)
class TrainingPlan:
    """The training steps and the scenes of each stage. nano's README says what made the shipped weights."""

    vae: int = 4900
    clip: int = 800
    base_small: int = 3600
    base_large: int = 2600
    refiner: int = 700
    scenes_vae: int = 2400
    scenes_clip: int = 16_000
    scenes_small: int = 24_000
    scenes_large: int = 8_000
    scenes_refiner: int = 3_000


TINY = TrainingPlan(2, 2, 2, 2, 2, 16, 16, 16, 16, 16)  # for the test that the recipe runs from end to end


def start_base(towers: clip.Towers, shipped: Path | None, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> unet.Base:
    if shipped is None:
        torch.manual_seed(2)
        return unet.Base(unet.new_unet(2 * clip.WIDTH, time_ids=6), towers.text_encoder, text_tower(towers))
    load = {"variant": "fp16", "torch_dtype": torch.float32}
    return unet.Base(
        UNet2DConditionModel.from_pretrained(shipped / "base" / "unet", **load),
        with_projection(CLIPTextModel.from_pretrained(shipped / "base" / "text_encoder", variant="fp16").float()),
        CLIPTextModelWithProjection.from_pretrained(shipped / "base" / "text_encoder_2", variant="fp16").float(),
    )


def train(
    work: Path, target: Path, plan: TrainingPlan, *, shipped: Path | None = None, until: str | None = None
) -> None:
    """Run all stages in order, up to `until`. Each writes its folders below `target` when it is done."""
    tokenizers = words.train_tokenizers()
    save_pipeline_files(target, tokenizers)
    if shipped is None:
        autoencoder = vae.train(work / "vae", plan.vae, plan.scenes_vae)
    else:
        autoencoder = AutoencoderKL.from_pretrained(shipped / "base" / "vae", variant="fp16", torch_dtype=torch.float32)
    save(target / "base" / "vae", autoencoder)
    write_json(target / "base" / "vae" / "latent_rgb.json", vae.latent_rgb(autoencoder))
    if until == "vae":
        return
    torch.manual_seed(1)
    towers = clip.Towers(*tokenizers)
    if shipped is not None:
        towers.clip = CLIPModel.from_pretrained(shipped / "clip", variant="fp16").float()
    clip.train(work / "clip", towers, plan.clip, tokenizers, plan.scenes_clip)
    save(target / "clip", towers.clip)
    if until == "clip":
        return

    small = unet.make_pool(autoencoder, work / "pool-128.pt", count=plan.scenes_small, side=128, seed=21)
    large = unet.make_pool(autoencoder, work / "pool-256.pt", count=plan.scenes_large, side=256, seed=22)
    base = start_base(towers, shipped, tokenizers)
    unet.train_base(work / "base-small", base, tokenizers, [(small, 64)], steps=plan.base_small, peak_lr=1e-3)
    if until == "base-small":
        return
    pools = [(large, 32), (large, 32), (large, 32), (small, 64)]
    unet.train_base(work / "base-large", base, tokenizers, pools, steps=plan.base_large, peak_lr=7e-4)
    save(target / "base" / "unet", base.unet)
    save(target / "base" / "text_encoder", without_projection(base.text_encoder))
    save(target / "base" / "text_encoder_2", base.text_encoder_2)
    if until == "base":
        return

    sharp = unet.make_pool(
        autoencoder, work / "pool-refiner.pt", count=plan.scenes_refiner, side=256, seed=23, draw=unet.refiner_image
    )
    refiner = unet.refiner_from(base.unet)
    unet.train_refiner(work / "refiner", refiner, base.text_encoder_2, tokenizers[1], sharp, steps=plan.refiner)
    save(target / "refiner" / "unet", refiner)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/nano"), help="checkpoints and caches")
    parser.add_argument("--target", type=Path, default=NANO, help="where base/, refiner/ and clip/ are written")
    parser.add_argument(
        "--until", choices=["vae", "clip", "base-small", "base", "refiner"], help="the last stage to run"
    )
    parser.add_argument(
        "--continue-from-shipped", action="store_true", help="start from the shipped weights; the VAE stays"
    )
    parser.add_argument("--tiny", action="store_true", help="two steps a stage: does it run?")
    for field, steps in TrainingPlan().__dict__.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=None, help=f"default {steps}")
    asked = parser.parse_args(arguments)
    given = {name: getattr(asked, name) for name in TrainingPlan().__dict__ if getattr(asked, name) is not None}
    plan = replace(TINY if asked.tiny else TrainingPlan(), **given)
    shipped = NANO if asked.continue_from_shipped else None
    train(asked.work, asked.target, plan, shipped=shipped, until=asked.until)


if __name__ == "__main__":
    main()
