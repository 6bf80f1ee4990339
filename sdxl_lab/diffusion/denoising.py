"""One image on its way through the diffusion.

A `Trajectory` owns its schedulers, its generator and its latents. It gives the rows of its next UNet call and takes the
UNet's answer; who else shares that call it does not know. Step by step it does what diffusers'
`StableDiffusionXLPipeline` and `StableDiffusionXLImg2ImgPipeline` do for one image, draw for draw.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin

from sdxl_lab.config import MAX_SIGMA, ConfigError, RefinerConfig
from sdxl_lab.diffusion import schedulers
from sdxl_lab.diffusion.batching import Part
from sdxl_lab.diffusion.latency import Group
from sdxl_lab.diffusion.models import Denoiser, Embedding, Models, Prompt
from sdxl_lab.job import ImageRequest

DenoiserName = Literal["base", "refiner"]
Embed = Callable[[DenoiserName, Prompt], Embedding]


class Rows(NamedTuple):
    """UNet inputs, one row or two (unguided, guided): latents (n, 4, h, w), timesteps (n,), text (n, 77, width),
    pooled text (n, projection), micro-conditioning (n, 5 or 6), and for a distilled UNet what tells it the guidance
    scale (n, its width), which has no columns for others."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    hidden: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    timestep_cond: torch.Tensor

    def padded(self, count: int) -> "Rows":
        """The same with the last row repeated until there are `count`."""
        more = count - len(self.timesteps)
        return Rows(*(torch.cat([part, *[part[-1:]] * more]) for part in self)) if more else self


def rows_of(request: ImageRequest) -> int:
    """The most rows an image takes in one call: two with guidance, else one."""
    return 2 if request.config.guidance_scale > 1 else 1


def calls_of(request: ImageRequest) -> int:
    """The UNet calls an image takes, by its settings alone: a second-order scheduler may make one less."""
    strength = 1 if request.source is None else request.source.strength
    return max(1, int(request.config.steps * strength) * schedulers.order(request.config.scheduler))


def base_stop(scheduler: SchedulerMixin, handover: float) -> int:
    """How many of the scheduler's timesteps the base makes, as `denoising_end` has it."""
    cutoff = _cutoff(scheduler, handover)
    return int((scheduler.timesteps >= cutoff).sum())


def refiner_start(scheduler: SchedulerMixin, handover: float) -> int:
    """The timestep index at which the refiner begins, as `denoising_start` has it: with a second-order scheduler never
    between the two halves of a step."""
    left = int((scheduler.timesteps < _cutoff(scheduler, handover)).sum())
    if scheduler.order == 2 and left % 2 == 0:
        left += 1
    return len(scheduler.timesteps) - left


def strength_start(scheduler: SchedulerMixin, steps: int, strength: float) -> int:
    """The timestep index at which image-to-image begins."""
    return max(steps - min(int(steps * strength), steps), 0) * scheduler.order


def _cutoff(scheduler: SchedulerMixin, handover: float) -> int:
    train = scheduler.config.num_train_timesteps
    return round(train - handover * train)


class Seen(NamedTuple):
    """A step as the UNet saw it: the scaled latents it was given, its prediction after guidance, the timestep."""

    scaled: torch.Tensor
    prediction: torch.Tensor
    timestep: float


class Stage:
    """A stretch of the schedule under one UNet.

    `stretch` says which of the scheduler's timesteps it has, once they are set. `size` is the image's (height, width)
    in pixels. `embed` gives the prompts' embeddings.
    """

    def __init__(
        self,
        name: DenoiserName,
        denoiser: Denoiser,
        request: ImageRequest,
        stretch: Callable[[SchedulerMixin], slice],
        *,
        embed: Embed,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.name, self.denoiser, self.config = name, denoiser, request.config
        config = request.config
        self.scheduler = schedulers.build(config.scheduler, denoiser.scheduler_config, seed=request.seed)
        self.scheduler.set_timesteps(config.steps, device=device)
        part = stretch(self.scheduler)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(part.start)
        self.timesteps = self.scheduler.timesteps[part]
        self.index = 0
        self.seen: Seen | None = None
        guided = config.guidance_scale > 1 and denoiser.unet.config.time_cond_proj_dim is None
        self.guides = [guided and self._inside(float(timestep)) for timestep in self.timesteps]
        self.positive = embed(name, Prompt(request.prompt, config.clip_skip))
        # The pipelines skip layers for the positive prompt alone.
        self.negative = embed(name, Prompt(config.negative_prompt)) if guided else self.positive
        self.time_ids = self._time_ids(size)
        self.timestep_cond = guidance_embedding(
            config.guidance_scale, denoiser.unet.config.time_cond_proj_dim or 0, self.positive.hidden.device
        )
        accepted = inspect.signature(self.scheduler.step).parameters
        self.options: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
        self.takes_generator = "generator" in accepted

    def _time_ids(self, size: tuple[int, int]) -> torch.Tensor:
        """The micro-conditioning (2, 5 or 6) of the unguided and the guided row."""
        config = self.config
        original, target = config.original_size or size, config.target_size or size
        ids: list[tuple[float, ...]]
        if self.denoiser.aesthetic:
            scores = config.refiner or RefinerConfig()
            # Here, and only here, the pipeline's unguided row has a crop of its own: (0, 0) where none is asked for.
            ids = [
                (*original, 0, 0, scores.negative_aesthetic_score),
                (*original, *config.crop, scores.aesthetic_score),
            ]
        else:
            ids = [(*original, *config.crop, *target)] * 2
        return torch.tensor(ids, dtype=torch.float32, device=self.positive.hidden.device)

    def _inside(self, timestep: float) -> bool:
        """Whether guidance applies at this timestep's noise level."""
        interval = self.config.guidance_interval
        if interval is None:
            return True
        return interval[0] <= min(self._sigma(timestep), MAX_SIGMA) <= interval[1]

    def _sigma(self, timestep: float) -> float:
        sigmas = self.denoiser.sigmas
        return float(np.interp(timestep, np.arange(len(sigmas)), sigmas))

    def denoised(self) -> torch.Tensor | None:
        """The clean latents (1, 4, h, w) that the last prediction points to; None before the first."""
        if self.seen is None:
            return None
        scaled, prediction, timestep = self.seen
        sigma = self._sigma(timestep)
        signal, noise = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5  # of the scaled latents
        if self.scheduler.config.prediction_type == "v_prediction":
            return signal * scaled - noise * prediction
        return (scaled - noise * prediction) / signal

    @property
    def finished(self) -> bool:
        return self.index >= len(self.timesteps)

    def row_count(self) -> int:
        return 2 if self.guides[self.index] else 1

    @property
    def total_rows(self) -> int:
        """UNet rows of the whole stage: what it costs."""
        return len(self.guides) + sum(self.guides)

    def inputs(self, latents: torch.Tensor) -> Rows:
        timestep = self.timesteps[self.index]
        self._scaled = scaled = self.scheduler.scale_model_input(latents, timestep)
        if self.guides[self.index]:
            hidden = torch.cat([self.negative.hidden, self.positive.hidden])
            pooled = torch.cat([self.negative.pooled, self.positive.pooled])
            cond = self.timestep_cond.expand(2, -1)
            return Rows(torch.cat([scaled] * 2), timestep.float().repeat(2), hidden, pooled, self.time_ids, cond)
        hidden, pooled = self.positive
        return Rows(scaled, timestep.float().repeat(1), hidden, pooled, self.time_ids[1:], self.timestep_cond)

    def take(self, prediction: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Guidance, then the scheduler's own step: the latents of the next index."""
        if self.guides[self.index]:
            negative, positive = prediction.chunk(2)
            prediction = guide(negative, positive, self.config.guidance_scale, self.config.guidance_rescale)
        self.seen = Seen(self._scaled, prediction, float(self.timesteps[self.index]))
        options = self.options | ({"generator": generator} if self.takes_generator else {})
        timestep = self.timesteps[self.index]
        after = self.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
        self.index += 1
        return after.to(latents.dtype)


def guide(negative: torch.Tensor, positive: torch.Tensor, scale: float, rescale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), with the rescale of Lin et al. 2023
    (arXiv 2305.08891, section 3.4) by `rescale`."""
    guided = negative + scale * (positive - negative)
    if rescale > 0:
        axes = list(range(1, positive.ndim))
        matched = guided * (positive.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        guided = rescale * matched + (1 - rescale) * guided
    return guided


def guidance_embedding(scale: float, width: int, device: torch.device) -> torch.Tensor:
    """The guidance scale as a distilled UNet takes it (1, `width`): sines, then cosines, of 1000 times the scale above
    1 at frequencies from 1 down to 1/10,000 (Meng et al. 2022, arXiv 2210.03142; diffusers'
    `get_guidance_scale_embedding`). An odd width ends with a zero."""
    half = width // 2
    step = torch.log(torch.tensor(10_000.0)) / max(half - 1, 1)  # in float32, as there: its angles reach thousands
    angles = torch.tensor(scale - 1.0) * 1000.0 * torch.exp(torch.arange(half) * -step)
    found = torch.cat([angles.sin(), angles.cos(), torch.zeros(width % 2)]).to(device)
    return found[None]


class StageOutcome(NamedTuple):
    """A trajectory's part of the image's record, whose fields these are."""

    sampler: str
    scheduler: dict[str, Any]
    unet_calls: dict[str, int]
    unet_rows: dict[str, int]


class Trajectory:
    """One image under way. `latents` (1, 4, h, w), float32 whatever the UNet's dtype, and `done` are the outcome;
    `calls` of `total` are the UNet calls made so far. Raises `ConfigError` where the settings leave a stage without a
    step."""

    def __init__(self, models: Models, request: ImageRequest, embed: Embed) -> None:
        self.request, self.models, self.calls = request, models, 0
        self._last: Stage | None = None
        self._embed = embed
        self.generator = torch.Generator("cpu").manual_seed(request.seed)
        if request.source is not None:
            refiner, steps, strength = self._refiner(), request.config.steps, request.source.strength
            clean = models.encode(request.source.image, self.generator)
            self.stages = [
                self._stage(
                    "refiner", refiner, clean, lambda scheduler: slice(strength_start(scheduler, steps, strength), None)
                )
            ]
            self.latents = self._noised(clean, self.stages[0])
        else:
            noise = self._noise(request.config.height, request.config.width)
            self.stages = self._ensemble(request.config.refiner, noise)
            self.latents = noise * self.stages[0].scheduler.init_noise_sigma
        for stage in self.stages:
            if not len(stage.timesteps):
                steps, rule = request.config.steps, "enough that both base and refiner get one"
                raise ConfigError("steps", steps, f"{rule} ({stage.name} has none)", 25)
        self.total = sum(len(stage.timesteps) for stage in self.stages)

    def _ensemble(self, refiner: RefinerConfig | None, latents: torch.Tensor) -> list[Stage]:
        base = self.models.base
        if refiner is None:
            return [self._stage("base", base, latents, lambda _: slice(0, None))]
        handover = refiner.handover
        return [
            self._stage("base", base, latents, lambda scheduler: slice(0, base_stop(scheduler, handover))),
            self._stage(
                "refiner", self._refiner(), latents, lambda scheduler: slice(refiner_start(scheduler, handover), None)
            ),
        ]

    def _stage(
        self,
        name: DenoiserName,
        denoiser: Denoiser,
        latents: torch.Tensor,
        stretch: Callable[[SchedulerMixin], slice],
    ) -> Stage:
        height, width = (side * self.models.scale_factor for side in latents.shape[-2:])
        return Stage(
            name,
            denoiser,
            self.request,
            stretch,
            embed=self._embed,
            size=(height, width),
            device=self.models.device,
        )

    def _refiner(self) -> Denoiser:
        if self.models.refiner is None:
            raise ConfigError(
                "refiner", "a refiner stage", "left out: these models were loaded without a refiner", "none"
            )
        return self.models.refiner

    def _noise(self, height: int, width: int) -> torch.Tensor:
        factor = self.models.scale_factor
        shape = (1, self.models.vae.config.latent_channels, height // factor, width // factor)
        return torch.randn(shape, generator=self.generator).to(self.models.device)

    def _noised(self, latents: torch.Tensor, stage: Stage) -> torch.Tensor:
        noise = torch.randn(latents.shape, generator=self.generator, dtype=latents.dtype).to(latents.device)
        return stage.scheduler.add_noise(latents, noise, stage.timesteps[:1])

    @property
    def stage(self) -> Stage:
        return next(stage for stage in self.stages if not stage.finished)

    @property
    def done(self) -> bool:
        return all(stage.finished for stage in self.stages)

    @property
    def group(self) -> Group:
        """Whom it can share its next UNet call with."""
        return self._group(self.stage)

    def _group(self, stage: Stage) -> Group:
        return Group(stage.name, *self.latents.shape[-2:])

    def parts(self) -> list[Part]:
        """The calls that are left, as the batcher counts them: runs of calls with the same rows."""
        found: list[Part] = []
        for stage in self.stages:
            for guided in stage.guides[stage.index :]:
                part = Part(self._group(stage), 2 if guided else 1, 1)
                if found and found[-1][:2] == part[:2]:
                    part = part._replace(calls=found.pop().calls + 1)
                found.append(part)
        return found

    def row_count(self) -> int:
        return self.stage.row_count()

    def inputs(self) -> Rows:
        return self.stage.inputs(self.latents)

    def take(self, prediction: torch.Tensor) -> None:
        """The UNet's answer to `inputs()`, of the same number of rows."""
        self._last = self.stage
        self.latents = self._last.take(prediction, self.latents, self.generator)
        self.calls += 1

    def denoised(self) -> torch.Tensor | None:
        """The clean latents that the last step points to, None before the first. Any thread may ask."""
        return None if self._last is None else self._last.denoised()

    def outcome(self) -> StageOutcome:
        """What the scheduler made of the settings, and what that cost."""
        return StageOutcome(
            sampler=schedulers.TABLE[self.request.config.scheduler].a1111,
            scheduler=schedulers.effective(self.stages[-1].scheduler),
            unet_calls={stage.name: len(stage.timesteps) for stage in self.stages},
            unet_rows={stage.name: stage.total_rows for stage in self.stages},
        )
