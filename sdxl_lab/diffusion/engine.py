"""The engine: one thread that owns the models and packs many images' steps into shared UNet calls.

Images of different prompts, seeds, schedulers, step counts and guidance join and leave between any two calls; only
the UNet and the image's size must agree. What the engine keeps of a job stands in its own `Work`, and goes when the job
is over. Every method may be called from any thread.
"""

import bisect
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self, overload

import diffusers
import torch
import transformers
from PIL import Image

from sdxl_lab.config import GenerationConfig, RuntimeProfile
from sdxl_lab.diffusion.denoising import DenoiserName, Rows, Trajectory, calls_of, rows_of
from sdxl_lab.diffusion.inventory import differing, identity
from sdxl_lab.diffusion.latency import Forecast, LatencyModel, Workload, forecast
from sdxl_lab.diffusion.models import Embedding, Models, Prompt, load
from sdxl_lab.errors import Cancelled, EngineStopped, ModelMismatch, QueueFull
from sdxl_lab.images import GeneratedImage, finish, preview
from sdxl_lab.job import Change, ImageRequest, Job, Outcome, Stepped
from sdxl_lab.record import ImageRecord
from sdxl_lab.version import __version__

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]


@dataclass(eq=False)
class Work:
    """A job as the engine has it. `turn` is the tick in which it last had rows."""

    job: Job[Any]
    priority: int
    submitted: float = field(default_factory=lambda: time.monotonic())
    started: float = 0.0
    trajectory: Trajectory | None = None
    turn: int = 0


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
        self._waiting: list[Work] = []
        self._running: list[Work] = []
        self._wake = threading.Condition()
        self._closed = False
        self._ticks = 0
        self._latency = LatencyModel()
        self._last_call = (0, 0.0)
        self._all_calls = (0, 0, 0.0)  # calls, rows, seconds: replaced whole, so that a reader needs no lock
        self._embeddings: OrderedDict[tuple[DenoiserName, Prompt], Embedding] = OrderedDict()
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
            left = [*self._waiting, *self._running]
            self._wake.notify()
        for work in left:
            work.job.cancel()
        self._thread.join()
        self._finisher.shutdown()

    @property
    def healthy(self) -> bool:
        return self.failure is None and not self._closed

    @property
    def queued(self) -> int:
        return len(self._waiting)

    # --- what a job asks of its driver -------------------------------------------------------------------------------

    def position(self, job: Job[Any]) -> int:
        """`Job.position`."""
        with self._wake:
            return next((place for place, work in enumerate(self._waiting, 1) if work.job is job), 0)

    def eta(self, job: Job[Any]) -> float | None:
        """`Job.eta`."""
        running, waiting = self._under_way()
        forecasts = self._forecast(running, waiting)
        place = next((index for index, work in enumerate([*running, *waiting]) if work.job is job), None)
        return forecasts[place].end if forecasts and place is not None else None

    def preview(self, job: Job[Any]) -> Image.Image | None:
        """`Job.preview`."""
        trajectory = next((work.trajectory for work in self._under_way()[0] if work.job is job), None)
        latents = trajectory.denoised() if trajectory else None
        return None if latents is None else preview(latents[0].float().cpu().numpy(), self.models.latent_rgb)

    def cancel(self, job: Job[Any]) -> None:
        """The next tick sees the job's `cancel_reason`."""
        with self._wake:
            self._wake.notify()

    # --- the whole of it ---------------------------------------------------------------------------------------------

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

    def _under_way(self) -> tuple[list[Work], list[Work]]:
        """Those that are drawn and those that wait, at one moment."""
        with self._wake:
            return list(self._running), list(self._waiting)

    def _forecast(self, running: list[Work], waiting: list[Work], *more: Workload) -> list[Forecast] | None:
        if not self._latency:
            return None
        loads = [self._workload(work) for work in waiting]
        return forecast([*map(self._workload, running)], [*loads, *more], self.rows, self._latency)

    def _workload(self, work: Work) -> Workload:
        """An image's remaining work; for one that waits, by its settings alone."""
        request, trajectory = work.job.request, work.trajectory
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
        in_flight = sum(rows_of(work.job.request) for work in running)
        return EngineStats(
            len(waiting), len(running), in_flight, self.rows, self._ticks, rows, seconds, *self._all_calls
        )

    @overload
    def submit(
        self, request: ImageRequest, on_step: OnStep | None = None, priority: int = 0
    ) -> Job[GeneratedImage]: ...

    @overload
    def submit(self, request: Job[Outcome], on_step: OnStep | None = None, priority: int = 0) -> Job[Outcome]: ...

    def submit(self, request: ImageRequest | Job[Any], on_step: OnStep | None = None, priority: int = 0) -> Job[Any]:
        """Queue an image: behind those of its own `priority` or a higher one, before the others.

        `on_step(calls, total)` is called after each of its UNet calls, in the engine's thread: it must return at once.
        Raises `QueueFull`, `EngineStopped`, or `ModelMismatch` for a request of other models than the engine's.
        """
        job = request if isinstance(request, Job) else Job(request)
        self._check_models(job.request)
        if on_step is not None:
            job.watch(_on_step(on_step))
        work = Work(job, priority)
        with self._wake:
            if not self.healthy:
                raise EngineStopped(self.failure or "the engine is closed")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} images are waiting, and no more are taken")
            job.queue(self)
            bisect.insort_right(self._waiting, work, key=lambda waiting: -waiting.priority)
            self._wake.notify()
        return job

    def _check_models(self, request: ImageRequest) -> None:
        """An image must not be drawn by one model and recorded under the name of another. A refiner that a request
        does not use may be another one."""
        asked, own = request.config.model, self.models.ref
        refines = request.config.refiner is not None or request.source is not None
        if any(role != "refiner" or refines for role in differing(own, asked)):
            raise ModelMismatch(asked.to_dict(), f"the one that this engine was loaded for, {own.to_dict()}", own.base)

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
        for work in left:
            stopped = EngineStopped(self.failure)
            stopped.__cause__ = error
            work.job.deliver(stopped)

    def _tick(self) -> None:
        """Drop the cancelled, admit the waiting, make one UNet call, send off the finished."""
        self._ticks += 1
        self._drop_cancelled()
        self._admit()
        if not self._running:
            return
        self._step(self._pick())
        by_shape: dict[torch.Size, list[Work]] = {}
        for work in self._running:
            if work.trajectory and work.trajectory.done:
                by_shape.setdefault(work.trajectory.latents.shape, []).append(work)
        for finished in by_shape.values():
            self._decode(finished)
            for work in finished:
                self._running.remove(work)

    def _drop_cancelled(self) -> None:
        with self._wake:
            dropped = [work for work in [*self._waiting, *self._running] if _is_cancelled(work.job)]
            self._waiting = [work for work in self._waiting if work not in dropped]
        for work in dropped:
            self._end(work, Cancelled("the image was cancelled"))

    def _end(self, work: Work, error: Exception) -> None:
        if work in self._running:
            self._running.remove(work)
        work.job.deliver(error)

    def _admit(self) -> None:
        """Start waiting images, in order, while the rows in flight stay within the budget; one always may."""
        while True:
            with self._wake:
                if not self._waiting:
                    return
                in_flight = sum(rows_of(work.job.request) for work in self._running)
                if self._running and in_flight + rows_of(self._waiting[0].job.request) > self.rows:
                    return
                work = self._waiting.pop(0)
                self._running.append(work)
            work.started = time.monotonic()
            try:
                work.trajectory = Trajectory(self.models, work.job.request, self._embed)
                work.job.run()
            except Exception as error:
                self._end(work, error)

    def _embed(self, name: DenoiserName, prompt: Prompt) -> Embedding:
        """Embeddings are kept for the prompts used last."""
        key = (name, prompt)
        if key not in self._embeddings:
            self._embeddings[key] = getattr(self.models, name).embed(prompt)
            if len(self._embeddings) > 256:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return self._embeddings[key]

    def _pick(self) -> list[Work]:
        """The group whose turn was longest ago, as many of its images as the budget has rows for, those first that
        have waited longest."""
        ordered = sorted(self._running, key=lambda work: work.turn)
        assert ordered[0].trajectory is not None
        group = ordered[0].trajectory.group
        picked: list[Work] = []
        rows = 0
        for work in ordered:
            assert work.trajectory is not None
            if work.trajectory.group != group:
                continue
            rows += work.trajectory.row_count()
            if picked and rows > self.rows:
                break
            picked.append(work)
        return picked

    def _step(self, picked: list[Work]) -> None:
        """One UNet call for all of them. If it fails they are tried apart, so that only the culprit fails; if memory
        ran out, the budget is halved first."""
        trajectories = [work.trajectory for work in picked if work.trajectory]
        began, group = time.monotonic(), trajectories[0].group
        predictions: tuple[torch.Tensor, ...] | None = None
        exhausted = False
        try:
            inputs = [trajectory.inputs() for trajectory in trajectories]
            predictions = self._predict(group[0], inputs)
        except Exception as error:
            if len(picked) == 1:
                self._end(picked[0], error)
                return
            exhausted = isinstance(error, torch.OutOfMemoryError)
        if predictions is None:  # out here the error is gone, and with its frames the memory that they held
            if exhausted:
                self.rows = max(2, self.rows // 2)
                log.warning(
                    "out of memory with %d images in one call; the row budget is now %d", len(picked), self.rows
                )
                torch.cuda.empty_cache()
            half = len(picked) // 2
            self._step(picked[:half])
            self._step(picked[half:])
            return
        stepped = []
        for work, trajectory, prediction in zip(picked, trajectories, predictions, strict=True):
            try:
                trajectory.take(prediction)
            except Exception as error:
                self._end(work, error)
                continue
            work.turn = self._ticks
            stepped.append((work.job, trajectory))
        self._settle()
        self._last_call = rows, seconds = sum(len(each.timesteps) for each in inputs), time.monotonic() - began
        calls, all_rows, all_seconds = self._all_calls
        self._all_calls = calls + 1, all_rows + rows, all_seconds + seconds
        self._latency.took(group, rows, seconds)
        for job, trajectory in stepped:
            job.step(trajectory.calls, trajectory.total)

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

    def _decode(self, finished: list[Work]) -> None:
        """VAE decode of images that finished together; the rest of the work is the finisher's."""
        began = time.monotonic()
        try:
            latents = torch.cat([work.trajectory.latents for work in finished if work.trajectory])
            pixels = self.models.decode(latents)
            self._latency.took("decode", len(finished), time.monotonic() - began)
        except Exception as error:
            if len(finished) == 1:
                finished[0].job.deliver(error)
                return
            for work in finished:
                self._decode([work])
            return
        for work, image in zip(finished, pixels, strict=True):
            denoised = time.monotonic()
            self._finisher.submit(self._finish, work, image, denoised)

    def _finish(self, work: Work, pixels: Any, denoised: float) -> None:
        """Runs in the finisher's thread."""
        try:
            image = finish(pixels, watermark=work.job.request.config.watermark)
            timings = {
                "queued_ms": 1000 * (work.started - work.submitted),
                "denoise_ms": 1000 * (denoised - work.started),
                "total_ms": 1000 * (time.monotonic() - work.submitted),
            }
            rounded = {name: round(value, 1) for name, value in timings.items()}
            drawn = GeneratedImage(image, self._record(work), rounded)
        except Exception as error:
            work.job.deliver(error)
            return
        work.job.deliver(drawn)

    def _record(self, work: Work) -> ImageRecord:
        """All that decides the image's pixels: the only place where such a record begins."""
        assert work.trajectory is not None
        request = work.job.request
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
            **work.trajectory.outcome()._asdict(),
        )


def _is_cancelled(job: Job[Any]) -> bool:
    """Whether it is to be cancelled, or was ended by others: a service that stops waits for no step."""
    return job.over or job.cancel_reason is not None


def _on_step(callback: OnStep) -> Callable[[Change], None]:
    def watch(change: Change) -> None:
        if isinstance(change, Stepped):
            callback(*change)

    return watch
