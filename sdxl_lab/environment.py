"""What must stand in the environment before torch and transformers are imported.

`import sdxl_lab` calls `prepare`, so every door has it: notebooks, the command line, the service, the tests, the
recipe.
"""

import os
import platform
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

# Any of these says that somebody has chosen how long OpenMP's threads spin.
SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set already.

    OpenMP's threads spin while they wait for one another; GNU's, torch's own, for so long that beside two busy
    processes on two cores an image of 2 s took 54 s. Not spinning at all (`OMP_WAIT_POLICY=PASSIVE`) costs a quarter
    on a quiet machine. 10,000 rounds, about 0.1 ms, bridge the gap between two parallel loops, so that a
    quiet machine loses nothing; beside a busy process the engine takes fewer threads (`diffusion/threads.py`), and one
    thread waits for nobody. It has no effect where torch was imported first.
    """
    if not any(name in environment for name in SPINNING):
        environment["GOMP_SPINCOUNT"] = "10000"
    # transformers warns at import that torchvision is missing; nothing here uses it.
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")


def processor() -> str:
    """The processor's own name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
