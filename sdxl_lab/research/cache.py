"""Cells: images with their numbers, each kept under a key that says all that decides its pixels.

What is there under its key is never drawn again, whoever asks: a sweep that was interrupted, another sweep, a study.
A cell is two files, `KEY.png` and `KEY.json`, each written beside its place and then renamed; the second comes last and
holds the checksum of the first, so a cell is there whole or not at all.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Generator, ItemsView, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from sdxl_lab.config import GenerationConfig, ModelRef, RuntimeProfile, canonical
from sdxl_lab.diffusion import inversions
from sdxl_lab.diffusion.denoising import parts_of
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import ModelError, differing, identity
from sdxl_lab.diffusion.lora_files import identities
from sdxl_lab.diffusion.models import settled
from sdxl_lab.environment import processor
from sdxl_lab.errors import EngineStopped
from sdxl_lab.evaluation.metrics import Metric
from sdxl_lab.files import write_whole
from sdxl_lab.images import GeneratedImage, ImageError, open_image, read_record
from sdxl_lab.job import ImageRequest, Job, JobState
from sdxl_lab.record import Digest, Record, RecordError
from sdxl_lab.version import __version__

log = logging.getLogger(__name__)

FOLDER = Path("runs/cache")
LIBRARIES = ("diffusers", "torch", "transformers", "scipy", "torchsde", "invisible-watermark", "opencv-python")
# How many rows share a call and on how many cores moves a float32 image by less than 1e-6, far below 8 bits.
MOVES_PIXELS = ("dtype", "channels_last", "fuse_qkv", "compile")
BATCH = 64  # images that a metric gets at once


@dataclass(frozen=True)
class Cell:
    """One image that is wanted. Raises `ConfigError` when something is out of its range."""

    config: GenerationConfig
    prompt: str
    seed: int
    prompt_2: str | None = None

    def __post_init__(self) -> None:
        _ = self.request

    @property
    def request(self) -> ImageRequest:
        return ImageRequest(self.config, self.prompt, self.seed, prompt_2=self.prompt_2)

    @cached_property
    def cost(self) -> float:
        """What drawing it takes, roughly, in UNet rows x latents: for the forecast alone."""
        parts = parts_of(self.request)
        return float(sum(part.calls * part.rows * part.group.height * part.group.width for part in parts))


@dataclass(frozen=True)
class Progress:
    """Where the work stands: cells done of all, those drawn now rather than found, those failed. `eta` is in seconds,
    None while nothing was drawn."""

    done: int
    total: int
    drawn: int
    failed: int
    eta: float | None


OnProgress = Callable[[Progress], None]


@dataclass
class _Course:
    """The counters behind `Progress`."""

    total: int
    left: float
    on_progress: OnProgress | None
    done: int = 0
    drawn: int = 0
    failed: int = 0
    spent: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def took(self, cell: Cell, failed: bool) -> None:
        self.done += 1
        self.drawn += not failed
        self.failed += failed
        self.left -= cell.cost
        self.spent += cell.cost
        self.tell()

    def tell(self) -> None:
        if self.on_progress is not None:
            eta = (time.monotonic() - self.began) / self.spent * self.left if self.spent else None
            self.on_progress(Progress(self.done, self.total, self.drawn, self.failed, eta))


class CellRecord(Record):
    """What stands beside a cell's image: the image's sha256, what drawing it took (`timings` in milliseconds), and what
    was measured of it; a sentence for each text of which words were cut. A cell of 0.1.0 has no such sentences."""

    NOUN: ClassVar[str] = "the cell"
    model_config = ConfigDict(ser_json_inf_nan="constants")  # the PSNR of equal images is infinite

    png: Digest
    timings: dict[str, float]
    unet_calls: int
    unet_rows: int
    metrics: dict[str, float] = {}
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_first_version(cls, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        return {**plain, "schema": cls.SCHEMA}


class ImageCache:
    """The cells in a folder, and the engine that draws those that are missing. Use it as a context manager.

    `engine` draws where one is given: cells of other models than its own fail. Else one is loaded when the first cell
    is missing.
    """

    def __init__(
        self, folder: Path | str = FOLDER, profile: RuntimeProfile | None = None, engine: Engine | None = None
    ) -> None:
        self.folder = Path(folder)
        self._lent = engine
        self._own: tuple[ModelRef, Engine] | None = None
        self.profile = engine.profile if engine else profile or RuntimeProfile()
        self._weights: dict[ModelRef, dict[str, str]] = {}
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own[1].close()
            self._own = None

    # --- what is there ---------------------------------------------------------------------------------------------

    def key(self, cell: Cell) -> str:
        """32 hex digits: sha256 over configuration, prompt, seed, weights, runtime and the versions that move pixels.

        Raises `ModelError` where the weights are not there.
        """
        ground = self.ground(cell.config.model)
        if cell.config.refiner is None:
            ground["weights"] = {role: value for role, value in ground["weights"].items() if role != "refiner"}
        embedded = inversions.identities(cell.config.embeddings)
        ground["weights"] = ground["weights"] | identities(cell.config.loras) | embedded
        decides = {"config": cell.config.digest, "prompt": cell.prompt, "seed": cell.seed, **ground}
        if cell.prompt_2 is not None:
            decides["prompt_2"] = cell.prompt_2
        return hashlib.sha256(canonical(decides).encode()).hexdigest()[:32]

    def ground(self, model: ModelRef) -> dict[str, Any]:
        """What decides pixels beside what is asked: weights, runtime, versions. Raises `ModelError`."""
        return {
            "weights": self._identity(model),
            "runtime": self._runtime,
            "libraries": _versions(),
            "version": __version__,
        }

    @cached_property
    def _runtime(self) -> dict[str, Any]:
        profile = settled(self.profile).to_dict()
        moves = {"device": profile["device"].partition(":")[0], **{name: profile[name] for name in MOVES_PIXELS}}
        exact = {"exact": True, "threads": self.profile.threads, "processor": processor()}
        return moves | exact if self.profile.exact else moves

    def _identity(self, model: ModelRef) -> dict[str, str]:
        """What a model is. Of the engine lent only where it has that model: what it does not draw is not its own."""
        if self._lent is not None:
            others = differing(self._lent.models.ref, model)
            if not others:
                return self._lent.weights
            if others == ["refiner"]:  # it still draws what needs none
                return self._lent.weights | {role: value for role, value in self._named(model) if role == "refiner"}
        return dict(self._named(model))

    def _named(self, model: ModelRef) -> ItemsView[str, str]:
        if model not in self._weights:
            self._weights[model] = identity(model)
        return self._weights[model].items()

    def __contains__(self, key: str) -> bool:
        return self._notes(key) is not None

    def image(self, key: str) -> GeneratedImage:
        """A finished cell's image. Raises `ImageError` where there is none."""
        notes = self._notes(key)
        if notes is None:
            raise ImageError(f"{self.folder} must hold the cell; received {key!r}, which is missing or half-written")
        path = self._path(key, "png")
        return GeneratedImage(open_image(path), read_record(path), notes.timings)

    def values(self, key: str, metrics: Sequence[Metric], reference: str | None = None) -> dict[str, float]:
        """What was measured of a finished cell, by the metric's name."""
        notes = self._notes(key)
        found = notes.metrics if notes else {}
        named = {metric.name: _measured_as(metric, reference) for metric in metrics}
        return {name: found[measured] for name, measured in named.items() if measured in found}

    def costs(self, key: str) -> dict[str, float]:
        """What a finished cell took: `unet_calls`, `unet_rows`, and `seconds` of denoising, shared with its batch."""
        notes = self._notes(key)
        if notes is None:
            return {}
        seconds = notes.timings["denoise_ms"] / 1000
        return {"unet_calls": notes.unet_calls, "unet_rows": notes.unet_rows, "seconds": seconds}

    def warning(self, key: str) -> str | None:
        """Which words of a finished cell's texts were cut; None where none were."""
        notes = self._notes(key)
        return " ".join(notes.warnings) or None if notes else None

    def warn(self, keys: Iterable[str]) -> None:
        """Log which words of these cells' texts were cut, each once."""
        for warning in filter(None, map(self.warning, keys)):
            if warning not in self._warned:
                self._warned.add(warning)
                log.warning(warning)

    def _path(self, key: str, ending: str) -> Path:
        return self.folder / f"{key}.{ending}"

    def _notes(self, key: str) -> CellRecord | None:
        """A finished cell's JSON; None where it, or the image it vouches for, is missing or damaged."""
        try:
            notes = CellRecord.read(self._path(key, "json").read_bytes(), key)
            png = self._path(key, "png").read_bytes()
            return notes if notes.png == hashlib.sha256(png).hexdigest() else None
        except (OSError, RecordError):
            return None

    def _keep(self, key: str, image: GeneratedImage) -> None:
        if key in self:  # another process drew it meanwhile, and may have measured it
            return
        png = image.png()
        write_whole(self._path(key, "png"), png)
        notes = CellRecord(
            png=hashlib.sha256(png).hexdigest(),
            timings=dict(image.timings),
            unet_calls=sum(image.record.unet_calls.values()),
            unet_rows=sum(image.record.unet_rows.values()),
            warnings=tuple(image.record.warnings),
        )
        self._note_down(key, notes)

    def _note_down(self, key: str, notes: CellRecord) -> None:
        write_whole(self._path(key, "json"), notes.to_json().encode())

    # --- what is missing -------------------------------------------------------------------------------------------

    def complete(
        self,
        cells: Sequence[Cell],
        metrics: Sequence[Metric] = (),
        reference: GenerationConfig | None = None,
        on_progress: OnProgress | None = None,
    ) -> dict[str, str]:
        """Draw what is missing and measure what is not measured; what went wrong, by key.

        Cells are drawn mixed, a bounded number at a time. `reference` is the configuration that metrics which need a
        reference compare with, at the same prompt and seed. An interrupt leaves every finished cell in place.
        """
        wanted = {self.key(cell): cell for cell in cells}
        beside = {key: _beside(cell, reference) for key, cell in wanted.items()} if reference else {}
        drawn = wanted | {self.key(cell): cell for cell in beside.values()}
        missing = {key: cell for key, cell in drawn.items() if key not in self}
        course = _Course(len(drawn), sum(cell.cost for cell in missing.values()), on_progress)
        course.done = len(drawn) - len(missing)
        course.tell()
        errors: dict[str, str] = {}
        for model in dict.fromkeys(cell.config.model for cell in missing.values()):
            group = {key: cell for key, cell in missing.items() if cell.config.model == model}
            with closing(self._drawn(self._engine(group), group)) as outcomes:
                for key, failure in outcomes:
                    course.took(group[key], failure is not None)
                    if failure is not None:
                        errors[key] = failure
        references = {key: self.key(cell) for key, cell in beside.items()}
        for metric in metrics:
            errors |= self._measure(metric, [key for key in wanted if key not in errors], references)
        return {key: error for key, error in errors.items() if key in wanted}

    def _engine(self, group: Mapping[str, Cell]) -> Engine:
        """The engine lent, or our own for these cells' model; only one is loaded at a time."""
        if self._lent is not None:
            return self._lent
        config = next(iter(group.values())).config
        if self._own is None or self._own[0] != config.model:
            self.__exit__()
            engine = Engine.load(config, self.profile)
            self._own = config.model, engine
            if engine.weights != self._identity(config.model):
                raise ModelError(
                    f"a model must stay as it is while its images are drawn; the files of {config.model.base!r} "
                    "changed meanwhile. Run this again"
                )
        return self._own[1]

    def _drawn(self, engine: Engine, group: Mapping[str, Cell]) -> Generator[tuple[str, str | None]]:
        """Every cell's key once it is kept or has failed, and why it failed."""
        running: dict[Job[GeneratedImage], str] = {}
        over: SimpleQueue[Job[GeneratedImage]] = SimpleQueue()

        def next_over() -> tuple[str, str | None]:
            job = over.get()
            key = running.pop(job)
            return key, self._outcome(key, job)

        try:
            for key, cell in group.items():
                while len(running) >= engine.profile.active:
                    yield next_over()
                try:
                    job = engine.submit(cell.request, priority=-1)  # behind what somebody waits for
                except ValueError as error:
                    yield key, _said(error)
                    continue
                running[job] = key
                job.add_done_callback(over.put)
            while running:
                yield next_over()
        finally:
            for job in running:
                job.cancel()
            for job, key in running.items():
                if job.state is JobState.DONE:
                    self._keep(key, job.result())

    def _outcome(self, key: str, job: Job[GeneratedImage]) -> str | None:
        """Keep the image, or say why there is none. An engine that stopped ends all work."""
        error = job.exception()
        if isinstance(error, EngineStopped):
            raise error
        if error is not None:
            return _said(error)
        self._keep(key, job.result())
        return None

    def _measure(self, metric: Metric, keys: Sequence[str], references: Mapping[str, str]) -> dict[str, str]:
        """Measure the cells that lack this number, and keep it with them; what went wrong, by key."""
        errors: dict[str, str] = {}
        if metric.needs_reference:
            for key in [key for key in keys if references.get(key, "") not in self]:
                errors[key] = f"{metric.name}: the reference image is missing"
        lacking = [key for key in keys if key not in errors and not self.values(key, [metric], references.get(key))]
        for start in range(0, len(lacking), BATCH):
            part = lacking[start : start + BATCH]
            try:
                self._note(metric, part, references)
            except Exception:
                for key in part:  # so that only the culprit goes without
                    try:
                        self._note(metric, [key], references)
                    except Exception as error:
                        errors[key] = f"{metric.name}: {_said(error)}"
        return errors

    def _note(self, metric: Metric, keys: Sequence[str], references: Mapping[str, str]) -> None:
        images = [self.image(key) for key in keys]
        beside = [self.image(references[key]) for key in keys] if metric.needs_reference else None
        for key, value in zip(keys, metric(images, beside), strict=True):
            notes = self._notes(key)
            assert notes is not None
            measured = notes.metrics | {_measured_as(metric, references.get(key)): float(value)}
            self._note_down(key, notes.with_(metrics=measured))


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _beside(cell: Cell, reference: GenerationConfig) -> Cell:
    return replace(cell, config=reference)


def _measured_as(metric: Metric, reference: str | None) -> str:
    """The name a number is kept under: with its source, since CLIP scores of different models are different numbers."""
    return " | ".join([metric.name, metric.source, *([str(reference)] if metric.needs_reference else [])])


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
