"""Sheets: images and text laid out in pixels.

A sheet is an image at twice the size at which a README shows it.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PALE = "#1f2328", "#656d76", "#eceff2"
GAP, MARGIN = 8, 24
NOTE = 20  # the line under an image


# --- text ----------------------------------------------------------------------------------------------------------


def typeface(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of the plots."""
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts/ttf", f"DejaVuSans{'-Bold' * bold}.ttf"), size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `width` pixels; an ellipsis replaces the rest."""
    across = next((n for n in range(len(text), 0, -1) if _widest(textwrap.wrap(text, n), font) <= width), 1)
    found = textwrap.wrap(text, across, max_lines=lines, placeholder="…")
    return [fitted(line, width, font) for line in found]


def _widest(lines: Sequence[str], font: ImageFont.FreeTypeFont) -> float:
    return max((font.getlength(line) for line in lines), default=0)


def fitted(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text, shortened with an ellipsis to fit."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


# --- images ------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """A grid's axis: its name, its values, and the label of each value."""

    name: str
    values: Sequence[Any]
    labels: Sequence[str]


class Grid:
    """Images of one size in rows and columns, with the axes' names and values around them."""

    def __init__(self, size: tuple[int, int], across: Axis, down: Axis | None, notes: int) -> None:
        """`size` is an image's (width, height), `notes` the number of lines under each."""
        self.size, self.across, self.down, self.notes = size, across, down, notes
        self.rows = down.values if down else [None]
        self.small, self.bold = typeface(12), typeface(14, bold=True)
        self.heads = [wrapped(label, self.bold, size[0], 6) for label in across.labels]
        self.head = 22 + 18 * max(map(len, self.heads)) + 6
        self.left, self.sides = 0, [list[str]()]
        if down:
            widest = max(self.small.getlength(down.name), *(self.bold.getlength(label) for label in down.labels))
            self.left = int(min(widest, 190)) + 14
            self.sides = [wrapped(label, self.bold, self.left - 12, max(1, size[1] // 18)) for label in down.labels]

    def draw(
        self,
        title: str,
        cells: Mapping[tuple[Any, Any], Image.Image | str],
        notes: Mapping[tuple[Any, Any], Sequence[str]],
    ) -> Image.Image:
        width, height = self.size
        step_x, step_y = width + GAP, height + GAP + NOTE * self.notes
        top = 30 if title else 0
        size = (self.left + len(self.across.values) * step_x - GAP, top + self.head + len(self.rows) * step_y - GAP)
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        if title:
            pen.text((self.left, 0), fitted(title, size[0] - self.left, self.bold), fill=INK, font=self.bold)
        pen.text((self.left, top), f"{self.across.name} →", fill=FAINT, font=self.small)
        if self.down:
            pen.text((0, top + self.head - 20), f"{self.down.name} ↓", fill=FAINT, font=self.small)
        for index, lines in enumerate(self.heads):
            middle = self.left + index * step_x + width / 2
            for number, line in enumerate(reversed(lines)):
                pen.text((middle, top + self.head - 24 - 18 * number), line, fill=INK, font=self.bold, anchor="ma")
        for number, row in enumerate(self.rows):
            y = top + self.head + number * step_y
            for index, side in enumerate(self.sides[number]):
                above = y + height / 2 - 9 * len(self.sides[number]) + 18 * index
                pen.text((self.left - 12, above), side, fill=INK, font=self.bold, anchor="ra")
            for index, column in enumerate(self.across.values):
                at = (self.left + index * step_x, y)
                self._place(sheet, pen, at, cells[row, column])
                for under, note in enumerate(notes[row, column]):
                    below = (at[0] + width / 2, y + height + 3 + NOTE * under)
                    pen.text(below, note, fill=FAINT, font=self.small, anchor="ma")
        return sheet

    def _place(
        self, sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], cell: Image.Image | str
    ) -> None:
        (left, top), (width, height) = at, self.size
        if isinstance(cell, Image.Image):
            sheet.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
            return
        pen.rectangle((left, top, left + width - 1, top + height - 1), fill=PALE)
        for number, line in enumerate(wrapped(cell, self.small, width - 16, max(1, height // 16 - 1))):
            pen.text((left + 8, top + 8 + 16 * number), line, fill=FAINT, font=self.small)


def page(title: str, grids: Sequence[Image.Image], width: int) -> Image.Image:
    """Drawn grids of one size under a title, as many beside one another as fit into `width`."""
    across, down = grids[0].size
    apart = 2 * MARGIN
    fit = max(1, min(len(grids), (width - 2 * MARGIN + apart) // (across + apart)))
    rows = -(-len(grids) // fit)
    in_a_row = -(-len(grids) // rows)
    inner = in_a_row * (across + apart) - apart
    font = typeface(15)
    lines = wrapped(title, font, max(inner, 400), 3) if title else []
    top = MARGIN + 22 * len(lines) + (10 if lines else 0)
    size = (max(inner, int(_widest(lines, font))) + 2 * MARGIN, top + rows * (down + apart) - apart + MARGIN)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 22 * number), line, fill=INK, font=font)
    for index, grid in enumerate(grids):
        sheet.paste(grid, (MARGIN + index % in_a_row * (across + apart), top + index // in_a_row * (down + apart)))
    return sheet
