"""What the GPU benchmark compares, each in a worker's process: the engine in four ways, and diffusers' pipeline.

All have the same random weights (`random_sdxl`), device and dtype. The engine's ways that need no compiler share one
process and one set of weights, and so do those that do. The functions below are what a worker is told to run.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image

from bench.random_sdxl import REF, SCALES, Parts, Scale
from bench.settings import PROMPTS
from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.batching import Batcher
from sdxl_lab.diffusion.denoising import Trajectory
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.latency import Group, LatencyModel
from sdxl_lab.diffusion.models import placement
from sdxl_lab.images import max_difference, mean_difference, open_image
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.slot import load_slot
from sdxl_lab.release.verify import verify

PIPELINE = "diffusers' pipeline"
# Processes, the ways in which each calls the UNet, and what they change in the profile.
PROCESSES: Mapping[str, Mapping[str, Mapping[str, bool]]] = {
    "pipeline": {PIPELINE: {}},
    "engine": {"engine": {}, "engine, graphs": {"graphs": True}},
    "compiled engine": {
        "engine, compiled": {"compile": True},
        "engine, compiled, graphs": {"compile": True, "graphs": True},
    },
}
# The row counts that a call is timed with. Those that matter most come first: to compile one takes a minute or more.
ROWS = (2, 16, 8, 4, 1)
# Memory that is used again by the same process is fast, and lost to the others: it is given back where little is left.
SCARCE = 0.25


class Drawing(NamedTuple):
    """`seconds` of all images, UNet `rows` a call, and the first image."""

    seconds: float
    rows: float
    image: Image.Image


def config_for(scale: Scale, steps: int | None = None) -> GenerationConfig:
    return GenerationConfig(model=REF, width=scale.side, height=scale.side, steps=steps or scale.steps, watermark=False)


@dataclass
class Contenders:
    """The ways of one process. `engines` has each by its name, `pipe` is the pipeline's."""

    scale: Scale
    device: torch.device
    engines: dict[str, Engine] = field(default_factory=dict)
    pipe: Any = None

    def draw(self, name: str, count: int, steps: int | None = None) -> Drawing:
        """So many images at once, of one prompt and the seeds from 0."""
        config = config_for(self.scale, steps)
        drawing = self._piped(config, count) if name == PIPELINE else self._batched(self.engines[name], config, count)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            if free < SCARCE * total:
                torch.cuda.empty_cache()
        return drawing

    def _piped(self, config: GenerationConfig, count: int) -> Drawing:
        began = time.monotonic()
        images = self.pipe(
            [PROMPTS[0]] * count,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            width=config.width,
            height=config.height,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
        ).images
        return Drawing(time.monotonic() - began, 2.0 * count, images[0])

    def _batched(self, engine: Engine, config: GenerationConfig, count: int) -> Drawing:
        before, began = engine.stats(), time.monotonic()
        with engine._wake:  # the first call waits until all are there: else its rows would be those of chance
            jobs = [engine.submit(ImageRequest(config, PROMPTS[0], seed)) for seed in range(count)]
        images = [job.result().image for job in jobs]
        seconds, after = time.monotonic() - began, engine.stats()
        return Drawing(seconds, (after.rows_in_calls - before.rows_in_calls) / (after.calls - before.calls), images[0])


def start(process: str, scale_name: str, device_name: str) -> Contenders:
    """The subject of a worker."""
    scale = SCALES[scale_name]
    device, dtype = placement(RuntimeProfile(device=device_name))
    parts = Parts.random(scale, device, dtype)
    if process == "pipeline":
        return Contenders(scale, device, pipe=parts.pipeline())
    settled = RuntimeProfile(device=str(device), dtype=str(dtype).removeprefix("torch."))
    engines = {}
    for name, options in PROCESSES[process].items():
        profile = settled.with_(**options)
        engines[name] = Engine(parts.models(profile), profile, {"base": "random"})
    return Contenders(scale, device, engines)


def prepare(own: Contenders, counts: tuple[int, ...], until: float) -> dict[str, dict[int, float]]:
    """Whatever happens at a first call, for each row count: kernels are chosen, compiled, recorded. Returns seconds by
    name and rows, without the row counts that could not have been done `until` then. The pipeline draws `counts`
    images."""
    if own.pipe is not None:
        return {PIPELINE: {2 * count: own.draw(PIPELINE, count, steps=2).seconds for count in counts}}
    took: dict[str, dict[int, float]] = {name: {} for name in own.engines}
    for rows, name in itertools.product(ROWS, own.engines):
        if time.monotonic() + max(took[name].values(), default=0.0) <= until:
            began = time.monotonic()
            steps(own, name, rows, 1)
            took[name][rows] = time.monotonic() - began
    return took


def draw(own: Contenders, name: str, count: int, steps: int | None = None) -> Drawing:
    return own.draw(name, count, steps)


def steps(own: Contenders, name: str, rows: int, count: int) -> list[float]:
    """Seconds of each of `count` steps in a row, with so many rows, as the engine makes them: its inputs put together,
    the UNet, guidance and the schedulers."""
    engine, config = own.engines[name], config_for(own.scale, count)
    asked = [config] * (rows // 2) + [config.with_(guidance_scale=1.0)] * (rows % 2)
    trajectories = [
        Trajectory(engine.models, ImageRequest(each, PROMPTS[0], seed), partial(engine._embed, False))
        for seed, each in enumerate(asked)
    ]

    def step() -> None:
        answers = engine._predict("base", [trajectory.inputs() for trajectory in trajectories])
        for trajectory, answer in zip(trajectories, answers, strict=True):
            trajectory.take(answer)
        engine._settle()

    return [_seconds(step) for _ in range(count)]


def calibrate(own: Contenders, name: str, counts: Iterable[int], calls: int, until: float) -> dict[int, list[float]]:
    """Seconds of so many calls for each row count, the ones that matter most first; those for which no time is left are
    left out, but for the first."""
    measured: dict[int, list[float]] = {}
    for rows in sorted(counts, key=ROWS.index):
        if not measured or time.monotonic() < until:
            measured[rows] = steps(own, name, rows, calls)
    return dict(sorted(measured.items()))


def choose(own: Contenders, name: str, measured: Mapping[int, Iterable[float]]) -> int:
    """The rows that the batcher chooses for these seconds a call. The engine has them from now on and tries no others,
    so that no round of the timing differs from the next."""
    engine, side = own.engines[name], own.scale.side // own.engines[name].models.scale_factor
    group = Group("base", side, side)
    latency = LatencyModel()
    for model in (latency, engine._latency):
        for rows, seconds in measured.items():
            for each in seconds:
                model.took(group, rows, each)
    engine._batcher.exploring = False
    engine._batcher.measured()
    return Batcher(latency, max_rows=engine.profile.rows).rows_of(group)


def describe(own: Contenders) -> dict[str, Any]:
    """The device as torch has it, and the rate of its matrix products in the UNet's dtype."""
    dtype = own.pipe.unet.dtype
    side = 8192 if own.device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=own.device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(20):
            a @ b
        if own.device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    said: dict[str, Any] = {"TFLOP/s": 20 * 2 * side**3 / _seconds(multiply) / 1e12, "dtype": str(dtype)}
    if own.device.type == "cuda":
        properties = torch.cuda.get_device_properties(own.device)
        said |= {
            "device": properties.name,
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "compute capability": f"{properties.major}.{properties.minor}",
            "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return said


def peak(own: Contenders) -> float | None:
    """The most memory that the process' tensors had, in GiB; None without CUDA."""
    return torch.cuda.max_memory_allocated(own.device) / 2**30 if own.device.type == "cuda" else None


def slot_engine(folder: str, device: str) -> tuple[Any, Engine]:
    """The subject of the worker that draws a slot: in float32, as its goldens were drawn."""
    slot = load_slot(folder)
    return slot, Engine.load(slot.config, RuntimeProfile(device=device, dtype="float32"))


class Golden(NamedTuple):
    """How far an image is from its golden, in 255ths, and why it is not what was promoted; None if it is."""

    largest: float
    mean: float
    reason: str | None


def goldens(subject: tuple[Any, Engine]) -> list[Golden]:
    """The slot's goldens, drawn in one batch."""
    found = []
    for check in verify(*subject):
        pair = open_image(check.golden.path), check.image.image
        found.append(Golden(255 * max_difference(*pair), 255 * mean_difference(*pair), check.reason))
    return found


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
