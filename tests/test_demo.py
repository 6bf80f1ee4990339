"""`make demo`, as a user runs it: a notebook, a promotion and the service give the same pixels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab.images import max_difference, open_image, read_record
from sdxl_lab.release.slot import load_slot

ROOT = Path(__file__).parent.parent
NAMES = ("notebook/refined", "served-generate", "served-generate-again")


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
    gates = {gate.gate: gate.passed for gate in slot.evidence.gates}
    assert list(gates.values()) == [True, True]
    assert all("unet_rows: at most 50" in name or "sharpness: at most 25 % worse" in name for name in gates)
    assert slot.evidence.replaces == load_slot(ROOT / "service" / "promoted" / "nano").digest
    assert "refused: more work than they allow" in done.stdout
    for path in (served, again):
        assert max_difference(open_image(path), open_image(notebook)) == 0, path
    assert max_difference(open_image(golden), open_image(notebook)) <= 1 / 255
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert after.stdout == before.stdout
