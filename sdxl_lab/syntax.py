"""How a prompt is written: the notation of A1111's web UI, read from a text. It knows no tokens and no encoder.

`(words)` and `[words]` multiply the weight of words by 1.1 and divide it by 1.1, `(words:1.3)` multiplies it by a
number, a backslash makes a bracket a letter, `BREAK` begins a new chunk. `[from:to:when]` and `[a|b]` change the text
from step to step, `<lora:name:weight>` names an adapter. What is none of these is text: no text is an error.

The reference is the program itself (github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/prompt_parser.py` and
`modules/extra_networks.py` of version 1.10) and its wiki's page "Features". Three things are otherwise here. Its
sampler counts steps from 0 where the notation counts from 1, so that the first part of a schedule lasts a step too long
there; a `BREAK` inside of brackets is a word there; `AND`, which composes prompts there, is a word here.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

EMPHASIS = 1.1
# A number that closes a round bracket; a bracket; a backslash, with the letter that it protects or alone; all the rest.
MARKS = re.compile(
    r":\s*(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|\\(?P<letter>[()\[\]\\]?)"
    r"|[^\\()\[\]:]+|:"
)
BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What a schedule is made of; a letter after a backslash is text, whatever it is.
SIGNS = re.compile(r"(?P<sign>[()\[\]:|])|(?:[^\\()\[\]:|]|\\.|\\)+", re.DOTALL)
WHEN = re.compile(r"\s*(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
NETWORK = re.compile(r"<(?P<kind>lora|lyco|hypernet):(?P<rest>[^>]+)>")


class Piece(NamedTuple):
    """Words, and how much they weigh."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]

# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass
class _Weighed:
    text: str
    weight: float
    section: int


def sections(text: str) -> list[Section]:
    """A text's pieces, apart where a `BREAK` stands. Neighbours of one weight are one piece, and read as one text. A
    bracket that is never closed lasts to the end; one that was never opened is a letter."""
    found: list[_Weighed] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    section = 0

    def weigh(start: int, factor: float) -> None:
        for piece in found[start:]:
            piece.weight *= factor

    for mark in MARKS.finditer(text):
        match mark["bracket"]:
            case "(" | "[" as bracket:
                opened[bracket].append(len(found))
            case ")" if opened["("]:
                weigh(opened["("].pop(), EMPHASIS)
            case "]" if opened["["]:
                weigh(opened["["].pop(), 1 / EMPHASIS)
            case None if mark["weight"] is not None and opened["("]:
                weigh(opened["("].pop(), float(mark["weight"]))
            case None if mark["letter"] is not None:
                found.append(_Weighed(mark["letter"], 1.0, section))
            case _:
                first, *others = BREAK.split(mark[0])
                found.append(_Weighed(first, 1.0, section))
                for words in others:
                    section += 1
                    found.append(_Weighed(words, 1.0, section))
    for start in opened["("]:
        weigh(start, EMPHASIS)
    for start in opened["["]:
        weigh(start, 1 / EMPHASIS)
    return [_merged([piece for piece in found if piece.section == number]) for number in range(section + 1)]


def _merged(found: list[_Weighed]) -> Section:
    """Neighbours of one weight as one piece; without what is empty."""
    pieces: list[Piece] = []
    for piece in found:
        if pieces and pieces[-1].weight == piece.weight:
            pieces[-1] = Piece(pieces[-1].text + piece.text, piece.weight)
        else:
            pieces.append(Piece(piece.text, piece.weight))
    return tuple(piece for piece in pieces if piece.text)


def unweighed(text: str) -> list[Section]:
    """A text in which no letter means anything but itself."""
    return [(Piece(text),)] if text else [()]


def escaped(text: str) -> str:
    """The text as this notation writes it, so that none of its letters is a mark: `sections(escaped(text))` is the text
    with the weight 1, and it has neither schedule nor adapter."""
    protected = re.sub(r"[()\[\]\\]", r"\\\g<0>", text)
    # A backslash before another letter is left out when it is read, and parts the word for those who look for it.
    protected = protected.replace("BREAK", "BR\\EAK")
    return NETWORK.sub(lambda network: f"<\\{network[0][1:]}", protected)


# --- schedules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """`before` up to the step `when`, then `after`."""

    before: "list[_Node]"
    after: "list[_Node]"
    when: str


@dataclass(frozen=True)
class _Turns:
    """One step each, in turn."""

    options: "list[list[_Node]]"


_Node = str | _Change | _Turns


@dataclass
class _Open:
    """A bracket that is not closed yet, and its parts; `signs` are the colons and bars between them."""

    bracket: str
    parts: "list[list[_Node]]"
    signs: list[str]

    def literal(self) -> "list[_Node]":
        """What stands there, where the bracket means no schedule."""
        nodes: list[_Node] = [self.bracket]
        for sign, part in zip(["", *self.signs], self.parts, strict=True):
            for node in [sign, *part]:
                if isinstance(node, str) and isinstance(nodes[-1], str):  # few nodes, however deep the brackets are
                    nodes[-1] += node
                else:
                    nodes.append(node)
        return nodes

    def closed(self) -> "list[_Node]":
        """What a square bracket with these parts means."""
        if self.signs and set(self.signs) == {"|"}:
            return [_Turns(self.parts)]
        last = self.parts[-1]
        number = WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        colons = [place for place, sign in enumerate(self.signs) if sign == ":"]
        if number and len(colons) in (1, 2) and self.signs[-1] == ":":
            bounds = [0, *(place + 1 for place in colons)]
            *before, after = [self._between(*pair) for pair in itertools.pairwise(bounds)]
            return [_Change(before[0] if before else [], after, number["number"])]
        return [*self.literal(), "]"]

    def _between(self, start: int, end: int) -> "list[_Node]":
        """Some of the parts; a bar between two of them is a letter."""
        nodes = list(self.parts[start])
        for place in range(start + 1, end):
            nodes += ["|", *self.parts[place]]
        return nodes


def _scheduled(text: str) -> list[_Node]:
    stack = [_Open("", [[]], [])]
    for mark in SIGNS.finditer(text):
        sign = mark["sign"]
        here = stack[-1]
        if sign is None or (sign in ":|" and len(stack) == 1):
            here.parts[-1].append(mark[0])
        elif sign in "([":
            stack.append(_Open(sign, [[]], []))
        elif sign in ":|":
            here.signs.append(sign)
            here.parts.append([])
        else:
            wanted = "(" if sign == ")" else "["
            if all(each.bracket != wanted for each in stack):
                here.parts[-1].append(sign)
                continue
            while stack[-1].bracket != wanted:  # what was opened in between is never closed
                _give_up(stack)
            done = stack.pop()
            stack[-1].parts[-1].extend([*done.literal(), ")"] if sign == ")" else done.closed())
    while len(stack) > 1:
        _give_up(stack)
    return stack[0].parts[0]


def _give_up(stack: list[_Open]) -> None:
    lost = stack.pop()
    stack[-1].parts[-1].extend(lost.literal())


def texts(text: str, steps: int) -> list[str]:
    """The text of each of so many steps. A time with a point is a part of the steps (0.5: half of them), one without is
    a number of steps; `[a|b]` begins with `a`."""
    nodes = _scheduled(text)
    if all(isinstance(node, str) for node in nodes):
        return [text] * steps
    return ["".join(_words(nodes, step, steps)) for step in range(1, steps + 1)]


def _words(nodes: list[_Node], step: int, steps: int) -> Iterator[str]:
    """The words of a step, from 1. Without recursion, since brackets may be nested as deeply as a prompt is long."""
    stack = [iter(nodes)]
    while stack:
        node = next(stack[-1], None)
        match node:
            case None:
                stack.pop()
            case str():
                yield node
            case _Turns(options):
                stack.append(iter(options[(step - 1) % len(options)]))
            case _Change(before, after, when):
                ends = float(when) * steps if "." in when else float(when)
                stack.append(iter(before if step <= math.floor(max(0.0, min(ends, steps))) else after))


def bare(text: str, steps: int) -> str:
    """The words of the last step alone, without weights and adapters: for whoever judges an image by its prompt."""
    last = texts(networks(text)[0], steps)[-1]
    return " ".join(" ".join("".join(piece.text for piece in section) for section in sections(last)).split())


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """An adapter that a prompt names, in these words."""

    kind: str
    name: str
    numbers: tuple[str, ...]
    word: str

    @property
    def weights(self) -> tuple[float, float]:
        """How much of it there is in the text encoders and in the UNet: 1 where nothing is said, one number for both.
        Raises `ValueError`."""
        text = float(self.numbers[0]) if self.numbers else 1.0
        return text, float(self.numbers[1]) if len(self.numbers) > 1 else text


def networks(text: str) -> tuple[str, list[Network]]:
    """The text without its `<lora:name:weight>`, and those."""
    found = []
    for network in NETWORK.finditer(text):
        name, *numbers = network["rest"].split(":")
        found.append(Network(network["kind"], name, tuple(numbers), network[0]))
    return NETWORK.sub("", text), found
