"""The explore panel's widgets: how it looks, what a control shows. The only importer of ipywidgets.

Widgets are set by value, from any thread, and never through an `Output`. What they do is `explorer.py`'s.
"""

import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as ipy
from PIL import Image

from sdxl_lab.config import FIT, MASK_BLUR, STRENGTH, GenerationConfig
from sdxl_lab.declaration import Choice, Number, Switch, Text, Whole
from sdxl_lab.images import GeneratedImage, magnified_difference
from sdxl_lab.job import ImageRequest, Job
from sdxl_lab.notebook.form import SEED_POLICIES, Control, controls, without_a_choice
from sdxl_lab.schedules import OWN

SHOWN = 24  # images in the history strip
THUMBNAIL = 136  # pixels
SOURCE = (STRENGTH, MASK_BLUR, FIT)
LONG = 1000  # characters: a text that may be longer has lines
LAYOUT = (  # the settings in sight, in rows; all others follow, folded
    ("prompt",),
    ("negative_prompt",),
    ("scheduler", "steps"),
    ("sigma_schedule", "timestep_spacing"),
    ("guidance_scale", "guidance_rescale"),
    ("guidance_interval",),
    ("width", "height"),
    ("seed", "policy"),
    ("refiner",),
)
STYLE = """<style>
.sdxl-explore { max-width: 870px; }
.sdxl-explore p { margin: 0; line-height: 1.45; overflow-wrap: anywhere; }
.sdxl-explore .jupyter-button { width: auto; }
.sdxl-field .widget-inline-hbox:not(.widget-checkbox) { flex-direction: column; height: auto; align-items: stretch; }
.sdxl-field .widget-inline-hbox > * { flex: none; }
.sdxl-field .widget-label { width: auto; max-width: none; height: 20px; line-height: 20px; text-align: left;
  font-size: 12px; color: var(--jp-ui-font-color2, #666); }
.sdxl-field .widget-checkbox { height: 28px; align-items: center; margin-top: 6px; }
.sdxl-field .widget-checkbox .widget-label-basic { width: auto; height: auto; line-height: 20px; align-items: center; }
.sdxl-field .widget-checkbox input { margin: 0 6px 0 2px; align-self: center; }
.sdxl-field input:not([type=checkbox]), .sdxl-field select { height: 28px; }
.sdxl-field textarea { height: auto; line-height: 1.4; padding: 4px 8px; font-family: inherit; }
.sdxl-quiet { color: var(--jp-ui-font-color2, #666); font-size: 12px; }
.sdxl-wrong { color: var(--jp-error-color1, #c62828); font-size: 12px; }
.sdxl-explore h4 { margin: 14px 2px 4px; font-size: 13px; font-weight: 600; line-height: 1.4; }
.sdxl-image { margin: 2px; aspect-ratio: 1; border-radius: 4px; overflow: hidden;
  background: var(--jp-layout-color2, #eee); }
.sdxl-image img { width: 100%; height: 100%; object-fit: contain; margin: 0; }
.sdxl-card { border: 1px solid var(--jp-border-color2, #ccc); border-radius: 4px; }
.sdxl-card .jupyter-button { padding: 0 4px; min-width: 0; }
.sdxl-explore table { border-collapse: collapse; line-height: 1.5; }
.sdxl-explore td, .sdxl-explore th { padding: 1px 16px 1px 0; text-align: left; vertical-align: top; }
</style>"""


AUTO: dict[str, Any] = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
TYPED = AUTO | {"continuous_update": False}


@dataclass(frozen=True)
class HistoryEntry:
    """An image of the history, under the number that the panel shows."""

    number: int
    request: ImageRequest
    generated: GeneratedImage

    @property
    def config(self) -> GenerationConfig:
        return self.request.config

    @property
    def prompt(self) -> str:
        return self.request.prompt

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def image(self) -> Image.Image:
        return self.generated.image

    def _repr_png_(self) -> bytes:
        return self.generated.png()


class Panel:
    """The widgets. `controls` are those of settings, by name, `taken` those of how a source image is taken; buttons are
    attributes."""

    def __init__(self) -> None:
        self.controls: dict[str, Any] = {name: _control(control) for name, control in controls().items()}
        self.controls["policy"] = ipy.Dropdown(description="Next image's seed", options=SEED_POLICIES, **AUTO)
        self.wrong = {name: ipy.HTML(layout={"display": "none"}) for name in self.controls}
        self.generate = _button("Generate", "Queue an image with these settings", "primary")
        self.stop = _button("Stop", "Stop what is being drawn and what is queued", "warning")
        self.use = _button("Use these settings", "Fill the controls with the settings of the image shown")
        self.save = _button("Save as candidate", "Write the configuration of the image shown to a file")
        self.name = ipy.Text("candidate", description="Candidate's name", **TYPED)
        self.taken: dict[str, Any] = {s.name: _control(Control(s.name, s.label, s.kind, s)) for s in SOURCE}
        for setting in SOURCE:
            self.taken[setting.name].value = setting.default
        self.start = _button("Start from the image shown", "The next images start from it instead of noise")
        self.anew = _button("Start from noise", "The next images start from noise again")
        self.source = ipy.FileUpload(accept="image/*", description="Source", layout={"width": "auto"})
        self.mask = ipy.FileUpload(accept="image/*", description="Mask", layout={"width": "auto"})
        self.digest, self.status, self.caption, self.saved, self.started = (ipy.HTML() for _ in range(5))
        self.image = ipy.Image(value=_png(Image.new("RGBA", (1, 1))), format="png")
        self.bar = ipy.FloatProgress(value=0, max=1, layout={"width": "auto"})
        self.strip = ipy.HBox(layout={"overflow": "auto"})
        self.comparison = ipy.VBox()
        self.strip_part = ipy.VBox([ipy.HTML("<h4>History</h4>"), self.strip], layout={"display": "none"})
        self.comparison_part = ipy.VBox([ipy.HTML("<h4>Comparison</h4>"), self.comparison], layout={"display": "none"})
        self.rows = {name: self._row(*parts) for name, parts in _switched().items()}
        self.folded = _folded()
        self.more = self._more()
        self.source_part = self._source_part()
        self.view = self._laid_out()
        _route_by_header(self.view)

    def _laid_out(self) -> ipy.VBox:
        buttons = ipy.HBox([_grow(self.generate), _grow(self.stop)], layout={"margin": "10px 0 2px", "grid_gap": "8px"})
        left = ipy.VBox(
            [
                *(part for names in LAYOUT for part in self._lines(*names)),
                self.more,
                self.source_part,
                buttons,
                self.digest,
            ],
            layout={"flex": "0 0 360px", "width": "360px"},
        )
        name = ipy.VBox([self.name], layout={"flex": "1 1 100px", "min_width": "0"})
        name.add_class("sdxl-field")
        right = ipy.VBox(
            [
                _framed(self.image),
                self.bar,
                self.status,
                self.caption,
                ipy.HBox([name, self.save, self.use], layout={"align_items": "flex-end", "margin": "6px 0 0"}),
                self.saved,
            ],
            layout={"flex": "1 1 320px", "min_width": "0", "max_width": "480px"},
        )
        columns = ipy.HBox([left, right], layout={"grid_gap": "12px 28px", "flex_flow": "row wrap"})
        view = ipy.VBox([ipy.HTML(STYLE, layout={"display": "none"}), columns, self.strip_part, self.comparison_part])
        view.add_class("sdxl-explore")
        return view

    def _lines(self, *names: str) -> list[ipy.Widget]:
        """A row of controls, and below it those of what it switches."""
        lines: list[ipy.Widget] = [self._field(*names) if len(names) == 1 else self._row(*names)]
        for name in names:
            lines += self._below(name)
        return lines

    def _below(self, switch: str) -> list[ipy.Widget]:
        parts = _switched().get(switch, [])
        return [self.rows[switch], *(line for part in parts for line in self._below(part))] if parts else []

    def _more(self) -> ipy.Accordion:
        """What is folded, a row for each setting."""
        rows: dict[str, list[str]] = {}
        for name in self.folded:
            if controls()[name].under is None:
                rows.setdefault(controls()[name].setting.name, []).append(name)
        lines = [line for names in rows.values() for line in self._lines(*names)]
        return ipy.Accordion([ipy.VBox(lines)], titles=["More settings"], layout={"margin": "6px 0 0"})

    def _source_part(self) -> ipy.Accordion:
        """What the next images start from, folded."""
        fields = [ipy.VBox([control]) for control in self.taken.values()]
        for field in fields:
            field.add_class("sdxl-field")
        rows = [
            ipy.HBox(pair, layout={"grid_gap": "8px"}) for pair in ((self.start, self.anew), (self.source, self.mask))
        ]
        return ipy.Accordion(
            [ipy.VBox([*rows, *fields, self.started])], titles=["Source image"], layout={"margin": "6px 0 0"}
        )

    def _field(self, name: str) -> ipy.VBox:
        """A control with room for what is wrong with it."""
        box = ipy.VBox([self.controls[name], self.wrong[name]])
        box.add_class("sdxl-field")
        return box

    def _row(self, *names: str) -> ipy.HBox:
        row = ipy.HBox([self._field(name) for name in names], layout={"grid_gap": "8px"})
        for field in row.children:
            field.layout.flex, field.layout.min_width = "1 1 0", "0"
        return row

    def close(self) -> None:
        _close(self.view)

    # --- the controls ------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def fill(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.controls[name].value = value

    def say_source(self, text: str) -> None:
        self.started.value = _line(text, "sdxl-quiet")

    def switch(self) -> None:
        """Show the controls of what is switched on, and of what that switches; those without a choice are still."""
        still = without_a_choice(self.values())
        for name, control in controls().items():
            self.controls[name].disabled = name in still
            self.controls[name].tooltip = still.get(name) or _tooltip(control)
        on: dict[str | None, bool] = {None: True}
        for name, row in self.rows.items():
            on[name] = bool(self.controls[name].value) and on[controls()[name].under]
            _reveal(row, on[name])

    def tell(self, errors: Mapping[str, str], digest: str) -> None:
        """Put each error beside its control, which is unfolded, and the others below the buttons with the digest."""
        if errors.keys() & self.folded:
            self.more.selected_index = 0
        for name, wrong in self.wrong.items():
            wrong.value = _line(errors[name], "sdxl-wrong") if name in errors else ""
            _reveal(wrong, name in errors)
        rest = [text for name, text in errors.items() if name not in self.wrong]
        self.digest.value = _line(" ".join(rest), "sdxl-wrong") if rest else _line(digest, "sdxl-quiet")

    # --- what is being drawn -----------------------------------------------------------------------------------------

    def show_progress(self, jobs: Sequence[Job[GeneratedImage]]) -> None:
        """Step, time left and preview of the first image under way."""
        job = next((job for job in jobs if job.state == "running"), jobs[0])
        calls, total = job.progress
        more = f"; {len(jobs) - 1} more" if len(jobs) > 1 else ""
        if not total:
            self.say(f"Waiting in the engine's queue, place {job.position}{more}")
            return
        if calls and (calls, total) != (self.bar.value, self.bar.max):
            preview = job.preview()
            if preview is not None:
                self.image.value = _png(preview)
        self.bar.bar_style = ""
        self.bar.max, self.bar.value = total, calls
        eta = job.eta
        left = f", {_duration(eta)} left" if eta is not None and eta >= 1 else ""
        self.say(f"{f'Step {calls} of {total}' if calls < total else 'Decoding'}{left}{more}")

    def show_done(self, job: Job[GeneratedImage]) -> None:
        self.bar.value, self.bar.bar_style = self.bar.max, "success"
        self.say(f"Done in {job.result().timings['total_ms'] / 1000:.1f} s")

    def show_stopped(self, reason: str | None) -> None:
        """Stopped by hand, or failed for a reason."""
        self.bar.bar_style = "warning" if reason is None else "danger"
        self.say(reason or "Stopped", failed=reason is not None)

    def say(self, text: str, failed: bool = False) -> None:
        self.status.value = _line(text, "sdxl-wrong" if failed else "")

    # --- what was drawn ----------------------------------------------------------------------------------------------

    def show(self, drawn: HistoryEntry) -> None:
        self.image.value = drawn.generated.png()
        lines = [f"#{drawn.number}: {drawn.prompt}", ", ".join(_settings(drawn)), f"config {drawn.config.short_digest}"]
        self.caption.value = "".join(_line(line, "sdxl-quiet") for line in lines)

    def add_card(self, drawn: HistoryEntry, actions: Mapping[str, Callable[[object], None]]) -> None:
        """Put an image in front of the history strip; the oldest leaves when there are `SHOWN`."""
        small = drawn.image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        lines = "".join(_line(text, "sdxl-quiet") for text in [f"#{drawn.number}", *_settings(drawn)])
        buttons = []
        for name, action in actions.items():
            button = _button(name, f"{name} #{drawn.number}")
            button.on_click(action)
            buttons.append(_grow(button))
        card = ipy.VBox(
            [_framed(ipy.Image(value=_png(small))), ipy.HTML(lines, layout={"flex": "1 0 auto"}), ipy.HBox(buttons)],
            layout={"flex": f"0 0 {THUMBNAIL + 16}px", "padding": "6px", "margin": "2px 4px"},
        )
        card.add_class("sdxl-card")
        _route_by_header(card)
        kept, gone = self.strip.children[: SHOWN - 1], self.strip.children[SHOWN - 1 :]
        self.strip.children = (card, *kept)
        _reveal(self.strip_part, True)
        for old in gone:
            _close(old)

    def show_comparison(
        self, first: HistoryEntry, second: HistoryEntry, different: Mapping[str, tuple[Any, Any]]
    ) -> None:
        """Two images, the difference of their pixels where they have the same size, and the settings that differ."""
        images = [(first.image, f"A: #{first.number}"), (second.image, f"B: #{second.number}")]
        if first.image.size == second.image.size:
            difference, gain = magnified_difference(first.image, second.image)
            largest = f"largest {1 / gain:.3f}, shown ×{gain:.1f}" if gain != 1 or difference.getbbox() else "none"
            images.append((difference, f"Difference: {largest}"))
        columns = [
            ipy.VBox(
                [_framed(ipy.Image(value=_png(image))), ipy.HTML(_line(title, "sdxl-quiet"))],
                layout={"flex": "0 1 250px", "min_width": "120px"},
            )
            for image, title in images
        ]
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_shown(a)}</td><td>{_shown(b)}</td></tr>"
            for name, (a, b) in different.items()
        )
        table = (
            f"<table><tr><th>differs</th><th>A</th><th>B</th></tr>{rows}</table>" if rows else _line("Same settings")
        )
        self._compare(ipy.HBox(columns, layout={"grid_gap": "12px"}), ipy.HTML(table))

    def say_compare(self, text: str) -> None:
        self._compare(ipy.HTML(_line(text)))

    def _compare(self, *parts: ipy.Widget) -> None:
        old, self.comparison.children = self.comparison.children, parts
        _reveal(self.comparison_part, True)
        for part in old:
            _close(part)

    def say_saved(self, text: str, failed: bool = False) -> None:
        self.saved.value = _line(text, "sdxl-wrong" if failed else "")


def _control(control: Control) -> ipy.Widget:
    """A control by the kind of its value. A seed is typed as text, since a browser's numbers end at 2^53."""
    kind, step = control.kind, control.setting.step
    if isinstance(kind, Whole) and kind.high > 2**53:
        kind = Text()
    said = {"description": control.label, "tooltip": _tooltip(control), **AUTO}
    match kind:
        case Switch():
            return ipy.Checkbox(indent=False, **said)
        case Choice(values=values):
            return ipy.Dropdown(options=values, **said)
        case Whole():
            return ipy.IntText(step=int(step or 1), **said)
        case Number():
            return ipy.FloatText(step=step or 0.1, **said)
        case Text(high=high) if high > LONG:
            return ipy.Textarea(rows=2 if control.setting.optional else 3, continuous_update=False, **said)
    return ipy.Text(continuous_update=False, **said)


def _tooltip(control: Control) -> str:
    rule = "" if isinstance(control.kind, Switch | Text) else f": {control.setting.rule}"
    return f"{control.setting.help}{rule}"


def _folded() -> list[str]:
    """The controls of settings that `LAYOUT` does not name."""
    seen = {name for names in LAYOUT for name in names}
    return [name for name, control in controls().items() if control.setting.name.partition(".")[0] not in seen]


def _switched() -> dict[str, list[str]]:
    """The controls under each switch."""
    found: dict[str, list[str]] = {}
    for name, control in controls().items():
        if control.under is not None:
            found.setdefault(control.under, []).append(name)
    return found


def _button(text: str, tooltip: str, style: str = "") -> ipy.Button:
    return ipy.Button(description=text, tooltip=tooltip, button_style=style, layout={"width": "auto"})


def _grow(widget: ipy.Widget) -> ipy.Widget:
    widget.layout.flex = "1 1 auto"
    return widget


def _framed(image: ipy.Image) -> ipy.Box:
    """A square that an image of any size is fitted into, so that nothing jumps."""
    frame = ipy.Box([image], layout={"width": "auto"})
    frame.add_class("sdxl-image")
    return frame


def _reveal(widget: ipy.Widget, visible: bool) -> None:
    widget.layout.display = None if visible else "none"


def _line(text: str, style: str = "") -> str:
    return f'<p class="{style}">{html.escape(text)}</p>'


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _shown(value: object) -> str:
    return "–" if value is None else html.escape(str(value))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _settings(drawn: HistoryEntry) -> list[str]:
    """What one wants to know of an image at a glance."""
    config = drawn.config
    guidance = f"guidance {config.guidance_scale:g}"
    if config.guidance_rescale:
        guidance += f", rescale {config.guidance_rescale:g}"
    if config.guidance_interval:
        guidance += " in {:g}–{:g}".format(*config.guidance_interval)
    size = f"{drawn.image.width}×{drawn.image.height}, seed {drawn.seed}"
    schedule = next((text for text in (config.sigma_schedule, config.timestep_spacing) if text != OWN), "")
    schedule = schedule or ("own sigmas" if config.sigmas else "own timesteps" if config.timesteps else "")
    lines = [f"{config.scheduler}{f', {schedule}' if schedule else ''}", f"{config.steps} steps, {guidance}", size]
    if config.refiner:
        scores = f"{config.refiner.aesthetic_score:g}/{config.refiner.negative_aesthetic_score:g}"
        lines.append(f"refiner at {config.refiner.handover:g}, {scores}")
    if config.hires:
        lines.append(f"enlarged {config.hires.scale:g}×, strength {config.hires.strength:g}")
    if source := drawn.request.source:
        lines.append(f"from an image{' with a mask' if source.mask else ''}, strength {source.strength:g}")
    return lines


def _parts(widget: ipy.Widget) -> Iterator[ipy.Widget]:
    """A widget and all that it is made of."""
    for child in getattr(widget, "children", ()):
        yield from _parts(child)
    yield from (getattr(widget, name) for name in ("layout", "style") if getattr(widget, name, None) is not None)
    yield widget


def _close(widget: ipy.Widget) -> None:
    for part in _parts(widget):
        part.close()


def _route_by_header(widget: ipy.Widget) -> None:
    """Let clicks through while a cell runs.

    JupyterLab sends a widget's messages to a subshell, a thread of its own, and says so in their header. ipykernel 7.4
    overrides that with the shell that last published on the widget's comm, which for a widget made in a cell is the
    main one, and that waits for the running cell, while other widgets' messages overtake. Without its route the header
    counts.
    """
    for part in _parts(widget):
        part.comm._reply_subshell_for = None
