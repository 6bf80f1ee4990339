"""A second opinion on nano's pictures: the recipe's judge, which knows no CLIP, as metrics for sweeps and studies."""

import re
from collections.abc import Iterator, Sequence

from recipes.nano.judge import TOWARDS, Verdict, judge
from sdxl_lab.evaluation.metrics import Metric
from sdxl_lab.images import Picture

THING = r"an? (?:small |large )?(\w+) (\w+)"
PROMPT = re.compile(rf"{THING}(?: ({'|'.join(TOWARDS)}) {THING})? on an? (\w+) background")


def verdict(picture: Picture) -> Verdict:
    """What the judge says of a picture whose prompt is one of nano's full sentences. Raises `ValueError` for others."""
    said = PROMPT.fullmatch(picture.record["prompt"])
    if said is None:
        raise ValueError(
            f"the judge must have one of nano's full sentences; received {picture.record['prompt']!r}. Example: "
            "a red circle on a blue background"
        )
    colour, noun, relation, other_colour, other_noun, background = said.groups()
    things = [(colour, noun), *([(other_colour, other_noun)] if relation else [])]
    return judge(picture.image, background, things, relation)


def _right(pictures: Sequence[Picture], _: Sequence[Picture]) -> Iterator[float]:
    return (float(verdict(picture).right) for picture in pictures)


def _parts(pictures: Sequence[Picture], _: Sequence[Picture]) -> Iterator[float]:
    for found in map(verdict, pictures):
        yield (found.background + found.count + found.colour + found.noun + found.relation) / 5


JUDGE = "recipes/nano/judge.py"
scene_right = Metric("scene_right", "higher", f"{JUDGE}: all five parts of the prompt are in the picture", _right)
scene_parts = Metric("scene_parts", "higher", f"{JUDGE}: the share of the five parts that are in the picture", _parts)
