"""Pictures of pictures: labelled grids for notebooks and reports."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LABEL, GAP = 26, 8


def grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows of `columns` (default: one row), each under its label."""
    if len(images) != len(labels) or not images:
        raise ValueError(f"a grid must have one label a picture; received {len(images)} pictures, {len(labels)} labels")
    columns = columns or len(images)
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + LABEL + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = GAP + index % columns * (width + GAP), GAP + index // columns * (height + LABEL + GAP)
        pen.text((x, y + 2), _fitted(label, width, font), fill="black", font=font)
        sheet.paste(image, (x, y + LABEL))
    return sheet


def _fitted(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text, or as much of it as fits, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
