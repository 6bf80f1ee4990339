"""Seconds until a module is imported, in a new interpreter each time: what a command and a new replica wait for."""

import subprocess
import sys
import time

from bench.measure import Report, Trial, alternate, ratios
from bench.settings import Size

MODULES = ("sdxl_lab.config", "service.app", "sdxl_lab.engine", "diffusers")


def imported(module: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - began


def main(size: Size) -> None:
    trials: dict[str, Trial] = {f"import {module}": lambda module=module: imported(module) for module in MODULES}
    lines = alternate(trials, size.rounds)
    whole = lines["import diffusers"]
    lines |= {f"{module} / diffusers": ratios(lines[f"import {module}"], whole) for module in MODULES[:2]}
    Report("imports", "Seconds to import, a new interpreter each time", lines, sys.version.split()[0], {}).show(
        size.folder
    )
