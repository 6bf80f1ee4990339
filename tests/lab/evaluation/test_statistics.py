"""Intervals against simulations, and against what they claim."""

import math

import numpy as np
import pytest

from sdxl_lab.evaluation.statistics import Interval, StatisticsError, interval, paired


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng, held = np.random.default_rng(1), {6: 0, 24: 0}
    for count in held:
        for seed in range(200):
            found = interval(rng.normal(3, 2, count), seed=seed, resamples=1000)
            held[count] += found.low <= 3 <= found.high
    assert 0.88 <= held[6] / 200 <= 0.99, held
    assert 0.90 <= held[24] / 200 <= 0.99, held


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(2).normal(1, 1, 400)
    found = interval(values)
    reach = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.02)
    assert found.mean == pytest.approx(values.mean())
    assert found.count == 400
    narrow = interval(values, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_pairing_sees_what_separate_means_hide():
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 10, 24)
    a, b = prompts + 0.5 + rng.normal(0, 0.3, 24), prompts + rng.normal(0, 0.3, 24)
    assert paired(a, b).decided
    assert paired(a, b).mean == pytest.approx((a - b).mean())
    assert paired(b, a).high < 0
    apart_a, apart_b = interval(a), interval(b)
    assert apart_b.low < apart_a.mean < apart_b.high


def test_the_same_values_give_the_same_interval_and_equal_ones_a_point():
    values = np.random.default_rng(4).normal(0, 1, 12)
    assert interval(values) == interval(list(values)) == paired(values, np.zeros(12))
    assert interval(values) != interval(values, seed=1)
    assert interval([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 3)
    assert not paired(values, values).decided


def test_seeds_of_one_prompt_are_no_new_prompts():
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(6), 10)
    values = rng.normal(0, 3, 6)[prompts] + rng.normal(0, 0.1, 60)
    over_seeds, over_prompts = interval(values), interval(values, by=prompts)
    assert over_prompts.count == 6
    assert over_prompts.mean == pytest.approx(over_seeds.mean)
    assert over_prompts.high - over_prompts.low > 2 * (over_seeds.high - over_seeds.low)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: interval([]), "at least one number"),
        (lambda: interval([[1.0, 2.0]]), "a row of at least one number"),
        (lambda: interval([1.0]), "at least two values; received 1"),
        (lambda: interval([1.0, 2.0], by=["a", "a"]), "at least two labels; received 1"),
        (lambda: interval([1.0, 2.0], by=["a"]), "received 2 values, 1 labels"),
        (lambda: interval([1.0, math.nan]), "finite numbers; received nan at 1"),
        (lambda: interval([math.inf, 1.0]), "finite numbers; received inf at 0"),
        (lambda: interval([1.0, 2.0], confidence=95), "above 0 and below 1; received 95"),
        (lambda: paired([1.0, 2.0], [1.0]), "received 2 and 1 values"),
        (lambda: paired([1.0, 2.0], [1.0, math.nan]), "b must be finite numbers"),
    ],
)
def test_values_that_prove_nothing_are_refused(call, rule):
    with pytest.raises(StatisticsError, match=rule):
        call()


def test_an_interval_reads_well():
    assert str(Interval(0.5, -0.25, 1.25, 8)) == "0.5 [-0.25, 1.25], n = 8"
