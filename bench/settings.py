"""Sizes, prompts, configurations and request bodies that the benchmarks share."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import RESULTS
from sdxl_lab.config import GenerationConfig, RuntimeProfile, ServingLimits

PROMPTS = (
    "a red circle left of a blue star on a white background",
    "A cat in a hat",
    "a large green boat on a yellow background",
    "a pink heart above a black ring on a cyan background",
)
FLOAT32 = RuntimeProfile(device="cpu", dtype="float32")

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """`side` is in pixels, `rounds` without the first; `minutes` are for `soak` and `gpu`, which have defaults of their
    own, `device` and `scale` (one of `random_sdxl.SCALES`) for `gpu`. Results go to `folder`."""

    model: str = "nano"
    images: int = 16
    steps: int = 20
    side: int = 256
    rounds: int = 3
    minutes: float | None = None
    device: str = "cuda"
    scale: str = "true"
    folder: Path = RESULTS


LIMITS = ServingLimits(steps=(1, 1000), side=(64, 1024))  # of every slot that a benchmark serves


def config_of(size: Size, **changes: object) -> GenerationConfig:
    start = {"steps": size.steps, "width": size.side, "height": size.side, "guidance_scale": 3.0}
    return GenerationConfig.for_model(size.model, **(start | changes))


def body(size: Size, steps: int, seed: int) -> dict[str, Any]:
    """A request for one image."""
    return {
        "prompt": PROMPTS[seed % len(PROMPTS)],
        "seed": seed,
        "steps": steps,
        "guidance_scale": 3.0,
        "width": size.side,
        "height": size.side,
    }


def varied_body(pick: random.Random, size: Size, least: int = 1) -> dict[str, Any]:
    """A request with random settings and at least `least` steps. Such images join and leave the batch all the time."""
    return {
        "prompt": pick.choice(PROMPTS),
        "steps": pick.randint(least, size.steps),
        "guidance_scale": pick.choice([1.0, 3.0, 7.5]),
        "scheduler": pick.choice(["euler", "euler_a", "dpmpp_2m_karras", "unipc", "heun"]),
        "width": size.side,
        "height": size.side,
    }
