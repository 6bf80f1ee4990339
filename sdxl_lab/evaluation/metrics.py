"""Numbers from images, and what a difference of such numbers proves.

Every metric has one signature: images in, one float an image out; `METRICS` lists those that need no model, and
`clip_score` makes the one that does. `interval` and `paired` say how sure a mean is. Knows no sweeps and no cells.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from scipy import stats
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
    """A metric is unknown, lacks its reference, or got images or values it cannot compare."""


@dataclass(frozen=True)
class Metric:
    """A number an image.

    `better` is "higher", "lower", or None where neither is; `source` names the paper or class that defines it. Where
    `needs_reference`, every image is held against the reference in the same place.
    """

    name: str
    better: Literal["higher", "lower"] | None
    source: str
    measure: Measure = field(repr=False)
    needs_reference: bool = False

    def __call__(
        self, images: Sequence[GeneratedImage], references: Sequence[GeneratedImage] | None = None
    ) -> np.ndarray:
        """One float an image, (n,) of float64. `references` are read by a metric that needs them, and by no other.

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
    """On [0, 1]: how much variation between neighbours a blur would take away. Noise counts as sharpness too."""
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
    """The cost that no machine changes: a guided step is two rows, one outside the guidance interval is one."""
    return float(sum(image.record.unet_rows.values()))


def _seconds(image: GeneratedImage) -> float:
    """From its first step to the decoded image, shared with whatever else was in the engine."""
    return image.timings["denoise_ms"] / 1000


# --- an image beside a reference ----------------------------------------------------------------------------------


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
    """Root mean square difference of the 32x32 thumbnails, on [0, 1]; below `NEAR` an eye calls them the same."""
    return float(np.sqrt(np.square(_thumbnail(image) - _thumbnail(reference)).mean()))


def near_duplicates(images: Sequence[GeneratedImage], within: float = NEAR) -> list[tuple[int, int, float]]:
    """The pairs of images whose thumbnails are at most `within` apart: (i, j, distance) with i < j, nearest first.

    Sizes may differ. Seeds that all give the same image, or a setting that changes nothing, show here.
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


def find(name: str, clip: str = "nano") -> Metric:
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

    Hessel et al. 2021 (arXiv 2104.08718) without their clip at 0, which would call a wrong image and a contrary one
    equal. `model` is "nano", a folder or a hub id of a `CLIPModel`; scores of different models cannot be compared.
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
    # In a thread that ends, as `Engine.load` says: a second OpenMP pool that stays would slow the engine's.
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
        prompts = [image.record.prompt for image in images]
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


# --- what a difference proves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie: with the confidence asked for between `low` and `high`. `count` is of what was
    resampled: values, pairs or groups."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def decided(self) -> bool:
        """Whether zero lies outside, so that the sign of the mean is more than chance."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}], n = {self.count}"


def interval(
    values: Sequence[float] | np.ndarray,
    *,
    by: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """The bootstrap interval of the mean: bias-corrected and accelerated (Efron 1987), from scipy, and expanded for few
    values as Hesterberg 2015 (arXiv 1411.5279, section 4.2.2) has it: from eight values of a normal distribution, 95 %
    held the true mean in 88 % of trials before and in 93 % after. The same values give the same interval.

    With `by`, one label a value (the prompts, say), values of a label are averaged first and the labels are resampled:
    then the interval speaks of prompts not drawn yet, without it only of more seeds of these.
    Raises `MetricError` for values that are not finite, for fewer than two, and for a confidence outside (0, 1).
    """
    found = _checked("values", values)
    if not 0 < confidence < 1:
        raise MetricError(f"confidence must be a number above 0 and below 1; received {confidence!r}. Example: 0.95")
    if by is not None:
        if len(by) != len(found):
            raise MetricError(f"by must have one label a value; received {len(found)} values, {len(by)} labels")
        labels = list(by)
        found = np.array([found[[at == label for at in labels]].mean() for label in dict.fromkeys(labels)])
    if len(found) < 2:
        raise MetricError(
            f"an interval must have at least two {'values' if by is None else 'labels'}; received {len(found)}. "
            "One image proves nothing: take more seeds or prompts"
        )
    mean = float(found.mean())
    if np.ptp(found) <= 1e-9 * np.abs(found).max():  # equal but for rounding
        return Interval(mean, mean, mean, len(found))
    bounds = stats.bootstrap(
        (found,),
        np.mean,
        n_resamples=resamples,
        confidence_level=min(_expanded(confidence, len(found)), 1 - 1 / resamples),
        method="BCa",
        rng=seed,
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(found))


def _expanded(confidence: float, count: int) -> float:
    """Wider by as much as Student's t is wider than the normal, and as a sample's spread is too small."""
    reach = stats.t.ppf((1 + confidence) / 2, count - 1) * np.sqrt(count / (count - 1))
    return float(1 - 2 * stats.norm.sf(reach))


def paired(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    by: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """The `interval` of the mean of `a - b`, where a[i] and b[i] are of the same prompt and seed.

    What prompts and seeds differ in among themselves falls out of the difference; so a gain that two separate means
    would hide is seen. Raises `MetricError` for sequences of different length, and as `interval` does.
    """
    first, second = _checked("a", a), _checked("b", b)
    if len(first) != len(second):
        raise MetricError(
            f"a and b must be pairs, value by value of the same prompt and seed; received {len(first)} and "
            f"{len(second)} values"
        )
    return interval(first - second, by=by, confidence=confidence)


def _checked(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise MetricError(f"{name} must be a row of at least one number; received the shape {found.shape}")
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise MetricError(
            f"{name} must be finite numbers; received {found[bad[0]]} at {bad[0]}. Leave failed cells out, of both "
            "sides of a pair"
        )
    return found
