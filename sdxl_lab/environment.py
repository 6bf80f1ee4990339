"""What must stand in the environment before torch and transformers are imported.

`import sdxl_lab` calls `prepare`, so every door has it: notebooks, the command line, the service, the tests.
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

    OpenMP's threads spin while they wait for one another. Beside one busy process they burn the time that the thread
    they wait for needs: an image of 2 s took 54 s beside two busy processes on two cores, and 2.2 s with
    `OMP_WAIT_POLICY=PASSIVE`, which costs a quarter on a quiet machine. It has no effect where torch was imported
    first.
    """
    if not any(name in environment for name in SPINNING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    # transformers warns at import that torchvision is missing; nothing here uses it.
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")


def processor() -> str:
    """The processor's own name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
