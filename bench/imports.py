"""Seconds to import a module in a new interpreter, for which a command and a new replica wait."""

import platform
import subprocess
import sys
import time
from functools import partial

from bench.measure import Measurement, Report, alternate, ratios
from bench.settings import Size

MODULES = ("sdxl_lab.config", "service.app", "sdxl_lab.diffusion.engine", "diffusers")


def imported(module: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - began


def main(size: Size) -> None:
    measurements: dict[str, Measurement] = {f"import {module}": partial(imported, module) for module in MODULES}
    lines = alternate(measurements, size.rounds)
    whole = lines[f"import {MODULES[-1]}"]
    lines |= {f"{module} / {MODULES[-1]}": ratios(lines[f"import {module}"], whole) for module in MODULES[:2]}
    python = f"Python {platform.python_version()}"
    Report("imports", "Seconds to import, a new interpreter each time", lines, python).show(size.folder)
