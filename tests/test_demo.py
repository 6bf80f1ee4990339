"""`make demo`, as a user runs it: the round trip from a notebook over a slot and the service to the same pixels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab.images import max_difference, open_image, read_record
from sdxl_lab.release.slot import load_slot

ROOT = Path(__file__).parent.parent
NAMES = ("notebook/golden", "served-generate", "served-generate-again")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_notebook_slot_service_and_the_served_png_give_the_same_pixels() -> None:
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    done = subprocess.run(
        [sys.executable, "demo.py"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "One configuration, three doors, the same pixels" in done.stdout
    run = ROOT / "runs" / "demo"
    notebook, served, again = (run / f"{name}.png" for name in NAMES)
    slot = load_slot(run / "slot")
    assert {read_record(path).digest for path in (notebook, served, again)} == {slot.digest}
    golden = slot.goldens[0].path
    for path in (notebook, served, again):
        assert max_difference(open_image(path), open_image(golden)) == 0, path
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert after.stdout == before.stdout
