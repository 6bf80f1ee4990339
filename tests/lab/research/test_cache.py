"""Cells are drawn once, whole or not at all, and measured without being drawn again."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_lab import files
from sdxl_lab.config import ConfigError, GenerationConfig, ModelRef, RefinerConfig, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import ModelError, identity
from sdxl_lab.errors import EngineStopped
from sdxl_lab.evaluation.metrics import METRICS, Metric
from sdxl_lab.images import ImageError, max_difference
from sdxl_lab.research import cache as room
from sdxl_lab.research.cache import Cell, ImageCache, Progress


@pytest.fixture
def store(tmp_path: Path, engine: Engine) -> ImageCache:
    return ImageCache(tmp_path / "cells", engine=engine)


def some(config: GenerationConfig, count: int) -> list[Cell]:
    return [Cell(config, "A cat in a hat", seed) for seed in range(count)]


def pixels(store: ImageCache, cell: Cell) -> np.ndarray:
    return np.asarray(store.image(store.key(cell)).image)


DECIDES = {
    "a field": lambda cell: replace(cell, config=cell.config.with_(guidance_scale=2.5)),
    "a field of the refiner": lambda cell: replace(cell, config=cell.config.with_(refiner=RefinerConfig(handover=0.7))),
    "the prompt": lambda cell: replace(cell, prompt="A cat in a pink hat"),
    "the seed": lambda cell: replace(cell, seed=1),
}


@pytest.mark.parametrize("change", DECIDES.values(), ids=DECIDES)
def test_what_is_asked_decides_the_key(store: ImageCache, tiny_config: GenerationConfig, change: Callable) -> None:
    cell = Cell(tiny_config.with_(refiner=RefinerConfig()), "A cat in a hat", 0)
    assert store.key(cell) == store.key(replace(cell))
    assert store.key(change(cell)) != store.key(cell)


def test_the_runtime_the_weights_and_the_libraries_decide_the_key_and_the_row_budget_does_not(
    tmp_path: Path, tiny_config: GenerationConfig, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(tiny_config, "A cat in a hat", 0)
    profile = RuntimeProfile(device="cpu")

    def key(profile: RuntimeProfile = profile) -> str:
        return ImageCache(tmp_path, profile).key(cell)

    first = key()
    assert key(profile.with_(rows=2, active=3, order="fifo", threads=1)) == first
    exact = profile.with_(exact=True)
    assert len({first, key(exact), key(exact.with_(threads=2))}) == 3, "bits depend on the number of threads"
    assert key(profile.with_(dtype="float32")) == first, "what auto stands for, not the word"
    assert key(profile.with_(dtype="bfloat16")) != first
    assert key(profile.with_(fuse_qkv=True)) != first
    with monkeypatch.context() as patch:
        patch.setattr(room, "_versions", lambda: {"torch": "another"})
        assert key() != first
    with monkeypatch.context() as patch:
        patch.setattr(room, "identity", lambda _: {"base": "retrained"})
        assert key() != first


def test_a_finished_cell_is_never_drawn_again(
    store: ImageCache, submitted: list, tiny_config: GenerationConfig, engine: Engine
) -> None:
    assert store.complete(some(tiny_config, 3)) == {}
    assert len(submitted) == 3
    assert ImageCache(store.folder, engine=engine).complete(some(tiny_config, 4)) == {}
    assert [(request.prompt, request.seed) for request in submitted[3:]] == [("A cat in a hat", 3)]


def test_a_cell_asked_for_twice_is_drawn_once(
    store: ImageCache, submitted: list, tiny_config: GenerationConfig
) -> None:
    store.complete(some(tiny_config, 2) * 2)
    assert len(submitted) == 2


def test_a_cell_is_the_image_that_the_engine_draws(
    store: ImageCache, engine: Engine, tiny_config: GenerationConfig
) -> None:
    cell = some(tiny_config, 1)[0]
    store.complete([cell])
    kept, alone = store.image(store.key(cell)), engine.draw(cell.request)
    assert max_difference(kept.image, alone.image) <= 1 / 255
    assert kept.record == alone.record
    assert store.costs(store.key(cell)).keys() == {"unet_calls", "unet_rows", "seconds"}
    assert store.costs(store.key(cell))["unet_rows"] == 8


DAMAGE = {
    "no numbers yet": lambda png, notes: notes.unlink(),
    "no image": lambda png, notes: png.unlink(),
    "half an image": lambda png, notes: png.write_bytes(png.read_bytes()[:500]),
    "another image": lambda png, notes: png.write_bytes(b"\x89PNG"),
    "half the numbers": lambda png, notes: notes.write_text(notes.read_text()[:40]),
    "other JSON": lambda png, notes: notes.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_half_written_cell_is_drawn_again(
    store: ImageCache, submitted: list, tiny_config: GenerationConfig, damage: Callable
) -> None:
    cells = some(tiny_config, 2)
    store.complete(cells, [METRICS["sharpness"]])
    before, key = pixels(store, cells[0]), store.key(cells[0])
    damage(store.folder / f"{key}.png", store.folder / f"{key}.json")
    assert key not in store
    with pytest.raises(ImageError, match="missing or half-written"):
        store.image(key)
    assert store.complete(cells, [METRICS["sharpness"]]) == {}
    assert len(submitted) == 3
    moved = np.abs(pixels(store, cells[0]).astype(int) - before)
    assert moved.max() <= 1, "the same image, but for the rounding of another batch"
    assert store.values(key, [METRICS["sharpness"]])


def test_no_part_of_a_failed_write_is_left(store: ImageCache, tiny_config: GenerationConfig, monkeypatch: Any) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.complete(some(tiny_config, 1))
    assert list(store.folder.iterdir()) == []


def test_a_metric_added_later_draws_nothing(store: ImageCache, submitted: list, tiny_config: GenerationConfig) -> None:
    cells = some(tiny_config, 3)
    key = store.key(cells[0])
    store.complete(cells, [METRICS["sharpness"]])
    store.complete(cells, [METRICS["sharpness"], METRICS["contrast"]])
    assert len(submitted) == 3
    image = store.image(key)
    assert store.values(key, [METRICS["sharpness"], METRICS["contrast"]]) == {
        name: METRICS[name]([image])[0] for name in ("sharpness", "contrast")
    }


def counting(name: str, source: str, calls: list[int]) -> Metric:
    def measure(images: Any, _: Any) -> list[float]:
        calls.append(len(images))
        return [float(len(source))] * len(images)

    return Metric(name, "higher", source, measure)


def test_a_number_is_measured_once_and_one_of_another_source_is_another(
    store: ImageCache, tiny_config: GenerationConfig
) -> None:
    cells, calls = some(tiny_config, 2), []
    first, second = counting("clip_score", "one model", calls), counting("clip_score", "another model", calls)
    for metric in (first, first, second, first):
        store.complete(cells, [metric])
    assert calls == [2, 2]
    key = store.key(cells[0])
    assert store.values(key, [first]) == {"clip_score": 9.0}
    assert store.values(key, [second]) == {"clip_score": 13.0}


def test_references_are_cells_of_their_own(store: ImageCache, submitted: list, tiny_config: GenerationConfig) -> None:
    reference = tiny_config.with_(steps=8)
    cells = [*some(tiny_config, 2), *some(reference, 1)]
    assert store.complete(cells, [METRICS["max_abs"]], reference) == {}
    assert len(submitted) == 4, "two cells, two references, one of them a cell too"
    found = [
        store.values(store.key(cell), [METRICS["max_abs"]], store.key(replace(cell, config=reference)))["max_abs"]
        for cell in cells
    ]
    assert found[0] > 0
    assert found[2] == 0


def test_a_cell_that_cannot_be_drawn_fails_alone_and_is_tried_again(
    store: ImageCache, submitted: list, tiny_config: GenerationConfig
) -> None:
    impossible = Cell(tiny_config.with_(steps=1, refiner=RefinerConfig(handover=0.9)), "A cat in a hat", 0)
    cells = [*some(tiny_config, 2), impossible]
    errors = store.complete(cells, [METRICS["sharpness"]])
    assert list(errors) == [store.key(impossible)]
    assert errors[store.key(impossible)].startswith("ConfigError: steps must be enough")
    assert store.complete(cells) == errors
    assert len(submitted) == 4


def test_a_metric_that_fails_on_one_image_keeps_the_others(store: ImageCache, tiny_config: GenerationConfig) -> None:
    def measure(images: Any, _: Any) -> list[float]:
        if any(image.record.seed == 1 for image in images):
            raise ValueError("odd seeds are not measured")
        return [1.0] * len(images)

    cells, metric = some(tiny_config, 3), Metric("even", None, "this test", measure)
    assert store.complete(cells, [metric]) == {store.key(cells[1]): "even: ValueError: odd seeds are not measured"}
    assert [store.values(store.key(cell), [metric]) for cell in cells] == [{"even": 1.0}, {}, {"even": 1.0}]


def test_an_interrupt_keeps_what_is_finished_and_frees_the_engine(
    store: ImageCache, engine: Engine, tiny_config: GenerationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, jobs, submit = some(tiny_config, 200), [], engine.submit

    def submitted(request: Any, **more: Any) -> Any:
        jobs.append(submit(request, **more))
        return jobs[-1]

    def stop(progress: Progress) -> None:
        if progress.done:
            jobs[7].result()  # the eighth is finished too, but nobody has fetched it
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", submitted)
        with pytest.raises(KeyboardInterrupt):
            store.complete(cells, on_progress=stop)
    kept = sum(store.key(cell) in store for cell in cells)
    assert 8 <= kept < 200
    assert store.key(cells[7]) in store
    engine.draw(cells[0].request)
    assert engine.stats().queued == 0, "the engine is free"
    told: list[Progress] = []
    assert store.complete(cells[:20], on_progress=told.append) == {}
    assert told[-1].drawn == 20 - told[0].done < 20


def test_the_engines_end_ends_the_work(store: ImageCache, engine: Engine, tiny_config: GenerationConfig) -> None:
    engine.close()
    with pytest.raises(EngineStopped):
        store.complete(some(tiny_config, 2))


def test_progress_counts_what_was_found_drawn_and_failed(store: ImageCache, tiny_config: GenerationConfig) -> None:
    told: list[Progress] = []
    store.complete(some(tiny_config, 2))
    impossible = Cell(tiny_config.with_(steps=1, refiner=RefinerConfig(handover=0.9)), "A cat in a hat", 0)
    store.complete([*some(tiny_config, 4), impossible], on_progress=told.append)
    assert told[0] == Progress(2, 5, 0, 0, None)
    assert [progress.done for progress in told] == [2, 3, 4, 5]
    last = told[-1]
    assert (last.drawn, last.failed, last.eta) == (2, 1, 0)
    assert all(progress.eta is not None and progress.eta >= 0 for progress in told[1:])


def test_no_engine_is_loaded_where_nothing_is_missing_and_one_at_a_time_where_models_differ(
    store: ImageCache, tiny_config: GenerationConfig, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    closed: list[bool] = []
    monkeypatch.setattr(room, "identity", lambda model: engine.weights)
    monkeypatch.setattr(engine, "_check_models", lambda request: None)
    monkeypatch.setattr(engine, "close", lambda: closed.append(True))
    monkeypatch.setattr(
        Engine, "load", classmethod(lambda cls, config, profile: (loaded.append(config.model.base), engine)[1])
    )
    other = tiny_config.with_(model=tiny_config.model.with_(base="other", refiner=None))
    cells = [*some(tiny_config, 2), *some(other, 2)]
    with ImageCache(store.folder / "own", RuntimeProfile(device="cpu")) as own:
        own.complete(cells)
        assert loaded == [tiny_config.model.base, "other"]
        assert closed == [True]
        own.complete(cells)
    assert len(loaded) == 2
    assert closed == [True, True]


def test_a_cell_is_checked_when_it_is_made(tiny_config: GenerationConfig) -> None:
    for prompt, seed in (("", 0), ("A cat", -1)):
        with pytest.raises(ConfigError):
            Cell(tiny_config, prompt, seed)


def test_a_cell_that_another_process_drew_and_measured_meanwhile_keeps_its_numbers(
    store: ImageCache, tiny_config: GenerationConfig, tmp_path: Path
) -> None:
    (cell,) = some(tiny_config, 1)
    metric, slow = METRICS["sharpness"], ImageCache(tmp_path / "cells", engine=store._engine({}))
    drawn = slow._drawn

    def meanwhile(*arguments: Any) -> Any:
        assert store.complete([cell], [metric]) == {}
        return drawn(*arguments)

    slow._drawn = meanwhile  # type: ignore[method-assign]
    assert slow.complete([cell]) == {}
    assert set(store.values(store.key(cell), [metric])) == {"sharpness"}


# --- other models than those of the engine lent ----------------------------------------------------------------------


def test_a_cell_of_another_model_than_the_engine_lent_fails_and_is_kept_under_no_name(
    store: ImageCache, tiny_config: GenerationConfig, submitted: list[Any]
) -> None:
    mine, theirs = Cell(tiny_config, "A cat", 0), Cell(tiny_config.with_(model=ModelRef()), "A cat", 0)
    errors = store.complete([mine, theirs])
    assert list(errors) == [store.key(theirs)]
    assert errors[store.key(theirs)].startswith("ModelMismatch: model must be the one that this engine was loaded for")
    assert store.key(mine) in store
    assert store.key(theirs) not in store
    assert len(list(store.folder.glob("*.png"))) == 1


def test_a_key_names_what_the_model_is_and_not_what_the_engine_lent_is(
    store: ImageCache, tiny_config: GenerationConfig, tmp_path: Path
) -> None:
    other = tiny_config.with_(model=ModelRef())
    assert store.ground(tiny_config.model)["weights"] == {"base": "random"}, "the engine's own"
    assert store.ground(other.model)["weights"] == identity(other.model)
    alone = ImageCache(tmp_path, store.profile)
    assert store.key(Cell(other, "A cat", 0)) == alone.key(Cell(other, "A cat", 0))


def test_another_refiner_matters_where_it_is_used(store: ImageCache, tiny_config: GenerationConfig) -> None:
    other = tiny_config.with_(model=tiny_config.model.with_(refiner="nano"))
    plain, refining = Cell(other, "A cat", 0), Cell(other.with_(refiner=RefinerConfig(handover=0.5)), "A cat", 0)
    assert list(store.complete([plain, refining])) == [store.key(refining)]
    assert store.image(store.key(plain)).record.config.model.refiner == "nano"


def test_a_model_whose_files_change_before_it_is_loaded_draws_nothing(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = GenerationConfig(model=ModelRef(base=str(folder / "base")), steps=1, width=64, height=64)
    with ImageCache(tmp_path / "cells", RuntimeProfile(device="cpu")) as own:
        key = own.key(Cell(config, "A cat", 0))
        path = folder / "base/scheduler/scheduler_config.json"
        path.write_text(path.read_text().replace("epsilon", "v_prediction"))
        with pytest.raises(ModelError, match="must stay as it is while its images are drawn"):
            own.complete([Cell(config, "A cat", 0)])
        assert key not in own


@pytest.mark.parametrize("text", ['{"schema": 2}', '{"schema": 1, "png": "x"}'])
def test_a_cell_of_another_schema_or_form_is_drawn_again(
    store: ImageCache, submitted: list[Any], tiny_config: GenerationConfig, text: str
) -> None:
    (cell,) = some(tiny_config, 1)
    store.complete([cell])
    (store.folder / f"{store.key(cell)}.json").write_text(text)
    assert store.key(cell) not in store
    assert store.complete([cell]) == {}
    assert len(submitted) == 2


def test_a_number_without_end_is_kept(store: ImageCache, tiny_config: GenerationConfig) -> None:
    """The PSNR of equal images."""
    (cell,) = some(tiny_config, 1)
    assert store.complete([cell], [METRICS["psnr"]], reference=tiny_config) == {}
    assert store.values(store.key(cell), [METRICS["psnr"]], store.key(cell)) == {"psnr": float("inf")}
