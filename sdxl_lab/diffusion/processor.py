"""The processor: what it can do, the cores that this process may use, and torch's threads for each call on them."""

import functools
import math
import os
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sdxl_lab.diffusion.threads import ThreadChoice

# What torch's kernels for convolutions and matrix products ask of an x86 processor.
NEEDED = {"bfloat16": "AVX-512", "float16": "AVX-512 FP16"}


def capability() -> str:
    """The vector instructions that torch's kernels use here, such as AVX2 or AVX512."""
    return torch.backends.cpu.get_cpu_capability()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has this processor's kernels for numbers of `dtype`. Without them torch computes with them one by
    one: with AVX2 only, a convolution in bfloat16 takes more than ten times as long as one in float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may keep busy: those that it may run on, or fewer where a container's quota of CPU
    time says so (rounded up), of which neither OpenMP nor torch takes notice."""
    return max(1, math.ceil(min(_allowed(), _quota(root))))


def _allowed() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(root: Path) -> float:
    """The least quota of this process's control groups and of those above them, in cores; infinite without one.

    Source: the kernel's `cgroup-v2.rst` (`cpu.max`) and `sched-bwc.rst` (`cpu.cfs_quota_us`)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            quotas.append(_quota_of(folder))
            if folder == mount:
                break
    return min(quotas)


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group seen from in here, or "max"
        return math.inf


@functools.cache
def most_threads() -> int:
    """The most that are worth having: torch's own number, which respects OMP_NUM_THREADS, where there are cores for it.

    Read once: a new thread begins with the number that any thread set last."""
    return min(torch.get_num_threads(), usable_cores())


class CallThreads:
    """Sets torch's threads before each call of one thread, by what the calls before took.

    torch keeps the number for each thread that calls it, and setting it costs less than a microsecond. Where it does
    not `adapt` nothing is set.
    """

    def __init__(self, adapt: bool = True) -> None:
        self.choice = ThreadChoice(most_threads()) if adapt else None
        self._found = torch.get_num_threads()
        torch.set_num_threads(self.count)

    @property
    def count(self) -> int:
        """For work that is not measured: what has proved best, or what was found."""
        return self.choice.count if self.choice else self._found

    @contextmanager
    def call(self, kind: Hashable) -> Iterator[None]:
        """Around a call; one that fails is not measured. Other work in the same thread has what has proved best."""
        if self.choice is None:
            yield
            return
        threads = self.choice.choose(kind, time.monotonic())
        torch.set_num_threads(threads)
        began, used = time.monotonic(), time.process_time()
        try:
            yield
            now = time.monotonic()
            self.choice.took(kind, threads, now - began, time.process_time() - used, now)
        finally:
            torch.set_num_threads(self.count)
