"""Images as files: the record, the A1111 text, the watermark, and what is no image."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdxl_lab.config import GenerationConfig, ModelRef, RefinerConfig, canonical
from sdxl_lab.images import (
    RECORD_KEY,
    WATERMARK_BITS,
    GeneratedImage,
    ImageError,
    a1111_parameters,
    beside,
    encode_png,
    finish,
    magnified_difference,
    max_difference,
    open_image,
    read_record,
    read_watermark,
)
from sdxl_lab.record import ImageRecord
from tests.made import image_record


def record(config: GenerationConfig | None = None, **more: object) -> ImageRecord:
    config = config or GenerationConfig(scheduler="dpmpp_2m_karras", negative_prompt="blurry, 模糊")
    said = {"prompt": "A cat in a hat, déjà vu", "seed": 2**63 - 1, "sampler": "DPM++ 2M Karras"}
    return image_record(config, **(said | more))


def scene(size: int = 256) -> np.ndarray:
    """Float pixels of a smooth image with some edges."""
    y, x = np.mgrid[0:size, 0:size] / size
    pixels = np.stack([x, y, (x + y) / 2], -1) * 0.6 + 0.2
    pixels[size // 4 : size // 2, size // 4 : size // 2] = (0.8, 0.3, 0.2)
    return pixels.astype(np.float32)


def png(image: Image.Image, **text: str) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_itxt(key, value)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


# --- the record ------------------------------------------------------------------------------------------------------


def test_the_record_comes_back_from_the_file_as_it_went_in(tmp_path):
    image = GeneratedImage(finish(scene(), watermark=False), record(), {})
    image.save(tmp_path / "new" / "folder" / "cat.png")
    assert read_record(tmp_path / "new" / "folder" / "cat.png") == record()
    assert read_record(image.png()) == record()
    assert max_difference(open_image(image.png()), image.image) == 0
    assert image._repr_png_() == image.png()


def test_the_file_holds_the_canonical_json_and_the_a1111_text():
    image = open_image(encode_png(Image.new("RGB", (8, 8)), record()))
    assert image.text[RECORD_KEY] == canonical(record().to_dict())
    assert image.text["parameters"] == a1111_parameters(record())


def test_equal_content_has_equal_canonical_text():
    assert canonical({"b": 1, "a": {"d": "é", "c": [1.5]}}) == '{"a":{"c":[1.5],"d":"é"},"b":1}'
    shuffled = dict(reversed(record().to_dict().items()))
    assert canonical(shuffled) == canonical(record().to_dict())
    assert json.loads(canonical(record().to_dict())) == record().to_dict()


def test_the_a1111_text_is_what_a1111_writes():
    assert a1111_parameters(record()).splitlines() == [
        "A cat in a hat, déjà vu",
        "Negative prompt: blurry, 模糊",
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 9223372036854775807, "
        "Size: 256x256, Model: nano, Version: SDXL Lab 0.1.0",
    ]


REFINING = GenerationConfig(refiner=RefinerConfig())
A1111 = [
    (record(GenerationConfig()), "Negative prompt", False),
    (record(GenerationConfig(refiner=RefinerConfig(handover=0.7))), "Refiner: nano, Refiner switch at: 0.7", True),
    (record(source=image_record(), strength=0.3), "Denoising strength: 0.3", True),
    (record(REFINING, source=image_record(), strength=0.3), "Refiner switch at", False),
    (record(GenerationConfig()), "Clip skip", False),
    (record(GenerationConfig(clip_skip=0)), "Model: nano, Clip skip: 2, Version", True),
    (record(GenerationConfig(clip_skip=1, refiner=RefinerConfig())), "Clip skip: 3, Refiner: nano", True),
    (
        record(GenerationConfig(clip_skip=1), source=image_record(), strength=0.3),
        "Denoising strength: 0.3, Clip skip: 3",
        True,
    ),
    (
        record(GenerationConfig(loras=["x/neon.safetensors:0.6", {"source": "y/b.safetensors", "sha256": "0a" * 32}])),
        "A cat in a hat, déjà vu <lora:neon:0.6> <lora:b:1>\n",
        True,
    ),
    (record(GenerationConfig(loras=["neon:0.6:0.3"])), "<lora:neon:0.3:0.6>", True),
    (
        record(GenerationConfig(loras=["neon:0.6"]), weights={"lora neon": "sha256 " + "1b" * 32}),
        'Lora hashes: "neon: 1b1b1b1b1b", Version',
        True,
    ),
    (
        record(GenerationConfig(loras=["neon:0.6"], prompt_syntax="a1111"), prompt="a cat <lora:neon:0.6>"),
        "<lora:neon:0.6> <lora",
        False,
    ),
    (
        record(GenerationConfig(sigma_schedule="sgm_uniform"), sampler="Euler"),
        "Euler, Schedule type: SGM Uniform",
        True,
    ),
    (record(GenerationConfig(sigma_schedule="beta"), sampler="Euler a"), "Euler a, Schedule type: Beta, CFG", True),
    (record(GenerationConfig(), sampler="Euler"), "Schedule type", False),
    (record(GenerationConfig(width=320, height=64)), "Size: 320x64", True),
    (record(GenerationConfig(model=ModelRef(base="some/model"))), "Model: some/model", True),
]


@pytest.mark.parametrize(("content", "said", "there"), A1111, ids=[said for _, said, _ in A1111])
def test_the_a1111_text_says_what_applies(content, said, there):
    assert (said in a1111_parameters(content)) is there


WRITTEN = [
    ({"prompt": "a (red) cat [1]"}, {}, r"a \(red\) cat \[1\]"),
    ({"prompt": "a (red:1.3) cat"}, {"prompt_syntax": "a1111"}, "a (red:1.3) cat"),
    ({"prompt": "a cat"}, {"negative_prompt": "(blurry)"}, "a cat\nNegative prompt: \\(blurry\\)"),
    (
        {"prompt": "a cat"},
        {"negative_prompt": "(blurry)", "prompt_syntax": "a1111"},
        "a cat\nNegative prompt: (blurry)",
    ),
    (
        {"prompt": "a <lora:ink:0.3> cat"},
        {"prompt_syntax": "a1111", "loras": [{"source": "ink.safetensors"}, {"source": "oil.safetensors"}]},
        "a <lora:ink:0.3> cat <lora:oil:1>\nSteps",
    ),
    ({"prompt": "a <lora:ink:0.3> cat"}, {"loras": [{"source": "ink.safetensors"}]}, "<lora:ink:1>\nSteps"),
]


@pytest.mark.parametrize(("said", "settings", "expected"), WRITTEN, ids=[expected for _, _, expected in WRITTEN])
def test_prompts_are_written_in_a1111s_notation(said, settings, expected):
    assert expected in a1111_parameters(record(GenerationConfig(**settings), **said))


def test_embeddings_are_written_as_a1111_writes_them():
    known = {"token": "ink", "source": "a.safetensors", "sha256": "ab" * 32}
    refs = [known, {"token": "oil", "source": "b.safetensors"}]
    assert 'TI hashes: "ink: abababababab, oil: unknown"' in a1111_parameters(record(GenerationConfig(embeddings=refs)))


FOREIGN = {
    "no record": png(Image.new("RGB", (8, 8)), parameters="a cat\nSteps: 20"),
    "a JPEG": (lambda buffer: (Image.new("RGB", (8, 8)).save(buffer, "JPEG"), buffer.getvalue())[1])(io.BytesIO()),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_image_has_no_record(content, tmp_path):
    (tmp_path / "theirs.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"theirs\.png carries no sdxl_lab record; only PNGs written by SDXL Lab do"):
        read_record(tmp_path / "theirs.png")
    with pytest.raises(ImageError, match="the image carries no sdxl_lab record"):
        read_record(content)


OURS = encode_png(finish(scene(64), watermark=False), record())
NO_PICTURES = {"nothing": b"", "text": b"hello", "cut short": OURS[: len(OURS) // 2], "header only": OURS[:8]}


@pytest.mark.parametrize("content", NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_is_no_image_is_refused(content, tmp_path):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"cannot read .*broken\.png as an image"):
        open_image(tmp_path / "broken.png")
    with pytest.raises(ImageError, match="cannot read the bytes as an image"):
        read_record(content)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ImageError, match=r"missing\.png"):
        open_image(tmp_path / "missing.png")


# --- from floats to 8 bits -------------------------------------------------------------------------------------------


def test_pixels_are_rounded_not_cut():
    pixels = np.array([[[0.0, 1.0, 0.5], [0.999, 0.001, 0.1]]], dtype=np.float32)
    assert np.asarray(finish(pixels, watermark=False)).tolist() == [[[0, 255, 128], [255, 0, 26]]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_image_with_one_non_finite_pixel_is_refused(bad):
    pixels = scene(64)
    pixels[3, 4, 1] = bad
    with pytest.raises(
        ImageError, match=r"non-finite pixels: the denoising or the VAE overflowed.*use float32 or bfloat16"
    ):
        finish(pixels, watermark=False)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_image_of_one_value_is_refused(value):
    with pytest.raises(ImageError, match=f"every pixel of the image is {value:g}"):
        finish(np.full((64, 64, 3), value, dtype=np.float32), watermark=False)


def test_the_watermark_can_be_read_and_is_hardly_seen():
    plain, marked = (finish(scene(), watermark=watermark) for watermark in (False, True))
    assert read_watermark(marked) == WATERMARK_BITS
    assert read_watermark(plain) != WATERMARK_BITS
    assert 0 < max_difference(plain, marked) < 0.15


def test_the_watermark_is_the_one_of_diffusers():
    from diffusers.pipelines.stable_diffusion_xl.watermark import WATERMARK_BITS as THEIRS

    assert THEIRS == WATERMARK_BITS


# --- the difference of two images ----------------------------------------------------------------------------------


def test_one_changed_channel_of_one_pixel_is_noticed():
    first = Image.new("RGB", (64, 48), (10, 20, 30))
    second = first.copy()
    assert max_difference(first, second) == 0
    second.putpixel((63, 47), (10, 20, 31))
    assert max_difference(first, second) == pytest.approx(1 / 255)
    second.putpixel((0, 0), (255, 20, 30))
    assert max_difference(second, first) == pytest.approx(245 / 255)


def test_images_of_different_size_are_not_compared():
    with pytest.raises(ImageError, match=r"different size cannot be compared: \(8, 8\) and \(8, 16\)"):
        max_difference(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16)))


def test_what_is_shown_beside_a_image_is_as_large_as_it_is() -> None:
    first, second = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), (10, 0, 0))
    after, difference, said = beside(first, second)
    assert (after, difference.getpixel((0, 0)), said) == (second, (255, 0, 0), "difference x25.5")
    after, difference, said = beside(first, second.resize((8, 8)))
    assert (after.size, difference.size, said) == ((4, 2), (4, 2), "no difference: the sizes differ")


def test_the_magnified_difference_is_white_where_it_is_largest() -> None:
    first = Image.new("RGB", (4, 2))
    second = first.copy()
    second.putpixel((1, 0), (10, 0, 0))
    second.putpixel((2, 0), (0, 5, 0))
    shown, gain = magnified_difference(second, first)
    assert gain == 25.5
    assert [shown.getpixel((x, 0)) for x in range(4)] == [(0, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 0)]
    same, gain = magnified_difference(first, first)
    assert (same.getextrema(), gain) == (((0, 0),) * 3, 1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object; received"),
        ("null", "must be a JSON object; received None"),
        ("{}", "must hold a configuration"),
        (
            canonical(record().to_dict() | {"seed": "7"}),
            "seed must be a valid integer; received '7'. Example: seed = 7",
        ),
    ],
)
def test_a_damaged_record_is_no_record(text, said):
    with pytest.raises(ImageError, match=f"the record of the image .*{said}"):
        read_record(png(Image.new("RGB", (8, 8)), **{RECORD_KEY: text}))
