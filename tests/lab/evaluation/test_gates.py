"""Gates: one line each, judged on intervals over prompts."""

import numpy as np
import pytest

from sdxl_lab.evaluation.gates import DEFAULT_GATES, LEAST_PROMPTS, Gate, GateError, improvement
from sdxl_lab.evaluation.metrics import METRICS, Metric, clip_score
from sdxl_lab.evaluation.statistics import StatisticsError

PROMPTS = [f"prompt {number // 2}" for number in range(16)]
SCORE, ROWS = clip_score(), METRICS["unet_rows"]
NOISE = np.tile([0.5, -0.5], 8) + np.repeat(np.linspace(-1, 1, 8), 2)

READ = [
    ("clip_score: at most 1 worse with 95 % confidence", Gate("clip_score", "worse", 1.0)),
    ("clip_score: at most 0.5 worse", Gate("clip_score", "worse", 0.5)),
    ("unet_rows: at most 20 % worse with 99.5 % confidence", Gate("unet_rows", "worse", 20.0, True, 0.995)),
    ("  sharpness:   better ", Gate("sharpness", "better")),
    ("seconds: at most 1.5", Gate("seconds", "at most", 1.5)),
    ("clip_score: at least -3", Gate("clip_score", "at least", -3.0)),
    ("clipping: at most 0.00005 worse", Gate("clipping", "worse", 0.00005)),
    ("unet_rows: at most 12345678", Gate("unet_rows", "at most", 12345678.0)),
]


@pytest.mark.parametrize(("line", "gate"), READ)
def test_a_line_is_read_and_written(line, gate):
    assert Gate.parse(line) == gate
    assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize(
    "line",
    [
        "",
        "clip_score",
        "clip_score better",
        "clip_score: good",
        "clip_score: at most worse",
        "clip_score: at least 3 worse",
        "clip_score: at most 1 % better",
        "clip_score: better with 100 % confidence",
        "clip_score: better with 5 % confidence",
        7,
    ],
)
def test_what_is_no_gate_is_refused_with_the_grammar_and_an_example(line):
    with pytest.raises(GateError) as caught:
        Gate.parse(line)
    assert f"received {line!r}. Example: clip_score: at most 1 worse" in str(caught.value)


JUDGED = [
    # the served values are 70 each; the candidate's are 70 + shift + what `NOISE` scatters about 0
    ("clip_score: at most 1 worse", SCORE, 0.0, True, "improvement 0 [-0."),
    ("clip_score: at most 0.3 worse", SCORE, 0.0, False, "the lower end must be at least -0.3"),
    ("clip_score: at most 1 worse", SCORE, -1.0, False, "improvement -1 ["),
    ("clip_score: at most 5 % worse", SCORE, -2.0, True, "at least -3.5"),
    ("clip_score: better", SCORE, 2.0, True, "the lower end must be above 0"),
    ("clip_score: better", SCORE, 0.3, False, "improvement 0.3 [-"),
    ("clip_score: better with 60 % confidence", SCORE, 0.3, True, "improvement 0.3 [0.0"),
    ("unet_rows: at most 1 worse", ROWS, -2.0, True, "improvement 2 ["),
    ("unet_rows: at most 1 worse", ROWS, 2.0, False, "improvement -2 ["),
    ("unet_rows: better", ROWS, -2.0, True, "above 0"),
    ("clip_score: at least 69", SCORE, 0.0, True, "70 [69"),
    ("clip_score: at least 69.9", SCORE, 0.0, False, "limit 69.9"),
    ("clip_score: at most 71", SCORE, 0.0, True, "limit 71"),
    ("clip_score: at most 70.1", SCORE, 0.0, False, "70 [69."),
]


@pytest.mark.parametrize(("line", "metric", "shift", "passes", "said"), JUDGED)
def test_a_gate_is_judged_by_the_unfavourable_end_of_its_interval(line, metric, shift, passes, said):
    served = np.full(16, 70.0)
    verdict = Gate.parse(line).judge(metric, served + shift + NOISE, served, PROMPTS)
    assert verdict.passed is passes
    assert said in verdict.figures
    assert verdict.gate == str(Gate.parse(line))


def test_pairs_are_compared_not_means():
    """What prompts differ in among themselves is no doubt about the difference."""
    served = np.repeat(np.linspace(20, 90, 8), 2)
    assert Gate.parse("clip_score: better").judge(SCORE, served + 0.1 + NOISE / 100, served, PROMPTS).passed


def test_nothing_served_is_nothing_to_be_worse_than():
    values = np.full(2, 70.0)
    verdict = Gate.parse("clip_score: better").judge(SCORE, values, None, ["a", "b"])
    assert (verdict.passed, verdict.figures) == (True, "nothing is served yet")


@pytest.mark.parametrize("line", ["clip_score: better", "clip_score: at least 1"])
def test_few_prompts_prove_nothing(line):
    few = PROMPTS[: 2 * (LEAST_PROMPTS - 1)]
    values = np.full(len(few), 70.0)
    with pytest.raises(GateError, match=f"on at least {LEAST_PROMPTS} prompts.*received {LEAST_PROMPTS - 1}"):
        Gate.parse(line).judge(SCORE, values, values, few)


def test_a_metric_without_a_direction_is_not_compared():
    values = np.full(16, 1.0)
    with pytest.raises(GateError, match=r"contrast is in none\. Example: contrast: at least"):
        improvement(METRICS["contrast"], values, values, PROMPTS)


def test_the_default_gates_let_the_same_through_and_stop_a_costly_or_a_bad_one():
    score, rows = DEFAULT_GATES
    served = np.full(16, 50.0)
    metric = {"clip_score": SCORE, "unet_rows": ROWS}
    assert all(gate.judge(metric[gate.metric], served, served, PROMPTS).passed for gate in DEFAULT_GATES)
    assert not rows.judge(ROWS, served * 1.3, served, PROMPTS).passed
    assert not score.judge(SCORE, served - 2, served, PROMPTS).passed


def test_values_that_are_not_finite_are_refused():
    values = np.full(16, np.nan)
    broken = Metric("psnr", "higher", "", lambda *_: [])
    with pytest.raises(StatisticsError, match="must be finite"):
        Gate.parse("psnr: better").judge(broken, values, values, PROMPTS)


def test_a_metric_without_a_direction_is_refused_also_while_nothing_is_served():
    with pytest.raises(GateError, match="contrast is in none"):
        Gate.parse("contrast: at most 5 worse").judge(METRICS["contrast"], NOISE, None, PROMPTS)
