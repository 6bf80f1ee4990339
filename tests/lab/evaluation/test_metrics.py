"""Every metric against a value worked out by hand or by another, and against what it claims."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from recipes.nano.scenes import caption, render, sample_scene
from sdxl_lab.config import GenerationConfig
from sdxl_lab.evaluation.metrics import METRICS, MetricError, clip_score, find_metric, near_duplicates
from sdxl_lab.evaluation.statistics import paired
from sdxl_lab.images import GeneratedImage
from sdxl_lab.job import ImageRequest
from tests.made import image_record

REFERENCED = [name for name, metric in METRICS.items() if metric.needs_reference]


def generated(pixels, prompt="a red cat", **record):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    return GeneratedImage(
        image, image_record(prompt=prompt, **record), {"queued_ms": 500.0, "denoise_ms": 1500.0, "total_ms": 2100.0}
    )


def scene(seed=0, side=128):
    return render(sample_scene(random.Random(seed)), side)


def noisy(image, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def value(name, pixels, reference=None):
    return METRICS[name]([generated(pixels)], None if reference is None else [generated(reference)])[0]


# --- one image ---------------------------------------------------------------------------------------------------


def halves(left, right):
    """64x64: the left half of one gray, the right half of another."""
    pixels = np.empty((64, 64, 3))
    pixels[:, :32], pixels[:, 32:] = left, right
    return pixels.astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "pixels", "expected"),
    [
        ("contrast", halves(0, 255), 0.5),
        ("contrast", halves(51, 153), 0.2),
        ("contrast", halves(90, 90), 0.0),
        ("clipping", halves(0, 255), 1.0),
        ("clipping", halves(0, 128), 0.5),
        ("clipping", halves((0, 128, 128), 128), 1 / 6),
        ("clipping", halves(1, 254), 0.0),
        ("sharpness", halves(90, 90), 0.0),
    ],
)
def test_values_worked_out_by_hand(name, pixels, expected):
    assert value(name, Image.fromarray(pixels)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_each_blur_lowers_sharpness_and_noise_does_not(seed):
    image = scene(seed)
    values = [value("sharpness", image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 0.5, 1, 2, 4)]
    assert all(before > after + 0.01 for before, after in pairwise(values)), values
    assert 0 < values[-1] < values[0] < 1
    assert value("sharpness", noisy(image, 8)) > values[0]


def test_sharpness_is_of_the_edges_not_of_the_contrast():
    image = scene(1)
    pale = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.5)
    assert value("sharpness", pale) == pytest.approx(value("sharpness", image), abs=0.01)
    assert value("contrast", pale) == pytest.approx(value("contrast", image) / 2, rel=0.02)


def test_a_stretched_scale_clips():
    image = scene(2)
    stretched = Image.fromarray(np.clip((np.asarray(image, float) - 128) * 2 + 128, 0, 255).astype(np.uint8))
    assert value("clipping", stretched) > value("clipping", image) + 0.2


def test_costs_are_the_records_and_the_clocks():
    drawn = generated(scene(), unet_calls={"base": 8, "refiner": 2}, unet_rows={"base": 12, "refiner": 4})
    assert [METRICS[name]([drawn])[0] for name in ("unet_calls", "unet_rows", "seconds")] == [10, 16, 1.5]


@pytest.mark.parametrize(
    ("changes", "calls", "rows"),
    [
        ({}, 4, 8),
        ({"guidance_scale": 1.0}, 4, 4),
        ({"guidance_interval": (0.0, 1.0)}, 4, None),
        ({"scheduler": "heun"}, 7, 14),
    ],
)
def test_the_engine_counts_the_rows_it_sends(tiny_config: GenerationConfig, start, changes, calls, rows):
    engine = start()
    sent = []
    predict = engine._predict
    engine._predict = lambda name, inputs: sent.extend(len(each.timesteps) for each in inputs) or predict(name, inputs)
    drawn = engine.draw(ImageRequest(tiny_config.with_(**changes), "a red cat", 1))
    assert METRICS["unet_calls"]([drawn])[0] == len(sent) == calls
    assert METRICS["unet_rows"]([drawn])[0] == sum(sent)
    assert sum(sent) == rows if rows else calls < sum(sent) < 2 * calls


# --- beside a reference --------------------------------------------------------------------------------------------


def ssim_by_hand(first, second):
    """Wang et al. 2004, equations 13 to 16: an 11x11 Gaussian window of 1.5, one channel, edges left out."""
    x, y = np.asarray(first, float), np.asarray(second, float)
    at = np.arange(-5, 6)
    line = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(values):
        return ndimage.correlate(values, window)[5:-5, 5:-5]

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def test_ssim_is_that_of_the_paper():
    image = scene(3)
    worn = noisy(image.filter(ImageFilter.GaussianBlur(1)), 10)
    channels = zip(image.split(), worn.split(), strict=True)
    expected = np.mean([ssim_by_hand(first, second) for first, second in channels])
    assert 0.2 < expected < 0.9
    assert value("ssim", worn, image) == pytest.approx(expected, abs=1e-4)


def test_psnr_max_abs_and_thumbnails_by_hand():
    gray, lighter = (Image.new("RGB", (64, 64), (v, v, v)) for v in (100, 151))
    assert value("psnr", lighter, gray) == pytest.approx(20 * math.log10(255 / 51))
    assert value("max_abs", lighter, gray) == pytest.approx(51 / 255)
    assert value("thumbnail_distance", lighter, gray) == pytest.approx(51 / 255)
    lighter.putpixel((3, 3), (255, 255, 255))
    assert value("max_abs", lighter, gray) == pytest.approx(155 / 255)


@pytest.mark.parametrize(
    ("name", "of_equals"), [("ssim", 1.0), ("psnr", math.inf), ("max_abs", 0.0), ("thumbnail_distance", 0.0)]
)
def test_equal_images_are_equal_and_more_noise_is_further(name, of_equals):
    assert set(REFERENCED) == {"ssim", "psnr", "max_abs", "thumbnail_distance"}
    image = scene(4)
    assert value(name, image, image) == of_equals
    steps = [of_equals, *(value(name, noisy(image, sigma), image) for sigma in (4, 16, 48))]
    assert steps == sorted(steps, reverse=METRICS[name].better == "higher")
    assert len(set(steps)) == 4


def test_near_duplicates_are_found_whatever_was_done_to_the_file():
    first, other = scene(5), scene(6)
    worn = noisy(first.filter(ImageFilter.GaussianBlur(1)), 6).resize((96, 96), Image.Resampling.LANCZOS)
    found = near_duplicates([generated(first), generated(other), generated(worn), generated(first)])
    assert [(i, j) for i, j, _ in found] == [(0, 3), (0, 2), (2, 3)]
    assert found[0][2] == 0 < found[1][2] == found[2][2] < 0.03
    assert near_duplicates([generated(first)]) == []
    assert len(near_duplicates([generated(first), generated(other)], within=1)) == 1


def test_other_colours_and_other_scenes_are_no_duplicates():
    """Also where a hash of the luminance would see none of the difference."""
    red, green = (Image.new("RGB", (64, 64), colour) for colour in ((255, 0, 0), (0, 130, 0)))
    assert abs(red.convert("L").getpixel((0, 0)) - green.convert("L").getpixel((0, 0))) <= 1
    assert near_duplicates([generated(red), generated(green), *(generated(scene(seed, 64)) for seed in range(8))]) == []


# --- CLIP ----------------------------------------------------------------------------------------------------------


def test_the_clip_score_is_a_hundred_times_the_cosine_that_transformers_gives():
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from sdxl_lab.diffusion.inventory import NANO

    images = [
        generated(scene(seed), prompt) for seed, prompt in enumerate(["a red cat", "a blue boat on a red ground"])
    ]
    scores = clip_score()(images)
    model = CLIPModel.from_pretrained(NANO / "clip", variant="fp16", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(NANO / "clip")
    pixels = CLIPImageProcessorPil.from_pretrained(NANO / "clip")([p.image for p in images], return_tensors="pt")
    ids = tokenizer([p.record.prompt for p in images], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=ids.input_ids, pixel_values=pixels.pixel_values).logits_per_image
        expected = 100 * logits.diagonal() / model.logit_scale.exp()
    assert scores == pytest.approx(expected.numpy(), abs=1e-4)


def test_the_clip_score_prefers_the_prompt_that_is_so():
    scenes = [sample_scene(random.Random(seed), hat=0.0) for seed in range(40)]
    prompts = [caption(each) for each in scenes]
    right = clip_score()([generated(render(each), prompt) for each, prompt in zip(scenes, prompts, strict=True)])
    wrong = clip_score()([generated(render(scenes[i]), prompts[i - 1]) for i in range(len(scenes))])
    assert right.shape == (40,)
    assert paired(right, wrong).low > 0
    assert np.mean(right > wrong) >= 0.95


def test_one_image_scores_alone_as_among_others():
    images = [generated(scene(seed), f"a {colour} cat") for seed, colour in enumerate(["red", "blue", "green"] * 12)]
    together = clip_score()(images)
    assert together[[0, 35]] == pytest.approx([clip_score()([images[i]])[0] for i in (0, 35)], abs=1e-4)


def test_scoring_leaves_no_thread_behind():
    import threading

    clip_score()([generated(scene())])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clip")]


@pytest.mark.parametrize("model", ["/nowhere/at/all", "sdxl_lab/nano/base/vae"])
def test_a_clip_model_that_is_none_is_refused(model):
    with pytest.raises(MetricError, match=f"a CLIP model must be nano, a folder or a hub id.*received '{model}'"):
        clip_score(model)([generated(scene())])


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_names_what_each_metric_is():
    for name, metric in {**METRICS, "clip_score": clip_score()}.items():
        assert metric.name == name == find_metric(name).name
        assert metric.better in ("higher", "lower", None)
        assert metric.source


def test_every_metric_gives_one_float_an_image():
    drawn = [generated(scene(seed), unet_calls={"base": 1}, unet_rows={"base": 2}) for seed in (0, 1, 2)]
    for metric in [*METRICS.values(), clip_score()]:
        for count in (0, 1, 3):
            values = metric(drawn[:count], drawn[:count])
            assert (values.dtype, values.shape) == (np.float64, (count,)), metric


def test_an_unknown_metric_is_refused_by_listing_those_there_are():
    with pytest.raises(MetricError, match=r"one of sharpness, contrast.*, clip_score; received 'beauty'"):
        find_metric("beauty")


@pytest.mark.parametrize("name", REFERENCED)
def test_references_must_be_there_one_an_image_and_of_one_size(name):
    images = [generated(scene(0)), generated(scene(1))]
    with pytest.raises(MetricError, match="received 2 images and none references"):
        METRICS[name](images)
    with pytest.raises(MetricError, match="received 2 images and 1 references"):
        METRICS[name](images, images[:1])
    with pytest.raises(MetricError, match="image 1 is 128x128, its reference 64x96"):
        METRICS[name](images, [images[0], generated(Image.new("RGB", (64, 96)))])
