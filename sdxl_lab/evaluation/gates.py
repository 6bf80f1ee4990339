"""Gates: the conditions that a candidate must meet to be promoted, one line each, judged on intervals.

    clip_score: at most 1 worse with 95 % confidence
    unet_rows: at most 20 % worse
    sharpness: better
    clip_score: at least 60
    seconds: at most 1.5

"better" and "worse" compare the candidate with the served configuration, pair by pair of the same prompt and seed, in
the metric's better direction. "at most X worse" is a test of non-inferiority with the margin X, which may be a share of
the served mean. "at least" and "at most" judge the candidate alone. Every interval is over prompts, so that it covers
prompts not drawn yet, and its unfavourable end decides. The default confidence is 95 %.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_lab.evaluation.metrics import Metric
from sdxl_lab.evaluation.statistics import Interval, interval, paired

# A bootstrap of fewer says too little about other prompts.
LEAST_PROMPTS = 5

_NUMBER = r"\d+(?:\.\d+)?"
_LINE = re.compile(
    rf"(?P<metric>[a-z_]+): (?:(?P<better>better)|at most (?P<margin>{_NUMBER})(?P<percent> %)? worse"
    rf"|(?P<bound>at most|at least) (?P<limit>-?{_NUMBER}))(?: with (?P<confidence>{_NUMBER}) % confidence)?"
)


class GateError(ValueError):
    """A gate cannot be read, or cannot be judged on the values given."""


@dataclass(frozen=True)
class Verdict:
    """Whether a gate passed, and the figures behind it."""

    gate: str
    passed: bool
    figures: str


@dataclass(frozen=True)
class Gate:
    """One condition on one metric. `rule` is "better", "worse" (by at most `limit`, of the served mean where
    `percent`), "at most" or "at least"."""

    metric: str
    rule: str
    limit: float = 0.0
    percent: bool = False
    confidence: float = 0.95

    @classmethod
    def parse(cls, line: str) -> "Gate":
        """Read a line as above. Raises `GateError`."""
        read = _LINE.fullmatch(" ".join(line.split())) if isinstance(line, str) else None
        confidence = float(read["confidence"]) / 100 if read and read["confidence"] else 0.95
        if read is None or not 0.5 <= confidence < 1:
            raise GateError(
                "a gate must read METRIC: at most X worse, METRIC: at most X % worse, METRIC: better, METRIC: at least "
                f"X or METRIC: at most X, each perhaps with 50 to 99.9 % confidence; received {line!r}. "
                "Example: clip_score: at most 1 worse with 95 % confidence"
            )
        if read["better"]:
            return cls(read["metric"], "better", confidence=confidence)
        if read["margin"]:
            return cls(read["metric"], "worse", float(read["margin"]), bool(read["percent"]), confidence)
        return cls(read["metric"], read["bound"], float(read["limit"]), confidence=confidence)

    def __str__(self) -> str:
        """The line that `parse` reads."""
        condition = {
            "better": "better",
            "worse": f"at most {_plain(self.limit)}{' %' if self.percent else ''} worse",
        }.get(self.rule, f"{self.rule} {_plain(self.limit)}")
        return f"{self.metric}: {condition} with {100 * self.confidence:g} % confidence"

    @property
    def relative(self) -> bool:
        return self.rule in ("better", "worse")

    def judge(
        self,
        metric: Metric,
        candidate: np.ndarray,
        served: np.ndarray | None,
        prompts: Sequence[str],
    ) -> Verdict:
        """Judge the metric's values `candidate` and `served`, each (n,), of n `prompts`.

        A relative gate passes where `served` is None, since nothing is served yet. Raises `GateError` for fewer than
        `LEAST_PROMPTS` prompts, and for a relative gate on a metric without a better direction.
        """
        if self.relative:
            _check_direction(metric)
        if self.relative and served is None:
            return Verdict(str(self), True, "nothing is served yet")
        if len(set(prompts)) < LEAST_PROMPTS:
            raise GateError(
                f"the gate {str(self)!r} must be judged on at least {LEAST_PROMPTS} prompts, to say something of those "
                f"not drawn yet; received {len(set(prompts))}. Give more, or none: then the default prompts are used"
            )
        if not self.relative:
            found = interval(candidate, by=prompts, confidence=self.confidence)
            end = found.high if self.rule == "at most" else found.low
            passed = end <= self.limit if self.rule == "at most" else end >= self.limit
            return Verdict(str(self), passed, f"{_shown(found)}, limit {self.limit:g}")
        assert served is not None
        gain = improvement(metric, candidate, served, prompts, self.confidence)
        margin = self.limit * (abs(float(served.mean())) / 100 if self.percent else 1)
        passed = gain.low > 0 if self.rule == "better" else gain.low >= -margin
        needed = "above 0" if self.rule == "better" else f"at least {-margin:.4g}"
        return Verdict(str(self), passed, f"improvement {_shown(gain)}, the lower end must be {needed}")


def _plain(number: float) -> str:
    """Without an exponent, which `parse` does not read."""
    return np.format_float_positional(number, trim="-")


def _check_direction(metric: Metric) -> None:
    if metric.better is None:
        raise GateError(
            f"a metric that is compared must be better in one direction; {metric.name} is in none. "
            f"Example: {metric.name}: at least 0.1"
        )


def improvement(
    metric: Metric, candidate: np.ndarray, served: np.ndarray, prompts: Sequence[str], confidence: float = 0.95
) -> Interval:
    """The candidate's mean gain, pair by pair: positive is better in either direction of the metric."""
    _check_direction(metric)
    first, second = (candidate, served) if metric.better == "higher" else (served, candidate)
    return paired(first, second, by=prompts, confidence=confidence)


def _shown(found: Interval) -> str:
    return f"{found.mean:.4g} [{found.low:.4g}, {found.high:.4g}]"


# For SDXL and for nano: guidance 5 instead of 3 costs nano one point of CLIP score, and a user notices a fifth more
# rows as slower.
DEFAULT_GATES = tuple(
    Gate.parse(line) for line in ("clip_score: at most 1 worse with 95 % confidence", "unet_rows: at most 20 % worse")
)
