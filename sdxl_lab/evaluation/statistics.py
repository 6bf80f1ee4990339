"""Confidence intervals of means, and of differences between pairs."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


class StatisticsError(ValueError):
    """Values that no interval can be taken of."""


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval. `count` is the number of values, pairs or groups resampled."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def decided(self) -> bool:
        """Whether zero lies outside, so that the sign of the mean is not chance."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}], n = {self.count}"


def interval(
    values: Sequence[float] | np.ndarray,
    *,
    by: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """The bootstrap interval of the mean. The same values give the same interval.

    It is bias-corrected and accelerated (Efron 1987), from scipy, and expanded for few values after Hesterberg 2015
    (arXiv 1411.5279, section 4.2.2): with eight values of a normal distribution, an interval of 95 % contained the
    true mean in 88 % of simulations without the expansion and in 93 % with it.

    `by` gives one label a value, for example the prompts. Values of a label are averaged first and the labels are
    resampled: the interval then covers prompts not drawn yet, and without `by` only more seeds of the same prompts.
    Raises `StatisticsError` for values that are not finite, for fewer than two, and for a confidence outside (0, 1).
    """
    found = _checked("values", values)
    if not 0 < confidence < 1:
        raise StatisticsError(
            f"confidence must be a number above 0 and below 1; received {confidence!r}. Example: 0.95"
        )
    if by is not None:
        if len(by) != len(found):
            raise StatisticsError(f"by must have one label a value; received {len(found)} values, {len(by)} labels")
        labels = list(by)
        found = np.array([found[[at == label for at in labels]].mean() for label in dict.fromkeys(labels)])
    if len(found) < 2:
        raise StatisticsError(
            f"an interval must have at least two {'values' if by is None else 'labels'}; received {len(found)}. "
            "One image proves nothing: take more seeds or prompts"
        )
    mean = float(found.mean())
    if np.ptp(found) <= 1e-9 * np.abs(found).max():  # equal but for rounding
        return Interval(mean, mean, mean, len(found))
    bounds = stats.bootstrap(
        (found,),
        np.mean,
        n_resamples=resamples,
        confidence_level=min(_expanded(confidence, len(found)), 1 - 1 / resamples),
        method="BCa",
        rng=seed,
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(found))


def _expanded(confidence: float, count: int) -> float:
    """The confidence that widens the bootstrap as Student's t is wider than the normal, and for a sample's bias."""
    reach = stats.t.ppf((1 + confidence) / 2, count - 1) * np.sqrt(count / (count - 1))
    return float(1 - 2 * stats.norm.sf(reach))


def paired(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    by: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """The `interval` of the mean of `a - b`, where a[i] and b[i] are of the same prompt and seed.

    The spread between prompts and seeds cancels out, so that a gain that two separate means would hide is seen.
    Raises `StatisticsError` for sequences of different length, and as `interval` does.
    """
    first, second = _checked("a", a), _checked("b", b)
    if len(first) != len(second):
        raise StatisticsError(
            f"a and b must be pairs, value by value of the same prompt and seed; received {len(first)} and "
            f"{len(second)} values"
        )
    return interval(first - second, by=by, confidence=confidence)


def _checked(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise StatisticsError(f"{name} must be a row of at least one number; received the shape {found.shape}")
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise StatisticsError(
            f"{name} must be finite numbers; received {found[bad[0]]} at {bad[0]}. Leave failed cells out, of both "
            "sides of a pair"
        )
    return found
