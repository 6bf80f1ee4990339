"""What the explore panel's controls say, as plain values: to a request and back, the next seed, what differs.

Which controls there are follows from the declaration of `GenerationConfig`: a setting that is added there has its
control here. Needs no widgets and no models, so that it can be tried without a browser or a GPU.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from sdxl_lab.config import (
    MAX_SEED,
    PROMPT,
    PROMPT_2,
    SEED,
    ConfigError,
    GenerationConfig,
    checked_prompt,
    checked_seed,
)
from sdxl_lab.declaration import Falling, Kind, Pair, Setting, Switch, Table, Tables, Text
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.lora_files import pinned
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.diff import changes, flat
from sdxl_lab.schedules import OWN, settled_by

WORDS = Text(0, 4000)
TYPED = (Text, Falling)  # what is typed, and left out by leaving it empty
SEED_POLICIES = ("fixed", "random", "next")


class FormError(ValueError):
    """Some controls hold what the configuration refuses. `errors` has the reason for each, by the control's name."""

    def __init__(self, errors: Mapping[str, str]) -> None:
        super().__init__("; ".join(errors.values()))
        self.errors = dict(errors)


@dataclass(frozen=True)
class Control:
    """One control: its name, its label, the kind of its value, and the setting that it shows or is a part of. `under`
    names the switch that it counts with."""

    name: str
    label: str
    kind: Kind
    setting: Setting
    under: str | None = None


@cache
def controls() -> Mapping[str, Control]:
    """The controls by name, in the order of the declaration, a switch before what it switches.

    A setting has one control under its own name; a pair has two, such as `crop.top` and `crop.left`. What may be left
    out, but for text, has a switch under its name, and its value below it: `guidance_interval`, then
    `guidance_interval.low` and `guidance_interval.high`. Text and lists are typed, and left out by leaving them empty.
    A list of tables is a text, their words side by side as a command line takes them. The model has no control, since
    the engine has loaded it.
    """
    found: dict[str, Control] = {}
    for setting in (PROMPT, PROMPT_2, *GenerationConfig.settings().values(), SEED):
        if setting.name.partition(".")[0] != "model":
            found |= {control.name: control for control in _controls_of(setting)}
    return MappingProxyType(found)


def _controls_of(setting: Setting) -> list[Control]:
    name, label, kind = setting.name, setting.label, setting.kind
    under = name.rpartition(".")[0] or None
    found = []
    if setting.optional and not isinstance(kind, TYPED):
        found.append(Control(name, label, Switch(), setting, under))
        under = name
    match kind:
        case Table():
            return found
        case Tables():
            return [Control(name, label, WORDS, setting, under)]
        case Pair(each=each, names=names):
            return found + [Control(f"{name}.{part}", f"{label}: {part}", each, setting, under) for part in names]
    own = f"{name}.value" if found else name
    return [*found, Control(own, label, kind, setting, under)]


def values_of(request: ImageRequest) -> dict[str, Any]:
    """The controls' values that `request_of` turns into this request again. Controls that are switched off keep sound
    values. `seed` is text, since a browser's numbers end at 2^53."""
    ours = {"prompt": request.prompt, "prompt_2": request.prompt_2 or "", "seed": str(request.seed)}
    return {name: ours[name] if name in ours else _shown(control, request) for name, control in controls().items()}


def _shown(control: Control, request: ImageRequest) -> Any:
    setting = control.setting
    value = request.config.value(setting.name)
    if control.name == setting.name and setting.optional and not isinstance(setting.kind, TYPED):
        return value is not None
    if isinstance(setting.kind, Tables):
        return ", ".join(table.word for table in value)
    if value is None and isinstance(setting.kind, TYPED):
        return ""
    if isinstance(setting.kind, Falling):
        return setting.kind.written(value)
    if value is None:  # where one starts from when it is switched on
        value = setting.check(setting.example if setting.default is None else setting.default)
    if isinstance(setting.kind, Pair):
        return value[setting.kind.names.index(control.name.rpartition(".")[2])]
    return value


def request_of(values: Mapping[str, Any], start: GenerationConfig) -> ImageRequest:
    """The request that the controls ask for: `start`, which has what no control shows, with their values.

    Raises `FormError` with all that is wrong, not only the first.
    """
    errors: dict[str, str] = {}

    def checked(control: str, check: Callable[..., Any], *arguments: object) -> Any:
        try:
            return check(*arguments)
        except ConfigError as error:
            errors[control] = str(error)
            return None

    asked: dict[str, Any] = {}
    for name in dict.fromkeys(control.setting.name for control in controls().values()):
        outer = name.rpartition(".")[0]
        if name in (PROMPT.name, PROMPT_2.name, SEED.name) or not values.get(outer, True):
            continue
        asked[name] = _asked(name, values, start)
        if not isinstance(GenerationConfig.setting(name).kind, Table):
            checked(told_at(name), GenerationConfig.checked, name, asked[name])
    prompt = checked("prompt", checked_prompt, values["prompt"])
    second = checked("prompt_2", checked_prompt, values["prompt_2"] or None, PROMPT_2)
    seed = checked("seed", checked_seed, _number(values["seed"]))
    if not errors:
        told = "loras"
        try:
            config = start.changed(asked, none=None)
            pinned(config.with_(embeddings=()))
            told = "embeddings"
            return ImageRequest(pinned(config), prompt, seed, prompt_2=second)
        except ConfigError as error:  # a rule over more than one control
            errors[told_at(error.field)] = str(error)
        except ModelError as error:
            errors[told] = str(error)
    raise FormError(errors)


def _asked(name: str, values: Mapping[str, Any], start: GenerationConfig) -> Any:
    """What the controls say of a setting, as `GenerationConfig.changed` takes it."""
    first, *rest = (control for control in controls().values() if control.setting.name == name)
    kind = first.setting.kind
    if isinstance(kind, Tables):
        same = {table.word: table for table in start.value(name)}
        words = [word.strip() for word in values[name].split(",")]
        return [same.get(word, word) for word in words if word]
    if isinstance(kind, Text):
        # Empty says none, unless "" is what it started from: the two give different images.
        left_out = first.setting.optional and start.value(name) != ""
        return values[name] or (None if left_out else "")
    if isinstance(kind, Falling):
        return _listed(kind, values[name])
    if first.setting.optional:
        if isinstance(kind, Table) or not values[name]:
            return bool(values[name]) if isinstance(kind, Table) else None
        first, *rest = rest
    return tuple(values[part.name] for part in (first, *rest)) if isinstance(kind, Pair) else values[first.name]


def without_a_choice(values: Mapping[str, Any]) -> dict[str, str]:
    """The controls of which the chosen scheduler leaves no choice, and why. One that was moved before is not among
    them: it is told to be wrong, and can be moved back."""
    found = settled_by(values["scheduler"])
    return {name: why for name, why in found.items() if values[name] in (OWN, "")}


def told_at(name: str) -> str:
    """The control beside which an error of a setting stands; the name itself where there is none."""
    return next((control.name for control in controls().values() if control.setting.name == name), name)


def _number(text: str) -> int | str:
    """The text as a whole number; as it is where it is none."""
    try:
        return int(text)
    except ValueError:
        return text


def _listed(kind: Falling, text: str) -> tuple[Any, ...] | str | None:
    """The text as a list of values, None where it is empty; as it is where it is no such list."""
    try:
        return kind.read_all(text) or None
    except ValueError:
        return text


def next_seed(policy: str, seed: int, last: int | None) -> int:
    """The seed of the next image: `seed` itself; a random one below 2^32, as other programs draw them; or, where
    `seed` was the last image's, one more."""
    if policy == "random":
        return secrets.randbelow(2**32)
    return (seed + 1) % (MAX_SEED + 1) if policy == "next" and seed == last else seed


def settings(request: ImageRequest) -> dict[str, Any]:
    """All that decides the request's image, flat: prompt, seed, and the configuration's fields with dotted names."""
    second = {} if request.prompt_2 is None else {"prompt_2": request.prompt_2}
    source = {} if request.source is None else {"source.strength": request.source.strength}
    if request.source is not None:
        told = request.source.to_record().model_dump(exclude_none=True)
        source |= {f"source.{name}": value for name, value in told.items()}
    return {"prompt": request.prompt, **second, "seed": request.seed, **source, **flat(request.config.to_dict())}


def differences(first: ImageRequest, second: ImageRequest) -> dict[str, tuple[Any, Any]]:
    """The settings in which two requests differ: name -> (first's value, second's); None where one has none."""
    return changes(settings(first), settings(second))
