"""What the explore panel's controls say, as plain values: to a request and back, the next seed, what differs.

Knows no widgets and no models, so that it can be tried without a browser or a GPU.
"""

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from sdxl_lab.config import MAX_SEED, ConfigError, GenerationConfig, RefinerConfig, checked_prompt, checked_seed
from sdxl_lab.job import ImageRequest
from sdxl_lab.release.diff import changes, flat

SEED_POLICIES = ("fixed", "random", "next")
PLAIN = ("scheduler", "steps", "guidance_scale", "guidance_rescale", "width", "height")  # fields as they are
REFINER = ("handover", "aesthetic_score", "negative_aesthetic_score")
INTERVAL = (0.28, 5.42)  # what Kynkaanniemi et al. found best for SDXL: where one starts


class FormError(ValueError):
    """Some controls hold what the configuration refuses. `errors` has the reason for each, by the control's name."""

    def __init__(self, errors: Mapping[str, str]) -> None:
        super().__init__("; ".join(errors.values()))
        self.errors = dict(errors)


def values_of(request: ImageRequest) -> dict[str, Any]:
    """The controls' values that `request_of` turns into this request again. Controls that are switched off keep sound
    values.

    `seed` is text, since a browser's numbers end at 2^53; `interval` and `refiner` are switches.
    """
    config = request.config
    low, high = config.guidance_interval or INTERVAL
    refiner = config.refiner or RefinerConfig()
    return {
        "prompt": request.prompt,
        "negative_prompt": config.negative_prompt or "",
        **{name: getattr(config, name) for name in PLAIN},
        "interval": config.guidance_interval is not None,
        "interval_low": low,
        "interval_high": high,
        "seed": str(request.seed),
        "refiner": config.refiner is not None,
        **{name: getattr(refiner, name) for name in REFINER},
    }


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

    asked = {name: checked(name, GenerationConfig.checked, name, values[name]) for name in PLAIN}
    asked["negative_prompt"] = checked("negative_prompt", _negative, values["negative_prompt"], start)
    asked["guidance_interval"] = asked["refiner"] = None
    if values["interval"]:
        pair = (values["interval_low"], values["interval_high"])
        asked["guidance_interval"] = checked("interval", GenerationConfig.checked, "guidance_interval", pair)
    if values["refiner"]:
        parts = {name: checked(name, RefinerConfig.checked, name, values[name]) for name in REFINER}
        asked["refiner"] = None if errors.keys() & parts.keys() else RefinerConfig(**parts)
    prompt = checked("prompt", checked_prompt, values["prompt"])
    seed = checked("seed", checked_seed, _number(values["seed"]))
    if not errors:
        try:
            return ImageRequest(start.with_(**asked), prompt, seed)
        except ConfigError as error:  # a rule over more than one control
            errors[error.field] = str(error)
    raise FormError(errors)


def _negative(text: str, start: GenerationConfig) -> str | None:
    """An empty control says none, unless "" is what it started from: the two give different images."""
    given = text or ("" if start.negative_prompt == "" else None)
    return GenerationConfig.checked("negative_prompt", given)


def _number(text: str) -> int | str:
    """The text as a whole number; as it is where it is none."""
    try:
        return int(text)
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
    return {"prompt": request.prompt, "seed": request.seed, **flat(request.config.to_dict())}


def differences(first: ImageRequest, second: ImageRequest) -> dict[str, tuple[Any, Any]]:
    """The settings in which two requests differ: name -> (first's value, second's); None where one has none."""
    return changes(settings(first), settings(second))
