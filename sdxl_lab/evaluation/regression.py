"""Is a slot still what was promoted? Its goldens and its metric set are drawn again and compared.

The goldens are compared as `release.verify` does everywhere. The metric set is compared pair by pair, with the relative
gates that the candidate had to pass itself. Changes no slot.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl_lab.config import RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.evaluation.gates import DEFAULT_GATES, LEAST_PROMPTS, Gate, Verdict
from sdxl_lab.evaluation.metrics import find_metric
from sdxl_lab.images import GeneratedImage
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.records import Evidence
from sdxl_lab.release.slot import Slot, SlotError
from sdxl_lab.release.verify import GoldenCheck, verify


class RegressionError(SlotError):
    """The slot's configuration no longer draws what was promoted."""


@dataclass(frozen=True)
class Regression:
    """A slot held against itself. `verdicts` are those of the metric set, empty where its evidence has none."""

    slot: Slot
    goldens: Sequence[GoldenCheck]
    verdicts: Sequence[Verdict]

    @property
    def reasons(self) -> list[str]:
        """Every regression found, in words."""
        failed = [f"{verdict.gate}: {verdict.figures}" for verdict in self.verdicts if not verdict.passed]
        return [golden.reason for golden in self.goldens if golden.reason is not None] + failed

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def panels(self) -> list[tuple[str, Image.Image]]:
        """Three a golden, for a sheet: each image under its label."""
        return [panel for golden in self.goldens for panel in golden.panels]

    def result(self) -> dict[str, Any]:
        """The whole finding as plain values."""
        promoted, redrawn = self.goldens[0].golden.record, self.goldens[0].image.record
        return {
            "passed": self.passed,
            "reasons": self.reasons,
            "slot": str(self.slot.folder),
            "digest": self.slot.digest,
            "goldens": [golden.to_dict() for golden in self.goldens],
            "metrics": [vars(verdict) for verdict in self.verdicts],
            "promoted": {name: getattr(promoted, name) for name in RAN},
            "redrawn": {name: getattr(redrawn, name) for name in RAN},
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
    found = slot.evidence if metrics and slot.evidence and slot.evidence.metrics else None
    pairs = [(prompt, seed) for prompt in found.prompts for seed in found.seeds] if found else []
    if not slot.goldens:  # said before gigabytes are loaded
        raise SlotError(f"a slot must have goldens to be held against; {slot.folder} has none. Promote into it first")
    with Engine.load(slot.config, profile, max_queue=max(1000, len(pairs))) as engine:
        goldens = verify(slot, engine)
        drawn = {(golden.golden.prompt, golden.golden.seed): golden.image for golden in goldens}
        jobs = {pair: engine.submit(ImageRequest(slot.config, *pair)) for pair in pairs if pair not in drawn}
        drawn |= {pair: job.result() for pair, job in jobs.items()}
    return Regression(slot, goldens, _verdicts(found, [drawn[pair] for pair in pairs]))


def _verdicts(found: Evidence | None, images: Sequence[GeneratedImage]) -> list[Verdict]:
    """What must not be worse, with what was promoted in the place of what is served. It cannot be better than itself,
    and seconds are those of another machine."""
    if found is None or len(set(found.prompts)) < LEAST_PROMPTS:
        return []
    gates = [Gate.parse(said.gate) for said in found.gates]
    gates = [gate for gate in gates if gate.rule == "worse" and gate.metric != "seconds"]
    prompts = [prompt for prompt in found.prompts for _ in found.seeds]
    verdicts = []
    for gate in gates or DEFAULT_GATES:
        then = found.metrics.get(gate.metric)
        if then is not None:
            metric = find_metric(gate.metric, found.clip or "nano")
            verdicts.append(gate.judge(metric, metric(images), np.array(then.values), prompts))
    return verdicts
