"""SDXL's real UNet on this CPU: the speed of the engine's guided step as a share of a bfloat16 matrix product's.

Batching gains nothing here, since one image saturates the machine.
"""

import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.engine import draw_all
from bench.measure import Report, alternate, ratios
from bench.random_sdxl import filled, new_unet
from bench.settings import Size
from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.models import Denoiser, load
from sdxl_lab.diffusion.prompts import Embedding, Prompt
from sdxl_lab.job import ImageRequest


class TextlessDenoiser(Denoiser):
    """Random embeddings of the true widths replace the two text encoders (another 0.8 B parameters)."""

    def embed(self, prompt: Prompt) -> Embedding:
        draw = torch.Generator().manual_seed(len(prompt.text or ""))
        drawn = Embedding(torch.randn(1, 77, 2048, generator=draw), torch.randn(1, 1280, generator=draw))
        return Embedding(*(0 * part for part in drawn)) if prompt.text is None else drawn


def product_rate(side: int = 4096) -> float:
    """FLOP/s of a bfloat16 matrix product."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(2))
    began = time.monotonic()
    for _ in range(3):
        a @ b
    return 3 * 2 * side**3 / (time.monotonic() - began)


def main(size: Size) -> None:
    nano = load(GenerationConfig().model, RuntimeProfile(device="cpu"))
    unet = filled(new_unet(), torch.bfloat16, "cpu")
    base = TextlessDenoiser(unet, (), (), nano.base.scheduler_config, zero_negative=True, aesthetic=False)
    models = replace(nano, base=base, refiner=None, dtype=torch.bfloat16)
    side = 2 * size.side
    config = GenerationConfig(width=side, height=side, steps=1)
    took = {}
    with Engine(models, RuntimeProfile(device="cpu", dtype="bfloat16"), {}) as engine:
        for count in (1, 2):
            requests = [ImageRequest(config, "a cat", seed) for seed in range(count)]

            def step(requests: list[ImageRequest] = requests) -> float:
                draw_all(engine, requests)
                return engine.stats().seconds

            took[count] = step
        measured = alternate(
            {
                "bfloat16 matrix product, GFLOP/s": lambda: product_rate() / 1e9,
                "guided step of one image, s": took[1],
                "guided step of two images, s": took[2],
            },
            max(1, size.rounds - 1),
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latents = torch.zeros(2, 4, side // 8, side // 8, dtype=torch.bfloat16)
        added = {"text_embeds": torch.zeros(2, 1280).bfloat16(), "time_ids": torch.zeros(2, 6)}
        unet(latents, torch.zeros(2), torch.zeros(2, 77, 2048).bfloat16(), added_cond_kwargs=added)
    flops = counter.get_total_flops() / 1e9
    steps, peak = measured["guided step of one image, s"], measured["bfloat16 matrix product, GFLOP/s"]
    lines = measured | {"step's GFLOP/s / matrix product's": ratios([flops / s for s in steps], peak)}
    Report(
        "truesize",
        "SDXL's own UNet (2.567 B parameters, random weights)",
        lines,
        f"{side} px, bfloat16, {flops / 1000:.2f} TFLOP a guided step",
        {"step's GFLOP/s / matrix product's": "0.85"},
    ).show(size.folder)
