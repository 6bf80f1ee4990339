"""The plot of `scaling`: six panels, in the lab's colours and marks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.measure import plot
from sdxl_lab.research.plots import COLOURS, MARKS
from sdxl_lab.research.sheet import FAINT, INK

MINUTE = 60.0


def paint(
    path: Path, found: Mapping[str, Any], traces: Mapping[int, Any], fleet: Mapping[str, Sequence[float]]
) -> None:
    """`found` are the results of `scaling.main`, `traces` the load step by start-up time, `fleet` the measurements."""
    with plot(path, "", (13, 7.6), rows=2, columns=3) as (a, b, c, d, e, f):
        _replicas(a, found["fleets"]["H100, eager, guidance throughout"])
        _ways(b, found["ways"]["H100, eager"], "one H100, a call costs 34 ms and 24 ms a row")
        _ways(c, found["ways"]["H100, compiled"], "one H100, a call costs 24 ms a row and no more")
        _use(d, found["fleets"]["H100, eager, guidance throughout"])
        _step(e, traces)
        _predicted(f, fleet)


def _replicas(ax: Axes, fleets: Mapping[str, Any]) -> None:
    for (n, points), colour, mark in zip(fleets["points"].items(), COLOURS, MARKS, strict=False):
        x = [100 * point["rate"] / fleets["capacity"] for point in points]
        y = [point["p99"] / fleets["alone"] for point in points]
        ax.plot(x, y, f"-{mark}", color=colour, lw=1.4, ms=4, label=f"{int(n):,}")
    ax.axhline(2, color=INK, lw=1, ls="--")
    ax.annotate("twice", (122, 2), xytext=(0, 3), textcoords="offset points", color=FAINT, ha="right")
    ax.set_yscale("log")
    ax.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    ax.minorticks_off()
    ax.set(
        title="p99 by replicas behind round robin, H100", xlabel="load, % of capacity", ylabel="p99 / time of one alone"
    )
    ax.legend(title="replicas", ncols=2)


def _ways(ax: Axes, policies: Mapping[str, Any], title: str) -> None:
    for (name, points), colour, mark in zip(policies.items(), COLOURS, MARKS, strict=False):
        x = [point["rate"] for point in points]
        ax.plot(x, [point["p99"] for point in points], f"-{mark}", color=colour, lw=1.4, ms=4, label=name)
        ax.plot(x, [point["p50"] for point in points], "--", color=colour, lw=1)
    ax.set_yscale("log")
    ax.set_yticks([1, 2, 5, 10, 20, 50, 100, 200], ["1", "2", "5", "10", "20", "50", "100", "200"])
    ax.minorticks_off()
    ax.set(title=title, xlabel="images a second", ylabel="seconds: p99, and dashed p50")
    ax.legend()


def _use(ax: Axes, fleets: Mapping[str, Any]) -> None:
    points = fleets["points"]["1"]
    x = [100 * point["rate"] / fleets["capacity"] for point in points]
    lines = {
        "busy": "share of time busy",
        "rows": f"share of the {fleets['rows']} rows in use",
        "refused": "share refused (429)",
    }
    for (key, label), colour, mark in zip(lines.items(), COLOURS, MARKS, strict=False):
        ax.plot(x, [100 * point[key] for point in points], f"-{mark}", color=colour, lw=1.4, ms=4, label=label)
    ax.plot(x, x, ":", color=FAINT, lw=1)
    ax.set_ylim(-3, 105)
    ax.set(title="a busy H100 is not a full one", xlabel="load, % of capacity", ylabel="%")
    ax.legend()


def _step(ax: Axes, traces: Mapping[int, Any]) -> None:
    for (startup, trace), colour in zip(traces.items(), COLOURS, strict=False):
        x, y = (np.asarray(trace[name]) for name in ("arrivals", "latencies"))
        kept = ~np.isnan(y)
        smooth = np.convolve(y[kept], np.ones(9) / 9, "valid")
        ax.plot((x[kept][4:-4] - 900) / MINUTE, smooth, color=colour, lw=1.3, label=f"{startup} s")
        for ready in trace["ready"]:
            if ready > 0:
                ax.axvline(ready / MINUTE, color=colour, lw=0.8, ls=":")
    ax.axvline(0, color=INK, lw=1, ls="--")
    ax.set_xlim(-4, 22)
    ax.set_yscale("log")
    ax.set_yticks([2, 5, 10, 20, 50, 100, 200], ["2", "5", "10", "20", "50", "100", "200"])
    ax.minorticks_off()
    ax.set(
        title="1 → 3 replicas: load from 50 to 150 % of one",
        xlabel="minutes since (dotted: a replica is ready)",
        ylabel="seconds an image",
    )
    ax.legend(title="until a replica is ready", loc="upper right")


def _predicted(ax: Axes, fleet: Mapping[str, Sequence[float]]) -> None:
    ax.set(title="nano, measured and simulated", xlabel="seconds measured", ylabel="seconds simulated")
    if not any(label.endswith("s measured") for label in fleet):
        ax.annotate("`fleet` was not run", (0.5, 0.5), xycoords="axes fraction", ha="center", color=FAINT)
        return
    ends = [np.inf, 0.0]
    for (replicas, colour), mark in zip(zip(("1 replica", "2 replicas"), COLOURS, strict=False), MARKS, strict=False):
        for share, filled in (("p50", True), ("p95", False)):
            seen = [
                label for label in fleet if label.startswith(f"{replicas},") and label.endswith(f"{share} s measured")
            ]
            x = [value for label in seen for value in fleet[label]]
            y = [value for label in seen for value in fleet[label.replace("measured", "predicted")]]
            face = colour if filled else "white"
            ax.plot(x, y, mark, color=colour, mfc=face, ms=5, label=f"{replicas}, {share}")
            ends = [min([ends[0], *x, *y]), max([ends[1], *x, *y])]
    ax.plot(ends, ends, ":", color=FAINT, lw=1)
    ax.legend()
