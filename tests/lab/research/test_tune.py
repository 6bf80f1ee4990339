"""Studies find the front they should, stop what is hopeless, draw nothing twice, and go on where they were."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

from sdxl_lab.cli import STOPPED, main
from sdxl_lab.config import ConfigError, GenerationConfig, RefinerConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.evaluation.metrics import METRICS, Metric, MetricError
from sdxl_lab.research.axes import SweepError
from sdxl_lab.research.cache import ImageCache
from sdxl_lab.research.sweep import Sweep, read_table, run_sweep
from sdxl_lab.research.tune import Choices, Range, StudyPlan, hopeless, knee, tune

PAIRS = tuple((prompt, seed) for seed in range(4) for prompt in ("a cat", "a boat", "a red star"))
BEST_SCALE = 3.0


def truth(config: dict[str, Any]) -> float:
    """A known quality: more steps help less and less, the scale should be 3, Heun harms."""
    guidance = config["guidance_scale"]
    return 10 * (1 - 0.7 ** config["steps"]) - (guidance - BEST_SCALE) ** 2 - 4 * (config["scheduler"] == "ddim")


def _known(images: Any, _: Any) -> Iterator[float]:
    for image in images:
        record = image.record
        noise = random.Random(f"{record.prompt} {record.seed} {record.digest}").gauss(0, 0.1)
        yield truth(record.config.to_dict()) + random.Random(record.prompt).gauss(0, 5) + noise


KNOWN = Metric("known", "higher", "this test", _known)


@pytest.fixture
def plan(tiny_config: GenerationConfig) -> StudyPlan:
    return StudyPlan(
        name="known",
        config=tiny_config,
        metric=KNOWN,
        space={
            "scheduler": Choices(("euler", "ddim")),
            "steps": Range(1, 6, None, False, True),
            "guidance_scale": Range(1.0, 5.0, 1.0, False, False),
        },
        pairs=PAIRS,
        trials=24,
        startup=8,
        seed=1,
        stop_after=4,
    )


@pytest.fixture
def tuned(plan: StudyPlan, engine: Engine, tmp_path: Path) -> Callable[..., Any]:
    def tuned(changed: StudyPlan = plan, **more: Any) -> Any:
        return tune(changed, out=tmp_path / "out", cache=tmp_path / "cache", engine=engine, **more)

    return tuned


def rows_of(config: dict[str, Any]) -> int:
    return config["steps"] * (2 if config["guidance_scale"] > 1 else 1)


@pytest.mark.slow
def test_the_front_of_a_known_quality_is_found_and_what_is_hopeless_is_stopped(
    tuned: Callable, plan: StudyPlan, submitted: list, tmp_path: Path
) -> None:
    found = tuned()
    table = found.table
    assert len(table) == plan.trials
    over = table[table["state"] == "complete"]
    configs = [json.loads(text) for text in over["settings"]]
    # Of the trials that were finished, the front is what the known quality says it is.
    points = [(rows_of(config), truth(config)) for config in configs]
    dominated = [any(r <= rows and q > quality + 0.2 for r, q in points) for rows, quality in points]
    assert not any(bad and front for bad, front in zip(dominated, over["front"], strict=True))
    assert over["unet_rows"].tolist() == [rows for rows, _ in points]
    front = found.front
    assert front["unet_rows"].is_monotonic_increasing
    assert front["known"].is_monotonic_increasing
    assert front[["scheduler", "guidance_scale"]].iloc[-1].tolist() == ["euler", BEST_SCALE]
    # What was stopped was worse in truth than a trial of the front that costs no more, and had no more images.
    stopped = table[table["state"] == "pruned"]
    assert len(stopped) >= 3
    for _, row in stopped.iterrows():
        config = json.loads(row["settings"])
        assert row["pairs"] in (4, 8)
        assert row["reason"].startswith("dominated by trial ")
        assert any(rows <= rows_of(config) and quality > truth(config) for rows, quality in points)
    assert not stopped["front"].any()
    drawn = {(request.config.digest, request.prompt, request.seed) for request in submitted}
    assert len(drawn) == len(submitted), "nothing is drawn twice"
    pairs = table.drop_duplicates("settings")["pairs"].sum()
    assert len(submitted) <= pairs
    # What was found is on disk too.
    pd.testing.assert_frame_equal(read_table(tmp_path / "out"), table)
    names = {path.stem for path in (tmp_path / "out" / "front").iterdir()}
    assert names == {f"trial-{number:04}" for number in front["trial"]}
    candidate = GenerationConfig.from_toml(tmp_path / "out" / "candidate.toml")
    assert candidate == found.candidate
    assert candidate.digest in {GenerationConfig.from_dict(json.loads(text)).digest for text in front["settings"]}
    assert found.rule.startswith("the knee of the front")


@pytest.mark.slow
def test_the_field_that_decides_is_the_important_one(tuned: Callable, plan: StudyPlan) -> None:
    def measure(images: Any, _: Any) -> Iterator[float]:
        return (-abs(image.record.config.guidance_scale - BEST_SCALE) for image in images)

    metric = Metric("scale", "higher", "this test", measure)
    found = tuned(replace(plan, metric=metric, pairs=PAIRS[:2], trials=20, startup=20))
    assert set(found.importance.index) == set(plan.space)
    assert set(found.importance.columns) == {"front", "scale"}
    assert found.importance["scale"].idxmax() == "guidance_scale"
    assert found.importance.sum().round(6).tolist() == [1, 1]


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(tuned: Callable, plan: StudyPlan, submitted: list) -> None:
    short = replace(plan, trials=4)
    first = tuned(short)
    count = len(submitted)
    pd.testing.assert_frame_equal(tuned(short).table, first.table)
    assert len(submitted) == count, "it was done"
    more = tuned(replace(plan, trials=6))
    assert len(more.table) == 6
    pd.testing.assert_frame_equal(more.table[:4].drop(columns="front"), first.table.drop(columns="front"))


def test_an_interrupted_trial_is_tried_again_from_the_cache(
    tuned: Callable, plan: StudyPlan, submitted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan, trials=3, start=({"steps": 3, "guidance_scale": 2.0, "scheduler": "euler"},))
    complete, calls = ImageCache.complete, []

    def interrupted(self: ImageCache, cells: Any, *rest: Any) -> Any:
        calls.append(len(cells))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return complete(self, cells, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ImageCache, "complete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned(plan)
    assert len(submitted) == 4
    found = tuned(plan)
    assert found.table["state"].tolist()[:2] == ["fail", "complete"]
    assert found.table["steps"].tolist()[:2] == [3, 3]
    assert (found.table["state"] != "fail").sum() == 3
    first = [request for request in submitted if request.config.steps == 3 and request.config.guidance_scale == 2.0]
    assert len(first) == len(PAIRS), "the four images of the interrupted trial were not drawn again"


def test_trials_share_cells_with_sweeps(
    tuned: Callable, plan: StudyPlan, tiny_config: GenerationConfig, engine: Engine, submitted: list, tmp_path: Path
) -> None:
    served = {"steps": 3, "guidance_scale": 2.0, "scheduler": "euler"}
    axes = {"prompt": ["a cat", "a boat", "a red star"], "seed": range(4), "steps": [3], "guidance_scale": [2.0]}
    run_sweep(Sweep.product(tiny_config, axes), out=tmp_path / "sweep", cache=tmp_path / "cache", engine=engine)
    del submitted[:]
    found = tuned(replace(plan, trials=1, start=(served,)))
    assert found.table["pairs"].tolist() == [len(PAIRS)]
    assert submitted == []


def test_settings_that_cannot_be_drawn_are_stopped_with_the_reason(tuned: Callable, plan: StudyPlan) -> None:
    space = {"steps": Choices((1,)), "refiner.handover": Range(0.8, 0.9, None, False, False)}
    found = tuned(replace(plan, space=space, trials=3))
    assert set(found.table["state"]) == {"pruned"}
    assert found.table["reason"].str.startswith("cannot be drawn: ConfigError: steps must be enough").all()
    assert found.candidate is None
    assert found.rule == "no trial was finished"


def test_a_metric_that_cannot_measure_ends_the_study(tuned: Callable, plan: StudyPlan) -> None:
    def broken(images: Any, _: Any) -> list[float]:
        raise OSError("no network")

    with pytest.raises(SweepError, match="must measure every image; broken: OSError: no network"):
        tuned(replace(plan, metric=Metric("broken", "higher", "this test", broken)))


def test_a_rule_over_two_fields_that_are_both_searched_is_left_to_the_trials(plan: StudyPlan) -> None:
    config, few = plan.config.with_(steps=100), {"scheduler": Choices(("euler", "lcm"))}
    assert replace(plan, config=config, space=few | {"steps": Choices((4, 60))}).config == config
    with pytest.raises(ConfigError, match="at most 50 with the scheduler lcm; received 100"):
        replace(plan, config=config, space=few)


def test_the_refiners_fields_are_left_out_where_it_is(tuned: Callable, plan: StudyPlan) -> None:
    space = {"refiner.handover": Range(0.4, 0.6, None, False, False), "refiner": Choices(("none", {}))}
    found = tuned(replace(plan, space=space, trials=8, stop_after=12))
    configs = [GenerationConfig.from_dict(json.loads(text)) for text in found.table["settings"]]
    assert {config.refiner is None for config in configs} == {True, False}
    for config, handover in zip(configs, found.table["refiner.handover"], strict=True):
        assert pd.isna(handover) if config.refiner is None else config.refiner.handover == round(handover, 6)


def test_another_plan_under_the_same_name_is_refused(tuned: Callable, plan: StudyPlan) -> None:
    tuned(replace(plan, trials=1))
    with pytest.raises(SweepError, match="what it was begun with, or its trials cannot be compared; its pairs changed"):
        tuned(replace(plan, pairs=PAIRS[:6]))
    with pytest.raises(SweepError, match="its metric changed"):
        tuned(replace(plan, metric=replace(KNOWN, source="another test")))


def test_a_study_of_other_weights_is_refused(tuned: Callable, plan: StudyPlan, engine: Engine) -> None:
    tuned(replace(plan, trials=1))
    engine.weights = {"base": "retrained"}
    with pytest.raises(SweepError, match="its ground changed"):
        tuned(plan)


def test_a_study_of_the_first_version_is_refused(tuned: Callable, plan: StudyPlan, tmp_path: Path) -> None:
    tuned(replace(plan, trials=1))
    study = optuna.load_study(study_name=plan.name, storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}")
    begun = json.loads(study.user_attrs["identity"])
    assert begun.pop("schema") == 1
    study.set_user_attr("identity", json.dumps(begun))
    with pytest.raises(SweepError, match=r"begun under the schema 1; received none, as 0\.1\.0 wrote it"):
        tuned(plan)


def test_a_damaged_storage_is_refused_in_plain_words(tuned: Callable, plan: StudyPlan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.db").write_text("this is no database " * 100)
    with pytest.raises(SweepError, match=r"a database that Optuna can open; .*The images are safe in the cache"):
        tuned()


# --- the rules -----------------------------------------------------------------------------------------------------


def rival(values: list[float], rows: float, number: int = 7) -> Any:
    mean = sum(values) / len(values)
    made = optuna.trial.create_trial(values=[mean, rows], user_attrs={"values": values})
    made.number = number
    return made


HOPELESS = [
    ("worse on every pair", [1.0, 2.0, 3.0, 4.0], [2.0, 3.1, 4.0, 5.1], 8, True),
    ("worse by the same on every pair", [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], 8, True),
    ("worse, and the rival costs more", [1.0, 2.0, 3.0, 4.0], [2.0, 3.1, 4.0, 5.1], 20, False),
    ("as good", [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], 8, False),
    ("worse on some pairs, better on others", [1.0, 9.0, 1.0, 9.0], [9.0, 2.0, 8.0, 2.0], 8, False),
    ("better", [2.0, 3.1, 4.0, 5.1], [1.0, 2.0, 3.0, 4.0], 8, False),
]


@pytest.mark.parametrize(("values", "theirs", "rows", "stopped"), [case[1:] for case in HOPELESS],
                         ids=[case[0] for case in HOPELESS])  # fmt: skip
def test_a_trial_is_stopped_where_a_rival_is_surely_better(
    plan: StudyPlan, values: list, theirs: list, rows: float, stopped: bool
) -> None:
    reason = hopeless(plan, values, 10, [rival([*theirs, 0.0, 0.0], rows)])
    assert (reason is not None) is stopped
    lower = replace(plan, metric=replace(KNOWN, better="lower"))
    assert hopeless(lower, [-v for v in values], 10, [rival([-v for v in theirs], rows)]) == (
        reason and reason.replace("lower", "higher")
    )
    if reason:
        assert reason.startswith("dominated by trial 7: known lower by 1")
        assert reason.endswith(f"on 4 pairs (p = {reason.split('p = ')[1].split(',')[0]}, below 0.025), at 10 UNet "
                               f"rows against {rows}")  # fmt: skip


def test_a_trial_as_good_as_its_rivals_is_seldom_stopped(plan: StudyPlan) -> None:
    """The rule promises 5 % at most, over all looks and three rivals; of 1,000 trials chance may make that 7 %. Without
    its correction it would be 14 %."""
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(1000):
        prompts = rng.normal(0, 5, len(PAIRS))
        values, *others = (list(prompts + rng.normal(0, 1, len(PAIRS))) for _ in range(4))
        rivals = [rival(list(map(float, other)), 8) for other in others]
        stopped += any(hopeless(plan, values[:rung], 8, rivals) for rung in plan.rungs[:-1])
    assert stopped / 1000 <= 0.07


def test_rungs_double_up_to_all_pairs(plan: StudyPlan) -> None:
    assert plan.rungs == [4, 8, 12]
    assert replace(plan, stop_after=12).rungs == [12]
    assert replace(plan, stop_after=100).rungs == [12]


KNEES = [
    ([10], [1.0], 0),
    ([10, 20], [1.0, 2.0], 0),
    ([10, 20, 100], [0.0, 8.0, 10.0], 1),
    ([10, 50, 60, 100], [0.0, 1.0, 9.0, 10.0], 2),
]


@pytest.mark.parametrize(("cost", "gain", "place"), KNEES)
def test_the_knee_is_farthest_above_the_line(cost: list, gain: list, place: int) -> None:
    assert knee(cost, gain) == place


@pytest.mark.slow
def test_the_candidate_may_be_the_best_within_a_budget(tuned: Callable, plan: StudyPlan) -> None:
    plan = replace(plan, trials=4, start=tuple({"steps": s, "guidance_scale": 3.0, "scheduler": "euler"} for s in (1, 3, 5, 6)))  # noqa: E501  # fmt: skip
    found = tuned(replace(plan, choose=7))
    assert found.candidate.steps == 3
    assert found.rule == "the best of the front that takes at most 7 UNet rows (trial 1)"
    none = tuned(replace(plan, choose=1))
    assert none.candidate is None
    assert "there is none, the cheapest takes 2" in none.rule


# --- files and the command line ------------------------------------------------------------------------------------

FILE = """
metric = "sharpness"
trials = 3
startup = 2
config = "base.toml"
choose = 100
stop = { after = 2, confidence = 0.9 }

[space]
scheduler = ["euler", "ddim"]
steps = { from = 2, to = 4 }
guidance_interval = ["none", [0.3, 5.0]]
refiner.handover = { from = 0.4, to = 0.6, step = 0.1 }

[[start]]
steps = 3
guidance_interval = [0.3, 5.0]

[pairs]
prompt = ["a cat", "a boat"]
seed = { from = 1, to = 2, step = 1 }
"""


@pytest.fixture
def file(tmp_path: Path, tiny_config: GenerationConfig) -> Path:
    (tmp_path / "base.toml").write_text(tiny_config.to_toml())
    path = tmp_path / "study.toml"
    path.write_text(FILE)
    return path


def test_a_file_is_a_plan(file: Path, tiny_config: GenerationConfig) -> None:
    assert StudyPlan.from_toml(file) == StudyPlan(
        name="study",
        config=tiny_config,
        metric=METRICS["sharpness"],
        space={
            "scheduler": Choices(("euler", "ddim")),
            "steps": Range(2, 4, None, False, True),
            "guidance_interval": Choices(("none", [0.3, 5.0])),
            "refiner.handover": Range(0.4, 0.6, 0.1, False, False),
        },
        pairs=(("a cat", 1), ("a boat", 1), ("a cat", 2), ("a boat", 2)),
        trials=3,
        startup=2,
        stop_after=2,
        confidence=0.9,
        choose=100,
        start=({"steps": 3, "guidance_interval": [0.3, 5.0]},),
    )


BAD = {
    "no space": (FILE.replace("[space]", "[spaces]"), SweepError, "received 'spaces'. Did you mean space?"),
    "a storage, which the command takes": ("storage = 'x'" + FILE, SweepError, "received 'storage'"),
    "an unknown field": (
        FILE.replace("scheduler =", "schedular ="),
        SweepError,
        "received 'schedular'. Did you mean scheduler?",
    ),
    "a bad end": (FILE.replace("from = 2", "from = 0"), ConfigError, "steps must be a whole number from 1"),
    "a bad choice": (FILE.replace('"ddim"', '"dim"'), ConfigError, "received 'dim'"),
    "an empty range": (FILE.replace("to = 4", "to = 2"), SweepError, "range of steps must have from and to"),
    "a range that Optuna cannot search": (FILE.replace("to = 4", "to = 4, step = 0"), SweepError, "Optuna can search"),
    "pairs that are no table": ("pairs = 3\nmetric = 'sharpness'\n[space]\nsteps = [1]", SweepError, "must be tables"),
    "one pair": (
        FILE.replace('"a cat", "a boat"', '"a cat"').replace("to = 2, s", "to = 1, s"),
        SweepError,
        "two pairs",
    ),
    "a metric without a better side": (FILE.replace("sharpness", "contrast"), SweepError, "must have a better side"),
    "a metric with a reference": (FILE.replace("sharpness", "ssim"), SweepError, "need no reference"),
    "an unknown metric": (FILE.replace("sharpness", "beauty"), MetricError, "received 'beauty'"),
    "no trials": (FILE.replace("trials = 3", "trials = 0"), SweepError, "trials must be a whole number from 1"),
    "one pair before a stop": (FILE.replace("after = 2", "after = 1"), SweepError, "stop_after must be"),
    "too much confidence": (FILE.replace("0.9 }", "1.0 }"), SweepError, "confidence must be a number from 0.5"),
    "a bad choice of candidate": (FILE.replace("= 100", "= 'best'"), SweepError, "choose must be knee or a number"),
    "a start outside the space": (FILE.replace("steps = 3", "width = 64"), SweepError, "received 'width'"),
}


@pytest.mark.parametrize(("text", "kind", "said"), BAD.values(), ids=BAD)
def test_bad_files_are_refused_before_any_work(file: Path, text: str, kind: type[Exception], said: str) -> None:
    file.write_text(text)
    with pytest.raises(kind) as caught:
        StudyPlan.from_toml(file)
    assert said in str(caught.value)


def test_the_command_tunes_says_what_it_found_and_resumes(file: Path, capsys: pytest.CaptureFixture) -> None:
    out = file.parent / "out"
    command = ["tune", str(file), "--out", str(out), "--cache", str(file.parent / "cache")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("trial ") >= 3
    for words in ("The front, cheapest first", "Importance of each field", "at most 100 UNet rows", "candidate.toml"):
        assert words in said
    table = read_table(out)
    assert table["steps"][0] == 3
    assert json.loads(table["settings"][0])["guidance_interval"] == [0.3, 5.0]
    assert GenerationConfig.from_toml(out / "candidate.toml").refiner is not None
    assert main(command) == 0
    assert "complete:" not in capsys.readouterr().out
    pd.testing.assert_frame_equal(read_table(out), table)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_says_how_to_go_on(file: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["tune", str(file), "--out", str(file.parent / "out"), "--cache", str(file.parent / "cache")]
    assert main(command) == STOPPED
    assert "to go on, run the same command again" in capsys.readouterr().err


def test_a_range_of_a_fraction_is_one_though_its_ends_are_whole(plan: StudyPlan) -> None:
    trial = optuna.trial.FixedTrial({"guidance_scale": 2.5, "steps": 3})
    assert Range(1, 5, 0.5, False, False).suggest(trial, "guidance_scale") == 2.5
    assert Range(1, 5, None, False, True).suggest(trial, "steps") == 3
    assert plan.config.changed({"refiner.handover": 0.5, "refiner": {}}).refiner == RefinerConfig(handover=0.5)


def test_a_metric_that_is_no_number_ends_the_study_with_its_image(tuned: Callable, plan: StudyPlan) -> None:
    nan = Metric("nan", "higher", "this test", lambda images, _: (math.nan for _ in images))
    with pytest.raises(SweepError, match="received nan from nan for 'a cat', seed 0"):
        tuned(replace(plan, metric=nan, trials=2))


def test_a_candidate_of_an_earlier_rule_does_not_stay(tuned: Callable, plan: StudyPlan, tmp_path: Path) -> None:
    plan = replace(plan, trials=2, startup=2, pairs=PAIRS[:2])
    tuned(plan)
    assert (tmp_path / "out" / "candidate.toml").exists()
    assert tuned(replace(plan, choose=0.5)).candidate is None
    assert not (tmp_path / "out" / "candidate.toml").exists()


def test_workers_that_share_a_storage_do_not_try_the_same(
    tuned: Callable, plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    sampler = optuna.samplers.TPESampler
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda seed=None, **more: seeds.append(seed) or sampler(seed=seed, **more))  # noqa: E501  # fmt: skip
    plan = replace(plan, trials=1, pairs=PAIRS[:2])
    for _ in range(3):
        tuned(plan, storage=f"sqlite:///{tmp_path}/shared.db")
    assert len({seed for seed in seeds if seed is not None}) == 3, seeds
