"""`python -m recipes.nano.evaluate`: nano's figures on prompts that it was never trained on.

Images are judged by `judge`, which shares no code with the renderer, and by nano's CLIP. Writes `figures.json` and
contact sheets.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from recipes.nano import judge, unet, vae
from recipes.nano.scenes import COLOURS, NOUNS, SHAPES, THINGS, Scene, Thing, caption, render, sample_scene
from recipes.nano.words import ids
from sdxl_lab.config import GenerationConfig, RefinerConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.images import GeneratedImage
from sdxl_lab.job import ImageRequest
from sdxl_lab.research.plots import grid


class Clip:
    """nano's CLIP, which scores images."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder, variant="fp16", dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder)

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], texts: list[str]) -> torch.Tensor:
        """Cosines (images, texts)."""
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        return self.model(input_ids=ids(self.tokenizer, texts), pixel_values=pixels).logits_per_image

    @torch.no_grad()
    def nouns(self, images: Sequence[Image.Image]) -> list[str]:
        """The noun of each image, of all `NOUNS`: the nearest mean of a noun's captions, one in every combination of
        colour and background (prompt ensembling, Radford et al. 2021, section 3.1.4)."""
        means = []
        for noun in NOUNS:
            texts = [f"a {c} {noun} on a {b} background" for c in COLOURS for b in COLOURS if c != b]
            embedded = self.model.get_text_features(input_ids=ids(self.tokenizer, texts)).pooler_output
            means.append(F.normalize(F.normalize(embedded, dim=-1).mean(0), dim=-1))
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        seen = F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return [NOUNS[i] for i in (seen @ torch.stack(means).T).argmax(1).tolist()]


def held_out_scenes(count: int, seed: int, nouns: tuple[str, ...] = NOUNS) -> list[Scene]:
    """Half single things, half pairs, no hats."""
    rng = random.Random(seed)
    return [sample_scene(rng, held_out=True, pair=float(i % 2), hat=0.0, nouns=nouns) for i in range(count)]


def draw(engine: Engine, config: GenerationConfig, prompts: Sequence[str], first_seed: int = 0) -> list[GeneratedImage]:
    jobs = [engine.submit(ImageRequest(config, prompt, first_seed + i)) for i, prompt in enumerate(prompts)]
    return [job.result() for job in jobs]


def verdict(image: GeneratedImage, scene: Scene) -> judge.SceneVerdict:
    """The judge's verdict on an image of `scene`."""
    things = [(thing.colour, thing.noun) for thing in scene.things]
    return judge.judge(image.image, scene.background, things, scene.relation)


def share(values: Sequence[bool]) -> float:
    return round(sum(values) / max(1, len(values)), 4)


def prompts_right(engine: Engine, config: GenerationConfig, scenes: list[Scene], out: Path) -> dict[str, Any]:
    """How many prompts are drawn right, in all and in each respect."""
    images = draw(engine, config, [caption(scene) for scene in scenes])
    verdicts = [verdict(image, scene) for image, scene in zip(images, scenes, strict=True)]
    figures: dict[str, Any] = {"prompts": len(scenes), "right": share([v.right for v in verdicts])}
    for respect in ("background", "count", "colour", "noun", "relation"):
        figures[respect] = share([getattr(v, respect) for v in verdicts])
    judged = list(zip(scenes, verdicts, strict=True))
    figures["relation_of_pairs"] = share([v.relation for s, v in judged if s.relation])
    figures["right_single"] = share([v.right for s, v in judged if not s.relation])
    figures["right_pairs"] = share([v.right for s, v in judged if s.relation])
    figures["right_shapes_only"] = share([v.right for s, v in judged if all(t.noun in SHAPES for t in s.things)])
    figures["noun_by_noun"] = {
        noun: share([v.noun for s, v in judged if any(t.noun == noun for t in s.things)]) for noun in NOUNS
    }
    labels = [("" if v.right else "WRONG: ") + caption(s) for s, v in judged]
    grid([p.image for p in images[:32]], labels[:32], 8).save(out / "prompts.png")
    wrong = [i for i, v in enumerate(verdicts) if not v.right][:32]
    if wrong:
        grid([images[i].image for i in wrong], [labels[i] for i in wrong], 8).save(out / "wrong.png")
    return figures


def recognised(engine: Engine, config: GenerationConfig, clip: Clip, out: Path) -> dict[str, Any]:
    """Things named by CLIP among the 14 nouns, ten images each."""
    wanted = [thing for thing in THINGS for _ in range(10)]
    images = [drawn.image for drawn in draw(engine, config, [f"a {thing}" for thing in wanted], first_seed=500)]
    named = clip.nouns(images)
    grid(images, [f"{w}: {n}" for w, n in zip(wanted, named, strict=True)], 10).save(out / "things.png")
    by_thing = {thing: share([n == w for w, n in zip(wanted, named, strict=True) if w == thing]) for thing in THINGS}
    return {"recognised": share([n == w for w, n in zip(wanted, named, strict=True)]), **by_thing}


def clip_figures(clip: Clip) -> dict[str, float]:
    """CLIP on renderings of held-out scenes: the right caption out of 64, the noun of single things."""
    scenes = held_out_scenes(512, seed=77)
    texts = [caption(scene) for scene in scenes]
    hits = []
    for start in range(0, 512, 64):
        part = slice(start, start + 64)
        best = clip.scores([render(scene) for scene in scenes[part]], texts[part]).argmax(1).tolist()
        hits += [texts[start + b] == texts[start + i] for i, b in enumerate(best)]
    single = [scene for scene in scenes if not scene.relation]
    named = clip.nouns([render(scene) for scene in single])
    return {
        "caption_of_64": share(hits),
        "noun_of_14": share([n == s.things[0].noun for n, s in zip(named, single, strict=True)]),
    }


def sides_in_noise(autoencoder: AutoencoderKL, side: int, count: int = 64) -> float:
    """How often the best possible reader (a matched filter, white noise) tells a scene of two things from the same
    scene with its things exchanged, in a latent at the last timestep. At 0.5 only the words could say it."""
    scenes = [scene for scene in held_out_scenes(4 * count, seed=67) if scene.relation][:count]
    both = [render(scene, side) for scene in scenes], [render(exchanged(scene), side) for scene in scenes]
    first, second = (
        vae.encode(autoencoder, torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2))
        for images in both
    )
    distance = ((first - second) * autoencoder.config.scaling_factor).flatten(1).norm(dim=1)
    alpha = unet.alphas()[-1]
    return round(torch.special.ndtr((alpha / (1 - alpha)).sqrt() * distance / 2).mean().item(), 3)


def exchanged(scene: Scene) -> Scene:
    """The scene with each of its two things in the other's place."""
    a, b = scene.things
    return replace(scene, things=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))


def sharpness(image: Image.Image) -> float:
    """The 99th percentile of the luminance gradient's magnitude, in 8-bit steps a pixel."""
    gray = np.asarray(image.convert("L"), dtype=np.float64)
    return float(np.percentile(np.hypot(*np.gradient(gray)), 99))


def nearest_rendering(image: Image.Image, scene: Scene) -> Image.Image:
    """The rendering of the scene's one thing that is nearest to the image, over place and radius."""
    pixels = np.asarray(image, dtype=np.float64)
    seen = judge.look(image)[1][0]
    wanted = scene.things[0]
    best = (seen.x, seen.y, seen.size)

    def rendered(x: float, y: float, radius: float) -> Image.Image:
        return render(Scene(scene.background, (Thing(wanted.noun, wanted.colour, x, y, radius),)))

    def error(place: tuple[float, float, float]) -> float:
        return float(np.square(np.asarray(rendered(*place), dtype=np.float64) - pixels).mean())

    for step in (0.02, 0.008, 0.003):
        moves = [(i * step, j * step, k * step) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
        for _ in range(3):
            best = min(((best[0] + a, best[1] + b, best[2] + c) for a, b, c in moves), key=error)
    return rendered(*best)


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = np.square(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)).mean()
    return float(10 * np.log10(255**2 / error))


def refiner_figures(engine: Engine, config: GenerationConfig, out: Path) -> dict[str, float]:
    """Base alone against base and refiner, same seed and step count, where both drew the scene right."""
    scenes = [s for s in held_out_scenes(96, seed=88, nouns=SHAPES) if not s.relation][:24]
    prompts = [caption(scene) for scene in scenes]
    alone = draw(engine, config.with_(refiner=None), prompts, first_seed=900)
    refined = draw(engine, config.with_(refiner=RefinerConfig(handover=0.8)), prompts, first_seed=900)
    rows = []
    for scene, a, b in zip(scenes, alone, refined, strict=True):
        if not all(verdict(image, scene).right for image in (a, b)):
            continue
        targets = [nearest_rendering(p.image, scene) for p in (a, b)]
        rows.append(
            (
                psnr(a.image, targets[0]),
                psnr(b.image, targets[1]),
                sharpness(a.image),
                sharpness(b.image),
                sharpness(targets[0]),
            )
        )
    pairs = [p.image for both in zip(alone[:6], refined[:6], strict=True) for p in both]
    grid(pairs, ["base alone", "with refiner"] * 6, 4).save(out / "refiner.png")
    if not rows:
        return {"images": 0}
    means = np.mean(rows, axis=0)
    names = ("psnr_base", "psnr_refined", "sharpness_base", "sharpness_refined", "sharpness_rendering")
    figures = {name: round(float(value), 3) for name, value in zip(names, means, strict=True)}
    wins = {"psnr_better_in": share([r[1] > r[0] for r in rows]), "images": len(rows)}
    return figures | wins


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=NANO, help="the folder with base/, refiner/ and clip/")
    parser.add_argument("--out", type=Path, default=Path("runs/nano/evaluation"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=None)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    config = GenerationConfig.for_model("nano", steps=asked.steps)
    if asked.model != NANO:
        model = config.model.with_(base=str(asked.model / "base"), refiner=str(asked.model / "refiner"))
        config = config.with_(model=model)
    if asked.guidance_scale is not None:
        config = config.with_(guidance_scale=asked.guidance_scale)

    clip = Clip(asked.model / "clip")
    figures: dict[str, Any] = {"config": config.to_dict(), "clip": clip_figures(clip)}
    with Engine.load(config) as engine:
        figures["vae_psnr"] = round(vae.psnr(engine.models.vae, vae.images(64, 256, seed=9)), 2)
        figures["sides_in_noise"] = {side: sides_in_noise(engine.models.vae, side) for side in (128, 256)}
        figures["prompts"] = prompts_right(engine, config, held_out_scenes(asked.prompts, seed=66), asked.out)
        figures["things"] = recognised(engine, config, clip, asked.out)
        figures["refiner"] = refiner_figures(engine, config, asked.out)
        cats = draw(engine, config, ["A cat in a hat"] * 8)
        grid([cat.image for cat in cats], [f"seed {seed}" for seed in range(8)], 8).save(asked.out / "cats.png")
        lone = draw(engine, config, ["A cat in a hat"])[0]
        figures["one_image_seconds"] = lone.timings["total_ms"] / 1000
    (asked.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
