"""The notation of A1111's web UI: what its texts mean, and that no text is an error.

The expected values were worked out from the program's source and its wiki, by hand.
"""

import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdxl_lab.syntax import Piece, bare, escaped, networks, sections, texts, unweighed

UP, DOWN = 1.1, 1 / 1.1

WEIGHTS: list[tuple[str, list[list[tuple[str, float]]]]] = [
    ("a cat", [[("a cat", 1)]]),
    ("", [[]]),
    ("a (red) cat", [[("a ", 1), ("red", UP), (" cat", 1)]]),
    ("a [red] cat", [[("a ", 1), ("red", DOWN), (" cat", 1)]]),
    ("((red)) [[cat]]", [[("red", UP * UP), (" ", 1), ("cat", DOWN * DOWN)]]),
    ("(red:1.3)", [[("red", 1.3)]]),
    ("(red: .5 ) (cat:+2)(dog:-1)", [[("red", 0.5), (" ", 1), ("cat", 2), ("dog", -1)]]),
    ("(a (red:2) cat:1.5)", [[("a ", 1.5), ("red", 3), (" cat", 1.5)]]),
    ("(a [red] cat)", [[("a ", UP), ("red", UP * DOWN), (" cat", UP)]]),
    # Brackets are letters after a backslash; a backslash before anything else is left out.
    (r"a \(red\) \[cat\] \\ \n", [[(r"a (red) [cat] \ n", 1)]]),
    (r"(\(red\):1.2)", [[("(red)", 1.2)]]),
    # What has no partner: a bracket that opens lasts to the end, one that closes is a letter.
    ("a (red cat", [[("a ", 1), ("red cat", UP)]]),
    ("a [red cat", [[("a ", 1), ("red cat", DOWN)]]),
    ("a red) cat]", [[("a red) cat]", 1)]]),
    ("a red:1.3) cat", [[("a red:1.3) cat", 1)]]),
    ("(red cat:1.3", [[("red cat:1.3", UP)]]),
    # A square bracket has no number, and what is no number is text.
    ("[red:1.3]", [[("red:1.3", DOWN)]]),
    ("(red:cat)", [[("red:cat", UP)]]),
    ("(red:1.2.3)", [[("red:1.2.3", UP)]]),
    ("(red:.)", [[("red:.", UP)]]),
    # Neighbours of one weight are read as one text.
    ("(red)(dish)", [[("reddish", UP)]]),
    ("a cat BREAK a dog", [[("a cat", 1)], [("a dog", 1)]]),
    ("a catBREAK a dog", [[("a catBREAK a dog", 1)]]),
    ("BREAK a cat BREAK", [[], [("a cat", 1)], []]),
    ("(a cat BREAK a dog:1.2)", [[("a cat", 1.2)], [("a dog", 1.2)]]),
    ("a break", [[("a break", 1)]]),
    ("a cat AND a dog", [[("a cat AND a dog", 1)]]),
]


@pytest.mark.parametrize(("text", "expected"), WEIGHTS, ids=[repr(text) for text, _ in WEIGHTS])
def test_weights(text, expected):
    found = sections(text)
    assert [[piece.text for piece in section] for section in found] == [
        [words for words, _ in each] for each in expected
    ]
    for section, each in zip(found, expected, strict=True):
        assert [piece.weight for piece in section] == pytest.approx([weight for _, weight in each])


SCHEDULES: list[tuple[str, list[tuple[int, str]]]] = [  # how many steps of ten have which text
    ("a cat", [(10, "a cat")]),
    ("a [cat:dog:0.3]", [(3, "a cat"), (7, "a dog")]),
    ("a [cat:dog:3]", [(3, "a cat"), (7, "a dog")]),
    ("a [cat: dog : 3 ]", [(3, "a cat"), (7, "a  dog ")]),
    ("a [cat:.25]", [(2, "a "), (8, "a cat")]),
    ("a [cat::4]", [(4, "a cat"), (6, "a ")]),
    ("a [cat:dog:1.0]", [(10, "a cat")]),
    ("a [cat:dog:1]", [(1, "a cat"), (9, "a dog")]),
    ("a [cat:dog:0]", [(10, "a dog")]),
    ("a [cat:dog:-3]", [(10, "a dog")]),
    ("a [cat:dog:99]", [(10, "a cat")]),
    ("[a|b]", [(1, "a"), (1, "b")] * 5),
    ("[a||b]", [(1, "a"), (1, ""), (1, "b")] * 3 + [(1, "a")]),
    ("[a|b|c] d", [(1, "a d"), (1, "b d"), (1, "c d")] * 3 + [(1, "a d")]),
    ("x[a:[b:c:6]:2]y", [(2, "xay"), (4, "xby"), (4, "xcy")]),
    ("[a:(b:1.2):5]", [(5, "a"), (5, "(b:1.2)")]),
    ("[[a|b]:c:2]", [(1, "a"), (1, "b"), (8, "c")]),
    ("([a:b:5]:1.2)", [(5, "(a:1.2)"), (5, "(b:1.2)")]),
    (r"[a\:b:c\]:5]", [(5, r"a\:b"), (5, r"c\]")]),
    # A bracket that is no schedule stays for whoever reads weights.
    ("[a] [a:b] [a:b:c] (a|b) a|b", [(10, "[a] [a:b] [a:b:c] (a|b) a|b")]),
    ("[a:b:c:5]", [(10, "[a:b:c:5]")]),
    ("a [cat:dog", [(10, "a [cat:dog")]),
    ("[[a:2] ((", [(2, "[ (("), (8, "[a ((")]),
    ("([a)b:3]", [(10, "([a)b:3]")]),
    ("[a|b:0.5]", [(5, ""), (5, "a|b")]),
]


@pytest.mark.parametrize(("text", "expected"), SCHEDULES, ids=[text for text, _ in SCHEDULES])
def test_schedules(text, expected):
    assert texts(text, 10) == [words for count, words in expected for _ in range(count)]


def test_brackets_may_be_nested_as_deeply_as_a_prompt_is_long():
    assert len(texts("[a:" * 400 + "b" + ":1]" * 200, 3)) == 3
    assert len(texts("[" * 2000, 3)) == 3
    assert sections("(" * 1999 + "a") == [(Piece("a", pytest.approx(1.1**1999)),)]


NETWORKS = [
    ("a cat", "a cat", []),
    ("a <lora:outlines:0.6>cat", "a cat", [("lora", "outlines", (0.6, 0.6))]),
    ("<lora:outlines>", "", [("lora", "outlines", (1, 1))]),
    ("<lora:a:0.5:1><lyco:b:-1>", "", [("lora", "a", (0.5, 1)), ("lyco", "b", (-1, -1))]),
    ("<hypernet:x:1>", "", [("hypernet", "x", (1, 1))]),
    ("a < b: c > d <3 <lora:>", "a < b: c > d <3 <lora:>", []),
]


@pytest.mark.parametrize(("text", "words", "named"), NETWORKS, ids=[text for text, _, _ in NETWORKS])
def test_adapters(text, words, named):
    left, found = networks(text)
    assert left == words
    assert [(network.kind, network.name, network.weights) for network in found] == named


def test_a_weight_of_an_adapter_that_is_no_number_is_told_when_it_is_asked_for():
    _, (network,) = networks("<lora:outlines:much>")
    with pytest.raises(ValueError, match="much"):
        _ = network.weights


def test_the_bare_words_are_those_of_the_last_step():
    assert bare("a (red:1.3) [cat:dog:0.5], <lora:x:1> BREAK [hat] \\(1\\)", 10) == "a red dog, hat (1)"


# --- whatever the text is --------------------------------------------------------------------------------------------

WRITTEN = st.lists(
    st.sampled_from([*"()[]:|\\<> \n.,", *string.digits, "cat", "BREAK", "AND", "lora", "<lora:a:1>", "0.5", "é日"])
).map("".join)
ANY = WRITTEN | st.text()


@settings(deadline=None, max_examples=60)
@given(ANY)
@example(text="(" * 2000)
def test_no_text_is_an_error_and_no_word_is_lost(text):
    read = "".join(piece.text for section in sections(text) for piece in section)
    plain = set(text) - set("()[]:\\.+-") - set(string.whitespace) - set(string.digits) - set("BREAK")
    assert set(read) >= plain
    for each in texts(text, 7):
        sections(each)
    networks(text)


@settings(deadline=None, max_examples=60)
@given(ANY)
def test_a_text_comes_back_from_its_escaped_form(text):
    written = escaped(text)
    assert sections(written) == unweighed(text)
    assert texts(written, 5) == [written] * 5
    assert networks(written) == (written, [])
    assert bare(written, 5) == " ".join(text.split())


PIECES = st.lists(
    st.tuples(st.text("abc ()[]:\\|<>BREAK.1", min_size=1), st.floats(-10, 10).map(lambda weight: round(weight, 3))),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(PIECES)
def test_weights_come_back_as_they_are_written(pieces):
    written = "".join(f"({escaped(words)}:{weight:.3f})" for words, weight in pieces)
    expected: list[Piece] = []
    for words, weight in pieces:
        if expected and expected[-1].weight == weight:
            words = expected.pop().text + words
        expected.append(Piece(words, weight))
    assert sections(written) == [tuple(expected)]


@settings(deadline=None, max_examples=60)
@given(ANY, st.integers(1, 30))
def test_every_step_has_a_text_and_a_longer_run_says_the_same_in_time(text, steps):
    found = texts(text, steps)
    assert len(found) == steps
    if not set(text) & set("[]"):
        assert found == [text] * steps
