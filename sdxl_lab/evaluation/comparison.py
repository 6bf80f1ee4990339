"""Comparing a candidate with the configuration that a slot serves.

Both draw the same prompts and seeds, metrics measure the images, and gates judge the difference. The result holds the
evidence for a promotion and the images to look at. Nothing is written.
"""

import dataclasses
import logging
import platform
import tomllib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig, ModelRef, RuntimeProfile, checked_prompt, checked_seed
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.lora_files import pinned
from sdxl_lab.evaluation.gates import DEFAULT_GATES, Gate, Verdict
from sdxl_lab.evaluation.metrics import Metric, MetricError, find_metric
from sdxl_lab.evaluation.statistics import interval, paired
from sdxl_lab.images import GeneratedImage, beside, read_record
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.promote import git_state
from sdxl_lab.release.records import Findings
from sdxl_lab.release.slot import slot_config

log = logging.getLogger(__name__)

DEFAULT_METRICS = ("clip_score", "sharpness", "contrast", "clipping", "unet_rows")
# Every prompt names everything: nano chooses at random what is left out, and that is noise in a comparison.
DEFAULT_PROMPTS = (
    "a red cat in a hat on a white background",
    "a small blue boat on a yellow background",
    "a green tree left of a white house on a cyan background",
    "an orange fish above a purple heart on a white background",
    "a pink flower on a black background",
    "a large yellow star on a blue background",
    "a black ring below a red square on a pink background",
    "a white house in a green hat on an orange background",
)


@dataclass(frozen=True)
class ComparisonPlan:
    """What a candidate and the served configuration are compared on.

    The first seed of each of the first `goldens` prompts gives a golden image. `clip` is the CLIP model of the metric
    clip_score, by default the one that comes with the candidate's model. TOML has the same names:

        prompts = ["a red circle on a white background", "..."]
        seeds = [0, 1]
        gates = ["clip_score: at most 1 worse with 95 % confidence"]
    """

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    seeds: tuple[int, ...] = (0, 1)
    gates: tuple[Gate, ...] = DEFAULT_GATES
    metrics: tuple[str, ...] = DEFAULT_METRICS
    goldens: int = 3
    clip: str = ""

    def __post_init__(self) -> None:
        for name, check in (("prompts", checked_prompt), ("seeds", checked_seed)):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ConfigError(
                    name, values, "a list of at least one", [DEFAULT_PROMPTS[0]] if name == "prompts" else [0, 1]
                )
            if len(set(map(check, values))) < len(values):
                raise ConfigError(name, values, "all different, since each pair counts once", "seeds = [0, 1]")
            object.__setattr__(self, name, tuple(values))
        if type(self.goldens) is not int or self.goldens < 1:
            raise ConfigError("goldens", self.goldens, "a whole number of at least 1", 3)
        gates = tuple(gate if isinstance(gate, Gate) else Gate.parse(gate) for gate in self.gates)
        object.__setattr__(self, "gates", gates)
        names = (*self.metrics, *(gate.metric for gate in gates))
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(names)))
        for metric in self.measures:
            if metric.needs_reference:
                raise MetricError(
                    f"a comparison measures images alone; {metric.name} needs a reference. Example: sharpness"
                )

    @classmethod
    def from_toml(cls, path: Path | str) -> "ComparisonPlan":
        """Read a plan; what it leaves out is the default. Raises `ConfigError`, `GateError` or `MetricError`."""
        try:
            content = tomllib.loads(Path(path).read_text())
            return cls(**content)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
            known = "prompts, seeds, gates, metrics, goldens, clip"
            raise ConfigError(str(path), str(error), f"TOML with some of {known}", "seeds = [0, 1]") from error

    @property
    def measures(self) -> list[Metric]:
        return [find_metric(name, self.clip) for name in self.metrics]

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Prompts x seeds, the seeds running fastest: the order of a comparison's images and values."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    @property
    def golden_places(self) -> range:
        """Where in `pairs` the goldens stand: the first seed of each of the first prompts."""
        return range(0, len(self.pairs), len(self.seeds))[: self.goldens]


@dataclass(frozen=True)
class Comparison:
    """The images and values of both, in the order of `plan.pairs`. `served` is None for a new slot, its images ()."""

    plan: ComparisonPlan
    candidate: GenerationConfig
    images: tuple[GeneratedImage, ...]
    served: GenerationConfig | None = None
    served_images: tuple[GeneratedImage, ...] = ()
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    served_values: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def goldens(self) -> list[GeneratedImage]:
        return [self.images[place] for place in self.plan.golden_places]

    @property
    def panels(self) -> list[tuple[str, Image.Image]]:
        """Images of the first seed of each prompt, with their labels: the served one, the candidate's, and the
        magnified difference; for a new slot only the candidate's."""
        found = []
        for at in range(0, len(self.images), len(self.plan.seeds)):
            prompt, candidate = self.images[at].record.prompt, self.images[at].image
            if not self.served:
                found.append((prompt, candidate))
                continue
            before = self.served_images[at].image
            after, difference, magnified = beside(before, candidate)
            found += [(f"served: {prompt}", before), ("candidate", after), (magnified, difference)]
        return found

    @cached_property
    def verdicts(self) -> list[Verdict]:
        prompts = [prompt for prompt, _ in self.plan.pairs]
        metrics = {metric.name: metric for metric in self.plan.measures}
        return [
            gate.judge(metrics[gate.metric], self.values[gate.metric], self.served_values.get(gate.metric), prompts)
            for gate in self.plan.gates
        ]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    def findings(self, notebook: Mapping[str, Any] | None = None) -> Findings:
        """What `promote` takes, and a slot keeps as evidence.

        `notebook` is the `runner.origin` of a notebook that makes the comparison.
        """
        record = self.images[0].record
        commit, dirty = git_state()
        found = {
            "schema": Findings.SCHEMA,
            "digest": self.candidate.digest,
            "replaces": self.served.digest if self.served else None,
            "prompts": self.plan.prompts,
            "seeds": self.plan.seeds,
            "clip": self.plan.clip,
            "metrics": {metric.name: self._metric(metric) for metric in self.plan.measures},
            "gates": [vars(verdict) for verdict in self.verdicts],
            **{name: getattr(record, name) for name in ("weights", "runtime", "libraries", "version")},
            "machine": {"python": platform.python_version(), "processor": platform.machine()},
            "commit": commit,
            "dirty": dirty,
            "notebook": dict(notebook) if notebook else None,
            "goldens": [{"prompt": golden.record.prompt, "seed": golden.record.seed} for golden in self.goldens],
        }
        return Findings.read(found, "this comparison")

    def _metric(self, metric: Metric) -> dict[str, Any]:
        values, before = self.values[metric.name], self.served_values.get(metric.name)
        by = [prompt for prompt, _ in self.plan.pairs]
        return {
            "better": metric.better,
            "source": metric.source,
            "candidate": _estimate(values, by),
            "served": None if before is None else _estimate(before, by),
            "difference": None if before is None or len(self.plan.prompts) < 2 else vars(paired(values, before, by=by)),
            "values": [float(f"{value:.7g}") for value in values],
        }


def _estimate(values: np.ndarray, by: Sequence[str]) -> dict[str, Any]:
    """The mean and its interval over prompts; for a single prompt only the mean."""
    if len(set(by)) > 1:
        return vars(interval(values, by=by))
    return {"mean": float(values.mean()), "low": None, "high": None, "count": 1}


def compare(
    candidate: GenerationConfig,
    slot: Path | str,
    plan: ComparisonPlan | None = None,
    profile: RuntimeProfile | None = None,
) -> Comparison:
    """Draw and measure `candidate` and the configuration in `slot` for every prompt and seed of the plan.

    For a slot that holds nothing yet only the candidate is drawn. Configurations of the same models share one engine
    and its calls.
    """
    plan = plan or ComparisonPlan()
    plan = plan if plan.clip else dataclasses.replace(plan, clip=clip_of(candidate.model))
    before = slot_config(slot)
    _check_gates(plan, before)
    configs = [candidate] if before is None else [candidate, before]
    requests = [ImageRequest(config, prompt, seed) for config in configs for prompt, seed in plan.pairs]
    # What is served in the same way, so that equal settings give equal images.
    exact = {place + len(plan.pairs) * each for each in range(len(configs)) for place in plan.golden_places}
    drawn = draw(requests, profile, exact)
    mine, theirs = drawn[: len(plan.pairs)], drawn[len(plan.pairs) :]
    return Comparison(plan, candidate, tuple(mine), before, tuple(theirs), measure(plan, mine), measure(plan, theirs))


def _check_gates(plan: ComparisonPlan, before: GenerationConfig | None) -> None:
    """Refuse a gate that cannot be judged before anything is drawn."""
    zeros = np.zeros(len(plan.pairs))
    metrics = {metric.name: metric for metric in plan.measures}
    for gate in plan.gates:
        gate.judge(metrics[gate.metric], zeros, None if before is None else zeros, [prompt for prompt, _ in plan.pairs])


def clip_of(model: ModelRef) -> str:
    """The CLIP model for a model's images: the one in its folder, or in that of a file's configurations, as for nano,
    else OpenAI's, whose text half is SDXL's first text encoder."""
    name = model.config or model.base
    places = [Path(name) / "clip", Path(name).parent / "clip"]
    beside = next((str(place) for place in places if place.is_dir()), "openai/clip-vit-large-patch14")
    return "nano" if name == "nano" else beside


def measure(plan: ComparisonPlan, images: Sequence[GeneratedImage]) -> dict[str, np.ndarray]:
    """The values of the plan's metrics by name, each (images,); empty without images."""
    return {metric.name: metric(images) for metric in plan.measures} if images else {}


def draw(
    requests: Sequence[ImageRequest], profile: RuntimeProfile | None = None, exact: Container[int] = ()
) -> list[GeneratedImage]:
    """Draw many requests with one engine for each set of models. The images are in the order of the requests. Those at
    the places `exact` are drawn as `RuntimeProfile.exact` does, whatever the profile: goldens are to come back bit for
    bit."""
    images: dict[int, GeneratedImage] = {}
    for model in dict.fromkeys(request.config.model for request in requests):
        mine = [index for index, request in enumerate(requests) if request.config.model == model]
        with Engine.load(requests[mine[0]].config, profile, max_queue=len(mine)) as engine:
            jobs = [engine.submit(requests[index], exact=index in exact or None) for index in mine]
            images |= {index: job.result() for index, job in zip(mine, jobs, strict=True)}
    for warning in dict.fromkeys(warning for image in images.values() for warning in image.record.warnings):
        log.warning(warning)
    return [images[index] for index in range(len(requests))]


def candidate_of(path: Path | str) -> GenerationConfig:
    """The configuration in a `config.toml`, or the one that an image was drawn with; its LoRAs with their sha256.

    Raises `ConfigError`, `ModelError` for a LoRA that is not there, or `ImageError` for an image without a record.
    """
    path = Path(path)
    if path.suffix == ".png":
        record = read_record(path)
        if record.strength is not None:
            rule = "an image drawn from a prompt alone; this one started from another image"
            raise ConfigError("candidate", str(path), rule, "runs/cat.png")
        return pinned(record.config)
    return pinned(GenerationConfig.from_toml(path))
