"""Seconds until a new process is there: imported, an image written, a service ready. Commands, tests, kernels and
replicas wait for it.
"""

import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench.clients import request
from bench.measure import Measurement, Report, alternate, ratios
from bench.servers import ROOT, end, free_port, service, start, until
from bench.settings import PROMPTS, Size

BASELINE = "import torch"
IMPORTS = (
    BASELINE,
    "import sdxl_lab.config",
    "import service.app",
    "import sdxl_lab.diffusion.engine",
    "from sdxl_lab import Explorer",
)


def ran(*arguments: str) -> float:
    """The whole life of a process."""
    began = time.monotonic()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.monotonic() - began


def generated(model: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "image.png"))
        return ran("-m", "sdxl_lab", "generate", PROMPTS[0], "--model", model, "--seed", "1", "--out", out)


def ready() -> float:
    """Until the service of the slot that is promoted says so, with its goldens drawn again."""
    with tempfile.TemporaryDirectory() as folder:
        port, log = free_port(), Path(folder, "log")
        began = time.monotonic()
        process = start(service(port), log, {"SDXL_STORE": str(Path(folder, "images")), "SDXL_LOG_LEVEL": "warning"})
        try:
            until(lambda: request(port, "GET", "/readyz").status == 200, process, log)
            return time.monotonic() - began
        finally:
            end(process)


def main(size: Size) -> None:
    measurements: dict[str, Measurement] = {program: partial(ran, "-c", program) for program in IMPORTS}
    measurements |= {"generate, the whole command": partial(generated, size.model), "service until /readyz": ready}
    lines = alternate(measurements, size.rounds)
    lines |= {f"{name} / {BASELINE}": ratios(lines[name], lines[BASELINE]) for name in measurements if name != BASELINE}
    aims = {"import sdxl_lab.diffusion.engine": "4", "generate, the whole command": "6"}
    python = f"Python {platform.python_version()}, nano's own settings"
    title = "Seconds of a new process each time, its end with it"
    Report("imports", title, lines, python, aims).show(size.folder)
