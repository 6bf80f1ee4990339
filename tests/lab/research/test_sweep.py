"""Sweeps are checked before any work, resume exactly, share cells, and give one table however many processes draw."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from sdxl_lab.cli import STOPPED, main
from sdxl_lab.config import ConfigError, GenerationConfig, RefinerConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.evaluation.metrics import METRICS, MetricError
from sdxl_lab.images import max_difference
from sdxl_lab.research.axes import SweepError
from sdxl_lab.research.cache import ImageCache
from sdxl_lab.research.sweep import Sweep, _check_shared, read_table, run_sweep, summary

ROOT = Path(__file__).parents[3]
PROMPT = ["A cat in a hat"]


def settings(sweep: Sweep, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in sweep.settings]


# --- axes ----------------------------------------------------------------------------------------------------------


def test_a_product_has_every_combination_in_the_order_of_the_axes() -> None:
    sweep = Sweep.product(GenerationConfig(), {"steps": [10, 20], "prompt": PROMPT, "seed": range(2)})
    assert settings(sweep, "steps", "seed") == [(10, 0), (10, 1), (20, 0), (20, 1)]
    assert [(cell.config.steps, cell.seed) for cell in sweep.cells] == settings(sweep, "steps", "seed")


def test_zipped_axes_go_together_and_multiply_with_the_others() -> None:
    zipped = [{"scheduler": ["euler", "heun"], "steps": [20, 10]}]
    sweep = Sweep.product(GenerationConfig(), {"prompt": PROMPT, "seed": [3, 4]}, zipped)
    assert settings(sweep, "seed", "scheduler", "steps") == [
        (3, "euler", 20),
        (3, "heun", 10),
        (4, "euler", 20),
        (4, "heun", 10),
    ]


def test_the_weight_of_a_lora_is_an_axis_and_its_file_is_pinned(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(
        'config.loras = ["nano/neon"]\naxes.prompt = ["a cat"]\naxes.loras.0.weight = [0, 0.5, 1]'
    )
    sweep = Sweep.from_toml(tmp_path / "sweep.toml")
    assert settings(sweep, "loras.0.weight") == [(0,), (0.5,), (1,)]
    assert [cell.config.loras[0].weight for cell in sweep.cells] == [0.0, 0.5, 1.0]
    assert {len(cell.config.loras[0].sha256 or "") for cell in sweep.cells} == {64}
    whole = Sweep.product(
        GenerationConfig(), {"prompt": PROMPT, "loras": [[], ["nano/neon:0.5"]], "loras.0.weight": [1]}
    )
    assert [[ref.weight for ref in cell.config.loras] for cell in whole.cells] == [[], [1.0]]


def test_where_there_is_no_refiner_its_fields_do_not_apply() -> None:
    axes = {"refiner.handover": [0.6, 0.8], "refiner": ["none", {"aesthetic_score": 7}], "prompt": PROMPT}
    sweep = Sweep.product(GenerationConfig(), axes)
    assert [cell.config.refiner for cell in sweep.cells] == [
        None,
        RefinerConfig(handover=0.6, aesthetic_score=7),
        RefinerConfig(handover=0.8, aesthetic_score=7),
    ]
    assert settings(sweep, "refiner", "refiner.handover") == [
        (None, None),
        ('{"aesthetic_score": 7}', 0.6),
        ('{"aesthetic_score": 7}', 0.8),
    ]


def test_an_axis_of_whole_configurations_goes_before_its_fields(tmp_path: Path) -> None:
    (tmp_path / "fast.toml").write_text(GenerationConfig(steps=4, guidance_scale=2).to_toml())
    config = GenerationConfig(scheduler="heun")
    axes = {"guidance_scale": [3.0], "config": [tmp_path / "fast.toml", config], "prompt": PROMPT}
    sweep = Sweep.product(GenerationConfig(), axes)
    assert [(c.config.scheduler, c.config.steps, c.config.guidance_scale) for c in sweep.cells] == [
        ("euler", 4, 3.0),
        ("heun", 25, 3.0),
    ]
    assert settings(sweep, "config") == [("fast",), (config.short_digest,)]


def test_two_names_for_one_configuration_are_two_rows_of_one_cell(tmp_path: Path) -> None:
    for name in ("served", "candidate"):
        (tmp_path / f"{name}.toml").write_text(GenerationConfig().to_toml())
    axes = {"config": [tmp_path / "served.toml", tmp_path / "candidate.toml"], "prompt": PROMPT}
    sweep = Sweep.product(GenerationConfig(), axes)
    assert settings(sweep, "config") == [("served",), ("candidate",)]
    assert len(set(sweep.cells)) == 1


# --- bad input -----------------------------------------------------------------------------------------------------

AXES = {"prompt": PROMPT, "seed": [0, 1]}
BAD = {
    "an unknown field": ({"stepz": [1]}, SweepError, "received 'stepz'. Did you mean steps?"),
    "an unknown nested field": ({"refiner.handovr": [0.8]}, SweepError, "Did you mean refiner.handover?"),
    "an empty axis": ({"steps": []}, SweepError, "steps must have at least one value; received none"),
    "an axis that is no list": ({"scheduler": "euler"}, SweepError, "must be a list of values; received 'euler'"),
    "a bad value": ({"steps": [10, 0]}, ConfigError, "steps must be a whole number from 1 to 1000; received 0"),
    "a bad nested value": ({"refiner.handover": [1.5]}, ConfigError, "handover must be a number above 0 and below 1"),
    "a bad scheduler": ({"scheduler": ["eular"]}, ConfigError, "scheduler must be one of euler"),
    "a bad prompt": ({"prompt": [""]}, ConfigError, "prompt must be text of 1 to 2000"),
    "a bad seed": ({"seed": [-1]}, ConfigError, "seed must be a whole number from 0"),
    "a broken range": ({"steps": {"from": 9, "to": 1, "step": 2}}, SweepError, "range of steps must have from, to"),
    "a range without step": ({"steps": {"from": 1, "to": 9}}, SweepError, "and step or count"),
    "a range that does not move": ({"steps": {"from": 1, "to": 9, "step": 0}}, SweepError, "step must be above zero"),
    "an exploding grid": (
        {"steps": range(1, 101), "guidance_scale": range(1, 101)},
        SweepError,
        "at most 10000 cells; received 1 x 2 x 100 x 100 = 20000",
    ),
    "a missing file": ({"config": ["no.toml"]}, OSError, "no.toml"),
}


@pytest.mark.parametrize(("axes", "kind", "said"), BAD.values(), ids=BAD)
def test_bad_axes_are_refused_before_any_work(axes: dict, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=r".*") as caught:
        Sweep.product(GenerationConfig(), AXES | axes)
    assert said in str(caught.value)


def test_other_bad_sweeps_are_refused() -> None:
    config = GenerationConfig()
    with pytest.raises(SweepError, match="must have prompts; received none"):
        Sweep.product(config, {"steps": [1]})
    with pytest.raises(SweepError, match=r"as many values each; received \{'steps': 2, 'scheduler': 1\}"):
        Sweep.product(config, AXES, [{"steps": [1, 2], "scheduler": ["euler"]}])
    with pytest.raises(SweepError, match="given once; received 'seed' 2 times"):
        Sweep.product(config, AXES, [{"seed": [1]}])
    with pytest.raises(MetricError, match="received 'beauty'"):
        Sweep.product(config, AXES, metrics=["beauty"])
    with pytest.raises(SweepError, match="importable module:attribute; received 'no_such:thing'"):
        Sweep.product(config, AXES, metrics=["no_such:thing"])
    with pytest.raises(SweepError, match="must be a Metric; received a function"):
        Sweep.product(config, AXES, metrics=["json:dumps"])
    with pytest.raises(SweepError, match="ssim must have a reference"):
        Sweep.product(config, AXES, metrics=["ssim"])
    assert len(Sweep.product(config, {"prompt": PROMPT, "seed": range(11_000)}, limit=11_000).cells) == 11_000


def test_a_range_is_as_long_as_it_says() -> None:
    axes = {"prompt": PROMPT, "seed": {"from": 0, "to": 14_999, "step": 1}}
    with pytest.raises(SweepError, match="= 15000"):
        Sweep.product(GenerationConfig(), axes)
    assert len(Sweep.product(GenerationConfig(), axes, limit=15_000).cells) == 15_000
    with pytest.raises(SweepError, match="at most 1000000 values; received 10000000000001"):
        Sweep.product(GenerationConfig(), axes | {"seed": {"from": 0, "to": 1e13, "step": 1}})


FILE = """
metrics = ["sharpness", "max_abs"]
reference = { steps = 6 }
config = "base.toml"

[axes]
prompt = ["A cat in a hat"]
seed = { from = 0, to = 1, step = 1 }
refiner.handover = [0.5]

[[zip]]
scheduler = ["euler", "ddim"]
steps = [2, 4]
"""


@pytest.fixture
def file(tmp_path: Path, tiny_config: GenerationConfig) -> Path:
    """A sweep of four cells and two references on the random model."""
    (tmp_path / "base.toml").write_text(tiny_config.to_toml())
    path = tmp_path / "four.toml"
    path.write_text(FILE)
    return path


def test_a_file_and_python_mean_the_same_sweep(file: Path, tiny_config: GenerationConfig) -> None:
    assert Sweep.from_toml(file) == Sweep.product(
        tiny_config,
        {"prompt": PROMPT, "seed": [0, 1], "refiner.handover": [0.5]},
        [{"scheduler": ["euler", "ddim"], "steps": [2, 4]}],
        metrics=["sharpness", METRICS["max_abs"]],
        reference=tiny_config.with_(steps=6),
        name="four",
    )


BAD_FILES = {
    "no TOML": ("[axes", SweepError, "must be valid TOML"),
    "an unknown key": ("axis = 1", SweepError, "received 'axis'. Did you mean axes?"),
    "axes that are no table": ("axes = 3", SweepError, "axes must be a table; received 3"),
    "a bad field in config": ("config = { stepz = 3 }", SweepError, "received 'stepz'. Did you mean steps?"),
    "a bad value in config": ("config = { steps = 0 }", ConfigError, "received 0"),
    "a bad value in the reference": (FILE.replace("steps = 6", "steps = 0"), ConfigError, "received 0"),
    "a model that is no name": ("model = 3", SweepError, "received 3"),
    "metrics that are no list": ("metrics = 'ssim'\n[axes]\nprompt = ['a cat']", SweepError, "must be a list"),
    "a limit that is no number": ("limit = 'no'\n[axes]\nprompt = ['a cat']", SweepError, "received 'no'"),
    "no prompts": ("[axes]\nsteps = [1]", SweepError, "must have prompts"),
}


@pytest.mark.parametrize(("text", "kind", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(file: Path, text: str, kind: type[Exception], said: str) -> None:
    file.write_text(text)
    with pytest.raises(kind) as caught:
        Sweep.from_toml(file)
    assert said in str(caught.value)


# --- running -------------------------------------------------------------------------------------------------------


def test_the_table_has_settings_numbers_images_and_errors(
    tmp_path: Path, engine: Engine, tiny_config: GenerationConfig
) -> None:
    (tmp_path / "tiny.toml").write_text(tiny_config.to_toml())
    axes = {"prompt": PROMPT, "seed": [0, 1], "steps": [1, 4], "refiner.handover": [0.9]}
    sweep = Sweep.product(tiny_config, axes | {"config": [tmp_path / "tiny.toml"]}, metrics=["sharpness"])
    table = run_sweep(sweep, out=tmp_path / "out", cache=tmp_path / "cache", engine=engine)
    assert table["steps"].tolist() == [1, 4, 1, 4]
    assert table["seed"].tolist() == [0, 0, 1, 1]
    assert table["unet_rows"].isna().tolist() == [True, False, True, False]
    assert table["error"].str.startswith("ConfigError: steps must be enough").tolist()[::2] == [True, True]
    assert table["error"].isna().tolist() == [False, True, False, True]
    assert table["image"].isna().tolist() == [True, False, True, False]
    drawn = table.dropna(subset="image")
    store = ImageCache(tmp_path / "cache", engine=engine)
    for _, row in drawn.iterrows():
        image = store.image(row["image"])
        assert row["sharpness"] == METRICS["sharpness"]([image])[0]
        assert row["digest"] == image.record.digest
        assert GenerationConfig.from_dict(json.loads(row["settings"])).digest == row["digest"]
        assert row["seconds"] == image.timings["denoise_ms"] / 1000
    pd.testing.assert_frame_equal(read_table(tmp_path / "out"), table)
    means = summary(sweep, table)
    assert set(table["config"]) == {"tiny"}
    assert means.index.names == ["steps", "refiner.handover", "config"]
    assert math.isclose(means.loc[(4, 0.9, "tiny"), "sharpness"], drawn["sharpness"].mean())
    assert means["cells"].tolist() == [2, 2]


def test_two_sweeps_share_cells_and_a_second_run_draws_nothing(
    tmp_path: Path, engine: Engine, tiny_config: GenerationConfig, submitted: list
) -> None:
    def swept(**axes: Any) -> pd.DataFrame:
        sweep = Sweep.product(tiny_config, {"prompt": PROMPT, **axes})
        return run_sweep(sweep, out=tmp_path / "out", cache=tmp_path / "cache", engine=engine)

    first = swept(seed=[0, 1], steps=[3, 4])
    assert len(submitted) == 4
    pd.testing.assert_frame_equal(swept(seed=[0, 1], steps=[3, 4]), first)
    assert len(submitted) == 4
    second = swept(scheduler=["euler", "ddim"], seed=[1])
    assert len(submitted) == 5, "euler at 4 steps is known"
    assert second["image"][0] == first["image"][3]


def test_a_damaged_table_says_so_and_is_made_again_from_the_cache(
    tmp_path: Path, engine: Engine, tiny_config: GenerationConfig, submitted: list
) -> None:
    sweep = Sweep.product(tiny_config, AXES, metrics=["contrast"])
    table = run_sweep(sweep, out=tmp_path / "out", cache=tmp_path / "cache", engine=engine)
    path = tmp_path / "out" / "table.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SweepError, match="run the sweep again, and it is made from the cache without drawing"):
        read_table(path)
    with pytest.raises(SweepError, match=r"nowhere .*FileNotFoundError"):
        read_table(tmp_path / "nowhere")
    run_sweep(sweep, out=tmp_path / "out", cache=tmp_path / "cache", engine=engine)
    pd.testing.assert_frame_equal(read_table(path), table)
    assert len(submitted) == 2


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_draws_then_only_reads(file: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    out, cache = file.parent / "out", file.parent / "cache"
    command = ["sweep", str(file), "--out", str(out), "--cache", str(cache)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 cells, 0 failed" in said
    assert "sharpness" in said
    table = read_table(out)
    assert table["max_abs"].gt(0).all()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", lambda *_: pytest.fail("nothing is missing"))
        assert main(command) == 0
    pd.testing.assert_frame_equal(read_table(out), table)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_says_how_to_go_on(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sweep", str(file), "--out", str(file.parent / "out")]) == STOPPED
    assert "what is finished is kept in runs/cache; to go on, run the same command again" in capsys.readouterr().err


def test_bad_input_is_one_line(file: Path, capsys: pytest.CaptureFixture) -> None:
    file.write_text("[axes]\nstepz = [1]")
    assert main(["sweep", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: an axis must be prompt, prompt_2, seed, config or a field of the configuration")
    assert said.count("\n") == 1


def finished(cache: Path) -> set[str]:
    return {path.stem for path in cache.glob("*.json")}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(file: Path, tiny_config: GenerationConfig) -> None:
    """SIGKILL in the middle: no handler, no goodbye."""
    file.write_text(FILE.replace("to = 1,", "to = 39,"))
    out, cache = file.parent / "out", file.parent / "cache"
    command = [sys.executable, "-m", "sdxl_lab", "sweep", str(file), "--out", str(out), "--cache", str(cache)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while len(finished(cache)) < 10:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = finished(cache)
    assert 10 <= len(kept) < 120
    assert not (out / "table.parquet").exists()
    times = {key: (cache / f"{key}.png").stat().st_mtime_ns for key in kept}
    told: list[Any] = []
    table = run_sweep(Sweep.from_toml(file), out=out, cache=cache, on_progress=told.append)
    assert told[-1].done == told[-1].total == 120
    assert told[-1].drawn == 120 - told[0].done
    assert told[0].done >= len(kept) - 1, "all but one that the kill may have left without its numbers"
    assert {key: (cache / f"{key}.png").stat().st_mtime_ns for key in kept} == times
    assert len(table) == 80
    assert table["error"].isna().all()


# accelerate's own launcher, which takes `--multi_gpu` for several processes on CPUs too.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def test_machines_with_folders_of_their_own_are_told_to_share_one(tmp_path: Path) -> None:
    with ImageCache(tmp_path) as store:
        _check_shared(store, ["drawn by nobody"], {"drawn by nobody": "it failed, which is an answer"})
        with pytest.raises(SweepError, match=r"one folder that every machine sees; .* lacks 1 cells"):
            _check_shared(store, ["drawn elsewhere"], {})


@pytest.mark.slow
def test_the_cells_of_a_killed_rank_are_drawn_when_the_sweep_goes_on(file: Path) -> None:
    """SIGKILL to one of two processes: the launcher ends both; a second launch draws what is missing, and only that."""
    file.write_text(FILE.replace("to = 1,", "to = 19,"))
    out, cache = file.parent / "out", file.parent / "cache"
    command = [*LAUNCH, "-m", "sdxl_lab", "sweep", str(file), "--out", str(out), "--cache", str(cache)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment)
    while len(finished(cache)) < 6:
        assert launcher.poll() is None, "it ended before a rank could be killed"
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(launcher.pid).children() if "LOCAL_RANK" in child.environ()]
    assert len(ranks) == 2
    next(rank for rank in ranks if rank.environ()["LOCAL_RANK"] == "1").kill()
    assert launcher.wait(240) != 0
    kept = {key: (cache / f"{key}.png").stat().st_mtime_ns for key in finished(cache)}
    assert 6 <= len(kept) < 60
    assert not (out / "table.parquet").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    table = read_table(out)
    assert len(table) == 40
    assert table["error"].isna().all()
    assert {key: (cache / f"{key}.png").stat().st_mtime_ns for key in kept} == kept


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(file: Path) -> None:
    out, cache = file.parent / "two", file.parent / "cache-of-two"
    text = FILE.replace("to = 1,", "to = 7,").replace("steps = [2, 4]", "steps = [1, 4]")  # one step: no refiner's
    file.write_text(text)
    done = subprocess.run(
        [*LAUNCH, "-m", "sdxl_lab", "sweep", str(file), "--out", str(out), "--cache", str(cache)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("16 cells, 8 failed") == 1, done.stdout
    two = read_table(out)
    one = run_sweep(Sweep.from_toml(file), out=file.parent / "one", cache=file.parent / "cache-of-one")
    assert one["error"].notna().sum() == 8
    numbers = ["sharpness", "max_abs"]
    pd.testing.assert_frame_equal(two.drop(columns=["seconds", *numbers]), one.drop(columns=["seconds", *numbers]))
    # Cells share UNet calls with others here than there: float32 differs by 1e-6, and now and then one of 8 bits.
    pd.testing.assert_frame_equal(two[numbers], one[numbers], check_exact=False, rtol=1e-3, atol=1.01 / 255)
    for key in one["image"].dropna():
        images = [ImageCache(file.parent / f"cache-of-{name}").image(key).image for name in ("one", "two")]
        assert max_difference(*images) <= 1.01 / 255


def test_a_second_prompt_is_an_axis_and_a_part_of_the_cell() -> None:
    sweep = Sweep.product(GenerationConfig(), {"prompt": PROMPT, "prompt_2": ["none", "a boat"]})
    assert [cell.prompt_2 for cell in sweep.cells] == [None, "a boat"]
    assert settings(sweep, "prompt_2") == [(None,), ("a boat",)]
    with ImageCache() as cached:
        keys = {cached.key(cell) for cell in sweep.cells}
        assert len(keys) == 2
        assert cached.key(Sweep.product(GenerationConfig(), {"prompt": PROMPT}).cells[0]) in keys


def test_the_table_tells_which_words_were_cut(engine: Engine, tiny_config: GenerationConfig, tmp_path: Path) -> None:
    axes = {"prompt": ["cat " * 75 + "hat", "cat"], "prompt_syntax": ["plain", "a1111"]}
    sweep = Sweep.product(tiny_config.with_(steps=1), axes)
    table = run_sweep(sweep, out=tmp_path / "out", cache=tmp_path / "cache", engine=engine)
    told = table["warning"].isna().tolist()
    assert told == [False, True, True, True]
    assert "cut 'hat'" in table["warning"][0]
    again = run_sweep(sweep, out=tmp_path / "out", cache=tmp_path / "cache", engine=engine)
    assert again["warning"][0] == table["warning"][0]
