"""What is asked of the models, how the machine runs them, and what a client may ask for: frozen, validated settings.

`GenerationConfig` is the tuned configuration: it goes from a notebook to a slot to the service unchanged, and its
`digest` names it everywhere. `RuntimeProfile` says how a machine runs it. `ServingLimits` lie beside the configuration
in a slot. A value that breaks a rule raises `ConfigError` with the rule, the value and a valid example. Imports no
torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import model_validator

from sdxl_lab.declaration import (
    Choice,
    ConfigError,
    Declared,
    Number,
    Pair,
    Setting,
    Switch,
    Table,
    Text,
    Whole,
    canonical,
)

__all__ = [
    "FEWER_STEPS",
    "MAX_PROMPT",
    "MAX_SEED",
    "MAX_STEPS",
    "MODELS",
    "PROMPT",
    "SCHEDULERS",
    "SEED",
    "ConfigError",
    "GenerationConfig",
    "ModelRef",
    "RefinerConfig",
    "RuntimeProfile",
    "ServingLimits",
    "canonical",
    "checked_prompt",
    "checked_seed",
    "migrated_config",
]

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

STEPS = Whole(1, MAX_STEPS)
GUIDANCE_SCALE = Number(0, 100)
SIDE = Whole(64, 4096, multiple=8)
MODEL = Text(1, 500)
REVISION = Text(1, 100)
SCORE = Number(0, 10)
OFFSETS = Pair(Whole(0, 8192), ("top", "left"))
EXTENT = Pair(Whole(1, 8192), ("height", "width"))
PODELL = "Podell et al. 2023 (arXiv 2307.01952)"

PROMPT = Setting(
    kind=Text(1, MAX_PROMPT),
    label="Prompt",
    help="what to draw",
    example="A cat in a hat",
    source="diffusers: prompt",
    client=True,
).declared("prompt", str, None)
SEED = Setting(
    kind=Whole(0, MAX_SEED),
    label="Seed",
    help="which noise to start from",
    example=7,
    source="diffusers: generator",
    client=True,
).declared("seed", int, None)


class ModelRef(Declared):
    """Which weights, to the revision. `base`, `refiner` and `vae` are "nano", a folder, or a hub id; a hub id takes the
    commit hash of its revision. Without `refiner` there is none; without `vae` it is the base's own."""

    EXAMPLE: ClassVar[str] = "base"

    base: Annotated[
        str,
        Setting(
            kind=MODEL,
            label="Model",
            help="nano, a folder in diffusers' layout, or a hub id",
            example="nano",
            source="diffusers: from_pretrained",
            option=None,  # --model, which also brings what goes with the model
        ),
    ] = "nano"
    revision: Annotated[
        str | None,
        Setting(
            kind=REVISION,
            label="Revision",
            help="the commit of the model's hub id",
            example="main",
            source="diffusers: revision",
        ),
    ] = None
    refiner: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="Refiner's model",
            help="the refiner's weights: nano, a folder or a hub id",
            example="nano",
            source=f"{PODELL}, section 2.5",
            option="refiner-model",
        ),
    ] = None
    refiner_revision: Annotated[
        str | None,
        Setting(
            kind=REVISION,
            label="Refiner's revision",
            help="the commit of the refiner's hub id",
            example="main",
            source="diffusers: revision",
        ),
    ] = None
    vae: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="VAE",
            help="the weights of another VAE than the model's own: a folder or a hub id",
            example="nano",
            source="diffusers: AutoencoderKL",
        ),
    ] = None
    vae_revision: Annotated[
        str | None,
        Setting(
            kind=REVISION,
            label="VAE's revision",
            help="the commit of the VAE's hub id",
            example="main",
            source="diffusers: revision",
        ),
    ] = None

    @classmethod
    def named(cls, name: str) -> "ModelRef":
        """ "nano", "sdxl", or a folder or hub id; a folder with `base/` and `refiner/` in it has both."""
        return MODELS.get(name) or cls(base=name, refiner=name if Path(name, "refiner").is_dir() else None)

    @classmethod
    def of(cls, value: object) -> Any:
        return cls.named(value) if isinstance(value, str) else super().of(value)


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


class RefinerConfig(Declared):
    """The ensemble of two denoisers: the base makes the first `handover` of the noise schedule, the refiner the rest.
    The aesthetic scores condition the refiner's guided and unguided row."""

    EXAMPLE: ClassVar[str] = "handover"

    handover: Annotated[
        float,
        Setting(
            kind=Number(0, 1, between=True),
            label="Hand-over",
            help="the part of the noise schedule after which the refiner goes on",
            example=0.8,
            source=f"{PODELL}, section 2.5; diffusers: denoising_end",
            step=0.05,
        ),
    ] = 0.8
    aesthetic_score: Annotated[
        float,
        Setting(
            kind=SCORE,
            label="Aesthetic score",
            help="the score that the refiner's guided row aims at",
            example=6.0,
            source="diffusers: aesthetic_score",
            step=0.5,
        ),
    ] = 6.0
    negative_aesthetic_score: Annotated[
        float,
        Setting(
            kind=SCORE,
            label="Negative score",
            help="the score that the refiner's unguided row stands for",
            example=2.5,
            source="diffusers: negative_aesthetic_score",
            step=0.5,
        ),
    ] = 2.5


class GenerationConfig(Declared):
    """All that decides an image besides its prompt, its seed and a source image.

    What the fields mean, their rules, units and sources stand in their declarations; docs/research.md has them as a
    table. Sizes are in pixels, pairs are (height, width), (top, left) or (low, high).
    """

    EXAMPLE: ClassVar[str] = "steps"

    model: Annotated[
        ModelRef,
        Setting(
            kind=Table(ModelRef),
            label="Model",
            help="which weights",
            example={"base": "nano"},
            source=PODELL,
            option=None,
        ),
    ] = MODELS["nano"]
    scheduler: Annotated[
        str,
        Setting(
            kind=Choice(SCHEDULERS),
            label="Scheduler",
            help="how the noise is taken away step by step",
            example="euler",
            source="diffusers: the schedulers of `sdxl_lab/diffusion/schedulers.py`",
            client=True,
        ),
    ] = "euler"
    steps: Annotated[
        int,
        Setting(
            kind=STEPS,
            label="Steps",
            help="steps of base and refiner together",
            example=25,
            source="diffusers: num_inference_steps",
            client=True,
            limited_by="steps",
        ),
    ] = 25
    guidance_scale: Annotated[
        float,
        Setting(
            kind=GUIDANCE_SCALE,
            label="Guidance scale",
            help="how far each step follows the prompt (1 or less: no guidance)",
            example=5.0,
            source="Ho and Salimans 2022 (arXiv 2207.12598); diffusers: guidance_scale",
            step=0.5,
            client=True,
            limited_by="guidance_scale",
        ),
    ] = 5.0
    guidance_rescale: Annotated[
        float,
        Setting(
            kind=Number(0, 1),
            label="Guidance rescale",
            help="phi, how far guidance keeps the unguided spread of values",
            example=0.7,
            source="Lin et al. 2023 (arXiv 2305.08891), section 3.4; diffusers: guidance_rescale",
            step=0.05,
        ),
    ] = 0.0
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Setting(
            kind=Pair(Number(0, 1000), increasing=True),
            label="Guidance interval",
            help="the noise levels between which guidance is applied (left out: all)",
            example=(0.28, 5.42),
            unit="sigma",
            source="Kynkaanniemi et al. 2024 (arXiv 2404.07724)",
            step=0.1,
        ),
    ] = None
    width: Annotated[
        int,
        Setting(
            kind=SIDE,
            label="Width",
            help="the image's width",
            example=256,
            unit="pixels",
            source="diffusers: width",
            step=8,
            client=True,
            limited_by="side",
        ),
    ] = 256
    height: Annotated[
        int,
        Setting(
            kind=SIDE,
            label="Height",
            help="the image's height",
            example=256,
            unit="pixels",
            source="diffusers: height",
            step=8,
            client=True,
            limited_by="side",
        ),
    ] = 256
    original_size: Annotated[
        tuple[int, int] | None,
        Setting(
            kind=EXTENT,
            label="Original size",
            help="the size before scaling that SDXL is told (left out: the image's own)",
            example=(256, 256),
            unit="pixels",
            source=f"{PODELL}, section 2.2; diffusers: original_size",
        ),
    ] = None
    crop: Annotated[
        tuple[int, int],
        Setting(
            kind=OFFSETS,
            label="Crop",
            help="the upper left corner of the crop that SDXL is told",
            example=(0, 0),
            unit="pixels",
            source=f"{PODELL}, section 2.2; diffusers: crops_coords_top_left",
        ),
    ] = (0, 0)
    target_size: Annotated[
        tuple[int, int] | None,
        Setting(
            kind=EXTENT,
            label="Target size",
            help="the size after cropping that SDXL is told (left out: the image's own)",
            example=(256, 256),
            unit="pixels",
            source=f"{PODELL}, section 2.3; diffusers: target_size",
        ),
    ] = None
    negative_prompt: Annotated[
        str | None,
        Setting(
            kind=Text(0, MAX_PROMPT),
            label="Negative prompt",
            help="what to keep out of the image",
            example="blurry",
            source="diffusers: negative_prompt",
            client=True,
        ),
    ] = None
    clip_skip: Annotated[
        int | None,
        Setting(
            kind=Whole(0, 11),  # CLIP-L, the shallowest of SDXL's text encoders, has 12 layers
            label="Clip skip",
            help="text encoder layers to skip before the penultimate one, but for the negative prompt (left out: none)",
            example=1,
            unit="layers",
            source="diffusers: clip_skip",
        ),
    ] = None
    refiner: Annotated[
        RefinerConfig | None,
        Setting(
            kind=Table(RefinerConfig),
            label="Refiner",
            help="whether the refiner makes the last steps",
            example={"handover": 0.8},
            source=f"{PODELL}, section 2.5",
            client=True,
        ),
    ] = None
    watermark: Annotated[
        bool,
        Setting(
            kind=Switch(),
            label="Watermark",
            help="write the invisible watermark into the image",
            example=True,
            source="invisible-watermark; diffusers: add_watermarker",
        ),
    ] = False

    @model_validator(mode="after")
    def _whole(self) -> "GenerationConfig":
        """The rules over several fields."""
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
        return self

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> "GenerationConfig":
        """Sound starting values for "nano", "sdxl", a folder or a hub id, with `changes` on top."""
        start: dict[str, Any] = {"model": ModelRef.named(name)}
        if name != "nano":
            start |= {"width": 1024, "height": 1024}
        return cls(**(start | changes))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: Path | str = "PATH") -> "GenerationConfig":
        """The inverse of `to_dict`. `ConfigError` for what breaks a rule, and for a configuration of 0.1.0, with the
        command that migrates its `source`."""
        if "limits" in content:
            raise ConfigError(
                "limits",
                content["limits"],
                "left out, since serving.toml beside the configuration has what a client may ask for. This is a "
                f"configuration of 0.1.0; migrate it with `python -m sdxl_lab migrate {source}`",
                "serving.toml with steps = [1, 100]",
            )
        return super().from_dict(content)

    @classmethod
    def from_toml(cls, path: Path | str) -> "GenerationConfig":
        """Read a `config.toml`; `ConfigError` if it is no TOML, breaks a rule, or is one of 0.1.0."""
        return cls.from_dict(cls.read_toml(path), path)


class ServingLimits(Declared):
    """What a client of the service may ask for over the promoted values: ranges, both ends included. A slot keeps them
    in `serving.toml`, beside the configuration: they decide no image."""

    EXAMPLE: ClassVar[str] = "steps"

    steps: Annotated[
        tuple[int, int],
        Setting(
            kind=Pair(STEPS, increasing=True),
            label="Steps",
            help="fewest and most steps",
            example=(1, 100),
        ),
    ] = (1, 100)
    guidance_scale: Annotated[
        tuple[float, float],
        Setting(
            kind=Pair(GUIDANCE_SCALE, increasing=True),
            label="Guidance scale",
            help="lowest and highest guidance scale",
            example=(0, 30),
        ),
    ] = (0.0, 30.0)
    side: Annotated[
        tuple[int, int],
        Setting(
            kind=Pair(SIDE, increasing=True),
            label="Side",
            help="shortest and longest side",
            example=(128, 512),
            unit="pixels",
        ),
    ] = (128, 512)

    @classmethod
    def for_model(cls, model: ModelRef) -> "ServingLimits":
        """Sound limits for a model: nano's, or those of the real SDXL."""
        return cls() if model.base == "nano" else cls(side=(512, 1536))

    def narrowed(self, setting: Setting) -> Setting:
        """A setting of the configuration with these limits in its rule."""
        if setting.limited_by is None:
            return setting
        low, high = getattr(self, setting.limited_by)
        return replace(setting, kind=replace(setting.kind, low=low, high=high))  # type: ignore[call-arg]

    def check(self, asked: Mapping[str, Any], promoted: GenerationConfig) -> None:
        """`ConfigError` for the first of the settings that is outside the limits, with the promoted value as the
        example."""
        for name, setting in GenerationConfig.settings().items():
            if setting.limited_by is not None and name in asked:
                replace(self.narrowed(setting), example=promoted.value(name)).check(asked[name])


def migrated_config(content: Mapping[str, Any]) -> tuple[GenerationConfig, ServingLimits]:
    """A configuration of 0.1.0, as its `config.toml` or a record holds it, parted into what decides an image and what a
    client may ask for. Raises `ConfigError`."""
    rest = dict(content)
    limits = rest.pop("limits", {})
    if not isinstance(limits, Mapping):
        raise ConfigError("limits", limits, "a table of ranges", "limits.steps = [1, 100]")
    return GenerationConfig.from_dict(rest), ServingLimits.from_dict(limits)


class RuntimeProfile(Declared):
    """How this machine runs the models; recorded with every image, since it moves pixels too.

    Latents are float32 whatever the dtype; on a CPU so are the text encoders and the VAE. `bench/README.md` says what
    each field brings.
    """

    EXAMPLE: ClassVar[str] = "dtype"

    device: Annotated[
        str,
        Setting(
            kind=Text(pattern=r"^(auto|cpu|cuda|cuda:[0-9]+)$", meaning="auto, cpu, cuda or cuda:N"),
            label="Device",
            help="where the models run (auto: CUDA where there is one)",
            example="auto",
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        Setting(
            kind=Choice(("auto", "float32", "float16", "bfloat16")),
            label="Data type",
            help="the UNets' numbers (auto: float32 on a CPU, float16 on CUDA). On a CPU without "
            "AVX-512 bfloat16 is ten times as slow",
            example="auto",
        ),
    ] = "auto"
    rows: Annotated[
        int,
        Setting(
            kind=Whole(1, 4096),
            label="Rows",
            help="the most UNet rows that share one call; a guided image takes two. How many do is measured",
            example=32,
        ),
    ] = 32
    active: Annotated[
        int,
        Setting(
            kind=Whole(1, 100_000),
            label="Images under way",
            help="the most images that are begun and not done: each holds its latents, some 2 MB at 1024 px",
            example=256,
        ),
    ] = 256
    order: Annotated[
        str,
        Setting(
            kind=Choice(("shortest", "fifo")),
            label="Order",
            help="who goes first: the image with the least time left, within a bound on everybody's wait, or the one "
            "that came first",
            example="shortest",
        ),
    ] = "shortest"
    exact: Annotated[
        bool,
        Setting(
            kind=Switch(),
            label="Exact",
            help="one image a call, and on a CPU one thread: an image's bits do not depend on its company",
            example=True,
        ),
    ] = False
    threads: Annotated[
        int | None,
        Setting(
            kind=Whole(1, 1024),
            label="Threads",
            help="torch's threads (left out: as many as calls show to be fastest)",
            example=2,
        ),
    ] = None
    channels_last: Annotated[
        bool,
        Setting(
            kind=Switch(),
            label="Channels last",
            help="lay out the UNet's weights with the channels last",
            example=True,
        ),
    ] = False
    fuse_qkv: Annotated[
        bool,
        Setting(
            kind=Switch(),
            label="Fused projections",
            help="compute an attention's query, key and value in one product",
            example=True,
        ),
    ] = False
    compile: Annotated[
        bool,
        Setting(
            kind=Switch(),
            label="Compiled",
            help="compile the UNet, which is then called with 1, 2, 4, 8, ... rows only: few shapes are compiled",
            example=True,
        ),
    ] = False
    graphs: Annotated[
        bool,
        Setting(
            kind=Switch(),
            label="CUDA graphs",
            help="record the UNet's kernels once for each number of rows and size, and replay them; only with CUDA",
            example=True,
        ),
    ] = False


def checked_prompt(prompt: object) -> str:
    """The prompt, if it is one: 1 to 2,000 characters."""
    try:
        return str(PROMPT.check(prompt))
    except ConfigError as error:
        if isinstance(prompt, str) and not 1 <= len(prompt) <= MAX_PROMPT:
            raise PROMPT.error(f"{len(prompt)} characters") from error
        raise


def checked_seed(seed: object) -> int:
    """The seed, if it is one: 0 to 2^63-1."""
    return int(SEED.check(seed))
