"""nano's scenes: sampled, captioned and rendered.

A scene is one or two things on a plain background. `sample_scene` makes one up, `caption` describes it fully or
loosely, and `render` draws it, anti-aliased and softly shaded, so that there is detail for a refiner to restore. The
only state is the random generator passed in.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS: dict[str, tuple[int, int, int]] = {
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
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
THINGS = ("cat", "fish", "house", "tree", "flower", "boat")
NOUNS = SHAPES + THINGS

# Half the side of a thing's box, as a fraction of the image's side.
RADII = {"small": (0.13, 0.17), None: (0.23, 0.29), "large": (0.36, 0.42), "pair": (0.18, 0.215)}

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One drawn thing. `x`, `y` (centre) and `radius` are fractions of the image's side."""

    noun: str
    colour: str
    x: float
    y: float
    radius: float
    size: str | None = None
    hat: str | None = None


@dataclass(frozen=True)
class Scene:
    """A background and one thing, or two with `relation` read from the first to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None


def is_held_out(colour: str, noun: str, background: str) -> bool:
    """A tenth of all colour x noun x background combinations, never trained on."""
    return hashlib.sha256(f"{colour} {noun} {background}".encode()).digest()[0] % 10 == 0


def sample_scene(
    rng: random.Random,
    *,
    held_out: bool = False,
    pair: float = 0.5,
    hat: float = 0.2,
    nouns: tuple[str, ...] = NOUNS,
) -> Scene:
    """Make up a scene. `pair` and `hat` are probabilities. With `held_out` its first thing is a held-out combination;
    otherwise nothing in it is."""
    while True:
        background = rng.choice(list(COLOURS))
        free = [c for c in COLOURS if c != background]
        is_pair = rng.random() < pair
        specs = [(rng.choice(nouns), rng.choice(free)) for _ in range(1 + is_pair)]
        held = [is_held_out(colour, noun, background) for noun, colour in specs]
        if held[0] != held_out or (not held_out and any(held)) or len(set(specs)) < len(specs):
            continue
        hats = [rng.choice([c for c in free if c != colour]) if rng.random() < hat else None for _, colour in specs]
        if is_pair:
            return _place_pair(rng, background, specs, hats)
        size = rng.choice((None, None, *SIZES))
        noun, colour = specs[0]
        radius = rng.uniform(*RADII[size])
        reach = max(0.0, 0.47 - radius * (1.0 if hats[0] is None else 1.12))
        x, y = (0.5 + rng.uniform(-reach, reach) for _ in range(2))
        if hats[0] is not None:
            y += 0.12 * radius
        return Scene(background, (Thing(noun, colour, x, y, radius, size, hats[0]),))


def _place_pair(rng: random.Random, background: str, specs: list[tuple[str, str]], hats: list[str | None]) -> Scene:
    relation = rng.choice(RELATIONS)
    first, second = (rng.uniform(0.23, 0.28), rng.uniform(0.72, 0.77))
    if relation in ("right of", "below"):
        first, second = second, first
    things = []
    for (noun, colour), hat, along in zip(specs, hats, (first, second), strict=True):
        across = rng.uniform(0.38, 0.62)
        x, y = (along, across) if relation in ("left of", "right of") else (across, along)
        radius = rng.uniform(*RADII["pair"]) * (0.9 if hat else 1.0)
        things.append(Thing(noun, colour, x, y + (0.02 if hat else 0.0), radius, None, hat))
    return Scene(background, tuple(things), relation)


# --- captions ---------------------------------------------------------------------------------------------------------


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words: complete, or with `rng` loosely, leaving out attributes and articles at random."""

    def keep(probability: float) -> bool:
        return rng is None or rng.random() < probability

    articles = keep(0.75)

    def noun_phrase(words: str) -> str:
        return _article(words) if articles else words

    parts = []
    for thing in scene.things:
        words = [thing.size] if thing.size and keep(0.7) else []
        if keep(0.65):
            words.append(thing.colour)
        phrase = noun_phrase(" ".join([*words, thing.noun]))
        if thing.hat:
            phrase += f" in {_article(f'{thing.hat} hat' if keep(0.6) else 'hat')}"
        parts.append(phrase)
    text = f" {scene.relation} ".join(parts) if scene.relation else parts[0]
    return f"{text} on {_article(scene.background)} background" if keep(0.5) else text


# --- drawing -------------------------------------------------------------------------------------------------------
# A noun is a list of parts in its own box, x right and y down, both from -1 to 1. A part is (tone, outline). Tones are
# shades of the thing's one colour: body, dark, light; "cut" removes.

Part = tuple[str, list[Point]]


def _ellipse(cx: float, cy: float, rx: float, ry: float, turn: float = 0.0, n: int = 48) -> list[Point]:
    c, s = math.cos(turn), math.sin(turn)
    angles = [2 * math.pi * i / n for i in range(n)]
    points = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
    return [(cx + x * c - y * s, cy + x * s + y * c) for x, y in points]


def _box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _line(x0: float, y0: float, x1: float, y1: float, width: float) -> list[Point]:
    length = math.hypot(x1 - x0, y1 - y0)
    dx, dy = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
    return [(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)]


def _star() -> list[Point]:
    radii = [1.0 if i % 2 == 0 else 0.45 for i in range(10)]
    return [(r * math.sin(math.pi * i / 5), 0.08 - r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> list[Point]:
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -y / 16 - 0.12))
    return points


def _tail(cx: float, cy: float, r: float, start: float, end: float, width: float) -> list[Point]:
    """An arc of the given width; angles are in turns."""
    angles = [2 * math.pi * (start + (end - start) * i / 16) for i in range(17)]
    outer = [(cx + (r + width / 2) * math.cos(a), cy + (r + width / 2) * math.sin(a)) for a in angles]
    inner = [(cx + (r - width / 2) * math.cos(a), cy + (r - width / 2) * math.sin(a)) for a in reversed(angles)]
    return outer + inner


def _cat() -> list[Part]:
    eyes = [
        part
        for x in (-0.2, 0.2)
        for part in (("light", _ellipse(x, -0.33, 0.12, 0.14)), ("dark", _ellipse(x, -0.33, 0.05, 0.11)))
    ]
    whiskers: list[Part] = [
        ("dark", _line(s * 0.16, -0.1 + dy, s * 0.62, -0.14 + 2.4 * dy, 0.03)) for s in (-1, 1) for dy in (0.0, 0.06)
    ]
    return [
        ("body", _tail(0.42, 0.5, 0.38, -0.12, 0.27, 0.15)),
        ("body", _ellipse(0, 0.5, 0.5, 0.5)),
        ("body", [(-0.55, -0.95), (-0.5, -0.25), (-0.08, -0.6)]),
        ("body", [(0.55, -0.95), (0.5, -0.25), (0.08, -0.6)]),
        ("body", _ellipse(0, -0.28, 0.55, 0.46)),
        ("light", _ellipse(0, 0.58, 0.26, 0.32)),
        *eyes,
        ("dark", [(-0.08, -0.15), (0.08, -0.15), (0, -0.06)]),
        *whiskers,
    ]


def _fish() -> list[Part]:
    return [
        ("body", [(0.5, 0), (1.0, -0.5), (0.88, 0), (1.0, 0.5)]),
        ("dark", [(-0.25, -0.38), (0.3, -0.78), (0.38, -0.3)]),
        ("body", _ellipse(-0.2, 0, 0.8, 0.5)),
        ("dark", _tail(-0.82, 0.0, 0.38, -0.12, 0.12, 0.05)),
        ("dark", [(-0.1, 0.08), (0.25, 0.0), (0.22, 0.32)]),
        ("light", _ellipse(-0.62, -0.12, 0.11, 0.11)),
        ("dark", _ellipse(-0.64, -0.12, 0.05, 0.05)),
    ]


def _house() -> list[Part]:
    windows: list[Part] = [("light", _box(x - 0.17, 0.05, x + 0.17, 0.4)) for x in (-0.42, 0.42)]
    bars: list[Part] = [("dark", _line(x, 0.05, x, 0.4, 0.04)) for x in (-0.42, 0.42)]
    return [
        ("dark", _box(0.42, -0.9, 0.64, -0.3)),
        ("body", _box(-0.78, -0.2, 0.78, 0.95)),
        ("dark", [(0, -0.98), (1.0, -0.12), (-1.0, -0.12)]),
        ("dark", _box(-0.14, 0.42, 0.14, 0.95)),
        *windows,
        *bars,
    ]


def _tree() -> list[Part]:
    return [
        ("dark", _box(-0.14, 0.2, 0.14, 1.0)),
        ("body", _ellipse(-0.42, 0.05, 0.44, 0.4)),
        ("body", _ellipse(0.42, 0.05, 0.44, 0.4)),
        ("body", _ellipse(0, -0.42, 0.52, 0.54)),
        ("light", _ellipse(-0.15, -0.6, 0.14, 0.12)),
        ("dark", _ellipse(0.35, 0.1, 0.09, 0.09)),
        ("dark", _ellipse(-0.4, 0.08, 0.09, 0.09)),
        ("dark", _ellipse(0.12, -0.25, 0.09, 0.09)),
    ]


def _flower() -> list[Part]:
    turns = [2 * math.pi * k / 6 for k in range(6)]
    petals: list[Part] = [
        ("body", _ellipse(0.38 * math.cos(a), -0.38 + 0.38 * math.sin(a), 0.27, 0.19, a)) for a in turns
    ]
    return [
        ("dark", _box(-0.05, 0.0, 0.05, 1.0)),
        ("dark", _ellipse(0.27, 0.6, 0.27, 0.11, -0.5)),
        ("dark", _ellipse(-0.27, 0.75, 0.27, 0.11, 0.5)),
        *petals,
        ("light", _ellipse(0, -0.38, 0.2, 0.2)),
        ("dark", _ellipse(0, -0.38, 0.08, 0.08)),
    ]


def _boat() -> list[Part]:
    return [
        ("dark", _line(0, -0.98, 0, 0.4, 0.08)),
        ("body", [(0.08, -0.9), (0.08, 0.25), (0.82, 0.25)]),
        ("light", [(-0.08, -0.7), (-0.08, 0.25), (-0.62, 0.25)]),
        ("body", [(-1.0, 0.38), (1.0, 0.38), (0.62, 0.92), (-0.62, 0.92)]),
        ("dark", [(-0.92, 0.48), (0.92, 0.48), (0.85, 0.58), (-0.85, 0.58)]),
    ]


def _ring() -> list[Part]:
    return [("body", _ellipse(0, 0, 0.95, 0.95)), ("cut", _ellipse(0, 0, 0.52, 0.52))]


def _cross() -> list[Part]:
    a, b = 0.32, 0.95
    outline = [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]
    return [("body", outline)]


@dataclass(frozen=True)
class NounShape:
    """How a noun is drawn, and its hat: the brim's centre and half width, in the noun's box."""

    parts: Callable[[], list[Part]]
    hat: tuple[float, float, float]


def _plain(outline: list[Point]) -> Callable[[], list[Part]]:
    return lambda: [("body", outline)]


NOUN_SHAPES: dict[str, NounShape] = {
    "circle": NounShape(_plain(_ellipse(0, 0, 0.95, 0.95)), (0, -0.78, 0.55)),
    "square": NounShape(_plain(_box(-0.84, -0.84, 0.84, 0.84)), (0, -0.82, 0.55)),
    "triangle": NounShape(_plain([(0, -0.95), (0.98, 0.78), (-0.98, 0.78)]), (0, -0.68, 0.42)),
    "star": NounShape(_plain(_star()), (0, -0.72, 0.42)),
    "ring": NounShape(_ring, (0, -0.8, 0.55)),
    "cross": NounShape(_cross, (0, -0.88, 0.5)),
    "heart": NounShape(_plain(_heart()), (0, -0.62, 0.55)),
    "diamond": NounShape(_plain([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]), (0, -0.75, 0.42)),
    "cat": NounShape(_cat, (0, -0.68, 0.45)),
    "fish": NounShape(_fish, (-0.35, -0.46, 0.42)),
    "house": NounShape(_house, (0, -0.8, 0.45)),
    "tree": NounShape(_tree, (0, -0.85, 0.45)),
    "flower": NounShape(_flower, (0, -0.85, 0.42)),
    "boat": NounShape(_boat, (0, -0.88, 0.4)),
}


def hat_parts(cx: float, cy: float, half: float) -> list[Part]:
    crown = [(cx - 0.62 * half, cy), (cx - 0.52 * half, cy - 1.0 * half), (cx + 0.52 * half, cy - 1.0 * half)]
    return [
        ("body", [*crown, (cx + 0.62 * half, cy)]),
        ("dark", _box(cx - 0.63 * half, cy - 0.3 * half, cx + 0.63 * half, cy - 0.06 * half)),
        ("body", _ellipse(cx, cy, half, 0.17 * half)),
    ]


def _tones(colour: str) -> dict[str, tuple[int, int, int]]:
    rgb = np.array(COLOURS[colour], dtype=float)
    if colour == "black":
        shades = {"body": rgb, "dark": rgb + 62, "light": rgb + 150, "rim": rgb * 0.4}
    elif colour == "white":
        shades = {"body": rgb, "dark": rgb * 0.66, "light": rgb * 0.86, "rim": rgb * 0.72}
    else:
        shades = {"body": rgb, "dark": rgb * 0.5, "light": rgb * 0.35 + 165, "rim": rgb * 0.68}
    return {name: tuple(int(v) for v in np.clip(shade, 0, 255)) for name, shade in shades.items()}  # type: ignore[misc]


SUPERSAMPLE = 2


def render(scene: Scene, side: int = 256, offset: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Draw a scene, `side` by `side` pixels. `offset` (top, left), in fractions of the side, is the corner at which a
    crop of a larger canvas begins: things move up and left by it."""
    rows = np.linspace(1.05, 0.93, side, dtype=np.float32)[:, None, None]
    canvas = np.array(COLOURS[scene.background], dtype=np.float32) * rows * np.ones((1, side, 1), np.float32)
    for thing in scene.things:
        _draw(canvas, thing, side, offset)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


def _draw(canvas: np.ndarray, thing: Thing, side: int, offset: tuple[float, float]) -> None:
    reach = thing.radius * side * 1.5
    left, top = (thing.x - offset[1]) * side - reach, (thing.y - offset[0]) * side - reach
    x0, y0 = math.floor(left), math.floor(top)
    box = math.ceil(2 * reach) + 1
    image = Image.new("RGB", (box * SUPERSAMPLE,) * 2, _tones(thing.colour)["rim"])
    mask = Image.new("L", image.size, 0)
    pen, cover = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    scale = thing.radius * side * SUPERSAMPLE
    cx, cy = (left + reach - x0) * SUPERSAMPLE, (top + reach - y0) * SUPERSAMPLE
    rim = max(1, round(0.035 * scale))
    drawing = NOUN_SHAPES[thing.noun]
    layers = [(thing.colour, drawing.parts())]
    if thing.hat:
        layers.append((thing.hat, hat_parts(*drawing.hat)))
    for colour, parts in layers:
        tones = _tones(colour)
        for tone, outline in parts:
            points = [(cx + x * scale, cy + y * scale) for x, y in outline]
            if tone == "cut":
                cover.polygon(points, fill=0)
                pen.line([*points, points[0]], fill=tones["rim"], width=rim)
                continue
            cover.polygon(points, fill=255)
            pen.polygon(points, fill=tones[tone])
            if tone == "body":
                pen.line([*points, points[0]], fill=tones["rim"], width=rim, joint="curve")
    cover_small = mask.reduce(SUPERSAMPLE)
    shadow = cover_small.filter(ImageFilter.GaussianBlur(0.07 * scale / SUPERSAMPLE))
    alpha = np.asarray(cover_small, dtype=np.float32)[:, :, None] / 255
    shade = np.linspace(1.14, 0.86, box, dtype=np.float32)
    light = (shade[:, None] + shade[None, :])[:, :, None] / 2
    colours = np.clip(np.asarray(image.reduce(SUPERSAMPLE), dtype=np.float32) * light, 0, 255)
    drop = round(0.07 * scale / SUPERSAMPLE)
    dark = 1 - 0.3 * np.roll(np.asarray(shadow, dtype=np.float32), (drop, drop), (0, 1))[:, :, None] / 255

    ys, xs = max(0, -y0), max(0, -x0)
    ye, xe = min(box, canvas.shape[0] - y0), min(box, canvas.shape[1] - x0)
    if ye <= ys or xe <= xs:
        return
    target = canvas[y0 + ys : y0 + ye, x0 + xs : x0 + xe]
    a = alpha[ys:ye, xs:xe]
    target[:] = target * dark[ys:ye, xs:xe] * (1 - a) + colours[ys:ye, xs:xe] * a
