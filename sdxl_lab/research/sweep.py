"""Sweeps: axes over configuration, prompt and seed give cells, and drawn cells give a table.

Everything is checked before anything is drawn. Images stay in the cache: a sweep that was stopped continues where it
was, a longer one draws only what is new, and the table can always be made again.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object

from sdxl_lab.config import GenerationConfig, RuntimeProfile, canonical
from sdxl_lab.declaration import NONE, Declared, left_out
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.lora_files import pinned
from sdxl_lab.diffusion.models import placement
from sdxl_lab.evaluation.metrics import Metric
from sdxl_lab.research.axes import (
    LIMIT,
    SweepError,
    base_config,
    check_axis,
    flattened,
    named_metric,
    overlaid,
    read_toml,
    spread,
)
from sdxl_lab.research.cache import FOLDER, Cell, ImageCache, OnProgress

OUT = Path("runs/sweeps")
PAIRS = ("prompt", "seed")

Axes = Mapping[str, Sequence[Any]]


# --- the sweep -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Cells, each with its values of the axes. Built by `product` or `from_toml`."""

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

        An axis is `prompt` (required), `prompt_2`, `seed` (default 0), `config` (whole configurations, or files of
        them) or any field of the configuration. The axes of one table in `zipped` advance together, value by value. The
        refiner's fields do not apply to a combination without a refiner, and duplicates that this leaves are dropped.
        `reference` is the configuration whose images metrics like SSIM compare with. Raises `SweepError`, `ConfigError`
        or `MetricError`.
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
        known = {"name", "model", "config", "axes", "zip", "metrics", "clip", "reference", "limit"}
        content = read_toml(path, known, "sweep")
        config = base_config(content, path.parent)
        reference = None
        if "reference" in content:
            reference = overlaid(config, content["reference"])
        metrics = content.get("metrics", [])
        if not isinstance(metrics, list):
            raise SweepError(f'metrics must be a list; received {metrics!r}. Example: metrics = ["clip_score"]')
        axes = flattened(content.get("axes", {}))
        zipped = [flattened(table) for table in content.get("zip", [])]
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


def _groups(axes: Axes, zipped: Sequence[Axes]) -> list[dict[str, list[Any]]]:
    """Groups of axes that advance together: each of `axes` alone, each table of `zipped` as one."""
    groups = [{name: _axis(name, values)} for name, values in axes.items()]
    for table in zipped:
        group = {name: _axis(name, values) for name, values in flattened(table).items()}
        lengths = {name: len(values) for name, values in group.items()}
        if not group or len(set(lengths.values())) > 1:
            raise SweepError(
                f"axes that are zipped must have as many values each; received {lengths}. Example: "
                'scheduler = ["euler", "heun"], steps = [20, 10]'
            )
        groups.append(group)
    names = [name for group in groups for name in group]
    for name in names:
        check_axis(name, ("prompt", "prompt_2", "seed", "config"))
        if names.count(name) > 1:
            raise SweepError(f"an axis must be given once; received {name!r} {names.count(name)} times")
    if "prompt" not in names:
        raise SweepError('a sweep must have prompts; received none. Example: prompt = ["A cat in a hat"]')
    return groups


def _axis(name: str, values: Any) -> list[Any]:
    """An axis's values. Those of `config` are read from their files, each with the name that the table shows."""
    found = spread(name, values)
    if name != "config":
        return found
    return [
        (value.short_digest, value)
        if isinstance(value, GenerationConfig)
        else (_file_label(value), GenerationConfig.from_toml(value))
        for value in found
    ]


def _combinations(groups: list[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    choices = [[dict(zip(group, values, strict=True)) for values in zip(*group.values())] for group in groups]  # noqa: B905
    for parts in itertools.product(*choices):
        yield {name: value for part in parts for name, value in part.items()}


def _cell(config: GenerationConfig, combination: Mapping[str, Any]) -> tuple[Cell, dict[str, Any]]:
    """The cell, and its settings as the table shows them. Fields change a whole configuration; the fields of a nested
    record do not apply where the record is none."""
    settings = dict(combination)
    prompt, seed = settings["prompt"], settings.setdefault("seed", 0)
    if settings.get("prompt_2") == NONE:
        settings["prompt_2"] = None
    if "config" in settings:
        settings["config"], config = settings["config"]
    values = {name: value for name, value in settings.items() if name not in ("config", "prompt_2", *PAIRS)}
    for name in list(values):
        outer = name.partition(".")[0]
        if outer != name and outer in values and left_out(values[outer]):
            del values[name]
            settings[name] = None
        else:
            settings[name] = _shown(values[name], name)
    return Cell(pinned(config.changed(values)), prompt, seed, settings.get("prompt_2")), settings


def _file_label(path: Any) -> str:
    """A short name of a configuration's file: `nano/config` for `promoted/nano/config.toml`."""
    path = Path(path)
    return f"{path.resolve().parent.name}/{path.stem}" if path.stem == "config" else path.stem


def _shown(value: Any, name: str) -> Any:
    if value is None or (value == NONE and GenerationConfig.setting(name).optional):
        return None
    if isinstance(value, Declared):
        return canonical(value.to_dict())
    if isinstance(value, list | tuple):
        value = [each.to_dict() if isinstance(each, Declared) else each for each in value]
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else value


# --- running it ----------------------------------------------------------------------------------------------------


def run_sweep(
    sweep: Sweep,
    *,
    out: Path | str | None = None,
    cache: Path | str = FOLDER,
    profile: RuntimeProfile | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress | None = None,
) -> pd.DataFrame:
    """Draw and measure what is missing, and return the table: one row a cell, also written to `out/table.parquet`.

    Columns: the axes, `prompt`, `seed`, `digest`, `settings` (the whole configuration as JSON), the metrics,
    `unet_calls`, `unet_rows`, `seconds` (denoising, shared with its batch), `image` (the cell's key), `error` (why
    there is no image or no number) and `warning` (which words of its texts were cut).

    Under `accelerate launch` every process draws its share and returns the whole table. It equals that of one process,
    but for single samples that round to a neighbouring one of their 256 values. An interrupt raises
    `KeyboardInterrupt` and keeps what is finished; run the sweep again to continue.
    """
    group, profile = processes(profile, engine)
    with ImageCache(cache, profile, engine) as cached:
        keys = {cached.key(cell): cell for cell in sweep.cells}
        # The order of the keys is as good as random, so that every process gets cheap and expensive cells.
        shares = sorted(keys) if group.num_processes > 1 else list(keys)
        with group.split_between_processes(shares) as mine:
            errors = cached.complete([keys[key] for key in mine], sweep.metrics, sweep.reference, on_progress)
        if group.num_processes > 1:
            errors = {key: error for part in gather_object([errors]) for key, error in part.items()}
            _check_shared(cached, keys, errors)
        table = _table(sweep, cached, errors)
    if group.is_main_process:
        write_table(table, Path(out or OUT / sweep.name) / "table.parquet")
    return table


def _check_shared(cached: ImageCache, keys: Iterable[str], errors: Mapping[str, str]) -> None:
    """Refuse machines that draw into separate folders, whose table would have holes."""
    lost = [key for key in keys if key not in cached and key not in errors]
    if lost:
        raise SweepError(
            f"all processes of a sweep must draw into one folder that every machine sees; {cached.folder} lacks "
            f"{len(lost)} cells that others drew. Example: --cache /mnt/shared/cache"
        )


def processes(profile: RuntimeProfile | None, engine: Engine | None) -> tuple[PartialState, RuntimeProfile]:
    """This process among those of `accelerate launch`, and the profile that it draws with: the engine's, or one with
    this process's own GPU. Processes wait for slower ones without a time limit."""
    profile = engine.profile if engine else profile or RuntimeProfile()
    waiting = {"timeout": timedelta(days=30)} if "LOCAL_RANK" in os.environ else {}
    group = PartialState(cpu=placement(profile)[0].type == "cpu", **waiting)
    if engine is None and group.num_processes > 1 and group.device.type == "cuda":
        profile = profile.with_(device=f"cuda:{group.local_process_index}")
    return group, profile


def _table(sweep: Sweep, cached: ImageCache, errors: Mapping[str, str]) -> pd.DataFrame:
    rows = []
    for cell, settings in zip(sweep.cells, sweep.settings, strict=True):
        key = cached.key(cell)
        row = settings | {"prompt": cell.prompt, "seed": cell.seed, "digest": cell.config.digest}
        row |= {"settings": canonical(cell.config.to_dict())} | {metric.name: math.nan for metric in sweep.metrics}
        row |= {"unet_calls": math.nan, "unet_rows": math.nan, "seconds": math.nan}
        if key in cached:
            reference = cached.key(replace(cell, config=sweep.reference)) if sweep.reference else None
            row |= cached.costs(key) | cached.values(key, sweep.metrics, reference)
        told = {"image": key if key in cached else None, "error": errors.get(key), "warning": cached.warning(key)}
        rows.append(row | told)
    return pd.DataFrame(rows).astype(dict.fromkeys(("image", "error", "warning"), "str"))


def summary(sweep: Sweep, table: pd.DataFrame) -> pd.DataFrame:
    """The mean over prompts and seeds for every combination of the other axes."""
    axes = [name for name in dict.fromkeys(name for row in sweep.settings for name in row) if name not in PAIRS]
    numbers = [*dict.fromkeys([*(metric.name for metric in sweep.metrics), "unet_rows"])]
    groups = table.groupby(axes, dropna=False, sort=False) if axes else table.groupby(lambda _: "all")
    return groups[numbers].mean().assign(cells=groups.size())


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the table whole or not at all."""
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
            "sweep again, and it is made from the cache without drawing. Example: python -m sdxl_lab sweep FILE.toml"
        ) from error
