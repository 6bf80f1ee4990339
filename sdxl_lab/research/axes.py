"""What a sweep varies and a study searches: fields of the configuration by name, their values as TOML spells them.

Also what the files of both have in common: what they start from, and metrics by name. Knows no cells and no tables.
"""

import difflib
import math
import pkgutil
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sdxl_lab.config import ConfigError, GenerationConfig, ModelRef, Record, RefinerConfig
from sdxl_lab.evaluation.metrics import Metric, find_metric

LIMIT = 10_000  # cells
LONGEST = 1_000_000  # values of a range
NONE = "none"  # TOML has no null
NULLABLE = ("refiner", "guidance_interval", "original_size", "target_size", "negative_prompt")
EXAMPLE = 'scheduler = ["euler", "dpmpp_2m"]'
RANGE = frozenset(("from", "to", "step", "count", "log"))  # the keys of a table that is a range


class SweepError(ValueError):
    """A sweep or a study breaks a rule, or its results cannot be read."""


# --- fields of a configuration -------------------------------------------------------------------------------------


def field_names() -> list[str]:
    """Every field of the configuration, nested ones dotted: `refiner.handover`."""
    names = []
    for item in fields(GenerationConfig):
        names.append(item.name)
        nested = GenerationConfig.NESTED.get(item.name)
        names += [f"{item.name}.{inner.name}" for inner in fields(nested)] if nested else []  # type: ignore[arg-type]
    return names


def changed(config: GenerationConfig, values: Mapping[str, Any]) -> GenerationConfig:
    """The configuration with some fields changed, all at once, a dotted name for a nested one.

    A value may be plain, as TOML has it: lists for pairs, a table for the refiner, a name for the model, "none" for a
    field that may be left out. A field of the refiner brings one where there was none. Raises `ConfigError`.
    """
    changes: dict[str, Any] = {}
    for name in sorted(values, key=lambda name: name.count(".")):
        value = None if values[name] == NONE and name in NULLABLE else values[name]
        outer, _, inner = name.partition(".")
        if inner:
            whole = changes.get(outer, getattr(config, outer, None))
            whole = RefinerConfig() if outer == "refiner" and whole is None else whole
            if not isinstance(whole, Record):
                raise ConfigError(name, value, f"a field of the configuration: {', '.join(field_names())}", EXAMPLE)
            changes[outer] = whole.with_(**{inner: value})
        elif name == "model" and isinstance(value, str):
            changes[name] = ModelRef.named(value)
        elif name in GenerationConfig.NESTED and isinstance(value, Mapping):
            changes[name] = GenerationConfig.NESTED[name].from_dict(value)
        else:
            changes[name] = value
    return config.with_(**changes)


def check_axis(name: str, more: Sequence[str] = ()) -> None:
    """`SweepError` for a name that is no field of the configuration, and none of `more`."""
    known = [*more, *field_names()]
    if name not in known:
        raise SweepError(
            f"an axis must be {', '.join(more) + ' or ' if more else ''}a field of the configuration "
            f"({', '.join(field_names())}); received {name!r}{_near(name, known)}"
        )


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f". Did you mean {close[0]}?" if close else f". Example: {EXAMPLE}"


# --- their values --------------------------------------------------------------------------------------------------


def flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """TOML's nested tables as dotted names; a table that is a range or a whole record stays one."""
    if not isinstance(table, Mapping):
        raise SweepError(f"axes must be a table; received {table!r}. Example: [axes] {EXAMPLE}")
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and not RANGE.issuperset(value):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


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
    if count > LONGEST:
        raise SweepError(f"a range must have at most {LONGEST} values; received {count}. Example: a larger step")
    values = [low + index * step for index in range(count)]
    whole = all(float(value).is_integer() for value in values) and isinstance(low, int) and isinstance(high, int)
    return [int(value) if whole else round(value, 12) for value in values]


# --- files ---------------------------------------------------------------------------------------------------------


def read_toml(path: Path, known: set[str], kind: str) -> dict[str, Any]:
    """The TOML file of a `kind` (a sweep, a study) with no key but those known; `SweepError` else."""
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} must be valid TOML: {error}. Example: [axes] {EXAMPLE}") from error
    unknown = sorted(set(content) - known)
    if unknown:
        raise SweepError(
            f"{path} must have no keys but those of a {kind}: {', '.join(sorted(known))}; received {unknown[0]!r}"
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
    return overlaid(start, given)


def overlaid(config: GenerationConfig, table: Any) -> GenerationConfig:
    """The configuration with a file's table of fields over it."""
    if not isinstance(table, Mapping):
        raise SweepError(f"config must be a file or a table of fields; received {table!r}. Example: config.steps = 20")
    values = flat(table)
    for name in values:
        check_axis(name)
    return changed(config, values)


def named_metric(name: str, clip: str = "nano") -> Metric:
    """A metric by its name, or one of yours as `module:attribute`. Raises `MetricError` or `SweepError`."""
    if not isinstance(name, str) or ":" not in name:
        return find_metric(name, clip)
    try:
        metric = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SweepError(
            f"a metric of yours must be an importable module:attribute; received {name!r} ({error}). Example: "
            "studies.scenes:scene_right"
        ) from error
    if not isinstance(metric, Metric):
        raise SweepError(
            f"{name} must be a Metric; received a {type(metric).__name__}. Example: studies.scenes:scene_right"
        )
    return metric
