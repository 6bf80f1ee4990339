"""Every door bounds OpenMP's spinning before torch is imported, unless somebody chose otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from sdxl_lab.environment import KEEPING, LESS_OFTEN, PYTHONS_OWN, SPINNING, keep_allocations, prepare


def test_spinning_is_bounded_where_nobody_chose():
    environment: dict[str, str] = {}
    prepare(environment)
    assert environment["GOMP_SPINCOUNT"] == "10000"


@pytest.mark.parametrize("name", SPINNING)
def test_a_choice_of_the_user_stays(name):
    environment = {name: "ACTIVE"}
    prepare(environment)
    assert environment[name] == "ACTIVE"
    assert len(environment.keys() & set(SPINNING)) == 1


@pytest.mark.parametrize("door", ["sdxl_lab.cli", "service.app", "sdxl_lab.diffusion.engine", "recipes.nano.fit"])
def test_each_door_bounds_it_before_torch_is_there(door):
    """Reads what libgomp would read: the variable as it is when torch begins to load."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT")); sys.stdout.flush(); os._exit(0)
sys.meta_path.insert(0, Watch())
import {door}
import torch
"""
    environment = {name: value for name, value in os.environ.items() if name not in SPINNING}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "10000"


@pytest.mark.parametrize(("before", "after"), [(PYTHONS_OWN, LESS_OFTEN), ((1000, 10, 10), (1000, 10, 10))])
def test_garbage_is_looked_for_less_often_where_nobody_chose(before, after):
    code = f"import gc; gc.set_threshold(*{before}); import sdxl_lab; print(gc.get_threshold())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(after)


FAULTS = """
import resource
from sdxl_lab import environment
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(10):
    bytearray(2**26)
print((faults() - before) * resource.getpagesize() / 2**26)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
@pytest.mark.parametrize(
    ("first", "chosen", "mapped"),
    [
        ("environment.keep_allocations()", {}, 1),
        ("", {}, 10),
        ("environment.keep_allocations()", {"MALLOC_MMAP_THRESHOLD_": "100000"}, 10),
    ],
    ids=["kept", "left alone", "chosen otherwise"],
)
def test_what_is_freed_is_kept_for_the_next_call(first, chosen, mapped):
    """How often 64 MiB, taken and freed ten times, are mapped into the process."""
    environment = {name: value for name, value in os.environ.items() if name not in KEEPING} | chosen
    code = [sys.executable, "-c", FAULTS.format(first=first)]
    said = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    assert float(said.stdout) == pytest.approx(mapped, abs=0.5)


@pytest.mark.parametrize("libc", ["musl", ""])
def test_another_malloc_is_left_alone(monkeypatch, libc):
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    assert not keep_allocations({})
