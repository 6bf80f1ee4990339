"""Rounds, medians, reports and plots for every benchmark."""

import json
import os
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sdxl_lab.environment import processor
from sdxl_lab.research.plots import COLOURS, STYLE
from sdxl_lab.research.sheet import INK

RESULTS = Path(__file__).parent / "results"
Measurement = Callable[[], float]


def alternate(measurements: Mapping[str, Measurement], rounds: int) -> dict[str, list[float]]:
    """Each measurement once a round, in turns, so that a slow minute of the machine affects all alike. The first round
    warms caches and is not counted."""
    measured: dict[str, list[float]] = {name: [] for name in measurements}
    for number in range(rounds + 1):
        for name, measure in measurements.items():
            value = measure()
            if number:
                measured[name].append(value)
    return measured


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios round by round, so that both numbers come from the same minutes."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclass(frozen=True)
class Report:
    """The values of a benchmark: a line is a label and its value in every round. `aims` are the targets, `wrong` lists
    violations, and `more` is kept with the rest for a plot."""

    name: str
    title: str
    lines: Mapping[str, Sequence[float]]
    conditions: str
    aims: Mapping[str, str] = field(default_factory=dict)
    wrong: Sequence[str] = ()
    more: Mapping[str, object] = field(default_factory=dict)

    def show(self, folder: Path) -> None:
        """`write`, and draw each line as a bar."""
        self.write(folder)
        labels = list(self.lines)[::-1]
        middles, lows, highs = zip(*(summary(self.lines[label]) for label in labels), strict=True)
        spread = [np.subtract(middles, lows), np.subtract(highs, middles)]
        with plot(folder / f"{self.name}.png", self.title, (9, 0.8 + 0.42 * len(labels))) as (axes,):
            bars = axes.barh(labels, middles, xerr=spread, color=COLOURS[0], ecolor=INK, capsize=3)
            axes.bar_label(bars, [shown(middle) for middle in middles], padding=6)
            axes.margins(x=0.15)
            axes.grid(axis="y", visible=False)

    def write(self, folder: Path) -> None:
        """Print the table and what went wrong, and write both as JSON."""
        print(f"\n{self.title}\n{self.conditions}")
        print(f"{'':44} {'median':>10} {'lowest':>10} {'highest':>10}")
        for label, values in self.lines.items():
            cells = " ".join(f"{shown(value):>10}" for value in summary(values))
            print(f"{label:44} {cells}{f'   aim: {self.aims[label]}' if label in self.aims else ''}")
        for each in self.wrong[:20]:
            print(f"wrong: {each}")
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "title": self.title,
            "conditions": self.conditions,
            "machine": f"{os.cpu_count()} cores, {processor()}",
            "aims": dict(self.aims),
            "values": {label: list(values) for label, values in self.lines.items()},
            "wrong": list(self.wrong[:100]),
            **self.more,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(content) + "\n")


def figures(folder: Path = RESULTS) -> str:
    """Every report in a folder as Markdown, for the part "figures" of README.md."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if "values" not in report:  # `scaling` has its own section
            continue
        heading = textwrap.fill(f"**{path.stem}**: {report['title']}. Conditions: {report['conditions']}.", 120)
        rows = [heading, "", "| figure | median | lowest to highest | aim |", "| --- | --- | --- | --- |"]
        for label, values in report["values"].items():
            middle, low, high = map(shown, summary(values))
            spread = f"{low} to {high}" if len(values) > 1 else ""
            rows.append(f"| {label} | {middle} | {spread} | {report['aims'].get(label, '')} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest, highest."""
    return statistics.median(values), min(values), max(values)


def shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@contextmanager
def plot(
    path: Path, title: str, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> Iterator[tuple[Axes, ...]]:
    """The axes of a figure of `size` inches, row by row, in the lab's style. The figure is saved at the end."""
    with mpl.rc_context(STYLE | {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8}):
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        yield tuple(figure.subplots(rows, columns, squeeze=False).flat)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
