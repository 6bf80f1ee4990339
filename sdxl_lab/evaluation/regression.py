"""Is a slot still what was promoted? Its goldens and its metric set are drawn again and compared.

On the same kind of machine (device and dtype) a golden must come back as `promotion.compare_golden` has it, to one step
of an 8-bit sample. Elsewhere that is not promised: there it must also be as similar as `LEAST_SSIM`. The metric set is
compared everywhere, pair by pair, with the relative gates that the candidate had to pass itself. Knows no notebook,
and changes no slot.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl_lab.config import RuntimeProfile
from sdxl_lab.evaluation.comparison import draw
from sdxl_lab.evaluation.gates import DEFAULT_GATES, LEAST_PROMPTS, Gate, Verdict
from sdxl_lab.evaluation.metrics import METRICS, find_metric
from sdxl_lab.images import GeneratedImage, beside, open_image
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.slot import GoldenCheck, Slot, SlotError, compare_golden

# nano's images in bfloat16 have an SSIM of 0.9988 to 0.9994 with those in float32. No limit tells that from a small
# change of a setting (guidance 3.1 for 3: 0.9989 to 0.9997); such are caught where the goldens were drawn. One in
# eight, of a prompt that leaves its background to chance, became another image (0.78): a golden's prompt should name
# all it means.
LEAST_SSIM = 0.99


class RegressionError(SlotError):
    """The slot's configuration no longer draws what was promoted."""


@dataclass(frozen=True)
class Redrawn:
    """A golden drawn again. `ssim` (Wang et al. 2004) is None where the sizes differ."""

    comparison: GoldenCheck
    image: GeneratedImage
    ssim: float | None

    @property
    def reason(self) -> str | None:
        """Why this is a regression; None where it is none."""
        if self.comparison.reason is not None or self.comparison.measure == "max-abs":
            return self.comparison.reason
        if self.ssim is not None and self.ssim < LEAST_SSIM:
            name = self.comparison.golden.path.name
            return f"golden {name}: the SSIM is {self.ssim:.4f}; at least {LEAST_SSIM} is asked for on another machine"
        return None

    @property
    def panels(self) -> list[tuple[str, Image.Image]]:
        """Each under its label: what was expected, what came, and the difference magnified."""
        found = self.comparison
        expected = open_image(found.golden.path)
        actual, difference, magnified = beside(expected, self.image.image)
        return [
            (f"expected: {found.golden.prompt}, seed {found.golden.seed}", expected),
            (f"actual: {'regressed' if self.reason else 'as promoted'}", actual),
            (f"{magnified}, {found.measure} {found.difference:.4f}", difference),
        ]


@dataclass(frozen=True)
class Regression:
    """A slot held against itself. `verdicts` are those of the metric set, empty where its evidence has none."""

    slot: Slot
    goldens: Sequence[Redrawn]
    verdicts: Sequence[Verdict]

    @property
    def reasons(self) -> list[str]:
        """Every regression found, in words."""
        failed = [f"{verdict.gate}: {verdict.figures}" for verdict in self.verdicts if not verdict.passed]
        return [reason for golden in self.goldens if (reason := golden.reason)] + failed

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def panels(self) -> list[tuple[str, Image.Image]]:
        """Three a golden, for a sheet: each image under its label."""
        return [panel for golden in self.goldens for panel in golden.panels]

    def result(self) -> dict[str, Any]:
        """The whole finding as plain values."""
        first = self.goldens[0]
        return {
            "passed": self.passed,
            "reasons": self.reasons,
            "slot": str(self.slot.folder),
            "digest": self.slot.digest,
            "goldens": [
                {
                    "file": golden.comparison.golden.path.name,
                    "measure": golden.comparison.measure,
                    "difference": golden.comparison.difference,
                    "tolerance": golden.comparison.tolerance,
                    "ssim": golden.ssim,
                    "reason": golden.reason,
                }
                for golden in self.goldens
            ],
            "metrics": [vars(verdict) for verdict in self.verdicts],
            "promoted": {name: first.comparison.golden.record[name] for name in RAN},
            "redrawn": {name: first.image.record[name] for name in RAN},
        }

    def write(self, path: Path | str) -> None:
        """`result` as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.result(), indent=2, sort_keys=True) + "\n")

    def check(self) -> None:
        """Raises `RegressionError` with every reason."""
        if not self.passed:
            raise RegressionError(f"{self.slot.folder} has regressed: " + "; ".join(self.reasons))


RAN = ("weights", "runtime", "libraries", "version")


def regress(slot: Slot, *, metrics: bool = True, profile: RuntimeProfile | None = None) -> Regression:
    """Draw the slot's goldens, and with `metrics` the images of its metric set, and compare. Raises `SlotError` for a
    slot without goldens, which promises nothing that could be checked."""
    goldens = slot.goldens
    if not goldens:
        raise SlotError(f"a slot must have goldens to be held against; {slot.folder} has none. Promote into it first")
    judged = _metric_set(slot) if metrics else {}
    pairs = [(prompt, seed) for prompt in judged.get("prompts", ()) for seed in judged["seeds"]]
    wanted = list(dict.fromkeys([(golden.prompt, golden.seed) for golden in goldens] + pairs))
    drawn = dict(zip(wanted, draw([ImageRequest(slot.config, *pair) for pair in wanted], profile), strict=True))
    redrawn = []
    for golden in goldens:
        image = drawn[golden.prompt, golden.seed]
        redrawn.append(Redrawn(compare_golden(golden, image), image, _ssim(golden.path, image)))
    return Regression(slot, redrawn, _verdicts(judged, [drawn[pair] for pair in pairs]))


def _metric_set(slot: Slot) -> dict[str, Any]:
    """The slot's evidence where it holds what a comparison measured, else nothing."""
    evidence = slot.evidence or {}
    if not evidence.get("metrics"):
        return {}
    try:
        wanted = len(evidence["prompts"]) * len(evidence["seeds"])
        sound = all(len(metric["values"]) == wanted for metric in evidence["metrics"].values())
        sound = sound and all(isinstance(gate["gate"], str) for gate in evidence["gates"]) and "clip" in evidence
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise SlotError(
            f"evidence.json of the slot {slot.folder} must hold its metric set as a comparison wrote it: prompts, "
            "seeds, clip, gates, and a value of each metric for each prompt and seed. Promote again, or restore it "
            "from git"
        )
    return evidence


def _ssim(path: Path, image: GeneratedImage) -> float | None:
    expected = open_image(path)
    if expected.size != image.image.size:
        return None
    return float(METRICS["ssim"]([image], [GeneratedImage(expected, {}, {})])[0])


def _verdicts(judged: dict[str, Any], images: Sequence[GeneratedImage]) -> list[Verdict]:
    """What must not be worse, with what was promoted in the place of what is served. It cannot be better than itself,
    and seconds are those of another machine."""
    if len(set(judged.get("prompts", ()))) < LEAST_PROMPTS:
        return []
    gates = [Gate.parse(said["gate"]) for said in judged["gates"]]
    gates = [gate for gate in gates if gate.rule == "worse" and gate.metric != "seconds"]
    prompts = [prompt for prompt in judged["prompts"] for _ in judged["seeds"]]
    verdicts = []
    for gate in gates or DEFAULT_GATES:
        then = judged["metrics"].get(gate.metric)
        if then is not None:
            metric = find_metric(gate.metric, judged["clip"])
            verdicts.append(gate.judge(metric, metric(images), np.array(then["values"]), prompts))
    return verdicts
