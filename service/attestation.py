"""Attestation: the engine that will serve draws the slot's golden images again, and they are compared.

Knows slots and engines; whether a service serves without it is the studio's business.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_lab.errors import Cancelled, EngineStopped
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.slot import GoldenCheck, Slot, compare_golden

if TYPE_CHECKING:
    from sdxl_lab.diffusion.engine import Engine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attestation:
    """What came of it. `reason` says why the slot is not attested; None if it is. `seconds` is what it took."""

    reason: str | None
    comparisons: Sequence[GoldenCheck] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.reason is None

    def to_dict(self) -> dict[str, Any]:
        return {
            "attested": self.passed,
            "attested_reason": self.reason,
            "comparisons": [
                {
                    "golden": each.golden.path.name,
                    "prompt": each.golden.prompt,
                    "seed": each.golden.seed,
                    "measure": each.measure,
                    "difference": round(each.difference, 6),
                    "tolerance": round(each.tolerance, 6),
                    "passed": each.passed,
                    "reason": each.reason,
                }
                for each in self.comparisons
            ],
        }


def attest(slot: Slot, engine: "Engine") -> Attestation:
    """Draw every golden of `slot` and compare it. Raises `Cancelled` or `EngineStopped` where the engine is closed."""
    began = time.monotonic()
    try:
        goldens = slot.goldens
    except ValueError as error:
        return Attestation(str(error))
    if not goldens:
        return Attestation(f"the slot {slot.folder.name} has no golden images to compare with: promote it with some")
    comparisons = []
    for golden in goldens:
        try:
            comparisons.append(
                compare_golden(golden, engine.draw(ImageRequest(slot.config, golden.prompt, golden.seed)))
            )
        except (Cancelled, EngineStopped):
            raise
        except Exception as error:
            log.debug("attestation failed", exc_info=True)
            return Attestation(f"golden {golden.path.name}: it could not be drawn and compared: {error}", comparisons)
    reasons = [each.reason for each in comparisons if each.reason is not None]
    return Attestation("; ".join(reasons) or None, comparisons, time.monotonic() - began)
