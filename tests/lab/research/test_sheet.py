"""Words that fit: wrapped, and cut with an ellipsis. Where images stand is seen in `test_plots.py`."""

import pytest

from sdxl_lab.research.sheet import typeface, wrapped

LONG = "a red circle left of a blue star on a white background, drawn with care and a great deal of patience"


@pytest.mark.parametrize("width", [90, 128, 300])
def test_long_words_are_wrapped_and_what_is_left_over_is_an_ellipsis(width):
    font = typeface(13)
    whole = wrapped(LONG, font, width, 100)
    assert " ".join(whole).split() == LONG.split()
    assert all(font.getlength(line) <= width for line in whole)
    cut = wrapped(LONG, font, width, 2)
    assert len(cut) == 2
    assert cut[1].endswith("…")
    assert all(font.getlength(line) <= width for line in wrapped("x" * 400, font, width, 3))
