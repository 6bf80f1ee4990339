"""What is asked of the models, how the machine runs them, and what a client may ask for: frozen, validated settings.

`GenerationConfig` is the tuned configuration: it goes from a notebook to a slot to the service unchanged, and its
`digest` names it everywhere. `RuntimeProfile` says how a machine runs it. `ServingLimits` lie beside the configuration
in a slot. A value that breaks a rule raises `ConfigError` with the rule, the value and a valid example. Imports no
torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import model_validator

from sdxl_lab.checksums import sha256_of
from sdxl_lab.declaration import (
    NONE,
    Choice,
    ConfigError,
    Declared,
    Falling,
    Number,
    Pair,
    Setting,
    Switch,
    Table,
    Tables,
    Text,
    Whole,
    canonical,
    nearest,
)
from sdxl_lab.schedules import (
    FEWER_STEPS,
    MAX_STEPS,
    OWN,
    SCHEDULERS,
    SIGMA_SCHEDULES,
    SPACINGS,
    TRAINED,
    check_schedule,
    check_zero_snr,
)

__all__ = [
    "FEWER_STEPS",
    "FIT",
    "MASK_BLUR",
    "MAX_PROMPT",
    "MAX_SEED",
    "MAX_STEPS",
    "MODELS",
    "PROMPT",
    "PROMPT_2",
    "SCHEDULERS",
    "SEED",
    "STRENGTH",
    "ConfigError",
    "EmbeddingRef",
    "FreeU",
    "GenerationConfig",
    "HiresConfig",
    "LoraRef",
    "ModelRef",
    "OfferedLora",
    "PerturbedAttention",
    "ProjectedGuidance",
    "RefinerConfig",
    "RuntimeProfile",
    "ServingLimits",
    "ZeroStar",
    "canonical",
    "checked_prompt",
    "checked_seed",
    "is_file",
    "migrated_config",
]

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
LORA_WEIGHT = Number(-10, 10)
SHA256 = Text(pattern="^[0-9a-f]{64}$", meaning="64 hexadecimal digits")
PODELL = "Podell et al. 2023 (arXiv 2307.01952)"
SADAT = "Sadat et al. 2024 (arXiv 2410.02416)"
FAN = "Fan et al. 2025 (arXiv 2503.18886)"
SI = "Si et al. 2023 (arXiv 2309.11497)"
AHN = "Ahn et al. 2024 (arXiv 2403.17377)"
HU = "Hu et al. 2021 (arXiv 2106.09685)"

PROMPT = Setting(
    kind=Text(1, MAX_PROMPT),
    label="Prompt",
    help="what to draw",
    example="A cat in a hat",
    source="diffusers: prompt",
    client=True,
).declared("prompt", str, None)
PROMPT_2 = Setting(
    kind=Text(1, MAX_PROMPT),
    label="Prompt 2",
    help="what the base's second text encoder reads (left out: the prompt)",
    example="in the style of a woodcut",
    source="diffusers: prompt_2",
    client=True,
).declared("prompt_2", str | None, None)
STRENGTH = Setting(
    kind=Number(0, 1),
    label="Strength",
    help="how much of the noise schedule is gone through again, above 0: 1 keeps next to nothing of the source",
    example=0.6,
    source="Meng et al. 2021 (arXiv 2108.01073); diffusers: strength",
    step=0.05,
).declared("strength", float, 0.6)
FIT = Setting(
    kind=Choice(("crop", "stretch")),
    label="Fit",
    help="how a source of another size becomes the image's: crop scales it until it covers the image and cuts what "
    "juts out on two sides, stretch scales each side",
    example="crop",
    source="diffusers: resize_mode of VaeImageProcessor; A1111: resize mode",
).declared("fit", str, "crop")
MASK_BLUR = Setting(
    kind=Number(0, 256),
    label="Mask blur",
    help="the radius of a Gaussian blur that rounds the mask's edge, before it is cut at one half",
    example=4.0,
    unit="pixels",
    source="diffusers: VaeImageProcessor.blur; A1111: mask blur",
    step=1,
).declared("mask_blur", float, 0.0)
SEED = Setting(
    kind=Whole(0, MAX_SEED),
    label="Seed",
    help="which noise to start from",
    example=7,
    source="diffusers: generator",
    client=True,
).declared("seed", int, None)


class ModelRef(Declared):
    """Which weights, to the byte where it is said. `base`, `refiner` and `vae` are "nano", a folder, a single
    `.safetensors` file or a hub id. A hub id takes the commit hash of its revision; a file the sha256 that it must
    have, and a folder that of its inventory. Without `refiner` there is none; without `vae` it is the base's own.
    `prediction_type` and `zero_snr` are the base's."""

    EXAMPLE: ClassVar[str] = "base"

    base: Annotated[
        str,
        Setting(
            kind=MODEL,
            label="Model",
            help="nano, a folder in diffusers' layout, a .safetensors file, or a hub id",
            example="nano",
            source="diffusers: from_pretrained, from_single_file",
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
    sha256: Annotated[
        str | None,
        Setting(
            kind=SHA256,
            label="Checksum",
            help="the sha256 that the model's file must have, or the inventory of its folder",
            example="31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
            source="model sites name files by it",
        ),
    ] = None
    config: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="Configurations",
            help="where a single file's configurations and tokenizers come from: nano, a folder in diffusers' layout, "
            "or a hub id (left out: SDXL's own)",
            example="nano",
            source="diffusers: config of from_single_file",
            option="model-config",
        ),
    ] = None
    config_revision: Annotated[
        str | None,
        Setting(
            kind=REVISION,
            label="Configurations' revision",
            help="the commit of that hub id",
            example="main",
            source="diffusers: revision",
        ),
    ] = None
    prediction_type: Annotated[
        str | None,
        Setting(
            kind=Choice(("epsilon", "v_prediction")),
            label="Prediction",
            help="what the base predicts (left out: as its file or folder says)",
            example="v_prediction",
            source="Salimans and Ho 2022 (arXiv 2202.00512); diffusers: prediction_type",
        ),
    ] = None
    zero_snr: Annotated[
        bool | None,
        Setting(
            kind=Switch(),
            label="Zero terminal SNR",
            help="whether the base begins at pure noise: its betas are rescaled and its timesteps trail (left out: as "
            "its file or folder says)",
            example=True,
            source="Lin et al. 2023 (arXiv 2305.08891); diffusers: rescale_betas_zero_snr",
        ),
    ] = None
    refiner: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="Refiner's model",
            help="the refiner's weights: nano, a folder, a .safetensors file or a hub id",
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
    refiner_sha256: Annotated[
        str | None,
        Setting(
            kind=SHA256,
            label="Refiner's checksum",
            help="the sha256 that the refiner's file must have, or the inventory of its folder",
            example="7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f",
            source="model sites name files by it",
        ),
    ] = None
    vae: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="VAE",
            help="the weights of another VAE than the model's own: a folder, a .safetensors file or a hub id",
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
    vae_sha256: Annotated[
        str | None,
        Setting(
            kind=SHA256,
            label="VAE's checksum",
            help="the sha256 that the VAE's file must have, or the inventory of its folder",
            example="63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e",
            source="model sites name files by it",
        ),
    ] = None

    @classmethod
    def named(cls, name: str) -> "ModelRef":
        """ "nano", "sdxl", a folder, a file or a hub id; a folder with `base/` and `refiner/` in it has both, and a
        file that is there comes with its checksum."""
        if name in MODELS:
            return MODELS[name]
        return cls(base=name, refiner=name if Path(name, "refiner").is_dir() else None).pinned()

    @classmethod
    def of(cls, value: object) -> Any:
        return cls.named(value) if isinstance(value, str) else super().of(value)

    def changed(self, values: Mapping[str, Any], none: str | None = NONE) -> Self:
        """As everywhere; but what names another model leaves behind the pin of the one before, and a file that is there
        comes with its checksum."""
        stale = {
            pin: None
            for role, pins in PINS.items()
            if role in values and values[role] != getattr(self, role)
            for pin in pins
        }
        return super().changed({**stale, **values}, none).pinned()

    def pinned(self) -> Self:
        """With the checksum of every file that is there and comes without one. A large file is read once."""
        found = {
            pin: sha256_of(path)
            for role, (_, pin) in PINS.items()
            if is_file(name := getattr(self, role)) and getattr(self, pin) is None
            if (path := Path(name).expanduser()).is_file()
        }
        return self.with_(**found) if found else self


# What says which weights each name stands for: the commit of a hub id, the checksum of a file.
PINS = {
    "base": ("revision", "sha256"),
    "refiner": ("refiner_revision", "refiner_sha256"),
    "vae": ("vae_revision", "vae_sha256"),
}


def is_file(name: str | None) -> bool:
    """Whether a model's name is that of a single file, there or not."""
    return name is not None and name.endswith(".safetensors")


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


# What a command line says of one: a file, a folder, nano's by its name, or `org/name@COMMIT/FILE`; then perhaps a
# weight, and one for the text encoders.
LORA = re.compile(r"(?P<head>.+?)(?::(?P<weight>[^:/]*))?(?::(?P<text>[^:/]*))?", re.S)
HUB_FILE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<file>.+)")


class LoraRef(Declared):
    """One LoRA and how much of it. Where the sha256 of its file is known, that is its identity: the digest then does
    not depend on where the file lies."""

    EXAMPLE: ClassVar[str] = "source"

    source: Annotated[
        str,
        Setting(
            kind=MODEL,
            label="LoRA",
            help="a .safetensors file, a folder, a hub id, or nano",
            example="outlines.safetensors",
            source="diffusers: load_lora_weights",
            option=None,
        ),
    ]
    revision: Annotated[
        str | None,
        Setting(
            kind=REVISION,
            label="LoRA's revision",
            help="the commit of the hub id",
            example="main",
            source="diffusers: revision",
            option=None,
        ),
    ] = None
    file: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="LoRA's file",
            help="the file's name in the folder, the hub id or nano",
            example="pytorch_lora_weights.safetensors",
            source="diffusers: weight_name",
            option=None,
        ),
    ] = None
    weight: Annotated[
        float,
        Setting(
            kind=LORA_WEIGHT,
            label="LoRA's weight",
            help="how much of it is added",
            example=0.6,
            source="diffusers: set_adapters",
            step=0.1,
            option=None,
        ),
    ] = 1.0
    text_encoder_weight: Annotated[
        float | None,
        Setting(
            kind=LORA_WEIGHT,
            label="LoRA's weight in the text encoders",
            help="how much of it is added there (left out: the weight)",
            example=0.3,
            source="diffusers: set_adapters",
            step=0.1,
            option=None,
        ),
    ] = None
    sha256: Annotated[
        str | None,
        Setting(
            kind=SHA256,
            label="LoRA's sha256",
            help="the checksum of its file, which must not be another one",
            example="0" * 64,
            option=None,
        ),
    ] = None

    @property
    def name(self) -> str:
        """What a prompt calls it: the file's name without its ending."""
        return Path(self.file or self.source).stem

    @property
    def text_weight(self) -> float:
        """Its weight in the text encoders."""
        return self.weight if self.text_encoder_weight is None else self.text_encoder_weight

    @classmethod
    def named(cls, words: str) -> "LoraRef":
        """What a command line says: `FILE`, `FILE:WEIGHT` or `FILE:WEIGHT:TEXT_ENCODER_WEIGHT`, where FILE may also be
        `nano/NAME` or `org/name@COMMIT/FILE`. Raises `ConfigError`."""
        found = LORA.fullmatch(words)
        if found is None:
            raise ConfigError("loras", words, "FILE or FILE:WEIGHT", "--lora=outlines.safetensors:0.6")
        said: dict[str, Any] = {"source": found["head"]}
        if hub := HUB_FILE.fullmatch(found["head"]):
            said = {"source": hub["id"], "revision": hub["commit"], "file": hub["file"]}
        elif found["head"].startswith("nano/"):
            said = {"source": "nano", "file": f"{Path(found['head']).stem}.safetensors"}
        for name, part in (("weight", "weight"), ("text_encoder_weight", "text")):
            if found[part] is not None:
                try:
                    said[name] = float(found[part])
                except ValueError:
                    raise cls.settings()[name].error(found[part]) from None
        return cls(**said)

    @property
    def word(self) -> str:
        """The inverse of `named`, without the sha256."""
        head = self.source if self.file is None else f"{self.source}/{self.file}"
        if self.revision is not None:
            head = f"{self.source}@{self.revision}/{self.file}"
        elif self.source == "nano":
            head = f"nano/{self.name}"
        text = "" if self.text_encoder_weight is None else f":{self.text_encoder_weight:g}"
        return f"{head}:{self.weight:g}{text}"

    @classmethod
    def of(cls, value: object) -> Any:
        return cls.named(value) if isinstance(value, str) else super().of(value)

    def distinct(self) -> dict[str, Any]:
        """With a sha256, without the places where its file was found."""
        found = super().distinct()
        return {k: v for k, v in found.items() if self.sha256 is None or k not in ("source", "revision", "file")}


class EmbeddingRef(Declared):
    """A textual-inversion embedding and the word of a prompt that stands for it. Where the sha256 of its file is known,
    the digest does not depend on where the file lies."""

    EXAMPLE: ClassVar[str] = "token"

    token: Annotated[
        str,
        Setting(
            kind=Text(pattern=r"^[^\s=,](?:[^=,]{0,98}[^\s=,])?$", meaning="1 to 100 characters without = or comma"),
            label="Embedding's word",
            help="what stands for it in a prompt",
            example="mystyle",
            source="diffusers: load_textual_inversion, token",
            option=None,
        ),
    ]
    source: Annotated[
        str,
        Setting(
            kind=MODEL,
            label="Embedding",
            help="a .safetensors file with the keys clip_l and clip_g",
            example="mystyle.safetensors",
            source="diffusers: load_textual_inversion",
            option=None,
        ),
    ]
    sha256: Annotated[
        str | None,
        Setting(
            kind=SHA256,
            label="Embedding's sha256",
            help="the checksum of its file, which must not be another one",
            example="0" * 64,
            option=None,
        ),
    ] = None

    @classmethod
    def named(cls, words: str) -> "EmbeddingRef":
        """What a command line says: `TOKEN=FILE`, or `FILE`, whose name is then the word. Raises `ConfigError`."""
        token, equals, source = words.partition("=")
        return cls(token=token, source=source) if equals else cls(token=Path(words).stem, source=words)

    @property
    def word(self) -> str:
        """The inverse of `named`, without the sha256."""
        return f"{self.token}={self.source}"

    @classmethod
    def of(cls, value: object) -> Any:
        return cls.named(value) if isinstance(value, str) else super().of(value)

    def distinct(self) -> dict[str, Any]:
        """With a sha256, without the place where its file was found."""
        found = super().distinct()
        return {k: v for k, v in found.items() if self.sha256 is None or k != "source"}


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


class HiresConfig(Declared):
    """Two passes: the image is drawn at the configuration's width and height, enlarged, and gone over again at the
    size that this makes. The second pass is image to image by the same models."""

    EXAMPLE: ClassVar[str] = "scale"

    scale: Annotated[
        float,
        Setting(
            kind=Number(1, 8),
            label="Hires scale",
            help="how much longer each side of the image becomes, down to a multiple of 8 pixels",
            example=2.0,
            source="A1111: hires fix, upscale by",
            step=0.25,
            option="hires-scale",
        ),
    ] = 2.0
    strength: Annotated[
        float,
        Setting(
            kind=Number(0.01, 1),
            label="Hires strength",
            help="how much of the noise schedule the second pass goes through",
            example=0.6,
            source="diffusers: strength; A1111: denoising strength",
            step=0.05,
            option="hires-strength",
        ),
    ] = 0.6
    steps: Annotated[
        int | None,
        Setting(
            kind=STEPS,
            label="Hires steps",
            help="steps of the whole schedule of which the second pass makes the strength's part (left out: as many as "
            "the first pass has)",
            example=20,
            source="diffusers: num_inference_steps",
            option="hires-steps",
        ),
    ] = None
    upscaler: Annotated[
        str,
        Setting(
            kind=Choice(("latent", "lanczos")),
            label="Hires upscaler",
            help="latent: the latents are enlarged, bilinear; lanczos: the decoded image is, and encoded again",
            example="latent",
            source="A1111: upscaler",
            option="hires-upscaler",
        ),
    ] = "latent"


class ProjectedGuidance(Declared):
    """Adaptive projected guidance: high guidance scales without their saturation. The difference of the two predictions
    is averaged over the steps, bounded, and parted into what is parallel to the guided prediction and the rest."""

    EXAMPLE: ClassVar[str] = "momentum"

    eta: Annotated[
        float,
        Setting(
            kind=Number(0, 1),
            label="Parallel part",
            help="how much of the parallel part is kept (1: all, as plain guidance does)",
            example=0.0,
            source=f"{SADAT}; diffusers: eta",
            step=0.1,
            option="apg-eta",
        ),
    ] = 0.0
    threshold: Annotated[
        float,
        Setting(
            kind=Number(0, 10_000),
            label="Threshold",
            help="the largest norm of the difference (0: any)",
            example=15.0,
            source=f"{SADAT}; diffusers: adaptive_projected_guidance_rescale",
            step=1,
            option="apg-threshold",
        ),
    ] = 15.0
    momentum: Annotated[
        float,
        Setting(
            kind=Number(-1, 1, between=True),
            label="Momentum",
            help="the share of the earlier differences in each step's (below 0: they are taken off)",
            example=-0.5,
            source=f"{SADAT}; diffusers: adaptive_projected_guidance_momentum",
            step=0.1,
            option="apg-momentum",
        ),
    ] = -0.5


class ZeroStar(Declared):
    """CFG-Zero*: the unguided prediction is scaled so that it lies nearest to the guided one before the two are parted.
    Its authors also leave out the first steps of flow-matching models."""

    EXAMPLE: ClassVar[str] = "zero_steps"

    zero_steps: Annotated[
        int,
        Setting(
            kind=Whole(0, MAX_STEPS),
            label="Zero steps",
            help="the first UNet calls whose prediction counts as zero",
            example=0,
            source=f"{FAN}, section 4.2; diffusers: zero_init_steps",
            step=1,
        ),
    ] = 0


class PerturbedAttention(Declared):
    """Perturbed-attention guidance: away from what the UNet predicts where some of its layers attend to nothing but
    themselves. It adds to the guidance by text, or stands alone where that is off."""

    EXAMPLE: ClassVar[str] = "scale"

    scale: Annotated[
        float,
        Setting(
            kind=Number(0, 100),
            label="Perturbed scale",
            help="how far each step goes away from the perturbed row (0: not at all)",
            example=3.0,
            source=f"{AHN}; diffusers: pag_scale",
            step=0.5,
            option="pag-scale",
        ),
    ] = 3.0
    adaptive: Annotated[
        float,
        Setting(
            kind=Number(0, 1),
            label="Decline",
            help="what the scale loses for each timestep below 1000",
            example=0.0,
            source="diffusers: pag_adaptive_scale",
            step=0.001,
            option="pag-adaptive",
        ),
    ] = 0.0
    layers: Annotated[
        str,
        Setting(
            kind=Choice(("mid", "down", "up")),
            label="Perturbed layers",
            help="the blocks of the UNet whose self-attention is perturbed",
            example="mid",
            source="diffusers: pag_applied_layers",
            option="pag-layers",
        ),
    ] = "mid"


class FreeU(Declared):
    """FreeU: the first two blocks of the UNet's way up listen more to what came from below, and less to the lowest
    frequencies of the skip connections. It costs no rows."""

    EXAMPLE: ClassVar[str] = "b1"

    b1: Annotated[
        float,
        Setting(
            kind=Number(0, 10, between=True),
            label="First backbone",
            help="the scale of half of the first block's backbone",
            example=1.1,
            source=f"{SI}; diffusers: enable_freeu",
            step=0.1,
            option="freeu-b1",
        ),
    ] = 1.1
    b2: Annotated[
        float,
        Setting(
            kind=Number(0, 10, between=True),
            label="Second backbone",
            help="the scale of half of the second block's backbone",
            example=1.2,
            source=f"{SI}; diffusers: enable_freeu",
            step=0.1,
            option="freeu-b2",
        ),
    ] = 1.2
    s1: Annotated[
        float,
        Setting(
            kind=Number(0, 10, between=True),
            label="First skips",
            help="the scale of the lowest frequencies of the first block's skip connections",
            example=0.6,
            source=f"{SI}; diffusers: enable_freeu",
            step=0.1,
            option="freeu-s1",
        ),
    ] = 0.6
    s2: Annotated[
        float,
        Setting(
            kind=Number(0, 10, between=True),
            label="Second skips",
            help="the scale of the lowest frequencies of the second block's skip connections",
            example=0.4,
            source=f"{SI}; diffusers: enable_freeu",
            step=0.1,
            option="freeu-s2",
        ),
    ] = 0.4


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
    loras: Annotated[
        tuple[LoraRef, ...],
        Setting(
            kind=Tables(LoraRef, form="FILE:WEIGHT"),
            label="LoRAs",
            help="adapters that are added to the base's UNet and text encoders, in their order",
            example=[{"source": "outlines.safetensors", "weight": 0.6}],
            source=HU,
            option="lora",
            client=True,
        ),
    ] = ()
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
    sigma_schedule: Annotated[
        str,
        Setting(
            kind=Choice(SIGMA_SCHEDULES),
            label="Sigma schedule",
            help="which noise levels the steps visit (own: as the scheduler's name says, else those of its timesteps)",
            example="own",
            source="karras: Karras et al. 2022 (arXiv 2206.00364); beta: Lee et al. 2024 (arXiv 2407.12173); "
            "align_your_steps: Sabour et al. 2024 (arXiv 2404.14507); sgm_uniform: ComfyUI, A1111",
        ),
    ] = OWN
    timestep_spacing: Annotated[
        str,
        Setting(
            kind=Choice(SPACINGS),
            label="Timestep spacing",
            help="where the timesteps lie between first and last (own: as the model's scheduler has it)",
            example="own",
            source="Lin et al. 2023 (arXiv 2305.08891), table 2; diffusers: timestep_spacing",
        ),
    ] = OWN
    sigmas: Annotated[
        tuple[float, ...] | None,
        Setting(
            kind=Falling(Number(0, 10_000, between=True), MAX_STEPS, to_zero=True),
            label="Sigmas",
            help="noise levels of one's own, one for each step (left out: those of the sigma schedule)",
            example=(14.6, 3.8, 0.9),
            unit="sigma",
            source="diffusers: sigmas",
        ),
    ] = None
    timesteps: Annotated[
        tuple[int, ...] | None,
        Setting(
            kind=Falling(Whole(0, TRAINED - 1), MAX_STEPS),
            label="Timesteps",
            help="timesteps of one's own, one for each step, as distilled models are given with (left out: spaced)",
            example=(999, 749, 499, 249),
            source="diffusers: timesteps",
        ),
    ] = None
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
    apg: Annotated[
        ProjectedGuidance | None,
        Setting(
            kind=Table(ProjectedGuidance),
            label="Projected guidance",
            help="whether guidance is projected (APG) instead of plain",
            example={"momentum": -0.5},
            source=SADAT,
        ),
    ] = None
    cfg_zero: Annotated[
        ZeroStar | None,
        Setting(
            kind=Table(ZeroStar),
            label="CFG-Zero*",
            help="whether guidance scales the unguided prediction to fit (CFG-Zero*) instead of plain",
            example={"zero_steps": 0},
            source=FAN,
        ),
    ] = None
    pag: Annotated[
        PerturbedAttention | None,
        Setting(
            kind=Table(PerturbedAttention),
            label="Perturbed attention",
            help="whether a third row without self-attention guides, too (PAG)",
            example={"scale": 3.0},
            source=AHN,
        ),
    ] = None
    freeu: Annotated[
        FreeU | None,
        Setting(
            kind=Table(FreeU),
            label="FreeU",
            help="whether the UNet's skip connections are damped (FreeU)",
            example={"b1": 1.1, "b2": 1.2, "s1": 0.6, "s2": 0.4},
            source=SI,
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
    negative_prompt_2: Annotated[
        str | None,
        Setting(
            kind=Text(1, MAX_PROMPT),
            label="Negative prompt 2",
            help="what the base's second text encoder reads (left out: the negative prompt)",
            example="blurry",
            source="diffusers: negative_prompt_2",
            client=True,
        ),
    ] = None
    prompt_syntax: Annotated[
        str,
        Setting(
            kind=Choice(("plain", "a1111")),
            label="Prompt syntax",
            help="plain: a text of at most 75 tokens; a1111: any length, with weights, schedules and adapters",
            example="a1111",
            source="A1111's web UI: `modules/prompt_parser.py`, `sd_hijack_clip.py`, `sd_emphasis.py`",
        ),
    ] = "plain"
    embeddings: Annotated[
        tuple[EmbeddingRef, ...],
        Setting(
            kind=Tables(EmbeddingRef, most=64, form="TOKEN=FILE"),
            label="Embeddings",
            help="textual inversions: words of the prompts that stand for vectors of their own",
            example=[{"token": "mystyle", "source": "mystyle.safetensors"}],
            source="Gal et al. 2022 (arXiv 2208.01618)",
            option="embedding",
        ),
    ] = ()
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
    hires: Annotated[
        HiresConfig | None,
        Setting(
            kind=Table(HiresConfig),
            label="Hires",
            help="whether the image is drawn small, enlarged and gone over again",
            example={"scale": 2.0},
            source="A1111: hires fix",
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
        check_schedule(self)
        if self.model.zero_snr:
            check_zero_snr(self.scheduler, self.model.prediction_type)
        if self.apg is not None and self.cfg_zero is not None:
            rule = "left out where apg is not, since either takes the place of plain guidance"
            raise ConfigError("cfg_zero", self.cfg_zero.to_dict(), rule, "apg.momentum = -0.5")
        tokens = [ref.token.casefold() for ref in self.embeddings]
        for place, token in enumerate(tokens):
            if token in tokens[:place]:
                name = f"embeddings.{place}.token"
                raise ConfigError(name, self.embeddings[place].token, "a word of its own", f'token = "{token}-2"')
        if self.refiner is not None and self.model.refiner is None:
            raise ConfigError(
                "refiner",
                self.refiner.to_dict(),
                f"left out, since the model {self.model.base!r} has no refiner",
                "model = nano",
            )
        if self.hires is not None:
            self._check_hires(self.hires)
        width, height = self.drawn_size
        if self.watermark and width * height < 256 * 256:
            raise ConfigError(
                "watermark",
                f"true at {width}x{height}",
                "false below 256x256 pixels of area, where invisible-watermark cannot write its bits",
                "width = 256, height = 256",
            )
        return self

    def _check_hires(self, hires: HiresConfig) -> None:
        if max(self.drawn_size) > SIDE.high:
            rule = f"one that makes no side longer than {SIDE.high} pixels"
            raise ConfigError("hires.scale", hires.scale, rule, SIDE.high / max(self.width, self.height))
        given = next((name for name in ("sigmas", "timesteps") if getattr(self, name) is not None), None)
        if given and hires.steps not in (None, self.steps):
            rule = f"left out, or {self.steps}, where {given} are given for {self.steps} steps"
            raise ConfigError("hires.steps", hires.steps, rule, self.steps)
        steps = hires.steps or self.steps
        if int(steps * hires.strength) < 1:
            rule = f"at least 1/steps, here {1 / steps:.3g}, or no step is left"
            raise ConfigError("hires.strength", hires.strength, rule, 0.6)
        try:
            self.second_pass()
        except ConfigError as error:  # so many steps may break a rule of the scheduler
            if error.field != "steps":
                raise
            raise ConfigError("hires.steps", error.received, error.rule, error.example) from None

    @property
    def drawn_size(self) -> tuple[int, int]:
        """Width and height of the image in pixels: the second pass's where there is one."""
        if self.hires is None:
            return self.width, self.height
        width, height = (int(side * self.hires.scale) // 8 * 8 for side in (self.width, self.height))
        return width, height

    def second_pass(self) -> "GenerationConfig":
        """The configuration as the second pass has it. Raises `ConfigError`."""
        steps = self.hires.steps if self.hires and self.hires.steps else self.steps
        width, height = self.drawn_size
        return self.with_(width=width, height=height, steps=steps, hires=None)

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


class OfferedLora(Declared):
    """A LoRA that clients may ask for by its name, within a range of weights."""

    EXAMPLE: ClassVar[str] = "name"

    name: Annotated[
        str,
        Setting(
            kind=Text(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", meaning="1 to 64 letters, digits, dots, dashes"),
            label="Name",
            help="what clients call it",
            example="outlines",
        ),
    ]
    source: Annotated[
        str,
        Setting(
            kind=MODEL,
            label="LoRA",
            help="a .safetensors file, which may lie in the slot's `loras/`, a folder, a hub id, or nano",
            example="loras/outlines.safetensors",
        ),
    ]
    revision: Annotated[
        str | None, Setting(kind=REVISION, label="Revision", help="the commit of the hub id", example="main")
    ] = None
    file: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="File",
            help="the file's name in the folder, the hub id or nano",
            example="outlines.safetensors",
        ),
    ] = None
    weight: Annotated[
        tuple[float, float],
        Setting(
            kind=Pair(LORA_WEIGHT, increasing=True),
            label="Weight",
            help="lowest and highest weight",
            example=(0, 1),
        ),
    ] = (0.0, 1.0)
    sha256: Annotated[
        str | None, Setting(kind=SHA256, label="sha256", help="the checksum of its file", example="0" * 64)
    ] = None

    def at(self, weight: float | None) -> LoraRef:
        """This one with the weight asked for, or its highest. Raises `ConfigError`."""
        low, high = self.weight
        rule = Setting(kind=Number(low, high), label="Weight", help="how much of it", example=high, name="weight")
        chosen = high if weight is None else rule.check(weight)
        return LoraRef(source=self.source, revision=self.revision, file=self.file, weight=chosen, sha256=self.sha256)


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

    loras: Annotated[
        tuple[OfferedLora, ...],
        Setting(
            kind=Tables(OfferedLora, most=1000),
            label="LoRAs",
            help="those that a client may ask for by name",
            example=[{"name": "outlines", "source": "loras/outlines.safetensors", "weight": [0, 1]}],
        ),
    ] = ()

    @model_validator(mode="after")
    def _named_once(self) -> "ServingLimits":
        names = [each.name for each in self.loras]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ConfigError(f"loras.{place}.name", name, "a name of its own", f'name = "{name}-2"')
        return self

    @classmethod
    def for_model(cls, model: ModelRef) -> "ServingLimits":
        """Sound limits for a model: nano's, or those of the real SDXL."""
        return cls() if "nano" in (model.base, model.config) else cls(side=(512, 1536))

    def narrowed(self, setting: Setting) -> Setting:
        """A setting of the configuration with these limits in its rule."""
        if setting.limited_by is None:
            return setting
        low, high = getattr(self, setting.limited_by)
        return replace(setting, kind=replace(setting.kind, low=low, high=high))  # type: ignore[call-arg]

    def with_asked(self, asked: Iterable[Mapping[str, Any]], promoted: GenerationConfig) -> tuple[LoraRef, ...]:
        """The promoted LoRAs, then those that a client asks for, each `{"name": ..., "weight": ...}`. One that
        is promoted already gets the weight asked for. Raises `ConfigError`."""
        offered = {each.name: each for each in self.loras}
        found = list(promoted.loras)
        named: set[str] = set()
        for place, one in enumerate(asked):
            name = str(one["name"])
            example = next(iter(offered), "outlines")
            if name not in offered:
                rule = f"one that is offered here: {', '.join(offered) or 'there is none'}"
                raise ConfigError(f"loras.{place}.name", name, rule, example, near=nearest(name, offered))
            if name in named:
                raise ConfigError(f"loras.{place}.name", name, "named once", example)
            named.add(name)
            try:
                ref = offered[name].at(one.get("weight"))
            except ConfigError as error:
                raise error.within(str(place)).within("loras") from None
            places = [at for at, each in enumerate(found) if _file_of(each) == _file_of(ref)]
            for at in places:
                found[at] = ref
            found += [] if places else [ref]
        return GenerationConfig.checked("loras", found)

    def check(self, asked: Mapping[str, Any], promoted: GenerationConfig) -> None:
        """`ConfigError` for the first of the settings that is outside the limits, with the promoted value as the
        example."""
        for name, setting in GenerationConfig.settings().items():
            if setting.limited_by is not None and name in asked:
                replace(self.narrowed(setting), example=promoted.value(name)).check(asked[name])


def _file_of(ref: LoraRef) -> object:
    """What two references to one file have in common."""
    return ref.sha256 or (ref.source, ref.revision, ref.file)


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
    lora_mib: Annotated[
        int,
        Setting(
            kind=Whole(1, 1_000_000),
            label="Memory for LoRAs",
            help="what LoRAs that no image under way has may keep; those used longest ago go first",
            example=1024,
            unit="MiB",
        ),
    ] = 1024
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
    storage: Annotated[
        str,
        Setting(
            kind=Choice(("own", "float8")),
            label="Storage",
            help="what the UNets' weights are kept in (own: the data type; float8: a quarter of float32's memory, half "
            "of float16's, cast layer by layer as they are used, without LoRAs)",
            example="float8",
        ),
    ] = "own"
    tile_above: Annotated[
        int,
        Setting(
            kind=Whole(64, 65_536),
            label="Tiles above",
            help="the side of an image above which the VAE has it in overlapping tiles, which takes less memory and "
            "moves pixels a little",
            example=1536,
            unit="pixels",
        ),
    ] = 2048
    preview_decoder: Annotated[
        str | None,
        Setting(
            kind=MODEL,
            label="Preview decoder",
            help="a small decoder for previews, an AutoencoderTiny: a folder, or a hub id at a commit, org/name@COMMIT "
            "(left out: a linear map of the latents)",
            example="taesdxl",
        ),
    ] = None

    @model_validator(mode="after")
    def _whole(self) -> "RuntimeProfile":
        for name in ("compile", "graphs"):
            if self.storage == "float8" and getattr(self, name):
                rule = f"own with {name}, since float8's weights are cast while a call runs"
                raise ConfigError("storage", self.storage, rule, "own")
        return self


def checked_prompt(prompt: object, setting: Setting = PROMPT) -> str | None:
    """The prompt, if it is one: 1 to 2,000 characters; None for one that may be left out."""
    try:
        found: str | None = setting.check(prompt)
        return found
    except ConfigError as error:
        if isinstance(prompt, str) and not 1 <= len(prompt) <= MAX_PROMPT:
            raise setting.error(f"{len(prompt)} characters") from error
        raise


def checked_seed(seed: object) -> int:
    """The seed, if it is one: 0 to 2^63-1."""
    return int(SEED.check(seed))
