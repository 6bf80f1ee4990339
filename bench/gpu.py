"""SDXL on a GPU, in one command of at most `--minutes` (8), without weights or a network.

It runs the tests that need a GPU; draws a slot of nano and holds it against its goldens, which a CPU drew; measures
what a UNet call costs by its rows, and what the batcher makes of that; and times 1 and 8 images at once, of 30 steps at
1024 px, with the engine (as it is, with CUDA graphs, compiled, both) and with diffusers' pipeline, in turns. The
weights are random (`random_sdxl`). What fails is written down, and the rest goes on.

`--device cpu --scale tiny` tries the command itself: small models and images, and nothing is compiled.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from bench import contenders
from bench.contenders import PIPELINE, PROCESSES, Drawing
from bench.cost import BASE_ROW, DECODE
from bench.gpu_page import page
from bench.measure import Report
from bench.random_sdxl import SCALES, TRUE
from bench.settings import Size
from bench.worker import Worker, WorkerError, one_line
from sdxl_lab.images import max_difference

ROOT = Path(__file__).parents[1]
SLOT = ROOT / "service" / "promoted" / "nano"
MINUTES = 8.0
COUNTS = (1, 8)
CALLS = 5  # timed for each row count
# The share of the minutes by which a part must be done. What one leaves goes to those after it.
DONE_BY = {"gpu tests": 0.22, "launch": 0.23, "slot": 0.38, "start": 0.52, "calibration": 0.62, "timing": 0.93}
SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"


@dataclass
class Part:
    """A part of the benchmark as it went. Seconds; `budget` is what it might have taken. It failed where there are
    `problems`."""

    name: str
    budget: float
    took: float = 0.0
    outcome: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """The whole run: its settings, what was found, and when each part must be done."""

    size: Size
    began: float = field(default_factory=time.monotonic)
    parts: list[Part] = field(default_factory=list)
    lines: dict[str, list[float]] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)

    def until(self, name: str) -> float:
        """When a part must be done, on the monotonic clock."""
        return self.began + 60 * (self.size.minutes or MINUTES) * DONE_BY[name]

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """What is raised inside fails the part alone."""
        began = time.monotonic()
        part = Part(name, max(0.0, self.until(name) - began))
        self.parts.append(part)
        try:
            yield part
        except Exception as error:  # whatever fails a part is in its report, and the other parts go on
            part.problems.append(str(error) if isinstance(error, WorkerError) else one_line(error))
        part.took = time.monotonic() - began
        print(f"{part.name}: {part.took:.0f} s of {part.budget:.0f}, {part.outcome or 'no outcome'}", flush=True)
        for problem in part.problems:
            print(f"  failed: {problem}", flush=True)

    def line(self, label: str, value: float) -> None:
        self.lines.setdefault(label, []).append(value)

    def worker_of(self, name: str) -> Worker:
        """The process of a contender."""
        return next(self.workers[process] for process, names in PROCESSES.items() if name in names)


Work = Callable[[Bench, Part], None]


def main(size: Size) -> None:
    if size.scale not in SCALES:
        raise SystemExit(f"--scale must be one of {', '.join(SCALES)}; received {size.scale!r}. Example: --scale tiny")
    if size.device != "cpu" and not torch.cuda.is_available():
        print("\ngpu: not measured, since torch sees no CUDA device here; --device cpu --scale tiny tries the command")
        return
    bench = Bench(size)
    if size.scale != TRUE.name:
        # The compiler takes minutes for the smallest UNet on a CPU. Processes inherit this.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    bench.environment = environment()
    with ExitStack() as stack:
        for name, work in {
            "gpu tests": gpu_tests,
            "launch": lambda bench, part: launch(bench, part, stack),
            "slot": slot,  # while the contenders start: nothing here is timed
            "start": start,
            "calibration": calibrate,
            "timing": compare,
        }.items():
            with bench.part(name) as part:
                work(bench, part)
    write(bench)


# --- the parts -------------------------------------------------------------------------------------------------------


def gpu_tests(bench: Bench, part: Part) -> None:
    """In a process of their own, and before the others start: one of them takes all of the GPU's memory."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.budget, check=False)
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        part.outcome = outcomes(said.decode() if isinstance(said, bytes) else said)
        raise TimeoutError(f"cut off after {part.budget:.0f} s, with {part.outcome} until then") from None
    part.outcome = outcomes(done.stdout)
    if done.returncode:
        part.problems += re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.M) or [
            f"pytest ended with the status {done.returncode}: {' '.join((done.stderr or done.stdout).split())[-300:]}"
        ]


def outcomes(said: str) -> str:
    """How many tests passed, failed and so on, as pytest's lines say, whether it came to its end or not."""
    found = Counter(re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", said, re.M))
    return ", ".join(f"{count} {word.lower()}" for word, count in sorted(found.items())) or "no test"


def launch(bench: Bench, part: Part, stack: ExitStack) -> None:
    for process in PROCESSES:
        worker = Worker(contenders.start, process, bench.size.scale, bench.size.device)
        bench.workers[process] = stack.enter_context(closing(worker))
        worker.send(contenders.prepare, COUNTS, bench.until("start"))
    part.outcome = f"{len(bench.workers)} processes"


def slot(bench: Bench, part: Part) -> None:
    with closing(Worker(contenders.slot_engine, str(SLOT), bench.size.device)) as worker:
        found = worker.call(bench.until("slot"), contenders.goldens)
    for golden in found:
        bench.line("slot nano: largest difference from a golden of a CPU, of 255", golden.largest)
        bench.line("slot nano: mean difference from a golden of a CPU, of 255", golden.mean)
    largest = max(golden.largest for golden in found)
    part.outcome = f"{len(found)} goldens, in float32; the largest difference is {largest:.0f} of 255"
    part.problems += [golden.reason for golden in found if golden.reason is not None]


def start(bench: Bench, part: Part) -> None:
    """Wait for the contenders. One that is not ready in time is ended."""
    for process, worker in bench.workers.items():
        with problems_of(part, process):
            for name, took in worker.result(bench.until("start")).items():
                bench.calibration[name] = {"first call, s": took}
    part.outcome = f"{len(bench.calibration)} of {sum(map(len, PROCESSES.values()))} ready"


def calibrate(bench: Bench, part: Part) -> None:
    """Seconds a call by rows, and which rows the batcher chooses for them. All draw the same image, to be compared."""
    until, last = bench.until("calibration"), bench.until("timing")
    with problems_of(part, "device"):
        bench.environment |= bench.workers["pipeline"].call(last, contenders.describe)
    images = {}
    for place, (name, found) in enumerate(bench.calibration.items()):
        worker = bench.worker_of(name)
        now = time.monotonic()
        share = now + (until - now) / (len(bench.calibration) - place)
        with problems_of(part, name):
            if name != PIPELINE:
                prepared = list(found["first call, s"])
                found["seconds"] = worker.call(last, contenders.calibrate, name, prepared, CALLS, share)
                found["rows chosen"] = worker.call(last, contenders.choose, name, found["seconds"])
            for count in reversed(COUNTS):  # what comes after the UNet has its first call, too
                images[name] = worker.call(last, contenders.draw, name, count, 2).image
            if name != PIPELINE and PIPELINE in images:
                difference = 255 * max_difference(images[name], images[PIPELINE])
                bench.line(f"{name}: largest difference from the pipeline's image, 2 steps, of 255", difference)
    chosen = {name: found["rows chosen"] for name, found in bench.calibration.items() if "rows chosen" in found}
    for name, rows in chosen.items():
        for count, seconds in bench.calibration[name]["seconds"].items():
            bench.lines[f"{name}, {count} row{'s' * (count > 1)}: ms a call"] = [1000 * each for each in seconds]
        bench.line(f"{name}: rows that the batcher chooses", rows)
    part.outcome = "; ".join(f"{name}: {rows} rows" for name, rows in chosen.items())


Case = tuple[int, str]  # how many images at once, and who draws them


def compare(bench: Bench, part: Part) -> None:
    """Rounds, in which each draws one image, and then each draws eight, for as long as there is time for another."""
    drawings: dict[Case, list[Drawing]] = {(count, name): [] for count in COUNTS for name in bench.calibration}
    rounds = draw_rounds(bench, part, drawings)
    part.outcome = f"{rounds} rounds of {len(drawings)}"
    scale, rate = SCALES[bench.size.scale], bench.environment.get("TFLOP/s")
    for (count, name), drawn in drawings.items():
        if not drawn:
            continue
        what = f"{name}, {count} at once"
        bench.lines[f"{what}: s an image"] = each = [one.seconds / count for one in drawn]
        if name != PIPELINE:
            bench.line(f"{what}: rows a call", drawn[-1].rows)
            if theirs := drawings.get((count, PIPELINE)):
                pairs = zip(theirs, drawn, strict=False)
                bench.lines[f"pipeline / {what}"] = [one.seconds / other.seconds for one, other in pairs]
        if scale is TRUE and rate:
            work = 2 * BASE_ROW * scale.steps + DECODE
            bench.lines[f"{what}: share of the matrix product's rate"] = [work / s / rate for s in each]
    for process, worker in bench.workers.items():
        with problems_of(part, process):
            if memory := worker.call(time.monotonic() + 5, contenders.peak):
                bench.line(f"{process}: most memory, GiB", memory)


def draw_rounds(bench: Bench, part: Part, drawings: dict[Case, list[Drawing]]) -> int:
    """Whole rounds, at least one as far as there is time. A case that fails is not tried again."""
    until, left = bench.until("timing"), dict.fromkeys(drawings)
    for number in range(max(1, bench.size.rounds)):
        expected = sum(drawings[case][-1].seconds for case in left) if number else 0.0
        if time.monotonic() + expected > until:
            return number
        for count, name in list(left):
            alone = drawings[1, name]
            seconds = alone[-1].seconds * count / 2 if count > 1 and alone else 0.0  # at least, by all experience
            try:
                if time.monotonic() + seconds > until:
                    raise WorkerError("there was no time for it")
                drawings[count, name].append(bench.worker_of(name).call(until, contenders.draw, name, count))
            except WorkerError as error:
                part.problems.append(f"{name}, {count} at once: {error}")
                del left[count, name]
        bench.environment[f"clock after round {number + 1}"] = smi().get("clocks.sm", "not known")
    return max(1, bench.size.rounds)


@contextmanager
def problems_of(part: Part, name: str) -> Iterator[None]:
    """What a worker fails with is a problem of the part, which goes on."""
    try:
        yield
    except WorkerError as error:
        part.problems.append(f"{name}: {error}")


# --- the surroundings, and the results -------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """The machine and the libraries, as far as they are known without touching the GPU."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "processor": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        "load": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "compiler": "off, by TORCH_COMPILE_DISABLE" if os.environ.get("TORCH_COMPILE_DISABLE") == "1" else "on",
        **smi(),
    }


def smi() -> dict[str, str]:
    """What the driver says of the first GPU; empty where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI.split(","), (each.strip() for each in said.split(",")), strict=False))


def write(bench: Bench) -> None:
    """JSON and a page."""
    size, scale = bench.size, SCALES[bench.size.scale]
    tried = scale is not TRUE or size.device == "cpu"
    name = "gpu-trial" if tried else "gpu"
    device = bench.environment.get("device", "a CPU" if size.device == "cpu" else "a GPU")
    title = f"{'A trial of the command: ' if tried else ''}SDXL with random weights on {device}"
    report = Report(
        name,
        title,
        bench.lines,
        f"{scale.side} px, {scale.steps} steps, guided, {bench.environment.get('dtype', 'dtype not known')}, "
        f"{time.monotonic() - bench.began:.0f} s in all",
        wrong=[f"{part.name}: {problem}" for part in bench.parts for problem in part.problems],
        more={
            "environment": bench.environment,
            "parts": [asdict(part) for part in bench.parts],
            "calibration": bench.calibration,
        },
    )
    report.write(size.folder)
    (size.folder / f"{name}.md").write_text(page(size.folder / f"{name}.json"))
    print(f"\n{size.folder / name}.md")
