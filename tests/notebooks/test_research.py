"""The notebooks that tune, run by papermill on nano in small; judged by the tables and configurations they leave."""

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from PIL import Image

from sdxl_lab.config import GenerationConfig
from sdxl_lab.notebook.runner import EXECUTED, ROOT, run_notebook
from sdxl_lab.research.sweep import read_table

PROMPTS = ["a red circle on a white background", "A cat in a hat"]


def execute(name: str, folder: Path, /, **parameters: object) -> str:
    """Run a notebook in small; gives what it printed."""
    config = folder / "start.toml"
    config.write_text(GenerationConfig(scheduler="dpmpp_2m", width=128, height=128).to_toml())
    work = {"prompts": PROMPTS, "seeds": 2, "cache": str(folder / "cache"), "out": str(folder / "out")}
    given = {"config": str(config)} | work | parameters
    copy = run_notebook(ROOT / "notebooks" / name, given, out=ROOT / EXECUTED / name, cell_seconds=240)
    cells = nbformat.read(copy, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def whole(table: pd.DataFrame, rows: int) -> pd.DataFrame:
    assert len(table) == rows
    assert table.error.isna().all()
    assert table.image.nunique() == rows
    return table


@pytest.mark.slow
def test_schedulers_are_compared_and_a_configuration_is_kept(tmp_path: Path) -> None:
    axes = {"schedulers": ["euler", "euler_a"], "steps": [2, 6], "guidance": [1.0, 3.0]}
    said = execute("02_schedulers.ipynb", tmp_path, **axes)
    out = tmp_path / "out"

    table = whole(read_table(out), 2 * 2 * 4)
    ssim = table.groupby(["scheduler", "steps"]).ssim.mean()
    assert ssim["euler", 6] > ssim["euler", 2]
    assert ssim["euler", 6] > ssim["euler_a", 6], "the ancestral one arrives elsewhere"
    guided = whole(read_table(out / "guidance"), 2 * 2 * 4)
    rows = guided.groupby(["guidance_scale", guided.guidance_interval.notna()]).unet_rows.mean()
    assert rows[1.0, False] == rows[1.0, True] < rows[3.0, True] < rows[3.0, False]

    chosen = GenerationConfig.from_toml(out / "config.toml")
    assert chosen.digest in set(guided.digest)
    assert (chosen.scheduler, chosen.steps) in set(zip(table.scheduler, table.steps, strict=True))
    assert f"best: {chosen.scheduler}, {chosen.steps} steps" in said
    assert f"scale {chosen.guidance_scale:g}" in said
    plots = {path.name for path in out.glob("*.png")}
    assert plots == {"schedulers.png", "convergence.png", "quality.png", "guidance.png", "guidance-curves.png"}


@pytest.mark.slow
def test_the_refiner_is_held_against_the_base_alone(tmp_path: Path) -> None:
    axes = {"steps": 6, "handovers": [0.5, 0.8], "aesthetic_scores": [2.0, 10.0], "strengths": [0.2, 0.6]}
    said = execute("03_refiner.ipynb", tmp_path, **axes)
    out = tmp_path / "out"

    alone = whole(read_table(out / "alone"), 4)
    handed = whole(read_table(out / "handover"), 2 * 4)
    scored = whole(read_table(out / "score"), 2 * 4)
    assert set(alone.digest) & set(handed.digest) == set()
    assert scored.groupby(["prompt", "seed"]).sharpness.nunique().min() == 2, "the aesthetic score changes the image"

    chosen = GenerationConfig.from_toml(out / "config.toml")
    assert (chosen.scheduler, chosen.steps) == ("dpmpp_2m", 6)
    assert ("With the refiner" in said) == (chosen.refiner is not None)
    for name in ("handover", "strength"):
        with Image.open(out / f"{name}.png") as sheet:
            assert sheet.width > 3 * 128
    assert {path.stem for path in out.glob("*-curves.png")} == {"handover-curves", "score-curves", "strength-curves"}


@pytest.mark.slow
def test_the_weight_of_a_lora_is_an_axis_of_one_batch(tmp_path: Path) -> None:
    said = execute("06_adapters.ipynb", tmp_path, weights=[0.0, 0.5, 1.0], guidance=[1.0, 3.0])
    out = tmp_path / "out"

    table = whole(read_table(out), 3 * 2 * 4)
    moved = table.groupby("loras.0.weight").ssim.mean()
    assert moved[0.0] > moved[0.5] > moved[1.0], "the more of it, the less like the image without"
    plain = table[(table["loras.0.weight"] == 0) & (table.guidance_scale == 3.0)]
    assert len(plain) == 4
    words = whole(read_table(out / "words"), 3 * 3)
    assert set(words.prompt) == {f"A cat in a (hat:{weight:g})" for weight in (0.5, 1, 1.5)}
    mixed = read_table(out / "mixes")
    assert mixed.image.nunique() == 5
    assert mixed.error.isna().all()

    chosen = GenerationConfig.from_toml(out / "config.toml")
    assert len(chosen.loras[0].sha256 or "") == 64
    assert f"Weight {chosen.loras[0].weight:g}" in said
    assert "images in" in said
    assert {path.name for path in out.glob("*.png")} == {"weights.png", "curves.png", "words.png", "mixes.png"}
