"""The benchmarks run; their figures are for people to read."""

import json
import math
import os
import re
import time
from contextlib import contextmanager, nullcontext
from email.message import Message
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import __main__ as bench
from bench import call, clip_truth, fleet, imports, lora, neighbours, queueing, scaling, soak, throughput
from bench.clients import Answer
from bench.measure import Report, alternate
from bench.random_sdxl import new_unet
from bench.settings import config_of
from bench.simulate import Cost
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.job import ImageRequest

SMALL = ["--images", "2", "--steps", "2", "--side", "64", "--rounds", "1"]


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
def test_an_image_is_timed_beside_processes_and_a_second_engine(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "STEPS", 2)
    few = {name: neighbours.SUBJECTS[name] for name in (neighbours.OURS, "one thread")}
    monkeypatch.setattr(neighbours, "SUBJECTS", few)
    values = run("neighbours", tiny_model, tmp_path)["neighbours"]
    assert all(len(each) == 1 and each[0] > 0 for each in values.values())
    for company in (neighbours.ALONE, neighbours.ONE, neighbours.TWO, neighbours.ENGINE):
        assert {f"{name}, {company}" for name in neighbours.SUBJECTS} <= values.keys()


def test_an_image_that_takes_too_long_is_cancelled_and_reckoned_by_its_steps(tiny_config, monkeypatch):
    monkeypatch.setattr(neighbours, "LONGEST", 0.3)
    with Engine.load(tiny_config) as engine:
        engine.draw(ImageRequest(tiny_config, "a cat", 0))
        slow = engine.models.base.unet.forward
        monkeypatch.setattr(engine.models.base.unet, "forward", lambda *a, **k: time.sleep(0.1) or slow(*a, **k))
        assert neighbours._seconds(engine, tiny_config.with_(steps=100)) > 5


@pytest.mark.slow
def test_a_call_is_taken_apart_and_each_trial_is_set_against_diffusers_own(tiny_model, tmp_path, monkeypatch):
    for name, value in {"ROWS": (2,), "isolated": in_this_process}.items():
        monkeypatch.setattr(call, name, value)
    for change in (lambda: monkeypatch.setenv(call.KEEPING[0], ""), lambda: monkeypatch.delenv(call.KEEPING[0])):
        change()  # so that what the benchmark sets is taken back
    bench.main(["call", "--model", str(tiny_model), "--folder", str(tmp_path), *SMALL])
    trials, shares = (
        json.loads((tmp_path / f"{name}.json").read_text())["values"] for name in ("call", "call-profile")
    )
    for trial in call.TRIALS:
        assert all(0.01 < ratio < 100 for ratio in trials[f"2 rows: {trial}"])
    for trial in (call.DIFFUSERS, call.LEAN, call.LAST):
        found = {label: each[0] for label, each in shares.items() if label.startswith(f"2 rows, {trial}: ")}
        whole = found.pop(f"2 rows, {trial}: {call.WHOLE}")
        assert sum(found.values()) == pytest.approx(whole)
        assert all(found[f"2 rows, {trial}: {kind}"] > 0 for kind in call.KINDS)


def test_the_texts_share_of_a_call_is_counted_as_on_paper():
    """SDXL has 10 transformer blocks of 640 channels and 60 of 1,280, and each projects 77 tokens of 2,048 twice."""
    with torch.device("meta"):
        share, megabytes = call.text_share(new_unet(), 1024)
    channels = 10 * 640 + 60 * 1280
    assert megabytes == pytest.approx(2 * 77 * channels * 2 / 1e6)
    assert share * 6.76e12 == pytest.approx(2 * 2 * 77 * 2048 * channels, rel=0.01)


@pytest.mark.slow
def test_the_clip_score_is_compared_with_the_scene_check(tiny_model, tmp_path, monkeypatch):
    """Also for a model that draws nothing right, and so leaves nothing to compare."""
    monkeypatch.setattr(clip_truth, "RENDERINGS", 20)
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
def test_new_processes_are_timed_to_their_end(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "IMPORTS", ("import torch", "import sdxl_lab.config"))
    values = run("imports", tiny_model / "base", tmp_path)["imports"]
    names = ["import torch", "import sdxl_lab.config", "generate, the whole command", "service until /readyz"]
    assert list(values) == [*names, *(f"{name} / import torch" for name in names[1:])]
    assert all(value > 0 for each in values.values() for value in each)
    assert values["import sdxl_lab.config / import torch"][0] < 1


@pytest.mark.parametrize("program", imports.IMPORTS)
def test_what_is_timed_can_be_imported(program):
    exec(program, {})


@contextmanager
def in_this_process(make, *arguments):
    """`isolated` in this process; `overhead` tests the real one."""
    subject = make(*arguments)
    with subject if hasattr(subject, "__exit__") else nullcontext():
        yield lambda work, *more: work(subject, *more)


@pytest.mark.slow
def test_ratios_are_those_of_the_rates(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "isolated", in_this_process)
    for values in run("throughput", tiny_model, tmp_path).values():
        served, locked = values["service, float32"][0], values["(b) FastAPI, pipeline behind a lock"][0]
        assert values["service / (b)"][0] == pytest.approx(served / locked)
        assert all(value > 0 for each in values.values() for value in each)


@pytest.mark.slow
def test_loras_are_mixed_and_switched(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "isolated", in_this_process)
    monkeypatch.setattr(lora, "SHAPES", {"a layer": (16, 8, 4, 2)})
    found = run("lora", tiny_model, tmp_path)
    batch, apart = (found["lora"][name][0] for name in ("four mixes in one batch", "four mixes, one after the other"))
    assert found["lora"]["one after the other / one batch"][0] == pytest.approx(apart / batch)
    assert len([label for label in found["lora-layer"] if label.endswith("/ plain")]) == 3
    assert all(value > 0 for values in found.values() for each in values.values() for value in each)


def test_every_way_to_mix_a_layer_computes_the_same():
    torch.manual_seed(0)
    ways, x = lora._ways(16, 8, 2), torch.randn(lora.ROWS, 4, 16)
    with torch.inference_mode():
        first, *others = (way(x) for way in ways.values())
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)
    assert len(others) == 2


@pytest.mark.slow
def test_fleets_are_simulated(tiny_model, tmp_path, capsys, monkeypatch):
    for name, value in {"REPLICAS": (1, 3, 10), "LOADS": (0.2, 0.6, 1.2), "RUNS": 1}.items():
        monkeypatch.setattr(scaling, name, value)
    (tmp_path / "fleet-costs.json").write_text(
        json.dumps({"values": {f"fitted: ms {name}": [20.0] for name in ("call", "row", "image", "beside")}})
    )
    bench.main(["scaling", "--model", str(tiny_model), "--folder", str(tmp_path), "--images", "1"])
    found = json.loads((tmp_path / "scaling.json").read_text())
    for name, each in found["fleets"].items():
        assert 0 < each["target"]["1"] < each["target"]["3"] < each["target"]["10"] < 1.2 * each["capacity"]
        assert [p["refused"] > 0 for p in each["points"]["1"]] == [False, False, True]
        assert found["costs"][name.partition(", g")[0].removesuffix(", interval")]["row"] > 0
    assert len(found["fleets"]) == 2 * len(found["costs"]) == 6
    with Image.open(tmp_path / "scaling.png") as plot:
        assert plot.width > 500
    assert "p99 passes twice the time alone" in capsys.readouterr().out


@pytest.mark.slow
def test_orders_are_compared(tmp_path, capsys, monkeypatch):
    for name, value in {
        "EACH": 300,
        "RUNS": 2,
        "PATIENCES": (1e9,),
        "STRETCHES": (1.5,),
        "THRIFTS": (1.0, 1e9),
    }.items():
        monkeypatch.setattr(queueing, name, value)
    bench.main(["queueing", "--folder", str(tmp_path), "--images", "1"])
    found = json.loads((tmp_path / "queueing.json").read_text())
    assert not found["wrong"]
    for load in ("50%", "70%", "85%"):
        assert found["values"][f"compiled, {load}: equal, mean / one at a time"] == pytest.approx([1, 1])
    assert max(found["values"]["compiled, 85%: mean / one at a time"]) < 1
    constants = found["constants"]
    assert constants["PATIENCE 10, STRETCH 1.5"] != constants["PATIENCE 1e+09, STRETCH 3"]  # they reach the batcher
    rows = [next(iter(constants[f"THRIFT {thrift:g}"].values()))["rows of a call"] for thrift in (1e9, 1.0)]
    assert rows[0] > rows[1] > 2
    with Image.open(tmp_path / "queueing.png") as plot:
        assert plot.width > 500
    assert "eager, full calls, 85%, mixed, shortest" in capsys.readouterr().out


def test_the_published_times_of_an_h100_come_out_of_its_computed_costs():
    guided = ((2, 30),)
    assert scaling.MACHINES["H100, eager"].alone(guided) == pytest.approx(2.496)
    assert scaling.MACHINES["H100, compiled"].alone(guided) == pytest.approx(1.471)


def test_costs_are_fitted_from_what_a_replica_counts():
    cost = Cost(call=0.02, row=0.005, image=0.04, beside=0.03)
    costs = lambda k: (2.0 * k, cost.call + cost.row * 2 * k, cost.image * k + cost.beside)  # noqa: E731
    slow_minute = (2.0, 9.9, 9.9)
    seen = fleet.fit_costs(
        {k: [costs(k), costs(k), costs(k)] for k in (2, 4, 8)} | {1: [costs(1), slow_minute, costs(1)]}
    )
    assert vars(seen) == pytest.approx(vars(cost))


def test_the_simulated_rows_are_those_of_the_engine(tiny_model):
    config = config_of(bench.Size(model=str(tiny_model), side=64, steps=30))
    assert fleet.work_of(config) == ((2, 30),)
    assert fleet.work_of(config.with_(guidance_interval=fleet.INTERVAL)) == ((1, 5), (2, 22), (1, 3))
    assert fleet.work_of(config.with_(guidance_scale=1.0)) == ((1, 30),)


def test_what_is_started_while_pinned_stays_there_and_the_test_does_not():
    before = os.sched_getaffinity(0)
    core = min(before)
    with fleet.pinned([core]):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


def test_measurements_alternate_and_the_first_round_does_not_count():
    calls = []
    measured = alternate({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert measured == {"a": [3, 5], "b": [4, 6]}


def test_a_report_prints_the_median_the_spread_and_the_aim(tmp_path, capsys):
    Report("some", "Some title", {"line": [3.0, 1.0, 2.0]}, "two cores", {"line": "1.5"}).show(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["line", "2", "1", "3", "aim:", "1.5"]
    assert json.loads((tmp_path / "some.json").read_text())["values"] == {"line": [3.0, 1.0, 2.0]}


def test_the_readme_names_every_benchmark():
    page = (Path(bench.__file__).parent / "README.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.M) == list(bench.BENCHMARKS)


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "NAME must be one of parity, overhead" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_soak_loses_and_doubles_nothing(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["soak", "--model", str(tiny_model), "--folder", str(tmp_path), "--minutes", "0.1"]
    bench.main([*arguments, "--side", "64", "--steps", "6"])
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["wrong"] == []
    values = {label: value for label, (value,) in report["values"].items()}
    assert values["acknowledged images"] > 0
    assert values["acknowledged and lost"] == values["stored and never requested"] == 0
    with Image.open(tmp_path / "soak.png") as plot:
        assert plot.width > 500
    assert "/healthz, p99 ms" in capsys.readouterr().out


def test_a_soak_sees_what_is_lost_doubled_or_left(monkeypatch):
    """Against a service that lists one image twice, one that nobody asked for, and not the one it acknowledged."""
    states = {"left": {"state": "running"}, "gone": {"status": 404}, "cut": {"state": "cancelled"}}
    stored = ["a", "a", "stranger", "before", "of a key"]
    monkeypatch.setattr(soak, "listed", lambda _: iter(stored))
    answers = {"/download/a": b"\x89PNG", "/download/of a key": b"no"}
    answers |= {f"/images/{image}": json.dumps(state).encode() for image, state in states.items()}
    monkeypatch.setattr(soak, "request", lambda port, method, path: Answer(200, answers[path], Message()))
    ledger = soak.Ledger(unsettled=set(states))
    for image in ("a", "lost", "a"):
        ledger.acknowledge(image, "done")
    ledger.acknowledge("of a key", "done", "key")
    ledger.acknowledge("of a key", "done", "key")
    assert ledger.wrong == ["two answers have the id a"]
    figures = soak.reconcile(0, ledger, {"before"})
    assert ledger.wrong[1:] == [
        "lost was acknowledged and is not listed",
        "stranger is stored and was never requested",
        "a is listed 2 times",
        "of a key cannot be downloaded",
        "left was left, and is running",
    ]
    assert figures["acknowledged and lost"] == figures["stored and never requested"] == 1
    ledger.acknowledge("another", "done", "key")
    assert "the key key stands for another and of a key" in ledger.wrong
