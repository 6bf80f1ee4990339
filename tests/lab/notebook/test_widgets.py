"""The panel by itself: its labels, its strip, its end."""

from collections.abc import Iterator

import ipywidgets
import pytest
from PIL import Image

from sdxl_lab.config import GenerationConfig
from sdxl_lab.images import GeneratedImage
from sdxl_lab.job import ImageRequest
from sdxl_lab.notebook.form import controls, values_of
from sdxl_lab.notebook.widgets import SHOWN, HistoryEntry, Panel
from tests.made import image_record

JOB = ImageRequest(GenerationConfig(), 'a <b>"cat"</b>', 7)


@pytest.fixture
def panel() -> Iterator[Panel]:
    panel = Panel()
    yield panel
    panel.close()


def drawn(number: int, width: int = 64) -> HistoryEntry:
    return HistoryEntry(
        number, JOB, GeneratedImage(Image.new("RGB", (width, 64), (number, 0, 0)), image_record(), {"total_ms": 1.0})
    )


def test_the_panel_has_a_control_for_every_value_of_the_form(panel: Panel) -> None:
    assert panel.controls.keys() == values_of(JOB).keys() | {"policy"} == controls().keys() | {"policy"}
    panel.fill(values_of(JOB))
    assert panel.values() == values_of(JOB) | {"policy": "fixed"}
    assert all(control.description for control in panel.controls.values())
    assert all(panel.controls[name].tooltip.startswith(control.setting.help) for name, control in controls().items())


def test_controls_without_a_choice_are_still_and_say_why(panel: Panel) -> None:
    panel.fill(values_of(JOB))
    for scheduler, still in (("lcm", True), ("euler", False)):
        panel.controls["scheduler"].value = scheduler
        panel.switch()
        assert [panel.controls[name].disabled for name in ("sigma_schedule", "sigmas", "steps")] == [
            still,
            still,
            False,
        ]
        assert panel.controls["sigma_schedule"].tooltip.startswith("lcm has no choice here" if still else "which noise")


KINDS = {
    "prompt": ipywidgets.Textarea,
    "seed": ipywidgets.Text,  # a browser's numbers end at 2^53
    "scheduler": ipywidgets.Dropdown,
    "steps": ipywidgets.IntText,
    "guidance_scale": ipywidgets.FloatText,
    "guidance_interval": ipywidgets.Checkbox,
    "guidance_interval.low": ipywidgets.FloatText,
    "crop.top": ipywidgets.IntText,
    "refiner.handover": ipywidgets.FloatText,
    "watermark": ipywidgets.Checkbox,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_control_is_made_by_the_kind_of_its_value(panel: Panel, name: str) -> None:
    assert type(panel.controls[name]) is KINDS[name]


def test_every_control_stands_on_the_panel_once(panel: Panel) -> None:
    def inside(widget: ipywidgets.Widget) -> list:
        return [widget, *(found for child in getattr(widget, "children", ()) for found in inside(child))]

    places = [id(widget) for widget in inside(panel.view)]
    assert {name: places.count(id(control)) for name, control in panel.controls.items()} == dict.fromkeys(
        panel.controls, 1
    )
    assert len(places) == len(set(places))


def test_controls_of_what_is_switched_off_are_hidden(panel: Panel) -> None:
    panel.fill(values_of(JOB))
    panel.switch()
    assert {row.layout.display for row in panel.rows.values()} == {"none"}
    panel.controls["refiner"].value = True
    panel.switch()
    assert [name for name, row in panel.rows.items() if row.layout.display is None] == ["refiner"]
    assert {"guidance_interval", "refiner", "original_size"} <= panel.rows.keys()


def test_errors_without_a_control_stand_below_the_buttons(panel: Panel) -> None:
    panel.tell({"model": "model must be nano", "steps": "steps must be 1"}, "config 123")
    assert "model must be nano" in panel.digest.value
    assert "config 123" not in panel.digest.value
    assert "steps must be 1" in panel.wrong["steps"].value


def test_an_error_of_a_folded_setting_unfolds_it(panel: Panel) -> None:
    panel.tell({"steps": "steps must be 1"}, "")
    assert panel.more.selected_index is None
    panel.tell({"watermark": "watermark must be false"}, "")
    assert panel.more.selected_index == 0
    assert "watermark must be false" in panel.wrong["watermark"].value


def test_a_prompt_is_text_and_never_markup(panel: Panel) -> None:
    panel.fill(values_of(JOB))
    panel.image.value = b""
    panel.say(JOB.prompt)
    assert "<b>" not in panel.status.value
    panel.tell({"prompt": JOB.prompt}, "")
    assert "<b>" not in panel.wrong["prompt"].value
    panel.show_comparison(drawn(1), drawn(2), {"prompt": (JOB.prompt, None)})
    assert "<b>" not in panel.comparison.children[1].value


def test_the_strip_shows_the_latest_first_and_closes_the_oldest(panel: Panel) -> None:
    for number in range(1, SHOWN + 3):
        panel.add_card(drawn(number), {"Show": lambda _: None})
        if number == SHOWN:
            full = len(ipywidgets.widgets.widget._instances)
    cards = [card.children[1].value for card in panel.strip.children]
    assert len(cards) == SHOWN
    assert f"#{SHOWN + 2}<" in cards[0]
    assert len(ipywidgets.widgets.widget._instances) == full, "widgets of old cards are closed"


def test_equal_images_have_no_difference(panel: Panel) -> None:
    panel.show_comparison(drawn(1), drawn(1), {})
    images, table = panel.comparison.children
    assert "Difference: none" in images.children[2].children[1].value
    assert "Same settings" in table.value


def test_the_difference_says_how_large_it_is(panel: Panel) -> None:
    panel.show_comparison(drawn(0), drawn(51), {})
    assert "largest 0.200, shown ×5.0" in panel.comparison.children[0].children[2].children[1].value


def test_closing_leaves_no_widget_behind() -> None:
    before = set(ipywidgets.widgets.widget._instances)
    panel = Panel()
    panel.add_card(drawn(1), {"Show": lambda _: None})
    panel.show_comparison(drawn(1), drawn(2), {})
    assert len(ipywidgets.widgets.widget._instances) > len(before) + 50
    panel.close()
    assert set(ipywidgets.widgets.widget._instances) == before
