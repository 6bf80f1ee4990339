"""An image beside busy neighbours: core-bound processes and a second engine.

`python -m bench.neighbours MODEL SIDE` is that second engine: it draws until it is ended.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch

from bench.clients import post
from bench.isolated import Call, isolated
from bench.measure import Report, ratios
from bench.servers import server
from bench.settings import PROMPTS, Size, body, config_of
from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.processor import usable_cores
from sdxl_lab.environment import SPINNING
from sdxl_lab.job import ImageRequest

STEPS = 25
LONGEST = 15.0  # seconds; an image that takes longer is cancelled, and its time reckoned by the steps that it made
OURS = "engine"
# Each one's environment, and its fixed number of threads. OpenMP's own spin count is that of libgomp's env.c.
SUBJECTS: dict[str, tuple[Mapping[str, str], int | None]] = {
    OURS: ({}, None),
    "OpenMP's own spinning": ({"GOMP_SPINCOUNT": "300000"}, usable_cores()),
    "no spinning (PASSIVE)": ({"OMP_WAIT_POLICY": "PASSIVE"}, usable_cores()),
    "brief spinning": ({"GOMP_SPINCOUNT": "10000"}, usable_cores()),
    "one thread": ({"GOMP_SPINCOUNT": "10000"}, 1),
}
ALONE, ONE, TWO, ENGINE = "alone", "beside one process", "beside two", "beside a second engine"


def neighbours(size: Size) -> None:
    """Seconds of an image of 25 guided steps. Of each subject and company the second image in a row counts, so that
    what came or went was there for a while; of the engine the first one is shown, too."""
    config = config_of(size, steps=STEPS)
    lines: dict[str, list[float]] = {}
    with ExitStack() as stack:
        subjects = {name: stack.enter_context(_subject(name, config)) for name in SUBJECTS}
        port = stack.enter_context(server("service", config))
        for number in range(size.rounds + 1):
            for company in (ALONE, ONE, TWO, ENGINE):
                with _company(company, size):
                    measured = _measured(subjects, config, company)
                    if company in (ALONE, ONE):
                        measured[f"service, {company}"] = _of_service(port, size, number)
                if number:  # the first round warms caches
                    for label, seconds in measured.items():
                        lines.setdefault(label, []).append(seconds)
    lines |= _compared(lines)
    best = {f"{OURS} / best, {company}": "1.3" for company in (ONE, TWO)} | {f"{OURS} / best, {ALONE}": "1.1"}
    alone = {f"{OURS}, {ONE} / {ALONE}": "2", f"{OURS}, {TWO} / {ALONE}": "3"}
    Report(
        "neighbours",
        f"Seconds of an image of {STEPS} guided steps beside busy neighbours",
        lines,
        f"{size.side} px, float32; {processor()}; fixed subjects have {usable_cores()} threads or one",
        best | alone,
    ).show(size.folder)


def processor() -> str:
    """Its name, the cores that this process may use, and the vector instructions that torch uses."""
    try:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        found = []
    name = found[0].split(":", 1)[1].strip() if found else "unknown processor"
    return f"{name}, {usable_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _measured(subjects: Mapping[str, Call], config: GenerationConfig, company: str) -> dict[str, float]:
    measured = {}
    for name, call in subjects.items():
        first, second = call(_seconds, config), call(_seconds, config)
        if name == OURS and company != ALONE:
            measured[f"{OURS}, {company}, first image"] = first
        measured[f"{name}, {company}"] = second
    return measured


def _compared(lines: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The engine against the subject of the least median, and against itself alone."""
    compared = {}
    for company in (ALONE, ONE, TWO, ENGINE):
        fixed = [lines[f"{name}, {company}"] for name in SUBJECTS if name != OURS]
        compared[f"{OURS} / best, {company}"] = ratios(lines[f"{OURS}, {company}"], min(fixed, key=median))
    for company in (ONE, TWO, ENGINE):
        label = f"{OURS}, {company} / {ALONE}"
        compared[label] = ratios(lines[f"{OURS}, {company}"], lines[f"{OURS}, {ALONE}"])
    compared[f"service, {ONE} / {ALONE}"] = ratios(lines[f"service, {ONE}"], lines[f"service, {ALONE}"])
    return compared


@contextmanager
def _subject(name: str, config: GenerationConfig) -> Iterator[Call]:
    """An engine in a process that has the environment from its start."""
    environment, threads = SUBJECTS[name]
    before = dict(os.environ)
    try:
        for variable in SPINNING:
            os.environ.pop(variable, None)
        os.environ.update(environment)
        with isolated(Engine.load, config, RuntimeProfile(device="cpu", dtype="float32", threads=threads)) as call:
            call(_seconds, config)  # the process starts with the first call
            os.environ.clear()
            os.environ.update(before)
            yield call
    finally:
        os.environ.clear()
        os.environ.update(before)


def _seconds(engine: Engine, config: GenerationConfig) -> float:
    began = time.monotonic()
    job = engine.submit(ImageRequest(config, PROMPTS[0], 0))
    try:
        job.result(LONGEST)
        return time.monotonic() - began
    except TimeoutError:
        seconds, (made, total) = time.monotonic() - began, job.progress
        job.cancel()
        return seconds * total / max(1, made)


def _of_service(port: int, size: Size, number: int) -> float:
    """Seconds of the second of two images."""
    return [post(port, body(size, STEPS, seed)) for seed in (2 * number, 2 * number + 1)][-1]


@contextmanager
def _company(name: str, size: Size) -> Iterator[None]:
    commands: dict[str, list[list[str]]] = {
        ALONE: [],
        ONE: [[sys.executable, "-c", "print(flush=True)\nwhile True: pass"]],
        TWO: [[sys.executable, "-c", "print(flush=True)\nwhile True: pass"]] * 2,
        ENGINE: [[sys.executable, "-m", "bench.neighbours", size.model, str(size.side)]],
    }
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands[name]]
    try:
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"a neighbour ended: {process.args!r}")
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def main(model: str, side: str) -> None:
    config = config_of(Size(model=model, side=int(side)), steps=STEPS)
    with Engine.load(config, RuntimeProfile(device="cpu", dtype="float32")) as engine:
        while True:
            engine.draw(ImageRequest(config, PROMPTS[0], 0))
            print(flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
