"""What is asked of the models, and how the machine runs them: two frozen, validated, typed records.

`GenerationConfig` is the tuned configuration: it goes from a notebook to a slot to the service unchanged, and its
`digest` names it everywhere. `RuntimeProfile` says how this machine runs it. Neither knows torch, files of images, or
HTTP; a value that breaks a rule raises `ConfigError` with the rule, the value and a valid example.
"""

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import tomli_w

SCHEDULERS = (
    "euler",
    "euler_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "dpmpp_sde",
    "unipc",
    "ddim",
    "ddpm",
    "heun",
    "lms",
    "kdpm2",
    "kdpm2_a",
    "pndm",
    "deis",
    "lcm",
    "tcd",
)
MAX_STEPS = 1000
# LCM and TCD are distilled to 50 steps. Of the others these would begin beyond the 1,000 noise levels that SDXL was
# trained on, or twice on the same one, and diffusers then fails or divides by zero.
FEWER_STEPS = {
    **dict.fromkeys(("lcm", "tcd"), 50),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis"), 998),
    **dict.fromkeys(("ddim", "ddpm", "pndm", "lms", "dpmpp_sde"), 999),
}
MAX_SEED = 2**63 - 1
MAX_PROMPT = 2_000


class ConfigError(ValueError):
    """A value breaks a rule of the configuration. `field`, `received` and `rule` say which."""

    def __init__(self, field: str, received: object, rule: str, example: object) -> None:
        shown = str(example) if "=" in str(example) else f"{field} = {json.dumps(example)}"
        super().__init__(f"{field} must be {rule}; received {received!r}. Example: {shown}")
        self.field, self.received, self.rule = field, received, rule


@dataclass(frozen=True)
class Rule:
    """One field's rule: the words, the test, a valid example, and how a plain value becomes the stored one."""

    words: str
    holds: Callable[[Any], bool]
    example: object
    store: Callable[[Any], object] = lambda value: value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_text(value: object) -> bool:
    """Text that UTF-8 can carry and files can hold: no lone surrogates, no NUL."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def _integer(low: int, high: int, example: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda v: _is_int(v) and low <= v <= high, example)


def _number(low: float, high: float, example: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda v: _is_number(v) and low <= v <= high, example, float)


def _side(example: int) -> Rule:
    return Rule(
        "a multiple of 8 from 64 to 4096 (pixels)",
        lambda v: _is_int(v) and 64 <= v <= 4096 and v % 8 == 0,
        example,
    )


def _pair(rule: Rule, example: tuple[object, object]) -> Rule:
    def holds(value: object) -> bool:
        return isinstance(value, tuple | list) and len(value) == 2 and all(rule.holds(v) for v in value)

    return Rule(f"two values, each {rule.words}", holds, list(example), lambda v: tuple(rule.store(x) for x in v))


def _increasing(rule: Rule) -> Rule:
    return Rule(
        f"{rule.words}, the first not above the second",
        lambda v: rule.holds(v) and v[0] <= v[1],
        rule.example,
        rule.store,
    )


def _or_none(rule: Rule) -> Rule:
    return Rule(
        f"{rule.words}, or left out",
        lambda v: v is None or rule.holds(v),
        rule.example,
        lambda v: None if v is None else rule.store(v),
    )


def _text(low: int, high: int, example: str) -> Rule:
    words = f"text of {low} to {high} characters, without NUL or lone surrogates"
    return Rule(words, lambda v: _is_text(v) and low <= len(v) <= high, example)


def _one_of(values: tuple[str, ...]) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda v: v in values, values[0])


_BOOL = Rule("true or false", lambda v: isinstance(v, bool), True)
_NAME = _text(1, 500, "nano")
_PROMPT = _text(1, MAX_PROMPT, "A cat in a hat")


def canonical(content: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no blanks: equal content, equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Record:
    """What the records below share: rules checked at birth, plain-dict and JSON forms, `with_`."""

    RULES: dict[str, Rule] = {}
    NESTED: dict[str, type["Record"]] = {}

    def __post_init__(self) -> None:
        for name in self.RULES:
            object.__setattr__(self, name, self.checked(name, getattr(self, name)))
        for name, kind in self.NESTED.items():
            value = getattr(self, name)
            if not (isinstance(value, kind) or (value is None and name == "refiner")):
                first, rule = next(iter(kind.RULES.items()))
                raise ConfigError(name, value, f"a {kind.__name__}", f"{name}.{first} = {json.dumps(rule.example)}")

    @classmethod
    def checked(cls, name: str, value: object) -> Any:
        """The value as the field `name` stores it; `ConfigError` where it breaks the field's rule."""
        rule = cls.RULES[name]
        if not rule.holds(value):
            raise ConfigError(name, value, rule.words, rule.example)
        return rule.store(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what TOML and JSON hold. Fields that are None are left out."""
        content: dict[str, Any] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Record):
                content[item.name] = value.to_dict()
            elif value is not None:
                content[item.name] = list(value) if isinstance(value, tuple) else value
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Unknown names are refused."""
        cls._check_names(content)
        values: dict[str, Any] = dict(content)
        for name, kind in cls.NESTED.items():
            if isinstance(values.get(name), Mapping):
                values[name] = kind.from_dict(values[name])
        return cls(**values)

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown names are refused."""
        self._check_names(changes)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def _check_names(cls, values: Mapping[str, Any]) -> None:
        known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name, value in values.items():
            if name not in known:
                raise ConfigError(name, value, f"a field of {cls.__name__}: {', '.join(known)}", f"{known[1]} = ...")

    @property
    def digest(self) -> str:
        """First 12 hex digits of the sha256 of the `canonical` JSON."""
        return hashlib.sha256(canonical(self.to_dict()).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ModelRef(Record):
    """Which weights, to the revision. `base`, `refiner` and `vae` are "nano", a folder, or a hub id; a hub id takes the
    commit hash of its revision. Without `refiner` there is none; without `vae` it is the base's own."""

    base: str = "nano"
    revision: str | None = None
    refiner: str | None = None
    refiner_revision: str | None = None
    vae: str | None = None
    vae_revision: str | None = None

    RULES = {
        "base": _NAME,
        "revision": _or_none(_text(1, 100, "main")),
        "refiner": _or_none(_NAME),
        "refiner_revision": _or_none(_text(1, 100, "main")),
        "vae": _or_none(_NAME),
        "vae_revision": _or_none(_text(1, 100, "main")),
    }

    @classmethod
    def named(cls, name: str) -> "ModelRef":
        """ "nano", "sdxl", or a folder or hub id; a folder with `base/` and `refiner/` in it has both."""
        return MODELS.get(name) or cls(base=name, refiner=name if Path(name, "refiner").is_dir() else None)


MODELS = {
    "nano": ModelRef(refiner="nano"),
    "sdxl": ModelRef(
        base="stabilityai/stable-diffusion-xl-base-1.0",
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        refiner="stabilityai/stable-diffusion-xl-refiner-1.0",
        refiner_revision="5d4cfe854c9a9a87939ff3653551c2b3c99a4356",
        vae="madebyollin/sdxl-vae-fp16-fix",
        vae_revision="207b116dae70ace3637169f1ddd2434b91b3a8cd",
    ),
}


@dataclass(frozen=True)
class RefinerConfig(Record):
    """The ensemble of two denoisers (Podell et al. 2023, arXiv 2307.01952, section 2.5): the base makes the first
    `handover` of the noise schedule (diffusers' `denoising_end`), the refiner the rest. The aesthetic scores condition
    the refiner's guided and unguided row."""

    handover: float = 0.8
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    RULES = {
        "handover": Rule("a number above 0 and below 1", lambda v: _is_number(v) and 0 < v < 1, 0.8, float),
        "aesthetic_score": _number(0, 10, 6.0),
        "negative_aesthetic_score": _number(0, 10, 2.5),
    }


@dataclass(frozen=True)
class Limits(Record):
    """What a client of the service may ask for over the promoted values: inclusive ranges."""

    steps: tuple[int, int] = (1, 100)
    guidance_scale: tuple[float, float] = (0.0, 30.0)
    side: tuple[int, int] = (128, 512)

    RULES = {
        "steps": _increasing(_pair(_integer(1, MAX_STEPS, 25), (1, 100))),
        "guidance_scale": _increasing(_pair(_number(0, 100, 7.0), (0, 30))),
        "side": _increasing(_pair(_side(256), (128, 512))),
    }


@dataclass(frozen=True)
class GenerationConfig(Record):
    """Everything but prompt and seed that decides an image.

    `guidance_interval` (low, high) is in noise levels, sigma = sqrt((1 - alpha_bar) / alpha_bar): guidance is applied
    inside it only (Kynkaanniemi et al. 2024, arXiv 2404.07724); left out, everywhere. `guidance_rescale` is phi of Lin
    et al. 2023 (arXiv 2305.08891). `original_size`, `crop` and `target_size` are SDXL's micro-conditioning as (height,
    width) or (top, left) in pixels; left out, they are those of a whole image of this size.
    """

    model: ModelRef = MODELS["nano"]
    scheduler: str = "euler"
    steps: int = 25
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    width: int = 256
    height: int = 256
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_prompt: str | None = None
    refiner: RefinerConfig | None = None
    watermark: bool = False
    limits: Limits = field(default_factory=Limits)

    NESTED = {"model": ModelRef, "refiner": RefinerConfig, "limits": Limits}
    RULES = {
        "scheduler": _one_of(SCHEDULERS),
        "steps": _integer(1, MAX_STEPS, 25),
        "guidance_scale": _number(0, 100, 5.0),
        "guidance_rescale": _number(0, 1, 0.7),
        "guidance_interval": _or_none(_increasing(_pair(_number(0, 1000, 0.28), (0.28, 5.42)))),
        "width": _side(256),
        "height": _side(256),
        "original_size": _or_none(_pair(_integer(1, 8192, 256), (256, 256))),
        "crop": _pair(_integer(0, 8192, 0), (0, 0)),
        "target_size": _or_none(_pair(_integer(1, 8192, 256), (256, 256))),
        "negative_prompt": _or_none(_text(0, MAX_PROMPT, "blurry")),
        "watermark": _BOOL,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        most = FEWER_STEPS.get(self.scheduler, MAX_STEPS)
        if self.steps > most:
            raise ConfigError("steps", self.steps, f"at most {most} with the scheduler {self.scheduler}", most)
        if self.refiner is not None and self.model.refiner is None:
            raise ConfigError(
                "refiner",
                self.refiner.to_dict(),
                f"left out, since the model {self.model.base!r} has no refiner",
                "model = nano",
            )
        if self.watermark and self.width * self.height < 256 * 256:
            raise ConfigError(
                "watermark",
                f"true at {self.width}x{self.height}",
                "false below 256x256 pixels of area, where invisible-watermark cannot write its bits",
                "width = 256, height = 256",
            )

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> "GenerationConfig":
        """Sound starting values for "nano", "sdxl", a folder or a hub id, with `changes` on top."""
        start: dict[str, Any] = {"model": ModelRef.named(name)}
        if name != "nano":
            start |= {"width": 1024, "height": 1024, "limits": Limits(side=(512, 1536))}
        return cls(**(start | changes))

    @classmethod
    def from_toml(cls, path: Path | str) -> "GenerationConfig":
        """Read a `config.toml`; `ConfigError` if it is no TOML or breaks a rule."""
        try:
            content = tomllib.loads(Path(path).read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(str(path), str(error), "valid TOML", "steps = 25") from error
        return cls.from_dict(content)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())


@dataclass(frozen=True)
class RuntimeProfile(Record):
    """How this machine runs the models; recorded with every image, since it moves pixels too.

    `device` "auto" is CUDA where there is one. `dtype` is the UNets'; "auto" is float32 on a CPU, float16 on CUDA.
    Latents are float32 whatever the dtype; on a CPU so are the text encoders and the VAE. `rows` is how many UNet rows
    share one call (a guided image takes two). `threads` is torch's, left out for all cores. `channels_last`,
    `fuse_qkv` and `compile` change how the UNet is laid out and run; a compiled UNet is called with 1, 2, 4, 8, ...
    rows only, so that few shapes are compiled. `bench/README.md` says what each brings.
    """

    device: str = "auto"
    dtype: str = "auto"
    rows: int = 16
    threads: int | None = None
    channels_last: bool = False
    fuse_qkv: bool = False
    compile: bool = False

    RULES = {
        "device": Rule(
            "auto, cpu, cuda or cuda:N",
            lambda v: (
                isinstance(v, str) and (v in ("auto", "cpu", "cuda") or (v.startswith("cuda:") and v[5:].isdigit()))
            ),
            "auto",
        ),
        "dtype": _one_of(("auto", "float32", "float16", "bfloat16")),
        "rows": _integer(1, 4096, 16),
        "threads": _or_none(_integer(1, 1024, 2)),
        "channels_last": _BOOL,
        "fuse_qkv": _BOOL,
        "compile": _BOOL,
    }


def checked_prompt(prompt: object) -> str:
    """The prompt, if it is one: 1 to 2,000 characters."""
    if not _PROMPT.holds(prompt):
        shown = f"{len(prompt)} characters" if isinstance(prompt, str) and _is_text(prompt) else prompt
        raise ConfigError("prompt", shown, _PROMPT.words, _PROMPT.example)
    return str(prompt)


def checked_seed(seed: object) -> int:
    """The seed, if it is one: 0 to 2^63-1."""
    if not (_is_int(seed) and 0 <= seed <= MAX_SEED):  # type: ignore[operator]
        raise ConfigError("seed", seed, f"a whole number from 0 to {MAX_SEED}", 7)
    return seed  # type: ignore[return-value]
