"""Exploring by hand: a panel on an engine, in a notebook. How it looks is `widgets.py`'s, what its controls mean
`form.py`'s.

Handlers only submit to the engine or cancel a job; one thread watches what is being drawn and sets the widgets'
values. Nothing is printed, so a running cell neither blocks the panel nor gets its text. Every button has a method, so
that cells and tests do what hands do.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.errors import Cancelled
from sdxl_lab.images import GeneratedImage, open_image
from sdxl_lab.job import ImageRequest, Job
from sdxl_lab.notebook.form import FormError, differences, next_seed, request_of, told_at, values_of
from sdxl_lab.notebook.widgets import HistoryEntry, Panel
from sdxl_lab.source import SourceImage

PERIOD = 0.1  # seconds between two looks at what is being drawn


class Asked(NamedTuple):
    """An image asked for. `over` is set once its end is on the panel."""

    number: int
    job: Job[GeneratedImage]
    over: threading.Event


class Explorer:
    """A panel on an engine: `Explorer(engine, config)` as a cell's last line shows it.

    Every button has a method: `generate`, `stop`, `use`, `start_from`, `compare`, `save`. `history` holds the images
    drawn, `config` and `request` what the controls say, `candidate` what was settled on. `folder` is where candidates
    are saved. The engine stays the caller's; `close` ends the panel.
    """

    def __init__(
        self,
        engine: Engine,
        config: GenerationConfig,
        prompt: str = "A cat in a hat",
        seed: int = 7,
        folder: Path | str = "runs/explore",
    ) -> None:
        self.engine, self.folder = engine, Path(folder)
        self.shown: HistoryEntry | None = None
        self._start = config
        self._saved: GenerationConfig | None = None
        self._count = 0
        self._last_seed: int | None = None
        self._source: SourceImage | None = None
        self._history: list[HistoryEntry] = []
        self._asked: list[Asked] = []
        self._lock = threading.RLock()
        self._watcher: threading.Thread | None = None
        self._chosen: dict[str, HistoryEntry] = {}
        self._filling = False
        self.panel = Panel()
        self._connect()
        self.use(ImageRequest(config, prompt, seed))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.panel.view._repr_mimebundle_(**options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what this panel is drawing and take it out of the notebook; the engine and `history` stay."""
        self.stop()
        watcher = self._watcher
        if watcher is not None:
            watcher.join()
        self.panel.close()

    # --- what the controls say ---------------------------------------------------------------------------------------

    @property
    def request(self) -> ImageRequest:
        """What the controls ask for. Raises `FormError` where they hold what the configuration refuses."""
        request = request_of(self.panel.values(), self._start)
        try:
            return replace(request, source=self.source)
        except ConfigError as error:
            raise FormError({told_at(error.field): str(error)}) from None

    @property
    def source(self) -> SourceImage | None:
        """What the next images start from, as the controls have it taken; None for noise. Raises `ConfigError`."""
        if self._source is None:
            return None
        return replace(self._source, **{name: control.value for name, control in self.panel.taken.items()})

    def start_from(
        self, image: HistoryEntry | Image.Image | Path | str | None, mask: Image.Image | Path | str | None = None
    ) -> None:
        """Have the next images start from an image, of the history or a file, painted anew where `mask` is white; or
        with None from noise. Raises `ConfigError`, and `ImageError` for a file that is no image."""
        source = None
        if isinstance(image, HistoryEntry):
            source = SourceImage(image.image, record=image.generated.record)
        elif image is not None:
            source = SourceImage(_opened(image))
        self._source = source if source is None or mask is None else replace(source, mask=_opened(mask))
        self._say_source()
        self._check()

    def _say_source(self) -> None:
        source = self._source
        if source is None:
            self.panel.say_source("The next image starts from noise.")
            return
        masked = " and is painted anew where the mask is white" if source.mask else ""
        size = f"{source.image.width}×{source.image.height}"
        self.panel.say_source(f"The next image starts from one of {size}, {source.sha256[:12]}{masked}.")

    @property
    def config(self) -> GenerationConfig:
        """The configuration that the controls show. Raises `FormError`."""
        return self.request.config

    def use(self, drawn: HistoryEntry | ImageRequest | None = None) -> None:
        """Fill the controls with an image's settings (default: those of the image shown)."""
        drawn = drawn or self.shown
        if drawn is None:
            return
        request = drawn.request if isinstance(drawn, HistoryEntry) else drawn
        self._start = request.config
        self._filling = True
        try:
            self.panel.fill(values_of(request))
            self._source = request.source
            for name, control in self.panel.taken.items() if request.source else ():
                control.value = getattr(request.source, name)
        finally:
            self._filling = False
        self._say_source()
        self._check()

    def _check(self, *_: object) -> None:
        """Tell beside each control what is wrong with it or cut off it, and which configuration they make together."""
        if self._filling:
            return
        self.panel.switch()
        try:
            request = self.request
        except FormError as error:
            self.panel.tell(error.errors, "")
            return
        tokens = self.engine.tokens(request)
        warnings = {name: count.warning(name) for name, count in tokens.items()}
        cut = {name: warning for name, warning in warnings.items() if warning is not None}
        self.panel.tell(cut, f"config {request.config.short_digest}, prompt: {tokens['prompt']}")

    # --- drawing -----------------------------------------------------------------------------------------------------

    @property
    def history(self) -> list[HistoryEntry]:
        """The images drawn with this panel, those that were done first at the beginning."""
        with self._lock:
            return [*self._history, *(_drawn(asked) for asked in self._asked if asked.job.state == "done")]

    def generate(self, **changes: Any) -> Job[GeneratedImage]:
        """Queue an image of the controls' settings, with some `changes`: prompt, prompt_2, seed, source, or settings,
        as `GenerationConfig.changed` takes them. The controls stay as they are.

        Raises `FormError` or `ConfigError` for bad settings, and what `Engine.submit` raises.
        """
        return self._submit(self._changed(changes)).job

    def draw(self, **changes: Any) -> HistoryEntry:
        """`generate`, and wait until the image is shown; interrupting the cell stops it."""
        asked = self._submit(self._changed(changes))
        try:
            asked.job.result()
            asked.over.wait()
        except BaseException:
            asked.job.cancel()
            raise
        return _drawn(asked)

    def _changed(self, changes: dict[str, Any]) -> ImageRequest:
        request = self.request
        ours = {name: changes.pop(name) for name in ("prompt", "prompt_2", "seed", "source") if name in changes}
        return replace(request, config=request.config.changed(changes, none=None), **ours)

    def stop(self) -> None:
        """Cancel what this panel is drawing or has queued: it ends at the engine's next step."""
        with self._lock:
            for asked in self._asked:
                asked.job.cancel()

    def _submit(self, request: ImageRequest) -> Asked:
        with self._lock:
            self._count += 1
            asked = Asked(self._count, self.engine.submit(request), threading.Event())
            self._last_seed = request.seed
            self._asked.append(asked)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="explore", daemon=True)
                self._watcher.start()
        return asked

    def _watch(self) -> None:
        """Show what is being drawn until nothing is. Runs in the watcher's thread."""
        pause = threading.Event()
        while True:
            with self._lock:
                ended = [asked for asked in self._asked if asked.job.over]
                self._history += [_drawn(asked) for asked in ended if asked.job.state == "done"]
                self._asked = [asked for asked in self._asked if asked not in ended]
                under_way = [asked.job for asked in self._asked]
            try:
                for asked in ended:
                    self._show_end(asked)
                if under_way:
                    self.panel.show_progress(under_way)
            except Exception as error:
                self.panel.say(f"The panel could not show an image: {error!r}", failed=True)
            for asked in ended:
                asked.over.set()
            with self._lock:
                if not self._asked:
                    self._watcher = None
                    return
            pause.wait(PERIOD)

    def _show_end(self, asked: Asked) -> None:
        job = asked.job
        if job.state == "done":
            drawn = _drawn(asked)
            self.panel.show_done(job)
            self.show(drawn)
            self.panel.add_card(drawn, self._card_actions(drawn))
            return
        error = job.exception()
        self.panel.show_stopped(None if isinstance(error, Cancelled) else str(error) or repr(error))
        if isinstance(error, ConfigError) and told_at(error.field) in self.panel.controls:
            self.panel.tell({told_at(error.field): str(error)}, "")

    # --- looking -----------------------------------------------------------------------------------------------------

    def show(self, drawn: HistoryEntry) -> None:
        """Put an image of the history on the panel, with its settings."""
        self.shown = drawn
        self.panel.show(drawn)

    def compare(self, first: HistoryEntry, second: HistoryEntry) -> dict[str, tuple[Any, Any]]:
        """Show two images side by side and what differs; the settings that differ, as (first's, second's)."""
        self._chosen = {"A": first, "B": second}
        different = differences(first.request, second.request)
        self.panel.show_comparison(first, second, different)
        return different

    def _choose(self, letter: str, drawn: HistoryEntry) -> None:
        self._chosen[letter] = drawn
        if len(self._chosen) == 2:
            self.compare(self._chosen["A"], self._chosen["B"])
        else:
            self.panel.say_compare(f"#{drawn.number} is {letter}: choose the other image of the comparison.")

    # --- the candidate -----------------------------------------------------------------------------------------------

    @property
    def candidate(self) -> GenerationConfig:
        """The configuration saved last; until then that of the image shown; until one is drawn, the controls'."""
        if self._saved is not None:
            return self._saved
        return self.shown.config if self.shown is not None else self.config

    def save(self, drawn: HistoryEntry | None = None, name: str | None = None) -> Path:
        """Write the configuration of an image (default: the one shown) to `folder/NAME.toml` as the candidate.

        Raises `FileExistsError` where the file holds another configuration: nothing is overwritten.
        """
        drawn = drawn or self.shown
        if drawn is None:
            raise ValueError("a candidate must be the configuration of an image; draw one first")
        name = name or self.panel.name.value.strip()
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(
                f"a candidate's name must be a file's name without folders; received {name!r}. Example: candidate"
            )
        path = self.folder / f"{name.removesuffix('.toml')}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x") as file:
                file.write(drawn.config.to_toml())
        except FileExistsError:
            if path.read_text() != drawn.config.to_toml():
                raise FileExistsError(f"{path} holds another configuration, which stays; choose another name") from None
        self._saved = drawn.config
        return path

    # --- buttons -----------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        panel = self.panel
        for control in panel.controls.values():
            control.observe(self._check, "value")
        for control in panel.taken.values():
            control.observe(self._check, "value")
        panel.source.observe(self._guarded(self._on_source), "value")
        panel.mask.observe(self._guarded(self._on_mask), "value")
        panel.start.on_click(self._guarded(self._on_start))
        panel.anew.on_click(self._guarded(lambda: self.start_from(None)))
        panel.generate.on_click(self._guarded(self._on_generate))
        panel.stop.on_click(self._guarded(self._on_stop))
        panel.use.on_click(self._guarded(self.use))
        panel.save.on_click(self._guarded(self._on_save))

    def _card_actions(self, drawn: HistoryEntry) -> dict[str, Callable[[object], None]]:
        return {
            "Show": self._guarded(lambda: self.show(drawn)),
            "A": self._guarded(lambda: self._choose("A", drawn)),
            "B": self._guarded(lambda: self._choose("B", drawn)),
        }

    def _guarded(self, action: Callable[[], object]) -> Callable[[object], None]:
        """A handler whose error stands below the buttons: what a handler raises is seen nowhere else."""

        def handler(_: object) -> None:
            try:
                action()
            except FormError as error:
                self.panel.tell(error.errors, "")
            except Exception as error:
                self.panel.tell({"button": str(error) or repr(error)}, "")

        return handler

    def _on_generate(self) -> None:
        controls, request = self.panel.controls, self.request
        seed = next_seed(controls["policy"].value, request.seed, self._last_seed)
        controls["seed"].value = str(seed)
        self._submit(replace(request, seed=seed))
        self._check()

    def _on_start(self) -> None:
        if self.shown is not None:
            self.start_from(self.shown)

    def _on_source(self) -> None:
        self.start_from(_uploaded(self.panel.source.value))

    def _on_mask(self) -> None:
        if self._source is None:
            raise ValueError("a mask must come with a source: choose what the image starts from, then the mask again")
        self._source = replace(self._source, mask=_uploaded(self.panel.mask.value))
        self._say_source()

    def _on_stop(self) -> None:
        with self._lock:
            count = len(self._asked)
        self.stop()
        self.panel.say("Stopping ..." if count else "Nothing is being drawn.")

    def _on_save(self) -> None:
        try:
            path = self.save()
        except (ValueError, OSError) as error:
            self.panel.say_saved(str(error), failed=True)
            return
        self.panel.say_saved(f"Saved {path} ({self.candidate.short_digest})")


def _opened(image: Image.Image | Path | str) -> Image.Image:
    return image if isinstance(image, Image.Image) else open_image(image)


def _uploaded(files: Any) -> Image.Image | None:
    """The last of the files that a widget has."""
    return open_image(bytes(files[-1]["content"])) if files else None


def _drawn(asked: Asked) -> HistoryEntry:
    return HistoryEntry(asked.number, asked.job.request, asked.job.result())
