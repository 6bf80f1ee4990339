"""Weights to `Models`: the parts of an SDXL that the engine drives, loaded with diffusers' own pipelines.

With `schedulers.py` and `denoising.py` the only module that calls diffusers. What a model is, to the byte, is
`inventory.py`'s.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image

from sdxl_lab.config import ConfigError, ModelRef, RuntimeProfile
from sdxl_lab.diffusion import processor
from sdxl_lab.diffusion.checksums import hub_difference
from sdxl_lab.diffusion.graphs import Graphed
from sdxl_lab.diffusion.inventory import SHARED, ModelError, check_folder, folder_of
from sdxl_lab.diffusion.lean import lighten
from sdxl_lab.environment import keep_allocations
from sdxl_lab.files import cache_folder

log = logging.getLogger(__name__)

# transformers builds models under a global default device: two loads at once would disturb each other.
_LOADING = threading.Lock()


class Prompt(NamedTuple):
    """All that decides an embedding. `text` is None where there is no negative prompt; `clip_skip` is how many layers
    before the penultimate one are skipped, None for none."""

    text: str | None
    clip_skip: int | None = None


class Embedding(NamedTuple):
    """A prompt as the UNet takes it: `hidden` (1, 77, width) and `pooled` (1, projection)."""

    hidden: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Denoiser:
    """One UNet, perhaps behind CUDA graphs, with the text encoders it listens to, and its pristine scheduler config.

    `zero_negative`: without a negative prompt the unguided row gets zeros (SDXL base) instead of the empty prompt's
    embedding (SDXL refiner). `aesthetic`: the last conditioning number is an aesthetic score, not the target size.
    """

    unet: UNet2DConditionModel | Graphed
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    scheduler_config: Mapping[str, Any]
    zero_negative: bool
    aesthetic: bool

    def embed(self, prompt: Prompt) -> Embedding:
        """A prompt as `StableDiffusionXLPipeline.encode_prompt` has it: without text, zeros or the empty prompt's."""
        encoded = self._encoded(prompt if prompt.text is not None else prompt._replace(text=""))
        if prompt.text is None and self.zero_negative:
            return Embedding(torch.zeros_like(encoded.hidden), torch.zeros_like(encoded.pooled))
        return encoded

    @torch.no_grad()
    def _encoded(self, prompt: Prompt) -> Embedding:
        """The penultimate hidden states of all encoders side by side, or those `clip_skip` layers before them, and the
        last one's pooled projection, which skips nothing. Text beyond 77 tokens is cut. Raises `ConfigError` where an
        encoder has too few layers."""
        skipped = prompt.clip_skip or 0
        hidden = []
        pooled = None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                prompt.text,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            most = len(output.hidden_states) - 2  # which begin with the embedded tokens, before the first layer
            if skipped > most:
                rule = f"at most {most}, since a text encoder of the model has {most + 1} layers"
                raise ConfigError("clip_skip", skipped, rule, most)
            hidden.append(output.hidden_states[-(skipped + 2)])
            if output[0].ndim == 2:
                pooled = output[0]
        assert pooled is not None, "the last text encoder of an SDXL has a projection"
        return Embedding(torch.cat(hidden, -1), pooled)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """The noise level of every training timestep, sqrt((1 - alpha_bar) / alpha_bar)."""
        alphas = DDPMScheduler.from_config(dict(self.scheduler_config)).alphas_cumprod.double().numpy()
        return np.asarray(np.sqrt((1 - alphas) / alphas))


@dataclass(frozen=True)
class Models:
    """An SDXL on a device; `dtype` is the UNets'. `refiner` is None where the configuration has none. `latent_rgb`
    (5, 3) is the linear map from latents to pixels that previews use. `ref` is what was asked for."""

    base: Denoiser
    refiner: Denoiser | None
    vae: AutoencoderKL
    device: torch.device
    dtype: torch.dtype
    latent_rgb: np.ndarray
    ref: ModelRef

    @property
    def scale_factor(self) -> int:
        """Pixels a latent is wide."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (n, 4, h, w) to pixels (n, 8h, 8w, 3), float32 in [0, 1]. Where a VAE of half precision overflows,
        as SDXL's own does in float16, those images alone are decoded again in float32. On a CPU one image at a time is
        decoded, whose activations stay in the cache and in the process."""
        portions = latents.split(1 if self.device.type == "cpu" else len(latents))
        images, dtype = torch.cat([self._decoded(each) for each in portions]), self.vae.dtype
        broken, pixels = ~torch.isfinite(images).flatten(1).all(1), _pixels(images)
        if dtype != torch.float32 and broken.any():
            log.warning("the VAE overflowed in %s: decoding again in float32", dtype)
            try:
                self.vae.to(torch.float32)
                pixels[broken.cpu().numpy()] = _pixels(self._decoded(latents[broken]))
            finally:
                self.vae.to(dtype)
        return pixels

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        mean, deviation = self._statistics()
        latents = latents.to(self.vae.dtype) * deviation / self.vae.config.scaling_factor + mean
        images: torch.Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images

    @torch.no_grad()
    def encode(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """An image to one latent (1, 4, h, w) in float32, sampled from the posterior as img2img does."""
        mean, deviation = self._statistics()
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]
        pixels = (2 * pixels - 1).to(self.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample(generator)
        scaled: torch.Tensor = ((latents - mean) * self.vae.config.scaling_factor / deviation).float()
        return scaled

    def _statistics(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """The VAE's per-channel mean and deviation where its config has them, as fine-tuned SDXL VAEs may."""
        mean, deviation = (getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return 0.0, 1.0
        shaped = [
            torch.tensor(v, device=self.device, dtype=self.vae.dtype).view(1, -1, 1, 1) for v in (mean, deviation)
        ]
        return shaped[0], shaped[1]


def _pixels(images: torch.Tensor) -> np.ndarray:
    return np.asarray((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy())


def load(ref: ModelRef, profile: RuntimeProfile | None = None) -> Models:
    """Load a base, its refiner if named, and another VAE if named. Raises `ModelError`."""
    profile = settled(profile or RuntimeProfile())
    device, dtype = placement(profile)
    if device.type == "cpu" and not processor.multiplies(dtype):
        name = str(dtype).removeprefix("torch.")
        log.warning(
            "the dtype %s is slow on this processor: it has %s, torch's kernels for it take %s, and without them a "
            "convolution takes more than ten times as long as in float32. Example: float32",
            name,
            processor.capability(),
            processor.NEEDED[name],
        )
    with loading():
        base, refiner = _load_parts(ref, _dtypes(device, dtype))
    parts = [
        _steadied(base.vae),
        base.unet,
        base.text_encoder,
        base.text_encoder_2,
        *([refiner.unet] if refiner else []),
    ]
    for part in parts:
        part.to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        lighten(base.vae)
        if profile.channels_last:
            base.vae.to(memory_format=torch.channels_last)
    second = _denoiser(refiner, profile) if refiner else None
    if device.type == "cpu":
        keep_allocations()  # from here on: what loading took for a moment goes back to the system
    return Models(_denoiser(base, profile), second, base.vae, device, dtype, _latent_rgb(ref), ref)


def _steadied(vae: AutoencoderKL) -> AutoencoderKL:
    """In float32 where its config says that its activations overflow float16."""
    return vae.float() if vae.dtype == torch.float16 and vae.config.force_upcast else vae


Dtypes = dict[str, torch.dtype]


def _dtypes(device: torch.device, dtype: torch.dtype) -> Dtypes:
    """Each part's dtype, as diffusers takes it. On a CPU the text encoders and the VAE, a small share of the work,
    stay in float32: a bfloat16 VAE cannot even write 8-bit colours."""
    return {"default": torch.float32 if device.type == "cpu" else dtype, "unet": dtype}


def laid_out(unet: UNet2DConditionModel, profile: RuntimeProfile) -> Any:
    """A UNet on its device as the profile wants it called. It is changed in place, and wrapped for CUDA graphs."""
    if profile.channels_last:
        unet.to(memory_format=torch.channels_last)
    if profile.fuse_qkv:
        unet.fuse_qkv_projections()
    if profile.device == "cpu" and not profile.compile:
        lighten(unet)
    if profile.compile:
        # Inductor's own default is a folder in /tmp: compiled code should outlive a restart.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        torch._dynamo.config.recompile_limit = 64  # row counts x sizes; beyond the limit torch runs uncompiled
        unet.compile(dynamic=False)
    return Graphed(unet) if profile.graphs else unet


# ComfyUI's published fit for SDXL's latents, scaled as the UNet sees them: four channels and a constant, to RGB in
# [-1, 1].
SDXL_LATENT_RGB = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
    (0.1084, -0.0175, -0.0011),
)


def _latent_rgb(ref: ModelRef) -> np.ndarray:
    """A VAE's own fit where its folder has one, as nano's does, else SDXL's."""
    folder = folder_of(ref.vae or ref.base, "base" if ref.vae is None else "base/vae")
    path = None if folder is None else (folder / "vae" if ref.vae is None else folder) / "latent_rgb.json"
    return np.array(json.loads(path.read_text()) if path and path.is_file() else SDXL_LATENT_RGB, dtype=np.float32)


def _load_parts(ref: ModelRef, dtype: Dtypes) -> tuple[Any, Any]:
    """The base's pipeline, and the refiner's or None, which shares its second text encoder and its VAE."""
    other = {} if ref.vae is None else {"vae": _vae(ref.vae, ref.vae_revision, dtype["default"])}
    base = _pipeline(StableDiffusionXLPipeline, ref.base, "base", ref.revision, dtype, **other)
    if ref.refiner is None:
        return base, None
    shared = {name: getattr(base, name) for name in SHARED}
    cls = StableDiffusionXLImg2ImgPipeline
    return base, _pipeline(cls, ref.refiner, "refiner", ref.refiner_revision, dtype, **shared)


@contextmanager
def loading() -> Iterator[None]:
    """Around whatever loads weights: one load at a time, and no progress bars for reading them from disk; those of a
    download come from the hub client and stay."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    with _LOADING:
        shown = [library.is_progress_bar_enabled() for library in libraries]
        for library in libraries:
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, was in zip(libraries, shown, strict=True):
                if was:
                    library.enable_progress_bar()


def placement(profile: RuntimeProfile) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that "auto" stands for on this machine."""
    name = profile.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"device must be one this machine has; received {name!r}, but torch sees no CUDA. Example: cpu"
        )
    dtype = profile.dtype
    if dtype == "auto":
        dtype = "float32" if name == "cpu" else "float16"
    return torch.device(name), getattr(torch, dtype)


def settled(profile: RuntimeProfile) -> RuntimeProfile:
    """A profile with what "auto" stands for on this machine."""
    device, dtype = placement(profile)
    return profile.with_(device=str(device), dtype=str(dtype).removeprefix("torch."))


def _denoiser(pipe: Any, profile: RuntimeProfile) -> Denoiser:
    first = getattr(pipe, "text_encoder", None) is not None
    return Denoiser(
        unet=laid_out(pipe.unet, profile),
        tokenizers=(pipe.tokenizer, pipe.tokenizer_2) if first else (pipe.tokenizer_2,),
        text_encoders=(pipe.text_encoder, pipe.text_encoder_2) if first else (pipe.text_encoder_2,),
        scheduler_config=dict(pipe.scheduler.config),
        zero_negative=bool(pipe.config.force_zeros_for_empty_prompt),
        aesthetic=bool(getattr(pipe.config, "requires_aesthetics_score", False)),
    )


def _pipeline(cls: Any, name: str, role: str, revision: str | None, dtype: Dtypes, **shared: Any) -> Any:
    folder = folder_of(name, role)
    options: dict[str, Any] = {"dtype": dtype, "add_watermarker": False, "use_safetensors": True, **shared}
    if folder is not None:
        check_folder(folder, role)
        options |= _local(folder / "unet")
    else:
        _check_pinned(role, name, revision)
        options |= {"revision": revision, "variant": "fp16"}
    try:
        loaded = cls.from_pretrained(str(folder or name), **options)
    except Exception as error:  # diffusers, safetensors, json and the hub client each raise kinds of their own
        raise ModelError(
            f"the {role} model must be a complete SDXL checkpoint, to load as {cls.__name__}; received {name!r}"
            f"{f' at revision {revision}' if revision else ''}: {_reason(error)}. Example: nano"
        ) from error
    if folder is None:
        _check_downloaded(role, name, str(revision))
    return loaded


def _check_pinned(role: str, name: str, revision: str | None) -> None:
    """A branch moves: what it held when the configuration was tuned, nobody could say."""
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ModelError(
            f"the {role} model of the hub must name the commit of its revision, 40 hex digits; received {name!r} at "
            f"revision {revision!r}. Example: 462165984030d82259a11f4367a4eed129e94a7b"
        )


def _check_downloaded(role: str, name: str, revision: str) -> None:
    """Every cached file of the revision against the checksum that the hub gave with it. Raises `ModelError`."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots" / revision
    differs = hub_difference(folder)
    if differs is not None:
        raise ModelError(
            f"the {role} model's files must be those of its revision, as the hub named them; received {name!r} at "
            f"revision {revision}, whose {differs.path.relative_to(folder)} has the checksum {differs.found} and "
            f"should have {differs.expected or 'a blob that it links to'}. Remove {folder.parents[1]} to load it "
            "again. Example: an untouched download"
        )


def _local(folder: Path) -> dict[str, Any]:
    """How a part's folder loads: as its fp16 variant where it has one, and never from the network."""
    return {"variant": "fp16" if any(folder.glob("*.fp16.safetensors")) else None, "local_files_only": True}


def _reason(error: Exception) -> str:
    """A library's error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(" .:")


def _vae(name: str, revision: str | None, dtype: torch.dtype) -> AutoencoderKL:
    folder = folder_of(name, "base/vae")
    if folder is None:
        _check_pinned("vae", name, revision)
    options = {"revision": revision} if folder is None else _local(folder)
    try:
        loaded: AutoencoderKL = AutoencoderKL.from_pretrained(
            str(folder or name), dtype=dtype, use_safetensors=True, **options
        )
    except Exception as error:  # as in _pipeline
        raise ModelError(
            f"the vae must be an AutoencoderKL checkpoint; received {name!r}: {_reason(error)}. "
            "Example: madebyollin/sdxl-vae-fp16-fix"
        ) from error
    if folder is None:
        _check_downloaded("vae", name, str(revision))
    return loaded
