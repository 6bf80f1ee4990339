"""What a sweep varies and a study searches: fields of the configuration by name, their values as TOML spells them.

Also what the files of both have in common: what they start from, and metrics by name.
"""

import math
import pkgutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.declaration import nearest
from sdxl_lab.evaluation.metrics import Metric, find_metric

LIMIT = 10_000  # cells
LONGEST = 1_000_000  # values of a range
EXAMPLE = 'scheduler = ["euler", "dpmpp_2m"]'
RANGE = frozenset(("from", "to", "step", "count", "log"))  # the keys of a table that is a range


class SweepError(ValueError):
    """A sweep or a study breaks a rule, or its results cannot be read."""


def check_axis(name: str, more: Sequence[str] = ()) -> None:
    """`SweepError` for a name that is no setting of the configuration, and none of `more`."""
    settings = list(GenerationConfig.settings())
    try:
        known = name in more or bool(GenerationConfig.setting(name))
    except ConfigError:
        known = False
    if not known:
        near = nearest(name, (*more, *settings))
        raise SweepError(
            f"an axis must be {', '.join(more) + ' or ' if more else ''}a field of the configuration "
            f"({', '.join(settings)}); received {name!r}{_hint(near)}"
        )


def _hint(near: str | None) -> str:
    return f". Did you mean {near}?" if near else f". Example: {EXAMPLE}"


# --- their values --------------------------------------------------------------------------------------------------


def flattened(table: Any, prefix: str = "") -> dict[str, Any]:
    """TOML's nested tables as dotted names; a table that is a range or a whole record stays one."""
    if not isinstance(table, Mapping):
        raise SweepError(f"axes must be a table; received {table!r}. Example: [axes] {EXAMPLE}")
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and not RANGE.issuperset(value):
            found |= flattened(value, f"{prefix}{name}.")
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
            f"{_hint(nearest(unknown[0], known))}"
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
    values = flattened(table)
    for name in values:
        check_axis(name)
    return config.changed(values)


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
