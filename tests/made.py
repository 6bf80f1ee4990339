"""What tests make without drawing: an image, its record, findings, evidence, a slot."""

from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_lab.config import GenerationConfig, ServingLimits
from sdxl_lab.diffusion.latency import Group, LatencyModel
from sdxl_lab.images import GeneratedImage
from sdxl_lab.record import ImageRecord
from sdxl_lab.release.promote import promote
from sdxl_lab.release.records import Evidence, Findings
from sdxl_lab.release.slot import Slot, slot_config


def image_record(config: GenerationConfig | None = None, **more: Any) -> ImageRecord:
    """A whole record of `config`, with some fields as a test wants them."""
    config = config or GenerationConfig()
    fields = {
        "version": "0.1.0",
        "prompt": "A cat in a hat",
        "seed": 7,
        "config": config,
        "digest": config.digest,
        "sampler": "Euler",
        "scheduler": {"class": "EulerDiscreteScheduler"},
        "unet_calls": {"base": config.steps},
        "unet_rows": {"base": 2 * config.steps},
        "weights": {"base": "sha256 abc"},
        "runtime": {"device": "cpu", "dtype": "float32"},
        "libraries": {"torch": "2.13.0"},
    }
    return ImageRecord(**(fields | more))


def image(
    config: GenerationConfig | None = None,
    prompt: str = "A cat in a hat",
    seed: int = 7,
    colour: tuple[int, int, int] = (255, 0, 0),
    **more: Any,
) -> GeneratedImage:
    """An image of one colour with a whole record."""
    return GeneratedImage(
        Image.new("RGB", (16, 16), colour), image_record(config, prompt=prompt, seed=seed, **more), {"total_ms": 1.0}
    )


def findings(config: GenerationConfig | None = None, replaces: GenerationConfig | None = None, **more: Any) -> Findings:
    """What a comparison says of a candidate that passed."""
    said = {
        "schema": 1,
        "digest": (config or GenerationConfig()).digest,
        "replaces": replaces.digest if replaces else None,
        "prompts": ["A cat in a hat"],
        "seeds": [7],
        "clip": "nano",
        "metrics": {
            "clip_score": {
                "better": "higher",
                "source": "Hessel et al. 2021",
                "candidate": {"mean": 70.0, "count": 1},
                "values": [70.0],
            }
        },
        "gates": [{"gate": "clip_score: at least 60", "passed": True, "figures": "70 [68, 72], limit 60"}],
        "weights": {"base": "sha256 abc"},
        "runtime": {"device": "cpu", "dtype": "float32"},
        "libraries": {"torch": "2.13.0"},
        "version": "0.1.0",
        "dirty": False,
        "goldens": [{"prompt": "A cat in a hat", "seed": 7}],
    }
    return Findings.read(said | more, "a test")


def evidence(config: GenerationConfig, **more: Any) -> Evidence:
    """The evidence of a slot that was new, without goldens."""
    record = image_record(config)
    said = {
        "digest": config.digest,
        "model": config.model,
        "limits": ServingLimits.for_model(config.model),
        "who": "the tests",
        "why": "a test",
        "when": "2026-01-31T12:00:00+00:00",
        "goldens": (),
        **{name: getattr(record, name) for name in ("version", "weights", "runtime", "libraries")},
    }
    return Evidence(**(said | more))


def put(slot: Path, config: GenerationConfig | None = None, **more: Any) -> Slot:
    """Promote, over whatever the slot holds."""
    config = config or GenerationConfig()
    asked = {
        "images": [image(config)],
        "why": "sharper hats",
        "who": "Ada",
        "findings": findings(config, slot_config(slot)),
    }
    return promote(config, slot, **(asked | more))


class SettledLatency(LatencyModel):
    """Every call takes 30 ms whatever its rows, and no measurement changes that: the fuller a call, the better."""

    def took(self, group: Group, rows: int, seconds: float) -> None:
        pass

    def counts(self, group: Group) -> dict[int, int]:
        return dict.fromkeys(self.measured(group), 3)

    def measured(self, group: Group) -> list[int]:
        return list(range(1, 65))

    def _median(self, group: Group, rows: int) -> float:
        return 0.03

    def __bool__(self) -> bool:
        return True
