"""What differs between two configurations, and the table that a pull request shows."""

from sdxl_lab.config import GenerationConfig, RefinerConfig, ServingLimits
from sdxl_lab.release.diff import changed_fields, difference_table
from tests.made import findings

BEFORE = GenerationConfig(negative_prompt="a | b\nc")
AFTER = BEFORE.with_(steps=20, refiner=RefinerConfig(handover=0.7), negative_prompt=None)
SOURCE = {"source": "a paper", "values": [0.5] * 16}
FINDINGS = findings(
    prompts=list("abcdefgh"),
    seeds=[0, 1],
    metrics={
        "clip_score": {
            "better": "higher",
            "served": {"mean": 68.981, "low": 68.0, "high": 70.0, "count": 8},
            "candidate": {"mean": 70.0, "low": 69.0, "high": 71.0, "count": 8},
            "difference": {"mean": 1.019, "low": -0.2, "high": 2.1, "count": 8},
            **SOURCE,
        },
        "contrast": {"candidate": {"mean": 0.5, "count": 1}, **SOURCE},
    },
    gates=[
        {"gate": "clip_score: at most 1 worse", "passed": True, "figures": "improvement 1"},
        {"gate": "clip_score: better", "passed": False, "figures": "improvement 1"},
    ],
)


def test_what_differs_is_named_field_by_field():
    assert changed_fields(BEFORE, BEFORE) == {}
    assert changed_fields(BEFORE, AFTER) == {
        "steps": (25, 20),
        "negative_prompt": ("a | b\nc", None),
        "refiner.handover": (None, 0.7),
        "refiner.aesthetic_score": (None, 6.0),
        "refiner.negative_aesthetic_score": (None, 2.5),
    }


def test_loras_are_told_by_their_place_and_where_they_lie_does_not_count():
    sha = {"sha256": "0" * 64}
    here, there = ({"source": f"{folder}/neon.safetensors", **sha} for folder in ("here", "there"))
    assert changed_fields(BEFORE.with_(loras=[here]), BEFORE.with_(loras=[there | {"weight": 0.5}])) == {
        "loras.0.weight": (1.0, 0.5)
    }
    assert changed_fields(BEFORE, BEFORE.with_(loras=[here])) == {
        "loras.0.name": (None, "neon"),
        "loras.0.sha256": (None, "0" * 64),
        "loras.0.weight": (None, 1.0),
    }


def test_the_table_is_markdown_for_a_pull_request():
    assert (
        difference_table(BEFORE, AFTER, FINDINGS)
        == f"""\
### `{BEFORE.short_digest}` → `{AFTER.short_digest}`

| setting | served | candidate |
| --- | --- | --- |
| `steps` | 25 | 20 |
| `negative_prompt` | a \\| b c | – |
| `refiner.handover` | – | 0.7 |
| `refiner.aesthetic_score` | – | 6 |
| `refiner.negative_aesthetic_score` | – | 2.5 |

| metric | better | served | candidate | difference [95 %] |
| --- | --- | --- | --- | --- |
| `clip_score` | higher | 68.98 | 70 | +1.019 [-0.2, +2.1] |
| `contrast` |  | – | 0.5 |  |

8 prompts x 2 seeds; intervals are over prompts.

|  | gate | figures |
| --- | --- | --- |
| pass | clip_score: at most 1 worse | improvement 1 |
| **fail** | clip_score: better | improvement 1 |
"""
    )


def test_equal_settings_and_a_new_slot_say_so():
    assert "The settings are the same." in difference_table(BEFORE, BEFORE)
    fresh = difference_table(None, AFTER)
    assert fresh.startswith(f"### a new slot → `{AFTER.short_digest}`")
    assert "| `steps` | – | 20 |" in fresh


def test_limits_that_change_are_shown():
    limits = ServingLimits(), ServingLimits(steps=(1, 50))
    table = difference_table(BEFORE, BEFORE, limits=limits)
    assert "| `serving.steps` | [1, 100] | [1, 50] |" in table
    assert "serving.side" not in table
    assert "The settings are the same." in difference_table(BEFORE, BEFORE, limits=(limits[0], limits[0]))
