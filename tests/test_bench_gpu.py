"""The GPU's benchmark, on a CPU and small shapes: the command, its page, and what it does where a part fails."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo

from bench import __main__ as bench
from bench import contenders, gpu, random_sdxl
from bench.contenders import PIPELINE, PROCESSES
from bench.cost import PARAMETERS
from bench.gpu_page import page
from bench.worker import WorkerError, one_line
from sdxl_lab.config import RuntimeProfile

ROOT = Path(__file__).parents[1]
# Most of its time is six processes that import torch; the minutes are for a machine that does other things too.
TRIAL = ["gpu", "--device", "cpu", "--scale", "tiny", "--rounds", "2", "--minutes", "30"]
NAMES = [name for names in PROCESSES.values() for name in names]
ENGINES = [name for name in NAMES if name != PIPELINE]


class Here:
    """A worker without a process: all it is told is done in this one, at once."""

    fails: tuple[tuple[object, ...], ...] = ()  # names of functions, each with the arguments with which it fails

    def __init__(self, make, *arguments):
        self.subject = self.lost = None
        self.answers = []
        self.make = make, arguments

    def send(self, work, *more):
        self.answers.append((work, more))

    def result(self, until):
        work, more = self.answers.pop(0)
        try:
            if self.subject is None:
                make, arguments = self.make
                self._check(make, arguments)
                self.subject = make(*arguments)
            self._check(work, more)
            return work(self.subject, *more)
        except Exception as error:
            raise WorkerError(one_line(error)) from error

    def _check(self, work, more):
        if any((work.__name__, *more) == fail for fail in self.fails):
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    def call(self, until, work, *more):
        self.send(work, *more)
        return self.result(until)

    def close(self):
        for engine in getattr(self.subject, "engines", {}).values():
            engine.close()


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """Runs the command in this process, but for the tests and the slot, and returns the report and the page."""
    monkeypatch.setattr(gpu, "Worker", Here)
    monkeypatch.setattr(gpu, "gpu_tests", lambda bench, part: setattr(part, "outcome", "11 skipped"))
    monkeypatch.setattr(gpu, "slot", lambda bench, part: setattr(part, "outcome", "3 goldens"))
    monkeypatch.setattr(contenders, "ROWS", (2, 16, 1))
    monkeypatch.setattr(gpu, "CALLS", 2)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # as the command does; torch reads it when it is imported

    def run(*fails, **replaced):
        monkeypatch.setattr(Here, "fails", fails)
        for name, work in replaced.items():
            monkeypatch.setattr(gpu, name, work)
        with torch._dynamo.config.patch(disable=True):
            bench.main([*TRIAL, "--folder", str(tmp_path)])
        return json.loads((tmp_path / "gpu-trial.json").read_text()), (tmp_path / "gpu-trial.md").read_text()

    return run


def parts_of(report):
    return {part["name"]: part for part in report["parts"]}


def failed_of(written):
    """What the page says of each part in its column `failed`."""
    rows = re.findall(r"^\| ([\w ]+) \| \d+ \| \d+ \| (.*) \| (.*) \|$", written, re.M)
    return {name: failed for name, _, failed in rows}


def check(report):
    """All figures are there for each way, and they agree with one another."""
    values = report["values"]
    for count in gpu.COUNTS:
        theirs = values[f"{PIPELINE}, {count} at once: s an image"]
        assert len(theirs) == 2
        for name in ENGINES:
            mine = values[f"{name}, {count} at once: s an image"]
            ratios = values[f"pipeline / {name}, {count} at once"]
            assert ratios == pytest.approx([one / other for one, other in zip(theirs, mine, strict=True)])
            assert values[f"{name}, {count} at once: rows a call"][0] in (2, 2.0 * count)
    for name in ENGINES:
        found = report["calibration"][name]
        seconds = {int(rows): np.median(each) for rows, each in found["seconds"].items()}
        assert found["first call, s"].keys() == found["seconds"].keys()
        assert found["rows chosen"] == chosen(seconds)
        # The same weights make the same image. That it is none of one colour, another test says.
        assert values[f"{name}: largest difference from the pipeline's image, 2 steps, of 255"][0] <= 1


def chosen(seconds):
    """The fewest rows within a tenth of the least seconds a row."""
    prices = {rows: each / rows for rows, each in seconds.items()}
    return min(rows for rows, price in prices.items() if price <= 1.1 * min(prices.values()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_command_runs_on_a_cpu_and_small_shapes(tmp_path):
    """With its processes, the GPU's tests (which are skipped), and the slot's goldens."""
    command = [sys.executable, "-m", "bench", *TRIAL, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu-trial.json").read_text())
    parts = parts_of(report)
    assert {name: part["problems"] for name, part in parts.items()} == {name: [] for name in gpu.DONE_BY}, done.stdout
    assert re.fullmatch(r"\d+ (skipped|passed)", parts["gpu tests"]["outcome"])
    assert all(part["took"] <= part["budget"] for part in parts.values())
    check(report)
    assert [set(found["seconds"]) for name, found in report["calibration"].items() if name != PIPELINE] == [
        {"1", "2", "4", "8", "16"}
    ] * len(ENGINES)
    assert max(report["values"]["slot nano: largest difference from a golden of a CPU, of 255"]) <= 1
    assert (tmp_path / "gpu-trial.md").read_text() == page(tmp_path / "gpu-trial.json")
    assert "gpu tests: " in done.stdout


def test_the_page_has_every_part_and_every_figure(trial):
    report, written = trial()
    check(report)
    assert failed_of(written) == dict.fromkeys(gpu.DONE_BY, "nothing")
    assert all(f"| {label} |" in written for label in report["values"] if not label.endswith("ms a call"))
    for name in ENGINES:
        (row,) = re.findall(rf"^\| {name} \| (.*) \| (\d+) \|$", written, re.M)
        assert len(row[0].split(" | ")) == 3
        assert int(row[1]) == report["calibration"][name]["rows chosen"]
    assert f"| torch | {torch.__version__} |" in written
    assert "| compiler | off, by TORCH_COMPILE_DISABLE |" in written
    assert report["wrong"] == []


def broken(bench, part):
    raise RuntimeError("no | such\nslot")


def test_a_part_that_raises_is_written_down_and_the_others_go_on(trial):
    report, written = trial(slot=broken)
    failed = failed_of(written)
    assert failed.pop("slot") == r"RuntimeError: no \| such slot"
    assert set(failed.values()) == {"nothing"}
    assert report["wrong"] == ["slot: RuntimeError: no | such slot"]
    check(report)


LACKING = "OutOfMemoryError: tried to allocate 20 GiB"


def test_a_contender_that_cannot_start_is_left_out(trial):
    report, written = trial(("start", "compiled engine", "tiny", "cpu"))
    assert failed_of(written)["start"] == f"compiled engine: {LACKING}"
    assert list(report["calibration"]) == [PIPELINE, "engine", "engine, graphs"]
    assert "engine, graphs, 8 at once: s an image" in report["values"]
    assert not [label for label in report["values"] if "compiled" in label]


def test_without_the_pipeline_the_engine_is_timed_alone(trial):
    report, _ = trial(("start", "pipeline", "tiny", "cpu"))
    assert "engine, 8 at once: s an image" in report["values"]
    assert not [label for label in report["values"] if "pipeline" in label]


def test_a_drawing_that_fails_is_not_tried_again(trial):
    report, written = trial(("draw", PIPELINE, 8))
    assert report["wrong"] == [f"timing: {PIPELINE}, 8 at once: {LACKING}"]
    assert failed_of(written)["timing"] == f"{PIPELINE}, 8 at once: {LACKING}"
    assert len(report["values"][f"{PIPELINE}, 1 at once: s an image"]) == 2
    assert len(report["values"]["engine, 8 at once: s an image"]) == 2
    assert "pipeline / engine, 8 at once" not in report["values"]


def test_tests_that_fail_are_named(monkeypatch, tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs one']\n")
    (folder / "test_some.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_right(): pass\n@pytest.mark.gpu\ndef test_wrong(): assert 0\n"
        "def test_other(): assert 0\n@pytest.mark.gpu\n@pytest.mark.skip\ndef test_lacking(): pass\n"
    )
    (folder / "test_others.py").write_text("raise ValueError('not a file with a test for a GPU')\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    part = gpu.Part("gpu tests", 120)
    gpu.gpu_tests(gpu.Bench(bench.Size()), part)
    assert part.outcome == "1 failed, 1 passed, 1 skipped"
    assert part.problems == ["FAILED tests/test_some.py::test_wrong - assert 0"]


def test_of_tests_that_take_too_long_is_said_how_far_they_came(monkeypatch):
    said = b"tests/test_some.py::test_one PASSED   [ 20%]\ntests/test_some.py::test_two[a b] PASSED [ 40%]\n"

    def run(command, *, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout, said)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(TimeoutError, match="cut off after 8 s, with 2 passed until then"):
        gpu.gpu_tests(gpu.Bench(bench.Size()), gpu.Part("gpu tests", 8))


def test_a_part_may_take_what_those_before_it_left():
    run = gpu.Bench(bench.Size(minutes=1))
    with run.part("gpu tests") as first, run.part("timing") as second:
        pass
    assert first.budget == pytest.approx(60 * gpu.DONE_BY["gpu tests"], abs=1)
    assert second.budget == pytest.approx(60 * gpu.DONE_BY["timing"], abs=1)
    assert list(gpu.DONE_BY.values()) == sorted(gpu.DONE_BY.values())
    assert gpu.DONE_BY["timing"] < 0.95, "the rest is for importing and writing"


def test_without_a_gpu_the_benchmark_says_that_nothing_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bench.main(["gpu", "--folder", str(tmp_path)])
    assert "not measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_unknown_scale_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--scale must be one of true, tiny; received 'huge'"):
        bench.main(["gpu", "--device", "cpu", "--scale", "huge", "--folder", str(tmp_path)])


# --- the contenders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    own = contenders.start("engine", "tiny", "cpu")
    yield own
    for engine in own.engines.values():
        engine.close()


def test_random_weights_draw_an_image_that_its_seed_decides(tiny):
    """Were it of one colour, the comparison with the pipeline would mean nothing."""
    image = np.asarray(tiny.draw("engine", 1).image)
    assert image.std() > 5
    again = np.asarray(contenders.start("engine", "tiny", "cpu").draw("engine", 1).image)
    assert np.abs(image.astype(int) - again).max() <= 1
    parts = random_sdxl.Parts.random(random_sdxl.TINY, torch.device("cpu"), torch.float32)
    random_sdxl.filled(parts.unet, torch.float32, "cpu", seed=1)
    pipe = contenders.Contenders(random_sdxl.TINY, torch.device("cpu"), pipe=parts.pipeline())
    assert np.abs(image.astype(int) - np.asarray(pipe.draw(PIPELINE, 1).image)).max() > 20


def test_a_step_has_exactly_the_rows_that_are_asked_for(tiny, monkeypatch):
    seen = []
    forward = tiny.engines["engine"].models.base.unet.forward
    monkeypatch.setattr(
        tiny.engines["engine"].models.base.unet,
        "forward",
        lambda sample, *rest, **named: seen.append(len(sample)) or forward(sample, *rest, **named),
    )
    for rows in (1, 2, 5):
        assert len(contenders.steps(tiny, "engine", rows, 2)) == 2
    assert seen == [1, 1, 2, 2, 5, 5]


def test_the_engine_takes_the_rows_that_its_calibration_chose(tiny):
    assert contenders.choose(tiny, "engine", {2: [0.1] * 3, 4: [0.2] * 3, 16: [0.8] * 3}) == 2
    assert tiny.draw("engine", 8).rows == 2


def test_what_cannot_be_prepared_in_time_is_left_out(tiny, monkeypatch):
    monkeypatch.setattr(contenders, "steps", lambda own, name, rows, count: time.sleep(0.2))
    took = contenders.prepare(tiny, (1,), time.monotonic() + 0.7)
    assert {name: list(rows) for name, rows in took.items()} == {"engine": [2, 16], "engine, graphs": [2]}


def test_a_calibration_without_time_has_the_row_count_that_matters_most(tiny):
    assert list(contenders.calibrate(tiny, "engine", [1, 2, 8], 2, time.monotonic() + 60)) == [1, 2, 8]
    assert list(contenders.calibrate(tiny, "engine", [1, 2, 8], 2, time.monotonic())) == [2]


def timing(seconds, minutes=1.0, rounds=3):
    """The rounds of two who take so long for one image, on a clock that only they move: seconds, and what failed."""
    run, part = gpu.Bench(bench.Size(minutes=minutes, rounds=rounds), began=0.0), gpu.Part("timing", 0)
    clock = [0.0]

    class Slow:
        def call(self, until, work, name, count):
            took = seconds[name] * count
            clock[0] += took
            if clock[0] > until:
                raise WorkerError("its time ran out")
            return contenders.Drawing(took, 2, None)

    drawings = {(count, name): [] for count in (1, 8) for name in seconds}
    run.worker_of = lambda name: Slow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.time, "monotonic", lambda: clock[0])
        done = gpu.draw_rounds(run, part, drawings)
    return done, {case: len(drawn) for case, drawn in drawings.items()}, part.problems


def test_rounds_end_before_one_that_would_not_fit():
    each = 60 * gpu.DONE_BY["timing"] / 18  # a round of two, one image and then eight, takes 18 times as long
    assert timing({"a": each / 2.5, "b": each / 2.5}) == (2, {(n, who): 2 for n in (1, 8) for who in "ab"}, [])
    assert timing({"a": each / 3.5, "b": each / 3.5})[0] == 3
    assert timing({"a": each / 3.5, "b": each / 3.5}, rounds=1)[0] == 1


def test_what_has_no_time_in_the_first_round_is_said():
    _, drawn, problems = timing({"a": 1.0, "b": 20.0})
    assert drawn == {(1, "a"): 1, (1, "b"): 1, (8, "a"): 1, (8, "b"): 0}
    assert problems == ["b, 8 at once: there was no time for it"]


def test_the_true_parts_are_as_large_as_those_counted_from_sdxl():
    with torch.device("meta"):
        parts = {
            "base UNet": random_sdxl.new_unet(),
            "CLIP ViT-L text encoder": random_sdxl.CLIPTextModel(
                random_sdxl.CLIPTextConfig(**random_sdxl.TEXT_ENCODER)
            ),
            "OpenCLIP bigG text encoder": random_sdxl.CLIPTextModelWithProjection(
                random_sdxl.CLIPTextConfig(**random_sdxl.TEXT_ENCODER_2)
            ),
            "VAE": random_sdxl.AutoencoderKL(**random_sdxl.VAE),
        }
    for name, part in parts.items():
        assert sum(weight.numel() for weight in part.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=5e-4)


def test_a_buffer_of_unknown_content_is_refused():
    with torch.device("meta"):
        norm = torch.nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="received running_mean"):
        random_sdxl.filled(norm, torch.float32, "cpu")


def test_every_way_has_a_profile_of_its_own():
    profiles = [RuntimeProfile(**options) for names in PROCESSES.values() for options in names.values()]
    assert len(profiles[1:]) == len({str(profile) for profile in profiles[1:]}) == len(ENGINES)
