"""The explore notebook under papermill: tested by what it raises and writes, not by the notebook it leaves."""

from pathlib import Path
from typing import Any

import pytest

from sdxl_lab.config import GenerationConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.images import max_difference, open_image, read_record
from sdxl_lab.job import ImageRequest
from sdxl_lab.notebook.runner import EXECUTED, ROOT, NotebookError, run_notebook


def execute(**parameters: Any) -> None:
    run_notebook(
        ROOT / "notebooks/01_explore.ipynb", parameters, out=ROOT / EXECUTED / "01_explore.ipynb", cell_seconds=240
    )


@pytest.mark.slow
def test_explore_draws_compares_and_saves_a_candidate(tmp_path: Path) -> None:
    execute(steps=6, seed=3, out=str(tmp_path))
    images = {path.name for path in tmp_path.glob("*.png")}
    assert images == {"image.png", "refined.png", "refiner.png", "schedulers.png"}
    assert read_record(tmp_path / "image.png").prompt == "A cat in a hat"

    (file,) = tmp_path.glob("candidate-*.toml")
    candidate = GenerationConfig.from_toml(file)
    assert candidate.digest.startswith(file.stem.removeprefix("candidate-"))
    assert candidate.steps == 6
    assert candidate.refiner is not None
    with Engine.load(candidate) as engine:
        again = engine.draw(ImageRequest(candidate, "A cat in a hat", 3))
    assert max_difference(again.image, open_image(tmp_path / "refined.png")) == 0


@pytest.mark.slow
def test_a_parameter_that_breaks_a_rule_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="steps must be a whole number from 1 to 1000"):
        execute(steps=0, out=str(tmp_path / "images"))
    assert not (tmp_path / "images").exists()
