"""What the process must be told before the models run: its environment before torch is imported, malloc after the load.

`import sdxl_lab` calls `prepare` and `collect_less`, so every door has it: notebooks, the command line, the service,
the tests, the recipe.
"""

import atexit
import ctypes
import gc
import os
import platform
from collections.abc import Mapping, MutableMapping
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


PYTHONS_OWN, LESS_OFTEN = (700, 10, 10), (50_000, 20, 100)


def collect_less() -> None:
    """Let the garbage collector look less often, unless somebody has chosen, and not at all as the process ends.

    The libraries make a million functions and classes, none of them garbage. Looking through them over and over took a
    quarter of the engine's import.
    """
    if gc.get_threshold() == PYTHONS_OWN:
        gc.set_threshold(*LESS_OFTEN)
    atexit.register(gc.freeze)


# Any of these says that somebody has chosen how much memory malloc keeps.
KEEPING = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
# `mallopt` of glibc: how many bytes must be free at the heap's end, and how large an allocation must be, for its memory
# to go back to the system. What a UNet call of 32 rows at 256 px allocates is less.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = (-1, 2**29), (-3, 2**27)


def keep_allocations(environment: Mapping[str, str] = os.environ) -> bool:
    """Let malloc keep what a call of a model frees, if it is glibc's and nobody has chosen otherwise. Says whether.

    Left alone it gives large tensors back to the system, which maps and clears their pages anew in every call.
    """
    if any(name in environment for name in KEEPING) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*choice) for choice in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


def processor() -> str:
    """The processor's own name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
