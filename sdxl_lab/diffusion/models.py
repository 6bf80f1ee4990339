"""Weights to `Models`: the parts of an SDXL that the engine drives, loaded with diffusers' own pipelines.

With `single_file.py`, `schedulers.py` and `denoising.py` the only module that calls diffusers. What a model is, to the
byte, is `inventory.py`'s, and which kinds are drawn `support.py`'s.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub import snapshot_download
from PIL import Image

from sdxl_lab.config import ModelRef, RuntimeProfile, is_file
from sdxl_lab.diffusion import checkpoint, hub, processor, single_file
from sdxl_lab.diffusion.attention import watch_rows
from sdxl_lab.diffusion.freeu import watch_scales
from sdxl_lab.diffusion.graphs import Graphed
from sdxl_lab.diffusion.inventory import (
    SDXL,
    SHARED,
    ModelError,
    check_folder,
    check_no_pickle,
    check_pins,
    check_safe,
    file_of,
    folder_of,
    parts_of,
    variant_of,
)
from sdxl_lab.diffusion.inversions import PARTS, vectors_of
from sdxl_lab.diffusion.lean import lighten
from sdxl_lab.diffusion.prompts import Chunk, Embedding, Prompt, chunks_of, encode
from sdxl_lab.diffusion.support import check_folder_is_drawn, check_is_drawn
from sdxl_lab.diffusion.vae_memory import VaeMemory
from sdxl_lab.environment import keep_allocations
from sdxl_lab.files import cache_folder

log = logging.getLogger(__name__)

# transformers builds models under a global default device: two loads at once would disturb each other.
_LOADING = threading.Lock()


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

    @property
    def inpaints(self) -> bool:
        """Whether the UNet sees a mask and the masked image beside the latents, in nine channels."""
        return bool(self.unet.config.in_channels == checkpoint.INPAINTING)

    @torch.no_grad()
    def embed(self, prompt: Prompt) -> Embedding:
        """A prompt as `StableDiffusionXLPipeline.encode_prompt` has it: the penultimate hidden states of all encoders
        side by side, or those `clip_skip` layers before them, and the last one's pooled projection. Without text, zeros
        or the empty prompt's. Raises `ConfigError` for a weight that is too large, and where an encoder has too few
        layers; `ModelError` for an embedding that is not there or of another model."""
        chunked = self._chunked(prompt)
        count = max(prompt.chunks, *map(len, chunked))
        hidden, pooled = [], None
        for encoder, tokenizer, chunks in zip(self.text_encoders, self.tokenizers, chunked, strict=True):
            filled = [*chunks, *([[]] * (count - len(chunks)))]
            states, pooled = encode(encoder, tokenizer, filled, prompt.clip_skip or 0)
            hidden.append(states)
        assert pooled is not None, "the last text encoder of an SDXL has a projection"
        encoded = Embedding(torch.cat(hidden, -1), pooled)
        if prompt.text is None and self.zero_negative:
            return Embedding(torch.zeros_like(encoded.hidden), torch.zeros_like(encoded.pooled))
        return encoded

    def chunks(self, prompt: Prompt) -> int:
        """How many chunks of 77 tokens `embed` makes of it. Raises `ConfigError` as `embed` does."""
        return max(prompt.chunks, *map(len, self._chunked(prompt)))

    def _chunked(self, prompt: Prompt) -> list[list[Chunk]]:
        """What each encoder reads."""
        count = len(self.text_encoders)
        readers = zip(self.tokenizers, self.text_encoders, prompt.read_by(count), PARTS[-count:], strict=True)
        return [
            chunks_of(tokenizer, text, prompt.syntax, vectors_of(prompt.embeddings, part, encoder.config.hidden_size))
            for tokenizer, encoder, text, part in readers
        ]


@dataclass(frozen=True)
class Models:
    """An SDXL on a device; `dtype` is the UNets'. `refiner` is None where the configuration has none. `latent_rgb`
    (5, 3) is the linear map from latents to pixels that previews use, where there is no `tiny` decoder for them. `ref`
    is what was asked for. `memory` is what the VAE may take."""

    base: Denoiser
    refiner: Denoiser | None
    vae: AutoencoderKL
    device: torch.device
    dtype: torch.dtype
    latent_rgb: np.ndarray
    ref: ModelRef
    memory: VaeMemory = field(default_factory=VaeMemory)
    tiny: AutoencoderTiny | None = None

    @property
    def scale_factor(self) -> int:
        """Pixels a latent is wide."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (n, 4, h, w) to pixels (n, 8h, 8w, 3), float32 in [0, 1]. Where a VAE of half precision overflows,
        as SDXL's own does in float16, those images alone are decoded again in float32. On a CPU one image at a time is
        decoded, whose activations stay in the cache and in the process. Where memory runs out, half of the images at a
        time are; then each in tiles. Raises `torch.OutOfMemoryError` where the smallest tiles are too large."""
        images, dtype = self._decoded(latents), self.vae.dtype
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
        scaled = latents.to(self.vae.dtype) * deviation / self.vae.config.scaling_factor + mean
        most = 1 if self.device.type == "cpu" else len(latents)
        return self.memory.within(self._decode_tiled, scaled, self._side(latents), most)

    def _decode_tiled(self, latents: torch.Tensor, tile: int | None) -> torch.Tensor:
        with self._tiles(tile):
            images: torch.Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images

    @contextmanager
    def _tiles(self, tile: int | None) -> Iterator[None]:
        """The VAE in tiles of so many pixels a side, as diffusers has them, or whole."""
        vae = self.vae
        before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
        if tile is not None:
            vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, tile, tile // self.scale_factor
        try:
            yield
        finally:
            vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before

    def _side(self, latents: torch.Tensor) -> tuple[int, int]:
        height, width = latents.shape[-2:]
        return height * self.scale_factor, width * self.scale_factor

    def tile(self, height: int, width: int) -> int | None:
        """The side of the tiles in which the VAE has an image of this size, in pixels; None where it has it whole."""
        return self.memory.tile((height, width))

    @torch.no_grad()
    def encode(self, image: Image.Image | torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """An image, or its pixels (1, 3, 8h, 8w) in [-1, 1], to one latent (1, 4, h, w) in float32, sampled from the
        posterior as img2img does; in tiles as `decode` has them."""
        mean, deviation = self._statistics()
        pixels = image if isinstance(image, torch.Tensor) else to_tensor(image)
        height, width = pixels.shape[-2:]
        moments = self.memory.within(self._encode_tiled, pixels.to(self.device, self.vae.dtype), (height, width), 1)
        latents = DiagonalGaussianDistribution(moments).sample(generator)
        scaled: torch.Tensor = ((latents - mean) * self.vae.config.scaling_factor / deviation).float()
        return scaled

    def _encode_tiled(self, pixels: torch.Tensor, tile: int | None) -> torch.Tensor:
        with self._tiles(tile):
            moments: torch.Tensor = self.vae.encode(pixels).latent_dist.parameters
        return moments

    @torch.inference_mode()
    def sketched(self, latents: torch.Tensor) -> np.ndarray | None:
        """What latents (1, 4, h, w) will look like by the `tiny` decoder: pixels (8h, 8w, 3), float32 in [0, 1]; None
        where there is none. With one thread, since whoever asks must not slow the engine's calls."""
        if self.tiny is None:
            return None
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            scaled = latents.to(self.tiny.dtype) / self.tiny.config.scaling_factor
            return _pixels(self.tiny.decode(scaled, return_dict=False)[0])[0]
        finally:
            if self.device.type == "cpu":
                torch.set_num_threads(threads)

    def _statistics(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """The VAE's per-channel mean and deviation where its config has them, as fine-tuned SDXL VAEs may."""
        mean, deviation = (getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return 0.0, 1.0
        shaped = [
            torch.tensor(v, device=self.device, dtype=self.vae.dtype).view(1, -1, 1, 1) for v in (mean, deviation)
        ]
        return shaped[0], shaped[1]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image as the VAE takes it: (1, 3, height, width) in [-1, 1], float32."""
    return 2 * torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None] - 1


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
    check_pins(ref)
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
    tiny = None
    if profile.preview_decoder is not None:
        with loading():
            tiny = preview_decoder(profile.preview_decoder, base.vae.dtype).to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        keep_allocations()  # from here on: what loading took for a moment goes back to the system
    memory = VaeMemory(profile.tile_above, base.vae.config.sample_size)
    return Models(_denoiser(base, profile), second, base.vae, device, dtype, _latent_rgb(ref), ref, memory, tiny)


def preview_decoder(name: str, dtype: torch.dtype) -> AutoencoderTiny:
    """A small decoder of SDXL's latents, from a folder or a hub id at a commit. Raises `ModelError`."""
    place, _, revision = name.partition("@")
    path = Path(name).expanduser()
    check_no_pickle(name, "preview decoder")
    options: dict[str, Any] = {"local_files_only": True}
    if not path.is_dir():
        hub.check_pinned("preview decoder", place, revision or None)
        options = {"revision": revision}
    try:
        found = AutoencoderTiny.from_pretrained(
            str(path) if path.is_dir() else place, dtype=dtype, use_safetensors=True, **options
        )
    except Exception as error:  # as in _refused
        raise ModelError(
            f"the preview decoder must be an AutoencoderTiny of SDXL's latents; received {name!r}: {_reason(error)}. "
            "Example: a folder with its config.json and diffusion_pytorch_model.safetensors"
        ) from error
    if found.config.latent_channels != 4 or found.config.out_channels != 3:
        raise ModelError(
            f"the preview decoder must turn 4 channels into 3 colours; received {name!r} with "
            f"{found.config.latent_channels} into {found.config.out_channels}. Example: taesdxl"
        )
    return found


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
    if profile.storage == "float8":
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=unet.dtype)
    elif profile.device == "cpu" and not profile.compile:
        lighten(unet)  # the lean blocks read weights past the casting
    watch_rows(unet)
    watch_scales(unet)
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
    """A VAE's own fit where its folder, or that of a file's configurations, has one, as nano's does, else SDXL's."""
    if is_file(ref.vae or ref.base):
        folder = folder_of(ref.config, "base/vae") if ref.config else None
    else:
        folder = folder_of(ref.vae or ref.base, "base/vae")
    places = [] if folder is None else [folder, folder / "vae"]
    path = next((each for place in places if (each := place / "latent_rgb.json").is_file()), None)
    return np.array(SDXL_LATENT_RGB if path is None else json.loads(path.read_text()), dtype=np.float32)


def _load_parts(ref: ModelRef, dtype: Dtypes) -> tuple[Any, Any]:
    """The base's pipeline, and the refiner's or None, which shares its second text encoder and its VAE."""
    if ref.config is not None and not any(is_file(name) for name in (ref.base, ref.refiner, ref.vae)):
        raise ModelError(
            f"config must be left out where neither base, refiner nor vae is a single .safetensors file; received "
            f"{ref.config!r} beside {ref.base!r}. Example: --model FILE.safetensors --model-config FOLDER"
        )
    other = {} if ref.vae is None else {"vae": _vae(ref, dtype["default"])}
    base = _pipeline(StableDiffusionXLPipeline, ref, "base", dtype, **other)
    _predicts(base.scheduler, ref)
    if ref.refiner is None:
        return base, None
    shared = {name: getattr(base, name) for name in SHARED}
    return base, _pipeline(StableDiffusionXLImg2ImgPipeline, ref, "refiner", dtype, **shared)


def _predicts(scheduler: Any, ref: ModelRef) -> None:
    """Write into the base's scheduler what it predicts and whether it begins at pure noise, as the configuration or
    else the file says. What begins there has to begin at the last timestep (Lin et al. 2023, section 3.2)."""
    file = checkpoint.told(checkpoint.header(file_of(ref.base, "base"))) if is_file(ref.base) else checkpoint.Told()
    prediction, zero = ref.prediction_type or file.prediction_type, ref.zero_snr
    zero = file.zero_snr if zero is None else zero
    changes: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if zero is not None:
        changes["rescale_betas_zero_snr"] = zero
    if zero:
        changes["timestep_spacing"] = "trailing"
    defaults = [name for name in scheduler.config.get("_use_default_values", []) if name not in changes]
    scheduler.register_to_config(**changes, _use_default_values=defaults)  # what stands there is not read again


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


def _pipeline(cls: Any, ref: ModelRef, role: str, dtype: Dtypes, **shared: Any) -> Any:
    """The pipeline of a base or a refiner, from a folder, a file or the hub. Parts that are `shared` are not loaded."""
    name, revision = (ref.base, ref.revision) if role == "base" else (str(ref.refiner), ref.refiner_revision)
    if is_file(name):
        path = file_of(name, role)
        checkpoint.check(path, role, checkpoint.header(path), frozenset(shared))
        configs = _configs(ref, role)
        with _refused(cls, role, name):
            return single_file.pipeline(cls, path, configs, dtype, **shared)
    check_no_pickle(name, role)
    folder = folder_of(name, role)
    if folder is None:
        hub.check_pinned(role, name, revision)
        with _refused(cls, role, name, revision):
            folder = _downloaded(cls, name, str(revision), shared)
        hub.check_downloaded(role, name, str(revision))
    parts = [part for part in parts_of(check_folder(folder, role)) if part not in shared]
    check_folder_is_drawn(folder, role, parts)
    check_safe(folder, role, name, parts)
    options = {"dtype": dtype, "add_watermarker": False, "use_safetensors": True, "local_files_only": True, **shared}
    with _refused(cls, role, name, revision):
        return cls.from_pretrained(str(folder), variant=variant_of(folder, parts), **options)


@contextmanager
def _refused(cls: Any, role: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Around whatever loads a role's weights: diffusers, safetensors, json and the hub client each raise kinds of their
    own."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the {role} model must be a complete SDXL checkpoint, to load as {cls.__name__}; received {name!r}"
            f"{f' at revision {revision}' if revision else ''}: {_reason(error)}. Example: nano"
        ) from error


def _configs(ref: ModelRef, role: str) -> Path:
    """The folder of the configurations and tokenizers that a single file goes with."""
    folder = folder_of(ref.config, role) if ref.config else SDXL / role
    if role == "refiner" and (folder is None or folder.name != role):
        return SDXL / role  # what is named has none for it
    if folder is None:
        assert ref.config is not None
        hub.check_pinned("config", ref.config, ref.config_revision)
        patterns = ["*.json", "*/*.json", "*/*.txt"]
        with _refused(StableDiffusionXLPipeline, "config", ref.config, ref.config_revision):
            folder = Path(snapshot_download(ref.config, revision=ref.config_revision, allow_patterns=patterns))
        hub.check_downloaded("config", ref.config, str(ref.config_revision))
    check_folder_is_drawn(folder, role, parts_of(check_folder(folder, role)))
    return folder


def _downloaded(cls: Any, name: str, revision: str, shared: Mapping[str, Any]) -> Path:
    """The folder of a hub revision with the files that a pipeline takes: those of its fp16 variant, or where it has
    none the plain ones."""
    options = {"revision": revision, "use_safetensors": True, **shared}
    try:
        return Path(cls.download(name, variant="fp16", **options))
    except ValueError:  # diffusers' own, where no file is of the variant
        return Path(cls.download(name, **options))


def _reason(error: Exception) -> str:
    """A library's error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(" .:")


def _vae(ref: ModelRef, dtype: torch.dtype) -> AutoencoderKL:
    name, revision = str(ref.vae), ref.vae_revision
    check_no_pickle(name, "vae")
    folder = None if is_file(name) else folder_of(name, "base/vae")
    if folder is not None and (folder / "config.json").is_file():
        check_is_drawn(json.loads((folder / "config.json").read_text()), "vae", "vae", name)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    try:
        if is_file(name):
            loaded = single_file.vae(file_of(name, "vae"), _configs(ref, "base"), dtype)
        elif folder is not None:
            variant = variant_of(folder, ["."])
            loaded = AutoencoderKL.from_pretrained(str(folder), variant=variant, local_files_only=True, **options)
        else:
            hub.check_pinned("vae", name, revision)
            try:
                loaded = AutoencoderKL.from_pretrained(name, revision=revision, **options)
            except OSError:  # the hub's client, and diffusers where no file has the plain name
                loaded = AutoencoderKL.from_pretrained(name, revision=revision, variant="fp16", **options)
            hub.check_downloaded("vae", name, str(revision))
    except ModelError:
        raise
    except Exception as error:  # as in _refused
        raise ModelError(
            f"the vae must be an AutoencoderKL checkpoint; received {name!r}: {_reason(error)}. "
            "Example: madebyollin/sdxl-vae-fp16-fix"
        ) from error
    check_is_drawn(dict(loaded.config), "vae", "vae", name)
    return loaded
