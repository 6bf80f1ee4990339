"""What a source image and its mask become, whatever camera or painting program wrote them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdxl_lab.config import ConfigError, GenerationConfig, HiresConfig, ModelRef
from sdxl_lab.job import ImageRequest
from sdxl_lab.source import SourceImage


def striped(width: int = 48, height: int = 32) -> Image.Image:
    """Red to the left, blue to the right, with a green line on top."""
    image = Image.new("RGB", (width, height), "blue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 2 - 1, height), fill="red")
    draw.rectangle((0, 0, width, 1), fill="lime")
    return image


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A JPEG, as a camera held on its side writes it."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, "JPEG", exif=exif, quality=100, subsampling=0)
    return Image.open(buffer)


def test_a_source_is_turned_upright_as_its_exif_says():
    upright = SourceImage(turned(striped().rotate(90, expand=True), 6)).image
    assert upright.size == (48, 32)
    assert np.abs(np.asarray(upright, dtype=int) - np.asarray(striped(), dtype=int)).mean() < 3
    assert upright.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("form", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_source_lies_on_white(form):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    buffer = io.BytesIO()
    image.convert(form).save(buffer, "PNG")
    flat = np.asarray(SourceImage(Image.open(buffer)).image)
    assert (flat[:, :4] == 0).all()
    assert (flat[:, 4:] == 255).all()


def test_half_transparent_red_on_white_is_pink():
    pixel = SourceImage(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).image.getpixel((0, 0))
    assert pixel == (255, 127, 127)


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("L", (8, 8), 77), 77),
        (Image.fromarray(np.full((8, 8), 300 * 257 // 2, dtype=np.uint16)), 150),
        (Image.new("1", (8, 8), 1), 255),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 255)), 0),
    ],
    ids=["grey", "16 bits", "1 bit", "CMYK"],
)
def test_a_source_of_any_mode_becomes_rgb_of_8_bits(image, grey):
    source = SourceImage(image)
    assert source.image.mode == "RGB"
    assert source.image.getpixel((3, 3)) == (grey, grey, grey)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_crop_keeps_the_shape_and_cuts_two_sides_alike():
    fitted = np.asarray(SourceImage(striped(96, 32)).fitted((32, 32)))
    assert (fitted[8:, :12, 0] > 250).all(), "red to the middle"
    assert (fitted[8:, 20:, 2] > 250).all()


def test_stretch_keeps_all_of_it():
    narrow = Image.new("RGB", (96, 32), "white")
    narrow.paste("black", (0, 0, 8, 32))
    fitted = np.asarray(SourceImage(narrow, fit="stretch").fitted((32, 32)))
    assert fitted[:, 0].max() < 60, "the edge is still there"
    assert np.asarray(SourceImage(narrow).fitted((32, 32)))[:, 0].min() > 200, "crop has cut it off"


def test_the_base_goes_over_it_at_the_configurations_size_the_refiner_at_its_own():
    assert SourceImage(striped(50, 39)).size((64, 128)) == (64, 128)
    assert SourceImage(striped(50, 39), stage="refiner").size((64, 128)) == (48, 32)
    request = ImageRequest(GenerationConfig(width=64, height=128), "a cat", 1, SourceImage(striped()))
    assert request.size == (64, 128)


# --- the mask --------------------------------------------------------------------------------------------------------


def halves(width: int, height: int) -> Image.Image:
    """White to the right."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def test_white_is_painted_anew_and_black_stays():
    mask = SourceImage(striped(32, 32), mask=halves(32, 32)).fitted_mask((32, 32))
    assert mask.dtype == np.float32
    assert mask[:, :16].max() == 0
    assert mask[:, 16:].min() == 1


def test_a_mask_is_cut_at_one_half():
    grey = Image.linear_gradient("L").resize((32, 256))
    mask = SourceImage(striped(32, 256), mask=grey).fitted_mask((32, 256))
    assert set(np.unique(mask)) == {0, 1}
    assert mask[:127].max() == 0
    assert mask[129:].min() == 1


def test_what_is_transparent_in_a_mask_stays():
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (16, 0, 32, 32))
    found = SourceImage(striped(32, 32), mask=mask).fitted_mask((32, 32))
    assert (found[:, :16].max(), found[:, 16:].min()) == (0, 1)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_a_mask_of_another_size_lies_over_the_source_and_is_fitted_with_it(fit):
    small, whole = (SourceImage(striped(96, 32), mask=halves(*size), fit=fit) for size in ((24, 64), (96, 32)))
    first, second = small.fitted_mask((32, 32)), whole.fitted_mask((32, 32))
    assert np.abs(first - second).mean() < 0.04
    red = np.asarray(whole.fitted((32, 32)))[8:, :, 0] > 127
    assert ((first[8:] == 0) == red).mean() > 0.95, "where the source is red, it stays"


def test_a_mask_is_turned_upright_too():
    mask = SourceImage(striped(48, 32), mask=turned(halves(48, 32).rotate(90, expand=True), 6)).fitted_mask((48, 32))
    assert (mask[:, :20].max(), mask[:, 28:].min()) == (0, 1)


def test_blur_rounds_a_masks_corners_and_moves_no_straight_edge():
    corner = Image.new("L", (64, 64), 0)
    corner.paste(255, (32, 32, 64, 64))
    sharp, blurred = (
        SourceImage(striped(64, 64), mask=corner, mask_blur=blur).fitted_mask((64, 64)) for blur in (0, 6)
    )
    assert sharp[32, 32] == 1
    assert blurred[32, 32] == 0
    assert abs(int(blurred[63].sum()) - 32) <= 1


def test_a_mask_without_white_is_refused():
    with pytest.raises(ConfigError, match="mask must be an image that is white where the source is to be painted"):
        SourceImage(striped(), mask=Image.new("L", (48, 32), 100))


# --- what is refused -------------------------------------------------------------------------------------------------

BAD = [
    ({"strength": 0}, "strength must be a number above 0, at most 1; received 0"),
    ({"strength": True}, "strength must be a number above 0, at most 1; received True"),
    ({"fit": "tile"}, "fit must be one of crop, stretch; received 'tile'. Example: fit = \"crop\""),
    ({"mask_blur": -1}, "mask_blur must be a number from 0 to 256"),
    ({"stage": "both"}, "stage must be base or refiner; received 'both'"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=str)
def test_what_a_source_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigError) as caught:
        SourceImage(striped(), **given)
    assert said in str(caught.value)


def test_the_base_goes_over_a_source_without_a_refiner():
    config = GenerationConfig(model=ModelRef(refiner=None))
    assert ImageRequest(config, "a cat", 1, SourceImage(striped())).source.stage == "base"


def test_a_source_with_a_second_pass_is_refused_but_for_the_refiner():
    config = GenerationConfig(hires=HiresConfig())
    with pytest.raises(ConfigError, match="hires must be left out where there is a source image"):
        ImageRequest(config, "a cat", 1, SourceImage(striped()))
    ImageRequest(config, "a cat", 1, SourceImage(striped(), stage="refiner"))


# --- what names it ---------------------------------------------------------------------------------------------------


def test_the_checksum_is_of_the_pixels_whatever_file_holds_them():
    png, bmp = io.BytesIO(), io.BytesIO()
    striped().save(png, "PNG", compress_level=9)
    striped().save(bmp, "BMP")
    first, second = (SourceImage(Image.open(file)).sha256 for file in (png, bmp))
    assert first == second == SourceImage(striped()).sha256
    assert first != SourceImage(striped(49, 32)).sha256
    changed = striped()
    changed.putpixel((0, 31), (254, 0, 0))
    assert first != SourceImage(changed).sha256
    assert SourceImage(Image.new("RGB", (4, 8))).sha256 != SourceImage(Image.new("RGB", (8, 4))).sha256


def test_a_record_names_source_and_mask_and_tells_others_apart():
    source = SourceImage(striped(), mask=halves(48, 32), mask_blur=3)
    record = source.to_record()
    assert (record.size, record.stage, record.fit, record.mask_blur) == ((48, 32), "base", "crop", 3.0)
    assert source.differs(record) == []
    assert SourceImage(striped(), mask=halves(24, 32)).differs(record) == ["mask"]
    assert SourceImage(striped()).differs(record) == ["mask"]
    assert SourceImage(striped(50)).differs(record) == ["source", "mask"]
