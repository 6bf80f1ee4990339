"""Grids: every picture under its label, in its place."""

import numpy as np
import pytest
from PIL import Image

from sdxl_lab.plots import GAP, LABEL, grid

COLOURS = ["red", "green", "blue", "orange", "purple"]


def pictures(count):
    return [Image.new("RGB", (40, 24), colour) for colour in COLOURS[:count]]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, None, 1), (3, None, 1), (5, 2, 3), (4, 4, 1), (2, 5, 1)])
def test_every_picture_stands_in_its_place(count, columns, rows):
    sheet = grid(pictures(count), ["a"] * count, columns)
    across = columns or count
    assert sheet.size == (across * (40 + GAP) + GAP, rows * (24 + LABEL + GAP) + GAP)
    for index, picture in enumerate(pictures(count)):
        x, y = GAP + index % across * (40 + GAP), GAP + LABEL + index // across * (24 + LABEL + GAP)
        assert sheet.crop((x, y, x + 40, y + 24)).tobytes() == picture.tobytes()


def test_a_long_label_stays_above_its_own_picture():
    sheet = np.asarray(grid(pictures(2), ["a label much too long for forty pixels", ""]))
    beside = sheet[GAP : GAP + LABEL, GAP + 40 :]
    assert (sheet[GAP : GAP + LABEL, : GAP + 40] != 255).any()
    assert (beside == 255).all()


@pytest.mark.parametrize(("count", "labels"), [(2, ["a"]), (0, []), (1, ["a", "b"])])
def test_labels_that_do_not_match_are_refused(count, labels):
    with pytest.raises(ValueError, match=f"received {count} pictures, {len(labels)} labels"):
        grid(pictures(count), labels)
