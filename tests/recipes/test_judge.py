"""The judge against images whose truth is known: what is so is accepted, what is not so is refused."""

import ast
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from recipes.nano import judge as judging
from recipes.nano.judge import UNKNOWN, FoundThing, judge, look
from recipes.nano.scenes import COLOURS, NOUNS, RELATIONS, Scene, Thing, render, sample_scene

Description = tuple[str, list[tuple[str, str]], str | None]


def scenes(count: int, seed: int) -> Iterator[Scene]:
    rng = random.Random(seed)
    return (sample_scene(rng, hat=0.0) for _ in range(count))


def truth(scene: Scene) -> Description:
    return scene.background, [(thing.colour, thing.noun) for thing in scene.things], scene.relation


def worn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image as a small model might have drawn it: blurred, noisy, a little out of shape."""
    (a, b), (c, d) = np.eye(2) + rng.uniform(-0.04, 0.04, (2, 2))
    middle = image.width / 2
    corner = (middle * (1 - a - b), middle * (1 - c - d))
    ground = image.getpixel((1, image.height // 2))
    bent = image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, corner[0], c, d, corner[1]),
        Image.Resampling.BICUBIC,
        fillcolor=ground,
    )
    soft = np.asarray(bent.filter(ImageFilter.GaussianBlur(1.5)), dtype=float)
    return Image.fromarray(np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8))


def lies(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Description]]:
    """The scene's description with one attribute made wrong, and which."""
    background, things, relation = truth(scene)
    (colour, noun), *rest = things

    def other(choices: tuple[str, ...], than: str) -> str:
        return rng.choice([choice for choice in choices if choice != than])

    names = tuple(COLOURS)
    yield "background", (other(names, background), things, relation)
    yield "colour", (background, [(other(names, colour), noun), *rest], relation)
    yield "noun", (background, [(colour, other(NOUNS, noun)), *rest], relation)
    if relation is None:
        yield "count", (background, [*things, (other(names, background), rng.choice(NOUNS))], None)
    else:
        yield "count", (background, things[:1], None)
        yield "relation", (background, things, other(RELATIONS, relation))
        yield "relation", (background, things[::-1], relation)


def drawn(outline: list[tuple[float, float]]) -> Image.Image:
    """A red polygon on blue; its points are fractions of the side."""
    image = Image.new("RGB", (256, 256), COLOURS["blue"])
    ImageDraw.Draw(image).polygon([(256 * x, 256 * y) for x, y in outline], fill=COLOURS["red"])
    return image


@pytest.mark.slow
def test_true_descriptions_are_right_and_false_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    count, rng = 150, random.Random(5)
    right: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for scene in scenes(count, seed=4):
        image = render(scene)
        seen = look(image)
        with monkeypatch.context() as patch:  # one look serves every description of the image
            patch.setattr(judging, "look", lambda _, seen=seen: seen)
            verdict = judge(image, *truth(scene))
            for part in ("right", "background", "count", "colour", "noun", "relation"):
                right[part] += getattr(verdict, part)
            for attribute, description in lies(scene, rng):
                told[attribute] += 1
                denied = judge(image, *description)
                refused[attribute] += not denied.right and not getattr(denied, attribute)
    assert right["right"] >= 0.97 * count, right
    assert min(right.values()) >= 0.97 * count, right
    assert all(right[part] >= 0.98 * count for part in right if part != "right"), right
    assert set(told) == {"background", "count", "colour", "noun", "relation"}
    assert all(refused[attribute] >= 0.98 * told[attribute] for attribute in told), (refused, told)


@pytest.mark.slow
def test_blurred_noisy_and_bent_images_are_still_read() -> None:
    rng = np.random.default_rng(6)
    right = [judge(worn(render(scene), rng), *truth(scene)).right for scene in scenes(40, seed=7)]
    assert np.mean(right) >= 0.93


@pytest.mark.parametrize("side", [128, 200, 512])
def test_images_of_other_sides_are_read_alike(side: int) -> None:
    right = [judge(render(scene, side), *truth(scene)).right for scene in scenes(6, seed=8)]
    assert all(right)


@pytest.mark.parametrize("noun", NOUNS)
def test_each_noun_is_known_small_and_large_dark_and_pale(noun: str) -> None:
    for colour, background, radius in (("black", "orange", 0.15), ("pink", "cyan", 0.2), ("blue", "white", 0.4)):
        ground, (seen,) = look(render(Scene(background, (Thing(noun, colour, 0.45, 0.55, radius),))))
        assert (ground, seen.colour, seen.noun) == (background, colour, noun)


@pytest.mark.parametrize("colour", COLOURS)
def test_each_colour_is_known_on_dark_bright_and_pale_ground(colour: str) -> None:
    for background in {"black", "orange", "white"} - {colour}:
        ground, (seen,) = look(render(Scene(background, (Thing("house", colour, 0.5, 0.5, 0.25),)), 128))
        assert (ground, seen.colour) == (background, colour)


def test_where_and_how_large_a_thing_is() -> None:
    _, (seen,) = look(render(Scene("green", (Thing("square", "white", 0.4, 0.6, 0.25),))))
    assert (seen.x, seen.y, seen.size) == pytest.approx((0.4, 0.6, 0.84 * 0.25), abs=0.01)


def test_the_larger_thing_comes_first() -> None:
    things = (Thing("cross", "red", 0.2, 0.5, 0.1), Thing("cross", "red", 0.65, 0.5, 0.25))
    _, seen = look(render(Scene("white", things)))
    assert [thing.x for thing in seen] == pytest.approx([0.65, 0.2], abs=0.01)


@pytest.mark.parametrize("background", COLOURS)
def test_a_plain_background_holds_nothing(background: str) -> None:
    assert look(render(Scene(background, ()))) == (background, [])


def test_nothing_is_not_a_cat() -> None:
    verdict = judge(render(Scene("blue", ())), "blue", [("red", "cat")], None)
    assert verdict.background
    assert not any((verdict.count, verdict.colour, verdict.noun))


def test_noise_is_nothing_that_has_a_name() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    background, seen = look(Image.fromarray(noise))
    assert background == UNKNOWN
    assert all(thing.noun == UNKNOWN for thing in seen)


@pytest.mark.parametrize(
    ("what", "outline"),
    [
        ("a bar", [(0.2, 0.4), (0.8, 0.4), (0.8, 0.6), (0.2, 0.6)]),
        ("a squat rectangle", [(0.2, 0.28), (0.8, 0.28), (0.8, 0.72), (0.2, 0.72)]),
        ("a triangle on its tip", [(0.2, 0.25), (0.8, 0.25), (0.5, 0.8)]),
        ("an arrow", [(0.5, 0.2), (0.8, 0.5), (0.6, 0.5), (0.6, 0.8), (0.4, 0.8), (0.4, 0.5), (0.2, 0.5)]),
        ("an ell", [(0.2, 0.2), (0.45, 0.2), (0.45, 0.6), (0.8, 0.6), (0.8, 0.8), (0.2, 0.8)]),
        ("a pentagon", [(0.5, 0.2), (0.79, 0.41), (0.68, 0.75), (0.32, 0.75), (0.21, 0.41)]),
        ("an ellipse", [(0.5 + 0.3 * np.cos(a), 0.5 + 0.22 * np.sin(a)) for a in np.arange(0, 2 * np.pi, 0.1)]),
    ],
)
def test_a_shape_outside_the_vocabulary_is_unknown(what: str, outline: list[tuple[float, float]]) -> None:
    _, (seen,) = look(drawn(outline))
    assert (seen.noun, seen.colour) == (UNKNOWN, "red"), what


@pytest.mark.parametrize("noun", ["cat", "fish", "house", "tree", "flower", "boat"])
def test_half_a_thing_is_not_the_thing(noun: str) -> None:
    whole, empty = render(Scene("cyan", (Thing(noun, "red", 0.5, 0.5, 0.3),))), render(Scene("cyan", ()))
    for box in ((0, 0, 128, 256), (0, 128, 256, 256), (0, 0, 256, 128)):
        half = whole.copy()
        half.paste(empty.crop(box), box[:2])
        assert noun not in {seen.noun for seen in look(half)[1]}


def test_a_smear_is_unknown() -> None:
    cat = render(Scene("white", (Thing("cat", "purple", 0.5, 0.5, 0.25),)))
    assert {seen.noun for seen in look(cat.filter(ImageFilter.GaussianBlur(14)))[1]} <= {UNKNOWN}


def test_a_thing_of_two_colours_has_no_colour() -> None:
    red, blue = (render(Scene("white", (Thing("circle", colour, 0.5, 0.5, 0.3),))) for colour in ("red", "blue"))
    red.paste(blue.crop((128, 0, 256, 256)), (128, 0))
    _, (seen,) = look(red)
    assert (seen.noun, seen.colour) == ("circle", UNKNOWN)


def test_things_are_matched_to_the_best_of_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [FoundThing("cat", "red", 0.2, 0.5, 0.2), FoundThing("fish", "red", 0.8, 0.5, 0.2)]
    monkeypatch.setattr(judging, "look", lambda _: ("white", seen))
    image = Image.new("RGB", (8, 8))
    assert judge(image, "white", [("red", "fish"), ("red", "cat")], "right of").right
    third = judge(image, "white", [("red", "fish"), ("blue", "cat")], "right of")
    assert (third.count, third.colour, third.noun, third.relation) == (True, False, True, True)


@pytest.mark.parametrize(("things", "relation"), [([("red", "cat")], "above"), ([("red", "cat")] * 2, "inside")])
def test_a_relation_that_cannot_be_is_an_error(things: list[tuple[str, str]], relation: str) -> None:
    with pytest.raises(ValueError, match="a relation is one of left of"):
        judge(Image.new("RGB", (64, 64)), "black", things, relation)


def test_the_judge_is_independent_of_what_it_judges() -> None:
    tree = ast.parse(Path(judging.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else ["." * node.level + (node.module or "")]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"numpy", "scipy", "PIL"}
    assert not imported & {"importlib", "runpy", "subprocess"}
