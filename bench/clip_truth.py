"""Does the CLIP score track what is in the image? Compared with a scene check that shares no code with it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu, spearmanr

from bench.measure import Report
from bench.settings import Size, config_of
from recipes.nano.evaluate import held_out_scenes, verdict
from recipes.nano.judge import SceneVerdict
from recipes.nano.scenes import COLOURS, NOUNS, RELATIONS, Scene, caption, render
from sdxl_lab.config import GenerationConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.evaluation.metrics import Metric, clip_score
from sdxl_lab.evaluation.statistics import interval
from sdxl_lab.images import GeneratedImage
from sdxl_lab.job import ImageRequest
from sdxl_lab.record import ImageRecord

GUIDANCE = (1.0, 3.0, 6.0)
PARTS = ("right", "colour", "noun", "relation")
Verdicts = Sequence[Sequence[SceneVerdict]]
RENDERINGS = 200


def main(size: Size) -> None:
    """Captions of renderings, whose truth is known, then images of good and bad settings, as in a study."""
    clip = clip_score("nano" if size.model == "nano" else str(Path(size.model, "clip")))
    scenes = held_out_scenes(max(RENDERINGS, size.images), seed=41)
    drawn = scenes[: size.images]
    settings = [(steps, guidance) for steps, guidance in product(_steps(size), GUIDANCE)]
    images = _draw(size, drawn, settings)
    verdicts = [[verdict(image, scene) for image, scene in zip(row, drawn, strict=True)] for row in images]
    scores = clip([image for row in images for image in row]).reshape(len(settings), len(drawn))

    lines = {
        f"caption wrong in {part}: the true one wins": _interval(_wins(clip, scenes[:RENDERINGS], part))
        for part in ("background", "colour", "noun", "relation")
    }
    for part in PARTS:
        lines[f"two images: AUC for {part}"] = _area(scores, verdicts, drawn, part)
    for part in ("right", "colour", "noun"):
        lines[f"... of one prompt: AUC for {part}"] = _area_within(scores, verdicts, drawn, part)
    share = np.array([[verdict.right for verdict in row] for row in verdicts]).mean(axis=1)
    lines["settings: rank correlation with scenes right"] = _rank(scores.mean(axis=1), share)
    lines["settings: scenes right, worst"] = [float(share.min())]
    lines["settings: scenes right, best"] = [float(share.max())]
    lines["settings: scenes right, of the best score"] = [float(share[scores.mean(axis=1).argmax()])]
    conditions = (
        f"nano's CLIP; {RENDERINGS} renderings; {len(drawn)} held-out scenes x {len(settings)} settings (steps "
        f"{', '.join(map(str, _steps(size)))} x guidance {', '.join(f'{g:g}' for g in GUIDANCE)}); lowest and highest "
        "are 95 % intervals over scenes; chance is 0.5, for rank correlation 0"
    )
    measured = {label: values for label, values in lines.items() if values}
    Report("clip-truth", "CLIP score against the scene check", measured, conditions).show(size.folder)


def _steps(size: Size) -> tuple[int, ...]:
    return tuple(sorted({max(1, size.steps // 5), max(1, size.steps // 2), size.steps}))


def _draw(size: Size, scenes: Sequence[Scene], settings: Sequence[tuple[int, float]]) -> list[list[GeneratedImage]]:
    """One row for each setting, one image for each scene, which has the same seed in every row."""
    config = config_of(size)
    with Engine.load(config) as engine:
        jobs = [
            [
                engine.submit(ImageRequest(config.with_(steps=steps, guidance_scale=guidance), caption(scene), seed))
                for seed, scene in enumerate(scenes)
            ]
            for steps, guidance in settings
        ]
        return [[job.result() for job in row] for row in jobs]


def _wrong(scene: Scene, part: str, rng: random.Random) -> Scene:
    """The scene with one part changed."""

    def other(choices: Sequence[str], *than: str) -> str:
        return rng.choice([choice for choice in choices if choice not in than])

    first, *rest = scene.things
    if part == "background":
        return replace(scene, background=other(tuple(COLOURS), scene.background, *(t.colour for t in scene.things)))
    if part == "relation":
        assert scene.relation is not None
        return replace(scene, relation=RELATIONS[RELATIONS.index(scene.relation) ^ 1])
    if part == "noun":
        return replace(scene, things=(replace(first, noun=other(NOUNS, first.noun)), *rest))
    colour = other(tuple(COLOURS), first.colour, scene.background)
    return replace(scene, things=(replace(first, colour=colour), *rest))


def _wins(clip: Metric, scenes: Sequence[Scene], part: str) -> list[float]:
    """For each scene, whether the true caption of its rendering scores above one that is wrong in `part`."""
    rng = random.Random(7)
    relevant = [scene for scene in scenes if part != "relation" or scene.relation]
    images = [render(scene) for scene in relevant]
    true, false = (
        clip(
            [
                GeneratedImage(image, ImageRecord.model_construct(prompt=text, config=GenerationConfig()), {})
                for image, text in zip(images, texts, strict=True)
            ]
        )
        for texts in ([caption(scene) for scene in relevant], [caption(_wrong(scene, part, rng)) for scene in relevant])
    )
    return [float(value) for value in true > false]


def _right_in(verdicts: Verdicts, scenes: Sequence[Scene], part: str) -> tuple[np.ndarray, np.ndarray]:
    """Which images are right in `part`, (settings, relevant scenes), and the indices of these scenes."""
    relevant = np.array([i for i, scene in enumerate(scenes) if part != "relation" or scene.relation])
    return np.array([[getattr(row[index], part) for index in relevant] for row in verdicts]), relevant


def _auc(scores: np.ndarray, held: np.ndarray) -> float | None:
    """How often a right image scores above a wrong one (Mann and Whitney's U); None without both."""
    if not 0 < held.sum() < held.size:
        return None
    return float(mannwhitneyu(scores[held], scores[~held]).statistic / (held.sum() * (~held).sum()))


def _area(scores: np.ndarray, verdicts: Verdicts, scenes: Sequence[Scene], part: str) -> list[float]:
    """The AUC over any two images, with the interval from 500 resamples of the scenes."""
    held, relevant = _right_in(verdicts, scenes, part)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(relevant), size=len(relevant)) for _ in range(500)]
    areas = [area for index in drawn if (area := _auc(scores[:, relevant[index]], held[:, index])) is not None]
    whole = _auc(scores[:, relevant], held)
    return [] if whole is None else [whole, *np.percentile(areas, [2.5, 97.5]).tolist()]


def _area_within(scores: np.ndarray, verdicts: Verdicts, scenes: Sequence[Scene], part: str) -> list[float]:
    """The AUC over two images of one prompt and seed under different settings, with the interval over prompts."""
    held, relevant = _right_in(verdicts, scenes, part)
    areas = [_auc(scores[:, index], held[:, place]) for place, index in enumerate(relevant)]
    return _interval([area for area in areas if area is not None])


def _interval(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return list(values)
    found = interval(values)
    return [found.mean, found.low, found.high]


def _rank(first: np.ndarray, second: np.ndarray) -> list[float]:
    return [float(spearmanr(first, second).statistic)] if np.ptp(first) and np.ptp(second) else []
