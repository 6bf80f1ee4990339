"""The panel's buttons and the methods behind them, on the random model: no browser, real images."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig, RefinerConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.errors import Cancelled, ModelMismatch
from sdxl_lab.images import max_difference, open_image, read_record
from sdxl_lab.job import ImageRequest
from sdxl_lab.notebook.explorer import Explorer
from sdxl_lab.notebook.form import FormError


@pytest.fixture
def explorer(start: Callable[..., Any], tiny_config: GenerationConfig, tmp_path: Path) -> Iterator[Explorer]:
    with Explorer(start(), tiny_config, "a boat", seed=7, folder=tmp_path / "out") as explorer:
        yield explorer


def wait(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def click_generate(explorer: Explorer) -> None:
    """Click, and wait for the end of it."""
    explorer.panel.generate.click()
    wait(lambda: explorer._watcher is None)


def set_(explorer: Explorer, **values: object) -> None:
    for name, value in values.items():
        explorer.panel.controls[name.replace("__", ".")].value = value


def test_generate_draws_what_the_controls_say(explorer: Explorer) -> None:
    set_(explorer, prompt="a red cat", scheduler="heun", steps=3, seed="12", refiner=True, refiner__handover=0.5)
    click_generate(explorer)
    (drawn,) = explorer.history
    assert (drawn.prompt, drawn.seed, drawn.config.scheduler, drawn.config.steps) == ("a red cat", 12, "heun", 3)
    assert drawn.config.refiner == RefinerConfig(handover=0.5)
    shown = bytes(explorer.panel.image.value)
    assert max_difference(open_image(shown), drawn.image) == 0
    assert read_record(shown).digest == drawn.config.digest
    assert "Done in" in explorer.panel.status.value
    for text in ("#1: a red cat", "heun, 3 steps, guidance 5", "seed 12", "refiner at 0.5", drawn.config.short_digest):
        assert text in explorer.panel.caption.value
    assert len(explorer.panel.strip.children) == 1


def test_several_clicks_queue_up(explorer: Explorer) -> None:
    set_(explorer, policy="next", steps=30)
    for _ in range(3):
        explorer.panel.generate.click()
    wait(lambda: explorer._watcher is None)
    assert [(drawn.number, drawn.seed) for drawn in explorer.history] == [(1, 7), (2, 8), (3, 9)]
    assert explorer.panel.controls["seed"].value == "9"
    assert len(explorer.panel.strip.children) == 3


def test_a_random_seed_is_drawn_for_each_image_and_shown(explorer: Explorer) -> None:
    set_(explorer, policy="random")
    click_generate(explorer)
    click_generate(explorer)
    first, second = (drawn.seed for drawn in explorer.history)
    assert first != second
    assert explorer.panel.controls["seed"].value == str(second)


@pytest.mark.slow
def test_preview_and_progress_are_seen_on_the_way(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = Engine._predict
    monkeypatch.setattr(Engine, "_predict", lambda *given: time.sleep(0.03) or predict(*given))  # long enough to look
    said, images = set(), set()
    explorer.panel.status.observe(lambda change: said.add(change.new), "value")
    explorer.panel.image.observe(lambda change: images.add(change.new), "value")
    set_(explorer, steps=60)
    click_generate(explorer)
    assert any("of 60" in text for text in said)
    assert any("s left" in text for text in said)
    assert len(images) >= 3, "previews, then the image"
    assert explorer.panel.bar.value == explorer.panel.bar.max == 60


def test_stop_ends_what_is_drawn_and_what_is_queued(explorer: Explorer) -> None:
    explorer.engine.rows = 2  # one image at a time
    set_(explorer, steps=1000)
    explorer.panel.generate.click()
    explorer.panel.generate.click()
    wait(lambda: explorer.engine.stats().running)
    explorer.panel.stop.click()
    wait(lambda: explorer._watcher is None)
    assert explorer.history == []
    assert "Stopped" in explorer.panel.status.value
    assert explorer.panel.bar.bar_style == "warning"
    set_(explorer, steps=2)
    click_generate(explorer)
    assert len(explorer.history) == 1


def test_stop_with_nothing_to_stop_says_so(explorer: Explorer) -> None:
    explorer.panel.stop.click()
    assert "Nothing is being drawn" in explorer.panel.status.value


def test_a_bad_value_stays_and_is_told_beside_its_control(explorer: Explorer) -> None:
    set_(explorer, steps=0, prompt="a house", refiner=True, refiner__handover=1.5)
    wrong = explorer.panel.wrong
    assert "steps must be a whole number from 1 to 1000; received 0" in wrong["steps"].value
    assert "handover must be a number above 0 and below 1; received 1.5" in wrong["refiner.handover"].value
    assert not wrong["prompt"].value
    explorer.panel.generate.click()
    assert explorer._watcher is None
    assert explorer.history == []
    assert (explorer.panel.controls["steps"].value, explorer.panel.controls["prompt"].value) == (0, "a house")
    with pytest.raises(FormError, match="steps must be"):
        explorer.draw()
    set_(explorer, steps=2, refiner__handover=0.5)
    assert not any(each.value for each in wrong.values())
    assert explorer.config.short_digest in explorer.panel.digest.value


def test_what_only_the_engine_can_refuse_is_told_at_the_control_too(explorer: Explorer) -> None:
    set_(explorer, steps=1, refiner=True, refiner__handover=0.99)
    click_generate(explorer)
    assert "enough that both base and refiner get one" in explorer.panel.wrong["steps"].value
    assert "enough that both base and refiner get one" in explorer.panel.status.value


def test_a_failing_engine_shows_its_reason(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the card fell off the bus")

    monkeypatch.setattr(explorer.engine, "_step", broken)
    click_generate(explorer)
    assert "the card fell off the bus" in explorer.panel.status.value
    assert explorer.panel.bar.bar_style == "danger"
    explorer.panel.generate.click()  # refused at once by the engine that ended
    assert "the card fell off the bus" in explorer.panel.digest.value


def test_a_full_queue_is_told_below_the_buttons(start: Callable[..., Any], tiny_config: GenerationConfig) -> None:
    with Explorer(start(rows=2, max_queue=1), tiny_config.with_(steps=1000)) as explorer:
        for _ in range(3):  # one is drawn, one may wait
            explorer.panel.generate.click()
        assert "1 images are waiting, and no more are taken" in explorer.panel.digest.value
        explorer.panel.controls["steps"].value = 999
        assert "images are waiting" not in explorer.panel.digest.value


def test_these_settings_are_used_again(explorer: Explorer, tiny_config: GenerationConfig) -> None:
    explorer.draw(scheduler="ddim", guidance_interval=(0.5, 3.0), crop=(8, 8), negative_prompt="", seed=2**63 - 1)
    explorer.draw()
    first, second = explorer.history
    assert second.config == tiny_config
    buttons(explorer, first.number)["Show"].click()
    explorer.panel.use.click()
    assert explorer.request == first.request, "to the last field, those without a control too"
    click_generate(explorer)
    assert max_difference(explorer.history[-1].image, first.image) == 0


def buttons(explorer: Explorer, number: int) -> dict[str, Any]:
    """Of an image's card in the strip."""
    card = next(card for card in explorer.panel.strip.children if f"#{number}<" in card.children[1].value)
    return {button.description: button for button in card.children[2].children}


def test_two_images_are_compared(explorer: Explorer) -> None:
    explorer.draw()
    explorer.draw(scheduler="ddim", steps=6)
    buttons(explorer, 1)["A"].click()
    assert "#1 is A" in explorer.panel.comparison.children[0].value
    buttons(explorer, 2)["B"].click()
    images, table = explorer.panel.comparison.children
    assert len(images.children) == 3, "A, B and their difference"
    for text in ("scheduler</td><td>euler</td><td>ddim", "steps</td><td>4</td><td>6"):
        assert text in table.value
    assert "seed" not in table.value
    assert explorer.compare(*explorer.history) == {"scheduler": ("euler", "ddim"), "steps": (4, 6)}


def test_images_of_other_sizes_are_compared_without_a_difference(explorer: Explorer) -> None:
    assert explorer.compare(explorer.draw(), explorer.draw(width=128)) == {"width": (64, 128)}
    assert len(explorer.panel.comparison.children[0].children) == 2


def test_a_candidate_is_saved_and_never_overwritten(explorer: Explorer) -> None:
    explorer.panel.save.click()
    assert "draw one first" in explorer.panel.saved.value
    assert explorer.candidate == explorer.config
    first = explorer.draw(scheduler="ddim")
    assert explorer.candidate == first.config
    explorer.panel.save.click()
    path = explorer.folder / "candidate.toml"
    assert str(path) in explorer.panel.saved.value
    assert GenerationConfig.from_toml(path) == first.config
    explorer.panel.save.click()
    assert "Saved" in explorer.panel.saved.value, "the same configuration again is no conflict"

    second = explorer.draw(scheduler="heun")
    explorer.panel.save.click()
    assert "holds another configuration" in explorer.panel.saved.value
    assert GenerationConfig.from_toml(path) == first.config == explorer.candidate
    explorer.panel.name.value = "second"
    explorer.panel.save.click()
    assert GenerationConfig.from_toml(explorer.folder / "second.toml") == second.config == explorer.candidate


@pytest.mark.parametrize("name", ["../up", "/etc/candidate", ".hidden", "a/b"])
def test_a_candidates_name_leads_nowhere_else(explorer: Explorer, name: str) -> None:
    explorer.draw()
    with pytest.raises(ValueError, match="must be a file's name without folders"):
        explorer.save(name=name)
    assert not explorer.folder.exists()


def test_cells_draw_what_the_controls_say_with_changes(explorer: Explorer, tiny_config: GenerationConfig) -> None:
    drawn = explorer.draw(prompt="a fish", steps=2, seed=5)
    assert (drawn.prompt, drawn.seed, drawn.config) == ("a fish", 5, tiny_config.with_(steps=2))
    assert explorer.request.prompt == "a boat", "the controls stay"
    assert explorer.shown == explorer.history[-1] == drawn
    with pytest.raises(ConfigError, match="steps must be"):
        explorer.draw(steps=0)
    job = explorer.generate(steps=1000)
    explorer.stop()
    with pytest.raises(Cancelled):
        job.result(60)


@pytest.mark.usefixtures("interruptible")
def test_interrupting_a_cell_stops_its_image(explorer: Explorer) -> None:
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        explorer.draw(steps=1000)
    wait(lambda: explorer._watcher is None)
    assert explorer.history == []


def test_a_image_is_in_the_history_as_soon_as_its_ticket_is_done(explorer: Explorer) -> None:
    for _ in range(5):
        job = explorer.generate()
        job.result()
        assert explorer.history[-1].request is job.request


def test_closing_stops_the_drawing_and_ends_the_thread(explorer: Explorer) -> None:
    job = explorer.generate(steps=1000)
    explorer.close()
    assert job.state == "cancelled"
    assert not [thread for thread in threading.enumerate() if thread.name == "explore"]
    assert explorer.engine.healthy
    explorer.close()  # again does no harm


def test_an_image_of_another_model_is_refused_and_not_drawn_under_its_name(
    explorer: Explorer, tiny_config: GenerationConfig
) -> None:
    other = tiny_config.model.with_(base="nano")
    with pytest.raises(ModelMismatch, match=r"loaded for, .*received \{'base': 'nano'"):
        explorer.generate(model=other)
    explorer.use(ImageRequest(tiny_config.with_(model=other), "a cat", 1))
    explorer.panel.generate.click()
    assert "loaded for" in explorer.panel.digest.value
    assert explorer.history == []


def test_how_much_of_a_prompt_is_read_is_told_while_it_is_typed(explorer: Explorer) -> None:
    set_(explorer, prompt="cat " * 75)
    assert "prompt: 75 of 75 tokens" in explorer.panel.digest.value
    assert not explorer.panel.wrong["prompt"].value
    set_(explorer, prompt="cat " * 75 + "hat")
    assert "prompt: 76 of 75 tokens" in explorer.panel.digest.value
    assert "cut &#x27;hat&#x27;" in explorer.panel.wrong["prompt"].value
    set_(explorer, prompt_syntax="a1111")
    assert "prompt: 76 tokens" in explorer.panel.digest.value
    assert not explorer.panel.wrong["prompt"].value


# --- source images ---------------------------------------------------------------------------------------------------


def uploaded(image: Image.Image) -> tuple[dict[str, Any], ...]:
    """What a browser sends of a file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    now = datetime.now(tz=UTC)
    return ({"name": "x.png", "type": "image/png", "size": 1, "content": buffer.getvalue(), "last_modified": now},)


def test_the_next_image_starts_from_the_one_shown(explorer: Explorer) -> None:
    click_generate(explorer)
    explorer.panel.start.click()
    explorer.panel.taken["strength"].value = 0.5
    click_generate(explorer)
    first, second = explorer.history
    assert second.request.source.strength == 0.5
    assert second.generated.record.source == first.generated.record
    assert max_difference(second.request.source.image, first.image) == 0
    assert "from an image, strength 0.5" in explorer.panel.caption.value
    assert "source.strength" in explorer.compare(first, second)
    explorer.panel.anew.click()
    assert explorer.request.source is None
    explorer.use(second)
    assert explorer.request == second.request


def test_source_and_mask_are_uploaded(explorer: Explorer) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    explorer.panel.mask.value = uploaded(mask)
    assert "a mask must come with a source" in explorer.panel.digest.value
    explorer.panel.source.value = uploaded(Image.linear_gradient("L").resize((64, 64)))
    explorer.panel.mask.value = uploaded(mask.copy())
    assert explorer.request.source.fitted_mask((64, 64)).mean() == 0.5
    assert "painted anew where the mask is white" in explorer.panel.started.value
    click_generate(explorer)
    assert explorer.history[0].generated.record.source_image.mask_sha256


def test_what_a_source_cannot_be_taken_with_is_told(explorer: Explorer) -> None:
    explorer.start_from(Image.linear_gradient("L"))
    explorer.panel.taken["strength"].value = 2.0
    assert "strength must be a number above 0, at most 1; received 2.0" in explorer.panel.digest.value
    explorer.panel.taken["strength"].value = 0.9
    assert "config" in explorer.panel.digest.value
