"""How long images wait for each other, simulated with the engine's batcher: its order against first come, first served.

Arithmetic, nothing is measured. Images arrive at random moments (Poisson) at one replica, and none is refused. The
first tenth of them, which meets an idle replica, is left out. Every policy gets the same moments and the same images.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.measure import Report, plot, ratios
from bench.settings import Size
from bench.simulate import Cost, Policy, Work, capacity, fleet, mixed, poisson
from sdxl_lab.diffusion import batching
from sdxl_lab.diffusion.batching import PATIENCE, STRETCH
from sdxl_lab.research.plots import COLOURS

SHORT, MIDDLE, LONG = STEPS = 10, 30, 50
LOADS = (0.5, 0.7, 0.85)
RUNS = 5  # other moments, other images
EACH = 1250  # images of a run, for each of `Size.images`
COMPILED, EAGER = Cost(0.0, 0.0245), Cost(0.034, 0.0245)
ANY = sys.maxsize
SINGLE, FIFO, SHORTEST = "one at a time", "fifo", "shortest"
POLICIES = {
    SINGLE: Policy("fifo", active=1, queue=ANY),
    FIFO: Policy("fifo", queue=ANY),
    SHORTEST: Policy("shortest", queue=ANY),
}
PATIENCES, STRETCHES, THRIFTS = (2.0, 5.0, 10.0, 20.0, 1e9), (1.5, 2.0, 3.0, 1e9), (1.0, 2.0, 4.0, 8.0, 1e9)
AIMS = {"mean": {0.5: "", 0.7: "0.8", 0.85: "0.75"}, "short": {0.5: "3", 0.7: "3", 0.85: "5"}}
OWN = f"p99 of {SHORT} steps"

Figures = Mapping[str, list[float]]  # by name, one of every run
Cases = Mapping[str, Mapping[str, Figures]]  # by "equal" or "mixed", and by policy


def played(cost: Cost, steps: Sequence[int], rate: float, count: int, policies: Sequence[str]) -> dict[str, Figures]:
    """`RUNS` simulations with each policy. If the first one is "one at a time", `stretch` is the most that an image
    took, as a multiple of what it took there, and `late` how many took longer than `bound`."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in policies}
    for run in range(RUNS):
        works, moments = mixed(steps, count, 100 + run), poisson(rate, count, run)
        first: np.ndarray | None = None
        for name in policies:
            out = fleet(moments, works, cost, POLICIES[name])
            first = out.latencies if name == SINGLE else first
            figures = summed_up(out.latencies, works) | {"rows": out.rows / out.calls}
            if first is not None:
                figures["stretch"] = float((out.latencies / first).max())
                figures["late"] = float((out.latencies > bound(first, works, cost) + 1e-6).sum())
            for figure, value in figures.items():
                found[name].setdefault(figure, []).append(value)
    return dict(found)


def summed_up(latencies: np.ndarray, works: Sequence[Work]) -> dict[str, float]:
    """Seconds from arrival to end."""
    steps = np.array([work[0][1] for work in works])
    settled = np.arange(len(works)) >= len(works) // 10
    figures = {"mean": float(latencies[settled].mean()), "p50": float(np.median(latencies[settled]))}
    for each in sorted(set(steps.tolist())):
        figures[f"p99 of {each} steps"] = float(np.quantile(latencies[settled & (steps == each)], 0.99))
    return figures


def bound(first: np.ndarray, works: Sequence[Work], cost: Cost) -> np.ndarray:
    """The most seconds that an image may take, by what it takes first come, first served (`first`). For one replica
    where each call holds one image, calls cost in proportion to their rows, and any number may be under way.

    An image is due `STRETCH` times `first` less its own time after its arrival. From then on it waits only for the call
    that is being made and for those that were due before it. Let k be the last of these, and of itself, to arrive. All
    that they need was there when k came; since no order of work leaves more of it undone than another, that is at most
    what k takes first come, first served. And k is due no later: its `first` is at most this one's and the difference
    of their own times over `STRETCH`.
    """
    own = np.array([cost.alone(work) for work in works])
    call = max(cost.call + cost.row * rows for work in works for rows, _ in work)
    return (STRETCH + 1) * first - own + (own.max() - own) / STRETCH + call


def loaded(cost: Cost, most: float, count: int, policies: Sequence[str]) -> dict[float, Cases]:
    """Equal and mixed images at each load, a share of `most` images a second."""
    kinds = {"equal": (MIDDLE,), "mixed": STEPS}
    return {
        load: {kind: played(cost, steps, load * most, count, policies) for kind, steps in kinds.items()}
        for load in LOADS
    }


def compared(cost: Cost, load: float, cases: Cases) -> dict[str, tuple[list[float], str]]:
    """The ratios of one load, each with its aim."""
    equal, others = cases["equal"], cases["mixed"]
    ours = others[SHORTEST]
    own = cost.alone(((2, SHORT),))
    lines = {f"{OWN} / own time": ([value / own for value in ours[OWN]], AIMS["short"][load])}
    for other in (each for each in others if each != SHORTEST):
        aims = ("1", AIMS["mean"][load], "1.5") if other == SINGLE else ("", "", "")
        if other == SINGLE:
            for figure in ("mean", "p50"):
                lines[f"equal, {figure} / {other}"] = ratios(equal[SHORTEST][figure], equal[other][figure]), aims[0]
            lines[f"longest / {other}"] = list(ours["stretch"]), ""
        for figure, aim in (("mean", aims[1]), (f"p99 of {LONG} steps", aims[2])):
            lines[f"{figure} / {other}"] = ratios(ours[figure], others[other][figure]), aim
    return lines


def tuned(cost: Cost, rate: float, count: int, policies: Sequence[str], **constants: float) -> dict[str, float]:
    """Mixed images with other constants of the batcher: medians of the runs."""
    with patch.dict(vars(batching), constants):
        rows = float(POLICIES[SHORTEST].call_rows(((2, MIDDLE),), cost))
        every = played(cost, STEPS, rate, count, policies)
    ours, long = every[SHORTEST], f"p99 of {LONG} steps"
    found = {"rows of a call": rows, f"{OWN} / own time": median(ours[OWN]) / cost.alone(((2, SHORT),))}
    if SINGLE not in policies:
        return found | {figure: median(ours[figure]) for figure in ("mean", long)}
    against = {f"{figure} / {SINGLE}": median(ratios(ours[figure], every[SINGLE][figure])) for figure in ("mean", long)}
    return found | against | {"longest": max(ours["stretch"])}


def constants(count: int) -> dict[str, dict[str, dict[str, float]]]:
    """What other constants of the batcher would give, by load."""
    single, full = (capacity(((2, MIDDLE),), EAGER, POLICIES[name]) for name in (SINGLE, SHORTEST))
    pairs = dict.fromkeys([*((p, STRETCH) for p in PATIENCES), *((PATIENCE, s) for s in STRETCHES), (1e9, 1e9)])
    most = capacity(((2, MIDDLE),), COMPILED, POLICIES[SINGLE])
    found = {
        f"PATIENCE {p:g}, STRETCH {s:g}": {
            f"compiled, {load:.0%}": tuned(COMPILED, load * most, count, (SINGLE, SHORTEST), PATIENCE=p, STRETCH=s)
            for load in LOADS[1:]
        }
        for p, s in pairs
    }
    rates = {f"eager, {LOADS[1]:.0%}": LOADS[1] * single, f"eager, full calls, {LOADS[2]:.0%}": LOADS[2] * full}
    thrift = {
        f"THRIFT {t:g}": {name: tuned(EAGER, rate, count, (SHORTEST,), THRIFT=t) for name, rate in rates.items()}
        for t in THRIFTS
    }
    return found | thrift


def main(size: Size) -> None:
    count, work = EACH * size.images, ((2, MIDDLE),)
    machines = {
        "compiled": (COMPILED, SINGLE, (SINGLE, SHORTEST)),  # a call is of one image: `fifo` is one at a time
        "eager": (EAGER, SINGLE, (SINGLE, FIFO, SHORTEST)),
        "eager, full calls": (EAGER, SHORTEST, (FIFO, SHORTEST)),  # too much for one at a time
    }
    most = {name: capacity(work, cost, POLICIES[by]) for name, (cost, by, _) in machines.items()}
    found = {name: loaded(cost, most[name], count, policies) for name, (cost, _, policies) in machines.items()}
    lines, aims = {}, {}
    for name, loads in found.items():
        for load, cases in loads.items():
            for label, (values, aim) in compared(machines[name][0], load, cases).items():
                lines[f"{name}, {load:.0%}: {label}"] = values
                aims[f"{name}, {load:.0%}: {label}"] = aim
    late = {load: sum(cases["mixed"][SHORTEST]["late"]) for load, cases in found["compiled"].items()}
    wrong = [
        f"compiled, {load:.0%}: {many:.0f} images took longer than the bound" for load, many in late.items() if many
    ]
    conditions = (
        f"{count} images a run, {RUNS} runs, Poisson, mixed steps unless equal; 24.5 ms a row, eager 34 ms a call "
        f"more; load is a share of the {most['compiled']:.3f} and {most['eager']:.3f} images a second that one at a "
        f"time can draw, and with full calls of {most['eager, full calls']:.3f}"
    )
    more: dict[str, Any] = {"seconds": found, "constants": constants(count)}
    title = "Least remaining time first against first come, first served, simulated"
    Report("queueing", title, lines, conditions, {k: v for k, v in aims.items() if v}, wrong, more).write(size.folder)
    _show(more)
    paint(size.folder / "queueing.png", title, found)


def _show(more: Mapping[str, Any]) -> None:
    say: Callable[..., None] = print
    for machine, loads in more["seconds"].items():
        for load, cases in loads.items():
            for kind, policies in cases.items():
                for policy, figures in policies.items():
                    cells = "  ".join(f"{name} {median(values):.3g}" for name, values in figures.items())
                    say(f"{machine}, {load:.0%}, {kind}, {policy}: {cells}")
    for label, loads in more["constants"].items():
        for load, values in loads.items():
            say(f"{label}, {load}: " + "  ".join(f"{name} {value:.3g}" for name, value in values.items()))


def paint(path: Path, title: str, found: Mapping[str, Mapping[float, Cases]]) -> None:
    """Seconds by load: the mean of mixed images, and the p99 of the shortest and of the longest."""
    styles = {"mean": "-", OWN: ":", f"p99 of {LONG} steps": "--"}
    with plot(path, title, (13, 4), columns=len(found)) as panels:
        for ax, (machine, loads) in zip(panels, found.items(), strict=True):
            for policy, colour in zip(POLICIES, COLOURS, strict=False):
                for figure, style in styles.items():
                    if all(policy in cases["mixed"] for cases in loads.values()):
                        y = [median(cases["mixed"][policy][figure]) for cases in loads.values()]
                        x = [100 * load for load in loads]
                        ax.plot(x, y, style, color=colour, lw=1.4, label=f"{policy}, {figure}")
            ax.set_yscale("log")
            ax.set_yticks([0.2, 0.5, 1, 2, 5, 10, 20, 50], ["0.2", "0.5", "1", "2", "5", "10", "20", "50"])
            ax.minorticks_off()
            ax.set(title=machine, xlabel="load, %", ylabel="seconds", ylim=(0.1, 80))
        panels[1].legend(loc="lower right", ncols=2, fontsize=6)
