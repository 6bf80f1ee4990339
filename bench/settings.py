"""How large a benchmark is, and the prompts that all of them draw."""

from dataclasses import dataclass
from pathlib import Path

from bench.measure import RESULTS
from sdxl_lab.config import Limits

PROMPTS = (
    "a red circle left of a blue star on a white background",
    "A cat in a hat",
    "a large green boat on a yellow background",
    "a pink heart above a black ring on a cyan background",
)


@dataclass(frozen=True)
class Size:
    """`side` in pixels; `rounds` are counted ones; `minutes` are those of the soak. `folder` takes the results."""

    model: str = "nano"
    pictures: int = 16
    steps: int = 20
    side: int = 256
    rounds: int = 3
    minutes: float = 1.0
    folder: Path = RESULTS

    @property
    def limits(self) -> Limits:
        return Limits(steps=(1, 1000), side=(64, 1024))
