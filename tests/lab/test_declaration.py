"""The machinery of declarations, on a class of settings made for it: kinds, the merge of changes, the digest."""

import hashlib
import math
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import ValidationError, model_validator

from sdxl_lab.declaration import (
    Choice,
    ConfigError,
    Declared,
    Falling,
    Number,
    Pair,
    Setting,
    Switch,
    Table,
    Tables,
    Text,
    Whole,
    canonical,
    nearest,
    short,
)


class Lens(Declared):
    EXAMPLE: ClassVar[str] = "focus"

    focus: Annotated[float, Setting(kind=Number(0, 10, between=True), label="Focus", help="how far", example=2.5)] = 1.0
    coated: Annotated[bool, Setting(kind=Switch(), label="Coated", help="against glare", example=True)] = False

    @classmethod
    def of(cls, value: object) -> Any:
        return cls(focus=9.0) if value == "tele" else super().of(value)


class Camera(Declared):
    EXAMPLE: ClassVar[str] = "shots"

    lens: Annotated[Lens, Setting(kind=Table(Lens), label="Lens", help="the glass", example={"focus": 2.5})] = Lens()
    flash: Annotated[
        Lens | None, Setting(kind=Table(Lens), label="Flash", help="its glass", example={"focus": 2.5}, client=True)
    ] = None
    shots: Annotated[int, Setting(kind=Whole(1, 9), label="Shots", help="how many", example=3, option="count")] = 1
    film: Annotated[str, Setting(kind=Choice(("fast", "slow")), label="Film", help="its kind", example="slow")] = "fast"
    frame: Annotated[
        tuple[int, int] | None,
        Setting(kind=Pair(Whole(8, 64, 8)), label="Frame", help="its size", example=(8, 16), unit="mm", step=8),
    ] = None
    span: Annotated[
        tuple[float, float],
        Setting(kind=Pair(Number(0, 5), increasing=True), label="Span", help="the light", example=(1, 2)),
    ] = (0.0, 5.0)
    title: Annotated[str | None, Setting(kind=Text(0, 9), label="Title", help="a word", example="cat", option=None)] = (
        None
    )

    @model_validator(mode="after")
    def _whole(self) -> "Camera":
        if self.film == "slow" and self.shots > 3:
            raise ConfigError("shots", self.shots, "at most 3 with slow film", 3)
        return self


# --- kinds -----------------------------------------------------------------------------------------------------------

VALUES = [
    # kind, a value, what is stored of it
    (Whole(1, 9), 9, 9),
    (Whole(8, 64, 8), 16, 16),
    (Number(0, 10), 10, 10.0),
    (Number(0, 10), -0.0, 0.0),
    (Number(0, 10, between=True), 1e-9, 1e-9),
    (Text(0, 3), "", ""),
    (Text(0, 3), "日本é", "日本é"),
    (Text(pattern="^c.t$", meaning="cat or cut"), "cut", "cut"),
    (Choice(("fast", "slow")), "slow", "slow"),
    (Switch(), False, False),
    (Pair(Whole(1, 9)), [2, 1], (2, 1)),
    (Pair(Number(0, 5), increasing=True), (1, 1), (1.0, 1.0)),
    (Falling(Whole(0, 9), 3), [5, 1], (5, 1)),
    (Falling(Whole(0, 9), 3), (5, 1, 0), (5, 1, 0)),
    (Falling(Number(0, 9, between=True), 3, to_zero=True), [5, 1.5, 0], (5.0, 1.5)),
    (Falling(Number(0, 9, between=True), 2, to_zero=True), (5.0, 1.0, 0.0), (5.0, 1.0)),
    (Table(Lens), Lens(), Lens()),
    (Tables(Lens), [], ()),
    (Tables(Lens), [{"focus": 3}, "tele", Lens()], (Lens(focus=3), Lens(focus=9), Lens())),
]


def setting(kind, **more):
    return Setting(kind=kind, label="A", help="a", example=1, **more).declared("a", kind.type, None)


@pytest.mark.parametrize(("kind", "value", "stored"), VALUES, ids=[f"{k} {v!r}" for k, v, _ in VALUES])
def test_a_value_that_holds_the_rule_is_stored(kind, value, stored):
    found = setting(kind).check(value)
    assert (found, type(found), str(found)) == (stored, type(stored), str(stored))


REFUSED = [
    (Whole(1, 9), [0, 10, 1.0, True, "1", None, [1], math.nan, 10**400], "a whole number from 1 to 9"),
    (Whole(8, 64, 8), [12, 72, 0], "a multiple of 8 from 8 to 64"),
    (Number(0, 10), [-1e-9, 10.1, True, "1", None, math.inf, math.nan, 10**400], "a number from 0 to 10"),
    (Number(0, 10, between=True), [0, 10], "a number above 0 and below 10"),
    (Text(1, 3), ["", "abcd", 5, None, b"ab", "a\0b", "\ud83d"], "text of 1 to 3 characters, without NUL or lone"),
    (Text(pattern="^c.t$", meaning="cat or cut"), ["dog", "cat\n"], "cat or cut"),
    (Choice(("fast", "slow")), ["FAST", "", None, ["fast"], 1], "one of fast, slow"),
    (Switch(), [1, 0, "true", None], "true or false"),
    (
        Pair(Whole(1, 9)),
        [(1,), (1, 2, 3), 5, None, (0, 1), "12", {1, 2}],
        "two values, each a whole number from 1 to 9",
    ),
    (
        Pair(Number(0, 5), increasing=True),
        [(2, 1), [5, 0]],
        "each a number from 0 to 5, the first not above the second",
    ),
    (
        Falling(Whole(0, 9), 3),
        [(), [], (1, 5), (5, 5), (4, 3, 2, 1), (10, 1), 5, "5", None, (5, None)],
        "up to 3 values, each a whole number from 0 to 9, the largest first",
    ),
    (
        Falling(Number(0, 9, between=True), 3, to_zero=True),
        [(0,), (5, 0, 0), (0, 5), ()],
        "up to 3 values, each a number above 0 and below 9, the largest first; a 0 at the end is left off",
    ),
    (Table(Lens), ["nano", 5, None, Camera()], "a Lens"),
    (Tables(Lens, most=2), ["tele", 5, None, Lens(), [5], [Lens()] * 3, [Camera()]], "a list of at most 2 Lens tables"),
]


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [(kind, value, words) for kind, values, words in REFUSED for value in values],
    ids=[f"{kind} {value!r:.20}" for kind, values, _ in REFUSED for value in values],
)
def test_a_value_that_breaks_the_rule_is_refused_with_its_words(kind, value, words):
    with pytest.raises(ConfigError) as caught:
        setting(kind).check(value)
    assert words in caught.value.rule == kind.words
    assert caught.value.received is value
    assert str(caught.value) == f"a must be {kind.words}; received {value!r}. Example: a = 1"


def test_the_rule_has_the_unit_and_says_what_may_be_left_out():
    assert Camera.settings()["frame"].rule == "two values, each a multiple of 8 from 8 to 64 (mm), or left out"
    assert Camera.settings()["title"].rule == "text of 0 to 9 characters, without NUL or lone surrogates, or left out"
    assert Camera.settings()["shots"].rule == "a whole number from 1 to 9"


READ = [(Whole(1, 9), "7", 7), (Number(0, 1), "0.5", 0.5), (Text(), "7", "7"), (Switch(), "true", True)]


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [*READ, (Pair(Whole(1, 9)), "7", 7), (Choice(("a",)), "b", "b"), (Falling(Whole(1, 9), 3), "7", 7)],
)
def test_a_word_of_a_command_line_becomes_a_value(kind, word, value):
    assert kind.read(word) == value


def test_a_list_is_written_as_it_is_read():
    kind = Falling(Number(0, 20), 9)
    assert kind.read_all("14.6, 3  0.5") == (14.6, 3.0, 0.5)
    assert kind.read_all(kind.written((14.615, 1e-3))) == (14.615, 1e-3)
    assert kind.read_all("") == ()
    with pytest.raises(ValueError, match="could not convert"):
        kind.read_all("14, much")


# --- the declaration -------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_fields_and_with_dotted_names_those_of_tables():
    names = [
        "lens",
        "lens.focus",
        "lens.coated",
        "flash",
        "flash.focus",
        "flash.coated",
        "shots",
        "film",
        "frame",
        "span",
        "title",
    ]
    found = Camera.settings()
    assert list(found) == names == [setting.name for setting in found.values()]
    assert [name for name, setting in found.items() if setting.optional] == ["flash", "frame", "title"]
    assert {name: found[name].default for name in ("lens.focus", "flash", "flash.focus", "shots", "span")} == {
        "lens.focus": 1.0,
        "flash": None,
        "flash.focus": 1.0,
        "shots": 1,
        "span": (0.0, 5.0),
    }
    assert [found[name].option for name in ("film", "shots", "title", "lens.coated")] == [
        "film",
        "count",
        None,
        "coated",
    ]


GLASS = Setting(kind=Whole(1, 9), label="Glass", help="a number", example=1)
CONTRADICTIONS = {
    "no declaration": ({"glass": int}, {"glass": 1}, "must be annotated with one Setting"),
    "two declarations": ({"glass": Annotated[int, GLASS, GLASS]}, {"glass": 1}, "must be annotated with one Setting"),
    "another type": ({"glass": Annotated[float, GLASS]}, {"glass": 1}, "as its kind says; it is <class 'float'>"),
    "a default for what may be left out": (
        {"glass": Annotated[int | None, GLASS]},
        {"glass": 1},
        "None must be its def",
    ),
}


@pytest.mark.parametrize(("annotations", "values", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_declaration_that_contradicts_itself_ends_the_import(annotations, values, said):
    with pytest.raises(TypeError, match=said):
        type("Bad", (Declared,), {"__annotations__": annotations, "EXAMPLE": "glass", **values})


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        Camera().shots = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Camera.settings()["shots"] = GLASS  # type: ignore[index]
    assert len({Camera(), Camera(), Camera(shots=2)}) == 2


ERRORS = [
    ({"shots": 0}, "shots must be a whole number from 1 to 9; received 0. Example: shots = 3"),
    ({"shots": 4, "film": "slow"}, "shots must be at most 3 with slow film; received 4. Example: shots = 3"),
    (
        {"frame": [8, 9]},
        "frame must be two values, each a multiple of 8 from 8 to 64 (mm), or left out; received [8, 9].",
    ),
    ({"lens": {"focus": 0}}, "lens.focus must be a number above 0 and below 10; received 0. Example: lens.focus = 2.5"),
    ({"lens": "wide"}, "lens must be a Lens; received 'wide'. Example: lens.focus = 2.5"),
    ({"flash": 5}, "flash must be a Lens; received 5. Example: flash.focus = 2.5"),
    (
        {"lens": {"foucs": 1}},
        "lens.foucs must be a field of Lens: focus, coated; received 1. Did you mean lens.focus? Ex",
    ),
    (
        {"shot": 2, "film": 5},
        "shot must be a field of Camera: lens, flash, shots, film, frame, span, title; received 2. ",
    ),
    ({"shot": 2}, "received 2. Did you mean shots? Example: shots = 3"),
    ({"zzz": 2}, "received 2. Example: shots = 3"),
    ({"lens": {"zzz": 2}}, "received 2. Example: lens.focus = 2.5"),
]


@pytest.mark.parametrize(("content", "said"), ERRORS, ids=[str(content) for content, _ in ERRORS])
def test_an_error_says_field_rule_value_and_example(content, said):
    for make in (lambda: Camera(**content), lambda: Camera.from_dict(content)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert said in str(caught.value)
        assert str(caught.value).startswith(caught.value.field)


@pytest.mark.parametrize(
    ("name", "value", "stored"), [("shots", 3, 3), ("span", [1, 2], (1.0, 2.0)), ("flash.focus", 3, 3.0)]
)
def test_one_value_is_checked_by_the_name_of_its_setting(name, value, stored):
    assert Camera.checked(name, value) == stored


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("shots", 0, "shots must be a whole"),
        ("lens.focus", 0, "lens.focus must be a number"),
        ("lens", {"focus": 0}, "lens.focus must be a number"),
        ("lens.foucs", 0, "lens.foucs must be a field of Camera.*Did you mean lens.focus?"),
    ],
)
def test_one_bad_value_is_refused_by_the_name_of_its_setting(name, value, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        Camera.checked(name, value)


def test_a_value_is_found_by_its_dotted_name():
    camera = Camera(lens=Lens(focus=3), shots=2)
    assert [camera.value(name) for name in ("shots", "lens.focus", "flash.focus")] == [2, 3.0, None]
    with pytest.raises(ConfigError, match="zoom must be a field of Camera"):
        camera.value("zoom")


def test_the_plain_form_leaves_out_none_and_can_be_read_again():
    camera = Camera(flash=Lens(focus=3), frame=(8, 16))
    assert camera.to_dict() == {
        "lens": {"focus": 1.0, "coated": False},
        "flash": {"focus": 3.0, "coated": False},
        "shots": 1,
        "film": "fast",
        "frame": [8, 16],
        "span": [0.0, 5.0],
    }
    assert Camera.from_dict(MappingProxyType(camera.to_dict())) == camera


# --- the merge -------------------------------------------------------------------------------------------------------

START = Camera(lens=Lens(coated=True), title="cat")
LIT = Camera(flash=Lens(focus=3, coated=True))
CHANGED = {
    "nothing": (START, {}, START),
    "a plain value": (START, {"shots": 2}, START.with_(shots=2)),
    "a list for a pair": (START, {"frame": [8, 16], "span": [1, 2]}, START.with_(frame=(8, 16), span=(1.0, 2.0))),
    "a dotted name keeps the rest": (START, {"lens.focus": 3}, START.with_(lens=Lens(focus=3, coated=True))),
    "a table replaces the whole": (START, {"lens": {"focus": 3}}, START.with_(lens=Lens(focus=3))),
    "a table, then its fields": (START, {"lens.focus": 4, "lens": {}}, START.with_(lens=Lens(focus=4))),
    "a name that the class knows": (START, {"lens": "tele"}, START.with_(lens=Lens(focus=9))),
    "settings themselves": (START, {"lens": Lens()}, START.with_(lens=Lens())),
    "none": (START, {"title": "none", "frame": "none", "flash": "none"}, START.with_(title=None)),
    "null": (LIT, {"flash": None}, Camera()),
    "a field brings its table": (START, {"flash.focus": 3}, START.with_(flash=Lens(focus=3))),
    "a table is switched on": (START, {"flash": True}, START.with_(flash=Lens())),
    "a table that is on stays as it is": (LIT, {"flash": True}, LIT),
    "a table is switched off": (LIT, {"flash": False}, Camera()),
    "on, with a field": (LIT, {"flash": True, "flash.focus": 5}, Camera(flash=Lens(focus=5, coated=True))),
    "what only holds all at once": (Camera(shots=4), {"film": "slow", "shots": 3}, Camera(film="slow", shots=3)),
}


@pytest.mark.parametrize(("start", "values", "expected"), CHANGED.values(), ids=CHANGED)
def test_plain_changes_go_over_settings_all_at_once(start, values, expected):
    assert start.changed(values) == expected
    assert start.changed(dict(reversed(values.items()))) == expected


NOT_CHANGED = [
    ({"shots": 0}, "shots must be a whole number from 1 to 9; received 0"),
    ({"shots": "none"}, "shots must be a whole number from 1 to 9; received 'none'"),
    ({"shots": 4, "film": "slow"}, "shots must be at most 3 with slow film"),
    ({"lens": True}, "lens must be a Lens; received True"),
    ({"lens": {"focus": 0}}, "lens.focus must be a number above 0 and below 10; received 0"),
    ({"lens.focus": 0}, "lens.focus must be a number above 0 and below 10; received 0. Example: lens.focus = 2.5"),
    ({"lens.foucs": 1}, "lens.foucs must be a field of Camera: lens, lens.focus, lens.coated"),
    ({"lens.focus.x": 1}, "lens.focus.x must be a field of Camera"),
    ({"shots.x": 1}, "shots.x must be a field of Camera"),
    ({"shoots": 1}, "received 1. Did you mean shots?"),
    ({"flash": "none", "flash.focus": 3}, "flash.focus must be left out where flash is; received 3"),
    ({"flash": 5, "flash.focus": 3}, "flash must be a Lens; received 5"),
]


@pytest.mark.parametrize(("values", "said"), NOT_CHANGED, ids=[str(values) for values, _ in NOT_CHANGED])
def test_changes_that_break_a_rule_are_refused(values, said):
    with pytest.raises(ConfigError) as caught:
        START.changed(values)
    assert said in str(caught.value)


def test_a_door_with_a_null_of_its_own_may_have_a_text_that_says_none():
    assert START.changed({"title": "none"}, none=None).title == "none"
    assert START.changed({"title": None}, none=None).title is None


@pytest.mark.parametrize("name", ["digest", "to_dict", "EXAMPLE", "model_config", "lens.focus"])
def test_only_fields_can_be_given_to_with(name):
    with pytest.raises(ConfigError, match=f"{name} must be a field of Camera"):
        START.with_(**{name: 1})


# --- lists of tables -------------------------------------------------------------------------------------------------


class Bag(Declared):
    EXAMPLE: ClassVar[str] = "lenses"

    lenses: Annotated[
        tuple[Lens, ...], Setting(kind=Tables(Lens), label="Lenses", help="in it", example=[{"focus": 2.5}])
    ] = ()


TWO = Bag(lenses=(Lens(focus=3), Lens(coated=True)))
IN_THE_BAG = {
    "a whole list": ({"lenses": [{"focus": 4}, "tele"]}, (Lens(focus=4), Lens(focus=9))),
    "a field by its place": ({"lenses.1.focus": 4}, (Lens(focus=3), Lens(focus=4, coated=True))),
    "a list, then its fields": ({"lenses.0.coated": True, "lenses": ["tele"]}, (Lens(focus=9, coated=True),)),
    "none": ({"lenses": "none"}, ()),
    "null": ({"lenses": None}, ()),
}


@pytest.mark.parametrize(("values", "lenses"), IN_THE_BAG.values(), ids=IN_THE_BAG)
def test_changes_reach_into_a_list_of_tables(values, lenses):
    assert TWO.changed(values) == Bag(lenses=lenses)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"lenses": [{}, {"focus": 0}]},
            "lenses.1.focus must be a number above 0 and below 10; received 0. Example: l",
        ),
        ({"lenses.1.focus": 0}, "lenses.1.focus must be a number above 0 and below 10; received 0"),
        ({"lenses.2.focus": 1}, "lenses.2.focus must be a setting of one of the 2 that are there, counted from 0"),
        ({"lenses.0.foucs": 1}, "lenses.0.foucs must be a field of Lens: focus, coated; received 1. Did you mean l"),
        ({"lenses.one.focus": 1}, "lenses.one.focus must be a field of Bag"),
        (
            {"lenses": [5]},
            r"lenses must be a list of at most 16 Lens tables; received \[5\]. Example: lenses = \[{ foc",
        ),
    ],
)
def test_what_a_list_of_tables_cannot_have_is_refused(values, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        TWO.changed(values)


def test_a_list_of_tables_is_written_read_and_in_the_digest():
    assert TWO.to_dict() == {"lenses": [{"focus": 3.0, "coated": False}, {"focus": 1.0, "coated": True}]}
    assert Bag.from_dict(TWO.to_dict()) == TWO
    assert Bag.model_validate_json(canonical(TWO.to_dict())) == TWO
    assert Bag().to_dict() == {}, "what was written before there was the list stays as it is"
    assert TWO.distinct() == {"lenses": [{"focus": 3.0}, {"coated": True}]}
    assert TWO.digest != Bag(lenses=tuple(reversed(TWO.lenses))).digest, "the order counts"
    assert [TWO.value(name) for name in ("lenses.1.coated", "lenses.2.coated")] == [True, None]
    assert TWO.setting("lenses.7.focus").name == "lenses.7.focus"


# --- identity --------------------------------------------------------------------------------------------------------

DISTINCT = {
    "all as the schema has it": (Camera(), {}),
    "said, but as the schema has it": (Camera(shots=1, lens=Lens(), flash=None, span=[0, 5]), {}),
    "a value": (Camera(shots=2), {"shots": 2}),
    "a table that is on with its defaults": (Camera(flash=Lens()), {"flash": {}}),
    "a field of a table": (Camera(flash=Lens(coated=True)), {"flash": {"coated": True}}),
    "a pair": (Camera(span=(0, 4)), {"span": (0.0, 4.0)}),
}


@pytest.mark.parametrize(("camera", "distinct"), DISTINCT.values(), ids=DISTINCT)
def test_the_digest_is_of_the_schemas_number_and_what_differs_from_its_defaults(camera, distinct):
    assert camera.distinct() == distinct
    text = canonical({"schema": 1, **distinct})
    assert camera.digest == hashlib.sha256(text.encode()).hexdigest()
    assert (camera.short_digest, short(camera.digest)) == (camera.digest[:12],) * 2


def test_a_field_that_is_added_with_a_default_moves_no_digest():
    class Later(Camera):
        zoom: Annotated[int | None, Setting(kind=Whole(1, 9), label="Zoom", help="how near", example=2)] = None

    for camera, _ in DISTINCT.values():
        later = Later.from_dict(camera.to_dict())
        assert later.digest == camera.digest
        assert later.with_(zoom=2).digest != camera.digest


def test_another_schema_has_other_digests():
    assert type("Other", (Camera,), {"SCHEMA": 2})().digest != Camera().digest


def test_equal_settings_have_one_text_and_one_digest():
    assert Camera(span=(-0.0, 4)).digest == Camera(span=(0, 4)).digest
    assert Camera(span=(-0.0, 4)).to_toml() == Camera(span=(0, 4)).to_toml()
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'


@pytest.mark.parametrize(("name", "found"), [("shoots", "shots"), ("lens.foucs", "lens.focus"), ("xyz", None)])
def test_the_nearest_name_is_the_one_that_was_probably_meant(name, found):
    assert nearest(name, Camera.settings()) == found
