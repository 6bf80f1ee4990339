"""The explore notebook under papermill: judged by what it raises and writes, never by the notebook it leaves."""

from pathlib import Path
from typing import Any

import pytest

from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.images import max_difference, open_image, read_record
from sdxl_lab.job import ImageRequest
from sdxl_lab.notebook.runner import EXECUTED, ROOT, NotebookError, run_notebook
from sdxl_lab.release.slot import load_slot


def execute(**parameters: Any) -> None:
    run_notebook(
        ROOT / "notebooks/01_explore.ipynb", parameters, out=ROOT / EXECUTED / "01_explore.ipynb", cell_seconds=240
    )


@pytest.mark.slow
def test_explore_draws_compares_and_promotes(tmp_path: Path) -> None:
    slot_folder = tmp_path / "slot"
    execute(steps=6, seed=3, out=str(tmp_path / "images"), slot=str(slot_folder))

    written = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert written == ["golden.png", "image.png", "refiner.png", "schedulers.png"]
    assert read_record(tmp_path / "images" / "image.png").prompt == "A cat in a hat"

    slot = load_slot(slot_folder)
    assert slot.config.steps == 6
    assert slot.config.refiner is not None
    assert len(slot.goldens) == 2
    with Engine.load(slot.config) as engine:
        again = engine.draw(ImageRequest(slot.config, "A cat in a hat", 3))
    assert max_difference(again.image, open_image(tmp_path / "images" / "golden.png")) == 0


@pytest.mark.slow
def test_a_parameter_that_breaks_a_rule_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="steps must be a whole number from 1 to 1000"):
        execute(steps=0, out=str(tmp_path / "images"))
    assert not (tmp_path / "images").exists()
