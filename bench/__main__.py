"""`python -m bench [NAME ...]`: run the benchmarks. Each prints a table and writes JSON and a plot."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from bench import (
    call,
    cost,
    engine,
    fleet,
    gpu,
    imports,
    lora,
    queueing,
    scaling,
    serving,
    throughput,
    truesize,
)
from bench.measure import RESULTS
from bench.neighbours import neighbours
from bench.replicas import replicas
from bench.settings import Size
from bench.soak import soak


def clip_truth(size: Size) -> None:
    """It needs nano's recipe, which a GPU's upload leaves at home with nano."""
    from bench.clip_truth import main

    main(size)


BENCHMARKS: dict[str, Callable[[Size], None]] = {
    "parity": engine.parity,
    "overhead": engine.overhead,
    "neighbours": neighbours,
    "throughput": throughput.main,
    "grid": engine.grid,
    "latency": serving.latency,
    "health": serving.health,
    "fleet": fleet.main,
    "scaling": scaling.main,
    "queueing": queueing.main,
    "soak": soak,
    "replicas": replicas,
    "runtime": engine.runtime,
    "lora": lora.main,
    "cancel": engine.cancel,
    "growth": engine.growth,
    "call": call.main,
    "truesize": truesize.main,
    "clip-truth": clip_truth,
    "imports": imports.main,
    "gpu": gpu.main,
    "cost": cost.main,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all if left out")
    sizes = {"model": str, "images": int, "steps": int, "side": int, "rounds": int, "device": str, "scale": str}
    for field, kind in sizes.items():
        default = getattr(Size, field)
        parser.add_argument(f"--{field}", type=kind, default=default, help=f"default {default}")
    parser.add_argument("--minutes", type=float, help="default 1 for soak, 8 for gpu")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results go")
    options = vars(parser.parse_args(arguments))
    names = options.pop("names")
    for unknown in set(names) - set(BENCHMARKS):
        parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}; received {unknown!r}. Example: throughput")
    for name in names or BENCHMARKS:
        BENCHMARKS[name](Size(**options))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the servers it has started end with it
    main()
