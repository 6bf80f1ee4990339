"""The promotion and the regression notebook, run as CI runs them; the executed copies stay in runs/notebooks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdxl_lab.config import GenerationConfig
from sdxl_lab.evaluation.comparison import ComparisonPlan, compare
from sdxl_lab.images import open_image
from sdxl_lab.notebook.runner import EXECUTED, ROOT, NotebookError, run_notebook
from sdxl_lab.release.promote import promote
from sdxl_lab.release.slot import load_slot

NANO = ROOT / "service/promoted/nano"
PROMPTS = ["a cat", "a dog", "a red hat", "a blue boat", "a tree"]


def execute(name: str, copy: str, **parameters: Any) -> Path:
    return run_notebook(ROOT / "notebooks" / name, parameters, out=ROOT / EXECUTED / copy, cell_seconds=240)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model of its own, whose files may be changed."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def slot(model: Path, tiny_config: GenerationConfig, tmp_path: Path) -> Path:
    """The random model promoted, with five prompts as its metric set."""
    config = tiny_config.with_(model=tiny_config.model.named(str(model)))
    found = compare(config, tmp_path / "slot", ComparisonPlan(prompts=tuple(PROMPTS), seeds=(0,), goldens=2))
    promote(
        config, tmp_path / "slot", images=found.goldens, why="w", who="Ada", findings=found.findings(), allow_dirty=True
    )
    return tmp_path / "slot"


@pytest.mark.slow
def test_promoting_rehearses_by_default_and_leaves_the_slot_alone(slot, tmp_path):
    before = {path: path.read_bytes() for path in slot.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    execute("04_promote.ipynb", "04_promote_tiny.ipynb", slot=str(slot), changes={"steps": 3}, prompts=PROMPTS,
            gates=["unet_rows: better"], out=str(out))  # fmt: skip
    assert {path: path.read_bytes() for path in slot.rglob("*") if path.is_file()} == before
    rehearsed = load_slot(out / "slot")
    assert rehearsed.config == load_slot(slot).config.with_(steps=3)
    assert rehearsed.evidence.replaces == load_slot(slot).digest
    notebook = rehearsed.evidence.notebook
    assert (notebook["file"], notebook["parameters"]["changes"]) == ("04_promote.ipynb", {"steps": 3})
    assert len(rehearsed.goldens) == 3
    assert "| `steps` | 4 | 3 |" in (out / "difference.md").read_text()
    assert open_image(out / "images.png").width > 4 * 64
    assert json.loads((out / "evidence.json").read_text())["prompts"] == PROMPTS


@pytest.mark.slow
def test_regression_passes_on_what_was_promoted_and_raises_on_a_swapped_weight_file(slot, model, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    asked = {"slot": str(slot), "out": str(out)}
    execute("05_regression.ipynb", "05_regression_tiny.ipynb", **asked)
    result = json.loads((out / "result.json").read_text())
    assert (result["passed"], len(result["goldens"]), len(result["metrics"])) == (True, 2, 2)

    (path,) = (model / "base" / "unet").glob("*.safetensors")
    weights = load_file(path)
    save_file({name: value * 0.9 for name, value in weights.items()}, path, metadata={"format": "pt"})
    with pytest.raises(
        NotebookError, match=r"RegressionError: .*has regressed: golden 01-a-cat-0\.png: the weights are"
    ):
        execute("05_regression.ipynb", "05_regression_red.ipynb", **asked)
    result = json.loads((out / "result.json").read_text())
    assert (result["passed"], len(result["reasons"])) == (False, 2)
    assert result["promoted"]["weights"] != result["redrawn"]["weights"]
    assert open_image(out / "regression.png").width > 3 * 64


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_promoted_nano_has_not_regressed(tmp_path):
    """CI's own guard: the slot that the service embeds, with its goldens and its metric set."""
    execute("05_regression.ipynb", "05_regression.ipynb", out=str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["passed"], result["digest"]) == (True, load_slot(NANO).digest)
