"""The engine itself: parity, overhead, a grid of mixed settings, runtime options, cancelling, growth."""

import itertools
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.baselines import Pipeline, PipelineRequest
from bench.isolated import isolated
from bench.measure import Report, alternate, ratios
from bench.settings import FLOAT32, PROMPTS, Size, config_of
from sdxl_lab.config import SCHEDULERS, GenerationConfig
from sdxl_lab.diffusion.engine import Engine, Work
from sdxl_lab.diffusion.models import Models, load
from sdxl_lab.diffusion.processor import multiplies
from sdxl_lab.diffusion.prompts import Prompt
from sdxl_lab.errors import Cancelled
from sdxl_lab.images import max_difference
from sdxl_lab.job import ImageRequest, Job

# Where the processor does not multiply bfloat16 an image takes minutes in it.
DTYPES = ("float32", "bfloat16") if multiplies(torch.bfloat16) else ("float32",)


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def draw_all(engine: Engine, requests: list[ImageRequest]) -> list[Image.Image]:
    return [job.result().image for job in [engine.submit(request) for request in requests]]


def all_at_once(engine: Engine, requests: list[ImageRequest]) -> float:
    """Seconds."""
    return seconds(lambda: draw_all(engine, requests))


def one_by_one(pipeline: Pipeline, bodies: list[PipelineRequest]) -> float:
    """Seconds."""
    return seconds(lambda: [pipeline.draw([body]) for body in bodies])


def pipeline_request(request: ImageRequest) -> PipelineRequest:
    """The same request for a pipeline."""
    names = ("steps", "guidance_scale", "scheduler", "width", "height")
    return PipelineRequest(
        prompt=request.prompt, seed=request.seed, **{name: getattr(request.config, name) for name in names}
    )


class Unrounded(Engine):
    """An engine that keeps the last latents of every image."""

    def _decode(self, finished: list[Work]) -> None:
        for work in finished:
            assert work.trajectory is not None
            self.latents[work.job] = work.trajectory.latents
        super()._decode(finished)

    @cached_property
    def latents(self) -> dict[Job[Any], torch.Tensor]:
        return {}


def parity(size: Size) -> None:
    """The largest difference on [0, 1] from the pipeline's images, for every scheduler, all in one mixed batch."""
    config, pipeline = config_of(size, steps=min(size.steps, 20)), Pipeline(size.model)
    requests = [ImageRequest(config.with_(scheduler=name), PROMPTS[i % 4], i) for i, name in enumerate(SCHEDULERS)]
    differences = []
    with Unrounded.load(config, FLOAT32) as engine:
        jobs = [engine.submit(request) for request in requests]
        for request, job in zip(requests, jobs, strict=True):
            job.result()
            mine = engine.models.decode(engine.latents[job])[0]
            theirs = pipeline.draw([pipeline_request(request)], output_type="np")[0]
            differences.append(float(np.abs(mine - theirs).max()))
    worst = SCHEDULERS[int(np.argmax(differences))]
    Report(
        "parity",
        "Largest difference from diffusers' pipeline, of 18 schedulers in one mixed batch",
        {f"largest (spread over schedulers; worst: {worst})": differences, "largest of all": [max(differences)]},
        f"{config.steps} steps, {size.side} px, float32",
        {"largest of all": "1e-3"},
    ).show(size.folder)


def overhead(size: Size) -> None:
    """An image of 25 steps alone, against its bare model calls in a row."""
    config = config_of(size, steps=25)
    with isolated(load, config.model, FLOAT32) as models, isolated(Engine.load, config, FLOAT32) as engine:
        measured = alternate(
            {"bare calls": lambda: models(_bare, config), "engine": lambda: engine(_whole, config)}, 2 * size.rounds
        )
    Report(
        "overhead",
        "Seconds of one image alone, 25 steps",
        {**measured, "engine / bare calls": ratios(measured["engine"], measured["bare calls"])},
        f"{size.side} px, float32; the engine's time includes the 8-bit image and its record",
        {"engine / bare calls": "1.03"},
    ).show(size.folder)


@torch.no_grad()
def _bare(models: Models, config: GenerationConfig) -> float:
    side = config.width // models.scale_factor
    latents, times = torch.randn(2, 4, side, side), torch.full((2,), 500.0)
    ids = torch.tensor([[config.height, config.width, 0.0, 0.0, config.height, config.width]] * 2)

    def calls() -> None:
        text = models.base.embed(Prompt(PROMPTS[0])), models.base.embed(Prompt(None))
        hidden, pooled = (torch.cat([part[index] for part in text]) for index in range(2))
        added = {"text_embeds": pooled, "time_ids": ids}
        for _ in range(config.steps):
            models.base.unet(latents, times, hidden, added_cond_kwargs=added, return_dict=False)
        models.decode(latents[:1])

    return seconds(calls)


def _whole(engine: Engine, config: GenerationConfig) -> float:
    engine._embeddings.clear()
    return seconds(lambda: engine.draw(ImageRequest(config, PROMPTS[0], 0)))


def grid(size: Size) -> None:
    """A research grid: 4 schedulers x 3 step counts x 2 guidance scales x 2 seeds."""
    steps = [max(1, size.steps * part // 20) for part in (10, 20, 30)]
    cells = list(itertools.product(("euler", "dpmpp_2m_karras", "ddim", "unipc"), steps, (3.0, 6.0), (0, 1)))
    config = config_of(size)

    def requests(interval: tuple[float, float] | None) -> list[ImageRequest]:
        changes = [
            {"scheduler": name, "steps": count, "guidance_scale": scale, "guidance_interval": interval}
            for name, count, scale, _ in cells
        ]
        return [
            ImageRequest(config.with_(**each), PROMPTS[0], cell[3]) for each, cell in zip(changes, cells, strict=True)
        ]

    bodies = [pipeline_request(request) for request in requests(None)]
    with ExitStack() as stack:
        pipeline = stack.enter_context(isolated(Pipeline, size.model))
        engines = {d: stack.enter_context(isolated(Engine.load, config, FLOAT32.with_(dtype=d))) for d in DTYPES}

        def rate(dtype: str, interval: tuple[float, float] | None = None) -> float:
            return len(cells) / engines[dtype](all_at_once, requests(interval))

        trials: dict[str, Callable[[], float]] = {
            "pipeline, cell by cell": lambda: len(cells) / pipeline(one_by_one, bodies),
            "engine, float32": partial(rate, "float32"),
            "engine, guidance for sigma 0.28 to 5.42": partial(rate, "float32", (0.28, 5.42)),
        }
        trials |= {f"engine, {half} UNet": partial(rate, half) for half in DTYPES[1:]}
        measured = alternate(trials, max(1, size.rounds - 1))
    loop_rate = measured["pipeline, cell by cell"]
    lines = measured | {f"{name} / pipeline": ratios(v, loop_rate) for name, v in list(measured.items())[1:]}
    Report(
        "grid",
        f"Cells a second of a research grid of {len(cells)} mixed cells",
        lines,
        f"4 schedulers x {steps} steps x 2 guidance scales x 2 seeds, {size.side} px",
        {
            "engine, float32 / pipeline": "1.6",
            "engine, guidance for sigma 0.28 to 5.42 / pipeline": "2",
            "engine, bfloat16 UNet / pipeline": "1.7",
        },
    ).show(size.folder)


RUNTIMES: dict[str, dict[str, Any]] = {
    "exact": {"exact": True},
    "channels_last": {"channels_last": True},
    "fuse_qkv": {"fuse_qkv": True},
    "compile": {"compile": True},
    "float8 storage": {"storage": "float8"},
}
for _half in DTYPES[1:]:
    RUNTIMES |= {
        _half: {"dtype": _half},
        f"{_half}, channels_last": {"dtype": _half, "channels_last": True},
        f"{_half}, compile": {"dtype": _half, "compile": True},
    }


def runtime(size: Size) -> None:
    """The gain of each option of `RuntimeProfile` at saturation, and how far it moves the pixels."""
    config = config_of(size)
    requests = [ImageRequest(config, PROMPTS[seed % 4], seed) for seed in range(size.images)]
    with ExitStack() as stack:
        engines = {"as it is": stack.enter_context(isolated(Engine.load, config, FLOAT32))}
        for name, options in RUNTIMES.items():
            engines[name] = stack.enter_context(isolated(Engine.load, config, FLOAT32.with_(**options)))
        measurements = {
            name: (lambda run=run: len(requests) / run(all_at_once, requests)) for name, run in engines.items()
        }
        rates = alternate(measurements, size.rounds)
        plain = engines["as it is"](draw_all, requests[:8])
        lines = {f"{name} / as it is": ratios(rates[name], rates["as it is"]) for name in RUNTIMES}
        for name in RUNTIMES:
            moved = [max_difference(a, b) for a, b in zip(engines[name](draw_all, requests[:8]), plain, strict=True)]
            lines[f"{name}: largest difference of 255"] = [255 * value for value in moved]
    aims = {"bfloat16: largest difference of 255": "2"}
    Report(
        "runtime",
        "Images a second with each option of the runtime profile",
        {"as it is, images a second": rates["as it is"], **lines},
        f"{size.images} in flight, {size.steps} steps, {size.side} px, from float32",
        aims,
    ).show(size.folder)


def cancel(size: Size) -> None:
    """The number of UNet calls from `cancel()` until the rows are free."""
    config = config_of(size, steps=50)
    ticks = []
    with Engine.load(config, FLOAT32) as engine:
        for seed in range(5):
            job = engine.submit(ImageRequest(config, PROMPTS[1], seed))
            while job.progress[0] < 3:
                time.sleep(0.005)
            before = job.progress[0]
            job.cancel()
            try:
                job.result()
            except Cancelled:
                ticks.append(float(job.progress[0] - before))
    Report("cancel", "UNet calls from cancel to free rows", {"calls": ticks}, f"{size.side} px", {"calls": "1"}).show(
        size.folder
    )


def growth(size: Size) -> None:
    """The time of a UNet call by rows, the time of an image by steps and area, and memory."""
    lines: dict[str, list[float]] = {}
    config = config_of(size)
    with Engine.load(config, FLOAT32) as engine:
        for count in (1, 2, 4, 8, 16):
            requests = [ImageRequest(config.with_(steps=6), PROMPTS[0], seed) for seed in range(count)]
            measured = [all_at_once(engine, requests) for _ in range(size.rounds + 1)]
            label = f"{count} guided images at once: ms a row and step"
            lines[label] = [1000 * value / (12 * count) for value in measured[1:]]
        for steps in (5, 10, 20, 40):
            alone = [ImageRequest(config.with_(steps=steps), PROMPTS[0], 0)]
            lines[f"{steps} steps: ms an image"] = [1000 * all_at_once(engine, alone) for _ in range(size.rounds)]
        for side in (size.side, size.side * 3 // 2, size.side * 2, size.side * 3):
            alone = [ImageRequest(config.with_(width=side, height=side, steps=6), PROMPTS[0], 0)]
            lines[f"{side} px, 6 steps: ms"] = [1000 * all_at_once(engine, alone) for _ in range(size.rounds)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines["peak memory of the process, MiB"] = [peak]
    Report("growth", "How cost grows", lines, "float32").show(size.folder)
