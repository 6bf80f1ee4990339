"""Rounds, medians, tables, plots: what every benchmark here does with its figures. Knows nothing of pictures."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Trial = Callable[[], float]


def alternate(trials: Mapping[str, Trial], rounds: int) -> dict[str, list[float]]:
    """Each trial once a round, in turns, so that a slow minute of the machine hits all alike; the first round, which
    warms caches, is not counted."""
    measured: dict[str, list[float]] = {name: [] for name in trials}
    for number in range(rounds + 1):
        for name, trial in trials.items():
            value = trial()
            if number:
                measured[name].append(value)
    return measured


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round: both numbers of a ratio come from the same minutes."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclass(frozen=True)
class Report:
    """What was measured: a line is a label and its value in every round; `aims` says what was hoped for."""

    name: str
    title: str
    lines: Mapping[str, Sequence[float]]
    conditions: str
    aims: Mapping[str, str]

    def show(self, folder: Path = RESULTS) -> None:
        """Print the table, keep it as JSON and as a plot."""
        print(f"\n{self.title}\n{self.conditions}")
        print(f"{'':44} {'median':>10} {'lowest':>10} {'highest':>10}")
        for label, values in self.lines.items():
            middle, low, high = _summary(values)
            aim = f"   aim: {self.aims[label]}" if label in self.aims else ""
            print(f"{label:44} {middle:10.4g} {low:10.4g} {high:10.4g}{aim}")
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "title": self.title,
            "conditions": self.conditions,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "aims": dict(self.aims),
            "values": {label: list(values) for label, values in self.lines.items()},
        }
        (folder / f"{self.name}.json").write_text(json.dumps(content, indent=2) + "\n")
        self._plot(folder / f"{self.name}.png")

    def _plot(self, path: Path) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        labels = list(self.lines)[::-1]
        summaries = [_summary(self.lines[label]) for label in labels]
        figure, axes = plt.subplots(figsize=(9, 0.8 + 0.42 * len(labels)), layout="constrained")
        middles = [middle for middle, _, _ in summaries]
        spread = [[m - low for m, low, _ in summaries], [high - m for m, _, high in summaries]]
        bars = axes.barh(labels, middles, xerr=spread, color="#4c72b0", ecolor="#222222", capsize=3)
        axes.bar_label(bars, [f"{middle:.3g}" for middle in middles], padding=6)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(self.title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def told(
    path: Path, title: str, conditions: str, lines: Mapping[str, float], wrong: Sequence[str], **more: object
) -> None:
    """Print single figures and what went wrong, and keep both as JSON."""
    print(f"\n{title}\n{conditions}")
    for label, value in lines.items():
        print(f"{label:44} {value:10,}")
    for each in wrong[:20]:
        print(f"wrong: {each}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title,
        "conditions": conditions,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "values": {label: [value] for label, value in lines.items()},
        "wrong": list(wrong[:100]),
        **more,
    }
    path.write_text(json.dumps(content) + "\n")


def _summary(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
