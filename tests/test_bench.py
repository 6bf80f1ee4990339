"""The benchmarks run; what they measure is for people to read."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from bench import __main__ as bench
from bench.measure import Report, alternate

SMALL = ["--pictures", "2", "--steps", "2", "--side", "64", "--rounds", "1"]


def run(name: str, tiny_model: Path, folder: Path) -> dict[str, dict[str, list[float]]]:
    """The values of every report that a benchmark left."""
    bench.main([name, "--model", str(tiny_model), "--folder", str(folder), *SMALL])
    reports = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for name in reports:
        with Image.open(folder / f"{name}.png") as plot:
            assert plot.width > 500
    return {name: report["values"] for name, report in reports.items()}


@pytest.mark.parametrize("name", ["parity", "overhead", "cancel", "growth"])
@pytest.mark.slow
def test_a_benchmark_of_the_engine_leaves_its_figures(name, tiny_model, tmp_path, capsys):
    values = run(name, tiny_model, tmp_path)[name]
    assert all(math.isfinite(value) and value >= 0 for each in values.values() for value in each)
    printed = capsys.readouterr().out
    assert all(label in printed for label in values)
    if name == "parity":
        assert values["largest of all"][0] <= 1e-3
        assert len(next(iter(values.values()))) == 18


@pytest.mark.slow
def test_the_clip_score_is_held_against_the_scene_check(tiny_model, tmp_path):
    """Also where a model draws nothing right, and so leaves nothing to compare."""
    values = run("clip-truth", tiny_model, tmp_path)["clip-truth"]
    shares = [each for label, each in values.items() if "rank" not in label]
    assert all(0 <= value <= 1 for each in shares for value in each)
    assert {
        part
        for label in values
        for part in ("colour", "noun", "relation")
        if label.endswith("true one wins") and part in label
    }


@pytest.mark.slow
def test_ratios_are_those_of_the_rates(tiny_model, tmp_path):
    for values in run("throughput", tiny_model, tmp_path).values():
        served, locked = values["service, float32"][0], values["(b) FastAPI, pipeline behind a lock"][0]
        assert values["service / (b)"][0] == pytest.approx(served / locked)
        assert all(value > 0 for each in values.values() for value in each)


def test_trials_alternate_and_the_first_round_does_not_count():
    calls = []
    measured = alternate({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert measured == {"a": [3, 5], "b": [4, 6]}


def test_a_report_prints_the_median_the_spread_and_the_aim(tmp_path, capsys):
    Report("some", "Some title", {"line": [3.0, 1.0, 2.0]}, "two cores", {"line": "1.5"}).show(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["line", "2", "1", "3", "aim:", "1.5"]
    assert json.loads((tmp_path / "some.json").read_text())["values"] == {"line": [3.0, 1.0, 2.0]}


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "NAME must be one of parity, overhead" in capsys.readouterr().err


def test_without_a_gpu_its_benchmark_says_that_nothing_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bench.main(["gpu", "--folder", str(tmp_path)])
    assert "not measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
