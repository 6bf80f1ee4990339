"""One comparison of goldens, and everybody who asks for it gets the same answer."""

import pytest

from sdxl_lab.images import GeneratedImage
from sdxl_lab.release.verify import compare_golden
from tests.made import image, put

CUDA = {"device": "cuda", "dtype": "float16"}
COMPARED = [
    ({}, "max-abs", 0.0, None),
    ({"colour": (254, 0, 0)}, "max-abs", 1 / 255, None),
    ({"colour": (253, 0, 0)}, "max-abs", 2 / 255, "the image differs by 0.0078 (max-abs on [0, 1]); at most 0.0039"),
    ({"colour": (240, 0, 0), "runtime": CUDA}, "mean-abs", 5 / 255, None),
    (
        {"colour": (239, 0, 0), "runtime": CUDA},
        "mean-abs",
        16 / 3 / 255,
        "differs by 0.0209 (mean-abs",
    ),
    (
        {"weights": {"base": "sha256 def"}},
        "max-abs",
        0.0,
        "the weights are not those it was promoted with: base was sha256 abc, is sha256 def",
    ),
]


@pytest.mark.parametrize(("changes", "measure", "difference", "said"), COMPARED)
def test_a_golden_is_compared_as_strictly_as_the_runtime_allows(slot, changes, measure, difference, said):
    found = compare_golden(put(slot).goldens[0], image(**changes))
    assert (found.measure, found.difference) == (measure, pytest.approx(difference))
    assert found.passed == (said is None)
    if said:
        assert found.reason.startswith("golden 01-a-cat-in-a-hat-7.png: ")
        assert said in found.reason


def test_a_image_of_another_size_is_another_image(slot):
    bigger = image()
    bigger = GeneratedImage(bigger.image.resize((24, 24)), bigger.record, {})
    assert not compare_golden(put(slot).goldens[0], bigger).passed
