"""Sweeps: axes over configuration, prompt and seed, made into cells and from cells into a table.

Everything is checked before anything is drawn. What was drawn stays in the cells: a sweep that was stopped goes on
where it was, a longer one draws only what is new, and the table can always be made again.
"""

import difflib
import itertools
import json
import math
import os
import pkgutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object

from .cells import FOLDER, Cell, Cells, OnProgress
from .config import ConfigError, GenerationConfig, ModelRef, Record, RefinerConfig, RuntimeProfile
from .engine import Engine
from .images import canonical
from .metrics import Metric, find
from .models import placement

OUT = Path("runs/sweeps")
LIMIT = 10_000
NONE = "none"  # TOML has no null
NULLABLE = ("refiner", "guidance_interval", "original_size", "target_size", "negative_prompt")
EXAMPLE = 'scheduler = ["euler", "dpmpp_2m"]'

PAIRS = ("prompt", "seed")

Axes = Mapping[str, Sequence[Any]]


class SweepError(ValueError):
    """A sweep breaks a rule, or its results cannot be read."""


# --- one field of a configuration ----------------------------------------------------------------------------------


def field_names() -> list[str]:
    """Every field of the configuration, nested ones dotted: `refiner.handover`."""
    names = []
    for item in fields(GenerationConfig):
        names.append(item.name)
        nested = GenerationConfig.NESTED.get(item.name)
        names += [f"{item.name}.{inner.name}" for inner in fields(nested)] if nested else []  # type: ignore[arg-type]
    return names


def changed(config: GenerationConfig, name: str, value: Any) -> GenerationConfig:
    """The configuration with one field changed, a dotted name for a nested one.

    `value` may be plain, as TOML has it: lists for pairs, a table for the refiner, a name for the model, "none" for a
    field that may be left out. A field of the refiner brings one where there was none. Raises `ConfigError`.
    """
    if value == NONE and name in NULLABLE:
        value = None
    outer, _, inner = name.partition(".")
    if inner:
        whole = getattr(config, outer, None) or (RefinerConfig() if outer == "refiner" else None)
        if not isinstance(whole, Record):
            raise ConfigError(name, value, f"a field of the configuration: {', '.join(field_names())}", EXAMPLE)
        return config.with_(**{outer: whole.with_(**{inner: value})})
    if name == "model" and isinstance(value, str):
        value = ModelRef.named(value)
    elif name in GenerationConfig.NESTED and isinstance(value, Mapping):
        value = GenerationConfig.NESTED[name].from_dict(value)
    return config.with_(**{name: value})


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """TOML's nested tables as dotted names; a table that is a range or a whole record stays one."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and not _RANGE.issuperset(value):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


_RANGE = frozenset(("from", "to", "step", "count", "log"))


def spread(name: str, values: Any) -> list[Any]:
    """An axis's values: a list as it is, a table `{ from, to, step }` or `{ from, to, count }` with both ends."""
    if isinstance(values, Mapping):
        low, high = values.get("from"), values.get("to")
        numbers = [value for value in values.values() if isinstance(value, int | float) and math.isfinite(value)]
        keys = set(values)
        if len(numbers) != 3 or keys not in ({"from", "to", "step"}, {"from", "to", "count"}) or low > high:  # type: ignore[operator]
            raise SweepError(
                f"the range of {name} must have from, to, and step or count, the first not above the second; received "
                f"{dict(values)}. Example: {name} = {{ from = 10, to = 50, step = 10 }}"
            )
        return _range(low, high, values.get("step"), values.get("count"))
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | range):
        raise SweepError(f"the axis {name} must be a list of values; received {values!r}. Example: {EXAMPLE}")
    if not len(values):
        raise SweepError(f"the axis {name} must have at least one value; received none. Example: {EXAMPLE}")
    return list(values)


def _range(low: Any, high: Any, step: Any, count: Any) -> list[Any]:
    if count is not None:
        count = max(1, int(count))
        step = (high - low) / max(1, count - 1)
    elif step <= 0:
        raise SweepError(f"a range's step must be above zero; received {step}. Example: step = 5")
    else:
        count = math.floor((high - low) / step + 1e-9) + 1
    values = [low + index * step for index in range(min(count, LIMIT + 1))]
    whole = all(float(value).is_integer() for value in values) and isinstance(low, int) and isinstance(high, int)
    return [int(value) if whole else round(value, 12) for value in values]


# --- the sweep -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Cells, and beside each the axes' values it stands for. Built by `product` or `from_toml`."""

    name: str
    cells: tuple[Cell, ...]
    settings: tuple[dict[str, Any], ...]
    metrics: tuple[Metric, ...] = ()
    reference: GenerationConfig | None = None

    @classmethod
    def product(
        cls,
        config: GenerationConfig,
        axes: Axes,
        zipped: Sequence[Axes] = (),
        *,
        metrics: Sequence[Metric | str] = (),
        reference: GenerationConfig | None = None,
        name: str = "sweep",
        limit: int = LIMIT,
    ) -> "Sweep":
        """Every combination of the axes' values over `config`.

        An axis is `prompt` (needed), `seed` (default 0), `config` (whole configurations, or files of them) or any field
        of the configuration. The axes of one table of `zipped` go together, value by value. Where a combination has no
        refiner, the refiner's fields do not apply, and its doubles are left out. `reference` is the configuration whose
        pictures metrics like SSIM compare with. Raises `SweepError`, `ConfigError` or `MetricError`.
        """
        groups = _groups(axes, zipped)
        if not isinstance(limit, int) or limit < 1:
            raise SweepError(f"limit must be a whole number from 1; received {limit!r}. Example: limit = {LIMIT}")
        count = math.prod(len(next(iter(group.values()))) for group in groups)
        if count > limit:
            sizes = " x ".join(str(len(next(iter(group.values())))) for group in groups)
            raise SweepError(
                f"a sweep must have at most {limit} cells; received {sizes} = {count}. Take fewer values, zip axes "
                f"that belong together, or raise the limit. Example: limit = {count}"
            )
        found: dict[str, tuple[Cell, dict[str, Any]]] = {}
        for combination in _combinations(groups):
            cell, settings = _cell(config, combination)
            found.setdefault(canonical(settings), (cell, settings))
        chosen = tuple(metric if isinstance(metric, Metric) else named_metric(metric) for metric in metrics)
        for metric in chosen:
            if metric.needs_reference and reference is None:
                raise SweepError(
                    f"the metric {metric.name} must have a reference to compare with; received none. Example: "
                    "reference = { steps = 100 }"
                )
        cells, rows = zip(*found.values(), strict=True)
        return cls(name, cells, rows, chosen, reference)

    @classmethod
    def from_toml(cls, path: Path | str) -> "Sweep":
        """Read a sweep's file; `studies/` has examples. Files it names are relative to it."""
        path = Path(path)
        content = read_toml(path, {"name", "model", "config", "axes", "zip", "metrics", "clip", "reference", "limit"})
        config = base_config(content, path.parent)
        reference = None
        if "reference" in content:
            reference = _overlaid(config, content["reference"])
        metrics = content.get("metrics", [])
        if not isinstance(metrics, list):
            raise SweepError(f'metrics must be a list; received {metrics!r}. Example: metrics = ["clip_score"]')
        axes = flat_axes(content.get("axes", {}))
        zipped = [flat_axes(table) for table in content.get("zip", [])]
        for table in (axes, *zipped):
            if "config" in table:
                table["config"] = [path.parent / str(file) for file in spread("config", table["config"])]
        return cls.product(
            config,
            axes,
            zipped,
            metrics=[named_metric(metric, content.get("clip", "nano")) for metric in metrics],
            reference=reference,
            name=str(content.get("name", path.stem)),
            limit=content.get("limit", LIMIT),
        )


def read_toml(path: Path, known: set[str]) -> dict[str, Any]:
    """A TOML file with no key but those known; `SweepError` else."""
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} must be valid TOML: {error}. Example: [axes] {EXAMPLE}") from error
    unknown = sorted(set(content) - known)
    if unknown:
        raise SweepError(
            f"{path} must have no keys but {', '.join(sorted(known))}; received {unknown[0]!r}"
            f"{_near(unknown[0], known)}"
        )
    return content


def base_config(content: Mapping[str, Any], folder: Path) -> GenerationConfig:
    """What the file starts from: `config`, a file or a table of fields, over the starting values of `model`."""
    name = content.get("model", "nano")
    if not isinstance(name, str):
        raise SweepError(f"model must be a name, a folder or a hub id; received {name!r}. Example: nano")
    start = GenerationConfig.for_model(name)
    given = content.get("config", {})
    if isinstance(given, str):
        return GenerationConfig.from_toml(folder / given)
    return _overlaid(start, given)


def _overlaid(config: GenerationConfig, table: Any) -> GenerationConfig:
    if not isinstance(table, Mapping):
        raise SweepError(f"config must be a file or a table of fields; received {table!r}. Example: config.steps = 20")
    for name, value in flat(table).items():
        check_axis(name, ())
        config = changed(config, name, value)
    return config


def flat_axes(table: Any) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise SweepError(f"axes must be a table; received {table!r}. Example: [axes] {EXAMPLE}")
    return flat(table)


def named_metric(name: str, clip: str = "nano") -> Metric:
    """A metric by its name, or one of yours as `module:attribute`. Raises `MetricError` or `SweepError`."""
    if not isinstance(name, str) or ":" not in name:
        return find(name, clip)
    try:
        metric = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SweepError(
            f"a metric of yours must be an importable module:attribute; received {name!r} ({error}). Example: "
            "studies.scenes:scene_right"
        ) from error
    if not isinstance(metric, Metric):
        raise SweepError(f"{name} must be a Metric; received a {type(metric).__name__}. Example: studies.scenes:SCENE")
    return metric


def _groups(axes: Axes, zipped: Sequence[Axes]) -> list[dict[str, list[Any]]]:
    """The axes as groups that go together: each of `axes` alone, each table of `zipped` as one."""
    groups = [{name: _axis(name, values)} for name, values in axes.items()]
    for table in zipped:
        group = {name: _axis(name, values) for name, values in flat_axes(table).items()}
        lengths = {name: len(values) for name, values in group.items()}
        if not group or len(set(lengths.values())) > 1:
            raise SweepError(
                f"axes that are zipped must have as many values each; received {lengths}. Example: "
                'scheduler = ["euler", "heun"], steps = [20, 10]'
            )
        groups.append(group)
    names = [name for group in groups for name in group]
    for name in names:
        check_axis(name, ("prompt", "seed", "config"))
        if names.count(name) > 1:
            raise SweepError(f"an axis must be given once; received {name!r} {names.count(name)} times")
    if "prompt" not in names:
        raise SweepError('a sweep must have prompts; received none. Example: prompt = ["A cat in a hat"]')
    return groups


def _axis(name: str, values: Any) -> list[Any]:
    """An axis's values; those of `config` read, each with the name that the table shows."""
    found = spread(name, values)
    if name != "config":
        return found
    return [
        (value.digest, value)
        if isinstance(value, GenerationConfig)
        else (_short(value), GenerationConfig.from_toml(value))
        for value in found
    ]


def check_axis(name: str, more: tuple[str, ...]) -> None:
    known = [*more, *field_names()]
    if name not in known:
        raise SweepError(
            f"an axis must be {', '.join(more) + ' or ' if more else ''}a field of the configuration "
            f"({', '.join(field_names())}); received {name!r}{_near(name, known)}"
        )


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f". Did you mean {close[0]}?" if close else f". Example: {EXAMPLE}"


def _combinations(groups: list[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    choices = [[dict(zip(group, values, strict=True)) for values in zip(*group.values())] for group in groups]  # noqa: B905
    for parts in itertools.product(*choices):
        yield {name: value for part in parts for name, value in part.items()}


def _cell(config: GenerationConfig, combination: Mapping[str, Any]) -> tuple[Cell, dict[str, Any]]:
    """The cell, and its settings as the table shows them. A whole configuration goes first, then whole records, then
    their fields, which do not apply where the record was taken out."""
    settings = dict(combination)
    prompt, seed = settings["prompt"], settings.setdefault("seed", 0)
    order = sorted(settings.keys() - {"prompt", "seed"}, key=lambda name: (name != "config", name.count(".")))
    for name in order:
        value = settings[name]
        if name == "config":
            settings[name], config = value
            continue
        outer = name.partition(".")[0]
        if outer != name and outer in settings and getattr(config, outer) is None:
            settings[name] = None
            continue
        config = changed(config, name, value)
        settings[name] = _shown(value, name)
    return Cell(config, prompt, seed), settings


def _short(path: Any) -> str:
    """A configuration's file by a name that tells it from others: `nano/config` for `promoted/nano/config.toml`."""
    path = Path(path)
    return f"{path.resolve().parent.name}/{path.stem}" if path.stem == "config" else path.stem


def _shown(value: Any, name: str) -> Any:
    if value is None or (value == NONE and name in NULLABLE):
        return None
    if isinstance(value, Record):
        return canonical(value.to_dict())
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else value


# --- running it ----------------------------------------------------------------------------------------------------


def run(
    sweep: Sweep,
    *,
    out: Path | str | None = None,
    cells: Path | str = FOLDER,
    profile: RuntimeProfile | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress | None = None,
) -> pd.DataFrame:
    """Draw and measure what is missing, and give the table: one row a cell, also written to `out/table.parquet`.

    Columns: the axes, `prompt`, `seed`, `digest`, `settings` (the whole configuration as JSON), the metrics,
    `unet_calls`, `unet_rows`, `seconds` (denoising, shared with its batch), `picture` (the cell's key) and `error` (why
    there is no picture or no number).

    Under `accelerate launch` every process draws its share, and each gives the whole table: that of one process, but
    for a sample here and there that rounds to the next of its 256 values. An interrupt raises `KeyboardInterrupt` and
    leaves what is finished; run it again to go on.
    """
    profile = engine.profile if engine else profile or RuntimeProfile()
    group = processes(profile)
    if engine is None:
        profile = on_own_device(profile, group)
    with Cells(cells, profile, engine) as store:
        keys = {store.key(cell): cell for cell in sweep.cells}
        # In the order of their keys, which is as good as shuffled: every process gets easy and hard ones alike.
        shares = sorted(keys) if group.num_processes > 1 else list(keys)
        with group.split_between_processes(shares) as mine:
            errors = store.complete([keys[key] for key in mine], sweep.metrics, sweep.reference, on_progress)
        if group.num_processes > 1:
            errors = {key: error for part in gather_object([errors]) for key, error in part.items()}
            _check_shared(store, keys, errors)
        table = _table(sweep, store, errors)
    if group.is_main_process:
        write_table(table, Path(out or OUT / sweep.name) / "table.parquet")
    return table


def _check_shared(store: Cells, keys: Iterable[str], errors: Mapping[str, str]) -> None:
    """Machines that each draw into a folder of their own would give a table with holes."""
    lost = [key for key in keys if key not in store and key not in errors]
    if lost:
        raise SweepError(
            f"all processes of a sweep must draw into one folder that every machine sees; {store.folder} lacks "
            f"{len(lost)} cells that others drew. Example: --cells /mnt/shared/cells"
        )


def processes(profile: RuntimeProfile) -> PartialState:
    """This process among those of `accelerate launch`; alone without it. Nobody gives up waiting for a slower one."""
    on_cpu = placement(profile)[0].type == "cpu"
    return (
        PartialState(cpu=on_cpu, timeout=timedelta(days=30)) if "LOCAL_RANK" in os.environ else PartialState(cpu=on_cpu)
    )


def on_own_device(profile: RuntimeProfile, group: PartialState) -> RuntimeProfile:
    """Each of many processes on the GPU that is its own."""
    if group.num_processes == 1 or group.device.type != "cuda":
        return profile
    return profile.with_(device=f"cuda:{group.local_process_index}")


def _table(sweep: Sweep, store: Cells, errors: Mapping[str, str]) -> pd.DataFrame:
    rows = []
    for cell, settings in zip(sweep.cells, sweep.settings, strict=True):
        key = store.key(cell)
        row = settings | {"prompt": cell.prompt, "seed": cell.seed, "digest": cell.config.digest}
        row |= {"settings": canonical(cell.config.to_dict())} | {metric.name: math.nan for metric in sweep.metrics}
        row |= {"unet_calls": math.nan, "unet_rows": math.nan, "seconds": math.nan}
        if key in store:
            reference = store.key(Cell(sweep.reference, cell.prompt, cell.seed)) if sweep.reference else None
            row |= store.costs(key) | store.values(key, sweep.metrics, reference)
        rows.append(row | {"picture": key if key in store else None, "error": errors.get(key)})
    return pd.DataFrame(rows).astype({"picture": "str", "error": "str"})


def summary(sweep: Sweep, table: pd.DataFrame) -> pd.DataFrame:
    """The mean over prompts and seeds for every other combination of the axes."""
    axes = [name for name in dict.fromkeys(name for row in sweep.settings for name in row) if name not in PAIRS]
    numbers = [*dict.fromkeys([*(metric.name for metric in sweep.metrics), "unet_rows"])]
    groups = table.groupby(axes, dropna=False, sort=False) if axes else table.groupby(lambda _: "all")
    return groups[numbers].mean().assign(cells=groups.size())


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    table.to_parquet(beside)
    beside.replace(path)


def read_table(path: Path | str) -> pd.DataFrame:
    """A sweep's or a study's table, from its file or the folder that holds it. Raises `SweepError`."""
    path = Path(path)
    path = path / "table.parquet" if path.is_dir() else path
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise SweepError(
            f"{path} must be a table that a sweep wrote; {type(error).__name__}: {error}. Nothing is lost: run the "
            "sweep again, and it is made from the cells without drawing. Example: python -m sdxl_lab sweep FILE.toml"
        ) from error
