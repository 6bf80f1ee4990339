"""Tuning: an Optuna study over fields of the configuration, for a metric's mean against the cost in UNet rows.

Every trial draws the same pairs of prompt and seed as cells of the image cache, so that images of another trial, a
sweep or an interrupted run are reused. The study is kept in Optuna's storage. It can be resumed and shared by many
workers.
"""

import json
import math
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from scipy import stats

from sdxl_lab.config import ConfigError, GenerationConfig, RuntimeProfile, canonical
from sdxl_lab.declaration import NONE, Whole, left_out
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.lora_files import pinned
from sdxl_lab.evaluation.metrics import Metric
from sdxl_lab.research.axes import (
    SweepError,
    base_config,
    check_axis,
    flattened,
    named_metric,
    read_toml,
    spread,
)
from sdxl_lab.research.cache import FOLDER, Cell, ImageCache
from sdxl_lab.research.sweep import processes, write_table

OUT = Path("runs/studies")
SCHEMA = 1  # of what a study keeps of its plan
KEYS = {"name", "model", "config", "metric", "clip", "trials", "startup", "seed", "choose"} | {
    "space", "pairs", "stop", "start"
}  # fmt: skip
RANGE = "steps = { from = 8, to = 40 }"

OnTrial = Callable[[FrozenTrial], None]


@dataclass(frozen=True)
class Choices:
    """A field's value is one of a list."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        named = {_plain(value): value for value in self.values}
        return named[trial.suggest_categorical(name, list(named))]

    @property
    def examples(self) -> Sequence[Any]:
        return self.values


@dataclass(frozen=True)
class Range:
    """A field's value is a number from `low` to `high`, both included."""

    low: float
    high: float
    step: float | None
    log: bool
    whole: bool

    def suggest(self, trial: Trial, name: str) -> Any:
        if self.whole:
            return trial.suggest_int(
                name, int(self.low), int(self.high), step=1 if self.step is None else int(self.step), log=self.log
            )
        return round(trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log), 6)

    @property
    def examples(self) -> Sequence[Any]:
        kind = int if self.whole else float
        return [kind(self.low), kind(self.high)]


Space = Mapping[str, Choices | Range]


def _plain(value: Any) -> Any:
    """A choice in a form that Optuna stores: pairs and tables as JSON."""
    return None if value == NONE else json.dumps(value) if isinstance(value, list | tuple | Mapping) else value


@dataclass(frozen=True)
class StudyPlan:
    """A study as its file describes it. `from_toml` reads one.

    `pairs` are (prompt, seed), the same for every trial, prompts first. A trial may be stopped after `stop_after` pairs
    and every doubling of them, with `confidence` that no trial is stopped wrongly on these pairs. `choose` is "knee",
    or the largest number of UNet rows that the candidate may take. `start` are settings to try first.
    """

    name: str
    config: GenerationConfig
    metric: Metric
    space: Space
    pairs: tuple[tuple[str, int], ...]
    trials: int = 50
    startup: int = 10
    seed: int = 0
    stop_after: int = 8
    confidence: float = 0.95
    choose: str | float = "knee"
    start: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.metric.better is None or self.metric.needs_reference:
            raise SweepError(
                f"the metric of a study must have a better side and need no reference; received {self.metric.name}. "
                "Example: clip_score"
            )
        if len(self.pairs) < 2:
            raise SweepError(
                f"a study must have at least two pairs of prompt and seed, since one image proves nothing; received "
                f'{len(self.pairs)}. Example: pairs = {{ prompt = ["A cat in a hat", "a blue boat"], seed = [0, 1] }}'
            )
        for name, low in (("trials", 1), ("startup", 1), ("stop_after", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise SweepError(f"{name} must be a whole number from {low}; received {value!r}. Example: {name} = 10")
        if not (isinstance(self.confidence, float) and 0.5 <= self.confidence < 1):
            raise SweepError(
                f"confidence must be a number from 0.5 and below 1; received {self.confidence!r}. Example: 0.95"
            )
        if self.choose != "knee" and (isinstance(self.choose, str | bool) or self.choose <= 0):
            raise SweepError(f"choose must be knee or a number of UNet rows; received {self.choose!r}. Example: knee")
        for given in self.start:
            if unknown := sorted(set(given) - set(self.space)):
                raise SweepError(
                    f"settings to start with must be of the space ({', '.join(self.space)}); received {unknown[0]!r}"
                )
        Cell(self.config, *self.pairs[0])
        for name, choices in self.space.items():
            check_axis(name)
            for value in choices.examples:
                self._check(name, value)

    def _check(self, name: str, value: Any) -> None:
        """Check one value. A rule over two fields that are both searched is checked in the trials."""
        try:
            self.config.changed({name: value})
        except ConfigError as error:
            if error.field == name or error.field not in self.space:
                raise

    @property
    def sign(self) -> int:
        return 1 if self.metric.better == "higher" else -1

    @property
    def rungs(self) -> list[int]:
        """The numbers of pairs after which a trial may be stopped; the last one is all of them."""
        rungs = [self.stop_after]
        while rungs[-1] < len(self.pairs):
            rungs.append(2 * rungs[-1])
        return [*(rung for rung in rungs if rung < len(self.pairs)), len(self.pairs)]

    def identity(self, ground: Mapping[str, Any]) -> str:
        """What must not change between runs of a study, as JSON: base, metric, pairs, and the cache's `ground`."""
        content = {"schema": SCHEMA, "config": self.config.to_dict(), "metric": [self.metric.name, self.metric.source]}
        return canonical(content | {"pairs": [list(pair) for pair in self.pairs], "ground": ground})

    @classmethod
    def from_toml(cls, path: Path | str) -> "StudyPlan":
        """Read a study's file; `studies/` has examples. Raises `SweepError`, `ConfigError` or `MetricError`."""
        path = Path(path)
        content = read_toml(path, KEYS, "study")
        if not content.get("space") or not content.get("pairs") or "metric" not in content:
            raise SweepError(f"{path} must have metric, [space] and [pairs]. Example: metric = 'clip_score'")
        pairs, stop = content["pairs"], content.get("stop", {})
        if not isinstance(pairs, Mapping) or not isinstance(stop, Mapping):
            raise SweepError(f"pairs and stop must be tables; received {pairs!r} and {stop!r}. Example: [pairs]")
        prompts = spread("prompt", pairs.get("prompt", []))
        seeds = spread("seed", pairs.get("seed", [0]))
        given: dict[str, Any] = {
            name: content[name] for name in ("trials", "startup", "seed", "choose") if name in content
        }
        if "after" in stop:
            given["stop_after"] = stop["after"]
        if "confidence" in stop:
            given["confidence"] = stop["confidence"]
        return cls(
            name=str(content.get("name", path.stem)),
            config=base_config(content, path.parent),
            metric=named_metric(content["metric"], content.get("clip", "nano")),
            space={name: _choices(name, value) for name, value in flattened(content["space"]).items()},
            pairs=tuple((prompt, seed) for seed in seeds for prompt in prompts),
            start=tuple(flattened(table) for table in content.get("start", [])),
            **given,
        )


def _is_integer(name: str) -> bool:
    """Whether a setting is a whole number. An unknown name is refused where the plan is made."""
    try:
        kind = GenerationConfig.setting(name).kind
    except ConfigError:
        return False
    return isinstance(kind, Whole)


def _choices(name: str, value: Any) -> Choices | Range:
    if not isinstance(value, Mapping):
        return Choices(tuple(spread(name, value)))
    low, high = value.get("from"), value.get("to")
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    if not numbers or low >= high or set(value) - {"from", "to", "step", "log"}:  # type: ignore[operator]
        raise SweepError(
            f"the range of {name} must have from and to, the first below the second, and may have step or log; "
            f"received {dict(value)}. Example: {RANGE}"
        )
    found = Range(low, high, value.get("step"), value.get("log", False), _is_integer(name))  # type: ignore[arg-type]
    try:
        found.suggest(optuna.trial.FixedTrial({name: low}), name)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise SweepError(
            f"the range of {name} must be one that Optuna can search; {error}. Example: {RANGE}"
        ) from error
    return found


# --- the study -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyResult:
    """The result of a study.

    `table` has one row a trial. `front` is its Pareto front, cheapest first. `importance` is each field's share in
    reaching the front and in the metric. `candidate` is the configuration chosen by `rule`, or None.
    """

    study: Study
    table: pd.DataFrame
    front: pd.DataFrame
    importance: pd.DataFrame
    candidate: GenerationConfig | None
    rule: str


def tune(
    plan: StudyPlan,
    *,
    out: Path | str | None = None,
    storage: str | None = None,
    cache: Path | str = FOLDER,
    profile: RuntimeProfile | None = None,
    engine: Engine | None = None,
    on_trial: OnTrial | None = None,
) -> StudyResult:
    """Run the remaining trials. The result is also written to `out`: `table.parquet`, `front/*.toml`, `candidate.toml`.

    `storage` is a database URL for Optuna, by default a SQLite file in `out`. Workers that share one have seeds of
    their own, so that they do not try the same settings. Trials are counted over all workers of a study. An interrupt
    keeps every finished trial and cell, and the interrupted trial is tried again. Raises `SweepError` for a study that
    was begun with another base, metric or pairs.
    """
    out = Path(out or OUT / plan.name)
    workers, profile = processes(profile, engine)
    with ImageCache(cache, profile, engine) as cached:
        with workers.main_process_first(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats, names of metrics
            study = _open_study(
                plan,
                storage or f"sqlite:///{_make_folder(out) / 'study.db'}",
                plan.identity(cached.ground(plan.config.model)),
                workers.process_index if storage is None else secrets.randbelow(2**20),
            )

        def ended(study: Study, trial: FrozenTrial) -> None:
            if on_trial is not None:
                on_trial(trial)
            if _count_ended(study) >= plan.trials:
                study.stop()

        if _count_ended(study) < plan.trials:
            study.optimize(lambda trial: _run_trial(plan, study, cached, trial), callbacks=[ended])
    workers.wait_for_everyone()
    result = read_study(plan, study)
    if workers.is_main_process:
        _write_result(result, out)
    return result


def _make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open_study(plan: StudyPlan, storage: str, identity: str, worker: int) -> Study:
    """Create or resume the study. A heartbeat notices a worker that dies, and its trial is tried again."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        kept = optuna.storages.RDBStorage(
            storage,
            heartbeat_interval=30,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        study = optuna.create_study(
            storage=kept,
            study_name=plan.name,
            directions=["maximize" if plan.sign > 0 else "minimize", "minimize"],
            load_if_exists=True,
        )
        begun = study.user_attrs.get("identity")
    except Exception as error:  # SQLAlchemy's, the database driver's and Optuna's own
        raise SweepError(
            f"the storage must be a database that Optuna can open; received {storage!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. The images are safe in the cache. Example: sqlite:///runs/study.db"
        ) from error
    if begun is not None and begun != identity:
        before, now = json.loads(begun), json.loads(identity)
        if before.get("schema") != SCHEMA:
            raise SweepError(
                f"the study {plan.name!r} must have been begun under the schema {SCHEMA}; received "
                f"{before.get('schema', 'none, as 0.1.0 wrote it: it knew a model by its weight files alone')}. Give "
                'this one a name of its own. Example: name = "second-try"'
            )
        differs = ", ".join(sorted(name for name in now if before.get(name) != now[name]))
        raise SweepError(
            f"the study {plan.name!r} must keep what it was begun with, or its trials cannot be compared; its "
            f'{differs} changed. Give this one a name of its own. Example: name = "second-try"'
        )
    study.set_user_attr("identity", identity)
    study.set_metric_names([plan.metric.name, "unet_rows"])
    study.sampler = optuna.samplers.TPESampler(
        seed=plan.seed + 1000 * worker + len(study.trials), n_startup_trials=plan.startup
    )
    for given in plan.start:
        study.enqueue_trial({name: _plain(value) for name, value in given.items()}, skip_if_exists=True)
    _retry_interrupted(study)
    return study


def _retry_interrupted(study: Study) -> None:
    """Queue interrupted trials again, once each. Optuna itself retries those of workers that died."""
    trials = study.get_trials(deepcopy=False)
    stale = optuna.storages.RetryHeartbeatStaleTrialCallback.retried_trial_number
    again = {number for trial in trials for number in (trial.user_attrs.get("retries"), stale(trial))}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.number not in again:
            study.enqueue_trial(trial.params, user_attrs={"retries": trial.number})


def _run_trial(plan: StudyPlan, study: Study, cached: ImageCache, trial: Trial) -> tuple[float, float]:
    """Run one trial: the metric's mean and the UNet rows of an image. Raises `TrialPruned` for a hopeless trial and for
    settings that cannot be drawn, so that the sampler learns to avoid both."""

    def give_up(reason: str) -> optuna.TrialPruned:
        trial.set_user_attr("pruned", reason)
        return optuna.TrialPruned(reason)

    values: list[float] = []
    rows = math.nan
    try:
        config = _suggest_config(plan, trial)
        pairs = [Cell(config, *pair) for pair in plan.pairs]
    except ConfigError as error:
        raise give_up(f"cannot be drawn: {error}") from error
    trial.set_user_attr("config", canonical(config.to_dict()))
    for rung in plan.rungs:
        part = pairs[len(values) : rung]
        keys = [cached.key(cell) for cell in part]
        for key, failure in cached.complete(part, [plan.metric]).items():
            if key in cached:  # drawn, but not measured: the settings are not at fault
                raise SweepError(f"the metric of the study must measure every image; {failure}")
            raise give_up(f"cannot be drawn: {failure}")
        cached.warn(keys)
        measured = [cached.values(key, [plan.metric])[plan.metric.name] for key in keys]
        for cell, value in zip(part, measured, strict=True):
            if not math.isfinite(value):
                raise SweepError(
                    f"the metric of the study must measure every image; received {value} from {plan.metric.name} for "
                    f"{cell.prompt!r}, seed {cell.seed}. Example: a metric that is a number for whatever is drawn"
                )
        values += measured
        rows = cached.costs(keys[0])["unet_rows"]
        trial.set_user_attr("values", values)
        trial.set_user_attr("unet_rows", rows)
        reason = hopeless(plan, values, rows, study.best_trials) if rung < len(plan.pairs) else None
        if reason is not None:
            raise give_up(reason)
    return sum(values) / len(values), rows


def _suggest_config(plan: StudyPlan, trial: Trial) -> GenerationConfig:
    """The trial's configuration: nested records first, then their fields, unless the record is none."""
    settings: dict[str, Any] = {}
    for name in sorted(plan.space, key=lambda name: name.count(".")):
        outer = name.partition(".")[0]
        if outer != name and outer in settings and left_out(settings[outer]):
            continue
        settings[name] = plan.space[name].suggest(trial, name)
    return pinned(plan.config.changed(settings))


def hopeless(plan: StudyPlan, values: Sequence[float], rows: float, front: Sequence[FrozenTrial]) -> str | None:
    """The reason to stop a trial early, or None.

    A trial is hopeless once a trial of the front that costs no more is better on the pairs drawn so far, by a one-sided
    paired t-test. The level is 1 - `confidence`, divided by the number of looks at a trial and of rivals at this look
    (Bonferroni), so that a trial as good as its rivals is stopped with at most that probability.
    """
    rivals = [trial for trial in front if trial.values and trial.values[1] <= rows and "values" in trial.user_attrs]
    if not rivals:
        return None
    level = (1 - plan.confidence) / (len(plan.rungs) - 1) / len(rivals)
    for rival in rivals:
        theirs = rival.user_attrs["values"][: len(values)]
        behind = [plan.sign * (other - own) for own, other in zip(values, theirs, strict=True)]
        if max(behind) - min(behind) < 1e-12:
            p = 0.0 if behind[0] > 0 else 1.0
        else:
            p = float(stats.ttest_1samp(behind, 0.0, alternative="greater").pvalue)
        if p < level:
            gap = sum(behind) / len(behind)
            return (
                f"dominated by trial {rival.number}: {plan.metric.name} {'lower' if plan.sign > 0 else 'higher'} by "
                f"{gap:.3g} on {len(values)} pairs (p = {p:.2g}, below {level:.2g}), at {rows:g} UNet rows against "
                f"{rival.values[1]:g}"
            )
    return None


def _count_ended(study: Study) -> int:
    """The number of finished and stopped trials, without interrupted ones."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


# --- the result --------------------------------------------------------------------------------------------------


def read_study(plan: StudyPlan, study: Study) -> StudyResult:
    """The result of a study in its present state."""
    best = {trial.number for trial in study.best_trials}
    rows = [_row(plan, trial) | {"front": trial.number in best} for trial in study.get_trials(deepcopy=False)]
    columns = ["trial", "state", *plan.space, plan.metric.name, "unet_rows", "pairs", "front", "reason", "settings"]
    table = pd.DataFrame(rows, columns=columns)
    front = table[table["front"]].sort_values("unet_rows").drop_duplicates(["unet_rows", plan.metric.name])
    candidate, rule = _candidate(plan, front)
    return StudyResult(study, table, front, _importance(plan, study), candidate, rule)


def _row(plan: StudyPlan, trial: FrozenTrial) -> dict[str, Any]:
    attributes = trial.user_attrs
    values = attributes.get("values", [])
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        **{name: trial.params.get(name) for name in plan.space},
        plan.metric.name: sum(values) / len(values) if values else math.nan,
        "unet_rows": attributes.get("unet_rows", math.nan),
        "pairs": len(values),
        "reason": attributes.get("pruned"),
        "settings": attributes.get("config"),
    }


def _candidate(plan: StudyPlan, front: pd.DataFrame) -> tuple[GenerationConfig | None, str]:
    if front.empty:
        return None, "no trial was finished"
    if plan.choose == "knee":
        rule = "the knee of the front: farthest above the line from its cheapest to its best member"
        place = knee(front["unet_rows"].tolist(), (plan.sign * front[plan.metric.name]).tolist())
    else:
        rule = f"the best of the front that takes at most {plan.choose:g} UNet rows"
        affordable = [rows <= float(plan.choose) for rows in front["unet_rows"]]
        if not any(affordable):
            return None, f"{rule}: there is none, the cheapest takes {front['unet_rows'].iloc[0]:g}"
        place = sum(affordable) - 1
    chosen = front.iloc[place]
    return GenerationConfig.from_dict(json.loads(chosen["settings"])), f"{rule} (trial {chosen['trial']})"


def knee(cost: Sequence[float], gain: Sequence[float]) -> int:
    """The index of the knee of a front given cheapest first: the point where gain is farthest above the line from the
    first to the last, both axes scaled to [0, 1] (Das 1999, On characterizing the knee of the Pareto curve)."""
    wide, high = cost[-1] - cost[0], gain[-1] - gain[0]
    if not wide or not high:
        return len(cost) - 1
    above = [(g - gain[0]) / high - (c - cost[0]) / wide for c, g in zip(cost, gain, strict=True)]
    return above.index(max(above))


def _importance(plan: StudyPlan, study: Study) -> pd.DataFrame:
    """Each field's share in reaching the front, and in the metric alone. Empty while there are too few trials.

    Optuna's PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) allows fields that not every trial has.
    """
    shares = {}
    targets = {"front": None, plan.metric.name: lambda trial: -plan.sign * trial.values[0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna says on every call that lower is better here
        for name, target in targets.items():
            try:
                shares[name] = optuna.importance.get_param_importances(study, target=target)
            except (ValueError, RuntimeError):
                continue
    return pd.DataFrame(shares, index=list(plan.space)) if shares else pd.DataFrame(index=list(plan.space))


def _write_result(result: StudyResult, out: Path) -> None:
    write_table(result.table, out / "table.parquet")
    folder = _make_folder(out / "front")
    for old in folder.glob("trial-*.toml"):
        old.unlink()
    for _, row in result.front.iterrows():
        config = GenerationConfig.from_dict(json.loads(row["settings"]))
        (folder / f"trial-{row['trial']:04}.toml").write_text(config.to_toml())
    if result.candidate is not None:
        (out / "candidate.toml").write_text(f"# {result.rule}\n{result.candidate.to_toml()}")
    else:  # a candidate of an earlier rule must not be promoted
        (out / "candidate.toml").unlink(missing_ok=True)
