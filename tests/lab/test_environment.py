"""Every door bounds OpenMP's spinning before torch is imported, unless somebody chose otherwise."""

import os
import subprocess
import sys

import pytest

from sdxl_lab.environment import SPINNING, prepare


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
