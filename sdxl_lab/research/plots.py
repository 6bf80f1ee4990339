"""Plots of a sweep's table: labelled grids of images, quality against cost, curves.

The table has one row an image: its settings, `prompt`, `seed`, numbers, and `image`, the key by which `images` returns
it. Every plot is an image at twice the size at which a README shows it. Its colours can be told apart by the
colour-blind (Okabe and Ito 2008), and every line has a mark of its own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import cycle, product
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image, ImageDraw

from sdxl_lab.evaluation.metrics import METRICS
from sdxl_lab.evaluation.statistics import Interval, interval
from sdxl_lab.images import GeneratedImage
from sdxl_lab.research.sheet import FAINT, GAP, INK, PALE, Axis, Grid, fitted, page, typeface

LABEL = 26
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#555555")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")

Images = Callable[[str], GeneratedImage]
Place = tuple[Any, Any, Any]  # a grid's value, its row and its column
T = TypeVar("T")
PAIR = ["prompt", "seed"]


class PlotError(ValueError):
    """A table lacks what a plot should show, or has several values for one place."""


# --- labels --------------------------------------------------------------------------------------------------------


NAMES = {"clip_score": "CLIP score", "ssim": "SSIM", "psnr": "PSNR (dB)", "seconds": "seconds an image"}


def column_label(column: str) -> str:
    """A column's name for people: `refiner.handover` is "refiner handover"."""
    return NAMES.get(column, column.replace(".", " ").replace("_", " ").replace("unet", "UNet"))


def value_label(value: Any) -> str:
    """A table's value for people: "none" for a missing one, `0.28 to 5.42` for a pair."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "none"
    if isinstance(value, str) and value.startswith(("[", "{")):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list | tuple):
        return " to ".join(value_label(each) for each in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{column_label(name)} {value_label(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- tables --------------------------------------------------------------------------------------------------------


def _need(table: pd.DataFrame, *columns: str) -> None:
    for column in columns:
        if column not in table.columns:
            raise PlotError(
                f"a plot must be of the table's columns ({', '.join(map(str, table.columns))}); received {column!r}"
            )
    if table.empty:
        raise PlotError("a plot must have at least one row; received an empty table")


def _values(table: pd.DataFrame, column: str) -> list[Any]:
    """A column's distinct values: a missing one first, then numbers by size, others in their order."""
    found = [None if pd.isna(value) else value for value in table[column].unique()]
    kept = [value for value in found if value is not None]
    numbers = all(isinstance(value, int | float | np.number) for value in kept)
    return ([None] if None in found else []) + (sorted(kept) if numbers else kept)


def _where(table: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    for column, value in settings.items():
        table = table[table[column].isna() if value is None else table[column] == value]
    return table


# --- grids ---------------------------------------------------------------------------------------------------------


def grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Images of one size in rows of `columns` (default: one row), each under its label."""
    if len(images) != len(labels) or not images:
        raise PlotError(f"a grid must have one label an image; received {len(images)} images, {len(labels)} labels")
    columns = columns or len(images)
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + LABEL + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), typeface(13)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = GAP + index % columns * (width + GAP), GAP + index // columns * (height + LABEL + GAP)
        pen.text((x, y + 4), fitted(label, width, font), fill=INK, font=font)
        sheet.paste(image, (x, y + LABEL))
    return sheet


def image_grid(
    table: pd.DataFrame,
    images: Images,
    across: str,
    down: str | None = None,
    panels: str | None = None,
    *,
    notes: Sequence[str] = (),
    side: int = 192,
    width: int = 1800,
) -> Image.Image:
    """Images along two or three axes: one grid for each value of `panels`, as many beside one another as fit into
    `width` pixels. An axis is any column: a setting, `prompt` or `seed`. Without `down` there is one row.

    The title is the prompt and the seed that all images share; the numbers named in `notes` are under each image. An
    image is scaled down where a side is longer than `side`. A cell that failed shows the reason, and one that is not in
    the table stays empty. Raises `PlotError` for a missing column, and where the axes leave several images in one
    place.
    """
    axes = (panels, down, across)
    _need(table, *filter(None, axes), "image", *notes)
    sheets, rows, columns = (_values(table, axis) if axis else [None] for axis in axes)
    cells = {place: _cell(table, axes, place, images, side) for place in product(sheets, rows, columns)}
    size = next((cell.size for cell in cells.values() if isinstance(cell, Image.Image)), (side, side))
    below = {place: _notes(table, axes, place, notes, size[0]) for place in cells}
    layout = Grid(size, _axis(across, columns), _axis(down, rows) if down else None, max(map(len, below.values())))
    drawn = [
        layout.draw(
            f"{column_label(panels)}: {value_label(sheet)}" if panels else "", _of(cells, sheet), _of(below, sheet)
        )
        for sheet in sheets
    ]
    return page(_shared(table, axes), drawn, width)


def _axis(column: str, values: Sequence[Any]) -> Axis:
    return Axis(column_label(column), values, [value_label(value) for value in values])


def _of(places: Mapping[Place, T], sheet: Any) -> dict[tuple[Any, Any], T]:
    return {(row, column): what for (at, row, column), what in places.items() if at == sheet}


def _at(table: pd.DataFrame, axes: Sequence[str | None], place: Place) -> tuple[dict[str, Any], pd.DataFrame]:
    """The settings of a place, and the table's rows with these settings."""
    settings = {axis: value for axis, value in zip(axes, place, strict=True) if axis is not None}
    return settings, _where(table, settings)


def _cell(
    table: pd.DataFrame, axes: Sequence[str | None], place: Place, images: Images, side: int
) -> Image.Image | str:
    """The image of a place, or the reason why there is none."""
    settings, found = _at(table, axes, place)
    if len(found) > 1:
        others = found.drop(columns=[*settings, "image"]).astype(str).nunique()
        raise PlotError(
            f"a grid must have one image a place; at {value_label(settings)} the table has {len(found)}, which differ "
            f"in {', '.join(others[others > 1].index)}. Make one of these the third axis, or keep one. Example: "
            "table[table.seed == 0]"
        )
    if found.empty:
        return ""
    row = found.iloc[0]
    if pd.isna(row["image"]):
        return str(row.get("error") or "failed")
    image = images(row["image"]).image.convert("RGB")
    if max(image.size) > side:
        scale = side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image


def _notes(
    table: pd.DataFrame, axes: Sequence[str | None], place: Place, notes: Sequence[str], width: int
) -> list[str]:
    """The numbers under an image, as many on a line as fit."""
    _, found = _at(table, axes, place)
    if not notes or found.empty or found.iloc[0][list(notes)].isna().any():
        return []
    values = [
        f"{found.iloc[0][note]:.3g} s" if note == "seconds" else f"{column_label(note)} {found.iloc[0][note]:.3g}"
        for note in notes
    ]
    together = ", ".join(values)
    font = typeface(12)
    return [together] if font.getlength(together) <= width else [fitted(value, width, font) for value in values]


def _shared(table: pd.DataFrame, axes: Sequence[str | None]) -> str:
    """The prompt and the seed that all images share."""
    parts = []
    for name, form in (("prompt", "“{}”"), ("seed", "seed {}")):
        if name in table and name not in axes and table[name].nunique() == 1:
            parts.append(form.format(table[name].iloc[0]))
    return ", ".join(parts)


# --- curves --------------------------------------------------------------------------------------------------------

DOTS = 160  # an inch
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": PALE,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def _painted(size: tuple[float, float], columns: int, paint: Callable[[Figure, list[Axes]], None]) -> Image.Image:
    """A figure of `size` inches with its axes side by side, as an image. matplotlib's global state is not changed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DOTS, layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        paint(figure, list(axes))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


def _sure(values: np.ndarray, prompts: Sequence[str]) -> Interval:
    """The interval over prompts, or over seeds for a single prompt; a single value is its own interval."""
    if len(values) < 2:
        mean = float(values.mean()) if len(values) else float("nan")
        return Interval(mean, mean, mean, len(values))
    return interval(values, by=prompts if len(set(prompts)) > 1 else None)


def front(
    table: pd.DataFrame,
    by: Sequence[str],
    quality: str = "clip_score",
    cost: str = "seconds",
    better: str | None = None,
) -> pd.DataFrame:
    """What `quality_against_cost` shows: a row for each combination of the columns `by`, cheapest first.

    Columns: `by`, `quality` (the mean), `low`, `high`, `cost` (the median, which ignores a slow moment of the machine),
    `count`, `front` (whether no other combination is as good for less, or better for the same) and `worse` (whether it
    is significantly worse than the best: the interval of the paired difference excludes zero). `better` is "higher" or
    "lower", by default the metric's own direction.

    Only prompts and seeds that every combination has are counted; a combination without images is left out. The 95 %
    interval is the one within pairs (Cousineau 2005, corrected by Morey 2008), which removes the spread between prompts
    and seeds. Raises `PlotError`.
    """
    _need(table, *by, quality, cost, *PAIR)
    up = _better(quality, better) == "higher"
    there = table.dropna(subset=[quality, cost])
    groups = [
        (settings, found.set_index(PAIR))
        for settings in product(*(_values(table, name) for name in by))
        if len(found := _where(there, dict(zip(by, settings, strict=True))))
    ]
    for settings, found in groups:
        if not found.index.is_unique:
            raise PlotError(_several(", ".join(by), ", ".join(map(value_label, settings))))
    common = groups[0][1].index if groups else pd.Index([])
    for _, found in groups:
        common = common.intersection(found.index)
    if common.empty:
        raise PlotError(
            f"a plot must have a prompt and seed with {quality} and {cost} for every {', '.join(by)}; received none"
        )
    values = np.array([found.loc[common, quality] for _, found in groups], dtype=np.float64)
    within = values - values.mean(axis=0) + values.mean()
    spread = (len(values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else 1.0
    prompts, means = list(common.get_level_values("prompt")), values.mean(axis=1)
    best = values[means.argmax() if up else means.argmin()]
    rows: list[list[Any]] = []
    for (settings, found), each, steadied in zip(groups, values, within if len(values) > 1 else values, strict=True):
        mean, sure = float(each.mean()), _sure(steadied, prompts)
        ends = [mean + (end - sure.mean) * spread for end in (sure.low, sure.high)]
        worse = len(common) > 1 and _sure(each - best, prompts).decided
        rows.append([*settings, mean, *ends, float(found.loc[common, cost].median()), len(common), worse])
    result = pd.DataFrame(rows, columns=[*by, "quality", "low", "high", "cost", "count", "worse"])
    result = result.sort_values(["cost", "quality"], ascending=[True, not up], ignore_index=True)
    ranked = result["quality"] if up else -result["quality"]
    return result.assign(front=ranked > ranked.cummax().shift(fill_value=-np.inf))


def _better(metric: str, asked: str | None) -> str:
    return asked or (METRICS[metric].better if metric in METRICS else None) or "higher"


def _several(columns: str, values: str) -> str:
    return (
        f"a plot must have one image a prompt and seed at each {columns}; at {values} there are several. Name what "
        "they differ in as an axis, too, or keep one"
    )


def quality_against_cost(
    table: pd.DataFrame,
    series: str = "scheduler",
    along: str = "steps",
    quality: str = "clip_score",
    cost: str = "seconds",
    better: str | None = None,
) -> Image.Image:
    """The mean `quality` over prompts and seeds, with its 95 % interval within pairs, against `cost`.

    There is a line for each value of `series` and a point for each value of `along`. The Pareto front is the black
    line, and its points are labelled. Raises `PlotError`, as `front` does.
    """
    found = front(table, [series, along], quality, cost, better)
    up = _better(quality, better) == "higher"

    def paint(figure: Figure, axes: list[Axes]) -> None:
        (ax,) = axes
        for name, colour, mark in zip(_values(table, series), cycle(COLOURS), _marks(), strict=False):
            line = _where(found, {series: name}).sort_values(along)
            errors = [line["quality"] - line["low"], line["high"] - line["quality"]]
            ax.errorbar(line["cost"], line["quality"], errors, fmt="none", ecolor=colour, alpha=0.4, elinewidth=1.5)
            ax.plot(line["cost"], line["quality"], f"-{mark}", color=colour, label=value_label(name), lw=1.3, ms=6)
        best = found[found["front"]]
        ax.plot(best["cost"], best["quality"], color=INK, lw=2.2, alpha=0.85, label="Pareto front", zorder=4)
        ax.plot(best["cost"], best["quality"], "o", ms=12, mfc="none", mec=INK, mew=1.5, zorder=5)
        before, reach = -np.inf, np.ptp(found["cost"])
        low, high = ends = ax.get_xlim()
        for _, point in best.iterrows():
            above = up if point["cost"] - before > 0.25 * reach else not up  # keeps the labels of neighbours apart
            before = point["cost"] if above == up else -np.inf
            name = f"{value_label(point[series])}, {value_label(point[along])}"
            room = 0.024 * len(name) * (ends[1] - ends[0])
            low, high = (
                (min(low, point["cost"] - room), high) if above == up else (low, max(high, point["cost"] + room))
            )
            text = ax.annotate(
                name,
                (point["cost"], point["quality"]),
                xytext=(-9 if above == up else 9, 9 if above else -9),
                textcoords="offset points",
                ha="right" if above == up else "left",
                va="bottom" if above else "top",
                fontsize=9,
                fontweight="bold",
                zorder=6,
            )
            text.set_in_layout(False)
            text.set_path_effects([withStroke(linewidth=3, foreground="white", alpha=0.9)])
        ax.set(
            xlabel=column_label(cost),
            ylabel=column_label(quality),
            title=f"{column_label(quality)} against {column_label(cost)}",
        )
        ax.set_xticks([tick for tick in ax.get_xticks() if max(ends[0], 0) <= tick <= ends[1]])
        ax.set_xlim(low, high)
        figure.legend(
            *ax.get_legend_handles_labels(), loc="outside right upper", title=column_label(series), fontsize=9
        )

    return _painted((9.0, 5.0), 1, paint)


def _marks() -> Any:
    """A mark for each line, another one each time the colours repeat, so that no two lines look alike."""
    return (MARKS[(index + index // len(COLOURS)) % len(MARKS)] for index in range(len(MARKS) * len(COLOURS)))


def curves(
    table: pd.DataFrame,
    x: str,
    metrics: Sequence[str],
    series: str | None = None,
    *,
    baseline: pd.DataFrame | None = None,
    baseline_name: str = "base alone",
) -> Image.Image:
    """The mean of each metric along `x`, with a band for its 95 % interval over prompts and seeds: one plot for each
    metric, one line for each value of `series`.

    With `baseline`, a table of the same prompts and seeds, the curves show the paired difference from it beside a line
    at zero: a band that excludes zero is a difference. Rows without `x` are left out. Raises `PlotError`.
    """
    _need(table, x, *metrics, *([series] if series else []), *PAIR)
    table = table[table[x].notna()]
    names = _values(table, series) if series else [None]
    lines = {
        (metric, name): curve(table if series is None else _where(table, {series: name}), x, metric, baseline)
        for metric in metrics
        for name in names
    }

    def paint(figure: Figure, axes: list[Axes]) -> None:
        for ax, metric in zip(axes, metrics, strict=True):
            for name, colour, mark in zip(names, COLOURS, MARKS, strict=False):
                line = lines[metric, name]
                label = value_label(name) if series else None
                ax.fill_between(line[x], line["low"], line["high"], color=colour, alpha=0.15, lw=0)
                ax.plot(line[x], line["mean"], f"-{mark}", color=colour, lw=1.6, ms=5, label=label)
            if baseline is not None:
                ax.axhline(0, color=INK, lw=1, ls="--")
                ax.annotate(
                    baseline_name, (1, 0), xycoords=("axes fraction", "data"), xytext=(0, 3),
                    textcoords="offset points", ha="right", fontsize=8.5, color=FAINT,
                )  # fmt: skip
            ax.set(xlabel=column_label(x), title=column_label(metric))
            ax.margins(x=0.04, y=0.12)
        axes[0].set_ylabel(
            f"difference from {baseline_name}" if baseline is not None else "mean over prompts and seeds"
        )
        if series:
            handles = axes[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside right upper", title=column_label(series), fontsize=9)

    return _painted((max(5.5, 4.0 * len(metrics)), 3.9), len(metrics), paint)


def curve(table: pd.DataFrame, x: str, metric: str, baseline: pd.DataFrame | None = None) -> pd.DataFrame:
    """A line of `curves` as numbers: `x`, `mean`, `low`, `high`, `count`; with `baseline`, of the paired difference.

    Raises `PlotError` where a prompt and seed have several images at one `x`, or none in the baseline.
    """
    rows = []
    for value in _values(table, x):
        found = _where(table, {x: value})
        if found.duplicated(PAIR).any():
            raise PlotError(_several(x, value_label(value)))
        found = found.dropna(subset=[metric])
        values = found[metric].to_numpy() if baseline is None else _differences(found, baseline, metric)
        sure = _sure(values, list(found["prompt"]))
        rows.append([value, sure.mean, sure.low, sure.high, sure.count])
    return pd.DataFrame(rows, columns=[x, "mean", "low", "high", "count"])


def _differences(found: pd.DataFrame, baseline: pd.DataFrame, metric: str) -> np.ndarray:
    """The difference from the baseline's image of the same prompt and seed, row by row."""
    before = found[PAIR].merge(baseline[[*PAIR, metric]], on=PAIR, how="left", validate="m:1")[metric].to_numpy()
    if np.isnan(before).any():
        missing = found.iloc[int(np.flatnonzero(np.isnan(before))[0])]
        raise PlotError(
            f"the baseline must have {metric} for every prompt and seed; it lacks {missing['prompt']!r}, seed "
            f"{missing['seed']}"
        )
    differences: np.ndarray = found[metric].to_numpy() - before
    return differences
