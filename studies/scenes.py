"""A second opinion on nano's images, independent of CLIP: the recipe's judge as metrics for sweeps and studies."""

import re
from collections.abc import Iterator, Sequence

from recipes.nano.judge import TOWARDS, SceneVerdict, judge
from sdxl_lab.evaluation.metrics import Metric
from sdxl_lab.images import GeneratedImage

THING = r"an? (?:small |large )?(\w+) (\w+)"
PROMPT = re.compile(rf"{THING}(?: ({'|'.join(TOWARDS)}) {THING})? on an? (\w+) background")


def verdict(image: GeneratedImage) -> SceneVerdict:
    """The judge's verdict on an image whose prompt is one of nano's full sentences. Raises `ValueError` for others."""
    parsed = PROMPT.fullmatch(image.record.prompt)
    if parsed is None:
        raise ValueError(
            f"the judge needs one of nano's full sentences; received {image.record.prompt!r}. Example: "
            "a red circle on a blue background"
        )
    colour, noun, relation, other_colour, other_noun, background = parsed.groups()
    things = [(colour, noun), *([(other_colour, other_noun)] if relation else [])]
    return judge(image.image, background, things, relation)


def _right(images: Sequence[GeneratedImage], _: Sequence[GeneratedImage]) -> Iterator[float]:
    return (float(verdict(image).right) for image in images)


def _parts(images: Sequence[GeneratedImage], _: Sequence[GeneratedImage]) -> Iterator[float]:
    for found in map(verdict, images):
        yield (found.background + found.count + found.colour + found.noun + found.relation) / 5


JUDGE = "recipes/nano/judge.py"
scene_right = Metric("scene_right", "higher", f"{JUDGE}: all five parts of the prompt are in the image", _right)
scene_parts = Metric("scene_parts", "higher", f"{JUDGE}: the share of the five parts that are in the image", _parts)
