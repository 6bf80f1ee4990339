"""The files in `studies/` can be read, and the second opinion is the judge's."""

import random
from pathlib import Path

import pytest

from recipes.nano.scenes import caption, render, sample_scene
from sdxl_lab.images import GeneratedImage
from sdxl_lab.research.sweep import Sweep
from sdxl_lab.research.tune import StudyPlan
from studies.scenes import scene_parts, scene_right
from tests.made import image_record

FILES = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_file_is_a_sweep_or_a_study_of_held_out_scenes(file: Path) -> None:
    if file.stem.endswith("_tune"):
        assert len(StudyPlan.from_toml(file).pairs) >= 2
    else:
        assert len(Sweep.from_toml(file).cells) >= 2


def test_what_confirms_has_not_been_tuned_on() -> None:
    tuned, confirmed = (FILES[0].parent / f"nano_{name}.toml" for name in ("tune", "confirm"))
    seen = {prompt for prompt, _ in StudyPlan.from_toml(tuned).pairs}
    fresh = {cell.prompt for cell in Sweep.from_toml(confirmed).cells}
    assert not seen & fresh


def test_a_true_prompt_is_right_and_a_false_one_is_partly_right() -> None:
    rng = random.Random(3)
    for pair in (0.0, 1.0):
        scene = sample_scene(rng, pair=pair, hat=0.0)
        prompt = caption(scene)
        other = "black" if scene.background != "black" else "white"
        false = prompt.replace(f"{scene.background} background", f"{other} background").replace("an black", "a black")
        images = [GeneratedImage(render(scene), image_record(prompt=text), {}) for text in (prompt, false)]
        assert scene_right(images).tolist() == [1, 0]
        assert scene_parts(images).tolist() == [1, 0.8]


def test_other_sentences_are_refused() -> None:
    image = GeneratedImage(render(sample_scene(random.Random(1))), image_record(prompt="a cat in a hat"), {})
    with pytest.raises(ValueError, match="one of nano's full sentences; received 'a cat in a hat'"):
        scene_right([image])
