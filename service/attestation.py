"""Attestation: the engine that will serve draws the slot's golden images again, and they are compared.

The comparison is `release.verify`'s. Whether a service serves without it is the deployment's business.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_lab.release.slot import Slot, SlotError
from sdxl_lab.release.verify import GoldenCheck, verify

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
            "comparisons": [each.to_dict() for each in self.comparisons],
        }


def attest(slot: Slot, engine: "Engine") -> Attestation:
    """Draw the goldens of `slot` and compare them. Raises `Cancelled` or `EngineStopped` where the engine is closed."""
    began = time.monotonic()
    try:
        comparisons = verify(slot, engine)
    except SlotError as error:
        log.debug("attestation failed", exc_info=True)
        return Attestation(str(error), seconds=time.monotonic() - began)
    reasons = [each.reason for each in comparisons if each.reason is not None]
    return Attestation("; ".join(reasons) or None, comparisons, time.monotonic() - began)
