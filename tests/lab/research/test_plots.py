"""Grids: every image under its label, in its place. Curves: the numbers behind them, and that they are drawn."""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor

from sdxl_lab.images import GeneratedImage
from sdxl_lab.research import plots
from sdxl_lab.research.plots import LABEL, PlotError, curve, curves, front, grid, image_grid, quality_against_cost
from sdxl_lab.research.sheet import GAP
from tests.made import image_record

COLOURS = ["red", "green", "blue", "orange", "purple"]


def images(count):
    return [Image.new("RGB", (40, 24), colour) for colour in COLOURS[:count]]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, None, 1), (3, None, 1), (5, 2, 3), (4, 4, 1), (2, 5, 1)])
def test_every_image_stands_in_its_place(count, columns, rows):
    sheet = grid(images(count), ["a"] * count, columns)
    across = columns or count
    assert sheet.size == (across * (40 + GAP) + GAP, rows * (24 + LABEL + GAP) + GAP)
    for index, image in enumerate(images(count)):
        x, y = GAP + index % across * (40 + GAP), GAP + LABEL + index // across * (24 + LABEL + GAP)
        assert sheet.crop((x, y, x + 40, y + 24)).tobytes() == image.tobytes()


def test_a_long_label_stays_above_its_own_image():
    sheet = np.asarray(grid(images(2), ["a label much too long for forty pixels", ""]))
    beside = sheet[GAP : GAP + LABEL, GAP + 40 :]
    assert (sheet[GAP : GAP + LABEL, : GAP + 40] != 255).any()
    assert (beside == 255).all()


@pytest.mark.parametrize(("count", "labels"), [(2, ["a"]), (0, []), (1, ["a", "b"])])
def test_labels_that_do_not_match_are_refused(count, labels):
    with pytest.raises(ValueError, match=f"received {count} images, {len(labels)} labels"):
        grid(images(count), labels)


# --- grids of tables -----------------------------------------------------------------------------------------------

SIDE = 40


def colour_of(key):
    """A colour for each image, none of them a gray."""
    number = int(key)
    return (200 + number % 50, 37 * number % 120, 60 + 5 * number % 100)


def drawn(key):
    return GeneratedImage(Image.new("RGB", (SIDE, SIDE), colour_of(key)), image_record(prompt="a red cat", seed=0), {})


def table_of(**axes):
    """A sweep's table: every combination, its row number the image's id."""
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    table = pd.DataFrame(rows).assign(image=[str(number) for number in range(len(rows))], error=None)
    return table.assign(**{name: value for name, value in (("prompt", "a red cat"), ("seed", 0)) if name not in table})


def places(sheet, table):
    """Where each image stands, (left, top), by its colour; each must be there whole."""
    pixels = np.asarray(sheet)
    found = {}
    for key in table["image"]:
        ys, xs = np.nonzero((pixels == colour_of(key)).all(axis=-1))
        assert len(ys) == SIDE * SIDE, f"image {key} is not there whole"
        found[key] = (xs.min(), ys.min())
    return found


def test_two_axes_put_every_image_in_its_column_and_row():
    table = table_of(scheduler=["unipc", "euler"], steps=[20, 4, 10]).sample(frac=1, random_state=1)
    table = table.sort_values("scheduler", ascending=False)
    at = places(image_grid(table, drawn, "steps", "scheduler"), table)
    left = {steps: {at[key][0] for key in table[table.steps == steps].image} for steps in (4, 10, 20)}
    top = {name: {at[key][1] for key in table[table.scheduler == name].image} for name in ("unipc", "euler")}
    assert all(len(each) == 1 for each in [*left.values(), *top.values()])
    assert min(left[4]) < min(left[10]) < min(left[20]), "numbers go by size"
    assert min(top["unipc"]) < min(top["euler"]), "names go as the table has them"


@pytest.mark.parametrize(("width", "rows"), [(2000, 1), (500, 2), (300, 4)])
def test_the_third_axis_makes_panels_as_many_beside_one_another_as_fit(width, rows):
    table = table_of(steps=[4, 10], prompt=["a cat", "a dog"], seed=[0, 1, 2, 3])
    sheet = image_grid(table, drawn, "steps", "prompt", "seed", width=width)
    at = places(sheet, table)
    corners = [at[table[(table.seed == seed) & (table.steps == 4)].image.iloc[0]] for seed in range(4)]
    assert sheet.width <= width
    assert len({top for _, top in corners}) == rows
    assert sorted(corners, key=lambda corner: (corner[1], corner[0])) == corners


def test_a_value_changes_its_own_label_and_nothing_else():
    table = table_of(scheduler=["heun", "ddim"], steps=[4, 10])
    before = np.asarray(image_grid(table, drawn, "steps", "scheduler"), dtype=int)
    after = np.asarray(image_grid(table.replace({"ddim": "deis"}), drawn, "steps", "scheduler"), dtype=int)
    ys, xs = np.nonzero((before != after).any(axis=-1))
    left, top = places(Image.fromarray(before.astype(np.uint8)), table)["2"]
    assert len(ys)
    assert xs.max() < left
    assert top <= ys.min() <= ys.max() < top + SIDE


def test_what_all_images_share_and_the_numbers_asked_for_take_room():
    table = table_of(steps=[4, 10]).assign(clip_score=[21.5, 22.5])
    plain = image_grid(table.drop(columns=["prompt", "seed"]), drawn, "steps")
    titled = image_grid(table, drawn, "steps")
    noted = image_grid(table, drawn, "steps", notes=["clip_score"])
    assert plain.height < titled.height < noted.height
    assert places(titled, table)["0"][1] > places(plain, table)["0"][1]


def test_a_failed_cell_says_why_and_one_that_was_not_asked_for_stays_empty():
    table = table_of(scheduler=["euler", "lcm"], steps=[4, 60]).drop(index=1)
    table.loc[3, ["image", "error"]] = [None, "ConfigError: steps must be at most 50"]
    sheet = np.asarray(image_grid(table, drawn, "steps", "scheduler"))
    at = places(Image.fromarray(sheet), table[table.image.notna()])
    right = at["2"][0] + SIDE + GAP
    empty = sheet[at["0"][1] :, right:][:SIDE, :SIDE]
    failed = sheet[at["2"][1] :, right:][:SIDE, :SIDE]
    assert (empty == (0xEC, 0xEF, 0xF2)).all()
    assert (failed != (0xEC, 0xEF, 0xF2)).any()


def test_images_are_made_smaller_never_larger():
    table = table_of(steps=[4, 10])
    whole, half = (image_grid(table, drawn, "steps", side=side) for side in (2 * SIDE, SIDE // 2))
    assert places(whole, table)
    assert half.height == whole.height - SIDE // 2
    assert (np.asarray(half) == colour_of("0")).all(axis=-1).sum() == (SIDE // 2) ** 2


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            lambda t: t.assign(seed=[0, 1, 0, 1], steps=4),
            "at scheduler euler, steps 4 the table has 2, which differ in seed",
        ),
        (lambda t: t.drop(columns="steps"), "must be of the table's columns .*; received 'steps'"),
        (lambda t: t[:0], "at least one row"),
    ],
)
def test_a_table_that_a_grid_cannot_show_is_refused(change, rule):
    with pytest.raises(PlotError, match=rule):
        image_grid(change(table_of(scheduler=["euler", "heun"], steps=[4, 10])), drawn, "steps", "scheduler")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (float("nan"), "none"),
        (0.30000000000000004, "0.3"),
        (25, "25"),
        ("euler", "euler"),
        ("[0.28, 5.42]", "0.28 to 5.42"),
        ('{"handover": 0.8, "aesthetic_score": 6.0}', "handover 0.8, aesthetic score 6"),
        ("[a cat", "[a cat"),
    ],
)
def test_values_are_said_as_people_say_them(value, text):
    assert plots.value_label(value) == text


# --- curves --------------------------------------------------------------------------------------------------------


def measured(values, noise=0.0):
    """Scheduler and steps to (quality, seconds), for three prompts and two seeds of very different difficulty."""
    rng = np.random.default_rng(0)
    rows = [
        {"scheduler": s, "steps": n, "prompt": p, "seed": k, "seconds": cost, "image": "0", "error": None}
        | {"clip_score": quality + 10 * index + k + rng.normal(0, noise)}
        for (s, n), (quality, cost) in values.items()
        for index, p in enumerate("abc")
        for k in (0, 1)
    ]
    return pd.DataFrame(rows)


POINTS = {
    ("euler", 4): (1.0, 1.0),
    ("euler", 8): (2.0, 2.0),
    ("heun", 4): (1.5, 2.0),
    ("heun", 8): (2.0, 4.0),
    ("lcm", 4): (3.0, 5.0),
}


def test_the_front_is_what_nothing_beats():
    found = front(measured(POINTS), ["scheduler", "steps"])
    assert list(found.cost) == [1, 2, 2, 4, 5]
    on = found[found.front]
    assert list(zip(on.scheduler, on.steps, strict=True)) == [("euler", 4), ("euler", 8), ("lcm", 4)]
    assert list(on.quality) == pytest.approx([11.5, 12.5, 13.5])
    assert set(found["count"]) == {6}


def test_where_lower_is_better_the_front_is_the_other_one():
    table = measured(POINTS)
    assert list(front(table, ["scheduler", "steps"], better="lower").front) == [True, False, False, False, False]
    assert front(table.rename(columns={"clip_score": "clipping"}), ["scheduler", "steps"], "clipping").front.sum() == 1


def test_intervals_are_those_within_pairs():
    """The prompts differ by 10 among themselves, the settings by 1: what counts is that each prompt agrees."""
    sure, unsure = (front(measured(POINTS, noise), ["scheduler", "steps"]) for noise in (0.0, 1.0))
    assert (sure.high - sure.low).max() == pytest.approx(0, abs=1e-9)
    assert ((unsure.high - unsure.low) < 6).all()
    assert ((unsure.low < unsure.quality) & (unsure.quality < unsure.high)).all()


def test_all_are_judged_by_the_same_images():
    table = measured(POINTS)
    hard = (table.scheduler == "lcm") & (table.prompt == "a")
    table.loc[hard, "clip_score"] = np.nan
    table.loc[(table.scheduler == "heun") & (table.steps == 8), "clip_score"] = np.nan
    found = front(table, ["scheduler", "steps"])
    assert set(found["count"]) == {4}
    assert len(found) == 4
    assert found.quality.max() == pytest.approx(3.0 + 15.5)


def test_worse_is_what_the_pairs_agree_on():
    table = measured(POINTS)
    found = front(table, ["scheduler", "steps"])
    assert list(found.worse) == [True, True, True, True, False]
    doubtful = table.copy()
    doubtful.loc[(table.scheduler == "euler") & (table.steps == 8), "clip_score"] += [4, 4, -3, -3, 1, 1]
    chosen = front(doubtful, ["scheduler", "steps"])
    assert list(chosen[~chosen.worse].cost) == [2, 5]
    assert not front(table[(table.prompt == "a") & (table.seed == 0)], ["scheduler", "steps"]).worse.any()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: t.assign(clip_score=np.nan), "a prompt and seed with clip_score and seconds for every scheduler"),
        (lambda t: t.drop(columns="seconds"), "received 'seconds'"),
        (lambda t: t.assign(steps=4), "one image a prompt and seed at each scheduler, steps; at euler, 4 there are"),
        (lambda t: t[:0], "at least one row"),
    ],
)
def test_a_table_without_a_front_is_refused(change, rule):
    with pytest.raises(PlotError, match=rule):
        quality_against_cost(change(measured(POINTS)))


def count(sheet, colour):
    return int((np.asarray(sheet) == ImageColor.getrgb(colour)).all(axis=-1).sum())


def test_quality_against_cost_draws_every_line_and_the_front():
    table = measured(POINTS, 0.3)
    sheet = quality_against_cost(table)
    assert sheet.width > 1200
    assert all(count(sheet, colour) > 20 for colour in plots.COLOURS[:3])
    assert count(sheet, plots.COLOURS[3]) == 0
    assert sheet.tobytes() == quality_against_cost(table).tobytes()
    assert sheet.tobytes() != quality_against_cost(table, better="lower").tobytes()


def test_eighteen_lines_have_eighteen_looks():
    marks = itertools.islice(plots._marks(), 18)
    assert len(set(zip(itertools.cycle(plots.COLOURS), marks, strict=False))) == 18


def handed_over():
    """The refiner adds twice the hand-over to each image, whatever the prompt and the seed."""
    return pd.DataFrame(
        {"refiner.handover": h, "score": s, "prompt": p, "seed": k, "image": "0"}
        | {"sharpness": (0 if h is None else 2 * h) + 10 * index + k}
        for h in (None, 0.5, 0.8)
        for s in (2.0, 6.0)
        for index, p in enumerate("abc")
        for k in (0, 1)
        if h is not None or s == 2.0
    )


def test_a_curve_beside_a_baseline_is_the_paired_difference():
    table = handed_over()
    base = table[table["refiner.handover"].isna()]
    line = curve(table[table.score == 6.0].dropna(), "refiner.handover", "sharpness", base)
    assert list(line["refiner.handover"]) == [0.5, 0.8]
    for column in ("mean", "low", "high"):
        assert list(line[column]) == pytest.approx([1.0, 1.6])
    alone = curve(table[table.score == 6.0].dropna(), "refiner.handover", "sharpness")
    assert list(alone["mean"]) == pytest.approx([11.5, 12.1])
    assert (alone.high - alone.low > 5).all()


def test_curves_are_drawn_a_panel_a_metric_and_leave_matplotlib_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    table = handed_over().assign(contrast=0.5)
    base = table[table["refiner.handover"].isna()]
    one, two = (
        curves(table, "refiner.handover", metrics, "score", baseline=base)
        for metrics in (["sharpness"], ["sharpness", "contrast"])
    )
    assert dict(mpl.rcParams) == before
    assert two.width > one.width
    assert all(count(two, colour) > 20 for colour in plots.COLOURS[:2])
    assert curves(table, "refiner.handover", ["sharpness"], "score").tobytes() != one.tobytes()


@pytest.mark.parametrize(
    ("series", "base", "rule"),
    [
        (None, None, "one image a prompt and seed at each refiner.handover; at 0.5 there are several"),
        ("score", lambda t: t[(t.prompt != "b") & t["refiner.handover"].isna()], "it lacks 'b', seed 0"),
        ("taste", None, "received 'taste'"),
    ],
)
def test_curves_that_would_mislead_are_refused(series, base, rule):
    table = handed_over()
    with pytest.raises(PlotError, match=rule):
        curves(table, "refiner.handover", ["sharpness"], series, baseline=base and base(table))
