"""The engine: one thread that owns the models and packs many images' steps into shared UNet calls.

Images of different prompts, seeds, schedulers, step counts and guidance join and leave between any two calls; only
the UNet and the image's size must agree. The engine knows trajectories and jobs; it knows no HTTP, no files and no
scheduler. Every method may be called from any thread.
"""

import bisect
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import diffusers
import torch
import transformers
from PIL import Image

from sdxl_lab import __version__
from sdxl_lab.config import ConfigError, GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.denoising import DenoiserName, ImageRequest, Rows, Trajectory, calls_of, rows_of
from sdxl_lab.diffusion.inventory import identity
from sdxl_lab.diffusion.latency import Forecast, LatencyModel, Workload, forecast
from sdxl_lab.diffusion.models import Embedding, Models, load
from sdxl_lab.images import GeneratedImage, finish, preview
from sdxl_lab.record import ImageRecord

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]


class Cancelled(Exception):
    """The image was cancelled before it was finished."""


class EngineStopped(RuntimeError):
    """The engine is closed, or its thread has failed; `__cause__` says why."""


class QueueFull(RuntimeError):
    """The engine's queue has as many waiting images as it takes."""


class Job:
    """An image that was asked for. `state` is queued, running, done, failed or cancelled. Any thread may ask it."""

    def __init__(self, engine: "Engine", request: ImageRequest, on_step: OnStep | None, priority: int) -> None:
        self.request, self.on_step, self.priority = request, on_step, priority
        self._engine = engine
        self.future: Future[GeneratedImage] = Future()
        self.future.set_running_or_notify_cancel()  # so that only the engine can end it
        self.submitted = time.monotonic()
        self.started = self.submitted
        self.first_step: float | None = None  # when its first UNet call was done
        self.trajectory: Trajectory | None = None
        self.served = 0  # the tick in which it last had rows
        self._cancelled = threading.Event()

    @property
    def state(self) -> str:
        if not self.future.done():
            return "running" if self.trajectory else "queued"
        error = self.future.exception()
        return "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"

    @property
    def progress(self) -> tuple[int, int]:
        """UNet calls made, of how many; (0, 0) while queued."""
        return (self.trajectory.calls, self.trajectory.total) if self.trajectory else (0, 0)

    @property
    def position(self) -> int:
        """The place in the queue, from 1; 0 once it has left it."""
        return self._engine.position(self)

    @property
    def eta(self) -> float | None:
        """Seconds until the image is done, from the measured speed and all that shares the engine; 0.0 when it is
        over, None while nothing was measured."""
        return self._engine.eta(self)

    def preview(self) -> Image.Image | None:
        """The image as the last step sees it, small and rough, by a linear map of the latents; None before the first
        step. Takes under a millisecond on a CPU and none of it in the engine's thread: call it from your own."""
        latents = self.trajectory.denoised() if self.trajectory else None
        if latents is None:
            return None
        return preview(latents[0].float().cpu().numpy(), self._engine.models.latent_rgb)

    def cancel(self) -> None:
        """Stop at the next tick. `result` then raises `Cancelled`; a finished image stays finished."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def result(self, timeout: float | None = None) -> GeneratedImage:
        """Wait for the image. Raises what went wrong, `Cancelled`, or `TimeoutError`."""
        return self.future.result(timeout)


@dataclass(frozen=True)
class EngineStats:
    """The engine at a glance. `rows` and `seconds` are those of the last UNet call; the last three fields are of all
    UNet calls since the start."""

    queued: int
    running: int
    rows_in_flight: int
    row_budget: int
    ticks: int
    rows: int
    seconds: float
    calls: int = 0
    rows_in_calls: int = 0
    seconds_in_calls: float = 0.0


class Engine:
    """Draws images. Use it as a context manager, or call `close`."""

    def __init__(self, models: Models, profile: RuntimeProfile, weights: dict[str, str], max_queue: int = 1000) -> None:
        self.models, self.profile, self.weights = models, profile, weights
        self.max_queue, self.rows = max_queue, profile.rows
        self.failure: str | None = None
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._wake = threading.Condition()
        self._closed = False
        self._ticks = 0
        self._latency = LatencyModel()
        self._last_call = (0, 0.0)
        self._all_calls = (0, 0, 0.0)  # calls, rows, seconds: replaced whole, so that a reader needs no lock
        self._embeddings: OrderedDict[tuple[DenoiserName, str | None, bool], Embedding] = OrderedDict()
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, config: GenerationConfig, profile: RuntimeProfile | None = None, max_queue: int = 1000) -> Self:
        """An engine for a configuration's models. Raises `ModelError`."""
        profile = profile or RuntimeProfile()
        # In a thread that ends: torch gives every thread an OpenMP pool of its own, and while there are more threads in
        # all pools than cores, none of them waits actively any more: UNet calls of two rows took twice as long.
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
            models = loader.submit(load, config.model, profile).result()
        settled = profile.with_(device=str(models.device), dtype=str(models.dtype).removeprefix("torch."))
        return cls(models, settled, identity(config.model), max_queue)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is queued or running and end the thread."""
        with self._wake:
            self._closed = True
            for job in [*self._waiting, *self._running]:
                job.cancel()
            self._wake.notify()
        self._thread.join()
        self._finisher.shutdown()

    @property
    def healthy(self) -> bool:
        return self.failure is None and not self._closed

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def position(self, job: Job) -> int:
        """`Job.position`."""
        with self._wake:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def eta(self, job: Job) -> float | None:
        """`Job.eta`."""
        if job.future.done():
            return 0.0
        running, waiting = self._under_way()
        forecasts = self._forecast(running, waiting)
        everyone = [*running, *waiting]
        return forecasts[everyone.index(job)].end if forecasts and job in everyone else None

    def backlog_seconds(self) -> float | None:
        """Seconds until an image submitted now would have its first step; None while nothing was measured."""
        forecasts = self._forecast(*self._under_way(), Workload("none", 2, 1))
        return forecasts[-1].start if forecasts else None

    def room_seconds(self) -> float | None:
        """Seconds until the queue takes one more image: 0.0 if it does now; None while nothing was measured."""
        running, waiting = self._under_way()
        if len(waiting) < self.max_queue:
            return 0.0
        forecasts = self._forecast(running, waiting)
        return forecasts[len(running) + len(waiting) - self.max_queue].start if forecasts else None

    def _under_way(self) -> tuple[list[Job], list[Job]]:
        """Those that are drawn and those that wait, at one moment."""
        with self._wake:
            return list(self._running), list(self._waiting)

    def _forecast(self, running: list[Job], waiting: list[Job], *more: Workload) -> list[Forecast] | None:
        if not self._latency:
            return None
        return forecast([*map(self._load, running)], [*map(self._load, waiting), *more], self.rows, self._latency)

    def _load(self, job: Job) -> Workload:
        """An image's remaining work; for one that waits, by its settings alone."""
        request, trajectory = job.request, job.trajectory
        if trajectory is not None:
            name = next((stage.name for stage in trajectory.stages if not stage.finished), "base")
            height, width = trajectory.latents.shape[-2:]
            return Workload((name, height, width), rows_of(request), max(0, trajectory.total - trajectory.calls))
        name = "base" if request.source is None else "refiner"
        width, height = (
            (request.config.width, request.config.height) if request.source is None else request.source.image.size
        )
        factor = self.models.scale_factor
        return Workload((name, height // factor, width // factor), rows_of(request), calls_of(request))

    def stats(self) -> EngineStats:
        running, waiting = self._under_way()
        rows, seconds = self._last_call
        in_flight = sum(rows_of(job.request) for job in running)
        return EngineStats(
            len(waiting), len(running), in_flight, self.rows, self._ticks, rows, seconds, *self._all_calls
        )

    def submit(self, request: ImageRequest, on_step: OnStep | None = None, priority: int = 0) -> Job:
        """Queue an image: behind those of its own `priority` or a higher one, before the others.

        `on_step(calls, total)` is called after each of its UNet calls, in the engine's thread: it must return at once.
        Raises `QueueFull`, `EngineStopped`, or `ConfigError` for a refiner that the engine's models do not have. That
        they are those of the request's configuration is for the caller to see to.
        """
        if request.config.refiner is not None and self.models.refiner is None:
            raise ConfigError(
                "refiner", "a refiner stage", "left out: the engine's models have no refiner", "refiner = none"
            )
        job = Job(self, request, on_step, priority)
        with self._wake:
            if not self.healthy:
                raise EngineStopped(self.failure or "the engine is closed")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} images are waiting, and no more are taken")
            bisect.insort_right(self._waiting, job, key=lambda waiting: -waiting.priority)
            self._wake.notify()
        return job

    def draw(self, request: ImageRequest) -> GeneratedImage:
        """Submit and wait; Ctrl-C (or a notebook's Stop) cancels at the next step."""
        job = self.submit(request)
        try:
            return job.result()
        except BaseException:
            job.cancel()
            raise

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.profile.threads is not None:
            torch.set_num_threads(self.profile.threads)  # OpenMP keeps it per calling thread
        try:
            while True:
                with self._wake:
                    while not (self._waiting or self._running or self._closed):
                        self._wake.wait()
                    if self._closed and not (self._waiting or self._running):
                        return
                self._tick()
        except BaseException as error:
            log.exception("the engine's thread failed")
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The thread is about to end: say so to everyone."""
        with self._wake:
            self.failure = "".join(traceback.format_exception_only(error)).strip()
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._running.clear()
        for job in left:
            stopped = EngineStopped(self.failure)
            stopped.__cause__ = error
            if not job.future.done():
                job.future.set_exception(stopped)

    def _tick(self) -> None:
        """Drop the cancelled, admit the waiting, make one UNet call, send off the finished."""
        self._ticks += 1
        self._drop_cancelled()
        self._admit()
        if not self._running:
            return
        self._step(self._pick())
        finished = [job for job in self._running if job.trajectory and job.trajectory.done]
        by_shape: dict[torch.Size, list[Job]] = {}
        for job in finished:
            assert job.trajectory is not None
            by_shape.setdefault(job.trajectory.latents.shape, []).append(job)
        for jobs in by_shape.values():
            self._decode(jobs)
            for job in jobs:
                self._running.remove(job)

    def _drop_cancelled(self) -> None:
        with self._wake:
            dropped = [job for job in [*self._waiting, *self._running] if job.cancelled]
            self._waiting = [job for job in self._waiting if not job.cancelled]
        for job in dropped:
            self._end(job, Cancelled("the image was cancelled"))

    def _end(self, job: Job, error: Exception) -> None:
        if job in self._running:
            self._running.remove(job)
        job.future.set_exception(error)

    def _admit(self) -> None:
        """Start waiting images, in order, while the rows in flight stay within the budget; one always may."""
        while True:
            with self._wake:
                if not self._waiting:
                    return
                in_flight = sum(rows_of(job.request) for job in self._running)
                if self._running and in_flight + rows_of(self._waiting[0].request) > self.rows:
                    return
                job = self._waiting.pop(0)
                self._running.append(job)
            job.started = time.monotonic()
            try:
                job.trajectory = Trajectory(self.models, job.request, self._embed)
            except Exception as error:
                self._end(job, error)

    def _embed(self, name: DenoiserName, prompt: str | None, negative: bool) -> Embedding:
        """Embeddings are kept for the prompts used last."""
        key = (name, prompt, negative)
        if key not in self._embeddings:
            denoiser = getattr(self.models, name)
            self._embeddings[key] = denoiser.embed_negative(prompt) if negative else denoiser.embed(prompt)
            if len(self._embeddings) > 256:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return self._embeddings[key]

    def _pick(self) -> list[Job]:
        """The group whose turn was longest ago, as many of its images as the budget has rows for, those first that
        have waited longest."""
        ordered = sorted(self._running, key=lambda job: job.served)
        assert ordered[0].trajectory is not None
        group = ordered[0].trajectory.group
        picked: list[Job] = []
        rows = 0
        for job in ordered:
            assert job.trajectory is not None
            if job.trajectory.group != group:
                continue
            rows += job.trajectory.row_count()
            if picked and rows > self.rows:
                break
            picked.append(job)
        return picked

    def _step(self, jobs: list[Job]) -> None:
        """One UNet call for all jobs. If it fails they are tried apart, so that only the culprit fails; if memory
        ran out, the budget is halved first."""
        trajectories = [job.trajectory for job in jobs if job.trajectory]
        began, group = time.monotonic(), trajectories[0].group
        predictions: tuple[torch.Tensor, ...] | None = None
        exhausted = False
        try:
            inputs = [trajectory.inputs() for trajectory in trajectories]
            predictions = self._predict(group[0], inputs)
        except Exception as error:
            if len(jobs) == 1:
                self._end(jobs[0], error)
                return
            exhausted = isinstance(error, torch.OutOfMemoryError)
        if predictions is None:  # out here the error is gone, and with its frames the memory that they held
            if exhausted:
                self.rows = max(2, self.rows // 2)
                log.warning("out of memory with %d images in one call; the row budget is now %d", len(jobs), self.rows)
                torch.cuda.empty_cache()
            half = len(jobs) // 2
            self._step(jobs[:half])
            self._step(jobs[half:])
            return
        for job, trajectory, prediction in zip(jobs, trajectories, predictions, strict=True):
            try:
                trajectory.take(prediction)
            except Exception as error:
                self._end(job, error)
                continue
            job.served = self._ticks
            if job.on_step is not None:
                try:
                    job.on_step(trajectory.calls, trajectory.total)
                except Exception:
                    log.exception("a step callback failed; the image goes on without it")
                    job.on_step = None
        self._settle()
        now = time.monotonic()
        for job in jobs:
            job.first_step = job.first_step or now
        self._last_call = rows, seconds = sum(len(each.timesteps) for each in inputs), now - began
        calls, all_rows, all_seconds = self._all_calls
        self._all_calls = calls + 1, all_rows + rows, all_seconds + seconds
        self._latency.took(group, rows, seconds)

    def _settle(self) -> None:
        """Wait for the GPU: else steps would be queued there far ahead, and neither a cancel nor a clock would mean
        anything."""
        if self.models.device.type == "cuda":
            torch.cuda.synchronize(self.models.device)

    @torch.no_grad()
    def _predict(self, name: DenoiserName, inputs: list[Rows]) -> tuple[torch.Tensor, ...]:
        """The UNet's answer for every image's rows."""
        rows = Rows(*(torch.cat(part) for part in zip(*inputs, strict=True)))
        count = len(rows.timesteps)
        if self.profile.compile:
            rows = rows.padded(1 << (count - 1).bit_length())
        dtype = self.models.dtype
        answer = getattr(self.models, name).unet(
            rows.latents.to(dtype),
            rows.timesteps,
            encoder_hidden_states=rows.hidden.to(dtype),
            added_cond_kwargs={"text_embeds": rows.pooled.to(dtype), "time_ids": rows.time_ids},
            return_dict=False,
        )[0]
        parts: tuple[torch.Tensor, ...] = answer[:count].float().split([len(each.timesteps) for each in inputs])
        return parts

    def _decode(self, jobs: list[Job]) -> None:
        """VAE decode of images that finished together; the rest of the work is the finisher's."""
        began = time.monotonic()
        try:
            latents = torch.cat([job.trajectory.latents for job in jobs if job.trajectory])
            pixels = self.models.decode(latents)
            self._latency.took("decode", len(jobs), time.monotonic() - began)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:
                self._decode([job])
            return
        for job, image in zip(jobs, pixels, strict=True):
            denoised = time.monotonic()
            self._finisher.submit(self._finish, job, image, denoised)

    def _finish(self, job: Job, pixels: Any, denoised: float) -> None:
        """Runs in the finisher's thread."""
        try:
            image = finish(pixels, watermark=job.request.config.watermark)
            timings = {
                "queued_ms": 1000 * (job.started - job.submitted),
                "denoise_ms": 1000 * (denoised - job.started),
                "total_ms": 1000 * (time.monotonic() - job.submitted),
            }
            rounded = {name: round(value, 1) for name, value in timings.items()}
            generated = GeneratedImage(image, self._record(job), rounded)
        except Exception as error:
            job.future.set_exception(error)
            return
        job.future.set_result(generated)

    def _record(self, job: Job) -> ImageRecord:
        """All that decides the image's pixels: the only place where such a record begins."""
        assert job.trajectory is not None
        request = job.request
        return ImageRecord(
            version=__version__,
            prompt=request.prompt,
            seed=request.seed,
            config=request.config,
            digest=request.config.digest,
            source=None if request.source is None else request.source.record,
            strength=None if request.source is None else request.source.strength,
            weights=self.weights,
            runtime=self.profile.to_dict(),
            libraries={module.__name__: module.__version__ for module in (diffusers, torch, transformers)},
            **job.trajectory.outcome()._asdict(),
        )
