"""The page of the GPU benchmark, from its JSON: what ran, where, and what came of it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import shown, summary


def page(path: Path) -> str:
    """In Markdown."""
    report = json.loads(path.read_text())
    parts = [
        [part["name"], f"{part['took']:.0f}", f"{part['budget']:.0f}", part["outcome"], problems(part["problems"])]
        for part in report["parts"]
    ]
    figures = [
        [label, *(shown(value) for value in summary(values)), str(len(values))]
        for label, values in report["values"].items()
        if not label.endswith(": ms a call")
    ]
    return (
        "\n\n".join(
            [
                f"# {report['title']}",
                f"{report['conditions']}. Weights are random, in SDXL's own configurations. "
                "The profile has its defaults but for what a name says.",
                "## Parts",
                table(["part", "s", "of at most", "outcome", "failed"], parts),
                "## Seconds, ratios, differences",
                table(["figure", "median", "lowest", "highest", "values"], figures),
                "## Milliseconds a call, by its rows",
                "The median; behind it, the first call, in seconds.",
                calls(report["calibration"]),
                "## Where",
                table(["", ""], [[name, str(value)] for name, value in report["environment"].items()]),
            ]
        )
        + "\n"
    )


def calls(calibration: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each way of calling the UNet that was measured, and what the batcher chooses for it."""
    measured = {name: found for name, found in calibration.items() if "seconds" in found}
    rows = sorted({int(count) for found in measured.values() for count in found["seconds"]})

    def cell(found: Mapping[str, Any], count: int) -> str:
        seconds = found["seconds"].get(str(count))
        if seconds is None:
            return "not tried"
        return f"{1000 * summary(seconds)[0]:.1f} ({found['first call, s'][str(count)]:.1f})"

    lines = [
        [name, *(cell(found, count) for count in rows), str(found.get("rows chosen", "not known"))]
        for name, found in measured.items()
    ]
    return table(["", *(f"{count} row{'s' * (count > 1)}" for count in rows), "the batcher chooses"], lines)


def problems(found: Iterable[str]) -> str:
    return "; ".join(found) or "nothing"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, with what would end a cell escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
