"""`make demo`, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab.images import max_difference, open_picture

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_takes_one_picture_through_three_doors() -> None:
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    done = subprocess.run(
        [sys.executable, "demo.py"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "One configuration, three doors, the same pixels" in done.stdout
    run = ROOT / "runs" / "demo"
    served, golden = (open_picture(run / name) for name in ("served-generate.png", "notebook/golden.png"))
    assert max_difference(served, golden) == 0
    assert len(json.loads((run / "slot" / "evidence.json").read_text())["digest"]) == 12
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert after.stdout == before.stdout
