"""An independent check of an image's content, by classical image analysis.

It recognises ten colours, and fourteen nouns by their silhouettes: eight from geometry, six from the small drawings in
`SKETCHES`. Backgrounds may shade from top to bottom, and a thing may darken the ground around it. Details inside a
silhouette are ignored, so a cat without a face is a cat; so are hats and sizes. What it cannot name is "unknown". It
shares no code with the renderer.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

UNKNOWN = "unknown"
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (40, 160, 65),
    "blue": (40, 90, 220),
    "yellow": (245, 210, 40),
    "purple": (130, 55, 175),
    "orange": (242, 130, 28),
    "pink": (245, 135, 185),
    "cyan": (45, 200, 215),
    "black": (30, 30, 34),
    "white": (244, 244, 242),
}
TOWARDS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # the second's side: right, down
MOST = 6  # the largest things are matched
LIGHTING = np.linspace(0.7, 1.12, 8)  # how light and shadow may scale a colour without changing its name
SHADOW = np.linspace(0.66, 1.04, 12)  # how far a thing's shadow may darken the ground
NAMED_WITHIN = 22.0  # Lab distance beyond which a pixel's colour has no name
UNCONTESTED = 0.6  # of the named pixels, the share that must agree
GROUND_WITHIN = 13.0  # Lab distance beyond which a pixel is not the ground
EDGE = 0.4  # of the contrast beside it, where a soft outline is cut
WHOLE = 0.49  # a size from which a piece is the image's own frame, not a thing
SPECK = 0.0015  # of the image's area
LARGEST_GAP = 0.22  # of a silhouette's area: larger holes are part of the shape, smaller ones are pale details
CLEFT = 0.06  # of the square root of a silhouette's area: half the width of a cleft that is closed
ASTRAY = 0.036  # mean distance of an outline from its noun's, in the square root of the silhouette's area
MARGIN = 0.03  # and the share of the area by which that noun must lead the next
CELLS = 19  # a silhouette is compared on CELLS x CELLS
FRAME = 2.2  # whose side is this many times the square root of the silhouette's area


@dataclass(frozen=True)
class FoundThing:
    """A thing in an image. `x`, `y` (centre of its box) and `size` (half the box's larger side) are fractions of the
    image's side."""

    noun: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class SceneVerdict:
    """The parts of a description that are right in the image."""

    background: bool
    count: bool
    colour: bool
    noun: bool
    relation: bool

    @property
    def right(self) -> bool:
        return self.background and self.count and self.colour and self.noun and self.relation


# --- colour --------------------------------------------------------------------------------------------------------


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB, 0 to 255 in the last axis, to CIE L*a*b* (D65)."""
    c = np.clip(rgb, 0, 255) / 255.0
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = c @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _name(pixels: np.ndarray, share: float) -> str:
    """The name of most of these pixels, [n, 3] RGB. A name covers its colour in light and in shade; tints, deep shades
    and mixtures do not count. "unknown" if the name has less than `share` of all pixels, or others compete."""
    if len(pixels) == 0:
        return UNKNOWN
    sample = _lab(pixels[:: max(1, len(pixels) // 1500)].astype(float))
    lit = _lab(np.array(list(PALETTE.values()))[:, None, :] * LIGHTING[None, :, None])
    distance = np.linalg.norm(sample[:, None, None, :] - lit[None], axis=-1).min(axis=2)
    votes = np.bincount(distance.argmin(axis=1)[distance.min(axis=1) < NAMED_WITHIN], minlength=len(PALETTE))
    clear = votes.max() >= max(share * len(sample), UNCONTESTED * votes.sum())
    return list(PALETTE)[votes.argmax()] if clear else UNKNOWN


# --- ground and pieces ---------------------------------------------------------------------------------------------


def _ground(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The background's name, and its colour in each row, [height, 3]: a line through the border's usual colours."""
    height, width = pixels.shape[:2]
    margin = max(2, round(0.02 * min(height, width)))
    border = np.ones((height, width), dtype=bool)
    border[margin:-margin, margin:-margin] = False
    colours, rows = pixels[border], np.nonzero(border)[0]
    usual = np.linalg.norm(_lab(colours) - _lab(np.median(colours, axis=0)), axis=1) < GROUND_WITHIN
    if usual.sum() < 0.3 * len(rows):
        usual[:] = True
    slope, base = np.polyfit(rows[usual], colours[usual], 1)
    return _name(colours, 0.5), base + np.arange(height)[:, None] * slope


def _foreground(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Where the image is neither its ground nor its ground in shadow, [height, width] of bool. A soft edge is cut at
    EDGE of the contrast beside it, since a lower cut would widen every outline."""
    lab = _lab(pixels)
    nearest = np.full(pixels.shape[:2], np.inf)
    for shade in SHADOW:
        nearest = np.minimum(nearest, np.linalg.norm(lab - _lab(ground * shade)[:, None], axis=-1))
    contrast = ndimage.maximum_filter(nearest, size=2 * max(1, round(min(nearest.shape) / 85)) + 1)
    return nearest > np.maximum(GROUND_WITHIN, EDGE * contrast)


def _pieces(foreground: np.ndarray) -> list[np.ndarray]:
    """One mask for each thing: connected parts; parts with nested boxes are one thing."""
    labels, _ = ndimage.label(foreground, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    groups = [[k] for k in range(1, len(areas)) if areas[k] >= SPECK * foreground.size]
    boxes = ndimage.find_objects(labels)
    groups.sort(key=lambda group: -areas[group[0]])
    merged: list[list[int]] = []
    for (part,) in groups:
        home = next((group for group in merged if _within(boxes[part - 1], boxes[group[0] - 1])), None)
        if home is None:
            merged.append([part])
        else:
            home.append(part)
    return [np.isin(labels, group) for group in merged]


def _within(small: tuple[slice, slice], large: tuple[slice, slice]) -> bool:
    """Whether half of the small box lies in the large one."""
    shared = [max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in zip(small, large, strict=True)]
    return shared[0] * shared[1] >= 0.5 * (small[0].stop - small[0].start) * (small[1].stop - small[1].start)


def _silhouette(piece: np.ndarray) -> np.ndarray:
    """The piece with its clefts and small holes filled, as a small model's blur fills them."""
    reach = CLEFT * np.sqrt(piece.sum())
    (box,) = ndimage.find_objects(piece.astype(int))
    piece = np.pad(piece[box], 2 * round(reach) + 2)
    grown = ndimage.distance_transform_edt(~piece) <= reach
    piece = ndimage.distance_transform_edt(grown) > reach
    holes, count = ndimage.label(ndimage.binary_fill_holes(piece) & ~piece)
    areas = np.bincount(holes.ravel(), minlength=count + 1)
    small = areas < LARGEST_GAP * (piece.sum() + areas[1:].sum())
    return piece | (small[holes] & (holes > 0))


# --- nouns ---------------------------------------------------------------------------------------------------------

SKETCHES = """\
cat                 fish                house               tree                flower              boat

                                                                                                             .
                                                                                                            .=.
     :-.   :-                                    .                  ...               .=:.-=.               :*-
     :*++++*=                  :.               -*--=              -+*+-              -##+##-              .+#*:
     :######-                .=*:             .=####+             :*###*:             -#####-              -###+.
     :######=            :=++*##-   :        .+#####*.            =#####=            -*#####*-            .*####-
     -######+          .+*######+. --       .+#######+.          .*#####*.          :#########:           =#####*.
     -*#####+.         +#########+=*:       :*#######+.         :+#######+:         .+#######+.          .*######=
     .-####=.         .*###########*.        +#######=          +#########+          .=#####=.           =#######*:
      =####+.::       .*#########***:        +#######=         .+#########+.          =#####=          -+*########+.
     .*#####:-=        -*#######*:.+-        +#######=          =#########=           -**#**-          :*#########=
     .*#####:-=         :=**#**=:  .-        +#######=          .-++*#*++-.            .:+:.            -########+.
      +#####=+:           ..:..              =*******-              -#-                 .=. .           .=+++++++:
      .+##**+-                               ........               -#-               . .+=+*:
       .::...                                                       -*-              :+=-*#*-
                                                                    .:.              .=*#*-.
                                                                                       :=+.
                                                                                         .
"""
SHADES = " .:-=+*#"


def _polygons() -> dict[str, list[tuple[float, float]]]:
    """Outlines, y down, in units that do not matter."""
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    spikes = np.where(np.arange(10) % 2, 0.45, 1.0)
    points = np.arange(10) * np.pi / 5
    heart = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    plus = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]
    return {
        "circle": list(zip(np.cos(turn), np.sin(turn), strict=True)),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
        "star": list(zip(spikes * np.sin(points), -spikes * np.cos(points), strict=True)),
        "cross": [*plus, *((-x, -y) for x, y in plus)],
        "heart": list(zip(16 * np.sin(turn) ** 3, -heart, strict=True)),
        "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    }


def _normal(mask: np.ndarray) -> np.ndarray:
    """A silhouette moved to its centroid and scaled to unit area, as coverage on CELLS x CELLS."""
    ys, xs = np.nonzero(mask > 0.5)
    cell = FRAME * np.sqrt(len(ys)) / CELLS
    at = (np.arange(CELLS) - (CELLS - 1) / 2) * cell
    soft = ndimage.gaussian_filter(mask.astype(float), 0.45 * cell)
    return ndimage.map_coordinates(soft, np.meshgrid(ys.mean() + at, xs.mean() + at, indexing="ij"), order=1)


@cache
def _prototypes() -> dict[str, np.ndarray]:
    found = {}
    for noun, outline in _polygons().items():
        scale = 80 / np.abs(outline).max()
        image = Image.new("L", (256, 256), 0)
        ImageDraw.Draw(image).polygon([(128 + scale * x, 128 + scale * y) for x, y in outline], fill=1)
        found[noun] = _normal(np.asarray(image))
    y, x = np.mgrid[-128:128, -128:128]
    found["ring"] = _normal((np.hypot(x, y) < 80) & (np.hypot(x, y) > 44))
    names, *rows = SKETCHES.splitlines()
    for k, noun in enumerate(names.split()):
        cells = [row.ljust(120)[k * (CELLS + 1) :][:CELLS] for row in [*rows, *[""] * (CELLS - len(rows))]]
        found[noun] = np.array([[SHADES.index(c) for c in row] for row in cells]) / (len(SHADES) - 1)
    return found


def _noun(silhouette: np.ndarray) -> str:
    """The noun whose silhouette differs least. The allowed difference grows with the outline."""
    cells, area = _normal(silhouette), (FRAME / CELLS) ** 2
    differing = {noun: float(np.abs(cells - p).sum()) * area for noun, p in _prototypes().items()}
    noun, other = sorted(differing, key=differing.__getitem__)[:2]
    outline = np.hypot(*np.gradient(_prototypes()[noun])).sum() * FRAME / CELLS
    near = differing[noun] <= ASTRAY * outline and differing[other] - differing[noun] >= MARGIN
    return noun if near else UNKNOWN


# --- looking and judging -------------------------------------------------------------------------------------------


def look(image: Image.Image) -> tuple[str, list[FoundThing]]:
    """The background's colour and the things on it, the largest first."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    side = min(pixels.shape[:2])
    pixels = ndimage.gaussian_filter(pixels, (side / 320, side / 320, 0))
    background, ground = _ground(pixels)
    seen = []
    for piece in _pieces(_foreground(pixels, ground)):
        ys, xs = np.nonzero(piece)
        (top, bottom), (left, right) = (ys.min(), ys.max() + 1), (xs.min(), xs.max() + 1)
        inside = ndimage.binary_erosion(piece, iterations=max(1, side // 100))
        colour = _name(pixels[inside if inside.any() else piece], 0.2)
        x, y = float(left + right) / 2 / pixels.shape[1], float(top + bottom) / 2 / pixels.shape[0]
        size = float(max(bottom - top, right - left)) / 2 / side
        noun = _noun(_silhouette(piece)) if size < WHOLE else UNKNOWN
        seen.append(FoundThing(noun, colour, x, y, size))
    return background, sorted(seen, key=lambda thing: -thing.size)


def _holds(relation: str, first: FoundThing | None, second: FoundThing | None) -> bool:
    """Whether the second thing lies mainly on the side of the first that the relation says."""
    if first is None or second is None:
        return False
    (right, down), dx, dy = TOWARDS[relation], second.x - first.x, second.y - first.y
    along, across = right * dx + down * dy, down * dx + right * dy
    return along > max(0.05, abs(across))


def judge(
    image: Image.Image, background: str, things: Sequence[tuple[str, str]], relation: str | None = None
) -> SceneVerdict:
    """Compare an image with a description: `things` are (colour, noun), and things[0] stands in `relation` to
    things[1].

    Described things are matched to found ones so that as much as possible is right. A missing thing has no colour, noun
    or place. Raises ValueError for an unknown relation, and for one that does not join two things."""
    if relation is not None and (relation not in TOWARDS or len(things) != 2):
        rule = f"a relation is one of {', '.join(TOWARDS)}, or None, and joins two things"
        example = "[('red', 'cat'), ('blue', 'fish')], 'above'"
        raise ValueError(f"{rule}; received {relation!r} and {len(things)} things. Example: {example}")
    ground, seen = look(image)
    places: list[FoundThing | None] = [*seen[:MOST], *[None] * max(0, len(things) - len(seen[:MOST]))]
    readings = []
    for chosen in itertools.permutations(places, len(things)):
        pairs = list(zip(chosen, things, strict=True))
        colours = [thing is not None and thing.colour == colour for thing, (colour, _) in pairs]
        nouns = [thing is not None and thing.noun == noun for thing, (_, noun) in pairs]
        placed = relation is None or _holds(relation, *chosen)
        readings.append((sum(colours) + sum(nouns), all(colours), all(nouns), placed))
    _, colour, noun, related = max(readings)
    return SceneVerdict(ground == background, len(seen) == len(things), colour, noun, related)
