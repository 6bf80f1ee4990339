"""The engine: one thread that owns the models and packs many images' steps into shared UNet calls.

Images of different prompts, seeds, schedulers, step counts and guidance join and leave between any two calls; only
the UNet and the image's size must agree. What the engine keeps of a job stands in its own `Work`, and goes when the job
is over. Every method may be called from any thread.
"""

import logging
import math
import os
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, overload

import diffusers
import torch
import transformers
from PIL import Image

from sdxl_lab.config import GenerationConfig, LoraRef, RuntimeProfile
from sdxl_lab.diffusion import adapters, inversions
from sdxl_lab.diffusion.adapters import Applied, Loras
from sdxl_lab.diffusion.batching import Batcher
from sdxl_lab.diffusion.denoising import DenoiserName, Rows, Trajectory, parts_of, rows_of
from sdxl_lab.diffusion.inventory import differing, identity
from sdxl_lab.diffusion.latency import Forecast, Group, LatencyModel
from sdxl_lab.diffusion.models import Models, load, settled
from sdxl_lab.diffusion.processor import CallThreads, capability
from sdxl_lab.diffusion.prompts import Embedding, Prompt, TokenCounter
from sdxl_lab.environment import processor
from sdxl_lab.errors import Cancelled, EngineStopped, ModelMismatch, QueueFull
from sdxl_lab.images import GeneratedImage, finish, preview
from sdxl_lab.job import Change, ImageRequest, Job, Outcome, Stepped
from sdxl_lab.record import ImageRecord
from sdxl_lab.version import __version__

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
REFORECAST = 20.0  # a forecast serves for so many times as long as it took: that much of a core it may have
CHUNKS_KEPT = 256  # of embedded prompts; one of SDXL's is 0.6 MB in float32
NOTE = 500  # calls after which the measured seconds are written down


@dataclass(eq=False)
class Work:
    """A job as the engine has it."""

    job: Job[Any]
    submitted: float
    exact: bool
    started: float = 0.0
    trajectory: Trajectory | None = None
    loras: Applied = adapters.NONE


@dataclass(frozen=True)
class EngineStats:
    """The engine at a glance. `row_budget` is the most rows of a call; `rows` and `seconds` are those of the last UNet
    call; the last three fields are of all UNet calls since the start."""

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
    """Draws images. Use it as a context manager, or call `close`. `tokens` says how much is read of a request's texts,
    before it is drawn."""

    def __init__(
        self,
        models: Models,
        profile: RuntimeProfile,
        weights: dict[str, str],
        max_queue: int = 1000,
        latency: LatencyModel | None = None,
    ) -> None:
        self.models, self.profile, self.weights = models, profile, weights
        self.processor = processor_of(models.device)
        self.max_queue = max_queue
        self.tokens = TokenCounter(models.base.tokenizers)
        self.failure: str | None = None
        self._latency = LatencyModel() if latency is None else latency
        self._batcher = Batcher(self._latency, profile.rows, profile.active, profile.order)
        self._works: dict[Job[Any], Work] = {}  # with the batcher and its measurements, under the lock of `_wake`
        self._wake = threading.Condition()
        self._chores: deque[tuple[Future[None], Callable[[], object]]] = deque()
        self._closed = False
        self._ticks = 0
        self._forecast_made, self._forecast_took = -math.inf, 0.0
        self._forecasts: dict[Hashable, Forecast] = {}
        self._last_call = (0, 0.0)
        self._all_calls = (0, 0, 0.0)  # calls, rows, seconds: replaced whole, so that a reader needs no lock
        self._embeddings: OrderedDict[tuple[Any, ...], Embedding] = OrderedDict()
        self._loras = Loras(models.base, profile.lora_mib << 20)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, config: GenerationConfig, profile: RuntimeProfile | None = None, max_queue: int = 1000) -> Self:
        """An engine for a configuration's models. Raises `ModelError`."""
        profile = settled(profile or RuntimeProfile())
        # In a thread that ends: torch gives every thread an OpenMP pool of its own, and while there are more threads in
        # all pools than cores, none of them waits actively any more: UNet calls of two rows took twice as long.
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
            models = loader.submit(load, config.model, profile).result()
        weights = identity(config.model)
        return cls(models, profile, weights, max_queue, LatencyModel.remembered(**_decides_latency(profile, weights)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is queued or running and end the thread."""
        with self._wake:
            self._closed = True
            left = list(self._works)
            self._wake.notify()
        for job in left:
            job.cancel()
        self._thread.join()
        self._finisher.shutdown()
        self._latency.keep(self._latency.to_dict())

    @property
    def runtime(self) -> dict[str, Any]:
        """The profile as it was settled, in plain values; what computes, and on a CPU the instructions that torch uses
        there."""
        found = {"processor": self.processor} | ({"cpu_capability": capability()} if self._on_cpu else {})
        return self.profile.to_dict() | found

    @property
    def healthy(self) -> bool:
        return self.failure is None and not self._closed

    @property
    def queued(self) -> int:
        return len(self._batcher.waiting)

    @property
    def filled(self) -> bool:
        """Whether the images here fill a UNet call."""
        with self._wake:
            return self._batcher.filled

    @property
    def rows(self) -> int:
        """The most rows of a call: those of the profile, or fewer since memory ran out."""
        return self._batcher.max_rows

    @rows.setter
    def rows(self, rows: int) -> None:
        with self._wake:
            self._batcher.max_rows = rows
            self._batcher.measured()

    # --- what a job asks of its driver -------------------------------------------------------------------------------

    def position(self, job: Job[Any]) -> int:
        """`Job.position`."""
        with self._wake:
            return self._batcher.position(job, time.monotonic())

    def eta(self, job: Job[Any]) -> float | None:
        """`Job.eta`."""
        found = self._forecast().get(job)
        return None if found is None else found.end

    def preview(self, job: Job[Any]) -> Image.Image | None:
        """`Job.preview`."""
        work = self._works.get(job)
        latents = work.trajectory.denoised() if work and work.trajectory else None
        if latents is None:
            return None
        sketch = self.models.sketched(latents)
        if sketch is not None:
            return Image.fromarray((sketch * 255).round().astype("uint8"))
        return preview(latents[0].float().cpu().numpy(), self.models.latent_rgb)

    def cancel(self, job: Job[Any]) -> None:
        """The next tick sees the job's `cancel_reason`."""
        with self._wake:
            self._wake.notify()

    def prepare(self, loras: Sequence[LoraRef]) -> None:
        """Read LoRAs before anybody waits for an image with them. Raises `ModelError` for one that cannot be read or
        does not fit, `EngineStopped`."""
        self._do(lambda: [self._loras.applied([ref]) for ref in loras])

    # --- the whole of it ---------------------------------------------------------------------------------------------

    def room_seconds(self) -> float | None:
        """Seconds until the queue takes one more image: 0.0 if it does now; None while nothing was measured."""
        with self._wake:
            waiting = self._batcher.waiting
        if len(waiting) < self.max_queue:
            return 0.0
        forecasts = self._forecast()
        starts = sorted(forecasts[job].start for job in waiting if job in forecasts)
        return starts[len(waiting) - self.max_queue] if len(starts) == len(waiting) else None

    def _forecast(self) -> dict[Hashable, Forecast]:
        """Of all that is here, from now; empty while nothing was measured. Who asks often gets the last one again, with
        the time that passed taken off: a long queue's takes longer than a call."""
        now = time.monotonic()
        with self._wake:
            if not self._latency:
                return {}
            known = self._forecasts.keys() >= self._works.keys()
            if not known or now - self._forecast_made > REFORECAST * self._forecast_took:
                twin = self._batcher.twin()
            else:
                passed = now - self._forecast_made
                return {
                    job: Forecast(max(0.0, each.start - passed), max(0.0, each.end - passed))
                    for job, each in self._forecasts.items()
                    if job in self._works
                }
        forecasts = twin.forecast(now)
        with self._wake:
            self._forecasts, self._forecast_made, self._forecast_took = forecasts, now, time.monotonic() - now
        return forecasts

    def calibrate(self, config: GenerationConfig, seconds: float = 3.0) -> None:
        """Measure what calls of a few row counts take, before anybody waits for an image: a new engine learns it from
        its first images else. Ends after so many seconds for each size, at once for one that is known from an
        earlier start; a compiled UNet is called until all its row counts are compiled. Raises `EngineStopped`."""
        limit = math.inf if self.profile.compile else seconds
        for each in (config, *((config.second_pass(),) if config.hires else ())):
            self._do(partial(self._calibrate, ImageRequest(each, "a calibration", 0), limit))

    def _do(self, chore: Callable[[], object]) -> None:
        """Have the engine's thread do it between two calls, and wait. Raises what it raises, or `EngineStopped`."""
        future: Future[None] = Future()
        with self._wake:
            if not self.healthy:
                raise EngineStopped(self.failure or "the engine is closed")
            self._chores.append((future, chore))
            self._wake.notify()
        try:
            future.result()
        except CancelledError:
            raise EngineStopped(self.failure or "the engine is closed") from None

    def _calibrate(self, request: ImageRequest, seconds: float) -> None:
        self._use_threads(self.profile.exact)
        trajectory = Trajectory(self.models, request, partial(self._embed, self.profile.exact))
        group, row = trajectory.group, trajectory.inputs().at([0])
        ends, warm = time.monotonic() + seconds, 0
        while not self._closed and (count := self._batcher.untried(group)) is not None:
            began = time.monotonic()
            if began > ends:
                return
            try:
                self._predict(group.name, [row.padded(count)])
            except torch.OutOfMemoryError:
                self._halve(count)
                continue
            self._settle()
            if count == warm:
                with self._wake:
                    self._latency.took(group, count, time.monotonic() - began)
                    self._batcher.measured()
            warm = count  # a first call prepares what the later ones find

    def stats(self) -> EngineStats:
        rows, seconds = self._last_call
        with self._wake:
            active, queued = self._batcher.active, len(self._batcher.waiting)
            in_flight = sum(rows_of(job.request) for job in self._works if job in active)
        return EngineStats(queued, len(active), in_flight, self.rows, self._ticks, rows, seconds, *self._all_calls)

    @overload
    def submit(
        self, request: ImageRequest, on_step: OnStep | None = None, priority: int = 0, exact: bool | None = None
    ) -> Job[GeneratedImage]: ...

    @overload
    def submit(
        self, request: Job[Outcome], on_step: OnStep | None = None, priority: int = 0, exact: bool | None = None
    ) -> Job[Outcome]: ...

    def submit(
        self,
        request: ImageRequest | Job[Any],
        on_step: OnStep | None = None,
        priority: int = 0,
        exact: bool | None = None,
    ) -> Job[Any]:
        """Queue an image. Who goes first is the batcher's to say; a higher `priority` goes before.

        `on_step(calls, total)` is called after each of its UNet calls, in the engine's thread: it must return at once.
        `exact` draws it as `RuntimeProfile.exact` does, whose value stands where it is left out. Raises `QueueFull`,
        `EngineStopped`, or `ModelMismatch` for a request of other models than the engine's.
        """
        job = request if isinstance(request, Job) else Job(request)
        self._check_models(job.request)
        if on_step is not None:
            job.watch(_on_step(on_step))
        parts, alone = parts_of(job.request, self.models.scale_factor), self.profile.exact if exact is None else exact
        with self._wake:
            if not self.healthy:
                raise EngineStopped(self.failure or "the engine is closed")
            if self.queued >= self.max_queue:
                raise QueueFull(f"{self.queued} images are waiting, and no more are taken")
            job.queue(self)
            now = time.monotonic()
            self._works[job] = Work(job, now, alone)
            self._batcher.add(job, parts, now, priority, alone=alone)
            self._wake.notify()
        return job

    def _check_models(self, request: ImageRequest) -> None:
        """An image must not be drawn by one model and recorded under the name of another. A refiner that a request
        does not use may be another one."""
        asked, own = request.config.model, self.models.ref
        refines = request.config.refiner is not None or (
            request.source is not None and request.source.stage == "refiner"
        )
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
        # A compiled UNet is compiled anew for another number of threads, and on a GPU the number does not matter.
        self._threads = CallThreads(adapt=self._on_cpu and self.profile.threads is None and not self.profile.compile)
        try:
            while True:
                with self._wake:
                    while not (self._works or self._chores or self._closed):
                        self._wake.wait()
                    if self._closed and not self._works:
                        return
                self._do_chores()
                self._tick()
        except BaseException as error:
            log.exception("the engine's thread failed")
            self._fail(error)
        finally:
            for future, _ in self._chores:
                future.cancel()

    def _do_chores(self) -> None:
        while self._chores:
            future, chore = self._chores.popleft()
            try:
                chore()
                future.set_result(None)
            except Exception as error:  # the caller's to see
                future.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        """The thread is about to end: say so to everyone."""
        with self._wake:
            self.failure = "".join(traceback.format_exception_only(error)).strip()
            left = list(self._works)
            self._works.clear()
            for job in left:
                self._batcher.remove(job)
        for job in left:
            stopped = EngineStopped(self.failure)
            stopped.__cause__ = error
            job.deliver(stopped)

    def _tick(self) -> None:
        """Drop the cancelled, carry out the batcher's plan, send off the finished."""
        self._ticks += 1
        for job in [job for job in list(self._works) if _is_cancelled(job)]:
            self._end(job, Cancelled("the image was cancelled"))
        with self._wake:
            plan = self._batcher.plan(time.monotonic())
            for key in plan.start:
                self._batcher.started(key)
            planned = [self._works[job] for job in plan.call if job in self._works]
        exact = any(work.exact for work in planned)
        self._use_threads(exact)
        picked = self._started(planned)
        if not picked:
            return
        self._step(picked, exact)
        by_shape: dict[torch.Size, list[Work]] = {}
        for work in picked:
            if work.job in self._works and work.trajectory and work.trajectory.done:
                by_shape.setdefault(work.trajectory.latents.shape, []).append(work)
        for finished in by_shape.values():
            self._decode(finished)
            for work in finished:
                self._forget(work.job)

    def _use_threads(self, exact: bool) -> None:
        """torch's threads for all that is computed in this tick; a call that is not exact may have others. Sums are
        rounded in another order by another number of them, so `exact` has one number everywhere."""
        if self._on_cpu:
            torch.set_num_threads(self._exact_threads if exact else self._threads.count)

    @property
    def _on_cpu(self) -> bool:
        return self.models.device.type == "cpu"

    @property
    def _exact_threads(self) -> int:
        return self.profile.threads or 1

    def _started(self, planned: list[Work]) -> list[Work]:
        """Those that share the call, after the new ones were prepared: their exact work is known only then."""
        ready = []
        for work in planned:
            if work.trajectory is None:
                work.started = time.monotonic()
                try:
                    work.loras = self._loras.applied(work.job.request.loras)
                    embed = partial(self._embed, work.exact, loras=work.loras)
                    work.trajectory = Trajectory(self.models, work.job.request, embed)
                    work.job.run()
                except Exception as error:
                    self._end(work.job, error)
                    continue
                with self._wake:
                    self._batcher.refine(work.job, work.trajectory.parts())
            ready.append(work)
        return [
            work
            for work in ready
            if work.trajectory and ready[0].trajectory and work.trajectory.group == ready[0].trajectory.group
        ]

    def _forget(self, job: Job[Any]) -> None:
        with self._wake:
            self._works.pop(job, None)
            self._batcher.remove(job)

    def _end(self, job: Job[Any], error: Exception) -> None:
        self._forget(job)
        job.deliver(error)

    def _embed(self, exact: bool, name: DenoiserName, prompt: Prompt, *, loras: Applied = adapters.NONE) -> Embedding:
        """Embeddings are kept for the prompts used last, with the LoRAs of the text encoders that they were made with:
        the base's, since LoRAs are made for it."""
        applied = loras if name == "base" else adapters.NONE
        key = (name, prompt, exact, applied.text)
        if key not in self._embeddings:
            with self._loras.in_text(applied):
                self._embeddings[key] = getattr(self.models, name).embed(prompt)
            while len(self._embeddings) > 1 and sum(each.chunks for each in self._embeddings.values()) > CHUNKS_KEPT:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return self._embeddings[key]

    def _step(self, picked: list[Work], exact: bool) -> None:
        """One UNet call for all of them. If it fails they are tried apart, so that only the culprit fails; if memory
        ran out, the budget is halved first."""
        picked = sorted(picked, key=lambda work: work.loras.order)  # the same LoRAs side by side
        trajectories = [work.trajectory for work in picked if work.trajectory]
        began, group = time.monotonic(), trajectories[0].group
        predictions: tuple[torch.Tensor, ...] | None = None
        exhausted = False
        try:
            inputs = [trajectory.inputs() for trajectory in trajectories]
            with nullcontext() if exact else self._threads.call((group, sum(len(each.timesteps) for each in inputs))):
                predictions = self._predict(group.name, inputs, *self._changing(group.name, picked))
        except Exception as error:
            if len(picked) == 1:
                self._end(picked[0].job, error)
                return
            exhausted = isinstance(error, torch.OutOfMemoryError)
        if predictions is None:  # out here the error is gone, and with its frames the memory that they held
            if exhausted:
                self._halve(sum(trajectory.row_count() for trajectory in trajectories))
            half = len(picked) // 2
            self._step(picked[:half], exact)
            self._step(picked[half:], exact)
            return
        stepped = []
        for work, trajectory, prediction in zip(picked, trajectories, predictions, strict=True):
            try:
                trajectory.take(prediction)
            except Exception as error:
                self._end(work.job, error)
                continue
            stepped.append((work.job, trajectory))
        self._settle()
        self._last_call = rows, seconds = sum(len(each.timesteps) for each in inputs), time.monotonic() - began
        calls, all_rows, all_seconds = self._all_calls
        self._all_calls = calls + 1, all_rows + rows, all_seconds + seconds
        with self._wake:
            if exact == self.profile.exact:
                self._latency.took(group, rows, seconds)
                self._batcher.measured()
            self._batcher.called([job for job, _ in stepped if job in self._batcher])
            known = self._latency.to_dict() if calls % NOTE == NOTE - 1 else None
        if known is not None:
            self._finisher.submit(self._latency.keep, known)
        for job, trajectory in stepped:
            job.step(trajectory.calls, trajectory.total)

    def _halve(self, rows: int) -> None:
        """So many rows were too many for the memory."""
        self.rows = min(self.rows, max(2, rows // 2))
        log.warning("out of memory: a call has at most %d rows from now on", self.rows)
        torch.cuda.empty_cache()

    def _settle(self) -> None:
        """Wait for the GPU: else steps would be queued there far ahead, and neither a cancel nor a clock would mean
        anything."""
        if self.models.device.type == "cuda":
            torch.cuda.synchronize(self.models.device)

    def _changing(self, name: str, picked: list[Work]) -> list[Applied]:
        """The LoRAs of each image, which are the base's; none where no image has one."""
        loras = [work.loras for work in picked] if name == "base" else []
        return loras if any(each.unet for each in loras) else []

    @torch.inference_mode()
    def _predict(self, name: str, inputs: list[Rows], *loras: Applied) -> tuple[torch.Tensor, ...]:
        """The UNet's answer for every image's rows, with the LoRAs of each image, if any has some, in its rows."""
        rows = Rows.joined(inputs)
        counts = [len(each.timesteps) for each in inputs]
        of_rows = [each for each, count in zip(loras, counts, strict=True) for _ in range(count)] if loras else []
        calls = rows.calls()
        if len(calls) == 1:
            return self._answer(name, rows, of_rows).split(counts)
        parts = [self._answer(name, rows.at(places), [of_rows[place] for place in places if loras]) for places in calls]
        order = torch.tensor([place for places in calls for place in places]).argsort()
        return torch.cat(parts)[order].split(counts)

    def _answer(self, name: str, rows: Rows, loras: list[Applied]) -> torch.Tensor:
        """One call of the UNet: its answer for every row, in float32. With LoRAs in its rows it goes without its graphs
        and its compiled code."""
        count, dtype = len(rows.timesteps), self.models.dtype
        if self.profile.compile:
            rows = rows.padded(1 << (count - 1).bit_length())
        unet = getattr(self.models, name).unet
        with self._loras.in_unet(loras) if loras else nullcontext():
            answer: torch.Tensor = (adapters.bare(unet) if loras else unet)(
                rows.latents.to(dtype),
                rows.timesteps,
                encoder_hidden_states=rows.text().to(dtype),
                timestep_cond=rows.timestep_cond.to(dtype) if rows.timestep_cond.shape[1] else None,
                added_cond_kwargs={"text_embeds": rows.pooled.to(dtype), "time_ids": rows.time_ids},
                **rows.asked(self.models.device),
                return_dict=False,
            )[0]
        return answer[:count].float()

    def _decode(self, finished: list[Work]) -> None:
        """VAE decode of images that finished together; the rest of the work is the finisher's."""
        began = time.monotonic()
        try:
            latents = torch.cat([work.trajectory.latents for work in finished if work.trajectory])
            pixels = self.models.decode(latents)
            group = Group("decode", *latents.shape[-2:])
            with self._wake:
                self._latency.took(group, len(finished), time.monotonic() - began)
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

    def _runtime(self, exact: bool) -> dict[str, Any]:
        """The runtime as this image was drawn with it."""
        threads = self._exact_threads if exact and self._on_cpu else self.profile.threads
        return self.runtime | self.profile.with_(exact=exact, threads=threads).to_dict()

    def _tiles(self, trajectory: Trajectory) -> dict[str, int]:
        """The side of the tiles that the VAE had the image in, if it did."""
        tile = self.models.tile(*trajectory.stages[-1].size)
        return {} if tile is None else {"vae_tile": tile}

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
            weights=self.weights | dict(work.loras.weights) | inversions.identities(request.config.embeddings),
            runtime=self._runtime(work.exact) | self._tiles(work.trajectory),
            libraries={module.__name__: module.__version__ for module in (diffusers, torch, transformers)},
            prompt_2=request.prompt_2,
            source_image=None if request.source is None else request.source.to_record(),
            tokens=self.tokens(request),
            **work.trajectory.outcome()._asdict(),
        )


def processor_of(device: torch.device) -> str:
    """The name of what computes: the GPU's, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _decides_latency(profile: RuntimeProfile, weights: dict[str, str]) -> dict[str, Any]:
    """What a call's seconds depend on, beside its group and rows."""
    return {
        "processor": processor_of(torch.device(profile.device)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "weights": weights,
        **{
            name: getattr(profile, name)
            for name in ("dtype", "threads", "channels_last", "fuse_qkv", "compile", "exact", "storage")
        },
    }


def _is_cancelled(job: Job[Any]) -> bool:
    """Whether it is to be cancelled, or was ended by others: a service that stops waits for no step."""
    return job.over or job.cancel_reason is not None


def _on_step(callback: OnStep) -> Callable[[Change], None]:
    def watch(change: Change) -> None:
        if isinstance(change, Stepped):
            callback(*change)

    return watch
