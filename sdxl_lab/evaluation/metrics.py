"""Numbers from images.

A metric takes images and gives one float an image. `METRICS` lists those that need no model; `clip_score` makes the
one that does.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import pdist
from skimage.measure import blur_effect
from skimage.metrics import peak_signal_noise_ratio
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.diffusion.models import loading
from sdxl_lab.images import GeneratedImage, max_difference, ssim

Measure = Callable[[Sequence[GeneratedImage], Sequence[GeneratedImage]], Iterable[float]]


class MetricError(ValueError):
    """A metric is unknown, lacks its reference, or got images it cannot compare."""


@dataclass(frozen=True)
class Metric:
    """A number an image.

    `better` is "higher" or "lower", or None for a metric without a better direction. `source` names the paper or class
    that defines it. A metric with `needs_reference` compares every image with the reference at the same index.
    """

    name: str
    better: Literal["higher", "lower"] | None
    source: str
    measure: Measure = field(repr=False)
    needs_reference: bool = False

    def __call__(
        self, images: Sequence[GeneratedImage], references: Sequence[GeneratedImage] | None = None
    ) -> np.ndarray:
        """One float an image, (n,) of float64. `references` are read only by a metric that needs them.

        Raises `MetricError` where references are missing, too few, or of another size.
        """
        if self.needs_reference:
            self._check(images, references)
        values = np.fromiter(self.measure(images, references or ()), dtype=np.float64)
        assert values.shape == (len(images),), self.name
        return values

    def _check(self, images: Sequence[GeneratedImage], references: Sequence[GeneratedImage] | None) -> None:
        if references is None or len(references) != len(images):
            received = "none" if references is None else len(references)
            raise MetricError(
                f"{self.name} must have one reference an image; received {len(images)} images and {received} "
                f"references. Example: {self.name}(images, references)"
            )
        for index, (image, reference) in enumerate(zip(images, references, strict=True)):
            if image.image.size != reference.image.size:
                raise MetricError(
                    f"{self.name} must compare images of one size; image {index} is {_size(image)}, its "
                    f"reference {_size(reference)}. Draw both with the same width and height"
                )


def _size(image: GeneratedImage) -> str:
    return "{}x{}".format(*image.image.size)


def _alone(of_one: Callable[[GeneratedImage], float]) -> Measure:
    return lambda images, _: map(of_one, images)


def _beside(of_two: Callable[[Image.Image, Image.Image], float]) -> Measure:
    return lambda images, references: (
        of_two(image.image, reference.image) for image, reference in zip(images, references, strict=True)
    )


def _pixels(image: Image.Image) -> np.ndarray:
    """(height, width, 3) on [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _luminance(image: Image.Image) -> np.ndarray:
    """(height, width) on [0, 1], Rec. 601."""
    return np.asarray(image.convert("L"), dtype=np.float64) / 255


# --- one image ---------------------------------------------------------------------------------------------------


def _sharpness(image: GeneratedImage) -> float:
    """On [0, 1]: how much variation between neighbours a blur would remove. Noise counts as sharpness, too."""
    luminance = _luminance(image.image)
    return 1 - float(blur_effect(luminance)) if np.ptp(luminance) else 0.0


def _contrast(image: GeneratedImage) -> float:
    return float(_luminance(image.image).std())


def _clipping(image: GeneratedImage) -> float:
    """The share of samples at either end of the scale, where guidance that is too strong drives them."""
    samples = np.asarray(image.image.convert("RGB"))
    return float(((samples == 0) | (samples == 255)).mean())


def _unet_calls(image: GeneratedImage) -> float:
    return float(sum(image.record.unet_calls.values()))


def _unet_rows(image: GeneratedImage) -> float:
    """The cost that is the same on every machine: a guided step is two rows, one outside the guidance interval is
    one."""
    return float(sum(image.record.unet_rows.values()))


def _seconds(image: GeneratedImage) -> float:
    """From its first step to the decoded image, shared with whatever else was in the engine."""
    return image.timings["denoise_ms"] / 1000


# --- an image and a reference -------------------------------------------------------------------------------------


def _psnr(image: Image.Image, reference: Image.Image) -> float:
    """In dB; infinite for equal images."""
    first, second = _pixels(image), _pixels(reference)
    if np.array_equal(first, second):
        return float("inf")
    return float(peak_signal_noise_ratio(second, first, data_range=1))


THUMBNAIL = 32
NEAR = 0.03


def _thumbnail(image: Image.Image) -> np.ndarray:
    return _pixels(image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).ravel()


def _thumbnail_distance(image: Image.Image, reference: Image.Image) -> float:
    """Root mean square difference of the 32x32 thumbnails, on [0, 1]; below `NEAR` they look the same."""
    return float(np.sqrt(np.square(_thumbnail(image) - _thumbnail(reference)).mean()))


def near_duplicates(images: Sequence[GeneratedImage], within: float = NEAR) -> list[tuple[int, int, float]]:
    """The pairs of images whose thumbnails are at most `within` apart: (i, j, distance) with i < j, nearest first.

    Sizes may differ. This shows seeds that all give the same image, and settings that change nothing.
    """
    if len(images) < 2:
        return []
    thumbnails = np.stack([_thumbnail(image.image) for image in images])
    distances = pdist(thumbnails) / np.sqrt(thumbnails.shape[1])
    first, second = np.triu_indices(len(images), 1)
    order = np.argsort(distances, kind="stable")
    return [(int(first[k]), int(second[k]), float(distances[k])) for k in order if distances[k] <= within]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "sharpness",
            "higher",
            "1 - blur_effect of scikit-image; Crete et al. 2007, The blur effect",
            _alone(_sharpness),
        ),
        Metric("contrast", None, "standard deviation of the luminance; Peli 1990, RMS contrast", _alone(_contrast)),
        Metric("clipping", "lower", "share of samples at 0 or 255", _alone(_clipping)),
        Metric("ssim", "higher", "Wang et al. 2004, Image quality assessment; scikit-image", _beside(ssim), True),
        Metric("psnr", "higher", "10 log10(1 / mean squared error); scikit-image", _beside(_psnr), True),
        Metric("max_abs", "lower", "largest difference of two samples, on [0, 1]", _beside(max_difference), True),
        Metric(
            "thumbnail_distance",
            None,
            "32x32 thumbnails; Torralba et al. 2008, 80 million tiny images",
            _beside(_thumbnail_distance),
            True,
        ),
        Metric("unet_calls", "lower", "the image's record", _alone(_unet_calls)),
        Metric("unet_rows", "lower", "the image's record", _alone(_unet_rows)),
        Metric("seconds", "lower", "the engine's clock", _alone(_seconds)),
    )
}


# --- CLIP ----------------------------------------------------------------------------------------------------------


def find_metric(name: str, clip: str = "nano") -> Metric:
    """The metric of this name; for "clip_score" the one with the CLIP model `clip`. Raises `MetricError`."""
    if name == "clip_score":
        return clip_score(clip)
    if name not in METRICS:
        raise MetricError(
            f"a metric must be one of {', '.join([*METRICS, 'clip_score'])}; received {name!r}. Example: sharpness"
        )
    return METRICS[name]


def clip_score(model: str = "nano") -> Metric:
    """How well an image fits the prompt in its record: 100 times the cosine of CLIP's two embeddings.

    Hessel et al. 2021 (arXiv 2104.08718) without their clipping at 0, which would make a wrong image and a contrary
    one equal. `model` is "nano", a folder or a hub id of a `CLIPModel`; scores of different models cannot be compared.
    The model is loaded with the first image, on CUDA where there is one, and kept.
    """
    return Metric(
        "clip_score",
        "higher",
        f"Hessel et al. 2021 (arXiv 2104.08718), 100 x cosine; transformers' CLIPModel {model}",
        lambda images, _: _clip_scores(model, images),
    )


CLIP_BATCH = 32


def _clip_scores(model: str, images: Sequence[GeneratedImage]) -> list[float]:
    # In a thread that ends, as in `Engine.load`: a second OpenMP pool that stays would slow the engine's.
    with ThreadPoolExecutor(1, thread_name_prefix="clip") as pool:
        clip = pool.submit(_load_clip, model).result()
        parts = [images[start : start + CLIP_BATCH] for start in range(0, len(images), CLIP_BATCH)]
        return [score for part in parts for score in pool.submit(clip.scores, part).result()]


@dataclass(frozen=True)
class _Clip:
    model: Any
    tokenizer: Any
    processor: Any

    @torch.no_grad()
    def scores(self, images: Sequence[GeneratedImage]) -> list[float]:
        prompts = [image.record.words for image in images]
        ids = self.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        pixels = self.processor([image.image.convert("RGB") for image in images], return_tensors="pt")
        device = self.model.device
        text = self.model.get_text_features(input_ids=ids.input_ids.to(device)).pooler_output
        seen = self.model.get_image_features(pixel_values=pixels.pixel_values.to(device)).pooler_output
        scores: list[float] = (100 * F.cosine_similarity(text, seen)).tolist()
        return scores


@cache
def _load_clip(model: str) -> _Clip:
    place = str(NANO / "clip") if model == "nano" else model
    variant = "fp16" if Path(place, "model.fp16.safetensors").is_file() else None
    try:
        with loading():
            loaded = CLIPModel.from_pretrained(place, variant=variant, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(place)
            processor = CLIPImageProcessorPil.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise MetricError(
            f"a CLIP model must be nano, a folder or a hub id of a CLIPModel; received {model!r}: {error}. Example: "
            "openai/clip-vit-large-patch14"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _Clip(loaded.eval().to(device), tokenizer, processor)
