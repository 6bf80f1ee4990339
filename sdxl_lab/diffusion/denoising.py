"""One image on its way through the diffusion.

A `Trajectory` owns its schedulers, its generator and its latents. It gives the rows of its next UNet call and takes the
UNet's answer; who else shares that call it does not know. Step by step it does what diffusers'
`StableDiffusionXLPipeline`, `StableDiffusionXLImg2ImgPipeline` and `StableDiffusionXLInpaintPipeline` do for one image,
draw for draw.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch.nn import functional

from sdxl_lab.config import ConfigError, RefinerConfig
from sdxl_lab.diffusion import guiders, schedulers
from sdxl_lab.diffusion.attention import PERTURBED, PLACES, perturbs
from sdxl_lab.diffusion.batching import Part
from sdxl_lab.diffusion.freeu import SCALED, scalable, scales
from sdxl_lab.diffusion.latency import Group
from sdxl_lab.diffusion.models import Denoiser, Models, to_tensor
from sdxl_lab.diffusion.prompts import Embedding, Prompt
from sdxl_lab.images import finish
from sdxl_lab.job import ImageRequest
from sdxl_lab.schedules import sampler
from sdxl_lab.source import SourceImage
from sdxl_lab.syntax import texts

DenoiserName = Literal["base", "refiner"]
Embed = Callable[[DenoiserName, Prompt], Embedding]

LARGEST = 1000.0  # the largest noise level that a guidance interval can name: it stands for all above, too


class Rows(NamedTuple):
    """UNet inputs, one row to three (unguided, guided, perturbed): latents (n, 4 or 9, h, w), timesteps (n,), for each
    row its text (1, 77 x chunks, width), pooled text (n, projection), micro-conditioning (n, 5 or 6), on the CPU the
    codes (n,) of the blocks in which a row is perturbed, 0 for none, and FreeU's scales (n, 4), 1 for none; and what
    tells a distilled UNet the guidance scale (n, its width), which has no columns for others."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    pooled: torch.Tensor
    time_ids: torch.Tensor
    perturbed: torch.Tensor
    scaled: torch.Tensor
    timestep_cond: torch.Tensor

    def asked(self, device: torch.device) -> dict[str, Mapping[str, torch.Tensor]]:
        """What rows ask of the UNet's insides, as its call takes it: nothing where none asks for anything. To look does
        not wait for a GPU."""
        found = {}
        if self.perturbed.any():
            found[PERTURBED] = self.perturbed.to(device)
        if (self.scaled != 1).any():
            found[SCALED] = self.scaled.to(device)
        return {"cross_attention_kwargs": found} if found else {}

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """The rows of several images, one after the other."""
        return cls(*(_joined(part) for part in zip(*parts, strict=True)))

    def at(self, places: Sequence[int]) -> "Rows":
        """Some of the rows, in this order."""
        own = list(places)
        parts: list[Any] = [
            tuple(part[each] for each in own) if isinstance(part, tuple) else part[own] for part in self
        ]
        return Rows(*parts)

    def padded(self, count: int) -> "Rows":
        """The same with the last row repeated until there are `count`."""
        last = len(self.timesteps) - 1
        return self.at([*range(last + 1), *[last] * (count - last - 1)]) if count > last + 1 else self

    def calls(self) -> list[list[int]]:
        """Which rows share a UNet call, by their places: those whose texts can be brought to one length."""
        return sharing([part.shape[1] for part in self.hidden])

    def text(self) -> torch.Tensor:
        """The rows' texts (n, 77 x chunks, width), each repeated to the least common multiple of all lengths.
        Cross-attention to keys and values that are all there twice is the same as to all of them once, so that texts of
        different lengths do not change one another, as they would if the shorter ones were filled up."""
        most = math.lcm(*(part.shape[1] for part in self.hidden))
        return torch.cat([part.repeat(1, most // part.shape[1], 1) for part in self.hidden])


def _joined(parts: Any) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(each for part in parts for each in part)
    return torch.cat(parts)


# A text is repeated this often at most: more rows in a call do not make up for more.
REPEATS = 4


def sharing(lengths: Sequence[int]) -> list[list[int]]:
    """The places of the lengths in groups, each of which has a common multiple that is not too large."""
    groups: list[tuple[list[int], list[int]]] = []  # lengths, and their places
    for length in sorted(set(lengths)):
        own = [place for place, each in enumerate(lengths) if each == length]
        for known, places in groups:
            if math.lcm(*known, length) <= REPEATS * min(known):
                known.append(length)
                places += own
                break
        else:
            groups.append(([length], own))
    return [sorted(places) for _, places in groups]


def rows_of(request: ImageRequest) -> int:
    """The most rows an image takes in one call: one, one more with guidance, and one more with a perturbed row."""
    config = request.config
    return 1 + (config.guidance_scale > 1) + (config.pag is not None and config.pag.scale > 0)


def parts_of(request: ImageRequest, factor: int = 8) -> list[Part]:
    """An image's UNet calls by its settings alone: a second-order scheduler may make one less. A latent is `factor`
    pixels wide."""
    config, source = request.config, request.source
    rows, order = rows_of(request), schedulers.order(config.scheduler)

    def through(size: tuple[int, int], steps: int, strength: float) -> list[Part]:
        """Base and refiner, for the last part of the schedule that the strength leaves."""
        width, height = size
        base, refiner = (Group(name, height // factor, width // factor) for name in ("base", "refiner"))
        calls = max(1, int(steps * strength) * order)
        if source is not None and source.stage == "refiner":
            return [Part(refiner, rows, calls)]
        if config.refiner is None:
            return [Part(base, rows, calls)]
        left_out = steps * order - calls
        first = min(calls, max(1, round(steps * order * config.refiner.handover) - left_out))
        return [Part(base, rows, first), Part(refiner, rows, calls - first)]

    if source is not None:
        return through(request.size, config.steps, source.strength)
    parts = through((config.width, config.height), config.steps, 1)
    if config.hires is not None:
        parts += through(config.drawn_size, config.hires.steps or config.steps, config.hires.strength)
    return parts


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


def _steps(calls: int, steps: int) -> list[int]:
    """The step, from 0, that each of a whole schedule's calls belongs to: a second-order scheduler has two calls for
    most steps."""
    return [call * steps // calls for call in range(calls)]


def _cutoff(scheduler: SchedulerMixin, handover: float) -> int:
    train = scheduler.config.num_train_timesteps
    return round(train - handover * train)


KEPT = 8  # chunks of embeddings that a stage keeps, beside those of its present step


class Guidance(NamedTuple):
    """How a call is guided: by an unguided row or not, and how far away from a perturbed row (0: there is none)."""

    by_text: bool
    by_attention: float

    @property
    def rows(self) -> int:
        return 1 + self.by_text + (self.by_attention > 0)


class Kept(NamedTuple):
    """What an image keeps outside of its mask (1, 1, h, w), which is 1 where it is painted anew: the clean latents and
    the noise (1, 4, h, w) that is added to them for each step."""

    mask: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor


class Seen(NamedTuple):
    """A step as the UNet saw it: the scaled latents it was given, its prediction after guidance, the noise level."""

    scaled: torch.Tensor
    prediction: torch.Tensor
    sigma: float


class Stage:
    """A stretch of the schedule under one UNet.

    `stretch` says which of the scheduler's timesteps it has, once they are set. `size` is the image's (height, width)
    in pixels. `embed` gives the prompts' embeddings. `kept` is put back after each step. `beside` (1, 5, h, w) is what
    an inpainting UNet of nine channels sees beside the latents: the mask and the latents of the masked image.
    """

    kept: Kept | None = None
    beside: torch.Tensor | None = None

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
        self.name, self.denoiser, self.config, self.size = name, denoiser, request.config, size
        config = request.config
        self.scheduler = schedulers.build(config, denoiser.scheduler_config, seed=request.seed)
        schedulers.set_timesteps(self.scheduler, config, device)
        part = stretch(self.scheduler)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(part.start)
        self.timesteps, self.sigmas = self.scheduler.timesteps[part], schedulers.sigmas(self.scheduler)[part]
        self.index = 0
        self.seen: Seen | None = None
        guided = config.guidance_scale > 1 and denoiser.unet.config.time_cond_proj_dim is None
        zeros = config.cfg_zero.zero_steps if config.cfg_zero else 0
        self.zeros = max(0, zeros - part.start)  # they are counted from the schedule's first call, not the stage's
        self.guidance = [self._guidance(guided, index) for index in range(len(self.timesteps))]
        self.guider = guiders.guider_of(config)
        self.place = 0 if config.pag is None else self._place(config.pag.layers)
        self.scales = self._scales()
        self._embed = embed
        self._embedded: dict[Prompt, Embedding] = {}
        self._steps = _steps(len(self.scheduler.timesteps), config.steps)[part]
        self.positives = self._prompts(request.words, request.words_2, config.clip_skip)
        # The pipelines skip layers for the positive prompt alone.
        negative, second = config.negative_prompt, config.negative_prompt_2
        if negative is None and second is not None:
            negative = ""  # the first encoder has nothing to read
        self.negatives = self._prompts(negative, second) if guided else self.positives
        if guided and not (negative or second):
            # Empty chunks are all alike: with as many as the prompt has, both rows fit into one call.
            chunks = (prompt.chunks for prompt in self.positives)
            self.negatives = [each._replace(chunks=k) for each, k in zip(self.negatives, chunks, strict=True)]
        for prompts in (self.positives, self.negatives):
            if prompts:  # what cannot be embedded is refused before the first call
                self._embedding(prompts[0])
        self.time_ids = self._time_ids(size, device)
        self.timestep_cond = guidance_embedding(
            config.guidance_scale, denoiser.unet.config.time_cond_proj_dim or 0, device
        )
        accepted = inspect.signature(self.scheduler.step).parameters
        self.options: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
        self.takes_generator = "generator" in accepted

    def _prompts(self, text: str | None, second: str | None, clip_skip: int | None = None) -> list[Prompt]:
        """What is read at each of the stage's calls. All have the chunks of the one that has most, as in A1111."""
        steps, syntax, embeddings = self.config.steps, self.config.prompt_syntax, self.config.embeddings
        if syntax == "plain" or text is None:
            return [Prompt(text, clip_skip, second, syntax, embeddings)] * len(self._steps)
        first = texts(text, steps)
        other = texts(second, steps) if second is not None else [None] * steps
        asked = [Prompt(first[step], clip_skip, other[step], syntax, embeddings) for step in self._steps]
        chunks = max((self.denoiser.chunks(prompt) for prompt in set(asked)), default=1)
        return [prompt._replace(chunks=chunks) for prompt in asked]

    def _embedding(self, prompt: Prompt) -> Embedding:
        """A prompt's embedding. The last ones are kept here: the engine may forget them before the next step."""
        found = self._embedded.pop(prompt, None) or self._embed(self.name, prompt)
        self._embedded[prompt] = found  # now the last to go
        while len(self._embedded) > 2 and sum(each.chunks for each in self._embedded.values()) > KEPT:
            del self._embedded[next(iter(self._embedded))]
        return found

    def _time_ids(self, size: tuple[int, int], device: torch.device) -> torch.Tensor:
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
        return torch.tensor(ids, dtype=torch.float32, device=device)

    def _guidance(self, guided: bool, index: int) -> Guidance:
        """How the call of this index is guided: not at all outside the interval, nor where its prediction is zero."""
        low, high = self.config.guidance_interval or (0.0, LARGEST)
        if index < self.zeros or not low <= min(self.sigmas[index], LARGEST) <= high:
            return Guidance(False, 0.0)
        return Guidance(guided, guiders.perturbed_scale(self.config.pag, float(self.timesteps[index])))

    def _place(self, layers: str) -> int:
        """The code of the blocks that are perturbed."""
        if not perturbs(self.denoiser.unet, layers):
            rule = f"blocks in which the {self.name}'s UNet has self-attention of SDXL's kind"
            raise ConfigError("pag.layers", layers, rule, "mid")
        return PLACES[layers]

    def _scales(self) -> tuple[float, ...]:
        """FreeU's, of every row."""
        if self.config.freeu is not None and not scalable(self.denoiser.unet):
            rule = f"left out, since the blocks of the {self.name}'s UNet are not those of SDXL"
            raise ConfigError("freeu", self.config.freeu.to_dict(), rule, "none")
        return scales(self.config.freeu)

    def denoised(self) -> torch.Tensor | None:
        """The clean latents (1, 4, h, w) that the last prediction points to; None before the first."""
        if self.seen is None:
            return None
        scaled, prediction, sigma = self.seen
        signal = 1 / (sigma**2 + 1) ** 0.5  # of the scaled latents; 0 where sigma is infinite
        noise = (1 - signal**2) ** 0.5
        if self.scheduler.config.prediction_type == "v_prediction":
            return signal * scaled - noise * prediction
        return (scaled - noise * prediction) / signal

    @property
    def finished(self) -> bool:
        return self.index >= len(self.timesteps)

    def row_count(self) -> int:
        return self.guidance[self.index].rows

    @property
    def total_rows(self) -> int:
        """UNet rows of the whole stage: what it costs."""
        return sum(guidance.rows for guidance in self.guidance)

    def inputs(self, latents: torch.Tensor) -> Rows:
        timestep, guidance = self.timesteps[self.index], self.guidance[self.index]
        self._scaled = scaled = self.scheduler.scale_model_input(latents, timestep)
        positive = self._embedding(self.positives[self.index])
        given = scaled if self.beside is None else torch.cat([scaled, self.beside], 1)
        rows = [(positive, 1, 0)]  # embedding, micro-conditioning, code
        if guidance.by_text:
            rows.insert(0, (self._embedding(self.negatives[self.index]), 0, 0))
        if guidance.by_attention:
            rows.append((positive, 1, self.place))
        return Rows(
            torch.cat([given] * len(rows)),
            timestep.float().repeat(len(rows)),
            tuple(embedding.hidden for embedding, _, _ in rows),
            torch.cat([embedding.pooled for embedding, _, _ in rows]),
            torch.cat([self.time_ids[index : index + 1] for _, index, _ in rows]),
            torch.tensor([code for _, _, code in rows]),
            torch.tensor([self.scales] * len(rows)),
            self.timestep_cond.expand(len(rows), -1),
        )

    def take(self, prediction: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Guidance, then the scheduler's own step: the latents of the next index."""
        prediction = self._guided(prediction)
        self.seen = Seen(self._scaled, prediction, float(self.sigmas[self.index]))
        options = self.options | ({"generator": generator} if self.takes_generator else {})
        timestep = self.timesteps[self.index]
        after = self.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
        self.index += 1
        return self._with_kept(after.to(latents.dtype))

    def _with_kept(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents with what the image keeps put back, as noisy as the next step finds it; after the last, clean."""
        if self.kept is None:
            return latents
        mask, known, noise = self.kept
        if not self.finished:
            known = self.scheduler.add_noise(known, noise, self.timesteps[self.index : self.index + 1])
        return (1 - mask) * known + mask * latents

    def _guided(self, predictions: torch.Tensor) -> torch.Tensor:
        """The prediction (1, 4, h, w) that the rows of a call make together."""
        guidance, rows = self.guidance[self.index], list(predictions.split(1))
        if self.index < self.zeros:
            return torch.zeros_like(predictions)
        unguided = rows.pop(0) if guidance.by_text else None
        found = guided = rows.pop(0)
        if unguided is not None:
            found = self.guider(unguided, guided, self.config.guidance_scale)
        if guidance.by_attention:
            found = guiders.away_from(found, guided, rows.pop(0), guidance.by_attention)
        if unguided is not None and self.config.guidance_rescale > 0:
            found = guiders.rescaled(found, guided, self.config.guidance_rescale)
        return found


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
        self._mask: torch.Tensor | None = None
        self._check_refiner()
        width, height = request.size if request.source else (request.config.width, request.config.height)
        self.stages = self._pass(request, (height, width), None if request.source is None else request.source.strength)
        self._second: Stage | None = None  # where the second pass begins
        if request.source is None and (hires := request.config.hires) is not None:
            again = replace(request, config=request.config.second_pass())
            more = self._pass(again, (again.config.height, again.config.width), hires.strength)
            self._second = more[0]
            self.stages += more
        for stage in self.stages:
            if not len(stage.timesteps):
                raise self._without_a_step(stage)
        self.total = sum(len(stage.timesteps) for stage in self.stages)
        self.latents = self._begun(self.stages[0], request.source)

    def _without_a_step(self, stage: Stage) -> ConfigError:
        hires, source = self.request.config.hires, self.request.source
        if stage.name == "base" and (source is not None or stage is self._second):
            name, strength = ("strength", source.strength) if source else ("hires.strength", hires and hires.strength)
            return ConfigError(name, strength, "large enough that the base gets a step before the refiner goes on", 0.8)
        rule = f"enough that both base and refiner get one ({stage.name} has none)"
        return ConfigError("steps", self.request.config.steps, rule, 25)

    def _check_refiner(self) -> None:
        """An inpainting UNet of nine channels leaves what is outside of the mask noisy: no refiner can go on there."""
        config, source = self.request.config, self.request.source
        if self.models.base.inpaints and config.refiner is not None and (source is None or source.stage == "base"):
            rule = "left out with a base of nine channels, which a refiner of four cannot follow"
            raise ConfigError("refiner", config.refiner.to_dict(), rule, "refiner = none")

    def _pass(self, request: ImageRequest, size: tuple[int, int], strength: float | None) -> list[Stage]:
        """The stages that go through the noise schedule once, or with a strength through the last part of it. `size` is
        (height, width) in pixels."""
        steps, refiner = request.config.steps, request.config.refiner

        def start(scheduler: SchedulerMixin) -> int:
            return 0 if strength is None else strength_start(scheduler, steps, strength)

        stage = partial(Stage, request=request, embed=self._embed, size=size, device=self.models.device)
        if request.source is not None and request.source.stage == "refiner":
            return [stage("refiner", self._refiner(), stretch=lambda scheduler: slice(start(scheduler), None))]
        base = self.models.base
        if refiner is None:
            return [stage("base", base, stretch=lambda scheduler: slice(start(scheduler), None))]
        handover = refiner.handover
        return [
            stage("base", base, stretch=lambda scheduler: slice(start(scheduler), base_stop(scheduler, handover))),
            stage(
                "refiner", self._refiner(), stretch=lambda scheduler: slice(refiner_start(scheduler, handover), None)
            ),
        ]

    def _refiner(self) -> Denoiser:
        if self.models.refiner is None:
            raise ConfigError(
                "refiner", "a refiner stage", "left out: these models were loaded without a refiner", "none"
            )
        return self.models.refiner

    # --- what a stage begins with ------------------------------------------------------------------------------------

    def _begun(self, stage: Stage, source: SourceImage | None) -> torch.Tensor:
        """The latents that the first stage begins with. The generator draws in the order of diffusers' pipelines: the
        posterior of the source, the noise, the posterior of the masked source."""
        height, width = stage.size
        pixels, mask = None, None
        if source is not None:
            pixels, mask = source.fitted((width, height)), source.fitted_mask((width, height))
        if mask is None and not stage.denoiser.inpaints:
            if pixels is None:
                return self._noise(stage) * stage.scheduler.init_noise_sigma
            return self._noised(self.models.encode(pixels, self.generator), stage)
        if mask is None:  # an inpainting UNet paints everything anew
            mask = np.ones((height, width), dtype=np.float32)
        return self._masked(stage, pixels, torch.from_numpy(mask)[None, None].to(self.models.device))

    def _masked(self, stage: Stage, pixels: Image.Image | None, mask: torch.Tensor) -> torch.Tensor:
        """The same where a mask (1, 1, height, width) says what is painted anew; without `pixels`, all of it."""
        inpaints = stage.denoiser.inpaints
        whole = self.request.source is None or self.request.source.strength == 1
        clean = None if pixels is None or (whole and inpaints) else self.models.encode(pixels, self.generator)
        noise = self._noise(stage)
        begun = noise * stage.scheduler.init_noise_sigma
        if not whole:
            assert clean is not None
            begun = stage.scheduler.add_noise(clean, noise, stage.timesteps[:1])
        small = functional.interpolate(mask, size=noise.shape[-2:])
        if inpaints:
            stage.beside = self._beside(pixels, mask, small)
            return begun
        assert clean is not None
        # diffusers draws the masked source's posterior for every UNet, be it that only one of nine channels sees it.
        torch.randn(noise.shape, generator=self.generator, dtype=self.models.vae.dtype)
        self._mask, stage.kept = small, Kept(small, clean, noise)
        return begun

    def _beside(self, pixels: Image.Image | None, mask: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        """What an inpainting UNet sees beside the latents (1, 5, h, w); what is masked is grey."""
        size = mask.shape[-2:]
        image = torch.zeros(1, 3, *size) if pixels is None else to_tensor(pixels)
        hidden = self.models.encode(image.to(mask.device) * (mask < 0.5), self.generator)
        return torch.cat([small, hidden], 1)

    def _enlarged(self, stage: Stage) -> torch.Tensor:
        """The latents that the second pass begins with, from those that the first one has left."""
        hires = self.request.config.hires
        assert hires is not None
        height, width = stage.size
        if hires.upscaler == "latent":
            size = [height // self.models.scale_factor, width // self.models.scale_factor]
            clean = functional.interpolate(self.latents, size=size, mode="bilinear", antialias=False)
        else:
            image = finish(self.models.decode(self.latents)[0], watermark=False)
            clean = self.models.encode(image.resize((width, height), Image.Resampling.LANCZOS), self.generator)
        noised = self._noised(clean, stage)
        if stage.denoiser.inpaints:
            mask = torch.ones(1, 1, height, width, device=self.models.device)
            stage.beside = self._beside(None, mask, functional.interpolate(mask, size=clean.shape[-2:]))
        return noised

    def _noise(self, stage: Stage) -> torch.Tensor:
        height, width = (side // self.models.scale_factor for side in stage.size)
        shape = (1, self.models.vae.config.latent_channels, height, width)
        return torch.randn(shape, generator=self.generator).to(self.models.device)

    def _noised(self, latents: torch.Tensor, stage: Stage) -> torch.Tensor:
        return stage.scheduler.add_noise(latents, self._noise(stage), stage.timesteps[:1])

    def _handed_on(self) -> torch.Tensor:
        """The latents as the next stage takes them over from the last one."""
        stage = self.stage
        if stage is self._second:
            return self._enlarged(stage)
        if self._mask is not None:  # as diffusers' refiner has it: what the base left is what is kept
            stage.kept = Kept(self._mask, self.latents, self._noise(stage))
        return self.latents

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
        height, width = (side // self.models.scale_factor for side in stage.size)
        return Group(stage.name, height, width)

    def parts(self) -> list[Part]:
        """The calls that are left, as the batcher counts them: runs of calls with the same rows."""
        found: list[Part] = []
        for stage in self.stages:
            for guidance in stage.guidance[stage.index :]:
                part = Part(self._group(stage), guidance.rows, 1)
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
        self._last = last = self.stage
        self.latents = last.take(prediction, self.latents, self.generator)
        self.calls += 1
        if last.finished and not self.done:
            self.latents = self._handed_on()

    def denoised(self) -> torch.Tensor | None:
        """The clean latents that the last step points to, None before the first. Any thread may ask."""
        return None if self._last is None else self._last.denoised()

    def outcome(self) -> StageOutcome:
        """What the scheduler made of the settings, and what that cost."""
        return StageOutcome(
            sampler=sampler(self.request.config.scheduler),
            scheduler=schedulers.effective(self.stages[-1].scheduler),
            unet_calls=_by_stage((stage.name, len(stage.timesteps)) for stage in self.stages),
            unet_rows=_by_stage((stage.name, stage.total_rows) for stage in self.stages),
        )


def _by_stage(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The sum for each stage: two passes have the same ones."""
    found: Counter[str] = Counter()
    for name, count in counts:
        found[name] += count
    return dict(found)
