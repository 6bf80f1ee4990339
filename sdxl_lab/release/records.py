"""What is written down of a promotion: what a comparison found of a candidate, and a slot's evidence.

Imports no torch.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdxl_lab.config import MAX_SEED, ModelRef, ServingLimits
from sdxl_lab.record import AnyDigest, Digest, Record, RecordError


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Estimate(Part):
    """A mean over `count` prompts, and the interval that it lies in; of one prompt there is none."""

    mean: float
    low: float | None = None
    high: float | None = None
    count: int


class Improvement(Part):
    """The mean difference of candidate and served over `count` prompts, pair by pair, and the interval it lies in."""

    mean: float
    low: float
    high: float
    count: int


class MetricFinding(Part):
    """What a metric gave for the candidate and for what is served. `values` are the candidate's, prompts x seeds, the
    seeds running fastest."""

    better: str | None = None
    source: str
    candidate: Estimate
    served: Estimate | None = None
    difference: Improvement | None = None
    values: tuple[float, ...]


class GateFinding(Part):
    """Whether a gate held, and the figures that say so."""

    gate: str
    passed: bool
    figures: str


class PromptSeed(Part):
    """A prompt and a seed that give a golden."""

    prompt: str
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]


class GoldenEntry(PromptSeed):
    """A golden by its file in the slot's `golden/`."""

    file: str


class _OfADrawing(Record):
    """What both have: the configuration, and what its images were drawn with."""

    digest: Digest
    replaces: AnyDigest | None = None
    version: Annotated[str, Field(examples=["0.2.0"])]
    weights: Annotated[dict[str, str], Field(examples=[{"base": "sha256 ..."}])]
    runtime: Annotated[dict[str, Any], Field(examples=[{"device": "cpu", "dtype": "float32"}])]
    libraries: Annotated[dict[str, str], Field(examples=[{"torch": "2.13.0"}])]
    commit: str | None = None
    dirty: bool = False


class Findings(_OfADrawing):
    """What a comparison found of a candidate: what a promotion is decided on. `replaces` is the digest of what the
    candidate was compared with, None for a new slot."""

    NOUN: ClassVar[str] = "the findings"

    prompts: Annotated[tuple[str, ...], Field(examples=[["A cat in a hat"]])]
    seeds: Annotated[tuple[int, ...], Field(examples=[[0, 1]])]
    clip: Annotated[str, Field(examples=["nano"])]
    metrics: Annotated[dict[str, MetricFinding], Field(examples=[{}])]
    gates: Annotated[tuple[GateFinding, ...], Field(examples=[[]])]
    goldens: Annotated[tuple[PromptSeed, ...], Field(examples=[[{"prompt": "A cat in a hat", "seed": 7}]])]
    machine: dict[str, str] = {}
    notebook: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Findings":
        _check_values(self.metrics, len(self.prompts) * len(self.seeds))
        return self

    @classmethod
    def of_first_version(cls, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        raise RecordError(
            f"{cls.NOUN} of {name} must have a schema number; received none, as 0.1.0 wrote them. What a model is was "
            "judged by its weights alone then: compare the candidate again. Example: python -m sdxl_lab promote "
            "candidate.toml SLOT --why WHY --who WHO"
        )


class Evidence(_OfADrawing):
    """Why a slot holds its configuration: who promoted it, when, for what reason, on which findings, and the goldens.

    `limits` are those that the slot had at the promotion. What a comparison found is empty in a slot that was new and
    did without one; `machine` and `notebook` are where it was made.
    """

    NOUN: ClassVar[str] = "the evidence"

    model: Annotated[ModelRef, Field(examples=[{"base": "nano"}])]
    limits: Annotated[ServingLimits, Field(examples=[{"steps": [1, 100]}])]
    who: Annotated[str, Field(examples=["Ada"])]
    why: Annotated[str, Field(examples=["sharper hats"])]
    when: Annotated[str, Field(examples=["2026-01-31T12:00:00+00:00"])]
    goldens: Annotated[
        tuple[GoldenEntry, ...], Field(examples=[[{"file": "01-a-cat-7.png", "prompt": "a cat", "seed": 7}]])
    ]
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    clip: str | None = None
    metrics: dict[str, MetricFinding] = {}
    gates: tuple[GateFinding, ...] = ()
    machine: dict[str, str] = {}
    notebook: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Evidence":
        _check_values(self.metrics, len(self.prompts) * len(self.seeds))
        if self.metrics and self.clip is None:
            raise ValueError("the metric set must say with which CLIP model it was measured")
        return self

    @classmethod
    def of_first_version(cls, plain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        raise RecordError(
            f"{cls.NOUN} of {name} must have a schema number; received none, as 0.1.0 wrote it. Migrate the slot: "
            "python -m sdxl_lab migrate SLOT"
        )


def _check_values(metrics: Mapping[str, MetricFinding], count: int) -> None:
    for name, metric in metrics.items():
        if len(metric.values) != count:
            raise ValueError(
                f"the metric {name} must have a value for each prompt and seed, {count}; it has {len(metric.values)}"
            )
