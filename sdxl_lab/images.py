"""Images as files and numbers: the record inside the PNG, the watermark, the difference of two images.

The record is canonical JSON (`ImageRecord`); beside it stands the `parameters` text that A1111 and the tools around it
read. Imports no torch.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sdxl_lab.config import LoraRef, canonical, is_file
from sdxl_lab.record import ImageRecord, RecordError
from sdxl_lab.schedules import SCHEDULE_TYPES
from sdxl_lab.syntax import escaped, networks

RECORD_KEY = "sdxl_lab"
# The 48 bits that Stability's reference code and diffusers' StableDiffusionXLWatermarker write.
WATERMARK_BITS = [int(bit) for bit in f"{0b101100111110110010010000011110111011000110011110:b}"]


class ImageError(ValueError):
    """A file or an array is not the image it should be."""


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image, `timings` in milliseconds, and the record that repeats it."""

    image: Image.Image
    record: ImageRecord
    timings: Mapping[str, float]

    def png(self) -> bytes:
        return encode_png(self.image, self.record)

    def save(self, path: Path | str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(self.png())

    def _repr_png_(self) -> bytes:
        return self.png()


def finish(pixels: np.ndarray, *, watermark: bool) -> Image.Image:
    """Float pixels (height, width, 3) in [0, 1] to an 8-bit image, rounded as diffusers' VaeImageProcessor does.

    Raises `ImageError` for an image with non-finite pixels or of one single value.
    """
    if not np.isfinite(pixels).all():
        raise ImageError(
            "the image has non-finite pixels: the denoising or the VAE overflowed, as they may in float16; use "
            "float32 or bfloat16"
        )
    if pixels.max() == pixels.min():
        raise ImageError(f"every pixel of the image is {pixels.flat[0]:g}: the denoising or the VAE broke down")
    scaled = pixels * 255
    if watermark:
        scaled = np.clip(_watermarked(scaled), 0, 255)
    return Image.fromarray(scaled.round().astype(np.uint8))


def _watermarked(scaled: np.ndarray) -> np.ndarray:
    from imwatermark import WatermarkEncoder  # imports OpenCV: only for those who ask for a watermark

    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", WATERMARK_BITS)
    bgr = np.ascontiguousarray(scaled[:, :, ::-1], dtype=np.float32)
    return np.asarray(encoder.encode(bgr, "dwtDct"))[:, :, ::-1]


def read_watermark(image: Image.Image) -> list[int]:
    """The 48 bits found in an image, whether or not anyone wrote some."""
    from imwatermark import WatermarkDecoder

    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    return [int(bit) for bit in WatermarkDecoder("bits", len(WATERMARK_BITS)).decode(bgr, "dwtDct")]


def encode_png(image: Image.Image, record: ImageRecord) -> bytes:
    info = PngInfo()
    info.add_itxt(RECORD_KEY, canonical(record.to_dict()))
    info.add_itxt("parameters", a1111_parameters(record))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def open_image(source: Path | str | bytes) -> Image.Image:
    """Open an image fully; `ImageError` if it is none."""
    try:
        # Pillow leaves a file open that it cannot read to the end.
        image = Image.open(io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes()))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        name = "the bytes" if isinstance(source, bytes) else str(source)
        raise ImageError(f"cannot read {name} as an image: {error}") from error
    return image


def read_record(source: Path | str | bytes) -> ImageRecord:
    """The record of a PNG that this project wrote, be it 0.1.0; `ImageError` where there is none."""
    text = getattr(open_image(source), "text", {}).get(RECORD_KEY)
    name = "the image" if isinstance(source, bytes) else str(source)
    if text is None:
        raise ImageError(f"{name} carries no {RECORD_KEY} record; only PNGs written by SDXL Lab do")
    try:
        return ImageRecord.read(text, name)
    except RecordError as error:
        raise ImageError(str(error)) from error


def a1111_parameters(record: ImageRecord) -> str:
    """The text A1111 writes into its PNGs: prompt, negative prompt, one line of settings. It has no notation for a
    second prompt, and would read a plain one's brackets as weights, were they not escaped."""
    config = record.config
    # Where the name of ours has a schedule in it, so had A1111's until 1.9, and this record's.
    sampler, by_name, _ = record.sampler.partition(f" {SCHEDULE_TYPES['karras']}")
    schedule = by_name.strip() or SCHEDULE_TYPES.get(config.sigma_schedule)
    settings: dict[str, Any] = {
        "Steps": config.steps,
        "Sampler": sampler,
        **({"Schedule type": schedule} if schedule else {}),
        "CFG scale": config.guidance_scale,
        "Seed": record.seed,
        "Size": f"{config.width}x{config.height}",
        **_a1111_weights("Model", config.model.base, config.model.sha256),
    }
    if config.model.vae is not None:
        settings |= _a1111_weights("VAE", config.model.vae, config.model.vae_sha256)
    settings |= _a1111_passes(record)
    if config.clip_skip is not None:
        settings["Clip skip"] = config.clip_skip + 2  # A1111 counts from the last layer, which is its 1
    if record.stage != "refiner" and config.refiner is not None:
        name, *checksum = _a1111_weights("", str(config.model.refiner), config.model.refiner_sha256).values()
        settings["Refiner"] = f"{name} [{checksum[0]}]" if checksum else name
        settings["Refiner switch at"] = config.refiner.handover
    if config.model.zero_snr or record.scheduler.get("rescale_betas_zero_snr"):
        settings["Noise Schedule"] = "Zero Terminal SNR"
    if config.loras:
        settings["Lora hashes"] = f'"{", ".join(f"{ref.name}: {_lora_hash(record, ref)}" for ref in config.loras)}"'
    if config.embeddings:
        hashes = ", ".join(f"{ref.token}: {(ref.sha256 or 'unknown')[:12]}" for ref in config.embeddings)
        settings["TI hashes"] = f'"{hashes}"'
    settings["Version"] = f"SDXL Lab {record.version}"
    plain = config.prompt_syntax == "plain"  # A1111 has the one syntax
    written: Callable[[str], str] = escaped if plain else str
    named = set() if plain else {network.name for network in networks(record.prompt)[1]}
    lines = [written(record.prompt) + "".join(_lora_word(ref) for ref in config.loras if ref.name not in named)]
    if config.negative_prompt:
        lines.append(f"Negative prompt: {written(config.negative_prompt)}")
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items()))
    return "\n".join(lines)


def _a1111_passes(record: ImageRecord) -> dict[str, Any]:
    """What A1111 says of a source image or of a second pass, whose steps it counts as they are made."""
    config, hires = record.config, record.config.hires
    if record.strength is not None:
        blur = record.source_image.mask_blur if record.source_image else None
        return {"Denoising strength": record.strength} | ({"Mask blur": blur} if blur else {})
    if hires is None:
        return {}
    return {
        "Denoising strength": hires.strength,
        "Hires upscale": hires.scale,
        "Hires steps": int((hires.steps or config.steps) * hires.strength),
        "Hires upscaler": hires.upscaler.capitalize(),
    }


def _a1111_weights(kind: str, name: str, sha256: str | None) -> dict[str, str]:
    """A model as A1111 names it: a file without its folder and ending, and the first ten digits of its checksum."""
    if not is_file(name):
        return {kind: name}
    return {kind: Path(name).stem} | ({f"{kind} hash": sha256[:10]} if sha256 else {})


def _lora_word(ref: LoraRef) -> str:
    """A LoRA in A1111's notation. With two weights, the first is the text encoders'."""
    if ref.text_weight == ref.weight:
        return f" <lora:{ref.name}:{ref.weight:g}>"
    return f" <lora:{ref.name}:{ref.text_weight:g}:{ref.weight:g}>"


def _lora_hash(record: ImageRecord, ref: LoraRef) -> str:
    """The first 10 digits of the file's sha256, by which model sites find it (AutoV2)."""
    known = ref.sha256 or record.weights.get(f"lora {ref.name}", "").removeprefix("sha256 ")
    return known[:10] or "unknown"


def preview(latents: np.ndarray, latent_rgb: np.ndarray) -> Image.Image:
    """What latents (4, h, w) will look like, without a VAE: a linear map (5, 3) to colours, enlarged to 4h x 4w."""
    rgb = np.einsum("chw,cd->hwd", latents, latent_rgb[:4]) + latent_rgb[4]
    pixels = np.clip((rgb + 1) * 127.5, 0, 255).round().astype(np.uint8)
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((4 * width, 4 * height), Image.Resampling.BICUBIC)


def max_difference(first: Image.Image, second: Image.Image) -> float:
    """The largest absolute difference of two images' samples, on [0, 1]. Sizes must agree."""
    return float(_differences(first, second).max()) / 255


def mean_difference(first: Image.Image, second: Image.Image) -> float:
    """The mean absolute difference of two images' samples, on [0, 1]. Sizes must agree."""
    return float(_differences(first, second).mean()) / 255


def ssim(first: Image.Image, second: Image.Image) -> float:
    """The structural similarity of two images (Wang et al. 2004), with the paper's Gaussian window and constants, mean
    over the three channels; 1 for equal images. Sizes must agree."""
    from skimage.metrics import structural_similarity  # takes a second to import: only for those who ask for it

    if first.size != second.size:
        raise ImageError(f"images of different size cannot be compared: {first.size} and {second.size}")
    return float(
        structural_similarity(
            *(np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (first, second)),
            channel_axis=2,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def magnified_difference(first: Image.Image, second: Image.Image) -> tuple[Image.Image, float]:
    """Where two images differ: their absolute difference, black where they agree, and by how much it was multiplied
    so that the largest one is white (1.0 for equal images). Sizes must agree."""
    differences = _differences(first, second)
    gain = 255 / max(1, int(differences.max())) if differences.any() else 1.0
    return Image.fromarray((differences * gain).round().astype(np.uint8)), gain


def beside(before: Image.Image, after: Image.Image) -> tuple[Image.Image, Image.Image, str]:
    """For a sheet, with `before` to the left: `after` in the same size, the difference, and in words how much it was
    magnified. Of images of different size there is no difference to see."""
    if before.size != after.size:
        return after.resize(before.size), Image.new("RGB", before.size, "white"), "no difference: the sizes differ"
    difference, gain = magnified_difference(before, after)
    return after, difference, f"difference x{gain:.3g}"


def _differences(first: Image.Image, second: Image.Image) -> np.ndarray:
    if first.size != second.size:
        raise ImageError(f"images of different size cannot be compared: {first.size} and {second.size}")
    a, b = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (first, second))
    return np.abs(a - b)
